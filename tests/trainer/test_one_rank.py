"""On one rank, gradients that are taken whole are those that DeepSpeed reduces."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.trainer.test_saving import in_a_process
from tests.trainer.tiny import config


def steps(precision: str, output: Path, whole: bool) -> list[Any]:
    """Gradient norms of four steps of two micro-batches, and the weights after them."""
    from trainer import engine as engines

    world = engines.start_world()
    words = (f"--deepspeed.precision={precision}", "--deepspeed.zero_stage=1")
    keys = config(Path("data"), output, *words, "--micro_batch=12")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 7))
    model.unused = nn.Parameter(torch.ones(5))
    made = (keys, world)
    with patch.object(
        engines,
        "take_gradients_whole",
        engines.take_gradients_whole if whole else lambda engine: None,
    ):
        engine = engines.build_engine(model, made[0], world=made[1], micro_batch=12)
    norms = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for _ in range(2):
            x = torch.randn(16, 40, generator=generator).to(model[0].weight.dtype)
            engine.backward(engine(x).float().square().mean())
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        norms.append(engines.apply_step(engine, lr=0.01, clip=0.5))
    return [norms, [p.detach().clone() for p in model.parameters()]]


def compare(precision: str, output: Path) -> None:
    """Both ways in this process."""
    norms, weights = steps(precision, output, whole=False)
    own_norms, own_weights = steps(precision, output, whole=True)
    assert own_norms == pytest.approx(norms, rel=1e-6)
    assert norms[0] > 0.5
    assert len(set(norms)) == 4
    for ours, theirs in zip(own_weights, weights, strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(x, torch.ones(5).to(x)) for x in own_weights if len(x) == 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_the_same_to_the_last_bit(precision: str, tmp_path: Path) -> None:
    in_a_process(compare, precision, tmp_path / "run")
