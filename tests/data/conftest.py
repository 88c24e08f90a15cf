"""What datasets writes on the way goes to pytest's folder."""

import pytest


@pytest.fixture(autouse=True)
def _cache_in_tmp(datasets_in_tmp: None) -> None: ...
