"""Benchmarks, each one command: `python tests/bench.py dual`, `python tests/bench.py shots --out out`.

dual: the solver of dual.py against what one would call instead, interleaved, the median of `--repeat` runs (of one run
      for projected gradient descent). Evaluations are passes over all prompts; |grad| is the largest violation of the
      KKT conditions at the end, always computed by the same function.
shots: the MoCAN policy of a finished `python train.py`, in the built-in world with exact scores and one constraint,
      against primal-dual policy optimization from the same reference.
train: the DPO step of mocan.train_mocan, with the hard labels of pecan.prealign, against trl.DPOTrainer on the same
      weights and tokens: pairs a second, losses, the share of the matrix product, peak memory. DPOTrainer also computes
      its metrics, and on a CPU the output layer of the prompts.
sample: GPT.generate against Transformers' generate on the same weights: tokens a second, the draw's part of the time,
      the share of the matrix product.
chat FOLDER: a published model, GPT-2's or of the Llama family: log-probabilities, sampling (16 x 4 responses of 32 tokens) and
      a DPO step of 16 pairs, against Transformers with the same weights, texts and loss.
lora FOLDER: a policy update of a published model by all its weights, and by adapters: seconds of a step, peak memory of the whole
      process, size of the artifact.
exact FOLDER --data FILE: MoCAN on a published chat model where the scores are exact, so that the update alone is measured: its
      words "you" against its kind and unkind words. Fresh responses to fresh prompts, beside the optimum.
update: the MoCAN update of a finished run against trl.DPOTrainer's, from the same reference, responses and scores, with the same
      optimizer, schedule and number of responses seen, on labels drawn by Bradley-Terry; gains, KL and seconds of both.
texts: what a finished run's table does not show, from its samples.jsonl: length, variety, gains at equal length, and whose prompts
      pay for the others; with --perplexity what the policies make of the data's own responses.
picture: an SVG of a finished run: its policies with their intervals, and the optima from lam 0 to 2 lam* on the evaluation
      prompts.
scale: how seconds grow as prompts, responses, vocabulary, width or length grow, for scoring, sampling, a training step
      and the dual; then seconds and memory of a training step and of sampling for 10 to 360 million parameters.

train, sample, chat, lora and scale take --json (the figures as one JSON object on stdout; the text goes to stderr) and --device. Weights and
tokens are random, but for a FOLDER's weights and chat's texts. The share of the matrix product is what the model's weights need at least, 2 operations for each weight
and token (one prompt for both responses), times 3 with the backward pass, over the time and over the rate of a torch.mm of the model's shapes in the same
run; attention's own products and what is computed twice do not count as needed, prompts do not need the output layer.
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else NumPy's idle threads spin on the core that the next solver needs
import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import dual
import mocan
import train
from data import load, save
from model import GPT, GPTConfig, add_adapters, export, from_checkpoint, merge, sample_token, sequence_logprob, to_checkpoint

silent = contextlib.redirect_stdout(None)  # around what reports its progress


class Objective:
    """D and its gradient with one exponential pass, NumPy in place, and a count of calls."""

    def __init__(self, r, g, b, beta):
        self.r, self.beta, self.calls = r.numpy(), beta, 0
        self.h = (g - g.mean(dim=(1, 2), keepdim=True) - b[:, None, None]).numpy()  # (m, N, K)
        self.z, self.zh = np.empty_like(self.r), np.empty_like(self.r)

    def __call__(self, lam):
        self.calls += 1
        np.copyto(self.z, self.r)
        for x, h in zip(lam, self.h):
            np.multiply(h, x, out=self.zh)
            self.z += self.zh
        self.z /= self.beta
        top = self.z.max(axis=1, keepdims=True)
        self.z -= top
        np.exp(self.z, out=self.z)
        total = self.z.sum(axis=1)
        grad = np.array([(np.einsum("nk,nk->n", self.z, h) / total).mean() for h in self.h])
        return self.beta * (np.log(total / self.r.shape[1]) + top[:, 0]).mean(), grad


def newton(r, g, b, beta):
    d = dual.solve(r, g, b, beta)
    return d.lam.numpy(), d.iterations


def projected_gradient(r, g, b, beta):
    """The published code's loop without what it logs: lam 1, step 4 halved on failure, 200 steps a try, five tries."""
    f, step = Objective(r, g, b, beta), 4.0
    for _ in range(5):
        lam, history = np.ones(len(g)), []
        for _ in range(200):
            lam = np.maximum(lam - step * f(lam)[1], 0)
            history.append(lam)
            if len(history) > 10 and max(np.abs(lam - x).max() for x in history[-6:-1]) < 1e-5:
                return lam, f.calls
        step /= 2
    return lam, f.calls


def projected_gradient_logging(r, g, b, beta):
    """The same with what the published code also computes in a step: log-mean-exp, mean score, mean constraint."""
    f, step = Objective(r, g, b, beta), 4.0
    for _ in range(5):
        lam, history = np.ones(len(g)), []
        for _ in range(200):
            grad = f(lam)[1]
            z = (f.r + np.tensordot(lam, f.h, axes=1)) / beta
            top = z.max(axis=1, keepdims=True)
            p = np.exp(z - top)
            p /= p.sum(axis=1, keepdims=True)
            history.append((lam, np.log(np.exp(z - top).mean(axis=1)) + top[:, 0], (p * f.r).sum(axis=1).mean(),
                            [(p * h).sum(axis=1).mean() for h in f.h]))
            lam = np.maximum(lam - step * grad, 0)
            if len(history) > 10 and max(np.abs(lam - x[0]).max() for x in history[-5:]) < 1e-5:
                return lam, f.calls
        step /= 2
    return lam, f.calls


def l_bfgs_b(r, g, b, beta):
    from scipy.optimize import minimize
    f = Objective(r, g, b, beta)
    lam = minimize(f, np.ones(len(g)), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(g),
                   options={"ftol": 0.0, "gtol": 1e-9, "maxiter": 500}).x
    return lam, f.calls


def brent(r, g, b, beta):
    from scipy.optimize import minimize_scalar
    f = Objective(r, g, b, beta)
    lam = minimize_scalar(lambda x: f([abs(x)])[0], bracket=(0.0, 1.0), method="Brent", options={"xtol": 1e-12}).x
    return np.array([abs(lam)]), f.calls


def torch_lbfgs(r, g, b, beta):
    """torch.optim.LBFGS with autograd on lam = softplus(x), which keeps lam > 0."""
    h, calls = g - g.mean(dim=(1, 2), keepdim=True) - b[:, None, None], [0]
    x = torch.full((len(g),), 0.5413, dtype=torch.float64, requires_grad=True)  # softplus(x) = 1
    optimizer = torch.optim.LBFGS([x], max_iter=100, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        calls[0] += 1
        optimizer.zero_grad()
        lam = torch.nn.functional.softplus(x)
        loss = beta * torch.logsumexp((r + torch.tensordot(lam, h, dims=1)) / beta, dim=1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.nn.functional.softplus(x).detach().numpy(), calls[0]


def synthetic(N, K, m):
    """The paper's setting: score spread 3 that conflicts with the constraints, beta 0.1."""
    gen = torch.Generator().manual_seed(N + m)
    r = 3 * torch.randn(N, K, generator=gen, dtype=torch.float64)
    g = torch.randn(m, N, K, generator=gen, dtype=torch.float64) * 3 - 0.3 * r
    return r, g


def real(N, K, m):
    """Length and word rates of the 2 real responses of each prompt; K a prompt by resampling them with noise."""
    path = ROOT.parent / "shared" / "data" / "dual_pairs.jsonl.gz"
    if not path.exists():
        return None
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file][:N]
    words = (None, ("not", "illegal", "sorry"), ("please", "should"), ("important", "consider"), ("legal", "safe"))
    text = [[row["response_0"], row["response_1"]] for row in rows]
    base = [torch.tensor([[np.log1p(len(t)) if w is None else sum(t.lower().count(x) for x in w) / (1 + len(t) / 100)
                           for t in pair] for pair in text], dtype=torch.float64) for w in words[:m + 1]]  # (N, 2) each
    gen = torch.Generator().manual_seed(0)
    pick = torch.randint(0, 2, (len(rows), K), generator=gen)
    noise = [0.5 * x.std() * torch.randn(len(rows), K, generator=gen, dtype=torch.float64) for x in base]
    score = [x.gather(1, pick) + e for x, e in zip(base, noise)]
    score = [3 * x / x.std() for x in score]
    return score[0], torch.stack(score[1:])


def violation(r, g, b, beta, lam):
    grad = Objective(r, g, b, beta)(lam)[1]
    return float(np.where(np.asarray(lam) > 0, np.abs(grad), np.maximum(-grad, 0)).max())


def timed(f, *args):
    start = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - start, result


def bench_dual(argv):
    parser = argparse.ArgumentParser(prog="bench.py dual", allow_abbrev=False)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each solver")
    parser.add_argument("--share", type=float, default=0.5, help="margin as a share of the largest reachable one")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    solvers = {"newton (dual.py)": newton, "projected gradient": projected_gradient,
               "PGD with its log": projected_gradient_logging, "torch.optim.LBFGS": torch_lbfgs}
    try:
        import scipy
        solvers |= {"scipy L-BFGS-B": l_bfgs_b, "scipy Brent": brent}
        print(f"scipy {scipy.__version__}")
    except ImportError:
        print("scipy is not installed: L-BFGS-B and Brent are skipped")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, beta 0.1, margin {args.share:.0%} of "
          "reachable / sqrt(m)")
    print(f"{'data':22s} {'m':>2s} {'solver':20s} {'ms':>9s} {'evals':>6s} {'|grad|':>8s} {'times ours':>10s}")
    slow = (projected_gradient, projected_gradient_logging)
    single = (*slow, brent)
    cases = [(f"synthetic {N}x{K}", synthetic, N, K) for N, K in ((1000, 128), (1604, 192), (10000, 256))]
    cases += [("real texts 1604x192", real, 1604, 192)]
    for name, make, N, K in cases:
        for m in (1, 2, 4):
            scores = make(N, K, m)
            if scores is None:
                print(f"{name}: skipped, ../shared/data/dual_pairs.jsonl.gz is not there")
                break
            r, g = scores
            b = args.share / m ** 0.5 * dual.reachable(g)
            newton(r, g, b, 0.1)  # warm up
            seconds, result = {s: [] for s in solvers}, {}
            for turn in range(args.repeat):
                for s, f in solvers.items():
                    if (m > 1 and f in single) or (turn and f in slow):  # the published code has one constraint
                        continue
                    t, result[s] = timed(f, r, g, b, 0.1)
                    seconds[s].append(t)
            ours = statistics.median(seconds["newton (dual.py)"])
            for s, (lam, calls) in result.items():
                t = statistics.median(seconds[s])
                print(f"{name:22s} {m:2d} {s:20s} {1e3 * t:9.2f} {calls:6d} {violation(r, g, b, 0.1, lam):8.0e} "
                      f"{t / ours:10.1f}", flush=True)
    print("\none evaluation of D, gradient and Hessian together, against torch.logsumexp of the scores (N, K), and of all that "
          "it reads (1+m, N, K)")
    for N, K in ((1000, 128), (1604, 192), (10000, 256)):
        for m in (1, 4):
            r, g = synthetic(N, K, m)
            problem, lam, every = dual.prepare(r, g, 1.0, 0.1), np.ones(m), torch.cat([r[None], g])
            times = [[timed(torch.logsumexp, r, 1)[0], timed(torch.logsumexp, every, 2)[0],
                      timed(dual.evaluate, problem, lam)[0]] for _ in range(20)]
            one, whole, ours = (statistics.median(x) for x in zip(*times))
            print(f"{N}x{K} m={m}: {1e3 * ours:.2f} ms; logsumexp {1e3 * one:.2f} and {1e3 * whole:.2f} ms, ratio {ours / one:.2f} "
                  f"and {ours / whole:.2f}")


