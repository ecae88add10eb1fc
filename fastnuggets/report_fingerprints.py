"""The page of the demo of fingerprint generators: one HTML file with its charts inside. Every number is computed."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastnuggets import __version__
from fastnuggets.demo_fingerprints import AAE, PROPERTIES, SETTINGS, VAE, Result, Setting
from fastnuggets.figures import INK, chart, svg, table, tiled
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import Paired, common_fields, difference, paired, spread
from fastnuggets.systems.fingerprint_pictures import molecules

TITLE = "Two ways to keep a code where one can draw from"
COLORS = {"VAE": "#2f6fed", "AAE": "#e07a3f"}
# Where the charts' labels find room, in points.
ASIDE = {"0.1": (-9, 4), "0.3": (3, -16), "1": (9, 9), "3": (8, 5), "z 10": (8, -12), "z 20": (-4, 9),
         "prior 5.5": (10, -6)}  # fmt: skip
ALPHA = 0.05  # of the tests of latents


class Metric(NamedTuple):
    """A number of a score."""

    name: str
    value: Callable[[dict[str, Any]], float]
    sign: int  # 1 if more is better
    digits: int


NATS = Metric("nats to rebuild", lambda score: score["nats"], -1, 2)
EXACT = Metric("rebuilt exactly %", lambda score: 100 * score["all bits right"], 1, 1)
COVERED = Metric("coverage", lambda score: score["covered"], 1, 0)
LIKELY = Metric("ln p of the nearest", lambda score: score["mean"], 1, 1)
MEANS = Metric("cosine of means", lambda score: score["mean cosine"], 1, 4)
STDS = Metric("cosine of deviations", lambda score: score["std cosine"], 1, 4)
PROBE = Metric("new discriminator", lambda score: score["probe"], 1, 3)
TOLD = tuple(Metric(f"R² of {name}", lambda score, name=name: score["told"][name], 1, 2) for name in PROPERTIES)

PAGE = (
    HEAD
    + """\
<p class="lead">An autoencoder squeezes a molecule's fingerprint of 166 bits to a few numbers. To draw new ones, its
codes must be where one can draw from: a normal prior. A variational autoencoder (VAE) pays for a code's divergence
from the prior; an adversarial one (AAE) has to fool a network that tells codes from draws. This is the comparison of
druGAN, on all $molecules molecules that come with RDKit.</p>

<div class="tiles">$tiles</div>

<section>
<h2>What is rebuilt, and what is drawn</h2>
<div class="two"><div>$tradeoff</div><div>$likelihood</div></div>
<p class="note">Each dot is one training, large ones are means over $seeds seeds; a ring marks the published settings.
Beside a mean is the weight of its regularizer, joined by a line where nothing else changes; a triangle has another
size of the code, a square a prior of deviation 5.5. Across: nats to rebuild one of $held_out fingerprints that were
held out. Left: coverage, how many distinct molecules of the training set are the likeliest one under some of $samples
samples; dashed, what $samples molecules drawn at random from it would cover. Right: ln of the probability of that
likeliest molecule, mean over samples.</p>
<p>$tradeoff_text</p>
$setting_table
<p class="note">Mean ± standard deviation over the seeds. Cosines: of the bits' means (and standard deviations) over
samples and over the data. If its bits were independent, a fingerprint would cost $independent nats without any
code.</p>
</section>

<section>
<h2>Are the codes where the prior is?</h2>
<div class="two"><div>$vae_latents</div><div>$aae_latents</div></div>
<p class="note">Every latent of held-out fingerprints, the first seed and the published settings; dashed, the prior.</p>
$prior_table
<p class="note">Mean over the seeds. Mean: the largest of any latent's, in deviations of the prior; deviation: the mean
of all. KS: share of latents that Kolmogorov and Smirnov's test tells from the prior at $alpha. Energy: distance of the
joint distributions and, of the seeds, how many are told apart at $alpha. Discriminators: loss on held-out codes, ln 2
= $ln2 where there is nothing to tell; own is the AAE's, new one that was trained on the finished codes and had nobody
to fool it.</p>
<p>$prior_text</p>
</section>

