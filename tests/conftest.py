"""What tests share: a small real dataset, and ways to start the real commands."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# Kernels run under Triton's interpreter where there is no GPU; it has to be known
# before they are imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before anybody imports torch or numpy: threads of several processes that spin for the
# same cores take twice the time of one each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says nothing where others work beside it.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("patient")

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji.parquet"
GPU_SHARDS = ROOT / "build" / "gpu-shards"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def python(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` from the repository root; stdout and stderr as one text."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def emoji_shards(output: Path, *words: str) -> Path:
    """Shards of the bundled corpus at 32 px, made by the real command."""
    done = python(
        "-m",
        "pipeline.preprocess",
        "--config",
        ROOT / "examples" / "emoji.yaml",
        "--output",
        output,
        "--image.size=32",
        *words,
    )
    assert done.returncode == 0, done.stdout
    return output


# Above those of Ray's workers, below the ports that Linux hands out: one of those could
# be anybody's between the look here and the start of whoever is to listen there. Tests
# that run beside one another take turns, for the same reason.
_TURN = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_TURNS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_PORTS = list(range(20_000 + _TURN, 32_000, _TURNS))
random.SystemRandom().shuffle(_PORTS)


def free_port() -> int:
    """A port on which nobody listens at any address of this machine, and another one
    each time.
    """
    while True:
        port = _PORTS.pop()
        with socket.socket() as probe, contextlib.suppress(OSError):
            # Ray listens at the machine's own address even where it is told localhost.
            probe.bind(("", port))
            return port


def deepspeed_command(ranks: int, *words: str | Path) -> list[str]:
    """The launcher with `ranks` ranks on trainer.pretrain, one thread each."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return [
        str(launcher),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
        "trainer.pretrain",
        *map(str, words),
    ]


def launch_environment() -> dict[str, str]:
    """Environment in which a rank's numbers do not depend on the machine's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """What `make` puts into a folder, for all processes of a test run: whoever asks
    first makes it, others wait. Not to be changed.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "shared" / name
    done = folder.with_name(f"{name}.done")
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 240 emoji at 32 px in train and val shards, made by the pipeline;
    where there is no Ray, as `make gpu-wheels` has made it before.
    """
    if importlib.util.find_spec("ray"):

        def make(folder: Path) -> None:
            small_shards(folder / "shards")

        return made_once(tmp_path_factory, "emoji", make) / "shards"
    if not GPU_SHARDS.exists():
        pytest.fail(f"no Ray, and no {GPU_SHARDS}: bring what make gpu-wheels makes")
    return GPU_SHARDS


def small_shards(output: Path) -> Path:
    """240 emoji at 32 px in train and val shards."""
    return emoji_shards(
        output,
        "--limit=240",
        "--shard.samples=64",
        "--tokenizer=train:600",
        "--split.val=0.25",
        "--columns.keep=[base,group]",
        "--workers=2",
    )
