"""The page of the demo of blending: one HTML file with its pictures inside. Every measured number in it is computed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastnuggets import __version__
from fastnuggets.demo_blend import (
    BACKGROUND,
    CALLS,
    EVERY,
    GALLERY,
    KINDS,
    LEVELS,
    OBJECT,
    PLAIN,
    POISSON,
    RENDERED,
    SIDE,
    SOURCES,
    SURE,
    THRESHOLD,
    WHOLE_BOX,
    Plan,
    Result,
)
from fastnuggets.figures import INK, chart, image, pyplot, svg, table, tiled
from fastnuggets.molecules.files import need
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import Paired, common_fields, difference, paired, spread

TITLE = "Cut, paste, blend: exact to a quarter of a grey level, and what a detector makes of it"
BASE = "none"
COMPOSED = SOURCES[:-1]
COLORS = {
    WHOLE_BOX: "#8b8d98",
    "none": "#d6336c",
    "gaussian": "#e07a3f",
    "box": "#b58a2b",
    "motion": "#8a5cd6",
    "poisson": "#2f6fed",
    EVERY: "#1d7f8c",
    RENDERED: "#2ba35a",
}
NAMES = {
    WHOLE_BOX: "whole boxes",
    "none": "hard paste",
    "gaussian": "Gaussian feather",
    "box": "box feather",
    "motion": "motion blur",
    "poisson": "Poisson",
    EVERY: "all five",
    RENDERED: "rendered scenes",
}
MODES = {
    "none": "hard paste",
    "gaussian": "Gaussian feather",
    "box": "box feather",
    "motion": "motion blur",
    "difference": "difference",
    "multiband": "five bands",
    "import": "Poisson, import",
    "mixed": "Poisson, mixed",
    "average": "Poisson, average",
    "rectangle": "Poisson on the rectangle",
}
DARKEST, BRIGHTEST = 0.1, 100.0  # grey levels of the error maps' colours

PAGE = (
    HEAD
    + """\
<style>
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; }
.grid figure { margin: 0; } .grid img { border-radius: 8px; image-rendering: auto; }
.grid figcaption { font-size: 14px; color: var(--soft); line-height: 1.35; margin-top: 4px; }
.strip { display: grid; grid-template-columns: 130px 1fr; gap: 6px 14px; align-items: center; font-size: 14px; }
.strip span { color: var(--soft); }
</style>
<p class="lead">An object cut out of one photograph is put onto another. Below, one object under every blend; how far
the blends that solve an equation are from its exact solution; and what small detectors learn from scenes that were
composed so, tested on scenes that were not.</p>

<div class="tiles">$tiles</div>

<section>
<h2>One object under every blend</h2>
<p>The object is cut out of "$object" with a mask drawn by hand, the background is "$background", both $gallery ×
$gallery pixels.</p>
<div class="grid">$gallery_given</div>
<div class="grid" style="margin-top:14px">$gallery_pictures</div>
<p class="note">Difference: the distance of the two colours. Motion blur goes over the whole image, as in published
scene generators. Poisson: the object's gradients (import), the stronger of both (mixed) or their mean, with the
background's colours around the mask.</p>
</section>

<section>
<h2>Exact, or not</h2>
<p>A Poisson blend is the solution of a linear equation, so there is a right answer: solved here in float64 by the
plain definition, with the background's values on the border of the true mask (Pérez, Gangnet and Blake 2003).
Colours: the distance to it in grey levels of 255, in the worst of the three channels; white is 0, the scale is
logarithmic.</p>
<div class="grid">$error_maps</div>
$scale
$error_table
<p>$error_text</p>
<p class="note">Errors are those of pixels inside the mask, of results rounded to 8 bits: rounding alone costs up to
0.5. Changed outside: pixels outside the mask that are not the background's any more, so that a label made from the
mask is wrong there. Times: the shortest of up to $calls calls on one thread, $machine, in this run; what else the
machine did then is in them.$missing_peers</p>
</section>

<section>
<h2>Detectors that learn from composed scenes</h2>
<p>$kinds_count things stand in rendered rooms. $cutouts views of each are cut out by exact masks, and pasted onto
$backgrounds empty rooms: $scenes scenes of $side × $side pixels, the same places under every blend. A small detector
($parameters weights) learns from them in $steps steps and is tested on $tested rooms that were rendered as a whole,
with shadows, light and perspective that no paste has.</p>
<div class="strip">$strips</div>
$detector_chart
$detector_table
<p>$detector_text</p>
<p class="note">Average precision at an overlap of $threshold, as COCO counts it, in %, mean ± standard deviation over
$seeds seeds. A seed decides the views, the empty rooms, the scenes, the first weights and the batches; the tests are
the same for all. "Against hard paste": the difference to the detector of the same seed; mean, and the lowest and
highest.</p>
<p style="margin-top:18px">What the first seed's detector of all five blends finds in the first test rooms, none of
them chosen:</p>
<div class="grid">$found</div>
<p class="note">Boxes with a score above $sure.</p>
</section>

