"""Every ZeRO stage takes the same steps, on any number of ranks, also when stages or
ranks change on the way. Real launches over gloo, each for many tiny runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.trainer.sequence import launch_all
from tests.trainer.tiny import column, metrics
from trainer.contract import METRICS, complete_checkpoints, read_validation
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
# Groups of 3: with `EIGHT`, a micro-batch each.
ITM = ("--model.itm_weight=1", "--model.itm_group=3", "--eval.every_steps=3", EIGHT)
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

    def losses(self, name: str, *more: str) -> list[float]:
        """Losses and gradient norms of all its steps, and `more` metrics."""
        assert column(self.folder / name, "step") == list(range(1, STEPS + 1))
        return [
            value
            for metric in ("loss", "mlm_loss", "recon_loss", "grad_norm", *more)
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
    two += [call("split-2", 1, EIGHT), call("itm-2", 3, *ITM)]
    launch_all(2, two, folder / "two.json")
    for stage in STAGES:
        made.cut(f"whole-{stage}", f"same-{stage}", 4)
        made.cut(f"whole-{stage}", f"cross-{stage}", 2)
    made.cut("whole-1", "moving", 2)
    made.cut("itm-2", "itm-2-again", 2)
    middle = "--max_steps=4"
    one = [call(f"cross-{stage}", stage, middle) for stage in STAGES]
    one += [call("moving", 3, middle), call("split-1", 1, EIGHT)]
    one += [call("itm-1", 1, *ITM), call("itm-2-again", 1, *ITM, middle)]
    launch_all(1, one, folder / "one.json")
    again = [call(f"same-{stage}", stage) for stage in STAGES]
    again += [call(f"cross-{stage}", stage) for stage in STAGES]
    again += [call("moving", 0), call("itm-2-again", 3, *ITM)]
    launch_all(2, again, folder / "again.json")
    four = [call("split-4", 1, EIGHT), call("itm-4", 2, *ITM, RECOMPUTE)]
    launch_all(4, four, folder / "four.json")
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


@pytest.mark.parametrize("name", ["itm-2", "itm-4", "itm-2-again"])
def test_itm_is_the_same_however_a_step_is_split(runs: Runs, name: str) -> None:
    expected = pytest.approx(runs.losses("itm-1", "itm_loss"), rel=CLOSE)
    assert runs.losses(name, "itm_loss") == expected
    for exact in ("sample_digest", "itm_accuracy"):
        assert column(runs.folder / name, exact) == column(runs.folder / "itm-1", exact)
    # A call also measures after its last step.
    found, alone = (
        [row for row in read_validation(runs.folder / one) if row["step"] in (3, 6)]
        for one in (name, "itm-1")
    )
    assert len(alone) == 2
    for row, expected_row in zip(found, alone, strict=True):
        assert row["val_itm_loss"] == pytest.approx(expected_row["val_itm_loss"])
        assert row["val_itm_accuracy"] == expected_row["val_itm_accuracy"]


def test_itm_changes_the_digest_and_neither_masks_nor_the_first_losses(
    runs: Runs,
) -> None:
    plain, itm = (metrics(runs.folder / name)[0] for name in ("split-1", "itm-1"))
    assert plain["sample_digest"] != itm["sample_digest"]
    for name in ("mlm_loss", "recon_loss"):
        assert plain[name] == pytest.approx(itm[name], rel=1e-6)
    assert "itm_loss" not in plain
    assert itm["loss"] == pytest.approx(plain["loss"] + itm["itm_loss"], rel=1e-6)
