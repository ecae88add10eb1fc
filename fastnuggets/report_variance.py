"""The page of the demo of variance networks: one HTML file with its charts inside. Every number is computed."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np

from fastnuggets import __version__
from fastnuggets.demo_variance import ATTACKED, BASE, DRAWN, NETWORKS, SHARED, Result
from fastnuggets.figures import INK, bare, chart, svg, table, tiled
from fastnuggets.models.lenet import LAYERS
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import Paired, common_fields, difference, paired, spread

TITLE = "Networks that expect nothing of their weights"
NAMES = {
    BASE: "plain",
    "dropout": "dropout",
    "dropout mean": "dropout without noise",
    "variational": "α of the layer",
    "neuron": "α of each neuron",
    "weight": "α of each weight",
    "every layer": "α of each layer, all four",
    "variance": "variance layer",
}
COLORS = {
    BASE: "#8b8d98",
    "dropout": "#e07a3f",
    "dropout mean": "#c98a2b",
    "variational": "#2f6fed",
    "variance": "#8a5cd6",
}
GUESS = 10  # % right, of ten classes
NEAR = 2.0  # points of accuracy: what is called the same on this page
VERDICTS = {1: "holds here", -1: "the opposite here", 0: "not told apart here"}
LARGE = 3.0  # ln alpha, the usual threshold of sparse variational dropout: a variance twenty times the mean's square

PAGE = (
    HEAD
    + """\
<p class="lead">Weights drawn from normals of mean zero, of which only the deviations are learned: Neklyudov, Molchanov,
Ashukha and Vetrov (ICLR 2019) found that networks learn with them, that variational dropout goes there by itself, and
that they withstand some attacks. Here a small LeNet learns handwritten digits; then its means are set to zero, its
deviations change places, and it is attacked.</p>

<div class="tiles">$tiles</div>

<section>
<h2>Variational dropout learns that its means are not needed</h2>
<div class="two"><div>$alpha_chart</div><div>$watch_chart</div></div>
<p class="note">The first dense layer has variational dropout with one α for all of its weights: each weight is normal
with a variance of α times its squared mean. Left: ln α over the training. Right: accuracy on the test images by one
draw of the weights and by their means. Lines are means, bands the range of $seeds seeds.</p>
<p>$alpha_text</p>
</section>

<section>
<h2>Without the means</h2>
$main_table
<p class="note">Accuracy on $tested test images, %, mean ± standard deviation over $seeds seeds. ln α: mean over the
layer. Means: one pass with every weight at its mean. Then the mean probability of so many passes; "zeroed": the same
network with the means of its noisy layers set to 0 and its deviations as they were; "elsewhere": means as they were,
deviations permuted within the layer. Objective: cross entropy of a draw plus divergence over the number of images,
nats, on the training images; less is better. A guess is right for $guess %.</p>
<p>$main_text</p>
<p>$objective_text</p>
</section>

<section>
<h2>Every layer with an α of its own</h2>
$layer_table
<p class="note">All four layers with variational dropout. "Its means zeroed": accuracy of $some passes when this layer
alone loses its means.</p>
<p>$layer_text</p>
</section>

<section>
<h2>Attacked</h2>
<div class="two"><div>$pgd_chart</div><div>$fgsm_chart</div></div>
<p class="note">Accuracy on $attacked test images, each pixel of which an attacker may change by ε, of a range from 0 to
1. He knows the network. Networks that draw predict by the mean of $passes passes, and he follows the gradient of the
mean of as many, drawn anew for each gradient. Left PGD with $pgd_steps steps from a random start, right FGSM, one step.
Mean and range over the seeds.</p>
$attack_table
<p class="note">At ε = $shown. Signs at random: no attack, the measure of what any change does. Transferred: PGD's
images for the plain network of the same seed. One draw: PGD that draws but one pass a gradient, as who overlooks the
randomness would. "Against plain": PGD, seed by seed: mean, and the lowest and highest.</p>
<p>$attack_text</p>
<div class="two"><div>$ladder_chart</div><div><p>$ladder_text</p></div></div>
<p class="note">Accuracy under PGD at ε = $shown by the number of passes behind each gradient, of predictions of $passes
passes.</p>
$pictures
<p class="note">The first test images of the first seed and what PGD makes of them at ε = $shown for three networks;
below each the prediction, its probability in %, red where it is wrong.</p>
</section>

