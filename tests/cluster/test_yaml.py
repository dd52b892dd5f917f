"""The files for `ray up`: Ray takes them, and what matters in them is set."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.fallback import FallbackConfig
from cluster.metadata import CLOUDS
from cluster.notice import NoticeConfig
from pipeline.config import parse
from tests.conftest import ROOT

PAIRS = [("cpu", "cpu-ondemand"), ("gpu", "gpu-ondemand")]
WORKERS = [name for pair in PAIRS for name in pair]
REQUIREMENTS = ROOT / "requirements.txt"


@pytest.fixture(params=["aws", "gcp"])
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def given(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())


@pytest.fixture
def types(given: dict[str, Any]) -> dict[str, Any]:
    return given["available_node_types"]


def prepared(given: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does it: defaults of the provider filled in, then the schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(given))
    validate_config(config)
    return config


def values(item: Any) -> Iterator[str]:
    """Every string in the file that is no comment."""
    if isinstance(item, dict):
        for each in item.values():
            yield from values(each)
    elif isinstance(item, list):
        for each in item:
            yield from values(each)
    elif isinstance(item, str):
        yield item


def commands(given: dict[str, Any], key: str = "commands") -> list[str]:
    """Every shell command of the keys whose names end in `key`."""
    found = []
    for part in (given, *given["available_node_types"].values()):
        found += [each for name in part if name.endswith(key) for each in part[name]]
    return found


def start(given: dict[str, Any], who: str) -> str:
    (found,) = (c for c in given[f"{who}_start_ray_commands"] if "ray start" in c)
    return found


def flags(command: str) -> dict[str, str]:
    """The flags of `ray start`."""
    words = (word.partition("=") for word in shlex.split(command))
    return {name: value for name, equals, value in words if equals}


def shared_memory(given: dict[str, Any], name: str) -> int:
    """GB of /dev/shm of a node type: the last `--shm-size` counts."""
    options = list(given["docker"]["run_options"])
    own = given["available_node_types"][name].get("docker", {})
    options += own.get("worker_run_options", [])
    sizes = [re.fullmatch(r"--shm-size=(\d+)g", option) for option in options]
    return [int(found[1]) for found in sizes if found][-1]


def test_ray_up_takes_it(given: dict[str, Any]) -> None:
    config = prepared(given)
    assert config["available_node_types"].keys() == {"head", *WORKERS}
    assert config["head_node_type"] == "head"


@pytest.mark.parametrize("where", ["", "docker", "available_node_types.gpu"])
def test_ray_up_refuses_what_it_does_not_know(
    given: dict[str, Any], where: str
) -> None:
    part = given
    for name in filter(None, where.split(".")):
        part = part[name]
    part["idle_timeout"] = 1
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        prepared(given)


def test_it_starts_empty_and_its_size_has_a_limit(
    given: dict[str, Any], types: dict[str, Any]
) -> None:
    for name in WORKERS:
        assert types[name]["min_workers"] == 0
        assert 0 < types[name]["max_workers"] <= given["max_workers"]
    # Room for all spot workers of both kinds at once.
    assert given["max_workers"] >= sum(types[spot]["max_workers"] for spot, _ in PAIRS)


def test_spot_is_first_and_on_demand_may_take_its_place(
    given: dict[str, Any], types: dict[str, Any]
) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    # What the autoscaler itself makes of it.
    read = AutoscalingConfig(prepared(given), skip_content_hash=True)
    configs = read.get_node_type_configs()
    assert configs is not None
    for spot, ondemand in PAIRS:
        assert configs[spot].resources == configs[ondemand].resources
        assert configs[spot].priority > configs[ondemand].priority
        assert configs[spot].max_worker_nodes == configs[ondemand].max_worker_nodes
        for key in ("docker", "worker_setup_commands", "initialization_commands"):
            assert types[spot].get(key) == types[ondemand].get(key)


def test_resources_say_what_a_whole_node_is(types: dict[str, Any]) -> None:
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    for name in WORKERS:
        own = "gpu_node" if name.startswith("gpu") else "cpu_node"
        other = {"gpu_node": "cpu_node", "cpu_node": "gpu_node"}[own]
        resources = types[name]["resources"]
        assert resources[own] == 1
        assert other not in resources
        assert ("GPU" in resources) == (own == "gpu_node")


def test_idle_nodes_go_and_gpu_nodes_go_sooner(
    given: dict[str, Any], types: dict[str, Any]
) -> None:
    assert 0 < given["idle_timeout_minutes"] <= 10
    for name in ("gpu", "gpu-ondemand"):
        assert 60 <= types[name]["idle_timeout_s"] <= 180
        assert types[name]["idle_timeout_s"] < given["idle_timeout_minutes"] * 60


def test_shared_memory_holds_the_object_store(given: dict[str, Any]) -> None:
    for name in ("head", *WORKERS):
        who = "head" if name == "head" else "worker"
        store = int(flags(start(given, who))["--object-store-memory"])
        assert shared_memory(given, name) * 1e9 > 2 * store
    assert shared_memory(given, "gpu") >= 8 * 16


def test_the_head_computes_nothing_and_hides_its_dashboard(
    given: dict[str, Any],
) -> None:
    head = flags(start(given, "head"))
    assert head["--num-cpus"] == "0"
    assert head["--dashboard-host"] == "127.0.0.1"
    assert not any(
        "dashboard" in command for command in given["worker_start_ray_commands"]
    )


def test_a_job_that_is_asked_to_stop_has_time_to_save(given: dict[str, Any]) -> None:
    assert "-e RAY_JOB_STOP_WAIT_TIME_S=600" in given["docker"]["run_options"]


def test_nothing_is_open_to_the_world(given: dict[str, Any]) -> None:
    for value in values(given):
        assert "0.0.0.0" not in value
        assert "::/0" not in value


def test_every_node_asks_for_the_token_and_no_file_has_it(
    given: dict[str, Any], cloud: str
) -> None:
    options = given["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    assert "-e RAY_enable_autoscaler_v2=1" in options
    (path,) = (o for o in options if o.startswith("-e RAY_AUTH_TOKEN_PATH="))
    folder = path.partition("=")[2].rpartition("/")[0].replace("/home/ray", "~")
    assert given["file_mounts"][folder] == folder
    assert "RAY_AUTH_TOKEN=" not in "".join(values(given))
    text = (ROOT / "cluster" / f"{cloud}.yaml").read_text()
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)


def test_mounted_files_are_there(given: dict[str, Any]) -> None:
    for local in given["file_mounts"].values():
        if not local.startswith("~"):
            assert (ROOT / local).exists(), local


def test_containers_have_the_pinned_ray(
    given: dict[str, Any], types: dict[str, Any]
) -> None:
    pinned = re.search(r"^ray\[default\]==(.+)$", REQUIREMENTS.read_text(), re.M)
    assert pinned is not None
    image = f"rayproject/ray:{pinned[1]}-py311"
    assert given["docker"]["image"] == image
    for name in ("gpu", "gpu-ondemand"):
        assert types[name]["docker"]["worker_image"] == f"{image}-gpu"


def test_every_command_is_sound_shell(given: dict[str, Any]) -> None:
    for command in commands(given):
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """Run a command as on a node: home folder, mounted files, `ray` and `python` that
    write down their arguments."""
    code = tmp_path / "palimpsest"
    code.mkdir()
    (code / "requirements.txt").write_text(REQUIREMENTS.read_text())
    calls = tmp_path / "calls"
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("ray", "python", "sudo"):
        script = (
            f'#!/bin/sh\necho "{name} $@ [$AUTOSCALER_MAX_LAUNCH_BATCH]" >> {calls}\n'
        )
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)

    def run(command: str, **env: str) -> tuple[int, list[str]]:
        calls.unlink(missing_ok=True)
        base = {"HOME": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", command.replace("/tmp/", f"{tmp_path}/")],
            env={**base, "RAY_HEAD_IP": "10.0.0.4", **env},
            check=False,
        )
        said = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, said

    return run


@pytest.mark.parametrize("who", ["head", "worker"])
def test_a_token_that_the_container_cannot_read_is_opened_to_it(
    given: dict[str, Any], who: str, shell: Any, tmp_path: Path
) -> None:
    (command,) = (c for c in given[f"{who}_start_ray_commands"] if "chmod" in c)
    path = tmp_path / "auth_token"
    _, said = shell(command, RAY_AUTH_TOKEN_PATH=str(path))
    assert said == [f"sudo chmod -R a+rX {tmp_path}/.palimpsest []"]
    path.write_text("token")
    assert shell(command, RAY_AUTH_TOKEN_PATH=str(path)) == (0, [])


@pytest.mark.parametrize("who", ["head", "worker"])
def test_ray_does_not_start_without_the_token(
    given: dict[str, Any], who: str, shell: Any
) -> None:
    code, said = shell(start(given, who), RAY_AUTH_MODE="token")
    assert code == 0
    assert len(said) == 1
    assert said[0].startswith("ray start ")
    address = "--head" if who == "head" else "--address=10.0.0.4:6379"
    assert address in said[0]
    if who == "head":
        assert said[0].endswith("[1]")
    for wrong in ({}, {"RAY_AUTH_MODE": "disabled"}):
        code, said = shell(start(given, who), **wrong)
        assert (code != 0, said) == (True, [])


def test_gpu_nodes_and_head_install_everything_torch_first(
    given: dict[str, Any], types: dict[str, Any], shell: Any
) -> None:
    torch = next(
        line for line in REQUIREMENTS.read_text().splitlines() if "torch==" in line
    )
    for listed in (types["gpu"]["worker_setup_commands"], given["head_setup_commands"]):
        said = [line for command in listed for line in shell(command)[1]]
        assert said[0].startswith("python -m pip install ")
        assert said[0].split()[-2] == torch
        assert said[1].split()[-3:-1] == ["-r", "requirements.txt"]


def test_cpu_nodes_install_all_but_what_trains(
    given: dict[str, Any], types: dict[str, Any], shell: Any, tmp_path: Path
) -> None:
    assert "worker_setup_commands" not in types["cpu"]
    (command,) = given["worker_setup_commands"]
    code, said = shell(command)
    assert (code, len(said)) == (0, 1)
    kept = (tmp_path / "cpu.txt").read_text().splitlines()
    left_out = set(REQUIREMENTS.read_text().splitlines()) - set(kept)
    assert {line.partition("==")[0] for line in left_out} == {
        "torch",
        "deepspeed",
        "triton",
    }


def arguments(given: dict[str, Any], who: str, module: str) -> list[str]:
    """Arguments of `python -m MODULE` in the start commands."""
    (command,) = (c for c in given[f"{who}_start_ray_commands"] if module in c)
    words = shlex.split(command)
    assert words[-5:] == [">", words[-4], "2>&1", "<", "/dev/null"] or words[-1] == "&"
    return words[words.index(module) + 1 : words.index(">")]


def test_workers_watch_for_the_notice_of_their_cloud(
    given: dict[str, Any], cloud: str
) -> None:
    argv = arguments(given, "worker", "cluster.notice")
    config = parse(NoticeConfig, argv, prog="", description="")
    assert config.cloud == cloud == given["provider"]["type"]
    assert config.cloud in CLOUDS
    assert config.address == "$RAY_HEAD_IP:6379"
    assert config.every_seconds <= 5


def test_the_head_falls_back_in_the_file_that_its_autoscaler_reads(
    given: dict[str, Any],
) -> None:
    argv = arguments(given, "head", "cluster.fallback")
    config = parse(FallbackConfig, argv, prog="", description="")
    head = flags(start(given, "head"))
    assert str(config.config_file) == head["--autoscaling-config"]
    assert config.address == f"127.0.0.1:{head['--port']}"
    assert config.seconds >= 300
