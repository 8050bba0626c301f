"""Cuts the pocket prompts out of the held-out modules: function heads, docstrings, first lines of files.

`write_prompts` takes the modules of corpus.py and writes prompts/distill.jsonl, prompts/evaluate.jsonl and the licence
notice that the excerpts need. The backbone was trained on none of these modules.
"""

import ast
import itertools
import json
import random
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from .corpus import PYTHON
from .paths import PROMPTS

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
KINDS = ("head", "docstring", "opening")
ROWS = {"distill": 1500, "evaluate": 200}
LONGEST = 480
"""Characters of a prompt; about 160 tokens."""
OPENING_LINES = (3, 5, 8, 12, 16, 20)
LONGEST_DOCSTRING = 12
"""Lines."""
SHORTEST_BODY = 3
"""The fewest lines of a function body: shorter ones leave a backbone nothing to write."""
SEED = 0

Row = dict[str, str]


def write_prompts(modules: dict[str, dict[str, str]]) -> None:
    """Write both prompt files and NOTICE; `modules` is role -> {path: source}."""
    seen: set[str] = set()
    for role in ("evaluate", "distill"):  # a text that occurs in modules of both roles goes to evaluate
        by_kind: dict[str, list[Row]] = defaultdict(list)
        for source, text in modules[role].items():
            for kind, prompt in cut(text):
                if prompt not in seen:
                    seen.add(prompt)
                    by_kind[kind].append({"prompt": prompt, "task": kind, "source": source})
        rows = mixed(by_kind, ROWS[role])
        PROMPTS[role].parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": f"{role}-{n:04d}"} | row, ensure_ascii=False) for n, row in enumerate(rows)]
        PROMPTS[role].write_text("\n".join(lines) + "\n")
        print(f"{role}: {len(rows)} prompts of {len(modules[role])} modules,", {k: len(v) for k, v in by_kind.items()})
    write_notice(PROMPTS["distill"].parent / "NOTICE")


def cut(source: str) -> list[tuple[str, str]]:
    """(kind, prompt) of every prompt that one module gives.

    Each ends before a line break: the backbone's tokenizer makes one token of a line break and the indentation after
    it, so a prompt that ended with a line break would fix that the next line is not indented.
    """
    lines = source.splitlines(keepends=True)
    found = [("opening", text) for text in _openings(lines)]
    for node, before in _functions(source, lines):
        found += _of_function(node, lines, before)
    return [(kind, text.rstrip("\n")) for kind, text in found]


def continuations(source: str) -> dict[str, str]:
    """Prompt of kind `head` -> the module's own text after it."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node, before in _functions(source, lines):
        for kind, text in _of_function(node, lines, before):
            if kind == "head":
                end = node.lineno - 1 + _head(node, lines).count("\n")
                found[text.rstrip("\n")] = "\n" + "".join(lines[end:])
    return found


def _functions(source: str, lines: list[str]) -> Iterator[tuple[Function, str]]:
    """(function, "") of every function of a module, (method, head of its class) of every method of its classes."""
    for node in ast.parse(source).body:
        if isinstance(node, FUNCTIONS):
            yield node, ""
        elif isinstance(node, ast.ClassDef):
            yield from ((child, _head(node, lines)) for child in node.body if isinstance(child, FUNCTIONS))


def _head(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """From the `class` or `def` line through the colon; decorators are left out."""
    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
    while head and (not head[-1].strip() or head[-1].lstrip().startswith(("#", "@"))):  # between head and body
        head.pop()
    return "".join(head)


def _of_function(node: Function, lines: list[str], before: str) -> list[tuple[str, str]]:
    """(kind, prompt): the function's head, and its head with the docstring, both after `before`. [] if its body is too
    short; a prompt that is too long or does not parse is left out."""
    documented = ast.get_docstring(node) is not None
    body = node.body[1:] if documented else node.body
    if not body or _end(body[-1]) - body[0].lineno + 1 < SHORTEST_BODY:
        return []
    head = _head(node, lines)
    found = [("head", before + head)] if head else []
    if documented and _end(node.body[0]) - node.body[0].lineno < LONGEST_DOCSTRING:
        found.append(("docstring", before + "".join(lines[node.lineno - 1 : _end(node.body[0])])))
    indent = " " * node.body[0].col_offset
    return [
        (kind, text) for kind, text in found if text and len(text) <= LONGEST and _is_python(text + indent + "pass\n")
    ]


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _openings(lines: list[str]) -> list[str]:
    """The first lines of a file, cut at several lengths, because a file has only one beginning."""
    found = []
    for count in OPENING_LINES:
        text = "".join(lines[:count])
        if text.strip() and len(text) <= LONGEST and count < len(lines):
            found.append(text)
    return found


def mixed(by_kind: dict[str, list[Row]], count: int) -> list[Row]:
    """Up to `count` rows, alternating between the kinds while each lasts, so that the first k are always balanced."""
    shuffle = random.Random(SEED)
    piles = []
    for kind in KINDS:
        pile = list(by_kind[kind])
        shuffle.shuffle(pile)
        piles.append(_modules_in_turn(pile))
    rows = [row for turn in itertools.zip_longest(*piles) for row in turn if row is not None]
    return rows[:count]


def _modules_in_turn(pile: list[Row]) -> list[Row]:
    """The first row of each module, then the second of each, and so on: else large modules would dominate."""
    turns: Counter[str] = Counter()
    keyed = []
    for row in pile:
        turns[row["source"]] += 1
        keyed.append((turns[row["source"]], row))
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]


NOTICE = """\
distill.jsonl and evaluate.jsonl hold short excerpts (function heads, docstrings, first lines of files) of the
standard library of CPython {version}. Each row names its module in the field `source`; the excerpts were cut at line
ends, methods put behind the head of their class, nothing else in them was changed.

Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved

They are distributed under the PSF License Agreement, version 2, given below as it stands in the file LICENSE
(LICENSE.txt in an installation) of CPython {version}, with the history of the software and the other licenses that it
refers to: https://github.com/python/cpython/blob/v{version}/LICENSE

{licence}"""


def write_notice(path: Path) -> None:
    """Write the notice with the PSF license agreement copied from the standard library's own LICENSE.txt."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text("utf-8")
    begin = text.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    end = text.index("BEOPEN.COM LICENSE AGREEMENT", begin)
    path.write_text(NOTICE.format(version=PYTHON, licence=text[begin:end].strip() + "\n"))
