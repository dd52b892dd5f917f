"""Build `examples/emoji.parquet`, the bundled corpus, from two npm packages.

Owns which emoji become rows, their captions, and the groups that the held-out split
keeps whole. Does not own shards or the split itself (`pipeline.preprocess`). To build:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    mkdir images words
    tar -xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C images
    tar -xzf emojibase-data-17.0.0.tgz -C words
    python -m examples.build_emoji --images images/package --words words/package

The same packages, Pillow and pyarrow give the same bytes. What does not match and what
was joined because it looks alike is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 128
WEBP_QUALITY = 92
ROW_GROUP = 256
# Root mean square difference of 32 x 32 thumbnails, in grey levels of 255. Below it, in
# this set, are redrawings of one picture: the speech bubbles, the two snowmen, two of
# the cats. Pairs of groups that differ in more than a detail start at about 8.
ALIKE_RMS = 8.0

VARIATION, JOINER, CANCEL = 0xFE0F, 0x200D, 0xE007F
SKIN_TONES = range(0x1F3FB, 0x1F400)
HAIR = range(0x1F9B0, 0x1F9B4)
GENDER_SIGNS = (0x2640, 0x2642)
RIGHT_ARROW = 0x27A1
ADULT, CHILD, FAMILY = 0x1F9D1, 0x1F9D2, 0x1F46A
AS_ADULT = (0x1F468, 0x1F469)
AS_CHILD = (0x1F466, 0x1F467)

# Variants of one emoji that are separate code points: gender, hair, direction, hour.
# The first of each line names the group.
SAME_EMOJI: tuple[tuple[int, ...], ...] = (
    (ADULT, 0x1F468, 0x1F469, 0x1F471, 0x1F9D4),
    (CHILD, 0x1F466, 0x1F467),
    (0x1F9D3, 0x1F474, 0x1F475),
    (0x1FAC5, 0x1F934, 0x1F478),
    (0x1F385, 0x1F936),
    (0x1F483, 0x1F57A),
    (0x1FAC4, 0x1F930, 0x1FAC3),
    (0x1F46B, 0x1F46C, 0x1F46D),
    (0x1F91B, 0x1F91C),
    (0x1F446, 0x1F447, 0x1F448, 0x1F449),
    (0x1FAF1, 0x1FAF2),
    (0x1FAF3, 0x1FAF4),
    (0x1FAF7, 0x1FAF8),
    (0x1F44D, 0x1F44E),
    (0x2B06, 0x2197, 0x27A1, 0x2198, 0x2B07, 0x2199, 0x2B05, 0x2196, 0x2195, 0x2194),
    (0x21A9, 0x21AA, 0x2934, 0x2935),
    (0x25B6, 0x25C0, 0x1F53C, 0x1F53D),
    (0x23E9, 0x23EA, 0x23EB, 0x23EC),
    (0x1F50D, 0x1F50E),
    (0x231B, 0x23F3),
    tuple(range(0x1F550, 0x1F568)),
)
REPRESENTATIVE = {code: line[0] for line in SAME_EMOJI for code in line}
# Sequences that are a gendered spelling of another emoji, after the rules above.
SAME_SEQUENCE: Mapping[tuple[int, ...], int] = {
    (ADULT, 0x2764, 0x1F48B, ADULT): 0x1F48F,
    (ADULT, 0x2764, ADULT): 0x1F491,
    (ADULT, 0x1F91D, ADULT): 0x1F46B,
    (ADULT, 0x1F384): 0x1F385,
    (0x1FAF1, 0x1FAF1): 0x1F91D,
}

GENDERED = re.compile(r"\b(m[ae]n|wom[ae]n|persons?|people|boys?|girls?)\b")


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One row of the corpus."""

    hexcode: str
    base: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    image: bytes
    thumbnail: bytes
    """32 x 32 RGB, for finding images that look alike."""

    @property
    def caption(self) -> str:
        """`waving hand: dark skin tone. bye, hello, wave`."""
        return f"{self.label}. {', '.join(self.tags)}" if self.tags else self.label


def code_points(name: str) -> tuple[int, ...]:
    """Code points of a hexcode or file name, without what is spelt in two ways.

    The two packages differ in case, leading zeros, variation selectors, separators and
    the cancel tag that ends a subdivision flag.
    """
    codes = (int(part, 16) for part in re.split("[-_]", name))
    return tuple(code for code in codes if code not in (VARIATION, CANCEL))


def hexcode(codes: Iterable[int]) -> str:
    """`1f44b-1f3fe`: the spelling used for ids and groups."""
    return "-".join(f"{code:x}" for code in codes)


def base_of(codes: Sequence[int]) -> str:
    """The emoji that `codes` is a variant of: skin tone, hair, gender and direction
    dropped, and all families one.
    """
    dropped = (JOINER, *SKIN_TONES, *GENDER_SIGNS)
    # A sign or swatch alone is an emoji, too.
    kept = [code for code in codes if code not in dropped] or list(codes)
    if len(kept) > 1 and kept[-1] == RIGHT_ARROW:
        kept.pop()
    if len(kept) > 1 and kept[-1] in HAIR:
        kept.pop()
    if len(kept) > 1 and {*kept} <= {ADULT, CHILD, *AS_ADULT, *AS_CHILD}:
        return hexcode([FAMILY])
    mapped = tuple(REPRESENTATIVE.get(code, code) for code in kept)
    if mapped in SAME_SEQUENCE:
        return hexcode([SAME_SEQUENCE[mapped]])
    return hexcode(mapped)


