"""A training step of MLIM beside one of ViLT from `transformers`, on a CPU, in fp32.

    python -m benchmarks.vilt [--data DATASET] [--config mlim-base] [--threads 1]

Owns the comparison: `ViltForMaskedLM` of the same width, depth, heads, feed-forward
width, vocabulary and patches, without dropout, on the same captions, masked words and
images, by the same optimizer. A step is forward, backward and AdamW. Texts are padded
to 40 for ViLT, as its users do; its attention is the one that the library has for it.
ViLT's inputs are made before the clock starts, normalised pixels and masked words
included; ours normalises uint8 and draws its masks in the step. ViLT has a [CLS] of its
own beside the image tokens.

The contenders take turns over the same batches; medians, and the median of the ratios
of each turn, of time and of CPU time, which says more where other work takes the cores
(give one thread: threads that wait count as well). Without DATASET, lengths of captions
are drawn to look like Flickr8k's and their words and pixels are random. Writes
`benchmarks/results/vilt.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.loader_data import ROOT
from trainer.dataset import Dataset
from trainer.masking import Masks, mam
from trainer.models.base import Inputs
from trainer.models.mlim import MlimForPreTraining, masked_words
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES
from trainer.probes import drawn_places, read_pairs
from trainer.stream import capacity, pack

RESULTS = ROOT / "benchmarks" / "results" / "vilt.json"
VILT, OFF, ON = "ViLT, padded to 40", "MLIM, RECON off", "MLIM, RECON on"
_TEXT = 40
_BERT = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
_BERT_WORDS = 30_522
_FIRST_WORD = 1_000
# Of Flickr8k's captions in BERT's words, [CLS] and [SEP] included.
_MEAN_LENGTH, _SPREAD, _SHORTEST = 14.0, 4.5, 4
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pairs as a loader has them."""

    pixels: np.ndarray
    """(B, S, S, 3) uint8."""
    texts: list[np.ndarray]
    """[CLS] words [SEP] of each, at most 40."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What both models need to know of the tokenizer."""

    size: int
    special_ids: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model, its optimizer, and its loss on each batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[Callable[[], Tensor]]

    def step(self, number: int) -> tuple[float, float]:
        """Seconds that a training step on a batch takes, and CPU seconds."""
        begun, used = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        self.losses[number]().backward()
        self.optimizer.step()
        return time.perf_counter() - begun, time.process_time() - used

    def flops(self, number: int) -> int:
        """Of products and convolutions of forward and backward, as torch counts."""
        with FlopCounterMode(display=False) as counter:
            self.losses[number]().backward()
        return int(counter.get_total_flops())


def drawn_batches(
    config: PretrainConfig, count: int, size: int
) -> tuple[list[Batch], Words]:
    """Batches of random pixels and words."""
    draw = np.random.default_rng(config.seed)
    side = config.image.size

    def text() -> np.ndarray:
        length = round(draw.normal(_MEAN_LENGTH, _SPREAD))
        length = min(max(length, _SHORTEST), _TEXT)
        words = draw.integers(_FIRST_WORD, _BERT_WORDS, length - 2)
        return np.concatenate([[_BERT["cls"]], words, [_BERT["sep"]]])

    batches = [
        Batch(
            pixels=draw.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
            texts=[text() for _ in range(size)],
        )
        for _ in range(count)
    ]
    return batches, Words(size=_BERT_WORDS, special_ids=_BERT)


def read_batches(
    config: PretrainConfig, count: int, size: int
) -> tuple[list[Batch], Words]:
    """Batches of real pairs, in a drawn order."""
    dataset = Dataset(config.data, config.split)
    places = drawn_places(dataset, seed=config.seed, limit=count * size)
    pairs = read_pairs(dataset, config, places, seed=config.seed)
    batches = [
        Batch(pixels=pairs.pixels[rows], texts=[pairs.texts[row] for row in rows])
        for rows in np.arange(count * size).reshape(count, size)
    ]
    known = dataset.tokenizer
    dataset.close()
    return batches, Words(size=known.vocab_size, special_ids=known.special_ids)


def drawn_masks(config: PretrainConfig, batch: Batch) -> Masks:
    """Masks of a batch, by Modality Aware Masking."""
    lengths = torch.tensor([len(text) for text in batch.texts])
    return mam(
        config.mask,
        seed=config.seed,
        epoch=0,
        uids=torch.arange(len(lengths)) * 7919,
        n_text=lengths - 2,
        text_capacity=_TEXT,
        n_image=config.n_image,
    )


def ours(
    config: PretrainConfig, batches: list[Batch], words: Words, *, recon: bool
) -> Contender:
    """MLIM, as the trainer runs it."""
    recon_weight = config.model.recon_weight if recon else 0.0
    shape = dataclasses.replace(config.model, recon_weight=recon_weight)
    torch.manual_seed(config.seed)
    model = MlimForPreTraining(
        shape,
        vocab_size=words.size,
        special_ids=words.special_ids,
        max_text=_TEXT,
        image_size=config.image.size,
    )

    def loss_on(batch: Batch) -> Callable[[], Tensor]:
        # The loader counts masks on the host, for all steps ahead.
        masks = drawn_masks(config, batch)
        lengths = np.array([len(text) for text in batch.texts])
        stream, ids = pack(lengths, np.concatenate(batch.texts), config.n_image)
        n_words = int(masked_words(stream, masks).sum())
        n_pixels = int(shape.recon_pixels(masks.counts.image, config.n_image).sum())
        inputs = Inputs(
            stream=stream,
            token_ids=ids,
            pixels=torch.from_numpy(batch.pixels),
            n_masked_words=capacity(n_words),
            n_recon_images=capacity(int(masks.image.any(1).sum())),
        )

        def loss() -> Tensor:
            output = model(inputs, drawn_masks(config, batch))
            mlm = output.losses["mlm"] * (shape.mlm_weight / n_words)
            return mlm + output.losses["recon"] * (shape.recon_weight / n_pixels)

        return loss

    return _contender(model, [loss_on(batch) for batch in batches])


