"""What a method written outside this package may import; these names stay where they are.

The vocabulary (``types``), the errors, named randomness (``seeds``), what methods compute with
(``algebra``) and how they put adapters on a model (``mounting``). ``examples/head_only.py`` is a
whole method made of it, and CONTRIBUTING.md explains it.

>>> from fedpeft.method_kit import State, averaged
>>> import torch
>>> averaged(State(0, {"w": torch.ones(2)}), [], "examples").round
1
"""

from fedpeft.algebra.averaging import (
    Mean,
    MeanMerge,
    Weighting,
    averaged,
    mean,
    plain_mean,
)
from fedpeft.algebra.lowrank import LowRank, by_module, check_ranks, deltas, orthonormal, uniform
from fedpeft.algebra.masks import positions, scatter
from fedpeft.algebra.products import ProductMean, mean_products
from fedpeft.algebra.ranks import cut, share_of
from fedpeft.algebra.svd import Split, principal, thin_svd
from fedpeft.errors import BadInput, NotStackable, WireError
from fedpeft.mounting import (
    Targets,
    dense_layer,
    dense_shape,
    detached,
    mounted,
    mounted_deltas,
    oriented,
    replaced,
    select,
    specs,
    trainable,
)
from fedpeft.seeds import derive, generator
from fedpeft.types import (
    NO_MEMORY,
    Base,
    Client,
    Context,
    Delta,
    LocalTask,
    Method,
    Payload,
    State,
    Update,
    WorthTuning,
)

__all__ = [
    "NO_MEMORY",
    "BadInput",
    "Base",
    "Client",
    "Context",
    "Delta",
    "LocalTask",
    "LowRank",
    "Mean",
    "MeanMerge",
    "Method",
    "NotStackable",
    "Payload",
    "ProductMean",
    "Split",
    "State",
    "Targets",
    "Update",
    "Weighting",
    "WireError",
    "WorthTuning",
    "averaged",
    "by_module",
    "check_ranks",
    "cut",
    "deltas",
    "dense_layer",
    "dense_shape",
    "derive",
    "detached",
    "generator",
    "mean",
    "mean_products",
    "mounted",
    "mounted_deltas",
    "oriented",
    "orthonormal",
    "plain_mean",
    "positions",
    "principal",
    "replaced",
    "scatter",
    "select",
    "share_of",
    "specs",
    "thin_svd",
    "trainable",
    "uniform",
]
