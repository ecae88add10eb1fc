"""The page of the demo of imputation: one HTML file with its charts inside. Every number is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastnuggets.demo_impute import METHODS, NORMAL, OURS, PEERS, SAMPLED, Result
from fastnuggets.figures import INK, chart, svg, table, tiled
from fastnuggets.page import HEAD, write_page
from fastnuggets.report_average import common_fields, paired, spread

TITLE = "What belongs in the gaps"
COLORS = {
    "mean": "#b9bec8",
    "kNN": "#8b8d98",
    "iterative": "#3aa17e",
    "forest": "#e07a3f",
    NORMAL: "#8a5cd6",
    OURS: "#2f6fed",
}

PAGE = (
    HEAD
    + """\
<p class="lead">Cells of complete tables are hidden at random and filled again. VAEAC (Ivanov, Figurnov and Vetrov, ICLR
2019) learns from the rows with their gaps what belongs in any gap given the rest of the row, and draws it.</p>

<div class="tiles">$tiles</div>

<section>
<h2>Numbers</h2>
<div class="two">$error_charts</div>
$error_table
<p class="note">Root mean squared error of hidden cells in standard deviations of their column, mean over columns; mean
± standard deviation over $seeds seeds, each of which hides other cells. Bold: the least mean.</p>
<p>$error_text</p>
</section>

<section>
<h2>Categories</h2>
$wrong_table
<p class="note">Share of hidden categories filled wrongly, %. Of wine and breast cancer the class is such a column,
beside the measurements; of diabetes, the sex. Bold: the least mean.</p>
<p>$wrong_text</p>
</section>

<section>
<h2>As uncertain as it says?</h2>
$coverage_table
<p class="note">Share of hidden numbers, %, inside an interval that should hold 90 % of them, and its mean width in
deviations: between the second least and the second largest of 39 draws. Iterative: with draws from the posterior of
each regression. The mean, kNN and the forest draw nothing.</p>
<p>$coverage_text</p>
</section>

<section>
<h2>What was done</h2>
$size_table
<p>Peers are scikit-learn's: the mean, 5 nearest neighbours, Bayesian ridge regressions iterated up to $rounds times,
and in their place forests of $trees trees, in the manner of missForest. They see categories as ones among zeros,
the first as zeros alone. Normal is the joint normal distribution of the columns and nothing else, found by
expectation and maximisation; VAEAC begins as it, which the published network does not, and takes $steps steps at a rate
of $rate, with the network for small tables, the best of 20 validations on 15 % of the rows, guesses of 10 codes. Its
deviations are multiplied by one of six factors, the one that is right for those rows. Its settings were looked at on
these tables with 30 % hidden: a demonstration, no benchmark.</p>
$time_table
<p class="note">Processor seconds of one table, with whatever is drawn, on one thread. The whole run took $seconds
($reused of $parts parts were there already), on $machine. $versions.$few_seeds</p>
</section>
"""
)


def write(result: Result, out: Path) -> Path:
    """impute.html and impute.json."""
    names = list(result.scores)
    covered = [100 * _values(result, name, OURS, "coverage").mean() for name in names]
    tiles = [
        (f"{_ahead(result, 'nrmse')} of {len(names)}", "tables and shares where no imputer of scikit-learn has a lower "
         "mean error of numbers than VAEAC"),
        (f"{_ahead(result, 'pfc')} of {len(names)}", "where none has a lower mean share of wrong categories"),
        (f"{min(covered):.0f} to {max(covered):.0f} %", "of hidden numbers lie where VAEAC says that 90 % do"),
    ]  # fmt: skip
    fields = common_fields(result) | {
        "title": TITLE,
        "tiles": tiled(tiles),
        "error_charts": "".join(f"<div>{_chart(result, name)}</div>" for name in result.plan.tables),
        "error_table": _table(result, METHODS, "nrmse", 1, 3),
        "error_text": _told(result, "nrmse"),
        "wrong_table": _table(result, METHODS, "pfc", 100, 1),
        "wrong_text": _told(result, "pfc"),
        "coverage_text": _covered(result),
        "coverage_table": table(
            ["hidden", *(f"{method}, {what}" for method in SAMPLED for what in ("%", "width"))],
            [
                (
                    name,
                    *(
                        spread(scale * _values(result, name, method, what), digits)
                        for method in SAMPLED
                        for what, scale, digits in (("coverage", 100, 1), ("width", 1, 2))
                    ),
                )
                for name in names
            ],
        ),
        "size_table": table(
            ["table", "rows", "numbers", "categories"],
            [(name, *map(str, sizes)) for name, sizes in result.tables.items()],
        ),
        "time_table": _table(result, METHODS, "seconds", 1, 1, best=False),
    }
    figures = {"plan": result.plan._asdict(), "scores": result.scores, "seconds": result.seconds}
    return write_page(out, "impute", PAGE, fields, result.plan, figures)


def _values(result: Result, name: str, method: str, figure: str) -> np.ndarray:
    """[seeds]"""
    return np.array([score[method][figure] for score in result.scores[name]])


def _best(result: Result, name: str, figure: str = "nrmse") -> str:
    return min(METHODS, key=lambda method: _values(result, name, method, figure).mean())


def _table(
    result: Result, methods: tuple[str, ...], figure: str, scale: float, digits: int, *, best: bool = True
) -> str:
    rows = []
    for name in result.scores:
        cells = {method: spread(scale * _values(result, name, method, figure), digits) for method in methods}
        if best:
            cells[_best(result, name, figure)] = f"<b>{cells[_best(result, name, figure)]}</b>"
        rows.append((name, *cells.values()))
    return table(["hidden", *methods], rows)


def _ahead(result: Result, figure: str) -> int:
    """In how many rows VAEAC's mean is the least of the peers', or as small."""
    least = [min(_values(result, name, peer, figure).mean() for peer in PEERS) for name in result.scores]
    ours = [_values(result, name, OURS, figure).mean() for name in result.scores]
    return sum(mine <= other for mine, other in zip(ours, least, strict=True))


def _covered(result: Result) -> str:
    """How far from what they say the intervals of each method are."""
    parts = []
    for method in SAMPLED:
        found = [100 * _values(result, name, method, "coverage").mean() for name in result.scores]
        off = np.abs(np.subtract(found, 90)).mean()
        parts.append(f"{method} {min(found):.0f} to {max(found):.0f} %, on average {off:.1f} off")
    return f"By row: {'; '.join(parts)}."


def _told(result: Result, figure: str) -> str:
    """How VAEAC does against each of the others, seed by seed."""
    parts = []
    for peer in (*PEERS, NORMAL):
        found = [
            paired(_values(result, name, OURS, figure) - _values(result, name, peer, figure), -1).verdict
            for name in result.scores
        ]
        parts.append(f"{peer}: better {found.count(1)}, worse {found.count(-1)}, not told apart {found.count(0)}")
    return "VAEAC against each, seed by seed, in how many of the rows above. " + "; ".join(parts) + "."


def _chart(result: Result, name: str) -> str:
    figure, axis = chart(4.6, 2.6)
    shares = [100 * share for share in result.plan.shares]
    for method in METHODS:
        means = [_values(result, f"{name}, {share:.0%}", method, "nrmse").mean() for share in result.plan.shares]
        axis.plot(shares, means, "o-", color=COLORS[method], linewidth=1.6, markersize=5, label=method)
    axis.set_title(f"{name}: error by share hidden, %", color=INK, fontsize=10)
    axis.set_xticks(shares)
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    return svg(figure, f"Error of numbers of {name} by the share of hidden cells")
