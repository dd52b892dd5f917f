"""A replayed step is the step that was, or will be, trained on."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from pipeline.config import to_yaml
from pipeline.manifest import load_manifest
from tests.conftest import launch_environment, python
from tests.pipeline.corpora import encoded, picture
from tests.trainer.test_quarantine import BEARS, flip, index_of
from tests.trainer.test_report import HOSTILE, Page
from tests.trainer.tiny import TINY, TINY_MASKVLM, column, config
from trainer.contract import FROZEN
from trainer.dataset import Dataset
from trainer.loader import Loader
from trainer.masking import Masks, Mode
from trainer.replay import main
from trainer.replay_data import replay
from trainer.replay_text import text
from trainer.stream import Stream

STEPS = 9
TEXTS = (HOSTILE, "a kite & a 'quiet' river", "a sign that reads [MASK] </title>")


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps, seven of which make an epoch."""
    run = tmp_path_factory.mktemp("replay") / "run"
    words = (*TINY, f"--data={shards}", f"--output={run}", f"--max_steps={STEPS}")
    done = python("-m", "trainer.pretrain", *words, env=launch_environment())
    assert done.returncode == 0, done.stdout
    return run


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 30 images, each with the same three captions in markup's words."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = []
    for seed in range(30):
        (folder / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
        rows.append({"image": f"{seed}.jpg", "captions": list(TEXTS)})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = python(
        "-m",
        "pipeline.preprocess",
        f"--input={folder / 'corpus.jsonl'}",
        f"--output={folder / 'shards'}",
        "--columns.image=image",
        "--columns.caption=captions",
        "--shard.samples=8",
        "--image.size=32",
        "--tokenizer=train:300",
        "--text.unescape_html=false",
        "--workers=1",
    )
    assert done.returncode == 0, done.stdout
    return folder / "shards"


def young(
    folder: Path, shards: Path | str, *more: str, tiny: Sequence[str] = TINY
) -> Path:
    """A run that has its configuration and nothing else yet."""
    folder.mkdir(exist_ok=True)
    keys = config(shards, folder, *more, tiny=tiny)
    (folder / "config.yaml").write_text(to_yaml(keys))
    return folder


def replayed(run: Path, step: int, *more: str) -> dict[str, Any]:
    """What the command writes as JSON."""
    output = run.parent / "replayed.json"
    assert main([str(run), f"--step={step}", f"--json={output}", *more]) == 0
    return json.loads(output.read_text())


def uids_of(printed: str) -> list[str]:
    return re.findall(r"uid ([0-9a-f]{16})\b", printed)


@dataclasses.dataclass(frozen=True)
class Row:
    """A pair as a loader of one rank gives it."""

    lane: int
    place: tuple[int, int]
    uid: str
    caption: int
    tokens: list[str]
    pixels: np.ndarray
    mode: Mode
    text_mask: list[bool]
    image_mask: list[bool]


def loaded(
    shards: Path, step: int, *more: str, rank: int = 0, world: int = 1
) -> list[Row]:
    """The pairs of a step, counted from 1, of one rank."""
    keys = config(shards, Path("unused"), *more)
    loader = Loader(Dataset(shards, "train"), keys, rank=rank, world_size=world)
    tokenizer = Tokenizer.from_file(str(shards / "tokenizer" / "tokenizer.json"))
    with ThreadPoolExecutor(1) as pool:
        batch = loader.load(step - 1, pool)
    places = loader.order.samples_of(step - 1, loader.lanes).places.tolist()
    rows = []
    for micro in batch.micro_batches:
        masks = loader.masks(
            micro.uids, micro.stream, micro.epochs, micro.text_capacity, step=micro.step
        )
        for pair, uid in enumerate(micro.uids.tolist()):
            ids = ids_of(micro.stream, micro.token_ids.tolist(), pair)
            rows.append(
                Row(
                    lane=loader.lanes[len(rows) // loader.order.per_lane],
                    place=tuple(places[len(rows)]),
                    uid=f"{uid % (1 << 64):016x}",
                    caption=int(micro.captions[pair]),
                    tokens=[tokenizer.id_to_token(token) for token in ids],
                    pixels=micro.pixels[pair].numpy(),
                    mode=Mode(int(masks.mode[pair])),
                    text_mask=text_mask(masks, micro.stream, pair),
                    image_mask=masks.image[pair].tolist(),
                )
            )
    return rows


def ids_of(stream: Stream, ids: list[int], pair: int) -> list[int]:
    pairs = stream.text_pair[: stream.text_used].tolist()
    return [token for token, owner in zip(ids, pairs, strict=False) if owner == pair]


def text_mask(masks: Masks, stream: Stream, pair: int) -> list[bool]:
    return masks.text[pair, : int(stream.n_words[pair])].tolist()


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 5), (2, 4), (4, 2), (12, 1)])
def test_each_rank_is_shown_the_pairs_its_loader_gives(
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    world: int,
    micro: int,
) -> None:
    run = young(tmp_path / "run", shards)
    dataset = Dataset(shards, "train")
    for rank in range(world):
        rows = loaded(shards, 9, f"--micro_batch={micro}", rank=rank, world=world)
        found = replayed(run, 9, f"--rank={rank}", f"--world_size={world}")
        assert uids_of(capsys.readouterr().out) == [row.uid for row in rows]
        for pair, row in zip(found["pairs"], rows, strict=True):
            words = np.flatnonzero(row.text_mask) + 1
            assert pair["lane"] == row.lane
            assert pair["shard"] == dataset.shard(row.place[0]).name
            assert pair["sample"] == row.place[1]
            assert pair["uid"] == row.uid
            assert pair["chosen"] == row.caption
            assert pair["tokens"] == row.tokens
            assert pair["masked_tokens"] == words.tolist()
            assert pair["masked_squares"] == np.flatnonzero(row.image_mask).tolist()
            assert pair["mode"] == row.mode.name.lower().replace("_", "-")


