"""Mount tensors on a model for the length of a ``with``; names and shapes decide where."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.algebra.lowrank import by_module
from fedpeft.errors import NotStackable, WireError
from fedpeft.mounting.branches import bottleneck, branches, check_branch, stackable, stacked
from fedpeft.mounting.layers import dense_shape, oriented
from fedpeft.mounting.packed import PackedLinear
from fedpeft.mounting.rows import is_for_copies
from fedpeft.mounting.tracing import Place, claimed
from fedpeft.types import Context, Payload


def trainable(tensors: Payload) -> dict[str, nn.Parameter]:
    """Return fresh parameters with the values of ``tensors``: what a client may train.

    >>> sent = {"query:A": torch.ones(1, 2, 3)}
    >>> trained = trainable(sent)["query:A"]
    >>> trained.requires_grad, trained.data_ptr() == sent["query:A"].data_ptr()
    (True, False)
    """
    parameters: dict[str, nn.Parameter] = {}
    for name, tensor in tensors.items():
        # torch's fused optimizers step a parameter and its gradient in the order of their memory.
        parameters[name] = nn.Parameter(tensor.clone(memory_format=torch.contiguous_format))
    return parameters


def detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of ``parameters`` without their history: what a client may send.

    >>> detached({"w": nn.Parameter(torch.ones(2))})
    {'w': tensor([1., 1.])}
    """
    return {name: tensor.detach() for name, tensor in parameters.items()}


def specs(payload: Payload) -> dict[str, Tensor]:
    """Return the names, shapes and dtypes of ``payload``, as tensors without values.

    >>> spec = specs({"w": torch.ones(2, 3)})["w"]
    >>> spec.shape, spec.dtype, spec.is_meta
    (torch.Size([2, 3]), torch.float32, True)
    """
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in payload.items()}


def plain_parameters(tensors: Payload) -> dict[str, Tensor]:
    """Return what of ``tensors`` has a plain name: parameters of the model, no parts of branches.

    >>> list(plain_parameters({"query:A": torch.ones(1, 2, 3), "head.bias": torch.ones(1, 4)}))
    ['head.bias']
    """
    return {name: tensor for name, tensor in tensors.items() if ":" not in name}


@contextmanager
def mounted(model: nn.Module, tensors: Payload, scale: float = 1.0) -> Iterator[None]:
    """Mount ``tensors``, each (K, ...), on ``model``: branches, and parameters for plain names.

    A branch is ``<module>:A``, ``:B`` and maybe ``:e``, which add scale * B diag(e) A to the
    layer's matrix, or ``<module>:dense``, which adds scale * dense, or both. A branch without the
    client axis is the same for all clients, and one product serves the whole batch. A name that the
    model lacks, a shape or dtype that does not fit, or a parameter that cannot carry K > 1 clients
    raises WireError.

    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> x = torch.ones(1, 3)
    >>> adapter = {"0:A": torch.ones(1, 1, 3), "0:B": torch.ones(1, 2, 1)}
    >>> with mounted(model, adapter, scale=2.0):
    ...     adapted = model(x)
    >>> (adapted - model(x)).round().tolist()
    [[6.0, 6.0]]
    """
    plain = plain_parameters(tensors)
    check_dtypes(model, tensors)
    _check_shapes(model, plain)
    clients = {len(tensor) for tensor in plain.values()}  # sizes of client axes: {K}, or empty
    with ExitStack() as undo:
        for name, factors in by_module(tensors).items():
            clients |= check_branch(name, factors, dense_shape(model, name))
            module = model.get_submodule(name)
            for branch in branches(factors, scale):
                handle = module.register_forward_hook(branch)
                undo.callback(handle.remove)
                undo.enter_context(claimed([(module, "_forward_hooks", handle.id)]))
        if len(clients) > 1:
            raise WireError(
                f"the message's tensors are for different numbers of clients: {sorted(clients)}"
            )
        if not plain or (clients <= {1} and not is_for_copies()):
            # One ordinary kernel for one client: its parameters stand in for the model's own.
            alone: dict[str, Callable[[Tensor], Tensor]] = {}
            for name, stack in plain.items():
                alone[name] = partial(only_clients, stack)
            undo.enter_context(replaced(model, alone))
        else:
            undo.enter_context(_side_by_side(model, plain))
        yield


