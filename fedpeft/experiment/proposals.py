"""Learning rates that are proposed where a configuration gives none, and where each comes from.

All of them come from the sweeps in ``docs/log.md``: MiniLM on `pydocs`, AdamW, adapters of rank 8
on queries and values, chosen on validation texts. No other rank, no other optimizer and no language
model was swept, so for these nothing is proposed but what is said here: a method of another rank
gets the rate of rank 8, and its origin says so; SGD and language models keep `training.lr`'s own
default. Where the two sweeps chose differently it is the lower rate: past its best rate every
method falls off a cliff within a factor of three.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from fedpeft.experiment.checking import Tree

OPTIMIZER: Final = "adamw"
"""The optimizer of the sweeps."""
TASKS: Final = ("classification", "tagging", "qa")
"""Tasks that train encoders, as the sweeps did; they were made on the first of them."""


@final
@dataclass(frozen=True)
class Proposal:
    """A learning rate, and the sweep that it comes from.

    ``method``: fields of the method as the sweep had them. ``variants``: (field, value) -> what is
    proposed instead where the method has that field at that value.
    """

    lr: float
    origin: str
    method: Mapping[str, float] = field(default_factory=dict)
    variants: Mapping[tuple[str, str], "Proposal"] = field(default_factory=dict)

    def of(self, method: Mapping[str, Any]) -> "Proposal":
        """Return what is proposed for a method with the fields ``method``."""
        for (name, value), proposal in self.variants.items():
            if method.get(name) == value:
                return proposal
        return self


_BOTH: Final = "docs/log.md, both sweeps, rank 8"
_LOWER: Final = "docs/log.md, the lower of two sweeps, rank 8"
_LONGER: Final = "docs/log.md, the longer form, rank 8"


def _as(method: str, lr: float) -> Proposal:
    """Return the proposal for a method that was not swept: that of its nearest relative."""
    return Proposal(lr, f"not swept; as {method} in docs/log.md, rank 8")


_FULL_FIRST: Final = Proposal(
    3e-3,
    "not swept; as slora in docs/log.md, rank 8, with stage 1 near the rate of full",
    {"stage1_rate": 0.03},
)
PROPOSALS: Final[Mapping[str, Proposal]] = {
    # Swept: demo 1e-4, longer form 1e-4.
    "full": Proposal(1e-4, "docs/log.md, both sweeps"),
    # Demo 3e-3, longer form 1e-3.
    "bitfit": Proposal(1e-3, "docs/log.md, the lower of two sweeps"),
    # Demo 1e-2, longer form 1e-2.
    "lora": Proposal(1e-2, _BOTH),
    # Demo 3e-2, longer form 3e-2.
    "ffa_lora": Proposal(3e-2, _BOTH),
    # Demo 3e-3, longer form 3e-3.
    "federa": Proposal(3e-3, _BOTH),
    # Demo 3e-3, longer form 1e-2; both with stage 1 at a tenth.
    "slora": Proposal(
        3e-3,
        f"{_LOWER}, stage 1 at a tenth",
        {"stage1_rate": 0.1},
        variants={("stage1_method", "full"): _FULL_FIRST},
    ),
    # Demo 3e-2, longer form 1e-2.
    "fedara": Proposal(1e-2, _LOWER),
    # Longer form alone.
    "local_only": Proposal(3e-3, _LONGER),
    # LoRA with all data in one place, as that sweep had it.
    "centralised": Proposal(3e-3, _LONGER),
    # Both factors move, as LoRA's do.
    "fedsa_lora": _as("lora", 1e-2),
    "fedex_lora": _as("lora", 1e-2),
    "flora": _as("lora", 1e-2),
    "florist": _as("lora", 1e-2),
    "flexlora": _as("lora", 1e-2),
    "raflora": _as("lora", 1e-2),
    "hetlora": _as("lora", 1e-2),
    "lora_fair": _as("lora", 1e-2),
    "fedrot_lora": _as("lora", 1e-2),
    "rolora": _as("lora", 1e-2),
    # B alone moves.
    "fedsvd": _as("ffa_lora", 3e-2),
    # Triplets with a diagonal.
    "adalora": _as("fedara", 1e-2),
    # The weights themselves move.
    "sparse": _as("full", 1e-4),
}
"""Method or yardstick -> the rate proposed. A method that is missing here has no swept relative."""
HEAD_LR: Final = 3e-2
"""The rate of the head in the sweeps."""


def with_rate(tree: Tree, name: str) -> Tree:
    """Return settings in which the rate proposed for ``name`` stands where they give none.

    ``name``: of a method or a yardstick. Where the rate comes from goes into ``tuned.source``.
    Settings for which nothing is proposed come back as they are, and so do those in a wrong form,
    which are not explained here.

    >>> with_rate({}, "lora")["training"], with_rate({"training": {"lr": 1.0}}, "lora")["training"]
    ({'lr': 0.01}, {'lr': 1.0})
    """
    task, training = tree.get("task", {}), tree.get("training", {})
    tuned, method = tree.get("tuned", {}), tree.get("method", {})
    sections = (task, training, tuned, method)
    if not all(isinstance(section, Mapping) for section in sections):
        return tree
    swept = (
        training.get("optimizer", OPTIMIZER) == OPTIMIZER and task.get("kind", TASKS[0]) in TASKS
    )
    if name not in PROPOSALS or "lr" in training or not swept:
        return tree
    proposal = PROPOSALS[name].of(method)
    origin = proposal.origin
    if "head_lr" not in training:
        origin += f"; the head at the same rate, there at {HEAD_LR:g}"
    filled: dict[str, Any] = {
        "training": {**training, "lr": proposal.lr},
        "tuned": {"source": origin, **tuned},
    }
    if proposal.method:
        filled["method"] = {**proposal.method, **method}
    return {**tree, **filled}
