"""What `cluster.plan` says of the bundled corpus and recipe, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.options import RunConfig
from cluster.plan import main
from cluster.plan_options import PlanConfig
from cluster.plan_picture import page, picture
from cluster.plan_run import Plan, as_json, plan
from cluster.plan_text import duration, size, text
from pipeline.config import parse
from tests.conftest import ROOT, emoji_shards, python

RUN = """
output: {output}
preprocess:
  config: {root}/examples/emoji.yaml
  arguments: {{input: {root}/examples/emoji.parquet, limit: 600, shard.samples: 100}}
pretrain:
  config: emoji
  min_nodes: 2
  max_nodes: 9
  gpus_per_node: 2
  arguments: {{schedule: {{steps: 60000}}, checkpoint.every_steps: 500}}
prices: {{cpu: 0.5, gpu: 2, gpu-ondemand: 6, head: 0.1}}
"""
FEW = ("--gpu=l4", "--spot.runs=20")


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "run.yaml"
    path.write_text(RUN.format(output=folder / "run", root=ROOT))
    return path


def planned(run_yaml: Path, *words: str) -> Plan:
    argv = [f"--config={run_yaml}", *FEW, *words]
    return plan(parse(PlanConfig, argv, prog="cluster.plan", description=""))


@pytest.fixture(scope="module")
def found(run_yaml: Path) -> Plan:
    return planned(run_yaml, "--spot.rate=0.5", "--assume.cpu_cores=2")


@pytest.fixture(scope="module")
def values(found: Plan) -> dict[str, Any]:
    """As a strict reader of JSON sees it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(as_json(found)), parse_constant=refuse)


def test_it_reads_the_file_of_the_run(run_yaml: Path) -> None:
    config = parse(RunConfig, [f"--config={run_yaml}"], prog="", description="")
    assert config.pretrain is not None
    assert config.pretrain.max_nodes == 9


def test_nodes_for_preprocessing_follow_from_a_dry_run(values: dict[str, Any]) -> None:
    made, assume = values["preprocess"], values["config"]["assume"]
    assert (made["inputs"], made["ranges"]) == (600, 6)
    # A core takes a range, and a node has two cores.
    assert made["nodes"] == 3
    busy = made["wall_s"] - 60 * assume["node_minutes"]
    assert busy == pytest.approx(made["core_s"] / 6)
    assert made["node_s"] == pytest.approx(3 * (busy + 600))
    assert sum(made["pairs"].values()) == pytest.approx(600)
    assert made["vocab_size"] == 3000


def test_training_is_planned_on_every_valid_number_of_nodes(
    values: dict[str, Any],
) -> None:
    found = values["pretrain"]
    # 48 lanes and 2 ranks on a node: of 2 to 9 nodes 5, 7 and 9 do not divide them.
    assert [one["nodes"] for one in found["sizes"]] == [2, 3, 4, 6, 8]
    for one in found["sizes"]:
        assert one["ranks"] == 2 * one["nodes"]
        assert one["ranks"] * one["micro_batch"] * one["accumulation"] == 48
    most = found["sizes"][-1]
    # A small model: no step takes less than 20 ms, on however few nodes.
    assert found["step_s"] == pytest.approx(0.02)
    assert most["work_s"] == pytest.approx(60_000 * 0.02)
    assert found["interval_s"] == pytest.approx(500 * 0.02)
    assert found["epochs"] == pytest.approx(
        60_000 * 48 / values["preprocess"]["pairs"]["train"]
    )
    pair = values["preprocess"]["bytes"] / 600
    assert most["read_mb_s"] == pytest.approx(pair * 48 / 0.02 / 8 / 1e6)


def test_a_dataset_that_is_there_is_planned_with_and_what_does_not_fit_is_said(
    run_yaml: Path,
) -> None:
    shards = emoji_shards(run_yaml.parent / "shards", "--limit=300")
    found = planned(
        run_yaml,
        *("--preprocess=null", f"--data={shards}", "--spot.rate=0"),
        *("--assume.least_step_ms=0", "--pretrain.arguments.deepspeed.zero_stage=0"),
    )
    assert found.preprocess is None
    assert found.pretrain
    assert found.preempted
    manifest = json.loads((shards / "manifest.json").read_text())
    pairs = manifest["totals"]["train"]["samples"]
    assert found.pretrain.epochs == pytest.approx(60_000 * 48 / pairs)
    # Computing takes all the time of a step now.
    slower = [one.slower for one in found.pretrain.sizes]
    assert slower == pytest.approx([4, 8 / 3, 2, 4 / 3, 1])
    assert found.preempted.sweep.best.lost_share.mean == 0
    said = " ".join(text(found).split())
    assert "no preemptions (spot.rate is 0)" in said
    # bf16 needs ZeRO 1 or more.
    assert "DOES NOT START: on 8 nodes with ZeRO 0" in said
    assert "take deepspeed.zero_stage 1" in said


def test_costs_are_node_hours_times_prices(values: dict[str, Any]) -> None:
    costs, hour = values["costs"], 3600
    assert costs["preprocess"] == pytest.approx(
        0.5 * values["preprocess"]["node_s"] / hour
    )
    assert costs["ondemand"] == pytest.approx(6 * 8 * values["ondemand_s"] / hour)
    best = values["preempted"]["sweep"]["best"]
    start = 60 * values["config"]["assume"]["node_minutes"]
    nodes = best["node_s"]["mean"] + 8 * start
    assert costs["spot"]["mean"] == pytest.approx(2 * nodes / hour)
    assert costs["spot"]["low"] < costs["spot"]["mean"] < costs["spot"]["high"]
    assert values["total_s"] == pytest.approx(
        values["preprocess"]["wall_s"] + start + best["wall_s"]["mean"]
    )
    head = 0.1 * values["total_s"] / hour
    assert costs["total"] == pytest.approx(
        costs["preprocess"] + costs["spot"]["mean"] + head
    )
    assert costs["missing"] == []


