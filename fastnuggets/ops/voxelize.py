"""Molecules as 3-D grids, on the CPU and on CUDA, differentiable twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnuggets import _C
from fastnuggets.ops.choices import number_of

# The order is that of the enums in csrc/voxelize/voxelize.h.
DENSITIES = ("nearest", "trilinear", "sphere", "gaussian", "wave", "molgrid", "molvoxel", "pyuul", "moleculekit")
COMBINES = ("sum", "max", "union", "magnitude")
_SAME_FORMULA = {"deepfrag": "molvoxel"}
_OWN_COMBINE = {"pyuul": "union", "moleculekit": "max"}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Number = float | Tensor


def voxelize(
    coords: Tensor,  # [N, 3]
    channels: Tensor,  # [N] int64 | [N, C] float
    ptr: Tensor | None = None,  # [B + 1] int64
    *,
    shape: int | Sequence[int],
    spacing: float | Sequence[float] = 0.5,
    num_channels: int | None = None,
    density: str = "gaussian",
    radius: Number | None = None,
    sigma: Number | None = None,
    omega: Number | None = None,
    weights: Tensor | None = None,  # [N]
    center: Tensor | None = None,  # [3] | [B, 3] | [B, K, 3]
    rotation: Tensor | None = None,  # [3, 3] | [B, 3, 3] | [B, K, 3, 3]
    translation: Tensor | None = None,  # like center
    combine: str | None = None,
    cutoff: float = 1e-6,
    dtype: torch.dtype | None = None,
    layout: torch.layout = torch.strided,
    out: Tensor | GridBuffer | None = None,
    validate: bool = False,
) -> Tensor:
    """Turns a ragged batch of molecules into a batch of grids.

    Each atom adds ``weight * f(distance)`` to the voxels around it, in its channel or channels. Lengths are in
    angstrom. The centre of the box is the origin of box coordinates; the centre of voxel ``(d, h, w)`` is at
    ``((d - (D-1)/2) * sx, (h - (H-1)/2) * sy, (w - (W-1)/2) * sz)``: D runs along x, H along y, W along z.

    Args:
        coords: positions [N, 3], float32 or float64, all molecules one after the other. The grid is computed in this
            type.
        channels: the channel of each atom [N], int64 in ``0..num_channels-1``, or features [N, C] of a floating type:
            an atom then stands in every channel, weighted by its feature.
        ptr: molecule ``b`` has the atoms ``ptr[b]..ptr[b+1]-1`` [B+1], int64, ascending from 0 to N. None: one
            molecule.
        shape: number of voxels ``(D, H, W)``, or one number for a cube.
        spacing: edge of a voxel, one number or ``(sx, sy, sz)``.
        num_channels: C; needed when ``channels`` are indices.
        density: ``f`` of the distance d (formulas: csrc/voxelize/README.md):

            - ``"nearest"``: 1 in the voxel that holds the atom (one-hot); ``"trilinear"``: shared by the eight nearest
            - ``"sphere"``: 1 up to ``radius``
            - ``"gaussian"``: exp(-d²/2 ``sigma``²); ``"wave"``: the same times cos(2π ``omega`` d)
            - ``"molgrid"``, ``"molvoxel"``, ``"deepfrag"``, ``"pyuul"``, ``"moleculekit"``: the published formulas of
              libmolgrid, MolVoxel, DeepFrag, PyUUL and moleculekit, of ``radius``
        radius, sigma, omega: numbers, or tensors that broadcast to [N, C]: [] for all, [C] per channel, [N, 1] per
            atom. A Gaussian may be given ``radius`` instead of ``sigma``; sigma is then half of it. ``omega`` is in
            oscillations per angstrom. An atom of radius or sigma 0 contributes nothing.
        weights: weight of each atom [N].
        center: the point of a molecule that goes to the box centre. None: the origin.
        rotation: matrix applied about ``center``: an atom at x goes to ``rotation @ (x - center) + translation``. The
            pose is applied inside the kernel. A dimension K after B draws K poses of each molecule.
        translation: shift after the rotation.
        combine: how atoms of a channel join: ``"sum"``, ``"max"`` (of the atoms and 0), ``"union"``, 1 - Π(1 - wf), or
            ``"magnitude"``, Σ|wf|.
            Default: sum; union for pyuul and max for moleculekit, as published.
        cutoff: Gaussian and wave are dropped where their envelope is below this part of the peak.
        dtype: type of the grid: float32, float64, float16 or bfloat16 (rounded once, at the end). Default: as coords.
        layout: ``torch.strided`` or ``torch.sparse_coo``.
        out: grid to write to, contiguous, or a :class:`GridBuffer`, which is faster still. A fresh grid costs more in
            page faults than in arithmetic, so reuse one in a loop (figures: csrc/voxelize/README.md). When a gradient
            is recorded, the result is a new tensor on the memory of ``out``.
        validate: check the values of ``coords``, ``channels`` and ``ptr`` on CUDA too; it synchronises. The CPU always
            checks. Unchecked, an atom with a bad channel or a NaN coordinate is left out.

    Returns:
        [B, C, D, H, W], or [B, K, C, D, H, W] when a pose has a dimension K.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it was.

    Differentiable, twice, in coords, features, weights, radius, sigma, omega, center, rotation and translation (sparse
    grids too, through a dense gradient). Hard edges (nearest, sphere, the cuts of the presets) have derivative 0.
    Deterministic: the same bits for any number of threads. Does not synchronise and can be captured in a CUDA graph,
    except with ``validate=True`` or ``layout=torch.sparse_coo``, whose size depends on the data.

    The wave density: Kuzminykh et al., Molecular Pharmaceutics 15(10), 2018, doi:10.1021/acs.molpharmaceut.7b01134.
    """
    _check_tensors(coords=coords, channels=channels, ptr=ptr, radius=radius, sigma=sigma, omega=omega, weights=weights,
                   center=center, rotation=rotation, translation=translation, out=out)  # fmt: skip
    ptr = one_molecule(coords) if ptr is None else ptr
    grid_shape, steps = _triple("shape", shape, int), _triple("spacing", spacing, float)
    kind, rule = _numbers(density, combine)
    index, weight = _weights(coords, channels, weights, num_channels)
    size = _size(density, radius, sigma, weight)
    waves = _per_entry("omega", omega, weight) if density == "wave" else None
    pose, many = _pose(coords, ptr, center, rotation, translation)
    out_dtype = coords.dtype if dtype is None else dtype
    if validate:
        check_molecules(coords, ptr, index, weight.size(1))

    molecules = (coords, ptr, index, weight, size, waves, *pose)
    rules = (steps, kind, rule, float(cutoff))
    batch = (ptr.size(0) - 1, *((many,) if many else ()))
    if layout == torch.sparse_coo:
        if out is not None:
            raise ValueError("out must be None for a sparse grid")
        return _sparse(molecules, grid_shape, rules, out_dtype, batch)
    if layout != torch.strided:
        raise ValueError(f"layout must be torch.strided or torch.sparse_coo, got {layout}")
    if out is not None:
        as_given = out.dtype if isinstance(out, Tensor) and dtype is None else out_dtype
        return _into(out, molecules, grid_shape, rules, as_given, batch)
    if not torch.compiler.is_compiling():
        _check_memory(coords, ptr, many, weight.size(1), grid_shape, out_dtype)
    grid: Tensor = _op("voxelize")(*molecules, grid_shape, *rules, out_dtype)
    return grid.unflatten(0, batch) if many else grid


class GridBuffer:
    """Memory for grids that are made again and again: pass it as ``out`` of :func:`voxelize`.

    It grows to the largest batch and remembers, on the CPU, which rows the last call filled: the next one clears
    those and writes its own, instead of writing every voxel. A grid from it is valid until the next call; autograd
    raises if a backward needs one that was overwritten. If a torch operation wrote to the memory in between, all of
    it is cleared; do not write to it in other ways (a numpy view, say).
    """

    def __init__(self) -> None:
        self._grid: Tensor | None = None
        self._filled: Tensor | None = None
        self._version = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The memory as [G, C, D, H, W], and what is filled in it [G, C, D, 2]."""
        grid = self._grid
        if (
            grid is None
            or grid.size(0) < shape[0]
            or grid.shape[1:] != tuple(shape[1:])
            or grid.dtype != dtype
            or grid.device != device
        ):
            with torch.inference_mode(False):
                grid = self._grid = torch.zeros(tuple(shape), dtype=dtype, device=device)
                empty = torch.tensor([0, -1], dtype=torch.int32)
                self._filled = empty.repeat(*shape[:3], 1) if device.type == "cpu" else None
        elif self._filled is not None and (grid._version != self._version or torch.is_inference_mode_enabled()):
            # Inference mode counts no versions: what happened to the memory is not known.
            self._filled[...] = torch.tensor([0, shape[3] - 1], dtype=torch.int32)
        filled = None if self._filled is None else self._filled[: shape[0]]
        return grid[: shape[0]].detach(), filled

    def wrote(self) -> None:
        """Notes that the memory is as the last call left it."""
        if self._grid is not None and not torch.is_inference_mode_enabled():
            self._version = self._grid._version

    def __getstate__(self) -> dict[str, Any]:
        return {"_grid": None, "_filled": None, "_version": 0}  # a copy starts with memory of its own


