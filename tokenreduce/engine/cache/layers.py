"""KV cache layers that hold their own tokens and tell transformers the logical length.

transformers derives positions and masks from a cache's length. With the reduced length a second turn would restart its
positions too early and be silently wrong; so lengths are logical here, and the engine makes the masks itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from tokenreduce.errors import UnsupportedError
from tokenreduce.reduction import Reduction

Joined = dict[tuple[Any, ...], tuple[Any, ...]]
"""What has been made in one forward, by the ids of what it was made of: layers that hold the same tokens share it."""


class Activity:
    """What may run in a thread."""

    layers: Sequence[TokenLayer] = ()
    """Of the KV cache it goes on with."""
    idle = False
    """Cache and attention have nothing to ask of it."""
    traced = False
    """torch.compile may trace it."""
    outer: Activity | None = None
    """What it runs within, a forward of another model."""
    over = False
    """It has ended, or was broken off."""
    joined: Joined
    """Validity masks made while it ran, shared by layers that hold the same tokens."""

    def defers(self, layer: TokenLayer) -> bool:
        """Whether the cache layer is to leave its update for later."""
        return False

    def attention_layer(self, module: nn.Module) -> int | None:
        """The layer that an attention module belongs to, None for a foreign one."""
        return None

    def attend(
        self,
        layer: int,
        base: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `layer` by `base`, with the mask that its tokens need."""
        raise NotImplementedError

    def undo(self) -> bool:
        """Take back what it has put into its cache, as far as it knows; whether that was anything."""
        return False

    def holds(self, layer: TokenLayer) -> bool:
        """Whether it goes on with this very layer."""
        return layer.number < len(self.layers) and self.layers[layer.number] is layer


class Running(threading.local):
    """What runs in a thread: the engine's forward, if any. Every attention asks: a class attribute is the fastest answer."""

    forward: Activity | None = None


running = Running()


