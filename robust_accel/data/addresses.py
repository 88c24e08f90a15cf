"""Where data may lie, if not in a local file or on the hub by its name."""

_AWAY = ("hf", "http", "https", "s3", "gs", "gcs", "az", "abfs")


def check_address(path: str) -> None:
    """Refuse an address that does not lead to a file elsewhere; all that is none is let pass.

    What others can do, a chain (``zip://a::b``) or another name for a local file (``file://``),
    would be opened unseen, where a pipe is waited for without end.

    Raises:
        ValueError: ``path: ...``.
    """
    scheme, is_address, _ = path.partition("://")
    if "::" in path or (is_address and scheme not in _AWAY):
        allowed = ", ".join(f"{name}://" for name in _AWAY)
        raise ValueError(f"path: {path!r} is not read here: allowed are local paths, and {allowed}")
