"""`python -m pipeline.inspect DIR`: what is in a dataset, in a terminal or as a page.

Owns the command line. What is read is in `pipeline.inspect_data`, the text in
`pipeline.inspect_text`, the page in `pipeline.inspect_page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import parse, run

PROG = "python -m pipeline.inspect"
_DESCRIPTION = """Show what is in a dataset: where every input went, splits and sources,
sizes and lengths, words and tokens, failures with examples, duplicates. With --html as
one page that opens offline, with images, captions and their tokens."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to show."""

    dataset: str
    """Folder or URL of a finished dataset."""
    html: bool = False
    """Also write a page."""
    output: str | None = None
    """Where the page goes. Default: DATASET.inspect.html, beside the dataset."""
    samples: int = 24
    """Samples shown on the page."""
    images: str | None = None
    """Folder or URL prefix that paths of the corpus are relative to: images that were
    dropped are read from there, and shown beside what they repeat."""
    rows: int = 500_000
    """Inputs that sizes and lengths are taken of; of larger datasets evenly spaced
    tables are read, the same ones every time."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        for key in ("samples", "rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"--{key} is {getattr(self, key)}, but at least 1")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config = parse(
        InspectConfig,
        argv,
        prog=PROG,
        description=_DESCRIPTION,
        positional="dataset",
    )
    # After the command line: --help and a wrong key answer at once.
    from pipeline.inspect_data import read_view
    from pipeline.inspect_text import summary
    from pipeline.storage import open_storage

    storage = open_storage(config.dataset)
    view = read_view(
        storage, rows=config.rows, samples=config.samples, images=config.images
    )
    print(summary(view), end="")
    if config.html or config.output:
        from pipeline.inspect_page import page

        target = config.output or f"{storage.url}.inspect.html"
        folder, _, name = target.rpartition("/")
        open_storage(folder or ".").write(name, page(view).encode())
        print(f"page: {target}")
    return 0


if __name__ == "__main__":
    run(main, PROG)