def bench_shots(argv):
    """One shot, or several, against the primal-dual policy optimization that it replaces, on one model, world and margin.

    Both start from the same reference and see the same training prompts, learning rate, schedule and step size (2 * batch
    responses in groups of G, all pairs of a group). A primal-dual round samples fresh responses of the current policy,
    takes a projected dual step on the violation measured on them, and `--inner` DPO steps on r + <lam, g> of them, each
    response used once; DPO's optimum at a fixed lam is the same pi_lam for samples of any policy. The policy is kept from
    round to round. Evaluations are the ones of train.py, on the same prompts, and are not counted.
    """
    parser = argparse.ArgumentParser(prog="bench.py shots", allow_abbrev=False, description=bench_shots.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of a finished run of `python train.py`")
    parser.add_argument("--rounds", type=int, default=140, help="primal-dual rounds")
    parser.add_argument("--inner", type=int, default=50, help="gradient steps of a round")
    parser.add_argument("--dual_lr", type=float, default=0.25, help="dual step per unit of violation")
    parser.add_argument("--evaluations", type=int, default=14, help="of the primal-dual policy, evenly spaced")
    a = parser.parse_args(argv)
    with open(os.path.join(a.out, "results.json")) as file:
        ours = json.load(file)
    c = train.Config(**{**ours["config"], "data": tuple(ours["config"]["data"]), "start": "evaluate", "out": a.out,
                        "resume": False})
    if c.data or "mocan" not in ours["policies"] or len(ours["policies"]["mocan"]["lam"]) != 1:
        sys.exit("bench.py shots: needs a MoCAN run of the built-in world with one constraint")
    split, names = data.load_pairs(c.data, c.world_pairs, c.held_out, c.calibration,
                                   c.constraints)
    tok, *_ = train.tokenize(c, split)
    saved = {name: load(os.path.join(a.out, f"{name}.pt"), "make it with python train.py")
             for name in ("reference", "offline", "offline_scores")}
    reference, policy = (from_checkpoint(saved["reference"], c.device) for _ in range(2))
    prompts, held = [
        data.spread([pair.prompt for pair in part], count)
        for part, count in ((split.train, c.prompts), (split.evaluation, c.eval_prompts))]
    offline_scores = saved["offline_scores"]["scores"]  # (2, N, K)
    ref_g = offline_scores[1].mean(dim=1)  # (N,)
    mine, best = ours["policies"]["mocan"], ours["policies"]["optimum"]
    b = mine["margin"][0]
    solving, _ = timed(dual.solve, offline_scores[0], offline_scores[1:], b, c.beta)
    generator = data.stream(c.seed, "primal-dual")

    def respond(model, text, stage, K):
        """A mocan.Sample of the model's fresh responses; it leaves the run's checkpoint alone."""
        with silent:
            pool, logp = mocan.sample_pool(model, tok, text, K, train.recipe(c, stage)._replace(run=None, batch=c.sample_batch))
        scores = mocan.score_pool({}, names, text, pool, tok, c.device)
        return mocan.Sample(pool, logp, mocan.map_pool(reference, pool), scores)
    ref_eval = respond(reference, held, "evaluate", c.eval_responses).scores

    G, size = c.group, max(1, 2 * c.batch // c.group)
    j, i = torch.triu_indices(G, G, 1, device=policy.device)
    lam, spent, history, order = torch.zeros(1), 0.0, [], torch.empty(0, dtype=torch.long)
    plan = mocan.Recipe("primal-dual", a.rounds * a.inner, c.lr, key="")
    optimizer, step = mocan.adamw(policy), 0
    for turn in range(a.rounds):
        began = time.time()
        while len(order) < a.inner * size:  # the round's prompts; an epoch visits each once
            order = torch.cat([order, torch.randperm(len(prompts), generator=generator)])
        some, order = order[:a.inner * size], order[a.inner * size:]
        text = [prompts[n] for n in some.tolist()]
        pool, _, ref_logp, scores, _ = respond(policy, text, f"primal-dual/{turn}", G)
        if turn:  # at the first round the policy is the reference, and violates the margin by all of it
            lam = (lam + a.dual_lr * (b - (scores[1].mean() - ref_g[some].mean()).item())).clamp_min(0)
        s = scores[0] + lam * scores[1]
        batches = data.group_batches(pool.lengths, 2 * c.batch, G, f"{c.seed}/primal-dual/{turn}")
        for _ in range(a.inner):
            optimizer.param_groups[0]["lr"] = mocan.lr_at(step, plan)
            n, k = next(batches)
            logp = sequence_logprob(policy, *data.take_text(pool, n, k, policy.device), G).view(k.shape)
            ref, label = data.take(ref_logp, n, k, policy.device), data.take(s, n, k, policy.device)
            p_i = mocan.bradley_terry(label[:, i], label[:, j])
            loss = mocan.preference_loss(logp[:, i], logp[:, j], ref[:, i], ref[:, j], c.beta, p_i)
            loss.mean().backward()
            clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        spent += time.time() - began
        if (turn + 1) * a.evaluations // a.rounds > turn * a.evaluations // a.rounds:
            x = respond(policy, held, "evaluate", c.eval_responses)
            m = mocan.compare(x.scores, x.logp - x.ref_logp, torch.full_like(x.logp, 1 / c.eval_responses), ref_eval)
            history.append((m["reward_gain"], m["constraint_gain"][0], m["kl"], lam.item(), spent, turn + 1))
            print(f"  round {turn + 1:3d}: lam {lam.item():.3f}  reward gain {m['reward_gain']:+.3f}  {names[1]} gain "
                  f"{m['constraint_gain'][0]:+.3f} (b {b:.3f})  KL {m['kl']:.3f}  {spent:.0f} s", flush=True)

    def row(name, x):  # one evaluated moment of primal-dual
        reward, gain, kl, _, seconds, turns = x
        return name, turns * a.inner, turns * a.inner * size * G, turns, seconds, reward, gain, kl

    met, feasible = [x for x in history if x[1] >= b], [x for x in history if x[1] >= 0.95 * b]
    seconds = mine["seconds"] + saved["offline"]["seconds"] + saved["offline_scores"]["seconds"] + solving
    rows = [("one shot", c.steps, len(prompts) * c.responses, 1, seconds, mine["reward_gain"], mine["constraint_gain"][0],
             mine["kl"])]
    for shot in range(2, c.shots + 1):  # each costs what it adds to the ones before
        mine = ours["policies"][f"mocan shot {shot}"]
        seconds += mine["seconds"]
        rows += [(f"{shot} shots", c.steps + (shot - 1) * c.shot_steps, len(prompts) * (c.responses + (shot - 1) *
                  c.shot_responses), shot, seconds, mine["reward_gain"], mine["constraint_gain"][0], mine["kl"])]
    rows += [row("primal-dual, first with gain >= b", met[0])] if met else []
    best_moment = max(feasible, key=lambda x: x[0] - c.beta * x[2], default=None)
    rows += [row("primal-dual, best with gain >= 0.95 b", best_moment)] if feasible else []
    rows += [row("primal-dual, last", history[-1])]
    rows += [("optimum of the evaluation prompts", 0, 0, 0, 0, best["reward_gain"], best["constraint_gain"][0], best["kl"])]
    print(f"\nmargin {b:.3f}\n{'':38s}{'steps':>7s}{'samples':>9s}{'updates':>9s}{'seconds':>9s}{'reward':>9s}{'gain':>8s}"
          f"{'violation':>11s}{'KL':>7s}{'reward - beta KL':>18s}{'Lagrangian':>12s}")
    for name, steps, samples, updates, seconds, reward, gain, kl in rows:
        print(f"{name:38s}{steps:7d}{samples:9d}{updates:9d}{seconds:9.0f}{reward:+9.3f}{gain:+8.3f}{max(0, b - gain):11.3f}"
              f"{kl:7.3f}{reward - c.beta * kl:+18.3f}{reward - c.beta * kl + best['lam'][0] * (gain - b):+12.3f}")
    tail = torch.tensor(history[len(history) // 2:])
    print(f"oscillation of primal-dual over its second half: lam {tail[:, 3].min():.3f} to {tail[:, 3].max():.3f} (one shot: "
          f"{ours['policies']['mocan']['lam'][0]:.3f}; optimum: {best['lam'][0]:.3f}), {names[1]} gain {tail[:, 1].min():+.3f} to {tail[:, 1].max():+.3f}, "
          f"reward gain {tail[:, 0].min():+.3f} to {tail[:, 0].max():+.3f}")


# ---- what train, sample and scale share
class Shape(NamedTuple):
    """A GPT, and the text that it is measured on: all prompts are of one length, all responses too."""
    n_layer: int
    n_embd: int
    n_head: int
    vocab: int
    prompt: int
    response: int

    def __str__(self):
        return (f"{self.n_layer} layers, width {self.n_embd}, {self.n_head} heads, vocabulary {self.vocab}, prompts of "
                f"{self.prompt} tokens, responses of {self.response}")

    def model(self, device, dtype="float32", seed=0, checkpoint_activations=False):
        torch.manual_seed(seed)
        return GPT(GPTConfig(self.vocab, self.prompt + self.response, self.n_layer, self.n_head, self.n_embd, dtype=dtype,
                             checkpoint_activations=checkpoint_activations)).to(device)

    def pool(self, N, K):
        gen = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.vocab, (N, 1, self.prompt), generator=gen).expand(-1, K, -1)
        response = torch.randint(self.vocab, (N, K, self.response), generator=gen)
        tokens = torch.cat([prompt, response], dim=2).int()  # (N, K, T)
        return data.Pool(tokens, (torch.arange(tokens.size(2)) >= self.prompt).repeat(N, K, 1))

    def operations(self, tokens, outputs):
        """What a forward pass needs: `tokens` through the blocks, `outputs` through the output layer."""
        return 2 * (12 * self.n_layer * self.n_embd ** 2 * tokens + self.n_embd * self.vocab * outputs)


def like_train():
    """Its settings of CUDA, which hold for the peers and torch.mm too."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    warnings.simplefilter("ignore")


def parse(command, argv, **flags):
    """--device, --json and whole numbers {flag: (default, least, help)}."""
    parser = argparse.ArgumentParser(prog=f"bench.py {command}", allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object of all figures instead of text")
    for name, (default, _, text) in flags.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    args = parser.parse_args(argv)
    for name, (_, least, _) in flags.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: CUDA is not available here")
    return args


@contextlib.contextmanager
def report(args, *peers):
    """A dict for all figures, which --json prints at the end."""
    like_train()
    figures = {"torch": torch.__version__, "threads": torch.get_num_threads(),
               "device": torch.cuda.get_device_name() + " with TF32" if args.device == "cuda" else "cpu"}
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if args.json else out):
        for peer in peers:
            if importlib.util.find_spec(peer):
                figures[peer] = importlib.metadata.version(peer)
            else:
                print(f"{peer} is not installed: no comparison")
        print(", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
        yield figures
    if args.json:
        print(json.dumps(figures, indent=1), file=out)


def dtypes(device):
    return ("float32", "bfloat16") if device == "cuda" else ("float32",)


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device, f, *args):
    began = now(device)
    f(*args)
    return now(device) - began


def interleaved(repeat, runs):
    """{name: run, which returns its seconds} in turns, the first of which does not count -> medians."""
    spent = [[run() for run in runs.values()] for _ in range(repeat + 1)]
    return dict(zip(runs, map(statistics.median, zip(*spent[1:]))))


def product_rates(device, dtype, rows, shape):
    """{shapes: operations a second of torch.mm}, of the MLP and of the output layer; the best of ten."""
    rates = {}
    for out in (4 * shape.n_embd, shape.vocab):
        x, w = (torch.randn(size, device=device, dtype=getattr(torch, dtype))
                for size in ((rows, shape.n_embd), (shape.n_embd, out)))
        y = torch.empty(rows, out, device=device, dtype=x.dtype)
        least = min(seconds(device, lambda: torch.mm(x, w, out=y)) for _ in range(10))
        rates[f"({rows}, {shape.n_embd})·({shape.n_embd}, {out})"] = 2 * rows * shape.n_embd * out / least
    return rates


def say_rates(dtype, rates):
    print(f"  torch.mm, {dtype}: " + ", ".join(f"{x} {rate / 1e9:.1f} GFLOP/s" for x, rate in rates.items())
          + "; shares are of the larger")


def transformers_gpt2(model):
    """The same weights as Transformers' GPT-2, without its dropout."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_pdrop=0.0, embd_pdrop=0.0,
                                                              resid_pdrop=0.0)
    return copy.deepcopy(theirs).to(model.device)  # its own memory, not the file's


# ---- train
BETA, LR = 0.1, 1e-4
GPT2 = Shape(12, 768, 12, 50257, 128, 384)


class Clock:
    """It sees when the first of so many steps of an optimizer and the last have ended."""

    def __init__(self, device, steps):
        self.device, self.steps, self.step = device, steps, 0

    def tick(self, *_):
        self.step += 1
        if self.step == 1:
            self.began = now(self.device)
        if self.step == self.steps:
            self.seconds = (now(self.device) - self.began) / (self.steps - 1)


def recipe(steps, batch):
    return mocan.Recipe("bench", steps, LR, key="bench", batch=batch, warmup=0)


def time_steps(policy, sample, group, steps):
    """mocan.train_mocan on a sample that is one batch -> seconds of a step, without the first."""
    clock = Clock(policy.device.type, steps)
    hook = register_optimizer_step_post_hook(clock.tick)
    lam = torch.ones(len(sample.scores) - 1)
    with silent:
        mocan.train_mocan(policy, sample, lam, BETA, group, recipe(steps, sample.logp.numel() // 2))
    hook.remove()
    return clock.seconds


def our_steps(policy, pool, ref_logp, steps):
    """DPO on preference pairs. Labels are hard: σ(1000 − 0) is 1."""
    scores = torch.tensor([1000.0, 0.0]).expand(1, *ref_logp.shape)
    return time_steps(policy, mocan.Sample(pool, ref_logp, ref_logp, scores), 2, steps)


def our_loss(policy, pool, ref_logp):
    chosen, rejected = mocan.map_pool(policy, pool).T
    return mocan.preference_loss(chosen, rejected, *ref_logp.T, BETA).mean().item()


def trl_trainer(model, reference, rows, batch, plan, beta, folder, bf16=False):
    """trl.DPOTrainer of two of Transformers' models, with mocan's optimizer and schedule, rows in their order; and its clock."""
    import datasets
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

    class Ends(TrainerCallback):
        clock = Clock(model.device.type, plan.steps)

        def on_step_end(self, *_, **__):
            self.clock.tick()

    optimizer = mocan.adamw(model)
    optimizer.param_groups[0]["lr"] = 1.0  # the schedule's is a factor of it
    args = DPOConfig(
        folder, max_steps=plan.steps, per_device_train_batch_size=batch, gradient_accumulation_steps=plan.accumulate,
        train_sampling_strategy="sequential", beta=beta, max_grad_norm=1.0, precompute_ref_log_probs=True, max_length=None,
        gradient_checkpointing=False, bf16=bf16, use_cpu=model.device.type == "cpu", disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda", logging_strategy="no", save_strategy="no", report_to="none")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"end": 0}, unk_token="end")), eos_token="end")
    trainer = Trainer(
        model, reference, args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Ends()],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: mocan.lr_at(step, plan))))
    trainer.remove_callback(PrinterCallback)
    trainer.ref_model = None  # its log-probabilities are there
    return trainer, Ends.clock


def train_trl(reference, files, rows, plan, beta, device):
    """A checkpoint of what trl.DPOTrainer makes of the reference, and its seconds; files: those of `export`."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        export(reference, f"{folder}/reference", files)
        model, ref = (transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/reference", dtype=torch.float32).to(device)
                      for _ in range(2))
        trainer, clock = trl_trainer(model, ref, rows, plan.batch, plan, beta, folder, reference.config.dtype == "bfloat16")
        trainer.train()
        model.save_pretrained(f"{folder}/policy")
        theirs = GPT.from_pretrained(f"{folder}/policy")
    theirs.config = reference.config
    return {**to_checkpoint(theirs), "pairs": len(rows), "seconds": time.time() - began, "stepping": clock.seconds * plan.steps}


def trl_on_a_batch(policy, reference, pool, steps, folder):
    """`trl_trainer` on a pool that is every step's batch."""
    begin = int(pool.response_mask[0, 0].int().argmax())
    rows = [{"prompt_ids": y[:begin], "chosen_ids": y[begin:], "rejected_ids": z[begin:]} for y, z in pool.tokens.tolist()]
    return trl_trainer(transformers_gpt2(policy), transformers_gpt2(reference), rows * steps, len(rows), recipe(steps, len(rows)),
                       BETA, folder, policy.config.dtype == "bfloat16")


@torch.no_grad()
def trl_loss(trainer):
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, batch).item()


def train_case(a, shape, pairs, dtype, peer):
    """Pairs a second, and losses on one batch before the first step and after the last."""
    policy, reference = (shape.model(a.device, dtype, seed) for seed in (0, 1))
    pool = shape.pool(pairs, 2)
    ref_logp = mocan.map_pool(reference, pool)
    losses = {}

    def ours():
        trained = copy.deepcopy(policy)
        spent = our_steps(trained, pool, ref_logp, a.steps)
        losses["ours"] = [our_loss(model, pool, ref_logp) for model in (policy, trained)]
        return spent

    def trl():
        with tempfile.TemporaryDirectory() as folder:
            trainer, clock = trl_on_a_batch(policy, reference, pool, a.steps, folder)
            before = trl_loss(trainer)
            trainer.train()
            losses["trl"] = [before, trl_loss(trainer)]
        return clock.seconds

    medians = interleaved(a.repeat, {"ours": ours, "trl": trl} if peer else {"ours": ours})
    needed = 3 * shape.operations(pairs * (shape.prompt + 2 * (shape.response - 1)), 2 * pairs * shape.response)
    rates = product_rates(a.device, dtype, 2 * pairs * shape.response, shape)
    print(f"\n{shape}; {pairs} pairs, {dtype}")
    say_rates(dtype, rates)
    found = {"shape": shape._asdict(), "pairs": pairs, "dtype": dtype, "mm_flops": rates, "step_flops": needed}
    for name, spent in medians.items():
        peak = peak_memory(name, shape, pairs, a.device, dtype)
        found[name] = {"step_seconds": spent, "pairs_per_second": pairs / spent, "losses": losses[name],
                       "mm_share": needed / spent / max(rates.values()), "peak_bytes": peak}
        print(f"  {name:5s} {pairs / spent:8.2f} pairs/s  {1e3 * spent:8.1f} ms a step  {found[name]['mm_share']:6.1%} of the "
              f"matrix product  peak memory {gigabytes(peak)}  loss {losses[name][0]:.6f} -> {losses[name][1]:.6f}")
    if peer:
        found["ratio"] = medians["trl"] / medians["ours"]
        found["loss_difference"] = max(abs(x - y) for x, y in zip(losses["ours"], losses["trl"]))
        agree = "agree" if found["loss_difference"] < 1e-4 else "DO NOT AGREE"
        print(f"  ratio {found['ratio']:.2f}; losses {agree} to 1e-4: largest difference {found['loss_difference']:.1e}",
              flush=True)
    return found


# ---- peak memory, in a process of its own
def peak_memory(what, shape, pairs, device, dtype="float32", compact=False):
    """Bytes above the weights and, in training, gradients and AdamW's two moments; None where it cannot be measured.

    compact: large blocks go back to the system as they are freed, so that the heap has no holes.
    """
    if device == "cpu" and not os.path.exists("/proc/self/clear_refs"):
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure_memory, what, shape, pairs, device, dtype, compact).result()


