"""The data that the zoo's recipes train on, as LightningDataModules."""

from zoo.data.cifar import CIFAR10, CIFAR100
from zoo.data.digits import Digits
from zoo.data.imdb import IMDb

__all__ = ["CIFAR10", "CIFAR100", "Digits", "IMDb"]
