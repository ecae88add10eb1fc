"""Layers of Gaussian weights, and plain models made into such."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.nn.weights import Held, Posterior, holds, wide
from fastnuggets.ops.sample import Key, counted_keys

SAMPLINGS = ("local", "weight", "flipout")
# Those of the op's forms that any real number is right for.
FORMS = ("log_std", "logvar", "rho")


class Bayes(Posterior):
    """What :class:`BayesLinear` and the convolutions have in common."""

    sampling: str
    form: str = ""  # until the torch layer has been made
    weight_prior_mean: Tensor | None
    bias_prior_mean: Tensor | None
    weight_prior: Any = None  # a DeepWeightPrior, in place of the Gaussian
    optional_buffers = ("weight_prior_mean", "bias_prior_mean")

    def __init__(
        self,
        *args: Any,
        sampling: str = "local",
        prior_mean: float = 0.0,
        prior_std: float = 1.0,
        init_std: float | None = None,
        form: str = "log_std",
        bayesian_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._make_random(sampling, prior_mean, prior_std, init_std, form, bayesian_bias)

    def _make_random(
        self, sampling: str, prior_mean: float, prior_std: float, init_std: float | None, form: str, bayesian_bias: bool
    ) -> None:
        _check(sampling, prior_std, init_std, form)
        self.sampling, self.form, self.init_std = sampling, form, init_std
        self.prior_mean, self.prior_std = float(prior_mean), float(prior_std)
        self.bayesian_bias = bayesian_bias and self.bias is not None
        self._held = Held()
        for name in ("weight", "bias"):
            mean = getattr(self, name)
            spread = None
            if name == "weight" or self.bayesian_bias:
                spread = nn.Parameter(torch.empty_like(mean), requires_grad=mean.requires_grad)
            self.register_parameter(f"{name}_{form}", spread)
            self.register_buffer(f"{name}_prior_mean", None)
        self._reset_spread()

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if self.form:
            self._reset_spread()

    @torch.no_grad()
    def _reset_spread(self) -> None:
        std = self.init_std
        if std is None:
            std = 0.1 / math.sqrt(max(1, self.weight.shape[1:].numel()))
        for _, spread, _ in self._parts():
            spread.fill_(float(_spread(torch.tensor(std, dtype=torch.float64), self.form)))

    def _parts(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Mean, spread and prior mean of the weights, and of the bias if it is random."""
        names = ("weight", "bias") if self.bayesian_bias else ("weight",)
        return [(getattr(self, n), getattr(self, f"{n}_{self.form}"), getattr(self, f"{n}_prior_mean")) for n in names]

    def _prior(self, mean: Tensor, prior_mean: Tensor | None) -> dict[str, Any]:
        return {
            "form": self.form,
            "prior_mean": self.prior_mean if prior_mean is None else prior_mean,
            "prior_std": self.prior_std,
            "event_dims": mean.dim(),
        }

    def beyond_plain(self) -> tuple[str, ...]:
        return (f"weight_{self.form}", f"bias_{self.form}", *self.optional_buffers)

    def described_by(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self._parts() for t in part if t is not None)

    def count(self) -> int:
        return sum(mean.numel() for mean, _, _ in self._parts())

    def kl(self) -> Tensor:
        parts = [self._kl_of(*part) for part in self._parts()]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _kl_of(self, mean: Tensor, spread: Tensor, prior: Tensor | None) -> Tensor:
        if self.weight_prior is not None and mean is self.weight:
            found: Tensor = self.weight_prior.kl(mean, spread, form=self.form)
            return found
        return ops.kl_normal(mean, spread, **self._prior(mean, prior))

    def held_kl(self) -> Tensor | None:
        found = None if torch.compiler.is_compiling() else self._held.take(self.described_by())
        return found if self.weight_prior is None else None

    def _holds(self) -> bool:
        return self.weight_prior is None and holds(self)

    @property
    def weight_std(self) -> Tensor:
        """The standard deviation of each weight."""
        return _variance(getattr(self, f"weight_{self.form}"), self.form).sqrt()

    def forward(self, x: Tensor, *, key: Key = None) -> Tensor:
        if not self.samples:
            return self.product(x, self.weight, self.bias)
        if self.sampling == "local":
            # The mean first: then backward adds to the weights' gradient in place, and not into new memory.
            mean = self.product(x, self.weight, self.bias)
            var, bias_var = self._variances()
            return ops.local_reparam(mean, self.product_of_squares(x, var, bias_var), key=key).to(mean.dtype)
        keys = _keys(key, x.device, 4)
        if self.sampling == "weight":
            weight, bias = self._weights(keys)
            return self.product(x, weight, bias)
        weight, bias = self._perturbations(keys)
        change = self.product(self.signs(x, keys[2]), weight, bias)
        return self.product(x, self.weight, self.bias) + self.signs(change, keys[3])

    def _variances(self) -> tuple[Tensor, Tensor | None]:
        if self._holds():
            pairs = [
                ops.variance_kl(wide(mean), wide(spread), **self._prior(mean, prior))
                for mean, spread, prior in self._parts()
            ]
            self._held.put([part for _, part in pairs], self.described_by())
            found = [var for var, _ in pairs]
        else:
            found = [_variance(wide(spread), self.form) for _, spread, _ in self._parts()]
        return found[0], found[1] if self.bayesian_bias else None

    def _weights(self, keys: list[Key]) -> tuple[Tensor, Tensor | None]:
        parts = list(zip(self._parts(), keys, strict=False))
        if self._holds():
            pairs = [
                ops.rsample_normal_kl(mean, spread, key=k, **self._prior(mean, prior))
                for (mean, spread, prior), k in parts
            ]
            self._held.put([part for _, part in pairs], self.described_by())
            found = [drawn for drawn, _ in pairs]
        else:
            found = [ops.rsample_normal(mean, spread, form=self.form, key=k) for (mean, spread, _), k in parts]
        return found[0], found[1] if self.bayesian_bias else self.bias

    def _perturbations(self, keys: list[Key]) -> tuple[Tensor, Tensor | None]:
        found = [
            ops.rsample_normal(spread.new_zeros(()), spread, form=self.form, key=k)
            for (_, spread, _), k in zip(self._parts(), keys, strict=False)
        ]
        return found[0], found[1] if self.bayesian_bias else None

    def to_plain(self) -> nn.Module:
        """torch's layer with the means for weights, a copy."""
        return self.with_weights(self.weight)

    def extra_repr(self) -> str:
        prior = f"prior_std={self.prior_std}" if self.weight_prior is None else f"weight_prior={self.weight_prior}"
        return f"{super().extra_repr()}, sampling={self.sampling!r}, {prior}"


