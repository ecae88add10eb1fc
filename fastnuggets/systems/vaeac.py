"""VAEAC on tables: from rows with gaps, the distribution of what is in the gaps given the rest of the row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.models.vaeac import VAEAC
from fastnuggets.systems import masks, tables
from fastnuggets.systems.base import Draw, Section, Settings, System, option
from fastnuggets.systems.tables import Column, Table
from fastnuggets.training.fit import Update

MASKS = ("mcar", "pattern", "mixed")
LEAST = 10  # rows that can be learned from
# Width, depth, latent. On 178 rows the two are as good, and a step of the small one takes a sixth of the time.
_PUBLISHED, _SMALL, _FEW = (256, 10, 64), (64, 3, 16), 2000  # the last: rows
_MOST_LINEAR = 256  # columns and categories whose covariance is inverted for each row
_BLOCK = 1024  # rows that go through the network at a time
_VALIDATED = 1000  # held-out rows at most: each goes through the network as often as in many epochs
_COVERED = "coverage of 90 %"
_WIDER = (0.9, 1.0, 1.1, 1.2, 1.35, 1.5)  # factors of the deviations that are tried at the end
_BOUND = 25  # samples of the bound that validation measures
DRAWN = 39  # samples that `interval` takes


Filled = dict[str, dict[int, str]]


class Split(NamedTuple):
    """Rows [N, columns] float32, NaN where nothing is."""

    train: Tensor
    test: Tensor


@dataclasses.dataclass(frozen=True)
class VaeacSettings(Settings):
    """Those of the publication's tables of missing features, and how a table is read."""

    epochs: int = option(300, "passes over the training set")
    steps: int = option(2000, "of the training at least: small tables get more epochs")
    most_steps: int = option(40000, "of the training at most: large tables get fewer epochs")
    batch_size: int = option(64, "rows in a step, of all processes together")
    learning_rate: float = option(3e-4, "of Adam")
    tested: float = option(0.15, "share of the rows that is held out for validation")
    width: int = option(0, "of every layer; 0: 64 for fewer than 2000 rows, 256 (published) for more")
    depth: int = option(0, "residual layers of each of the three networks; 0: 3 or 10, likewise")
    latent: int = option(0, "numbers of the code; 0: 16 or 64, likewise")
    sigma: float = option(0.0, "of numbers given the code, in deviations of their column; 0: learned (published: 1)")
    least_sigma: float = option(0.01, "floor of what is learned")
    linear: bool = option(True, "begin as the joint normal distribution of the columns, if these are 256 at most")
    masks: str = option("mcar", "what is hidden in training: cells, or what another row lacks, or either", MASKS)
    hidden: float = option(0.2, "share of the cells that mcar hides, beside the gaps")
    missing: str = option(",".join(text for text in tables.MISSING if text), "texts of gaps, with commas between")
    categorical: str = option("", "columns that hold categories, with commas between")
    numbers: str = option("", "columns that hold numbers, with commas between")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "most_steps", "least_sigma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("width", "depth", "latent", "sigma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 < self.hidden < 1:
            raise ValueError(f"hidden: expected a share between 0 and 1, got {self.hidden}")
        if self.masks not in MASKS:
            raise ValueError(f"masks: expected one of {', '.join(MASKS)}, got {self.masks!r}")


