from .contract import Reduction, Signals

__all__ = ["Reduction", "Signals"]
