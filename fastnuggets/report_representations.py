"""The page of the study of representations: one HTML file with its charts inside. Every number in it is computed."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastnuggets import __version__
from fastnuggets.demo_representations import (
    ELEMENTS,
    LEARNED,
    LEVELS,
    NOISY,
    ONE_HOT,
    SPACING,
    WAVES,
    Representation,
    Result,
)
from fastnuggets.figures import INK, bare, chart, duration, image, png, pyplot, svg, table, tiled
from fastnuggets.molecules.files import atomic_write
from fastnuggets.molecules.matching import GATE, Score
from fastnuggets.page import HEAD, write_page
from fastnuggets.systems.molecule_grids import MARGIN
from fastnuggets.systems.wave_autoencoder import CAUTIONS

TITLE = "Molecules as voxels, as Gaussians, as waves"
NAMES = [name.replace("F+Cl+Br+I", "halogen") for name in ELEMENTS.split(",")]
COLORS = {
    "one-hot": "#8b8d98",
    "Gaussian, narrow": "#e2a400",
    "Gaussian 0.75": "#e07a3f",
    "Gaussian, wide": "#d6336c",
    "Gaussian 1.5": "#8a2c4a",
    "wave, narrow": "#1d7f8c",
    "wave, wide": "#2f6fed",
    "wave 1, 0.6": "#2ba35a",
    "wave 1.5, 0.667": "#8a5cd6",
}

PAGE = (
    HEAD
    + """\
<p class="lead">The same $learned molecules are drawn in five ways. One autoencoder and one predictor of MACCS keys
learn from each drawing, of the same size, with the same steps and settings; then the atoms are looked for in what the
autoencoders return for $tested molecules that they have never seen. What is better, and for what?</p>

<div class="tiles">$tiles</div>

<section>
<h2>One molecule, five drawings</h2>
$slices
<p class="note">The middle plane of a test molecule with all channels added, and below it what the autoencoder returns
(first seed). Purple is negative.</p>
</section>

<section>
<h2>The atoms that come back</h2>
$atoms_table
$elements_chart
$elements_table
<p>$atoms_text</p>
<p class="note">Right: of the right element and within $gate Å, each atom once. Whole: every atom right and nothing
else. Position error: root mean square of the atoms that are right. $spread. How sure one must be of an atom is chosen
for each representation alike, among $cautions, on $chosen molecules of the training: of waves and Gaussians the noise
that the search reckons with, of one-hot voxels the threshold. A network gives back less than a whole atom where it is
unsure; each channel is divided by what the training found it to give back: $gains.</p>
</section>

<section>
<h2>MACCS keys from the grid</h2>
$keys_table
<p>$keys_text</p>
<p class="note">Of the 166 keys $varying vary among the test molecules (first seed). Micro: all keys and molecules
ranked together, where knowing how common a key is helps; macro: the mean over keys.</p>
</section>

<section>
<h2>Noise on the grid</h2>
<p>No network here: white noise is added to the grids of $noisy molecules, of so many per cent of an atom's peak in each
voxel, and the atoms are looked for.</p>
<div class="two"><div>$noise_chart</div><div>$noise_table</div></div>
<p>$noise_text</p>
<p class="note">Molecules found whole, %, and position error of the atoms found, Å. A Gaussian is named by its σ in Å, a
wave by its σ and its ω in 1/Å; narrow Gaussians have 0.5, wide ones 1, narrow waves 0.75, 0.5, wide ones 1, 0.5.</p>
</section>

