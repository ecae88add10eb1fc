"""Reparametrized sampling: noise that is a function of a key and an index, made again in backward and never stored.

**The key.** Each function takes ``key``: a tensor [2] int64 on the input's device, (seed, offset); or an int, a seed
with offset 0; or, by default, nothing: then two numbers are drawn from torch's generator of that device, or from the
``generator`` that is given, which advances. So ``torch.manual_seed``, checkpointing, CUDA graphs and ``torch.compile``
treat it as they treat any random op of torch. A CPU generator gives the same numbers on every device. The kernels read
the key from the device's memory: nothing synchronises, unless the generator is a CPU's and the device is not. Keys that
differ, in whichever number, are independent streams: ranks, members of an ensemble or steps may count the offset on.

**The noise.** Element i of a call, in the row-major order of the output's shape, is element i of the key's stream
(``fastnuggets.reference.noise`` gives it in float64): the same bits for any strides, any number of threads and any
instruction set, and a shorter tensor's noise is the start of a longer one's. It is made in float32, right to a few
units of the last place, for float64 tensors too. Two calls with one key have the same noise.

**Types.** float32, float64, float16 and bfloat16; half types are computed with in float32 and rounded once. Autocast
leaves them as they are. Sums (KL) of half types are float32.

**Promises.** Differentiable in reverse mode to any order, unless a docstring says otherwise; a forward-mode tangent is
an error. Saved for backward: the inputs that the derivative needs and the 16 bytes of the key. Deterministic, does not
synchronise, has no graph breaks. ``torch.func.vmap`` runs a call in a loop; the other transforms of torch.func refuse.

Errors are ValueError or TypeError that name the argument, what it must be and what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from fastnuggets.ops.choices import number_of

# The order of these is that of the enums in csrc/sample/sample.h.
KINDS = ("normal", "uniform", "laplace", "logistic", "gumbel", "exponential", "sign", "keep", "gain")
FORMS = ("std", "logvar", "log_std", "var", "rho")
APPROXIMATIONS = ("molchanov", "kingma", "ard")

# Those that are of themselves a distribution.
PLAIN = KINDS[:7]

Key = Tensor | int | None

_OPS = torch.ops.fastnuggets


def noise_key(device: torch.device | str = "cpu", *, key: Key = None, generator: Generator | None = None) -> Tensor:
    """A key, [2] int64 on ``device``: that which is given, or drawn from the generator (default: the device's own)."""
    device = torch.device(device)
    if isinstance(key, Tensor):
        return key
    if key is not None:
        made = torch.zeros(2, dtype=torch.int64, device=device)
        made[:1] = (key + 2**63) % 2**64 - 2**63
        return made
    source = device if generator is None else generator.device
    drawn = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=source, dtype=torch.int64)
    return drawn.to(device)


def counted_keys(
    n: int, device: torch.device | str = "cpu", *, key: Key = None, generator: Generator | None = None
) -> list[Tensor]:
    """n keys for one call's several draws: :func:`noise_key`'s, with its offset counted on."""
    offset = torch.arange(n, device=device)
    first = noise_key(device, key=key, generator=generator)
    return list(first + torch.stack([torch.zeros_like(offset), offset], 1))


def noise(
    kind: str,
    size: Sequence[int],
    *,
    loc: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    key: Key = None,
    generator: Generator | None = None,
) -> Tensor:
    """loc + scale * noise in a new tensor.

    Args:
        kind: ``"normal"``; ``"uniform"`` on (0, 1), neither end included; ``"laplace"``, ``"logistic"``,
            ``"gumbel"`` of scale 1; ``"exponential"`` of rate 1; ``"sign"``, -1 or 1 (Rademacher).
        size: of the result.
        dtype: default: torch's default.

    Not differentiable. Otherwise as the module says.
    """
    return noise_(torch.empty(tuple(size), dtype=dtype, device=device), kind, loc=loc, scale=scale, key=key,
                  generator=generator)  # fmt: skip


