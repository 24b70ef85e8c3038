"""Secure aggregation: the server learns the sum of the replies and no single one.

The protocol is that of Bonawitz et al. 2017; its cryptography is in ``fedpeft/secagg``. A round has
four exchanges:

0. Train, as the method inside does; the reply holds two public keys, the update stays.
1. Share keys: shares of the client's secrets go to all members, each sealed for its recipient.
2. Mask: the update goes up under a mask with every other member and one of its own.
3. Unmask: shares go up by which the server takes off the masks of the sum.

What docs/security.md says about it is tested in tests/laws/test_secagg_transcript.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Final, Literal, final

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, mean_merge
from fedpeft.errors import BadInput, WireError
from fedpeft.secagg import client as member
from fedpeft.secagg import server as opening
from fedpeft.secagg.fixed_point import FixedPoint
from fedpeft.secagg.keys import KEY, commitment, new_secret, private_key, public_bytes
from fedpeft.secagg.roster import Roster, Rules
from fedpeft.secagg.shamir import SHARE
from fedpeft.secagg.summands import (
    Form,
    as_bytes,
    as_table,
    as_tensor,
    form_of,
    is_within,
    joined,
    out_of_range,
    rows_of,
    weighted,
)
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wire.versions import lasting, once
from fedpeft.wrappers.rows import Row, row_of, stacked

TRAIN, SHARE_KEYS, MASK, UNMASK = range(4)
"""The phases of a round."""

# Names on the wire.
_KEYS: Final = "secagg.keys"
_MEMBERS: Final = "secagg.members"
_BOXES: Final = "secagg.boxes"
_SEAL: Final = "secagg.seal"
_ALIVE: Final = "secagg.alive"
_MASKED: Final = "secagg.masked"
_SENT: Final = "secagg.sent"
_SHARES: Final = "secagg.shares"

_FORMS: Final = {
    _MEMBERS: (torch.int64, ()),
    _KEYS: (torch.uint8, (2, KEY)),
    _ALIVE: (torch.bool, ()),
    _SENT: (torch.bool, ()),
    _BOXES: (torch.uint8, (member.BOX,)),
}
"""What a request has for each member, by name: dtype and shape."""


@final
@dataclass(frozen=True)
class SecAgg:
    """Sum the clients' updates under masks, so that the server sees nothing but the sum.

    For methods that merge by a weighted mean. The weight is summed up, too, as one more number.
    """

    paper: ClassVar[str] = "SecAgg: Bonawitz et al. 2017, doi 10.1145/3133956.3133982"
    later: ClassVar[int] = UNMASK - TRAIN
    range: Annotated[float, Ge(1)] = 16.0
    """Largest absolute value of a trained number. A client with a larger one takes no part in the
    round, and the ledger names tensor and value."""
    bits: Literal[24, 32, 40, 48, 56] = 40
    """Bits of a number on its way up. More give a finer step: what is left of them after `range`,
    `examples` and the number of clients is behind the point."""
    examples: Annotated[int, Ge(1), Le(10**12)] = 65536
    """Most training examples of a client, which are its weight."""
    threshold: Annotated[float, Gt(0.5), Le(1)] = 0.6
    """Share of a round's members that can open the sum. So many have to stay to the end, and so
    many would have to collude with the server to open a single update."""
    smallest: Annotated[int, Ge(2)] = 3
    """Fewest clients of a sum."""

    @property
    def least(self) -> int:
        """Return the fewest replies of a round that changes anything."""
        return self.smallest

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with its replies summed under masks; BadInput where they are no sum."""
        secure = Secure(method, owner, self)
        least = secure.merge_of(0).least
        if self.smallest < least:
            raise BadInput(
                f"wrap.smallest = {self.smallest} of secagg: the method inside shares its noise "
                f"among {least} clients (wrap.sharers of dp), and a sum of fewer would have too "
                f"little; choose at least {least}"
            )
        return secure


