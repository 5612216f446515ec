"""PyramidDrop: the last token of the question decides, layer by layer, which vision tokens go on.

Paper: Xing et al., PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction (CVPR
2025), §3.2; a half, a quarter and an eighth after layers 8, 16 and 24 of 32.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.amounts import Keep, Layer
from tokenreduce.strategies.prune.importance_prune import Importance, ImportanceConfig, ImportancePrune
from tokenreduce.strategy import Capabilities


class PyramidDrop(ImportancePrune):
    """Before each layer of `at`, keep the vision tokens of highest attention from the last row; shares are of the original count.

    The attention is that of the layer before; the public code takes queries and keys from the layer to come. It numbers positions
    anew (`positions: contiguous`), raises on grouped queries and silently cuts long sequences.
    """

    name = "pyramid_drop"
    capabilities = Capabilities(sites=("pre_attention",), attention=True, chooses_count=True)

    class Config(ImportanceConfig):
        """Fields of a pyramid_drop stage."""

        strategy: Literal["pyramid_drop"] = "pyramid_drop"
        at: Layer | list[Layer] = Field(  # type: ignore[assignment]
            [0.25, 0.5, 0.75], description="Layers before which tokens go."
        )
        importance: Importance = Field("last", description="Queries that count.")
        keep: Keep | list[Keep] | None = Field(  # type: ignore[assignment]
            [0.5, 0.25, 0.125], description="Shares of the original vision tokens; null: solved from the budget."
        )
