"""What layers of random weights have in common, and the divergence of a whole model."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnuggets import ops
from fastnuggets.nn.stochastic import Stochastic
from fastnuggets.ops.sample import Key

LINEAR = ("in_features", "out_features")
CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
}


class RandomWeights(Stochastic):
    """Stands before one of torch's layers among the bases of a class."""

    weight: Any
    bias: Any
    _conv_forward: Any
    # Buffers that are None until there is one.
    optional_buffers: tuple[str, ...] = ()

    def beyond_plain(self) -> tuple[str, ...]:
        """Names of the tensors that the state of a plain layer lacks: they are left as they are when one is loaded."""
        return ()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        for name in self.optional_buffers:
            given = state_dict.get(prefix + name)
            if given is not None and getattr(self, name) is None:
                dtype = self.weight.dtype if given.is_floating_point() else given.dtype
                setattr(self, name, torch.empty_like(given, dtype=dtype, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        own = {prefix + name for name in self.beyond_plain()}
        missing[:] = [name for name in missing if name not in own]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch's layer does, with these weights."""
        return F.linear(x, weight, bias) if isinstance(self, nn.Linear) else self._conv_forward(x, weight, bias)

    def product_of_squares(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same of x^2: the variance of the output for weights of such variances.

        Where it would be float16, which holds neither the square of 256 nor a variance of 1e-8, it is float32.
        """
        if self.computes_in(x) != torch.float16:
            return self.product(x * x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.product(x * x, weight.float(), None if bias is None else bias.float())

    def computes_in(self, x: Tensor) -> torch.dtype:
        """The type of a product with x, autocast regarded."""
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        return torch.get_autocast_dtype(kind) if casts else x.dtype

    def signs(self, x: Tensor, key: Key) -> Tensor:
        """x times random signs: one for each example and feature, or channel."""
        if isinstance(self, nn.Linear):
            return ops.random_signs(x, key=key)
        axes = self.weight.dim() - 2
        return x * ops.random_signs(x.new_ones(x.shape[: x.dim() - axes] + (1,) * axes), key=key)

    def with_weights(self, weight: Tensor) -> nn.Module:
        """torch's layer with these weights and a copy of the bias."""
        kind = next(c for c in type(self).__mro__ if c in PLAIN)
        names = PLAIN[kind]
        plain = kind(**{n: getattr(self, n) for n in names}, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().clone(), self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain.train(self.training)


class Posterior(RandomWeights):
    """Random weights that have a divergence from a prior."""

    def kl(self) -> Tensor:
        """The divergence, computed anew: a scalar, float64 for float64 weights, else float32."""
        raise NotImplementedError

    def described_by(self) -> tuple[Tensor, ...]:
        """The tensors that describe the distribution."""
        raise NotImplementedError

    def held_kl(self) -> Tensor | None:
        """The divergence that the last forward computed, if there is one that is still right; it is given once."""
        return None

    def count(self) -> int:
        """How many random weights there are."""
        return int(self.weight.numel())


def wide(x: Tensor) -> Tensor:
    """float16 as float32: it cannot hold the variances of usual weights."""
    return x.float() if x.dtype == torch.float16 else x


class Held:
    """The divergence that the last forward computed beside its draw. It is copied and pickled as nothing."""

    def __init__(self) -> None:
        self._found: tuple[int, Tensor, tuple[Tensor, ...], tuple[int, ...]] | None = None
        self._number = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Held, ()

    def put(self, parts: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
        """Keeps the sum of ``parts``, while ``tensors`` do not change and no backward goes through its nodes."""
        self._found = None
        nodes = [part.grad_fn for part in parts if part.grad_fn is not None]
        if not nodes:
            return
        self._number += 1
        number, held = self._number, weakref.ref(self)

        # A backward of the draw alone frees what that of the divergence, which is the same node, needs.
        def forget(_: object) -> None:
            this = held()
            if this is not None and this._found is not None and this._found[0] == number:
                this._found = None

        for node in nodes:
            node.register_prehook(forget)
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        self._found = number, total, tensors, tuple(t._version for t in tensors)

    def take(self, tensors: tuple[Tensor, ...]) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        found, self._found = self._found, None
        if found is None:
            return None
        _, total, of, versions = found
        same = len(of) == len(tensors) and all(a is b for a, b in zip(of, tensors, strict=True))
        return total if same and versions == tuple(t._version for t in tensors) else None


def holds(layer: nn.Module) -> bool:
    """Whether a forward, now, is one whose divergence is worth keeping: not in a compiled graph, which sees no versions
    of tensors."""
    return layer.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def kl(model: nn.Module, *, reduction: str = "sum") -> Tensor:
    """The divergence of all random weights of ``model`` from their priors, nats.

    Args:
        model: whose layers with a method ``kl()`` count; weights that several layers share count once.
        reduction: ``"sum"``, that of the evidence lower bound: the loss of N examples is the mean cross entropy
            + kl / N; or ``"mean"``, the sum divided by the number of random weights.

    Returns:
        A scalar; 0 if no layer has a divergence.

    A forward in training mode computes its layer's divergence in the pass that draws. That is used here, once, if
    the layer's parameters are what they were and its graph is whole; otherwise a pass of its own computes the same. A
    change through ``.data`` goes unseen. Differentiable to any order, deterministic but for a `DeepWeightPrior`, whose
    divergence is an estimate drawn at each call; does not synchronise.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    parts, seen, count = [], set(), 0
    for layer in model.modules():
        if isinstance(layer, Posterior):
            held = layer.held_kl()
            tensors = tuple(id(t) for t in layer.described_by())
            if tensors not in seen:
                seen.add(tensors)
                count += layer.count()
                parts.append(layer.kl() if held is None else held)
        elif isinstance(layer, Stochastic) and (anew := getattr(layer, "kl", None)) is not None:
            count += sum(p.numel() for p in layer.parameters())
            parts.append(anew())
    if not parts:
        return next((p.new_zeros(()) for p in model.parameters()), torch.zeros(()))
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total / count if reduction == "mean" else total
