"""Which layers are adapted, and how adapters are mounted on a shared frozen model for a while."""

from fedpeft.mounting.deltas import mounted_deltas
from fedpeft.mounting.layers import Targets, dense_layer, describe, oriented, select
from fedpeft.mounting.mount import (
    check_dtypes,
    detached,
    mounted,
    overridden,
    plain_parameters,
    replaced,
    specs,
    trainable,
)
from fedpeft.mounting.precision import cast_once, keep_matrices_in
from fedpeft.mounting.rows import row_owners
from fedpeft.mounting.tracing import Trace, changes, touched, trace

__all__ = [
    "Targets",
    "Trace",
    "cast_once",
    "changes",
    "check_dtypes",
    "dense_layer",
    "describe",
    "detached",
    "keep_matrices_in",
    "mounted",
    "mounted_deltas",
    "oriented",
    "overridden",
    "plain_parameters",
    "replaced",
    "row_owners",
    "select",
    "specs",
    "touched",
    "trace",
    "trainable",
]
