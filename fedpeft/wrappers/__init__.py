"""Wrappers, which change how a method trains or merges without the method knowing."""

from collections.abc import Mapping

from fedpeft.wrappers.dp import DP
from fedpeft.wrappers.dpsgd import DPSGD
from fedpeft.wrappers.fedavgm import FedAvgM
from fedpeft.wrappers.fedprox import FedProx
from fedpeft.wrappers.secagg import SecAgg
from fedpeft.wrappers.staged import Staged
from fedpeft.wrappers.wrapper import Wrapper

WRAPPERS: Mapping[str, type[Wrapper]] = {
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "secagg": SecAgg,
    "dp": DP,
    "dpsgd": DPSGD,
}
"""Every wrapper that ``[[wrap]]`` tables can name."""

__all__ = ["DP", "DPSGD", "WRAPPERS", "FedAvgM", "FedProx", "SecAgg", "Staged", "Wrapper"]
