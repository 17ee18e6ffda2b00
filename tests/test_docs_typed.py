"""What the documentation shows is run as a reader would: commands page by page in a directory of their own, and Python.

Commands are shortened: two epochs for thirty, narrow networks, few images in place of published sets, three trials of a
search. What is only composed (`tests/test_docs_commands.py`) is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documented import PAGES, ROOT, Command, blocks, commands, content, kind, make_files
from fork_server import ForkServer
from PIL import Image
from test_docs_commands import OF_OTHERS, as_run

NOT_RUN = {  # a part of the command: why
    "make ": "sets up .venv, or takes minutes",
    "benchmarks": "measurements, of minutes; their numbers are on the pages",
    ".ci/run": "all of the tests",
    "pip install": "needs a network",
    "-m pytest": "the tests themselves",
    "notebooks/screenshots.py": "needs a browser; tests/test_pictures.py",
    "keep.py experiments/": "keeps what an experiment has left, and none is run",
    "+launcher=slurm": "needs a Slurm; tests/test_slurm.py",
    "srun ": "needs a Slurm; tests/test_slurm.py",
    "+launcher=ray": "needs a Ray; tests/test_ray.py",
    "--nnodes=2": "needs two hosts; tests/test_two_hosts.py",
    "weights=DEFAULT": "needs a network; tests/test_trained.py reads such files",
    "journal:////shared": "needs a shared disk; tests/test_shared_study.py",
    "postgresql://": "needs a server; tests/test_shared_study.py",
    "+experiment=": "a minute, shortened; tests/test_experiments.py runs one, test_docs_commands.py composes all arms",
    "morphtrain.ui": "a server; tests/test_ui.py",
    "python -m morphtrain.completion": "for shells; tests/test_completion.py",
    "morphtrain completion": "for shells; tests/test_completion.py",
    "-sc ": "for shells; tests/test_completion.py",
    "tracking.project=mine": "needs wandb's server",
    "data.root=uoft-cs": "needs a network",
    "data.root=pictures.parquet": "needs such a file",
    "evidence fit mine": "needs networks of several sizes, which short runs do not leave; tests/test_regressions.py",
    "compile=default": "compiles for half a minute; tests/test_compile.py",
}
PUBLISHED = ("data=fashion_mnist", "data=cifar10")  # which a test does not download
SMALL_SET = ("data=synthetic", "data.train_samples=256", "data.val_samples=32", "data.image_size=16")
LARGE = ("data.train_samples", "data.val_samples", "data.val_share")  # keys of published sets that are left out
EPOCHS = 30  # of the documentation's are one here, but two at least
SHORTER = {
    "grow.at_epochs": "[1]",
    "grow.round_epochs": "1",
    "grow.rounds": "1",
    "prune.start_epoch": "1",
    "prune.stop_epoch": "1",
    "prune.interval": "1",
    "batch_policy.every": "1",
    "hydra.sweeper.n_trials": "3",
    "hydra.sweeper.pruner.n_warmup_steps": "1",
    "hydra.launcher.n_jobs": "2",
    "seed": "1,2",
    "model.width": "8",
    "data.image_size": "32",
    "timing.profile": "[5,8]",
}
NARROW = ("resnet", "vgg")  # models that have `model.width`
# Pages whose commands run in the fast suite, too: they build on one another.
FAST = ("docs/guides/trained-weights.md",)

MODULES = {  # that pages take the reader to have
    "my_package/__init__.py": """
import torch
from torch import nn
from morphtrain.method import Method

def my_norm(model):
    pass

class Callback(Method):
    def __init__(self, key):
        self.key = key

network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(network.parameters(), 0.1)
loss = nn.CrossEntropyLoss()
loader = [(torch.randn(8, 1, 16, 16), torch.zeros(8, dtype=torch.long))] * 3
""",
    "my_package/loops.py": """
from my_package import loader, loss, network