<section>
<h2>What samples look like</h2>
<p>The likeliest known molecules under the first samples, none of them chosen, and ln of their probability. This is how
druGAN turns samples into molecules. VAE:</p>
$vae_molecules
<p>AAE:</p>
$aae_molecules
<div class="two"><div>$vae_bits</div><div>$aae_bits</div></div>
<p class="note">One dot a bit: how many molecules have it, and its mean probability in samples. First seed.</p>
</section>

<section>
<h2>What a code tells</h2>
<p>A linear function of the code is fitted to a property of some held-out molecules and tells it of the others.</p>
$told_table
<p>$told_text</p>
</section>

<section>
<h2>What the paper claims, and what was measured here</h2>
$claims
<p>$limits</p>
</section>

<section>
<h2>What was used</h2>
$source_table
<p class="note">New: molecules that no file above has. Together $molecules molecules with $fingerprints distinct MACCS
fingerprints, of which each seed holds out another $held_out.</p>
<p>Networks of druGAN: two hidden layers of 256 on each side ($vae_parameters and $aae_parameters weights). Adam,
$rate; $steps steps of $batch fingerprints for the VAE, and as many rotations of three steps for the AAE, each on a
batch of its own: discriminator, encoder against it, autoencoder. The paper trained on 72 million fingerprints, in
batches of 1,024. As Adam takes no notice of a factor of the loss, the AAE's weight is one of the rate of its encoder's
adversarial steps.</p>
<p>"Better" and "worse" $verdicts$few_seeds A training took $vae_time s
(VAE) and $aae_time s (AAE) on $machine, one thread, beside whatever else the machine did.</p>
<p>$took. Every figure is in
fingerprints.json, beside this page.</p>
<p class="note">Seeds 0 to $last_seed · $versions · Kadurin et al., druGAN, Molecular Pharmaceutics 14 (9), 2017, doi
10.1021/acs.molpharmaceut.7b00346</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """Writes fingerprints.html and fingerprints.json to the folder `out`; returns the page's path."""
    plan = result.plan
    first = result.scores[VAE][0]
    fields: dict[str, Any] = {
        "title": TITLE,
        "tiles": _tiles(result),
        "molecules": f"{result.data['molecules']:,}",
        "fingerprints": f"{len(result.data['packed']):,}",
        "held_out": f"{first['held out']:,}",
        "tradeoff": _tradeoff(result, COVERED, by_chance(result)),
        "likelihood": _tradeoff(result, LIKELY),
        "tradeoff_text": _tradeoff_text(result),
        "setting_table": _setting_table(result),
        "independent": f"{result.independent:.1f}",
        "prior_table": _prior_table(result),
        "prior_text": _prior_text(result),
        "alpha": ALPHA,
        "ln2": f"{math.log(2):.3f}",
        "told_table": _table(result, TOLD),
        "told_text": _told_text(result),
        "claims": _claims(result),
        "limits": _limits(result),
        "source_table": _source_table(result),
        "samples": f"{plan.samples:,}",
    }
    for name, setting in (("vae", VAE), ("aae", AAE)):
        fields |= {
            f"{name}_latents": _latents(result, setting),
            f"{name}_molecules": _molecules(result, setting),
            f"{name}_bits": _bits(result, setting),
            f"{name}_parameters": f"{result.parameters[setting.model]:,}",
            f"{name}_time": f"{np.mean([score['training'] for score in result.scores[setting]]):.1f}",
        }
    return write_page(out, "fingerprints", PAGE, fields | common_fields(result), plan, _figures(result))


def _figures(result: Result) -> dict[str, Any]:
    """All numbers of the page, without the tensors behind its charts."""
    left_out = ("frequencies", "codes", "nearest", "fit", "settings")
    return {
        "versions": {"fastnuggets": __version__, "torch": str(torch.__version__)},
        "plan": result.plan._asdict(),
        "files": result.data["counts"],
        "molecules": result.data["molecules"],
        "fingerprints": len(result.data["packed"]),
        "independent bits, nats": result.independent,
        "trainings": {
            setting.name: [
                {key: value for key, value in score.items() if key not in left_out}
                | {"latents": {key: value.tolist() for key, value in score["fit"].items()}}
                for score in scores
            ]
            for setting, scores in result.scores.items()
        },
        "seconds of all": result.seconds,
    }


