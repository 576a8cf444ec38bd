"""In which form do weights change? In place, or beside the base as an adapter. One file per form."""

from selectune.adapters.form import Form, load_specialist, side_by_side

__all__ = ["Form", "load_specialist", "side_by_side"]
