"""StreamingLLM: each query sees the first tokens (attention sinks) and the most recent ones.

Paper: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2024), §3.2; 8 sinks by FrameFusion §7.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.strategy import Capabilities, CountView, Decision, Outcome, Span, StageConfig, StageContext, Strategy


class StreamingWindow(Strategy):
    """A span of `sinks` + `window` tokens, during the prefill and for every later query; hidden states all stay.

    The span moves over text and vision alike, as published: text falls out of the window like any other token. Positions
    stay the originals (the published code renumbers inside the cache). The window is solved from the budget: sinks + window
    tokens in the cache of every layer.
    """

    name = "streaming_window"
    capabilities = Capabilities(sites=("kv",), chooses_count=True, spans=True)

    class Config(StageConfig):
        """Fields of a streaming_window stage."""

        strategy: Literal["streaming_window"] = "streaming_window"
        sinks: int = Field(8, ge=0, description="First tokens that every query sees.")
        window: int | None = Field(None, ge=1, description="Last tokens that a query sees, itself included.")

    config: Config

    def needs_budget(self) -> bool:
        """Unless the window is given."""
        return self.config.window is None

    def carry(self, depth: int) -> None:
        """A window given in tokens moves on from chunk to chunk by itself."""
        if self.config.window is None:
            raise self.cannot_stream("its window is solved from a budget; give `window`")

    def decide(self, ctx: StageContext) -> Decision:
        """See the class."""
        window = self._window(ctx)
        if self.config.window is None and self.config.sinks + window >= ctx.n:
            return Decision()  # The budget has room for everything: decoding goes on as without the stage.
        return Decision(span=Span(self.config.sinks, window))

    def _window(self, ctx: StageContext) -> int:
        if self.config.window is not None:
            return self.config.window
        # One span for all layers, as published, although later layers could use what rounding down leaves over.
        if "held" not in ctx.state:
            ctx.state["held"] = ctx.allowance()
        held: int = ctx.state["held"]
        if held >= ctx.n:
            return ctx.n
        return self._beside_sinks(ctx, held)

    def _beside_sinks(self, ctx: StageContext | CountView, held: int) -> int:
        sinks = self.config.sinks
        if held <= sinks:
            reason = f"streaming_window may hold {held} tokens per layer, no more than its {sinks} sinks"
            held = ctx.at_least(sinks + 1, reason)
        return held - sinks

    def forecast(self, view: CountView) -> Outcome:
        """Tokens that the cache holds; one token besides the sinks is the least."""
        if self.config.window is None and "held" not in view.state:
            view.state["held"] = view.allowance()
        if self.config.window is None and view.state["held"] >= view.n:
            return Outcome(view.n)
        window = self.config.window or self._beside_sinks(view, view.state["held"])
        return Outcome(min(self.config.sinks + window, view.n))
