"""The commands: each checks what it was given and calls the parts below."""
