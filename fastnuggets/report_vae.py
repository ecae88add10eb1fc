"""The page of the demo of variational autoencoders: one HTML file with its pictures. Every number is computed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastnuggets.demo_vae import (
    ACTIVE,
    APART,
    CLASSES,
    CONDITIONAL,
    INK,
    JOINT,
    LABELLED,
    MIXTURE,
    MODELS,
    PLAIN,
    REACH,
    Result,
)
from fastnuggets.figures import INK as TEXT
from fastnuggets.figures import chart, image, svg, table, tiled
from fastnuggets.molecules.files import need
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import common_fields, paired, spread

TITLE = "Codes of digits, and bounds that are bounds"
COLORS = {PLAIN: "#2f6fed", CONDITIONAL: "#3aa17e", JOINT: "#e07a3f", MIXTURE: "#8b8d98"}

PAGE = (
    HEAD
    + """\
<style>.digits img { image-rendering: pixelated; max-width: 560px; } .digits .rows { grid-template-columns: 118px 1fr; }
.digits .side { height: 100%; max-width: 118px; }</style>
<p class="lead">Three variational autoencoders learn $learned handwritten digits of 8 × 8 pixels in black and white: one
sees images alone, one is told the label, and one has a category in its code and finds by itself what to do with it.
What they say of $tested other images is a probability, in nats, and so comparable with what a mixture says.</p>

<div class="tiles">$tiles</div>

<section>
<h2>Nats</h2>
$nats_table
<p class="note">ln p(x) of a test image, mean over images, then mean ± standard deviation over $seeds seeds, each with
another split. The bound: likelihood less divergence. The importance-weighted bound: of $samples samples. Baselines are
exact. Active: latents whose mean varies over images by more than $active. Learned: the bound of the images learned
from.</p>
<p>$nats_text</p>
<h2>Nats given the label</h2>
$label_table
<p class="note">ln p(x | y): who is told the label need not pay for it, so that these compare with each other
alone.</p>
<div class="two"><div>$samples_chart</div><div>$latents_chart</div></div>
<p>$samples_text</p>
</section>

<section class="digits">
<h2>Drawn, and drawn again</h2>
<div class="two">
<div><p>Test images, and images drawn from each model, pixels and all; the conditional one was asked for 0, 1,
2, …</p>$samples_picture</div>
<div><p>Test images, and the chances of ink that each model gives back for the mean of their code.</p>
$rebuilt_picture</div>
</div>
</section>

<section class="digits">
<h2>Asked for a label</h2>
<div class="two">
<div>$labels_picture
<p class="note">Chances of ink. A row is a label, a column one code for all of them.</p></div>
<div>$drawn_table
<p class="note">Of $drawn images drawn for labels, the share that a support vector machine trained on the $learned real
ones takes for what was asked, %; and the share of test images, %, that one trained on the drawn ones alone gets right.
Images that are all alike are taken for what was asked and teach little. First row: the real ones.</p>
<p>$drawn_text</p></div>
</div>
</section>

<section class="digits">
<h2>Kinds that nobody named</h2>
<div class="two">
<div>$categories_picture
<p class="note">Chances of ink of the JointVAE. A row is a category, with the digit it is matched with; a column one
code for all of them.</p></div>
<div>$kinds_table
<p class="note">Share of test images whose kind is that of their digit, %. The $classes kinds are found without labels,
and matched with digits one to one on the images learned from, as well as can be.</p>
<p>$kinds_text</p></div>
</div>
<p>$relaxed_text</p>
<h2>One latent at a time</h2>
$walks_picture
<p class="note">From the code of a test image, a $seen_label whose category is matched with $walk_label, one number is
moved from −$reach to $reach standard deviations of the prior. At the left the nats of that latent.</p>
</section>

<section>
<h2>What the papers claim, and what was seen here</h2>
$claims
<p class="note">A difference counts as seen where its interval of $confidence % over the seeds leaves out 0.</p>
<p>$limits</p>
</section>

