"""`python -m pipeline.index DIR`: existing tars get our index, tokens and manifest.

Owns the command line alone: the run is `pipeline.indexing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.config import parse, run
from pipeline.options import TextOptions

PROG = "python -m pipeline.index"
_DESCRIPTION = """Make a folder of WebDataset tars, from whatever tool, a dataset that
the trainer reads: index, tokens, tables and manifest are written beside the tars, which
stay as they are, byte for byte. The same command continues an interrupted run, and
takes in tars that were added since."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which tars, and what to make of them."""

    dataset: str
    """Folder or URL with tars in it, or in a folder for each split below it (train, val
    or validation, test, ...)."""
    tokenizer: str | None = None
    """Directory or hub name of a Hugging Face fast tokenizer, or train:N for one
    trained on the captions that are not held out. Default: the dataset's own where
    there is a folder `tokenizer` in it, else train:8000."""
    name: str | None = None
    """Name of the source of tars that this pipeline did not write: part of every
    sample's identity. Default: the folder's name."""
    split: str = "train"
    """Split of tars that lie in no folder of a split."""
    check: str = "full"
    """full: every image is decoded once, so that training never meets a broken one;
    header: sizes are read from the headers, which is much faster."""
    text: TextOptions = field(default_factory=TextOptions)
    """How captions are cleaned, and which are dropped."""
    workers: int | None = None
    """Processes. Default: one for each CPU."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Exits 0 when the dataset is complete."""
    config = parse(
        IndexConfig, argv, prog=PROG, description=_DESCRIPTION, positional="dataset"
    )
    # After the command line: --help and a wrong key answer at once.
    from pipeline.indexing import index, summary

    print(summary(index(config), config.dataset))
    return 0


if __name__ == "__main__":
    run(main, PROG)
