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

`main` is the story; below it stand the stages, the results, the run's folder and the command line.
"Earlier" and "later" stages are those above and below in this list. run.json keeps the settings.
"""

import argparse
import copy
import fcntl
import functools
import inspect
import json
import math
import os
import random
import secrets
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.distributed as dist

import data
import dual
import mocan
import pecan
from model import (GPT, GPTConfig, export, fingerprint, from_checkpoint, load, replace_file, save,
                   to_checkpoint)

STAGES = ("reference", "scores", "offline", "prealign", "dual", "mocan", "pecan", "evaluate")


ABOVE_0 = 1e-300  # the least value of what must be > 0
CUDA = torch.cuda.is_available()


def setting(default, stage, help, choices=None, least=ABOVE_0):
    """A field of Config. stage: the first stage that it changes, whose artifacts and all later ones
    remember it; None: not remembered, artifacts are reused whatever it was."""
    metadata = {"stage": stage, "help": help, "choices": choices, "least": least}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    start: str = setting("reference", None, "(--from) keep what earlier stages made, run from here",
                         STAGES)
    out: str = setting("out", None, "folder of all artifacts")
    resume: bool = setting(False, None, "go on with the run in --out that was interrupted")
    checkpoint_every: float = setting(60.0, None, "seconds between checkpoints of a loop")
    quick: bool = setting(False, "reference", "a run of seconds, to see that everything works")
    algo: str = setting("all", None, "which policies to train", ("mocan", "pecan", "all"))
    seed: int = setting(0, "reference", "seeds every random stream", least=0)
    device: str = setting("cuda" if CUDA else "cpu", None, "cpu, cuda, cuda:1, …")
    dtype: str = setting("bfloat16" if CUDA and torch.cuda.is_bf16_supported(False) else "float32",
                         "reference", "arithmetic of the blocks; logits and losses stay float32",
                         ("float32", "bfloat16"))
    # text
    data: tuple = setting((), "reference",
                          "preference files, FILE or NAME=FILE, several; none: the built-in world")
    world_pairs: int = setting(36000, "reference", "preference pairs that the world writes")
    held_out: float = setting(0.2, "reference", "share of the conversations kept for evaluation")
    calibration: float = setting(0.1, "reference", "share kept for temperatures and early stopping")
    tokenizer: str = setting("vocab", "reference", "vocab: of the training text; gpt2: GPT-2's",
                             ("vocab", "gpt2"))
    vocab_size: int = setting(4096, "reference", "largest size of vocab", least=300)
    max_new_tokens: int = setting(96, "reference",
                                  "longest response; a prompt may fill the rest of block_size")
    # model
    n_layer: int = setting(2, "reference", "blocks")
    n_head: int = setting(4, "reference", "attention heads")
    n_embd: int = setting(128, "reference", "width")
    block_size: int = setting(192, "reference", "longest prompt and response together, in tokens")
    init: str = setting("", "reference", "folder of published GPT-2 weights, where the reference "
                        "starts; its sizes and --tokenizer gpt2 follow from it")
    checkpoint_activations: bool = setting(False, "reference",
                                           "less memory: blocks are computed again in backward")
    export: str = setting("", None, "folder for the policies in GPT-2's published layout")
    # training
    batch: int = setting(16, None, "pairs per micro-batch; a policy update: 2·batch responses")
    accumulate: int = setting(1, None, "micro-batches per step")
    sft_steps: int = setting(1000, "reference", "gradient steps of the reference policy, at most")
    sft_lr: float = setting(3e-3, "reference", "its learning rate")
    score_steps: int = setting(1000, "scores", "gradient steps of each score model, at most")
    score_lr: float = setting(1e-3, "scores", "its learning rate")
    # offline samples and the dual
    prompts: int = setting(512, "offline", "N, training prompts that the reference answers")
    responses: int = setting(32, "offline", "K, responses to each", least=2)
    sample_batch: int = setting(256, None, "responses sampled at once")
    beta: float = setting(1.0, "prealign", "β, weight of the KL divergence to the reference")
    margin: str = setting("50%", "dual",
                          "b, safety gains, comma separated: in units of g or % of the reachable")
    constraints: str = setting("", "scores",
                               "safety preferences, comma separated; none: harmless; data: all")
    # policy
    lr: float = setting(2e-4, "mocan", "learning rate of MoCAN's and PeCAN's policy update")
    steps: int = setting(800, "mocan", "its gradient steps")
    shots: int = setting(1, "mocan",
                         "1: as in the paper; more: sample, solve and train from the policy so far")
    shot_steps: int = setting(400, "mocan", "gradient steps of each further shot")
    shot_lr: float = setting(2e-4, "mocan", "their learning rate")
    shot_responses: int = setting(32, "mocan", "K of each further shot", least=2)
    group: int = setting(8, "mocan", "G, samples of a prompt that a step compares in all pairs",
                         least=2)
    prealign_steps: int = setting(1575, "prealign",
                                  "gradient steps of each pre-aligned policy, at most")
    prealign_lr: float = setting(6e-5, "prealign", "their learning rate; see pecan.prealign")
    # evaluation
    eval_prompts: int = setting(240, None, "evaluation prompts, at most", least=2)
    eval_responses: int = setting(24, None, "fresh responses to each")
    run: str = ""  # which run made an artifact; a resumed run is the same


SETTINGS = [f for f in fields(Config) if f.metadata]

QUICK = dict(world_pairs=2400, n_embd=64, sft_steps=360, sft_lr=6e-3, prompts=128,
             responses=16, steps=120, prealign_steps=100, prealign_lr=3e-4, lr=1e-3,
             eval_prompts=64, eval_responses=8)
DATA = dict(accumulate=4, prompts=2048, responses=128, shot_responses=128, margin="25%")
INIT = dict(tokenizer="gpt2", sft_lr=5e-5, score_lr=5e-5, prealign_lr=2e-5, lr=2e-5, shot_lr=2e-5)


# ---- the job
def main():
    c = settings(sys.argv[1:])
    c, held = enter(c)  # held until main returns: the lock of --out
    split, names = data.load_pairs(  # names: "helpful", then the constraints
        c.data, c.world_pairs, random.Random(f"{c.seed}/data"), c.held_out, c.calibration,
        c.constraints)
    dual.parse_margin(c.margin, torch.ones(len(names) - 1))  # a bad one costs no training
    tok = tokenizer_of_run(c, split.train)
    pools = data.pools(tok, split)
    reference = reference_policy(c, tok, split, pools)
    prompts = data.some_prompts(split.train, c.prompts)
    pool, ref_logp = sample_reference(c, reference, tok, prompts)  # (N, K, T), (N, K)
    judges = functools.cache(  # preference -> score model; without MoCAN only the table asks
        lambda: learn_judges(c, reference, split, pools, names))
    policies = {}  # name -> its artifact

    if c.algo != "pecan":
        scores = artifact(c, "offline", "offline_scores.pt", make_scores, judges(), names, prompts,
                          pool, tok)["scores"]  # (1+m, N, K)
        offline = mocan.Sample(pool, ref_logp, ref_logp, scores)
        margin = dual.parse_margin(c.margin, dual.reachable(scores[1:]))  # (m,)
        policies |= shoot(c, reference, tok, prompts, "mocan", offline, margin, mocan.train_mocan,
                          lambda pool, _: mocan.score_pool(
                              judges(), names, prompts, pool, tok, c.device))
    if c.algo != "mocan":
        dpo = prealigned(c, reference, split, pools, names, pool, ref_logp)
        implicit = torch.stack([saved["implicit"] for saved in dpo.values()])  # (1+m, N, K)
        offline = mocan.Sample(pool, ref_logp, ref_logp, implicit)
        if c.algo == "pecan":
            margin = dual.parse_margin(c.margin, dual.reachable(implicit[1:]))
        try:
            policies |= shoot(c, reference, tok, prompts, "pecan", offline, margin,
                              pecan.train_pecan, lambda pool, ref_logp: pecan.implicit_scores(
                                  dpo, pool, ref_logp, c.beta, c.device))
        except dual.Infeasible as error:
            if c.algo == "pecan":
                raise
            print(f"  no PeCAN policy, by its implicit scores: {error}")
        policies = dpo | policies
    evaluate(c, reference, policies, judges(), names, margin, split, tok)
    export_policies(c, policies)
    checkpoint(c).remove()


def enter(c):
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


# ---- the stages; make_… returns what an artifact keeps
def tokenizer_of_run(c, train):
    saved = artifact(c, "reference", "tokenizer.pt", make_tokenizer, train)
    return data.open_tokenizer(saved["pieces"], c.block_size - c.max_new_tokens, c.max_new_tokens)


def make_tokenizer(c, train):
    if c.tokenizer == "gpt2":
        return {"pieces": None}
    return {"pieces": data.frequent_pieces(train, c.vocab_size)}


def reference_policy(c, tok, split, pools):
    saved = artifact(c, "reference", "reference.pt", make_reference, tok, split, pools)
    return from_checkpoint(saved, c.device)


def make_reference(c, tok, split, pools):
    model = first_model(c, tok)
    mocan.train_reference(
        model, pools("train"), recipe(c, "reference", c.sft_steps, c.sft_lr),
        lambda: -mocan.logprobs(model, pools("calibration")).mean().item())  # nats a response
    return to_checkpoint(model)


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


def sample_reference(c, reference, tok, prompts):
    """Pool (N, K, T) and the reference's log-probabilities of it (N, K)."""
    saved = artifact(c, "offline", "offline.pt", make_offline, reference, tok, prompts)
    return data.Pool(saved["tokens"], saved["response_mask"]), saved["ref_logp"]


