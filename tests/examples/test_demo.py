"""`examples.demo`: how stages are skipped, continued, failed and interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from examples.demo import ROOT, Stage, StageFailedError, demo_stages, main, run_stages


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.write_text("words")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def shell(script: str, product: Path, *made_from: Path) -> Stage:
    return Stage(
        title="test",
        command=["sh", "-c", script],
        product=product,
        made_from=made_from,
        environment={"WORD": "from the environment"},
    )


def test_a_stage_runs_once_and_again_when_its_input_is_newer(corpus: Path) -> None:
    product, log = corpus.with_name("product"), corpus.with_name("log")
    stage = shell(f"echo $WORD >> {log}; touch {product}", product, corpus)
    run_stages(iter([stage]))
    run_stages(iter([stage]))
    assert log.read_text() == "from the environment\n"
    os.utime(product, (999_999_999, 999_999_999))
    run_stages(iter([stage]))
    assert log.read_text() == 2 * "from the environment\n"


def test_an_interrupted_stage_continues_at_the_next_call(corpus: Path) -> None:
    half, product = corpus.with_name("half"), corpus.with_name("product")
    stage = shell(f"test -e {half} && touch {product}; touch {half}", product)
    with pytest.raises(StageFailedError):
        run_stages(iter([stage]))
    run_stages(iter([stage]))
    assert product.is_file()


def test_a_failing_stage_stops_the_demo_with_its_exit_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "later"
    stages = [shell("exit 7", tmp_path / "none"), shell(f"touch {later}", later)]
    assert main(iter(stages)) == 7
    assert not later.exists()
    assert "continues" in capfd.readouterr().err


def test_exit_status_0_without_the_product_is_a_failure(tmp_path: Path) -> None:
    assert main(iter([shell("true", tmp_path / "complete.json")])) == 1


def test_a_killed_command_is_a_failure_even_with_an_old_product(corpus: Path) -> None:
    product = corpus.with_name("product")
    product.touch()
    os.utime(product, (999_999_999, 999_999_999))
    assert main(iter([shell("kill -9 $$", product, corpus)])) == 128 + signal.SIGKILL


def running(pids: list[int]) -> list[int]:
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid)
        and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_ranks_finish_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    # A launcher that dies at once, above a rank that saves before it ends.
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(number, frame):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGINT, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys, signal\n"
        f"ranks = [subprocess.Popen([sys.executable, {str(rank)!r}])]\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"print(*[one.pid for one in ranks], file=open({str(tmp_path / 'pids')!r}, 'w')"
        ", flush=True)\n"
        "ranks[0].wait()\n"
    )
    demo = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path\n"
            "from examples.demo import Stage, main\n"
            f"command = [sys.executable, {str(launcher)!r}]\n"
            "stage = Stage(title='t', command=command, product=Path('none'))\n"
            "sys.exit(main(iter([stage])))",
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "ready")
    wait_for(tmp_path / "pids")
    demo.send_signal(number)
    _, message = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert "continues" in message
    assert (tmp_path / "saved").exists()
    assert running([int(pid) for pid in (tmp_path / "pids").read_text().split()]) == []


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and (path.stat().st_size or path.name == "ready")):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


def test_the_demo_prints_commands_of_the_fixed_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    stages: Iterator[Stage] = demo_stages()
    first, second = next(stages), next(stages)
    assert str(first) == (
        "python -m pipeline.preprocess --config examples/emoji.yaml "
        "--output runs/demo/shards"
    )
    assert "deepspeed --num_accelerators" in str(second)
    assert "--module trainer.pretrain --config emoji" in str(second)
