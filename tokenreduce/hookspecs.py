"""The hooks a plugin may implement. A plugin is a module or object named by an entry point of the group `tokenreduce`.

from tokenreduce.hookspecs import hookimpl

@hookimpl
def tokenreduce_strategies():
    return [KeepLargestNorm]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from tokenreduce.adapter import ModelAdapter
    from tokenreduce.strategy import Strategy
    from tokenreduce.trace import StageTrace
    from tokenreduce.vision import VisionStrategy

PROJECT = "tokenreduce"
"""Name of the pluggy project, of the entry point group, and the prefix of every hook."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def tokenreduce_strategies() -> list[type[Strategy] | type[VisionStrategy]]:  # type: ignore[empty-body]
    """Strategy classes, for the decoder or the vision tower, that a pipeline may then name in YAML."""


@hookspec
def tokenreduce_adapters() -> list[type[ModelAdapter]]:  # type: ignore[empty-body]
    """Adapters for model families."""


@hookspec
def tokenreduce_presets() -> dict[str, Path | str]:  # type: ignore[empty-body]
    """Pipelines by name: the path of a YAML file each."""


@hookspec
def tokenreduce_observe(event: StageTrace) -> None:
    """Called after each applied stage, once per sequence (in the vision tower once per call of it). Look, do not change."""
