"""What several tests of this folder need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A real cluster of one node with one CPU, without an autoscaler."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        # Ray would leave a token in the home directory, and reads these only once in a
        # process: a token of our own may come too late.
        environment.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=1, include_dashboard=False)
        yield
        ray.shutdown()
