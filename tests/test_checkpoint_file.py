"""A checkpoint gives back what was saved, or says in one line that it cannot: damaged, foreign and hostile files."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import resource
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_resume import assert_same
from torch import nn

import morphtrain
from morphtrain.errors import UserError
from morphtrain.grow.net2deeper import insert_block_like
from morphtrain.state import Run
from morphtrain.trainer import checkpoint, checkpoint_file, stored_network
from morphtrain.trainer.build import build_run
from morphtrain.trainer.checkpoint import Checkpoint
from morphtrain.trainer.differences import differences
from morphtrain.trainer.epoch import begin_epoch, finish_epoch, start
from morphtrain.trainer.loop import train_epoch

CONFIG = (*SMALL, "data.train_samples=32", "data.val_samples=8", "model.width=4", "model.blocks=1", "tracking=none")

Content = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that has been trained for an epoch, pruned and deepened."""
    run = small()
    start(run)
    begin_epoch(run)
    train_epoch(run)
    for space in run.graph.spaces:
        run.graph.reindex(space, range(1, space.size), run.optimizer)
    insert_block_like(run.graph, run.graph.stage_ends[0].path, [], "zero_gamma", run.optimizer)
    run.count()
    finish_epoch(run)
    directory = tmp_path_factory.mktemp("saved")
    checkpoint.save(run, directory, None)
    return directory / "last.pt"


def small() -> Run:
    return build_run(morphtrain.compose(*CONFIG))


def changed(saved: Path, to: Path, change: Callable[[Content, Content], Any]) -> Path:
    """A copy of a checkpoint, digest and all, whose content or facts are different."""
    content = torch.load(saved, weights_only=True)
    stored = content["facts"]
    facts = json.loads(stored)
    change(content, facts)
    if content.get("facts") is stored:
        content["facts"] = json.dumps(facts)
    checkpoint_file.write(to, content)
    return to


# -- sound files ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_torch_and_zip_tools_read_it_too(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    dtypes += (torch.uint16, torch.float8_e4m3fn, torch.complex64)
    tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 3), "view": torch.arange(12.0).view(3, 4).t(), "number": torch.tensor(1.5)}
    tensors |= {"expanded": torch.ones(1).expand(5), "parameter": nn.Parameter(torch.ones(2))}
    shared = (0.9, 0.999)
    plain = [None, True, -3, 2.5, float("inf"), "text", {"a": {1: [()]}}, torch.Size([2]), shared, shared]
    content = {"tensors": collections.OrderedDict(tensors), "plain": plain}
    path = tmp_path / "file.pt"
    checkpoint_file.write(path, content)
    read, digested = checkpoint_file.read(path, "file")
    assert digested
    for found in (read, torch.load(path, weights_only=True)):
        assert found["plain"] == plain
        assert found["tensors"].keys() == tensors.keys()
        for name, tensor in tensors.items():
            twin = found["tensors"][name]
            assert (twin.dtype, twin.stride(), twin.tolist()) == (tensor.dtype, tensor.stride(), tensor.tolist())
    assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize(
    "state",
    [
        np.float64(1),
        collections.defaultdict(int),
        torch.ones(2).to_sparse(),
        torch.ones(1).expand(10**9),
        {1, 2},
        {"deep": np.zeros(2)},
        [object()],
    ],
)
def test_what_could_not_be_read_is_not_written(state: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"methods\.prune: "):
        checkpoint_file.write(tmp_path / "file.pt", {"methods": {"prune": state}})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_digest_is_read_if_it_is_an_old_one(saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save(content, tmp_path / "stripped.pt")
    with pytest.raises(UserError, match=r"stripped\.pt: damaged checkpoint \(its digest is gone\)"):
        morphtrain.load(tmp_path / "stripped.pt")
    torch.save({**content, "format": "morphtrain checkpoint 5"}, tmp_path / "old.pt")
    assert_same(dict(morphtrain.load(tmp_path / "old.pt").state_dict()), dict(morphtrain.load(saved).state_dict()))
    config = morphtrain.compose(*CONFIG)
    old, new = Checkpoint(tmp_path / "old.pt").restore(config), Checkpoint(saved).restore(config)
    assert_same(dict(old.model.state_dict()), dict(new.model.state_dict()))


def test_a_loaded_network_is_the_restored_one_and_nobody_elses(saved: Path) -> None:
    restored = Checkpoint(saved).restore(morphtrain.compose(*CONFIG)).model.eval()
    loaded, again = morphtrain.load(saved), morphtrain.load(saved)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), restored(x))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in restored.parameters()]
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    with torch.no_grad():
        next(loaded.parameters()).zero_()
    assert torch.equal(again(x), restored(x))


