"""Decays of exponential moving averages: a constant, and the warm-ups in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WARMUPS = (None, "power", "ratio", "debias", "karras")


@dataclass(frozen=True)
class EmaDecay:
    """The decay of each update of an average. The first update copies the weights whatever the decay: its decay is 0.

    With t updates done before, t >= 1:

    ========== ============================================== =====================================================
    warmup     decay
    ========== ============================================== =====================================================
    None       value
    "power"    1 - (1 + t / gamma) ** -power                  at most value; timm, ema-pytorch, diffusers
    "ratio"    (1 + t) / (10 + t)                             at most value; diffusers' default, torch-ema
    "debias"   1 - (1 - value) / (1 - value ** (t + 1))       the average that starts at zero, over the sum of its
                                                              weights: optax, Adam's moments
    "karras"   (1 - 1 / (t + 1)) ** (1 + gamma)               at most value: a profile that widens with the training,
                                                              of T. Karras et al., CVPR 2024, arXiv:2312.02696
    ========== ============================================== =====================================================

    Args:
        value: in [0, 1].
        gamma: above 0; with "karras" above -1.
        power: above 0.
        minimum: of the decay from the second update on, in [0, 1].

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """

    value: float = 0.999
    warmup: str | None = None
    gamma: float = 1.0
    power: float = 2 / 3
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup not in WARMUPS:
            raise ValueError(f"warmup must be one of {', '.join(map(repr, WARMUPS))}, got {self.warmup!r}")
        for name in ("value", "minimum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"a decay's {name} must be in [0, 1], got {getattr(self, name)}")
        least = -1 if self.warmup == "karras" else 0
        if not self.gamma > least:
            raise ValueError(f"a decay's gamma must be above {least}, got {self.gamma}")
        if not self.power > 0:
            raise ValueError(f"a decay's power must be above 0, got {self.power}")

    @classmethod
    def karras(cls, gamma: float | None = None, *, width: float | None = None) -> EmaDecay:
        """The power profile, by its exponent or by its width: the standard deviation relative to the training's length.

        Raises:
            ValueError: not exactly one of the two is given, or ``width`` is not in (0, 0.288): 1 / sqrt(12) is the
                width of a plain mean.
        """
        if (gamma is None) == (width is None):
            raise ValueError("give either gamma or width")
        if gamma is not None:
            return cls(1.0, "karras", gamma)
        if width is None or not 0 < width < 12**-0.5:
            raise ValueError(f"width must be in (0, {12**-0.5:.3f}), got {width}")
        t = width**-2  # width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
        return cls(1.0, "karras", float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))

    def at(self, count: int) -> float:
        """The decay of the next update after ``count`` of them."""
        if count == 0:
            return 0.0
        if self.warmup is None:
            return max(self.value, self.minimum)
        return max(self.minimum, min(self.value, self._growing(count)))

    def _growing(self, t: int) -> float:
        if self.warmup == "power":
            return float(1 - (1 + t / self.gamma) ** -self.power)
        if self.warmup == "ratio":
            return (1 + t) / (10 + t)
        if self.warmup == "karras":
            return float((1 - 1 / (t + 1)) ** (1 + self.gamma))
        if self.value in (0.0, 1.0):
            return 1 - 1 / (t + 1) if self.value else 0.0
        total = -math.expm1((t + 1) * math.log(self.value))  # 1 - value ** (t + 1)
        return 1 - (1 - self.value) / total
