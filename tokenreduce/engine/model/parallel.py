"""Tensor parallelism: every rank holds some of the attention heads, and all must choose the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.strategy import Heads


def head_group(layer: nn.Module) -> Any:
    """The process group over which the attention of `layer` is sharded, None where it is not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor, Shard

    for module in layer.modules():
        if getattr(module, "layer_idx", None) is None:
            continue
        for parameter in module.parameters():
            if isinstance(parameter, DTensor) and any(isinstance(p, Shard) for p in parameter.placements):
                mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names or ()
                return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp") if "tp" in names else None
    return None


def total_heads(local: int, config: Any, group: Any) -> int:
    """Attention heads of all ranks, of which this one has `local`.

    Parameters that are only stored in shards (FSDP) are whole when they are used: then this rank has all heads.
    """
    return local if group is None else max(local, int(config.num_attention_heads))


def over_ranks(scores: Tensor, heads: Heads, share: float, group: Any) -> Tensor:
    """Mean or max over all heads from `scores`, which are those over this rank's `share` of them.

    Every rank gets the same bits, and so keeps the same tokens.
    """
    scores = scores * share if heads == "mean" else scores.clone()
    kind = torch.distributed.ReduceOp.SUM if heads == "mean" else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(scores, op=kind, group=group)
    return scores
