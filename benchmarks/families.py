"""What does it cost to run a model through transformers' layers instead of our own? And what does either win?

    python benchmarks/families.py --config configs/smollm2-135m.yaml

Takes a backbone, and decodes the same prompts autoregressively by three ways, in turns: our own layers, if its family
is computed here (`family_llama.py`), transformers' layers one by one (`family_generic.py`), and transformers'
`generate`. All give the same ids. Prints tokens/s of each and their ratios with 95 % bootstrap intervals over prompts,
and the time of an outline, which finds the arguments of a pass.
"""

import argparse
import time

import numpy as np
import torch

from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import load
from pipeline.evaluation.intervals import interval, ratio_of_rates
from pipeline.evaluation.measuring import in_turns
from pipeline.inference import families
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.decoding import Request, autoregressive
from pipeline.inference.exit_head import ExitHead, new_exit_layer
from pipeline.inference.family_generic import GENERIC
from pipeline.inference.fingerprint import fingerprint
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import evaluation_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("words", nargs="*", help="KEY=VALUE, as for exit-heads")
    a = parser.parse_args()
    config = load(a.config, a.words)
    torch.set_num_threads(a.threads)
    model, tokenizer = load_model(config.backbone, torch.device("cpu")), load_tokenizer(config.backbone)
    model.generation_config.eos_token_id = None  # every text has the same length
    head = ExitHead(1, model.config.num_hidden_layers, {"name": "", "fingerprint": fingerprint(model)},
                    dict(new_exit_layer(model).state_dict()))  # fmt: skip
    ways = {"transformers' layers": SplitBackbone(model, head, check=False)}
    if ways["transformers' layers"].family.is_fast:
        ways = {"own layers": ways["transformers' layers"]}
        kept = families.FAMILIES.pop(model.config.model_type)
        model.__dict__.pop("_products")
        ways["transformers' layers"] = SplitBackbone(model, head, check=False)
        families.FAMILIES[model.config.model_type] = kept
    assert ways["transformers' layers"].family is GENERIC
    settings = config.evaluate.prompts or config.prompts
    chosen = evaluation_prompts(config)[: a.prompts]
    ids = [row for _, row in encode(chosen, tokenizer, settings, model.config.max_position_embeddings, a.tokens)]
    texts: dict[int, list[int]] = {}

    def decode(name: str, i: int) -> tuple[int, float]:
        if name in ways:
            out = autoregressive(ways[name], Request(ids[i], a.tokens), Sampler())
            found, seconds = out.tokens, out.seconds
        else:
            start = time.perf_counter()
            row = torch.tensor([ids[i]])
            text = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=a.tokens, do_sample=False)
            found, seconds = text[0, len(ids[i]) :].tolist(), time.perf_counter() - start
        assert texts.setdefault(i, found) == found, f"prompt {i}: {name} gives {found}, not {texts[i]}"
        return len(found) - 1, seconds

    names = [*ways, "generate"]
    tokens, seconds = ({name: np.zeros(len(ids)) for name in names} for _ in range(2))
    with torch.inference_mode():
        for name in names:
            decode(name, 0)
        for _, i, name in in_turns(len(ids), names, label="decoding"):
            tokens[name][i], seconds[name][i] = decode(name, i)
        outline = ways["transformers' layers"].passes
        start = time.perf_counter()
        for base in range(100, 200):
            outline.embed([5], base)
        per_pass = (time.perf_counter() - start) / 100
    for name in names:
        print(f"{name:22} {tokens[name].sum() / seconds[name].sum():7.2f} tokens/s")
    for name, over in [(name, names[i]) for i in range(1, len(names)) for name in names[:i]]:
        value, (low, high) = interval(ratio_of_rates, tokens[name], seconds[name], tokens[over], seconds[over])
        print(f"{name} / {over}: {value:.3f} ({low:.3f}-{high:.3f})")
    print(f"an outline takes {1000 * per_pass:.2f} ms of a pass of one token")


if __name__ == "__main__":
    main()