# -- damaged ones --------------------------------------------------------------------------------------------------


def flips(size: int, count: int) -> list[int]:
    """Positions of single bits: all of the digest and of the end of the archive, and others at random."""
    end = (len(checkpoint_file.MARK) + checkpoint_file.DIGITS + 22) * 8
    draw = random.Random(14)
    return [*range(8 * size - end, 8 * size), *draw.sample(range(8 * size - end), count - end)]


def outcomes(stored: bytes, positions: list[int], path: Path, state: Content) -> collections.Counter[str]:
    """How a checkpoint ends with each of these bits flipped; an error other than a `UserError` is not caught."""
    found: collections.Counter[str] = collections.Counter()
    for position in positions:
        damaged = bytearray(stored)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            content = Checkpoint(path).content
        except UserError as error:
            assert "\n" not in str(error)
            found["refused"] += 1
        else:
            assert_same(content, state)
            found["identical"] += 1
    return found


def test_a_flipped_bit_is_always_found(saved: Path, tmp_path: Path) -> None:
    stored, state = saved.read_bytes(), Checkpoint(saved).content
    found = outcomes(stored, flips(len(stored), 2600), tmp_path / "flipped.pt", state)
    assert found == {"refused": 2600}


@pytest.mark.parametrize("kept", [0, 1, 0.5, -65, -64, -1])
def test_a_cut_file_is_refused(kept: float, saved: Path, tmp_path: Path) -> None:
    stored = saved.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(stored[: int(kept * len(stored)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(UserError, match=r"cut\.pt: damaged"):
        morphtrain.load(path)
    path.write_bytes(stored + b"more")
    with pytest.raises(UserError, match=r"cut\.pt: damaged"):
        morphtrain.load(path)


@pytest.mark.parametrize("damage", ["bit", "empty", "zeros", "directory", "facts"])
def test_a_damaged_last_one_is_reported_and_the_one_before_used(
    damage: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = bytearray(saved.read_bytes())
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    previous.write_bytes(stored)
    if damage == "directory":
        last.mkdir()
    elif damage == "facts":
        changed(saved, last, lambda content, facts: facts.pop("epoch"))
    else:
        stored[len(stored) // 2] ^= 4
        last.write_bytes({"bit": bytes(stored), "empty": b"", "zeros": bytes(len(stored))}[damage])
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.path == previous
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"resume=auto: {last}: ")
    assert warning.endswith("; going on from previous.pt")
    previous.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=rf"resume=auto: {previous}: damaged"):
        checkpoint.find(tmp_path)


# -- foreign and hostile ones --------------------------------------------------------------------------------------

WHOLE = {
    "text": b"not a checkpoint",
    "html": b"<!doctype html><title>404</title>",
    "nothing": b"",
    "a png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "only the end of an archive": b"PK\x05\x06" + bytes(18),
    "a bare pickle": pickle.dumps({"format": stored_network.FORMAT, "facts": "{}"}),
    "a pickle with code": pickle.dumps(os.system),
    "a gzip file": b"\x1f\x8b" + bytes(100),
}


def saved_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a state dict": lambda: saved_bytes(nn.Linear(2, 2).state_dict()),
    "a whole module": lambda: saved_bytes(nn.Linear(2, 2)),
    "a tensor": lambda: saved_bytes(torch.zeros(2)),
    "a list": lambda: saved_bytes([1, 2]),
    "the old format of torch": lambda: saved_bytes(
        {"format": stored_network.FORMAT}, _use_new_zipfile_serialization=False
    ),
    "another program's checkpoint": lambda: saved_bytes({"state_dict": {}, "epoch": 3, "optimizer": {}}),
    "a path": lambda: saved_bytes({"format": stored_network.FORMAT, "facts": Path("/")}),
    "a number as format": lambda: saved_bytes({"format": 6}),
    "a list as format": lambda: saved_bytes({"format": []}),
    "a zip of something else": lambda: archive({"a.txt": b"text"}),
    "an archive without a pickle": lambda: archive({"archive/version": b"3"}),
    "a truncated pickle": lambda: archive({"archive/data.pkl": b"\x80\x02}", "archive/version": b"3"}),
    "an array of numpy": lambda: archive({"arr_0.npy": b"\x93NUMPY"}),
    "torchscript": lambda: archive({"archive/data.pkl": b"\x80\x02N.", "archive/constants.pkl": b"\x80\x02)."}),
    "many zeros, packed": lambda: archive({"archive/data.pkl": bytes(10**9)}, zipfile.ZIP_DEFLATED),
    "a bytearray by its length": lambda: archive(
        {"archive/data.pkl": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.", "archive/version": b"3"}
    ),
}

Change = Callable[[Content, Content], Any]


def set_at(path: str, value: Any) -> Change:
    """A change of the facts at a dotted path."""

    def change(content: Content, facts: Content) -> None:
        *parents, key = path.split("/")
        for parent in parents:
            facts = facts[parent]
        facts[key] = value

    return change


def expanded(content: Content, facts: Content) -> None:
    """All the entries of a huge tensor in a few bytes."""
    content["model"]["classifier.weight"] = torch.zeros(1).expand(2**17)
    facts["architecture"]["shapes"]["classifier.weight"] = [2**17]


ARCHITECTURE = "architecture"
FACTS = (*stored_network.NETWORK_FACTS, *checkpoint.RUN_FACTS)
CHANGES: dict[str, Change] = {
    **{f"no {key}": (lambda c, f, key=key: c.pop(key)) for key in ("facts", "model", "optimizer", "methods", "parts")},
    **{f"no fact {key}": (lambda c, f, key=key: f.pop(key)) for key in FACTS},
    "facts that are no JSON": lambda c, f: c.update(facts="{"),
    "facts that are a list": lambda c, f: c.update(facts=["x"]),
    "facts nested too deeply": lambda c, f: c.update(facts="[" * 10**5),
    "a state dict of numbers": lambda c, f: c.update(model=dict.fromkeys(c["model"], 3)),
    "another network's weights": lambda c, f: c.update(model=nn.Linear(2, 2).state_dict()),
    "an empty state dict": lambda c, f: c["model"].clear(),
    "an optimizer of nothing": lambda c, f: c.update(optimizer={}),
    "an optimizer of another network": lambda c, f: c["optimizer"]["param_groups"].pop(),
    "a momentum of another shape": lambda c, f: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3, 3)),
    "a network of one's own without keywords": set_at("config/model", {"_target_": "own.Net", "arguments": ["x"]}),
    "a method's state of another kind": lambda c, f: c["methods"].update(prune={"a": 1}),
    "a method's state that is text": lambda c, f: c["methods"].update(prune="x"),
    "a precision of another kind": lambda c, f: c.update(precision=[1]),
    "an epoch in words": set_at("epoch", "three"),
    "a history of numbers": set_at("history", [1, 2]),
    "a history of text": set_at("history", [{"epoch": "one"}]),
    "a ramp without an end": set_at("lr_scale", {"start": 1.0}),
    "no seed": lambda c, f: f["config"].pop("seed"),
    "no model in the config": lambda c, f: f["config"].pop("model"),
    "a model that is a list": set_at("config/model", ["resnet"]),
    "a width in words": set_at("config/model/width", "wide"),
    "a width that is no whole number": set_at("config/model/width", 4.5),
    "a model without a width": lambda c, f: f["config"]["model"].pop("width"),
    "a key that no model has": set_at("config/model/metrics", []),
    "no such norm": set_at("config/norm", {"name": "none such"}),
    "no such memory format": set_at("config/memory_format", "random"),
    "classes in words": set_at("num_classes", "ten"),
    "less than no classes": set_at("num_classes", -1),
    "architecture that is a list": set_at(ARCHITECTURE, []),
    "a path that is not there": set_at(f"{ARCHITECTURE}/widths/nowhere", {"in_channels": 3}),
    "an attribute that is no width": set_at(f"{ARCHITECTURE}/widths/classifier", {"training": 1}),
    "a method for a width": set_at(f"{ARCHITECTURE}/widths/classifier", {"forward": 1}),
    "a width of another kind of layer": set_at(f"{ARCHITECTURE}/widths/classifier", {"num_features": 4}),
    "a width below zero": set_at(f"{ARCHITECTURE}/widths/classifier", {"in_features": -4}),
    "a huge width": set_at(f"{ARCHITECTURE}/widths/classifier", {"in_features": 10**12}),
    "a shape that is text": set_at(f"{ARCHITECTURE}/shapes/classifier.weight", "big"),
    "a shape below zero": set_at(f"{ARCHITECTURE}/shapes/classifier.weight", [-1, 4]),
    "a shape of what is no tensor": set_at(f"{ARCHITECTURE}/shapes/classifier.forward", [1]),
    "no such layer": set_at(f"{ARCHITECTURE}/layers/classifier", {"layer": "evil"}),
    "a list as a layer": set_at(f"{ARCHITECTURE}/layers/classifier", {"layer": []}),
    "a layer without settings": set_at(f"{ARCHITECTURE}/layers/classifier", {"layer": "zero_branch_norm"}),
    "a branch without a norm": set_at(
        f"{ARCHITECTURE}/layers/classifier", {"layer": "zero_branch_norm", "channels": 1, "stride": None}
    ),
    "a layer in place of an attribute": set_at(
        f"{ARCHITECTURE}/layers/training", {"layer": "inserted_layer", "kernel": 3, "norm": True}
    ),
    "a layer at the root": set_at(f"{ARCHITECTURE}/layers/", {"layer": "grown", "in_front": True}),
    "a kernel below zero": set_at(
        f"{ARCHITECTURE}/layers/stages.0.9", {"layer": "inserted_layer", "kernel": -3, "norm": True}
    ),
}
BOMBS: dict[str, Change] = {
    "a view that repeats one value": expanded,
    "a huge shape": set_at(f"{ARCHITECTURE}/shapes/classifier.weight", [10**6, 10**6]),
    "a large shape": set_at(f"{ARCHITECTURE}/shapes/classifier.weight", [10, 10**8]),
    "a huge kernel": set_at(
        f"{ARCHITECTURE}/layers/stages.0.9", {"layer": "inserted_layer", "kernel": 30001, "norm": True}
    ),
    "a wide network": set_at("config/model/width", 10**9),
    "a network of some gigabytes": set_at("config/model/width", 2**12),
    "many stages": set_at("config/model/stages", 10**9),
    "many blocks": set_at("config/model/blocks", 10**9),
    "many layers": set_at("config/model/layers", 10**9),
    "many classes": set_at("num_classes", 10**12),
    "many channels": set_at("in_channels", 10**12),
}


def refusals(path: Path) -> list[str]:
    """What is said of a file by `load`, `resume=` and `architecture=`; an error other than a `UserError` is raised."""
    config = morphtrain.compose(*CONFIG)
    uses: dict[str, Callable[[], Any]] = {
        str(path): lambda: morphtrain.load(path),
        f"resume={path}": lambda: Checkpoint(path, f"resume={path}").restore(config),
        f"architecture={path}": lambda: build_run(
            config, morph=Checkpoint(path, f"architecture={path}").architecture(config)
        ),
    }
    said = []
    for name, use in uses.items():
        try:
            use()
        except UserError as error:
            assert name in str(error)
            assert "\n" not in str(error)
            said.append(str(error))
    return said


@pytest.mark.parametrize("case", [*WHOLE, *ARCHIVES])
def test_a_file_of_something_else_is_refused(case: str, tmp_path: Path) -> None:
    before, began = peak_bytes(), time.perf_counter()
    path = tmp_path / "foreign.pt"
    path.write_bytes(WHOLE[case] if case in WHOLE else ARCHIVES[case]())
    made = time.perf_counter() - began
    said = refusals(path)
    assert len(said) == 3
    assert all("not a checkpoint" in line for line in said)
    assert time.perf_counter() - began - made < 2
    assert case in ARCHIVES or peak_bytes() - before < 2**28


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_with_something_wrong_in_it_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    said = refusals(changed(saved, tmp_path / "wrong.pt", CHANGES[case]))
    assert said, "each of these is wrong for one of the uses at least"


@pytest.mark.parametrize("case", BOMBS)
def test_a_small_file_takes_neither_much_memory_nor_long(case: str, saved: Path, tmp_path: Path) -> None:
    try:
        path = changed(saved, tmp_path / "bomb.pt", BOMBS[case])
    except UserError:  # it cannot even be written
        assert case == "a view that repeats one value"
        content = torch.load(saved, weights_only=True)
        expanded(content, json.loads(content["facts"]))
        path = tmp_path / "bomb.pt"
        torch.save({**content, "format": stored_network.WITHOUT_DIGEST}, path)
    assert path.stat().st_size < 2**18
    before, began = peak_bytes(), time.perf_counter()
    assert refusals(path)
    assert peak_bytes() - before < 2**28
    assert time.perf_counter() - began < 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_all_that_differs_is_named_at_once() -> None:
    usual = asdict(morphtrain.compose())
    other = asdict(morphtrain.compose("optimizer=adamw", "optimizer.lr=0.5", "epochs=3", "clip_norm=1", "device=cpu"))
    assert differences(other, usual) == (
        "clip_norm=1.0 epochs=3 optimizer=adamw",
        "clip_norm=null epochs=60 optimizer=sgd",
    )
    assert differences(usual, usual) == ("", "")
    pruning = asdict(morphtrain.compose("prune=prunetrain"))
    fewer = {k: v for k, v in pruning["prune"].items() if k not in ("lasso_ratio_of", "threshold")}
    older = {**pruning, "prune": fewer}
    added = {"prune.lasso_ratio_of": "initial_norm"}
    threshold = f"prune.threshold={pruning['prune']['threshold']}"
    assert differences(pruning, older, added) == (threshold, "no prune.threshold")
    assert differences(pruning, usual) == ("prune=prunetrain", "prune=none")
