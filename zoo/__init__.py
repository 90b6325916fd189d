"""Models with Batch Layer Normalization, each beside its twins with other norms.

import zoo
zoo.list_models("resnet*")
model = zoo.create_model("resnet20_bln", num_classes=10)

zoo.list_models(pretrained=True)
model = zoo.create_model("resnet20_bln", weights="cifar10").eval()
transform = zoo.get_weights("resnet20_bln.cifar10").transforms()
"""

from zoo import cifarnet, cnn, gru, paper, resnet, torchvision_resnet
from zoo._registry import create_model, list_models
from zoo._weights import Weights, get_weights

__all__ = [
    "Weights",
    "cifarnet",
    "cnn",
    "create_model",
    "get_weights",
    "gru",
    "list_models",
    "paper",
    "resnet",
    "torchvision_resnet",
]
