"""What needs a GPU is rehearsed without one, and held to its promises with one."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch._inductor.utils import get_benchmark_name

from benchmarks.gpu import batches, peers, reads, syncs, variants
from benchmarks.gpu.__main__ import FAILED, PARTS, UNFINISHED, main
from benchmarks.gpu.kernels import all_cases, check, checks, dtypes, name_of, times
from benchmarks.gpu.precision import compared
from benchmarks.gpu.profile import Span, kind_of
from benchmarks.gpu.profile import summary as profiled_summary
from benchmarks.gpu.real_run import summary
from benchmarks.gpu.record import Record, Setting, source_digest
from benchmarks.gpu.steps import best_size
from tests.conftest import ROOT, python
from trainer.kernels.case import Case
from trainer.loader import MicroBatch
from trainer.loop import model_inputs
from trainer.masking import Masks

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = [(case, dtype) for case in all_cases() for dtype in dtypes(case)]
REHEARSAL = ("--device", "cpu", "--tiny", "--output")


@triton.jit
def _scale_kernel(x, y, factor, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < n).to(tl.float32) * factor
    tl.store(y + place, value.to(y.dtype.element_ty), place < n)


def _launch(x: Tensor, factor: float, written: int) -> Tensor:
    y = torch.empty_like(x)
    _scale_kernel[(triton.cdiv(written, 16),)](x, y, factor, written, BLOCK=16)
    return y


@library.custom_op("gpu_test::scale", mutates_args=())
def scale(x: Tensor, factor: float, backward_factor: float, left: int) -> Tensor:
    return _launch(x, factor, x.numel() - left)


@scale.register_fake
def _(x: Tensor, factor: float, backward_factor: float, left: int) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.factor = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> Any:
    return _launch(grad, ctx.factor, grad.numel()), None, None, None


scale.register_autograd(_backward, setup_context=_keep)


def _inputs(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(37, generator=generator, device=device)
    return (drawn.to(dtype).requires_grad_(),)


def case_of(
    *, factor: float = 2.0, backward_factor: float = 2.0, left: int = 0
) -> Case:
    return Case(
        kernel="scale",
        shape=f"N=37 {factor} {backward_factor} {left}",
        inputs=_inputs,
        fused=lambda x: scale(x, factor, backward_factor, left),
        reference=lambda x: x * 2,
        tolerances={torch.float32: 1e-6, torch.bfloat16: 4e-3},
        reason="one multiplication",
        forward_bytes=lambda dtype: 2 * 37 * dtype.itemsize,
        backward_bytes=lambda dtype: 2 * 37 * dtype.itemsize,
        small=True,
    )


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(device=torch.device("cpu"), tiny=True, output=tmp_path)


@pytest.fixture(scope="module")
def loader() -> batches.Drawn:
    return batches.Drawn(batches.recipe("mlim-base", pairs=4, tiny=True), tiny=True)


def stored(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    return found


def test_a_right_kernel_passes_and_is_timed_three_ways(setting: Setting) -> None:
    checks(setting, Record(setting, "checks"), [case_of()])
    times(setting, Record(setting, "kernels"), [case_of()])
    entries = stored(setting.output, "checks")["entries"]
    assert len(entries) == 2
    assert all(entry["passed"] for entry in entries.values())
    assert all(
        set(one["errors"]) == {"output 0", "gradient 0"} for one in entries.values()
    )
    timed = stored(setting.output, "kernels")["entries"]
    entry = timed[name_of(case_of(), torch.float32)]
    for contender in ("fused", "eager", "compiled"):
        assert entry[f"{contender}_forward_s"] > 0
        assert entry[f"{contender}_step_s"] > 0
    assert entry["forward_share_of_copy"] > 0
    assert entry["step_bytes"] == 2 * entry["forward_bytes"] == 4 * 37 * 4


@pytest.mark.parametrize(
    "broken", [{"factor": 2.1}, {"backward_factor": 2.1}, {"left": 5}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_fails_that_is_wrong_in_value_gradient_or_leaves_some_unwritten(
    broken: dict[str, Any], dtype: torch.dtype
) -> None:
    found = check(case_of(**broken), torch.device("cpu"), dtype)
    assert not found["passed"]
    assert found["largest_error"] > found["tolerance"]


def test_integers_must_be_equal() -> None:
    off = replace(
        case_of(), fused=lambda x: (x * 2, x.argmax() + 1),
        reference=lambda x: (x * 2, x.argmax()),
    )  # fmt: skip
    assert not check(off, torch.device("cpu"), torch.float32)["passed"]


def test_every_kernel_of_the_trainer_is_checked_without_a_gpu(
    setting: Setting,
) -> None:
    small = {case.kernel: case for case in reversed(all_cases()) if case.small}
    record = Record(setting, "checks")
    checks(setting, record, list(small.values()))
    assert len(record.entries) == sum(len(dtypes(case)) for case in small.values())
    assert not record.failed, record.entries


def test_what_is_there_is_not_measured_again(setting: Setting) -> None:
    Record(setting, "part").measure("one", lambda: {"value": 1})
    Record(setting, "part").measure("one", lambda: {"value": 2})
    assert stored(setting.output, "part")["entries"]["one"]["value"] == 1
    again = replace(setting, again=True)
    Record(again, "part").measure("one", lambda: {"value": 3})
    assert stored(setting.output, "part")["entries"]["one"]["value"] == 3


def test_what_other_sources_gave_is_measured_again(setting: Setting) -> None:
    Record(setting, "part").measure("one", lambda: {"value": 1})
    path = setting.output / "part.json"
    path.write_text(path.read_text().replace(source_digest(), "another"))
    assert Record(setting, "part").measure("one", lambda: {"value": 2})["value"] == 2


def test_what_failed_is_tried_again(setting: Setting) -> None:
    record = Record(setting, "part")
    record.measure("raises", lambda: {"value": 1 // 0})
    record.measure("wrong", lambda: {"passed": False})
    assert record.failed == ["raises", "wrong"]
    assert "ZeroDivisionError" in record.entries["raises"]["error"]
    record = Record(setting, "part")
    assert record.measure("raises", lambda: {"value": 1})["value"] == 1
    assert record.measure("wrong", lambda: {"passed": True})["passed"]
    assert not record.failed


def test_numbers_of_two_machines_are_not_mixed(setting: Setting) -> None:
    Record(setting, "part").measure("one", lambda: {"value": 1})
    path = setting.output / "part.json"
    told = json.loads(path.read_text())
    assert told["versions"]["torch"] == torch.__version__
    told["hardware"]["device"] = "another"
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="give --again"):
        Record(setting, "part")


def test_a_rehearsal_says_that_it_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["syncs", "--device", "cpu", "--tiny"]) == FAILED
    assert main(["syncs", "--device", "cpu", "--output", str(tmp_path)]) == FAILED
    assert "rehearsal" in capsys.readouterr().err
    assert main(["syncs", *REHEARSAL, str(tmp_path), "--seconds=-1"]) == UNFINISHED
    # A whole step would leave this process in a process group.
    words = ["syncs", *REHEARSAL, str(tmp_path), "--only=without values"]
    assert main(words) == 0
    assert "rehearsal" in stored(tmp_path, "syncs")


def test_where_time_is_short_entries_are_measured_in_the_order_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = ("dropout | N=5 ", "without values", "dropout | N=1 ")
    words = ["syncs", "checks", "--in-order", *(f"--only={text}" for text in asked)]
    assert main([*words, *REHEARSAL, str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    keys = [line.partition(" | ")[2] for line in told]
    places = [next(n for n, key in enumerate(keys) if text in key) for text in asked]
    assert places == sorted(places)
    assert len(told) == 2 + 1 + 2
    with pytest.raises(SystemExit):
        main(["checks", "--in-order", *REHEARSAL, str(tmp_path)])
    over = [*words, "--only=dropout", "--seconds=-1", *REHEARSAL, str(tmp_path)]
    assert main(over) == UNFINISHED
    assert "stopped before 'dropout" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*benchmarks.gpu.__main__.*:RuntimeWarning")
def test_no_entry_is_written_into_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["gpu", "checks", "--device", "cpu", "--only", "an entry's, compiled"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    assert ended.value.code == FAILED
    assert get_benchmark_name() is None


@pytest.mark.parametrize("part", ["checks", "kernels"])
def test_a_rehearsal_of_kernels_needs_the_interpreter(
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([part, *REHEARSAL, str(tmp_path)]) == FAILED
    assert "needs TRITON_INTERPRET=1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_how_to_rehearse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["steps"]) == FAILED
    assert "--device cpu --tiny" in capsys.readouterr().err


def rehearsed(folder: Path, *words: str | Path) -> None:
    done = python(
        *("-m", "benchmarks.gpu", *words, *REHEARSAL, folder),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout


def test_every_part_is_rehearsed(tmp_path: Path, shards: Path) -> None:
    parts = [part for part in PARTS if part not in ("checks", "kernels", "baselines")]
    rehearsed(tmp_path, *parts, f"--data={shards}")
    given = ["python", "-m", "benchmarks.gpu", *parts, f"--data={shards}", *REHEARSAL]
    assert stored(tmp_path, "steps")["command"] == shlex.join([*given, str(tmp_path)])
    steps = stored(tmp_path, "steps")["entries"]
    assert len([key for key in steps if key.endswith(" from shards")]) == 1
    for part in ("steps", "ablation"):
        for key, entry in stored(tmp_path, part)["entries"].items():
            assert entry["pairs_per_s"] > 0, key
    ablation = stored(tmp_path, "ablation")["entries"]
    assert len(ablation) == len(variants.variants(Setting(device=torch.device("cpu"))))
    assert ablation["mlim-base | masks on the host"]["replaced_calls"] == 4
    assert stored(tmp_path, "precision")["entries"]["comparison"]["within_noise"]
    assert stored(tmp_path, "real_run")["entries"]["run"]["steps"] == 2


def test_the_body_of_transformers_is_rehearsed(tmp_path: Path) -> None:
    rehearsed(tmp_path, "baselines", "--only=BERT")
    entries = stored(tmp_path, "baselines")["entries"]
    assert [key.rpartition(", ")[2] for key in entries] == ["eager", "compiled"]
    assert all(entry["pairs_per_s"] > 0 for entry in entries.values())


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_learn_from_our_pairs(peer: peers.Peer, loader: batches.Drawn) -> None:
    torch.manual_seed(0)
    model = peer.build(loader.config, loader.dataset.tokenizer.vocab_size)
    batch = peer.batch(loader, loader.step(0).micro_batches[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = peer.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_padded_texts_are_masked_like_the_stream(loader: batches.Drawn) -> None:
    micro = loader.step(0).micro_batches[0]
    masks = model_inputs(loader, micro)[1]
    longest = loader.config.text.max_tokens
    shown, ids, is_text, labels = peers.padded_table(loader, micro, longest)
    masked = labels != -100
    assert torch.equal(masked.sum(1), masks.counts.text)
    assert torch.equal(shown[~masked], ids[~masked])
    assert set(shown[masked].tolist()) == {peers.MASK_ID}
    assert is_text.sum() == micro.stream.text_used


def losses(loader: batches.Drawn, micro: MicroBatch, masks: Masks | None = None) -> Any:
    torch.manual_seed(0)
    model = syncs._model(loader)
    inputs, drawn = model_inputs(loader, micro)
    output = model(inputs, masks or drawn)
    return float(output.losses["mlm"].detach()), float(output.losses["recon"].detach())


def test_other_forms_of_a_batch_have_its_pairs_and_masks(loader: batches.Drawn) -> None:
    batch = loader.step(0)
    plain = losses(loader, batch.micro_batches[0])
    everywhere = batches.heads_everywhere(loader, batch).micro_batches[0]
    assert losses(loader, everywhere) == pytest.approx(plain, rel=1e-5)
    host = batches.masked_on_host(loader, batch).micro_batches[0]
    assert isinstance(host, batches.MaskedOnHost)
    assert losses(loader, host, host.masks) == plain
    wide = batches.padded(loader, batch).micro_batches[0]
    counts = [
        model_inputs(loader, one)[1].counts for one in (batch.micro_batches[0], wide)
    ]
    assert torch.equal(counts[0].text, counts[1].text)
    longest = loader.config.text.max_tokens
    assert len(wide.stream.source) >= 4 * (longest + loader.n_image)
    shown = batch.micro_batches[0].token_ids
    assert torch.equal(wide.token_ids[wide.token_ids > 0], shown[shown > 0])


def test_drawn_batches_are_the_same_each_time_and_have_captions_of_24_tokens() -> None:
    config = batches.recipe("mlim-base", pairs=256)
    one, other = (batches.Drawn(config).step(3) for _ in range(2))
    assert one.counts == other.counts
    first, second = one.micro_batches[0], other.micro_batches[0]
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.token_ids, second.token_ids)
    assert one.counts.tokens / 256 - config.n_image == pytest.approx(24, abs=2)


def test_a_step_does_not_wait_for_the_device(loader: batches.Drawn) -> None:
    found = syncs.without_values(loader, loader.step(0).micro_batches[0])
    assert found["passed"], found


def test_a_whole_step_waits_once_for_the_step_before(tmp_path: Path) -> None:
    rehearsed(tmp_path, "syncs", "--only=whole step")
    entries = stored(tmp_path, "syncs")["entries"]
    assert [*entries] == ["whole step, ZeRO 1", "whole step, ZeRO 2"]
    for entry in entries.values():
        assert entry["waits"] == {reads.ONE_STEP_LATE: 1}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: __import__("deepspeed").get_accelerator().synchronize(),
    ],
)
def test_what_a_step_reads_is_counted(wait: Callable[[Tensor], object]) -> None:
    x = torch.ones(3)
    assert reads.reads(lambda: wait(x)).total() == 1
    assert not reads.reads(lambda: x * 2)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.new_zeros(2).copy_(torch.ones(2)),
    ],
)
def test_what_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    def run() -> None:
        with syncs.NoCopies():
            wait(torch.ones(3, device="meta"))

    assert syncs._tried(run)


def test_a_kernel_is_taken_away_by_its_reference() -> None:
    for module in variants.kernel_modules():
        pairs = variants._pairs(module)
        calls = variants.Calls()
        with variants._plain([module], calls):
            for name, reference in pairs.items():
                assert getattr(module, name).__wrapped__ is reference
        assert all(hasattr(module, name) for name in pairs)


def test_the_best_micro_batch_is_the_fastest_that_fits() -> None:
    entries = {
        "mlim-base | 96 pairs": {"pairs": 96, "pairs_per_s": 10.0},
        "mlim-base | 192 pairs": {"pairs": 192, "pairs_per_s": 12.0},
        "mlim-base | 384 pairs": {"pairs": 384, "out_of_memory": True},
        "mlim-base | 96 pairs, recomputed": {"pairs": 96, "pairs_per_s": 20.0},
        "mlim-large-384 | 96 pairs": {"pairs": 96, "pairs_per_s": 30.0},
    }
    assert best_size(entries, "mlim-base") == 192
    assert best_size({}, "mlim-base") is None


def test_precisions_are_compared_by_the_noise_of_seeds() -> None:
    def curves(apart: float) -> dict[str, list[float]]:
        flat = {"fp32, seed 0": 1.0, "bf16, seed 0": 1.0 + apart}
        flat["bf16, seed 1"] = flat["bf16, seed 0"] * 1.01
        return {key: [value] * 8 for key, value in flat.items()}

    assert compared(curves(0.002), 2)["within_noise"]
    assert not compared(curves(0.05), 2)["within_noise"]


def test_a_profile_says_what_kinds_of_kernels_take_and_when_none_runs() -> None:
    spans = [
        Span("nvjet_sm90_tst_256x128_bias_TNT", 0.0, 4000.0),
        Span("_attention_forward_kernel", 3000.0, 5000.0),
        Span("Memcpy HtoD (Pinned -> Device)", 8000.0, 9000.0),
        Span("_attention_forward_kernel", 9000.0, 10000.0),
    ]
    found = profiled_summary(spans, 2)
    assert found["step_ms"] == 5.0
    # What runs beside something else counts once.
    assert found["busy_ms"] == 3.5
    assert found["idle_share"] == pytest.approx(0.3)
    assert found["ms_by_kind"] == {
        "matrix products": 2.0,
        "attention": 1.5,
        "copies": 0.5,
    }
    assert [one["calls"] for one in found["longest"]] == [0.5, 1.0, 0.5]
    for name in ("_bias_gelu_backward_kernel", "layer_norm_backward_kernel"):
        assert kind_of(name) == "fused kernels"
    assert kind_of("_adamw_kernel") == "optimizer"
    assert kind_of("something else") == "other"
    with pytest.raises(ValueError, match="no kernel"):
        profiled_summary([], 1)


def test_a_run_is_summed_up_by_its_settled_steps() -> None:
    row = {"tokens_per_s": 1.0, "data_wait_frac": 0.5, "padding_frac": 0.1, "loss": 1.0}
    row |= {"peak_memory_gib": 1.0}
    rows = [
        {**row, "step": 1, "step_s": 100.0, "pairs_per_s": 1.0},
        {**row, "step": 2, "step_s": 1.0, "pairs_per_s": 10.0},
    ]
    found = summary(rows, [])
    assert found["pairs_per_s"] == 10.0
    assert found["data_wait"] == 0.5


def test_wheels_are_those_that_the_trainer_is_tested_with() -> None:
    def pins(path: str) -> dict[str, str]:
        found = re.findall(
            r"^([\w.-]+)(?:\[\w+\])?==(\S+)$", (ROOT / path).read_text(), re.M
        )
        return {re.sub(r"[._]", "-", name.lower()): pin for name, pin in found}

    ours, theirs = pins("requirements.txt"), pins("benchmarks/requirements-gpu.txt")
    assert "crc32c" in theirs
    for name in ours.keys() & theirs.keys():
        assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(*pair, id=name_of(*pair)) for pair in CASES],
)
class TestKernels:
    pytestmark = on_a_gpu

    def test_a_kernel_is_its_reference_on_a_gpu(
        self, case: Case, dtype: torch.dtype
    ) -> None:
        found = check(case, torch.device("cuda", 0), dtype)
        assert found["passed"], found["errors"]


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("name", batches.MODELS)
    def test_the_model_never_waits_for_the_gpu(self, name: str) -> None:
        setting = Setting(device=torch.device("cuda", 0))
        loader = batches.Drawn(batches.recipe(name, pairs=8))
        found = syncs.counted(loader, setting)
        assert found["passed"], found["forward_and_backward_lines"]

    def test_what_waits_is_counted(self) -> None:
        x = torch.ones(3, device="cuda")
        assert syncs.waits(partial(torch.Tensor.item, x.sum())).total()
        assert not syncs.waits(lambda: x * 2)
