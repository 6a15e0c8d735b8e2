"""
train.py: the whole job, from preferences to an aligned policy and a table that says what came of
it.

    python train.py                           the built-in world, every policy, some minutes
    python train.py --data FILE               real preferences
    python train.py --from mocan --lr 3e-4    the same run again from that stage on, with a change

The stages, and the artifact that each leaves in --out:

    reference   supervised fine-tuning                     reference.pt, tokenizer.json
    scores      reward and safety models, for --data       score_*.pt
    offline     K responses per prompt from π_ref, scored  offline.pt, offline_scores.pt
    prealign    PeCAN: one DPO policy per preference       dpo-*.pt
    dual        λ*, and what it predicts                   none: solved anew in every run
    mocan       one policy update                          mocan*.pt
    pecan       one policy update                          pecan*.pt
    evaluate    fresh responses on evaluation prompts      results.json, samples.jsonl, tradeoff.svg

`main` is the story; below it stand the stages, the results, the run's folder and the command line.
"Earlier" and "later" stages are those above and below in this list. run.json keeps the settings.
"""

import argparse
import copy
import json
import math
import os
import random
import shlex
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace

import torch

import data
import dual
import mocan
import pecan
from model import GPT, GPTConfig, from_checkpoint, load, save, to_checkpoint

STAGES = ("reference", "scores", "offline", "prealign", "dual", "mocan", "pecan", "evaluate")


ABOVE_0 = 1e-300  # the least value of what must be > 0


def setting(default, stage, help, choices=None, least=ABOVE_0):
    """A field of Config. stage: the first stage that it changes, whose artifacts and all later ones
    remember it; None: not remembered, artifacts are reused whatever it was."""
    metadata = {"stage": stage, "help": help, "choices": choices, "least": least}
    return field(default=default, metadata=metadata)


def default_dtype():
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"  # not if emulated


@dataclass(frozen=True)
class Config:
    start: str = setting("reference", None, "(--from) reuse the artifacts of earlier stages and "
                         "run from this one", STAGES)
    out: str = setting("out", None, "folder of all artifacts")
    quick: bool = setting(False, "reference", "shrink the stages: a run of seconds, to see that "
                          "everything works")
    algo: str = setting("all", None, "which policies to train", ("mocan", "pecan", "all"))
    seed: int = setting(0, "reference", "seeds every random stream", least=0)
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", None,
                          "cpu, cuda, cuda:1, …")
    dtype: str = setting(default_dtype(), "reference", "arithmetic of the blocks under autocast; "
                         "logits and losses stay float32", ("float32", "bfloat16", "float16"))
    # text
    data: tuple = setting((), "reference", "preference files, FILE or NAME=FILE, one or more; none:"
                          " the built-in world")
    world_pairs: int = setting(36000, "reference", "preference pairs that the world writes")
    held_out: float = setting(0.2, "reference", "share of the conversations kept for evaluation")
    calibration: float = setting(0.1, "reference", "share kept for temperatures and early stopping")
    tokenizer: str = setting("vocab", "reference", "vocab: built from the training text; gpt2: "
                             "GPT-2's", ("vocab", "gpt2"))
    vocab_size: int = setting(4096, "reference", "largest size of the vocab tokenizer",
                              least=300)
    max_new_tokens: int = setting(96, "reference", "longest response; a prompt may fill the rest "
                                  "of block_size")
    # model
    n_layer: int = setting(2, "reference", "blocks")
    n_head: int = setting(4, "reference", "attention heads")
    n_embd: int = setting(128, "reference", "width")
    block_size: int = setting(192, "reference", "longest prompt and response together, in tokens")
    # training
    batch: int = setting(16, None, "pairs per micro-batch; a policy update: 2·batch responses")
    accumulate: int = setting(1, None, "micro-batches per step")
    warmup: int = setting(20, None, "steps of linear warm-up, then cosine to 0", least=0)
    clip: float = setting(1.0, None, "largest gradient norm")
    sft_steps: int = setting(1000, "reference", "gradient steps of the reference policy, at most")
    sft_lr: float = setting(3e-3, "reference", "its learning rate")
    score_steps: int = setting(1000, "scores", "gradient steps of each learned score model, at "
                               "most")
    score_lr: float = setting(1e-3, "scores", "its learning rate")
    # offline samples and the dual
    prompts: int = setting(512, "offline", "N, training prompts that the reference answers")
    responses: int = setting(32, "offline", "K, responses to each", least=2)
    sample_batch: int = setting(256, None, "responses sampled or scored at once")
    beta: float = setting(1.0, "prealign", "β, weight of the KL divergence to the reference")
    margin: str = setting("50%", "dual", "b, required safety gain over the reference: a number in "
                          "g's units or a share of the largest reachable one, 50%; comma separated "
                          "for several constraints")
    margins: str = setting("", "mocan", "a trade-off curve: train one MoCAN policy for each of "
                           "these margins too, 25%,50%,75%; comma separated, several constraints "
                           "of one margin by ':'")
    constraints: str = setting("", "scores", "safety preferences to constrain, comma separated "
                               "(default: harmless; data: all)")
    # policy
    lr: float = setting(4e-4, "mocan", "learning rate of MoCAN's and PeCAN's policy update")
    steps: int = setting(1200, "mocan", "its gradient steps")
    shots: int = setting(1, "mocan", "1: as in the paper; each further one samples the policy so "
                         "far, solves the dual again and goes on training")
    shot_steps: int = setting(400, "mocan", "gradient steps of each further shot")
    shot_lr: float = setting(2e-4, "mocan", "their learning rate")
    shot_responses: int = setting(32, "mocan", "K of each further shot", least=2)
    group: int = setting(8, "mocan", "G, reference samples of a prompt that a step compares in all "
                         "their pairs", least=2)
    prealign_steps: int = setting(1575, "prealign", "gradient steps of each of PeCAN's pre-aligned "
                                  "policies, at most")
    prealign_lr: float = setting(6e-5, "prealign", "their learning rate; see pecan.prealign")
    # evaluation
    eval_prompts: int = setting(240, None, "evaluation prompts, at most", least=2)
    eval_responses: int = setting(24, None, "fresh responses to each")


