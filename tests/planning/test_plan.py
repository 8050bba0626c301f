"""The arithmetic of plans (collectives, speedups, pilots, what fits) and their printed text.

test_formulas.py compares the formulas with the real modules.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from pipeline import cli
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.evaluation.metrics import predicted_speedup
from pipeline.planning import estimate, gain, memory, tables
from pipeline.planning.architecture import Architecture, facts
from pipeline.planning.hardware import GPUS, LINK_SHARE, Layout
from pipeline.stages.plan import architecture_of, make

ROOT = Path(__file__).resolve().parents[2]
LARGE = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if load(p, []).backbone.name_or_path in facts()]


# ---- layouts and collectives


@pytest.mark.parametrize(
    ("nodes", "per_node", "degree", "inside", "between"),
    [
        (1, 8, 0, 7 / 8 / 450, 0),
        (4, 8, 8, 7 / 8 / 450, 0),  # inside each node
        (4, 8, 0, 31 / 32 / 450, 3 / 4 / (8 * 50)),  # three quarters come from other nodes, through eight ports
        (4, 1, 2, 1 / 2 / 450, 1 / 2 / 50),
    ],
)
def test_a_gather_is_bound_by_its_slowest_part(nodes, per_node, degree, inside, between) -> None:
    words = [f"machine.nodes={nodes}", f"machine.processes_per_node={per_node}", f"machine.shard_degree={degree}"]
    seconds = Layout.of(load(None, words).machine).gather_seconds(1e9, GPUS["H100"], 50)
    assert seconds == pytest.approx(max(inside, between) / LINK_SHARE)


def test_one_process_gathers_nothing() -> None:
    layout = Layout(1, 1, 1)
    assert layout.gather_seconds(1e9, GPUS["H100"], 50) == layout.sum_seconds(1e9, GPUS["H100"], 50) == 0


def test_copies_sum_gradients_over_the_network() -> None:
    assert Layout(32, 8, 8).sum_seconds(1e9, GPUS["H100"], 50) == pytest.approx(2 * 3 / 4 / 50 / LINK_SHARE)


# ---- gain


def test_speedup_by_weights_is_the_formula_of_speculative_decoding() -> None:
    """With nothing beside the passes: (1 - a^(K+1)) / (1 - a) tokens for 1 + K c, c = (N + 1 + h) / (L + h)."""
    a = Architecture.of("x", "test", AutoConfig.for_model(**facts()["meta-llama/Llama-2-70b-hf"]))
    costs = gain.costs_by_weight(a, 5, a.vocabulary) | {"rest": 0}
    h = a.embedding / a.layer
    c = (5 + 1 + h) / (80 + h)
    for k, speedup in gain.speedups(costs, [0.8]).items():
        assert speedup == pytest.approx((1 - 0.8 ** (k + 1)) / 0.2 / (1 + k * c))
    assert max(gain.speedups(costs, [0.8]).values()) == pytest.approx(2.69, abs=0.005)


def test_the_acceptance_that_is_needed_is_just_enough() -> None:
    a = architecture_of(load(None, []).backbone)
    costs = gain.costs_by_weight(a, 2, a.vocabulary)
    for target in (1.0, 1.3, 2.5):
        needed = gain.needed(costs, target)
        assert needed is not None
        assert max(gain.speedups(costs, [needed]).values()) >= target
        assert max(gain.speedups(costs, [needed - 1e-6]).values()) < target
    assert gain.needed(costs, 9.5) is None  # nine tokens a round at most, each at some cost


def test_what_was_typed_in_is_what_is_predicted_with() -> None:
    p = make(
        load(None, ["distill.exit_layers=[1,2,31]", "plan.acceptance=[0.6,0.0,1.0]", "distill.draft_vocabulary=0"])
    )
    first, _, last = p.predictions
    assert first.speedups[3] == pytest.approx(
        predicted_speedup(3, [0.6] * 3, gain.costs_by_weight(p.architecture, 1, p.architecture.vocabulary))
    )
    said = estimate.verdicts(p)
    assert said[-3].startswith("exit layer 1 should pay: 1.") and p.best == first
    assert re.fullmatch(r"exit layer 2 will not pay: 0\.8\d times as fast with K = 1 .* an acceptance of 19%", said[-2])
    assert said[-1] == "exit layer 31 will not pay: even if every draft were accepted, it would be 0.99 times as fast"
    assert last.needed == {1.0: None, 1.3: None}


def test_without_an_acceptance_the_plan_says_which_would_do() -> None:
    p = make(load(None, ["publish.min_speedup=1.3"]))
    assert p.predictions[0].speedups == {} and p.best is None
    assert "will pay if more than 49% of its drafts are accepted" in estimate.verdicts(p)[-1]


COSTS = {"shallow": 0.07, "head": 0.05, "rest": 0.01, "verify": {"1": 0.85, "3": 1.05}}


def pilot(tmp_path: Path, **changes: Any) -> str:
    """A run folder with results as evaluate writes them, as far as a plan reads them."""
    entry = {"exit_layer": 2, "temperature": 0.0, "costs": COSTS,
             "controllers": {"thompson": {"conditional_rates": [0.9, 0.9, 0.9]},
                             "fixed:1": {"conditional_rates": [0.4]},
                             "fixed:2": {"conditional_rates": [0.6, 0.8]}}}  # fmt: skip
    results = {"num_layers": 32, "parameters": 3643488, "device": "cpu", "heads": [entry]} | changes
    (tmp_path / "pilot/eval").mkdir(parents=True)
    (tmp_path / "pilot/eval/results.json").write_text(json.dumps(results))
    return f"plan.pilot={tmp_path / 'pilot'}"


def test_a_pilot_of_this_backbone_gives_rates_and_costs(tmp_path: Path) -> None:
    (one,) = make(load(None, ["plan.gpu=cpu", pilot(tmp_path)])).predictions
    assert one.measured
    assert one.speedups[2] == pytest.approx((1 + 0.6 + 0.6 * 0.8) / (3 * 0.07 + 2 * 0.05 + 1.05 + 0.01))
    # the last rate holds on; a verification of four lies on the line through those of one and of three
    assert one.speedups[3] == pytest.approx((2.08 + 0.6 * 0.8**2) / (4 * 0.07 + 3 * 0.05 + 1.15 + 0.01))


@pytest.mark.parametrize("changes", [{"num_layers": 16}, {"parameters": 1}, {"device": "cuda:0"}])
def test_a_pilot_of_another_backbone_or_device_gives_rates_only(tmp_path: Path, changes: dict[str, Any]) -> None:
    p = make(load(None, ["plan.gpu=cpu", pilot(tmp_path, **changes)]))
    (one,) = p.predictions
    assert not one.measured and one.costs == gain.costs_by_weight(p.architecture, 2, p.architecture.vocabulary)
    assert one.expected is not None and one.expected.rates == [0.6, 0.8]


def test_an_exit_layer_that_the_pilot_had_not_is_still_planned(tmp_path: Path) -> None:
    p = make(load(None, ["plan.gpu=cpu", "distill.exit_layers=[2,4]", pilot(tmp_path)]))
    assert [bool(one.speedups) for one in p.predictions] == [True, False]
    assert "exit layer 2 at temperature 0 should pay" in estimate.verdicts(p)[-2]
    tables.markdown(tables.full(p)[-1])  # a row with and a row without


def test_every_text_of_evaluate_is_counted() -> None:
    """Rivals that take a head are decoded once for each; the others once, and all of them only greedily."""
    names = ["generate", "generate:static", "early_exit", "assistant_model:2", "assistant_model:4", "prompt_lookup"]
    words = ["plan.gpu=H100", "distill.exit_layers=[1,2,3]", "evaluate.num_prompts=10", "evaluate.repeats=2",
             "evaluate.controllers=[thompson,fixed:2]", f"evaluate.rivals=[{','.join(names)}]"]  # fmt: skip
    stages = make(load(None, words)).stages
    assert next(s.how for s in stages if s.name == "evaluate").startswith("520 texts x")  # 20 x (2 x 7 + 3 + 3 x 3)
    with pytest.raises(UserError, match=r"evaluate\.rivals=\['fast'\]: 'fast' is not one of"):
        make(load(None, [*words, "evaluate.rivals=[fast]"]))


# ---- what fits, and what would


def test_what_would_fit_does() -> None:
    words = ["--config", str(ROOT / "configs/llama2-70b.yaml"), "plan.gpu=A100-40GB"]
    p = make(load(words[1], words[2:]))
    assert not p.fits
    (verdict,) = [line for line in estimate.verdicts(p) if line.startswith("distill does not fit: 40.9 of 35.5 GiB")]
    remedy = re.search(r"it would with (.*): ([\d.]+) GiB", verdict)
    assert remedy, verdict
    changed = make(load(words[1], [*words[2:], *remedy[1].split()]))
    assert changed.fits and f"{changed.distill.total / memory.GIB:.1f}" == remedy[2]


def test_what_nothing_would_make_fit() -> None:
    p = make(load(ROOT / "configs/llama2-70b.yaml", ["plan.gpu=RTX-4090", "machine.nodes=1"]))
    assert any("give it more GPUs (machine.nodes)" in line for line in estimate.verdicts(p))


def test_device_map_is_advised_where_it_is_needed_and_not_set() -> None:
    config = ROOT / "configs/llama2-70b.yaml"
    advised = [
        line for line in estimate.verdicts(make(load(config, ["machine.device_map=null"]))) if "device_map" in line
    ]
    assert [line.split(" lays")[0] for line in advised] == [
        "generate needs 3 H100 for one copy of the backbone: machine.device_map=auto",
        "evaluate needs 2 H100 for one copy of the backbone: machine.device_map=auto",
    ]
    assert not any("device_map" in line for line in estimate.verdicts(make(load(config, []))))


def test_steps_in_passes_need_less_memory_and_more_network() -> None:
    whole, passes = (
        make(load(ROOT / "configs/llama2-70b.yaml", words)) for words in ([], ["distill.sequences_per_pass=1"])
    )
    assert passes.distill.total < whole.distill.total
    assert passes.step.network == pytest.approx(4 * whole.step.network) and passes.step.compute == whole.step.compute


def test_a_cached_teacher_costs_disk_and_saves_time() -> None:
    config = ROOT / "configs/llama2-70b.yaml"
    online, cached = make(load(config, [])), make(load(config, ["distill.teacher=cached"]))
    disk = {row.what: row.size for row in cached.disk}
    assert disk["teacher's hidden states"] == 60000 * 2048 * 4 * 8192 * 2
    assert cached.step.flops < online.step.flops / 4 and cached.distill.total < online.distill.total
    assert [stage.name for stage in cached.stages] == ["generate", "cache", "distill", "evaluate"]


def test_a_cached_teacher_is_read_by_every_node() -> None:
    """Four nodes share the 128 sequences of a step; of each token four hidden states, the final one among them."""
    config = ROOT / "configs/llama2-70b.yaml"
    online, cached = make(load(config, [])), make(load(config, ["distill.teacher=cached"]))
    assert online.step.cache_read == 0 and cached.step.cache_read == 128 * 2048 * 4 * 8192 * 2 / 4
    assert not [row for table in tables.full(online) for row in table.rows if row[0] == "reading the cache"]
    (row,) = [row for table in tables.full(cached) for row in table.rows if row[0] == "reading the cache"]
    rate = cached.step.cache_read / cached.step.seconds / 1e9
    assert row[2].startswith(f"4.00 GiB on each node; at {tables.number(rate)} GB/s another ")


def test_what_depends_on_an_unknown_number_of_prompts_is_left_out() -> None:
    p = make(load(ROOT / "configs/llama2-70b.yaml", ["generate.num_prompts=0"]))
    assert [stage.name for stage in p.stages] == ["distill", "evaluate"]
    assert not {row.what for row in [*p.disk, *p.host]} & {"responses", "responses, read and packed"}
    assert any(line.startswith("generate.num_prompts=0, all") for line in estimate.verdicts(p))


# ---- the verb


def call(argv: list[str]) -> int:
    try:
        return cli.main(["plan", *argv])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


MISTAKES = {
    "shard degree": (["machine.nodes=2", "machine.shard_degree=3"], ["machine.shard_degree=3", "the 2 processes"]),
    "sequences": (["machine.nodes=3"], ["distill.sequences_per_step=16", "multiple of the 3 processes"]),
    "exit layer": (["distill.exit_layers=[32]"], ["distill.exit_layers=[32]", "from 1 to 31"]),
    "gpu": (["plan.gpu=H1000"], ["plan.gpu=H1000", "A100-80GB"]),
    "rates": (["plan.acceptance=[0.5,0.6]"], ["plan.acceptance=[0.5, 0.6]", "distill.exit_layers=[2]"]),
    "rate": (["plan.acceptance=[1.5]"], ["plan.acceptance=[1.5]", "from 0 to 1"]),
    "share": (["plan.mfu=0"], ["plan.mfu=0", "above 0"]),
    "bandwidth": (["plan.node_bandwidth=-1"], ["plan.node_bandwidth=-1"]),
    "both": (["plan.acceptance=[0.5]", "plan.pilot=x"], ["plan.acceptance", "plan.pilot=x"]),
    "no pilot": (["plan.pilot=nowhere"], ["plan.pilot=nowhere", "results.json", "was evaluated"]),
    "backbone": (["backbone.name_or_path=nowhere/x"], ["backbone.name_or_path=nowhere/x"]),
    "no list": (["--vary", "machine.nodes=2"], ["--vary machine.nodes=2", "machine.nodes=[1,2,4]"]),
    "varied key": (["--vary", "machine.node=[2]"], ["machine.node", "machine.nodes"]),
    "varied value": (["--vary", "machine.nodes=[1,3]"], ["distill.sequences_per_step=16"]),
}


@pytest.mark.parametrize(("words", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(words: list[str], named: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("exit-heads plan: ") and "Traceback" not in err
    assert all(part in err for part in named), err
    assert not list(tmp_path.iterdir())


def test_a_pilot_without_a_fixed_controller_is_refused(tmp_path: Path) -> None:
    word = pilot(tmp_path, heads=[{"exit_layer": 2, "temperature": 0.0, "costs": COSTS, "controllers": {}}])
    with pytest.raises(UserError, match="no controller fixed:K"):
        make(load(None, ["plan.gpu=cpu", word]))


def test_it_prints_and_writes_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["plan.gpu=cpu", "plan.acceptance=[0.7]"]) == 0
    out = capsys.readouterr().out
    assert "pocket: 3.64 M parameters, L = 32" in out and "exit layer 2 should pay" in out and "seconds" not in out
    assert not list(tmp_path.iterdir())


def test_json_holds_what_the_tables_show(capsys) -> None:
    assert call(["--json", "plan.acceptance=[0.7]"]) == 0
    document = json.loads(capsys.readouterr().out)
    p = make(load(None, ["plan.acceptance=[0.7]"]))
    assert document["memory"]["distill"]["total"] == p.distill.total
    assert document["stages"][1]["gpu_hours"] == p.stages[1].gpu_hours
    assert document["predictions"][0]["speedups"]["3"] == p.predictions[0].speedups[3]
    assert document["verdicts"] == estimate.verdicts(p)


def test_varied_keys_make_a_row_each(capsys) -> None:
    words = ["--vary", "distill.exit_layers=[[1],[2,4]]", "--vary", "machine.nodes=[1,2]"]
    assert call(words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    assert rows[0][:3] == ["exit_layers", "nodes", "GPUs"]
    assert [row[:2] for row in rows[2:]] == [["[1]", "1"], ["[1]", "2"], ["[2, 4]", "1"], ["[2, 4]", "2"]]
    assert call([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4


# ---- what is written down


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_comments_of_large_configs_say_what_plan_says(path: Path) -> None:
    p, text = make(load(path, [])), path.read_text()
    hours = ", ".join(f"{s.name} {tables.number(s.gpu_hours)}" for s in p.stages)
    size = tables.number(p.distill.total / memory.GIB)
    assert (
        f"# plan: {size} GiB of each GPU; a step takes {tables.number(p.step.seconds)} s; GPU-hours: {hours}\n" in text
    )
    for row in filter(lambda row: row.size, p.distill.rows):  # as printed: a row of no bytes is left out
        assert f"  #{tables.number(row.size / memory.GIB):>7}  {row.what}: {row.how}\n" in text
    assert f"  #{size:>7}  together, at the {p.distill.largest}\n" in text


def printed() -> list[tuple[str, str]]:
    """Each command of docs/planning.md whose output stands below it, with that output."""
    text = (ROOT / "docs/planning.md").read_text()
    blocks = r"```bash\nexit-heads plan ([^\n]*)\n```\n\n(?:```text|<!-- printed -->)\n(.*?)(?:```|<!-- end -->)\n"
    return re.findall(blocks, text, re.S)


def test_there_is_an_example_and_a_table() -> None:
    assert len(printed()) >= 2


@pytest.mark.parametrize(("command", "output"), printed(), ids=[f"{i}" for i in range(len(printed()))])
def test_the_docs_show_what_the_verb_prints(command: str, output: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert call(shlex.split(command)) == 0
    assert capsys.readouterr().out == output
