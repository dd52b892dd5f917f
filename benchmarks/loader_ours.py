"""Our loader as `benchmarks.loader` measures it, and the limit.

Owns how it is built. Images and texts without masks are what peers give; with masks is
`Loader.steps`, what the trainer reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.loader_peers import BATCH, WORKERS, Resumable, Where

_CHUNK = 16
_LANES = 32
_ENDLESS = 1 << 40


def _loader(where: Where, geometry: str) -> Any:
    import torch

    from trainer.dataset import Dataset
    from trainer.loader import Loader
    from trainer.models.mlim import MlimConfig
    from trainer.options import ImageConfig, PretrainConfig
    from trainer.storage import StorageConfig

    torch.set_num_threads(1)
    data = f"{where.bucket}/data" if where.bucket else str(where.dataset)
    storage = StorageConfig(cache=str(where.scratch) if where.scratch else None)
    keys = PretrainConfig(
        data=data,
        output="",
        lanes=_LANES,
        global_batch=BATCH,
        micro_batch=BATCH,
        threads=WORKERS,
        # Squares of 16 pixels for an image token, as MLIM has.
        model=MlimConfig(
            embedder_widths=(16, 32, 64, 128),
            decoder_widths=(64, 64, 48, 48, 32, 32, 16),
        ),
        image=ImageConfig(size=where.side, geometry=geometry),  # type: ignore[arg-type]
        storage=storage,
    )
    dataset = Dataset(data, "train", storage=storage)
    return Loader(dataset, keys, rank=0, world_size=1)


def ours(where: Where, state: Any) -> Resumable:
    """Images and texts, from step `state` on."""
    return _read(where, state, "center_crop")


def ours_crops(where: Where, state: Any) -> Resumable:
    """The same with a random resized crop of every image."""
    return _read(where, state, "random_resized_crop")


def ours_masks(where: Where, state: Any) -> Resumable:
    """What the trainer reads: also the token stream and what masks will count."""
    loader = _loader(where, "center_crop")
    first = state or 0
    taken = 0

    def batches() -> Iterator[Any]:
        nonlocal taken
        for batch in loader.steps(first, _ENDLESS):
            taken += 1
            yield batch

    return batches(), lambda: first + taken


def _read(where: Where, state: Any, geometry: str) -> Resumable:
    from trainer.feed import STEPS_BEYOND
    from trainer.loader import STEPS_HELD, in_advance
    from trainer.reading import Slots

    loader = _loader(where, geometry)
    slots = Slots(STEPS_HELD, (BATCH, where.side, where.side, 3))
    first = state or 0
    taken = 0

    def batches() -> Iterator[Any]:
        nonlocal taken
        with ThreadPoolExecutor(WORKERS) as decoders:

            def load(step: int) -> Any:
                loader.hint(step)
                # As the trainer does before each step.
                while loader.order.undecided <= step + STEPS_BEYOND:
                    loader.order.decide({})
                _, rows = loader.ahead.of(step)
                return loader.read(rows, decoders, slots.of(step))

            with closing(in_advance(load, range(first, _ENDLESS))) as made:
                for read in made:
                    taken += 1
                    yield read

    return batches(), lambda: first + taken


def limit(where: Where, state: Any) -> Resumable:
    """Two threads decode JPEGs that lie in memory into a preallocated batch, chunk by
    chunk and never waiting for a batch to be whole.
    """
    import simplejpeg

    photos, out = _photos(where), _batch(where)

    def fill(number: int) -> None:
        simplejpeg.decode_jpeg(photos[number % len(photos)], buffer=out[number % BATCH])

    return _decoded(fill, out), None


def limit_crops(where: Where, state: Any) -> Resumable:
    """The same with a random box of each, resampled as `trainer.geometry` does."""
    from trainer.geometry import box_of, decode_into
    from trainer.options import ImageConfig

    photos, out = [memoryview(photo) for photo in _photos(where)], _batch(where)
    config = ImageConfig(size=where.side, geometry="random_resized_crop")
    size = (where.side, where.side)
    words = np.random.default_rng(0).integers(0, 1 << 32, (len(photos), 4))
    boxes = [box_of(config, *size, row) for row in words]

    def fill(number: int) -> None:
        which = number % len(photos)
        decode_into(
            out[number % BATCH], photos[which], size, boxes[which], upright=True
        )

    return _decoded(fill, out), None


def _decoded(fill: Callable[[int], None], out: np.ndarray) -> Iterator[Any]:
    """`out`, whenever another batch of images has been filled in."""

    def chunk(first: int) -> None:
        for number in range(first, first + _CHUNK):
            fill(number)

    with ThreadPoolExecutor(WORKERS) as threads:
        ahead: deque[Any] = deque()
        first = 0
        while True:
            while len(ahead) < 4 * BATCH // _CHUNK:
                ahead.append(threads.submit(chunk, first))
                first += _CHUNK
            for _ in range(BATCH // _CHUNK):
                ahead.popleft().result()
            yield out


def _photos(where: Where) -> list[bytes]:
    """JPEGs in memory, shuffled."""
    from benchmarks.loader_data import samples

    paths = [str(path) for path in where.tars()]
    photos = [one.jpeg for one in islice(samples(paths), 32 * BATCH)]
    order = np.random.default_rng(0).permutation(len(photos)).tolist()
    return [photos[number] for number in order]


def _batch(where: Where) -> np.ndarray:
    return np.empty((BATCH, where.side, where.side, 3), dtype=np.uint8)


OURS: dict[str, Callable[[Where, Any], Resumable]] = {
    # Side by side, because they are compared and the machine changes.
    "Palimpsest": ours,
    "limit": limit,
    "Palimpsest, masks": ours_masks,
    "Palimpsest, crops": ours_crops,
    "limit, crops": limit_crops,
}
