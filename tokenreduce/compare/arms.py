"""Arms of a comparison: pipelines × budgets × models, and the dense model that they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.budget import Budget, is_share
from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import Pipeline, load_pipeline

BASELINE = "dense"
"""Name of the arm that reduces nothing."""


@dataclass(frozen=True)
class Arm:
    """One way of running a model: a pipeline, or nothing, on a model."""

    name: str
    """Unique in a comparison; carries budget and model where there are several."""
    method: str
    """What tables group by: the name without budget and model."""
    model: str
    """Checkpoint folder, hub name or `embedded`."""
    pipeline: Pipeline | None = None
    """What is attached; None for the dense arm."""

    @property
    def budget(self) -> str:
        """The budget in words."""
        return "none" if self.pipeline is None or self.pipeline.budget is None else str(self.pipeline.budget)

    @property
    def share(self) -> float | None:
        """The budget as a share of tokens, if it is one; 1 for dense."""
        if self.pipeline is None:
            return 1.0
        budget = self.pipeline.budget
        if budget is None or budget.unit != "tokens" or float(budget.amount) > 1:
            return None
        return float(budget.amount)

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the arm does, as plain data."""
        text = None if self.pipeline is None else self.pipeline.to_yaml()
        return {"name": self.name, "method": self.method, "model": self.model, "pipeline": text}


def expand(
    sources: Sequence[str], budgets: Sequence[str], models: Sequence[str], on_infeasible: str | None = None
) -> list[Arm]:
    """The dense arm of each model, and each pipeline with each budget on each model.

    sources: `dense`, preset names and YAML files; dense is added where it is missing. budgets: replace the pipelines' own;
    empty leaves them. on_infeasible: replaces the pipelines' own, see Pipeline.
    Names carry the budget where there are several, and the model likewise. Raises PipelineError,
    BudgetError.
    """
    loaded = [load_pipeline(source) for source in sources if source != BASELINE]
    pipelines = name_pipelines(
        loaded if on_infeasible is None else [pipeline.where_infeasible(on_infeasible) for pipeline in loaded]
    )
    asked = [Budget.parse(budget) for budget in budgets]
    if len({str(budget) for budget in asked}) < len(asked):
        raise PipelineError(f"--budget names one budget twice: {', '.join(budgets)}")
    if len(set(models)) < len(models):
        raise PipelineError(f"--model names one model twice: {', '.join(models)}")
    arms = []
    for model in models:
        last = f"@{model}" if len(models) > 1 else ""
        arms.append(Arm(f"{BASELINE}{last}", BASELINE, model))
        for method, pipeline in pipelines:
            if not asked:
                arms.append(Arm(f"{method}{last}", method, model, pipeline))
            for budget, text in zip(asked, budgets, strict=True):
                middle = f"@{text.strip()}" if len(asked) > 1 else ""
                given = pipeline.with_budget(text if is_share(text) else budget)
                arms.append(Arm(f"{method}{middle}{last}", method, model, given))
    return arms


def name_pipelines(pipelines: Sequence[Pipeline]) -> list[tuple[str, Pipeline]]:
    """A name for each pipeline, none of them BASELINE; names that repeat get a number."""
    named: dict[str, Pipeline] = {}
    for pipeline in pipelines:
        name, number = pipeline.name, 2
        while name in named or name == BASELINE:
            name, number = f"{pipeline.name}-{number}", number + 1
        named[name] = pipeline
    return list(named.items())
