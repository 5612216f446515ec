"""A model small enough for one core, and a task it can do: numbered tiles hidden in real videos.

`embedded` loads the model from `weights/`, `clips`, `glyphs`, `questions` and `needle` make examples from a seed. A
user, compare and the command line call it; it stands on models and media, and knows nothing of strategies. How the
model was trained is in `lab/training`.
"""

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
