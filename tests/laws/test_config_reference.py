"""Every field of a configuration is explained where it is declared, and the page of them is true."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import pytest
from annotated_types import Ge, Le, Lt

import fedpeft.methods
from fedpeft.errors import BadInput
from fedpeft.experiment.config import Config
from fedpeft.experiment.reference import (
    LEFT_OUT,
    REQUIRED,
    field_docstrings,
    page,
    section,
    sections,
)
from fedpeft.experiment.reference import _takes as takes
from fedpeft.methods import METHODS
from fedpeft.training.hardware import Hardware
from fedpeft.wrappers import WRAPPERS
from tests.e2e.builders import cli_call, refused

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
ANEW = "write it anew: fedpeft config --markdown > docs/config.md"


@pytest.fixture(autouse=True)
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed beside this package is none of its documentation."""
    monkeypatch.setattr(fedpeft.methods, "entry_points", lambda group: ())


def configured() -> Iterator[type[Any]]:
    """Yield every dataclass whose fields a configuration sets."""
    yield Config
    for kind in get_type_hints(Config).values():
        if dataclasses.is_dataclass(kind):
            yield kind  # type: ignore[misc]
    yield Hardware
    yield from METHODS.values()
    yield from WRAPPERS.values()


@pytest.mark.parametrize("kind", list(configured()), ids=lambda kind: kind.__name__)
def test_every_field_has_a_docstring_of_its_own(kind: Any) -> None:
    meanings = field_docstrings(kind)
    lacking = [field.name for field in dataclasses.fields(kind) if not meanings.get(field.name)]
    assert not lacking, f"{kind.__name__}: write a docstring under each of these fields"


def test_the_page_is_what_the_code_says() -> None:
    now = page(sections())
    assert PAGE.read_text(encoding="utf-8") == now, ANEW


def test_every_field_is_on_the_page_with_its_default() -> None:
    found = {one.name: {field.name: field for field in one.fields} for one in sections()}
    assert found["training"]["lr"].default == "0.001"
    assert found["training"]["steps"].default == LEFT_OUT
    assert found["top"]["method"].default == '{name = "lora"}'
    assert found["lora"]["rank"].takes == "whole number, at least 1"
    for name, method in METHODS.items():
        assert found[name].keys() == {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    tables = {name for name in get_type_hints(Config) if name in found}
    assert found["top"].keys() | tables == {field.name for field in dataclasses.fields(Config)}


@dataclass(frozen=True)
class Example:
    """A sentence.

    Another one.
    """

    name: str
    """The first
    field."""
    size: int = 3
    'In other quotes, with | in it.'  # fmt: skip
    bare: int = 4

    def method(self) -> None:
        """No field."""


def test_docstrings_of_fields_are_read_from_the_source() -> None:
    assert field_docstrings(Example) == {
        "name": "The first field.",
        "size": "In other quotes, with | in it.",
    }


def test_a_class_without_a_source_has_no_docstrings_of_fields() -> None:
    names: dict[str, Any] = {"__name__": "nowhere", "dataclass": dataclass}
    exec("@dataclass\nclass Made:\n    a: int = 1\n    '''Text.'''", names)
    assert field_docstrings(names["Made"]) == {}


def test_types_are_told_in_words() -> None:
    assert takes(Annotated[int, Ge(0), Le(2**62)]) == f"whole number, at least 0, at most {2**62}"
    assert takes(Annotated[float, Ge(0.0), Lt(1)]) == "number, at least 0, below 1"
    assert takes(Literal["a", "b"] | None) == '"a" or "b"'
    assert takes(str | tuple[str, ...]) == "text or list of: text"
    assert takes(dict[str, Any]) == "table"
    assert takes(Path | None) == "path"


def test_a_section_is_found_by_its_name_or_the_nearest_is_told() -> None:
    assert section("fedara").heading == 'method "fedara"'
    with pytest.raises(BadInput, match="did you mean 'training'"):
        section("trainign")


def test_the_command_prints_all_sections_or_one() -> None:
    everything = cli_call("config")
    assert everything.code == 0, everything
    words = " ".join(everything.out.split())
    for one in sections():
        assert one.heading in words
    alone = cli_call("config", "training")
    assert alone.code == 0, alone
    assert "keep_optimizer" in alone.out
    assert "clients_per_round" not in alone.out
    assert "pre_classifier_rank" in cli_call("config", "slora").out


def test_the_command_writes_the_page() -> None:
    assert cli_call("config", "--markdown").out == PAGE.read_text(encoding="utf-8"), ANEW
    assert "## [training]" in cli_call("config", "training", "--markdown").out
    assert "## [data]" not in cli_call("config", "training", "--markdown").out


def test_the_command_refuses_an_unknown_name_in_one_line() -> None:
    refused(cli_call("config", "trainign"), "'trainign'", "did you mean 'training'?")


def test_no_field_of_a_configuration_is_required() -> None:
    assert all(field.default != REQUIRED for one in sections() for field in one.fields)
