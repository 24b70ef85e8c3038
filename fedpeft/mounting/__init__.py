"""Which layers are adapted, and how adapters are mounted on a shared frozen model for the length of a ``with``."""

from fedpeft.mounting.layers import dense_layer, describe, oriented, select
from fedpeft.mounting.mount import mounted, replaced, shapes, trainable, values
from fedpeft.mounting.rows import rows_of

__all__ = [
    "dense_layer",
    "describe",
    "mounted",
    "oriented",
    "replaced",
    "rows_of",
    "select",
    "shapes",
    "trainable",
    "values",
]
