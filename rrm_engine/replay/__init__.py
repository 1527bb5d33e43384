"""Replay of a fixed graph: real forwards, every node's tokens forced, so that only time and memory can differ.

A graph file is JSON lines, one graph a line::

    {"id": "two", "seed": 7, "shared_prefix": 32, "nodes": {
      "root":   {"prompt": 20, "steps": [{"decode": 30}, {"child": "root.a"}, {"decode": 9}, {"child": "root.b"},
                                         {"await": ["root.a", "root.b"]}, {"append": 12, "of": "root.a"},
                                         {"append": 12, "of": "root.b"}, {"append": 5}, {"decode": 40}]},
      "root.a": {"prompt": 15, "steps": [{"decode": 90}]},
      "root.b": {"prompt": 15, "steps": [{"decode": 60}], "fork": true, "after": ["root.a"]}}}

Tokens are given as a count, drawn from the graph's ``seed``, or as a list of token ids.

- ``shared_prefix`` (default 0): what the context of every node begins with, the system prompt.
- ``prompt``: what follows it. With ``"fork": true`` a child's context is not the shared prefix and its prompt, but its
  parent's whole context up to the ``child`` step and its prompt.
- ``steps``: ``decode`` samples tokens; ``child`` starts a node, whose prefill is in the next step; ``await`` pauses
  until the named children have ended; ``append`` puts tokens (conclusions) after those there are. The first and the
  last step decode, and so does something after every ``append``.
- ``of``: the child, awaited before, whose conclusion an ``append`` carries. Its tokens are the child's own, a count
  takes the last ones that it decodes; policies that splice attach their KV, the last one's excepted. Without ``of`` an
  ``append`` is text to all of them.
- ``after`` (default none): nodes that have to end before this one starts.

A node that no ``child`` step names is a root and starts by itself. A graph has its answer when all roots have ended.
"""
