"""Losses of each storage format on one loaded model: measured once, kept in the user's cache folder."""

from hf_kvopt.calibration.choose import Chosen, choose, warn_of_loss
from hf_kvopt.calibration.heads import retrieval_heads
from hf_kvopt.calibration.measure import calibrate
from hf_kvopt.calibration.record import Calibration, FormatLoss

__all__ = ["Calibration", "Chosen", "FormatLoss", "calibrate", "choose", "retrieval_heads", "warn_of_loss"]
