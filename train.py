"""
train.py: the whole job, from preferences to an aligned policy and a table that says what came of
it.

    python train.py                           the built-in world, every policy, some minutes
    python train.py --data FILE               real preferences
    python train.py --init DIR --data FILE    from a published model, with its tokenizer
    python train.py --from mocan --lr 3e-4    the same run again from that stage on, with a change

The stages, and the artifact that each leaves in --out:

    reference   supervised fine-tuning                     tokenizer.pt, reference.pt
    scores      reward and safety models, for --data       score_*.pt
    offline     K responses per prompt from π_ref, scored  offline.pt, offline_scores.pt
    prealign    PeCAN: one DPO policy per preference       dpo-*.pt, prealign_scores.pt
    dual        λ*, and what it predicts                   none: it is kept with the policy
    mocan       one policy update; further shots           mocan*.pt
    pecan       one policy update; further shots           pecan*.pt
    evaluate    fresh responses on evaluation prompts      results.json, samples.jsonl

With --data each preference has two judges, from different halves of the training conversations: the
first labels, the second (score_*_second.pt) measures, in confirm's units, and has a table.
PeCAN's policies learn from the half of the first, and the second confirm their scores likewise.
With --lora reference.pt also holds all frozen weights, and the other files only adapters (and a
score model's head), which are read with the reference.pt beside them.
`main` is the story, MoCAN's and PeCAN's shots written out in it; below it stand the stages, the
results, the run's folder and the command line. run.json keeps the settings. "Earlier" and "later"
stages are those above and below in this list; prealign begins when MoCAN is done, whose dual is
the first to say that a margin is out of reach.
"""

import argparse
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import data
import dual
import mocan
import pecan
from model import (GPT, GPTConfig, add_adapters, export, from_checkpoint, merge, open_export,
                   to_checkpoint)

CUDA = torch.cuda.is_available()


class Config(argparse.Namespace):  # a comment is what --help says of a setting
    start = "reference"  # keep what earlier stages made, run from here
    out = "out"  # folder of all artifacts
    resume = False  # go on with the run in --out that was interrupted
    checkpoint_every = 10.0  # least seconds between two lines and checkpoints of a loop
    quick = False  # a run of seconds, to see that everything works
    algo = "all"  # which policies to train
    seed = 0  # seeds every random stream
    device = "cuda" if CUDA else "cpu"  # cpu, cuda, cuda:1, …
    dtype = (  # arithmetic of the blocks; logits stay float32, on CUDA by TF32 products
        "bfloat16" if CUDA and torch.cuda.is_bf16_supported(False) else "float32")
    # text
    data = []  # preference files, FILE or NAME=FILE, several; none: the built-in world
    world_pairs = 36000  # preference pairs of the world, at most
    held_out = 0.2  # share of the conversations kept for evaluation
    calibration = 0.1  # share kept for temperatures and early stopping
    tokenizer = "vocab"  # vocab: of the training text; gpt2: GPT-2's; --init may have its own
    template = "auto"  # of the chat, with --init: auto is the model's own, plain where it has none
    system = ""  # system message of the chat; none: what the model's own template says there
    vocab_size = 4096  # largest size of vocab
    max_new_tokens = 96  # longest response; a prompt may fill the rest of block_size
    judge = []  # MoCAN's published score models, NAME=FOLDER, or NAME=-FOLDER of a cost, several
    # model
    n_layer = 2  # blocks
    n_head = 4  # attention heads
    n_embd = 128  # width
    block_size = 192  # longest prompt and response together, in tokens
    init = ""  # folder of published weights for the reference; it sets the sizes
    lora = 0  # rank of adapters on weights that stay as they are; 0: all weights are trained
    checkpoint_activations = False  # less memory: blocks are computed again in backward
    export = ""  # folder for the policies and learned score models in the published layout
    # training
    batch = 16  # pairs per micro-batch; a policy update: 2·batch responses
    accumulate = 1  # micro-batches per step
    sft_steps = 1000  # gradient steps of the reference policy, at most; 0: as --init has it
    sft_lr = 3e-3  # its learning rate
    score_steps = 1000  # gradient steps of each score model, at most
    score_lr = 1e-3  # its learning rate
    judge_runs = 1  # trainings of each score model, whose weights are averaged
    # offline samples and the dual
    prompts = 512  # N, training prompts that the reference answers
    responses = 32  # K, responses to each
    sample_batch = 256  # responses sampled at once
    beta = 1.0  # β, weight of the KL divergence to the reference
    margin = "50%"  # b, safety gains, comma separated: in units of g or % of the reachable
    constraints = ""  # safety preferences, comma separated; none: harmless; data: all
    # policies
    lr = 2e-4  # learning rate of MoCAN's and PeCAN's policy update
    steps = 800  # its gradient steps
    shots = 1  # 1: as in the paper; more: sample, solve and train from the policy so far
    shot_steps = 400  # gradient steps of each further shot
    shot_lr = 2e-4  # their learning rate
    shot_responses = 32  # K of each further shot
    group = 8  # G, samples of a prompt that a step compares in all pairs
    prealign_steps = 1575  # gradient steps of each pre-aligned policy, at most
    prealign_lr = 6e-5  # their learning rate; see pecan.prealign
    # evaluation
    eval_prompts = 240  # evaluation prompts, at most
    eval_responses = 24  # fresh responses to each


