"""Layers on several GPUs, pretended: nothing is mixed, the same tokens are kept, and the logits are the CPU's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import fakecuda, tiny
from support.fakecuda import FakeTensor, Machine, MixedDevicesError, inner, on, place, scenarios
from support.fakecuda.scenarios import Scenario

import tokenreduce as tr

pytestmark = pytest.mark.skipif(bool(fakecuda.missing()), reason=fakecuda.missing())
ALL = scenarios.several_gpus()
SAMPLE = set(random.Random(15).sample(ALL, 36))
STREAMS = {
    "merge": {"strategy": "similarity_merge", "threshold": 0.6, "at": 0, "stop_below": 0, "max_run": 4},
    "window": {"strategy": "streaming_window", "sinks": 4, "window": 16},
}


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    scenarios.stand_in_kernels(monkeypatch)


def test_the_list_is_long_enough() -> None:
    assert len(ALL) >= 300
    assert len(SAMPLE) == 36


@pytest.mark.parametrize(
    "scenario", [pytest.param(s, id=str(s), marks=() if s in SAMPLE else pytest.mark.slow) for s in ALL]
)
@torch.no_grad()
def test_a_model_on_two_gpus_is_the_one_on_the_cpu(scenario: Scenario) -> None:
    expected = scenarios.run(scenario)
    with Machine() as machine:
        found = scenarios.run(scenario, machine)
    scenarios.same(found, expected)


def test_the_harness_refuses_mixed_devices() -> None:
    """Else the tests above would prove nothing."""
    with Machine() as machine:
        left, right = FakeTensor(torch.ones(2), "cuda:0"), FakeTensor(torch.ones(2), "cuda:1")
        with pytest.raises(MixedDevicesError, match="add: operands on"):
            left + right
        with pytest.raises(MixedDevicesError, match="mul: a CPU tensor"):
            left * torch.ones(2)
        assert machine.count() == 0
        assert float((left + left.cpu().to("cuda:0")).sum()) == 4.0
        assert [event.kind for event in machine.events] == ["sync", "H2D", "sync"]


def stream(model: Any, stage: dict[str, Any], device: int | None) -> list[torch.Tensor]:
    """Logits after every chunk of a stream."""
    random_ = torch.Generator().manual_seed(0)

    def there(x: torch.Tensor) -> torch.Tensor:
        return x if device is None else on(x, device)

    with tr.stream(model, {"name": "stream", "stages": [stage]}, width=16) as opened:
        opened.feed_text(there(torch.randint(2, 60, (1, 5), generator=random_)))
        for _ in range(4):
            opened.feed_frames(there(torch.randn(2, 6, 32, generator=random_)))
        out = opened.finish(there(torch.randn(1, 4, 32, generator=random_)))
    return [inner(out.logits if hasattr(out, "logits") else out)]


@pytest.mark.parametrize("seam", [None, 1, 2])
@pytest.mark.parametrize("stage", STREAMS)
@torch.no_grad()
def test_a_stream_goes_over_the_seam(stage: str, seam: int | None) -> None:
    expected = stream(tiny.tiny_model(), STREAMS[stage], None)
    with Machine():
        model = tiny.tiny_model()
        places = {"": 0} if seam is None else fakecuda.seam(model, model.model, seam)
        found = stream(place(model, places), STREAMS[stage], 0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