def make_offline(c, reference, tok, prompts):
    pool, ref_logp = mocan.sample_pool(reference, tok, prompts, draw(c, "offline", c.responses))
    return {**pool._asdict(), "ref_logp": ref_logp}


def learn_judges(c, reference, split, pools, names):
    """{preference: score model, on the CPU}; empty where the world's exact functions serve."""
    return {name: from_checkpoint(artifact(c, "scores", f"score_{name}.pt", make_judge, reference,
                                           split, pools, name)) for name in names if c.data}


def make_judge(c, reference, split, pools, name):
    model = new_model(c, replace(reference.config, score_head=True), f"scores/{name}")
    model.load_state_dict(reference.state_dict(), strict=False)  # all but the head
    plan = recipe(c, f"score {name}", c.score_steps, c.score_lr)
    mocan.learn_score(model, name, *[
        data.preference_tensors(pools(part), getattr(split, part), name)
        for part in split._fields], plan)
    return to_checkpoint(model)


def make_scores(c, judges, names, prompts, pool, tok):
    return {"scores": mocan.score_pool(judges, names, prompts, pool, tok, c.device)}


def prealigned(c, reference, split, pools, names, pool, ref_logp):
    """PeCAN, steps 1 and 2 -> {dpo-NAME: artifact}."""
    ref_of = functools.cache(  # ln π_ref of all its responses, once for all preferences
        lambda part: mocan.logprobs(reference, pools(part)).flatten())
    return {f"dpo-{name}": artifact(c, "prealign", f"dpo-{name}.pt", make_prealigned, reference,
                                    name, split, pools, pool, ref_logp, ref_of) for name in names}