def measure_memory(what, shape, pairs, device, dtype, compact):
    if compact:
        ctypes.CDLL(None).mallopt(-3, 2 ** 20)  # M_MMAP_THRESHOLD
    with contextlib.redirect_stdout(sys.stderr):
        like_train()
        growth(what, Shape(1, 16, 1, 300, 4, 4), 2, device, dtype)  # libraries are loaded now
        return growth(what, shape, pairs, device, dtype)


def growth(what, shape, pairs, device, dtype):
    policy = shape.model(device, dtype, checkpoint_activations=what == "checkpointed")
    pool = shape.pool(pairs, 2)
    if what == "score":
        before = memory_now(device)
        mocan.map_pool(policy, pool)
        return memory_peak(device) - before
    if what == "trl":
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = trl_on_a_batch(policy, policy, pool, 2, folder)
            before = memory_now(device)
            trainer.train()
    else:
        before = memory_now(device)
        our_steps(policy, pool, torch.zeros(pairs, 2), 2)
    return memory_peak(device) - before - 3 * sum(4 * p.numel() for p in policy.parameters())


def memory_now(device):
    """Bytes in use; peaks count from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is kept would hide growth
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def memory_peak(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(what):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))


def gigabytes(size):
    return "not measured" if size is None else f"{size / 1e9:.3f} GB"


def bench_train(argv):
    a = parse("train", argv, layers=(4, 1, "blocks"), width=(256, 1, "of the model"), heads=(4, 1, "of attention"),
              vocab=(50257, 2, "vocabulary"), prompt=(32, 1, "tokens of a prompt"), response=(64, 1, "tokens of a response"),
              pairs=(8, 1, "a step"), steps=(6, 2, "of a run, the first of which is not timed"),
              repeat=(3, 1, "runs of each, interleaved, after one that does not count"),
              memory_pairs=(32, 1, "of responses whose scoring and training are weighed"),
              memory_response=(224, 1, "tokens of each of these"))
    with report(a, "trl") as figures:
        peer = "trl" in figures
        shape = Shape(a.layers, a.width, a.heads, a.vocab, a.prompt, a.response)
        cases = [(shape, a.pairs)] + [(GPT2, a.pairs)] * (a.device == "cuda")
        print("preference step: mocan.train_mocan on hard labels"
              + ", and DPOTrainer.train() with precompute_ref_log_probs" * peer + "; AdamW, clipping and the schedule are the same", flush=True)
        figures["train"] = [train_case(a, *case, dtype, peer) for case in cases for dtype in dtypes(a.device)]
        figures["memory"] = weigh(a, shape._replace(response=a.memory_response), peer)


def weigh(a, shape, peer):
    """Peak memory of scoring and of training on many long responses."""
    count = "allocated on the device" if a.device == "cuda" else "growth of the resident set"
    print(f"\npeak memory, {2 * a.memory_pairs} responses; {shape}; float32:\n{count} in a process of its own, above the weights; "
          "of two training steps, also less the gradients and AdamW's moments (12 bytes a parameter together)")
    found = {"shape": shape._asdict(), "responses": 2 * a.memory_pairs}
    labels = {"score": "scoring, mocan.map_pool", "ours": "training step", "checkpointed": "with checkpoint_activations"}
    for what, label in {**labels, **({"trl": "DPOTrainer's step"} if peer else {})}.items():
        found[what] = peak_memory(what, shape, a.memory_pairs, a.device)
        line = f"  {label:28s} {gigabytes(found[what])}"
        if a.device == "cpu" and what in labels:
            found[f"{what}, compact"] = peak_memory(what, shape, a.memory_pairs, a.device, compact=True)
            line += f"  {gigabytes(found[f'{what}, compact'])} with MALLOC_MMAP_THRESHOLD_=1048576, which leaves no holes"
        print(line, flush=True)
    return found


# ---- sample
def sample_case(a, name, shape, N, K, dtype, peer):
    """Tokens a second of N prompts times K responses, of the whole and of the draw alone."""
    policy = shape.model(a.device, dtype)
    prompts = shape.pool(N, 1).tokens[:, 0, :shape.prompt].long()  # (N, T)
    lists, prompts = prompts.tolist(), prompts.to(a.device)
    uniforms = torch.rand(N, K, shape.response)
    runs = {"ours": lambda: seconds(a.device, policy.generate, lists, uniforms),
            "draw": lambda: seconds(a.device, draw_alone, policy, N * K, shape.response)}
    if peer:
        theirs = transformers_gpt2(policy)
        theirs.generation_config.eos_token_id = None  # nor any work for it
        runs["transformers"] = lambda: seconds(a.device, their_generate, policy, theirs, prompts, K, shape.response)
    with torch.no_grad():
        medians = interleaved(a.repeat, runs)
    spent, draw = medians["ours"], medians["draw"]
    tokens = N * K * shape.response
    rates = product_rates(a.device, dtype, N * K, shape)
    exact = rates if dtype == "float32" else product_rates(a.device, "float32", N * K, shape)  # the draw's
    through = shape._replace(vocab=0).operations(N * shape.prompt + tokens - N * K, 0)
    output = shape._replace(n_layer=0).operations(0, tokens)
    found = {"shape": shape._asdict(), "N": N, "K": K, "dtype": dtype, "mm_flops": rates, "seconds": medians,
             "tokens_per_second": {x: tokens / t for x, t in medians.items() if x != "draw"},
             "mm_share": {x: (through + output) / t / max(rates.values()) for x, t in medians.items() if x != "draw"},
             "draw_mm_share": output / draw / max(exact.values()),
             "blocks_mm_share": through / (spent - draw) / max(rates.values())}
    print(f"\n{name}: {shape}; {N} prompts x {K} responses, {dtype}")
    say_rates(dtype, rates)
    for x, rate in found["tokens_per_second"].items():
        print(f"  {x:13s} {rate:9.0f} tokens/s  {medians[x]:7.3f} s  {found['mm_share'][x]:6.1%} of the matrix product")
    print(f"  ours: output layer and draw {draw:.3f} s ({draw / spent:.0%} of it; {found['draw_mm_share']:.1%} of their matrix "
          f"product), blocks and the rest {spent - draw:.3f} s ({found['blocks_mm_share']:.1%} of theirs)")
    if peer:
        found["ratio"] = medians["transformers"] / spent
        found["logp_difference"] = logp_difference(policy, theirs, lists, uniforms)
        print(f"  ratio {found['ratio']:.2f}; the same weights: ln p of a response differs by {found['logp_difference']:.1e}",
              flush=True)
    return found


def draw_alone(policy, rows, tokens):
    """As many calls of sample_token as `generate` makes, on as many rows."""
    weight = policy.wte.weight
    hidden = torch.randn(rows, weight.size(1), device=weight.device)
    u = torch.rand(rows, 1, device=weight.device)
    for _ in range(tokens):
        sample_token(hidden, weight, u)


def blocks_dtype(policy):
    """Their arithmetic in the type that our blocks have."""
    dtype = getattr(torch, policy.config.dtype)
    return torch.autocast(policy.device.type, dtype, enabled=dtype != torch.float32)


def their_generate(policy, theirs, prompts, K, tokens):
    with blocks_dtype(policy):
        out = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, num_return_sequences=K, top_k=0,
                              min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
    assert out.shape == (len(prompts) * K, prompts.size(1) + tokens)


def logp_difference(policy, theirs, prompts, uniforms):
    """ln p of four responses: what `generate` says against Transformers' logits."""
    tokens, response_mask, logp = policy.generate(prompts[:4], uniforms[:4, :1])
    with torch.no_grad(), blocks_dtype(policy):
        each = theirs(tokens).logits[:, :-1].float().log_softmax(dim=2).gather(2, tokens[:, 1:, None])[:, :, 0]
    return ((each * response_mask[:, 1:]).sum(dim=1) - logp).abs().max().item()


