"""The page of the demo: one HTML file with its pictures, its data and its viewer inside."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets import __version__
from fastnuggets.demo import (
    CHANNELS,
    REPRESENTATIONS,
    SCALE_POWER,
    SPACING,
    WAVE,
    Pose,
    Result,
    draw,
)
from fastnuggets.figures import INK, chart, duration, image, png, pyplot, share, svg, table
from fastnuggets.molecules.files import need
from fastnuggets.molecules.matching import GATE, Score, match
from fastnuggets.ops.voxelize import voxelize
from fastnuggets.page import PAGE

COLORS = ("#6f7b8b", "#3366e6", "#e5484d", "#e2a400", "#2ba35a")  # of CHANNELS
POSITIVE, NEGATIVE = "#1d7f8c", "#e07a3f"
SERIES = {"one-hot": "#8b8d98", "Gaussian, narrow": "#c98a2b", "Gaussian, wide": "#b0568f", "wave": "#2f6fed"}
CREST, TROUGH = 0.5, 0.3  # levels of the surfaces, of an atom's peak
BEAD, BEAD_SIGMA = 0.5, 0.36  # a Gaussian of 0.36 angstrom is one half at 0.42
BOND = {
    "C": 0.76,
    "N": 0.71,
    "O": 0.66,
    "S": 1.05,
    "halogen": 1.1,
}  # covalent, angstrom; halogens: Cl to Br
LARGE = 14  # heavy atoms


class Volumes(NamedTuple):
    """What of one molecule's grid is drawn, at half the grid's spacing."""

    troughs: Tensor  # [D, H, W] minus the lowest of the channels
    crests: Tensor  # [C, D, H, W] the grid itself
    beads: Tensor  # [C, D, H, W] above BEAD near atoms


class Mesh(NamedTuple):
    """Triangles of one or several surfaces."""

    points: np.ndarray  # [n, 3] angstrom
    faces: np.ndarray  # [m, 3]
    kind: np.ndarray  # [m] channel, or -1 for the glass


class Shown(NamedTuple):
    """One molecule of the page, turned so that it lies flat."""

    name: str
    smiles: str
    axes: np.ndarray  # [3, 3] rows: the directions shown to the right, up and towards the reader
    truth: np.ndarray  # [n, 3]
    truth_channels: np.ndarray
    found: np.ndarray  # [m, 3]
    found_channels: np.ndarray
    right: np.ndarray  # [m] bool
    missed: np.ndarray  # [n] bool
    before: Volumes
    after: Volumes


def write(result: Result, out: Path) -> Path:
    """Writes report.html and preview.png to the folder `out`; returns the page's path."""
    shown = [_shown(result, index) for index in _chosen(result)]
    every = result.scores[WAVE.name]["autoencoder"][-1]
    plan = result.plan
    latent = plan.latent * (plan.shape // 4) ** 3
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in result.data.left_out.items())
    page = Template(PAGE).substitute(
        title="Molecules as waves, and back",
        viewer=json.dumps([_viewer(molecule) for molecule in shown], separators=(",", ":")).replace("<", "\\u003c"),
        colors=json.dumps(COLORS),
        legend=_legend(),
        recall=f"{every.recall:.1%}",
        precision=f"{every.precision:.1%}",
        rmse=f"{every.rmse:.2f} Å",
        smaller=f"{len(CHANNELS) * plan.shape**3 / latent:.1f}×",
        matched=f"{every.matched:,}",
        true=f"{every.true:,}",
        found=f"{every.found:,}",
        tested=len(result.data.test),
        gate=f"{GATE:g}",
        gallery=image(_gallery(shown), "Molecules as wave surfaces before and after the autoencoder"),
        slices=image(_slices(result, shown[0]), "Slices through one molecule in four representations"),
        noise_chart=_noise_chart(result),
        loss_chart=_loss_chart(result),
        element_table=_element_table(result),
        condition_table=_condition_table(result),
        details=_details(result),
        residual=", ".join(f"{name} {_length(value)}" for name, value in zip(CHANNELS, result.residual, strict=True)),
        speed_table=_speed_table(result),
        train_molecules=f"{len(result.data.train):,}",
        read=f"{result.data.read:,}",
        left_out=left_out or "none",
        steps=f"{result.training.step:,}",
        batch=plan.batch,
        crop=plan.crop,
        shape=plan.shape,
        edge=f"{plan.shape * SPACING:g}",
        latent=f"{latent:,}",
        latent_cell=f"{plan.latent} × {plan.shape // 4}³",
        voxels=f"{len(CHANNELS) * plan.shape**3:,}",
        parameters=f"{result.parameters:,}",
        training_time=duration(result.training.seconds),
        total_time=duration(sum(result.seconds.values())),
        stages=", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()),
        seed=result.seed,
        power=f"{SCALE_POWER:g}",
        noise=f"{result.noise:.2f}",
        sigma=f"{WAVE.sigma:g}",
        omega=f"{WAVE.omega:g}",
        machine=html.escape(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        versions=html.escape(f"fastnuggets {__version__}, torch {torch.__version__}"),
    )
    (out / "preview.png").write_bytes(_preview(result, shown[0]))
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _chosen(result: Result) -> list[int]:
    """Test molecules worth a look, whatever came out of them: not small, of many kinds of atoms, the flattest first."""
    ptr, truth = result.truth.ptr.tolist(), result.truth
    worth = []
    for index, (start, end) in enumerate(pairwise(ptr)):
        places = truth.positions[start:end]
        thickness = (places @ _flat_axes(places).T).std(0)[2].item()
        kinds = len(truth.channels[start:end].unique())
        worth.append((end - start >= LARGE, min(4, kinds), -thickness, index))
    return [index for *_, index in sorted(worth, reverse=True)[: result.plan.shown]]


def _shown(result: Result, index: int) -> Shown:
    truth, found = result.truth, result.found
    partner, _ = match(found, truth)
    (t0, t1), (f0, f1) = truth.ptr[index : index + 2].tolist(), found.ptr[index : index + 2].tolist()
    missed = torch.ones(len(truth.positions), dtype=torch.bool)
    missed[partner[partner >= 0]] = False
    positions = truth.positions[t0:t1]
    return Shown(
        result.data.test.names[index],
        result.data.test.smiles[index],
        _flat_axes(positions).numpy(),
        positions.numpy(),
        truth.channels[t0:t1].numpy(),
        found.positions[f0:f1].numpy(),
        found.channels[f0:f1].numpy(),
        (partner[f0:f1] >= 0).numpy(),
        missed[t0:t1].numpy(),
        _volumes(result.grid[index], positions, truth.channels[t0:t1]),
        _volumes(result.output[index], found.positions[f0:f1], found.channels[f0:f1]),
    )


def _flat_axes(positions: Tensor) -> Tensor:
    """[3, 3] rotation that lays the atoms as flat as they go, the longest way to the right."""
    axes = torch.linalg.svd(positions - positions.mean(0), full_matrices=True).Vh
    return axes * torch.tensor([1.0, 1.0, torch.linalg.det(axes).sign().item()])[:, None]


def _volumes(grid: Tensor, positions: Tensor, kinds: Tensor) -> Volumes:
    crests = torch.stack([_finer(channel) for channel in grid])
    beads = voxelize(
        positions,
        kinds,
        shape=tuple(crests.shape[1:]),
        spacing=SPACING / 2,
        num_channels=len(CHANNELS),
        density="gaussian",
        sigma=BEAD_SIGMA,
        combine="max",
    )
    return Volumes(-crests.amin(0), crests, beads[0])


def _surfaces(volumes: Volumes) -> Mesh:
    parts = [_surface(channel, CREST, SPACING / 2, kind) for kind, channel in enumerate(volumes.crests)]
    # The glass is smooth and large: the coarse grid is enough for it, and quicker to turn.
    coarse = torch.nn.functional.avg_pool3d(volumes.troughs[None], 2)[0]
    parts.append(_surface(coarse, TROUGH, SPACING, -1))
    offsets = np.cumsum([0, *(len(part.points) for part in parts[:-1])])
    return Mesh(
        np.concatenate([part.points for part in parts]),
        np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)]),
        np.concatenate([part.kind for part in parts]),
    )