<section>
<h2>The ideas, and what was measured here</h2>
$claims
<p>$limits</p>
</section>

<section>
<h2>What was used</h2>
<p>Photographs: those inside scikit-image and scikit-learn. Rooms: a floor and a wall with colours, checkers or those
photographs on them, one light, ray-cast; things: $kinds. Composed scenes hold 1 to 4 things at a random place, 0.3 to
0.65 of the cut-out's size, turned by up to 15 degrees, half of them mirrored, brightness changed by up to 20 %, with
at most half of two boxes shared and at least 30 % of each visible. Detector: centres and box sizes from a heat map
(Zhou et al. 2019), $width features, AdamW, a rate falling from $rate, batches of $batch.</p>
<p>The settings were chosen on other seeds. "Better" and "worse" $verdicts$few_seeds</p>
<p>$took. Every figure is in blend.json,
beside this page.</p>
<p class="note">Seeds 0 to $last_seed · $versions</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """Writes blend.html and blend.json to the folder `out`; returns the page's path."""
    fields: dict[str, Any] = {
        "title": TITLE,
        "tiles": _tiles(result),
        "object": OBJECT,
        "background": BACKGROUND,
        "gallery": GALLERY,
        "gallery_given": _given(result),
        "gallery_pictures": _pictures(result),
        "error_maps": _error_maps(result),
        "scale": _scale(),
        "error_table": _error_table(result),
        "error_text": _error_text(result),
        "missing_peers": _missing(result),
        "calls": CALLS,
        "kinds_count": len(KINDS),
        "kinds": ", ".join(KINDS),
        "side": SIDE,
        "parameters": f"{result.parameters:,}",
        "strips": _strips(result),
        "detector_chart": _detector_chart(result),
        "detector_table": _detector_table(result),
        "detector_text": _detector_text(result),
        "found": _found(result),
        "sure": SURE,
        "threshold": THRESHOLD,
        "claims": _claims(result),
        "limits": _limits(result.plan),
        **common_fields(result),
    }
    return write_page(out, "blend", PAGE, fields, result.plan, _figures(result))


def _figures(result: Result) -> dict[str, Any]:
    """All numbers of the page, without the pictures."""
    kept = ("guidance", "largest", "mean", "outside", "ms")
    return {
        "versions": {"fastnuggets": __version__, "torch": str(torch.__version__)},
        "plan": result.plan._asdict(),
        "blends": {name: {key: row[key] for key in kept if key in row} for name, row in result.gallery["rows"].items()},
        "average precision": result.scores,
        "seconds of all": result.seconds,
    }


# Numbers


def _solvers(result: Result) -> dict[str, dict[str, Any]]:
    """Rows that have an exact answer."""
    return {name: row for name, row in result.gallery["rows"].items() if "guidance" in row}


def _precision(result: Result, source: str, kind: str = "mean") -> np.ndarray:
    """[seeds] in %."""
    return np.array([100 * score[kind] for score in result.scores[source]])


def compare(result: Result, source: str, base: str = BASE) -> Paired:
    """A source against another, seed by seed."""
    return paired(_precision(result, source) - _precision(result, base), 1)


def _name(row: str) -> str:
    return f"ours, {MODES[row].removeprefix('Poisson, ')}" if row in MODES else row


# Text


def _tiles(result: Result) -> str:
    rows = _solvers(result)
    ours = rows["import"]
    tiles = [
        (
            f"{ours['largest']:.2f}",
            "grey levels at most from the exact Poisson blend, 0.5 of them by rounding to 8 bits",
        ),
        (f"{ours['ms']:.2f} ms", f"for it: {GALLERY} × {GALLERY} RGB, one thread, nothing outside the mask changed"),
    ]
    theirs = rows.get("OpenCV seamlessClone, import")
    if theirs:
        text = f"grey levels at most from it: OpenCV's seamlessClone, in {theirs['ms']:.0f} ms; "
        tiles.append(
            (f"{theirs['largest']:.0f}", text + f"{100 * theirs['outside']:.0f} % of the pixels outside changed")
        )
    best = max(COMPOSED, key=lambda source: _precision(result, source).mean())
    gain = _precision(result, WHOLE_BOX).mean(), _precision(result, best).mean()
    tiles.append(
        (
            f"{gain[0]:.0f} → {gain[1]:.0f} %",
            f"average precision of a small detector: whole boxes pasted, then {NAMES[best]}",
        )
    )
    return tiled(tiles)


