"""The page of the demo of sampling: one HTML file with its charts inside. Every measured number in it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastnuggets import __version__
from fastnuggets.demo_sample import (
    ANGLES,
    BASE,
    CLASSES,
    COLUMNS,
    FEW,
    LAYOUTS,
    MEANS,
    MORE,
    PASSES,
    ROWS,
    SAMPLED,
    STRANGE,
    TASKS,
    TOY_PASSES,
    Result,
    Task,
)
from fastnuggets.figures import INK, bare, pyplot, svg, table, tiled
from fastnuggets.figures import chart as figure_of_one
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import LEAST, Paired, common_fields, difference, paired, spread

TITLE = "Noise that is of use: what sampling gives, and where it gives nothing"
COLORS = {
    "plain": "#8b8d98",
    "decay": "#1d7f8c",
    "ensemble": "#2ba35a",
    "dropout": "#e07a3f",
    "concrete": "#d6336c",
    "bayes": "#2f6fed",
    "variance": "#8a5cd6",
}
CORNER_COLORS = ("#2f6fed", "#e07a3f", "#2ba35a", "#d6336c")
SHOWN = ("plain", "decay", "dropout mean", "dropout", "concrete", "bayes")  # in the charts that would be too full
SMALLEST = 1e-3  # of the activations' sizes that are shown


class Metric(NamedTuple):
    """A number of a score."""

    name: str
    value: Callable[[dict[str, Any]], float]
    sign: int  # 1 if more is better
    digits: int


ACCURACY = Metric("accuracy %", lambda score: 100 * score["accuracy"], 1, 1)
NLL = Metric("neg. log-likelihood", lambda score: score["nll"], -1, 3)
ECE = Metric("calibration error %", lambda score: 100 * score["ece"], -1, 1)
FOUND = Metric("held-out digits found %", lambda score: 100 * score["entropy"]["held out"], 1, 1)
SHUFFLED = Metric("shuffled images found %", lambda score: 100 * score["entropy"]["shuffled"], 1, 1)

PAGE = (
    HEAD
    + """\
<p class="lead">A network that draws random numbers gives another answer at each pass. Below, a layer that has nothing
but noise tells four classes apart. Then small networks learn $classes of the ten digits from $few_images images and say
how sure they are: of digits that they know, and of two that they have never seen, two others with each of $seeds seeds.
Last, the noise itself.</p>

<div class="tiles">$tiles</div>

<section>
<h2>A layer that is nothing but noise</h2>
<p>Points about the four corners of a square. The network has one narrow place: two neurons whose weights are normal
with a mean of zero, and only their deviations are learned. What reaches the rest of the network is noise, and how
wide it is is the message.</p>
$toy_scatter
<p class="note">What $toy_shown points of each class become in the two neurons; one picture a seed, one colour a class,
the axes logarithmic away from zero. $toy_kinds</p>
<div class="two"><div>$toy_widths</div><div>$toy_passes_chart</div></div>
<p class="note">Left: the size of the first seed's noise, by class. Right: accuracy by the number of passes that are
averaged, mean and range of $toy_seeds seeds; dashed, the same weights replaced by their mean.</p>
$toy_table
<p>$toy_text</p>
</section>

<section>
<h2>Few images</h2>
<p>A network of three linear layers ($parameters weights) learns $classes digits from $few_images images, in $steps
steps, and is tested on the other $few_tested. With one seed all methods see the same images.</p>
$few_table
<div class="two"><div>$few_nll</div><div>$few_ece</div></div>
<p>$few_text</p>
<p class="note">Mean ± standard deviation over the seeds; "against plain" is the difference to the plain network of the
same seed: mean, and the lowest and highest. Found: how often a held-out digit has a higher entropy than a test image;
50 % is a guess. Passes: for one prediction. Without noise: the same weights in one pass, by the mean of what would be
drawn. Times are of $machine, one thread.</p>
</section>

<section>
<h2>More images</h2>
<p>The same with $more_images images, and the other $more_tested to test on. What is left for sampling to mend?</p>
$more_table
<div class="two"><div>$more_nll</div><div>$more_ece</div></div>
<p>$more_text</p>
</section>

<section>
<h2>How sure, and how often right</h2>
<div class="two"><div>$reliability</div><div>$passes_chart</div></div>
<p class="note">From $few_images images, all seeds together. Left: of predictions made with a confidence of 80 %, 80 %
should be right, the dashed line; below it a method is too sure. $bins bins, of which those with at least $bin_least
predictions are shown. Right: the negative log-likelihood of the mean of so many passes; the short lines at the left
are the same weights without noise.</p>
<p>$calibration_text</p>
</section>

