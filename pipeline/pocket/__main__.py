"""The commands that make and check the pocket backbone, one verb for each step.

  python -m pipeline.pocket train                     the backbone, under 75 minutes on 2 CPU cores
  python -m pipeline.pocket train --layers 3 --out T  its shallow twin, for the depth check
  python -m pipeline.pocket prompts                   cut the prompt files from the held-out modules
  python -m pipeline.pocket check --twin T            share of code that parses; loss against the twin's
  python -m pipeline.pocket manifest                  record the sha256 of every source file

All of them read the standard library of CPython 3.11.7: that of the running interpreter, or the folder --stdlib.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from . import checks, corpus, cutting, recipe
from .paths import BACKBONE


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.pocket", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["train", "prompts", "check", "manifest"])
    parser.add_argument("--stdlib", type=Path, help="Lib/ of CPython 3.11.7 (default: the running interpreter's)")
    parser.add_argument("--out", type=Path, default=BACKBONE, help="where train writes (default: the built-in folder)")
    parser.add_argument("--layers", type=int, default=recipe.Recipe.layers, help="decoder layers")
    parser.add_argument("--steps", type=int, default=recipe.Recipe.steps, help="optimizer steps")
    parser.add_argument("--twin", type=Path, help="check: folder of a shallow twin made by train --layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    if args.verb == "manifest":
        corpus.write_manifest(corpus.modules(args.stdlib, check=False))
    elif args.verb == "prompts":
        cutting.write_prompts(corpus.modules(args.stdlib))
    elif args.verb == "check":
        print(json.dumps(checks.run(args.out, args.twin, args.stdlib), indent=1))
        folders = [args.out, args.twin] if args.twin else [args.out]
        checks.plot_curves(folders, Path("docs/pocket-training.png"))
    else:
        found = corpus.modules(args.stdlib)
        texts = {role: list(files.values()) for role, files in found.items()}
        chosen = replace(recipe.Recipe(), layers=args.layers, steps=args.steps)
        tokenizer = recipe.train_tokenizer(texts["train"], chosen.vocabulary)
        record = recipe.train(chosen, tokenizer, texts, args.out, args.device)
        print({k: v for k, v in record.items() if k != "curve"})


if __name__ == "__main__":
    main()