def shared(known: Joined, key: tuple[Any, ...], parts: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` gives, made once in a forward for the same `parts`. They are kept: nothing else gets their ids."""
    key = (*key, *map(id, parts))
    if key not in known:
        known[key] = (make(), parts)
    return known[key][0]


@dataclass
class Seen:
    """What attention at a layer goes by, where a stage at a `kv` site has changed what its queries see."""

    position: Tensor
    """(B, k) long, of the keys of the last update, growing in each row where they are valid."""
    valid: Tensor | None
    """(B, k) bool, which of them are no padding; None if all are."""
    queries: Tensor
    """(B, q) long, positions of the queries, −1 on padding."""
    borders: Sequence[int] | None
    """Per block of queries, how many of the keys that came with them are not later; None where the keys are the queries'."""
    columns: tuple[int, int] | None
    """One query per row, which sees so many columns from the first and so many up to the last; None where that cannot be said."""


@dataclass
class KvPlan:
    """What the engine says about one update of one layer; `position` and what follows it only at `kv` sites."""

    logical: int
    """Tokens that transformers believes it appends."""
    valid: Tensor | None = None
    """(B, n) bool, which of the tokens that come are not padding; None if all are."""
    position: Tensor | None = None
    """(B, n) long, places of those tokens in their sequences."""
    end: Tensor | None = None
    """(B,) long, the place after the last token."""
    draft: int = 0
    """Last tokens that may yet be taken back, see Batch."""
    reduction: Reduction | None = None
    """To apply to the keys and values that come."""
    size: Tensor | None = None
    """(B, n) long, how many originals each of them stands for."""
    span: Tensor | None = None
    """(B, 2) long, sinks and window to hold."""
    limit: tuple[int, int] | None = None
    """The most sinks and the longest window of all rows."""
    uniform: bool = True
    """All rows have the same span."""
    shortest: int | None = None
    """Tokens of the shortest row of a new cache, where there are no gaps in its positions."""
    borders: Sequence[int] | None = None
    """See Seen."""
    whole: bool = False
    """Nothing is hidden from a query yet."""
    repacked: bool = False
    """These are not the tokens that transformers believes."""

    def to(self, device: torch.device) -> KvPlan:
        """The same on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.reduction is not None:
            moved["reduction"] = replace(self.reduction, target=self.reduction.target.to(device))
        return replace(self, **moved)


class TokenLayer(DynamicLayer):  # type: ignore[misc]
    """The tokens that one decoder layer holds in the KV cache."""

    keys: Tensor
    """(B, G, held, d)."""
    values: Tensor
    """(B, G, held, d), whose last axis may be of another length than that of the keys."""
    number: int
    """Of the decoder layer, counted from 0."""
    gone: int
    """How many fewer tokens it holds than transformers believes."""
    reduced: bool
    """It holds other tokens than transformers believes."""
    not_padding: Tensor | None
    """(B, at most held) bool, False on padding; None if none is. Columns beyond it are no padding: decoding need not touch it."""
    position: Tensor | None
    """(B, held) long, place of each token in its sequence; kept only where a span or a merge at a `kv` site needs it."""
    end: Tensor | None
    """(B,) long, place of the next token; kept with `position`."""
    span: Tensor | None
    """(B, 2) long, the sinks and the window that later queries see; None if they see everything."""
    told: Tensor | None
    """(B, at most held, 4) long: slot, frame, medium and whether reducible of each token, where a `decode` stage may ask; columns
    beyond it are text."""
    recent: list[Tensor]
    """(B, H, 1, d) queries of the steps since a `decode` stage was last asked."""
    plan: KvPlan | None
    """What the engine says about the next update."""
    beside: Sequence[Any]
    """Layers of the same cache that hold a state instead (StateLayer)."""
    limit: tuple[int, int]
    """The most sinks and the longest window of all rows of `span`: numbers, so that nobody has to ask the device."""
    gapless: bool
    """No token is missing between those that it has seen, but for what a span has dropped."""
    regular: bool
    """Gapless, without padding, under one span: each row's columns are its sinks and then its newest tokens."""
    seen: Seen | None
    """What the attention after the last update goes by; None if that is as in any other layer."""
    shed: bool
    """A span has dropped tokens since the forward began: they cannot be had back."""
    broken: bool
    """A forward that failed has dropped earlier tokens: no forward may go on with it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.gone, self.reduced = number, 0, False
        self.not_padding = self.position = self.end = self.span = self.plan = self.told = None
        self.recent = []
        self.seen, self.limit, self.gapless, self.regular = None, (0, 0), True, True
        self.beside = ()
        self.shed = self.broken = False

    @property
    def held(self) -> int:
        """Tokens in the cache, padding included."""
        return 0 if not self.is_initialized or self.keys.numel() == 0 else int(self.keys.shape[-2])

    @property
    def logical(self) -> int:
        """Tokens seen, as transformers counts."""
        return self.held + self.gone

    @property
    def valid(self) -> Tensor | None:
        """(B, held) bool, False on padding; None if none is."""
        return None if self.not_padding is None else lengthened(self.not_padding, self.held)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; `plan` may say which of the new tokens are valid and what to hold of them."""
        forward = running.forward
        if self.reduced:
            self.refuse(forward)
        if forward is not None and not forward.idle and forward.defers(self):
            return key_states, value_states
        if self.plan is None and self.position is None and self.is_initialized:
            # A step of decoding. One after the other: the memory of the old keys, free and warm, may take the new values.
            self.keys = torch.cat([self.keys, key_states], -2)
            self.values = torch.cat([self.values, value_states], -2)
            return self.keys, self.values
        new, device = key_states.shape[-2], key_states.device
        known: Joined = {} if forward is None else forward.joined
        plan = (self.plan or KvPlan(new)).to(device)
        self.plan = None
        logical = self.logical + plan.logical
        held, valid, position = self.held, plan.valid, plan.position
        queries = position
        if plan.reduction is not None and plan.size is not None and position is not None:
            key_states, value_states, position, valid = _reduced(
                plan.reduction, plan.size, key_states, value_states, position
            )
            new = key_states.shape[-2]
        if self.position is not None or position is not None:
            parts = self.position, self.end, self.not_padding, position, plan.end
            key = "placed", held, new, len(key_states)
            self.position, self.end = shared(known, key, parts, lambda: self._placed(position, plan.end, new, device))
        self.gapless &= not (plan.repacked or plan.reduction is not None)
        self.regular &= self.gapless and valid is None
        if valid is not None:
            self.not_padding = _joined(self.not_padding, held, valid, known)
        keys, values = super().update(key_states, value_states)
        if plan.span is not None and plan.limit is not None:
            if self.span is not None and self.limit != plan.limit:
                self.gapless = self.regular = False  # What the earlier span has dropped lies within the new one.
            self.regular &= plan.uniform
            self.span, self.limit = plan.span, plan.limit
        self.seen = None
        if self.position is not None and not plan.whole:
            queries = self.position[:, -new:] if queries is None else queries
            self.seen = self._seen(queries, plan.borders, known)
        if plan.span is not None:
            self._forget(plan, known)
        self.gone = logical - self.held
        self.reduced |= plan.repacked or plan.reduction is not None or self.span is not None or self.gone != 0
        return keys, values

    def _placed(self, position: Tensor | None, end: Tensor | None, new: int, device: torch.device) -> Any:
        """Positions of all tokens, `new` ones at `position` included, and of the next one."""
        past, before = self.places(self.keys.shape[0] if position is None else len(position), device)
        if position is None:
            position = before[:, None] + torch.arange(new, device=device)
        return torch.cat([past.to(device), position], 1), before + new if end is None else end

    def _seen(self, queries: Tensor, borders: Sequence[int] | None, known: Joined) -> Seen:
        assert self.position is not None
        real, held = self.not_padding, self.held
        valid = None if real is None else shared(known, ("valid", held), (real,), lambda: lengthened(real, held))
        columns = None
        if queries.shape[1] == 1 and valid is None:
            if self.span is None:
                columns = 0, held
            elif self.regular:
                columns = self.limit if held > sum(self.limit) else (0, held)
        return Seen(self.position, valid, queries, borders, columns)

    def refuse(self: Any, forward: Activity | None) -> None:
        """Refuse what is not of `forward`, or of one that it runs within, and what one that failed has left broken."""
        if self.broken:
            raise UnsupportedError(
                "a forward that failed has dropped earlier tokens of this KV cache: begin again with a new cache"
            )
        if torch.compiler.is_compiling():
            mine = forward is not None  # A number to look up would be guarded, and no two layers share a graph.
        else:
            while forward is not None and not forward.holds(self):
                forward = forward.outer
            mine = forward is not None
        if not mine:
            raise UnsupportedError(
                "this KV cache was reduced by tokenreduce, and no pipeline is attached: attach it again to go on with the cache"
            )

    def places(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, held) long: position of each token held, −1 on padding; and (B,) long, the position of the next token."""
        if self.position is not None and self.end is not None:
            return self.position, self.end
        valid = self.valid
        if valid is not None:
            return torch.where(valid, valid.cumsum(1) - 1, -1), valid.sum(1)
        everything = torch.arange(self.held, device=device).expand(rows, -1)
        return everything, torch.full((rows,), self.held, device=device)

    def _forget(self, plan: KvPlan, known: Joined) -> None:
        """Hold only the sinks and the window before the next token, which may be the first of the draft that came.

        Asks the device nothing: how many tokens stay is known, and which ones is worked out where they are. Rows of different
        length may hold some that no query will see.
        """
        sinks, window = self.limit
        bound = sinks + window + plan.draft
        if self.held <= bound:
            return
        self.shed = True
        if self.regular:
            self.keys, self.values = (
                torch.cat([x[:, :, :sinks], x[:, :, x.shape[2] + sinks - bound :]], 2) for x in (self.keys, self.values)
            )
            place = self.position
            assert place is not None
            self.position = shared(
                known,
                ("shed", sinks, bound),
                (place,),
                lambda: torch.cat([place[:, :sinks], place[:, place.shape[1] + sinks - bound :]], 1),
            )
            return
        parts = self.position, self.end, self.span, self.not_padding
        index, self.position, stays = shared(
            known, ("gathered", bound, self.held), parts, lambda: self._newest(bound, plan.draft)
        )
        self.regular = self.gapless and plan.uniform and plan.shortest is not None and plan.shortest >= bound
        self.not_padding = None if self.regular else stays
        self.keys, self.values = (
            x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
            for x in (self.keys, self.values)
        )

    def _newest(self, bound: int, draft: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, bound): columns of the tokens that are or will be seen, others in front; their positions; which they are."""
        assert self.position is not None
        assert self.end is not None
        assert self.span is not None
        last = self.end[:, None] - 1 - draft
        stays = (self.position < self.span[:, :1]) | (self.position > last - self.span[:, 1:])
        valid = self.valid
        if valid is not None:
            stays &= valid
        index = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, self.held - bound :]
        return index, self.position.gather(1, index), stays.gather(1, index)

    def get_seq_length(self) -> int:
        """Logical length."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes; the engine replaces the mask where they are not the real ones."""
        return self.logical + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.gone, self.reduced, self.broken = 0, False, False
        self.not_padding = self.position = self.end = self.span = self.plan = self.seen = self.told = None
        self.recent = []
        self.gapless = self.regular = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens. Only tokens that came after the reduced prefill can be."""
        for state in self.beside:
            state.check_crop(tokens_to_remove)
        before = self.held
        super().crop(tokens_to_remove)
        self.end = None if self.end is None else self.end - (before - self.held)
        self._each(lambda t: t[:, : self.held] if t.shape[1] > self.held else t)
        self.recent = []  # Of steps that are perhaps taken back.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)), rows=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, 0), rows=True)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices], rows=True)

    def _each(self, change: Any, rows: bool = False) -> None:
        self.not_padding = None if self.not_padding is None else change(self.not_padding)
        self.position = None if self.position is None else change(self.position)
        self.told = None if self.told is None else change(self.told)
        if rows:
            self.recent = [change(query) for query in self.recent]
            self.end = None if self.end is None else change(self.end)
            self.span = None if self.span is None else change(self.span)


def tokens_before(layer: TokenLayer | None, rows: int, device: torch.device) -> Tensor:
    """(B,) long: tokens of earlier turns in each row of a cache layer; zeros where there is none."""
    # A window may have slid past all that a layer held; it goes on counting.
    if layer is None or (not layer.held and layer.end is None):
        return torch.zeros(rows, dtype=torch.long, device=device)
    return layer.places(rows, device)[1]


def lengthened(not_padding: Tensor, count: int) -> Tensor:
    """`not_padding` (B, n) bool with as many more columns of True as make it `count` columns."""
    missing = count - not_padding.shape[1]
    return torch.nn.functional.pad(not_padding, (0, missing), value=True) if missing else not_padding


def _joined(not_padding: Tensor | None, held: int, fresh: Tensor, known: Joined) -> Tensor:
    """(B, held + n) bool: `not_padding`, lengthened to `held` columns, and then `fresh` (B, n).

    known: what has been joined in this forward. Layers of one stage share the very tensor, and with it the mask made of it.
    """
    if not held:
        return fresh
    key = (id(not_padding), held, id(fresh))
    if key not in known:
        old = (
            fresh.new_ones(len(fresh), held) if not_padding is None else lengthened(not_padding, held).to(fresh.device)
        )
        # The parts are kept beside the whole, so that their ids are not given to others.
        known[key] = (torch.cat([old, fresh], 1), fresh, *(() if not_padding is None else (not_padding,)))
    joined: Tensor = known[key][0]
    return joined


def _reduced(
    reduction: Reduction, size: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys and values (B, G, n, d) after a reduction of their tokens, with the positions and validity of what is left."""
    rows, groups, new, width = keys.shape
    flat = torch.cat([keys, values], -1).transpose(1, 2).reshape(rows, new, -1)
    left = reduction.apply(flat, size)
    assert left.hidden is not None
    both = left.hidden.view(rows, -1, groups, width + values.shape[-1]).transpose(1, 2)
    return both[..., :width], both[..., width:], position.gather(1, left.index), left.valid
