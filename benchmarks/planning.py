"""How long the plan of a huge corpus takes, and in how much memory.

    python -m benchmarks.planning [--inputs 100000000] [--work DIR]

Writes a Parquet file and then a TSV of as many rows (a path and a caption; no images),
plans each in a process of its own by the calls that `python -m pipeline.preprocess`
makes, prints what that took, and deletes the file. The peak memory of a process that
only opened the corpus stands beside it. Owns no code that the pipeline uses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.photos import caption
from pipeline.describe import open_corpora
from pipeline.options import PreprocessConfig
from pipeline.plan import make_plan

_ROOT = Path(__file__).resolve().parents[1]
_ROWS = 1 << 18
_CAPTIONS = 10_000
_SCHEMA = pa.schema([("path", pa.string()), ("caption", pa.string())])


def batches(inputs: int) -> Iterator[pa.RecordBatch]:
    """Rows of a corpus: paths in order, captions as people write them."""
    texts = pa.array([caption(number) for number in range(_CAPTIONS)])
    for start in range(0, inputs, _ROWS):
        numbers = np.arange(start, min(start + _ROWS, inputs))
        digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0")
        paths = pc.binary_join_element_wise(
            "images", pc.utf8_slice_codeunits(digits, 0, 5), digits, "/"
        )
        names = pc.binary_join_element_wise(paths, "jpg", ".")
        picked = texts.take(pa.array(numbers * 7919 % _CAPTIONS))
        yield pa.RecordBatch.from_arrays([names, picked], schema=_SCHEMA)


def write_parquet(path: Path, inputs: int) -> None:
    """The corpus as Parquet, a row group for each batch."""
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        for batch in batches(inputs):
            writer.write_batch(batch)


def write_tsv(path: Path, inputs: int) -> None:
    """The corpus as TSV with a header line."""
    rows = pyarrow.csv.WriteOptions(
        include_header=False, delimiter="\t", quoting_style="none"
    )
    with path.open("wb") as file:
        file.write(b"path\tcaption\n")
        for batch in batches(inputs):
            pyarrow.csv.write_csv(batch, file, rows)


FORMATS: dict[str, Callable[[Path, int], None]] = {
    "parquet": write_parquet,
    "tsv": write_tsv,
}


def measure_all(work: Path, inputs: int) -> dict[str, Any]:
    """Figures of every format."""
    figures = {}
    for kind, write in FORMATS.items():
        path = work / f"planned.{kind}"
        try:
            write(path, inputs)
            figures[kind] = {"bytes": path.stat().st_size, **_in_child(path)}
        finally:
            path.unlink(missing_ok=True)
        print_line(kind, figures[kind])
    return figures


def print_line(kind: str, one: dict[str, Any]) -> None:
    """The figures of one format, for people."""
    rate = one["inputs"] / one["plan_seconds"]
    print(
        f"planning {one['inputs']:,} inputs ({kind}, {one['bytes'] / 1e9:.2f} GB): "
        f"{one['plan_seconds']:.1f} s ({rate / 1e6:.2f} M/s; CPU "
        f"{one['plan_cpu_seconds']:.1f} s), fingerprint "
        f"{one['fingerprint_seconds']:.1f} s, {one['ranges']:,} ranges, peak "
        f"{one['peak_bytes'] / 1e6:.0f} MB ({one['opened_bytes'] / 1e6:.0f} MB when "
        "opened)",
        flush=True,
    )


def plan(path: Path) -> dict[str, Any]:
    """Plan a corpus in this process."""
    config = PreprocessConfig(input=str(path), output=str(path.with_name("out")))
    corpora = open_corpora(config)
    opened, start, cpu = _peak(), time.perf_counter(), time.process_time()
    made = make_plan(corpora, samples=config.shard.samples, limit=None)
    planned, cpu = time.perf_counter(), time.process_time() - cpu
    corpora[0].given.fingerprint()
    return {
        "inputs": made.n_inputs,
        "ranges": made.n_ranges,
        "plan_seconds": planned - start,
        "plan_cpu_seconds": cpu,
        "fingerprint_seconds": time.perf_counter() - planned,
        "opened_bytes": opened,
        "peak_bytes": _peak(),
    }


def _in_child(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.planning", "--plan", str(path)]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _peak() -> int:
    # Not that of getrusage, which the process before `exec` takes part in.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.plan:
        json.dump(plan(given.plan), sys.stdout)
        return
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        measure_all(Path(folder), given.inputs)


if __name__ == "__main__":
    main()
