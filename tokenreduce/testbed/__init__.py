"""The embedded model, the needle-in-a-video generator and its haystacks (after VideoNIAH/VNBench)."""

from tokenreduce.testbed.clips import Haystack, clip_paths, demo_clip
from tokenreduce.testbed.embedded import EMBEDDED, load_embedded
from tokenreduce.testbed.needle import Example, NeedleSpec, NeedleTask
from tokenreduce.testbed.questions import Question, Tile

__all__ = [
    "EMBEDDED",
    "Example",
    "Haystack",
    "NeedleSpec",
    "NeedleTask",
    "Question",
    "Tile",
    "clip_paths",
    "demo_clip",
    "load_embedded",
]
