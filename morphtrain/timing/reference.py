"""A fixed piece of training: how fast the device is while a run has it, and its times on one of steady speed."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.optim import SGD

from morphtrain.cost.step import training_step
from morphtrain.cost.stopwatch import wait_for

# The unit of calibrated time: a machine that always takes just so long for a step of the workload. A constant, and not
# the first quiet time of each host: so the times of several hosts and of all years compare, and nothing that was
# measured once, beside others perhaps, is kept for ever. Whoever changes this or the workload devalues all of them.
NOMINAL_SECONDS = 0.010

FIRST_SECONDS = 0.1  # of the workload, before the first epoch
# Behind epochs it runs for at least so long, many slices of the scheduler, and as often as its share allows: beside
# others a burst is a step or two, but what comes and goes is only seen by looking often.
LEAST_SECONDS, MOST_SECONDS = 0.05, 2.0
WARMUP_STEPS = 3  # the very first ones pick kernels and map memory
LAYERS = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))  # channels in, out, stride


class Reference:
    """Training steps of a small CNN: 3x3 convolutions of 16 to 64 channels on 16x16 pixels, batch norm, SGD.

    It slows down as training does: by the same kernels, through the same threads. On a CPU a batch has 32 images, on
    other devices 1024, so that they have to compute. Random states and flags of the process stay as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        batch = 32 if device.type == "cpu" else 1024
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
            self.model = _network().to(device).train()
            self.images = torch.randn(batch, 3, 16, 16).to(device)
            self.labels = torch.randint(10, (batch,)).to(device)
        self.optimizer = SGD(self.model.parameters(), lr=0.0, momentum=0.9)  # lr=0: the same work for ever
        for _ in range(WARMUP_STEPS):
            self._step()

    def burst(self, seconds: float) -> float:
        """Work for `seconds`, to the end of a step, and return the steps a second.

        All of the time counts, between steps as well: what keeps this process from working slows training down, too.
        So single steps are not timed with `morphtrain.cost.stopwatch`.
        """
        steps, spent = 0, 0.0
        start = time.perf_counter()
        while spent < seconds:
            self._step()
            steps += 1
            spent = time.perf_counter() - start
        return steps / spent

    @torch.enable_grad()
    def _step(self) -> None:
        training_step(self.model, self.optimizer, self.images, self.labels)
        wait_for(self.device)


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in LAYERS:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(LAYERS[-1][1], 10))


class Calibration:
    """Interleaves bursts of the reference with training, and turns seconds into those of the nominal machine.

    Args:
        reference: the workload.
        share: of training's time, that bursts may take. Epochs too short to afford a burst each share one.
    """

    def __init__(self, reference: Reference, share: float) -> None:
        self.reference = reference
        self.share = share
        self.owed = 0.0  # seconds of reference that training has earned
        self.rates: list[float] = []  # steps a second, of the burst before the latest training and of one behind it
        self.fastest = 0.0  # of all bursts so far
        self._burst(FIRST_SECONDS)

    def trained(self, seconds: float) -> None:
        """To be called behind so many seconds of training, outside of what is clocked."""
        self.owed += self.share * seconds
        self.rates = self.rates[-1:]
        if self.owed >= max(LEAST_SECONDS, 1 / self.rates[-1]):
            self._burst(min(self.owed, MOST_SECONDS))

    @property
    def rate(self) -> float:
        """Steps a second around now: before and behind what was trained last, if there was a burst behind it.

        Work is rate times time, so that it is rates and not times whose mean counts, and no burst is left out: what
        comes and goes slows training down for just the share of time in which it is there.
        """
        return sum(self.rates) / len(self.rates)

    @property
    def seconds(self) -> float:
        """A step of the reference takes, around now."""
        return 1 / self.rate

    def calibrated(self, seconds: float) -> float:
        """What took `seconds` around now would take on the nominal machine."""
        return seconds * NOMINAL_SECONDS * self.rate

    def _burst(self, seconds: float) -> None:
        start = time.perf_counter()
        self.rates.append(self.reference.burst(seconds))
        self.fastest = max(self.fastest, self.rates[-1])
        # What a burst took longer than it was to, the next ones wait for; what was not used is not saved up.
        self.owed = min(0.0, self.owed - (time.perf_counter() - start))
