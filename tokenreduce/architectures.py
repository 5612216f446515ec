"""Known models as data, so that `tokenreduce plan` needs no weights and no network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tokenreduce.cost import DecoderShape
from tokenreduce.errors import BudgetError, UnsupportedError, nearest

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
    family = config.get("model_type")
    like = next((arch for arch in _known().values() if family in arch.model_types), None)
    base = like or _known()[FALLBACK]
    dtype = config.get("dtype") or config.get("torch_dtype")
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
    )
