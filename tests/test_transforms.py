"""`data.transforms`: on each training image by itself, the same bits whoever makes them; what does not fit is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import HydraException
from PIL import Image
from test_config import composed
from test_image_folder import ODD_SIZES, config, epoch, held_out, noise, pixels, write
from test_pairs import check
from torchvision.transforms import v2

import morphtrain
from morphtrain import config_errors, schema
from morphtrain.data import image_folder
from morphtrain.data.crops import DRAWS, Crops
from morphtrain.data.image_bytes import ByteData
from morphtrain.data.transforms import Transforms, build_transforms
from morphtrain.errors import UserError
from morphtrain.schema.data import ImageFolder
from morphtrain.trainer.checkpoint import ADDED_KEYS

MANY: list[Any] = [
    "RandAugment",
    {"_target_": "RandomApply", "transforms": [{"_target_": "GaussianBlur", "kernel_size": 3}], "p": 0.5},
    {"_target_": "torchvision.transforms.v2.ColorJitter", "brightness": 0.5, "hue": 0.1},
    {"_target_": "Pad", "padding": 2},
    {"_target_": "RandomCrop", "size": 16},
    {"_target_": "RandomErasing", "p": 0.3},
]


def folder(root: Path, transforms: list[Any], **changes: Any) -> Any:
    return image_folder.build(config(root, transforms=transforms, **changes))


class Grey:
    """Makes all pixels alike; notes what it is given."""

    def __init__(self, value: int = 200) -> None:
        self.value = value

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
        return torch.full_like(image, self.value)


class Draw:
    """Keeps what it draws."""

    def __init__(self) -> None:
        self.drawn: list[torch.Tensor] = []

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.drawn.append(torch.rand(4))
        return image


def halved(image: torch.Tensor) -> torch.Tensor:
    return image / 2


def makes_halved() -> Any:
    return halved


def fails_on_dark(limit: int = 60) -> Any:
    def look(image: torch.Tensor) -> torch.Tensor:
        if image.float().mean() < limit:
            raise LookupError("too dark")
        return image

    return look


def says_a_number() -> int:
    raise AssertionError("called")


def test_transforms_see_random_crops_of_8_bits_before_they_are_normalised_and_only_training_has_them(
    tmp_path: Path,
) -> None:
    root = write(tmp_path, noise(ODD_SIZES))
    plain = image_folder.build(config(root))
    data = folder(root, [{"_target_": "test_transforms.Grey", "value": 77}])
    torch.testing.assert_close(pixels(epoch(data, 4, 1)[0]), torch.full((8, 3, 16, 16), 77.0), atol=1e-3, rtol=0)
    assert torch.equal(held_out(data), held_out(plain))
    assert data.preprocessing == plain.preprocessing
    moved = data.to(torch.device("cpu"), torch.channels_last)
    assert torch.equal(epoch(moved, 4, 1)[0], epoch(data, 4, 1)[0])


def test_they_are_torchvisions_of_the_crop_that_there_is_without_them(tmp_path: Path) -> None:
    """Where nothing is random, by hand."""
    root = write(tmp_path, noise(ODD_SIZES))
    crops = pixels(epoch(image_folder.build(config(root)), 8, 5)[0]).round().to(torch.uint8)
    pipeline = [{"_target_": "RandomSolarize", "threshold": 90, "p": 1.0}, {"_target_": "RandomInvert", "p": 1.0}]
    expected = v2.Compose([v2.RandomSolarize(90, p=1.0), v2.RandomInvert(p=1.0)])(crops)
    found = pixels(epoch(folder(root, pipeline), 8, 5)[0]).round().to(torch.uint8)
    assert torch.equal(found, expected) and not torch.equal(found, crops)


def test_every_image_and_every_epoch_has_numbers_of_its_own_which_no_worker_or_batch_changes(tmp_path: Path) -> None:
    root = write(tmp_path, noise(ODD_SIZES * 3))
    alone, helped = folder(root, MANY), folder(root, MANY, num_workers=2)
    state = torch.get_rng_state()
    first = epoch(alone, 5, 1)[0]
    assert torch.equal(torch.get_rng_state(), state), "the run's other randomness must not depend on its loader"
    torch.manual_seed(123)  # what else is drawn does not matter
    for again, same in ((epoch(helped, 7, 1), True), (epoch(alone, 24, 1), True), (epoch(helped, 5, 2), False)):
        assert torch.equal(again[0], first) == same
    halves = folder(root, MANY)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(24, generator=generator)
    parts = [slice(start, start + 3) for start in (5, 20)]  # as one of several processes asks for
    found = [images for images, _ in halves.train_slices_of(rows, parts, generator)]
    assert torch.equal(torch.cat(found), torch.cat([first[part] for part in parts]))


def test_images_differ_in_what_is_drawn_for_them(tmp_path: Path) -> None:
    root = write(tmp_path, [np.full((20, 20, 3), 40, dtype=np.uint8)] * 200)
    inverted = pixels(epoch(folder(root, ["RandomInvert"]), 50, 1)[0]).mean((1, 2, 3)) > 128
    assert abs(int(inverted.sum()) - 100) < 32  # 4.5 standard deviations


def test_the_numbers_of_transforms_go_on_from_those_of_the_crop() -> None:
    draw, image = Draw(), Image.fromarray(noise([(30, 40)])[0])
    crops = Crops(16, 20, 0.08, True, Transforms([("draw", draw)]))
    for seed in (3, 4):
        crops.random(image, seed)
        generator = torch.Generator().manual_seed(seed)
        torch.rand(1, DRAWS, generator=generator, dtype=torch.float64)
        assert torch.equal(draw.drawn[-1], torch.rand(4, generator=generator))
        assert not torch.equal(draw.drawn[-1], torch.rand(4, generator=torch.Generator().manual_seed(seed)))


WRONG: dict[str, tuple[list[Any], str]] = {
    "size": (
        ["RandomInvert", {"_target_": "CenterCrop", "size": 8}, "RandomEqualize"],
        r"data\.transforms\[1\]\._target_=.*\.v2\.CenterCrop: gives an image \(3, 8, 8\) of uint8; "
        r"a tensor \(3, 16, 16\) of uint8 is needed",
    ),
    "channels": (
        ["Grayscale"],
        r"\[0\]\._target_=.*\.v2\.Grayscale: gives an image \(1, 16, 16\)",
    ),
    "type": (["test_transforms.makes_halved"], r"makes_halved: gives an image \(3, 16, 16\) of float32; a tensor"),
    "picture": (["ToPILImage"], r"v2\.ToPILImage: gives an image as a Image; a tensor"),
    "several": ([{"_target_": "FiveCrop", "size": 8}], r"v2\.FiveCrop: gives an image as a tuple; a tensor"),
    "batches": (["MixUp"], r"data\.transforms\[0\]\._target_=torchvision\.transforms\.v2\.MixUp: called with an image"),
    "none": (
        ["RandAugmnet"],
        r"v2\.RandAugmnet: torchvision\.transforms\.v2 has no RandAugmnet; did you mean RandAugment or [A-Z]",
    ),
    "keyword": ([{"_target_": "RandAugment", "ops": 2}], r"v2\.RandAugment: called with \(ops=2\): .*ops"),
    "nested": (
        [{"_target_": "RandomApply", "transforms": [{"_target_": "Blur"}]}],
        r"data\.transforms\[0\]\.transforms\[0\]\._target_=torchvision\.transforms\.v2\.Blur: .* has no Blur",
    ),
    "command": ([{"_target_": "os.system", "command": "touch stolen"}], "is of Python's own module os"),
    "number": (["test_transforms.says_a_number"], "says_a_number: makes a int, not a function of an image"),
    "class": (["morphtrain.schema.Config"], "Config: makes a Config, not a function of an image"),
    "not a list": ("RandAugment", r"data\.transforms=RandAugment: must be a list, as \[RandAugment, "),  # type: ignore[dict-item]
    "not a name": (
        [3],
        r"data\.transforms\[0\]=3: must be the name of a class of torchvision\.transforms\.v2, or a node",
    ),
    "no name": ([{"p": 3}], r"data\.transforms\[0\]=.*: must be the name of a class"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_before_anything_is_trained(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    transforms, message = WRONG[case]
    with pytest.raises(UserError, match=message) as refused:
        build_transforms(config(tmp_path, transforms=transforms).transforms, 16)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_one_that_fails_on_some_image_is_named_in_a_line(workers: int, tmp_path: Path) -> None:
    root = write(tmp_path, [np.full((20, 20, 3), 200 - 150 * (i == 5), dtype=np.uint8) for i in range(8)])
    data = folder(root, ["test_transforms.fails_on_dark"], num_workers=workers)
    with pytest.raises(UserError) as caught:
        epoch(data, 2, 0)
    assert str(caught.value) == (
        "data.transforms[0]._target_=test_transforms.fails_on_dark: called with an image (3, 16, 16) of uint8: "
        "LookupError: too dark"
    )


def test_with_transforms_workers_read_the_images(tmp_path: Path) -> None:
    root = write(tmp_path, noise(ODD_SIZES))
    assert isinstance(folder(root, [], in_memory="auto"), ByteData)
    assert not isinstance(folder(root, ["RandAugment"], in_memory="auto"), ByteData)
    with pytest.raises(UserError, match=r"data\.in_memory=true: must be auto or false with data\.transforms"):
        config(root, transforms=["RandAugment"], in_memory=True)


@pytest.mark.parametrize("data", ["digits", "mnist_5000", "cifar10", "synthetic"])
def test_sets_in_memory_have_no_such_key(data: str) -> None:
    with pytest.raises(HydraException) as refused:
        composed(f"data={data}", "data.transforms=[RandAugment]")
    said = config_errors.one_line(refused.value)
    assert said is not None and "\n" not in said
    assert said.startswith("data.transforms=") and "add data=image_folder or data=hf" in said


def test_a_config_that_is_checked_stays_as_it_is_and_survives_storage(tmp_path: Path) -> None:
    once = config(tmp_path, transforms=MANY)
    stored = asdict(once)
    assert stored["transforms"][0] == {"_target_": "torchvision.transforms.v2.RandAugment", "arguments": {}}
    assert ImageFolder(**{**vars(once)}) == once
    assert ADDED_KEYS["data.transforms"] == config(tmp_path).transforms == []


def test_a_run_on_transformed_images_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    root = write(tmp_path / "images", noise(ODD_SIZES * 4))
    keys = (
        "data=image_folder",
        f"data.root={root}",
        "data.image_size=16",
        "data.num_workers=0",
        "data.progressive=0.5",
    )
    more = ("model.width=4", "batch_policy.batch_size=16", "epochs=4", "device=cpu", "tracking=none")
    transforms = "data.transforms=[{_target_: RandAugment, num_ops: 1}, RandomErasing]"
    others = ("data.progressive=0.5", "data.mixup=0.4")
    check(morphtrain.compose(*keys, *more, *others, transforms, "methods=[{_target_: test_pairs.Cut}]"), tmp_path)


def test_they_are_no_size_that_memory_goes_by(tmp_path: Path) -> None:
    sizes = [schema.size_keys("data", config(tmp_path, transforms=given)) for given in ([], ["RandAugment"])]
    assert sizes == ["data.image_size=16 data.resize=20 data.num_workers=0"] * 2
