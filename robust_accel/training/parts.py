"""What a run is made of, from its recipe and data."""

from robust_accel.data import Data, TrainingBatches
from robust_accel.models import PixelClassifier, check_fits, create_classifier
from robust_accel.recipe import Recipe


def batches(recipe: Recipe, data: Data, rank: int, world_size: int) -> TrainingBatches:
    """A process's share of the training images, in their order."""
    assert recipe.train is not None
    unlabeled = recipe.data.unlabeled
    return TrainingBatches(
        data,
        fraction=None if unlabeled is None else unlabeled.fraction,
        batch_size=recipe.train.batch_size,
        num_micro=recipe.train.gradient_accumulation,
        rank=rank,
        world_size=world_size,
        seed=recipe.train.seed,
        sharding=recipe.data.sharding,
    )


def check_labels(recipe: Recipe, data: Data) -> None:
    """Refuse unlabelled images where the objective needs labels."""
    if not data.all_labeled and not getattr(recipe.objective, "takes_unlabeled", False):
        raise ValueError(
            f"unlabeled: these images have no labels, and the objective "
            f"{recipe.settings['objective']['name']} needs them: label them by the pseudo-label "
            "command, or choose trades"
        )


def classifier_for(recipe: Recipe, data: Data) -> PixelClassifier:
    """The recipe's model for these images and classes."""
    classifier = create_classifier(
        recipe.model, num_classes=data.num_classes, in_chans=data.shape[0]
    )
    check_fits(classifier, data.train, data.num_classes)
    classifier.class_names = data.class_names
    return classifier
