"""The ways of dividing a data set among clients, a file a family; see ``docs/partitions.md``."""

from fedpeft.data.partitions.by_key import by_key
from fedpeft.data.partitions.by_label import dirichlet, label_skew, shards
from fedpeft.data.partitions.by_size import iid, quantity
from fedpeft.data.partitions.cluster import Embed, cluster
from fedpeft.data.partitions.flower import flower
from fedpeft.data.partitions.from_file import from_file
from fedpeft.data.partitions.groups import Groups, groupings, label_counts
from fedpeft.data.partitions.partition import Partition

__all__ = [
    "Embed",
    "Groups",
    "Partition",
    "by_key",
    "cluster",
    "dirichlet",
    "flower",
    "from_file",
    "groupings",
    "iid",
    "label_counts",
    "label_skew",
    "quantity",
    "shards",
]