def make_prealigned(c, reference, name, split, pools, pool, ref_logp, ref_of):
    """A pre-aligned policy, its temperature, and its implicit scores of the offline pool (N, K)."""
    policy = copy.deepcopy(reference)
    training = data.preference_tensors(pools("train"), split.train, name)
    calibration = data.preference_tensors(pools("calibration"), split.calibration, name)
    plan = recipe(c, f"dpo-{name}", c.prealign_steps, c.prealign_lr)
    tau = pecan.prealign_and_calibrate(
        policy, name, training, ref_of("train")[training.where], calibration,
        ref_of("calibration")[calibration.where], c.beta, plan)
    implicit = c.beta * tau * (mocan.logprobs(policy, pool) - ref_logp)
    return {**to_checkpoint(policy), "tau": tau, "implicit": implicit}


def shoot(c, reference, tok, prompts, stage, offline, margin, update, score_of):
    """--shots policy updates, each from the one before -> {"mocan": artifact, "mocan shot 2": …}.

    update(policy, sample, lam, beta, group, recipe) trains the policy in place;
    score_of(pool, ref_logp) -> (1+m, N, K) scores the responses of further shots.
    """
    policies = {}
    policy = reference
    ref_mean = offline.scores[1:].double().mean(dim=(1, 2))  # (m,) E_ref[g]
    mocan.solve_from(offline, ref_mean, margin, c.beta)  # raises Infeasible before anything is made
    for shot in range(1, c.shots + 1):
        label = stage if shot == 1 else f"{stage} shot {shot}"
        policies[label] = artifact(
            c, stage, f"{label.replace(' ', '_')}.pt", make_shot, policy, reference, tok, prompts,
            offline, ref_mean, update, score_of, label, margin.tolist(), shot)
        policy = from_checkpoint(policies[label], c.device)
    return policies