# What the artifacts of a stage and of all later ones remember. The other settings change nothing in
# them, but for --batch, --accumulate, --sample_batch and --device, which may differ.
REMEMBERED = {
    "reference": "quick seed dtype data world_pairs held_out calibration tokenizer template "
                 "system vocab_size max_new_tokens n_layer n_head n_embd block_size init lora "
                 "checkpoint_activations sft_steps sft_lr",
    "scores": "score_steps score_lr judge_runs constraints judge",
    "offline": "prompts responses",
    "prealign": "beta prealign_steps prealign_lr",
    "dual": "margin",
    "mocan": "lr steps shots shot_steps shot_lr shot_responses group",
    "pecan": ""}
STAGES = (*REMEMBERED, "evaluate")

SETTINGS = {name: default for name, default in vars(Config).items() if name[0] != "_"}
CHOICES = {"start": STAGES, "algo": ("mocan", "pecan", "all"), "dtype": ("float32", "bfloat16"),
           "tokenizer": ("vocab", "gpt2"), "template": ("auto", "plain", *data.TEMPLATES)}
LEAST = dict(seed=0, sft_steps=0, lora=0, vocab_size=300, prompts=2, responses=2, shot_responses=2,
             group=2, eval_prompts=2)

# the flags that --quick, --data and --init stand for, unless the command line has its own
QUICK = ("--world_pairs 2400 --n_embd 64 --sft_steps 360 --sft_lr 6e-3 --prompts 128 "
         "--responses 16 --steps 200 --prealign_steps 100 --prealign_lr 3e-4 --lr 4e-4 "
         "--eval_prompts 64 --eval_responses 8 ")
DATA = ("--accumulate 4 --prompts 2048 --responses 128 --shot_responses 128 --margin 25% "
        "--judge_runs 4 ")
INIT = (  # at β = 1 what honest judges promise is too little to see
    "--tokenizer gpt2 --sft_lr 5e-5 --score_lr 5e-5 --prealign_lr 5e-6 --lr 1.25e-5 "
    "--shot_lr 1e-5 --beta 0.5 --margin 50% --judge_runs 1 ")
INIT_SIZES = (  # without --quick: for some 100 million parameters on two CPU cores. Every response
    # is seen once (half of a further shot's), since a second visit is learned by heart
    "--accumulate 1 --max_new_tokens 32 --sft_steps 70 --score_steps 36 --prealign_steps 36 "
    "--prompts 512 --responses 8 --shot_responses 8 --steps 128 --shot_steps 64 "
    "--eval_prompts 64 --eval_responses 8 ")


