"""Keys of `python -m pipeline.preprocess`, and the checks that need no file.

Owns every key's name, default and help text. Does not own how keys are parsed
(`pipeline.config`) or obeyed (the module named in each class).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# Pillow's own warning threshold for decompression bombs.
_BOMB_PIXELS = 89_478_485
# JPEG stores sides in 16 bits; the encoder stops a little earlier.
_MAX_SIDE = 16_384
# Positions inside a range have six digits in a sample's key.
_MAX_SHARD_SAMPLES = 1_000_000
_SMALLEST_VOCABULARY = 64
# Perceptual hashes further apart than this belong to unrelated images.
_MAX_HAMMING = 8

SOURCE_FORMATS = (
    *("parquet", "arrow", "tsv", "csv", "jsonl"),
    *("coco", "folder", "webdataset"),
)
RESIZE_MODES = ("shorter", "longer", "center_crop", "border", "none")
IMAGE_FORMATS = ("jpg", "png", "webp")


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Which columns of the corpus hold what (`pipeline.columns`)."""

    image: str | None = None
    """Column with the image: encoded bytes, a Hugging Face image struct, a path
    relative to the table's folder, or a URL (file, s3, http, https).
    Default: the first of image, image_path, filepath, path, url, ... that exists."""
    image_list: str = "refuse"
    """Rows whose image column is a list of several: `refuse` counts them as failed
    (several_images), `first` takes the first. A list of one is that one."""
    caption: list[str] | str | None = None
    """Column or columns ([title,alt]) with captions: a string or a list of strings per
    row. Default: the first of caption, captions, text, title, ... that exists."""
    template: str | None = None
    """Caption made of columns instead: '{title}, {colour}'. A row in which one of them
    is empty, as NaN is, has no caption."""
    id: str | None = None
    """Column that identifies an input. Adjacent rows with one id are one image with
    several captions. Default: the image's path or URL, or the row number for bytes."""
    url: str | None = None
    """Column written to each sample's `url`. Default: what identifies the input; for
    img2dataset's tars the URL that they name."""
    sha256: str | None = None
    """Column with the expected sha256 of the image's bytes, as hex digits (`sha256:`
    before them or not) or 32 bytes: anything else fails as hash_mismatch, because
    domains are registered anew by others."""
    keep: list[str] | str = ()  # type: ignore[assignment]
    """Columns to pass through, as strings, into each sample's json and the parquet.
    For WebDataset tars: all fields of their json unless given."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Names of the caption columns that were given."""
        return _names(self.caption)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the passthrough columns."""
        return _names(self.keep)


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """One corpus of several (`pipeline.sources`)."""

    path: str
    """File, folder, glob or URL."""
    name: str | None = None
    """Name of the source: part of every sample's identity and of the mixture.
    Default: the file name without its suffix."""
    weight: float = 1.0
    """Sampling weight in the mixture that the loader uses by default."""
    format: str | None = None
    """parquet, arrow, tsv, csv, jsonl, coco, folder or webdataset. Default: detected
    from the content."""
    images: str | None = None
    """Folder or URL prefix that paths in the table are relative to. Default: the folder
    of the table."""
    columns: ColumnOptions | None = None
    """Columns of this corpus, where they differ from `--columns`."""

    @property
    def source_name(self) -> str:
        """Name of the source, given or from the path: that of the file, or for many
        files (`photos/*.parquet`) of the folder that they lie in.
        """
        if self.name:
            return self.name
        # In a URL a question mark begins what is no name.
        path = self.path.partition("?")[0] if "://" in self.path else self.path
        parts = path.rstrip("/").split("/")
        while len(parts) > 1 and glob.has_magic(parts[-1]):
            parts.pop()
        return parts[-1].partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are decoded and written (`pipeline.images`)."""

    size: int = 256
    """Side of the written image in pixels that `image.resize` speaks of."""
    resize: str = "shorter"
    """shorter: the shorter side becomes `size`; longer: the longer side does;
    center_crop: shorter, then cut to a square; border: longer, then white bars to a
    square; none: as large as it is."""
    only_if_bigger: bool = False
    """Leave images alone that are already smaller than `size`."""
    format: str = "jpg"
    """jpg (baseline, 4:2:0; what the trainer decodes fastest), png or webp."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100; compression level of png, 0 to 9."""
    reencode: bool = False
    """Encode anew even where the source already is what would be written. Otherwise a
    baseline 4:2:0 sRGB JPEG that needs no resize keeps its coefficients; only its
    metadata goes."""
    max_pixels: int = _BOMB_PIXELS
    """Images whose header claims more pixels than this fail without being decoded."""
    max_side: int = 65_500
    """Images with a side longer than this fail without being decoded."""
    max_bytes: int = 256 << 20
    """Files larger than this fail without being read."""
    time_limit_s: float = 30.0
    """CPU seconds that one image may take; then its decoder is killed (time_limit)."""
    memory_limit_mb: int = 2_048
    """Memory that decoding one image may take, in MB (memory_limit)."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How captions are cleaned, and which are dropped (`pipeline.captions`)."""

    unescape_html: bool = True
    """Turn `&amp;` and its kin into the characters that they stand for."""
    min_chars: int = 1
    """Captions shorter than this are dropped."""
    max_chars: int = 10_000
    """Captions longer than this are cut here, at a word where one ends near."""
    max_captions: int = 64
    """Captions of one image beyond this many are dropped."""
    placeholders: list[str] | str = (  # type: ignore[assignment]
        *("untitled", "image", "photo", "picture", "img", "null", "none", "nan", "n/a"),
        *("no caption", "no description"),
    )
    """Captions that say nothing, compared without case and outer punctuation: they are
    dropped. A word between slashes (/^img_\\d+$/) is a regular expression."""
    max_word_share: float = 1.0
    """Drop captions in which one word makes up more than this share of at least eight:
    `sale sale sale ...`."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """The placeholder rules."""
        return _names(self.placeholders)


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which inputs are left out, counted by reason (`pipeline.filters`)."""

    min_size: int = 0
    """Least shorter side of the source in pixels (too_small)."""
    max_aspect: float = 0.0
    """Most longer side per shorter side of the source; 0 for no limit (aspect)."""
    min_tokens: int = 0
    """Least tokens of the longest caption, separator not counted (short_caption)."""
    max_tokens: int = 0
    """Most tokens of the shortest caption; 0 for no limit (long_caption)."""
    function: str | None = None
    """`module:function` of your own, called with a `pipeline.filters.Candidate`; it
    returns None to keep the input, or a reason (small letters, digits, '_') to drop it.
    The module must be importable where tasks run (`ray job submit --working-dir .`)."""


