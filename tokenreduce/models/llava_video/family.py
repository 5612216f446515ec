"""LLaVA-Video's upstream checkpoints and inputs: keys, config, prompt, pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig, PreTrainedModel, Qwen2Config, SiglipVisionConfig

from tokenreduce.errors import CheckpointError, LayoutError, UnsupportedError
from tokenreduce.media.video import VideoClip, sample_indices
from tokenreduce.models.checkpoint import LoadOptions, load_strict, read_json
from tokenreduce.models.family import Family, left_padded
from tokenreduce.models.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from tokenreduce.models.request import VideoQuestion
from tokenreduce.models.tokenizer import has_tokenizer, read_tokenizer

RENAMES = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}
"""Upstream keys to keys of the native model; `model.image_newline` and `lm_head` have the same name in both."""

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
"""The tower of the released models, google/siglip-so400m-patch14-384, which their config gives by name only."""


class LlavaVideoFamily(Family):
    """Upstream checkpoints of LLaVA-Video: config.json says LlavaQwenForCausalLM."""

    name = "llava_video"
    model_type = LlavaVideoConfig.model_type

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return "LlavaQwenForCausalLM" in (config.get("architectures") or ())

    def load(self, folder: Path, config: Mapping[str, Any], options: LoadOptions) -> PreTrainedModel:
        native = native_config(folder, config)
        model = _load(native, folder, options, RENAMES)
        if not (folder / "generation_config.json").is_file():
            # transformers would take stale settings from the upstream config.json, such as max_length 20.
            eos = config.get("eos_token_id")
            model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=config.get("pad_token_id", eos))
        return model

    def load_native(self, folder: Path, options: LoadOptions) -> PreTrainedModel:
        return _load(LlavaVideoConfig.from_pretrained(folder), folder, options)

    def processor(self, folder: Path) -> Any:
        return read_tokenizer(folder, Qwen2Config())

    def look(self, model: PreTrainedModel, request: VideoQuestion) -> VideoClip:
        """The authors' rule (`sample_indices`), which counts frames; the checkpoint says whether it is forced."""
        return request.clip(sample_indices, model.config.force_sample, count=True)

    def prepare(self, model: PreTrainedModel, request: VideoQuestion, processor: Any) -> BatchFeature:
        config: LlavaVideoConfig = model.config
        clip = self.look(model, request)

        def texts(clip: VideoClip) -> list[list[int]]:
            parts = prompt(request.question, clip, request.time_instruction)
            return [processor(text, add_special_tokens=False).input_ids for text in parts]

        ids = texts(clip)
        if config.video_token_id in ids[0] + ids[1]:
            raise LayoutError(
                f"the question contains the token that stands for the video (id {config.video_token_id}); leave it out"
            )
        frames = len(clip.frames)
        video = [config.video_token_id] * (frames * config.tokens_per_frame)
        input_ids = torch.tensor([ids[0] + video + ids[1]])
        _refuse_too_long(
            config,
            input_ids.shape[1],
            frames,
            lambda most: sum(map(len, texts(request.shorter(clip, most, sample_indices, count=True)))),
        )
        pixels = pixel_values(clip, config.vision_config.image_size)[None]
        return BatchFeature(
            {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values_videos": pixels}
        )

    def batch(self, parts: Sequence[BatchFeature], processor: Any) -> BatchFeature:
        pixels = [part["pixel_values_videos"] for part in parts]
        if len({len(video[0]) for video in pixels}) > 1:  # Videos of several lengths go in frame by frame.
            pixels = [video[0][:, None] for video in pixels]
        return BatchFeature(left_padded(parts, processor) | {"pixel_values_videos": torch.cat(pixels)})


def _load(
    config: LlavaVideoConfig, folder: Path, options: LoadOptions, renames: Mapping[str, str] | None = None
) -> PreTrainedModel:
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return load_strict(LlavaVideoForConditionalGeneration, config, folder, options, renames=renames, optional=tied)


def native_config(folder: Path, config: Mapping[str, Any]) -> LlavaVideoConfig:
    """The native config of an upstream folder; UnsupportedError names a setting this class does not have."""
    required = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_resampler_type": (None,),
        "mm_newline_position": ("grid",),
        "mm_spatial_pool_mode": ("bilinear", "average", "max"),
        "add_faster_video": (False, None),
    }
    for name, allowed in required.items():
        if config.get(name) not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise UnsupportedError(
                f"{folder / 'config.json'}: {name} is {config.get(name)!r}, but LLaVA-Video needs {expected}; "
                "other LLaVA checkpoints load from their transformers conversions (llava-hf on the hub)"
            )
    vocabulary = _field(folder, config, "vocab_size")
    video_token, image_token = placeholder_ids(folder, vocabulary)
    return LlavaVideoConfig(
        vision_config=_vision_config(folder, config),
        text_config=_text_config(folder, config),
        pool_mode=config["mm_spatial_pool_mode"],
        pool_stride=config.get("mm_spatial_pool_stride") or 2,
        context_length=config.get("tokenizer_model_max_length"),
        force_sample=bool(config.get("force_sample")),
        video_token_index=video_token,
        image_token_index=image_token,
        image_grid_pinpoints=config.get("image_grid_pinpoints"),
        vision_aspect_ratio=config.get("image_aspect_ratio") or "anyres_max_9",
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        dtype=config.get("torch_dtype") or config.get("dtype"),
    )


