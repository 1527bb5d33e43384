r"""The text of a JSON string, LaTeX that was written into it unescaped kept.

``\times`` is valid JSON: a TAB and "imes". So an escape before letters is LaTeX where they make a command, and where a
command could also be a line break and a word ("or\nless", "\nu = 3"), by what stands around it.
"""

import re
from bisect import bisect_left

QUOTES = "\"'“”„‘’"  # noqa: RUF001

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|[\s\S]|\Z)")
_SIMPLE = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

# The commands of LaTeX, amsmath and amssymb that begin with t, r and n, and a few that people define.
_COMMANDS = (
    "tag|tan|tanh|tau|tbinom|text[a-z]*|tfrac|therefore|theta|thickapprox|thicksim|thinspace|tilde|times|tiny|to|top|"
    "triangle[a-z]*|tt|twohead[a-z]*|"
    "raggedright|raise|rangle|rank|rbrace|rbrack|rceil|ref|rfloor|rgroup|rho|right[a-z]*|risingdotseq|rm|rmoustache|"
    "root|rq|rtimes|rule|rvert|rVert|"
    "nabla|natural|ncong|nearrow|neg|neq|newcommand|newline|ngeq[a-z]*|ngtr|nicefrac|n[lLrR](?:eft|ight)[a-z]*arrow|"
    "nleq[a-z]*|nobreak[a-z]*|nolimits|nonumber|norm|normal[a-z]*|not|notag|notin|notni|nprec[a-z]*|nshort[a-z]*|"
    "nsub[a-z]*|nsucc[a-z]*|nsup[a-z]*|ntriangle[a-z]*|null|n[vV][dD]ash|nwarrow"
)
_COMMAND = re.compile(rf"[bf][A-Za-z]|(?:{_COMMANDS})(?![A-Za-z])")  # no text has \b or \f before a letter
_AMBIGUOUS = re.compile(r"(ne|ni|nu)(?![A-Za-z])|n(?:exists|less|mid|parallel|sim)(?![A-Za-z])")
_RAW = re.compile(r"(?<!\\)(?:\\\\)*\\(?:[bf][A-Za-z]|[ac-eg-mo-qsv-zA-Z]|u(?![0-9a-fA-F]{4})[a-z])")  # no JSON
_ESCAPED = re.compile(r"(?<!\\)(?:\\\\)+(?:[A-Za-z]{2}|\\\\)")
_FORMULA_SIGN = re.compile(r"(?<!\\)\\+[()\[\]$]|\$\$?")
_LOOK_BACK = 80
_ASSIGNED = re.compile(r"\s{0,9}[=:]")


def unescape(raw: str, repairs: set[str]) -> str:
    """The text that ``raw``, what stands between the quotes, spells. Adds to ``repairs``."""
    escaped = _ESCAPED.search(raw) is not None
    formulas = _formulas(raw)
    is_raw = not escaped and _RAW.search(raw) is not None

    def replace(found: re.Match[str]) -> str:
        code = found[1]
        if len(code) == 5:
            return chr(int(code[1:], 16))
        if code in ("b", "f", "n", "r", "t") and _is_latex(raw, found.start(), escaped, formulas):
            repairs.add("latex_escape")
            return "\\" + code
        if code == "\\" and is_raw:  # a line break of LaTeX
            repairs.add("latex_escape")
            return "\\\\"
        if code in _SIMPLE:
            return _SIMPLE[code]
        repairs.add("bad_escape")
        return code if code in QUOTES else "\\" + code

    text = _ESCAPE.sub(replace, raw)
    # Halves of a surrogate pair join; a half without its partner could not be tokenised.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_latex(raw: str, at: int, escaped: bool, formulas: list[tuple[int, bool]]) -> bool:
    """Whether the backslash at ``at``, before one of b, f, n, r and t, begins a command.

    ``escaped``: commands elsewhere in the string are; ``formulas``: where a formula begins (True) or ends.
    """
    if _COMMAND.match(raw, at + 1):
        return True
    command = _AMBIGUOUS.match(raw, at + 1)
    if command is None:
        return False
    edge = bisect_left(formulas, (at,))
    if edge and formulas[edge - 1][1]:
        return True
    before = raw[max(0, at - _LOOK_BACK) : at]
    if not before or before.isspace():
        return True
    if escaped or (before.endswith("\\n") and not before.endswith("\\\\n")):
        return False  # a model that escapes elsewhere means the line break
    last = before.rstrip()[-1]
    if last.isalnum() or last in "}'":
        alone = command[1] is not None and not _ASSIGNED.match(raw, command.end())
        return before[-1].isspace() or alone
    return last in "=+-*/^_({[<>&|~"


def _formulas(raw: str) -> list[tuple[int, bool]]:
    edges, inside = [], False
    for sign in _FORMULA_SIGN.finditer(raw):
        if sign[0][0] == "$":
            inside = not inside
        elif sign[0][-1] != "$":  # "\\$" is money
            inside = sign[0][-1] in "(["
        edges.append((sign.start(), inside))
    return edges
