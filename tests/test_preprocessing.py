"""What a checkpoint says about its images is what the network was trained on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.transforms import functional as TF

import morphtrain
from morphtrain import schema
from morphtrain.data import ImageData, Images, digits, fashion_mnist, image_folder
from morphtrain.data.images import published
from morphtrain.errors import UserError
from morphtrain.preprocessing import Preprocessing, of_data, of_json
from morphtrain.trainer import checkpoint
from morphtrain.trainer.build import build_run

IN_MEMORY = {"in memory": True, "from files": False}


def test_bytes_become_the_images_that_the_network_saw() -> None:
    raw = torch.randint(256, (12, 3, 5, 7), dtype=torch.uint8)
    labels = torch.arange(12) % 2
    config = schema.data.Downloaded("cifar10", "nowhere", False, 0, False, 6, 0.0)
    data = published(Images(raw[:8], labels[:8]), Images(raw[8:], labels[8:]), ["cat", "dog"], config)
    moved = data.to(torch.device("cpu"))
    assert torch.equal(of_data(moved)(raw[8:]), data.val.pixels)
    assert of_data(moved).classes == ("cat", "dog")
    with pytest.raises(UserError, match=r"takes images of \(3, 5, 7\), these are \(3, 6, 7\)"):
        of_data(moved)(torch.zeros(2, 3, 6, 7))
    in_unit = Preprocessing([m / 255 for m in of_data(data).mean], [s / 255 for s in of_data(data).std], max_pixel=1)
    torch.testing.assert_close(in_unit(raw[8:] / 255), data.val.pixels)


def test_digits_become_the_images_that_the_network_saw() -> None:
    from sklearn.datasets import load_digits

    data = digits.build(morphtrain.compose("data=digits", "data.image_size=12").data)
    said = of_data(data)
    raw = torch.from_numpy(load_digits().images).float()[:, None]
    raw = torch.nn.functional.interpolate(raw, size=said.resize, mode="bilinear")
    rows = {tuple(image.flatten().tolist()) for image in said(raw)}
    assert all(tuple(image.flatten().tolist()) in rows for image in data.val.pixels)
    assert (said.input_shape, said.num_classes, said.classes) == ((1, 12, 12), 10, tuple("0123456789"))
    assert raw.max() == said.max_pixel


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_pictures_become_the_images_that_the_network_saw(kind: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("beech", "ash"):
            (tmp_path / part / name).mkdir(parents=True)
            pixels = torch.randint(256, (30, 44, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / part / name / "leaf.png")
    sizes = ("data.image_size=16", "data.resize=20", "data.num_workers=0", f"data.in_memory={IN_MEMORY[kind]}")
    config = morphtrain.compose("data=image_folder", f"data.root={tmp_path}", *sizes)
    data = image_folder.build(config.data).to(torch.device("cpu"))
    said = of_data(data)
    images, labels = next(data.val_batches())
    for image, label in zip(images, labels, strict=True):
        with Image.open(tmp_path / "val" / said.classes[label] / "leaf.png") as picture:
            pixels = TF.pil_to_tensor(TF.center_crop(TF.resize(picture, said.resize), list(said.input_shape[1:])))
        assert torch.equal(said(pixels), image)


def test_the_names_of_clothes_are_those_of_the_data_set() -> None:
    assert list(fashion_mnist.CLASSES) == FashionMNIST.classes


def test_a_checkpoint_carries_it(tmp_path: Path) -> None:
    run = build_run(morphtrain.compose("model.width=4"))
    checkpoint.save(run, tmp_path, None)
    said = morphtrain.load_preprocessing(tmp_path / "last.pt")
    assert said == of_data(run.data)
    assert said.unknown == []


def test_what_a_data_set_does_not_say_is_unknown(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "quiet.py").write_text(
        "import torch\nfrom morphtrain.data import ImageData, Images\n"
        "def data(): return ImageData(*[Images(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)] * 2, 4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = build_run(morphtrain.compose("data=custom", "data._target_=quiet.data", "model.width=4"))
    checkpoint.save(run, tmp_path, None)
    said = morphtrain.load_preprocessing(tmp_path / "last.pt")
    assert said == Preprocessing(input_shape=(3, 8, 8), num_classes=4)
    assert said.unknown == ["mean", "std", "max_pixel", "classes"]
    with pytest.raises(UserError, match="mean and std are not known"):
        said(torch.zeros(1, 3, 8, 8))
    with (tmp_path / "quiet.py").open("a") as file:
        file.write("def wrong():\n    wrong = data()\n    wrong.preprocessing = {'mean': 0}\n    return wrong\n")
    del sys.modules["quiet"]
    with pytest.raises(UserError, match=r"data=quiet\.wrong: its preprocessing is a dict"):
        build_run(morphtrain.compose("data=custom", "data._target_=quiet.wrong", "model.width=4"))


def test_a_checkpoint_of_before_knows_the_number_of_classes(tmp_path: Path) -> None:
    checkpoint.save(build_run(morphtrain.compose(*SMALL)), tmp_path, None)
    stored = checkpoint.Checkpoint(tmp_path / "last.pt")
    del stored.facts["preprocessing"]
    assert stored.preprocessing() == Preprocessing(num_classes=10)


WRONG = {
    "three means for grey images": {"input_shape": (1, 8, 8), "mean": [0.5, 0.5, 0.5]},
    "no deviation": {"std": [0.0]},
    "not a number": {"mean": [float("nan")]},
    "text": {"mean": "0.5"},
    "a name too few": {"num_classes": 3, "classes": ["cat", "dog"]},
    "a name as classes": {"classes": "cat"},
    "a flat image": {"input_shape": (8, 8)},
    "no pixels": {"resize": 0},
    "half a class": {"num_classes": 1.5},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(UserError, match=rf"preprocessing\.{list(WRONG[case])[-1]}=.*: must be"):
        Preprocessing(**WRONG[case])


def test_a_data_set_that_says_something_else_is_refused() -> None:
    images = Images(torch.zeros(4, 1, 8, 8), torch.arange(4))
    with pytest.raises(UserError, match=r"preprocessing\.mean=.*a number for each channel"):
        of_data(ImageData(images, images, 4, preprocessing=Preprocessing(mean=[1, 2, 3])))
    with pytest.raises(UserError, match="its preprocessing is a dict"):
        of_data(ImageData(images, images, 4, preprocessing={"mean": [0.0]}))


def test_it_survives_json() -> None:
    said = Preprocessing([0.1], [1 / 3], 255, None, (1, 8, 8), 2, ["a", "b"])
    assert of_json(json.loads(json.dumps(asdict(said)))) == said
    with pytest.raises(UserError, match="must be a dict"):
        of_json({"evil": 1})
