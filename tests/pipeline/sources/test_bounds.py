"""A corpus of any size is read in little memory, and a spool survives any death."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.sources.spool import SPOOL
from tests.pipeline.corpora import REPOSITORY
from tests.pipeline.sources.reading import opened, rows

ROWS = 60_000


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, env={**os.environ}
    )


MEMORY = """
import resource, sys
from pipeline.options import InputOptions
from pipeline.sources import open_source
source = open_source(InputOptions(path=sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(len(cursors) for _, cursors in source.scan(["image", "caption"]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count, (after - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_a_scan_holds_a_few_blocks_however_large_the_table(
    tmp_path: Path, kind: str
) -> None:
    texts = {
        "tsv": ("image\tcaption\n", "images/0123.jpg\t" + "word " * 50 + "\n"),
        "csv": ("image,caption\n", 'images/0123.jpg,"' + "word " * 50 + '"\n'),
        "jsonl": ("", '{"image": "0.jpg", "caption": "' + "word " * 50 + '"}\n'),
    }
    header, line = texts[kind]
    path = tmp_path / f"t.{kind}"
    with path.open("w") as file:
        file.write(header)
        for _ in range(200):
            file.write(line * 4000)
    output, _ = start(MEMORY, path).communicate()
    count, megabytes = map(int, output.split())
    assert count == 800_000
    assert path.stat().st_size > 200 << 20
    # What a block of 4 MiB becomes on its way, and what allocators keep of it.
    assert megabytes < 100


GROUP = """
import sys
from pipeline.options import InputOptions
from pipeline.sources import open_source
from pipeline.storage import open_storage
source = open_source(InputOptions(path=sys.argv[1]), group_by="image")
source.spooled(open_storage(sys.argv[2]), "corpus")
"""


def _await(child: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Kill the child once something has happened, unless it ends before."""
    while child.poll() is None:
        # What is looked at may go away meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if happened():
                break
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()


def test_a_spool_is_whole_whenever_its_maker_was_killed(tmp_path: Path) -> None:
    generator = random.Random(0)
    table, out = tmp_path / "t.tsv", tmp_path / "out"
    with table.open("w") as file:
        file.write("image\tcaption\n")
        for number in range(ROWS):
            file.write(f"{generator.randrange(9000)}.jpg\tnumber {number}\n")
    whole = rows(opened(table, spool=tmp_path / "undisturbed", group_by="image"))
    assert len(whole) == ROWS
    moments: list[Callable[[], bool]] = [
        lambda: any(out.rglob("work")),
        lambda: any(path.stat().st_size > 4 for path in out.rglob("work/rows.parquet")),
        lambda: any(out.rglob("work/sort")),
        lambda: any(path.parent.name != "work" for path in out.rglob("rows.parquet")),
        (out / SPOOL / "corpus").exists,
    ]
    killed = 0
    for happened in moments:
        child = start(GROUP, table, out)
        _await(child, happened)
        killed += child.returncode == -signal.SIGKILL
    assert killed >= 3
    assert rows(opened(table, spool=out, group_by="image")) == whole
