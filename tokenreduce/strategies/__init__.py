"""The strategies that come with tokenreduce, one per file, registered like a third party's."""

from __future__ import annotations

from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategies.fastv import FastV
from tokenreduce.strategies.importance_prune import ImportancePrune
from tokenreduce.strategies.random import RandomPrune
from tokenreduce.strategies.similarity_merge import SimilarityMerge
from tokenreduce.strategies.streaming_window import StreamingWindow
from tokenreduce.strategies.uniform_frames import UniformFrames
from tokenreduce.strategy import Strategy


@hookimpl
def tokenreduce_strategies() -> list[type[Strategy]]:
    """Our strategies, as a plugin names them."""
    return [SimilarityMerge, ImportancePrune, FastV, StreamingWindow, RandomPrune, UniformFrames]
