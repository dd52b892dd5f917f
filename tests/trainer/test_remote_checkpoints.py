"""What becomes of the parts of a checkpoint behind a URL, step by step."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.pipeline.s3 import S3Server
from trainer.placing import Draft
from trainer.remote_checkpoints import RemoteCheckpoints
from trainer.storage import StorageConfig
from trainer.store import Store

RANKS = 2


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as running:
        yield running


@pytest.fixture(params=["s3", "memory"])
def store(
    request: pytest.FixtureRequest, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Store:
    if request.param == "s3":
        return Store(f"{server.bucket(monkeypatch)}/run", StorageConfig())
    return Store(f"memory://{uuid.uuid4().hex}/run", StorageConfig())


def place(
    store: Store, node: Path, check: Callable[[], None] = str
) -> RemoteCheckpoints:
    (node / "checkpoints").mkdir(parents=True, exist_ok=True)
    return RemoteCheckpoints(store, node, check)


def save(places: list[RemoteCheckpoints], step: int, attempt: str) -> Draft:
    """All ranks hand in their parts, each on its own node."""
    draft = Draft(step=step, attempt=attempt, world_size=RANKS)
    for rank, of in enumerate(places):
        assert not places[0].is_whole(draft)
        of.hand_in(
            draft, rank, lambda path, rank=rank: path.write_text(f"{step} {rank}")
        )
    assert places[0].is_whole(draft)
    return draft


def marker(step: int) -> dict[str, int]:
    return {"step": step, "world_size": RANKS}


def parts(path: Path) -> list[str]:
    return [part.read_text() for part in sorted(path.glob("rank-*.safetensors"))]


def test_a_checkpoint_exists_from_its_marker_on_and_comes_to_any_node(
    store: Store, tmp_path: Path
) -> None:
    places = [place(store, tmp_path / str(rank)) for rank in range(RANKS)]
    draft = save(places, 4, "a")
    other = place(store, tmp_path / "other")
    assert other.newest() is None
    places[0].complete(draft, marker(4))
    found = other.newest()
    assert found
    path, known = found
    assert known == marker(4) | {"attempt": "a"}
    assert other.tidy(clear=False) == [4]
    assert other.bring(path) == len("4 0") + len("4 1")
    assert parts(path) == ["4 0", "4 1"]
    assert other.bring(path) == 0


def test_what_no_marker_names_is_cleared_and_never_taken_for_it(
    store: Store, tmp_path: Path
) -> None:
    places = [place(store, tmp_path / str(rank)) for rank in range(RANKS)]
    places[0].complete(save(places, 4, "a"), marker(4))
    # An attempt that died, and one at the same step as a complete one.
    save(places, 5, "b")
    places[1].hand_in(
        Draft(step=4, attempt="c", world_size=RANKS), 1, lambda p: p.write_text("torn")
    )
    assert len(store.sizes()) == 5 + 4 + 2
    assert places[1].tidy(clear=True) == [4]
    assert len(store.sizes()) == 5
    (path,) = (tmp_path / "1" / "checkpoints").glob("step-*")
    places[1].bring(path)
    assert parts(path) == ["4 0", "4 1"]


def test_the_ranks_of_a_node_fetch_once(store: Store, tmp_path: Path) -> None:
    places = [place(store, tmp_path / str(rank)) for rank in range(RANKS)]
    places[0].complete(save(places, 4, "a"), marker(4))
    shutil.rmtree(tmp_path)
    ranks = [place(store, tmp_path / "node") for _ in range(4)]
    found = ranks[0].newest()
    assert found
    with ThreadPoolExecutor(4) as threads:
        fetched = list(threads.map(lambda rank: rank.bring(found[0]), ranks))
    assert sorted(fetched) == [0, 0, 0, 6]


def test_a_node_keeps_its_last_two_parts_and_what_is_deleted_is_gone(
    store: Store, tmp_path: Path
) -> None:
    places = [place(store, tmp_path / str(rank)) for rank in range(RANKS)]
    for step in (4, 5, 6):
        places[0].complete(save(places, step, f"a{step}"), marker(step))
    folder = tmp_path / "1" / "checkpoints"
    assert [at.name for at in sorted(folder.iterdir()) if parts(at)] == [
        "step-00000005",
        "step-00000006",
    ]
    places[0].delete(tmp_path / "0" / "checkpoints" / "step-00000004")
    assert place(store, tmp_path / "other").tidy(clear=False) == [5, 6]
    assert len(store.sizes()) == 2 * 5


def test_whoever_may_not_write_completes_nothing(store: Store, tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("taken over")

    places = [place(store, tmp_path / str(rank), refuse) for rank in range(RANKS)]
    draft = save(places, 4, "a")
    with pytest.raises(ValueError, match="taken over"):
        places[0].complete(draft, marker(4))
    assert places[0].newest() is None


def test_a_marker_that_came_too_late_makes_no_checkpoint(
    store: Store, tmp_path: Path
) -> None:
    """Of a trainer that was cut off before its marker, when the next has cleared its
    parts away: the one before is the newest.
    """
    places = [place(store, tmp_path / str(rank)) for rank in range(RANKS)]
    places[0].complete(save(places, 4, "a"), marker(4))
    late = save(places, 8, "b")
    other = place(store, tmp_path / "other")
    assert other.tidy(clear=True) == [4]
    places[0].complete(late, marker(8))
    found = other.newest()
    assert found
    assert found[1]["step"] == 4
    assert other.tidy(clear=True) == [4]
    other.bring(found[0])
    assert parts(found[0]) == ["4 0", "4 1"]
