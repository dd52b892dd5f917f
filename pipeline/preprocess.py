"""`python -m pipeline.preprocess`: a raw image-text corpus to a dataset directory.

Owns the command line alone: keys are in `pipeline.options`, the run in `pipeline.run`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.config import parse, run
from pipeline.manifest import Manifest
from pipeline.options import PreprocessConfig
from pipeline.terminal import printable

PROG = "python -m pipeline.preprocess"
_DESCRIPTION = """Turn a corpus of images and captions into WebDataset shards with
tokenized captions, an index and a manifest. Runs on a Ray of its own, or as a job:
ray job submit --working-dir . -- python -m pipeline.preprocess ... The same command
continues an interrupted run."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Exits 0 when the dataset is complete."""
    config = parse(PreprocessConfig, argv, prog=PROG, description=_DESCRIPTION)
    # After the command line: --help and a wrong key answer at once, without Ray.
    if config.dry_run:
        from pipeline.estimate import cores_of, estimate
        from pipeline.run import check_output, tell_split_folders

        check_output(config)
        if config.retry_failed:
            print(_again(config))
            return 0
        tell_split_folders(config)
        found, cores = estimate(config), cores_of(config)
        if config.json:
            print(json.dumps(found.as_json(config, cores), indent=1))
        else:
            print(found.text(config, cores))
        return 0
    from pipeline.run import preprocess

    print(_summary(preprocess(config), config.output))
    return 0


def _again(config: PreprocessConfig) -> str:
    """What `--retry_failed` would try, by the manifest: nothing else is read."""
    from pipeline.progress import reasons
    from pipeline.run import complete_manifest

    failed = complete_manifest(config.output).accounting.failed
    if config.json:
        return json.dumps({"tried_again": failed}, indent=1)
    which = reasons(failed, shown=len(failed))
    again = f"{sum(failed.values())} failed inputs would be tried again"
    return f"{config.output}: {again}{f' ({which})' if which else ''}"


def _summary(manifest: Manifest, output: str) -> str:
    counts = manifest.accounting
    lines = [f"{output}: {counts.inputs} inputs"]
    lines.append(f"  written     {counts.written}")
    for title, reasons in (("filtered", counts.filtered), ("failed", counts.failed)):
        for reason, count in reasons.items():
            lines.append(f"  {title:<11} {count} {reason}")
    lines.append(f"  duplicates  {counts.duplicates}")
    for split, row in manifest.totals().items():
        lines.append(
            f"  {split}: {row['samples']} samples, {row['captions']} captions, "
            f"{row['tokens']} tokens in {row['shards']} shards, "
            f"{row['bytes'] / 1e6:.1f} MB"
        )
    return "\n".join(map(printable, lines))


if __name__ == "__main__":
    run(main, PROG)
