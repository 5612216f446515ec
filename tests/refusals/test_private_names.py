"""A release of transformers in which a private name that the engine reads has changed is refused when a pipeline is attached."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
from support.tiny import SHARE, assert_same, layout, logits, snapshot, tiny_model
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer

import tokenreduce as tr
from tokenreduce.engine.model import private_names
from tokenreduce.engine.model.private_names import CACHE, INTERNAL, LOCALS
from tokenreduce.errors import UnsupportedError


def refused(missing: str) -> None:
    """Attaching says what is missing, in which release, and what to do; the model is as it was."""
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(UnsupportedError) as error:
        tr.reduce(model, "fastv", budget=SHARE, layout=layout())
    message = str(error.value)
    assert f"transformers {transformers.__version__} has no {missing}, which token reduction reads" in message
    assert "pip install transformers==" in message
    assert_same(model, before)


@pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function, names in LOCALS.items() for name in names]
)
def test_a_renamed_local(function: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = getattr(GenerationMixin, function).__code__
    fields = {
        field: tuple("renamed" if local == name else local for local in getattr(code, field))
        for field in ("co_varnames", "co_cellvars")
    }
    renamed = types.FunctionType(code.replace(**fields), vars(transformers.generation.utils), function)
    monkeypatch.setattr(GenerationMixin, function, renamed)
    refused(f"local `{name}` in GenerationMixin.{function}")


@pytest.mark.parametrize("function", LOCALS)
def test_a_function_that_is_gone(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GenerationMixin, function)
    refused(f"GenerationMixin.{function}")


def test_a_model_with_a_function_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def _assisted_decoding(self: Any, input_ids: torch.Tensor) -> None: ...

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "_assisted_decoding", _assisted_decoding)
    refused("local `candidate_length` in Qwen2ForCausalLM._assisted_decoding")


def test_a_setting_of_generation_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    initialised = GenerationConfig.__init__

    def without(self: Any, **options: Any) -> None:
        initialised(self, **options)
        del self.prefill_chunk_size

    monkeypatch.setattr(GenerationConfig, "__init__", without)
    refused("GenerationConfig.prefill_chunk_size")


def test_the_attribute_that_attention_is_kept_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_names, "INTERNAL", "_renamed")
    refused("Qwen2Config._renamed")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CACHE.items() for name in names])
def test_a_cache_without_an_attribute(kind: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without = type(kind.__name__, (), {other: None for other in CACHE[kind] if other != name})
    monkeypatch.setattr(private_names, "CACHE", {without: CACHE[kind]})
    refused(f"{kind.__name__}.{name}")


def test_nothing_is_missing_here() -> None:
    """And a decoder without a head, which cannot generate, is attached as well."""
    model = tiny_model()
    with tr.reduce(model, "fastv", budget=SHARE, layout=layout()):
        logits(model)
    with tr.reduce(model.model, "fastv", budget=SHARE, layout=layout()) as run:
        assert run.attached
    assert INTERNAL in vars(model.config)
    assert hasattr(DynamicLayer(), "is_initialized")
