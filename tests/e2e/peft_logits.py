"""Run in a fresh process, without fedpeft: load what was exported as its users would, and write down its logits.

The one argument is a JSON file of {name: {"adapter" or "merged": folder, "base": folder, "labels": n}}; the texts are under
"texts", the result goes where "out" says: a merged model's under its name, an adapter's under
"name, way" for every way to load it. The labels of a pipeline go where "said" says, by name.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

load: Any = AutoModelForSequenceClassification.from_pretrained
classifier: Any = pipeline


def logits(folder: str, model: Any, texts: list[str]) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        raise SystemExit(f"{folder}: the tokenizer has no padding token")
    model.config.pad_token_id = (
        tokenizer.pad_token_id
    )  # as GPT-2 wants it; what was merged says so itself
    batch = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    return found


def ways(folder: str, base: str, labels: int) -> dict[str, Any]:
    """Return an adapter on its base model, by the ways that there are to load it."""
    config: Any = AutoConfig.from_pretrained(f"{folder}/labels")
    auto_peft: Any = AutoPeftModelForSequenceClassification
    bare = load(base, num_labels=labels)  # with a head drawn at random, as any user's
    size = {"num_labels": labels}
    piped = classifier("text-classification", folder, tokenizer=folder, model_kwargs=size)
    return {
        "peft": PeftModel.from_pretrained(bare, folder),
        "auto peft": auto_peft.from_pretrained(folder, id2label=config.id2label),
        "transformers": load(folder, num_labels=labels),
        "configuration": load(folder, config=config),
        "pipeline": piped.model,
    }


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, torch.Tensor] = {}
    said: dict[str, list[str]] = {}
    for name, one in plan["models"].items():
        if "merged" in one:
            merged = load(one["merged"])
            if merged.config.pad_token_id is None:
                raise SystemExit(f"{one['merged']}: the model does not know its padding token")
            found[name] = logits(one["merged"], merged, plan["texts"])
        else:
            folder = one["adapter"]
            models = ways(folder, one["base"], one["labels"])
            for way, model in models.items():
                found[f"{name}, {way}"] = logits(folder, model, plan["texts"])
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            named = classifier("text-classification", models["configuration"], tokenizer=tokenizer)
            said[name] = [best["label"] for best in named(plan["texts"])]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, plan["out"])
    Path(plan["said"]).write_text(json.dumps(said))
    if "fedpeft" in sys.modules:
        raise SystemExit("fedpeft was imported: this is no fresh process")


if __name__ == "__main__":
    main()
