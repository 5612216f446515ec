"""What a real device has to show: `make gpu-check` runs these there; `make gpu-check SMALL=1` rehearses them on the CPU.

They are marked `gpu` and left out of `make test`: the environment variable TOKENREDUCE_GPU_TESTS names the device.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.families import FAMILIES, Text, Video
from support.tiny import PRESETS, SHARE, layout, prompt, tiny_model

import tokenreduce as tr
from tokenreduce.ops.attention import column_sums, importance

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("TOKENREDUCE_GPU_TESTS", "cpu"))


@pytest.mark.parametrize("queries", [1, 32, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "groups", "n", "m", "width"), [(4, 2, 300, 300, 64), (7, 1, 300, 417, 128), (8, 8, 300, 301, 96)]
)
def test_importance_equals_float64(
    heads: int, groups: int, n: int, m: int, width: int, dtype: torch.dtype, queries: int
) -> None:
    """The kernel of the device against plain torch in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(heads, n, width, generator=generator).to(dtype)
    k = torch.randn(groups, m, width, generator=generator).to(dtype)
    found = importance(q.to(DEVICE), k.to(DEVICE), width**-0.5, queries)
    exact = column_sums(q.double(), k.double(), width**-0.5, queries).mean(0)
    assert found.device.type == DEVICE.type
    # Probabilities of `queries` rows are summed; inputs of half precision are the same on both sides.
    assert torch.allclose(found.cpu().double(), exact, atol=2e-5 * queries, rtol=2e-3)


def outcome(
    model: Any, preset: str, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """Kept tokens, logits of the last token, and generated ids, on the CPU."""
    with torch.no_grad(), tr.reduce(model, preset, budget=SHARE, layout=layout()) as run:
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits
        kept = [row.cpu() for row in run.trace.kept]
        run.layout = layout()
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    return kept, logits.cpu(), out.cpu()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_and_logits_are_those_of_the_cpu(preset: str, ragged: bool) -> None:
    model, ids = tiny_model(), prompt(rows=3 if ragged else 1)
    mask = torch.ones_like(ids)
    if ragged:
        mask[0, :2], mask[1, :1] = 0, 0
    expected = outcome(model, preset, ids, mask)
    found = outcome(model.to(DEVICE), preset, ids.to(DEVICE), mask.to(DEVICE))
    for a, b in zip(expected[0], found[0], strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(expected[1], found[1], atol=1e-3, rtol=1e-3)
    assert torch.equal(expected[2], found[2])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_whole_models_are_those_of_the_cpu(family: str) -> None:
    subject = FAMILIES[family]
    model = subject.model()
    inputs = subject.sample([[Text(4), Video(4), Text(5)]]).inputs
    with torch.no_grad(), tr.reduce(model, "framefusion", budget=0.7) as run:
        expected = model(**inputs).logits
        kept = run.trace.kept[0]
    model = model.to(DEVICE)
    with torch.no_grad(), tr.reduce(model, "framefusion", budget=0.7) as run:
        found = model(**{name: value.to(DEVICE) for name, value in inputs.items()}).logits
        assert torch.equal(run.trace.kept[0].cpu(), kept)
    assert torch.allclose(found.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_stream_is_that_of_the_cpu() -> None:
    pipeline = {"stages": [{"strategy": "similarity_merge", "at": 0, "threshold": 0.6, "stop_below": 0.0}]}
    outputs = []
    model = tiny_model()
    frames = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0))
    frames[1:, ::2] = frames[:1, ::2]
    for device in (torch.device("cpu"), DEVICE):
        model = model.to(device)
        with torch.no_grad(), tr.stream(model, pipeline, width=8) as stream:
            stream.feed_text(prompt()[:, :3].to(device))
            for frame in frames.split(2):
                stream.feed_frames(frame.to(device))
            outputs.append(stream.finish(model.get_input_embeddings()(prompt()[:, 3:8].to(device))).logits.cpu())
    assert torch.allclose(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_several_devices(preset: str) -> None:
    """Layers on two devices, as `device_map="auto"` puts them: the same tokens as on one."""
    if DEVICE.type == "cpu":
        places = ["cpu", "cpu"]
    elif torch.accelerator.device_count() < 2:
        pytest.skip("one device only: what crosses a seam is tested with pretended devices (tests/support/fakecuda)")
    else:
        places = [f"{DEVICE.type}:0", f"{DEVICE.type}:1"]
    from accelerate import dispatch_model

    ids, model = prompt(), tiny_model()
    expected = outcome(model, preset, ids)
    seam = {f"model.layers.{number}": places[number >= 2] for number in range(4)}
    spread = dispatch_model(
        model,
        {
            "model.embed_tokens": places[0],
            "model.rotary_emb": places[0],
            **seam,
            "model.norm": places[1],
            "lm_head": places[1],
        },
        force_hooks=True,
    )
    found = outcome(spread, preset, ids.to(places[0]))
    for a, b in zip(expected[0], found[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(expected[2], found[2])
