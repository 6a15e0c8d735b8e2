"""
dual.py: λ*, and what it buys: the dual of constrained alignment, solved before any training (arXiv 2405.19544v3).

The problem is   max_π E[r] − β·KL(π‖π_ref)   subject to   E_π[g_j] − E_ref[g_j] ≥ b_j,   j = 1…m.
With h_j = g_j − E_ref[g_j] − b_j its dual is a convex function of m numbers, on K scored reference responses a prompt:

    D(λ)   = β·mean_x ln mean_y exp((r + ⟨λ,h⟩)/β),   λ ≥ 0        (dual function)
    ∇D(λ)  = E_π_λ[h],   π_λ(y|x) ∝ π_ref(y|x)·exp((r + ⟨λ,h⟩)/β)
    ∇²D(λ) = mean_x Cov_π_λ(·|x)(g)/β

PeCAN is the same function with r → ln π_r/π_ref, g → ln π_g/π_ref, β → 1, b → b/β.

    symbol       variable      shape         symbol                  variable               shape
    r(x,y)       score         (N, K)        π_λ(y|x)                p                      (n, K), n at a time
    g_j(x,y)     constraint    (m, N, K)     E_π_λ[g|x] − mean_y g   gain                   (m, N)
    b_j, λ_j     margin, lam   (m,)          D, ∇D, ∇²D              value, grad, hessian   (), (m,), (m, m)

Convergence: a step lowers the quadratic model + v·‖step‖²/(2·radius) on λ ≥ 0, with v the violation of KKT, which keeps
it within 2·radius; one that lowers D by too little of what the model promised is refused and shrinks radius, so for
convex smooth D only KKT points are limits; near λ* v vanishes, and convergence is quadratic where ∇²D is regular there.
Infeasible margins let D fall for ever. D(λ) ≥ R(λ) + mean_x min_y r − β ln K, with the recession function
R(d) = mean_x max_y ⟨d,h⟩: a λ where D is below the last two terms has R(λ) < 0, which proves infeasibility.

Error bars are clustered by prompt: ψ_x = E_π_λ[g|x] − mean_y g(x,y) contains the estimate of E_ref[g]. Those of the
gains, sd(ψ_x)/√N, answer "what will the policy trained with this λ get on new prompts?"; that of λ* is the sandwich
H⁻¹·Var(ψ)/N·H⁻¹ over the active constraints (delta method). What they leave out is finite K: a sample is never better
than its best response, so λ* comes out too large and gains too small, a constraint's by 3 % at an effective sample
size of 40, 6 % at 20, 17 % at 9; below 5 solve() warns. At β = 0.1, score spread 3, K = 128, the paper's setting,
it is near 1: best-of-K, not π_λ. `jackknife` removes 4/5 of the bias above 20, half at 9, a third at 5.

Differs from the paper and its published code: Newton for m ≥ 1 where they run projected gradient descent for m = 1;
log-mean-exp per prompt everywhere (the code pools prompts in two places); infeasibility raises with a proof, and
a failure to converge raises too, where they return None.

Read next: mocan.py, where λ* labels the pairs.
"""
import argparse
import json
import sys

import numpy as np
import torch
# From here down to the end of solve() the text also runs alone, pasted below `import torch`.
import warnings
from typing import NamedTuple


class Infeasible(ValueError):
    """No policy on these samples meets the margins. `direction` d ≥ 0 is the proof: mean_x max_y ⟨d,h⟩ < 0."""

    def __init__(self, margin, direction, reachable):
        joint = " jointly" * bool((margin <= reachable).all())
        super().__init__(f"margin {margin.tolist()} is{joint} out of reach on these samples: the largest reachable"
                         f"{' alone' * (len(margin) > 1)} is {reachable.tolist()}; lower the margin or sample more "
                         "responses per prompt")
        self.direction, self.reachable = direction / direction.sum(), reachable  # (m,), (m,)


