"""One forward of one attachment: the state that hooks and attention share while a decoder runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenreduce.engine.cache.adopt import Before
from tokenreduce.engine.cache.layers import Activity, KvPlan, TokenLayer, lengthened
from tokenreduce.engine.cache.states import STATE
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.cache_stages import held_before, hold_less
from tokenreduce.engine.forward.decode_stages import remember, step
from tokenreduce.engine.forward.importance import AttentionRecord, reading_sites
from tokenreduce.engine.forward.kv_stages import CacheCount, plan_kv
from tokenreduce.engine.forward.looks import Ask, Looks, rounds
from tokenreduce.engine.forward.peek import Peeked, peek
from tokenreduce.engine.forward.sequence import Part, TokenSequence
from tokenreduce.engine.model.parallel import total_heads
from tokenreduce.engine.model.tap import Attention, DecoderFacts, attend_by_position, attend_by_row, causal_mask
from tokenreduce.errors import PluginError, UnsupportedError
from tokenreduce.planning.account import SPAN_BLOCK
from tokenreduce.planning.schedule import StageRun, account_attention, attention_sources, look_ahead_flops
from tokenreduce.strategy import Decision, Heads, Queries, Rows, Site, Strategy


class Forward(Activity):
    """State of one forward.

    Args:
        batch: its tokens. layers: the adopted KV cache layers, empty without a cache. facts: of the decoder.
        deepstack: per early layer, (B, N, D) rows to add after it.
    """

    batch: Batch
    """The tokens that are alive."""
    looks: Looks
    """What the stages did."""
    layers: list[TokenLayer]
    """The adopted layers of the KV cache, empty without a cache."""
    before: Before
    """What the KV cache was before this forward."""
    attention: AttentionRecord | None
    """Of the layer whose attention ran last, as long as a stage may still read it."""
    reads: set[int]
    """Order (Site.order) of the sites at which a stage reads attention."""
    cache_layers: set[int]
    """Layers with a `cache` site."""
    kv_sites: bool
    """Whether a stage acts at a `kv` site."""
    ffn: Tensor | None
    """(B, m, D) residual stream before the FFN of the layer that runs, where its `pre_ffn` stages changed it."""
    ffn_output: Tensor | None
    """(B, m, D) output of that FFN, which `layer_hooks.leave_layer` adds to `ffn`."""
    deepstack: list[Tensor]
    """(B, N, D) rows to add after each of the coming layers."""
    passengers: list[list[Tensor]]
    """Per row of the batch, its (n, D) share of each of `deepstack`, reduced with its tokens."""
    pairs: dict[tuple[int, int], int]
    """(layer, row): (query, key) pairs of attention where they differ from the account's."""
    logical: int
    """Tokens that transformers believes to come."""
    later: bool
    """Whether tokens of earlier turns are in the cache."""
    reads_from: Mapping[int, int]
    """Of each of `reads`, the layer whose attention is read there: the last one before it."""
    mixers: Mapping[int, str]
    """Layers without attention, and what their cache holds: STATE or NOTHING."""

    def __init__(
        self, batch: Batch, layers: list[TokenLayer], facts: DecoderFacts, deepstack: list[Tensor] | None = None
    ) -> None:
        self.batch, self.looks, self.layers, self.logical = batch, Looks(), layers, batch.width
        self.modules, self.implementation, self.config, self.group = (
            facts.modules, facts.implementation, facts.config, facts.group,
        )  # fmt: skip
        self.joined, self.pairs, self.deepstack = {}, {}, deepstack or []
        self.attention = self.ffn = self.ffn_output = None
        # A row of text alone has no stages.
        self.reads = {site.order for s in batch.sequences for run in s.runs for site in reading_sites(run)}
        self.mixers = facts.states
        self.reads_from = attention_sources(self.reads, self.mixers)
        self.kv_sites = any(site.kind == "kv" for s in batch.sequences for run in s.runs for site in run.sites)
        self.cache_layers = {
            site.layer for s in batch.sequences for run in s.runs for site in run.sites if site.kind == "cache"
        }
        self._input: Tensor | None = None
        self._peeking, self._paid = False, set[int]()
        self.decoding: Mapping[int, Strategy] = {}
        self.own: AttentionRecord | None = None
        self.passengers = [[rows[s.row, s.columns.to(rows.device)] for rows in self.deepstack] for s in batch.sequences]
        self.later = any(layer.logical for layer in layers)
        self.before = Before(layers if batch.width > 1 else ())
        self._mask: Tensor | None = None
        self._mask_key: tuple[int, int, torch.device | None, Tensor | None] = (0, 0, None, None)
        self._device: torch.device | None = None

    @property
    def sequences(self) -> list[TokenSequence]:
        """One per row; empty in a forward without vision tokens."""
        return self.batch.sequences

    def cache(self, layer: int) -> TokenLayer | None:
        """The cache layer of `layer`, None without a cache."""
        return self.layers[layer] if self.layers and layer not in self.mixers else None

    def move(self, device: torch.device) -> None:
        """Take all that goes with the tokens to where they are now: the layers may lie on several devices."""
        if self._device == device:
            return
        self._device = device
        self.batch.move(device)
        self.passengers = [[rows.to(device) for rows in each] for each in self.passengers]

    # Sites ------------------------------------------------------------------------------------------------------------

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        """Let the stages act on the residual stream x (B, m, D) before attention or FFN; None if nothing changes."""
        self.move(x.device)
        rows = [x[s.row, self.batch.columns_of(len(s), x.shape[1])] for s in self.sequences]
        changed = False
        for now in rounds(self.sequences, site):
            asked = [self._ask(sequence, part, run, site, rows[sequence.row]) for sequence, part, run in now]
            for ask, decision in zip(asked, self.looks.ask(asked, site), strict=True):
                sequence, reduction = ask.sequence, decision.reduction
                row, before, merged = sequence.row, len(sequence), 0
                if reduction is not None and (reduction.mixture is not None or reduction.counts != (before,)):
                    left, self.passengers[row], merged = sequence.apply(reduction, rows[row], self.passengers[row])
                    assert left is not None
                    rows[row], changed = left, True
                    ask.part.reducible_count -= before - len(sequence)
                decision = self._told(ask.run, site, decision)
                self.looks.record(sequence, ask.part, ask.run, site, decision, before, len(sequence), merged)
        if site.kind == "pre_attention":
            self.own = None
        last = None if self.attention is None else self.attention.layer
        if not any(read > site.order and self.reads_from.get(read) == last for read in self.reads):
            self.attention = None  # No stage will read it: as many bytes as the residual stream.
        return self.batch.pack(rows, x) if changed else None

    def _ask(self, sequence: TokenSequence, part: Part, run: StageRun, site: Site, hidden: Tensor) -> Ask:
        """`run` is to be asked about `part`, given the hidden (n, D) of `sequence`, and may read the attention that there is."""
        record = self.attention
        if run.strategy.capabilities.own_attention and site.kind == "pre_attention":
            record = self.own
            self._pay_for_look(sequence, site)
        if record is None:
            return Ask(sequence, part, run, hidden)
        held = partial(self.keys_and_values, sequence, record)
        return Ask(sequence, part, run, hidden, partial(self.importance, record=record), held)

    def look_ahead(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn what `module`, layer `layer`, is about to attend with."""
        self._peeking = True
        try:
            self.own = peek(layer, module, self.batch, self.cache(layer), args, kwargs)
        finally:
            self._peeking = False
        self._paid = set()

    def _pay_for_look(self, sequence: TokenSequence, site: Site) -> None:
        """Account once for norm and projections that ran for a look ahead."""
        if self.own is not None and self.own.attended is not None and sequence.row not in self._paid:
            self._paid.add(sequence.row)
            account = sequence.conductor.account
            account.selector_flops += look_ahead_flops(account.shape, len(self.own.attended[sequence.row]))

    def enter_attention(self, layer: int, x: Tensor) -> None:
        """Account for the attention of `layer` over x, and tell its cache what will come."""
        self.move(x.device)
        if layer in self.mixers:
            self._enter_mixer()
            return
        batch, cache = self.batch, self.cache(layer)
        plan = KvPlan(self.logical, batch.valid, draft=batch.draft, repacked=batch.index is not None)
        counts = [CacheCount()] * len(self.sequences)
        if self.kv_sites or (cache is not None and cache.position is not None):
            counts = plan_kv(self.looks, batch, layer, cache, x, plan)
        for sequence, count in zip(self.sequences, counts, strict=True):
            sequence.attended = sequence.alive
            account_attention(sequence.conductor.account, len(sequence), count.tokens, count.span)
            for part in sequence.parts:
                if part.medium is not None:
                    account_attention(part.conductor.account, part.reducible_count, None, False)
            if count.pairs is not None:
                self.pairs[layer, sequence.row] = count.pairs
        if cache is not None:
            cache.plan = plan
        self._input = x if layer in self.cache_layers else None

    def _told(self, run: StageRun, site: Site, decision: Decision) -> Decision:
        """`decision`, whose note says whose attention was read where the layer before has none."""
        layer = self.reads_from.get(site.order)
        if layer is None or site not in reading_sites(run) or layer == (site.order - 1) // 3:
            return decision
        return replace(decision, note="; ".join(filter(None, [decision.note, f"read the attention of layer {layer}"])))

    def _enter_mixer(self) -> None:
        """Account for a layer without attention. What its state is made of from a reduction on, only the engine knows."""
        for sequence in self.sequences:
            account_attention(sequence.conductor.account, len(sequence), None, False)
            for part in sequence.parts:
                if part.medium is not None:
                    account_attention(part.conductor.account, part.reducible_count, None, False)
        if self.batch.index is not None:
            for number in self.mixers if self.layers else ():
                self.layers[number].reduced = True

    def mixer_mask(self, layer: int) -> Tensor | None:
        """(B, m) long, 0 on padding: what a layer with a state needs from a reduction on; None if no token is padding.

        UnsupportedError where padding would come between a state and the tokens that go on from it."""
        if self.mixers.get(layer) != STATE or self.batch.valid is None:
            return None
        if self.later:
            raise UnsupportedError(
                f"layer {layer} goes on from a state, and rows that keep different numbers of tokens would put padding between "
                "the state and the new tokens: reduce a later turn one row at a time, or with a strategy that keeps the same "
                "number in every row"
            )
        return self.batch.valid.long()

    def finish_layer(self, layer: int, out: Tensor) -> Tensor:
        """Account for the FFN of `layer` and add its deepstack rows to out (B, m, D)."""
        for sequence in self.sequences:
            sequence.conductor.account.ffn.append(len(sequence))
            for part in sequence.parts:
                if part.medium is not None:
                    part.conductor.account.ffn.append(part.reducible_count)
        if not self.deepstack:
            return out
        self.move(out.device)
        self.deepstack.pop(0)
        rows = []
        for number, sequence in enumerate(self.sequences):
            rows.append(
                out[sequence.row, self.batch.columns_of(len(sequence), out.shape[1])] + self.passengers[number].pop(0)
            )
        if len(rows) == 1 and rows[0].shape[0] == out.shape[1]:
            return rows[0][None]
        padded = out.clone()
        for sequence, row in zip(self.sequences, rows, strict=True):
            padded[sequence.row, self.batch.columns_of(len(sequence), out.shape[1])] = row
        return padded

    def rotate(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See Batch."""
        return self.batch.rotate(tables)

    def undo(self) -> bool:
        """As Activity.undo, but for a single token."""
        return self.before.restore()

    def finish(self) -> None:
        """After the last layer."""

    # Attention ----------------------------------------------------------------------------------------------------------

    def attention_layer(self, module: nn.Module) -> int | None:
        """The layer that an attention module belongs to, None for a foreign one."""
        return self.modules.get(id(module))

    def attend(
        self,
        layer: int,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `layer` with the mask that its tokens need; then its `cache` stages."""
        if self._peeking:
            raise Peeked(query, key, value, kwargs)
        self.move(query.device)
        out = self._attended(layer, base, module, query, key, value, mask, kwargs)
        if layer in self.decoding:
            own = self.cache(layer)
            if self.sequences and own is not None:
                remember(own, self.batch, query.shape[2])
            elif not self.sequences and query.shape[2] == 1:
                step(self.decoding, len(self.layers), layer, own, query, kwargs)
            elif own is not None:
                own.recent = []
        if self._input is not None:
            cache, x, self._input = self.cache(layer), self._input, None
            held = held_before(cache, key.shape[2], key.shape[0], key.device)
            read = self.importance if 3 * layer + 1 in self.reads else None
            if hold_less(self.looks, self.batch, layer, cache, x, read) and self.attention is not None:
                self.attention.held = held
        return out

    def _attended(
        self,
        layer: int,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        cache = self.cache(layer)
        watched = base
        if layer in self.reads_from.values():
            self.attention = AttentionRecord.of(layer, query, key, kwargs, value)
            if self.implementation == "sdpa":
                watched = self.attention.rows.around(base)
        if cache is not None and cache.seen is not None:
            if self.implementation not in ("sdpa", "eager"):
                raise UnsupportedError(f"stages at `kv` sites need sdpa or eager attention, not {self.implementation}")
            return attend_by_position(
                base, module, query, key, value, cache, self.implementation, SPAN_BLOCK, self.joined, kwargs
            )
        if (
            self.batch.index is not None
            and key.shape[2] == query.shape[2]
            and self.implementation == "sdpa"
            and _plain(kwargs)
        ):
            starts = [query.shape[2] - self.batch.draft - len(sequence) for sequence in self.sequences]
            if any(starts):
                return attend_by_row(watched, module, query, key, value, starts, kwargs)
        if self.batch.index is not None or (cache is not None and cache.reduced):
            mask = self._causal_mask(query, key.shape[-2], cache)
        return watched(module, query, key, value, mask, **kwargs)

    def _causal_mask(self, query: Tensor, keys: int, cache: TokenLayer | None) -> Tensor | None:
        """The causal mask over the tokens that are really there. Layers of one stage, one after the other, share it."""
        not_padding = self.batch.valid if cache is None else cache.not_padding
        queries, before, device, of = self._mask_key
        if (queries, before, device) != (query.shape[2], keys, query.device) or of is not not_padding:
            valid = None if not_padding is None else lengthened(not_padding, keys).to(query.device)
            self._mask = causal_mask(self.implementation, self.config, query, keys, valid)
            self._mask_key = query.shape[2], keys, query.device, not_padding
        return self._mask

    def keys_and_values(self, sequence: TokenSequence, record: AttentionRecord) -> tuple[Tensor, Tensor]:
        """(G, n, d) each, of the tokens of `sequence` in the attention of `record`."""
        if record.value is None or not (record is self.attention or record is self.own):
            raise PluginError("keys and values are there as long as attention is read, and not in a compiled model")
        return record.keys_and_values(self.batch, self.cache(record.layer), sequence)

    def importance(
        self,
        sequence: TokenSequence,
        queries: Queries | Tensor,
        heads: Heads | Literal["each"],
        rows: Rows = "sum",
        record: AttentionRecord | None = None,
    ) -> Tensor:
        """(…, n) attention that the tokens of `sequence` receive in the last attention that ran, see StageContext.attention."""
        record = self.attention if record is None else record
        if record is None or not (record is self.attention or record is self.own):
            raise PluginError("a strategy asked for attention when its look was over; ctx is good for one look")
        all_heads = total_heads(record.query.shape[1], self.config, self.group)
        cache = self.cache(record.layer)
        scores = record.importance(self.batch, cache, sequence, queries, heads, rows, all_heads, self.group)
        return scores.to(sequence.alive.device)


def _plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether attention is nothing but causal."""
    return kwargs.get("position_bias") is None and kwargs.get("is_causal") is not False
