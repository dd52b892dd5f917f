"""How a run stands is told from its storage alone, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from cluster.journal import FOLDER, Journal
from cluster.options import EvaluateStage, PreprocessStage, PretrainStage, RunConfig
from cluster.standing import Standing, standing
from cluster.status_text import duration, text
from cluster.store import Store
from tests.conftest import ROOT

STEPS, BATCH, RATE = 1000, 48, 96.0


def silent(line: str) -> None:
    """Nobody reads it."""


def config_of(output: Path) -> RunConfig:
    return RunConfig(
        output=str(output),
        preprocess=PreprocessStage(arguments={"input": "/corpus"}),
        pretrain=PretrainStage(config="emoji", max_nodes=4),
        evaluate=EvaluateStage(),
        prices={"gpu": 30.0, "cpu": 0.5},
    )


def begun(output: Path) -> Journal:
    journal = Journal(Store(str(output)), silent)
    given = dataclasses.asdict(config_of(output))
    journal.write("driver_started", command="cluster.run --config r.yaml", config=given)
    return journal


@pytest.fixture
def training(tmp_path: Path) -> tuple[Path, Journal]:
    """A run whose shards are made and whose model is half trained."""
    output = tmp_path / "run"
    output.mkdir()
    progress = {"phase": "write", "unit": "inputs", "done": 900, "total": 900}
    progress |= {"ranges": {"committed": 9, "total": 9}, "failed": {"http_404": 4}}
    (output / "data.progress.json").write_text(json.dumps(progress))
    journal = begun(output)
    for kind in ("stage_started", "stage_finished"):
        journal.write(kind, stage="preprocess")  # type: ignore[arg-type]
    journal.write("stage_started", stage="pretrain")
    journal.write(
        "attempt_started", attempt=1, world_size=32, nodes=list("abcd"), step=0
    )
    journal.write(
        "attempt_ended", attempt=1, cause="preemption", detail="n \x1b[2J", step=300
    )
    journal.write(
        "attempt_started", attempt=2, world_size=24, nodes=list("abc"), step=300
    )
    journal.usage({"gpu": 7200.0, "cpu": 3600.0, "odd": 60.0}, {"gpu": 3, "cpu": 0})
    run = output / "pretrain"
    run.mkdir()
    keys = {"schedule": {"steps": STEPS}, "max_steps": None, "global_batch": BATCH}
    (run / "config.yaml").write_text(yaml.safe_dump(keys))
    rows = [
        {"step": step, "loss": 2.0, "pairs_per_s": RATE}
        for step in range(1, STEPS // 2)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # A line that is being written.
    (run / "metrics.jsonl").write_text(lines + '{"step": 9')
    return output, journal


def test_progress_nodes_costs_and_restarts_are_told(
    training: tuple[Path, Journal],
) -> None:
    output, _ = training
    found = standing(str(output))
    assert found.state == "running"
    by_name = {stage.name: stage for stage in found.stages}
    assert [stage.state for stage in found.stages] == ["done", "running", "waiting"]
    assert by_name["preprocess"].more["ranges_committed"] == 9
    trained = by_name["pretrain"]
    assert (trained.done, trained.total) == (STEPS // 2 - 1, STEPS)
    left = (STEPS - trained.done) * BATCH / RATE
    assert trained.eta_s == pytest.approx(left)
    assert found.costs == {"gpu": 60.0, "cpu": 0.5, "odd": None}
    assert found.attempts == 2
    (restart,) = found.restarts
    assert (restart.cause, restart.step) == ("preemption", 300)


def test_what_it_waits_for_is_told(training: tuple[Path, Journal]) -> None:
    output, journal = training
    journal.write("waiting", wanted=4, there=1)
    assert "waiting: 4 nodes for training wanted, 1 there" in text(
        standing(str(output))
    )


def test_the_text_says_it_and_no_terminal_obeys_it(
    training: tuple[Path, Journal],
) -> None:
    output, _ = training
    shown = text(standing(str(output)))
    assert "\x1b" not in shown
    for words in (
        "preprocess  done",
        "9 of 9 ranges committed, 4 inputs failed",
        "499 of 1,000 steps",
        "3 nodes, 24 ranks, 96 pairs/s, loss 2.0000",
        "4 min 10 s left",
        "60.00 USD",
        "no price",
        "in all 60.50 USD and what has no price",
        "restarts: 1 (1 x a node was taken away)",
        "at step 300: n \\x1b[2J",
    ):
        assert words in shown, shown


def aged(output: Path, seconds: float) -> None:
    """As if everything in the journal had been written earlier."""
    for path in (output / FOLDER).iterdir():
        row = json.loads(path.read_text())
        row["time"] -= seconds
        path.write_text(json.dumps(row))


def test_a_driver_that_is_gone_is_told_from_one_that_works(
    training: tuple[Path, Journal],
) -> None:
    output, journal = training
    aged(output, 100)
    found = standing(str(output), listen_s=0.1)
    assert found.state == "gone"
    assert "submit the same command to continue" in text(found)
    assert found.command in text(found)
    journal.usage({}, {})
    assert standing(str(output)).state == "running"


@pytest.mark.parametrize("seconds", [7200, -7200])
def test_a_driver_with_another_clock_is_not_taken_for_gone(
    seconds: float, training: tuple[Path, Journal]
) -> None:
    """Nor one that is gone for alive, whatever time it wrote."""
    output, _ = training
    ended = threading.Event()

    def live() -> None:
        row: dict[str, object] = {"node_seconds": {}, "alive": {"gpu": 3}}
        while not ended.wait(0.2):
            row["time"] = time.time() - seconds
            Store(f"{output}/{FOLDER}").write("usage-x.json", json.dumps(row).encode())

    aged(output, seconds)
    assert standing(str(output), listen_s=0.1).state == "gone"
    driver = threading.Thread(target=live)
    driver.start()
    try:
        found = standing(str(output))
        assert found.state == "running"
        assert found.clock_s == pytest.approx(seconds, abs=30)
        # Known from then on.
        again = standing(str(output), clock_s=found.clock_s, listen_s=0)
        assert again.state == "running"
    finally:
        ended.set()
        driver.join()
    assert found.read == pytest.approx(found.started, abs=30)
    how = "ahead of" if seconds > 0 else "behind"
    assert f"{how} the driver's, whose times these are" in text(found)


@pytest.mark.parametrize(
    ("status", "state"),
    [("finished", "finished"), ("stopped", "stopped"), ("no bucket", "failed")],
)
def test_the_last_driver_decides(
    status: str, state: str, training: tuple[Path, Journal]
) -> None:
    output, journal = training
    journal.write("driver_ended", status=status)
    found = standing(str(output))
    assert found.state == state
    assert found.said == (status if state == "failed" else None)
    time.sleep(0.01)
    begun(output)
    assert standing(str(output)).state == "running"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.status", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_has_every_figure(training: tuple[Path, Journal]) -> None:
    output, _ = training
    done = command(str(output), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {field.name for field in dataclasses.fields(Standing)}
    assert found["usage"]["alive"] == {"gpu": 3, "cpu": 0}


def test_watching_ends_with_the_run(training: tuple[Path, Journal]) -> None:
    output, journal = training
    watching = subprocess.Popen(
        [sys.executable, "-m", "cluster.status", str(output), "--watch", "--every=0.2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert watching.stdout
        assert "running" in watching.stdout.readline()
        journal.write("driver_ended", status="finished")
        rest, _ = watching.communicate(timeout=240)
        assert "finished" in rest
        assert watching.returncode == 0
    finally:
        watching.kill()
        watching.wait()


@pytest.mark.parametrize("content", ["null", "3", "[]", '{"time": "x"}', "\x00"])
def test_files_that_say_something_else_are_left_out(
    content: str, training: tuple[Path, Journal]
) -> None:
    output, _ = training
    now = time.time()

    def shown() -> list[str]:
        # At the same moment: how long ago something was is in it.
        with pytest.MonkeyPatch.context() as clock:
            clock.setattr(time, "time", lambda: now)
            return text(standing(str(output))).splitlines()

    before = shown()
    for name in ("events-0-x-1.json", "usage-x.json"):
        (output / "cluster" / name).write_text(content)
    assert shown() == before
    (output / "pretrain" / "config.yaml").write_text(content)
    assert "pretrain    running" in text(standing(str(output)))


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    done = command(str(tmp_path))
    assert done.returncode == 1
    assert "is no run: nothing has been started with it" in done.stderr
    assert command("relative").returncode == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12, "12 s"), (200, "3 min 20 s"), (15_120, "4 h 12 min"), (273_600, "3 d 4 h")],
)
def test_durations_have_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize("value", [None, 3, "x", [], {"accounting": None}])
def test_foreign_figures_cost_themselves_alone(
    value: object, training: tuple[Path, Journal]
) -> None:
    output, journal = training
    (output / "data.progress.json").write_text(json.dumps(value))
    (output / "pretrain" / "config.yaml").write_text(json.dumps({"schedule": value}))
    journal.write("driver_ended")
    found = standing(str(output))
    assert [stage.state for stage in found.stages] == ["done", "stopped", "waiting"]
    assert "restarts: 1" in text(found)


def test_a_run_that_has_ended_grows_no_older(training: tuple[Path, Journal]) -> None:
    output, journal = training
    journal.write("driver_ended", status="finished")
    before, _, _ = text(standing(str(output))).partition(" from its start")
    aged(output, 3600)
    after, _, _ = text(standing(str(output))).partition(" from its start")
    assert before == after
