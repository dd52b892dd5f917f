"""One table of reasons: the code, the guide and a user's filter obey it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import captions, download, jpeg, reasons
from pipeline.criteria import KINDS
from pipeline.filters import Candidate, load_function
from pipeline.shards import StagedShard, shard_stats
from tests.conftest import ROOT

COLUMNS = (
    reasons.FILTERED,
    reasons.NOT_READ,
    reasons.NOT_DECODED,
    reasons.DUPLICATE,
)
FAILED = reasons.NOT_READ | reasons.NOT_DECODED
# The place of the reason among the arguments.
RAISED = {"ImageError": 0, "Filtered": 0, "Rejected": 1}


def raised() -> set[tuple[str, str]]:
    """Exception and reason wherever the code names both."""
    found = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            place = RAISED.get(node.func.id, len(node.args))
            for given in node.args[place : place + 1]:
                if isinstance(given, ast.Constant) and isinstance(given.value, str):
                    found.add((node.func.id, given.value))
    return found


def test_every_reason_has_one_kind() -> None:
    assert sum(map(len, COLUMNS)) == len(frozenset().union(*COLUMNS))
    assert not frozenset(reasons.STATUSES) & frozenset().union(*COLUMNS)


def test_what_the_code_raises_is_in_the_table() -> None:
    found = raised()
    assert len(found) > 20
    for kind, reason in found:
        known = {"ImageError": FAILED, "Filtered": reasons.FILTERED}
        assert reason in known.get(kind, FAILED | reasons.FILTERED), reason
    assert {meaning[1] for meaning in download._MEANINGS} <= FAILED
    assert set(jpeg._FATAL.values()) <= FAILED
    assert set(KINDS) - {"caption_repetition"} == reasons.DUPLICATE
    rules = (captions.EMPTY, captions.PLACEHOLDER, captions.SHORT, captions.REPETITIVE)
    assert reasons.FILTERED.issuperset(rules)


def test_the_guide_has_every_reason_in_its_column() -> None:
    guide = (ROOT / "pipeline" / "README.md").read_text()
    head = "| filtered | failed while reading | failed as an image | duplicate |\n"
    table = guide.partition(head)[2].partition("\n\n")[0]
    told: list[set[str]] = [set(), set(), set(), set()]
    for line in table.splitlines()[1:]:
        cells = line.strip("|").split("|")
        for column, cell in zip(told, cells, strict=True):
            column |= set(re.findall(r"`(\w+)`", cell))
    assert "http_404" in told[1]
    told[1].remove("http_404")
    for words, known in zip(told, COLUMNS, strict=True):
        assert words <= known
        assert all(reason in guide for reason in known - words), known - words


@pytest.mark.parametrize(
    ("failures", "not_read"),
    [
        (["bad_answer", "content_encoding", "several_images"], 3),
        (["images_differ", "bad_text", "http_503", "too_many_rows"], 4),
        (["too_large", "truncated", "killed_decoder"], 0),
    ],
)
def test_stats_count_what_gave_no_image_as_not_downloaded(
    failures: list[str], not_read: int
) -> None:
    shard = StagedShard(
        split="train", samples=1, captions=1, tokens=3, bytes=9, sha256={}
    )
    status = ["success", *["failed"] * len(failures)]
    table = pa.table({"status": status, "reason": [None, *failures]})
    stats = shard_stats(shard, table)
    assert stats["failed_to_download"] == not_read
    assert stats["failed_to_resize"] == len(failures) - not_read


@pytest.mark.parametrize("word", ["success", "failed", "near", "too_small", "http_404"])
def test_a_users_filter_counts_under_no_word_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    module = f"taken_{word}"
    code = f"def keep(candidate):\n    return {word!r}\n"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    keep = load_function(f"{module}:keep")
    from PIL import Image

    image = Image.new("RGB", (4, 4))
    candidate = Candidate(
        image=image, captions=["a bird"], width=4, height=4, columns={}
    )
    with pytest.raises(ValueError, match=f"{module}:keep returned '{word}'.*your own"):
        keep(candidate)
