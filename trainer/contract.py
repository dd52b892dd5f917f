"""What others may rely on about a run: valid world sizes, checkpoint layout, metrics.

Needs only the standard library, because `cluster` imports it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
COMPLETE = "complete.json"
CHECKPOINTS = "checkpoints"
ENVIRONMENT = "environment.json"
FROZEN = "frozen.json"
"""Which shards epochs cover, up to the last that is frozen."""
FINETUNE = "finetune.yaml"
"""What a fine-tuning was started with: with it a folder is one."""
PREPROCESSOR = "preprocessor_config.json"
"""Of an exported model."""
LOCK = ".lock"
LOCKED = "another trainer is writing"
"""How a refusal begins where another trainer holds the run: who waits may try again."""
_PANELS = "panels"
_CHECKPOINT_NAME = re.compile(r"step-(\d{8})")
_PANEL_NAME = re.compile(r"step-(\d{8})\.png")

METRIC_NAMES = (
    "step",
    "epoch",
    "loss",
    "mlm_loss",
    "recon_loss",
    "lr",
    "grad_norm",
    "pairs_per_s",
    "tokens_per_s",
    "model_tflops",
    "data_wait_frac",
    "read_s",
    "decode_s",
    "padding_frac",
    "replaced",
    "peak_memory_gib",
    "skipped",
    "sample_digest",
)
# Only of steps that have something to measure: masked words of such pairs, pixels that
# RECON scores.
MODE_METRIC_NAMES = (
    "psnr",
    "mlm_loss_image_heavy",
    "mlm_loss_text_heavy",
    "mlm_loss_light",
    "recon_loss_image_heavy",
    "recon_loss_text_heavy",
    "recon_loss_light",
)
# Only with an ITM head: `itm_loss` and `itm_accuracy`, and both with `val_`.
VALIDATION_NAMES = (
    "step",
    "val_loss",
    "val_mlm_loss",
    "val_recon_loss",
    "val_mlm_accuracy",
    "val_pairs",
    "val_damaged",
)

# What may differ between the calls that make up one run. `data` may move: the
# manifest hash in the checkpoint says whether it is the same dataset.
_MAY_CHANGE = (
    "data",
    "output",
    "init",
    "max_steps",
    "micro_batch",
    "threads",
    "compile",
    "digest",
    "tokenizer",
    "grow",
    "changed_data",
    # Not which pairs and masks: one curve would be of two measurements.
    "eval.every_steps",
    "eval.probes_every_steps",
    "eval.probe_pairs",
    "eval.panel_pairs",
    "deepspeed.zero_stage",
    "deepspeed.offload",
    "deepspeed.activation_checkpointing",
    # When a run stops, not what it computes until then.
    "safety.nonfinite",
    "safety.max_nonfinite",
    "safety.max_spikes",
    "safety.hang_minutes",
    "safety.hang_action",
)
_MAY_CHANGE_GROUPS = ("checkpoint.", "log.", "damage.", "storage.", "profile.")


def may_change(key: str) -> bool:
    """Whether a dotted key of the configuration may differ when a run is resumed."""
    # Which checkpoints a model started from, whatever the model.
    body = key.startswith("model.") and key.endswith("body")
    return body or key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_GROUPS)


def blocking(changes: Iterable[str], *, changed_data: object) -> list[str]:
    """Of `key: old -> new` lines, those that a resumed run may not change.

    Args:
        changed_data: the key of that name, in the new configuration.
    """
    found = [line for line in changes if not may_change(line.partition(":")[0])]
    if changed_data == "new_epoch":
        # Sources may have come or gone.
        found = [line for line in found if not line.startswith("mixture")]
    return found


def check_world_size(world_size: int, *, lanes: int) -> None:
    """Raise ValueError, naming the world sizes that would do, unless W divides L."""
    if world_size < 1 or lanes % world_size:
        valid = ", ".join(map(str, valid_world_sizes(lanes)))
        raise ValueError(
            f"world size {world_size} does not divide the {lanes} lanes of this run: "
            f"start {valid} ranks, or choose other `lanes` for a new run"
        )


def valid_world_sizes(
    lanes: int, *, global_batch: int = 0, group: int = 1
) -> list[int]:
    """World sizes at which a run with `lanes` lanes takes the same steps.

    Args:
        global_batch: pairs of a step, where `group` of them must stay on one rank.
    """
    return [
        size
        for size in range(1, lanes + 1)
        if lanes % size == 0 and global_batch // size % group == 0
    ]


def micro_batch_size(
    *, global_batch: int, world_size: int, ceiling: int, group: int = 1
) -> int:
    """Pairs of a micro-batch: the largest divisor of G / W that is a multiple of
    `group` and not above `ceiling`.

    Raises:
        ValueError: W does not divide G, the ceiling is below 1, or there is none.
    """
    if global_batch % world_size or ceiling < 1:
        raise ValueError(
            f"global_batch {global_batch} cannot be split over {world_size} ranks in "
            f"micro-batches of at most {ceiling}"
        )
    per_rank = global_batch // world_size
    sizes = range(group, min(ceiling, per_rank) + 1, group)
    found = max((n for n in sizes if per_rank % n == 0), default=None)
    if found is None:
        raise ValueError(
            f"no micro-batch of at most {ceiling} pairs holds whole groups of {group} "
            f"(model.itm_group) of the {per_rank} pairs that a rank has of a step: "
            "lower model.itm_group, raise micro_batch or global_batch"
            f"{', or start fewer ranks' if world_size > 1 else ''}"
        )
    return found


def checkpoint_name(step: int) -> str:
    """Directory of the checkpoint taken after `step` steps, below `CHECKPOINTS`."""
    return f"step-{step:08d}"


def complete_checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint of a run, oldest first. One
    without its completion marker does not exist.
    """
    found = []
    for path in sorted((Path(run) / CHECKPOINTS).glob("step-*")):
        match = _CHECKPOINT_NAME.fullmatch(path.name)
        if match and (path / COMPLETE).is_file():
            found.append((int(match[1]), path))
    return found


