"""Trained tensors put into a network: which is which by name, what does not fit, and which layer is a new head."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from morphtrain.errors import UserError
from morphtrain.morph.surgery.architecture import PARAMETRIZATIONS
from morphtrain.wording import counted

Tensors = Mapping[str, torch.Tensor]

SHOWN = 3  # names in a message
COUNTER = "num_batches_tracked"  # which files of old versions of torch lack


class Head(NamedTuple):
    """The tensors of a last layer for other classes, which are not loaded, and for how many classes they were."""

    names: tuple[str, ...]
    classes: int


@torch.no_grad()
def load(name: str, model: nn.Module, sets: Mapping[str, Tensors], num_classes: int) -> Head | None:
    """Give `model`, for `num_classes`, the values of trained tensors, in place, in its own number formats.

    Names may have a prefix in common, as `module.`. A last layer for another number of classes stays as it is.

    Args:
        name: for messages, the config key and its value.
        sets: tensors by name, by where in their file they are; those of one place have to fit, and no other ones.

    Returns:
        the layer that stays as it is, or None.

    Raises:
        UserError: naming the first tensors that do not fit; `model` is unchanged then.
    """
    own = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
    check_computed(name, own, sets)
    tensors = _named_as(name, own, sets)
    head = _head(own, tensors, num_classes)
    left = () if head is None else head.names
    _check(name, own, tensors, left)
    model.load_state_dict({key: tensor for key, tensor in tensors.items() if key not in left}, strict=False)
    return head


def check_computed(name: str, own: Iterable[str], sets: Mapping[str, Iterable[str]]) -> None:
    """Raise a `UserError` if either the network or the file has names of computed weights (weight norm), not both."""
    here, there = (
        any(PARAMETRIZATIONS in f".{key}" for key in keys) for keys in (own, itertools.chain(*sets.values()))
    )
    if here != there:
        wanted = "weight" if there else "batch"
        raise UserError(f"{name}: its weights are {'' if there else 'not '}computed (weight norm); norm={wanted} works")


def _named_as(name: str, own: Tensors, sets: Mapping[str, Tensors]) -> Tensors:
    """The tensors of the place, and below the prefix, with the most names of `own`, by these names."""
    names = ((place, key) for place, found in sets.items() for key in found)
    counts = Counter((place, prefix) for place, key in names for prefix in _prefixes(key, own))
    most = max(counts.values(), default=0)
    best = [found for found, count in counts.items() if count == most]
    if not best:
        files, model = (", ".join(list(keys)[:SHOWN]) for keys in (next(iter(sets.values())), own))
        raise UserError(f"{name}: no name in it is one of the model's; it has {files}, the model {model}, and others")
    places = {place for place, _ in best}
    if len(places) > 1:
        several = ", ".join(place or "the outermost" for place in sorted(places))
        raise UserError(f"{name}: holds several networks that fit alike: {several}; a file with one of them works")
    (place,) = places
    prefixes = sorted((prefix for _, prefix in best), key=len)
    if prefixes[0] and len(prefixes) > 1:
        several = ", ".join(prefixes)
        raise UserError(f"{name}: holds several networks that fit alike, below {several}; a file with one works")
    return {key.removeprefix(prefixes[0]): tensor for key, tensor in sets[place].items()}


def _prefixes(key: str, own: Tensors) -> Iterator[str]:
    """What would have to be taken off the front of a name to make it one of `own`."""
    start = 0
    while True:
        if key[start:] in own:
            yield key[:start]
        start = key.find(".", start) + 1
        if start == 0:
            return


def _head(own: Tensors, tensors: Tensors, num_classes: int) -> Head | None:
    """The layer whose outputs are classes, if all that does not fit are these."""
    other = {key: tensor for key, tensor in tensors.items() if key in own and own[key].shape != tensor.shape}
    layers = {_layer(key) for key in other}
    classes = {tensor.shape[0] if tensor.dim() else 0 for tensor in other.values()}
    alike = all(_is_for(own[key], tensor, num_classes) for key, tensor in other.items())
    return Head(tuple(other), classes.pop()) if len(layers) == len(classes) == 1 and alike else None


def _layer(key: str) -> str:
    """The path of the layer that a tensor belongs to, also if the layer's weight is computed from it."""
    return key.rpartition(".")[0].partition(PARAMETRIZATIONS)[0]


def _is_for(own: torch.Tensor, tensor: torch.Tensor, num_classes: int) -> bool:
    """Whether a tensor differs from that of the model only in that it is not for `num_classes`."""
    return own.dim() > 0 and own.shape[0] == num_classes and own.shape[1:] == tensor.shape[1:]


def _check(name: str, own: Tensors, tensors: Tensors, left: Sequence[str]) -> None:
    """Raise a `UserError` that says what a file lacks, what it has besides, and what has another shape."""
    there = {id(own[key]) for key in tensors if key in own}  # a tied tensor has several names, and may be stored once
    lacking = [key for key, tensor in own.items() if id(tensor) not in there and not key.endswith(COUNTER)]
    besides = [key for key in tensors if key not in own]
    common = [key for key in tensors if key in own and key not in left]
    unlike = [key for key in common if own[key].shape != tensors[key].shape]
    kinds = [key for key in common if not _is_convertible(tensors[key], own[key])]
    said = [f"it lacks {_some(lacking)}"] if lacking else []
    said += [f"it has {_some(besides)} besides"] if besides else []
    shapes = [f"{key} is {tuple(tensors[key].shape)}, here {tuple(own[key].shape)}" for key in unlike]
    types = [f"{key} is {_type(tensors[key])}, here {_type(own[key])}" for key in kinds]
    said += [_some(texts) for texts in (shapes, types) if texts]
    if said:
        said.append(_hint(own, tensors, unlike, [*lacking, *besides]))
        raise UserError(f"{name}: does not fit the model: {'; '.join(said)}")
    broken = [key for key in common if isinstance(own[key], nn.Parameter) and not _is_finite(tensors[key], own[key])]
    if broken:
        works = "weights of a training that has not diverged"
        raise UserError(f"{name}: has values that are infinite or no number in {_some(broken)}; {works} work")


def _is_convertible(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether the values of a tensor, which has some, can be given to one of the model's."""
    held = not tensor.is_meta and tensor.layout is torch.strided
    return held and own.is_floating_point() == tensor.is_floating_point()


def _is_finite(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    return bool(tensor.to(own.dtype).isfinite().all())


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _type(tensor: torch.Tensor) -> str:
    kind = "meta " if tensor.is_meta else "" if tensor.layout is torch.strided else f"{tensor.layout} "
    return f"{kind}{tensor.dtype}".replace("torch.", "")


def _hint(own: Tensors, tensors: Tensors, unlike: Sequence[str], names: Sequence[str]) -> str:
    """What would work."""
    if not names and len(unlike) == 1:
        (key,) = unlike
        theirs, ours = tensors[key].shape, own[key].shape
        if len(theirs) == len(ours) == 4 and theirs[0] == ours[0] and theirs[2:] == ours[2:]:
            return f"data with images of {counted(theirs[1], 'channel')} works, as it was trained on"
    if not names:
        pruned = "a pruned network has its structure in last.pt, best.pt, or the .architecture.json beside an export"
        return f"the model's keys as in its training work; {pruned}"
    return "the network that it was trained as works"