QUICK = dict(world_pairs=2400, n_embd=64, sft_steps=360, sft_lr=6e-3, prompts=128,
             responses=16, steps=120, prealign_steps=100, prealign_lr=3e-4, lr=1e-3,
             eval_prompts=64, eval_responses=8)
DATA = dict(lr=2e-4, margin="25%")


# ---- the job
def main():
    c = settings(sys.argv[1:])
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape of batch
    warnings.showwarning = lambda message, *_, **__: print(f"  warning: {message}")
    os.makedirs(c.out, exist_ok=True)
    print(as_command(c))
    split, names = data.load_pairs(  # names: "helpful", then the constraints
        c.data, c.world_pairs, random.Random(f"{c.seed}/data"), c.held_out, c.calibration,
        c.constraints)
    tok = tokenizer_of_run(c, split.train)
    reference = reference_policy(c, tok, split)
    prompts = data.some_prompts(split.train, c.prompts)
    pool, ref_logp = sample_reference(c, reference, tok, prompts)  # (N, K, T), (N, K)
    judges = {}  # preference -> score model, where no exact function exists
    policies = {}  # name -> its artifact
    margins = {}  # name -> b (m,)
    duals = {}  # name -> dual.Dual, for the reports; each shot solves its own, the first the same

    if c.algo != "pecan":  # before pre-alignment, so that an unreachable margin costs nothing
        judges = learn_judges(c, reference, tok, split, names)
        scores = artifact(c, "offline", "offline_scores.pt", make_scores, judges, names, prompts,
                          pool, tok)["scores"]  # (1+m, N, K)
        margins, duals = mocan.solve_margins(scores, c.margin, c.margins, c.beta)
    if c.algo != "mocan":
        dpo = prealigned(c, reference, tok, split, names, pool, ref_logp)
        logp = torch.stack([saved["logp"] for saved in dpo.values()])  # (1+m, N, K)
        policies |= dpo
    if c.algo != "pecan":
        offline = mocan.Sample(pool, ref_logp, ref_logp, scores)
        policies |= mocan_policies(c, reference, judges, names, tok, prompts, offline, margins)
    if c.algo != "mocan":
        margin, found = pecan.solve(logp, ref_logp, margins.get("mocan"), c.margin, c.beta)
        margins["pecan"] = margin
        if found is not None:
            duals["pecan"] = found
            offline = mocan.Sample(pool, ref_logp, ref_logp, c.beta * (logp - ref_logp))
            policies |= pecan_policies(c, reference, tok, prompts, offline, margin, dpo)
    if c.algo == "pecan":  # PeCAN needs no score model; the table does
        judges = learn_judges(c, reference, tok, split, names)
    evaluate(c, reference, policies, judges, names, margins, duals, split, tok)