def check_alone(context: Context, what: str) -> None:
    """Raise NotStackable where ``what`` would have to carry several clients, or copies of rows."""
    if len(context.clients) > 1 or is_for_copies():
        raise NotStackable(f"{what} cannot carry several clients at once; use a stack of 1")


def check_dtypes(model: nn.Module, tensors: Payload) -> None:
    """Raise WireError for a tensor of a dtype with which ``model`` does not compute.

    >>> check_dtypes(nn.Linear(2, 1), {"bias": torch.ones(1, 1, dtype=torch.float64)})
    Traceback (most recent call last):
    fedpeft.errors.WireError: bias is of torch.float64, with which this model does not compute
    """
    # What is trained is float32 also where the base is kept in fewer bits.
    dtypes = {torch.float32, *(parameter.dtype for parameter in model.parameters())}
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes or not tensor.is_floating_point():
            raise WireError(f"{name} is of {tensor.dtype}, with which this model does not compute")


def _check_shapes(model: nn.Module, plain: Payload) -> None:
    """Raise WireError where tensors that stand in for parameters, (K, ...), have other shapes."""
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    for name, stack in plain.items():
        parameter = everywhere.get(name)
        if parameter is not None and stack.shape[1:] != parameter.shape:
            size, fitting = tuple(stack.shape), tuple(parameter.shape)
            raise WireError(f"{name} is {size}; {fitting} after a client axis would fit")


