"""Messages as bytes: requests and replies, and the safetensors format beneath them."""
