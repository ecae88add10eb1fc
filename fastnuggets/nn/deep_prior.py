"""The deep weight prior: what kernels of trained networks look like, as the prior of new ones and as their start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn

from fastnuggets import ops
from fastnuggets.nn.bayes import BayesConv2d
from fastnuggets.nn.weights import wide
from fastnuggets.ops.sample import Key, _log_std, counted_keys

LN_2_PI_E = 1 + math.log(2 * math.pi)

Source = nn.Module | Mapping[str, Tensor]
Changed = TypeVar("Changed", bound=nn.Module | Tensor)


class KernelModel(Protocol):
    """What is asked of a model of kernels: `fastnuggets.models.KernelVAE` is one."""

    size: int

    def bound(self, w: Tensor, *, key: Key = None) -> Any:
        """Of kernels w [N, size, size]: an object whose ``loss`` [N] is in expectation at least -ln p(w)."""

    def sample(self, n: int, *, key: Key = None) -> Tensor:
        """Kernels [n, size, size] of p(w)."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class DeepWeightPrior:
    """A frozen model of k x k kernels as the prior of each kernel of a :class:`fastnuggets.nn.BayesConv2d`.

        prior = nn.DeepWeightPrior(vae).attach_(model)
        loss = cross_entropy(model(x), y) + nn.kl(model) / examples

    Args:
        vae: a `fastnuggets.models.KernelVAE`, of which all parameters are frozen (requires_grad False) from now on.

    ln p(w) is an integral over z, and so :meth:`kl` is an upper bound of the divergence, itself estimated:

        KL(q(w) || p(w)) <= -H(q) + E_q(w) [KL(r(z | w) || N(0, I)) - E_r(z | w) ln p(w | z)]

    with H in closed form and one draw of every w and z a call, independent of the draws of the forward. The bound is
    tight where r is the posterior of z.

    It is given, not learned: in no state_dict and among no parameters of the layers, so that checkpoints stay those of
    layers without it. ``to`` of a model does not move it: have ``prior.vae`` on the device of the weights. A copy of a
    model copies it too.

    A. Atanov, A. Ashukha, K. Struminsky, D. Vetrov, M. Welling, The Deep Weight Prior, ICLR 2019, arXiv:1810.06943.
    """

    def __init__(self, vae: KernelModel) -> None:
        self.vae = vae
        for parameter in vae.parameters():
            parameter.requires_grad_(False)

    def attach_(self, model: nn.Module) -> DeepWeightPrior:
        """Makes it the prior of the weights of all BayesConv2d in ``model`` whose kernels are of its size.

        ``weight_prior = None`` of a layer gives that its Gaussian prior back. A random bias keeps its own.

        Raises:
            ValueError: there is no such layer.
        """
        for layer in _layers(model, BayesConv2d, self.vae.size):
            layer.weight_prior = self
        return self

    def kl(self, mean: Tensor, spread: Tensor, *, form: str = "log_std", key: Key = None) -> Tensor:
        """An estimate of the bound for q = N(mean, std^2) of weights [out, in, k, k], nats: a scalar.

        Args:
            form: how ``spread`` says the deviation, as in `fastnuggets.ops.rsample_normal`.
            key: its offset is counted on: 0 for w, 1 for z.

        float64 for float64 weights, else float32; differentiable in mean and spread as long as the vae is, and given
        the key deterministic. Does not synchronise. Memory: the activations of the vae, for all kernels at once.
        """
        keys = counted_keys(2, mean.device, key=key)
        mean, spread = wide(mean), wide(spread)
        w = ops.rsample_normal(mean, spread, form=form, key=keys[0])
        kernels = _kernels(w, self.vae.size).to(next(self.vae.parameters()).dtype)
        minus_entropy = -(_log_std(spread, form) + 0.5 * LN_2_PI_E).sum()
        return minus_entropy + self.vae.bound(kernels, key=keys[1]).loss.sum().to(minus_entropy.dtype)

    def __repr__(self) -> str:
        return f"DeepWeightPrior({self.vae.size} x {self.vae.size})"


def harvest(sources: Source | Iterable[Source], size: int, *, least_norm: float = 0.01) -> Tensor:
    """The size x size kernels of trained networks, [N, size, size]: what a `fastnuggets.models.KernelVAE` learns from.

    Args:
        sources: a module, whose `torch.nn.Conv2d` are taken (of Bayesian ones the means); or its state_dict, of which
            all floating tensors [out, in, size, size] are, also those of transposed convolutions; or several.
        least_norm: kernels of which the root of the sum of squares is less are left out: weight decay leaves many near
            0, of which nothing is to be learned.

    In the order of sources, layers, and output and input channels. Detached; of the first one's dtype and device.

    Raises:
        ValueError: there is no such kernel.
    """
    several = [sources] if isinstance(sources, nn.Module | Mapping) else list(sources)
    found = [weight.detach().flatten(0, 1) for source in several for weight in _weights(source, size)]
    if not found:
        raise ValueError(f"no source has a convolution of {size} x {size} kernels")
    kernels = torch.cat([weight.to(found[0]) for weight in found])
    kernels = kernels[kernels.flatten(1).norm(dim=1) >= least_norm]
    if not len(kernels):
        raise ValueError(f"all kernels of {size} x {size} have a norm below least_norm = {least_norm}")
    return kernels


@torch.no_grad()
def dwp_init_(target: Changed, vae: KernelModel, *, key: Key = None, generator: Generator | None = None) -> Changed:
    """Sets convolution kernels to draws of ``vae``, in place, and returns ``target``.

    Args:
        target: weights [out, in, k, k]; or a module, whose `torch.nn.Conv2d` with kernels of the vae's size are set:
            of Bayesian ones the means. Biases are left.
        vae: a `fastnuggets.models.KernelVAE` on the device of the weights.
        key, generator: as in :mod:`fastnuggets.ops.sample`. A key's offset is counted on, two for each layer.

    Raises:
        ValueError: the weights are of another size, or no layer of the module is of this one.

    Paper: see :class:`DeepWeightPrior`.
    """
    if isinstance(target, Tensor):
        weights = [target]
    else:
        weights = [layer.weight for layer in _layers(target, nn.Conv2d, vae.size)]
    keys = counted_keys(2 * len(weights), weights[0].device, key=key, generator=generator)[::2]
    for weight, each in zip(weights, keys, strict=True):
        kernels = _kernels(weight, vae.size)
        weight.copy_(vae.sample(len(kernels), key=each).view_as(weight))
    return target


def _weights(source: Source, size: int) -> list[Tensor]:
    if isinstance(source, nn.Module):
        return [layer.weight for layer in source.modules() if isinstance(layer, nn.Conv2d) and _fits(layer, size)]
    return [t for t in source.values() if t.dim() == 4 and t.shape[2:] == (size, size) and t.is_floating_point()]


def _layers(model: nn.Module, kind: type[nn.Conv2d], size: int) -> list[Any]:
    found = [layer for layer in model.modules() if isinstance(layer, kind) and _fits(layer, size)]
    if not found:
        raise ValueError(f"no {kind.__name__} of the model has {size} x {size} kernels")
    return found


def _fits(layer: nn.Conv2d, size: int) -> bool:
    return tuple(layer.kernel_size) == (size, size)


def _kernels(weight: Tensor, size: int) -> Tensor:
    """[out * in, size, size]"""
    if weight.dim() != 4 or weight.shape[2:] != (size, size):
        raise ValueError(f"weights: expected [out, in, {size}, {size}], got {list(weight.shape)}")
    return weight.flatten(0, 1)
