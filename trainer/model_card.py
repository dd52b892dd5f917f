"""The README.md of an exported model: its data, recipe and results.

Owns the text. Numbers come from the run's files; what a run has not measured is not in
it. Paths of the machine are left out.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.config import to_yaml
from trainer.contract import read_metrics, read_validation
from trainer.dataset import Dataset
from trainer.options import PretrainConfig
from trainer.probes import probes_in
from trainer.trained import Trained

_ABOUT = {
    "mlim": """\
MLIM (Arici et al., 2021, arXiv:2109.12178), {parameters:,} parameters, after {step:,}
of {steps:,} steps. One stream of word and image tokens ({tokens} image tokens of
{side} px, images of {size} px), trained with masked language and image modelling.

```python
import trainer.models.hf  # of Palimpsest: registers the classes; no remote code
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(FOLDER)  # or AutoModelForPreTraining
words = AutoTokenizer.from_pretrained(FOLDER)(
    ["a photo"], padding=True, truncation=True, return_tensors="pt"
)
image = AutoImageProcessor.from_pretrained(FOLDER)(picture, return_tensors="pt")
hidden = model(words.input_ids, words.attention_mask, image.pixel_values)
```

`pixel_values` are `pixel / 127.5 - 1`. `[MASK]` in the text hides a word,
`bool_masked_pos` image tokens. Texts have at most {max_text} tokens,
the [CLS] and [SEP] that the tokenizer adds included.
""",
    "maskvlm": """\
MaskVLM (Kwon et al., 2023, arXiv:2208.02131), {parameters:,} parameters, after {step:,}
of {steps:,} steps. An image encoder ({tokens} squares of {side} px, images of {size}
px) and a text encoder, joined by cross-attention; losses: {losses}.

```python
import trainer.models.hf  # of Palimpsest: registers the classes; no remote code
from transformers import AutoImageProcessor, AutoModelForPreTraining, AutoTokenizer

model = AutoModelForPreTraining.from_pretrained(FOLDER)  # AutoModel: states alone
words = AutoTokenizer.from_pretrained(FOLDER)(
    ["a photo"], padding=True, truncation=True, return_tensors="pt"
)
image = AutoImageProcessor.from_pretrained(FOLDER)(picture, return_tensors="pt")
found = model(words.input_ids, words.attention_mask, image.pixel_values)
```

`found` has `image_embeds`, `text_embeds`, `logits_per_image` and `itm_logits`, as far
as there are heads. `pixel_values` are `pixel / 127.5 - 1`. `text_masked_pos` hides
words and `bool_masked_pos` squares. Texts have at most {max_text} tokens,
the [CLS] and [SEP] that the tokenizer adds included.
""",
}
_TEXT = """\
---
library_name: transformers
tags: [{model}, vision-language, masked-language-modeling, masked-image-modeling]
---

# {name}

{about}{body}
## Data

| | |
|---|---|
| dataset | {data} |
| pairs | {pairs:,} in split `{split}` |
| sources | {sources} |
| manifest sha256 | `{manifest}` |
| tokenizer sha256 | `{tokenizer}` |

## Results
{results}
## Recipe

```yaml
{recipe}```
"""
_BODY = """
`body/` is the text side alone, for `transformers.BertModel` or `BertForMaskedLM`; it
has no trained pooler.
"""


def model_card(run: Path, trained: Trained, dataset: Dataset, *, body: bool) -> str:
    """Markdown of the card of `run`, whose newest checkpoint is `trained`."""
    config, model = trained.config, trained.model
    shown = _without_paths(config)
    about = _ABOUT[config.model.name].format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        step=trained.step,
        steps=config.schedule.steps,
        tokens=model.grid**2,
        side=model.config.patch_size,
        size=config.image.size,
        max_text=config.text.max_tokens,
        losses=", ".join(term.name for term in config.model.terms if term.weight),
    )
    return _TEXT.format(
        name=run.resolve().name,
        model=config.model.name,
        about=about,
        body=_BODY if body else "",
        data=", ".join(_names(config.data)),
        pairs=len(dataset),
        split=config.split,
        sources=", ".join(sorted(dataset.manifest.sources)),
        manifest=dataset.manifest_hash,
        tokenizer=dataset.tokenizer.sha256,
        results=_results(run, trained.step),
        recipe=to_yaml(shown),
    )


def _results(run: Path, step: int) -> str:
    """Tables of what was measured up to `step`."""
    trained = [row for row in read_metrics(run) if row["step"] == step]
    measured = [row for row in read_validation(run) if row["step"] <= step]
    parts = []
    if trained:
        kinds = ("loss", "accuracy", "psnr")
        names = tuple(name for name in trained[-1] if name.endswith(kinds))
        parts.append(_table(f"Training, step {step}", trained[-1], names))
    if measured:
        row = measured[-1]
        names = tuple(sorted(name for name in row if name != "step"))
        parts.append(_table(f"Held-out pairs, step {row['step']}", row, names))
    probes = run / "probes.json"
    if probes.is_file():
        parts.append(_probes(json.loads(probes.read_text())))
    return "\n".join(parts) or "\nNothing was measured.\n"


def _table(title: str, row: dict[str, Any], names: tuple[str, ...]) -> str:
    lines = ["", f"| {title} | |", "|---|---|"]
    lines += [
        f"| {name} | {row[name]:.4f} |"
        for name in names
        if isinstance(row.get(name), float)
    ]
    return "\n".join(lines) + "\n"


def _probes(result: dict[str, Any]) -> str:
    lines = [
        "",
        f"Probes on {result['pairs']} pairs of split `{result['split']}`, step "
        f"{result['step']}, with 95 % intervals over {result['groups']} groups:",
        "",
        "| loss | condition | mean | 95 % |",
        "|---|---|---|---|",
    ]
    for probe, of in probes_in(result).items():
        for name, entry in of["conditions"].items():
            low, high = entry["ci95"]
            lines.append(
                f"| {probe} | {name} | {entry['mean']:.4f} | {low:.4f} to {high:.4f} |"
            )
    return "\n".join(lines) + "\n"


def _names(data: list[str] | str) -> list[str]:
    given = [data] if isinstance(data, str) else data
    return [one.rstrip("/").rsplit("/", 1)[-1] for one in given]


def _body_name(body: str | None) -> str | None:
    """A hub name as it is; of a directory the last part."""
    is_path = body and (Path(body).is_absolute() or Path(body).is_dir())
    return _names(body)[0] if body and is_path else body


def _without_paths(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the last part of each path."""
    data = _names(config.data)
    bodies = {key: _body_name(body) for key, body in config.model.bodies.items()}
    return dataclasses.replace(
        config,
        data=data if isinstance(config.data, list) else data[0],
        output=_names(config.output)[0],
        init=_names(config.init)[0] if config.init else None,
        model=config.model.with_bodies(bodies),
        tokenizer=_names(config.tokenizer)[0] if config.tokenizer else None,
        storage=type(config.storage)(),
    )
