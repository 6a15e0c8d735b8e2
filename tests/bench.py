"""Benchmarks, each one command: `python tests/bench.py dual`, `python tests/bench.py shots --out out`.

dual: the solver of dual.py against what one would call instead, interleaved, the median of `--repeat` runs (of one run
      for projected gradient descent). Evaluations are passes over all prompts; |grad| is the largest violation of the
      KKT conditions at the end, always computed by the same function.
shots: the MoCAN policy of a finished `python train.py`, in the built-in world with exact scores and one constraint,
      against primal-dual policy optimization from the same reference.
"""
import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else NumPy's idle threads spin on the core that the next solver needs
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import dual
import mocan
import train
from model import from_checkpoint, load, sequence_logprob


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
            problem, lam, every = dual.prepare(r, g, 1.0, 0.1, None, None), np.ones(m), torch.cat([r[None], g])
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
    c = train.Config(**{**ours["config"], "data": tuple(ours["config"]["data"]), "start": "evaluate", "out": a.out})
    if c.data or "mocan" not in ours["policies"] or len(ours["policies"]["mocan"]["lam"]) != 1:
        sys.exit("bench.py shots: needs a MoCAN run of the built-in world with one constraint")
    mocan.progress = lambda *_: lambda *_: None  # the rounds print lines of their own
    split, names = data.load_pairs(c.data, c.world_pairs, random.Random(f"{c.seed}/data"), c.held_out, c.calibration,
                                   c.constraints)
    tok = train.tokenizer_of_run(c, split.train)
    saved = {name: load(os.path.join(a.out, f"{name}.pt"), "make it with python train.py")
             for name in ("reference", "offline", "offline_scores")}
    reference, policy = (from_checkpoint(saved["reference"], c.device) for _ in range(2))
    prompts, held = data.some_prompts(split.train, c.prompts), data.some_prompts(split.evaluation, c.eval_prompts)
    offline_scores = saved["offline_scores"]["scores"]  # (2, N, K)
    ref_g = offline_scores[1].mean(dim=1)  # (N,)
    mine, best = ours["policies"]["mocan"], ours["policies"]["optimum"]
    b = mine["margin"][0]
    solving, _ = timed(dual.solve, offline_scores[0], offline_scores[1:], b, c.beta)
    generator = data.stream(c.seed, "primal-dual")

    def measure(model):
        """A mocan.Sample of the model's fresh responses to the held-out prompts."""
        return mocan.sample_from(model, reference, tok, held, train.draw(c, "evaluate", c.eval_responses),
                                 lambda pool, _: mocan.score_pool({}, names, held, pool, tok))
    ref_eval = measure(reference).scores

    G, size = c.group, max(1, 2 * c.batch // c.group)
    j, i = torch.triu_indices(G, G, 1, device=policy.device)
    lam, spent, history, order = torch.zeros(1), 0.0, [], torch.empty(0, dtype=torch.long)
    descent = mocan.Descent(policy, mocan.Recipe("primal-dual", a.rounds * a.inner, c.lr, "", c.batch, 1, c.warmup, c.clip))
    for turn in range(a.rounds):
        began = time.time()
        while len(order) < a.inner * size:  # the round's prompts; an epoch visits each once
            order = torch.cat([order, torch.randperm(len(prompts), generator=generator)])
        some, order = order[:a.inner * size], order[a.inner * size:]
        text = [prompts[n] for n in some.tolist()]
        pool, _ = mocan.sample_pool(policy, tok, text, train.draw(c, f"primal-dual/{turn}", G))
        scores = mocan.score_pool({}, names, text, pool, tok)
        if turn:  # at the first round the policy is the reference, and violates the margin by all of it
            lam = (lam + a.dual_lr * (b - (scores[1].mean() - ref_g[some].mean()).item())).clamp_min(0)
        s, ref_logp = scores[0] + lam * scores[1], mocan.logprobs(reference, pool, c.sample_batch)
        batches = data.group_batches(pool.lengths, 2 * c.batch, G, f"{c.seed}/primal-dual/{turn}")
        for _ in range(a.inner):
            n, k = next(batches)
            with policy.autocast():
                logp = sequence_logprob(policy, *data.take_text(pool, n, k, policy.device)).view(k.shape)
            ref, label = data.take(ref_logp, n, k, policy.device), data.take(s, n, k, policy.device)
            p_i = mocan.bradley_terry(label[:, i], label[:, j])
            loss = mocan.preference_loss(logp[:, i], logp[:, j], ref[:, i], ref[:, j], c.beta, p_i)
            descent.step(loss.mean())
        spent += time.time() - began
        if (turn + 1) * a.evaluations // a.rounds > turn * a.evaluations // a.rounds:
            x = measure(policy)
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
    rows += [row("primal-dual, best with gain >= 0.95 b", max(feasible))] if feasible else []
    rows += [row("primal-dual, last", history[-1])]
    rows += [("optimum of the evaluation prompts", 0, 0, 0, 0, best["reward_gain"], best["constraint_gain"][0], best["kl"])]
    print(f"\nmargin {b:.3f}\n{'':38s}{'steps':>7s}{'samples':>9s}{'updates':>9s}{'seconds':>9s}{'reward':>9s}{'gain':>8s}"
          f"{'violation':>11s}{'KL':>7s}{'reward - beta KL':>18s}")
    for name, steps, samples, updates, seconds, reward, gain, kl in rows:
        print(f"{name:38s}{steps:7d}{samples:9d}{updates:9d}{seconds:9.0f}{reward:+9.3f}{gain:+8.3f}{max(0, b - gain):11.3f}"
              f"{kl:7.3f}{reward - c.beta * kl:+18.3f}")
    tail = torch.tensor(history[len(history) // 2:])
    print(f"oscillation of primal-dual over its second half: lam {tail[:, 3].min():.3f} to {tail[:, 3].max():.3f} (one shot: "
          f"{ours['policies']['mocan']['lam'][0]:.3f}; optimum: {best['lam'][0]:.3f}), {names[1]} gain {tail[:, 1].min():+.3f} to {tail[:, 1].max():+.3f}, "
          f"reward gain {tail[:, 0].min():+.3f} to {tail[:, 0].max():+.3f}")


def main():
    commands = {"dual": bench_dual, "shots": bench_shots}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"{__doc__}\nusage: python tests/bench.py {{{','.join(commands)}}} [--help]")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