# ---- the job
def main():
    c = settings(sys.argv[1:])
    held = enter(c)  # until main returns: the lock of --out
    split, names = data.load_pairs(  # names: "helpful", then the constraints
        c.data, c.world_pairs, c.held_out, c.calibration, c.constraints,
        c.judge if c.algo == "mocan" and not c.sft_steps else ())  # then prompts alone will do
    dual.parse_margin(c.margin, torch.ones(len(names) - 1))  # a bad one costs no training
    tok, tokenizer, pools = tokenize(c, split)
    judges = mocan.ready_judges(c.judge, names, split.calibration, c.device)
    reference = train_reference(c, tok, tokenizer, pools)
    prompts = data.spread([pair.prompt for pair in split.train], c.prompts)
    judges = train_judges(c, reference, split, pools, names, judges)
    offline = sample(c, "offline", c.responses, reference, reference, tok, prompts)
    policies, confirmed = {}, {}
    margin = None

    for algorithm in c.algo.replace("all", "mocan pecan").split():
        scorers = judges  # the first label, the others confirm and measure
        if algorithm == "pecan":  # policies that DPO made from one preference each label here
            dpo = prealign(c, reference, split, pools, names, judges)
            policies = {f"dpo-{name}": dpo[name] for name in names} | policies
            scorers = [dpo, *judges[1:]]
        policy = reference
        for shot in range(1, c.shots + 1):
            label = f"{algorithm} shot {shot}".removesuffix(" shot 1")
            sampled = offline if shot == 1 else sample(  # 1. sample
                c, f"{label} responses", c.shot_responses, policy, reference, tok, prompts)
            scored, samples = score(  # 2. score
                c, label, sampled, scorers, names, prompts, tok, confirmed.get(algorithm))
            confirmed[algorithm] = scored["confirmed"]
            if shot == 1:
                ref_mean = samples.mean_g  # (m,) E_ref[g]
            if margin is None:  # PeCAN gets MoCAN's, where both run
                margin = dual.parse_margin(c.margin, dual.reachable(samples.scores[1:]))  # (m,) b
            try:
                found = mocan.solve_from(samples, ref_mean, margin, c.beta)  # 3. dual
            except (ValueError, FloatingPointError) as error:  # dual.Infeasible among them
                if label in ("mocan", c.algo):  # the very first
                    raise
                print(f"  no policy {label}, by its scores: {error}")
                break
            policies[label] = policy = update(  # 4. update
                c, label, policy, scored, samples, margin, found)

    evaluate(c, reference, policies, judges, confirmed, names, margin, split, tok)
    export_models(c, policies, judges, tokenizer, tok)


