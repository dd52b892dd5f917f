"""The preprocess run: checks, plan, ranges, comparison, commit, manifest, in order.

Owns the order of things, and that nothing is written before every cheap check has
passed. Each thing itself is owned by the module it is imported from.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.dataset import SEALS, DatasetWriter, refuse_inside_dataset
from pipeline.describe import (
    check_function,
    load_uid_lists,
    open_corpora,
    transform_of,
)
from pipeline.durable import make_folder
from pipeline.lease import Lease
from pipeline.manifest import (
    Accounting,
    Manifest,
)
from pipeline.options import PreprocessConfig
from pipeline.phases import Run, as_stored, completed
from pipeline.plan import Corpus
from pipeline.progress import ProgressFile, reasons, say
from pipeline.ray_session import (
    refuse_relative_in_job,
)
from pipeline.retry import end_retry, retry_announced
from pipeline.staging import TakenOver
from pipeline.storage import Storage, open_storage
from pipeline.tokenizer import StoredTokenizer, load_tokenizer

# Names that other tools give to folders of one split.
_SPLIT_FOLDERS = {"train", "val", "valid", "validation", "dev", "test"}


def preprocess(config: PreprocessConfig) -> Manifest:
    """Make, continue or recognise the dataset of `config` and return its manifest.

    Raises:
        ValueError: the corpus, tokenizer or output cannot be used; nothing was written,
            or nothing could be kept and all of it was removed.
    """
    check_output(config)
    tell_split_folders(config)
    writer = DatasetWriter(open_storage(config.output))
    stored = writer.stored_plan()
    made = writer.finished() if stored is not None else None
    check_function(config)
    corpora = open_corpora(config)
    load_uid_lists(config)
    tokenizer = _known_tokenizer(config, writer, stored)
    if stored is not None:
        given = config if config.shard.bytes is None else as_stored(config, stored)
        transform = transform_of(given, corpora, tokenizer)
        if tokenizer is None:
            # Compared once it is trained again, which may take long.
            transform["tokenizer"]["sha256"] = _tokenizer_digest(stored)
        writer.refuse_other(transform, stored)
        if tokenizer is None:
            say(f"the tokenizer of {config.output} is gone or damaged: trained again")
    again = config.retry_failed and not retry_announced(writer)
    if made and tokenizer and not again and _is_whole(config, writer, made):
        return made
    if made is None and again and writer.storage.size(SEALS) is None:
        raise _incomplete(config.output)
    writer.refuse_unwritable()
    lease = Lease(writer.storage)
    lease.refuse_if_held()
    with _space_told(writer.storage), _removed_where_empty(writer.storage):
        return _run(config, writer, lease, corpora, stored, tokenizer)


def check_output(config: PreprocessConfig) -> None:
    """Raise ValueError for an output that no run may have."""
    # A dry run refuses what no storage is, too.
    open_storage(config.output)
    refuse_relative_in_job(config.output)
    refuse_inside_dataset(config.output)
    _refuse_inside_input(config)


def complete_manifest(output: str) -> Manifest:
    """The manifest of the dataset that `--retry_failed` goes on from.

    Raises:
        ValueError: the dataset is not complete.
    """
    manifest = DatasetWriter(open_storage(output)).finished()
    if manifest is None:
        raise _incomplete(output)
    return manifest


def _incomplete(output: str) -> ValueError:
    return ValueError(
        f"--retry_failed: {output} is no complete dataset yet; run the same command "
        "without it first"
    )


def tell_split_folders(config: PreprocessConfig) -> None:
    """Say so where an input has folders that look like splits and are not read so."""
    if config.split.column is not None:
        return
    for given in config.inputs:
        if "://" in given.path or not Path(given.path).is_dir():
            continue
        names = {path.name for path in Path(given.path).iterdir() if path.is_dir()}
        found = sorted(names & _SPLIT_FOLDERS)
        if len(found) > 1:
            say(
                f"{given.path}: its folders {', '.join(found)} are read as one corpus, "
                f"of which --split.val {config.split.val:g} is held out by hash; to "
                "keep them apart, name a --split.column or give each its own --output"
            )


def _run(
    config: PreprocessConfig,
    writer: DatasetWriter,
    lease: Lease,
    corpora: tuple[Corpus, ...],
    stored: Mapping[str, Any] | None,
    tokenizer: StoredTokenizer | None,
) -> Manifest:
    file = ProgressFile(writer.storage, asdict(config))
    with lease:
        if writer.stored_plan() != stored:
            raise ValueError(
                f"another run was started in {config.output} while this one looked at "
                "the corpus; run the same command again"
            )
        run = Run(config, writer, lease, file, corpora)
        try:
            manifest = run.finish(stored, tokenizer)
        except TakenOver:
            raise
        except ValueError:
            if stored is None and not writer.records:
                lease.check()
                writer.abandon()
                file.remove()
            raise
        end_retry(writer)
    if manifest is None:
        file.remove()
        raise ValueError(
            f"nothing could be kept of {run.accounting.inputs} inputs: "
            f"{_reasons(run.accounting)}; {config.output} was removed again"
        )
    return manifest


@contextlib.contextmanager
def _removed_where_empty(storage: Storage) -> Iterator[None]:
    """Make a folder of its own for this run; take it away where nothing came of it.

    Raises:
        ValueError: it cannot be made.
    """
    path = storage.path
    new = path is not None and not path.exists()
    if new and path is not None:
        try:
            make_folder(path)
        except OSError as error:
            raise ValueError(
                f"--output {path} cannot be created ({error.strerror}): choose another "
                "--output"
            ) from error
    try:
        yield
    finally:
        if new and path is not None:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _space_told(storage: Storage) -> Iterator[None]:
    """Say which disk is full; what is for another place is staged on this machine's."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        disk = storage.path or tempfile.gettempdir()
        raise OSError(
            f"the disk of {disk} is full: free space; the same command continues"
        ) from error


