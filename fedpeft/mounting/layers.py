"""The dense layers of a model, found by type, and the choice of those that are adapted."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Protocol, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import BadInput, WireError
from fedpeft.mounting.packed import Packed, PackedLinear
from fedpeft.mounting.twins import twin_of
from fedpeft.types import Base

WORDS = {"attention": r"(?i)attention|attn", "all-linear": r""}
"""Words that stand for a pattern: dense layers of attention blocks; every dense layer."""

Targets = str | tuple[str, ...]
"""Which dense layers are adapted, one of:

- ``attention`` or ``all-linear``;
- a regular expression that is searched in the modules' names, such as ``query|value``;
- a list of endings of these names, as peft's ``target_modules``: ``["query", "value"]``. A text
  with commas, ``"query,value"``, is read as such a list.
"""

LISTED = re.compile(r"\s*[\w.-]+(\s*,\s*[\w.-]+)+\s*")
"""Names with commas between them. Read as a pattern it would match nothing: no name has a comma."""

ROLES = (
    ("query", "q", "q_proj", "q_lin", "q_head", "query_proj"),
    ("key", "k", "k_proj", "k_lin", "k_head", "key_proj"),
    ("value", "v", "v_proj", "v_lin", "v_head", "value_proj"),
)
"""What families call the three inputs of attention."""

FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj")
"""What families call the three where they are one matrix."""


def matrix(module: nn.Module) -> Tensor | Packed | None:
    """Return a dense layer's weight as (out, in), a view of its storage; None for other modules.

    One that is packed stays so: its ``shape`` is that of its features.
    """
    match module:
        case PackedLinear():
            return module.packed
        case nn.Linear():
            return module.weight
        case Conv1D():  # GPT-2 stores (in, out)
            return module.weight.t()
        case _:
            return None


def dense_layer(model: nn.Module, name: str) -> Tensor:
    """Return the (out, in) matrix of dense layer ``name``.

    A name that no dense layer of ``model`` has raises WireError.

    >>> dense_layer(nn.Sequential(nn.Linear(3, 2)), "0").shape
    torch.Size([2, 3])
    """
    weight = _stored(model, name)
    return weight.float() if isinstance(weight, Packed) else weight


def dense_shape(model: nn.Module, name: str) -> torch.Size:
    """Return (out, in) of dense layer ``name``, without unpacking a matrix of a few bits.

    A name that no dense layer of ``model`` has raises WireError.

    >>> dense_shape(nn.Sequential(nn.Linear(3, 2)), "0")
    torch.Size([2, 3])
    """
    return _stored(model, name).shape


def _stored(model: nn.Module, name: str) -> Tensor | Packed:
    """Return the matrix of dense layer ``name`` as the model keeps it."""
    module = dict(model.named_modules()).get(name)
    weight = None if module is None else matrix(module)
    if weight is None:
        raise WireError(f"the message adapts {name!r}, which is no dense layer of this model")
    return weight


def oriented(model: nn.Module, name: str, difference: Tensor) -> Tensor:
    """Return an (out, in) matrix the way round in which layer ``name`` stores its weight.

    >>> import torch
    >>> gpt2_like = nn.Sequential(Conv1D(2, 3))  # 3 in, 2 out
    >>> oriented(gpt2_like, "0", torch.zeros(2, 3)).shape
    torch.Size([3, 2])
    """
    return difference.t() if isinstance(model.get_submodule(name), Conv1D) else difference


def describe(model: nn.Module, head: Iterable[str], without: nn.Module | None = None) -> Base:
    """Return the server's view of ``model``; ``head`` names what every method trains in full.

    ``without``: a dense layer that is never adapted, such as the output layer of a language model.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layers: dict[str, Tensor | Packed] = {}
    packed: set[str] = set()
    for name, module in model.named_modules():
        weight = matrix(module)
        if weight is None or module is without:
            continue
        if isinstance(weight, Packed):
            packed.add(name)
            layers[name] = weight
        else:
            layers[name] = weight.detach()
    twin = partial(twin_of, model)
    as_float32, matrices = _InFloat32(parameters), _InFloat32(layers)
    return Base(as_float32, matrices, frozenset(head), frozenset(packed), twin)


class _Readable(Protocol):
    """A tensor, or a packed matrix."""

    def float(self) -> Tensor:
        """Return it in float32."""
        ...


