"""Putting a pipeline on a model and taking it off again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tokenreduce import plugins
from tokenreduce.adapter import ModelAdapter
from tokenreduce.engine.model.host import uncompiled
from tokenreduce.engine.run import Run, attached
from tokenreduce.errors import AttachError, UnsupportedError
from tokenreduce.layout import TokenLayout
from tokenreduce.pipeline import Pipeline, load_pipeline

__all__ = ["Run", "attach", "detach", "reduce"]


def attach(
    model: nn.Module,
    pipeline: str | Path | dict[str, Any] | Pipeline,
    *,
    budget: Any = None,
    layout: TokenLayout | None = None,
) -> Run:
    """Attach a pipeline to a model until `detach()` of the returned Run, which is a context manager too.

    Args:
        model: an unmodified transformers model of a supported family, or a bare decoder with `layout`.
        pipeline: preset name, path of a YAML file, mapping, or Pipeline.
        budget: overrides the pipeline's: a share in (0, 1] of tokens, or a mapping such as {"flops": 0.25}.
        layout: where the vision tokens of the next prefill are; left out, the family's adapter says it.

    Raises PipelineError, BudgetError, UnsupportedError or AttachError before anything has run.
    """
    model, loaded = uncompiled(model), load_pipeline(pipeline)
    if budget is not None:
        loaded = loaded.with_budget(budget)
    return Run(model, loaded, adapter_for(model, explicit=layout is not None), layout)


@contextmanager
def reduce(
    model: nn.Module,
    pipeline: str | Path | dict[str, Any] | Pipeline,
    *,
    budget: Any = None,
    layout: TokenLayout | None = None,
) -> Iterator[Run]:
    """`attach` for the length of a `with` block; undone on exit, also after an exception. Arguments as for `attach`."""
    run = attach(model, pipeline, budget=budget, layout=layout)
    try:
        yield run
    finally:
        try:
            run.detach()
        except KeyboardInterrupt:
            run.detach()  # Nobody outside holds the run: what Ctrl-C left is taken off here or never.
            raise


def detach(model: nn.Module) -> None:
    """Take off whatever pipeline is attached to `model`, for those who did not keep the Run. AttachError if none is."""
    runs = [attached[module] for module in model.modules() if module in attached]
    if not runs:
        raise AttachError(f"no pipeline is attached to this {type(model).__name__}")
    for run in runs:
        run.detach()


def adapter_for(model: nn.Module, explicit: bool) -> ModelAdapter:
    """The first adapter that matches, a third party's before ours; with an explicit layout any decoder will do."""
    adapters = [cls() for cls in plugins.adapters()]
    for adapter in adapters:
        if adapter.matches(model):
            return adapter
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise UnsupportedError(
        f"no adapter for model type '{kind}'{'' if explicit else ' (nor an explicit layout)'}; supported families: "
        f"{', '.join(sorted(adapter.name for adapter in adapters))}; docs/adapters.md shows how to write one"
    )
