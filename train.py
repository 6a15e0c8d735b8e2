"""
train.py: the whole job, from preferences to an aligned policy and a table that says what came of
it.

    python train.py                           the built-in world, every policy, some minutes
    python train.py --data FILE               real preferences
    python train.py --from mocan --lr 3e-4    the same run again from that stage on, with a change

The stages, and the artifact that each leaves in --out:

    reference   supervised fine-tuning                     tokenizer.pt, reference.pt
    scores      reward and safety models, for --data       score_*.pt
    offline     K responses per prompt from π_ref, scored  offline.pt, offline_scores.pt
    prealign    PeCAN: one DPO policy per preference       dpo-*.pt
    dual        λ*, and what it predicts                   none: it is kept with the policy
    mocan       one policy update                          mocan*.pt
    pecan       one policy update                          pecan*.pt
    evaluate    fresh responses on evaluation prompts      results.json, samples.jsonl

`main` is the story, the first shot of MoCAN and of PeCAN written out in it; below it stand the
stages, further shots, the results, the run's folder and the command line. "Earlier" and "later"
stages are those above and below in this list. run.json keeps the settings.
"""

import argparse
import fcntl
import hashlib
import inspect
import json
import math
import os
import random
import re
import secrets
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import data
import dual
import mocan
import pecan
from model import (GPT, GPTConfig, export, from_checkpoint, load, replace_file, save,
                   to_checkpoint)

STAGES = ("reference", "scores", "offline", "prealign", "dual", "mocan", "pecan", "evaluate")
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Config:  # a comment is what --help says of a setting
    start: Literal[STAGES] = "reference"  # (--from) keep what earlier stages made, run from here
    out: str = "out"  # folder of all artifacts
    resume: bool = False  # go on with the run in --out that was interrupted
    checkpoint_every: float = 10.0  # least seconds between two lines and checkpoints of a loop
    quick: bool = False  # a run of seconds, to see that everything works
    algo: Literal["mocan", "pecan", "all"] = "all"  # which policies to train
    seed: int = 0  # seeds every random stream
    device: str = "cuda" if CUDA else "cpu"  # cpu, cuda, cuda:1, …
    dtype: Literal["float32", "bfloat16"] = (  # arithmetic of the blocks; logits stay float32
        "bfloat16" if CUDA and torch.cuda.is_bf16_supported(False) else "float32")
    # text
    data: tuple = ()  # preference files, FILE or NAME=FILE, several; none: the built-in world
    world_pairs: int = 36000  # preference pairs that the world writes
    held_out: float = 0.2  # share of the conversations kept for evaluation
    calibration: float = 0.1  # share kept for temperatures and early stopping
    tokenizer: Literal["vocab", "gpt2"] = "vocab"  # vocab: of the training text; gpt2: GPT-2's
    vocab_size: int = 4096  # largest size of vocab
    max_new_tokens: int = 96  # longest response; a prompt may fill the rest of block_size
    # model
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    block_size: int = 192  # longest prompt and response together, in tokens
    init: str = ""  # folder of published GPT-2 weights for the reference; it sets the sizes
    checkpoint_activations: bool = False  # less memory: blocks are computed again in backward
    export: str = ""  # folder for the policies in GPT-2's published layout
    # training
    batch: int = 16  # pairs per micro-batch; a policy update: 2·batch responses
    accumulate: int = 1  # micro-batches per step
    sft_steps: int = 1000  # gradient steps of the reference policy, at most
    sft_lr: float = 3e-3  # its learning rate
    score_steps: int = 1000  # gradient steps of each score model, at most
    score_lr: float = 1e-3  # its learning rate
    # offline samples and the dual
    prompts: int = 512  # N, training prompts that the reference answers
    responses: int = 32  # K, responses to each
    sample_batch: int = 256  # responses sampled at once
    beta: float = 1.0  # β, weight of the KL divergence to the reference
    margin: str = "50%"  # b, safety gains, comma separated: in units of g or % of the reachable
    constraints: str = ""  # safety preferences, comma separated; none: harmless; data: all
    # policies
    lr: float = 2e-4  # learning rate of MoCAN's and PeCAN's policy update
    steps: int = 800  # its gradient steps
    shots: int = 1  # 1: as in the paper; more: sample, solve and train from the policy so far
    shot_steps: int = 400  # gradient steps of each further shot
    shot_lr: float = 2e-4  # their learning rate
    shot_responses: int = 32  # K of each further shot
    group: int = 8  # G, samples of a prompt that a step compares in all pairs
    prealign_steps: int = 1575  # gradient steps of each pre-aligned policy, at most
    prealign_lr: float = 6e-5  # their learning rate; see pecan.prealign
    # evaluation
    eval_prompts: int = 240  # evaluation prompts, at most
    eval_responses: int = 24  # fresh responses to each
    run: str = ""  # (no flag) which run makes an artifact; a resumed run is the same