<section>
<h2>What was never seen</h2>
<p>The two held-out digits ($held_out with the first seed) look like digits, but no answer is right. The first $shown
held-out images, none of them chosen, and the first $shown test images:</p>
$examples
<p class="note">Bars: probabilities of the $classes digits that were learned, of the plain network and of the mean of
$passes passes with dropout; the thin line is the passes' standard deviation. First seed, $few_images images.</p>
$entropies
<p class="note">Entropy of the prediction, in nats, of test images and of held-out digits, all seeds together; dotted,
the most there can be, ln $classes. Bars that are too high are cut.</p>
$strange_table
<p>$strange_text</p>
<p class="note">How often an image of nothing that was learned scores higher than a test image, %. Entropy is that of
the passes' mean; disagreement is what of it comes from passes that contradict each other, their mutual information.
Shuffled: test images with their pixels in another order. White noise: of the pixels' mean and deviation.</p>
<div class="two"><div>$turned_nll</div><div>$turned_gap</div></div>
<p>$turned_text</p>
</section>

<section>
<h2>One noise everywhere</h2>
<p>The same $noise_count normals of one seed, asked for in seven ways. Red: a number that is not that of the first
picture, rounded to its type.</p>
$noise_picture
<p>$noise_text</p>
$speed_table
<p class="note">Milliseconds, median of $calls calls in turns, on $machine, in this run: what else the machine did then
is in them. ×: torch's time over ours. Of 2²⁰ numbers each.</p>
</section>

<section>
<h2>What the papers claim, and what was measured here</h2>
$claims
<p>$limits</p>
</section>

<section>
<h2>What was used</h2>
<p>The toy: $toy_points points to learn from and as many to test on, of deviation 0.25 about corners 2 apart; Adam,
a rate falling from $toy_rate to 0, $toy_steps steps of $toy_batch. To the loss is added $toy_penalty times the mean
squared logarithm of the neurons' variances: without it they drift apart as long as one trains.</p>
<p>The digits: $all_images images of 8 × 8 pixels in scikit-learn. A seed decides which two digits are held out, the
split, the first weights and the batches. AdamW, a rate falling from $rate to 0, $steps steps of $batch. Plain: no
regularisation. Weight decay: $decay, decoupled. Ensemble: the plain network and $others more. Dropout: $drop, after
both hidden layers. Concrete dropout: before the last two layers, its probability learned. Gaussian weights: mean and
deviation of each learned, local reparametrization, a prior of deviation $prior_std, the whole divergence over the
number of images. Variance layer: the middle one, with a batch norm. $passes passes.</p>
<p>The settings were chosen on other seeds, of a few tried for each method. "Better" and "worse"
$verdicts It says what another split of these images would do, not other data.$few_seeds</p>
<p>$took. Every figure is in
sample.json, beside this page.</p>
<p class="note">Seeds 0 to $last_seed, of the toy 0 to $last_toy · $versions</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """Writes sample.html and sample.json to the folder `out`; returns the page's path."""
    plan = result.plan
    tested = {task: round(sum(row[0] for row in result.scores[task.name][BASE][0]["bins"])) for task in TASKS}
    held_out = len(result.scores[FEW.name][BASE][0]["strange"]["held out"])
    fields: dict[str, Any] = {
        "title": TITLE,
        "tiles": _tiles(result),
        "classes": CLASSES,
        "toy_scatter": _toy_scatter(result),
        "toy_shown": SCATTERED,
        "toy_kinds": _toy_kinds(result),
        "toy_widths": _toy_widths(result),
        "toy_passes_chart": _toy_passes(result),
        "toy_table": _toy_table(result),
        "toy_text": _toy_text(result),
        "parameters": f"{result.parameters:,}",
        "reliability": _reliability_chart(result),
        "passes_chart": _passes_chart(result),
        "calibration_text": _calibration_text(result),
        "held_out": " and ".join(map(str, result.examples["held out"])),
        "examples": _examples(result),
        "entropies": _entropies(result),
        "strange_table": _strange_table(result),
        "strange_text": _strange_text(result),
        "turned_nll": _turned_chart(result, 1, "neg. log-likelihood"),
        "turned_gap": _turned_chart(result, 2, "confidence less accuracy, points"),
        "turned_text": _turned_text(result),
        "noise_count": f"{ROWS * COLUMNS:,}",
        "noise_picture": _noise_picture(result),
        "noise_text": _noise_text(result),
        "speed_table": _speed_table(result),
        "claims": _claims(result),
        "limits": _limits(result),
        "others": plan.members - 1,
        "all_images": f"{FEW.images + tested[FEW] + held_out:,}",
        "last_toy": plan.toy_seeds - 1,
        **common_fields(result),
    }
    for name, task in (("few", FEW), ("more", MORE)):
        fields |= {
            f"{name}_images": task.images,
            f"{name}_tested": f"{tested[task]:,}",
            f"{name}_table": _table(result, task),
            f"{name}_nll": _difference_chart(result, task, NLL),
            f"{name}_ece": _difference_chart(result, task, ECE),
            f"{name}_text": _text(result, task),
        }
    return write_page(out, "sample", PAGE, fields, plan, _figures(result))


