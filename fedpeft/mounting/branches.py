"""What stands in for a module while adapters are mounted: branches, and parameters of K clients."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import WireError
from fedpeft.mounting.packed import PackedLinear
from fedpeft.mounting.rows import by_client, group_by_client, select_clients

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]
"""A forward hook: module, positional arguments, output -> the output that counts."""

BRANCHES: Sequence[Collection[str]] = (
    {"A", "B"},
    {"A", "B", "e"},
    {"A", "B", "H"},
    {"A", "B", "H", "s"},
    {"dense"},
    {"A", "B", "dense"},
    {"A", "B", "e", "dense"},
)
"""The parts that a dense layer's branches may consist of."""


def branches(parts: Mapping[str, Tensor], scale: float) -> list[Hook]:
    """Return the forward hooks that add branches, made of ``parts``, to a dense layer's output."""
    hooks: list[Hook] = []
    if "A" in parts:
        hooks.append(low_rank(parts, scale))
    if "dense" in parts:
        hooks.append(dense(parts["dense"], scale))
    return hooks


def check_branch(name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> set[int]:
    """Raise WireError unless ``parts`` fit dense layer ``name`` of ``shape``, (out, in).

    A branch of low rank is A (K, r, in), B (K, out, r) and maybe e (K, r), or H (K, h, p, p) of
    h p = r and maybe s (K, h); a dense one is ``dense`` (K, out, in). A branch without the client
    axis is the same for all clients. Returns the numbers of clients for which there are tensors:
    {K}, or the empty set where none has that axis.
    """
    if set(parts) not in BRANCHES:
        names = ", ".join(sorted(parts))
        needs = "A and B, maybe e, or H and s, or dense"
        raise WireError(f"the branch on {name!r} has {names}; it needs {needs}")
    # 1. The shapes that would fit. A says which rank this is; an A that has no such axis is refused
    # below, whatever rank is assumed.
    rank = torch.Size([1])
    if "A" in parts and parts["A"].ndim >= 2:
        rank = parts["A"].shape[-2:-1]
    height, width = shape[:1], shape[1:]
    due = {"A": rank + width, "B": height + rank, "e": rank, "dense": shape}
    due |= _shapes_of_cores(parts, rank[0])
    # 2. Each part has its shape after at most one more axis, that of the clients.
    client_axes: dict[str, torch.Size] = {}  # of each part: (K,) or ()
    for part, tensor in parts.items():
        axes = len(due[part])
        if tensor.shape[-axes:] != due[part] or tensor.ndim > axes + 1:
            found, fitting = tuple(tensor.shape), tuple(due[part])
            raise WireError(f"{name}:{part} is {found}; {fitting} after a client axis would fit")
        client_axes[part] = tensor.shape[:-axes]
    # 3. Factors are multiplied with each other, client by client; a dense part stands by itself.
    axes_of_factors = {axis for part, axis in client_axes.items() if part != "dense"}
    if len(axes_of_factors) > 1:
        raise WireError(f"the factors of {name!r} differ in their client axis: {client_axes}")
    return {axis[0] for axis in client_axes.values() if axis}


def _shapes_of_cores(parts: Mapping[str, Tensor], rank: int) -> dict[str, torch.Size]:
    """Return the shapes of H and s that fit ``rank`` ranks: of as many heads as H has.

    One head of all ranks where H cannot say, or where they are not to be divided so.
    """
    heads = 1
    if "H" in parts and parts["H"].ndim >= 3:
        said = parts["H"].shape[-3]
        heads = said if said and rank % said == 0 else 1
    size = rank // heads
    return {"H": torch.Size([heads, size, size]), "s": torch.Size([heads])}


def low_rank(parts: Mapping[str, Tensor], scale: float) -> Hook:
    """Return a forward hook that adds scale * B diag(e) A x to an output; ``e`` may be missing.

    Or scale * sum_i s_i B_i H_i A_i x, where there is H. ``parts``: A (K, r, in), B (K, out, r),
    e (K, r), H (K, h, p, p), s (K, h), or all of them without the client axis, the same for all
    clients. ``row_owners`` says which client each row of x, (rows, ..., in), is of.
    """
    A, B, e = parts["A"], parts["B"], parts.get("e")

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # n entries of the stack: one a client, a row where clients' rows mix, or a copy; or 1.
        down = _entries(A, 2, transposed=True)  # (n, in, r)
        up = _entries(B, 2, transposed=True)  # (n, r, out)
        x = group_by_client(args[0], len(down))  # (n, tokens, in)
        inner = torch.bmm(x, down)  # (n, tokens, r)
        if e is not None:
            inner = inner * _entries(e, 1).unsqueeze(1)  # (n, 1, r)
        if "H" in parts:
            inner = _through_cores(inner, parts)
        flat = output.reshape(len(down), -1, output.shape[-1])  # (n, tokens, out)
        return torch.baddbmm(flat, inner, up, alpha=scale).view(output.shape)

    return add


def _through_cores(inner: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return s_i H_i times what A_i has made of the input, for every head i: (n, tokens, r)."""
    cores = _entries(parts["H"], 3)  # (n, h, p, p)
    if "s" in parts:
        cores = cores * _entries(parts["s"], 1)[..., None, None]
    heads = inner.view(*inner.shape[:2], *cores.shape[1:3])  # (n, tokens, h, p)
    return torch.einsum("nthq,nhpq->nthp", heads, cores).flatten(2)


def dense(difference: Tensor, scale: float) -> Hook:
    """Return a forward hook that adds scale * D x to a dense layer's output, without a new weight.

    ``difference``: D, (K, out, in), or (out, in), the same for all clients, which takes one product
    for the whole batch. ``row_owners`` says which client each row of x, (rows, ..., in), is of.
    """

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        if difference.ndim == 2:
            return torch.add(output, functional.linear(x, difference), alpha=scale)
        # Not gathered for each row as factors are: a row would then have a whole matrix.
        products: list[Tensor] = []
        for matrix, rows in by_client(x, difference):
            products.append(functional.linear(rows, matrix))
        return torch.add(output, torch.cat(products), alpha=scale)

    return add


def bottleneck(parts: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]) -> Hook:
    """Return a forward hook that adds U f(D y + d) + u to a layer's output y.

    ``parts``: D (K, m, out), d (K, m), U (K, out, m), u (K, out). ``activation``: f.
    ``row_owners`` says which client each row of y, (rows, ..., out), is of.
    """
    D, U, d, u = parts["D"], parts["U"], parts["d"], parts["u"]

    def add(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        down = select_clients(D, transposed=True)  # (n, out, m)
        up = select_clients(U, transposed=True)  # (n, m, out)
        y = group_by_client(output, len(down))  # (n, tokens, out)
        inner = activation(torch.baddbmm(select_clients(d).unsqueeze(1), y, down))
        outer = torch.baddbmm(select_clients(u).unsqueeze(1), inner, up)
        return output + outer.view(output.shape)

    return add


def _entries(stack: Tensor, axes: int, *, transposed: bool = False) -> Tensor:
    """Return the entries of a (K, ...) stack that the batch needs, (n, ...), maybe ``transposed``.

    A tensor that has ``axes`` axes has no client axis: it is all clients', and one entry.
    """
    if stack.ndim == axes:
        return (stack.mT if transposed else stack).unsqueeze(0)
    return select_clients(stack, transposed=transposed)


# The forwards below take x (n, tokens, in), weights (n, ...) of matrices or (n, 1, width) of
# vectors, and biases (n, 1, out). A parameter that is the model's own has no such first axis.


def _linear(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(x @ weight.transpose(-1, -2), bias)  # torch stores (out, in)


def _conv1d(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(x @ weight, bias)  # GPT-2 stores (in, out)


def _packed(module: PackedLinear, x: Tensor, _weight: None, bias: Tensor | None) -> Tensor:
    return _plus(module.product(x), bias)  # its matrix is all clients'


def _layer_norm(module: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Normalised without weights first: torch's kernel takes one vector for all rows.
    normalised = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _plus(normalised * weight.to(x.dtype), bias)


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias in the number format of the product, as torch's own layers do under autocast."""
    return product if bias is None else product + bias.to(product.dtype)


_FORWARDS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.LayerNorm: _layer_norm,
    PackedLinear: _packed,
}


def stackable(module: nn.Module) -> bool:
    """Return whether ``module`` can hold K values of its own parameters at once.

    One to which others gave a forward cannot: what it computes is not known here.
    """
    # The very type: a subclass may compute otherwise.
    return type(module) in _FORWARDS and "forward" not in vars(module)


def stacked(module: nn.Module, stacks: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward for ``module`` in which each client has parameters of its own.

    ``stacks``: these parameters, (K, ...), by their names in the module; others are the module's.
    ``row_owners`` says which client each row of the input, (rows, ..., in), is of.
    """
    forward = _FORWARDS[type(module)]

    def run(x: Tensor) -> Tensor:
        entries: dict[str, Tensor] = {}
        n = 1  # entries a parameter: one a client, or one a row where the rows of clients mix
        for name, stack in stacks.items():
            entry = select_clients(stack)
            n = len(entry)
            # A vector gets an axis for the tokens, (n, 1, width), along which it is repeated.
            entries[name] = entry.unsqueeze(1) if entry.ndim == 2 else entry
        weight = entries.get("weight", module._parameters.get("weight"))
        bias = entries.get("bias", module._parameters.get("bias"))
        y = forward(module, group_by_client(x, n), weight, bias)  # (n, tokens, out)
        return y.view(*x.shape[:-1], y.shape[-1])

    return run
