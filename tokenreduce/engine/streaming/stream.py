"""Prefill of a sequence that comes in chunks: merged across their borders, and equal to the prefill of the whole."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokenreduce.adapter import ModelAdapter
from tokenreduce.engine.attach import adapter_for, check_arguments
from tokenreduce.engine.cache.adopt import adopt
from tokenreduce.engine.cache.layers import TokenLayer
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.call import Call
from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.host import unwrapped
from tokenreduce.engine.model.tap import DecoderFacts
from tokenreduce.engine.refusals import check_ran, refuse_call, refuse_mode
from tokenreduce.engine.run import Run
from tokenreduce.engine.streaming.progress import Ledger
from tokenreduce.errors import AttachError, LayoutError, PipelineError, PluginError, UnsupportedError
from tokenreduce.layout import TokenLayout
from tokenreduce.ops.carry import Carry
from tokenreduce.pipeline import Pipeline, load_pipeline
from tokenreduce.planning.account import Account
from tokenreduce.planning.schedule import Conductor
from tokenreduce.plugin_checks import carry_of, sites_of
from tokenreduce.strategy import HOLDING, Site

WIDTH = 1024
"""Tokens that the decoder takes at once, unless the caller says otherwise."""


def stream(model: nn.Module, pipeline: str | Path | dict[str, Any] | Pipeline, *, width: int = WIDTH) -> Stream:
    """Attach a pipeline to a model for one long sequence (no batch) that is fed chunk by chunk.

        with tr.stream(model, pipeline) as stream:
            stream.feed_text(ids)
            for features in encoded_frames:  # (frames, tokens per frame, D)
                stream.feed_frames(features)
            out = stream.finish(question_embeds)  # the decoder's output, for the last tokens

    Tokens, hidden states and cache are those of the prefill of the whole sequence. What is held besides the survivors in the KV
    cache: the tokens after the first one whose run may still grow (see `max_run` of similarity_merge), and up to `width` more.
    Stages that must see the whole sequence are refused by name, and so is a budget.

    Args:
        model, pipeline: as for `reduce`. width: most tokens that the decoder takes at once.

    Raises PipelineError, UnsupportedError or AttachError before anything has run.
    """
    check_arguments("stream", model, pipeline)
    if width < 1:
        raise PipelineError(f"stream: width must be at least 1, got {width}")
    model = unwrapped(model)
    return Stream(model, load_pipeline(pipeline), adapter_for(model, explicit=True), width)


@dataclass(frozen=True)
class Piece:
    """Survivors that go through the decoder together."""

    states: Tensor
    """(1, m, D)."""
    place: Tensor
    """(m,) long, places among the `logical` tokens that they stand for."""
    size: Tensor
    """(m,) long, how many tokens each stands for."""
    start: int
    """Place in the whole stream of the first of those tokens."""
    logical: int
    """Tokens that they stand for."""


class _PieceForward(Forward):
    """The forward of a piece: its tokens have been reduced before they came."""

    def __init__(self, piece: Piece, batch: Batch, layers: list[TokenLayer], facts: DecoderFacts) -> None:
        super().__init__(batch, layers, facts)
        self.states, self.logical = piece.states, piece.logical
        # The rotary tables that come are those of the survivors, but masks and caches are the engine's to make.
        self.batch.index = torch.arange(self.batch.width, device=piece.place.device)[None]

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        if site == Site(0, "pre_attention") and not torch.equal(x, self.states):
            raise UnsupportedError(
                "this decoder changes its embeddings before layer 0; streams are not supported for it"
            )
        return super().visit(site, x)


class Stream(Run):
    """A sequence fed in chunks to a model with a pipeline. Made by `stream`; a context manager, undone on exit.

    Later turns, once it is finished, go to the model itself with `past_key_values=stream.cache`, while the stream is attached.
    `trace` is there after `finish`.
    """

    width: int
    """Most tokens that the decoder takes at once."""
    cache: DynamicCache
    """The KV cache."""

    def __init__(self, model: nn.Module, pipeline: Pipeline, adapter: ModelAdapter, width: int) -> None:
        if not pipeline.stages:
            raise PipelineError("stream: the pipeline has no stage; there would be nothing to do")
        super().__init__(model, pipeline, adapter)
        if self.host.facts.states:
            self.detach()
            raise UnsupportedError(
                f"{self.host.family}: a stream over layers that are not attention is not supported; prefill in one piece"
            )
        self.width, self.cache = width, DynamicCache(config=self.host.config)
        self._cached: list[TokenLayer] = adopt(self.cache, len(self.host.layers))
        self._ledger, self._logical = Ledger(self.shape), 0
        self._failed = self._finished = False
        if type(adapter).layout is ModelAdapter.layout:
            self.layout = TokenLayout.text(1, 1)  # What a bare decoder is given afterwards is text, unless it is said.
            self._fresh = False

    # The user's side --------------------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Tokens fed so far."""
        return self._carry.seen

    @property
    def waiting(self) -> int:
        """Tokens that wait: for runs to end, or for `width` of them."""
        return self._carry.held

    @property
    def held(self) -> int:
        """Deprecated name of `waiting`."""
        warnings.warn("Stream.held is deprecated: read Stream.waiting", DeprecationWarning, stacklevel=2)
        return self.waiting

    def feed_text(self, ids: Tensor) -> None:
        """Feed text: ids (1, n) long."""
        self.feed(self.host.model.get_input_embeddings()(ids))  # type: ignore[operator]

    def feed_frames(self, features: Tensor, *, marker: Tensor | None = None, new: bool = False) -> None:
        """Feed the next frames of the video: features (frames, tokens per frame, D), as they go into the decoder.

        Args:
            marker: (tokens per frame,) long, see TokenLayout; left out, all are patches. new: another video begins.
        """
        if features.dim() != 3:
            raise LayoutError(f"frames must be (frames, tokens per frame, D), got {tuple(features.shape)}")
        frames, per_frame, _ = features.shape
        self.feed(features.flatten(0, 1)[None], self._ledger.next_frames(frames, per_frame, marker, new))

    def feed(self, embeds: Tensor, layout: TokenLayout | None = None) -> None:
        """Feed the next tokens: embeds (1, n, D), with their layout; without one they are text.

        Frames of a medium, and media, are numbered on over all chunks, and do not go back. Raises LayoutError, and then the
        chunk has not been taken.
        """
        self._refuse()
        weight: Any = self.host.model.get_input_embeddings().weight  # type: ignore[operator]
        if embeds.dim() != 3 or embeds.shape[0] != 1 or embeds.shape[2] != self.shape.hidden:
            raise LayoutError(f"a stream takes embeddings (1, tokens, {self.shape.hidden}), got {tuple(embeds.shape)}")
        if embeds.dtype != weight.dtype:
            raise LayoutError(f"a stream takes {weight.dtype} embeddings for this model, got {embeds.dtype}")
        layout = TokenLayout.text(1, embeds.shape[1]) if layout is None else layout
        if layout.shape != tuple(embeds.shape[:2]):
            raise LayoutError(f"the layout is for {layout.shape} tokens, the embeddings are {tuple(embeds.shape[:2])}")
        layout = layout.to(embeds.device)
        self._ledger.check(layout)
        reducible = self._reducible(layout)[0]
        able = reducible if self._merging is not None else torch.zeros_like(reducible)
        self._failed = True  # Until the chunk has gone in whole.
        with torch.no_grad():
            source = self._carry.feed(embeds[0], layout.slot[0], layout.frame[0], layout.media()[0], able)
            self._ledger.note_chunk(layout, reducible, source)
            # Text alone waits: without a vision token after it, no stage would act on it.
            while self._ledger.vision and self._carry.closed > self.width:
                self._prefill(self._next(self.width))
        self._failed = False

    def finish(self, embeds: Tensor | None = None, layout: TokenLayout | None = None, **kwargs: Any) -> Any:
        """Feed the last tokens, if any, and prefill all that is left. Returns the model's output for the last tokens.

        kwargs: for the last call of the model, such as logits_to_keep=1.
        """
        if embeds is not None:
            self.feed(embeds, layout)
        self._refuse()
        if not self.seen:
            raise LayoutError("this stream has been fed nothing")
        if self._ledger.vision and not self._ledger.reducible:
            raise LayoutError("the pipeline protects all vision tokens of this stream; nothing could fire")
        self._failed = True
        with torch.no_grad():
            self._carry.close()
            while self._carry.held > self.width:
                self._prefill(self._next(self.width))
            self._finished = True
            out = self._prefill(self._next(self._carry.held), kwargs)
        self._failed = False
        return out

    def _refuse(self) -> None:
        if not self.attached or self._failed:
            raise AttachError(
                f"this stream {'failed in a forward' if self._failed else 'was detached'}; begin a new one"
            )
        if self._finished:
            raise AttachError("this stream is finished; later turns go to the model, with past_key_values=stream.cache")

    # Pieces -----------------------------------------------------------------------------------------------------------

    def _check_pipeline(self) -> None:
        family, config = self.host.family, self.host.config
        if self.budget is not None:
            raise UnsupportedError(
                f"{self.pipeline.name}: a budget cannot be divided over a stream, whose length is not known; give its stages "
                "sizes of their own (`threshold`, `window`) and leave `budget` out"
            )
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if self.adapter.deepstack is not None or "mrope_section" in scaling:
            raise UnsupportedError(
                f"{family}: its vision tokens have positions in several dimensions; streams need plain ones"
            )
        super()._check_pipeline()
        carries = [(strategy, carry_of(strategy, len(self.host.layers))) for strategy in self.strategies]
        for strategy, carry in carries:
            where = [site for site in sites_of(strategy, len(self.host.layers)) if site.kind not in HOLDING]
            if where != ([] if carry is None else [Site(0, "pre_attention")]):
                raise PluginError(
                    f"strategy {strategy.name} says that it can run in a stream, but acts at {where[-1:]}"
                )
        merging = [carry for _, carry in carries if carry is not None]
        if len(merging) > 1:
            raise PipelineError(
                f"{self.pipeline.name}: a stream can have one stage that merges before layer 0, not several"
            )
        self._merging = next((strategy for strategy, carry in carries if carry is not None), None)
        self._carry = merging[0] if merging else Carry(1.0)  # Without candidates, a queue.

    def _next(self, count: int) -> Piece:
        """The next `count` survivors, and the tokens that they stand for: all up to the next survivor."""
        states, position, size = self._carry.take(count)
        start, end = self._logical, self._carry.next_position
        self._logical = end
        return Piece(states[None], position - start, size, start, end - start)

    def _prefill(self, piece: Piece, last: dict[str, Any] | None = None) -> Any:
        """Run `piece` through the decoder; the last one through the whole model, with these arguments."""
        module = self.host.text if last is None else self.host.model
        self._local.piece = piece
        try:
            return module(
                inputs_embeds=piece.states,
                position_ids=(piece.place + piece.start)[None],
                past_key_values=self.cache,
                use_cache=True,
                **(last or {}),
            )
        finally:
            self._local.piece = None

    def _begin(self, text: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The forward of a piece, or of a later turn as in any run."""
        piece: Piece | None = getattr(self._local, "piece", None)
        if piece is None:
            return super()._begin(text, kwargs)
        self._ready(kwargs)
        call = replace(Call.read(kwargs, None), width=piece.logical)
        refuse_call(self.host.family, self.host.config, call)
        refuse_mode(self.host.family, text, self.host.config, call, self.host.recomputable())
        if self._compiled():
            raise UnsupportedError(
                f"{self.host.family}: a stream does not support a compiled model; feed one without torch.compile"
            )
        # transformers takes a 4-D mask as it is; one of its own would be as wide as the sequence is long.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=call.device)
        columns = torch.arange(piece.logical, device=call.device)
        nothing = torch.full_like(columns, -1)
        conductor = Conductor(
            self.strategies if self._ledger.vision else [], Account(None, self.shape, piece.logical, 0)
        )
        for run in conductor.runs:
            if run.strategy is self._merging:
                run.end()
        sequence = TokenSequence(0, columns, nothing, nothing, nothing, columns < 0, 0, conductor)
        sequence.alive = sequence.attended = piece.place
        sequence.size, sequence.whole = piece.size, False
        forward = _PieceForward(piece, Batch([sequence], len(piece.place), None, 0), self._cached, self.host.facts)
        self._ledger.before(self._cached)
        self._active.start(forward)
        return kwargs

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the decoder; after the last piece, write the trace."""
        piece: Piece | None = getattr(self._local, "piece", None)
        forward = self._active.current()
        if piece is None or forward is None or self._local.refused:
            return super()._after_decoder(module, args, kwargs, output)
        self._end()
        if output is None:
            return None
        check_ran(self.host.family, self.shape.layers, forward.sequences)
        self._ledger.after(self._cached, piece.place + piece.start)
        if self._finished and self._ledger.vision:
            trace = self._ledger.receipt(
                self.pipeline.name, self.strategies, self._merging, self._carry, self.host.cache_bytes,
                self._head_flops,
            )  # fmt: skip
            self._keep(self.host.corrected(trace))
        return None
