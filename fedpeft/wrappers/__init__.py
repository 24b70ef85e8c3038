"""Wrappers, which change how a method trains or merges without the method knowing."""

from collections.abc import Mapping

from fedpeft.wrappers.bulyan import Bulyan
from fedpeft.wrappers.dp import DP
from fedpeft.wrappers.dpsgd import DPSGD
from fedpeft.wrappers.fedadagrad import FedAdagrad
from fedpeft.wrappers.fedadam import FedAdam
from fedpeft.wrappers.fedavgm import FedAvgM
from fedpeft.wrappers.fedprox import FedProx
from fedpeft.wrappers.fedyogi import FedYogi
from fedpeft.wrappers.krum import Krum
from fedpeft.wrappers.median import Median
from fedpeft.wrappers.norm_clip import NormClip
from fedpeft.wrappers.quantise import Quantise
from fedpeft.wrappers.scaffold import Scaffold
from fedpeft.wrappers.secagg import SecAgg
from fedpeft.wrappers.staged import Staged
from fedpeft.wrappers.top_k import TopK
from fedpeft.wrappers.trimmed_mean import TrimmedMean
from fedpeft.wrappers.wrapper import NeedsReplies, Wrapper

WRAPPERS: Mapping[str, type[Wrapper]] = {
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "scaffold": Scaffold,
    "quantise": Quantise,
    "top_k": TopK,
    "norm_clip": NormClip,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "bulyan": Bulyan,
    "secagg": SecAgg,
    "dp": DP,
    "dpsgd": DPSGD,
}
"""Every wrapper that ``[[wrap]]`` tables can name."""

__all__ = [
    "DP",
    "DPSGD",
    "WRAPPERS",
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "Krum",
    "Median",
    "NeedsReplies",
    "NormClip",
    "Quantise",
    "Scaffold",
    "SecAgg",
    "Staged",
    "TopK",
    "TrimmedMean",
    "Wrapper",
]
