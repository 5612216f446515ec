"""tokenreduce: token reduction for video LVLMs, inside unmodified Hugging Face models.

Public, and stable, are:

- the names in `dir(tokenreduce)`, for those who call models (`import tokenreduce as tr`);
- the names in `tokenreduce.plugin`, for authors of strategies and adapters, and `tokenreduce.plugins.manager`, to register one by
  hand;
- `__all__` of `tokenreduce.compare` and `tokenreduce.testbed`, and the command line.

All other modules may change without notice.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # Who wants to hear the library adds a handler.

if TYPE_CHECKING:
    from tokenreduce.budget import Budget
    from tokenreduce.engine.attach import Run, reduce
    from tokenreduce.engine.attach import attach as attach  # Deprecated.
    from tokenreduce.engine.attach import detach as detach
    from tokenreduce.engine.streaming.stream import Stream, stream
    from tokenreduce.errors import TokenReduceError
    from tokenreduce.layout import TokenLayout
    from tokenreduce.models import load_model, prepare
    from tokenreduce.pipeline import Pipeline, load_pipeline
    from tokenreduce.planning.plan import plan
    from tokenreduce.reduction import Reduction
    from tokenreduce.trace import Trace

_HOME = {
    "Budget": "tokenreduce.budget",
    "Pipeline": "tokenreduce.pipeline",
    "Reduction": "tokenreduce.reduction",
    "Run": "tokenreduce.engine.attach",
    "Stream": "tokenreduce.engine.streaming.stream",
    "TokenLayout": "tokenreduce.layout",
    "TokenReduceError": "tokenreduce.errors",
    "Trace": "tokenreduce.trace",
    "attach": "tokenreduce.engine.attach",
    "detach": "tokenreduce.engine.attach",
    "load_model": "tokenreduce.models",
    "load_pipeline": "tokenreduce.pipeline",
    "plan": "tokenreduce.planning.plan",
    "prepare": "tokenreduce.models",
    "reduce": "tokenreduce.engine.attach",
    "stream": "tokenreduce.engine.streaming.stream",
}

__all__ = [
    "Budget",
    "Pipeline",
    "Reduction",
    "Run",
    "Stream",
    "TokenLayout",
    "TokenReduceError",
    "Trace",
    "load_model",
    "load_pipeline",
    "plan",
    "prepare",
    "reduce",
    "stream",
]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: the command line answers --help without loading torch."""
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    from tokenreduce.errors import nearest

    raise AttributeError(f"module 'tokenreduce' has no attribute '{name}'{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))]
