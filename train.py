"""
train.py: the whole job, from preferences to an aligned policy and a table that says what came of it.

    python train.py                           the built-in world, every policy, a few minutes on two CPU cores
    python train.py --data FILE               real preferences
    python train.py --from mocan --lr 3e-4    the same run again from that stage on, with what changed

The stages, and the artifact that each leaves in --out:

    reference   supervised fine-tuning                      reference.pt, tokenizer.json
    scores      reward and safety models                    score_*.pt (none: the built-in world's are exact functions)
    offline     K responses per prompt from π_ref, scored   offline.pt, offline_scores.pt
    prealign    PeCAN: one DPO policy per preference        pairs.pt, dpo-*.pt, tuples.pt
    dual        λ*, and what it predicts (solved each time) dual.json, written before evaluate
    mocan       one policy update                           mocan.pt
    pecan       one policy update                           pecan.pt
    evaluate    fresh responses on held-out prompts         results.json, samples.jsonl; of MoCAN tradeoff.svg, dual.svg
"""

import argparse
import copy
import json
import math
import os
import random
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace

import torch

import data
import dual
import mocan
import pecan
from model import GPT, GPTConfig, from_checkpoint, to_checkpoint

STAGES = ("reference", "scores", "offline", "prealign", "dual", "mocan", "pecan", "evaluate")


def setting(default, stage, help, choices=None, flag=None):
    """A field of Config. `stage` is the first stage that it changes; None: it may change at any stage."""
    return field(default=default, metadata={"stage": stage, "help": help, "choices": choices, "flag": flag})


@dataclass(frozen=True)
class Config:
    start: str = setting("reference", None, "reuse the artifacts of earlier stages and run from this one", STAGES, "from")
    out: str = setting("out", None, "folder of all artifacts")
    quick: bool = setting(False, "reference", "shrink every stage: a run of seconds, to see that everything works")
    algo: str = setting("all", None, "which policies to train", ("mocan", "pecan", "all"))
    seed: int = setting(0, "reference", "seeds every random stream")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", None, "cpu, cuda, cuda:1, …")
    dtype: str = setting("bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else
                         "float16" if torch.cuda.is_available() else "float32", "reference",
                         "arithmetic of the trunk under autocast; logits and losses stay float32",
                         ("float32", "bfloat16", "float16"))
    # text
    data: tuple = setting((), "reference", "preference files, FILE or NAME=FILE, one or more; none: the built-in world")
    world_pairs: int = setting(36000, "reference", "preference pairs that the built-in world writes")
    held_out: float = setting(0.2, "reference", "share of the prompts kept for evaluation")
    tokenizer: str = setting("vocab", "reference", "vocab: built from the training text; gpt2: GPT-2's", ("vocab", "gpt2"))
    vocab_size: int = setting(4096, "reference", "largest size of the vocab tokenizer")
    max_new_tokens: int = setting(96, "reference", "longest response; a prompt may fill the rest of block_size")
    # model
    n_layer: int = setting(2, "reference", "blocks")
    n_head: int = setting(4, "reference", "attention heads")
    n_embd: int = setting(128, "reference", "width")
    block_size: int = setting(192, "reference", "longest prompt and response together, in tokens")
    # training
    batch: int = setting(16, None, "pairs per micro-batch; a policy update: 2·batch/G prompts with G responses each")
    accumulate: int = setting(1, "prealign", "micro-batches per step of a policy")
    warmup: int = setting(20, None, "steps of linear warm-up, then cosine to 0")
    clip: float = setting(1.0, None, "largest gradient norm")
    sft_steps: int = setting(1000, "reference", "gradient steps of the reference policy")
    sft_lr: float = setting(3e-3, "reference", "its learning rate")
    scores: str = setting("", "scores", "exact: the world's own functions; learned: trained on preferences "
                          "(default: exact in the world, learned on data)", ("", "exact", "learned"))
    score_steps: int = setting(120, "scores", "gradient steps of each learned score model")
    score_lr: float = setting(1e-3, "scores", "its learning rate")
    # offline samples and the dual
    prompts: int = setting(512, "offline", "N, training prompts that the reference answers")
    responses: int = setting(32, "offline", "K, responses to each")
    sample_batch: int = setting(256, None, "responses sampled or scored at once")
    beta: float = setting(1.0, "prealign", "β, weight of the KL divergence to the reference")
    margins: str = setting("", "mocan", "a trade-off curve: train one MoCAN policy for each of these margins too, "
                           "25%,50%,75%; comma separated, several constraints of one margin by ':'")
    margin: str = setting("50%", "dual", "b, required safety gain over the reference: a number in g's units or a share "
                          "of the largest reachable one, 50%; comma separated for several constraints")
    constraints: str = setting("", "scores", "safety preferences to constrain, comma separated (default: harmless; data: all)")
    # policy
    lr: float = setting(4e-4, "mocan", "learning rate of MoCAN's and PeCAN's policy update")
    steps: int = setting(1200, "mocan", "gradient steps of MoCAN's and PeCAN's policy update")
    labels: str = setting("exact", "mocan", "exact: P(y1 ≻ y0) itself; sampled: a Bernoulli draw", ("exact", "sampled"))
    group: int = setting(8, "mocan", "G, reference samples of a prompt that a step compares in all their pairs")
    pairs: str = setting("samples", "mocan", "MoCAN's: samples of the reference; data: the file's own", ("samples", "data"))
    prealign_steps: int = setting(1800, "prealign", "gradient steps of each of PeCAN's pre-aligned policies")
    prealign_lr: float = setting(6e-5, "prealign", "their learning rate")
    calibrate: bool = setting(True, "prealign", "scale PeCAN's implicit scores by a temperature fitted on held-out pairs")
    # evaluation
    eval_prompts: int = setting(240, None, "held-out prompts, at most")
    eval_responses: int = setting(24, None, "fresh responses to each")


