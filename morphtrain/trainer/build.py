"""Everything that a run needs before its first epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import nn

from morphtrain import infobatch, mixing, options, part_checks, schema, world
from morphtrain.compilation import Compilation
from morphtrain.contracts import Data
from morphtrain.cost.params import count_weights
from morphtrain.errors import UserError
from morphtrain.memory_limit import AllocationLimit, machine_bytes, named_if_out_of_memory
from morphtrain.method import ORDER, Method
from morphtrain.morph import OUTPUT, ChannelGraph, MorphError, input_type, matches
from morphtrain.outputs import check_outputs
from morphtrain.progressive import check_small_images
from morphtrain.schema import Custom
from morphtrain.state import Run, derived_seed
from morphtrain.timing.clock import Clock
from morphtrain.trainer.devices import pick_device
from morphtrain.wording import command_name

log = logging.getLogger(__name__)

# Of config key `memory_format`, the default first.
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
UNSETTLED = "contiguous"  # what a run has while `auto` is not settled


def build_run(
    config: schema.Config,
    morph: Callable[[nn.Module], nn.Module] | None = None,
    device: torch.device | None = None,
    start: Callable[[nn.Module, Data], nn.Module] | None = None,
) -> Run:
    """Build what a run needs before its first epoch.

    Args:
        morph: gives the model the structure of a checkpoint, and perhaps its values.
        device: the one that the run has taken of those `config.device` allows; None: the first of them.
        start: gives the model trained weights for the data (`train.new_run`).

    Raises:
        UserError: for a missing device, process or data set, or a model that cannot be made, does not fit the data, or
            has channels that a method needs and that cannot be followed.
    """
    present = world.size()
    wanted = f"{present} or null here; {command_name('run')} starts others"
    schema.check(config.processes in (None, present), "processes", config.processes, wanted)
    if config.model.weights is not None and start is None and morph is None:
        instead = "morphtrain.trainer.new_run starts from trained ones"
        raise UserError(f"model.weights={config.model.weights}: build_run makes new weights; {instead}")
    device = device or pick_device(config.device)
    memory_format = UNSETTLED if config.memory_format == "auto" else config.memory_format
    with named_if_out_of_memory(schema.size_keys("data", config.data)):
        data: Data = options.build("data", config.data).to(device, FORMATS[memory_format])
    given = {"num_classes": data.num_classes, "in_channels": data.input_shape[0]}
    model = build_model(config.model, lambda: options.build("model", config.model, **given), config.norm, config.seed)
    if morph is not None:
        model = morph(model)
    if start is not None:
        model = start(model, data)
    sizes = f"{schema.size_keys('model', config.model)} {schema.size_keys('data', config.data)}"
    with named_if_out_of_memory(sizes):
        model = in_format(model.to(device), memory_format)
        name = f"model={config.model.name}"
        check_outputs(name, model, data.input_shape, data.num_classes)
        check_small_images(config.data, name, model, data.input_shape, data.num_classes)
    methods = build_methods(config)
    run = Run(
        config=config,
        device=device,
        data=data,
        model=model,
        graph=ChannelGraph.untraced(model),
        optimizer=options.build("optimizer", config.optimizer, model=model),
        criterion=options.build("loss", config.loss, num_classes=data.num_classes),
        schedule=options.build("schedule", config.schedule, epochs=config.epochs),
        precision=options.build("precision", config.precision, device=device),
        clock=Clock(device, config.timing.sync),
        methods=methods,
        norm_start=options.norm_start(config.norm),
        compilation=None if config.compile == "none" else Compilation(config.compile, device),
    )
    if isinstance(run.criterion, nn.Module):
        run.criterion.to(device)
    _prepare(run)
    if run.precision.dtype is not None:  # it may not have every operation
        with run.precision.autocast():
            name = f"precision={config.precision.name}"
            check_outputs(name, model, data.input_shape, data.num_classes, images=torch.float32)
    _check_own_parts(run)
    names = {"data_name": config.data.name, "loss_name": config.loss.name}
    run.infobatch = infobatch.build(config.data, config.epochs, data, run.criterion, device, **names)
    run.mixing = mixing.build(config.data, data.num_classes, run.criterion, device, loss_name=config.loss.name)
    optimizer = run.optimizer
    for hook in run.hooks("after_build"):
        hook(run)
    if run.optimizer is not optimizer:
        _prepare(run)
    if run.model is not model:
        raise UserError("a method has replaced run.model in after_build; change it in place, or no file could be read")
    run.graph = follow_channels(config, model, data.input_shape, methods)  # as the methods have left the model
    run.base_lrs = [float(group["lr"]) for group in run.optimizer.param_groups]
    run.count()
    run.note("")
    run.initial = {
        "channels": sum(space.size for space in run.graph.spaces),
        "weights": count_weights(model),
        "params": run.params,
        "macs": run.macs,
    }
    return run


def _prepare(run: Run) -> None:
    """Let the number format see the model and the optimizer."""
    if hasattr(run.precision, "prepare"):
        run.precision.prepare(run.model, run.optimizer)


def _check_own_parts(run: Run) -> None:
    """Try the user's own parts on the run's device; raises a `UserError` for one that its contract does not allow."""
    config = run.config
    if isinstance(config.data, Custom):
        part_checks.check_data(f"data={config.data.name}", run.data, chosen=config.data.chooses_images)
        if config.data.order != "shuffled":
            instead = "data.order=shuffled takes any data"
            part_checks.check_selectable(f"data.order={config.data.order}", config.data.name, run.data, instead)
    if isinstance(config.loss, Custom):
        part_checks.check_loss(f"loss={config.loss.name}", run.criterion, run.data.num_classes, run.device)
    if isinstance(config.precision, Custom):
        part_checks.check_precision(f"precision={config.precision.name}", run.precision)
    if isinstance(config.schedule, Custom):
        part_checks.check_schedule(f"schedule={config.schedule.name}", run.schedule, config.epochs)
    if isinstance(config.optimizer, Custom):
        part_checks.check_optimizer(f"optimizer={config.optimizer.name}", run.optimizer)


def build_methods(config: schema.Config) -> dict[str, Method]:
    """The methods in the order in which their hooks are called, by group; `methods.0` is the user's first."""
    methods: dict[str, Method | None] = {}
    for group in ORDER:
        if group == "methods":
            for number, own in enumerate(config.methods):
                methods[f"methods.{number}"] = options.build_custom("methods", f"methods[{number}]", own)
        else:
            methods[group] = options.build_method(group, getattr(config, group))
    return {name: method for name, method in methods.items() if method is not None}


