"""The page of the demo of masks and depth: one HTML file with its charts inside. Every number is computed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastnuggets import __version__
from fastnuggets.demo_dropout import BASE, CLEAN, FACES, METHODS, SAMPLED, SHIFTS, TASKS, Result, Task
from fastnuggets.figures import INK, bare, chart, svg, table, tiled
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import Paired, common_fields, difference, paired, spread

TITLE = "Masks and depth: what drops, what averages"
COLORS = {
    "ema": "#2ba35a",
    "swa": "#1d7f8c",
    "ensemble": "#2f6fed",
    "dropout": "#e07a3f",
    "depth": "#8a5cd6",
    "large": "#d6336c",
    "larger": "#a61e4d",
}
RIVALS = ("ema", "swa", "ensemble")  # what very large dropout is said to exceed


class Metric(NamedTuple):
    """A number of a score."""

    key: str
    name: str
    scale: float
    sign: int  # 1 if more is better
    digits: int


ACCURACY = Metric("accuracy", "accuracy %", 100, 1, 1)
NLL = Metric("nll", "neg. log-likelihood", 1, -1, 3)
ECE = Metric("ece", "calibration error %", 100, -1, 1)
METRICS = (ACCURACY, NLL, ECE)
SHIFTED = "shifted"  # the mean over all shifts

PAGE = (
    HEAD
    + """\
<p class="lead">Networks that leave out neurons or whole blocks while they learn, networks whose weights are averaged,
and several networks at once: one budget of steps, one small residual network ($parameters weights), handwritten digits
with few labels or with wrong ones; from scratch, and after the network has learned letters. Each is tested on digits as
they are and on digits that are changed as none was that it learned from.</p>

<div class="tiles">$tiles</div>

<section>
<h2>The data</h2>
$pictures
<p class="note">The first test images of the first seed, pixels of the training images' mean and deviation, and letters
of the kind that two of the four tasks learn first: $faces faces of matplotlib's, turned, sheared, scaled and moved at
random. They are learned to $letters % of right answers out of 52.</p>
</section>

$tasks

<section>
<h2>Shift by shift</h2>
$shift_table
<p class="note">Accuracy, %, mean over $seeds seeds; the best mean of each column in bold.</p>
<p>$shift_text</p>
</section>

<section>
<h2>What belongs to the drawing?</h2>
$drawing_table
<p class="note">The same weights, drawn $passes times and not drawn: the difference, seed by seed; mean, and the lowest
and highest. Negative log-likelihood and calibration error: less is better.</p>
<p>$drawing_text</p>
</section>

<section>
<h2>What the papers claim, and what was measured here</h2>
$claims
<p>$limits</p>
</section>

<section>
<h2>What was used</h2>
<p>$blocks residual blocks of two layers of width $width with layer norms; the representation is what the last linear
layer sees. AdamW, a rate of $rate and weight decay $weight_decay, batches of $batch, $steps steps: flat for half of
them, then linearly down. SWA: down to $high of the rate and then kept, from $start of the steps on one model in $every.
EMA: decay $decay along the plain run. Dropout: $drop inside each block and of the representation. Stochastic depth: the
last block is left out with probability $depth, the others less, linearly. Very large dropout: of the representation
alone, predictions in one pass without it, as its authors have it. Ensemble: $members networks of other first weights
and batches; after letters these differ in the last layer and the batches alone. "Drawn": mean of $passes passes;
"without noise": one pass. $letter_steps steps of letters. A seed decides the split, the labels that are wrong, weights
and batches; the settings were not tuned.</p>
<p>Shifts: turned by 25°; blurred with weights of 1, 2, 1; noise of deviation 5 on pixels of 0 to 16; moved by a pixel;
a square of 3 × 3 pixels hidden. "Shifted" is the mean over the five.</p>
<p>"Better" and "worse" $verdicts It says what another split of these
images would do, not other data.$few_seeds</p>
<p>$took, on $machine, one thread. Every
figure is in dropout.json, beside this page.</p>
<p class="note">Seeds 0 to $last_seed · $versions</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """Writes dropout.html and dropout.json to the folder `out`; returns the page's path."""
    plan = result.plan
    fields = common_fields(result) | {
        "title": TITLE,
        "tiles": _tiles(result),
        "pictures": _pictures(result),
        "faces": len(FACES),
        "letters": spread(100 * np.array(result.letters), 1),
        "tasks": "".join(_section(result, task) for task in TASKS),
        "shift_table": _shift_table(result),
        "shift_text": _shift_text(result),
        "drawing_table": _drawing_table(result),
        "drawing_text": _drawing_text(result),
        "claims": _claims(result),
        "limits": _limits(result),
        "parameters": f"{result.parameters:,}",
    }
    figures = {
        "versions": {"fastnuggets": __version__},
        "plan": plan._asdict(),
        "scores": result.scores,
        "letters": result.letters,
        "seconds of all": result.seconds,
    }
    return write_page(out, "dropout", PAGE, fields, plan, figures)


