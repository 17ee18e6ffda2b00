"""A picture as SVG inside a page: in the page's colours, light or dark, and with words for who cannot see it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup

from morphtrain.evidence.pictures import Picture
from morphtrain.evidence.style import DARK, LIGHT, Theme
from morphtrain.wording import printable


def _named(theme: Theme) -> dict[str, str]:
    """The colours of a theme by their names on the page."""
    series = {f"--series-{number}": colour for number, colour in enumerate(theme.series)}
    return {"--ink": theme.ink, "--rule": theme.rule, "--paper": theme.paper, **series}


COLOURS = {colour: f"var({name})" for name, colour in _named(LIGHT).items()}
FONT = re.compile(r"font-family: [^;]*;? ?")  # the page's is taken
NAMED = re.compile(r"^#|(?<=url\(#)")  # where an attribute names another element


def palette() -> str:
    """The colours of pictures, and with them those of the page, as CSS: by what the reader prefers, on paper light."""
    light, dark = ("; ".join(f"{name}: {colour}" for name, colour in _named(theme).items()) for theme in (LIGHT, DARK))
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ {light} }} }}\n"
    )


def inline(picture: Picture, prefix: str) -> Markup:
    """The picture as an `<svg>` element, all ids of which begin with `prefix`."""
    root = ElementTree.fromstring(picture.svg())
    for definitions in root.findall("{*}defs"):
        for sheet in definitions.findall("{*}style"):  # it would hold for the whole page
            definitions.remove(sheet)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _adapted(name, value, prefix) for name, value in element.attrib.items()}
    ids = f"{prefix}-title", f"{prefix}-description"
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": " ".join(ids)}
    for name, identifier, text in zip(("desc", "title"), ids[::-1], (picture.description, picture.title), strict=True):
        words = ElementTree.Element(name, id=identifier)
        words.text = printable(text)
        root.insert(0, words)
    return Markup(ElementTree.tostring(root, encoding="unicode", method="html"))


def _local(name: str) -> str:
    """A name without its namespace: HTML knows those of SVG."""
    return name.rpartition("}")[2]


def _adapted(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    value = NAMED.sub(lambda found: f"{found[0]}{prefix}-", value)
    if name == "style":
        value = FONT.sub("", value)
        for colour, variable in COLOURS.items():
            value = value.replace(colour, variable)
    return value
