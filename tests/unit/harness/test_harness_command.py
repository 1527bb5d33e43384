"""``python -m rrm_engine.harness`` hands over to the harness's own command line."""

import sys

import pytest

from rrm_engine.harness.cli import main


def test_without_the_harness_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rrm_engine.harness.cli.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["harness", "--model", "rrm"])
    assert main() == 2
    err = capsys.readouterr().err
    assert err == "error: lm-evaluation-harness is not installed: pip install 'rrm-engine[lm-eval]'\n"


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_its_own_help(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--model rrm --model_args" in capsys.readouterr().out