def _error_text(result: Result) -> str:
    rows = _solvers(result)
    ours = [rows[guidance] for guidance in POISSON]
    text = (
        f"Ours: {max(row['largest'] for row in ours):.2f} grey levels at most over the three guidances, "
        f"{max(row['outside'] for row in ours):.0%} of the pixels outside changed. "
    )
    others = {name: row for name, row in rows.items() if name not in MODES}
    for name, row in others.items():
        text += f"{name}: {row['largest']:.0f} at most, {row['mean']:.1f} on average. "
    solve_other = [name for name in ("OpenCV seamlessClone", "pietorch") if any(o.startswith(name) for o in others)]
    if solve_other:
        text += (
            f"{' and '.join(solve_other)} do not fail at this equation: they solve another one, on the whole rectangle "
            'around the object. <code>domain="rectangle"</code> gives OpenCV\'s pictures: it is in the table, against '
            "the same exact answer. "
        )
    if any(name.startswith("fpie") for name in others):
        text += "fpie solves the same equation and stops early."
    return text


def _missing(result: Result) -> str:
    names = {"OpenCV seamlessClone": "opencv-python-headless", "pietorch": "pie-torch", "fpie": "fpie"}
    absent = [package for name, package in names.items() if not any(r.startswith(name) for r in _solvers(result))]
    return f" Not installed, so not compared: {', '.join(absent)}." if absent else ""


def _detector_text(result: Result) -> str:
    words = {1: "better than", -1: "worse than", 0: "not told apart from"}
    parts = []
    for source, base in ((WHOLE_BOX, BASE), ("gaussian", BASE), ("poisson", BASE), (EVERY, BASE)):
        found = compare(result, source, base)
        parts.append(f"{NAMES[source]} {words[found.verdict]} {NAMES[base]} ({difference(found, 1)})")
    best = max(COMPOSED[1:-1], key=lambda source: _precision(result, source).mean())
    found = compare(result, EVERY, best)
    return (
        f"{'; '.join(parts).capitalize()}. The best single blend here is {NAMES[best]}; all five are "
        f"{words[found.verdict]} it ({difference(found, 1)}). Rendered scenes, which are of the tests' own kind, are "
        f"the ceiling: {_precision(result, RENDERED).mean():.1f} %."
    )


def _claims(result: Result) -> str:
    words = {1: "so here", -1: "the opposite here", 0: "not told apart here"}
    every, whole = compare(result, EVERY), compare(result, BASE, WHOLE_BOX)
    soft = compare(result, "gaussian")
    rows = [
        (
            "Cut objects out by their masks, rather than paste whole boxes",
            f"{words[whole.verdict]}: hard paste against whole boxes {difference(whole, 1)} points",
        ),
        (
            "Soften the edge, so that a detector does not learn it instead of the object",
            f"{words[soft.verdict]}: Gaussian feather against hard paste {difference(soft, 1)} points",
        ),
        (
            "Show scenes under all five blends, so that no kind of edge tells: the best setting of Dwibedi et al. 2017",
            f"{words[every.verdict]}: all five against hard paste {difference(every, 1)} points",
        ),
    ]
    return '<div class="text">' + table(("idea", "here"), rows) + "</div>"


def _limits(plan: Plan) -> str:
    return (
        f"This is a comparison in miniature: {SIDE} × {SIDE} pixels, {len(KINDS)} things of simple shape, rooms that "
        f"were rendered, {plan.seeds} seeds. Its cut-outs have exact masks, its tests have no camera noise, and all "
        "come from one renderer: the gap between composed and real photographs that the papers are about is smaller "
        "here than theirs. The order of the blends may be another one on photographs; the page shows how to find out, "
        "not what will come of it."
    )


# Pictures and tables


def _png(picture: Tensor | np.ndarray, scale: int = 1) -> bytes:
    """[H, W, 3] uint8."""
    made = need("PIL.Image").fromarray(np.asarray(picture))
    if scale > 1:
        made = made.resize((made.width * scale, made.height * scale), 0)
    file = io.BytesIO()
    made.save(file, "PNG", optimize=True)
    return file.getvalue()


def _figure(picture: Tensor | np.ndarray, caption: str, scale: int = 1) -> str:
    return f"<figure>{image(_png(picture, scale), caption)}<figcaption>{caption}</figcaption></figure>"


def _given(result: Result) -> str:
    given = result.gallery["given"]
    inside = given["mask"].byte()[..., None].expand(-1, -1, 3) * LEVELS
    parts = (given["object"], "the object's photograph"), (inside, "its mask"), (given["background"], "the background")
    return "".join(_figure(picture, caption) for picture, caption in parts)


