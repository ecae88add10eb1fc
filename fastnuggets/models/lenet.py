"""A small LeNet of which any layer can be noise, and what is done to such layers once they have learned."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastnuggets.nn import (
    BayesConv2d,
    BayesLinear,
    Dropout,
    VarianceConv2d,
    VarianceLinear,
    VariationalDropoutConv2d,
    VariationalDropoutLinear,
)

LAYERS = ("conv1", "conv2", "dense1", "dense2")
KINDS = ("plain", "variational", "variance")
CONV_KINDS = {"plain": nn.Conv2d, "variational": VariationalDropoutConv2d, "variance": VarianceConv2d}
DENSE_KINDS = {"plain": nn.Linear, "variational": VariationalDropoutLinear, "variance": VarianceLinear}
VARIATIONAL = (VariationalDropoutConv2d, VariationalDropoutLinear)
NOISY = (*VARIATIONAL, VarianceConv2d, VarianceLinear)


class LeNet(nn.Sequential):
    """Two convolutions with pooling and two dense layers; batch norm and ReLU after all but the last, no biases.

    The network in which variance layers were shown, with convolutions of 3 x 3 for images this small, and narrower.

    Args:
        kinds: of the layers ``"conv1"``, ``"conv2"``, ``"dense1"`` and ``"dense2"``; those not named are
            ``"plain"``. ``"variational"``: variational dropout; ``"variance"``: weights of zero mean.
        classes: outputs.
        size: of the square images; a multiple of 4.
        channels, dense: features of the convolutions and of the first dense layer.
        alpha: of variational layers, one a ``"layer"``, a ``"neuron"`` or a ``"weight"``.
        drop: probability of dropout before the first dense layer; 0: no such module.

    Raises:
        ValueError: naming the argument.

    Images [B, 1, size, size] -> logits [B, classes]. A variance layer draws in eval mode too; the others while training
    and inside :func:`fastnuggets.nn.sampling`. K. Neklyudov et al., Variance Networks, ICLR 2019, arXiv:1803.03764.
    """

    def __init__(
        self,
        kinds: Mapping[str, str] | None = None,
        *,
        classes: int = 10,
        size: int = 8,
        channels: tuple[int, int] = (16, 32),
        dense: int = 64,
        alpha: str = "layer",
        drop: float = 0.0,
    ) -> None:
        kinds = dict.fromkeys(LAYERS, "plain") | dict(kinds or {})
        if set(kinds) != set(LAYERS):
            raise ValueError(
                f"kinds: layers are {', '.join(LAYERS)}, got {', '.join(sorted(set(kinds) - set(LAYERS)))}"
            )
        unknown = sorted(set(kinds.values()) - set(KINDS))
        if unknown:
            raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {', '.join(unknown)}")
        if size < 4 or size % 4:
            raise ValueError(f"size must be a multiple of 4, got {size}")

        def options(layer: str) -> dict[str, str]:
            return {"alpha": alpha} if kinds[layer] == "variational" else {}

        first, second = channels
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for name, inside, outside in (("conv1", 1, first), ("conv2", first, second)):
            made = CONV_KINDS[kinds[name]](inside, outside, 3, padding=1, bias=False, **options(name))
            modules |= {name: made, f"norm_{name}": nn.BatchNorm2d(outside), f"relu_{name}": nn.ReLU()}
            modules[f"pool_{name}"] = nn.MaxPool2d(2)
        modules["flatten"] = nn.Flatten()
        if drop:
            modules["drop"] = Dropout(drop)
        features = second * (size // 4) ** 2
        modules["dense1"] = DENSE_KINDS[kinds["dense1"]](features, dense, bias=False, **options("dense1"))
        modules |= {"norm_dense1": nn.BatchNorm1d(dense), "relu_dense1": nn.ReLU()}
        modules["dense2"] = DENSE_KINDS[kinds["dense2"]](dense, classes, bias=False, **options("dense2"))
        super().__init__(modules)


def without_means(model: LeNet, layers: Iterable[str] = LAYERS) -> LeNet:
    """A copy in which variational layers, of those named, have become variance layers: their means are 0.

    Deviations stay what they were, and so does all else.
    """
    model = copy.deepcopy(model)
    for name in layers:
        layer = getattr(model, name)
        if isinstance(layer, VARIATIONAL):
            setattr(model, name, _filled(layer, VarianceConv2d, VarianceLinear, weight=deviations(layer)))
    return model.train(model.training)


def with_permuted_deviations(model: LeNet, generator: torch.Generator) -> LeNet:
    """A copy in which each noisy layer's deviations have changed places at random; means, if it has any, stay."""
    model = copy.deepcopy(model)
    for name in LAYERS:
        layer = getattr(model, name)
        if isinstance(layer, NOISY):
            std = deviations(layer).flatten()
            std = std[torch.randperm(len(std), generator=generator)].view_as(layer.weight)
            if isinstance(layer, VARIATIONAL):
                # The least number there is in place of 0, which has no logarithm.
                state = {"weight": layer.weight, "weight_log_std": std.clamp(min=torch.finfo(std.dtype).tiny).log()}
                setattr(model, name, _filled(layer, BayesConv2d, BayesLinear, **state))
            else:
                setattr(model, name, _filled(layer, VarianceConv2d, VarianceLinear, weight=std))
    return model.train(model.training)


@torch.no_grad()
def deviations(layer: nn.Module) -> Tensor:
    """The standard deviation of each weight of a variational or a variance layer."""
    weight: Tensor = layer.weight
    if not isinstance(layer, VARIATIONAL):
        return weight.abs()
    if layer.alpha == "weight":
        return (layer.log_sigma2 / 2).exp()
    return (layer.ln_alpha() / 2).exp() * weight.abs()


def _filled(layer: nn.Module, conv: type[nn.Module], linear: type[nn.Module], **state: Tensor) -> nn.Module:
    """A layer of the same shape and another class, with these parameters."""
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn for nothing
        if isinstance(layer, nn.Linear):
            made = linear(layer.in_features, layer.out_features, bias=False)
        else:
            made = conv(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, bias=False)
    made.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, strict=False)
    return made.to(layer.weight)
