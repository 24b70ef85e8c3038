"""The cryptography of secure aggregation against its definitions: shares, masks, keys, numbers, rosters."""

from collections import Counter
from itertools import combinations, permutations, product
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, ECB
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadInput, WireError
from fedpeft.secagg import masks, shamir
from fedpeft.secagg.client import (
    BOX,
    box_keys,
    hide,
    open_boxes,
    share_secrets,
    shares_to_open,
)
from fedpeft.secagg.fixed_point import FixedPoint
from fedpeft.secagg.keys import (
    KEY,
    agreed,
    commitment,
    derived,
    new_secret,
    private_key,
    public_bytes,
    seal,
    unseal,
)
from fedpeft.secagg.masks import add_stream, add_streams
from fedpeft.secagg.roster import Roster, Rules
from fedpeft.secagg.server import recover, uncover
from fedpeft.secagg.summands import form_of, is_within, joined, out_of_range, weighted

RULES = Rules(threshold=0.6, smallest=3)


# Shamir's shares.


@given(st.integers(0, 2**256 - 1), st.integers(1, 6), st.integers(0, 4), st.randoms())
def test_any_threshold_of_the_shares_give_the_secret(
    secret: int, threshold: int, more: int, random: object
) -> None:
    count = threshold + more
    shares = shamir.split(secret, threshold, count)
    points = random.sample(range(count), threshold)  # type: ignore[attr-defined]
    assert shamir.combine({point + 1: shares[point] for point in points}) == secret
    assert all(0 <= share < 2 ** (8 * shamir.SHARE) for share in shares)


def test_fewer_shares_tell_nothing_about_the_secret() -> None:
    """In a field of 5, over all polynomials there are: any two of three-of-four shares are uniform, whatever the secret."""
    prime, threshold, count = 5, 3, 4
    for points in combinations(range(count), threshold - 1):
        for secret in range(prime):
            seen: Counter[tuple[int, ...]] = Counter()
            for coefficients in product(range(prime), repeat=threshold - 1):
                draws = iter(coefficients)
                shares = shamir.split(secret, threshold, count, prime, lambda _, d=draws: next(d))  # type: ignore[misc]
                seen[tuple(shares[point] for point in points)] += 1
            assert seen == dict.fromkeys(product(range(prime), repeat=threshold - 1), 1)


def test_the_field_is_one() -> None:
    """Miller-Rabin: no base up to 61 shows that the modulus is composite."""
    odd, twos = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61):
        powers = [pow(base, odd << times, shamir.PRIME) for times in range(twos)]
        assert powers[0] == 1 or shamir.PRIME - 1 in powers
    assert 2**256 < shamir.PRIME < 2 ** (8 * shamir.SHARE)


@pytest.mark.parametrize(
    ("secret", "threshold", "count"), [(-1, 1, 2), (shamir.PRIME, 1, 2), (1, 3, 2), (1, 0, 2)]
)
def test_shares_that_cannot_be_are_refused(secret: int, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="no .* shares"):
        shamir.split(secret, threshold, count)


# Masks.


