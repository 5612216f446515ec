"""The strategies that come with tokenreduce, one per file, registered like a third party's."""

from __future__ import annotations

from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategies.fastv import FastV
from tokenreduce.strategies.frame_reuse import FrameReuse
from tokenreduce.strategies.importance_prune import ImportancePrune
from tokenreduce.strategies.patch_merge import PatchMerge
from tokenreduce.strategies.random import RandomPrune
from tokenreduce.strategies.similarity_merge import SimilarityMerge
from tokenreduce.strategies.streaming_window import StreamingWindow
from tokenreduce.strategies.uniform_frames import UniformFrames
from tokenreduce.strategy import Strategy
from tokenreduce.vision import VisionStrategy


@hookimpl
def tokenreduce_strategies() -> list[type[Strategy] | type[VisionStrategy]]:
    """Our strategies, as a plugin names them."""
    return [
        *(SimilarityMerge, ImportancePrune, FastV, StreamingWindow, RandomPrune, UniformFrames),
        *(FrameReuse, PatchMerge),
    ]
