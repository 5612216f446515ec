"""Layouts of every family, against layouts written down by hand: in a forward and under generate()."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from support.families import FAMILIES, IMAGE, START, TEXT, VIDEO, Family, Image, Part, Sample, Text, Video
from tokenreduce_adapters import ADAPTERS, tokenreduce_adapters
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.adapter import ModelAdapter, Prompt
from tokenreduce.errors import LayoutError, UnsupportedError
from tokenreduce.layout import NEWLINE, PLAIN, TIMESTAMP, WRAPPER, TokenLayout

VIDEO_FAMILIES = [name for name, family in FAMILIES.items() if family.video]
CASES = [(name, mix) for name, family in FAMILIES.items() for mix in family.mixes()]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_of(name: str) -> Any:
    return FAMILIES[name].model()


def adapter_of(model: nn.Module) -> ModelAdapter:
    """The one adapter that fits `model`."""
    (adapter,) = [cls() for cls in ADAPTERS if cls().matches(model)]
    return adapter


def layouts(model: Any, inputs: dict[str, Tensor], **generate: Any) -> list[TokenLayout]:
    """The layout of every forward of one call, each as the adapter sees it from outside the decoder.

    Without `generate` the call is one plain forward.
    """
    adapter, found = adapter_of(model), []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        prompt = Prompt.read(ids, kwargs)
        found.append(adapter.layout(model, prompt))

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            if generate:
                model.generate(**inputs, **{"max_new_tokens": 2, "do_sample": False} | generate)
            else:
                model(**inputs)
    finally:
        handle.remove()
    return found


def assert_same(got: TokenLayout, expected: TokenLayout) -> None:
    for name in ("slot", "frame", "medium", "marker"):
        assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
    assert got.protected is None


def assert_grid(forward: TokenLayout, prefill: TokenLayout) -> None:
    """In raster order, no two tokens of a frame in one place, none without one but newlines; alike in both kinds of call."""
    row, column = forward.row, forward.column
    assert row is not None
    assert column is not None
    assert prefill.row is not None
    assert torch.equal(row, prefill.row)
    assert prefill.column is not None
    assert torch.equal(column, prefill.column)
    placed = forward.vision & (forward.marker != NEWLINE)
    assert torch.equal(row >= 0, placed)
    assert torch.equal(column >= 0, placed)
    for number, here in enumerate(placed):
        keys = torch.stack([forward.media()[number], forward.frame[number], row[number], column[number]])
        places = [tuple(place) for place in keys[:, here].T.tolist()]
        assert len(set(places)) == len(places)
        assert places == sorted(places)


def columns(layout: TokenLayout, part: slice) -> TokenLayout:
    return TokenLayout(*(getattr(layout, name)[:, part] for name in ("slot", "frame", "medium", "marker")))


def assert_text(layout: TokenLayout) -> None:
    assert not bool(layout.vision.any())
    assert not bool(layout.marker.any())


@pytest.mark.parametrize(("name", "mix"), CASES)
def test_layout_of_a_forward_and_under_generate(name: str, mix: str) -> None:
    family = FAMILIES[name]
    sample = family.sample([family.mix(mix)])
    (forward,) = layouts(model_of(name), sample.inputs)
    prefill, decode = layouts(model_of(name), sample.inputs, use_cache=True)
    assert_same(forward, sample.layout)
    assert_same(prefill, sample.layout)
    assert_text(decode)
    if forward.vision.any():
        assert_grid(forward, prefill)


@pytest.mark.parametrize(
    ("name", "parts", "rows", "columns"),
    [
        ("llava_onevision", [Video(1)], [0, 0, 0, 1, 1, 1, 2, 2, 2, -1], [0, 1, 2, 0, 1, 2, 0, 1, 2, -1]),
        (
            "qwen2_vl",
            [Video(2, (1, 2)), Image((8, 24))],
            [-1, 0, 0, 0, 0, -1, -1, 0, 0, 0, -1],
            [-1, 0, 1, 0, 1, -1, -1, 0, 1, 2, -1],
        ),
        ("qwen2_5_vl", [Video(1, (2, 2))], [-1, 0, 0, 1, 1, -1], [-1, 0, 1, 0, 1, -1]),
    ],
)
def test_rows_and_columns_by_hand(name: str, parts: list[Part], rows: list[int], columns: list[int]) -> None:
    sample = FAMILIES[name].sample([parts])
    (layout,) = layouts(model_of(name), sample.inputs)
    assert layout.row is not None
    assert layout.column is not None
    assert (layout.row[0].tolist(), layout.column[0].tolist()) == (rows, columns)


# ------------------------------------------------------------------------------- small cases, written out in full

NL, W, S = NEWLINE, WRAPPER, TIMESTAMP
LITERAL: dict[str, tuple[list[Part], list[int], list[int], list[int]]] = {
    # family: parts, slots, frames, markers
    "llava_onevision": (
        [Text(1), Video(2), Text(1)],
        [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1],
        [-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, NL, 0],
    ),
    "llava_next_video": (
        [Text(1), Video(2), Text(1)],
        [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, -1],
        [-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1],
        [0] * 20,
    ),
    "qwen2_vl": (
        [Text(1), Video(2, (1, 2)), Text(1), Image((8, 24))],
        [-1, -1, 0, 1, 0, 1, -1, -1, -1, 0, 1, 2, -1],
        [-1, -1, 0, 0, 1, 1, -1, -1, -1, 0, 0, 0, -1],
        [0, W, 0, 0, 0, 0, W, 0, W, 0, 0, 0, W],
    ),
    "qwen2_5_vl": (
        [Video(3, (1, 1)), Text(1)],
        [-1, 0, 0, 0, -1, -1],
        [-1, 0, 1, 2, -1, -1],
        [W, 0, 0, 0, W, 0],
    ),
    "qwen3_vl": (
        [Text(1), Video(2, (1, 2)), Text(1)],
        [-1, -1, -1, -1, -1, 0, 1, -1, -1, -1, -1, -1, 0, 1, -1, -1],
        [-1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, 1, 1, -1, -1],
        [0, 0, 0, 0, W, 0, 0, W, S, S, S, W, 0, 0, W, 0],
    ),
    "internvl": (
        [Video(2), Text(1)],
        [-1, -1, -1, -1, *range(9), -1, -1, -1, -1, -1, -1, *range(9), -1, -1],
        [-1, -1, -1, -1, *[0] * 9, -1, -1, -1, -1, -1, -1, *[1] * 9, -1, -1],
        [0, 0, 0, W, *[0] * 9, W, S, S, S, S, W, *[0] * 9, W, 0],
    ),
    "smolvlm": (
        [Text(1), Image((24, 48))],
        [-1, -1, -1, *range(9), -1, -1, *range(9, 18), -1, -1, -1, -1, *range(18, 27), -1],
        [-1, -1, -1, *[0] * 9, -1, -1, *[0] * 9, -1, -1, -1, -1, *[0] * 9, -1],
        [0, W, W, *[0] * 9, W, W, *[0] * 9, W, W, W, W, *[0] * 9, W],
    ),
    "llava": ([Text(1), Image()], [-1, *range(36)], [-1, *[0] * 36], [0] * 37),
}


@pytest.mark.parametrize("name", LITERAL)
def test_layout_written_out(name: str) -> None:
    parts, slot, frame, marker = LITERAL[name]
    inputs = FAMILIES[name].sample([parts]).inputs
    for layout in (layouts(model_of(name), inputs)[0], layouts(model_of(name), inputs, max_new_tokens=1)[0]):
        assert layout.slot.tolist() == [slot]
        assert layout.frame.tolist() == [frame]
        assert layout.marker is not None
        assert layout.marker.tolist() == [marker]


# ------------------------------------------------------------------------------------ batches, beams, later turns


def ragged(family: Family) -> Sample:
    """Four rows of different lengths, left-padded, one of them text only."""
    names = ("video_image", "text", "two_videos", "image_video") if family.video else ("image", "text", "two_images")
    return family.sample([family.mix(name) for name in names])


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_batch_with_left_padding(name: str) -> None:
    sample = ragged(FAMILIES[name])
    assert int(sample.inputs["attention_mask"].sum()) < sample.inputs["attention_mask"].numel()
    assert_same(layouts(model_of(name), sample.inputs)[0], sample.layout)
    assert_same(layouts(model_of(name), sample.inputs, max_new_tokens=1)[0], sample.layout)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_repeated_rows(name: str, how: dict[str, Any]) -> None:
    family = FAMILIES[name]
    sample = ragged(family)
    torch.manual_seed(0)
    prefill, decode = layouts(model_of(name), sample.inputs, **how)
    copies = how.get("num_beams") or how["num_return_sequences"]
    assert prefill.shape[0] == copies * sample.layout.shape[0]
    assert_same(prefill, sample.layout.expand(prefill.shape[0]))
    assert_text(decode)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_placeholder_without_features_is_text(name: str) -> None:
    """A generated id may happen to be a placeholder; prompt lookup even proposes those of the prompt."""
    model = model_of(name)
    adapter = adapter_of(model)
    ids = torch.tensor([[11, IMAGE, IMAGE, 12], [VIDEO, 11, 12, START]])
    for kwargs in ({}, {"mm_encoder_outputs": {}}, {"pixel_values": None, "mm_encoder_outputs": None}):
        layout = adapter.layout(model, Prompt(ids, None, None, kwargs))
        assert layout is not None
        assert_text(layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_lookup(name: str) -> None:
    family = FAMILIES[name]
    sample = family.sample([family.mix("video" if family.video else "image")])
    prefill, *later = layouts(model_of(name), sample.inputs, prompt_lookup_num_tokens=3, max_new_tokens=6)
    assert_same(prefill, sample.layout)
    assert later
    for layout in later:
        assert_text(layout)


def second_turn(name: str) -> tuple[Any, Any, Sample]:
    """A model, its output of a first turn with a medium, and a second turn with another."""
    family = FAMILIES[name]
    model = model_of(name)
    medium: Part = Video(3) if family.video else Image()
    first, second = family.sample([[Text(3), medium, Text(2)]]), family.sample([[Text(4), medium, Text(3)]], seed=9)
    with torch.no_grad():
        out = model.generate(**first.inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    return model, out, second


@pytest.mark.parametrize("name", FAMILIES)
def test_second_turn_as_a_forward(name: str) -> None:
    model, out, second = second_turn(name)
    inputs = {name: value for name, value in second.inputs.items() if name != "attention_mask"}
    (layout,) = layouts(model, {**inputs, "past_key_values": out.past_key_values})
    assert_same(layout, second.layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_second_turn_under_generate(name: str) -> None:
    """The new video only is encoded; the Qwen family needs the grids of both turns for its positions."""
    model, out, second = second_turn(name)
    inputs = dict(second.inputs)
    ids = inputs["input_ids"] = torch.cat([out.sequences, second.inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        grids = inputs.pop("video_grid_thw")
        with torch.no_grad():
            features = model.model.get_video_features(inputs.pop("pixel_values_videos"), grids, return_dict=True)
        inputs |= {"video_grid_thw": grids.repeat(2, 1), "mm_encoder_outputs": {"video": features}}
    prefill, decode = layouts(model, {**inputs, "past_key_values": out.past_key_values}, use_cache=True)
    held = prefill.shape[1] - second.layout.shape[1]  # the last token of the first turn is not in the cache yet
    assert held == 1
    assert_text(columns(prefill, slice(None, held)))
    assert_same(columns(prefill, slice(held, None)), second.layout)
    assert_text(decode)


# ------------------------------------------------------------------------------------------------ with the engine


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_that_keeps_all_changes_no_bit(name: str) -> None:
    model, inputs = model_of(name), ragged(FAMILIES[name]).inputs
    keep_all = {"name": "keep_all", "stages": [{"strategy": "random", "keep": 1.0, "at": 1}]}
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with tr.reduce(model, keep_all) as run:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
            assert len(run.trace.stages) > 0
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("preset", ["framefusion", "fastv"])
@pytest.mark.parametrize("name", FAMILIES)
def test_presets_under_generate(name: str, preset: str) -> None:
    """Vision tokens go, text stays, in a ragged batch and with beams."""
    model, sample = model_of(name), ragged(FAMILIES[name])
    text = ~sample.layout.vision & sample.inputs["attention_mask"].bool()
    for beams in (1, 2):
        with torch.no_grad(), tr.reduce(model, preset, budget=0.85) as run:
            model.generate(**sample.inputs, max_new_tokens=3, do_sample=False, num_beams=beams)
        for row, kept in enumerate(run.trace.kept):
            words = text[row // beams].nonzero().flatten().tolist()
            assert set(words) <= set(kept.tolist())
            vision = int(sample.layout.vision[row // beams].sum())
            assert len(kept) - len(words) < vision or vision == 0


# ---------------------------------------------------------------------------------------------- family by family


@pytest.mark.parametrize("size", [(24, 24), (48, 24), (40, 24), (20, 48)])
@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video", "llava_next"])
def test_tiled_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    """Newlines from the sizes in a forward, from the features under generate(), both as counted by hand."""
    sample = FAMILIES[name].sample([[Text(2), Image(size), Text(2)]])
    assert int((sample.layout.marker == NEWLINE).sum()) >= 4
    assert_same(layouts(model_of(name), sample.inputs)[0], sample.layout)
    assert_same(layouts(model_of(name), sample.inputs, max_new_tokens=1)[0], sample.layout)


def test_onevision_images_of_one_sample_are_not_tiled() -> None:
    """batch_num_images says so: an overview and one newline each."""
    sample = FAMILIES["llava_onevision"].sample([[Text(1), Image(), Image(), Text(1)]])
    one = [*range(37)]
    ids = torch.tensor([[11, *[IMAGE] * 74, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "batch_num_images": torch.tensor([2])}
    inputs |= {"image_sizes": sample.inputs["image_sizes"], "pixel_values": sample.inputs["pixel_values"][:, :1]}
    for how in ({}, {"max_new_tokens": 1}):
        layout = layouts(model_of("llava_onevision"), inputs, **how)[0]
        assert layout.slot.tolist() == [[-1, *one, *one, -1]]
        assert layout.media().tolist() == [[-1, *[0] * 37, *[1] * 37, -1]]
        assert layout.marker is not None
        assert layout.marker.nonzero()[:, 1].tolist() == [37, 74]


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_equal_text_joins_untiled_images_into_frames(name: str) -> None:
    """Their ids are those of a video, so they are read as one; other text keeps them apart."""
    family = FAMILIES[name]
    joined = family.sample([[Text(2), Image(), Text(1), Image(), Text(2)]])
    ids = joined.inputs["input_ids"]
    gap = int((joined.layout.medium == 0).nonzero()[-1, 1]) + 2
    first = int(joined.layout.vision.nonzero()[0, 1]) - (1 if name == "internvl" else 2)
    ids[0, gap] = ids[0, first - 1]
    (layout,) = layouts(model_of(name), joined.inputs)
    assert layout.media().unique().tolist() == [-1, 0]
    assert layout.frame[layout.vision].tolist() == [0] * 9 + [1] * 9
    ids[0, gap] = ids[0, first - 1] + 1
    (layout,) = layouts(model_of(name), joined.inputs)
    assert layout.media().unique().tolist() == [-1, 0, 1]
    assert int(layout.frame.max()) == 0


def test_internvl_frames_without_tags_or_labels() -> None:
    """Runs with one token between them are frames as well."""
    ids = torch.tensor([[11, *[IMAGE] * 9, 12, *[IMAGE] * 9, 13, *[IMAGE] * 9, 14]])
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    (layout,) = layouts(model_of("internvl"), {"input_ids": ids, "pixel_values": pixels})
    assert layout.frame[layout.vision].tolist() == [0] * 9 + [1] * 9 + [2] * 9
    assert layout.slot[layout.vision].tolist() == [*range(9)] * 3


def tower_output(tokens: int) -> dict[str, Any]:
    """What the vision tower gives for one medium, as far as an adapter looks at it."""
    return {"last_hidden_state": torch.zeros(1), "pooler_output": (torch.zeros(tokens, 4),)}


def prompt_of(model: Any, inputs: dict[str, Any]) -> Prompt:
    return Prompt.read(inputs["input_ids"], inputs)


def test_qwen_positions_of_three_or_four_rows() -> None:
    """(3, B, N) and (4, B, N) differ by a row of text positions in front; frames of 2 × 2 tokens."""
    model = model_of("qwen2_vl")
    ids = torch.tensor([[START, *[VIDEO] * 8, 11]])
    t, h, w = [0, 1, 1, 1, 1, 2, 2, 2, 2, 5], [0, 1, 1, 2, 2, 1, 1, 2, 2, 5], [0, 1, 2, 1, 2, 1, 2, 1, 2, 5]
    three = torch.tensor([t, h, w])
    features = {"mm_encoder_outputs": {"video": tower_output(8)}}
    for positions in (three, torch.cat([torch.arange(10)[None], three])):
        layout = adapter_of(model).layout(model, Prompt(ids, positions[:, None], None, features))
        assert layout is not None
        assert layout.frame.tolist() == [[-1, 0, 0, 0, 0, 1, 1, 1, 1, -1]]
        assert layout.slot.tolist() == [[-1, 0, 1, 2, 3, 0, 1, 2, 3, -1]]


@pytest.mark.parametrize("positions", [None, torch.arange(10)[None], torch.arange(10).expand(4, 1, 10)])
def test_qwen_video_without_grid_or_positions_is_refused(positions: Tensor | None) -> None:
    model = model_of("qwen2_vl")
    features = {"mm_encoder_outputs": {"video": tower_output(8)}}
    prompt = Prompt(torch.tensor([[START, *[VIDEO] * 8, 11]]), positions, None, features)
    with pytest.raises(LayoutError, match=r"qwen2_vl: neither grids nor .* pass mm_token_type_ids and video_grid_thw"):
        adapter_of(model).layout(model, prompt)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "llava_next", "llava_next_video"])
def test_features_that_are_not_those_of_the_ids(name: str) -> None:
    family = FAMILIES[name]
    inputs = family.sample([family.mix("video" if family.video else "two_images")]).inputs
    inputs["input_ids"] = inputs["input_ids"][:, :-10]
    model = model_of(name)
    with pytest.raises(LayoutError, match=rf"{name}: the prompt has \d+ (video|image) tokens, .* are for \d+"):
        adapter_of(model).layout(model, prompt_of(model, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_prefill_is_refused(name: str) -> None:
    family = FAMILIES[name]
    sample = family.sample([family.mix("video" if family.video else "image")])
    with pytest.raises(UnsupportedError, match=r"features of this forward are a piece of a chunked prefill"):
        layouts(model_of(name), sample.inputs, prefill_chunk_size=14)


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_run_that_is_no_tile(name: str) -> None:
    model = model_of(name)
    prompt = Prompt(torch.tensor([[11, *[IMAGE] * 10]]), None, None, {"pixel_values": torch.zeros(1, 1, 3, 24, 24)})
    with pytest.raises(LayoutError, match=rf"{name}: a run of 10 image tokens, but a tile or frame has 9"):
        adapter_of(model).layout(model, prompt)


def test_features_split_over_two_rows() -> None:
    model = model_of("llava")
    prompt = Prompt(
        torch.tensor([[IMAGE] * 3, [IMAGE, 11, 12]]), None, None, {"pixel_values": torch.zeros(2, 3, 24, 24)}
    )
    with pytest.raises(LayoutError, match="llava: the features of one image would be split over two rows"):
        adapter_of(model).layout(model, prompt)


def test_video_that_is_no_whole_number_of_frames() -> None:
    model = model_of("llava_next_video")
    features = {"mm_encoder_outputs": {"video": tower_output(10)}}
    with pytest.raises(LayoutError, match="llava_next_video: a video of 10 tokens is not made of frames of 9"):
        adapter_of(model).layout(model, Prompt(torch.tensor([[VIDEO] * 10]), None, None, features))


# ------------------------------------------------------------------------------------------------- which adapter


def test_every_family_has_exactly_one_adapter() -> None:
    for name in FAMILIES:
        adapter = adapter_of(model_of(name))
        assert adapter.name == {"pixtral": "llava", "qwen3_vl_moe": "qwen3_vl"}.get(name, name)
        assert adapter.text_model(model_of(name)) is model_of(name).model.get_decoder()


def test_adapters_describe_themselves() -> None:
    assert tokenreduce_adapters() == ADAPTERS
    assert len({cls.name for cls in ADAPTERS}) == len(ADAPTERS)
    for cls in ADAPTERS:
        assert cls.notes
        assert "\n" not in cls.notes
        assert all(name.count("/") == 1 for name in cls.checkpoints)
        assert cls.checkpoints or cls.name == "hybrid"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "phi3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("head", [False, True])
def test_decoders_need_a_layout(kind: str, head: bool) -> None:
    config = transformers.AutoConfig.for_model(kind, **TEXT)
    model = (transformers.AutoModelForCausalLM if head else transformers.AutoModel).from_config(config)
    adapter = adapter_of(model)
    assert adapter.name == "decoder"
    assert adapter.text_model(model) is model.base_model
    assert adapter.layout(model, Prompt(torch.tensor([[1, 2]]), None, None, {})) is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("ModernBertConfig", "ModernBertModel"),  # layers that look both ways
        ("BertConfig", "BertModel"),
        ("SiglipVisionConfig", "SiglipVisionModel"),
    ],
)
def test_encoders_have_no_adapter(config: str, name: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{token}_token_id": None for token in ("pad", "bos", "eos", "cls", "sep")} if "Bert" in config else {}
    model = getattr(transformers, name)(getattr(transformers, config)(**small, **ids))
    assert [cls.name for cls in ADAPTERS if cls().matches(model)] == []


class Shell(nn.Module):
    """A model as far as an adapter looks at it before anything runs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.JambaConfig(), "ignores the state in transformers itself"),
        (transformers.MambaConfig(), "none of its layers has attention"),
        (transformers.FalconH1Config(), r"\(hybrid\), run attention and a state side by side"),
        (transformers.DeepseekV32Config(), r"\(indexed_attention\), choose what they attend to by an index"),
        (transformers.Gemma3nConfig(), "read a second input per token"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_hybrid_decoders_are_refused_by_name(config: Any, reason: str) -> None:
    model = Shell(config)
    adapter = adapter_of(model)
    assert adapter.name == "hybrid"
    with pytest.raises(UnsupportedError, match=rf"Shell \({config.model_type}\) is not supported: .*{reason}"):
        adapter.text_model(model)


def test_a_known_family_around_a_hybrid_decoder_is_refused_too() -> None:
    config = FAMILIES["internvl"].config()
    config.text_config.layer_types = ["hybrid", *["full_attention"] * 3]
    for cls in ADAPTERS:
        adapter = cls()
        if adapter.matches(Shell(config)):
            with pytest.raises(UnsupportedError, match=r"internvl\) is not supported: 1 of its 4 layers"):
                adapter.text_model(Shell(config))


def test_markers_are_those_of_the_layout_module() -> None:
    """LITERAL writes 0 for plain tokens."""
    assert (PLAIN, NEWLINE, WRAPPER, TIMESTAMP) == (0, 1, 2, 3)