def complete_steps(names: Iterable[str]) -> list[int]:
    """Steps of every complete checkpoint of a run whose files, by their paths below
    it, are `names`, oldest first: for a run behind a URL, whose files the caller lists.
    """
    found = []
    for name in names:
        folder, _, file = name.removeprefix(f"{CHECKPOINTS}/").partition("/")
        match = _CHECKPOINT_NAME.fullmatch(folder)
        if match and file == COMPLETE and name.startswith(f"{CHECKPOINTS}/"):
            found.append(int(match[1]))
    return sorted(found)


def panel_path(run: str | Path, step: int) -> Path:
    """File of the panel of reconstructions drawn after `step` steps."""
    return Path(run) / _PANELS / f"step-{step:08d}.png"


def panels(run: str | Path) -> list[tuple[int, Path]]:
    """(step, file) of every panel of a run, oldest first."""
    found = []
    for path in sorted((Path(run) / _PANELS).glob("step-*.png")):
        match = _PANEL_NAME.fullmatch(path.name)
        if match and path.is_file():
            found.append((int(match[1]), path))
    return found


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, one a step; a torn last line is left out."""
    return _read_rows(Path(run) / METRICS)


def read_validation(run: str | Path) -> list[dict[str, Any]]:
    """Lines of `validation.jsonl`, one a step at which a run looked at held-out pairs,
    with `VALIDATION_NAMES`, or names that begin with `probe_`, or both; a torn last
    line is left out.
    """
    return _read_rows(Path(run) / VALIDATION)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return parse_rows(path.read_text()) if path.is_file() else []


def parse_rows(text: str) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` or `validation.jsonl`, a torn last one left out: for a
    run behind a URL, whose file the caller reads.
    """
    rows = []
    for line in text.split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
