"""Quantised checkpoints: served, as stand-ins for the layers of bitsandbytes, GPTQ and AWQ show, or refused by name.

The stand-ins hold what the real layers hold (packed integers, scales, no `weight` or one of another shape and dtype) and compute
what they compute: dequantise, then multiply. The kernels themselves need a GPU.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from support.tiny import PRESETS, SHARE, generate, layout, prompt, tiny_model
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.errors import TokenReduceError, UnsupportedError


class Packed(nn.Module):
    """A linear layer of 4-bit numbers, two to a byte, with a scale per output: the arithmetic that the stand-ins share."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        numbers = (linear.weight.detach() / scale).round().clamp(-8, 7) + 8
        self.keep(numbers.to(torch.uint8), scale)

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        raise NotImplementedError

    def numbers(self) -> tuple[Tensor, Tensor]:
        """(out, in) numbers of 0 to 15, and (out, 1) scales."""
        raise NotImplementedError

    def dequantised(self) -> Tensor:
        numbers, scale = self.numbers()
        return (numbers.float() - 8) * scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


class Bitsandbytes4(Packed):
    """As Linear4bit: `weight` is a parameter of bytes, (N, 1), that is no matrix."""

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        flat = numbers.reshape(-1)
        self.weight = nn.Parameter((flat[::2] * 16 + flat[1::2]).reshape(-1, 1), requires_grad=False)
        self.absmax = scale

    def numbers(self) -> tuple[Tensor, Tensor]:
        pairs = torch.cat([self.weight // 16, self.weight % 16], dim=1)
        return pairs.reshape(self.out_features, self.in_features), self.absmax


class Bitsandbytes8(Packed):
    """As Linear8bitLt: `weight` is a parameter of int8, with scales beside it."""

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(numbers.to(torch.int8) - 8, requires_grad=False)
        self.SCB = scale

    def numbers(self) -> tuple[Tensor, Tensor]:
        return self.weight + 8, self.SCB


class Gptq(Packed):
    """As GPTQ's and AWQ's layers: `qweight` is a buffer of int32, eight numbers to each, and there is no `weight`."""

    def keep(self, numbers: Tensor, scale: Tensor) -> None:
        shifts = torch.arange(0, 32, 4)
        words = (numbers.long().reshape(self.out_features, -1, 8) << shifts).sum(-1)
        self.register_buffer("qweight", torch.where(words >= 2**31, words - 2**32, words).to(torch.int32))
        self.register_buffer("scales", scale)
        self.register_buffer("g_idx", torch.zeros(self.in_features, dtype=torch.int32))

    def numbers(self) -> tuple[Tensor, Tensor]:
        words = self.qweight.long()[..., None] >> torch.arange(0, 32, 4)
        return (words & 15).reshape(self.out_features, self.in_features), self.scales


KINDS = {"bitsandbytes_4bit": Bitsandbytes4, "bitsandbytes_8bit": Bitsandbytes8, "gptq": Gptq, "awq": Gptq}


def quantised(kind: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model whose decoder layers hold stand-ins, and one with the same weights as plain linear layers."""
    model = tiny_model()
    plain = copy.deepcopy(model)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent = model.model.layers.get_submodule(name.rpartition(".")[0])
            stand_in = KINDS[kind](module)
            setattr(parent, name.rpartition(".")[2], stand_in)
            plain.model.layers.get_submodule(name).weight.data = stand_in.dequantised()
    model.config.quantization_config = {"quant_method": kind.partition("_")[0]}
    return model, plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_quantised_model_is_reduced_like_one_of_the_same_weights(kind: str, preset: str) -> None:
    model, plain = quantised(kind)
    assert not any(isinstance(module, nn.Linear) for module in model.model.layers.modules())
    with torch.no_grad():
        assert not torch.equal(model(input_ids=prompt()).logits, tiny_model()(input_ids=prompt()).logits)
    ran = []
    for each in (model, plain):
        with torch.no_grad(), tr.reduce(each, preset, budget=SHARE, layout=layout()) as run:
            ran.append((generate(each), run.trace))
    (ours, trace), (expected, theirs) = ran
    assert torch.equal(ours.sequences, expected.sequences)
    assert torch.equal(torch.stack(ours.logits), torch.stack(expected.logits))
    assert [row.tolist() for row in trace.kept] == [row.tolist() for row in theirs.kept]
    assert trace.kv_bytes == theirs.kv_bytes


def test_budgets_in_flops_and_bytes_hold_too() -> None:
    model, plain = quantised("gptq")
    for budget in ({"flops": 0.7}, {"kv_cache": 0.7}):
        traces = []
        for each in (model, plain):
            with torch.no_grad(), tr.reduce(each, "prune_only", budget=budget, layout=layout()) as run:
                each(input_ids=prompt())
            traces.append(run.trace)
        assert traces[0].flops == traces[1].flops
        assert traces[0].kv_bytes == traces[1].kv_bytes


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, r"\(awq\)"),
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\)"),
        ({"load_in_4bit": True}, r"\(bitsandbytes\)"),
        ({"bits": 4}, "does not name"),
    ],
)
@pytest.mark.parametrize("model_type", ["llava_qwen", "minicpmv"])
def test_our_own_loaders_refuse_a_quantised_checkpoint_by_name(
    said: dict[str, object], named: str, model_type: str, tmp_path: Path
) -> None:
    config = {
        "model_type": model_type,
        "architectures": ["LlavaQwenForCausalLM"],
        "version": 2.6,
        "quantization_config": said,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=f"weights are quantised.*{named}.*load an unquantised checkpoint"):
        tr.load_model(tmp_path)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "(?i)gptq|optimum"),
        ({"quant_method": "awq", "bits": 4}, "(?i)awq|gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_without_the_package_that_reads_it_the_refusal_names_it_in_one_line(
    said: dict[str, object], named: str, tmp_path: Path
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(TokenReduceError, match=named) as caught:
        tr.load_model(tmp_path)
    assert "\n" not in str(caught.value)
