"""Models that accelerate has spread over devices or offloaded: the same tokens and logits as the plain model's oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from support.matrix import BY_NAME, LAYERS, PROMPTS, TOLERANCE, check_prefill, generate, greedy, known, model, near

import tokenreduce as tr

EXACT = TOLERANCE[torch.float64]
SOME = ["framefusion", "prune_then_window"]


def on_cpu(subject: Any, folder: Path) -> Any:
    return dispatch_model(subject, device_map={"": "cpu"}, force_hooks=True)


def in_memory(subject: Any, folder: Path) -> Any:
    return cpu_offload(subject, execution_device=torch.device("cpu"))


def on_disk(subject: Any, folder: Path) -> Any:
    disk_offload(subject, str(folder), execution_device=torch.device("cpu"))
    return subject


def here_and_there(subject: Any, folder: Path) -> Any:
    """Some layers in place, some in memory, some on disk."""
    places: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    places |= {f"model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(LAYERS)}
    return dispatch_model(subject, device_map=places, main_device="cpu", offload_dir=str(folder))


WRAPPERS: dict[str, Callable[[Any, Path], Any]] = {
    "dispatch": on_cpu,
    "cpu offload": in_memory,
    "disk offload": on_disk,
    "mixed": here_and_there,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", SOME)
def test_wrapped(name: str, wrapper: str, tmp_path: Path) -> None:
    given, subject = PROMPTS["ragged"](), WRAPPERS[wrapper](model(), tmp_path)
    offloaded = {p.device.type for p in subject.parameters()} == {"meta"}
    assert offloaded == (wrapper in ("cpu offload", "disk offload"))
    expected = known(name, "ragged")
    with torch.no_grad():
        dense = subject(**given.inputs, position_ids=given.positions).logits
    with torch.no_grad(), tr.reduce(subject, BY_NAME[name].load(), layout=given.layout) as run:
        logits = subject(**given.inputs, position_ids=given.positions).logits
        check_prefill(expected, logits, run.trace, EXACT)
        tokens, states = generate(subject, given, max_new_tokens=6)
    ours, own = greedy(expected, 6)
    assert torch.equal(tokens, ours)
    near(states, own, EXACT)
    with torch.no_grad():
        assert torch.equal(subject(**given.inputs, position_ids=given.positions).logits, dense)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_while_a_pipeline_is_attached(wrapper: str, tmp_path: Path) -> None:
    """The other way round; and accelerate's hooks come off before ours."""
    given, subject = PROMPTS["ragged"](), model()
    expected = known("framefusion", "ragged")
    with torch.no_grad():
        dense = subject(**given.inputs, position_ids=given.positions).logits
    with torch.no_grad(), tr.reduce(subject, BY_NAME["framefusion"].load(), layout=given.layout) as run:
        subject = WRAPPERS[wrapper](subject, tmp_path)
        logits = subject(**given.inputs, position_ids=given.positions).logits
        check_prefill(expected, logits, run.trace, EXACT)
        remove_hook_from_module(subject, recurse=True)
    with torch.no_grad():
        assert torch.equal(subject(**given.inputs, position_ids=given.positions).logits, dense)
