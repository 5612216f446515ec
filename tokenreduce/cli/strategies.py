"""`tokenreduce strategies`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli._output import print_json, print_table

if TYPE_CHECKING:
    from tokenreduce.strategy import Capabilities


def strategies_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Say which of them this model can run: a family, a checkpoint, or the path of a config.json."
        ),
    ] = None,
) -> None:
    """List the strategies a pipeline may name, and their packages.

    \b
    Examples:
      tokenreduce strategies --json
      tokenreduce strategies --model llava_onevision
    """
    from tokenreduce.pipeline import first_line
    from tokenreduce.plugins import offered_strategies

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "origin": offer.origin,
            "sites": list(offer.item.capabilities.sites),
            "capabilities": _flags(offer.item.capabilities),
            "description": first_line(offer.item),
        }
        for name, offer in offered_strategies().items()
    ]
    columns: tuple[str, ...] = ("name", "description", "sites", "capabilities", "origin")
    if model is not None:
        from tokenreduce.models.abilities import abilities

        reasons = abilities(model)
        for entry in found:
            entry["runs"], entry["why_not"] = not reasons[entry["name"]], reasons[entry["name"]]
        columns = ("name", "sites", "capabilities", model)
        for entry in found if not as_json else ():
            entry[model] = "yes" if entry["runs"] else f"no: {entry['why_not']}"
    if as_json:
        print_json(found)
        return
    print_table(columns, [[_cell(entry[column]) for column in columns] for entry in found])


def _flags(capabilities: Capabilities) -> list[str]:
    """Names of what is true, without the sites, and what it needs of the model."""
    flags = [name for name, value in vars(capabilities).items() if value is True or (name == "attention" and value)]
    return [*flags, *(f"needs {need}" for need in capabilities.needs)]


def _cell(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "-"
