"""fastnuggets.training.WeightAverager: against torch's and others' averages, and what those get wrong."""

import copy
import io
import itertools
import math
import warnings
import zlib

import pytest
import torch
from averaging_ranks import run_ranks
from torch import nn
from torch.optim import swa_utils

from fastnuggets import ops
from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.decay import EmaDecay

safetensors = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    """A root-level parameter, a convolution, BatchNorm's float and integer buffers, tied weights, a table."""

    def __init__(self, width=4):
        super().__init__()
        self.zoom = nn.Parameter(torch.randn(3))
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x * self.zoom[:, None, None])).mean((2, 3)))


def drift(model, by=0.1):
    """A step of training, as far as averages can tell."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p), alpha=by)
        for b in model.buffers():
            b.add_(torch.randn(b.shape).to(b) * by if b.is_floating_point() else 1)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


def assert_close(found, wanted, atol):
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                found[name].double(), value.double(), rtol=0, atol=atol, msg=lambda m, n=name: n + m
            )


# ---- the same averages as others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("mode", ["swa", "ema"])
def test_torch_over_1000_steps(mode, use_buffers):
    model = Net()
    function = swa_utils.get_ema_multi_avg_fn(0.99) if mode == "ema" else None
    theirs = swa_utils.AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)
    ours = WeightAverager(
        model, mode, 0.99 if mode == "ema" else None, buffers="average" if use_buffers else "recompute"
    )
    exact, rate = {}, 0.0
    for step in range(1000):
        drift(model)
        theirs.update_parameters(model)
        assert ours.update()
        rate = 1 / (step + 1) if mode == "swa" else 1.0 if step == 0 else 0.01
        live = dict(model.named_parameters()) | (dict(model.named_buffers()) if use_buffers else {})
        for name, value in live.items():
            if value.is_floating_point():
                old = exact.get(name, 0.0)
                exact[name] = old + rate * (value.detach().double() - old)
    found = ours.averages
    # Weights are up to 10. Measured: both 2.9e-6 (SWA) and 1.8e-6 (EMA) from float64; 4.8e-7 and 0 from each other.
    assert_close(found, exact, 6e-6)
    assert_close(found, dict(theirs.module.named_parameters()), 1e-6)
    assert ours.count == int(theirs.n_averaged) == 1000


@pytest.mark.parametrize("warmup", [False, True])
def test_timm(warmup):
    utils = pytest.importorskip("timm.utils")
    model = Net()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())  # timm updates tied weights twice
    theirs = utils.ModelEmaV3(model, 0.99, use_warmup=warmup, foreach=False)
    ours = WeightAverager(model, "ema", 0.99, warmup="power" if warmup else None)
    for step in range(200):
        drift(model)
        theirs.update(model, step=step + 1)
        ours.update()
    assert_close(ours.averages, theirs.module.state_dict(), 4e-6)


def test_ema_pytorch():
    package = pytest.importorskip("ema_pytorch")
    model = Net()
    theirs = package.EMA(model, beta=0.99, update_after_step=0, update_every=1, power=3 / 4)
    ours = WeightAverager(model, "ema", EmaDecay(0.99, "power", power=3 / 4))
    for _ in range(200):  # both copy in the first call
        drift(model)
        theirs.update()
        ours.update()
    assert_close(ours.averages, dict(theirs.ema_model.named_parameters()), 4e-6)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [
        (EmaDecay(0.9), [0, 0.9, 0.9, 0.9]),
        (EmaDecay(0.6, "power"), [0, 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3), 0.6]),
        (EmaDecay(0.99, "power", gamma=2.0, power=0.75), [0, 1 - 1.5**-0.75, 1 - 2**-0.75, 1 - 2.5**-0.75]),
        (EmaDecay(0.3, "ratio"), [0, 2 / 11, 3 / 12, 0.3]),
        (EmaDecay(0.3, "ratio", minimum=0.2), [0, 0.2, 3 / 12, 0.3]),
        (EmaDecay.karras(1.0), [0, (1 / 2) ** 2, (2 / 3) ** 2, (3 / 4) ** 2]),
    ],
)
def test_decays(decay, wanted):
    assert [decay.at(t) for t in range(4)] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.99, 0.9999999, 1.0])
def test_debias_is_the_average_from_zero_over_its_weights(value):
    decay, biased, total, ours = EmaDecay(value, "debias"), 0.0, 0.0, 0.0
    for t in range(50):
        w = math.sin(3.0 * t)
        biased, total = (
            (biased + w, total + 1)
            if value == 1
            else (value * v + (1 - value) * x for v, x in ((biased, w), (total, 1)))
        )
        ours += (1 - decay.at(t)) * (w - ours)
        assert ours == pytest.approx(biased / total, abs=1e-8)


def test_karras_widths():
    # The two profiles of the paper: relative widths 0.05 and 0.10.
    assert EmaDecay.karras(width=0.05).gamma == pytest.approx(16.97, abs=5e-3)
    assert EmaDecay.karras(width=0.10).gamma == pytest.approx(6.94, abs=5e-3)
    for wrong in ({}, {"gamma": 1.0, "width": 0.1}, {"width": 0.3}):
        with pytest.raises(ValueError, match="width"):
            EmaDecay.karras(**wrong)


def test_several_decays_are_each_alone():
    decays = [0.9, EmaDecay(0.99, "ratio"), EmaDecay.karras(6.94)]
    model = Net()
    together = WeightAverager(model, "ema", decays)
    alone = [WeightAverager(model, "ema", decay) for decay in decays]
    for _ in range(20):
        drift(model)
        for average in (together, *alone):
            average.update()
    for which, average in enumerate(alone):
        assert_same(together.average(which), average.averages)
        with together.swapped(which):
            assert torch.equal(model.zoom, average.averages["zoom"])
    with pytest.raises(ValueError, match=r"which must be in 0\.\.2, got 3"):
        together.average(3)


def test_start_and_every():
    model = Net()
    average = WeightAverager(model, start=3, every=2)
    took = []
    for call in range(9):
        drift(model)
        assert average.update() == (call in (3, 5, 7))
        if call in (3, 5, 7):
            took.append(model.zoom.detach().double().clone())
        if call == 2:
            assert average.count == 0
    torch.testing.assert_close(average.averages["zoom"].double(), sum(took) / 3, rtol=0, atol=3e-7)


# ---- what others get wrong -------------------------------------------------------------------------------------------


def test_tied_weights_are_averaged_once():
    model = Net()
    average = WeightAverager(model, "ema", 0.9)
    with torch.no_grad():
        model.embed.weight.zero_()
        average.update()
        model.embed.weight.fill_(1)
    average.update()
    assert "head.weight" not in average.averages
    assert average.averages["embed.weight"] == pytest.approx(0.1, abs=1e-6)  # twice would be 0.19
    with average.swapped():
        assert model.head.weight is model.embed.weight
        assert model.head.weight[0, 0].item() == pytest.approx(0.1, abs=1e-6)
    exported = average.export()
    assert torch.equal(exported["head.weight"], exported["embed.weight"])


def test_parameters_that_share_memory_are_tied():
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight.data = model[0].weight.data
    average = WeightAverager(model, "ema", 0.9)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        average.update()
        model[0].weight.add_(1)
    after = model[0].weight.detach().clone()
    average.update()
    torch.testing.assert_close(average.averages["0.weight"], before + 0.1, rtol=0, atol=1e-6)
    with average.swapped():
        torch.testing.assert_close(model[1].weight.detach(), before + 0.1, rtol=0, atol=1e-6)
    assert torch.equal(model[0].weight, after)


@pytest.mark.parametrize("buffers", ["average", "copy", "recompute"])
def test_integer_buffers_are_copied(buffers):
    model = Net()
    average = WeightAverager(model, buffers=buffers)
    for _ in range(1049):
        model.norm.num_batches_tracked.add_(1)
        average.update()
    assert average.averages["norm.num_batches_tracked"].item() == 1049
    assert average.averages["norm.num_batches_tracked"].dtype == torch.int64


def test_a_changed_model_is_an_error_that_names_the_parameter():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    average = WeightAverager(model)
    b = model.pop("b")
    with pytest.raises(ValueError, match=r"no longer has b\.bias, b\.weight"):
        average.update()
    model["b"] = b
    assert average.update()
    model["c"] = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"now also has c\.bias, c\.weight"):
        average.update()
    del model["c"]
    right = model["a"].weight
    model["a"].weight = nn.Parameter(torch.zeros(4, 1))  # would broadcast
    with pytest.raises(ValueError, match=r"a\.weight must be \[4, 4\] like its average, got \[4, 1\]"):
        average.update()
    model["a"].weight = right
    right.data = torch.zeros(4, 5)  # the same object
    with pytest.raises(ValueError, match=r"a\.weight must be \[4, 4\] like its average, got \[4, 5\]"):
        average.update()
    assert average.count == 1


def test_names_and_not_order():
    one = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    other = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    average = WeightAverager(one)
    average.update()
    average.copy_to(other)
    assert_same(weights(one), {name: weights(other)[name] for name in weights(one)})
    resumed = WeightAverager(other)
    resumed.load_state_dict(average.state_dict())
    assert torch.equal(resumed.averages["a.weight"], one["a"].weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_module_that_deepcopy_refuses():
    model = nn.utils.weight_norm(nn.Linear(4, 4))
    model(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    average = WeightAverager(model, "ema", 0.9)
    before = weights(model)
    average.update()
    drift(model)
    average.update()
    made = average.module()
    for name in before:
        wanted = 0.9 * before[name] + 0.1 * weights(model)[name]
        torch.testing.assert_close(average.averages[name], wanted, rtol=0, atol=1e-6)
        assert torch.equal(weights(made)[name], average.averages[name])
    x = torch.randn(2, 4)
    with average.swapped():
        assert torch.equal(made(x), model(x))


def test_swag_pairs_root_level_parameters_by_name():
    model = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False)})
    model.register_parameter("late", nn.Parameter(torch.randn(3, 3)))  # the same shape: order alone would mix them
    average = WeightAverager(model, "swag", rank=2)
    took = []
    for _ in range(3):
        drift(model)
        average.update()
        took.append(weights(model))
    for name in took[0]:
        mean = torch.stack([t[name].double() for t in took]).mean(0)
        torch.testing.assert_close(average.averages[name].double(), mean, rtol=0, atol=1e-6)


def test_a_tensor_without_shape():
    with pytest.raises(ValueError, match="weight has no shape yet"):
        WeightAverager(nn.LazyLinear(3))


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_averaged_in_float32(dtype):
    model = Net().to(dtype)
    average = WeightAverager(model, "ema", 0.9999)
    exact = None
    for step in range(200):
        drift(model)
        average.update()
        now = model.conv.weight.detach().double()
        exact = now if step == 0 else exact + 1e-4 * (now - exact)
    found = average.averages["conv.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)  # measured 3.1e-7
    before = weights(model)
    with average.swapped():
        assert model.conv.weight.dtype == dtype
        assert torch.equal(model.conv.weight, found.to(dtype))
    assert_same(weights(model), before)
    assert torch.equal(average.averages["conv.weight"], found)


def test_a_plain_half_average_warns():
    model = Net().bfloat16()
    with pytest.warns(UserWarning, match="zoom is rounded to the nearest bfloat16"):
        WeightAverager(model, "ema", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="float16"):
        WeightAverager(Net(), "ema", dtype=torch.float16, rounding="stochastic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WeightAverager(model, "ema")
        WeightAverager(model, "ema", rounding="stochastic")
        WeightAverager(model, "ema", rounding="compensated")


def test_compensated_is_float32_in_two_halves():
    model = Net().bfloat16()
    plain = WeightAverager(model, "ema", 0.999, dtype=torch.float32)
    split = WeightAverager(model, "ema", 0.999, rounding="compensated")
    assert split.averages["zoom"].dtype == torch.bfloat16
    for _ in range(50):
        drift(model)
        plain.update()
        split.update()
    state = split.state_dict()
    high, low = state["averages.0/zoom"].clone(), state["remainders.0/zoom"]
    whole = (high.float().view(torch.int32) + low).view(torch.float32)
    assert torch.equal(whole, plain.averages["zoom"])
    before = weights(model)
    with split.swapped():
        assert torch.equal(model.zoom, high)
    assert_same(weights(model), before)


def test_stochastic_rounding_is_keyed_by_seed_step_and_name():
    model = nn.ModuleDict({"a": nn.Linear(50, 4, bias=False), "b": nn.Linear(50, 4, bias=False)}).bfloat16()
    average = WeightAverager(model, "ema", 0.9, rounding="stochastic", seed=7)
    model["b"].weight.data.copy_(model["a"].weight)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(4):
        average.update()
        for name, p in model.named_parameters():
            rate = {"decay": 0.9 if step else 0.0, "seed": 7, "step": step, "streams": [zlib.crc32(name.encode())]}
            ops.ema_update_([wanted[name]], [p.detach()], rounding="stochastic", **rate)
        for p in model.parameters():
            p.data.mul_(1.1)
    assert_same(average.averages, wanted)
    assert not torch.equal(wanted["a.weight"], wanted["b.weight"])


def test_float64_averages():
    model = Net()
    average = WeightAverager(model, dtype=torch.float64)
    took = []
    for _ in range(10):
        drift(model)
        average.update()
        took.append(model.zoom.detach().double().clone())
    torch.testing.assert_close(average.averages["zoom"], sum(took) / 10, rtol=0, atol=1e-14)


def test_complex_weights():
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    average = WeightAverager(model)
    first = model.w.detach().clone()
    average.update()
    model.w.data = model.w.data + (1 + 2j)  # new memory, which a view would miss
    average.update()
    torch.testing.assert_close(average.averages["w"], first + (0.5 + 1j), rtol=0, atol=1e-6)
    with average.swapped():
        torch.testing.assert_close(model.w.detach(), first + (0.5 + 1j), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.w.detach(), first + (1 + 2j), rtol=0, atol=1e-6)


def test_channels_last_stays():
    model = Net(width=16).to(memory_format=torch.channels_last)
    average = WeightAverager(model)
    drift(model)
    average.update()
    assert average.averages["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(average.averages["conv.weight"], model.conv.weight)
    resumed = WeightAverager(model)
    resumed.load_state_dict(safetensors.load(safetensors.save(average.state_dict())))
    assert_same(resumed.averages, average.averages)


def test_averages_lie_in_few_aligned_pieces():
    model = nn.Sequential(nn.Linear(1000, 700), nn.Linear(700, 3))
    average = WeightAverager(model, "ema", [0.9, 0.99])
    held = [t for which in (0, 1) for t in average.average(which).values()]
    assert len({t.untyped_storage().data_ptr() for t in held}) == 1
    assert all(t.data_ptr() % 64 == 0 for t in held)
    ends = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in held)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


# ---- what is averaged, and of which model ----------------------------------------------------------------------------


def test_include_and_exclude():
    model = Net()
    average = WeightAverager(model, include=["conv.*", "zoom", "norm.*"], exclude="*bias")
    wanted = {"conv.weight", "zoom", "norm.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert average.averages.keys() == wanted
    drift(model)
    before = weights(model)
    with average.swapped():  # nothing was averaged since the beginning
        assert not torch.equal(model.zoom, before["zoom"])
        assert torch.equal(model.conv.bias, before["conv.bias"])
    exported = average.export()
    assert exported.keys() == model.state_dict().keys()
    assert torch.equal(exported["conv.bias"], model.conv.bias)
    with pytest.raises(ValueError, match=r"exclude: 'cnov\.\*' matches no"):
        WeightAverager(model, exclude="cnov.*")
    with pytest.raises(ValueError, match="nothing to average"):
        WeightAverager(model, include="norm.num_batches_tracked")


def test_buffer_policies():
    def stale(buffers):
        model = Net()
        average = WeightAverager(model, buffers=buffers)
        seen = []
        for _ in range(2):
            drift(model)
            average.update()
            seen.append(model.norm.running_mean.clone())
        drift(model)
        return average.averages["norm.running_mean"].clone(), seen, model.norm.running_mean

    found, seen, _ = stale("average")
    torch.testing.assert_close(found, (seen[0] + seen[1]) / 2, rtol=0, atol=1e-6)
    found, seen, _ = stale("copy")
    assert torch.equal(found, seen[1])
    found, _, live = stale("recompute")
    assert torch.equal(found, live)


def test_recomputed_buffers_stay_until_the_next_update():
    model = Net()
    average = WeightAverager(model, buffers="recompute")
    drift(model)
    average.update()
    live = model.norm.running_mean.clone()
    with average.swapped():
        model.norm.running_mean.fill_(7)  # what update_bn does
        model.norm.num_batches_tracked.fill_(9)
    assert torch.equal(model.norm.running_mean, live)
    with average.swapped():
        assert model.norm.running_mean.eq(7).all()
        assert model.norm.num_batches_tracked == 9
    assert average.export()["norm.running_mean"].eq(7).all()
    average.update()
    assert torch.equal(average.averages["norm.running_mean"], live)


def test_replaced_and_moved_parameters_are_followed():
    model = Net()
    average = WeightAverager(model, "ema", 0.5)
    average.update()
    model.conv.weight.data = torch.zeros_like(model.conv.weight)
    model.zoom = nn.Parameter(torch.full((3,), 4.0))
    model.norm.running_mean = torch.full((4,), 2.0)
    before = {name: value.clone() for name, value in average.averages.items()}
    average.update()
    for name, value in (("conv.weight", 0.0), ("zoom", 4.0), ("norm.running_mean", 2.0)):
        torch.testing.assert_close(average.averages[name], (before[name] + value) / 2, rtol=0, atol=1e-6)
    model.double()
    average.update()
    assert average.averages["zoom"].dtype == torch.float32
    with average.swapped():
        assert model.zoom.dtype == torch.float64
        torch.testing.assert_close(model.zoom.float(), average_of_zoom := before["zoom"] / 4 + 3, rtol=0, atol=1e-6)
    assert average_of_zoom is not None and model.zoom.eq(4).all()


def test_nonfinite():
    for policy in ("propagate", "refuse", "skip"):
        model = Net()
        average = WeightAverager(model, "ema", 0.9, nonfinite=policy)
        average.update()
        before = average.averages["conv.weight"].clone()
        with torch.no_grad():
            model.conv.weight[0, 0, 0, 0] = math.nan
            model.zoom[0] = 3.0
        if policy == "refuse":
            with pytest.raises(FloatingPointError, match=r"conv\.weight holds an inf or a NaN"):
                average.update()
        else:
            assert average.update() == (policy == "propagate")
        assert average.count == (2 if policy == "propagate" else 1)
        found = average.averages["conv.weight"]
        assert found[0, 0, 0, 0].isnan() if policy == "propagate" else torch.equal(found, before)


def test_the_first_update_forgets_a_bad_beginning():
    model = Net()
    model.zoom.data.fill_(math.inf)
    average = WeightAverager(model, "ema", 0.9)
    model.zoom.data.fill_(1.5)
    average.update()
    assert average.averages["zoom"].eq(1.5).all()


def test_compiled_and_wrapped_models():
    bare = Net()
    wrappers = [torch.compile(bare), nn.DataParallel(bare), torch.compile(nn.DataParallel(bare))]
    reference = WeightAverager(bare)
    others = [WeightAverager(model) for model in wrappers]
    inside = nn.Sequential(torch.compile(bare.conv))
    others_inside = WeightAverager(inside)
    drift(bare)
    for average in (reference, others_inside, *others):
        average.update()
    for average in others:
        assert_same(average.averages, reference.averages)
        assert average.export().keys() == bare.state_dict().keys()
    assert others_inside.averages.keys() == {"0.weight", "0.bias"}
    assert others_inside.export().keys() == {"0.weight", "0.bias"}
    resumed = WeightAverager(wrappers[0])
    resumed.load_state_dict(reference.state_dict())
    resumed.load_averages({f"_orig_mod.{name}": value for name, value in reference.export().items()}, count=1)
    resumed.load_averages({f"module.{name}": value for name, value in reference.export().items()}, count=1)


def test_a_compiled_model_runs_with_the_averages():
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="eager")
    average = WeightAverager(compiled)
    average.update()
    x = torch.randn(2, 4)
    wanted = compiled(x)
    drift(model)
    with average.swapped() as lent:
        assert lent is compiled
        assert torch.equal(compiled(x), wanted)
    assert not torch.equal(compiled(x), wanted)


# ---- the averages in the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("mode", ["swa", "ema", "swag"])
def test_swapped_gives_everything_back(mode, dtype):
    model = Net()
    average = WeightAverager(model, mode, dtype=dtype)
    for _ in range(3):
        drift(model)
        average.update()
    drift(model)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    held = {name: value.clone() for name, value in average.averages.items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(KeyError, match="inside"), average.swapped():
        for name, p in model.named_parameters():
            assert torch.equal(p, held[name].to(p)), name
        for what in (average.update, average.state_dict, lambda: average.averages, average.swapped().__enter__):
            with pytest.raises(RuntimeError, match="leave swapped"):
                what()
        raise KeyError("inside")
    assert_same(dict(model.state_dict()), live)
    assert_same(average.averages, held)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    average.swap()
    assert torch.equal(model.zoom, held["zoom"].to(model.zoom))
    average.swap()
    assert_same(dict(model.state_dict()), live)
    assert average.update()


def test_swap_needs_no_copy_where_types_agree():
    model = nn.Linear(8, 8)
    average = WeightAverager(model)
    drift(model)
    average.swap()
    assert not average._saved.copies
    average.swap()
    half = WeightAverager(nn.Linear(8, 8).half())
    half.swap()
    assert half._saved.copies.keys() == {"weight", "bias"}


def test_export_is_a_bare_state_dict():
    model = Net()
    average = WeightAverager(model)
    average.update()
    drift(model)
    exported = average.export()
    fresh = Net()
    fresh.load_state_dict(exported)
    assert torch.equal(fresh.zoom, average.averages["zoom"])
    exported["zoom"].fill_(0)
    assert not average.averages["zoom"].eq(0).any()
    with pytest.raises(ValueError, match=r"conv\.weight must be \[4, 3, 3, 3\] in the model, got \[8, 3, 3, 3\]"):
        average.copy_to(Net(width=8))
    with pytest.raises(ValueError, match=r"zoom must be \[3\] in the model, got none"):
        average.copy_to(nn.Linear(2, 2))


# ---- SWAG ------------------------------------------------------------------------------------------------------------


def collect(rank, updates, scale=1.0):
    """A model of two correlated weights a place, its SWAG, and the weights it took [updates, 2]."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    average = WeightAverager(model, "swag", rank=rank)
    took = torch.randn(updates, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]], dtype=torch.float64)
    for row in took:
        model.w.data.copy_(row * scale)
        average.update()
    return model, average, took * scale


