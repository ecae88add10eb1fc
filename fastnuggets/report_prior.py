"""The page of the demo of the deep weight prior: one HTML file with its charts inside. Every number is computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastnuggets.demo_prior import (
    DEEP,
    FITTED,
    FITTED_INIT,
    INIT,
    METHODS,
    NORMAL,
    PLAIN,
    PUBLISHED,
    SIZES,
    UNIFORM,
    Method,
    Result,
)
from fastnuggets.figures import INK, bare, chart, pyplot, svg, table, tiled
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import Paired, common_fields, paired, spread

TITLE = "What a kernel looks like"
NAMES = {
    PLAIN: "plain",
    INIT: "plain, drawn start",
    NORMAL: "N(0, 1)",
    FITTED: "N(0, s²)",
    FITTED_INIT: "N(0, s²), drawn start",
    UNIFORM: "log-uniform",
    DEEP: "deep",
    PUBLISHED: "deep, drawn start",
}
COLORS = {"": "#8b8d98", "normal": "#e07a3f", "fitted": "#3aa17e", "uniform": "#b05cc8", "deep": "#2f6fed"}
GIVEN_UP = 20  # % of accuracy
PICTURED = (PUBLISHED, DEEP, FITTED, NORMAL, UNIFORM, PLAIN)  # of which the filters are shown


class Metric(NamedTuple):
    key: str
    name: str
    scale: float
    digits: int
    sign: int  # 1: more is better


ACCURACY = Metric("accuracy", "accuracy %", 100, 1, 1)
NLL = Metric("nll", "neg. log-likelihood", 1, 3, -1)
ECE = Metric("ece", "calibration error", 1, 3, -1)
LOG_STD = Metric("log_std", "ln σ", 1, 2, 1)
KL = Metric("kl", "divergence", 1, 0, -1)
SECONDS = Metric("seconds", "seconds", 1, 1, -1)

PAGE = (
    HEAD
    + """\
<p class="lead">The deep weight prior (Atanov, Ashukha, Struminsky, Vetrov and Welling, ICLR 2019) asks trained networks
what their convolution kernels look like, and lets a new network with few labels expect such kernels. Here networks that
read printed letters are asked, and networks that read handwritten digits are told.</p>

<div class="tiles">$tiles</div>

<section>
<h2>Kernels</h2>
$filters
<p class="note">Of the first convolution, $first_size × $first_size; blue is negative, red positive, each row on a scale
of its own. Above: of the source networks, and draws from the model of kernels. Below: what networks have learned from
$most labelled digits with each prior (means, first seed).</p>
$nats_table
<p>$nats_text</p>
<p class="note">Mean ln p of the kernels of source networks that no model has seen, nats a kernel; s is the deviation of
those that were learned from. Of the autoencoder ln p is not known: its lower bound, and the tighter one of 100
samples. KL: what z says of a kernel.</p>
</section>

<section>
<h2>Few labels</h2>
<div class="two">$charts</div>
$tables
<p class="note">$passes passes for a prediction of the Bayesian networks. Mean ± standard deviation over $seeds seeds,
each with other labels, weights and noise; the source networks are the same for all. Drawn start: kernels start as draws
of the models of kernels; the published prior does. s is the deviation of the sources' kernels, so that N(0, s²) is told
the size of a kernel, and nothing of its shape. Divergence: of the convolutions, nats; of the deep prior an upper bound;
of the log-uniform one up to a constant. ln σ: mean over the weights, at the end.</p>
<div>$told</div>
</section>

<section>
<h2>As a start</h2>
<div class="two"><div>$start_chart</div><div><p>$start_text</p></div></div>
<p class="note">Plain networks with $most labels: accuracy after some steps, mean over the seeds, and the least and the
largest. One training of $steps steps, whose rate falls to 0.</p>
</section>

<section>
<h2>Claims</h2>
$claims
<div>$limits</div>
</section>

