"""GPUs that are known: their memory and their peak in bf16.

Owns the table. Peaks are the vendors' for dense bf16 matrix products with fp32
accumulation, at boost clocks; memory is about what torch reports in total, a little
less than is printed on the box. A GPU that is not here has no peak: none is made up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """As the user calls it."""
    device: str
    """Regular expression of the whole name that torch reports: a slice of a GPU (MIG)
    has a longer one, and not its peak."""
    memory_gib: float
    """GiB in total."""
    bf16_tflops: float
    """Peak of dense bf16 matrix products, TFLOP/s."""


GPUS = (
    Gpu(name="b200", device="NVIDIA B200", memory_gib=178, bf16_tflops=2250),
    Gpu(name="h200", device="NVIDIA H200", memory_gib=139, bf16_tflops=989),
    Gpu(
        name="h100",
        device="NVIDIA H100 80GB HBM3",
        memory_gib=79,
        bf16_tflops=989,
    ),
    Gpu(
        name="h100-pcie",
        device="NVIDIA H100 PCIe",
        memory_gib=79,
        bf16_tflops=756,
    ),
    Gpu(
        name="a100-80",
        device=r"NVIDIA A100[- ](SXM4-|PCIE-)?80GB( PCIe)?",
        memory_gib=79,
        bf16_tflops=312,
    ),
    Gpu(
        name="a100-40",
        device="NVIDIA A100-(SXM4|PCIE)-40GB",
        memory_gib=39,
        bf16_tflops=312,
    ),
    Gpu(name="l40s", device="NVIDIA L40S", memory_gib=44, bf16_tflops=362),
    Gpu(name="l4", device="NVIDIA L4", memory_gib=22, bf16_tflops=121),
    Gpu(name="a10g", device="NVIDIA A10G", memory_gib=22, bf16_tflops=70),
    Gpu(
        name="rtx-4090",
        device="NVIDIA GeForce RTX 4090",
        memory_gib=23.5,
        bf16_tflops=165,
    ),
)


def gpu_named(name: str) -> Gpu:
    """The GPU that the user calls `name`.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    known = {gpu.name: gpu for gpu in GPUS}
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    if wanted not in known:
        raise ValueError(
            f"gpu {name!r} is not known; there are {', '.join(known)}."
            f"{nearest(wanted, list(known))}"
        )
    return known[wanted]


def known_peak(device_name: str) -> float | None:
    """Peak FLOP/s of the GPU that torch calls `device_name`, if it is known."""
    for gpu in GPUS:
        if re.fullmatch(gpu.device, device_name):
            return gpu.bf16_tflops * 1e12
    return None


def device_peak(
    device: torch.device, *, precision: str, tflops: float | None
) -> float | None:
    """Peak FLOP/s that MFU is a share of: `tflops` where the user gave it, else that of
    a known GPU that computes in bf16, else None.
    """
    import torch

    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda" or precision != "bf16":
        return None
    return known_peak(torch.cuda.get_device_name(device))
