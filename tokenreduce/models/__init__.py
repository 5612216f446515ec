"""Native models, their checkpoints, and their inputs."""

from tokenreduce.models.loading import Family, LoadOptions, families, family_of, load_model, load_strict
from tokenreduce.models.processing import VideoQuestion, prepare

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
