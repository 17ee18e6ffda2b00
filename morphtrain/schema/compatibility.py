"""Which options exclude or need one another; checked when a config is composed.

`CONFLICTS` is the whole table, which docs/compatibility.md prints. Below it are relations of numbers: what a key may be
for another key's value. What only the run's own network, data or device shows is checked where it is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from morphtrain.errors import Incompatible
from morphtrain.schema.checks import check
from morphtrain.schema.custom import Custom
from morphtrain.schema.grow import MorphNetExpansion, Planned
from morphtrain.schema.option import Option, option_of
from morphtrain.schema.prune import Early, MorphNetPenalty, PruneTrain
from morphtrain.wording import as_yaml

if TYPE_CHECKING:
    from morphtrain.schema.config import Config


class Conflict(NamedTuple):
    """Two choices that exclude one another.

    A choice is `key=value|other` (one of these values) or `key!=value` (another one, so that the value is needed), or
    several of these with spaces between them (all at once). The value of a group is the name of its option. An option
    without the key has made neither choice, and nor has a part of the user's own.
    """

    one: str
    other: str
    why: str
    instead: str  # what works


EMULATED = "the emulation takes longer than what it emulates, so that its times say nothing"
BREAKS = "compiled passes break off at every convolution"
OTHER_BATCHES = "InfoBatch leaves out other images in every epoch", "data.infobatch=0"
MIXED_LOSS = "the loss of a mixed image is that of two images, and no score of one", "data.infobatch=0"
MIXED_BATCH = "the loss of a batch depends on the shares in which its images are mixed"

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "norm=weight",
        "prune.regulariser=gamma_l1",
        "no norm with a scale is left to regularise",
        "prune.regulariser=group_lasso",
    ),
    Conflict("norm=weight", "prune.importance=gamma", "no norm with a scale is left", "prune.importance=magnitude"),
    Conflict("precision=dfp16", "compile!=none", "an emulation has no time to save", "compile=none"),
    Conflict(
        "precision=dfp16",
        "batch_policy=fill_memory",
        "an emulation takes more memory than what it emulates",
        "batch_policy=fixed",
    ),
    Conflict("precision=dfp16", "prune.round_to=auto", EMULATED, "prune.round_to=8"),
    Conflict("precision=dfp16", "prune.cost=latency", EMULATED, "prune.cost=flops"),
    Conflict("precision=dfp16", "grow.cost=latency", EMULATED, "grow.cost=flops"),
    Conflict("data.order=cycle", "data.infobatch!=0", *OTHER_BATCHES),
    Conflict("optimizer=isgd", "data.infobatch!=0", *OTHER_BATCHES),
    Conflict("data.mixup!=0", "data.infobatch!=0", *MIXED_LOSS),
    Conflict("data.cutmix!=0", "data.infobatch!=0", *MIXED_LOSS),
    Conflict("optimizer=isgd", "data.mixup!=0", MIXED_BATCH, "data.mixup=0"),
    Conflict("optimizer=isgd", "data.cutmix!=0", MIXED_BATCH, "data.cutmix=0"),
    Conflict(
        "optimizer=isgd",
        "precision.dtype=float16",
        "its extra steps have no loss scale of their own",
        "precision=bf16",
    ),
    Conflict(
        "optimizer=isgd",
        "precision=bf16_pure precision.rounding=stochastic",
        "its extra steps are not rounded by chance, and would be lost in weights of 16 bits",
        "precision.rounding=masters",
    ),
    Conflict("gradient=sparse_activation", "compile!=none", BREAKS, "compile=none"),
    Conflict("gradient.kind=random", "compile!=none", BREAKS, "gradient.kind=top1"),
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
    Conflict(
        "grow=morphnet|selective",
        "prune=none methods=[]",
        "it grows a network that another method has shrunk",
        "prune=prunetrain or prune=morphnet",
    ),
    Conflict(
        "grow.inherit=false",
        "model.weights!=null",
        "its rounds draw all weights again, the trained ones, too",
        "grow.inherit=true",
    ),
    Conflict(
        "norm=ghost|sync",
        "model.batch_norm=false",
        "the model has no batch norm to replace",
        "model.batch_norm=true or norm=batch",
    ),
    Conflict(
        "prune.regulariser=gamma_l1",
        "model.batch_norm=false",
        "without norms there is no gamma to penalise",
        "prune.regulariser=group_lasso or model.batch_norm=true",
    ),
    Conflict(
        "prune.importance=gamma",
        "model.batch_norm=false",
        "without norms there is no gamma to go by",
        "prune.importance=magnitude or model.batch_norm=true",
    ),
    Conflict(
        "batch_policy.budget=null",
        "device=cpu|mps",
        "only a CUDA device says how much memory is free",
        "batch_policy.budget=2GiB",
    ),
)


def check_compatible(config: Config) -> None:
    """Raise a `UserError` for the first options that do not go together, saying what to change."""
    for conflict in CONFLICTS:
        one, other = chosen(config, conflict.one), chosen(config, conflict.other)
        if one is not None and other is not None:
            raise Incompatible(f"{one} with {other}: {conflict.why}; {conflict.instead} works")
    config.data.check_epochs(config.epochs)
    _check_cuts(config)
    _check_growth(config)
    _check_custom_policy(config)


def chosen(config: Any, choice: str) -> str | None:
    """The keys and values of a choice as they are in the config, if that makes it (see `Conflict`), or None."""
    made = [_made(config, part) for part in choice.split()]
    return None if None in made else " ".join(map(str, made))


def _made(config: Any, choice: str) -> str | None:
    unequal = "!=" in choice
    key, values = choice.split("!=" if unequal else "=", 1)
    value = config
    for part in key.split("."):
        if not hasattr(value, part):
            return None
        value = getattr(value, part)
    if isinstance(value, Custom):
        return None
    text = _text(value)
    return None if (text in values.split("|")) == unequal else f"{key}={text}"


def _text(value: Any) -> str:
    """A value as it is typed; of a group, the name of its option."""
    if isinstance(value, Option):
        return str(option_of(vars(value)))
    return f"{value:g}" if isinstance(value, float) else as_yaml(value)


def _check_cuts(config: Config) -> None:
    if isinstance(config.prune, Early):
        config.prune.cut_epochs(config.epochs)


def _check_growth(config: Config) -> None:
    grow, prune, epochs = config.grow, config.prune, config.epochs
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
