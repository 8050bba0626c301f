"""A scheduler of vLLM that chooses the draft length of every step: `--scheduler-cls
exit_heads_vllm.scheduler.AdaptiveScheduler`.

Takes what vLLM gives its scheduler; schedules as vLLM does, and lets draft_length.py say how many tokens the step
drafts. It works with any method of drafting whose length vLLM can vary, exit heads and draft models among them.
"""

from time import perf_counter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from .draft_length import DraftLength
from .support import Refused, check_varying, check_version, found_version


class _Lengths:
    """In the place of vLLM's table from the number of requests to the draft length."""

    def __init__(self, rule: DraftLength):
        self.rule = rule

    def __getitem__(self, batch: int) -> int:
        return self.rule.choose(batch)


class _Adapting:
    """What is added to vLLM's schedulers: it asks the rule, times the steps and counts what was accepted."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        check_version(found_version())
        super().__init__(vllm_config, *args, **kwargs)
        spec = vllm_config.speculative_config
        if spec is None:
            raise Refused("scheduler-cls: there are no drafts whose length it could choose: give --speculative-config")
        if spec.num_speculative_tokens_per_batch_size:
            raise Refused(
                "num_speculative_tokens_per_batch_size and this scheduler both choose the length: leave one away"
            )
        if vllm_config.parallel_config.data_parallel_size > 1:
            raise Refused(
                "data_parallel_size: its processes would choose different lengths: serve without scheduler-cls"
            )
        check_varying(vllm_config)
        self.rule = DraftLength(self.num_spec_tokens)
        self.dynamic_sd_lookup = _Lengths(self.rule)
        self.last_end: float | None = None
        """Of the step before, if requests were left to go on with."""
        self.started: dict[int, tuple[float, int]] = {}
        """Of each step that is under way, by its output's id: when it began, and the length of the drafts it
        verifies; -1 for a step that does anything else."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        begun = perf_counter()
        output = super().schedule(*args, **kwargs)
        self.started[id(output)] = begun, _verified(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        begun, verified = self.started.pop(id(scheduler_output), (0.0, -1))
        found = super().update_from_output(scheduler_output, *args, **kwargs)
        now = perf_counter()
        if verified == scheduler_output.num_spec_tokens_to_schedule:
            # A step takes the time from the end of the one before it, also where steps overlap. What vLLM does between
            # them counts: it is shared by the tokens of a step, so leaving it out would make drafting look dearer.
            seconds = now - (begun if self.last_end is None else self.last_end)
            self.rule.took(len(scheduler_output.num_scheduled_tokens), verified, seconds)
        self.last_end = now if self.has_unfinished_requests() else None
        return found

    def make_spec_decoding_stats(self, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any,
                                 **kwargs: Any) -> Any:  # fmt: skip
        if num_draft_tokens:
            self.rule.outcome(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)


def _verified(output: SchedulerOutput) -> int:
    """How many drafts each request of this step has verified, if that is all it does and the same for all; -1
    otherwise."""
    lengths = set()
    for request, tokens in output.num_scheduled_tokens.items():
        drafts = len(output.scheduled_spec_decode_tokens.get(request, ()))
        lengths.add(drafts if tokens == 1 + drafts else -1)
    return lengths.pop() if len(lengths) == 1 else -1


class _Waiting(_Adapting, Scheduler):
    """For `--no-async-scheduling`, and where vLLM turns that off itself."""


class AdaptiveScheduler(_Adapting, AsyncScheduler):
    """For overlapping steps, vLLM's default; gives a `_Waiting` where vLLM's steps wait for each other."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return _Waiting(vllm_config, *args, **kwargs)
