"""The manifests for Kubernetes: valid, and what matters in them is set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.options import PretrainStage
from tests.cluster.kubernetes_check import problems
from tests.conftest import ROOT

FOLDER = ROOT / "cluster" / "kuberay"
KINDS = {
    "RayCluster": "RayCluster",
    "ServiceAccount": "V1ServiceAccount",
    "NetworkPolicy": "V1NetworkPolicy",
}
PAIRS = [("cpu", "cpu-ondemand"), ("gpu", "gpu-ondemand")]
GROUPS = [name for pair in PAIRS for name in pair]


def documents() -> list[dict[str, Any]]:
    paths = sorted(FOLDER.glob("*.yaml"))
    return [each for path in paths for each in yaml.safe_load_all(path.read_text())]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return next(each for each in documents() if each["kind"] == "RayCluster")


@pytest.fixture(scope="module")
def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = cluster["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in found] == GROUPS
    return {group["groupName"]: group for group in found}


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(group)["containers"]
    return only


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", ())}


def size(quantity: str) -> float:
    """Bytes of a quantity such as 16Gi."""
    units = {"Mi": 2**20, "Gi": 2**30}
    return float(quantity[:-2]) * units[quantity[-2:]]


@pytest.mark.parametrize("document", documents(), ids=lambda each: each["kind"])
def test_every_manifest_fits_its_schema(document: dict[str, Any]) -> None:
    assert problems(KINDS[document["kind"]], document) == []


def test_the_schema_refuses_what_is_unknown_missing_or_wrong(
    cluster: dict[str, Any],
) -> None:
    def broken(change: Any) -> str:
        changed = copy.deepcopy(cluster)
        change(changed["spec"], changed["spec"]["workerGroupSpecs"][2])
        return "; ".join(problems("RayCluster", changed))

    assert "no field 'idleTimeout'" in broken(lambda s, g: g.update(idleTimeout=1))
    assert "'3' is no int" in broken(lambda s, g: g.update(maxReplicas="3"))
    assert "lacks 'template'" in broken(lambda s, g: g.pop("template"))
    assert "none of disabled|token" in broken(
        lambda s, g: s["authOptions"].update(mode="tokens")
    )
    assert "no field 'restartpolicy'" in broken(
        lambda s, g: pod(g).update(restartpolicy="Never")
    )
    assert "no field 'sizelimit'" in broken(
        lambda s, g: pod(g)["volumes"][0]["emptyDir"].update(sizelimit="1Gi")
    )
    assert "`name`" in broken(lambda s, g: container(g).pop("name"))


def test_rays_autoscaler_reads_types_limits_and_priorities(
    cluster: dict[str, Any],
) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    given = copy.deepcopy(cluster)
    given["metadata"]["namespace"] = "default"
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(given)
    types = config["available_node_types"]
    assert list(types) == ["headgroup", *GROUPS]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for spot, ondemand in PAIRS:
        # Equal resources, or the one that wastes less is taken whatever its priority.
        assert types[spot]["resources"] == types[ondemand]["resources"]
        assert types[spot]["priority"] > types[ondemand]["priority"]
    for name in GROUPS:
        resources = types[name]["resources"]
        assert types[name]["min_workers"] == 0
        assert types[name]["max_workers"] > 0
        assert (resources.get("gpu_node"), resources.get("cpu_node")) == (
            (1, None) if name.startswith("gpu") else (None, 1)
        )
        assert ("GPU" in resources) == name.startswith("gpu")
    assert types["gpu"]["idle_timeout_s"] <= 180 < config["idle_timeout_minutes"] * 60


def test_the_fallback_waits_longer_than_a_machine_takes(
    cluster: dict[str, Any],
) -> None:
    options = cluster["spec"]["autoscalerOptions"]
    assert options["version"] == "v2"
    given = environment(options)
    assert int(given["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"]) >= 600
    assert int(given["RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S"]) >= 600
    # The names are the ones that this Ray reads.
    from ray.autoscaler._private import constants
    from ray.autoscaler.v2.instance_manager import config

    for module, name in zip((config, constants), given, strict=True):
        assert name in Path(module.__file__).read_text()


@pytest.mark.parametrize("name", GROUPS)
def test_spot_and_on_demand_machines_are_told_apart(
    name: str, groups: dict[str, dict[str, Any]]
) -> None:
    wanted = "on-demand" if name.endswith("ondemand") else "spot"
    assert pod(groups[name])["nodeSelector"] == {"karpenter.sh/capacity-type": wanted}


@pytest.mark.parametrize("name", GROUPS)
def test_a_lost_pod_stays_lost_and_has_time_for_a_checkpoint(
    name: str, groups: dict[str, dict[str, Any]]
) -> None:
    spec = pod(groups[name])
    assert spec["restartPolicy"] == "Never"
    drain = environment(container(groups[name]))[
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    ]
    assert spec["terminationGracePeriodSeconds"] > int(drain) + 10
    assert int(drain) > PretrainStage(config="mlim-base").checkpoint_seconds


@pytest.mark.parametrize("name", GROUPS)
def test_shared_memory_holds_the_object_store_and_fits_the_pod(
    name: str, groups: dict[str, dict[str, Any]]
) -> None:
    check_shared_memory(groups[name])


def check_shared_memory(group: dict[str, Any]) -> None:
    (volume,) = pod(group)["volumes"]
    (mount,) = container(group)["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = size(volume["emptyDir"]["sizeLimit"])
    assert limit > 2 * float(group["rayStartParams"]["object-store-memory"])
    assert limit < size(container(group)["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", ["gpu", "gpu-ondemand"])
def test_a_gpu_pod_has_the_whole_machine(
    name: str, groups: dict[str, dict[str, Any]]
) -> None:
    given = container(groups[name])["resources"]
    assert given["requests"] == given["limits"]
    assert given["limits"]["nvidia.com/gpu"] == groups[name]["resources"]["GPU"]
    assert given["limits"]["cpu"] == groups[name]["resources"]["CPU"]
    assert int(groups[name]["resources"]["GPU"]) in (4, 8, 16)


def test_the_head_runs_nothing_and_shows_its_dashboard_to_nobody(
    cluster: dict[str, Any],
) -> None:
    head = cluster["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress")
    assert pod(head)["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    check_shared_memory(head)
    (container,) = pod(head)["containers"]
    patience = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "600"}
    assert patience in container["env"]


def test_nobody_without_the_token_and_no_other_pod_gets_in(
    cluster: dict[str, Any],
) -> None:
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    (policy,) = (each for each in documents() if each["kind"] == "NetworkPolicy")
    own = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}
    assert policy["spec"]["podSelector"] == own
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": own}]}]


def test_pods_use_accounts_that_are_there(
    cluster: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    accounts = [d["metadata"]["name"] for d in documents() if "Account" in d["kind"]]
    used = [cluster["spec"]["headGroupSpec"], *groups.values()]
    assert {pod(each)["serviceAccountName"] for each in used} == set(accounts)


def test_one_version_of_ray_everywhere(
    cluster: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    pinned = (ROOT / "requirements.txt").read_text()
    version = cluster["spec"]["rayVersion"]
    assert f"ray[default]=={version}\n" in pinned
    assert (
        f"FROM rayproject/ray:{version}-py311-gpu\n"
        in (FOLDER / "Dockerfile").read_text()
    )
    used = [cluster["spec"]["headGroupSpec"], *groups.values()]
    assert {container(each)["image"] for each in used} == {"REGISTRY/palimpsest:TAG"}
