"""Every ZeRO stage takes the same steps, on any number of ranks, also when stages or
ranks change on the way. Real launches over gloo, each for many tiny runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.trainer.sequence import launch_all
from tests.trainer.tiny import column
from trainer.contract import METRICS, complete_checkpoints
from trainer.metrics import keep_steps

STAGES = (0, 1, 2, 3)
STEPS = 6
# fp32 sums in another order, which six steps of AdamW amplify a little.
CLOSE = 1e-4
# Wide enough that stage 3 really takes parameters apart and gathers them.
WIDE = ("--model.width=256", "--model.ffn_width=512", "--model.layers=1")
# Micro-batches of 3 of 24 pairs: ranks times accumulation is eight.
EIGHT = "--micro_batch=3"
OFFLOAD, OFFLOADED = "--deepspeed.offload=cpu", (2, 3)
RECOMPUTE, RECOMPUTED = "--deepspeed.activation_checkpointing=true", (1, 3)


class Runs:
    """Calls of runs below a folder."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self._shards = folder, shards

    def call(self, name: str, stage: int, *words: str) -> list[str]:
        """Arguments that take the run `name` to its end, or to other `--max_steps`."""
        where = (f"--data={self._shards}", f"--output={self.folder / name}")
        zero = f"--deepspeed.zero_stage={stage}"
        often = ("--checkpoint.every_steps=2", "--checkpoint.keep=9")
        return [*WIDE, *where, zero, *often, f"--max_steps={STEPS}", *words]

    def cut(self, name: str, to: str, step: int) -> None:
        """Make the run `to`: `name` as it was killed after the checkpoint at `step`."""
        shutil.copytree(self.folder / name, self.folder / to)
        for later, path in complete_checkpoints(self.folder / to):
            if later > step:
                shutil.rmtree(path)
        keep_steps(self.folder / to / METRICS, step)

    def losses(self, name: str) -> list[float]:
        """Losses and gradient norms of all its steps."""
        assert column(self.folder / name, "step") == list(range(1, STEPS + 1))
        return [
            value
            for metric in ("loss", "mlm_loss", "recon_loss", "grad_norm")
            for value in column(self.folder / name, metric)
        ]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs of this file: launches of 2, 1, 2 and 4 ranks."""
    folder = tmp_path_factory.mktemp("zero")
    made = Runs(folder, shards)
    call = made.call
    two = [call(f"whole-{stage}", stage) for stage in STAGES]
    two += [call(f"offload-{stage}", stage, OFFLOAD) for stage in OFFLOADED]
    two += [call(f"recompute-{stage}", stage, RECOMPUTE) for stage in RECOMPUTED]
    launch_all(2, [*two, call("split-2", 1, EIGHT)], folder / "two.json")
    for stage in STAGES:
        made.cut(f"whole-{stage}", f"same-{stage}", 4)
        made.cut(f"whole-{stage}", f"cross-{stage}", 2)
    made.cut("whole-1", "moving", 2)
    middle = "--max_steps=4"
    one = [call(f"cross-{stage}", stage, middle) for stage in STAGES]
    one += [call("moving", 3, middle), call("split-1", 1, EIGHT)]
    launch_all(1, one, folder / "one.json")
    again = [call(f"same-{stage}", stage) for stage in STAGES]
    again += [call(f"cross-{stage}", stage) for stage in STAGES]
    launch_all(2, [*again, call("moving", 0)], folder / "again.json")
    launch_all(4, [call("split-4", 1, EIGHT)], folder / "four.json")
    return made


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_losses_of_stage_0(runs: Runs, stage: int) -> None:
    expected = pytest.approx(runs.losses("whole-0"), rel=CLOSE)
    assert runs.losses(f"whole-{stage}") == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_resumes_bitwise_on_as_many_ranks(runs: Runs, stage: int) -> None:
    assert runs.losses(f"same-{stage}") == runs.losses(f"whole-{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_from_2_ranks_to_1_and_back(runs: Runs, stage: int) -> None:
    expected = pytest.approx(runs.losses(f"whole-{stage}"), rel=CLOSE)
    assert runs.losses(f"cross-{stage}") == expected


@pytest.mark.parametrize("stage", OFFLOADED)
def test_offload_changes_no_loss(runs: Runs, stage: int) -> None:
    expected = pytest.approx(runs.losses(f"whole-{stage}"), rel=CLOSE)
    assert runs.losses(f"offload-{stage}") == expected


@pytest.mark.parametrize("stage", RECOMPUTED)
def test_activation_checkpointing_changes_no_bit(runs: Runs, stage: int) -> None:
    assert runs.losses(f"recompute-{stage}") == runs.losses(f"whole-{stage}")


def test_stage_and_ranks_may_change_together(runs: Runs) -> None:
    assert runs.losses("moving") == pytest.approx(runs.losses("whole-1"), rel=CLOSE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_1x8_2x4_and_4x2_take_the_same_steps(runs: Runs, ranks: int) -> None:
    expected = pytest.approx(runs.losses("split-1"), rel=CLOSE)
    assert runs.losses(f"split-{ranks}") == expected
    digests = column(runs.folder / f"split-{ranks}", "sample_digest")
    assert digests == column(runs.folder / "split-1", "sample_digest")
