"""From grids back to atoms: the Wiener inverse of the wave transform, and the positions of the atoms themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastnuggets.ops.voxelize import voxelize

TAU = 0.35  # angstrom, the low pass of the Wiener inverse: exp(-2 pi^2 tau^2 q^2)
EXPECTED_ATOMS = 8  # per channel; the power of a sum of n random phases is n
LEAST_NOISE = 1e-4  # of an atom's peak: the filter never divides by the transform alone
PADDING = 3.0  # sigmas
FIT_CUTOFF = 1e-3  # the fit looks at voxels within 3.7 sigma of an atom
FIT_ITERATIONS = 8
SEED_HEIGHT, SEED_SIGNIFICANCE = 0.35, 4.5
REGROW_HEIGHT, REGROW_SIGNIFICANCE = 0.35, 5.0  # in the residual, where neighbours have taken a part of the peak
LEAST_AMPLITUDE, AMPLITUDE_SIGNIFICANCE = 0.5, 6.0  # a grid offers some 10^5 places to a false atom
MERGE_DISTANCE = 0.7  # angstrom, within a channel
CONFLICT_DISTANCE = 0.9  # angstrom, between channels
# Grids are filtered in parts. On the CPU their temporaries are small enough for malloc to recycle: fresh pages cost
# more than the transform.
LEAST_VOLUME = 20.0  # cubic angstrom an atom of one channel
FEWEST_REFUSED = 64
CHUNK_VOXELS = {"cpu": 2**20, "cuda": 2**27}

RESOLUTION = 0.70  # 1/angstrom: neighbours of one element are 1.2 angstrom apart or more, and bonds 1.4
BLIND_LIMIT = 0.2  # csrc/voxelize/README.md has the kernels on both sides of it
FIT_OF_INEQUALITIES = 0.02  # 1/angstrom, how well they follow the curves they stand for

T = TypeVar("T", int, float)
Number = float | Sequence[float] | Tensor


class Conditioning(NamedTuple):
    """How well a kernel's blur can be undone on a grid."""

    number: float  # largest over smallest |transform|: what plain division multiplies noise by; inf if some are zero
    blind: float  # share of the frequencies up to 0.70 / angstrom that are left with less than 10 % of the largest


class Atoms(NamedTuple):
    """Atoms of a batch of B molecules, sorted by molecule and channel."""

    positions: Tensor  # [M, 3] float32, angstrom in box coordinates
    channels: Tensor  # [M] int64
    amplitudes: Tensor  # [M] float32, 1 for an atom of weight 1
    ptr: Tensor  # [B + 1] int64
    residual: Tensor  # [B, C] float32, sum over voxels of (grid - atoms)^2


def condition_number(
    shape: int | Sequence[int], *, sigma: float, omega: float = 0.0, spacing: float | Sequence[float] = 0.5
) -> Conditioning:
    """Conditioning of the convolution with exp(-r^2 / 2 sigma^2) cos(2 pi omega r) on a periodic grid.

    Args:
        shape: voxels, one number or (D, H, W).
        sigma: angstrom, > 0.
        omega: oscillations per angstrom, >= 0; 0 is the Gaussian.
        spacing: angstrom, one number or one an axis, > 0.

    Returns:
        `number`, of the sampled kernel's discrete transform in float64; and `blind`, which tells whether atoms a bond
        apart can be told apart when there is noise: a wave of many frequencies may lose a thin shell and so have a huge
        `number`, and be inverted without loss by what is left.

    Raises:
        ValueError: an argument is out of its range.
    """
    sigmas, omegas = _kernels(sigma, omega, 1)
    return _conditioning(_triple("shape", shape, int), sigmas[0], omegas[0], _triple("spacing", spacing, float))


