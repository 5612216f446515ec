"""Options that say where a model is put and how it is loaded, the same for every command that loads one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps or xpu. Default: the accelerator if there is one.", show_default=False),
]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (the checkpoint's), bfloat16, float16, float32.")]
Attention = Annotated[
    str | None,
    typer.Option("--attn", help="sdpa, eager, flash_attention_2 … Default: transformers' choice.", show_default=False),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto spreads a model over all devices; not with --device.", show_default=False)
]


def loading_of(device: str | None, dtype: str, attn: str | None, device_map: str | None) -> dict[str, Any]:
    """Keyword arguments of `load_model`, checked before anything is loaded."""
    from tokenreduce.errors import TokenReduceError
    from tokenreduce.models.placement import parse_device, parse_dtype

    if device is not None and device_map is not None:
        raise TokenReduceError(f"--device {device} and --device-map {device_map}: give one of the two")
    given = {
        "device": None if device is None else str(parse_device(device)),
        "dtype": parse_dtype(dtype),
        "attn_implementation": attn,
        "device_map": device_map,
    }
    return {name: value for name, value in given.items() if value is not None}
