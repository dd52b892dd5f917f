"""An image may hang, bloat or kill its process: it gets a reason, the rest is done."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from PIL import Image

from pipeline.decoder import Decoder, FunctionError, Request
from pipeline.filters import Filtered
from pipeline.images import EncodedImage, ImageError, encode_image
from pipeline.options import FilterOptions, ImageOptions
from tests.pipeline.corpora import REPOSITORY, encoded, picture

OPTIONS = ImageOptions(size=32)
SOUND = [encoded(picture(seed), "JPEG" if seed % 2 else "PNG") for seed in range(40)]
# Captions tell what to do, so any image may kill at any place: in the function itself
# (`here segfault`), or in what is done to the image after it (`segfault`).
FUNCTION = """
import os, pathlib, signal, sys, time

def judge(candidate):
    word, _, rest = candidate.captions[0].partition(" ")
    print("said by the function", word)
    if word == "here":
        return act(*rest.partition(" ")[::2])
    if word in ("segfault", "once", "compute", "wait"):
        def called(frame, event, argument):
            if frame.f_code.co_name == "encode_picture":
                sys.setprofile(None)
                act(word, rest)
        sys.setprofile(called)
    if word == "hoard":
        bytearray(1 << 40)
    if word == "raise":
        raise KeyError("no such thing")
    if word == "drop":
        return "unwanted"
    if word == "look":
        size = candidate.image.size + (candidate.width, candidate.height)
        return "_".join(map(str, (candidate.image.mode.lower(), *size, rest,
                                  candidate.columns["colour"])))

def act(word, rest):
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "once" and not pathlib.Path(rest).exists():
        pathlib.Path(rest).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "compute":
        while True:
            pass
    if word == "wait":
        time.sleep(3600)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "exit":
        sys.exit(3)
    if word == "leave":
        os._exit(4)
