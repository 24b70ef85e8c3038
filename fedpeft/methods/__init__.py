"""The federated methods, one file each.

Other packages add theirs through the entry-point group ``fedpeft.methods``.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from fedpeft.errors import BadInput
from fedpeft.methods.bitfit import BitFit
from fedpeft.methods.fedara import FedARA
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.ffa_lora import FFALoRA
from fedpeft.methods.full import Full
from fedpeft.methods.local_only import LocalOnly
from fedpeft.methods.lora import LoRA
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
