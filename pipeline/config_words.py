"""Words and YAML text become values of the types that the config declares, and text stays as it was typed.

YAML alone would read 2025_11_28 as a number, 12:30 as 750 and no as false. Here every scalar keeps its text until the
type of its key is known: a key that holds text gets that text, a number or a switch is converted or left as it is for
the error that names it. Takes key=value words and YAML files, gives nested dicts for omegaconf. Raises UserError.
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from .errors import UserError

SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")
AUTO = "auto"
"""In place of a list of whole numbers: the empty list, for which the pipeline chooses."""
TAGS = ("str", "int", "float", "bool", "null", "timestamp", "value")
"""The YAML types of a scalar, by the ends of their names."""


class Scalar(str):
    """The text of a YAML scalar. `plain`: it stood there without quotes, so that null means nothing."""

    plain: bool

    @classmethod
    def of(cls, text: str, plain: bool) -> "Scalar":
        scalar = cls(text)
        scalar.plain = plain
        return scalar

    @property
    def is_null(self) -> bool:
        return self.plain and self in NULLS


class _Loader(yaml.SafeLoader):
    """Scalars are Scalars; a key that stands twice in a mapping is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                what = f"the key {key.value} twice" if isinstance(key, yaml.ScalarNode) else "a key that is no word"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag in TAGS:
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_tag}",
        lambda loader, node: Scalar.of(loader.construct_scalar(node), node.style is None),
    )


def read_file(path: Path, kind: type) -> dict[str, Any]:
    """The values of a YAML file, by the types of the dataclass `kind`. A byte-order mark at its start is no part of it.

    Raises UserError for a file that is not there, cannot be read, or is no YAML mapping.
    """
    what = f"--config {path}"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what}: no such file. Start from one in configs/.") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror}. Give a YAML file, see configs/.") from None
    try:
        utf_16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        loaded = _parse(data.decode("utf-16" if utf_16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{what}: not YAML: {_told(error)}") from None
    if loaded is None or (isinstance(loaded, Scalar) and loaded.is_null):
        return {}  # nothing but comments
    if not isinstance(loaded, dict):
        raise UserError(f"{what}: `key: value` lines are needed. See configs/.")
    return typed(loaded, kind)


def read_word(word: str, kind: type) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}, by the types of the dataclass `kind`.

    The value of a text key is what stands behind the first =, as it was typed; a pair of quotes around all of it goes.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} is not key=value. Example: distill.max_steps=200")
    names = key.split(".")
    declared: Any = kind
    for name in names:
        declared = _types(declared).get(name, object)
    if str in (declared, *_choices(declared)):
        value: Any = _unquoted(text)
    else:
        try:
            value = _parse(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word!r} cannot be read: {_told(error)}") from None
    tree = typed(value, declared)
    for name in reversed(names):
        tree = {name: tree}
    return tree


def variations(word: str) -> list[str]:
    """key=[a,b] -> key=a, key=b, each value as it was typed. Raises UserError for a word that is no list."""
    key, equals, values = word.partition("=")
    try:
        node = yaml.compose(values, yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    if not key or not equals or not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(f"--vary {word}: a key and a list of values is needed, such as machine.nodes=[1,2,4]")
    return [f"{key}={values[entry.start_mark.index : entry.end_mark.index]}" for entry in node.value]


def typed(value: Any, kind: Any) -> Any:
    """What _parse gave, with each scalar in the type that `kind` declares for it; `object`: not declared at all."""
    if isinstance(value, dict):
        types = _types(kind)
        return {str(key): typed(entry, types.get(key, object)) for key, entry in value.items()}
    if isinstance(value, list):
        entry_kind = get_args(kind)[0] if get_origin(kind) is list else object
        return [typed(entry, entry_kind) for entry in value]
    if not isinstance(value, Scalar):
        return value  # of an explicit tag, such as !!binary
    if kind == list[int] and value == AUTO:
        return []
    choices = _choices(kind)
    if value.is_null and (value == "" or type(None) in choices or str not in (kind, *choices)):
        return None
    for convert in (int, float, bool):
        if convert in (kind, *choices):
            return _converted(value, convert)
    if kind is Any and value.plain and value.isdecimal():  # a token's id or its text: quotes make a number a text
        return int(value)
    return str(value)


def refuse_outside(value: Any, where: str, key: str = "") -> None:
    """Raises UserError for `${...}` that is no reference to another key, such as `${oc.env:HOME}`.

    What a config says is written into run folders, W&B and published heads; what it reads from elsewhere would be too.
    """
    if isinstance(value, dict):
        for name, entry in value.items():
            refuse_outside(name, where, key or str(name))
            refuse_outside(entry, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            refuse_outside(entry, where, f"{key}[{i}]")
    elif isinstance(value, str):
        place = where if where.partition("=")[0] == key else f"{where}: {key}={value}"
        if value == "???":
            raise UserError(f"{place}: omegaconf takes ??? for a value that is missing; write another one")
        rest, found = str(value), 1
        while found:  # references may be nested: ${a.${b}}
            rest, found = re.subn(r"\$\{\s*[\w.\[\]-]+\s*\}", "x", rest)
        if "${" in rest:
            raise UserError(
                f"{place}: only references to other keys, such as ${{run.name}}, are resolved. Nothing is read from "
                "the environment, as all values of a config may be published with a head: write the value itself, and "
                "leave tokens and keys in HF_TOKEN, WANDB_API_KEY or OPENAI_API_KEY"
            )


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


def _unquoted(text: str) -> Scalar:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            parsed = _parse(text)
        except yaml.YAMLError:
            parsed = None
        if isinstance(parsed, Scalar) and not parsed.plain:
            return parsed
    return Scalar.of(text, plain=True)


def _types(kind: Any) -> dict[str, Any]:
    return {f.name: f.type for f in fields(kind)} if is_dataclass(kind) else {}


def _choices(kind: Any) -> tuple[Any, ...]:
    """(int, None) of `int | None`; nothing of a type that is not optional."""
    return get_args(kind) if type(None) in get_args(kind) else ()


def _converted(text: Scalar, kind: type) -> Any:
    """The number or switch that the text is, else the text: omegaconf then says what is wrong with it."""
    try:
        if kind is bool:
            return SWITCHES.get(text.lower(), str(text))
        if kind is int:
            return int(text, 0 if re.match(r"[-+]?0[xob]", text, re.IGNORECASE) else 10)
        special = re.fullmatch(r"([-+]?)\.(inf|nan)", text, re.IGNORECASE)
        return float(special[1] + special[2] if special else text)
    except ValueError:
        return str(text)


def _told(error: yaml.YAMLError) -> str:
    """In one line: where, and what is wrong."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
