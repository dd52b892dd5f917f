"""`trainer.pretrain` with one more folder that models are found in: its first word."""

from __future__ import annotations

import sys

import trainer.models
from pipeline.config import run
from trainer import pretrain

if __name__ == "__main__":
    # The launcher puts its own word first.
    folder, *words = [word for word in sys.argv[1:] if "--local_rank" not in word]
    trainer.models.__path__.append(folder)
    sys.argv[1:] = words
    run(pretrain.main, pretrain.PROG)
