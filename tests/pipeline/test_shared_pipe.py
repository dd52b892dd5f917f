"""Promises of messages between two processes: nothing is lost, copied late or torn."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pipeline.shared_pipe import SharedPipe, release, shared_memory


@pytest.fixture
def ends() -> Iterator[tuple[SharedPipe, SharedPipe]]:
    """Both ends, in one process: messages are small enough for the pipes to hold."""
    memory = shared_memory()
    (reads, answers), (asks, writes) = os.pipe(), os.pipe()
    first = SharedPipe(reads=reads, writes=writes, memory=memory)
    second = SharedPipe(reads=asks, writes=answers, memory=memory)
    os.close(memory)
    yield first, second
    first.close()
    second.close()
    for descriptor in (reads, answers, asks, writes):
        os.close(descriptor)


def test_messages_arrive_whole_whether_copied_or_in_place(
    ends: tuple[SharedPipe, SharedPipe],
) -> None:
    first, second = ends
    blobs = [b"one", b"", bytes(range(256)) * 9_000]
    first.send(b"text", blobs)
    text, views = second.receive_in_place()
    assert (text, [bytes(view) for view in views]) == (b"text", blobs)
    release(views)
    second.send(b"answer", blobs[::-1])
    assert first.receive() == (b"answer", blobs[::-1])


def test_an_answer_larger_than_the_question_has_room_once_that_is_released(
    ends: tuple[SharedPipe, SharedPipe],
) -> None:
    first, second = ends
    answer = os.urandom(5 << 20)
    for _ in range(2):
        first.send(b"", [b"small"])
        _, views = second.receive_in_place()
        release(views)
        second.send(b"", [answer])
        assert first.receive() == (b"", [answer])


def test_what_lies_in_place_cannot_be_written_to(
    ends: tuple[SharedPipe, SharedPipe],
) -> None:
    first, second = ends
    first.send(b"", [b"image"])
    _, views = second.receive_in_place()
    with pytest.raises(TypeError):
        views[0][0] = 0
    release(views)