SETTINGS = [f for f in fields(Config) if f.name != "run"]
LEAST = dict(seed=0, vocab_size=300, responses=2, shot_responses=2, group=2, eval_prompts=2)

# what the artifacts of a stage and of all later ones remember; others change nothing in them, or,
# as --batch, --accumulate and --device, may differ from those that made an artifact
REMEMBERED = {
    "reference": "quick seed dtype data world_pairs held_out calibration tokenizer vocab_size "
                 "max_new_tokens n_layer n_head n_embd block_size init checkpoint_activations "
                 "sft_steps sft_lr",
    "scores": "score_steps score_lr constraints",
    "offline": "prompts responses",
    "prealign": "beta prealign_steps prealign_lr",
    "dual": "margin",
    "mocan": "lr steps shots shot_steps shot_lr shot_responses group",
    "pecan": ""}

# the flags that --quick, --data and --init stand for, unless the command line has its own
QUICK = ("--world_pairs 2400 --n_embd 64 --sft_steps 360 --sft_lr 6e-3 --prompts 128 "
         "--responses 16 --steps 200 --prealign_steps 100 --prealign_lr 3e-4 --lr 4e-4 "
         "--eval_prompts 64 --eval_responses 8 ")
DATA = "--accumulate 4 --prompts 2048 --responses 128 --shot_responses 128 --margin 25% "
INIT = ("--tokenizer gpt2 --sft_lr 5e-5 --score_lr 5e-5 --prealign_lr 2e-5 --lr 2e-5 "
        "--shot_lr 2e-5 ")


# ---- the job
def main():
    c = settings(sys.argv[1:])
    c, held = enter(c)  # held until main returns: the lock of --out
    split, names = data.load_pairs(  # names: "helpful", then the constraints
        c.data, c.world_pairs, random.Random(f"{c.seed}/data"), c.held_out, c.calibration,
        c.constraints)
    dual.parse_margin(c.margin, torch.ones(len(names) - 1))  # a bad one costs no training
    tok, tokenizer = open_tokenizer(c, split)
    pools = {part: data.pair_pool(tok, getattr(split, part), f"{part} pairs")
             for part in split._fields}
    reference = train_reference(c, tok, tokenizer, pools)
    prompts = data.some_prompts(split.train, c.prompts)
    policies = {}
    margin = None

    offline = sample_reference(c, reference, tok, prompts)  # 1. sample
    pool = data.Pool(offline["tokens"], offline["response_mask"])  # (N, K, T)
    ref_logp = offline["ref_logp"]  # (N, K)
    for algorithm in ("mocan", "pecan") if c.algo == "all" else (c.algo,):
        if algorithm == "mocan":  # 2. score: by judges, or by what pre-alignment did to policies
            scorers = judges = train_judges(c, reference, split, pools, names)
            scored = score_offline(c, offline, pool, judges, names, prompts, tok)
            made_by = {"scores": scored}
            scores = scored["scores"]
        else:
            scorers = made_by = prealign(c, reference, split, pools, names, offline, pool)
            policies = scorers | policies
            scores = torch.stack([saved["implicit"] for saved in scorers.values()])
        sample = mocan.Sample(pool, ref_logp, ref_logp, scores)  # scores (1+m, N, K)
        if margin is None:
            margin = dual.parse_margin(c.margin, dual.reachable(scores[1:]))  # (m,) b
        try:
            found = mocan.solve_from(sample, mean_g(sample), margin, c.beta)  # 3. dual
            policies[algorithm] = update(  # 4. update
                c, algorithm, reference, sample, margin, found, made_by)
            more_shots(c, algorithm, policies, reference, sample, margin, scorers, names, prompts,
                       tok)
        except dual.Infeasible as error:
            if algorithm == "mocan" or c.algo == "pecan":
                raise
            print(f"  no PeCAN policy, by its implicit scores: {error}")
    if c.algo == "pecan":  # the table asks them
        judges = train_judges(c, reference, split, pools, names)
    evaluate(c, reference, policies, judges, names, margin, split, tok)
    export_policies(c, policies)
    Path(f"{c.out}/checkpoint.pt").unlink(missing_ok=True)


