"""Where texts come from (``pydocs``, ``files``) and which client holds which (``partitions``)."""

from fedpeft.data.files import KEY, LABEL, Columns, from_files, read
from fedpeft.data.hub import HubChoice, from_hub
from fedpeft.data.partitions import (
    Partition,
    by_key,
    cluster,
    dirichlet,
    flower,
    from_file,
    groupings,
    iid,
    label_counts,
    label_skew,
    quantity,
    shards,
)
from fedpeft.data.pydocs import pydocs
from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Column, Schema

__all__ = [
    "KEY",
    "LABEL",
    "Column",
    "Columns",
    "Dataset",
    "HubChoice",
    "Partition",
    "Rows",
    "Schema",
    "by_key",
    "cluster",
    "dirichlet",
    "flower",
    "from_file",
    "from_files",
    "from_hub",
    "groupings",
    "iid",
    "label_counts",
    "label_skew",
    "pydocs",
    "quantity",
    "read",
    "shards",
]
