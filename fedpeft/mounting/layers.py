"""The dense layers of a model, found by type, and the choice of those that are adapted."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.types import BadInput, Base, WireError

WORDS = {"attention": r"(?i)attention|attn", "all-linear": r""}
"""Words that stand for a pattern: every dense layer inside an attention block; every dense layer."""


def matrix(module: nn.Module) -> Tensor | None:
    """Return a dense layer's weight as (out, in), a view of its storage; None for every other kind of module."""
    match module:
        case nn.Linear():
            return module.weight
        case Conv1D():  # GPT-2 stores (in, out)
            return module.weight.t()
        case _:
            return None


def dense_layer(model: nn.Module, name: str) -> Tensor:
    """Return the (out, in) matrix of dense layer ``name``; a name that is none raises WireError."""
    module = dict(model.named_modules()).get(name)
    weight = None if module is None else matrix(module)
    if weight is None:
        raise WireError(f"the message adapts {name!r}, which is no dense layer of this model")
    return weight


def oriented(model: nn.Module, name: str, difference: Tensor) -> Tensor:
    """Return an (out, in) matrix the way round in which layer ``name`` stores its weight."""
    return difference.t() if isinstance(model.get_submodule(name), Conv1D) else difference


def describe(model: nn.Module, head: Iterable[str]) -> Base:
    """Return the server's view of ``model``; ``head`` names the parameters that its checkpoint lacks."""
    matrices = {name: matrix(module) for name, module in model.named_modules()}
    return Base(
        parameters={name: parameter.detach() for name, parameter in model.named_parameters()},
        layers={name: weight.detach() for name, weight in matrices.items() if weight is not None},
        head=frozenset(head),
    )


def select(base: Base, targets: str) -> dict[str, Tensor]:
    """Return the (out, in) matrices of the adapted layers by module name.

    ``targets`` is ``attention``, ``all-linear`` or a regular expression searched in the module names. Layers of the head
    are trained in full and so never chosen. A pattern that is malformed or matches nothing raises BadInput.
    """
    candidates = {name: weight for name, weight in base.layers.items() if f"{name}.weight" not in base.head}
    try:
        pattern = re.compile(WORDS.get(targets, targets))
    except re.error as error:
        raise BadInput(f"method.targets = {targets!r} is not a regular expression: {error}") from error
    chosen = {name: weight for name, weight in candidates.items() if pattern.search(name)}
    if not chosen:
        known = sorted({part for name in candidates for part in name.split(".") if not part.isdigit()})
        near = get_close_matches(targets, [*WORDS, *known], n=1) or [*WORDS]
        raise BadInput(
            f"method.targets = {targets!r} matches no dense layer of the model; did you mean {near[0]!r}? "
            f"The names are made of: {', '.join(known)}"
        )
    return chosen
