"""The page beside an exported adapter: which base model it goes onto, and how both are loaded."""

from importlib.metadata import version
from pathlib import Path

from fedpeft.models.choice import PACKAGED, locate

_PAGE = """\
# An adapter for {name}

Written by fedpeft {version}. Its base model is {origin}.

```python
{imports}from peft import PeftModel
from transformers import AutoConfig, {auto_class}, AutoTokenizer

adapter = "."  # this folder
config = AutoConfig.from_pretrained(f"{{adapter}}/labels")
base = {auto_class}.from_pretrained({place}, config=config)
model = PeftModel.from_pretrained(base, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
```
{remark}"""
_CONVERTED = """
`base_model_name_or_path` in `adapter_config.json` is the copy of that file that fedpeft has
converted on the machine where this was written; there peft loads adapter and base by itself. The
lines above read the file itself (they need the package `gguf`).
"""


def readme(name: str, auto_class: str) -> str:
    """Return the page, in Markdown, of an adapter for the base model ``name`` of a configuration.

    ``auto_class``: of transformers, which loads it. The Python in it loads base and adapter on any
    machine that has the base: from its package, where it is in one, and a GGUF file as such.
    """
    location = Path(locate(name))
    if name in PACKAGED:
        package, inside, remedy = PACKAGED[name]
        origin = f"`{inside}` in the package `{package}` ({remedy})"
        imports = "from importlib.util import find_spec\n\n"  # it is found without being imported
        root = f'find_spec("{package}").submodule_search_locations[0]'
        place = f'{root}, gguf_file="{inside}"' if location.is_file() else f'{root} + "/{inside}"'
    elif location.is_file():
        origin, imports = f"the GGUF file `{location}`", ""
        place = f"{str(location.parent)!r}, gguf_file={location.name!r}"
    elif location.is_dir():
        origin, imports, place = f"the folder `{location}`", "", repr(str(location))
    else:
        origin, imports, place = f"`{name}` on the Hugging Face hub", "", repr(name)
    return _PAGE.format(
        name=name,
        version=version("fedpeft"),
        origin=origin,
        imports=imports,
        auto_class=auto_class,
        place=place,
        remark=_CONVERTED if location.is_file() else "",
    )
