"""MiniCPM-V 2.6: slicing, pixel values, prompt and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.minicpm_v_golden import CASES, DATA, FAMILY, golden, load, table, upstream_folder

from tokenreduce.errors import MediaError
from tokenreduce.models.checkpoint import read_json
from tokenreduce.models.minicpm_v import processing
from tokenreduce.models.minicpm_v.family import config_from_upstream
from tokenreduce.models.request import VideoQuestion

TOKENIZER = FAMILY.processor(DATA / "checkpoint")
CONFIG = config_from_upstream(DATA / "checkpoint", read_json(DATA / "checkpoint" / "config.json"), TOKENIZER)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


def frame(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompt(inputs: dict[str, torch.Tensor]) -> str:
    """The text of the ids, with U for a run of 64 <unk>."""
    return TOKENIZER.decode(inputs["input_ids"][0]).replace("<unk>" * 64, "U")


def test_slicing_table_is_upstreams() -> None:
    rows = table("slicing_table")["rows"]
    assert len(rows) == 100
    for row in rows:
        size, most = tuple(row["size_wh"]), row["max_slice_nums"]
        grid = processing.choose_grid(size, 448, most)
        assert (grid and list(grid)) == row["grid_cols_rows"], row
        assert list(processing.best_size(size, 448, 14)) == row["source_size_wh"], row
        if grid:
            assert list(processing.sliced_size(size, grid, 448, 14)) == row["refine_size_wh"], row
        assert processing.placeholder(grid, 1).replace("<unk>", "U") == row["placeholder"], row
        pictures, cut = processing.slice_image(Image.new("L", size), 448, 14, most)
        assert cut == grid
        assert [[p.height // 14, p.width // 14] for p in pictures] == row["tgt_sizes_hw"], row
        assert all(p.height % 14 == p.width % 14 == 0 for p in pictures)


@pytest.mark.parametrize("name", CASES)
def test_golden_ids_sizes_and_pixel_values(name: str) -> None:
    case, (question, slices) = golden(name), CASES[name]
    frames = list(case["frames_uint8"].numpy())
    inputs = processing.build_inputs(frames, question, TOKENIZER, CONFIG, max_slice_nums=slices)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(inputs[key], case[key])
    assert torch.equal(inputs["tgt_sizes"][0], case["tgt_sizes"])
    for index, size in enumerate(case["tgt_sizes"].prod(1).tolist()):
        values = inputs["pixel_values"][0, index]
        assert torch.equal(values[..., : 14 * size], case[f"pixel_values.{index}"])
        assert not values[..., 14 * size :].any()


def test_packed_pixels_are_the_patches_row_by_row() -> None:
    picture = frame(42, 28)
    packed, size = processing.pack_pixels(Image.fromarray(picture), 14)
    assert size == (2, 3)
    for index in range(6):
        y, x = 14 * (index // 3), 14 * (index % 3)
        patch = torch.from_numpy(picture[y : y + 14, x : x + 14]).permute(2, 0, 1)
        assert torch.equal(((packed[..., 14 * index : 14 * index + 14] + 1) * 127.5).round().to(torch.uint8), patch)


def test_video_defaults_are_two_slices_and_no_image_ids() -> None:
    inputs = processing.build_inputs([frame(160, 90)] * 2, "Why?", TOKENIZER, CONFIG)
    block = "<image>U</image><slice>U</slice><slice>U</slice>\n"
    assert prompt(inputs) == SYSTEM + block * 2 + "Why?" + ANSWER


def test_numbered_portrait_frames() -> None:
    frames = [frame(90, 160, seed) for seed in range(11)]
    inputs = processing.build_inputs(frames, "Why?", TOKENIZER, CONFIG, max_slice_nums=2, use_image_id=True)
    blocks = [f"<image_id>{i}</image_id><image>U</image><slice>U</slice>\n<slice>U</slice>\n" for i in range(11)]
    assert prompt(inputs) == SYSTEM + "".join(blocks) + "Why?" + ANSWER
    assert inputs["tgt_sizes"].tolist() == [[[8, 4], [6, 6], [6, 6]] * 11]


def test_up_to_nine_slices_row_by_row() -> None:
    picture = np.zeros((252, 252, 3), dtype=np.uint8)
    for index in range(9):
        y, x = 84 * (index // 3), 84 * (index % 3)
        picture[y : y + 84, x : x + 84] = 20 * index
    inputs = processing.build_inputs([picture], "Why?", TOKENIZER, CONFIG, max_slice_nums=9)
    rows = "\n".join(["<slice>U</slice>" * 3] * 3)
    assert prompt(inputs) == SYSTEM + f"<image>U</image>{rows}\nWhy?" + ANSWER
    colours = ((inputs["pixel_values"][0, 1:].mean((1, 2, 3)) + 1) * 127.5).round()
    assert colours.tolist() == [20.0 * index for index in range(9)]


def test_frames_of_different_sizes_share_one_batch() -> None:
    frames = [frame(160, 90), frame(60, 80), frame(90, 160)]
    inputs = processing.build_inputs(frames, "Why?", TOKENIZER, CONFIG, max_slice_nums=2)
    slices = ["<slice>U</slice><slice>U</slice>", "", "<slice>U</slice>\n<slice>U</slice>"]
    assert prompt(inputs) == SYSTEM + "".join(f"<image>U</image>{s}\n" for s in slices) + "Why?" + ANSWER
    alone = [processing.build_inputs([f], "Why?", TOKENIZER, CONFIG, max_slice_nums=2) for f in frames]
    assert torch.equal(inputs["tgt_sizes"], torch.cat([one["tgt_sizes"] for one in alone], 1))
    pictures = [picture for one in alone for picture in one["pixel_values"][0]]
    for together, picture in zip(inputs["pixel_values"][0], pictures, strict=True):
        assert torch.equal(together[..., : picture.shape[-1]], picture)
        assert not together[..., picture.shape[-1] :].any()


@pytest.mark.parametrize("most", [0, -1, 2.0, True, "2"])
def test_max_slice_nums_must_be_a_whole_number(most: object) -> None:
    with pytest.raises(MediaError, match="max_slice_nums"):
        processing.build_inputs([frame(20, 20)], "Why?", TOKENIZER, CONFIG, max_slice_nums=most)


def test_sampling_follows_upstream() -> None:
    assert processing.sample_frames(10, 2.6) == [0, 3, 6, 9]
    assert processing.sample_frames(5, 0.3) == [0, 1, 2, 3, 4]
    assert processing.sample_frames(64 * 30, 29.97) == list(range(0, 1920, 30))
    every = list(range(0, 3000, 30))
    gap = len(every) / 64
    assert processing.sample_frames(3000, 30.0) == [every[math.floor(i * gap + gap / 2)] for i in range(64)]
    assert processing.sample_frames(10, 1.0, max_frames=4) == [1, 3, 6, 8]
    assert processing.sample_frames(10, 10.0, max_frames=2, force_sample=True) == [2, 7]
    with pytest.raises(MediaError, match="max_frames"):
        processing.sample_frames(10, 1.0, max_frames=0)


def test_a_request_is_sampled_and_built(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [frame(60, 80, seed) for seed in range(3)]
    asked: list[list[int]] = []

    def clip(self: VideoQuestion, rule: Callable[..., list[int]], *, count: bool) -> SimpleNamespace:
        assert count, "its authors count frames"
        asked.append(rule(90, 30.0, self.fps))
        return SimpleNamespace(frames=shown)

    monkeypatch.setattr(VideoQuestion, "clip", clip)
    request = VideoQuestion(video="film.mp4", question="Why?", max_slice_nums=1, use_image_id=True, fps=2.0)
    inputs = FAMILY.prepare(SimpleNamespace(config=CONFIG), request, TOKENIZER)
    expected = processing.build_inputs(shown, "Why?", TOKENIZER, CONFIG, max_slice_nums=1, use_image_id=True)
    assert asked == [[0, 15, 30, 45, 60, 75]]
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


def test_prepared_inputs_run_through_model_and_generate(tmp_path: object) -> None:
    model = load(upstream_folder(tmp_path / "tiny"))
    request = VideoQuestion(video=[frame(160, 90), frame(60, 80)], question="Why?", use_image_id=True)
    inputs = FAMILY.prepare(model, request, TOKENIZER)
    with torch.no_grad():
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert logits.isfinite().all()
    assert (
        answer[0, inputs["input_ids"].shape[1]] == logits[0, -1].index_fill(0, torch.tensor([257, 259]), -1e9).argmax()
    )