@lru_cache(maxsize=64)
def _conditioning(
    shape: tuple[int, int, int], sigma: float, omega: float, spacing: tuple[float, float, float]
) -> Conditioning:
    gain = sampled_transform(shape, sigma, omega, spacing).abs()
    largest, smallest = gain.max().item(), gain.min().item()
    band = frequencies(shape, spacing) <= RESOLUTION
    blind = (gain < 0.1 * largest) & band
    weight = _hermitian_weight(shape[2], gain.device)
    share = (blind * weight).sum().item() / (band * weight).sum().item()
    return Conditioning(largest / smallest if smallest > 0 else math.inf, share)


def kernel_warnings(sigma: float, omega: float = 0.0, spacing: float | Sequence[float] = 0.5) -> list[str]:
    """What is wrong with a kernel on a grid of this spacing, one sentence each; empty if it is well chosen.

    Two inequalities, h the largest spacing: omega <= 1 / 2h - 0.38 / sigma, or the grid changes with where an atom lies
    between voxels; omega >= 0.70 - 0.36 / sigma, or atoms a bond apart melt into one. Both with a slack of 0.02.

    Raises:
        ValueError: an argument is out of its range.
    """
    _kernels(sigma, omega, 1)
    h = max(_triple("spacing", spacing, float))
    found = []
    if omega > 1 / (2 * h) - 0.38 / sigma + FIT_OF_INEQUALITIES:
        found.append(
            f"sigma={sigma:g}, omega={omega:g} is aliased on a grid of {h:g} angstrom: omega should be at most "
            f"1 / (2 spacing) - 0.38 / sigma = {1 / (2 * h) - 0.38 / sigma:.2f}"
        )
    if omega < RESOLUTION - 0.36 / sigma - FIT_OF_INEQUALITIES:
        found.append(
            f"sigma={sigma:g}, omega={omega:g} does not resolve atoms a bond apart: omega should be at least "
            f"0.70 - 0.36 / sigma = {RESOLUTION - 0.36 / sigma:.2f}"
        )
    return found


def deconvolve(
    grid: Tensor,
    *,
    sigma: Number,
    omega: Number = 0.0,
    spacing: float | Sequence[float] = 0.5,
    noise: Number | None = None,
    padding: float | None = None,
) -> Tensor:
    """Wiener inverse of a grid of waves (or Gaussians): every atom becomes a narrow peak, of height 1 for weight 1.

    With K the transform of the kernel and Y that of the grid, the estimate is the inverse transform of
    K Y exp(-2 pi^2 tau^2 q^2) / (K^2 + lambda), divided by its value for one clean atom; tau = 0.35 angstrom, lambda =
    voxels * noise^2 / 8, the optimum for 8 atoms in white noise. K is the analytic transform where the grid resolves
    the kernel, else the discrete transform of the sampled one.

    Args:
        grid: [B, C, D, H, W] float.
        sigma: angstrom, > 0; one number or one a channel.
        omega: oscillations per angstrom, >= 0; one number or one a channel. 0 is the Gaussian.
        spacing: angstrom, one number or one an axis.
        noise: standard deviation per voxel where an atom's peak is 1: one number, or a tensor that broadcasts to
            [B, C]. None: 1.48 times the median of |grid| in the eight corners of each channel.
        padding: angstrom of empty space that keep an atom at one wall from appearing at the opposite one.
            None: 3 sigma. 0 is faster, for grids whose atoms keep that distance from the walls.

    Returns:
        [B, C, D, H, W], the dtype of `grid`; half and bfloat16 are computed in float32.

    Differentiable in `grid` (an estimated noise level counts as a constant). Deterministic for a given number of CPU
    threads: PyTorch's transforms share one grid out among them, and round accordingly. Does not synchronise if sigma
    and omega are numbers or on the CPU.

    Warns:
        UserWarning: more than a fifth of the frequencies that tell atoms apart are lost, see `condition_number`.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another kind; on the CPU also NaN in `grid`.
    """
    _check_grid(grid)
    wiener = _Wiener(grid, sigma, omega, spacing, padding)
    wiener.warn()
    values = grid if grid.dtype == torch.float64 else grid.float()
    if not grid.is_cuda:
        _check_finite(grid)
    level = _noise_level(values.detach()) if noise is None else _per_channel("noise", noise, values)
    estimates = []
    for channel, kernel in enumerate(wiener.kernel):
        own = level[:, channel if level.shape[1] > 1 else 0]
        estimates.append(wiener.apply(values[:, channel], wiener.gain(kernel, own)[0]))
    return (torch.stack(estimates, 1) if estimates else values).to(grid.dtype)


