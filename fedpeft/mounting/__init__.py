"""Which layers are adapted, and how adapters are mounted on a shared frozen model for a while."""

from fedpeft.mounting.deltas import mounted_deltas
from fedpeft.mounting.layers import (
    Targets,
    dense_layer,
    dense_shape,
    describe,
    oriented,
    select,
)
from fedpeft.mounting.mount import (
    check_dtypes,
    detached,
    mounted,
    overridden,
    plain_parameters,
    replaced,
    shifted,
    specs,
    trainable,
)
from fedpeft.mounting.packed import BLOCK, Packed, PackedLinear, packed_layers, unpack_layers
from fedpeft.mounting.precision import cast_once, keep_matrices_in
from fedpeft.mounting.rows import row_owners
from fedpeft.mounting.tracing import Trace, changes, touched, trace

__all__ = [
    "BLOCK",
    "Packed",
    "PackedLinear",
    "Targets",
    "Trace",
    "cast_once",
    "changes",
    "check_dtypes",
    "dense_layer",
    "dense_shape",
    "describe",
    "detached",
    "keep_matrices_in",
    "mounted",
    "mounted_deltas",
    "oriented",
    "overridden",
    "packed_layers",
    "plain_parameters",
    "replaced",
    "row_owners",
    "select",
    "shifted",
    "specs",
    "touched",
    "trace",
    "trainable",
    "unpack_layers",
]
