"""The formula against a count of the products that a real model takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.test_mlim import SIZE, TINY, batch, build, matching
from tests.trainer.test_mlim import V as VOCABULARY
from trainer.flops import step_flops, utilisation
from trainer.gpus import GPUS, device_peak, gpu_named, known_peak
from trainer.masking import Masks
from trainer.models.base import Inputs
from trainer.models.mlim import MlimConfig

N_IMAGE = (SIZE // TINY.patch_size) ** 2
RAGGED = [7, 12, 20, 5]
# A text capacity with nothing left over, and texts of one length: no padding anywhere.
EVEN = [8, 8, 8]


@dataclass(frozen=True, kw_only=True)
class Counted:
    pairs: int
    tokens: int
    squared_lengths: int
    scored_lengths: int
    masked_words: int
    recon_images: int


def real_work(lengths: list[int], masks: Masks, sizes: MlimConfig = TINY) -> Counted:
    """What the loader counts of a batch."""
    scored = sizes.scored_positions(masks.counts, N_IMAGE).tolist()
    return Counted(
        pairs=len(lengths),
        tokens=sum(lengths) + len(lengths) * N_IMAGE,
        squared_lengths=sum((length + N_IMAGE) ** 2 for length in lengths),
        scored_lengths=sum(
            (length + N_IMAGE) * rows
            for length, rows in zip(lengths, scored, strict=True)
        ),
        masked_words=int(masks.text.sum()),
        recon_images=int(masks.image.any(1).sum()),
    )


def padded_work(inputs: Inputs, masks: Masks) -> Counted:
    """What the plain implementation computes: rows and lists of some capacity."""
    segments = inputs.stream.cu_seqlens.diff()
    kept = build()._scored_rows(inputs, masks)
    assert kept is not None
    return Counted(
        pairs=inputs.stream.pairs,
        tokens=len(inputs.stream.source),
        squared_lengths=int(segments.square().sum()),
        scored_lengths=int((segments * kept.cu_seqlens.diff()).sum()),
        masked_words=inputs.n_masked_words,
        # A capacity takes no more images than there are.
        recon_images=min(inputs.n_recon_images, inputs.stream.pairs),
    )


def counted(inputs: Inputs, masks: Masks, sizes: MlimConfig) -> tuple[int, int]:
    """FLOPs of products and convolutions that torch dispatches, forward and both."""
    model = build(sizes)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(inputs, masks)
        forward = counter.get_total_flops()
        output.total.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("recon_weight", [0.0, 1.0])
@pytest.mark.parametrize("itm_weight", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_formula_is_the_count_where_nothing_is_padded(
    norm: str, itm_weight: float, recon_weight: float
) -> None:
    weights = {"itm_weight": itm_weight, "recon_weight": recon_weight}
    tiny = dataclasses.replace(TINY, norm=norm, **weights)
    inputs, masks = batch(EVEN)
    if itm_weight:
        inputs = inputs._replace(matching=matching(len(EVEN)))
    work = real_work(EVEN, masks, tiny)
    exact = inputs._replace(
        n_masked_words=work.masked_words, n_recon_images=work.recon_images
    )
    forward, both = counted(exact, masks, tiny)
    sizes = {"vocab_size": VOCABULARY, "image_size": SIZE}
    assert sum(tiny.forward_flops(work, **sizes).values()) == forward
    assert step_flops(tiny, work, **sizes) == both


def test_the_rest_of_the_count_is_padding() -> None:
    inputs, masks = batch(RAGGED)
    _, both = counted(inputs, masks, TINY)
    sizes = {"vocab_size": VOCABULARY, "image_size": SIZE}
    assert step_flops(TINY, padded_work(inputs, masks), **sizes) == both
    assert step_flops(TINY, real_work(RAGGED, masks), **sizes) < both


def test_the_share_of_an_unknown_peak_is_left_out() -> None:
    assert utilisation(6e12, seconds=2, devices=3, peak=None) == {"model_tflops": 1.0}
    found = utilisation(6e12, seconds=2, devices=3, peak=4e12)
    assert found == {"model_tflops": 1.0, "mfu": 0.25}
    cpu = torch.device("cpu")
    assert device_peak(cpu, precision="bf16", tflops=None) is None
    assert device_peak(cpu, precision="fp32", tflops=2.0) == 2e12


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_device_is_known_by_the_name_that_torch_reports(
    device: str, name: str
) -> None:
    assert known_peak(device) == gpu_named(name).bf16_tflops * 1e12


def test_neither_a_slice_of_a_gpu_nor_another_one_has_its_peak() -> None:
    assert known_peak("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None
    assert known_peak("NVIDIA H100 80GB HBM3 MIG 3g.40gb") is None
    assert known_peak("NVIDIA GeForce RTX 4090 D") is None
    assert known_peak("NVIDIA L4") != known_peak("NVIDIA L40S")


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"b200, h200.*Did you mean 'h100'") as error:
        gpu_named("h10")
    assert all(gpu.name in str(error.value) for gpu in GPUS)
    assert gpu_named("RTX_4090").name == "rtx-4090"