def one_epoch():
    for images, labels in loader:
        loss(network(images), labels).backward()
""",
}


# The run that a page loads, where it is another one than that of the others.
RUNS = {
    "docs/guides/own-network.md": "model=custom model._target_=my_nets.Net +model.width=16",
    "docs/guides/own-parts.md": "model.width=8 norm=custom norm._target_=my_package.my_norm",
    "docs/methods/weight-averaging.md": "model.width=8 ema=1",
}


def reason(command: Command) -> str | None:
    """Why a command is only composed; None for one that runs."""
    text = f"{command.text} {command.directory}"
    if command.words[0] in OF_OTHERS:
        return "not ours"
    return next((why for part, why in NOT_RUN.items() if part in text.replace("'", "")), None)


def runnable(page: Path) -> list[Command]:
    """The commands of a page that run, each once, in the order in which a reader types them."""
    return list({(c.words, c.directory): c for c in commands(page) if reason(c) is None}.values())


def pages() -> list[Any]:
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        if runnable(page):
            found.append(pytest.param(page, id=name, marks=() if name in FAST else pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def stored(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has who types a page: a run, an experiment, folders of images, a module; and a tracking store."""
    directory = tmp_path_factory.mktemp("stored")
    run = ("model.width=8", "epochs=2", "tracking=none", "timing.reference=0", "hydra.run.dir=outputs/stored")
    result = fork_server.run(["-m", "morphtrain.run", *run], directory)
    assert result.returncode == 0, result.stderr
    for name in ("a", "b"):
        shutil.copytree(directory / "outputs" / "stored", directory / name)
    for place in ("experiments/lasso_ratio-small", "multirun/fastest/confirm-40"):
        shutil.copytree(ROOT / "notebooks" / "data" / "growth", directory / place)
    for name in ("photos", "path/to/images"):
        photos(directory / name)
    for name, text in MODULES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    shutil.copytree(ROOT / "docs" / "examples", directory / "docs" / "examples")
    (directory / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "keep.py", directory / "notebooks")
    shutil.copytree(ROOT / "docs" / "examples", directory, dirs_exist_ok=True)
    return directory


def photos(directory: Path) -> None:
    """Images in two classes, for training and for validation."""
    for part in ("train", "val"):
        for place, name in enumerate(("cats", "dogs")):
            (directory / part / name).mkdir(parents=True)
            for number in range(40 if part == "train" else 8):
                image = Image.new("RGB", (40, 40), (100 * place, 5 * number, 90))
                image.save(directory / part / name / f"{number}.png")


