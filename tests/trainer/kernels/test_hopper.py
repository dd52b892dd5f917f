from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = "trainer.kernels"
MODULES = [
    *("adamw", "attention", "bias_gelu", "column_sums", "compact", "cross_entropy"),
    *("dropout", "layer_norm", "mam_embed", "mam_masks", "pixel_sse", "pixels"),
]


@pytest.mark.parametrize("name", MODULES)
def test_kernels_compile_for_a_gpu_that_is_not_here(name: str) -> None:
    """Ahead of time, by Triton's own compiler and assembler."""
    environment = {**os.environ}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.kernels.hopper", f"{PACKAGE}.{name}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
