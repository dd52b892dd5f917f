from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError
from tests.trainer.tiny import config


@pytest.mark.parametrize(
    "flag",
    [
        "--checkpoint.every_steps=0",
        "--checkpoint.keep=0",
        "--global_batch=0",
        "--lanes=0",
        "--micro_batch=0",
        "--threads=0",
        "--shuffle_shards=0",
        "--max_steps=0",
        "--seed=-1",
        "--schedule.steps=0",
        "--schedule.warmup=-5",
        "--image.size=0",
        "--image.min_scale=-3",
        "--text.max_tokens=2",
        "--optimizer.lr=-1",
        "--optimizer.clip=0",
        "--optimizer.betas=[0.9,1.5]",
        "--model.layers=0",
        "--model.heads=0",
        "--model.width=0",
        "--model.recon_weight=-1",
        "--mask.heavy_rate=1.5",
    ],
)
def test_an_impossible_value_is_refused_by_its_key(flag: str) -> None:
    key = flag[2:].split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1]
    with pytest.raises(ConfigError) as caught:
        config(Path("data"), Path("out"), flag)
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)


def test_no_gradient_limit_can_be_asked_for() -> None:
    assert config(Path("d"), Path("o"), "--optimizer.clip=.inf").optimizer.clip > 1e30
