"""Runs vLLM in its own environment, in one process: a line of JSON on stdin, a line of JSON on stdout, and so on.

The first line holds keyword arguments of vllm.LLM; what comes back is the memory that was taken, or the error that a
user would see. Each further line is a call: `prompts` (lists of ids), `params` (one SamplingParams for all, or a
list), and if wanted `one_by_one`, `lengths` (draft lengths that its steps take in turn), `swap` (the first two
shallow layers change places in the drafter from here on), `fresh` (the scheduler's rule forgets all) and `by_batch`
(draft lengths by number of requests). What comes back is ids and texts, what vLLM's own counters grew by, the draft
length of every step, and of each step a row: requests, drafts of each that it verified (-1: they differ, or prompts
are read), drafts that it made, tokens, seconds and the process's seconds since the end of the step before. vLLM
writes to stdout too, so answers begin with MARK.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from time import perf_counter, process_time

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
DEFAULTS = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, "generation_config": "vllm"}
MARK = "@answer "
COUNTERS = {
    "vllm:spec_decode_num_drafts": "rounds",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "by_position",
    "vllm:num_preemptions": "preemptions",
}


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    from vllm import LLM

    try:
        served = Served(LLM(**DEFAULTS | asked))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"memory": served.memory(), "scheduler": type(served.scheduler).__name__})
    for line in sys.stdin:
        answer(served.call(**json.loads(line)))


def answer(found: dict) -> None:
    print(f"\n{MARK}{json.dumps(found)}", flush=True)


class Served:
    """An LLM, and a look into it."""

    def __init__(self, llm):
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler, self.lengths = core.scheduler, []
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.log, self.mark, self.verified = [], (perf_counter(), process_time()), -1
        schedule, update = self.scheduler.schedule, self.scheduler.update_from_output

        def scheduling(*args, **kwargs):
            output = schedule(*args, **kwargs)
            if output.num_scheduled_tokens:
                self.lengths.append(output.num_spec_tokens_to_schedule)
            return output

        def updating(output, *args, **kwargs):
            found, now = update(output, *args, **kwargs), (perf_counter(), process_time())
            counts = output.num_scheduled_tokens
            drafts = {n: len(output.scheduled_spec_decode_tokens.get(r, ())) for r, n in counts.items()}
            verified = set(drafts.values()) if all(n == 1 + k for n, k in drafts.items()) else {-1}
            tokens = sum(len(one.new_token_ids) for group in found.values() for one in group.outputs)
            if counts:
                self.log.append([len(counts), verified.pop() if len(verified) == 1 else -1,
                                 output.num_spec_tokens_to_schedule, tokens,
                                 *(round(b - a, 6) for a, b in zip(self.mark, now, strict=True))])  # fmt: skip
            self.mark = now
            return found

        self.scheduler.schedule, self.scheduler.update_from_output = scheduling, updating

    def memory(self) -> dict:
        """Bytes of weights, each counted once; blocks and bytes of the KV cache; bytes that the process holds now."""
        storages = {}
        for model in filter(None, (self.runner.model, getattr(getattr(self.runner, "drafter", None), "model", None))):
            for module in model.modules():
                for name, weight in [*module._parameters.items(), *module._buffers.items(),
                                     ("rows_WD", getattr(module, "rows_WD", None))]:  # fmt: skip
                    if weight is None:
                        continue
                    storage = weight.untyped_storage()
                    key, size = storage.data_ptr(), storage.nbytes()
                    if weight.numel() == 0 and name == "weight":  # packed for the CPU's kernels, out of sight
                        key = id(module)
                        size = module.output_size_per_partition * module.input_size_per_partition * weight.itemsize
                    storages[key] = size
        caches = {kv.untyped_storage().data_ptr(): kv.untyped_storage().nbytes() for kv in self.runner.kv_caches}
        config = self.runner.kv_cache_config
        return {
            "weights": sum(storages.values()),
            "kv_blocks": config.num_blocks,
            "kv_bytes": sum(caches.values()),
            "kv_layers": sum(len(group.layer_names) for group in config.kv_cache_groups),
            "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
        }

    def call(self, prompts, params, one_by_one=False, lengths=None, swap=False, fresh=False, by_batch=None) -> dict:
        from vllm import SamplingParams

        chosen = self.scheduler.dynamic_sd_lookup, getattr(self.scheduler, "rule", None)
        if fresh:
            self.scheduler.rule.__init__(self.scheduler.num_spec_tokens)
        if lengths or by_batch:
            fixed = InTurn(lengths) if lengths else {int(batch): k for batch, k in by_batch.items()}
            self.scheduler.dynamic_sd_lookup, self.scheduler.rule = fixed, Deaf()
        if swap:
            shallow = self.runner.drafter.model.served[1]
            shallow[0], shallow[1] = shallow[1], shallow[0]
        each = [SamplingParams(**p) for p in (params if isinstance(params, list) else [params] * len(prompts))]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        groups = [[i] for i in range(len(asked))] if one_by_one else [list(range(len(asked)))]
        outputs, rounds, steps, logged = [], [], [], len(self.log)
        self.mark = perf_counter(), process_time()
        first, start, cpu = self.counters(), perf_counter(), process_time()
        for group in groups:
            before, at = self.counters(), len(self.lengths)
            outputs += self.llm.generate([asked[i] for i in group], [each[i] for i in group], use_tqdm=False)
            rounds.append(self.counters()["rounds"] - before["rounds"])
            steps.append(self.lengths[at:])
        seconds, cpu, last = perf_counter() - start, process_time() - cpu, self.counters()
        self.scheduler.dynamic_sd_lookup, self.scheduler.rule = chosen
        grown = {
            key: [b - a for a, b in itertools.zip_longest(first[key], value, fillvalue=0)]
            if isinstance(value, list)
            else value - first[key]
            for key, value in last.items()
        }
        return grown | {
            "seconds": seconds,
            "cpu": cpu,
            "ids": [list(o.outputs[0].token_ids) for o in outputs],
            "texts": [o.outputs[0].text for o in outputs],
            "cached": [o.num_cached_tokens for o in outputs],
            "rounds_of_each": rounds,
            "lengths": steps,
            "log": self.log[logged:],
        }

    def counters(self) -> dict:
        found = {name: [] if name == "by_position" else 0 for name in COUNTERS.values()}
        for metric in self.llm.get_metrics():
            if metric.name in COUNTERS:
                found[COUNTERS[metric.name]] = list(metric.values) if hasattr(metric, "values") else metric.value
        return found


class InTurn:
    """In the place of vLLM's table of draft lengths by batch: the given ones, in turn."""

    def __init__(self, lengths):
        self.lengths = itertools.cycle(lengths)

    def __getitem__(self, batch: int) -> int:
        return next(self.lengths)


class Deaf:
    """In the place of the rule that adapts, while it is not asked: it shall not learn from others' lengths."""

    def outcome(self, *_) -> None: ...

    def took(self, *_) -> None: ...


if __name__ == "__main__":
    main()
