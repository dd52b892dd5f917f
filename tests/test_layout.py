"""Law 7: three packages, one direction, fast imports without side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What may cross. `pipeline.config` is the one configuration mechanism of all packages.
ALLOWED = {
    "pipeline": set(),
    "trainer": {"pipeline.manifest", "pipeline.config"},
    "cluster": {"pipeline.manifest", "pipeline.config", "trainer.contract"},
}
FORBIDDEN = {"pipeline": {"torch", "deepspeed"}, "trainer": {"ray", "pyarrow"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_only_the_shared_modules_cross_packages(package: str) -> None:
    others = {name for name in ALLOWED if name != package}
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in FORBIDDEN.get(package, ()), f"{path}: {name}"
            if top in others:
                crossing = ".".join(name.split(".")[:2])
                assert crossing in ALLOWED[package] | {top}, f"{path}: {name}"
                assert name != top, f"{path}: {name}"


# Outside trainer/models and its recipes: what tasks ask of it, its card, an example.
OF_MASKVLM = {
    "trainer/tasks/body_maskvlm.py",
    "trainer/tasks/retrieval_maskvlm.py",
    "trainer/model_card.py",
    "trainer/pretrain.py",
}


def test_a_model_is_known_by_name_in_its_own_files_alone() -> None:
    """MaskVLM, the second of them: nothing else asks which model it has."""
    knowing = set()
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("trainer/models/"):
            words = {*imports(path), *strings(path)}
            if any("maskvlm" in word.lower() for word in words):
                knowing.add(name)
    assert knowing == OF_MASKVLM


def strings(path: Path) -> set[str]:
    """Strings of a module's code, those that only say something of it left out."""
    tree = ast.parse(path.read_text())
    said = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in said
    }


def run_without(blocked: set[str], statement: str) -> str:
    """Run `statement` in a new process where `blocked` cannot be imported."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {sorted(blocked)!r}:\n"
        "            raise ImportError(f'{name} is not installed')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"{statement}\n"
        "print('imported')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_trainer_imports_without_ray_and_pyarrow() -> None:
    modules = (
        "trainer.pretrain, trainer.loop, trainer.evaluate, trainer.report.__main__, "
        "trainer.replay, trainer.replay_page, trainer.plan, trainer.plan_text, "
        "trainer.finetune, trainer.tasks.finetuning, trainer.tasks.evaluation, "
        "trainer.tasks.matching"
    )
    assert run_without({"ray", "pyarrow"}, f"import {modules}") == "imported\n"


def test_commands_of_the_cluster_answer_before_ray_is_imported() -> None:
    modules = (
        "cluster.run, cluster.preprocess, cluster.pretrain, cluster.status, "
        "cluster.local, cluster.plan, cluster.guard, cluster.runner, cluster.elastic, "
        "cluster.stages, cluster.checks"
    )
    blocked = {"ray", "torch", "pyarrow", "deepspeed", "transformers"}
    assert run_without(blocked, f"import {modules}") == "imported\n"


def test_manifest_needs_only_numpy() -> None:
    blocked = {"ray", "pyarrow", "torch", "yaml", "jsonargparse", "PIL", "tokenizers"}
    assert run_without(blocked, "import pipeline.manifest") == "imported\n"


def test_contract_needs_only_the_standard_library() -> None:
    blocked = {"numpy", "torch", "yaml", "jsonargparse", "deepspeed"}
    assert run_without(blocked, "import trainer.contract") == "imported\n"


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    heavy = "{'torch', 'ray', 'numpy', 'pyarrow', 'deepspeed'}"
    statement = f"import {package}; assert not {heavy} & set(sys.modules)"
    assert run_without(set(), statement) == "imported\n"
