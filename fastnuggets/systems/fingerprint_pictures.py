"""Pictures of generated fingerprints for the page of a run."""

from __future__ import annotations

import html
import re

import numpy as np
from torch import Tensor

from fastnuggets.figures import INK, chart, svg, table
from fastnuggets.molecules.files import need
from fastnuggets.systems.base import Section
from fastnuggets.systems.fingerprint_data import LEAST, Rows, properties
from fastnuggets.systems.fingerprint_measures import Fit, judge, nearest, regression

DATA, SAMPLES = "#8b8d98", "#2f6fed"
_SHOWN = 6  # molecules drawn
_LATENTS = 20  # rows of the table of latents
_POINTS = 1500  # molecules that a property is told of


def sample_section(logits: Tensor, known: Rows, what: str) -> Section:
    """Samples [S, bits] beside what was learned, and the molecules nearest to the first of them."""
    made = judge(logits, known.packed)
    data, own = (row.numpy() for row in made.frequencies)
    figure, axis = chart(5.4, 3.8)
    axis.plot([0, 1], [0, 1], "--", color=INK, alpha=0.4, lw=1)
    axis.plot(data, own, "o", color=SAMPLES, ms=4, mew=0, alpha=0.6)
    axis.set_xlabel(f"share of {what} that have a bit", color=INK)
    axis.set_ylabel("mean probability in samples", color=INK)
    rows = [
        ["distinct nearest fingerprints", f"{made.covered} of {len(logits)}"],
        ["ln p of the nearest: best, mean", f"{made.best:.1f}, {made.mean:.1f}"],
        ["cosine of the bits' means", f"{made.mean_cosine:.4f}"],
        ["cosine of the bits' standard deviations", f"{made.std_cosine:.4f}"],
    ]
    picture = svg(figure, "How often each bit is set, data and samples")
    text = f'<div class="two"><div>{picture}</div><div>{table(["samples", ""], rows)}</div></div>'
    drawn = ""
    if len(known.smiles):
        found = nearest(logits[:_SHOWN], known.packed)
        labels = [f"ln p {score:.1f}" for score in found.score[:, 0].tolist()]
        drawn = molecules([known.smiles[row] for row in found.row[:, 0].tolist()], labels)
        drawn = f"<p>The likeliest of the {what} under the first {_SHOWN} samples, none of them chosen:</p>{drawn}"
    return Section("What it draws", text + drawn)


def code_section(codes: Tensor, fit: Fit, prior_std: float, rows: Rows) -> Section:
    """Codes [N, latent] of fingerprints that were held out, beside the prior, and what they tell."""
    figure, axis = chart(5.4, 3.4)
    edges = np.linspace(-4 * prior_std, 4 * prior_std, 61)
    for latent in codes.T.numpy():
        axis.hist(latent, edges, density=True, histtype="step", color=SAMPLES, alpha=0.5, lw=0.9)
    middle = (edges[1:] + edges[:-1]) / 2
    axis.plot(middle, np.exp(-((middle / prior_std) ** 2) / 2) / (prior_std * np.sqrt(2 * np.pi)), "--", color=INK)
    axis.set_xlabel("latent; dashed, the prior", color=INK)
    axis.set_yticks([])
    columns = zip(*(of.tolist() for of in (fit.mean, fit.std, fit.ks, fit.p)), strict=True)
    cells = [[str(i), *(f"{v:.3f}" for v in values)] for i, values in enumerate(columns)][:_LATENTS]
    left = svg(figure, "Distribution of each latent over held-out fingerprints, and the prior")
    right = table(["latent", "mean", "std", "KS distance", "p"], cells)
    note = (
        f"{len(codes)} fingerprints that were held out. KS: Kolmogorov and Smirnov's test of each latent alone. All "
        f"together: energy distance {fit.energy:.3f}, p {fit.energy_p:.3f}; a perfect fit gives any p alike."
    )
    parts = [f'<div class="two"><div>{left}</div><div>{right}</div></div><p class="note">{note}</p>']
    if len(rows.smiles) >= LEAST and any(rows.smiles[:LEAST]):
        parts.append(_told(codes, rows))
    return Section("Codes and the prior", "".join(parts))


def _told(codes: Tensor, rows: Rows) -> str:
    values = properties(rows.smiles[:_POINTS], "logP")
    there = values.isfinite().nonzero().flatten()
    score, predicted = regression(codes[there], values[there])
    return (
        '<div class="two"><div>'
        + scatter(values[there], predicted, "logP", "logP, told by a linear function of the code")
        + f"</div><div><p>A linear function of the code tells logP of molecules that it was not fitted to: "
        f"R² {score:.2f}.</p></div></div>"
    )


def steering_section(asked: Tensor, got: Tensor, figures: dict[str, float], name: str, rows: Rows) -> Section:
    """The property asked for beside that of the likeliest molecules, and molecules from low to high."""
    picture = scatter(asked, got, f"{name}, asked", f"{name} of the likeliest molecule", trend=True)
    said = table(["", ""], [[key, f"{value:.3g}"] for key, value in figures.items()])
    text = f"A code is drawn from the prior, and the property is set by hand: {len(asked)} samples. The molecules are"
    text += f" those of the {len(rows)} learned from that are likeliest under each sample; line: means of tenths."
    return Section(
        "Steered by the condition",
        f'<div class="two"><div>{picture}</div><div>{said}<p class="note">{text}</p></div></div>',
    )


def scatter(x: Tensor, y: Tensor, x_name: str, y_name: str, *, trend: bool = False) -> str:
    """Points, and the mean of y in each tenth of x."""
    figure, axis = chart(5.4, 4)
    axis.plot(x.numpy(), y.numpy(), "o", color=SAMPLES, ms=3, mew=0, alpha=0.35, rasterized=True)
    ends = [float(x.min()), float(x.max())]
    axis.plot(ends, ends, "--", color=INK, alpha=0.5, lw=1)
    if trend:
        parts = x.argsort().chunk(10)
        axis.plot([float(x[p].mean()) for p in parts], [float(y[p].mean()) for p in parts], "o-", color="#e07a3f", lw=2)
    axis.set_xlabel(x_name, color=INK)
    axis.set_ylabel(y_name, color=INK)
    return svg(figure, f"{y_name} against {x_name}")


def molecules(smiles: list[str], labels: list[str]) -> str:
    """Drawings side by side, in the page's colour."""
    chem, draw = need("rdkit.Chem"), need("rdkit.Chem.Draw.rdMolDraw2D")
    cells = []
    for text, label in zip(smiles, labels, strict=True):
        drawer = draw.MolDraw2DSVG(220, 170)
        options = drawer.drawOptions()
        options.clearBackground = False
        options.useBWAtomPalette()
        mol = chem.MolFromSmiles(text) if text else None
        if mol is None:
            continue
        draw.PrepareAndDrawMolecule(drawer, mol)
        drawer.FinishDrawing()
        made = drawer.GetDrawingText()
        made = made[made.index("<svg") :].replace("#000000", "currentColor")
        made = re.sub(r"\s+xmlns:\w+=['\"][^'\"]*['\"]", "", made)  # of addresses that mean nothing in a page
        made = made.replace("<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1)
        cells.append(
            f'<figure style="margin:0">{made}<figcaption class="note">{html.escape(label)}</figcaption></figure>'
        )
    style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px"
    return f'<div style="{style}">{"".join(cells)}</div>'
