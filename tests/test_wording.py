"""One channel, two channels; null as it is typed."""

from __future__ import annotations

import pytest

from morphtrain.errors import UserError
from morphtrain.grow.kept import Growth
from morphtrain.prune.reconfigure import Reconfiguration
from morphtrain.schema import check
from morphtrain.wording import counted


def test_one_is_no_plural() -> None:
    assert [counted(n, "epoch") for n in (0, 1, 2, 0.5, 123456789)] == [
        *("0 epochs", "1 epoch", "2 epochs", "0.5 epochs", "123456789 epochs")
    ]
    assert Reconfiguration({"a": (3, 2)}, gated=["b"]).summary() == "removed 1 channel of 1 space; gated 1 convolution"
    assert Reconfiguration({"a": (3, 2), "b": (4, 1)}).summary() == "removed 4 channels of 2 spaces"
    assert Growth({"a": (2, 3)}).summary() == "widened 1 space by 1 channel"


@pytest.mark.parametrize(("value", "shown"), [(None, "null"), (True, "true"), (0, "0"), (1.5, "1.5"), ("None", "None")])
def test_a_refused_value_is_shown_as_it_is_typed(value: object, shown: str) -> None:
    with pytest.raises(UserError, match=f"^seed={shown}: must be another"):
        check(False, "seed", value, "another")