def _figures(result: Result) -> dict[str, Any]:
    """All numbers of the page, without the tensors behind its charts."""
    kept = ("accuracy", "nll", "ece", "bins", "passes", "entropy", "disagreement", "turned", "by passes")
    timed = ("training", "testing")
    return {
        "versions": {"fastnuggets": __version__, "torch": str(torch.__version__)},
        "plan": result.plan._asdict(),
        "toy": [{key: toy[key] for key in ("accuracy", "means", "deviations")} for toy in result.toys],
        "toy passes": TOY_PASSES,
        "digits": {
            task: {
                method: [{key: score[key] for key in kept + timed} for score in scores]
                for method, scores in found.items()
            }
            for task, found in result.scores.items()
        },
        "passes": PASSES,
        "angles": ANGLES,
        "numbers that differ": _differing(result),
        "seconds, ours and torch": result.speed["times"],
        "seconds of all": result.seconds,
    }


# Numbers


def _names(result: Result) -> dict[str, str]:
    plan = result.plan
    names = {
        "plain": "plain",
        "decay": "weight decay",
        "ensemble": f"ensemble of {plan.members}",
        "dropout": "sampled dropout",
        "concrete": "concrete dropout",
        "bayes": "Gaussian weights",
        "variance": "variance layer",
    }
    return names | {f"{method} mean": f"{names[method].removeprefix('sampled ')} without noise" for method in MEANS}


def _ordered(task: Task) -> list[str]:
    """Methods of a task, each followed by itself without noise."""
    return [name for method in task.methods for name in (method, f"{method} mean") if name == method or method in MEANS]


def _values(result: Result, task: Task, method: str, metric: Metric) -> np.ndarray:
    return np.array([metric.value(score) for score in result.scores[task.name][method]])


def compare(result: Result, task: Task, method: str, metric: Metric, base: str = BASE) -> Paired:
    """A method against another, seed by seed."""
    return paired(_values(result, task, method, metric) - _values(result, task, base, metric), metric.sign)


def _mean(result: Result, task: Task, method: str, metric: Metric) -> str:
    return f"{_values(result, task, method, metric).mean():.{metric.digits}f}"


def _said(result: Result, task: Task, method: str, metric: Metric, base: str = BASE) -> str:
    """In words how a method does against another."""
    found = compare(result, task, method, metric, base)
    words = {1: "better than", -1: "worse than", 0: "not told apart from"}
    return f"{words[found.verdict]} {_names(result)[base]} ({difference(found, metric.digits)})"


def _toy_accuracies(result: Result) -> np.ndarray:
    """[seeds, 3] in %: one pass, all passes, mean weights."""
    return np.array([[100 * t["accuracy"][0], 100 * t["accuracy"][-1], 100 * t["means"]] for t in result.toys])


def _differing(result: Result) -> dict[str, dict[str, int]]:
    return {
        who: {name: int(where.sum()) for name, where in found.items()} for who, found in result.noise["differ"].items()
    }


# Text


def _tiles(result: Result) -> str:
    one, many, means = _toy_accuracies(result).mean(0)
    plan, most = result.plan, max(result.speed["times"], key=int)
    ours, theirs = result.speed["times"]["1"]["1 M normals"]
    ours_most, theirs_most = result.speed["times"][most]["1 M normals"]
    tiles = (
        (
            f"{one:.1f} → {many:.1f} → {means:.1f} %",
            f"accuracy of the layer of noise: one pass, {TOY_PASSES[-1]} passes, its weights' mean. A guess is 25 %",
        ),
        (
            " → ".join(_mean(result, FEW, method, NLL) for method in (BASE, "dropout")),
            f"negative log-likelihood from {FEW.images} images: plain, then dropout in {plan.passes} passes; in one "
            f"pass without noise {_mean(result, FEW, 'dropout mean', NLL)}, with weight decay instead "
            f"{_mean(result, FEW, 'decay', NLL)}",
        ),
        (
            " → ".join(_mean(result, MORE, method, NLL) for method in ("decay", "dropout")),
            f"the same from {MORE.images} images: weight decay in one pass, then dropout in {plan.passes}",
        ),
        (
            f"{theirs / ours:.1f}× · {theirs_most / ours_most:.1f}×",
            f"torch's time for a million normals over ours, with 1 and {most} threads; ours are the same bits",
        ),
    )
    return tiled(tiles)