def noise_(
    out: Tensor,
    kind: str,
    *,
    loc: float = 0.0,
    scale: float = 1.0,
    key: Key = None,
    generator: Generator | None = None,
) -> Tensor:
    """:func:`noise` into a tensor of any strides, which is returned."""
    number = number_of("kind", kind, PLAIN)
    with torch.no_grad():
        _OPS.fill_noise_(out, loc, scale, noise_key(out.device, key=key, generator=generator), number, 0.0)
    return out


def rsample(
    kind: str,
    loc: Tensor | float,
    scale: Tensor | float,
    *,
    key: Key = None,
    generator: Generator | None = None,
) -> Tensor:
    """loc + scale * noise, differentiable in both.

    Args:
        kind: one of :func:`noise`'s; ``"uniform"`` is on (loc, loc + scale). Or ``"log_normal"``, exp(loc + scale *
            normal), whose backward keeps the result.
        loc, scale: of shapes that broadcast; at least one is a tensor.

    As the module says.
    """
    if kind == "log_normal":
        loc, scale = _together(loc=loc, scale=scale)
        drawn = _scaled(_wide(loc), _wide(scale), "normal", 0.0, key, generator)
        return drawn.exp().to(loc.dtype)
    number_of("kind", kind, PLAIN)
    loc, scale = _together(loc=loc, scale=scale)
    return _scaled(loc, scale, kind, 0.0, key, generator)


def rsample_normal(
    mean: Tensor, spread: Tensor, *, form: str = "std", key: Key = None, generator: Generator | None = None
) -> Tensor:
    """mean + std * normal.

    Args:
        mean, spread: of shapes that broadcast.
        form: how ``spread`` says the standard deviation: ``"std"``; ``"logvar"``, ln of the variance; ``"log_std"``;
            ``"var"``; ``"rho"``, std = ln(1 + exp(rho)).

    As the module says. A variance of 0 or less draws the mean, and its gradient is 0.
    D. Kingma, M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, arXiv:1312.6114.
    """
    mean, spread = _together(mean=mean, spread=spread)
    drawn: Tensor = _OPS.rsample_normal(
        mean, spread, None, None, noise_key(mean.device, key=key, generator=generator),
        number_of("form", form, FORMS), 0, [True, False, False],
    )[0]  # fmt: skip
    return drawn


