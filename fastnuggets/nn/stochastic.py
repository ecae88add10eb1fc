"""What modules that draw have in common: when they draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's own, which draw whenever they are in training mode.
DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)


class Stochastic(torch.nn.Module):
    """A module that draws while training, and in eval mode inside :func:`sampling`; never after ``scale_weights_``."""

    # None: as the mode says. In no state_dict; of the class until it is set, so that an old pickle has it too.
    _draws: bool | None = None

    @property
    def samples(self) -> bool:
        """Whether forward draws."""
        return self.training if self._draws is None else self._draws

    def scale_weights_(self) -> None:
        """From now on the mean in place of a draw, in any mode: see :func:`weight_scaling_`."""
        self._draws = False


@contextmanager
def sampling(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, whatever draws in ``model`` draws in eval mode too: Monte Carlo predictions.

    That is every :class:`Stochastic` module, and torch's own dropout. Batch norms and all else stay in the mode they
    are in, and so does what :func:`weight_scaling_` has been called on. May be nested. torch's fast path of
    transformers, which calls no layer, is off meanwhile.

        model.eval()
        with torch.no_grad(), nn.sampling(model):
            mean = torch.stack([model(x).softmax(-1) for _ in range(10)]).mean(0)
    """
    ours = [m for m in model.modules() if isinstance(m, Stochastic) and m._draws is None]
    theirs = [m for m in model.modules() if isinstance(m, DROPOUTS) and not m.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for m in ours:
            m._draws = True
        for dropout in theirs:
            dropout.training = True
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m in ours:
            if m._draws:
                m._draws = None
        for dropout in theirs:
            dropout.training = False


def weight_scaling_(model: torch.nn.Module) -> torch.nn.Module:
    """Turns off, in place and for good, all that ``model`` draws, and returns it: the deterministic approximation.

    Every module with a method ``scale_weights_()`` has it called: Gaussian weights become their mean and dropout the
    identity, in training mode too; then one pass costs what a plain network's does. A variance layer, whose weights'
    mean is 0, is left with its bias. torch's own dropout is put in eval mode, until the next ``train()``.

    N. Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 2014.
    """
    for m in model.modules():
        scale = getattr(m, "scale_weights_", None)
        if scale is not None:
            scale()
        elif isinstance(m, DROPOUTS):
            m.eval()
    return model
