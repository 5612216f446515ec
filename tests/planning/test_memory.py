"""Forecasts of memory against real tensors: the worst moment of a prefill, and the bytes that its KV cache is left with."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import embeddings
from support.families import FAMILIES, Text, Video
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import tokenreduce as tr
from tokenreduce.cli import main
from tokenreduce.errors import BudgetError, TokenReduceError
from tokenreduce.models.llava_video.family import SO400M
from tokenreduce.models.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from tokenreduce.models.minicpm_v.family import SIGLIP
from tokenreduce.models.minicpm_v.modeling import MiniCPMVConfig, MiniCPMVForConditionalGeneration
from tokenreduce.models.parameters import counted
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.architectures import Architecture, architecture
from tokenreduce.planning.cost import DecoderShape, kv_bytes
from tokenreduce.planning.feasibility import read_later, spans
from tokenreduce.planning.memory import Peak, decoder_parameters, largest, parse_bytes, prefill_peak

DEPTH, HIDDEN = 6, 128
LAYOUT = tr.TokenLayout.video(before=14, frames=3, per_frame=210, after=20)
"""What `plan` assumes of a decoder that it does not know."""
TOTAL = LAYOUT.shape[1]
FIXED = ("fastv", "random", "merge_only", "prune_only", "noncascaded_merge", "streaming_llm")
LAST_ROW = {
    "name": "framefusion by the last row",
    "stages": [
        {"strategy": "similarity_merge", "threshold": 0.6},
        {"strategy": "importance_prune", "importance": "last"},
    ],
}


def config(kv_heads: int, ffn: int = 448, **more: Any) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=HIDDEN, intermediate_size=ffn, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=kv_heads, vocab_size=300, max_position_embeddings=4096, initializer_range=0.1, **more,
    )  # fmt: skip


def decoder(kv_heads: int, dtype: torch.dtype, implementation: str = "sdpa", ffn: int = 448, **more: Any) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(kv_heads, ffn, **more), attn_implementation=implementation)
    return made.to(dtype).eval()


class PeakBytes(TorchDispatchMode):
    """Largest sum of storages alive at once, made inside the block."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.sizes, self.peak = dict.fromkeys(known, 0), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def live_and_forecast(model: Any, pipeline: Any) -> tuple[int, Peak]:
    """Bytes that lived at once in a prefill at half of the tokens, its input among them, and the forecast from its counts."""
    x = embeddings(LAYOUT, HIDDEN, "mixed", dtype=model.dtype)
    live = PeakBytes({tensor.untyped_storage()._cdata for tensor in (x, *model.parameters())})
    later: Any = ()
    moving: Any = ()
    attn = ffn = kv = [TOTAL] * DEPTH
    with torch.no_grad():
        if pipeline is None:
            with live:
                model(inputs_embeds=x, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        else:
            with tr.reduce(model, pipeline, layout=LAYOUT, budget=0.5) as run, live:
                model(inputs_embeds=x, logits_to_keep=1)
            layers = run.trace.layers
            kv = [int(layer.tokens[0]) for layer in layers]
            ffn = [int(layer.ffn_tokens[0]) for layer in layers]
            # Stages at `kv` sites leave the hidden states whole.
            attn = ffn if pipeline in ("streaming_llm", "noncascaded_merge") else kv
            stages = build(load_pipeline(pipeline))
            later, moving = read_later(stages, DEPTH), spans(stages, DEPTH)
    eager = model.config._attn_implementation == "eager"
    shape = DecoderShape.from_config(model.config)
    peak = prefill_peak(shape, TOTAL, attn, ffn, kv, model.dtype.itemsize, eager=eager, read_later=later, spans=moving)
    return live.peak + x.nbytes, peak


@pytest.mark.parametrize(
    ("kv_heads", "dtype"), [(1, torch.float32), (4, torch.bfloat16)], ids=["grouped", "multi-head"]
)
@pytest.mark.parametrize(
    "pipeline",
    [None, LAST_ROW, "fastv", "random", "merge_only", "uniform_frames", "streaming_llm", "noncascaded_merge"],
)
def test_the_worst_moment_of_a_prefill_is_forecast(pipeline: Any, kv_heads: int, dtype: torch.dtype) -> None:
    live, peak = live_and_forecast(decoder(kv_heads, dtype), pipeline)
    assert abs(live - peak.total) <= (0.003 if pipeline is None else 0.05) * live


@pytest.mark.parametrize("ffn", [64, HIDDEN])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_decoder_whose_attention_takes_more_than_its_ffn(kv_heads: int, ffn: int) -> None:
    live, peak = live_and_forecast(decoder(kv_heads, torch.float32, ffn=ffn), None)
    assert abs(live - peak.total) <= 0.003 * live


@pytest.mark.parametrize("pipeline", ["streaming_llm", "noncascaded_merge"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_stages_at_the_cache_of_a_decoder_with_a_narrow_ffn(kv_heads: int, pipeline: str) -> None:
    live, peak = live_and_forecast(decoder(kv_heads, torch.float32, ffn=64), pipeline)
    assert abs(live - peak.total) <= 0.06 * live


@pytest.mark.parametrize("pipeline", [None, "fastv"])
def test_a_decoder_whose_norm_takes_more_than_its_attention_and_its_ffn(pipeline: Any) -> None:
    """Two copies in float32 of what the FFN is to read, while the layer's keys and values are cached already."""
    live, peak = live_and_forecast(decoder(2, torch.bfloat16, ffn=64, head_dim=10), pipeline)
    assert abs(live - peak.total) <= (0.01 if pipeline is None else 0.05) * live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_is_forecast_with_its_scores(dtype: torch.dtype) -> None:
    live, peak = live_and_forecast(decoder(1, dtype, "eager"), None)
    assert abs(live - peak.total) <= 0.05 * live
    assert peak.total > 8 * 4 * TOTAL**2


@pytest.mark.parametrize("pipeline", ["framefusion", "prune_only"])
def test_cumulative_importance_takes_no_more_than_its_blocks(pipeline: str) -> None:
    """At this size the two copies of a block of scores, all N × N here, outweigh the decoder; they do not grow beyond it."""
    live, peak = live_and_forecast(decoder(1, torch.float32), pipeline)
    assert peak.total < live < peak.total + 3 * 4 * 4 * TOTAL**2
    assert live < peak.total + 3 * 4 * 2**21


@pytest.mark.parametrize(
    ("kv_heads", "dtype", "share"),
    [(1, torch.float32, 0.75), (1, torch.bfloat16, 0.5), (4, torch.float32, 0.5)],
    ids=["grouped at 0.75", "grouped at 0.5", "multi-head at 0.5"],
)
@pytest.mark.parametrize("name", [*FIXED, "framefusion", "uniform_frames"])
def test_kv_bytes_are_those_of_the_trace_and_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kv_heads: int, dtype: torch.dtype, share: float
) -> None:
    model = decoder(kv_heads, dtype)
    cache = DynamicCache(config=model.config)
    x = embeddings(LAYOUT, HIDDEN, "mixed", dtype=dtype)
    with torch.no_grad(), tr.reduce(model, name, layout=LAYOUT, budget=share) as run:
        model(inputs_embeds=x, past_key_values=cache, logits_to_keep=1)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert [layer.kv_bytes for layer in run.trace.layers] == held
    assert sum(held) <= share * kv_bytes(DecoderShape.from_config(model.config), [TOTAL] * DEPTH, dtype.itemsize)
    config(kv_heads).save_pretrained(tmp_path)
    arguments = ["--frames", "3", "--budget", str(share), "--dtype", str(dtype).removeprefix("torch."), "--json"]
    assert main(["plan", name, "--model", str(tmp_path / "config.json"), *arguments]) == 0
    planned = json.loads(capsys.readouterr().out)[name]
    if name in FIXED:
        assert [layer["kv_bytes"] for layer in planned["layers"]] == held


def meta(name: str) -> Any:
    """The whole model of a known architecture, without memory."""
    arch = architecture(name)
    shape = arch.shape
    text = {
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "tie_word_embeddings": arch.tied,
    }  # fmt: skip
    with torch.device("meta"):
        if name.startswith("llava"):
            tower = SiglipVisionConfig(**SO400M | {"num_hidden_layers": 26, "vision_use_head": False})
            return LlavaVideoForConditionalGeneration(
                LlavaVideoConfig(text_config=Qwen2Config(**text), vision_config=tower)
            )
        if name.startswith("minicpm"):
            return MiniCPMVForConditionalGeneration(MiniCPMVConfig(vision_config=SIGLIP, text_config=text))
        vision = {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": shape.hidden,
            "intermediate_size": 3456 if name.endswith("72b") else 3420,
        }  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=arch.tied)
        )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-video-7b", 8_030_348_832),
        ("llava-video-32b", 32_942_093_856),
        ("llava-video-72b", 73_180_522_016),
        ("minicpm-v-2.6", 8_099_175_152),
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen2.5-vl-72b", 73_410_777_344),
    ],
)
def test_weights_of_the_known_models_are_those_of_the_class(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in meta(name).parameters()) == parameters
    arch = architecture(name)
    assert abs(arch.weight_bytes() - 2 * parameters) <= 1e-4 * 2 * parameters
    assert counted(arch) is arch


