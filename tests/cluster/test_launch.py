"""What each cloud is asked for: spot only where it is said, and nobody let in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from tests.conftest import ROOT

WORKERS = ["cpu", "cpu-ondemand", "gpu", "gpu-ondemand"]
SPOT = {"cpu", "gpu"}
REGION = "us-west-2"


def machines(cloud: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The file, and what each node type asks the cloud for."""
    given = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())
    types = given["available_node_types"]
    return given, {name: types[name]["node_config"] for name in types}


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An AWS of our own, and the id of the security group that a user makes there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        ec2 = boto3.client("ec2", region_name=REGION)
        (network,) = ec2.describe_vpcs()["Vpcs"]
        group = ec2.create_security_group(
            GroupName="palimpsest", Description="own", VpcId=network["VpcId"]
        )["GroupId"]
        own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ssh = {
            "IpProtocol": "tcp",
            "FromPort": 22,
            "ToPort": 22,
            "IpRanges": [{"CidrIp": "192.0.2.7/32"}],
        }
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[own, ssh])
        yield group


def bootstrapped(given: dict[str, Any], group: str) -> dict[str, Any]:
    """What `ray up` makes of the file, with the cloud's answers, before any machine."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(given))
    for each in config["available_node_types"].values():
        if each["node_config"].get("SecurityGroupIds") == ["sg-FILL-IN"]:
            each["node_config"]["SecurityGroupIds"] = [group]
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    validate_config(config)
    return AWSNodeProvider.bootstrap_config(config)


def open_to_the_world() -> list[str]:
    """Security groups that let in anybody who has an address."""
    ec2 = boto3.client("ec2", region_name=REGION)
    return [
        group["GroupName"]
        for group in ec2.describe_security_groups()["SecurityGroups"]
        for rule in group["IpPermissions"]
        for source in rule.get("IpRanges", ())
        if source["CidrIp"] == "0.0.0.0/0"
    ]


def test_ray_up_on_aws_opens_nothing_and_finds_the_machines(aws: str) -> None:
    given, asked = machines("aws")
    config = bootstrapped(given, aws)
    assert open_to_the_world() == []
    for name, each in config["available_node_types"].items():
        node = each["node_config"]
        assert node["SecurityGroupIds"] == [aws]
        assert node["SubnetIds"]
        assert node["IamInstanceProfile"] == asked[name]["IamInstanceProfile"]
        assert "KeyName" in node
    # Ray knows the machines: it adds to the resources only what no demand names.
    for name in WORKERS:
        resources = config["available_node_types"][name]["resources"]
        stated = given["available_node_types"][name]["resources"]
        assert resources.items() >= stated.items()
        added = set(resources) - set(stated)
        assert all(key == "memory" or key.startswith("accelerator") for key in added)


def test_machines_on_aws_have_the_cores_and_gpus_that_are_stated(aws: str) -> None:
    given, _ = machines("aws")
    wanted = copy.deepcopy(given)
    for name in WORKERS:
        stated = given["available_node_types"][name]["resources"]
        for key in ("CPU", "GPU"):
            stated.pop(key, None)
    found = bootstrapped(given, aws)["available_node_types"]
    for name in WORKERS:
        stated = wanted["available_node_types"][name]["resources"]
        assert found[name]["resources"].items() >= stated.items()


def test_without_a_group_of_our_own_ray_would_let_the_world_in(aws: str) -> None:
    given, asked = machines("aws")
    for node in asked.values():
        del node["SecurityGroupIds"]
    bootstrapped(given, aws)
    assert open_to_the_world() != []


def test_aws_workers_are_spot_where_it_is_said() -> None:
    _, asked = machines("aws")
    for name, node in asked.items():
        market = node.get("InstanceMarketOptions", {})
        assert (market.get("MarketType") == "spot") == (name in SPOT)
        if market:
            assert market["SpotOptions"] == {
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
            }
        without = {k: v for k, v in node.items() if k != "InstanceMarketOptions"}
        if name in SPOT:
            assert without == asked[f"{name}-ondemand"]


def test_aws_gives_credentials_to_session_tokens_only() -> None:
    given, asked = machines("aws")
    assert given["provider"]["cache_stopped_nodes"] is False
    for name, node in asked.items():
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["IamInstanceProfile"] == {
            "Name": "palimpsest-head" if name == "head" else "palimpsest-worker"
        }
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"]
        assert disk["Ebs"]["VolumeSize"] >= 200


def test_google_workers_are_spot_where_it_is_said() -> None:
    _, asked = machines("gcp")
    for name, node in asked.items():
        scheduling = node.get("scheduling", {})
        assert (scheduling.get("provisioningModel") == "SPOT") == (name in SPOT)
        if name in SPOT:
            assert scheduling["instanceTerminationAction"] == "DELETE"
            other = asked[f"{name}-ondemand"]
            rest = [
                {k: v for k, v in n.items() if k != "scheduling"} for n in (node, other)
            ]
            assert rest[0] == rest[1]
        if name.startswith("gpu"):
            # Google refuses a machine with GPUs that is to move while it runs.
            assert scheduling["onHostMaintenance"] == "TERMINATE"


def test_google_machines_are_in_a_network_of_our_own() -> None:
    given, asked = machines("gcp")
    assert given["provider"]["cache_stopped_nodes"] is False
    region = given["provider"]["region"]
    for name, node in asked.items():
        (interface,) = node["networkInterfaces"]
        assert interface["subnetwork"].endswith(
            f"/regions/{region}/subnetworks/palimpsest"
        )
        (account,) = node["serviceAccounts"]
        who = "head" if name == "head" else "worker"
        assert account["email"].startswith(f"palimpsest-{who}@")
        (disk,) = node["disks"]
        assert disk["autoDelete"]
        assert int(disk["initializeParams"]["diskSizeGb"]) >= 200