# Numbers


def by_chance(result: Result) -> float:
    """Distinct molecules among as many draws, with replacement, as there are samples."""
    known = len(result.data["packed"]) - result.scores[VAE][0]["held out"]
    return known * (1 - (1 - 1 / known) ** result.plan.samples)


def _values(result: Result, setting: Setting, metric: Metric) -> np.ndarray:
    return np.array([metric.value(score) for score in result.scores[setting]])


def compare(result: Result, metric: Metric, setting: Setting = AAE, base: Setting = VAE) -> Paired:
    """A setting against another, seed by seed."""
    return paired(_values(result, setting, metric) - _values(result, base, metric), metric.sign)


def _mean(result: Result, setting: Setting, metric: Metric) -> str:
    return f"{_values(result, setting, metric).mean():.{metric.digits}f}"


def _said(result: Result, metric: Metric, setting: Setting = AAE, base: Setting = VAE) -> str:
    """In words how a setting does against another."""
    found = compare(result, metric, setting, base)
    words = {1: "better", -1: "worse", 0: "not told apart"}[found.verdict]
    return f"{words} ({difference(found, metric.digits)})"


def _told_apart(result: Result, setting: Setting) -> int:
    return sum(score["energy"][1] < ALPHA for score in result.scores[setting])


# Text and tables


def _tiles(result: Result) -> str:
    tiles = (
        (
            f"{_mean(result, VAE, NATS)} | {_mean(result, AAE, NATS)}",
            "nats to rebuild a held-out fingerprint, VAE | AAE",
        ),
        (f"{_mean(result, VAE, EXACT)} | {_mean(result, AAE, EXACT)} %", "of them rebuilt in every bit, VAE | AAE"),
        (
            f"{_mean(result, VAE, COVERED)} | {_mean(result, AAE, COVERED)}",
            f"distinct molecules nearest to {result.plan.samples:,} samples, VAE | AAE; druGAN's notebook: 834",
        ),
        (
            f"{_mean(result, VAE, PROBE)} | {_mean(result, AAE, PROBE)}",
            f"loss of a new discriminator, VAE | AAE; {math.log(2):.3f} if codes were the prior's",
        ),
    )
    return tiled(tiles)


def _table(result: Result, metrics: tuple[Metric, ...]) -> str:
    rows = [
        [_label(setting), *(spread(_values(result, setting, metric), metric.digits) for metric in metrics)]
        for setting in SETTINGS
    ]
    return table(["", *(metric.name for metric in metrics)], rows)


def _label(setting: Setting) -> str:
    return f"<b>{setting.name}</b>, as published" if setting in (VAE, AAE) else setting.name


def _setting_table(result: Result) -> str:
    return _table(result, (NATS, EXACT, COVERED, LIKELY, MEANS, STDS))


def _prior_table(result: Result) -> str:
    rows = []
    for setting in SETTINGS:
        scores = result.scores[setting]
        own = [score["discriminator"] for score in scores if "discriminator" in score]
        rows.append(
            [
                _label(setting),
                f"{np.mean([score['fit']['mean'].abs().max() for score in scores]) / setting.prior_std:.2f}",
                f"{np.mean([score['fit']['std'].mean() for score in scores]):.2f}",
                f"{100 * np.mean([(score['fit']['p'] < ALPHA).double().mean() for score in scores]):.0f} %",
                f"{np.mean([s['energy'][0] for s in scores]):.3f}; {_told_apart(result, setting)} of {len(scores)}",
                f"{np.mean(own):.3f}" if own else "–",
                spread(_values(result, setting, PROBE), PROBE.digits),
            ]
        )
    head = ["", "mean", "deviation", "KS", "energy", "own discriminator", "new discriminator"]
    return table(head, rows)


def _source_table(result: Result) -> str:
    rows = [[html.escape(name), *(f"{n:,}" for n in counts)] for name, counts in result.data["counts"].items()]
    return table(["file of RDKit", "records", "readable", "new"], rows)


