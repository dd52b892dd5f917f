"""`--init DIR` starts from weights alone, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.sequence import launch_all
from tests.trainer.tiny import column, config
from trainer import checkpoint
from trainer.build import build_model
from trainer.check import check
from trainer.contract import complete_checkpoints
from trainer.dataset import Dataset
from trainer.export import ExportConfig, export
from trainer.initial import require_fit


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run `a` of three steps, runs from its weights, and an export."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("init")
    data = f"--data={shards}"
    first = [data, f"--output={folder / 'a'}", "--max_steps=3"]
    launch_all(1, [first], folder / "first.json")
    newest = complete_checkpoints(folder / "a")[-1][1]
    (folder / "export").mkdir()
    weights = checkpoint.load_weights(newest)
    save_file(weights, folder / "export" / "model.safetensors")
    sources = {"run": folder / "a", "checkpoint": newest, "export": folder / "export"}
    # Without a learning rate the weights stay as they were given.
    still = [data, "--optimizer.lr=0", "--max_steps=1"]
    calls = [
        [*still, f"--output={folder / name}", f"--init={source}"]
        for name, source in sources.items()
    ]
    resumed = [*still, f"--output={folder / 'run'}", "--max_steps=2", "--init=gone"]
    printed = launch_all(1, [*calls, resumed], folder / "from.json")
    assert "--init gone is not looked at" in printed
    return folder


@pytest.mark.parametrize("name", ["run", "checkpoint", "export"])
def test_a_run_starts_from_given_weights_at_step_0(trained: Path, name: str) -> None:
    given = checkpoint.load_weights(complete_checkpoints(trained / "a")[-1][1])
    _, path = complete_checkpoints(trained / name)[-1]
    taken = checkpoint.load_weights(path)
    assert given.keys() == taken.keys()
    assert all(torch.equal(given[key], taken[key]) for key in given)
    assert column(trained / name, "step")[0] == 1
    first = column(trained / name, "sample_digest")[0]
    assert first == column(trained / "a", "sample_digest")[0]
    assert checkpoint.read_marker(path)["adam_steps"] <= 2


def test_weights_of_another_model_are_refused_by_name_and_shape(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    init = f"--init={trained / 'a'}"
    deeper = config(shards, tmp_path / "new", init, "--model.layers=3")
    with pytest.raises(ValueError, match=r"lacks blocks\.2\..*Take the recipe"):
        check(deeper)
    longer = config(shards, tmp_path / "new", init, "--text.max_tokens=32")
    with pytest.raises(ValueError, match=r"text_positions\S* is \[48, 32\], .*\[32, 3"):
        check(longer)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["run", "checkpoint", "export"])
def test_weights_of_a_model_that_computes_otherwise_are_refused(
    trained: Path, shards: Path, tmp_path: Path, source: str
) -> None:
    newest = complete_checkpoints(trained / "a")[-1][1]
    folder = {"run": trained / "a", "checkpoint": newest, "export": tmp_path / "out"}
    if source == "export":
        export(ExportConfig(run=str(trained / "a"), output=str(tmp_path / "out")))
    init = f"--init={folder[source]}"
    check(config(shards, tmp_path / "new", init))
    keys = ("--model.heads=4", "--model.norm_eps=1e-5")
    with pytest.raises(
        ValueError, match=r"give --model\.heads 2 \(now 4\), --model\.norm_eps 1e-12"
    ):
        check(config(shards, tmp_path / "new", init, *keys))


def test_a_checkpoint_is_known_by_a_relative_path_too(
    trained: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = complete_checkpoints(trained / "a")[-1][1]
    monkeypatch.chdir(newest.parent)
    new = config(shards, tmp_path / "new", f"--init={newest.name}", "--model.heads=4")
    with pytest.raises(ValueError, match="computes otherwise"):
        check(new)


def test_an_itm_head_may_be_new_but_not_half_there(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    itm = ("--model.itm_weight=1", "--model.itm_group=3")
    new = config(shards, tmp_path / "new", f"--init={trained / 'a'}", *itm)
    check(new)
    tokenizer = Dataset(str(shards), "train").tokenizer
    optional = new.model.optional
    with_head, plain = build_model(new, tokenizer), trained / "a"
    without = build_model(config(shards, tmp_path, f"--init={plain}"), tokenizer)
    require_fit(without, with_head.state_dict(), source="there", optional=optional)
    half = {k: v for k, v in with_head.state_dict().items() if k != "itm_head.bias"}
    with pytest.raises(ValueError, match=r"lacks itm_head\.bias"):
        require_fit(with_head, half, source="there", optional=optional)


def test_weights_for_other_tokens_are_refused(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "a", run)
    path, marker = checkpoint.newest(run) or (run, {})
    checkpoint.write_json(
        path / "complete.json", marker | {"tokenizer_sha256": "f" * 64}
    )
    with pytest.raises(
        ValueError, match="preprocess the data with the run's tokenizer"
    ):
        check(config(shards, tmp_path / "new", f"--init={run}"))


def test_an_export_with_other_words_is_refused(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "export"
    other.mkdir()
    shutil.copy(trained / "export" / "model.safetensors", other)
    words = (shards / "tokenizer" / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(words)
    check(config(shards, tmp_path / "new", f"--init={other}"))
    (other / "tokenizer.json").write_text(words + "\n")
    with pytest.raises(
        ValueError, match="preprocess the data with the run's tokenizer"
    ):
        check(config(shards, tmp_path / "new", f"--init={other}"))


def test_a_directory_without_weights_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights: give a run directory"):
        check(config(shards, tmp_path / "new", f"--init={tmp_path}"))