def find_atoms(
    grid: Tensor,
    *,
    sigma: Number,
    omega: Number = 0.0,
    spacing: float | Sequence[float] = 0.5,
    noise: Number | None = None,
    padding: float | None = 0.0,
    rounds: int = 3,
) -> Atoms:
    """The atoms that a batch of grids shows, each channel holding atoms of one kind and of weight about 1.

    Peaks of the Wiener inverse are the seeds. Levenberg-Marquardt on the grid itself moves positions and amplitudes;
    atoms below amplitude 0.5, or below 6 times its noise, are dropped, and of two closer than 0.7 angstrom the weaker
    one; what the residual still shows is added and fitted again. Of two atoms of different channels closer than 0.9
    angstrom the stronger stays.

    Args:
        grid: [B, C, D, H, W] float; computed in float32.
        sigma, omega, spacing, noise: as in `deconvolve`.
        padding: as in `deconvolve`, but 0 by default: the fit itself does not wrap around, and removes a seed that the
            filter has put at the wrong wall.
        rounds: how often the residual is searched for atoms that were missed, >= 0.

    Returns:
        Atoms, sorted by molecule and channel.

    Not differentiable; deterministic, the same bits for any number of CPU threads. Synchronises with the GPU and cannot
    be captured in a CUDA graph: how many atoms there are is data.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another kind, or NaN in `grid`.
    """
    _check_grid(grid)
    if rounds < 0:
        raise ValueError(f"rounds: expected 0 or more, got {rounds}")
    with torch.no_grad(), torch.autocast(grid.device.type, enabled=False):
        grid = grid.float()
        search = _Search(grid, _Wiener(grid, sigma, omega, spacing, padding), noise)
        groups = torch.arange(len(search.grids), device=grid.device)
        atoms = search.seeds(groups, _Peaks.none(grid), SEED_HEIGHT, SEED_SIGNIFICANCE)
        _check_finite(search.energy)
        changed = atoms.group.unique_consecutive()
        for _ in range(rounds):
            atoms = search.refine(atoms, changed)
            # A group without atoms needs no second look: the first had the lower threshold.
            more = search.seeds(changed, atoms, REGROW_HEIGHT, REGROW_SIGNIFICANCE)
            changed = more.group.unique_consecutive()
            if len(changed) == 0:
                break
            atoms = atoms.also(more)
        return search.result(search.refine(atoms, changed), changed)


class _Peaks(NamedTuple):
    """Atoms by group; a group is one channel of one molecule."""

    group: Tensor  # [M] int64, ascending
    positions: Tensor  # [M, 3]
    amplitudes: Tensor  # [M]

    @staticmethod
    def none(grid: Tensor) -> _Peaks:
        return _Peaks(grid.new_empty(0, dtype=torch.int64), grid.new_empty(0, 3), grid.new_empty(0))

    def where(self, mask: Tensor) -> _Peaks:
        return _Peaks(*(t[mask] for t in self))

    def also(self, *others: _Peaks) -> _Peaks:
        order = torch.cat([self.group, *(o.group for o in others)]).argsort(stable=True)
        return _Peaks(*(torch.cat(parts)[order] for parts in zip(self, *others, strict=True)))