<section>
<h2>What the paper claims, and what was measured here</h2>
$claims
<p>$limits</p>
</section>

<section>
<h2>What was used</h2>
<p>LeNet: convolutions of $channels features and 3 × 3 pixels, each pooled to half; dense layers of $dense and 10; batch
norm and ReLU after all but the last; no biases; $parameters weights when it is plain. $images of scikit-learn's digits
of 8 × 8 pixels to learn from, scaled to 0 … 1. Adam with a rate falling linearly from $rate to 0, $steps steps of
$batch; of ln α, which has far to go in so few steps, $alpha_rate, from −5. The paper trains for 200 epochs of MNIST.
Log-uniform prior, Molchanov's approximation of the divergence; of variance layers it is the limit, 0. Dropout: $drop
before the first dense layer. Noisy is the first dense layer, unless another is named; it draws each output from its
mean and variance (local reparametrization).</p>
<p>Attacks are captum's ($captum), on the log of the mean probability, its threshold for small gradients off; the
reference for averaging over draws is Athalye, Carlini and Wagner, arXiv:1802.00420. FGSM: arXiv:1412.6572; PGD:
arXiv:1706.06083, steps of $stride ε. The settings were looked at on other seeds.</p>
<p>"More", "less" and the like $verdicts It says what another split of these
images would do, not other data.$few_seeds</p>
<p>$took, on $machine, one thread. Every
figure is in variance.json, beside this page.</p>
<p class="note">Seeds 0 to $last_seed · $versions</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """Writes variance.html and variance.json to the folder `out`; returns the page's path."""
    plan = result.plan
    fields = common_fields(result) | {
        "title": TITLE,
        "tiles": _tiles(result),
        "alpha_chart": _watched_chart(result, ("ln alpha",)),
        "watch_chart": _watched_chart(result, ("one draw", "mean")),
        "alpha_text": _alpha_text(result),
        "main_table": _main_table(result),
        "main_text": _main_text(result),
        "objective_text": _objective_text(result),
        "layer_table": _layer_table(result),
        "layer_text": _layer_text(result),
        "pgd_chart": _attack_chart(result, "pgd"),
        "fgsm_chart": _attack_chart(result, "fgsm"),
        "attack_table": _attack_table(result),
        "attack_text": _attack_text(result),
        "ladder_chart": _ladder_chart(result),
        "ladder_text": _ladder_text(result),
        "pictures": _pictures(result),
        "claims": _claims(result),
        "limits": _limits(result),
        "tested": result.tested,
        "parameters": f"{result.parameters:,}",
        "captum": html.escape(result.captum),
        "channels": " and ".join(map(str, plan.channels)),
        "guess": GUESS,
        "some": plan.averaged[-2],
    }
    figures = {
        "versions": {"fastnuggets": __version__, "captum": result.captum},
        "plan": plan._asdict(),
        "networks": result.networks,
        "attacks": result.attacks,
        "seconds of all": result.seconds,
    }
    return write_page(out, "variance", PAGE, fields, plan, figures)


# Numbers


def drawn(result: Result, name: str, what: str = "drawn", place: int = -1) -> np.ndarray:
    """Accuracy of the most passes, or of those at another place of the plan's, %, [seeds]."""
    return np.array([100 * unit[what]["accuracy"][place] for unit in result.networks[name]])


def means(result: Result, name: str) -> np.ndarray:
    """Accuracy by the weights' means, %, [seeds]."""
    return np.array([100 * unit["mean"] for unit in result.networks[name]])


def objective(result: Result, name: str, which: str = "objective") -> np.ndarray:
    return np.array([unit[which] for unit in result.networks[name]])


def ln_alpha(result: Result, name: str, layer: str = "dense1") -> np.ndarray:
    return np.array([unit["ln alpha"][layer] for unit in result.networks[name]])