class BayesLinear(Bayes, nn.Linear):
    """`torch.nn.Linear` of independent Gaussian weights: ``weight`` is their mean.

    Args:
        in_features, out_features, bias, device, dtype: as torch's, which initialises ``weight`` and ``bias``.
        sampling: what a forward draws. ``"local"``: the output, from its mean and variance, so that each example has
            noise of its own (Kingma et al. 2015); two products forward. ``"weight"``: one set of weights a call
            (Blundell et al. 2015); one product, the noisiest gradient. ``"flipout"``: one perturbation a call, with
            random signs for each example (Wen et al. 2018); two products.
        prior_mean, prior_std: of the Gaussian prior of each weight.
        init_std: the first standard deviation; default 0.1 / sqrt(fan_in), a tenth of the bound within which torch
            draws the means, so that a new layer, however wide, starts as one with a little noise.
        form: how the deviation is stored, as the parameter ``weight_<form>``: ``"log_std"``; ``"logvar"``; ``"rho"``,
            std = ln(1 + exp(rho)), which for small deviations is log_std at the price of a logarithm more.
        bayesian_bias: the bias is random too, with ``bias_<form>``. By default it is a plain parameter: it is few of
            the weights, well determined, and a plain checkpoint's.

    Call:
        x as torch's layer, ``key`` as in :mod:`fastnuggets.ops.sample`, which says what is promised of draws. A key
        given has its offset counted on for further tensors: 0 the output or the weights, 1 the bias, 2 and 3 the
        signs of inputs and outputs.

    Draws in training mode and inside :func:`fastnuggets.nn.sampling`; otherwise the means are used. Each training
    forward holds its divergence for one :func:`fastnuggets.nn.kl` (flipout's is computed there). Any number of
    forwards may come before a backward. Ranks that were seeded alike draw alike. A plain layer's state_dict loads.

    C. Blundell et al., Weight Uncertainty in Neural Networks, ICML 2015, arXiv:1505.05424; D. Kingma, T. Salimans,
    M. Welling, arXiv:1506.02557; Y. Wen et al., Flipout, ICLR 2018, arXiv:1803.04386.
    """


class BayesConv1d(Bayes, nn.Conv1d):
    """`torch.nn.Conv1d` of Gaussian weights: see :class:`BayesLinear`.

    ``"local"`` is exact in the distribution of each output; that neighbours share weights is left out. Signs of
    flipout are one for each example and channel.
    """


