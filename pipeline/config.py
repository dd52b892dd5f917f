"""One configuration mechanism for all three packages.

Owns how a frozen dataclass becomes a command line: YAML through `--config`, dotted
overrides, `--help` from attribute docstrings, unknown keys answered with the nearest
known one, and the resolved configuration written back as YAML. Does not own any key:
each package declares its own dataclasses. Needs only `jsonargparse`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml

from pipeline.terminal import printable

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

ConfigT = TypeVar("ConfigT")
_TRUTHS = ("true", "false", "yes", "no")
_PRINT_CONFIG = "--print_config"


class ConfigError(ValueError):
    """A command line or YAML file that cannot be used; the message names the cure."""


def parse(
    config_class: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: str | None = None,
    recipes: Path | None = None,
) -> ConfigT:
    """Build `config_class` from `argv`: defaults, then `--config`, then dotted flags.

    Flags win over the file wherever `--config` stands on the line. A first word that is
    no flag is the value of the key `positional`. With `recipes`, a `--config` that is
    no file is looked up there (`emoji` or `emoji.yaml`). `--print_config` prints the
    resolved configuration as YAML, once it is checked, and exits.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type or value,
            missing required key, unreadable file.
    """
    parser = _Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--config", action="config", help="YAML file with these keys.")
    parser.add_class_arguments(config_class, None, sub_configs=False)
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}={argv[0]}", *argv[1:]]
    show = _PRINT_CONFIG in argv
    argv = [word for word in argv if word != _PRINT_CONFIG]
    try:
        _warn_of_repeated(config_class, argv)
        argv = _config_first(_bare_switches(config_class, argv), recipes)
        for word, path in itertools.pairwise(argv):
            if word == "--config":
                _refuse_unknown_empty(path, known_keys(config_class))
        namespace = parser.parse_args(argv)
        values = vars(parser.instantiate(namespace))
        values.pop("config")
        config = config_class(**values)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        said = _explain(str(error), known_keys(config_class))
        if positional and said.startswith(f"--{positional} must be given"):
            # Nobody types the flag.
            said = f"{positional.upper()} (--{positional}) m" + said.partition(" m")[2]
        raise ConfigError(said) from error
    if show:
        # The parser's own flag of that name would print what is not checked yet.
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def given(argv: Sequence[str], key: str, *, recipes: Path | None = None) -> Any:
    """What `argv` gives for a dotted key, by a flag or in its file; None if neither
    does. For a command whose other keys depend on this one.

    Raises:
        ConfigError: two files give two values, and no flag does.
    """
    flag, in_files = None, {}
    for word, following in itertools.pairwise([*_config_first(argv, recipes), ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--config":
            in_files[value] = _in_file(value, key)
        elif name == f"--{key}":
            flag = value
    if flag is not None:
        return flag
    found = {path: value for path, value in in_files.items() if value is not None}
    if len(set(map(str, found.values()))) > 1:
        said = " and ".join(f"{value} in {path}" for path, value in found.items())
        raise ConfigError(
            f"{key} is {said}, and decides which other keys there are: give one of the "
            "files to --config"
        )
    return next(iter(found.values()), None)


def known_keys(config_class: type) -> list[str]:
    """Dotted names of every key of `config_class`, groups included."""
    return [key for key, _ in _typed_keys(config_class)]


def switches(config_class: type) -> list[str]:
    """Dotted names of every yes-or-no key of `config_class`, groups included."""
    return [key for key, kind in _typed_keys(config_class) if kind is bool]


def nearest(word: str, known: Sequence[str]) -> str:
    """`" Did you mean 'x'?"` for the known word closest to `word`, or nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not found:
        last = {key.rsplit(".", 1)[-1]: key for key in known}
        close = difflib.get_close_matches(word.rsplit(".", 1)[-1], last, n=1)
        found = [last[key] for key in close]
    return f" Did you mean {found[0]!r}?" if found else ""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """`config` as one level of dotted keys, for showing and comparing."""
    items: dict[str, Any] = {}
    values = config if isinstance(config, Mapping) else dataclasses.asdict(config)
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[prefix + key] = value
    return items


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """One line `key: old -> new` for every key on which two configurations differ."""
    before, after = flat(old), flat(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)!r} -> {after.get(key)!r}"