<section>
<h2>What was done</h2>
<div class="two"><div>$letters</div><div>$digits</div></div>
<p class="note">Left: letters. Right: digits.</p>
<p><b>A stand-in.</b> The paper's sources read notMNIST, letters A to J in many fonts, and its networks read MNIST, both
of 28 × 28 pixels, which no package brings along. Here letters A to J in $fonts fonts of matplotlib, each in two
weights, turned and stretched, are drawn at 8 × 8, as the handwritten digits of scikit-learn are.</p>
<p>$sources source networks of $channels channels ($source_steps steps of $source_batch letters, L2 of $source_decay)
read $source_accuracy % of held-out letters. Of their kernels $kept have a norm of $least_norm or more; those of $held
networks are held out. The models of kernels are variational autoencoders of the published kind with $latents latent
numbers and $hidden hidden channels, $vae_steps steps of $vae_batch kernels. The paper has 100 sources, 7 × 7 and 5 × 5
kernels, 2 and 4 latent numbers, 32 and 64 hidden channels.</p>
<p>A network of digits has two convolutions and a linear layer of plain weights: $steps steps of all its labels at a
rate of $rate that falls to 0; the paper has 10 000. Logarithms of deviations start at $log_std, as published; at the
rate of the means they could go no further than about $reach, and priors would do little but pull at means. At a rate of
$spread_rate they are $moved at the end, mean over the weights; the logarithm of s is $log_s. The linear layer has no
prior in any method. The loss is the mean cross entropy and the divergence over the number of labels. Its settings were
looked at on these digits: a demonstration, no benchmark.</p>
$time_table
<p class="note">Processor seconds of a training, on one thread. The whole run took $seconds ($reused of $parts parts
were there already), on $machine. $versions.$few_seeds</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """prior.html and prior.json."""
    plan, sources = result.plan, result.sources
    least, most = str(plan.counts[0]), str(plan.counts[-1])
    accuracy = 100 * np.array(sources["accuracy"])
    held = max(1, round(plan.held * plan.sources))
    ends = [
        _values(result, count, method, LOG_STD).mean() for count in result.scores for method in METHODS if method.prior
    ]
    fields = common_fields(result) | {
        "title": TITLE,
        "tiles": _tiles(result),
        "first_size": SIZES[0],
        "most": most,
        "filters": _filters(result),
        "nats_table": _nats_table(result),
        "nats_text": _nats_text(result),
        "charts": "".join(f"<div>{_chart(result, metric)}</div>" for metric in (ACCURACY, NLL)),
        "tables": "".join(_table(result, count, count in (least, most)) for count in result.scores),
        "told": _told(result),
        "start_chart": _start_chart(result, most),
        "start_text": _start_text(result, most),
        "claims": _claims(result, least, most),
        "limits": _limits(result),
        "letters": _images(result.letters, "Letters that the source networks read"),
        "digits": _images(result.digits, "Handwritten digits"),
        "fonts": sources["fonts"],
        "channels": " and ".join(map(str, plan.channels)),
        "source_accuracy": f"{accuracy.mean():.1f} ({accuracy.min():.1f} to {accuracy.max():.1f})",
        "kept": " and ".join(
            f"{kept:,} of {all_:,} ({size} × {size})"
            for kept, all_, size in zip(sources["kept"], sources["all"], SIZES, strict=True)
        ),
        "held": held,
        "latents": " and ".join(map(str, plan.latents)),
        "hidden": " and ".join(map(str, plan.hidden)),
        "log_std": f"{plan.log_std:g}",
        "reach": f"{plan.log_std + plan.rate * plan.steps / 2:.1f}",  # Adam's steps are of about the rate
        "moved": f"{min(ends):.1f} to {max(ends):.1f}",
        "log_s": " and ".join(f"{vae['state']['scale'].log().item():.1f}" for vae in result.vaes),
        "time_table": table(
            ["labels", *NAMES.values()],
            [(count, *(spread(_values(result, count, m, SECONDS), 1) for m in METHODS)) for count in result.scores],
        ),
    }
    figures = {
        "plan": plan._asdict(),
        "scores": result.scores,
        "nats": [vae["nats"] for vae in result.vaes],
        "source accuracy": sources["accuracy"],
        "seconds": result.seconds,
    }
    return write_page(out, "prior", PAGE, fields, plan, figures)


