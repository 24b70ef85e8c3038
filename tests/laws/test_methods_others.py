"""FedRot's rotation keeps each product; AdaLoRA's ranks keep to the budget; adapters stand behind their layers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.algebra.importance import cubic_budget
from fedpeft.errors import BadInput, WireError
from fedpeft.methods.adapters import PLACES
from fedpeft.methods.fedrot_lora import rotation
from fedpeft.models.export import merge
from fedpeft.mounting import bottlenecks, select
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import State
from tests.products import LAYERS, STRONG, product, total
from tests.tiny import CPU, SEED, assert_same, base_of, bert, close, federation, logits, small


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    turned: Tensor = torch.linalg.qr(drawn(size, size, seed=seed).double()).Q
    return turned


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_rotation_leaves_every_clients_product_unchanged(strength: float) -> None:
    """LoRA's replies to the same requests are the yardstick: other factors, the same products."""
    turned = federation(small("fedrot_lora", strength=strength), training=STRONG)
    state = turned.play(2)
    for exchange in (2, 3):
        plain = federation(small("lora"), training=STRONG)
        plain.play(1, state)
        state = turned.play(1, state)
        for client, answer in turned.answers(exchange).items():
            unturned = plain.answers(0)[client].payload
            moved = 0.0
            for module in LAYERS:
                torch.testing.assert_close(
                    product(answer.payload, module), product(unturned, module), rtol=1e-4, atol=1e-6
                )
                same = answer.payload[f"{module}:A"] - unturned[f"{module}:A"]
                moved = max(moved, float(same.abs().max()))
            assert (moved > 1e-3) == (strength > 0)


def test_a_rotation_finds_the_turn_that_was_made() -> None:
    """A full one undoes it; a half one is on the way, and orthogonal as well."""
    A_sent = drawn(3, 10).double()
    turn = orthogonal(3, 5)
    A = turn @ A_sent
    overlap = (A @ A_sent.T).unsqueeze(0)
    whole = rotation(overlap, 1.0)[0]
    torch.testing.assert_close(whole, turn)
    torch.testing.assert_close(whole.T @ A, A_sent)
    half = rotation(overlap, 0.5)[0]
    torch.testing.assert_close(half.T @ half, torch.eye(3).double())
    before, after = ((matrix - A_sent).norm() for matrix in (A, half.T @ A))
    assert after < before
    assert torch.equal(rotation(overlap, 0.0)[0], torch.eye(3).double()) or torch.allclose(
        rotation(overlap, 0.0)[0], torch.eye(3).double()
    )
    assert torch.equal(rotation(torch.zeros(1, 3, 3), 1.0)[0], torch.eye(3).double())


def test_no_rotation_is_nearer_to_what_was_sent_than_the_full_one() -> None:
    playing = federation(small("fedrot_lora", strength=1.0))
    state = playing.play(3)
    unturned = federation(small("lora"))
    unturned.play(1, state)
    playing.play(1, state)
    for client, answer in playing.answers(3).items():
        plain = unturned.answers(0)[client].payload
        for module in LAYERS:
            sent = state.shared[f"{module}:A"].double()  # round 3 is one of A
            best = (answer.payload[f"{module}:A"].double() - sent).norm()
            A = plain[f"{module}:A"].double()
            for seed in range(20):
                assert best <= (orthogonal(3, seed).T @ A - sent).norm() + 1e-6
            assert best <= (A - sent).norm() + 1e-6


def test_the_first_round_of_fedrot_is_loras() -> None:
    ours, theirs = federation(small("fedrot_lora")), federation(small("lora"))
    assert_same(ours.play(1).shared, theirs.play(1).shared)


def alive(state: State) -> Tensor:
    """Return which ranks have an e other than 0, modules in alphabetical order."""
    return torch.cat([state.shared[f"{module}:e"] != 0 for module in sorted(LAYERS)])


def test_adaloras_ranks_keep_to_the_budget_by_score_and_may_come_back() -> None:
    method = small("adalora", rounds=6, kept=0.25)
    playing = federation(method)
    states = [playing.start]
    for _ in range(6):
        states.append(playing.play(1, states[-1]))
    came_back = False
    for number in range(6):
        answers = list(playing.answers(number).values())
        weights = [float(answer.measured.examples) for answer in answers]
        scores = torch.zeros(16, dtype=torch.float64)
        for weight, answer in zip(weights, answers, strict=True):
            scores += weight / sum(weights) * answer.payload["scores"].double()
        budget = cubic_budget(number + 1, 16, rounds=6, kept=0.25, warmup=0.0, settled=0.3)
        due = scores.argsort(descending=True)[:budget]
        assert set(alive(states[number + 1]).nonzero().flatten().tolist()) == set(due.tolist())
        came_back |= bool((alive(states[number + 1]) & ~alive(states[number])).any()) and number > 0
    assert int(alive(states[-1]).sum()) == 4
    assert came_back, "unlike FedARA's, a rank may come back"


