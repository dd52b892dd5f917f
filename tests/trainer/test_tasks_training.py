"""Fine-tuning: exact resumption, what is kept, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from pipeline.config import ConfigError
from pipeline.manifest import Manifest, file_sha256, load_manifest, manifest_seal
from pipeline.pairs import main as make_pairs
from tests.trainer.tiny import config
from trainer.check import check
from trainer.contract import CHECKPOINTS, complete_checkpoints
from trainer.evaluate import main as evaluate
from trainer.export import main as export
from trainer.finetune import main
from trainer.tasks import tuned
from trainer.tasks.pretrained import load_pretrained
from trainer.tasks.training import order


@pytest.fixture(scope="module")
def pairs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pairs") / "train.npy"
    make_pairs([str(shards), "--column=base", f"--output={output}", "--limit=32"])
    return output


def finetune(run: Path, pairs: Path, output: Path, *more: str) -> Path:
    words = [str(run), "--task=matching", f"--pairs={pairs}", f"--output={output}"]
    main([*words, "--batch=8", "--epochs=1", "--checkpoint_every=2", *more])
    return output


@pytest.fixture(scope="module")
def finished(
    whole: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fine-tuning of eight steps; not to be changed."""
    output = tmp_path_factory.mktemp("tuned") / "tuned"
    return finetune(whole, pairs, output, f"--dev_pairs={pairs}")