def _surface(volume: Tensor, level: float, spacing: float, kind: int) -> Mesh:
    values = volume.numpy()
    if not values.min() < level < values.max():
        return Mesh(np.empty((0, 3)), np.empty((0, 3), np.int64), np.empty(0, np.int64))
    marching_cubes = need("skimage.measure").marching_cubes
    points, faces, *_ = marching_cubes(values, level, gradient_direction="ascent")  # normals outwards
    middle = (np.array(volume.shape) - 1) / 2
    return Mesh((points - middle) * spacing, faces.astype(np.int64), np.full(len(faces), kind))


def _finer(volume: Tensor) -> Tensor:
    """[D, H, W] at half the spacing, about the same middle: waves are band-limited, so their spectrum has it all."""
    n = torch.tensor(volume.shape)
    spectrum = torch.fft.fftshift(torch.fft.fftn(volume))
    for axis, size in enumerate(n.tolist()):
        # The first fine voxel lies a quarter of a coarse one further out.
        phase = torch.exp(-2j * math.pi * 0.25 * (torch.arange(size) - size // 2) / size)
        spectrum = spectrum * phase.view([-1 if a == axis else 1 for a in range(3)])
    pad = [int(size) // 2 for size in n.flip(0) for _ in range(2)]
    return torch.fft.ifftn(torch.fft.ifftshift(torch.nn.functional.pad(spectrum, pad))).real * 8


def _bonds(positions: np.ndarray, kinds: np.ndarray) -> list[tuple[int, int]]:
    """Pairs as near as a bond."""
    radius = np.array([BOND[CHANNELS[kind]] for kind in kinds])
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    near = (apart < 1.2 * (radius[:, None] + radius[None])) & (apart > 0)
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near)), strict=True)]