# ---- the stages; make_… returns what an artifact keeps
def tokenizer_of_run(c, train):
    """The vocab's pieces are kept, so that a later run encodes as this one does."""
    if c.tokenizer == "vocab" and not reused("reference", c.start):
        write(c, "tokenizer.json", json.dumps(data.frequent_pieces(train, c.vocab_size)))
    return data.open_tokenizer(c.tokenizer, f"{c.out}/tokenizer.json",
                               c.block_size - c.max_new_tokens, c.max_new_tokens)


def reference_policy(c, tok, split):
    saved = artifact(c, "reference", "reference.pt", make_reference, tok, split)
    return from_checkpoint(saved, c.device)


def make_reference(c, tok, split):
    config = GPTConfig(tok.encoding.n_vocab, c.block_size, c.n_layer, c.n_head, c.n_embd,
                       dtype=c.dtype)
    model = new_model(c, config, "reference")
    pool = data.pair_pool(tok, split.train, "training data")
    calibration = data.pair_pool(tok, split.calibration, "calibration data")
    mocan.train_reference(
        model, pool, recipe(c, "reference", c.sft_steps, c.sft_lr),
        lambda: -mocan.logprobs(model, calibration, c.sample_batch).mean().item())
    return to_checkpoint(model)


def sample_reference(c, reference, tok, prompts):
    """Pool (N, K, T) and the reference's log-probabilities of it (N, K)."""
    saved = artifact(c, "offline", "offline.pt", make_offline, reference, tok, prompts)
    return data.Pool(saved["tokens"].long(), saved["response_mask"]), saved["ref_logp"]


def make_offline(c, reference, tok, prompts):
    pool, ref_logp = mocan.sample_pool(reference, tok, prompts, c.responses, c.sample_batch,
                                       f"{c.seed}/offline", "offline")
    return {"tokens": pool.tokens.int(), "response_mask": pool.response_mask,
            "ref_logp": ref_logp}


def learn_judges(c, reference, tok, split, names):
    """{preference: score model}; empty where the world's exact functions serve."""
    judges = {}
    for name in names if c.data else ():
        saved = artifact(c, "scores", f"score_{name}.pt", make_judge, reference, tok, split, name)
        judges[name] = from_checkpoint(saved, c.device)
    return judges


def make_judge(c, reference, tok, split, name):
    model = new_model(c, replace(reference.config, score_head=True), f"scores/{name}")
    model.load_state_dict(reference.state_dict(), strict=False)  # all but the head
    plan = recipe(c, f"score {name}", c.score_steps, c.score_lr)
    mocan.learn_score(model, name, *[data.preference_tensors(tok, part, name) for part in split],
                      plan, c.sample_batch)
    return to_checkpoint(model)


def make_scores(c, judges, names, prompts, pool, tok):
    return {"scores": mocan.score_pool(judges, names, prompts, pool, tok, c.sample_batch)}


def prealigned(c, reference, tok, split, names, pool, ref_logp):
    """PeCAN, steps 1 and 2 -> {dpo-NAME: artifact}."""
    refs = []  # ln π_ref of the training and the calibration pairs (P, 2), for all preferences
    for part in split[:2]:
        if not reused("prealign", c.start):
            refs.append(mocan.logprobs(reference, data.pair_pool(tok, part, "pairs"),
                                       c.sample_batch))
    return {f"dpo-{name}": artifact(c, "prealign", f"dpo-{name}.pt", make_prealigned, reference,
                                    tok, name, split, refs, pool, ref_logp) for name in names}


def make_prealigned(c, reference, tok, name, split, refs, pool, ref_logp):
    """A pre-aligned policy, and its calibrated log-probabilities of the offline pool, (N, K)."""
    policy = copy.deepcopy(reference)
    training, calibration = [data.preference_tensors(tok, part, name) for part in split[:2]]
    plan = recipe(c, f"dpo-{name}", c.prealign_steps, c.prealign_lr)
    tau = pecan.prealign_and_calibrate(
        policy, name, training, refs[0][training.rows], calibration, refs[1][calibration.rows],
        c.beta, plan, c.sample_batch)
    logp = mocan.logprobs(policy, pool, c.sample_batch)
    return {**to_checkpoint(policy), "tau": tau, "logp": pecan.calibrated(logp, ref_logp, tau)}


def mocan_policies(c, reference, judges, names, tok, prompts, offline, margins):
    """MoCAN, steps 2 and 3 for every margin -> {policy: artifact}."""
    policies = {}
    for name, margin in margins.items():
        policies |= shoot(c, reference, tok, prompts, "mocan", name, offline, margin, update_mocan,
                          lambda pool, _: mocan.score_pool(judges, names, prompts, pool, tok,
                                                           c.sample_batch))
    return policies


