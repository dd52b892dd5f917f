"""Any process killed in any phase: the same command ends in the same bytes.

A corpus that takes its time everywhere: images behind a slow web server, large ones to
decode, many small ranges, repetitions of every kind. Runs are hit again and again, once
in every phase, by each kind of process that is there in that phase, and each kill
counts. `test_resume.py` holds a few kills for `make test`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.manifest import load_manifest
from tests.pipeline.corpora import Run, caption, encoded, picture, write_table
from tests.pipeline.kills import Attempt, Phase, Server
from tests.pipeline.test_preprocess import files
from tests.pipeline.web import Reply

pytestmark = pytest.mark.soak

SEED = 0
N_INPUTS, SAMPLES = 176, 4
N_RANGES = N_INPUTS // SAMPLES
FEWEST_KILLS = 30
# A kill that comes too late ends its run; it is tried again in another.
MOST_RUNS = 8
ANSWER_SECONDS = 0.2
SIZE = (300, 200)
FLAGS = (
    f"--shard.samples={SAMPLES}",
    "--image.size=256",
    "--tokenizer=train:500",
    "--split.val=0.2",
    "--dedup.exact",
    "--dedup.near=3",
    "--dedup.caption_repeats=2",
    "--fetch.allow_private",
    "--workers=2",
)
# Which processes there are: Ray starts before the plan is stored, decoders with the
# first image, and workers stay until the end.
ALL = ("driver", "worker", "decoder", "raylet")
RAY = ("driver", "worker", "raylet")
PHASES = (
    Phase(
        name="plan", shows=Attempt.planning, victims=("driver", "raylet"), spread=1.0
    ),
    Phase(name="fetch", shows=Attempt.fetching, victims=ALL, spread=0.5),
    Phase(name="decode", shows=Attempt.decoding, victims=ALL, spread=0.5),
    Phase(name="write", shows=Attempt.writing, victims=ALL, spread=0.5),
    Phase(
        name="write: rename to record", shows=Attempt.staging, victims=RAY, spread=0.1
    ),
    Phase(name="dedup: compare", shows=Attempt.comparing, victims=RAY, spread=0.02),
    Phase(name="dedup: settle", shows=Attempt.settling, victims=RAY, spread=0.1),
    Phase(name="rename to commit", shows=Attempt.placing, victims=RAY, spread=0.1),
    Phase(name="finalise", shows=Attempt.finishing, victims=RAY, spread=0.01),
    Phase(name="finalise: tidy", shows=Attempt.tidying, victims=RAY, spread=0.02),
)
RETRY = (
    Phase(name="retry: find", shows=Attempt.finding, victims=("driver",), spread=0.02),
    Phase(name="retry: fetch", shows=Attempt.fetching, victims=("worker",), spread=0.2),
    Phase(name="retry: write", shows=Attempt.writing, victims=("driver",), spread=0.2),
    Phase(
        name="retry: read committed",
        shows=Attempt.reading,
        victims=("raylet",),
        spread=0.02,
    ),
    Phase(
        name="retry: compare", shows=Attempt.comparing, victims=("worker",), spread=0.02
    ),
    Phase(
        name="retry: settle", shows=Attempt.settling, victims=("driver",), spread=0.01
    ),
    Phase(
        name="retry: rename to commit",
        shows=Attempt.placing,
        victims=("driver",),
        spread=0.01,
    ),
    Phase(
        name="retry: finalise",
        shows=Attempt.finishing,
        victims=("driver",),
        spread=0.01,
    ),
    Phase(name="retry: tidy", shows=Attempt.tidying, victims=("driver",), spread=0.02),
)
Strike = tuple[Phase, str]


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The corpus and its web server, and what an undisturbed run makes of it."""

    server: Server
    table: Path
    late: dict[str, bytes]
    """Paths that are not found until inputs are tried again."""
    made: Path

    def flags(self, output: Path) -> tuple[str, ...]:
        return (f"--input={self.table}", f"--output={output}", *FLAGS)


