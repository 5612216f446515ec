"""What the engine refuses by name: models, modes, masks and calls in which it could not be exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.budget import Budget
from tokenreduce.engine.forward.call import Call
from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.engine.model.callers import in_chunked_prefill
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.layout import PLAIN
from tokenreduce.strategy import Strategy


def refuse_later_padding(family: str, states: Mapping[int, str], call: Call) -> None:
    """Refuse padding among the tokens of a later turn, where layers have `states`: it would enter them."""
    if states and call.past and call.valid is not None:
        raise UnsupportedError(
            f"{family}: padding in a later turn is not supported: it would come between the states of its layers and the new "
            "tokens; give the rows turns of one length"
        )


def refuse_compiled(family: str, text: nn.Module, strategies: Iterable[Strategy], states: Mapping[int, str]) -> None:
    """Refuse what a compiled prefill cannot be: one over layers with states, one whose lengths only the content tells, or one
    that is to have gradients."""
    if states:
        raise UnsupportedError(
            f"{family}: a compiled decoder with layers that are not attention is not supported; call it without torch.compile"
        )
    for strategy in strategies:
        if not strategy.fixed_count:
            raise UnsupportedError(
                f"{family}: {strategy.name} leaves a number of tokens that depends on the video, which a compiled model does not "
                "support; call it without torch.compile"
            )
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in text.parameters()):
        raise UnsupportedError(
            f"{family}: gradients through a compiled model are not supported while a pipeline is attached; call it under "
            "torch.no_grad() or torch.inference_mode()"
        )


def refuse_call(family: str, config: Any, call: Call) -> None:
    """Refuse masks and lengths of a forward, with vision tokens in it or on a reduced cache."""
    mask = call.mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        what = (
            f"a {mask.dim()}-D attention mask"
            if isinstance(mask, Tensor)
            else f"a prepared {type(mask).__name__} of masks"
        )
        raise UnsupportedError(
            f"{family}: {what} is not supported; pass the 2-D mask of padding (batch, tokens), or none"
        )
    window, length = getattr(config, "sliding_window", None), call.past + call.width
    if window and getattr(config, "use_sliding_window", True) and length > window:
        raise UnsupportedError(
            f"{family}: {length} tokens are beyond its sliding window of {window}, which is not supported"
        )
    valid = call.host_valid
    if valid is None:
        return
    if not bool(valid[:, -1].all()):
        raise UnsupportedError(f"{family}: right-padded batches are not supported; pad on the left")
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise UnsupportedError(
            f"{family}: an attention mask with holes is not supported; it may hide padding on the left only"
        )


def refuse_outputs(family: str, config: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a call of the whole model asks of every input token: they are not all there in the end."""
    if kwargs.get("labels") is not None:
        raise UnsupportedError(
            f"{family}: labels are not supported while a pipeline is attached: the logits are those of the kept tokens"
        )
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise UnsupportedError(
            f"{family}: logits_to_keep as a tensor of places is not supported while a pipeline is attached: tokens change their "
            "places; give a number, or read run.trace.kept"
        )
    wanted = kwargs.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if wanted is None else wanted:
        raise UnsupportedError(
            f"{family}: output_router_logits is not supported while a pipeline is attached: the load balancing loss takes the "
            "mask of all tokens"
        )


def refuse_packed(family: str, call: Call) -> None:
    """Refuse several sequences in a row, which transformers tells by positions that do not count, where nothing else is given."""
    places = call.position_ids
    if call.mask is not None or call.cache is not None or places is None:
        return
    if places.dim() == 3:
        if len(places) != 4:  # Of multimodal rotary positions the first of four counts the text.
            return
        places = places[0]
    if bool((places.diff(dim=-1) != 1).any()):
        raise UnsupportedError(
            f"{family}: position_ids that jump or begin anew, without an attention mask, mean packed sequences, which are not "
            "supported; pass one sequence per row, or an attention mask"
        )


def refuse_mode(family: str, text: Any, config: Any, call: Call, modules: list[nn.Module]) -> None:
    """Refuse what a prefill with vision tokens cannot be: recomputed, random, in chunks, or asked for its attention."""
    if text.training:
        if any(bool(getattr(module, "gradient_checkpointing", False)) for module in modules):
            raise UnsupportedError(
                f"{family}: gradient checkpointing is not supported while a pipeline is attached; call "
                "model.gradient_checkpointing_disable()"
            )
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in text.modules())
        if dropout or bool(getattr(config, "attention_dropout", False)):
            raise UnsupportedError(
                f"{family}: dropout in training mode is not supported while a pipeline is attached; call model.eval(), or set "
                "its dropout to 0"
            )
    if call.output_attentions or getattr(config, "output_attentions", False):
        raise UnsupportedError(
            f"{family}: output_attentions is not supported while a pipeline is attached: layers attend to different tokens"
        )
    if in_chunked_prefill():
        raise UnsupportedError(
            f"{family}: chunked prefill (prefill_chunk_size) is not supported while a pipeline is attached: a stage must see the "
            "whole prompt; leave prefill_chunk_size out, and feed what is too long for one prefill piece by piece with tr.stream"
        )


def check_ran(family: str, layers: int, sequences: Iterable[TokenSequence]) -> None:
    """Refuse a decoder that left some of its layers out (early exit, layer dropping), unless a stage waited for them.

    Then NotFiredError is due, which names the stage.
    """
    for sequence in sequences:
        ran = len(sequence.conductor.account.ffn)
        if ran < layers and not sequence.unfinished():
            raise UnsupportedError(f"{family}: only {ran} of its {layers} layers ran, which is not supported")


def refuse_needs(pipeline: str, strategies: Iterable[Strategy], sequences: Iterable[TokenSequence]) -> None:
    """Refuse strategies that need facts about the tokens which this call does not give."""
    for strategy in strategies:
        for need in strategy.capabilities.needs:
            for sequence in sequences:
                facts = sequence.facts
                if need == "grid" and sequence.original_reducible:
                    patch = sequence.reducible.cpu()
                    if facts.marker is not None:
                        patch = patch & (facts.marker == PLAIN)
                    if facts.row is None or bool((facts.row[patch] < 0).any()):
                        raise UnsupportedError(
                            f"{pipeline}: {strategy.name} needs rows and columns (grid), which the layout of "
                            f"row {sequence.row} does not have; give TokenLayout(..., row=..., column=...)"
                        )
                if need == "ids" and facts.ids is None:
                    raise UnsupportedError(
                        f"{pipeline}: {strategy.name} needs token ids, and the model was called with embeddings alone; pass "
                        "input_ids"
                    )


def check_spent(pipeline: str, budget: Budget | None, sequences: Iterable[TokenSequence]) -> None:
    """Refuse what a prefill spent above its budget: no strategy, a plugin's least of all, may keep more than it was given."""
    if budget is None or budget.arithmetic == "released":
        return
    for sequence in sequences:
        for account in sequence.accounts if sequence.original_reducible else ():
            if account.spent > account.limit and not account.lenient:
                raise PipelineError(
                    f"pipeline {pipeline} held {float(account.share(account.spent)):.4f} of row {sequence.row}, above its budget "
                    f"{budget}: a stage kept more than its allowance"
                )
