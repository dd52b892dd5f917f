from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from pipeline.config import ConfigError, differences, flat, given, parse, to_yaml
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    width: int = 8
    """How wide."""
    kind: Literal["plain", "fancy"] = "plain"
    """Which kind."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """All keys."""

    data: str
    """Where."""
    rate: float | None = None
    """How fast."""
    inner: Inner = field(default_factory=Inner)


def build(*argv: str, recipes: Path | None = None) -> Outer:
    return parse(
        Outer, argv, prog="x", description="x", positional="data", recipes=recipes
    )


def test_flags_override_the_file_wherever_config_stands(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: from-file\ninner: {width: 3, kind: fancy}\n")
    for argv in (
        ["--config", str(file), "--inner.width", "5"],
        ["--inner.width=5", f"--config={file}"],
    ):
        config = build(*argv)
        assert (config.data, config.inner.width) == ("from-file", 5)
        assert config.inner.kind == "fancy"


def test_recipe_is_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("data: recipe\n")
    for name in ("small", "small.yaml"):
        assert build("--config", name, recipes=tmp_path).data == "recipe"
    with pytest.raises(ConfigError, match="Did you mean 'small'"):
        build("--config", "smal", recipes=tmp_path)


def test_first_word_is_the_positional_key() -> None:
    assert build("here", "--rate", "2").data == "here"


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["d", "--inner.widht", "3"], "'inner.width'"),
        (["d", "--width", "3"], "'inner.width'"),
        (["d", "--rte", "3"], "'rate'"),
    ],
)
def test_unknown_flag_names_the_nearest(argv: list[str], suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key .*Did you mean {suggestion}"):
        build(*argv)


def test_unknown_key_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: d\ninner: {widht: 3}\n")
    with pytest.raises(ConfigError, match=r"'inner.widht'.*'inner.width'"):
        build("--config", str(file))
    file.write_text("data: d\nrte: 3\n")
    with pytest.raises(ConfigError, match=r"'rte'.*'rate'"):
        build("--config", str(file))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "DATA (--data) must be given"),
        (["d", "--inner.width", "wide"], "inner.width"),
        (["d", "--inner.kind", "odd"], "inner.kind"),
        (["d", "surplus"], "not a flag: surplus; put quotes around"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_every_refusal_is_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(*argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_abbreviated_flags_are_refused() -> None:
    with pytest.raises(ConfigError):
        build("--dat", "d")


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = build("d", "--inner.width", "5", "--rate", "0.5")
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    assert build("--config", str(file)) == config


def test_differences_name_dotted_keys() -> None:
    old = yaml.safe_load(to_yaml(build("d")))
    new = yaml.safe_load(to_yaml(build("d", "--inner.width", "9")))
    assert list(differences(old, new)) == ["inner.width: 8 -> 9"]
    assert flat(old)["inner.kind"] == "plain"


@pytest.mark.parametrize(
    "module",
    [
        *("pipeline.preprocess", "pipeline.pairs"),
        *("trainer.pretrain", "trainer.finetune", "trainer.evaluate"),
    ],
)
def test_help_explains_every_key(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    flags = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(flags) > 8
    # The parser prints a key without a docstring as nothing but its type.
    assert not re.findall(r"^  --([\w.]+) \S+\s+\((?:type|required)", done.stdout, re.M)


def test_a_switch_needs_no_value_wherever_it_stands() -> None:
    from pipeline.options import PreprocessConfig

    def parsed(*words: str) -> PreprocessConfig:
        given = ["--input=a.tsv", "--output=out", *words]
        return parse(PreprocessConfig, given, prog="p", description="d")

    assert parsed("--dry_run", "--dedup.exact", "--limit=3").dry_run
    assert parsed("--dry_run", "--dedup.exact", "--limit=3").dedup.exact
    assert parsed("--retry_failed").retry_failed
    assert parsed("--group", "true").group
    assert not parsed("--group", "false").group
    assert not parsed("--limit=3").dry_run


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part that may be left out."""

    nodes: int = 1
    """How many."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"stage.nodes is {self.nodes}: it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run."""

    stage: Stage | None = None
    """Its part."""


