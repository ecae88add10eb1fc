"""The wave autoencoder: molecules as grids, through a small code, and their atoms found again in what comes out."""

from __future__ import annotations

import dataclasses
import html
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastnuggets.models import WaveAutoencoder
from fastnuggets.models.wave_autoencoder import STRIDE, channel_loss
from fastnuggets.molecules.batch import Molecules, atomic_numbers
from fastnuggets.molecules.bonds import bonded, sdf_record
from fastnuggets.molecules.matching import Score, compare, recovered
from fastnuggets.ops.inverse import Atoms, kernel_warnings
from fastnuggets.systems.base import Draw, Section, Settings, System, option
from fastnuggets.systems.molecule_grids import (
    CLIP,
    PAPER,
    TAKES,
    Drawing,
    GridData,
    GridSettings,
    batches,
    facts_of,
    joined,
    optimizer,
    read_molecules,
    split,
    turned,
    warm_cosine,
)
from fastnuggets.training.fit import Update

SEEN = 0.05  # of an atom's peak: where a grid is above, there is something to see
MEMORY = 0.02  # of a step, in the running means
LEAST_GAIN = 0.05
# What a network is wrong by is no white noise, of which `find_atoms` would want the very size.
CAUTIONS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
CHOSEN = 16  # molecules that the caution is chosen on: atoms are looked for in each six times
VALIDATED = 256  # molecules at most
SHOWN = 64  # molecules at most whose atoms are counted for the page
PICTURED = 4


@dataclasses.dataclass(frozen=True)
class WaveAutoencoderSettings(GridSettings):
    crop: int = option(24, "voxels along an edge while training; the network takes any shape, and less costs less")
    latent: int = option(32, "numbers that a cell of 4 x 4 x 4 voxels is squeezed to")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop < STRIDE or self.crop % STRIDE or self.crop > self.shape:
            raise ValueError(f"crop: expected a multiple of {STRIDE}, at most {self.shape}, got {self.crop}")
        if self.latent < 1:
            raise ValueError(f"latent: expected at least 1, got {self.latent}")


class Counted(NamedTuple):
    """Atoms found in grids, against the true ones."""

    found: Atoms
    truth: Atoms
    scores: list[Score]  # one a channel, and one of all atoms
    recovered: Tensor  # [B] bool: every atom found and nothing else


class Reconstructor(nn.Module):
    """The network, and what its output is smaller and wrong by: whoever looks for atoms in it must know both.

    Least squares give back less than an atom where they are unsure of it, of rare elements least: about half, where
    training is as short as a laptop allows. `find_atoms` refuses what is less than half an atom.
    """

    moments: Tensor
    caution: Tensor

    def __init__(self, network: WaveAutoencoder) -> None:
        super().__init__()
        self.network = network
        # [3, C] means where there are atoms of output squared, output x grid, and grid squared; error 1 to begin with.
        self.register_buffer("moments", torch.tensor([2.0, 1.0, 1.0])[:, None].repeat(1, len(network.scale)))
        self.register_buffer("caution", torch.ones(()))  # of `Drawing.find`

    def forward(self, grid: Tensor) -> Tensor:
        output: Tensor = self.network(grid)
        return output

    def calibrated(self, grid: Tensor) -> Tensor:
        """The output in which an atom is as high as in a grid."""
        return self(grid) / self.gain.view(-1, 1, 1, 1)

    @property
    def gain(self) -> Tensor:
        """[C] slope of the output over the grid."""
        _, product, square = self.moments
        return (product / square).clamp(min=LEAST_GAIN)

    @property
    def error(self) -> Tensor:
        """[C] rms of what the calibrated output differs by from the grid, where there are atoms."""
        output, product, square = self.moments
        wrong = output / self.gain.square() - 2 * product / self.gain + square
        return wrong.clamp(min=0).sqrt()

    @torch.no_grad()
    def track(self, output: Tensor, grid: Tensor, step: int) -> None:
        """Let the moments follow the batches, as batch norm does; a channel without atoms keeps its own."""
        seen = grid.abs() > SEEN
        count = seen.sum((0, 2, 3, 4))
        output = output.float()
        sums = [(values * seen).sum((0, 2, 3, 4)) for values in (output.square(), output * grid, grid.square())]
        mixed = torch.lerp(self.moments, torch.stack(sums) / count.clamp(min=1), max(MEMORY, 1 / (step + 1)))
        self.moments.copy_(torch.where(count > 0, mixed, self.moments))