def _toy_kinds(result: Result) -> str:
    """Which of the two representations of the paper the seeds found."""
    same = []
    for seed, toy in enumerate(result.toys):
        first, second = np.log(np.array(toy["deviations"])).T
        if np.corrcoef(first, second)[0, 1] > 0.9:
            same.append(str(seed))
    text = "The paper shows two kinds of solution: neurons that repeat each other, each with a width a class, and "
    text += "neurons that both are needed. "
    if not same:
        return text + "All seeds found the second."
    which = f"Seed{'s' if len(same) > 1 else ''} {' and '.join(same)}"
    rest = ", the others the second." if len(same) < len(result.toys) else "."
    return f"{text}{which} found the first{rest}"


def _toy_text(result: Result) -> str:
    one, many, means = _toy_accuracies(result).T
    return (
        f"One pass is right for {spread(one, 1)} % of the test points, the mean softmax of {TOY_PASSES[-1]} passes for "
        f"{spread(many, 1)} %, and the weights' mean, which serves most networks well, for {spread(means, 1)} %: "
        "nothing is left of what was learned."
    )


def _text(result: Result, task: Task) -> str:
    """What the seeds tell about one task."""
    names = _names(result)
    sentences = []
    metrics = {"More accurate": ACCURACY, "Lower negative log-likelihood": NLL, "Better calibrated": ECE}
    for better, metric in metrics.items():
        found = {m: compare(result, task, m, metric).verdict for m in _ordered(task) if m != BASE}
        lists = {v: ", ".join(names[m] for m, own in found.items() if own == v) or "none" for v in (1, -1, 0)}
        text = f"<b>{better} than the plain network:</b> {lists[1]}."
        text += f" Worse: {lists[-1]}." if -1 in found.values() else ""
        text += f" Not told apart: {lists[0]}." if 0 in found.values() else ""
        sentences.append(text)
    if task == FEW:
        sentences.append(
            "<b>What of it is the sampling's?</b> The same weights, drawn and not drawn. In negative log-likelihood: "
            + "; ".join(
                f"{names[method]} {_said(result, task, method, NLL, f'{method} mean')}"
                for method in MEANS
                if method != "variance"
            )
            + "."
        )
    sentences.append(
        "<b>Against weight decay,</b> which costs nothing, in negative log-likelihood: "
        + "; ".join(
            f"{names[method]} {_said(result, task, method, NLL, 'decay')}"
            for method in task.methods
            if method in ("dropout", "concrete", "bayes", "ensemble")
        )
        + "."
    )
    return "</p><p>".join(sentences)


def _gap(scores: Iterable[dict[str, Any]]) -> float:
    """Mean confidence less accuracy, in points, all seeds together."""
    count, confidence, right = np.sum([score["bins"] for score in scores], axis=(0, 1))
    return float(100 * (confidence - right) / count)


def _calibration_text(result: Result) -> str:
    names, scores = _names(result), result.scores[FEW.name]
    gaps = {method: _gap(scores[method]) for method in _ordered(FEW) if method != "variance mean"}
    said = ", ".join(f"{names[method]} {gap:+.1f}" for method, gap in gaps.items())
    first, last = (np.mean([score["by passes"][i] for score in scores["dropout"]]) for i in (0, -1))
    return (
        f"Mean confidence less accuracy, in points: {said}. A single draw with dropout has a negative log-likelihood "
        f"of {first:.3f}, the mean of {result.plan.passes} has {last:.3f}; no mean has more than its parts on average."
    )


def _strange_text(result: Result) -> str:
    return (
        f"Held-out digits, by entropy: sampled dropout {_said(result, FEW, 'dropout', FOUND)} and "
        f"{_said(result, FEW, 'dropout', FOUND, 'decay')}; Gaussian weights {_said(result, FEW, 'bayes', FOUND)}. "
        f"Shuffled images, which are far from any digit: sampled dropout {_said(result, FEW, 'dropout', SHUFFLED)}, "
        f"Gaussian weights {_said(result, FEW, 'bayes', SHUFFLED)}. Differences are in points."
    )


def _turned_text(result: Result) -> str:
    names, scores = _names(result), result.scores[FEW.name]
    worst = ", ".join(
        f"{names[method]} {100 * np.mean([s['turned'][-1][2] - s['turned'][-1][0] for s in scores[method]]):.0f}"
        for method in SHOWN
    )
    right = 100 * np.mean([score["turned"][-1][0] for score in scores[BASE]])
    return (
        f"Test images that are turned: a shift that a method should notice. At {ANGLES[-1]}° the plain network is "
        f"right for {right:.0f} %, and mean confidence less accuracy is, in points: {worst}."
    )


