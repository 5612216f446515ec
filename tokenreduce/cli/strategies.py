"""`tokenreduce strategies`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli._output import print_json, print_table

if TYPE_CHECKING:
    from tokenreduce.strategy import Capabilities


def strategies_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the strategies a pipeline may name, and their packages.

    \b
    Example:
      tokenreduce strategies --json
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
    if as_json:
        print_json(found)
        return
    columns = ("name", "description", "sites", "capabilities", "origin")
    print_table(columns, [[_cell(entry[column]) for column in columns] for entry in found])


def _flags(capabilities: Capabilities) -> list[str]:
    """Names of what is true, without the sites."""
    return [name for name, value in vars(capabilities).items() if value is True]


def _cell(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "-"
