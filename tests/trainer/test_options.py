from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, to_yaml
from tests.trainer.tiny import config
from trainer.check import check
from trainer.mask_config import MaskConfig
from trainer.options import PretrainConfig, blocking_changes, load_config, parse_run
from trainer.pretrain import RECIPES


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
        "--compile=everything",
        "--mask.heavy_rate=1.5",
        "--schedule.decay_share=0",
        "--schedule.shape=steps",
        "--checkpoint.every_minutes=-1",
    ],
)
def test_an_impossible_value_is_refused_by_its_key(flag: str) -> None:
    key = flag[2:].split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1]
    with pytest.raises(ConfigError) as caught:
        config(Path("data"), Path("out"), flag)
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)


def test_a_folder_that_a_launcher_has_put_its_logs_into_becomes_a_run(
    shards: Path, tmp_path: Path
) -> None:
    for name in (
        "logs/rank0/stdout.log",
        ".snapshot/x.bin",
        "lost+found/y",
        "train.sh",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    check(config(shards, tmp_path))
    (tmp_path / "empty" / "photo.jpg").touch()
    with pytest.raises(ValueError, match="is no run and holds empty: take another"):
        check(config(shards, tmp_path))


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf"])
def test_a_rate_that_is_no_finite_number_is_refused(value: str) -> None:
    words = ["--data=x", "--output=y", f"--optimizer.lr={value}"]
    with pytest.raises(ConfigError, match="number"):
        parse_run(PretrainConfig, words, prog="p", description="d")


@pytest.mark.parametrize(
    "words",
    [
        ["--config=maskvlm-emoji", "--config=mlim-tiny"],
        ["--config=mlim-tiny", "--config=maskvlm-emoji"],
        ["--config=maskvlm-emoji", "--model.name=mlim"],
        ["--config=mlim-tiny", "--model.name=maskvlm"],
    ],
)
def test_a_recipe_of_another_model_is_told_from_a_misspelt_key(
    words: list[str],
) -> None:
    argv = [*words, "--data=x", "--output=y"]
    with pytest.raises(
        ConfigError, match=r"by model\.name: a recipe or a flag of anoth"
    ):
        parse_run(PretrainConfig, argv, prog="p", description="d", recipes=RECIPES)


def test_offload_without_zero_is_refused_with_the_cure() -> None:
    words = ("--deepspeed.offload=cpu", "--deepspeed.zero_stage=0")
    with pytest.raises(ConfigError, match="zero_stage 1 or more"):
        config(Path("d"), Path("o"), *words)


def test_what_may_change_on_resume() -> None:
    allowed = (
        "--max_steps=5",
        "--init=q",
        "--micro_batch=12",
        "--threads=3",
        "--deepspeed.zero_stage=3",
        "--deepspeed.offload=cpu",
        "--deepspeed.activation_checkpointing=true",
        "--checkpoint.every_minutes=1",
        "--checkpoint.keep_best=false",
        "--log.tensorboard=true",
    )
    old = asdict(config(Path("d"), Path("o")))
    assert blocking_changes(old, asdict(config(Path("e"), Path("p"), *allowed))) == []


@pytest.mark.parametrize(
    ("flag", "shown"),
    [
        ("--optimizer.lr=0.5", "optimizer.lr: 0.002 -> 0.5"),
        ("--schedule.shape=wsd", "schedule.shape: 'cosine' -> 'wsd'"),
        ("--deepspeed.precision=bf16", "deepspeed.precision: 'auto' -> 'bf16'"),
        ("--global_batch=48", "global_batch: 24 -> 48"),
        ("--seed=1", "seed: 0 -> 1"),
        ("--mask.light_text_rate=0.3", "mask.light_text_rate: 0.15 -> 0.3"),
        ("--model.norm=post", "model.norm: 'pre' -> 'post'"),
    ],
)
def test_other_keys_may_not_and_the_difference_is_shown(flag: str, shown: str) -> None:
    old = asdict(config(Path("d"), Path("o")))
    new = asdict(config(Path("d"), Path("o"), flag))
    assert blocking_changes(old, new) == [shown]


def test_keys_that_a_run_did_not_have_yet_are_at_their_defaults(tmp_path) -> None:
    new = config(Path("d"), tmp_path)
    stored = yaml.safe_load(to_yaml(new))
    for key in [key for key in stored["model"] if key.startswith("itm_")]:
        del stored["model"][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    assert load_config(tmp_path) == new


def test_layers_are_not_compiled_where_stage_3_gathers_them(tmp_path) -> None:
    words = ("--compile=layers", "--deepspeed.zero_stage=3")
    with pytest.raises(ConfigError, match=r"zero_stage 2 or less"):
        config(tmp_path, tmp_path, *words)
    old = asdict(config(tmp_path, tmp_path))
    assert blocking_changes(old, asdict(config(tmp_path, tmp_path, words[0]))) == []


def test_no_gradient_limit_can_be_asked_for() -> None:
    assert config(Path("d"), Path("o"), "--optimizer.clip=.inf").optimizer.clip > 1e30


OF_MASKVLM = MaskConfig(
    mode_probabilities=(0, 0, 1),
    light_image_rate=0.6,
    light_text_rate=0.3,
    image_block=2,
)


def test_masks_are_those_of_the_model_s_paper_unless_a_flag_or_a_file_says(
    tmp_path: Path,
) -> None:
    def masks(*words: str) -> MaskConfig:
        words = ("--data=d", "--output=o", "--image.size=64", *words)
        return parse_run(PretrainConfig, words, prog="", description="").mask

    maskvlm = "--model.name=maskvlm"
    assert masks() == MaskConfig()
    assert masks(maskvlm) == OF_MASKVLM
    assert masks(maskvlm, "--mask.light_text_rate=0.2") == replace(
        OF_MASKVLM, light_text_rate=0.2
    )
    file = tmp_path / "mine.yaml"
    file.write_text("model: {name: maskvlm}\nmask: {image_block: 1}\n")
    assert masks(f"--config={file}") == replace(OF_MASKVLM, image_block=1)


def test_a_run_from_before_a_model_had_masks_of_its_own_keeps_those_it_has(
    tmp_path: Path,
) -> None:
    words = ["--data=d", f"--output={tmp_path}", "--model.name=maskvlm"]
    words += ["--image.size=64"]
    new = parse_run(PretrainConfig, words, prog="", description="")
    shown = yaml.safe_load(to_yaml(new))["mask"]
    assert shown["mode_probabilities"] == [0, 0, 1]
    assert shown["image_block"] == 2
    (tmp_path / "config.yaml").write_text(to_yaml(replace(new, mask=MaskConfig())))
    assert load_config(tmp_path).mask == MaskConfig()
