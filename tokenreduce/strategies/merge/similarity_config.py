"""The fields of a similarity_merge stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tokenreduce.reduction import Weighting
from tokenreduce.strategy import Keep, StageConfig


class SimilarityConfig(StageConfig):
    """Fields of a similarity_merge stage."""

    strategy: Literal["similarity_merge"] = "similarity_merge"
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Least cosine for a merge (S_threshold). Left out: as many as the budget asks.",
    )
    stop_below: float = Field(
        0.1, ge=0, le=1, description="Merging ends where the share of similar tokens falls below it (N_threshold)."
    )
    merge_below: bool = Field(
        False,
        description="Whether the similar tokens of that last look are still merged, as the released code does.",
    )
    weighting: Weighting = Field(
        "size", description="Mean by how many originals a token stands for, or plain as in the released code."
    )
    max_run: int | None = Field(
        None, ge=2, description="With a threshold: runs begin anew at frames whose number is a multiple of this."
    )
    keep: Keep | list[Keep] | None = Field(
        None, description="Without a threshold: share of the original vision tokens that remains."
    )

    @model_validator(mode="after")
    def _runs_by_threshold(self) -> SimilarityConfig:
        if self.max_run is not None and self.threshold is None:
            raise ValueError("`max_run` goes with `threshold`")
        return self
