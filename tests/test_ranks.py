"""Several processes under torchrun (gloo): what they compute is what one process computes."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--world_pairs", "600", "--n_embd", "32", "--n_head", "2", "--n_layer", "1", "--sft_steps", "150", "--sft_lr", "1e-2",
        "--prompts", "37", "--responses", "6", "--steps", "20", "--prealign_steps", "20", "--eval_prompts", "21",
        "--eval_responses", "4", "--batch", "12", "--group", "4", "--sample_batch", "24", "--margin", "40%", "--shots", "2",
        "--shot_steps", "10", "--shot_responses", "6"]

# every loop and every pool of the project on fixed inputs; the first process writes what came of them
WORKER = """
import random, sys, time, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import data, mocan, model, pecan
mocan.SCORED = 6
torch.set_num_threads(1)
if dist.is_torchelastic_launched():
    dist.init_process_group()
pairs = data.world_preferences(40)
tok = data.open_tokenizer(data.frequent_pieces(pairs, 300), 40, 24)
config = model.GPTConfig(tok.encoding.n_vocab, 64, 1, 2, 16)
torch.manual_seed(0)
reference = model.GPT(config)
judge = model.GPT(model.GPTConfig(**{{**vars(config), "score_head": True}}))
prompts = data.spread([pair.prompt for pair in pairs], {prompts})
pool, logp = mocan.sample_pool(reference, tok, prompts, 3, mocan.Recipe("draw", key="0/draw", batch=6))
scores = torch.stack([logp, torch.arange(logp.numel()).view(logp.shape) / 7.0 % 1])
sample = mocan.Sample(pool, logp, logp, scores)
both = data.pair_pool(tok, pairs, "pairs")
preferences = mocan.preferences(pairs, "helpful", both)
def recipe(stage, batch=6, accumulate=1):
    return mocan.Recipe(stage, 10, 1e-3, "0/" + stage, batch, accumulate)
def fresh():
    return model.from_checkpoint(model.to_checkpoint(reference))
def adapted():
    policy = fresh()
    policy.config = model.GPTConfig(**{{**vars(config), "lora": 2}})
    torch.manual_seed(1)
    model.add_adapters(policy)
    return policy
lam = torch.tensor([0.7], dtype=torch.float64)
aligned = fresh()
losses = dict(
    reference=mocan.train_reference(fresh(), preferences, preferences, recipe("reference")),
    score=mocan.train_score(judge, preferences, preferences, recipe("score")),
    prealign=pecan.prealign(fresh(), preferences, preferences, 0.5, recipe("prealign", 5))[0],
    mocan=mocan.train_mocan(aligned, sample, lam, 0.5, 3, recipe("mocan", 5, 2)),
    adapters=mocan.train_mocan(adapted(), sample, lam, 0.5, 3, recipe("adapters", 5, 2)),
    pecan=pecan.train_pecan(fresh(), sample, lam, 0.5, 3, recipe("pecan", 1)))
solved = mocan.solve_from(sample, scores[1:].double().mean(dim=(1, 2)), torch.tensor([0.1], dtype=torch.float64), 0.5).lam
found = dict(lam=solved, tokens=pool.tokens, mask=pool.response_mask, logp=logp, ref=mocan.map_pool(reference, preferences), losses=losses,
             scored=mocan.map_pool(judge, pool), weights=aligned.state_dict())
if mocan.rank()[0] == 0:
    torch.save(found, {out!r})
if dist.is_initialized():
    time.sleep(0.2)  # as train.py does
    dist.destroy_process_group()
"""


def launch(ranks, *command, **options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = torchrun if ranks > 1 else [sys.executable]
    return subprocess.Popen([*start, *map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=ROOT, **options)


def finish(process, seconds=240):
    text, _ = process.communicate(timeout=seconds)
    return process.returncode, text


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")

    def run(ranks, prompts):
        script, out = folder / f"worker{ranks}_{prompts}.py", folder / f"found{ranks}_{prompts}.pt"
        script.write_text(WORKER.format(root=str(ROOT), prompts=prompts, out=str(out)))
        code, text = finish(launch(ranks, script))
        assert code == 0, text
        return torch.load(out, weights_only=True)
    return run


@pytest.mark.parametrize("ranks, prompts", [(2, 8), (3, 3)])
def test_processes_find_what_one_finds(worker, ranks, prompts):
    """Also with less work than processes: 3 prompts in batches of 2 for 3 of them, one prompt a step, 5 pairs a step."""
    one, many = worker(1, prompts), worker(ranks, prompts)
    for name in ("tokens", "mask", "logp", "ref"):
        assert torch.equal(one[name], many[name]), name
    assert one["tokens"].shape[:2] == (prompts, 3)
    assert one["lam"].item() > 0.01
    torch.testing.assert_close(many["lam"], one["lam"], atol=1e-6, rtol=0)
    torch.testing.assert_close(many["scored"], one["scored"], atol=1e-4, rtol=0)  # by a judge that they trained
    assert set(one["losses"]) == {"reference", "score", "prealign", "mocan", "adapters", "pecan"}
    for stage, losses in one["losses"].items():
        assert losses[0] != losses[-1]
        assert many["losses"][stage] == pytest.approx(losses, abs=1e-5), stage


def results(out):
    import json
    return json.loads((out / "results.json").read_text())["policies"]


def test_the_job_under_torchrun_is_the_job(tmp_path):
    outs = {ranks: tmp_path / f"out{ranks}" for ranks in (1, 2)}
    texts = {}
    for ranks, out in outs.items():
        code, texts[ranks] = finish(launch(ranks, "train.py", *TINY, "--out", out))
        assert code == 0, texts[ranks]
    assert texts[2].count("settings:") == 1  # one process speaks
    one, two = results(outs[1]), results(outs[2])
    assert one.keys() == two.keys() and "mocan shot 2" in one
    for name in ("mocan", "pecan"):
        assert two[name]["lam"] == pytest.approx(one[name]["lam"], rel=1e-2)  # from samples of references equal to rounding
    for name, row in one.items():
        assert row["kl_ci"][0] - 0.05 <= two[name]["kl"] <= row["kl_ci"][1] + 0.05
    assert not (outs[2] / "checkpoint.pt").exists()


def test_a_killed_rank_ends_all_and_the_run_goes_on_with_another_number(tmp_path):
    out = tmp_path / "out"
    settings = [*TINY, "--out", str(out), "--steps", "600", "--checkpoint_every", "0.2", "--algo", "mocan", "--shots", "1"]
    process = launch(2, "train.py", *settings, start_new_session=True)
    deadline = time.time() + 120
    while not ((out / "checkpoint.pt").exists() and torch.load(out / "checkpoint.pt", weights_only=True)["loop"][1] == "mocan"):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    code, text = finish(process, 60)
    assert code != 0
    assert not (out / "mocan.pt").exists()
    assert "error: another process of this run ended" in text or "Signal 9" in text
    code, text = finish(launch(1, "train.py", "--resume", "--out", out))
    assert code == 0, text
    assert "goes on after" in text
    assert "mocan" in results(out)
