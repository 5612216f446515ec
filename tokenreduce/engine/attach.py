"""The one door: `reduce` puts a pipeline on a model, the Run that it returns takes it off again, bit for bit."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tokenreduce import plugins
from tokenreduce.adapter import ModelAdapter
from tokenreduce.budget import Budget
from tokenreduce.engine.model.host import unwrapped
from tokenreduce.engine.run import Run, attached
from tokenreduce.errors import AttachError, BudgetError, PipelineError, UnsupportedError
from tokenreduce.layout import TokenLayout
from tokenreduce.pipeline import Pipeline, load_pipeline

_log = logging.getLogger(__name__)

__all__ = ["Run", "attach", "detach", "reduce"]


def reduce(
    model: nn.Module,
    pipeline: str | Path | Mapping[str, Any] | Pipeline,
    *,
    budget: float | str | Mapping[str, Any] | Budget | None = None,
    layout: TokenLayout | None = None,
    on_infeasible: Literal["refuse", "least"] | None = None,
) -> Run:
    """Attach a pipeline to a model now, until the end of a `with` block or `detach()` of the Run that is returned.

        with tr.reduce(model, "framefusion", budget=0.3) as run:  # taken off on exit, also after an exception
            model.generate(**inputs)

        run = tr.reduce(model, "framefusion", budget=0.3)  # stays on until run.detach()
        model.generate(**inputs)
        run.detach()

    Args:
        model: an unmodified transformers model of a supported family, compiled or with PEFT adapters (LoRA) or not, or a bare
            decoder with `layout`.
        pipeline: preset name, path of a YAML file, mapping, or Pipeline.
        budget: overrides the pipeline's: a share in (0, 1] of tokens, a mapping such as {"flops": 0.25}, or text, see
            Budget.parse.
        layout: where the vision tokens of the next prefill are; left out, the family's adapter says it.
        on_infeasible: overrides the pipeline's: `refuse` an input that cannot meet the budget, or go as low as possible
            (`least`), which the trace says.

    The pipeline stays on the model for as long as the model lives, also if nobody holds the Run any more. A Run that was neither
    entered nor kept, as of a call whose result is thrown away, can no longer be taken off: a UserWarning says so. It is one that
    was let go of, still attached, before a forward with vision tokens has run.

    Raises PipelineError, BudgetError, UnsupportedError or AttachError, and then the model is as it was.
    """
    check_arguments("reduce", model, pipeline)
    model, loaded = unwrapped(model), load_pipeline(pipeline)
    if budget is not None:
        loaded = loaded.with_budget(budget)
    if on_infeasible is not None:
        loaded = loaded.where_infeasible(on_infeasible)
    adapter = adapter_for(model, explicit=layout is not None)
    try:
        run = Run(model, loaded, adapter, layout)
    except (PipelineError, BudgetError) as error:
        named = str(error).startswith("pipeline ")
        raise type(error)(f"{'' if named else f'pipeline {loaded.name}: '}{error}") from None
    _log.debug("pipeline %s is on a %s, adapter %s", loaded.name, type(model).__name__, adapter.name)
    return _handle(run) if run.attached else run


def _handle(run: Run) -> Run:
    """The run again, as an object of its own with the same state. The model keeps `run`: only of another object can be seen
    that the caller let go of it."""
    handle = object.__new__(type(run))
    handle.__dict__ = run.__dict__
    weakref.finalize(handle, _let_go, run).atexit = False
    return handle


def _let_go(run: Run) -> None:
    if run.attached and not run.entered and not run.used and run.host.decoder() is not None:
        warnings.warn(
            f"the result of tokenreduce.reduce was neither entered nor kept: pipeline {run.pipeline.name} stays on the model, "
            "and nothing can take it off; write `with tr.reduce(...) as run:`, or keep `run = tr.reduce(...)` and call "
            "`run.detach()`",
            stacklevel=3,  # Past weakref.finalize: the caller's line.
        )


def attach(
    model: nn.Module,
    pipeline: str | Path | Mapping[str, Any] | Pipeline,
    *,
    budget: float | str | Mapping[str, Any] | Budget | None = None,
    layout: TokenLayout | None = None,
) -> Run:
    """Deprecated name of `reduce`, with the same arguments. Its Run may be let go of."""
    warnings.warn("tokenreduce.attach is deprecated: call tokenreduce.reduce", DeprecationWarning, stacklevel=2)
    run = reduce(model, pipeline, budget=budget, layout=layout)
    run.entered = True  # `detach(model)` takes it off.
    return run


def detach(model: nn.Module) -> None:
    """Deprecated: take off whatever pipeline is attached to `model`. AttachError if none is.

    Keep what `reduce` returns instead, and call its `detach`.
    """
    warnings.warn(
        "tokenreduce.detach is deprecated: keep what tokenreduce.reduce returns, and call its detach()",
        DeprecationWarning,
        stacklevel=2,
    )
    runs = [attached[module] for module in model.modules() if module in attached]
    if not runs:
        raise AttachError(f"no pipeline is attached to this {type(model).__name__}")
    for run in runs:
        run.detach()


def check_arguments(function: str, model: object, pipeline: object) -> None:
    """AttachError where the two arguments are swapped, or are something else."""
    if not isinstance(model, nn.Module):
        swapped = "; the arguments are swapped" if isinstance(pipeline, nn.Module) else ""
        raise AttachError(
            f"{function} takes a model and then a pipeline, got {_kind(model)} for the model{swapped}: write "
            f"tr.{function}(model, pipeline)"
        )
    if not isinstance(pipeline, (str, Path, Mapping, Pipeline)):
        raise AttachError(
            f"{function} takes a pipeline as a preset's name, the path of a YAML file, a mapping or a Pipeline, got "
            f"{_kind(pipeline)}"
        )


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def adapter_for(model: nn.Module, explicit: bool) -> ModelAdapter:
    """The first adapter that matches, a third party's before ours; with an explicit layout any decoder will do."""
    adapter = plugins.adapter_of(model)
    if adapter is not None:
        return adapter
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise UnsupportedError(
        f"no adapter for model type '{kind}'{'' if explicit else ' (nor an explicit layout)'}; supported families: "
        f"{', '.join(plugins.offered_adapters())}; docs/adapters.md shows how to write one"
    )
