"""The promises every op makes (CONTRIBUTING.md lists them), checked for every OpCase on every device at hand."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastnuggets.testing import (
    CASES,
    SAMPLES,
    as_double,
    far_apart,
    map_tensors,
    registered_ops,
    strided,
    tensors_in,
)

CPU = torch.device("cpu")


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def differentiable(case):
    if not case.differentiable:
        pytest.skip("no derivative")


def each(case, device, dtype=torch.float64, only=None):
    for name, args in case.samples(device, dtype).items():
        if only is None or name in only:
            yield name, args


def assert_same_bits(actual, expected, message=""):
    assert len(actual) == len(expected), message
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device), message
        assert torch.equal(a, e), f"{message}: differs by {(a - e).abs().max()}"


def assert_near(actual, expected, tolerance, message=""):
    """The largest error of each output, relative to the output's largest value."""
    assert len(actual) == len(expected), message
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"{message}: {tuple(a.shape)}, expected {tuple(e.shape)}"
        if a.numel() == 0:
            continue
        error = (a.detach().double() - e.detach().double()).abs().max()
        assert error <= tolerance * max(1.0, e.detach().abs().max().item()), f"{message}: error {error:.3g}"


def pull(outputs, leaves, seed=0):
    """Gradients of `leaves` for a fixed random cotangent of every output that has a graph."""
    outputs = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)


