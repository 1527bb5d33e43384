r"""How texts that users and models wrote are shown: nothing in them is obeyed.

Whatever does not print, or would change what stands beside it (control characters, escape sequences, line breaks, marks
that turn the direction of writing, halves of surrogate pairs), is spelled out: ``\x1b``, ``\n``, ``\u202e``.
"""

MOST = 120  # characters
MOST_OF_KEY = 60  # of them for a task's id or a job's key in a sentence or a title


def legible(text: object, most: int = MOST) -> str:
    """``text`` spelled out on one line; a long one is cut in its middle: of a job's key, id and mode are both seen."""
    text = str(text)
    if len(text) > 2 * most:
        text = text[:most] + text[-most:]  # the middle of which is cut below
    text = "".join(char if char.isprintable() else _spelled(char) for char in text)
    if len(text) <= most:
        return text
    tail = (most - 3) // 3
    return f"{text[: most - 3 - tail]}...{text[len(text) - tail :]}"


def legible_key(key: object) -> str:
    """A task's id or a job's key for a sentence or a title."""
    return legible(key, MOST_OF_KEY)


def spelled(text: str) -> str:
    """A message of ours with others' texts in it, spelled out but for its line breaks and the bytes of file names."""
    return "".join(char if char.isprintable() or char == "\n" or _is_byte(char) else _spelled(char) for char in text)


def _is_byte(char: str) -> bool:
    """Whether ``char`` stands for a byte of a file's name that is no UTF-8, as which a command writes it."""
    return "\udc80" <= char <= "\udcff"


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode()


def plural(n: int, noun: str) -> str:
    """``1 pair``, ``2 pairs``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