def useful_tags(label: str, tags: Sequence[str]) -> tuple[str, ...]:
    """Tags that add to the label. A caption says each thing once: a word that stands
    twice can be copied from the other place instead of being read off the image.
    """
    label = label.lower()
    words = set(re.findall(r"\w+", label))
    kept = []
    for tag in tags:
        tag_words = set(re.findall(r"\w+", tag.lower()))
        # emojibase tags a woman walking "man", too.
        if GENDERED.search(label) and GENDERED.fullmatch(tag):
            continue
        if not tag_words <= words:
            kept.append(tag)
            words |= tag_words
    return tuple(kept)


def read_words(package: Path) -> dict[tuple[int, ...], Emoji]:
    """Every emoji of emojibase with skin-tone variants, without images."""
    entries = json.loads((package / "en" / "data.json").read_text())
    names = json.loads((package / "meta" / "groups.json").read_text())
    found = {}
    for entry in entries:
        for variant in (entry, *entry.get("skins", ())):
            codes = code_points(variant["hexcode"])
            found[codes] = Emoji(
                hexcode=hexcode(codes),
                base=base_of(codes),
                label=variant["label"],
                tags=useful_tags(variant["label"], entry.get("tags", ())),
                group=names["groups"].get(str(entry.get("group")), ""),
                subgroup=names["subgroups"].get(str(entry.get("subgroup")), ""),
                image=b"",
                thumbnail=b"",
            )
    return found


def read_image(path: Path) -> Image.Image:
    """`path` centred on a white square of `SIZE` pixels."""
    with Image.open(path) as file:
        drawing = file.convert("RGBA")
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side), "white")
    place = ((side - drawing.width) // 2, (side - drawing.height) // 2)
    square.alpha_composite(drawing, place)
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def match(images: Path, words: Mapping[tuple[int, ...], Emoji]) -> list[Emoji]:
    """Emoji that have an image and a label; prints the files that do not."""
    emoji: dict[tuple[int, ...], Emoji] = {}
    unmatched, twice = [], []
    for path in sorted((images / "assets").glob("*.webp")):
        codes = code_points(path.stem)
        if codes not in words:
            unmatched.append(path.name)
        elif codes in emoji:
            twice.append(path.name)
        else:
            picture = read_image(path)
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
            small = picture.resize((32, 32), Image.Resampling.BOX).tobytes()
            emoji[codes] = replace(
                words[codes], image=buffer.getvalue(), thumbnail=small
            )
    print(f"{len(emoji)} emoji; {len(words) - len(emoji)} labels without an image")
    print(f"files without a label: {', '.join(unmatched) or 'none'}")
    print(f"files that spell an emoji a second time, left out: {len(twice)}")
    return list(emoji.values())


def join_lookalikes(emoji: Sequence[Emoji]) -> list[Emoji]:
    """One `base` for groups that hold near-identical images; prints each pair."""
    pixels = np.stack([np.frombuffer(one.thumbnail, np.uint8) for one in emoji])
    pixels = pixels.astype(np.float32)
    squares = (pixels**2).sum(axis=1)
    joined: dict[str, str] = {}

    def find(base: str) -> str:
        while base in joined:
            base = joined[base]
        return base

    for i, one in enumerate(emoji):
        distances = squares[i] + squares - 2 * pixels @ pixels[i]
        alike = np.flatnonzero(distances < ALIKE_RMS**2 * pixels.shape[1])
        for j in alike[alike > i]:
            first, second = sorted((find(one.base), find(emoji[j].base)))
            if first != second:
                print(f"look alike, one group: {one.label} | {emoji[j].label}")
                joined[second] = first
    return [replace(one, base=find(one.base)) for one in emoji]


def write(emoji: Sequence[Emoji], output: Path) -> None:
    """Write the table. Rows are in hash order, so that any head of the file, and any
    shard made of a range of it, is a fair sample.
    """
    rows = sorted(emoji, key=lambda one: hashlib.sha256(one.hexcode.encode()).digest())
    columns = ["image", "caption", "label", "tags"]
    columns += ["hexcode", "base", "group", "subgroup"]
    table = pa.table({name: [getattr(one, name) for one in rows] for name in columns})
    pq.write_table(
        table,
        output,
        row_group_size=ROW_GROUP,
        compression={name: "none" if name == "image" else "zstd" for name in columns},
        use_dictionary=["base", "group", "subgroup"],
    )
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    groups = len({one.base for one in rows})
    size = output.stat().st_size / 1e6
    print(f"{output}: {len(rows)} rows, {groups} groups, {size:.1f} MB")
    print(f"sha256 {digest}")


def main() -> None:
    """Build the corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="image package")
    parser.add_argument("--words", type=Path, required=True, help="emojibase package")
    default = Path(__file__).with_name("emoji.parquet")
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    write(join_lookalikes(match(args.images, read_words(args.words))), args.output)


if __name__ == "__main__":
    main()
