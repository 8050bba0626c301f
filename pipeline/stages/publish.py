"""Gate the best head and write the folder that transformers loads: weights, the decoding code, card, results.

Takes eval/results.json and heads/exit-<N>/, gives hub/<N>/; refuses a head that is not lossless or not faster.
Knows nothing of how anything was measured.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from .. import card, head_folder, hub
from ..config import Config
from ..errors import GateError
from ..rundir import RunDir, atomic_path


def run(run: RunDir) -> None:
    """Write hub/<N>/ for the best exit layer and push it where that is asked for. Raises GateError when refused."""
    folder = write(run)
    if run.config.publish.target == "hub":
        hub.publish(run, folder, str(run.config.publish.repo_id))


def check(config: Config) -> None:
    """What can be known before anything is loaded. Raises UserError where nothing could be pushed."""
    hub.check(config)


def write(run: RunDir) -> Path:
    """hub/<N>/, unless it is done already."""
    results_file = run / "eval" / "results.json"
    inputs = [results_file, run / "heads"]
    done = not run.plan("publish", inputs)
    results = json.loads(results_file.read_text())
    target = run / "hub" / str(results["best"]["exit_layer"])
    if done:
        print("publish: done already")
        return target
    failed = gate(results, run.config.publish.min_speedup)
    if failed and not run.config.publish.force:
        lines = "\n".join(f"  - {reason}" for reason in failed)
        raise GateError(f"the gate refused exit layer {results['best']['exit_layer']}:\n{lines}\n"
                        "publish.force=true writes it all the same and says so on the card.")  # fmt: skip
    with run.stage("publish", inputs) as summary:
        with atomic_path(target) as folder:
            write_folder(folder, run, results, failed)
        summary["folder"] = target.relative_to(run.path).as_posix()
        summary["gate"] = {"passed": not failed, "reasons": failed}
    return target


def gate(results: dict[str, Any], min_speedup: float) -> list[str]:
    """The reasons why the best head must not be published; none if it may."""
    failed = []
    greedy, sampling, best = results["lossless"]["greedy"], results["lossless"]["sampling"], results["best"]
    if greedy is None:
        failed.append("lossless: nothing greedy was evaluated; add 0 to evaluate.temperatures")
    elif not greedy["passed"]:
        failed.append(
            f"lossless: {greedy['identical']} of {greedy['texts']} greedy texts are identical to autoregressive "
            f"decoding in {results['dtype']}"
            + ("" if results["dtype"] == "float32" else ", and not every difference is a near tie")
        )
    if sampling is not None and not sampling["passed"]:
        failed.append(f"lossless: sampled tokens are not distributed as the backbone's, p = {sampling['p_value']:.2g}")
    low = best["speedup_ci95"][0]
    if low <= min_speedup:
        failed.append(
            f"speedup: the 95 % interval of {best['controller']} begins at {low:.3f}, "
            f"publish.min_speedup={min_speedup} asks for more"
        )
    return failed


def states(results: dict[str, Any], exit_layer: int) -> dict[str, Any]:
    """What thompson learned of the head while it was measured, so that users do not start from nothing.

    Of several temperatures above 0 the one nearest 1.
    """
    learned = [
        (entry["temperature"], figures["state"])
        for entry in results["heads"]
        for figures in entry["controllers"].values()
        if entry["exit_layer"] == exit_layer and "state" in figures
    ]
    return {"greedy" if t == 0 else "sampled": state for t, state in sorted(learned, key=lambda x: -abs(x[0] - 1))}


def write_folder(folder: Path, run: RunDir, results: dict[str, Any], failed: list[str]) -> None:
    """Everything of hub/<N>/."""
    best = results["best"]
    shutil.copytree(run / "heads" / f"exit-{best['exit_layer']}", folder)
    config = json.loads((folder / "config.json").read_text()) | {"controller": best["controller"]}
    config["states"] = states(results, best["exit_layer"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    head_folder.write_code(folder)
    kept = [h for h in results["heads"] if h["exit_layer"] == best["exit_layer"]]
    published = results | {"heads": kept, "gate": {"passed": not failed, "reasons": failed}}
    (folder / "results.json").write_text(json.dumps(published, indent=1) + "\n")
    (folder / "README.md").write_text(card.render(published, run.config))
