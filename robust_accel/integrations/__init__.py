"""The same attack in other people's loops: a script's own model, transformers' Trainer."""
