"""Tars as other tools write them, small and generated."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.pipeline.corpora import caption, encoded, picture


def write_tar(
    path: Path,
    files: Mapping[str, bytes] | list[tuple[str, bytes]],
    *,
    kind: int = tarfile.GNU_FORMAT,
    folders: bool = False,
) -> Path:
    """A tar of `files` by name, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = files.items() if isinstance(files, Mapping) else files
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in items:
            if folders:
                folder = tarfile.TarInfo("photos")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            member = tarfile.TarInfo(name)
            # As people's tars have them.
            member.size, member.mtime, member.uname = len(data), 1_600_000_000, "me"
            tar.addfile(member, io.BytesIO(data))
    return path


def img2dataset_files(
    seeds: range, *, size: tuple[int, int] = (60, 40)
) -> dict[str, bytes]:
    """Members of img2dataset's samples by name: jpg, json, txt."""
    files = {}
    for seed in seeds:
        key = f"{seed:09d}"
        fields: dict[str, Any] = {
            "url": f"https://example.com/{seed}.jpg",
            "caption": caption(seed),
            "key": key,
            "status": "success",
            "error_message": None,
            "width": size[0],
            "height": size[1],
            "original_width": 640,
            "original_height": 480,
            "exif": "{}",
            "sha256": "0" * 64,
        }
        files[f"{key}.jpg"] = encoded(picture(seed, size), quality=90)
        files[f"{key}.json"] = json.dumps(fields, indent=4).encode()
        files[f"{key}.txt"] = caption(seed).encode()
    return files


def img2dataset_shard(folder: Path, number: int, seeds: range) -> Path:
    """`00000.tar`, `00000.parquet` and `00000_stats.json`."""
    tar = write_tar(folder / f"{number:05d}.tar", img2dataset_files(seeds))
    rows = [{"key": f"{seed:09d}", "status": "success"} for seed in seeds]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
    stats = {"count": len(seeds), "successes": len(seeds), "start_time": 1.5}
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    return tar


def every_kind_of_image() -> dict[str, bytes]:
    """Members of samples with an image of every format and colour mode, all of which
    show the same smooth picture upright.
    """
    shown = picture(1, (48, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = shown.transpose(Image.Transpose.ROTATE_90)
    images = {
        "plain.jpg": encoded(shown, quality=95),
        "grey.jpeg": encoded(shown.convert("L"), quality=95),
        "ink.jpg": encoded(shown.convert("CMYK"), quality=95),
        "turned.JPG": encoded(turned, quality=95, exif=exif.tobytes()),
        "flat.png": encoded(shown, "PNG"),
        "clear.png": encoded(shown.convert("RGBA"), "PNG"),
        "palette.png": encoded(shown.convert("P"), "PNG"),
        "sharp.webp": encoded(shown, "WEBP", lossless=True),
        "few.gif": encoded(shown.convert("P"), "GIF"),
        "raw.bmp": encoded(shown, "BMP"),
        "scan.tif": encoded(shown, "TIFF"),
    }
    files = {}
    for number, (name, data) in enumerate(images.items()):
        key = name.split(".")[0]
        files[name] = data
        files[f"{key}.txt"] = caption(number).encode()
    return files