def attacked(result: Result, name: str, kind: str, epsilon: float) -> np.ndarray:
    """Accuracy under an attack, %, [seeds]; epsilon 0: without one."""
    if epsilon == 0:
        return np.array([100 * unit["clean"][name] for unit in result.attacks])
    place = result.plan.epsilons.index(epsilon)
    return np.array([100 * unit["by epsilon"][name][kind][place] for unit in result.attacks])


def made(name: str, kind: str) -> bool:
    """Whether a network is attacked in this way."""
    return {"transfer": name != BASE, "one draw": name in DRAWN}.get(kind, True)


def against(result: Result, name: str, other: str = BASE, kind: str = "pgd") -> Paired:
    """Accuracy under an attack at the epsilon that is shown, against another network's, in points."""
    shown = result.plan.shown
    return paired(attacked(result, name, kind, shown) - attacked(result, other, kind, shown), 1)


def _apart(found: Paired, more: str = "more", less: str = "less") -> str:
    """In words, whether a difference in points can be told from chance."""
    return f"{ {1: more, -1: less, 0: 'not told apart'}[found.verdict] } ({difference(found, 1)} points)"


# Text


def _tiles(result: Result) -> str:
    zero = drawn(result, "variational", "zeroed").mean()
    ours = (means(result, "variance"), drawn(result, "variance", place=0), drawn(result, "variance"))
    shown, most = result.plan.shown, result.plan.averaged[-1]
    pgd = " · ".join(f"{attacked(result, name, 'pgd', shown).mean():.0f}" for name in (BASE, "dropout", "variance"))
    naive, averaged = (attacked(result, "variance", kind, shown).mean() for kind in ("one draw", "pgd"))
    tiles = (
        (
            f"{drawn(result, 'variational').mean():.1f} → {zero:.1f} %",
            f"accuracy of variational dropout, before and after its layer's means are set to zero ({most} passes)",
        ),
        (
            " → ".join(f"{values.mean():.1f}" for values in ours) + " %",
            f"a variance layer: its weights' means, one draw, {most} draws averaged; plain "
            f"{means(result, BASE).mean():.1f} %",
        ),
        (f"{pgd} %", f"right under PGD at ε = {shown}: plain, dropout, variance layer"),
        (
            f"{naive:.0f} → {averaged:.0f} %",
            f"the variance layer under PGD with one draw a gradient, and with the {result.plan.passes} that a "
            "prediction has",
        ),
    )
    return tiled(tiles)


def _alpha_text(result: Result) -> str:
    end, most = ln_alpha(result, "variational"), result.plan.averaged[-1]
    kept, zeroed = (drawn(result, "variational", what) for what in ("drawn", "zeroed"))
    text = f"ln α starts at −5 and ends at {spread(end, 1)}. "
    if end.min() > LARGE:
        text += (
            f"Whatever the seed, it passes {LARGE:.0f}, where the noise's variance is some twenty times the squared "
            "mean: what the means still say is lost in it. "
        )
    elif end.max() < LARGE:
        text += f"With no seed it gets to {LARGE:.0f}: the means are still heard above the noise. "
    else:
        text += f"With some seeds it passes {LARGE:.0f}, with others not. "
    lost = paired(zeroed - kept, 1)
    text += f"The means alone are right for {spread(means(result, 'variational'), 1)} % of the test images, "
    text += f"{most} draws with them for {spread(kept, 1)} %, and without them for {spread(zeroed, 1)} %: "
    if lost.verdict == 0 or abs(lost.mean) < NEAR:
        return text + f"to set them to zero changes little ({difference(lost, 1)} points)."
    return text + f"to set them to zero {'costs' if lost.mean < 0 else 'gives'} {abs(lost.mean):.1f} points."


