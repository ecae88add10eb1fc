"""The page of the demo of averages: one HTML file with its charts inside. Every measured number in it is computed."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastnuggets import __version__
from fastnuggets.demo_average import (
    BASE,
    BINS,
    CLEAN,
    CONVOLUTIONAL,
    METHODS,
    MOMENTUM,
    NOISY,
    TASKS,
    Result,
    Score,
    Task,
)
from fastnuggets.figures import INK, chart, duration, svg, table, tiled
from fastnuggets.molecules.files import need
from fastnuggets.page import HEAD, write_page
from fastnuggets.training import CurveLoss, LossPlane, plot_curve, plot_plane

TITLE = "Averages of weights: what they give, and where they give nothing"
COLORS = {
    "last": "#8b8d98",
    "best": "#5d6878",
    "ema": "#2ba35a",
    "high": "#c98a2b",
    "high ema": "#1d7f8c",
    "swa": "#2f6fed",
    "swag": "#8a5cd6",
    "snapshot": "#e07a3f",
    "fge": "#d6336c",
}
RUNS = {"last": "conventional", "swa": "kept high: SWA, SWAG", "snapshot": "snapshot ensemble", "fge": "FGE"}
CURVES = {"straight": "straight line", "chain": "chain, one bend", "bezier": "Bezier, one bend"}
NO_METHOD = (BASE, "best")
SHORT = {"swa": "SWA", "snapshot": "snapshots", "swag": "SWAG"}
LEAST = 20  # predictions of a bin that is shown
CONFIDENCE = 0.95  # of the intervals that decide what is a gain


class Metric(NamedTuple):
    """A number of a score."""

    name: str
    value: Callable[[Score], float]
    sign: int  # 1 if more is better
    digits: int
    better: str


ACCURACY = Metric("accuracy %", lambda score: 100 * score.accuracy, 1, 1, "More accurate")
NLL = Metric("neg. log-likelihood", lambda score: score.nll, -1, 3, "Lower negative log-likelihood")
ECE = Metric("calibration error %", lambda score: 100 * score.ece, -1, 1, "Better calibrated")


class Paired(NamedTuple):
    """Differences of two methods, seed by seed."""

    each: np.ndarray  # [seeds]
    mean: float
    verdict: int  # 1 better, -1 worse, 0: these seeds do not tell


PAGE = (
    HEAD
    + """\
<p class="lead">A small network learns handwritten digits from $labelled images of which $wrong have a wrong label; in a
second round from $clean_labelled images with the right ones. Every method gets the same $steps training steps, the same
first weights and the same batches, with each of $seeds seeds. All figures are over the seeds; only
the pictures of the loss are of the first one.</p>

<div class="tiles">$tiles</div>

<section>
<h2>Few and noisy labels</h2>
<p>$labelled training images, $wrong of them with a wrong label; tested on the other $tested. A dense network of
$dense_weights weights.</p>
$noisy_table
$noisy_charts
<p>$noisy_text</p>
<p class="note">Mean ± standard deviation over the seeds. "against last" is the difference to the last iterate of the
same seed: mean, and the lowest and highest. Passes: forward passes for one prediction. Ready: what an average needs
before its first prediction, new batch norm statistics; SWAG needs them for each draw, in its testing time. Times are of
$machine, one thread. Training: the run with this method's updates, without those of the others.</p>
</section>

<section>
<h2>The same labels, a better network</h2>
<p>What do averages add to a network that fits the images better? A convolutional one of $convolutional_weights weights:
its last iterate is right for $convolutional_last % of the test images, where the dense network's is for $dense_last %
and SWA of the dense network for $dense_swa %.</p>
$convolutional_table
$convolutional_charts
<p>$convolutional_text</p>
</section>

<section>
<h2>All labels, clean</h2>
<p>The dense network with the same settings, on $clean_labelled training images with the right labels, tested on the
other $clean_tested: one image is $one_image points of accuracy.</p>
$clean_table
$clean_charts
<p>$clean_text</p>
</section>