class VaeacSystem(System[Split]):
    """A mask of True is UNOBSERVED (b = 1)."""

    summary = "What is in the gaps of a table, given the rest of each row (VAEAC)"
    paper = "Ivanov, Figurnov, Vetrov, Variational Autoencoder with Arbitrary Conditioning, ICLR 2019, arXiv:1806.02382"
    takes = "a table with gaps: .csv .tsv .parquet"
    made = ""
    Settings: ClassVar[type[Settings]] = VaeacSettings

    model: VAEAC

    @classmethod
    def read(cls, path: Path, settings: Any, *, seed: int, progress: bool = True) -> tuple[dict[str, Any], Split]:
        table = read(path, settings)
        try:
            columns, left_out = tables.infer(table, names(settings.categorical), names(settings.numbers))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        data = split(tables.encode(table, columns), settings.tested, seed, str(path))
        facts = {
            "columns": [list(column) for column in columns],
            "left_out": left_out,
            "learned": len(data.train),
            "held_out": len(data.test),
            "gaps": int(data.train.isnan().sum() + data.test.isnan().sum()),
        }
        return facts, data

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        self.settings, self.facts = settings, facts
        self.columns = [Column(*column) for column in facts["columns"]]
        width, depth, latent = _SMALL if facts["learned"] < _FEW else _PUBLISHED
        sizes = tables.sizes(self.columns)
        self.model = VAEAC(
            sizes,
            width=settings.width or width,
            depth=settings.depth or depth,
            latent=settings.latent or latent,
            sigma=settings.sigma or None,
            least_sigma=settings.least_sigma,
            linear=settings.linear and len(sizes) + sum(sizes) <= _MOST_LINEAR,
        )

    def begin(self, data: Split) -> None:
        # Of the held-out rows as well: these choose among networks, and all of these begin as the same distribution.
        self.model.estimate(torch.cat(data).to(self.device))

    @torch.no_grad()
    def end(self, data: Split) -> None:
        """Of factors of the deviations, the one with which intervals of draws hold of the held-out rows what they say.

        Rows that the distribution was taken from would find it right as it is: for once it is that of the others.
        """
        if self.settings.sigma or all(column.categories for column in self.columns):
            return
        self.model.estimate(data.train.to(self.device))
        rows = data.test[:_VALIDATED].repeat(max(1, _VALIDATED // len(data.test)), 1)
        mask = self._hidden(rows, 0)
        wrong = {}
        for factor in _WIDER:
            self.model.widened.fill_(factor)
            wrong[factor] = abs(self._scores(rows, mask, 0).get(_COVERED, 0.9) - 0.9)
        self.model.widened.fill_(min(wrong, key=lambda factor: (wrong[factor], abs(factor - 1))))
        self.begin(data)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        # Fused: the networks are many small matrices, and step by step they would take a quarter of the time.
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.settings.learning_rate, fused=True)
        return [self.optimizer]

    def steps(self, data: Split) -> int:
        return min(max(super().steps(data), int(self.settings.steps)), int(self.settings.most_steps))

    def updates(self, data: Split, step: int, draw: Draw) -> Iterator[Update]:
        x = data.train[draw.rows(step, len(data.train), self.settings.batch_size)]
        mask = self._mask(x, data.train, draw, step).to(self.device)
        key = ops.noise_key(self.device, generator=draw.generator(step))
        yield Update("loss", self.optimizer, self.model.bound(x.to(self.device), mask, key=key).loss.mean())

    def _mask(self, x: Tensor, rows: Tensor, draw: Draw, step: int) -> Tensor:
        kind = self.settings.masks
        cells = masks.mcar(len(x), x.shape[1], self.settings.hidden, draw.generator(step, 2))
        if kind == "mcar":
            return cells
        others = masks.pattern(rows.isnan(), len(x), draw.generator(step, 3))
        if kind == "pattern":
            return others
        return torch.where(masks.mcar(len(x), 1, 0.5, draw.generator(step, 4)), cells, others)

    def validate(self, data: Split) -> dict[str, float]:
        return self.figures(data.test[:_VALIDATED], seed=0)

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """Figures of cells that are hidden from the network, of another file with the same columns."""
        self.model.eval()
        return {**self.figures(tables.encode(read(path, self.settings), self.columns), seed=seed)}

    @torch.no_grad()
    def figures(self, x: Tensor, *, seed: int) -> dict[str, float]:
        """Of known cells of rows [N, columns], hidden at random as in training: their bound in nats, the error of the
        mean of samples in deviations of the column (NRMSE), the share of categories that the most frequent sample
        misses (PFC), and of numbers that lie in the central interval of 90 %. The model is in evaluation mode."""
        mask = self._hidden(x, seed)
        nats = 0.0
        for number, (rows, hidden) in enumerate(zip(x.split(_BLOCK), mask.split(_BLOCK), strict=True)):
            key = _key(self.device, seed, number)
            bound = self.model.importance_bound(rows.to(self.device), hidden.to(self.device), _BOUND, key=key)
            nats -= bound.sum().item()
        return {"nats a cell": nats / max(1, int(mask.sum()))} | self._scores(x, mask, seed + 1)

    def _scores(self, x: Tensor, mask: Tensor, seed: int) -> dict[str, float]:
        drawn = torch.stack([of.masked_fill(~mask, 0.0) for of in self.samples(x, mask, DRAWN, seed=seed)])
        return scores(drawn, x, mask, self.columns)

    def _hidden(self, x: Tensor, seed: int) -> Tensor:
        """Known cells of rows [N, columns], hidden at random as in training."""
        return masks.mcar(len(x), x.shape[1], self.settings.hidden, Draw(seed).generator(0, 5)) & ~x.isnan()

    def samples(self, x: Tensor, mask: Tensor, count: int, *, seed: int, likeliest: bool = False) -> Iterator[Tensor]:
        """Completed rows [N, columns], so many times: what the mask hides, and each NaN, is drawn, or is the likeliest
        given a code that is drawn. The model is in evaluation mode."""
        for sample in range(count):
            parts = []
            for number, (rows, hidden) in enumerate(zip(x.split(_BLOCK), mask.split(_BLOCK), strict=True)):
                key = _key(self.device, seed, (sample << 32) + 4 * number)  # a call takes three
                parts.append(
                    self.model.impute(rows.to(self.device), hidden.to(self.device), likeliest=likeliest, key=key).cpu()
                )
            yield torch.cat(parts)

    def fill(
        self, table: Table, count: int, *, seed: int, within: bool = False, tick: Callable[[], object] | None = None
    ) -> list[Filled]:
        """What belongs in the gaps of a table, column -> row -> text: so many samples, and last the means of numbers
        and the most frequent categories, of as many codes: of what is likeliest given each, which is less noisy than
        the samples' own.

        Args:
            within: numbers are brought into the range of those that were learned from.
            tick: called after each sample of both kinds.

        ValueError as of `tables.encode`.
        """
        self.model.eval()
        x = tables.encode(table, self.columns)
        gaps = x.isnan()
        rows = gaps.any(1).nonzero().flatten()
        x, places = x[rows], gaps[rows].nonzero(as_tuple=True)
        mask = torch.zeros_like(gaps[rows])
        drawn, likely = torch.empty(2, count, len(places[0]), dtype=torch.float64)
        for kind, found in ((False, drawn), (True, likely)):
            for number, sample in enumerate(self.samples(x, mask, count, seed=seed, likeliest=kind)):
                found[number] = sample[places]
                if tick is not None:
                    tick()
        categorical = torch.tensor([bool(column.categories) for column in self.columns])[places[1]]
        last = torch.where(categorical, likely.mode(0).values, likely.mean(0))
        return [self._texts(values, rows[places[0]], places[1], within) for values in (*drawn, last)]

    def _texts(self, values: Tensor, rows: Tensor, columns: Tensor, within: bool) -> Filled:
        texts = {}
        for j, column in enumerate(self.columns):
            own = columns == j
            told = tables.spell(column, values[own].numpy(), within=within)
            texts[column.name] = dict(zip(rows[own].tolist(), told, strict=True))
        return {name: cells for name, cells in texts.items() if cells}

    def sections(self, data: Split) -> list[Section]:
        import html

        from fastnuggets.figures import table

        rows = [
            (html.escape(c.name), f"{len(c.categories)} categories" if c.categories else "number", str(int(gaps)))
            for c, gaps in zip(self.columns, data.train.isnan().sum(0) + data.test.isnan().sum(0), strict=True)
        ]
        rows += [(html.escape(n), html.escape(f"not learned: {why}"), "") for n, why in self.facts["left_out"].items()]
        return [Section("The columns", table(["column", "taken as", "gaps"], rows))]


def read(path: Path, settings: Any) -> Table:
    return tables.read_table(path, names(settings.missing))


def split(x: Tensor, tested: float, seed: int, name: str, least: int = LEAST) -> Split:
    """Rows in which anything is known, some of them held out. ValueError if they are too few."""
    x = x[~x.isnan().all(1)]
    if len(x) < least:
        raise ValueError(f"{name}: {len(x)} rows that are not empty, {least} are needed")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(tested * len(x)))
    return Split(x[order[held:]], x[order[:held]])


def scores(drawn: Tensor, x: Tensor, mask: Tensor, columns: Sequence[Column]) -> dict[str, float]:
    """Of samples [S, N, columns], where the mask is True and x is known: means over columns, in their deviations."""
    errors, wrong, covered = [], [], []
    for j, column in enumerate(columns):
        made, truth = drawn[:, mask[:, j], j], x[mask[:, j], j]
        if not len(truth):
            continue
        if column.categories:
            wrong.append((made.mode(0).values != truth).double().mean().item())
            continue
        errors.append((made.mean(0) - truth).double().square().mean().sqrt().item())
        low, high = interval(made)
        covered.append(((truth >= low) & (truth <= high)).double().mean().item())
    named = {"nrmse": errors, _COVERED: covered, "pfc": wrong}
    return {name: sum(values) / len(values) for name, values in named.items() if values}


def interval(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the interval that holds 90 %, of samples [DRAWN, ...]: the second least and the second largest.

    Of a number and n draws that are distributed as it is, it is below the second least with a chance of 2 / (n + 1).
    """
    low, high = drawn.sort(0).values[[1, -2]]
    return low, high


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _key(device: torch.device, seed: int, offset: int) -> Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)