def floats_in_sight(model: Any, decoder: Any, inputs: Any) -> tuple[int, int]:
    """Elements of the decoder's embeddings, and of what else of the tower's making is alive when the decoder begins."""
    gc.collect()
    known = {thing.untyped_storage()._cdata for thing in gc.get_objects() if type(thing) is torch.Tensor}
    known |= {parameter.untyped_storage()._cdata for parameter in (*model.parameters(), *model.buffers())}
    seen: list[tuple[int, int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        embeds = kwargs["inputs_embeds"]
        sizes = {}
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.is_floating_point() and thing.numel() > embeds.numel() // 4:
                sizes[thing.untyped_storage()._cdata] = thing.numel()
        own = embeds.untyped_storage()._cdata
        seen.append((embeds.numel(), sum(size for key, size in sizes.items() if key not in known | {own})))

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def test_the_tower_leaves_behind_what_the_plan_says() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model, inputs = family.model(), family.sample([[Text(3), Video(16), Text(5)]]).inputs
    embeds, held = floats_in_sight(model, model.model.language_model, inputs)
    tokens, width = 96, 64
    assert held == 2 * tokens * width + 4 * tokens * model.config.vision_config.hidden_size
    arch = architecture("qwen2.5-vl-7b")
    assert arch.held_per_step == 2 * arch.tokens_per_frame * arch.shape.hidden + 4 * arch.tokens_per_frame * 1280

    config = LlavaVideoConfig(
        text_config=Qwen2Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=300,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=14,
            image_size=56, vision_use_head=False,
        ),
        video_token_id=290, image_token_id=291,
    )  # fmt: skip
    model = LlavaVideoForConditionalGeneration(config).eval()
    vision = 4 * config.tokens_per_frame
    ids = torch.tensor([[5] * 4 + [290] * vision + [6] * 3])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 4, 3, 56, 56)}
    embeds, held = floats_in_sight(model, model.model.language_model, inputs)
    assert embeds == 64 * ids.shape[1]
    # Two outputs of the tower: its last layer's, and the same normalised.
    tower = 4 * 16 * 32
    assert held == vision * 64 + 2 * tower
    arch = architecture("llava-video-7b")
    assert arch.held_per_step == arch.tokens_per_frame * arch.shape.hidden + 2 * 729 * 1152
    assert arch.held(3) == 3 * arch.held_per_step


