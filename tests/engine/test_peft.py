"""A model with PEFT adapters is unwrapped: the pipeline acts inside it, and the adapters take part."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tokenreduce as tr
from tokenreduce.errors import UnsupportedError
from tokenreduce.models import prepare
from tokenreduce.testbed import load_embedded

FRAMES = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return wrapped.eval()


def test_lora_acts_and_learns_under_a_pipeline() -> None:
    wrapped = adapted(tr.load_model("embedded", device="cpu"))
    inputs = prepare(wrapped, FRAMES, "Which digit is on the tile?", time_instruction=False)
    with torch.no_grad():
        dense = wrapped(**inputs).logits[:, -1]
        with tr.reduce(wrapped, "fastv", budget=0.5) as run:
            reduced = wrapped(**inputs).logits[:, -1]
            direct = wrapped.get_base_model()(**inputs).logits[:, -1]
            ids = wrapped.generate(**inputs, max_new_tokens=2, do_sample=False)
        with wrapped.disable_adapter(), tr.reduce(wrapped, "fastv", budget=0.5):
            without = wrapped(**inputs).logits[:, -1]
    assert run.trace.layers[-1].tokens.item() < inputs["input_ids"].shape[1] / 1.5
    assert torch.equal(reduced, direct)
    assert not torch.allclose(reduced, without), "the adapters take part"
    assert not torch.allclose(reduced, dense)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
    with tr.reduce(wrapped, "fastv", budget=0.5):
        wrapped(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
    gradients = [p.grad for name, p in wrapped.named_parameters() if "lora_" in name and "language_model" in name]
    assert gradients
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0


def test_a_prompt_of_its_own_is_refused() -> None:
    class Prompted(nn.Module):
        """As PeftModel with prompt tuning is built."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = model
            self.peft_config = {"default": SimpleNamespace(is_prompt_learning=True, peft_type="PROMPT_TUNING")}

        def get_base_model(self) -> nn.Module:
            return self.base_model

    with pytest.raises(UnsupportedError, match=r"adapter default \(PROMPT_TUNING\) puts tokens of its own.*LoRA"):
        tr.reduce(Prompted(load_embedded(device="cpu")), "fastv", budget=0.5)
