"""Bottleneck adapters: small networks behind sublayers (Houlsby et al. 2019, Pfeiffer et al. 2020).

FeDeRA's comparison calls the method FedAP.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import check_ranks, uniform
from fedpeft.mounting import (
    Targets,
    bottlenecks,
    detached,
    mounted,
    plain_parameters,
    select,
    specs,
    trainable,
)
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update

FEED_FORWARD = (
    r"((?<!attention)\.output\.dense|ffn\.lin2|ffn_output|mlp\.c_proj|down_proj|fc2|wo|"
    r"dense_4h_to_h|layer_2|ff\.2)$"
)
"""What families call the last layer of a feed-forward block."""
ATTENTION = (
    r"(attention\.output\.dense|attention\.dense|attention\.out_lin|attn\.c_proj|o_proj|out_proj|"
    r"Attention\.o|attn\.o|rel_attn\.o|attn\.Wo)$"
)
"""What families call the last layer of an attention block."""

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}
PLACES: Mapping[str, str] = {
    "houlsby": f"{ATTENTION}|{FEED_FORWARD}",
    "pfeiffer": FEED_FORWARD,
}
"""Words for the layers behind which adapters stand."""


@final
@dataclass(frozen=True)
class Adapters:
    """Train U f(D y + d) + u behind the outputs y of sublayers, and average it.

    They stand before the sublayer's residual connection; layer norms stay as they are. That is
    Houlsby's place. Pfeiffer's, behind the layer norm, is a reconstruction at the same layer.
    """

    paper: ClassVar[str] = (
        "Adapters: Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247"
    )
    targets: Targets = "houlsby"
    """Behind which dense layers adapters stand: `houlsby`, the last ones of attention and of
    feed-forward blocks; `pfeiffer`, those of feed-forward blocks alone; a pattern or a list of
    endings."""
    width: Annotated[int, Ge(1)] = 16
    """Width m of the bottleneck. Reconstruction; Houlsby et al. try 8 to 256."""
    activation: Literal["gelu", "relu"] = "gelu"
    """The function f in the bottleneck: Houlsby's code has `gelu`, Pfeiffer's `relu`."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Draw D, (m, out), from the seed; U, (out, m), is 0, so the model starts unchanged."""
        layers = select(base, _pattern(self.targets))
        start: dict[str, Tensor] = {}
        for name, weight in layers.items():
            out = weight.shape[0]
            check_ranks({name: weight.new_zeros(out, out)}, self.width, "method.width")
            start[f"{name}:D"] = uniform(self.width, out, seed, name)
            start[f"{name}:d"] = torch.zeros(self.width)
            start[f"{name}:U"] = torch.zeros(out, self.width)
            start[f"{name}:u"] = torch.zeros(out)
        return State(0, start | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send adapters and head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount an adapter behind every layer that has one; all are trained and go up."""
        del memory, context
        trained = trainable(down)
        head = plain_parameters(trained)
        adapters = {name: tensor for name, tensor in trained.items() if name not in head}
        function = FUNCTIONS[self.activation]
        with bottlenecks(model, adapters, function), mounted(model, head):
            yield LocalTask(trained, lambda: (detached(trained), {}))

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect adapters and head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average adapters and head."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)


def _pattern(targets: Targets) -> Targets:
    """Return what a word of ``PLACES`` stands for, and all else as it is."""
    match targets:
        case str():
            return PLACES.get(targets, targets)
        case _:
            return targets
