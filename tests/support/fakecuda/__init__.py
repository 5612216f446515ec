"""A GPU that is not there: the tests hold what the engine does on one, or on several, without having any.

`machine` has tensors that hold CPU data and claim to be on `cuda:k`, and watches what is done with them; `placing` puts
models there as accelerate does; `guard` compiles the three lines of C++ that torch needs for it.
"""

from support.fakecuda.guard import missing
from support.fakecuda.machine import Event, FakeTensor, Machine, MixedDevicesError, SdpaCall, inner, on
from support.fakecuda.placing import place, seam

__all__ = [
    "Event",
    "FakeTensor",
    "Machine",
    "MixedDevicesError",
    "SdpaCall",
    "inner",
    "missing",
    "on",
    "place",
    "seam",
]
