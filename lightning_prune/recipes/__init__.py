"""Small networks to try pruning on, and ready configurations for the command line."""

from lightning_prune.recipes.image_folders import ImageFolderDataModule, TorchvisionClassifier
from lightning_prune.recipes.models import DigitsResNet, MultilayerPerceptron

__all__ = ["DigitsResNet", "ImageFolderDataModule", "MultilayerPerceptron", "TorchvisionClassifier"]
