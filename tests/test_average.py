"""The averages' kernels beyond the contract every op keeps: rounding, plans, bad input, parity with torch."""

import math

import pytest
import torch
from torch import nn

from fastnuggets import ops, reference

SHAPES = ((3, 5), (1500,), (), (0,), (129, 3))


def tensors(seed, dtype=torch.float32, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def largest(a, b):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True) if x.numel())


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_pair_of_types_is_rounded_once(average, weight):
    averages, weights = tensors(1, average), tensors(2, weight)
    compute = torch.float64 if average == torch.float64 else torch.float32
    pairs = zip(averages, weights, strict=True)
    expected = [torch.lerp(a.to(compute), w.to(compute), 0.3).to(average) for a, w in pairs]
    ops.ema_update_(averages, weights, 0.7)
    for a, e in zip(averages, expected, strict=True):
        # torch's lerp is the same sum, here and there without the fused multiply-add: one unit in the last place.
        assert torch.allclose(a, e, rtol=torch.finfo(average).eps, atol=1e-7)
        assert a.dtype == average


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_are_torchs(dtype):
    """All 65536 values there and back, the odd ones included; and float32 values between them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    single = torch.zeros(len(every))
    ops.weighted_sum_([single], [[every]], [1.0])
    assert torch.equal(single.nan_to_num(7.0), every.float().nan_to_num(7.0))
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), (every.float() * (1 + 2**-12))])
    rounded = torch.zeros(len(values), dtype=dtype)
    ops.weighted_sum_([rounded], [[values]], [1.0])
    expected = values.to(dtype)
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_rate_one_copies_and_rate_zero_keeps():
    averages, weights = tensors(1, scale=1e30), tensors(2)
    before = [a.clone() for a in averages]
    ops.ema_update_(averages, weights, 1.0)
    assert largest(averages, before) == 0
    ops.ema_update_(averages, weights, 0.0)
    assert largest(averages, weights) == 0


def test_many_decays_are_each_its_own():
    weights = tensors(1)
    together = [tensors(2), tensors(3), tensors(4)]
    alone = [[a.clone() for a in column] for column in together]
    ops.ema_update_(together, weights, [0.9, 0.99, 0.0])
    for column, single, decay in zip(together, alone, [0.9, 0.99, 0.0], strict=True):
        ops.ema_update_(single, weights, decay)
        assert largest(column, single) == 0


def test_parity_with_torchs_averages():
    """1000 random steps beside torch.optim.swa_utils. Seen: the same bits with AVX2; elsewhere an update may
    round otherwise by a unit in the last place, of values near 1."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

    model = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 5))
    weights = list(model.parameters())
    peers = [AveragedModel(model, multi_avg_fn=f) for f in (get_ema_multi_avg_fn(0.97), get_swa_multi_avg_fn())]
    ema, swa = ([w.detach().clone() for w in weights] for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(1000):
        with torch.no_grad():
            for w in weights:
                w.add_(0.1 * torch.randn(w.shape, generator=generator)).mul_(0.99)
        for peer in peers:
            peer.update_parameters(model)
        ops.ema_update_(ema, weights, 0.97 if step else 0.0)
        ops.swa_update_(swa, weights, step)
    assert largest(ema, list(peers[0].module.parameters())) <= 2.5e-7
    assert largest(swa, list(peers[1].module.parameters())) <= 1e-6


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov):
    """Seen: the same bits after 20 steps, with AVX2."""
    weights, mine = tensors(1), tensors(1)
    peer = [nn.Parameter(w) for w in weights]
    optimizer = torch.optim.SGD(peer, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    momentum, averages = tensors(0, scale=0.0), tensors(1)
    expected = [w.clone() for w in weights]
    for step in range(20):
        grads = tensors(10 + step)
        for p, g in zip(peer, grads, strict=True):
            p.grad = g
        optimizer.step()
        ops.ema_update_(expected, peer, 0.8)
        ops.sgd_ema_step_(
            mine, grads, momentum, averages, lr=0.1, decay=0.8, momentum_rate=0.9, weight_decay=0.01, nesterov=nesterov,
            first=step == 0,
        )  # fmt: skip
    assert largest(mine, [p.detach() for p in peer]) <= 1e-6
    assert largest(averages, expected) <= 1e-6


def test_adamw_is_torchs():
    """Seen: 2.4e-7 after 20 steps."""
    weights, mine = tensors(1), tensors(1)
    peer = [nn.Parameter(w) for w in weights]
    optimizer = torch.optim.AdamW(peer, lr=0.01, weight_decay=0.1)
    first, second, averages = tensors(0, scale=0.0), tensors(0, scale=0.0), tensors(1)
    for step in range(20):
        grads = tensors(10 + step)
        for p, g in zip(peer, grads, strict=True):
            p.grad = g
        optimizer.step()
        ops.adamw_ema_step_(mine, grads, first, second, averages, lr=0.01, decay=0.8, weight_decay=0.1, step=step + 1)
    assert largest(mine, [p.detach() for p in peer]) <= 2e-6


# --- bfloat16 averages ------------------------------------------------------------------------------------------------


def test_plain_bfloat16_stands_still_and_ours_does_not():
    """Error of the distance moved in 30,000 steps at decay 0.9999 from half a weight's distance, in float64."""
    start, steps, decay = torch.linspace(1.0, 2.0, 1000).bfloat16(), 30_000, 0.9999
    weights = [(start.double() * 1.1).bfloat16()]
    truth = weights[0].double() + (start.double() - weights[0].double()) * decay**steps
    moved = (truth - start.double()).norm()
    plain, stochastic, exact, single = [start.clone()], [start.clone()], [start.clone()], [start.float()]
    rest = [torch.zeros(1000, dtype=torch.int16)]
    plans = {
        "plain": ops.AveragePlan(plain, weights),
        "stochastic": ops.AveragePlan(stochastic, weights, rounding="stochastic"),
        "exact": ops.AveragePlan(exact, weights, rounding="compensated", remainders=rest),
        "single": ops.AveragePlan(single, weights),
    }
    for step in range(steps):
        for plan in plans.values():
            plan.ema_(decay, step=step)
    error = {
        "plain": (plain[0].double() - truth).norm() / moved,
        "stochastic": (stochastic[0].double() - truth).norm() / moved,
        "exact": (reference.join(exact[0], rest[0]).double() - truth).norm() / moved,
        "single": (single[0].double() - truth).norm() / moved,
    }
    assert torch.equal(reference.join(exact[0], rest[0]), single[0])
    assert error["plain"] > 0.99, error
    assert error["stochastic"] <= 0.06, error
    assert error["exact"] <= 3e-4, error


def test_a_million_steps_do_not_drift():
    """An average that has arrived stays where it is; one on its way is where the closed form says."""
    weight = torch.linspace(-2, 2, 64)
    average = [torch.zeros(64)]
    plan = ops.AveragePlan(average, [weight])
    for _ in range(1_000_000):
        plan.ema_(0.9999)
    # Once a step is less than half a unit in the last place it has no effect: at rate 1e-4 that is at 1e-4 relative,
    # divided by the rate, 2^-24 / 1e-4 = 6e-4. Seen: 5.9e-4.
    assert (average[0] - weight).abs().max() <= 6e-4 * 2


def test_compensated_is_the_float32_average_bit_for_bit():
    weights = tensors(1, torch.bfloat16)
    single = [w.float() for w in tensors(2, torch.bfloat16)]
    high, low = ([r.clone() for r in part] for part in zip(*map(reference.split, single), strict=True))
    for step in range(50):
        weights = tensors(step, torch.bfloat16)
        ops.ema_update_(single, weights, 0.95)
        ops.ema_update_(list(high), weights, 0.95, rounding="compensated", remainders=list(low))
    for h, lo, s in zip(high, low, single, strict=True):
        assert torch.equal(reference.join(h, lo), s)
        assert torch.equal(h, reference.split(s)[0])


def test_stochastic_rounding_is_its_definition():
    averages, weights = tensors(1, torch.bfloat16), tensors(2, torch.bfloat16)
    exact = [a.float() for a in averages]
    ops.ema_update_(exact, weights, 0.99)
    ops.ema_update_(averages, weights, 0.99, rounding="stochastic", seed=5, step=9, streams=[3, 1, 4, 1, 5])
    for a, e, stream in zip(averages, exact, [3, 1, 4, 1, 5], strict=True):
        assert torch.equal(a, reference.stochastic_bfloat16(e, 5, 9, stream))


def test_stochastic_rounding_is_right_in_the_mean():
    value = torch.full((200_000,), 1.0 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    rounded = [torch.zeros(200_000, dtype=torch.bfloat16)]
    ops.ema_update_(rounded, [value], 0.0, rounding="stochastic", seed=1)
    up = (rounded[0] > 1).double().mean().item()
    assert set(rounded[0].tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(up - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 200_000)


def test_infinities_stay_infinite_and_nan_stays_nan():
    odd = torch.tensor([math.inf, -math.inf, math.nan, 3.3e38])
    for how in ({}, {"rounding": "stochastic"}, {"rounding": "compensated", "remainders": [torch.zeros(4).short()]}):
        average = [torch.zeros(4, dtype=torch.bfloat16)]
        ops.ema_update_(average, [odd], 0.9, **how)
        assert average[0][:2].tolist() == [math.inf, -math.inf]
        assert average[0][2].isnan()


# --- SWAG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_variance_survives_where_two_moments_cancel(spread):
    """Relative error of the variance of 140 weights. Seen: 5.6e-7, 5.4e-6, 5.1e-5; E[w²] - E[w]² loses everything."""
    generator = torch.Generator().manual_seed(0)
    base = 0.25 * torch.randn(2000, generator=generator)
    sets = [base + spread * torch.randn(2000, generator=generator) for _ in range(140)]
    mean, m2 = [torch.zeros(2000)], [torch.zeros(2000)]
    for n, w in enumerate(sets):
        ops.swag_update_(mean, m2, [w], n)
    truth = torch.stack(sets).double().var(0, unbiased=False)
    error = ((m2[0].double() / 140 - truth).norm() / truth.norm()).item()
    naive = (sum(w * w for w in sets) / 140 - (sum(sets) / 140) ** 2).double()
    assert error <= 1e-4
    assert error < 1e-2 * ((naive - truth).norm() / truth.norm()).item()


def test_samples_have_swags_covariance():
    """Mean and covariance over 4,000 draws of 6 weights in two tensors, against the dense Gaussian."""
    generator = torch.Generator().manual_seed(0)
    mean, m2 = [torch.randn(n, generator=generator) for n in (4, 2)], [torch.zeros(4), torch.zeros(2)]
    rings = [torch.zeros(3, 4), torch.zeros(3, 2)]
    kept = [m.clone() for m in mean]
    for n in range(5):
        ops.swag_update_(
            mean, m2, [k + torch.randn(k.shape, generator=generator) for k in kept], n, deviations=rings, row=n % 3
        )
    D = torch.cat(rings, 1).double().T  # [6, K]
    dense = 0.5 * (torch.diag(torch.cat(m2).double() / 5) + D @ D.T / 2)
    draws = torch.zeros(4_000, 6)
    for step in range(len(draws)):
        ops.swag_sample_([draws[step, :4], draws[step, 4:]], mean, m2, 5, deviations=rings, seed=3, step=step)
    draws = draws.double()
    # Standard errors: sqrt(C_ii / n) of a mean, sqrt((C_ii C_jj + C_ij²) / n) of a covariance.
    scale = dense.diag().sqrt()
    assert ((draws.mean(0) - torch.cat(mean)).abs() < 5 * scale / math.sqrt(4_000)).all()
    error = (torch.cov(draws.T) - dense).abs()
    assert (error < 5 * torch.sqrt((torch.outer(scale, scale) ** 2 + dense**2) / 4_000)).all()


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_follows_memory_that_was_replaced():
    weights, averages = [nn.Parameter(w) for w in tensors(1)], tensors(2)
    plan = ops.AveragePlan(averages, weights)
    plan.ema_(0.5)
    weights[0].data = torch.full((3, 5), 7.0)
    weights[1].data = weights[1].data.double()
    expected = [torch.lerp(a, w.detach().float(), 0.5) for a, w in zip(averages, weights, strict=True)]
    plan.ema_(0.5)
    assert largest(averages, expected) <= 1e-7


def test_a_plan_refuses_a_weight_that_changed_its_shape():
    weights = [nn.Parameter(torch.zeros(4))]
    plan = ops.AveragePlan([torch.zeros(4)], weights)
    plan.ema_(0.5)
    weights[0].data = torch.zeros(1)
    with pytest.raises(ValueError, match=r"weights\[0\] must be \[4\]"):
        plan.ema_(0.5)


def test_weights_of_any_layout():
    average = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2, 3, 4, 5)
    sliced = torch.zeros(2, 3, 4, 10)[..., ::2].copy_(weight)
    for given in (weight, weight.contiguous(memory_format=torch.channels_last), sliced, weight[:1].expand(2, 3, 4, 5)):
        ops.ema_update_([average], [given], 0.0)
        assert torch.equal(average, given)


def test_nothing_is_recorded():
    weights = [nn.Parameter(w) for w in tensors(1)]
    averages = [nn.Parameter(w) for w in tensors(2)]
    ops.ema_update_(averages, weights, 0.5)
    assert all(a.is_leaf and a.grad_fn is None for a in averages)


def test_swap():
    first, second = tensors(1), tensors(2)
    kept = [t.clone() for t in (*first, *second)]
    ops.swap_(first, second)
    assert largest([*second, *first], kept) == 0


def test_first_nonfinite_names_the_tensor():
    weights = tensors(1)
    assert ops.first_nonfinite(weights) == -1
    weights[4][128, 2] = math.nan
    assert ops.first_nonfinite(weights) == 4
    weights[1][1499] = -math.inf
    assert ops.first_nonfinite(weights) == 1
    assert ops.first_nonfinite([]) == -1


def test_out_may_be_a_source():
    first, second = tensors(1), tensors(2)
    expected = [0.25 * a + 0.75 * b for a, b in zip(first, second, strict=True)]
    ops.weighted_sum_(first, [first, second], [0.25, 0.75])
    assert largest(first, expected) <= 1e-6


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("averages", "weights", "error", "message"),
    [
        (lambda: [torch.zeros(3)], lambda: [torch.zeros(3), torch.zeros(1)], ValueError, "averages must be"),
        (lambda: [torch.zeros(4, 4)], lambda: [torch.zeros(4, 1)], ValueError, r"weights\[0\] must be \[4, 4\]"),
        (lambda: [torch.zeros(3)], lambda: [torch.zeros(3).long()], TypeError, r"weights\[0\] must be float32"),
        (lambda: [torch.zeros(3).long()], lambda: [torch.zeros(3)], TypeError, r"averages\[0\] must be float32"),
        (lambda: [torch.zeros(6)[::2]], lambda: [torch.zeros(3)], ValueError, r"averages\[0\] must be dense"),
        (lambda: [torch.zeros(1).expand(3)], lambda: [torch.zeros(3)], ValueError, r"averages\[0\] must be dense"),
        (lambda: [torch.zeros(3, device="meta")], lambda: [torch.zeros(3)], ValueError, "must be on"),
    ],
)
def test_bad_tensors_are_named(averages, weights, error, message):
    with pytest.raises(error, match=message):
        ops.ema_update_(averages(), weights(), 0.9)


def test_shared_memory_is_refused():
    tied = torch.zeros(10)
    with pytest.raises(ValueError, match="shares its memory"):
        ops.ema_update_([tied, tied], tensors(1, shapes=((10,), (10,))), 0.9)
    with pytest.raises(ValueError, match="shares its memory"):
        ops.ema_update_([tied[:6]], [tied[2:8]], 0.9)
    ops.ema_update_([tied], [tied], 0.9)
    ops.ema_update_([torch.zeros(10), torch.zeros(10)], [tied, tied], 0.9)


@pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan])
def test_bad_decays(decay):
    with pytest.raises(ValueError, match="decay must be"):
        ops.ema_update_(tensors(1), tensors(2), decay)