class BayesConv2d(Bayes, nn.Conv2d):
    """`torch.nn.Conv2d` of Gaussian weights: see :class:`BayesConv1d`.

    :meth:`fastnuggets.nn.DeepWeightPrior.attach_` sets another prior, ``weight_prior``: then its divergence is drawn.
    """


class BayesConv3d(Bayes, nn.Conv3d):
    """`torch.nn.Conv3d` of Gaussian weights: see :class:`BayesConv1d`."""


TWINS: dict[type[nn.Module], type[Bayes]] = {
    nn.Linear: BayesLinear,
    nn.Conv1d: BayesConv1d,
    nn.Conv2d: BayesConv2d,
    nn.Conv3d: BayesConv3d,
}


def bayesianize(
    model: nn.Module,
    *,
    sampling: str = "local",
    prior: str = "standard",
    prior_std: float = 1.0,
    init_std: float | Callable[[Tensor], Tensor] | None = None,
    form: str = "log_std",
    bayesian_bias: bool = False,
    skip: Iterable[str] | Callable[[str, nn.Module], bool] = (),
    inplace: bool = True,
) -> nn.Module:
    """Makes the Linear and Conv1d, 2d, 3d layers of ``model`` Bayesian and returns it.

    Args:
        model: layers of exactly these classes are changed, subclasses are not. A layer stays the object that it is,
            with its parameters, hooks and requires_grad, which those of the deviations share; tied weights have tied
            deviations.
        sampling, prior_std, form, bayesian_bias: as in :class:`BayesLinear`.
        prior: the mean of the weights' prior: ``"standard"``, 0; ``"weights"``, the present values, which become a
            buffer (MOPED).
        init_std: as in :class:`BayesLinear`; or a function of the weights, such as MOPED's
            ``lambda w: 0.1 * w.abs()``. Deviations below 1e-8 become 1e-8.
        skip: full names of layers to leave, or a function of name and layer.
        inplace: False: a deep copy is changed.

    Raises:
        ValueError: a choice that does not exist, or a name in ``skip`` that ``model`` has not.

    Before :func:`torch.compile`, DDP and the optimizer, which must see the new parameters. A checkpoint of the plain
    model still loads, and leaves the deviations.

    R. Krishnan, M. Subedar, O. Tickoo, Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes
    (MOPED), AAAI 2020, arXiv:1906.05323.
    """
    if prior not in ("standard", "weights"):
        raise ValueError(f"prior must be standard or weights, got {prior!r}")
    number = None if callable(init_std) else init_std
    _check(sampling, prior_std, number, form)
    skipped = _skipping(model, skip)
    model = model if inplace else copy.deepcopy(model)
    tied: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if type(layer) not in TWINS or skipped(name, layer):
            continue
        layer.__class__ = TWINS[type(layer)]
        assert isinstance(layer, Bayes)
        layer._make_random(sampling, 0.0, prior_std, number, form, bayesian_bias)
        for part in ("weight", "bias") if layer.bayesian_bias else ("weight",):
            mean, spread = getattr(layer, part), getattr(layer, f"{part}_{form}")
            if callable(init_std):
                with torch.no_grad():
                    spread.copy_(_spread(init_std(mean.detach()).double().clamp(min=1e-8), form))
            setattr(layer, f"{part}_{form}", tied.setdefault(id(mean), spread))
            if prior == "weights":
                setattr(layer, f"{part}_prior_mean", mean.detach().clone())
    return model


def _skipping(
    model: nn.Module, skip: Iterable[str] | Callable[[str, nn.Module], bool]
) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    names = {skip} if isinstance(skip, str) else set(skip)
    unknown = names - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"skip: model has no layer named {', '.join(sorted(unknown))}")
    return lambda name, _: name in names


def _check(sampling: str, prior_std: float, init_std: float | None, form: str) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    for name, value in (("prior_std", prior_std), ("init_std", 1.0 if init_std is None else init_std)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be above 0, got {value}")


def _spread(std: Tensor, form: str) -> Tensor:
    """What in this form says the deviation ``std``."""
    if form == "rho":  # ln(exp(std) - 1), of no large or cancelling terms
        return std + torch.log(-torch.expm1(-std))
    return std.log() * (2 if form == "logvar" else 1)


def _variance(spread: Tensor, form: str) -> Tensor:
    if form == "rho":
        return F.softplus(spread).square()
    return (spread if form == "logvar" else 2 * spread).exp()


def _keys(key: Key, device: torch.device, n: int) -> list[Key]:
    """n keys: a given one with its offset counted on, or each to be drawn."""
    return [None] * n if key is None else [*counted_keys(n, device, key=key)]
