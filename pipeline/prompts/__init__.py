"""Prompt sets: where they come from, who may see which, and their token ids.

Takes a `prompts` section of the config, gives Prompts in a fixed order, their source record (public name,
sha256 or revision, licence) and their ids with or without a chat template; each prompt belongs to distill or
to evaluate, never to both. Knows nothing of models or of what is done with the prompts. What others use is named
here; docs/prompts.md says what can be read and what is done with it.
"""

from .ids import Encoded, contexts, encode, encoding, fitting
from .prompt import SPEC_BENCH, Prompt, Role, count_sources, count_tasks, normal_form
from .records import pins, source_pins, source_record
from .sets import evaluation_prompts, evaluation_settings, load_prompts, training_prompts

__all__ = [
    "SPEC_BENCH",
    "Encoded",
    "Prompt",
    "Role",
    "contexts",
    "count_sources",
    "count_tasks",
    "encode",
    "encoding",
    "evaluation_prompts",
    "evaluation_settings",
    "fitting",
    "load_prompts",
    "normal_form",
    "pins",
    "source_pins",
    "source_record",
    "training_prompts",
]