def _noise_text(result: Result) -> str:
    found = _differing(result)
    ours = sum(found["ours"].values())
    theirs = ", ".join(f"{name} {count:,}" for name, count in found["torch"].items() if count)
    return (
        f"Ours: {ours:,} of {len(LAYOUTS) * ROWS * COLUMNS:,} numbers differ, as each is a function of key and place "
        "alone. So backward makes the noise again where others keep it, and a longer tensor begins as a shorter one. "
        f"torch's, of a CPU generator, differ in: {theirs or 'none'}. torch promises less: its numbers repeat on one "
        "machine, asked in one way."
    )


def _claims(result: Result) -> str:
    one, many, means = _toy_accuracies(result).mean(0)

    def here(metric: Metric, task: Task, *methods: str) -> str:
        return f"{task.images} images: " + " → ".join(_mean(result, task, method, metric) for method in methods)

    rows = [
        (
            "Variance layers: Neklyudov et al., ICLR 2019, arXiv:1803.03764",
            "layers of zero-mean weights learn surprisingly well; with the weights' mean a random guess is left; on a "
            "toy of four classes two neurons repeat each other or complete each other",
            f"toy: one pass {one:.1f} %, {TOY_PASSES[-1]} passes {many:.1f} %, mean {means:.1f} %; digits, accuracy: "
            + here(ACCURACY, FEW, BASE, "variance", "variance mean")
            + " (plain → variance layer → its mean)",
        ),
        (
            "Sampled dropout: Gal, Ghahramani, ICML 2016, arXiv:1506.02142",
            "uncertainty from networks that are already there, at no cost in accuracy; better log-likelihood and error "
            "in regression than the methods of its time",
            "NLL, without noise → sampled: "
            + "; ".join(here(NLL, task, "dropout mean", "dropout") for task in TASKS)
            + f"; shuffled images found: plain {_mean(result, FEW, BASE, SHUFFLED)} %, "
            f"dropout {_mean(result, FEW, 'dropout', SHUFFLED)} %",
        ),
        (
            "Concrete dropout: Gal, Hron, Kendall, NeurIPS 2017, arXiv:1705.07832",
            "better calibrated, without a search for the probability",
            "calibration error %, dropout → concrete: " + here(ECE, FEW, "dropout", "concrete"),
        ),
        (
            "Gaussian weights: Blundell et al., ICML 2015, arXiv:1505.05424; Kingma et al., NeurIPS 2015, "
            "arXiv:1506.02557",
            "as good as dropout on MNIST, and the uncertainty generalises better in regression; local "
            "reparametrization lowers the variance of gradients",
            "NLL, dropout → Gaussian weights: " + "; ".join(here(NLL, task, "dropout", "bayes") for task in TASKS),
        ),
        (
            "Under shift: Ovadia et al., NeurIPS 2019, arXiv:1906.02530",
            "calibration after the fact falls short under shift; some methods that average over models do surprisingly "
            "well",
            f"NLL of images turned by {ANGLES[3]}°: "
            + ", ".join(
                f"{_names(result)[m]} {np.mean([s['turned'][3][1] for s in result.scores[FEW.name][m]]):.2f}"
                for m in ("plain", "decay", "ensemble", "dropout", "concrete", "bayes")
            ),
        ),
    ]
    cells = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>paper</th><th>claims</th><th>measured here</th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{"".join(cells)}</tbody></table></div>'


def _limits(result: Result) -> str:
    """Where the claims do not hold on data this small, as far as this run tells."""
    return " ".join(
        [
            "<b>Where it does not hold on data this small.</b>",
            f"From {MORE.images} images sampled dropout's negative log-likelihood is "
            f"{_said(result, MORE, 'dropout', NLL, 'decay')}, and its calibration error "
            f"{_said(result, MORE, 'dropout', ECE, 'decay')}, for {result.plan.passes} times the passes.",
            "The mean of Gaussian weights, in place of draws, has a negative log-likelihood "
            f"{_said(result, FEW, 'bayes mean', NLL, 'bayes')}: where the two are alike it is the training that helps, "
            "not the sampling.",
            f"The variance layer's accuracy is {_said(result, FEW, 'variance', ACCURACY)}, and its negative "
            f"log-likelihood {_said(result, FEW, 'variance', NLL, 'decay')}.",
            f"An ensemble's negative log-likelihood is {_said(result, FEW, 'ensemble', NLL, 'decay')}, which one "
            "network can have.",
            "The papers train larger networks on far more images; for digits none of these would be used.",
        ]
    )


# Tables