@pytest.fixture
def reader(stored: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    for page in PAGES:
        make_files(page, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tracking store for all pages, since making one takes seconds; one thread."""
    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@pytest.mark.parametrize("page", pages())
def test_the_commands_of_a_page_run_after_each_other(
    page: Path, reader: Path, environment: Mapping[str, str], fork_server: ForkServer
) -> None:
    prepare(page, reader, fork_server)
    for command in runnable(page):
        words = [found.replace("outputs/.../", "outputs/stored/") for found in shortened(command.words)]
        result = run(words, reader / command.directory, environment, fork_server)
        assert result.returncode == 0, f"{command.where}\n{shlex.join(words)}\n{result.stdout}{result.stderr}"


def prepare(page: Path, reader: Path, fork_server: ForkServer) -> None:
    """What a page says in words that the reader has by now."""
    if (name := str(page.relative_to(ROOT))) in RUNS:
        shutil.rmtree(reader / "outputs" / "stored")
        words = [*RUNS[name].split(), "epochs=1", "tracking=none", "hydra.run.dir=outputs/stored"]
        result = fork_server.run(["-m", "morphtrain.run", *words], reader, {"PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, result.stderr
    if page.name == "comparing.md":
        (loop,) = (block for block in blocks(page) if "def epoch()" in block.text)
        (reader / "my_loop.py").write_text(f"{loop.text}\n\nstep = epoch\n")
    if page.name == "trained-weights.md":
        code = "import my_nets, torch; torch.save(my_nets.Net(10, 3).state_dict(), 'mine.pth')"
        subprocess.run([sys.executable, "-c", code], cwd=reader, check=True)


def run(
    words: Sequence[str], directory: Path, environment: Mapping[str, str], fork_server: ForkServer
) -> subprocess.CompletedProcess[str]:
    program, *rest = words
    if program == "python":
        return fork_server.run(rest, directory, environment, timeout=200)
    module = {"torchrun": "torch.distributed.run", "morphtrain": "morphtrain"}[program]
    new = {**os.environ, **environment}
    command = [sys.executable, "-m", module, *rest]
    return subprocess.run(command, cwd=directory, env=new, capture_output=True, text=True, timeout=200)


def shortened(words: Sequence[str]) -> list[str]:
    """A command that takes seconds, of one that takes minutes."""
    if words[:2] == ("python", "-m"):
        return ["python", "-m", *_of_module(words[2], words[3:])]
    if words[0] == "morphtrain":
        return _of_module(words[0], words[1:])
    if words[0] == "torchrun":
        at = words.index("-m") + 2
        return [*words[:at], *_of_run(words[at:])]
    return list(words)


def _of_module(name: str, words: Sequence[str]) -> list[str]:
    if name == "morphtrain" and words[0] in ("run", "sweep"):
        command, *rest = as_run(words)
        return [name, command, *_of_run(rest)]
    if name == "morphtrain.run":
        return [name, *_of_run(words)]
    if name == "morphtrain.maxbatch":
        return [name, *words, "throughput_seconds=0"]
    if name == "morphtrain.lr_finder":
        return [name, *_without(words, "--steps", 2), "--steps", "20"]
    if name == "morphtrain.compare":
        return [name, *_of_compare(words)]
    if name == "morphtrain.tracking":
        return [name, "outputs/stored"]
    return [name, *words]


def _of_run(words: Sequence[str]) -> list[str]:
    """A run, a grid or a search."""
    if any(flag in words for flag in ("--help", "--cfg")):
        return list(words)
    keys = {key_of(word) for word in words}
    found = [other for word in words for other in _shorter(word, words)]
    if "epochs" not in keys:
        found.append(f"epochs={_least_epochs(words)}")
    if "prune.stop_epoch" in keys and "prune.start_epoch" not in keys:
        found.append("prune.start_epoch=1")
    if "model.width" not in keys and _has_width(words):
        found.append("model.width=8")
    if "prune=early" in words:
        found.append("prune.round_to=1")  # eight are more than such a layer has
    if any(re.match(r"\+sweep=|hydra/sweeper=", word) for word in words):
        found.append("hydra.sweeper.n_trials=3")
    if "+sweep=fastest" in words:
        found += ["hydra.sweeper.n_trials=5", "hydra.sweeper.confirm.best=1", "hydra.sweeper.confirm.seeds=3"]
    return found


def _least_epochs(words: Sequence[str]) -> int:
    """What happens in parts of a run needs some epochs."""
    several = ("grow.rounds", "data.infobatch", "data.progressive")
    return 5 if "+sweep=fastest" in words or any(key_of(word) in several for word in words) else 2


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _has_width(words: Sequence[str]) -> bool:
    models = [word.partition("=")[2] for word in words if word.startswith("model=")] or ["resnet8"]
    return all(model.startswith(NARROW) for model in models)


def _shorter(word: str, words: Sequence[str]) -> Iterator[str]:
    """The words in place of one."""
    key, equals, value = word.partition("=")
    large = (*PUBLISHED, "data=mnist_5000") if "+sweep=fastest" in words else PUBLISHED
    published = any(other in words for other in large)
    if word in large:
        yield from SMALL_SET
    elif published and key in LARGE:
        return
    elif key == "epochs":
        yield f"epochs={max(_least_epochs(words), int(value) // EPOCHS)}"
    elif key == "seed" and value.isdecimal():
        yield word
    elif key == "seed" and value.startswith("range("):
        yield "seed=range(1,4)"
    elif key in SHORTER and equals and not (key == "prune.stop_epoch" and value == "null"):
        yield f"{key}={SHORTER[key]}"
    else:
        yield word


def _of_compare(words: Sequence[str]) -> list[str]:
    parts = [[other for word in part for other in _shorter(word, words)] for part in _sides(words)]
    vs = "--vs" in words
    more = [] if "--steps" in words else ["epochs=5"]
    more += [] if any(key_of(word) == "model.width" for word in words) or not _has_width(words) else ["model.width=8"]
    for part in parts[:1] if len(parts) == 3 or vs else parts:
        part += [word for word in more if key_of(word) not in map(key_of, part)]
    together = [word for part in parts for word in (*part, "--")][:-1]
    together = ["3" if before == "--steps" else word for before, word in zip(["", *together], together, strict=False)]
    return ["1,2" if before == "--seeds" else word for before, word in zip(["", *together], together, strict=False)]


def _sides(words: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, "--"]:
        if word == "--":
            yield part
            part = []
        else:
            part.append(word)


def _without(words: Sequence[str], flag: str, count: int) -> list[str]:
    """The words without a flag and what belongs to it, `count` in all."""
    if flag not in words:
        return list(words)
    at = list(words).index(flag)
    return [*words[:at], *words[at + count :]]


def test_what_is_not_run_is_shown() -> None:
    """A reason goes with the last command that it was for."""
    texts = [f"{command.text} {command.directory}".replace("'", "") for page in PAGES for command in commands(page)]
    assert [part for part in NOT_RUN if not any(part in text for text in texts)] == []


def test_what_is_run_is_short() -> None:
    words = shlex.split("python -m morphtrain.run data=cifar10 data.train_samples=4000 epochs=120 grow.at_epochs=[20]")
    assert shortened(tuple(words))[3:] == [*SMALL_SET, "epochs=4", "grow.at_epochs=[1]", "model.width=8"]
    words = shlex.split("python -m morphtrain.compare model.width=32 -- precision=o0 -- precision=bf16 --steps 200")
    short = shlex.split("model.width=8 -- precision=o0 -- precision=bf16 --steps 3")
    assert shortened(tuple(words))[3:] == short


# What a page's Python takes to be there. Before its first block, or (a text of the block) before that one.
LOOP = """
import torch
import torch.nn.functional as F
from torch import nn
model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
)
criterion = nn.CrossEntropyLoss()
images, labels, tensor = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), torch.randn(5)
"""
NEEDS: dict[str, dict[str, str]] = {
    "docs/guides/library.md": {
        "": "import torch\nfrom torch import nn\n",
        "ChannelGraph.trace": """
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
images = torch.randn(8, 1, 32, 32)
model.train()
""",
        "from morphtrain.morph.effective import": """
