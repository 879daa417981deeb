"""One call for every generator that training draws from."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)  # also every GPU
    np.random.seed(seed % 2**32)
    random.seed(seed)
