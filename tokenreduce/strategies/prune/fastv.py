"""FastV: after K layers, the half of the vision tokens that attention ignores is dropped.

Paper: Chen et al., An Image is Worth 1/2 Tokens After Layer 2 (2024), §4.1; defaults of its repository: K = 2.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.strategies.prune.importance_prune import Importance, ImportanceConfig, ImportancePrune
from tokenreduce.strategy import Capabilities, Layer


class FastV(ImportancePrune):
    """Before layer K (`at`), keep the vision tokens of highest attention in layer K − 1.

    The paper scores by attention from all tokens, its code by the last query's; `importance: last` is what has been measured
    under the name. `keep` = 1 − R; left out, it is solved from the budget: keep = (L·C − K)/(L − K) for vision-only shares.
    """

    name = "fastv"
    capabilities = Capabilities(sites=("pre_attention",), attention=True, chooses_count=True)

    class Config(ImportanceConfig):
        """Fields of a fastv stage."""

        strategy: Literal["fastv"] = "fastv"
        at: Layer | list[Layer] = Field(2, description="K: the first layer that sees the reduced tokens.")
        importance: Importance = Field("last", description="Queries that count; the published code takes the last one.")