def _values(result: Result, count: str, method: Method, metric: Metric) -> np.ndarray:
    """[seeds]"""
    return metric.scale * np.array([score[metric.key] for score in result.scores[count][method.name]])


def compare(result: Result, count: str, method: Method, base: Method, metric: Metric = ACCURACY) -> Paired:
    """A method against another, seed by seed."""
    return paired(_values(result, count, method, metric) - _values(result, count, base, metric), metric.sign)


def _mean(result: Result, count: str, method: Method, metric: Metric = ACCURACY) -> str:
    return f"{_values(result, count, method, metric).mean():.{metric.digits}f}"


# Text


def _tiles(result: Result) -> str:
    counts = list(result.scores)
    first = result.vaes[0]["nats"]
    tiles = [
        (
            f"{_mean(result, count, NORMAL)} → {_mean(result, count, PUBLISHED)} %",
            f"of digits read with {count} labels, N(0, 1) → deep prior",
        )
        for count in (counts[0], counts[-1])
    ]
    tiles += [
        (
            f"{_mean(result, counts[-1], FITTED)} %",
            f"with {counts[-1]} labels and a Gaussian prior that is only told the size of a kernel",
        ),
        (
            f"{first['VAE, 100 samples'] - first['N(0, s²)']:+.1f} nats",
            f"a {SIZES[0]} × {SIZES[0]} kernel, what the autoencoder knows of it beyond its size",
        ),
    ]
    return tiled(tiles)


def _nats_text(result: Result) -> str:
    said = []
    for vae, size in zip(result.vaes, SIZES, strict=True):
        nats = vae["nats"]
        ahead = nats["VAE, 100 samples"] - nats["full Gaussian"]
        said.append(
            f"Of {size} × {size} kernels the autoencoder knows {nats['VAE, 100 samples'] - nats['N(0, s²)']:.1f} nats "
            f"more than their size, and {abs(ahead):.1f} nats {'more' if ahead > 0 else 'less'} than one Gaussian with "
            "all covariances."
        )
    return " ".join(said)


def _verdicts(result: Result, method: Method, base: Method, metric: Metric = ACCURACY) -> str:
    """For how many labels a method is better than another."""
    found = {count: compare(result, count, method, base, metric).verdict for count in result.scores}
    words = {1: "better", -1: "worse", 0: "not told apart"}
    return "; ".join(
        f"{words[verdict]} with {', '.join(count for count in found if found[count] == verdict)}"
        for verdict in (1, -1, 0)
        if verdict in found.values()
    )


def _told(result: Result) -> str:
    others = [method for method in METHODS if method != PUBLISHED]
    parts = [
        f"{NAMES[base]}: accuracy {_verdicts(result, PUBLISHED, base)}; likelihood "
        f"{_verdicts(result, PUBLISHED, base, NLL)}"
        for base in others
    ]
    items = "".join(f"<li>{part}</li>" for part in parts)
    return f"The deep prior as published, with a drawn start, against each, seed by seed, by labels:<ul>{items}</ul>"


def _looks(result: Result, count: str, method: Method) -> np.ndarray:
    """Accuracy %, [seeds, looks and the end]."""
    scores = result.scores[count][method.name]
    return 100 * np.array([[*score["looks"].values(), score["accuracy"]] for score in scores])


def _looked(result: Result) -> list[int]:
    return [step for step in result.plan.looks if step < result.plan.steps] + [result.plan.steps]


