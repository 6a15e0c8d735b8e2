import argparse
import ast
import gzip
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import data
import dual
import mocan
import train
from conftest import rows
from data import Pool, load_pairs, published_files, published_tokenizer, spread
from model import GPT, GPTConfig, export, load
from test_data import CHATML, STEPS, published_folder, tokenizer_json

ROOT = Path(train.__file__).resolve().parent
MODULES = ("model", "data", "dual", "mocan", "pecan", "train")
POLICIES = ["reference", "dpo-helpful", "dpo-harmless", "mocan", "pecan"]
TINY = ("--device cpu --dtype float32 --n_layer 1 --n_embd 32 --n_head 2 --world_pairs 300 --vocab_size 600 "
        "--max_new_tokens 24 --block_size 64 --sft_steps 80 --sft_lr 1e-2 --score_steps 4 --judge_runs 1 --prompts 16 --responses 8 "
        "--batch 32 --steps 6 --prealign_steps 12 --prealign_lr 3e-3 --margin 10% --eval_prompts 8 "
        "--eval_responses 4").split()  # its λ* is positive, else there would be little to test


def command(*flags, cwd=ROOT):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=cwd, capture_output=True,
                          text=True, encoding="utf-8", timeout=300)


def job(*flags):
    """The same in this process."""
    argv, sys.argv = sys.argv, ["train.py", *map(str, flags)]
    try:
        train.main()
    finally:
        sys.argv = argv


def numbers(out):
    """results.json without what differs between equal runs: where, and how long."""
    results = json.loads((out / "results.json").read_text())
    for row in results["policies"].values():
        row.pop("seconds", None)
    return {key: results[key] for key in results if key != "config"}


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def weights(out, name):
    return torch.load(out / name, weights_only=True)["weights"]


def same_weights(a, b, name):
    return all(torch.equal(x, y) for x, y in zip(weights(a, name).values(), weights(b, name).values(), strict=True))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    return command("--quick", "--device", "cpu", "--dtype", "float32", "--out", out), out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    job(*TINY, "--out", out)
    return out


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "run"))


# ---- the quick run, as a user starts it

def test_the_quick_run_succeeds(quick):
    done, _ = quick
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_results_hold_what_readers_rely_on(quick):
    results = json.loads((quick[1] / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"config", "policies", "frontier", "confirmed"}
    assert set(results["config"]) == {*train.SETTINGS, "run"} and results["config"]["quick"] is True
    b = results["policies"]["mocan"]["margin"]
    assert len(b) == 1
    assert list(results["policies"]) == [*POLICIES, "optimum"]
    for name, row in results["policies"].items():
        for value, ci in (("reward_gain", row["reward_gain_ci"]), ("kl", row["kl_ci"])):
            assert ci[0] <= row[value] <= ci[1]
        assert row["constraint_gain_ci"][0][0] <= row["constraint_gain"][0] <= row["constraint_gain_ci"][0][1]
        assert (row["seconds"] > 0) == (name != "optimum") and row["margin"] == b
        assert len(row["lam"]) == (name in ("mocan", "pecan", "optimum"))
    for name in ("mocan", "pecan"):
        predicted = results["policies"][name]["predicted"]
        assert set(predicted) >= {"lam", "lam_se", "score_gain", "constraint_gain", "kl", "ess"}
        assert predicted["lam"] == results["policies"][name]["lam"]


def test_the_optimum_is_that_of_the_evaluation_prompts(quick):
    rows = json.loads((quick[1] / "results.json").read_text())["policies"]
    best, b = rows["optimum"], rows["mocan"]["margin"][0]
    assert best["constraint_gain"] == pytest.approx([b], rel=1e-6) and best["lam"][0] > 0
    for name in ("mocan", "pecan"):  # no policy is above its Lagrangian value, by more than sampling explains
        row = rows[name]
        value = row["reward_gain"] + best["lam"][0] * (row["constraint_gain"][0] - b) - row["kl"]
        assert value < best["reward_gain"] - best["kl"] + 0.05


def test_the_reference_row_is_the_zero_of_the_table(quick):
    row = json.loads((quick[1] / "results.json").read_text())["policies"]["reference"]
    assert row["reward_gain"] == row["constraint_gain"][0] == 0
    assert abs(row["kl"]) < 1e-4  # sampled and recomputed log-probabilities agree


def test_the_dual_meets_its_margin(quick):
    rows = json.loads((quick[1] / "results.json").read_text())["policies"]
    for name in ("mocan", "pecan"):  # of the same absolute margin
        assert rows[name]["lam"][0] > 0
        assert rows[name]["predicted"]["constraint_gain"] == pytest.approx(rows["mocan"]["margin"], rel=1e-6)


def test_samples_have_the_fields_that_judges_read(quick):
    rows = [json.loads(line) for line in (quick[1] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"instruction", "output", "generator", "scores"} and len(row["scores"]) == 2 for row in rows)
    c = json.loads((quick[1] / "results.json").read_text())["config"]
    per_policy = {name: [row["instruction"] for row in rows if row["generator"] == name] for name in POLICIES}
    assert all(asked == per_policy["reference"] for asked in per_policy.values())  # the same prompts, in the same order
    assert len(rows) == len(POLICIES) * len(set(per_policy["reference"])) * c["eval_responses"]


def test_the_table_has_a_row_for_every_policy_and_the_optimum(quick):
    lines = quick[0].stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if "reward gain" in line and "harmless gain" in line)
    rows = lines[header + 1:header + 2 + len(POLICIES)]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == [*POLICIES, "optimum"]
    assert all(word in lines[header] for word in ("holds", "KL", "λ*", "seconds"))


def test_settings_and_three_samples_of_every_policy_are_printed(quick):
    text, (_, out) = quick[0].stdout, quick
    said = json.loads(text.splitlines()[0].removeprefix("settings: "))
    assert said["margin"] == "50%" and set(said) == {*train.SETTINGS, "run"}
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    headings = [f"\n  {prompt}\n" for prompt in {row["instruction"] for row in rows}]
    shown = [text.index(heading) for heading in headings if heading in text]
    assert len(shown) == 3
    for at in shown:
        policies = [line.split(":")[0].strip() for line in text[at + 1:].splitlines()[1:1 + len(POLICIES)]]
        assert policies == POLICIES


def test_progress_says_rate_loss_and_time_left_without_control_characters(quick):
    assert re.search(r"mocan \d+/200  loss \d\.\d+  [\d.]+/s  \d+ s elapsed, \d+ s left", quick[0].stdout)
    assert "\r" not in quick[0].stdout and quick[0].stdout.count("mocan ") < 40


def test_every_stage_leaves_its_artifact(quick):
    tensors = {"reference.pt", "offline.pt", "offline_scores.pt", "dpo-helpful.pt", "dpo-harmless.pt",
               "prealign_scores.pt", "mocan.pt", "pecan.pt"}
    others = {"run.json", "tokenizer.pt", "results.json", "samples.jsonl", "lock"}
    assert set(os.listdir(quick[1])) == tensors | others
    saved = {name: load(quick[1] / name, "") for name in tensors}
    assert all(x["made_from"]["quick"] is True and x["seconds"] > 0 for x in saved.values())
    assert saved["prealign_scores.pt"]["scores"].shape == saved["offline_scores.pt"]["scores"].shape
    pieces = load(quick[1] / "tokenizer.pt", "")["pieces"]
    assert pieces and all(isinstance(piece, str) for piece in pieces)


def test_the_same_seed_gives_the_same_run_bit_for_bit(tiny, tmp_path):
    job(*TINY, "--out", tmp_path)
    assert numbers(tmp_path) == numbers(tiny)
    assert (tmp_path / "samples.jsonl").read_bytes() == (tiny / "samples.jsonl").read_bytes()
    assert all(same_weights(tmp_path, tiny, f"{name}.pt") for name in POLICIES)


def test_another_seed_gives_another_run(tiny, tmp_path):
    job(*TINY, "--out", tmp_path, "--seed", 1, "--algo", "mocan")
    assert not same_weights(tmp_path, tiny, "mocan.pt")
    assert list(numbers(tmp_path)["policies"])[:2] == ["reference", "mocan"]


def test_from_mocan_reuses_the_earlier_stages_and_repeats_the_later_ones(tiny, tiny_copy):
    before = {name: os.stat(tiny_copy / name).st_mtime_ns for name in os.listdir(tiny_copy)}
    job("--from", "mocan", "--out", tiny_copy)
    changed = {name for name, at in before.items() if os.stat(tiny_copy / name).st_mtime_ns != at}
    assert changed == {"run.json", "mocan.pt", "pecan.pt", "results.json", "samples.jsonl"}
    assert numbers(tiny_copy) == numbers(tiny)


def test_from_evaluate_changes_no_policy(tiny, tiny_copy):
    job("--from", "evaluate", "--out", tiny_copy, "--eval_responses", 2)
    assert json.loads((tiny_copy / "run.json").read_text())["config"]["eval_responses"] == 2  # the next --from keeps it
    assert all((tiny_copy / f"{name}.pt").read_bytes() == (tiny / f"{name}.pt").read_bytes() for name in POLICIES)
    results = json.loads((tiny_copy / "results.json").read_text())
    assert (results["config"]["eval_responses"], results["config"]["steps"]) == (2, 6)
    assert results["policies"]["mocan"]["lam"] == numbers(tiny)["policies"]["mocan"]["lam"]


def test_how_one_evaluates_changes_no_training_number(tiny, tmp_path):
    job(*TINY, "--out", tmp_path, "--eval_responses", 3, "--eval_prompts", 5)
    assert all(same_weights(tmp_path, tiny, f"{name}.pt") for name in POLICIES)
    assert numbers(tmp_path)["policies"]["mocan"]["predicted"] == numbers(tiny)["policies"]["mocan"]["predicted"]


