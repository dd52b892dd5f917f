"""Mistakes of a matrix, its corpora and its folder are found before hours are spent;
what rows lack is left out of their commands and tables.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.replicate import main
from benchmarks.replication.checking import check
from benchmarks.replication.matrix import load
from benchmarks.replication.schedule import Place, kept_sha256
from benchmarks.replication.stages import Stage, evaluation, plan
from benchmarks.replication.tables import tables
from tests.benchmarks.test_replicate import matrix, measured, words_of, write


@pytest.fixture(scope="module")
def given(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("matrix") / "tiny.yaml", matrix(shards))


@pytest.mark.parametrize("name", ["small", "photos", "full"])
def test_commands_of_the_matrices_parse(name: str, shards: Path) -> None:
    inputs = {"flickr8k": str(shards), "fashion": str(shards)}
    check(plan(load(name)), Place(work=shards / "none", inputs=inputs))


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        ("tasks.probes.evaluate", "drews", 1, "evaluate/probes/.*Did you mean 'draws'"),
        ("tasks.matching.finetune", "lr", "fast", "finetune/matching/.*lr"),
        ("models.mlim.pretrain", "config", "mlim-tinyx", "pretrain/.*'mlim-tinyx'"),
        ("datasets.emoji.preprocess", "split.val", 7, "data/emoji: .*split.val"),
        ("rows.both", "pretrained", False, "probes what was learned in pretraining"),
        ("", "seeds", [], "at least one"),
        ("", "seeds", [0, 1, 0], "each of them once"),
    ],
)
def test_a_mistake_in_a_command_is_found_before_anything_runs(
    shards: Path, tmp_path: Path, place: str, key: str, value: object, said: str
) -> None:
    values = matrix(shards)
    part = values
    for name in filter(None, place.split(".")):
        part = part[name]  # type: ignore[assignment]
    part[key] = value
    given = write(tmp_path / "wrong.yaml", values)
    with pytest.raises(ValueError, match=said):
        main([f"--matrix={given}", f"--work={tmp_path / 'work'}"])
    assert not (tmp_path / "work").exists()


def test_a_corpus_that_is_not_there_and_a_file_as_work_are_refused(
    shards: Path, given: Path, tmp_path: Path
) -> None:
    values = matrix(shards)
    del values["datasets"]["emoji"]["preprocess"]["config"]  # type: ignore[index]
    asks = write(tmp_path / "asks.yaml", values)
    words = [f"--matrix={asks}", f"--work={tmp_path / 'work'}", "--dry_run"]
    with pytest.raises(ValueError, match=r"--inputs\.emoji .*no such file or folder"):
        main([*words, f"--inputs.emoji={tmp_path / 'none.tsv'}"])
    assert main([*words, "--inputs.emoji=s3://bucket/emoji.parquet"]) == 0
    with pytest.raises(ValueError, match="is a file: give a folder"):
        main([f"--matrix={given}", f"--work={given}", "--dry_run"])
    with pytest.raises(
        ValueError, match=r"emojy: .*Did you mean 'emoji'. It takes --i"
    ):
        main([*words, "--inputs.emojy=x"])
    with pytest.raises(ValueError, match=r"emoji: .*not ask for it\. It takes none"):
        main([f"--matrix={given}", f"--work={tmp_path / 'work'}", "--inputs.emoji=x"])
    with pytest.raises(ValueError, match=r"is no folder of a replication and holds "):
        main([f"--matrix={given}", f"--work={shards}", "--minutes=0"])
    assert not (shards / "lock").exists()


def test_tables_replace_no_file_of_another_hand(given: Path, tmp_path: Path) -> None:
    mine = tmp_path / "notes.md"
    mine.write_text("mine")
    words = [f"--matrix={given}", f"--work={tmp_path / 'work'}", "--minutes=0"]
    for more in ([], ["--dry_run"]):
        with pytest.raises(
            ValueError, match=r"would replace .*notes\.md.*another name"
        ):
            main([*words, f"--output={tmp_path / 'notes'}", *more])
    assert [mine.read_text(), list(tmp_path.iterdir())] == ["mine", [mine]]
    # Their own they do.
    for _ in range(2):
        main([*words, f"--output={tmp_path / 'tables'}"])
    assert (tmp_path / "tables.md").is_file()


def test_what_was_made_of_another_corpus_is_refused(tmp_path: Path) -> None:
    stage = Stage(
        name="data/emoji",
        words=("pipeline.preprocess", "--input={input:emoji}"),
        needs=(),
        costs=(),
    )
    place = Place(work=tmp_path, inputs={"emoji": "first.tsv", "else": "a"})
    assert place.inputs_of(stage) == {"emoji": "first.tsv"}
    path = place.marker(stage)
    path.parent.mkdir(parents=True)
    marker = {"words": stage.words, "seconds": 1, "inputs": place.inputs_of(stage)}
    path.write_text(json.dumps(marker))
    assert place.done(stage)
    assert Place(work=tmp_path, inputs={}).done(stage)
    assert Place(work=tmp_path, inputs={"emoji": "./first.tsv"}).done(stage)
    with pytest.raises(ValueError, match=r"made of first\.tsv.*is second\.tsv"):
        Place(work=tmp_path, inputs={"emoji": "second.tsv"}).done(stage)


def test_predictions_of_another_evaluation_than_counts_are_refused(
    given: Path, tmp_path: Path
) -> None:
    place = Place(work=tmp_path, inputs={})
    measured(place, given, {"both": [4.0]})
    wanted = load(str(given))
    (name,) = {evaluation(wanted, wanted.rows["both"], "probes", 0)}
    (stage,) = (stage for stage in plan(wanted) if stage.name == name)
    assert stage.result
    kept = (tmp_path / stage.result).with_suffix(".npz")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"first")
    marker = json.loads(place.marker(stage).read_text())
    marker["kept_sha256"] = kept_sha256(kept)
    place.marker(stage).write_text(json.dumps(marker))
    assert tables(wanted, place)
    kept.write_bytes(b"second")
    with pytest.raises(ValueError, match="of another evaluation than the one"):
        tables(wanted, place)
    kept.unlink()
    assert tables(wanted, place)


def test_rows_without_the_objective_of_a_metric_are_left_out(
    shards: Path, tmp_path: Path
) -> None:
    values = matrix(shards)
    values["tasks"]["probes"]["metrics"]["mlm"]["objective"] = "recon"  # type: ignore[index]
    values["rows"]["half"]["objectives"] = ["mlm"]  # type: ignore[index]
    path = tmp_path / "less.yaml"
    with pytest.raises(ValueError, match="row half, which lacks recon"):
        load(str(write(path, values)))
    values["tables"]["data"]["claims"] = []  # type: ignore[index]
    found = tables(load(str(write(path, values))), Place(work=tmp_path, inputs={}))
    assert list(found["data"]["metrics"]["mlm"]["rows"]) == ["both"]


def test_a_row_of_contrast_alone_is_tuned_and_measured_by_it() -> None:
    words = words_of("small")
    alone = "maskvlm-itc-joint-variants/seed0"
    assert "--matching=false" in words[f"finetune/retrieval/{alone}"]
    assert "--candidates=0" in words[f"evaluate/retrieval/{alone}"]
    masked = "maskvlm-mlm+mim-joint-variants/seed0"
    assert "--matching=false" not in words[f"finetune/retrieval/{masked}"]
    assert "--candidates=16" in words[f"evaluate/retrieval/{masked}"]


def test_a_row_without_pretraining_is_measured_with_drawn_weights() -> None:
    stages = {stage.name: stage for stage in plan(load("small"))}
    run = "maskvlm-itc+itm+mlm+mim-joint-variants"
    drawn = stages[f"evaluate/zero_shot/{run}-scratch/seed1"]
    assert drawn.words[1] == f"{{work}}/pretrain/{run}/seed1"
    assert {"--from_scratch=true", "--name=retrieval-scratch"} <= set(drawn.words)
    assert drawn.result == f"pretrain/{run}/seed1/retrieval-scratch.json"
    trained = stages[f"evaluate/zero_shot/{run}/seed1"]
    assert trained.result == f"pretrain/{run}/seed1/retrieval.json"
    assert "--from_scratch=true" not in trained.words
