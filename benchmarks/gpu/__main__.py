"""`python -m benchmarks.gpu PART ...`: the measurements that need a GPU, in parts."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.kernels import checks, times
from benchmarks.gpu.peers import baselines
from benchmarks.gpu.precision import precision
from benchmarks.gpu.profile import profile
from benchmarks.gpu.real_run import real_run
from benchmarks.gpu.record import RESULTS, OutOfTime, Record, Setting
from benchmarks.gpu.steps import ablation, steps
from benchmarks.gpu.syncs import syncs

PARTS: dict[str, Callable[[Setting, Record], None]] = {
    "checks": checks,
    "syncs": syncs,
    "kernels": times,
    "steps": steps,
    "profile": profile,
    "ablation": ablation,
    "baselines": baselines,
    "precision": precision,
    "real_run": real_run,
}
_KERNELS = {"checks", "kernels"}
_REHEARSE = "TRITON_INTERPRET=1 and --device cpu --tiny --output DIR"
FAILED, UNFINISHED = 1, 75
"""Exit statuses: an entry failed; the time was over, the same command goes on."""


def main(argv: Sequence[str]) -> int:
    """Run parts one after another; the exit status."""
    parser = _parser()
    words = parser.parse_args(argv)
    if words.in_order and not words.only:
        parser.error("--in-order is an order of --only TEXT: give at least one")
    if words.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is to be seen: rehearse with", _REHEARSE, file=sys.stderr)
        return FAILED
    # Kernels run in Triton's interpreter or not, from their import on.
    can = os.environ.get("TRITON_INTERPRET") == "1" or not _KERNELS & {*words.parts}
    if words.device == "cpu" and not (words.tiny and words.output and can):
        print("a rehearsal measures nothing and needs", _REHEARSE, file=sys.stderr)
        return FAILED
    setting = Setting(
        device=torch.device(words.device, 0 if words.device == "cuda" else None),
        tiny=words.tiny,
        output=words.output or RESULTS,
        data=words.data,
        again=words.again,
        only=tuple(words.only),
        seconds=words.seconds,
        words=tuple(argv),
    )
    try:
        records = {part: Record(setting, part) for part in words.parts}
    except ValueError as error:
        print(error, file=sys.stderr)
        return FAILED
    turns = [setting.only]
    if words.in_order:
        turns = [(text,) for text in setting.only]
        for record in records.values():
            record.begin()
    status = 0
    for only, part in itertools.product(turns, words.parts):
        record = records[part]
        record.setting = dataclasses.replace(setting, only=only)
        try:
            PARTS[part](record.setting, record)
        except OutOfTime as stopped:
            print(stopped)
            status = UNFINISHED
            if words.in_order:
                break
        except ValueError as error:
            print(f"{part}: {error}", file=sys.stderr)
            return FAILED
    for part, record in records.items():
        if record.failed:
            print(f"{part}: failed: {'; '.join(record.failed)}")
            status = FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS], metavar="PART")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    parser.add_argument("--output", type=Path, help=f"where PART.json is ({RESULTS})")
    parser.add_argument("--data", help="dataset directory of shards")
    parser.add_argument("--again", action="store_true", help="measure all anew")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="no entries but those with this in their key, or with another's",
    )
    parser.add_argument(
        "--in-order",
        action="store_true",
        help="one --only after the other, of all parts each: where time is short",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=420.0,
        help="a part begins no entry after these; with --in-order the call",
    )
    return parser


if __name__ == "__main__":
    given = sys.argv[1:]
    # torch.compile writes what follows an "--only" there, which it takes for the name
    # of a benchmark of its own, between quotes into the code that it makes.
    del sys.argv[1:]
    sys.exit(main(given))
