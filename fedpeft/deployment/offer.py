"""What the server tells a site about a run, and what the site makes of it.

An offer holds no path and no code. The site lays its own data, machine and models over it, and
refuses what its limits do not allow.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from fedpeft.deployment.required import check_required, shortfall
from fedpeft.deployment.site import Site
from fedpeft.errors import BadInput
from fedpeft.experiment.checking import check_finite, checked
from fedpeft.experiment.config import Config, from_tree, merge
from fedpeft.methods import METHODS

FORM: Final = 1
"""The form of an offer; a site of another version refuses what it does not know."""


MODEL: Final = frozenset({"name", "dropout", "max_length", "checkpointing", "bits"})
"""The fields of the section ``model`` that an offer sets."""


class Refusal(BadInput):
    """What a site does not agree to; alone of all a site's errors, its text is told the server."""


@final
@dataclass(frozen=True)
class Offer:
    """A run as the server offers it.

    ``run``: tells runs apart. ``labels``: names of the possible answers, as ``data.labels``.
    ``visits``: how often a text is trained on, on average; it decides whether hidden states are
    kept, None while the sites' sizes are not known.
    """

    form: int
    run: str
    version: str
    seed: int
    task: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    wrap: tuple[dict[str, Any], ...]
    training: dict[str, Any]
    rounds: int
    labels: tuple[str, ...] | None
    visits: float | None = None

    def to_json(self) -> str:
        """Return the offer as one line of JSON, the same for equal offers."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def offer_of(config: Config, run: str, version: str, labels: tuple[str, ...]) -> Offer:
    """Return what sites are told of a run; ``visits`` is left open."""
    model = config.model
    # A folder of the server's means nothing to a site: the name alone is told.
    place = Path(model.name)
    name = place.name if place.is_absolute() else model.name
    return Offer(
        form=FORM,
        run=run,
        version=version,
        seed=config.seed,
        task=asdict(config.task),
        model={
            "name": name,
            "dropout": model.dropout,
            "max_length": model.max_length,
            "checkpointing": model.checkpointing,
            "bits": model.bits,
        },
        method=json.loads(json.dumps(config.method)),
        wrap=tuple(json.loads(json.dumps(config.told_wraps()))),
        training=asdict(config.training),
        rounds=config.federation.rounds,
        labels=labels or None,
    )


def read_offer(text: str) -> Offer:
    """Return the offer that ``Offer.to_json`` wrote; Refusal for anything else."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal("the server's offer is no JSON") from error
    if not isinstance(tree, Mapping):
        raise Refusal("the server's offer is no JSON object")
    if tree.get("form") != FORM:
        raise Refusal(
            f"the server's offer has form {tree.get('form')!s:.20}, this site knows {FORM}; "
            "install the same version of fedpeft on both"
        )
    try:
        offer = checked(Offer, tree, "offer")
        check_finite(tree, "offer")
    except BadInput as error:
        raise Refusal(str(error)) from error
    return offer


def accepted(offer: Offer, site: Site) -> Config:
    """Return the settings by which ``site`` trains what it is offered.

    Refusal where it does not agree.
    """
    # 1. What the offer says by itself: a mistake in it may be told.
    unknown = offer.model.keys() - MODEL
    if unknown:
        raise Refusal(f"the offer sets model.{min(unknown)}, which is the site's affair")
    try:
        config = from_tree(_settings(offer))
    except BadInput as error:
        raise Refusal(f"the offer cannot be read: {error}") from error
    # 2. What the site agrees to.
    if offer.model.get("name") not in site.models:
        raise Refusal(f"this site does not train model {config.model.name!r:.80}")
    method = str(config.method["name"])
    if method not in (site.limits.methods or tuple(METHODS)):
        raise Refusal(f"this site does not train method {method!r:.80}")
    asked = config.training.steps or config.training.epochs
    if asked > site.limits.steps:
        raise Refusal(f"this site takes at most {site.limits.steps} steps a round, not {asked}")
    lack = shortfall(site.limits.require, config.wrap)
    if lack is not None:
        raise Refusal(f"this site trains only {lack}")
    # 3. What is the site's own, laid over it.
    own = {
        "model": {
            "name": site.models[offer.model["name"]],
            "trust_remote_code": site.trust_remote_code,
        },
        "machine": site.machine,
        "data": {**site.data, "source": "files"},
    }
    return from_tree(merge(_settings(offer), own))


def _settings(offer: Offer) -> dict[str, Any]:
    """Return the offer as a tree of settings."""
    return {
        "seed": offer.seed,
        "task": offer.task,
        "model": offer.model,
        "data": {"source": "files", "train": "-", "labels": offer.labels},
        "federation": {"rounds": offer.rounds, "clients_per_round": 1},
        "training": offer.training,
        "method": offer.method,
        "wrap": list(offer.wrap),
        "engine": {"stack": 1},
    }


def check_sections(site: Site) -> None:
    """Raise BadInput for a mistake in the sections ``data``, ``machine``, ``limits.require``."""
    for key in ("source", "labels"):
        if key in site.data:
            raise BadInput(f"data.{key}: is not for a site to set; take it out")
    from_tree({"data": {**site.data, "source": "files"}, "machine": site.machine})
    check_required(site.limits.require)
