"""Configurations on the page: what differs, every key, where runs ran, commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.report.data import Run
from trainer.report.elements import card, folded, missing, section, table

# Keys that differ between any two runs.
_OWN_KEYS = ("output",)
_ABSENT = object()


def configuration_section(runs: Sequence[Run]) -> str:
    """Keys in which runs differ, then every key, folded."""
    known = [run for run in runs if run.config]
    notes = [
        missing(f"No config.yaml of {run.name}.", pretrain_command(run))
        for run in runs
        if not run.config
    ]
    if not known:
        return section("Configuration", *notes)
    head = ["key", *(run.name for run in known)]
    configs = [run.config for run in known]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = _table_rows(configs, list(keys))
    differing = _table_rows(configs, differing_keys(configs))
    body = []
    if differing:
        body.append(card(table(head, differing, texts=len(head)), title="Differences"))
    elif len(known) > 1:
        body.append("<p>The runs differ in nothing but where they were written.</p>")
    body.append(folded("Every key", table(head, rows, texts=len(head))))
    return section("Configuration", *body, _facts(runs), *notes)


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys whose values are not the same everywhere: a key that a run lacks
    differs from any value, null included; 1 and 1.0 are the same.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key not in _OWN_KEYS
        and any(not _same(config, configs[0], key) for config in configs[1:])
    ]


def commands_section(runs: Sequence[Run]) -> str:
    """What was run, as far as that was recorded."""
    lines = []
    for run in runs:
        probes = (run.probes or {}).get("command")
        lines += list(run.commands) or ([probes] if probes else [])
    if not lines:
        body = '<p class="missing">The commands were not recorded.</p>'
        return section("Commands", body)
    # Runs share some, such as the one that made their dataset.
    blocks = [f"<pre>{escape(line)}</pre>" for line in dict.fromkeys(lines)]
    return section("Commands", *blocks, lead="What was run, in order.")


def pretrain_command(run: Run) -> str:
    """The command that makes a run, with what is known of it."""
    data = " ".join(run.data) or "SHARDS"
    return (
        "deepspeed --module trainer.pretrain --config RECIPE "
        f"--data {data} --output {run.path}"
    )


def _facts(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.facts))
    if not keys:
        return ""
    head = ["", *(run.name for run in runs)]
    rows = _table_rows([run.facts for run in runs], keys)
    return card(table(head, rows, texts=len(head)), title="Where they ran")


def _table_rows(
    mappings: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[list[str]]:
    return [[key, *(_text(one.get(key, _ABSENT)) for one in mappings)] for key in keys]


def _same(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    a, b = one.get(key, _ABSENT), other.get(key, _ABSENT)
    # True is 1 in Python, not in YAML.
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _text(value: Any) -> str:
    """A value as YAML has it; a dash where there is none."""
    if value is _ABSENT:
        return "\N{EN DASH}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
