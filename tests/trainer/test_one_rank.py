"""On one rank, gradients that are taken whole are those that DeepSpeed reduces, and a
step in one pass is that of DeepSpeed in many.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.reads import reads
from tests.trainer.kernels.against_reference import close
from tests.trainer.kernels.numbers import interpreted
from tests.trainer.test_saving import in_a_process
from tests.trainer.tiny import config
from trainer import one_rank
from trainer.kernels.adamw import adamw_fused, adamw_ref


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


class Given(nn.Module):
    """Whose gradients are what is put in, whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(40, 33, generator=generator))
        self.bias = nn.Parameter(torch.randn(33, generator=generator))

    def forward(self, *gradients: Tensor) -> Tensor:
        pairs = zip(self.parameters(), gradients, strict=True)
        return torch.stack([(weight * given).sum() for weight, given in pairs]).sum()


# Learning rate, size of gradients, and 0 unless the step is unwanted.
GIVEN = (
    *((0.01, math.nan, 0.0), (0.01, 5.0, 0.0), (0.02, 0.001, 0.0), (0.0, 1.0, 0.0)),
    *((0.03, math.inf, 0.0), (0.03, 1.0, 1.0), (0.03, 0.5, 0.0), (0.01, 0.002, 0.0)),
)
TAKEN = [0, 1, 2, 3, 3, 3, 4, 5]
"""Steps that AdamW has taken after each of them."""


def given_steps(output: Path, ways: Sequence[Any]) -> Any:
    """Gradient norms of steps that the device decides about, the states after each, and
    what the host reads in them.

    Args:
        ways: of each step, what updates in one pass; None: DeepSpeed's own way.
    """
    from trainer import engine as engines

    words = ("--deepspeed.precision=bf16", "--deepspeed.zero_stage=1")
    words = (*words, "--optimizer.weight_decay=0.1", "--optimizer.clip=1")
    keys = config(Path("data"), output, *words, "--micro_batch=12")
    world = engines.start_world()
    engine = engines.build_engine(Given(), keys, world=world, micro_batch=12)
    zero = engine.optimizer
    for group in zero.param_groups:
        group["fused"] = True
    assert engines.decides_on_device(engine)
    assert one_rank.can_step_in_one_pass(zero) == (world.device.type == "cuda")
    generator = torch.Generator().manual_seed(1)
    norms, found, read = [], [], Counter[str]()
    for (lr, size, unwanted), way in zip(GIVEN, ways, strict=True):
        for _ in range(2):
            shapes = [weight.shape for weight in engine.module.parameters()]
            drawn = [size * torch.randn(shape, generator=generator) for shape in shapes]
            given = [each.to(world.device, torch.bfloat16) for each in drawn]
            engine.backward(engine(*given))
            if not engine.is_gradient_accumulation_boundary():
                engine.step()
        bad = torch.tensor(unwanted, device=world.device)
        step = partial(engines.apply_step_on_device, engine, lr=lr, unwanted=bad)
        with (
            patch.object(engines, "can_step_in_one_pass", lambda zero: False),
            one_rank.in_one_pass(zero, way) if way else nullcontext(),
        ):
            read += reads(lambda step=step: norms.append(step()))
        found.append(states(zero))
    return [float(norm) for norm in norms], found, read


def states(zero: Any) -> list[dict[str, Tensor]]:
    """Master, weights and what AdamW holds of each parameter group."""
    found = []
    for number, master in enumerate(zero.single_partition_of_fp32_groups):
        known = {"master": master, "weights": zero.bit16_groups_flat[number]}
        known |= zero.optimizer.state[master]
        found.append({key: value.detach().clone() for key, value in known.items()})
    return found


def rounded(*inputs: Any) -> None:
    """The kernel; Triton's interpreter cuts weights off, which a GPU rounds."""
    _gradients, master, _mean, _square, weights, *_ = inputs
    before = weights.clone()
    adamw_fused(*inputs)
    apart = (weights - master).abs() <= master.abs() / 128
    assert (apart | (weights == before)).all()
    if not torch.equal(weights, before):
        weights.copy_(master)


