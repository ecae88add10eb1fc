"""The contract's checks catch what they are for: a right op passes them all, and each planted fault fails its check."""

import itertools

import pytest
import test_contract as contract
import torch
from torch.autograd import forward_ad
from torch.testing._internal.optests import OpCheckError

from fastnuggets.testing import CASES, OpCase, far_apart, register, strided

CPU = torch.device("cpu")
NAMESPACE = "fastnuggets_toy"
counter = itertools.count()
libraries = []


def samples(device, dtype):
    shapes = {"typical": (3, 2), "larger": (5, 4), "one": (1, 1), "empty": (0, 2), "parallel": (60, 99)}
    return {name: (torch.linspace(0.5, 2, a * b).reshape(a, b).to(device, dtype),) for name, (a, b) in shapes.items()}


def plain(x):
    return x**3


def reads_packed_memory(x):
    return torch.as_strided(x, x.shape, torch.empty(x.shape).stride()) ** 3


def offsets_in_32_bits(x):
    offsets = sum(
        torch.arange(n).reshape([-1 if i == axis else 1 for i in range(x.dim())]) * x.stride(axis)
        for axis, n in enumerate(x.shape)
    )
    wrapped = (offsets + 2**31) % 2**32 - 2**31
    return torch.where(wrapped == offsets, x, 0) ** 3


def depends_on_the_call(x):
    return x**3 * (1 + 1e-6 * next(counter))


def depends_on_the_threads(x):
    return x**3 * (1 + 1e-6 * torch.get_num_threads())


def writes_its_input(x):
    out = x**3
    x.add_(1)
    return out


def inaccurate(x):
    return x**3 + 1e-5


def below_autograd(kernel):
    def function(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    return function


def toy(
    kernel=plain,
    fake=torch.empty_like,
    factor=3.0,
    second=True,
    autograd=True,
    tangents=False,
    graph=False,
    autocast=True,
    saved=True,
):
    """Registers x^3 (with the faults asked for) and its derivative, and returns their OpCase."""
    name = f"cube{next(counter)}"
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    libraries.append(library)
    library.define(f"{name}(Tensor x) -> Tensor")
    library.define(f"{name}_backward(Tensor grad, Tensor x) -> Tensor")
    library.impl(name, below_autograd(kernel), "CompositeExplicitAutograd")
    library.impl(f"{name}_backward", below_autograd(lambda grad, x: grad * factor * x**2), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::{name}_backward", lambda grad, x: torch.empty_like(x), lib=library)
    forward_op = getattr(getattr(torch.ops, NAMESPACE), name).default
    backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, grad, x):
            ctx.save_for_backward(grad, x)
            with torch._C._AutoDispatchBelowAutograd():
                return backward_op(grad, x)

        @staticmethod
        def backward(ctx, g):
            grad, x = ctx.saved_tensors
            return g * factor * x**2, g * grad * 2 * factor * x

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x) if saved else setattr(ctx, "x", x)
            with torch._C._AutoDispatchBelowAutograd():
                return forward_op(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors if saved else (ctx.x,)
            return backward_op(grad, x)

    def record(function, op):
        def kernel(*args):
            if not tangents and any(forward_ad.unpack_dual(a).tangent is not None for a in args):
                raise NotImplementedError(f"{name}: forward-mode AD is not supported")
            if graph or (torch.is_grad_enabled() and any(a.requires_grad for a in args)):
                with torch.set_grad_enabled(graph or torch.is_grad_enabled()):
                    return function.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        return kernel

    def lower(x):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return forward_op(x.float() if x.dtype == torch.bfloat16 else x)

    if autograd:
        library.impl(name, record(Forward, forward_op), "Autograd")
        if second:
            library.impl(f"{name}_backward", record(Backward, backward_op), "Autograd")
    if autocast:
        library.impl(name, lower, "AutocastCPU")
    return OpCase(f"{NAMESPACE}::{name}", samples, plain, differentiable=("x",))


def checks():
    return {
        name: function
        for name, function in vars(contract).items()
        if name.startswith("test_") and "case" in function.__code__.co_varnames[: function.__code__.co_argcount]
    }


def run(name, case):
    """Runs a check of the contract on the CPU, with each of its parameters."""
    function = checks()[name]
    before = torch.get_num_threads()
    arguments = {"case": case, "device": CPU, "threads": torch.set_num_threads}
    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    try:
        for value in marks[0].args[1] if marks else [None]:
            extra = {marks[0].args[0]: value} if marks else {}
            function(**{k: v for k, v in arguments.items() if k in wanted}, **extra)
    finally:
        torch.set_num_threads(before)


def on_cpu(name):
    return not any(m.name == "skipif" for m in getattr(checks()[name], "pytestmark", []))


@pytest.mark.parametrize("name", [name for name in checks() if on_cpu(name)])
def test_a_right_op_passes(name):
    run(name, toy())


FAULTS = [
    ("test_equals_reference", {"kernel": inaccurate}),
    ("test_gradient_equals_reference", {"factor": 3.001}),
    ("test_same_bits_twice", {"kernel": depends_on_the_call}),
    ("test_same_bits_for_any_number_of_threads", {"kernel": depends_on_the_threads}),
    ("test_inputs_are_left_alone", {"kernel": writes_its_input}),
    ("test_any_strides", {"kernel": reads_packed_memory}),
    ("test_any_strides", {"kernel": offsets_in_32_bits}),
    ("test_gradcheck", {"factor": 3.001}),
    ("test_gradcheck", {"autograd": False}),
    ("test_gradgradcheck", {"second": False}),
    ("test_no_graph_without_need", {"graph": True}),
    ("test_forward_mode_is_refused", {"tangents": True}),
    ("test_changing_a_saved_input_is_noticed", {"saved": False}),
    ("test_opcheck", {"fake": lambda x: x.new_empty((*x.shape, 1))}),
    ("test_opcheck", {"kernel": writes_its_input}),
    ("test_backward_calls_registered_ops", {"autograd": False}),
    ("test_fake_tensors", {"fake": lambda x: x.new_empty(x.shape, dtype=torch.float32)}),
    ("test_compile", {"fake": lambda x: x.new_empty([int(n) for n in x.shape])}),
    ("test_export", {"fake": lambda x: x.new_empty(x.shape if x.sum() > 0 else ())}),
    ("test_export", {"fake": lambda x: x.new_empty([int(n) for n in x.shape])}),
    ("test_autocast", {"autocast": False}),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_is_caught(name, fault):
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception, OpCheckError)):
        run(name, toy(**fault))


def test_an_op_has_one_case():
    case = toy()
    register(case)
    try:
        with pytest.raises(ValueError, match="has an OpCase already"):
            register(case)
    finally:
        del CASES[case.op]


def test_an_op_without_a_case_is_noticed(monkeypatch):
    monkeypatch.setattr(contract, "CASES", {})
    monkeypatch.setattr(contract, "registered_ops", lambda: {"fastnuggets::forgotten"})
    with pytest.raises(AssertionError):
        contract.test_every_registered_op_has_a_case()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 2), (1, 4), (2, 1, 3), (0, 3)])
def test_layouts_keep_values(shape):
    x = torch.randn(shape)
    for layout in (strided, far_apart):
        moved = layout(x)
        assert torch.equal(moved, x)
        assert moved.dtype == x.dtype
    if x.numel() > 1:
        assert not strided(x).is_contiguous() or x.dim() == 0
        assert far_apart(x).untyped_storage().nbytes() > 2**31 * x.element_size()
