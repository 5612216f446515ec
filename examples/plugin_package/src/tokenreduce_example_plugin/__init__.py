"""A plugin for tokenreduce: one strategy, one preset, one observer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenreduce.plugin import hookimpl
from tokenreduce_example_plugin.keep_largest_norm import KeepLargestNorm
from tokenreduce_example_plugin.observer import log_stage

if TYPE_CHECKING:
    from tokenreduce.plugin import StageTrace, Strategy


@hookimpl
def tokenreduce_strategies() -> list[type[Strategy]]:
    """What a pipeline may now name in `strategy:`."""
    return [KeepLargestNorm]


@hookimpl
def tokenreduce_presets() -> dict[str, Path | str]:
    """What `tokenreduce run --pipeline` may now name."""
    return {"keep_largest_norm": Path(__file__).parent / "presets" / "keep_largest_norm.yaml"}


@hookimpl
def tokenreduce_observe(event: StageTrace) -> None:
    """Called after every applied stage of every pipeline."""
    log_stage(event)
