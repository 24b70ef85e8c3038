"""A site's own half of a run: its data as tokens, the model, and the worker of its one client."""

from dataclasses import dataclass
from typing import final

from fedpeft import data
from fedpeft.deployment.offer import Offer, Refusal, accepted
from fedpeft.deployment.site import Site
from fedpeft.experiment.config import Config
from fedpeft.experiment.pieces import hardware_for, make_worker, tokenised
from fedpeft.experiment.reading import read_own
from fedpeft.federation.client import ClientData, Worker
from fedpeft.models import Loaded
from fedpeft.tasks import TASKS, Encoded, Task, make_task
from fedpeft.training.hardware import Hardware, use
from fedpeft.training.loop import num_steps


@final
@dataclass(frozen=True)
class OwnRun:
    """What a site has built for an offer; the next offer takes over what agrees."""

    config: Config
    dataset: data.Dataset
    hardware: Hardware
    loaded: Loaded
    task: Task
    train: Encoded
    test: Encoded
    worker: Worker


def own_run(offer: Offer, site: Site, reuse: OwnRun | None) -> OwnRun:
    """Build what ``offer`` asks for from the site's own data.

    Raises Refusal where the site does not agree, and BadInput where its data or its model do not
    fit the offer; the text of the latter must not leave the site.
    """
    config = accepted(offer, site)
    if reuse is not None and (reuse.config.data, reuse.config.task) == (config.data, config.task):
        dataset = reuse.dataset
    else:
        dataset = read_own(config.data, config.task.kind)
    names = TASKS[config.task.kind].names(dataset)
    task = make_task(config.task, names, config.model.max_length)
    hardware = hardware_for(config, task, reuse)
    use(hardware)
    model = tokenised(config, dataset, task, hardware, reuse)
    _check_steps(len(model.train), config, site)
    worker = make_worker(
        config=config,
        method=config.build_method(),
        names=names,
        model=model,
        client_data={site.client: ClientData(model.train, model.test)},
        hardware=hardware,
        visits=offer.visits or 0.0,
    )
    return OwnRun(
        config=config,
        dataset=dataset,
        hardware=hardware,
        loaded=model.loaded,
        task=model.task,
        train=model.train,
        test=model.test,
        worker=worker,
    )


def _check_steps(examples: int, config: Config, site: Site) -> None:
    """Raise Refusal where so many ``examples`` make more steps of a round than ``site`` takes."""
    most, epochs = site.limits.steps, config.training.epochs
    # How many they are is not told: it would say how much data there is.
    if num_steps(examples, config.training) > most:
        raise Refusal(
            f"this site takes at most {most} steps a round; training.epochs = {epochs} is more"
        )
