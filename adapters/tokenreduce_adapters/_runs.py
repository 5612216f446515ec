"""What the vision adapters share: from placeholder ids and the features of a forward to a TokenLayout.

A placeholder id stands for vision only in a forward that also brings features for it. In a later forward (decoding, a
second turn) the model treats the same id as text, and so does the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenreduce.adapter import FfnPair, ModelAdapter, Prompt, TowerCall
from tokenreduce.errors import LayoutError, UnsupportedError
from tokenreduce.layout import NEWLINE, PLAIN, TIMESTAMP, WRAPPER, TokenLayout
from tokenreduce_adapters.decoder import ffn_pair
from tokenreduce_adapters.hybrid import raise_if_refused

Kind = Literal["image", "video"]
PIXELS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Medium:
    """One image or video of a forward.

    kind: image or video. index: its number among the media of that kind in the whole batch. row: its row of the batch.
    columns: (L,) long, growing, the columns that hold its features.
    """

    kind: Kind
    index: int
    row: int
    columns: Tensor

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Places:
    """Where each of the L tokens of a medium is: slot and frame (L,) long, newline (L,) bool or None.

    grid: (2, L) long, row and column in its frame, −1 for newlines; None where the family has no grid.
    """

    slot: Tensor
    frame: Tensor
    newline: Tensor | None = None
    grid: Tensor | None = None

    def in_rows_of(self, columns: int) -> Places:
        """The same, with frames that are rows of `columns` slots each; newlines are in none."""
        grid = torch.stack([self.slot // columns, self.slot % columns])
        return replace(self, grid=grid if self.newline is None else torch.where(self.newline, -1, grid))


class VisionAdapter(ModelAdapter):
    """Base of the adapters here: finds the media of a forward, asks `places` about each, and builds the layout."""

    kinds: ClassVar[tuple[Kind, ...]] = ("image", "video")
    """What the family can see."""
    grids = True
    tags: ClassVar[tuple[int, int]] = (0, 0)
    """How many special tokens stand before and after every run of ids. They are text, marked as wrappers."""

    def text_model(self, model: nn.Module) -> nn.Module:
        raise_if_refused(model)
        return super().text_model(model)

    def ffn_pair(self, layer: nn.Module) -> FfnPair | None:
        return ffn_pair(layer)

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        """Tokens of each medium of `kind`, in order, from the raw inputs of the forward (pixels, sizes, grids)."""
        raise NotImplementedError

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        """Slots and frames of one medium; by default an image: frame 0, every token a slot of its own."""
        return image_places(medium)

    def media(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[Medium]:
        """The images or videos whose features this forward brings, in the order in which the model fills them in."""
        encoded = encoded_features(prompt, kind)
        lengths = self.lengths(model, prompt, kind) if encoded is None else [f[..., 0].numel() for f in encoded]
        spots = (prompt.input_ids == placeholder(model, kind)).nonzero()
        if sum(lengths) != len(spots):
            raise LayoutError(
                f"{self.name}: the prompt has {len(spots)} {kind} tokens, but the features given with it are for "
                f"{sum(lengths)}; pass the ids and the {PIXELS[kind]} of the same forward"
            )
        parts = [part for part in spots.split(lengths) if len(part)]
        if any(bool(part[0, 0] != part[-1, 0]) for part in parts):
            raise LayoutError(f"{self.name}: the features of one {kind} would be split over two rows of input_ids")
        return [Medium(kind, i, int(part[0, 0]), part[:, 1]) for i, part in enumerate(parts)]

    def layout(self, model: nn.Module, prompt: Prompt) -> TokenLayout:
        """The layout of one forward, (B, N); all text where the forward brings no features."""
        found = [m for kind in self.kinds if brings(prompt, kind) for m in self.media(model, prompt, kind)]
        found.sort(key=lambda m: (m.row, int(m.columns[0])))
        slot, frame, medium = (torch.full_like(prompt.input_ids, -1, dtype=torch.long) for _ in range(3))
        marker = torch.full_like(slot, PLAIN)
        grid: Tensor | None = None
        for m in found:
            self._mark_text(marker[m.row], m)
        count = [0] * len(slot)
        for m in found:
            place = self.places(model, prompt, m)
            slot[m.row, m.columns], frame[m.row, m.columns] = place.slot, place.frame
            medium[m.row, m.columns] = count[m.row]
            marker[m.row, m.columns] = PLAIN if place.newline is None else torch.where(place.newline, NEWLINE, PLAIN)
            if place.grid is not None:
                grid = slot.new_full((2, *slot.shape), -1) if grid is None else grid
                grid[:, m.row, m.columns] = place.grid
            count[m.row] += 1
        row, column = (None, None) if grid is None else grid
        return TokenLayout(slot=slot, frame=frame, medium=medium, marker=marker, row=row, column=column)

    def tokens_of(self, model: nn.Module, kind: Kind, call: TowerCall) -> Tensor:
        """(tokens, C): the values of the patches of one call, pooled as the family pools their features; no newlines."""
        raise UnsupportedError(f"{self.name}: its adapter does not say how the tower's patches become tokens")

    def to_tokens(self, model: nn.Module, prompt: Prompt, calls: Sequence[TowerCall]) -> Tensor:
        kinds = [kind for kind in self.kinds if brings(prompt, kind)]
        if len(calls) < len(kinds):
            raise UnsupportedError(
                f"{self.name}: the features of this call were not made in it, so its vision tower has told nothing; pass pixels"
            )
        rows, columns = prompt.input_ids.shape
        out: Tensor | None = None
        repeats = 1
        # Images are encoded first, whatever the prompt; what calls that failed have left comes before.
        for kind, call in zip(kinds, calls[len(calls) - len(kinds) :], strict=True):
            values = self.tokens_of(model, kind, call)
            places = []
            for medium in self.media(model, prompt, kind):
                newline = self.places(model, prompt, medium).newline
                its = medium.columns if newline is None else medium.columns[~newline.to(medium.columns.device)]
                places.append((medium.row, its))
            total = sum(len(its) for _, its in places)
            if not len(values) or total % len(values):
                raise LayoutError(f"{self.name}: the tower told of {len(values)} tokens, and the prompt has {total}")
            repeats = total // len(values)
            out = values.new_full((rows, columns, values.shape[-1]), torch.nan) if out is None else out
            first = 0
            for row, its in places:
                if row % repeats == 0:  # Beams repeat whole rows.
                    out[row, its.to(out.device)] = values[first : first + len(its)].to(out.dtype)
                    first += len(its)
        assert out is not None
        return out if repeats == 1 else out[::repeats].repeat_interleave(repeats, 0)

    def _mark_text(self, marker: Tensor, medium: Medium) -> None:
        """Marks the text in and around `medium` in `marker` (N,): times between frames, wrappers around runs."""
        before, after = self.tags
        marker[medium.columns[0] : medium.columns[-1]] = TIMESTAMP if medium.kind == "video" else WRAPPER
        for run in runs(medium.columns):
            start, stop = int(run[0]), int(run[-1]) + 1
            marker[max(start - before, 0) : start] = WRAPPER
            marker[stop : stop + after] = WRAPPER


def encoded_features(prompt: Prompt, kind: Kind) -> Sequence[Tensor] | None:
    """Features per medium where generate() has run the vision tower before the forward, else None.

    Raises UnsupportedError for a piece of them: a chunked prefill passes on features without the tower's own output.
    """
    outputs = prompt.kwargs.get("mm_encoder_outputs")
    output = outputs.get(kind) if isinstance(outputs, Mapping) else None
    if output is None:
        return None
    if "last_hidden_state" not in output:
        raise UnsupportedError(
            f"the {kind} features of this forward are a piece of a chunked prefill (they have no last_hidden_state), which is "
            "not supported because a chunk may end inside a frame; unset prefill_chunk_size, or feed pieces with tr.stream"
        )
    return output["pooler_output"]  # type: ignore[no-any-return]


def brings(prompt: Prompt, kind: Kind) -> bool:
    """Whether the forward brings features of `kind`."""
    return prompt.kwargs.get(PIXELS[kind]) is not None or encoded_features(prompt, kind) is not None


def settings(model: nn.Module) -> Any:
    """The config of `model`."""
    return model.config


def placeholder(model: nn.Module, kind: Kind) -> int:
    """The id that stands for one token of an image or video."""
    return int(getattr(settings(model), f"{kind}_token_id"))


def image_places(medium: Medium, newline: Tensor | None = None) -> Places:
    """An image is one frame, and all its tokens are different places."""
    slot = torch.arange(len(medium), device=medium.columns.device)
    return Places(slot, torch.zeros_like(slot), newline)


def frame_places(medium: Medium, per_frame: int, family: str) -> Places:
    """Frames of `per_frame` tokens each, one after the other."""
    if per_frame < 1 or len(medium) % per_frame:
        raise LayoutError(
            f"{family}: a video of {len(medium)} tokens is not made of frames of {per_frame}; the config's image size, "
            "patch size or pooling does not belong to these features"
        )
    token = torch.arange(len(medium), device=medium.columns.device)
    return Places(token % per_frame, token // per_frame)


def square_side(tokens: int) -> int:
    """The side of a square of so many tokens. LayoutError where it is none."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise LayoutError(f"{tokens} tokens of a frame are not a square")
    return side


def runs(columns: Tensor) -> list[Tensor]:
    """`columns` (L,) cut wherever the next one does not follow directly."""
    cuts = (columns.diff() != 1).nonzero().flatten() + 1
    return list(torch.tensor_split(columns, cuts.cpu())) if len(columns) else []
