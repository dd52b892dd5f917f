"""trainer.pretrain with faults put in from outside: `faults.py JSON [words ...]`.

Keys of the JSON, steps counted from 1 as in metrics.jsonl:
- `nan_gradient`, `nan_loss`, `spike`: lists of steps in which `rank` has one;
- `rank`: the rank with the fault (default 1);
- `fingerprints`: file to which each rank appends a line about each update;
- `kill`: step in which this process gets SIGKILL;
- `fused`: true for AdamW as on a GPU, where the device decides about a step;
- `at_once`: true to read what each step came to before the next one begins;
- `order`: file to which rank 0 appends the passes that it begins and rows it writes;
- `term`: step in whose passes this process gets SIGTERM;
- `broken`: step whose batch `rank` cannot read;
- `hang`: step before which `rank` reads from `fifo`, into which nobody writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pipeline.config import run
from trainer import loop, pretrain, update
from trainer.feed import Feed
from trainer.metrics import Metrics


class Poison(torch.autograd.Function):
    """A value as it is, with a gradient that is not a number."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


FAULTS = {
    "nan_gradient": Poison.apply,
    "nan_loss": lambda loss: loss * float("nan"),
    "spike": lambda loss: loss * 100,
}


def fingerprint(engine: Any) -> str:
    """Of what this rank holds of weights, fp32 masters, moments and step counts."""
    digest = sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else str(value).encode())

    for parameter in engine.module.parameters():
        take(getattr(parameter, "ds_tensor", parameter))
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for parameter, state in inner.state.items():
        take(parameter)
        for name in sorted(state):
            take(name)
            take(state[name])
    return digest.hexdigest()


def keep_order(file: Path) -> None:
    """Append the passes that are begun and the rows that are written to a file."""
    passes, write = loop.run_micro_batches, Metrics.write

    def told(what: str, step: int) -> None:
        with file.open("a") as lines:
            lines.write(f"{what} {step}\n")

    def run_micro_batches(*args: Any) -> Any:
        told("passes", args[2].step + 1)
        return passes(*args)

    def written(metrics: Metrics, row: dict[str, Any]) -> None:
        told("row", row["step"])
        write(metrics, row)

    loop.run_micro_batches, Metrics.write = run_micro_batches, written


def install(spec: dict[str, Any]) -> None:
    rank = int(os.environ.get("RANK", "0"))
    faulty = rank == spec.get("rank", 1)
    now = {"step": 0}
    build, backward = loop.build_model, loop.run_micro_batches
    following = Feed.next
    engine_of = loop.build_engine

    def damaged(module: Any, inputs: Any, output: Any) -> Any:
        for name, fault in FAULTS.items():
            if faulty and module.training and now["step"] in spec.get(name, ()):
                losses = {**output.losses, "mlm": fault(output.losses["mlm"])}
                output = output._replace(losses=losses)
        return output

    def build_model(*args: Any) -> Any:
        model = build(*args)
        model.register_forward_hook(damaged)
        return model

    def run_micro_batches(*args: Any) -> Any:
        now["step"] = args[2].step + 1
        for name, number in (("kill", signal.SIGKILL), ("term", signal.SIGTERM)):
            if spec.get(name) == now["step"]:
                os.kill(os.getpid(), number)
        return backward(*args)

    def build_engine(*args: Any, **named: Any) -> Any:
        engine = engine_of(*args, **named)
        for group in engine.optimizer.optimizer.param_groups:
            group["fused"] = True
        return engine

    def held(apply: Any) -> Any:
        def apply_step(engine: Any, **options: Any) -> Any:
            before = fingerprint(engine)
            norm = apply(engine, **options)
            line = {
                "rank": rank,
                "step": now["step"],
                "before": before,
                "after": fingerprint(engine),
            }
            with open(spec["fingerprints"], "a") as file:
                file.write(json.dumps(line) + "\n")
            return norm

        return apply_step

    def next_batch(feed: Feed) -> Any:
        now["asked"] = now.get("asked", 0) + 1
        if faulty and now["asked"] == spec.get("hang"):
            Path(spec["fifo"]).read_bytes()
        if faulty and now["asked"] == spec.get("broken"):
            raise ValueError("the loader says so")
        return following(feed)

    loop.build_model, loop.run_micro_batches = build_model, run_micro_batches
    if "fingerprints" in spec:
        update.apply_step = held(update.apply_step)
        update.apply_step_on_device = held(update.apply_step_on_device)
    if spec.get("fused"):
        loop.build_engine = build_engine
    if spec.get("at_once"):
        loop.due_after = lambda *_: True
    if "order" in spec and rank == 0:
        keep_order(Path(spec["order"]))
    if "hang" in spec or "broken" in spec:
        Feed.next = next_batch


if __name__ == "__main__":
    # The launcher puts its own word first.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    install(json.loads(words[0]))
    sys.argv[1:] = words[1:]
    run(pretrain.main, pretrain.PROG)