def _tradeoff_text(result: Result) -> str:
    few, many = AAE._replace(latent=VAE.latent), VAE._replace(latent=AAE.latent)
    low, high = VAE._replace(weight=0.1), VAE._replace(weight=3.0)
    return " ".join(
        [
            "With the published settings, the AAE against the VAE: "
            f"reconstruction {_said(result, NATS)}, coverage {_said(result, COVERED)}, likelihood of samples "
            f"{_said(result, LIKELY)}.",
            f"The AAE has a code of {AAE.latent} numbers, the VAE of {VAE.latent}. Reconstruction with {VAE.latent} "
            f"for both: {_said(result, NATS, few)}; with {AAE.latent} for both: {_said(result, NATS, AAE, many)}.",
            f"The VAE's weight moves it from {_mean(result, low, NATS)} nats and a coverage of "
            f"{_mean(result, low, COVERED)} to {_mean(result, high, NATS)} and {_mean(result, high, COVERED)}.",
            "Coverage alone is no praise: samples that look like nothing known have many different nearest molecules. "
            "Both pictures have to be read together.",
        ]
    )


def _prior_text(result: Result) -> str:
    own = np.mean([score["discriminator"] for score in result.scores[AAE]])
    return (
        f"The AAE's own discriminator ends at {own:.3f}; a new one at {_mean(result, AAE, PROBE)}, and at "
        f"{_mean(result, VAE, PROBE)} on the VAE's codes. By the new one the AAE's are {_said(result, PROBE)}. "
        "Where it is far below the own one, that one has been fooled, and a loss near ln 2 in training says little."
    )


def _told_text(result: Result) -> str:
    parts = [f"{metric.name}: the AAE is {_said(result, metric)} against the VAE" for metric in TOLD]
    fair = VAE._replace(latent=AAE.latent)
    same = ", ".join(f"{metric.name[6:]} {_said(result, metric, AAE, fair)}" for metric in TOLD)
    return (
        f"{'; '.join(parts)}. Against a VAE with as many latents: {same}. The VAE's codes are draws, and it need not "
        "use all of its latents."
    )


def _claims(result: Result) -> str:
    rows = [
        (
            "the best AAE is better than the best VAE",
            f"reconstruction {_said(result, NATS)} nats, with codes of {VAE.latent} for both "
            f"{_said(result, NATS, AAE._replace(latent=VAE.latent))}; coverage {_said(result, COVERED)}; likelihood "
            f"{_said(result, LIKELY)}; closeness to the prior {_said(result, PROBE)}",
        ),
        (
            "reconstruction and variety of samples trade off, and the AAE can be tuned",
            "VAE, weight "
            + " → ".join(
                f"{s.weight:g}: {_mean(result, s, NATS)} nats, {_mean(result, s, COVERED)} covered"
                for s in SETTINGS
                if s.model == "VAE" and s.latent == VAE.latent
            )
            + "; AAE, weight "
            + " → ".join(
                f"{s.weight:g}: {_mean(result, s, NATS)} nats, {_mean(result, s, COVERED)} covered"
                for s in SETTINGS
                if s.model == "AAE" and s.latent == AAE.latent and s.prior_std == 1
            ),
        ),
        (
            "its notebooks: coverage 834 of 1,000 samples; cosines 0.9987 (means) and 0.987 (deviations)",
            f"VAE {_mean(result, VAE, COVERED)}, {_mean(result, VAE, MEANS)}, {_mean(result, VAE, STDS)}; "
            f"AAE {_mean(result, AAE, COVERED)}, {_mean(result, AAE, MEANS)}, {_mean(result, AAE, STDS)}",
        ),
        (
            "the code serves to tell a property (solubility) by linear regression",
            "; ".join(
                f"{metric.name}: VAE {_mean(result, VAE, metric)}, AAE {_mean(result, AAE, metric)}" for metric in TOLD
            ),
        ),
    ]
    cells = "".join(f"<tr><th>{claim}</th><td>{here}</td></tr>" for claim, here in rows)
    head = "<tr><th>druGAN</th><th>here</th></tr>"
    return f'<div class="scroll"><table class="text"><thead>{head}</thead><tbody>{cells}</tbody></table></div>'


