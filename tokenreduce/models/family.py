"""What a model family must answer so that tokenreduce loads its checkpoints and prepares its inputs itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import BatchFeature, PreTrainedModel

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

    @abstractmethod
    def prepare(self, model: PreTrainedModel, request: VideoQuestion, processor: Any) -> BatchFeature:
        """Inputs for `model(**inputs)` and `model.generate(**inputs)`. `processor` is what `processor()` returned."""
