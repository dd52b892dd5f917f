"""The same work as others would write it, with `transformers`: padded, masks and labels
made beforehand, heads at every position.

Owns models and batches of the comparison. Does not own ours (`benchmarks.gpu.steps`).
Theirs get batches that lie on the device already, and no clock runs while masks are
drawn; ours are copied and masked inside the step.

Shapes: B pairs, L padded text, P image tokens.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.batches import SPECIAL_IDS, Drawn, recipe, tokenizer
from benchmarks.gpu.record import Record, Setting
from benchmarks.gpu.steps import best_size, models, sizes
from benchmarks.gpu.training import ROUNDS, speed
from trainer.build import build_model
from trainer.loader import MicroBatch
from trainer.matching import caption_table
from trainer.models.convolutions import SquareConv, TransposedConv
from trainer.options import PretrainConfig
from trainer.profiling import peak_memory_gib

VILT_TEXT = 40
"""Text positions of ViLT's published models."""
MASK_ID = SPECIAL_IDS["mask"]
_IGNORED = -100
_CODEBOOK = 8192
_BATCHES = 6
_WARMUP, _STEPS = 6, 8

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another model of the same shape."""

    name: str
    build: Callable[[PretrainConfig, int], nn.Module]
    batch: Callable[[Drawn, MicroBatch], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    same_body: bool = False
    """It computes what ours does, so that FLOPs of ours say something of it."""


def baselines(setting: Setting, record: Record) -> None:
    """Every peer, eager and compiled, at our best micro-batch or the largest smaller
    one that fits.
    """
    known = Record(setting, "steps").entries if not setting.again else {}
    for name in models(setting):
        most = best_size(known, name) or sizes(setting, name)[0]
        for peer in PEERS:
            for compiled in (False, True):
                how = "compiled" if compiled else "eager"
                record.measure(
                    f"{name} | {peer.name}, {how}",
                    functools.partial(_largest, setting, name, most, peer, compiled),
                )


def _largest(
    setting: Setting, name: str, most: int, peer: Peer, compiled: bool
) -> dict[str, Any]:
    pairs = most
    while True:
        try:
            return measured(setting, name, pairs, peer, compiled=compiled)
        except torch.OutOfMemoryError:
            if pairs < 8:
                raise
        # Outside the handler, whose traceback holds what did not fit.
        torch.cuda.empty_cache()
        pairs //= 2


def measured(
    setting: Setting, name: str, pairs: int, peer: Peer, *, compiled: bool
) -> dict[str, Any]:
    """Steps of a peer: bf16 autocast on a GPU, fused AdamW, gradients clipped."""
    config = recipe(name, pairs=pairs, tiny=setting.tiny)
    loader = Drawn(config, tiny=setting.tiny)
    torch.manual_seed(config.seed)
    model = peer.build(config, loader.dataset.tokenizer.vocab_size)
    model.to(setting.device).train()
    forward: Any = model
    if compiled:
        forward = torch.compile(
            model, backend="inductor" if setting.cuda else "eager", dynamic=False
        )
    made = [loader.step(number) for number in range(2 if setting.tiny else _BATCHES)]
    batches = [
        {
            key: value.to(setting.device)
            for key, value in peer.batch(loader, each.micro_batches[0]).items()
        }
        for each in made
    ]
    warmup, count = (1, 1) if setting.tiny else (_WARMUP, _STEPS)
    try:
        seconds = _clock(forward, model, peer, batches, setting, warmup, count)
    finally:
        torch._dynamo.reset()
    step_s = statistics.median(seconds) / count
    found = speed(loader, [each.counts for each in made], step_s, setting)
    if not peer.same_body:
        found = {k: v for k, v in found.items() if k in ("pairs_per_s",)}
    found.pop("padding", None)
    return {
        "pairs": pairs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_s": step_s,
        "peak_memory_gib": peak_memory_gib(setting.device),
        **found,
    }


def _clock(
    forward: Any,
    model: nn.Module,
    peer: Peer,
    batches: Sequence[Batch],
    setting: Setting,
    warmup: int,
    count: int,
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=setting.cuda)
    turn = 0

    def step() -> None:
        nonlocal turn
        batch = batches[turn % len(batches)]
        turn += 1
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.cuda):
            loss = peer.loss(forward, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(warmup):
        step()
    seconds = []
    for _ in range(ROUNDS):
        setting.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            step()
        setting.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


class PaddedMlim(nn.Module):
    """MLIM on `transformers`' BERT: a table of padded texts with their images behind
    them, MLM logits at every text position, every image decoded.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int) -> None:
        from transformers import BertConfig, BertForMaskedLM

        super().__init__()
        own = build_model(config, tokenizer(vocab_size))
        sizes = config.model
        self.embedder, self.decoder = _plain(own.embedder), _plain(own.decoder)
        self.grid, self.patch = own.grid, sizes.patch_size
        self.bert = BertForMaskedLM(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                intermediate_size=sizes.ffn_width,
                max_position_embeddings=config.text.max_tokens + config.n_image,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor,
        image_mask: Tensor,
    ) -> Tensor:
        """The sum of the two mean losses."""
        words = self.bert.get_input_embeddings()
        image = self.embedder(pixel_values * 2 - 1).flatten(2).transpose(1, 2)
        hidden = words.weight[MASK_ID]
        image = torch.where(image_mask[..., None], hidden.to(image.dtype), image)
        both = torch.cat([words(input_ids).to(image.dtype), image], 1)
        length = input_ids.shape[1]
        states = self.bert.bert(inputs_embeds=both, attention_mask=attention_mask)[0]
        logits = self.bert.cls(states[:, :length])
        mlm = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED
        )
        grid = states[:, length:].transpose(1, 2)
        drawn = self.decoder(grid.unflatten(2, (self.grid, self.grid)))
        error = (torch.sigmoid(drawn.float()) - pixel_values).square().sum(1)
        tiles = image_mask.unflatten(1, (self.grid, self.grid))
        wide = tiles.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        return mlm + (error * wide).sum() / wide.sum().clamp(min=1)


