"""The federated methods, one file each.

Other packages add theirs through the entry-point group ``fedpeft.methods``.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from fedpeft.errors import BadInput
from fedpeft.methods.adalora import AdaLoRA
from fedpeft.methods.adapters import Adapters
from fedpeft.methods.bitfit import BitFit
from fedpeft.methods.fed_sb import FedSB
from fedpeft.methods.fedara import FedARA
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.fedex_lora import FedExLoRA
from fedpeft.methods.fedrot_lora import FedRotLoRA
from fedpeft.methods.fedsa_lora import FedSALoRA
from fedpeft.methods.fedsvd import FedSVD
from fedpeft.methods.ffa_lora import FFALoRA
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.methods.flora import FLoRA
from fedpeft.methods.florist import FLoRIST
from fedpeft.methods.full import Full
from fedpeft.methods.hetlora import HetLoRA
from fedpeft.methods.local_only import LocalOnly
from fedpeft.methods.lora import LoRA
from fedpeft.methods.lora_a2 import LoRAA2
from fedpeft.methods.lora_fair import LoRAFAIR
from fedpeft.methods.peft import Peft
from fedpeft.methods.raflora import RaFLoRA
from fedpeft.methods.ravan import Ravan
from fedpeft.methods.rolora import RoLoRA
from fedpeft.methods.slora import SLoRA
from fedpeft.methods.sparse import Sparse
from fedpeft.types import Method

METHODS: Mapping[str, type[Method]] = {
    "full": Full,
    "bitfit": BitFit,
    "lora": LoRA,
    "ffa_lora": FFALoRA,
    "federa": FeDeRA,
    "sparse": Sparse,
    "slora": SLoRA,
    "fedara": FedARA,
    "local_only": LocalOnly,
    "rolora": RoLoRA,
    "fedsa_lora": FedSALoRA,
    "flexlora": FlexLoRA,
    "fedsvd": FedSVD,
    "fedex_lora": FedExLoRA,
    "flora": FLoRA,
    "hetlora": HetLoRA,
    "raflora": RaFLoRA,
    "lora_fair": LoRAFAIR,
    "fed_sb": FedSB,
    "ravan": Ravan,
    "fedrot_lora": FedRotLoRA,
    "florist": FLoRIST,
    "adalora": AdaLoRA,
    "adapters": Adapters,
    "peft": Peft,
    "lora_a2": LoRAA2,
}
"""Our methods by their names in a configuration; the contract tests run each of them."""

GROUP = "fedpeft.methods"
"""The entry-point group in which third parties name their methods."""


def constructors() -> dict[str, type[Method]]:
    """Return every method by name: ours, and those that installed packages add.

    One that cannot be loaded raises BadInput.
    """
    installed = {point.name: _loaded(point) for point in entry_points(group=GROUP)}
    # Ours come last: no installed package can put its own in the place of one of them.
    return {**installed, **METHODS}


def _loaded(point: EntryPoint) -> type[Method]:
    try:
        method: type[Method] = point.load()
    except Exception as error:  # importing a stranger's module may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"method {point.name!r} ({point.value}) cannot be loaded ({cause}); "
            "mend or uninstall it"
        ) from error
    # Loading does not check a Protocol's class variables, and `fedpeft methods` prints this one.
    if not isinstance(getattr(method, "paper", None), str):
        raise BadInput(
            f"method {point.name!r} ({point.value}) has no class variable 'paper', "
            "such as paper: ClassVar[str] = '...'"
        )
    return method
