"""A fixed training workload that measures the device's speed during a run, to convert times to steady speed."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.optim import SGD

from morphtrain import world
from morphtrain.cost.step import training_step
from morphtrain.cost.stopwatch import wait_for

# Calibrated times are those of a nominal machine that always takes this long for a step of the workload. It is a
# constant, not a measurement of each host, so that times compare across hosts and years, and no value measured once,
# perhaps on a busy machine, stays forever. Changing it or the workload makes all earlier calibrated times useless.
NOMINAL_SECONDS = 0.010

# Before the first epoch, bursts follow each other until two agree. A short run has no others: one that a neighbour
# stopped for a moment made all of a run's calibrated times wrong by a factor of five.
FIRST_SECONDS, MOST_FIRST, AGREEING = 0.05, 10, 1.1
# After epochs a burst lasts at least this long, many scheduler time slices, and bursts are as frequent as their share
# allows. On a busy machine one may be only a step or two, but short disturbances are seen only by measuring often.
LEAST_SECONDS, MOST_SECONDS = 0.05, 2.0
WARMUP_STEPS = 3  # the first steps choose kernels and map memory
LAYERS = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))  # channels in, out, stride


class Reference:
    """Training steps of a small CNN: 3x3 convolutions of 16 to 64 channels on 16x16 pixels, batch norm, SGD.

    It uses the same kernels and threads as training, so it slows down in the same way. A batch has 32 images on a CPU
    and 1024 on other devices, enough to keep them busy. The process's random states and flags do not change.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        batch = 32 if device.type == "cpu" else 1024
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
            self.model = _network().to(device).train()
            self.images = torch.randn(batch, 3, 16, 16).to(device)
            self.labels = torch.randint(10, (batch,)).to(device)
        self.optimizer = SGD(self.model.parameters(), lr=0.0, momentum=0.9)  # lr=0: always the same work
        for _ in range(WARMUP_STEPS):
            self._step()

    def burst(self, seconds: float) -> float:
        """Take steps for at least `seconds` and return the steps per second.

        The time between steps counts too, since whatever stops this process there also slows down training. So single
        steps are not timed with `morphtrain.cost.stopwatch`.
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
    """Alternates training with bursts of the reference, and converts seconds into those of the nominal machine.

    Of several processes all run it at the same time, and the slowest one counts, as it does in training.

    Args:
        reference: the workload.
        share: of the training time that bursts may take. If epochs are too short for a burst each, several share one.
    """

    def __init__(self, reference: Reference, share: float) -> None:
        self.reference = reference
        self.share = share
        self.owed = 0.0  # seconds of bursts allowed by the training so far
        self.rates: list[float] = []  # steps per second: the burst before the last epoch, and one after it if any
        self.fastest = 0.0  # steps per second, of all bursts so far
        self._first_bursts()

    def trained(self, seconds: float) -> None:
        """Count `seconds` of training and run a burst if one is due; call this after training, while no clock runs."""
        self.owed += self.share * seconds
        self.rates = self.rates[-1:]
        if self.owed >= max(LEAST_SECONDS, 1 / self.rates[-1]):
            self._burst(min(self.owed, MOST_SECONDS))

    @property
    def rate(self) -> float:
        """Current steps per second: the mean of the bursts before and, if there was one, after the last epoch.

        Rates and not times are averaged, because work is rate times time. No burst is left out as an outlier: a short
        disturbance slows down training for just the share of time that it lasts.
        """
        return sum(self.rates) / len(self.rates)

    @property
    def seconds(self) -> float:
        """Seconds that a step of the reference currently takes."""
        return 1 / self.rate

    def calibrated(self, seconds: float) -> float:
        """Seconds that the nominal machine would need for what just took `seconds`."""
        return seconds * NOMINAL_SECONDS * self.rate

    def _first_bursts(self) -> None:
        for _ in range(MOST_FIRST):
            self._burst(FIRST_SECONDS)
            self.rates = self.rates[-2:]
            if len(self.rates) == 2 and max(self.rates) <= AGREEING * min(self.rates):
                break
        self.owed = 0.0

    def _burst(self, seconds: float) -> None:
        world.wait()  # several processes load the machine together, as they do when they train
        start = time.perf_counter()
        rate = self.reference.burst(seconds)
        slowest = world.largest_of({"rate": -rate, "seconds": time.perf_counter() - start})
        self.rates.append(-slowest["rate"])
        self.fastest = max(self.fastest, self.rates[-1])
        # A burst that took too long delays the next ones; unused time is not saved up.
        self.owed = min(0.0, self.owed - slowest["seconds"])
