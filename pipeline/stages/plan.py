"""What a run will need and whether it will pay, before any GPU is asked for: checks the config, prints the plan.

Takes configs and nothing else; writes nothing. Knows no formula: those are in planning/ (docs/planning.md).
"""

import json
from collections.abc import Sequence

from transformers import AutoConfig

from ..backbones.load import check_exit_layers, load_config, public_name
from ..config import Backbone, Config
from ..errors import UserError
from ..planning import estimate, tables
from ..planning.architecture import Architecture, facts
from ..planning.estimate import Plan
from ..planning.hardware import Layout
from ..training.dataloader import StepBatches


def show(configs: Sequence[Config], varied: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the plan of one config in full, or of several, which differ in the keys `varied`, a row each.

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
        print("\n".join(tables.opening(one)) + "\n")
        tables.show(tables.full(one))
        print("\n".join(estimate.verdicts(one)))


def make(config: Config) -> Plan:
    """The plan of a config that was found right."""
    a = architecture_of(config.backbone)
    check_exit_layers(config.distill.exit_layers, a.layers)
    world = Layout.of(config.machine).processes
    StepBatches(1, config.distill.sequences_per_step, config.distill.max_steps, 0, world_size=world)  # checks
    return estimate.make(config, a)


def architecture_of(backbone: Backbone) -> Architecture:
    """From the checkpoint's config.json; where a well-known backbone's is not on this machine, as shipped with us."""
    name = backbone.name_or_path
    known = facts().get(name)
    try:
        config, source = load_config(backbone, local=known is not None), "its config.json"
    except UserError:
        if known is None:
            raise
        config, source = AutoConfig.for_model(**known), "architecture as shipped with exit-heads"
    return Architecture.of(public_name(backbone), source, config)