<section>
<h2>What was used</h2>
<p>NCI's first $read records in RDKit, one ETKDGv3 conformer each, heavy atoms alone; $left_out left out. Of the $left
left, those within $radius Å of their centre are learned from and tested on ($mean_atoms atoms on average), in boxes of
$shape³ voxels of $spacing Å, turned and moved at random each time; the noise is tried on all, in boxes of
$noisy_shape³. Channels: $channels. Autoencoder: $parameters weights, $latent numbers for each 4³ voxels, $steps steps
of $batch. Predictor: $key_parameters weights, $key_steps steps of $batch. AdamW, $rate, a cosine. The loss divides each
channel by its spread, for all alike; its values cannot be compared between representations, so only what is found is.
The constants of the wave are this library's own: those of the publication (Kuzminykh et al., Mol. Pharm. 2018) are not
known here, nor is its network.</p>
<p>All computations took $seconds by the clock and $processor of processor time, $reused of $parts parts of them in an
earlier call. Every figure is in representations.json, beside this page.</p>
<p class="note">Seeds 0 to $last_seed · $machine, $threads threads · $versions</p>
</section>
"""
)


class Metric(NamedTuple):
    """A number of a learned representation."""

    name: str
    value: Callable[[dict[str, Any]], float]
    digits: int
    sign: int = 1  # 1 if more is better


def _score(found: dict[str, Any], channel: int = -1) -> Score:
    return Score(*found["scores"][channel])


ATOMS = (
    Metric("precision %", lambda found: 100 * _score(found).precision, 1),
    Metric("recall %", lambda found: 100 * _score(found).recall, 1),
    Metric("F1 %", lambda found: 100 * _score(found).f1, 1),
    Metric("position error Å", lambda found: _score(found).rmse, 3, -1),
    Metric("molecules whole %", lambda found: 100 * found["recovered"], 1),
)
F1, ERROR, WHOLE = ATOMS[2:]
KEYS = (
    Metric("ROC AUC, macro", lambda found: found["roc_auc"][1], 3),
    Metric("ROC AUC, micro", lambda found: found["roc_auc"][0], 3),
    Metric("average precision, macro", lambda found: found["average_precision"][1], 3),
    Metric("average precision, micro", lambda found: found["average_precision"][0], 3),
)
MACRO = KEYS[0]


def write(result: Result, out: Path) -> Path:
    """Writes representations.html, its figures as .json, and three pictures as .png; returns the page's path."""
    plan, first = result.plan, result.keys[ONE_HOT.name][0]
    pictures = {
        "drawings": _slices(result),
        "atoms": png(_elements(result), 110, transparent=False, facecolor="white", bbox_inches="tight"),
        "noise": png(_noise(result), 110, transparent=False, facecolor="white", bbox_inches="tight"),
    }
    for name, data in pictures.items():
        with atomic_write(out / f"representations-{name}.png") as file:
            file.write(data)
    fields: dict[str, Any] = {
        "title": TITLE,
        "tiles": _tiles(result),
        "slices": image(pictures["drawings"], "A molecule in four representations, before and after the autoencoder"),
        "atoms_table": _table(result.atoms, ATOMS, {}),
        "elements_chart": svg(_elements(result), "F1 of the atoms found, by element and representation"),
        "elements_table": _elements_table(result),
        "atoms_text": " ".join(_said(result.atoms, metric) for metric in (F1, ERROR, WHOLE)),
        "keys_table": _table(result.keys, KEYS, {"without looking": _without(result)}),
        "keys_text": _said(result.keys, MACRO),
        "noise_chart": svg(_noise(result), "Molecules found whole against noise, for each kernel"),
        "noise_table": _noise_table(result),
        "noise_text": _noise_text(result),
        "gains": _gains(result),
        "gate": f"{GATE:g}",
        "cautions": ", ".join(f"{value:g}" for value in CAUTIONS),
        "spread": f"Mean and range of {plan.seeds} seeds" if plan.seeds > 1 else "One seed",
        "learned": f"{result.data['learned']:,}",
        "varying": first["varying"],
        "read": f"{result.data['read']:,}",
        "left": f"{result.data['left']:,}",
        "left_out": ", ".join(f"{count:,} {reason}" for reason, count in result.data["left out"].items()),
        "radius": f"{plan.shape * SPACING / 2 - MARGIN:g}",
        "mean_atoms": f"{result.data['atoms']:.1f}",
        "spacing": f"{SPACING:g}",
        "channels": ", ".join(NAMES),
        "parameters": f"{result.atoms[ONE_HOT.name][0]['parameters']:,}",
        "key_parameters": f"{first['parameters']:,}",
        "steps": f"{plan.steps:,}",
        "key_steps": f"{plan.key_steps:,}",
        "rate": f"{plan.rate:g}",
        "seconds": duration(result.seconds),
        "processor": duration(_processor(result)),
        "reused": result.reused,
        "parts": result.parts,
        "last_seed": plan.seeds - 1,
        "threads": torch.get_num_threads(),
        "machine": html.escape(f"{platform.machine()}, {os.cpu_count()} cores"),
        "versions": html.escape(f"fastnuggets {__version__}, torch {torch.__version__}"),
    }
    return write_page(out, "representations", PAGE, fields, plan, _figures(result))


