"""Runs vLLM in its own environment, in one process: takes a job as JSON on stdin, gives JSON on the last line of stdout.

The job: `llm`, keyword arguments of vllm.LLM; `calls`, each with `prompts` (lists of ids, or texts), `params` (one
SamplingParams for all, or a list) and `one_by_one`. Given back for each call: the new ids, their logprobs if asked for, the
steps' draft lengths, and what the counters of speculative decoding grew by; and once, what memory was taken. An error ends
the job with its message.
"""

import json
import os
import resource
import sys
from time import perf_counter

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    try:
        llm = LLM(**{"dtype": "float32", "enforce_eager": True, "disable_log_stats": False} | job["llm"])
    except Exception as error:  # what a user would see
        print("\n" + json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    watch = Watch(llm)
    found = {"memory": watch.memory(), "calls": [watch.call(call) for call in job["calls"]]}
    print("\n" + json.dumps(found))


class Watch:
    """Looks at an LLM from outside: counters, caches, weights."""

    def __init__(self, llm):
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.lengths: list[int] = []
        self.preempted = 0
        inner = self.scheduler.schedule

        def schedule(*args, **kwargs):
            output = inner(*args, **kwargs)
            self.lengths.append(output.num_spec_tokens_to_schedule)
            return output

        self.scheduler.schedule = schedule

    def memory(self) -> dict:
        """Bytes of weights (each storage once), of the KV cache in all and for one block, and of the process."""
        storages = {}
        modules = [self.runner.model, getattr(getattr(self.runner, "drafter", None), "model", None)]
        for module in filter(None, modules):
            tensors = [*module.parameters(), *module.buffers(), getattr(module, "rows_WD", None)]
            for tensor in (t for t in tensors if t is not None):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        config = self.runner.kv_cache_config
        caches = {kv.untyped_storage().data_ptr(): kv.untyped_storage().nbytes() for kv in self.runner.kv_caches}
        return {
            "weights": sum(storages.values()), "kv_blocks": config.num_blocks, "kv_bytes": sum(caches.values()),
            "kv_layers": sum(len(g.layer_names) for g in config.kv_cache_groups),
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip

    def call(self, call: dict) -> dict:
        from vllm import SamplingParams

        params = call["params"]
        params = [SamplingParams(**p) for p in params] if isinstance(params, list) else SamplingParams(**params)
        prompts = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in call["prompts"]]
        before, at = self.counters(), len(self.lengths)
        start = perf_counter()
        if call.get("one_by_one"):
            outputs, rounds = [], []
            for i, prompt in enumerate(prompts):
                earlier = self.counters()
                outputs += self.llm.generate(
                    [prompt], params[i] if isinstance(params, list) else params, use_tqdm=False
                )
                rounds.append(self.counters()["drafts"] - earlier["drafts"])
        else:
            outputs, rounds = self.llm.generate(prompts, params, use_tqdm=False), None
        seconds = perf_counter() - start
        after = self.counters()
        grown = {
            key: [b - a for a, b in zip(before[key] or [0] * len(after[key]), after[key])]
            if isinstance(after[key], list)
            else after[key] - before[key]
            for key in after
        }
        return grown | {
            "ids": [[list(one.token_ids) for one in o.outputs] if len(o.outputs) > 1 else list(o.outputs[0].token_ids)
                    for o in outputs],
            "texts": [o.outputs[0].text for o in outputs],
            "rounds": rounds,
            "seconds": seconds,
            "lengths": self.lengths[at:],
            "cached": [o.num_cached_tokens for o in outputs],
        }  # fmt: skip

    def counters(self) -> dict:
        found = {"drafts": 0, "drafted": 0, "accepted": 0, "by_position": [], "preemptions": 0}
        names = {
            "vllm:spec_decode_num_drafts": "drafts", "vllm:spec_decode_num_draft_tokens": "drafted",
            "vllm:spec_decode_num_accepted_tokens": "accepted", "vllm:num_preemptions": "preemptions",
        }  # fmt: skip
        for metric in self.llm.get_metrics():
            if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
                found["by_position"] = list(metric.values)
            elif metric.name in names:
                found[names[metric.name]] = metric.value
        return found


if __name__ == "__main__":
    main()
