"""Use a pretrained model of the zoo as it is: its features of images, and a classifier of scikit-learn on them.

python examples/features.py
"""

from __future__ import annotations

import argparse

import torch
from digits import digits
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import zoo


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output for each image, (N, 64) for a ResNet-20 without its classifier."""
    return torch.cat([model(batch) for batch in images.split(100)])


def accuracy_on(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train[0].numpy(), train[1].numpy())
    return classifier.score(test[0].numpy(), test[1].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="cifar10", help="a tag of zoo.list_models(pretrained=True), or none")
    parser.add_argument("--fast", action="store_true", help="a few images only, to see that everything runs")
    args = parser.parse_args()
    console = Console(highlight=False)
    torch.manual_seed(0)

    pretrained = None if args.weights == "none" else args.weights
    transform = nn.Identity() if pretrained is None else zoo.get_weights(f"resnet20_bln.{pretrained}").transforms()
    model = zoo.create_model("resnet20_bln", weights=pretrained, num_classes=0).eval()

    train, _, test = digits(size=32, channels=3)
    pixels_of_train, _, pixels_of_test = digits()
    counts = (100, 50) if args.fast else (len(train), len(test))
    rows = {"8x8 pixels": [], "features": []}
    for resized, small, count in ((train, pixels_of_train, counts[0]), (test, pixels_of_test, counts[1])):
        images, labels = (tensor[:count] for tensor in resized.tensors)
        rows["8x8 pixels"].append((small.tensors[0][:count].flatten(1), labels))
        # The weights' transform takes pixels from 0 to 1.
        rows["features"].append((features(model, transform(images + 0.5)), labels))
    console.print(f"Logistic regression on {counts[0]} images of digits, test accuracy on {counts[1]} others:")
    for name, (fitted, scored) in rows.items():
        console.print(f"  {fitted[0].shape[1]} {name}: {accuracy_on(fitted, scored):.1%}")


if __name__ == "__main__":
    main()