def _main_text(result: Result) -> str:
    """What one sees in the table, as far as it is there."""
    parts = []
    for name in ("variational", "neuron", "weight"):
        lost = paired(drawn(result, name, "zeroed") - drawn(result, name), 1)
        small = abs(lost.mean) < NEAR
        judged = "go without loss" if small else ("are needed" if lost.mean < 0 else "are in the way")
        parts.append(
            f"{NAMES[name]}: ln α {spread(ln_alpha(result, name), 1)}, the means {judged} "
            f"({difference(lost, 1)} points)"
        )
    text = f"<b>The fewer the α, the less the means matter?</b> {'; '.join(parts)}. "
    alone, moved = means(result, "variance"), drawn(result, "variance", "permuted")
    if alone.mean() < 2 * GUESS:
        text += "</p><p><b>What a variance layer knows is in its deviations.</b> By its means it is right for "
        text += f"{spread(alone, 1)} %, a guess; "
    else:
        text += f"</p><p>By its means the variance layer is right for {spread(alone, 1)} %, more than a guess; "
    one, many, most = drawn(result, "variance", place=0), drawn(result, "variance"), result.plan.averaged[-1]
    text += f"one draw gives {spread(one, 1)} %, {most} give {spread(many, 1)} %, and with its deviations "
    text += f"elsewhere {spread(moved, 1)} % are left. "
    costs = paired(many - means(result, BASE), 1)
    text += f"Against the plain network's one pass, {most} passes are {_apart(costs, 'better', 'worse')}."
    return text


def _objective_text(result: Result) -> str:
    ours = objective(result, "variance")
    said = []
    for name in ("variational", "neuron", "weight"):
        found = paired(objective(result, name) - ours, -1)
        word = {1: "less", -1: "more", 0: "not told apart from it"}[found.verdict]
        said.append(f"{NAMES[name]} {spread(objective(result, name), 3)}, {word}")
    zeroed = paired(objective(result, "weight", "objective zeroed") - objective(result, "weight"), -1)
    return (
        f"<b>The objective.</b> A layer that has no means at all reaches {spread(ours, 3)} nats; with means to learn: "
        f"{'; '.join(said)}. A variance layer's divergence is 0 here, what that of the others falls to as α grows. "
        f"With α of each weight and the means, once learned, set to zero, the objective is "
        f"{objective(result, 'weight', 'objective zeroed').mean():.2f}, "
        f"{'lower' if zeroed.verdict > 0 else 'higher' if zeroed.verdict < 0 else 'not told apart'}."
    )


def _layer_text(result: Result) -> str:
    large = [layer for layer in LAYERS if ln_alpha(result, "every layer", layer).min() > LARGE]
    kept = drawn(result, "every layer", place=-2)  # as many passes as there are of those without a layer's means
    lost = {layer: _one_zeroed(result, layer) - kept for layer in LAYERS}
    free = [layer for layer in LAYERS if abs(lost[layer].mean()) < NEAR]
    text = f"With every seed ln α passes {LARGE:.0f} in: {_listed(large)}. "
    text += (
        f"Within {NEAR:.0f} points of the whole network's {kept.mean():.1f} % without their means: {_listed(free)}. "
    )
    if free and set(free) == set(large):
        text += "These are the same layers: α says which means can go. "
    elif free or large:
        text += "These are not the same layers: on this network α alone does not say which means can go. "
    everything = drawn(result, "every layer", "zeroed", -2)
    text += f"Without any means at all {spread(everything, 1)} % are right."
    return text


def _listed(layers: list[str]) -> str:
    return ", ".join(layers) or "none"


def _one_zeroed(result: Result, layer: str) -> np.ndarray:
    return np.array([100 * unit["one zeroed"][layer]["accuracy"][-1] for unit in result.networks["every layer"]])


def _attack_text(result: Result) -> str:
    shown = result.plan.shown
    said = [
        f"{NAMES[name]} {_apart(against(result, name), 'more robust', 'less robust')}"
        for name in ATTACKED
        if name != BASE
    ]
    text = f"<b>Against the plain network</b>, under PGD at ε = {shown}: {'; '.join(said)}."
    found = against(result, "variance", "dropout")
    text += f" The variance layer against dropout: {_apart(found, 'more robust', 'less robust')}."
    alone = paired(attacked(result, "dropout", "pgd", shown) - attacked(result, "dropout mean", "pgd", shown), 1)
    text += " The same weights with dropout's noise and without: "
    text += {1: "the noise helps", -1: "the noise does harm", 0: "not told apart"}[alone.verdict]
    text += f" ({difference(alone, 1)} points)."
    weaker = [
        name for name in DRAWN if paired(_less(result, name, "transfer"), 1).verdict > 0
    ]  # what was made for another network does more harm than what was made for this one
    text += "</p><p><b>Is it robustness, or is it that gradients lead nowhere?</b> "
    if weaker:
        text += (
            f"Images made for the plain network do more harm than those made for it to: {_names(weaker)}. There the "
            "attack failed, not the images: the accuracies above say too much. "
        )
    else:
        text += "No network is harmed more by images made for the plain one than by its own. "
    return f"{text}None of this is a bound: it is what {result.plan.pgd_steps} steps found."


