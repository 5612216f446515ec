"""One forward of one attachment: the state that hooks and attention share while a decoder runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.engine.cache.adopt import Before
from tokenreduce.engine.cache.layers import Activity, Joined, KvPlan, TokenLayer, lengthened
from tokenreduce.engine.forward.importance import Reading, reading_sites
from tokenreduce.engine.forward.kv_stages import Held, plan_kv
from tokenreduce.engine.forward.sequence import Sequence, stage_trace
from tokenreduce.engine.model.tap import Attention, attend_by_position, attend_by_row, causal_mask
from tokenreduce.errors import PluginError, UnsupportedError
from tokenreduce.planning.account import SPAN_BLOCK
from tokenreduce.planning.schedule import StageRun, account_attention
from tokenreduce.plugin_checks import ask, checked
from tokenreduce.strategy import Decision, Heads, Queries, Site
from tokenreduce.trace import StageTrace


class Forward(Activity):
    """State of one forward.

    traced: whether torch.compile may trace it. before: what its cache was.

    Args:
        sequences: one per row; empty in a forward without vision tokens (a later turn on a reduced cache).
        layers: the adopted KV cache layers, empty without a cache.
        modules: id of each attention module, and its layer. implementation: the attention implementation below the tap.
        valid: (B, N) bool, None if no token is padding. deepstack: per early layer, (B, N, D) rows to add after it.
        draft: last tokens of the input that assisted decoding only guesses and may take back: the stages do not know of them.
        group: the process group over which the attention heads are sharded, if they are.
    """

    traced = False

    def __init__(
        self,
        *,
        sequences: list[Sequence],
        layers: list[TokenLayer],
        modules: Mapping[int, int],
        implementation: str,
        config: Any,
        width: int,
        valid: Tensor | None,
        deepstack: list[Tensor] | None = None,
        draft: int = 0,
        group: Any = None,
    ) -> None:
        self.sequences, self.layers, self.modules = sequences, layers, modules
        self.implementation, self.config, self.width, self.logical = implementation, config, width, width
        self.valid, self.draft, self.group = valid, draft, group
        self.index: Tensor | None = None
        self.rotary: tuple[Tensor, ...] | None = None
        self.gathered: tuple[Tensor, ...] | None = None
        self.mask: Tensor | None = None
        self.mask_of: Tensor | None = None
        self.masked = (0, 0)
        self.joined: Joined = {}
        self.attention: Reading | None = None
        # A row of text alone has no stages.
        self.reads = {site.order for s in sequences for run in s.conductor.runs for site in reading_sites(run)}
        self.kv_sites = any(site.kind == "kv" for s in sequences for run in s.conductor.runs for site in run.sites)
        self.ffn: Tensor | None = None
        self.ffn_output: Tensor | None = None
        self.deepstack = deepstack or []
        self.pairs: dict[tuple[int, int], int] = {}
        self.passengers: list[list[Tensor]] = [[rows[s.row, s.columns] for rows in self.deepstack] for s in sequences]
        self.before = Before(layers if width > 1 else ())
        self.stages: list[StageTrace] = []
        self.unseen: list[StageTrace] = []

    # Sites ------------------------------------------------------------------------------------------------------------

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        """Let the stages act on the residual stream x (B, m, D) before attention or FFN; None if nothing changes."""
        rows: list[Tensor] = []
        changed = False
        for number, sequence in enumerate(self.sequences):
            hidden = x[sequence.row, self.here(len(sequence), x.shape[1])]
            for run in sequence.conductor.due(site, sequence.__len__):
                before = len(sequence)
                decision = self.decide(sequence, run, site, hidden)
                merged = 0
                if decision.reduction is not None:
                    sequence.check(run.strategy.name, site, decision.reduction)
                    if len(sequence) != (decision.reduction.counts or (int(decision.reduction.kept.sum()),))[0]:
                        left, self.passengers[number], merged = sequence.apply(
                            decision.reduction, hidden, self.passengers[number]
                        )
                        assert left is not None
                        hidden, changed = left, True
                self.record(sequence, run, site, decision, before, len(sequence), merged)
            rows.append(hidden)
        if site.order + 1 not in self.reads:
            self.attention = None  # No stage will read it: as many bytes as the residual stream.
        if changed and self.draft:
            rows = [torch.cat([row, x[s.row, -self.draft :]]) for row, s in zip(rows, self.sequences, strict=True)]
        return self._pack(rows) if changed else None

    def here(self, count: int, width: int) -> slice:
        """Columns of a row's `count` tokens where the batch has `width`: after the padding, before the draft."""
        return slice(width - self.draft - count, width - self.draft)

    def decide(self, sequence: Sequence, run: StageRun, site: Site, hidden: Tensor) -> Decision:
        readable = self.attention is not None and site.kind != "kv"
        who = f"strategy {run.strategy.name} at {site}"
        ctx = sequence.context(run, site, hidden, self.importance if readable else None)
        return checked(who, site, ask(who, run.strategy.decide, ctx))

    def record(
        self, sequence: Sequence, run: StageRun, site: Site, decision: Decision, before: int, after: int, merged: int
    ) -> None:
        sequence.conductor.record(run, site, decision.finished, decision.budget_met, decision.consumed, decision.note)
        trace = stage_trace(sequence, run, site, before, after, merged, decision.note)
        self.stages.append(trace)
        self.unseen.append(trace)

    def _pack(self, rows: list[Tensor]) -> Tensor:
        """Rows (n, D) of different length as one left-padded batch; refreshes the batch's index and validity."""
        self.gathered = None
        draft = torch.arange(self.width - self.draft, self.width, device=rows[0].device)
        columns = [torch.cat([s.columns[s.alive], draft]) for s in self.sequences]
        if len(rows) == 1:
            self.index, self.valid = columns[0][None], None
            return rows[0][None]
        longest = max(len(row) for row in rows)
        x = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        index = torch.zeros(len(rows), longest, dtype=torch.long, device=x.device)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool, device=x.device)
        parts = []
        for number, row in enumerate(rows):
            index[number, longest - len(row) :] = columns[number]
            valid[number, longest - len(row) :] = True
            parts.append(torch.cat([x[number, : longest - len(row)], row]))
        self.index = index
        self.valid = None if all(len(row) == longest for row in rows) else valid
        return torch.stack(parts)

    def enter_attention(self, layer: int, x: Tensor) -> None:
        """Account for the attention of `layer` over x, and tell its cache what will come."""
        plan = KvPlan(self.logical, self.valid, draft=self.draft, repacked=self.index is not None)
        kept = [Held()] * len(self.sequences)
        if self.kv_sites or (self.layers and self.layers[layer].position is not None):
            kept = plan_kv(self, layer, x, plan)
        for sequence, held in zip(self.sequences, kept, strict=True):
            sequence.attended = sequence.alive
            account_attention(sequence.conductor.account, len(sequence), *held)
        if self.layers:
            self.layers[layer].plan = plan

    def leave_layer(self, layer: int, out: Tensor) -> Tensor:
        """Account for the FFN of `layer` and add its deepstack rows to out (B, m, D)."""
        for sequence in self.sequences:
            sequence.conductor.account.ffn.append(len(sequence))
        if not self.deepstack:
            return out
        self.deepstack.pop(0)
        rows = []
        for number, sequence in enumerate(self.sequences):
            rows.append(out[sequence.row, self.here(len(sequence), out.shape[1])] + self.passengers[number].pop(0))
        if len(rows) == 1 and rows[0].shape[0] == out.shape[1]:
            return rows[0][None]
        padded = out.clone()
        for sequence, row in zip(self.sequences, rows, strict=True):
            padded[sequence.row, self.here(len(sequence), out.shape[1])] = row
        return padded

    def rotate(self, embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotary tables (1 or B, N, d) at the original positions of the tokens alive."""
        if self.index is None:
            return embeddings
        if self.rotary is not embeddings or self.gathered is None:
            self.rotary = embeddings
            self.gathered = gather_tables(embeddings, self.index)
        return self.gathered

    def positions(self, places: Tensor) -> Tensor | None:
        """Position ids (1 or B, N) of the tokens alive, for attention that scales its queries by them.

        None where flash attention would take their gaps for packed sequences."""
        if self.index is None:
            return places
        if places.dim() != 2 or self.implementation not in ("sdpa", "eager"):
            return None
        return gather_table(places[..., None], self.index)[..., 0]

    def defers(self, layer: TokenLayer) -> bool:
        """Whether the cache layer is to leave its update for later."""
        return False

    def undo(self) -> bool:
        """As Activity.undo, but for a single token."""
        return self.before.restore()

    def finish(self) -> None:
        """After the last layer."""

    def past(self, layer: int, rows: int, device: torch.device) -> Tensor:
        """(B,) long: tokens of earlier turns in each row."""
        held = self.layers[layer] if self.layers else None
        # A window may have slid past all that a layer held; it goes on counting.
        if held is None or (not held.held and held.end is None):
            return torch.zeros(rows, dtype=torch.long, device=device)
        return held.places(rows, device)[1]

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
        """Attention of `layer` with the mask that its tokens need."""
        held = self.layers[layer] if self.layers else None
        watched = base
        if 3 * layer + 2 in self.reads or 3 * layer + 3 in self.reads:
            self.attention = Reading.of(layer, query, key, kwargs)
            if self.implementation == "sdpa":
                watched = self.attention.rows.around(base)
        if held is not None and held.seen[0] is not None:
            position = self._query_positions(held, query)
            if self.implementation not in ("sdpa", "eager"):
                raise UnsupportedError(f"stages at `kv` sites need sdpa or eager attention, not {self.implementation}")
            return attend_by_position(
                base, module, query, key, value, held, position, self.implementation, SPAN_BLOCK, kwargs
            )
        if (
            self.index is not None
            and key.shape[2] == query.shape[2]
            and self.implementation == "sdpa"
            and _plain(kwargs)
        ):
            starts = [query.shape[2] - self.draft - len(sequence) for sequence in self.sequences]
            if any(starts):
                return attend_by_row(watched, module, query, key, value, starts, kwargs)
        if self.index is not None or (held is not None and held.reduced):
            mask = self._mask(query, key.shape[-2], held)
        return watched(module, query, key, value, mask, **kwargs)

    def _query_positions(self, held: TokenLayer, query: Tensor) -> Tensor:
        """(B, q): positions of the queries, −1 on padding: they are the newest tokens of their rows."""
        rows, _, count, _ = query.shape
        if self.sequences:
            position = torch.full((rows, count), -1, dtype=torch.long, device=query.device)
            assert held.end is not None
            for s in self.sequences:
                start = held.end[s.row] - self.draft - s.total
                position[s.row, self.here(len(s), count)] = s.alive + start
            draft = torch.arange(-self.draft, 0, device=query.device)
            position[:, count - self.draft :] = held.end[:, None] + draft
            return position
        assert held.position is not None
        return held.position[:, -count:]

    def _mask(self, query: Tensor, keys: int, held: TokenLayer | None) -> Tensor | None:
        """The causal mask over the tokens that are really there. Layers of one stage, one after the other, share it."""
        real = self.valid if held is None else held.real
        key = (query.shape[2], keys)
        if self.masked != key or self.mask_of is not real:
            valid = None if real is None else lengthened(real, keys)
            self.mask = causal_mask(self.implementation, self.config, query, keys, valid)
            self.masked, self.mask_of = key, real
        return self.mask

    def importance(self, sequence: Sequence, queries: Queries, heads: Heads) -> Tensor:
        """(n,) attention that the tokens of `sequence` receive in the last attention that ran."""
        if self.attention is None:
            raise PluginError("a strategy asked for attention when its look was over; ctx is good for one look")
        return self.attention.importance(self, sequence, queries, heads)


def _plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether attention is nothing but causal."""
    return kwargs.get("position_bias") is None and kwargs.get("is_causal") is not False


def gather_tables(tables: Any, index: Tensor) -> Any:
    """Rows `index` of the rotary tables: cosine and sine, or one of complex numbers."""
    return gather_table(tables, index) if isinstance(tables, Tensor) else tuple(gather_table(t, index) for t in tables)


def gather_table(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, m) of a rotary table (1 or B, N, d)."""
    places = index.to(table.device)
    if len(places) == 1 and table.shape[0] == 1:
        return table.index_select(1, places[0])
    table = table.expand(len(places), -1, -1)
    return table.gather(1, places[..., None].expand(-1, -1, table.shape[-1]))