def _plain(layers: nn.Sequential) -> nn.Sequential:
    """The same layers as `torch.nn` has them."""
    made: list[nn.Module] = []
    for one in layers:
        if not isinstance(one, SquareConv | TransposedConv):
            continue
        kind = nn.Conv2d if isinstance(one, SquareConv) else nn.ConvTranspose2d
        shape = (one.in_channels, one.out_channels, one.kernel_size)
        same = kind(*shape, stride=one.stride, padding=one.padding)  # type: ignore[arg-type]
        same.load_state_dict(one.state_dict())
        made += [same, nn.GELU()] if one.gelu else [same]
    return nn.Sequential(*made)


def padded_table(
    loader: Drawn, micro: MicroBatch, longest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids (B, L) masked and as they were, which of them are text, and labels."""
    masks = loader.masks(
        micro.uids, micro.stream, micro.epochs, micro.text_capacity, step=micro.step
    )
    table = caption_table(micro.stream, micro.token_ids, loader.config.text.max_tokens)[
        :, :longest
    ]
    is_text = table >= 0
    ids = table.clamp(min=0)
    masked = torch.zeros_like(is_text)
    inside = min(ids.shape[1] - 1, masks.text.shape[1])
    masked[:, 1 : 1 + inside] = masks.text[:, :inside]
    masked &= is_text
    labels = torch.where(masked, ids, _IGNORED)
    return torch.where(masked, MASK_ID, ids), ids, is_text, labels


def _mlim_batch(loader: Drawn, micro: MicroBatch) -> Batch:
    config = loader.config
    shown, _, is_text, labels = padded_table(loader, micro, config.text.max_tokens)
    return {
        "input_ids": shown,
        "attention_mask": F.pad(is_text.long(), (0, config.n_image), value=1),
        "labels": labels,
        "pixel_values": _pixels(micro),
        "image_mask": _image_mask(loader, micro),
    }


def _vilt(config: PretrainConfig, vocab_size: int) -> nn.Module:
    from transformers import ViltConfig, ViltForMaskedLM

    sizes = config.model
    return ViltForMaskedLM(
        ViltConfig(
            vocab_size=vocab_size,
            max_position_embeddings=VILT_TEXT,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.ffn_width,
            image_size=config.image.size,
            patch_size=sizes.patch_size,
        )
    )


def _vilt_batch(loader: Drawn, micro: MicroBatch) -> Batch:
    shown, _, is_text, labels = padded_table(loader, micro, VILT_TEXT)
    return {
        "input_ids": shown,
        "attention_mask": is_text.long(),
        "labels": labels,
        "pixel_values": _pixels(micro) * 2 - 1,
    }


def _flava(config: PretrainConfig, vocab_size: int) -> nn.Module:
    from transformers import FlavaConfig, FlavaForPreTraining

    sizes = config.model
    body = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.ffn_width,
    }
    # As published: half as many multimodal layers as those of each modality.
    half = body | {"num_hidden_layers": max(sizes.layers // 2, 1)}
    shape = {"image_size": config.image.size, "patch_size": sizes.patch_size}
    return FlavaForPreTraining(
        FlavaConfig(
            image_config=body | shape,
            text_config=body | {"vocab_size": vocab_size},
            multimodal_config=half,
            hidden_size=sizes.width,
            init_codebook=False,
        )
    )


def _flava_batch(loader: Drawn, micro: MicroBatch) -> Batch:
    longest = loader.config.text.max_tokens
    shown, ids, is_text, labels = padded_table(loader, micro, longest)
    mask = _image_mask(loader, micro)
    side = int(loader.n_image**0.5)
    # What the codebook would say: computed before, so theirs without its cost.
    codes = micro.uids[:, None] * 131 + torch.arange(loader.n_image) * 17
    return {
        "input_ids": ids,
        "input_ids_masked": shown,
        "attention_mask": is_text.long(),
        "pixel_values": _pixels(micro) * 2 - 1,
        "mlm_labels": labels,
        "mim_labels": (codes % _CODEBOOK).unflatten(1, (side, side)),
        "bool_masked_pos": mask.unflatten(1, (side, side)),
        "itm_labels": torch.ones(len(ids), dtype=torch.int64),
    }


def _flava_loss(model: nn.Module, batch: Batch) -> Tensor:
    # It writes into its labels.
    own = {k: v.clone() if k == "mim_labels" else v for k, v in batch.items()}
    loss: Tensor = model(**own, return_loss=True).loss
    return loss


def _image_mask(loader: Drawn, micro: MicroBatch) -> Tensor:
    words = (micro.uids, micro.stream, micro.epochs, micro.text_capacity)
    return loader.masks(*words, step=micro.step).image


def _pixels(micro: MicroBatch) -> Tensor:
    return (micro.pixels.permute(0, 3, 1, 2).float() / 255).contiguous()


PEERS = (
    Peer(
        name="MLIM on transformers' BERT",
        build=PaddedMlim,
        batch=_mlim_batch,
        loss=lambda model, batch: model(**batch),
        same_body=True,
    ),
    Peer(
        name="ViLT (MLM alone)",
        build=_vilt,
        batch=_vilt_batch,
        loss=lambda model, batch: model(**batch).loss,
    ),
    Peer(
        name="FLAVA",
        build=_flava,
        batch=_flava_batch,
        loss=_flava_loss,
    ),
)