def _toy_table(result: Result) -> str:
    rows = []
    for seed, (toy, (one, many, means)) in enumerate(zip(result.toys, _toy_accuracies(result), strict=True)):
        widths = (" / ".join(f"{value:.2g}" for value in pair) for pair in toy["deviations"])
        rows.append([f"seed {seed}", f"{one:.1f}", f"{many:.1f}", f"{means:.1f}", *widths])
    columns = ["one pass %", f"{TOY_PASSES[-1]} passes %", "mean weights %"]
    return table(["", *columns, *(f"widths, class {i}" for i in range(1, 5))], rows)


def _table(result: Result, task: Task) -> str:
    rows = []
    for method in _ordered(task):
        scores = result.scores[task.name][method]
        against = [compare(result, task, method, metric) for metric in (NLL, ECE)]
        training, testing = (np.mean([score[key] for score in scores]) for key in ("training", "testing"))
        rows.append(
            [
                _names(result)[method],
                spread(_values(result, task, method, ACCURACY), ACCURACY.digits),
                spread(_values(result, task, method, NLL), NLL.digits),
                "–" if method == BASE else difference(against[0], NLL.digits),
                spread(_values(result, task, method, ECE), ECE.digits),
                "–" if method == BASE else difference(against[1], ECE.digits),
                spread(_values(result, task, method, FOUND), FOUND.digits),
                str(scores[0]["passes"]),
                f"{training:.2f}",
                f"{1000 * testing:.1f}",
            ]
        )
    head = ["", ACCURACY.name, NLL.name, "against plain", ECE.name, "against plain", "found %"]
    return table([*head, "passes", "training s", "testing ms"], rows)


def _strange_table(result: Result) -> str:
    rows = []
    for method in _ordered(FEW):
        scores = result.scores[FEW.name][method]
        row = [_names(result)[method]]
        for kind in ("entropy", "disagreement"):
            for name in STRANGE:
                found = np.array([100 * score[kind][name] for score in scores if score[kind]])
                row.append(spread(found, 1) if len(found) else "–")
        rows.append(row)
    return table(["", *(f"{name}: {kind}" for kind in ("entropy", "disagreement") for name in STRANGE)], rows)


def _speed_table(result: Result) -> str:
    times = result.speed["times"]
    threads = sorted(times, key=int)
    rows = []
    for name in times[threads[0]]:
        row = [name]
        for count in threads:
            ours, theirs = times[count][name]
            row += [f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"<b>{theirs / ours:.1f}×</b>"]
        rows.append(row)
    head = [f"{what}, {count} thread{'s' * (count != '1')}" for count in threads for what in ("ours", "torch", "×")]
    return table(["", *head], rows)


# Charts