class Dual(NamedTuple):
    """λ*, how sure it is, and what the policy trained with it will get."""
    lam: torch.Tensor  # (m,) λ* ≥ 0
    lam_se: torch.Tensor  # (m,) its standard error, 0 where inactive; if collinear, of what is determined
    value: float  # D(λ*)
    grad: torch.Tensor  # (m,) E_π_λ[h]: 0 where λ* > 0, else ≥ 0
    hessian: torch.Tensor  # (m, m)
    iterations: int  # evaluations of (D, grad, hessian) on all prompts
    score_gain: float  # E_π_λ[r] − E_ref[r]
    score_gain_se: float
    constraint_gain: torch.Tensor  # (m,) E_π_λ[g] − E_ref[g]
    constraint_gain_se: torch.Tensor  # (m,)
    ref: torch.Tensor  # (m,) E_ref[g]
    ref_se: torch.Tensor  # (m,)
    reachable: torch.Tensor  # (m,) largest margin of each constraint alone
    kl: float  # KL(π_λ‖π_ref), mean over prompts
    ess: float  # effective sample size 1/Σ_y π_λ(y)², mean over prompts
    ess_p5: float  # its 5th percentile over prompts of weight > 0
    top_weight: float  # weight of the single best response, mean over prompts


class Problem(NamedTuple):
    """Checked input; some of its prompts are a Problem again."""
    score: torch.Tensor  # (N, K)
    constraint: torch.Tensor  # (m, N, K)
    weight: torch.Tensor  # (N,), sums to 1
    log_count: torch.Tensor  # (N,), ln of the number of responses
    mean: torch.Tensor  # (1+m, N), over responses, of score and constraints
    top: torch.Tensor  # (1+m,), mean_x (max_y - mean_y) of both
    width: torch.Tensor  # (1+m,), mean_x (max_y - min_y) of both
    buffer: torch.Tensor  # (1+m, n, K) float64, for n prompts at a time


