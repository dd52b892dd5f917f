from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.partition import pieces, set_adam_steps


@pytest.mark.parametrize(("fused", "where"), [(True, "meta"), (False, "cpu")])
def test_steps_of_adam_lie_where_its_kernel_reads_them(fused: bool, where: str) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for group in optimizer.param_groups:
        group["fused"] = fused
    engine = SimpleNamespace(
        module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0
    )
    for prepare in (pieces, lambda engine: set_adam_steps(engine, 5)):
        prepare(engine)
        steps = [state["step"] for state in optimizer.state.values()]
        assert [step.device.type for step in steps] == [where] * 2
