"""Multinomial logistic regression with an L2 penalty, as linear probes use it.

Owns the fit and the choice of the penalty. Does not own features or labels
(`trainer.tasks.linear_probe`).

The problem is convex, so L-BFGS in fp64 gives the same weights to many digits whatever
the machine. Features are standardised on the rows that are fitted.

Shapes: N rows, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_STEPS = 500
_GRADIENT_AT_END = 1e-6


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A fitted one."""

    mean: Tensor
    """(D,) of the features it was fitted on."""
    scale: Tensor
    """(D,) what they are divided by."""
    weight: Tensor
    """(K, D)."""
    bias: Tensor
    """(K,)."""

    def logits(self, features_nd: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, K)."""
        x = (torch.from_numpy(features_nd).double() - self.mean) / self.scale
        return F.linear(x, self.weight, self.bias).numpy()


def fit(
    features_nd: np.ndarray, labels: np.ndarray, *, classes: int, l2: float
) -> Classifier:
    """Minimise the mean cross-entropy plus l2 / 2 times the sum of squared weights;
    biases are free.

    Args:
        labels: (N,) int64 below `classes`.
    """
    features = torch.from_numpy(features_nd).double()
    mean = features.mean(0)
    scale = features.std(0, correction=0)
    # A feature that never changes says nothing.
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    x, y = (features - mean) / scale, torch.from_numpy(labels)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MOST_STEPS,
        history_size=20,
        tolerance_grad=_GRADIENT_AT_END,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        penalty = l2 / 2 * weight.square().sum()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + penalty
        value.backward()
        return value

    solver.step(loss)
    return Classifier(
        mean=mean, scale=scale, weight=weight.detach(), bias=bias.detach()
    )


def choose_l2(
    features_nd: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    *,
    classes: int,
    penalties: Sequence[float],
) -> tuple[float, dict[float, float]]:
    """The penalty with the lowest cross-entropy on `held_out` (N,) rows when fitted on
    the others (of equal ones the largest), and the cross-entropy of each.
    """
    tried = {}
    for l2 in penalties:
        found = fit(features_nd[~held_out], labels[~held_out], classes=classes, l2=l2)
        logits = torch.from_numpy(found.logits(features_nd[held_out]))
        tried[l2] = float(F.cross_entropy(logits, torch.from_numpy(labels[held_out])))
    return min(tried, key=lambda l2: (tried[l2], -l2)), tried