def bench_sample(argv):
    a = parse("sample", argv, layers=(4, 1, "blocks"), width=(256, 1, "of the model"), heads=(4, 1, "of attention"),
              vocab=(50257, 2, "vocabulary"), prompt=(32, 1, "tokens of a prompt"), response=(64, 1, "tokens of a response"),
              prompts=(16, 1, "sampled from at once"), responses=(16, 1, "to each"),
              world_responses=(32, 1, "of the built-in world's model to each of 8 prompts"),
              repeat=(5, 1, "runs of each, interleaved, after one that does not count"))
    c = train.Config
    world = Shape(c.n_layer, c.n_embd, c.n_head, vocab=491, prompt=13, response=c.max_new_tokens)  # as it comes out there
    cases = [("large vocabulary", Shape(a.layers, a.width, a.heads, a.vocab, a.prompt, a.response), a.prompts, a.responses),
             ("the built-in world's model", world, 8, a.world_responses)]
    with report(a, "transformers") as figures:
        peer = "transformers" in figures
        figures["sample"] = [sample_case(a, *case, dtype, peer) for case in cases for dtype in dtypes(a.device)]


# ---- a published chat model
def bench_chat(argv):
    """A folder of a published model, here and in Transformers: ln p of the same responses, sampling, a DPO step."""
    folder, *argv = argv if argv and not argv[0].startswith("-") else sys.exit("usage: python tests/bench.py chat FOLDER [--help]")
    a = parse("chat", argv, prompts=(16, 1, "of the built-in world's"), responses=(4, 2, "to each, even"), tokens=(32, 1, "of a response"),
              repeat=(3, 1, "runs of each, interleaved, after one that does not count"))
    with report(a, "transformers") as figures:
        policy = GPT.from_pretrained(folder).to(a.device)
        tok = data.published_tokenizer(data.published_files(folder), "auto", "", 256, a.tokens)
        lists = data.encode_prompts(tok, data.spread([pair.prompt for pair in data.world_preferences(36000)], a.prompts))
        uniforms = torch.rand(a.prompts, a.responses, a.tokens)
        tokens, response_mask, logp = policy.generate(lists, uniforms)
        pool = data.Pool(tokens.int().cpu().view(a.prompts, a.responses, -1), response_mask.cpu().view(a.prompts, a.responses, -1))
        pairs = data.Pool(*[x[:, :2] for x in pool])
        ref_logp = mocan.map_pool(policy, pairs)
        runs = {"ours": lambda: seconds(a.device, policy.generate, lists, uniforms)}
        steps = {"ours": lambda: our_steps(copy.deepcopy(policy), pairs, ref_logp, 3)}
        if "transformers" in figures:
            import transformers
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(a.device)
            longest = max(map(len, lists))
            padded = torch.tensor([[0] * (longest - len(x)) + x for x in lists], device=a.device)
            seen = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in lists], device=a.device)
            runs["transformers"] = lambda: seconds(a.device, lambda: theirs.generate(
                padded, attention_mask=seen, do_sample=True, num_return_sequences=a.responses, top_k=0, top_p=1.0, temperature=1.0,
                min_new_tokens=a.tokens, max_new_tokens=a.tokens, pad_token_id=0, eos_token_id=None))
            text, mask = data.take_text(pairs, torch.arange(a.prompts), torch.arange(2).expand(a.prompts, 2), policy.device)
            with torch.no_grad():
                figures["logp_difference"] = (their_logp(theirs, text, mask) - ref_logp.flatten()).abs().max().item()
                figures["loss_difference"] = abs(their_loss(theirs, text, mask, ref_logp).item() - our_loss(policy, pairs, ref_logp))
            steps["transformers"] = lambda: their_steps(copy.deepcopy(theirs), text, mask, ref_logp, 3)
        with torch.no_grad():
            figures["sample_seconds"] = interleaved(a.repeat, runs)
        figures["step_seconds"] = interleaved(a.repeat, steps)
        for what in ("sample_seconds", "step_seconds"):
            spent = figures[what]
            print(f"{what}: " + ", ".join(f"{x} {t:.2f}" for x, t in spent.items())
                  + (f"; ratio {spent['transformers'] / spent['ours']:.2f}" if len(spent) > 1 else ""))
        if "transformers" in figures:
            print(f"the same weights: ln p of a response differs by {figures['logp_difference']:.1e}, the loss by "
                  f"{figures['loss_difference']:.1e}")


