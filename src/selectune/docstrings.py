"""What is written below the attributes of a class.

Knows: where in a class's source its attributes' docstrings are, and that a class inherits them. Read only when somebody asks: pydantic's own
``use_attribute_docstrings`` reads the source of every class as it is made, which took half of the time in which all methods load.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise


@cache
def of_attributes(kind: type) -> dict[str, str]:
    """Return the docstrings of a class's attributes by name; where a class says nothing of one, those of the class before."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if "__annotations__" not in vars(each):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except (OSError, TypeError):  # the source is not there
            continue
        assert isinstance(tree, ast.ClassDef)
        for attribute, said in pairwise(tree.body):
            match attribute, said:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as words)):
                    found[name] = inspect.cleandoc(words)
    return found