def _viewer(molecule: Shown) -> dict[str, Any]:
    def side(positions: np.ndarray, kinds: np.ndarray, good: np.ndarray, volumes: Volumes) -> dict[str, Any]:
        mesh = _surfaces(volumes)
        return {
            "atoms": [
                [*(round(float(value), 3) for value in place), int(kind), int(right)]
                for place, kind, right in zip(positions @ molecule.axes.T, kinds, good, strict=True)
            ],
            "bonds": _bonds(positions, kinds),
            "points": _packed(mesh.points @ molecule.axes.T * 1000, np.int16),
            "faces": _packed(mesh.faces, np.uint16),
            "kinds": _packed(mesh.kind, np.int8),
        }

    before = side(molecule.truth, molecule.truth_channels, ~molecule.missed, molecule.before)
    after = side(molecule.found, molecule.found_channels, molecule.right, molecule.after)
    after["missed"] = [atom[:4] for atom in before["atoms"] if not atom[4]]
    return {
        "name": f"molecule {molecule.name}" if molecule.name.isdigit() else molecule.name,
        "smiles": molecule.smiles,
        "before": before,
        "after": after,
    }


def _packed(values: np.ndarray, kind: type) -> str:
    limits = np.iinfo(kind)
    if len(values) and not limits.min <= values.min() <= values.max() <= limits.max:
        raise ValueError(f"a surface of {len(values)} numbers is too large for the viewer")
    return base64.b64encode(np.ascontiguousarray(values, f"<{np.dtype(kind).str[1:]}").tobytes()).decode()


# Pictures


