"""One import for authors of strategies and adapters, and the list of what is stable.

What stands here keeps its name, arguments and meaning. One that has to go is deprecated first: for one minor version at least it
works as before, with a DeprecationWarning that names what replaces it. Fields and keyword arguments with a default may be added.

Registering: `hookimpl` marks the functions by which a package offers what it has (see docs/plugins.md).

Strategies in the decoder: `Strategy`, its `StageConfig` (`Layer`, `Share` are types of fields) and `Capabilities`. `decide` gets
a `StageContext` and returns a `Reduction` or a `Decision`, perhaps with a `Span`. `forecast` gets a `CountView` and returns an
`Outcome`. `schedule` returns `Site`s. `carry` returns a `Carry`. `Action`, `Heads`, `Queries`, `SiteKind` and `Weighting` are
the types of their arguments; `reducible_allowance` is what the budget leaves to a stage.

Strategies in the vision tower: `VisionStrategy`, its `VisionStageConfig` or `BlockStageConfig` (`Block` is a type of fields),
`VisionContext`, `VisionSite`, `VisionKind`.

Adapters: `ModelAdapter`, the `Prompt` that it reads, the `TokenLayout` that it returns with its markers `PLAIN`, `NEWLINE`,
`WRAPPER` and `TIMESTAMP`, the `FfnPair` of a layer and the `VisionTower` of a model.

Observers: `StageTrace`, what a stage did; `Trace` and `LayerTrace`, what a prefill did.

Errors to raise: `UnsupportedError` for what cannot be exact, `LayoutError`, `PipelineError`, `BudgetError`. `PluginError` is
what the engine raises where a plugin breaks its contract. All are `TokenReduceError`s.

Those who call models use the names in `dir(tokenreduce)`, which are as stable. All other modules may change without notice.
"""

from __future__ import annotations

from tokenreduce.adapter import FfnPair, ModelAdapter, Prompt, VisionTower
from tokenreduce.errors import (
    BudgetError,
    LayoutError,
    PipelineError,
    PluginError,
    TokenReduceError,
    UnsupportedError,
)
from tokenreduce.hookspecs import hookimpl
from tokenreduce.layout import NEWLINE, PLAIN, TIMESTAMP, WRAPPER, TokenLayout
from tokenreduce.ops.carry import Carry
from tokenreduce.reduction import Reduction, Weighting
from tokenreduce.strategy import (
    Action,
    Capabilities,
    CountView,
    Decision,
    Heads,
    Layer,
    Outcome,
    Queries,
    Share,
    Site,
    SiteKind,
    Span,
    StageConfig,
    StageContext,
    Strategy,
    VisionKind,
    reducible_allowance,
)
from tokenreduce.trace import LayerTrace, StageTrace, Trace
from tokenreduce.vision import (
    Block,
    BlockStageConfig,
    VisionContext,
    VisionSite,
    VisionStageConfig,
    VisionStrategy,
)

__all__ = [
    "NEWLINE",
    "PLAIN",
    "TIMESTAMP",
    "WRAPPER",
    "Action",
    "Block",
    "BlockStageConfig",
    "BudgetError",
    "Capabilities",
    "Carry",
    "CountView",
    "Decision",
    "FfnPair",
    "Heads",
    "Layer",
    "LayerTrace",
    "LayoutError",
    "ModelAdapter",
    "Outcome",
    "PipelineError",
    "PluginError",
    "Prompt",
    "Queries",
    "Reduction",
    "Share",
    "Site",
    "SiteKind",
    "Span",
    "StageConfig",
    "StageContext",
    "StageTrace",
    "Strategy",
    "TokenLayout",
    "TokenReduceError",
    "Trace",
    "UnsupportedError",
    "VisionContext",
    "VisionKind",
    "VisionSite",
    "VisionStageConfig",
    "VisionStrategy",
    "VisionTower",
    "Weighting",
    "hookimpl",
    "reducible_allowance",
]
