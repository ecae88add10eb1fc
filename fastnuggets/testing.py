"""What each registered op promises: `tests/test_contract.py` checks it and `bench/` times the same inputs.

A family registers one `OpCase` for each of its ops, backward ops included. An op without one fails a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastnuggets import reference
from fastnuggets.ops.filters import BORDERS, STEPS
from fastnuggets.ops.poisson import GUIDANCES as POISSON_GUIDANCES
from fastnuggets.ops.sample import APPROXIMATIONS, FORMS, KINDS
from fastnuggets.ops.voxelize import COMBINES, DENSITIES
from fastnuggets.reference.philox import normal

NAMESPACE = "fastnuggets"

# Every case has these samples. "typical" is small enough for gradcheck; "larger" differs from it in its tensors' sizes
# alone, so that one compiled graph must serve both; "parallel" has work for several threads.
SAMPLES = ("typical", "larger", "one", "empty", "parallel")

Samples = Mapping[str, tuple[Any, ...]]

# Largest seen: 1.4e-6 and 1.2e-13, second derivatives of moleculekit's twelfth power; most are near 1e-7 and 1e-15.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class OpCase:
    """One op and what it promises.

    Args:
        op: qualified name, "fastnuggets::voxelize".
        samples: (device, dtype) -> arguments in the order of the schema, by sample name; all of `SAMPLES`, and more if
            the op has more branches. Called twice it gives the same values.
        reference: the same outputs (and mutated arguments, last) from the same arguments, in plain PyTorch.
        differentiable: names of the arguments that have a derivative.
        double_backward: the derivative has one as well.
        data_dependent: an output's size depends on values.
        synchronises: the host waits for values on the device, so no CUDA graph can hold the op.
        dtypes: the floating types of the inputs.
        any_dtype: names of the arguments that may be half without autocast, which therefore leaves them alone.
        tolerance: largest error against `reference` run in float64, relative to the reference's largest value (or 1).
        gradient_tolerance: the same for the gradients.
    """

    op: str
    samples: Callable[[torch.device, torch.dtype], Samples]
    reference: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    double_backward: bool = True
    data_dependent: bool = False
    synchronises: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    any_dtype: tuple[str, ...] = ()
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: dict(ROUNDING))
    gradient_tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: dict(ROUNDING))

    @property
    def overload(self) -> torch._ops.OpOverload:
        namespace, name = self.op.split("::")
        found: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), name).default
        return found

    @property
    def mutated(self) -> tuple[int, ...]:
        """Positions of the arguments the op writes to."""
        arguments = self.overload._schema.arguments
        return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)

    @property
    def functional(self) -> Callable[..., tuple[Tensor, ...]]:
        """All arguments -> the outputs, then copies of the mutated arguments; a sample stays as it was."""
        overload, mutated = self.overload, self.mutated

        def function(*args: Any) -> tuple[Tensor, ...]:
            given = list(args)
            written = [i for i in mutated if given[i] is not None]
            for i in written:
                (given[i],) = map_tensors(torch.clone, (given[i],))
            return _as_tuple(overload(*given)) + tuple(tensors_in([given[i] for i in written]))

        return function

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        return self.functional(*args)

    def expected(self, *args: Any) -> tuple[Tensor, ...]:
        """`reference` on the same values in float64."""
        return _as_tuple(self.reference(*map_tensors(as_double, args)))

    def active(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Positions of the arguments in `args` that can require a gradient."""
        names = [a.name for a in self.overload._schema.arguments]
        return tuple(
            i
            for i, a in enumerate(args)
            if names[i] in self.differentiable and isinstance(a, Tensor) and a.is_floating_point()
        )

    def recorded(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`args` with fresh leaves that require a gradient."""
        active = self.active(args)
        return tuple(a.detach().clone().requires_grad_() if i in active else a for i, a in enumerate(args))

    def as_function(self, args: tuple[Any, ...]) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """A function of the differentiable arguments alone, and those arguments as fresh leaves."""
        active = self.active(args)

        def function(*leaves: Tensor) -> tuple[Tensor, ...]:
            full = list(args)
            for i, leaf in zip(active, leaves, strict=True):
                full[i] = leaf
            return self(*full)

        recorded = self.recorded(args)
        return function, tuple(recorded[i] for i in active)


CASES: dict[str, OpCase] = {}


def register(case: OpCase) -> OpCase:
    """Adds a case; an op has one.

    Raises:
        ValueError: the op has a case already.
    """
    if case.op in CASES:
        raise ValueError(f"op: {case.op} has an OpCase already")
    CASES[case.op] = case
    return case


def registered_ops(namespace: str = NAMESPACE) -> set[str]:
    """Every op the dispatcher knows in this namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.split(".")[0] for name in names if name.startswith(namespace + "::")}


