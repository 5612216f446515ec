"""One call of the decoder: what came in, where its vision tokens are, and the sequences to work on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapter import ModelAdapter, Prompt
from tokenreduce.engine.cache.adopt import seen_tokens
from tokenreduce.engine.forward.sequence import Facts, Part, TokenSequence
from tokenreduce.engine.model.callers import draft_length, in_generation
from tokenreduce.errors import LayoutError
from tokenreduce.layout import TokenLayout
from tokenreduce.planning.account import Account
from tokenreduce.planning.feasibility import check
from tokenreduce.planning.schedule import Conductor
from tokenreduce.strategy import Contents, Strategy


@dataclass(eq=False)
class Call:
    """A call of the decoder."""

    batch: int
    """Rows."""
    width: int
    """New tokens in each row, padding and draft included."""
    past: int
    """Tokens in the cache, as transformers counts."""
    device: torch.device
    """Of the new tokens."""
    cache: Any
    """Whatever was given as one; None for none."""
    mask: Any
    """Whatever was given as one; None for none."""
    position_ids: Tensor | None
    """As they were given."""
    prompt: Prompt | None
    """What the model around the decoder was called with, where it saw token ids."""
    output_attentions: bool
    """Attention weights are asked for."""
    draft: int = 0
    """Last new tokens that assisted decoding only guesses: it prefills with its first guess behind the prompt."""

    @classmethod
    def read(cls, kwargs: dict[str, Any], prompt: Prompt | None) -> Call:
        """The call with these arguments."""
        x = kwargs.get("inputs_embeds")
        if x is None:
            x = kwargs.get("input_ids")
        if not isinstance(x, Tensor):
            raise LayoutError("the decoder was called with neither input_ids nor inputs_embeds")
        cache = kwargs.get("past_key_values")
        outer = prompt.kwargs if prompt is not None else kwargs
        return cls(
            batch=x.shape[0],
            width=x.shape[1],
            past=0 if cache is None else seen_tokens(cache),
            device=x.device,
            cache=cache,
            mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            prompt=prompt,
            output_attentions=bool(kwargs.get("output_attentions") or outer.get("output_attentions")),
            draft=draft_length() if x.shape[1] > 1 else 0,
        )

    @cached_property
    def host_mask(self) -> Tensor:
        """(B, past + width) `mask` on the CPU: one copy for all that asks."""
        return self.mask.to(dtype=torch.bool, device="cpu")  # type: ignore[no-any-return]

    @cached_property
    def host_valid(self) -> Tensor | None:
        """(B, width) bool on the CPU: which of the new tokens are not padding; None if all are."""
        if self.mask is None or self.width == 1:
            return None
        valid = self.host_mask[:, -self.width :]
        return None if bool(valid.all()) else valid

    @cached_property
    def valid(self) -> Tensor | None:
        """`host_valid` on the device of the call."""
        return None if self.host_valid is None else self.host_valid.to(self.device)

    @cached_property
    def valid_past(self) -> Tensor | None:
        """(B, past) bool: which of the earlier tokens are not padding; None if all are."""
        if self.mask is None or not self.past or self.mask.shape[1] != self.past + self.width:
            return None
        valid = self.host_mask[:, : self.past]
        return None if bool(valid.all()) else valid.to(self.device)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module`, those that were given by their place too, by their names."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def given_layout(call: Call, layout: TokenLayout, fresh: bool) -> TokenLayout | None:
    """The layout that the user gave, if it is this call's. fresh: no prefill has used it yet."""
    tokens = layout.shape[1]
    if not fresh and call.cache is None and call.width > tokens and in_generation():
        # Without a cache, generate() feeds the prompt anew at each step, with what it has written behind it.
        return layout.followed_by_text(call.width - tokens).expand(call.batch)
    if call.width - call.draft != tokens:
        if call.past == 0 or (fresh and call.width > 1):
            raise LayoutError(
                f"the layout given is for {tokens} tokens, the forward has {call.width}; chunked prefill is not supported (use "
                "tr.stream for that), and a new prompt needs its own layout"
            )
        return None
    return layout.expand(call.batch) if fresh or call.past == 0 else None


def found_layout(call: Call, adapter: ModelAdapter, family: str, model: nn.Module) -> TokenLayout | None:
    """The layout that the family's adapter finds in the ids of the call; None in a step of one token."""
    if call.width == 1:
        return None
    prompt = call.prompt
    if prompt is None or prompt.input_ids.shape != (call.batch, call.width):
        raise LayoutError(
            f"{family}: where are the vision tokens? The call has no input_ids for its {call.width} tokens; pass "
            "layout=TokenLayout(...) to attach, or set run.layout (TokenLayout.text(batch, tokens) for text)"
        )
    if call.position_ids is not None:
        prompt = replace(prompt, position_ids=call.position_ids)
    if not isinstance(prompt.attention_mask, Tensor) or prompt.attention_mask.dim() != 2:
        prompt = replace(prompt, attention_mask=None)  # Prepared masks are refused later, if there are vision tokens.
    layout = adapter.layout(model, on_host(prompt, call))
    if layout is None:
        raise LayoutError(
            f"{family}: this family has no vision tokens of its own; pass layout=TokenLayout(slot=..., frame=...)"
        )
    return layout


