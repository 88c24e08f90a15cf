"""Reports are tested whole."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _whole(pictures: None) -> None:
    pass