@dataclass(frozen=True, kw_only=True)
class DedupOptions:
    """Comparisons across the whole corpus (`pipeline.compare`)."""

    exact: bool = False
    """Drop images whose written pixels equal those of an earlier input."""
    near: int | None = None
    """Drop images whose 64-bit perceptual hash lies within this many bits of an earlier
    input's, whether that one was kept or not: 2 to 4 for photos, 0 to 2 for catalogues
    of look-alikes."""
    caption_repeats: int | None = None
    """Drop inputs whose first caption this many earlier inputs have (boilerplate)."""
    bucket_mb: int = 256
    """Memory of one comparison task in MB; it decides how many there are. Hundreds of
    millions of inputs want 1000."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How images are fetched from URLs (`pipeline.fetch`)."""

    concurrency: int = 32
    """Requests under way per task."""
    per_host: int = 4
    """Requests under way per task and host."""
    timeout_s: float = 10.0
    """Seconds to wait for a connection, and for each piece of an answer."""
    total_timeout_s: float = 60.0
    """Seconds that one image may take in all, retries included."""
    retries: int = 3
    """Times a request is tried again after a time-out, a dropped connection or an
    answer that asks for it (408, 425, 429, 5xx), with growing random pauses."""
    user_agent: str = "palimpsest"
    """Name given to servers, and looked for in their opt-out headers."""
    opt_out: list[str] | str = (  # type: ignore[assignment]
        *("noai", "noimageai", "noindex", "noimageindex"),
    )
    """Images whose X-Robots-Tag header has one of these fail as opted_out; [] to
    ignore the header."""
    allow_private: bool = False
    """Also fetch from private, loopback and link-local addresses."""
    allow: list[str] | str = ()  # type: ignore[assignment]
    """Prefixes of file:// and s3:// URLs that a table may name. The corpus's own folder
    is always allowed."""

    @property
    def allowed(self) -> tuple[str, ...]:
        """The allowed prefixes."""
        return _names(self.allow)

    @property
    def refused_tags(self) -> tuple[str, ...]:
        """The opt-out directives that are honoured."""
        return _names(self.opt_out)


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How inputs are cut into shards (`pipeline.plan`)."""

    samples: int = 10_000
    """Inputs per range; each range makes at most one shard per split."""
    bytes: int | None = None
    """Bytes of a shard to aim at: picks `samples` from the first inputs."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which inputs are held out (`pipeline.plan`)."""

    column: str | None = None
    """Column that names the split of each row: train, val (also dev, valid,
    validation), test. Default: hash the group against `split.val`."""
    val: float = 0.05
    """Share of inputs held out as `val` when there is no split column; 0 for none."""
    group: str | None = None
    """Column whose equal values never lie in two splits. Default: each input alone."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to read, and how to write it."""

    input: str | list[InputOptions]
    """The corpus: a file, folder, glob or URL; or several:
    [{path: a.parquet, name: photos, weight: 2}, {path: 's3://bucket/tars'}]."""
    output: str
    """Folder or URL of the dataset: new, empty, or an unfinished run of this
    command."""
    name: str | None = None
    """Name of a single source. Default: the input's file name without its suffix."""
    format: str | None = None
    """Format of a single source: parquet, arrow, tsv, csv, jsonl, coco, folder or
    webdataset. Default: detected from the content."""
    images: str | None = None
    """Folder or URL prefix that paths in a single source's table are relative to.
    Default: the folder of the table."""
    tokenizer: str = "train:8000"
    """Directory or hub name of a Hugging Face fast tokenizer, or train:N for a
    lower-case WordPiece of N entries trained on the captions that are not held out."""
    group: bool = False
    """Bring rows with one id together first (an external sort), where rows of one image
    do not stand side by side."""
    columns: ColumnOptions = field(default_factory=ColumnOptions)
    """Which columns hold what."""
    where: str | None = None
    """SQL condition over the columns of a row: "width >= 256 AND lang = 'en'"; inputs
    whose first row does not meet it count as filtered (where)."""
    allow_uids: str | None = None
    """Text file or URL with uids (16 hex digits a line): other inputs count as filtered
    (not_allowed)."""
    deny_uids: str | None = None
    """Text file or URL with uids whose inputs count as filtered (denied)."""
    image: ImageOptions = field(default_factory=ImageOptions)
    """How images are written."""
    text: TextOptions = field(default_factory=TextOptions)
    """How captions are cleaned."""
    filter: FilterOptions = field(default_factory=FilterOptions)
    """Which inputs are left out."""
    dedup: DedupOptions = field(default_factory=DedupOptions)
    """What is compared across the corpus."""
    fetch: FetchOptions = field(default_factory=FetchOptions)
    """How URLs are fetched."""
    shard: ShardOptions = field(default_factory=ShardOptions)
    """How inputs are cut into shards."""
    split: SplitOptions = field(default_factory=SplitOptions)
    """Which inputs are held out."""
    workers: int | None = None
    """CPUs of the Ray that this command starts itself (default: all of this machine).
    On a running cluster (RAY_ADDRESS, `ray job submit`): most tasks at a time."""
    task_resources: dict[str, float] | None = None
    """On a running cluster: what a task asks for besides a CPU. A share of a custom
    resource, {cpu_node: 0.001}, keeps tasks on the nodes that have it."""
    limit: int | None = None
    """Only the first this many inputs: for trying things out."""
    sample: float | None = None
    """Only this share of the inputs, chosen by the hash of their uid: for trying
    things out."""
    dry_run: bool = False
    """Read a few inputs and say what would be read and written; write nothing."""
    json: bool = False
    """With --dry_run: print what was found as JSON instead of text."""
    retry_failed: bool = False
    """Try the failed inputs of a complete dataset again, as new shards."""

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the key and the cure."""
        self._check_numbers()
        self._check_choices()
        self._check_inputs()

    def _check_numbers(self) -> None:
        _between("image.size", self.image.size, 16, _MAX_SIDE)
        low, high = (0, 9) if self.image.format == "png" else (1, 100)
        # The default is a quality; as a level of png it means the most.
        if not (self.image.format == "png" and self.image.quality == 95):
            _between("image.quality", self.image.quality, low, high)
        _between("image.max_pixels", self.image.max_pixels, 1, 1 << 40)
        _between("image.max_side", self.image.max_side, 1, 65_500)
        _between("image.max_bytes", self.image.max_bytes, 1, 1 << 32)
        _between("image.time_limit_s", self.image.time_limit_s, 0.1, 86_400)
        _between("image.memory_limit_mb", self.image.memory_limit_mb, 64, 1 << 20)
        _between("text.max_chars", self.text.max_chars, 1, 1 << 20)
        _between("text.min_chars", self.text.min_chars, 0, self.text.max_chars)
        _between("text.max_captions", self.text.max_captions, 1, 1 << 16)
        _between("text.max_word_share", self.text.max_word_share, 0, 1)
        _between("filter.min_size", self.filter.min_size, 0, 65_500)
        if self.filter.max_aspect:
            _between("filter.max_aspect", self.filter.max_aspect, 1, 65_500)
        if self.dedup.near is not None:
            _between("dedup.near", self.dedup.near, 0, _MAX_HAMMING)
        if self.dedup.caption_repeats is not None:
            _between("dedup.caption_repeats", self.dedup.caption_repeats, 1, 1 << 40)
        _between("dedup.bucket_mb", self.dedup.bucket_mb, 1, 1 << 20)
        _between("fetch.concurrency", self.fetch.concurrency, 1, 4096)
        _between("fetch.per_host", self.fetch.per_host, 1, self.fetch.concurrency)
        _between("fetch.timeout_s", self.fetch.timeout_s, 0.01, 3600)
        _between("fetch.total_timeout_s", self.fetch.total_timeout_s, 0.01, 86_400)
        _between("fetch.retries", self.fetch.retries, 0, 100)
        _between("shard.samples", self.shard.samples, 1, _MAX_SHARD_SAMPLES)
        if self.shard.bytes is not None:
            _between("shard.bytes", self.shard.bytes, 1 << 16, 1 << 40)
        _between("split.val", self.split.val, 0, 0.99)
        if self.sample is not None:
            _between("sample", self.sample, 1e-9, 1)
        for key in ("workers", "limit"):
            if (value := getattr(self, key)) is not None:
                _between(key, value, 1, 1 << 60)
        if self.trained_vocabulary is not None:
            vocabulary = self.trained_vocabulary
            _between("tokenizer train:N", vocabulary, _SMALLEST_VOCABULARY, 1 << 20)

    def _check_choices(self) -> None:
        _one_of("image.resize", self.image.resize, RESIZE_MODES)
        _one_of("image.format", self.image.format, IMAGE_FORMATS)
        for columns in (self.columns, *(given.columns for given in self.inputs)):
            if columns is not None:
                _one_of("columns.image_list", columns.image_list, ("refuse", "first"))
                if columns.template and columns.caption:
                    raise ValueError(
                        "--columns.template makes the caption, --columns.caption names "
                        "where it stands: give only one of them"
                    )
        if self.json and not self.dry_run:
            raise ValueError(
                "--json prints what a dry run finds: give --dry_run too, or leave it "
                "out (a run writes progress.json beside its output)"
            )
        if self.split.column and self.split.group:
            raise ValueError(
                "--split.column takes the split from the corpus, --split.group decides "
                "it by hash: give only one of them"
            )
        function = self.filter.function
        if function and not re.fullmatch(r"[\w.]+:\w+", function):
            raise ValueError(
                f"--filter.function {function!r} is not module:function, such as "
                "my_filters:keep"
            )

    def _check_inputs(self) -> None:
        if isinstance(self.input, str) and self.input.lstrip().startswith("["):
            raise ValueError(
                "--input is no list of corpora: every one needs `path` and may have "
                "name, weight, format, images and columns, as in "
                "[{path: a.parquet, name: photos, weight: 2}, {path: b.tsv}]"
            )
        if isinstance(self.input, list):
            for key in ("name", "format", "images"):
                if getattr(self, key):
                    raise ValueError(
                        f"--{key} speaks of a single source; with several, give it "
                        "inside --input"
                    )
        if not self.inputs:
            raise ValueError("--input names no corpus")
        names = [given.source_name for given in self.inputs]
        for given, name in zip(self.inputs, names, strict=True):
            if not re.fullmatch(r"[\w.\-]+", name, re.ASCII):
                raise ValueError(
                    f"source name {name!r} must be letters, digits, '_', '-' and '.': "
                    "give one with --name (several inputs: name in each of them)"
                )
            if names.count(name) > 1:
                raise ValueError(
                    f"two inputs are named {name!r}, and a name is part of every "
                    "sample's identity: give each its own name"
                )
            if not 0 < given.weight < float("inf"):
                raise ValueError(
                    f"weight {given.weight} of input {name!r}: give a number above 0"
                )
            if given.format:
                _one_of("format", given.format, SOURCE_FORMATS)

    @property
    def inputs(self) -> tuple[InputOptions, ...]:
        """The corpora, one or several."""
        if not isinstance(self.input, str):
            return tuple(self.input)
        return (
            InputOptions(
                path=self.input, name=self.name, format=self.format, images=self.images
            ),
        )

    @property
    def trained_vocabulary(self) -> int | None:
        """N of `--tokenizer train:N`, or None where a tokenizer is loaded."""
        found = re.fullmatch(r"train:(.*)", self.tokenizer)
        if not found:
            return None
        if not found[1].isdecimal():
            raise ValueError(
                f"--tokenizer {self.tokenizer!r}: N in train:N is a number of "
                "vocabulary entries, such as train:8000"
            )
        return int(found[1])


def _names(value: Sequence[str] | str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"--{key} is {value}, but must lie between {low} and {high}")


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"--{key} {value!r} is not one of: {', '.join(known)}")
