"""Model and data: the handwritten digits that scikit-learn ships."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 96)
        self.out = nn.Linear(96, 10)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def load_data(partition: int, partitions: int) -> DataLoader:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)[partition::partitions] / 16
    labels = torch.tensor(digits.target)[partition::partitions]
    return DataLoader(TensorDataset(images, labels), batch_size=32)


def train(model: nn.Module, loader: DataLoader, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    right = [(model(images).argmax(-1) == labels).float().mean().item() for images, labels in loader]
    return sum(right) / len(right)
