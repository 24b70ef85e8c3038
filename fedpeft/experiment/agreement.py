"""What server and clients must agree on, as a digest that every request carries.

Not to be confused with the digest of ``config.json``, by which checkpoints know their run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b

from fedpeft.experiment.config import Config
from fedpeft.types import Method


def agreement(config: Config, method: Method, labels: Sequence[str], weights: str) -> bytes:
    """Return the digest of what server and clients must agree on: what changes a client's work.

    ``method``: as built from ``config``; all its fields count. ``labels``: in their order.
    ``weights``: digest of the pre-trained parameters. Paths do not count, so the same model may lie
    in another folder on every machine. Of the section ``federation``, only the number of rounds
    counts, and only where the method's schedule has it as a field.
    """
    fields_of_method = asdict(method)  # type: ignore[call-overload]  # every method is a dataclass
    agreed = {
        "task": asdict(config.task),
        "method": {"name": config.method["name"], **fields_of_method},
        "dropout": config.model.dropout,
        "max_length": config.model.max_length,
        "training": asdict(config.training),
        "seed": config.seed,
        "labels": list(labels),
        "weights": weights,
    }
    # Sorted keys: the digest must not depend on the order of the fields in a class.
    text = json.dumps(agreed, sort_keys=True, default=repr)
    return blake2b(text.encode(), digest_size=16).digest()
