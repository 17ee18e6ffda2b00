"""The live state of a run, which the loop advances and the methods change."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from morphtrain import averaging, schema, slices, world
from morphtrain.compilation import Compilation, usual_pass
from morphtrain.contracts import Batch, Data, Loss, NormStart, Precision, Schedule, SelectableData
from morphtrain.cost import CostKind, WidthCost, count_macs, count_params, measured_cost
from morphtrain.cost.latency import Terms
from morphtrain.errors import UserError
from morphtrain.infobatch import InfoBatch
from morphtrain.initialise import fresh_weights
from morphtrain.method import Method
from morphtrain.mixing import Mixing
from morphtrain.morph import Averages, ChannelGraph, MorphError, additions_of, averages_of, kept_buffers, kept_modes
from morphtrain.outputs import check_outputs
from morphtrain.own_numbers import OwnNumbers
from morphtrain.part_checks import is_divided
from morphtrain.progressive import resized, small_size
from morphtrain.ramp import Ramp
from morphtrain.settling import agree_buffers, settle, synchronises, trained_norms
from morphtrain.timing.clock import Clock

# After 56 epochs of four kinds of training on digits, 8 batches of 32 images gave the accuracy that statistics over all
# training images give to 0.5 points (4 batches: 0.8, 16: 0.3, the moving average: 30), in 6 % of an epoch of 44 steps.
SETTLING_BATCHES = 8

# Streams of random numbers, see `derived_seed`: those that gradient methods draw, those of `Run.own_numbers`, and those
# that images are mixed by.
GRADIENTS, OWN, MIXED = 1, 2, 3
# Parts of a run that may have state: the user's own, and the scores of images.
PARTS = ("data", "criterion", "schedule", "infobatch")


@dataclass
class Run:
    """Model, graph, optimizer, schedule, data, clock and methods, and how far training has come."""

    config: schema.Config
    device: torch.device
    data: Data
    model: nn.Module
    graph: ChannelGraph
    optimizer: Optimizer
    criterion: Loss
    schedule: Schedule
    precision: Precision
    clock: Clock
    methods: dict[str, Method]  # by group, in the order of `method.ORDER`
    infobatch: InfoBatch | None = None  # chooses the images of each epoch; None: all of them
    mixing: Mixing | None = None  # mixes the images of each batch; None: they stay as they are
    norm_start: NormStart | None = None  # what its norm does with images before the first step; None: nothing
    compilation: Compilation | None = None  # with config key `compile`: which passes go through compiled code
    chosen: dict[str, str] = field(default_factory=dict)  # what `auto` stands for, by config key
    started_from: dict[str, str] = field(default_factory=dict)  # of `model.weights`: the file, and its digest
    base_lrs: list[float] = field(default_factory=list)  # of the optimizer's groups, before schedule and ramps
    initial: dict[str, int] = field(default_factory=dict)  # channels, weights, params, macs of the first network
    epoch: int = 0  # the current one, from 1; between epochs the last one done, before the first 0
    progress: float = 0.0  # passes over the training data, without skipped steps; what the schedule sees
    batch_size: int = 0
    micro_batch: int | None = None  # most images that go through the network at once, in each process; None: all
    lr_scale: Ramp = field(default_factory=Ramp)  # the learning rate's factor for the batch size, set by its policy
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # of the last batch
    epoch_means: Callable[[], tuple[float, float]] | None = None  # reads what follows off the device, at its end
    train_loss: float = 0.0  # mean over the last epoch
    train_accuracy: float = 0.0  # 0..1, in the same forward passes
    history: list[dict[str, float]] = field(default_factory=list)  # one record of metrics per epoch
    change: str = ""  # what the structural change of this epoch did; "" if there was none
    renamed: dict[str, str] = field(default_factory=dict)  # new names of the spaces there were before it, see `retrace`
    changes: list[dict[str, Any]] = field(default_factory=list)  # epoch, event, and the widths of all spaces after it
    lr_factor: float = 1.0  # factor on the schedule's learning rate, set by methods that lower it
    rewarmed: Ramp = field(default_factory=Ramp)  # the learning rate's factor after growth
    growths: list[Ramp] = field(default_factory=list)  # factors on the rate of what each has added, see `growing`
    redrawn: int = 0  # the last epoch after which all weights were drawn again
    stopped: bool = False  # a method ends the run after this epoch
    cycles: list[int] = field(default_factory=list)  # epochs after which the schedule begins again (`resume_schedule`)
    params: int = 0
    macs: int = 0
    _own: OwnNumbers = field(default_factory=OwnNumbers)

    @property
    def ended(self) -> bool:
        """Whether no epoch is to follow: all are done, a method has stopped the run, or it is as accurate as asked."""
        done = self.stopped or self.epoch >= self.config.epochs
        return done or bool(self.history and self.is_enough(self.history[-1]["val_accuracy"]))

    def is_enough(self, val_accuracy: float) -> bool:
        """Whether the run is to end with this accuracy (`stop_at`)."""
        return self.config.stop_at is not None and val_accuracy >= self.config.stop_at

    @property
    def averages(self) -> Averages:
        """Of the weights over the steps, with config key `ema`; empty without it, and before the first step."""
        return averages_of(self.optimizer)

    def update_averages(self, passed: float) -> None:
        """Let the averages follow a step that was the share `passed` of an epoch."""
        if self.config.ema is not None:
            trained = self.progress - self.averages.since
            self.averages.update(self.model, averaging.kept(self.config.ema, passed, trained))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the network has its averaged weights, and the running statistics measured for them.

        Afterwards it is as it was before. Without averages it stays as it is.
        """
        if not self.averages.values:
            yield
            return
        with kept_buffers(self.model), self.averages.in_place(self.model.parameters()):
            for name, value in self.averages.statistics.items():
                self.model.get_buffer(name).copy_(value)
            yield

    def hooks(self, name: str) -> list[Callable[..., Any]]:
        """This hook of every method that implements it, in the declared order."""
        return [getattr(method, name) for method in self.methods.values() if method.implements(name)]

    def shape_changed(self, summary: str) -> None:
        """Record a structural change; a method calls this after each one, `summary` being for the log."""
        self.change = f"{self.change}; {summary}" if self.change else summary

    def follow_change(self) -> None:
        """Retrace the changed network, so that the run continues exactly as one resumed after this epoch would.

        Sets `renamed`. Raises a `UserError` if the network can no longer be followed.
        """
        try:
            self.renamed = self.graph.retrace()
        except MorphError as error:
            raise UserError(f"{self.change}: the changed network cannot be followed: {error}") from error

    def note(self, event: str, renamed: Mapping[str, str] | None = None) -> None:
        """Remember what a method did after this epoch, and the widths that the network has now.

        `renamed`: the names that the spaces which are still there have now, by those they had before.
        """
        widths = {space.name: space.size for space in self.graph.spaces}
        change: dict[str, Any] = {"epoch": self.epoch, "event": event, "widths": widths}
        if renamed is not None and any(old != new for old, new in renamed.items()):
            change["renamed"] = dict(renamed)
        self.changes.append(change)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits (B, classes) of a training pass, through compiled code where there is any."""
        if self.compilation is not None:
            return self.compilation(self.model, images)
        logits: torch.Tensor = self.model(images)
        return logits

    @property
    def usual_pass(self) -> int:
        """Images in most of the passes of a whole batch in this process."""
        shares = slices.sizes(self.batch_size)
        return usual_pass(shares[world.rank()], passes(max(shares), self.micro_batch))

    def rewarm(self, epochs: float) -> None:
        """Let the learning rate rise again from zero to what it would be, over `epochs`."""
        self.rewarmed = Ramp(0.0, 1.0, self.progress, epochs)

    @contextmanager
    def growing(self, factor: float, epochs: float) -> Iterator[None]:
        """Let what a method adds within the block learn at `factor` times the learning rate of all else.

        The factor moves to 1 over `epochs` from now.
        """
        if factor == 1:
            yield
            return
        self.growths.append(Ramp(factor, 1.0, self.progress, epochs))
        additions = additions_of(self.optimizer)
        additions.growth = len(self.growths)
        try:
            yield
        finally:
            additions.growth = 0

    def set_learning_rates(self, epochs_done: float) -> None:
        """Give parameter groups, and what has grown, their learning rates after `epochs_done` epochs."""
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.learning_rate(epochs_done, number)
        factors = {number: ramp.at(epochs_done) for number, ramp in enumerate(self.growths, 1)}
        additions_of(self.optimizer).set_factors(factors)

    def learning_rate(self, epochs_done: float, group: int = 0) -> float:
        """The learning rate of one of the optimizer's parameter groups after `epochs_done` epochs."""
        scheduled = self.base_lrs[group] * self.schedule(epochs_done)
        return scheduled * self.lr_scale.at(epochs_done) * self.rewarmed.at(epochs_done) * self.lr_factor

    @property
    def epoch_images(self) -> int:
        """How many of the training images this epoch trains on; all of them until its first batch, which chooses."""
        return len(self.data.train) if self.infobatch is None else len(self.infobatch.rows)

    @property
    def step_weight(self) -> float:
        """How many training images stand behind one that this epoch trains on, on average: 1, or more with InfoBatch.

        The gradients of the loss are so much larger in expectation, and whatever a method adds to them, or takes off in
        a step, has to be, too: an epoch has so many fewer steps.
        """
        return len(self.data.train) / self.epoch_images

    def small_size(self, epoch: int) -> tuple[int, int] | None:
        """(H, W) that the training images of an epoch are resized to; None: they are as the data gives them."""
        small = epoch <= self.config.data.small_epochs(self.config.epochs)
        return small_size(self.config.data, self.data.input_shape) if small else None

    def all_batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """All training images in the order of this epoch, augmented, in batches of the run's size or another one.

        With `data.order=cycle` the order is that of the first epoch, in every epoch; the augmentation is not.
        """
        batch_size, generator = batch_size or self.batch_size, self.generator(self.epoch)
        if self.config.data.order == "shuffled":
            return self.data.train_batches(batch_size, generator)
        return cast(SelectableData, self.data).train_batches_of(self.order(generator), batch_size, generator)

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """All training images (N,) in the order of this epoch; `generator`, which augments them, draws for it."""
        samples = len(self.data.train)
        order = torch.randperm(samples, generator=generator)
        if self.config.data.order == "shuffled":
            return order
        return torch.randperm(samples, generator=self.generator(1))  # what orders the first epoch does not augment it

    def training_inputs(self, batches: int) -> list[torch.Tensor]:
        """The images of the first batches of this epoch, of the size that the next epoch trains on."""
        found = itertools.islice(self.all_batches(), batches)
        return [self._sized(images, self.epoch + 1) for images, _ in found]

    def first_batch(self, batch_size: int | None = None) -> Batch:
        """The first batch of this epoch, its images as large as the data has them, as often as it is asked for."""
        with self._looking_ahead():
            return next(self.all_batches(batch_size))

    def _sized(self, images: torch.Tensor, epoch: int) -> torch.Tensor:
        """Images as large as those that `epoch` trains on."""
        size = self.small_size(epoch)
        return images if size is None else resized(images, size)

    def settle(self) -> None:
        """Measure batch norm's running statistics for the present weights, on the first batches of this epoch.

        A method calls this before it uses them; an epoch does before it is evaluated. Random numbers, modes and data
        are as before. A network without batch norm is not run.
        """
        with kept_modes(self.model):
            if not self.model.training:  # otherwise its modes are those of training, which a method may have set
                self.model.train()
            norms = trained_norms(self.model)
            if norms:
                with self._looking_ahead():
                    settle(self.model, norms, self._settling_passes(), self.precision.autocast)
        self.agree_buffers()

    def settle_averages(self) -> None:
        """The same for the averaged weights, for blocks of `averaged`; the network stays as it is."""
        self.averages.statistics = {}
        if not self.averages.values:
            return
        with self.averaged():
            self.settle()
            buffers = self.model.named_buffers(remove_duplicate=False)  # as in a state_dict
            self.averages.statistics = {name: buffer.clone() for name, buffer in buffers}

    def agree_buffers(self) -> None:
        """Give the model, and a loss that is a module, the same buffers in all processes: `settling.agree_buffers`."""
        images = slices.sizes(self.batch_size)[world.rank()]
        agree_buffers(self.model, images)
        if isinstance(self.criterion, nn.Module):
            agree_buffers(self.criterion, images)

    def _settling_passes(self) -> Iterator[torch.Tensor]:
        """Images as they go through the network in training; whole batches only, as all count the same.

        Of each batch they are this process's, in as many passes as any has: norms may wait for those of the others.
        """
        number = min(SETTLING_BATCHES, len(self.data.train) // self.batch_size)
        parts = passes(max(slices.sizes(self.batch_size)), self.micro_batch)
        waits = synchronises(self.model)
        for images in self._own_images(number):
            yield from (piece for piece in images.tensor_split(parts) if len(piece) or waits)

    def _own_images(self, number: int) -> Iterator[torch.Tensor]:
        """This process's images of the first whole batches of this epoch."""
        if world.size() == 1 or not is_divided(self.data):
            for images, _ in itertools.islice(self.all_batches(), number):
                yield images[slices.own(slice(0, len(images)))]
            return
        generator = self.generator(self.epoch)
        rows = self.order(generator)
        parts = [slices.own(batch) for batch in slices.batches(len(rows), self.batch_size)[:number]]
        for images, _ in self.data.train_slices_of(rows, parts, generator):
            yield images

    @contextmanager
    def _looking_ahead(self) -> Iterator[None]:
        """Leave data and random numbers as they were, whatever images go through the network within the block."""
        data = copy.deepcopy(self.data.state_dict()) if hasattr(self.data, "state_dict") else None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            yield
        if data is not None:
            self.data.load_state_dict(data)  # type: ignore[attr-defined]  # of the user's own, see `contracts`

    def start_norm(self) -> None:
        """Let a norm that needs to see images before the first step start the network from a pass of them.

        They are of the first batch of the present epoch, of the size that the next epoch trains on. Each process has
        its share of the batch, or all of it if there are not enough images.
        """
        if self.norm_start is None:
            return
        batch_size = self.batch_size or self.config.first_batch_size
        most = self.micro_batch or getattr(self.config.batch_policy, "max_micro_batch", None)
        images, _ = self.first_batch(batch_size)
        if len(images) >= world.size():
            images = images[slices.own(slice(0, len(images)))]
        images = self._sized(images, self.epoch + 1)
        with self._looking_ahead(), self.precision.autocast():
            self.norm_start(self.model, images.tensor_split(passes(len(images), most))[0])

    def reset_weights(self) -> None:
        """Give the network new random weights in its present structure, and clear the optimizer's state."""
        fresh_weights(self.model)
        self.start_norm()
        self.redrawn = self.epoch
        self.optimizer.state.clear()
        additions_of(self.optimizer).forget(self.model.parameters())
        self.averages.begin(self.progress)

    def set_batch(self, batch_size: int, micro_batch: int | None = None) -> None:
        """Set the images per step and the most that go through the network at once; for batch policies.

        Raises:
            UserError: if the training set is smaller, or a pass gets one image and the network cannot train on that.
        """
        samples = len(self.data.train)
        if batch_size > samples:
            raise UserError(
                f"batch_policy.batch_size={batch_size}: the training set has {samples} images; at most that many"
            )
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.check_single()

    def leaves_single(self, images: int) -> bool:
        """Whether a single image goes through the network in some pass of an epoch of so many, in some process.

        If norms are synchronised, it is a single one of all processes.
        """
        together = synchronises(self.model)
        for shares in (slices.sizes(self.batch_size), slices.sizes(images % self.batch_size)):
            parts = passes(max(shares), self.micro_batch)
            least = [share // parts for share in shares]  # of the images of a pass
            single = sum(least) == 1 if together else any(0 < share < 2 * parts for share in shares)
            if single:
                return True
        return False

    def check_single(self) -> None:
        """Raise a `UserError` if a pass gets one image and the network cannot train on that."""
        samples = len(self.data.train)
        if not self.leaves_single(samples):
            return
        channels, *full = self.data.input_shape
        try:
            with world.alone():  # otherwise synchronised norms would have one of each process
                for size in (full, self.small_size(1) or full):
                    check_outputs("the model", self.model, (channels, *size), self.data.num_classes, samples=1)
        except UserError as error:
            among = "" if world.size() == 1 else f" among {world.size()} processes"
            micro_batch = "" if self.micro_batch is None else f" in passes of at most {self.micro_batch}"
            raise UserError(
                f"batch_policy.batch_size={self.batch_size}: of {samples} images{among}{micro_batch}, a single one is "
                f"left for a pass, but {error}"
            ) from error

    def scale_learning_rate(self, factor: float, warmup_epochs: float) -> None:
        """Let the learning rate become `factor` times what `optimizer.lr` and schedule say, within `warmup_epochs`."""
        self.lr_scale = self.lr_scale.turned(self.progress, factor, warmup_epochs)

    def count(self) -> None:
        """Count the parameters and MACs of the network in its present structure."""
        self.params = count_params(self.model)
        self.macs = count_macs(self.model, self.data.input_shape)

    def width_cost(self, kind: CostKind, terms: Terms, graph: ChannelGraph | None = None) -> WidthCost:
        """What the network, or that of another `graph`, costs by its widths.

        Args:
            terms: what "latency" has measured so far, for a process's share of the batch size that the run starts with;
                it is added to. A method keeps it in its state, so that a resumed run goes on with the same prices.
        """
        graph = graph or self.graph
        if kind != "latency":
            return WidthCost(graph, kind)
        images = max(slices.sizes(self.config.first_batch_size))
        return measured_cost(graph, images, self.precision.autocast, known=terms)

    def generator(self, epoch: int) -> torch.Generator:
        """The random numbers of an epoch: a function of seed and epoch alone, so that a resumed run repeats it."""
        return torch.Generator().manual_seed(derived_seed(self.config.seed, epoch))

    def own_seed(self, stream: int) -> int:
        """A seed, of this epoch, for what each process draws for its own images; rank 0 has that of one process."""
        rank = world.rank()
        return derived_seed(self.config.seed, self.epoch, stream, *([rank] if rank else []))

    def own_numbers(self) -> AbstractContextManager[None]:
        """A block in which torch's random numbers are this process's own: what it draws is for its images alone.

        Outside of such blocks all processes draw the same. One process draws all of its numbers from one stream.
        """
        return nullcontext() if world.size() == 1 else self._own.drawn(self.own_seed(OWN), self.device)


def passes(images: int, micro_batch: int | None) -> int:
    """Number of passes, equal in size to within one image, in which a batch goes through the network.

    Of several processes, all take as many as the one with the most images: `images` are its.
    """
    return 1 if micro_batch is None else max(1, -(-images // micro_batch))


def derived_seed(seed: int, epoch: int, *stream: int) -> int:
    """A 64-bit seed for an epoch; epoch 0 is the initialisation. A `stream` has random numbers of its own."""
    return int(np.random.SeedSequence((seed, epoch, *stream)).generate_state(1, np.uint64)[0] >> 1)