# Numbers


def called(task: Task) -> str:
    """Its name, as it stands in lists."""
    return task.name.replace(",", "")


def names(result: Result) -> dict[str, str]:
    plan = result.plan
    return {
        BASE: "plain",
        "ema": "EMA",
        "swa": "SWA",
        "ensemble": f"ensemble of {plan.members}",
        "dropout mean": "dropout without noise",
        "dropout": "drawn dropout",
        "depth mean": "stochastic depth without noise",
        "depth": "drawn stochastic depth",
        "large": f"dropout of {plan.large}",
        "larger": f"dropout of {plan.larger}",
    }


def values(result: Result, task: Task, method: str, metric: Metric, test: str = CLEAN) -> np.ndarray:
    """[seeds]; of SHIFTED the mean over all shifts."""
    tests = SHIFTS if test == SHIFTED else (test,)
    scores = result.scores[task.name][method]
    return metric.scale * np.array([np.mean([score[name][metric.key] for name in tests]) for score in scores])


def compare(result: Result, task: Task, method: str, metric: Metric, test: str = CLEAN, base: str = BASE) -> Paired:
    """A method against another, seed by seed."""
    return paired(values(result, task, method, metric, test) - values(result, task, base, metric, test), metric.sign)


def _said(result: Result, task: Task, method: str, metric: Metric, test: str, base: str) -> str:
    found = compare(result, task, method, metric, test, base)
    words = {1: "better than", -1: "worse than", 0: "not told apart from"}
    return f"{words[found.verdict]} {names(result)[base]} ({difference(found, metric.digits)})"


# Text


def _tiles(result: Result) -> str:
    few, noisy, few_after, _ = TASKS

    def change(task: Task, test: str, *methods: str, metric: Metric = ACCURACY) -> str:
        return " → ".join(f"{values(result, task, m, metric, test).mean():.{metric.digits}f}" for m in methods)

    best = max(METHODS, key=lambda method: values(result, noisy, method, ACCURACY).mean())
    strongest = max(METHODS, key=lambda method: values(result, few_after, method, ACCURACY, SHIFTED).mean())
    tiles = (
        (
            f"{change(noisy, CLEAN, BASE, best)} %",
            f"accuracy with wrong labels, plain → {names(result)[best]}, the best of all here",
        ),
        (
            f"{change(few_after, SHIFTED, BASE, strongest)} %",
            f"accuracy on shifted digits, few labels after letters: plain → {names(result)[strongest]}, the best",
        ),
        (
            f"{change(few_after, SHIFTED, BASE, 'large')} %",
            f"the same: plain → dropout of {result.plan.large} of the representation; from scratch "
            f"{change(few, SHIFTED, BASE, 'large')} %",
        ),
        (
            change(noisy, CLEAN, "dropout mean", "dropout", metric=NLL),
            f"negative log-likelihood of dropout with wrong labels: in one pass, in {result.plan.passes} passes",
        ),
    )
    return tiled(tiles)