def make_shot(c, policy, reference, tok, prompts, offline, ref_mean, update, score_of, label, b,
              shot):
    """One shot: responses of the policy so far, the dual, the policy update."""
    sample = offline
    plan = recipe(c, label, c.steps, c.lr)
    if shot > 1:
        sample = mocan.sample_from(policy, reference, tok, prompts,
                                   draw(c, f"{label}, responses", c.shot_responses), score_of)
        plan = recipe(c, label, c.shot_steps, c.shot_lr)
    plan = plan._replace(key=f"{c.seed}/{label.split()[0]}")  # every shot draws alike
    try:
        found = mocan.solve_from(sample, ref_mean, b, c.beta)
    except dual.Infeasible as error:  # by the further shot's own responses
        print(f"  {label} changes nothing, by its responses: {error}")
        return to_checkpoint(policy)
    mocan.say_dual(label, b, found)
    policy = copy.deepcopy(policy)
    update(policy, sample, found.lam, c.beta, c.group, plan)
    return {**to_checkpoint(policy), "lam": found.lam.tolist(), "predicted": found._asdict()}


# ---- what the stages share
def new_model(c, config, purpose):
    torch.manual_seed(data.stream(c.seed, purpose).initial_seed())
    return GPT(config).to(c.device)


def recipe(c, stage, steps, lr):
    return mocan.Recipe(stage, steps, lr, f"{c.seed}/{stage}", c.batch, c.accumulate,
                        checkpoint(c))


def draw(c, stage, K):
    return mocan.Draw(stage, K, f"{c.seed}/{stage}", c.sample_batch, checkpoint(c))


def checkpoint(c):
    """Where the loop that is under way keeps its state."""
    return mocan.Checkpoint(f"{c.out}/checkpoint.pt", c.checkpoint_every, c.run, c.resume)