def run(main: Callable[[Sequence[str]], int | None], prog: str) -> NoReturn:
    """Run a command's `main(argv)` and exit: a `ValueError` or `OSError` about what the
    user gave becomes one line on stderr and status 1 (2 for the command line itself).
    """
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except (ValueError, OSError) as error:
        # It may quote what somebody else wrote.
        print(f"{prog}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of a description: example commands are of no use run together."""


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _typed_keys(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every key, groups included."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = types[field.name]
        yield prefix + field.name, kind
        if group := _group(kind):
            yield from _typed_keys(group, f"{prefix}{field.name}.")


def _group(kind: Any) -> type | None:
    """The dataclass that a field's type is, or is where it is not None."""
    kinds = {kind, *typing.get_args(kind)} - {type(None)}
    found = [one for one in kinds if isinstance(one, type)]
    groups = [one for one in found if dataclasses.is_dataclass(one)]
    return groups[0] if len(groups) == 1 else None


def _bare_switches(config_class: type, argv: Sequence[str]) -> list[str]:
    """`argv` with `=true` behind every flag of a yes-or-no key that has no value."""
    flags = {f"--{key}" for key in switches(config_class)}
    following = [*argv[1:], ""]
    return [
        f"{word}=true" if word in flags and after.lower() not in _TRUTHS else word
        for word, after in zip(argv, following, strict=False)
    ]


def _warn_of_repeated(config_class: type, argv: Sequence[str]) -> None:
    """Of a flag that is given twice the parser takes the last: a script's words are
    overridden so. Whoever repeats a key that takes several may mean them all.
    """
    # All ranks of a launch are given the same words: one of them tells.
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
        return
    given: dict[str, list[str]] = {}
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        given.setdefault(flag, []).append(value if equals else following)
    for key, kind in _typed_keys(config_class):
        values = list(dict.fromkeys(given.get(f"--{key}", ())))
        kinds = (kind, *typing.get_args(kind))
        if len(values) > 1 and any(typing.get_origin(one) is list for one in kinds):
            bare = [one[1:-1] if one.startswith("[") else one for one in values]
            print(
                f"--{key} is given {len(values)} times, and only the last counts; all "
                f"of them at once are --{key} '[{', '.join(bare)}]'",
                file=sys.stderr,
            )


def _config_first(argv: Sequence[str], recipes: Path | None) -> list[str]:
    """Move every `--config` to the front, so that flags override the file."""
    first, rest, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        first += ["--config", _config_path(given, recipes)]
    return first + rest


def _refuse_unknown_empty(path: str, known: Sequence[str]) -> None:
    """The parser skips an unknown key whose value is an empty mapping."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        # The parser says it better.
        return
    for key, value in found.items() if isinstance(found, dict) else ():
        if value == {} and key not in known:
            raise ConfigError(
                f"unknown key {key!r}.{nearest(str(key), known)} (--help lists every "
                "key)"
            )


def _in_file(path: str, key: str) -> Any:
    """What a YAML file has for a dotted key; None if it has nothing."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        # The parser says it better.
        return None
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _config_path(given: str, recipes: Path | None) -> str:
    if Path(given).is_file():
        return given
    known = (
        {path.stem: path for path in sorted(recipes.glob("*.yaml"))} if recipes else {}
    )
    path = known.get(given.removesuffix(".yaml"))
    if path is None:
        hint = (
            f"; recipes: {', '.join(known)}.{nearest(given, list(known))}"
            if known
            else ""
        )
        raise ConfigError(f"--config {given!r} is not a file{hint}")
    return str(path)


_ONE_FOR_A_LIST = (
    r'key "(?P<key>[\w.]+)": Expected a (?:List\[|<class .(?:list|tuple).>).*?'
    r"Got value: (?P<one>.+)$"
)
# YAML takes {photos:3} for the key `photos:3` without a value.
_NO_SPACE = (
    r'key "(?P<key>[\w.]+)": Expected a .*?Got value: \{(?:.*[{,])?\s*[\'"]?'
    r"[\w./-]+:[^\s]"
)
_KINDS = {
    "float": "number",
    "int": "whole number",
    "str": "text",
    "tuple": "list",
    "dict": "mapping such as {key: value}",
    "NoneType": "null",
}
_IN_QUOTES = (
    "; put quotes around a value with spaces or a pattern (such as 'data/*.parquet'), "
    "or the shell makes several words of it"
)
_UNKNOWN = (
    r"unrecognized arguments: --(?P<key>[\w.\-]+)",
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.\-]+)'",
    r"Option '(?P<key>[\w.\-]+)' is not accepted",
)


