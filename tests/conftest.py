"""What every test starts from: one thread, the same seeds, figures without a screen."""

import random

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    from matplotlib import pyplot

    pyplot.close("all")
