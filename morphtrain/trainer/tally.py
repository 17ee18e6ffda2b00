"""What an epoch has trained on so far, for the loss and the accuracy that its record has."""

from __future__ import annotations

import torch


class Tally:
    """Counts of images, and sums over them that stay on the device until the end, so that no step waits for them.

    Attributes:
        samples: how many images the epoch is to train on.
        given: how many the data has given.
        trained: how many went through the network: `before_forward` may take some away, or add some.
    """

    def __init__(self, samples: int, device: torch.device) -> None:
        self.samples, self.given, self.trained = samples, 0, 0
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), device=device, dtype=torch.long)

    def give(self, images: int) -> float:
        """Count images that the data gives; returns their share of the epoch."""
        self.given += images
        return images / self.samples

    def add(self, images: int, loss: torch.Tensor, correct: torch.Tensor) -> None:
        """Add a step: its images, their mean loss, and how many of them were classified correctly."""
        self.trained += images
        self._loss += loss * images
        self._correct += correct

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy (0..1) of the images trained on."""
        return self._loss.item() / self.trained, self._correct.item() / self.trained