def _section(result: Result, task: Task) -> str:
    told = f"{task.images} images"
    told += f", {round(task.images * task.wrong)} of them with a wrong label" if task.wrong else ", labels right"
    told += "; the network has learned letters before." if task.letters else "; from scratch."
    charts = "".join(f"<div>{_difference_chart(result, task, metric)}</div>" for metric in (ACCURACY, NLL))
    return (
        f"<section><h2>{called(task).capitalize()}</h2><p>{told}</p>{_table(result, task)}"
        f'<div class="two">{charts}</div><p>{_text(result, task)}</p></section>'
    )


def _text(result: Result, task: Task) -> str:
    """What the seeds tell about one task: on the digits as they are, and on shifted ones."""
    sentences = []
    for metric, better in (
        (ACCURACY, "More accurate"),
        (NLL, "Lower negative log-likelihood"),
        (ECE, "Calibrated better"),
    ):
        parts = []
        for test in (CLEAN, SHIFTED):
            found = {m: compare(result, task, m, metric, test).verdict for m in METHODS if m != BASE}
            lists = {v: ", ".join(names(result)[m] for m, own in found.items() if own == v) for v in (1, -1)}
            parts.append(f"{test}: {lists[1] or 'none'}" + (f"; worse: {lists[-1]}" if lists[-1] else ""))
        sentences.append(f"<b>{better} than plain</b>, {'. '.join(part[0].upper() + part[1:] for part in parts)}.")
    return "</p><p>".join(sentences)


def _shift_text(result: Result) -> str:
    """Very large dropout against averages, ensemble and ordinary dropout, on shifted digits."""
    sentences = []
    for task in TASKS:
        said = ", ".join(
            _said(result, task, "large", ACCURACY, SHIFTED, base) for base in (BASE, *RIVALS, "dropout mean")
        )
        sentences.append(f"{called(task)}: {said}")
    return (
        f"<b>Dropout of {result.plan.large} of the representation</b>, accuracy over all shifts, in points. "
        + ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
        + "."
    )


def _drawing_text(result: Result) -> str:
    sentences = []
    for metric, what in ((ACCURACY, "accuracy"), (NLL, "negative log-likelihood"), (ECE, "calibration error")):
        for method in SAMPLED:
            found = [
                compare(result, task, method, metric, test, f"{method} mean").verdict
                for task in TASKS
                for test in (CLEAN, SHIFTED)
            ]
            name = {"dropout": "dropout", "depth": "stochastic depth"}[method]
            sentences.append(
                f"{name}, {what}: drawing is better in {found.count(1)} of {len(found)}, worse in {found.count(-1)}, "
                f"not told apart in {found.count(0)}"
            )
    return "Over the tasks, clean and shifted. " + "; ".join(sentences) + "."