# ---- what came of it
def evaluate(c, reference, policies, judges, names, margin, split, tok):
    """Fresh responses of every policy to evaluation prompts -> results.json, samples.jsonl and the
    table."""
    prompts = data.some_prompts(split.evaluation, c.eval_prompts)
    print(f"\nevaluate: {c.eval_responses} fresh responses of each policy to each of "
          f"{len(prompts)} evaluation prompts")
    rows, texts, frontier = mocan.measure(
        {"reference": to_checkpoint(reference), **policies}, reference, judges, names, tok,
        prompts, draw(c, "evaluate", c.eval_responses), margin, c.beta)
    prompts = [data.transcript(prompt) for prompt in prompts]
    results = {"config": asdict(c), "policies": rows, "frontier": frontier}
    write(c, "results.json", json.dumps(results, default=torch.Tensor.tolist, indent=1))
    samples = [{"instruction": prompts[i // c.eval_responses], "output": text, "generator": name}
               for name in texts for i, text in enumerate(texts[name])]
    write(c, "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    for i in range(0, len(prompts), len(prompts) // 3 + 1):
        print(f"\n  {prompts[i]}")
        for name in texts:
            print(f"    {name:>14}: {' '.join(texts[name][i * c.eval_responses].split())}")
    mocan.print_table(names[1:], rows)


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


def artifact(c, stage, name, make, *args):
    """A stage's result, {name: tensor or plain value}, kept in the file `name`: read where --from
    starts later or the run that --resume continues has made it, else make(c, *args).

    With it is kept what it was made from: the settings of its stage and earlier ones, and a
    fingerprint of every argument. A file that others made is refused.
    """
    path = f"{c.out}/{name}"
    stages = STAGES[:STAGES.index(stage) + 1]
    made_from = {f.name: getattr(c, f.name) for f in SETTINGS if f.metadata["stage"] in stages}
    inputs = list(inspect.signature(make).parameters)[1:]  # their names: all but c
    made_from |= {f"input {what}": fingerprint(arg) for what, arg in zip(inputs, args)}
    remedy = f"make it with --from {stage}"
    finished = c.resume and os.path.exists(path) and load(path, remedy).get("run") == c.run
    if finished or STAGES.index(stage) < STAGES.index(c.start):
        return load(path, remedy, made_from)
    print(f"\n{stage}: {path}", flush=True)
    write(c, "run.json", json.dumps({"config": asdict(replace(c, resume=False))}, indent=1))
    began = time.time()
    saved = {**make(c, *args), "made_from": made_from, "run": c.run, "seconds": time.time() - began}
    save(saved, path)
    return saved


# ---- the command line
def settings(argv):
    """Defaults, then --quick's, --data's or those of the run that --from continues, then the
    command line. Bad values exit with code 2."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    base = {}
    if given.get("device") == "cpu":
        base["dtype"] = "float32"
    if given.get("quick"):
        base |= QUICK
    elif "data" in given:
        base |= DATA
    if "init" in given:
        base |= INIT
    if given.get("resume"):
        base = continued(parser, "--resume", given)
        if given.keys() - {"resume", "out", "device", "checkpoint_every"}:
            parser.error("--resume keeps the run's settings; next to it only --out, --device and "
                         "--checkpoint_every may stand; --from changes settings")
    elif "start" in given:
        base = continued(parser, f"--from {given['start']}", given)
    values = {"run": secrets.token_hex(8), **base, **given}
    values["data"] = tuple(values.get("data", ()))
    c = Config(**values)
    check(parser, c)
    return c


def build_parser():
    parser = argparse.ArgumentParser(
        usage="python train.py [--SETTING VALUE ...]   (--help lists them)",
        description="One-shot safety alignment: a dual, then one policy update.",
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in SETTINGS:
        with_data = f"; with --data {DATA[f.name]}" if f.name in DATA else ""
        text = f"{f.metadata['help']} (default: {f.default}{with_data})".replace("%", "%%")
        options = {"dest": f.name, "help": text}
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        elif isinstance(f.default, tuple):
            options |= {"nargs": "+", "action": "extend"}
        else:
            options |= {"type": type(f.default), "choices": f.metadata["choices"]}
        parser.add_argument("--from" if f.name == "start" else f"--{f.name}", **options)
    return parser


def continued(parser, what, given):
    """The settings of the run that --from or --resume continues."""
    out = given.get("out", Config.out)
    path = f"{out}/run.json"
    try:
        with open(path) as file:
            old = json.load(file)["config"]
        kept = {f.name: old.get(f.name, f.default) for f in fields(Config)}
    except Exception:  # a damaged file raises half a dozen kinds
        parser.error(f"{what} continues a run, but {path} is missing or damaged; drop it")
    if not given.get("resume"):
        del kept["run"]
    return {**kept, "out": out}


def check(parser, c):
    for f in SETTINGS:
        value = getattr(c, f.name)
        least = f.metadata["least"]
        if type(f.default) in (int, float) and not least <= value < math.inf:
            wanted = "> 0" if least == ABOVE_0 else f"at least {least}"
            parser.error(f"--{f.name} is {value}; it must be {wanted}")
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


if __name__ == "__main__":
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
