"""Gradient communication: quantiser, protocols, and their place in DDP."""

from robust_accel.comm.collectives import COLLECTIVES, QSGD, AllReduce, Collective
from robust_accel.comm.ddp import GradientCompression, compress_gradients
from robust_accel.comm.meter import Meter

__all__ = [
    "COLLECTIVES",
    "QSGD",
    "AllReduce",
    "Collective",
    "GradientCompression",
    "Meter",
    "compress_gradients",
]