@contextmanager
def bottlenecks(
    model: nn.Module, tensors: Payload, activation: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Mount small networks behind dense layers: U f(D y + d) + u is added to an output y.

    ``tensors``: ``<module>:D`` (K, m, out), ``:d`` (K, m), ``:U`` (K, out, m) and ``:u`` (K, out).
    ``activation``: f. Names, shapes or dtypes that do not fit raise WireError.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> shapes = {"D": (1, 1, 2), "d": (1, 1), "U": (1, 2, 1), "u": (1, 2)}
    >>> tensors = {f"0:{part}": torch.ones(shape) for part, shape in shapes.items()}
    >>> with bottlenecks(model, tensors, torch.relu):
    ...     adapted = model(torch.zeros(1, 3))
    >>> bool((adapted >= model(torch.zeros(1, 3)) + 1).all())
    True
    """
    check_dtypes(model, tensors)
    with ExitStack() as undo:
        for name, parts in by_module(tensors).items():
            out = dense_shape(model, name)[0]
            width = parts["d"].shape[-1] if "d" in parts else 0
            due = {"D": (width, out), "d": (width,), "U": (out, width), "u": (out,)}
            shapes = {part: tuple(tensor.shape[1:]) for part, tensor in parts.items()}
            if shapes != due:
                raise WireError(f"the adapter behind {name!r} has {shapes}; {due} would fit")
            module = model.get_submodule(name)
            handle = module.register_forward_hook(bottleneck(parts, activation))
            undo.callback(handle.remove)
            undo.enter_context(claimed([(module, "_forward_hooks", handle.id)]))
        yield


@contextmanager
def replaced(model: nn.Module, makers: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let ``makers[name](parameter)`` stand in for the parameter of that name.

    It is made anew before every forward pass. Tied parameters are replaced wherever they are used.
    When the ``with`` ends, the very same parameter objects are back.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> with replaced(model, {"0.weight": lambda weight: 0 * weight}):
    ...     nothing = model(torch.ones(1, 2))
    >>> nothing.item(), model(torch.ones(1, 2)).item() != 0
    (0.0, True)
    """
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    homes: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, places in _places(everywhere, makers).items():
        homes[name] = [_home(model, place) for place in places]

    def put(name: str, tensor: Tensor) -> None:
        for module, attribute in homes[name]:
            # ``setattr`` would refuse the result of a computation, which is a plain tensor.
            module._parameters[attribute] = cast(nn.Parameter, tensor)

    def refresh(*_: object) -> None:
        for name, make in makers.items():
            put(name, make(everywhere[name]))

    # Before every pass: after a backward pass the graph behind the last tensors is gone.
    handle = model.register_forward_pre_hook(refresh)
    ours: list[Place] = [(model, "_forward_pre_hooks", handle.id)]
    for held_by in homes.values():
        ours += [(module, "_parameters", attribute) for module, attribute in held_by]
    try:
        with claimed(ours):
            refresh()  # for those who read the parameters before any pass
            yield
    finally:
        handle.remove()
        for name in makers:
            put(name, everywhere[name])


@contextmanager
def shifted(model: nn.Module, makers: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Let W + ``makers[name]()`` stand in for the matrix W, (out, in), of each dense layer named.

    The difference is made anew in every forward pass. A packed W is left alone: the product with
    the difference is added to the layer's output.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> x = torch.ones(1, 2)
    >>> with shifted(model, {"0": lambda: torch.ones(1, 2)}):
    ...     more = model(x)
    >>> (more - model(x)).round().item()
    2.0
    """
    weights: dict[str, Callable[[Tensor], Tensor]] = {}
    with ExitStack() as undo:
        for name, make in makers.items():
            module = model.get_submodule(name)
            if isinstance(module, PackedLinear):
                handle = module.register_forward_hook(partial(_add_product, make))
                undo.callback(handle.remove)
                undo.enter_context(claimed([(module, "_forward_hooks", handle.id)]))
            else:
                weights[f"{name}.weight"] = partial(_sum, model, name, make)
        undo.enter_context(replaced(model, weights))
        yield


def _sum(model: nn.Module, name: str, make: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """Return W + difference, the way round in which the layer stores its ``weight`` W."""
    return weight + oriented(model, name, make())


def _add_product(
    make: Callable[[], Tensor], _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Return the output of a layer with the product of its input and the difference added."""
    return output + functional.linear(args[0], make())


@contextmanager
def _side_by_side(model: nn.Module, plain: Payload) -> Iterator[None]:
    """Give modules whose parameters are in ``plain``, (K, ...), a forward that keeps clients apart.

    A module for which there is no such forward raises NotStackable.
    """
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    stacks: dict[str, dict[str, Tensor]] = {}  # module -> attribute -> (K, ...)
    for name, places in _places(everywhere, plain).items():
        for place in places:
            home, _, attribute = place.rpartition(".")
            stacks.setdefault(home, {})[attribute] = plain[name]
    changed = {name: model.get_submodule(name) for name in stacks}
    # All are checked before any is changed.
    for name, module in changed.items():
        if not stackable(module):
            kind = type(module).__name__
            raise NotStackable(
                f"the parameters of {name!r} ({kind}) cannot carry several clients at once; "
                "use a stack of 1"
            )
    with ExitStack() as undo:
        for name, module in changed.items():
            undo.enter_context(overridden(module, stacked(module, stacks[name])))
            undo.enter_context(claimed([(module, "__dict__", "forward")]))
        yield


@contextmanager
def overridden(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let ``forward`` stand in for that of ``module`` for the length of a ``with``.

    When the ``with`` ends, the module has again what it had: the forward of its class, or one that
    others gave this module.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            # Deleted, not set to the class's: a bound method in the instance would be a change.
            vars(module).pop("forward", None)
        else:
            module.forward = before


@contextmanager
def standing_in(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let ``other`` compute what ``model`` is asked for, in the mode in which ``model`` is.

    For the length of a ``with``.

    >>> model, other = nn.Sequential(nn.Identity()), nn.Sequential(nn.ReLU())
    >>> with standing_in(model, other):
    ...     model(torch.tensor(-1.0)).item()
    0.0
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if other.training != model.training:
            other.train(model.training)
        return other(*args, **kwargs)

    with overridden(model, forward), claimed([(model, "__dict__", "forward")]):
        yield


def only_clients(stack: Tensor, parameter: Tensor) -> Tensor:
    """Return the only client's tensor of a stack, (1, ...), in the place of ``parameter``."""
    del parameter
    return stack.squeeze(0)  # a view; indexing would copy the whole gradient


def _home(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    """Return the module in which the parameter named ``place`` lies, and its name there."""
    home, _, attribute = place.rpartition(".")
    return model.get_submodule(home), attribute


def _places(everywhere: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each of ``names`` all names of that parameter: it may be tied to others."""
    # Tied parameters are one object under several names; tensors hash by identity.
    twins: dict[Tensor, list[str]] = {}
    for name, parameter in everywhere.items():
        twins.setdefault(parameter, []).append(name)
    for name in names:
        if name not in everywhere:
            raise WireError(f"the message holds parameter {name!r}, which this model lacks")
    return {name: twins[everywhere[name]] for name in names}
