"""One pass over a source: from rows to distinct Prompts, with counts of the rows left out.

Takes an Origin and the prompts seen before it; gives Prompts one after another, and counts. `bad_rows` decides whether
unusable rows are an error or are left out.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from ..config import Prompts
from ..errors import UserError
from .origins import Origin, rows_of, section_of
from .prompt import Prompt, Role, joined, normal_form, prompt_id
from .rows import Columns, task_of

SHOWN = 3
"""Number of unusable rows that a message names."""


class Reading:
    """An iterable of Prompts, for one pass, with counts afterwards. Raises UserError for unusable rows at the end."""

    def __init__(self, origin: Origin, settings: Prompts, role: Role, seen: set[bytes] | None):
        self.origin, self.role = origin, role
        self.section, self.stop = section_of(settings), settings.bad_rows == "stop"
        self.seen = seen
        """Digests of the normal forms of all prompts so far, from other sources too; None keeps duplicates."""
        self.columns = Columns(origin.source.column)
        self.rows = self.bad = self.blank = self.repeated = 0
        self.first_bad: list[str] = []

    def __iter__(self) -> Iterator[Prompt]:
        for place, row in rows_of(self.origin, self.role):
            self.rows += 1
            try:
                prompt = self._prompt(row)
            except ValueError as error:
                self.bad += 1
                if len(self.first_bad) < SHOWN:
                    self.first_bad.append(f"{place}: {error}")
                continue
            if prompt is None:
                self.blank += 1
            elif self._is_new(prompt):
                yield prompt
            else:
                self.repeated += 1
        self._check()

    def say(self) -> None:
        """Print one line for each reason for which rows were left out."""
        label = self.origin.label
        if self.bad:
            print(f"{self.section}.bad_rows=skip: {self.bad} of {self.rows} rows of {self.origin.name} are left out "
                  f"({self._bad_rows()})")  # fmt: skip
        if self.columns.marked:
            print(f"{label}: marks of editors (byte order marks, NULs, zero-width spaces, carriage returns) are "
                  f"taken out of {self.columns.marked} of {self.rows} rows")  # fmt: skip
        if self.blank:
            column = self.columns.text or "conversation"
            print(f"{label}: {self.blank} of {self.rows} rows have an empty {column} and are skipped")
        if self.repeated:
            print(f"{label}: {self.repeated} of {self.rows} rows repeat an earlier prompt and are skipped")

    def _prompt(self, row: Any) -> Prompt | None:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise ValueError('an object such as {"prompt": "..."} is needed')
        said = self.columns.said(row)
        if said is None:
            return None
        task = self.origin.source.task or task_of(row)
        name = prompt_id(said.turns, said.system)  # raises ValueError for a lone surrogate
        return Prompt(name, said.turns, task, system=said.system, originals=said.originals, source=self.origin.name)

    def _is_new(self, prompt: Prompt) -> bool:
        if self.seen is None:
            return True
        form = joined(tuple(normal_form(turn) for turn in prompt.turns))
        digest = hashlib.sha256(form.encode()).digest()[:16]
        if digest in self.seen:
            return False
        self.seen.add(digest)
        return True

    def _check(self) -> None:
        label = self.origin.label
        if not self.rows:
            raise UserError(f"{label}: holds no prompts")
        if self.columns.met and not self.columns.found:
            raise UserError(
                f"{self.origin.key}.column={self.columns.wanted or 'null'}: not a column of {self.origin.source.path}; "
                f"these are there: {', '.join(self.columns.met)}"
            )
        if self.bad and (self.stop or self.bad == self.rows):
            remedy = f", or set {self.section}.bad_rows=skip to go on without them" if self.bad < self.rows else ""
            raise UserError(
                f"{label}: {self._bad_rows()}: {self.bad} of {self.rows} rows cannot be used. "
                f"Mend them or take them out{remedy}."
            )
        if self.blank == self.rows - self.bad:
            raise UserError(f"{label}: every prompt is empty")

    def _bad_rows(self) -> str:
        return "; ".join(self.first_bad) + (" ..." if self.bad > len(self.first_bad) else "")


def read(origin: Origin, settings: Prompts, role: Role, seen: set[bytes]) -> list[Prompt]:
    """The distinct prompts of the source that are not in `seen`, in order; prints what was left out.

    Raises UserError for a source that cannot be read, and for unusable rows unless they are to be left out.
    """
    reading = Reading(origin, settings, role, seen)
    found = list(reading)
    reading.say()
    return found