def test_a_new_margin_from_the_dual_on_keeps_the_samples(tiny, tiny_copy):
    job("--from", "dual", "--out", tiny_copy, "--margin", "4%", "--algo", "mocan")
    assert (tiny_copy / "offline.pt").read_bytes() == (tiny / "offline.pt").read_bytes()
    old, new = numbers(tiny)["policies"]["mocan"], numbers(tiny_copy)["policies"]["mocan"]
    assert new["margin"][0] == pytest.approx(0.4 * old["margin"][0]) and 0 < new["lam"][0] < old["lam"][0]
    assert not same_weights(tiny_copy, tiny, "mocan.pt")


def test_a_new_margin_keeps_the_pre_aligned_policies(tiny, tiny_copy):
    job("--from", "dual", "--out", tiny_copy, "--margin", "4%")
    assert all((tiny_copy / f"{name}.pt").read_bytes() == (tiny / f"{name}.pt").read_bytes()
               for name in ("dpo-helpful", "dpo-harmless"))
    assert not same_weights(tiny_copy, tiny, "pecan.pt")


def test_artifacts_of_other_settings_are_not_mixed_in(tiny_copy):
    job("--from", "mocan", "--out", tiny_copy, "--algo", "mocan", "--lr", "3e-4")
    with pytest.raises(ValueError, match=r"pecan\.pt: made with lr 0\.0002, not 0\.0003; .* --from pecan$"):
        job("--from", "evaluate", "--out", tiny_copy, "--algo", "all")
    job(*TINY, "--out", tiny_copy, "--seed", 1, "--algo", "mocan")
    with pytest.raises(ValueError, match=r"dpo-helpful\.pt: made with seed 0, not 1; make it with --from prealign$"):
        job("--from", "evaluate", "--out", tiny_copy, "--algo", "all")


def test_pecan_warns_of_what_mocan_warned_of_too(tmp_path, capsys):
    pairs = [{"helpful": {"pairs": sign * torch.ones(20, 2).cumsum(1)}} for sign in (1, -1)]
    with warnings.catch_warnings():  # it puts back what enter sets
        lock = train.enter(train.settings(["--out", str(tmp_path), "--device", "cpu"]))
        for _ in range(2):
            mocan.confirm([torch.tensor([[[1.0, 2.0]] * 5]), torch.tensor([[[2.0, 1.0]] * 5])], pairs, ["helpful"])
    lock.close()
    assert capsys.readouterr().out.count("warning: two judges do not agree") == 2


def test_a_run_that_was_cut_short_leaves_no_stale_policy_to_evaluate(tiny_copy):
    with pytest.raises(FloatingPointError):
        job("--from", "dual", "--out", tiny_copy, "--margin", "4%", "--lr", "1e30", "--algo", "mocan")
    with pytest.raises(ValueError, match=r"mocan\.pt: made with margin 10%, not 4%; make it with --from mocan$"):
        job("--from", "evaluate", "--out", tiny_copy)


def change(path, **what):
    """Those entries of an artifact's made_from; None takes one away."""
    saved = torch.load(path, weights_only=True)
    made_from = {**saved["made_from"], **what}
    saved["made_from"] = {name: value for name, value in made_from.items() if value is not None}
    torch.save(saved, path)


def test_a_policy_of_another_margin_is_not_evaluated(tiny_copy):
    change(tiny_copy / "mocan.pt", **{"input b": [0.5]})
    with pytest.raises(ValueError, match=r"mocan\.pt: made with input b \[0\.5\], not \[0\.\d+\]; .* --from mocan$"):
        job("--from", "evaluate", "--out", tiny_copy)


INPUTS = {"tokenizer": "data", "reference": "tokenizer", "offline": "policy", "offline_scores": "samples",
          "dpo-helpful": "reference", "prealign_scores": "scorers", "mocan": "scores", "pecan": "policy"}


@pytest.mark.parametrize("name, parent", INPUTS.items())
def test_an_artifact_with_one_input_or_setting_more_or_fewer_is_refused(tiny, tiny_copy, name, parent):
    """Both sides are compared in full: a key that only one of them has refuses, as another value does."""
    path = tiny_copy / f"{name}.pt"
    whole = path.read_bytes()
    for what, value in ((f"input {parent}", None), ("input new", "x"), ("seed", None), ("a_setting", 3),
                        (f"input {parent}", "another run")):
        change(path, **{what: value})
        with pytest.raises(ValueError, match=rf"{name}\.pt: made with {what} .*, not .*; make it with --from \w+$"):
            job("--from", "evaluate", "--out", tiny_copy)
        path.write_bytes(whole)
    job("--from", "evaluate", "--out", tiny_copy)
    assert numbers(tiny_copy) == numbers(tiny)


def test_an_artifact_says_which_runs_made_its_inputs(tiny):
    saved = {path.stem: torch.load(path, weights_only=True) for path in tiny.glob("*.pt")}
    run = json.loads((tiny / "run.json").read_text())["config"]["run"]
    assert len(run) > 8 and all(x["run"] == run for x in saved.values())
    inputs = {name: {key.removeprefix("input ") for key in x["made_from"] if key.startswith("input ")}
              for name, x in saved.items()}
    scores, policy = {"samples", "scorers"}, {"policy", "scores", "b"}
    assert inputs == {"tokenizer": {"data"}, "reference": {"tokenizer"}, "offline": {"policy"}, "offline_scores": scores,
                      "dpo-helpful": {"reference"}, "dpo-harmless": {"reference"}, "prealign_scores": scores,
                      "mocan": policy, "pecan": policy}
    assert saved["prealign_scores"]["made_from"]["input scorers"] == [run, run]


def test_a_reference_of_ones_own_is_taken(tiny, tiny_copy):
    """It says nothing of where it comes from; when it was written stands for its run."""
    saved = torch.load(tiny / "reference.pt", weights_only=True)
    torch.save({name: saved[name] for name in ("config", "weights")}, tiny_copy / "reference.pt")
    with pytest.raises(ValueError, match=r"offline\.pt: made with input policy \w+, not [\d.]+; .* --from offline$"):
        job("--from", "mocan", "--out", tiny_copy)
    job("--from", "offline", "--out", tiny_copy)
    assert numbers(tiny_copy) == numbers(tiny)
    job("--from", "evaluate", "--out", tiny_copy)  # again and again, as long as it stays
    os.utime(tiny_copy / "reference.pt", (1, 1))
    with pytest.raises(ValueError, match=r"offline\.pt: made with input policy [\d.]+, not 1\.0; .* --from offline$"):
        job("--from", "mocan", "--out", tiny_copy)


@pytest.mark.parametrize("row, message", [(0, "^score: NaN or inf at prompt 3;"), (1, "^constraint 0: NaN or inf at prompt 3;")])
def test_scores_of_ones_own_that_are_not_finite_are_named(tiny, tiny_copy, row, message):
    scores = torch.load(tiny / "offline_scores.pt", weights_only=True)["scores"]
    scores[row, 3, 1] = float("nan")
    torch.save({"scores": scores}, tiny_copy / "offline_scores.pt")
    with pytest.raises(ValueError, match=message):
        job("--from", "mocan", "--out", tiny_copy)


@pytest.mark.parametrize("change", [lambda s: s.double(), lambda s: s.tolist()])
def test_scores_of_ones_own_may_be_of_any_kind(tiny, tiny_copy, change):
    scores = torch.load(tiny / "offline_scores.pt", weights_only=True)["scores"]
    torch.save({"scores": change(scores)}, tiny_copy / "offline_scores.pt")
    job("--from", "mocan", "--out", tiny_copy, "--algo", "mocan")
    assert same_weights(tiny, tiny_copy, "mocan.pt")


def test_scores_of_ones_own_serve_one_shot(tiny, tiny_copy):
    """A second shot's responses would have no such scores."""
    scores = torch.load(tiny / "offline_scores.pt", weights_only=True)["scores"]
    torch.save({"scores": scores}, tiny_copy / "offline_scores.pt")
    with pytest.raises(ValueError, match=r"offline_scores\.pt: scores of one's own serve one shot; --shots 1$"):
        job("--from", "mocan", "--out", tiny_copy, *SHOTS)


@pytest.mark.parametrize("change", [lambda s: s[:, 1:], lambda s: s[..., 1:], lambda s: s.mT, lambda s: torch.cat([s, s[:1]]), lambda s: s[0, 0]])
def test_scores_of_ones_own_of_another_shape_are_refused(tiny, tiny_copy, change):
    scores = torch.load(tiny / "offline_scores.pt", weights_only=True)["scores"]
    torch.save({"scores": change(scores).clone()}, tiny_copy / "offline_scores.pt")
    with pytest.raises(ValueError, match=r"offline_scores\.pt: scores of .*; expected helpful, harmless, of \(\d+, \d+\) each"):
        job("--from", "mocan", "--out", tiny_copy)


def test_too_little_memory_is_one_line(tmp_path):
    done = command(*TINY, "--out", tmp_path, "--n_embd", 10**12)
    assert done.returncode == 1 and "smaller sizes" in one_line_on_stderr(done)


# ---- other ways through the job

def test_two_constraints(tmp_path, capsys):
    job(*TINY, "--out", tmp_path, "--constraints", "harmless,polite", "--margin", "5%,10%")
    rows = numbers(tmp_path)["policies"]
    assert list(rows) == ["reference", "dpo-helpful", "dpo-harmless", "dpo-polite", "mocan", "pecan", "optimum"]
    assert all(len(row["constraint_gain"]) == 2 for row in rows.values())
    assert all(len(rows[name]["lam"]) == 2 for name in ("mocan", "pecan"))
    assert "polite gain" in capsys.readouterr().out


SHOTS = ["--shots", 2, "--shot_steps", 3, "--shot_responses", 4]


