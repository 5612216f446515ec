"""The worker of the case `rivals` in tokenreduce's own environment."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

from worker import Arm, Facts, Video, serve

import tokenreduce as tr
from tokenreduce.planning.cost import DecoderShape, prefill_flops

PREFILL = ("framefusion", "framefusion_official", "fastv")
"""Pipelines that remove hidden states, so that token counts say what FLOPs the prefill has."""
CACHE = ("streaming_llm",)


def arms(model: Any, facts: Facts) -> dict[str, Arm]:
    """The pipelines at the budget of the case."""
    shape = DecoderShape.from_config(model.config)

    def attach(name: str, video: Video) -> Any:
        layout = tr.TokenLayout.video(
            before=video.before, frames=video.frames, per_frame=video.per_frame, after=video.after
        )
        return tr.reduce(model, name, budget=facts["budget"], layout=layout)

    def predicted(run: Any) -> Facts:
        """The speed-up that FLOPs predict, with attention as causal kernels compute it."""
        trace = run.trace
        n = trace.source.shape[1]
        attn = [int(layer.tokens) for layer in trace.layers]
        ffn = [int(layer.ffn_tokens) for layer in trace.layers]
        dense = prefill_flops(shape, [n] * shape.layers, [n] * shape.layers, form="causal")
        return {"predicted": dense / (prefill_flops(shape, attn, ffn, form="causal") + trace.selector_flops)}

    pruned = {name: Arm(model, partial(attach, name), stays=True, facts=predicted) for name in PREFILL}
    return pruned | {name: Arm(model, partial(attach, name), stays=True) for name in CACHE}


if __name__ == "__main__":
    serve(arms, tokenreduce=version("tokenreduce"))
