"""Orders without a list: each image has one place, and all orders are about as likely."""

import numpy as np
import pytest
import torch

from robust_accel.data.orders import Order, draws


@pytest.mark.parametrize("length", [*range(1, 35), 255, 256, 257, 4999, 2**16 + 1])
def test_each_image_has_one_place_whatever_is_asked_for_at_a_time(length: int) -> None:
    whole = Order(length, 1, 2)[torch.arange(length)]
    assert sorted(whole.tolist()) == list(range(length))
    some = torch.tensor([length - 1, 0, length // 2])
    assert torch.equal(Order(length, 1, 2)[some], whole[some])


def test_keys_are_other_orders_and_no_place_is_an_images_own() -> None:
    length, places = 1000, torch.arange(1000)
    orders = torch.stack([Order(length, 7, epoch)[places] for epoch in range(300)])
    assert len({tuple(order.tolist()) for order in orders}) == 300
    # each image is at a mean place of 499.5; a standard error is 288.7 / sqrt(300) = 16.7
    assert ((orders.float().mean(dim=0) - 499.5).abs() < 6 * 16.7).all()
    fixed = (orders == places).sum().item()  # 300 are expected, with a standard deviation of 17
    assert 200 < fixed < 400
    neighbours = (orders[:, 1:] - orders[:, :-1] == 1).sum().item()  # likewise
    assert 200 < neighbours < 400


def test_a_part_of_an_order_is_spread_over_all_images() -> None:
    number = 50_000_000
    found = Order(number, 3)[torch.arange(100_000)]
    assert len(found.unique()) == 100_000
    counts = np.bincount((found * 100 // number).numpy(), minlength=100)
    # a sum of 100 squares: 100 are expected, with a standard deviation of 14
    assert ((counts - 1000) ** 2 / 1000).sum() < 200


def test_draws_follow_from_key_and_index_alone_and_are_even() -> None:
    indices = torch.arange(90_000)
    found = draws(indices, 5, 1)
    assert (found >= 0).all()
    assert torch.equal(draws(indices.flip(0), 5, 1), found.flip(0))
    assert not torch.equal(draws(indices, 5, 2), found)
    assert not torch.equal(draws(indices, 6, 1), found)
    for shift, sides in ((0, 9), (20, 9), (40, 2)):
        counts = np.bincount(((found >> shift) % sides).numpy(), minlength=sides)
        expected = 90_000 / sides
        assert ((counts - expected) ** 2 / expected).sum() < 40