class _Search:
    """The state of `find_atoms`: grids by group, their noise, and what of them is not explained yet."""

    def __init__(self, grid: Tensor, wiener: _Wiener, noise: Number | None) -> None:
        self.batch, self.channels = grid.shape[:2]
        self.grids = grid.flatten(0, 1)  # [G, D, H, W]
        self.wiener = wiener
        self.spacing = wiener.spacing
        kernels = torch.tensor([wiener.sigma, wiener.omega], dtype=grid.dtype, device=grid.device)
        self.sigma, self.omega = kernels.repeat(1, self.batch)  # [G]
        self.energy = grid.new_empty(len(self.grids))  # [G] sum of squares of the residual
        if noise is None:
            level = _noise_level(grid)
            # To a quarter of an octave, which the filter does not feel: then few filters serve all grids.
            rounded = torch.exp2((4 * torch.log2(level.clamp(min=LEAST_NOISE))).round() / 4)
        else:
            level = rounded = _per_channel("noise", noise, grid)
        self.level, rounded = (x.expand(self.batch, self.channels).flatten() for x in (level, rounded))  # [G]
        kernel = torch.tensor(wiener.kernel, device=grid.device).repeat(self.batch)
        of_group = torch.stack([kernel.to(rounded.dtype), rounded], 1)
        self.filters, self.filter_of = of_group.unique(dim=0, return_inverse=True)  # [F, 2], [G]

    def seeds(self, groups: Tensor, atoms: _Peaks, height: float, significance: float) -> _Peaks:
        """Peaks of the Wiener inverse of what `atoms` leave of these groups; sets their energy."""
        found = [_Peaks.none(self.grids)]
        step = max(1, CHUNK_VOXELS[self.grids.device.type] // math.prod(self.grids.shape[1:]))
        for f, (kernel, level) in enumerate(self.filters.tolist()):
            gain, amplification = self.wiener.gain(int(kernel), torch.tensor(level, device=groups.device))
            for part in groups[self.filter_of[groups] == f].split(step):
                estimate = torch.ops.fastnuggets.filter_grids(self.residual(part, atoms), gain, self.wiener.padded)
                noise = amplification * self.level[part]
                peaks = _peaks(estimate, (significance * noise).clamp(min=height), self.spacing)
                self.refuse_a_crowd(peaks.group, len(part))
                found.append(peaks._replace(group=part[peaks.group]))
        return found[0].also(*found[1:])

    def refuse_a_crowd(self, group: Tensor, groups: int) -> None:
        # Fitting them all would take hours, and they are not atoms: even carbons of a protein have more room.
        volume = math.prod(n * h for n, h in zip(self.grids.shape[1:], self.spacing, strict=True))
        most = max(FEWEST_REFUSED, volume / LEAST_VOLUME)
        if groups and len(group) and (count := int(torch.bincount(group).max())) > most:
            raise ValueError(f"noise is too low for this grid: {count} peaks in one channel, {most:.0f} would be dense")

    def residual(self, groups: Tensor, atoms: _Peaks) -> Tensor:
        """The grids of these groups less their atoms, [n, D, H, W]; sets their energy."""
        own = atoms.where(torch.isin(atoms.group, groups))
        residual = self.grids.index_select(0, groups)
        if len(own.group):
            residual -= voxelize(
                own.positions,
                torch.zeros_like(own.group),
                _offsets(torch.searchsorted(groups, own.group), len(groups)),
                shape=self.grids.shape[1:],
                spacing=self.spacing,
                num_channels=1,
                density="wave",
                sigma=self.sigma[own.group, None],
                omega=self.omega[own.group, None],
                weights=own.amplitudes,
            ).squeeze(1)
        self.energy[groups] = _sum_voxels(residual.square())
        return residual

    def refine(self, atoms: _Peaks, groups: Tensor) -> _Peaks:
        """Fits the atoms of these groups, drops the faint ones and those that fell together."""
        mine = torch.isin(atoms.group, groups)
        own = atoms.where(mine)
        positions, amplitudes = torch.ops.fastnuggets.fit_atoms(
            self.grids,
            own.positions,
            own.amplitudes,
            _offsets(own.group, len(self.grids)),
            self.sigma,
            self.omega,
            self.spacing,
            FIT_CUTOFF,
            FIT_ITERATIONS,
        )
        own = _Peaks(own.group, positions, amplitudes)
        own = own.where(amplitudes >= (AMPLITUDE_SIGNIFICANCE * self.amplitude_noise(own)).clamp(min=LEAST_AMPLITUDE))
        own = own.where(_stronger(own.positions, own.amplitudes, own.group, MERGE_DISTANCE))
        return atoms.where(~mine).also(own)

    def amplitude_noise(self, atoms: _Peaks) -> Tensor:
        """Standard deviation of fitted amplitudes, [M]: large for an atom at a wall, of which the grid shows a part."""
        sigma, omega = self.sigma[atoms.group], self.omega[atoms.group]
        edge, extent = (atoms.positions.new_tensor(x) for x in (self.spacing, self.grids.shape[1:]))
        wall = edge * extent / 2
        seen = torch.erf((wall - atoms.positions) / sigma[:, None]) + torch.erf(
            (wall + atoms.positions) / sigma[:, None]
        )
        a = (2 * math.pi * sigma * omega) ** 2
        energy = 0.5 * (math.sqrt(math.pi) * sigma) ** 3 * (1 + torch.exp(-a) * (1 - 2 * a)) / edge.prod()
        noise: Tensor = self.level[atoms.group] / (energy * (seen / 2).prod(1)).clamp(min=1e-12).sqrt()
        return noise

    def result(self, atoms: _Peaks, stale: Tensor) -> Atoms:
        """Settles conflicts between channels; `stale` are the groups whose energy is not that of `atoms`."""
        molecule = atoms.group // self.channels
        keep = _stronger(atoms.positions, atoms.amplitudes, molecule, CONFLICT_DISTANCE)
        stale = torch.cat([stale, atoms.group[~keep]]).unique()
        atoms, molecule = atoms.where(keep), molecule[keep]
        step = max(1, CHUNK_VOXELS[self.grids.device.type] // math.prod(self.grids.shape[1:]))
        for part in stale.split(step):
            self.residual(part, atoms)
        return Atoms(
            atoms.positions,
            atoms.group % self.channels,
            atoms.amplitudes,
            _offsets(molecule, self.batch),
            self.energy.view(self.batch, self.channels),
        )


class _Wiener:
    """Wiener filters for grids of [D, H, W] voxels, one kernel a channel."""

    def __init__(
        self, grid: Tensor, sigma: Number, omega: Number, spacing: float | Sequence[float], padding: float | None
    ) -> None:
        self.sigma, self.omega = _kernels(sigma, omega, grid.shape[1])
        self.spacing = _triple("spacing", spacing, float)
        self.shape = tuple(grid.shape[2:])
        if padding is None:
            padding = PADDING * max(self.sigma, default=0)
        if not 0 <= padding < math.inf:
            raise ValueError(f"padding: expected 0 or more angstrom, got {padding}")
        self.padded = tuple(
            _fast_size(n + math.ceil(padding / h)) if padding else n
            for n, h in zip(self.shape, self.spacing, strict=True)
        )
        kernels = list(zip(self.sigma, self.omega, strict=True))
        self.distinct = list(dict.fromkeys(kernels))
        self.kernel = [self.distinct.index(k) for k in kernels]  # of each channel
        dtype = torch.float64 if grid.dtype == torch.float64 else torch.float32
        q = frequencies(self.padded, self.spacing)
        self.low_pass = torch.exp(-2 * (math.pi * TAU * q) ** 2).to(grid.device, dtype)
        self.weight = _hermitian_weight(self.padded[2], grid.device).to(dtype)
        self.transforms = [transform(self.padded, *k, self.spacing).to(grid.device, dtype) for k in self.distinct]

    def gain(self, kernel: int, level: Tensor) -> tuple[Tensor, Tensor]:
        """Noise levels [...] -> the filters [..., D, H, W // 2 + 1], and by what they multiply white noise, [...]."""
        k = self.transforms[kernel]
        damping = math.prod(self.shape) / EXPECTED_ATOMS * level.clamp(min=LEAST_NOISE).square()
        gain = k * self.low_pass / (k.square() + damping[..., None, None, None])
        peak = self._mean(k * gain)
        return gain / peak[..., None, None, None], self._mean(gain.square()).sqrt() / peak

    def apply(self, grid: Tensor, gain: Tensor) -> Tensor:
        """[..., D, H, W] -> the same."""
        if grid.numel() == 0:
            return grid  # which the transforms refuse
        axes = (-3, -2, -1)
        spectrum = torch.fft.rfftn(grid, s=self.padded, dim=axes)
        # A complex number times a real one would first make the real one complex.
        torch.view_as_real(spectrum).mul_(gain[..., None])
        d, h, w = self.shape
        estimate: Tensor = torch.fft.irfftn(spectrum, s=self.padded, dim=axes)
        return estimate[..., :d, :h, :w]

    def warn(self) -> None:
        for sigma, omega in self.distinct:
            number, blind = _conditioning(self.shape, sigma, omega, self.spacing)
            if blind > BLIND_LIMIT:
                warnings.warn(
                    f"deconvolve: sigma={sigma:g}, omega={omega:g} on {self.shape} voxels of {self.spacing} angstrom "
                    f"is ill-posed: {blind:.0%} of the frequencies that tell atoms apart are lost (condition number "
                    f"{number:.1e})",
                    stacklevel=3,
                )

    def _mean(self, half: Tensor) -> Tensor:
        """Over all frequencies, of a function on the half that rfftn keeps."""
        return _sum_voxels(half * self.weight) / math.prod(self.padded)


def transform(shape: Sequence[int], sigma: float, omega: float, spacing: Sequence[float]) -> Tensor:
    """Of the kernel at the frequencies of rfftn, float64: analytic where less than 1e-3 of its energy is aliased."""
    if omega <= 1 / (2 * max(spacing)) - 0.38 / sigma:
        return wave_transform(frequencies(shape, spacing), sigma, omega) / math.prod(spacing)
    return sampled_transform(shape, sigma, omega, spacing)


def wave_transform(q: Tensor, sigma: float, omega: float) -> Tensor:
    """Fourier integral of exp(-r^2 / 2 sigma^2) cos(2 pi omega r) over space, angstrom^3, at q >= 0."""
    a = 2 * (math.pi * sigma) ** 2
    scale = (2 * math.pi) ** 1.5 * sigma**3
    at_zero = scale * math.exp(-a * omega**2) * (1 - 2 * a * omega**2)
    safe = torch.where(q > 0, q, 1.0)
    upper, lower = safe + omega, safe - omega
    value = scale / (2 * safe) * (upper * torch.exp(-a * upper**2) + lower * torch.exp(-a * lower**2))
    return torch.where(q > 0, value, at_zero)


def sampled_transform(shape: Sequence[int], sigma: float, omega: float, spacing: Sequence[float]) -> Tensor:
    """Discrete transform of the kernel sampled on a periodic grid, at the frequencies of rfftn, float64."""
    axes = [torch.fft.fftfreq(n, 1 / (n * h), dtype=torch.float64) for n, h in zip(shape, spacing, strict=True)]
    r = _length(axes)
    kernel = torch.exp(-(r**2) / (2 * sigma**2)) * torch.cos(2 * math.pi * omega * r)
    half: Tensor = torch.fft.rfftn(kernel)
    return half.real


def frequencies(shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Lengths of the frequencies of rfftn, 1/angstrom, float64."""
    axes = [torch.fft.fftfreq(n, h, dtype=torch.float64) for n, h in zip(shape[:2], spacing[:2], strict=True)]
    return _length([*axes, torch.fft.rfftfreq(shape[2], spacing[2], dtype=torch.float64)])


def _length(axes: list[Tensor]) -> Tensor:
    x, y, z = axes
    return torch.sqrt(x[:, None, None] ** 2 + y[:, None] ** 2 + z**2)


def _hermitian_weight(n: int, device: torch.device) -> Tensor:
    """How many frequencies of the full transform each one on rfftn's last axis stands for."""
    index = torch.arange(n // 2 + 1, device=device)
    return 2 - ((index == 0) | (2 * index == n)).long()


def _sum_voxels(x: Tensor) -> Tensor:
    """Over the last three axes, one after the other: a sum over all at once depends on the number of threads."""
    return x.sum(-1).sum(-1).sum(-1)


def _noise_level(grid: Tensor) -> Tensor:
    """[B, C, D, H, W] -> [B, C]: the corners are where a centred molecule is not."""
    for axis in (2, 3, 4):
        n = grid.shape[axis]
        if n >= 12:
            grid = torch.cat([grid.narrow(axis, 0, n // 6), grid.narrow(axis, n - n // 6, n // 6)], axis)
    corners = grid.abs().flatten(2)
    return 1.4826 * (corners.median(-1).values if corners.numel() else corners.sum(-1))


def _peaks(estimate: Tensor, threshold: Tensor, spacing: tuple[float, float, float]) -> _Peaks:
    """Local maxima of [G, D, H, W] among 3^3 voxels, moved to the top of a parabola along each axis."""
    # Most lines have nothing to show, and their largest value says so faster than a list of what is above.
    line = (estimate.amax(-1) > threshold[:, None, None]).nonzero()  # [L, 3]
    within = (estimate[line.unbind(1)] > threshold[line[:, 0], None]).nonzero()  # [N, 2]
    group, index = line[within[:, 0], 0], torch.cat([line[within[:, 0], 1:], within[:, 1:]], 1)
    shape = torch.tensor(estimate.shape[1:], device=estimate.device)
    steps = torch.cartesian_prod(*[torch.arange(-1, 2, device=estimate.device)] * 3)  # [27, 3]
    # At a wall the step back stays where it is: still a voxel of the neighbourhood.
    near = torch.minimum((index[:, None] + steps).clamp(min=0), shape - 1)  # [N, 27, 3]
    values = estimate[group[:, None], near[..., 0], near[..., 1], near[..., 2]]  # [N, 27]
    center = values[:, 13, None]
    linear = _linear(near, shape)
    # Of equal neighbours the first is the peak.
    top = ((values < center) | ((values == center) & (linear >= linear[:, 13, None]))).all(1)
    group, index, values = group[top], index[top], values[top]
    below, above = values[:, [4, 10, 12]], values[:, [22, 16, 14]]
    curvature = below - 2 * values[:, 13, None] + above
    inside = (index > 0) & (index < shape - 1) & (curvature < 0)
    offset = torch.where(inside, 0.5 * (below - above) / torch.where(inside, curvature, 1.0), 0.0).clamp(-0.5, 0.5)
    edge = torch.tensor(spacing, dtype=estimate.dtype, device=estimate.device)
    return _Peaks(group, (index - (shape - 1) / 2 + offset) * edge, values[:, 13])


def _linear(index: Tensor, shape: Tensor) -> Tensor:
    return (index[..., 0] * shape[1] + index[..., 1]) * shape[2] + index[..., 2]


def _stronger(positions: Tensor, strength: Tensor, group: Tensor, distance: float) -> Tensor:
    """[M] bool: what stays if, from the strongest down, each atom drops the others of its group that are too close.

    `group` ascends.
    """
    counts = torch.unique_consecutive(group, return_counts=True)[1]
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    partners = counts.repeat_interleave(counts)
    one = torch.arange(len(group), device=group.device).repeat_interleave(partners)
    first_pair = partners.cumsum(0) - partners
    other = start[one] + torch.arange(len(one), device=group.device) - first_pair[one]
    close = (one != other) & ((positions[one] - positions[other]).square().sum(1) < distance**2)
    one, other = one[close], other[close]
    weaker = (strength[one] > strength[other]) | ((strength[one] == strength[other]) & (one < other))
    winner, loser = one[weaker], other[weaker]
    alive = torch.ones(len(group), dtype=torch.bool, device=group.device)
    while True:
        open_pairs = alive[winner] & alive[loser]
        winner, loser = winner[open_pairs], loser[open_pairs]
        if len(winner) == 0:
            return alive
        beaten = torch.zeros_like(alive)
        beaten[loser] = True
        alive[loser[~beaten[winner]]] = False


def _offsets(group: Tensor, groups: int) -> Tensor:
    """Ascending group numbers [M] -> where each group starts, [groups + 1]."""
    return torch.searchsorted(group, torch.arange(groups + 1, device=group.device))


def _fast_size(n: int) -> int:
    """The next size whose prime factors are 2, 3 and 5."""
    rest = n
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return n if rest == 1 else _fast_size(n + 1)


def _check_grid(grid: Tensor) -> None:
    if not isinstance(grid, Tensor) or not grid.is_floating_point():
        raise TypeError(f"grid: expected a floating-point tensor, got {getattr(grid, 'dtype', type(grid).__name__)}")
    if grid.dim() != 5 or min(grid.shape[2:]) == 0:
        raise ValueError(f"grid: expected [B, C, D, H, W] with at least one voxel, got {tuple(grid.shape)}")


def _check_finite(grid: Tensor) -> None:
    # One NaN or infinity makes a sum so, and a sum is the cheapest look at all values.
    if not torch.isfinite(grid.sum()):
        raise ValueError("grid: expected finite values, got NaN or infinity")


def _kernels(sigma: Number, omega: Number, channels: int) -> tuple[list[float], list[float]]:
    """One sigma > 0 and one omega >= 0 a channel."""
    both = []
    for name, value, least in (("sigma", sigma, "above 0"), ("omega", omega, "0 or more")):
        values = torch.as_tensor(value, dtype=torch.float64).flatten()
        if len(values) not in (1, channels):
            raise ValueError(f"{name}: expected one number or one for each of {channels} channels, got {len(values)}")
        good = (values > 0 if name == "sigma" else values >= 0) & torch.isfinite(values)
        if not good.all():
            raise ValueError(f"{name}: expected {least}, got {values[~good][0].item()}")
        both.append(values.expand(channels).tolist())
    return both[0], both[1]


def _per_channel(name: str, value: Number, grid: Tensor) -> Tensor:
    """Broadcasts to [B or 1, C or 1], >= 0."""
    values = torch.as_tensor(value, dtype=grid.dtype, device=grid.device)
    values = values.reshape((1,) * max(0, 2 - values.dim()) + tuple(values.shape))
    if any(n not in (1, m) for n, m in zip(values.shape, grid.shape, strict=False)) or values.dim() != 2:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(grid.shape[:2])}, got {tuple(values.shape)}"
        )
    if not (values >= 0).all():
        raise ValueError(f"{name}: expected 0 or more, got {values.min().item()}")
    return values


def _triple(name: str, value: T | Sequence[T], kind: Callable[[T], T]) -> tuple[T, T, T]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    if len(values) != 3 or not all(0 < v < math.inf for v in values):
        raise ValueError(f"{name}: expected one number or three, above 0, got {value}")
    first, second, third = (kind(v) for v in values)
    return first, second, third


@torch.library.register_fake("fastnuggets::fit_atoms")
def _(grid, positions, amplitudes, *_):  # type: ignore[no-untyped-def]
    return positions.new_empty(positions.shape), amplitudes.new_empty(amplitudes.shape)


@torch.library.register_fake("fastnuggets::filter_grids")
def _(grid, gain, size):  # type: ignore[no-untyped-def]
    return grid.new_empty(grid.shape)
