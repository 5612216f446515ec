"""Checkpoints of MiniCPM-V 2.6: loaded strictly from upstream's layout, saved, loaded again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.minicpm_v_golden import DATA, FAMILY, error, golden_inputs, greedy, load, upstream_folder, write_shards
from transformers import AutoModelForImageTextToText

from tokenreduce.errors import CheckpointError, UnsupportedError
from tokenreduce.models.checkpoint import LoadOptions
from tokenreduce.models.minicpm_v.modeling import MiniCPMVForConditionalGeneration

Model = MiniCPMVForConditionalGeneration


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upstream_folder(tmp_path_factory.mktemp("minicpm") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


def test_shards_load_as_one_file(model: Model, tmp_path: Path) -> None:
    sharded = upstream_folder(tmp_path / "shards")
    write_shards(sharded, 3)
    again = load(sharded)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    inputs = golden_inputs("video_1slice")
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_saved_model_reloads_with_upstreams_names(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == FAMILY.model_type
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(DATA / "state_dict.safetensors").keys()
    inputs = golden_inputs("video_sliced")
    expected = model(**inputs).logits
    natively = FAMILY.load_native(tmp_path, LoadOptions())
    for again in (natively, Model.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)):
        again.eval()
        assert torch.equal(again(**inputs).logits, expected)
        assert again.config.image_start_token_id == 260
        assert again.generation_config.eos_token_id == [259, 257]


def test_bfloat16_stays_close_to_float32(folder: Path, model: Model) -> None:
    half = load(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = golden_inputs("video_sliced")
    logits, expected = half(**inputs).logits[0].float(), model(**inputs).logits[0]
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.99
    assert greedy(half, inputs, max_new_tokens=2, min_new_tokens=2).shape == (1, 2)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    broken = upstream_folder(tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["resampler.query"]
    state["vpm.head.weight"] = torch.zeros(2, 2)
    state["llm.model.norm.weight"] = torch.zeros(64)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refusal:
        load(broken)
    for name in ("missing: resampler.query", "left over: vpm.head.weight", "llm.model.norm.weight"):
        assert name in str(refusal.value)


def test_tower_loses_its_last_layer_unless_the_config_keeps_it(model: Model, tmp_path: Path) -> None:
    cut = upstream_folder(tmp_path / "cut", drop_vision_last_layer=None)
    with pytest.raises(CheckpointError, match=r"left over: vpm\.encoder\.layers\.1\.layer_norm1\.bias"):
        load(cut)
    state = load_file(cut / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("vpm.encoder.layers.1.")}
    save_file(kept, cut / "model.safetensors", metadata={"format": "pt"})
    pixels = torch.randn(1, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    found = load(cut).vpm(pixel_values=pixels).last_hidden_state
    layers = model.vpm.encoder.layers
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    expected = layers[0](model.vpm.embeddings(pixels, mask), attention_mask=None)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert error(found, model.vpm.post_layernorm(expected)) <= 1e-6


def test_tied_head_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    tied = upstream_folder(tmp_path / "tied", tie_word_embeddings=True)
    state = load_file(tied / "model.safetensors")
    del state["llm.lm_head.weight"]
    save_file(state, tied / "model.safetensors", metadata={"format": "pt"})
    again = load(tied)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    assert torch.equal(again.llm.lm_head.weight, state["llm.model.embed_tokens.weight"].float())


def test_other_versions_and_incomplete_folders_are_refused(tmp_path: Path) -> None:
    assert FAMILY.recognises({"model_type": "minicpmv", "version": 4.5})
    assert not FAMILY.recognises({"model_type": "qwen2"})
    with pytest.raises(UnsupportedError, match=r"version 4\.5"):
        load(upstream_folder(tmp_path / "newer", version=4.5))
    bare = upstream_folder(tmp_path / "bare")
    (bare / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load(bare)


def test_random_model_starts_finite_and_stores_no_tables(model: Model) -> None:
    torch.manual_seed(0)
    fresh = MiniCPMVForConditionalGeneration(model.config).eval()
    assert all(".rotary_emb." in name for name, _ in fresh.named_buffers())
    assert 0.01 < float(fresh.resampler.query.std()) < 0.03
    logits = fresh(**golden_inputs("video_1slice")).logits
    assert logits.isfinite().all()
    assert float(logits.std()) > 0
