"""The benchmark beside ViLT runs, and asks both of the same; how fast is no test's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import vilt
from trainer.options import PretrainConfig, parse_run
from trainer.pretrain import RECIPES

TINY = (
    "--config=mlim-tiny",
    "--image.size=32",
    *("--model.layers=2", "--model.width=32", "--model.heads=2"),
    "--model.ffn_width=64",
)


@pytest.mark.parametrize("real", [False, True])
def test_a_smoke_run_measures_every_contender(
    real: bool, shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vilt.json"
    words = [*TINY, "--batch=4", "--batches=2", "--turns=2", "--warm=1", "--threads=1"]
    threads = torch.get_num_threads()
    try:
        data = [f"--data={shards}"] if real else []
        vilt.main([*words, *data, f"--output={output}"])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(output.read_text())
    assert found["vocabulary"] == (600 if real else 30_522)
    assert list(found["contenders"]) == [vilt.VILT, vilt.OFF, vilt.ON]
    for row in found["contenders"].values():
        assert len(row["steps_s"]) == 2
        assert row["step_s"] > 0
    assert found["contenders"][vilt.VILT]["times_vilt"] == 1
    off, on = (found["contenders"][name] for name in (vilt.OFF, vilt.ON))
    assert off["times_vilt_by_flops"] > max(on["times_vilt_by_flops"], 1)


def test_both_are_asked_for_the_same_words() -> None:
    words = [*TINY, "--data=-", "--output=-", "--text.max_tokens=40"]
    config = parse_run(
        PretrainConfig, words, prog="test", description="", recipes=RECIPES
    )
    (batch,), known = vilt.drawn_batches(config, 1, 8)
    masks = vilt.drawn_masks(config, batch)
    given = vilt.vilt_inputs(batch, masks, known)
    asked = given["labels"] != -100
    assert int(asked.sum()) == int(masks.text.sum()) > 0
    mask = known.special_ids["mask"]
    assert torch.equal(given["input_ids"] == mask, asked)
    whole = torch.where(asked, given["labels"], given["input_ids"])
    for row, text in enumerate(batch.texts):
        assert whole[row, : len(text)].tolist() == text.tolist()
        assert int(given["attention_mask"][row].sum()) == len(text)
    # Neither [CLS] nor [SEP] is asked for.
    assert not (given["labels"] == known.special_ids["cls"]).any()
    assert not (given["labels"] == known.special_ids["sep"]).any()
