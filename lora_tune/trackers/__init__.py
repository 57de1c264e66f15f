"""A study's points and results in TensorBoard, W&B, MLflow and trackio, through accelerate's tracking.

Every trial is a run, every run of the confirmation too, and ``study`` is one with the decision. The
coordinator writes when a segment has ended; the engine knows nothing of it. Nothing is opened unless
``run.trackers`` names it, and a tracker that fails is left out with one note: no study ends for it.
"""

from lora_tune.trackers.backends import check_trackers
from lora_tune.trackers.writer import Trackers, open_trackers

__all__ = ["Trackers", "check_trackers", "open_trackers"]
