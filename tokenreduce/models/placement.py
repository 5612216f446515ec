"""Where a model is put, in which dtype, and where its inputs go."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokenreduce.errors import TokenReduceError, nearest

KINDS = ("cuda", "mps", "xpu")
"""Accelerators that are taken without being asked for, if there is one."""
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
"""Names that `--dtype` knows."""


def best_device() -> torch.device:
    """The accelerator of this machine, or else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type not in KINDS else torch.device(found.type)


def parse_device(device: str | torch.device) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, `mps` or `xpu` as a device that is here. TokenReduceError where it is not."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        known = ("cpu", *KINDS)
        raise TokenReduceError(
            f"device {device!s:.40}: expected a kind of device, with a number where there are several, such as cuda:1"
            f"{nearest(str(device).partition(':')[0], known)}"
        ) from None
    if wanted.type in ("cpu", "meta"):
        return wanted
    best = best_device()
    if wanted.type != best.type:
        raise TokenReduceError(
            f"device {wanted}: not on this machine, which has {best}; leave --device out to use that"
        )
    count = torch.accelerator.device_count()
    if wanted.index is not None and wanted.index >= count:
        raise TokenReduceError(
            f"device {wanted}: this machine has {count} of them, {wanted.type}:0 to {wanted.type}:{count - 1}"
        )
    return wanted


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of this name; None for `auto`, the one that the checkpoint states. TokenReduceError for other names."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise TokenReduceError(f"dtype {name!r:.40}: not a dtype of weights{nearest(name, ('auto', *DTYPES))}")
    return DTYPES[name]


def input_device(model: nn.Module) -> torch.device:
    """Where `model` wants its inputs: the device of its embeddings, for offloaded ones where accelerate runs them."""
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model  # type: ignore[operator]
    for module in (table, model):
        device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device if not isinstance(device, int) else f"{best_device().type}:{device}")
    parameter: torch.nn.Parameter = next(table.parameters())
    return parameter.device


def describe(model: nn.Module) -> dict[str, Any]:
    """Where a model is: `devices`, `dtype` of its weights, and `attention` of its decoder; plain data for reports."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()} - {"meta"}) or [
        str(input_device(model))
    ]
    config: Any = model.config
    return {
        "devices": devices,
        "hardware": sorted({device_name(device) for device in devices}),
        "dtype": str(getattr(model, "dtype", torch.get_default_dtype())).removeprefix("torch."),
        "attention": str(config.get_text_config()._attn_implementation).removeprefix("tokenreduce_"),
    }


def device_name(device: str | torch.device) -> str:
    """What the maker calls it."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return "CPU" if device.type == "cpu" else device.type


def placement_line(model: nn.Module) -> str:
    """`describe` in words: `cuda:0 (NVIDIA H100), bfloat16, sdpa attention`."""
    where = describe(model)
    hardware = "" if where["hardware"] == ["CPU"] else f" ({', '.join(where['hardware'])})"
    return f"{', '.join(where['devices'])}{hardware}, {where['dtype']}, {where['attention']} attention"
