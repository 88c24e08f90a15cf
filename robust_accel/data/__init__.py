"""Images from a hub, a folder or parquet to batches: who trains on which image, and how."""

from robust_accel.data.augmentation import Mixing
from robust_accel.data.batch_augmentation import augmented
from robust_accel.data.batches import Sampler, TrainingBatches
from robust_accel.data.classes import (
    ClassNames,
    compared_by_number,
    match_classes,
    renumbered,
)
from robust_accel.data.ids import IMAGENET5000, Ids
from robust_accel.data.images import (
    NO_LABEL,
    Batch,
    FileImages,
    ImageSet,
    MemoryImages,
    derived_seed,
    seeded_generator,
)
from robust_accel.data.loading import (
    Data,
    DataIdentity,
    EvaluationImages,
    identity_of,
    load_data,
    load_test,
    load_to_label,
    selection_of,
)
from robust_accel.data.settings import DataSettings, MixSettings, UnlabeledSettings
from robust_accel.data.unlabeled import CONFIDENCE, LABELED_FILES, PSEUDO_LABEL

__all__ = [
    "CONFIDENCE",
    "IMAGENET5000",
    "LABELED_FILES",
    "NO_LABEL",
    "PSEUDO_LABEL",
    "Batch",
    "ClassNames",
    "Data",
    "DataIdentity",
    "DataSettings",
    "EvaluationImages",
    "FileImages",
    "Ids",
    "ImageSet",
    "MemoryImages",
    "MixSettings",
    "Mixing",
    "Sampler",
    "TrainingBatches",
    "UnlabeledSettings",
    "augmented",
    "compared_by_number",
    "derived_seed",
    "identity_of",
    "load_data",
    "load_test",
    "load_to_label",
    "match_classes",
    "renumbered",
    "seeded_generator",
    "selection_of",
]
