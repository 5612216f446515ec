"""What ran dense without a word, or failed inside a layer, is refused; and decoding asks nothing, shown without a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import SHARE, generate, layout, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import tokenreduce as tr
from tokenreduce.compare import clock
from tokenreduce.errors import UnsupportedError
from tokenreduce.ops import attention as attention_ops

WAIT = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal"}


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = tiny_model()
    with tr.reduce(model, "random", budget=SHARE, layout=layout()):
        copy = model._replicate_for_data_parallel()
        with torch.no_grad(), pytest.raises(UnsupportedError, match="DataParallel runs copies of the model"):
            copy(input_ids=prompt())


def test_flash_attention_with_stages_at_kv_sites_is_refused_at_once() -> None:
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match=r"kv` sites need sdpa or eager attention, not flash_attention_2"):
        tr.reduce(model, "streaming_llm", budget=SHARE, layout=layout())


class Asked(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.split("::")[1] in WAIT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", [None, "framefusion", "streaming_llm", "noncascaded_merge"])
def test_a_token_asks_nothing(preset: str | None) -> None:
    """More tokens are no more questions than without a pipeline; needs no compiler, see test_synchronisations for the rest."""

    def asked(name: str | None, tokens: int) -> int:
        model, mode = tiny_model(), Asked()
        run = tr.reduce(model, name, budget=SHARE, layout=layout()) if name else None
        with torch.no_grad(), mode:
            generate(model, tokens=tokens)
        if run is not None:
            run.detach()
        return mode.count

    per_token = asked(preset, 6) - asked(preset, 3)
    assert per_token <= asked(None, 6) - asked(None, 3)


def test_a_kernel_that_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Kernels:
        DTYPES, MAX_WIDTH = (torch.float32,), 256

        @staticmethod
        def gpu_column_sums(*_: Any) -> Any:
            tried.append(1)
            raise RuntimeError("no compiler")

    monkeypatch.setattr(attention_ops, "_kernels", lambda: Kernels)
    q = torch.randn(2, 5, 8)
    with pytest.warns(UserWarning, match="its GPU kernel failed"):
        assert attention_ops._gpu_sums(q, q, 1.0, 5) is None
    assert attention_ops._gpu_sums(q, q, 1.0, 5) is None
    assert len(tried) == 1


def test_the_clock_waits_for_every_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda number: number != 1, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock.now(torch.device("cpu"))
    assert waited == [torch.device("cuda", 0), torch.device("cuda", 2)]