class Ops(TorchDispatchMode):
    """Names of the ops that reach a backend."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_registered_op_has_a_case():
    assert registered_ops() - set(CASES) == set()
    assert set(CASES) - registered_ops() == set()


def test_samples_are_complete(case, device):
    samples = case.samples(device, torch.float64)
    assert set(SAMPLES) <= set(samples)
    again = case.samples(device, torch.float64)
    for name, args in samples.items():
        assert_same_bits(tensors_in(again[name]), tensors_in(args), name)
    empty = samples["empty"]
    assert any(a.numel() == 0 for a in (*tensors_in(empty), *case(*empty)))
    for a, b in zip(samples["typical"], samples["larger"], strict=True):
        assert isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)
        assert len(tensors_in([a])) == len(tensors_in([b]))


# --- values -----------------------------------------------------------------------------------------------------------


def test_equals_reference(case, device):
    for dtype in case.dtypes:
        for name, args in each(case, device, dtype):
            assert_near(case(*args), case.expected(*args), case.tolerance[dtype], f"{name} {dtype}")


def test_gradient_equals_reference(case, device):
    differentiable(case)
    for dtype in case.dtypes:
        for name, args in each(case, device, dtype):
            function, leaves = case.as_function(args)
            actual = pull(function(*leaves), leaves)
            args64 = case.recorded(map_tensors(as_double, args))
            expected = pull(case.expected(*args64), [args64[i] for i in case.active(args)])
            assert_near(actual, expected, case.gradient_tolerance[dtype], f"{name} {dtype}")


def test_same_bits_twice(case, device):
    for name, args in each(case, device, torch.float32):
        function, leaves = case.as_function(args)
        first, second = function(*leaves), function(*leaves)
        assert_same_bits(first, second, name)
        if case.differentiable:
            assert_same_bits(pull(first, leaves), pull(second, leaves), name)


def test_same_bits_for_any_number_of_threads(case, threads):
    for name, args in each(case, CPU, torch.float32):
        function, leaves = case.as_function(args)
        results = []
        for n in (1, 2, 3):
            threads(n)
            outputs = function(*leaves)
            results.append(outputs + (pull(outputs, leaves) if case.differentiable else ()))
        assert_same_bits(results[1], results[0], name)
        assert_same_bits(results[2], results[0], name)


def test_calls_from_several_threads(case, device):
    """The binding gives up the GIL: calls that run side by side must not share anything."""
    samples = [args for _, args in each(case, device, torch.float32)] * 3
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda args: case(*args), samples))
    for outputs, args in zip(together, samples, strict=True):
        assert_same_bits(outputs, case(*args))


def test_inputs_are_left_alone(case, device):
    for name, args in each(case, device):
        before = map_tensors(torch.clone, args)
        case(*args)
        assert_same_bits(tensors_in(args), tensors_in(before), name)


@pytest.mark.parametrize("layout", [strided, far_apart], ids=["strided", "beyond_2_31"])
def test_any_strides(case, device, layout):
    """One argument after the other: `far_apart` asks for 8 or 16 GiB of address space each time."""
    for name, args in each(case, device, torch.float32, only=("typical", "one", "empty")):
        expected = case(*args)
        function, leaves = case.as_function(args)
        gradients = pull(function(*leaves), leaves) if case.differentiable else ()
        for i, a in enumerate(args):
            if not tensors_in([a]) or i in case.mutated:
                continue
            try:
                (moved,) = map_tensors(layout, (a,))
            except RuntimeError as error:
                pytest.skip(f"not enough address space: {error}")
            full = (*args[:i], moved, *args[i + 1 :])
            assert_same_bits(case(*full), expected, f"{name}, argument {i}")
            if case.differentiable:
                recorded = tuple(moved if j == i else leaf for j, leaf in zip(case.active(args), leaves, strict=True))
                recorded = tuple(t.detach().requires_grad_() for t in recorded)
                outputs = case.as_function(full)[0](*recorded)
                assert_same_bits(pull(outputs, recorded), gradients, f"{name}, gradient, argument {i}")


@pytest.mark.parametrize("layout", [strided, far_apart], ids=["strided", "beyond_2_31"])
def test_cotangents_of_any_strides(case, device, layout):
    differentiable(case)
    for name, args in each(case, device, torch.float32, only=("typical", "one", "empty")):
        function, leaves = case.as_function(args)
        outputs = [o for o in function(*leaves) if o.requires_grad]
        cotangents = [torch.randn(o.shape, device=device) for o in outputs]
        expected = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)
        try:
            moved = [layout(c) for c in cotangents]
        except RuntimeError as error:
            pytest.skip(f"not enough address space: {error}")
        actual = torch.autograd.grad(outputs, leaves, moved, retain_graph=True, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                assert_same_bits([a], [e], name)


def test_expanded_cotangent(case, device):
    """`outputs.sum().backward()` sends a cotangent whose strides are all zero."""
    differentiable(case)
    for name, args in each(case, device, torch.float32):
        function, leaves = case.as_function(args)
        outputs = [o for o in function(*leaves) if o.requires_grad]
        summed = torch.autograd.grad(
            sum(o.sum() for o in outputs), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        dense = torch.autograd.grad(
            outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True, materialize_grads=True
        )
        assert_same_bits(summed, dense, name)


# --- autograd ---------------------------------------------------------------------------------------------------------


# A central difference of step 1e-6 in float64 is good to about 1e-9; PyTorch's 1e-3 would pass a wrong third digit.
FINITE_DIFFERENCES = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


def gradcheck_samples(case, device):
    return each(case, device, torch.float64, only=set(case.samples(device, torch.float64)) - {"larger", "parallel"})


def test_gradcheck(case, device):
    differentiable(case)
    for name, args in gradcheck_samples(case, device):
        function, leaves = case.as_function(args)
        assert gradcheck(function, leaves, **FINITE_DIFFERENCES), name


def test_gradgradcheck(case, device):
    differentiable(case)
    if not case.double_backward:
        pytest.skip("no second derivative")
    for name, args in gradcheck_samples(case, device):
        function, leaves = case.as_function(args)
        assert gradgradcheck(function, leaves, **FINITE_DIFFERENCES), name


def test_a_missing_derivative_is_an_error(case, device):
    """Neither zero nor silence: whoever differentiates further than the op goes is told so."""
    args = case.samples(device, torch.float64)["typical"]
    if not any(t.is_floating_point() for t in tensors_in(args)):
        pytest.skip("nothing to differentiate by")
    leaves = map_tensors(lambda a: a.detach().clone().requires_grad_(a.is_floating_point()), args)
    if not case.differentiable:
        with pytest.raises(RuntimeError, match=r"derivative|differentiable|does not require grad"):
            outputs = [o for o in case(*leaves) if o.is_floating_point()]
            torch.autograd.grad(outputs[0].sum(), [a for a in tensors_in(leaves) if a.requires_grad])
    elif not case.double_backward:
        function, leaves = case.as_function(args)
        first = torch.autograd.grad(sum(o.sum() for o in function(*leaves)), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"derivative|differentiable|does not require grad"):
            torch.autograd.grad(sum(g.sum() for g in first), leaves)


def test_no_graph_without_need(case, device):
    args = case.samples(device, torch.float64)["typical"]
    recorded = case.recorded(args)
    assert not any(o.requires_grad or o.grad_fn for o in case(*args))
    with torch.no_grad():
        assert not any(o.requires_grad or o.grad_fn for o in case(*recorded))
    with torch.inference_mode():
        assert not any(o.requires_grad for o in case(*recorded))
    if case.differentiable:
        assert any(o.requires_grad for o in case(*recorded))


def test_gradients_only_where_asked(case, device):
    differentiable(case)
    args = case.samples(device, torch.float64)["typical"]
    active = case.active(args)
    function, leaves = case.as_function(args)
    everything = pull(function(*leaves), leaves)
    for k in range(len(active)):
        alone = [leaf.detach() for leaf in leaves]
        alone[k].requires_grad_()
        outputs = function(*alone)
        if any(o.requires_grad for o in outputs):
            assert_near(pull(outputs, [alone[k]]), [everything[k]], 1e-14, f"argument {active[k]}")


def test_forward_mode_is_refused(case, device):
    args = case.samples(device, torch.float64)["typical"]
    for i, a in enumerate(args):
        if i in case.mutated or not any(t.is_floating_point() for t in tensors_in([a])):
            continue
        for grad_mode in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
                (dual,) = map_tensors(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), (a,))
                with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward.?(mode|AD)|jvp"):
                    case(*args[:i], dual, *args[i + 1 :])


def test_changing_a_saved_input_is_noticed(case, device):
    """Backward either does not need the input, and is right, or says that it was changed."""
    differentiable(case)
    args = case.samples(device, torch.float64)["typical"]
    function, leaves = case.as_function(args)
    expected = pull(function(*leaves), leaves)
    for k in range(len(leaves)):
        copies = [a.clone() if j == k else a for j, a in enumerate(leaves)]
        outputs = function(*copies)
        with torch.no_grad():
            copies[k].mul_(3)
        try:
            actual = pull(outputs, leaves)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            assert_near(actual, expected, 1e-14, f"argument {k}")


def test_writing_raises_the_version(case, device):
    if not case.mutated:
        pytest.skip("writes nothing")
    args = map_tensors(torch.clone, case.samples(device, torch.float64)["typical"])
    written = tensors_in([args[i] for i in case.mutated])
    before = [t._version for t in written]
    case.overload(*args)
    assert all(t._version > v for t, v in zip(written, before, strict=True))


def test_backward_calls_registered_ops(case, device):
    """A dispatch mode sees one forward op, and in backward only ops of ours and PyTorch's."""
    args = case.samples(device, torch.float64)["typical"]
    function, leaves = case.as_function(args)
    with Ops() as forward:
        outputs = function(*leaves)
    assert [name for name in forward.seen if name.startswith(case.op.split("::")[0])] == [case.op]
    if case.differentiable:
        with Ops() as backward:
            pull(outputs, leaves)
        ours = {name for name in backward.seen if name.startswith(case.op.split("::")[0])}
        assert ours
        assert ours <= registered_ops(case.op.split("::")[0])


