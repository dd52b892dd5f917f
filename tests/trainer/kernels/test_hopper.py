from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

import trainer.kernels
from tests.conftest import ROOT

PACKAGE = "trainer.kernels"
MODULES = [
    module.__name__.removeprefix(f"{PACKAGE}.")
    for found in pkgutil.iter_modules(trainer.kernels.__path__)
    if hasattr(module := importlib.import_module(f"{PACKAGE}.{found.name}"), "CASES")
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