def chart(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure in the page's style, and its axes [rows * columns]."""
    figure, first = figure_of_one(width, height)
    if rows * columns == 1:
        return figure, [first]
    figure.clear()
    axes = figure.subplots(rows, columns, **options)
    for axis in axes.flat:
        bare(axis)
        axis.tick_params(labelsize=8.5)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def _label(axis: Any, x: str = "", y: str = "", title: str = "") -> None:
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    if title:
        axis.set_title(title, color=INK, fontsize=10)


SCATTERED = 150


def _toy_scatter(result: Result) -> str:
    figure, axes = chart(11, 3.9, len(result.toys))
    for seed, (axis, toy) in enumerate(zip(axes, result.toys, strict=True)):
        for points, color in zip(toy["activations"], CORNER_COLORS, strict=True):
            x, y = points[:SCATTERED].T.numpy()
            axis.plot(x, y, "o", color=color, ms=3, mew=0, alpha=0.65, rasterized=True)
        for side in ("x", "y"):
            getattr(axis, f"set_{side}scale")("symlog", linthresh=0.01, linscale=0.6)
            getattr(axis, f"set_{side}ticks")([-10, -0.1, 0, 0.1, 10], ["−10", "−0.1", "0", "0.1", "10"])
            getattr(axis, f"set_{side}lim")(-150, 150)
        axis.minorticks_off()
        _label(axis, "first neuron", "second neuron" if seed == 0 else "", f"seed {seed}")
    return svg(figure, "What the two neurons of noise hold, by class, one picture a seed")


def _toy_widths(result: Result) -> str:
    figure, axes = chart(6.2, 3.4, 1, 2, sharex=True)
    bins = np.linspace(np.log10(SMALLEST), 2, 70)
    for neuron, axis in enumerate(axes):
        for points, color in zip(result.toys[0]["activations"], CORNER_COLORS, strict=True):
            size = points[:, neuron].abs().clamp(min=1e-30).log10().numpy()
            axis.hist(size, bins, density=True, color=color, alpha=0.45)
            axis.hist(size, bins, density=True, color=color, histtype="step", lw=1.2)
        axis.set_yticks([])
        _label(axis, "" if neuron == 0 else "size of the noise", ("first", "second")[neuron])
    axes[-1].set_xticks([-3, -2, -1, 0, 1, 2], ["0.001", "0.01", "0.1", "1", "10", "100"])
    return svg(figure, "Distribution of the size of each neuron's noise, by class, logarithmic")


def _toy_passes(result: Result) -> str:
    figure, (axis,) = chart(6.2, 3.4)
    found = 100 * np.array([toy["accuracy"] for toy in result.toys])
    means = _toy_accuracies(result)[:, 2].mean()
    axis.fill_between(TOY_PASSES, found.min(0), found.max(0), color=COLORS["variance"], alpha=0.2, lw=0)
    axis.plot(TOY_PASSES, found.mean(0), "o-", color=COLORS["variance"], ms=4, lw=2)
    axis.axhline(means, ls="--", color=INK, alpha=0.6, lw=1)
    axis.annotate("mean weights", (TOY_PASSES[-1], means), (0, 5), textcoords="offset points", ha="right", color=INK)
    axis.set_xscale("log")
    axis.set_xticks(TOY_PASSES, [str(n) for n in TOY_PASSES])
    axis.minorticks_off()
    axis.set_ylim(0, 103)
    _label(axis, "passes", "accuracy %")
    return svg(figure, "Accuracy of the toy by the number of passes averaged")


def _color(method: str) -> str:
    return COLORS[method.split()[0]]


def _style(method: str) -> dict[str, Any]:
    return {"color": _color(method), "ls": ":" if method.endswith("mean") else "-", "lw": 1.8}


def _difference_chart(result: Result, task: Task, metric: Metric) -> str:
    methods = [method for method in _ordered(task) if method not in (BASE, "variance mean")]
    figure, (axis,) = chart(6.2, 0.9 + 0.3 * len(methods))
    for row, method in enumerate(methods):
        found = compare(result, task, method, metric)
        axis.plot(found.each, np.full(len(found.each), row), "o", color=_color(method), alpha=0.5, ms=6, mew=0)
        axis.plot([found.mean] * 2, [row - 0.32, row + 0.32], color=_color(method), lw=2.6)
    axis.axvline(0, color=INK, lw=0.9, alpha=0.6)
    axis.set_yticks(range(len(methods)), [_names(result)[method] for method in methods])
    axis.invert_yaxis()
    _label(axis, f"{metric.name}, against plain")
    return svg(figure, f"Differences in {metric.name} to the plain network for each seed; better is to the left")


def _reliability_chart(result: Result) -> str:
    figure, (axis,) = chart(6.2, 4.4)
    axis.plot([0, 1], [0, 1], "--", color=INK, alpha=0.5, lw=1)
    for method in SHOWN:
        count, confidence, right = np.sum([score["bins"] for score in result.scores[FEW.name][method]], axis=0).T
        kept = count >= LEAST
        axis.plot(
            confidence[kept] / count[kept],
            right[kept] / count[kept],
            marker="o",
            ms=4,
            label=_names(result)[method],
            **_style(method),
        )
    axis.set(xlim=(0.2, 1.01), ylim=(0.2, 1.01))
    _label(axis, "confidence", "share that is right")
    axis.legend(frameon=False, labelcolor=INK, loc="lower right")
    return svg(figure, "Share of right predictions against their confidence")


def _passes_chart(result: Result) -> str:
    figure, (axis,) = chart(6.2, 4.4)
    scores = result.scores[FEW.name]
    for method in SAMPLED:
        found = np.mean([score["by passes"] for score in scores[method]], axis=0)
        axis.plot(PASSES[: len(found)], found, marker="o", ms=4, label=_names(result)[method], **_style(method))
        if method != "variance":
            means = np.mean([score["nll"] for score in scores[f"{method} mean"]])
            axis.plot([0.62, 0.8], [means, means], color=_color(method), lw=2.6)
    for method in (BASE, "decay"):
        axis.axhline(np.mean([s["nll"] for s in scores[method]]), ls="--", color=_color(method), lw=1.2)
        where = (PASSES[-1], np.mean([s["nll"] for s in scores[method]]))
        name = _names(result)[method]
        aside = (0, -13 if method == BASE else 4)
        axis.annotate(name, where, aside, textcoords="offset points", ha="right", color=_color(method))
    axis.set_xscale("log")
    axis.set_xticks(PASSES, [str(n) for n in PASSES])
    axis.minorticks_off()
    _label(axis, "passes", "neg. log-likelihood")
    axis.legend(frameon=False, labelcolor=INK)
    return svg(figure, "Negative log-likelihood by the number of passes averaged")


def _examples(result: Result) -> str:
    shown, said = result.plan.shown, result.examples["said"]
    names = result.examples["names"]
    figure, axes = chart(11, 6.2, shown, 4, height_ratios=[1, 1.1, 1, 1.1])
    for i, image in enumerate(result.examples["images"]):
        top = axes[2 * shown * (i // shown) + i % shown]
        top.imshow(-image.view(8, 8).numpy(), cmap="gray")
        top.axis("off")
        bars = axes[2 * shown * (i // shown) + shown + i % shown]
        for side, method in ((-0.2, BASE), (0.2, "dropout")):
            mean, std = (said[method][key][i].numpy() for key in ("mean", "std"))
            bars.bar(np.arange(CLASSES) + side, mean, 0.4, color=COLORS[method])
            if method != BASE:
                ends = np.clip([mean - std, mean + std], 0, 1)
                bars.vlines(np.arange(CLASSES) + side, *ends, color=INK, lw=0.8, alpha=0.7)
        bars.set_xticks(range(CLASSES), [str(name) for name in names])
        bars.set(ylim=(0, 1.02), yticks=[0, 0.5, 1])
        if i % shown:
            bars.tick_params(labelleft=False)
    axes[0].set_title("held out", color=INK, fontsize=10, loc="left")
    axes[2 * shown].set_title("known", color=INK, fontsize=10, loc="left")
    legend = "".join(
        f'<span><i style="background:{COLORS[method]}"></i>{_names(result)[method]}</span>'
        for method in (BASE, "dropout")
    )
    return f'<div class="legend">{legend}</div>' + svg(figure, "Held-out and known digits, and what two methods say")


def _entropies(result: Result) -> str:
    methods = ("plain", "decay", "dropout", "bayes")
    figure, axes = chart(11, 2.7, len(methods), sharey=True)
    bins = np.linspace(0, np.log(CLASSES), 40)
    for axis, method in zip(axes, methods, strict=True):
        scores = result.scores[FEW.name][method]
        for color, values, label in (
            (INK, torch.cat([score["known"] for score in scores]), "test"),
            (_color(method), torch.cat([score["strange"]["held out"] for score in scores]), "held out"),
        ):
            axis.hist(values.numpy(), bins, density=True, color=color, alpha=0.3)
            axis.hist(values.numpy(), bins, density=True, color=color, histtype="step", lw=1.3, label=label)
        axis.axvline(np.log(CLASSES), ls=":", color=INK, lw=1)
        axis.set_ylim(0, 3)
        axis.set_yticks([])
        _label(axis, "entropy", "", _names(result)[method])
        axis.legend(frameon=False, labelcolor=INK, fontsize=9)
    return svg(figure, "Entropy of predictions for test images and for held-out digits, by method")


def _turned_chart(result: Result, column: int, label: str) -> str:
    figure, (axis,) = chart(6.2, 3.8)
    for method in (*SHOWN, "ensemble"):
        found = np.mean([score["turned"] for score in result.scores[FEW.name][method]], axis=0)
        values = found[:, 1] if column == 1 else 100 * (found[:, 2] - found[:, 0])
        axis.plot(ANGLES, values, marker="o", ms=3.5, label=_names(result)[method], **_style(method))
    if column == 2:
        axis.axhline(0, ls="--", color=INK, alpha=0.5, lw=1)
    axis.set_xticks(ANGLES, [f"{angle}°" for angle in ANGLES])
    _label(axis, "turned by", label)
    if column == 1:
        axis.legend(frameon=False, labelcolor=INK)
    return svg(figure, f"{label} of test images that are turned, by angle")


def _noise_picture(result: Result) -> str:
    colors = pyplot().get_cmap("gray")
    names = {"ours": "ours", "torch": "torch"}
    figure, axes = chart(11, 3.1, len(LAYOUTS), 2)
    for row, who in enumerate(names):
        values = result.noise["values"][who].T.numpy()
        picture = colors(np.clip((values + 3) / 6, 0, 1))[..., :3]
        for column, name in enumerate(LAYOUTS):
            axis = axes[row * len(LAYOUTS) + column]
            wrong = result.noise["differ"][who][name].T.numpy()
            axis.imshow(np.where(wrong[..., None], [0.84, 0.2, 0.25], picture), interpolation="nearest", aspect="auto")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(name, color=INK, fontsize=10)
            if column == 0:
                axis.set_ylabel(names[who], color=INK)
            axis.set_xlabel(f"{int(wrong.sum()):,} differ", color=INK, fontsize=9)
    return svg(figure, "Numbers of one seed asked for in seven ways, ours above, torch's below; red where they differ")
