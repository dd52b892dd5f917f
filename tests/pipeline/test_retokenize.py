"""New tokens give what preprocess would have written, and no pixel is touched."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.index import IndexConfig
from pipeline.indexing import index
from pipeline.manifest import MANIFEST, load_manifest, manifest_seal
from pipeline.retokenize import main
from pipeline.validate import main as validate
from tests.pipeline.corpora import (
    FLAGS,
    REPOSITORY,
    Run,
    caption,
    encoded,
    picture,
    write_table,
)
from tests.pipeline.foreign import img2dataset_shard
from tests.pipeline.test_index import tree

# Captions that have no token with the tokenizer below: those of a whole shard of `val`
# and one of `train`.
SILENT = (caption(0), caption(4), caption(3))


def preprocessed(
    preprocess: Run, corpus: Path, output: Path, tokenizer: str = "train:400"
) -> Path:
    done = preprocess(
        f"--input={corpus}",
        f"--output={output}",
        f"--tokenizer={tokenizer}",
        "--columns.keep=mood",
        "--workers=1",
        *FLAGS,
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of two splits, one with several captions, and inputs of every fate."""
    folder = tmp_path_factory.mktemp("kites")
    rows = []
    for seed in range(20):
        image = encoded(picture(seed)) if seed != 7 else b"no image"
        (folder / f"{seed}.jpg").write_bytes(image)
        texts = [caption(seed), *([caption(50), caption(51)] if seed == 9 else [])]
        for text in ["" if seed == 11 else text for text in texts]:
            split = "val" if seed in (0, 4, 10, 13) else "train"
            row = {"image": f"{seed}.jpg", "split": split, "caption": text}
            rows.append({**row, "mood": "calm"})
    return write_table(folder / "kites.tsv", rows)


