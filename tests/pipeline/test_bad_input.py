"""Bad input gets one clear line, a non-zero exit, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.corpora import Run, encoded, picture, write_table


@pytest.fixture
def table(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for seed in range(4):
        (folder / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
        rows.append({"image": f"{seed}.jpg", "caption": "a bird", "place": "roof"})
    return write_table(folder / "table.csv", rows)


def refused(
    run: Run, output: Path, *flags: object, env: dict[str, str] | None = None
) -> str:
    """The one line of a refused run, after checking that nothing was written."""
    before = sorted(output.parent.rglob("*"))
    result = run(f"--output={output}", *flags, env=env)
    assert result.returncode in (1, 2)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("python -m pipeline.preprocess: error: ")
    assert "Traceback" not in result.stderr
    assert sorted(output.parent.rglob("*")) == before
    return lines[-1]


def test_missing_input(tmp_path: Path, preprocess: Run) -> None:
    line = refused(preprocess, tmp_path / "out", f"--input={tmp_path / 'no.tsv'}")
    assert "does not exist" in line


def test_unknown_key_names_the_nearest(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    flags = (f"--input={table}", "--image.siez=32")
    assert "image.size" in refused(preprocess, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--columns.image=imaeg", "Did you mean 'image'?"),
        ("--columns.caption=captoin", "Did you mean 'caption'?"),
        ("--columns.id=number", "The columns are: image, caption, place"),
        ("--split.column=plaec", "Did you mean 'place'?"),
        ("--columns.keep=caption", "rename the column"),
        ("--image.size=0", "--image.size is 0"),
        ("--tokenizer=train:many", "train:8000"),
        ("--split.val=1.5", "--split.val is 1.5"),
    ],
)
def test_a_wrong_value_names_the_cure(
    table: Path, tmp_path: Path, preprocess: Run, flag: str, says: str
) -> None:
    assert says in refused(preprocess, tmp_path / "out", f"--input={table}", flag)


def test_no_caption_column(tmp_path: Path, preprocess: Run) -> None:
    path = write_table(tmp_path / "t.csv", [{"image": "a.jpg", "words": "a bird"}])
    line = refused(preprocess, tmp_path / "out", f"--input={path}")
    assert "--columns.caption" in line
    assert "image, words" in line


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "", "cannot be read: it has no header line with column names"),
        ("t.csv", "image,caption\n", "has no rows: the corpus is empty"),
        ("t.csv", "image,caption", "has no rows: the corpus is empty"),
        ("t.tsv", "image\tcaption", "has no rows: the corpus is empty"),
    ],
)
def test_empty_corpus(
    tmp_path: Path, preprocess: Run, name: str, text: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    line = refused(preprocess, tmp_path / "out", f"--input={path}")
    assert line.endswith(f"error: --input {path} {says}")


def test_a_ragged_row_is_an_input_that_failed(tmp_path: Path, preprocess: Run) -> None:
    (tmp_path / "t.tsv").write_text("image\tcaption\na.jpg\ta bird\nb.jpg\n")
    line = refused(preprocess, tmp_path / "out", f"--input={tmp_path / 't.tsv'}")
    assert "nothing could be kept of 2 inputs: 1 bad_text, 1 missing_file" in line


def test_a_file_that_is_no_parquet(tmp_path: Path, preprocess: Run) -> None:
    (tmp_path / "t.parquet").write_bytes(b"not at all")
    line = refused(preprocess, tmp_path / "out", f"--input={tmp_path / 't.parquet'}")
    assert "cannot be read" in line


def test_columns_of_the_wrong_type(tmp_path: Path, preprocess: Run) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"x"], "caption": [7]}), path)
    line = refused(preprocess, tmp_path / "out", f"--input={path}")
    assert "int64, not text" in line


def test_addresses_of_this_machine_are_not_fetched(
    tmp_path: Path, preprocess: Run
) -> None:
    rows = [
        {"image": "http://127.0.0.1:9/a.jpg", "caption": "a bird"},
        {"image": "file:///etc/hostname", "caption": "a bird"},
    ]
    path = write_table(tmp_path / "t.csv", rows)
    line = refused(preprocess, tmp_path / "out", f"--input={path}")
    assert "1 address_refused, 1 path_outside_input" in line


def test_empty_split_cells_are_counted(tmp_path: Path, preprocess: Run) -> None:
    rows = [{"image": "a.jpg", "caption": "a bird", "split": ""}]
    path = write_table(tmp_path / "t.csv", rows)
    flags = (f"--input={path}", "--split.column=split")
    assert "1 missing_split" in refused(preprocess, tmp_path / "out", *flags)


@pytest.mark.parametrize("flag", ["--dry_run=false", "--dry_run"])
def test_a_filter_function_that_is_nowhere_is_told_before_anything_is_made(
    tmp_path: Path, preprocess: Run, flag: str
) -> None:
    # Nothing to train on: a later check would say that instead.
    path = write_table(tmp_path / "t.csv", [{"image": "a.jpg", "caption": ""}])
    flags = (f"--input={path}", "--filter.function=no_such_module:keep", flag)
    line = refused(preprocess, tmp_path / "out", *flags)
    assert "module 'no_such_module' cannot be imported" in line


def test_a_directory_that_is_no_tokenizer(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    (tmp_path / "tok").mkdir()
    flags = (f"--input={table}", f"--tokenizer={tmp_path / 'tok'}")
    assert "not a fast tokenizer" in refused(preprocess, tmp_path / "out", *flags)


def test_a_tokenizer_that_is_nowhere(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    flags = (f"--input={table}", "--tokenizer=./no/such/place")
    line = refused(preprocess, tmp_path / "out", *flags, env={"HF_HUB_OFFLINE": "1"})
    assert "train:8000" in line


def test_a_folder_with_other_things_in_it(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    line = refused(preprocess, tmp_path / "out", f"--input={table}")
    assert "not empty" in line
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_all_images_broken_leaves_nothing(tmp_path: Path, preprocess: Run) -> None:
    rows = [{"image": f"{n}.jpg", "caption": "a bird"} for n in range(3)]
    path = write_table(tmp_path / "t.csv", rows)
    line = refused(preprocess, tmp_path / "out", f"--input={path}", "--workers=1")
    assert "nothing could be kept of 3 inputs: 3 missing_file" in line


def test_an_output_below_the_input_folder(tmp_path: Path, preprocess: Run) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    table = pa.table({"image": [encoded(picture(1))], "caption": ["a bird"]})
    pq.write_table(table, corpus / "t.parquet")
    line = refused(preprocess, corpus / "out", f"--input={corpus}")
    assert "choose an --output outside of it" in line


def test_an_output_that_cannot_be_made(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    line = refused(preprocess, tmp_path / "corpus" / "0.jpg" / "o", f"--input={table}")
    assert "--output" in line
    assert "0.jpg is a file" in line


def test_a_relative_output_inside_a_job(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    env = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    out = Path(os.path.relpath(tmp_path / "out"))
    line = refused(preprocess, out, f"--input={table}", env=env)
    assert "give an absolute path" in line
