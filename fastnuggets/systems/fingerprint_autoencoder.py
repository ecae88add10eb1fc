"""druGAN: a variational and an adversarial autoencoder of fingerprints, alike but for what regularizes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastnuggets import ops
from fastnuggets.models.fingerprint_autoencoder import (
    FingerprintAAE,
    FingerprintAutoencoder,
    FingerprintVAE,
    bits_loss,
    discriminator_loss,
    encoder_loss,
)
from fastnuggets.molecules.fingerprints import BITS, KINDS, unpack
from fastnuggets.systems.base import Draw, Section, Settings, System, option
from fastnuggets.systems.fingerprint_data import LEAST, Split, load, numbers, rows_of, split
from fastnuggets.systems.fingerprint_measures import against_prior, judge, nearest, regression
from fastnuggets.training.fit import Update

TAKES = "molecules: .smi .csv .sdf .parquet, also .gz; or their fingerprints, saved: .npz"
SAMPLES = 1000  # that coverage is counted among
_BLOCK = 4096  # rows that go through the network at a time


@dataclasses.dataclass(frozen=True)
class FingerprintSettings(Settings):
    """What both are told."""

    batch_size: int = option(1024, "fingerprints in a batch, of all processes together")
    kind: str = option("maccs", "of the fingerprints", KINDS)
    hidden: int = option(256, "width of the two hidden layers on each side")
    latent: int = option(10, "numbers of a code")
    prior_std: float = option(1.0, "standard deviation of the prior")
    weight: float = option(1.0, "of the divergence from the prior")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "latent", "prior_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not self.weight >= 0:
            raise ValueError(f"weight: expected 0 or more, got {self.weight}")


@dataclasses.dataclass(frozen=True)
class AAESettings(FingerprintSettings):
    latent: int = option(20, "numbers of a code")
    weight: float = option(1.0, "of the adversary: factor of the learning rate of the encoder's steps against it")


class FingerprintSystem(System[Split]):
    """What the two have in common."""

    paper = "Kadurin et al., druGAN, Molecular Pharmaceutics 14 (9), 2017"
    takes = TAKES
    made = "fingerprints, one string of 0 and 1 a line"
    Settings: ClassVar[type[Settings]] = FingerprintSettings
    network: ClassVar[type[FingerprintAutoencoder]]

    model: FingerprintAutoencoder

    @classmethod
    def read(cls, path: Path, settings: Any, *, seed: int, progress: bool = True) -> tuple[dict[str, Any], Split]:
        rows = rows_of(path, settings.kind, progress=progress)
        data = split(rows, settings.tested, seed, path)
        facts = {"bits": BITS[settings.kind], "kind": settings.kind, "molecules": len(rows)}
        return facts | {"learned": len(data.train), "held_out": len(data.test)}, data

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        self.settings, self.facts = settings, facts
        self.model = self.network(
            facts["bits"], latent=settings.latent, hidden=[settings.hidden] * 2, prior_std=settings.prior_std
        )

    def validate(self, data: Split) -> dict[str, float]:
        return self.figures(data.test.packed, seed=0)

    def figures(self, packed: Tensor, *, seed: int) -> dict[str, float]:
        """Of fingerprints [N, bytes]; the model is in evaluation mode."""
        sums: dict[str, float] = {}
        with torch.no_grad():
            for number, rows in enumerate(packed.split(_BLOCK)):
                for name, value in self.losses(self.unpacked(rows), key=_key(self.device, seed, number)).items():
                    sums[name] = sums.get(name, 0.0) + value * len(rows)
        return {name: value / len(packed) for name, value in sums.items()}

    def losses(self, x: Tensor, *, key: Tensor) -> dict[str, float]:
        """Means over rows of bits [B, bits]."""
        raise NotImplementedError

    def generate(self, count: int, *, seed: int, database: str = "", rounded: bool = False) -> Iterator[str]:
        """Fingerprints drawn from the model, a string of 0 and 1 each.

        Args:
            database: a file of molecules, or of their fingerprints: then the line goes on with the likeliest of them,
                its SMILES, its name, and ln of its probability, tabs in between.
            rounded: each bit is the likelier value instead of a draw.
        """
        self.model.eval()
        yield from lines(
            count, seed, self.facts["kind"], lambda key, size: self.model.decode(self.model.prior(size, key=key)),
            self.device, database, rounded,
        )  # fmt: skip

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """Figures of a file's molecules, of samples beside them, and how far a linear function of the codes tells
        their logP and TPSA and every column of numbers."""
        self.model.eval()
        known = load(path, self.facts["kind"])
        packed = torch.from_numpy(np.array(known.packed))
        if len(packed) < LEAST:
            raise ValueError(f"{path}: {len(packed)} molecules, {LEAST} are needed")
        found = {"molecules": float(len(packed)), **self.figures(packed, seed=seed)}
        codes, fit = self.codes(packed, seed=seed)
        found |= {
            "largest |mean| of a latent": fit.mean.abs().max().item(),
            "mean std of a latent": fit.std.mean().item(),
        }
        found |= {"largest KS distance": fit.ks.max().item(), "energy distance": fit.energy, "energy p": fit.energy_p}
        made = judge(self.samples(SAMPLES, seed), packed)
        found |= {f"coverage of {SAMPLES}": float(made.covered), "nearest ln p, best": made.best}
        found |= {
            "nearest ln p, mean": made.mean,
            "cosine of means": made.mean_cosine,
            "cosine of stds": made.std_cosine,
        }
        for name, values in numbers(path, known).items():
            there = values.isfinite()
            found[f"R² of {name}"] = regression(codes[there], values[there])[0]
        return found

    @torch.no_grad()
    def samples(self, count: int, seed: int) -> Tensor:
        """Logits [count, bits] of codes from the prior."""
        logits: Tensor = self.model.decode(self.model.prior(count, key=_key(self.device, seed, -1)))
        return logits

    @torch.no_grad()
    def codes(self, packed: Tensor, *, seed: int) -> tuple[Tensor, Any]:
        """Codes [N, latent] as the decoder is trained with them, and how they fit the prior."""
        parts = [
            self.code(self.unpacked(rows), key=_key(self.device, seed, number))
            for number, rows in enumerate(packed.split(_BLOCK))
        ]
        codes = torch.cat(parts).cpu()
        mixed = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))]
        prior = self.model.prior(500, key=_key(self.device, seed, -2)).cpu()
        return codes, against_prior(mixed, prior, self.settings.prior_std, seed=seed)

    def code(self, x: Tensor, *, key: Tensor) -> Tensor:
        return self.model.encode(x, key=key)

    def sections(self, data: Split) -> list[Section]:
        from fastnuggets.systems.fingerprint_pictures import code_section, sample_section

        codes, fit = self.codes(data.test.packed, seed=0)
        logits = self.samples(SAMPLES, 0)
        return [
            sample_section(logits, data.train, "learned fingerprints"),
            code_section(codes, fit, self.settings.prior_std, data.test),
        ]

    def unpacked(self, packed: Tensor) -> Tensor:
        return unpack(packed.to(self.device), self.facts["bits"]).float()


class FingerprintVAESystem(FingerprintSystem):
    summary = "Fingerprints, with the divergence from a normal prior (druGAN's VAE)"
    network = FingerprintVAE

    model: FingerprintVAE

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        super().__init__(settings, facts)
        self.adam = torch.optim.Adam(self.model.parameters(), settings.learning_rate)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self.adam]

    def updates(self, data: Split, step: int, draw: Draw) -> Iterator[Update]:
        rows = draw.rows(step, len(data.train), self.settings.batch_size)
        x = self.unpacked(data.train.packed[rows])
        key = ops.noise_key(self.device, generator=draw.generator(step))
        code, kl = self.model.divergence(x, key=key)
        loss = bits_loss(self.model.decode(code), x) + self.settings.weight * kl
        yield Update("loss", self.adam, loss.mean())

    def losses(self, x: Tensor, *, key: Tensor) -> dict[str, float]:
        mean, kl = self.model.divergence(x)
        drawn = bits_loss(self.model.decode(self.code(x, key=key)), x)
        return {"bound": (drawn + kl).mean().item(), **_rebuilt(self.model.decode(mean), x), "kl": kl.mean().item()}

    def code(self, x: Tensor, *, key: Tensor) -> Tensor:
        from fastnuggets.nn import sampling

        with sampling(self.model):  # the prior is to be met by draws, not by means
            return self.model.encode(x, key=key)


class FingerprintAAESystem(FingerprintSystem):
    """Three updates take turns, each on a batch of its own: discriminator, encoder against it, autoencoder."""

    summary = "Fingerprints, with an adversary that knows the prior (druGAN's AAE)"
    Settings: ClassVar[type[Settings]] = AAESettings
    network = FingerprintAAE

    model: FingerprintAAE

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        super().__init__(settings, facts)
        model, rate = self.model, settings.learning_rate
        encoder = [*model.body.parameters(), *model.head.parameters()]
        # Adam takes no notice of a factor of the loss: the weight is one of the rate.
        self.adams = [
            torch.optim.Adam(model.discriminator.parameters(), rate),
            torch.optim.Adam(encoder, rate * settings.weight),
            torch.optim.Adam([*encoder, *model.decoder.parameters()], rate),
        ]

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return self.adams

    def updates(self, data: Split, step: int, draw: Draw) -> Iterator[Update]:
        model = self.model

        def batch(turn: int) -> Tensor:
            rows = draw.rows(3 * step + turn, len(data.train), self.settings.batch_size)
            return self.unpacked(data.train.packed[rows])

        def prior(turn: int) -> Tensor:
            return model.prior(len(x), key=ops.noise_key(self.device, generator=draw.generator(step, turn + 2)))

        x = batch(0)
        with torch.no_grad():
            code = model.encode(x)
        yield Update("discriminator", self.adams[0], discriminator_loss(model.discriminator, code, prior(0)))
        x = batch(1)
        yield Update("encoder", self.adams[1], encoder_loss(model.discriminator, model.encode(x), prior(1)))
        x = batch(2)
        yield Update("autoencoder", self.adams[2], bits_loss(model(x), x).mean())

    def losses(self, x: Tensor, *, key: Tensor) -> dict[str, float]:
        code = self.model.encode(x)
        told = discriminator_loss(self.model.discriminator, code, self.model.prior(len(x), key=key))
        return {**_rebuilt(self.model.decode(code), x), "discriminator": told.item()}


def lines(
    count: int,
    seed: int,
    kind: str,
    draw: Callable[[Tensor, int], Tensor],
    device: torch.device,
    database: str,
    rounded: bool,
) -> Iterator[str]:
    """Lines of generated fingerprints, of logits [size, bits] that `draw` makes with a key; see `generate` above."""
    known = load(Path(database), kind) if database else None
    for number, first in enumerate(range(0, count, SAMPLES)):
        with torch.no_grad():
            # Whole blocks: what is drawn does not depend on how many are asked for.
            logits = draw(_key(device, seed, 2 * number), SAMPLES)[: count - first]
        limit: Tensor | float = 0.5
        if not rounded:
            limit = ops.noise("uniform", logits.shape, device=device, key=_key(device, seed, 2 * number + 1))
        bits = (logits.sigmoid() > limit).to(torch.uint8).cpu().numpy()
        texts = ["".join(row) for row in bits.astype("U1")]
        if known is None:
            yield from texts
            continue
        found = nearest(logits, known.tensor())
        for text, row, score in zip(texts, found.row[:, 0].tolist(), found.score[:, 0].tolist(), strict=True):
            smiles, name = (of[row] if len(of) else "" for of in (known.smiles, known.names))
            yield f"{text}\t{smiles}\t{name}\t{score:.4f}"


def _key(device: torch.device, seed: int, offset: int) -> Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


def _rebuilt(logits: Tensor, x: Tensor) -> dict[str, float]:
    right = (logits > 0) == (x > 0.5)
    return {
        "nats": bits_loss(logits, x).mean().item(),
        "bit accuracy": right.double().mean().item(),
        "all bits right": right.all(1).double().mean().item(),
    }