def _start_text(result: Result, count: str) -> str:
    steps = _looked(result)
    each = _looks(result, count, INIT) - _looks(result, count, PLAIN)
    verdicts = [paired(column, 1).verdict for column in each.T]
    words = {1: "ahead", -1: "behind", 0: "not told apart"}
    parts = [
        f"after {step} steps {column.mean():+.1f} % ({words[verdict]})"
        for step, column, verdict in zip(steps, each.T, verdicts, strict=True)
    ]
    return "Kernels drawn from the models of kernels, against torch's start, seed by seed: " + "; ".join(parts) + "."


def _claims(result: Result, least: str, most: str) -> str:
    def row(metric: Metric) -> str:
        return "; ".join(
            f"{count} labels " + ", ".join(f"{NAMES[m]} {_mean(result, count, m, metric)}" for m in shown)
            for count in (least, most)
        )

    shown = (NORMAL, UNIFORM, PUBLISHED)
    rows = [
        (
            "improves Bayesian networks when training data is limited",
            f"accuracy %: {row(ACCURACY)}<br>neg. log-likelihood: {row(NLL)}<br>accuracy against N(0, 1): "
            f"{_verdicts(result, PUBLISHED, NORMAL)} labels; against log-uniform: "
            f"{_verdicts(result, PUBLISHED, UNIFORM)} labels",
        ),
        (
            "its draws as a start make conventional networks learn faster",
            _start_text(result, most),
        ),
    ]
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>The Deep Weight Prior, ICLR 2019, arXiv:1810.06943: it</th><th>measured here</th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{cells}</tbody></table></div>'


def _limits(result: Result) -> str:
    """What else might explain it, and where it does not hold, as far as this run tells."""
    parts = [
        ("Is it the shape of kernels, or their size? The deep prior against N(0, s²), both from torch's start", DEEP,
         FITTED),
        ("The same, both with a drawn start", PUBLISHED, FITTED_INIT),
        ("Is it the prior, or the start? The deep prior with a drawn start against one without", PUBLISHED, DEEP),
        ("Is a prior needed? The deep prior with a drawn start against a plain network with one", PUBLISHED, INIT),
        ("And against a plain network from torch's start", PUBLISHED, PLAIN),
    ]  # fmt: skip
    said = "".join(
        f"<li>{text}: accuracy {_verdicts(result, method, base)}; likelihood {_verdicts(result, method, base, NLL)}."
        "</li>"
        for text, method, base in parts
    )
    return (
        f"<b>What else it could be, and where it does not hold on data this small</b>, by labels:<ul>{said}</ul>"
        f"<p>{_worth(result)} Letters and digits of 8 × 8 pixels have little room for kernels as large and smooth as "
        "the paper's.</p>"
    )


def _worth(result: Result) -> str:
    """Why a bound may give up the labels: what they are worth, and what kernels that know something cost."""
    given_up = {
        NAMES[method]: [count for count in result.scores if _values(result, count, method, ACCURACY).mean() < GIVEN_UP]
        for method in METHODS
    }
    said = [f"{name} with {', '.join(counts)} labels" for name, counts in given_up.items() if counts]
    costs = [_values(result, count, m, KL).mean() for count in result.scores for m in METHODS if m.prior]
    most = result.plan.counts[-1]
    text = (
        f"Labels hold ln 10 nats each, {most} of them {most * math.log(10):,.0f}; the "
        f"divergences above are {min(costs):,.0f} to {max(costs):,.0f} nats."
    )
    return f"{text} Below {GIVEN_UP} % of accuracy, and so about as good as a guess: {'; '.join(said) or 'none'}."


# Tables


def _nats_table(result: Result) -> str:
    columns = list(result.vaes[0]["nats"])
    rows = [
        (
            f"{size} × {size}",
            *(f"{vae['nats'][name]:.2f}" for name in columns),
            f"{vae['kl']:.2f}",
            f"{vae['tested']:,}",
        )
        for vae, size in zip(result.vaes, SIZES, strict=True)
    ]
    return table(["", *columns, "KL", "kernels"], rows)


