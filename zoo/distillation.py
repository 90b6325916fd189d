"""Knowledge distillation: a model learns the outputs of trained ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from zoo._registry import create_model
from zoo._weights import get_weights

__all__ = ["Teachers", "distillation_loss"]


class Teachers:
    """Trained models of the zoo whose probabilities are averaged. They never train, and no state_dict has them.

    Args:
        names: ``arch.tag`` of each, of one number of classes, two or more.

    Raises:
        ValueError: If there are none, or one is not in the zoo, or their numbers of classes differ or are below two.

    Example:
        >>> Teachers(["cnn_bn.digits", "cnn_bln.digits"]).num_classes
        10
    """

    def __init__(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(
                f'Teachers must be a list of names of weights, got {names!r}; pass ["resnet20_bn.cifar10"], say.'
            )
        self.names = [get_weights(name).name for name in names]
        classes = {name: int(get_weights(name).metadata["arguments"]["num_classes"]) for name in self.names}
        self.num_classes = classes[self.names[0]]
        if len(set(classes.values())) > 1 or self.num_classes < 2:
            raise ValueError(f"Teachers must have one number of classes, two or more, got {classes}.")
        self._models: list[nn.Module] = []

    def load_(self, device: torch.device) -> None:
        """Read the models and move them to a device. Convolutions absorb the BatchNorms behind them."""
        self._models = []
        for name in self.names:
            arch, _, tag = name.partition(".")
            model = create_model(arch, weights=tag).eval()
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
                model = fuse(model)
            if any(isinstance(module, nn.Conv2d) for module in model.modules()):
                model.to(memory_format=torch.channels_last)
            self._models.append(model.requires_grad_(False).to(device))

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Tensor], temperature: float) -> Tensor:
        """softmax(logits / temperature), averaged over the teachers: (N, num_classes), float32.

        Args:
            inputs: The arguments of a model.
            temperature: Above 1 for softer probabilities.
        """
        shares = [(model(*inputs).float() / temperature).softmax(1) for model in self._models]
        return torch.stack(shares).mean(0)


def distillation_loss(outputs: Tensor, labels: Tensor, targets: Tensor, share: float, temperature: float) -> Tensor:
    """Cross-entropy with the labels, and divergence from the teachers' probabilities.

        (1 - share) * CE(softmax(z), label) + share * T^2 * KL(targets || softmax(z / T))

    T^2 keeps the second term's gradients of the size of the first one's.

    Args:
        outputs: z, logits (N, classes).
        labels: (N,), int64.
        targets: Probabilities at this temperature (N, classes).
        share: Of the second term, 0 to 1.
        temperature: T.

    Returns:
        The average over the samples.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    divergence = F.kl_div((outputs / temperature).log_softmax(1), targets, reduction="batchmean")
    return (1 - share) * F.cross_entropy(outputs, labels) + share * temperature**2 * divergence
