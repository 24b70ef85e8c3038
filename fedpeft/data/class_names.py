"""Names of classes that a table of the package ``datasets`` writes as numbers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedpeft.data.json_records import Located, Record

Features = Mapping[str, Any]
"""Column -> its feature, as ``datasets`` writes it in JSON."""


def with_names(located: Iterable[Located], features: Features) -> Iterator[Located]:
    """Yield the records with names for the numbers of classes, also those in lists."""
    coded = {name: feature for name, feature in features.items() if _names(feature)}
    for where, record in located:
        yield where, (_named_record(record, coded) if coded else record)


def _named_record(record: Record, coded: Features) -> Record:
    changed = dict(record)
    for column, feature in coded.items():
        if column in changed:
            changed[column] = named(changed[column], feature)
    return changed


def named(value: Any, feature: Any) -> Any:
    """Return the name of a class, or a list of them, for its number.

    None where the class has none: ``datasets`` writes -1 where nobody has said which class it is.

    >>> label = {"_type": "ClassLabel", "names": ["neg", "pos"]}
    >>> named(1, label), named(-1, label)
    ('pos', None)
    >>> named([0, 1], {"_type": "List", "feature": label})
    ['neg', 'pos']
    """
    names = _names(feature)
    if isinstance(value, list):
        return [_name(number, names) for number in value]
    return _name(value, names)


def _name(number: Any, names: list[str]) -> str | None:
    if isinstance(number, int) and 0 <= number < len(names):
        return names[number]
    return None


def _names(feature: Any) -> list[str]:
    """Return the names of a feature of classes, or of a list of them; empty for other features."""
    if isinstance(feature, list) and len(feature) == 1:  # an older way to write a list
        feature = feature[0]
    if not isinstance(feature, dict):
        return []
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _names(feature.get("feature"))
    names = feature.get("names")
    return names if feature.get("_type") == "ClassLabel" and isinstance(names, list) else []