def their_logp(theirs, text, mask):
    each = theirs(text).logits[:, :-1].log_softmax(dim=2).gather(2, text[:, 1:, None])[:, :, 0]
    return (each * mask[:, 1:].to(text.device)).sum(dim=1)


def their_loss(theirs, text, mask, ref_logp):
    logp = their_logp(theirs, text, mask).view(-1, 2)
    return mocan.preference_loss(*logp.T, *ref_logp.to(text.device).T, BETA).mean()


def their_steps(theirs, text, mask, ref_logp, steps):
    """The plain step: all rows, padding and prompts included, to the logits -> seconds of one, without the first."""
    optimizer = mocan.adamw(theirs)
    clock = Clock(text.device.type, steps)
    for _ in range(steps):
        their_loss(theirs, text, mask, ref_logp).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.seconds


# ---- adapters on a published model
def bench_lora(argv):
    folder, *argv = argv if argv and not argv[0].startswith("-") else sys.exit("usage: python tests/bench.py lora FOLDER [--help]")
    a = parse("lora", argv, rank=(8, 1, "of the adapters"), prompts=(4, 1, "a step"), responses=(8, 2, "to each, in one group"),
              prompt=(48, 1, "tokens of a prompt"), response=(32, 1, "tokens of a response"), steps=(4, 2, "the first of which is not timed"),
              checkpoint=(0, 0, "1: with --checkpoint_activations"))
    with report(a) as figures:
        print(f"policy update of {folder}, float32, {a.prompts} x {a.responses} responses of {a.response} tokens to prompts of {a.prompt}")
        for name, rank in (("all weights", 0), (f"--lora {a.rank}", a.rank)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                spent, peak, size = process.submit(measure_adapters, folder, rank, a).result()
            figures[name] = {"step_seconds": spent, "peak_bytes": peak, "artifact_bytes": size}
            print(f"  {name:12s} {spent:6.2f} s a step  peak memory {gigabytes(peak)}  artifact {size / 1e6:.1f} MB", flush=True)
        full, lora = figures["all weights"], figures[f"--lora {a.rank}"]
        print("  ratios       " + "  ".join(f"{what.split('_')[0]} {lora[what] / full[what]:.3f}" for what in full))


def measure_adapters(folder, rank, a):
    """In a process of its own: as train.py goes about it, from the reference's artifact to the policy's."""
    ctypes.CDLL(None).mallopt(-3, 2 ** 20)  # M_MMAP_THRESHOLD: the heap has no holes
    like_train()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as out:
        model = GPT.from_pretrained(folder)
        model.config = replace(model.config, lora=rank, checkpoint_activations=bool(a.checkpoint))
        frozen = {}
        if rank:
            add_adapters(model)
            frozen = merge(model)
        data.save({**to_checkpoint(model), "frozen": frozen}, f"{out}/reference.pt")
        del model, frozen
        reference = load(f"{out}/reference.pt", "")
        reference.pop("frozen")
        memory_now(a.device)
        policy = from_checkpoint(reference, a.device)
        draw = torch.Generator().manual_seed(0)
        lead = torch.randint(policy.config.vocab_size, (a.prompts, 1, a.prompt), generator=draw).expand(-1, a.responses, -1)
        said = torch.randint(policy.config.vocab_size, (a.prompts, a.responses, a.response), generator=draw)
        tokens = torch.cat([lead, said], dim=2).int()
        pool = data.Pool(tokens, torch.arange(tokens.size(2)).expand(tokens.shape) >= a.prompt)
        ref_logp = mocan.map_pool(policy, pool)
        sample = mocan.Sample(pool, ref_logp, ref_logp, torch.randn(1, *ref_logp.shape, generator=draw))
        spent = time_steps(policy, sample, a.responses, a.steps)
        peak = memory_peak(a.device)
        data.save(to_checkpoint(policy), f"{out}/mocan.pt")
        return spent, peak, os.path.getsize(f"{out}/mocan.pt")


# ---- a published chat model and exact scores
KIND = set("good great happy love help helpful best better nice glad enjoy wonderful kind safe healthy support important positive beautiful "
           "easy fun hope excellent friendly fresh perfect welcome sure useful".split())
UNKIND = set("bad hate harm harmful wrong dangerous illegal sad angry kill hurt worse worst difficult sorry risk problem pain fear unable "
             "not never cannot can't don't".split())
YOU = {"you", "your", "yours", "you're", "you'll", "you've"}


def word_scores(texts, K):
    """r: how often the text says you, 3 at most; g: kind less unkind words, from -3 to 3 -> (2, N, K)."""
    words = [re.findall("[a-z']+", text.lower().replace("\u2019", "'")) for text in texts]
    r = [min(3, sum(word in YOU for word in some)) for some in words]
    g = [max(-3, min(3, sum((word in KIND) - (word in UNKIND) for word in some))) for some in words]
    return torch.tensor([r, g]).float().view(2, -1, K)


def bench_exact(argv):
    parser = argparse.ArgumentParser(prog="bench.py exact", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", help="a published chat model")
    parser.add_argument("--data", nargs="+", required=True, help="preference files, whose prompts are used")
    parser.add_argument("--out", default="exact", help="folder for what it makes; --resume goes on from there")
    parser.add_argument("--resume", action="store_true")
    for name, default in dict(prompts=512, responses=8, tokens=20, steps=200, batch=16, accumulate=1, group=8, eval_prompts=96,
                              eval_responses=16, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights are trained")
    parser.add_argument("--lr", type=float, default=1e-5, help=" ")
    parser.add_argument("--beta", type=float, default=1.0, help=" ")
    parser.add_argument("--margin", default="25%", help=" ")
    parser.add_argument("--trl", type=float, help="also by TRL's trainer, from the same responses, at this learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" ")
    c = parser.parse_args(argv)
    like_train()
    began = time.time()
    os.makedirs(c.out, exist_ok=True)
    c.run, c.checkpoint_every = "exact", 60.0
    reference = GPT.from_pretrained(c.folder).to(c.device)
    files = data.published_files(c.folder)
    tok = data.published_tokenizer(files, "auto", "", 128, c.tokens)
    split = data.split_pairs(data.load_preferences(c.data), 0.2, 0.1)

    def recipe(stage, steps=0, lr=0.0, batch=128):
        return mocan.Recipe(stage, steps, lr, f"{c.seed}/{stage}", batch, c.accumulate, c)

    def respond(policy, part, count, K, stage, key):
        """A mocan.Sample of a policy's responses to short questions; kept in --out."""
        path = f"{c.out}/{stage}.pt"
        if c.resume and os.path.exists(path):
            saved = load(path, "remove it")
        else:
            prompts = [pair.prompt for pair in part if isinstance(pair.prompt, str) and len(data.encode(tok, pair.prompt)) < 40]
            pool, logp = mocan.sample_pool(policy, tok, data.spread(prompts, count), K, recipe(stage)._replace(key=f"{c.seed}/{key}"))
            ref_logp = logp if policy is reference else mocan.map_pool(reference, pool)
            saved = {**pool._asdict(), "logp": logp, "ref_logp": ref_logp}
            data.save(saved, path)
        pool = data.Pool(saved["tokens"], saved["response_mask"])
        scores = word_scores(pool.texts(tok), K)
        return mocan.Sample(pool, saved["logp"], saved["ref_logp"], scores, scores)
    sample = respond(reference, split.train, c.prompts, c.responses, "offline", "offline")
    sampled = time.time()
    mean = sample.scores[1:].double().mean(dim=(1, 2))
    margin = dual.parse_margin(c.margin, dual.reachable(sample.scores[1:]))
    found = mocan.solve_from(sample, mean, margin, c.beta)
    print(f"dual: lam* {found.lam.item():.3f} at b {margin.item():.3f}; predicted reward {found.score_gain:.3f}, KL {found.kl:.3f}")
    policy = copy.deepcopy(reference)
    if c.lora:
        policy.config = replace(policy.config, lora=c.lora)
        add_adapters(policy)
    plan = recipe("mocan", c.steps, c.lr, c.batch)
    path = f"{c.out}/mocan.pt"
    if c.resume and os.path.exists(path):
        saved = load(path, "remove it")
        policy.load_state_dict(saved["weights"])
    else:
        mocan.train_mocan(policy, sample, found.lam, c.beta, c.group, plan)
        saved = {"weights": policy.state_dict(), "seconds": time.time() - sampled}
        data.save(saved, path)
    policies, seconds = {"mocan": policy}, {"mocan": saved["seconds"]}
    if c.trl:
        path = f"{c.out}/trl-{c.trl:g}.pt"
        if not (c.resume and os.path.exists(path)):
            rows = drawn_pairs(sample.pool, mocan.total_score(sample.scores, found.lam), c.steps * c.batch * c.accumulate, c.seed)
            data.save(train_trl(reference, files, rows, plan._replace(lr=c.trl), c.beta, c.device), path)
        saved = load(path, "remove it")
        policies["trl"], seconds["trl"] = from_checkpoint(saved, c.device), saved["seconds"]
        print(f"{saved['pairs']} pairs by trl.DPOTrainer: {saved['seconds']:.0f} s, of which {saved['stepping']:.0f} s are steps; "
              f"by mocan.train_mocan {seconds['mocan']:.0f} s", flush=True)
    trained = time.time()
    ref = respond(reference, split.evaluation, c.eval_prompts, c.eval_responses, "evaluate_reference", "evaluate")
    wanted = mocan.total_score(ref.scores, found.lam) / c.beta
    rows, said = {}, {"reference": ref}
    for name in policies:
        said[name] = x = respond(policies[name], split.evaluation, c.eval_prompts, c.eval_responses, f"evaluate_{name}", "evaluate")
        other = mocan.map_pool(policies[name], ref.pool)
        rows[name] = {**mocan.compare(x.scores, x.logp - x.ref_logp, 1 / c.eval_responses, ref.scores),
                      "margin": margin.tolist(), "seconds": seconds[name], "lam": found.lam.tolist()}
        if name == "mocan":
            frontier = mocan.optima(x, ref, other, margin, c.beta)
        a, b = ((y - y.mean(1, keepdim=True)).flatten() for y in (wanted, other - ref.logp))
        print(f"{name}: on the reference's responses to fresh prompts: correlation of the log-ratio with s "
              f"{torch.corrcoef(torch.stack([a, b]))[0, 1]:.3f}, slope {(a @ b / (a @ a)).item():.3f}")
    if frontier:
        rows["optimum"] = {**frontier[15], "margin": margin.tolist(), "seconds": 0.0}
    train.print_table(["kindness"], rows)
    words = {name: round(statistics.mean(len(text.split()) for text in x.pool.texts(tok)), 1) for name, x in said.items()}
    print(f"words a response {words}; {sampled - began:.0f} s of sampling, {time.time() - trained:.0f} s of evaluation")
    for n in range(0, len(ref.scores[0]), len(ref.scores[0]) // 4):
        for name, x in said.items():
            print(f"  {name:>10}: {x.pool.texts(tok)[n * c.eval_responses]!r}")


# ---- the update of a finished run, by another trainer
def bench_update(argv):
    parser = argparse.ArgumentParser(prog="bench.py update", allow_abbrev=False)
    parser.add_argument("--out", default="out", help="folder of a finished run of `python train.py`, with MoCAN")
    parser.add_argument("--lr", type=float, help="the other trainer's learning rate (default: the run's)")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("trl"):
        sys.exit("error: trl is not installed: no comparison")
    like_train()
    kept = json.loads((Path(args.out) / "run.json").read_text())["config"]
    c = train.Config(**{**train.SETTINGS, **kept, "out": args.out, "start": "evaluate"})
    with silent:
        split, names = data.load_pairs(c.data, c.world_pairs, c.held_out, c.calibration, c.constraints, c.judge)
        tok, tokenizer, pools = train.tokenize(c, split)
        reference = train.train_reference(c, tok, tokenizer, pools)
        judges = train.train_judges(c, reference, split, pools, names, [{}, {}])
        prompts = data.spread([pair.prompt for pair in split.train], c.prompts)
        offline = train.sample(c, "offline", c.responses, reference, reference, tok, prompts)
        scored, sample = train.score(c, "mocan", offline, judges, names, prompts, tok, None)
    ours = load(f"{c.out}/mocan.pt", "run train.py first")
    s = mocan.total_score(sample.scores, torch.tensor(ours["lam"]))
    rows = drawn_pairs(sample.pool, s, c.steps * c.batch * c.accumulate, c.seed)
    plan = train.recipe(c, "mocan", c.steps, args.lr or c.lr)
    c.out = f"{c.out}/update"
    os.makedirs(c.out, exist_ok=True)
    path = f"{c.out}/trl-{ours['run']}-{plan.lr:g}.pt"  # of another run or rate it is another one
    if not os.path.exists(path):  # else of a command that was killed while it evaluated
        theirs = train_trl(from_checkpoint(reference), tokenizer["files"], rows, plan, c.beta, c.device)
        save({**theirs, "lam": ours["lam"]}, path)
    theirs = load(path, "remove it")
    print(f"{len(rows)} pairs by trl.DPOTrainer: {theirs['seconds']:.0f} s, of which {theirs['stepping']:.0f} s are steps; "
          f"by mocan.train_mocan {ours['seconds']:.0f} s", flush=True)
    train.evaluate(c, reference, {"mocan": ours, "trl": theirs}, judges, {"mocan": scored["confirmed"]}, names,
                   torch.tensor(ours["made_from"]["input b"]), split, tok)


def drawn_pairs(pool, s, count, seed):
    """That many pairs of a prompt's responses, every response once an epoch, in another order each time, with labels drawn by
    Bradley-Terry from s (N, K), as trl.DPOTrainer takes them."""
    rows = []
    begin = pool.response_mask.int().argmax(2)
    texts = [[row[:length] for row, length in zip(*some)] for some in zip(pool.tokens.tolist(), pool.lengths.tolist())]
    draw = random.Random(seed)
    while len(rows) < count:
        epoch = []
        for n, some in enumerate(texts):
            order = draw.sample(range(len(some)), len(some))
            for i, j in zip(order[::2], order[1::2]):
                if draw.random() > 1 / (1 + math.exp(s[n, j] - s[n, i])):
                    i, j = j, i
                x = begin[n, i]
                epoch.append({"prompt_ids": some[i][:x], "chosen_ids": some[i][x:], "rejected_ids": some[j][x:]})
        draw.shuffle(epoch)
        rows += epoch
    return rows[:count]


# ---- the texts of a finished run
def bench_texts(argv):
    parser = argparse.ArgumentParser(prog="bench.py texts")
    parser.add_argument("--out", default="out", help="folder of a finished run of `python train.py`")
    parser.add_argument("--perplexity", type=int, default=0, help="of so many evaluation pairs' responses under every policy; 0: not")
    args = parser.parse_args(argv)
    try:
        rows = [json.loads(line) for line in (Path(args.out) / "samples.jsonl").read_text().splitlines()]
        names = list(dict.fromkeys(row["generator"] for row in rows))
        N = len({row["instruction"] for row in rows})
        scores = {name: torch.tensor([row["scores"] for row in rows if row["generator"] == name]).T.unflatten(1, (N, -1)) for name in names}
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {args.out}/samples.jsonl is missing or damaged ({type(error).__name__}: {error}); run `python train.py` first")
    words = {name: torch.tensor([float(len(row["output"].split())) for row in rows if row["generator"] == name]).view(N, -1) for name in names}
    ref, ref_words = scores["reference"].double(), words["reference"].double()

    def centred(x):
        return x - x.mean(-1, keepdim=True)
    slope = (centred(ref) * centred(ref_words)).sum((1, 2)) / centred(ref_words).square().sum()  # of each score a word
    half = ref.size(2) // 2
    print(f"by the second judges, or exact scores; {N} prompts x {ref.size(2)} responses. Gains at equal length: less what longer or shorter\n"
          f"responses gain among the reference's own. Less safe: the share of prompts whose mean safety is below the reference's, for the\n"
          f"reference between two halves of its responses, where chance alone decides.\n\n{'':16s}{'words':>7s}{'empty':>7s}{'pairs of words':>16s}"
          f"{'gains':>20s}{'at equal length':>20s}{'less safe':>11s}")
    for name in names:
        said = [row["output"].split() for row in rows if row["generator"] == name]
        pairs = [pair for some in said for pair in zip(some, some[1:])]
        mine = scores[name].double()
        gains = mine.mean((1, 2)) - ref.mean((1, 2))
        equal = gains - slope * (words[name].mean() - ref_words.mean())
        lower = mine.mean(2)[1:] < ref.mean(2)[1:] if name != "reference" else mine[1:, :, half:].mean(2) < mine[1:, :, :half].mean(2)
        print(f"{name:16s}{words[name].mean():7.1f}{sum(not some for some in said) / len(said):7.1%}{len(set(pairs)) / max(1, len(pairs)):16.1%}"
              + "".join(f"{' '.join(f'{x:+.3f}' for x in some.tolist()):>20s}" for some in (gains, equal))
              + f"{' '.join(f'{x:.0%}' for x in lower.double().mean(1).tolist()):>11s}")
    if args.perplexity:
        say_perplexity(args, names, rows)


def say_perplexity(args, names, rows):
    kept = json.loads((Path(args.out) / "run.json").read_text())["config"]
    c = train.Config(**{**train.SETTINGS, **kept, "out": args.out, "start": "evaluate"})
    with silent:
        split, _ = data.load_pairs(c.data, c.world_pairs, c.held_out, c.calibration, c.constraints, c.judge)
        tok, *_ = train.tokenize(c, split)
        pool = data.pair_pool(tok, split.evaluation[::max(1, len(split.evaluation) // args.perplexity)], "")
    print(f"\nperplexity a token of {2 * len(pool.tokens)} responses of the evaluation pairs, and the share of own responses of full length")
    for name in names:
        model = from_checkpoint(load(f"{args.out}/{name.replace(' ', '_')}.pt", "run train.py first"), c.device)
        nats = -mocan.map_pool(model, pool).sum().item() / pool.response_mask.sum().item()
        said = [row["output"] for row in rows if row["generator"] == name]
        full = sum(len(data.encode(tok, text)) + 1 >= c.max_new_tokens for text in said) / len(said)
        print(f"{name:16s}{math.exp(nats):8.2f}{full:8.1%}", flush=True)


# ---- scale
FACTORS = (1, 2, 4, 8)


class Size(NamedTuple):
    N: int
    K: int
    vocabulary: int
    width: int
    length: int  # of a prompt, and of a response

    def shape(self):
        return Shape(2, self.width, 2, self.vocabulary, self.length, self.length)


def scoring(size, device):
    model, pool = size.shape().model(device), size.shape().pool(size.N, size.K)
    return lambda: seconds(device, mocan.map_pool, model, pool)


def sampling(size, device):
    model = size.shape().model(device)
    prompts = size.shape().pool(size.N, 1).tokens[:, 0, :size.length].tolist()
    uniforms = torch.rand(size.N, size.K, size.length)
    return lambda: seconds(device, model.generate, prompts, uniforms)


def training(size, device):
    """A step of train_mocan on all K responses to all N prompts."""
    model, pool = size.shape().model(device), size.shape().pool(size.N, size.K)
    scores, logp = torch.randn(2, size.N, size.K), torch.zeros(size.N, size.K)
    sample = mocan.Sample(pool, logp, logp, scores)
    return lambda: time_steps(model, sample, size.K, 3)


def solving(size, device):
    r, g, b = problem(size, device)
    return lambda: min(seconds(device, dual.solve, r, g, b, BETA) for _ in range(5))


def evaluating(size, device):
    """A pass over the responses: how many of them a solve takes depends on the scores more than on the size."""
    prepared = dual.prepare(*problem(size, device), BETA)
    return lambda: min(seconds(device, dual.evaluate, prepared, np.ones(1)) for _ in range(5))


def problem(size, device):
    r, g = (x.to(device) for x in synthetic(size.N, size.K, 1))
    return r, g, 0.5 * dual.reachable(g)


MODELS = (Shape(6, 320, 5, 8192, 64, 64), Shape(8, 512, 8, 16384, 64, 64), Shape(12, 832, 13, 49152, 64, 64), Shape(24, 1024, 16, 49152, 64, 64))


def size_case(a, shape, dtype):
    """A step of train_mocan on 8 responses to one prompt, and sampling 8 responses: seconds, of the matrix product, peak memory."""
    pool = shape.pool(1, 8)
    tokens = shape.prompt + 8 * shape.response
    scores, logp = torch.randn(2, 1, 8), torch.zeros(1, 8)
    policy = shape.model(a.device, dtype)
    parameters = sum(p.numel() for p in policy.parameters())
    rate = max(product_rates(a.device, dtype, tokens, shape).values())
    step = min(time_steps(policy, mocan.Sample(pool, logp, logp, scores), 8, 2) for _ in range(a.repeat))
    policy.zero_grad()
    prompts, uniforms = pool.tokens[:, 0, :shape.prompt].tolist(), torch.rand(1, 8, shape.response)
    sampling = min(seconds(a.device, policy.generate, prompts, uniforms) for _ in range(a.repeat))
    needed = 3 * shape.operations(tokens, 8 * shape.response) / rate
    return {"parameters": parameters, "step": step, "share": needed / step, "tokens": 8 * shape.response / sampling,
            "memory": peak_memory("ours", shape, 4, a.device, dtype)}


def bench_sizes(a, figures):
    for dtype in dtypes(a.device):
        print(f"\na step of mocan.train_mocan on 8 responses of 64 tokens to a prompt of 64 (memory: to 4 prompts), and sampling as many; {dtype}\n"
              f"{'parameters':>11s}{'step s':>9s}{'to the last':>12s}{'of mm':>7s}{'tokens/s':>10s}  above weights, gradients and moments")
        rows = figures.setdefault("sizes", {}).setdefault(dtype, [])
        for shape in MODELS[:a.sizes]:
            rows.append(row := size_case(a, shape, dtype))
            grown = f"{row['step'] / rows[-2]['step'] / (row['parameters'] / rows[-2]['parameters']):11.2f}x" if rows[1:] else " " * 12
            print(f"{row['parameters'] / 1e6:9.1f} M{row['step']:9.2f}{grown}{row['share']:7.0%}{row['tokens']:10.0f}  "
                  f"{gigabytes(row['memory'])}", flush=True)


def bench_scale(argv):
    a = parse("scale", argv, n=(4, 1, "prompts at 1x"), k=(8, 2, "responses at 1x, even"), vocab=(4096, 2, "vocabulary at 1x"),
              width=(64, 2, "at 1x, even"), length=(32, 1, "tokens of a prompt, and of a response, at 1x"),
              dual_n=(1000, 1, "prompts of the dual at 1x"), dual_k=(128, 2, "its responses at 1x"),
              repeat=(5, 1, "runs of each, interleaved, after one that does not count"),
              sizes=(4, 0, "models of 10, 30, 135, 360 million parameters, the first so many"))
    base = Size(a.n, a.k, a.vocab, a.width, a.length)
    small = base._replace(N=a.dual_n, K=a.dual_k)
    cases = [("scoring", scoring, base, Size._fields), ("sampling", sampling, base, Size._fields),
             ("training step", training, base, Size._fields), ("dual.solve", solving, small, ("N", "K")),
             ("an evaluation of it", evaluating, small, ("N", "K"))]
    with report(a) as figures:
        print(f"2 layers, 2 heads, float32; at 1x {base}; the dual's N {small.N}, K {small.K}, m 1\n\n{'':20s}{'grows':11s}"
              f"{'ms at 1x':>9s}" + "".join(f"{f'{factor}x':>8s}" for factor in FACTORS[1:]))
        figures["base"], figures["dual_base"], figures["ratios"] = base._asdict(), small._asdict(), {}
        for name, prepare, size, dimensions in cases:
            for what in dimensions:
                sizes = {factor: size._replace(**{what: factor * getattr(size, what)}) for factor in FACTORS}
                medians = interleaved(a.repeat, {factor: prepare(x, a.device) for factor, x in sizes.items()})
                ratios = [medians[factor] / medians[1] for factor in FACTORS]
                figures["ratios"].setdefault(name, {})[what] = {"seconds": medians[1], **dict(zip(FACTORS, ratios))}
                print(f"{name:20s}{what:11s}{1e3 * medians[1]:9.2f}" + "".join(f"{x:8.2f}" for x in ratios[1:]), flush=True)
        bench_sizes(a, figures)



# ---- the picture of a finished run
def bench_picture(argv):
    parser = argparse.ArgumentParser(prog="bench.py picture")
    parser.add_argument("--out", default="out", help="folder of a finished run of `python train.py`")
    parser.add_argument("--to", default="assets/frontier.svg", help="the file to write")
    args = parser.parse_args(argv)
    try:
        results = json.loads((Path(args.out) / "results.json").read_text())
        rows, frontier = results["policies"], results["frontier"]
        safety = len(rows["reference"]["constraint_gain"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {args.out}/results.json is missing or damaged ({type(error).__name__}); run `python train.py` first")
    # with several constraints the optima at multiples of λ* are a path that the policies do not belong to
    curve = [(row["constraint_gain"][0], row["reward_gain"]) for row in frontier] if safety == 1 else []
    Path(args.to).parent.mkdir(parents=True, exist_ok=True)
    Path(args.to).write_text(svg("safety gain over the reference", curve, rows), encoding="utf-8")
    print(f"wrote {args.to}: {len(rows)} policies, {len(curve)} points of the frontier")


def svg(x_title, curve, rows):
    """A chart of the curve [(safety gain, reward gain), …], the optimum on it, and the policies with their 95 % intervals.
    Text and axes are a mid gray and the marks strong hues: it reads on light and dark pages."""
    xs = [x for x, _ in curve] + [x for row in rows.values() for x in row["constraint_gain_ci"][0]]
    ys = [y for _, y in curve] + [y for row in rows.values() for y in row["reward_gain_ci"]]
    x_low, y_low = min(xs), min(ys)
    width, height = max(xs) - x_low or 1.0, max(ys) - y_low or 1.0

    def pixel(x, y):
        return 80 + 500 * (x - x_low) / width, 380 - 330 * (y - y_low) / height

    def at(x, y):
        return "{:.1f} {:.1f}".format(*pixel(x, y))
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 440" font-size="13" '
           'font-family="sans-serif" fill="#888" stroke-linecap="round">'
           '<text x="80" y="24" font-size="16">Reward against safety: policies, and the optima of all margins (blue)</text>'
           f'<text x="330" y="428" text-anchor="middle">{x_title}</text>'
           '<text transform="translate(22 215) rotate(-90)" text-anchor="middle">reward gain over the reference</text>']
    for tick in range(6):
        x, y = x_low + tick / 5 * width, y_low + tick / 5 * height
        out.append(f'<path d="M{at(x, y_low)}v-330M{at(x_low, y)}h500" stroke="#888" stroke-opacity=".25"/>'
                   f'<text transform="translate({at(x, y_low)})" dx="-14" dy="20">{x:.2f}</text>'
                   f'<text transform="translate({at(x_low, y)})" dx="-38" dy="4">{y:.2f}</text>')
    if curve:
        line = "L".join(at(x, y) for x, y in curve)
        out.append(f'<path d="M{line}" fill="none" stroke="#3b82f6" stroke-width="2"/>')
    lines, taken = list(zip(curve, curve[1:])), []  # what labels keep off
    for row in rows.values():
        (x,), y = row["constraint_gain"][:1], row["reward_gain"]
        (left, right), (low, high) = row["constraint_gain_ci"][0], row["reward_gain_ci"]
        lines += [((left, y), (right, y)), ((x, low), (x, high))]
        taken += [(pixel(x, y)[0] + 4 * dx, pixel(x, y)[1] + 4 * dy) for dx in (-1, 1) for dy in (-1, 1)]
    for start, end in lines:
        (x, y), (u, v) = pixel(*start), pixel(*end)
        steps = 1 + int(max(abs(u - x), abs(v - y)) / 4)
        taken += [(x + (u - x) * i / steps, y + (v - y) * i / steps) for i in range(steps + 1)]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["reward_gain"]):
        color = "#3b82f6" if name == "optimum" else "#e8590c"
        x, y = row["constraint_gain"][0], row["reward_gain"]
        (left, right), (low, high) = row["constraint_gain_ci"][0], row["reward_gain_ci"]
        across, down, near = place_label(*pixel(x, y), name, taken)
        out.append(f'<path d="M{at(left, y)}L{at(right, y)}M{at(x, low)}L{at(x, high)}" stroke="{color}"/>'
                   f'<path d="M{at(x, y)}L{near}" stroke="#888" stroke-opacity=".6"/>'
                   f'<path d="M{at(x, y)}h0" stroke="{color}" stroke-width="8"/>'
                   f'<text x="{across:.1f}" y="{down + 4:.1f}" text-anchor="middle">{name}</text>')
    return "\n".join([*out, "</svg>\n"])


def place_label(x, y, text, taken):
    """The middle of the nearest spot beside a mark where its label covers no taken point, and where a line from the mark
    meets it; the label's own points are taken from then on."""
    half = 3.7 * len(text)  # of its width
    for away, turn in itertools.product(range(8, 240, 4), range(16)):
        across = x + (half + away) * math.cos(math.pi * turn / 8)
        down = y - (away + 4) * math.sin(math.pi * turn / 8)
        inside = 80 + half < across < 630 - half and 40 < down < 372
        if inside and not any(abs(u - across) < half + 3 and abs(v - down) < 9 for u, v in taken):
            break
    taken += [(across + half * i / 10, down + dy) for i in range(-10, 11) for dy in (-6, 0, 6)]
    near = min(max(x, across - half - 2), across + half + 2), min(max(y, down - 7), down + 7)
    return across, down, "{:.1f} {:.1f}".format(*near)


def main():
    commands = {"dual": bench_dual, "shots": bench_shots, "train": bench_train, "sample": bench_sample, "chat": bench_chat, "lora": bench_lora, "exact": bench_exact,
                "update": bench_update, "texts": bench_texts,
                "scale": bench_scale, "picture": bench_picture}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"{__doc__}\nusage: python tests/bench.py {{{','.join(commands)}}} [--help]")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