<section>
<h2>What was done</h2>
<p>A pixel is black from $ink of its 16 dots on. Grey pixels with the usual cross-entropy would give a loss, but
not the logarithm of a probability; black and white ones do. Of each split $learned images are learned
from, $validated choose when to stop, how many components a mixture has and how it is smoothed, and $tested test. One
hidden layer of $widths to either side, with ReLU, $parameters; AdamW at $rate, falling to 0, weight decay $decay,
$steps steps of $batch images; the weights kept are the best of $validations validations in the second half. JointVAE:
temperature $tau, γ = $gamma, capacities that grow all the time, to $capacity nats for numbers and $category_capacity
for the category. Its settings, the width and the rate were looked at on other splits of these images: a demonstration,
no benchmark.</p>
$time_table
<p class="note">Seconds of training, on one thread. The whole run took $seconds ($reused of $parts parts were there
already), on $machine. $versions.$few_seeds</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """vae.html and vae.json."""
    plan, pictures = result.plan, result.pictures
    fields = common_fields(result) | {
        "title": TITLE,
        "tiles": _tiles(result),
        "learned": f"{result.sizes[0]:,}",
        "validated": result.sizes[1],
        "tested": result.sizes[2],
        "active": f"{ACTIVE:g}",
        "classes": CLASSES,
        "ink": INK,
        "reach": f"{REACH:g}",
        **{name: f"{getattr(plan, name):g}" for name in ("capacity", "category_capacity", "gamma", "rate")},
        "widths": " and ".join(map(str, plan.hidden)),
        "parameters": ", ".join(f"{kind} {count:,} weights" for kind, count in result.parameters.items()),
        "nats_table": _nats_table(result),
        "nats_text": _nats_text(result),
        "label_table": _label_table(result),
        "samples_chart": _samples_chart(result),
        "latents_chart": _latents_chart(result),
        "samples_text": _samples_text(result),
        "samples_picture": _named(pictures["samples"]),
        "rebuilt_picture": _named(dict(zip(("test images", *MODELS), pictures["rebuilt"], strict=True))),
        "labels_picture": _named({str(label): row for label, row in enumerate(pictures["labels"])}),
        "drawn_table": _drawn_table(result),
        "drawn_text": _drawn_text(result),
        "categories_picture": _rows([f"“{of}”" for of in pictures["category labels"]], list(pictures["categories"])),
        "kinds_table": _kinds_table(result),
        "kinds_text": _kinds_text(result),
        "relaxed_text": _relaxed_text(result),
        "walks_picture": _rows([f"{kl:.2f} nats" for kl in pictures["walk kl"]], list(pictures["walks"])),
        "walk_label": pictures["walk label"],
        "seen_label": pictures["seen label"],
        "claims": _claims(result),
        "limits": _limits(result),
        "time_table": table(["", "training s"], [(kind, spread(_of(result, kind, "seconds"), 1)) for kind in MODELS]),
    }
    figures = {"plan": plan._asdict(), "scores": result.scores, "seconds": result.seconds}
    return write_page(out, "vae", PAGE, fields, plan, figures)


# Numbers


def _of(result: Result, *path: str) -> np.ndarray:
    """A figure of each seed [seeds]."""
    return np.array([_deep(score, path) for score in result.scores])


def _deep(score: Any, path: Sequence[str]) -> Any:
    for name in path:
        score = score[name]
    return score


def _test(result: Result, name: str) -> np.ndarray:
    """Nats of test images [seeds]: of a model its importance-weighted bound."""
    return _of(result, name, "iwae") if name in MODELS else _of(result, "baselines", name, "test")


def _said(each: np.ndarray, digits: int, sign: int = 1, unit: str = "") -> str:
    """In words: a difference [seeds] to something else."""
    found = paired(each, sign)
    words = {1: "better", -1: "worse", 0: "not told apart"}[found.verdict]
    return f"{words} ({found.mean:+.{digits}f}{unit}; {each.min():+.{digits}f} to {each.max():+.{digits}f})"


# Text


def _tiles(result: Result) -> str:
    asked, kinds = _of(result, "drawn", CONDITIONAL, "asked"), _of(result, "kinds", JOINT)
    tiles = [
        (
            f"{_test(result, PLAIN).mean():.1f} nats",
            f"an image, VAE's importance-weighted bound; a mixture {_test(result, MIXTURE).mean():.1f}, pixels apart "
            f"{_test(result, APART).mean():.1f}",
        ),
        (f"{100 * asked.mean():.1f} %", "of images drawn for a label are taken for it by a classifier of real ones"),
        (
            f"{100 * kinds.mean():.1f} %",
            f"of test images are of the digit that their category, found without labels, stands for; k-means "
            f"{100 * _of(result, 'kinds', 'k-means').mean():.1f} %",
        ),
    ]
    return tiled(tiles)


