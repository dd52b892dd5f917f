"""What a training step keeps in a device's memory, estimated before there is a device.

Owns what is held of weights and optimizer states, by ZeRO stage. Does not own what a
model keeps for its backward pass (`activations` of its keys), how large a batch is
(`trainer.plan_data`) or how much a device has (`trainer.gpus`).

It follows what DeepSpeed 0.19 and autograd hold, tensor by tensor; what it leaves out
is the CUDA context, NCCL's buffers, workspaces of kernels and fragmentation, for which
`trainer.plan` leaves headroom.

Bytes. Shapes: B pairs, T stream rows, M masked words, R images to reconstruct, P
parameters, W ranks, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

# DeepSpeed's defaults, in elements: gradients are reduced in a buffer of this size, and
# stage 3 keeps gathered weights that are used again within so many.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
FP32 = 4
_ADAM = 8


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a micro-batch as the model sees it."""

    pairs: int
    """B."""
    rows: int
    """T, padding included."""
    table: int
    """Places that attention in fp32 has for its rows: on a GPU those of a padded table,
    on a CPU, which goes from segment to segment, T."""
    masked_words: int
    """M, a capacity."""
    recon_images: int
    """R, a capacity."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What one micro-batch keeps for its backward pass, and what that takes besides."""

    embedder: int
    """Of the convolutions on the images."""
    blocks: int
    """Of all transformer layers."""
    checkpointed: int
    """The same where each layer is computed again: its input, and one layer whole."""
    ends: int
    """MLM head and decoder at their worst moment, the logits' gradients included."""

    def total(self, *, checkpointing: bool) -> int:
        """At the worst moment of forward and backward."""
        blocks = self.checkpointed if checkpointing else self.blocks
        return self.embedder + blocks + self.ends


@dataclass(frozen=True, kw_only=True)
class States:
    """What a rank holds besides activations, while gradients are made."""

    weights: int
    gradients: int
    buckets: int
    """The buffer that gradients are reduced in, where it is there all the time."""
    master: int
    """fp32 weights beside those that the model computes with."""
    moments: int
    """The two of AdamW."""
    step: int
    """What reducing gradients or the optimizer step takes, whichever is more, when
    activations are gone."""

    @property
    def held(self) -> int:
        """All of it, but for what only the optimizer step takes."""
        return self.weights + self.gradients + self.buckets + self.master + self.moments

    def peak(self, activations: int) -> int:
        """The larger of the backward pass and of what comes after it."""
        return max(self.held + activations, self.held - self.buckets + self.step)


def states(
    parameters: int, *, stage: int, ranks: int, bf16: bool, lazy: bool = False
) -> States:
    """Weights, gradients and optimizer states of a rank.

    Args:
        parameters: P.
        stage: ZeRO stage.
        ranks: W.
        bf16: the model computes in bf16, else in fp32.
        lazy: memory counts once it is written to, as on a CPU, and not once there is a
            buffer for it.
    """
    size = 2 if bf16 else FP32
    share = -(-parameters // ranks)
    reduced = min(parameters, REDUCE_BUCKET)
    # Gradients of bf16 are added up in fp32, in a copy of what is in the buffer.
    widened = FP32 * reduced if bf16 and ranks > 1 else 0
    if stage == 0:
        # They are flattened for it once the backward pass has ended.
        flattened = size * reduced + widened if ranks > 1 else 0
        return States(
            weights=size * parameters,
            gradients=size * parameters,
            buckets=0,
            master=FP32 * parameters if bf16 else 0,
            moments=_ADAM * parameters,
            step=max(flattened, FP32 * parameters),
        )
    # One rank of stage 1 takes its gradients whole, and on a GPU clips and widens them
    # in the pass that updates the weights (`trainer.one_rank`).
    whole = stage == 1 and ranks == 1
    one_pass = whole and bf16 and not lazy
    reduced = 0 if whole else reduced
    bucket = 0 if whole else size * REDUCE_BUCKET
    gathered = size * min(parameters, LIVE_PARAMETERS) if stage == 3 else 0
    return States(
        weights=gathered + size * share if stage == 3 else size * parameters,
        gradients=size * (parameters if stage == 1 else share),
        buckets=0 if lazy else bucket,
        # In fp32 stage 3 steps on the weights themselves; 1 and 2 on a copy.
        master=FP32 * share if bf16 or stage < 3 else 0,
        moments=_ADAM * share,
        # Its gradients flattened, in fp32, and the root of the second moment.
        step=max(
            (size * reduced if lazy else bucket) + widened,
            (size if one_pass else size + FP32 + FP32) * share,
        ),
    )
