"""The page of the demo of inpainting: one HTML file with its pictures inside. Every number is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastnuggets.demo_inpaint import (
    AVERAGED,
    BOUND,
    METHODS,
    OURS,
    PHOTOGRAPHS,
    SAMPLED,
    SETS,
    SHOWN,
    SHRUNK,
    SIDE,
    Result,
)
from fastnuggets.figures import INK, chart, duration, svg, table, tiled
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import common_fields, paired, spread
from fastnuggets.systems.vaeac import DRAWN

TITLE = "What may have been there"
COLORS = {
    "mean": "#b9bec8",
    "nearest": "#8b8d98",
    "normal": "#3aa17e",
    "biharmonic": "#e07a3f",
    "Telea": "#d6336c",
    OURS: "#2f6fed",
}
DESCRIBED = {
    "half": "a half",
    "rectangle": "a rectangle of 30 to 70 % of the area",
    "small hole": "a small hole, a rectangle of 3 to 10 %",
    "50 % of pixels": "half of the pixels, at random",
    "95 % of pixels": "95 % of the pixels, at random",
}
DENSE = ("normal", OURS)  # those with a density
HIDDEN = np.array([0.36, 0.55, 0.93])  # the colour of what is hidden

PAGE = (
    HEAD
    + """\
<p class="lead">A part of an image is hidden and filled again. VAEAC (Ivanov, Figurnov and Vetrov, ICLR 2019) is one
network for any part: it draws what may have been there given the rest, each time something else. Here its
convolutional form, on handwritten digits and on patches of photographs that it has never seen, beside what one would
run otherwise.</p>

<div class="tiles">$tiles</div>

<section>
<h2>Digits</h2>
$digits_pictures
</section>

<section>
<h2>Patches of photographs</h2>
$photographs_pictures
<p class="note">Both pictures: the first seed, two test images for each kind of mask, not chosen; blue is hidden. The
five fillings are the means given five codes; beside them the first again with the noise of each pixel, which makes it
a draw; then the mean of $averaged codes, and the others' best guesses. Nearest: the mean of the $averaged most similar
training images.</p>
</section>

<section>
<h2>The best guess</h2>
<div class="two">$error_charts</div>
$error_table
<p class="note">Root mean squared error of all hidden pixels together, in % of the range from black to white (10 % is a
PSNR of 20 dB, 5 % of 26 dB); mean ± standard deviation over $seeds seeds. Bold: the least mean.</p>
<p>$error_text</p>
<p>$peers_text</p>
</section>

<section>
<h2>One draw</h2>
$draw_table
<p class="note">The same error of a single draw. It must be larger than that of a best guess: that of a perfect
draw is √2 times that of the exact mean. Nearest: the most similar image. Given one code: VAEACConv without the noise
of each pixel.</p>
<p>$draw_text</p>
</section>

<section>
<h2>How likely the truth was</h2>
$nats_table
<p class="note">ln of the density of what was hidden, nats a pixel, more is better; of VAEACConv a bound from below,
from $bound codes. Digits' 17 levels are spread evenly over their steps, so that they have a density. The others have
none.</p>
<p>$nats_text</p>
</section>

<section>
<h2>As uncertain as it says?</h2>
$coverage_table
<p class="note">Share of hidden pixels, %, inside an interval that should hold 90 % of them, and its mean width in % of
the range: between the second least and the second largest of $drawn draws; of nearest, of the $drawn most similar
images.</p>
<p>$coverage_text</p>
</section>

<section>
<h2>What the paper claims, and what was measured here</h2>
<p>The paper inpaints faces of 128 × 128 pixels with eight scales of 8 to 512 features and four blocks at each, learned
for 40 epochs of CelebA; it claims good and diverse fillings by one network for any mask. This network has $scales
scales of $widths features and $blocks block at each ($weights weights), learned in $steps steps of $batch images of
either set. Measured is what the tables say; whether a filling looks right to a human was not.</p>
<p>$limits</p>
</section>

