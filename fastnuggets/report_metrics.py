"""The page of ``fastnuggets metrics``: one HTML file with its pictures inside, and the numbers beside it as JSON."""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastnuggets import __version__
from fastnuggets.figures import INK, chart, svg, table
from fastnuggets.molecules.files import need
from fastnuggets.molecules.metrics import PROPERTIES, Metrics, Statistics
from fastnuggets.page import HEAD, write_page

_BINS = 60
_SHOWN = 24
_FRAGMENTS = 6
_OURS, _THEIRS = "#2f6fed", "#8b8d98"
_TITLES = {"logp": "logP", "sa": "synthetic accessibility", "qed": "QED", "weight": "molecular weight, g/mol"}
_MEANING = {
    "valid": ("higher", "share that RDKit parses"),
    "unique@1000": ("higher", "share of distinct ones among the first 1,000 valid ones"),
    "unique@10000": ("higher", "share of distinct ones among the first 10,000 valid ones"),
    "FCD/Test": ("lower", "Frechet distance of ChemNet's activations to the reference's"),
    "SNN/Test": ("higher", "mean similarity to the nearest molecule of the reference"),
    "Frag/Test": ("higher", "cosine of the counts of BRICS fragments"),
    "Scaf/Test": ("higher", "cosine of the counts of Bemis-Murcko scaffolds with two rings or more"),
    "FCD/TestSF": ("lower", "the same four against the second reference"),
    "SNN/TestSF": ("higher", ""),
    "Frag/TestSF": ("higher", ""),
    "Scaf/TestSF": ("higher", ""),
    "IntDiv": ("higher", "1 − mean similarity of all pairs"),
    "IntDiv2": ("higher", "the same with mean squares"),
    "Filters": ("higher", "share that passes PAINS, MCF if given, and limits on rings, charges and elements"),
    "logP": ("lower", "Wasserstein-1 distance to the reference's"),
    "SA": ("lower", "the same"),
    "QED": ("lower", "the same"),
    "weight": ("lower", "the same"),
    "Novelty": ("higher", "share of the distinct ones that are not in the training set"),
}
_TILES = {
    "valid": "valid",
    "unique@10000": "distinct",
    "Novelty": "new",
    "Filters": "pass the filters",
    "SNN/Test": "similarity to the nearest of the reference",
    "FCD/Test": "Frechet ChemNet distance",
}

PAGE = (
    HEAD
    + """\
<style>
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
.cells figure { margin: 0; } .cells figcaption { font-size: 13px; color: var(--soft); line-height: 1.35; }
</style>
<p class="lead">$generated: $molecules molecules, $valid_count of them valid, compared with the $reference_count of
$reference.</p>
<div class="tiles">$tiles</div>
<section>
<h2>Properties</h2>
<p class="legend"><span><i style="background:$ours"></i>generated</span>
<span><i style="background:$theirs"></i>reference</span></p>
<div class="two">$charts</div>
<p class="note">Shares of molecules in 60 bins; beyond them lies at most 0.1 % on either side of both sets.</p>
</section>
<section>
<h2>The metrics of MOSES</h2>
<div class="text">$values</div>
$remarks
</section>
<section>
<h2>Molecules, at random</h2>
<div class="cells">$cells</div>
</section>
<section>
<h2>Fragments that are too many or too few</h2>
<p>BRICS fragments whose shares differ most: generated, then reference, in % of all fragments.</p>
<div class="cells">$fragments</div>
</section>
<section>
<h2>What was used</h2>
<p>Definitions: Polykovskiy et al., Frontiers in Pharmacology 11, 565644 (2020), as their code has them. Training set:
$train. Second reference: $second. Medicinal chemistry filters: $mcf.</p>
<p class="note">$versions</p>
</section>
"""
)


def write(found: Metrics, generated: Statistics, reference: Statistics, args: argparse.Namespace) -> Path:
    """metrics.html and metrics.json in the folder ``args.out``; returns the page's path."""
    versions = {"fastnuggets": __version__, "torch": str(torch.__version__), "rdkit": need("rdkit").__version__}
    given = {name: getattr(args, name) for name in ("input", "reference", "train", "scaffold_reference", "mcf")}
    files = {name: None if path is None else str(path) for name, path in given.items()}
    figures = {
        "files": files,
        "molecules": {"generated": generated.total, "valid": generated.valid, "reference": reference.valid},
        "metrics": found.named(),
        "notes": found.notes,
        "versions": versions,
    }
    shown = {name: html.escape(Path(path).name) if path else "none" for name, path in files.items()}
    if not args.mcf:
        shown["mcf"] = "none" if any("MCF" in note for note in found.notes) else "of the installed molsets"
    fields = {
        "title": f"Generated molecules: {shown['input']}",
        "generated": shown["input"],
        "molecules": f"{found.molecules:,}",
        "valid_count": f"{generated.valid:,}",
        "reference": shown["reference"],
        "reference_count": f"{reference.valid:,}",
        "tiles": _tiles(found),
        "ours": _OURS,
        "theirs": _THEIRS,
        "charts": "".join(_chart(i, found, generated, reference) for i in range(len(PROPERTIES))),
        "values": table(("", "value", "better", ""), _rows(found)),
        "remarks": "".join(f'<p class="note">{html.escape(note)}.</p>' for note in found.notes),
        "cells": "".join(_cell(smiles, _properties(smiles)) for smiles in generated.sample[:_SHOWN]),
        "fragments": _fragments(generated.fragments, reference.fragments),
        "train": shown["train"],
        "second": shown["scaffold_reference"],
        "mcf": shown["mcf"],
        "versions": html.escape(", ".join(f"{name} {version}" for name, version in versions.items())),
    }
    return write_page(args.out, "metrics", PAGE, fields, found, figures)