def _claims(result: Result) -> str:
    few, noisy, few_after, noisy_after = TASKS

    def here(metric: Metric, test: str, methods: tuple[str, ...], tasks: tuple[Task, ...] = TASKS) -> str:
        return "; ".join(
            f"{called(task)} "
            + " → ".join(f"{values(result, task, m, metric, test).mean():.{metric.digits}f}" for m in methods)
            for task in tasks
        )

    def verdicts(metric: Metric, test: str, method: str, bases: tuple[str, ...], tasks: tuple[Task, ...]) -> str:
        found = [compare(result, t, method, metric, test, base).verdict for t in tasks for base in bases]
        return f"better in {found.count(1)} of {len(found)}, worse in {found.count(-1)}"

    rows = [
        (
            "Dropout: Srivastava et al., JMLR 2014; drawn: Gal, Ghahramani, ICML 2016, arXiv:1506.02142",
            "less overfitting; drawn, the uncertainty of a network at no cost in accuracy",
            "NLL, plain → without noise → drawn: " + here(NLL, CLEAN, (BASE, "dropout mean", "dropout")),
            "drawn against plain, NLL: " + verdicts(NLL, CLEAN, "dropout", (BASE,), TASKS),
        ),
        (
            "Stochastic depth: Huang et al., ECCV 2016, arXiv:1603.09382",
            "very deep residual networks train faster and err less",
            "accuracy %, plain → without noise: " + here(ACCURACY, CLEAN, (BASE, "depth mean")),
            "against plain, accuracy: " + verdicts(ACCURACY, CLEAN, "depth mean", (BASE,), TASKS),
        ),
        (
            "Very large dropout: Zhang, Bottou, arXiv:2403.00946",
            "fine-tuning a pre-trained network with dropout of about 0.9 before its last layer exceeds ensembles and "
            "averages of weights out of distribution; from scratch such rates are next to impossible",
            f"shifted, accuracy %, plain → {' → '.join(names(result)[m] for m in (*RIVALS, 'large'))}: "
            + here(ACCURACY, SHIFTED, (BASE, *RIVALS, "large")),
            "after letters, against averages and ensemble: "
            + verdicts(ACCURACY, SHIFTED, "large", RIVALS, (few_after, noisy_after))
            + "; from scratch, against plain: "
            + verdicts(ACCURACY, CLEAN, "large", (BASE,), (few, noisy))
            + " (clean)",
        ),
        (
            "Averages of weights: Izmailov et al., UAI 2018, arXiv:1803.05407",
            "SWA generalises better at the cost of one training",
            "accuracy %, plain → SWA: " + here(ACCURACY, CLEAN, (BASE, "swa")),
            "against plain, accuracy: " + verdicts(ACCURACY, CLEAN, "swa", (BASE,), TASKS),
        ),
        (
            "Ensembles: Lakshminarayanan et al., NeurIPS 2017, arXiv:1612.01474",
            "well-calibrated uncertainty, as good as or better than approximate Bayesian networks",
            "NLL, dropout drawn → ensemble: " + here(NLL, CLEAN, ("dropout", "ensemble")),
            "against drawn dropout, NLL: " + verdicts(NLL, CLEAN, "ensemble", ("dropout",), TASKS),
        ),
    ]
    cells = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>paper</th><th>claims</th><th>measured here</th><th>beyond chance</th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{"".join(cells)}</tbody></table></div>'


def _limits(result: Result) -> str:
    """Where the claims do not hold on data this small, as far as this run tells."""
    plan = result.plan
    after = [task for task in TASKS if task.letters]
    lost = [(task, base) for task in after for base in RIVALS if _verdict(result, task, base) < 1]
    sentences = ["<b>What does not hold here.</b>"]
    if lost:
        which = "; ".join(f"{names(result)[base]}, {called(task)}" for task, base in lost)
        sentences.append(f"Dropout of {plan.large} is not better on shifted digits than: {which}.")
    else:
        sentences.append(f"Dropout of {plan.large} after letters is better on shifted digits than all of its rivals.")
    idle = [called(task) for task in TASKS if compare(result, task, "depth mean", ACCURACY).verdict < 1]
    if idle:
        sentences.append(f"Stochastic depth is not more accurate than the plain network with: {', '.join(idle)}.")
    idle = [called(task) for task in TASKS if compare(result, task, "swa", ACCURACY).verdict < 1]
    if idle:
        sentences.append(f"Nor is SWA with: {', '.join(idle)}.")
    able = [called(t) for t in TASKS if not t.letters and compare(result, t, "large", ACCURACY).verdict >= 0]
    if able:
        sentences.append(
            f"That so large a dropout cannot be trained from scratch does not show with {plan.blocks} blocks: "
            f"no less accurate than plain with {', '.join(able)}."
        )
    sentences.append(
        "Letters drawn by a font are a poor stand-in for what large networks are pre-trained on, and images of 64 "
        f"pixels leave a representation of {plan.width} numbers little to be redundant in."
    )
    return " ".join(sentences)