def atom_relevance(
    relevance: Tensor, coords: Tensor, channels: Tensor, ptr: Tensor | None = None, **how: Any
) -> Tensor:
    """Shares the relevance of voxels out among the atoms that made them.

    Each voxel's relevance goes to its atoms in proportion to the magnitude of what each added to it (layer-wise
    relevance propagation through a sum). Voxels that no atom reaches keep theirs: it is not in the result.

    Args:
        relevance: [B, C, D, H, W] ([B, K, C, D, H, W] with poses).
        coords, channels, ptr: as for :func:`voxelize`, and ``how`` its further arguments, with ``combine="sum"``.

    Returns:
        relevance of each atom [N], summed over its channels and poses.

    Not differentiable. Deterministic; does not synchronise.
    """
    if how.pop("combine", "sum") != "sum":
        raise ValueError('combine must be "sum": relevance is shared in proportion')
    how.setdefault("shape", relevance.shape[-3:])
    weights = how.pop("weights", None)
    with torch.enable_grad():
        one = torch.ones(coords.size(0), dtype=coords.dtype, device=coords.device) if weights is None else weights
        one = one.detach().requires_grad_()
        total = voxelize(coords.detach(), channels.detach(), ptr, weights=one, combine="magnitude", **how)
        if relevance.shape != total.shape:
            raise ValueError(f"relevance must have the grid's shape {list(total.shape)}, got {list(relevance.shape)}")
        share = torch.where(total == 0, 0, relevance.detach() / total.detach()).to(total.dtype)
        (by_weight,) = torch.autograd.grad(total, one, share)
    return (by_weight * one).detach()


