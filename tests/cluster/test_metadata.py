"""The clouds' notices are read as the clouds give them."""

from __future__ import annotations

import time

import pytest

from cluster.metadata import aws, gcp
from tests.cluster.fake_metadata import ACTION_MS, metadata


def test_aws_tells_when_the_instance_ends() -> None:
    with metadata(noticed=True) as service:
        found = aws(service.url)
        assert found is not None
        assert found.deadline * 1000 == ACTION_MS
        assert "terminate" in found.what


def test_google_gives_half_a_minute() -> None:
    with metadata(noticed=True) as service:
        before = time.time()
        found = gcp(service.url)
        assert found is not None
        assert before < found.deadline <= time.time() + 30


@pytest.mark.parametrize("ask", [aws, gcp])
def test_no_notice_is_no_notice(ask) -> None:  # type: ignore[no-untyped-def]
    with metadata(noticed=False) as service:
        assert ask(service.url) is None


def test_a_service_that_fails_says_so() -> None:
    with (
        metadata(noticed=True, broken=1) as service,
        pytest.raises(OSError, match="503"),
    ):
        aws(service.url)
    with pytest.raises(OSError, match="refused"):
        gcp(service.url)  # ended with the block


def test_a_machine_of_another_cloud_is_named() -> None:
    with metadata(noticed=True) as service:
        with pytest.raises(ValueError, match="not an EC2 machine"):
            aws(f"{service.url}/elsewhere")
        with pytest.raises(ValueError, match="not a Compute Engine VM"):
            gcp(f"{service.url}/elsewhere")
