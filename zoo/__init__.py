"""Models with Batch Layer Normalization, each beside its twins with other norms.

import zoo
zoo.list_models("resnet*")
model = zoo.create_model("resnet20_bln", num_classes=10)
"""

from zoo import paper, resnet
from zoo._registry import create_model, list_models

__all__ = ["create_model", "list_models", "paper", "resnet"]
