"""One import for authors of strategies and adapters, and the list of what is stable.

What stands here keeps its name, arguments and meaning. One that has to go is deprecated first: for one minor version at least it
works as before, with a DeprecationWarning that names what replaces it. Fields and keyword arguments with a default may be added.

Registering: `hookimpl` marks the functions by which a package offers what it has (see docs/plugins.md).

Strategies in the decoder: `Strategy`, its `StageConfig` (`Layer`, `Share`, `Keep` with `Tokens` are types of fields) and
`Capabilities`, whose needs are `Signal`s. `decide` gets a `StageContext` and returns a `Reduction`, perhaps with a `Mixture`, or
a `Decision`, perhaps with a `Span`. `Groups` are tokens by frame, medium or segment, a `TowerView` is what the vision tower told.
`VISION`, `SYSTEM`, `BEFORE`, `AROUND`, `QUESTION` and `TAIL` are what a
token is for. `forecast` gets a `CountView` and returns an `Outcome`. `schedule` returns `Site`s,
for which `layer_of` reads a `Layer`. `carry` returns a `Carry`. `Action`, `Heads`, `Queries`, `Rows`, `SiteKind` and `Weighting`
are the types of their arguments, `CountKind` says where a count comes from; `reducible_allowance` is what the budget leaves to
a stage.

Strategies in the vision tower: `VisionStrategy`, its `VisionStageConfig` or `BlockStageConfig` (`Block` is a type of fields),
`VisionContext`, `VisionSite`, `VisionKind`.

Adapters: `ModelAdapter`, the `Prompt` that it reads, the `TokenLayout` that it returns with its markers `PLAIN`, `NEWLINE`,
`WRAPPER` and `TIMESTAMP`, the `FfnPair` of a layer, the `VisionTower` of a model and a `TowerCall` of it.

Observers: `StageTrace`, what a stage did; `Trace` and `LayerTrace`, what a prefill did.

Errors to raise: `UnsupportedError` for what cannot be exact, `LayoutError`, `PipelineError`, `BudgetError`. `PluginError` is
what the engine raises where a plugin breaks its contract. All are `TokenReduceError`s.

Those who call models use the names in `dir(tokenreduce)`, which are as stable. All other modules may change without notice.
"""

from __future__ import annotations

from tokenreduce.adapter import FfnPair, ModelAdapter, Prompt, TowerCall, VisionTower
from tokenreduce.amounts import Keep, Layer, Share, Tokens, layer_of
from tokenreduce.errors import (
    BudgetError,
    LayoutError,
    PipelineError,
    PluginError,
    TokenReduceError,
    UnsupportedError,
)
from tokenreduce.hookspecs import hookimpl
from tokenreduce.layout import (
    AROUND,
    BEFORE,
    NEWLINE,
    PLAIN,
    QUESTION,
    SYSTEM,
    TAIL,
    TIMESTAMP,
    VISION,
    WRAPPER,
    TokenLayout,
)
from tokenreduce.ops.carry import Carry
from tokenreduce.ops.groups import Groups
from tokenreduce.reduction import Mixture, Reduction, Weighting
from tokenreduce.strategy import (
    Action,
    Capabilities,
    CountKind,
    CountView,
    Decision,
    Heads,
    Outcome,
    Queries,
    Rows,
    Signal,
    Site,
    SiteKind,
    Span,
    StageConfig,
    StageContext,
    Strategy,
    TowerView,
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
    "AROUND",
    "BEFORE",
    "NEWLINE",
    "PLAIN",
    "QUESTION",
    "SYSTEM",
    "TAIL",
    "TIMESTAMP",
    "VISION",
    "WRAPPER",
    "Action",
    "Block",
    "BlockStageConfig",
    "BudgetError",
    "Capabilities",
    "Carry",
    "CountKind",
    "CountView",
    "Decision",
    "FfnPair",
    "Groups",
    "Heads",
    "Keep",
    "Layer",
    "LayerTrace",
    "LayoutError",
    "Mixture",
    "ModelAdapter",
    "Outcome",
    "PipelineError",
    "PluginError",
    "Prompt",
    "Queries",
    "Reduction",
    "Rows",
    "Share",
    "Signal",
    "Site",
    "SiteKind",
    "Span",
    "StageConfig",
    "StageContext",
    "StageTrace",
    "Strategy",
    "TokenLayout",
    "TokenReduceError",
    "Tokens",
    "TowerCall",
    "TowerView",
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
    "layer_of",
    "reducible_allowance",
]
