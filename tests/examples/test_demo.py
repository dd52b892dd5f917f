"""`examples.demo`: how stages are skipped, continued, failed and interrupted."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from examples.demo import (
    ROOT,
    Stage,
    StageFailedError,
    demo_stages,
    is_finished_dataset,
    main,
    run_stages,
)
from pipeline.manifest import load_manifest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """`main` takes signals for itself; the tests after these must not keep that. Under
    nohup these tests would be deaf to one, and so would what they start.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


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


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_dataset_that_is_still_growing_is_not_done(
    shards: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(shards)
    assert is_finished_dataset(shards / "manifest.json")
    growing = dataclasses.replace(manifest, complete=False)
    (tmp_path / "manifest.json").write_text(growing.to_json())
    (tmp_path / "manifest.json.sha256").write_text(growing.sha256)
    assert not is_finished_dataset(tmp_path / "manifest.json")


RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit("told twice"))
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
(folder / "pid").write_text(f"{os.getpid()} ")
time.sleep(300)
"""
LAUNCHER = """
import signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, f"{sys.argv[1]}/rank.py", sys.argv[1]])
def pass_on(number, frame):
    if sys.argv[2] == "forwards":
        rank.terminate()
        rank.wait(240)
    sys.exit(1)
signal.signal(signal.SIGINT, pass_on)
while rank.poll() is None:
    time.sleep(0.05)
"""
DEMO = """
import sys
from pathlib import Path
from examples.demo import Stage, main
command = [sys.executable, f"{sys.argv[1]}/launcher.py", *sys.argv[1:]]
sys.exit(main(iter([Stage(title="t", command=command, product=Path("none"))])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("launcher", ["forwards", "dies"])
def test_an_interrupt_lets_ranks_save_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals, launcher: str
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    demo = subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tmp_path), launcher],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "pid")
    demo.send_signal(number)
    _, message = demo.communicate(timeout=240)
    assert demo.returncode == 130
    assert "continues" in message
    assert (tmp_path / "saved").exists()
    assert not running(int((tmp_path / "pid").read_text()))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 240
    while not (path.exists() and path.read_text().endswith(" ")):
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