def _nats_text(result: Result) -> str:
    mixture = _test(result, MIXTURE)
    marginal = _of(result, "marginal", "iwae")
    return (
        "Against the mixture, seed by seed, in nats an image and by the importance-weighted bound, which is what a "
        f"model can prove: VAE {_said(_test(result, PLAIN) - mixture, 2)}, JointVAE "
        f"{_said(_test(result, JOINT) - mixture, 2)}, conditional VAE with the label summed out "
        f"{_said(marginal - mixture, 2)}. Told the label, the conditional VAE against the mixtures by label: "
        f"{_said(_test(result, CONDITIONAL) - _of(result, 'baselines', LABELLED[MIXTURE], 'test'), 2)}."
    )


def _samples_text(result: Result) -> str:
    """How the bound rises with the number of samples, and whether it still does."""
    parts = []
    for kind in (PLAIN, JOINT):
        curve = np.array(_of(result, kind, "by samples"))  # [seeds, counts, 2]
        first, before, last = curve[:, 0, 1].mean(), curve[:, -2, 1].mean(), curve[:, -1, 1].mean()
        counts = curve[0, :, 0].astype(int)
        parts.append(f"{kind}: {first:.2f} with 1 sample, {before:.2f} with {counts[-2]}, {last:.2f} with {counts[-1]}")
    return (
        "ln p(x) itself is not known; a bound of more samples is nearer to it. " + "; ".join(parts) + ". "
        "JointVAE's bound of one sample is above its plain bound, as the category is summed out."
    )


def _drawn_text(result: Result) -> str:
    parts = []
    for name in LABELLED.values():
        asked, taught = (
            100 * (_of(result, "drawn", CONDITIONAL, what) - _of(result, "drawn", name, what))
            for what in ("asked", "taught")
        )
        parts.append(f"{name}: taken for what was asked {_said(asked, 1)}, taught {_said(taught, 1)}")
    right = 100 * _of(result, "marginal", "right")
    return (
        "The conditional VAE against each, in points: " + "; ".join(parts) + ". Read backwards, as the label under "
        f"which a test image is likeliest, it classifies {spread(right, 1)} % of them rightly."
    )


def _kinds_text(result: Result) -> str:
    ours = 100 * _of(result, "kinds", JOINT)
    parts = [f"{name} {_said(ours - 100 * _of(result, 'kinds', name), 1)}" for name in ("k-means", "mixture of 10")]
    category_kl, kl = (_of(result, "relaxation", what).mean() for what in ("category kl", "kl"))
    return (
        f"JointVAE against each, in points: {'; '.join(parts)}. From seed to seed it finds from {ours.min():.1f} to "
        f"{ours.max():.1f} %. Its category says {category_kl:.2f} nats of an image, of {np.log(CLASSES):.2f} that it "
        f"could; its numbers {kl:.2f}."
    )


def _relaxed_text(result: Result) -> str:
    relaxed, bound = _of(result, "relaxation", "relaxed"), _of(result, JOINT, "elbo")
    gap = relaxed - bound
    verdict = paired(gap, 1).verdict
    what = {
        1: "higher than the bound: it promises what the model, of whole categories, does not hold",
        -1: "lower than the bound: here mixed categories cost more than they promise",
        0: "not told apart from the bound here, which nothing assures",
    }[verdict]
    return (
        "<b>What training sees is no bound.</b> It decodes mixtures of categories, which the model does not have. On "
        f"the test images the relaxed sum is {spread(relaxed, 2)} nats, the bound, with the exact sum over all "
        f"categories, {spread(bound, 2)}; the relaxed one is {what} ({gap.min():+.2f} to {gap.max():+.2f}). The tables "
        "hold the exact ones."
    )


