"""LLaVA-Video against tensors from the upstream code, and where there are none, against a few lines of arithmetic."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.llava_video_golden import (
    CHECKPOINT,
    DURATION,
    INDEX,
    QUESTION,
    TIMES,
    copy_checkpoint,
    frames,
    golden,
    golden_frames,
    shard,
    tiny_config,
)
from tokenreduce_adapters.llava_video import LlavaVideoAdapter
from torch import Tensor
from transformers import AutoModelForImageTextToText, BatchFeature, PreTrainedModel

from tokenreduce.adapter import Prompt
from tokenreduce.errors import LayoutError
from tokenreduce.layout import NEWLINE, TokenLayout
from tokenreduce.models import load_model, prepare
from tokenreduce.models.llava_video.modeling import LlavaVideoForConditionalGeneration

UPSTREAM_VIDEO = -200


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(CHECKPOINT)


@pytest.fixture(scope="module")
def inputs(model: PreTrainedModel) -> BatchFeature:
    return prepare(model, golden_frames(), QUESTION, frame_times=TIMES, duration=DURATION)


@pytest.fixture
def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlavaVideoForConditionalGeneration(tiny_config()).eval()


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def expanded(ids: Tensor, video_token: int, count: int) -> Tensor:
    """Upstream's ids with the marker replaced by `count` placeholders."""
    place = int((ids == UPSTREAM_VIDEO).nonzero()[0])
    return torch.cat((ids[:place], torch.full((count,), video_token), ids[place + 1 :]))


