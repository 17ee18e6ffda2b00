"""The live state of a run, which the loop advances and the methods change."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import schema
from morphtrain.cost import count_macs, count_params
from morphtrain.data import Data
from morphtrain.errors import UserError
from morphtrain.model.initialise import initialise
from morphtrain.model.outputs import check_outputs
from morphtrain.morph import ChannelGraph, MorphError, matches
from morphtrain.precision import Precision
from morphtrain.schedule import Schedule
from morphtrain.schedule.ramp import Ramp
from morphtrain.trainer.clock import Clock

log = logging.getLogger(__name__)

# The order in which methods' hooks are called: batch size last, so that it reacts to what the others changed.
METHOD_GROUPS = ("prune", "grow", "batch_policy")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}  # of config key `memory_format`


@dataclass
class Run:
    """Model, graph, optimizer, schedule, data, clock and methods, and how far training has come."""

    config: schema.Config
    device: torch.device
    data: Data
    model: nn.Module
    graph: ChannelGraph
    optimizer: Optimizer
    schedule: Schedule
    precision: Precision
    clock: Clock
    methods: dict[str, Any]  # by group
    initial: dict[str, int] = field(default_factory=dict)  # channels, weights, params, macs of the dense network
    epoch: int = 0  # the current one, counted from 1; before and between epochs the last one done
    progress: float = 0.0  # passes over the training data that led to a step; what the schedule sees
    batch_size: int = 0
    micro_batch: int | None = None  # at most so many images go through the network at once; None: the whole batch
    lr_scale: Ramp = field(default_factory=Ramp)  # the learning rate's factor for the batch size; a batch policy's
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # of the last batch
    train_loss: float = 0.0  # mean over the last epoch
    train_accuracy: float = 0.0  # 0..1, of the same forward passes
    history: list[dict[str, float]] = field(default_factory=list)  # one record of metrics an epoch
    change: str = ""  # what the structural change of this epoch did; "" if there was none
    changes: list[dict[str, Any]] = field(default_factory=list)  # epoch, event and the widths of all spaces behind it
    lr_factor: float = 1.0  # on the schedule's learning rate, by methods that lower it
    rewarmed: Ramp = field(default_factory=Ramp)  # the learning rate's factor behind a growth
    stopped: bool = False  # a method ends the run behind this epoch
    params: int = 0
    macs: int = 0

    def hooks(self, name: str) -> list[Callable[..., Any]]:
        """The hook of this name of every method that has it, in the declared order."""
        return [getattr(method, name) for method in self.methods.values() if hasattr(method, name)]

    def shape_changed(self, summary: str) -> None:
        """To be called by a method behind every structural change."""
        self.change = f"{self.change}; {summary}" if self.change else summary

    def note(self, event: str) -> None:
        """Remember what a method did behind this epoch, and the widths that the network has now."""
        widths = {space.name: space.size for space in self.graph.spaces}
        self.changes.append({"epoch": self.epoch, "event": event, "widths": widths})

    def rewarm(self, epochs: float) -> None:
        """Let the learning rate rise again from zero to what it would be, over `epochs`."""
        self.rewarmed = Ramp(0.0, 1.0, self.progress, epochs)

    def learning_rate(self, epochs_done: float) -> float:
        """The learning rate after so many epochs."""
        scheduled = self.config.optimizer.lr * self.schedule(epochs_done)
        return scheduled * self.lr_scale.at(epochs_done) * self.rewarmed.at(epochs_done) * self.lr_factor

    def training_inputs(self, batches: int) -> list[torch.Tensor]:
        """The images of the first batches of this epoch, as training sees them."""
        loader = self.data.train_batches(self.batch_size, self.generator(self.epoch))
        return [images for images, _ in itertools.islice(loader, batches)]

    def reset_weights(self) -> None:
        """Start the weights of the network as it is now anew, and the optimizer with them."""
        fresh_weights(self.model)
        self.optimizer.state.clear()

    def set_batch(self, batch_size: int, micro_batch: int | None = None) -> None:
        """To be called by a batch policy: images in a step, and how many of them go through the network at once.

        Raises:
            UserError: if there are not so many, or if a single one would go through a network that cannot train on it.
        """
        samples = len(self.data.train)
        if batch_size > samples:
            raise UserError(
                f"batch_policy.batch_size={batch_size}: the training set has {samples} images; at most that many"
            )
        self.batch_size, self.micro_batch = batch_size, micro_batch
        if 1 in (batch // passes(batch, micro_batch) for batch in (batch_size, samples % batch_size)):
            self._check_single(samples)

    def _check_single(self, samples: int) -> None:
        try:
            check_outputs("the model", self.model, self.data.input_shape, self.data.num_classes, samples=1)
        except UserError as error:
            micro_batch = "" if self.micro_batch is None else f" in passes of at most {self.micro_batch}"
            raise UserError(
                f"batch_policy.batch_size={self.batch_size}: of {samples} images{micro_batch} it leaves a single one "
                f"for a pass, but {error}"
            ) from error

    def scale_learning_rate(self, factor: float, warmup_epochs: float) -> None:
        """Let the learning rate become `factor` times what `optimizer.lr` and schedule say, within `warmup_epochs`."""
        self.lr_scale = self.lr_scale.turned(self.progress, factor, warmup_epochs)

    def count(self) -> None:
        """Count parameters and MACs of the network as it is now."""
        self.params = count_params(self.model)
        self.macs = count_macs(self.model, self.data.input_shape)

    def generator(self, epoch: int) -> torch.Generator:
        """The randomness of an epoch: a function of seed and epoch alone, so that a resumed run repeats it."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, epoch))


