"""Checkpoints of MiniCPM-V 2.6: how they are recognised, loaded from upstream's layout, and fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedModel, Qwen2Config, Qwen2Tokenizer

from tokenreduce.config.json_source import shown
from tokenreduce.errors import CheckpointError, UnsupportedError, foreign
from tokenreduce.media.video import VideoClip
from tokenreduce.models.checkpoint import LoadOptions, load_strict, read_json
from tokenreduce.models.family import Family, left_padded
from tokenreduce.models.minicpm_v.modeling import MiniCPMVConfig, MiniCPMVForConditionalGeneration
from tokenreduce.models.minicpm_v.processing import build_video_inputs, join_pictures, sample_frames
from tokenreduce.models.request import VideoQuestion

SIGLIP = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
"""Upstream's vision tower, where its config.json does not say otherwise."""

SPECIAL_TOKENS = {
    "image_token_id": "<unk>",
    "image_start_token_id": "<image>",
    "image_end_token_id": "</image>",
    "slice_start_token_id": "<slice>",
    "slice_end_token_id": "</slice>",
    "image_id_start_token_id": "<image_id>",
    "image_id_end_token_id": "</image_id>",
}
"""Config field and text of the tokens around pictures."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Either ends an answer, as in upstream's chat()."""


class MiniCPMVFamily(Family):
    """How checkpoints of MiniCPM-V 2.6 are recognised, loaded and fed."""

    name = "minicpm_v"
    model_type = MiniCPMVConfig.model_type

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether this is upstream's config.json, of 2.6 or of another version, which `load` refuses by name."""
        return config.get("model_type") == "minicpmv"

    def load(self, folder: Path, config: Mapping[str, Any], options: LoadOptions) -> PreTrainedModel:
        """The native model with the weights of an upstream folder, and its two end tokens for `generate`."""
        _refuse_other_versions(folder, config)
        tokenizer = self.processor(folder)
        model = _load(folder, config_from_upstream(folder, config, tokenizer), options)
        ends = [int(token) for token in tokenizer.convert_tokens_to_ids(END_TOKENS)]
        model.generation_config.update(eos_token_id=ends, pad_token_id=ends[1])
        return model

    def load_native(self, folder: Path, options: LoadOptions) -> PreTrainedModel:
        """The native model from a folder that `save_pretrained` wrote."""
        return _load(folder, MiniCPMVConfig.from_pretrained(folder), options)

    def processor(self, folder: Path) -> Any:
        """The tokenizer: Qwen2's, whatever class of remote code the folder names."""
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{folder}: no tokenizer.json and no vocab.json; copy the checkpoint's tokenizer files there"
            )
        with foreign(CheckpointError, f"{shown(folder)}: its tokenizer cannot be read"):
            return Qwen2Tokenizer.from_pretrained(folder)

    def look(self, model: PreTrainedModel, request: VideoQuestion) -> VideoClip:
        """The authors' rule (`sample_frames`), which counts frames."""
        return request.clip(sample_frames, count=True)

    def prepare(self, model: PreTrainedModel, request: VideoQuestion, processor: Any) -> BatchFeature:
        """Inputs for `model(**inputs)` and `model.generate(**inputs)`; `build_video_inputs` says what they are."""
        return build_video_inputs(request, processor, model.config)

    def batch(self, parts: Sequence[BatchFeature], processor: Any) -> BatchFeature:
        return BatchFeature(left_padded(parts, processor) | join_pictures(parts))


def config_from_upstream(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> MiniCPMVConfig:
    """The native config for upstream's config.json, its preprocessor_config.json (where there is one) and tokenizer.

    Raises:
        CheckpointError: the tokenizer lacks a token that the model needs.
    """
    vision = SIGLIP | {key: value for key, value in config.get("vision_config", {}).items() if key != "model_type"}
    # Upstream's code drops the tower's last layer unless the config says not to; the released config does.
    vision["num_hidden_layers"] -= bool(config.get("drop_vision_last_layer", True))
    known = Qwen2Config().to_dict().keys() - {"model_type", "transformers_version", "dtype"}
    text = {key: value for key, value in config.items() if key in known | {"rope_theta", "rope_scaling"}}
    processing = folder / "preprocessor_config.json"
    slicing = read_json(processing) if processing.is_file() else config.get("slice_config") or {}
    return MiniCPMVConfig(
        vision_config=vision,
        text_config=text,
        query_num=config.get("query_num", 64),
        scale_resolution=slicing.get("scale_resolution", 448),
        dtype=config.get("torch_dtype"),
        **special_ids(folder, tokenizer),
    )


def special_ids(folder: Path, tokenizer: Any) -> dict[str, int]:
    """Config fields for the ids of the tokens around pictures, and of the newline between them.

    Raises:
        CheckpointError: the tokenizer lacks some of them.
    """
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in (*SPECIAL_TOKENS.values(), *END_TOKENS) if token not in vocabulary]
    if absent:
        raise CheckpointError(
            f"{folder}: the tokenizer lacks {', '.join(absent)}; copy the checkpoint's own tokenizer files there"
        )
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    return {field: vocabulary[token] for field, token in SPECIAL_TOKENS.items()} | {"newline_token_id": newline}


def _load(folder: Path, config: MiniCPMVConfig, options: LoadOptions) -> PreTrainedModel:
    tied = ("llm.lm_head.weight",) if config.tie_word_embeddings else ()
    return load_strict(MiniCPMVForConditionalGeneration, config, folder, options, optional=tied)


def _refuse_other_versions(folder: Path, config: Mapping[str, Any]) -> None:
    version = config.get("version")
    if version != 2.6:
        raise UnsupportedError(
            f"{folder}/config.json: MiniCPM-V of version {version} is another architecture; "
            "tokenreduce loads version 2.6 of this family"
        )