@final
class _InFloat32(Mapping[str, Tensor]):
    """Tensors that are read as float32, each when it is asked for: no copy of all is kept."""

    def __init__(self, tensors: Mapping[str, _Readable]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].float()  # one in float32 is returned itself

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def select(base: Base, targets: Targets) -> Mapping[str, Tensor]:
    """Return the (out, in) matrices of the adapted layers by module name, in the model's order.

    Layers of the head are trained in full and so never chosen. A pattern that is malformed or
    matches nothing, or an ending that no layer has, raises BadInput.

    >>> model = nn.ModuleDict({"query": nn.Linear(3, 2), "value": nn.Linear(3, 2)})
    >>> base = describe(model, head=[])
    >>> list(select(base, "query|value")), list(select(base, ("value",)))
    (['query', 'value'], ['value'])
    """
    names = [name for name in base.layers if f"{name}.weight" not in base.head]
    if not names:
        raise BadInput(f"method.targets = {targets!r}: the model's head has all its dense layers")
    match targets:
        case str() if LISTED.fullmatch(targets):
            chosen = _ending(names, [ending.strip() for ending in targets.split(",")])
        case str():
            chosen = _searched(names, targets)
        case _:
            chosen = _ending(names, targets)
    return _Chosen(base.layers, [name for name in names if name in chosen])


@final
class _Chosen(Mapping[str, Tensor]):
    """Those of ``tensors`` that are called ``names``, each looked up when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _searched(layers: Sequence[str], pattern: str) -> set[str]:
    """Return the names in which ``pattern``, or the pattern that a word stands for, is found."""
    try:
        expression = re.compile(WORDS.get(pattern, pattern))
    except re.error as error:
        setting = f"method.targets = {pattern!r}"
        raise BadInput(f"{setting} is not a regular expression: {error}") from error
    matching = {name for name in layers if expression.search(name)}
    if matching:
        return matching
    known = _name_parts(layers)
    # What looks like a name in the pattern, without escapes such as \d.
    words = re.findall(r"[A-Za-z_][\w-]*", re.sub(r"\\.", " ", pattern))
    near: dict[str, None] = {}  # in order, each once
    for word in words:
        if word not in known and word not in WORDS:
            near |= dict.fromkeys(_nearest(word, known))
    meant = "|".join(near) or "all-linear"
    raise BadInput(
        f"method.targets = {pattern!r} matches no dense layer of the model; "
        f"did you mean {meant!r}? The names are made of: {', '.join(known)}"
    )


def _ending(layers: Sequence[str], endings: Sequence[str]) -> set[str]:
    """Return the names that end in one of ``endings``.

    An ending that no name has raises BadInput, and so does an empty list.
    """
    chosen: set[str] = set()
    unknown: list[str] = []
    for ending in endings:
        # From a dot on, as peft does it: ``out`` is not the end of ``q_out``.
        names = {name for name in layers if f".{name}".endswith(f".{ending}")}
        chosen |= names
        if not names:
            unknown.append(ending)
    if chosen and not unknown:
        return chosen
    if not endings:
        raise BadInput(f"method.targets = []: name layers, or choose from: {', '.join(WORDS)}")
    known = _name_parts(layers)
    near: dict[str, None] = {}  # in order, each once
    for ending in unknown:
        near |= dict.fromkeys(_nearest(ending, known))
    hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
    # ``["attention"]``: the word is right, the list is what is wrong. That hint goes first.
    for word in WORDS:
        if word in unknown:
            hint = f"write {word!r} alone, not in a list. "
    raise BadInput(
        f"method.targets = {list(endings)}: no dense layer's name ends in "
        f"{', '.join(map(repr, unknown))}; {hint}The names are made of: {', '.join(known)}"
    )


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    """Return what of ``known`` another family calls ``word``, or else what is spelt alike."""
    # 1. Another family's name for the same input of attention; a fused matrix stands for all three.
    same: list[str] = []
    is_role = False
    for names in ROLES:
        if word in names or word in FUSED:
            is_role = True
            same += [name for name in names if name in known]
    # 2. This model may have the three fused.
    if is_role and not same:
        same = [name for name in FUSED if name in known]
    # 3. A misspelt name.
    return same or get_close_matches(word, [*WORDS, *known], n=1)


def _name_parts(layers: Sequence[str]) -> list[str]:
    """Return the parts between the dots of the names of ``layers``, without numbers, sorted."""
    parts: set[str] = set()
    for name in layers:
        parts.update(name.split("."))
    return sorted(part for part in parts if not part.isdigit())
