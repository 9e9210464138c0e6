"""Training stages: `train(settings)` runs one."""

from .loop import TrainingSummary, train
from .settings import (
    STAGES,
    MntpSettings,
    PretrainSettings,
    SimcseSettings,
    SupervisedSettings,
    TrainingSettings,
    read_settings,
)

__all__ = [
    "STAGES",
    "MntpSettings",
    "PretrainSettings",
    "SimcseSettings",
    "SupervisedSettings",
    "TrainingSettings",
    "TrainingSummary",
    "read_settings",
    "train",
]