# --- tracing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
def test_opcheck(case, device, recording):
    for name, args in each(case, device, torch.float32, only=("typical", "one", "empty")):
        torch.library.opcheck(case.overload, case.recorded(args) if recording else args), name


def test_fake_tensors(case, device):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for dtype in case.dtypes:
        for name, args in each(case, device, dtype):
            real = case(*args)
            with FakeTensorMode(shape_env=ShapeEnv()) as mode:
                fake = case(*map_tensors(mode.from_tensor, args))
            for r, f in zip(real, fake, strict=True):
                assert (f.dtype, f.device, f.dim()) == (r.dtype, r.device, r.dim()), name
                if not case.data_dependent:
                    assert f.shape == r.shape, name
                    assert [s for s, n in zip(f.stride(), f.shape, strict=True) if n > 1] == [
                        s for s, n in zip(r.stride(), r.shape, strict=True) if n > 1
                    ], name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(case, device, dynamic):
    """With dynamic shapes the graph of the first sample serves the second: compiling again is an error."""
    torch._dynamo.reset()
    compiled = torch.compile(case.functional, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    samples = case.samples(device, torch.float64)
    # Without duck shapes: two sizes that are equal in the first sample are still two sizes.
    separate = torch.fx.experimental._config.patch(use_duck_shape=False)
    rules = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=dynamic)
    with separate, rules:
        for name in ("typical", "larger") if dynamic else ("typical", "one", "empty"):
            recorded = case.recorded(samples[name])
            leaves = [recorded[i] for i in case.active(recorded)]
            expected = case(*recorded)
            outputs = compiled(*recorded)
            assert_near(outputs, expected, 1e-13, name)
            if case.differentiable:
                assert_near(pull(outputs, leaves), pull(expected, leaves), 1e-13, name)


