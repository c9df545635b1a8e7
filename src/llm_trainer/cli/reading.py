"""Options of commands that read data files: the names of schemas, columns and roles."""

from typing import Annotated, Any

import typer

SchemaOption = Annotated[str | None, typer.Option(help="the rows' schema, instead of detecting it")]
ColumnOption = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="a column's name here and in the file: prompt=query")
]
RoleOption = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="a role's name here and in the file: user=customer")
]


def reading_options(schema: str | None, columns: list[str] | None, roles: list[str] | None) -> dict[str, Any]:
    """What the command line says of the rows, as options of `Reading`."""
    words: dict[str, list[str]] = {}
    for ours, theirs in _pairs(roles, "--role"):
        words.setdefault(ours, []).append(theirs)
    return {"schema": schema, "columns": dict(_pairs(columns, "--column")) or None, "roles": words or None}


def _pairs(given: list[str] | None, option: str) -> list[tuple[str, str]]:
    found = []
    for text in given or []:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise typer.BadParameter(f"got {text!r}, expected OURS=THEIRS, such as prompt=query", param_hint=option)
        found.append((ours.strip(), theirs.strip()))
    return found
