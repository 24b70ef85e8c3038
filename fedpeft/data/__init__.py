"""Where texts come from (``pydocs``, ``files``) and which client holds which (``partitions``)."""

from fedpeft.data.files import from_files, read
from fedpeft.data.partitions import (
    Partition,
    by_key,
    dirichlet,
    from_file,
    iid,
    label_counts,
    shards,
)
from fedpeft.data.pydocs import pydocs
from fedpeft.data.rows import Dataset, Rows

__all__ = [
    "Dataset",
    "Partition",
    "Rows",
    "by_key",
    "dirichlet",
    "from_file",
    "from_files",
    "iid",
    "label_counts",
    "pydocs",
    "read",
    "shards",
]
