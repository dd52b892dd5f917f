"""Results come in order, within bounds of number and bytes, and never lock up."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from pipeline.images import ImageError
from pipeline.lookahead import Bounds, Room, Share, in_order


class Late(Future[bytes]):
    """Done at the moment in which somebody waits for it, and not before."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    def result(self, timeout: float | None = None) -> bytes:
        if not self.done():
            self.set_result(self._data)
        return super().result(timeout)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_results_keep_the_order_of_the_items(threads: ThreadPoolExecutor) -> None:
    draw = random.Random(0)
    pauses = [draw.choice([0, 0, 0.001, 0.01]) for _ in range(200)]

    def job(number: int, share: Share) -> bytes:
        time.sleep(pauses[number])
        if number % 7 == 0:
            raise ImageError("seventh", str(number))
        share.take(number)
        return bytes(number)

    def start(number: int, share: Share) -> Future[bytes]:
        return threads.submit(job, number, share)

    found = list(in_order(range(200), start, Bounds(jobs=16)))
    assert [number for number, _ in found] == list(range(200))
    for number, result in found:
        if number % 7 == 0:
            assert isinstance(result, ImageError)
            assert result.detail == str(number)
        else:
            assert result == bytes(number)


def test_no_more_jobs_are_begun_than_allowed(threads: ThreadPoolExecutor) -> None:
    begun = []
    go = threading.Event()

    def start(number: int, share: Share) -> Future[bytes]:
        begun.append(number)
        if len(begun) == 5:
            go.set()
        return threads.submit(lambda: (go.wait(), b"x")[1])

    results = in_order(range(100), start, Bounds(jobs=5))
    assert next(results) == (0, b"x")
    assert begun == [0, 1, 2, 3, 4]
    assert len(list(results)) == 99


def test_no_job_is_begun_while_much_is_held() -> None:
    begun = []

    def start(number: int, share: Share) -> Future[bytes]:
        begun.append(number)
        if number == 0:
            # Those behind it fill the room.
            return Late(b"")
        future: Future[bytes] = Future()
        share.take(40)
        future.set_result(bytes(40))
        return future

    bounds = Bounds(jobs=1000, begin_bytes=100, held_bytes=1000)
    results = in_order(range(50), start, bounds)
    assert next(results) == (0, b"")
    assert begun == [0, 1, 2, 3]
    assert [number for number, _ in results] == list(range(1, 50))


def test_jobs_larger_than_the_room_get_it_when_their_turn_comes(
    threads: ThreadPoolExecutor,
) -> None:
    held: list[int] = []
    tries: list[int] = []
    room_of: list[Room] = []
    lock = threading.Lock()

    def job(number: int, share: Share) -> bytes:
        with lock:
            tries.append(number)
        try:
            for _ in range(10):
                share.take(30)
                with lock:
                    held.append(room_of[0].held)
        except Exception:
            share.drop()
            raise
        return bytes(300)

    def start(number: int, share: Share) -> Future[bytes]:
        room_of[:] = [share.room]
        return threads.submit(job, number, share)

    bounds = Bounds(jobs=8, begin_bytes=200, held_bytes=250)
    found = list(in_order(range(20), start, bounds))
    assert [(number, len(data)) for number, data in found] == [
        (number, 300) for number in range(20)
    ]
    # The one whose turn it is, and what the others may hold together.
    assert max(held) <= 300 + 250
    assert len(tries) > 20
    assert room_of[0].held == 0


def test_other_errors_end_it_and_cancel_what_waits() -> None:
    futures: list[Future[bytes]] = []

    def start(number: int, share: Share) -> Future[bytes]:
        future: Future[bytes] = Late(b"two") if number == 2 else Future()
        if number == 1:
            future.set_exception(OSError("the storage failed"))
        elif number == 0:
            future.set_result(b"first")
        futures.append(future)
        return future

    # The second fails only once it is waited for: a result first, then the error.
    results = in_order(range(10), start, Bounds(jobs=4))
    assert next(results) == (0, b"first")
    with pytest.raises(OSError, match="the storage failed"):
        next(results)
    left = in_order(iter(range(2, 6)), start, Bounds(jobs=3))
    assert next(left) == (2, b"two")
    left.close()
    assert [future.cancelled() for future in futures[3:]] == [True, True]
