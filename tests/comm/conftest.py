"""Real processes run a file's scenarios once, for all of its tests; one thread in this one."""

import processes
import pytest
import torch


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    """What the file's TWO returned on each of two ranks."""
    return processes.run(request.module.TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(request, tmp_path_factory):
    """What the file's THREE returned on each of three ranks."""
    return processes.run(request.module.THREE, 3, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.long)])
def ranks(request):
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
