"""The name under which users import ``robust_accel.integrations.transformers``."""

from robust_accel.integrations.transformers import QuantizedGradients, RobustAccuracy

__all__ = ["QuantizedGradients", "RobustAccuracy"]