@final
@dataclass(frozen=True)
class Secure:
    """A method whose updates are summed under masks before the server sees them.

    What a round's server needs from one exchange to the next is in the ``owner``'s slice of the
    state, and what a client needs is in its memory, for the next exchange alone.
    """

    paper: ClassVar[str] = SecAgg.paper
    inner: Method
    owner: str
    settings: SecAgg

    @property
    def rules(self) -> Rules:
        """Return how many clients a sum needs."""
        return Rules(self.settings.threshold, self.settings.smallest)

    def merge_of(self, round_number: int) -> MeanMerge:
        """Return how the method inside merges a round; BadInput where that is no weighted sum."""
        merge = mean_merge(self.inner, round_number)
        if merge is None:
            raise BadInput(
                f"wrap.name = 'secagg': {type(self.inner).__name__} does not merge by a weighted "
                "sum of what the clients trained, and masks cancel in nothing else; choose another "
                "method, or leave the wrapper out"
            )
        return merge

    # The server's half.

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends; afterwards keys, who is left, and boxes."""
        kept = state.slice_of(self.owner)
        if state.phase == TRAIN:
            return self.inner.send(self._inside(state), client)
        if state.phase == SHARE_KEYS:
            return {_MEMBERS: kept["members"], _KEYS: kept["keys"]}
        if state.phase == MASK:
            return {_ALIVE: kept["alive"]}
        # The boxes that all others have sent to this client.
        index = kept["members"].tolist().index(client.id)
        return {_SENT: kept["sent"], _BOXES: kept["boxes"][:, index]}

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect keys; then boxes for all members; masked numbers; and shares of all members."""
        del down
        members = len(state.slice_of(self.owner).get("members", ()))
        if state.phase == TRAIN:
            return {_KEYS: _bytes_of(2, KEY)}
        if state.phase == SHARE_KEYS:
            return {_BOXES: _bytes_of(members, member.BOX), _SEAL: _bytes_of(KEY)}
        if state.phase == MASK:
            numbers = self._form(state).numbers
            return {_MASKED: _bytes_of(numbers * self._fixed_point(state.round, members).size)}
        return {_SHARES: _bytes_of(members, SHARE)}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Return the state of the next phase; after the last one, merge the sum.

        WireError where too few clients are left, and where their shares do not fit together.
        """
        steps: list[Callable[[State, Iterable[Update]], State]] = [
            self._receive_keys,
            self._receive_boxes,
            self._receive_masked,
            self._receive_shares,
        ]
        return steps[state.phase](state, updates)

    def _receive_keys(self, state: State, updates: Iterable[Update]) -> State:
        """Collect the members of the round and their public keys."""
        keys: dict[int, Tensor] = {}
        for update in updates:
            keys[update.client.id] = update.payload[_KEYS].clone()
        if not keys:  # a silent round
            return self._merged(state, Mean())
        members = sorted(keys)
        self._check_enough(len(members), len(members))
        self._fixed_point(state.round, len(members))  # BadInput where they are too many
        kept = {"members": torch.tensor(members), "keys": torch.stack([keys[k] for k in members])}
        return replace(state, phase=SHARE_KEYS).with_slice(self.owner, kept)

    def _receive_boxes(self, state: State, updates: Iterable[Update]) -> State:
        """Collect the boxes, (sender, recipient, bytes), and the commitments to the seeds."""
        kept = state.slice_of(self.owner)
        members: list[int] = kept["members"].tolist()
        count = len(members)
        alive = torch.zeros(count, dtype=torch.bool)
        boxes = torch.zeros(count, count, member.BOX, dtype=torch.uint8)
        seals = torch.zeros(count, KEY, dtype=torch.uint8)
        for update in updates:
            index = members.index(update.client.id)
            alive[index] = True
            boxes[index] = update.payload[_BOXES]
            seals[index] = update.payload[_SEAL]
        self._check_enough(int(alive.sum()), count)
        kept |= {"alive": alive, "boxes": boxes, "seals": seals}
        return replace(state, phase=MASK).with_slice(self.owner, kept)

    def _receive_masked(self, state: State, updates: Iterable[Update]) -> State:
        """Sum up what is masked, one reply in memory at a time."""
        kept = state.slice_of(self.owner)
        members: list[int] = kept["members"].tolist()
        sent = torch.zeros(len(members), dtype=torch.bool)
        fixed_point = self._fixed_point(state.round, len(members))
        total = np.zeros(self._form(state).numbers, dtype=np.uint64)
        for update in updates:
            sent[members.index(update.client.id)] = True
            fixed_point.add_packed(total, update.payload[_MASKED].numpy())
        self._check_enough(int(sent.sum()), len(members))
        kept |= {"sent": sent, "sum": torch.from_numpy(total.view(np.int64))}
        return replace(state, phase=UNMASK).with_slice(self.owner, kept)

    def _receive_shares(self, state: State, updates: Iterable[Update]) -> State:
        """Take the masks off the sum, and merge it as the method inside does."""
        kept = state.slice_of(self.owner)
        members: list[int] = kept["members"].tolist()
        told: dict[int, list[bytes]] = {}
        for update in updates:
            told[members.index(update.client.id)] = rows_of(update.payload[_SHARES])
        roster = _roster(state.round, kept["members"], kept["keys"])
        sent: list[bool] = kept["sent"].tolist()
        secrets = opening.recover(
            roster=roster,
            seals=rows_of(kept["seals"]),
            alive=kept["alive"].tolist(),
            sent=sent,
            told=told,
            enough=self.rules.enough(len(members)),
        )
        total = kept["sum"].clone().numpy().view(np.uint64)
        opening.uncover(total, roster, sent, secrets)
        numbers = self._fixed_point(state.round, len(members)).decode(total)
        return self._merged(state, self._form(state).mean(numbers))

    def _check_enough(self, count: int, members: int) -> None:
        """Raise WireError where fewer than the rules ask for are left of so many ``members``."""
        enough = self.rules.enough(members)
        if count < enough:
            raise WireError(f"secagg: {count} clients are left, {enough} needed")

    def _inside(self, state: State) -> State:
        """Return the state as the method inside knows it, whose rounds have one exchange."""
        return replace(state.without(self.owner), phase=TRAIN)

    def _merged(self, state: State, total: Mean) -> State:
        """Return the state of the next round; nothing of this one's keys is left in it."""
        return self.merge_of(state.round).merge(self._inside(state), total)

    def _form(self, state: State) -> Form:
        """Return the form of what each client's update adds to the sum."""
        inside = self._inside(state)
        # What is sent may differ from client to client, but not what they contribute.
        down = self.inner.send(inside, Client(0))
        reply = self.inner.expects(inside, down)
        return form_of(self.merge_of(state.round).contribution, reply)

    def _fixed_point(self, round_number: int, members: int) -> FixedPoint:
        """Return how numbers are written in a round of so many ``members``."""
        settings = self.settings
        by_examples = self.merge_of(round_number).weighting == "examples"
        heaviest = settings.examples if by_examples else 1
        return FixedPoint.fitting(settings.bits, members, settings.range * heaviest)

    # The client's half.

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the method inside does; the later exchanges of a round train nothing."""
        if context.phase == TRAIN:
            with self.inner.mount(model, down, lasting(memory), context) as task:
                reply = partial(self._after_training, task, context)
                yield replace(task, reply=reply, discreet=True)
            return
        # Each client for itself: from here on there is nothing to compute side by side.
        steps = {SHARE_KEYS: self._share_keys, MASK: self._mask, UNMASK: self._tell_shares}
        if context.phase not in steps:
            raise WireError(f"a round of secagg has no phase {context.phase}")
        step, secrets = steps[context.phase], once(memory)

        def reply_of_all() -> tuple[Payload, Payload]:
            ups: list[Row] = []
            stays: list[Row] = []
            for row, client in enumerate(context.clients):
                kept = row_of(secrets, row)
                _check_when(kept, client, context)
                up, keeps = step(row_of(down, row), kept, client, context)
                ups.append(up)
                stays.append({**keeps, "!when": torch.tensor([context.round, context.phase])})
            return stacked(ups), stacked(stays)

        yield LocalTask({}, reply_of_all, steps=0, discreet=True)

    def _after_training(self, task: LocalTask, context: Context) -> tuple[Payload, Payload]:
        """Reply with public keys; keep the update, and what the method inside keeps."""
        merge = self.merge_of(context.round)
        up, stays = task.reply()
        ups: list[Row] = []
        secrets: list[Row] = []
        for row, client in enumerate(context.clients):
            weight = context.examples[row] if merge.weighting == "examples" else 1
            update = merge.contribution(row_of(up, row))
            numbers = joined(update)
            if fault := self._fault(update, numbers, weight):
                raise WireError(f"client {client}: {fault}")
            own_secrets = [new_secret(), new_secret()]  # for masks and for boxes
            keys = as_table([public_bytes(private_key(secret)) for secret in own_secrets])
            ups.append({_KEYS: keys})
            secrets.append(
                {
                    "!when": torch.tensor([context.round, TRAIN]),
                    "!secrets": as_table(own_secrets),
                    "!own_keys": keys,
                    "!weight": torch.tensor(weight, dtype=torch.float64),
                    "!update": numbers,  # the names play no role from here on
                }
            )
        return stacked(ups), {**stays, **stacked(secrets)}

    def _fault(self, update: Payload, numbers: Tensor, weight: int) -> str:
        """Return why an update, whose ``numbers`` are joined, cannot be summed; empty if it can."""
        if weight > self.settings.examples:
            most = self.settings.examples
            return f"holds {weight} examples, more than wrap.examples = {most} of secagg"
        if is_within(numbers, self.settings.range):
            return ""
        return out_of_range(update, self.settings.range)

    def _share_keys(self, down: Row, kept: Row, client: int, context: Context) -> tuple[Row, Row]:
        """Draw the seed of the own mask; give every member shares of it and of the mask key."""
        members = _field(down, _MEMBERS)
        keys = _field(down, _KEYS, len(members))
        roster = _roster(context.round, members, keys)
        mask_key, box_key = rows_of(kept["!own_keys"])
        me = roster.check(self.rules, client, (mask_key, box_key))
        enough = self.rules.enough(len(roster.members))
        mask_secret, box_secret = rows_of(kept["!secrets"])
        to_others, from_others = member.box_keys(roster, me, box_secret)
        secrets = mask_secret, new_secret()
        boxes, own_shares = member.share_secrets(roster, me, enough, to_others, secrets)
        up = {_BOXES: as_table(boxes), _SEAL: as_tensor(commitment(secrets[1]))}
        stays = {
            "!weight": kept["!weight"],
            "!update": kept["!update"],
            "!secrets": as_table(secrets),
            "!own_shares": as_tensor(own_shares),
            # The private key of boxes is forgotten: it would give these keys and, beside them,
            # those of the boxes that were sent, which nobody needs any more.
            "!box_keys": as_table(from_others),
            "!members": members,
            "!keys": keys,
        }
        return up, stays

    def _mask(self, down: Row, kept: Row, client: int, context: Context) -> tuple[Row, Row]:
        """Send the weighted update under the masks; forget it, and the secrets of the masks."""
        roster = _roster(context.round, kept["!members"], kept["!keys"])
        alive: list[bool] = _field(down, _ALIVE, len(roster.members)).tolist()
        everyone = [True] * len(roster.members)
        roster.check_part(self.rules, alive, within=everyone)
        me = roster.members.index(client)
        fixed_point = self._fixed_point(context.round, len(roster.members))
        numbers = fixed_point.encode(weighted(kept["!update"], float(kept["!weight"])))
        mask_secret, seed = rows_of(kept["!secrets"])
        masked = member.hide(numbers, roster, me, (mask_secret, seed), alive)
        stays = {name: kept[name] for name in ("!box_keys", "!own_shares", "!members", "!keys")}
        stays["!alive"] = torch.tensor(alive)
        return {_MASKED: torch.from_numpy(fixed_point.pack(masked))}, stays

    def _tell_shares(self, down: Row, kept: Row, client: int, context: Context) -> tuple[Row, Row]:
        """Tell one share of every member's secrets, once; forget all there is to tell."""
        roster = _roster(context.round, kept["!members"], kept["!keys"])
        alive: list[bool] = kept["!alive"].tolist()
        sent: list[bool] = _field(down, _SENT, len(roster.members)).tolist()
        roster.check_part(self.rules, sent, within=alive)
        me = roster.members.index(client)
        boxes: dict[int, bytes] = {}
        for index, box in enumerate(rows_of(_field(down, _BOXES, len(roster.members)))):
            if alive[index] and index != me:
                boxes[index] = box
        shares = member.open_boxes(roster, rows_of(kept["!box_keys"]), boxes)
        own = as_bytes(kept["!own_shares"])
        shares[me] = own[:SHARE], own[SHARE:]
        told = [bytes(SHARE)] * len(roster.members)
        for index, share in member.shares_to_open(shares, sent).items():
            told[index] = share
        return {_SHARES: as_table(told)}, {}


