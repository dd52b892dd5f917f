"""`python -m pipeline.validate DIR`: is every byte of a dataset as it was written?

Owns the command line and its exit status: 0 sound, 1 damaged. The checks are
`pipeline.audit`, mending is `pipeline.repair`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipeline.config import parse, run
from pipeline.damages import Damage
from pipeline.terminal import printable

PROG = "python -m pipeline.validate"
_DESCRIPTION = """Check a dataset against its manifest: counts, sizes, sha256, CRC32C of
every sample, tar headers, keys and identities; with --deep also that images decode,
that tokens are those of the captions, and that json, tables and index agree. Names
every damage with its file and offset; exits 0 on a sound dataset and 1 on any damage.
--repair rewrites what follows from sound files, has the rest made again from the
corpus, and exits 0 when the dataset is sound again."""
_SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What to check."""

    dataset: str
    """Folder or URL that `python -m pipeline.preprocess` wrote."""
    deep: bool = False
    """Also decode every image, encode every caption again, and compare what samples
    say in different places."""
    repair: bool = False
    """Mend what is damaged; damaged files go to DATASET.quarantine."""
    preprocess: str | None = None
    """YAML file with the keys of the preprocess command, for --repair. Default: what
    DATASET.progress.json says about the run that made the dataset, as long as that
    reads no web server, runs no function and allows no other places."""
    workers: int | None = None
    """Shards checked at a time (default: the CPUs of this machine)."""
    json: bool = False
    """Print the result as JSON, every damage in it."""


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 where the dataset is sound, 1 where it is not."""
    config = parse(
        ValidateConfig,
        argv,
        prog=PROG,
        description=_DESCRIPTION,
        positional="dataset",
    )
    from pipeline.audit_files import read_manifest, retry_begun
    from pipeline.storage import open_storage

    storage = open_storage(config.dataset)
    done: list[str] = []
    if config.repair:
        from pipeline.repair import repair

        found: list[Damage] = []

        def find() -> list[Damage]:
            found.extend(_checked(config))
            return found

        done += repair(storage, find, config=config.preprocess, say=_say)
        damages = _checked(config) if done or found else []
    else:
        damages = _checked(config)
    begun = retry_begun(storage)
    if config.json:
        print(_as_json(config, damages, done, begun))
    elif begun:
        print(
            f"{config.dataset}: a retry of failed inputs was begun, and is no part of "
            "it yet; the same `python -m pipeline.preprocess ... --retry_failed` "
            "finishes it"
        )
    if not config.json and not damages:
        manifest, _ = read_manifest(storage)
        print(
            f"{config.dataset}: sound; {manifest.accounting.written} samples in "
            f"{len(manifest.shards)} shards, {manifest.accounting.inputs} inputs "
            "accounted for"
        )
    return 1 if damages else 0


def _checked(config: ValidateConfig) -> list[Damage]:
    """Every damage, shown as it is found unless the result is wanted as JSON."""
    from tqdm import tqdm

    from pipeline.audit import audit
    from pipeline.audit_files import read_manifest
    from pipeline.storage import open_storage

    storage = open_storage(config.dataset)
    manifest, _ = read_manifest(storage)
    damages: list[Damage] = []
    with tqdm(
        total=sum(shard.bytes for shard in manifest.shards),
        unit="B",
        unit_scale=True,
        desc="validate",
        disable=None,
    ) as bar:
        workers = config.workers or len(os.sched_getaffinity(0))
        for damage in audit(
            storage, deep=config.deep, workers=workers, on_bytes=bar.update
        ):
            damages.append(damage)
            if not config.json and len(damages) <= _SHOWN:
                bar.write(printable(str(damage)), file=sys.stdout)
    if damages and not config.json:
        hidden = len(damages) - _SHOWN
        more = f", {hidden} of them not shown (--json shows all)" if hidden > 0 else ""
        word = "damage" if len(damages) == 1 else "damages"
        print(f"{config.dataset}: {len(damages)} {word}{more}")
    return damages


def _as_json(
    config: ValidateConfig,
    damages: Sequence[Damage],
    repaired: Sequence[str],
    begun: bool,
) -> str:
    value = {
        "dataset": config.dataset,
        "deep": config.deep,
        "sound": not damages,
        "damages": [asdict(damage) for damage in damages],
        "repaired": list(repaired),
        "retry_begun": begun,
    }
    return json.dumps(value, indent=1)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, PROG)
