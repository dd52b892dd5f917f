"""A corpus of URLs through the command: each failure by its reason, what is tried again
later, and addresses that are nobody's business, on real servers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.manifest import load_manifest
from tests.pipeline.corpora import (
    LIMIT_S,
    REPOSITORY,
    Run,
    caption,
    encoded,
    picture,
    run_module,
    write_table,
)
from tests.pipeline.test_preprocess import by_url, files
from tests.pipeline.web import Reply, WebServer

FLAGS = (
    *("--image.size=32", "--shard.samples=8", "--split.val=0.2", "--dedup.near=0"),
    *("--tokenizer=train:300", "--columns.sha256=hash", "--image.max_bytes=60000"),
    *("--fetch.allow_private", "--fetch.retries=1", "--fetch.timeout_s=3"),
)
GOOD = 12


@dataclass(frozen=True, kw_only=True)
class Site:
    """A table of URLs, and the server that they name."""

    server: WebServer
    table: Path
    expected: dict[str, str]
    """Reason of each URL's failure, empty for those that are written."""


def image(seed: int) -> bytes:
    return encoded(picture(seed))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Images that can be had, and one URL for each way in which one cannot."""
    with WebServer() as server:
        rows: list[dict[str, str]] = []
        expected: dict[str, str] = {}

        def add(url: str, reason: str, digest: str = "") -> None:
            rows.append({"url": url, "caption": caption(len(rows)), "hash": digest})
            expected[url] = reason

        def serve(path: str, reason: str, reply: Reply, digest: str = "") -> None:
            add(server.serve(path, reply), reason, digest)

        for seed in range(GOOD):
            digest = hashlib.sha256(image(seed)).hexdigest()
            serve(f"/{seed}", "", Reply(body=image(seed)), digest.upper())
        moved = Reply(status=302, headers={"Location": "/target"})
        server.serve("/target", Reply(body=image(20)))
        serve("/moved", "", moved)
        serve("/404", "http_404", Reply(status=404))
        serve("/busy", "http_503", Reply(status=503))
        refusal = {"X-Robots-Tag": "noai, noindex"}
        serve("/no", "opted_out", Reply(body=image(21), headers=refusal))
        serve("/other", "hash_mismatch", Reply(body=image(22)), "0" * 64)
        serve("/html", "not_an_image", Reply(body=b"<html>parked domain</html>"))
        serve("/huge", "too_large", Reply(body=b"\xff" * 70_000))
        serve("/short", "truncated", Reply(body=image(23)[:90], length=900))
        loop = {"Location": "/loop"}
        serve("/loop", "too_many_redirects", Reply(status=302, headers=loop))
        serve("/late", "timeout", Reply(body=image(24), pause_s=30))
        add("ftp://127.0.0.1/a.jpg", "path_outside_input")
        add("file:///etc/hostname", "path_outside_input")
        add("http://me:secret@127.0.0.1/a.jpg", "bad_url")
        table = tmp_path_factory.mktemp("urls") / "urls.csv"
        yield Site(server=server, table=write_table(table, rows), expected=expected)


def command(site: Site, output: Path, *more: str) -> tuple[str, ...]:
    # The same each time: refuses once, then answers.
    site.server.serve("/0", Reply(status=503), Reply(body=image(0)))
    return (f"--input={site.table}", f"--output={output}", *FLAGS, *more)


@pytest.fixture(scope="module")
def fetched(site: Site, preprocess: Run) -> Path:
    output = site.table.parent / "one"
    result = preprocess(*command(site, output, "--workers=1"))
    assert result.returncode == 0, result.stderr
    again = result.stderr.partition("tried again in all: ")[2]
    assert "2 http_503" in again
    return output


def test_every_url_is_written_or_has_its_reason(site: Site, fetched: Path) -> None:
    found = {url: row["reason"] or "" for url, row in by_url(fetched).items()}
    assert found == site.expected
    assert load_manifest(fetched).accounting.written == GOOD + 1
    # Refused without a request, and what failed for good was asked for once.
    assert site.server.hits["/a.jpg"] == 0
    assert site.server.hits["/404"] == site.server.hits["/no"] == 1
    assert site.server.hits["/busy"] == 2
    state = json.loads(Path(f"{fetched}.progress.json").read_text())
    assert state["retried"]["http_503"] == 2


def test_two_workers_fetch_the_same_bytes_and_failures_are_tried_again_later(
    site: Site, fetched: Path, preprocess: Run
) -> None:
    output = site.table.parent / "two"
    result = preprocess(*command(site, output, "--workers=2"))
    assert result.returncode == 0, result.stderr
    assert files(output) == files(fetched)

    before = load_manifest(output)
    kept = {shard.name: (output / shard.name).read_bytes() for shard in before.shards}
    for seed, path in enumerate(("/busy", "/late", "/other"), 40):
        site.server.serve(path, Reply(body=image(seed)))
    result = preprocess(*command(site, output, "--retry_failed"))
    assert result.returncode == 0, result.stderr
    after = load_manifest(output)
    assert after.accounting.inputs == before.accounting.inputs
    assert after.accounting.written == before.accounting.written + 2
    failed = dict(before.accounting.failed)
    assert failed.pop("http_503") == failed.pop("timeout") == 1
    assert dict(after.accounting.failed) == failed
    for name, data in kept.items():
        assert (output / name).read_bytes() == data
    result = run_module("pipeline.validate", output, "--deep")
    assert result.returncode == 0, result.stdout + result.stderr


# Runs where no machine but this one can be reached, and this one has an address that
# is anybody's.
_PUBLIC = "93.184.216.34"
_SCRIPT = f"""
import subprocess, sys
from pathlib import Path
from tests.pipeline.corpora import encoded, picture, write_table
from tests.pipeline.web import Reply, WebServer

