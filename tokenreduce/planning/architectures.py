"""Known models as data, so that `tokenreduce plan` needs no weights and no network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tokenreduce.config.json_source import exists, shown
from tokenreduce.errors import BudgetError, UnsupportedError, nearest
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.planning.memory import decoder_parameters
from tokenreduce.planning.model_config import read_config

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FALLBACK = "llava-video-7b"
"""Whose input (tokens per frame, text) a config of no known family is planned with."""


@dataclass(frozen=True)
class Architecture:
    """A model as far as a plan needs it."""

    name: str
    """What the user types, or where its config came from: a path, or the name or family that a loaded one gives."""
    shape: DecoderShape
    """Of its decoder."""
    tokens_per_frame: int
    """Vision tokens of one step in time, markers such as newlines included."""
    text_tokens: int
    """Tokens of text assumed around the video."""
    frames: int
    """Frames a plan assumes by default."""
    dtype: str
    """Of weights and KV cache, a name in DTYPE_BYTES."""
    frames_per_step: int = 1
    """Frames that the vision tower merges into one step."""
    threshold: float | None = None
    """Similarity threshold of the FrameFusion paper, None where the paper gives none."""
    checkpoint: str = ""
    """Its name on the Hugging Face hub."""
    families: list[str] = field(default_factory=list)
    """Names of adapters whose models it stands for."""
    model_types: list[str] = field(default_factory=list)
    """`model_type` of configs that are planned with this model's input."""
    note: str = ""
    """One line to show beside the plan, "" if there is nothing to say."""
    positions: int | None = None
    """The most tokens it was made for, None if unknown."""
    vision_parameters: int = 0
    """Parameters outside the decoder: vision tower and projector."""
    held_per_step: int = 0
    """Elements that a step's vision features and what else the tower made take while the decoder runs."""
    tied: bool = False
    """The LM head is the embedding."""
    parameters: int | None = None
    """Parameters of everything, where they were counted; None to work them out from the shape."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of the KV cache."""
        return DTYPE_BYTES[self.dtype]

    def steps(self, frames: int | None = None) -> int:
        """Steps in time, which is what a layout calls frames; a part of a step counts as a whole one."""
        frames = self.frames if frames is None else frames
        if frames < 1:
            raise BudgetError(f"a video has at least 1 frame, got {frames}")
        return -(-frames // self.frames_per_step)

    def vision_tokens(self, frames: int | None = None) -> int:
        """Vision tokens of `frames` frames (default: this model's)."""
        return self.steps(frames) * self.tokens_per_frame

    def tokens(self, frames: int | None = None) -> int:
        """Length N of the whole input, text included."""
        return self.text_tokens + self.vision_tokens(frames)

    def with_dtype(self, dtype: str) -> Architecture:
        """The same in another dtype. UnsupportedError if it is unknown."""
        if dtype not in DTYPE_BYTES:
            raise UnsupportedError(f"unknown dtype '{dtype}'{nearest(dtype, DTYPE_BYTES)}")
        return replace(self, dtype=dtype)

    def held(self, frames: int) -> int:
        """Elements that the vision tower leaves behind while the decoder runs."""
        return self.steps(frames) * self.held_per_step

    def weight_bytes(self) -> int:
        """Bytes of all weights, none of them quantised. BudgetError where neither a count nor the shape tells."""
        if self.parameters is not None:
            return self.parameters * self.dtype_bytes
        return (decoder_parameters(self.shape, self.tied) + self.vision_parameters) * self.dtype_bytes


@cache
def _known() -> dict[str, Architecture]:
    path = Path(__file__).parent / "data" / "architectures.yaml"
    data: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Architecture(name, DecoderShape(**facts.pop("shape")), **facts) for name, facts in data.items()}


def architectures() -> tuple[str, ...]:
    """Names of the known models."""
    return tuple(_known())


def architecture(model: Any) -> Architecture:
    """The known model of that name, or the decoder that a config describes.

    model: a name; the path of a `config.json` or of the folder it is in; a transformers config; a loaded model, which also
    says its dtype and its parameters; an Architecture. A config says nothing of the tokens a frame becomes: these come from
    the known model of its `model_type`, else from LLaVA-Video, and `note` says so. Raises UnsupportedError naming the nearest
    known model.
    """
    if isinstance(model, Architecture):
        return model
    if isinstance(model, (str, Path)):
        return _named(str(model))
    config = getattr(model, "config", model)
    if not (hasattr(config, "to_dict") and hasattr(config, "model_type")):
        raise UnsupportedError(
            f"no model in a {type(model).__name__}: give a known name ({', '.join(_known())}), the path of a config.json, "
            "a transformers config, or a loaded model"
        )
    facts: dict[str, Any] = config.to_dict()
    name = getattr(config, "name_or_path", "") or config.model_type or type(config).__name__
    arch = _from_config(name, facts, DecoderShape.from_config(config))
    if config is model:
        return arch
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    count = sum(int(parameter.numel()) for parameter in model.parameters())
    return replace(arch, dtype=dtype if dtype in DTYPE_BYTES else arch.dtype, parameters=count)


def _named(name: str) -> Architecture:
    known = _known()
    if name.lower() in known:
        return known[name.lower()]
    alike = next((arch for arch in known.values() if name in (*arch.families, arch.checkpoint)), None)
    if alike is not None and not exists(name):
        return (
            alike if name == alike.checkpoint else replace(alike, note=f"family {name}, planned as {alike.checkpoint}")
        )
    if not (name.endswith(".json") or exists(name)):
        raise UnsupportedError(
            f"unknown model '{name}'{nearest(name.lower(), known)}, or give the path of a config.json"
        )
    path = Path(name)
    facts = read_config(path)
    try:
        return _from_config(str(path), facts, DecoderShape.from_config(facts))
    except UnsupportedError as error:
        raise UnsupportedError(f"{shown(path)}: {error}") from None


def _from_config(name: str, config: dict[str, Any], shape: DecoderShape) -> Architecture:
    text = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    family = config.get("model_type")
    like = next((arch for arch in _known().values() if family in arch.model_types), None)
    base = like or _known()[FALLBACK]
    dtype = config.get("dtype") or config.get("torch_dtype")
    deepstack = (config.get("vision_config") or {}).get("deepstack_visual_indexes") or ()
    # Qwen3-VL holds its features twice, and so each level of its deepstack; of an unknown family they are counted once.
    held = base.tokens_per_frame * shape.hidden * (2 * (1 + len(deepstack)) if deepstack else 1)
    held = base.held_per_step * shape.hidden // base.shape.hidden if like else held
    note = f"{base.tokens_per_frame} tokens per frame and {base.text_tokens} of text, taken from {base.name}"
    return replace(
        base,
        name=name,
        shape=shape,
        dtype=dtype if dtype in DTYPE_BYTES else base.dtype,
        threshold=base.threshold if like else None,
        checkpoint="",
        families=[],
        model_types=[family] if family else [],
        note=note,
        positions=text.get("max_position_embeddings"),
        vision_parameters=like.vision_parameters if like else 0,
        held_per_step=held,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    )