def enter(c):
    """The device, torchrun's ranks and the folder -> settings, the folder's lock."""
    torch.backends.cuda.matmul.allow_tf32 = True  # logits: 0.007 nats on 256 tokens' log-ratio
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape of batch
    warnings.showwarning = lambda message, *_, **__: print(f"  warning: {message}")
    if dist.is_torchelastic_launched():  # by torchrun
        if c.device.startswith("cuda"):
            c = replace(c, device=f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(c.device)
        dist.init_process_group()
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # the first process speaks, and locks the folder
            return c, sys.stdout
    os.makedirs(c.out, exist_ok=True)
    print("settings:", json.dumps(asdict(c)))
    return c, lock(c.out)


# ---- the stages: each returns its artifact, made now if it is not there
def open_tokenizer(c, split):
    """The tokenizer, and its artifact."""
    digest = hashlib.sha256(repr(split).encode(errors="surrogatepass")).hexdigest()
    saved = artifact(c, "reference", "tokenizer.pt", data=digest[:16])
    if "began" in saved:
        pieces = None  # GPT-2's own
        if c.tokenizer == "vocab":
            pieces = data.frequent_pieces(split.train, c.vocab_size)
        finish(saved, pieces=pieces)
    room = c.block_size - c.max_new_tokens
    return data.open_tokenizer(saved["pieces"], room, c.max_new_tokens), saved


def train_reference(c, tok, tokenizer, pools):
    saved = artifact(c, "reference", "reference.pt", tokenizer=tokenizer)
    if "began" in saved:
        model = first_model(c, tok)
        mocan.train_reference(model, pools["train"], pools["calibration"],
                              recipe(c, "reference", c.sft_steps, c.sft_lr))
        finish(saved, **to_checkpoint(model))
    return saved


def first_model(c, tok):
    if not c.init:
        config = GPTConfig(tok.encoding.n_vocab, c.block_size, c.n_layer, c.n_head, c.n_embd,
                           dtype=c.dtype, checkpoint_activations=c.checkpoint_activations)
        return new_model(c, config, "reference")
    model = GPT.from_pretrained(c.init)
    sizes = model.config
    if sizes.vocab_size != tok.encoding.n_vocab or sizes.block_size < c.block_size:
        raise ValueError(
            f"{c.init} has {sizes.vocab_size} tokens and {sizes.block_size} positions; --tokenizer "
            f"{c.tokenizer} has {tok.encoding.n_vocab} tokens, and --block_size is {c.block_size}")
    model.config = replace(sizes, dtype=c.dtype, checkpoint_activations=c.checkpoint_activations)
    return model.to(c.device)


def new_model(c, config, purpose):
    torch.manual_seed(data.stream(c.seed, purpose).initial_seed())
    return GPT(config).to(c.device)


def sample_reference(c, reference, tok, prompts):
    saved = artifact(c, "offline", "offline.pt", reference=reference)
    if "began" in saved:
        policy = from_checkpoint(reference, c.device)
        pool, ref_logp = mocan.sample_pool(policy, tok, prompts, draw(c, "offline", c.responses))
        finish(saved, **pool._asdict(), ref_logp=ref_logp)
    return saved


def train_judges(c, reference, split, pools, names):
    """{preference: artifact of its score model}; none in the built-in world."""
    judges = {}
    for name in names if c.data else ():
        saved = artifact(c, "scores", f"score_{name}.pt", reference=reference)
        judges[name] = saved
        if "began" in saved:
            config = GPTConfig(**{**reference["config"], "score_head": True})
            model = new_model(c, config, f"scores/{name}")
            model.load_state_dict(reference["weights"], strict=False)  # all but the head
            parts = [data.preferences(getattr(split, part), name, pool)
                     for part, pool in pools.items()]
            mocan.learn_score(model, name, *parts,
                              recipe(c, f"score {name}", c.score_steps, c.score_lr))
            finish(saved, **to_checkpoint(model))
    return judges


def score_offline(c, offline, pool, judges, names, prompts, tok):
    made_by = {f"score_{name}": judge for name, judge in judges.items()}
    saved = artifact(c, "offline", "offline_scores.pt", offline=offline, **made_by)
    if "began" in saved:
        scores = mocan.score_pool(judges, names, prompts, pool, tok, c.device)
        finish(saved, scores=scores)
    return saved


def prealign(c, reference, split, pools, names, offline, pool):
    """PeCAN: {dpo-NAME: artifact of a policy, its τ, its implicit scores of the pool (N, K)}."""
    dpo = {}
    ref_logp = {}  # ln π_ref of the pairs' responses (N, 2), once for all preferences
    for name in names:
        saved = artifact(c, "prealign", f"dpo-{name}.pt", offline=offline)
        dpo[f"dpo-{name}"] = saved
        if "began" in saved:
            policy = from_checkpoint(reference, c.device)
            ref_logp = ref_logp or {
                part: mocan.map_pool(policy, pools[part]) for part in ("train", "calibration")}
            training, calibration = [
                data.preferences(getattr(split, part), name, pools[part], ref_logp[part])
                for part in ref_logp]
            plan = recipe(c, f"dpo-{name}", c.prealign_steps, c.prealign_lr)
            pecan.prealign(policy, training, calibration, c.beta, plan)
            tau = pecan.calibrate_policy(policy, name, calibration, c.beta)
            implicit = c.beta * tau * (mocan.map_pool(policy, pool) - offline["ref_logp"])
            finish(saved, **to_checkpoint(policy), tau=tau, implicit=implicit)
    return dpo


def update(c, stage, reference, sample, margin, found, made_by):
    """The first shot's policy update, from the reference; made_by: what made the scores."""
    saved = artifact(c, stage, f"{stage}.pt", b=margin.tolist(), **made_by)
    if "began" in saved:
        policy = from_checkpoint(reference, c.device)
        finish(saved, **train_policy(c, stage, policy, sample, margin, found, c.steps, c.lr))
    return saved


def more_shots(c, stage, policies, reference, offline, margin, scorers, names, prompts, tok):
    """Shots 2 to --shots into `policies`, each from the one before: responses of the policy so far,
    their scores, the dual and the update. scorers: the judges, or PeCAN's pre-aligned policies."""
    latest = policies[stage]
    for shot in range(2, c.shots + 1):
        label = f"{stage} shot {shot}"
        saved = artifact(
            c, stage, f"{stage}_shot_{shot}.pt", b=margin.tolist(), start=latest)
        if "began" in saved:
            policy = from_checkpoint(latest, c.device)
            pool, logp = mocan.sample_pool(
                policy, tok, prompts, draw(c, f"{label}, responses", c.shot_responses))
            ref_logp = mocan.map_pool(from_checkpoint(reference, c.device), pool)
            if stage == "mocan":
                scores = mocan.score_pool(scorers, names, prompts, pool, tok, c.device)
            else:
                scores = pecan.implicit_scores(scorers, pool, ref_logp, c.beta, c.device)
            sample = mocan.Sample(pool, logp, ref_logp, scores)
            try:
                found = mocan.solve_from(sample, mean_g(offline), margin, c.beta)
                kept = train_policy(
                    c, label, policy, sample, margin, found, c.shot_steps, c.shot_lr)
            except dual.Infeasible as error:
                print(f"  {label} changes nothing, by its responses: {error}")
                kept = to_checkpoint(policy)
            finish(saved, **kept)
        policies[label] = latest = saved


def train_policy(c, label, policy, sample, margin, found, steps, lr):
    """What the artifact of a policy update keeps."""
    print(f"\ndual of {label}: λ* = {numbers(found.lam)} ± {numbers(1.96 * found.lam_se)} at a "
          f"margin of {numbers(margin)}; predicted from the responses it was solved on: gains "
          f"{numbers(found.constraint_gain)}, score {found.score_gain:.3f}, KL {found.kl:.3f}; "
          f"effective sample size {found.ess:.1f} a prompt (5th percentile {found.ess_p5:.1f}); "
          f"{found.iterations} evaluations")
    stage = label.split()[0]
    plan = recipe(c, label, steps, lr)._replace(key=f"{c.seed}/{stage}")  # all shots draw alike
    if stage == "mocan":
        mocan.train_mocan(policy, sample, found.lam, c.beta, c.group, plan)
    else:
        pecan.train_pecan(policy, sample, found.lam, c.beta, c.group, plan)
    return {**to_checkpoint(policy), "lam": found.lam.tolist(), "predicted": found._asdict()}


def mean_g(sample):
    """E[g] of a sample, (m,)."""
    return sample.scores[1:].double().mean(dim=(1, 2))


def recipe(c, stage, steps, lr):
    return mocan.Recipe(stage, steps, lr, f"{c.seed}/{stage}", c.batch, c.accumulate, c)


def draw(c, stage, K):
    return mocan.Draw(stage, K, f"{c.seed}/{stage}", c.sample_batch, c)


# ---- what came of it
def evaluate(c, reference, policies, judges, names, margin, split, tok):
    """Fresh responses of every policy to evaluation prompts -> results.json, samples.jsonl and the
    table. Gains are over the reference's responses to the same prompts."""
    prompts = data.some_prompts(split.evaluation, c.eval_prompts)
    print(f"\nevaluate: {c.eval_responses} fresh responses of each policy to each of "
          f"{len(prompts)} evaluation prompts")
    model = from_checkpoint(reference, c.device)
    rows = {}
    texts = {}
    for name, saved in {"reference": reference, **policies}.items():
        policy = from_checkpoint(saved, c.device)
        plan = draw(c, f"evaluate {name}", c.eval_responses)._replace(key=f"{c.seed}/evaluate")
        pool, logp = mocan.sample_pool(policy, tok, prompts, plan)  # the same noise for all
        ref_logp = mocan.map_pool(model, pool)
        scores = mocan.score_pool(judges, names, prompts, pool, tok, c.device)
        sample = mocan.Sample(pool, logp, ref_logp, scores)
        if not rows:
            ref = sample
        texts[name] = pool.texts(tok)
        even = torch.full_like(logp, 1 / c.eval_responses)
        rows[name] = {**compare(scores, logp - ref_logp, even, ref.scores),
                      "margin": margin.tolist(), "lam": saved.get("lam", []),
                      "predicted": saved.get("predicted"), "seconds": saved.get("seconds", 0.0)}
    rows["reference"]["seconds"] = 0.0
    frontier = optima(sample, ref, mocan.map_pool(policy, ref.pool), margin, c.beta)
    if frontier:
        rows["optimum"] = {**frontier[15], "margin": margin.tolist(), "seconds": 0.0}
    write_results(c, rows, frontier, [data.transcript(prompt) for prompt in prompts], texts)
    print_table(names[1:], rows)


def compare(scores, log_ratio, weight, ref_scores):
    """Responses with scores (1+m, N, K), ln π/π_ref (N, K) and weights (N, K), each row's sum 1,
    against the reference's scores on the same prompts -> gains, KL(π‖π_ref) and their 95 %
    intervals over prompts (taken as independent), as results.json has them."""
    gain = (weight * scores.double()).sum(2) - ref_scores.double().mean(2)  # (1+m, N)
    kl = (weight * log_ratio).sum(1)  # (N,)
    found = torch.cat([gain, kl[None]])  # (2+m, N)
    error = 1.96 * found.std(1) / math.sqrt(found.size(1))
    found = found.mean(1)
    reward_gain, *constraint_gain, kl = found.tolist()
    reward_ci, *constraint_ci, kl_ci = torch.stack([found - error, found + error], dim=1).tolist()
    return {"reward_gain": reward_gain, "reward_gain_ci": reward_ci,
            "constraint_gain": constraint_gain, "constraint_gain_ci": constraint_ci,
            "kl": kl, "kl_ci": kl_ci}


def optima(sample, ref, logp, margin, beta):
    """Rows of π_λ ∝ π_ref·exp((r + ⟨λ,g⟩)/β) itself, which nobody trained, for 31 λ from 0 to 2λ*,
    the 16th the optimum; none where b is out of reach.

    From a policy's Sample and the reference's as one of 2K responses of the even mixture of both:
    near the policy, and nowhere far below π_ref. logp (N, K): the policy's ln π of ref's.
    """
    logp = torch.cat([sample.logp, logp], dim=1)  # (N, 2K)
    ref_logp = torch.cat([sample.ref_logp, ref.ref_logp], dim=1)  # (N, 2K)
    scores = torch.cat([sample.scores, ref.scores], dim=2)  # (1+m, N, 2K)
    mixed = torch.logaddexp(logp, ref_logp) - math.log(2)  # (N, 2K)
    both = mocan.Sample(None, mixed, ref_logp, scores)
    try:
        lam = mocan.solve_from(both, mean_g(ref), margin, beta).lam
    except (dual.Infeasible, FloatingPointError) as error:
        print(f"  no optimum by these responses: {error}")
        return []
    rows = []
    for t in range(31):
        at = t / 15 * lam
        tilt = (scores[0] + torch.einsum("m,mnk->nk", at, scores[1:].double())) / beta
        log_weight = tilt - (mixed - ref_logp)  # (N, 2K) ln π_λ/π_mixed + ln Z
        log_z = log_weight.logsumexp(1, keepdim=True) - math.log(log_weight.size(1))
        row = compare(scores, tilt - log_z, log_weight.softmax(1), ref.scores)
        rows.append({**row, "lam": at.tolist()})
    return rows


def write_results(c, rows, frontier, prompts, texts):
    """results.json, samples.jsonl, and three samples on the screen; texts {policy: N·K}."""
    K = c.eval_responses
    results = {"config": asdict(c), "policies": rows, "frontier": frontier}
    write(c, "results.json", json.dumps(results, default=torch.Tensor.tolist, indent=1))
    samples = [{"instruction": prompts[i // K], "output": text, "generator": name}
               for name in texts for i, text in enumerate(texts[name])]
    write(c, "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    for n in range(0, len(prompts), len(prompts) // 3 + 1):
        print(f"\n  {prompts[n]}")
        for name in texts:
            print(f"    {name:>14}: {' '.join(texts[name][n * K].split())}")


def print_table(names, rows):
    """names: of the constraints; rows {policy: what `compare` says of it, margin, lam, …}."""
    gains = [f"  {name + ' gain':>23}  {'b':>6}  {'holds':>12}" for name in names]
    print(f"\n{'':22}  {'reward gain':>23}{''.join(gains)}  {'KL':>13}  seconds  λ*")
    for policy, row in rows.items():
        line = f"{policy:22}  {cell(row['reward_gain'], row['reward_gain_ci'])}"
        for gain, ci, b in zip(row["constraint_gain"], row["constraint_gain_ci"], row["margin"]):
            line += f"  {cell(gain, ci)}  {b:6.3f}  {holds(gain, ci, b):>12}"
        error = row["kl_ci"][1] - row["kl"]
        print(f"{line}  {row['kl']:.3f} ± {error:.3f}  {row['seconds']:7.0f}  "
              f"{numbers(row['lam'])}")


def numbers(values):
    return ", ".join(f"{x:.3f}" for x in values)


def cell(x, ci):
    return f"{x:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]"


def holds(gain, ci, b):
    """By the measured gain; a shortfall within its interval is "within error"."""
    if gain >= b - 1e-6:
        return "yes"
    return "within error" if ci[1] >= b else "no"


def export_policies(c, policies):
    for name, saved in policies.items() if c.export else ():
        folder = f"{c.export}/{name.replace(' ', '_')}"
        export(from_checkpoint(saved), folder)
        print(f"exported {folder}")


# ---- the run's folder
def lock(folder):
    """A file that one process at a time can hold, until it ends; ValueError for a second one."""
    file = open(f"{folder}/lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"{folder}: another run is under way there; wait, or choose another --out") from None
    return file


def write(c, name, text):
    replace_file(f"{c.out}/{name}", lambda file: file.write(text.encode()))
    mocan.gather(name)  # no rank goes on before it is there


def artifact(c, stage, name, **inputs):
    """A stage's result, {name: tensor or plain value}, from the file `name`, where --from starts
    later or the run that --resume continues has made it; else a dict with "began", to `finish`.

    With it is kept what it was made from: the settings of its stage and of earlier ones, and the
    runs that made its inputs. A file that is not made from the very same is refused.
    """
    path = f"{c.out}/{name}"
    at = STAGES.index(stage)
    made_from = {what: getattr(c, what) for x in STAGES[:at + 1] for what in REMEMBERED[x].split()}
    for what, x in inputs.items():
        made_from[f"input {what}"] = x["run"] if isinstance(x, dict) else x
    remedy = f"make it with --from {stage}"
    earlier = at < STAGES.index(c.start)
    if earlier or c.resume and os.path.exists(path):
        saved = load(path, remedy)
        if earlier or saved.get("run") == c.run:
            refuse_others(saved, made_from, remedy)
            return saved
    print(f"\n{stage}: {path}", flush=True)
    write(c, "run.json", json.dumps({"config": asdict(replace(c, resume=False))}, indent=1))
    return {"path": path, "made_from": made_from, "run": c.run, "began": time.time()}


def refuse_others(saved, made_from, remedy):
    """ValueError where an artifact was made from anything else; a file of one's own, in which that
    does not stand, passes."""
    own = saved.get("made_from", made_from)
    if not isinstance(own, dict):  # a foreign file
        own = {}
    saved.setdefault("run", os.path.getmtime(saved["path"]))
    for what in made_from | own:
        if made_from.get(what) != own.get(what):
            raise ValueError(f"{saved['path']}: made with {what} {own.get(what)}, not "
                             f"{made_from.get(what)}; {remedy}")


def finish(saved, **content):
    """Fill in and write an artifact that was begun."""
    path = saved.pop("path")
    saved |= content
    saved["seconds"] = time.time() - saved.pop("began")
    save(saved, path)
    saved["path"] = path


# ---- the command line
def settings(argv):
    """Defaults, then the flags that --quick, --data and --init stand for or those of the run that
    --from continues, then the command line. Bad values exit with code 2."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    flags = "--dtype float32 " if given.get("device") == "cpu" else ""
    if "quick" in given:
        flags += QUICK
    elif "data" in given:
        flags += DATA
    if "init" in given:
        flags += INIT
    base = vars(parser.parse_args(flags.split()))
    if "resume" in given or "start" in given:
        base = continued(parser, given)
    values = {"run": secrets.token_hex(8), **base, **given}
    values["data"] = tuple(values.get("data", ()))
    c = Config(**values)
    check(parser, c)
    return c


def build_parser():
    parser = argparse.ArgumentParser(
        usage="python train.py [--SETTING VALUE ...]   (--help lists them)",
        description="One-shot safety alignment: a dual, then one policy update.",
        epilog=f"--quick stands for {QUICK}too, --data for {DATA}, --init for {INIT}".replace(
            "%", "%%"),
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    for f in SETTINGS:
        text = f"{comments[f.name]} (default: {f.default})".replace("%", "%%")
        options = {"dest": f.name, "help": text}
        if f.type is bool:
            options["action"] = "store_true"
        elif f.type is tuple:
            options |= {"nargs": "+", "action": "extend"}
        elif f.type in (int, float, str):
            options["type"] = f.type
        else:
            options["choices"] = f.type.__args__  # a Literal's
        parser.add_argument("--from" if f.name == "start" else f"--{f.name}", **options)
    return parser


def continued(parser, given):
    """The settings of the run that --from or --resume continues."""
    out = given.get("out", Config.out)
    path = f"{out}/run.json"
    try:
        with open(path) as file:
            old = json.load(file)["config"]
        kept = {f.name: old.get(f.name, f.default) for f in fields(Config)}
    except Exception:  # a damaged file raises half a dozen kinds
        parser.error(f"--from and --resume continue a run, but {path} is missing or damaged; "
                     "leave the flag out, which begins anew")
    if "resume" not in given:
        del kept["run"]
    elif given.keys() - {"resume", "out", "device", "checkpoint_every"}:
        parser.error("--resume keeps the run's settings; next to it only --out, --device and "
                     "--checkpoint_every may stand; --from changes settings")
    return {**kept, "out": out}


def check(parser, c):
    for f in SETTINGS:
        value = getattr(c, f.name)
        least = LEAST.get(f.name, math.ulp(0.0))  # above 0
        if f.type in (int, float) and not least <= value < math.inf:
            wanted = f"at least {least}" if f.name in LEAST else "above 0"
            parser.error(f"--{f.name} is {value}; it must be finite, and {wanted}")
    if c.held_out + c.calibration >= 1:
        parser.error(
            f"--held_out {c.held_out} and --calibration {c.calibration} must add up to less than 1")
    if c.n_embd % c.n_head or c.max_new_tokens + 8 > c.block_size:
        parser.error(f"--n_embd {c.n_embd} must be a multiple of --n_head {c.n_head}, --block_size "
                     f"{c.block_size} at least --max_new_tokens {c.max_new_tokens} + 8")
    try:
        torch.empty(0, device=c.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {c.device} cannot be used here; expected cpu, or cuda or cuda:N "
                     "where CUDA is available")


def run_as_command():
    """main, with one line for what a user can mend."""
    for console in (sys.stdout, sys.stderr):
        console.reconfigure(errors="backslashreplace")  # whatever its encoding
    try:
        main()
        if dist.is_initialized():
            time.sleep(0.2)  # until gloo's threads have let go of their tensors
            dist.destroy_process_group()
    except (ValueError, FloatingPointError, OSError) as error:  # what a user can mend
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        reason = str(error).split("\n")[0]
        sys.exit(f"error: another process of this run ended ({reason}); mend what it says, then "
                 "go on with --resume")
    except KeyboardInterrupt:
        sys.exit("interrupted; python train.py --resume, and its --out if it had one, goes on")


if __name__ == "__main__":
    run_as_command()