def test_texts_are_shown_with_the_image_they_are_matched_with(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    itm = ("--model.itm_weight=1", "--model.itm_group=3")
    run, page = young(tmp_path / "run", shards, *itm), tmp_path / "page.html"
    found = replayed(run, 9, f"--html={page}")["pairs"]
    loader = Loader(
        Dataset(shards, "train"),
        config(shards, run, *itm, "--micro_batch=3"),
        rank=0,
        world_size=1,
    )
    expected = []
    with ThreadPoolExecutor(1) as decoders:
        for part in loader.micros(8, decoders):
            drawn = loader.matching(part.batch)
            assert drawn
            uids = part.batch.uids[drawn.image_of].numpy().view(np.uint64)
            expected += [f"{uid:016x}" for uid in uids.tolist()]
    assert [pair["image_of"] for pair in found] == expected
    others = [pair for pair in found if pair["image_of"] != pair["uid"]]
    assert 0 < len(others) < len(found)
    printed = capsys.readouterr().out
    assert printed.count("matched with its own image") == len(found) - len(others)
    for pair in others:
        told = f"mismatched: with the image of uid {pair['image_of']}"
        assert told in printed
        assert told in page.read_text()
    assert {pair["image_of"] for pair in replayed(young(run, shards), 9)["pairs"]} == {
        None
    }


def test_a_step_of_a_schedule_is_shown_with_its_own_rates_and_words(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--mask.schedule.steps=12",
        "--mask.schedule.heavy_start=0.25",
        "--mask.image_block=2",
        "--mask.keep_share=0.3",
        "--mask.random_share=0.3",
    )
    run = young(tmp_path / "run", shards, *words)
    counts = []
    for step in (1, 13):
        rows = loaded(shards, step, *words)
        found = replayed(run, step)
        for pair, row in zip(found["pairs"], rows, strict=True):
            masked = (np.flatnonzero(row.text_mask) + 1).tolist()
            assert pair["masked_tokens"] == masked
            assert pair["masked_squares"] == np.flatnonzero(row.image_mask).tolist()
            shown = {int(place): token for place, token in pair["shown_tokens"].items()}
            assert set(shown) <= set(masked)
        printed = capsys.readouterr().out
        n_shown = sum(len(pair["shown_tokens"]) for pair in found["pairs"])
        assert printed.count("[MASK: shows ") == n_shown > 0
        assert printed.count("[MASK]") == found["masked_words"] - n_shown > 0
        heavy = [row for row in rows if row.mode == Mode.TEXT_HEAVY]
        counts.append(sum(sum(row.text_mask) for row in heavy))
    kept = [
        pair["tokens"][int(place)] == token
        for pair in found["pairs"]
        for place, token in pair["shown_tokens"].items()
    ]
    assert 0 < sum(kept) < len(kept)
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize("loss", ["itc", "itm"])
def test_a_model_that_draws_its_negatives_on_the_device_is_replayed(
    shards: Path, tmp_path: Path, loss: str
) -> None:
    """By similarity of features, which no step has before its weights."""
    weights = [f"--model.{one}_weight={int(one == loss)}" for one in ("itc", "itm")]
    run = young(tmp_path / "run", shards, *weights, tiny=TINY_MASKVLM)
    page = tmp_path / "page.html"
    pairs = replayed(run, 9, f"--html={page}")["pairs"]
    assert pairs
    assert {pair["image_of"] for pair in pairs} == {None}
    assert "matched with" not in page.read_text()


@pytest.mark.parametrize("step", [1, 7, 8, STEPS])
def test_the_digest_of_a_past_step_is_the_one_the_trainer_recorded(
    trained: Path, step: int
) -> None:
    found = replayed(trained, step)
    assert found["matches"] is True
    assert found["sample_digest"] == column(trained, "sample_digest")[step - 1]
    assert found["epoch"] == column(trained, "epoch")[step - 1]
    assert found["metrics"]["loss"] == column(trained, "loss")[step - 1]
    assert found["step_in_epoch"] == (step - 1) % 7 + 1


def test_the_command_prints_the_step_and_writes_what_is_asked_for(
    trained: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "new" / "step.html", tmp_path / "step.json"
    words = (f"--html={outputs[0]}", f"--json={outputs[1]}")
    done = python("-m", "trainer.replay", trained, "--step", "8", *words)
    assert done.returncode == 0, done.stdout
    digest, loss = (column(trained, name)[7] for name in ("sample_digest", "loss"))
    assert "epoch 1, step 1 of 7 in it" in done.stdout
    assert f"sample_digest {digest} (full) matches metrics.jsonl" in done.stdout
    assert f"loss {loss:.5g}" in done.stdout
    assert len(uids_of(done.stdout)) == len(set(uids_of(done.stdout))) == 24
    assert uids_of(done.stdout) == uids_of(outputs[0].read_text())
    found = json.loads(outputs[1].read_text())
    assert [pair["uid"] for pair in found["pairs"]] == uids_of(done.stdout)
    text_masks = sum(len(pair["masked_tokens"]) for pair in found["pairs"])
    assert done.stdout.count("[MASK]") == text_masks == found["masked_words"]
    for pair in found["pairs"]:
        assert f"key {pair['key']}" in done.stdout
        left, top, right, bottom = pair["box"]
        assert f"32x32: {left},{top} to {right},{bottom} (" in done.stdout


def test_a_part_or_a_few_pairs_leave_the_digest_that_of_the_whole_step(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replayed(trained, 4)
    for more, pairs in (
        (["--lane=3"], whole["pairs"][6:8]),
        (["--pairs=3"], whole["pairs"][:3]),
        (["--rank=1", "--world_size=4", "--pairs=2"], whole["pairs"][6:8]),
    ):
        found = replayed(trained, 4, *more)
        assert found["pairs"] == pairs
        assert {**found, "pairs": whole["pairs"]} == whole
        assert found["matches"] is True
    assert "4 more: --pairs 6 shows them" in capsys.readouterr().out


@pytest.mark.parametrize("step", [STEPS + 1, 40, 12_345])
def test_a_step_nobody_has_trained_yet_is_shown_as_it_will_be(
    trained: Path, shards: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = replayed(trained, step)
    printed = capsys.readouterr().out
    rows = loaded(shards, step)
    assert uids_of(printed) == [row.uid for row in rows]
    assert [pair["tokens"] for pair in found["pairs"]] == [row.tokens for row in rows]
    assert found["epoch"] == (step - 1) // 7
    assert found["matches"] is found["metrics"] is None
    assert "not recorded: metrics.jsonl has no such step" in printed
    assert ("beyond the schedule's 12" in printed) == (step > 12)


def test_another_digest_is_told_with_its_likely_cure(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    metrics = (copy / "metrics.jsonl").read_text()
    digest = column(trained, "sample_digest")[4]
    (copy / "metrics.jsonl").write_text(metrics.replace(digest, "0" * 16))
    page = tmp_path / "page.html"
    assert main([str(copy), "--step=5", f"--html={page}"]) == 1
    printed = capsys.readouterr().out
    assert f"{digest} (full) DIFFERS: metrics.jsonl has {'0' * 16}" in printed
    assert "another version of this code" in printed
    assert "another version of this code" in Page(page.read_text()).text
    # What is frozen is known without a checkpoint; without either nothing says that the
    # dataset is the same.
    shutil.rmtree(copy / "checkpoints")
    assert main([str(copy), "--step=5"]) == 1
    assert "another version of this code" in capsys.readouterr().out
    (copy / FROZEN).unlink()
    assert main([str(copy), "--step=5"]) == 1
    assert "name the right one with --data" in capsys.readouterr().out


def test_a_digest_of_before_the_key_changed_is_recognised(
    trained: Path, tmp_path: Path, shards: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    found = replayed(young(copy, shards, "--digest=samples"), 5)
    assert found["digest_covers"] == "full"
    assert found["matches"] is True


def test_every_caption_is_shown_and_the_chosen_one_marked(
    captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = young(tmp_path / "run", captioned, "--global_batch=12")
    rows = loaded(captioned, 5, "--global_batch=12")
    found = replayed(run, 5)
    printed = capsys.readouterr().out
    assert len({row.caption for row in rows}) > 1
    for pair, row in zip(found["pairs"], rows, strict=True):
        assert tuple(pair["captions"]) == TEXTS
        assert pair["chosen"] == row.caption
    for number, caption in enumerate(TEXTS, start=1):
        chosen = sum(row.caption == number - 1 for row in rows)
        assert printed.count(f"caption {number} of 3  {caption}\n") == len(rows)
        assert printed.count(f"> caption {number} of 3  ") == chosen


def test_cut_captions_say_how_much_is_missing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = young(tmp_path / "run", shards, "--text.max_tokens=6")
    dataset = Dataset(shards, "train")
    found = replayed(run, 2)
    cut = [pair for pair in found["pairs"] if pair["cut_tokens"]]
    assert len(cut) == found["cut_captions"] > 0
    assert capsys.readouterr().out.count("cut by text.max_tokens") == len(cut)
    names = [shard.name for _, shard in dataset.numbered()]
    for pair in found["pairs"]:
        place = np.array([[names.index(pair["shard"]), pair["sample"]]])
        (stored,) = dataset.captions(int(place[0, 0]), dataset.records(place)[0])
        assert len(stored) - 1 == pair["words"] + pair["cut_tokens"]
        assert pair["words"] == len(pair["tokens"]) - 2 <= 4


def test_the_page_shows_the_pixels_the_model_gets_and_greys_the_masked(
    shards: Path, tmp_path: Path
) -> None:
    run, output = young(tmp_path / "run", shards), tmp_path / "page.html"
    assert main([str(run), "--step=9", f"--html={output}"]) == 0
    shown = Page(output.read_text())
    images = [
        np.asarray(Image.open(BytesIO(base64.b64decode(link.partition(",")[2]))))
        for link in shown.links
    ]
    rows = loaded(shards, 9)
    assert len(images) == 2 * len(rows)
    for row, whole, left in zip(rows, images[::2], images[1::2], strict=True):
        assert np.array_equal(whole, row.pixels)
        for square, masked in enumerate(row.image_mask):
            y, x = (4 * place for place in divmod(square, 4))
            part = left[y : y + 4, x : x + 4]
            expected = 200 if masked else row.pixels[y : y + 4, x : x + 4]
            assert (part == expected).all()
    assert shown.classes["masked"] == sum(sum(row.text_mask) for row in rows)


def test_the_page_escapes_captions_and_refers_to_nothing_outside(
    captioned: Path, tmp_path: Path
) -> None:
    run = young(tmp_path / "run", captioned, "--global_batch=12")
    output = tmp_path / "page.html"
    assert main([str(run), "--step=1", f"--html={output}"]) == 0
    text = output.read_text()
    shown = Page(text)
    assert shown.tags["script"] == shown.tags["link"] == 0
    assert shown.tags["title"] == 1
    for caption in TEXTS:
        assert shown.words.count(caption) == 12
    assert all(link.startswith("data:image/png;base64,") for link in shown.links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "color-scheme" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_the_loss_around_a_step_that_has_one(
    trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "page.html"
    main([str(trained), "--step=6", f"--html={output}"])
    shown = Page(output.read_text())
    assert "Loss around step 6, the dot" in shown.words
    assert f"{column(trained, 'loss')[5]:.4f}" in shown.words
    assert column(trained, "sample_digest")[5] in shown.words
    assert shown.classes["dot"] == shown.classes["line"] - 1 == 1
    main([str(trained), "--step=60", f"--html={output}"])
    assert Page(output.read_text()).tags["svg"] == 0


def test_captions_cannot_command_a_terminal(shards: Path, tmp_path: Path) -> None:
    found = replay(young(tmp_path / "run", shards), step=1, limit=1)
    pair = dataclasses.replace(found.pairs[0], captions=["\x1b[2Jgone\nlane 9"])
    printed = text(dataclasses.replace(found, pairs=[pair]))
    assert "\x1b" not in printed
    assert r"\x1b[2Jgone\nlane 9" in printed


def test_tars_that_were_only_indexed_show_their_tokens_as_captions(
    captioned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for tar in sorted((captioned / "train").glob("*.tar")):
        shutil.copy(tar, folder)
    done = python("-m", "pipeline.index", folder, f"--tokenizer={captioned}/tokenizer")
    assert done.returncode == 0, done.stdout
    found = replayed(young(tmp_path / "run", folder, "--global_batch=12"), 1)
    for pair in found["pairs"]:
        assert pair["key"] is None
        assert "river" in " ".join(pair["captions"])


def test_stand_ins_of_damaged_samples_are_those_of_the_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, run = shutil.copytree(shards, tmp_path / "copy"), tmp_path / "run"
    records = index_of(copy)
    for record in records[:6]:
        flip(copy, record, "jpg")
    words = (*TINY, BEARS, f"--data={copy}", f"--output={run}", f"--max_steps={STEPS}")
    done = python("-m", "trainer.pretrain", *words, env=launch_environment())
    assert done.returncode == 0, done.stdout
    replaced = column(run, "replaced")
    late = max(step for step in range(1, STEPS + 1) if replaced[step - 1])
    for step in (1, late):
        found = replayed(run, step)
        printed = capsys.readouterr().out
        assert found["matches"] is True
        assert found["replaced"] == replaced[step - 1]
        assert (
            printed.count("stands in for train/shard-000000.tar") == found["replaced"]
        )
    # The checkpoint lists them: a dataset that was repaired since changes nothing.
    assert replayed(run, late, f"--data={shards}") == {**found, "data": str(shards)}
    for record in records[6:12]:
        flip(copy, record, "jpg")
    steps = [step for step in range(1, STEPS + 1) if main([str(run), f"--step={step}"])]
    assert steps
    assert f"python -m pipeline.validate {copy}" in capsys.readouterr().out


def test_damage_to_members_that_no_step_uses_is_told_too(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    for tar in (copy / "train").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b'"caption"', b'"capture"'))
    cure = f"sample of uid .* `python -m pipeline.validate {copy}`"
    with pytest.raises(ValueError, match=cure):
        main([str(trained), "--step=3", f"--data={copy}"])


def test_a_dataset_that_moved_is_named_with_data(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    whole = replayed(trained, 3)
    assert replayed(trained, 3, f"--data={moved}") == {**whole, "data": str(moved)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}", "--step=1"], "is no run: it has no config.yaml; train it first"),
        (["{run}"], "--step must be given"),
        (["{run}", "--step=0"], "counted from 1, as in metrics.jsonl; name 1 or more"),
        (["{run}", "--step", "-3"], "counted from 1, as in metrics.jsonl"),
        (["{run}", "--step=soon"], "step"),
        (["{run}", f"--step={10**9}"], f"is defined up to step {7 << 24}: name that"),
        (["{run}", f"--step={10**20}"], f"is defined up to step {7 << 24}: name that"),
        (["{run}", "--step=1", "--pairs=0"], "name 1 or more"),
        (["{run}", "--step=1", "--lane=12"], "this run has lanes 0 to 11"),
        (["{run}", "--step=1", "--rank=1"], "give both"),
        (
            ["{run}", "--step=1", "--rank=0", "--world_size=5"],
            "start 1, 2, 3, 4, 6, 12",
        ),
        (["{run}", "--step=1", "--rank=4", "--world_size=4"], "has ranks 0 to 3"),
        (
            ["{run}", "--step=1", "--rank=0", "--world_size=4", "--lane=1"],
            "give one of them",
        ),
        (
            ["{run}", "--step=1", "--data={tmp}/none"],
            "is not there: name where it is now with --data",
        ),
        (["{run}", "--step=1", "--data={tmp}"], "not a finished dataset"),
        (["{run}", "--step=1", "--pair=3"], "Did you mean 'pairs'?"),
    ],
)
def test_wrong_calls_say_what_to_do_and_write_nothing(
    trained: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    given = [word.format(tmp=tmp_path, run=trained) for word in words]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        main([*given, f"--html={tmp_path}/page.html"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_dataset_than_the_runs_is_refused_with_both_hashes(
    trained: Path, shards: Path, captioned: Path
) -> None:
    done = python("-m", "trainer.replay", trained, "--step=1", f"--data={captioned}")
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert "Name the one it was trained on with --data" in done.stdout
    for path in (shards, captioned):
        assert load_manifest(path).sha256 in done.stdout


def test_replay_needs_neither_ray_nor_pyarrow_nor_deepspeed(
    trained: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; sys.modules.update(ray=None, pyarrow=None, deepspeed=None); "
        "from trainer.replay import main; sys.exit(main(sys.argv[1:]))"
    )
    done = python("-c", script, trained, "--step=2", f"--html={tmp_path}/page.html")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize("mixture", ["weights", "none"])
def test_the_last_step_that_a_refusal_names_can_be_replayed(
    mixed: Path, tmp_path: Path, mixture: str
) -> None:
    run = young(tmp_path / "run", mixed, f"--mixture={mixture}")
    with pytest.raises(ValueError, match="is defined up to step") as refused:
        replay(run, step=10**18)
    last = int(re.findall(r"\d+", str(refused.value))[-1])
    assert replay(run, step=last, limit=1).step == last
    with pytest.raises(ValueError, match=f"defined up to step {last}:"):
        replay(run, step=last + 1)


def test_a_run_on_several_datasets_is_told_to_be_given_all_of_them(
    mixed: Path, extra: Path, tmp_path: Path
) -> None:
    both = f"[{mixed}, {extra}]"
    mixture = "--mixture={faces: 2, flags: 1, signs: 1}"
    run = young(tmp_path / "run", both, mixture)
    whole = replayed(run, 3)
    with pytest.raises(ValueError, match="no source 'signs' here") as refused:
        main([str(run), "--step=3", f"--data={mixed}"])
    assert f"give all of them, in the same order, --data '{both}'" in str(refused.value)
    moved = shutil.copytree(extra, tmp_path / "moved")
    found = replayed(run, 3, f"--data=[{mixed}, {moved}]")
    assert found == {**whole, "data": [str(mixed), str(moved)]}


def test_a_mixtures_pairs_say_their_source_and_its_epoch(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = young(tmp_path / "run", mixed)
    page = tmp_path / "step.html"
    found = replayed(run, 60, f"--html={page}")
    keys = config(mixed, Path("unused"))
    loader = Loader(Dataset(mixed, "train"), keys, rank=0, world_size=1)
    drawn = loader.order.samples_of(59, loader.lanes)
    names = [source.name for source in loader.order.sources]
    assert [pair["source"] for pair in found["pairs"]] == [
        names[number] for number in drawn.sources.tolist()
    ]
    assert [pair["epoch"] for pair in found["pairs"]] == drawn.epochs.tolist()
    assert sum(found["sources"].values()) == len(found["pairs"])
    assert found["step_in_epoch"] is None
    counted = ", ".join(f"{count} {name}" for name, count in found["sources"].items())
    printed = capsys.readouterr().out
    assert f"sources: {counted}" in printed
    assert counted in page.read_text()
    first = found["pairs"][0]
    where = f"lane 0, {first['source']}, its epoch {first['epoch']}, {first['shard']}"
    assert where in printed
    assert where in page.read_text()
