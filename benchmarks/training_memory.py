"""`python -m benchmarks.training_memory KEYS`: memory of a real run, and its estimate.

Owns the comparison of `trainer.plan`'s estimate with what a training process takes. It
takes the keys of trainer.pretrain, and works under the launcher too:

    deepspeed --num_accelerators 2 --module benchmarks.training_memory KEYS

A model next to nothing is trained first, in the same process, so that libraries,
threads and buffers are there; then what the real one adds is measured: on a GPU as
torch counts it, on a CPU the peak resident size. Every rank prints a line of JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.config import run
from trainer.check import check
from trainer.engine import chosen_precision, world_from_environment
from trainer.loop import train
from trainer.options import PretrainConfig, parse_run
from trainer.plan_data import facts_of
from trainer.plan_run import Budget, parameters_by_part
from trainer.pretrain import RECIPES

PROG = "benchmarks.training_memory"
_M_MMAP_THRESHOLD = -3


def main(argv: Sequence[str]) -> None:
    """Train twice and print what the second time took."""
    words = [word for word in argv if not word.startswith("--local_rank")]
    config = parse_run(
        PretrainConfig, words, prog=PROG, description=__doc__ or "", recipes=RECIPES
    )
    # Blocks of 64 KiB and more go back to the system when they are freed.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    _train(_next_to_nothing(config))
    gc.collect()
    before = _reset()
    _train(config)
    print(json.dumps(_compare(config, _peak() - before)), flush=True)


def _train(config: PretrainConfig) -> None:
    status = train(config, check(config))
    if status:
        sys.exit(status)


def _next_to_nothing(config: PretrainConfig) -> PretrainConfig:
    """The same run, images too, with a model that takes hardly any memory."""
    model = dataclasses.replace(
        config.model,
        layers=1,
        width=4,
        heads=1,
        ffn_width=4,
        embedder_widths=(1,) * len(config.model.embedder_widths),
        embedder_hidden=1,
        decoder_widths=(1,) * len(config.model.decoder_widths),
    )
    output = str(Path(config.output).with_suffix(".warm-up"))
    return dataclasses.replace(
        config, model=model, micro_batch=1, max_steps=1, output=output
    )


def _compare(config: PretrainConfig, measured: int) -> dict[str, int | float | str]:
    rank, ranks = world_from_environment()
    facts = facts_of(config, ranks=ranks, decode=0)
    parameters = sum(parameters_by_part(config, facts.tokenizer).values())
    precision = chosen_precision(config)
    budget = Budget(
        config=config,
        facts=facts,
        ranks=ranks,
        parameters=parameters,
        bf16=precision == "bf16",
        usable=0,
        lazy=not torch.cuda.is_available(),
    )
    stage = config.deepspeed.zero_stage
    micro_batch = min(config.micro_batch, config.global_batch // ranks)
    estimate = budget.peak(stage, micro_batch, checkpointing=False)
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "rank": rank,
        "ranks": ranks,
        "zero_stage": stage,
        "precision": precision,
        "parameters": parameters,
        "micro_batch": micro_batch,
        "states_mb": round(budget.states(stage).held / 1e6, 1),
        "activations_mb": round(
            budget.activations(micro_batch).total(checkpointing=False) / 1e6, 1
        ),
        "estimated_mb": round(estimate / 1e6, 1),
        "measured_mb": round(measured / 1e6, 1),
        "estimated_by_measured": round(estimate / max(measured, 1), 3),
    }


def _reset() -> int:
    """Forget the peak; bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    """Most bytes in use since `_reset`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    run(main, PROG)