def placeholder_ids(folder: Path, vocab_size: int) -> tuple[int, int]:
    """(video, image) token ids that stand for vision tokens in input_ids, where upstream writes -200.

    The tokenizer's own <video> and <image> where it has them; else the highest ids of the embedding matrix that the
    tokenizer never uses (the released checkpoints have 418). Inside the matrix, so that every logits processor of
    generate() accepts them.
    """
    used = read_tokenizer(folder, Qwen2Config()).get_vocab() if has_tokenizer(folder) else {}
    taken = set(used.values())
    free = (index for index in range(vocab_size - 1, -1, -1) if index not in taken)
    chosen = []
    for name in ("<video>", "<image>"):
        own = used.get(name, vocab_size)
        index = own if own < vocab_size else next(free, None)
        if index is None:
            raise CheckpointError(f"{folder}: the tokenizer uses all {vocab_size} ids, so none can stand for {name}")
        chosen.append(index)
    return chosen[0], chosen[1]


def prompt(question: str, clip: VideoClip, time_instruction: bool = True) -> tuple[str, str]:
    """The text before and after the video (ChatML, the authors' wording, no space before "Please")."""
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    told = ""
    if time_instruction:
        times = ",".join(f"{time:.2f}s" for time in clip.times)
        told = (
            f"The video lasts for {clip.duration:.2f} seconds, and {len(clip.frames)} frames are uniformly sampled "
            f"from it. These frames are located at {times}.Please answer the following questions related to this video."
        )
    return before, f"{told}\n{question}<|im_end|>\n<|im_start|>assistant\n"


def pixel_values(clip: VideoClip, side: int) -> Tensor:
    """(F, 3, side, side) float32 in [-1, 1]: frames squashed to a square, PIL bicubic, mean and deviation 0.5."""
    squares = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in clip.images()]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - 0.5) / 0.5


def _refuse_too_long(config: LlavaVideoConfig, length: int, frames: int, text: Callable[[int], int]) -> None:
    """UnsupportedError for more tokens than the model was made for. text(n): tokens of the prompt around n frames."""
    limit = config.context_length
    if limit is None or length <= limit:
        return
    fits, above = 0, frames
    while above - fits > 1:
        middle = (fits + above) // 2
        enough = text(middle) + middle * config.tokens_per_frame <= limit
        fits, above = (middle, above) if enough else (fits, middle)
    remedy = f"use at most {fits} frame{'s' * (fits > 1)}" if fits else "not even one frame fits: shorten the question"
    raise UnsupportedError(
        f"{frames} frames make {length} tokens, but the model was made for {limit} and upstream cuts off the question; "
        f"{remedy}, or set model.config.context_length = None"
    )


def _field(folder: Path, config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise CheckpointError(f"{folder / 'config.json'}: {name} is missing")
    return config[name]


def _text_config(folder: Path, config: Mapping[str, Any]) -> Qwen2Config:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    chosen = {name: _field(folder, config, name) for name in (*sizes, "num_key_value_heads")}
    others = (
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling",
        "use_sliding_window", "sliding_window", "max_window_layers", "attention_dropout", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return Qwen2Config(**chosen, **{name: config[name] for name in others if config.get(name) is not None})


def _vision_config(folder: Path, config: Mapping[str, Any]) -> SiglipVisionConfig:
    """The tower without its last layer, which upstream deletes; the features are the last layer's, before any norm."""
    file, name = folder / "vision_tower_config.json", str(config.get("mm_vision_tower"))
    if file.is_file():
        tower = read_json(file)
        tower = tower.get("vision_config", tower)
        if tower.get("model_type") != "siglip_vision_model":
            raise UnsupportedError(f"{file}: model_type is {tower.get('model_type')!r}, but the tower must be a SigLIP")
    elif "siglip-so400m-patch14-384" in name:
        tower = SO400M
    else:
        raise UnsupportedError(
            f"{folder / 'config.json'}: the shape of mm_vision_tower {name!r} is not known "
            f"(known: siglip-so400m-patch14-384); put the tower's config into {file.name}"
        )
    fields = (*SO400M, "hidden_act", "layer_norm_eps", "attention_dropout", "num_channels")
    shape = {field: tower[field] for field in fields if field in tower}
    return SiglipVisionConfig(
        **{**shape, "num_hidden_layers": tower["num_hidden_layers"] - 1, "vision_use_head": False}
    )
