"""Native models, their checkpoints, and their inputs."""

from tokenreduce.models.checkpoint import LoadOptions, load_strict
from tokenreduce.models.family import Family
from tokenreduce.models.loading import families, family_of, load_model
from tokenreduce.models.processing import prepare
from tokenreduce.models.request import VideoQuestion

__all__ = [
    "Family",
    "LoadOptions",
    "VideoQuestion",
    "families",
    "family_of",
    "load_model",
    "load_strict",
    "prepare",
]