def test_the_interval_of_the_recipe_is_tried_beside_the_best(
    values: dict[str, Any],
) -> None:
    tried = values["preempted"]["sweep"]
    points = [one["interval_s"] for one in tried["points"]]
    assert points == sorted(points)
    assert tried["given"]["interval_s"] == values["pretrain"]["interval_s"]
    walls = [one["wall_s"]["mean"] for one in tried["points"]]
    assert tried["best"]["wall_s"]["mean"] == min(walls)
    shown = values["preempted"]["example"]
    assert {span["nodes"] for span in shown["spans"]} <= {0, 2, 3, 4, 6, 8}


def test_the_text_says_what_the_numbers_say(found: Plan) -> None:
    said = text(found)
    assert max(map(len, said.splitlines())) <= 88
    assert found.preempted
    assert f"best: {duration(found.preempted.sweep.best.interval_s)}" in said
    assert "valid world sizes       5 with 2 to 9 nodes of 2 ranks" in said
    assert "It is as fast with pretrain.max_nodes 2" in said
    assert f"{found.costs.total():,.2f} USD" in said
    assert "checkpoint.every_minutes: " in said
    # Every assumption is named by its key, with its value.
    for key in ("assume.mfu 0.35", "spot.rate 0.5", "assume.detect_seconds 60"):
        assert key in " ".join(said.split())
    assert "Costs need prices" not in said


def test_without_prices_there_are_hours_and_a_word_on_the_key(run_yaml: Path) -> None:
    words = (f"--config={run_yaml}", "--pretrain=null", "--prices={}")
    done = python("-m", "cluster.plan", *words)
    assert done.returncode == 0, done.stdout
    said = " ".join(done.stdout.split())
    assert "USD" not in said
    assert "with the key prices: {head: ..., cpu: ...}" in said


def test_the_picture_and_the_page_need_nothing_from_elsewhere(found: Plan) -> None:
    drawn = picture(found)
    assert drawn.startswith(b"\x89PNG")
    shown = page(drawn, text(found))
    assert "data:image/png;base64," in shown
    assert "PRETRAIN, undisturbed" in shown
    assert "http" not in shown


def test_node_types_come_from_the_yaml_of_the_cluster(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "available_node_types:\n"
        "  crunch: {resources: {CPU: 3}, max_workers: 4}\n"
        "  gpu: {resources: {GPU: 2}, max_workers: 9}\n"
        "idle_timeout_minutes: 7\n"
    )
    words = [f"--config={run_yaml}", "--pretrain=null", f"--cluster={cluster}"]
    assert main([*words, "--types.cpu=crunch", "--prices={crunch: 3}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Six ranges, three cores.
    assert found["preprocess"]["nodes"] == 2
    assert found["config"]["assume"]["cpu_nodes"] == 4
    assert found["config"]["assume"]["idle_minutes"] == 7
    assert found["costs"]["preprocess"] == pytest.approx(
        3 * found["preprocess"]["node_s"] / 3600
    )
    gpus = [f"--config={run_yaml}", *FEW, f"--cluster={cluster}", "--types.cpu=crunch"]
    for key, message in (
        ("--pretrain.gpus_per_node=4", r"'gpu' has 2 in .*correct one"),
        ("--pretrain.max_nodes=20", "max_nodes is 20, and .* allows 9"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*gpus, "--prices={}", key])
    with pytest.raises(ValueError, match=r"'cpu' is no node type of .*crunch, gpu"):
        main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrain.min_nodes=5", "--pretrain.max_nodes=5"], "1, 2, 3, 4, 6, 8, 12"),
        (["--pretrain.config=emojy"], "Did you mean 'emoji'"),
        (["--prices={gpus: 3}"], "prices.gpus: 'gpus' is no node type.*mean 'gpu'"),
        (["--preprocess.arguments.input=nowhere.parquet"], "nowhere.parquet"),
        (["--gpu=null"], "--gpu must be given"),
        (["--cluster=nowhere.yaml"], "--cluster nowhere.yaml cannot be read"),
        (["--cluster={run}"], "has no available_node_types"),
        (["--html=/nowhere/plan.html"], "--html /nowhere/plan.html is in a folder"),
        (["--assume.mfu=2"], "assume.mfu is 2"),
        (["--spot.runs=3"], "spot.runs is 3"),
        (["--preprocess=null", "--data={folder}"], "has no manifest.json"),
        (["--pretrain.arguments.optimiser.lr=1"], "unknown key 'optimiser.*optimizer"),
    ],
)
def test_what_would_fail_later_is_refused_now(
    run_yaml: Path, words: list[str], message: str
) -> None:
    places = {"run": run_yaml, "folder": run_yaml.parent}
    given = [
        word.replace(f"{{{name}}}", str(place))
        for word in words
        for name, place in places.items()
        if f"{{{name}}}" in word or not any(f"{{{one}}}" in word for one in places)
    ]
    with pytest.raises(ValueError, match=message):
        main([f"--config={run_yaml}", *FEW, *dict.fromkeys(given)])


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0213, "0.0213 s"), (59, "59 s"), (90, "1.5 min"), (4_000_000, "1,111 h")],
)
def test_durations_are_readable(value: float, said: str) -> None:
    assert duration(value) == said
    assert duration(float("inf")) == "no end"
    assert [size(one) for one in (12, 1.5e9, 2e15)] == ["12 B", "1.5 GB", "2,000 TB"]
