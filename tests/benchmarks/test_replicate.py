"""A replication goes on after any kill, repeats nothing, and gives the same tables."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.replicate import main
from benchmarks.replication.matrix import Metric, load
from benchmarks.replication.predictions import read
from benchmarks.replication.schedule import Place, Schedule, locked
from benchmarks.replication.share import denied
from benchmarks.replication.stages import evaluation, plan
from benchmarks.replication.tables import Measured, compared, markdown, tables
from tests.conftest import ROOT
from tests.trainer.tiny import TINY
from trainer.contract import COMPLETE
from trainer.tasks.average_precision import AveragePrecision

_LIMIT_S = 240
_PRETRAIN = {
    **dict(word.removeprefix("--").split("=", 1) for word in TINY),
    "eval.every_steps": 0,
    "checkpoint.every_steps": 3,
}


def matrix(shards: Path) -> dict[str, object]:
    """Two rows, two seeds, probes; half of the data in one row."""
    row = {
        "dataset": "emoji",
        "model": "mlim",
        "masking": "mam",
        "tasks": ["probes"],
    }
    return {
        "seeds": [0, 1],
        "datasets": {
            "emoji": {
                "preprocess": {
                    "config": str(ROOT / "examples" / "emoji.yaml"),
                    "image.size": 32,
                    "limit": 120,
                    "shard.samples": 64,
                    # Training one takes longer than the rest.
                    "tokenizer": str(shards / "tokenizer"),
                    "split.val": 0.25,
                    "split.group": "subgroup",
                    "columns.keep": ["subgroup"],
                    "workers": 2,
                },
                "pairs": {
                    name: {"column": "subgroup", "split": name, "limit": 40}
                    for name in ("train", "val")
                },
            }
        },
        "models": {
            "mlim": {
                "pretrain": dict(_PRETRAIN),
                "weights": {"mlm": 1, "recon": 10},
            }
        },
        "maskings": {"mam": {}},
        "tasks": {
            "probes": {
                "evaluate": {"task": "probes", "draws": 1, "examples": 2},
                "result": "probes.json",
                "metrics": {
                    "mlm": {
                        "title": "MLM",
                        "value": "mlm.conditions.true.mean",
                        "better": "lower",
                    }
                },
            },
            "matching": {
                "finetune": {
                    "task": "matching",
                    "pairs": "{pairs:train}",
                    "max_steps": 2,
                },
                "dropout": {"text_only": 0.5, "image_only": 0.25},
                "evaluate": {"task": "matching", "pairs": "{pairs:val}"},
                "result": "matching.json",
                "metrics": {
                    "both": {
                        "title": "PR AUC",
                        "value": "metrics.pr_auc_both.value",
                        "predictions": "pr_auc_both",
                    }
                },
            },
        },
        "rows": {
            "tuned": {
                **row,
                "title": "tuned",
                "objectives": ["mlm", "recon"],
                "modality_dropout": True,
                "tasks": ["matching"],
            },
            "both": {**row, "title": "MLM + RECON", "objectives": ["mlm", "recon"]},
            "half": {
                **row,
                "title": "half the data",
                "objectives": ["mlm", "recon"],
                "fraction": 0.5,
            },
        },
        "tables": {
            "tuned": {
                "title": "Tuned",
                "task": "matching",
                "rows": ["tuned"],
                "reference": "tuned",
                "metrics": ["both"],
            },
            "data": {
                "title": "Data",
                "task": "probes",
                "rows": ["both", "half"],
                "reference": "both",
                "metrics": ["mlm"],
                "paper": {"mlm": {"both": "4.2"}},
                "claims": [
                    {
                        "says": "higher",
                        "row": "half",
                        "against": "both",
                        "metric": "mlm",
                        "source": "Half the data is worse.",
                    }
                ],
            },
        },
    }


def markers(work: Path) -> list[Path]:
    return sorted((work / "stages").rglob("*.json"))


def write(path: Path, values: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def command(given: Path, work: Path, *words: str) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.replicate"]
    return [*module, f"--matrix={given}", f"--work={work}", "--jobs=2", *words]


def replicate(given: Path, work: Path, *words: str) -> str:
    done = subprocess.run(
        command(given, work, *words),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def given(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("matrix") / "tiny.yaml", matrix(shards))


Killed = tuple[Path, dict[Path, float], str]
ONE = "--only=both,0"


@pytest.fixture(scope="module")
def killed(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A replication that was killed in a pretraining and called again: its folder,
    when what was complete by then was made, and what the second call said.
    """
    work = tmp_path_factory.mktemp("replicate") / "work"
    process = subprocess.Popen(
        command(given, work, ONE), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    half_way = work / "pretrain" / "mlim-mlm+recon-mam-emoji" / "seed0"
    end = time.monotonic() + _LIMIT_S
    while not list(half_way.glob("checkpoints/step-*/complete.json")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime for path in markers(work)}
    assert before
    assert not (half_way / COMPLETE).exists()
    return work, before, replicate(given, work, ONE)


def test_a_killed_replication_goes_on_and_repeats_nothing(killed: Killed) -> None:
    work, before, said = killed
    assert {path: path.stat().st_mtime for path in before} == before
    for path in before:
        assert f"{path.relative_to(work / 'stages').with_suffix('')}:" not in said
    assert before.keys() <= set(markers(work))
    log = work / "logs" / "pretrain" / "mlim-mlm+recon-mam-emoji" / "seed0.log"
    assert "resuming after step" in log.read_text()
    assert "3/3" in said


def test_its_tables_are_those_of_one_that_was_left_alone(
    killed: Killed, given: Path, tmp_path: Path
) -> None:
    work, _, _ = killed
    replicate(given, tmp_path / "work", ONE)
    for name in ("tables.md", "tables.json"):
        assert (tmp_path / "work" / name).read_text() == (work / name).read_text()
    found = json.loads((work / "tables.json").read_text())["tables"]["data"]
    run = work / "pretrain" / "mlim-mlm+recon-mam-emoji" / "seed0"
    probes = json.loads((run / "probes.json").read_text())
    value = probes["mlm"]["conditions"]["true"]["mean"]
    assert found["metrics"]["mlm"]["rows"]["both"]["values"] == {"0": value}
    assert found["claims"][0]["verdict"] == "not measured yet"
    assert (work / "tables.png").stat().st_size > 0


def test_what_is_complete_costs_nothing_and_is_left_out_of_what_remains(
    killed: Killed,
    given: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, _, _ = killed
    words = [f"--matrix={given}", f"--work={work}", ONE]
    assert main([*words, "--dry_run"]) == 0
    assert "0 of 3 stages remain: about 0 s" in capsys.readouterr().out
    before = {path: path.stat().st_mtime for path in markers(work)}
    assert main(words) == 0
    assert {path: path.stat().st_mtime for path in markers(work)} == before


def test_a_smaller_share_is_part_of_a_larger_one_and_all_is_held_out(
    killed: Killed, given: Path
) -> None:
    place = Place(work=killed[0], inputs={})
    stages = [one for one in plan(load(str(given))) if one.name.startswith("data/")]
    schedule = Schedule(place, stages, jobs=1, seconds={}, threads=1)
    with locked(place.work) as lock:
        assert schedule.run(minutes=None, lock=lock) == {}
    data = killed[0] / "data"
    uids = {
        (name, split): set(
            np.concatenate(
                [
                    np.load(path)["uid"]
                    for path in sorted((data / name / split).glob("*.index.npy"))
                ]
            ).tolist()
        )
        for name in ("emoji", "emoji-0.5")
        for split in ("train", "val")
    }
    assert uids["emoji", "val"] == uids["emoji-0.5", "val"]
    half = uids["emoji-0.5", "train"]
    assert half < uids["emoji", "train"]
    assert 0.3 < len(half) / len(uids["emoji", "train"]) < 0.7
    quarter = denied(data / "emoji", split="train", fraction=0.25)
    assert uids["emoji", "train"] - set(quarter.tolist()) < half
    assert not len(denied(data / "emoji", split="train", fraction=1.0))


def test_a_row_is_fine_tuned_and_measured_on_pairs_that_are_made_for_it(
    killed: Killed, given: Path
) -> None:
    work, _, _ = killed
    said = replicate(given, work, "--only=tuned,0")
    assert "6/6" in said
    assert "pretrain/" not in said
    run = work / "finetune" / "matching" / "mlim-mlm+recon-mam-emoji-mdo" / "seed0"
    result = json.loads((run / "matching.json").read_text())
    assert result["modality_dropout"] == {"text_only": 0.5, "image_only": 0.25}
    found = json.loads((work / "tables.json").read_text())["tables"]["tuned"]
    value = found["metrics"]["both"]["rows"]["tuned"]["values"]["0"]
    assert value == result["metrics"]["pr_auc_both"]["value"]
    kept = read("pr_auc_both", run / "matching.npz")
    assert len(kept.items) == result["n_pairs"]
    assert kept.measure(np.ones(len(kept.items))) == pytest.approx(value)


def test_one_row_and_seed_needs_no_other(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--matrix={given}", f"--work={tmp_path}", "--dry_run"]
    main([*words, "--only=both,1"])
    said = capsys.readouterr().out
    assert "3 of 3 stages remain" in said
    assert "seed0" not in said
    assert "-0.5" not in said
    with pytest.raises(
        ValueError, match="--only third: the rows are both, half, tuned"
    ):
        main([*words, "--only=third"])


def test_time_that_is_up_stops_what_runs_and_says_so(
    given: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        command(given, tmp_path / "work", "--minutes=0.01"),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 75, done.stdout
    assert "stopped   data/emoji" in done.stdout
    assert "nothing is measured yet" in done.stdout


def test_other_keys_than_a_stage_was_made_with_are_refused(
    shards: Path, killed: Killed, tmp_path: Path
) -> None:
    work, _, _ = killed
    values = matrix(shards)
    values["models"]["mlim"]["pretrain"]["optimizer.lr"] = 0.5  # type: ignore[index]
    other = write(tmp_path / "other.yaml", values)
    with pytest.raises(ValueError, match=r"--optimizer\.lr=0\.5.*take a new --work"):
        main([f"--matrix={other}", f"--work={work}"])


def test_two_replications_in_one_folder_are_refused(
    given: Path, tmp_path: Path
) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match="another replication is at work"),
    ):
        main([f"--matrix={given}", f"--work={tmp_path}"])


def test_a_failed_stage_is_told_with_its_last_words_and_others_go_on(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = matrix(shards)
    words = values["datasets"]["emoji"]["preprocess"]  # type: ignore[index]
    words["columns.caption"] = "captoin"
    given = write(tmp_path / "wrong.yaml", values)
    assert main([f"--matrix={given}", f"--work={tmp_path / 'work'}"]) == 1
    said = capsys.readouterr().out
    assert "data/emoji: pipeline.preprocess: error:" in said
    assert "captoin" in said


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        ("rows.both", "objectivs", ["mlm"], r"unknown key 'objectivs'.*'objectives'"),
        ("rows.both", "objectives", ["mlm", "reckon"], "Did you mean 'recon'"),
        ("rows.both", "masking", "man", "Did you mean 'mam'"),
        ("rows.both", "fraction", 0, "above 0, at most 1"),
        ("rows.both", "fraction", "half", "'half': a float is wanted"),
        ("tables.data", "reference", "bth", "Did you mean 'both'"),
        ("tables.data", "metrics", ["mml"], "Did you mean 'mlm'"),
        ("tables.data", "task", None, "a str is wanted"),
        ("tasks.probes", "results", "x", "Did you mean 'result'"),
    ],
)
def test_a_matrix_with_a_mistake_is_refused_with_the_cure(
    shards: Path, tmp_path: Path, place: str, key: str, value: object, said: str
) -> None:
    values = matrix(shards)
    part = values
    for name in place.split("."):
        part = part[name]  # type: ignore[assignment]
    part[key] = value
    with pytest.raises(ValueError, match=said):
        load(str(write(tmp_path / "wrong.yaml", values)))


def test_a_corpus_that_is_not_given_is_asked_for(shards: Path, tmp_path: Path) -> None:
    values = matrix(shards)
    del values["datasets"]["emoji"]["preprocess"]["config"]  # type: ignore[index]
    given = write(tmp_path / "asks.yaml", values)
    words = [f"--matrix={given}", f"--work={tmp_path}", "--dry_run"]
    with pytest.raises(ValueError, match=r"Give --inputs\.emoji PATH"):
        main(words)
    assert main([*words, f"--inputs.emoji={shards}"]) == 0


def measured(place: Place, given: Path, values: dict[str, list[float]]) -> None:
    """Markers as evaluations of the two rows leave them, with these values."""
    wanted = load(str(given))
    stages = {stage.name: stage for stage in plan(wanted)}
    for row, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            stage = stages[evaluation(wanted, wanted.rows[row], "probes", seed)]
            path = place.marker(stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            true = {"mean": value, "ci95": [value - 0.25, value + 0.5]}
            result = {"mlm": {"conditions": {"true": true}}}
            marker = {"words": list(stage.words), "seconds": 2.0, "result": result}
            path.write_text(json.dumps(marker))


def test_tables_have_each_seed_the_paired_test_and_the_papers_answer(
    given: Path, tmp_path: Path
) -> None:
    place = Place(work=tmp_path, inputs={})
    measured(place, given, {"both": [4.0, 4.1], "half": [4.5, 4.6001]})
    found = tables(load(str(given)), place)
    rows = found["data"]["metrics"]["mlm"]["rows"]
    assert rows["half"]["values"] == {0: 4.5, 1: 4.6001}
    assert rows["half"]["mean"] == pytest.approx(4.55005)
    assert rows["half"]["std"] == pytest.approx(0.1001 / 2**0.5)
    assert rows["half"]["difference"] == pytest.approx(0.50005)
    assert rows["half"]["over_seeds"]["n"] == 2
    assert "difference" not in rows["both"]
    assert found["data"]["claims"][0]["verdict"] == "agrees"
    said = markdown(found)
    assert "| MLM + RECON | 4.050 ± 0.071 | 4.000, 4.100 |  |  |  | 4.2 |" in said
    assert "| +0.500 | +0.499 to +0.501, p 6.4e-05 |" in said
    assert "- Half the data is worse. Here, MLM: +0.500" in said
    assert said.rstrip().endswith("**Agrees.**")


def test_a_single_seed_has_its_interval_over_test_items(
    given: Path, tmp_path: Path
) -> None:
    place = Place(work=tmp_path, inputs={})
    measured(place, given, {"both": [4.0], "half": [4.5]})
    found = tables(load(str(given)), place)
    rows = found["data"]["metrics"]["mlm"]["rows"]
    assert rows["half"]["intervals"] == {0: [4.25, 5.0]}
    assert "| 4.500 [4.250, 5.000] | +0.500 |" in markdown(found)


def test_what_remains_is_estimated_by_what_was_measured(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(work=tmp_path, inputs={})
    measured(place, given, {"both": [4.0], "half": [4.5]})
    assert main([f"--matrix={given}", f"--work={tmp_path}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "2 s  evaluate/probes/mlim-mlm+recon-mam-emoji/seed1" in said
    assert "15 of 17 stages remain" in said
    assert "13 stages that nobody has timed" in said


def kept_scores(path: Path, *, sure: float, seed: int, n: int = 300) -> float:
    """Scores of an evaluation that knows so much; its PR AUC."""
    labels = np.arange(n) % 2
    noise = np.random.default_rng(seed).normal(size=n)
    scores = sure * labels + noise
    np.savez(path, scores_both=scores, labels=labels, groups=np.arange(n) // 3)
    return AveragePrecision(scores, labels)()


def test_rows_are_compared_over_seeds_and_over_test_items(tmp_path: Path) -> None:
    metric = Metric(title="PR AUC", value="", predictions="pr_auc_both")
    rows = {}
    for name, sure in (("much", 2.0), ("little", 0.5)):
        files = {seed: tmp_path / f"{name}{seed}.npz" for seed in range(3)}
        values = {
            seed: kept_scores(path, sure=sure, seed=seed)
            for seed, path in files.items()
        }
        rows[name] = Measured(values=values, files=files)
    found = compared(metric, rows["much"], rows["little"])
    assert found["over_items"]["mean"] == pytest.approx(found["difference"])
    low, high = found["over_items"]["ci95"]
    assert 0 < low < found["difference"] < high
    assert found["over_items"]["n"] == 300
    again = compared(metric, rows["little"], rows["much"])
    assert again["over_items"]["ci95"] == pytest.approx((-high, -low))
    kept_scores(rows["little"].files[1], sure=0.5, seed=1, n=297)
    with pytest.raises(ValueError, match="measured on other test items"):
        compared(metric, rows["much"], rows["little"])


def words_of(matrix: str) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.words for stage in plan(load(matrix))}


def test_a_rows_keys_become_the_words_of_its_commands() -> None:
    words = words_of("small")
    uniform = words["pretrain/mlim-mlm+recon-uniform-emoji/seed2"]
    assert {"--mask.policy=uniform", "--model.itm_weight=0", "--seed=2"} <= set(uniform)
    assert "--model.recon_weight=10.0" in uniform
    dropped = words["finetune/matching/mlim-mlm-mam-emoji-mdo/seed0"]
    assert {"--text_only=0.25", "--image_only=0.25"} <= set(dropped)
    scratch = words["finetune/matching/mlim-mlm+recon-mam-emoji-scratch/seed0"]
    assert {"--from_scratch=true", "--text_only=0", "--image_only=0"} <= set(scratch)
    assert "--pairs={work}/pairs/emoji/train/pairs.npy" in scratch
    contrast = words["evaluate/zero_shot/maskvlm-itc-joint-variants/seed0"]
    both = words["evaluate/zero_shot/maskvlm-itc+itm-joint-variants/seed0"]
    assert "--candidates=0" in contrast
    assert "--candidates=16" in both
    shares = {name for name in words_of("full") if name.startswith("data/flickr8k")}
    assert {"data/flickr8k-0.1", "data/flickr8k-0.25", "data/flickr8k-0.5"} < shares
