"""What `fedpeft methods` reads from the methods' files is what their classes say, and it needs no torch."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from fedpeft import methods
from fedpeft.cli import catalogue as catalogue_module
from fedpeft.cli.catalogue import Entry, catalogue
from fedpeft.methods import METHODS
from fedpeft.methods.lora import LoRA


def test_the_files_say_what_the_classes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalogue_module.GROUP == methods.GROUP
    monkeypatch.setattr(catalogue_module, "entry_points", lambda group: ())
    said: list[Entry] = []
    for name, method in METHODS.items():
        assert method.__doc__
        said.append(Entry(name, method.__doc__.splitlines()[0], method.paper))
    assert catalogue() == said


def test_the_list_needs_no_torch() -> None:
    """Importing it takes seconds; whoever asks for a list does not wait for it."""
    program = (
        "import sys\n"
        "from fedpeft.cli import catalogue\n"
        "from fedpeft.cli.preparing import methods\n"
        "catalogue.entry_points = lambda group: ()\n"
        "methods()\n"
        "print(*{'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "federa" in done.stdout


def test_a_method_of_another_package_is_listed_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "fedpeft.methods.lora:LoRA", methods.GROUP)
    for module in (methods, catalogue_module):
        monkeypatch.setattr(module, "entry_points", lambda group: [point])
    listed = catalogue()
    assert LoRA.__doc__
    assert listed[0] == Entry("theirs", LoRA.__doc__.splitlines()[0], LoRA.paper)
    assert {entry.name for entry in listed} == {"theirs", *METHODS}