def on_host(prompt: Prompt, call: Call) -> Prompt:
    """`prompt` with its ids, mask, positions and grids on the CPU, so that no adapter asks the device frame by frame."""
    mask, positions, given = prompt.attention_mask, prompt.position_ids, prompt.kwargs
    if mask is not None:
        mask = call.host_mask if mask is call.mask else mask.cpu()
    sizes = {
        name: value.cpu()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] <= 4 and not value.is_floating_point()
    }
    kwargs = {**given, **{name: value for name, value in sizes.items() if name not in ("input_ids", "attention_mask")}}
    where = None if positions is None else positions.cpu()
    return replace(prompt, input_ids=prompt.input_ids.cpu(), attention_mask=mask, position_ids=where, kwargs=kwargs)


def deepstack(names: tuple[str, str] | None, kwargs: dict[str, Any]) -> list[Tensor]:
    """Rows that the decoder would add after its first layers, taken out of its arguments; each (B, N, D).

    names: of the arguments with their mask and with the rows (ModelAdapter.deepstack).
    """
    if names is None or kwargs.get(names[1]) is None:
        return []
    where, found = kwargs.pop(names[0]), []
    for rows in kwargs.pop(names[1]):
        whole = rows.new_zeros(*where.shape, rows.shape[-1])
        whole[where.to(rows.device)] = rows
        found.append(whole)
    return found


def sequences(
    call: Call,
    layout: TokenLayout,
    reducible: Tensor,
    strategies: Many[Strategy],
    account: Callable[[int, int], Account],
    ends: Many[int] = (),
) -> list[TokenSequence]:
    """One TokenSequence per row. reducible: (B, N) bool. account: of a total and a reducible count. ends: see Facts.

    Raises BudgetError where the budget cannot be met, LayoutError where the pipeline protects every vision token of a row.
    """
    layout = layout.to(torch.device("cpu"))
    media, valid = layout.media(), call.host_valid
    made = []
    prompt = call.width - call.draft
    reducible = reducible.cpu()[:, :prompt]
    if valid is not None:
        reducible = reducible & valid[:, :prompt]
    where = layout.slot[:, :prompt], layout.frame[:, :prompt], media[:, :prompt], reducible.long()
    there = torch.stack(where).to(call.device)  # In one copy.
    for row, count in enumerate(reducible.sum(1).tolist()):
        # Padding is on the left alone: anything else was refused.
        padding = 0 if valid is None else call.width - int(valid[row].sum())
        columns = torch.arange(padding, prompt, device=call.device)
        its = account(len(columns), count)
        parts: list[Part] = []
        if count and its.budget is not None and its.budget.per == "medium":
            parts = _media_parts(layout, media[row], reducible[row], row, strategies, account)
            its = replace(its, budget=None)
        elif count:
            its.contents = contents_of(layout, reducible[row], row)
            check(strategies, its)
        elif bool((layout.slot[row] >= 0).any()):
            raise LayoutError(f"row {row} has vision tokens, and the pipeline protects all of them; nothing could fire")
        # Of their own memory, so that what is common to all rows goes when they are made.
        slot, frame, medium, may_go = (fact.clone() for fact in there[:, row, padding:])
        conductor = Conductor(strategies if count and not parts else [], its)
        facts = _facts(call, layout, row, slice(padding, prompt), ends)
        made.append(TokenSequence(row, columns, slot, frame, medium, may_go.bool(), count, conductor, facts, parts))
    return made


def _facts(call: Call, layout: TokenLayout, row: int, columns: slice, ends: Many[int]) -> Facts:
    """Of the tokens at `columns` of `row`."""
    prompt = call.prompt
    ids = None if prompt is None or prompt.input_ids.shape != (call.batch, call.width) else prompt.input_ids
    of = (layout.marker, layout.row, layout.column, ids)
    marker, at_row, column, its = (None if fact is None else fact[row, columns] for fact in of)
    return Facts(marker, at_row, column, its, ends)


def contents_of(layout: TokenLayout, reducible: Tensor, row: int) -> Contents:
    """How the reducible tokens (N,) bool of a row lie in its frames. There is at least one."""
    medium, frame, slot = (
        fact[row, : len(reducible)][reducible] for fact in (layout.media(), layout.frame, layout.slot)
    )
    counts = torch.stack([medium, frame]).unique(dim=1, return_counts=True)[1]
    slots = torch.stack([medium, slot]).unique(dim=1).shape[1]
    first, largest = torch.stack([counts[0], counts.max()]).tolist()
    return Contents(len(counts), slots, first, largest)


def _media_parts(
    layout: TokenLayout,
    media: Tensor,
    reducible: Tensor,
    row: int,
    strategies: Many[Strategy],
    account: Callable[[int, int], Account],
) -> list[Part]:
    """One part per image or video of a row, each with the budget to itself. media: (N,) long; reducible: (N,) bool."""
    parts = []
    for medium in media[: len(reducible)][reducible].unique().tolist():
        own = reducible & (media[: len(reducible)] == medium)
        count = int(own.sum())
        its = account(count, count)  # Text, and the other media, are none of its budget.
        its.contents = contents_of(layout, own, row)
        its.whose = f"of medium {medium} "
        check(strategies, its)
        parts.append(Part(Conductor(strategies, its), count, count, medium))
    return parts
