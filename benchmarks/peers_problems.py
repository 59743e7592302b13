"""Two trained networks to compare influence on: a small MLP, and the all-CNN that comes with the project."""

import torch
from torch import Tensor, nn

from influence_nb import data, models


def images(n_train: int, n_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """train_x, train_y, test_x, test_y: the first images of mnist-5500's two halves; beyond its 5,500 training images
    they come again, each time with other noise."""
    train, test = data.load("mnist-5500")
    rows = torch.arange(n_train) % len(train)
    noise = torch.randn(n_train, *train.x.shape[1:], generator=torch.Generator().manual_seed(0))
    noise[:len(train)] = 0
    return train.x[rows] + 0.1 * noise, train.y[rows], test.x[:n_test].clone(), test.y[:n_test].clone()


def mlp_problem(n_train: int = 5000, n_test: int = 100, epochs: int = 30, l2: float = 1e-3, seed: int = 0):
    """A tanh MLP 784-120-40-10 of 99,450 parameters, after 30 epochs of Adam on mean loss + (l2/2) |theta|^2."""
    train_x, train_y, test_x, test_y = images(n_train, n_test)
    model = models.mlp([784, 120, 40, 10], seed=seed)
    weights, order = list(model.parameters()), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(weights, lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(n_train, generator=order).split(100):
            risk = nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])
            risk = risk + 0.5 * l2 * sum(p.square().sum() for p in weights)
            adam.zero_grad()
            risk.backward()
            adam.step()
    return model.eval(), train_x, train_y, test_x, test_y


def all_cnn_problem(n_train: int = 5500, n_test: int = 100):
    """The project's all-CNN of 2,616 parameters, trained on mnist-5500 with l2 = 1e-3."""
    return models.trained_all_cnn(), *images(n_train, n_test)


PROBLEMS = {"mlp": mlp_problem, "all_cnn": all_cnn_problem}
