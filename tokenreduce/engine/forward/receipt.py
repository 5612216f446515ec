"""The receipt of a forward."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.engine.forward.state import Forward
from tokenreduce.errors import NotFiredError
from tokenreduce.planning import cost
from tokenreduce.trace import LayerTrace, Trace


def receipt(forward: Forward, pipeline: str, budget: str, cache_bytes: int, dense: int, head: int) -> Trace:
    """The trace of a forward that has ended.

    cache_bytes: of one element of the KV cache. dense: FLOPs of the dense prefill. head: FLOPs of the LM head per token.
    Raises NotFiredError if a stage never acted on a sequence with vision tokens.
    """
    for sequence in forward.sequences:
        idle = sequence.unfinished() if sequence.original_reducible else []
        if idle:
            sites = ", ".join(str(site) for site in idle[0].sites[:3])
            raise NotFiredError(
                f"pipeline {pipeline}: stage {idle[0].strategy.name} never acted on row {sequence.row}, which has "
                f"{sequence.original_reducible} vision tokens: it waits for {sites} or for the stages before it to finish; "
                "mend `at`, `from`, `until`"
            )
    accounts = [s.conductor.account for s in forward.sequences]
    layers = []
    for layer in range(accounts[0].shape.layers):
        held = torch.tensor([account.kv[layer] for account in accounts])
        layers.append(
            LayerTrace(
                layer=layer,
                tokens=held,
                ffn_tokens=torch.tensor([account.ffn[layer] for account in accounts]),
                flops=sum(
                    cost.layer_flops(
                        a.shape, a.attn[layer], a.ffn[layer], pairs=forward.pairs.get((layer, s.row), a.pairs[layer])
                    )
                    for a, s in zip(accounts, forward.sequences, strict=True)
                ),
                kv_bytes=cost.kv_bytes(accounts[0].shape, [int(held.sum())], cache_bytes),
            )
        )
    return Trace(
        pipeline=pipeline,
        budget=budget,
        tokens=torch.tensor([s.total for s in forward.sequences]),
        kept=[s.columns[s.alive] for s in forward.sequences],
        source=torch.stack([s.source(forward.batch.width - forward.batch.draft) for s in forward.sequences]),
        layers=layers,
        stages=forward.looks.traces,
        dense_flops=dense,
        selector_flops=sum(account.selector_flops for account in accounts),
        head_flops_per_token=head,
        skipped=[
            f"row {s.row}: {run.strategy.name}: {run.note}"
            for s in forward.sequences
            for run in s.runs
            if not run.acted and run.note
        ]
        + [
            f"row {s.row}: {short}" for s in forward.sequences for account in s.accounts if (short := account.shortfall)
        ],
    )


def dense_receipt(
    totals: list[int], kept: list[Tensor], width: int, pipeline: str, budget: str, shape: cost.DecoderShape,
    cache_bytes: int, head: int, why: str,
) -> Trace:  # fmt: skip
    """The trace of a call in which no stage is asked.

    totals: tokens of each row. kept: their columns (N,) long. width: of the batch. why: no stage is asked. The rest: see
    `receipt`.
    """
    tokens = torch.tensor(totals)
    source = torch.full((len(kept), width), -1, dtype=torch.long)
    for row, columns in enumerate(kept):
        source[row, columns] = columns
    flops = sum(cost.layer_flops(shape, n, n) for n in totals)
    bytes_ = cost.kv_bytes(shape, [sum(totals)], cache_bytes)
    layers = [LayerTrace(layer, tokens, tokens, flops, bytes_) for layer in range(shape.layers)]
    dense = sum(cost.prefill_flops(shape, [n] * shape.layers, [n] * shape.layers, 0) for n in totals)
    return Trace(pipeline, budget, tokens, kept, source, layers, [], dense, 0, head, dense=why)