@pytest.mark.parametrize("count", [1, 7, 65536, 65537, 140_001])
def test_a_stream_is_aes_of_a_counter(count: int) -> None:
    """The definition of counter mode: block i is AES(i), and a word is eight bytes of it, the lowest first."""
    key = bytes(range(32))
    blocks = b"".join(number.to_bytes(16) for number in range(-(-count // 2)))
    ecb = Cipher(AES(key), ECB()).encryptor()
    due = np.frombuffer(ecb.update(blocks), dtype="<u8")[:count]
    start = np.arange(count, dtype=np.uint64)
    total = start.copy()
    add_stream(total, key)
    np.testing.assert_array_equal(total, start + due)
    add_stream(total, key, negative=True)
    np.testing.assert_array_equal(total, start)


@pytest.mark.parametrize(("keys", "count"), [(3, 40_000), (130, 100)])
def test_streams_together_are_streams_one_by_one(keys: int, count: int) -> None:
    """Over several blocks of words, and over several groups of keys; every third stream is subtracted."""
    signed = [(number.to_bytes(32), number % 3 == 0) for number in range(1, keys + 1)]
    total = np.arange(count, dtype=np.uint64)
    due = total.copy()
    for key, negative in signed:
        cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()
        stream = np.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8")
        due = due - stream if negative else due + stream
    add_streams(total, signed)
    np.testing.assert_array_equal(total, due)


def test_few_ciphers_are_open_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost members times others: at 1,000 members these would be hundreds of thousands."""
    opened: WeakSet[Any] = WeakSet()
    seen = []

    class Counted:
        """A cipher that is known while it is in use."""

        def __init__(self, *of: Any) -> None:
            self.inner = Cipher(*of).encryptor()
            self.update_into = self.inner.update_into

        def encryptor(self) -> "Counted":
            opened.add(self)
            seen.append(len(opened))
            return self

    monkeypatch.setattr(masks, "Cipher", Counted)
    keys = [(number.to_bytes(32), False) for number in range(1000)]
    add_streams(np.zeros(1, dtype=np.uint64), keys)
    assert len(seen) == 1000
    assert max(seen) <= 64


def test_aes_is_that_of_the_standard() -> None:
    """FIPS 197, appendix C.3, as the first block of a stream whose counter is 0 cannot show it: the cipher itself."""
    key, text = bytes(range(32)), bytes(0x11 * nibble for nibble in range(16))
    coded = Cipher(AES(key), ECB()).encryptor().update(text)
    assert coded.hex() == "8ea2b7ca516745bfeafc49904b496089"


# Keys.


def test_both_ends_agree_and_no_purpose_has_the_key_of_another() -> None:
    one, other, third = (private_key(new_secret()) for _ in range(3))
    key = agreed(one, public_bytes(other), b"a")
    assert key == agreed(other, public_bytes(one), b"a")
    assert (
        len({key, agreed(one, public_bytes(other), b"b"), agreed(third, public_bytes(one), b"a")})
        == 3
    )


def test_x25519_and_hkdf_are_those_of_the_standards() -> None:
    """RFC 7748, section 6.1; RFC 5869, test case 3 (its first 32 bytes, without salt and info)."""
    alice = private_key(
        bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert agreed(alice, bob, b"purpose") == derived(shared, b"purpose")
    assert derived(b"\x0b" * 22, b"").hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    )


def test_a_key_that_agrees_with_everybody_is_refused() -> None:
    with pytest.raises(WireError, match="no point"):
        agreed(private_key(new_secret()), bytes(KEY), b"a")


def test_a_box_opens_for_its_key_and_its_round_alone() -> None:
    key, box = bytes(32), seal(bytes(32), b"shares", b"round 3")
    assert unseal(key, box, b"round 3") == b"shares"
    damaged = bytes([box[0] ^ 1]) + box[1:]
    for wrong in (
        (bytes([1] * 32), box, b"round 3"),
        (key, box, b"round 4"),
        (key, damaged, b"round 3"),
    ):
        with pytest.raises(WireError, match="box"):
            unseal(*wrong)


# Numbers.


@given(
    st.sampled_from([24, 32, 40, 48, 56]),
    st.lists(st.lists(st.floats(-4, 4), min_size=3, max_size=3), min_size=1, max_size=9),
)
def test_the_sum_is_off_by_half_a_step_a_term_at_most(bits: int, rows: list[list[float]]) -> None:
    form = FixedPoint.fitting(bits, len(rows), most=4.0)
    total = np.zeros(3, dtype=np.uint64)
    for row in rows:
        packed = form.pack(form.encode(np.array(row)))
        assert packed.nbytes == 3 * bits // 8
        form.add_packed(total, packed)
    due = np.array(rows, dtype=np.float64).sum(axis=0)
    rounding = 1e-12  # of the reference
    assert np.abs(form.decode(total) - due).max() <= len(rows) * form.step / 2 + rounding


@pytest.mark.parametrize("bits", [24, 32, 40, 48, 56])
@pytest.mark.parametrize("terms", [1, 3, 20, 1000])
def test_the_largest_sum_keeps_its_sign(bits: int, terms: int) -> None:
    """All terms at the end of the range, and no finer form would hold them."""
    form = FixedPoint.fitting(bits, terms, most=3.0)
    for end in (3.0, -3.0):
        total = np.zeros(1, dtype=np.uint64)
        for _ in range(terms):
            total += form.encode(np.array([end]))
        assert form.decode(total)[0] == terms * end
    assert terms * 3.0 * 2 ** (form.fraction + 1) > 2 ** (bits - 1) - 1 - terms


def test_a_form_without_room_behind_the_point_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"wrap.bits = 24 of secagg: sums of 20 terms of up to 1e\+06"
    ):
        FixedPoint.fitting(24, 20, 1e6)


def test_what_is_out_of_range_is_named() -> None:
    fine = torch.tensor([16.0, -16.0, 0.0])
    assert out_of_range({"w": fine}, 16.0) == ""
    for value, word in (
        (16.5, "16.5"),
        (-17.0, "-17"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ):
        said = out_of_range({"w": fine, "b:A": torch.tensor([[1.0, value]])}, 16.0)
        assert said.startswith(f"tensor 'b:A' has the value {word}, outside of wrap.range = 16 of ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_range_is_not_rounded_to_the_dtype_of_a_tensor(dtype: torch.dtype, sign: int) -> None:
    """Just above 16.1 lies 16.125 in bfloat16, and 16.1 is rounded to it; float32 rounds it up, too."""
    near = torch.tensor([16.1], dtype=dtype)
    above = near if near.double() > 16.1 else torch.nextafter(near, torch.full_like(near, 17.0))
    assert 16.1 < float(above) < 16.2
    update = {"w": sign * above}
    assert not is_within(joined(update), 16.1)
    assert out_of_range(update, 16.1)
    within = {"w": sign * torch.nextafter(above, torch.zeros_like(above))}
    assert is_within(joined(within), 16.1)
    assert not out_of_range(within, 16.1)


def test_numbers_come_back_as_the_tensors_that_they_were() -> None:
    update = {"b": torch.randn(2, 3), "a": torch.randn(()), "c": torch.randn(4).double()}
    form = form_of(lambda payload: payload, {name: t.to("meta") for name, t in update.items()})
    numbers = weighted(joined(update), 3.0)
    assert len(numbers) == form.numbers == 12
    mean = form.mean(numbers).result()
    for name, tensor in update.items():
        torch.testing.assert_close(mean[name], tensor)


# A whole round, without a federation around it.


def secrets_and_roster(count: int) -> tuple[list[tuple[bytes, bytes, bytes]], Roster]:
    """Return (mask key, key of boxes, seed) of so many members, numbered by tens, and their roster."""
    secrets = [(new_secret(), new_secret(), new_secret()) for _ in range(count)]
    mask_keys = tuple(public_bytes(private_key(own[0])) for own in secrets)
    box_keys = tuple(public_bytes(private_key(own[1])) for own in secrets)
    return secrets, Roster(5, tuple(range(10, 10 * count + 1, 10)), mask_keys, box_keys)


@pytest.mark.parametrize("lost_before", [(), (0,), (2, 4)])
@pytest.mark.parametrize("lost_after", [(), (1,), (3, 6)])
@pytest.mark.parametrize("lost_at_last", [(), (5,)])
def test_the_sum_is_that_of_the_members_that_sent(
    lost_before: tuple[int, ...], lost_after: tuple[int, ...], lost_at_last: tuple[int, ...]
) -> None:
    count, enough = 9, 4
    secrets, roster = secrets_and_roster(count)
    values = [np.arange(50, dtype=np.uint64) * np.uint64(k + 1) for k in range(count)]
    boxes, own, keys = {}, {}, {}
    for me, (mask_secret, box_secret, seed) in enumerate(secrets):
        to_others, keys[me] = box_keys(roster, me, box_secret)
        boxes[me], own[me] = share_secrets(roster, me, enough, to_others, (mask_secret, seed))
        assert {len(box) for box in boxes[me]} == {BOX}
    alive = [k not in lost_before for k in range(count)]
    sent = [alive[k] and k not in lost_after for k in range(count)]
    total = np.zeros(50, dtype=np.uint64)
    for me in range(count):
        if sent[me]:
            total += hide(values[me], roster, me, (secrets[me][0], secrets[me][2]), alive)
    told = {}
    for me in range(count):
        if sent[me] and me not in lost_at_last:
            mine = {k: boxes[k][me] for k in range(count) if alive[k] and k != me}
            shares = open_boxes(roster, keys[me], mine)
            shares[me] = own[me][: shamir.SHARE], own[me][shamir.SHARE :]
            opened = shares_to_open(shares, sent)
            told[me] = [opened.get(k, b"") for k in range(count)]
    seals = [commitment(seed) for _, _, seed in secrets]
    found = recover(roster, seals, alive, sent, told, enough)
    assert found == {
        k: secrets[k][2] if sent[k] else secrets[k][0] for k in range(count) if alive[k]
    }
    uncover(total, roster, sent, found)
    due = sum((values[k] for k in range(count) if sent[k]), np.zeros(50, dtype=np.uint64))
    np.testing.assert_array_equal(total, due)
    with pytest.raises(WireError, match="3 clients told their shares, 4 needed"):
        recover(roster, seals, alive, sent, dict(list(told.items())[:3]), enough)
    first = next(iter(told))
    told[first] = [
        bytes(share) if not share else bytes([share[0], *share[1:-1], share[-1] ^ 1])
        for share in told[first]
    ]
    with pytest.raises(WireError, match=r"the shares of client \d+ do not fit together"):
        recover(roster, seals, alive, sent, told, enough)


def test_a_box_for_one_member_does_not_open_for_another() -> None:
    secrets, roster = secrets_and_roster(4)
    to_others, _ = box_keys(roster, 0, secrets[0][1])
    boxes, _ = share_secrets(roster, 0, 3, to_others, (secrets[0][0], secrets[0][2]))
    _, from_others = box_keys(roster, 1, secrets[1][1])
    assert open_boxes(roster, from_others, {0: boxes[1]})
    for box in (boxes[2], boxes[0]):
        with pytest.raises(WireError, match="box"):
            open_boxes(roster, from_others, {0: box})


def test_every_box_of_a_round_has_a_key_that_its_two_ends_alone_agree_on() -> None:
    secrets, roster = secrets_and_roster(4)
    keys = [box_keys(roster, me, box_secret) for me, (_, box_secret, _) in enumerate(secrets)]
    used = []
    for sender, recipient in permutations(range(4), 2):
        due = agreed(
            private_key(secrets[sender][1]),
            roster.box_keys[recipient],
            f"fedpeft secagg box {sender} {recipient}".encode(),
        )
        assert keys[sender][0][recipient] == keys[recipient][1][sender] == due
        used.append(due)
    assert len(set(used)) == 12


def test_of_a_member_goes_one_kind_of_share_never_both() -> None:
    shares = dict.fromkeys(range(3), (b"key", b"seed"))
    assert shares_to_open(shares, [True, False, True]) == {0: b"seed", 1: b"key", 2: b"seed"}


@given(st.integers(3, 200), st.floats(0.5, 1, exclude_min=True))
def test_no_two_sets_that_are_enough_are_apart(members: int, threshold: float) -> None:
    """So the server cannot have one half say that a member is lost, and the other half that it is not."""
    enough = Rules(threshold, smallest=2).enough(members)
    assert members < 2 * enough
    assert enough <= members


def broken(roster: Roster, what: str) -> Roster:
    """Return a roster that a member has to refuse."""
    members, masks, boxes = list(roster.members), list(roster.mask_keys), list(roster.box_keys)
    match what:
        case "twice":
            members[1] = members[0]
        case "order":
            members[0], members[1] = members[1], members[0]
        case "same key":
            masks[1] = masks[2]
        case "same key of two kinds":
            masks[1] = boxes[2]
        case "other key":
            masks[3] = public_bytes(private_key(new_secret()))
        case "missing key":
            boxes = boxes[:-1]
        case "few":
            members, masks, boxes = members[2:4], masks[2:4], boxes[2:4]
        case "none":
            members, masks, boxes = [], [], []
        case "without me":
            members[3] = 45
    return Roster(5, tuple(members), tuple(masks), tuple(boxes))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("twice", "in order, or one is there twice"),
        ("order", "in order, or one is there twice"),
        ("none", "in order, or one is there twice"),
        ("same key", "two keys"),
        ("same key of two kinds", "two keys"),
        ("missing key", "no keys"),
        ("other key", "the keys of client 40 are not those that it sent"),
        ("few", "a round of 2 members; at least 3 needed"),
        ("without me", "client 40 is no member"),
    ],
)
def test_a_member_refuses_a_roster_that_is_not_right(what: str, words: str) -> None:
    _, roster = secrets_and_roster(5)
    own = roster.mask_keys[3], roster.box_keys[3]
    assert roster.check(RULES, 40, own) == 3
    with pytest.raises(WireError, match=words):
        broken(roster, what).check(RULES, 40, own)


def test_rosters_differ_in_their_digests() -> None:
    _, roster = secrets_and_roster(5)
    others = [
        broken(roster, what) for what in ("order", "same key", "other key", "few", "without me")
    ]
    others.append(Roster(6, roster.members, roster.mask_keys, roster.box_keys))
    others.append(Roster(5, roster.members, roster.box_keys, roster.mask_keys))
    assert len({one.digest for one in (roster, *others)}) == 8


def test_a_part_of_the_members_is_enough_of_those_that_were_there() -> None:
    _, roster = secrets_and_roster(5)
    everyone = [True] * 5
    roster.check_part(RULES, [True, True, True, False, False], within=everyone)
    with pytest.raises(WireError, match="2 of 5 members are left, 3 needed"):
        roster.check_part(RULES, [True, True, False, False, False], within=everyone)
    with pytest.raises(WireError, match="client 50 was lost"):
        roster.check_part(RULES, everyone, within=[True, True, True, True, False])
    with pytest.raises(WireError, match="4 marks for 5 members"):
        roster.check_part(RULES, [True] * 4, within=everyone)


@pytest.mark.parametrize("mark", [3, 5, float("nan"), float("inf")])
def test_no_mark_counts_for_several_members(mark: Any) -> None:
    _, roster = secrets_and_roster(5)
    with pytest.raises(WireError, match="1 of 5 members are left, 3 needed"):
        roster.check_part(RULES, [mark, *[False] * 4], within=[True] * 5)
