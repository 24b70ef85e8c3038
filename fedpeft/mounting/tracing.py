"""What decides how a model computes, noted by identity, so that any change is seen."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Place = tuple[nn.Module, str, object]
"""A module, one of its dictionaries (``_parameters``, ``_forward_hooks``, ``__dict__``), a key."""

Entry = tuple[object, object]
"""The very object that a place holds, and what of that object may change in place."""

Trace = Mapping[Place, Entry]
"""All places of a model that decide how it computes, with what they hold."""

# Read off torch itself: a kind of hook that a new version adds is then traced, too.
_CONTAINERS: Final = frozenset(
    name for name, held in vars(nn.Module()).items() if isinstance(held, dict)
)
"""Where torch keeps a module's parameters, buffers, submodules and hooks of every kind."""

_GLOBAL: Final = {
    name: held
    for name, held in vars(torch_module).items()
    if name.startswith("_global") and isinstance(held, dict)
}
"""Hooks that torch calls for every module there is."""

_CLAIMED: Counter[Place] = Counter()
"""The places that this package's mounting has changed at present, and how many times each."""


def trace(model: nn.Module) -> Trace:
    """Return what ``model`` and all modules inside it hold; it takes a few milliseconds.

    The mode (training or not) is left out. So are values written in place behind torch's back, as
    ``weight.data += x`` does: to see these, every weight would have to be read.
    """
    entries: dict[Place, Entry] = {}
    for module in model.modules():
        # The class and its forward: somebody may have patched the class itself.
        entries[module, "__class__", "forward"] = type(module), type(module).forward
        for name, held in vars(module).items():
            if name in _CONTAINERS:
                for key, item in held.items():
                    entries[module, name, key] = entry(item)
            elif name != "training":
                entries[module, "__dict__", name] = entry(held)
    for name, hooks in _GLOBAL.items():
        for key, hook in hooks.items():
            entries[model, name, key] = entry(hook)
    return entries


def entry(held: object) -> Entry:
    """Return ``held`` with what of it may change: a tensor's version, memory, ``requires_grad``."""
    # The object itself is kept, not its id: an id is free again once its object has gone.
    if not isinstance(held, Tensor):
        return held, None
    version = None if held.is_inference() else held._version  # inference tensors count no versions
    return held, (version, _address(held), held.requires_grad)


def same(one: Entry, other: Entry) -> bool:
    """Return whether two entries hold the very same object in the same state."""
    # ``is``: to compare two tensors with ``==`` would compare their values.
    return one[0] is other[0] and one[1] == other[1]


def changes(before: Trace, now: Trace) -> set[Place]:
    """Return the places that hold something else ``now``, or are new, or have gone."""
    changed = set(before.keys() ^ now.keys())
    for place, held in before.items():
        if place in now and not same(held, now[place]):
            changed.add(place)
    return changed


@contextmanager
def claimed(places: Collection[Place]) -> Iterator[None]:
    """Say, for the length of a ``with``, that this package has changed ``places``."""
    # Counted: two mounts may change one place, and the inner one ends first.
    _CLAIMED.update(places)
    try:
        yield
    finally:
        for place in places:
            _CLAIMED[place] -= 1
            if not _CLAIMED[place]:
                del _CLAIMED[place]  # it would keep the module alive


def touched(model: nn.Module, before: Trace) -> set[nn.Module] | None:
    """Return the modules of ``model`` on which this package has mounted something since ``before``.

    None where anything else has changed, too: then nobody knows which modules compute something
    else than before.
    """
    changed = changes(before, trace(model))
    if not changed <= _CLAIMED.keys():
        return None
    # Our only pre-hook, on the whole model, does no more than renew what stands for parameters.
    return {module for module, kind, _ in changed if kind != "_forward_pre_hooks"}


def _address(tensor: Tensor) -> int | None:
    """Return where a tensor's values lie; None for kinds that will not tell."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None