def _claims(result: Result) -> str:
    def here(kind: str) -> str:
        active = _of(result, kind, "active")
        of = result.plan.joint_latent if kind == JOINT else result.plan.latent
        return f"{kind} {active.mean():.1f} of {of}, {_most(result, kind):.1f} of which hold 90 % of the divergence"

    gap = _of(result, PLAIN, "learned") - _of(result, PLAIN, "elbo")
    late = _of(result, PLAIN, "elbo") - _of(result, PLAIN, "last")
    steps, last = _of(result, PLAIN, "best step"), result.plan.steps
    stopped = (
        "the last weights were the best on the validation images"
        if (steps == last).all()
        else f"kept are the weights of step {steps.min():.0f} to {steps.max():.0f} of {last}, the last ones are "
        f"{late.mean():.2f} nats worse on test images"
    )
    curve = np.array(_of(result, PLAIN, "by samples"))[:, :, 1]
    rises = int((np.diff(curve.mean(0)) > 0).sum())
    kinds = 100 * _of(result, "kinds", JOINT)
    asked, taught = (100 * _of(result, "drawn", CONDITIONAL, what).mean() for what in ("asked", "taught"))
    rows = [
        (
            "Kingma, Welling, ICLR 2014",
            "latents that are not needed do no harm: the divergence keeps from overfitting",
            f"the bound of learned images is {gap.mean():.2f} nats above that of test images; {stopped}",
        ),
        (
            "Burda, Grosse, Salakhutdinov, ICLR 2016",
            "the bound rises with the samples; many latents of a VAE are not used",
            f"it rose at {rises} of {curve.shape[1] - 1} increases, by {np.ptp(curve.mean(0)):.2f} nats; active: "
            + "; ".join(here(kind) for kind in MODELS),
        ),
        (
            "Sohn, Lee, Yan, NeurIPS 2015",
            "one condition, many and various answers",
            f"{asked:.1f} % are taken for what was asked, and a classifier that they alone have taught has "
            f"{taught:.1f} % right, one taught by the images themselves "
            f"{100 * _of(result, 'drawn', 'images', 'taught').mean():.1f} %",
        ),
        (
            "Dupont, NeurIPS 2018",
            "on MNIST the category becomes the kind of digit, without labels",
            f"{spread(kinds, 1)} % of test images; the split, the weights and the order of batches decide between "
            f"{kinds.min():.1f} and {kinds.max():.1f}",
        ),
        (
            "Maddison, Mnih, Teh; Jang, Gu, Poole, ICLR 2017",
            "a network trained on relaxed categories works with whole ones",
            f"of whole categories the exact bound is {_of(result, JOINT, 'elbo').mean():.2f}, the relaxed sum "
            f"{_of(result, 'relaxation', 'relaxed').mean():.2f}",
        ),
    ]
    cells = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>paper</th><th>claims</th><th>measured here</th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{"".join(cells)}</tbody></table></div>'


def _limits(result: Result) -> str:
    """Where it does not hold on data this small, as far as this run tells."""
    plain, joint, mixture = (_test(result, name) for name in (PLAIN, JOINT, MIXTURE))
    marginal = _of(result, "marginal", "iwae")
    parts = [
        "<b>Where it does not hold on data this small.</b>",
        f"JointVAE's bound is, beside the VAE's, {_said(joint - plain, 2)}: its capacities are there for what the "
        "latents mean, and not for the likelihood.",
        f"That of the conditional VAE, the label summed out again, is, beside the VAE's, {_said(marginal - plain, 2)}.",
    ]
    if paired(plain - mixture, 1).verdict <= 0:
        parts.append("A mixture fitted by expectation and maximisation says as much of these images as the VAE.")
    if _paired_drawn(result, "asked") <= 0:
        parts.append("Images of the conditional VAE are taken for their label no more often than those of mixtures.")
    if paired(_of(result, "kinds", JOINT) - _of(result, "kinds", "k-means"), 1).verdict <= 0:
        parts.append("Nor does the category of JointVAE find digits better than k-means does.")
    parts.append(
        f"8 × 8 pixels in black and white leave little to say: {_most(result, PLAIN):.1f} of {result.plan.latent} "
        "latents of the VAE hold 90 % of its divergence."
    )
    return " ".join(parts)


# Tables and charts


def _paired_drawn(result: Result, what: str) -> int:
    return paired(_of(result, "drawn", CONDITIONAL, what) - _of(result, "drawn", LABELLED[MIXTURE], what), 1).verdict


def _most(result: Result, kind: str) -> float:
    """How many latents hold 90 % of the divergence, mean over seeds."""
    parts = np.cumsum(_of(result, kind, "latents"), 1)
    return float(((parts < 0.9 * parts[:, -1:]).sum(1) + 1).mean())


def _nats_table(result: Result) -> str:
    rows = []
    for kind in (PLAIN, JOINT):
        rows.append((kind, *_bounds(result, kind)))
    rows.append((f"{CONDITIONAL}, label summed out", "–", _cell(result, "marginal", "iwae"), *["–"] * 4))
    for name in (MIXTURE, APART):
        rows.append((_components(result, name), *_exact(result, name)))
    return table(_HEAD, rows)


def _label_table(result: Result) -> str:
    names = [LABELLED[name] for name in (MIXTURE, APART)]
    rows = [(CONDITIONAL, *_bounds(result, CONDITIONAL))]
    return table(_HEAD, rows + [(_components(result, name), *_exact(result, name)) for name in names])


_HEAD = ["", "bound", "importance-weighted", "likelihood", "divergence", "active", "learned"]


