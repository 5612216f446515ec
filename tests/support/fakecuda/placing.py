"""Models on pretended GPUs, laid out as accelerate does it with a device map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from support.fakecuda.machine import FakeTensor
from torch import Tensor, nn

Places = Mapping[str, int]
"""Prefix of a module's name, and its GPU; the longest prefix counts, the empty one is everything else's."""


def place(model: nn.Module, places: Places) -> Any:
    """Put `model` onto the GPUs of `places`, in place. On several, every module gets accelerate's move of its inputs."""
    shared: dict[nn.Parameter, nn.Parameter] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            for tables in (module._parameters, module._buffers):
                for own, value in list(tables.items()):
                    if value is None or isinstance(value, FakeTensor):
                        continue
                    device = f"cuda:{gpu(f'{name}.{own}' if name else own, places)}"
                    if isinstance(value, nn.Parameter):
                        made = nn.Parameter(FakeTensor(value.data, device), requires_grad=False)
                        tables[own] = shared.setdefault(value, made)  # Tied weights stay tied.
                    else:
                        tables[own] = FakeTensor(value, device)
            if isinstance(getattr(module, "original_inv_freq", None), Tensor):
                module.original_inv_freq = module._buffers["inv_freq"]  # type: ignore[assignment]
    if len(set(places.values())) > 1:
        for name, module in model.named_modules():
            if name and module.state_dict():
                module.forward = _Aligned(module.forward, torch.device("cuda", gpu(name, places)))
    return model


def gpu(name: str, places: Places) -> int:
    """The GPU of what is called `name`."""
    return places[max((p for p in places if p == "" or name == p or name.startswith(f"{p}.")), key=len)]


class _Aligned:
    """A forward of a module in a device map (accelerate's AlignDevicesHook): its inputs are moved to its device."""

    def __init__(self, forward: Any, device: torch.device) -> None:
        self.__wrapped__ = self.forward = forward
        self.device = device

    def move(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.device == self.device else value.to(self.device)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.move, value))
        if isinstance(value, dict):
            return type(value)({k: v if k == "past_key_values" else self.move(v) for k, v in value.items()})
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*self.move(args), **self.move(kwargs))


def seam(model: nn.Module, decoder: nn.Module, first: int, tower: int = 0) -> dict[str, int]:
    """Places with the decoder's layers from `first` on, its norm and the head on GPU 1, and the rest of it on GPU 0.

    tower: the GPU of everything outside the decoder.
    """
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    places = {"": tower, prefix: 0}
    for number in range(first, len(decoder.layers)):  # type: ignore[arg-type]
        places[f"{prefix}.layers.{number}"] = 1
    places |= {f"{prefix}.norm": 1}
    if hasattr(model, "lm_head"):  # Tied weights lie together, as accelerate puts them.
        tied = model.lm_head.weight is decoder.embed_tokens.weight  # type: ignore[union-attr]
        places["lm_head"] = 0 if tied else 1
    return places