def compare_passes(output: Path, one_pass: Any) -> None:
    """Both ways, and one after the other."""
    theirs_only: list[Any] = [None] * len(GIVEN)
    norms, theirs, _read = given_steps(output, theirs_only)
    assert norms[1] > 1 > norms[2] > 0, "one is clipped, one is not"
    ours_only = [one_pass] * len(GIVEN)
    for ways in (ours_only, [one_pass, None] * 4, [None, one_pass] * 4):
        own_norms, ours, _read = given_steps(output, ways)
        assert own_norms == pytest.approx(norms, nan_ok=True)
        assert [int(after[1]["step"]) for after in ours] == TAKEN
        for after, wanted in zip(ours, theirs, strict=True):
            for mine, true in zip(after, wanted, strict=True):
                same(mine, true)
        for number in (4, 5):
            for mine, before in zip(ours[number], ours[number - 1], strict=True):
                assert all(torch.equal(mine[key], before[key]) for key in before)


def same(mine: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """States to what fp32 rounds, in the same layout."""
    assert [*mine] == [*true]
    assert torch.equal(mine["step"], true["step"])
    for key, value in true.items():
        assert mine[key].dtype == value.dtype
        # A weight is rounded the other way where the last bit of its master differs.
        close(mine[key], value, 1e-3 if key == "weights" else 1e-6)
    assert torch.equal(mine["weights"], mine["master"].bfloat16())


@interpreted
def test_a_step_in_one_pass_is_deepspeeds_and_either_may_follow_the_other(
    tmp_path: Path,
) -> None:
    """In fp32, each has its own order and may multiply and add in one: 2^-24 of some
    ten numbers a step, of which there are five.
    """
    in_a_process(compare_passes, tmp_path / "run", rounded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_too_it_is_deepspeeds_and_either_may_follow_the_other(
    tmp_path: Path,
) -> None:
    in_a_process(compare_passes, tmp_path / "run", adamw_fused)


def zero_like(device: str, **other: Any) -> Any:
    """What the choice of a way asks of ZeRO's optimizer, of tensors without values."""
    adam = {"amsgrad": False, "maximize": False, **other.pop("adam", {})}
    dtypes = other.pop("dtypes", (torch.float32, torch.bfloat16))
    master, weights = (torch.empty(8, dtype=dtype, device=device) for dtype in dtypes)
    inner = other.pop("inner", torch.optim.AdamW)([torch.ones(1)], **adam)
    known = {"partition_gradients": False, "cpu_offload": False} | other
    return SimpleNamespace(
        optimizer=inner,
        dp_process_group=None,
        single_partition_of_fp32_groups=[master],
        parallel_partitioned_bit16_groups=[[weights]],
        **known,
    )


def refuse_others(output: Path) -> None:
    from trainer import engine as engines

    engines.start_world()
    taken = one_rank.can_step_in_one_pass
    with FakeTensorMode():
        assert taken(zero_like("cuda"))
        assert not taken(zero_like("cpu"))
        for other in (
            {"partition_gradients": True},
            {"cpu_offload": True},
            {"adam": {"amsgrad": True}},
            {"adam": {"maximize": True}},
            {"inner": torch.optim.Adam},
            {"dtypes": (torch.float32, torch.float32)},
            {"dtypes": (torch.float32, torch.float16)},
        ):
            assert not taken(zero_like("cuda", **other)), other
        with patch.object(torch.distributed, "get_world_size", lambda group: 2):
            assert not taken(zero_like("cuda"))


def test_other_optimizers_stages_types_and_ranks_go_deepspeeds_way(
    tmp_path: Path,
) -> None:
    in_a_process(refuse_others, tmp_path / "run")


def read_nothing(output: Path) -> None:
    """With the reference, whose every operation is torch's."""
    _norms, found, read = given_steps(output, [adamw_ref] * len(GIVEN))
    assert not read
    assert [int(after[0]["step"]) for after in found] == TAKEN


def test_the_host_reads_nothing_of_a_step_in_one_pass(tmp_path: Path) -> None:
    in_a_process(read_nothing, tmp_path / "run")
