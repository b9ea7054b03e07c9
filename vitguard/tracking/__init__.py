"""Watching attacks and training runs: TensorBoard, and a progress bar with the current estimate."""

from vitguard.tracking.pictures import shuffled_at, what_the_model_saw
from vitguard.tracking.progress import ProgressBar, thumbnail
from vitguard.tracking.tensorboard import TensorBoard, check_writable_folder

__all__ = [
    "ProgressBar",
    "TensorBoard",
    "check_writable_folder",
    "shuffled_at",
    "thumbnail",
    "what_the_model_saw",
]