def enter(c):
    """The device, torchrun's ranks and the folder -> its lock, a file that one process at a time
    can hold, until it ends; ValueError for a second one."""
    torch.backends.cuda.matmul.allow_tf32 = True  # logits: 0.007 nats on 256 tokens' log-ratio
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape of batch
    warnings.showwarning = lambda message, *_, **__: print(f"  warning: {message}")
    warnings.simplefilter("always", UserWarning)  # also what MoCAN's scores had, of PeCAN's
    if dist.is_torchelastic_launched():  # by torchrun
        if c.device.startswith("cuda"):
            c.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(c.device)
        dist.init_process_group()
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # the first process speaks, and locks the folder
            return sys.stdout
    os.makedirs(c.out, exist_ok=True)
    print(f"settings: {json.dumps(vars(c))}")
    lock = open(f"{c.out}/lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"{c.out}: another run is under way there; wait, or choose another --out") from None
    return lock


# ---- the stages: each returns its artifact, made now if it is not there
def tokenize(c, split):
    """The tokenizer, its artifact, and all pairs as {part of the split: Pool (P, 2, T)}."""
    saved = artifact(c, "reference", "tokenizer.pt",
                     data=hashlib.sha256(repr(split).encode()).hexdigest())
    if "began" in saved:
        pieces = None  # GPT-2's own
        if c.tokenizer == "vocab":
            pieces = data.frequent_pieces(split.train, c.vocab_size)
        finish(saved, pieces=pieces, files=data.published_files(c.init))
    limits = c.block_size - c.max_new_tokens, c.max_new_tokens
    files = saved["files"]
    if "tokenizer.json" in files:
        tok = data.read_tokenizer(c.init, files, c.template, c.system, *limits)
    else:
        tok = data.open_tokenizer(saved["pieces"], *limits)
    if c.system and tok.lead:  # as in plain text
        raise ValueError("--system: the text has no chat template with a place for it")
    if c.export:  # checked now: what there is by the names of exports, and that one can be made
        saved["files"] = data.with_tokenizer(files, tok)
        if c.system or c.template != "auto":
            saved["files"] = data.with_template(saved["files"], tok)
        os.makedirs(c.export, exist_ok=True)
        for name in {c.algo.replace("all", "mocan"), *os.listdir(c.export)}:
            if re.match("mocan|pecan|dpo-|score_", name):
                open_export(f"{c.export}/{name}", saved["files"])
    pools = {part: data.pair_pool(tok, pairs, f"{part} pairs")
             for part, pairs in split._asdict().items()}
    return tok, saved, pools


def train_reference(c, tok, tokenizer, pools):
    saved = artifact(c, "reference", "reference.pt", tokenizer=tokenizer)
    if "began" in saved:
        torch.manual_seed(data.stream(c.seed, "reference").initial_seed())
        config = GPTConfig(tok.known, c.block_size, c.n_layer, c.n_head, c.n_embd)
        model = GPT.from_pretrained(c.init) if c.init else GPT(config)
        sizes = model.config
        if sizes.score_head:
            raise ValueError(f"{c.init} is a score model, for --judge, not a policy")
        spare = sizes.vocab_size - tok.known
        if tok.encoding.name == "published":  # a model's own vocabulary may be rounded up
            spare = min(spare, 0)
        if spare or sizes.block_size < c.block_size:
            raise ValueError(
                f"{c.init} has {sizes.vocab_size} tokens and {sizes.block_size} positions; the "
                f"tokenizer, {tok.encoding.name} (its own would be in tokenizer.json), has "
                f"{tok.known} tokens, and --block_size is {c.block_size}")
        model.config = replace(sizes, dtype=c.dtype, lora=c.lora,
                               checkpoint_activations=c.checkpoint_activations)
        if c.lora and c.init:  # else there is nothing yet to adapt
            add_adapters(model)
        if c.sft_steps:
            model.to(c.device)
            mocan.train_reference(model, pools["train"], pools["calibration"],
                                  recipe(c, "reference", c.sft_steps, c.sft_lr))
        if c.lora:
            if not c.init:
                add_adapters(model.cpu())
            saved["frozen"] = merge(model, getattr(torch, c.dtype))
        finish(saved, **to_checkpoint(model))
    saved.pop("frozen", None)  # from_checkpoint reads it, and keeps one copy
    return saved


def train_judges(c, reference, split, pools, names, judges):
    """[{preference: artifact of its score model, or a ready one of `judges`}]: those that label,
    and those that only measure; in the built-in world none, where the scores are exact."""
    if not c.data or judges[0].keys() != judges[1].keys():
        judges.pop()
    for which, some in enumerate(judges):
        mine = split
        if judges[1:]:
            mine = split._replace(train=mocan.half(split.train, which))
        for name in names:
            if name in some or not c.data:
                continue
            label = f"score {name}{' second' * which}"
            some[name] = saved = artifact(c, "scores", f"{label}.pt", reference=reference)
            if "began" in saved:
                start = to_checkpoint(from_checkpoint(reference, c.device))
                start["config"] |= {"score_head": True, "tied": True}  # no other output layer
                start["weights"].pop("lm_head.weight", None)
                start["weights"]["score_head.weight"] = torch.zeros(1, start["config"]["n_embd"])
                model = from_checkpoint({**reference, **start}, c.device)  # all scores are 0
                parts = [mocan.preferences(getattr(mine, part), name, pool)
                         for part, pool in pools.items()]
                mocan.learn_score(model, label, *parts,
                                  recipe(c, label, c.score_steps, c.score_lr), c.judge_runs)
                finish(saved, **to_checkpoint(model),
                       pairs=mocan.map_pool(model, pools["calibration"]))
    return judges


def prealign(c, reference, split, pools, names, judges):
    """{preference: artifact of a policy and of its τ}, for PeCAN's scores. Where there are second
    judges, from the half of the conversations that these have not seen."""
    dpo = {}
    if c.judge:
        warnings.warn("PeCAN's scores are log-odds, those of --judge have their own units: one b "
                      "is not the same gain in both")
    if judges[1:]:
        split = split._replace(train=mocan.half(split.train, 0))
    for name in names:
        dpo[name] = saved = artifact(c, "prealign", f"dpo-{name}.pt", reference=reference)
        if "began" in saved:
            policy = from_checkpoint(reference, c.device)
            before = mocan.map_pool(policy, pools["calibration"])
            training, calibration = [mocan.preferences(getattr(split, part), name, pools[part])
                                     for part in ("train", "calibration")]
            _, tau = pecan.prealign(policy, training, calibration, c.beta,
                                    recipe(c, f"dpo-{name}", c.prealign_steps, c.prealign_lr))
            log_ratio = mocan.map_pool(policy, pools["calibration"]) - before  # (P, 2)
            finish(saved, **to_checkpoint(policy), tau=tau, pairs=c.beta * tau * log_ratio)
    return dpo


def sample(c, name, K, policy, reference, tok, prompts):
    """Responses of a policy, at first of the reference, for MoCAN and PeCAN alike."""
    saved = artifact(c, name.split()[0], f"{name}.pt", policy=policy)
    if "began" in saved:
        pool, logp = mocan.sample_pool(
            from_checkpoint(policy, c.device), tok, prompts, K, recipe(c, name))
        ref_logp = logp
        if policy is not reference:
            ref_logp = mocan.map_pool(from_checkpoint(reference, c.device), pool)
        finish(saved, **pool._asdict(), logp=logp, ref_logp=ref_logp)
    return saved


def score(c, label, sampled, scorers, names, prompts, tok, confirmed):
    """The scores of a sample: by scorers[0], MoCAN's judges or PeCAN's policies, which label, and
    by the second judges, if there are; {preference: artifact} each. In the units of mocan.confirm,
    which is asked in the first shot -> the artifact, and all of it as a mocan.Sample."""
    pool = data.Pool(sampled["tokens"], sampled["response_mask"])  # (N, K, T)
    name = {"mocan": "offline", "pecan": "prealign"}.get(label, label)  # the first shots'
    saved = artifact(c, name.split()[0], f"{name}_scores.pt", samples=sampled,
                     scorers=[scorer["run"] for some in scorers for scorer in some.values()])
    if "began" in saved:
        said, judges = [], scorers
        if label.startswith("pecan"):
            dpo, *judges = scorers
            said = [pecan.implicit_scores(dpo, pool, sampled["ref_logp"], c.beta, c.device)]
        for some in judges:
            said.append(mocan.score_pool(some, names, prompts, pool, tok, c.device))
        confirmed = confirmed or mocan.confirm(said, scorers, names)
        scores = mocan.in_units(confirmed["units"], said)
        finish(saved, scores=scores[0], second=scores[-1], confirmed=confirmed)
    if c.shots > 1 and "confirmed" not in saved:  # scores of one's own
        raise ValueError(f"{saved['path']}: scores of one's own serve one shot; --shots 1")
    saved.setdefault("confirmed", mocan.unconfirmed(scorers, names))
    scores = torch.as_tensor(saved["scores"]).float()
    if scores.shape != (len(names), *sampled["logp"].shape):
        raise ValueError(f"{saved['path']}: scores of shape {tuple(scores.shape)}; "
                         f"expected {', '.join(names)}, of {tuple(sampled['logp'].shape)} each")
    return saved, mocan.Sample(pool, sampled["logp"], sampled["ref_logp"], scores,
                               saved.get("second", scores))


def update(c, label, policy, scored, samples, margin, found):
    """The policy update, from the policy that was sampled, to which `predicted` refers: in a first
    shot the reference."""
    stage, *shot = label.split()
    saved = artifact(c, stage, f"{label}.pt", policy=policy, scores=scored, b=margin.tolist())
    if "began" in saved:
        gain, error = mocan.gains(samples, samples.scores, found.lam, c.beta)  # (1+m,) r's first
        error = error.hypot(mocan.error_of_units(scored["confirmed"], gain))
        print(f"dual: λ* = {numbers(found.lam)} ± {numbers(1.96 * found.lam_se)} at a margin of "
              f"{numbers(margin)}; predicted from the responses it was solved on: reward and gains "
              f"{numbers(gain)} ± {numbers(1.96 * error)}, KL {found.kl:.3f}; effective sample "
              f"size {found.ess:.1f} a prompt, 5th percentile {found.ess_p5:.1f}; "
              f"{found.iterations} evaluations")
        if "agree" in scored["confirmed"]:
            second, its_error = mocan.gains(samples, samples.second, found.lam, c.beta)
            print(f"  by the second judges: reward and gains {numbers(second)} ± "
                  f"{numbers(1.96 * its_error)}")
        model = from_checkpoint(policy, c.device)
        steps, lr = (c.shot_steps, c.shot_lr) if shot else (c.steps, c.lr)
        plan = recipe(c, label, steps, lr, key=stage)  # all shots draw alike
        if stage == "mocan":
            mocan.train_mocan(model, samples, found.lam, c.beta, c.group, plan)
        else:
            pecan.train_pecan(model, samples, found.lam, c.beta, c.group, plan)
        finish(saved, **to_checkpoint(model), lam=found.lam.tolist(),
               predicted={**found._asdict(), "gain": gain, "gain_se": error})
    return saved


def recipe(c, stage, steps=0, lr=0.0, key=""):
    return mocan.Recipe(stage, steps, lr, f"{c.seed}/{key or stage}",
                        c.batch if steps else c.sample_batch, c.accumulate, c,
                        min(20, steps // 10))  # of warm-up


# ---- what came of it
def evaluate(c, reference, policies, judges, confirmed, names, margin, split, tok):
    """Fresh responses of every policy to evaluation prompts -> results.json, samples.jsonl and the
    table. Gains are over the reference's responses to the same prompts."""
    remember(c)
    if c.algo == "pecan":  # no judge labels: the second ones measure, in the units of its scores
        judges = judges[-1:]
    confirmed, *_ = confirmed.values()  # MoCAN's, where both ran
    units = confirmed["units"][-len(judges):]
    prompts = data.spread([pair.prompt for pair in split.evaluation], c.eval_prompts)
    print(f"\nevaluate: {c.eval_responses} fresh responses of each policy to each of "
          f"{len(prompts)} evaluation prompts")
    model = from_checkpoint(reference, c.device)
    rows, texts = {}, {}
    for name, saved in {"reference": reference, **policies}.items():
        policy = from_checkpoint(saved, c.device)
        pool, logp = mocan.sample_pool(
            policy, tok, prompts, c.eval_responses,
            recipe(c, f"evaluate {name}", key="evaluate"))  # the same noise for all
        said = mocan.in_units(units, [
            mocan.score_pool(some, names, prompts, pool, tok, c.device) for some in judges])
        samples = mocan.Sample(pool, logp, mocan.map_pool(model, pool), said[0], said[-1])
        if not rows:
            ref = samples
        texts[name] = pool.texts(tok), samples.second.flatten(1).T.tolist()
        how = logp - samples.ref_logp, 1 / c.eval_responses
        rows[name] = {**mocan.compare(samples.scores, *how, ref.scores),
                      "second": mocan.compare(samples.second, *how, ref.second),
                      "margin": margin.tolist(), "lam": saved.get("lam", []),
                      "predicted": saved.get("predicted"), "seconds": saved.get("seconds", 0.0)}
    # samples, policy: of the last one, the nearest to the optimum
    frontier = mocan.optima(samples, ref, mocan.map_pool(policy, ref.pool), margin, c.beta)
    if frontier:
        rows["optimum"] = {**frontier[15], "margin": margin.tolist(), "seconds": 0.0}  # at λ*
    write_results(c, rows, frontier, confirmed, list(map(data.transcript, prompts)), texts)
    print_table(names[1:], rows)
    if len(judges) == 2:
        print("\nby the second judges, which label nothing:")
        print_table(names[1:], {name: row | row["second"] for name, row in rows.items()})


def write_results(c, rows, frontier, confirmed, prompts, texts):
    """results.json, samples.jsonl, and three samples on the screen; texts {policy: N·K of them, and
    what the second judges say, r, g_1 … of each}."""
    K = c.eval_responses
    write(c, "results.json", json.dumps(
        {"config": vars(c), "policies": rows, "frontier": frontier, "confirmed": confirmed},
        default=torch.Tensor.tolist, indent=1))
    samples = [{"instruction": prompts[i // K], "output": text, "generator": name, "scores": scores}
               for name in texts for i, (text, scores) in enumerate(zip(*texts[name]))]
    write(c, "samples.jsonl", "".join(f"{json.dumps(sample)}\n" for sample in samples))
    for n in range(0, len(prompts), len(prompts) // 3 + 1):
        print(f"\n  {prompts[n]}")
        for name in texts:
            print(f"    {name:>14}: {' '.join(texts[name][0][n * K].split())}")


def print_table(names, rows):
    """names: of the constraints; rows {policy: what `compare` says of it, margin, lam, …}."""
    gains = [f"  {name + ' gain':>23}  {'b':>6}  {'holds':>12}" for name in names]
    print(f"\n{'':22}  {'reward gain':>23}{''.join(gains)}  {'KL':>13}  seconds  λ*")
    for policy, row in rows.items():
        line = f"{policy:22}  {cell(row['reward_gain'], row['reward_gain_ci'])}"
        for gain, ci, b in zip(row["constraint_gain"], row["constraint_gain_ci"], row["margin"]):
            line += f"  {cell(gain, ci)}  {b:6.3f}  {holds(gain, ci, b):>12}"
        print(f"{line}  {row['kl']:.3f} ± {row['kl_ci'][1] - row['kl']:.3f}  "
              f"{row['seconds']:7.0f}  {numbers(row['lam'])}")


def numbers(values):
    return ", ".join(f"{x:.3f}" for x in values)


def cell(x, ci):
    return f"{x:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]"


def holds(gain, ci, b):
    """By the measured gain; a shortfall within its interval is "within error"."""
    if gain >= b - 1e-6:
        return "yes"
    return "within error" if ci[1] >= b else "no"


def export_models(c, policies, judges, tokenizer, tok):
    """The policies, and the score models that were learned here."""
    models = [saved for some in [policies, *judges] for saved in some.values()
              if "weights" in saved]
    for saved in models if c.export else ():
        folder = f"{c.export}/{Path(saved['path']).stem}"
        # a score model's score is read at the last token that is no padding
        export(from_checkpoint(saved), folder, tokenizer["files"],
               pad_token_id=(tok.next or tok.before)[-1])
        print(f"exported {folder}")
    Path(f"{c.out}/checkpoint.pt").unlink(missing_ok=True)  # the end


# ---- the run's folder
def write(c, name, text):
    data.replace_file(f"{c.out}/{name}", lambda file: file.write(text.encode()))
    mocan.gather(name)  # no rank goes on before it is there


def remember(c):
    """Keeps the settings, which --from and --resume read, once something is made by them."""
    write(c, "run.json", json.dumps({"config": vars(c) | {"resume": False}}, indent=1))


def artifact(c, stage, name, **inputs):
    """A stage's result, {name: tensor or plain value}, from the file `name`, where --from starts
    later or the run that --resume continues has made it; else a dict with "began", to `finish`.

    With it is kept what it was made from: the settings of its stage and of earlier ones, and the
    runs that made its inputs. A file that is not made from the very same is refused.
    """
    path = f"{c.out}/{name.replace(' ', '_')}"
    at = STAGES.index(stage)
    made_from = {what: getattr(c, what) for x in STAGES[:at + 1] for what in REMEMBERED[x].split()}
    for what, x in inputs.items():
        made_from[f"input {what}"] = x["run"] if isinstance(x, dict) else x
    remedy = f"make it with --from {stage}"
    earlier = at < STAGES.index(c.start)
    if earlier or c.resume and os.path.exists(path):
        saved = data.load(path, remedy)
        if earlier or saved.get("run") == c.run:
            own = saved.get("made_from", made_from)  # or a file of one's own, which passes
            own = own if isinstance(own, dict) else {}
            saved.setdefault("run", os.path.getmtime(path))
            for what in made_from | own:
                if made_from.get(what) != own.get(what):
                    raise ValueError(f"{path}: made with {what} {own.get(what)}, not "
                                     f"{made_from.get(what)}; {remedy}")
            return saved
    print(f"\n{stage}: {path}", flush=True)
    remember(c)
    return {"path": path, "made_from": made_from, "run": c.run, "began": time.time()}


def finish(saved, **content):
    """Fill in and write an artifact that was begun."""
    path = saved.pop("path")
    saved |= content
    saved["seconds"] = time.time() - saved.pop("began")
    data.save(saved, path)
    mocan.gather(path)  # no rank reads it before it is there
    saved |= data.load(path, "is the disk full?")  # which frees the memory


# ---- the command line
def settings(argv):
    """Defaults, then the flags that --quick (else --data) and --init stand for, or those of the run
    that --from or --resume continues, then the command line. Bad values exit with code 2."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    flags = "--dtype float32 " if given.get("device") == "cpu" else ""
    if "quick" in given:
        flags += QUICK
    elif "data" in given:
        flags += DATA
    if "init" in given:
        flags += INIT
        if "quick" not in given:
            flags += INIT_SIZES
        chat = data.chat_template(data.published_files(given["init"]))
        if chat and given.get("template") != "plain":
            flags += "--sft_steps 0 "
    base = vars(parser.parse_args(flags.split()))
    if "resume" in given or "start" in given:  # they continue a run
        path = f"{given.get('out', Config.out)}/run.json"
        try:  # the folder may have moved since
            base = json.loads(Path(path).read_text())["config"] | {"out": Config.out}
        except Exception:  # a damaged file raises half a dozen kinds
            parser.error(f"--from and --resume continue a run, but {path} is missing or damaged; "
                         "leave the flag out, which begins anew")
        if "resume" not in given:
            base.pop("run", None)
        elif given.keys() - {"resume", "out", "device", "checkpoint_every"}:
            parser.error("--resume keeps the run's settings; next to it only --out, --device and "
                         "--checkpoint_every may stand; --from changes settings")
    c = Config(**{"run": str(time.time_ns()), **SETTINGS, **base, **given})
    check(parser, c)
    return c


def build_parser():
    parser = argparse.ArgumentParser(
        usage="python train.py [--SETTING VALUE ...]   (--help lists them)",
        description="One-shot safety alignment: a dual, then one policy update.",
        epilog=f"--quick stands for {QUICK}too, --init for {INIT}(of a chat model --sft_steps 0) "
               f"and, without --quick, --data for {DATA}and --init for {INIT_SIZES}too",
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = dual.NEGATIVE
    comments = dict(re.findall(r"^    (\w+) = .*  # (.*)$", inspect.getsource(Config), re.M))
    for name, default in SETTINGS.items():
        options = {"type": type(default), "choices": CHOICES.get(name)}
        if default is False:
            options = {"action": "store_true"}
        elif default == []:
            options = {"nargs": "+", "action": "extend"}
        parser.add_argument(
            "--from" if name == "start" else f"--{name}", dest=name, **options,
            help=f"{comments[name]} (default: {default})".replace("%", "%%"))
    return parser


def check(parser, c):
    for name, value in vars(c).items():
        least = LEAST.get(name, 5e-324)  # the smallest number above 0
        if type(value) in (int, float) and not least <= value < math.inf:
            parser.error(f"--{name} is {value}; it must be finite, and "
                         f"{f'at least {least}' if name in LEAST else 'above 0'}")
    if c.judge and not c.data:
        parser.error("--judge needs --data: the built-in world has scores of its own")
    if c.template != "auto" and not c.init:
        parser.error("--template needs --init: it is of a published model's chat")
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
    for console in filter(None, (sys.stdout, sys.stderr)):  # a service may have none
        console.reconfigure(errors="backslashreplace")  # whatever its encoding
    try:
        main()
        if dist.is_initialized():
            time.sleep(0.2)  # until gloo's threads have let go of their tensors
            dist.destroy_process_group()
    except (ValueError, FloatingPointError, OSError) as error:  # what a user can mend
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "memory" in str(error):
            sys.exit(f"error: {data.in_one_line(error)}; go on with --resume, or begin anew with "
                     "smaller sizes, --batch and --sample_batch, or --checkpoint_activations")
        if not dist.is_initialized():
            raise
        sys.exit(f"error: another process of this run ended ({data.in_one_line(error)}); mend what "
                 "it says, then go on with --resume")
    except KeyboardInterrupt:
        sys.exit("interrupted; python train.py --resume, and its --out if it had one, goes on")


if __name__ == "__main__":
    run_as_command()
