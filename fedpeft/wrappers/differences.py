"""Which tensors of a reply say by how much the client has moved what it was sent."""

from torch import Tensor

from fedpeft.errors import BadInput
from fedpeft.types import Method, Payload


def is_difference(name: str, tensor: Tensor, down: Payload) -> bool:
    """Return whether ``tensor`` comes back under the name and in the form in which it went down.

    >>> import torch
    >>> down = {"B": torch.zeros(2), "A": torch.zeros(3)}
    >>> is_difference("B", torch.ones(2), down), is_difference("A", torch.ones(2), down)
    (True, False)
    """
    sent = down.get(name)
    if sent is None or not tensor.is_floating_point():
        return False
    return (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)


def check_differences(wrapper: str, method: Method, expected: Payload, down: Payload) -> None:
    """Raise BadInput unless all real numbers of a reply can be told as differences to ``down``.

    ``expected``: the form of a reply of ``method`` to ``down``.
    """
    strange = ""
    found = 0
    for name, spec in expected.items():
        if is_difference(name, spec, down):
            found += 1
        elif spec.is_floating_point():
            strange = name
    kind = type(method).__name__
    hint = "it goes around methods that send back what they got, such as 'lora'"
    if strange:
        raise BadInput(
            f"wrap.name = {wrapper!r}: {kind} sends up {strange!r}, which did not go down in that "
            f"form, so that there is no difference to it; {hint}"
        )
    if not found:
        raise BadInput(
            f"wrap.name = {wrapper!r}: {kind} sends no real numbers up in the first exchange of a "
            f"round; {hint}"
        )
