"""`python -m pipeline.pairs DATASET --column C --output pairs.npy`: pairs that match.

Owns the command line. What is read is in `pipeline.pair_table`, what is drawn in
`pipeline.pair_draws`, what is counted and written in `pipeline.pair_run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import parse, run

PROG = "python -m pipeline.pairs"
_DESCRIPTION = """\
Make pairs of samples for the task `matching` of trainer.finetune: two samples match if
they have the same value in a column that preprocess kept (--columns.keep).

  python -m pipeline.pairs shards --column title_group --split train \\
      --hard articleType,gender,baseColour --output train.npy --dev 0.1
  python -m pipeline.pairs shards --column title_group --split val \\
      --hard articleType,gender,baseColour --output val.npy

Hard negatives have the same values in the columns of --hard and another one in
--column; the others are drawn from all samples. Only samples that have a match are
shown, in negatives too, so that no side alone gives the answer away. A value that also
occurs in a held-out split makes no pairs in train: splits share nothing.

Where text equality would solve the task, let the two sides show different captions: of
a dataset made with --columns.caption '[title,attributes]',

  python -m pipeline.pairs shards --column title_group --left_caption 0 \\
      --right_caption 1 --output train.npy

Writes OUTPUT (for the trainer), the same as a table for people (.parquet: keys,
captions, values), and where every sample went (.json). The same dataset and keys give
the same bytes.
"""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which samples match, and how many pairs of them to make."""

    dataset: str
    """Folder or URL of a finished dataset (the first word of the command)."""
    column: str
    """Column that preprocess kept: samples with the same value match. One without a
    value is not paired."""
    output: str
    """File to write, NAME.npy; NAME.parquet and NAME.json go beside it."""
    split: str = "train"
    """Split to pair."""
    hard: str | None = None
    """Columns that a hard negative shares, with commas between them: a,b or [a,b]."""
    hard_share: float = 0.5
    """Share of negatives that are hard, where there are such."""
    negatives: float = 1.0
    """Negatives for each matching pair."""
    per_value: int = 50
    """Most matching pairs of a value, so that no large group makes up the task."""
    limit: int | None = None
    """Most matching pairs of a file, drawn; null for all."""
    dev: float = 0.0
    """Share of the values, drawn, whose pairs go to NAME-dev.npy instead."""
    left_caption: int | None = None
    """Number of the caption, from 0, that the left side shows; null: one is drawn in
    each epoch."""
    right_caption: int | None = None
    """The same of the right side."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        lowest = {"negatives": 0, "per_value": 1, "limit": 1, "seed": 0}
        lowest |= {"left_caption": 0, "right_caption": 0}
        for key, low in lowest.items():
            value = getattr(self, key)
            if value is not None and value < low:
                raise ValueError(f"--{key} is {value}: it must be {low} or more")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"--hard_share is {self.hard_share}: from 0 to 1")
        if not 0 <= self.dev < 1:
            raise ValueError(f"--dev is {self.dev}: from 0 to below 1")
        if not self.output.endswith(".npy"):
            raise ValueError(f"--output {self.output}: give a name that ends in .npy")
        if self.column in self.hard_columns:
            raise ValueError(
                f"--hard names {self.column}, the column that decides what matches: a "
                "hard negative differs in it"
            )

    @property
    def hard_columns(self) -> tuple[str, ...]:
        """The columns of --hard."""
        # Brackets are what lists of other keys are written in.
        names = (self.hard or "").strip().removeprefix("[").removesuffix("]").split(",")
        return tuple(name.strip() for name in names if name.strip())


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config = parse(
        PairsConfig, argv, prog=PROG, description=_DESCRIPTION, positional="dataset"
    )
    # After the command line: --help and a wrong key answer at once.
    from pipeline.pair_run import pair, summary

    print(summary(pair(config)), end="")
    return 0


if __name__ == "__main__":
    run(main, PROG)
