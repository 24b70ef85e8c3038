"""Where texts come from (``BUILT_IN``, ``files``); which client holds which (``partitions``)."""

from collections.abc import Mapping

from fedpeft.data.files import KEY, LABEL, Columns, from_files, read
from fedpeft.data.partitions import (
    Partition,
    by_key,
    dirichlet,
    from_file,
    iid,
    label_counts,
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
    "Partition",
    "Rows",
    "Schema",
    "by_key",
    "dirichlet",
    "from_file",
    "from_files",
    "iid",
    "label_counts",
    "pycode",
    "pydocs",
    "read",
    "shards",
]