def update_mocan(policy, sample, *how):
    mocan.train_mocan(policy, sample.pool, sample.ref_logp, sample.scores[0], sample.scores[1:],
                      *how)


def pecan_policies(c, reference, tok, prompts, offline, margin, dpo):
    """PeCAN, steps 3 and 4 -> {policy: artifact}; its scores are those of the dpo-NAME policies."""
    policies = [from_checkpoint(saved, c.device) for saved in dpo.values()]
    taus = [saved["tau"] for saved in dpo.values()]
    return shoot(c, reference, tok, prompts, "pecan", "pecan", offline, margin, update_pecan,
                 lambda pool, ref_logp: pecan.implicit_scores(policies, taus, pool, ref_logp,
                                                              c.beta, c.sample_batch))


def update_pecan(policy, sample, lam, beta, *how):
    logp = sample.ref_logp + sample.scores / beta  # (1+m, N, K), since scores = β·log-ratios
    pecan.train_pecan(policy, sample.pool, logp[0], logp[1:], sample.ref_logp, lam, beta, *how)


def shoot(c, reference, tok, prompts, stage, name, offline, margin, update, score_of):
    """--shots policy updates, each from the one before -> {name: artifact, "name shot 2": …}.

    update(policy, sample, lam, beta, group, recipe) trains the policy in place;
    score_of(pool, ref_logp) -> (1+m, N, K) scores the responses of further shots.
    """
    policies = {}
    policy = reference
    for shot in range(1, c.shots + 1):
        label = name if shot == 1 else f"{name} shot {shot}"
        policies[label] = artifact(
            c, stage, f"{label.replace(' ', '_')}.pt", make_shot, policy, reference, tok, prompts,
            offline, update, score_of, label, b=margin.tolist(), shot=shot)
        policy = from_checkpoint(policies[label], c.device)
    return policies


def make_shot(c, policy, reference, tok, prompts, offline, update, score_of, label, b, shot):
    """One shot: responses of the policy so far, the dual, the policy update."""
    sample = offline
    plan = recipe(c, label, c.steps, c.lr)
    if shot > 1:
        sample = mocan.sample_from(
            policy, reference, tok, prompts, c.shot_responses, c.sample_batch,
            f"{c.seed}/{label}", f"{label}, responses", score_of)
        plan = recipe(c, label, c.shot_steps, c.shot_lr)
    plan = plan._replace(key=f"{c.seed}/{label.split()[0]}")  # every margin sees the same pairs
    ref_mean = offline.scores[1:].double().mean(dim=(1, 2))  # (m,) E_ref[g]
    try:
        found = mocan.solve_from(sample, ref_mean, b, c.beta)
    except dual.Infeasible as error:
        if shot == 1:
            raise
        print(f"  {label} changes nothing, by its responses: {error}")
        return {**to_checkpoint(policy), "lam": []}
    mocan.say_dual(label, b, found)
    policy = copy.deepcopy(policy)
    update(policy, sample, found.lam, c.beta, c.group, plan)
    return {**to_checkpoint(policy), "lam": found.lam.tolist()}


# ---- what the stages share
def new_model(c, config, purpose):
    torch.manual_seed(data.stream(c.seed, purpose).initial_seed())
    return GPT(config).to(c.device)


def recipe(c, stage, steps, lr):
    return mocan.Recipe(stage, steps, lr, f"{c.seed}/{stage}", c.batch, c.accumulate, c.warmup,
                        c.clip)


