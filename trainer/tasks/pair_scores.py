"""What a model says of images and texts: features of each, scores of pairs.

Owns what retrieval and zero-shot classification ask of a model, in batches. Does not
own the models (`trainer.tasks.retrievers`), where scores are kept
(`trainer.tasks.row_table`) or what is made of them.

Shapes: F features, M pairs to score.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer.tasks.kept_states import KeptStates
from trainer.tasks.retrievers import RetrievalModel, log_odds
from trainer.tasks.row_table import RowTable

# Pairs between two writes to disk.
_BLOCK = 4096


def features_of(
    count: int,
    one_batch: Callable[[np.ndarray], Tensor],
    *,
    batch: int,
    progress: tqdm[Any],
) -> np.ndarray:
    """(count, F) fp32: `one_batch` of the numbers 0 to `count`, some at once."""
    found = []
    with torch.inference_mode():
        for first in range(0, count, batch):
            rows = np.arange(first, min(first + batch, count))
            found.append(one_batch(rows).float().cpu().numpy())
            progress.update(len(rows))
    return np.concatenate(found)


def kept_features(
    one_batch: Callable[[np.ndarray], Tensor],
    *,
    table: RowTable,
    batch: int,
    progress: tqdm[Any],
) -> np.ndarray:
    """The same of all rows of `table`, from where it was left."""
    progress.update(table.done)
    with torch.inference_mode():
        while table.done < table.total:
            rows = np.arange(table.done, min(table.done + batch, table.total))
            table.append(one_batch(rows).float().cpu().numpy())
            progress.update(len(rows))
    return table.rows()


def score_pairs(
    model: RetrievalModel,
    states: KeptStates,
    pairs: np.ndarray,
    *,
    table: RowTable,
    batch: int,
    progress: tqdm[Any],
) -> np.ndarray:
    """Scores (M,) of `pairs` (M, 2) of (image, text), from where `table` was left.

    Args:
        states: of the model.
        pairs: ordered by image.
    """
    progress.update(table.done)
    with torch.inference_mode():
        while table.done < table.total:
            block = pairs[table.done : table.done + _BLOCK]
            scores = []
            for first in range(0, len(block), batch):
                image, text = block[first : first + batch].T
                different, which = np.unique(image, return_inverse=True)
                image_of = torch.from_numpy(which).to(model.device)
                logits = model.matching_logits(
                    states.of_images(different), image_of, states.of_texts(text)
                )
                scores.append(log_odds(logits).cpu().numpy())
                progress.update(len(image))
            table.append(np.concatenate(scores))
    return table.rows()[:, 0]


def fingerprint(model: nn.Module, *parts: str | bytes | np.ndarray) -> str:
    """A hash of a model's weights and of everything else that scores depend on."""
    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    for part in parts:
        plain = part.encode() if isinstance(part, str) else part
        digest.update(
            np.ascontiguousarray(plain).tobytes()
            if isinstance(plain, np.ndarray)
            else plain
        )
        digest.update(b"|")
    return digest.hexdigest()
