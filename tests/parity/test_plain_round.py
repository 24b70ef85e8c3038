"""FedAvg of LoRA written out in a page (examples/plain_round.py) ends where the product does."""

from pathlib import Path

import pytest
import torch

from examples import plain_round
from fedpeft.experiment.build import build
from fedpeft.experiment.run import start
from tests.e2e.builders import Ground, write_ground
from tests.tiny import close


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return write_ground(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize(
    "lengths", [{"steps": 2}, {"steps": None, "epochs": 1}], ids=["steps", "epochs"]
)
def test_the_page_ends_where_the_product_does(
    ground: Ground, tmp_path: Path, stack: int, lengths: dict[str, int | None]
) -> None:
    """Same clients, batches, clipping, rates and mean; only rounding differs."""
    federation = build(
        ground.chosen(
            {"engine": {"stack": stack}, "federation": {"rounds": 3, "clients_per_round": 3}},
            {"method": {"name": "lora", "rank": 2, "targets": "query|value"}},
            {"training": {**lengths, "head_lr": 0.02, "weight_decay": 0.1}},
        )
    )
    product = start(federation, tmp_path / "run")
    loaded, config = federation.loaded, federation.config
    adapter = plain_round.start(loaded, "query|value", rank=2, seed=config.seed)
    before = {name: tensor.clone() for name, tensor in adapter.items()}
    *_, last = plain_round.federated(
        loaded,
        federation.task,
        [own.train for own in federation.worker.client_data.values()],
        adapter,
        config.training,
        rounds=3,
        clients_per_round=3,
        seed=config.seed,
    )
    assert max(float((last[name] - before[name]).abs().max()) for name in last) > 0.01
    close(last, product.shared, 2e-4)


def test_the_page_leaves_the_model_as_it_was(ground: Ground) -> None:
    federation = build(ground.chosen({"method": {"name": "lora", "rank": 2}}))
    model = federation.loaded.model
    parameters = dict(model.named_parameters())
    adapter = plain_round.start(federation.loaded, "query|value", rank=2, seed=0)
    with pytest.raises(RuntimeError, match="stop"), plain_round.adapted(model, adapter):
        raise RuntimeError("stop")
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(adapter["classifier.weight"], parameters["classifier.weight"].data)
