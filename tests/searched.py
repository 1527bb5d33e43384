"""How long Hypothesis looks: as long as said in the suite, as long as its profile says in a search (``conftest``)."""

from hypothesis import HealthCheck, Phase, settings


def searched(examples: int) -> settings:
    """At least so many examples."""
    return settings(max_examples=max(examples, settings.default.max_examples))


# For negative controls: the first failure is all that is asked for, and it is the same every time.
CONTROL = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=20_000,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
)