_ONE_OF_SEVERAL = (
    r'(?:key "(?P<key>[\w.]+)": )?Does not validate .*?Errors: - (?P<errors>.+) '
    r"Given value type: .*?Given value: (?P<value>.*)$"
)


def _of_several(key: str | None, errors: str, value: str) -> str:
    """What a value is that is of none of several kinds."""
    said = errors.split(" - ")
    if key is None or not all(one.startswith("Expected ") for one in said):
        # Of a group that may be left out; the other error says that it is not left out.
        return said[0]
    kinds = [re.sub("^Expected (a )?", "", one) for one in said]
    kinds = [re.sub(r"typing\.Literal\[(.+)\]", r"\1", one) for one in kinds]
    kinds = [re.sub(r"<class '(\w+)'>", _kind, one) for one in kinds]
    listed = ", ".join(kinds[:-1]) + f" or {kinds[-1]}"
    return f'key "{key}": Expected a {listed}. Got value: {value}'


def _as_list(found: re.Match[str]) -> str:
    """How to give a list of what was given without brackets."""
    key, one = found["key"], found["one"]
    parts = [part.strip() for part in one.split(",")]
    if all(re.fullmatch(r"[-+.\deE]+", part) for part in parts):
        return f"--{key} takes a list: give it as '[{', '.join(parts)}]', all of it"
    # A sentence may have commas.
    if not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        parts = [one]
    listed = ", ".join(f'"{part}"' for part in parts)
    return f"--{key} takes a list: give it as '[{listed}]'"


def _kind(found: re.Match[str]) -> str:
    return _KINDS.get(found[1], found[0])


def _explain(message: str, known: Sequence[str]) -> str:
    """One line for the user out of the parser's message, with the nearest known key."""
    for pattern in _UNKNOWN:
        if found := re.search(pattern, message):
            parts = [found.groupdict().get("group"), found["key"]]
            key = ".".join(part for part in parts if part)
            return f"unknown key {key!r}.{nearest(key, known)} (--help lists every key)"
    text = re.sub(r"\s+", " ", message).strip().replace("Parser key", "key")
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = text.replace('"<unicode string>"', "the file given as --config")
    # Of one entry of a mapping.
    text = re.sub(r"NestedArg\(key='[^']*', val='(.*?)'\)", r"\1", text)
    if found := re.search(_ONE_OF_SEVERAL, text):
        text = _of_several(**found.groupdict())
    if found := re.match(_NO_SPACE, text):
        return (
            f"--{found['key']} needs a space after each colon, or YAML reads no "
            f"values: give it as '{{key: value, other: value}}'"
        )
    text = re.sub(_ONE_FOR_A_LIST, _as_list, text)
    text = re.sub(r"<class '(\w+)'>", _kind, text)
    text = re.sub(r"Expected a typing\.Literal\[([^]]*)\]", r"Expected one of \1", text)
    if text.startswith("Unexpected config"):
        return "the file given as --config holds no keys"
    if found := re.search(r"arguments are required: (.+)", text):
        flags = ", ".join(f"--{key.strip()}" for key in found[1].split(","))
        return f"{flags} must be given (--help explains every key)"
    if text.startswith("unrecognized arguments: "):
        words = text.partition(": ")[2]
        cure = "" if words.startswith("-") else _IN_QUOTES
        return f"not a flag: {words}{cure}"
    return text
