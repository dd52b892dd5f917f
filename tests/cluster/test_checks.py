"""What cannot work is said before any node starts, with the cure."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import commands, nodes
from cluster.checks import check, read_manifest, valid_nodes
from cluster.commands import Lanes, trainer_config
from cluster.options import EvaluateStage, PreprocessStage, PretrainStage, RunConfig
from tests.conftest import EMOJI
from trainer.contract import CHECKPOINTS, COMPLETE, CONFIG, checkpoint_name

TYPES = {
    "cpu": {"CPU": 2, "cpu_node": 1},
    "gpu": {"CPU": 4, "GPU": 1, "gpu_node": 1},
    "gpu-ondemand": {},
}


@pytest.fixture(scope="module", autouse=True)
def answers() -> Iterator[None]:
    """The commands say the same of the same words: most are asked once here."""
    with pytest.MonkeyPatch.context() as patch:
        asked = functools.cache(commands.printed)
        patch.setattr(
            commands, "printed", lambda module, words: asked(module, tuple(words))
        )
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs that are never started."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node types as the autoscaler's configuration would have them."""
    monkeypatch.setattr(
        nodes,
        "_configured",
        lambda: {k: {"resources": v, "max_workers": 2} for k, v in TYPES.items()},
    )


def pretrain(**keys: Any) -> PretrainStage:
    return PretrainStage(**{"config": "emoji", **keys})


def config(tmp_path: Path, **keys: Any) -> RunConfig:
    whole = RunConfig(
        output=str(tmp_path / "run"),
        preprocess=PreprocessStage(arguments={"input": str(EMOJI)}),
        pretrain=pretrain(max_nodes=2),
    )
    return dataclasses.replace(whole, **keys)


@pytest.mark.usefixtures("types")
def test_a_sound_run_passes(place: Path) -> None:
    check(config(place, prices={"gpu": 3.0, "head": 0.1}))


@pytest.mark.usefixtures("types")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pretrain": pretrain(config="emojy")}, "recipes: .*emoji"),
        ({"pretrain": pretrain(arguments={"lane": 3})}, "Did you mean 'lanes'"),
        (
            {"pretrain": pretrain(min_nodes=5, max_nodes=5)},
            "possible with such nodes are 1, 2, 3, 4, 6",
        ),
        (
            {"pretrain": pretrain(ranks_per_node=7)},
            "7 ranks each divides the 48 lanes.*are none",
        ),
        ({"pretrain": pretrain(arguments={"lanes": 7})}, "7 does not divide global_b"),
        (
            {"pretrain": pretrain(min_nodes=3, max_nodes=4)},
            "may have 2 such nodes at most",
        ),
        (
            {"pretrain": pretrain(node_resource="gpus")},
            "no node type of the cluster has the resource 'gpus'",
        ),
        ({"pretrain": pretrain(gpus_per_node=2)}, "gpus_per_node is 2 .*has as many"),
        ({"pretrain": pretrain(cpus_per_node=5)}, "cpus_per_node 5: no node for train"),
        ({"evaluate": EvaluateStage(gpus=2)}, "evaluate.gpus is 2 .*has as many"),
        ({"prices": {"gpo": 3.0}}, "node type 'gpo', .* Did you mean 'gpu'"),
        ({"preprocess": None, "data": "/nowhere"}, "/nowhere has no manifest.json"),
        (
            {"preprocess": PreprocessStage(arguments={"input": "x", "imag.size": 3})},
            "unknown key 'imag.size'. Did you mean 'image.size'",
        ),
        ({"preprocess": PreprocessStage()}, "preprocess.arguments.input must name"),
        ({"output": "runs/first"}, "runs/first is relative"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(
    change: dict[str, Any], words: str, place: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        check(config(place, **change))


@pytest.mark.usefixtures("types")
def test_a_finished_run_is_not_taken_for_what_another_recipe_would_make(
    tmp_path: Path,
) -> None:
    """Nor is another one continued: said here, and not by the trainer on its nodes."""
    given = config(tmp_path)
    assert given.pretrain
    kept = trainer_config(given.pretrain, data=given.shards, output=given.trained)
    # A key that there was none of when the run was made.
    del kept["digest"]
    run = Path(given.trained)
    saved = run / CHECKPOINTS / checkpoint_name(1)
    saved.mkdir(parents=True)
    (run / CONFIG).write_text(yaml.safe_dump(kept))
    other = pretrain(arguments={"optimizer.lr": 0.5, "checkpoint.every_minutes": 3})
    # Without a complete checkpoint the trainer starts anew.
    check(dataclasses.replace(given, pretrain=other))
    (saved / COMPLETE).touch()
    (run / COMPLETE).touch()
    check(given)
    words = (
        r"configuration: optimizer.lr: 0.\d+ -> 0.5. Take the old.* another `output`"
    )
    with pytest.raises(ValueError, match=words):
        check(dataclasses.replace(given, pretrain=other))


@pytest.mark.parametrize("resources", [{"gpu_node": 2}, {"gpu_node": 1, "GPU": 1}])
def test_a_node_that_would_count_as_several_is_refused(
    resources: dict[str, float], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"gpu": {"resources": TYPES["gpu"] | resources, "max_workers": 2}}
    monkeypatch.setattr(nodes, "_configured", lambda: rows)
    refused = pytest.raises(ValueError, match="type gpu has more than one 'gpu_node'")
    with refused if resources["gpu_node"] > 1 else contextlib.nullcontext():
        check(config(place))


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_without_autoscaler_is_taken_as_it_is(place: Path) -> None:
    assert nodes.known_types() is None
    assert nodes.offered({"gpu_node": 1}) is None
    assert nodes.alive_by_type() == {"head": 1}
    check(config(place, prices={"anything": 1.0}))


def test_storage_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to"):
        check(config(tmp_path, output=str(tmp_path / "file" / "run")))


def test_numbers_of_nodes_are_those_that_divide_the_lanes() -> None:
    lanes = Lanes(lanes=48, global_batch=96, group=4, steps=10, stops_early=False)
    sizes = valid_nodes(pretrain(min_nodes=1, max_nodes=9), lanes)
    assert sizes == [1, 2, 3, 4, 6, 8]
    # 16 ranks would split groups of 4 pairs: each has 6 of them.
    assert valid_nodes(pretrain(max_nodes=9, ranks_per_node=8), lanes) == [1, 3]


def test_a_damaged_manifest_is_said(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(str(tmp_path))
    shutil.rmtree(tmp_path)
