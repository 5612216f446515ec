"""A model's configuration as its file states it, held to what a model can be before anything is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tokenreduce.config.json_source import read_object, shown, validated
from tokenreduce.errors import TokenReduceError, UnsupportedError

MOST_LAYERS, MOST_WIDTH, MOST_WORDS = 2_000, 10_000_000, 100_000_000
"""Of a decoder or a tower: layers, numbers of any width (experts too), and entries of a vocabulary, at most."""
_REPEATED = re.compile(r"(^|_)n?(layers|layer|depth|blocks|experts|heads)$")
"""Names of numbers of which a model makes so many modules."""

_Layers = Annotated[int, Field(strict=True, ge=1, le=MOST_LAYERS)]
_Width = Annotated[int, Field(strict=True, ge=1, le=MOST_WIDTH)]
_Words = Annotated[int, Field(strict=True, ge=1, le=MOST_WORDS)]
_Positions = Annotated[int, Field(strict=True, ge=1, le=2**40)]
_Some = Annotated[int, Field(strict=True, ge=0, le=MOST_WIDTH)]


class _Facts(BaseModel):
    """What we read; other fields are let pass."""

    model_config = ConfigDict(extra="ignore")


class VisionFacts(_Facts):
    """A vision tower's fields."""

    model_type: str | None = None
    num_hidden_layers: _Some | None = None
    deepstack_visual_indexes: list[int] | None = None


class DecoderFacts(_Facts):
    """A decoder's fields. A list stands where layers differ, which is refused further on, by name."""

    model_type: str | None = None
    architectures: list[str] | None = None
    num_hidden_layers: _Layers | list[Any] | None = None
    hidden_size: _Width | list[Any] | None = None
    num_attention_heads: _Width | list[Any] | None = None
    num_key_value_heads: _Width | list[Any] | None = None
    head_dim: _Width | list[Any] | None = None
    intermediate_size: _Width | list[Any] | None = None
    moe_intermediate_size: _Width | list[Any] | None = None
    num_experts_per_tok: _Some | None = None
    num_local_experts: _Some | None = None
    num_experts: _Some | None = None
    vocab_size: _Words | None = None
    max_position_embeddings: _Positions | None = None
    layer_types: list[str] | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    dtype: str | dict[str, Any] | None = None
    torch_dtype: str | dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None


class ModelFacts(DecoderFacts):
    """A model's fields: a decoder's own, or a decoder and a tower."""

    text_config: DecoderFacts | None = None
    llm_config: DecoderFacts | None = None
    vision_config: VisionFacts | None = None


def read_config(path: Path, error: type[TokenReduceError] = UnsupportedError) -> dict[str, Any]:
    """The fields of a `config.json`, or of the one in a folder, checked by `check_config`."""
    file = path / "config.json" if path.is_dir() else path
    facts = read_object(file, error)
    check_config(facts, shown(file), error)
    return facts


def check_config(facts: Mapping[str, Any], place: str, error: type[TokenReduceError] = UnsupportedError) -> None:
    """Refuse fields of a wrong type or beyond what a model can be, with the name of the first. place: for messages."""
    validated(ModelFacts, facts, place, error)
    todo: list[tuple[str, Any]] = [("", facts)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{name}.{key}".removeprefix("."), item) for key, item in value.items()]
        elif isinstance(value, int) and value > MOST_LAYERS and _REPEATED.search(name.split(".")[-1]):
            raise error(f"{place}: {name}: expected a number of at most {MOST_LAYERS}, got {str(value)[:40]}")