@pytest.fixture(scope="module")
def kites(
    corpus: Path, preprocess: Run, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The corpus preprocessed."""
    return preprocessed(preprocess, corpus, tmp_path_factory.mktemp("made") / "kites")


@pytest.fixture(scope="module")
def tokenizer(kites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `kites`, but numbered otherwise and deaf to `SILENT`."""
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    shutil.copytree(kites / "tokenizer", folder)
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    entries = value["model"]["vocab"]
    words = sorted(set(entries) - {token["content"] for token in value["added_tokens"]})
    first = len(entries) - len(words)
    for number, word in enumerate(reversed(words), first):
        entries[word] = number
    deaf = [
        {"type": "Replace", "pattern": {"String": text}, "content": ""}
        for text in SILENT
    ]
    value["normalizer"] = {
        "type": "Sequence",
        "normalizers": [*deaf, value["normalizer"]],
    }
    path.write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("made", ["loaded", "trained"])
def test_the_result_is_what_preprocess_writes_with_that_tokenizer(
    kites: Path,
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    preprocess: Run,
    made: str,
) -> None:
    given = str(tokenizer) if made == "loaded" else "train:64"
    expected = preprocessed(preprocess, corpus, tmp_path / "expected", given)
    output = tmp_path / "output"
    arguments = [str(kites), f"--tokenizer={given}", f"--output={output}"]
    assert main([*arguments, "--workers=2"]) == 0
    assert tree(output) == tree(expected)
    before, after = load_manifest(kites), load_manifest(output)
    assert before.tokenizer.sha256 != after.tokenizer.sha256
    if made == "loaded":
        assert after.accounting.filtered["empty_caption"] == (
            before.accounting.filtered["empty_caption"] + len(SILENT)
        )
        assert len(after.shards) == len(before.shards) - 1
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times
    assert validate([str(output), "--deep", "--workers=1"]) == 0


def test_killed_at_any_moment_the_same_command_finishes(
    kites: Path, tokenizer: Path, tmp_path: Path
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    words = [str(kites), f"--tokenizer={tokenizer}", "--workers=1"]
    assert main([*words, f"--output={calm}"]) == 0
    command = [sys.executable, "-m", "pipeline.retokenize", *words]
    records = killed / ".palimpsest/ranges"
    moments = (
        (killed / ".palimpsest/plan.json").exists,
        lambda: any((killed / ".palimpsest").glob("candidates/*")),
        lambda: any(records.glob("*")),
        (killed / "sizes.json").exists,
    )
    deaths = 0
    for reached in moments:
        process = subprocess.Popen(
            [*command, f"--output={killed}"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not reached():
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        deaths += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
    assert deaths >= 2
    assert main([*words, f"--output={killed}"]) == 0
    assert tree(killed) == tree(calm)


def test_what_cannot_be_retokenized_is_one_clear_line(
    kites: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def refused(folder: Path, message: str, output: Path | None = None) -> None:
        target = output or tmp_path / "new"
        with pytest.raises(ValueError, match=message):
            main([str(folder), f"--tokenizer={tokenizer}", f"--output={target}"])
        assert output is not None or not target.exists()

    refused(tmp_path / "nowhere", "is no complete dataset")
    refused(kites, "another configuration", output=kites)
    bare = tmp_path / "bare"
    shutil.copytree(kites, bare)
    shutil.rmtree(bare / ".palimpsest")
    refused(bare, r"lacks \.palimpsest/plan\.json")
    chosen = tmp_path / "chosen"
    shutil.copytree(kites, chosen)
    value = json.loads((chosen / MANIFEST).read_text())
    value["transform"]["filter"]["min_tokens"] = 3
    text = json.dumps(value, sort_keys=True, indent=1) + "\n"
    (chosen / MANIFEST).write_text(text)
    (chosen / f"{MANIFEST}.sha256").write_text(manifest_seal(text.encode()))
    refused(chosen, "tokens decided which images")


@pytest.mark.parametrize(
    ("name", "place", "item"),
    [
        ("plan.json", ("transform",), []),
        ("plan.json", ("transform", "versions"), 3),
        ("plan.json", ("transform", "image"), None),
        ("plan.json", ("splits",), ["train", "../../../x"]),
        ("ranges/000000.json", ("shards", 0, "split"), "../../../x"),
        ("ranges/000000.json", ("shards", 0, "samples"), None),
        ("ranges/000000.json", ("shards",), {}),
        ("ranges/000000.json", ("accounting",), [1]),
        ("ranges/000000.json", ("retried",), 7),
        ("ranges/000000.json", ("rejected",), {"rejected/range-000000-/x.parquet": ""}),
        ("ranges/000000.json", ("range",), 10**18),
    ],
)
def test_state_that_does_not_fit_the_manifest_is_one_clear_line(
    name: str,
    place: tuple[str | int, ...],
    item: object,
    kites: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(kites, hostile)
    rewritten(hostile / ".palimpsest" / name, place, item)
    before = tree(tmp_path)
    words = [str(hostile), f"--tokenizer={tokenizer}", f"--output={tmp_path / 'new'}"]
    with pytest.raises(ValueError, match=r"sound copy|not those of its|again"):
        main([*words, "--workers=1"])
    assert tree(tmp_path) == before


def rewritten(path: Path, place: tuple[str | int, ...], item: object) -> None:
    """Put something else at a place of a JSON file."""
    value = json.loads(path.read_bytes())
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = item
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("place", "item", "message"),
    [
        (("transform", "text", "placeholders"), ["/(a+)+$/"], "not taken from a"),
        (("transform", "text", "placeholders"), "/(a+)+$/", "sound copy"),
        (("transform", "text", "max_chars"), "x", "sound copy"),
        (("transform", "text", "more"), 1, "sound copy"),
        (("transform", "source"), None, "sound copy"),
        (("transform", "indexed", "check"), [], "sound copy"),
        (("transform",), [], "sound copy"),
    ],
)
def test_rules_of_an_indexed_dataset_are_not_taken_on_its_word(
    place: tuple[str, ...], item: object, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    img2dataset_shard(old, 0, range(3))
    index(IndexConfig(dataset=str(old), tokenizer="train:200", name="b", workers=1))
    rewritten(old / ".palimpsest/index.json", place, item)
    with pytest.raises(ValueError, match=message):
        main([str(old), f"--tokenizer={tokenizer}", f"--output={new}", "--workers=1"])
    assert not new.exists()


def test_indexed_tars_are_linked_and_get_the_tokens_of_a_new_index(
    tokenizer: Path, tmp_path: Path
) -> None:
    old, new, again = (tmp_path / name for name in ("old", "new", "again"))
    for folder in (old, again):
        img2dataset_shard(folder, 0, range(4))
        img2dataset_shard(folder / "validation", 0, range(4, 7))
    keys = {"name": "birds", "check": "header", "workers": 1}
    index(IndexConfig(dataset=str(old), tokenizer="train:200", **keys))
    before = tree(old)
    words = [str(old), f"--tokenizer={tokenizer}", f"--output={new}", "--workers=1"]
    assert main(words) == 0
    assert tree(old) == before
    assert (new / "00000.tar").samefile(old / "00000.tar")
    for name in ("parquet", "_stats.json"):
        for path in again.rglob(f"*{name}"):
            path.unlink()
    index(IndexConfig(dataset=str(again), tokenizer=str(tokenizer), **keys))
    assert tree(new) == tree(again)
    counts = load_manifest(new).accounting
    assert (counts.written, counts.filtered) == (4, {"empty_caption": len(SILENT)})
    assert main(words) == 0
    assert tree(new) == tree(again)
