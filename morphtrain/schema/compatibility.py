"""Which options exclude or need one another; checked when a config is composed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from morphtrain.errors import UserError
from morphtrain.schema.checks import check
from morphtrain.schema.custom import Custom
from morphtrain.schema.grow import MorphNetExpansion, Planned, Selective
from morphtrain.schema.option import Option
from morphtrain.schema.prune import Early, MorphNetPenalty, PruneTrain

if TYPE_CHECKING:
    from morphtrain.schema.config import Config


class Conflict(NamedTuple):
    """Two choices that exclude one another.

    A choice is `key=value|other` (one of these values) or `key!=value` (another one). The value of a group is the name
    of its option. An option without the key, or a part of the user's own, has made neither choice.
    """

    one: str
    other: str
    why: str
    instead: str  # what works


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "gradient=approximate|sparse_activation",
        "compile!=none",
        "it is not tested in compiled passes",
        "compile=none",
    ),
    Conflict(
        "gradient.kind=zero",
        "optimizer=lars",
        "its trust ratios divide by gradients; where these are zero, weights decay at the whole learning rate",
        "gradient.kind=top1",
    ),
    Conflict(
        "gradient=approximate",
        "prune.importance=taylor",
        "channels are measured by gradients of weights, which are not those of the loss then",
        "prune.importance=magnitude",
    ),
)


def check_compatible(config: Config) -> None:
    """Raise a `UserError` for the first options that do not go together, saying what to change."""
    for conflict in CONFLICTS:
        one, other = chosen(config, conflict.one), chosen(config, conflict.other)
        if one is not None and other is not None:
            raise UserError(f"{one} with {other}: {conflict.why}; {conflict.instead} works")
    config.data.check_epochs(config.epochs)
    _check_cuts(config)
    _check_growth(config)
    _check_custom_policy(config)


def chosen(config: Config, choice: str) -> str | None:
    """`key=value` as it is in the config, if that is the choice (see `Conflict`), or None."""
    unequal = "!=" in choice
    key, values = choice.split("!=" if unequal else "=", 1)
    value: Any = config
    for part in key.split("."):
        if isinstance(value, Custom) or not hasattr(value, part):
            return None
        value = getattr(value, part)
    if isinstance(value, Custom):
        return None
    text = value.name if isinstance(value, Option) else f"{value:g}" if isinstance(value, float) else str(value)
    return None if (text in values.split("|")) == unequal else f"{key}={text}"


def _check_cuts(config: Config) -> None:
    if isinstance(config.prune, Early):
        config.prune.cut_epochs(config.epochs)


def _check_growth(config: Config) -> None:
    grow, prune, epochs = config.grow, config.prune, config.epochs
    if isinstance(grow, (MorphNetExpansion, Selective)) and prune.name == "none" and not config.methods:
        raise UserError(f"grow={grow.name}: needs a method that shrinks; prune=prunetrain or prune=morphnet works")
    if isinstance(grow, Planned):
        late = [epoch for epoch in grow.at_epochs if epoch >= epochs]
        check(not late, "grow.at_epochs", grow.at_epochs, f"before the last epoch (epochs={epochs})")
    if isinstance(grow, MorphNetExpansion):
        end = grow.rounds * grow.round_epochs
        wanted = f"fewer: the last round ends after epoch {end}, which must be before epochs={epochs}"
        check(end < epochs, "grow.rounds", grow.rounds, wanted)
        if isinstance(prune, (PruneTrain, MorphNetPenalty)):
            stops = prune.stop_epoch is not None and prune.stop_epoch <= end
            wanted = f"grow.rounds * grow.round_epochs = {end} or earlier, or what grew would be shrunk again"
            check(stops, "prune.stop_epoch", prune.stop_epoch, wanted)
        if isinstance(prune, Early):
            wanted = f"at most {end / epochs:.4g}: growth ends after epoch {end}, and what grew would be cut again"
            check(prune.cut_epochs(epochs)[-1] <= end, "prune.by", prune.by, wanted)


def _check_custom_policy(config: Config) -> None:
    policy = config.batch_policy
    if isinstance(policy, Custom):
        size = policy.arguments.get("batch_size")
        whole = type(size) is int and size >= 1
        check(whole, "batch_policy.batch_size", size, "1 or more images: every policy names the size of its first step")
