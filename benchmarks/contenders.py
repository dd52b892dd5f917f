"""Who is measured: this pipeline and img2dataset, as commands over one table.

Owns the command lines, the environment of its own that img2dataset lives in, and what a
command costs: wall time, CPU time and memory, of all its processes. Does not own the
photos (`benchmarks.photos`) or what is made of the figures (`benchmarks.preprocess`).
Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.codec_limit import environment
from benchmarks.photos import caption
from pipeline.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")
SIZE, QUALITY = 256, 95
_SET_CHILD_SUBREAPER = 36
_ORPHAN_SECONDS = 2.0
_WATCH_SECONDS = 0.25
_TOKENIZER_CAPTIONS = 2_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a contender is to do."""

    table: Path
    """Parquet with the columns `url` (file://) and `caption`."""
    output: Path
    per_shard: int
    cores: tuple[int, ...]
    """Cores that all its processes are held to, one worker for each."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What all processes of a command have used together."""

    memory: int
    """Most bytes at a time, shared pages counted once."""
    cpu: float
    """Seconds in user and kernel mode."""
    workers_cpu: float
    """Of them, those of the processes that handle photos, not of those that start them
    and watch over them."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """`python -m pipeline.preprocess`, with a tokenizer that is there already."""

    tokenizer: Path
    name: str = "palimpsest"

    def command(self, job: Job) -> list[str]:
        """As a user would type it."""
        return [
            *(sys.executable, "-m", "pipeline.preprocess"),
            *(f"--input={job.table}", f"--output={job.output}"),
            *(f"--tokenizer={self.tokenizer}", f"--shard.samples={job.per_shard}"),
            *(f"--image.size={SIZE}", f"--image.quality={QUALITY}"),
            f"--workers={len(job.cores)}",
        ]

    def is_worker(self, command: str) -> bool:
        """Whether a process with this command line handles photos: a Ray task or its
        decoder.
        """
        return command.startswith("ray::_run_task") or "decoder_process" in command

    def written(self, output: Path) -> int:
        """Samples of a finished dataset."""
        manifest = json.loads((output / "manifest.json").read_text())
        return int(manifest["accounting"]["written"])


@dataclass(frozen=True, kw_only=True)
class Img2dataset:
    """The same with img2dataset, its threads apart left at its defaults."""

    executable: Path
    threads: int = 16
    name: str = "img2dataset"

    def command(self, job: Job) -> list[str]:
        """`keep_ratio` brings the shorter side to the size, as `shorter` does here."""
        return [
            str(self.executable),
            *(f"--url_list={job.table}", "--input_format=parquet"),
            *("--url_col=url", "--caption_col=caption"),
            *(f"--output_folder={job.output}", "--output_format=webdataset"),
            *(f"--image_size={SIZE}", f"--encode_quality={QUALITY}"),
            *("--resize_mode=keep_ratio", f"--processes_count={len(job.cores)}"),
            *(f"--thread_count={self.threads}", "--enable_wandb=False"),
            f"--number_sample_per_shard={job.per_shard}",
        ]

    def is_worker(self, command: str) -> bool:
        """Its processes share one command line, and little is done besides photos."""
        return True

    def written(self, output: Path) -> int:
        """Samples of all shards."""
        return sum(int(stats["successes"]) for stats in self.stats(output))

    def stats(self, output: Path) -> list[dict[str, float]]:
        """What it says of each shard."""
        return [json.loads(p.read_text()) for p in sorted(output.glob("*_stats.json"))]


Contender = Ours | Img2dataset


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of the benchmark's captions, unless it is there."""
    if not folder.exists():
        captions = [caption(number) for number in range(_TOKENIZER_CAPTIONS)]
        folder.mkdir(parents=True)
        train_tokenizer(captions, 8000).write(folder)
    return folder


def peers_environment(folder: Path) -> Path:
    """img2dataset in a virtual environment, made where it is not there yet."""
    executable = folder / "bin" / "img2dataset"
    if not executable.exists():
        print(f"installing {REQUIREMENTS.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True)
    return executable.absolute()


def codec_limit(folder: Path, count: int, core: int) -> dict[str, float]:
    """Seconds a photo as `benchmarks.codec_limit` prints them."""
    command = [sys.executable, "-m", "benchmarks.codec_limit", str(folder), str(count)]
    done = subprocess.run(
        [*_held_to([core]), *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def timed(contender: Contender, job: Job, inputs: int) -> float:
    """Seconds that a command takes.

    Raises:
        RuntimeError: it failed, or wrote another number of samples.
    """
    process, start = _started(contender, job), time.perf_counter()
    code = process.wait()
    wall = time.perf_counter() - start
    _check(contender, job, code, inputs)
    _reap()
    return wall


def watched(contender: Contender, job: Job, inputs: int) -> Use:
    """What a command uses. Watching takes time, so nothing is timed here.

    Raises:
        RuntimeError: as `timed`.
    """
    process = _started(contender, job)
    watch = _Watch(process.pid, contender)
    watch.start()
    code = process.wait()
    watch.done.set()
    watch.join()
    _check(contender, job, code, inputs)
    _reap()
    return Use(
        memory=watch.memory,
        cpu=sum(watch.cpu.values()),
        workers_cpu=sum(watch.cpu[process] for process in watch.workers),
    )


class _Watch(threading.Thread):
    """Looks at a process and its descendants a few times a second: the kernel keeps no
    account of those that nobody waits for.
    """

    def __init__(self, pid: int, contender: Contender) -> None:
        super().__init__(daemon=True)
        self._contender = contender
        self.done = threading.Event()
        self.memory = 0
        self.cpu: dict[tuple[int, float], float] = {}
        """Last known seconds of each process."""
        self.workers: set[tuple[int, float]] = set()
        self._root = psutil.Process(pid)

    def run(self) -> None:
        while not self.done.wait(_WATCH_SECONDS):
            self.memory = max(self.memory, self._held())

    def _held(self) -> int:
        total = 0
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return 0
        for process in processes:
            try:
                total += process.memory_full_info().pss
                used = process.cpu_times()
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            key = process.pid, process.create_time()
            self.cpu[key] = used.user + used.system
            # Ray renames its processes once they have a task.
            if self._contender.is_worker(command):
                self.workers.add(key)
        return total


def _started(contender: Contender, job: Job) -> subprocess.Popen[bytes]:
    _adopt_orphans()
    shutil.rmtree(job.output, ignore_errors=True)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with _log(job).open("wb") as log:
        return subprocess.Popen(
            [*_held_to(job.cores), *contender.command(job)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _held_to(cores: Sequence[int]) -> list[str]:
    return ["taskset", "--cpu-list", ",".join(map(str, cores))]


def _log(job: Job) -> Path:
    return job.output.with_suffix(".log")


def _check(contender: Contender, job: Job, code: int, inputs: int) -> None:
    written = contender.written(job.output) if code == 0 else 0
    if written != inputs:
        log = _log(job).read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"{contender.name} ended with {code} and wrote {written} of {inputs} "
            f"samples: {log}"
        )


def _adopt_orphans() -> None:
    """Have what outlives its parent become a child of this process, which waits for it:
    it cannot disturb the next run.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> None:
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            if time.monotonic() > deadline:
                for child in psutil.Process().children():
                    child.send_signal(signal.SIGKILL)
            time.sleep(_WATCH_SECONDS)
