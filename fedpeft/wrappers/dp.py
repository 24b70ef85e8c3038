"""Differential privacy of whole clients: bounded updates, and noise in their sum.

The mechanism is that of McMahan et al. 2018 (DP-FedAvg) with the adaptive bound of Andrew et al.
2021. In a round each client sends the difference between what it has trained and what it was sent,
scaled down to an L2 norm of C. The server, or the clients together, add Gaussian noise to the sum
of these, and divide it by the number of clients that were expected: neither this number nor the
weights, which are equal, depend on anybody's data.

What is hidden is whether a client has taken part with its data or with none. What docs/security.md
says about it is tested in tests/contract/test_dp.py.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Final, Literal, final

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, mean_merge
from fedpeft.errors import BadInput
from fedpeft.privacy.accountant import Promise, left_over
from fedpeft.privacy.clipping import clipped, next_bound
from fedpeft.privacy.noise import gaussian
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wrappers.rows import Row, row_of, stacked

CLIP: Final = "clip"
"""The name of the bound in the wrapper's slice of the state."""

# Names on the wire.
_CLIP: Final = "dp.clip"
_WITHIN: Final = "dp.within"


@final
@dataclass(frozen=True)
class DP:
    """Differential privacy of whole clients: clipped updates, all of equal weight, and noise.

    For methods that merge by a mean. The epsilon so far is in the ledger and in reports; it needs
    the extra `privacy`. Noise comes from the operating system, so that a run cannot be repeated to
    the bit.
    """

    paper: ClassVar[str] = (
        "DP-FedAvg: McMahan et al. 2018, arXiv 1710.06963; adaptive clipping: Andrew et al. 2021, "
        "arXiv 1905.03871"
    )
    noise: Annotated[float, Gt(0)] = 1.0
    """Noise multiplier: standard deviation of the noise in a round's sum over what one client can
    change of it. More noise, smaller epsilon."""
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    """The delta at which epsilon is told; well below 1 / number of clients."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest L2 norm of a client's update, all tensors together; where `quantile` is set, that of
    the first round."""
    quantile: Annotated[float, Gt(0), Lt(1)] | None = None
    """Share of the updates that should be within the bound, which then follows it from round to
    round; Andrew et al. take 0.5. Left out: the bound is fixed."""
    clip_rate: Annotated[float, Gt(0)] = 0.2
    """How fast the bound follows; Andrew et al. take 0.2."""
    count_noise: Annotated[float, Gt(0)] | None = None
    """Standard deviation of the noise in the number of updates within the bound, over half of
    `noise`; left out: a twentieth of `cohort`, as Andrew et al. take, and at least `noise`."""
    sampling: Literal["cohort", "poisson"] = "cohort"
    """Who takes part. `cohort`: as without the wrapper; epsilon then counts every round in which a
    client was asked, for the one that was asked most. `poisson`: each client by itself, with
    probability `federation.clients_per_round` / clients, drawn by the server from the operating
    system's randomness; epsilon is then smaller, as long as nobody is told who took part."""
    sharers: Annotated[int, Ge(2)] | None = None
    """Left out, the server adds the noise. Otherwise the clients do, each so much that what so
    many of them add is enough; more make more. Needs `secagg` around it, with `smallest` of this
    number at least."""
    cohort: Annotated[int, Ge(1)] = 4
    """Clients that are expected in a round, by which the sum is divided, however many reply; where
    it is left out, `federation.clients_per_round`."""

    @property
    def promise(self) -> Promise:
        """Return what is accounted for."""
        return Promise("client", self.noise, self.delta, self.sampling == "poisson")

    @property
    def count_deviation(self) -> float:
        """Return the standard deviation of the noise in the number of updates within the bound."""
        return self.count_noise or max(self.cohort / 20, self.noise)

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with bounded updates and noise; BadInput where that cannot be."""
        if self.quantile is not None and 2 * self.count_deviation <= self.noise:
            raise BadInput(
                f"wrap.count_noise = {self.count_noise:g} of dp: leaves nothing of wrap.noise = "
                f"{self.noise:g} for the updates; choose more than {self.noise / 2:g}"
            )
        if self.sharers is not None and self.sampling == "poisson":
            raise BadInput(
                "wrap.sampling = 'poisson' of dp: with wrap.sharers the updates are hidden from "
                "the server, which knows who takes part; choose 'cohort'"
            )
        private = Private(method, owner, self)
        private.merge_of(0)
        return private


@final
@dataclass(frozen=True)
class Private:
    """A method whose clients send bounded differences, and whose server learns them with noise.

    The ``owner``'s slice of the state holds the bound.
    """

    paper: ClassVar[str] = DP.paper
    inner: Method
    owner: str
    settings: DP

    def merge_of(self, round_number: int) -> MeanMerge:
        """Return how the method inside merges a round; BadInput where that is no mean."""
        merge = mean_merge(self.inner, round_number)
        if merge is None:
            raise BadInput(
                f"wrap.name = 'dp': {type(self.inner).__name__} does not merge by a mean of what "
                "the clients trained (secagg goes around dp, before it in the file)"
            )
        return merge

    # The server's half.

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does, with the first bound."""
        bound = torch.tensor(self.settings.clip, dtype=torch.float64)
        return self.inner.init(base, seed).with_slice(self.owner, {CLIP: bound})

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends, and the bound."""
        sent = self.inner.send(state.without(self.owner), client)
        return {**sent, _CLIP: state.slice_of(self.owner)[CLIP]}

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect the differences of what is averaged, and whether they were within the bound."""
        sent = {name: tensor for name, tensor in down.items() if name != _CLIP}
        reply = self.inner.expects(state.without(self.owner), sent)
        expected: dict[str, Tensor] = {}
        for name, tensor in self._contribution_like(reply, state.round).items():
            expected[name] = tensor.to("meta")
        if self.settings.quantile is not None:
            expected[_WITHIN] = torch.empty((), dtype=torch.float64, device="meta")
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge the mean of the differences, with noise, as the method inside merges a mean.

        Here each reply is seen by itself, so one that is beyond the bound is scaled down again.
        """
        bounded = self._bounded_again(state, updates)
        return self.mean_merge(state.round).receive(state, bounded)

    def _bounded_again(self, state: State, updates: Iterable[Update]) -> Iterator[Update]:
        """Yield the updates as honest clients would have sent them."""
        sent = self.inner.send(state.without(self.owner), Client(0))
        bound = float(state.slice_of(self.owner)[CLIP])
        for update in updates:
            parts = dict(update.payload)
            within = parts.pop(_WITHIN, None)
            bounded = _bounded(parts, sent, bound)[0]
            if within is not None:
                bounded[_WITHIN] = within.clamp(-0.5, 0.5)
            yield replace(update, payload=bounded)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of sums, in which every client weighs the same."""
        del round_number
        return MeanMerge(
            weighting="uniform",
            contribution=lambda payload: payload,
            merge=self._merge,
            least=self.settings.sharers or 1,
        )

    def _merge(self, state: State, total: Mean) -> State:
        """Return the next state from the sums of the clients' differences."""
        inside, kept = state.without(self.owner), state.slice_of(self.owner)
        merge = self.merge_of(state.round)
        sums = total.sums()
        if not sums and self.settings.sampling == "cohort":  # a silent round tells nothing
            return merge.merge(inside, total).with_slice(self.owner, kept)
        # 1. What each client adds is the difference to what it was sent, which the server knows.
        sent = self.inner.send(inside, Client(0))
        like = self._contribution_like(self.inner.expects(inside, sent), state.round)
        bound = float(kept[CLIP])
        deviations = self._deviations(like, sent, bound)
        # 2. Where nobody was drawn the sum is 0; that it was nobody must not be seen.
        means: dict[str, Tensor] = {}
        for name, deviation in deviations.items():
            added = sums.get(name, torch.zeros(deviation.shape, dtype=torch.float64))
            if self.settings.sharers is None:
                added = added + gaussian(added.shape, deviation.scale)
            means[name] = added / self.settings.cohort
        # 3. Back from differences to what the method inside averages.
        within = means.pop(_WITHIN, None)
        for name in _trained(like, sent):
            means[name] = means[name] + sent[name].to(torch.float64)
        mean = Mean.of(means, 1.0, {name: tensor.dtype for name, tensor in like.items()})
        merged = merge.merge(inside, mean)
        # 4. The bound of the next round.
        if within is not None and self.settings.quantile is not None:
            share = 0.5 + float(within)
            bound = next_bound(bound, share, self.settings.quantile, self.settings.clip_rate)
        return merged.with_slice(self.owner, {CLIP: torch.tensor(bound, dtype=torch.float64)})

    def _contribution_like(self, reply: Payload, round_number: int) -> dict[str, Tensor]:
        """Return tensors with the forms of what is averaged of replies of the form ``reply``."""
        zeros = {name: torch.zeros(form.shape, dtype=form.dtype) for name, form in reply.items()}
        return dict(self.merge_of(round_number).contribution(zeros))

    def _deviations(self, like: Payload, sent: Payload, bound: float) -> "dict[str, _Noise]":
        """Return the noise that a sum of contributions of the form ``like`` needs.

        All parts together have the noise multiplier of the settings.
        """
        settings = self.settings
        noise = settings.noise
        deviations: dict[str, _Noise] = {}
        if settings.quantile is not None:
            # A client adds 1/2 or -1/2 to it: that is what it can change of it.
            deviations[_WITHIN] = _Noise(torch.Size(), settings.count_deviation)
            noise = left_over(noise, taken=2 * settings.count_deviation)
        trained = _trained(like, sent)
        others = like.keys() - trained
        if others:  # two halves, whose multipliers are each larger by the root of 2
            noise *= math.sqrt(2)
        for name, tensor in like.items():
            most = bound if name in trained else _most(like, others)
            deviations[name] = _Noise(tensor.shape, noise * most)
        return deviations

    # The client's half.

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the method inside does; what goes up is bounded, and tells no loss."""
        sent = {name: stack for name, stack in down.items() if name != _CLIP}
        with self.inner.mount(model, sent, memory, context) as task:
            reply = partial(self._reply, task, sent, down[_CLIP], context)
            yield replace(task, reply=reply, discreet=True)

    def _reply(
        self, task: LocalTask, sent: Payload, bounds: Tensor, context: Context
    ) -> tuple[Payload, Payload]:
        """Return each client's bounded difference, and what the method inside keeps."""
        merge = self.merge_of(context.round)
        up, stays = task.reply()
        ups: list[Row] = []
        for row in range(len(context.clients)):
            trained = merge.contribution(row_of(up, row))
            ups.append(self._up(trained, row_of(sent, row), float(bounds[row])))
        return stacked(ups), stays

    def _up(self, contribution: Payload, sent: Payload, bound: float) -> Row:
        """Return what one client adds to the sum, with its share of the noise where it has one."""
        differences = dict(contribution)
        for name in _trained(contribution, sent):
            exact = contribution[name].to(torch.float64)
            differences[name] = exact - sent[name].to(torch.float64)
        bounded, within = _bounded(differences, sent, bound)
        if self.settings.quantile is not None:
            bounded[_WITHIN] = torch.tensor(0.5 if within else -0.5, dtype=torch.float64)
        if self.settings.sharers is not None:
            # Variances add up: those of so many clients make up the whole.
            share = 1 / math.sqrt(self.settings.sharers)
            for name, noise in self._deviations(contribution, sent, bound).items():
                bounded[name] = bounded[name] + gaussian(noise.shape, share * noise.scale)
        ups: Row = {}
        for name, tensor in bounded.items():
            dtype = contribution[name].dtype if name in contribution else tensor.dtype
            ups[name] = tensor.to(dtype)
        return ups