def build_model(
    config: schema.Option | Custom,
    build: Callable[[], nn.Module],
    norm: schema.norm.Norm | Custom | None,
    seed: int,
    device: str = "cpu",
) -> nn.Module:
    """The network that `build` makes, with the norms of config group `norm` (None: its own).

    It is initialised from the run's seed. Structure and values of a checkpoint come later: they do not say which norms.

    Args:
        config: of the network.
        device: "meta" for a network without values; only of those that `needs_no_values` knows.

    Raises:
        UserError: for a network that needs more memory than the machine has, before it takes it.
    """
    if device != "meta" and needs_no_values(config):
        with _limited(config), torch.device("meta"):  # takes no time, whatever its size
            build()
    # torch.manual_seed would seed the GPUs' generators, too, which `morphtrain.load` has to leave alone.
    torch.default_generator.manual_seed(derived_seed(seed, 0))
    with _limited(config), torch.device(device), named_if_out_of_memory(schema.size_keys("model", config)):
        model = build()
    if norm is not None:
        options.build("norm", norm, model=model)
    return model


def needs_no_values(config: schema.Option | Custom) -> bool:
    """Whether a network can be made of tensors without values; others may compute with values while they are made."""
    return not isinstance(config, (Custom, schema.model.Torchvision))


def _limited(config: schema.Option | Custom) -> AllocationLimit:
    def refuse(needed: str) -> NoReturn:
        raise UserError(f"{schema.size_keys('model', config)}: the network takes {needed}; choose a smaller one")

    return AllocationLimit(machine_bytes(), refuse)


def in_format(model: nn.Module, memory_format: str) -> nn.Module:
    """The model with its 4-D weights in this memory format; they, not the images, decide what convolutions use."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=FORMATS[memory_format])
    return model


def follow_channels(
    config: schema.Config, model: nn.Module, input_shape: Sequence[int], methods: Mapping[str, Method]
) -> ChannelGraph:
    """The channel graph of the model; one without spaces if it cannot be traced and no method needs it.

    Raises:
        UserError: for a model whose channels cannot be followed, if a method needs them.
    """
    for name, method in methods.items():
        _check_ignored(name, method.ignore, model)
    ignore = [pattern for method in methods.values() for pattern in method.ignore]
    try:
        graph = ChannelGraph.trace(model, torch.zeros(1, *input_shape, dtype=input_type(model)), ignore)
        if any(method.follows_channels for method in methods.values()):
            _say_what_is_kept(graph)
        return graph
    except MorphError as error:
        needing = [name for name, method in methods.items() if method.follows_channels]
        if not needing:
            log.info("the model's channels are not followed: %s", error)
            return ChannelGraph.untraced(model)
        pruned = "prune.ignore=[...] leaves modules out, prune=none all of them"
        hint = f"; {pruned}" if "prune" in needing else f"; {needing[0]} has to follow them"
        raise UserError(f"model={config.model.name}: {error}{hint}") from error


def _say_what_is_kept(graph: ChannelGraph) -> None:
    """One line that names the layers whose channels cannot change, except for the last, and why."""
    kept = {path: why for path, why in graph.kept.items() if not why.endswith(OUTPUT)}
    if kept:
        some = "; ".join(f"{path}, {why}" for path, why in list(kept.items())[:3])
        more = f"; and {len(kept) - 3} more" if len(kept) > 3 else ""
        log.info("channels that cannot change: %s%s (print the ChannelGraph for all)", some, more)


def _check_ignored(method: str, patterns: Sequence[str], model: nn.Module) -> None:
    paths = [path for path, _ in model.named_modules()]
    unknown = [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in paths)]
    if unknown:
        parts = ", ".join(path for path, _ in model.named_children())
        raise UserError(f"{method}.ignore={unknown}: no module's path matches; the model's parts are {parts}")
