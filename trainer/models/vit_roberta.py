"""ViT, RoBERTa and BERT checkpoints of Hugging Face `transformers` in MaskVLM's
encoders.

Owns which of our parameters is which of theirs, and whether a checkpoint fits. Does not
own the encoders (`trainer.models.maskvlm_encoder`) or when a body is read
(`trainer.build`). Whether a tokenizer is a checkpoint's is asked as for MLIM
(`trainer.models.bert`).

RoBERTa and BERT add the embedding of token type 0 to every word of a single text: it
goes to the text positions. RoBERTa's positions begin behind that of padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.base import Sizes
from trainer.models.bert import require_words

if TYPE_CHECKING:
    from trainer.models.maskvlm_config import MaskVlmConfig

_SHAPE = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
}
_PARTS = ("query", "key", "value")
_VIT_NAMES = {
    "patches": "embeddings.patch_embeddings.projection",
    "image_norm": "layernorm",
}
_VIT_BLOCK = {
    "attention_norm": "layernorm_before",
    "attention.out": "attention.o_proj",
    "ffn_norm": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_TEXT_BLOCK = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_HEADS = {
    "roberta": {"mlm_dense": "lm_head.dense", "mlm_norm": "lm_head.layer_norm"},
    "bert": {
        "mlm_dense": "cls.predictions.transform.dense",
        "mlm_norm": "cls.predictions.transform.LayerNorm",
    },
}
_BIAS = {"roberta": "lm_head.bias", "bert": "cls.predictions.bias"}


def require_image_fit(body: str, config: MaskVlmConfig) -> None:
    """Raise ValueError, with the keys to change, unless the ViT checkpoint `body` (a
    directory or a hub name) has the shape of the recipe. Reads no weights.
    """
    key = "image_body"
    found = _read_config(key, body, ("vit",), "google/vit-base-patch16-224-in21k")
    if not found.qkv_bias or found.num_channels != 3:
        raise ValueError(
            f"model.{key} {body} has no biases of queries, keys and values, or images "
            "of other than 3 channels: take a ViT with both"
        )
    theirs = {
        "image_layers": "num_hidden_layers",
        "patch_size": "patch_size",
        "image_norm_eps": "layer_norm_eps",
    }
    _require_shape(key, body, found, config, theirs)


def require_text_fit(
    body: str, config: MaskVlmConfig, sizes: Sizes, tokenizer_file: Path
) -> None:
    """Raise ValueError, with the keys to change, unless the RoBERTa or BERT checkpoint
    `body` has the shape of the recipe and the words of the tokenizer. Reads no weights.
    """
    key = "text_body"
    found = _read_config(key, body, tuple(_HEADS), "roberta-base")
    if getattr(found, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"model.{key} {body} has {found.position_embedding_type} positions: give a "
            "checkpoint with absolute ones"
        )
    theirs = {"text_layers": "num_hidden_layers", "text_norm_eps": "layer_norm_eps"}
    longest = found.max_position_embeddings - _first_position(found)
    cures = []
    if sizes.max_text > longest:
        cures.append(f"--text.max_tokens {longest} or less (now {sizes.max_text})")
    _require_shape(key, body, found, config, theirs, cures)
    require_words(
        body,
        found.vocab_size,
        sizes.vocab_size,
        tokenizer_file,
        key=key,
    )


def read_image_body(body: str, *, grid: int) -> dict[str, Tensor]:
    """fp32 weights of the image encoder, by name, that the ViT checkpoint `body` has,
    its positions interpolated to `grid` x `grid` squares (Dosovitskiy et al. 2021,
    section 3.2).

    Raises:
        ValueError: it lacks a weight of the encoder.
    """
    from transformers import ViTModel

    theirs, _ = _loaded("image_body", body, ViTModel, ("pooler.",))
    layers = _layers(theirs, "layers.")
    ours = {
        "image_cls": theirs["embeddings.cls_token"].flatten(),
        "image_positions.weight": interpolated(
            theirs["embeddings.position_embeddings"][0], grid
        ),
    }
    pairs = dict(_VIT_NAMES)
    for layer in range(layers):
        for own, name in _VIT_BLOCK.items():
            pairs[f"image_blocks.{layer}.{own}"] = f"layers.{layer}.{name}"
    ours |= _both(pairs, theirs)
    for layer in range(layers):
        names = [f"layers.{layer}.attention.{part}_proj" for part in ("q", "k", "v")]
        ours |= _fused(f"image_blocks.{layer}.attention.qkv", names, theirs)
    return _copied(ours)


def read_text_body(body: str, *, max_text: int) -> dict[str, Tensor]:
    """fp32 weights of the text encoder, by name, that the RoBERTa or BERT checkpoint
    `body` has, and those of the MLM head where it has them.

    Raises:
        ValueError: it lacks a weight of the encoder.
    """
    from transformers import AutoConfig, BertForMaskedLM, RobertaForMaskedLM

    config = AutoConfig.from_pretrained(body)
    kind = config.model_type
    load = {"roberta": RobertaForMaskedLM, "bert": BertForMaskedLM}[kind]
    heads = ("lm_head.", "cls.")
    theirs, lacks = _loaded("text_body", body, load, heads)
    first, start = _first_position(config), f"{kind}.embeddings."
    positions = theirs[f"{start}position_embeddings.weight"][first:][:max_text]
    types = theirs[f"{start}token_type_embeddings.weight"]
    ours = {
        "words.weight": theirs[f"{start}word_embeddings.weight"],
        "text_positions.weight": positions + types[0],
    }
    pairs = {"embedding_norm": f"{start}LayerNorm"}
    for layer in range(config.num_hidden_layers):
        block = f"{kind}.encoder.layer.{layer}"
        for own, name in _TEXT_BLOCK.items():
            pairs[f"text_blocks.{layer}.{own}"] = f"{block}.{name}"
        names = [f"{block}.attention.self.{part}" for part in _PARTS]
        ours |= _fused(f"text_blocks.{layer}.attention.qkv", names, theirs)
    if not lacks:
        pairs |= _HEADS[kind]
        ours["mlm_bias"] = theirs[_BIAS[kind]]
    return _copied(ours | _both(pairs, theirs))


def interpolated(positions: Tensor, grid: int) -> Tensor:
    """Positions (1 + G x G, D) of [CLS] and of squares, as (1 + grid x grid, D)."""
    squares = positions[1:].T.unflatten(1, (int((len(positions) - 1) ** 0.5), -1))
    if squares.shape[-1] == grid:
        return positions
    scaled = F.interpolate(
        squares[None], size=(grid, grid), mode="bicubic", align_corners=False
    )
    return torch.cat([positions[:1], scaled[0].flatten(1).T])


def _read_config(key: str, body: str, kinds: tuple[str, ...], example: str) -> Any:
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(body)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.{key} {body} cannot be read ({reason}): give a directory with "
            f"config.json and weights, or a hub name such as {example} (with a network,"
            " or HF_HOME where it was downloaded before)"
        ) from error
    if found.model_type not in kinds:
        raise ValueError(
            f"model.{key} {body} is a {found.model_type}: give a checkpoint of "
            f"{' or '.join(kinds)}"
        )
    if found.hidden_act != "gelu":
        raise ValueError(
            f"model.{key} {body} has activation {found.hidden_act} and MaskVLM has "
            "gelu: give a checkpoint with gelu"
        )
    return found


def _require_shape(
    key: str,
    body: str,
    found: Any,
    config: MaskVlmConfig,
    theirs: Mapping[str, str],
    cures: Iterable[str] = (),
) -> None:
    """Raise ValueError with the keys that differ."""
    named = [
        f"--model.{own} {getattr(found, name)} (now {getattr(config, own)})"
        for own, name in {**_SHAPE, **theirs}.items()
        if getattr(found, name) != getattr(config, own)
    ]
    named += cures
    if named:
        raise ValueError(
            f"model.{key} {body} does not fit this recipe: give {', '.join(named)}, or "
            "take another body"
        )


def _first_position(config: Any) -> int:
    """Number of the position of [CLS]."""
    return int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0


def _loaded(
    key: str, body: str, kind: Any, heads: tuple[str, ...]
) -> tuple[dict[str, Tensor], set[str]]:
    """A checkpoint's weights by name, and which of those of `heads` it lacks."""
    # What a checkpoint lacks is drawn, with numbers that the run must not miss.
    with torch.random.fork_rng():
        loaded: Any = kind.from_pretrained(
            body, output_loading_info=True, dtype=torch.float32
        )
    model, report = loaded
    lacks = set(report["missing_keys"])
    encoder = sorted(name for name in lacks if not name.startswith(heads))
    if encoder:
        raise ValueError(
            f"model.{key} {body} lacks {', '.join(encoder[:5])}: take a whole "
            "checkpoint"
        )
    return model.state_dict(), lacks


def _both(names: Mapping[str, str], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of each module."""
    return {
        f"{own}.{kind}": theirs[f"{name}.{kind}"]
        for own, name in names.items()
        for kind in ("weight", "bias")
    }


def _fused(
    own: str, names: Iterable[str], theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weight and bias of three modules that we keep as one."""
    return {
        f"{own}.{kind}": torch.cat([theirs[f"{name}.{kind}"] for name in names])
        for kind in ("weight", "bias")
    }


def _layers(theirs: Mapping[str, Tensor], start: str) -> int:
    return len({name.split(".")[1] for name in theirs if name.startswith(start)})


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}
