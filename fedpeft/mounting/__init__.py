"""Which layers are adapted, and how adapters are mounted on a shared frozen model for the length of a ``with``."""

from fedpeft.mounting.casts import cast_once
from fedpeft.mounting.layers import Targets, dense_layer, describe, oriented, select
from fedpeft.mounting.mount import forms, mounted, replaced, touched, trainable, values
from fedpeft.mounting.rows import rows_of

__all__ = [
    "Targets",
    "cast_once",
    "dense_layer",
    "describe",
    "forms",
    "mounted",
    "oriented",
    "replaced",
    "rows_of",
    "select",
    "touched",
    "trainable",
    "values",
]
