"""Mixins for the trainers of other libraries: a network trains with an objective, and stays what it was.

`LightningMixin` is for a `LightningModule`, `TrainerMixin` for a Hugging Face `Trainer`. Neither imports its library.
"""

from fastcure.integrations.hugging_face import TrainerMixin
from fastcure.integrations.lightning import LightningMixin

__all__ = ["LightningMixin", "TrainerMixin"]
