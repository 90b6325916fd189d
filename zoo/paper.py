"""The paper's two networks, as its authors' code has them.

Source: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898, and the authors' Keras notebooks.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bln import BatchLayerNorm
from zoo._norms import ChannelLayerNorm, Norm
from zoo._registry import register

__all__ = ["DropoutLSTM", "PaperCNN", "PaperLSTM"]

EPS = 1e-3
"""Of every norm in the paper's code."""


def _norm(norm: Norm, features: int, *, dims: int = 2) -> nn.Module:
    """A norm for inputs of so many axes, with Keras' settings: weight 1, bias 0, BatchNorm's momentum 0.99.

    Keras' momentum is the weight of the old value, torch's that of the new one.
    """
    if callable(norm):
        return norm(features)
    if norm == "bln":
        return BatchLayerNorm(features, eps=EPS)
    if norm == "bn":
        return (nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d)(features, eps=EPS, momentum=0.01)
    if norm == "ln":
        return (nn.LayerNorm if dims == 2 else ChannelLayerNorm)(features, eps=EPS)
    raise ValueError(f"norm must be one of 'bln', 'bn', 'ln', as in the paper, or a callable, got {norm!r}.")


class PaperCNN(nn.Module):
    """A LeNet of tanh units with a norm after each pooling and each hidden dense layer.

        conv 6 5x5 same, tanh, average pool 2, N, conv 16 5x5 valid, tanh, average pool 2, N, flatten (576),
        dense 120, tanh, N, dense 84, tanh, N, dense num_classes

    Convolutions start from Glorot's uniform distribution, dense layers from orthogonal matrices, biases from 0.

    Shapes: (N, 3, 32, 32) to (N, num_classes). The authors standardise images by pixel and channel.

    Args:
        norm: "bln" (default), "bn", "ln", or a callable that takes the number of features.
        num_classes: Default 10; 0 for features (N, 84).

    Raises:
        ValueError: If ``norm`` is not known.

    Source: the authors' CIFAR-10 notebook.
    """

    classifier: ClassVar[str] = "fc3"

    def __init__(self, norm: Norm = "bln", num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5, padding=2)
        self.norm1 = _norm(norm, 6, dims=4)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.norm2 = _norm(norm, 16, dims=4)
        self.fc1 = nn.Linear(576, 120)
        self.norm3 = _norm(norm, 120)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = _norm(norm, 84)
        self.fc3: nn.Module = nn.Linear(84, num_classes) if num_classes else nn.Identity()
        self.pool = nn.AvgPool2d(2)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                start = nn.init.xavier_uniform_ if isinstance(module, nn.Conv2d) else nn.init.orthogonal_
                start(module.weight)
                nn.init.zeros_(module.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.norm1(self.pool(torch.tanh(self.conv1(x))))
        x = self.norm2(self.pool(torch.tanh(self.conv2(x))))
        x = self.norm3(torch.tanh(self.fc1(x.flatten(1))))
        x = self.norm4(torch.tanh(self.fc2(x)))
        return self.fc3(x)


class DropoutLSTM(nn.Module):
    """An LSTM layer as Keras has it, with dropout on its inputs and on its recurrent state.

        i, f, g, o = W_x (x_t * m_x) + W_h (h_{t-1} * m_h) + b
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)        h_t = sigmoid(o) * tanh(c_t)

    The masks m_x and m_h are drawn once a sequence and hold for all its steps, in training only.

    Shapes: (N, T, input_size) to (N, T, hidden_size).

    Args:
        input_size: Features of a step.
        hidden_size: Features of a state.
        dropout: Of inputs. Default 0.2.
        recurrent_dropout: Of the state. Default 0.2.

    Source: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016;
    start values as in the authors' notebook: Glorot's uniform distribution, biases 0 and 1 for the forget gate.
    """

    def __init__(self, input_size: int, hidden_size: int, dropout: float = 0.2, recurrent_dropout: float = 0.2) -> None:
        super().__init__()
        self.hidden_size, self.dropout, self.recurrent_dropout = hidden_size, dropout, recurrent_dropout
        self.input_weight = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.hidden_weight = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        nn.init.xavier_uniform_(self.input_weight)
        nn.init.xavier_uniform_(self.hidden_weight)
        nn.init.ones_(self.bias.detach()[hidden_size : 2 * hidden_size])

    def forward(self, x: Tensor) -> Tensor:
        """All states."""
        n, steps, size = x.shape
        x = x * F.dropout(x.new_ones(n, 1, size), self.dropout, self.training)
        gates_of_inputs = F.linear(x, self.input_weight, self.bias)
        mask = F.dropout(x.new_ones(n, self.hidden_size), self.recurrent_dropout, self.training)
        h = c = gates_of_inputs.new_zeros(n, self.hidden_size)
        states = []
        for step in range(steps):
            gates = gates_of_inputs[:, step] + F.linear(h * mask, self.hidden_weight)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 1)


class PaperLSTM(nn.Module):
    """Two LSTM layers on an embedding, with a norm after each LSTM and after the dense layer.

        embedding 20,000 x 512, LSTM 128, N, LSTM 64 (last state), N, dense 32, tanh, N, dense num_classes

    The first norm's statistics are for each time step. Matrices start from Glorot's uniform distribution, biases from
    0, the LSTMs' forget gates from 1.

    Shapes: tokens (N, T), int64, padded in front to T = 80 by the authors, to (N, num_classes).

    Args:
        norm: "bln" (default), "bn", "ln", or a callable that takes the number of features.
        num_classes: Default 1, a logit; 0 for features (N, 32).
        vocabulary_size: Default 20,000.

    Raises:
        ValueError: If ``norm`` is not known.

    Source: the authors' IMDb notebook.
    """

    classifier: ClassVar[str] = "fc2"

    def __init__(self, norm: Norm = "bln", num_classes: int = 1, vocabulary_size: int = 20_000) -> None:
        super().__init__()
        table = nn.init.xavier_uniform_(torch.empty(vocabulary_size, 512))
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.lstm1 = DropoutLSTM(512, 128)
        self.norm1 = _norm(norm, 128, dims=3)
        self.lstm2 = DropoutLSTM(128, 64)
        self.norm2 = _norm(norm, 64)
        self.fc1 = nn.Linear(64, 32)
        self.norm3 = _norm(norm, 32)
        self.fc2: nn.Module = nn.Linear(32, num_classes) if num_classes else nn.Identity()
        for module in (self.fc1, self.fc2):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores."""
        x = self.lstm1(self.embedding(tokens))
        # Contiguous, since torch.compile takes a BatchNorm's output for strided as its input: pytorch/pytorch#192668.
        x = self.norm1(x.transpose(1, 2).contiguous()).transpose(1, 2)
        x = self.norm2(self.lstm2(x)[:, -1])
        x = self.norm3(torch.tanh(self.fc1(x)))
        return self.fc2(x)


for _name in ("bln", "bn", "ln"):
    register(f"paper_cnn_{_name}", partial(PaperCNN, norm=_name))
    register(f"paper_lstm_{_name}", partial(PaperLSTM, norm=_name))
