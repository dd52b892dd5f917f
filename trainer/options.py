"""Every key of a pretraining run: the typed form of `trainer/recipes/*.yaml`.

Owns names, defaults and checks that need no data, and reading them back from a run
directory. Masking keys live with masking
(`trainer.mask_config`), model keys with each model (`trainer.models`), storage keys
with storage (`trainer.storage`).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.config import ConfigError, given, parse
from trainer.contract import CONFIG, PREPROCESSOR, blocking
from trainer.mask_config import MaskConfig
from trainer.models.base import ModelConfig, find
from trainer.models.mlim_config import MlimConfig
from trainer.philox import check_seed
from trainer.storage import StorageConfig

RunT = TypeVar("RunT", bound="PretrainConfig")


def at_least(group: str, config: object, **lowest: float) -> None:
    """Raise ValueError for a key of `config` below its lowest value."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not value >= low:
            number = "a number, " if math.isnan(value) else ""
            raise ValueError(
                f"{group}{name} is {value}: it must be {number}{low} or more"
            )


def finite(group: str, config: object, *names: str) -> None:
    """Raise ValueError for a key of `config` that is infinite, where that says
    nothing.
    """
    for name in names:
        value = getattr(config, name)
        if math.isinf(value):
            raise ValueError(f"{group}{name} is {value}: give a finite number")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Training-time image geometry."""

    size: int = 64
    """Side in pixels of the square that the model sees."""
    geometry: Literal["center_crop", "resize", "random_resized_crop"] = "center_crop"
    """Centre square; the whole image squeezed; or a random box drawn by Philox."""
    flip: bool = False
    """Mirror half of the images, drawn by Philox. Captions say left and right, so only
    where yours do not."""
    min_scale: float = 0.5
    """Smallest share of the image area that a random resized crop keeps."""

    def __post_init__(self) -> None:
        at_least("image.", self, size=1)
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"image.min_scale is {self.min_scale}: above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Captions as the model sees them."""

    max_tokens: int = 64
    """Longest text, [CLS] and separator included; the rest of a caption is cut."""

    def __post_init__(self) -> None:
        at_least("text.", self, max_tokens=3)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; no weight decay on norms and biases."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    clip: float = 1.0
    """Largest global gradient norm; `.inf` for no limit."""

    def __post_init__(self) -> None:
        at_least("optimizer.", self, lr=0, eps=0, weight_decay=0)
        finite("optimizer.", self, "lr", "eps", "weight_decay")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {self.betas}: from 0 to below 1")
        if not self.clip > 0:
            raise ValueError(
                f"optimizer.clip is {self.clip}, which would leave no gradient: give a "
                "positive norm, or .inf for no limit"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then down to a floor."""

    shape: Literal["cosine", "linear", "wsd"] = "cosine"
    """Way down: a cosine; a line; or none until a last share of the steps, then a line
    (warm-up, stable, decay)."""
    steps: int = 1000
    """Length of the schedule in steps; `--max_steps` stops earlier, unbent."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final_lr_fraction: float = 0.05
    """Share of the peak at the end."""
    decay_share: float = 0.1
    """Share of the steps, at the end, in which wsd comes down."""

    def __post_init__(self) -> None:
        at_least("schedule.", self, steps=1, warmup=0, final_lr_fraction=0)
        if not 0 < self.decay_share <= 1:
            raise ValueError(
                f"schedule.decay_share is {self.decay_share}: above 0, at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """The engine."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is sharded over ranks (nothing, optimizer, gradients, all)."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: fp32 weights and Adam's moments in the host's memory, and the step on its
    cores."""
    activation_checkpointing: bool = False
    """Keep only the input of each transformer layer and compute the rest again in the
    backward pass: less memory, a third more time."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 with fp32 master weights on GPUs, fp32 on CPUs."""

    def __post_init__(self) -> None:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(
                f"deepspeed.offload {self.offload} needs deepspeed.zero_stage 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 200
    """Steps between checkpoints; one more is taken when the run stops."""
    every_minutes: float | None = 30
    """Most minutes between checkpoints, by the clock of rank 0; null for no limit."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss too; one is taken whenever
    validation finds a lower loss."""

    def __post_init__(self) -> None:
        at_least("checkpoint.", self, every_steps=1, every_minutes=0, keep=1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run shows and writes."""

    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well, if it is installed; offline with
    WANDB_MODE=offline. A resumed run goes on under its id (RUN/wandb.json)."""
    norms_every: int = 10
    """Steps between measurements of the norm of all parameters; 0: never."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one device, which mfu is a share of. null: that of known GPUs in
    bf16 (trainer.gpus); for other devices mfu is left out."""

    def __post_init__(self) -> None:
        at_least("log.", self, norms_every=0)
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(
                f"log.peak_tflops is {self.peak_tflops}: give the TFLOP/s of one "
                "device, or null for those of known GPUs"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a run measures on held-out pairs while it trains."""

    every_steps: int = 200
    """Steps between validations; one more is made at the last step. 0: never. A
    multiple of checkpoint.every_steps, or a divisor, gives checkpoints a loss."""
    split: str = "val"
    """Split to measure on."""
    max_pairs: int | None = 1024
    """Measure on at most this many pairs, drawn by eval.seed; null for all. They stay
    in memory, divided over ranks."""
    seed: int = 0
    """Seed of the pairs, their captions and masks: not the run's, so that runs of
    different seeds are measured alike."""
    probes_every_steps: int = 0
    """Steps between the two probes, with a panel of reconstructions in RUN/panels, by
    rank 0 while the others wait. 0: never."""
    probe_pairs: int = 256
    """Pairs that the probes are measured on."""
    panel_pairs: int = 6
    """Pairs shown in a panel."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        at_least("eval.", self, every_steps=0, max_pairs=1, probes_every_steps=0)
        at_least("eval.", self, probe_pairs=2, panel_pairs=1)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps that rank 0 records for a look at where their time and memory go."""

    steps: int = 0
    """How many steps to record, in RUN/profile/rank-0.trace.json.gz (for
    ui.perfetto.dev or chrome://tracing). 0: none."""
    first_step: int = 10
    """Steps taken before the first one that is recorded."""
    memory: bool = False
    """Record allocations as well; on a GPU also RUN/profile/rank-0.memory.pickle, for
    pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        at_least("profile.", self, steps=0, first_step=0)


@dataclass(frozen=True, kw_only=True)
class DamageConfig:
    """What a run bears of a damaged dataset (`trainer.quarantine`)."""

    max_share: float = 0.001
    """Share of the samples that may be damaged. Another of the same lane takes the
    place of each; past this share the run stops and names the shards. 0: at once.
    Damaged held-out pairs are left out; past this share of those that are read the run
    stops too."""

    def __post_init__(self) -> None:
        at_least("damage.", self, max_share=0)
        if self.max_share >= 1:
            raise ValueError(f"damage.max_share is {self.max_share}: below 1")


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What a run does about a step that goes wrong (`trainer.safety`,
    `trainer.watchdog`).
    """

    nonfinite: Literal["skip", "stop"] = "skip"
    """When a loss or gradient of any rank is not finite, no weight changes on any:
    drop the step's update and go on, or stop the run."""
    max_nonfinite: int = 3
    """Most such steps in a row that are passed over; then the run stops."""
    spike_action: Literal["log", "skip", "roll_back"] = "log"
    """When a loss spikes: say so; drop the step's update; or go back to the weights of
    the newest roll-back point and on with the data after the spike."""
    spike_window: int = 100
    """Steps that a loss is compared with, and that must pass before the first spike."""
    spike_threshold: float = 8.0
    """Standard deviations above its running mean that make a loss a spike."""
    max_spikes: int = 10
    """Most spikes that are skipped or rolled back with fewer than `spike_window` steps
    between them; then the run stops."""
    roll_back_steps: int = 500
    """Steps between roll-back points, in RUN/roll_back; two of them stay on disk."""
    hang_minutes: float | None = 15.0
    """Minutes in one stage of a step (data, backward, validation, checkpoint, ...)
    after which a rank is said to hang: more than any of them takes. null: never."""
    hang_action: Literal["abort", "warn"] = "abort"
    """End the rank, so that the launcher ends the run and the same command can resume
    it; or only say so."""

    def __post_init__(self) -> None:
        at_least("safety.", self, max_nonfinite=0, spike_window=2, spike_threshold=1)
        at_least("safety.", self, max_spikes=0, roll_back_steps=1, hang_minutes=0.001)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked vision-language pretraining on a dataset of shards."""

    data: list[str] | str
    """Dataset directory that pipeline.preprocess made, or its URL (s3://, gs://, ...),
    or several: [photos, tables]."""
    output: str
    """Run directory, or its URL (s3://, gs://, ...), for nodes that share no disk; one
    that holds a checkpoint is resumed."""
    seed: int = 0
    """Seed of weights, order, captions, crops and masks."""
    init: str | None = None
    """Start from the weights in this directory: a run, a checkpoint, or an export. Step
    0 and a fresh optimizer; not looked at when a run is resumed."""
    max_steps: int | None = None
    """Stop after this many steps of the run; a later call with more continues."""
    split: str = "train"
    """Split of the dataset to train on."""
    tokenizer: str | None = None
    """Tokenizer directory that the dataset must have been made with (checked)."""
    mixture: Literal["weights", "none"] | dict[str, float] = "weights"
    """What several sources are mixed by: the weights in their manifests, or yours,
    {photos: 3, tables: 1}; each source then has epochs of its own. none: one dataset's
    sources as if they were one, an epoch taking every sample once."""
    grow: bool = False
    """Start on a dataset that is still being written: each epoch takes in the shards
    committed by then."""
    changed_data: Literal["refuse", "continue", "new_epoch"] = "refuse"
    """When resuming on a dataset that has changed, not just grown: refuse; continue at
    the same place (every shard must have as many samples as before); or begin an epoch
    of the new data after the steps taken."""
    lanes: int = 48
    """Lanes of the sample order: every world size must divide this."""
    global_batch: int = 192
    """Pairs of a step over all ranks; a multiple of `lanes`."""
    micro_batch: int = 256
    """Most pairs that a rank takes through the model at once."""
    shuffle_shards: int = 8
    """Shard pieces that are shuffled together as one window."""
    threads: int = 1
    """Decoding threads of each rank."""
    compile: Literal["none", "layers"] = "none"
    """layers: torch.compile of each transformer layer, and of MLIM's embedder and
    decoder, not with ZeRO stage 3. The first steps take minutes; needs a C compiler."""
    digest: Literal["samples", "full"] = "samples"
    """What `sample_digest` covers: (uid, caption, augmentation), or the masks too."""
    model: ModelConfig = field(default_factory=MlimConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    damage: DamageConfig = field(default_factory=DamageConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not self.data:
            raise ValueError("data names no dataset: give a directory, or several")
        at_least("", self, lanes=1, global_batch=1, micro_batch=1, threads=1)
        at_least("", self, shuffle_shards=1, max_steps=1)
        for key, body in self.model.bodies.items():
            if self.init:
                raise ValueError(
                    f"the weights of --init {self.init} replace those of model.{key} "
                    f"{body}: give --model.{key} null with it"
                )
        if self.compile != "none" and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "compile layers cannot see through ZeRO stage 3, which gathers weights "
                "layer by layer: give --deepspeed.zero_stage 2 or less, or --compile "
                "none"
            )
        if self.image.size % self.model.patch_size:
            raise ValueError(
                f"image.size {self.image.size} is not a multiple of the "
                f"{self.model.patch_size} px that an image token covers "
                f"({self.model.patch_key})"
            )
        side = self.image.size // self.model.patch_size
        if self.mask.image_block > side:
            raise ValueError(
                f"mask.image_block {self.mask.image_block} is more than the {side} "
                "tokens on a side of the image: lower it"
            )

    @property
    def n_image(self) -> int:
        """Image tokens of a pair."""
        return (self.image.size // self.model.patch_size) ** 2

    @property
    def run(self) -> Path:
        """Where the run lies on this node: --output, or a working copy of it."""
        return self.storage.working_copy(self.output)

    @property
    def last_step(self) -> int:
        """Steps after which this call stops."""
        return min(self.max_steps or self.schedule.steps, self.schedule.steps)


_OF_ANOTHER_MODEL = ("unknown key 'model.", 'key "model.name": Expected one of')


def parse_run(
    kind: type[RunT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    recipes: Path | None = None,
) -> RunT:
    """`pipeline.config.parse` of a run's keys, those of the model that `model.name`
    names among them.

    Raises:
        ConfigError: as there, or no such model.
    """
    name = given(argv, "model.name", recipes=recipes) or MlimConfig.name
    try:
        keys = find(str(name))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return parse(
            with_model(kind, keys),  # type: ignore[arg-type]
            argv,
            prog=prog,
            description=description,
            recipes=recipes,
        )
    except ConfigError as error:
        if not str(error).startswith(_OF_ANOTHER_MODEL):
            raise
        raise ConfigError(
            f"{error} The model is {name}, by model.name: a recipe or a flag of "
            "another model does not go with it"
        ) from error


@functools.cache
def with_model(kind: type[RunT], keys: type[ModelConfig]) -> type[RunT]:
    """`kind` with the keys of a model, and masks that are its own by default."""
    fields: list[tuple[str, Any, Any]] = [
        ("model", keys, field(default_factory=keys)),
        ("mask", MaskConfig, field(default_factory=keys.masks)),
    ]
    made = make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True
    )
    made.__doc__, made.__module__ = kind.__doc__, kind.__module__
    return made


def load_config(
    run: Path, *, data: Sequence[str] | str | None = None
) -> PretrainConfig:
    """The configuration that `run` was last started with. Keys that there were none of
    then have their defaults, which must change nothing, a model's own (`masks`) too.

    Args:
        data: dataset directory, or several, instead of those in it.

    Raises:
        ValueError: no run.
    """
    if not (run / CONFIG).is_file():
        if (run / PREPROCESSOR).is_file():
            raise ValueError(
                f"{run} is an exported model, and this needs the run that it is of"
            )
        raise ValueError(f"{run} is no run: it has no {CONFIG}; train it first")
    words = ["--config", str(run / CONFIG)]
    if data:
        words += ["--data", data if isinstance(data, str) else json.dumps([*data])]
    return parse_run(PretrainConfig, words, prog="", description="")


def blocking_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each changed key that a resumed run may not change."""
    from pipeline.config import differences

    return blocking(differences(old, new), changed_data=new.get("changed_data"))
