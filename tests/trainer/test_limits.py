"""The verdict names what limits a run, and what to do about it."""

from __future__ import annotations

import pytest

from trainer.limits import Spent, verdict


@pytest.mark.parametrize(
    ("spent", "says"),
    [
        (
            Spent(elapsed=10, waited=0.1, decode=19),
            "compute limits the run: the device",
        ),
        (Spent(elapsed=10, waited=4, read=2, decode=17), "decode limits the run"),
        (Spent(elapsed=10, waited=4, read=15, decode=3), "storage limits the run"),
        (Spent(elapsed=10, waited=4, decode=3, copy=6), "copy limits the run"),
    ],
)
def test_what_is_busiest_while_the_device_waits_is_named(
    spent: Spent, says: str
) -> None:
    line = verdict(spent, threads=2)
    assert line.startswith(says)
    assert "\n" not in line
    share = spent.waited / spent.elapsed
    assert f"waited {share:.1%} of the time" in line


def test_several_ranks_count_together() -> None:
    one = Spent(elapsed=5, waited=2, read=1, decode=9, copy=0)
    together = one + one + one + one
    assert together.elapsed == 20
    assert verdict(together, threads=2) == verdict(one, threads=2)