def test_bad_numbers():
    a, w = tensors(1), tensors(2)
    with pytest.raises(ValueError, match="num_averaged"):
        ops.swa_update_(a, w, -1)
    with pytest.raises(ValueError, match="rounding"):
        ops.ema_update_(a, w, 0.9, rounding="up")
    with pytest.raises(TypeError, match="bfloat16"):
        ops.ema_update_(a, w, 0.9, rounding="stochastic")
    with pytest.raises(ValueError, match="remainders"):
        ops.ema_update_([t.bfloat16() for t in a], w, 0.9, rounding="compensated")
    with pytest.raises(ValueError, match="2 numbers"):
        ops.ema_update_([a, tensors(3)], w, [0.9, 0.8, 0.7])
    with pytest.raises(ValueError, match="num_collected"):
        ops.swag_sample_(a, w, w, 0)
    with pytest.raises(ValueError, match="coefficients"):
        ops.weighted_sum_(a, [w], [0.5, 0.5])
    with pytest.raises(ValueError, match="row"):
        ops.swag_update_(a, w, tensors(3), 0, deviations=[torch.zeros(2, *t.shape) for t in a], row=2)


def test_nothing_to_do_is_fine():
    ops.ema_update_([], [], 0.9)
    ops.weighted_sum_([], [[], []], [0.5, 0.5])
    ops.swap_([], [])
