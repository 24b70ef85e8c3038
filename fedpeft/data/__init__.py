"""Where texts come from (``BUILT_IN``, ``files``); which client holds which (``partitions``)."""

from collections.abc import Mapping

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
from fedpeft.data.pycode import PYCODE, pycode
from fedpeft.data.pydocs import PYDOCS, pydocs
from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Column, Schema
from fedpeft.data.stdlib import Collection

BUILT_IN: Mapping[str, Collection] = {PYDOCS.name: PYDOCS, PYCODE.name: PYCODE}
"""Data that come with Python, by the name that ``data.source`` gives them."""

__all__ = [
    "BUILT_IN",
    "KEY",
    "LABEL",
    "Collection",
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
    "pycode",
    "pydocs",
    "quantity",
    "read",
    "shards",
]
