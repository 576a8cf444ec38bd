"""The commands on recipes: ``selectune init`` and ``selectune recipe``.

Knows: their options. Does not know: a recipe's keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectune.errors import UserError


def init(
    file: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    train: Annotated[str | None, typer.Option(help="Training data to put into it.")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite an existing file.")] = False,
) -> None:
    """Write a recipe with every key, its meaning and its default."""
    from selectune import recipe

    if file.exists() and not force:
        raise UserError("is there already", file=file, mend="name another file, or add --force")
    try:
        file.write_text(recipe.commented(**({"data": {"train": train}} if train else {})), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=file) from None
    typer.echo(f"Wrote {file}. Run it with: selectune specialize --recipe {file}")


def recipe_command(
    file: Annotated[Path | None, typer.Argument(help="A recipe to check and print in full.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Check a recipe, or print the schema of recipes."""
    from selectune import recipe

    if schema:
        typer.echo(recipe.schema())
    elif file is not None:
        typer.echo(recipe.dump(recipe.load(file)), nl=False)
    else:
        typer.echo(recipe.commented(), nl=False)
