"""Gradient communication: quantiser, protocols, and their place in DDP and DeepSpeed."""

from robust_accel.comm.base import Collective, GradientCompression
from robust_accel.comm.collectives import COLLECTIVES, QSGD, AllReduce
from robust_accel.comm.compress import compress_gradients
from robust_accel.comm.meter import Meter
from robust_accel.comm.workers import Workers

__all__ = [
    "COLLECTIVES",
    "QSGD",
    "AllReduce",
    "Collective",
    "GradientCompression",
    "Meter",
    "Workers",
    "compress_gradients",
]