<section>
<h2>When the models were taken</h2>
<div class="two"><div>$rates_chart</div>
<div><p>Four runs of $steps steps. The <b>conventional</b> one is flat for half of them and then falls linearly to 1 %;
its end is the last iterate that all else is compared with. The <b>high</b> one goes to $high instead and stays there:
from step $start on one model in $every steps goes into SWA and SWAG, $averaged models. The <b>snapshot ensemble</b>
takes $cycles models, each at the end of a cosine; <b>FGE</b> as many from step $start on, in the middle of triangles
from $high to $low and back.</p>
<p>EMA follows every step with a decay of $decay, once along the conventional run and once along the high one. "The high
run as it ends" is there to see what the averaging does, and what the rate. "An ideal early stop" is the conventional
run at the moment when it was most accurate on the test images, looked at every $best_every steps: no method, for none
may look, but as much accuracy as stopping early could give.</p></div></div>
</section>

<section>
<h2>Calibration</h2>
<div class="two"><div>$reliability_chart</div>
<div><p>Of the predictions made with a confidence of 80 %, 80 % should be right: the dashed line. Above it a model is
too modest, below it too sure. Few and noisy labels, dense network, all seeds together, $bins bins of which those with
at least $bin_least predictions are shown.</p><p>$calibration_text</p></div></div>
</section>

<section>
<h2>The loss around the averages</h2>
<div class="two"><div>$plane_loss</div><div>$plane_error</div></div>
<p class="note">The plane through the last iterate, SWA and the first model that SWA averaged; few and noisy labels,
dense network, first seed. Left the loss on the training labels, wrong ones included, right the test error in %. White:
the iterates that SWA averages, seen at right angles to the plane; their mean is SWA. Batch norm statistics are new at
each of $grid × $grid points.</p>
<p>$plane_text</p>
</section>

<section>
<h2>From one optimum to another</h2>
<div class="two"><div>$curve_loss</div><div>$curve_error</div></div>
<p>$curve_text</p>
<p class="note">The ends are two conventional runs on the same labels from other first weights and batches. Each curve
was trained for $curve_steps steps. Left the loss on the training labels, right the test error in %.</p>
</section>

<section>
<h2>What the papers claim, and what was measured here</h2>
$claims
<p>$limits</p>
</section>

<section>
<h2>What was used</h2>
<p>The $images digits of 8 × 8 pixels in scikit-learn. A seed decides the split, which labels are wrong, the first
weights and the batches. SGD with a rate of $rate, momentum $momentum, weight decay $weight_decay, batches of $batch.
SWAG: rank $rank, scale $scale, $draws draws. The settings were chosen on three other seeds: of those tried with
which the last iterate was about at its best, ones with which SWA gained clearly. All seeds share the same images.</p>
<p>"Better" and "worse" $verdicts It says what another split of these
images would do, not other images, and not other data.$few_seeds</p>
<p>$took.</p>
<p class="note">Seeds 0 to $last_seed · $versions</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """Writes average.html to the folder `out`; returns the page's path."""
    plan = result.plan
    tested = {task: round(sum(row[0] for row in result.scores[task.name][BASE][0].bins)) for task in TASKS}
    fields = {
        "title": TITLE,
        "tiles": _tiles(result),
        "labelled": NOISY.images,
        "wrong": round(NOISY.images * NOISY.wrong),
        "tested": f"{tested[NOISY]:,}",
        "clean_labelled": f"{CLEAN.images:,}",
        "clean_tested": tested[CLEAN],
        "one_image": f"{100 / tested[CLEAN]:.1f}",
        "images": f"{CLEAN.images + tested[CLEAN]:,}",
        "dense_weights": f"{result.parameters['dense']:,}",
        "convolutional_weights": f"{result.parameters['convolutional']:,}",
        "rates_chart": _rates_chart(result),
        "averaged": len(result.taken["swa"]),
        "reliability_chart": _reliability_chart(result),
        "calibration_text": _calibration_text(result),
        "plane_loss": _plane_chart(result, 0, "loss on the training labels"),
        "plane_error": _plane_chart(result, 1, "test error %"),
        "plane_text": _plane_text(result),
        "curve_loss": _curve_chart(result, 0, "loss on the training labels"),
        "curve_error": _curve_chart(result, 1, "test error %"),
        "curve_text": _curve_text(result),
        "claims": _claims(result),
        "limits": _limits(result),
        "best_every": 2 * plan.every,
        "convolutional_last": _mean(result, CONVOLUTIONAL.name, BASE, ACCURACY),
        "dense_last": _mean(result, NOISY.name, BASE, ACCURACY),
        "dense_swa": _mean(result, NOISY.name, "swa", ACCURACY),
        "momentum": MOMENTUM,
        **common_fields(result),
    }
    for name, task in (("noisy", NOISY), ("convolutional", CONVOLUTIONAL), ("clean", CLEAN)):
        charts = (_difference_chart(result, task.name, metric) for metric in (ACCURACY, NLL))
        fields[f"{name}_charts"] = f'<div class="two">{"".join(f"<div>{one}</div>" for one in charts)}</div>'
        fields[f"{name}_table"] = _table(result, task.name)
        fields[f"{name}_text"] = _text(result, task.name)
    return write_page(out, "average", PAGE, fields, plan)