def _bounds(result: Result, kind: str) -> list[str]:
    cells = [_cell(result, kind, what) for what in ("elbo", "iwae", "likelihood", "kl")]
    return [*cells, spread(_of(result, kind, "active"), 1), _cell(result, kind, "learned")]


def _exact(result: Result, name: str) -> list[str]:
    return [
        "exact",
        _cell(result, "baselines", name, "test"),
        "–",
        "–",
        "–",
        _cell(result, "baselines", name, "learned"),
    ]


def _components(result: Result, name: str) -> str:
    counts = sorted({int(count) for count in _of(result, "baselines", name, "components")})
    if counts == [1]:
        return name
    return f"{name}, {' or '.join(map(str, counts))} components"


def _cell(result: Result, *path: str) -> str:
    return spread(_of(result, *path), 2)


def _drawn_table(result: Result) -> str:
    return _percents(result, "drawn", ["", "as asked %", "taught %"], lambda cell: [cell["asked"], cell["taught"]])


def _kinds_table(result: Result) -> str:
    return _percents(result, "kinds", ["", "of its digit %"], lambda cell: [cell])


def _percents(result: Result, what: str, head: list[str], cells: Callable[[Any], list[float]]) -> str:
    rows = []
    for name in result.scores[0][what]:
        values = 100 * np.array([cells(score[what][name]) for score in result.scores])
        rows.append((name, *(spread(column, 1) for column in values.T)))
    return table(head, rows)


def _samples_chart(result: Result) -> str:
    figure, axis = chart(5.2, 3.0)
    for kind in (PLAIN, JOINT):
        curve = np.array(_of(result, kind, "by samples"))
        for one in curve:
            axis.plot(one[:, 0], one[:, 1], color=COLORS[kind], lw=0.8, alpha=0.35)
        axis.plot(curve[0, :, 0], curve[:, :, 1].mean(0), "o-", color=COLORS[kind], lw=2, ms=4, label=kind)
    axis.axhline(_test(result, MIXTURE).mean(), color=COLORS[MIXTURE], lw=1.6, ls="--", label="mixture, exact")
    axis.set_xscale("log")
    counts = [int(count) for count in curve[0, :, 0]]
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("samples of the importance-weighted bound", color=TEXT)
    axis.set_ylabel("nats an image", color=TEXT)
    axis.legend(frameon=False, labelcolor=TEXT, fontsize=9)
    return svg(figure, "Importance-weighted bounds by the number of samples; faint: each seed")


def _latents_chart(result: Result) -> str:
    figure, axis = chart(5.2, 3.0)
    for kind in MODELS:
        each = np.array(_of(result, kind, "latents"))
        places = np.arange(1, each.shape[1] + 1)
        axis.plot(places, each.mean(0), "o-", color=COLORS[kind], lw=1.6, ms=4, label=kind)
    axis.set_xlabel("latents, the most telling first", color=TEXT)
    axis.set_ylabel("divergence, nats", color=TEXT)
    axis.legend(frameon=False, labelcolor=TEXT, fontsize=9)
    return svg(figure, "Divergence of each latent, mean over test images and seeds")


# Pictures


def _named(rows: dict[str, Tensor]) -> str:
    return _rows(list(rows), list(rows.values()))


def _rows(names: Sequence[str], rows: Sequence[Tensor]) -> str:
    """Rows of images [columns, 64], each with its name at the left."""
    side = "".join(f"<span>{name}</span>" for name in names)
    style = f"grid-template-rows: repeat({len(names)}, 1fr)"
    picture = image(png_of([row.numpy() for row in rows]), "rows of digits: " + ", ".join(names))
    return f'<div class="rows"><div class="side" style="{style}">{side}</div>{picture}</div>'


def png_of(rows: Sequence[np.ndarray], scale: int = 4) -> bytes:
    """Rows of images [columns, 64], ink from 0 to 1, as one PNG; what is between them is transparent."""
    ink = np.pad(np.stack(rows).reshape(len(rows), -1, 8, 8), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    flat = ink.transpose(0, 2, 1, 3).reshape(9 * ink.shape[0], 9 * ink.shape[1])[:-1, :-1]
    flat = flat.repeat(scale, 0).repeat(scale, 1)
    shown = np.ones((*flat.shape, 4))
    shown[..., :3] = np.nan_to_num(1 - flat)[..., None]
    shown[..., 3] = ~np.isnan(flat)
    file = io.BytesIO()
    need("matplotlib.image").imsave(file, shown, format="png")
    return file.getvalue()
