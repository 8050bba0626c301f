"""The report and its mirror on W&B: the verdict says what the figures say, and nothing is lost on the way."""

import copy
import html.parser
import json
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import make_run, plant_heads

from pipeline.evaluation import report
from pipeline.evaluation.rendering import Block, html_page, markdown
from pipeline.runs import tracking
from pipeline.stages import evaluate, generate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("report"), "wandb.mode=offline", "evaluate.temperatures=[0.0,1.0]")
    plant_heads(run, 2)
    (run / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')  # as if distill had been here
    evaluate.run(run)
    return run


@pytest.fixture()
def results(run):
    return json.loads((run / "eval" / "results.json").read_text())


def tables(page: list[Block]) -> dict[str, list[list[str]]]:
    """Each table under the last heading above it."""
    found, heading = {}, ""
    for kind, content in page:
        heading = content if kind in ("h2", "h3") else heading
        if kind == "table":
            found.setdefault(heading, content)
    return found


def test_what_was_learned_from_is_shown_if_it_is_here(tmp_path) -> None:
    run = make_run(tmp_path)
    plant_heads(run, 2)
    generate.run(run)
    evaluate.run(run)
    results = json.loads((run / "eval" / "results.json").read_text())
    rows = {row[0]: row[1:] for row in tables(report.blocks(results))["Responses learned from"]}
    assert rows["cut at the longest length"] == ["8", "100.0%"] and rows["from prompts.jsonl"] == ["8", "100.0%"]
    assert "8 answers to 8 prompts, 128 tokens, by engine padded by 1 process" in (run / "report/report.md").read_text()
    assert (run / "report" / "lengths.png").stat().st_size > 5000
    assert "Responses learned from" not in tables(report.blocks(results | {"responses": None}))


# ---- what the reader sees first


@pytest.mark.parametrize(
    ("interval", "lossless", "kind", "words"),
    [
        ([1.2, 1.4], True, "good", "Lossless, and drafting pays: speedup 1.30 (95 % interval 1.20-1.40)"),
        ([0.9, 1.4], True, "unsure", "does not surely pay: the interval touches 1"),
        ([1.0, 1.4], True, "unsure", "does not surely pay"),
        ([0.7, 0.9], True, "bad", "drafting does NOT pay: it is slower"),
        ([1.2, 1.4], False, "bad", "NOT lossless"),
    ],
)
@pytest.mark.parametrize("proof", ["greedy", "sampling"])
def test_the_verdict_says_it_in_words_and_in_colour(results, interval, lossless, kind, words, proof) -> None:
    results["best"] |= {"speedup": 1.3, "speedup_ci95": interval}
    results["lossless"][proof]["passed"] = lossless
    page = report.blocks(results)
    assert page[1][0] == kind and words in page[1][1]
    assert page[1] == report.verdict(results)
    assert f'<p class="verdict {kind}">' in html_page(page[:3], Path())
    assert f"> {page[1][1]}" in markdown(page)
    assert report.summary(results)["evaluate/lossless"] == lossless
    assert any(k == "p" and c.startswith(f"Lossless: {'yes' if lossless else 'no'}: ") for k, c in page)


def test_a_proof_that_was_not_made_refuses_nothing(results) -> None:
    results["lossless"]["sampling"] = None
    assert report.is_lossless(results)


def test_yield_over_cost_of_a_round_is_the_speedup(results) -> None:
    """The reader may divide the two figures of the sentence."""
    best = results["best"]
    entry = next(h for h in results["heads"] if h["temperature"] == best["temperature"])
    c = entry["controllers"][best["controller"]]
    c |= {"speedup": 2.0, "acceptance_length": 3.0, "rounds": 4, "drafted_histogram": {"2": 2, "4": 2},
          "time_per_token": {"shallow": 0.1, "head": 0.1, "verify": 0.2, "rest": 0.1}}  # fmt: skip
    assert report.blocks(results)[2][1] == (
        "Why: a round drafts 3.00 tokens, of which 2.00 are accepted; with the bonus token it yields 3.00 tokens. It "
        "takes the time of 1.50 autoregressive tokens (shallow 0.30, head 0.30, verify 0.60, rest 0.30)."
    )


# ---- what else is there


def test_every_figure_of_the_results_is_on_the_page(results) -> None:
    for entry in results["heads"]:
        entry["costs"] |= {"verify": {"1": 1.0, "3": 1.25}, "target_efficiency": {"1": 1.0, "3": 0.8}}
        entry["controllers"]["fixed:2"]["predicted_speedup"] = 1.23
    page = report.blocks(results)
    found = tables(page)
    assert found["Cost of verification"] == [
        ["exit layer", "tokens verified at once", "1", "3"],
        ["2", "cost", "1.00", "1.25"],
        ["2", "target efficiency", "1.00", "0.80"],
    ]
    assert found["Predicted against measured speedup"][1][:3] == ["2", "fixed:2", "1.23"]
    assert len(found["Predicted against measured speedup"]) == 2, "thompson predicts nothing"
    assert found["Cost of the parts"][0][-2:] == ["head, MiB", "cache, MiB"]
    by_task = found["Speedup by task (acceptance length, n prompts)"][0][2:]
    assert sorted(by_task) == ["overall", "t0, n = 2", "t1, n = 2"]
    explained = {word for kind, content in page if kind == "words" for word, _ in content}
    assert {"speedup", "before loops", "acceptance length", "draft acceptance rate", "controller"} <= explained
    assert "repeat an 8-gram" in markdown(page)


def test_widths_that_one_head_never_verified_are_left_blank(results) -> None:
    entries = [copy.deepcopy(results["heads"][0]) for _ in range(2)]
    entries[0]["costs"] |= {"verify": {"1": 1.0, "2": 1.1}, "target_efficiency": {"1": 1.0, "2": 0.9}}
    entries[1]["costs"] |= {"verify": {"1": 1.0, "10": 2.0}, "target_efficiency": {"1": 1.0, "10": 0.5}}
    rows = tables(report._costs(entries))["Cost of verification"]
    assert rows[0][2:] == ["1", "2", "10"], "as numbers, not as text"
    assert rows[1][2:] == ["1.00", "1.10", "-"] and rows[3][2:] == ["1.00", "-", "2.00"]


def test_the_page_is_sound(run) -> None:
    """Every tag is closed, every picture has a text, every table its own box to scroll in."""
    page = (run / "report" / "index.html").read_text()
    stack, boxes = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes) -> None:
            if tag == "img":
                assert dict(attributes)["alt"] and dict(attributes)["src"].startswith("data:image/png;base64,")
            if tag == "table":
                boxes.append(stack[-1])
            if tag not in ("meta", "img"):
                stack.append((tag, dict(attributes).get("class")))

        def handle_endtag(self, tag) -> None:
            assert stack.pop()[0] == tag

    Reader().feed(page)
    assert not stack and boxes and set(boxes) == {("div", "table")}


