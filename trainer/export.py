"""`python -m trainer.export RUN OUT`: a trained model as others load it.

Owns the command and what lies in its directory. The classes that load it are in
`trainer.models.hf`, BERT's names in `trainer.models.bert`, the tokenizer in
`trainer.exported_tokenizer`, the card in `trainer.model_card`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import parse, run
from trainer.contract import PREPROCESSOR

if TYPE_CHECKING:
    from trainer.options import ImageConfig
    from trainer.trained import Trained

PROG = "trainer.export"
DESCRIPTION = """\
Write a run's newest checkpoint as a directory in the form of Hugging Face transformers:
model.safetensors, config.json, tokenizer, preprocessor_config.json, and a card with the
data, the recipe and the results.

  python -m trainer.export runs/first models/first --body

  import trainer.models.hf                      # registers the classes; no remote code
  model = transformers.AutoModel.from_pretrained("models/first")

--body adds models/first/body, the text side alone, which transformers.BertModel loads
(post-norm models only; the pooler is not trained). A new run starts from the export
with --init models/first.
"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and where to."""

    run: str
    """Run directory that trainer.pretrain wrote, or its URL (the first word of the
    command)."""
    output: str
    """Directory to write, new or empty (the second word)."""
    data: str | None = None
    """Dataset directory; by default the one that the run was trained on."""
    body: bool = False
    """Also write OUT/body: the text side as a BERT checkpoint."""


def main(argv: Sequence[str]) -> None:
    """Export a run."""
    config = parse(ExportConfig, _with_keys(argv), prog=PROG, description=DESCRIPTION)
    export(config)
    print(config.output)


def export(config: ExportConfig) -> None:
    """Write the directory, whole or not at all.

    Raises:
        ValueError: no such run or checkpoint, an output that holds something, a body
            of a model that is no BERT.
    """
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"{output} is not empty: give a new directory, or delete it first"
        )
    from trainer.local_run import local_run

    with local_run(config.run, weights=True) as run:
        _export(run, output, config)


def _export(run: Path, output: Path, config: ExportConfig) -> None:
    from trainer.models.bert import require_bert
    from trainer.trained import load_trained

    trained = load_trained(run, data=config.data)
    if config.body:
        require_bert(trained.model.config)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        folder.mkdir()
        _write(folder, run, trained, config)
        # Over an empty directory too.
        os.replace(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def preprocessor_config(image: ImageConfig) -> dict[str, Any]:
    """How an image becomes `pixel_values`, for `transformers.AutoImageProcessor`. A
    random crop of training is a centre crop here. Its bicubic filter is Pillow's, and
    the trainer lets the JPEG decoder scale first: images of another size than the
    model's differ by a few levels (README).
    """
    square = {"height": image.size, "width": image.size}
    whole = image.geometry == "resize"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if whole else {"shortest_edge": image.size},
        "resample": 3,
        "do_center_crop": not whole,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write(folder: Path, run: Path, trained: Trained, config: ExportConfig) -> None:
    from trainer.dataset import Dataset
    from trainer.exported_tokenizer import write_tokenizer
    from trainer.model_card import model_card
    from trainer.models.bert import write_body
    from trainer.models.hf import from_trained

    recipe, model = trained.config, trained.model
    dataset = Dataset(recipe.data, recipe.split, growing=True, storage=recipe.storage)
    from_trained(model).save_pretrained(folder)
    folders = [folder]
    text = json.dumps(preprocessor_config(recipe.image), indent=2) + "\n"
    (folder / PREPROCESSOR).write_text(text, encoding="utf-8")
    special_ids = dataset.tokenizer.special_ids
    if config.body:
        write_body(
            folder / "body", model.state_dict(), model.config, special_ids=special_ids
        )
        folders.append(folder / "body")
    for one in folders:
        write_tokenizer(
            dataset.tokenizer_file,
            one,
            special_ids,
            max_text=recipe.text.max_tokens,
        )
    card = model_card(run, trained, dataset, body=config.body)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _with_keys(argv: Sequence[str]) -> list[str]:
    """`RUN OUT --body` as `--run=RUN --output=OUT --body`."""
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    keys = [
        f"--{key}={word}" for key, word in zip(("run", "output"), words, strict=False)
    ]
    return [*keys, *argv[len(keys) :]]


if __name__ == "__main__":
    run(main, PROG)