def images() -> list[tuple[str, bytes]]:
    """A name and bytes for every input: some large, some that repeat an earlier one."""
    found: list[tuple[str, bytes]] = []
    for seed in range(N_INPUTS):
        if seed % 8 == 1:
            large = picture(seed, (2400, 1600))
            found.append((f"{seed}.png", encoded(large, "PNG", compress_level=1)))
        elif seed % 12 == 3:
            found.append((f"{seed}.jpg", encoded(picture(seed // 2, SIZE))))
        elif seed % 12 == 7:
            found.append((f"{seed}.jpg", encoded(picture(seed // 2, SIZE), quality=60)))
        else:
            found.append((f"{seed}.jpg", encoded(picture(seed, SIZE))))
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    with running:
        yield running


@pytest.fixture(scope="module")
def slow(
    server: Server, tmp_path_factory: pytest.TempPathFactory, preprocess: Run
) -> Slow:
    folder = tmp_path_factory.mktemp("slow")
    rows, late = [], {}
    for seed, (name, data) in enumerate(images()):
        (folder / name).write_bytes(data)
        rows.append(
            {"image": name, "caption": caption(seed // 7 if seed % 3 else seed)}
        )
        if seed % 4 in (1, 2):
            continue
        rows[-1]["image"] = server.url(f"/{name}")
        if seed % 16 in (4, 8):
            late[f"/{name}"] = data
        else:
            server.serve(f"/{name}", Reply(body=data, pause_s=ANSWER_SECONDS))
    made = tmp_path_factory.mktemp("undisturbed") / "out"
    slow = Slow(
        server=server,
        table=write_table(folder / "slow.csv", rows),
        late=late,
        made=made,
    )
    result = preprocess(*slow.flags(made))
    assert result.returncode == 0, result.stderr
    counts = load_manifest(made).accounting
    assert counts.failed == {"http_404": len(late)}
    assert counts.duplicates > 10
    assert counts.filtered["caption_repetition"] > 2
    return slow


def ranges_of(output: Path) -> int:
    return len(list((output / ".palimpsest" / "ranges").glob("*.json")))


def run_through(
    strikes: Sequence[Strike],
    output: Path,
    flags: Sequence[str],
    *,
    server: Server,
    ranges: range,
    draw: random.Random,
) -> list[Strike]:
    """Hit a run in one phase after the other, starting it again whenever its driver
    ended, until nothing is left to hit. Returns the strikes that found their victim;
    the run is over then, and nothing of it is left.
    """

    def attempt() -> Attempt:
        attempts.append(Attempt(output, flags, server=server, ranges=ranges))
        return attempts[-1]

    attempts: list[Attempt] = []
    running, done = attempt(), []
    for phase, victim in strikes:
        if not running.kill(phase, victim, draw):
            print(f"{output.parent.name}: {phase.name}, {victim}: too late", flush=True)
            assert running.wait() == 0, running.said()
            break
        done.append((phase, victim))
        print(f"{output.parent.name}: {phase.name}, {victim}: killed", flush=True)
        # The end of Ray's only raylet is the end of the run, unless it was at its end.
        if victim in ("driver", "raylet"):
            status = running.wait()
            print(f"  the driver ended with {status}", flush=True)
            assert "Traceback" not in running.said(), running.said()
            running = attempt()
    status = running.wait()
    if status:
        print(running.said())
        running = attempt()
        status = running.wait()
    assert status == 0, running.said()
    for one in attempts:
        one.wait_for_the_last()
    return done


def check_same(output: Path, undisturbed: Path) -> None:
    """The same files and folders in the dataset, and beside it nothing but progress."""
    found, wanted = files(output), files(undisturbed)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    folders, expected = (
        {path.relative_to(root) for path in root.rglob("*") if path.is_dir()}
        for root in (output, undisturbed)
    )
    assert folders == expected
    beside = {path.name for path in output.parent.iterdir()}
    assert beside == {output.name, f"{output.name}.progress.json"}
    progress = json.loads(output.with_name(f"{output.name}.progress.json").read_text())
    assert progress["phase"] == "complete"


def table(done: Sequence[Strike]) -> str:
    """Kills by phase and victim."""
    counts = Counter((phase.name, victim) for phase, victim in done)
    width = max(len(name) for name, _ in counts)
    lines = [f"{'phase':{width}}" + "".join(f"{kind:>9}" for kind in ALL)]
    for name in dict.fromkeys(name for name, _ in counts):
        cells = "".join(f"{counts[name, kind] or '-':>9}" for kind in ALL)
        lines.append(f"{name:{width}}{cells}")
    return "\n".join([*lines, f"{len(done)} kills, every time the same bytes"])


def next_strikes(left: Sequence[Strike]) -> list[Strike]:
    """One strike in every phase that has some left, in the order of the phases."""
    firsts = {phase.name: (phase, victim) for phase, victim in reversed(left)}
    return [firsts[phase.name] for phase in PHASES if phase.name in firsts]


def test_any_process_killed_in_any_phase_changes_no_byte(
    slow: Slow, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    draw, done = random.Random(SEED), []
    left = [(phase, victim) for phase in PHASES for victim in phase.victims]
    draw.shuffle(left)
    for number in range(MOST_RUNS):
        output = tmp_path / f"run{number}" / "out"
        output.parent.mkdir()
        hit = run_through(
            next_strikes(left),
            output,
            slow.flags(output),
            server=slow.server,
            ranges=range(N_RANGES),
            draw=draw,
        )
        check_same(output, slow.made)
        shutil.rmtree(output.parent)
        done += hit
        left = [strike for strike in left if strike not in hit]
        if not left:
            break
    print(table(done))
    assert not left, f"never hit: {[(phase.name, victim) for phase, victim in left]}"
    assert len(done) >= FEWEST_KILLS


@pytest.fixture
def found_late(slow: Slow) -> Iterator[None]:
    """Two thirds of what was not found are there now."""
    found = [path for number, path in enumerate(slow.late) if number % 3]
    for path in found:
        slow.server.serve(path, Reply(body=slow.late[path], pause_s=ANSWER_SECONDS))
    yield
    for path in found:
        del slow.server.replies[path]


@pytest.mark.usefixtures("found_late")
def test_a_retry_killed_in_any_phase_changes_no_byte(
    slow: Slow, tmp_path: Path, preprocess: Run
) -> None:
    """Some of what is tried again fails again."""
    whole = tmp_path / "whole" / "out"
    shutil.copytree(slow.made, whole)
    result = preprocess(*slow.flags(whole), "--retry_failed")
    assert result.returncode == 0, result.stderr
    counts = load_manifest(whole).accounting
    assert 0 < counts.failed["http_404"] < len(slow.late)
    draw, done = random.Random(SEED), []
    left = [(phase, victim) for phase in RETRY for victim in phase.victims]
    for number in range(MOST_RUNS):
        output = tmp_path / f"retry{number}" / "out"
        shutil.copytree(slow.made, output)
        hit = run_through(
            left,
            output,
            (*slow.flags(output), "--retry_failed"),
            server=slow.server,
            ranges=range(N_RANGES, ranges_of(whole)),
            draw=draw,
        )
        check_same(output, whole)
        done += hit
        left = [strike for strike in left if strike not in hit]
        if not left:
            break
    print(table(done))
    assert not left, f"never hit: {[(phase.name, victim) for phase, victim in left]}"
