"""Known models as data, so that `tokenreduce plan` needs no weights and no network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tokenreduce.errors import BudgetError, UnsupportedError, nearest
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.planning.memory import decoder_parameters

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FALLBACK = "llava-video-7b"
"""Whose input (tokens per frame, text) a config of no known family is planned with."""


@dataclass(frozen=True)
class Architecture:
    """A model as far as a plan needs it.

    Args:
        name: what the user types, or the path of the config.
        shape: of its decoder.
        tokens_per_frame: vision tokens of one step in time, markers such as newlines included.
        text_tokens: assumed text around the video.
        frames: frames a plan assumes by default.
        dtype: of weights and KV cache.
        frames_per_step: frames that the vision tower merges into one step.
        threshold: similarity threshold of the FrameFusion paper, None where the paper gives none.
        checkpoint: its name on the Hugging Face hub.
        model_types: `model_type` of configs that are planned with this model's input.
        note: one line to show beside the plan, "" if there is nothing to say.
        positions: the most tokens it was made for, None if unknown.
        vision_parameters: parameters outside the decoder: vision tower and projector.
        held_per_step: elements that a step's vision features and what else the tower made take while the decoder runs.
        tied: the LM head is the embedding.
        parameters: of everything, where they were counted; None to work them out from the shape.
    """

    name: str
    shape: DecoderShape
    tokens_per_frame: int
    text_tokens: int
    frames: int
    dtype: str
    frames_per_step: int = 1
    threshold: float | None = None
    checkpoint: str = ""
    model_types: list[str] = field(default_factory=list)
    note: str = ""
    positions: int | None = None
    vision_parameters: int = 0
    held_per_step: int = 0
    tied: bool = False
    parameters: int | None = None

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

    def counted(self) -> Architecture:
        """This, with `parameters` of the model that its config.json describes: built on the meta device, without memory.

        Where transformers has no such model the vision tower is taken to be that of the known one; the note says so.
        """
        if self.name in _known():
            return self
        total = _count(Path(self.name), self.shape)
        tower = (
            f"a vision tower of {self.vision_parameters / 1e6:.0f} M" if self.vision_parameters else "no vision tower"
        )
        how = "all weights counted" if total else f"weights from the decoder's shape, and {tower}"
        return replace(self, parameters=total, note=f"{self.note}; {how}")


@cache
def _known() -> dict[str, Architecture]:
    path = Path(__file__).parent / "data" / "architectures.yaml"
    data: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Architecture(name, DecoderShape(**facts.pop("shape")), **facts) for name, facts in data.items()}


def architectures() -> tuple[str, ...]:
    """Names of the known models."""
    return tuple(_known())


def architecture(model: str | Path) -> Architecture:
    """The known model of that name, or the decoder that a `config.json` (or the folder it is in) describes.

    A config says nothing of the tokens a frame becomes: these come from the known model of its `model_type`, else from
    LLaVA-Video, and `note` says so. Raises UnsupportedError naming the nearest known model.
    """
    name = str(model)
    known = _known()
    if name.lower() in known:
        return known[name.lower()]
    if not (name.endswith(".json") or Path(name).exists()):
        raise UnsupportedError(
            f"unknown model '{name}'{nearest(name.lower(), known)}, or give the path of a config.json"
        )
    return _from_config(Path(name))


def _from_config(path: Path) -> Architecture:
    shape = DecoderShape.from_config(path)
    file = path / "config.json" if path.is_dir() else path
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
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
        name=str(path),
        shape=shape,
        dtype=dtype if dtype in DTYPE_BYTES else base.dtype,
        threshold=base.threshold if like else None,
        checkpoint="",
        model_types=[family] if family else [],
        note=note,
        positions=text.get("max_position_embeddings"),
        vision_parameters=like.vision_parameters if like else 0,
        held_per_step=held,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    )


def _count(path: Path, shape: DecoderShape) -> int | None:
    """Parameters of transformers' model for a config.json; None where it has none, or one with another decoder."""
    import torch
    import transformers

    file = path / "config.json" if path.is_dir() else path
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    config_class = getattr(kind, "config_class", None)
    if kind is None or config_class is None:
        return None
    try:
        with torch.device("meta"):
            model = kind(config_class.from_dict(config))
        if DecoderShape.from_config(model.config) != shape:
            return None
    except Exception:  # each model class has its own kinds; without a count the plan goes by the shape
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())
