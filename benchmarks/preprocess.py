"""How fast images and captions become shards, beside img2dataset and the codec's limit.

    python -m benchmarks.preprocess [--photos DIR] [--peers DIR] [--work DIR] ...

On two sets of photos (640x480, and 2 to 12 megapixels; enlarged from those in DIR, or
made up) the contenders take turns over the same files, `file://` URLs in a Parquet
table: on one core, then on two, with a worker for each. A run over one shard and one
over five, per worker, all from the page cache, give the rate in steady state, which is
what four more shards cost (tokenization, hashes, index, comparison and commit
included), and the start-up, which is the rest. All from the medians of the repeats.
Watched in runs of their own, the processes of each give memory and CPU time: all of it,
and that of the workers alone. The rest is coordination (driver, Ray's daemons): as much
on a node of 64 cores as here.

`--peers DIR` is where img2dataset is, or will be installed; without it only this
pipeline and the limit are measured. `--planning N` also plans a corpus of N inputs
(`benchmarks.planning`). Results go to `benchmarks/results/preprocess.json`.

Owns the order of runs and what is made of their figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import planning
from benchmarks.contenders import (
    ROOT,
    Contender,
    Img2dataset,
    Job,
    Ours,
    codec_limit,
    make_tokenizer,
    peers_environment,
    timed,
    watched,
)
from benchmarks.photos import SETS, PhotoSet, make_photos, write_table
from pipeline.images import codec_versions

RESULTS = ROOT / "benchmarks" / "results" / "preprocess.json"
# Shards of the two runs, per worker. img2dataset starts its processes anew after five.
_SHORT, _LONG = 1, 5
_THREADS = (1, 4, 16, 64)


@dataclass(frozen=True, kw_only=True)
class Walls:
    """What one contender took in one repeat, in seconds."""

    short: float
    """A run over few shards: mostly start-up."""
    long: float


class Bench:
    """All runs over one set of photos."""

    def __init__(self, given: argparse.Namespace, work: Path, chosen: PhotoSet) -> None:
        per_shard = given.per_shard or chosen.per_shard
        self._chosen = replace(chosen, per_shard=per_shard)
        self._folder = work / chosen.name
        self._output = work / "output"
        self._cores = sorted(os.sched_getaffinity(0))[: given.cores]
        self._repeats = given.repeats
        originals = sorted(given.photos.glob("*.jp*g")) if given.photos else []
        count = _LONG * per_shard * len(self._cores)
        print(f"{chosen.title}: {count} photos", flush=True)
        make_photos(self._folder, self._chosen, count, originals)

    def measure(self, contenders: Sequence[Contender]) -> dict[str, Any]:
        """Figures by kind, contender and number of cores."""
        contenders = [self._tuned(contender) for contender in contenders]
        walls: dict[str, list[Walls]] = {}
        limits: list[dict[str, float]] = []
        for repeat in range(self._repeats):
            limits.append(codec_limit(self._folder, self._count, self._cores[0]))
            for n_cores in range(1, len(self._cores) + 1):
                for contender in contenders:
                    found = self._walls(contender, n_cores)
                    walls.setdefault(f"{contender.name} {n_cores}", []).append(found)
            limits.append(codec_limit(self._folder, self._count, self._cores[0]))
            print(f"  repeat {repeat + 1} of {self._repeats} done", flush=True)
        uses = {
            f"{contender.name} {n_cores}": self._use(contender, n_cores)
            for n_cores in range(1, len(self._cores) + 1)
            for contender in contenders
        }
        return _summary(walls, limits, uses) | {
            "bytes_per_photo": self._photo_bytes(),
            "photos_per_shard": self._chosen.per_shard,
            # Of the last minutes: more than the cores means that others were at work.
            "load_average": os.getloadavg(),
            "peer_threads": {
                contender.name: contender.threads
                for contender in contenders
                if isinstance(contender, Img2dataset)
            },
        }

    @property
    def _count(self) -> int:
        return self._chosen.per_shard

    def _photo_bytes(self) -> float:
        files = self._folder.glob("*.jpg")
        return statistics.fmean(path.stat().st_size for path in files)

    def _tuned(self, contender: Contender) -> Contender:
        """img2dataset with the number of threads that suits it best here, by its own
        count of the seconds that a shard took.
        """
        if not isinstance(contender, Img2dataset):
            return contender
        seconds = {}
        for threads in _THREADS:
            tried = replace(contender, threads=threads)
            job = self._job(tried, 1, _SHORT)
            timed(tried, job, self._count)
            seconds[threads] = tried.stats(job.output)[0]["duration"]
        best = min(seconds, key=lambda threads: seconds[threads])
        print(f"  {contender.name}: {best} threads, of {seconds}", flush=True)
        return replace(contender, threads=best)

    def _read_all(self) -> None:
        """Photos into the page cache: they are megabytes, and a kernel that has given
        some up for what was written since would let the next contender wait for them.
        """
        for path in self._folder.glob("*.jpg"):
            path.read_bytes()

    def _walls(self, contender: Contender, n_cores: int) -> Walls:
        self._read_all()
        short, long = (
            timed(
                contender,
                self._job(contender, n_cores, shards),
                shards * n_cores * self._count,
            )
            for shards in (_SHORT, _LONG)
        )
        return Walls(short=short, long=long)

    def _use(self, contender: Contender, n_cores: int) -> dict[str, float]:
        self._read_all()
        short, long = (
            watched(
                contender,
                self._job(contender, n_cores, shards),
                shards * n_cores * self._count,
            )
            for shards in (_SHORT, _LONG)
        )
        more = self._more(n_cores)
        used = max(long.cpu - short.cpu, 1e-9)
        by_workers = max(long.workers_cpu - short.workers_cpu, 1e-9)
        return {
            "more": more,
            "images_per_cpu_second": more / used,
            "images_per_worker_cpu_second": more / by_workers,
            "coordination_share": 1 - by_workers / used,
            "peak_memory_bytes": long.memory,
        }

    def _more(self, n_cores: int) -> int:
        """Photos that the longer run has more."""
        return (_LONG - _SHORT) * n_cores * self._count

    def _job(self, contender: Contender, n_cores: int, shards: int) -> Job:
        count = shards * n_cores * self._count
        return Job(
            table=write_table(self._folder, count),
            output=self._output / contender.name,
            per_shard=self._count,
            cores=tuple(self._cores[:n_cores]),
        )


def _summary(
    walls: Mapping[str, Sequence[Walls]],
    limits: Sequence[Mapping[str, float]],
    uses: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    stages = {
        name: statistics.median(limit[name] for limit in limits)
        for name in ("decode", "resize", "encode")
    }
    limit = 1 / sum(stages.values())
    contenders = {}
    for name, found in walls.items():
        figures = {**_figures(found, uses[name]["more"]), **uses[name]}
        figures["share_of_limit"] = figures["images_per_second"] / limit
        figures["workers_share_of_limit"] = (
            figures["images_per_worker_cpu_second"] / limit
        )
        contenders[name] = figures
    return {
        "limit": {
            "decode_resize_encode": limit,
            "decode_encode": 1 / (stages["decode"] + stages["encode"]),
            "seconds": stages,
        },
        "contenders": contenders,
        "ratios": _ratios(
            {name: one["images_per_second"] for name, one in contenders.items()}
        ),
    }


def _figures(found: Sequence[Walls], more: float) -> dict[str, Any]:
    """Rate and start-up from the medians of both lengths: medians of differences would
    take one slow short run for a fast long one.
    """
    short = statistics.median(one.short for one in found)
    long = statistics.median(one.long for one in found)
    seconds = max(long - short, 1e-9)
    return {
        "images_per_second": more / seconds,
        # The longer run does as much again, that many times.
        "startup_seconds": short - seconds * _SHORT / (_LONG - _SHORT),
        "wall_seconds": [[round(one.short, 2), round(one.long, 2)] for one in found],
    }


def _ratios(rates: Mapping[str, float]) -> dict[str, float]:
    """Ratios of rates, for those pairs that were measured."""
    ours, peer = Ours.name, Img2dataset.name
    pairs = (
        (f"{ours} 1", f"{peer} 1"),
        (f"{ours} 2", f"{peer} 2"),
        (f"{ours} 2", f"{ours} 1"),
        (f"{peer} 2", f"{peer} 1"),
    )
    return {
        f"{first} : {second}": rates[first] / rates[second]
        for first, second in pairs
        if first in rates and second in rates
    }


def print_table(title: str, figures: Mapping[str, Any]) -> None:
    """The figures of one set, for people."""
    limit = figures["limit"]
    print(f"\n{title}, {figures['bytes_per_photo'] / 1e3:.0f} kB a photo")
    print(
        f"{'':16}{'images/s':>10}{'limit':>8}{'per CPU s':>11}"
        f"{'a worker':>10}{'limit':>8}{'others':>8}{'start':>8}{'MB':>7}"
    )
    for name in ("decode_encode", "decode_resize_encode"):
        print(f"{name:20}{limit[name]:6.1f}")
    for name, one in figures["contenders"].items():
        print(
            f"{name:16}{one['images_per_second']:10.1f}{one['share_of_limit']:8.0%}"
            f"{one['images_per_cpu_second']:11.1f}"
            f"{one['images_per_worker_cpu_second']:10.1f}"
            f"{one['workers_share_of_limit']:8.0%}{one['coordination_share']:8.0%}"
            f"{one['startup_seconds']:7.1f}s{one['peak_memory_bytes'] / 1e6:7.0f}"
        )
    for pair, ratio in figures["ratios"].items():
        print(f"{pair}  {ratio:.2f}")


def machine() -> dict[str, Any]:
    """What was measured on."""
    found = (line for line in Path("/proc/cpuinfo").read_text().splitlines())
    model = next((line for line in found if line.startswith("model name")), ":")
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "codecs": codec_versions(),
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of JPEGs to enlarge")
    parser.add_argument("--peers", type=Path, help="environment of img2dataset")
    parser.add_argument("--work", type=Path, help="folder of the photos; kept")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--per_shard", type=int, help="photos of a shard")
    parser.add_argument("--cores", type=int, default=2, help="most cores to use")
    parser.add_argument("--planning", type=int, help="inputs of a corpus to plan")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a few photos, once")
    given = parser.parse_args(argv)
    if given.smoke:
        given.repeats, given.per_shard, given.cores = 1, 4, 1
        given.planning = given.planning or 10_000
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that the module describes."""
    given = parsed(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        results = _before(given.results) | {"machine": machine()}
        contenders: list[Contender] = [Ours(tokenizer=make_tokenizer(work / "words"))]
        if given.peers:
            executable = peers_environment(given.peers)
            contenders.append(Img2dataset(executable=executable))
            results["peers"] = _frozen(executable)
        for name in given.sets:
            bench = Bench(given, work, SETS[name])
            results[name] = bench.measure(contenders)
            _write(given.results, results)
            print_table(SETS[name].title, results[name])
        if given.planning:
            results["planning"] = planning.measure_all(work, given.planning)
            _write(given.results, results)


def _before(path: Path) -> dict[str, Any]:
    """Figures of an earlier run: those that are not measured anew stay."""
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def _frozen(executable: Path) -> list[str]:
    pip = [str(executable.with_name("python")), "-m", "pip", "freeze"]
    done = subprocess.run(pip, capture_output=True, text=True, check=True)
    return done.stdout.split()


if __name__ == "__main__":
    main()
