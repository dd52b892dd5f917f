"""`python -m pipeline.validate DIR`: is every byte of a dataset as it was written?

Owns the command line and its exit status: 0 sound, 1 damaged. The checks are
`pipeline.audit`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import parse, run
from pipeline.manifest import load_manifest

PROG = "python -m pipeline.validate"
_DESCRIPTION = """Check a dataset directory against its manifest: counts, sizes, sha256,
CRC32C of every member, tar headers, keys and identities. Names every damage with its
file and offset; exits 0 on a sound dataset and 1 on any damage."""
_SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What to check."""

    dataset: str
    """Directory that `python -m pipeline.preprocess` wrote."""


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 where the dataset is sound, 1 where it is not."""
    config = parse(
        ValidateConfig, argv, prog=PROG, description=_DESCRIPTION, positional="dataset"
    )
    from tqdm import tqdm

    from pipeline.audit import audit

    root = Path(config.dataset)
    manifest = load_manifest(root)
    damages = 0
    total = sum(shard.bytes for shard in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="validate") as bar:
        for damage in audit(root, bar.update):
            damages += 1
            if damages <= _SHOWN:
                bar.write(str(damage), file=sys.stdout)
    if damages:
        more = f", {damages - _SHOWN} of them not shown" if damages > _SHOWN else ""
        print(f"{config.dataset}: {damages} damages{more}")
        return 1
    counts = manifest.accounting
    print(
        f"{config.dataset}: sound; {counts.written} samples in {len(manifest.shards)} "
        f"shards, {counts.inputs} inputs accounted for"
    )
    return 0


if __name__ == "__main__":
    run(main, PROG)