def test_weights_of_a_config_are_counted(tmp_path: Path) -> None:
    model = decoder(4, torch.float32)
    config(4).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    facts = json.loads(file.read_text())
    # Without the class's name, from the shape: all but the biases.
    assert counted(architecture(tmp_path)).parameters is None
    file.write_text(json.dumps(facts | {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}))
    arch = counted(architecture(tmp_path))
    assert arch.weight_bytes() == sum(parameter.nbytes for parameter in model.parameters())
    assert arch.positions == 4096
    assert "all weights counted" in arch.note
    file.write_text(json.dumps(facts | {"architectures": ["NobodysModel"], "dtype": "float32"}))
    arch = counted(architecture(file))
    biases = DEPTH * 3 * HIDDEN
    assert arch.weight_bytes() == sum(parameter.nbytes for parameter in model.parameters()) - 4 * biases
    assert "no vision tower" in arch.note


def test_parameters_of_a_shape() -> None:
    shape = DecoderShape(layers=2, hidden=8, ffn=20, heads=4, kv_heads=2, head_dim=2, vocab=50)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 20 + 2 * 8
    assert decoder_parameters(shape) == 2 * layer + 8 + 2 * 50 * 8
    assert decoder_parameters(shape, tied=True) == 2 * layer + 8 + 50 * 8
    with pytest.raises(BudgetError, match=r"give its config\.json"):
        decoder_parameters(DecoderShape(2, 8, 20, 4, 2, 2, 50, router=4))


@given(edge=st.integers(0, 300), most=st.integers(1, 200))
def test_largest_finds_the_edge(edge: int, most: int) -> None:
    assert largest(lambda n: n <= edge, most) == min(edge, most)


def test_amounts_of_memory() -> None:
    amounts = {"24GiB": 24 * 2**30, "1.5 gb": 1_500_000_000, "7b": 7, "0.5KiB": 512, "3 MB": 3_000_000, "2TiB": 2**41}
    assert {text: parse_bytes(text) for text in amounts} == amounts
    for text in ("", "24", "GiB", "-1GiB", "0GiB", "0.1B", "24 GiBs", "1e3MB", "nanGiB", "24GiB/s"):
        with pytest.raises(TokenReduceError, match="such as 24GiB"):
            parse_bytes(text)


def test_more_memory_is_never_fewer_frames() -> None:
    from tokenreduce.planning.longest import dense, longest_video

    arch: Architecture = architecture("qwen2.5-vl-7b")
    memories = [arch.weight_bytes() + step * 2**26 for step in range(0, 300, 7)]
    frames = [longest_video(arch, dense(arch), memory)["frames_by_memory"] for memory in memories]
    assert frames == sorted(frames)
    assert frames[0] == 0 < frames[-1]
