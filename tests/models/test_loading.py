"""load_model: what it reads, and that it refuses everything that does not fit, naming it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llava_video_golden import CHECKPOINT, copy_checkpoint, shard
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tokenreduce.errors import CheckpointError, UnsupportedError
from tokenreduce.models import families, load_model, loading
from tokenreduce.models.llava_video.family import native_config, placeholder_ids
from tokenreduce.models.llava_video.modeling import LlavaVideoForConditionalGeneration

Tensors = dict[str, Tensor]
FRAME = np.zeros((1, 8, 8, 3), np.uint8)


def change_weights(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def refusal(path: Path | str, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestStrictness:
    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        folder = change_weights(copy_checkpoint(tmp_path / "c"), lambda t: t.pop("model.image_newline"))
        assert refusal(folder).endswith("the tensors do not fit the model; 1 missing: model.image_newline")

    def test_a_tensor_left_over(self, tmp_path: Path) -> None:
        extra = {"model.layers.4.mlp.up_proj.weight": torch.zeros(2)}
        folder = change_weights(copy_checkpoint(tmp_path / "c"), lambda t: t.update(extra))
        assert "1 left over: model.language_model.layers.4.mlp.up_proj.weight" in refusal(folder)

    def test_a_tensor_of_another_shape(self, tmp_path: Path) -> None:
        wrong = {"model.mm_projector.2.bias": torch.zeros(63)}
        folder = change_weights(copy_checkpoint(tmp_path / "c"), lambda t: t.update(wrong))
        message = refusal(folder)
        assert "1 of another shape: model.multi_modal_projector.linear_2.bias [63] instead of [64]" in message

    def test_all_faults_at_once(self, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> None:
            tensors["lm_heat.weight"] = tensors.pop("lm_head.weight")
            del tensors["model.norm.weight"]

        message = refusal(change_weights(copy_checkpoint(tmp_path / "c"), change))
        assert "2 missing: lm_head.weight, model.language_model.norm.weight; 1 left over: lm_heat.weight" in message

    def test_a_saved_model_is_held_to_the_same(self, tmp_path: Path) -> None:
        load_model(CHECKPOINT).save_pretrained(tmp_path)
        change_weights(tmp_path, lambda t: t.pop("model.language_model.norm.weight"))
        assert "1 missing: model.language_model.norm.weight" in refusal(tmp_path)

    def test_a_tied_head_needs_no_tensor(self, tmp_path: Path) -> None:
        folder = copy_checkpoint(tmp_path / "c", tie_word_embeddings=True)
        model = load_model(change_weights(folder, lambda t: t.pop("lm_head.weight")))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path / "saved")
        again = load_model(tmp_path / "saved")
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)

    def test_a_shard_that_is_not_there(self, tmp_path: Path) -> None:
        folder = copy_checkpoint(tmp_path / "c")
        shard(folder, pieces=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        assert "not in the folder: model-00002-of-00003.safetensors" in refusal(folder)

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        folder = copy_checkpoint(tmp_path / "c")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert "model.safetensors: not a readable safetensors file" in refusal(folder)

    def test_pickled_weights_are_not_read(self, tmp_path: Path) -> None:
        folder = copy_checkpoint(tmp_path / "c")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


class TestFolders:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        assert "no such folder" in refusal(tmp_path / "gone")

    def test_a_file(self) -> None:
        assert "give the checkpoint folder" in refusal(CHECKPOINT / "config.json")

    def test_no_config(self, tmp_path: Path) -> None:
        assert "config.json: cannot be read (No such file or directory)" in refusal(tmp_path)

    @pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object")])
    def test_broken_config(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "config.json").write_text(text)
        assert message in refusal(tmp_path)

    def test_hub_name_without_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*_: object) -> str:
            raise OSError("no route")

        monkeypatch.setattr(loading, "hf_hub_download", unreachable)
        assert refusal("lmms-lab/LLaVA-Video-7B-Qwen2").endswith("not found on the model hub (no route)")

    def test_hub_name_with_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "hf_hub_download", lambda name, file: str(CHECKPOINT / file))
        monkeypatch.setattr(loading, "snapshot_download", lambda name, allow_patterns: str(CHECKPOINT))
        assert isinstance(load_model("lmms-lab/LLaVA-Video-7B-Qwen2"), LlavaVideoForConditionalGeneration)


def upstream_config(**changes: Any) -> dict[str, Any]:
    config = json.loads((CHECKPOINT / "config.json").read_text()) | changes
    return {name: value for name, value in config.items() if value is not None}


SEVEN = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "model_type": "llava",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
}


class TestUpstreamConfig:
    def test_the_released_seven_billion(self, tmp_path: Path) -> None:
        """Qwen2-7B has 7,615,616,512 parameters; the tower loses 1 of 27 layers and its head."""
        config = native_config(tmp_path, upstream_config(**SEVEN))
        with torch.device("meta"):
            model = LlavaVideoForConditionalGeneration(config)
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
        assert count["language_model"] + model.lm_head.weight.numel() == 7_615_616_512
        layer = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
        assert count["vision_tower"] == 26 * layer + (3 * 14**2 + 1) * 1152 + 729 * 1152 + 2 * 1152
        assert count["multi_modal_projector"] == 1152 * 3584 + 3584 + 3584**2 + 3584
        assert (config.tokens_per_frame, config.context_length, config.force_sample) == (210, 32768, True)
        assert config.text_config.rope_parameters["rope_theta"] == 1e6

    def test_the_dtype_the_checkpoint_states(self, tmp_path: Path) -> None:
        folder = copy_checkpoint(tmp_path / "c", torch_dtype="bfloat16")
        assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
        assert {p.dtype for p in load_model(folder, dtype=torch.float32).parameters()} == {torch.float32}

    def test_the_thirty_two_billion_pools_by_average(self, tmp_path: Path) -> None:
        assert native_config(tmp_path, upstream_config(**SEVEN, mm_spatial_pool_mode="average")).tokens_per_frame == 182

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("mm_newline_position", "one_token", "mm_newline_position is 'one_token', but LLaVA-Video needs 'grid'"),
            ("mm_newline_position", None, "mm_newline_position is None"),
            ("mm_resampler_type", "perceiver", "mm_resampler_type is 'perceiver'"),
            ("add_faster_video", True, "add_faster_video is True"),
            ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "put the tower's config into vision_tower_config"),
        ],
    )
    def test_settings_it_does_not_have(self, tmp_path: Path, field: str, value: Any, message: str) -> None:
        with pytest.raises(UnsupportedError) as error:
            native_config(tmp_path, upstream_config(**{**SEVEN, field: value}))
        assert message in str(error.value)

    def test_a_field_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"config\.json: num_key_value_heads is missing"):
            native_config(tmp_path, upstream_config(**{**SEVEN, "num_key_value_heads": None}))

    def test_a_tower_that_is_no_siglip(self, tmp_path: Path) -> None:
        folder = copy_checkpoint(tmp_path / "c")
        (folder / "vision_tower_config.json").write_text('{"model_type": "clip_vision_model"}')
        assert "must be a SigLIP" in refusal(folder, UnsupportedError)

    def test_placeholders_are_ids_that_no_text_uses(self, tmp_path: Path) -> None:
        assert placeholder_ids(CHECKPOINT, 300) == (299, 298)
        assert placeholder_ids(tmp_path, 300) == (299, 298)
        with pytest.raises(CheckpointError, match="uses all 259 ids"):
            placeholder_ids(CHECKPOINT, 259)
        folder = copy_checkpoint(tmp_path / "c")
        tokenizer = AutoTokenizer.from_pretrained(folder, config=Qwen2Config())
        tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
        tokenizer.save_pretrained(folder)
        assert placeholder_ids(folder, 300) == (259, 299)


def tiny_qwen2() -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes))


class TestThroughTransformers:
    def test_a_language_model(self, tmp_path: Path) -> None:
        model = tiny_qwen2()
        model.save_pretrained(tmp_path)
        again = load_model(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
        assert (type(again), again.dtype, again.training) == (Qwen2ForCausalLM, torch.bfloat16, False)
        assert again.config._attn_implementation == "eager"

    def test_gaps_are_refused_here_too(self, tmp_path: Path) -> None:
        tiny_qwen2().save_pretrained(tmp_path)
        change_weights(tmp_path, lambda t: t.pop("model.norm.weight"))
        assert "tensors missing: model.norm.weight" in refusal(tmp_path)

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "quince"}')
        message = refusal(tmp_path, UnsupportedError)
        assert all(family.name in message for family in families())

    def test_remote_code_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
        (tmp_path / "own.py").write_text("raise SystemExit('run')")
        refusal(tmp_path, UnsupportedError)