def _pictures(result: Result) -> str:
    rows = result.gallery["rows"]
    return "".join(_figure(rows[name]["picture"], MODES[name]) for name in (*PLAIN, *POISSON, "rectangle"))


def _colors(error: Tensor) -> np.ndarray:
    """[H, W] grey levels as [H, W, 3] uint8."""
    log = np.log(np.maximum(error.numpy(), DARKEST) / DARKEST) / np.log(BRIGHTEST / DARKEST)
    colors = pyplot().get_cmap("magma_r")(np.clip(log, 0, 1))[..., :3]
    return np.asarray((colors * LEVELS).round().astype(np.uint8))


def _error_maps(result: Result) -> str:
    return "".join(
        _figure(_colors(row["error"]), f"{_name(name)}<br>at most {row['largest']:.3g}, mean {row['mean']:.2g}")
        for name, row in _solvers(result).items()
    ).replace('alt="', 'title="distance to the exact answer" alt="')


def _scale() -> str:
    figure, axis = chart(6.2, 0.7)
    ramp = np.geomspace(DARKEST, BRIGHTEST, 256)[None]
    axis.imshow(_colors(torch.tensor(ramp)), aspect="auto", extent=(-1, 2, 0, 1))
    axis.set_xticks([-1, 0, 1, 2], ["0.1 or less", "1", "10", "100 or more"])
    axis.set_yticks([])
    axis.grid(False)
    axis.set_xlabel("grey levels from the exact answer", color=INK)
    return svg(figure, "Colours of the error maps, from 0.1 to 100 grey levels")


def _error_table(result: Result) -> str:
    head = ("", "guidance", "largest error", "mean error", "changed outside", "ms")
    return table(
        head,
        [
            (
                _name(name).split(", import")[0].split(", mixed")[0] if name not in MODES else _name(name),
                row["guidance"],
                f"{row['largest']:.3g}",
                f"{row['mean']:.2g}",
                f"{row['outside']:.0%}",
                f"{row['ms']:.3g}",
            )
            for name, row in _solvers(result).items()
        ],
    )


def _strips(result: Result) -> str:
    lines = []
    for source in SOURCES:
        if source in result.examples:
            scenes = result.examples[source].permute(0, 2, 3, 1)
            row = torch.cat([torch.nn.functional.pad(scene, (0, 0, 0, 2), value=LEVELS) for scene in scenes], 1)
            lines.append(f"<span>{NAMES[source]}</span>{image(_png(row, 2), f'scenes: {NAMES[source]}')}")
    return "".join(lines)


def _detector_chart(result: Result) -> str:
    figure, axis = chart(8.4, 0.9 + 0.34 * len(SOURCES))
    for row, source in enumerate(SOURCES):
        each = _precision(result, source)
        axis.plot(each, np.full(len(each), row), "o", color=COLORS[source], alpha=0.5, ms=6, mew=0)
        axis.plot([each.mean()] * 2, [row - 0.32, row + 0.32], color=COLORS[source], lw=2.6)
    axis.set_yticks(range(len(SOURCES)), [NAMES[source] for source in SOURCES])
    axis.invert_yaxis()
    axis.set_xlabel("average precision, %", color=INK)
    return svg(figure, "Average precision of the detectors by what they learned from, one dot a seed")


def _detector_table(result: Result) -> str:
    head = ("learned from", "average precision", "against hard paste", *KINDS)
    rows = []
    for source in SOURCES:
        against = "" if source == BASE else difference(compare(result, source), 1)
        by_kind = [f"{_precision(result, source, kind).mean():.0f}" for kind in KINDS]
        rows.append((NAMES[source], spread(_precision(result, source), 1), against, *by_kind))
    return table(head, rows)


def _found(result: Result) -> str:
    return "".join(
        _boxes(picture, found["boxes"], [KINDS[label] for label in found["labels"].tolist()])
        for picture, found in zip(result.examples["tests"], result.examples["found"], strict=True)
    )


def _boxes(picture: Tensor, boxes: Tensor, names: Sequence[str]) -> str:
    scale = 4
    made = need("PIL.Image").fromarray(picture.permute(1, 2, 0).numpy()).resize((SIDE * scale,) * 2, 0)
    draw = need("PIL.ImageDraw").Draw(made)
    for (x0, y0, x1, y1), name in zip((boxes * scale).tolist(), names, strict=True):
        draw.rectangle((x0, y0, x1, y1), outline="white", width=2)
        draw.text((x0 + 4, y0 + 2), name, fill="white", stroke_width=1, stroke_fill="black")
    return _figure(np.asarray(made), ", ".join(names) or "nothing")
