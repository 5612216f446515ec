"""Pretended GPUs: tensors that hold real CPU data and say that they are on `cuda:k`, and a machine that watches them.

What a GPU would refuse is refused (MixedDevicesError), and what would make the host wait, or copy, is recorded with its source
line. Times cannot be had here, and neither can what a real kernel does.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

SDPA = torch.nn.functional.scaled_dot_product_attention
WAIT = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "masked_select",
    "equal",
    "bincount",
    "is_nonzero",
    "_assert_scalar",
}
"""Operators whose result, or its shape, the host has to know: it waits for the device."""
INDEXING = {"index", "index_put", "_index_put_impl", "_unsafe_index"}
COPYING = {"_to_copy", "to", "copy", "_copy_from", "_copy_from_and_resize"}
OURS = ("/tokenreduce/", "/tokenreduce_adapters/")


class MixedDevicesError(RuntimeError):
    """Operands on different devices, as CUDA refuses them."""


@dataclass(frozen=True)
class Event:
    """Something that stops the host, or a copy between devices."""

    kind: str
    """`sync`, `H2D` (a pageable copy to a GPU) or `P2P` (from one GPU to another)."""
    what: str
    """The operator, and the shape of what is copied."""
    where: str
    """Innermost line of tokenreduce, else of whoever is not torch: file:line function."""


@dataclass(frozen=True)
class SdpaCall:
    """The arguments of one call of scaled_dot_product_attention."""

    query: tuple[int, ...]
    """(B, H, q, d)."""
    key: tuple[int, ...]
    """(B, G, k, d)."""
    mask: torch.dtype | None
    """Type of its mask, None without one."""
    causal: bool
    """`is_causal`."""
    gqa: bool
    """`enable_gqa`."""
    dense_last: bool
    """Whether the last stride of query, key and value is 1, as flash attention needs it."""
    where: str
    """As Event.where."""


class FakeTensor(Tensor):
    """A tensor whose data are in `inner`, a CPU tensor, and whose device says otherwise."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: Any) -> FakeTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(device),
            requires_grad=False,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, machine = kwargs or {}, Machine.now
        if machine is not None and func is SDPA:
            return machine.sdpa(*args, **kwargs)
        if machine is not None and func is Tensor.tolist:
            machine.note("sync", "tolist")
            return args[0].inner.tolist()
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda device type tensor to numpy")
        if func is Tensor.__repr__:
            return f"FakeTensor({args[0].inner!r}, {args[0].device})"
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Machine.now is None:
            raise RuntimeError(f"{func} of a pretended GPU, outside of its machine")
        return Machine.now.run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"FakeTensor({tuple(self.shape)}, {self.device})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(torch.tensor(index).to(self.device) if isinstance(index, list) else index)

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


def each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of everything in lists, tuples and dicts. (torch's own tree_map took most of the harness's time.)"""
    if isinstance(value, (list, tuple)):
        return type(value)([each(change, x) for x in value])
    return {k: each(change, x) for k, x in value.items()} if isinstance(value, dict) else change(value)


def inner(value: Any) -> Any:
    """`value`, with the CPU's tensor for every pretended one in it."""
    return each(lambda x: x.inner if isinstance(x, FakeTensor) else x, value)


def on(value: Any, device: int = 0) -> Any:
    """`value`, with a tensor of GPU `device` for every CPU tensor in it."""
    return each(lambda x: FakeTensor(x, f"cuda:{device}") if isinstance(x, Tensor) else x, value)