from morphtrain.model import ResNet
layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
factor = torch.full((4, 1, 1, 1), 0.5)
""",
        "from morphtrain.prune.lasso import": """
loader, epochs, lr, momentum = [(images, torch.zeros(8, dtype=torch.long))], 2, 0.1, 0.9
graph = ChannelGraph.trace(model, images)
""",
        "from morphtrain.cost import measured_cost": """
model = ResNet(num_classes=10, in_channels=1, blocks=1, width=32)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
graph = ChannelGraph.trace(model, images)
""",
        "from morphtrain.prune.fading import": "left = 0.0\n",
        "from morphtrain.optimizer.isgd import": "criterion = nn.CrossEntropyLoss()\n",
    },
    "docs/guides/using-the-network.md": {
        "": "import torch\npixels = torch.rand(2, 1, 16, 16)\n",
        "morphtrain.save": """
from functools import partial
from my_nets import Net as Whole
Net = partial(Whole, 10, 1)
model = Net(width=32)
""",
        "from morphtrain.preprocessing import": "names = ['cat', 'dog']\n",
    },
    "docs/guides/own-network.md": {
        "per_channel = True": """
import torch
from torch import nn

class MyFunction(torch.autograd.Function):
    @staticmethod
    def forward(context, x, slope):
        return x * slope[:, None, None]
