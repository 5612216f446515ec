"""`tokenreduce doctor`"""

from __future__ import annotations

import os
import platform
import warnings
from importlib import metadata
from typing import Annotated, Any

import typer

from tokenreduce.cli._output import print_json, print_prose

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "pydantic", "pluggy", "numpy", "av", "pillow")
"""Packages whose versions decide what happens."""
EXTRAS = {"ray": "ray", "datasets": "datasets", "parquet": "pyarrow", "gpu": "triton"}
"""The package that each optional extra brings."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that change what happens, beside our own."""


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what is installed here and what works: text to paste into a report.

    It names versions, devices, extras, plugins, and why something of a plugin is left out. It sends nothing anywhere, and
    holds no paths and no names of users or machines.

    \b
    Example:
      tokenreduce doctor
    """
    found = examine()
    if as_json:
        print_json(found)
        return
    print_prose(f"tokenreduce {found['tokenreduce']}, Python {found['python']}, {found['system']}", indent="  ")
    print_prose(", ".join(f"{name} {version}" for name, version in found["libraries"].items()), indent="  ")
    for device in found["devices"]:
        print_prose(f"device {device['name']}: {device['what']}", indent="  ")
    for extra, version in found["extras"].items():
        print_prose(f"extra {extra}: {version or 'not installed; pip install '}" + ("" if version else _hint(extra)))
    for plugin in found["plugins"]:
        print_prose(
            f"plugin {plugin['origin']} {plugin['version']}: {plugin['offers'] or 'offers nothing'}", indent="  "
        )
    if not found["plugins"]:
        print("plugins: none but our own")
    for what, why in found["left_out"].items():
        print_prose(f"left out {what}: {why}", indent="  ")
    for name, value in found["environment"].items():
        print_prose(f"{name}={value}", indent="  ")


def examine() -> dict[str, Any]:
    """What `doctor` says, as plain data."""
    from tokenreduce import __version__

    plugins, left_out = _plugins()
    return {
        "tokenreduce": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": {name: _version(name) or "missing" for name in LIBRARIES},
        "devices": _devices(),
        "extras": {extra: _version(package) for extra, package in EXTRAS.items()},
        "plugins": plugins,
        "left_out": left_out,
        "environment": {k: v for k, v in os.environ.items() if k in VARIABLES or k.startswith("TOKENREDUCE_")},
    }


def _devices() -> list[dict[str, str]]:
    import torch

    from tokenreduce.models.placement import best_device, device_name

    flags = [flag for flag in ("avx2", "avx512", "amx") if flag in torch.backends.cpu.get_cpu_capability().lower()]
    cpu = ", ".join([f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads of torch", *flags])
    devices = [{"name": "cpu", "what": cpu}]
    best = best_device()
    if best.type == "cpu":
        build = torch.version.cuda or torch.version.hip  # type: ignore[attr-defined]
        reason = f"torch {torch.__version__} is built for {build}, and finds none" if build else "a CPU build of torch"
        return [*devices, {"name": "accelerator", "what": f"none: {reason}"}]
    for index in range(torch.accelerator.device_count()):
        name = f"{best.type}:{index}"
        what = device_name(name)
        if best.type == "cuda":
            facts = torch.cuda.get_device_properties(index)
            what += f", {facts.total_memory / 2**30:.1f} GiB, capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
        devices.append({"name": name, "what": what})
    return devices


def _plugins() -> tuple[list[dict[str, str]], dict[str, str]]:
    """Packages of others with what they offer, and why something is left out."""
    from tokenreduce import plugins
    from tokenreduce.hookspecs import PROJECT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", plugins.PluginWarning)  # They are in the text.
        offered: dict[str, dict[str, plugins.Offer[Any]]] = {
            "strategies": plugins.offered_strategies(),
            "adapters": plugins.offered_adapters(),
            "presets": plugins.offered_presets(),
        }
        manager = plugins.manager()
    origins = {name.partition(":")[0] for name, _ in manager.list_name_plugin()} - {PROJECT}
    found = []
    for origin in sorted(origins):
        offers = [
            f"{kind} {', '.join(names)}"
            for kind, all_offers in offered.items()
            if (names := [name for name, offer in all_offers.items() if offer.origin == origin])
        ]
        found.append({"origin": origin, "version": _version(origin) or "", "offers": "; ".join(offers)})
    return found, dict(manager.left_out)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hint(extra: str) -> str:
    return f"'.[{extra}]' in a checkout"
