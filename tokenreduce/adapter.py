"""What the engine must know of a model family. An adapter states facts; it holds no forward and no engine."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenreduce.errors import UnsupportedError
from tokenreduce.layout import TokenLayout


@dataclass(frozen=True)
class FfnPair:
    """The modules around a layer's FFN: `entry` reads the residual stream x, `exit` returns y, and the layer x + y.

    Usually the post-attention norm and the MLP; for Gemma-2/3 the norms before and after the MLP. The engine proves the
    pair on the real layer when it attaches, and refuses the model where the identity does not hold.
    """

    entry: nn.Module
    exit: nn.Module


@dataclass(frozen=True)
class VisionTower:
    """A vision tower in which every frame is encoded on its own.

    module: its first argument, or `pixels` by name, holds frames; whatever of its output has frames in its first axis and
    tokens in its second is put back in full. After the blocks it works on each token alone (a norm).
    blocks: those whose output reaches the decoder, in order; called with (F, n, D) first. patch: pixels per side of a patch.
    prefix: tokens of a frame before its patches (class tokens). mask: the argument of a block, after the first, that is added to
    its attention logits; None where a block takes none.
    grid: None where frames come as (F, C, H, W); else the name of the argument (media, 3) with the frames, rows and columns of
    each medium, whose patches come packed one after the other as (patches, values). merged: patches per row of a packed output.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    patch: int
    pixels: str = "pixel_values"
    prefix: int = 0
    mask: str | None = "attention_mask"
    grid: str | None = None
    merged: int = 1


@dataclass(frozen=True)
class TowerCall:
    """What one call of the vision tower told of its patches.

    values: (P, patches, C) of P frames or tiles in the order of the call, class tokens left out, or (patches, C) where the tower
    packs them, in the order of its blocks. grid: the argument `VisionTower.grid` of the call.
    """

    values: Tensor
    grid: Tensor | None = None


@dataclass(frozen=True)
class Prompt:
    """What one forward of the outer model was called with, as far as an adapter may need it.

    input_ids: (B, N) long. position_ids: None, (B, N), or (3 or 4, B, N) for multimodal rotary positions.
    attention_mask: None or (B, past + N). kwargs: the rest of the call; under generate() pixel values and grids may be gone.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    kwargs: Mapping[str, Any]

    @classmethod
    def read(cls, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Prompt:
        """The prompt of a call with these ids and arguments."""
        return cls(input_ids, kwargs.get("position_ids"), kwargs.get("attention_mask"), kwargs)


class ModelAdapter(ABC):
    """Facts about a model family. Subclass, state `name` and `model_types`, and say where the vision tokens are."""

    name: ClassVar[str]
    """Unique, lower case, e.g. `qwen2_vl`."""
    model_types: ClassVar[tuple[str, ...]] = ()
    """`config.model_type` of the models this adapter is for."""
    checkpoints: ClassVar[tuple[str, ...]] = ()
    """Hub names of checkpoints known to fit, for `tokenreduce models`."""
    deepstack: ClassVar[tuple[str, str] | None] = None
    """Names of the decoder's arguments with the mask and the rows that it adds to vision tokens after its first layers
    (Qwen3-VL); the engine adds them itself, so that they follow merged and dropped tokens."""
    grids: ClassVar[bool] = False
    """Whether its layouts say row and column of each vision token."""
    notes: ClassVar[str] = ""
    """One line on what is special, for `tokenreduce models`."""

    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter is for `model`; by default, whether its config's model_type is listed."""
        return getattr(getattr(model, "config", None), "model_type", None) in self.model_types

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder inside `model`: the module whose `forward` loops over `layers`."""
        for path in ("model.language_model", "language_model.model", "language_model", "model.text_model", "model", ""):
            module: Any = model
            for part in path.split(".") if path else ():
                module = getattr(module, part, None)
            if module is not None and isinstance(getattr(module, "layers", None), nn.ModuleList):
                return module  # type: ignore[no-any-return]
        raise UnsupportedError(
            f"{type(model).__name__}: no decoder with a `layers` list was found; override text_model()"
        )

    def ffn_pair(self, layer: nn.Module) -> FfnPair | None:
        """The modules around the FFN of `layer`, or None where the layer has no such point (parallel attention)."""
        entry, exit_ = getattr(layer, "post_attention_layernorm", None), getattr(layer, "mlp", None)
        if hasattr(layer, "pre_feedforward_layernorm") and hasattr(layer, "post_feedforward_layernorm"):
            entry, exit_ = layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
        if isinstance(entry, nn.Module) and isinstance(exit_, nn.Module):
            return FfnPair(entry, exit_)
        return None

    def layout(self, model: nn.Module, prompt: Prompt) -> TokenLayout | None:
        """Where the vision tokens of this forward are; None where the family has no vision (a bare decoder)."""
        return None

    def tower_signals(self, model: nn.Module) -> Mapping[str, str]:
        """For each of `tower.cls`, `tower.mean`, `tower.keys` and `tower.pooled`: empty if the family can give it to the decoder,
        else why not, in a clause."""
        return {}

    def to_tokens(self, model: nn.Module, prompt: Prompt, calls: Sequence[TowerCall]) -> Tensor:
        """(B, N, C): values of the tower's calls of this prompt carried through the family's pooling to its vision tokens.

        NaN for tokens that stand for no patch. Needed where `tower_signals` gives anything."""
        raise UnsupportedError(f"{self.name}: its adapter does not say how the tower's patches come to the decoder")

    def turn_ends(self, model: nn.Module) -> Sequence[int]:
        """Ids that end a turn of the chat, by which `ctx.role` tells the question from the template around it.

        By default the end-of-sequence ids of the model's generation config and config."""
        found: list[int] = []
        for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            ids = getattr(config, "eos_token_id", None)
            found += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
        return sorted({int(one) for one in found})

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        """The vision tower, for stages in it; None where the family has none or it cannot be described."""
        return None
