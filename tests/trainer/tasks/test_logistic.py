"""A linear probe is the optimum of its problem."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.tasks.logistic import choose_l2, fit

GENERATOR = np.random.Generator(np.random.Philox(key=2))
CLASSES, ROWS, WIDTH = 4, 400, 12
CENTRES = GENERATOR.normal(0, 1, (CLASSES, WIDTH))
LABELS = GENERATOR.integers(0, CLASSES, ROWS)
FEATURES = CENTRES[LABELS] + GENERATOR.normal(0, 1.5, (ROWS, WIDTH))


def test_the_gradient_at_the_solution_is_nothing() -> None:
    l2 = 0.03
    found = fit(FEATURES, LABELS, classes=CLASSES, l2=l2)
    logits = found.logits(FEATURES)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    wrong = (shares - np.eye(CLASSES)[LABELS]) / ROWS
    x = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0)
    assert np.abs(wrong.sum(0)).max() < 1e-5
    assert np.abs(wrong.T @ x + l2 * found.weight.numpy()).max() < 1e-5


def test_the_penalty_is_that_which_generalises() -> None:
    # Far more features than rows say anything about: little penalty learns them all.
    noise = GENERATOR.normal(0, 1, (ROWS, 300))
    features = np.concatenate([FEATURES, noise], axis=1)
    held_out = np.arange(ROWS) % 4 == 0
    best, tried = choose_l2(
        features,
        LABELS,
        held_out,
        classes=CLASSES,
        penalties=(1e-6, 1e-2, 1e-1, 1e6),
    )
    assert best in (1e-2, 1e-1)
    assert tried[best] < min(tried[1e-6], tried[1e6])
    assert tried[1e6] == pytest.approx(np.log(CLASSES), abs=0.02)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    features = np.concatenate([FEATURES, np.full((ROWS, 1), 7.0)], axis=1)
    with_it = fit(features, LABELS, classes=CLASSES, l2=0.1).logits(features)
    without = fit(FEATURES, LABELS, classes=CLASSES, l2=0.1).logits(FEATURES)
    assert with_it == pytest.approx(without, abs=1e-5)
