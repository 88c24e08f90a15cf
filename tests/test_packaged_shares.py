"""Shares of a batch in packaged recipes: one to eight processes of a machine can deal them."""

import torch

from robust_accel.data import Data, MemoryImages, TrainingBatches
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import packaged_recipes


def test_shares_are_dealt_to_one_two_four_and_eight_processes() -> None:
    pixels, labels = torch.zeros(50_000, 1, 1, 1, dtype=torch.uint8), torch.zeros(50_000).long()
    images = MemoryImages(pixels, labels)
    dealt, refused = set(), {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        shares = [own.fraction for own in recipe.data.extra if own.fraction is not None]
        if not shares:
            continue
        data = Data(images, images, images, 1, images, further=(images,) * (len(shares) - 1))
        for processes in (1, 2, 4, 8):
            try:
                TrainingBatches(
                    data,
                    fraction=shares,
                    batch_size=recipe.train.batch_size,
                    num_micro=recipe.train.gradient_accumulation,
                    rank=0,
                    world_size=processes,
                    seed=0,
                    sharding=recipe.data.sharding,
                )
            except ValueError as error:
                refused[name, processes] = str(error)
        dealt.add(name)
    assert refused == {}
    assert {"cifar10/generated_1m", "cifar10/generated_20m", "cifar10/rst"} <= dealt