def test_what_stands_in_the_results_cannot_become_markup(results) -> None:
    results["backbone"]["name"] = "<script>alert(1)</script>"
    page = [b for b in report.blocks(results) if b[0] != "image"]
    assert "<script>" not in html_page(page, Path())


# ---- the mirror on W&B


def records(run) -> list[dict]:
    """What the one offline run holds, read back with W&B's own tool."""
    [folder] = (run / "wandb").rglob("offline-run-*")
    out = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)], capture_output=True, check=True
    )
    return [json.loads(line) for line in out.stdout.splitlines()]


def test_the_report_is_mirrored_offline(run, results) -> None:
    seen = records(run)
    [log] = [r["history"]["item"] for r in seen if r["type"] == "history"]
    [started] = [r["run"] for r in seen if r["type"] == "run"]
    assert started["run_id"] == tracking.wandb_id(run / "wandb"), "the run of distill, not another"
    assert log["_step"] == 8, "behind what distill logged"
    page = report.blocks(results)
    assert {k.split(".")[0] for k, v in log.items() if v == "image-file"} == {
        "report/" + Path(content[0]).stem for kind, content in page if kind == "image"
    }
    expected = [content for kind, content in page if kind == "table"]
    names = [k.removesuffix("._type") for k, v in log.items() if v == "table-file"]
    assert "report/Temperature 0" in names and "report/Temperature 1, Cost of verification" in names
    [files] = (run / "wandb").rglob("offline-run-*/files")
    tables = [json.loads((files / log[f"{name}.path"]).read_text()) for name in names]
    assert sorted([t["columns"], *t["data"]] for t in tables) == sorted(expected)
    figures = {k: v for r in seen if r["type"] == "summary" for k, v in r["summary"]["update"].items()}
    assert {k: v for k, v in figures.items() if k.startswith("evaluate/")} == report.summary(results)


def test_nothing_of_this_machine_is_mirrored(run) -> None:
    seen = [r for r in records(run) if r["type"] != "artifact"]  # W&B notes where to read what it will send
    text = json.dumps(seen)
    assert "tiny-llama" in text, "the config is there"
    assert platform.node() not in [v for r in seen if r["type"] == "run" for v in r["run"].values()]
    assert not [r for r in seen if r["type"] == "environment"]
    assert str(run.path.parent.parent) not in text and str(Path(__file__).parent) not in text
    [files] = (run / "wandb").rglob("offline-run-*/files")
    assert {p.name for p in files.iterdir()} == {"media", "requirements.txt"}


def test_wandb_that_fails_or_hangs_fails_nothing(run, results, monkeypatch, capsys) -> None:
    import wandb

    def mirror() -> str:
        tracking.mirror_report(run, report.summary(results), report.blocks(results), run / "report")
        return capsys.readouterr().err

    def refuse(**_):
        raise OSError("no space")

    monkeypatch.setattr(wandb, "init", refuse)
    assert mirror() == "evaluate: W&B cannot start (OSError); the run folder has every figure\n"
    monkeypatch.setattr(wandb, "init", lambda **_: object())
    assert mirror() == "evaluate: W&B failed (AttributeError); the run folder has every figure\n"
    forever = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: forever.wait())
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 0.1)
    assert mirror().startswith("evaluate: W&B did not answer for 0 s; its files are in ")
    forever.set()


def test_disabled_means_that_nothing_is_written(tmp_path, results) -> None:
    run = make_run(tmp_path)
    tracking.mirror_report(run, {}, [], tmp_path)
    assert not (run / "wandb").exists()