def _verdict(result: Result, task: Task, base: str) -> int:
    return compare(result, task, "large", ACCURACY, SHIFTED, base).verdict


# Tables and charts


def _table(result: Result, task: Task) -> str:
    rows = []
    for method in METHODS:
        scores = result.scores[task.name][method]
        row = [names(result)[method]]
        for test in (CLEAN, SHIFTED):
            for metric in METRICS:
                row.append(spread(values(result, task, method, metric, test), metric.digits))
            found = compare(result, task, method, ACCURACY, test)
            row.append("–" if method == BASE else difference(found, ACCURACY.digits))
        row += [str(scores[0]["passes"]), f"{np.mean([score['training'] for score in scores]):.1f}"]
        rows.append(row)
    head = [""]
    for test in (CLEAN, SHIFTED):
        head += [f"{test}: accuracy %", "NLL", "ECE %", "accuracy against plain"]
    return table([*head, "passes", "training s"], rows)


def _shift_table(result: Result) -> str:
    rows = []
    for task in (task for task in TASKS if task.letters):
        found = {m: [values(result, task, m, ACCURACY, test).mean() for test in (CLEAN, *SHIFTS)] for m in METHODS}
        best = [max(column) for column in zip(*found.values(), strict=True)]
        rows.append([f"<i>{called(task)}</i>", *[""] * len(best)])
        for method, own in found.items():
            cells = [f"<b>{v:.1f}</b>" if v == most else f"{v:.1f}" for v, most in zip(own, best, strict=True)]
            rows.append([names(result)[method], *cells])
    return table(["", CLEAN, *SHIFTS], rows)


def _drawing_table(result: Result) -> str:
    rows = []
    for task in TASKS:
        for method, name in (("dropout", "dropout"), ("depth", "stochastic depth")):
            row = [f"{called(task)}: {name}"]
            for test in (CLEAN, SHIFTED):
                for metric in METRICS:
                    row.append(difference(compare(result, task, method, metric, test, f"{method} mean"), metric.digits))
            rows.append(row)
    head = [f"{test}: {short}" for test in (CLEAN, SHIFTED) for short in ("accuracy", "NLL", "ECE")]
    return table(["", *head], rows)


def _color(method: str) -> str:
    return COLORS[method.split()[0]]


def _difference_chart(result: Result, task: Task, metric: Metric) -> str:
    """Each method against plain, clean above and shifted below."""
    methods = METHODS[1:]
    figure, axis = chart(6.2, 4.4)
    for row, method in enumerate(methods):
        for side, test, mark in ((-0.19, CLEAN, "o"), (0.19, SHIFTED, "s")):
            found = compare(result, task, method, metric, test)
            color, place = _color(method), row + side
            axis.plot(found.each, np.full(len(found.each), place), mark, color=color, alpha=0.4, ms=4.5, mew=0)
            axis.plot([found.mean] * 2, [place - 0.17, place + 0.17], color=color, lw=2.4)
    axis.axvline(0, color=INK, lw=0.9, alpha=0.6)
    axis.set_yticks(range(len(methods)), [names(result)[method] for method in methods])
    axis.invert_yaxis()
    axis.set_xlabel(f"{metric.name} against plain; dots clean, squares shifted", color=INK)
    return svg(figure, f"{called(task)}: differences in {metric.name} to the plain network, clean and shifted")


def _pictures(result: Result) -> str:
    rows = list(result.pictures.items())
    figure, _ = chart(11, 9.4)
    figure.clear()
    axes = figure.subplots(len(rows), 8)
    for row, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            bare(axis)
            axis.imshow(-image.view(8, 8).numpy(), cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        row[0].set_ylabel(name, color=INK)
    return svg(figure, "Test images as they are and as each shift has them, and letters")