def _tiles(found: Metrics) -> str:
    values = found.named()
    text = {"FCD/Test": "{:.3f}", "SNN/Test": "{:.3f}"}
    return "".join(
        f'<div class="tile"><b>{text.get(name, "{:.1%}").format(values[name])}</b><span>{label}</span></div>'
        for name, label in _TILES.items()
        if name in values
    )


def _rows(found: Metrics) -> list[tuple[str, ...]]:
    return [(name, f"{value:.5g}", *_MEANING[name]) for name, value in found.named().items()]


def _chart(column: int, found: Metrics, generated: Statistics, reference: Statistics) -> str:
    name = PROPERTIES[column]
    sets = [given.properties[:, column] for given in (generated, reference)]
    sets = [values[~np.isnan(values)] for values in sets]
    if not any(map(len, sets)):
        return ""
    figure, axis = chart(5.2, 2.5)
    both = np.concatenate([np.quantile(values, (0.001, 0.999)) for values in sets if len(values)])
    low, high = (both.min(), both.max()) if both.min() < both.max() else (both.min() - 0.5, both.min() + 0.5)
    for values, color in zip(sets, (_OURS, _THEIRS), strict=True):
        counts, edges = np.histogram(values, _BINS, (low, high))
        axis.stairs(counts / max(len(values), 1), edges, color=color, lw=1.8)
        axis.stairs(counts / max(len(values), 1), edges, color=color, fill=True, alpha=0.18)
    distance = getattr(found, name)
    axis.set_xlabel(_TITLES[name] + ("" if math.isnan(distance) else f" — apart by {distance:.3g}"), color=INK)
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    return svg(figure, f"Distribution of {_TITLES[name]}, generated and reference")


def _properties(smiles: str) -> str:
    from rdkit.Chem import QED, Crippen, MolFromSmiles

    mol = MolFromSmiles(smiles)
    return f"logP {Crippen.MolLogP(mol):.1f}, QED {QED.qed(mol):.2f}"


def _cell(smiles: str, caption: str) -> str:
    title = html.escape(smiles)
    return f'<figure title="{title}">{_drawing(smiles)}<figcaption>{caption}</figcaption></figure>'


def _drawing(smiles: str) -> str:
    """An SVG in the page's colours."""
    from rdkit import rdBase
    from rdkit.Chem import MolFromSmiles
    from rdkit.Chem.Draw import rdMolDraw2D

    with rdBase.BlockLogs():
        draw = rdMolDraw2D.MolDraw2DSVG(220, 160)
        options = draw.drawOptions()
        options.clearBackground = False
        options.updateAtomPalette({7: (0.25, 0.48, 0.93), 8: (0.88, 0.3, 0.3)})
        mol = MolFromSmiles(smiles)
        if mol is None:  # a fragment whose aromatic ring was cut
            mol = MolFromSmiles(smiles, sanitize=False)
            mol.UpdatePropertyCache(strict=False)
            rdMolDraw2D.PrepareAndDrawMolecule(draw, mol, kekulize=False)
        else:
            rdMolDraw2D.PrepareAndDrawMolecule(draw, mol)
        draw.FinishDrawing()
    text = draw.GetDrawingText().replace("#000000", "currentColor")
    return text[text.index("<svg") :]


def _fragments(generated: Mapping[str, int], reference: Mapping[str, int]) -> str:
    ours, theirs = sum(generated.values()), sum(reference.values())
    if not ours or not theirs:
        return ""
    shares = {
        name: (100 * generated.get(name, 0) / ours, 100 * reference.get(name, 0) / theirs)
        for name in generated.keys() | reference.keys()
    }
    order = sorted(shares, key=lambda name: (shares[name][1] - shares[name][0], name))
    chosen = dict.fromkeys(order[:_FRAGMENTS] + order[-_FRAGMENTS:])
    return "".join(_cell(name, "{:.2f}, {:.2f}".format(*shares[name])) for name in chosen)