def _figures(result: Result) -> dict[str, Any]:
    """All numbers of the page, without the pictures."""
    dropped = ("pictures", "losses", "settings")

    def kept(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        return {
            name: [{key: value for key, value in one.items() if key not in dropped} for one in seeds]
            for name, seeds in found.items()
        }

    return {
        "versions": {"fastnuggets": __version__, "torch": str(torch.__version__)},
        "plan": result.plan._asdict(),
        "data": result.data,
        "scores are": [*Score._fields],
        "channels": [*NAMES, "all"],
        "atoms": kept(result.atoms),
        "keys": kept(result.keys),
        "noise is": ["whole", "precision", "recall", "rmse"],
        "noise": {name: found["noise"] for name, found in result.noise.items()},
        "seconds": result.seconds,
        "processor seconds": _processor(result),
    }


def _processor(result: Result) -> float:
    learned = [one for found in (result.atoms, result.keys) for seeds in found.values() for one in seeds]
    return float(sum(part["processor"] for part in [*learned, *result.noise.values()]))


# Numbers in words


def _values(found: dict[str, list[dict[str, Any]]], one: Representation, metric: Metric) -> np.ndarray:
    return np.array([metric.value(seed) for seed in found[one.name]])


def _spread(values: np.ndarray, digits: int) -> str:
    """The mean, and with several seeds their range; a dash where nothing was found."""
    if np.isnan(values).any():
        return "–"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def _said(found: dict[str, list[dict[str, Any]]], metric: Metric) -> str:
    """How each wave does against each of the others, seed by seed."""
    return " ".join(f"{metric.name}: {wave.name}, is {_against(found, wave, metric)}." for wave in WAVES)


def _against(found: dict[str, list[dict[str, Any]]], wave: Representation, metric: Metric) -> str:
    parts = []
    for one in (other for other in LEARNED if other not in WAVES):
        gain = metric.sign * (_values(found, wave, metric) - _values(found, one, metric))
        if np.isnan(gain).any():
            verdict = "not to be compared with"
        elif (gain > 0).all():
            verdict = "ahead of"
        elif (gain < 0).all():
            verdict = "behind"
        else:
            verdict = "ahead with some seeds and behind with others of"
        parts.append(f"{verdict} {one.name} ({metric.sign * gain.mean():+.{metric.digits}f})")
    return ", ".join(parts)


def _gains(result: Result) -> str:
    parts = []
    for one in LEARNED:
        gains = [gain for seed in result.atoms[one.name] for gain in seed["gain"]]
        parts.append(f"{one.name} {min(gains):.2f} to {max(gains):.2f}")
    return "; ".join(parts)


def _tiles(result: Result) -> str:
    whole, error, auc = (
        " · ".join(f"{_values(found, one, metric).mean():.{digits}f}" for one in LEARNED)
        for found, metric, digits in ((result.atoms, WHOLE, 0), (result.atoms, ERROR, 2), (result.keys, MACRO, 2))
    )
    twenty = " · ".join(f"{100 * result.noise[one.name]['noise']['0.2'][0]:.0f}" for one in LEARNED)
    order = "one-hot · Gaussian narrow · wide · wave narrow · wide"
    tiles = (
        (whole, f"% of the test molecules come back whole from the autoencoder: {order}"),
        (error, f"Å, the position error of the atoms that come back: {order}"),
        (auc, f"macro ROC AUC of the MACCS keys: {order}"),
        (twenty, f"% of the molecules are found whole in grids with 20 % noise: {order}"),
    )
    return tiled(tiles)


def _noise_text(result: Result) -> str:
    best = {level: max(one["noise"][level][0] for one in result.noise.values()) for level in _levels()}
    parts = []
    for level, share in best.items():
        names = [name for name, one in result.noise.items() if one["noise"][level][0] == share]
        parts.append(
            f"At {100 * float(level):.0f} % noise the best find {100 * share:.0f} % whole: {'; '.join(names)}."
        )
    return " ".join(parts)


def _levels() -> list[str]:
    return [f"{level:g}" for level in LEVELS]


# Tables


def _table(found: dict[str, list[dict[str, Any]]], metrics: tuple[Metric, ...], more: dict[str, list[str]]) -> str:
    rows = [[one.name, *(_spread(_values(found, one, m), m.digits) for m in metrics)] for one in LEARNED]
    return table(["", *(metric.name for metric in metrics)], rows + [[name, *cells] for name, cells in more.items()])


def _without(result: Result) -> list[str]:
    """Of ranking by how common each key is in the training set, the same for all molecules."""
    seeds = np.array([one["without looking"] for one in result.keys[ONE_HOT.name]])
    return [_spread(seeds[:, place], 3) for place in (1, 0, 3, 2)]


def _elements_table(result: Result) -> str:
    rows = []
    for one in LEARNED:
        cells = []
        for channel in range(len(NAMES)):
            scores = [_score(seed, channel) for seed in result.atoms[one.name]]
            total = Score(*(sum(values) for values in zip(*scores, strict=True)))
            text = f"{100 * total.precision:.0f} / {100 * total.recall:.0f} / {total.rmse:.2f}".replace("nan", "–")
            cells.append(text)
        rows.append([one.name, *cells])
    first = [sum(_score(seed, channel).true for seed in result.atoms[ONE_HOT.name]) for channel in range(len(NAMES))]
    heads = [f"{name} ({count:,})" for name, count in zip(NAMES, first, strict=True)]
    return table(["precision / recall / error", *heads], rows)


def _noise_table(result: Result) -> str:
    rows = [[one.name, *(_noise_cell(result.noise[one.name]["noise"][level]) for level in _levels())] for one in NOISY]
    return table(["", *(f"{100 * level:.0f} %" for level in LEVELS)], rows)


def _noise_cell(figures: list[float]) -> str:
    whole, _, _, rmse = figures
    return f"{100 * whole:.0f} / {rmse:.3f}".replace("nan", "–")


# Pictures


def _slices(result: Result) -> bytes:
    figure, axes = pyplot().subplots(2, len(LEARNED), figsize=(2.5 * len(LEARNED), 5.3))
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.94, 0.03, 0.03)
    for column, one in zip(axes.T, LEARNED, strict=True):
        # Of the molecules kept, the one with the most in its middle plane.
        before, after = max(result.atoms[one.name][0]["pictures"], key=lambda planes: planes[0].abs().sum()).numpy()
        top = np.abs(before).max()
        for axis, plane in zip(column, (before, after), strict=True):
            axis.imshow(plane, cmap="PuOr_r", vmin=-top, vmax=top, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="#8888", linewidth=0.6)
        column[0].set_title(one.name, fontsize=12, color="#333")
    return png(figure, 90, transparent=False, facecolor="white")


