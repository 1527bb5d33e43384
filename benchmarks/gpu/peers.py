"""transformers' own ``generate`` and ``generate_batch`` on the same random weights, in the same run as ours."""

from collections.abc import Callable

from decode import Run, generate_batch_run, generate_run, measure, ours_run

from gpu.lab import Lab, Row


def run(lab: Lab, rows: list[Row]) -> None:
    prompt, count, rounds = (16, 4, 1) if lab.tiny else (64, 48, 2)
    batches = (1, 2) if lab.tiny else (1, 16, 64)
    plain = lab.plain_model()
    makers: dict[str, Callable[[], Run]] = {
        "generate": lambda: generate_run(plain),
        "generate_batch": lambda: generate_batch_run(plain, prompt + count + 1, max(batches)),
    }
    ours = ours_run(lab.model(), prompt + count + 1, max(batches))
    failed = []
    for name, make in makers.items():
        try:
            for batch in batches:
                rows.append({"peer": name} | measure({"ours": ours, name: make()}, batch, prompt, count, rounds))
        except Exception as error:  # theirs: the other one is still measured
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            rows.append({"peer": name, "error": failed[-1]})
    if failed:
        raise RuntimeError("; ".join(failed))
