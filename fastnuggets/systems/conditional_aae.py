"""Cornucopia: fingerprints of molecules with a property that is asked for, by a conditional adversarial autoencoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.models.conditional_aae import Code, ConditionalAAE, manifold_loss
from fastnuggets.models.fingerprint_autoencoder import bits_loss, discriminator_loss, encoder_loss
from fastnuggets.molecules.fingerprints import BITS, KINDS, unpack
from fastnuggets.systems.base import Draw, Section, Settings, System, option
from fastnuggets.systems.fingerprint_autoencoder import TAKES, lines
from fastnuggets.systems.fingerprint_data import COMPUTED, Rows, Split, rows_of, split
from fastnuggets.systems.fingerprint_measures import nearest
from fastnuggets.training import processes
from fastnuggets.training.fit import Update

BEGINNING, MAIN = 0, 1  # phases of a training
SETTLED = 5  # rounds of the pre-training before it may end
EAGER, FOOLED = 1.0, 0.7  # the encoder's loss below which its turn ends, and below which the pre-training does
SHOWN = 1000  # samples of the steering picture


@dataclasses.dataclass(frozen=True)
class ConditionalSettings(Settings):
    """The published schedule. A pass over the data has no meaning in it: `epochs` are of `epoch_steps` steps."""

    epochs: int = option(50, "of the main training, each of --epoch-steps steps")
    batch_size: int = option(64, "rows in a batch of the main training, of all processes together")
    learning_rate: float = option(0.01, "of Adam")
    condition: str = option("logP", f"the property: {', '.join(COMPUTED)}, or a column of a table")
    lowest: float = option(-math.inf, "a condition below counts as this")
    highest: float = option(math.inf, "a condition above counts as this")
    dose: str = option("", "a column: the logarithm of the concentration that the condition was measured at")
    kind: str = option("maccs", "of the fingerprints", KINDS)
    latent: int = option(4, "numbers of a code, without the condition")
    prior_std: float = option(1.0, "standard deviation of the prior")
    epoch_steps: int = option(10_000, "four updates each")
    rounds: int = option(15, "of an attempt at the pre-training")
    round_steps: int = option(1000, "steps of a round")
    attempts: int = option(5, "at the pre-training, each with new weights, until the adversary is fooled")
    first_batch_size: int = option(512, "rows in a batch of the pre-training")
    most: int = option(20, "encoder's updates to one of the discriminator's in the pre-training")
    spread: float = option(1.68, "of the doses that the pre-training draws, in the column's unit; with --dose alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent", "prior_std", "epoch_steps", "round_steps", "first_batch_size", "most", "spread"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not self.lowest < self.highest:
            raise ValueError(f"lowest, highest: expected two limits in order, got {self.lowest}, {self.highest}")
        if self.rounds < 0 or self.attempts < 1:
            raise ValueError(f"rounds, attempts: expected 0 or more, 1 or more, got {self.rounds}, {self.attempts}")


class Batch(NamedTuple):
    x: Tensor  # [B, bits]
    values: Tensor  # [B] standardised
    doses: Tensor | None  # [B] standardised


class Trained(torch.nn.Module):
    """The network, and where its training is: the pre-training may begin anew, and a checkpoint must know."""

    def __init__(self, network: ConditionalAAE) -> None:
        super().__init__()
        self.network = network
        for name, value in (("phase", BEGINNING), ("begun", 0), ("attempt", 1)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("encoder_loss", torch.tensor(math.inf))


class ConditionalAAESystem(System[Split]):
    """Pre-training: the discriminator, the encoder against it until it is fooled, and codes that do not depend on the
    dose; again with new weights if that comes to nothing. Then four updates in turn, each on rows of its own:
    discriminator, encoder, the property, autoencoder.
    """

    summary = "Fingerprints with a property that is asked for (Cornucopia's conditional AAE)"
    paper = "Kadurin et al., The cornucopia of meaningful leads, Oncotarget 8:10883, 2017"
    takes = TAKES
    made = "fingerprints, one string of 0 and 1 a line"
    Settings: ClassVar[type[Settings]] = ConditionalSettings

    model: Trained

    @classmethod
    def read(cls, path: Path, settings: Any, *, seed: int, progress: bool = True) -> tuple[dict[str, Any], Split]:
        rows = _rows_of(path, settings, progress)
        data = split(rows, settings.tested, seed, path, repeated=True)
        learned = data.train
        facts: dict[str, Any] = {"bits": BITS[settings.kind], "kind": settings.kind, "condition": settings.condition}
        facts |= {"dosed": learned.doses is not None, "learned": len(learned), "held_out": len(data.test)}
        for name, of in (("value", learned.values), ("dose", learned.doses)):
            if of is not None:
                facts |= {f"{name}_mean": of.double().mean().item(), f"{name}_std": of.double().std().item()}
        if not facts["value_std"] > 0:
            raise ValueError(f"{path}: {settings.condition!r} is the same for all molecules that are learned from")
        return facts, data

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        self.settings, self.facts = settings, facts
        self.model = Trained(
            ConditionalAAE(facts["bits"], dosed=facts["dosed"], latent=settings.latent, prior_std=settings.prior_std)
        )
        network, rate = self.model.network, settings.learning_rate
        encoder, both = network.encoder.parameters, [*network.encoder.parameters(), *network.decoder.parameters()]
        groups = {"discriminator": network.discriminator.parameters(), "encoder": encoder(), "property": encoder()}
        groups |= {"autoencoder": both, **({"manifold": encoder()} if facts["dosed"] else {})}
        self.adams = {name: torch.optim.Adam(of, rate) for name, of in groups.items()}

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return list(self.adams.values())

    def steps(self, data: Split) -> int:
        """One attempt at the pre-training and the main training. Attempts that fail are at the cost of the latter."""
        settings = self.settings
        return int(settings.rounds) * int(settings.round_steps) + int(settings.epochs) * int(settings.epoch_steps)

    def updates(self, data: Split, step: int, draw: Draw) -> Iterator[Update]:
        self._turn(data, step, draw)
        yield from (self._first if self.model.phase == BEGINNING else self._main)(data.train, step, draw)

    def _turn(self, data: Split, step: int, draw: Draw) -> None:
        """Before a step: whether the pre-training is over, or has to begin anew.

        That is told by the weights' own buffers and the step, so that a resumed training takes the same turns.
        """
        state, settings = self.model, self.settings
        done = step - int(state.begun)
        if state.phase != BEGINNING:
            return
        if settings.rounds == 0:
            state.phase.fill_(MAIN)
            return
        if done == 0 or done % settings.round_steps:
            return
        rounds, fooled = done // settings.round_steps, float(state.encoder_loss) < FOOLED
        if (fooled and rounds >= min(SETTLED, settings.rounds)) or (
            rounds >= settings.rounds and int(state.attempt) >= settings.attempts
        ):
            state.phase.fill_(MAIN)
        elif rounds >= settings.rounds:
            state.begun.fill_(step)
            state.attempt.add_(1)
            self._anew(draw, step)

    def _anew(self, draw: Draw, step: int) -> None:
        with torch.random.fork_rng(devices=[]):
            # Of the step and the seed alone, and the same in every process.
            torch.manual_seed(draw._replace(rank=0).generator(step, 99).initial_seed())
            for module in self.model.network.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        for adam in self.adams.values():
            adam.state.clear()

    def _first(self, rows: Rows, step: int, draw: Draw) -> Iterator[Update]:
        network = self.model.network
        batch = self._batch(rows, step, draw, 0, self.settings.first_batch_size)
        yield self._discriminator(batch, step, draw)
        for turn in range(1, self.settings.most + 1):
            batch = self._batch(rows, step, draw, turn, self.settings.first_batch_size)
            loss = encoder_loss(network.discriminator, self._code(batch).latent, self._prior(batch, step, draw, turn))
            self.model.encoder_loss.copy_(processes.mean(loss))
            yield Update("encoder", self.adams["encoder"], loss)
            if float(self.model.encoder_loss) < EAGER:
                break
        if self.facts["dosed"]:
            noise = draw.generator(step, 1000)
            doses = torch.randn(2, len(batch.x), generator=noise) * (self.settings.spread / self.facts["dose_std"])
            both = [network.encode(batch.x, dose.to(self.device)).latent for dose in doses]
            yield Update("manifold", self.adams["manifold"], manifold_loss(*both))

    def _main(self, rows: Rows, step: int, draw: Draw) -> Iterator[Update]:
        network, size = self.model.network, self.settings.batch_size
        yield self._discriminator(self._batch(rows, step, draw, 0, size), step, draw)
        batch = self._batch(rows, step, draw, 1, size)
        loss = encoder_loss(network.discriminator, self._code(batch).latent, self._prior(batch, step, draw, 1))
        yield Update("encoder", self.adams["encoder"], loss)
        batch = self._batch(rows, step, draw, 2, size)
        yield Update("property", self.adams["property"], F.mse_loss(self._code(batch).condition, batch.values))
        batch = self._batch(rows, step, draw, 3, size)
        made = network.decode(*self._code(batch))
        loss = bits_loss(made.logits, batch.x).mean() / network.bits
        if made.dose is not None:
            loss = loss + F.mse_loss(made.dose, batch.doses)
        yield Update("autoencoder", self.adams["autoencoder"], loss)

    def _discriminator(self, batch: Batch, step: int, draw: Draw) -> Update:
        with torch.no_grad():
            latent = self._code(batch).latent
        loss = discriminator_loss(self.model.network.discriminator, latent, self._prior(batch, step, draw, 0))
        return Update("discriminator", self.adams["discriminator"], loss)

    def _code(self, batch: Batch) -> Code:
        return self.model.network.encode(batch.x, batch.doses)

    def _prior(self, batch: Batch, step: int, draw: Draw, turn: int) -> Tensor:
        key = ops.noise_key(self.device, generator=draw.generator(step, 2 + 2 * turn))
        return self.model.network.prior(len(batch.x), key=key)

    def _batch(self, rows: Rows, step: int, draw: Draw, turn: int, size: int) -> Batch:
        """With replacement: turns differ in number from step to step, so there is no pass to keep count of."""
        size = max(2, min(size, len(rows)) // draw.world)
        return self._rows(rows, torch.randint(len(rows), (size,), generator=draw.generator(step, 3 + 2 * turn)))

    def _rows(self, rows: Rows, places: Tensor) -> Batch:
        assert rows.values is not None
        facts, device = self.facts, self.device
        x = unpack(rows.packed[places].to(device), facts["bits"]).float()
        values = ((rows.values[places] - facts["value_mean"]) / facts["value_std"]).to(device)
        if rows.doses is None:
            return Batch(x, values, None)
        return Batch(x, values, ((rows.doses[places] - facts["dose_mean"]) / facts["dose_std"]).to(device))

    def validate(self, data: Split) -> dict[str, float]:
        return self._figures(data.test, seed=0)

    @torch.no_grad()
    def _figures(self, rows: Rows, *, seed: int) -> dict[str, float]:
        network = self.model.network
        batch = self._rows(rows, torch.arange(len(rows)))
        code = self._code(batch)
        made = network.decode(*code)
        prior = network.prior(len(batch.x), key=torch.tensor([seed, 0], device=self.device))
        found = {
            "nats": bits_loss(made.logits, batch.x).mean().item(),
            "bit accuracy": ((made.logits > 0) == (batch.x > 0.5)).double().mean().item(),
            "property R²": (1 - F.mse_loss(code.condition, batch.values) / batch.values.var(correction=0)).item(),
            "discriminator": discriminator_loss(network.discriminator, code.latent, prior).item(),
        }
        if made.dose is not None and batch.doses is not None:
            found["dose error"] = F.mse_loss(made.dose, batch.doses).sqrt().item() * self.facts["dose_std"]
        return found

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """Figures of a file that has the property, and how well the nearest of its molecules have what was asked."""
        self.model.eval()
        rows = _rows_of(path, self.settings, False)
        return {"molecules": float(len(rows)), **self._figures(rows, seed=seed), **self.steering(rows, seed)[2]}

    def generate(
        self,
        count: int,
        *,
        seed: int,
        value: float | None = None,
        database: str = "",
        rounded: bool = False,
    ) -> Iterator[str]:
        """Fingerprints of molecules with the property at `value`, in its own unit (default: the mean of the data).

        `database` and `rounded` as of the fingerprint autoencoders.
        """
        self.model.eval()
        asked = self.facts["value_mean"] if value is None else float(value)
        if not math.isfinite(asked):
            raise ValueError(f"value: expected a number, got {value}")

        def decoded(key: Tensor, size: int) -> Tensor:
            return self.decode(self.model.network.prior(size, key=key), torch.full((size,), asked))

        yield from lines(count, seed, self.facts["kind"], decoded, self.device, database, rounded)

    def decode(self, latent: Tensor, asked: Tensor) -> Tensor:
        """Logits [B, bits] of latents [B, latent] and the property [B] in its own unit."""
        standardised = (asked - self.facts["value_mean"]) / self.facts["value_std"]
        return self.model.network.decode(latent, standardised.to(latent)).logits

    @torch.no_grad()
    def steering(self, rows: Rows, seed: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The property asked for, even between the 5th and 95th percent of the rows, and that of the likeliest row
        under each sample: [S], [S], and figures of both."""
        assert rows.values is not None
        low, high = (float(rows.values.quantile(q)) for q in (0.05, 0.95))
        asked = torch.linspace(low, high, SHOWN)
        latent = self.model.network.prior(SHOWN, key=torch.tensor([seed, -1], device=self.device))
        found = nearest(self.decode(latent, asked.to(latent.device)), rows.packed).row[:, 0].cpu()
        got = rows.values[found]
        both = torch.stack([asked, got]).double()
        figures = {"asked and got: correlation": torch.corrcoef(both)[0, 1].item()}
        return asked, got, figures | {f"coverage of {SHOWN}": float(len(found.unique()))}

    def sections(self, data: Split) -> list[Section]:
        from fastnuggets.systems.fingerprint_pictures import steering_section

        return [steering_section(*self.steering(data.train, 0), self.facts["condition"], data.train)]


def _rows_of(path: Path, settings: ConditionalSettings, progress: bool) -> Rows:
    rows = rows_of(path, settings.kind, value=settings.condition, dose=settings.dose, progress=progress)
    assert rows.values is not None
    return dataclasses.replace(rows, values=rows.values.clamp(settings.lowest, settings.highest))
