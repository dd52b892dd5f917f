"""run.yaml: what is wrong with it is said before anything starts, with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.options import RunConfig, flags
from cluster.run import only
from pipeline.config import ConfigError, parse, to_yaml

WHOLE = {
    "output": "/shared/run",
    "preprocess": {"arguments": {"input": "/corpus", "image": {"size": 64}}},
    "pretrain": {"config": "emoji", "max_nodes": 3, "arguments": {"seed": 7}},
    "evaluate": {},
    "prices": {"cpu": 0.4},
}


def parsed(tmp_path: Path, value: object, *argv: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(value))
    words = [f"--config={path}", *argv]
    return parse(RunConfig, words, prog="cluster.run", description="")


def test_a_run_reads_back_equal_and_flags_win(tmp_path: Path) -> None:
    config = parsed(tmp_path, WHOLE, "--pretrain.max_nodes=5")
    assert config.pretrain
    assert config.pretrain.max_nodes == 5
    assert config.shards == "/shared/run/data"
    assert config.trained == "/shared/run/pretrain"
    assert parsed(tmp_path, yaml.safe_load(to_yaml(config))) == config


def test_arguments_become_flags_of_the_command() -> None:
    given = {"image": {"size": 64, "flip": True}, "mask.rate": None, "data": ["a", "b"]}
    assert flags(given) == [
        "--image.size=64",
        "--image.flip=true",
        "--mask.rate=null",
        '--data=["a", "b"]',
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preprocess": None, "pretrain": None, "evaluate": None}, "has no stage"),
        ({"preprocess": None}, "pretrain needs shards"),
        ({"pretrain": None}, "evaluate needs the pretrain stage"),
        ({"overlap": True, "preprocess": None, "data": "/d"}, "overlap needs both"),
        ({"prices": {"cpu": -1}}, "prices.cpu is -1.0: it must be 0 or more"),
        ({"pretrain": {"config": "emoji", "min_nodes": 3}}, "max_nodes is 1"),
        ({"pretrain": {"config": "emoji", "gpus_per_node": 0}}, "ranks_per_node"),
        ({"pretrain": {"config": "e", "nodes": 3}}, "Did you mean 'pretrain."),
        ({"pretrain": {"config": "e", "arguments": {"output": "x"}}}, "leave it out"),
        ({"preproces": {}}, "Did you mean 'preprocess'?"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, {**WHOLE, **change})
    assert words in str(caught.value)


def test_a_stage_alone_works_on_what_the_others_make(tmp_path: Path) -> None:
    config = parsed(tmp_path, {**WHOLE, "overlap": True})
    alone = only(config, "pretrain")
    assert (alone.preprocess, alone.evaluate, alone.overlap) == (None, None, False)
    assert alone.shards == config.shards
    assert alone.trained == config.trained
    assert only(config, "preprocess").pretrain is None
    with pytest.raises(ValueError, match="no pretrain stage"):
        only(only(config, "preprocess"), "pretrain")
