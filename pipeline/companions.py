"""Files by which other loaders read a dataset as it stands.

Owns `sizes.json` (open_clip), `.nv-meta/` (Megatron-Energon) and the `README.md` card
(Hugging Face `datasets`). Does not own the manifest, which is the truth they repeat.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

import yaml

from pipeline.manifest import Manifest

_ENERGON = "megatron.energon"
# What `datasets` calls it.
_CARD_SPLITS = {"val": "validation"}


def companion_files(manifest: Manifest) -> dict[str, str]:
    """Text of every companion file, by path below the dataset directory."""
    return {
        **_sizes(manifest),
        ".nv-meta/.info.json": _json({"shard_counts": _counts(manifest)}),
        ".nv-meta/split.yaml": _yaml(_energon_splits(manifest)),
        ".nv-meta/dataset.yaml": _yaml(
            {
                "sample_type": {
                    "__module__": _ENERGON,
                    "__class__": "CaptioningSample",
                },
                "field_map": {"image": "jpg", "caption": "txt"},
            }
        ),
        "README.md": _card(manifest),
    }


def splits_of(manifest: Manifest) -> list[str]:
    """Names of the splits that have shards, in order."""
    return sorted({shard.split for shard in manifest.shards})


def _counts(manifest: Manifest) -> dict[str, int]:
    return {shard.name: shard.samples for shard in manifest.shards}


def _sizes(manifest: Manifest) -> dict[str, str]:
    """open_clip looks beside the shards, by file name; the one at the top is for people
    and for readers of several splits.
    """
    files = {"sizes.json": _json(_counts(manifest))}
    for split in splits_of(manifest):
        sizes = {
            PurePosixPath(shard.name).name: shard.samples
            for shard in manifest.split(split)
        }
        files[f"{split}/sizes.json"] = _json(sizes)
    return files


def _energon_splits(manifest: Manifest) -> dict[str, Any]:
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for shard in manifest.shards:
        parts.setdefault(shard.split, []).append(shard.name)
    return {"split_parts": parts, "exclude": []}


def _card(manifest: Manifest) -> str:
    files = [
        {"split": _CARD_SPLITS.get(split, split), "path": f"{split}/*.tar"}
        for split in splits_of(manifest)
    ]
    front = {"configs": [{"config_name": "default", "data_files": files}]}
    source = ", ".join(manifest.sources)
    lines = [
        "---",
        _yaml(front).rstrip(),
        "---",
        f"# {source}",
        "",
        "Image-text pairs as WebDataset shards with tokenized captions, made by "
        "`python -m pipeline.preprocess`.",
        "",
        "| split | shards | samples | captions | tokens | tar bytes |",
        "|---|---|---|---|---|---|",
    ]
    for split, row in manifest.totals().items():
        lines.append(f"| {split} | " + " | ".join(str(n) for n in row.values()) + " |")
    counts = manifest.accounting
    lines += [
        "",
        f"Of {counts.inputs} inputs {counts.written} were written, "
        f"{sum(counts.filtered.values())} filtered, {sum(counts.failed.values())} "
        f"failed and {counts.duplicates} were duplicates. `manifest.json` is the "
        "source of truth; `*.parquet` has a row for every input, with the reason of "
        "each that is not here.",
        "",
        "- Trainer: `deepspeed --module trainer.pretrain --data DIR ...`",
        '- Hugging Face: `datasets.load_dataset("DIR")`',
        '- webdataset: `webdataset.WebDataset("DIR/train/shard-000000.tar")`',
        "- Check every byte: `python -m pipeline.validate DIR`",
    ]
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False)
