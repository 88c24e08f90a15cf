"""The examples run and do what they say."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_wrap_a_model() -> None:
    spec = importlib.util.spec_from_file_location("wrap_a_model", EXAMPLES / "wrap_a_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(epochs=4) > 0.3  # one in ten would be chance
