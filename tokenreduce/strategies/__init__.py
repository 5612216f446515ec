"""The strategies that come with tokenreduce, one per file, registered like a third party's.

Folders say what a method does to tokens: `prune` drops, `merge` averages, `cache` shortens what attention sees, `tower` acts in
the vision tower, `controls` are what a method must beat.
"""

from __future__ import annotations

from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategies.cache.streaming_window import StreamingWindow
from tokenreduce.strategies.controls.random import RandomPrune
from tokenreduce.strategies.controls.uniform_frames import UniformFrames
from tokenreduce.strategies.merge.similarity_merge import SimilarityMerge
from tokenreduce.strategies.prune.fastv import FastV
from tokenreduce.strategies.prune.importance_prune import ImportancePrune
from tokenreduce.strategies.tower.frame_reuse import FrameReuse
from tokenreduce.strategies.tower.patch_merge import PatchMerge
from tokenreduce.strategy import Strategy
from tokenreduce.vision import VisionStrategy


@hookimpl
def tokenreduce_strategies() -> list[type[Strategy] | type[VisionStrategy]]:
    """Our strategies, as a plugin names them."""
    return [
        *(SimilarityMerge, ImportancePrune, FastV, StreamingWindow, RandomPrune, UniformFrames),
        *(FrameReuse, PatchMerge),
    ]