# Numbers


def common_fields(result: Any) -> dict[str, Any]:
    """What every page of repeated trainings says of how they were made and judged."""
    return {
        "bins": BINS,
        "bin_least": LEAST,
        "confidence": f"{100 * CONFIDENCE:g}",
        "verdicts": f"stand where the {100 * CONFIDENCE:g} % interval of the mean difference over the seeds (Student's "
        f"t, {result.plan.seeds} seeds) leaves out zero, with no correction for the number of comparisons.",
        "few_seeds": " With so few seeds most differences cannot be told from chance." if result.plan.seeds < 4 else "",
        "last_seed": result.plan.seeds - 1,
        "took": f"All computations took {duration(result.seconds)}, {result.reused} of {result.parts} parts of them in "
        "an earlier call",
        "seconds": duration(result.seconds),
        "reused": result.reused,
        "parts": result.parts,
        "machine": html.escape(f"{platform.machine()}, {os.cpu_count()} cores"),
        "versions": html.escape(f"fastnuggets {__version__}, torch {torch.__version__}"),
    }


def _names(result: Result) -> dict[str, str]:
    plan = result.plan
    single = ("last iterate", "an ideal early stop", "EMA", "high run as it ends", "EMA of the high run", "SWA")
    several = (f"SWAG ({plan.draws} draws)", f"snapshots ({plan.cycles})", f"FGE ({plan.cycles})")
    return dict(zip(METHODS, single + several, strict=True))


def _values(result: Result, task: str, method: str, metric: Metric) -> np.ndarray:
    return np.array([metric.value(score) for score in result.scores[task][method]])


def compare(result: Result, task: str, method: str, metric: Metric, base: str = BASE) -> Paired:
    """A method against another, seed by seed."""
    return paired(_values(result, task, method, metric) - _values(result, task, base, metric), metric.sign)