""",
        "import morphtrain, my_nets": "import torch\n",
    },
    "docs/guides/own-parts.md": {
        "": "import torch\nfrom torch.utils.data import DataLoader\n",
        "my_norm(model)": "from my_package import my_norm\n",
    },
    "docs/guides/own-data.md": {
        "": "import morphtrain.slices\nimport torch\nfrom torch.utils.data import DataLoader\n"
    },
    "docs/guides/comparing.md": {},
    "docs/guides/sweeps.md": {},
    "docs/guides/reading-the-records.md": {},
    "docs/guides/statistics.md": {
        'load("mine")': "import shutil\nshutil.copytree('experiments/lasso_ratio-small', 'mine')\n",
    },
    "docs/adding-an-option.md": {
        "class Toys(Method)": "import sys\nsys.modules['morphtrain.schema.prune_toy'] = sys.modules['__main__']\n",
    },
    "docs/methods/dynamic-fixed-point.md": {"": LOOP},
    "docs/methods/ghost-norm.md": {"": LOOP},
    "docs/methods/sync-norm.md": {"": LOOP},
    "docs/methods/weight-norm.md": {"": LOOP},
    "docs/methods/weight-averaging.md": {
        "": "import morphtrain\nimport torch\n",
        "averages_of": """
model = morphtrain.load("outputs/stored/last.pt")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
""",
    },
    "docs/methods/gradient-approximation.md": {"": LOOP},
    "docs/methods/sparse-activation-gradients.md": {"": LOOP},
}


def with_python() -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES if any(kind(block) == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", with_python())
def test_the_python_of_a_page_runs(
    page: str, reader: Path, environment: Mapping[str, str], fork_server: ForkServer
) -> None:
    """All blocks of a page after one another, as in one session."""
    needs = NEEDS[page]
    found = [content(block) for block in blocks(ROOT / page) if kind(block) == "python"]
    assert [text for text in needs if text and not any(text in block for block in found)] == []
    prepare(ROOT / page, reader, fork_server)
    parts = [needs.get("", "")]
    for block in found:
        parts += [code for text, code in needs.items() if text and text in block]
        parts.append(
            re.sub(r"outputs/(\.\.\.|<date>/<time>)/", "outputs/stored/", block).replace("epochs=10", "epochs=2")
        )
    lines = [f"exec(compile({part!r}, 'part {number}', 'exec'), globals())" for number, part in enumerate(parts)]
    (reader / "typed.py").write_text("\n".join(lines))  # one by one, since each may begin with an import of __future__
    result = fork_server.run(["typed.py"], reader, environment)
    numbered = "\n".join(f"--- part {number}\n{part}" for number, part in enumerate(parts))
    assert result.returncode == 0, f"{result.stderr}\n{numbered}"


def test_the_example_of_a_callback_ends_a_run_that_does_not_become_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "examples"))
    module = importlib.import_module("patience")

    def ends(*accuracies: float) -> bool:
        run: Any = SimpleNamespace(history=[{"val_accuracy": value} for value in accuracies], stopped=False)
        module.Patience(epochs=2).after_epoch(run)
        return bool(run.stopped)

    assert not ends() and not ends(0.5, 0.4)
    assert ends(0.5, 0.4, 0.5), "twice no better"
    assert not ends(0.5, 0.4, 0.6)
    assert ends(0.1, 0.6, 0.6, 0.3)
