"""What a training would cost on other machines: bytes, seconds and memory, from its recipe."""
