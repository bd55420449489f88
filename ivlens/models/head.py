"""A head: a place in a model."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Head"]


class Head(NamedTuple):
    """An attention head.

    Attributes
    ----------
    layer, head
        Its place, both counted from 0.

    Examples
    --------
    >>> str(Head(20, 5))
    'L20H5'
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    __repr__ = __str__