"""


@pytest.fixture
def judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    """A decoder whose filter function does what captions say."""
    (tmp_path / "judges.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    options = ImageOptions(size=32, time_limit_s=0.2)
    with Decoder(options, FilterOptions(function="judges:judge")) as decoder:
        yield decoder


def told(words: Sequence[str]) -> list[Request]:
    """Sound images with these captions."""
    return [
        Request(data=data, captions=[word], columns={"colour": "blue"})
        for data, word in zip(SOUND, words, strict=False)
    ]


def short(result: EncodedImage | ImageError | Filtered) -> object:
    """What compares equal for equal results."""
    if isinstance(result, EncodedImage):
        return result
    return type(result).__name__, result.reason, result.detail


def direct(data: bytes, options: ImageOptions = OPTIONS) -> object:
    try:
        return encode_image(data, options)
    except ImageError as error:
        return short(error)


def test_results_are_those_of_encode_image_in_order_however_they_are_sent() -> None:
    images = [*SOUND, b"no image", SOUND[0][:90], b"", encoded(picture(1), "GIF")]
    expected = [direct(data) for data in images]
    assert sum(isinstance(each, tuple) for each in expected) == 3
    requests = [Request(data=data) for data in images]
    with Decoder(OPTIONS, FilterOptions()) as decoder:
        assert [short(each) for each in decoder.encode(requests)] == expected
        singly = [short(decoder.encode([request])[0]) for request in requests]
        assert decoder.encode([]) == []
    assert singly == expected


def test_images_larger_than_the_first_buffer_pass_both_ways() -> None:
    noise = Image.frombytes("RGB", (900, 900), os.urandom(3 * 900 * 900))
    options = ImageOptions(resize="none", format="png", quality=1)
    data = encoded(noise, "BMP")
    with Decoder(options, FilterOptions()) as decoder:
        results = decoder.encode([Request(data=each) for each in (data, SOUND[0])] * 2)
    written = Image.open(io.BytesIO(results[2].data))
    assert written.tobytes() == noise.tobytes()
    assert results[1] == results[3] == encode_image(SOUND[0], options)


def test_sizes_are_filtered_before_decoding() -> None:
    cut = encoded(picture(1, (200, 90)))[:2000]
    filters = FilterOptions(min_size=91, max_aspect=1.2)
    with Decoder(OPTIONS, filters) as decoder:
        small, long = decoder.encode(
            [Request(data=cut), Request(data=encoded(picture(1, (120, 95))))]
        )
    assert isinstance(small, Filtered)
    assert isinstance(long, Filtered)
    assert (small.reason, long.reason) == ("too_small", "aspect")


def test_killers_are_found_and_their_neighbours_are_not_harmed(
    judging: Decoder,
) -> None:
    words = ["keep"] * 40
    for place in (0, 15, 16):
        words[place] = "segfault"
    results = judging.encode(told(words))
    options = ImageOptions(size=32)
    for data, word, result in zip(SOUND, words, results, strict=True):
        if word == "segfault":
            assert isinstance(result, ImageError)
            assert result.reason == "killed_decoder"
        else:
            assert result == encode_image(data, options)
    # Details stand in the dataset: no process or signal that chance may choose.
    assert len({short(each) for each in results if isinstance(each, ImageError)}) == 1


@pytest.mark.parametrize("where", ["", "here "])
def test_a_kill_from_outside_is_nobodys_fault(
    judging: Decoder, tmp_path: Path, where: str
) -> None:
    words = ["keep", f"{where}once {tmp_path / 'killed'}", "keep"]
    results = judging.encode(told(words))
    assert results == [encode_image(data, OPTIONS) for data in SOUND[:3]]
    assert (tmp_path / "killed").exists()


def test_a_child_killed_at_its_start_is_replaced() -> None:
    with Decoder(OPTIONS, FilterOptions()) as decoder:
        killer = threading.Thread(target=kill_the_next_child, args=(children(),))
        killer.start()
        [result] = decoder.encode([Request(data=encoded(picture(1)))])
        killer.join()
    assert isinstance(result, EncodedImage)


def children() -> set[psutil.Process]:
    """Processes that this one has started, those of other tests included."""
    return set(psutil.Process().children())


def kill_the_next_child(others: set[psutil.Process]) -> None:
    """Before it can have answered: a Python has hardly begun to start."""
    while not (started := children() - others):
        time.sleep(0.001)
    for child in started:
        child.kill()


def test_a_child_killed_between_calls_is_replaced() -> None:
    others = children()
    with Decoder(OPTIONS, FilterOptions()) as decoder:
        for data in SOUND[:2]:
            assert decoder.encode([Request(data=data)]) == [encode_image(data, OPTIONS)]
            (child,) = children() - others
            child.send_signal(signal.SIGINT)
            assert decoder.encode([Request(data=data)]) == [encode_image(data, OPTIONS)]
            assert children() - others == {child}
            child.kill()


@pytest.mark.parametrize("word", ["compute", "wait"])
def test_an_image_that_takes_too_long_is_stopped(judging: Decoder, word: str) -> None:
    results = judging.encode(told(["keep", word, "keep"]))
    assert short(results[1]) == ("ImageError", "time_limit", "more than 0.2 s")
    assert results[::2] == [encode_image(data, OPTIONS) for data in SOUND[:3:2]]


def test_a_real_image_that_takes_too_long_is_stopped_inside_its_decoder() -> None:
    slow = encoded(Image.new("RGB", (9000, 9000)), "PNG")
    options = ImageOptions(size=32, time_limit_s=0.1)
    with Decoder(options, FilterOptions()) as decoder:
        late, sound = decoder.encode([Request(data=slow), Request(data=SOUND[0])])
    assert isinstance(late, ImageError)
    assert late.reason == "time_limit"
    assert sound == encode_image(SOUND[0], OPTIONS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF"])
def test_an_image_that_takes_too_much_memory_is_refused(kind: str) -> None:
    options = {"TIFF": {"compression": "tiff_adobe_deflate"}}.get(kind, {})
    image = Image.new("P" if kind == "GIF" else "RGB", (5000, 5000))
    bomb = encoded(image, kind, **options)
    assert len(bomb) < 1 << 20
    requests = [Request(data=data) for data in (SOUND[0], bomb, SOUND[1], bomb)]
    limited = ImageOptions(size=32, memory_limit_mb=64)
    with Decoder(limited, FilterOptions()) as decoder:
        results = decoder.encode(requests)
    reasons = {short(each) for each in results[1::2]}
    assert reasons == {("ImageError", "memory_limit", "more than 64 MB")}
    assert results[::2] == [encode_image(data, OPTIONS) for data in SOUND[:2]]


def test_the_function_sees_the_image_as_written_and_what_belongs_to_it(
    judging: Decoder,
) -> None:
    keep, drop, look, hoard = judging.encode(told(["keep", "drop", "look up", "hoard"]))
    assert keep == encode_image(SOUND[0], OPTIONS)
    assert short(drop)[:2] == ("Filtered", "unwanted")
    assert short(look)[:2] == ("Filtered", "rgb_48_32_60_40_up_blue")
    assert short(hoard)[:2] == ("ImageError", "memory_limit")


def test_what_the_function_prints_goes_to_the_log(
    judging: Decoder, capfd: pytest.CaptureFixture[str]
) -> None:
    judging.encode(told(["keep"]))
    judging.__exit__()
    out, err = capfd.readouterr()
    assert (out, "said by the function keep" in err) == ("", True)


def test_a_fault_of_the_function_stops_the_run(judging: Decoder) -> None:
    with pytest.raises(RuntimeError, match=r"judges:judge raised KeyError"):
        judging.encode(told(["keep", "raise"]))
    # And no reply is left over for whoever goes on.
    assert judging.encode(told(["keep"])) == [encode_image(SOUND[0], OPTIONS)]


@pytest.mark.parametrize(
    ("word", "did"),
    [
        ("exit", r"raised SystemExit\(3\) in line \d+ of act"),
        ("leave", "ended the decoder's process with exit status 4"),
        ("segfault", r"crashed the decoder's process \(SIGSEGV\)"),
        ("kill", r"crashed the decoder's process \(SIGKILL\)"),
        ("compute", r"took more than 0.2 s \(--image.time_limit_s\)"),
        ("wait", r"took more than 0.2 s \(--image.time_limit_s\)"),
    ],
)
def test_what_ends_or_stops_in_the_function_stops_the_run_and_blames_no_image(
    judging: Decoder, word: str, did: str
) -> None:
    requests = told(["keep", "drop", f"here {word}", "keep"])
    says = rf"--filter.function judges:judge {did}, on .* with caption 'here {word}'"
    # The module's digest is compared: mended, it makes another dataset.
    says += ".*; mend it and choose a new --output"
    with pytest.raises(FunctionError, match=says) as raised:
        judging.encode(requests)
    assert raised.value.request is requests[2]
    assert judging.encode(told(["keep"])) == [encode_image(SOUND[0], OPTIONS)]


def test_a_function_that_is_not_there_is_an_error_of_the_config() -> None:
    with (
        Decoder(OPTIONS, FilterOptions(function="no_such_module:judge")) as decoder,
        pytest.raises(ValueError, match="no_such_module"),
    ):
        decoder.encode([Request(data=SOUND[0])])


def test_leaving_ends_the_child() -> None:
    others = children()
    with Decoder(OPTIONS, FilterOptions()) as decoder:
        decoder.encode([Request(data=SOUND[0])])
        (child,) = children() - others
    assert not child.is_running()


_PARENT = """
import os, psutil, sys
from pipeline.decoder import Decoder, Request
from pipeline.options import FilterOptions, ImageOptions
decoder = Decoder(ImageOptions(size=32), FilterOptions())
decoder.encode([Request(data=b"no image")])
print(psutil.Process().children()[0].pid, flush=True)
sys.stdin.read()
"""


def test_the_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
