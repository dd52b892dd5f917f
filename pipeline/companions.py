"""Files by which other loaders read a dataset as it stands.

Owns `sizes.json` (open_clip), `.nv-meta/` (Megatron-Energon) and the `README.md` card
(Hugging Face `datasets`). Does not own the manifest, which is the truth they repeat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from pipeline.manifest import Manifest, Shard

_ENERGON = "megatron.energon"
# What `datasets` calls it.
_CARD_SPLITS = {"val": "validation"}


@dataclass(frozen=True, kw_only=True)
class EnergonFields:
    """What Energon has to be told about tars that do not follow the contract."""

    image: str
    caption: str
    shard_counts: Mapping[str, int]
    """Samples of each tar, those that are not in our index included."""


def companion_files(
    manifest: Manifest, energon: EnergonFields | None = None
) -> dict[str, str]:
    """Text of every companion file, by path below the dataset directory."""
    image = manifest.transform.get("image", {}).get("format", "jpg")
    energon = energon or EnergonFields(
        image=image, caption="txt", shard_counts=_counts(manifest)
    )
    return {
        **_sizes(manifest),
        ".nv-meta/.info.json": _json({"shard_counts": dict(energon.shard_counts)}),
        ".nv-meta/split.yaml": _yaml(_energon_splits(manifest)),
        ".nv-meta/dataset.yaml": _yaml(
            {
                "sample_type": {
                    "__module__": _ENERGON,
                    "__class__": "CaptioningSample",
                },
                "field_map": {"image": energon.image, "caption": energon.caption},
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
    for folder in sorted({_folder(shard) for shard in manifest.shards} - {"."}):
        sizes = {
            PurePosixPath(shard.name).name: shard.samples
            for shard in manifest.shards
            if _folder(shard) == folder
        }
        files[f"{folder}/sizes.json"] = _json(sizes)
    return files


def _folder(shard: Shard) -> str:
    return str(PurePosixPath(shard.name).parent)


def _patterns(manifest: Manifest, split: str) -> list[str]:
    """Globs of a split's tars."""
    folders = sorted({_folder(shard) for shard in manifest.split(split)})
    return ["*.tar" if folder == "." else f"{folder}/*.tar" for folder in folders]


def _energon_splits(manifest: Manifest) -> dict[str, Any]:
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for shard in manifest.shards:
        parts.setdefault(shard.split, []).append(shard.name)
    return {"split_parts": parts, "exclude": []}


def _card(manifest: Manifest) -> str:
    files = []
    for split in splits_of(manifest):
        paths = _patterns(manifest, split)
        path = paths[0] if len(paths) == 1 else paths
        files.append({"split": _CARD_SPLITS.get(split, split), "path": path})
    front = {"configs": [{"config_name": "default", "data_files": files}]}
    source = ", ".join(manifest.sources)
    command = "index" if manifest.indexed else "preprocess"
    example = manifest.shards[0].name
    lines = [
        "---",
        _yaml(front).rstrip(),
        "---",
        f"# {source}",
        "",
        "Image-text pairs as WebDataset shards with tokenized captions, made by "
        f"`python -m pipeline.{command}`.",
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
        f'- webdataset: `webdataset.WebDataset("DIR/{example}")`',
        "- Check every byte: `python -m pipeline.validate DIR`",
    ]
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False)