def prepare(score, constraint, mask, prompt_weight):
    """Check the input and take its means and ends over responses; ValueError in one line."""
    score = torch.as_tensor(score).detach()
    constraint = torch.as_tensor(constraint).detach().to(score.device)
    constraint = constraint if constraint.ndim == 3 else constraint[None]  # (m, N, K)
    if score.ndim != 2 or constraint.ndim != 3 or constraint.shape[1:] != score.shape or constraint.numel() == 0:
        raise ValueError(f"score has shape {tuple(score.shape)} and constraint {tuple(constraint.shape)}: they must "
                         "be (N, K) and (N, K) or (m, N, K) with N, K, m >= 1")
    (m, N, K), like = constraint.shape, {"dtype": torch.float64, "device": score.device}
    weight = torch.ones(N, **like) if prompt_weight is None else torch.as_tensor(prompt_weight, **like)
    if weight.shape != (N,) or not (weight >= 0).all() or not 0 < float(weight.sum()) < float("inf"):
        raise ValueError(f"prompt_weight {tuple(weight.shape)}, sum {weight.sum():.3g}: give {N} numbers >= 0, sum > 0")
    count, exists = torch.full((N,), K, **like), None
    if mask is not None:  # a missing response becomes a copy of the prompt's first one, and weighs nothing
        exists = torch.as_tensor(mask, device=score.device).bool()
        if exists.shape != (N, K) or not exists.any(dim=1).all():
            raise ValueError(f"mask has shape {tuple(exists.shape)}: it must be {(N, K)}, with a True in every row")
        count, first = exists.sum(dim=1, dtype=torch.float64), exists.int().argmax(dim=1, keepdim=True)  # (N,), (N, 1)
        score = torch.where(exists, score, score.gather(1, first))
        constraint = torch.where(exists, constraint, constraint.gather(2, first.expand(m, N, 1)))
    n = min(N, max(1, (2 ** 24 if score.is_cuda else 2 ** 16 * torch.get_num_threads()) // K))  # planes stay in cache
    ends = []
    for i in range(0, N, n):
        for x in (score[None, i:i + n].double(), constraint[:, i:i + n].double()):
            ends += (x if mask is None else x * exists[i:i + n]).sum(dim=2), x.amin(dim=2), x.amax(dim=2)
    ends = [torch.cat([torch.cat(ends[j::6], dim=1), torch.cat(ends[j + 3::6], dim=1)]) for j in range(3)]
    mean, low, high = ends[0] / count, ends[1], ends[2]  # (1+m, N) each
    if not mean.isfinite().all():
        j, row = divmod(int((~mean.isfinite()).flatten().int().argmax()), N)
        name = f"constraint {j - 1}" if j else "score"
        raise ValueError(f"{name} has a NaN or inf at prompt {row}: mask or repair it")
    if mask is not None:
        score = score.double().masked_fill_(~exists, -1e300)  # finite: 0 * -1e300 is not NaN
    weight = weight / weight.sum()
    return Problem(score, constraint, weight, count.log(), mean, ((high - mean) @ weight).cpu(),
                   ((high - low) @ weight).cpu(), torch.empty(1 + m, n, K, **like))


def evaluate(problem, lam, margin, beta, detail=False):
    """D(λ) − E_ref[r] (solve adds it back), ∇D, ∇²D, and the rows they are made of, one column a prompt."""
    n, second, parts, ref = problem.buffer.shape[1], 0, [], problem.mean @ problem.weight  # ref: E_ref[r], E_ref[g]
    for i in range(0, len(problem.score), n):
        r, g = problem.score[i:i + n].double(), problem.constraint[:, i:i + n].double()  # (n, K), (m, n, K)
        p, pg = problem.buffer[0, :len(r)], problem.buffer[1:, :len(r)]
        torch.addmv(r.reshape(-1), g.flatten(1).T, (lam / beta).to(p), beta=1 / beta, out=p.view(-1))
        top = p.amax(dim=1)  # (n,) of p, here still (r + ⟨λ,g⟩)/β
        total = p.sub_(top[:, None]).exp_().sum(dim=1)
        p.mul_((problem.weight[i:i + n] / total)[:, None])  # π_λ(y|x), times the prompt's weight
        gain = torch.sub(g, problem.mean[1:, i:i + n, None], out=pg).mul_(p).sum(dim=2)  # (m, n), w·(E_π_λ g − mean g)
        second = second + torch.bmm(pg.transpose(0, 1), g.permute(1, 2, 0)).sum(dim=0)  # (m, m)
        part = [gain, (top + total.log())[None], 1 / total[None]]
        if detail:  # weight·E_π_λ[r|x] and weight²·Σ_y π_λ(y|x)²
            part += torch.mul(p, r, out=pg[0]).sum(dim=1)[None], p.square().sum(dim=1)[None]
        parts.append(torch.cat(part))
    rows, m = torch.cat(parts, dim=1), len(lam)  # (m+2 or m+4, N): gains, ln Σ_y exp, top weight [, E[r], Σ π²]
    gain = rows[:m] / problem.weight.clamp_min(1e-300)  # (m, N)
    value = beta * float((rows[m] - problem.log_count) @ problem.weight) - float(ref[0])  # still with ⟨λ,g⟩ for ⟨λ,h⟩
    hessian = (second - rows[:m] @ (problem.mean[1:] + gain).T) / beta  # ∇²D = mean_x Cov_π_λ(g)/β
    return value - float(lam @ (margin + ref[1:].cpu())), rows[:m].sum(dim=1).cpu() - margin, hessian.cpu(), rows


def model_step(x, grad, hessian, damp):
    """x + e ≥ 0 that lowers ⟨grad,e⟩ + ⟨e,(hessian + damp)e⟩/2: go towards the minimum over the free entries, pin the
    first that meets its bound, and so on, down to the minimum on the face where this ends. For m = 1 the argmin."""
    h = hessian + torch.diag(damp + 1e-13 * hessian.diagonal() + 1e-200)  # collinear constraints make it singular
    free, pinned, y = (x > 0) | (grad < 0), torch.eye(len(x), dtype=x.dtype), x
    while True:
        end = x + torch.linalg.solve(torch.where(free[:, None], h, pinned), torch.where(free, -grad, -x))
        over = free & (end < 0)
        if not over.any():
            return torch.where(free, end, 0.0)
        meet = torch.where(over, y / (y - end), 2.0)  # how far along the path each meets its bound
        y, free = y + meet.min() * (end - y), free & (meet > meet.min())


def newton(problem, lam, margin, beta, limit, tolerance):
    """Minimise D over λ ≥ 0 by regularised Newton: (λ, evaluate() there, evaluations, whether KKT holds)."""
    size, spread = problem.mean.abs().amax(dim=1).cpu() + problem.width, float(problem.width[0])
    level = size[1:] + margin.abs()  # (m,), size of the numbers that h_j is a difference of
    width = (problem.width[1:] + margin.abs() + 1e-12 * size[1:]).clamp_min(1e-100)  # (m,), natural unit of h_j
    state, count, radius = evaluate(problem, lam, margin, beta), 1, 8 * (spread + beta)
    while True:
        value, grad, hessian, _ = state
        grad = torch.where(grad.abs() <= 1e-15 * level, 0.0, grad)  # rounding has no direction
        noise = 2e-15 * (float(size[0]) + 4 * beta + float(lam @ level))  # rounding of r + ⟨λ,h⟩, hence of D
        low = float(problem.top[0]) - spread - beta * float(problem.log_count.max())  # min r − E_ref[r] − β ln K
        if value < low - noise:  # D(λ) − E_ref[r] ≥ R(λ) + low, hence R(λ) < 0
            raise Infeasible(margin, lam, problem.top[1:])
        wrong = torch.where(lam > 0, grad, grad.clamp_max(0)).abs() / width  # (m,), violation of KKT
        done = bool((wrong <= tolerance + min(noise / beta, 1e-8)).all())  # noise grows with λ
        if done or count == limit:
            return lam, state, count, done
        damp = float(wrong.norm()) / radius + 1e-15 / beta  # keeps the step, in units of r, below radius
        x = lam * width  # in units of r
        new = model_step(x, grad / width, hessian / (width[:, None] * width), damp) / width
        e = new - lam
        promised, length = -float(grad @ e + e @ hessian @ e / 2), float((e * width).norm())
        trial, count = evaluate(problem, new, margin, beta, detail=promised < 1e-8 * beta), count + 1
        drop = value - trial[0]
        if drop < 1e-3 * abs(promised) - noise:
            radius = length / 5
        else:
            lam, state, radius = new, trial, radius if drop < 0.7 * promised else max(radius, 8 * length)


def solve(score, constraint, margin, beta, *, mask=None, prompt_weight=None, start=None):
    """λ* and its predictions from score (N, K), constraint (N, K) or (m, N, K), margin (float or (m,)) and beta.

    mask (N, K): True where a response exists. prompt_weight (N,): relative weights of independent prompts, not counts.
    start (m,): a guess of λ*, e.g. at a near margin.
    Raises Infeasible with a certificate when no policy on these samples meets the margins.
    """
    problem, beta = prepare(score, constraint, mask, prompt_weight), float(beta)
    (m, N, K), margin = problem.constraint.shape, torch.as_tensor(margin, dtype=torch.float64).flatten().cpu()
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}: it must be a finite number above 0")
    if len(margin) not in (1, m) or not margin.isfinite().all():
        raise ValueError(f"margin is {margin.tolist()}: give one finite number, or one for each of {m} constraints")
    margin, lam = margin.expand(m), torch.zeros(m, dtype=torch.float64)
    over = (margin - problem.top[1:] > 1e-14 * problem.mean[1:].abs().amax(dim=1).cpu()).double()
    if over.any():  # R of those axes is top - margin < 0
        raise Infeasible(margin, over, problem.top[1:])
    if start is not None:
        lam = torch.as_tensor(start, dtype=torch.float64).flatten().cpu()
        if len(lam) not in (1, m) or not lam.isfinite().all():
            raise ValueError(f"start is {lam.tolist()}: give one finite number, or one for each of {m} constraints")
        lam = lam.expand(m).clamp_min(0)
    for stride in (64, 8):  # cold start: approach λ* on every 64th, then every 8th prompt
        weight = problem.weight[::stride]
        if start is None and len(weight) >= 64 and weight.sum() > 0:
            some = problem._replace(score=problem.score[::stride], constraint=problem.constraint[:, ::stride],
                                    weight=weight / weight.sum(), log_count=problem.log_count[::stride],
                                    mean=problem.mean[:, ::stride])
            try:
                lam = newton(some, lam, margin, beta, 40, 0.01)[0]
            except Infeasible:  # of those prompts: the full problem decides
                break
    lam, state, iterations, done = newton(problem, lam, margin, beta, 40, 3e-11)
    heat = 1.0
    while not done and heat * beta < problem.width[0]:
        heat *= 4
    while not done and heat >= 1:  # D is nearly piecewise linear: follow λ* from a large β down to this one
        lam, state, count, done = newton(problem, lam, margin, beta * heat, 400, 3e-11 if heat == 1 else 1e-6)
        iterations, done, heat = iterations + count, done and heat == 1, heat / 4
    if not done:
        raise RuntimeError(f"no convergence at margin {margin.tolist()}, beta {beta}: gradient {state[1].tolist()} "
                           f"at lam {lam.tolist()} after {iterations} evaluations; use a larger beta")
    if len(state[3]) == m + 2:
        state, iterations = evaluate(problem, lam, margin, beta, detail=True), iterations + 1
    (value, grad, hessian, rows), w, put = state, problem.weight, problem.score.device
    tiny = w.clamp_min(1e-300)  # rows carry the prompts' weights
    gain, r_gain, ess = rows[:m] / tiny, rows[m + 2] / tiny - problem.mean[0], w * tiny / rows[m + 3].clamp_min(1e-300)
    psi = torch.cat([r_gain[None], gain, problem.mean[1:]])  # (1+2m, N), what the gains and E_ref[g] average
    mean = psi @ w
    kl = (float(mean[0]) + float(lam @ grad) - value) / beta  # E_π_λ[ln π_λ/π_ref]
    spread = w * (psi - mean[:, None])
    cov = (spread @ spread.T / (1 - w @ w)).cpu()  # (1+2m, 1+2m), of the averages; equal weights: 1 - 1/N
    se, on, lam_se = cov.diagonal().sqrt(), lam > 0, torch.zeros_like(lam)
    inverse = torch.linalg.pinv(hessian[on][:, on], hermitian=True)
    lam_se[on] = (inverse @ cov[1:1 + m, 1:1 + m][on][:, on] @ inverse).diagonal().sqrt()  # sandwich
    if float(ess @ w) < 5 < K:
        warnings.warn(f"effective sample size {float(ess @ w):.1f} of {K} responses per prompt: gains come out too "
                      "small, lam* too large; sample more of them, raise beta or lower the margin", stacklevel=2)
    return Dual(lam.to(put), lam_se.to(put), value + float(problem.mean[0] @ w), grad.to(put), hessian.to(put),
                iterations, float(mean[0]), float(se[0]), (grad + margin).to(put), se[1:1 + m].to(put), mean[1 + m:],
                se[1 + m:].to(put), problem.top[1:].to(put), max(0.0, kl), float(ess @ w),
                float(ess[w > 0].quantile(0.05)), float(rows[m + 1] @ w))


def reachable(constraint, mask=None, prompt_weight=None):
    """The largest reachable margin of each constraint alone, (m,): mean_x max_y g_j − E_ref[g_j]."""
    g = torch.as_tensor(constraint)
    return prepare(torch.zeros((), device=g.device).expand(g.shape[-2:]), g, mask, prompt_weight).top[1:].to(g.device)


def sweep(score, constraint, margins, beta, *, mask=None, prompt_weight=None):
    """A trade-off curve: the Dual of each margin, each started from the one before."""
    duals = []
    for margin in margins:
        duals.append(solve(score, constraint, margin, beta, mask=mask, prompt_weight=prompt_weight,
                           start=duals[-1].lam if duals else None))
    return duals


def margin_of(score, constraint, lam, beta, *, mask=None, prompt_weight=None):
    """The inverse question: the margins (m,) that λ belongs to, E_π_λ[g] − E_ref[g], in one evaluation."""
    problem = prepare(score, constraint, mask, prompt_weight)
    lam = torch.as_tensor(lam, dtype=torch.float64).flatten().cpu().expand(len(problem.constraint))
    if not (lam >= 0).all() or not lam.isfinite().all() or not 0 < beta < float("inf"):
        raise ValueError(f"lam is {lam.tolist()}, beta {beta}: they must be finite, lam >= 0 and beta > 0")
    return evaluate(problem, lam, torch.zeros_like(lam), float(beta))[1].to(problem.score.device)


def jackknife(score, constraint, lam, beta, *, mask=None, prompt_weight=None):
    """Gains at λ (1+m,), score first, with less bias of finite K: K·θ − (K−1)·mean_k θ_without_k."""
    problem, total = prepare(score, constraint, mask, prompt_weight), 0
    slope = torch.as_tensor(lam, dtype=torch.float64, device=problem.score.device).flatten()
    chunk = problem.buffer.shape[1]
    for i in range(0, len(problem.score), chunk):
        rows = slice(i, i + chunk)
        r, g = problem.score[rows].double(), problem.constraint[:, rows].double()
        z, exists = (r + torch.tensordot(slope, g, dims=1)) / beta, r > -1e300
        p, best = z.softmax(dim=1), z.argmax(dim=1, keepdim=True)
        x = torch.cat([torch.where(exists, r, 0.0)[None], g]) - problem.mean[:, rows, None]  # (1+m, n, K)
        theta, count = (p * x).sum(dim=2, keepdim=True), problem.log_count[rows].exp()  # (1+m, n, 1), (n,)
        others = (z.scatter(1, best, -1.7e308).softmax(dim=1) * x).sum(dim=2, keepdim=True)  # 1 - p cancels there
        rest = ((theta - p * x) / (1 - p)).scatter(2, best.expand(len(x), -1, 1), others)
        rest = torch.where(exists, rest, 0.0).sum(dim=2) / count  # (1+m, n)
        total = total + (count * theta[..., 0] - (count - 1) * rest) @ problem.weight[rows]  # (1+m,)
    return total


def load(path, beta):
    """(score, constraint, beta, unit, rest) of an npz. PeCAN's log-ratios: beta 1, and gains in units of beta."""
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    rest = {name: data.get(name) for name in ("mask", "prompt_weight")}
    if {"score", "constraint"} <= data.keys():
        return data["score"], data["constraint"], beta, 1.0, rest
    if {"ref_logp", "logp_r", "logp_g"} <= data.keys():
        return data["logp_r"] - data["ref_logp"], data["logp_g"] - data["ref_logp"], 1.0, beta, rest
    raise ValueError(f"{path} holds {sorted(data)}: it needs score and constraint, or ref_logp, logp_r and logp_g")


def report(args):
    """Everything the command line prints."""
    if not 0 < args.beta < float("inf"):
        raise ValueError(f"--beta is {args.beta}: it must be a finite number above 0")
    score, constraint, beta, unit, rest = load(args.scores, args.beta)
    top, words, shares = reachable(constraint, **rest).tolist(), args.margin.split(","), (1.0, 0.75, 0.5, 0.25)
    words = words * len(top) if len(words) == 1 else words
    try:
        margin = torch.tensor([float(w[:-1]) / 100 * top[j % len(top)] if w.endswith("%") else float(w) / unit
                               for j, w in enumerate(words)], dtype=torch.float64)
    except ValueError:
        raise ValueError(f"--margin is {args.margin}: give numbers such as 0.5, or percentages such as 50%") from None
    with warnings.catch_warnings(record=True) as notes:
        curve = sweep(score, constraint, [share * margin for share in shares], beta, **rest)
    for note in notes[:1]:
        print(f"dual.py: warning: {note.message}", file=sys.stderr)
    wide = "value score_gain score_gain_se constraint_gain constraint_gain_se grad hessian ref ref_se reachable".split()
    d = curve[0]._replace(**{name: unit * getattr(curve[0], name) for name in wide})
    if args.json:
        fields = {name: x.tolist() if torch.is_tensor(x) else x for name, x in d._asdict().items()}
        fields = {"margin": (unit * margin).tolist(), "beta": args.beta, **fields}
        return print(json.dumps(fields).replace("NaN", "null"))
    print(f"{score.shape[0]} prompts x {score.shape[1]} responses, beta {args.beta:g}; +-: 95% interval over prompts")
    for j, b in enumerate((unit * margin).tolist()):
        print(f"constraint {j}: margin {b:.4f} of at most {d.reachable[j]:.4f}   lam* {d.lam[j]:.4f} +- "
              f"{1.96 * d.lam_se[j]:.4f}   gain {d.constraint_gain[j]:.4f} +- {1.96 * d.constraint_gain_se[j]:.4f}")
    print(f"score gain {d.score_gain:.4f} +- {1.96 * d.score_gain_se:.4f}   KL {d.kl:.4f} nats   effective sample size "
          f"{d.ess:.1f}, 5th percentile {d.ess_p5:.1f}, top weight {d.top_weight:.2f}")
    fixed = " ".join(f"{unit * x:.4f}" for x in jackknife(score, constraint, d.lam, beta, **rest).tolist())
    print(f"score gain, constraint gain at this lam* with less of the bias of finite K (jackknife): {fixed}")
    print("\nshare of the margin, margin, lam*, score gain, KL, effective sample size")
    for share, row in zip(shares, curve):
        print(f"{share:5.0%}  {' '.join(f'{b:8.4f}' for b in share * unit * margin)}  "
              f"{' '.join(f'{x:8.4f}' for x in row.lam)}  {unit * row.score_gain:8.4f}  {row.kl:7.4f}  {row.ess:7.1f}")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="lambda* and what it buys, before any training")
    parser.add_argument("scores", help="npz: score (N, K) and constraint (N, K) or (m, N, K), or PeCAN's ref_logp, "
                        "logp_r, logp_g (N, K); optional mask (N, K), prompt_weight (N,)")
    parser.add_argument("--margin", required=True, help="least gain in g: 0.5, or 50%% of the largest reachable one; "
                        "one for all constraints, or comma separated")
    parser.add_argument("--beta", type=float, required=True, help="strength of the KL term")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    try:
        report(parser.parse_args())
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"dual.py: error: {error}")


if __name__ == "__main__":
    main()