def _less(result: Result, name: str, kind: str) -> np.ndarray:
    """By how much a network is less right under an attack of this kind than under PGD, points, [seeds]."""
    shown = result.plan.shown
    return attacked(result, name, "pgd", shown) - attacked(result, name, kind, shown)


def _names(names: list[str]) -> str:
    return ", ".join(NAMES[name] for name in names) or "none"


def _ladder_text(result: Result) -> str:
    shown, plan = result.plan.shown, result.plan
    masked = {name: paired(-_less(result, name, "one draw"), 1) for name in DRAWN}
    said = "; ".join(f"{NAMES[name]} {found.mean:+.1f} points" for name, found in masked.items())
    text = (
        f"<b>Who overlooks the randomness is misled.</b> An attacker who draws one pass a gradient leaves more right "
        f"at ε = {shown} than one who averages {plan.passes}: {said}. "
        if any(found.verdict > 0 for found in masked.values())
        else f"One pass a gradient does about as much harm at ε = {shown} as {plan.passes}: {said}. "
    )
    told = [name for name, found in masked.items() if found.verdict > 0]
    text += f"Beyond chance: {_names(told)}. That part of the robustness is a mask. "
    if not told:
        text = text.replace("That part of the robustness is a mask. ", "")
    last = {name: paired(_rungs(result, name)[:, -1] - _at_passes(result, name), 1) for name in DRAWN}
    further = [name for name, found in last.items() if found.verdict < 0]
    text += f"{plan.ladder[-1]} passes in place of {plan.passes} "
    text += f"find still more for {_names(further)}." if further else "find no more, beyond chance, for any of them."
    return text


def _rungs(result: Result, name: str) -> np.ndarray:
    """[seeds, rungs] %"""
    return 100 * np.array([unit["ladder"][name] for unit in result.attacks])


def _at_passes(result: Result, name: str) -> np.ndarray:
    """Of the ladder the rung of as many draws as a prediction has."""
    return _rungs(result, name)[:, result.plan.ladder.index(result.plan.passes)]


