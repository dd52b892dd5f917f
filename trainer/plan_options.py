"""Every key of a plan: those of the run, and the GPUs it is planned for.

Owns the keys that only `trainer.plan` has. Does not own those of a run
(`trainer.options`).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.options import PretrainConfig, at_least

NO_DATA = "none"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """A pretraining run, and the GPUs it is planned for."""

    data: list[str] | str = NO_DATA
    """Dataset directory, its URL, or several; `none` to plan without one."""
    output: str = "RUN"
    """Not written to."""
    gpu: str
    """Kind of GPU: h100, h200, a100-80, l40s, rtx-4090, ...; a wrong one lists all."""
    gpus: int = 1
    """How many of them: the world size."""
    mfu: float = 0.35
    """Model FLOPs utilisation to assume: the share of its peak that a GPU gives."""
    headroom: float = 0.1
    """Share of a GPU's memory left to the CUDA context, NCCL and fragmentation."""
    price: float | None = None
    """Price of one GPU for an hour, in any currency."""
    vocab_size: int = 30522
    """Vocabulary to assume without a dataset."""
    text_tokens: int | None = None
    """Tokens of every text to assume without a dataset, special ones included. Default:
    as many as text.max_tokens allows."""
    decode: int = 256
    """Pairs to decode on this machine to see how many cores are needed; 0: none."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}: a share, above 0 and at most 1")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom is {self.headroom}: a share, 0 to below 1")
        if self.deepspeed.offload != "none":
            raise ValueError(
                "deepspeed.offload is not planned for: plan without it, and take what "
                "the optimizer needs (weights in fp32, two moments) off by hand"
            )
        at_least("", self, gpus=1, vocab_size=1, decode=0, price=0)
        # [CLS], a word, and the separator.
        at_least("", self, text_tokens=3)