QUICK = dict(world_pairs=2400, n_embd=64, sft_steps=360, sft_lr=6e-3, score_steps=80, prompts=128, responses=16, steps=120,
             prealign_steps=120, prealign_lr=3e-4, lr=1e-3, eval_prompts=64, eval_responses=8)
DATA = dict(sft_steps=600, prealign_steps=300, lr=2e-4, margin="25%")  # a thousand real pairs are soon learned by heart


def settings(argv):
    """Defaults, then --quick's, --data's or the run's that --from continues, then the command line. Bad values exit with code 2."""
    parser = argparse.ArgumentParser(prog="train.py", usage="python train.py [--SETTING VALUE ...]   (--help lists them)",
                                     description="One-shot safety alignment: a dual, then one policy update.",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        m, flag = f.metadata, "--" + (f.metadata["flag"] or f.name)
        shown = f"{m['help']} (default: {f.default}{f'; with --data {DATA[f.name]}' if f.name in DATA else ''})".replace("%", "%%")
        if isinstance(f.default, bool):
            parser.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, help=shown)
        elif isinstance(f.default, tuple):
            parser.add_argument(flag, dest=f.name, nargs="+", action="extend", help=shown)
        else:
            choices = m["choices"] and [x for x in m["choices"] if x]
            parser.add_argument(flag, dest=f.name, type=type(f.default), choices=choices, help=shown)
    given = vars(parser.parse_args(argv))
    base = {"dtype": "float32"} if given.get("device") == "cpu" else {}
    base |= QUICK if given.get("quick") else DATA if "data" in given else {}
    if "start" in given and not (given["start"] == STAGES[0] and given.get("quick")):
        path = os.path.join(given.get("out", Config.out), "run.json")
        try:
            with open(path) as file:
                old = json.load(file)["config"] | {}  # only a dict has that
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"--from {given['start']} continues a run, but {path} is missing or damaged; drop --from")
        base = {f.name: old.get(f.name, f.default) for f in fields(Config)} | {"out": Config.out}
        for f in fields(Config):
            stage = f.metadata["stage"]
            if stage and f.name in given and given[f.name] != base[f.name] and reused(stage, given["start"]):
                parser.error(f"--{f.name} was {base[f.name]} when stage {stage} ran, and --from {given['start']} keeps "
                             f"that stage; use --from {stage} or drop --{f.name}")
    c = Config(**{**base, **given, "data": tuple(given.get("data", base.get("data", ())))})
    least = {"seed": 0, "warmup": 0, "responses": 2, "group": 2, "eval_prompts": 2, "vocab_size": 300}  # others: greater than 0
    for f in fields(Config):
        value = getattr(c, f.name)
        if type(f.default) in (int, float) and not least.get(f.name, 1e-300) <= value < math.inf:
            parser.error(f"--{f.name} is {value}; it must be {f'at least {least[f.name]}' if f.name in least else '> 0'}")
    if c.held_out >= 1 or c.max_new_tokens + 8 > c.block_size:
        parser.error(f"--held_out {c.held_out} must be < 1, --max_new_tokens {c.max_new_tokens} at most --block_size "
                     f"{c.block_size} − 8")
    if c.device != "cpu" and not (re.fullmatch("cuda(:[0-9])?", c.device) and int(c.device[5:] or 0) < torch.cuda.device_count()):
        parser.error(f"--device {c.device} cannot be used here; expected cpu, or cuda or cuda:N where CUDA is available")
    if given.get("scores") == "exact" and c.data:
        parser.error("--scores exact exists in the built-in world only; use --scores learned with --data")
    return replace(c, scores="learned" if c.data else c.scores or "exact")


