"""Train the all-CNN that ships as all_cnn_mnist-5500.npz: python data/make_all_cnn.py (some minutes on one core).

The published set-up (all-CNN, 5,500 training images, batches of 500, Adam, l2 0.001 on weights) with a higher learning
rate and fewer steps: 500 epochs from 0.004, a tenth of it after half of them, a hundredth after four fifths. Another
machine's arithmetic may round differently and end at slightly other weights.
"""

from functools import partial
from pathlib import Path

import torch

from influence_nb import Task, data, fit, models

EPOCHS = 500

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = models.all_cnn(seed=0).to(memory_format=torch.channels_last)
    task = Task(model, *data.load("mnist-5500"), l2=1e-3)
    history = fit(task, EPOCHS, batch_size=500, optimizer=partial(torch.optim.Adam, lr=4e-3), seed=0,
                  schedule=lambda epoch: 1.0 if epoch < 0.5 * EPOCHS else 0.1 if epoch < 0.8 * EPOCHS else 0.01)
    mistakes = task.mistakes()
    print(f"risk {history.risk[-1]:.4f}, test mistakes {len(mistakes)} of {len(task.test)}, "
          f"of which sixes: {[i for i in mistakes.tolist() if task.test.y[i] == 6]}")
    print(models.save_weights(model, Path(__file__).with_name("all_cnn_mnist-5500.npz")).name)