def check_molecules(coords: Tensor, ptr: Tensor, channel: Tensor | None, num_channels: int) -> None:
    """Raises ValueError for values that make no sense. Synchronises."""
    if not bool(torch.isfinite(coords).all()):
        raise ValueError("coords must be finite")
    if int(ptr[0]) != 0 or int(ptr[-1]) != coords.size(0) or bool((ptr.diff() < 0).any()):
        raise ValueError(f"ptr must ascend from 0 to the number of atoms {coords.size(0)}")
    if channel is not None and channel.numel() and bool(((channel < 0) | (channel >= num_channels)).any()):
        raise ValueError(f"channels must be in 0..{num_channels - 1}")


def _check_tensors(coords: Tensor, channels: Tensor, ptr: Tensor | None, **others: Any) -> None:
    for name, value in (("coords", coords), ("channels", channels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name, value in (("ptr", ptr), ("channels", channels), *others.items()):
        if isinstance(value, Tensor) and value.device != coords.device and (value.dim() or value.device.type != "cpu"):
            raise ValueError(f"{name} must be on {coords.device} with coords, got {value.device}")
        tensors = ("ptr", "weights", "center", "rotation", "translation")
        if name in tensors and not isinstance(value, Tensor | None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _op(name: str) -> Any:
    # The binding costs less a call; the compiler needs the registered op.
    if torch.compiler.is_compiling() or not hasattr(_C, name):
        return getattr(torch.ops.fastnuggets, name)
    return getattr(_C, name)


def _triple(name: str, value: Any, kind: type) -> list[Any]:
    values = [value] * 3 if not isinstance(value, Sequence | torch.Size | Tensor) else list(value)
    if len(values) != 3:
        raise ValueError(f"{name} must be one number or three, got {value!r}")
    if kind is int:
        if any(isinstance(v, float) for v in values):
            raise TypeError(f"{name} must be whole numbers, got {value!r}")
        return values
    return [float(v) for v in values]


def _numbers(density: str, combine: str | None) -> tuple[int, int]:
    name = _SAME_FORMULA.get(density, density)
    if name not in DENSITIES:
        raise ValueError(f"density must be one of {', '.join((*DENSITIES, *_SAME_FORMULA))}, got {density!r}")
    combine = _OWN_COMBINE.get(density, "sum") if combine is None else combine
    return DENSITIES.index(name), number_of("combine", combine, COMBINES)


def one_molecule(coords: Tensor) -> Tensor:
    """The batch pointers of a single molecule; made without a copy from the host."""
    return torch.arange(0, 2, device=coords.device) * coords.size(0)


def _weights(
    coords: Tensor, channels: Tensor, weights: Tensor | None, num_channels: int | None
) -> tuple[Tensor | None, Tensor]:
    """The channel index, if there is one, and the weight of every entry [N, C]."""
    if coords.dim() != 2 or coords.size(1) != 3:
        raise ValueError(f"coords must be [N, 3], got {list(coords.shape)}")
    n = coords.size(0)
    if weights is not None and weights.shape != (n,):
        raise ValueError(f"weights must be [N] with N = {n}, got {list(weights.shape)}")
    if channels.is_floating_point():
        if channels.dim() != 2 or channels.size(0) != n:
            raise ValueError(f"channels as features must be [N, C] with N = {n}, got {list(channels.shape)}")
        if num_channels is not None and num_channels != channels.size(1):
            raise ValueError(f"num_channels is {num_channels}, but channels has {channels.size(1)} features")
        features = channels.to(coords.dtype)
        return None, features if weights is None else features * weights.to(coords.dtype).unsqueeze(1)
    if num_channels is None:
        raise ValueError("num_channels is needed when channels are indices")
    if num_channels < 1:
        raise ValueError(f"num_channels must be at least 1, got {num_channels}")
    if channels.dim() != 1 or channels.size(0) != n:
        raise ValueError(f"channels as indices must be [N] with N = {n}, got {list(channels.shape)}")
    weight = coords.new_ones(()) if weights is None else weights.to(coords.dtype).unsqueeze(1)
    return channels.to(torch.int64), weight.expand(n, num_channels)


def _size(density: str, radius: Number | None, sigma: Number | None, weight: Tensor) -> Tensor | None:
    if density in ("nearest", "trilinear"):
        return None
    if density not in ("gaussian", "wave"):
        if sigma is not None:
            raise ValueError(f"sigma is not used by density {density!r}; give radius")
        return _per_entry("radius", radius, weight)
    if sigma is not None and radius is not None:
        raise ValueError("sigma and radius: give one of them")
    if sigma is None and radius is not None:
        return _per_entry("radius", radius, weight) / 2
    return _per_entry("sigma", sigma, weight)


def _per_entry(name: str, value: Number | None, weight: Tensor) -> Tensor:
    if value is None:
        raise ValueError(f"{name} is needed by this density")
    if not isinstance(value, Tensor):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, infinite or NaN, got {value}")
        return weight.new_full((), value).expand(weight.shape)
    try:
        return value.to(weight).expand(weight.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to [N, C] = {list(weight.shape)} (per atom: [N, 1]), got {list(value.shape)}"
        ) from None


def _pose(
    coords: Tensor, ptr: Tensor, center: Tensor | None, rotation: Tensor | None, translation: Tensor | None
) -> tuple[list[Tensor | None], int | None]:
    """Center, rotation and translation as [B, K, ...], and K if the caller has a pose dimension."""
    given = (("center", center, 1), ("rotation", rotation, 2), ("translation", translation, 1))
    poses: int | None = None
    for _, value, dims in given:
        if value is not None and value.dim() == dims + 2:
            poses = value.size(1)
    molecules = ptr.size(0) - 1
    made: list[Tensor | None] = []
    for name, value, dims in given:
        if value is None:
            made.append(None)
            continue
        if value.dim() not in (dims, dims + 1, dims + 2) or value.shape[value.dim() - dims :] != (3,) * dims:
            last = ", 3" * dims
            raise ValueError(f"{name} must be [{last[2:]}], [B{last}] or [B, K{last}], got {list(value.shape)}")
        full = value.to(coords.dtype)
        full = full.unsqueeze(1) if value.dim() == dims + 1 else full
        try:
            made.append(full.expand(molecules, poses or 1, *(3,) * dims))
        except RuntimeError:
            raise ValueError(
                f"{name} must have B = {molecules} molecules and K = {poses or 1} poses, got {list(value.shape)}"
            ) from None
    return made, poses


def _check_memory(
    coords: Tensor, ptr: Tensor, poses: int | None, channels: int, shape: list[int], dtype: torch.dtype
) -> None:
    # A grid that cannot fit is refused at once: the kernel would otherwise be killed half-way through its page faults.
    if coords.device.type != "cpu" or dtype not in _DTYPES:
        return
    voxels = (ptr.size(0) - 1) * (poses or 1) * channels * math.prod(max(n, 0) for n in shape)
    if voxels < 1 << 28:
        return
    wanted, there = voxels * dtype.itemsize, _physical_memory()
    if there and wanted > there:
        raise ValueError(
            f"shape {tuple(shape)} with {channels} channels asks for {wanted / 2**30:.0f} GiB, "
            f"this machine has {there / 2**30:.0f} GiB"
        )


def _physical_memory() -> int:
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _into(
    out: Tensor | GridBuffer,
    molecules: tuple[Any, ...],
    shape: list[int],
    rules: tuple[Any, ...],
    dtype: torch.dtype,
    batch: tuple[int, ...],
) -> Tensor:
    sizes = (*batch, molecules[3].size(1), *shape)
    grids = (math.prod(batch), *sizes[len(batch) :])
    if torch.compiler.is_compiling():
        # Functionalisation wants values: a given tensor is filled by a copy, which the compiler may fuse away.
        fresh = _op("voxelize")(*molecules, shape, *rules, dtype).view(sizes)
        return fresh if isinstance(out, GridBuffer) else out.copy_(fresh)
    if isinstance(out, GridBuffer):
        grid, filled = out.take(grids, dtype, molecules[0].device)
        _op("voxelize_")(grid, *molecules, *rules, filled)
        out.wrote()
        return grid.unflatten(0, batch) if len(batch) == 2 else grid
    if out.shape != sizes:
        raise ValueError(f"out must be {list(sizes)}, got {list(out.shape)}")
    if out.dtype != dtype:
        raise ValueError(f"out must have dtype {dtype}, got {out.dtype}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.is_leaf and out.requires_grad:
        raise ValueError("out must not be a leaf that requires a gradient: its values are overwritten")
    # Detached: the graph of a grid that stood here before must not reach into this one's.
    grid = out.view(grids).detach()
    _op("voxelize_")(grid, *molecules, *rules, None)
    return grid.view(sizes) if grid.requires_grad else out


def _sparse(
    molecules: tuple[Any, ...], shape: list[int], rules: tuple[Any, ...], dtype: torch.dtype, batch: tuple[int, ...]
) -> Tensor:
    indices, values = torch.ops.fastnuggets.voxelize_sparse(*molecules, shape, *rules, dtype)
    inputs = [t for t in molecules if isinstance(t, Tensor) and t.requires_grad]
    if torch.is_grad_enabled() and inputs:
        values = _SparseValues.apply(indices, values, molecules, shape, rules, *inputs)
    if len(batch) == 2:
        grid, rest = indices[:1], indices[1:]
        indices = torch.cat([grid // batch[1], grid % batch[1], rest])
    size = (*batch, molecules[3].size(1), *shape)
    return torch.sparse_coo_tensor(indices, values, size, is_coalesced=True)


class _SparseValues(torch.autograd.Function):
    """Gives the values of a sparse grid the gradient of the dense one they were taken from."""

    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, values: Tensor, molecules: Any, shape: Any, rules: Any, *inputs: Tensor
    ) -> Any:
        ctx.save_for_backward(indices, *inputs)
        ctx.slots = [i for i, t in enumerate(molecules) if isinstance(t, Tensor) and t.requires_grad]
        ctx.molecules = [None if i in ctx.slots else t for i, t in enumerate(molecules)]
        ctx.shape, ctx.rules = shape, rules
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        indices, *inputs = ctx.saved_tensors
        molecules = list(ctx.molecules)
        for slot, tensor in zip(ctx.slots, inputs, strict=True):
            molecules[slot] = tensor
        with torch.enable_grad():
            grid = torch.ops.fastnuggets.voxelize(*molecules, ctx.shape, *ctx.rules, grads[0].dtype)
            at = tuple(indices)
            found = torch.autograd.grad(grid[at], inputs, grads[0], create_graph=torch.is_grad_enabled())
        return (None,) * 5 + tuple(found)


def _grid_count(ptr: Tensor, poses: Sequence[Tensor | None]) -> Any:
    many = next((t.size(1) for t in poses if t is not None), 1)
    return (ptr.size(0) - 1) * many


@torch.library.register_fake("fastnuggets::voxelize")
def _(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, *rules):  # type: ignore[no-untyped-def]
    grids = _grid_count(ptr, (center, rotation, translation))
    return coords.new_empty((grids, weight.size(1), *shape), dtype=rules[-1])


@torch.library.register_fake("fastnuggets::voxelize_")
def _(out, *_):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("fastnuggets::voxelize_sparse")
def _(coords, ptr, *rest):  # type: ignore[no-untyped-def]
    filled = torch.library.get_ctx().new_dynamic_size()
    return ptr.new_empty((5, filled)), coords.new_empty((filled,), dtype=rest[-1])


@torch.library.register_fake("fastnuggets::voxelize_backward")
def _(grad, positions, ptr, channel, weight, size, omega, spacing, density, combine, cutoff, wanted):  # type: ignore[no-untyped-def]
    sizes = (positions.shape, weight.shape, weight.shape, weight.shape)
    return tuple(weight.new_empty(s if w else (0,)) for s, w in zip(sizes, wanted, strict=True))


@torch.library.register_fake("fastnuggets::voxelize_double_backward")
def _(v_position, v_weight, v_size, v_omega, grad, positions, ptr, channel, weight, *_):  # type: ignore[no-untyped-def]
    entry = weight.shape
    return (grad.new_empty(grad.shape), weight.new_empty(positions.shape), *(weight.new_empty(entry) for _ in range(3)))


@torch.library.register_fake("fastnuggets::segment_sum")
def _(x, ptr):  # type: ignore[no-untyped-def]
    return x.new_empty((ptr.size(0) - 1, x.size(1)))


@torch.library.register_fake("fastnuggets::segment_expand")
def _(y, ptr, n):  # type: ignore[no-untyped-def]
    return y.new_empty((n, y.size(1)))