def reused(stage, start):
    return STAGES.index(stage) < STAGES.index(start)


def stream(c, purpose, device="cpu"):
    """A random stream of its own for each purpose: evaluating more often, say, changes no other stage's numbers."""
    return torch.Generator(device).manual_seed(random.Random(f"{c.seed}/{purpose}").getrandbits(62))


def progress(stage):
    """log(step, steps, loss=…): one refreshing line on a terminal, five plain lines in a file."""
    began, printed, terminal = time.time(), [0, 0.0], sys.stdout.isatty()

    def log(step, steps, **numbers):
        seconds = time.time() - began
        if step == steps or (seconds - printed[1] > 0.2 if terminal else step * 5 // steps > printed[0] * 5 // steps):
            printed[:] = step, seconds
            print("\r" * terminal + f"  {stage} {step}/{steps}", *(f" {name} {value:.4f}" for name, value in numbers.items()),
                  f" {step / seconds:.1f}/s  {seconds:.0f} s elapsed, {(steps - step) * seconds / step:.0f} s left   ",
                  end="\n" if step == steps or not terminal else "", flush=True)
    return log


# ---- the stages
def write(path, text):
    """Whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def artifact(c, seconds, stage, name, make, headline):
    """The file `name` of a stage: read where --from starts later, else made, a dict of tensors, and kept."""
    path, before = os.path.join(c.out, name), STAGES[:STAGES.index(stage) + 1]
    made = f"{headline} {[getattr(c, f.name) for f in fields(Config) if f.metadata['stage'] in before]}"
    if reused(stage, c.start):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise ValueError(f"{path}: missing or damaged ({type(error).__name__}); make it with --from {stage}") from None
        if saved.get("made", made) != made:  # by a run that was not this one's, or that was cut short
            raise ValueError(f"{path}: made with other settings than this run's; make it again with --from {stage}")
    else:
        print(f"\n{stage}: {headline}", flush=True)
        began = time.time()
        saved = {**make(), "seconds": time.time() - began, "made": made}
        torch.save(saved, path + ".tmp")
        os.replace(path + ".tmp", path)
    seconds[stage] = seconds.get(stage, 0) + saved.get("seconds", 0)
    return saved


def new_model(c, config, purpose):
    torch.manual_seed(random.Random(f"{c.seed}/{purpose}").getrandbits(62))
    return GPT(config).to(c.device)


def draw(c, names, score, constraint, margins, solutions, policies):
    """tradeoff.svg: the predicted frontier and every realised policy; dual.svg: D(λ) and its minimum per margin."""
    warnings.simplefilter("ignore")  # of a small effective sample size, at the frontier's far end
    low = dual.margin_of(score, constraint, torch.zeros(len(names)), c.beta)  # helpfulness alone, λ = 0
    high = 0.95 * dual.reachable(constraint) if len(names) == 1 else margins["mocan"]
    sweep = dual.sweep(score, constraint, [low + t / 40 * (high - low) for t in range(41)], c.beta)
    mocan.svg(os.path.join(c.out, "tradeoff.svg"), "Reward against safety", f"{names[0]} gain over the reference, in its units",
              "reward gain over the reference, in units of r",
              {"predicted": [(x.constraint_gain[0].item(), x.score_gain) for x in sweep]},
              {name: (p["constraint_gain"][0], p["reward_gain"], p["constraint_gain_ci"][0], p["reward_gain_ci"])
               for name, p in policies.items()})
    curves, points, widest = {}, {}, 2 * max(found.lam[0].item() for found in solutions.values()) + 1
    for name, found in solutions.items():
        h = constraint.double() - constraint.double().mean(dim=(1, 2), keepdim=True) - margins[name][:, None, None]
        rest, curve = score + torch.einsum("m,mnk->nk", found.lam[1:], h[1:]), []  # λ_1 varies, the others are at λ*
        for x in (*(t / 60 * widest for t in range(61)), found.lam[0].item()):
            D = c.beta * (torch.logsumexp((rest + x * h[0]) / c.beta, dim=1) - math.log(h.size(2))).mean().item()  # D(λ)
            curve.append((x, D))
        curves[f"b = {', '.join(f'{b:.3f}' for b in margins[name])}"], points[f"λ* = {x:.3f}"] = curve[:-1], (x, D, (x, x), (D, D))
    mocan.svg(os.path.join(c.out, "dual.svg"), "The dual function and its minimum", f"λ, the price of {names[0]}", "D(λ)",
              curves, points)


# ---- the job
def main():
    c = settings(sys.argv[1:])
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape of batch
    warnings.showwarning = lambda message, *_, **__: print(f"  warning: {message}")
    os.makedirs(c.out, exist_ok=True)
    print(" ".join(f"--{name} {value}" for name, value in asdict(c).items()))
    seconds = {}  # stage: seconds, of this run or of the run that made the artifact
    train, held_out, names = data.load(c, random.Random(f"{c.seed}/data"))
    tok = data.open_tokenizer(c, train, reused("reference", c.start))
    write(os.path.join(c.out, "run.json"), json.dumps({"config": asdict(c)}, indent=1))
    print(f"\ndata: {len(train)} training and {len(held_out)} held-out pairs from {' '.join(c.data) or 'the world'}, no "
          f"prompt in both; constraints: {', '.join(names)}; vocabulary {tok.encoding.n_vocab}")

    def make_reference():
        model = new_model(c, GPTConfig(tok.encoding.n_vocab, c.block_size, c.n_layer, c.n_head, c.n_embd), "reference")
        pool = data.pair_pool(tok, train, c, "training data")
        mocan.train_reference(model, pool, c, stream(c, "reference"), progress("reference"))
        return to_checkpoint(model)
    reference = from_checkpoint(artifact(c, seconds, "reference", "reference.pt", make_reference,
                                         "supervised fine-tuning"), c.device)

    def open_judges():
        """{preference: score model}; empty where the world's exact functions serve."""
        judges = {}
        for name in ("helpful", *names) if c.scores == "learned" else ():
            def make_score():
                model = new_model(c, replace(reference.config, score_head=True), f"scores/{name}")
                model.load_state_dict(reference.state_dict(), strict=False)  # the trunk starts as the reference
                mocan.learn_score(model, tok, train, held_out, name, c, stream(c, f"scores/{name}"), progress("scores"))
                return to_checkpoint(model)
            judges[name] = from_checkpoint(artifact(c, seconds, "scores", f"score_{name}.pt", make_score,
                                                    f"learning {name} from preferences"), c.device)
        return judges
    judges = open_judges() if c.algo != "pecan" else None
    prompts = data.spread(train, c.prompts)

    def make_offline():
        pool, ref_logp = mocan.sample_pool(reference, tok, prompts, c.responses, c, stream(c, "offline", c.device),
                                           progress("offline"))
        return {"tokens": pool.tokens.int(), "response_mask": pool.response_mask, "ref_logp": ref_logp}
    saved = artifact(c, seconds, "offline", "offline.pt", make_offline,
                     f"{c.responses} responses of the reference to each of {len(prompts)} training prompts")
    pool, ref_logp = data.Pool(saved["tokens"].long(), saved["response_mask"]), saved["ref_logp"]

    policies, rows, results = {}, {}, {"config": asdict(c), "policies": {}}
    def align(stage, name, lam, steps, train_policy, headline):
        """One aligned policy as an artifact: train_policy(model) trains a copy of the reference."""
        def make():
            policy = copy.deepcopy(reference)
            train_policy(policy)
            return {**to_checkpoint(policy), "steps": steps}
        saved = artifact(c, seconds, stage, f"{name.replace(' ', '_')}.pt", make, headline)
        policies[name] = from_checkpoint(saved, c.device)
        rows[name] = {"lam": [float(x) for x in lam], "steps": saved["steps"], "seconds": saved.get("seconds", 0)}

    if c.algo != "pecan":  # ---- MoCAN, up to λ*
        scores = artifact(c, seconds, "offline", "offline_scores.pt", lambda: {
            "scores": mocan.score_pool(judges, names, prompts, pool, tok, c)}, "their scores")["scores"]
        score, constraint, reach = scores[0], scores[1:], dual.reachable(scores[1:])  # (N, K), (m, N, K), (m,)
        print(f"\ndual: the largest reachable margins are {', '.join(f'{x:.3f}' for x in reach)}; correlation of helpful and "
              f"{names[0]} under the reference {torch.corrcoef(scores[:2].flatten(1))[0, 1]:.2f}")
        others = [text for text in c.margins.split(",") if text not in ("", c.margin.replace(",", ":"))]
        margins = {"mocan": dual.parse_margin(c.margin, reach), **{f"mocan {b}": dual.parse_margin(b, reach, ":") for b in others}}
        began = time.time()
        solutions = {name: dual.solve(score, constraint, b, c.beta) for name, b in margins.items()}
        seconds["dual"], margin = time.time() - began, margins["mocan"]
        results["dual"] = mocan.dual_numbers(names, margin, solutions["mocan"])

    if c.algo != "mocan":  # ---- PeCAN, up to its scores
        rarest = min(sum(name in pair.prefers for pair in train) for name in ("helpful", *names))
        count = math.ceil(len(train) * min(1.0, c.prealign_steps * c.batch * c.accumulate / rarest))  # as many as visits
        sides = {"training pairs": random.Random(f"{c.seed}/pairs").sample(train, count), "held-out pairs": held_out}
        sides_ref = artifact(c, seconds, "prealign", "pairs.pt", lambda: {
            side: mocan.logprobs(reference, data.pair_pool(tok, pairs, c, side), c) for side, pairs in sides.items()},
            "the reference's log-probabilities of the preference pairs")

        def preference(name, side):  # Pool (P, 2, T), ln π_ref (P, 2) and prefers (P,) of the pairs that hold it
            chosen, prefers, _ = data.preference_tensors(tok, sides[side], name, c)
            return chosen, sides_ref[side][[name in pair.prefers for pair in sides[side]]], prefers

        for name in ("helpful", *names):
            align("prealign", f"dpo-{name}", (), c.prealign_steps, lambda policy: pecan.prealign(
                policy, *preference(name, "training pairs"), c, (
                    stream(c, f"prealign/{name}"), stream(c, f"prealign/{name}/labels")), progress(f"dpo-{name}")),
                f"DPO on the preference {name}")

        def make_tuples():
            logp = []  # ln π_ref + τ·ln(π/π_ref) of each pre-aligned policy
            for name in ("helpful", *names):
                tau = pecan.temperature(policies[f"dpo-{name}"], name, *preference(name, "held-out pairs"), c)
                logp.append(ref_logp.lerp(mocan.logprobs(policies[f"dpo-{name}"], pool, c), tau if c.calibrate else 1.0))
            return {"logp": torch.stack(logp)}  # (1+m, N, K)
        logp = artifact(c, seconds, "prealign", "tuples.pt", make_tuples, "their log-probabilities of the pool")["logp"]

    if c.algo != "pecan":  # ---- MoCAN, its policy update
        pairs, pairs_ref, pairs_scores = pool, ref_logp, scores
        if c.pairs == "data":  # the preference file's own two responses, scored by the same judges
            pairs = data.pair_pool(tok, train, c, "pairs")
            pairs_ref = mocan.logprobs(reference, pairs, c)
            pairs_scores = mocan.score_pool(judges, names, [pair.prompt for pair in train], pairs, tok, c)
        for name, found in solutions.items():
            align("mocan", name, found.lam, c.steps, lambda policy: mocan.train_mocan(
                policy, pairs, pairs_ref, pairs_scores[0], pairs_scores[1:], found.lam, c,
                (stream(c, "mocan"), stream(c, "mocan/labels")), progress(name)),
                f"{name}: one policy update at λ* = {', '.join(f'{x:.4f}' for x in found.lam)}")
            rows[name].update(margin=margins[name].tolist(), predicted=[found.score_gain, *found.constraint_gain.tolist()])

    if c.algo != "mocan":  # ---- PeCAN, its dual and policy update
        print("\ndual: PeCAN's, on its implicit scores")
        if c.algo == "pecan":
            margin = dual.parse_margin(c.margin, dual.reachable(c.beta * (logp[1:] - ref_logp)))
        else:
            pecan.say_miscalibration(names, scores, c.beta * (logp - ref_logp))
        try:
            found = pecan.implicit_dual(logp[0], logp[1:], ref_logp, margin, c.beta)
        except (dual.Infeasible, FloatingPointError) as error:  # MoCAN's scores may reach what PeCAN's do not
            if c.algo == "pecan":
                raise
            print(f"  no PeCAN policy, by its implicit scores: {error}")
        else:
            results["dual_pecan"] = mocan.dual_numbers(names, margin, found)
            s = pecan.implicit_score(logp[0], logp[1:], ref_logp, found.lam, c.beta)  # (N, K)
            align("pecan", "pecan", found.lam, c.steps, lambda policy: pecan.train_pecan(
                policy, pool, ref_logp, s, c, c.steps, c.lr, (stream(c, "pecan"), stream(c, "pecan/labels")),
                progress("pecan")), f"one policy update at λ* = {', '.join(f'{x:.4f}' for x in found.lam)}")

    write(os.path.join(c.out, "dual.json"), json.dumps({k: results[k] for k in ("dual", "dual_pecan") if k in results}))

    # ---- what came of it
    judges = open_judges() if judges is None else judges  # PeCAN needs none; the table does
    prompts = data.spread(held_out, c.eval_prompts)
    print(f"\nevaluate: {c.eval_responses} fresh responses of each policy to each of {len(prompts)} held-out prompts")
    began, texts, ref_scores = time.time(), {}, None
    for name, policy in {"reference": reference, **policies}.items():
        eval_scores, measured, texts[name] = mocan.measure(
            policy, reference, ref_scores, judges, names, prompts, tok, c, stream(c, "evaluate", c.device), progress(name))
        ref_scores = eval_scores if ref_scores is None else ref_scores
        results["policies"][name] = {**measured, "margin": margin.tolist() if name in rows else None, **rows.get(name, {})}
    seconds["evaluate"] = time.time() - began
    results["seconds"] = {stage: round(s, 2) for stage, s in seconds.items()}
    write(os.path.join(c.out, "samples.jsonl"), "".join(json.dumps(
        {"instruction": prompts[i // c.eval_responses], "output": text, "generator": name}, ensure_ascii=False) + "\n"
        for name in texts for i, text in enumerate(texts[name])))
    write(os.path.join(c.out, "results.json"), json.dumps(results, indent=1))
    for i in sorted({len(prompts) * j // 6 for j in (1, 3, 5)}):
        print(f"\n  {prompts[i]}")
        for name in texts:
            print(f"    {name:>14}: {' '.join(texts[name][i * c.eval_responses].split())}")
    mocan.print_table(names, {**results["policies"], "optimum (closed form)": results.get("dual", results.get("dual_pecan"))})
    if c.algo != "pecan":
        draw(c, names, score, constraint, margins, solutions, results["policies"])
    print(f"\n{sum(seconds.values()):.0f} s in all: " + ", ".join(f"{stage} {s:.0f}" for stage, s in seconds.items()) +
          f"; everything is in {c.out}/")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:  # what a user can mend; a bug keeps its traceback
        sys.exit(f"error: {error}")
