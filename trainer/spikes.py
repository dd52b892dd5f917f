"""Spikes of a loss: how far it stands above its own recent past.

Owns the running statistics and when a loss counts as a spike. Does not own what is done
about one (`trainer.safety`). Everything here is a pure function of the losses so far,
in a handful of numbers, so that a resumed run judges as the undisturbed one would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# A rise of less than this share of the mean is noise, however quiet the loss has been.
_QUIETEST = 0.01


@dataclass(frozen=True, kw_only=True)
class Level:
    """Where a loss has been: exponentially weighted mean and variance."""

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    """Losses that it is made of."""

    def rise(self, loss: float) -> float:
        """Standard deviations that `loss` lies above the mean; negative below it."""
        return (loss - self.mean) / self._deviation

    def is_spike(self, loss: float, *, window: int, threshold: float) -> bool:
        """Whether it lies more than `threshold` deviations above; never before
        `window` losses are known.
        """
        return self.seen >= window and self.rise(loss) > threshold

    def after(self, loss: float, *, window: int, threshold: float) -> Level:
        """With one more loss, weighted as the newest of about `window`.

        A spike counts as one at the threshold: it hardly hides the next one, and a loss
        that stays high is the new level in the end. A loss of 0 is one of nothing
        masked and does not count.
        """
        if loss == 0:
            return self
        if self.is_spike(loss, window=window, threshold=threshold):
            loss = self.mean + threshold * self._deviation
        # At first a plain average of what there is.
        share = max(2 / (window + 1), 1 / (self.seen + 1))
        away = loss - self.mean
        return Level(
            mean=self.mean + share * away,
            variance=(1 - share) * (self.variance + share * away * away),
            seen=min(self.seen + 1, window),
        )

    @property
    def _deviation(self) -> float:
        return max(math.sqrt(self.variance), _QUIETEST * abs(self.mean))
