"""Settings as asked and as a run uses them."""

from dataclasses import asdict, fields
from typing import Any

import pytest
from lab import Lab

from rrm_engine.bench.cli import drift
from rrm_engine.config import EngineConfig, Resolved, RunConfig, ServersConfig
from rrm_engine.errors import RrmError

DECIDED = {
    kind: {name for base in kind.__mro__ if issubclass(base, Resolved) for name in base.__annotations__}
    for kind in (EngineConfig, ServersConfig)
}

TEXTS = {"prompt_style", "dtype", "device"}  # any will do
LATER = {"wait_policy"}  # what its auto means is decided while a run goes on


def test_nothing_that_was_decided_is_left_open(lab: Lab) -> None:
    asked = RunConfig(prompt_style=str(lab.style))
    used = lab.solver(**asdict(asked)).resolved
    assert type(used) is EngineConfig
    assert {f.name for f in fields(used)} == {f.name for f in fields(RunConfig)}, "recorded under the same names"
    for name in DECIDED[EngineConfig]:
        value = getattr(used, name)
        assert value is not None and (value != "auto" or name in LATER), name
    same = {f.name for f in fields(RunConfig)} - DECIDED[EngineConfig]
    assert all(getattr(used, name) == getattr(asked, name) for name in same)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in sorted(DECIDED[EngineConfig])
        for value in (None, "auto", "maybe")
        if value is None or (name not in TEXTS and (name not in LATER or value != "auto"))
    ],
)
def test_what_is_left_open_is_refused(lab: Lab, name: str, value: Any) -> None:
    used = asdict(lab.solver().resolved)
    with pytest.raises(RrmError, match=f"--{name.replace('_', '-')} takes"):
        EngineConfig(**{**used, name: value})


def test_a_run_whose_record_leaves_settings_open_can_be_resumed(lab: Lab) -> None:
    """Older versions recorded some of them as they were asked."""
    used = lab.solver().resolved
    assert not drift({"device": "auto", "placement": "auto", "attention": "auto", "host_kv_blocks": None}, used)
    assert drift({"attention": "flash", "step_tokens": None}, used) == [
        f"--attention comes out as {used.attention}, was flash",
        f"--step-tokens comes out as {used.step_tokens}, was default",
    ]