def _table(result: Result, count: str, shown: bool) -> str:
    rows = []
    for method in METHODS:
        rows.append(
            (
                NAMES[method],
                *(spread(_values(result, count, method, metric), metric.digits) for metric in (ACCURACY, NLL, ECE)),
                f"{_values(result, count, method, KL).mean():,.0f}" if method.prior else "–",
                f"{_values(result, count, method, LOG_STD).mean():.2f}" if method.prior else "–",
            )
        )
    made = table([f"{count} labels", ACCURACY.name, NLL.name, ECE.name, KL.name, LOG_STD.name], rows)
    return made if shown else f"<details><summary>{count} labels</summary>{made}</details>"


# Charts


def _line(method: Method) -> dict[str, object]:
    return {"color": COLORS[method.prior], "ls": "--" if method.drawn else "-", "lw": 1.8, "marker": "o", "ms": 4}


def _chart(result: Result, metric: Metric) -> str:
    figure, axis = chart(6.2, 4.4)
    counts = result.plan.counts
    for method in METHODS:
        means = [_values(result, str(count), method, metric).mean() for count in counts]
        axis.plot(counts, means, label=NAMES[method], **_line(method))
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    if metric is NLL:
        axis.set_yscale("log")
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8) if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel("labels", color=INK)
    axis.set_ylabel(metric.name, color=INK)
    if metric is ACCURACY:
        axis.legend(
            frameon=False, fontsize=8.5, labelcolor=INK, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16)
        )
    return svg(figure, f"{metric.name} by the number of labels, for each prior")


def _start_chart(result: Result, count: str) -> str:
    figure, axis = chart(6.2, 3.6)
    steps = _looked(result)
    for method, color in ((PLAIN, COLORS[""]), (INIT, COLORS["deep"])):
        found = _looks(result, count, method)
        axis.fill_between(steps, found.min(0), found.max(0), color=color, alpha=0.15, lw=0)
        axis.plot(steps, found.mean(0), "o-", color=color, lw=1.8, ms=4, label=NAMES[method])
    axis.set_xscale("log")
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.set_xlabel("steps", color=INK)
    axis.set_ylabel(ACCURACY.name, color=INK)
    axis.legend(frameon=False, labelcolor=INK, loc="lower right")
    return svg(figure, "Accuracy of plain networks by steps, from torch's start and from drawn kernels")


def _filters(result: Result) -> str:
    shown = result.plan.kernels
    rows = {"of letters": result.sources["shown"][:shown], "drawn": result.vaes[0]["drawn"][:shown]}
    rows |= {NAMES[method]: result.filters[method.name][:shown] for method in PICTURED}
    figure, _ = chart(11, 0.62 * len(rows))
    figure.clear()
    axes = figure.subplots(len(rows), shown, squeeze=False)
    colors = pyplot().get_cmap("RdBu_r")
    for line, (name, kernels) in zip(axes, rows.items(), strict=True):
        top = kernels.abs().max().item()
        for axis, kernel in zip(line, kernels, strict=False):
            axis.imshow(colors(0.5 + 0.5 * kernel.numpy() / top), interpolation="nearest")
        for axis in line:
            bare(axis)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, color=INK, rotation=0, ha="right", va="center")
    return svg(figure, "Kernels of the first convolution: of source networks, drawn, and learned with each prior")


def _images(images: Tensor, label: str) -> str:
    figure, _ = chart(5.5, 1.5)
    figure.clear()
    for axis, image in zip(figure.subplots(2, 8).flat, images, strict=False):
        axis.imshow(-image[0].numpy(), cmap="gray", interpolation="nearest")
        axis.axis("off")
    return svg(figure, label)
