"""The real launcher with real ranks over gloo, real kills, real files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import (
    deepspeed_command,
    free_port,
    launch_environment,
    python,
)
from tests.trainer.tiny import (
    LAUNCH_LIMIT_S,
    TINY,
    column,
    damaged_copy,
    launch,
    metrics,
    paced,
    wait_for_group,
    wait_until,
)
from trainer.contract import (
    METRIC_NAMES,
    MODE_METRIC_NAMES,
    complete_checkpoints,
    read_metrics,
)


def start_until(
    reached: Callable[[], bool], *words: str | Path, folder: Path
) -> subprocess.Popen[bytes]:
    """Start the launcher with two ranks in its own session, with steps that take their
    time (`folder` holds how much); return it, still running, as soon as `reached()`.
    """
    process = subprocess.Popen(
        deepspeed_command(2, *TINY, *words),
        env=paced(folder, 0.3),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(reached, process, lambda: "the run ended before it could be disturbed")
    return process


def test_a_run_writes_every_metric_of_every_step_once(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert set(METRIC_NAMES) <= set(row)
    epochs = [row["epoch"] for row in rows]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0 < epochs[-1], "the dataset is meant to be passed twice"
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["lr"] < rows[2]["lr"] > rows[-1]["lr"] > 0
    assert all(0 <= row["padding_frac"] < 0.2 for row in rows)
    assert all(0 <= row["data_wait_frac"] <= 1 for row in rows)


def test_a_finished_run_is_marked_and_keeps_the_newest_checkpoints(whole: Path) -> None:
    assert json.loads((whole / "complete.json").read_text()) == {"step": 12}
    assert [step for step, _ in complete_checkpoints(whole)] == [10, 12]
    names = sorted(path.name for path in (whole / "checkpoints").glob("*tmp*"))
    assert names == []
    state = json.loads(
        (complete_checkpoints(whole)[-1][1] / "complete.json").read_text()
    )
    assert {"manifest_hash", "seed", "epoch", "step"} <= set(state)
    assert len(json.dumps(state)) < 1024


def test_one_rank_takes_the_same_steps_as_two(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    done = python(
        "-m",
        "trainer.pretrain",
        *TINY,
        f"--data={shards}",
        f"--output={tmp_path / 'run'}",
        "--micro_batch=24",
        env=launch_environment(),
    )
    assert done.returncode == 0, done.stdout
    alone = tmp_path / "run"
    assert column(alone, "sample_digest") == column(whole, "sample_digest")
    # One micro-batch of 24 against 2 ranks x 2 of 6: fp32 sums in another order, which
    # twelve steps of AdamW amplify a little.
    measured = set(MODE_METRIC_NAMES) & {name for row in metrics(whole) for name in row}
    assert {"psnr", "mlm_loss_light", "recon_loss_image_heavy"} <= measured
    for name in ("loss", "mlm_loss", "recon_loss", "grad_norm", *measured):
        for one, two in zip(metrics(alone), metrics(whole), strict=True):
            assert one.get(name) == pytest.approx(two.get(name), rel=2e-3), name


def test_a_finished_run_is_left_alone(whole: Path, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    words = (*TINY, f"--data={shards}", f"--output={whole}", "--max_steps=4")
    done = python("-m", "trainer.pretrain", *words, env=two_ranks())
    assert done.returncode == 0
    assert "nothing left to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_completion_marker_lost_to_a_kill_comes_back(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "complete.json").unlink()
    words = (*TINY, f"--data={shards}", f"--output={run}")
    done = python("-m", "trainer.pretrain", *words, env=two_ranks())
    assert done.returncode == 0
    assert json.loads((run / "complete.json").read_text()) == {"step": 12}


def two_ranks() -> dict[str, str]:
    """Environment of rank 0 of two, for calls that end before they meet."""
    return launch_environment() | {"RANK": "0", "WORLD_SIZE": "2"}


def test_stopping_and_resuming_gives_the_uninterrupted_run(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}")
    assert "stopped after step 7" in launch(2, *words, "--max_steps=7")
    assert not (run / "complete.json").exists()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 0.5}\n{"step": 9, "lo')
    assert "resuming after step 7" in launch(2, *words)
    for name in ("step", "sample_digest", "loss", "grad_norm", "lr"):
        assert column(run, name) == column(whole, name)


def test_sigkill_in_mid_run_loses_nothing_committed(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}", "--checkpoint.every_steps=2")
    process = start_until(
        lambda: bool(complete_checkpoints(run)), *words, folder=tmp_path
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    step, newest = complete_checkpoints(run)[-1]
    assert step < 12, "the run ended before it could be killed"
    # What a death between a checkpoint's first byte and its marker leaves.
    torn = run / "checkpoints" / "step-00000001"
    shutil.copytree(newest, torn)
    (torn / "complete.json").unlink()
    shutil.copytree(newest, run / "checkpoints" / "tmp-dead")
    assert f"resuming after step {step}" in launch(2, *words)
    for name in ("step", "sample_digest", "loss", "grad_norm"):
        assert column(run, name) == column(whole, name)
    assert not (run / "checkpoints" / "tmp-dead").exists()
    assert not torn.exists()


def test_sigterm_saves_and_the_same_command_continues(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}")
    process = start_until(lambda: bool(read_metrics(run)), *words, folder=tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=LAUNCH_LIMIT_S)
    wait_for_group(process.pid)
    found = complete_checkpoints(run)
    assert found, "no checkpoint was written on SIGTERM"
    assert found[-1][0] < 12, "the run ended before it could be stopped"
    launch(2, *words)
    assert column(run, "sample_digest") == column(whole, "sample_digest")
    assert column(run, "loss") == column(whole, "loss")


def alone(*words: str | Path) -> None:
    """One rank, without the launcher, to its end. It must succeed."""
    done = python("-m", "trainer.pretrain", *TINY, *words, env=launch_environment())
    assert done.returncode == 0, done.stdout


def test_bf16_follows_fp32(whole: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}", "--max_steps=3")
    alone(*words, "--deepspeed.precision=bf16")
    # Eight bits of mantissa: losses near 7 agree to about a hundredth.
    for name, close in (("loss", 5e-3), ("grad_norm", 5e-2)):
        expected = column(whole, name)[:3]
        assert column(run, name) == pytest.approx(expected, rel=close)


def test_ranks_that_found_different_checkpoints_stop(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    resumed, empty = tmp_path / "resumed", tmp_path / "empty"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000012")
    (resumed / "complete.json").unlink()
    port = str(free_port())
    ranks = []
    for rank, run in enumerate((resumed, empty)):
        environment = launch_environment() | {"RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment["LOCAL_RANK"] = str(rank)
        words = ("-m", "trainer.pretrain", *TINY, f"--data={shards}")
        ranks.append(
            subprocess.Popen(
                [sys.executable, *words, f"--output={run}"],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in ranks:
        _, message = process.communicate(timeout=LAUNCH_LIMIT_S)
        assert process.returncode == 1
        assert "different steps ([10, 0] by rank)" in message
    assert not empty.exists()


def test_a_damaged_shard_ends_every_rank_with_one_clear_line(
    shards: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "shards"
    uid = damaged_copy(shards, damaged, "train")
    done = subprocess.run(
        deepspeed_command(
            2, *TINY, f"--data={damaged}", f"--output={tmp_path / 'run'}"
        ),
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_LIMIT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stdout
    assert f"{uid} is damaged" in lines[0]


def test_a_second_trainer_in_the_same_run_is_refused(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused(f"--data={shards}", f"--output={run}")
    assert "another trainer is writing" in line
    assert [path.name for path in run.iterdir()] == [".lock"]


def refused(*words: str | Path, ranks: int | None = None) -> str:
    """The one line that a refused call ends with."""
    environment = launch_environment()
    if ranks:
        environment |= {"RANK": "0", "WORLD_SIZE": str(ranks)}
    done = python("-m", "trainer.pretrain", *TINY, *words, env=environment)
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stdout
    return lines[0]


def test_wrong_calls_are_refused_in_one_line_before_anything_is_written(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data={shards}", f"--output={run}")
    line = refused(*words, ranks=5)
    assert "world size 5 does not divide the 12 lanes" in line
    assert "1, 2, 3, 4, 6, 12" in line
    assert "'optimizer.lr'" in refused(*words, "--optimizer.rl=1")
    assert "multiple of the 4 px" in refused(*words, "--image.size=18")
    assert "lower global_batch" in refused(*words, "--global_batch=1200")
    assert "no manifest.json" in refused(f"--data={tmp_path}", f"--output={run}")
    for output in (shards, f"file://{shards}"):
        assert "holds a dataset" in refused(*words, f"--output={output}")
    assert "is a file: give" in refused(*words, f"--output={shards / 'manifest.json'}")
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "0.jpg").touch()
    line = refused(*words, f"--output={tmp_path / 'mine'}")
    assert "is no run and holds images: take another --output" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["images"]
    assert "has: train, val" in refused(*words, "--split=test")
    bf16 = ("--deepspeed.precision=bf16", "--deepspeed.zero_stage=0")
    assert "zero_stage 1 or more" in refused(*words, *bf16)
    assert not run.exists()


def test_a_run_refuses_another_configuration_or_dataset(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    words = (f"--data={shards}", f"--output={run}")
    before = (run / "config.yaml").read_text()
    line = refused(*words, "--optimizer.lr=0.5", "--checkpoint.keep=7")
    assert "optimizer.lr: 0.002 -> 0.5" in line
    assert "checkpoint.keep" not in line
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    text = json.loads((other / "manifest.json").read_text())
    text["sources"] = {"emoji": 2.0}
    from pipeline.manifest import manifest_from_json

    manifest = manifest_from_json(text)
    (other / "manifest.json").write_text(manifest.to_json())
    (other / "manifest.json.sha256").write_text(f"{manifest.sha256}  manifest.json\n")
    line = refused(f"--data={other}", f"--output={run}")
    assert manifest.sha256 in line
    assert (run / "config.yaml").read_text() == before


def test_a_taken_port_is_named_with_the_cure(shards: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        environment = launch_environment()
        environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        port = str(taken.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = python(
            "-m",
            "trainer.pretrain",
            *TINY,
            f"--data={shards}",
            f"--output={tmp_path / 'run'}",
            env=environment,
        )
    assert done.returncode == 1, done.stdout
    assert "--master_port" in done.stdout
    assert "Traceback" not in done.stdout
