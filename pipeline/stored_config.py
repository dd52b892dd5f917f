"""The configuration of the run that made a dataset, as `DATASET.progress.json` has it.

Owns reading it, and refusing to run on a file's word alone what could do more than make
the same dataset again from local files. Does not own the keys (`pipeline.options`) or
comparing corpora, which the preprocess command does itself before it writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import differences, parse
from pipeline.dataset import PLAN
from pipeline.options import PreprocessConfig
from pipeline.progress import LEFT_OUT
from pipeline.storage import Storage, open_file

_CURE = "give the configuration of the preprocess run with --preprocess FILE.yaml"
# Where reading has no other effect; both are asked with the user's own rights.
_QUIET_SCHEMES = ("file", "local", "s3")


def given_config(place: str) -> dict[str, Any]:
    """Keys of a YAML file that the user names, and so vouches for.

    Raises:
        ValueError: it cannot be read, or holds no keys.
    """
    try:
        with open_file(place) as file:
            found = yaml.safe_load(file.read())
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{place} cannot be read ({error}): {_CURE}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} does not hold the configuration of the run: {_CURE}")
    return found


def stored_config(storage: Storage) -> dict[str, Any]:
    """Keys of the run that made the dataset, where they may be run unasked.

    Raises:
        ValueError: they are not known, are not those of `plan.json`, or would fetch,
            import or compile what somebody else chose.
    """
    place = f"{storage.url}.progress.json"
    try:
        with open_file(place) as file:
            values = json.loads(file.read())["config"]
        config = _parsed(values)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} does not hold the configuration of the run: {_CURE}"
        ) from error
    if other := list(_differences(storage, config)):
        raise ValueError(
            f"{place} is not of the run that made this dataset ({'; '.join(other)}): "
            f"{_CURE}"
        )
    if daring := list(_daring(config)):
        raise ValueError(
            f"{place} asks to {', to '.join(daring)}, which is not done on a file's "
            f"word: look at it, and {_CURE}"
        )
    return values


def _parsed(values: Any) -> PreprocessConfig:
    if not isinstance(values, Mapping):
        raise TypeError("no mapping")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preprocess.yaml"
        path.write_text(yaml.safe_dump(dict(values)))
        return parse(PreprocessConfig, [f"--config={path}"], prog="", description="")


def _differences(storage: Storage, config: PreprocessConfig) -> Iterator[str]:
    """What its plan says that the configuration does not."""
    # Late: it opens corpora, with all the libraries for that.
    from pipeline.describe import chosen_by

    try:
        stored = json.loads(storage.read(PLAN))["transform"]
        chosen = chosen_by(config)
        yield from differences({key: stored[key] for key in chosen}, chosen)
        names = {given.source_name for given in config.inputs}
        yield from differences(
            {"sources": sorted(stored["sources"])}, {"sources": sorted(names)}
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        yield f"{PLAN} cannot be read: {error!r}"


def _daring(config: PreprocessConfig) -> Iterator[str]:
    """What may have effects beside the dataset, with the keys that ask for it."""
    places: dict[str, list[str | None]] = {
        "input": [given.path for given in config.inputs],
        "images": [given.images for given in config.inputs],
        "allow_uids": [config.allow_uids],
        "deny_uids": [config.deny_uids],
    }
    for key, urls in places.items():
        for url in urls:
            scheme, remote, _ = (url or "").partition("://")
            quiet = scheme.lower() in _QUIET_SCHEMES and "::" not in (url or "")
            if remote and not quiet:
                yield f"read {url} (--{key})"
            elif remote and f"{LEFT_OUT}@" in (url or ""):
                yield f"read {url}, whose password it does not have (--{key})"
            elif remote and (url or "").endswith(f"?{LEFT_OUT}"):
                yield f"read {url}, whose query it does not have (--{key})"
    if config.filter.function:
        yield f"run {config.filter.function} (--filter.function)"
    if config.fetch.allow_private:
        yield "fetch from private addresses (--fetch.allow_private)"
    if config.fetch.allowed:
        yield f"read below {', '.join(config.fetch.allowed)} (--fetch.allow)"
    for rule in config.text.dropped:
        # An expression of somebody else's may take for ever.
        if rule.startswith("/"):
            yield f"search captions for {rule} (--text.placeholders)"
