"""What each registered op promises: `tests/test_contract.py` checks it and `bench/` times the same inputs.

A family registers one `OpCase` for each of its ops, backward ops included. An op without one fails a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastnuggets"

# Every case has these samples. "typical" is small enough for gradcheck; "larger" differs from it in its tensors' sizes
# alone, so that one compiled graph must serve both; "parallel" has work for several threads.
SAMPLES = ("typical", "larger", "one", "empty", "parallel")

Samples = Mapping[str, tuple[Any, ...]]

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
        data_dependent: an output's size depends on values, so the op synchronises and no CUDA graph can hold it.
        dtypes: the floating types of the inputs.
        tolerance: largest error against `reference` run in float64, relative to the reference's largest value (or 1).
        gradient_tolerance: the same for the gradients.
    """

    op: str
    samples: Callable[[torch.device, torch.dtype], Samples]
    reference: Callable[..., Any]
    differentiable: tuple[str, ...] = ()
    double_backward: bool = True
    data_dependent: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: dict(ROUNDING))
    gradient_tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: dict(ROUNDING))

    @property
    def overload(self) -> torch._ops.OpOverload:
        namespace, name = self.op.split("::")
        return getattr(getattr(torch.ops, namespace), name).default

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
            args = tuple(a.clone() if i in mutated else a for i, a in enumerate(args))
            return _as_tuple(overload(*args)) + tuple(args[i] for i in mutated)

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
    return tuple(function(a) if isinstance(a, Tensor) else a for a in args)


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
