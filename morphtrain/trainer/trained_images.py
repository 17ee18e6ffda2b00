"""Whether a network is trained on with images like those that it was trained on before."""

from __future__ import annotations

from collections.abc import Sequence

from morphtrain.preprocessing import Preprocessing

CLOSE = 0.001  # normalisations of pixels between 0 and 1 that differ by less are one

Normalisation = tuple[list[float], list[float]]


def differences(there: Preprocessing, here: Preprocessing) -> str:
    """What of the images was otherwise there than it is here, in a few words; "" if nothing is known to be."""
    return "; ".join(text for text in (_sizes(there, here), _normalisations(there, here)) if text)


def _sizes(there: Preprocessing, here: Preprocessing) -> str:
    theirs, ours = ("x".join(map(str, said.input_shape or ())) for said in (there, here))
    return f"{theirs}, here {ours}" if theirs and ours and theirs != ours else ""


def _normalisations(there: Preprocessing, here: Preprocessing) -> str:
    theirs, ours = _normalisation(there), _normalisation(here)
    if theirs is None or (ours is not None and _are_close(theirs, ours)):
        return ""
    otherwise = "as nobody has said" if ours is None else f"by {_in_words(ours)}"
    return f"normalised by {_in_words(theirs)}, here {otherwise}"


def _normalisation(said: Preprocessing) -> Normalisation | None:
    """Mean and deviation of each channel, of pixels between 0 and 1."""
    if said.mean is None or said.std is None or said.max_pixel is None:
        return None
    return [value / said.max_pixel for value in said.mean], [value / said.max_pixel for value in said.std]


def _are_close(theirs: Normalisation, ours: Normalisation) -> bool:
    return all(map(_is_close, theirs, ours))


def _is_close(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    return len(theirs) == len(ours) and all(abs(a - b) <= CLOSE for a, b in zip(theirs, ours, strict=True))


def _in_words(normalisation: Normalisation) -> str:
    mean, deviation = (" ".join(f"{value:.3f}" for value in values) for values in normalisation)
    return f"mean {mean}, deviation {deviation}"
