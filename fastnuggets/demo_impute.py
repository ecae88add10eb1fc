"""The demo of imputation: gaps of three tables filled by VAEAC and by the imputers of scikit-learn."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastnuggets.models.conditional_gaussian import ConditionalGaussian
from fastnuggets.molecules.files import need
from fastnuggets.parts import Parts, command, one_thread, settings
from fastnuggets.systems.vaeac import DRAWN, interval

TABLES = ("wine", "breast cancer", "diabetes")
OURS = "VAEAC"
NORMAL = "normal"  # the distribution that VAEAC begins as, and nothing that it learned
PEERS = ("mean", "kNN", "iterative", "forest")
METHODS = (*PEERS, NORMAL, OURS)
SAMPLED = ("iterative", NORMAL, OURS)  # those that draw, and so have intervals


class Plan(NamedTuple):
    """How much the demo does, and its settings."""

    seeds: int
    tables: tuple[str, ...] = TABLES
    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    steps: int = 1000  # of VAEAC
    rate: float = 3e-4  # its learning rate
    rounds: int = 10  # of the iterative imputer and of the forest, at most
    trees: int = 50


STANDARD = Plan(seeds=5)
QUICK = Plan(seeds=2, tables=("wine", "diabetes"), shares=(0.3,), steps=300, rounds=2, trees=10)


class Table(NamedTuple):
    """Complete rows."""

    numbers: np.ndarray  # [N, numbers], standardised
    categories: np.ndarray  # [N, categoricals] places


class Result(NamedTuple):
    """All that the page shows."""

    plan: Plan
    tables: dict[str, tuple[int, int, int]]  # rows, numbers and categoricals
    scores: dict[str, list[dict[str, dict[str, float]]]]  # "table, share" -> one a seed -> method -> figures
    seconds: float  # of all computations, those of earlier calls too
    reused: int
    parts: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    return command(
        "impute",
        argv,
        run,
        (STANDARD, QUICK),
        description="Cells of three complete tables are hidden at random, and filled again by VAEAC, by means, nearest "
        "neighbours, iterated regressions and iterated forests: errors of numbers and of categories, and whether what "
        "is drawn is as uncertain as it says. Writes OUT/impute.html, a page that needs no network, and its figures in "
        "OUT/impute.json.",
        repeated="hidden cells and weights to repeat everything with",
    )


def run(plan: Plan, cache: Path, *, fresh: bool = False) -> Result:
    """The demo without its page. Each table, share and seed is kept in `cache` when it is done.

    Deterministic: the same settings and versions give the same figures on the same machine; times are as measured.
    """
    cells = [(table, share, seed) for table in plan.tables for share in plan.shares for seed in range(plan.seeds)]
    scores: dict[str, list[dict[str, dict[str, float]]]] = {}
    with one_thread(), need("tqdm").tqdm(total=len(cells), unit="table", disable=None) as bar:
        part = Parts(cache, bar, fresh=fresh)
        for table, share, seed in cells:
            what = settings(plan._replace(tables=(), shares=()), {"table": table, "share": share, "seed": seed})
            name = f"{table}, {share:.0%}"
            found = part(f"{name}, seed {seed}", 1, what, partial(measure, plan, table, share, seed))
            if not part.reused[-1]:
                bar.update()
            scores.setdefault(name, []).append({method: found[method] for method in METHODS})
    sizes = {name: load(name) for name in plan.tables}
    shapes = {name: (len(t.numbers), t.numbers.shape[1], t.categories.shape[1]) for name, t in sizes.items()}
    return Result(plan, shapes, scores, sum(part.seconds), sum(part.reused), len(part.reused))


def load(name: str) -> Table:
    """Of wine and cancer the class, of diabetes the sex, is a column of categories; all others are numbers."""
    sets = need("sklearn.datasets")
    loaded = {"wine": sets.load_wine, "breast cancer": sets.load_breast_cancer, "diabetes": sets.load_diabetes}[name]
    values, labels = loaded(return_X_y=True)
    if name == "diabetes":
        values, labels = np.delete(values, 1, 1), values[:, 1]
    places = np.unique(labels, return_inverse=True)[1]
    return Table((values - values.mean(0)) / values.std(0), places[:, None])


def measure(plan: Plan, name: str, share: float, seed: int) -> dict[str, dict[str, float]]:
    """Every method on one table with one set of hidden cells."""
    table = load(name)
    generator = np.random.default_rng([seed, round(100 * share), TABLES.index(name)])
    count = table.numbers.shape[1]
    hidden = generator.random((len(table.numbers), count + table.categories.shape[1])) < share
    hidden[hidden.all(1), 0] = False  # something is known of every row
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that iterations were stopped: the plan says after how many
        for method in METHODS:
            began = time.process_time()
            fill = {OURS: ours, NORMAL: normal}.get(method, peer)
            numbers, places, drawn = fill(plan, method, table, hidden, seed)
            taken = time.process_time() - began
            found[method] = judge(table, hidden, numbers, places, drawn) | {"seconds": taken}
    return found


def ours(plan: Plan, method: str, table: Table, hidden: np.ndarray, seed: int) -> tuple[Any, Any, Any]:
    from fastnuggets.imputer import VAEACImputer

    count = table.numbers.shape[1]
    cells = np.where(hidden, np.nan, np.hstack([table.numbers, table.categories]))
    places = range(count, cells.shape[1])
    imputer = VAEACImputer(categorical=places, epochs=1, steps=plan.steps, learning_rate=plan.rate, random_state=seed)
    imputer.fit(cells)
    filled = imputer.transform(cells)
    drawn = imputer.set_params(samples=DRAWN).sample(cells)[:, :, :count]
    return filled[:, :count], filled[:, count:], drawn


def normal(plan: Plan, method: str, table: Table, hidden: np.ndarray, seed: int) -> tuple[Any, Any, Any]:
    count = table.numbers.shape[1]
    cells, gone = [table.numbers], [hidden[:, :count]]
    for j, column in enumerate(table.categories.T):
        cells.append(np.eye(column.max() + 1)[column])
        gone.append(np.repeat(hidden[:, count + j, None], cells[-1].shape[1], 1))
    x, lost = torch.from_numpy(np.hstack(cells)), torch.from_numpy(np.hstack(gone))
    model = ConditionalGaussian(x.shape[1]).double()
    model.estimate(x.masked_fill(lost, torch.nan))
    mean, std = model(x.masked_fill(lost, 0.0), lost)
    noise = np.random.default_rng(seed).standard_normal((DRAWN, *mean.shape))
    drawn = mean.numpy() + std.numpy() * noise
    numbers, *chances = np.split(mean.numpy(), np.cumsum([part.shape[1] for part in cells])[:-1], 1)
    return numbers, np.stack([part.argmax(1) for part in chances], 1), drawn[:, :, :count]


def peer(plan: Plan, method: str, table: Table, hidden: np.ndarray, seed: int) -> tuple[Any, Any, Any]:
    """Imputers of scikit-learn see categories as ones among zeros, the first as zeros alone: with a column for each,
    the others would say exactly what is in it, and iterations would never leave their start. The largest is taken."""
    count = table.numbers.shape[1]
    parts = [np.where(hidden[:, :count], np.nan, table.numbers)]
    for j, column in enumerate(table.categories.T):
        ones = np.eye(column.max() + 1)[column][:, 1:]
        parts.append(np.where(hidden[:, count + j, None], np.nan, ones))
    cells = np.hstack(parts)
    imputer = _peer(plan, method, seed)
    filled = imputer.fit_transform(cells)
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    numbers, *categories = np.split(filled, ends, 1)
    drawn = None
    if method in SAMPLED:
        sampler = _peer(plan, method, seed).set_params(sample_posterior=True).fit(cells)
        drawn = np.stack([sampler.transform(cells)[:, :count] for _ in range(DRAWN)])
    chances = [np.hstack([1 - part.sum(1, keepdims=True), part]) for part in categories]
    return numbers, np.stack([part.argmax(1) for part in chances], 1), drawn


def _peer(plan: Plan, method: str, seed: int) -> Any:
    need("sklearn.experimental.enable_iterative_imputer")
    impute = need("sklearn.impute")
    if method == "mean":
        return impute.SimpleImputer()
    if method == "kNN":
        return impute.KNNImputer()
    if method == "iterative":
        return impute.IterativeImputer(max_iter=plan.rounds, random_state=seed)
    forest = need("sklearn.ensemble").RandomForestRegressor(plan.trees, random_state=seed)
    return impute.IterativeImputer(forest, max_iter=plan.rounds, random_state=seed)


def judge(
    table: Table, hidden: np.ndarray, numbers: np.ndarray, places: np.ndarray, drawn: np.ndarray | None
) -> dict[str, float]:
    """Means over columns: root mean squared errors in deviations, shares of wrong categories; and the share of hidden
    numbers inside the interval of 90 % of the draws [DRAWN, N, numbers], with its mean width in deviations."""
    count = table.numbers.shape[1]
    lost = hidden[:, :count]
    errors = [((numbers - table.numbers)[gone, j] ** 2).mean() ** 0.5 for j, gone in enumerate(lost.T) if gone.any()]
    wrong = [(places != table.categories)[gone, j].mean() for j, gone in enumerate(hidden[:, count:].T) if gone.any()]
    found = {"nrmse": float(np.mean(errors)), "pfc": float(np.mean(wrong))}
    if drawn is not None:
        low, high = (end.numpy() for end in interval(torch.from_numpy(drawn)))
        found["coverage"] = float(((table.numbers >= low) & (table.numbers <= high))[lost].mean())
        found["width"] = float((high - low)[lost].mean())
    return found
