"""Gradient checkpointing: blocks are computed once more in the backward pass, not remembered."""

from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar, Token, copy_context
from functools import partial
from typing import Any, final

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedpeft.errors import BadInput
from fedpeft.models.choice import ModelSection


def checkpoint_blocks(model: nn.Module, choice: ModelSection) -> None:
    """Let every block of ``model`` be computed once more in a backward pass of training.

    A family that transformers cannot do that for raises BadInput.
    """
    again = partial(
        checkpoint,
        use_reentrant=False,
        # Without dropout nothing in a block is drawn.
        preserve_rng_state=choice.dropout > 0,
        context_fn=_contexts,
    )
    transformer: Any = model
    if not transformer.supports_gradient_checkpointing:
        raise BadInput(
            f"model.checkpointing = true: {choice.name} is of a family whose blocks cannot be "
            "computed twice; leave it out"
        )
    # Not ``activation_checkpointing_enable``, which makes the outputs of embeddings require
    # gradients: nothing below the lowest trained layer needs any.
    transformer._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)


def _contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts of a block's first computation and of its second one."""
    # What is mounted asks context variables whose rows a batch holds. The backward pass comes after
    # the ``with`` that set them has ended, and on a GPU in a thread of its own.
    return nullcontext(), _As(copy_context())


@final
class _As(AbstractContextManager[None]):
    """Sets all context variables as they are in ``context`` for the length of a ``with``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tokens: list[tuple[ContextVar[Any], Token[Any]]] = []

    def __enter__(self) -> None:
        for variable, value in self._context.items():
            self._tokens.append((variable, variable.set(value)))

    def __exit__(self, *_: object) -> None:
        while self._tokens:
            variable, token = self._tokens.pop()
            variable.reset(token)