def test_export(case, device):
    class Module(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.function = case.functional
            self.args = args

        def forward(self, *tensors):
            left = iter(tensors)
            return self.function(*map_tensors(lambda _: next(left), self.args))

    samples = case.samples(device, torch.float32)
    args, larger = samples["typical"], samples["larger"]
    tensors = tuple(tensors_in(args))
    same_constants = all(tensors_in([a]) or a == b for a, b in zip(args, larger, strict=True))
    sizes = [dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO) for t in tensors]
    program = torch.export.export(Module(args), tensors, dynamic_shapes={"tensors": tuple(sizes)}).module()
    assert_same_bits(program(*tensors), case(*args))
    if same_constants:
        assert_same_bits(program(*tensors_in(larger)), case(*larger))


def test_autocast(case, device):
    """Half inputs, as layers under autocast make them, are computed in float32; so is the gradient."""
    if torch.float32 not in case.dtypes:
        pytest.skip("no float32")
    names = [a.name for a in case.overload._schema.arguments]
    args = case.samples(device, torch.float32)["typical"]
    active = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    active = [i for i in active if i not in case.mutated and names[i] not in case.any_dtype]
    if not active:
        pytest.skip("takes any floating type as it is")
    half = tuple(a.bfloat16() if i in active else a for i, a in enumerate(args))
    single = tuple(a.float() if i in active else a for i, a in enumerate(half))
    expected = case(*single)
    for lowered in (half, tuple(a if i == active[0] else args[i] for i, a in enumerate(half))):
        with torch.autocast(device.type, torch.bfloat16):
            recorded = case.recorded(lowered)
            outputs = case(*recorded)
        assert [o.dtype for o in outputs] == [e.dtype for e in expected]
        if lowered is half:
            assert_same_bits([o.detach() for o in outputs], expected)
        if case.differentiable:
            leaves = [recorded[i] for i in case.active(recorded)]
            assert [g.dtype for g in pull(outputs, leaves)] == [leaf.dtype for leaf in leaves]


# --- CUDA -------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_cuda
def test_cuda_equals_cpu(case):
    for dtype in case.dtypes:
        for name, args in each(case, CPU, dtype):
            expected = case(*args)
            actual = [o.cpu() for o in case(*map_tensors(torch.Tensor.cuda, args))]
            assert_near(actual, expected, case.tolerance[dtype], f"{name} {dtype}")


@needs_cuda
def test_no_synchronisation(case):
    if case.synchronises:
        pytest.skip("the host waits for values")
    for _name, args in each(case, torch.device("cuda"), torch.float32):
        function, leaves = case.as_function(args)
        outputs = function(*leaves)
        cotangents = [torch.ones_like(o) for o in outputs]
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            outputs = function(*leaves)
            if case.differentiable:
                torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_graph(case):
    if case.synchronises:
        pytest.skip("the host waits for values")
    args = case.samples(torch.device("cuda"), torch.float32)["typical"]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case(*args)
    torch.cuda.current_stream().wait_stream(side)
    held = map_tensors(torch.clone, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case(*held)
    for i in case.active(args):
        held[i].mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(outputs, case(*held))


@needs_cuda
def test_current_stream(case):
    """Work queued on a side stream just before the op is seen by it."""
    args = case.samples(torch.device("cuda"), torch.float32)["typical"]
    expected = case(*args)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = map_tensors(torch.clone, args)
        outputs = case(*late)
    side.synchronize()
    assert_same_bits(outputs, expected)
