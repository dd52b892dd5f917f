"""One contender of `benchmarks.loader`, in a process of its own; JSON on the last line.

Owns the clock: time to the first batch from construction on (imports before), batches a
second after a warm-up, the most memory that all processes were seen to have, and the
time to the first batch of a loader that resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.loader_ours import OURS
from benchmarks.loader_peers import BATCH, PEERS, Where

_MIB = 1 << 20
# Times that memory is looked at after the clock has stopped, a batch apart.
_LOOKS = 20


def contenders() -> dict[str, Any]:
    """Everybody, by name."""
    return OURS | PEERS


def measure(name: str, where: Where, *, warm: int, batches: int) -> dict[str, float]:
    """First batch in seconds, since construction and since the process began; images a
    second; the most memory that it was seen to have, in MiB.
    """
    _import(name)
    begun = time.perf_counter()
    source, _ = contenders()[name](where, None)
    next(source)
    first = time.perf_counter() - begun
    start = time.time() - psutil.Process().create_time()
    memory = [_memory()]
    for _ in range(warm):
        _take(source, 1)
        memory.append(_memory())
    begun = time.perf_counter()
    _take(source, batches)
    took = time.perf_counter() - begun
    # Looking takes time of those that load, so not before the clock has stopped.
    for _ in range(_LOOKS):
        memory.append(_memory())
        _take(source, 1)
    return {
        "first_s": first,
        "start_s": start,
        "images_s": batches * BATCH / took,
        "peak_mib": max(memory),
    }


def save(name: str, where: Where, *, after: int, file: Path) -> dict[str, int]:
    """Write the state after some batches to a file; the digest of the batch that
    follows them.
    """
    source, state_of = contenders()[name](where, None)
    if state_of is None:
        raise NotImplementedError("has no state to resume from")
    _take(source, after)
    file.write_bytes(pickle.dumps(state_of()))
    return {"digest": _digest(next(source))}


def resume(name: str, where: Where, *, file: Path) -> dict[str, float]:
    """Seconds from the construction of a loader that goes on from a state to the first
    batch that it gives, and the digest of that batch.
    """
    _import(name)
    state = pickle.loads(file.read_bytes())
    begun = time.perf_counter()
    source, _ = contenders()[name](where, state)
    batch = next(source)
    return {"resume_s": time.perf_counter() - begun, "digest": _digest(batch)}


def _digest(batch: Any) -> int:
    """Of the images of a batch, in any order."""
    if isinstance(batch, tuple | list):
        images = batch[0]
    else:
        (images,) = (
            micro.pixels for micro in getattr(batch, "micro_batches", None) or [batch]
        )
    return sum(zlib.crc32(np.ascontiguousarray(image)) for image in images)


def _take(source: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(source)


def _import(name: str) -> None:
    """What a contender imports, so that it is not timed."""
    modules = {
        "webdataset": "webdataset",
        "MosaicML": "streaming",
        "LitData": "litdata",
        "HF": "datasets",
        "Energon": "megatron.energon",
        "Palimpsest": "trainer.loader",
    }
    __import__("torch.utils.data")
    word = name.split(maxsplit=1)[0].strip(",")
    if word in modules:
        __import__(modules[word])


def _memory() -> float:
    """MiB of this process and its children, shared pages counted once."""
    me = psutil.Process()
    found = 0
    for process in (me, *me.children(recursive=True)):
        try:
            found += process.memory_full_info().pss
        except psutil.Error:
            continue
    return found / _MIB


def main() -> None:
    """Measure the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--formats", type=Path, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--bucket")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--after", type=int, help="batches before --save")
    parser.add_argument("--save", type=Path, help="file for the state")
    parser.add_argument("--resume", type=Path, help="file with the state")
    given = parser.parse_args()
    where = Where(
        dataset=given.dataset,
        formats=given.formats,
        side=given.side,
        bucket=given.bucket,
        scratch=given.scratch,
    )
    try:
        if given.save:
            found: dict[str, Any] = save(
                given.name, where, after=given.after, file=given.save
            )
        elif given.resume:
            found = resume(given.name, where, file=given.resume)
        else:
            found = measure(given.name, where, warm=given.warm, batches=given.batches)
    except Exception as error:  # a peer that fails is a result, not the end
        found = {"error": f"{type(error).__name__}: {error}"[-600:]}
    print(f"\n{json.dumps(found)}", flush=True)
    # Some leave threads and processes that would not end.
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
