"""Images a second from a folder of JPEGs: decoded by workers in every epoch, and cropped from memory."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from morphtrain import schema
from morphtrain.data import image_folder
from morphtrain.trainer.process import prepare_process

IMAGES, WIDTH, HEIGHT, BATCH, EPOCHS = 360, 500, 375, 32, 4
WAYS = {"no worker": (False, 0), "1 worker": (False, 1), "2 workers": (False, 2), "in memory": (True, 0)}


def main() -> None:
    prepare_process()
    torch.set_num_threads(1)
    logging.disable()
    with tempfile.TemporaryDirectory() as directory:
        make_images(Path(directory))
        for size in (224, 64):
            for name, (in_memory, workers) in WAYS.items():
                config = schema.data.ImageFolder(
                    "image_folder", directory, size, "auto", 0.08, True, in_memory, "auto", workers
                )
                data = image_folder.build(config)
                seconds = []
                for epoch in range(EPOCHS):
                    start = time.perf_counter()
                    for _ in data.train_batches(BATCH, torch.Generator().manual_seed(epoch)):
                        pass
                    seconds.append(time.perf_counter() - start)
                rate = IMAGES / statistics.median(seconds[1:])  # workers start in the first
                print(f"loader: {size} pixels from {WIDTH}x{HEIGHT} JPEGs, {name}: {rate:.0f} images a second")


def make_images(root: Path) -> None:
    """Smooth noise in two classes: what a JPEG of a photograph costs to decode, more or less."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", IMAGES), ("val", 2)):
        for number in range(count):
            folder = root / part / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (HEIGHT // 5, WIDTH // 5, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).resize((WIDTH, HEIGHT)).save(folder / f"{number}.jpg")


if __name__ == "__main__":
    main()
