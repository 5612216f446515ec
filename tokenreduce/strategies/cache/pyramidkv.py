"""PyramidKV: SnapKV with more room in early layers and less in late ones.

Paper: Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (2024), §3.2; β = 20.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.amounts import Keep
from tokenreduce.strategies.cache.snapkv import SnapConfig, SnapKV
from tokenreduce.strategy import Site


class PyramidKV(SnapKV):
    """Counts fall linearly from layer to layer and average `keep`; scores are SnapKV's.

    As in kvpress: where the least layer would hold less than the window, all layers hold alike, and a decoder of one layer gets
    the largest count.
    """

    name = "pyramidkv"

    class Config(SnapConfig):
        """Fields of a pyramidkv stage."""

        strategy: Literal["pyramidkv"] = "pyramidkv"
        beta: float = Field(20, gt=0, description="β: steepness; the last layer's share is about 1/β of the mean.")
        keep: Keep = Field(description="How many tokens a KV head holds, as a mean over layers.")

    config: Config  # type: ignore[assignment]

    def count_at(self, site: Site, depth: int, original: int) -> int | None:
        """The layer's count."""
        mean = super().count_at(site, depth, original)
        share = self.share_at(site, depth)
        if mean is None:
            return None
        window = self.config.window
        left = float(share) * original if share is not None else float(mean)
        low = left / self.config.beta
        high = 2 * left - low
        if high >= original - window:
            high = original - window
            low = 2 * left - high
        if not original >= high >= low >= window:
            return max(1, round(left))
        if depth == 1:
            return round(high)
        return round(high - site.layer * (high - low) / (depth - 1))
