"""Kubernetes' and KubeRay's schemas, and a check of manifests against them.

Kubernetes' own come from its Python client, whose models are made from the OpenAPI
document of Kubernetes 1.36. KubeRay's definitions are in no package of the registries;
the tables below name every field of the kinds that we use, after the API reference of
KubeRay 1.6.2 (and `priority` of 1.7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

KUBERAY: dict[str, dict[str, str]] = {
    "RayCluster": {
        "apiVersion": "str",
        "kind": "str",
        "metadata": "V1ObjectMeta",
        "spec": "RayClusterSpec",
    },
    "RayClusterSpec": {
        "upgradeStrategy": "UpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": "bool",
        "managedBy": "str",
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": "dict[str, str]",
        "enableInTreeAutoscaling": "bool",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "headGroupSpec": "HeadGroupSpec",
        "rayVersion": "str",
        "workerGroupSpecs": "list[WorkerGroupSpec]",
    },
    "UpgradeStrategy": {"type": "str"},
    "AuthOptions": {
        "enableK8sTokenAuth": "bool",
        "secretName": "str",
        "mode": "disabled|token",
    },
    "AutoscalerOptions": {
        "resources": "V1ResourceRequirements",
        "image": "str",
        "imagePullPolicy": "str",
        "securityContext": "V1SecurityContext",
        "idleTimeoutSeconds": "int",
        "upscalingMode": "Default|Aggressive|Conservative",
        "version": "v1|v2",
        "env": "list[V1EnvVar]",
        "envFrom": "list[V1EnvFromSource]",
        "volumeMounts": "list[V1VolumeMount]",
    },
    "GcsFaultToleranceOptions": {
        "redisUsername": "RedisCredential",
        "redisPassword": "RedisCredential",
        "externalStorageNamespace": "str",
        "redisAddress": "str",
    },
    "RedisCredential": {"valueFrom": "V1EnvVarSource", "value": "str"},
    "HeadGroupSpec": {
        "template": "V1PodTemplateSpec",
        "headService": "V1Service",
        "enableIngress": "bool",
        "resources": "dict[str, str]",
        "labels": "dict[str, str]",
        "rayStartParams": "dict[str, str]",
        "serviceType": "str",
    },
    "WorkerGroupSpec": {
        "suspend": "bool",
        "groupName": "str",
        "replicas": "int",
        "minReplicas": "int",
        "maxReplicas": "int",
        "idleTimeoutSeconds": "int",
        "priority": "int",
        "resources": "dict[str, str]",
        "labels": "dict[str, str]",
        "rayStartParams": "dict[str, str]",
        "template": "V1PodTemplateSpec",
        "scaleStrategy": "ScaleStrategy",
        "numOfHosts": "int",
    },
    "ScaleStrategy": {"workersToDelete": "list[str]"},
}
REQUIRED = {
    "RayCluster": ("apiVersion", "kind", "metadata", "spec"),
    "RayClusterSpec": ("headGroupSpec",),
    "HeadGroupSpec": ("template",),
    "WorkerGroupSpec": ("groupName", "minReplicas", "maxReplicas", "template"),
}
_PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "object": object}


def problems(kind: str, value: Any, where: str = "") -> list[str]:
    """What is wrong with `value` as a `kind`: unknown fields, types, missing ones."""
    return list(_problems(kind, value, where or kind))


def _problems(kind: str, value: Any, where: str) -> Iterator[str]:
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for number, item in enumerate(value):
            yield from _problems(found[1], item, f"{where}[{number}]")
    elif found := re.fullmatch(r"dict\[str, (.+)\]", kind):
        if not isinstance(value, Mapping):
            yield f"{where}: {value!r} is no mapping"
            return
        for name, item in value.items():
            yield from _problems(found[1], item, f"{where}.{name}")
    elif "|" in kind:
        if value not in kind.split("|"):
            yield f"{where}: {value!r} is none of {kind}"
    elif kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]) or (
            kind == "int" and isinstance(value, bool)
        ):
            yield f"{where}: {value!r} is no {kind}"
    else:
        yield from _fields(kind, value, where)


def _fields(kind: str, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{where}: {value!r} is no {kind}"
        return
    known = KUBERAY.get(kind) or _model(kind)
    for name, item in value.items():
        if name not in known:
            yield f"{where}: {kind} has no field {name!r}"
        else:
            yield from _problems(known[name], item, f"{where}.{name}")
    for name in REQUIRED.get(kind, ()):
        if name not in value:
            yield f"{where}: {kind} lacks {name!r}"
    if kind not in KUBERAY:
        yield from _missing(kind, value, where)


def _model(kind: str) -> dict[str, str]:
    """Types of the fields of one of Kubernetes' kinds, by their names in YAML."""
    from kubernetes.client import models

    model = getattr(models, kind)
    return {
        model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()
    }


def _missing(kind: str, value: Mapping[str, Any], where: str) -> Iterator[str]:
    """Required fields and closed lists of values, which only the model itself knows."""
    from kubernetes.client import models

    model = getattr(models, kind)
    names = {yaml: python for python, yaml in model.attribute_map.items()}
    try:
        model(**{names[name]: item for name, item in value.items() if name in names})
    except ValueError as error:
        yield f"{where}: {error}"
