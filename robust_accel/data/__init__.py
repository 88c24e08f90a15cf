"""Images from a hub, a folder or parquet to batches: who trains on which image, and how."""

from robust_accel.data.batches import Sampler, TrainingBatches
from robust_accel.data.images import (
    NO_LABEL,
    Batch,
    FileImages,
    ImageSet,
    MemoryImages,
    crop_flip,
    seeded_generator,
)
from robust_accel.data.loading import (
    CONFIDENCE,
    PSEUDO_LABEL,
    Data,
    load_data,
    load_test,
    load_to_label,
)
from robust_accel.data.settings import DataSettings, UnlabeledSettings

__all__ = [
    "CONFIDENCE",
    "NO_LABEL",
    "PSEUDO_LABEL",
    "Batch",
    "Data",
    "DataSettings",
    "FileImages",
    "ImageSet",
    "MemoryImages",
    "Sampler",
    "TrainingBatches",
    "UnlabeledSettings",
    "crop_flip",
    "load_data",
    "load_test",
    "load_to_label",
    "seeded_generator",
]
