"""How many more drafts does block verification accept than verification one by one?

Both rules are applied to the same drafts: texts are sampled, and each round adds a number to either rule whose mean is
that of its accepted drafts. So the comparison is paired and has no noise of coins:

    one by one: sum_i prod_{j<=i} min(1, p/q of draft j)      block: sum_i reach_i (pipeline/inference/sampling.py)

Printed is the acceptance length under both, bonus included, and their ratio with a 95 % interval over prompts. All are
counts, so other work on the machine does not matter.

  python benchmarks/block_verification.py --head runs/smollm2-135m-head --config configs/smollm2-135m.yaml
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.backbones.ends import end_tokens
from pipeline.backbones.load import load_model, load_tokenizer
from pipeline.config import load
from pipeline.evaluation.intervals import interval, ratio_of_rates
from pipeline.inference.backbone import SplitBackbone
from pipeline.inference.controllers import make_controller
from pipeline.inference.decoding import Request, self_speculative
from pipeline.inference.exit_head import ExitHead
from pipeline.inference.sampling import Sampler
from pipeline.prompts.ids import encode
from pipeline.prompts.sets import evaluation_prompts, evaluation_settings


@dataclass
class Recording(Sampler):
    """Verifies one by one, and notes what either rule expects of the drafts of every round."""

    one_by_one: float = 0.0
    as_block: float = 0.0
    rounds: int = 0

    def _accept_each(self, ratio_K: Tensor, p_MV: Tensor, q_MV: Tensor) -> tuple[Tensor, Tensor]:
        reach = 1.0
        for ratio in ratio_K.tolist():
            reach = min(1.0, reach * ratio)
            self.as_block += reach
        self.one_by_one += float(ratio_K.clamp(max=1).cumprod(0).sum())
        self.rounds += 1
        return super()._accept_each(ratio_K, p_MV, q_MV)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--head", type=Path, required=True, help="folder of an exit head")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--controllers", nargs="+", default=["fixed:2", "fixed:4", "fixed:6", "thompson"])
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for exit-heads")
    a = parser.parse_args()
    config = load(a.config, a.words)
    torch.set_num_threads(config.evaluate.threads or torch.get_num_threads())
    model, tokenizer = load_model(config.backbone, torch.device("cpu")), load_tokenizer(config.backbone)
    engine = SplitBackbone(model, ExitHead.load(a.head))
    chosen, settings = evaluation_prompts(config), evaluation_settings(config)
    chosen = chosen[:: max(1, len(chosen) // a.prompts)][: a.prompts]
    ids = [row for _, row in encode(chosen, tokenizer, settings, engine.max_context, a.tokens)]
    ends = frozenset(end_tokens(config.backbone, tokenizer))
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9)):
        for name in a.controllers:
            controller, found = make_controller(name, greedy=False), []
            for i, prompt in enumerate(tqdm(ids, desc=name, unit="text", leave=False)):
                generator = torch.Generator().manual_seed(i)
                sampler = Recording(temperature, top_p=top_p, generator=generator)
                self_speculative(engine, Request(prompt, a.tokens, ends), sampler, controller)
                found.append((sampler.rounds, sampler.rounds + sampler.one_by_one, sampler.rounds + sampler.as_block))
            rounds_P, each_P, block_P = np.array(found).T
            ratio, (low, high) = interval(ratio_of_rates, block_P, rounds_P, each_P, rounds_P)
            print(
                f"T = {temperature}, top-p {top_p}, {name}: rounds with drafts {rounds_P.sum():.0f}, acceptance length "
                f"{each_P.sum() / rounds_P.sum():.3f} one by one, {block_P.sum() / rounds_P.sum():.3f} as a block, "
                f"ratio {ratio:.4f} ({low:.4f}-{high:.4f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
