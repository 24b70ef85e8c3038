"""RoLoRA trains one factor at a time and merges exactly; FedSA-LoRA shares A and nothing else."""

import torch

from fedpeft.training.evaluation import mounted_state
from fedpeft.types import Client
from fedpeft.wire.messages import decode
from tests.products import LAYERS, SCALE, added, off, shares
from tests.tiny import CPU, HEAD, SEED, assert_same, bert, examples, federation, logits, small


def test_rolora_merges_exactly_in_every_round_and_lora_does_not() -> None:
    playing = federation(small("rolora"))
    states = [playing.start]
    for _ in range(4):
        states.append(playing.play(1, states[-1]))
    for number in range(4):
        before, answers = states[number].shared, list(playing.answers(number).values())
        moved = added(playing, states[number + 1])
        for module in LAYERS:
            exact = torch.zeros(32, 32, dtype=torch.float64)
            for share, answer in zip(shares(answers), answers, strict=True):
                whole = {**before, **answer.payload}
                exact += share * whole[f"{module}:B"].double() @ whole[f"{module}:A"].double()
            assert off(moved[module], SCALE * exact) < 1e-6


def test_rolora_trains_b_first_then_a_and_sends_up_what_it_trains() -> None:
    playing = federation(small("rolora"))
    states = [playing.start]
    for _ in range(3):
        states.append(playing.play(1, states[-1]))
    for number, moving in enumerate("BAB"):
        resting = {"A": "B", "B": "A"}[moving]
        for answer in playing.answers(number).values():
            assert answer.payload.keys() == {f"{name}:{moving}" for name in LAYERS} | HEAD
        before, after = states[number].shared, states[number + 1].shared
        for name in LAYERS:
            assert torch.equal(after[f"{name}:{resting}"], before[f"{name}:{resting}"])
            assert not torch.equal(after[f"{name}:{moving}"], before[f"{name}:{moving}"])


def test_rolora_in_its_first_round_is_ffa_lora() -> None:
    """Both have LoRA's A, from the same seed."""
    ours, theirs = (federation(small(name)).play(1).shared for name in ("rolora", "ffa_lora"))
    assert_same({part: ours[part] for part in theirs}, theirs)


def test_fedsa_shares_a_alone_and_each_client_keeps_its_b_and_head() -> None:
    playing = federation(small("fedsa_lora"))
    last = playing.play(3)
    shared = {f"{name}:A" for name in LAYERS}
    own = {f"{name}:B" for name in LAYERS} | HEAD
    assert last.shared.keys() == shared
    for exchange, talk in enumerate(playing.engine.talks):
        for request, reply in talk.values():
            sent = {part for part in decode(request) if not part.startswith("@")}
            back = {part for part in decode(reply) if not part.startswith("@")}
            assert sent == (shared | own if exchange == 0 else shared)
            assert back == shared
    assert last.memories == {0: 2, 1: 2, 2: 2}
    kept = [decode(playing.memories.get(client, 2)) for client in (0, 1, 2)]
    for client, memory in enumerate(kept):
        assert memory.keys() == own
        for part in own:
            assert not torch.equal(memory[part], kept[client - 1][part])


def test_what_is_personal_is_declared_and_is_what_a_client_scores_with() -> None:
    playing = federation(small("fedsa_lora"))
    state = playing.play(2)
    model, said = bert(), []
    for client in (0, 1):
        memory = decode(playing.memories.get(client, 1))
        with mounted_state(
            playing.method, state, model, CPU, SEED, Client(client, memory=1), memory
        ) as local:
            assert local.personal == memory.keys()
            assert local.trainable.keys() - local.personal == state.shared.keys()
            for part in memory:
                assert torch.equal(local.trainable[part][0], memory[part])
            said.append(logits(model, examples(6)))
    assert (said[0] - said[1]).abs().max() > 1e-3


def test_fedsa_of_one_client_is_lora() -> None:
    """Nobody is there to be averaged with: what stays at home and what travels are one LoRA."""
    sizes = {0: 7}
    ours, theirs = (federation(small(name), sizes=sizes) for name in ("fedsa_lora", "lora"))
    state, whole = ours.play(3), theirs.play(3)
    assert_same({**state.shared, **decode(ours.memories.get(0, 2))}, dict(whole.shared))