def _claims(result: Result) -> str:
    def of(values: np.ndarray) -> str:
        return f"{values.mean():.1f}"

    shown = result.plan.shown
    rows = [
        (
            "layers of zero-mean weights learn surprisingly well",
            f"accuracy, plain → variance layer, {result.plan.averaged[-1]} passes: {of(means(result, BASE))} → "
            f"{of(drawn(result, 'variance'))} %",
            _holds(abs((drawn(result, "variance") - means(result, BASE)).mean()) < NEAR),
        ),
        (
            "with the weights' mean a guess is left",
            f"variance layer by its means: {of(means(result, 'variance'))} %",
            _holds(means(result, "variance").mean() < 2 * GUESS),
        ),
        (
            "several Bayesian networks go to zero means by themselves",
            f"ln α of the layer {of(ln_alpha(result, 'variational'))}, of each neuron "
            f"{of(ln_alpha(result, 'neuron'))}, of each weight {of(ln_alpha(result, 'weight'))}; accuracy with the "
            "means → without: "
            + "; ".join(
                f"{of(drawn(result, name))} → {of(drawn(result, name, 'zeroed'))} %"
                for name in ("variational", "neuron", "weight")
            ),
            "holds here for: "
            + _names(
                [
                    name
                    for name in ("variational", "neuron", "weight")
                    if abs((drawn(result, name, "zeroed") - drawn(result, name)).mean()) < NEAR
                ]
            ),
        ),
        (
            "then the objective is much better than with means that are learned",
            "nats, α of the layer, neuron, weight → variance layer: "
            + ", ".join(f"{objective(result, name).mean():.3f}" for name in ("variational", "neuron", "weight"))
            + f" → {objective(result, 'variance').mean():.3f}",
            _holds(
                paired(objective(result, "weight") - objective(result, "variance"), 1).verdict > 0,
                "against α of each weight",
            ),
        ),
        (
            "a decent defence against attacks",
            f"right under PGD at ε = {shown}: plain {of(attacked(result, BASE, 'pgd', shown))}, dropout "
            f"{of(attacked(result, 'dropout', 'pgd', shown))}, variance layer "
            f"{of(attacked(result, 'variance', 'pgd', shown))} %; with one draw a gradient the last would seem to have "
            f"{of(attacked(result, 'variance', 'one draw', shown))} %",
            "; ".join(
                f"against {NAMES[other]}: {VERDICTS[against(result, 'variance', other).verdict]}"
                for other in (BASE, "dropout")
            ),
        ),
    ]
    cells = (f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "<tr><th>the paper, arXiv:1803.03764</th><th>measured here</th><th></th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{"".join(cells)}</tbody></table></div>'


def _holds(does: bool, what: str = "") -> str:
    return f"{'holds' if does else 'does not hold'} here{' ' * bool(what)}{what}"


def _limits(result: Result) -> str:
    one = paired(drawn(result, "variance", place=0) - means(result, BASE), 1)
    hundred = paired(drawn(result, "dropout") - means(result, "dropout"), 1)
    return (
        "<b>Where it stops.</b> One pass of the variance layer against one of the plain network: "
        f"{_apart(one, 'better', 'worse')}; what it needs to be right it pays for in passes. "
        f"What {result.plan.averaged[-1]} passes of dropout give over its one pass without noise: "
        f"{_apart(hundred, 'better', 'worse')}. Digits of 8 × 8 pixels and attacks of at most "
        f"{result.plan.pgd_steps} steps say little about large images; the paper's networks and data are larger."
    )


# Tables


def _main_table(result: Result) -> str:
    rows, counts = [], result.plan.averaged
    for name in NETWORKS:
        row = [NAMES[name]]
        row.append(spread(ln_alpha(result, name), 1) if name in SHARED and name != "every layer" else "–")
        row.append(spread(means(result, name), 1))
        row += [spread(drawn(result, name, place=i), 1) if name != BASE else "–" for i in range(len(counts))]
        row += [spread(drawn(result, name, "zeroed", i), 1) if name in SHARED else "–" for i in (0, -1)]
        noisy = (*SHARED, "variance")
        row.append(spread(drawn(result, name, "permuted"), 1) if name in noisy else "–")
        row.append(spread(objective(result, name), 3) if name in noisy else "–")
        rows.append(row)
    head = ["", "ln α", "means", *(f"{n} pass{'es' * (n > 1)}" for n in counts)]
    head += [f"zeroed, {counts[0]}", f"zeroed, {counts[-1]}", "elsewhere", "objective"]
    return table(head, rows)


def _layer_table(result: Result) -> str:
    kept = drawn(result, "every layer", place=-2)  # as many passes as there are of those without a layer's means
    rows = [["as it is", "–", spread(kept, 1), "–"]]
    for layer in LAYERS:
        found = paired(_one_zeroed(result, layer) - kept, 1)
        alphas = spread(ln_alpha(result, "every layer", layer), 1)
        rows.append([layer, alphas, spread(_one_zeroed(result, layer), 1), difference(found, 1)])
    rows.append(["all of them", "–", spread(drawn(result, "every layer", "zeroed", -2), 1), "–"])
    return table(["", "ln α", "its means zeroed %", "difference, points"], rows)


def _attack_table(result: Result) -> str:
    shown = result.plan.shown
    rows = []
    for name in ATTACKED:
        row = [NAMES[name], spread(attacked(result, name, "clean", 0), 1)]
        for kind in ("random", "transfer", "one draw", "fgsm", "pgd"):
            row.append(spread(attacked(result, name, kind, shown), 1) if made(name, kind) else "–")
        row.append("–" if name == BASE else difference(against(result, name), 1))
        rows.append(row)
    return table(
        ["", "as they are", "signs at random", "transferred", "one draw", "FGSM", "PGD", "against plain"], rows
    )


# Charts


def _watched_chart(result: Result, which: tuple[str, ...]) -> str:
    figure, axis = chart(6.2, 3.4)
    seen = [unit["seen"] for unit in result.networks["variational"]]
    steps = seen[0]["step"]
    labels = {"ln alpha": "ln α", "one draw": "one draw", "mean": "means"}
    for key, color in zip(which, (COLORS["variational"], COLORS[BASE]), strict=False):
        scale = 1 if key == "ln alpha" else 100
        values = scale * np.array([each[key] for each in seen])
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        axis.plot(steps, values.mean(0), color=color, lw=2, label=labels[key])
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("ln α" if which == ("ln alpha",) else "accuracy %", color=INK)
    if which == ("ln alpha",):
        axis.axhline(LARGE, ls=":", color=INK, lw=1)
    else:
        axis.set_ylim(0, 103)
        axis.legend(frameon=False, labelcolor=INK, loc="lower right")
    return svg(figure, f"{' and '.join(labels[key] for key in which)} over the training")


def _attack_chart(result: Result, kind: str) -> str:
    figure, axis = chart(6.2, 3.8)
    places = (0.0, *result.plan.epsilons)
    for name in ATTACKED:
        values = np.array([attacked(result, name, kind, epsilon) for epsilon in places])
        axis.fill_between(places, values.min(1), values.max(1), color=COLORS[name], alpha=0.13, lw=0)
        style = ":" if name == "dropout mean" else "-"
        axis.plot(places, values.mean(1), style, marker="o", ms=4, color=COLORS[name], lw=2, label=NAMES[name])
    axis.set_ylim(-2, 103)
    axis.set_xticks(places, [f"{epsilon:g}" for epsilon in places])
    axis.set_xlabel(f"ε of {kind.upper()}", color=INK)
    axis.set_ylabel("accuracy %", color=INK)
    axis.legend(frameon=False, labelcolor=INK)
    return svg(figure, f"Accuracy under {kind.upper()} by epsilon")


def _ladder_chart(result: Result) -> str:
    figure, axis = chart(6.2, 3.4)
    for name in DRAWN:
        values = _rungs(result, name)
        axis.fill_between(result.plan.ladder, values.min(0), values.max(0), color=COLORS[name], alpha=0.15, lw=0)
        axis.plot(result.plan.ladder, values.mean(0), "o-", ms=4, color=COLORS[name], lw=2, label=NAMES[name])
    plain = attacked(result, BASE, "pgd", result.plan.shown).mean()
    axis.axhline(plain, ls="--", color=COLORS[BASE], lw=1.4, label=NAMES[BASE])
    axis.set_xscale("log")
    axis.set_xticks(result.plan.ladder, [str(n) for n in result.plan.ladder])
    axis.minorticks_off()
    axis.set_ylim(bottom=-2)
    axis.set_xlabel("passes a gradient", color=INK)
    axis.set_ylabel("accuracy %", color=INK)
    axis.legend(frameon=False, labelcolor=INK)
    return svg(figure, "Accuracy under PGD by the number of passes behind each gradient")


def _pictures(result: Result) -> str:
    found = result.pictures
    names = (BASE, "dropout", "variance")
    count = len(found["images"])
    figure, _ = chart(11, 6.4)
    figure.clear()
    axes = figure.subplots(1 + len(names), count)
    labels = found["labels"].tolist()
    rows: list[tuple[str, Any, Any]] = [("test images", found["images"], found["clean"][BASE])]
    rows += [(NAMES[name], found["changed"][name], found["said"][name]) for name in names]
    for row, (title, images, said) in zip(axes, rows, strict=True):
        for axis, image, probabilities, label in zip(row, images, said, labels, strict=True):
            bare(axis)
            axis.imshow(-image[0].numpy(), cmap="gray", vmin=-1, vmax=0)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            share, digit = probabilities.max(0)
            wrong = int(digit) != label
            text = f"{int(digit)}: {100 * float(share):.0f}"
            axis.set_xlabel(text, color="#d6336c" if wrong else INK, fontsize=9)
        row[0].set_ylabel(title, color=INK)
    return svg(figure, "Test images, and what PGD makes of them for three networks, with their predictions")
