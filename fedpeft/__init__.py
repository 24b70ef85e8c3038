"""Federated parameter-efficient fine-tuning of language models: SLoRA, FeDeRA, FedARA and their rivals, side by side."""