def map_tensors(function: Callable[[Tensor], Tensor], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with the function's value for each tensor, also for those in lists."""
    mapped: tuple[Any, ...] = tree_map_only(Tensor, function, args)
    return mapped


def tensors_in(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among `args`, also those in lists."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def strided(tensor: Tensor) -> Tensor:
    """The same values at another offset, axes in reverse order and every second element of memory left out."""
    if tensor.dim() == 0:
        return tensor
    sizes = tuple(reversed(tensor.shape))
    room = tensor.new_zeros((*sizes[:-1], 2 * sizes[-1] + 1))
    view = room[..., 1::2].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


def far_apart(tensor: Tensor) -> Tensor:
    """The same values spread over more than 2^31 elements of memory, along the first axis longer than one.

    The memory is asked for and not touched, so on the CPU it costs a few pages.
    """
    axis = next((i for i, n in enumerate(tensor.shape) if n > 1), None)
    if axis is None or tensor.numel() == 0:
        return tensor
    inner = tensor.numel() // tensor.shape[axis]
    stride = 2**31 // (tensor.shape[axis] - 1) + 1
    room = torch.empty((tensor.shape[axis] - 1) * stride + inner, dtype=tensor.dtype, device=tensor.device)
    strides = list(torch.empty([1 if i == axis else n for i, n in enumerate(tensor.shape)]).stride())
    strides[axis] = stride
    return room.as_strided(tensor.shape, strides).copy_(tensor)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    if outputs is None:
        return ()
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# --- voxelize ---------------------------------------------------------------------------------------------------------

EXACT = 1e-18  # a cut-off that drops nothing float64 can hold beside the peak


def _random(seed: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """uniform(low, high, *sizes): the same float32 numbers on every device and in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *sizes: int) -> Tensor:
        return (torch.rand(sizes, generator=generator) * (high - low) + low).to(device, dtype)

    return uniform


def _molecules(
    device: torch.device,
    dtype: torch.dtype,
    *,
    atoms: tuple[int, ...],
    channels: int,
    density: str,
    index: bool = True,
    posed: int = 0,
    positions: int = 0,
    reach: float = 1.4,
) -> tuple[Any, ...]:
    """coords ... omega and center ... translation of the schemas; `positions` poses instead of coordinates."""
    uniform = _random(sum(atoms), device, dtype)
    n, molecules = sum(atoms), len(atoms)
    coords = uniform(-reach, reach, n, positions, 3) if positions else uniform(-reach, reach, n, 3)
    ptr = torch.tensor([0, *atoms], device=device).cumsum(0)
    channel = (uniform(0, channels, n).floor().long() % channels) if index else None
    weight = uniform(0.2, 0.9, n, channels)
    size = None if density in ("nearest", "trilinear") else uniform(0.7, 1.3, n, channels)
    omega = uniform(0.2, 0.6, n, channels) if density == "wave" else None
    pose: tuple[Tensor | None, ...] = (None, None, None)
    if posed:
        center, translation = uniform(-0.3, 0.3, molecules, posed, 3), uniform(-0.3, 0.3, molecules, posed, 3)
        rotation = torch.linalg.qr(uniform(-1, 1, molecules, posed, 3, 3).double().cpu()).Q.float().to(device, dtype)
        pose = (center, rotation, translation)
    return (coords, ptr, channel, weight, size, omega, *(() if positions else pose))


def _rule(density: str, combine: str, spacing: tuple[float, float, float] = (0.5, 0.625, 0.75)) -> tuple[Any, ...]:
    return list(spacing), DENSITIES.index(density), COMBINES.index(combine), EXACT


# What the samples of voxelize, its backward and its double backward have in common: molecules, density, combine, grid.
_VOXELIZE: dict[str, tuple[dict[str, Any], str, str, tuple[int, int, int]]] = {
    "typical": ({"atoms": (3, 2), "channels": 2, "posed": 1}, "wave", "sum", (3, 4, 3)),
    "larger": ({"atoms": (4, 0, 3), "channels": 3, "posed": 1}, "wave", "sum", (3, 4, 3)),
    "features": ({"atoms": (2, 2), "channels": 2, "index": False}, "gaussian", "union", (3, 2, 4)),
    "poses": ({"atoms": (2, 1), "channels": 2, "posed": 2}, "moleculekit", "max", (2, 3, 3)),
    "presets": ({"atoms": (4,), "channels": 1}, "molgrid", "union", (3, 3, 4)),
    "no size": ({"atoms": (3,), "channels": 2}, "trilinear", "sum", (3, 3, 3)),
    "one": ({"atoms": (1,), "channels": 1}, "gaussian", "sum", (1, 1, 1)),
    "empty": ({"atoms": (0, 0), "channels": 2, "posed": 1}, "wave", "sum", (3, 2, 3)),
    "no molecule": ({"atoms": (), "channels": 2}, "gaussian", "sum", (3, 2, 3)),
    "parallel": ({"atoms": (30, 24), "channels": 3, "reach": 4.0}, "wave", "sum", (24, 20, 22)),
}


def _voxelize_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    return {
        name: (*_molecules(device, dtype, density=density, **how), list(shape), *_rule(density, combine), dtype)
        for name, (how, density, combine, shape) in _VOXELIZE.items()
    }


def _voxelize_into_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, (*molecules, shape, spacing, density, combine, cutoff, _) in _voxelize_samples(device, dtype).items():
        grids = (molecules[1].numel() - 1) * (1 if molecules[6] is None else molecules[6].shape[1])
        out = torch.full((grids, molecules[3].shape[1], *shape), 7.0, dtype=dtype, device=device)
        made[name] = (out, *molecules, spacing, density, combine, cutoff, None)
    return made


def _voxelize_sparse_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, (how, _, combine, shape) in _VOXELIZE.items():
        for density in ("molgrid", "trilinear"):  # their zeros are those of the definition
            key = name if density == "molgrid" else f"{name}, {density}"
            arguments = _molecules(device, dtype, density=density, **how)
            made[key] = (*arguments, list(shape), *_rule(density, combine), dtype)
    return made


def _backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, (how, density, combine, shape) in _VOXELIZE.items():
        how = {**how, "positions": how.get("posed", 0) or 1, "posed": 0}
        molecules = _molecules(device, dtype, density=density, **how)
        shape = shape if name != "parallel" else (8, 7, 9)  # here it is the atoms that are shared out
        wanted = [name != "features", True, molecules[4] is not None, molecules[5] is not None]
        grids = len(how["atoms"]) * how["positions"]
        grad = _random(1, device, dtype)(-1, 1, grids, how["channels"], *shape)
        made[name] = (grad, *molecules, *_rule(density, combine), wanted)
    return made


def _double_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, (grad, positions, *rest) in _backward_samples(device, dtype).items():
        uniform = _random(2, device, dtype)
        wanted = rest.pop()
        along = (positions.shape, *(rest[2].shape,) * 3)
        tangents = [uniform(-1, 1, *sizes) if w else None for sizes, w in zip(along, wanted, strict=True)]
        made[name] = (*tangents, grad, positions, *rest)
    return made


def _reference_voxelize(
    coords: Tensor,
    ptr: Tensor,
    channel: Tensor | None,
    weight: Tensor,
    size: Tensor | None,
    omega: Tensor | None,
    center: Tensor | None,
    rotation: Tensor | None,
    translation: Tensor | None,
    shape: list[int],
    spacing: list[float],
    density: int,
    combine: int,
    *_: Any,
) -> Tensor:
    weights = None if channel is None else weight.gather(1, channel[:, None]).squeeze(1)
    grid = reference.voxelize(
        coords,
        weight if channel is None else channel,
        ptr,
        shape=shape,
        spacing=spacing,
        num_channels=weight.shape[1],
        density=DENSITIES[density],
        radius=size,
        sigma=size,
        omega=omega,
        weights=weights,
        center=center,
        rotation=rotation,
        translation=translation,
        combine=COMBINES[combine],
    )
    return grid.flatten(0, -5)


def _reference_voxelize_into(out: Tensor, *rest: Any) -> Tensor:
    *molecules, spacing, density, combine, cutoff, _ = rest
    return _reference_voxelize(*molecules, list(out.shape[2:]), spacing, density, combine, cutoff)


def _reference_sparse(*args: Any) -> tuple[Tensor, Tensor]:
    grid = _reference_voxelize(*args)
    indices = grid.nonzero().T
    return indices, grid[tuple(indices)]


def _reference_backward(
    grad: Tensor,
    positions: Tensor,
    ptr: Tensor,
    channel: Tensor | None,
    weight: Tensor,
    size: Tensor | None,
    omega: Tensor | None,
    spacing: list[float],
    density: int,
    combine: int,
    cutoff: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """By autograd through the definition, so that it can be differentiated again."""
    with torch.enable_grad():
        inputs: list[Any] = [
            t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (positions, weight, size, omega)
        ]
        place, weight, size, omega = inputs
        rule = (list(grad.shape[2:]), spacing, density, combine)
        grids = [
            _reference_voxelize(place[:, k], ptr, channel, weight, size, omega, None, None, None, *rule)
            for k in range(place.shape[1])
        ]
        grid = torch.stack(grids, 1).flatten(0, 1)
        chosen = [t for t, w in zip(inputs, wanted, strict=True) if w]
        found = iter(_gradients([grid], chosen, [grad]))
        return tuple(next(found) if w else weight.new_zeros(0) for w in wanted)


def _reference_double_backward(
    position_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    size_tangent: Tensor | None,
    omega_tangent: Tensor | None,
    grad: Tensor,
    positions: Tensor,
    ptr: Tensor,
    channel: Tensor | None,
    weight: Tensor,
    size: Tensor | None,
    omega: Tensor | None,
    *rule: Any,
) -> tuple[Tensor, ...]:
    leaves: list[Any] = [
        t if t is None else t.detach().requires_grad_() for t in (grad, positions, weight, size, omega)
    ]
    tangents = [position_tangent, weight_tangent, size_tangent, omega_tangent]
    wanted = [t is not None for t in tangents]
    arguments: list[Any] = [*leaves[:2], ptr, channel, *leaves[2:], *rule, wanted]
    first = _reference_backward(*arguments)
    pairs = [(f, t) for f, t in zip(first, tangents, strict=True) if t is not None and f.requires_grad]
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(_gradients([f for f, _ in pairs], given, [t for _, t in pairs]))
    return tuple(torch.zeros_like(weight) if leaf is None else next(found) for leaf in leaves)


def _gradients(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, zeros where nothing depends on an input, differentiable again."""
    outputs = [o + 0 * sum(i.sum() for i in inputs) for o in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, materialize_grads=True)


def _pulled_back(
    function: Callable[..., Tensor], given: Sequence[Tensor | None], grad: Tensor, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of a function of `given`, empty where they are not wanted; None is no input."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        found = iter(_gradients([function(*leaves)], [t for t in leaves if t is not None], [grad]))
    gradients = [grad.new_zeros(0) if t is None else next(found).detach() for t in leaves]
    return tuple(g if w else grad.new_zeros(0) for g, w in zip(gradients, wanted, strict=True))


def _reference_segment_sum(x: Tensor, ptr: Tensor) -> Tensor:
    ends = ptr.tolist()
    sums = [x[start:stop].sum(0) for start, stop in itertools.pairwise(ends)]
    return torch.stack(sums) if sums else x.new_zeros(0, x.shape[1])


def _segments(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, width], [S, width] and the pointers of S segments with N rows in all."""
    uniform = _random(len(sizes), device, dtype)
    ptr = torch.tensor([0, *sizes], device=device).cumsum(0)
    return uniform(-1, 1, sum(sizes), width), uniform(-1, 1, len(sizes), width), ptr


_SEGMENTS = {
    "typical": ((3, 0, 2), 3),
    "larger": ((4, 1, 0, 3), 5),
    "one": ((1,), 1),
    "empty": ((0, 0), 3),
    "no segment": ((), 3),
    "parallel": ((500, 1, 700, 0, 300) * 20, 9),
}


def _segment_sum_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {name: _segments(device, dtype, *how) for name, how in _SEGMENTS.items()}
    return {name: (x, ptr) for name, (x, _, ptr) in made.items()}


def _segment_expand_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {name: _segments(device, dtype, *how) for name, how in _SEGMENTS.items()}
    return {name: (y, ptr, len(x)) for name, (x, y, ptr) in made.items()}


_FITS: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {  # atoms of each grid, voxels
    "typical": ((2, 0, 1), (7, 6, 9)),
    "larger": ((3, 1, 0, 2), (8, 7, 10)),
    "one": ((1,), (5, 5, 5)),
    "empty": ((0, 0), (4, 4, 4)),
    "parallel": ((5, 2, 0, 7) * 4, (14, 13, 20)),
}


def _fit_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    return {name: _fit(device, dtype, *how) for name, how in _FITS.items()}


def _fit(
    device: torch.device, dtype: torch.dtype, counts: tuple[int, ...], shape: tuple[int, int, int]
) -> tuple[Any, ...]:
    """Noisy grids of atoms, and a start up to 0.1 angstrom from each."""
    spacing = (0.5, 0.6, 0.4)
    uniform = _random(len(counts), device, dtype)
    sigma, omega = uniform(0.6, 0.9, len(counts)), uniform(0.4, 0.5, len(counts))
    ptr = torch.tensor([0, *counts], device=device).cumsum(0)
    group = torch.arange(len(counts), device=device).repeat_interleave(ptr.diff())
    reach = 0.5 * torch.tensor(shape, device=device) * torch.tensor(spacing, device=device, dtype=dtype)
    positions = uniform(-1, 1, len(group), 3) * reach
    grid = reference.voxelize(
        positions,
        torch.zeros_like(group),
        ptr,
        shape=shape,
        spacing=spacing,
        num_channels=1,
        density="wave",
        sigma=sigma[group, None],
        omega=omega[group, None],
    ).squeeze(1)
    grid = grid + 0.1 * uniform(-1, 1, *grid.shape)
    start = positions + uniform(-0.1, 0.1, *positions.shape)
    return grid, start, torch.ones_like(start[:, 0]), ptr, sigma, omega, spacing, 1e-3, 8


_FILTERS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int]]] = {  # [G, D, H, W], padded
    "typical": ((3, 4, 5, 6), (6, 7, 9)),
    "larger": ((6, 5, 7, 8), (6, 7, 9)),
    "one": ((1, 1, 1, 1), (1, 1, 1)),
    "empty": ((0, 4, 4, 4), (4, 4, 4)),
    "parallel": ((19, 14, 13, 20), (16, 15, 24)),
}


def _filter_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(0, device, dtype)
    return {
        name: (uniform(-1, 1, *shape), uniform(0, 1, *size[:2], size[2] // 2 + 1), size)
        for name, (shape, size) in _FILTERS.items()
    }


def _reference_filter(grid: Tensor, gain: Tensor, size: tuple[int, int, int]) -> Tensor:
    axes = (-3, -2, -1)
    if grid.numel() == 0:
        return grid
    filtered: Tensor = torch.fft.irfftn(torch.fft.rfftn(grid, s=size, dim=axes) * gain, s=size, dim=axes)
    return filtered[:, : grid.shape[1], : grid.shape[2], : grid.shape[3]].contiguous()


_MOLECULE = ("coords", "weight", "size", "omega", "center", "rotation", "translation")

# moleculekit's twelfth power at positions of poses rounded to float32: 5.1e-6. All other cases stay below 1e-6.
_STEEP = {**ROUNDING, torch.float32: 1e-5}

register(OpCase("fastnuggets::voxelize", _voxelize_samples, _reference_voxelize, _MOLECULE, gradient_tolerance=_STEEP))
register(
    OpCase(
        "fastnuggets::voxelize_",
        _voxelize_into_samples,
        _reference_voxelize_into,
        _MOLECULE,
        gradient_tolerance=_STEEP,
    )
)
register(
    OpCase(
        "fastnuggets::voxelize_sparse",
        _voxelize_sparse_samples,
        _reference_sparse,
        data_dependent=True,
        synchronises=True,
    )
)
register(
    OpCase(
        "fastnuggets::voxelize_backward",
        _backward_samples,
        _reference_backward,
        ("grad", "positions", "weight", "size", "omega"),
        double_backward=False,
        any_dtype=("grad",),
    )
)
register(
    OpCase(
        "fastnuggets::voxelize_double_backward",
        _double_backward_samples,
        _reference_double_backward,
        any_dtype=("grad",),
    )
)
register(OpCase("fastnuggets::segment_sum", _segment_sum_samples, _reference_segment_sum, ("x",)))
register(
    OpCase(
        "fastnuggets::segment_expand",
        _segment_expand_samples,
        lambda y, ptr, n: y.repeat_interleave(ptr.diff(), 0, output_size=n),
        ("y",),
    )
)
register(OpCase("fastnuggets::filter_grids", _filter_samples, _reference_filter))
register(OpCase("fastnuggets::fit_atoms", _fit_samples, reference.fit_atoms, synchronises=True))


# --- average ----------------------------------------------------------------------------------------------------------

# Sizes of the tensors of a model; the second of each is laid out channels_last.
_MODELS: dict[str, tuple[tuple[int, ...], ...]] = {
    "typical": ((3, 5), (2, 3, 4, 2), (7,), ()),
    "larger": ((4, 6), (3, 4, 5, 3), (9,), ()),
    "one": ((1,),),
    "empty": ((0, 4), (2, 0, 3, 3)),
    "parallel": ((300, 201), (64, 32, 3, 3), (5000,), (1,), (129,)),
}


def _model(
    name: str, seed: int, device: torch.device, dtype: torch.dtype, *, mixed: bool = False, positive: bool = False
) -> list[Tensor]:
    """One tensor for each of the sizes; `mixed` weights come in three types."""
    uniform = _random(seed, device, dtype)
    types = (dtype, torch.bfloat16, torch.float16) if mixed else (dtype,)
    made = []
    for i, size in enumerate(_MODELS[name]):
        tensor = uniform(0.0 if positive else -1.0, 1.0, *size).to(types[i % len(types)])
        made.append(tensor.contiguous(memory_format=torch.channels_last) if i == 1 else tensor)
    return made


def _rings(name: str, seed: int, rows: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Deviations [rows, *size], each row laid out like the tensor."""
    uniform = _random(seed, device, dtype)
    rings = []
    for like in _model(name, seed, device, dtype):
        ring = torch.empty_strided((rows, *like.shape), (like.numel(), *like.stride()), dtype=dtype, device=device)
        rings.append(ring.copy_(uniform(-1, 1, *ring.shape)))
    return rings


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _average_samples(make: Callable[[Callable[..., Any]], tuple[Any, ...]]) -> Callable[..., Samples]:
    """Samples of arguments that `make` puts together of `model(seed, ...)` and `model.rings(seed, rows)`."""

    def samples(device: torch.device, dtype: torch.dtype) -> Samples:
        def of(name: str) -> tuple[Any, ...]:
            def model(seed: int, rows: int = 0, **how: bool) -> list[Tensor]:
                if rows:
                    return _rings(name, seed, rows, device, dtype)
                return _model(name, seed, device, dtype, **how)

            return make(model)

        return {name: of(name) for name in _MODELS}

    return samples


def _flat(parts: Iterable[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(tensor for part in parts for tensor in part)


def _reference_update(averages: list[Tensor], _: Any, weights: list[Tensor], rates: Tensor, *__: Any) -> Any:
    return tuple(reference.average_update(averages, weights, rates))


def _reference_sample(
    out: list[Tensor],
    mean: list[Tensor],
    m2: list[Tensor],
    deviations: list[Tensor],
    columns: Tensor,
    diagonal: float,
    seed: int,
    step: int,
    streams: list[int],
) -> tuple[Tensor, ...]:
    made = []
    for i, (m, s, ring) in enumerate(zip(mean, m2, deviations, strict=True)):
        noise = normal(seed, (step, i), m.numel()).to(m)
        # The elements of a tensor are numbered as they lie in memory.
        noise = noise.as_strided(m.shape, m.stride())
        low_rank = sum(c * row for c, row in zip(columns.to(m), ring, strict=True))
        made.append(m + diagonal * s.sqrt() * noise + low_rank)
    return tuple(made)


def _reference_optimizer(step: Callable[..., tuple[Tensor, ...]], state: int) -> Callable[..., tuple[Tensor, ...]]:
    """The weights, `state` lists of an optimizer's state and the averages after `step`."""

    def expected(weights: list[Tensor], grads: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        *lists, averages, rates = rest[: state + 2]
        stepped = [step(*row, *rest[state + 2 :]) for row in zip(weights, grads, *lists, strict=True)]
        columns = list(zip(*stepped, strict=True))
        return _flat([*columns, reference.average_update(averages, list(columns[0]), rates)])

    return expected


def _reference_sgd(w: Tensor, g: Tensor, m: Tensor, lr: float, rate: float, *rest: Any) -> tuple[Tensor, ...]:
    dampening, weight_decay, nesterov, maximize, first = rest
    how = {"lr": lr, "momentum_rate": rate, "dampening": dampening, "weight_decay": weight_decay}
    return reference.sgd_step(w, -g if maximize else g, m, nesterov=nesterov, first=first, **how)  # type: ignore[return-value]


def _reference_adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, *rest: Any) -> tuple[Tensor, ...]:
    beta1, beta2, eps, weight_decay, maximize, step = rest
    how = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "step": step}
    return reference.adamw_step(w, -g if maximize else g, m, v, **how)


register(
    OpCase(
        "fastnuggets::average_update_",
        _average_samples(
            lambda model: ([*model(1), *model(2)], [], model(3, mixed=True), _numbers(0.1, 0.75), 0, 0, 0, [])
        ),
        _reference_update,
        any_dtype=("rates",),
    )
)
register(
    OpCase(
        "fastnuggets::swag_update_",
        _average_samples(
            lambda model: (model(1), model(2, positive=True), model(3, rows=3), model(4, mixed=True), 4, 1)
        ),
        lambda *args: _flat(reference.swag_update(*args)),
    )
)
register(
    OpCase(
        "fastnuggets::swag_sample_",
        _average_samples(
            lambda model: (
                model(1),
                model(2),
                model(3, positive=True),
                model(4, rows=2),
                _numbers(0.5, -0.7),
                0.3,
                11,
                3,
                [],
            )
        ),
        _reference_sample,
        any_dtype=("columns",),
        # The noise is made in float32, in float64 averages too: up to 6.6e-7 off.
        tolerance={torch.float32: 2e-6, torch.float64: 1e-6},
    )
)
register(
    OpCase(
        "fastnuggets::weighted_sum_",
        _average_samples(
            lambda model: (model(1), [*model(2, mixed=True), *model(3), *model(4)], _numbers(0.5, -0.25, 0.7))
        ),
        lambda out, sources, coefficients: tuple(reference.weighted_sum(sources, coefficients)),
        any_dtype=("coefficients",),
    )
)
register(
    OpCase(
        "fastnuggets::swap_tensors_",
        _average_samples(lambda model: (model(1), model(2))),
        lambda first, second: (*second, *first),
    )
)
register(
    OpCase(
        "fastnuggets::first_nonfinite",
        _average_samples(lambda model: ([*model(1, mixed=True), *(t / 0 for t in model(2)), *model(3)],)),
        lambda weights: torch.tensor(
            next((i for i, w in enumerate(weights) if not w.isfinite().all()), len(weights)), device=weights[0].device
        ),
    )
)
register(
    OpCase(
        "fastnuggets::sgd_ema_step_",
        _average_samples(
            lambda model: (
                model(1),
                model(2),
                model(3),
                [*model(4), *model(5)],
                _numbers(0.1, 0.6),
                0.1,
                0.9,
                0.2,
                0.01,
                True,
                False,
                False,
            )
        ),
        _reference_optimizer(_reference_sgd, 1),
        any_dtype=("rates",),
    )
)
register(
    OpCase(
        "fastnuggets::adamw_ema_step_",
        _average_samples(
            lambda model: (
                model(1),
                model(2),
                model(3),
                model(4, positive=True),
                model(5),
                _numbers(0.3),
                0.1,
                0.9,
                0.99,
                1e-3,
                0.05,
                True,
                3,
            )
        ),
        _reference_optimizer(_reference_adamw, 2),
        any_dtype=("rates",),
    )
)


# --- sample -----------------------------------------------------------------------------------------------------------

_SIZES = {"typical": (3, 4, 2), "larger": (4, 5, 3), "one": (1, 1, 1), "empty": (2, 0, 3), "parallel": (2, 3, 6000)}
_FLOATING = torch.float32, torch.float64, torch.float16, torch.bfloat16

# The noise is float32's: seen, up to 7e-7 off. Half types: a unit of the last place each way.
_DRAWN = {torch.float32: 3e-6, torch.float64: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _key(device: torch.device) -> Tensor:
    return torch.tensor([-(2**62) + 12345, 2**40 + 77], device=device)


def _scaled_noise_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(5, device, dtype)
    key = _key(device)
    made: dict[str, tuple[Any, ...]] = {}
    for name, size in _SIZES.items():
        made[name] = (uniform(-1, 1, *size), uniform(0.2, 1, *size), key, KINDS.index("normal"), 0.0)
    for i, kind in enumerate(KINDS):
        made[kind] = (uniform(-1, 1, 7, 3), uniform(0.2, 1, 7, 3), key, i, 0.7)
    made["no loc"] = (None, uniform(-1, 1, 200), key, KINDS.index("keep"), 0.25)
    return made


def _fill_noise_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    key = _key(device)
    made: dict[str, tuple[Any, ...]] = {}
    for name, size in _SIZES.items():
        made[name] = (torch.full(size, 7.0, dtype=dtype, device=device), 0.5, 2.0, key, KINDS.index("laplace"), 0.0)
    return made


def _normal_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(6, device, dtype)
    key = _key(device)

    def sample(size: tuple[int, ...], form: str, event_dims: int, wanted: tuple[bool, bool, bool], prior: int) -> Any:
        inputs = (uniform(-1, 1, *size), uniform(0.3, 1.5, *size))
        priors = (uniform(-1, 1, *size) if prior > 1 else None, uniform(0.5, 2, *size) if prior else None)
        return (*inputs, *priors, key if wanted[0] else None, FORMS.index(form), event_dims, list(wanted))

    every = (True, True, True)
    made = {name: sample(size, "logvar", 1, every, 2) for name, size in _SIZES.items()}
    for form in FORMS:
        made[form] = sample((2, 5), form, 2, every, 0)
    made["elementwise"] = sample((2, 3), "std", 0, every, 1)
    made["z"] = sample((2, 3), "rho", 0, (True, False, False), 0)
    made["var"] = sample((2, 3), "log_std", 0, (False, True, False), 0)
    made["kl"] = sample((2, 3), "var", 1, (False, False, True), 2)
    made["z and var"] = sample((2, 3), "std", 1, (True, True, False), 0)
    made["z and kl"] = sample((2, 3), "rho", 1, (True, False, True), 0)
    made["var and kl"] = sample((2, 3), "rho", 1, (False, True, True), 1)
    return made


def _normal_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(7, device, dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    made = {}
    for name, (mean, spread, *rest, event_dims, wanted) in _normal_samples(device, dtype).items():
        grad_z = uniform(-1, 1, *mean.shape) if wanted[0] else None
        grad_var = uniform(-1, 1, *mean.shape) if wanted[1] else None
        grad_kl = uniform(-1, 1, *mean.shape[: mean.dim() - event_dims]).to(sums) if wanted[2] else None
        wants = [True, True, rest[0] is not None, rest[1] is not None]
        made[name] = (grad_z, grad_var, grad_kl, mean, spread, *rest, event_dims, wants)
    return made


def _gumbel_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(10, device, dtype)
    # The hard form has the gradient of another function, which no difference can check: tests/test_sample.py.
    return {name: (uniform(-2, 2, *size), _key(device), 0.7, False) for name, size in _SIZES.items()}


def _gumbel_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(11, device, dtype)
    return {
        name: (uniform(-1, 1, *logits.shape), logits.softmax(-1), tau)
        for name, (logits, _, tau, _) in _gumbel_samples(device, dtype).items()
    }


def _log_uniform_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(8, device, dtype)
    made = {name: (uniform(-4, 2, *size), 0, 1) for name, size in _SIZES.items()}
    for i, approximation in enumerate(APPROXIMATIONS):
        made[approximation] = (uniform(-4, 0, 3, 4), i, i)
    return made


def _log_uniform_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(9, device, dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: (uniform(-1, 1, *x.shape[: x.dim() - event_dims]).to(sums), x, approximation, event_dims)
        for name, (x, approximation, event_dims) in _log_uniform_samples(device, dtype).items()
    }


def _reference_noise(loc: Tensor | None, scale: Tensor, key: Tensor, kind: int, parameter: float) -> Tensor:
    return reference.scaled_noise(loc, scale, key, KINDS[kind], parameter)


def _reference_normal(
    mean: Tensor,
    spread: Tensor,
    prior_mean: Tensor | None,
    prior_std: Tensor | None,
    key: Tensor | None,
    form: int,
    event_dims: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    z = var = kl = mean.new_zeros(0)
    if wanted[0] and key is not None:
        z = reference.rsample_normal(mean, spread, key, FORMS[form])
    if wanted[1]:
        var = reference.std_of(spread, FORMS[form]).square()
    if wanted[2]:
        prior = (0.0 if prior_mean is None else prior_mean, 1.0 if prior_std is None else prior_std)
        kl = reference.kl_normal(mean, spread, FORMS[form], *prior, event_dims)
    return z, var, kl


def _reference_normal_backward(*given: Any) -> tuple[Tensor, ...]:
    *cotangents, mean, spread, prior_mean, prior_std, key, form, event_dims, wanted = given
    leaves: list[Any] = [t if t is None else t.detach().requires_grad_() for t in (mean, spread, prior_mean, prior_std)]
    m, x, pm, ps = leaves
    with torch.enable_grad():
        outputs = _reference_normal(m, x, pm, ps, key, form, event_dims, [g is not None for g in cotangents])
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
        inputs = [leaf for leaf in leaves if leaf is not None]
        found = iter(_gradients([o for o, _ in pairs], inputs, [g for _, g in pairs]))
    return tuple(next(found).detach() if w else mean.new_zeros(0) for w in wanted)


def _reference_gumbel_softmax(logits: Tensor, key: Tensor, tau: float, hard: bool) -> Tensor:
    return reference.gumbel_softmax(logits, key, tau, hard)


def _reference_log_uniform_backward(grad: Tensor, log_alpha: Tensor, approximation: int, event_dims: int) -> Tensor:
    with torch.enable_grad():
        leaf = log_alpha.detach().requires_grad_()
        kl = reference.kl_log_uniform(leaf, APPROXIMATIONS[approximation], event_dims)
        return torch.autograd.grad(kl, leaf, grad)[0]


register(
    OpCase(
        "fastnuggets::scaled_noise",
        _scaled_noise_samples,
        _reference_noise,
        ("loc", "scale"),
        dtypes=_FLOATING,
        any_dtype=("loc", "scale"),
        tolerance=_DRAWN,
        gradient_tolerance=_DRAWN,
    )
)
register(
    OpCase(
        "fastnuggets::fill_noise_",
        _fill_noise_samples,
        lambda out, loc, scale, *how: loc + _reference_noise(None, torch.full_like(out, scale), *how),
        dtypes=_FLOATING,
        any_dtype=("out",),
        tolerance=_DRAWN,
    )
)
_NORMAL = ("mean", "spread", "prior_mean", "prior_std")
register(
    OpCase(
        "fastnuggets::rsample_normal",
        _normal_samples,
        _reference_normal,
        _NORMAL,
        dtypes=_FLOATING,
        any_dtype=_NORMAL,
        tolerance=_DRAWN,
        gradient_tolerance=_DRAWN,
    )
)
register(
    OpCase(
        "fastnuggets::rsample_normal_backward",
        _normal_backward_samples,
        _reference_normal_backward,
        dtypes=_FLOATING,
        any_dtype=("grad_z", "grad_var", "grad_kl", *_NORMAL),
        tolerance=_DRAWN,
    )
)
register(
    OpCase(
        "fastnuggets::gumbel_softmax",
        _gumbel_samples,
        _reference_gumbel_softmax,
        ("logits",),
        dtypes=_FLOATING,
        any_dtype=("logits",),
        tolerance=_DRAWN,
        gradient_tolerance=_DRAWN,
    )
)
register(
    OpCase(
        "fastnuggets::gumbel_softmax_backward",
        _gumbel_backward_samples,
        lambda grad, soft, tau: soft * (grad - (grad * soft).sum(-1, keepdim=True)) / tau,
        dtypes=_FLOATING,
        any_dtype=("grad", "soft"),
        tolerance={**_DRAWN, torch.float64: 1e-12},
    )
)
register(
    OpCase(
        "fastnuggets::kl_log_uniform",
        _log_uniform_samples,
        lambda x, approximation, event_dims: reference.kl_log_uniform(x, APPROXIMATIONS[approximation], event_dims),
        ("log_alpha",),
        dtypes=_FLOATING,
        any_dtype=("log_alpha",),
        tolerance={**_DRAWN, torch.float64: 1e-12},
        gradient_tolerance={**_DRAWN, torch.float64: 1e-12},
    )
)
register(
    OpCase(
        "fastnuggets::kl_log_uniform_backward",
        _log_uniform_backward_samples,
        _reference_log_uniform_backward,
        dtypes=_FLOATING,
        any_dtype=("grad", "log_alpha"),
        tolerance={**_DRAWN, torch.float64: 1e-12},
    )
)


# --- composite --------------------------------------------------------------------------------------------------------

_OBJECT_SIZES: dict[str, tuple[tuple[int, int, int, int], tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    # [B, C, H, W], objects' [h, w], objects of each image
    "typical": ((2, 2, 5, 6), ((3, 4), (2, 2), (4, 3)), (2, 1)),
    "larger": ((3, 3, 6, 7), ((3, 3), (1, 4), (2, 2), (5, 3)), (1, 0, 3)),
    "one": ((1, 1, 1, 1), ((1, 1),), (1,)),
    "empty": ((2, 2, 4, 3), (), (0, 0)),
    "parallel": ((3, 3, 140, 150), ((60, 80), (90, 40), (120, 130), (30, 31)), (1, 0, 3)),
}


def _objects(
    device: torch.device,
    dtype: torch.dtype,
    name: str = "typical",
    *,
    place: bool = False,
    perspective: float = 0.0,
    mix: int = 0,
    nearest: bool = False,
    taps: tuple[float, ...] = (),
    zero_edge: bool = False,
    channels_last: bool = False,
    alone: bool = False,
) -> tuple[Any, ...]:
    """Arguments of composite without labels: objects here and there, some partly outside, or by a matrix."""
    uniform = _random(12, device, dtype)
    (b, c, h, w), sizes, counts = _OBJECT_SIZES[name]
    areas = [height * width for height, width in sizes]
    starts = [0, *itertools.accumulate(areas)]
    rows = torch.tensor([(s, *size) for s, size in zip(starts, sizes, strict=False)], dtype=torch.int64, device=device)
    ptr: Tensor | None = torch.tensor([0, *counts], device=device).cumsum(0)
    background = uniform(0, 1, *((b, h, w, c) if channels_last else (b, c, h, w)))
    pixels, mask = uniform(0, 1, starts[-1] * c), uniform(0.1, 0.9, starts[-1])
    # Where objects lie does not depend on the type.
    number = _random(13, device, torch.float64)
    corner = number(-0.3, 0.5, len(sizes), 2) * torch.tensor([h, w], device=device)
    rule = (mix, nearest, list(taps), zero_edge, channels_last)
    if alone:  # one image
        background, ptr = background[0], None
    objects = (background, pixels, mask, rows.reshape(-1, 3), ptr)
    if place:
        return (*objects, corner.round().long(), None, *rule)
    linear = torch.eye(2, dtype=torch.float64, device=device) + number(-0.3, 0.3, len(sizes), 2, 2)
    bottom = torch.cat([number(-perspective, perspective, len(sizes), 1, 2), torch.ones_like(linear[:, :1, :1])], 2)
    matrix = torch.cat([torch.cat([linear, corner.flip(1)[:, :, None]], 2), bottom], 1)
    return (*objects, None, matrix, *rule)


_TAPS = (0.4, 0.2, 0.1)
_COMPOSITES: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "taps": _TAPS[:2]} for name in _OBJECT_SIZES},
    "placed": {"place": True, "alone": True},
    "placed, blurred": {"place": True, "taps": _TAPS, "channels_last": True},
    "placed, grown": {"place": True, "taps": _TAPS, "zero_edge": True},
    "grown": {"taps": _TAPS, "zero_edge": True, "channels_last": True},
    "homography": {"perspective": 0.03, "channels_last": True},
    "nearest": {"nearest": True, "taps": (1 / 3, 1 / 3)},
    "difference": {"mix": 1},
    "premultiplied": {"mix": 2},
    "premultiplied difference": {"mix": 3, "place": True},
}


def _composite_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    return {name: (*_objects(device, dtype, **how), name != "placed") for name, how in _COMPOSITES.items()}


def _composite_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, how in _COMPOSITES.items():
        arguments = _objects(device, dtype, **how)
        grad = _random(14, device, dtype)(-1, 1, *arguments[0].shape)
        made[name] = (grad, *arguments, [True, True, True, not how.get("place")])
    return made


def _reference_composite(
    background: Tensor,
    pixels: Tensor,
    mask: Tensor,
    sizes: Tensor,
    ptr: Tensor | None,
    place: Tensor | None,
    matrix: Tensor | None,
    mix: int,
    nearest: bool,
    taps: list[float],
    zero_edge: bool,
    channels_last: bool,
    labels: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    if ptr is None:  # one image
        alone = torch.tensor([0, len(sizes)])
        rule = mix, nearest, taps, zero_edge, channels_last, labels
        image, ids, area = _reference_composite(background[None], pixels, mask, sizes, alone, place, matrix, *rule)
        return image[0], ids[0] if labels else ids, area
    channels = background.shape[-1 if channels_last else 1]
    images, masks = [], []
    for first, h, w in sizes.tolist():
        masks.append(mask[first : first + h * w].view(h, w))
        flat = pixels[first * channels : (first + h * w) * channels]
        images.append(flat.view(h, w, channels).permute(2, 0, 1) if channels_last else flat.view(channels, h, w))
    image, ids, area = reference.composite(
        background.permute(0, 3, 1, 2) if channels_last else background,
        images,
        masks,
        ptr.tolist(),
        place=place,
        matrix=matrix,
        difference=mix % 2 == 1,
        premultiplied=mix >= 2,
        nearest=nearest,
        taps=taps,
        zero_edge=zero_edge,
    )
    image = image.permute(0, 2, 3, 1) if channels_last else image
    return image, ids if labels else ids.new_empty(0), area if labels else area.new_empty(0)


def _reference_composite_backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    background, pixels, mask, sizes, ptr, place, matrix, *rule, wanted = given

    def image(background: Tensor, pixels: Tensor, mask: Tensor, matrix: Tensor | None) -> Tensor:
        return _reference_composite(background, pixels, mask, sizes, ptr, place, matrix, *rule)[0]

    return _pulled_back(image, (background, pixels, mask, matrix), grad, wanted)


_COMPOSITE = ("background", "pixels", "mask", "matrix")
# Half types are rounded after each object, each way: seen, up to 1.6e-3 and 1.2e-2.
_ROUNDED = {**ROUNDING, torch.float16: 4e-3, torch.bfloat16: 3e-2}

register(
    OpCase(
        "fastnuggets::composite",
        _composite_samples,
        _reference_composite,
        _COMPOSITE,
        double_backward=False,
        dtypes=_FLOATING,
        any_dtype=_COMPOSITE,
        tolerance=_ROUNDED,
        gradient_tolerance=_ROUNDED,
    )
)
register(
    OpCase(
        "fastnuggets::composite_backward",
        _composite_backward_samples,
        _reference_composite_backward,
        dtypes=_FLOATING,
        any_dtype=("grad", *_COMPOSITE),
        tolerance=_ROUNDED,
    )
)


# --- Poisson blending -------------------------------------------------------------------------------------------------

# Background [B, C, H, W], (image, y, x, h, w) of each object, guidance, soft, channels_last.
_POISSON: dict[str, tuple[tuple[int, int, int, int], tuple[tuple[int, ...], ...], str, bool, bool]] = {
    "typical": ((2, 2, 4, 5), ((0, 1, 1, 2, 3), (1, -1, 2, 4, 4)), "import", False, False),
    "larger": ((3, 3, 8, 9), ((1, 2, 3, 5, 4), (0, 4, 6, 6, 6), (2, -2, -1, 7, 6)), "import", False, False),
    "mixed": ((1, 2, 6, 5), ((0, 1, 1, 4, 3),), "mixed", False, True),
    "average": ((1, 1, 5, 6), ((0, 0, 2, 4, 4),), "average", False, False),
    "soft": ((2, 2, 4, 4), ((1, 1, 1, 2, 3), (0, -1, -1, 3, 3)), "mixed", True, True),
    "whole image": ((1, 1, 4, 5), ((0, 0, 0, 4, 5),), "average", True, False),
    "outside": ((1, 1, 4, 4), ((0, 9, 0, 2, 2),), "import", False, False),
    "one": ((1, 1, 1, 1), ((0, 0, 0, 1, 1),), "import", False, False),
    "empty": ((1, 2, 4, 4), (), "import", False, False),
    "parallel": ((4, 3, 40, 44), tuple((b, 3 * b - 2, 5, 24, 26 + b) for b in range(4)), "mixed", False, True),
}


def _poisson(device: torch.device, dtype: torch.dtype, name: str) -> tuple[Any, ...]:
    size, objects, guidance, soft, last = _POISSON[name]
    uniform = _random(len(name), device, dtype)
    pixels = sum(h * w for *_, h, w in objects)
    background = uniform(0, 1, *size)
    # Hard: a quarter of the pixels is left out. Soft: nothing, as a difference quotient would take a 0 into the domain.
    mask = uniform(0.2, 0.9, pixels) if soft else (uniform(0, 1, pixels) > 0.25).to(dtype)
    mask = torch.ones_like(mask) if name == "one" else mask
    starts = itertools.accumulate((h * w for *_, h, w in objects), initial=0)
    rows = [(*place, start) for place, start in zip(objects, starts, strict=False)]
    table = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 6)
    # Grey levels. Values are numbers up to 1, so of float32 the tolerance below holds for the image 255 times over.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    background = background.movedim(1, -1).contiguous() if last else background
    kind = POISSON_GUIDANCES.index(guidance)
    return background, uniform(0, 1, pixels * size[1]), mask, table, 28, 30, kind, soft, tolerance, 60, last


def _poisson_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    return {name: _poisson(device, dtype, name) for name in _POISSON}


def _poisson_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, args in _poisson_samples(device, dtype).items():
        grad = _random(7, device, dtype)(-1, 1, *args[0].shape)
        made[name] = (grad, *args, [True, name != "mixed", args[7]])
    return made


def _reference_poisson(
    background: Tensor,
    pixels: Tensor,
    mask: Tensor,
    table: Tensor,
    _h: int,
    _w: int,
    guidance: int,
    soft: bool,
    _tolerance: float,
    _cycles: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The image, and that its error is 0."""
    image = reference.poisson_blend(
        background, pixels, mask, table, POISSON_GUIDANCES[guidance], soft=soft, channels_last=channels_last
    )
    return image, torch.zeros(table.size(0), device=table.device)


def _reference_poisson_backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    background, pixels, mask, *rest, wanted = given
    return _pulled_back(lambda *images: _reference_poisson(*images, *rest)[0], (background, pixels, mask), grad, wanted)


# The image and the estimate of its error, in grey levels, are held to one bound: that which was asked for.
_SOLVED = {torch.float32: 1e-3, torch.float64: 1e-10}
_SOLVED_BACK = {torch.float32: 2e-5, torch.float64: 1e-11}

register(
    OpCase(
        "fastnuggets::poisson_blend",
        _poisson_samples,
        _reference_poisson,
        ("background", "pixels", "mask"),
        double_backward=False,
        tolerance=_SOLVED,
        gradient_tolerance=_SOLVED_BACK,
    )
)
register(
    OpCase(
        "fastnuggets::poisson_blend_backward",
        _poisson_backward_samples,
        _reference_poisson_backward,
        tolerance=_SOLVED_BACK,
    )
)

_WALKS: dict[str, tuple[int, int]] = {
    "typical": (5, 6), "larger": (7, 9), "one": (1, 1), "empty": (0, 4), "parallel": (30, 26),
}  # fmt: skip


def _walker_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, (h, w) in _WALKS.items():
        uniform = _random(h * w, device, dtype)
        weights = [torch.exp(-6 * uniform(0, 1, h, w)) for _ in range(2)]
        seeds = torch.zeros(h * w, dtype=torch.int64, device=device)
        seeds[::7] = torch.arange(len(seeds[::7]), device=device) % 3 + 1
        made[name] = (*weights, seeds.view(h, w), 3, 1e-12, 200)
    return made


def _reference_walker(east: Tensor, south: Tensor, seeds: Tensor, labels: int, *_: Any) -> tuple[Tensor, Tensor]:
    return reference.random_walker(east, south, seeds, labels), east.new_zeros(1)


# Solved in float64, and not on a GPU.
register(OpCase("fastnuggets::random_walker", _walker_samples, _reference_walker, synchronises=True))


# --- filters ----------------------------------------------------------------------------------------------------------

# Half types: a unit of the last place. Seen in float32: 5e-7.
_FILTERED = {**ROUNDING, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _filter_taps_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(41, device, dtype)
    # dy, dx, weight, joins: on one side, far, heavy, negative.
    taps = [0, 0, 1, 0, -1, 2, 3, 0, 2, -1, 1, 1, 0, -4, -1, 0, 1, 0, 2, 0]

    def sample(size: tuple[int, ...], border: str, transposed: bool = False, last: bool = False) -> tuple[Any, ...]:
        return uniform(-1, 1, *size), taps, [0, 5], [6], BORDERS.index(border), 0.25, 0, transposed, last

    made = {
        "typical": sample((2, 3, 5, 7), "reflect"),
        "larger": sample((3, 2, 9, 6), "reflect"),
        "one": sample((1, 1, 1, 1), "reflect"),
        "empty": sample((2, 3, 0, 5), "reflect"),
        "parallel": sample((4, 3, 96, 100), "reflect"),
        "constant": sample((1, 2, 4, 3), "constant"),
        "replicate": sample((1, 2, 2, 5), "replicate"),
        "last": sample((1, 4, 6, 3), "reflect", last=True),
    }
    for border in BORDERS:
        for last in (False, True):
            made[f"transposed {border} {last}"] = sample((1, 4, 3, 6), border, True, last)
    image, _, _, _, *how = made["typical"]
    made["each"] = (image, taps[:12], [0, 1, 3], [1, 2], *how)
    return made


def _reference_filter_taps(
    image: Tensor,
    taps: list[int],
    ptr: list[int],
    divisors: list[int],
    border: int,
    value: float,
    _rounding: int,
    transposed: bool,
    last: bool,
) -> Tensor:
    planar = image.movedim(-1, 1) if last else image
    groups = [planar] if len(divisors) == 1 else list(planar.split(1))
    made = []
    for g, part in enumerate(groups):
        own = [(taps[4 * k], taps[4 * k + 1], taps[4 * k + 2]) for k in range(ptr[g], ptr[g + 1])]

        def linear(x: Tensor, own: Any = own, divisor: int = divisors[g], constant: float = value) -> Tensor:
            return reference.filter_taps(x, own, divisor, BORDERS[border], 0.0 if transposed else constant)

        made.append(reference.transposed(linear, part, part.shape) if transposed else linear(part))
    out = torch.cat(made)
    return out.movedim(1, -1) if last else out


def _pyramid_step_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(42, device, dtype)
    made = {
        "typical": (uniform(-1, 1, 2, 3, 7, 9), 0, 4, 5),
        "larger": (uniform(-1, 1, 3, 2, 8, 10), 0, 4, 5),
        "one": (uniform(-1, 1, 1, 1, 1, 1), 0, 1, 1),
        "empty": (uniform(-1, 1, 2, 0, 4, 6), 0, 2, 3),
        "parallel": (uniform(-1, 1, 3, 150, 160), 0, 75, 80),
    }
    for number, step in enumerate(STEPS):
        for h, w in ((4, 7), (1, 2)):
            fine, coarse = (h, w), ((h + 1) // 2, (w + 1) // 2)
            size, out = (fine, coarse) if step in ("down", "up_transposed") else (coarse, fine)
            made[f"{step} {h} {w}"] = (uniform(-1, 1, 2, *size), number, *out)
    return made


def _reference_pyramid_step(image: Tensor, step: int, h: int, w: int) -> Tensor:
    size = (*image.shape[:-2], h, w)
    if STEPS[step] == "down":
        return reference.pyr_down(image)
    if STEPS[step] == "up":
        return reference.pyr_up(image, (h, w))
    if STEPS[step] == "down_transposed":
        return reference.transposed(reference.pyr_down, image, size)
    return reference.transposed(lambda x: reference.pyr_up(x, image.shape[-2:]), image, size)


def _multiband_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(43, device, dtype)

    def sample(b: int, c: int, h: int, w: int, levels: int, last: bool = False) -> tuple[Any, ...]:
        size = (b, h, w, c) if last else (b, c, h, w)
        return uniform(0, 1, *size), uniform(0, 1, *size), uniform(0, 1, b, h, w), levels, last

    return {
        "typical": sample(2, 2, 6, 9, 2),
        "larger": sample(3, 3, 11, 8, 2),
        "one": sample(1, 1, 1, 1, 2),
        "empty": sample(1, 0, 5, 4, 2),
        "parallel": sample(2, 3, 90, 110, 5),
        "last": sample(1, 3, 5, 6, 2, True),
        "alpha": sample(1, 2, 3, 4, 0),
        "last five": sample(1, 5, 3, 4, 2, True),
    }


def _multiband_backward_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    uniform = _random(44, device, dtype)
    made = {}
    for name, args in _multiband_samples(device, dtype).items():
        made[name] = (uniform(-1, 1, *args[0].shape), *args, [True, True, True])
    for k, name in enumerate(("background", "foreground", "mask")):
        made[name] = (*made["typical"][:-1], [k == i for i in range(3)])
    return made


def _reference_multiband(background: Tensor, foreground: Tensor, mask: Tensor, levels: int, last: bool) -> Tensor:
    under, over = (t.movedim(-1, 1) if last else t for t in (background, foreground))
    out = reference.multiband_blend(under, over, mask, levels)
    return out.movedim(1, -1) if last else out


def _reference_multiband_backward(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *images, levels, last, wanted = given
    return _pulled_back(lambda u, o, m: _reference_multiband(u, o, m, levels, last), images, grad, wanted)


register(
    OpCase(
        "fastnuggets::filter_taps",
        _filter_taps_samples,
        _reference_filter_taps,
        ("image",),
        dtypes=_FLOATING,
        any_dtype=("image",),
        tolerance=_FILTERED,
        gradient_tolerance=_FILTERED,
    )
)
register(
    OpCase(
        "fastnuggets::pyramid_step",
        _pyramid_step_samples,
        _reference_pyramid_step,
        ("image",),
        dtypes=_FLOATING,
        any_dtype=("image",),
        tolerance=_FILTERED,
        gradient_tolerance=_FILTERED,
    )
)
register(
    OpCase(
        "fastnuggets::multiband_blend",
        _multiband_samples,
        _reference_multiband,
        ("background", "foreground", "mask"),
        dtypes=_FLOATING,
        any_dtype=("background", "foreground", "mask"),
        tolerance=_FILTERED,
        gradient_tolerance=_FILTERED,
    )
)
register(
    OpCase(
        "fastnuggets::multiband_blend_backward",
        _multiband_backward_samples,
        _reference_multiband_backward,
        dtypes=_FLOATING,
        any_dtype=("grad", "background", "foreground", "mask"),
        tolerance=_FILTERED,
    )
)


# --- screen -----------------------------------------------------------------------------------------------------------

# queries, rows, bytes a row, k, threshold
_SCREENS = {
    "typical": (3, 20, 16, 4, 0.1),
    "larger": (5, 70, 24, 4, 0.1),
    "one": (1, 1, 8, 1, 0.0),
    "empty": (0, 5, 8, 2, 0.0),
    "parallel": (130, 5000, 24, 7, 0.0),
    "no rows": (2, 0, 8, 3, 0.0),
    "few rows": (4, 30, 128, 40, 0.0),
    "few above": (4, 300, 40, 20, 0.25),
    "no bytes": (2, 3, 0, 2, 0.0),
}


def _tanimoto_samples(device: torch.device, dtype: torch.dtype) -> Samples:
    made = {}
    for name, (queries, rows, width, k, threshold) in _SCREENS.items():
        uniform = _random(rows + width, torch.device("cpu"), torch.float32)
        bits = [uniform(0, 1, n, width, 8) < uniform(0.02, 0.5, n, 1, 1) for n in (queries, rows)]
        bits[1][::9] = False
        packed = [(b * (1 << torch.arange(8))).sum(2, dtype=torch.int64).to(device, torch.uint8) for b in bits]
        made[name] = (*packed, k, threshold)
    return made


# Fractions of whole numbers: their order is exact and the quotient is rounded once.
register(
    OpCase(
        "fastnuggets::tanimoto_topk",
        _tanimoto_samples,
        reference.tanimoto_topk,
        tolerance={torch.float32: 0.0, torch.float64: 0.0},
    )
)
