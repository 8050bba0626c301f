"""The entry point `vllm.general_plugins`, which vLLM calls once in each of its processes.

Takes nothing; teaches vLLM to read the config of an exit head, to build its layer, and to draft with it. Draft models
of other kinds are left as they were, but for sampling on CPUs, which is repaired for all (cpu_sampling.py).
"""

ARCHITECTURE = "ExitHeadForCausalLM"


def register() -> None:
    """Register config, architecture and proposer. What this vLLM cannot do is refused when a head is loaded, so that an
    installed plugin stands in nobody's way who serves without one."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .config import ExitHeadConfig
    from .support import found_version, is_tried

    # In this registry, and not only in transformers' AutoConfig, so that the code of a head's folder is not asked for.
    _CONFIG_REGISTRY[ExitHeadConfig.model_type] = ExitHeadConfig
    if not is_tried(found_version()):
        return  # the config refuses; nothing else of an unknown version is touched
    ModelRegistry.register_model(ARCHITECTURE, f"exit_heads_vllm.model:{ARCHITECTURE}")

    from vllm.v1.worker import gpu_model_runner

    from .cpu_sampling import repair
    from .proposer import ChosenProposer
    from .support import adapt_config

    if gpu_model_runner.DraftModelProposer is ChosenProposer:
        return  # vLLM may call this again
    gpu_model_runner.DraftModelProposer = ChosenProposer
    adapt_config()
    repair()
