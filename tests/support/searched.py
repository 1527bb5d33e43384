"""What Hypothesis looks at: the same examples every time and everywhere, or, in a search, new ones and many."""

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}  # a busy machine is no failure
# For negative controls: the first failure is all that is asked for.
CONTROL = settings(
    derandomize=True,
    max_examples=20_000,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
    **UNTIMED,
)


class SameEverywhere(providers.HypothesisProvider):
    """Without the constants of the modules that are loaded, for these are others where Triton is missing."""

    _local_constants = Constants()


def load_profiles() -> None:
    """The suite's, and that of a search: scripts/test --hypothesis-profile=search -k ends_and."""
    providers.AVAILABLE_PROVIDERS["hypothesis"] = SameEverywhere
    settings.register_profile("suite", derandomize=True, **UNTIMED)
    settings.register_profile("search", max_examples=100_000, **UNTIMED)
    settings.load_profile("suite")


def searched(examples: int) -> settings:
    """At least so many examples, more in a search."""
    assert settings.default is not None
    return settings(max_examples=max(examples, settings.default.max_examples))