class TestGolden:
    def test_the_frames_are_the_golden_ones(self) -> None:
        assert hashlib.sha256(golden_frames().tobytes()).hexdigest() == INDEX["frames"]["sha256_uint8"]
        assert hashlib.sha256(frames(1, 77, 240, 426).tobytes()).hexdigest() == INDEX["preprocess"]["sha256_uint8"]

    def test_input_ids_and_pixel_values(self, model: PreTrainedModel, inputs: BatchFeature) -> None:
        wanted = expanded(golden("case_f4")["input_ids"][0], model.config.video_token_id, 4 * 210)
        assert torch.equal(inputs["input_ids"], wanted[None])
        assert torch.equal(inputs["attention_mask"], torch.ones_like(wanted)[None])
        pixels = inputs["pixel_values_videos"].numpy()
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == INDEX["pixel_values_sha256_fp32"]

    def test_frames_that_are_not_square(self, model: PreTrainedModel) -> None:
        made = prepare(model, frames(1, 77, 240, 426), QUESTION)["pixel_values_videos"][0]
        back = ((made * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert torch.equal(back, golden("preprocess_240x426")["resized_uint8"])

    def test_features(self, model: PreTrainedModel, inputs: BatchFeature) -> None:
        features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        assert difference(features[0], golden("case_f4")["features"]) <= 1e-5

    def test_average_pooling(self, tmp_path: Path) -> None:
        model = load_model(copy_checkpoint(tmp_path / "average", mm_spatial_pool_mode="average"))
        inputs = prepare(model, golden_frames(), QUESTION, frame_times=TIMES, duration=DURATION)
        wanted = golden("case_f4_average")
        assert torch.equal(inputs["input_ids"][0], expanded(wanted["input_ids"][0], 299, 4 * 182))
        features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        assert difference(features[0], wanted["features"]) <= 1e-5
        layout = LlavaVideoAdapter().layout(model, Prompt(inputs["input_ids"], None, None, inputs))
        assert torch.equal(layout.slot, wanted["ff_patch_type"])

    def test_embeddings_and_logits(self, model: PreTrainedModel, inputs: BatchFeature) -> None:
        seen: dict[str, Tensor] = {}
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
        )
        with handle:
            logits = model(**inputs).logits
        assert difference(seen["embeds"], golden("case_f4")["inputs_embeds"]) <= 1e-5
        assert difference(logits[0, -8:], golden("case_f4")["logits_last8"]) <= 2e-5

    def test_greedy_tokens(self, model: PreTrainedModel, inputs: BatchFeature) -> None:
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        assert torch.equal(out.sequences[0, -8:], golden("case_f4")["greedy_tokens"])
        assert difference(torch.cat(out.scores), golden("case_f4")["greedy_scores"]) <= 2e-5

    def test_bfloat16(self, inputs: BatchFeature) -> None:
        model = load_model(CHECKPOINT, dtype=torch.bfloat16)
        made = prepare(model, golden_frames(), QUESTION, frame_times=TIMES, duration=DURATION)
        assert made["pixel_values_videos"].dtype == torch.bfloat16
        logits = model(**made).logits[0, -8:].float()
        wanted = golden("case_f4")["logits_last8"]
        assert torch.nn.functional.cosine_similarity(logits, wanted).min() > 0.99

    def test_sharded(self, tmp_path: Path, model: PreTrainedModel) -> None:
        folder = copy_checkpoint(tmp_path / "sharded")
        shard(folder, pieces=3)
        wanted, found = model.state_dict(), load_model(folder).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_saves_and_reloads(self, tmp_path: Path, model: PreTrainedModel, inputs: BatchFeature) -> None:
        model.save_pretrained(tmp_path)
        wanted = model(**inputs).logits
        own = LlavaVideoForConditionalGeneration.from_pretrained(tmp_path).eval()
        auto = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        for again in (own, auto, load_model(tmp_path)):
            assert type(again) is LlavaVideoForConditionalGeneration
            assert torch.equal(again(**inputs).logits, wanted)
        load_model(tmp_path).save_pretrained(tmp_path / "twice")
        assert torch.equal(load_model(tmp_path / "twice")(**inputs).logits, wanted)


def pooled_by_hand(grid: np.ndarray[Any, Any], mode: str, stride: int) -> np.ndarray[Any, Any]:
    """(g, g, D) to (n, n, D): means or maxima of whole blocks, or samples between the nearest centres."""
    size = len(grid)
    if mode != "bilinear":
        n = size // stride
        blocks = [
            [grid[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride] for j in range(n)] for i in range(n)
        ]
        reduce = np.mean if mode == "average" else np.max
        return np.array([[reduce(block, axis=(0, 1)) for block in row] for row in blocks])
    n = -(-size // stride)
    weights = np.zeros((n, size))
    for i in range(n):
        centre = max((i + 0.5) * size / n - 0.5, 0)
        low = int(centre)
        weights[i, low] += 1 - (centre - low)
        weights[i, min(low + 1, size - 1)] += centre - low
    return np.einsum("ia,jb,abd->ijd", weights, weights, grid)


class TestFeatures:
    @pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
    @pytest.mark.parametrize(("patches", "stride"), [(6, 2), (7, 2), (3, 1), (7, 3), (1, 1)])
    def test_pooling_and_newlines_by_hand(self, mode: str, patches: int, stride: int) -> None:
        config = tiny_config(8 * patches, 8, pool_mode=mode, pool_stride=stride)
        model = LlavaVideoForConditionalGeneration(config).eval().model
        projected = torch.randn(2, patches**2, 32)
        made = model.apply_pooling(projected).detach()
        assert made.shape == (2, config.tokens_per_frame, 32)
        for frame, features in zip(made, projected, strict=True):
            rows = pooled_by_hand(features.view(patches, patches, 32).double().numpy(), mode, stride)
            table = frame.view(len(rows), len(rows) + 1, 32)
            assert np.abs(table[:, :-1].numpy() - rows).max() < 1e-5
            assert all(torch.equal(row[-1], model.image_newline) for row in table)

    def test_every_frame_by_itself_and_however_packed(self, tiny: PreTrainedModel) -> None:
        pixels = torch.randn(2, 3, 3, 48, 48)
        together = tiny.get_video_features(pixels).pooler_output
        assert together.shape == (2, 3 * 12, 32)
        loose = tiny.get_video_features(pixels.flatten(0, 1)[:, None]).pooler_output
        assert difference(loose.view_as(together), together) < 1e-6
        one = tiny.get_video_features(pixels[0]).pooler_output
        assert torch.equal(one, tiny.get_video_features(pixels[:1]).pooler_output)


def row(*parts: int | list[int]) -> list[int]:
    """Ids of one row: a list is text, a number that many frames of 12 placeholders."""
    return [i for part in parts for i in (part if isinstance(part, list) else [299] * 12 * part)]


class TestBatches:
    """Two videos and text in row 0, one frame and left padding in row 1."""

    @pytest.fixture
    def rows(self) -> list[list[int]]:
        return [row([1, 2], 3, [3, 4], 2, [5, 6, 7]), row([8], 1, [9])]

    @pytest.fixture
    def batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        padded = [[0] * (longest - len(ids)) + ids for ids in rows]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]
        pixels = torch.randn(6, 1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
        ids, valid = torch.tensor(padded), torch.tensor(mask)
        return {"input_ids": ids, "attention_mask": valid, "pixel_values_videos": pixels}

    def alone(self, ids: list[int], pixels: Tensor) -> dict[str, Tensor]:
        tokens = torch.tensor([ids])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values_videos": pixels}

    def test_rows_are_what_they_are_alone(
        self, tiny: PreTrainedModel, rows: list[list[int]], batch: dict[str, Tensor]
    ) -> None:
        pixels = batch["pixel_values_videos"]
        position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = tiny(**batch, position_ids=position_ids).logits
        for index, own in enumerate((pixels[:5], pixels[5:])):
            wanted = tiny(**self.alone(rows[index], own)).logits[0]
            assert difference(logits[index, -len(wanted) :], wanted) < 1e-5

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generate(self, tiny: PreTrainedModel, rows: list[list[int]], batch: dict[str, Tensor], beams: int) -> None:
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        made = tiny.generate(**batch, **settings)
        pixels = batch["pixel_values_videos"]
        for index, own in enumerate((pixels[:5], pixels[5:])):
            assert torch.equal(made[index, -5:], tiny.generate(**self.alone(rows[index], own), **settings)[0, -5:])

    @pytest.mark.parametrize("beams", [1, 3])
    def test_layout_under_generate(self, tiny: PreTrainedModel, batch: dict[str, Tensor], beams: int) -> None:
        prompts: list[Prompt] = []

        def see(module: PreTrainedModel, args: tuple[()], kwargs: dict[str, Any]) -> None:
            prompts.append(Prompt.read(kwargs["input_ids"], kwargs))

        with tiny.register_forward_pre_hook(see, with_kwargs=True):
            tiny.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=beams, pad_token_id=0)
        prefill, step = (LlavaVideoAdapter().layout(tiny, prompt) for prompt in prompts)
        padding = 67 - 14
        frames = [0] * 12 + [1] * 12
        rows = [[-1] * 2 + [0] * 36 + [-1] * 2 + [1] * 24 + [-1] * 3, [-1] * (padding + 1) + [0] * 12 + [-1]]
        assert prefill.media().tolist() == [wanted for wanted in rows for _ in range(beams)]
        assert prefill.frame[0].tolist() == [-1] * 2 + frames + [2] * 12 + [-1] * 2 + frames + [-1] * 3
        assert not step.vision.any()


class TestLayout:
    def layout(self, model: PreTrainedModel, ids: list[list[int]], **given: Tensor) -> TokenLayout:
        return LlavaVideoAdapter().layout(model, Prompt(torch.tensor(ids), None, None, given))

    def test_golden_patch_types(self, model: PreTrainedModel, inputs: BatchFeature) -> None:
        layout = LlavaVideoAdapter().layout(model, Prompt(inputs["input_ids"], None, None, inputs))
        assert torch.equal(layout.slot, golden("case_f4")["ff_patch_type"])
        assert LlavaVideoAdapter().matches(model)

    @pytest.mark.parametrize("packed", [(3, 1), (1, 3)])
    def test_by_hand(self, tiny: PreTrainedModel, packed: tuple[int, int]) -> None:
        """Two frames, text, one frame, however the pixels are packed."""
        pixels = torch.zeros(*packed, 3, 48, 48)
        layout = self.layout(tiny, [row([1, 2], 2, [3], 1, [4])], pixel_values_videos=pixels)
        frame = list(range(12))
        assert layout.slot[0].tolist() == [-1, -1, *frame, *frame, -1, *frame, -1]
        assert layout.frame[0].tolist() == [-1, -1, *[0] * 12, *[1] * 12, -1, *[0] * 12, -1]
        assert layout.media()[0].tolist() == [-1, -1, *[0] * 24, -1, *[1] * 12, -1]
        assert layout.marker is not None
        newline = (layout.marker[0] == NEWLINE).nonzero().flatten().tolist()
        assert newline == [5, 9, 13, 17, 21, 25, 30, 34, 38]
        assert layout.reducible(newlines="protect")[0].sum() == 3 * 9

    def test_videos_side_by_side(self, tiny: PreTrainedModel) -> None:
        layout = self.layout(tiny, [row([1], 4)], pixel_values_videos=torch.zeros(2, 2, 3, 48, 48))
        assert layout.media()[0].tolist() == [-1, *[0] * 24, *[1] * 24]
        assert layout.frame[0].tolist() == [-1, *([0] * 12 + [1] * 12) * 2]

    def test_one_video_without_its_dimension(self, tiny: PreTrainedModel) -> None:
        layout = self.layout(tiny, [row([1], 2)], pixel_values_videos=torch.zeros(2, 3, 48, 48))
        assert layout.frame[0].tolist() == [-1, *[0] * 12, *[1] * 12]

    def test_video_beside_image(self, tiny: PreTrainedModel) -> None:
        """An image of 48 × 48 is an overview of 36 patches and 6 rows of 7."""
        tiny.config.image_grid_pinpoints = [[48, 48]]
        given = {
            "pixel_values_videos": torch.zeros(1, 1, 3, 48, 48),
            "pixel_values": torch.zeros(1, 2, 3, 48, 48),
            "image_sizes": torch.tensor([[48, 48]]),
        }
        image = [298] * (36 + 6 * 7)
        ids = row([1], 1, image, [2])
        layout = self.layout(tiny, [ids], **given)
        assert layout.media()[0].tolist() == [-1, *[0] * 12, *[1] * 78, -1]
        assert layout.slot[0].tolist() == [-1, *range(12), *range(78), -1]
        assert (layout.marker[0] == NEWLINE).sum() == 3 + 6  # type: ignore[index]
        tokens = torch.tensor([ids])
        assert tiny(input_ids=tokens, **given).logits.shape == (1, len(ids), 300)

    def test_without_features_every_id_is_text(self, tiny: PreTrainedModel) -> None:
        assert not self.layout(tiny, [[1, 2, 3]]).vision.any()
        assert not self.layout(tiny, [[299]]).vision.any()

    def test_a_broken_frame_is_refused(self, tiny: PreTrainedModel) -> None:
        with pytest.raises(LayoutError, match="11 video tokens"):
            self.layout(tiny, [[1] + [299] * 11], pixel_values_videos=torch.zeros(1, 1, 3, 48, 48))
