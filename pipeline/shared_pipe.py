"""Messages of two processes that take turns: data in shared memory, text in pipes.

Owns how a message travels. Does not own what it says or who sends it
(`pipeline.decoder`). Megabytes through a pipe would cost several copies and as many
switches between the processes as the pipe has room for pages.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

# Sizes of the text, of the list of sizes, and of the shared memory; then list and text.
_HEAD = struct.Struct("<QQQ")
_MARK = struct.Struct("<Q")
_SIZE = struct.Struct("<Q")
_FIRST_SIZE = 1 << 20
_READ_SIZE = 4096


class SharedPipe:
    """One end. Both must alternate: a message is received before the next is sent."""

    def __init__(self, *, reads: int, writes: int, memory: int) -> None:
        """Take file descriptors: two of pipes, and one of `shared_memory()`."""
        self._reads, self._writes = reads, writes
        self._memory = mmap.mmap(memory, os.fstat(memory).st_size)

    def send(self, text: bytes, blobs: Sequence[bytes] = ()) -> None:
        """Raises BrokenPipeError where the other end is gone."""
        end = _MARK.size + sum(map(len, blobs))
        if end > len(self._memory):
            self._memory.resize(1 << (end - 1).bit_length())
        place = _MARK.size
        for blob in blobs:
            self._memory[place : place + len(blob)] = blob
            place += len(blob)
        sizes = b"".join([_SIZE.pack(len(blob)) for blob in blobs])
        head = _HEAD.pack(len(text), len(sizes), len(self._memory))
        view = memoryview(head + sizes + text)
        while view:
            view = view[os.write(self._writes, view) :]

    def receive(self) -> tuple[bytes, list[bytes]]:
        """Text and blobs of the next message. Raises EOFError where none will come."""
        text, views = self.receive_in_place()
        blobs = [bytes(view) for view in views]
        release(views)
        return text, blobs

    def receive_in_place(self) -> tuple[bytes, list[memoryview]]:
        """The same without a copy: the blobs must be released before an answer is sent,
        which takes their place. Raises EOFError where no message will come.
        """
        # Nothing can follow a message before it is answered, so reads may be generous.
        message = self._read(b"", _HEAD.size)
        text_size, list_size, capacity = _HEAD.unpack_from(message)
        start = _HEAD.size + list_size
        message = self._read(message, start + text_size)
        if capacity != len(self._memory):
            self._memory.resize(capacity)
        blobs, place = [], _MARK.size
        with memoryview(self._memory) as memory, memory.toreadonly() as whole:
            for (size,) in _SIZE.iter_unpack(message[_HEAD.size : start]):
                blobs.append(whole[place : place + size])
                place += size
        return message[start:], blobs

    @property
    def mark(self) -> int:
        """A number that both ends see at once, also when the other has died."""
        return _MARK.unpack_from(self._memory)[0]

    @mark.setter
    def mark(self, value: int) -> None:
        _MARK.pack_into(self._memory, 0, value)

    def close(self) -> None:
        """Let go of the memory; the pipes belong to whoever made them."""
        self._memory.close()

    def _read(self, start: bytes, size: int) -> bytes:
        parts, have = [start], len(start)
        while have < size:
            part = os.read(self._reads, max(_READ_SIZE, size - have))
            if not part:
                raise EOFError
            parts.append(part)
            have += len(part)
        return b"".join(parts) if len(parts) > 1 else start


def release(views: Sequence[memoryview]) -> None:
    """Let go of what was received in place."""
    for view in views:
        view.release()


def shared_memory() -> int:
    """File descriptor of memory for both ends; close it once both have taken it."""
    memory = os.memfd_create("shared_pipe")
    os.ftruncate(memory, _FIRST_SIZE)
    return memory
