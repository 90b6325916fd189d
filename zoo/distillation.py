"""Knowledge distillation: a model learns the outputs of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from zoo._registry import create_model
from zoo._weights import Standardize, get_weights

__all__ = ["Teachers", "distillation_loss"]


class Teachers:
    """Trained models of the zoo whose probabilities are averaged. They never train, and no state_dict has them.

    Args:
        names: ``arch.tag`` of each, all of the same classes, two or more.
        mirror: Average over each image and its mirror image too, which costs twice the time. Default False.

    Raises:
        ValueError: If there are none, or one is not in the zoo, or their classes differ or are fewer than two, or
            mirrored inputs are not images.

    Example:
        >>> Teachers(["cnn_bn.digits", "cnn_bln.digits"]).num_classes
        10
    """

    def __init__(self, names: Sequence[str], mirror: bool = False) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(
                f'Teachers must be a list of names of weights, got {names!r}; pass ["resnet20_bn.cifar10"], say.'
            )
        self._weights = [get_weights(name) for name in names]
        self.names = [weights.name for weights in self._weights]
        self.classes = self._weights[0].metadata["classes"]
        self.num_classes = int(self._weights[0].metadata["arguments"]["num_classes"])
        if any(weights.metadata["classes"] != self.classes for weights in self._weights) or self.num_classes < 2:
            listed = "; ".join(f"{weights.name}: {', '.join(weights.metadata['classes'])}" for weights in self._weights)
            raise ValueError(
                f"Teachers must have the same classes, as outputs of two or more, got {listed}; pass weights that were "
                f"trained on one data set."
            )
        kinds = {weights.name: weights.metadata["input"]["kind"] for weights in self._weights}
        if mirror and set(kinds.values()) != {"image"}:
            raise ValueError(f"Mirrored inputs must be images, got teachers of {kinds}; pass mirror=False.")
        self.mirror = mirror
        self._models: list[nn.Module] = []

    def check(self, num_classes: int, data: Any = None) -> None:
        """Raise ValueError unless they fit a model's number of classes, and the data of a training.

        Args:
            num_classes: Of the model.
            data: With ``classes``, ``mean`` and ``std`` as the zoo's data modules have them; what it lacks is not
                checked. Inputs must be standardised as in the teachers' trainings. Default None.
        """
        if self.num_classes != num_classes:
            raise ValueError(
                f"Teachers must have as many classes as the model, {num_classes}, got {self.num_classes}; pass "
                f"num_classes={self.num_classes}, or other teachers."
            )
        if list(getattr(data, "classes", None) or self.classes) != list(self.classes):
            raise ValueError(
                f"Teachers must have the data's classes, {', '.join(data.classes)}, got {', '.join(self.classes)}; "
                f"pass weights that were trained on these data."
            )
        for weights in self._weights:
            theirs = weights.transforms()
            if not isinstance(theirs, Standardize):
                continue
            for name in ("mean", "std"):
                ours = getattr(data, name, None)
                if isinstance(ours, Tensor) and not _near(ours, getattr(theirs, name)):
                    raise ValueError(
                        f"Inputs must be standardised as in the teachers' trainings, and {weights.name} had another "
                        f"{name}; give the data module the arguments of its recipe, {weights.metadata['recipe']}."
                    )

    def load_(self, device: torch.device) -> None:
        """Read the models and move them to a device. Convolutions absorb the BatchNorms behind them."""
        self._models = []
        for weights in self._weights:
            model = create_model(weights.arch, weights=weights.tag).eval()
            if any(isinstance(module, nn.Conv2d) for module in model.modules()):
                if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
                    model = fuse(model)
                model.to(memory_format=torch.channels_last)
            self._models.append(model.requires_grad_(False).to(device))

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Tensor], temperature: float) -> Tensor:
        """softmax(logits / temperature), averaged over the teachers: (N, num_classes), float32.

        They compute in float32, or as autocast says. Loads them where the inputs are, if that was not done.

        Args:
            inputs: The arguments of a model.
            temperature: Above 1 for softer probabilities.
        """
        if not self._models:
            self.load_(inputs[0].device)
        inputs = [value.float() if value.is_floating_point() else value for value in inputs]
        views = [inputs, [inputs[0].flip(3)]] if self.mirror else [inputs]
        shares = [(model(*view).float() / temperature).softmax(1) for view in views for model in self._models]
        return torch.stack(shares).mean(0)


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether both may be of one data set: parts of it differ a little."""
    return one.numel() == other.numel() and bool((one.flatten() - other.flatten()).abs().max() <= 0.1)


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
