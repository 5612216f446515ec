"""The example of docs/adapters.md runs as it is printed there."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenreduce import plugins
from tokenreduce.errors import UnsupportedError
from tokenreduce.layout import TokenLayout

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def package() -> Iterator[types.ModuleType]:
    """An empty package to write the example into; taken out of the plugin manager afterwards."""
    module = types.ModuleType("my_package")
    torch.manual_seed(0)
    yield module
    if plugins.manager().is_registered(module):
        plugins.manager().unregister(module)


def test_example_runs(package: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, register, model, use = FENCE.findall(PAGE.read_text())
    for block in (adapter, register, model):
        exec(compile(block, str(PAGE), "exec"), vars(package))
    with pytest.raises(UnsupportedError, match=r"no adapter for model type 'video_llava'.*docs/adapters.md"):
        exec(compile(use, str(PAGE), "exec"), vars(package))
    plugins.manager().register(package, "my-package:video_llava")
    exec(compile(use, str(PAGE), "exec"), vars(package))
    kept = vars(package)["run"].trace.kept[0].tolist()
    assert len(kept) < 19
    assert {0, 1, 17, 18} <= set(kept)
    assert capsys.readouterr().out.strip()


def test_example_lays_out_batches_and_later_forwards(package: types.ModuleType) -> None:
    adapter, register, model, _ = FENCE.findall(PAGE.read_text())
    for block in (adapter, register, model):
        exec(compile(block, str(PAGE), "exec"), vars(package))
    scope = vars(package)
    found: list[TokenLayout] = []

    def look(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        prompt = scope["Prompt"](kwargs["input_ids"], None, None, kwargs)
        found.append(scope["VideoLlavaAdapter"]().layout(scope["model"], prompt))

    ids = torch.tensor([[0, 11, *[101] * 5, 12, *[101] * 10, 13], [0] * 3 + [14] * 16])
    ids[1, 6:16] = torch.tensor([101] * 10)
    pixels = torch.randn(5, 3, 16, 16)
    handle = scope["model"].model.register_forward_pre_hook(look, with_kwargs=True)
    # Five frames for three videos of unequal length: the model fills them in one after the other.
    scope["model"].generate(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        pixel_values_videos=pixels[:, None],
        max_new_tokens=2,
        num_beams=2,
    )
    handle.remove()
    prefill, decode = found
    one, two = [0, 1, 2, 3, 4], [0, 1, 2, 3, 4] * 2
    first = [-1, -1, *one, -1, *two, -1]
    assert prefill.slot.tolist() == [first, first, *[[-1] * 6 + two + [-1] * 3] * 2]
    assert prefill.frame[0].tolist() == [-1, -1, *[0] * 5, -1, *[0] * 5, *[1] * 5, -1]
    assert prefill.media()[0].tolist() == [-1, -1, *[0] * 5, -1, *[1] * 10, -1]
    assert not bool(decode.vision.any())