def test_a_second_shot_starts_from_the_first_and_has_a_row(tiny, tmp_path):
    job(*TINY, "--out", tmp_path, *SHOTS)
    rows = numbers(tmp_path)["policies"]
    assert list(rows) == [*POLICIES[:-1], "mocan shot 2", "pecan", "pecan shot 2", "optimum"]
    assert all(same_weights(tmp_path, tiny, f"{name}.pt") for name in POLICIES)  # the first shots are the plain run's
    for name in ("mocan", "pecan"):
        assert rows[f"{name} shot 2"]["margin"] == rows[name]["margin"]
        assert rows[f"{name} shot 2"]["lam"] != rows[name]["lam"] and len(rows[f"{name} shot 2"]["lam"]) == 1
        first, second = weights(tmp_path, f"{name}.pt"), weights(tmp_path, f"{name}_shot_2.pt")
        assert not torch.equal(first["wte.weight"], second["wte.weight"])
    before = (tmp_path / "mocan_shot_2.pt").read_bytes()
    job("--from", "evaluate", "--out", tmp_path)
    assert numbers(tmp_path)["policies"] == rows and (tmp_path / "mocan_shot_2.pt").read_bytes() == before
    for name in ("mocan", "pecan"):  # a first shot that another run made
        whole = (tmp_path / f"{name}.pt").read_bytes()
        torch.save({**torch.load(tmp_path / f"{name}.pt", weights_only=True), "run": "another"}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=rf"{name}_shot_2_responses\.pt: made with input policy \w+, not another; .* --from {name}$"):
            job("--from", "evaluate", "--out", tmp_path)
        (tmp_path / f"{name}.pt").write_bytes(whole)


def test_shots_of_several_constraints(tmp_path):
    job(*TINY, "--out", tmp_path, *SHOTS, "--algo", "mocan", "--constraints", "harmless,polite", "--margin", "5%,5%")
    rows = numbers(tmp_path)["policies"]
    assert list(rows) == ["reference", "mocan", "mocan shot 2", "optimum"]
    assert len(rows["mocan shot 2"]["lam"]) == 2


def test_the_frontier_goes_from_no_constraint_through_the_optimum(quick):
    results = numbers(quick[1])
    gains = [row["constraint_gain"][0] for row in results["frontier"]]
    rewards = [row["reward_gain"] for row in results["frontier"]]
    assert len(gains) == 31 and gains == sorted(gains) and rewards == sorted(rewards, reverse=True)
    middle = dict(results["policies"]["optimum"])
    assert {name: middle[name] for name in results["frontier"][15]} == results["frontier"][15]


