"""BERT checkpoints of Hugging Face `transformers`, to and from the MLIM encoder.

Owns which of our parameters is which of BERT's, and whether a checkpoint fits. Does not
own the model (`trainer.models.mlim`) or when a body is read (`trainer.loop`).

BERT adds the embedding of token type 0 to every word of a single text. MLIM has no
token types: that vector is added to the text positions, so hidden states are BERT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.models.base import ModelConfig
from trainer.models.mlim_config import MlimConfig

_EMBEDDINGS = "bert.embeddings."
_HEAD = "cls.predictions."
_OUTSIDE_BLOCKS = {
    "words": f"{_EMBEDDINGS}word_embeddings",
    "embedding_norm": f"{_EMBEDDINGS}LayerNorm",
    "mlm_dense": f"{_HEAD}transform.dense",
    "mlm_norm": f"{_HEAD}transform.LayerNorm",
}
_IN_BLOCK = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_QKV = [f"attention.self.{name}" for name in ("query", "key", "value")]
_POSITIONS = f"{_EMBEDDINGS}position_embeddings.weight"
_TYPES = f"{_EMBEDDINGS}token_type_embeddings.weight"


def require_body_fit(
    body: str,
    config: MlimConfig,
    *,
    vocab_size: int,
    max_text: int,
    tokenizer_file: Path,
) -> None:
    """Raise ValueError, with the keys to change, unless the BERT checkpoint `body` (a
    directory or a hub name) has the shape of the recipe and the words of the tokenizer.
    Reads no weights.
    """
    found = _read_config(body)
    keys = {
        "layers": ("num_hidden_layers", config.layers),
        "width": ("hidden_size", config.width),
        "heads": ("num_attention_heads", config.heads),
        "ffn_width": ("intermediate_size", config.ffn_width),
        "norm_eps": ("layer_norm_eps", config.norm_eps),
    }
    cures = [
        f"--model.{key} {getattr(found, name)} (now {own})"
        for key, (name, own) in keys.items()
        if getattr(found, name) != own
    ]
    if max_text > found.max_position_embeddings:
        cures.append(
            f"--text.max_tokens {found.max_position_embeddings} or less (now "
            f"{max_text})"
        )
    if cures:
        raise ValueError(
            f"model.body {body} does not fit this recipe: give {', '.join(cures)}, or "
            "take another body"
        )
    require_words(body, found.vocab_size, vocab_size, tokenizer_file, key="body")


def require_bert(config: ModelConfig) -> None:
    """Raise ValueError unless a model of this recipe is a BERT on text."""
    if not isinstance(config, MlimConfig):
        raise ValueError(
            f"a {config.name} is no BERT and cannot be exported as one: export without "
            "--body"
        )
    if config.norm == "pre":
        raise ValueError(
            "a model with model.norm pre is no BERT and cannot be exported as one: "
            "export without --body, or train with --model.norm post"
        )


def require_words(
    body: str, size: int, vocab_size: int, tokenizer_file: Path, *, key: str
) -> None:
    """Raise ValueError unless the ids of a dataset mean the same words to the
    checkpoint `body`, given by the model's `key`, which has `size` words. A directory
    without a tokenizer is taken at that.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    cure = (
        f"preprocess the data with its tokenizer, --tokenizer {body}, or take another "
        "body"
    )
    if size != vocab_size:
        raise ValueError(
            f"model.{key} {body} has {size:,} words and the dataset's tokenizer "
            f"{vocab_size:,}: {cure}"
        )
    folder = Path(body)
    files = ("tokenizer.json", "vocab.txt", "vocab.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return
    words = AutoTokenizer.from_pretrained(body).get_vocab()
    own = Tokenizer.from_file(str(tokenizer_file)).get_vocab()
    changed = next((word for word in own if words.get(word) != own[word]), None)
    if changed is not None:
        raise ValueError(
            f"model.{key} {body} numbers words differently from the dataset's "
            f"tokenizer ({changed!r} is {words.get(changed)} and {own[changed]}): "
            f"{cure}"
        )


def read_body(body: str, *, max_text: int) -> dict[str, Tensor]:
    """fp32 weights of the MLIM model, by name, that the BERT checkpoint `body` has:
    embeddings, layers and, where present, the MLM head.

    Raises:
        ValueError: it lacks a weight of the encoder.
    """
    from transformers import BertForMaskedLM

    # What a checkpoint lacks is drawn, with numbers that the run must not miss.
    with torch.random.fork_rng():
        loaded: Any = BertForMaskedLM.from_pretrained(
            body, output_loading_info=True, dtype=torch.float32
        )
    model, report = loaded
    lacks = set(report["missing_keys"])
    encoder = sorted(name for name in lacks if not name.startswith("cls."))
    if encoder:
        raise ValueError(
            f"model.body {body} lacks {', '.join(encoder[:5])}: take a whole BERT "
            "checkpoint"
        )
    weights = from_bert(model.state_dict(), max_text=max_text)
    if any(name.startswith(_HEAD) for name in lacks):
        weights = {k: v for k, v in weights.items() if not k.startswith("mlm_")}
    return weights


def from_bert(theirs: Mapping[str, Tensor], *, max_text: int) -> dict[str, Tensor]:
    """Our weights by name from a state dict of `BertForMaskedLM`."""
    ours = {"mlm_bias": theirs[f"{_HEAD}bias"]}
    positions = theirs[_POSITIONS][:max_text]
    ours["text_positions.weight"] = positions + theirs[_TYPES][0]
    for own, name in _pairs(_layers(theirs)).items():
        ours[own] = theirs[name]
    for own, names in _fused(_layers(theirs)).items():
        ours[own] = torch.cat([theirs[name] for name in names])
    return {name: value.detach().clone() for name, value in ours.items()}


def to_bert(ours: Mapping[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """A state dict of `BertForMaskedLM` from our weights by name; token types are 0."""
    theirs = {
        _POSITIONS: ours["text_positions.weight"],
        _TYPES: torch.zeros(2, ours["words.weight"].shape[1]),
        f"{_HEAD}bias": ours["mlm_bias"],
        f"{_HEAD}decoder.bias": ours["mlm_bias"],
        f"{_HEAD}decoder.weight": ours["words.weight"],
    }
    for own, name in _pairs(layers).items():
        theirs[name] = ours[own]
    for own, names in _fused(layers).items():
        theirs |= zip(names, ours[own].chunk(3), strict=True)
    return theirs


def write_body(
    folder: Path,
    ours: Mapping[str, Tensor],
    config: MlimConfig,
    *,
    special_ids: Mapping[str, int],
) -> None:
    """Save the text side of a model as a `transformers` BERT checkpoint, which
    `BertModel` and `BertForMaskedLM` load. Its texts are as long as the run's.

    Raises:
        ValueError: a pre-norm model, which BERT is not.
    """
    require_bert(config)
    from transformers import BertConfig, BertForMaskedLM

    shape = BertConfig(
        vocab_size=len(ours["words.weight"]),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn_width,
        max_position_embeddings=len(ours["text_positions.weight"]),
        layer_norm_eps=config.norm_eps,
        pad_token_id=special_ids.get("pad"),
        # As it was trained.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(shape)
    model.load_state_dict(to_bert(ours, layers=config.layers))
    model.save_pretrained(folder)


def _pairs(layers: int) -> dict[str, str]:
    """BERT's name of each weight and bias that has one counterpart."""
    modules = dict(_OUTSIDE_BLOCKS)
    for layer in range(layers):
        for own, name in _IN_BLOCK.items():
            modules[f"blocks.{layer}.{own}"] = f"bert.encoder.layer.{layer}.{name}"
    names = {
        f"{own}.{kind}": f"{name}.{kind}"
        for own, name in modules.items()
        for kind in ("weight", "bias")
    }
    del names["words.bias"]
    return names


def _fused(layers: int) -> dict[str, list[str]]:
    """BERT's three names of each weight and bias that we keep as one."""
    return {
        f"blocks.{layer}.attention.qkv.{kind}": [
            f"bert.encoder.layer.{layer}.{part}.{kind}" for part in _QKV
        ]
        for layer in range(layers)
        for kind in ("weight", "bias")
    }


def _layers(theirs: Mapping[str, Tensor]) -> int:
    return sum(name.endswith("attention.self.query.weight") for name in theirs)


def _read_config(body: str) -> Any:
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(body)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.body {body} cannot be read ({reason}): give a directory with "
            "config.json and weights, or a hub name such as bert-base-uncased (with a "
            "network, or HF_HOME where it was downloaded before)"
        ) from error
    position = getattr(found, "position_embedding_type", "absolute")
    if found.model_type != "bert" or position != "absolute":
        raise ValueError(
            f"model.body {body} is a {found.model_type} with {position} positions: give"
            " a BERT checkpoint with absolute ones"
        )
    if found.hidden_act != "gelu":
        raise ValueError(
            f"model.body {body} has activation {found.hidden_act} and MLIM has gelu: "
            "give a checkpoint with gelu"
        )
    return found
