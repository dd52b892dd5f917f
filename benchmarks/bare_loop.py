"""How near to the codec's limit a loop in one process comes that does nothing else.

    python -m benchmarks.bare_loop FOLDER COUNT TOKENIZER

takes the first photos of a folder of `benchmarks.photos` to a tar with what the
contract asks of a sample: sha256 of source and tar, perceptual hash, tokens, json,
CRCs. It has no decoder in a process of its own, no limits, no cleaning, no table and no
Ray, and so says what share of the limit Python leaves at best. Both are CPU time, in
turns.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path

import crc32c
import orjson
import simplejpeg

from benchmarks.codec_limit import measure
from benchmarks.photos import caption
from pipeline import jpeg, resize
from pipeline.allocation import keep_pages
from pipeline.image_header import read_header
from pipeline.options import ImageOptions
from pipeline.phash import SIDE, perceptual_hashes
from pipeline.shards import member_header
from pipeline.tokenizer import CaptionEncoder, load_tokenizer

_TURNS = 3
_CHUNK = 16
_OPTIONS = ImageOptions()


def limit(paths: list[Path]) -> float:
    """CPU seconds a photo of decoding, resizing and encoding alone."""
    return sum(sum(measure(path.read_bytes(), _OPTIONS)) for path in paths) / len(paths)


def loop(paths: list[Path], encoder: CaptionEncoder) -> float:
    """CPU seconds a photo of everything."""
    begun = time.process_time()
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as tar:
        for first in range(0, len(paths), _CHUNK):
            for span in _spans(first, paths[first : first + _CHUNK], encoder):
                digest.update(span)
                tar.write(span)
    return (time.process_time() - begun) / len(paths)


def _spans(first: int, paths: list[Path], encoder: CaptionEncoder) -> list[bytes]:
    captions = [caption(first + place) for place in range(len(paths))]
    ids = encoder.encode_batch([[text] for text in captions])
    made = [_image(path) for path in paths]
    hashes = perceptual_hashes([thumbnail for *_, thumbnail in made])
    spans = []
    for place, (sha256, size, data, _) in enumerate(made):
        key = f"{first + place:012d}"
        row = {"key": key, "url": str(paths[place]), "caption": captions[place]}
        row |= {"width": size[0], "height": size[1], "sha256": sha256}
        row |= {"phash": hashes[place], "captions": [captions[place]]}
        parts: list[bytes] = []
        for name, payload in (
            ("input_ids.npy", ids[place][1].tobytes()),
            ("jpg", data),
            ("json", orjson.dumps(row)),
            ("txt", captions[place].encode()),
        ):
            padding = bytes(-len(payload) % 512)
            parts += [member_header(f"{key}.{name}", len(payload)), payload, padding]
            crc32c.crc32c(payload)
        spans.append(b"".join(parts))
    return spans


def _image(path: Path) -> tuple[str, tuple[int, int], bytes, bytes]:
    source = path.read_bytes()
    sha256 = hashlib.sha256(source).hexdigest()
    header = read_header(source, _OPTIONS)
    geometry = resize.plan_geometry(header.size, _OPTIONS)
    pixels = jpeg.decode_strictly(source, header, geometry.target)
    assert pixels is not None
    fraction = jpeg.dct_fraction(header.size, geometry.target)
    pixels = resize.resized(pixels, header.size, fraction, geometry)
    data = simplejpeg.encode_jpeg(pixels, _OPTIONS.quality, "RGB", "420")
    return sha256, header.size, data, resize.thumbnail(pixels, SIDE).tobytes()


def main() -> None:
    """Print the limit, the loop and their ratio, turn by turn."""
    keep_pages()
    paths = [
        Path(sys.argv[1], f"{number:06d}.jpg") for number in range(int(sys.argv[2]))
    ]
    encoder = CaptionEncoder(load_tokenizer(sys.argv[3]))
    loop(paths[:_CHUNK], encoder)
    for _ in range(_TURNS):
        bound, taken = limit(paths), loop(paths, encoder)
        print(f"{1e3 * bound:.3f} ms  {1e3 * taken:.3f} ms  {bound / taken:.1%}")


if __name__ == "__main__":
    main()