# ---- what came of it
def evaluate(c, reference, policies, judges, names, margins, duals, split, tok):
    """Fresh responses of every policy to evaluation prompts -> results.json, samples.jsonl, the
    picture and the table."""
    prompts = data.some_prompts(split.evaluation, c.eval_prompts)
    print(f"\nevaluate: {c.eval_responses} fresh responses of each policy to each of "
          f"{len(prompts)} evaluation prompts")
    rows, texts, curve = mocan.measure(
        {"reference": to_checkpoint(reference), **policies}, reference, judges, names, tok,
        prompts, c.eval_responses, c.sample_batch, f"{c.seed}/evaluate", margins, c.beta)
    prompts = [data.transcript(prompt) for prompt in prompts]
    found = {name: {**found._asdict(), "margin": margins[name]} for name, found in duals.items()}
    results = {"config": asdict(c), "policies": rows, "duals": found}
    write(c, "results.json", json.dumps(results, default=torch.Tensor.tolist, indent=1))
    samples = [{"instruction": prompts[i // c.eval_responses], "output": text, "generator": name}
               for name in texts for i, text in enumerate(texts[name])]
    write(c, "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    write(c, "tradeoff.svg", mocan.svg(f"{names[1]} gain over the reference", curve, rows))
    for i in range(0, len(prompts), len(prompts) // 3 + 1):
        print(f"\n  {prompts[i]}")
        for name in texts:
            print(f"    {name:>14}: {' '.join(texts[name][i * c.eval_responses].split())}")
    mocan.print_table(names[1:], rows)


# ---- the run's folder
def write(c, name, text):
    """A run that is killed meanwhile leaves the old file."""
    path = f"{c.out}/{name}"
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def artifact(c, stage, name, make, *args, **made_from):
    """A stage's result, {name: tensor or plain value}, kept in the file `name`: read where --from
    starts later, else make(c, *args, **made_from). With it are kept made_from and the settings of
    its stage and earlier ones; a file that others shaped is refused."""
    path = f"{c.out}/{name}"
    stages = STAGES[:STAGES.index(stage) + 1]
    identity = {f.name: getattr(c, f.name) for f in fields(Config) if f.metadata["stage"] in stages}
    identity |= made_from
    if reused(stage, c.start):
        return load(path, f"make it with --from {stage}", identity)
    print(f"\n{stage}: {path}", flush=True)
    write(c, "run.json", json.dumps({"config": asdict(c)}, indent=1))
    began = time.time()
    saved = {**make(c, *args, **made_from), "made_from": identity}
    saved["seconds"] = time.time() - began
    save(saved, path)
    return saved


def reused(stage, start):
    return STAGES.index(stage) < STAGES.index(start)


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
    # --from inherits that run's settings; only --from reference --quick starts afresh
    if "start" in given and not (given["start"] == STAGES[0] and given.get("quick")):
        base = continued(parser, given["start"], given.get("out", Config.out))
    values = {**base, **given}
    values["data"] = tuple(values.get("data", ()))
    c = Config(**values)
    check(parser, c)
    return c


def build_parser():
    parser = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [--SETTING VALUE ...]   (--help lists them)",
        description="One-shot safety alignment: a dual, then one policy update.",
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        with_data = f"; with --data {DATA[f.name]}" if f.name in DATA else ""
        text = f"{f.metadata['help']} (default: {f.default}{with_data})".replace("%", "%%")
        options = {"dest": f.name, "help": text}
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        elif isinstance(f.default, tuple):
            options |= {"nargs": "+", "action": "extend"}
        else:
            options |= {"type": type(f.default), "choices": f.metadata["choices"]}
        parser.add_argument(flag(f), **options)
    return parser


def flag(f):
    return "--from" if f.name == "start" else f"--{f.name}"


def continued(parser, start, out):
    """The settings of the run that --from continues."""
    path = f"{out}/run.json"
    try:
        with open(path) as file:
            old = json.load(file)["config"]
        base = {f.name: old.get(f.name, f.default) for f in fields(Config)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"--from {start} continues a run, but {path} is missing or damaged; drop "
                     "--from")
    return {**base, "out": out}


def check(parser, c):
    for f in fields(Config):
        value = getattr(c, f.name)
        least = f.metadata["least"]
        if type(f.default) in (int, float) and not least <= value < math.inf:
            wanted = "> 0" if least == ABOVE_0 else f"at least {least}"
            parser.error(f"--{f.name} is {value}; it must be {wanted}")
    if c.held_out + c.calibration >= 1 or c.max_new_tokens + 8 > c.block_size:
        parser.error(f"--held_out {c.held_out} and --calibration {c.calibration} together must be "
                     f"< 1, --max_new_tokens {c.max_new_tokens} at most --block_size "
                     f"{c.block_size} − 8")
    try:
        torch.empty(0, device=c.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {c.device} cannot be used here; expected cpu, or cuda or cuda:N "
                     "where CUDA is available")


def as_command(c):
    """The command that repeats this run, every setting spelled out."""
    words = ["python", "train.py"]
    for f in fields(Config):
        value = getattr(c, f.name)
        if isinstance(value, bool):
            words += [flag(f)] * value
        elif isinstance(value, tuple):
            words += [flag(f), *value] if value else []
        elif value != "" and (f.name, value) != ("start", STAGES[0]):  # that is no --from
            words.append(f"{flag(f)}={value}")
    return shlex.join(words)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:  # what a user can mend
        sys.exit(f"error: {error}")
