"""Which layers are adapted, and how adapters are mounted on a shared frozen model for the length of a ``with``."""

from fedpeft.mounting.deltas import mounted_deltas
from fedpeft.mounting.layers import Targets, dense_layer, describe, oriented, select
from fedpeft.mounting.mount import forms, mounted, overridden, replaced, trainable, values
from fedpeft.mounting.precision import cast_once
from fedpeft.mounting.rows import rows_of
from fedpeft.mounting.tracing import Trace, changes, touched, trace

__all__ = [
    "Targets",
    "Trace",
    "cast_once",
    "changes",
    "dense_layer",
    "describe",
    "forms",
    "mounted",
    "mounted_deltas",
    "oriented",
    "overridden",
    "replaced",
    "rows_of",
    "select",
    "touched",
    "trace",
    "trainable",
    "values",
]
