"""Where a model is put and where its inputs go. No machine of ours has an accelerator: what loading is asked for is spied on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from support.tiny import tiny_model
from transformers import PreTrainedModel

import tokenreduce as tr
from tokenreduce.cli import main
from tokenreduce.compare.arms import expand
from tokenreduce.compare.cluster import placed
from tokenreduce.compare.settings import Settings, baseline_name
from tokenreduce.errors import TokenReduceError
from tokenreduce.models.placement import best_device, describe, input_device, parse_device, parse_dtype, placement_line
from tokenreduce.testbed.embedded import WEIGHTS

Asked = list[dict[str, Any]]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine says that it has two CUDA devices."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What each `from_pretrained` of a model was asked for; it loads onto the CPU all the same."""
    seen: Asked = []
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def spy(cls: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: kwargs.get(name) for name in ("device_map", "dtype", "attn_implementation")})
        return load(cls, *args, **{**kwargs, "device_map": None})

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    return seen


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_accelerator_is_taken(kind: str, monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    tr.load_model(WEIGHTS)
    assert asked == [{"device_map": {"": kind}, "dtype": None, "attn_implementation": None}]


def test_without_one_it_is_the_cpu(asked: Asked) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert best_device() == torch.device("cpu")
    tr.load_model(WEIGHTS)
    assert asked[0]["device_map"] is None


@pytest.mark.usefixtures("gpus")
def test_what_is_asked_for_is_done(asked: Asked) -> None:
    tr.load_model(WEIGHTS, device="cuda:1", dtype=torch.bfloat16, attn_implementation="eager")
    assert asked[0] == {"device_map": {"": "cuda:1"}, "dtype": torch.bfloat16, "attn_implementation": "eager"}
    tr.load_model(WEIGHTS, device="cpu")
    assert asked[1]["device_map"] is None
    tr.load_model(WEIGHTS, device_map="auto")
    assert asked[2]["device_map"] == "auto"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("command", ["run", "compare"])
def test_commands_pass_it_on_and_say_where(
    command: str, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cuda:1", "--dtype", "bf16", "--attn", "sdpa", "--output", str(tmp_path / "out")]
    if command == "run":
        options = ["run", "demo", "--repeats", "1", "--new-tokens", "1", *options]
    else:
        options = ["compare", "--examples", "1", "--frames", "4", "--budget", "0.5", "--pictures", "0", *options]
    assert main(options) == 0
    assert asked[0] == {"device_map": {"": "cuda:1"}, "dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    assert "cpu, bfloat16, sdpa attention" in " ".join(capsys.readouterr().out.split())  # Where the spy has put it.


def test_bad_places_are_refused(gpus: None) -> None:
    with pytest.raises(TokenReduceError, match="device cuda:2: this machine has 2 of them, cuda:0 to cuda:1"):
        parse_device("cuda:2")
    with pytest.raises(TokenReduceError, match="device mps: not on this machine, which has cuda"):
        parse_device("mps")
    with pytest.raises(TokenReduceError, match="did you mean 'cuda'"):
        parse_device("cdua")
    with pytest.raises(TokenReduceError, match="did you mean 'bfloat16'"):
        parse_dtype("bfloat")
    with pytest.raises(TokenReduceError, match="give one of the two"):
        tr.load_model(WEIGHTS, device="cuda", device_map="auto")


def test_inputs_go_to_an_offloaded_model() -> None:
    """Its parameters are on `meta`, and it runs on the CPU all the same."""
    model = tr.load_model(WEIGHTS)
    frames = np.zeros((2, 48, 48, 3), dtype=np.uint8)
    expected = model(**tr.prepare(model, frames, "Which digit is on the red tile ?")).logits
    cpu_offload(model)
    assert model.device.type == "meta"
    assert input_device(model) == torch.device("cpu")
    inputs = tr.prepare(model, frames, "Which digit is on the red tile ?")
    assert {x.device.type for x in inputs.values()} == {"cpu"}
    assert torch.equal(model(**inputs).logits, expected)


def test_it_is_described() -> None:
    model = tiny_model("eager")
    assert describe(model) == {"devices": ["cpu"], "hardware": ["CPU"], "dtype": "float32", "attention": "eager"}
    assert placement_line(model) == "cpu, float32, eager attention"


def test_workers_of_a_cluster_load_onto_what_they_reserve() -> None:
    arms = tuple(expand(["framefusion"], [], ["embedded"]))
    settings = Settings("needle", arms, 1, 1, baseline_name(arms, None))
    assert placed(settings, 4, 1).loading == {}  # The first that the worker sees.
    assert placed(settings, 4, 2).loading == {"device_map": "auto"}
    assert placed(settings, 0, 1) is settings
    numbered = Settings("needle", arms, 1, 1, baseline_name(arms, None), loading={"device": "cuda:1"})
    with pytest.raises(TokenReduceError, match="leave the number out"):
        placed(numbered, 4, 1)
