"""Calibration: a search for the plan that costs a model least, head by head."""

from typing import Any

__all__ = ["CalibrationError", "calibrate"]


def __getattr__(name: str) -> Any:
    """What a search needs, transformers among it, is imported when it is asked for."""
    if name == "calibrate":
        from skvq_ext.calibrate.run import calibrate

        return calibrate
    if name == "CalibrationError":
        from skvq_ext.calibrate.texts import CalibrationError

        return CalibrationError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