def rsample_normal_kl(
    mean: Tensor,
    spread: Tensor,
    *,
    form: str = "std",
    prior_mean: Tensor | float = 0.0,
    prior_std: Tensor | float = 1.0,
    event_dims: int = 1,
    key: Key = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`rsample_normal` and :func:`kl_normal` in one pass, forward and backward: (z, kl)."""
    inputs = _with_prior(mean, spread, prior_mean, prior_std)
    z, _, kl = _OPS.rsample_normal(
        *inputs, noise_key(mean.device, key=key, generator=generator), number_of("form", form, FORMS), event_dims,
        [True, False, True],
    )  # fmt: skip
    return z, kl


def kl_normal(
    mean: Tensor,
    spread: Tensor,
    *,
    form: str = "std",
    prior_mean: Tensor | float = 0.0,
    prior_std: Tensor | float = 1.0,
    event_dims: int = 0,
) -> Tensor:
    """KL(N(mean, std^2) || N(prior_mean, prior_std^2)) = ln(sp / s) + (s^2 + (m - mp)^2) / (2 sp^2) - 1/2.

    Args:
        mean, spread, prior_mean, prior_std: of shapes that broadcast; ``form`` as in :func:`rsample_normal`.
        event_dims: the KL is summed over so many of the last axes. The order of the sum depends on the shape alone.

    Returns:
        Shape of the others less the last ``event_dims`` axes; float64 for float64, else float32.
    """
    inputs = _with_prior(mean, spread, prior_mean, prior_std)
    wanted = [False, False, True]
    kl: Tensor = _OPS.rsample_normal(*inputs, None, number_of("form", form, FORMS), event_dims, wanted)[2]
    return kl


def variance_kl(
    mean: Tensor,
    spread: Tensor,
    *,
    form: str = "std",
    prior_mean: Tensor | float = 0.0,
    prior_std: Tensor | float = 1.0,
    event_dims: int = 0,
) -> tuple[Tensor, Tensor]:
    """std^2 and :func:`kl_normal` in one pass, forward and backward: (var, kl); var is of the inputs' shape.

    What local reparametrization needs of a layer's weights.
    """
    inputs = _with_prior(mean, spread, prior_mean, prior_std)
    wanted = [False, True, True]
    _, var, kl = _OPS.rsample_normal(*inputs, None, number_of("form", form, FORMS), event_dims, wanted)
    return var, kl


def kl_mixture(
    sample: Tensor,
    mean: Tensor,
    spread: Tensor,
    *,
    form: str = "std",
    weights: Sequence[float] = (0.5, 0.5),
    stds: Sequence[float] = (1.0, 0.0025),
    event_dims: int = 0,
) -> Tensor:
    """ln q(sample) - ln p(sample), q = N(mean, std^2), p a mixture of normals of mean 0: KL(q || p) from one sample.

    Args:
        sample: a draw from q, such as :func:`rsample_normal`'s with the same mean and spread; mean, spread, form as
            there. Shapes broadcast.
        weights, stds: of the components, two or more; weights are above 0 and sum to 1.
        event_dims: summed over so many of the last axes.

    Made of torch's ops: it keeps what autograd keeps of them. Differentiable in all tensors; deterministic; does not
    synchronise. Far from every component it is exact: nothing is added inside a logarithm.
    C. Blundell et al., Weight Uncertainty in Neural Networks, ICML 2015, arXiv:1505.05424.
    """
    if len(weights) != len(stds) or not weights:
        raise ValueError(f"weights and stds must be of one length, 1 or more, got {len(weights)} and {len(stds)}")
    if min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must be above 0 and sum to 1, got {tuple(weights)}")
    if min(stds) <= 0:
        raise ValueError(f"stds must be above 0, got {tuple(stds)}")
    if event_dims < 0:
        raise ValueError(f"event_dims must not be negative, got {event_dims}")
    sample, mean, spread = (_wide(t) for t in _together(sample=sample, mean=mean, spread=spread))
    log_std = _log_std(spread, form)
    log_q = -0.5 * ((sample - mean) / log_std.exp()).square() - log_std
    log_p = torch.stack([
        math.log(w / s) - 0.5 * (sample / s).square() for w, s in zip(weights, stds, strict=True)
    ]).logsumexp(0)  # fmt: skip
    kl = log_q - log_p
    return kl.flatten(kl.dim() - event_dims).sum(-1) if event_dims else kl


def local_reparam(mean: Tensor, var: Tensor, *, key: Key = None, generator: Generator | None = None) -> Tensor:
    """mean + sqrt(var) * normal: a layer's output, drawn, of its moments under Gaussian weights.

    The gradient of ``var`` is grad * noise / (2 sqrt(var)), which has no limit at 0; there, where nothing is left of
    the noise, it is 0. Slightly negative variances, as rounding leaves them, count as 0.

    D. Kingma, T. Salimans, M. Welling, Variational Dropout and the Local Reparameterization Trick, NeurIPS 2015,
    arXiv:1506.02557.
    """
    return rsample_normal(mean, var, form="var", key=key, generator=generator)


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, *, key: Key = None, generator: Generator | None = None
) -> Tensor:
    """Zeros elements with probability p, rounded to a multiple of 2^-16, and divides the others by 1 - p.

    The mask is made again in backward. Without training, or with p = 0, the input itself is returned.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return _scaled(None, x, "keep", 1.0 - p, key, generator) if training and p > 0 else x


def gaussian_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, *, key: Key = None, generator: Generator | None = None
) -> Tensor:
    """x * (1 + sqrt(alpha) * normal) with alpha = p / (1 - p), the variance of :func:`dropout`.

    N. Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 2014.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    return _scaled(None, x, "gain", math.sqrt(p / (1.0 - p)), key, generator) if training and p > 0 else x


def random_signs(x: Tensor, *, key: Key = None, generator: Generator | None = None) -> Tensor:
    """x times -1 or 1, each with probability 1/2."""
    return _scaled(None, x, "sign", 0.0, key, generator)


def gumbel_softmax(
    logits: Tensor,
    tau: Tensor | float = 1.0,
    *,
    hard: bool = False,
    dim: int = -1,
    key: Key = None,
    generator: Generator | None = None,
) -> Tensor:
    """softmax((logits + gumbel) / tau) over ``dim``.

    Args:
        logits: finite, or -inf for what must not be drawn. A row with a NaN or +inf, or of -inf alone, is NaN.
        tau: above 0. As a tensor it is differentiable, and the softmax is torch's, as it is over another than the last
            axis: slower, with the same noise.
        hard: the result is exactly one-hot, at the first of the largest, and has the gradient of the soft one.

    The noise is finite: no logit that is finite gives an inf or a NaN. Backward needs the soft result, which is the
    output itself or, with ``hard``, is made again.

    C. Maddison, A. Mnih, Y. Teh, The Concrete Distribution, arXiv:1611.00712; E. Jang, S. Gu, B. Poole, Categorical
    Reparameterization with Gumbel-Softmax, arXiv:1611.01144; both ICLR 2017.
    """
    _check_tau(tau)
    if not isinstance(tau, Tensor) and dim in (-1, logits.dim() - 1):
        drawn: Tensor = _OPS.gumbel_softmax(
            logits, noise_key(logits.device, key=key, generator=generator), float(tau), hard
        )
        return drawn
    soft = torch.softmax(_tempered(logits, "gumbel", tau, key, generator), dim)
    if hard:
        chosen = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        soft = chosen + (soft - soft.detach())
    return soft.to(logits.dtype)


def binary_concrete(
    logits: Tensor,
    tau: Tensor | float = 1.0,
    *,
    hard: bool = False,
    key: Key = None,
    generator: Generator | None = None,
) -> Tensor:
    """sigmoid((logits + logistic) / tau): a relaxed Bernoulli variable of probability sigmoid(logits).

    With ``hard`` the result is exactly 0 or 1, and has the gradient of the soft one. Backward keeps the soft result.
    Paper: see :func:`gumbel_softmax`.
    """
    _check_tau(tau)
    soft = torch.sigmoid(_tempered(logits, "logistic", tau, key, generator))
    if hard:
        soft = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
    return soft.to(logits.dtype)


def kl_log_uniform(log_alpha: Tensor, *, approximation: str = "molchanov", event_dims: int = 0) -> Tensor:
    """The divergence of q = N(m, alpha m^2) from the log-uniform prior, up to a constant.

    Args:
        log_alpha: ln alpha.
        approximation: ``"molchanov"``: k1 - k1 sigmoid(k2 + k3 ln alpha) + ln(1 + 1 / alpha) / 2, for any alpha;
            ``"kingma"``: -ln(alpha) / 2 - c1 alpha - c2 alpha^2 - c3 alpha^3, for alpha <= 1 alone: beyond, it falls
            without bound; ``"ard"``: ln(1 + 1 / alpha) / 2, the divergence under automatic relevance determination.
        event_dims: as in :func:`kl_normal`, as is the result.

    Every element counts once: where one alpha is shared by many weights, multiply by their number.
    D. Molchanov, A. Ashukha, D. Vetrov, Variational Dropout Sparsifies Deep Neural Networks, ICML 2017,
    arXiv:1701.05369; D. Kingma et al., arXiv:1506.02557.
    """
    kl: Tensor = _OPS.kl_log_uniform(log_alpha, number_of("approximation", approximation, APPROXIMATIONS), event_dims)
    return kl


def _together(**given: Tensor | float) -> list[Tensor]:
    """Tensors of one shape and type; a number becomes one element that stands for all."""
    tensors = [t for t in given.values() if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(f"one of {', '.join(given)} must be a tensor")
    first, *others = tensors
    if len(tensors) == len(given) and all(t.dtype == first.dtype and t.shape == first.shape for t in others):
        return tensors
    dtype = first.dtype
    for t in others:
        dtype = torch.promote_types(dtype, t.dtype)
    made = [
        t.to(dtype) if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=first.device)
        for t in given.values()
    ]
    return list(torch.broadcast_tensors(*made))


def _with_prior(
    mean: Tensor, spread: Tensor, prior_mean: Tensor | float, prior_std: Tensor | float
) -> list[Tensor | None]:
    # The standard normal needs no tensors.
    centred = not isinstance(prior_mean, Tensor) and prior_mean == 0
    unit = not isinstance(prior_std, Tensor) and prior_std == 1
    if centred and unit:
        return [*_together(mean=mean, spread=spread), None, None]
    given: dict[str, Tensor | float] = {"mean": mean, "spread": spread}
    if not centred:
        given["prior_mean"] = prior_mean
    if not unit:
        if isinstance(prior_std, (int, float)) and prior_std <= 0:
            raise ValueError(f"prior_std must be above 0, got {prior_std}")
        given["prior_std"] = prior_std
    made = dict(zip(given, _together(**given), strict=True))
    return [made["mean"], made["spread"], made.get("prior_mean"), made.get("prior_std")]


def _scaled(
    loc: Tensor | None, scale: Tensor, kind: str, parameter: float, key: Key, generator: Generator | None
) -> Tensor:
    drawn: Tensor = _OPS.scaled_noise(
        loc, scale, noise_key(scale.device, key=key, generator=generator), KINDS.index(kind), parameter
    )
    return drawn


def _log_std(spread: Tensor, form: str) -> Tensor:
    """ln of the standard deviation, in float32 at least."""
    number_of("form", form, FORMS)
    if form == "rho":  # far below 0 the softplus is exp(rho), which underflows before its logarithm does
        return torch.where(spread < -16, spread, torch.nn.functional.softplus(spread.clamp_min(-16)).log())
    if form in ("logvar", "log_std"):
        return spread if form == "log_std" else spread / 2
    return spread.log() if form == "std" else spread.log() / 2


def _wide(x: Tensor) -> Tensor:
    """Half types as float32: what an op of torch makes of the noise is rounded once."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_tau(tau: Tensor | float) -> None:
    if not isinstance(tau, Tensor) and not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")


