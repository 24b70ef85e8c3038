"""Which layers are adapted, and how adapters are mounted on a shared frozen model for a while."""

from fedpeft.mounting.deltas import Total, mounted_deltas, summed
from fedpeft.mounting.layers import (
    Targets,
    dense_layer,
    dense_shape,
    describe,
    oriented,
    select,
)
from fedpeft.mounting.mount import (
    bottlenecks,
    check_alone,
    check_dtypes,
    detached,
    mounted,
    only_clients,
    overridden,
    plain_parameters,
    replaced,
    shifted,
    specs,
    standing_in,
    trainable,
)
from fedpeft.mounting.packed import BLOCK, Packed, PackedLinear, packed_layers, unpack_layers
from fedpeft.mounting.precision import cast_once, keep_matrices_in
from fedpeft.mounting.rows import Copies, mounting_for_copies, row_owners
from fedpeft.mounting.tracing import Trace, changes, touched, trace
from fedpeft.mounting.twins import check_shapes, twin_of

__all__ = [
    "BLOCK",
    "Copies",
    "Packed",
    "PackedLinear",
    "Targets",
    "Total",
    "Trace",
    "bottlenecks",
    "cast_once",
    "changes",
    "check_alone",
    "check_dtypes",
    "check_shapes",
    "dense_layer",
    "dense_shape",
    "describe",
    "detached",
    "keep_matrices_in",
    "mounted",
    "mounted_deltas",
    "mounting_for_copies",
    "only_clients",
    "oriented",
    "overridden",
    "packed_layers",
    "plain_parameters",
    "replaced",
    "row_owners",
    "select",
    "shifted",
    "specs",
    "standing_in",
    "summed",
    "touched",
    "trace",
    "trainable",
    "twin_of",
    "unpack_layers",
]