def passes(images: int, micro_batch: int | None) -> int:
    """In how many parts, of the same size give or take one image, a batch goes through the network."""
    return 1 if micro_batch is None else max(1, -(-images // micro_batch))


def derived_seed(seed: int, epoch: int) -> int:
    """A 64-bit seed for an epoch; epoch 0 is the initialisation."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> 1)


def option(group: str, config: Any) -> Callable[..., Any]:
    """`build` of the module that implements the group's chosen option."""
    build: Callable[..., Any] = importlib.import_module(f"morphtrain.{group}.{schema.option_of(vars(config))}").build
    return build


def pick_device(wanted: str) -> torch.device:
    """The first of `possible_devices`."""
    return possible_devices(wanted)[0]


def possible_devices(wanted: str) -> list[torch.device]:
    """The devices that config key `device` allows; raises `UserError` if this machine has none such."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    each = [] if found is None else [torch.device(kind, i) for i in range(torch.accelerator.device_count())]
    if wanted in ("auto", kind):
        return each or [torch.device("cpu")]
    available = ["cpu", *([kind] if each else []), *map(str, each)]
    if wanted not in available:
        raise UserError(f"device={wanted}: not on this machine; there are auto, {', '.join(available)}")
    return [torch.device(wanted)]


def build_model(
    build: Callable[..., nn.Module], config: Any, norm: Any, seed: int, num_classes: int, in_channels: int
) -> nn.Module:
    """The network that `build` makes of the config group `model`, with the norms of group `norm`, on the CPU.

    It is initialised from the run's seed. Structure and values of a checkpoint come later: they know no norms.
    """
    # torch.manual_seed would seed the GPUs' generators, too, which `morphtrain.load` has to leave alone.
    torch.default_generator.manual_seed(derived_seed(seed, 0))
    with torch.device("cpu"):
        model = build(config, num_classes, in_channels)
    option("norm", norm)(norm, model)
    return model


def build_run(
    config: schema.Config,
    morph: Callable[[nn.Module], nn.Module] | None = None,
    device: torch.device | None = None,
) -> Run:
    """Everything a run needs before its first epoch; `morph` gives the model the structure of a checkpoint.

    `device` is the one of those that `config.device` allows which the run has taken; None: the first.

    Raises:
        UserError: for a device or data set that is not there, or a model that cannot be made, does not fit the data
            or whose channels cannot be followed.
    """
    device = device or pick_device(config.device)
    data: Data = option("data", config.data)(config.data).to(device, FORMATS[config.memory_format])
    build = option("model", config.model)
    model = build_model(build, config.model, config.norm, config.seed, data.num_classes, data.input_shape[0])
    if morph is not None:
        model = morph(model)
    model = in_format(model.to(device), config.memory_format)
    check_outputs(f"model={config.model.name}", model, data.input_shape, data.num_classes)
    methods = {group: option(group, getattr(config, group))(getattr(config, group)) for group in METHOD_GROUPS}
    graph = follow_channels(config, model, data.input_shape)
    run = Run(
        config=config,
        device=device,
        data=data,
        model=model,
        graph=graph,
        optimizer=option("optimizer", config.optimizer)(config.optimizer, model),
        schedule=option("schedule", config.schedule)(config.schedule, config.epochs),
        precision=option("precision", config.precision)(config.precision, device),
        clock=Clock(device, config.timing.sync),
        methods={group: method for group, method in methods.items() if method is not None},
    )
    run.count()
    run.note("")
    run.initial = {
        "channels": sum(space.size for space in graph.spaces),
        "weights": count_weights(model),
        "params": run.params,
        "macs": run.macs,
    }
    return run


def in_format(model: nn.Module, memory_format: str) -> nn.Module:
    """The model with its two-dimensional kernels in this format; they, not the images, decide what convolutions use."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=FORMATS[memory_format])
    return model


def fresh_weights(model: nn.Module) -> None:
    """New random weights for a network of any structure.

    Each layer starts as torch would start it, convolutions as those of MorphTrain's networks.
    """
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    model.apply(initialise)


def follow_channels(config: schema.Config, model: nn.Module, input_shape: Sequence[int]) -> ChannelGraph:
    """The channel graph of the model; one without spaces if it cannot be traced and nothing wants to change it.

    Raises:
        UserError: for a model whose channels cannot be followed, if a method needs them.
    """
    ignore = getattr(config.prune, "ignore", [])
    unknown = [pattern for pattern in ignore if not any(matches(path, [pattern]) for path, _ in model.named_modules())]
    if unknown:
        paths = ", ".join(path for path, _ in model.named_children())
        raise UserError(f"prune.ignore={unknown}: no module's path matches; the model's parts are {paths}")
    try:
        return ChannelGraph.trace(model, torch.zeros(1, *input_shape), ignore)
    except MorphError as error:
        if config.prune.name == config.grow.name == "none":
            log.info("the model's channels are not followed: %s", error)
            return ChannelGraph.untraced(model)
        hint = "; prune.ignore=[...] leaves modules out of it, prune=none the whole"
        raise UserError(f"model={config.model.name}: {error}{hint}") from error


def count_weights(model: nn.Module, threshold: float = 0.0) -> int:
    """Weights of convolutions and linear layers with |w| >= threshold."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((w.detach().abs() >= threshold).sum()) for w in weights)