class WaveAutoencoderSystem(System[GridData]):
    summary = "An autoencoder of molecules as grids of waves, Gaussians or one-hot voxels"
    paper = PAPER
    takes = TAKES
    made = "molecules as the network returns them, SDF"
    clip = CLIP
    Settings: ClassVar[type[Settings]] = WaveAutoencoderSettings

    model: Reconstructor

    @classmethod
    def read(cls, path: Path, settings: Any, *, seed: int, progress: bool = True) -> tuple[dict[str, Any], GridData]:
        if settings.kernel is not None:
            for message in kernel_warnings(*settings.kernel, settings.spacing):
                warnings.warn(message, stacklevel=2)
        molecules = read_molecules(path, settings, seed=seed, progress=progress)
        data = split(molecules, settings.tested, seed, path)
        return facts_of(path, data, Drawing(settings), seed), data

    def __init__(self, settings: Any, facts: dict[str, Any]) -> None:
        self.settings, self.facts = settings, facts
        self.drawing, self.cropped = Drawing(settings), Drawing(settings, settings.crop)
        self.model = Reconstructor(
            WaveAutoencoder(
                len(facts["channels"]),
                width=settings.width,
                latent=settings.latent,
                blocks=settings.blocks,
                scale=facts["scale"],
            )
        )
        self._optimizer = optimizer(self.model, settings.learning_rate)

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [self._optimizer]

    def schedule(self, step: int, steps: int) -> float:
        return warm_cosine(step, steps)

    def updates(self, data: GridData, step: int, draw: Draw) -> Iterator[Update]:
        rows = draw.rows(step, len(data.train), self.settings.batch_size)
        grid = self.cropped.posed(data.train[rows].to(self.device), draw.generator(step))
        output = self.model(grid)
        self.model.track(output, grid, step)
        yield Update("loss", self._optimizer, channel_loss(output, grid, self.model.network.scale))

    @torch.no_grad()
    def validate(self, data: GridData) -> dict[str, float]:
        test = turned(data.test[:VALIDATED], 0, self.settings.shift)
        loss, count = 0.0, 0
        for batch in batches(test):
            grid = self.drawing.still(batch.to(self.device))
            loss += channel_loss(self.model(grid), grid, self.model.network.scale).item() * len(batch)
            count += len(batch)
        return {"loss": loss / count}

    def end(self, data: GridData) -> None:
        self.choose_caution(data.train[:CHOSEN])

    def choose_caution(self, learned: Molecules) -> None:
        """Of CAUTIONS, that by which most is right of the atoms of molecules of the training (by F1)."""
        known = turned(learned, 1, self.settings.shift)
        f1 = {caution: self.counted(known, caution).scores[-1].f1 for caution in CAUTIONS}
        self.model.caution.fill_(max(CAUTIONS, key=lambda caution: f1[caution]))

    @torch.no_grad()
    def reconstruct(self, molecules: Molecules, caution: float | None = None) -> Atoms:
        """The atoms that the network gives back of molecules in their boxes, as they stand; `caution` of `find`."""
        self.model.eval()
        caution = self.model.caution.item() if caution is None else caution
        found = []
        for batch in batches(molecules):
            output = self.model.calibrated(self.drawing.still(batch.to(self.device)))
            found.append(self.drawing.find(output, self.model.error, caution))
        return joined(found)

    def counted(self, molecules: Molecules, caution: float | None = None) -> Counted:
        found, truth = self.reconstruct(molecules, caution), self.drawing.truth(molecules)
        return Counted(found, truth, compare(found, truth, len(self.drawing.names)), recovered(found, truth))

    def generate(self, count: int, *, seed: int, data: str = "", **options: Any) -> Iterator[str]:
        """Records of an SDF file: what the network returns of molecules that it is given. It has no prior to draw from.

        Args:
            count: molecules at most.
            seed: of the conformers, where they are made.
            data: a file of molecules; "": those of the training's own file that were held out.

        Bond orders are determined where hydrogen has a channel; otherwise near atoms are joined by single bonds. The
        field `bonds` of a record says which; `smiles` is of what went in, `atoms` how many were found for how many
        there were. Of elements that share a channel the first is written.
        """
        if options:
            raise ValueError(f"no such option of the autoencoder: {', '.join(options)}")
        molecules = self._given(data, seed)
        numbers = torch.tensor(atomic_numbers([group[0] for group in self.drawing.groups]))
        for batch in batches(molecules[:count]):
            counted = self.counted(batch)
            ptr, every = counted.found.ptr.tolist(), batch.ptr.diff().tolist()
            for i, name in enumerate(batch.names):
                own = slice(ptr[i], ptr[i + 1])
                mol, level = bonded(numbers[counted.found.channels[own]].tolist(), counted.found.positions[own].numpy())
                whole = "yes" if counted.recovered[i] else "no"
                properties = {
                    "smiles": batch.smiles[i],
                    "bonds": level,
                    "atoms": f"{ptr[i + 1] - ptr[i]} of {every[i]}",
                }
                # Whoever writes records ends each with a line break.
                yield sdf_record(mol, name, {**properties, "all atoms right": whole}).removesuffix("\n")

    def _given(self, data: str, seed: int) -> Molecules:
        if data:
            return read_molecules(Path(data), self.settings, seed=seed)
        path = Path(self.facts["data"])
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the file of the training is not there any more; name one (data)")
        molecules = read_molecules(path, self.settings, seed=self.facts["seed"])
        return split(molecules, self.settings.tested, self.facts["seed"], path).test

    def evaluate(self, path: Path, *, seed: int = 0) -> dict[str, float]:
        """Of all molecules of a file that fit the box, turned at random: how many of their atoms come back."""
        molecules = turned(read_molecules(path, self.settings, seed=seed), seed, self.settings.shift)
        return {"molecules": float(len(molecules)), **self.figures(self.counted(molecules))}

    def figures(self, counted: Counted) -> dict[str, float]:
        """Shares of molecules and atoms, and angstrom; of elements that are there, and where something was found."""
        found = {"molecules recovered": counted.recovered.double().mean().item()}
        for name, score in zip(["all", *self.drawing.names], [counted.scores[-1], *counted.scores], strict=False):
            if score.true:
                prefix = "" if name == "all" else f"{name} "
                found |= {f"{prefix}precision": score.precision, f"{prefix}recall": score.recall}
                found[f"{prefix}position error"] = score.rmse
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def sections(self, data: GridData) -> list[Section]:
        from fastnuggets.figures import share, table

        test = turned(data.test[:SHOWN], 0, self.settings.shift)
        counted = self.counted(test)
        rows = [
            [html.escape(name), str(s.true), str(s.found), share(s.precision), share(s.recall), f"{s.rmse:.3f}"]
            for name, s in zip([*self.drawing.names, "all"], counted.scores, strict=True)
        ]
        atoms = table(["", "true", "found", "precision %", "recall %", "rmse Å"], rows)
        whole = (
            f"<p>{int(counted.recovered.sum())} of {len(test)} held-out molecules came back whole: every atom of the"
            " right element within half an ångström, and nothing else.</p>"
        )
        return [Section("Atoms that come back", whole + atoms), Section("Before and after", self._picture(test))]

    @torch.no_grad()
    def _picture(self, molecules: Molecules) -> str:
        from fastnuggets.figures import image, png, pyplot

        few = molecules[:PICTURED]
        grid = self.drawing.still(few.to(self.device))
        output = self.model(grid)
        figure, axes = pyplot().subplots(2, len(few), figsize=(2.2 * len(few), 4.4), squeeze=False)
        figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02)
        for row, volumes in zip(axes, (grid, output), strict=True):
            for axis, volume in zip(row, volumes.sum(1).float().cpu(), strict=True):
                middle = volume.shape[0] // 2
                plane = volume[middle - 1 : middle + 1].mean(0).numpy()
                axis.imshow(plane, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
        return (
            "<p>The middle plane of held-out molecules, channels added: what went in, and below what came out.</p>"
            + image(png(figure), "Middle planes of molecules before and after the network")
        )
