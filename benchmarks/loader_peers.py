"""Loaders that are measured beside ours, each as its documentation shows it.

Owns how each is built over the same photos and token ids: batches of 128 uint8 images
and the ids of each, shuffled, two workers. Does not own the data (`benchmarks.
loader_data`) or the clock (`benchmarks.loader_run`). Runs in the peers' environment; a
peer's package is imported only where that peer is measured.

A source gives (batches, state): an endless or long iterator, and a function that gives
a resumable state after some of them, or None where the peer has none.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 128
WORKERS = 2
_BUFFER = 1_000


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a peer reads."""

    dataset: Path
    """Our dataset: the tars."""
    formats: Path
    """Folder of the peers' own formats."""
    side: int
    bucket: str | None = None
    """URL of an S3 bucket with both (`data/`, `formats/`), instead of the disk."""
    scratch: Path | None = None
    """Where a peer may cache what it fetches."""

    def tars(self) -> list[str]:
        """Paths or URLs of the training shards."""
        names = sorted(path.name for path in (self.dataset / "train").glob("*.tar"))
        root = f"{self.bucket}/data" if self.bucket else str(self.dataset)
        return [f"{root}/train/{name}" for name in names]


Batches = Iterator[Any]
Resumable = tuple[Batches, Callable[[], Any] | None]


def _collated(samples: Sequence[tuple[Any, Any]]) -> tuple[Any, list[Any]]:
    """Images of a batch in one tensor, which a worker shares instead of sending it;
    tokens as they are.
    """
    import torch

    images = np.stack([np.asarray(image) for image, _ in samples])
    return torch.from_numpy(images), [tokens for _, tokens in samples]


def _collating(
    image: str, tokens: str, decode: Callable[[Any], Any] | None = None
) -> Callable[[Sequence[dict[str, Any]]], Any]:
    """Batches of samples that have an image and tokens under these names."""

    def collate(samples: Sequence[dict[str, Any]]) -> Any:
        return _collated(
            [
                (decode(one[image]) if decode else one[image], one[tokens])
                for one in samples
            ]
        )

    return collate


def _endless(loader: Any) -> Batches:
    """Epoch after epoch."""
    while True:
        yield from loader


def _simplejpeg(data: bytes) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(data)


def _npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def _webdataset(where: Where, *, fast: bool) -> Any:
    import webdataset as wds

    if where.bucket:
        import fsspec

        wds.gopen_schemes["s3"] = lambda url, mode, size, **_: fsspec.open(url).open()
    found = wds.WebDataset(where.tars(), shardshuffle=100, empty_check=False)
    found = found.repeat().shuffle(_BUFFER)
    if fast:
        found = found.to_tuple("jpg", "input_ids.npy").map_tuple(_simplejpeg, _npy)
    else:
        found = found.decode("rgb8").to_tuple("jpg", "input_ids.npy")
    found = found.batched(BATCH, collation_fn=_collated)
    return wds.WebLoader(found, batch_size=None, num_workers=WORKERS)


def webdataset(where: Where, state: Any) -> Resumable:
    """`WebDataset(...).shuffle().decode("rgb8").to_tuple()` in a WebLoader."""
    return iter(_webdataset(where, fast=False)), None


def webdataset_simplejpeg(where: Where, state: Any) -> Resumable:
    """The same, decoded by simplejpeg."""
    return iter(_webdataset(where, fast=True)), None


def _mosaicml(where: Where, state: Any, name: str, decode: Any) -> Resumable:
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    if where.bucket:
        source = {
            "remote": f"{where.bucket}/formats/{name}",
            "local": str(where.scratch / name) if where.scratch else None,
        }
    else:
        source = {"local": str(where.formats / name)}
    dataset = StreamingDataset(**source, shuffle=True, batch_size=BATCH)

    if state is not None:
        dataset.load_state_dict(state)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=WORKERS,
        collate_fn=_collating("image", "tokens", decode),
    )
    taken = 0

    def batches() -> Batches:
        nonlocal taken
        for batch in _endless(loader):
            taken += BATCH
            yield batch

    return batches(), lambda: dataset.state_dict(taken, from_beginning=False)


