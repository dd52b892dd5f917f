"""How long device work takes, and what the device could do at best.

Owns the clock and the two ceilings. Does not own what is timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.record import Setting

_WARMUP_MS, _REPEAT_MS = 25, 100
_COPY_BYTES, _GEMM_SIDE = 4 << 30, 8192
_TINY_BYTES, _TINY_SIDE = 1 << 20, 64
_MOST_SETS = 16


def median_seconds(run: Callable[[], object], setting: Setting) -> float:
    """Median time of `run`, by events on the device; the L2 cache is flushed between
    two calls (`triton.testing.do_bench`). On a CPU of three calls, for a rehearsal.
    """
    if setting.cuda:
        from triton.testing import do_bench

        milliseconds = do_bench(
            run, warmup=_WARMUP_MS, rep=_REPEAT_MS, return_mode="median"
        )
        return float(milliseconds) / 1e3
    return statistics.median(_wall_seconds(run) for _ in range(3))


def graph_seconds(run: Callable[[], object], setting: Setting) -> float | None:
    """Median time of `run` replayed from a CUDA graph, without what launches cost the
    host; None where it cannot be captured.
    """
    if not setting.cuda:
        return None
    from triton.testing import do_bench_cudagraph

    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            found = do_bench_cudagraph(run, rep=_REPEAT_MS, return_mode="median")
        return float(found) / 1e3
    except RuntimeError:
        return None


def rotating(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]
) -> Callable[[], Any]:
    """`function` on each of the input sets in turn, so that none is in a cache."""
    turn = itertools.cycle(sets)
    return lambda: function(*next(turn))


def sets_needed(bytes_of_one: int, setting: Setting) -> int:
    """How many input sets are together more than twice the L2 cache."""
    if not setting.cuda:
        return 2
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    return min(max(2, 2 * cache // max(bytes_of_one, 1) + 1), _MOST_SETS)


def ceilings(setting: Setting) -> dict[str, Any]:
    """Bytes/s of a large copy, read and written ones counted, and FLOP/s of a large
    bf16 matrix product: what shares are of.
    """
    size = _COPY_BYTES if setting.cuda else _TINY_BYTES
    side = _GEMM_SIDE if setting.cuda else _TINY_SIDE
    copied = _copy_seconds(size, setting)
    multiplied = _product_seconds(side, setting)
    return {
        "copy_bytes": size,
        "copy_bytes_per_s": 2 * size / copied,
        "gemm_side": side,
        "gemm_flops_per_s": 2 * side**3 / multiplied,
    }


def _copy_seconds(size: int, setting: Setting) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), setting)


def _product_seconds(side: int, setting: Setting) -> float:
    # Not zeros, which multiply faster.
    a, b = (
        torch.randn(side, side, device=setting.device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    return median_seconds(lambda: a @ b, setting)


def tensor_bytes(values: object) -> int:
    """Bytes of all tensors of nested arguments."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def _wall_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
