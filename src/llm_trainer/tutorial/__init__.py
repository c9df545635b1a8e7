"""Training a language model with nothing hidden. Read in this order:

1. `loss.py`: what is minimised, and how a batch of any size is averaged correctly.
2. `optimizers.py`: how a gradient becomes a new parameter: SGD, then AdamW.
3. `schedule.py`: how large that change is at each step.
4. `trainer.py`: the loop around them: accumulation, clipping, mixed precision, validation, checkpoints.

Nothing here uses the rest of the package and nothing there uses this: the tests hold the two editions to one curve.
"""

from .loss import cross_entropy_sum
from .optimizers import AdamWFromScratch, SGDFromScratch
from .schedule import warmup_cosine
from .trainer import TrainerFromScratch

__all__ = ["AdamWFromScratch", "SGDFromScratch", "TrainerFromScratch", "cross_entropy_sum", "warmup_cosine"]
