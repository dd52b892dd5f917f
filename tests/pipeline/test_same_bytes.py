"""The same bytes with every filter and comparison on, whatever the number of workers
and however finely the comparison is cut.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.compare import Comparison
from pipeline.manifest import load_manifest, sample_uid
from tests.pipeline.corpora import Run, caption, encoded, picture, run_module
from tests.pipeline.test_preprocess import files, rows

# Enough that the smallest tasks need several buckets.
N_INPUTS, N_PICTURES = 2_200, 800
_RULES = """
def few_red(candidate):
    red, green, blue = candidate.image.resize((1, 1)).getpixel((0, 0))
    return "mostly_red" if red > green + 40 and red > blue + 40 else None
"""
FLAGS = (
    *("--columns.id=id", "--split.column=split", "--shard.samples=150"),
    *("--image.size=16", "--tokenizer=train:300", "--where=width > 3"),
    *("--filter.min_size=18", "--filter.max_aspect=2.5", "--filter.min_tokens=2"),
    *("--filter.max_tokens=40", "--filter.function=same_bytes_rules:few_red"),
    *("--text.min_chars=4", "--text.max_word_share=0.6"),
    *("--dedup.exact", "--dedup.near=3", "--dedup.caption_repeats=1"),
)
_SPAM = "sale sale sale sale sale sale sale sale"
_SIZES = ((24, 20), (24, 20), (24, 20), (24, 20), (60, 20), (20, 16), (30, 40))


def write_corpus(path: Path) -> Path:
    """Pictures over and over: as they are, as other files, and in less quality."""
    draw = np.random.default_rng(7)
    made = [picture(seed, _SIZES[seed % len(_SIZES)]) for seed in range(N_PICTURES)]
    numbers = draw.integers(0, N_PICTURES, N_INPUTS)
    kinds = draw.integers(0, 10, N_INPUTS)
    images = [encode(made[n], kind) for n, kind in zip(numbers, kinds, strict=True)]
    table = {
        "image": images,
        # Some ids come twice, far apart.
        "id": [str(n if n % 50 else n // 2) for n in range(N_INPUTS)],
        "caption": [
            caption(int(seed)) if seed % 9 else _SPAM
            for seed in draw.integers(0, 700, N_INPUTS)
        ],
        "split": np.where(draw.random(N_INPUTS) < 0.1, "val", "train").tolist(),
        "width": draw.integers(0, 100, N_INPUTS).tolist(),
    }
    pq.write_table(pa.table(table), path, row_group_size=500)
    return path


def encode(image: Image.Image, kind: int) -> bytes:
    if kind == 0:
        return b"no image"
    if kind < 3:
        return encoded(image, "PNG")
    return encoded(image, quality=70 + 3 * int(kind))


def test_workers_and_buckets_decide_no_byte(tmp_path: Path, preprocess: Run) -> None:
    table = write_corpus(tmp_path / "many.parquet")
    (tmp_path / "same_bytes_rules.py").write_text(_RULES)
    denied = "\n".join(f"{sample_uid('many', str(n)):016x}" for n in range(30, 50))
    (tmp_path / "deny.txt").write_text(denied)
    made = {}
    for workers, bucket_mb in ((1, 256), (2, 1)):
        output = tmp_path / str(workers)
        result = preprocess(
            *(f"--input={table}", f"--output={output}", *FLAGS),
            *(f"--deny_uids={tmp_path / 'deny.txt'}", f"--workers={workers}"),
            f"--dedup.bucket_mb={bucket_mb}",
            env={"PYTHONPATH": str(tmp_path)},
        )
        assert result.returncode == 0, result.stderr
        made[workers] = files(output)
    assert made[1].keys() == made[2].keys()
    assert [name for name in made[1] if made[1][name] != made[2][name]] == []
    ranges = -(-N_INPUTS // 150)
    parts = {
        Comparison(inputs=N_INPUTS, ranges=ranges, memory=mb * 1_000_000).parts
        for mb in (1, 256)
    }
    assert len(parts) == 2

    # Every rule did something, or there was nothing to be the same.
    accounting = load_manifest(tmp_path / "1").accounting
    assert set(accounting.filtered) == {
        *("where", "denied", "repetitive_caption", "too_small", "aspect"),
        *("mostly_red", "caption_repetition"),
    }
    assert set(accounting.failed) == {"not_an_image"}
    found = rows(tmp_path / "1")
    assert len(found) == accounting.inputs == N_INPUTS
    reasons = Counter(row["reason"] for row in found if row["status"] == "duplicate")
    assert set(reasons) == {"identity", "split", "exact", "near"}
    assert accounting.written > 50
    # What repeats an earlier input names it.
    keys = {row["key"] for row in found}
    assert all(
        row["duplicate_of"] in keys for row in found if row["status"] == "duplicate"
    )
    result = run_module("pipeline.validate", tmp_path / "2", "--deep")
    assert result.returncode == 0, result.stdout + result.stderr