def test_a_key_that_decides_others_is_not_taken_from_one_of_two_files(
    tmp_path: Path,
) -> None:
    files = []
    for number, name in enumerate(("mlim", "maskvlm", "maskvlm")):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(f"model: {{name: {name}}}\n")
    (tmp_path / "none.yaml").write_text("seed: 1\n")
    words = [f"--config={path}" for path in files]
    with pytest.raises(
        ConfigError, match=r"mlim in .*0\.yaml and maskvlm in .*give one"
    ):
        given(words, "model.name")
    assert given([*words, "--model.name", "other"], "model.name") == "other"
    assert given(words[1:], "model.name") == "maskvlm"
    more = [words[0], f"--config={tmp_path / 'none.yaml'}"]
    assert given(more, "model.name") == "mlim"
    assert given(more[1:], "model.name") is None


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Keys of several kinds."""

    names: tuple[str, ...] = ("a",)
    """Its names."""
    more: list[str] = field(default_factory=list)
    """More of them."""
    rate: float = 1.0
    """Its rate."""
    most: int | Literal["auto"] | None = None
    """Its limit."""
    some: tuple[str, ...] | None = None
    """Some of them."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Two numbers."""
    weights: Literal["even"] | dict[str, float] = "even"
    """A number of each."""


@pytest.mark.parametrize("value", ["{a:3,b:1}", "{a:3}", "{a: 3,b:1}", '{"a":3,b:1}'])
def test_a_mapping_without_spaces_is_answered_with_where_they_go(value: str) -> None:
    with pytest.raises(ConfigError, match="needs a space after each colon") as caught:
        parse(Listed, [f"--weights={value}"], prog="p", description="d")
    assert str(caught.value).startswith("--weights needs")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--names=a {}", """--names takes a list: give it as '["a {}"]'"""),
        ("--more=b", """--more takes a list: give it as '["b"]'"""),
        ("--more=b,c", """--more takes a list: give it as '["b", "c"]'"""),
        ("--betas=0.8, 1", "--betas takes a list: give it as '[0.8, 1]', all of it"),
        ("--rate=nan", 'key "rate": Expected a number. Got value: nan'),
        (
            "--most=many",
            """key "most": Expected a whole number, 'auto' or null. Got value: many""",
        ),
        (
            "--weights={a: x:y}",
            """key "weights": Expected a 'even' or number. Got value: x:y. """
            """Got value: {'a': 'x:y'}""",
        ),
        ("--some=a", 'key "some": Expected a list or null. Got value: a'),
    ],
)
def test_a_value_of_another_kind_is_answered_with_how_to_give_it(
    word: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Listed, [word], prog="p", description="d")
    assert str(caught.value) == said


def test_of_a_repeated_list_the_last_counts_which_is_said_with_the_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(*argv: str) -> list[str]:
        return parse(Listed, argv, prog="p", description="d").more

    # By one rank of a launch, whose ranks are all given the same.
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert more("--more", "[a]", "--more=[b, c]") == ["b", "c"]
    (line,) = capsys.readouterr().err.splitlines()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert more("--more", "[a]", "--more=[b, c]") == ["b", "c"]
    assert capsys.readouterr().err.splitlines() == [line]
    assert line.startswith("--more is given 2 times, and only the last counts")
    assert line.endswith("--more '[a, b, c]'")
    assert more("--more", "[a, b, c]", "--rate=1", "--rate=2") == ["a", "b", "c"]
    assert more("--more=[a]", "--more=[a]") == ["a"]
    assert more("--more+=a", "--more+=b") == ["a", "b"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stage.nods=2"], "Did you mean 'stage.nodes'?"),
        (["--stage.nodes=0"], "stage.nodes is 0: it must be 1 or more"),
        (["--stage.nodes=many"], 'key "nodes": Expected a'),
    ],
)
def test_a_group_that_may_be_left_out_is_checked_like_any(
    argv: list[str], words: str
) -> None:
    assert parse(Whole, [], prog="p", description="d").stage is None
    given = parse(Whole, ["--stage.nodes=3"], prog="p", description="d").stage
    assert given == Stage(nodes=3)
    with pytest.raises(ConfigError) as caught:
        parse(Whole, argv, prog="p", description="d")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 120


def test_a_configuration_is_printed_once_it_is_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Whole, ["--print_config", "--stage.nodes=3"], prog="p", description="d")
    assert ended.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"stage": {"nodes": 3}}
    with pytest.raises(ConfigError, match="it must be 1 or more"):
        parse(Whole, ["--stage.nodes=0", "--print_config"], prog="p", description="d")
