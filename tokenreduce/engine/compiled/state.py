"""One forward of a compiled model: what torch.compile traces, and what the operators in its graph do when they run.

Traced are tensors and plain attributes, which guards can watch. A stage is one opaque operator: when it runs, it lets the
stage act on the real tokens with the very code of a forward that is not compiled. The graph has to know how many tokens
come out, so that is forecast; an operator whose stage leaves another number raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any

from torch import Tensor, nn

from tokenreduce.engine.cache.layers import KvPlan, TokenLayer
from tokenreduce.engine.compiled import operators
from tokenreduce.engine.compiled.layer_plans import MOMENTS, chain
from tokenreduce.engine.forward.batch import gather_tables
from tokenreduce.engine.forward.importance import AttentionRecord
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.tap import UNREADABLE, Attention, RowSums, attention_below, causal_mask
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.planning.schedule import account_attention
from tokenreduce.strategy import Site, Strategy


class CompiledForward(Forward):
    """State of one forward of a compiled model.

    step: the layer that runs, before the first one a step that leads to it; None in a forward without vision tokens. opaque:
    whether cache and attention are left to operators, as stages at `kv` sites need it. held: the cache layer last updated.
    read: query, key, validity of keys and scale of the attention that the next stage reads. input: of the layer that runs.
    """

    traced = True

    def __init__(
        self, *, family: str, strategies: Many[Strategy], attention_modules: Mapping[int, nn.Module], **facts: Any
    ) -> None:
        super().__init__(**facts)
        self.family, self.attention_modules = family, attention_modules
        self.opaque = self.kv_sites or any(layer.position is not None for layer in self.layers)
        self.step = chain(self.sequences, strategies, len(self.deepstack)) if self.sequences else None
        self.held: TokenLayer | None = None
        self.read: tuple[Tensor, Tensor, Tensor | None, float] | None = None
        self.input: Tensor | None = None
        self.running = False
        self.clock = 0

    # Traced -----------------------------------------------------------------------------------------------------------

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        """As Forward.visit: an operator where stages act, nothing elsewhere."""
        assert self.step is not None
        if site.kind == "pre_attention":
            assert self.step.following is not None
            self.step = self.step.following
        todo = self.step.before if site.kind == "pre_attention" else self.step.ffn
        if todo is None:
            return None
        query, key, valid, scale = (None, None, None, 1.0) if self.read is None else self.read
        self.read = None
        out, index, there = operators.visit(
            x, query, key, valid, scale, todo.layer, todo.moment, todo.counts, self.batch.draft
        )
        if not todo.changes:
            return None
        self.batch.index = index
        self.batch.valid = there if todo.padded else None
        return out  # type: ignore[no-any-return]

    def enter_attention(self, layer: int, x: Tensor) -> None:
        """Only note the input: `defers` tells the cache, `catch_up` accounts."""
        self.input = x if self.opaque else None

    def leave_layer(self, layer: int, out: Tensor) -> Tensor:
        """Add the layer's deepstack rows."""
        assert self.step is not None
        return operators.leave_layer(out, self.step.number) if self.step.deep else out

    def rotate(self, embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As Forward.rotate, but for each layer anew: in a graph it cannot be seen whether two tuples are one."""
        index = self.batch.index
        return embeddings if index is None else gather_tables(embeddings, index)

    def attention_layer(self, module: nn.Module) -> int | None:
        """Not asked for: a layer is known by its step, or by its cache."""
        return 0

    def defers(self, layer: TokenLayer) -> bool:
        """Whether an operator will update `layer`; else tell it what comes."""
        if self.running:
            return False
        self.held = layer
        if not self.opaque and self.step is not None:
            layer.plan = KvPlan(
                self.logical, self.batch.valid, draft=self.batch.draft, repacked=self.batch.index is not None
            )
        return self.opaque

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
        """As Forward.attend."""
        if self.running:
            return super().attend(layer, base, module, query, key, value, mask, kwargs)
        held, self.held = self.held, None
        reads = self.step is not None and self.step.read
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        if reads or self.opaque:
            refused = [name for name in UNREADABLE if kwargs.get(name) is not None]
            if refused:
                raise UnsupportedError(
                    f"stages are not supported in a compiled model whose attention has {', '.join(refused)}"
                )
        if self.opaque:
            assert held is not None
            out = operators.attend(self.input, query, key, value, mask, scale, held.number)
            self.read = (query, key, None, scale) if reads else None
            return out, None
        valid = self.batch.valid if held is None else held.valid
        if reads:
            self.read = (query, key, valid, scale)
        if self.batch.index is not None or (held is not None and held.reduced):
            mask = causal_mask(self.implementation, self.config, query, key.shape[-2], valid)
        return base(module, query, key, value, mask, **kwargs)

    # When operators run -----------------------------------------------------------------------------------------------

    def run_visit(
        self,
        x: Tensor,
        query: Tensor | None,
        key: Tensor | None,
        valid: Tensor | None,
        scale: float,
        layer: int,
        moment: int,
        counts: Many[int],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Let the stages act. Also their result's index and validity; None for what stays as it was."""
        self.catch_up(layer, moment)
        self.clock += 1
        site = Site(layer, MOMENTS[moment])  # type: ignore[arg-type]
        # The graph may use the memory of its tensors again: nothing of them stays in here.
        source = layer if moment == 2 else layer - 1
        lent = self.layers[source] if self.layers and query is not None and not self.opaque else None
        before = None if lent is None else lent.real
        try:
            if query is not None and key is not None:
                self.attention = AttentionRecord(source, query, key, scale, RowSums())
            if lent is not None:
                lent.real = valid
            out = super().visit(site, x.clone())
        finally:
            self.attention = None
            if lent is not None:
                lent.real = before
        self.looks.notify_observers()
        self._hold_to(site, counts)
        return (None, None, None) if out is None else (out, self.batch.index, self.batch.valid)

    def _hold_to(self, site: Site, counts: Many[int]) -> None:
        """Refuse what the graph was not made for."""
        for sequence, count in zip(self.sequences, counts, strict=True):
            if len(sequence) != count:
                names = ", ".join(
                    dict.fromkeys(run.strategy.name for run in sequence.conductor.runs if site in run.sites)
                )
                raise PipelineError(
                    f"{names} at {site} left {len(sequence)} tokens of row {sequence.row}, where its forecast said {count}; a "
                    "compiled model needs counts that are known before: call it without torch.compile"
                )

    def run_attention(
        self,
        x: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        layer: int,
    ) -> Tensor:
        """Attention of a layer with all that its `kv` stages do."""
        self.running = True
        try:
            if self.sequences:
                assert x is not None
                self.catch_up(layer, 1)
                self.clock += 1
                super().enter_attention(layer, x)
                self.looks.notify_observers()
            keys, values = self.layers[layer].update(key.clone(), value.clone())
            module = self.attention_modules[layer]
            base = attention_below(self.implementation, module)
            out, _ = super().attend(layer, base, module, query, keys, values, mask, {"scaling": scale, "dropout": 0.0})
        finally:
            self.running = False
            self.attention = None
        return out  # type: ignore[no-any-return]

    def run_leave(self, out: Tensor, layer: int) -> Tensor:
        """Add deepstack rows."""
        self.catch_up(layer, 3)
        self.clock += 1
        return super().leave_layer(layer, out)

    def catch_up(self, layer: int, moment: int) -> None:
        """Account for all that was passed since the last operator: nothing has acted there."""
        while self.clock < 4 * layer + moment:
            place, kind = self.clock // 4, MOMENTS[self.clock % 4]
            for sequence in self.sequences:
                if kind is None:
                    sequence.conductor.account.ffn.append(len(sequence))
                    continue
                site = Site(place, kind)
                for run in sequence.conductor.due(site, sequence.__len__):
                    raise PipelineError(
                        f"{run.strategy.name} is due at {site}, where its forecast had no stage; call the model without "
                        "torch.compile"
                    )
                if kind == "kv":
                    sequence.attended = sequence.alive
                    account_attention(sequence.conductor.account, len(sequence), None, False)
            self.clock += 1

    def finish(self) -> None:
        """Account for the layers that ran since the last operator."""
        if self.step is not None:
            self.catch_up(self.step.number + 1, 0)
