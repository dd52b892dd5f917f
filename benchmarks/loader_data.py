"""What the loaders read: a dataset of square photos, and the same bytes for each peer.

    python -m benchmarks.loader_data CAPTIONS OUTPUT --size 224 --copies 4
    python -m benchmarks.loader_data CAPTIONS OUTPUT --size 512

The first makes a dataset of the training photos that a TSV names (image, split,
caption; several rows for an image are several captions), each some times over, so that
what is timed stays inside one epoch of every loader. Photos of another size are
enlarged, with the noise of a sensor (`benchmarks.photos`). All are squares, so that a
decode straight into a batch is defined.

Owns the datasets and their copies in the formats of peers, which hold the JPEG bytes
and the token ids of every sample as the tars have them. Does not own who reads them
(`benchmarks.loader_run`). Writing a format needs the peer: it is done in a process of
the peers' environment.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from benchmarks.photos import PhotoSet, make_photos
from pipeline.manifest import load_index, load_manifest

ROOT = Path(__file__).resolve().parents[1]
# Of MosaicML's writer; LitData's documentation has the same.
_CHUNK = 64 << 20


class Sample(NamedTuple):
    """A sample as the tar has it."""

    jpeg: bytes
    tokens: np.ndarray
    """(n,) ids of all captions."""


def make_dataset(captions: Path, output: Path, *, size: int, copies: int) -> None:
    """Preprocess the training photos of a TSV as squares of `size` pixels."""
    rows = list(csv.DictReader(captions.open(), delimiter="\t"))
    texts: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "train":
            texts.setdefault(row["image"], []).append(row["caption"])
    photos = output.with_name(f"{output.name}-photos")
    made = _squares(captions.parent, photos, list(texts), size)
    table = photos / "captions.tsv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("image", "caption"))
        for copy in range(copies):
            for name, path in zip(texts, made, strict=True):
                given = _copied(path, copy).relative_to(photos)
                writer.writerows((str(given), text) for text in texts[name])
    command = [
        *(sys.executable, "-m", "pipeline.preprocess", f"--input={table}"),
        *(f"--output={output}", f"--image.size={size}", "--split.val=0"),
        *("--shard.samples=1000", "--workers=2"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.rmtree(photos)


def check_squares(dataset: Path) -> int:
    """The side in pixels of all photos of a dataset.

    Raises:
        ValueError: they are not squares of one size.
    """
    shards = load_manifest(dataset).split("train")
    records = np.concatenate([load_index(dataset, shard) for shard in shards])
    sides = np.unique(np.stack([records["width"], records["height"]]))
    if len(sides) != 1:
        raise ValueError(
            f"{dataset} holds photos of several sizes: make one with "
            "`python -m benchmarks.loader_data`"
        )
    return int(sides[0])


def tars(dataset: Path) -> list[str]:
    """The training shards of a dataset, or of a folder that only has its tars."""
    return sorted(str(path) for path in (dataset / "train").glob("*.tar"))


def samples(paths: Sequence[str]) -> Iterator[Sample]:
    """All samples of some tars, in stored order."""
    for path in paths:
        with tarfile.open(path) as tar:
            parts: dict[str, bytes] = {}
            for member in tar:
                file = tar.extractfile(member)
                name = member.name.partition(".")[2]
                parts[name] = file.read() if file else b""
                if name == "txt":
                    ids = np.load(io.BytesIO(parts["input_ids.npy"]))
                    yield Sample(parts["jpg"], ids)


def make_format(name: str, dataset: Path, output: Path, interpreter: Path) -> Path:
    """The dataset in a peer's format, below `output`, unless it is there already."""
    folder = output / name
    if not folder.exists():
        print(f"  {name} of {dataset.name}", flush=True)
        partial = output / f"{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        command = [str(interpreter), "-m", "benchmarks.loader_data", "--format", name]
        subprocess.run([*command, str(dataset), str(partial)], cwd=ROOT, check=True)
        partial.rename(folder)
    return folder


