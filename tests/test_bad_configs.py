"""Every key of every option with every kind of nonsense: refused in a line that names it, or known to be meant.

    pytest -m slow -s tests/test_bad_configs.py     # prints the counts

`test_errors.py` asks the command itself. Here the config is composed once an option, so that all pairs can be tried.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from conftest import Answer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from test_config import OPTION_FILES, REQUIRED, composed

from morphtrain import config_errors, schema
from morphtrain.errors import UserError
from morphtrain.experiment.sweeper import ArmsSweeper
from morphtrain.sweep import sweeper as study_sweeper

NONSENSE: dict[str, Any] = {
    "text": "much",
    "list": [1],
    "node": {"a": 1},
    "true": True,
    "negative": -1,
    "infinite": math.inf,
    "not a number": math.nan,
    "huge": 10**400,
    "empty": "",
    "null": None,
}
CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in OPTION_FILES
    if path.stem in schema.OPTIONS[path.parent.name] and path.stem != "custom"
]

# What is accepted, each looked at by hand. Any text may be a path or a name, and so may a number, written out.
TEXTS = {
    "architecture",
    *(f"data.{key}" for key in ("root", "subset", "revision", "image", "label")),
    *(f"data.{key}" for key in ("train_split", "val_split", "test_split")),
    "model.weights",
    "resume",
    "tracking.experiment",
    "tracking.entity",
    "tracking.project",
    "tracking.parent_run_id",
    "tracking.uri",
}
ACCEPTED = {
    **dict.fromkeys(("text", "negative", "infinite", "not a number", "huge"), TEXTS),
    "true": TEXTS
    | {f"data.{key}" for key in ("download", "flip", "in_memory")}
    | {"grow.inherit", "model.batch_norm", "model.downsample", "norm.mean_only", "optimizer.fused"}
    | {"optimizer.nesterov", "precision.keep_batchnorm_fp32"},
    "list": {"grow.at_epochs", "grow.where", "prune.ignore"},
    "node": {"model.options"},
    "empty": {"tracking.parent_run_id", "tracking.uri"},
    "null": {
        *("architecture", "chosen", "clip_norm", "data.train_samples", "ema", "model.dropout", "model.weights"),
        *("processes", "resume_schedule", "stop_at", "timing.cores", "trial"),
        *(f"data.{key}" for key in ("subset", "revision", "image", "label", "test_split")),
        *("batch_policy.budget", "batch_policy.max_batch_size", "batch_policy.max_micro_batch"),
        *("grow.max_macs", "grow.max_params", "grow.patience", "prune.stable", "prune.stop_epoch", "prune.strength"),
        *("timing.profile", "timing.target_accuracy"),
        *("tracking.entity", "tracking.mode", "tracking.parent_run_id", "tracking.uri"),
    },
}
# Keys whose nonsense is found by what it does to another key, which the message names.
ELSEWHERE = {("model.bottleneck", "true")}


def keys_of(choice: str, config: DictConfig) -> list[str]:
    group = choice.partition("=")[0]
    top = [key for key in map(str, config) if key not in schema.OPTIONS] if choice == CHOICES[0] else []
    return [*top, *(f"{group}.{key}" for key in map(str, config[group]) if key not in ("name", "source"))]


def refusal(config: DictConfig, key: str, value: Any) -> str | None:
    """What is said about a value; None if it is accepted."""
    changed = config.copy()
    with open_dict(changed):
        OmegaConf.update(changed, key, value, merge=False)
    try:
        schema.parse(changed)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_nonsense_is_refused_by_name_or_meant() -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for choice in CHOICES:
        config = composed(choice, *REQUIRED.get(choice, []))
        for key in keys_of(choice, config):
            for kind, value in NONSENSE.items():
                said = refusal(config, key, value)
                counts["accepted" if said is None else "refused"] += 1
                known = key in ACCEPTED[kind] or said is not None
                named = said is None or (said.startswith((f"{key}=", f"{key}:", f"{key}[")) and "\n" not in said)
                if not (known and (named or (key, kind) in ELSEWHERE)):
                    wrong.append((choice, key, kind, said))
    print(dict(counts))
    assert not wrong
    assert counts["refused"] > 1000


@pytest.mark.slow
def test_misspelt_keys_are_answered_with_the_right_one() -> None:
    asked, wrong = 0, []
    for choice in CHOICES:
        config = composed(choice, *REQUIRED.get(choice, []))
        for key in keys_of(choice, config):
            misspelt = f"{key[:-1]}{key[-1]}{key[-1]}x"
            with pytest.raises(HydraException) as refused:
                composed(choice, *REQUIRED.get(choice, []), f"{misspelt}=1")
            said = config_errors.one_line(refused.value)
            asked += 1
            if said is None or not said.startswith(f"{misspelt}=1: ") or key not in said or "\n" in said:
                wrong.append((choice, key, said))
    print(f"{asked} misspelt keys")
    assert not wrong


# The keys of the two sweepers, and the shortest command that reads them.
SWEEPERS = {
    "experiment": ["+experiment=lasso_ratio"],
    "morphtrain": ["-m", "hydra/sweeper=morphtrain", "model.width=4,6"],
}
PROSE = {"thesis", "claim", "limits"}
ACCEPTED_BY_SWEEPERS = {
    **dict.fromkeys(("text", "negative", "infinite", "huge"), PROSE | {"study_name"}),
    "true": PROSE | {"study_name", "inverse", "repeat"},
    "empty": PROSE,
    "null": {"x", "y", "baseline", "min_accuracy", "custom_search_space"},
}
NAN_IS_NO_NAN = "'hydra.sweeper' must be configured before the sweep starts"  # Hydra compares the config with itself


def as_typed(value: Any) -> str:
    return "''" if value == "" else "null" if value is None else str(value).replace("'", "")


@pytest.mark.slow
@pytest.mark.parametrize("sweeper", SWEEPERS)
def test_nonsense_is_refused_by_sweepers_too(sweeper: str, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(*_: Any, **__: Any) -> None:
        raise SystemExit("accepted")

    monkeypatch.setattr(ArmsSweeper, "_settle_declaration", accept)  # the first step that keeps anything
    monkeypatch.setattr(study_sweeper, "SharedStudy", accept)
    keys = [key for key in OmegaConf.load(schema.CONF / f"hydra/sweeper/{sweeper}.yaml") if key != "defaults"]
    wrong, refused = [], 0
    for key in keys[1:]:  # after _target_
        for kind, value in NONSENSE.items():
            said = answer("tracking=none", *SWEEPERS[sweeper], f"hydra.sweeper.{key}={as_typed(value)}")
            refused += said != "accepted"
            names = (f"hydra.sweeper.{key}=", *(["size="] if key == "size" else []))  # the group that sets it
            named = said.startswith(names) and "\n" not in said
            hydras = kind == "not a number" and said.startswith(NAN_IS_NO_NAN)
            meant = said == "accepted" and key in ACCEPTED_BY_SWEEPERS.get(kind, ())
            if not (named or hydras or meant):
                wrong.append((key, kind, said))
    assert not wrong
    assert refused > 80
