"""Run in a fresh process, without fedpeft: load what was exported as its users would, and write down its logits.

The one argument is a JSON file of {name: {"adapter" or "merged": folder, "base": folder, "labels": n}}; the texts are under
"texts", the result goes where "out" says.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def logits(folder: str, model: Any, texts: list[str]) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        raise SystemExit(f"{folder}: the tokenizer has no padding token")
    model.config.pad_token_id = tokenizer.pad_token_id  # as GPT-2 wants it; what was merged says so itself
    batch = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, torch.Tensor] = {}
    load: Any = AutoModelForSequenceClassification.from_pretrained
    for name, one in plan["models"].items():
        if "merged" in one:
            merged = load(one["merged"])
            if merged.config.pad_token_id is None:
                raise SystemExit(f"{one['merged']}: the model does not know its padding token")
            found[name] = logits(one["merged"], merged, plan["texts"])
        else:
            base = load(one["base"], num_labels=one["labels"])  # with a head drawn at random, as any user's
            found[name] = logits(one["adapter"], PeftModel.from_pretrained(base, one["adapter"]), plan["texts"])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, plan["out"])
    if "fedpeft" in sys.modules:
        raise SystemExit("fedpeft was imported: this is no fresh process")


if __name__ == "__main__":
    main()