def paired(each: np.ndarray, sign: int) -> Paired:
    """Differences [seeds]; `sign` is 1 if more is better."""
    n, mean = len(each), each.mean()
    half = need("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, n - 1) * each.std(ddof=1) / n**0.5
    return Paired(each, float(mean), sign * int(np.sign(mean)) if abs(mean) > half else 0)


def _mean(result: Result, task: str, method: str, metric: Metric) -> str:
    return f"{_values(result, task, method, metric).mean():.{metric.digits}f}"


def spread(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def difference(paired: Paired, digits: int) -> str:
    low, high = paired.each.min(), paired.each.max()
    return f"{paired.mean:+.{digits}f}; {low:+.{digits}f} to {high:+.{digits}f}"


def _said(result: Result, task: str, method: str, metric: Metric, base: str) -> str:
    """In words how a method does against another."""
    paired = compare(result, task, method, metric, base)
    words = {1: "better than that of", -1: "worse than that of", 0: "not told apart from that of"}
    name = "the last iterate" if base == BASE else _names(result)[base]
    return f"{words[paired.verdict]} {name} ({difference(paired, metric.digits)})"


# Text


def _tiles(result: Result) -> str:
    def change(task: str, metric: Metric) -> str:
        return " → ".join(_mean(result, task, method, metric) for method in (BASE, "swa"))

    alone = _values(result, CLEAN.name, BASE, ACCURACY).std(ddof=1)
    gain = compare(result, CLEAN.name, "swa", ACCURACY).mean
    calls = ", ".join(f"{name} {result.scores[NOISY.name][key][0].passes}" for key, name in SHORT.items())
    overhead = sum(score.training for score in result.scores[NOISY.name]["swa"])
    overhead = 100 * (overhead / sum(score.training for score in result.scores[NOISY.name]["high"]) - 1)
    best, updates = _mean(result, NOISY.name, "best", ACCURACY), len(result.taken["swa"])
    tiles = (
        (
            change(NOISY.name, ACCURACY) + " %",
            f"accuracy, last iterate → SWA: few and noisy labels, dense network. An ideal early stop: {best} %",
        ),
        (change(CONVOLUTIONAL.name, ACCURACY) + " %", "the same labels, convolutional network"),
        (f"{gain:+.1f}", f"points of accuracy by SWA on clean labels; seeds alone spread by {alone:.1f}"),
        (
            f"{overhead:.1f} %",
            f"more training time by {updates} updates of SWA; passes for a prediction: {calls}",
        ),
    )
    return tiled(tiles)


def _text(result: Result, task: str) -> str:
    """What the seeds tell about one task."""
    sentences = []
    for metric in (ACCURACY, NLL, ECE):
        found = {method: compare(result, task, method, metric).verdict for method in METHODS if method not in NO_METHOD}
        parts = [f"<b>{metric.better} than the last iterate:</b> {_listed(result, found, 1)}."]
        parts += [f"Worse: {_listed(result, found, -1)}."] if -1 in found.values() else []
        parts += [f"Not told apart: {_listed(result, found, 0)}."] if 0 in found.values() else []
        sentences.append(" ".join(parts))
    sentences.append(
        "<b>Stopping early instead?</b> At its best moment, which only the test images tell, the conventional run was "
        f"right for {_mean(result, task, 'best', ACCURACY)} %: SWA's accuracy is "
        f"{_said(result, task, 'swa', ACCURACY, 'best')}."
    )
    if task == CLEAN.name:
        better = any(
            compare(result, task, method, ACCURACY).verdict > 0 for method in METHODS if method not in NO_METHOD
        )
        sentences.insert(
            0,
            "<b>No average and no ensemble is more accurate than the last iterate here:</b> a network that is right "
            "almost everywhere leaves nothing to average away."
            if not better
            else "Not quite nothing, in this run: some average or ensemble is more accurate than the last iterate.",
        )
    return "</p><p>".join(sentences)


def _listed(result: Result, found: dict[str, int], verdict: int) -> str:
    return ", ".join(name for key, name in _names(result).items() if found.get(key) == verdict) or "none"


def _confidence_gap(scores: Iterable[Score]) -> float:
    """Mean confidence less accuracy, in points, all seeds together."""
    count, confidence, right = np.sum([score.bins for score in scores], axis=(0, 1))
    return 100 * (confidence - right) / count


def _calibration_text(result: Result) -> str:
    names, scores = _names(result), result.scores[NOISY.name]
    gaps = {method: _confidence_gap(scores[method]) for method in METHODS if method != "best"}
    said = ", ".join(f"{names[method]} {gap:+.1f}" for method, gap in gaps.items())
    modest = sum(gap < 0 for gap in gaps.values())
    cure = "no cure here" if 2 * modest > len(gaps) else "one that is of use here"
    worse = [names[m] for m in METHODS if m not in NO_METHOD and compare(result, NOISY.name, m, ECE).verdict < 0]
    text = (
        f"Mean confidence less accuracy, in points: {said}. {modest} of {len(gaps)} are too modest: all learned from "
        f"labels of which {100 * NOISY.wrong:.0f} % are wrong, and are tested on right ones. "
    )
    text += (
        "An average of predictions is never surer than its members are on average: a cure for networks that are too "
        f"sure, and {cure}. Calibrated worse than the last iterate: {', '.join(worse) or 'none'}."
    )
    return text


def _plane_text(result: Result) -> str:
    line = result.pictures["curves"]["to swa"]
    loss, error = line["loss"].T.tolist()
    return (
        f"SWA lies {line['length'][-1]:.1f} away from the last iterate, in the norm of all weights. On the straight "
        f"line between them the training loss goes from {loss[0]:.3f} to {loss[-1]:.3f}, with at most {max(loss):.3f} "
        f"on the way, and the test error from {100 * error[0]:.1f} to {100 * error[-1]:.1f} %: "
        + (
            "SWA fits the training labels, the wrong ones among them, less well, and the test images better."
            if loss[-1] > loss[0] and error[-1] < error[0]
            else "here the two do not go against each other."
        )
    )


def _curve_text(result: Result) -> str:
    curves = {key: result.pictures["curves"][key] for key in CURVES}
    said = [
        f"{CURVES[key]}: loss at most {line['loss'][:, 0].max():.3f}, test error at most "
        f"{100 * line['loss'][:, 1].max():.1f} %, length {line['length'][-1]:.1f}"
        for key, line in curves.items()
    ]
    ends = curves["straight"]["loss"][[0, -1]]
    return (
        f"The two optima have a training loss of {ends[0, 0]:.3f} and {ends[1, 0]:.3f} and a test error of "
        f"{100 * ends[0, 1]:.1f} and {100 * ends[1, 1]:.1f} %. Between them — {'; '.join(said)}."
    )


def _claims(result: Result) -> str:
    def here(metric: Metric, *methods: str) -> str:
        tasks = (("dense", NOISY), ("convolutional", CONVOLUTIONAL), ("clean", CLEAN))
        return "; ".join(
            f"{name} " + " → ".join(_mean(result, task.name, method, metric) for method in methods)
            for name, task in tasks
        )

    curves = result.pictures["curves"]
    error = {key: 100 * curves[key]["loss"][:, 1] for key in CURVES}
    ends = max(error["bezier"][0], error["bezier"][-1])
    rows = [
        (
            "SWA: Izmailov et al., UAI 2018, arXiv:1803.05407",
            "CIFAR-100, 1.5 budgets, accuracy SGD → SWA: VGG-16 72.55 → 74.27, PreResNet-164 78.49 → 80.35, "
            "WRN-28-10 80.82 → 82.15",
            "accuracy, last → SWA: " + here(ACCURACY, BASE, "swa"),
        ),
        (
            "SWAG: Maddox et al., NeurIPS 2019, arXiv:1902.02476",
            "CIFAR-100, NLL SGD → SWA → SWAG: VGG-16 1.73 → 1.28 → 0.95, PreResNet-164 0.95 → 0.74 → 0.71, "
            "WRN-28-10 0.80 → 0.67 → 0.60",
            "NLL, last → SWA → SWAG: " + here(NLL, BASE, "swa", "swag"),
        ),
        (
            "Snapshot ensembles: Huang et al., ICLR 2017, arXiv:1704.00109",
            "one training's cost, more accurate than the one model it would have given",
            "accuracy, last → snapshots: " + here(ACCURACY, BASE, "snapshot"),
        ),
        (
            "FGE: Garipov et al., NeurIPS 2018, arXiv:1802.10026",
            "CIFAR-100, 1 budget, accuracy one model → FGE: VGG-16 72.5 → 74.6, PreResNet-164 78.4 → 80.3, "
            "WRN-28-10 80.8 → 82.3",
            "accuracy, last → FGE: " + here(ACCURACY, BASE, "fge"),
        ),
        (
            "Mode connectivity: the same paper",
            "CIFAR-100, PreResNet-164: test error at most 23.4 % on a Bezier curve whose ends have 21.7 %",
            f"test error at most {error['bezier'].max():.1f} % on the Bezier curve, {ends:.1f} % at its worse end, "
            f"{error['straight'].max():.1f} % on the straight line",
        ),
    ]
    cells = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>paper</th><th>claims</th><th>measured here</th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{"".join(cells)}</tbody></table></div>'


def _limits(result: Result) -> str:
    """Where the claims do not hold on data this small, as far as this run tells."""

    def said(task: Task, method: str, metric: Metric, base: str) -> str:
        return _said(result, task.name, method, metric, base)

    plan = result.plan
    return " ".join(
        [
            "<b>Where it does not hold on data this small.</b>",
            f"On clean labels SWA's accuracy is {said(CLEAN, 'swa', ACCURACY, BASE)}.",
            f"SWAG's negative log-likelihood is {said(NOISY, 'swag', NLL, 'swa')} with the dense network and "
            f"{said(CONVOLUTIONAL, 'swag', NLL, 'swa')} with the convolutional one, for {plan.draws} times the passes.",
            "An EMA along a rate that falls to almost nothing has little to average: with the dense network its "
            f"accuracy is {said(NOISY, 'ema', ACCURACY, BASE)}; along the high rate it is "
            f"{said(NOISY, 'high ema', ACCURACY, 'swa')}.",
            f"With {plan.cycles} passes the accuracy of snapshots is {said(NOISY, 'snapshot', ACCURACY, 'swa')}, and "
            f"FGE's is {said(NOISY, 'fge', ACCURACY, 'swa')}.",
            "The papers train large networks on clean labels for hundreds of epochs; the gains here come with labels "
            "that are wrong, which an average learns less of.",
        ]
    )


# Tables and charts


def _table(result: Result, task: str) -> str:
    rows = []
    for method, name in _names(result).items():
        scores = result.scores[task][method]
        first = scores[0]
        against = [compare(result, task, method, metric) for metric in (ACCURACY, NLL)]
        times = [np.mean([getattr(score, key) for score in scores]) for key in ("training", "ready", "testing")]
        rows.append(
            [
                name,
                spread(_values(result, task, method, ACCURACY), ACCURACY.digits),
                "–" if method == BASE else difference(against[0], ACCURACY.digits),
                spread(_values(result, task, method, NLL), NLL.digits),
                "–" if method == BASE else difference(against[1], NLL.digits),
                spread(_values(result, task, method, ECE), ECE.digits),
                str(first.passes),
                f"{times[0]:.2f}",
                f"{1000 * times[1]:.1f}" if times[1] else "–",
                f"{1000 * times[2]:.1f}" if times[2] else "–",
            ]
        )
    head = ["", ACCURACY.name, "against last", NLL.name, "against last", ECE.name, "passes"]
    return table([*head, "training s", "ready ms", "testing ms"], rows)


def _difference_chart(result: Result, task: str, metric: Metric) -> str:
    figure, axis = chart(6.2, 2.9)
    names = _names(result)
    for row, method in enumerate(METHODS[1:]):
        paired = compare(result, task, method, metric)
        axis.plot(paired.each, np.full(len(paired.each), row), "o", color=COLORS[method], alpha=0.55, ms=6, mew=0)
        axis.plot([paired.mean] * 2, [row - 0.32, row + 0.32], color=COLORS[method], lw=2.6)
    axis.axvline(0, color=INK, lw=0.9, alpha=0.6)
    axis.set_yticks(range(len(METHODS) - 1), [names[method] for method in METHODS[1:]])
    axis.invert_yaxis()
    axis.set_xlabel(f"{metric.name}, against the last iterate of the same seed", color=INK)
    which = "to the right" if metric.sign > 0 else "to the left"
    return svg(figure, f"Differences in {metric.name} to the last iterate for each seed; better is {which}")


def _rates_chart(result: Result) -> str:
    figure, axis = chart(6.2, 3.6)
    for name, label in RUNS.items():
        rates = np.array(result.rates[name])
        axis.plot(np.arange(1, len(rates) + 1), rates, color=COLORS[name], lw=1.8, label=label)
        steps = np.array(result.taken.get(name, [len(rates)]))
        axis.plot(steps, rates[steps - 1], "o", color=COLORS[name], ms=4, mew=0)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("learning rate", color=INK)
    axis.set_ylim(bottom=-0.003)
    axis.legend(frameon=False, labelcolor=INK, loc="upper left")
    return svg(figure, "Learning rates of the four runs; dots where a model was taken")


def _reliability_chart(result: Result) -> str:
    figure, axis = chart(6.2, 4.2)
    axis.plot([0, 1], [0, 1], "--", color=INK, alpha=0.5, lw=1)
    names = _names(result)
    for method in (BASE, "swa", "swag", "snapshot", "fge"):
        count, confidence, right = np.sum([score.bins for score in result.scores[NOISY.name][method]], axis=0).T
        shown = count >= LEAST
        places, share = confidence[shown] / count[shown], right[shown] / count[shown]
        axis.plot(places, share, color=COLORS[method], marker="o", ms=4, lw=1.8, label=names[method])
    axis.set_xlabel("confidence", color=INK)
    axis.set_ylabel("share that is right", color=INK)
    axis.legend(frameon=False, labelcolor=INK, loc="lower right")
    return svg(figure, "Share of right predictions against their confidence")


PERCENT = torch.tensor([1.0, 100.0])


def _plane_chart(result: Result, column: int, label: str) -> str:
    found = result.pictures["plane"]
    plane = LossPlane(**{**found, "loss": found["loss"] * PERCENT})
    outline = need("matplotlib.patheffects").withStroke(linewidth=3, foreground="black")
    figure, axis = chart(6.2, 4.6)
    axis.grid(False)
    plot_plane(plane, axis, column=column)
    axis.plot(*plane.path.T, "o", color="white", ms=2.5, mew=0)
    for point, name in zip(plane.points, ("last iterate", "SWA", "first averaged"), strict=True):
        text = axis.annotate(name, point.tolist(), (0, 7), textcoords="offset points", ha="center", color="white")
        text.set_path_effects([outline])
    axis.set(xlim=plane.x[[0, -1]].tolist(), ylim=plane.y[[0, -1]].tolist())
    bar = figure.axes[-1]
    bar.set_ylabel(label, color=INK)
    bar.tick_params(colors=INK, length=0)
    return svg(figure, f"{label} in the plane through the last iterate, SWA and the first averaged model")


def _curve_chart(result: Result, column: int, label: str) -> str:
    figure, axis = chart(6.2, 3.4)
    curves = {name: CurveLoss(**result.pictures["curves"][key]) for key, name in CURVES.items()}
    curves = {name: line._replace(loss=line.loss * PERCENT) for name, line in curves.items()}
    plot_curve(curves, axis, column=column)
    for line, color in zip(axis.lines, (COLORS["last"], COLORS["snapshot"], COLORS["swa"]), strict=True):
        line.set(color=color, linewidth=2.2)
    axis.legend(frameon=False, labelcolor=INK)
    axis.set_xlabel("t", color=INK)
    axis.set_ylabel(label, color=INK)
    return svg(figure, f"{label} along the straight line, the chain and the Bezier curve between two optima")
