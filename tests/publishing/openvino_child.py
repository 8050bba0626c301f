"""Decode with OpenVINO GenAI and a draft model, in a process of its own whose packages shadow ours.

Takes one JSON object on stdin: two exported models, K, prompts as ids, how many tokens; gives for each prompt, as JSON
on the last line of stdout, the new tokens and the passes of the main model behind the prompt.
"""

import json
import sys

import numpy as np
import openvino
import openvino_genai as genai

# Both default to lower precisions, in which text and rounds are others.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}


def main() -> None:
    job = json.load(sys.stdin)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False  # GB
    draft = genai.draft_model(job["draft"], "CPU", **EXACT)
    pipe = genai.LLMPipeline(job["backbone"], "CPU", scheduler_config=scheduler, draft_model=draft, **EXACT)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.num_assistant_tokens = job["new"], False, job["k"]
    config.ignore_eos = True
    found = []
    for ids in job["prompts"]:
        row = np.array([ids], dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(np.ones_like(row)))
        out = pipe.generate(inputs, config)
        passes = len(out.extended_perf_metrics.main_model_metrics.raw_metrics.m_durations)
        found.append({"tokens": list(out.tokens[0]), "rounds": passes - 1})
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
