"""How fast photos and token ids reach a trainer, beside other loaders and the limit.

    python -m benchmarks.loader --data DATASET ... --peers PYTHON --work DIR

DATASET is one that `python -m benchmarks.loader_data` made: squares of one size. The
same JPEG bytes and ids are given to each loader in its own format, and the contenders
take turns, each in a process of its own on the same cores: batches of 128 uint8 images
with the ids of each, shuffled, two workers. What counts is the median over the rounds,
of rates and of each round's ratios.

Everything is read once before, so that all find it in the page cache; `cold` is the
rate of one run of each, within an epoch, before which the page cache has dropped all
files.

The limit is two threads decoding JPEGs that lie in memory into a preallocated batch,
chunk by chunk. `--rounds`, `--batches` and `--warm` say how long. `--s3` measures all
of it against an S3 server on loopback too, which is itself the limit there; every
process finds an empty cache, also one that resumes, as on another machine. `--s3 only`
leaves the disk out.

PYTHON is the interpreter of an environment with `benchmarks/requirements-loaders.txt`
(benchmarks/README.md says how to make it). Results go to `benchmarks/results/
loader.json`.

Owns the order of runs, and what is made of their figures. Does not own the contenders
(`benchmarks.loader_ours`, `benchmarks.loader_peers`), the clock (`benchmarks.
loader_run`) or the formats (`benchmarks.loader_data`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import botocore.config

from benchmarks.loader_data import ROOT, check_squares, make_format
from benchmarks.loader_ours import OURS
from benchmarks.loader_peers import BATCH, NEEDS, PEERS
from pipeline.manifest import load_manifest
from trainer.folder import in_page_cache

RESULTS = ROOT / "benchmarks" / "results" / "loader.json"
_MOST_SECONDS = 240
_OURS, _DOCUMENTED, _LIMIT = "Palimpsest", "webdataset", "limit"
_TARGETS = {"of_webdataset": 2.7, "of_fastest": 1.8, "of_limit": 0.9}
# Not compared: they do more than the peers do.
_APART = ("Palimpsest, crops", "Palimpsest, masks", "limit, crops")
# Share of the files that the page cache may keep when it is asked to drop them.
_MOST_KEPT = 0.02
# Decode what lies in memory, and read nothing.
_IN_MEMORY = (_LIMIT, "limit, crops")

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Remote:
    """Where contenders read from, if not from the disk."""

    bucket: str
    scratch: Path
    """For what they cache; empty when a contender begins."""
    environment: Mapping[str, str]


class Bench:
    """All runs over one dataset."""

    def __init__(self, given: argparse.Namespace, dataset: Path) -> None:
        self._given, self._dataset = given, dataset.resolve()
        self.side = check_squares(self._dataset)
        self._formats = given.work.resolve() / f"formats-{self._dataset.name}"
        self._cores = sorted(os.sched_getaffinity(0))[: given.cores]
        self._remote: _Remote | None = None
        for name in dict.fromkeys(NEEDS.values()):
            make_format(name, self._dataset, self._formats, given.peers)

    def measure(self) -> dict[str, Any]:
        """Figures of every contender: medians, and the spread of the rates."""
        _read(self._files())
        found = self._rounds([*OURS, *PEERS])
        figures, runs = found["contenders"], found.pop("runs")
        for name in figures:
            if name not in _IN_MEMORY:
                figures[name] |= self._cold(name)
        return {"side": self.side, **found, "ratios": ratios_of_rounds(runs)}

    def _rounds(self, names: Sequence[str]) -> dict[str, Any]:
        """Figures of contenders that take turns, and `runs`, of each round."""
        runs: dict[str, list[Figures]] = {name: [] for name in names}
        errors: dict[str, str] = {}
        for number in range(self._given.rounds):
            for name in names:
                if name in errors:
                    continue
                found = self._run(name)
                if "error" in found:
                    errors[name] = str(found["error"])
                else:
                    runs[name].append(found)
            print(f"  round {number + 1} of {self._given.rounds} done", flush=True)
        figures = {name: _medians(found) for name, found in runs.items() if found}
        for name, resumed in self._resumed(figures).items():
            figures[name] |= resumed
        return {
            "contenders": figures,
            "errors": errors,
            "rates": {
                name: [round(run["images_s"], 1) for run in found]
                for name, found in runs.items()
            },
            # More than the cores means that others were at work.
            "load_average": os.getloadavg(),
            "runs": runs,
        }

    def _files(self) -> list[Path]:
        """All that contenders read."""
        folders = (self._dataset, self._formats)
        return [
            path for one in folders for path in sorted(one.rglob("*")) if path.is_file()
        ]

    def _cold(self, name: str) -> dict[str, Any]:
        """Images a second, and seconds to the first batch, of a contender whose files
        the page cache has dropped. It takes no sample twice.
        """
        files = self._files()
        # The disk may have a cache of its own: without this, who comes first fills it.
        _evicted(files)
        _read(files)
        kept = _evicted(files)
        if kept > _MOST_KEPT:
            return {"cold_error": f"the page cache kept {kept:.0%} of the files"}
        given = self._given
        shards = load_manifest(self._dataset).split("train")
        within = sum(shard.samples for shard in shards) // BATCH - given.warm - 1
        found = self._run(name, f"--batches={min(given.batches, within)}")
        if "error" in found:
            return {"cold_error": found["error"]}
        return {f"cold_{key}": found[key] for key in ("images_s", "first_s")}

    def over_s3(self) -> dict[str, Any]:
        """The same against an S3 server on loopback, from empty caches."""
        names = [name for name in (*OURS, *PEERS) if name not in _IN_MEMORY]
        with (
            _bucket(self._dataset, self._formats) as (bucket, environment),
            _multi_storage(bucket, environment) as multi_storage,
        ):
            self._remote = _Remote(
                bucket=bucket,
                scratch=self._given.work.resolve() / "scratch",
                environment={**environment, **multi_storage},
            )
            try:
                found = self._rounds(names)
            finally:
                self._remote = None
        del found["runs"]
        return {"side": self.side, **found}

    def _resumed(self, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
        """Of those that have a state: it is saved by one process and loaded by others,
        once in each round.
        """
        resumed: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                file = f"{folder}/state"
                saved = self._saved(name, file)
                if "NotImplementedError" in str(saved.get("error")):
                    continue
                found = [] if "error" in saved else self._loaded(name, file)
                errors = [one["error"] for one in (saved, *found) if "error" in one]
                if errors:
                    resumed[name] = {"resume_error": errors[0].splitlines()[-1]}
                    continue
                resumed[name] = {
                    "resume_s": statistics.median(one["resume_s"] for one in found),
                    "same_batch": all(
                        one["digest"] == saved["digest"] for one in found
                    ),
                }
        return resumed

    def _saved(self, name: str, file: str) -> dict[str, Any]:
        words = (f"--save={file}", f"--after={self._given.resume_after}")
        saved = self._run(name, *words)
        # Once more for HF datasets: Python 3.11 now and then fails to parse the header
        # of an array there (SystemError, "AST constructor recursion depth mismatch").
        return self._run(name, *words) if "SystemError" in str(saved) else saved

    def _loaded(self, name: str, file: str) -> list[dict[str, Any]]:
        rounds = range(self._given.rounds)
        return [self._run(name, f"--resume={file}") for _ in rounds]

    def _run(self, name: str, *more: str) -> dict[str, Any]:
        """What a contender's process printed."""
        given, environment = self._given, {}
        if self._remote:
            environment, scratch = self._remote.environment, self._remote.scratch
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            more += (f"--bucket={self._remote.bucket}", f"--scratch={scratch}")
        command = [
            *(str(given.peers), "-m", "benchmarks.loader_run", name),
            *(f"--dataset={self._dataset}", f"--formats={self._formats}"),
            *(f"--side={self.side}", f"--warm={given.warm}"),
            *(f"--batches={given.batches}", *more),
        ]
        cores = ",".join(map(str, self._cores))
        try:
            done = subprocess.run(
                ["taskset", "--cpu-list", cores, *command],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=_MOST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {_MOST_SECONDS} s"}
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            return {"error": f"ended with {done.returncode} and no result"}
        return json.loads(lines[-1])


def ratios_of_rounds(runs: Mapping[str, Sequence[Figures]]) -> dict[str, float]:
    """Medians over the rounds of each round's own `ratios`: what a shared machine gives
    changes from minute to minute, and those of a round are measured in the same ones.
    """
    # Those who failed are in no later round.
    rounds = [
        ratios({name: found[number] for name, found in runs.items() if found[number:]})
        for number in range(min(len(runs[_OURS]), len(runs[_LIMIT])))
    ]
    names = dict.fromkeys(name for found in rounds for name in found)
    return {
        name: statistics.median(found[name] for found in rounds if name in found)
        for name in names
    }


def ratios(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Ours over webdataset as documented, the fastest peer, and the limit."""
    rates = {name: found["images_s"] for name, found in figures.items()}
    peers = {name: rate for name, rate in rates.items() if name in PEERS}
    found = {}
    if _DOCUMENTED in rates:
        found["of_webdataset"] = rates[_OURS] / rates[_DOCUMENTED]
    if peers:
        found["of_fastest"] = rates[_OURS] / max(peers.values())
    found["of_limit"] = rates[_OURS] / rates[_LIMIT]
    return found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures of one dataset, for people."""
    figures = found["contenders"]
    # Over S3 there is none.
    limit = figures[_LIMIT]["images_s"] if _LIMIT in figures else math.inf
    yield (
        f"{'':26}{'images/s':>9}{'spread':>8}{'of limit':>9}{'cold':>8}{'first':>8}"
        f"{'start':>8}{'resume':>10}{'peak':>9}"
    )
    for name, row in sorted(figures.items(), key=lambda one: -one[1]["images_s"]):
        resume = "failed" if "resume_error" in row else "cannot"
        if "resume_s" in row:
            resume = f"{row['resume_s']:.2f} s" + ("" if row["same_batch"] else " +")
        apart = " *" if name in _APART else ""
        of_limit = f"{row['images_s'] / limit:.1%}" if limit < math.inf else ""
        cold = "failed" if "cold_error" in row else ""
        if "cold_images_s" in row:
            cold = f"{row['cold_images_s']:,.0f}"
        yield (
            f"{name + apart:26}{row['images_s']:9,.0f}{row['spread']:8.1%}"
            f"{of_limit:>9}{cold:>8}{row['first_s']:6.2f} s"
            f"{row['start_s']:6.2f} s{resume:>10}{row['peak_mib']:5.0f} MiB"
        )
    for name, error in found["errors"].items():
        yield f"{name:26}not measured: {error.splitlines()[0][:90]}"
    yield "* does more than the peers do: not compared"
    yield "+ goes on with another batch than would have come"
    for name, ratio in found.get("ratios", {}).items():
        target = _TARGETS[name]
        verdict = "reached" if ratio >= target else "MISSED"
        yield f"{name.replace('_', ' '):26}{ratio:9.2f}   target {target}: {verdict}"


def _read(files: Sequence[Path]) -> None:
    for path in files:
        path.read_bytes()


def _evicted(files: Sequence[Path], *, tries: int = 10) -> float:
    """Have the page cache drop files; the share of them that it keeps, by a byte in the
    middle of each. Nobody else may have them open: a contender's processes need a
    moment to end.
    """
    # Of hard links one: to look at a byte has it read, and the next link finds it.
    stats = ((os.stat(path), path) for path in files)
    files = list({(one.st_dev, one.st_ino): path for one, path in stats}.values())
    kept = 1.0
    for _ in range(tries):
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = []
        for path in files:
            with path.open("rb") as file:
                found.append(in_page_cache(file.fileno(), path.stat().st_size // 2))
        kept = statistics.mean(found)
        if kept <= _MOST_KEPT:
            break
        time.sleep(1)
    return kept


def _medians(runs: Sequence[Figures]) -> Figures:
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    rates = [run["images_s"] for run in runs]
    return found | {"spread": (max(rates) - min(rates)) / found["images_s"]}


@contextmanager
def _bucket(dataset: Path, formats: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """URL of a bucket that holds both folders, and what clients need to find it."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, name = f"http://127.0.0.1:{port}", "loader"
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT_URL": url,
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
            config=botocore.config.Config(retries={"max_attempts": 20}),
        )
        client.create_bucket(Bucket=name)
        for part, folder in (("data", dataset), ("formats", formats)):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    key = f"{part}/{path.relative_to(folder)}"
                    client.upload_file(str(path), name, key)
        yield f"s3://{name}", environment
    finally:
        server.kill()
        server.wait()


@contextmanager
def _multi_storage(
    bucket: str, environment: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """What Energon's client needs to find the bucket, as its profile `loopback`."""
    provider = {
        "type": "s3",
        "options": {
            "base_path": bucket.removeprefix("s3://"),
            "endpoint_url": environment["AWS_ENDPOINT_URL"],
            "region_name": environment["AWS_DEFAULT_REGION"],
        },
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"profiles": {"loopback": {"storage_provider": provider}}}, file)
        file.flush()
        yield {"MSC_CONFIG": file.name}


def _versions(peers: Path) -> dict[str, str]:
    names = ("torch", "webdataset", "simplejpeg", "datasets", "crc32c", "numpy")
    found = {name: version(name) for name in names}
    listed = subprocess.run(
        [str(peers), "-m", "pip", "list", "--format=json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    wanted = ("mosaicml-streaming", "litdata", "megatron-energon", "torch")
    return found | {
        f"peers: {one['name']}": one["version"]
        for one in json.loads(listed.splitlines()[0])
        if one["name"] in wanted
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--peers", type=Path, required=True, help="their interpreter")
    parser.add_argument("--work", type=Path, required=True, help="for their formats")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=8, help="batches before the clock")
    parser.add_argument("--batches", type=int, default=60, help="batches timed")
    parser.add_argument("--resume_after", type=int, default=20, help="batches")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--s3",
        nargs="?",
        choices=("no", "too", "only"),
        default="no",
        const="too",
        help="against S3 on loopback too, or only",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.loader --data DATASET --peers PYTHON "
        f"--work DIR --rounds {given.rounds} --batches {given.batches} "
        f"--warm {given.warm} --s3 {given.s3}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "versions": _versions(given.peers),
        "batches": given.batches,
        "rounds": given.rounds,
        "sets": {},
    }
    for dataset in given.data:
        bench = Bench(given, dataset)
        print(f"{bench.side} px", flush=True)
        found: dict[str, Any] = {}
        if given.s3 != "only":
            found = bench.measure()
            print("\n".join(table(found)), flush=True)
        if given.s3 != "no":
            found["s3"] = bench.over_s3()
            print("\n".join(["S3 on loopback", *table(found["s3"])]), flush=True)
        result["sets"][f"{bench.side} px"] = found
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(given.output)


if __name__ == "__main__":
    main()
