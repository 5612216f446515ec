"""What the engine reads of transformers that no public place tells: proved to be there whenever a pipeline is attached.

A name that another release has changed would not raise where it is read, in a stack frame: other tokens would be kept, and
nobody would know.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer

from tokenreduce.errors import UnsupportedError

PREFILL, ASSISTED = "_prefill", "_assisted_decoding"
LOOPS = ("_sample", "_beam_search", ASSISTED, PREFILL)
"""The functions of transformers' generate() that call a model."""
ENCODING = "_maybe_prepare_encoder_kwargs_for_generation"
"""The one that encodes images and videos before the first of those calls."""

LOCALS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LOOPS, ()),
    ASSISTED: ("candidate_length",),
    PREFILL: ("generation_config", "input_chunks"),
    ENCODING: ("inputs_tensor", "model_input_name", "model_kwargs"),
}
"""The local names that `callers` reads in each of these functions, while they run."""
INTERNAL = "_attn_implementation_internal"
"""The attribute of a configuration that its attention implementation is kept in. Its public setter changes sub-configs too."""
CACHE = {DynamicCache: ("layers", "offloading"), DynamicLayer: ("is_initialized", "lazy_initialization")}
"""Attributes by which a user's cache is told, and adopted."""


def prove_names(family: str, model: nn.Module, config: Any) -> None:
    """UnsupportedError, naming it, where a name that the engine reads is not in this release of transformers.

    config: of the decoder of `model`. A model that has a version of its own of one of the functions is held to that.
    """
    for function, names in LOCALS.items():
        for owner in (GenerationMixin, type(model)):
            if owner is not GenerationMixin and not hasattr(owner, function):
                continue  # It does not generate itself.
            code = getattr(inspect.unwrap(getattr(owner, function, None)), "__code__", None)  # type: ignore[arg-type]
            if code is None:
                raise _missing(family, f"{owner.__name__}.{function}")
            for name in names:
                if name not in (*code.co_varnames, *code.co_cellvars):
                    raise _missing(family, f"local `{name}` in {owner.__name__}.{function}")
    if not hasattr(GenerationConfig(), "prefill_chunk_size"):
        raise _missing(family, "GenerationConfig.prefill_chunk_size")
    if INTERNAL not in vars(config):
        raise _missing(family, f"{type(config).__name__}.{INTERNAL}")
    for kind, names in CACHE.items():
        made = kind()
        for name in names:
            if not hasattr(made, name):
                raise _missing(family, f"{kind.__name__}.{name}")


def _missing(family: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{family}: transformers {transformers.__version__} has no {name}, which token reduction reads; install a release that "
        "has it: pip install transformers==5.23.0"
    )