def _refuse_inside_input(config: PreprocessConfig) -> None:
    for given in config.inputs:
        if "://" in given.path or "://" in config.output:
            continue
        path, output = Path(given.path), Path(config.output)
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output {config.output} lies in the folder --input {given.path}, "
                "all files of which are the corpus, the dataset's own included; choose "
                "an --output outside of it"
            )


def _is_whole(
    config: PreprocessConfig, writer: DatasetWriter, manifest: Manifest
) -> bool:
    """Is there nothing left to do? What a killed driver left is removed then."""
    if name := writer.missing_file(manifest):
        say(f"{config.output} lacks {name}, or it is cut short: it is made again")
        return False
    if writer.retry_begun():
        say("a retry of failed inputs was begun: it is finished now")
        return False
    if writer.left_behind():
        # Another driver may be at its end, and a dataset may lie where nobody writes.
        with contextlib.suppress(ValueError, OSError), Lease(writer.storage):
            writer.tidy()
            file = ProgressFile(writer.storage, asdict(config))
            file.write(completed(manifest), final=True)
            end_retry(writer)
    say(f"{config.output} is already complete")
    return True


def _known_tokenizer(
    config: PreprocessConfig,
    writer: DatasetWriter,
    stored: Mapping[str, Any] | None,
) -> StoredTokenizer | None:
    """The tokenizer, unless it is to be trained on this corpus: for the first time, or
    again where the one of the `stored` plan is gone or damaged.
    """
    if config.trained_vocabulary is None:
        return load_tokenizer(config.tokenizer)
    if stored is None:
        return None
    try:
        found = writer.stored_tokenizer()
    except ValueError:
        return None
    return found if found.info.sha256 == _tokenizer_digest(stored) else None


def _tokenizer_digest(stored: Mapping[str, Any]) -> str:
    return stored["transform"]["tokenizer"]["sha256"]


def _reasons(counts: Accounting) -> str:
    found = {**counts.filtered, **counts.failed, "duplicate": counts.duplicates}
    return reasons({reason: count for reason, count in found.items() if count}, 10)