@pytest.mark.parametrize("rank", [0, 20])
def test_samples_have_the_posteriors_mean_and_covariance(rank):
    model, average, took = collect(rank, 20)
    draws = []
    with average.swapped():
        for seed in range(600):
            average.sample(seed)
            draws.append(model.w.detach().clone())
    draws = torch.stack(draws).double()
    # The ring holds each weight less the mean of that time, which is what the authors take as well.
    mean = took.mean(0)
    ring = torch.stack([took[k] - took[: k + 1].mean(0) for k in range(20)])
    diagonal = torch.diag(((took - mean) ** 2).mean(0))
    wanted = diagonal if rank == 0 else 0.5 * (diagonal + ring.mT @ ring / (20 - 1))
    spread = float(wanted.max())
    assert (draws.mean(0) - mean).abs().max() < 4 * (spread / 600) ** 0.5  # standard errors
    torch.testing.assert_close(torch.cov(draws.mT), wanted, rtol=0, atol=4 * (2 / 600) ** 0.5 * spread)


def test_samples_repeat_and_differ():
    model, average, took = collect(5, 9)
    with average.swapped():
        average.sample(1)
        one = model.w.detach().clone()
        average.sample(2)
        assert not torch.equal(model.w, one)
        average.sample(1)
        assert torch.equal(model.w, one)
    assert torch.equal(model.w.double(), took[-1].float().double())
    average.sample(1)  # outside: swap() brings the weights back
    assert torch.equal(model.w, one)
    average.swap()
    assert torch.equal(model.w.double(), took[-1].float().double())


