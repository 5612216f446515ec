"""What a model family must answer so that tokenreduce loads its checkpoints and prepares its inputs itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedModel

from tokenreduce.errors import UnsupportedError
from tokenreduce.media.video import VideoClip, sample_indices
from tokenreduce.models.checkpoint import LoadOptions
from tokenreduce.models.request import VideoQuestion


class Family(ABC):
    """A model family whose checkpoints and prompts tokenreduce handles itself. Add an instance to `families()`."""

    name: ClassVar[str]
    """Unique, lower case, e.g. `llava_video`."""
    model_type: ClassVar[str]
    """`config.model_type` of the native model, which is what `save_pretrained` writes."""

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this config.json is a checkpoint of the family in its upstream layout."""

    @abstractmethod
    def load(self, folder: Path, config: Mapping[str, Any], options: LoadOptions) -> PreTrainedModel:
        """The native model with the weights of an upstream folder, by `load_strict`, so that nothing is filled in."""

    @abstractmethod
    def load_native(self, folder: Path, options: LoadOptions) -> PreTrainedModel:
        """The native model from a folder that its own `save_pretrained` wrote. Use `load_strict` here too."""

    @abstractmethod
    def processor(self, folder: Path) -> Any:
        """What `prepare` needs from the checkpoint folder besides the model (usually the tokenizer)."""

    def look(self, model: PreTrainedModel, request: VideoQuestion) -> VideoClip:
        """The frames that `prepare` shows. Override it where the authors sample by a rule of their own."""
        return request.clip(sample_indices)

    @abstractmethod
    def prepare(self, model: PreTrainedModel, request: VideoQuestion, processor: Any) -> BatchFeature:
        """Inputs for `model(**inputs)` and `model.generate(**inputs)`. `processor` is what `processor()` returned."""

    def batch(self, parts: Sequence[BatchFeature], processor: Any) -> BatchFeature:
        """One batch of what `prepare` made of several requests, padded on the left."""
        raise UnsupportedError(f"{self.name}: its inputs cannot be put into one batch; prepare one video at a time")


def left_padded(parts: Sequence[BatchFeature], tokenizer: Any) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, N) long of parts with one row each, padded on the left."""
    ids = [part["input_ids"][0] for part in parts]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(map(len, ids))
    return {
        "input_ids": torch.stack([F.pad(row, (longest - len(row), 0), value=pad) for row in ids]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids]),
    }
