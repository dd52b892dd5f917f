from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.conftest import python
from trainer.contract import (
    check_world_size,
    micro_batch_size,
    valid_world_sizes,
)
from trainer.engine import learning_rate, parameter_groups
from trainer.options import OptimizerConfig, ScheduleConfig


def test_learning_rate_warms_up_linearly_and_ends_at_its_floor() -> None:
    optimizer = OptimizerConfig(lr=2.0)
    schedule = ScheduleConfig(steps=100, warmup=10, final_lr_fraction=0.1)
    rates = [learning_rate(step, optimizer, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_a_schedule_without_warm_up_starts_at_the_peak() -> None:
    schedule = ScheduleConfig(steps=10, warmup=0)
    assert learning_rate(0, OptimizerConfig(lr=1.0), schedule) == pytest.approx(1.0)


def test_a_linear_schedule_comes_down_in_equal_steps() -> None:
    schedule = ScheduleConfig(
        shape="linear", steps=100, warmup=20, final_lr_fraction=0.2
    )
    rates = [learning_rate(n, OptimizerConfig(lr=1.0), schedule) for n in range(101)]
    assert rates[9] == pytest.approx(0.5)
    falls = [a - b for a, b in itertools.pairwise(rates[20:])]
    assert falls == pytest.approx([0.01] * 80)
    assert rates[100] == pytest.approx(0.2)


def test_wsd_holds_the_peak_and_comes_down_in_its_last_share() -> None:
    schedule = ScheduleConfig(
        shape="wsd", steps=100, warmup=10, decay_share=0.2, final_lr_fraction=0
    )
    rates = [learning_rate(n, OptimizerConfig(lr=1.0), schedule) for n in range(101)]
    assert rates[4] == pytest.approx(0.5)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 2))
    decay, plain = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert decay["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in decay["params"]} == {
        id(model[0].weight),
        id(model[2].weight),
    }
    total = sum(len(group["params"]) for group in (decay, plain))
    assert total == len(list(model.parameters()))
    assert all(isinstance(p, torch.Tensor) for p in plain["params"])


def test_whole_vectors_come_first_so_that_they_are_aligned_in_a_flat_group() -> None:
    model = nn.ModuleList(
        [nn.Linear(5, 3), nn.LayerNorm(16), nn.Linear(16, 30), nn.Linear(8, 6)]
    )
    for group in parameter_groups(model, OptimizerConfig()):
        sizes = [parameter.numel() for parameter in group["params"]]
        whole = [size % 8 == 0 for size in sizes]
        assert whole == sorted(whole, reverse=True)
        assert {*whole} == {True, False}
    _, plain = parameter_groups(model, OptimizerConfig())
    assert plain["params"][:2] == [model[1].weight, model[1].bias]


def test_valid_world_sizes_divide_the_lanes() -> None:
    assert valid_world_sizes(12) == [1, 2, 3, 4, 6, 12]
    check_world_size(6, lanes=12)
    with pytest.raises(ValueError, match="start 1, 2, 3, 4, 6, 12 ranks"):
        check_world_size(5, lanes=12)


@pytest.mark.parametrize(
    ("batch", "world", "ceiling", "expected"),
    [(96, 2, 64, 48), (96, 2, 47, 24), (96, 1, 1000, 96), (14, 2, 6, 1)],
)
def test_micro_batch_is_the_largest_divisor_below_its_ceiling(
    batch: int, world: int, ceiling: int, expected: int
) -> None:
    size = micro_batch_size(global_batch=batch, world_size=world, ceiling=ceiling)
    assert size == expected


def test_an_engine_is_built_without_importing_inductor() -> None:
    script = """
import sys
from torch import nn
from trainer.engine import build_engine, start_world
from trainer.options import PretrainConfig

world = start_world()
config = PretrainConfig(data="d", output="o", global_batch=12, lanes=12)
build_engine(nn.Linear(2, 2), config, world=world, micro_batch=12)
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime import compiler

assert "torch._inductor.compile_fx" not in sys.modules
assert compiler.compile.__module__ == compiler.__name__
world.leave()
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stdout