def test_swag_variance_does_not_cancel():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1000))
    average = WeightAverager(model, "swag", rank=0)
    took = 1 + 1e-4 * torch.randn(140, 1000)
    for row in took:
        model.w.data.copy_(row)
        average.update()
    wanted = ((took.double() - took.double().mean(0)) ** 2).sum(0)
    found = average.state_dict()["m2/w"].double()

    def error(sums):
        return float(((sums.double() - wanted) / wanted).abs().mean())

    assert error(found) < 1e-3  # measured 1.6e-4
    assert error(140 * (took.pow(2).mean(0) - took.mean(0) ** 2)) > 0.5  # what the two moments leave in float32


def test_swag_errors():
    model, average, _ = collect(5, 1)
    with pytest.raises(ValueError, match="at least 2 updates, got 1"):
        average.sample()
    with pytest.raises(RuntimeError, match="mode"):
        WeightAverager(model).sample()
    with pytest.raises(ValueError, match="moments"):
        average.load_averages({"w": torch.zeros(2)})


# ---- state -----------------------------------------------------------------------------------------------------------

CASES = {
    "swa": {"mode": "swa"},
    "start": {"mode": "swa", "start": 7, "every": 3},
    "ema": {"mode": "ema", "decay": [EmaDecay(0.99, "power", gamma=0.7, power=0.75), EmaDecay.karras(width=0.1)]},
    "debias": {"mode": "ema", "decay": 0.999, "warmup": "debias", "buffers": "copy"},
    "stochastic": {"mode": "ema", "decay": 0.99, "rounding": "stochastic", "seed": 5, "buffers": "recompute"},
    "compensated": {"mode": "ema", "decay": [0.9, 0.99], "rounding": "compensated"},
    "swag": {"mode": "swag", "rank": 3},
}


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state):
    return safetensors.load(safetensors.save(state))


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("case", CASES)
def test_resumes_to_the_same_bits(case, through):
    def model_of():
        model = Net()
        return model.bfloat16() if case in ("stochastic", "compensated") else model

    def train(model, average, steps):
        for step in steps:
            torch.manual_seed(step)
            drift(model)
            average.update()

    model = model_of()
    average = WeightAverager(model, **CASES[case])
    train(model, average, range(10))
    saved, saved_model = through(average.state_dict()), copy.deepcopy(model.state_dict())
    train(model, average, range(10, 25))
    other = model_of()
    resumed = WeightAverager(other, **CASES[case])
    other.load_state_dict(saved_model)
    other.table.copy_(model.table)  # not in a state dict, and here drifting
    resumed.load_state_dict(saved)
    train(other, resumed, range(10, 25))
    for which in range(len(average.decays) or 1):
        found, wanted = resumed.average(which), average.average(which)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted if name != "table")
    assert (resumed.count, resumed.calls) == (average.count, average.calls)
    if case == "swag":
        with average.swapped(), resumed.swapped():
            average.sample(3)
            resumed.sample(3)
            assert_same(weights(other), weights(model))


