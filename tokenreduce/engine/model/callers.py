"""What called this forward, read from this thread's stack, where nothing in the call itself tells.

That the names which are read here exist is proved at attach, see `private_names`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn

from tokenreduce.engine.model.private_names import ASSISTED, ENCODING, LOOPS, PREFILL


def _stack() -> Iterator[FrameType]:
    """The frames that called this forward, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_loop(frame: FrameType) -> bool:
    return frame.f_code.co_name in LOOPS and _of_transformers(frame)


def _of_transformers(frame: FrameType) -> bool:
    return bool(frame.f_globals.get("__name__", "").startswith("transformers."))


def _is_compiled(frame: FrameType) -> bool:
    return (
        frame.f_code.co_name in ("__call__", "compile_wrapper")
        and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"
    )


def _is_call(frame: FrameType, module: nn.Module) -> bool:
    return frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module


def in_compiled_call() -> bool:
    """Whether a module that torch.compile made of this model, after a pipeline was attached, is being called."""
    return any(map(_is_compiled, _stack()))


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether the call that is going on is compiled, or one of `modules`, the decoder and its layers."""
    return in_compiled_call() or any(
        module._compiled_call_impl is not None or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in modules
    )


def calls_of(module: nn.Module) -> int:
    """How many calls of `module`, not compiled ones, are going on, one within the other."""
    return sum(_is_call(frame, module) for frame in _stack())


def in_generation() -> bool:
    """Whether generate() is calling: what follows a prompt it has prefilled is its own text."""
    return any(_is_loop(frame) for frame in _stack())


def encoding() -> tuple[Tensor | None, dict[str, Any]] | None:
    """The new token ids and the arguments of a generate() that is encoding its images and videos, before its first forward."""
    for frame in _stack():
        if frame.f_code.co_name == ENCODING and _of_transformers(frame):
            given, named = frame.f_locals["inputs_tensor"], frame.f_locals["model_input_name"]
            kwargs: dict[str, Any] = {**frame.f_locals["model_kwargs"], named: given}
            ids, cache = kwargs.pop("input_ids", None), kwargs.get("past_key_values")
            past = 0 if cache is None or ids is None else int(cache.get_seq_length())
            return (ids[:, past:] if ids is not None and past < ids.shape[1] else ids), kwargs
    return None


def in_chunked_prefill() -> bool:
    """Whether generate() is feeding a prompt in several pieces."""
    for frame in _stack():
        if _is_loop(frame) and frame.f_code.co_name == PREFILL:
            local = frame.f_locals
            return local["generation_config"].prefill_chunk_size is not None and len(local["input_chunks"]) > 1
    return False


def draft_length() -> int:
    """How many of the new tokens, the last ones, assisted decoding only guesses; 0 in any other call.

    An assistant's own forwards run inside the loop of the model it assists: the innermost loop decides.
    """
    loop = next((frame for frame in _stack() if _is_loop(frame)), None)
    if loop is None or loop.f_code.co_name != ASSISTED:
        return 0
    return int(loop.f_locals.get("candidate_length", 0))
