"""What a step came to is read as it was, whatever is queued behind it."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.update import Result

SUMS = (0.5, float("nan"), 3.0)


def same(result: Result, norm: float) -> bool:
    return repr(result.read()) == repr(([*SUMS], norm))


def test_a_result_is_of_the_moment_in_which_it_was_asked_for() -> None:
    sums, norm = torch.tensor(SUMS), torch.tensor(2.0)
    result = Result(sums, norm)
    sums.zero_()
    norm.zero_()
    assert same(result, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_result_is_there_before_what_is_queued_behind_it() -> None:
    sums = torch.tensor(SUMS, device="cuda")
    norms = torch.arange(5, device="cuda").float()
    second = 2_000_000_000
    # Pinned memory is made once, and that waits.
    Result(sums, norms[0]).read()
    torch.cuda.synchronize()
    for number in range(1, 5):
        began = time.perf_counter()
        result = Result(sums, norms[number])
        torch.cuda._sleep(second)
        queued = time.perf_counter() - began
        assert same(result, float(number))
        read = time.perf_counter() - began
        torch.cuda.synchronize()
        ended = time.perf_counter() - began
        assert max(queued, read) < ended / 2
