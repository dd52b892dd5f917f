"""What each peer's own loader reads from a split: run as a script where the peer is.

`python peers.py PEER DIR SPLIT` prints one JSON line for each sample: its key where the
peer tells it, the sha256 of every member that the peer hands out as bytes, and of the
pixels where it decodes; then one line with the number of samples that the peer counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Sample = dict[str, Any]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tars(folder: Path, split: str) -> list[str]:
    return [str(path) for path in sorted((folder / split).glob("*.tar"))]


def members(key: str | None, parts: dict[str, bytes]) -> Sample:
    return {"key": key, **{name: sha256(data) for name, data in parts.items()}}


def webdataset(folder: Path, split: str) -> Iterator[Sample]:
    import webdataset

    for sample in webdataset.WebDataset(tars(folder, split), shardshuffle=False):
        parts = {k: v for k, v in sample.items() if not k.startswith("__")}
        yield members(sample["__key__"], parts)


def datasets(folder: Path, split: str) -> Iterator[Sample]:
    from datasets import Image, load_dataset

    name = {"val": "validation"}.get(split, split)
    # Through the card: `load_dataset(DIR)` and nothing else.
    table = load_dataset(str(folder), split=name, cache_dir=str(folder / ".cache"))
    for row in table.cast_column("jpg", Image(decode=False)):
        text, image = row["txt"], row["jpg"]["bytes"]
        told = {name: row["json"].get(name) for name in ("caption", "uid")}
        yield {**members(row["__key__"], {"txt": text.encode(), "jpg": image}), **told}
    yield {"count": table.num_rows}


def ray(folder: Path, split: str) -> Iterator[Sample]:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    table = ray.data.read_webdataset(
        tars(folder, split), file_extensions=["tar"], decoder=None
    )
    for row in table.iter_rows():
        parts = {k: v for k, v in row.items() if isinstance(v, bytes)}
        yield members(row["__key__"], parts)
    yield {"count": table.count()}
    ray.shutdown()


def energon(folder: Path, split: str) -> Iterator[Sample]:
    from megatron.energon import (
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
    )

    class AsBytes(DefaultTaskEncoder):
        decoder = None

    table = get_val_dataset(
        folder,
        split_part=split,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        task_encoder=AsBytes(),
    )
    for batch in get_loader(table):
        for key, image, text in zip(
            batch.__key__, batch.image, batch.caption, strict=True
        ):
            # Energon puts the tar's name before the key.
            name = key.rpartition("/")[2]
            parts = {"jpg": bytes(image), "txt": _bytes(text)}
            yield members(name, parts)
    yield {"count": len(table)}


def open_clip(folder: Path, split: str) -> Iterator[Sample]:
    import numpy as np
    import torch

    # The published torchvision is built for CUDA, and beside a torch for CPUs it has no
    # operators to describe. The loader calls none.
    if not torch.cuda.is_available():
        name = "torchvision._meta_registrations"
        sys.modules[name] = ModuleType(name)
    from open_clip_train.data import get_dataset_size, get_wds_dataset

    shards = tars(folder, split)
    pattern = str(folder / split / f"shard-{{000000..{len(shards) - 1:06d}}}.tar")
    args = Namespace(
        val_data=pattern, val_num_samples=None, batch_size=4, workers=0, world_size=1
    )
    info = get_wds_dataset(
        args,
        lambda image: torch.from_numpy(np.array(image.convert("RGB"))),
        is_train=False,
        tokenizer=lambda text: [text],
    )
    for images, texts in info.dataloader:
        for image, text in zip(images, texts, strict=True):
            yield {
                "pixels": sha256(image.numpy().tobytes()),
                "txt": sha256(_bytes(text)),
            }
    yield {"count": get_dataset_size(pattern)[0]}


def dali(folder: Path, split: str) -> Iterator[Sample]:
    from nvidia.dali import fn, pipeline_def

    names = ["input_ids.npy", "jpg", "json", "txt"]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def members_of() -> Any:
        return tuple(
            fn.readers.webdataset(paths=tars(folder, split), ext=names, name="tars")
        )

    pipeline = members_of()
    pipeline.build()
    count = pipeline.epoch_size("tars")
    for _ in range(count):
        outputs = pipeline.run()
        parts = {
            name: bytes(output.at(0).tobytes())
            for name, output in zip(names, outputs, strict=True)
        }
        yield members(json.loads(parts["json"])["key"], parts)
    yield {"count": count}


def pixels(jpeg: bytes) -> str:
    """sha256 of the RGB pixels that Pillow decodes."""
    from PIL import Image

    return sha256(Image.open(io.BytesIO(jpeg)).convert("RGB").tobytes())


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else bytes(text)


PEERS: dict[str, Callable[[Path, str], Iterator[Sample]]] = {
    "webdataset": webdataset,
    "datasets": datasets,
    "ray": ray,
    "energon": energon,
    "open_clip": open_clip,
    "dali": dali,
}

if __name__ == "__main__":
    # The folder of a script comes first, and holds modules of the same names.
    sys.path.pop(0)
    peer, folder, split = sys.argv[1:]
    for found in PEERS[peer](Path(folder), split):
        print(json.dumps(found), flush=True)