def _mds(dataset: Path, output: Path, *, decoded: bool) -> None:
    """For MosaicML: the column is an image, or bytes that the caller decodes."""
    from streaming import MDSWriter

    columns = {"image": "jpeg" if decoded else "bytes", "tokens": "ndarray"}
    scratch = output.with_name(f"{output.name}.jpg")
    with MDSWriter(out=str(output), columns=columns) as writer:
        for jpeg, tokens in samples(tars(dataset)):
            image: Any = jpeg
            if decoded:
                # A JPEG of which Pillow knows the file is stored as it is.
                scratch.write_bytes(jpeg)
                image = Image.open(scratch)
            writer.write({"image": image, "tokens": tokens})
    scratch.unlink(missing_ok=True)


def _litdata(dataset: Path, output: Path, *, decoded: bool) -> None:
    """For LitData: the leaf is a JPEG, or bytes that the caller decodes."""
    import litdata

    litdata.optimize(
        fn=functools.partial(_litdata_samples, decoded=decoded),
        inputs=tars(dataset),
        output_dir=str(output),
        chunk_bytes=_CHUNK,
        num_workers=1,
    )


def _litdata_samples(tar: str, *, decoded: bool) -> Iterator[dict[str, Any]]:
    import litdata

    for jpeg, tokens in samples([tar]):
        # Without a highest quality the bytes are stored as they are.
        image = litdata.Jpeg(bytes=jpeg, max_quality=None) if decoded else jpeg
        yield {"image": image, "tokens": tokens}


def _energon(dataset: Path, output: Path) -> None:
    """For Energon: the same tars, with token ids instead of words as captions."""
    output.mkdir()
    shutil.copytree(dataset / ".nv-meta", output / ".nv-meta")
    meta = output / ".nv-meta" / "dataset.yaml"
    described = yaml.safe_load(meta.read_text())
    described["field_map"]["caption"] = "input_ids.npy"
    meta.write_text(yaml.safe_dump(described))
    (output / "train").mkdir()
    for path in (dataset / "train").glob("*.tar*"):
        os.link(path, output / "train" / path.name)


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "mds": functools.partial(_mds, decoded=True),
    "mds-bytes": functools.partial(_mds, decoded=False),
    "litdata": functools.partial(_litdata, decoded=True),
    "litdata-bytes": functools.partial(_litdata, decoded=False),
    "energon": _energon,
}


def _squares(root: Path, output: Path, images: Sequence[str], size: int) -> list[Path]:
    """Square photos of `size` pixels below `output`, one for each of `images`."""
    originals = [root / image for image in images]
    if all(Image.open(path).size == (size, size) for path in originals):
        output.mkdir(parents=True)
        made = [output / f"{number:06d}.jpg" for number in range(len(originals))]
        for original, path in zip(originals, made, strict=True):
            shutil.copyfile(original, path)
        return made
    wanted = PhotoSet(
        name=str(size), title=f"{size} px", sizes=((size, size),), per_shard=1000
    )
    make_photos(output, wanted, len(originals), originals)
    return [output / f"{number:06d}.jpg" for number in range(len(originals))]


def _copied(path: Path, copy: int) -> Path:
    """The photo itself, or another file with the same bytes."""
    if copy == 0:
        return path
    other = path.with_name(f"{path.stem}-{copy}.jpg")
    os.link(path, other)
    return other


def main(argv: Sequence[str] | None = None) -> None:
    """Make a dataset, or with `--format` a peer's copy of one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="TSV of captions, or a dataset")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--size", type=int, default=224, help="side in pixels")
    parser.add_argument("--copies", type=int, default=1, help="times each photo")
    parser.add_argument("--format", choices=FORMATS)
    given = parser.parse_args(argv)
    if given.format:
        FORMATS[given.format](given.source, given.output)
    else:
        make_dataset(given.source, given.output, size=given.size, copies=given.copies)


if __name__ == "__main__":
    main()