def _limits(result: Result) -> str:
    """Where the claims do not hold on data this small, as far as this run tells."""
    wide, count = AAE._replace(prior_std=5.5), len(result.data["packed"])
    return " ".join(
        [
            "<b>Where it does not hold, or cannot be told, at this size.</b>",
            f"The AAE's codes are told from the prior by an energy test in {_told_apart(result, AAE)} of "
            f"{result.plan.seeds} seeds, the VAE's in {_told_apart(result, VAE)}.",
            f"A wider prior (5.5, as in one of the notebooks) rebuilds in {_mean(result, wide, NATS)} nats and covers "
            f"{_mean(result, wide, COVERED)}; against the prior of 1 its samples' likelihood is "
            f"{_said(result, LIKELY, wide, AAE)}.",
            f"{count:,} fingerprints are one for {72e6 / count:,.0f} of the paper's, and {result.plan.steps} steps far "
            "from convergence. The paper's tables could not be compared with, only what its notebooks print.",
        ]
    )


# Charts


def _tradeoff(result: Result, metric: Metric, limit: float | None = None) -> str:
    figure, axis = chart(6.2, 4.4)
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting in SETTINGS:
        x, y = _values(result, setting, NATS), _values(result, setting, metric)
        published = VAE if setting.model == "VAE" else AAE
        other = setting.latent != published.latent
        marker = "^" if other else "s" if setting.prior_std != 1 else "o"
        color = COLORS[setting.model]
        axis.plot(x, y, marker, color=color, ms=4, mew=0, alpha=0.4)
        axis.plot(x.mean(), y.mean(), marker, color=color, ms=9, mew=0)
        if setting == published:
            axis.plot(x.mean(), y.mean(), "o", color=color, ms=16, mfc="none", mew=1.6)
        if marker == "o":
            lines.setdefault(setting.model, []).append((x.mean(), y.mean()))
        text = (
            f"z {setting.latent}"
            if other
            else f"prior {setting.prior_std:g}"
            if marker == "s"
            else f"{setting.weight:g}"
        )
        aside, place = ASIDE[text], (x.mean(), y.mean())
        side = "right" if aside[0] < 0 else "left"
        axis.annotate(text, place, aside, textcoords="offset points", color=color, fontsize=9, ha=side)
    for model, points in lines.items():
        axis.plot(*zip(*points, strict=True), color=COLORS[model], lw=1.6, label=model)
    if limit is not None:
        axis.axhline(limit, ls="--", lw=1, color=INK, alpha=0.6)
    axis.set_xlabel(NATS.name, color=INK)
    axis.set_ylabel(metric.name, color=INK)
    axis.legend(frameon=False, labelcolor=INK)
    axis.margins(0.09)
    return svg(figure, f"{metric.name} against {NATS.name}, both models, all settings")


def _latents(result: Result, setting: Setting) -> str:
    codes = result.scores[setting][0]["codes"]
    figure, axis = chart(6.2, 3.2)
    edges = np.linspace(-4, 4, 61)
    for latent in codes.T.numpy():
        axis.hist(latent, edges, density=True, histtype="step", color=COLORS[setting.model], alpha=0.5, lw=0.9)
    middle = (edges[1:] + edges[:-1]) / 2
    axis.plot(middle, np.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi), "--", color=INK, lw=1.4)
    axis.set_yticks([])
    axis.set_xlabel(f"{setting.model}: each of {codes.shape[1]} latents", color=INK)
    return svg(figure, f"Distribution of each latent of the {setting.model}, and the prior")


def _bits(result: Result, setting: Setting) -> str:
    data, own = result.scores[setting][0]["frequencies"].numpy()
    figure, axis = chart(6.2, 3.8)
    axis.plot([0, 1], [0, 1], "--", color=INK, alpha=0.4, lw=1)
    axis.plot(data, own, "o", color=COLORS[setting.model], ms=4, mew=0, alpha=0.6)
    axis.set_xlabel("share of molecules that have the bit", color=INK)
    axis.set_ylabel(f"mean probability, {setting.model}", color=INK)
    return svg(figure, f"How often each bit is set, in the data and in samples of the {setting.model}")


def _molecules(result: Result, setting: Setting) -> str:
    found = result.scores[setting][0]["nearest"]
    labels = [f"{score:.1f}" for score in found["scores"]]
    return molecules([result.data["smiles"][row] for row in found["rows"]], labels)