def test_where_no_rank_has_a_score_none_is_pruned() -> None:
    method = small("adalora")
    state = federation(method).play(1)
    reply = {**state.shared, "scores": torch.zeros(16)}
    from fedpeft.types import Client, Update

    after = method.receive(state, [Update(Client(0), 1, reply)])
    assert_same(after.shared, state.shared)


def test_adalora_without_a_cut_is_the_mean_of_the_triplets() -> None:
    """FedARA whose ranks all live is the same, but for its name in the seed."""
    playing = federation(small("adalora", kept=1.0))
    after = playing.play(1)
    answers = list(playing.answers(0).values())
    weights = [float(answer.measured.examples) for answer in answers]
    for part, merged in after.shared.items():
        mean = total(
            w / sum(weights) * a.payload[part].double()
            for w, a in zip(weights, answers, strict=True)
        )
        torch.testing.assert_close(merged.double(), mean, rtol=1e-6, atol=1e-8)


def adapter(out: int, width: int) -> dict[str, Tensor]:
    """Return random factors of one client's adapter."""
    shapes = {"D": (width, out), "d": (width,), "U": (out, width), "u": (out,)}
    return {part: drawn(1, *shape, seed=len(part) + width) for part, shape in shapes.items()}


@pytest.mark.parametrize("function", [torch.relu, functional.gelu])
def test_an_adapter_adds_its_network_to_its_layers_output(function: object) -> None:
    model = bert()
    name = "bert.encoder.layer.1.output.dense"
    parts = adapter(32, 4)
    seen: list[tuple[Tensor, Tensor]] = []
    before = model.get_submodule(name).register_forward_hook(lambda _, __, y: seen.append((y, y)))
    with bottlenecks(model, {f"{name}:{part}": t for part, t in parts.items()}, function):  # type: ignore[arg-type]
        after = model.get_submodule(name).register_forward_hook(
            lambda _, __, y: seen.append((y, y))
        )
        logits(model)
        after.remove()
    before.remove()
    (y, _), (adapted, _) = seen
    D, d, U, u = (parts[part][0] for part in ("D", "d", "U", "u"))
    due = y + function(y @ D.T + d) @ U.T + u  # type: ignore[operator]
    torch.testing.assert_close(adapted, due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", ["D", "d", "U", "u"])
def test_an_adapter_that_does_not_fit_is_refused(missing: str) -> None:
    parts = {part: tensor for part, tensor in adapter(32, 4).items() if part != missing}
    name = "bert.encoder.layer.0.output.dense"
    with (
        pytest.raises(WireError, match="would fit"),
        bottlenecks(bert(), {f"{name}:{part}": t for part, t in parts.items()}, torch.relu),
    ):
        pass


def test_adapters_stand_behind_both_blocks_or_behind_the_feed_forward_alone() -> None:
    base = base_of(bert())
    feed_forward = [f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1)]
    attention = [f"bert.encoder.layer.{layer}.attention.output.dense" for layer in (0, 1)]
    assert set(select(base, PLACES["pfeiffer"])) == set(feed_forward)
    assert set(select(base, PLACES["houlsby"])) == {*feed_forward, *attention}
    for word in PLACES:
        state = small("adapters", targets=word).init(base, SEED)
        found = {part.partition(":")[0] for part in state.shared if ":" in part}
        assert found == set(select(base, PLACES[word]))
    with pytest.raises(BadInput, match="method.width = 33"):
        small("adapters", width=33).init(base, SEED)


@pytest.mark.parametrize("name", ["adapters", "peft"])
def test_what_is_no_change_of_a_matrix_is_not_merged_without_a_word(name: str) -> None:
    method, model = small(name), bert()
    state = method.init(base_of(model), SEED)
    with (
        mounted_state(method, state, model, CPU, SEED) as local,
        pytest.raises(BadInput, match="can neither be merged nor exported"),
    ):
        merge(bert(), local)


def test_adapters_of_several_clients_are_those_of_each() -> None:
    method, model = small("adapters"), bert()
    playing = federation(method)
    state = playing.play(2)
    with mounted_state(method, state, model, CPU, SEED) as local:
        assert not local.deltas()
        said = logits(model)
    other = federation(method)
    close(other.play(2).shared, state.shared, 1e-6)
    assert (said - logits(model)).abs().max() > 1e-2