def mosaicml(where: Where, state: Any) -> Resumable:
    """MosaicML `StreamingDataset` with images as its encoding `jpeg`."""
    return _mosaicml(where, state, "mds", None)


def mosaicml_simplejpeg(where: Where, state: Any) -> Resumable:
    """MosaicML with bytes, decoded by simplejpeg."""
    return _mosaicml(where, state, "mds-bytes", _simplejpeg)


def _litdata(where: Where, state: Any, name: str, decode: Any) -> Resumable:
    import litdata

    options: dict[str, Any] = {}
    folder = str(where.formats / name)
    if where.bucket:
        folder = f"{where.bucket}/formats/{name}"
        from litdata.streaming import downloader

        endpoint = os.environ["AWS_ENDPOINT_URL"]
        options["storage_options"] = {"endpoint_url": endpoint}
        options["cache_dir"] = str(where.scratch)
        # Its store insists on https, and has no public option for a loopback.
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = litdata.StreamingDataset(folder, shuffle=True, **options)

    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=WORKERS,
        collate_fn=_collating("image", "tokens", decode),
    )
    if state is not None:
        loader.load_state_dict(state)

    return _endless(loader), loader.state_dict


def litdata(where: Where, state: Any) -> Resumable:
    """LitData `StreamingDataset` with JPEG leaves."""
    return _litdata(where, state, "litdata", None)


def litdata_simplejpeg(where: Where, state: Any) -> Resumable:
    """LitData with bytes, decoded by simplejpeg."""
    return _litdata(where, state, "litdata-bytes", _simplejpeg)


def hf_datasets(where: Where, state: Any) -> Resumable:
    """Hugging Face `load_dataset("webdataset", streaming=True)`, shuffled."""
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

    tars = where.tars()
    if where.bucket:
        # Over HTTP: datasets 5.2 gives s3fs an option (block_size) that it refuses.
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        tars = [tar.replace("s3:/", endpoint, 1) for tar in tars]
    dataset = datasets.load_dataset(
        "webdataset", data_files={"train": tars}, split="train", streaming=True
    )
    dataset = dataset.shuffle(seed=0, buffer_size=_BUFFER)

    loader = StatefulDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=WORKERS,
        collate_fn=_collating("jpg", "input_ids.npy"),
    )
    if state is not None:
        loader.load_state_dict(state)

    return _endless(loader), loader.state_dict


def energon(where: Where, state: Any) -> Resumable:
    """Megatron-Energon `get_train_dataset` with its captioning sample."""
    from megatron import energon as peer

    folder = str(where.formats / "energon")
    if where.bucket:
        # By its multi-storage client; the profile is in the file MSC_CONFIG names.
        folder = "msc://loopback/formats/energon"

    class Encoder(peer.DefaultTaskEncoder):
        """Pictures as uint8, ids as they are."""

        decoder = peer.SampleDecoder(image_decode="pilrgb")

        def batch(self, samples: list[Any]) -> Any:
            pairs = [(one.image, one.caption) for one in samples]
            return _collated(pairs)

    config = peer.WorkerConfig(rank=0, world_size=1, num_workers=WORKERS)
    dataset = peer.get_train_dataset(
        folder,
        worker_config=config,
        batch_size=BATCH,
        shuffle_buffer_size=_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    loader = peer.get_savable_loader(dataset)
    if state is not None:
        loader.restore_state_rank(state)
    return iter(loader), loader.save_state_rank


PEERS: dict[str, Callable[[Where, Any], Resumable]] = {
    "webdataset": webdataset,
    "webdataset + simplejpeg": webdataset_simplejpeg,
    "MosaicML": mosaicml,
    "MosaicML + simplejpeg": mosaicml_simplejpeg,
    "LitData": litdata,
    "LitData + simplejpeg": litdata_simplejpeg,
    "HF datasets": hf_datasets,
    "Energon": energon,
}
# The formats that they need beside our tars.
NEEDS = {
    "MosaicML": "mds",
    "MosaicML + simplejpeg": "mds-bytes",
    "LitData": "litdata",
    "LitData + simplejpeg": "litdata-bytes",
    "Energon": "energon",
}
