"""The list of keys that `exit-heads VERB --help` prints, from the dataclasses of config.py."""

from dataclasses import fields, is_dataclass

from .config import Config, to_dict
from .config_paths import entries_of


def help_text(sections: list[str]) -> str:
    """`key  default  sentence` of every key in these sections, for --help."""
    lines = []
    defaults = to_dict(Config())

    def walk(kind: type, values: dict, prefix: str) -> None:
        for f in fields(kind):
            if is_dataclass(f.type):
                if prefix or f.name in sections:
                    walk(f.type, values[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
            elif prefix or f.name in sections:
                value = "null" if values[f.name] is None else values[f.name]
                lines.append(f"  {prefix + f.name}={value}\n      {f.metadata['help']}")
                for entry in entries_of(f.type):
                    walk(entry, to_dict(entry), f"{prefix}{f.name}[].")

    walk(Config, defaults, "")
    return "\n".join(lines)
