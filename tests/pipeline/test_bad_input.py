"""Bad input gets one clear line, a non-zero exit, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pipeline.corpora import REPOSITORY, Run, encoded, picture, write_table


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
        ("--deny_uids=/nowhere", "--deny_uids /nowhere cannot be read: No such file"),
        ("--allow_uids=LICENSE", "--allow_uids: line 2 of LICENSE is no uid"),
        ("--where=imaeg > 1", "input table: --where 'imaeg > 1'"),
    ],
)
def test_a_wrong_value_names_the_cure(
    table: Path, tmp_path: Path, preprocess: Run, flag: str, says: str
) -> None:
    assert says in refused(preprocess, tmp_path / "out", f"--input={table}", flag)


@pytest.mark.parametrize("output", ["s3://", "s3:///x", "s3:/bucket/x", "file://"])
@pytest.mark.parametrize("flag", ["--dry_run=false", "--dry_run"])
def test_an_output_without_a_bucket_is_no_folder_here(
    table: Path, tmp_path: Path, preprocess: Run, output: str, flag: str
) -> None:
    result = preprocess(f"--input={table}", f"--output={output}", flag)
    assert result.returncode == 1
    assert "names no bucket or host" in result.stderr.splitlines()[-1]
    assert not Path(REPOSITORY, output.rstrip("/")).exists()


@pytest.mark.parametrize("flag", ["--dry_run=false", "--dry_run"])
def test_an_output_inside_a_dataset(
    table: Path, tmp_path: Path, preprocess: Run, flag: str
) -> None:
    (tmp_path / "made" / ".palimpsest").mkdir(parents=True)
    (tmp_path / "made" / "manifest.json").write_text("{}")
    given = (f"--input={table}", f"--output={tmp_path / 'made' / 'sub' / 'out'}", flag)
    result = preprocess(*given)
    assert result.returncode == 1
    assert f"lies in the dataset {tmp_path / 'made'}" in result.stderr
    assert not (tmp_path / "made" / "sub").exists()


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


def test_an_output_that_the_system_makes_no_folder_for(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    result = preprocess("--output=/proc/no/such", f"--input={table}")
    assert result.returncode == 1
    says = "--output /proc/no/such cannot be created (No such file or directory)"
    assert f"error: {says}: choose another --output" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no mounts of its own here (unshare --mount)")
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), np.uint8)
    images = [encoded(Image.fromarray(each), "PNG") for each in noise]
    table = pa.table({"image": images, "caption": ["a bird"] * len(images)})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "out").mkdir()
    script = """
        mount -t tmpfs -o size=400k none "$1" || exit 99
        "$2" -m pipeline.preprocess "${@:3}"
        echo "first: $?" >&2
        mount -o remount,size=100m "$1" || exit 99
        exec "$2" -m pipeline.preprocess "${@:3}"
    """
    out = tmp_path / "out"
    flags = [f"--output={out / 'shards'}", f"--input={tmp_path / 't.parquet'}"]
    flags += ["--image.format=png", "--image.size=64", "--tokenizer=train:300"]
    flags += ["--workers=1"]
    command = ["unshare", "--mount", "bash", "-c", script, "run", out, sys.executable]
    done = subprocess.run(
        [*map(str, command), *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    says = f"error: the disk of {out / 'shards'} is full: free space; the same command"
    first = done.stderr.partition("first: 1\n")[0]
    assert f"{says} continues" in first.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (done.returncode, "60 inputs" in done.stdout) == (0, True)


@pytest.mark.parametrize("flag", ["--dry_run=false", "--dry_run"])
def test_a_fault_in_a_task_is_one_line_that_names_the_input(
    table: Path, tmp_path: Path, preprocess: Run, flag: str
) -> None:
    source = "def judge(one):\n    return 1 / (one.width - 60)\n"
    (tmp_path / "divides.py").write_text(source)
    flags = [f"--input={table}", f"--output={tmp_path / 'out'}", "--workers=1"]
    flags += ["--filter.function=divides:judge", "--tokenizer=train:300", flag]
    result = preprocess(*flags, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    fault = "--filter.function divides:judge raised ZeroDivisionError('division by zero"
    error = "python -m pipeline.preprocess: error: "
    assert line.startswith(f"{error}input 000000000000 (0.jpg): {fault}')")
    assert line.count("Error") == 1
    assert "Traceback" not in result.stderr


def test_a_relative_output_inside_a_job(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    env = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    out = Path(os.path.relpath(tmp_path / "out"))
    line = refused(preprocess, out, f"--input={table}", env=env)
    assert "give an absolute path" in line


def test_lost_files_whose_verdicts_are_lost_too(
    table: Path, tmp_path: Path, preprocess: Run
) -> None:
    output = tmp_path / "out"
    flags = [f"--input={table}", f"--output={output}", "--tokenizer=train:300"]
    flags += ["--workers=1", "--dedup.exact", "--image.size=32"]
    assert preprocess(*flags).returncode == 0
    for path in (*output.glob("*/shard-*.tar"), *output.glob(".palimpsest/verdicts/*")):
        path.unlink()
    line = preprocess(*flags).stderr.splitlines()[-1]
    assert (
        ".palimpsest/verdicts/000000.npy, which says what of them was dropped" in line
    )