folder = Path(sys.argv[1])
image = Reply(body=encoded(picture(1)))
with WebServer("{_PUBLIC}") as public, WebServer() as private:
    private.serve("/secret", image)
    port = private.port
    urls = [public.serve("/good", image)]
    for number, target in enumerate((
        private.url("/secret"), f"http://[::ffff:127.0.0.1]:{{port}}/secret",
        f"http://localhost:{{port}}/secret", f"//0:{{port}}/secret",
        "http://169.254.169.254/latest/meta-data", "file:///etc/hostname",
    )):
        moved = Reply(status=302, headers={{"Location": target}})
        urls.append(public.serve(f"/to{{number}}", moved))
    urls += [private.url("/secret"), f"http://2130706433:{{port}}/secret"]
    rows = [{{"url": url, "caption": "a bird"}} for url in urls]
    write_table(folder / "urls.csv", rows)
    done = subprocess.run([
        sys.executable, "-m", "pipeline.preprocess", f"--input={{folder}}/urls.csv",
        f"--output={{folder}}/out", "--image.size=32", "--split.val=0",
        "--tokenizer=train:64", "--workers=1",
    ])
    assert done.returncode == 0
    assert not private.hits, private.hits
    assert public.hits.total() == 7, public.hits
"""


def test_no_redirect_leads_to_a_private_address(tmp_path: Path) -> None:
    up = f"ip link set lo up && ip addr add {_PUBLIC}/32 dev lo"
    alone = ["unshare", "--map-root-user", "--net", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, up], capture_output=True, check=False).returncode
    ):
        pytest.skip("no network of its own here (unshare --net, ip)")
    result = subprocess.run(
        [*alone, f'{up} && exec "$0" "$@"', sys.executable, "-c", _SCRIPT, tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = list(by_url(tmp_path / "out").values())
    written = [row["url"] for row in found if row["status"] == "success"]
    assert [url.rpartition("/")[2] for url in written] == ["good"]
    reasons = Counter(row["reason"] for row in found)
    assert reasons == {None: 1, "address_refused": 7, "bad_url": 1}