def _elements(result: Result) -> Any:
    figure, axis = chart(8.5, 3.0)
    places = np.arange(len(NAMES) + 1)
    for k, one in enumerate(LEARNED):
        each = np.array(
            [[100 * _score(seed, c).f1 for c in [*range(len(NAMES)), -1]] for seed in result.atoms[one.name]]
        )
        x = places + 0.16 * (k - (len(LEARNED) - 1) / 2)
        axis.bar(x, each.mean(0), 0.15, color=COLORS[one.name], label=one.name)
        if len(each) > 1:
            axis.plot(np.repeat(x[None], len(each), 0), each, ".", color=INK, ms=3)
    axis.set_xticks(places, [*NAMES, "all"])
    axis.set_ylabel("F1 of the atoms found, %", color=INK)
    axis.legend(frameon=False, labelcolor=INK, ncols=5, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return figure


def _noise(result: Result) -> Any:
    plots = pyplot()
    figure, axis = plots.subplots(figsize=(6.0, 3.6))
    bare(axis)
    for k, one in enumerate(NOISY):
        values = [100 * result.noise[one.name]["noise"][level][0] for level in _levels()]
        places = np.arange(len(LEVELS)) + 0.09 * (k - (len(NOISY) - 1) / 2)
        axis.bar(places, values, 0.08, color=COLORS[one.name], label=one.name)
    axis.set_xticks(range(len(LEVELS)), [f"{100 * level:.0f} % noise" for level in LEVELS])
    axis.set_ylabel("molecules found whole, %", color=INK)
    axis.legend(frameon=False, labelcolor=INK, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.3))
    return figure
