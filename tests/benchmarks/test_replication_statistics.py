"""Paired tests against textbook computations, and what they say of a claim."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.replication.statistics import (
    Difference,
    Measure,
    paired_bootstrap,
    paired_t,
    seeds_needed,
    student_p,
    student_t,
    verdict,
)

# "Student", "The probable error of a mean", Biometrika 1908: additional hours of sleep
# by two drugs, ten patients.
_FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
_SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_paired_t_of_students_sleep_data() -> None:
    found = paired_t(_SECOND, _FIRST)
    assert found
    assert found.mean == pytest.approx(1.58)
    # t = 4.0621, 9 degrees of freedom.
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.ci95 == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.n == 10


@pytest.mark.parametrize(
    ("dof", "t"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (30, 2.042272)]
)
def test_quantiles_of_students_t_are_those_of_the_tables(dof: int, t: float) -> None:
    assert student_t(0.05, dof) == pytest.approx(t, abs=1e-6)
    assert student_p(t, dof) == pytest.approx(0.05, abs=1e-7)


def test_student_p_is_the_share_of_drawn_t_that_lies_further_out() -> None:
    generator = np.random.default_rng(0)
    for dof in (1, 2, 5, 8):
        drawn = np.abs(generator.standard_t(dof, 200_000))
        for t in (0.0, 0.5, 2.0):
            assert student_p(t, dof) == pytest.approx(np.mean(drawn > t), abs=5e-3)


def test_seeds_without_a_spread_say_nothing() -> None:
    assert paired_t([0.5, 0.6], [0.5, 0.6]) is None
    assert paired_t([0.5, 0.6], [0.4, 0.5]) is None
    with pytest.raises(ValueError, match="two seeds or more"):
        paired_t([0.5], [0.4])


def mean_of(values: np.ndarray) -> Measure:
    return lambda taken: float(taken @ values / taken.sum())


def test_bootstrap_of_a_mean_is_close_to_its_standard_error() -> None:
    generator = np.random.default_rng(2)
    ours, theirs = generator.normal(0.1, 1, 2000), generator.normal(0, 1, 2000)
    found = paired_bootstrap([mean_of(ours)], [mean_of(theirs)], np.arange(2000))
    error = np.std(ours - theirs, ddof=1) / np.sqrt(2000)
    assert found.mean == pytest.approx(np.mean(ours - theirs))
    low, high = found.ci95
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_items_of_a_group_are_no_independent_evidence() -> None:
    generator = np.random.default_rng(3)
    one = generator.normal(0.2, 1, 50)
    many, groups = np.repeat(one, 20), np.repeat(np.arange(50), 20)
    nothing = mean_of(np.zeros(len(many)))
    together = paired_bootstrap([mean_of(many)], [nothing], groups)
    alone = paired_bootstrap([mean_of(many)], [nothing], np.arange(len(many)))
    width = together.ci95[1] - together.ci95[0]
    assert width > 3 * (alone.ci95[1] - alone.ci95[0])


def test_seeds_that_a_difference_would_take() -> None:
    # A textbook's one-sample size for 80 % power at an effect of one standard
    # deviation is 10; the approximation by t is one short of it at most.
    spread = np.array([-1.0, 1.0]) / np.sqrt(2)
    assert seeds_needed(1 + spread, np.zeros(2)) in (9, 10, 11)
    assert seeds_needed([0.5, -0.5], [0.0, 0.0]) is None


def difference(low: float, high: float) -> Difference:
    return Difference((low + high) / 2, (low, high), 0.01, 3)


@pytest.mark.parametrize(
    ("says", "seeds", "items", "begins"),
    [
        ("higher", (0.1, 0.3), (0.05, 0.35), "agrees"),
        ("higher", (-0.3, -0.1), (-0.35, -0.05), "disagrees"),
        ("lower", (-0.3, -0.1), None, "agrees"),
        ("higher", (-0.1, 0.3), (0.05, 0.35), "not enough seeds"),
        ("higher", (0.1, 0.3), (-0.05, 0.35), "not enough test items"),
        ("same", (-0.01, 0.02), (-0.01, 0.02), "agrees"),
        ("same", (0.1, 0.3), (0.1, 0.3), "disagrees"),
        ("same", (-0.1, 0.3), (0.1, 0.3), "not enough seeds"),
        ("same", (0.01, 0.06), (0.01, 0.06), "not enough seeds"),
    ],
)
def test_a_claim_is_answered_only_where_both_intervals_say_so(
    says: str,
    seeds: tuple[float, float],
    items: tuple[float, float] | None,
    begins: str,
) -> None:
    found = verdict(
        says,  # type: ignore[arg-type]
        margin=0.05,
        seeds=difference(*seeds),
        items=difference(*items) if items else None,
    )
    assert found.startswith(begins)


def test_one_seed_says_nothing() -> None:
    assert verdict("higher", margin=0, seeds=None, items=None).startswith(
        "not enough seeds"
    )
