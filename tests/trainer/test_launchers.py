"""Every launcher that sets five variables starts the same run.

The commands are those of `trainer/README.md`, "Other launchers", with this test's words
in place of the reader's.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_port, launch_environment
from tests.trainer.tiny import LAUNCH_LIMIT_S, TINY, column

README = ROOT / "trainer" / "README.md"
# What a process is given by none of the three, or by the shell that it runs in.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "TRITON_INTERPRET")


@pytest.fixture
def words(shards: Path, tmp_path: Path) -> list[str]:
    return [*TINY, f"--data={shards}", f"--output={tmp_path / 'run'}"]


def lines(name: str) -> list[str]:
    """The lines of README that start the trainer with a launcher."""
    section = README.read_text().partition("## Other launchers")[2]
    block = section.partition(f"**{name}**")[2].partition("```")[2].partition("```")[0]
    found = block.split("\n")[1:-1]
    assert 1 <= len(found) <= 3, name
    return found


def same(run: Path, whole: Path) -> None:
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr"):
        assert column(run, name) == column(whole, name)


def to_its_end(
    command: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done


def test_torchrun(words: list[str], whole: Path, tmp_path: Path) -> None:
    text = " ".join(lines("torchrun")).replace("\\", "").split()
    assert text[:4] == ["torchrun", "--nnodes", "2", "--nproc_per_node"]
    end = text.index("trainer.pretrain")
    command = [str(Path(sys.executable).with_name("torchrun")), *text[1:end]]
    command[command.index("--nnodes") + 1] = "1"
    command[command.index("--nproc_per_node") + 1] = "2"
    command[command.index("--rdzv_endpoint") + 1] = f"127.0.0.1:{free_port()}"
    to_its_end([*command, "trainer.pretrain", *words], launch_environment(), ROOT)
    same(tmp_path / "run", whole)


def test_slurm(words: list[str], whole: Path, tmp_path: Path) -> None:
    """The shell line in two processes, with the variables that `srun` sets."""
    export, *rest = lines("Slurm")
    script = "\n".join(rest).removeprefix("srun bash -c '").removesuffix("'")
    variables, program, _ = script.partition("python -m trainer.pretrain")
    assert program
    script = f"{variables}{sys.executable} -m trainer.pretrain {shlex.join(words)}"
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    assert export.startswith("export MASTER_PORT=29500 MASTER_ADDR=$(scontrol")
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            ["bash", "-c", script],
            cwd=ROOT,
            env=environment | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=LAUNCH_LIMIT_S)
            assert process.returncode == 0, printed
    finally:
        for process in processes:
            process.kill()
    same(tmp_path / "run", whole)


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """Of a Ray that is this test's own."""
    # Names of its sockets must be short.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:
        yield launch_environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
            "RAY_ADDRESS": "local",
            # Where results go that nobody asked for.
            "HOME": folder,
            "PYTHONPATH": str(ROOT),
        }


def test_ray_train(
    words: list[str], whole: Path, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    text = "\n".join(lines("Ray Train")).replace("use_gpu=True", "use_gpu=False")
    assert "num_workers=16" in text
    script = tmp_path / "start.py"
    script.write_text(
        f"""\
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from trainer.pretrain import main

ray.init(num_cpus=3, include_dashboard=False)
words = {words!r}
{text.replace("num_workers=16", "num_workers=2")}
"""
    )
    to_its_end([sys.executable, str(script)], ray_environment, ROOT)
    same(tmp_path / "run", whole)