def test_a_state_of_other_settings_or_another_model():
    model = Net()
    average = WeightAverager(model, "ema", 0.9)
    average.update()
    state = through_torch(average.state_dict())
    with pytest.raises(ValueError, match=r"mode 'ema', here 'swa'"):
        WeightAverager(model).load_state_dict(state)
    other = WeightAverager(model, "ema", 0.99)
    with pytest.raises(ValueError, match="decays"):
        other.load_state_dict(state)
    other.load_state_dict(state, strict=False)
    assert other.count == 1 and other.decays[0].value == 0.99
    with pytest.raises(ValueError, match=r"lacks averages\.0/weight"):
        WeightAverager(nn.Linear(2, 2, bias=False), "ema", 0.9).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has too many: averages\.0/what"):
        average.load_state_dict({**state, "averages.0/what": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"averages\.0/zoom must be float32 \[3\], got float32 \[4\]"):
        average.load_state_dict({**state, "averages.0/zoom": torch.zeros(4)})
    with pytest.raises(ValueError, match="load_averages"):
        average.load_state_dict(model.state_dict())


def test_to_and_from_averaged_model():
    model = Net()
    ours, theirs = WeightAverager(model), swa_utils.AveragedModel(model)
    for _ in range(5):
        drift(model)
        ours.update()
        theirs.update_parameters(model)
    into = swa_utils.AveragedModel(Net())
    into.load_state_dict(ours.averaged_model_state())
    assert int(into.n_averaged) == 5
    assert_same(weights(into.module), {name: ours.averages[name] for name in weights(model)})
    back = WeightAverager(model)
    back.load_averages(theirs.state_dict())
    assert back.count == 5
    assert_same({name: back.averages[name] for name in weights(model)}, weights(theirs.module))
    for _ in range(5):
        drift(model)
        back.update()
        theirs.update_parameters(model)
    assert_close(back.averages, weights(theirs.module), 1e-6)


def test_states_of_other_libraries():
    model, source = Net(), Net()
    bare = source.state_dict()
    lists = [p.detach() for p in source.parameters()]
    forms = {
        "bare": (bare, 1),
        "timm": ({"epoch": 3, "state_dict": Net().state_dict(), "state_dict_ema": bare}, 1),
        "ema-pytorch": (
            {"initted": torch.tensor(True), "step": torch.tensor(70)}
            | {f"ema_model.{name}": value for name, value in bare.items()}
            | {f"online_model.{name}": value for name, value in Net().state_dict().items()},
            70,
        ),
        "diffusers": ({"decay": 0.99, "optimization_step": 40, "shadow_params": lists}, 40),
        "torch-ema": ({"decay": 0.99, "num_updates": 30, "shadow_params": lists, "collected_params": None}, 30),
        "lightning": (
            {
                "state_dict": bare,
                "current_model_state": Net().state_dict(),
                "averaging_state": {"n_averaged": torch.tensor(20)},
            },
            20,
        ),
    }
    for form, (state, count) in forms.items():
        average = WeightAverager(model, "ema", 0.99)
        average.load_averages(state)
        assert average.count == count, form
        for name, value in weights(source).items():
            assert torch.equal(average.averages[name], value), (form, name)
        assert average.update()
        torch.testing.assert_close(average.averages["zoom"], 0.99 * source.zoom + 0.01 * model.zoom, rtol=0, atol=1e-6)


def test_states_that_do_not_fit():
    average = WeightAverager(Net(), "ema", 0.99)
    bare = Net().state_dict()
    with pytest.raises(ValueError, match="3 parameters, the model 6"):
        average.load_averages({"shadow_params": [torch.zeros(1)] * 3})
    with pytest.raises(ValueError, match="the model has no what"):
        average.load_averages({**bare, "what": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"the state lacks conv\.bias"):
        average.load_averages({name: value for name, value in bare.items() if name != "conv.bias"})
    with pytest.raises(ValueError, match=r"zoom must be \[3\], got \[1\]"):
        average.load_averages({**bare, "zoom": torch.zeros(1)})
    with pytest.raises(ValueError, match="give count"):
        WeightAverager(Net()).load_averages(bare)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, "mode must be one of 'swa', 'ema', 'swag', got 'mean'"),
        ({"decay": 0.9}, "decay and warmup belong to"),
        ({"mode": "ema", "decay": 1.5}, r"value must be in \[0, 1\], got 1.5"),
        ({"mode": "ema", "decay": []}, "got none"),
        ({"mode": "ema", "warmup": "slow"}, "warmup must be one of"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"buffers": "keep"}, "buffers must be one of"),
        ({"nonfinite": "raise"}, "nonfinite must be one of"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"mode": "swag", "rank": 1}, "rank must be 0 or at least 2"),
        ({"mode": "swag", "dtype": torch.bfloat16}, "dtype must be float32 or float64"),
        ({"dtype": torch.int32}, "dtype must be a floating-point type"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightAverager(Net(), **arguments)


# ---- devices and processes -------------------------------------------------------------------------------------------


def test_another_device(device):
    """Averages on the host of a model on `device`, which is in turn moved."""
    model = Net()
    average = WeightAverager(model, "ema", 0.9, device="cpu")
    follows = WeightAverager(model, "ema", 0.9)
    for step in range(6):
        if step == 3:
            model.to(device)
        drift(model)
        average.update()
        follows.update()
    assert average.averages["zoom"].device.type == "cpu"
    assert follows.averages["zoom"].device.type == device.type
    assert_close(average.averages, {name: value.cpu() for name, value in follows.averages.items()}, 1e-6)
    live = weights(model)
    with average.swapped():
        torch.testing.assert_close(model.zoom.detach().cpu(), follows.averages["zoom"].cpu(), rtol=0, atol=1e-6)
    assert_same(weights(model), live)


def test_staged_updates(monkeypatch):
    """The road of a CUDA model with averages on the host, walked on the host."""
    from fastnuggets.training import averaging_store as stores

    model = Net()
    plain = WeightAverager(model, "ema", 0.9)
    prepare = stores.Store._prepare

    def staged(self):
        prepare(self)
        names = self.names("averaged")
        self.staging = stores.Staging([self.walk.raw[name] for name in names], [torch.device("cpu")] * len(names))
        self._plans = [self._plan(names, self.staging.copies, "nearest")]

    monkeypatch.setattr(stores.Store, "_prepare", staged)
    average = WeightAverager(model, "ema", 0.9)
    for step in range(6):
        if step == 3:
            model.zoom = nn.Parameter(model.zoom.detach() * 2)
        drift(model)
        plain.update()
        average.update()
        drift(model)  # after the call a weight may change
    assert_same(average.averages, plain.averages)
    state = copy.deepcopy(average.state_dict())
    average.update()
    average.load_state_dict(state)
    assert_same(average.averages, plain.averages)


@pytest.mark.parametrize("world", [2, 3])
def test_shards(world):
    """FSDP2, DTensors and DDP on several processes: the checks are in averaging_ranks.py."""
    run_ranks(world)