def rows(output: Path) -> list[dict[str, Any]]:
    """Metrics without times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        row.pop("step_s")
    return found


def last(output: Path) -> dict[str, torch.Tensor]:
    path = complete_checkpoints(output)[-1][1]
    return load_file(path / "weights.safetensors") | load_file(
        path / "moments.safetensors"
    )


def files(output: Path) -> dict[Path, bytes]:
    """All but what says where the run lies."""
    own = ("finetune.yaml", "origin.json")
    found = [path for path in output.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in found if path.name not in own}


def test_an_interrupted_run_ends_as_if_it_had_not_been(
    whole: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    output, dev = tmp_path / "tuned", f"--dev_pairs={pairs}"
    finetune(whole, pairs, output, dev, "--max_steps=3")
    # Died while it wrote the fourth step, its checkpoint and a line.
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 9.0, "step_s": 0}\n{"step": 5, "lo')
    for name in ("tmp-dead", "step-00000004"):
        (output / CHECKPOINTS / name).mkdir()
        (output / CHECKPOINTS / name / "weights.safetensors").write_bytes(b"half")
    finetune(whole, pairs, output, dev)
    assert rows(output)[:2] == rows(finished)[:2]
    # The call that stopped after three steps measured there, too.
    assert rows(output)[3:] == rows(finished)[3:]
    assert [row["step"] for row in rows(output)] == list(range(1, 9))
    expected, found = last(finished), last(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((output / CHECKPOINTS).glob("tmp-*"))


def test_a_finished_run_is_left_as_it_is(
    whole: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    shutil.copytree(finished, output)
    before = files(output)
    finetune(whole, pairs, output, f"--dev_pairs={pairs}")
    assert before == files(output)


def test_pretraining_does_not_write_into_a_fine_tuning(
    finished: Path, shards: Path
) -> None:
    before = files(finished)
    with pytest.raises(ValueError, match=r"holds a fine-tuning.*another --output"):
        check(config(shards, finished))
    assert before == files(finished)


def test_the_learning_rate_rises_then_falls_and_every_example_comes_once(
    finished: Path,
) -> None:
    rates = [row["lr"] for row in rows(finished)]
    top = int(np.argmax(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < rates[top] / 4
    for epoch in (0, 1):
        assert sorted(order(64, seed=0, epoch=epoch).tolist()) == list(range(64))
    assert not np.array_equal(order(64, seed=0, epoch=0), order(64, seed=0, epoch=1))
    assert not np.array_equal(order(64, seed=0, epoch=0), order(64, seed=1, epoch=0))


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, measured in enumerate([0.5, 0.9, 0.9, 0.7], start=1):
        with torch.no_grad():
            model.bias.fill_(step)
        tuned.save(
            tmp_path, model, optimizer, step=step, final=step == 4, measured=measured
        )
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [2, 4]
    assert tuned.load_best(tmp_path, model) == 2
    assert model.bias.tolist() == [2, 2]
    assert tuned.resume(tmp_path, model, optimizer) == 4
    assert model.bias.tolist() == [4, 4]


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "export"
    export([str(whole), str(output)])
    return output


def test_an_export_is_the_run_that_it_is_of(whole: Path, exported: Path) -> None:
    of_run = load_pretrained(whole, data=None, from_scratch=False, seed=0)
    of_export = load_pretrained(exported, data=None, from_scratch=False, seed=0)
    assert of_export.tokenizer.sha256 == of_run.tokenizer.sha256
    assert of_export.config.model == of_run.config.model
    assert of_export.config.image.size == of_run.config.image.size
    assert of_export.config.text == of_run.config.text
    expected = of_run.model.state_dict()
    for name, weight in of_export.model.state_dict().items():
        assert torch.equal(weight, expected[name])


def test_an_export_has_no_dataset_and_says_so(exported: Path) -> None:
    for task in ("retrieval", "linear_probe"):
        words = [str(exported), f"--task={task}", "--from_scratch"]
        with pytest.raises(ValueError, match="give --data DATASET"):
            evaluate([*words, *["--column=base"] * (task == "linear_probe")])


def test_from_scratch_is_the_same_model_with_drawn_weights(
    whole: Path, pairs: Path, tmp_path: Path
) -> None:
    drawn = load_pretrained(whole, data=None, from_scratch=True, seed=0)
    again = load_pretrained(whole, data=None, from_scratch=True, seed=0)
    other = load_pretrained(whole, data=None, from_scratch=True, seed=1)
    trained = load_pretrained(whole, data=None, from_scratch=False, seed=0)
    name = "words.weight"
    weight = drawn.model.state_dict()[name]
    assert drawn.step == 0
    assert trained.step == 12
    assert torch.equal(weight, again.model.state_dict()[name])
    for one in (other, trained):
        assert not torch.equal(weight, one.model.state_dict()[name])
    run = tmp_path / "run"
    run.mkdir()
    keys = yaml.safe_load((whole / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**keys, "seed": 1}))
    began = load_pretrained(run, data=None, from_scratch=True, seed=None)
    assert torch.equal(began.model.state_dict()[name], other.model.state_dict()[name])
    output = finetune(whole, pairs, tmp_path / "o", "--from_scratch", "--max_steps=1")
    assert tuned.read_keys(output)["from_scratch"] is True


def test_a_folder_that_holds_something_else_is_refused(
    whole: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"lr: 0.0002 -> 0.1.*another --output"):
        finetune(whole, pairs, finished, f"--dev_pairs={pairs}", "--lr=0.1")
    before = (finished / "finetune.yaml").read_bytes()
    with (
        tuned.locked(finished),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        finetune(whole, pairs, finished, f"--dev_pairs={pairs}", "--max_steps=9")
    # Nor has it written anything under the eyes of the other one.
    assert (finished / "finetune.yaml").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(ValueError, match="holds something else"):
        finetune(whole, pairs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    matching = ["--task=matching", f"--pairs={pairs}"]
    with pytest.raises(ValueError, match="fine-tuned already"):
        finetune(finished, pairs, tmp_path / "o")
    with pytest.raises(ValueError, match="neither a run nor an export"):
        finetune(tmp_path, pairs, tmp_path / "o")
    with pytest.raises(
        ValueError, match=r"was fine-tuned.*finetune RUN --task matching"
    ):
        evaluate([str(finished), *matching, "--from_scratch"])
    for run in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=r"is no folder|neither a run nor"):
            evaluate([str(run), *matching])
    with pytest.raises(ValueError, match="is a URL"):
        main([str(whole), "--task=matching", f"--pairs={pairs}", "--output=s3://b/o"])
    assert not (tmp_path / "o").exists()


def test_a_pretraining_run_is_no_place_to_write_to(
    whole: Path, pairs: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(whole, run)
    shutil.copytree(whole, other)
    # As if a fine-tuning had died there before the run began.
    (other / ".finetune.lock").touch()
    for output in (run, other):
        before = files(output)
        with pytest.raises(ValueError, match=r"of trainer\.pretrain.*another --output"):
            finetune(run, pairs, output, "--max_steps=1")
        assert files(output) == before
    # A trainer that has only just begun.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").touch()
    with pytest.raises(ValueError, match="holds something else"):
        finetune(run, pairs, tmp_path / "new", "--max_steps=1")
    # A fine-tuning that died before it had begun goes on.
    died = tmp_path / "died"
    died.mkdir()
    (died / ".finetune.lock").touch()
    (died / "tmp-dead-origin.json").write_text("{")
    finetune(run, pairs, died, "--max_steps=1")
    assert len(rows(died)) == 1


def test_other_pairs_under_the_same_name_are_refused(
    whole: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    output, mine = tmp_path / "tuned", tmp_path / "pairs.npy"
    shutil.copy(pairs, mine)
    finetune(whole, mine, output, "--max_steps=1")
    np.save(mine, np.load(pairs)[::-1])
    with pytest.raises(ValueError, match="of other examples"):
        finetune(whole, mine, output)


@pytest.mark.parametrize("task", ["matching", "retrieval"])
def test_a_dataset_may_move_but_another_one_is_refused(
    whole: Path, shards: Path, pairs: Path, tmp_path: Path, task: str
) -> None:
    words = [f"--task={task}", f"--output={tmp_path / 'tuned'}", "--batch=8"]
    words += [f"--pairs={pairs}"] * (task == "matching")
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(shards, moved)
    shutil.copytree(shards, other)
    manifest = load_manifest(shards)
    reseal(other, replace(manifest, rows=manifest.rows + 1))
    main([str(whole), *words, f"--data={shards}", "--max_steps=1"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data\.sha256 is of other examples"):
            main([str(whole), *words, f"--data={other}", "--max_steps=2"])
    main([str(whole), *words, f"--data={moved}", "--max_steps=2"])
    assert [row["step"] for row in rows(tmp_path / "tuned")] == [1, 2]


def test_without_a_hash_of_its_dataset_only_the_path_tells_which_it_is(
    whole: Path, shards: Path, pairs: Path, tmp_path: Path
) -> None:
    """A fine-tuning that was begun before there was one."""
    output, other = tmp_path / "tuned", tmp_path / "other"
    finetune(whole, pairs, output, f"--data={shards}", "--max_steps=1")
    (output / "data.sha256").unlink()
    shutil.copytree(shards, other)
    manifest = load_manifest(shards)
    reseal(other, replace(manifest, rows=manifest.rows + 1))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"data: .* -> .*other'\): take another"):
        finetune(whole, pairs, output, f"--data={other}", "--max_steps=2")
    found = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert found == before
    finetune(whole, pairs, output, f"--data={shards}", "--max_steps=2")
    assert (output / "data.sha256").is_file()


def test_what_a_fine_tuning_began_with_stays_what_it_was(
    whole: Path, pairs: Path, tmp_path: Path
) -> None:
    """Pretraining went on after it: here, from step 5 of the run to its last one."""
    run, begun, output = tmp_path / "run", tmp_path / "begun", tmp_path / "tuned"
    shutil.copytree(whole, run)
    (step, newest), kept = complete_checkpoints(run)[-1], tmp_path / "newest"
    newest.rename(kept)
    assert complete_checkpoints(run)[-1][0] < step
    finetune(run, pairs, output, "--max_steps=1")
    shutil.copytree(output, begun)
    shutil.rmtree(begun / CHECKPOINTS)
    origin = (output / "origin.json").read_bytes()
    kept.rename(newest)
    finetune(run, pairs, output, "--max_steps=2")
    assert (output / "origin.json").read_bytes() == origin
    assert tuned.load_start(output, seed=0).step == json.loads(origin)["step"] < step
    # Without a checkpoint it would begin anew, with other weights.
    finetuning = (begun / "finetune.yaml").read_text()
    (begun / "finetune.yaml").write_text(finetuning.replace(str(output), str(begun)))
    (begun / "data.sha256").unlink()
    before = files(begun)
    with pytest.raises(ValueError, match=rf"which has changed \(now {step} steps\)"):
        finetune(run, pairs, begun, "--max_steps=2")
    # A call that is refused leaves no trace.
    assert files(begun) == before


def test_without_a_hash_of_its_model_the_step_tells_which_it_is(
    whole: Path, pairs: Path, tmp_path: Path
) -> None:
    """A fine-tuning that was begun before there was one, and has no checkpoint."""
    output = tmp_path / "tuned"
    finetune(whole, pairs, output, "--max_steps=1")
    shutil.rmtree(output / CHECKPOINTS)
    origin = json.loads((output / "origin.json").read_text())
    del origin["weights_sha256"]
    # Where the words lie is no part of what they are.
    origin["tokenizer"]["path"] = "elsewhere"
    (output / "origin.json").write_text(json.dumps({**origin, "step": 5}))
    with pytest.raises(ValueError, match=r"of 5 steps.* changed \(now 12 steps\)"):
        finetune(whole, pairs, output, "--max_steps=1")
    (output / "origin.json").write_text(json.dumps(origin))
    finetune(whole, pairs, output, "--max_steps=1")
    assert complete_checkpoints(output)[-1][0] == 1
    origin["tokenizer"]["sha256"] = "0"
    (output / "origin.json").write_text(json.dumps(origin))
    with pytest.raises(ValueError, match="words of tokenizer 0"):
        finetune(whole, pairs, output, "--max_steps=1")


def reseal(dataset: Path, manifest: Manifest) -> None:
    (dataset / "manifest.json").write_text(manifest.to_json())
    seal = manifest_seal(manifest.to_json().encode())
    (dataset / "manifest.json.sha256").write_text(seal)


def test_data_of_another_tokenizer_is_refused_unless_nothing_was_learnt(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    words, manifest = other / "tokenizer" / "tokenizer.json", load_manifest(shards)
    words.write_text(words.read_text() + "\n")
    info = replace(manifest.tokenizer, sha256=file_sha256(words))
    files = {**manifest.files, "tokenizer/tokenizer.json": info.sha256}
    changed = replace(manifest, tokenizer=info, files=files)
    reseal(other, changed)
    with pytest.raises(ValueError, match=r"pipeline\.retokenize"):
        load_pretrained(whole, data=str(other), from_scratch=False, seed=0)
    drawn = load_pretrained(whole, data=str(other), from_scratch=True, seed=0)
    assert drawn.tokenizer.sha256 == info.sha256


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["r", "--output=o"], "--task must be given: one of .*matching"),
        (["r", "--output=o", "--task=matchin"], "Did you mean 'matching'"),
        (["r", "--output=o", "--task=matching"], "pairs"),
        (["r", "--output=o", "--task=matching", "--pairs=p", "--lr=-1"], "lr is -1"),
        (
            ["r", "--output=o", "--task=matching", "--pairs=p", "--epochs=0"],
            "more than 0",
        ),
        (
            ["r", "--output=o", "--task=matching", "--pairs=p", "--text_only=0.8"],
            "more than all items",
        ),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_read(
    words: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        main(words)
