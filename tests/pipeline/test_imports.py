"""What importing the package costs, and what it must not need."""

from __future__ import annotations

import subprocess
import sys

from tests.pipeline.corpora import REPOSITORY

_FORBIDDEN = "torch", "deepspeed", "transformers"
_MODULES = sorted(path.stem for path in (REPOSITORY / "pipeline").glob("*.py"))


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_module_needs_torch() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in _FORBIDDEN)
    modules = [name for name in _MODULES if name != "__init__"]
    imports = "".join(f"import pipeline.{name}\n" for name in modules)
    assert len(modules) > 10
    python(f"import sys\n{blocked}{imports}")


def test_help_explains_every_key_without_starting_ray() -> None:
    code = (
        "import sys\nfrom pipeline.preprocess import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'ray' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    text = python(code)
    for key in (
        "--input",
        "--image.size",
        "--split.group",
        "--shard.samples",
        "--limit",
    ):
        assert key in text
