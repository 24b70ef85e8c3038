"""Which layers are adapted, and how adapters are mounted on a shared frozen model for the length of a ``with``."""

from fedpeft.mounting.layers import dense_layer, describe, oriented, select
from fedpeft.mounting.mount import forms, mounted, replaced, trainable, values
from fedpeft.mounting.rows import rows_of

__all__ = [
    "dense_layer",
    "describe",
    "forms",
    "mounted",
    "oriented",
    "replaced",
    "rows_of",
    "select",
    "trainable",
    "values",
]