def vilt(config: PretrainConfig, batches: list[Batch], words: Words) -> Contender:
    """ViLT of the same shape."""
    from transformers import ViltConfig, ViltForMaskedLM

    shape = config.model
    torch.manual_seed(config.seed)
    model = ViltForMaskedLM(
        ViltConfig(
            vocab_size=words.size,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn_width,
            max_position_embeddings=_TEXT,
            image_size=config.image.size,
            patch_size=shape.patch_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )

    def loss_on(batch: Batch) -> Callable[[], Tensor]:
        given = vilt_inputs(batch, drawn_masks(config, batch), words)
        return lambda: model(**given).loss

    return _contender(model, [loss_on(batch) for batch in batches])


def vilt_inputs(batch: Batch, masks: Masks, words: Words) -> dict[str, Tensor]:
    """What ViLT's processor and collator would make of a batch and its masked words."""
    shape = (len(batch.texts), _TEXT)
    ids = torch.full(shape, words.special_ids["pad"])
    seen = torch.zeros(shape, dtype=torch.int64)
    for row, text in enumerate(batch.texts):
        ids[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        seen[row, : len(text)] = 1
    masked = torch.zeros(shape, dtype=torch.bool)
    # Word 0 of the masks stands after [CLS].
    masked[:, 1:] = masks.text[:, : _TEXT - 1]
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {
        "input_ids": ids.masked_fill(masked, words.special_ids["mask"]),
        "labels": ids.masked_fill(~masked, _IGNORED),
        "attention_mask": seen,
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels.contiguous(),
        "pixel_mask": torch.ones_like(pixels[:, 0], dtype=torch.int64),
    }


def _contender(model: nn.Module, losses: list[Callable[[], Tensor]]) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    return Contender(model=model, optimizer=optimizer, losses=losses)


def measure(given: argparse.Namespace, config: PretrainConfig) -> dict[str, Any]:
    """Seconds of every step of every contender, and what follows."""
    source = read_batches if given.data else drawn_batches
    batches, words = source(config, given.batches, given.batch)
    contenders = {
        VILT: vilt(config, batches, words),
        OFF: ours(config, batches, words, recon=False),
        ON: ours(config, batches, words, recon=True),
    }
    flops = {name: one.flops(0) for name, one in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(given.warm + given.turns):
        for name, contender in contenders.items():
            took, used = contender.step(turn % len(batches))
            if turn >= given.warm:
                seconds[name].append(took)
                cpu[name].append(used)
    lengths = [len(text) for batch in batches for text in batch.texts]
    return {
        "pairs": given.batch,
        "text_tokens": statistics.mean(lengths),
        "image_tokens": config.n_image,
        "vocabulary": words.size,
        "contenders": {
            name: {
                "parameters": sum(p.numel() for p in one.model.parameters()),
                "tflops_a_step": round(flops[name] / 1e12, 4),
                "step_s": statistics.median(seconds[name]),
                "step_cpu_s": statistics.median(cpu[name]),
                "times_vilt": _median_ratio(seconds[VILT], seconds[name]),
                "times_vilt_by_cpu": _median_ratio(cpu[VILT], cpu[name]),
                "times_vilt_by_flops": round(flops[VILT] / flops[name], 3),
                "steps_s": [round(one, 4) for one in seconds[name]],
                "steps_cpu_s": [round(one, 4) for one in cpu[name]],
            }
            for name, one in contenders.items()
        },
    }


def _median_ratio(slow: list[float], fast: list[float]) -> float:
    """Of the steps that stand beside each other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def table(found: Mapping[str, Any]) -> str:
    """What is printed."""
    lines = [
        f"{'':22}{'step':>9}{'pairs/s':>9}{'x ViLT':>8}{'by CPU':>8}{'by FLOPs':>10}"
    ]
    for name, row in found["contenders"].items():
        lines.append(
            f"{name:22}{row['step_s']:8.3f}s{found['pairs'] / row['step_s']:9.1f}"
            f"{row['times_vilt']:8.2f}{row['times_vilt_by_cpu']:8.2f}"
            f"{row['times_vilt_by_flops']:10.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a dataset; default: drawn captions")
    parser.add_argument("--config", default="mlim-base", help="a recipe")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step")
    parser.add_argument("--batches", type=int, default=4, help="taken in turn")
    parser.add_argument("--turns", type=int, default=12, help="steps timed of each")
    parser.add_argument("--warm", type=int, default=2, help="steps before the clock")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    given, keys = parser.parse_known_args(argv)
    torch.set_num_threads(given.threads)
    config = parse_run(
        PretrainConfig,
        [
            *(f"--config={given.config}", f"--data={given.data or '-'}", "--output=-"),
            *(f"--text.max_tokens={_TEXT}", *keys),
        ],
        prog="benchmarks.vilt",
        description="",
        recipes=RECIPES,
    )
    found = measure(given, config)
    print(table(found))
    names = ("torch", "transformers", "numpy")
    words = [f"--{name} {getattr(given, name)}" for name in ("config", "batch")]
    words += [f"--{name} {getattr(given, name)}" for name in ("turns", "threads")]
    result = {
        "command": " ".join(["python -m benchmarks.vilt", *words, *keys]),
        "captions": "of a dataset" if given.data else "drawn",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in names},
        **found,
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(given.output)


if __name__ == "__main__":
    main()
