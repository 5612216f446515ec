"""MiniCPM-V 2.6: the layout read from token ids, against the released FrameFusion and layouts made by hand."""

from __future__ import annotations

import pytest
import torch
from support.minicpm_v_golden import CASES, golden, golden_inputs, pad_left, table
from tokenreduce_adapters.minicpm_v import MiniCPMVAdapter

from tokenreduce.adapter import Prompt
from tokenreduce.layout import WRAPPER, TokenLayout
from tokenreduce.models.minicpm_v.modeling import MiniCPMVConfig, MiniCPMVForConditionalGeneration

ADAPTER = MiniCPMVAdapter()
IDS = {"U": 1, "[": 2, "]": 3, "<": 4, ">": 5, "(": 6, ")": 7, "n": 8}
"""Ids of the hand-written prompts: U <unk>, [ ] image, < > slice, ( ) image_id, n newline; any other letter is text."""


def tiny(query_num: int, ids: tuple[int, ...]) -> MiniCPMVForConditionalGeneration:
    names = (
        "image",
        "image_start",
        "image_end",
        "slice_start",
        "slice_end",
        "image_id_start",
        "image_id_end",
        "newline",
    )
    text = {"hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MiniCPMVConfig(
        query_num=query_num,
        text_config=text | {"num_key_value_heads": 1, "vocab_size": 400},
        vision_config=vision | {"patch_size": 14, "image_size": 28},
        **{f"{name}_token_id": value for name, value in zip(names, ids, strict=True)},
    )
    return MiniCPMVForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def golden_model() -> MiniCPMVForConditionalGeneration:
    return tiny(64, (256, 260, 261, 270, 271, 272, 273, 198))


@pytest.fixture(scope="module")
def model() -> MiniCPMVForConditionalGeneration:
    return tiny(2, tuple(IDS.values()))


def layout_of(model: MiniCPMVForConditionalGeneration, ids: torch.Tensor) -> TokenLayout:
    layout = ADAPTER.layout(model, Prompt(ids, None, None, {}))
    assert layout is not None
    return layout


def read(model: MiniCPMVForConditionalGeneration, *rows: str) -> TokenLayout:
    return layout_of(model, torch.tensor([[IDS.get(letter, ord(letter)) for letter in row] for row in rows]))


def check(layout: TokenLayout, row: int = 0, **expected: str) -> None:
    """Compare with rows of one character per token: a digit or letter (a = 10 …), or `.` for −1; `w` marks wrappers."""
    for name, line in expected.items():
        found = getattr(layout, name)[row].tolist()
        if name == "marker":
            assert "".join("w" if value == WRAPPER else "." for value in found) == line
        else:
            assert found == [-1 if letter == "." else int(letter, 36) for letter in line]


@pytest.mark.parametrize("name", CASES)
def test_slots_are_the_released_framefusions_patch_types(
    golden_model: MiniCPMVForConditionalGeneration, name: str
) -> None:
    case, official = golden(name), table("framefusion_patch_types")["cases"][name]
    layout = layout_of(golden_model, case["input_ids"])
    assert layout.slot[0].tolist() == official["patch_type"]
    assert int(layout.frame.max()) + 1 == official["num_frames"]
    assert set(layout.media()[layout.vision].tolist()) == {0}
    queries = torch.zeros_like(layout.vision)
    for start, end in case["image_bound"].tolist():
        queries[0, start:end] = True
    assert torch.equal(layout.reducible(wrappers="merge"), layout.vision)
    assert torch.equal(layout.reducible(wrappers="protect"), queries)


def test_video_of_whole_frames(model: MiniCPMVForConditionalGeneration) -> None:
    layout = read(model, "ab[UU]n[UU]n[UU]nqq")
    check(layout, slot="...01234012340123..", frame="...00000111112222..", marker=".....www..www..ww..")
    check(layout, medium="...00000000000000..")


def test_sliced_frames_with_rows(model: MiniCPMVForConditionalGeneration) -> None:
    block = "[UU]<UU><UU>n<UU><UU>n"
    layout = read(model, "a" + block * 2 + "q")
    check(layout, slot="..0123456789abcdefghijkl0123456789abcdefghijk.".replace(" ", ""))
    check(layout, frame=".." + "0" * 22 + "1" * 21 + ".")
    check(layout, marker=".." + "..ww..ww..www..ww..www" + "..ww..ww..www..ww..ww" + ".")


def test_numbered_frames(model: MiniCPMVForConditionalGeneration) -> None:
    layout = read(model, "a(0)[UU]n(1)[UU]n(12)[UU]nq")
    check(
        layout,
        slot=".....01234567" + "012345678" + "0123" + ".",
        frame=".....00000000" + "111111111" + "2222" + ".",
        marker="....." + "..wwwwww" + "..wwwwwww" + "..ww" + ".",
    )


def test_media_are_parted_by_text(model: MiniCPMVForConditionalGeneration) -> None:
    layout = read(model, "[UU]n[UU]n.n[UU]a[UU]<UU>")
    check(
        layout,
        slot=".012340123..." + "012" + ".." + "0123456",
        frame=".000001111..." + "000" + ".." + "0000000",
        medium=".000000000..." + "111" + ".." + "2222222",
        marker="...www..ww..." + "..w" + ".." + "..ww..w",
    )


def test_frames_of_different_grids_share_only_the_overview(model: MiniCPMVForConditionalGeneration) -> None:
    layout = read(model, "[UU]n[UU]<UU>n[UU]n[UU]<UU>nq")
    check(
        layout,
        slot=".01234" + "012567890"[:3] + "56789a" + "01234" + "012" + "56789" + ".",
        frame="." + "0" * 5 + "1" * 9 + "2" * 5 + "3" * 8 + ".",
    )
    pairs = [(int(s), int(t)) for s, t in zip(layout.slot[0], layout.frame[0], strict=True) if s >= 0]
    assert len(set(pairs)) == len(pairs)


def test_text_only_and_decode_steps(model: MiniCPMVForConditionalGeneration) -> None:
    for row in ("q", "abcdefgh", "a[UqU]b<U>UU", "[UU>q<UU]"):
        assert not read(model, row).vision.any()


def test_padded_rows_are_as_alone(golden_model: MiniCPMVForConditionalGeneration) -> None:
    batch = pad_left([golden_inputs(name) for name in CASES], pad=257)
    layout = layout_of(golden_model, batch["input_ids"])
    for index, name in enumerate(CASES):
        alone = layout_of(golden_model, golden(name)["input_ids"])
        left = layout.shape[1] - alone.shape[1]
        for field in ("slot", "frame", "medium"):
            assert torch.equal(getattr(layout, field)[index, left:], getattr(alone, field)[0])
        assert not layout.vision[index, :left].any()


def test_rows_are_read_one_by_one(model: MiniCPMVForConditionalGeneration) -> None:
    layout = read(model, "pp[UU]nqq", "[UU]<UU>q", "abcdefghi")
    check(layout, 0, slot="...0123..", frame="...0000..")
    check(layout, 1, slot=".0123456.", frame=".0000000.")
    check(layout, 2, slot=".........", frame=".........")


def test_adapter_knows_the_model_and_its_decoder(model: MiniCPMVForConditionalGeneration) -> None:
    assert ADAPTER.matches(model)
    assert ADAPTER.text_model(model) is model.llm.model
    layer = model.llm.model.layers[0]
    pair = ADAPTER.ffn_pair(layer)
    assert pair is not None
    assert pair.exit is layer.mlp