class Machine(TorchDispatchMode):
    """Every operator goes by here while the machine is on (`with Machine() as machine`).

    events: what stopped the host, in order. attention: the SDPA calls. operators: how often each ran on a pretended GPU.
    """

    now: ClassVar[Machine | None] = None
    """The machine that is on."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.attention: list[SdpaCall] = []
        self.operators: collections.Counter[str] = collections.Counter()
        self._quiet = False
        self._were: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        Machine.now = self
        self._replace(torch.cuda, "_lazy_init", lambda: None)  # Factories ask for it before they are dispatched.
        self._replace(torch.cuda, "current_device", lambda: 0)
        for name in ("tensor", "as_tensor"):
            self._replace(torch, name, _making(getattr(torch, name)))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        Machine.now = None
        for owner, name, value in self._were:
            setattr(owner, name, value)
        self._were.clear()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._were.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    # What is noted ------------------------------------------------------------------------------------------------------

    def count(self, kind: str = "sync") -> int:
        """Events of `kind` so far."""
        return sum(event.kind == kind for event in self.events)

    def clear(self) -> None:
        """Forget what was noted."""
        self.events.clear()
        self.attention.clear()
        self.operators.clear()

    def table(self, kind: str = "sync") -> str:
        """The events of `kind` and their lines, the most frequent first: what a failing test shows."""
        counted = collections.Counter((e.what, e.where) for e in self.events if e.kind == kind)
        return "\n".join(f"{count:5d} {what}  {where}" for (what, where), count in counted.most_common())

    def note(self, kind: str, what: str) -> None:
        """Record an event of the line that runs."""
        if not self._quiet:
            self.events.append(Event(kind, what, _where()))

    # What runs ----------------------------------------------------------------------------------------------------------

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's. Its operators are not counted: on a GPU it is one kernel."""
        given = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
        if len({t.device for t in given}) > 1:
            raise MixedDevicesError(f"sdpa: operands on {sorted({str(t.device) for t in given})} at {_where()}")
        mask = None if attn_mask is None else attn_mask.dtype
        dense = {t.stride(-1) for t in (query, key, value)} == {1}
        shapes = tuple(query.shape), tuple(key.shape)
        self.attention.append(SdpaCall(*shapes, mask, is_causal, enable_gqa, dense, _where()))
        self.operators["sdpa"] += 1
        plain = [inner(t) for t in (query, key, value)]
        with torch._C.DisableTorchFunctionSubclass(), _disable_current_modes():
            out = SDPA(
                *plain,
                attn_mask=inner(attn_mask),
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        return FakeTensor(out, query.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operator."""
        tensors = _tensors((args, kwargs))
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not fakes and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1].rstrip("_")
        target = wanted or fakes[0].device
        if name in COPYING:
            source, target = (args[1].device, args[0].device) if name == "copy" else (args[0].device, target)
            self._note_copy(name, args[0], source, target)
        else:
            self._check(name, tensors, fakes, args)
            self._note_wait(func, name, args, kwargs)
        self.operators[name] += 1
        plain = inner(kwargs)
        if wanted is not None:
            plain["device"] = torch.device("cpu")
        if "pin_memory" in plain:
            plain["pin_memory"] = False
        out = func(*inner(args), **plain)
        if target.type == "cpu":
            own = name in COPYING and any(out is fake.inner for fake in fakes)
            return out.clone() if own else out
        known = {id(fake.inner): fake for fake in fakes}  # What an operator in place gives back is what it was given.

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
                return value
            return known[id(value)] if id(value) in known else FakeTensor(value, target)

        return each(wrap, out)

    def _note_copy(self, name: str, what: Tensor, source: torch.device, target: torch.device) -> None:
        if source == target or not what.numel():
            return
        if target.type == "cpu":
            self.note("sync", f"{name} to the host {tuple(what.shape)}")
        else:
            self.note("H2D" if source.type == "cpu" else "P2P", f"{name} {tuple(what.shape)}")

    def _check(self, name: str, tensors: Sequence[Tensor], fakes: Sequence[Tensor], args: Any) -> None:
        devices = sorted({str(t.device) for t in fakes})
        if len(devices) > 1:
            raise MixedDevicesError(f"{name}: operands on {devices} at {_where()}")
        if not fakes or name == "lift_fresh":
            return
        indices = _tensors(args[1]) if name in INDEXING else []
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                continue
            if any(tensor is index for index in indices):
                self.note("H2D", f"{name} by an index on the CPU {tuple(tensor.shape)}")
            elif tensor.dim():
                raise MixedDevicesError(f"{name}: a CPU tensor {tuple(tensor.shape)} beside {devices} at {_where()}")

    def _note_wait(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        masks = name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        if name == "repeat_interleave" and func._overloadname != "self_int":
            waits = kwargs.get("output_size") is None
        else:
            waits = name in WAIT
        if waits:
            self.note("sync", name)
        elif masks and (name in ("index", "_unsafe_index") or args[2].numel() != 1):
            self.note("sync", f"{name} by a mask")


def _making(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor`, for lists of pretended tensors, and for devices that torch itself would look for."""

    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, (list, tuple)):
            data = each(lambda x: x.item() if isinstance(x, FakeTensor) else x, data)
        made = data if isinstance(data, Tensor) else maker(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return make


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(lambda x: found.append(x) if isinstance(x, Tensor) else None, value)
    return found


def _where() -> str:
    frame, nearest = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        line = f"{'/'.join(file.split('/')[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
        if any(part in file for part in OURS):
            return line
        if not nearest and "/fakecuda/" not in file and "/torch/" not in file:
            nearest = line
        frame = frame.f_back  # type: ignore[assignment]
    return nearest
