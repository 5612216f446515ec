"""`tr.plan`: what the command line prints, for a name, a path, a config and a model, and every refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tokenreduce as tr
from tokenreduce.cli import main
from tokenreduce.errors import BudgetError, PipelineError, TokenReduceError, UnsupportedError
from tokenreduce.models.parameters import counted
from tokenreduce.planning.architectures import architecture
from tokenreduce.planning.cost import DecoderShape, kv_bytes

TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "intermediate_size": 96, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
}  # fmt: skip
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
TOWER = {
    "name": "tower",
    "budget": 0.5,
    "stages": [{"strategy": "patch_merge", "at": 1, "keep": 0.5}, {"strategy": "importance_prune"}],
}


def config() -> transformers.PretrainedConfig:
    return transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, dtype="bfloat16")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["framefusion", "fastv", "streaming_llm", "uniform_frames"])
def test_a_plan_is_what_the_command_line_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tr.plan(name, "qwen2.5-vl-7b", frames=20, budget=0.4, similar=0.25, dtype="float32")
    options = ["--frames", "20", "--budget", "0.4", "--similar", "0.25", "--dtype", "float32"]
    assert printed(capsys, name, "--model", "qwen2.5-vl-7b", *options) == {name: plan.to_dict()}
    assert printed(capsys, name, "--model", "qwen2.5-vl-7b") != {name: plan.to_dict()}


def test_name_path_config_and_model_make_one_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is on the meta device: a plan that touched a weight would fail."""
    config().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config()).to(torch.bfloat16)
    plans = [
        tr.plan("framefusion", source, frames=16, budget=0.5)
        for source in (tmp_path, str(tmp_path / "config.json"), config(), model)
    ]
    expected = printed(capsys, "framefusion", "--model", str(tmp_path), "--frames", "16", "--budget", "0.5")
    for plan in plans:
        assert {"framefusion": plan.to_dict()} == expected
        assert str(plan.budget) == "tokens 0.5"
    assert len(plans[0].layers) == 6
    assert [plan.model for plan in plans] == [str(tmp_path), str(tmp_path / "config.json"), *["qwen2_5_vl"] * 2]


def test_a_model_is_planned_in_the_dtype_that_it_has() -> None:
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config()).float()
    half, whole = tr.plan("fastv", config(), budget=0.7), tr.plan("fastv", model, budget=0.7)
    assert 2 * half.kv_bytes == whole.kv_bytes
    assert tr.plan("fastv", model, budget=0.7, dtype="float16").to_dict() == half.to_dict()


def test_a_loaded_model_says_what_its_weights_take() -> None:
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config()).float()
    known = architecture(model)
    assert known.weight_bytes() == 4 * model.num_parameters()
    assert counted(known) is known
    assert architecture(known) is known


def test_the_totals_are_those_of_the_layers() -> None:
    plan = tr.plan("framefusion", "llava-video-7b")
    shape = DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)
    held = [layer.tokens for layer in plan.layers]
    assert [layer.layer for layer in plan.layers] == list(range(28))
    assert plan.mean_tokens == sum(held) / 28
    assert plan.relative_tokens == pytest.approx(plan.mean_tokens / plan.tokens, rel=1e-12)
    assert plan.relative_tokens <= 0.3
    assert plan.kv_bytes == sum(layer.kv_bytes for layer in plan.layers) == kv_bytes(shape, held, 2)
    assert plan.dense_kv_bytes == kv_bytes(shape, [plan.tokens] * 28, 2)
    assert plan.flops == sum(layer.flops for layer in plan.layers) + 2 * 3584 * 152064
    assert plan.predicted_speedup > 1 > plan.relative_flops


def test_a_plan_can_be_read() -> None:
    plan = tr.plan(TOWER, "llava-video-7b")
    lines = str(plan).splitlines()
    assert lines[0] == f"tower on llava-video-7b, budget tokens 0.5, {plan.tokens:,} tokens of input"
    assert plan.tower == ("patch_merge at vision.block[1] leaves 0.5 of each frame's patches",)
    assert lines[-2].endswith(plan.tower[0])
    assert lines[-1].strip() == plan.summary
    assert len(lines) == 3 + len(list(plan.alike()))
    assert [last.layer for _, last in plan.alike()][-1] == 27
    assert "\n" not in repr(plan)
    assert "tower on llava-video-7b" in repr(plan)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "part"),
    [
        (("fastv", "llava-vidoe-7b"), {}, UnsupportedError, "did you mean 'llava-video-7b'"),
        (("fastvv",), {}, PipelineError, "did you mean 'fastv'"),
        (("fastv",), {"dtype": "bfloat15"}, UnsupportedError, "did you mean 'bfloat16'"),
        (("fastv", "nowhere/config.json"), {}, UnsupportedError, "nowhere/config.json: cannot be read (No such file"),
        (("fastv", 7), {}, UnsupportedError, "no model in a int: give a known name (llava-video-"),
        (("fastv",), {"budget": 0.01}, BudgetError, "fastv on llava-video-7b: budget tokens 0.01 cannot be met"),
        (("fastv",), {"budget": 2}, BudgetError, "a bare budget is the share that remains"),
        (("framefusion",), {"similar": 1.5}, BudgetError, "similar: expected a share in [0, 1] of the tokens, got 1.5"),
        (("framefusion",), {"frames": 0}, BudgetError, "at least 1 frame, got 0"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    arguments: tuple[Any, ...], options: dict[str, Any], kind: type[TokenReduceError], part: str
) -> None:
    with pytest.raises(kind) as raised:
        tr.plan(*arguments, **options)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)
