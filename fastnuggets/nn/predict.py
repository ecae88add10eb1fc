"""Predictions of a network that draws: many passes, and what they agree and disagree on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastnuggets.nn.stochastic import DROPOUTS, Stochastic, sampling

REDUCTIONS = ("mean", "none")

# These drop by a function, as their own mode says; nothing else of theirs depends on it.
_DROP_INSIDE = (torch.nn.MultiheadAttention, torch.nn.RNNBase)


@dataclass(frozen=True)
class Prediction:
    """Of the samples' outputs, [N, ...] each: float32 for half types."""

    mean: Tensor
    std: Tensor  # over the samples, with their number less 1; 0 for one sample
    entropy: Tensor | None = None  # of the mean, in nats, without the axis of the classes; of probabilities alone
    mutual_information: Tensor | None = None  # entropy less the samples' mean entropy: what they disagree on


def mc_predict(
    model: torch.nn.Module,
    x: Any,
    samples: int = 20,
    *,
    reduce: str = "mean",
    activation: str | None = None,
    dim: int = -1,
    batch_size: int | None = None,
) -> Prediction | Tensor:
    """Passes of ``model`` in eval mode in which whatever draws does draw, and their statistics.

    What draws: every `fastnuggets.nn.Stochastic` module and torch's dropout, also that inside its attention and
    recurrent layers. Batch norms use their running statistics. All modules are in the mode they were in afterwards,
    also after an error.

    Args:
        x: the input; a tuple is the model's several inputs.
        samples: passes, at least 1.
        reduce: ``"mean"`` for a :class:`Prediction`, in memory that does not grow with ``samples``; ``"none"`` for the
            outputs, stacked: [samples, N, ...].
        activation: None, or ``"softmax"``: of the model's output, over ``dim``.
        batch_size: rows of ``x``'s tensors, all of the same number, that go through the model at once; default all.
            Each batch draws anew, and so do the weights of a Bayesian layer.

    Raises:
        ValueError: of an argument.
        TypeError: the model's output is no tensor.

    Warns:
        UserWarning: the model has nothing that draws.

    Records no gradient. As deterministic as the model, given torch's seed.
    Y. Gal, Z. Ghahramani, Dropout as a Bayesian Approximation, ICML 2016, arXiv:1506.02142; mutual information:
    N. Houlsby et al., Bayesian Active Learning for Classification and Preference Learning, arXiv:1112.5745.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if activation not in (None, "softmax"):
        raise ValueError(f'activation must be None or "softmax", got {activation!r}')
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    inputs = x if isinstance(x, tuple) else (x,)

    def outputs(batch: tuple[Any, ...]) -> Iterator[Tensor]:
        for _ in range(samples):
            out = model(*batch)
            if not isinstance(out, Tensor):
                raise TypeError(f"the model's output must be a tensor, got {type(out).__name__}")
            out = out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
            yield out.softmax(dim) if activation else out

    if not any(map(_draws, model.modules())):
        warnings.warn("the model has no module that draws: all samples are the same", stacklevel=2)
    with torch.no_grad(), _drawing(model):
        if reduce == "none":
            return torch.cat([torch.stack(list(outputs(batch))) for batch in _batches(inputs, batch_size)], 1)
        parts = [_moments(outputs(batch), dim if activation else None) for batch in _batches(inputs, batch_size)]
    return parts[0] if len(parts) == 1 else Prediction(*(_joined(parts, field.name) for field in fields(Prediction)))


def _draws(module: torch.nn.Module) -> bool:
    return isinstance(module, (Stochastic, *DROPOUTS)) or (isinstance(module, _DROP_INSIDE) and module.dropout > 0)


@contextmanager
def _drawing(model: torch.nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    modes = [m.training for m in modules]
    try:
        model.eval()
        for m in modules:
            if isinstance(m, _DROP_INSIDE):
                m.training = True
        with sampling(model):
            yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode


def _batches(inputs: tuple[Any, ...], size: int | None) -> Iterator[tuple[Any, ...]]:
    rows = [x.size(0) for x in inputs if isinstance(x, Tensor) and x.dim()]
    if size is None or not rows:
        yield inputs
        return
    if len(set(rows)) > 1:
        raise ValueError(f"x: with batch_size all tensors must have the same number of rows, got {rows}")
    for first in range(0, max(rows[0], 1), size):
        yield tuple(x[first : first + size] if isinstance(x, Tensor) and x.dim() else x for x in inputs)


def _joined(parts: list[Prediction], name: str) -> Any:
    found = [getattr(part, name) for part in parts]
    return None if found[0] is None else torch.cat(found)


def _moments(outputs: Iterator[Tensor], dim: int | None) -> Prediction:
    """By Welford's running moments; the outputs are probabilities over ``dim``, if that is given."""
    n, mean, squares, entropies = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for n, out in enumerate(outputs, 1):
        if n == 1:
            mean, squares = torch.zeros_like(out), torch.zeros_like(out)
        change = out - mean
        mean = mean + change / n
        squares = squares + change * (out - mean)
        if dim is not None:
            entropies = _entropy(out, dim) + entropies
    std = (squares / max(n - 1, 1)).sqrt()
    if dim is None:
        return Prediction(mean, std)
    entropy = _entropy(mean, dim)
    return Prediction(mean, std, entropy, (entropy - entropies / n).clamp(min=0))


def _entropy(probabilities: Tensor, dim: int) -> Tensor:
    return torch.special.entr(probabilities).sum(dim)
