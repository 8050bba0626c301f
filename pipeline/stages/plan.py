"""The stage `plan`: checks the config and prints what a run will need and whether drafting will pay, without a GPU.

Takes configs; reads at most config.json and the headers of weights on this machine, and writes nothing. The formulas
are in planning/ (docs/planning.md).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from ..backbones.gguf_files import config_without_checkpoint, gguf_of
from ..backbones.load import check_exit_layers, head_spec, public_name
from ..backbones.source import load_config, source_of
from ..backbones.weight_files import check_weights
from ..config import Backbone, Config, Distill
from ..errors import UserError
from ..planning import estimate, tables
from ..planning.architecture import Architecture, facts
from ..planning.estimate import Plan
from ..planning.gain import candidates, with_exit_layers
from ..planning.hardware import Layout
from ..training.dataloader import StepBatches


def show(configs: Sequence[Config], varied: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the plan of one config in full, or a row for each of several, which differ in the keys `varied`.

    Raises UserError for what the stages would refuse too.
    """
    plans = [make(config) for config in configs]
    if as_json:
        documents = [p.as_json() for p in plans]
        print(json.dumps(documents if varied else documents[0], indent=1))
    elif varied:
        tables.show([tables.comparison(plans, varied)])
    else:
        (one,) = plans
        if not configs[0].distill.exit_layers:
            print(
                "distill.exit_layers=auto: this is the plan of all candidates; distill and evaluate take one of them\n"
            )
        print("\n".join(tables.opening(one)) + "\n")
        tables.show(tables.full(one))
        print("\n".join(estimate.verdicts(one)))


def make(config: Config) -> Plan:
    """The plan of a config. Raises UserError for a config that the stages would refuse."""
    a = architecture_of(config.backbone, config.distill)
    if not config.distill.exit_layers:  # auto: what the pilot trains and the cache keeps; then distill trains one
        config = with_exit_layers(config, candidates(a.layers))
    check_exit_layers(config.distill.exit_layers, a.layers)
    world = Layout.of(config.machine).processes
    StepBatches(1, config.distill.sequences_per_step, config.distill.max_steps, 0, world_size=world)  # checks
    return estimate.make(config, a)


def architecture_of(backbone: Backbone, distill: Distill | None = None) -> Architecture:
    """The architecture from the checkpoint's config.json; for a well-known backbone that is not on this machine, the
    one shipped with exit-heads. Its exit heads are those of distill.head, layers by default.

    Raises UserError if there is neither, and for heads that such a backbone cannot have."""
    name, distill = backbone.name_or_path, distill or Distill()
    if file := gguf_of(backbone):
        config = config_without_checkpoint(backbone, file)
        return Architecture.of(public_name(backbone), "the header of its file", config, head_spec(distill, config))
    known = facts().get(name)
    try:
        config, source = load_config(backbone, local=known is not None), "its config.json"
        if any(Path(source_of(backbone)).glob("*.safetensors")):  # the weights on this machine decide over the config
            config.tie_word_embeddings = check_weights(backbone).ties_embeddings(config)
    except UserError:
        if known is None:
            raise
        config, source = AutoConfig.for_model(**known), "architecture as shipped with exit-heads"
    return Architecture.of(public_name(backbone), source, config, head_spec(distill, config))
