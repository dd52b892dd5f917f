"""`python -m pipeline.retokenize DIR`: a dataset again, with another tokenizer's ids.

Owns the command line alone: the run is `pipeline.retokenizing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import parse, run

PROG = "python -m pipeline.retokenize"
_DESCRIPTION = """Write a dataset anew with the tokens of another tokenizer: images are
copied byte for byte, and what comes out is what preprocess would have written with that
tokenizer. The same command continues an interrupted run."""


@dataclass(frozen=True, kw_only=True)
class RetokenizeConfig:
    """Which dataset, and which tokens."""

    dataset: str
    """Folder or URL of a complete dataset."""
    tokenizer: str
    """Directory or hub name of a Hugging Face fast tokenizer, or train:N for a
    lower-case WordPiece of N entries trained on the captions that are not held out."""
    output: str
    """Folder or URL of the new dataset: new, empty, or an unfinished run of this
    command."""
    workers: int | None = None
    """Processes. Default: one for each CPU."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Exits 0 when the new dataset is complete."""
    config = parse(
        RetokenizeConfig,
        argv,
        prog=PROG,
        description=_DESCRIPTION,
        positional="dataset",
    )
    # After the command line: --help and a wrong key answer at once.
    from pipeline.retokenizing import retokenize

    manifest = retokenize(config)
    for split, row in manifest.totals().items():
        print(
            f"{config.output} {split}: {row['samples']} samples, {row['tokens']} "
            f"tokens of {manifest.tokenizer.vocab_size} entries in {row['shards']} "
            "shards"
        )
    return 0


if __name__ == "__main__":
    run(main, PROG)