@final
@dataclass(frozen=True)
class _Noise:
    """The noise of one tensor of a sum: its ``shape``, and its standard deviation, ``scale``."""

    shape: torch.Size
    scale: float


def _trained(contribution: Payload, sent: Payload) -> frozenset[str]:
    """Return the names of what was sent and comes back trained; others are votes and the like.

    Whatever its dtype, unlike ``is_difference``: exact differences are float64, what was sent is
    not.
    """
    return frozenset(
        name
        for name, tensor in contribution.items()
        if name in sent and sent[name].shape == tensor.shape
    )


def _bounded(parts: Payload, sent: Payload, bound: float) -> tuple[Row, bool]:
    """Return differences and votes within their bounds, and whether the differences were."""
    differences: Row = {}
    others: Row = {}
    trained = _trained(parts, sent)
    for name, tensor in parts.items():
        part = differences if name in trained else others
        part[name] = tensor
    bounded, within = clipped(differences, bound)
    # What was not sent, as votes, is from 0 to 1, and so within its bound by itself.
    return bounded | clipped(others, _most(parts, others))[0], within


def _most(contribution: Payload, names: Iterable[str]) -> float:
    """Return the largest norm of tensors whose values are from 0 to 1."""
    return math.sqrt(sum(contribution[name].numel() for name in names))
