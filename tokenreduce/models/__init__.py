"""Native models, their checkpoints, and their inputs.

`checkpoint` and `tokenizer` read a folder strictly, `request` is the question that a family is handed, `family` is what
a family must answer, `llava_video/` and `minicpm_v/` answer it, and `loading` and `processing` above them choose who is
asked. A user calls `load_model` and `prepare`; a family imports nothing above itself. testbed and compare call this
package, and it knows neither.
"""

from tokenreduce.models.checkpoint import LoadOptions, load_strict
from tokenreduce.models.family import Family
from tokenreduce.models.loading import families, family_of, load_model
from tokenreduce.models.processing import look, prepare
from tokenreduce.models.request import VideoQuestion

__all__ = [
    "Family",
    "LoadOptions",
    "VideoQuestion",
    "families",
    "family_of",
    "load_model",
    "load_strict",
    "look",
    "prepare",
]