def _bytes_of(*shape: int) -> Tensor:
    """Return the form of so many bytes."""
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _roster(round_number: int, members: Tensor, keys: Tensor) -> Roster:
    """Return the roster of ``members``, (n,), with ``keys``, (n, 2, 32)."""
    mask_keys, box_keys = rows_of(keys[:, 0]), rows_of(keys[:, 1])
    return Roster(round_number, tuple(members.tolist()), tuple(mask_keys), tuple(box_keys))


def _check_when(kept: Row, client: int, context: Context) -> None:
    """Raise WireError unless ``kept`` was written in the phase before this one."""
    due = [context.round, context.phase - 1]
    if "!when" not in kept or kept["!when"].tolist() != due:
        raise WireError(
            f"client {client} holds no secrets for phase {context.phase} of round {context.round}: "
            "they are used once"
        )


def _field(down: Row, name: str, members: int | None = None) -> Tensor:
    """Return a tensor of a request, (n, ...); WireError where it is missing or of another form.

    ``members``: n; None where any number of them will do.
    """
    if name not in down:
        raise WireError(f"a request of secagg lacks {name!r}")
    tensor = down[name]
    if members is None:
        members = len(tensor) if tensor.dim() else 0
    # The dtype counts, too: marks that are numbers could count for several members each.
    dtype, of_each = _FORMS[name]
    due = (members, *of_each)
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, due):
        raise WireError(
            f"{name!r} of a request of secagg is {tensor.dtype} of the shape "
            f"{tuple(tensor.shape)}, not {dtype} of {due}"
        )
    return tensor