def test_progress_has_a_line_at_once_every_ten_seconds_and_at_the_end(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(mocan.time, "monotonic", lambda: now[0])
    progress = mocan.Progress(mocan.Recipe("stage", 250))
    for step in range(1, 251):
        now[0] = 0.125 * step  # 31.25 s in all
        progress.report(None)
    assert capsys.readouterr().out.splitlines() == [
        "  stage 1/250  8.0/s  0 s elapsed, 31 s left", "  stage 81/250  8.0/s  10 s elapsed, 21 s left",
        "  stage 161/250  8.0/s  20 s elapsed, 11 s left", "  stage 241/250  8.0/s  30 s elapsed, 1 s left",
        "  stage 250/250  8.0/s  31 s elapsed, 0 s left"]


def test_a_resumed_loop_reckons_from_where_it_goes_on(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(mocan.time, "monotonic", lambda: now[0])
    recipe = mocan.Recipe("stage", 250, run=argparse.Namespace(out=str(tmp_path), run="x", resume=True, checkpoint_every=10))
    data.save({"loop": ["x", "stage"], "done": [None] * 200, "best": {}}, tmp_path / "checkpoint.pt")
    progress = mocan.Progress(recipe)
    now[0] = 11.0
    progress.report(None)
    assert capsys.readouterr().out.splitlines()[-1] == "  stage 201/250  0.1/s  11 s elapsed, 539 s left"


def test_what_a_published_judge_says_is_asked_again_when_its_folder_changes(tmp_path):
    folder, _ = chat_folder(tmp_path / "judge", "LlamaForSequenceClassification")
    pairs = data.world_preferences(4)

    def run():
        return mocan.ready_judges([f"helpful={folder}"], ["helpful"], pairs, "cpu")[0]["helpful"]["run"]
    before = run()
    assert run() == before
    os.utime(folder / "tokenizer_config.json", (2e9, 2e9))
    assert run() != before


def test_pecan_alone_needs_no_score_but_is_judged(tmp_path):
    job(*TINY, "--out", tmp_path, "--algo", "pecan")
    assert list(numbers(tmp_path)["policies"]) == ["reference", "dpo-helpful", "dpo-harmless", "pecan", "optimum"]
    results = numbers(tmp_path)
    assert not (tmp_path / "mocan.pt").exists()
    assert results["policies"]["pecan"]["predicted"]["lam"] == results["policies"]["pecan"]["lam"]


def test_implicit_scores_are_what_second_judges_confirm_of_them(tmp_path, monkeypatch, capsys):
    """PeCAN's policies learn from one half of the conversations; the judges of the other half say how much of their scores
    holds. What mocan.confirm is given is worked out anew from the artifacts."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(200)))
    trained, given = [], []
    real_prealign, real_confirm = train.pecan.prealign, mocan.confirm

    def confirm(said, judges, names):
        confirmed = real_confirm(said, judges, names)
        given.append((said, [[some[name]["pairs"] for name in names] for some in judges], confirmed["units"]))
        return confirmed
    monkeypatch.setattr(train.pecan, "prealign", lambda policy, pool, *rest: (trained.append(pool), real_prealign(policy, pool, *rest))[1])
    monkeypatch.setattr(mocan, "confirm", confirm)
    real_units, used = mocan.in_units, []
    monkeypatch.setattr(mocan, "in_units", lambda units, said: (used.append(units), real_units(units, said))[1])
    out = tmp_path / "out"
    job(*TINY, "--out", out, "--data", path, "--algo", "pecan", "--score_steps", 60, "--prealign_steps", 60)
    printed = capsys.readouterr().out
    assert "of what its judge says is confirmed by a second one" in printed
    [(said, on_pairs, (M, U))] = given
    assert not torch.equal(M, torch.eye(2))  # they agree
    kept = {name: load(out / f"{name}.pt", "") for name in ("reference", "dpo-helpful", "dpo-safe", "score_helpful_second", "score_safe_second",
                                                            "offline", "prealign_scores", "tokenizer")}
    tok = data.open_tokenizer(kept["tokenizer"]["pieces"], 40, 24)
    split = data.split_pairs(data.load_preferences([str(path)]), 0.2, 0.1)
    pool, pairs = Pool(kept["offline"]["tokens"], kept["offline"]["response_mask"]), data.pair_pool(tok, split.calibration, "")

    def says(name, texts):
        return mocan.map_pool(train.from_checkpoint(kept[name]), texts)
    for j, name in enumerate(("helpful", "safe")):
        tau = kept[f"dpo-{name}"]["tau"]
        for texts, first, second in ((pool, said[0][j], said[1][j]), (pairs, on_pairs[0][j], on_pairs[1][j])):
            assert torch.allclose(first, tau * (says(f"dpo-{name}", texts) - says("reference", texts)), atol=1e-4)
            assert torch.allclose(second, says(f"score_{name}_second", texts), atol=1e-5)
    assert torch.allclose(kept["prealign_scores"]["scores"], torch.tensordot(M, said[0], 1), atol=1e-5)
    assert torch.allclose(kept["prealign_scores"]["second"], torch.tensordot(U, said[1], 1), atol=1e-5)
    learned = sorted({data.conversation(pair.prompt) for pair in split.train})[::2]
    assert all(len(p.tokens) == sum(data.conversation(pair.prompt) in learned for pair in split.train) for p in trained)
    # no judge labels here: the table is by those that confirm, in the units of b
    assert all(len(units) == 1 and torch.equal(units[0], U) for units in used[1:]) and "by the second judges, which" not in printed
    results = json.loads((out / "results.json").read_text())
    assert torch.allclose(torch.tensor(results["confirmed"]["units"][0]), M) and 0 < results["confirmed"]["error"][0][0] < 1
    rows_found = results["policies"]
    assert rows_found["pecan"]["second"]["reward_gain"] == rows_found["pecan"]["reward_gain"]


def test_mocan_alone_needs_no_pre_alignment(tmp_path):
    job(*TINY, "--out", tmp_path, "--algo", "mocan")
    results = numbers(tmp_path)
    assert list(results["policies"]) == ["reference", "mocan", "optimum"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(("dpo-", "pairs", "pecan"))]


def test_scores_of_a_file_are_learned(tmp_path, capsys):
    rows = data.world_preferences(300)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({
        "prompt": pair.prompt, "response_0": pair.responses[0], "response_1": pair.responses[1],
        "better_response_id": pair.prefers["helpful"], "safer_response_id": pair.prefers["harmless"]}) + "\n"
        for pair in rows))
    job(*TINY, "--out", tmp_path, "--data", tmp_path / "pairs.jsonl", "--algo", "mocan", "--accumulate", 2)
    said = capsys.readouterr().out
    assert (tmp_path / "score_helpful.pt").exists() and (tmp_path / "score_safe.pt").exists()
    assert re.search(r"safe, evaluation: [\d.]+% of \d+ pairs right", said)


def slice_of(path, rows, to):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        to.write_text("".join(line for line, _ in zip(lines, range(rows))), encoding="utf-8")
    return to


def test_real_data_end_to_end(read_shared, tmp_path, capsys):
    path = slice_of(read_shared("data/dual_pairs.jsonl.gz"), 120, tmp_path / "pairs.jsonl")
    job(*TINY, "--out", tmp_path / "out", "--data", path)
    said, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    assert "constraints: safe" in said and list(results["policies"])[2] == "dpo-safe"
    for name in ("helpful", "safe"):
        assert re.search(rf"{name}, evaluation: [\d.]+% of \d+ pairs right; τ = [\d.]+; ", said)
    assert re.search(r"\d+ of \d+ prompts lost their beginning", said)
    parts = re.search(r"(\d+) training, (\d+) calibration and (\d+) evaluation pairs", said)
    assert sum(map(int, parts.groups())) == 120
    held_out_rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    prompts = {json.loads(line)["prompt"].strip() for line in path.read_text().splitlines()}
    assert {row["instruction"] for row in held_out_rows} <= prompts


def test_a_safety_only_file_stands_next_to_one_with_both_preferences(read_shared, tmp_path, capsys, monkeypatch):
    both = slice_of(read_shared("data/dual_pairs.jsonl.gz"), 60, tmp_path / "both.jsonl")
    safety = slice_of(read_shared("data/safety_pairs.jsonl.gz"), 60, tmp_path / "safety.jsonl")
    learned, real = [], mocan.train_score  # how many training pairs each score model gets
    monkeypatch.setattr(mocan, "train_score", lambda model, preferences, *rest: (
        learned.append(len(preferences.tokens)), real(model, preferences, *rest)))
    job(*TINY, "--out", tmp_path / "out", "--algo", "mocan", "--data", both, safety)
    said = capsys.readouterr().out
    train_pairs, calibration, evaluation = map(int, re.search(
        r"(\d+) training, (\d+) calibration and (\d+) evaluation", said).groups())
    judged = {name: int(re.search(rf"{name}, evaluation: .* of (\d+) pairs right", said)[1])
              for name in ("helpful", "safe", "helpful second", "safe second")}
    assert len(learned) == 4  # the first judges, then the second, of the other half of the conversations
    assert judged["safe"] == judged["safe second"] == evaluation and judged["helpful"] == judged["helpful second"]
    assert learned[1] + learned[3] == train_pairs and train_pairs + calibration + evaluation == 120
    assert learned[0] < learned[1] and learned[2] < learned[3] and judged["helpful"] < judged["safe"]


# ---- who sees which prompts

def test_training_calibration_and_evaluation_share_no_conversation(tmp_path, monkeypatch):
    """Every loop trains on training pairs, every temperature and early stop is the calibration pairs', the offline samples
    are training prompts', and the table is evaluation prompts'."""
    rows = [{"prompt": pair.prompt, "response_0": pair.responses[0], "response_1": pair.responses[1],
             "better_response_id": pair.prefers["helpful"], "safer_response_id": pair.prefers["harmless"]}
            for pair in data.world_preferences(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = data.split_pairs(data.load_preferences([str(tmp_path / "pairs.jsonl")]), 0.2, 0.1)
    groups = {part: {data.conversation(pair.prompt) for pair in getattr(split, part)} for part in split._fields}
    owner, seen = {}, {}  # a pool's tokens -> its group; what was done -> on which groups

    def group_of(prompts):
        talks = {data.conversation(prompt) for prompt in prompts}
        return next(part for part, known in groups.items() if talks <= known)

    def spy(module, name, note):
        real = getattr(module, name)

        def call(*args, **more):
            note(*args)
            return real(*args, **more)
        monkeypatch.setattr(module, name, call)
    real_pool = data.pair_pool

    def pair_pool(tok, pairs, what):
        pool = real_pool(tok, pairs, what)
        owner[id(pool.tokens)] = group_of(pair.prompt for pair in pairs), pool  # kept, so that the id stays its own
        return pool
    monkeypatch.setattr(data, "pair_pool", pair_pool)
    real_preferences = mocan.preferences

    def preferences(pairs, *rest):
        found = real_preferences(pairs, *rest)
        owner[id(found.tokens)] = group_of(pair.prompt for pair in pairs), found
        return found
    monkeypatch.setattr(mocan, "preferences", preferences)

    def on(what, pool):
        seen.setdefault(what, set()).add(owner[id(pool.tokens)][0])
    spy(mocan, "train_reference", lambda model, a, b, *_: (on("sft", a), on("sft stops", b)))
    spy(mocan, "train_score", lambda model, a, b, *_: (on("judge", a), on("judge stops", b)))
    spy(train.pecan, "prealign", lambda policy, a, b, *_: (on("pre 0", a), on("pre 1", b)))
    spy(mocan, "learn_score", lambda model, name, a, b, c, *_: [on(f"learn {i}", x) for i, x in enumerate((a, b, c))])
    spy(train.mocan, "sample_pool", lambda policy, tok, prompts, K, recipe: seen.setdefault(recipe.stage, set()).add(
        group_of(prompts)))
    count = {len(split.calibration): "calibration", len(split.evaluation): "evaluation", len(split.train): "train"}
    assert len(count) == 3
    for module, name in ((mocan, "calibrate"), (mocan, "calibrated_loss"), (train.pecan, "calibrated_loss")):
        spy(module, name, lambda chosen, *_, name=name: seen.setdefault(name, []).append(count[len(chosen)]))
    job(*TINY, "--sft_steps", 30, "--score_steps", 20, "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "out",
        "--shots", 2, "--shot_steps", 2, "--shot_responses", 4)
    assert seen["sft"] == seen["judge"] == seen["learn 0"] == seen["pre 0"] == {"train"}
    assert seen["sft stops"] == seen["judge stops"] == seen["learn 1"] == seen["pre 1"] == {"calibration"}
    assert seen["learn 2"] == {"evaluation"}
    assert seen["offline"] == seen["mocan shot 2 responses"] == {"train"}
    assert seen["evaluate reference"] == seen["evaluate mocan"] == {"evaluation"}
    assert set(seen["calibrated_loss"]) == {"calibration"} and set(seen["calibrate"]) == {"calibration", "evaluation"}
    assert seen["calibrate"].count("evaluation") == 4  # what is said of the judges, and used for nothing


# ---- GPT-2's weights in and out

@pytest.fixture
def small_gpt2(tmp_path, monkeypatch, read_shared):
    """A folder with a random GPT-2 of width 16 in the published layout, and its model."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(read_shared("tiktoken_cache")))
    torch.manual_seed(5)
    small = GPT(GPTConfig(vocab_size=50257, block_size=96, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in small.parameters():
            p += 0.05 * torch.randn_like(p)  # biases and gains too
    export(small, str(tmp_path / "gpt2"))
    return tmp_path / "gpt2", small


def pku_file(path, count=80):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


BRIEF = ("--device cpu --dtype float32 --max_new_tokens 12 --block_size 48 --sft_steps 4 --score_steps 4 --prompts 8 "
         "--responses 8 --batch 8 --steps 3 --prealign_steps 3 --margin 5% --eval_prompts 4 --eval_responses 2").split()


def test_the_whole_job_from_published_weights_to_exported_ones(small_gpt2, tmp_path):
    folder, start = small_gpt2
    job(*BRIEF, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--algo", "all", "--shots", 2,
        "--margin", 0, "--shot_steps", 2, "--shot_responses", 4, "--out", tmp_path / "out", "--export", tmp_path / "export")
    policies = ["dpo-helpful", "dpo-safe", "mocan", "mocan shot 2", "pecan", "pecan shot 2"]
    assert list(numbers(tmp_path / "out")["policies"]) == ["reference", *policies, "optimum"]
    assert sorted(os.listdir(tmp_path / "export")) == [
        *(name.replace(" ", "_") for name in policies), "score_helpful", "score_helpful_second", "score_safe", "score_safe_second"]
    for name in policies:
        exported = GPT.from_pretrained(str(tmp_path / "export" / name.replace(" ", "_")))
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")  # the folder's: --n_embd etc. count for nothing
        assert [getattr(exported.config, size) for size in sizes] == [getattr(start.config, size) for size in sizes]
        kept = weights(tmp_path / "out", f"{name.replace(' ', '_')}.pt")
        assert kept.keys() == exported.state_dict().keys()
        assert all(torch.equal(kept[what], x) for what, x in exported.state_dict().items())
        assert not torch.equal(exported.wte.weight, start.wte.weight)
        assert sorted(os.listdir(tmp_path / "export" / name.replace(" ", "_"))) == ["config.json", "model.safetensors", "tokenizer.json"]
    moved = weights(tmp_path / "out", "reference.pt")["wte.weight"] - start.wte.weight
    assert 0 < moved.abs().max() < 4 * 5e-5 + 1e-6  # four of Adam's steps away from the folder's weights
    job("--from", "mocan", "--algo", "mocan", "--lr", 1e-4, "--out", tmp_path / "out")  # its settings are kept
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["init"] == str(folder)


def test_the_reference_starts_from_the_folders_weights(small_gpt2, tmp_path):
    """At a learning rate of next to nothing, the reference is what the folder holds."""
    folder, start = small_gpt2
    path = pku_file(tmp_path / "pairs.jsonl", 30)
    c = train.settings([*BRIEF, "--init", str(folder), "--data", str(path), "--sft_lr", "1e-30", "--out", str(tmp_path)])
    split, _ = data.load_pairs(c.data, c.world_pairs, c.held_out, c.calibration, c.constraints)
    tok, tokenizer, _ = train.tokenize(c, split)
    pools = {part: data.pair_pool(tok, getattr(split, part), part) for part in split._fields}
    reference = train.train_reference(c, tok, tokenizer, pools)["weights"]
    for a, b in zip(reference.values(), start.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-20, rtol=0)


def test_defaults_of_published_weights_give_way_to_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    c = train.settings(["--init", "folder"])
    assert (c.tokenizer, c.sft_lr, c.score_lr, c.prealign_lr, c.lr, c.shot_lr, c.beta, c.margin) == (
        "gpt2", 5e-5, 5e-5, 5e-6, 1.25e-5, 1e-5, 0.5, "50%")
    c = train.settings(["--init", "folder", "--data", "x.jsonl", "--lr", "1e-3"])
    assert (c.tokenizer, c.lr, c.shot_lr, c.margin, c.prompts) == ("gpt2", 1e-3, 1e-5, "50%", 512)  # not the data's margin and sizes
    c = train.settings(["--init", "folder", "--quick"])
    assert (c.tokenizer, c.lr, c.sft_lr, c.prompts) == ("gpt2", 1.25e-5, 5e-5, 128)


def test_adapters_on_16_bit_weights(tmp_path):
    """On a CPU too where it is asked for: the blocks' matrices in bfloat16, all else and what is trained in float32."""
    out = tmp_path / "out"
    job(*TINY, "--dtype", "bfloat16", "--lora", 2, "--algo", "mocan", "--lr", 1e-2, "--out", out)
    frozen = torch.load(out / "reference.pt", weights_only=True)["frozen"]
    assert {name for name, x in frozen.items() if x.dtype == torch.bfloat16} == {
        f"h.0.{what}.weight" for what in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert {x.dtype for name in ("reference.pt", "mocan.pt") for x in weights(out, name).values()} == {torch.float32}
    assert numbers(out)["policies"]["mocan"]["kl"] != 0


def test_the_whole_job_by_adapters(small_gpt2, tmp_path):
    """Artifacts of some kilobytes beside one file of frozen weights; what is exported is plain."""
    folder, start = small_gpt2
    flags = [*BRIEF, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--lora", 2, "--shots", 2, "--margin",
             0, "--shot_steps", 2, "--shot_responses", 4, "--lr", 1e-3, "--sft_lr", 1e-3]
    out = tmp_path / "out"
    job(*flags, "--out", out, "--export", tmp_path / "export")
    kept = torch.load(out / "reference.pt", weights_only=True)
    assert kept["frozen"].keys() == start.state_dict().keys()
    assert (kept["frozen"]["h.0.mlp.c_fc.weight"] - start.h[0].mlp.c_fc.weight).abs().max() > 1e-3  # fine-tuned, merged
    assert torch.equal(kept["frozen"]["wte.weight"], start.wte.weight)
    assert all(x.abs().max() == 0 for name, x in kept["weights"].items() if name.endswith("lora_B"))
    for path in out.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        if "weights" in saved:
            assert saved["config"]["lora"] == 2 and all("lora_" in name for name in saved["weights"].keys() - {"score_head.weight"})
            assert path.name == "reference.pt" or path.stat().st_size < 30_000 and "frozen" not in saved
    policy = train.from_checkpoint(data.load(out / "mocan_shot_2.pt", ""))
    exported = GPT.from_pretrained(str(tmp_path / "export" / "mocan_shot_2"))
    batch = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[False, False, True, True]])
    assert torch.allclose(train.mocan.sequence_logprob(policy, *batch), train.mocan.sequence_logprob(exported, *batch), atol=1e-4)
    before = contents(out)["reference.pt"]
    job("--from", "mocan", "--out", out, "--lr", 2e-3)
    assert contents(out)["reference.pt"] == before
    with pytest.raises(ValueError, match="made with lora 2, not 3; make it with --from reference"):
        job("--from", "mocan", "--out", out, "--lora", 3)


BAD_INIT = {
    "more positions than the folder's": (["--block_size", "97"], "96 positions; .* --block_size is 97$"),
    "another vocabulary": (["--tokenizer", "vocab"], r"50257 tokens and 96 positions; the tokenizer, vocab .*, has \d+ tokens"),
    "no folder": (["--init", "nowhere"], "nowhere/config.json: no JSON object"),
}


@pytest.mark.parametrize("case", BAD_INIT)
def test_published_weights_that_do_not_fit_are_one_line_and_cost_no_training(small_gpt2, tmp_path, case):
    flags, said = BAD_INIT[case]
    with pytest.raises(ValueError, match=said) as error:
        job(*BRIEF, "--init", small_gpt2[0], "--data", pku_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.glob("out/*")} <= {"lock", "run.json", "tokenizer.pt"}


def test_a_damaged_folder_of_weights_ends_the_command_in_one_line(small_gpt2, tmp_path):
    folder, _ = small_gpt2
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    done = command(*BRIEF, "--init", folder, "--world_pairs", 60, "--out", tmp_path / "out")
    assert done.returncode == 1 and one_line_on_stderr(done).startswith(f"error: {folder}: not a model as published")


# ---- chat models and published judges
def chat_folder(folder, architecture="LlamaForCausalLM", seed=0, **changes):
    """A tiny Llama with a tokenizer and ChatML, or a score model, as published."""
    torch.manual_seed(seed)
    vocab = tokenizer_json()
    size = max(vocab["model"]["vocab"].values()) + 4  # rounded up
    head = architecture.endswith("SequenceClassification")
    tied = changes.get("tie_word_embeddings", True)
    model = GPT(GPTConfig(size, 256, 2, 4, 32, score_head=head, family="llama", n_kv_head=2, n_inner=48, tied=tied, rope={"rope_theta": 1e4}))
    with torch.no_grad():
        for p in model.parameters():
            p *= 8 if p.dim() == 2 else 1
    folder.mkdir()
    files = published_folder(folder, CHATML, steps=STEPS["smollm2"])
    for path in folder.iterdir():
        path.unlink()
    files["config.json"] = json.dumps({
        "model_type": "llama", "architectures": [architecture], "vocab_size": size, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 2, "num_labels": 1,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": "bfloat16", **changes})
    export(model, str(folder), files)
    return folder, model


CHAT = ("--device cpu --dtype float32 --max_new_tokens 12 --block_size 120 --score_steps 4 --prompts 8 --responses 8 --batch 8 "
        "--steps 3 --prealign_steps 3 --margin 5% --eval_prompts 4 --eval_responses 2").split()


def test_the_whole_job_from_a_chat_model_with_published_judges(tmp_path, capsys):
    folder, start = chat_folder(tmp_path / "chat")
    judge, judge_model = chat_folder(tmp_path / "judge", "LlamaForSequenceClassification", seed=1)
    job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--judge", f"helpful={judge}", f"safe=-{judge}",
        "--out", tmp_path / "out", "--export", tmp_path / "export")
    said = capsys.readouterr().out
    assert "template: chatml, system message: Be good." in said
    assert "helpful judge, calibration: " in said and "safe judge, calibration: " in said
    kept = {name: load(tmp_path / "out" / name, "") for name in ("reference.pt", "offline.pt", "offline_scores.pt", "mocan.pt")}
    for name, x in start.state_dict().items():
        assert torch.equal(kept["reference.pt"]["weights"][name], x)  # a chat model is not fine-tuned
    scores = kept["offline_scores.pt"]["scores"]
    assert scores.std() > 0.1 and torch.equal(scores[0], -scores[1])  # the same judge, negated
    assert not (tmp_path / "out" / "score_helpful.pt").exists()
    out = tmp_path / "export" / "mocan"
    assert sorted(os.listdir(out)) == sorted([*os.listdir(folder)])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32" and config["eos_token_id"] == 2
    for name, x in GPT.from_pretrained(str(out)).state_dict().items():
        assert torch.equal(x, kept["mocan.pt"]["weights"][name])
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    files = published_files(str(folder))
    tok = published_tokenizer(files, "auto", "", 108, 12)
    pool = Pool(kept["offline.pt"]["tokens"], kept["offline.pt"]["response_mask"])
    split = load_pairs([str(tmp_path / "pairs.jsonl")], 0, 0.2, 0.1, "")[0]
    prompts = spread([pair.prompt for pair in split.train], scores.size(1))
    for i, text in enumerate(pool.texts(tok)):
        n, k = divmod(i, scores.size(2))
        if "<|" in text:  # a special token that was sampled is ordinary text to a judge
            continue
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompts[n]}, {"role": "assistant", "content": text}],
                                            return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert theirs(ids).logits.item() == pytest.approx(scores[0, n, k].item(), abs=1e-4)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and transformers.AutoTokenizer.from_pretrained(out).chat_template == CHATML


@pytest.mark.parametrize("family, how", [
    ("llama", ()), ("untied", ()), ("gpt2", ()), ("llama", ("--system", "Say 'no'.")), ("untied", ("--template", "plain"))])
def test_a_score_model_is_exported_and_read_back(family, how, small_gpt2, tmp_path, capsys):
    """What --judge makes of the exported folders is what the score models say; of a chat model Transformers says the same."""
    folder = chat_folder(tmp_path / "chat", tie_word_embeddings=family == "llama")[0] if family != "gpt2" else small_gpt2[0]
    flags = [*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--algo", "mocan", "--sft_steps", 0,
             "--score_lr", 1e-2, *(("--max_new_tokens", 128, "--block_size", 256) if family != "gpt2" else ("--block_size", 96))]  # texts are cut as by --judge
    job(*flags, *how, "--out", tmp_path / "out", "--export", tmp_path / "export")
    assert sorted(os.listdir(tmp_path / "export")) == [
        "mocan", "score_helpful", "score_helpful_second", "score_safe", "score_safe_second"]
    kept = load(tmp_path / "out" / "score_safe.pt", "")
    assert kept["pairs"].std() > 1e-3
    exported = tmp_path / "export" / "score_safe"
    model = GPT.from_pretrained(str(exported))
    assert all(torch.equal(x, kept["weights"][name]) for name, x in model.state_dict().items()) and model.config.score_head
    pairs = load_pairs([str(tmp_path / "pairs.jsonl")], 0, 0.2, 0.1, "")[0].calibration
    if family != "gpt2":  # which has no tokenizer.json
        judges = mocan.ready_judges([f"safe={exported}"], ["helpful", "safe"], pairs, "cpu")
        assert torch.allclose(judges[0]["safe"]["pairs"], kept["pairs"], atol=1e-5)
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()) and theirs.config.num_labels == 1
    if family != "gpt2":
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
        for pair, expected in zip(pairs, kept["pairs"].tolist()):
            for y, score in zip(pair.responses, expected):
                ids = tokenizer.apply_chat_template([{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": y}],
                                                    return_tensors="pt", return_dict=False)
                if ids.size(1) < 128:
                    assert theirs(ids).logits.item() == pytest.approx(score, abs=1e-4)


def test_a_second_published_judge_measures_and_scores_are_what_it_confirms(tmp_path, capsys):
    folder, _ = chat_folder(tmp_path / "chat")
    one, first = chat_folder(tmp_path / "one", "LlamaForSequenceClassification", seed=1)
    other, second = chat_folder(tmp_path / "other", "LlamaForSequenceClassification", seed=1)
    with torch.no_grad():
        for p in second.parameters():
            p += 0.1 * p.std() * torch.randn_like(p) if p.dim() == 2 else 0.0
    files = published_files(str(other))
    shutil.rmtree(other)
    export(second, str(other), files)
    job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--judge", f"helpful={one}", f"safe=-{one}", f"safe=-{other}",
        f"helpful={other}", "--algo", "mocan", "--lr", "1e-2", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "of what its judge says is confirmed by a second one" in said and "by the second judges, which label nothing:" in said
    kept = load(tmp_path / "out" / "offline_scores.pt", "")
    job(*CHAT, "--init", folder, "--data", tmp_path / "pairs.jsonl", "--judge", f"helpful={one}", f"safe=-{one}", "--algo", "mocan", "--out",
        tmp_path / "first")
    assert "nothing confirms these scores" in capsys.readouterr().out
    alone = load(tmp_path / "first" / "offline_scores.pt", "")
    assert torch.equal(alone["scores"], alone["second"]) and torch.equal(alone["confirmed"]["units"][0], torch.eye(2))
    M, U = kept["confirmed"]["units"]
    assert torch.allclose(kept["scores"], torch.tensordot(M, alone["scores"], 1), atol=1e-4)
    assert torch.equal(U, U.diag().diag()) and not torch.allclose(kept["second"], kept["scores"], atol=1e-2)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["policies"]
    assert rows["mocan"]["second"]["reward_gain"] != rows["mocan"]["reward_gain"]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    means = [sum(x["scores"][0] for x in samples if x["generator"] == name) / sum(x["generator"] == name for x in samples)
             for name in ("mocan", "reference")]
    assert means[0] - means[1] == pytest.approx(rows["mocan"]["second"]["reward_gain"], abs=1e-4)


def test_beside_a_published_judge_without_a_second_all_pairs_are_learned_from(tmp_path, capsys, monkeypatch):
    folder, _ = chat_folder(tmp_path / "chat")
    one, _ = chat_folder(tmp_path / "one", "LlamaForSequenceClassification", seed=1)
    learned, real = [], mocan.train_score
    monkeypatch.setattr(mocan, "train_score", lambda model, pool, *rest: (learned.append(len(pool.tokens)), real(model, pool, *rest)))
    job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--judge", f"helpful={one}", "--algo", "mocan", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "nothing confirms these scores" in said
    assert learned == [int(re.search(r"(\d+) training", said)[1])]


def test_prompts_alone_serve_judges_that_are_there(tmp_path, capsys):
    folder, _ = chat_folder(tmp_path / "chat")
    one, _ = chat_folder(tmp_path / "one", "LlamaForSequenceClassification", seed=1)
    other, _ = chat_folder(tmp_path / "other", "LlamaForSequenceClassification", seed=2)
    path = tmp_path / "prompts.jsonl"
    prompts = sorted({row["prompt"] for row in rows(80)})
    path.write_text("".join(json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(prompts)))
    flags = [*CHAT, "--init", folder, "--data", path, "--judge", f"helpful={one}", f"safe=-{other}"]
    job(*flags, "--algo", "mocan", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "constraints: safe" in said and "judge, calibration" not in said and "lost" not in said
    assert f"{len(prompts)} of these are prompts alone" in said
    rows_found = json.loads((tmp_path / "out" / "results.json").read_text())["policies"]
    assert list(rows_found) == ["reference", "mocan", "optimum"] and rows_found["mocan"]["lam"][0] >= 0
    scores = load(tmp_path / "out" / "offline_scores.pt", "")["scores"]
    assert scores.std(2).min() > 1e-3
    job(*flags, "--algo", "mocan", "--judge", f"helpful={one}", f"safe=-{other}", "--out", tmp_path / "both")  # they agree: M = 1
    assert "1.000 ± 0.000 of what its judge says is confirmed" in capsys.readouterr().out
    assert torch.allclose(load(tmp_path / "both" / "offline_scores.pt", "")["scores"], scores, atol=1e-4)
    for more, words in ((["--algo", "all"], "prompts.jsonl:1: field 'response_0' is missing"), (["--algo", "mocan", "--sft_steps", 3], ":1: field 'response_0' is missing"),
                        (["--algo", "mocan", "--constraints", "kind"], "no preference 'kind'")):
        with pytest.raises(ValueError, match=words) as error:
            job(*flags, *more, "--out", tmp_path / "no")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("left", ["tokenizer_config.json", "vocab.json"])
def test_a_folder_with_a_tokenizer_of_another_kind_is_refused(tmp_path, left):
    """Else GPT-2's tokens would be taken for its own."""
    folder, _ = chat_folder(tmp_path / "chat")
    for path in [*folder.iterdir()]:
        if path.name not in ("config.json", "model.safetensors", left):
            path.unlink()
    (folder / left).write_text('{"chat_template": "{{ messages[0].content }}"}')
    with pytest.raises(ValueError, match="has a tokenizer, but no tokenizer.json"):
        job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "out", "--algo", "mocan")


@pytest.mark.parametrize("flags, said", [
    (["--judge", *3 * ["safe=JUDGED"]], "one or two for each NAME"), (["--judge", "helpful"], "expected NAME=FOLDER"), (["--judge", "kind=JUDGE"], "for each NAME of helpful, safe"),
    (["--judge", "safe=JUDGED", "helpful=JUDGED", "safe=JUDGED"], "a second one for each NAME"),
    (["--judge", "safe=CHAT"], "no ...ForSequenceClassification"), (["--judge", "safe=nowhere"], "nowhere: not a model as published"),
    (["--init", "JUDGED"], "is a score model, for --judge"), (["--init", "nowhere"], "nowhere/config.json: no JSON object"),
    (["--system", "be good " * 200], "template alone takes"), (["--template", "llama3"], None),
    (["--system", "Be good.", "--template", "plain"], "--system: the text has no chat template")])
def test_a_chat_job_that_cannot_be_is_one_line(tmp_path, flags, said):
    folder, _ = chat_folder(tmp_path / "chat")
    chat_folder(tmp_path / "judge", "LlamaForSequenceClassification")
    flags = [flag.replace("CHAT", str(folder)).replace("JUDGED", str(tmp_path / "judge")) for flag in flags]
    if said is None:
        job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "out", "--algo", "mocan", *flags)
        return
    with pytest.raises(ValueError, match=said) as error:
        job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert not (tmp_path / "out" / "reference.pt").exists()  # it cost no training


@pytest.mark.parametrize("spoil", [lambda text: text[:5000], lambda text: "{}", lambda text: "[]", lambda text: "",
                                   lambda text: text.replace('"vocab": {', '"vocab": {"\\u4e00": 3, ')])
def test_a_damaged_tokenizer_is_one_line(tmp_path, spoil):
    folder, _ = chat_folder(tmp_path / "chat")
    path = folder / "tokenizer.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match="no tokenizer to use|tokenizer.json: no JSON object") as error:
        job(*CHAT, "--init", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ["a file", "a file above", "another model", "a file that is left", "read-only", "a file for a judge",
                                 "weights for a second shot"])
def test_an_export_that_cannot_be_is_refused_before_the_first_stage(tmp_path, way, monkeypatch):
    folder = tmp_path / "folder"
    if way == "another model":
        (folder / "mocan").mkdir(parents=True)
        (folder / "mocan" / "model.safetensors.index.json").write_text("{}")
    elif way == "a file that is left":  # Transformers would read it
        (folder / "pecan").mkdir(parents=True)
        (folder / "pecan" / "generation_config.json").write_text("{}")
    elif way == "a file for a judge":
        folder.mkdir()
        (folder / "score_safe").write_text("")
    elif way == "weights for a second shot":
        (folder / "mocan_shot_2").mkdir(parents=True)
        (folder / "mocan_shot_2" / "pytorch_model.bin").write_text("")
    elif way == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    else:
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / ("x" if way == "a file above" else "")
    with pytest.raises((OSError, ValueError)) as error:
        job(*TINY, "--out", tmp_path / "out", "--export", folder)
    assert "\n" not in str(error.value) and {path.name for path in (tmp_path / "out").glob("*.pt")} <= {"tokenizer.pt"}


def test_a_run_is_exported_later_beside_what_is_there(tmp_path):
    (tmp_path / "folder" / "models").mkdir(parents=True)
    (tmp_path / "folder" / "models" / "config.json").write_text("another's")
    (tmp_path / "folder" / "README.md").write_text("mine")
    job(*TINY, "--sft_steps", 5, "--algo", "mocan", "--margin", "0", "--out", tmp_path / "out")
    job("--from", "evaluate", "--out", tmp_path / "out", "--export", tmp_path / "folder")
    kept = weights(tmp_path / "out", "mocan.pt")
    assert torch.equal(GPT.from_pretrained(str(tmp_path / "folder" / "mocan")).wte.weight, kept["wte.weight"])


def test_checkpointed_activations_change_no_number(tiny, tmp_path):
    job(*TINY, "--out", tmp_path, "--checkpoint_activations")
    assert numbers(tmp_path) == numbers(tiny)
    assert all(same_weights(tmp_path, tiny, f"{name}.pt") for name in POLICIES)
    assert torch.load(tmp_path / "mocan.pt", weights_only=True)["config"]["checkpoint_activations"] is True


# ---- bad input

def one_line_on_stderr(done):
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def prealignments(monkeypatch, *flags):
    """What train.py hands to each pre-alignment: (the policy's weights before training, how many pairs)."""
    calls = []
    monkeypatch.setattr(train.pecan, "prealign", lambda policy, pool, *rest: calls.append(
        ({name: x.clone() for name, x in policy.state_dict().items()}, len(pool.tokens))) or ([], 1.0))
    job(*TINY, "--algo", "pecan", "--margin", "0", *flags)
    return calls


def test_every_preference_starts_from_the_reference_with_its_own_pairs(tmp_path, monkeypatch, capsys):
    for name, count in (("helpful", 30), ("safe", 45)):
        rows = [{"chosen": f"\n\nHuman: {name} {i}?\n\nAssistant: yes {i * i}", "rejected":
                 f"\n\nHuman: {name} {i}?\n\nAssistant: no {i}"} for i in range(count)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    calls = prealignments(monkeypatch, "--out", tmp_path / "out", "--data", f"helpful={tmp_path / 'helpful'}",
                          f"safe={tmp_path / 'safe'}", "--score_steps", 1)
    trained = int(re.search(r"(\d+) training", capsys.readouterr().out)[1])
    assert sum(size for *_, size in calls) == (trained + 1) // 2  # the half that no second judge sees; a pair a conversation
    assert len(calls) == 2 and calls[1][1] > calls[0][1] > 5
    reference = torch.load(tmp_path / "out" / "reference.pt", weights_only=True)["weights"]
    assert all(torch.equal(own[name], x) for own, _ in calls for name, x in reference.items())


@pytest.mark.parametrize("name", ["stage", "offline", "c"])
def test_a_preference_may_have_any_name(tmp_path, name):
    path = pku_file(tmp_path / "pairs.jsonl", 60)
    job(*TINY, "--sft_steps", 5, "--algo", "mocan", "--margin", "0", "--out", tmp_path / "out", "--accumulate", 1, "--data",
        f"helpful={path}", f"{name}={path}")
    made_from = torch.load(tmp_path / "out" / "offline_scores.pt", weights_only=True)["made_from"]
    assert len(made_from["input scorers"]) == 4
    assert all((tmp_path / "out" / f"score_{name}{second}.pt").exists() for second in ("", "_second"))


def test_too_few_conversations_for_two_judges_is_one_line(tmp_path):
    path = pku_file(tmp_path / "pairs.jsonl", 4)
    line = one_line_on_stderr(command(*TINY, "--sft_steps", 2, "--algo", "mocan", "--out", tmp_path / "out", "--data", path))
    assert "no pair of helpful is left for one of its judges" in line


def test_alternating_rows_of_two_preferences_keep_both(tmp_path, monkeypatch):
    rows = [{"prompt": f"How {i}?", "response_0": "Yes.", "response_1": f"No {i}.", name: i % 2}
            for i in range(120) for name in ("better_response_id", "safer_response_id")]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    calls = prealignments(monkeypatch, "--out", tmp_path / "out", "--data", tmp_path / "rows", "--prealign_steps", 1,
                          "--batch", 16, "--score_steps", 1)
    assert len(calls) == 2 and min(size for *_, size in calls) > 4


def test_an_unreachable_margin_stops_before_training_and_names_the_largest(tiny_copy):
    before = contents(tiny_copy)
    line = one_line_on_stderr(command("--from", "dual", "--margin", "99", "--out", tiny_copy))
    largest = dual.reachable(torch.load(tiny_copy / "offline_scores.pt", weights_only=True)["scores"][1:]).item()
    assert f"{largest:.3f}" in line or f"{largest}" in line
    after = contents(tiny_copy)
    assert {name for name in after if after[name] != before[name]} <= {"run.json"}  # written when an artifact is begun


def test_an_unreachable_margin_stops_before_pre_alignment(tiny_copy):
    before = (tiny_copy / "dpo-helpful.pt").stat().st_mtime_ns
    with pytest.raises(dual.Infeasible):
        job("--from", "prealign", "--margin", "99", "--out", tiny_copy)
    assert (tiny_copy / "dpo-helpful.pt").stat().st_mtime_ns == before


def test_a_margin_that_only_pecans_scores_cannot_reach_keeps_the_table(tiny_copy, monkeypatch, capsys):
    monkeypatch.setattr(train.pecan, "temperature", lambda *_: 0.0)  # scores that know nothing
    job("--from", "prealign", "--out", tiny_copy)
    results = json.loads((tiny_copy / "results.json").read_text())
    assert list(results["policies"]) == [*POLICIES[:-1], "optimum"]
    out = capsys.readouterr().out
    assert re.search(r"no policy pecan, by its scores: margin \[0\.\d+\] is out of reach .* is \[0\.0\]; lower", out)
    job("--from", "evaluate", "--out", tiny_copy)
    assert list(json.loads((tiny_copy / "results.json").read_text())["policies"]) == [*POLICIES[:-1], "optimum"]
    with pytest.raises(dual.Infeasible):  # alone, there is no table to save
        job("--from", "dual", "--algo", "pecan", "--margin", "0.1", "--out", tiny_copy)


def test_a_bad_data_file_ends_in_one_line_with_file_and_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    done = command("--data", tmp_path / "bad.jsonl", "--out", tmp_path / "out")
    assert f"{tmp_path / 'bad.jsonl'}:1: " in one_line_on_stderr(done)
    assert not (tmp_path / "out" / "reference.pt").exists()


BAD_FLAGS = {
    "unknown flag": (["--marginn", "1"], "arguments: --marginn"),
    "abbreviated flag": (["--marg", "1"], "arguments: --marg 1"),
    "unknown choice": (["--algo", "ppo"], "mocan"),
    "unknown dtype": (["--dtype", "float8"], "bfloat16"),
    "unknown stage": (["--from", "nowhere"], "prealign"),
    "unknown device": (["--device", "quantum"], "cpu"),
    "not a number": (["--steps", "many"], "--steps"),
    "not a whole number": (["--steps", "1.5"], "--steps"),
    "zero steps": (["--steps", "0"], "--steps is 0"),
    "negative": (["--beta", "-1"], "--beta is -1.0"),
    "not finite": (["--lr", "nan"], "--lr is nan"),
    "infinite": (["--lr", "inf"], "--lr is inf"),
    "one response": (["--responses", "1"], "2"),
    "no training data": (["--held_out", "1.5"], "--held_out 1.5"),
    "no room for a prompt": (["--max_new_tokens", "190"], "--block_size 192"),
    "score_steps below 0": (["--score_steps", "-3"], "--score_steps"),
    "a template of no chat": (["--data", "pairs.jsonl", "--template", "chatml"], "--init"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_exits_with_2_and_names_what_is_valid(case, capsys):
    flags, named = BAD_FLAGS[case]
    with pytest.raises(SystemExit) as stop:
        train.settings(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and named in error and "Traceback" not in error
    assert error.count("\n") == 2 and "--help" in error  # usage, and the error


CONTRADICTIONS = {
    "seed": (["--seed", "5"], "tokenizer.pt: made with seed 0, not 5; make it with --from reference"),
    "n_embd": (["--n_embd", "64"], "tokenizer.pt: made with n_embd 32, not 64; make it with --from reference"),
    "responses": (["--responses", "9"], "offline.pt: made with responses 8, not 9; make it with --from offline"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_flag_that_contradicts_a_reused_stage_is_refused(tiny_copy, case):
    flags, named = CONTRADICTIONS[case]
    before = contents(tiny_copy)
    with pytest.raises(ValueError) as error:
        job("--from", "mocan", "--out", tiny_copy, *flags)
    assert str(error.value) == f"{tiny_copy}/{named}"
    assert contents(tiny_copy) == before


def test_a_refused_flag_ends_in_one_line_and_exit_code_1(tiny_copy):
    before = contents(tiny_copy)
    done = command("--from", "mocan", "--out", tiny_copy, "--seed", 5)
    assert one_line_on_stderr(done) == f"error: {tiny_copy}/{CONTRADICTIONS['seed'][1]}"
    assert done.returncode == 1 and contents(tiny_copy) == before


def test_a_cpu_run_is_in_float32_wherever_it_runs():
    assert train.settings(["--device", "cpu"]).dtype == "float32"
    assert train.settings(["--device", "cpu", "--dtype", "bfloat16"]).dtype == "bfloat16"


def test_defaults_of_real_data_give_way_to_the_command_line_and_to_quick():
    assert (train.settings([]).margin, train.settings([]).responses) == ("50%", 32)
    c = train.settings(["--data", "x.jsonl", "--responses", "64"])
    assert (c.margin, c.prealign_steps, c.responses, c.shot_responses) == ("25%", 1575, 64, 128)
    c = train.settings(["--quick", "--data", "x.jsonl"])
    assert (c.prealign_steps, c.margin, c.accumulate) == (100, "50%", 1)  # --quick's, and not the data's


def test_real_data_after_a_run_of_the_world_keeps_its_sizes(tiny):
    c = train.settings(["--from", "reference", "--data", "x.jsonl", "--out", str(tiny)])
    assert (c.margin, c.prealign_steps, c.sft_steps) == ("10%", 12, 80)  # not DATA's


def test_a_missing_data_file_leaves_the_earlier_runs_settings(tiny_copy):
    before = (tiny_copy / "run.json").read_text()
    with pytest.raises(ValueError, match="missing.jsonl: cannot be read"):
        job("--data", tiny_copy / "missing.jsonl", "--out", tiny_copy)
    assert (tiny_copy / "run.json").read_text() == before


def test_a_flag_that_agrees_with_the_reused_stages_is_accepted(tiny):
    c = train.settings(["--from", "mocan", "--out", str(tiny), "--seed", "0", "--lr", "5e-4"])
    assert c.lr == 5e-4 and c.n_embd == 32 and c.start == "mocan"


def test_from_without_an_earlier_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.settings(["--from", "mocan", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "run.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"config": null}', '{"config": []}', '{"config": 3}'])
def test_a_damaged_run_json_is_named(tmp_path, capsys, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.settings(["--from", "mocan", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "run.json is missing or damaged" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["tokenizer.pt", "reference.pt", "offline.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_missing_or_damaged_artifact_is_named_with_the_stage_that_makes_it(tiny_copy, name, damage):
    content = (tiny_copy / name).read_bytes()
    os.remove(tiny_copy / name)
    if damage != "missing":
        (tiny_copy / name).write_bytes(content[:len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(ValueError) as error:
        job("--from", "mocan", "--out", tiny_copy)
    message = str(error.value)
    stage = "offline" if name == "offline.pt" else "reference"
    assert str(tiny_copy / name) in message and f"--from {stage}" in message and "\n" not in message


def test_a_non_finite_loss_keeps_the_last_artifact(tiny_copy, monkeypatch):
    before, real = (tiny_copy / "mocan.pt").read_bytes(), mocan.preference_loss
    monkeypatch.setattr(mocan, "preference_loss", lambda *args: real(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="mocan: the loss or its gradient is nan after 0 steps; lower the learning rate"):
        job("--from", "mocan", "--out", tiny_copy)
    assert (tiny_copy / "mocan.pt").read_bytes() == before
    assert not [x for x in os.listdir(tiny_copy) if x.endswith(".tmp")]


# ---- margins and random streams

@pytest.mark.parametrize("margin", ["-5%", "-0.1,0.5", "-.5", "-1e-3", "-inf", "-nan%"])
def test_a_margin_below_zero_is_a_value(margin):
    assert train.settings(["--margin", margin]).margin == margin
    assert train.settings(["--seed", "1", "--margin", margin, "--quick"]).margin == margin


@pytest.mark.parametrize("way", ["a file", "a file above"])
def test_an_out_that_cannot_be_is_one_line(tmp_path, way):
    (tmp_path / "file").write_text("kept")
    done = command(*TINY, "--out", tmp_path / "file" / ("x" if way == "a file above" else ""))
    assert done.returncode == 1 and one_line_on_stderr(done).startswith("error: ") and "file" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("how, code", [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("| true", 1), ("> /dev/full", 1)])
def test_a_run_without_a_place_to_speak_of_it(tmp_path, how, code):
    """No standard output, as a service has it: the run is made. One that breaks: one line, and --resume goes on."""
    flags = " ".join(map(str, [*TINY, "--sft_steps", 5, "--algo", "mocan", "--margin", "0", "--out", tmp_path / "out"]))
    line = f"set -o pipefail; {sys.executable} {ROOT / 'train.py'} {flags} {how}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr and (done.returncode == 0) == (code == 0), done.stderr
    if code:
        assert done.stderr.startswith("error: ")
        job("--resume" if (tmp_path / "out" / "run.json").exists() else "--quick", "--out", tmp_path / "out", *(
            [] if (tmp_path / "out" / "run.json").exists() else TINY))
    assert (tmp_path / "out" / "results.json").exists()


def test_a_folder_with_blanks_and_accents_from_elsewhere_in_the_c_locale(tmp_path):
    out = tmp_path / "mein Läuf [1]"
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *TINY, "--sft_steps", "5", "--algo", "mocan", "--margin", "0",
                           "--out", out.name], cwd=tmp_path, capture_output=True, timeout=300,
                          env={**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == b"" and (out / "results.json").exists()


def test_margins_by_hand():
    reach = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert dual.parse_margin("50%", reach).tolist() == [1.0, 0.25]
    assert dual.parse_margin("0.3", reach).tolist() == [0.3, 0.3]
    assert dual.parse_margin("0.3,10%", reach).tolist() == pytest.approx([0.3, 0.05])
    assert dual.parse_margin("-1,0", reach).tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("text", ["", "half", "50 percent", "1,2,3", "1,", "%"])
def test_a_margin_that_makes_no_sense_is_named(text):
    with pytest.raises(ValueError) as error:
        dual.parse_margin(text, torch.tensor([2.0, 0.5]))
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


def test_the_readmes_snippet_samples_from_a_policy(tiny, tmp_path):
    os.symlink(tiny, tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") >= 4


# ---- the source

def source(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


NOT_REMEMBERED = set("start out resume checkpoint_every algo device export batch accumulate sample_batch eval_prompts "
                     "eval_responses run".split())


def test_every_setting_is_remembered_by_one_stage_or_deliberately_not():
    remembered = [name for names in train.REMEMBERED.values() for name in names.split()]
    assert len(set(remembered)) == len(remembered) and list(train.REMEMBERED) == list(train.STAGES[:-1])
    assert {*remembered} | NOT_REMEMBERED == {*train.SETTINGS, "run"} and not {*remembered} & NOT_REMEMBERED
    assert train.LEAST.keys() <= train.SETTINGS.keys() >= train.CHOICES.keys()


def test_help_names_every_setting_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    comments = re.findall(r"^    (\w+) = .*  # (.+)$", source("train"), re.MULTILINE)
    assert [name for name, _ in comments[:len(train.SETTINGS)]] == [*train.SETTINGS]
    for (name, comment), default in zip(comments, train.SETTINGS.values()):
        flag = "--from" if name == "start" else f"--{name}"
        assert re.search(rf"{re.escape(flag)} .*?{re.escape(f'{comment} (default: {default})')}", text), name
    for preset in (train.DATA, train.INIT):
        assert " ".join(preset.split()) in text


@pytest.mark.parametrize("name, least", train.LEAST.items())
def test_a_setting_has_a_lower_bound(name, least, capsys):
    assert getattr(train.settings([f"--{name}", str(least)]), name) == least
    with pytest.raises(SystemExit) as stop:
        train.settings([f"--{name}", str(least - 1)])
    assert stop.value.code == 2 and f"--{name} is {least - 1}; it must be finite, and at least {least}" in capsys.readouterr().err


def test_presets_are_flags_that_the_command_line_knows():
    for preset in (train.QUICK, train.DATA, train.INIT):
        assert train.settings(preset.split())


@pytest.mark.parametrize("name", [*train.SETTINGS, "run"])
def test_every_setting_is_read_somewhere(name):
    used = r"\"quick\" in given" if name == "quick" else rf"\b(c|run)\.{name}\b"
    assert any(re.search(used, source(module)) for module in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_torch_tiktoken_numpy_and_the_standard_library(module):
    allowed = {"torch", "tiktoken", "numpy", *MODULES, *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(source(module))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_every_import_of_a_module_is_used(module):
    tree = ast.parse(source(module))
    imported = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert imported <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_at_most_100_columns(module):
    assert [line for line in source(module).splitlines() if len(line) > 100] == []


def test_importing_the_modules_does_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import " + ", ".join(MODULES)], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, "", "", [])


# ---- with a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_mocan_run_on_cuda(tmp_path, dtype):
    job(*TINY, "--device", "cuda", "--dtype", dtype, "--algo", "mocan", "--out", tmp_path)
    row = numbers(tmp_path)["policies"]["mocan"]
    assert math.isfinite(row["reward_gain"]) and math.isfinite(row["kl"])


def test_the_picture_has_every_policy_where_its_gains_are(tiny, tmp_path):
    picture = tmp_path / "a" / "picture.svg"
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "picture", "--out", str(tiny), "--to", str(picture)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    rows = json.loads((tiny / "results.json").read_text())["policies"]
    texts = [x.text for x in root.iter(space + "text")]
    assert all(name in texts for name in rows)
    dots = [path.get("d").removeprefix("M").removesuffix("h0") for path in root.iter(space + "path")
            if path.get("stroke-width") == "8"]
    places = {tuple(map(float, dot.split())) for dot in dots}
    best, worst = (f(rows.values(), key=lambda row: row["reward_gain"]) for f in (max, min))
    assert len(dots) == len(rows) and best is not worst
    assert min(y for _, y in places) < max(y for _, y in places)  # more reward is higher
    gains = sorted({(row["constraint_gain"][0], -row["reward_gain"]) for row in rows.values()})  # two may be one place
    assert len(gains) == len(places)
    (x0, _), (x1, _) = min(places), max(places)
    for (x, y), (safety, reward) in zip(sorted(places), gains):
        share = (safety - gains[0][0]) / (gains[-1][0] - gains[0][0])
        assert abs(x - (x0 + share * (x1 - x0))) < 0.2


def test_a_missing_run_has_no_picture(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "picture", "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "results.json is missing or damaged" in done.stderr and "Traceback" not in done.stderr


def bench(*argv):
    return subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), *map(str, argv)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_texts_of_a_run(quick, tmp_path):
    """Their gains are the table's, those of the reference 0, also at equal length."""
    done = bench("texts", "--out", quick[1])
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in POLICIES}
    results = json.loads((quick[1] / "results.json").read_text())["policies"]
    assert list(lines) == list(POLICIES)
    assert [float(x) for x in lines["reference"][3:7]] == [0.0] * 4
    for name in POLICIES:
        assert float(lines[name][3]) == pytest.approx(results[name]["reward_gain"], abs=1e-3)
        assert float(lines[name][4]) == pytest.approx(results[name]["constraint_gain"][0], abs=1e-3)
    done = bench("texts", "--out", quick[1], "--perplexity", 20)
    assert done.returncode == 0, done.stderr
    last = [line.split() for line in done.stdout.splitlines()[-len(POLICIES):]]
    assert [name for name, _, _ in last] == list(POLICIES)
    worth = [float(x) for _, x, _ in last]
    assert 1 < worth[0] == min(worth) < 10 and all(0 <= float(share.strip("%")) < 50 for _, _, share in last)
    nothing = bench("texts", "--out", tmp_path)
    assert nothing.returncode == 1 and "run `python train.py` first" in nothing.stderr


def test_exact_scores_on_a_chat_model(tmp_path):
    folder, _ = chat_folder(tmp_path / "chat")
    flags = ["exact", folder, "--data", pku_file(tmp_path / "pairs.jsonl"), "--out", tmp_path / "out", "--prompts", 8, "--responses", 8,
             "--tokens", 8, "--steps", 2, "--margin", "0", "--eval_prompts", 4, "--eval_responses", 4, "--lora", 2]
    done = bench(*flags)
    assert done.returncode == 0, done.stderr
    assert "on the reference's responses to fresh prompts: correlation" in done.stdout and "kindness gain" in done.stdout
    again = bench(*flags, "--resume")  # the responses and the policy are kept
    assert again.returncode == 0 and not re.search("(offline|mocan) 1/", again.stdout), again.stdout
    assert [line for line in again.stdout.splitlines() if line.startswith("mocan ")] == [
        line for line in done.stdout.splitlines() if line.startswith("mocan ")]


def test_a_step_by_adapters_is_weighed(tmp_path):
    folder, _ = chat_folder(tmp_path / "chat")
    done = bench("lora", folder, "--rank", 1, "--prompts", 1, "--responses", 2, "--prompt", 4, "--response", 4, "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    full, lora = (json.loads(done.stdout)[name] for name in ("all weights", "--lora 1"))
    assert lora["artifact_bytes"] < full["artifact_bytes"] and min(full["peak_bytes"], lora["step_seconds"]) > 0