def _render(volumes: Volumes, axes: np.ndarray, frame: Sequence[float], size: int = 360) -> np.ndarray:
    """RGBA [height, size, 4] of what one sees looking along the third axis; `frame` is half the box looked at.

    One ray a pixel: the beads are opaque, the glass before them is denser where it is seen edge-on.
    """
    right, up, near = frame
    depth = torch.linspace(near, -near, math.ceil(2 * near / 0.2))  # a ray's steps are finer than a bead
    rows = torch.linspace(-up, up, round(size * up / right))
    z, y, x = torch.meshgrid(depth, rows, torch.linspace(-right, right, size), indexing="ij")
    turn = torch.from_numpy(axes)

    def image(volume: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whether a ray meets the surface, how deep, its normal there, and the point."""
        values = _sample(volume[None], torch.stack([x, y, z], -1) @ turn)[0]
        inside = values > level
        first = inside.int().argmax(0, keepdim=True).clamp(min=1)
        here, before = values.gather(0, first), values.gather(0, first - 1)
        part = ((here - level) / (here - before).clamp(min=1e-6)).clamp(0, 1)
        meets = depth[first] + part * (depth[0] - depth[1])
        point = torch.stack([x[:1], y[:1], meets], -1) @ turn
        slope = _sample(torch.stack(torch.gradient(volume)), point)  # [3, 1, size, size]
        normal = torch.nn.functional.normalize(-slope.movedim(0, -1) @ turn.T, dim=-1)
        return inside.any(0), meets[0], normal[0], point

    bead, bead_depth, bead_normal, point = image(volumes.beads.amax(0), BEAD)
    glass, glass_depth, glass_normal, _ = image(volumes.troughs, TROUGH)
    kind = _sample(volumes.beads, point)[:, 0].argmax(0)
    light = torch.nn.functional.normalize(torch.tensor([-0.4, 0.55, 0.73]), dim=0)
    palette = torch.tensor([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS])
    lit = (bead_normal @ light).clamp(0, 1)[..., None]
    color = torch.where(bead[..., None], palette[kind] * (0.4 + 0.6 * lit) + 0.5 * lit**24, 0.0)
    shine = (glass_normal @ light).clamp(0, 1)[..., None] ** 30
    veil = 0.13 + 0.6 * (1 - glass_normal[..., 2].abs()[..., None]) ** 2 + 0.25 * shine
    veil = torch.where((glass & (~bead | (glass_depth > bead_depth)))[..., None], veil, 0.0)
    tint = torch.tensor([0.44, 0.60, 0.83]) * (1 - shine) + shine
    solid = bead[..., None].float()
    alpha = veil + (1 - veil) * solid
    mixed = (veil * tint + (1 - veil) * solid * color) / alpha.clamp(min=1e-6)
    return torch.cat([mixed, alpha], -1).clamp(0, 1).flip(0).numpy()


def _sample(volume: Tensor, points: Tensor) -> Tensor:
    """[C, D, H, W] at points [Z, Y, X, 3] (angstrom) -> [C, Z, Y, X]; zero outside."""
    edge = torch.tensor(volume.shape[1:]) * SPACING / 4
    places = (points / edge).flip(-1)[None].float()
    return torch.nn.functional.grid_sample(volume[None], places, align_corners=False)[0]


def _paint_atoms(
    axis: Any, positions: np.ndarray, kinds: np.ndarray, axes: np.ndarray, wrong: np.ndarray | None = None
) -> None:
    from matplotlib.patches import Circle

    flat = positions @ axes.T
    for i, j in _bonds(positions, kinds):
        middle = (flat[i] + flat[j]) / 2
        for end, kind in ((flat[i], kinds[i]), (flat[j], kinds[j])):
            axis.plot(
                *np.stack([end, middle])[:, :2].T, color=COLORS[kind], lw=5, zorder=end[2], solid_capstyle="round"
            )
    for index in np.argsort(flat[:, 2]):
        x, y, z = flat[index]
        for part in np.linspace(1, 0, 12):
            color = _lighter(COLORS[kinds[index]], 0.85 * (1 - part) ** 1.5)
            axis.add_patch(
                Circle((x - 0.12 * (1 - part), y + 0.12 * (1 - part)), 0.42 * part + 0.02, color=color, zorder=z + 0.3)
            )
        if wrong is not None and wrong[index]:
            axis.add_patch(Circle((x, y), 0.6, fill=False, edgecolor="#d6208b", lw=2, zorder=z + 1))


def _lighter(color: str, amount: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(value + (1 - value) * amount for value in to_rgb(color))


def _frame(molecule: Shown) -> tuple[float, float, float]:
    """Half the box, four wide and three high, that holds the molecule lying flat and its waves."""
    right, up, near = np.abs(molecule.truth @ molecule.axes.T).max(0) + 1.6
    right = max(right, up / 0.75)
    return float(right), float(0.75 * right), float(near)


def _gallery(shown: Sequence[Shown]) -> bytes:
    figure, axes = pyplot().subplots(2, len(shown), figsize=(2.4 * len(shown), 3.6), squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    for column, molecule in zip(axes.T, shown, strict=True):
        for axis, volumes in zip(column, (molecule.before, molecule.after), strict=True):
            axis.imshow(_render(volumes, molecule.axes, _frame(molecule)))
            axis.axis("off")
    return png(figure)


def _signed(values: np.ndarray) -> np.ndarray:
    """[H, W] -> RGBA: the colour is the sign and the opacity the size, so it lies on any background."""
    from matplotlib.colors import to_rgb

    colors = np.where((values > 0)[..., None], to_rgb(POSITIVE), to_rgb(NEGATIVE))
    return np.concatenate([colors, (np.abs(values) / np.abs(values).max())[..., None]], -1)


def _flat_slices(result: Result, molecule: Shown) -> list[np.ndarray]:
    """The middle plane of the molecule in each representation, channels added."""
    one = result.data.test[result.data.test.names.index(molecule.name)]
    pose = Pose(_flat_axes(one.coords)[None], torch.zeros(1, 3))
    slices = []
    for representation in REPRESENTATIONS:
        grid = draw(one, representation, result.plan.shape, pose)[0].sum(0)
        middle = result.plan.shape // 2
        # One-hot voxels of a molecule that is not quite flat lie in several planes: show them all.
        plane = grid.amax(2) if representation.density == "nearest" else grid[:, :, middle - 1 : middle + 1].mean(2)
        slices.append(plane.T.numpy())
    return slices


def _slices(result: Result, molecule: Shown) -> bytes:
    figure, axes = pyplot().subplots(1, len(REPRESENTATIONS), figsize=(12, 3.05))
    figure.subplots_adjust(0.001, 0.005, 0.999, 0.995, 0.03, 0)
    for axis, plane in zip(axes, _flat_slices(result, molecule), strict=True):
        axis.imshow(_signed(plane), origin="lower", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color="#8888", linewidth=0.6)
    return png(figure)


def _preview(result: Result, molecule: Shown) -> bytes:
    figure, axes = pyplot().subplots(1, 4, figsize=(14, 3.05), facecolor="white")
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.89, 0.02, 0)
    right, up, _ = frame = _frame(molecule)
    _paint_atoms(axes[0], molecule.truth, molecule.truth_channels, molecule.axes)
    for axis, volumes in zip(axes[1:3], (molecule.before, molecule.after), strict=True):
        axis.imshow(_render(volumes, molecule.axes, frame), extent=(-right, right, -up, up))
    _paint_atoms(axes[3], molecule.found, molecule.found_channels, molecule.axes, ~molecule.right)
    titles = ("a molecule", "as a wave grid", "after the autoencoder", "the atoms found in that")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlim=(-right, right), ylim=(-up, up), aspect="equal")
        axis.axis("off")
        axis.set_title(title, fontsize=14, color="#333")
    return png(figure, 110, transparent=False, facecolor="white")


def _noise_chart(result: Result) -> str:
    figure, axis = chart(6.2, 3.2)
    for name, scores in result.scores.items():
        conditions = [condition for condition in scores if condition != "autoencoder"]
        # Both must be good to be right: the harmonic mean of precision and recall.
        values = [_f1(scores[condition][-1]) for condition in conditions]
        axis.plot(range(len(conditions)), values, color=SERIES[name], marker="o", lw=2.2, ms=5, label=name)
    axis.set_xticks(range(len(conditions)), conditions)
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("F1 of the atoms found", color=INK)
    axis.legend(frameon=False, labelcolor=INK, loc="lower left")
    return svg(figure, "Share of atoms found against noise, for each representation")


def _f1(score: Score) -> float:
    return 2 * score.matched / (score.true + score.found) if score.true + score.found else math.nan


def _loss_chart(result: Result) -> str:
    figure, axis = chart(6.2, 3.2)
    losses = np.array(result.training.losses)
    axis.plot(losses, color=SERIES["wave"], alpha=0.25, lw=0.8)
    width = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    axis.plot(np.arange(len(smooth)) + width - 1, smooth, color=SERIES["wave"], lw=2.2)
    axis.set_yscale("log")
    low, high = smooth.min() * 0.8, max(losses[:5].max(), smooth.max()) * 1.1
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5) if low < tick < high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.set_ylim(low, high)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel("loss", color=INK)
    return svg(figure, "Loss of each training step")


# Tables


def _legend() -> str:
    items = (
        f'<span><i style="background:{color}"></i>{name}</span>' for name, color in zip(CHANNELS, COLORS, strict=True)
    )
    return "".join(items)


def _length(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _element_table(result: Result) -> str:
    scores = result.scores[WAVE.name]["autoencoder"]
    rows = [
        [name, str(s.true), str(s.found), str(s.matched), share(s.precision), share(s.recall), _length(s.rmse)]
        for name, s in zip((*CHANNELS, "all"), scores, strict=True)
    ]
    return table(["", "true", "found", "right", "precision %", "recall %", "rmse Å"], rows)


def _condition_table(result: Result) -> str:
    rows = []
    for name, conditions in result.scores.items():
        for condition, scores in conditions.items():
            s = scores[-1]
            rows.append([f"{name}, {condition}", share(s.precision), share(s.recall), _length(s.rmse)])
    return table(["all elements", "precision %", "recall %", "rmse Å"], rows)


def _details(result: Result) -> str:
    rows = []
    for name, conditions in result.scores.items():
        for condition, scores in conditions.items():
            cells = [
                "–"
                if not s.true
                else f"{100 * s.precision:.0f} / {100 * s.recall:.0f} / {s.rmse:.2f}".replace("nan", "–")
                for s in scores[:-1]
            ]
            rows.append([f"{name}, {condition}", *cells])
    true = [s.true for s in result.scores[WAVE.name]["clean"][:-1]]
    return table(["", *(f"{name} ({count})" for name, count in zip(CHANNELS, true, strict=True))], rows)


def _cell(s: Score) -> str:
    text = f"{100 * s.precision:.0f} / {100 * s.recall:.0f} / {s.rmse:.2f}" if s.true else "–"
    return text.replace("nan", "–")


def _speed_table(result: Result) -> str:
    rows = [[name, f"{value:,.0f}", f"{1000 / value:.2f}"] for name, value in result.speed.items()]
    return table(["", "molecules / s", "ms a molecule"], rows)
