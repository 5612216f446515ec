"""prepare(): LLaVA-Video's prompt and frames, transformers' own processors, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from support.llava_video_golden import CHECKPOINT, frames, golden_frames, tiny_config
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2Config,
)

from tokenreduce.errors import CheckpointError, LayoutError, MediaError, UnsupportedError
from tokenreduce.media.video import decode_frames
from tokenreduce.models import load_model, prepare
from tokenreduce.models.llava_video.modeling import LlavaVideoForConditionalGeneration

FRAME = np.zeros((1, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(CHECKPOINT)


class TestPrepare:
    def text(self, model: PreTrainedModel, made: BatchFeature) -> str:
        from transformers import AutoTokenizer, Qwen2Config

        ids = made["input_ids"][0]
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, config=Qwen2Config())
        return tokenizer.decode(ids[ids != model.config.video_token_id])

    def test_the_prompt_without_times(self, model: PreTrainedModel) -> None:
        made = prepare(model, golden_frames()[:1], "What?", time_instruction=False)
        assert self.text(model, made) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert model(**made).logits.shape[1] == made["input_ids"].shape[1]

    def test_an_array_without_times_counts_as_sampled_at_fps(self, model: PreTrainedModel) -> None:
        text = self.text(model, prepare(model, golden_frames()[:3], "What?", fps=2.0))
        assert "lasts for 1.50 seconds, and 3 frames" in text
        assert "located at 0.00s,0.50s,1.00s.Please" in text

    def test_sizes_may_differ(self, model: PreTrainedModel) -> None:
        mixed = [frames(1, 77, 240, 426)[0], golden_frames()[:2]]
        made = prepare(model, mixed, "What?")["pixel_values_videos"][0]
        assert torch.equal(made[:1], prepare(model, mixed[0][None], "What?")["pixel_values_videos"][0])
        assert torch.equal(made[1:], prepare(model, mixed[1], "What?")["pixel_values_videos"][0])

    def test_too_long_for_the_model(self, model: PreTrainedModel) -> None:
        with pytest.raises(UnsupportedError, match=r"160 frames make \d+ tokens.*made for 32768.*at most 15\d frames"):
            prepare(model, np.zeros((160, 2, 2, 3), np.uint8), "What?", time_instruction=False)

    def test_a_question_with_the_placeholder_in_it(self, model: PreTrainedModel) -> None:
        class Tokenizer:
            def __call__(self, text: str, **_: Any) -> Any:
                return BatchFeature({"input_ids": [model.config.video_token_id]})

        with pytest.raises(LayoutError, match="stands for the video"):
            prepare(model, golden_frames()[:1], "<video>", processor=Tokenizer())


class TestFiles:
    def test_a_file_is_sampled_as_the_config_says(self, model: PreTrainedModel, tmp_path: Path) -> None:
        path = tmp_path / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for image in frames(10, 5, 32, 48):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        seen: list[tuple[int, int]] = []
        made = prepare(model, path, "What?", max_frames=3, progress=lambda *done: seen.append(done))
        shown = np.stack(decode_frames(path, [0, 4, 9]))
        wanted = prepare(model, shown, "What?", frame_times=[0.0, 0.8, 1.8], duration=2.0)
        assert all(torch.equal(made[name], wanted[name]) for name in wanted)
        assert seen == [(1, 3), (2, 3), (3, 3)]
        unforced = prepare(model, path, "What?", fps=2.5, force_sample=False)
        assert unforced["pixel_values_videos"].shape[1] == 5


class TestBadFrames:
    @pytest.mark.parametrize(
        ("video", "options", "message"),
        [
            (np.zeros((0, 8, 8, 3), np.uint8), {}, "no frames"),
            ([], {}, "no frames"),
            (np.zeros((1, 8, 8, 3), np.float32), {}, "must be uint8 RGB arrays.*float32"),
            (np.zeros((1, 3, 8, 8), np.uint8), {}, "must be uint8 RGB arrays"),
            (FRAME, {"frame_times": [0.0, 1.0], "duration": 2.0}, "2 entries for 1 frames"),
            (FRAME, {"frame_times": [0.0]}, "without duration"),
            ("gone.mp4", {}, "gone.mp4: no such file"),
            ("gone.mp4", {"duration": 2.0}, "a video file has its own"),
        ],
    )
    def test_refused(self, model: PreTrainedModel, video: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(MediaError, match=message) as error:
            prepare(model, video, "What?", **options)
        assert "\n" not in str(error.value)


class TestTransformersProcessors:
    @pytest.fixture
    def llava(self, tmp_path: Path) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, config=Qwen2Config())
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        template = (
            "{% for m in messages %}{% for c in m['content'] %}"
            "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
        )
        LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        ).save_pretrained(tmp_path)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
            text_config=LlamaConfig(vocab_size=300, **sizes),
            image_token_index=259,
        )
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
        return tmp_path

    def test_an_image_model_sees_each_frame_as_an_image(self, llava: Path) -> None:
        model = load_model(llava)
        made = prepare(model, np.zeros((3, 30, 40, 3), np.uint8), "What?")
        assert made["input_ids"].tolist()[0][:-5] == [259] * 3 * 4
        assert made["pixel_values"].shape == (3, 3, 28, 28)
        assert model(**made).logits.shape == (1, 17, 300)

    def test_a_package_that_is_missing(self, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def from_pretrained(*_: object, **__: object) -> None:
            raise ImportError("\nXVideoProcessor requires the Torchvision library. Read\nmore somewhere")

        monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
        with pytest.raises(
            UnsupportedError, match=r"requires the Torchvision library.*build the inputs by hand"
        ) as error:
            prepare(load_model(llava), FRAME, "What?")
        assert "\n" not in str(error.value)

    def test_no_tokenizer_in_the_folder(self, tmp_path: Path) -> None:
        load_model(CHECKPOINT).save_pretrained(tmp_path)
        model = load_model(tmp_path)
        with pytest.raises(CheckpointError, match=r"no tokenizer in it.*give prepare\(processor=…\)"):
            prepare(model, FRAME, "What?")
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, config=Qwen2Config())
        assert prepare(model, FRAME, "What?", processor=tokenizer)["input_ids"].shape[1] > 210

    def test_a_model_that_came_from_no_folder(self) -> None:
        with pytest.raises(CheckpointError, match="not loaded from a folder"):
            prepare(LlavaVideoForConditionalGeneration(tiny_config()), FRAME, "What?")