<section>
<h2>What was done</h2>
$size_table
<p>Digits: scikit-learn's, 8 × 8 pixels, split at random. Photographs: $photographs pictures that ship with
scikit-image and scikit-learn, grey, $shrunk × $shrunk pixels made one, in patches of 16 × 16; each seed holds out three
others whole: $held_out. Masks: $masks. VAEACConv learns with these in equal parts, and as often with the published
mixture (rectangles of 30 to 100 %, the centre, spots, 95 % of the pixels, halves; but for six rectangles about parts
of a face), and with photographs mirrored, on their side, and of other contrast and brightness, which the peers do not
see. Adam, a rate from $rate linearly to 0, gradients clipped at a norm of 1, the weights it ends with;
in the first $warmed % of the steps the weight of the divergence grows from 0 to 1 (Bowman and others, 2016), without
which the code says little. Its settings were looked at on these images: a demonstration, no benchmark.</p>
<p>Peers: the mean image; the most similar training images by what is seen; a normal distribution with the covariance
of the training images, shrunk after Ledoit and Wolf (2004), whose conditional mean is the linear regression of each
hidden pixel on all seen ones; scikit-image's biharmonic inpainting; OpenCV's inpainting after Telea (2004), with a
radius of 3. The last two look at the one image alone and learn nothing.</p>
$time_table
<p class="note">Processor milliseconds an image, on one thread, mean over kinds of masks: of VAEACConv for $drawn draws,
$averaged guesses and its bound. Its training took $trained of processor time for a set and seed. The whole run took
$seconds ($reused of $parts parts were there already), on $machine. "Better" and "worse" stand where the $confidence %
interval of the mean difference over the seeds (Student's t) leaves out zero, with no correction for the number of
comparisons. $versions.$few_seeds</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """inpaint.html and inpaint.json."""
    plan, rows = result.plan, _rows(result)
    facts = [fact for name in SETS for fact in result.facts[name]]
    ahead = [_best(result, *row) for row in rows].count(OURS)
    covered = np.mean([_values(result, *row, OURS, "coverage").mean() for row in rows])
    gained = [(_values(result, *row, OURS, "nats") - _values(result, *row, "normal", "nats")).mean() for row in rows]
    tiles = (
        (f"{ahead} of {len(rows)}", "sets and kinds of masks where VAEACConv's best guess has the least mean error"),
        (
            f"{sum(gain > 0 for gain in gained)} of {len(rows)}",
            "where it finds the truth likelier than a normal distribution does",
        ),
        (f"{100 * covered:.0f} %", "of hidden pixels lie where VAEACConv says that 90 % do"),
    )
    fields = common_fields(result) | {
        "title": TITLE,
        "tiles": tiled(tiles),
        "digits_pictures": _pictures(result, "digits"),
        "photographs_pictures": _pictures(result, "photographs"),
        "averaged": AVERAGED,
        "drawn": DRAWN,
        "error_charts": "".join(f"<div>{_chart(result, name)}</div>" for name in SETS),
        "error_table": _table(result, METHODS, "rmse", 100, 1, sign=-1),
        "error_text": _told(result),
        "peers_text": _peers_ahead(result),
        "draw_table": _draw_table(result),
        "draw_text": _draw_text(result),
        "nats_table": _table(result, DENSE, "nats", 1, 2, sign=1),
        "nats_text": _nats_text(result),
        "coverage_table": _coverage_table(result),
        "coverage_text": _coverage_text(result),
        "scales": f"{len(plan.widths)} or {len(plan.widths) + 1}",
        "widths": f"{min(plan.widths)} to {max(plan.widths)}",
        "warmed": f"{100 * plan.warmed:.0f}",
        "weights": " and ".join(f"{result.facts[name][0]['parameters']:,}" for name in SETS),
        "limits": _limits(result),
        "size_table": table(
            ["set", "pixels", "learned from", "tested on"],
            [
                (name, f"{SIDE[name]} × {SIDE[name]}", _range(result, name, "learned"), _range(result, name, "tested"))
                for name in SETS
            ],
        ),
        "photographs": len(PHOTOGRAPHS),
        "masks": "; ".join(DESCRIBED[kind] for kind in plan.kinds),
        "bound": BOUND,
        "shrunk": SHRUNK,
        "held_out": "; ".join(", ".join(map(_plain, fact["held out"])) for fact in result.facts["photographs"]),
        "time_table": table(
            ["set", *METHODS],
            [(name, *(f"{_milliseconds(result, name, method):.2g}" for method in METHODS)) for name in SETS],
        ),
        "trained": duration(float(np.mean([fact["seconds"][OURS] for fact in facts]))),
    }
    figures = {"plan": plan._asdict(), "scores": result.scores, "facts": result.facts, "seconds": result.seconds}
    return write_page(out, "inpaint", PAGE, fields, plan, figures)


# Numbers


def _plain(name: str) -> str:
    return name.removeprefix("stereo_")


def _range(result: Result, name: str, fact: str) -> str:
    counts = [found[fact] for found in result.facts[name]]
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _rows(result: Result) -> list[tuple[str, str]]:
    return [(name, kind) for name in SETS for kind in result.plan.kinds]


def _values(result: Result, name: str, kind: str, method: str, figure: str) -> np.ndarray:
    """[seeds]"""
    return np.array([score[method][figure] for score in result.scores[name][kind]])


def _milliseconds(result: Result, name: str, method: str) -> float:
    return float(np.mean([_values(result, name, kind, method, "milliseconds") for kind in result.plan.kinds]))


def _best(
    result: Result, name: str, kind: str, methods: tuple[str, ...] = METHODS, figure: str = "rmse", sign: int = -1
) -> str:
    return max(methods, key=lambda method: sign * _values(result, name, kind, method, figure).mean())


def _verdict(result: Result, name: str, kind: str, peer: str, figure: str = "rmse", sign: int = -1) -> int:
    """1 if ours is better than the peer, -1 if worse, 0 if these seeds do not tell."""
    each = _values(result, name, kind, OURS, figure) - _values(result, name, kind, peer, figure)
    return paired(each, sign).verdict


# Text


def _told(result: Result) -> str:
    """How VAEACConv does against each of the others, seed by seed."""
    parts = []
    for peer in METHODS[:-1]:
        found = [_verdict(result, *row, peer) for row in _rows(result)]
        parts.append(f"{peer}: better {found.count(1)}, worse {found.count(-1)}, not told apart {found.count(0)}")
    return "VAEACConv against each, seed by seed, in how many of the rows above. " + "; ".join(parts) + "."


def _peers_ahead(result: Result) -> str:
    """Where a peer's best guess is better."""
    parts = []
    for name, kind in _rows(result):
        peers = [peer for peer in METHODS[:-1] if _verdict(result, name, kind, peer) < 0]
        if peers:
            least = _best(result, name, kind, tuple(peers))
            ratio = (_values(result, name, kind, OURS, "rmse") / _values(result, name, kind, least, "rmse")).mean()
            parts.append(f"{name}, {kind}: {', '.join(peers)} (VAEACConv has {ratio:.2f} times the error of {least})")
    if not parts:
        return "No peer's best guess is better than VAEACConv's in any row, as far as these seeds tell."
    return "<b>Where a peer's best guess is better.</b> " + "; ".join(parts) + "."


def _draw_text(result: Result) -> str:
    """How a draw's error compares with that of the mean of draws."""
    ratios = []
    for name in SETS:
        found = [
            _values(result, name, kind, OURS, "draw") / _values(result, name, kind, OURS, "rmse")
            for kind in result.plan.kinds
        ]
        ratios.append(f"{name} {np.mean(found):.2f}")
    verdicts = [_verdict(result, *row, "normal", "draw") for row in _rows(result)]
    shares = _shares(result)
    said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    return (
        f"A draw of VAEACConv has so many times the error of its mean, over all kinds: {', '.join(ratios)}. Against a "
        f"draw of the normal distribution it is better in {verdicts.count(1)} rows, worse in {verdicts.count(-1)}, not "
        f"told apart in {verdicts.count(0)}. Of the variance of its draws so much comes from the code, the rest from "
        f"the noise of single pixels: {said}. "
        + " ".join(
            f"On {name} most of what differs is shape."
            if share > 0.5
            else f"<b>On {name} its draws differ in grain more than in shape.</b>"
            for name, share in shares.items()
        )
    )


def _shares(result: Result) -> dict[str, float]:
    """Of each set, the code's share of a draw's variance, mean over the kinds of masks."""
    return {name: float(np.mean([_of_code(result, name, kind) for kind in result.plan.kinds])) for name in SETS}


def _of_code(result: Result, name: str, kind: str) -> float:
    """The code's share of a draw's variance: from the squared errors of the mean of several guesses, which has a part
    of it, of one guess, which has all, and of a draw, which has that of pixels too."""
    mean, guess, draw = (
        (_values(result, name, kind, OURS, figure) ** 2).mean() for figure in ("rmse", "guess", "draw")
    )
    code = max(0.0, guess - mean) / (1 - 1 / AVERAGED)
    return float(code / (code + max(draw - guess, 1e-12)))


def _nats_text(result: Result) -> str:
    parts = []
    for name in SETS:
        gains = [
            (_values(result, name, kind, OURS, "nats") - _values(result, name, kind, "normal", "nats")).mean()
            for kind in result.plan.kinds
        ]
        parts.append(f"{name} {min(gains):+.2f} to {max(gains):+.2f}")
    return f"VAEACConv less the normal distribution, nats a pixel, by kind of mask: {'; '.join(parts)}."


def _coverage_text(result: Result) -> str:
    """Who promises too much."""
    parts = []
    for method in SAMPLED:
        found = [100 * _values(result, *row, method, "coverage").mean() for row in _rows(result)]
        parts.append(f"{method} from {min(found):.0f} to {max(found):.0f} %")
    ours = np.array([_values(result, *row, OURS, "coverage").mean() for row in _rows(result)])
    low, high = int((ours < 0.85).sum()), int((ours > 0.95).sum())
    told = (
        f"VAEACConv's intervals are too narrow in {low} rows (below 85 %), too wide in {high} (above 95 %)."
        if low or high
        else "VAEACConv's lie between 85 and 95 % in every row."
    )
    return f"Over the rows: {'; '.join(parts)}. {told}"


def _limits(result: Result) -> str:
    """Where it does not hold on data this small, as far as this run tells."""
    parts = ["<b>Where it does not hold on data this small.</b>"]
    for name in SETS:
        best = [_best(result, name, kind) for kind in result.plan.kinds]
        others = {method: best.count(method) for method in METHODS if method != OURS and method in best}
        said = ", ".join(f"{method} in {count}" for method, count in others.items()) or "none"
        parts.append(
            f"On {name} VAEACConv's best guess has the least mean error in {best.count(OURS)} of {len(best)} kinds of "
            f"masks; others: {said}."
        )
    wrong = [f"{name}, {kind}" for name, kind in _rows(result) if _verdict(result, name, kind, "normal", "nats", 1) < 0]
    if wrong:
        parts.append(f"The normal distribution finds the truth likelier in: {'; '.join(wrong)}.")
    if grainy := [name for name, share in _shares(result).items() if share < 0.5]:
        parts.append(
            f"On {' and '.join(grainy)} the diversity that the paper shows is hardly there: see the shares above."
        )
    parts.append(
        "A network this small and briefly trained is no measure of what the published one does on large images, where "
        "what is hidden has parts, such as an eye, that no interpolation and no linear regression can know of."
    )
    return " ".join(parts)


# Tables, charts and pictures


def _table(result: Result, methods: tuple[str, ...], figure: str, scale: float, digits: int, *, sign: int) -> str:
    rows = []
    for name, kind in _rows(result):
        cells = {method: spread(scale * _values(result, name, kind, method, figure), digits) for method in methods}
        best = _best(result, name, kind, methods, figure, sign)
        rows.append((f"{name}, {kind}", *(f"<b>{c}</b>" if m == best else c for m, c in cells.items())))
    return table(["hidden", *methods], rows)


def _draw_table(result: Result) -> str:
    rows = []
    for row in _rows(result):
        values = [_values(result, *row, method, "draw") for method in SAMPLED]
        values.append(_values(result, *row, OURS, "guess"))
        rows.append((", ".join(row), *(spread(100 * of, 1) for of in values)))
    return table(["hidden", *SAMPLED, "given one code"], rows)


def _coverage_table(result: Result) -> str:
    rows = []
    for row in _rows(result):
        cells = [
            spread(100 * _values(result, *row, method, figure), 1)
            for method in SAMPLED
            for figure in ("coverage", "width")
        ]
        rows.append((", ".join(row), *cells))
    return table(["hidden", *(f"{method}, {what}" for method in SAMPLED for what in ("%", "width"))], rows)


def _chart(result: Result, name: str) -> str:
    figure, axis = chart(6.2, 2.9)
    kinds = result.plan.kinds
    for method in METHODS:
        values = np.array([100 * _values(result, name, kind, method, "rmse") for kind in kinds])
        axis.plot(values.mean(1), range(len(kinds)), "o", color=COLORS[method], ms=7, mew=0, label=method)
        for row, each in enumerate(values):
            axis.plot([each.min(), each.max()], [row, row], color=COLORS[method], lw=1.5, alpha=0.6)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{name}: error of the best guess, % of the range", color=INK)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    return svg(figure, f"Error of each method's best guess on {name}, by what is hidden; lines are ranges over seeds")


def _pictures(result: Result, name: str) -> str:
    """One row an image: the original, what was seen, fillings, and what the others make of it."""
    side, gap = SIDE[name], max(1, SIDE[name] // 8)
    heads = ["original", "hidden", *(f"code {k + 1}" for k in range(SHOWN)), "+ noise", f"mean of {AVERAGED}"]
    heads += [method for method in METHODS if method != OURS]
    rows, labels = [], []
    for kind in result.plan.kinds:
        found = result.pictures[name][kind]
        for i, truth in enumerate(found["original"]):
            gone = found["hidden"][i].numpy()[..., None]
            grey = [truth, truth, *found["guesses"][:, i], found["draws"][0, i], found[OURS][i]]
            grey += [found[method][i] for method in METHODS if method != OURS]
            cells = [np.repeat(np.clip(cell.numpy(), 0, 1)[..., None], 3, 2) for cell in grey]
            cells[1] = np.where(gone, HIDDEN, cells[1])
            rows.append(cells)
            labels.append("" if i else kind)
    height, width = len(rows) * (side + gap), len(heads) * (side + gap)
    sheet = np.zeros((height, width, 4))
    for r, cells in enumerate(rows):
        for c, cell in enumerate(cells):
            y, x = r * (side + gap), c * (side + gap)
            sheet[y : y + side, x : x + side] = np.dstack([cell, np.ones((side, side))])
    figure, axis = chart(11, 11 * height / width + 0.3)
    axis.grid(False)
    axis.imshow(sheet, interpolation="none")
    axis.xaxis.tick_top()
    axis.set_xticks([c * (side + gap) + side / 2 for c in range(len(heads))], heads, fontsize=8)
    places = [r * (side + gap) + side / 2 for r in range(len(rows))]
    axis.set_yticks(places, labels, fontsize=8)
    return svg(figure, f"Hidden parts of {name}, filled five times by VAEACConv and once by each of the others")