def _tempered(logits: Tensor, kind: str, tau: Tensor | float, key: Key, generator: Generator | None) -> Tensor:
    wide = _wide(logits)
    loc, scale = _together(loc=wide, scale=1.0)
    noisy = _scaled(loc, scale, kind, 0.0, key, generator)
    return noisy if not isinstance(tau, Tensor) and tau == 1 else noisy / tau


@torch.library.register_fake("fastnuggets::scaled_noise")
def _(loc, scale, key, kind, parameter):  # type: ignore[no-untyped-def]
    return scale.new_empty(scale.shape)


torch.library.register_fake("fastnuggets::fill_noise_", lambda *_: None)


def _sums(x: Tensor, event_dims: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[: x.dim() - event_dims], dtype=dtype)


@torch.library.register_fake("fastnuggets::rsample_normal")
def _(mean, spread, prior_mean, prior_std, key, form, event_dims, wanted):  # type: ignore[no-untyped-def]
    sums = _sums(mean, event_dims)
    z, var = (mean.new_empty(mean.shape if w else (0,)) for w in wanted[:2])
    return z, var, sums if wanted[2] else sums.new_empty((0,))


@torch.library.register_fake("fastnuggets::rsample_normal_backward")
def _(grad_z, grad_var, grad_kl, mean, spread, prior_mean, prior_std, key, form, event_dims, wanted):  # type: ignore[no-untyped-def]
    return tuple(mean.new_empty(mean.shape if w else (0,)) for w in wanted)


@torch.library.register_fake("fastnuggets::gumbel_softmax")
def _(logits, key, tau, hard):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.register_fake("fastnuggets::gumbel_softmax_backward")
def _(grad, soft, tau):  # type: ignore[no-untyped-def]
    return soft.new_empty(soft.shape)


@torch.library.register_fake("fastnuggets::kl_log_uniform")
def _(log_alpha, approximation, event_dims):  # type: ignore[no-untyped-def]
    return _sums(log_alpha, event_dims)


@torch.library.register_fake("fastnuggets::kl_log_uniform_backward")
def _(grad, log_alpha, approximation, event_dims):  # type: ignore[no-untyped-def]
    return log_alpha.new_empty(log_alpha.shape)
