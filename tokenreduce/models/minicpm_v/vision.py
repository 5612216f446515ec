"""The eyes of MiniCPM-V 2.6: SigLIP for pictures of any aspect ratio, and the resampler behind it.

Position tables are computed when needed and never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings, Idefics2VisionTransformer


def position_buckets(patches: int, table: int = 70) -> Tensor:
    """(patches,) long: row or column of the position table for each patch along a side, on the CPU.

    In exact arithmetic floor(table · i / patches). The checkpoint was trained with a float32 step, which differs at 25,
    49, 50, 55 and 58 patches.
    """
    step = float(torch.tensor(1.0, device="cpu") / patches)
    fractions = torch.arange(0, 1 - 1e-6, step, device="cpu")
    return torch.bucketize(fractions, torch.arange(1 / table, 1.0, 1 / table, device="cpu"), right=True)


def sincos_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """(rows · columns, width) float32: sine and cosine of the column, then of the row, a quarter of `width` each."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32, device=device) / (width / 4))

    def along(places: int) -> Tensor:
        angle = torch.arange(places, dtype=torch.float32, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    x, y = along(columns), along(rows)
    return torch.cat([x.repeat(rows, 1), y.repeat_interleave(columns, 0)], dim=1)


class NavitEmbeddings(Idefics2VisionEmbeddings):  # type: ignore[misc]
    """Patch and position embeddings for pictures of one grid, with the buckets of `position_buckets`."""

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        """(n, 3, rows · patch, columns · patch) to (n, rows · columns, D). The mask is all True and not read."""
        patches = self.patch_embedding(pixel_values)
        side = self.num_patches_per_side
        row, column = (position_buckets(n, side).to(patches.device) for n in patches.shape[-2:])
        position = (row[:, None] * side + column).flatten()
        return patches.flatten(2).transpose(1, 2) + self.position_embedding(position)  # type: ignore[no-any-return]


class NavitSiglip(Idefics2VisionTransformer):  # type: ignore[misc]
    """The vision tower; called once per grid, so that no picture is padded."""

    def __init__(self, config: Idefics2VisionConfig) -> None:
        super().__init__(config)
        self.embeddings = NavitEmbeddings(config)


class Resampler(nn.Module):
    """Cross-attention from learned queries to the patches of one picture, whatever their number."""

    def __init__(self, queries: int, width: int, vision_width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(n, rows · columns, vision width) to (n, queries, width)."""
        value = self.ln_kv(self.kv_proj(x))
        key = value + sincos_positions(rows, columns, value.shape[-1], value.device).to(value.dtype)
        query = self.ln_q(self.query).expand(len(x), -1, -1)
        out = self.attn(query, key, value, need_weights=False)[0]
        return self.ln_post(out) @ self.proj  # type: ignore[no-any-return]
