"""What the codec allows: decoding, resizing and encoding, and nothing else.

`python -m benchmarks.codec_limit FOLDER COUNT` takes the first photos of a folder of
`benchmarks.photos` through the calls that `pipeline.images` makes, in one thread, and
prints as JSON the seconds that an average photo takes in each. Reading, limits on
hostile images, hashes and everything after are left out. The allocator keeps its
pages, as it does in the child of `pipeline.decoder`: start it with the environment that
`environment` gives.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simplejpeg

from pipeline import allocation, jpeg, resize
from pipeline.options import ImageOptions

# Photos that go through first, uncounted: memory is fetched from the kernel once.
_WARM_UP = 8


def environment() -> dict[str, str]:
    """Variables under which the limit is that of a decoder's child."""
    return {**os.environ, **allocation.ENVIRONMENT}


def measure(data: bytes, options: ImageOptions) -> tuple[float, float, float]:
    """Seconds to decode, to resize and to encode one photo."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    geometry = resize.plan_geometry((width, height), options)
    fraction = jpeg.dct_fraction((width, height), geometry.target)
    least = {
        "min_width": -(-width // fraction),
        "min_height": -(-height // fraction),
    }
    decode, pixels = _timed(lambda: simplejpeg.decode_jpeg(data, "RGB", **least))
    shrink, pixels = _timed(
        lambda: resize.resized(pixels, (width, height), fraction, geometry)
    )
    encode, _ = _timed(
        lambda: simplejpeg.encode_jpeg(pixels, options.quality, "RGB", "420")
    )
    return decode, shrink, encode


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    """Print the seconds of an average photo as JSON."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    options = ImageOptions()
    totals = [0.0, 0.0, 0.0]
    for number in (*range(min(_WARM_UP, count)), *range(count)):
        if number == 0:
            totals = [0.0, 0.0, 0.0]
        data = (folder / f"{number:06d}.jpg").read_bytes()
        spent = measure(data, options)
        totals = [total + part for total, part in zip(totals, spent, strict=True)]
    decode, shrink, encode = (total / count for total in totals)
    print(json.dumps({"decode": decode, "resize": shrink, "encode": encode}))


if __name__ == "__main__":
    main()
