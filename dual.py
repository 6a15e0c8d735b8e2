"""
dual.py: λ*, and what it buys: the dual of constrained alignment, solved before any training (arXiv 2405.19544v3).

The problem is   max_π E[r] − β·KL(π‖π_ref)   subject to   E_π[g_j] − E_ref[g_j] ≥ b_j,   j = 1…m.
With h_j = g_j − E_ref[g_j] − b_j its dual is a convex function of m numbers, on K scored reference responses a prompt:

    D(λ)   = β·mean_x ln mean_y exp((r + ⟨λ,h⟩)/β),   λ ≥ 0        (dual function)
    ∇D(λ)  = E_π_λ[h],   π_λ(y|x) ∝ π_ref(y|x)·exp((r + ⟨λ,h⟩)/β)
    ∇²D(λ) = mean_x Cov_π_λ(·|x)(g)/β

PeCAN is the same function with r → ln π_r/π_ref, g → ln π_g/π_ref, β → 1, b → b/β; or, in the units of r and g, with
r → β·ln π_r/π_ref, g → β·ln π_g/π_ref.

    symbol       variable      shape         symbol                  variable               shape
    r(x,y)       score         (N, K)        π_λ(y|x)                p / total              (n, K), n at a time
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
log-mean-exp per prompt everywhere (the code pools prompts twice); exceptions where they return None.

Read next: mocan.py, where λ* labels the pairs.
"""
import argparse
import json
import sys

import torch
# From here down to the end of solve() the text also runs alone, pasted below `import torch`.
import warnings
from typing import NamedTuple

import numpy as np  # for what has m entries: a fifth of torch's overhead


class Infeasible(ValueError):
    """No policy on these samples meets the margins. `direction` d ≥ 0 is the proof: mean_x max_y ⟨d,h⟩ < 0."""

    def __init__(self, margin, direction, reachable):
        super().__init__(f"margin {margin.tolist()} is{' jointly' * bool((margin <= reachable).all())} out of reach on "
                         f"these samples: the largest reachable{' alone' * (len(margin) > 1)} is {reachable.tolist()}; "
                         "lower the margin or sample more responses per prompt")
        self.direction, self.reachable = (torch.from_numpy(x) for x in (direction / direction.sum(), reachable))  # (m,)


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
    """Checked input. Some of its prompts with the whole's top, width and size serve for a start, not for a proof."""
    score: torch.Tensor  # (N, K)
    constraint: torch.Tensor  # (m, N, K)
    weight: torch.Tensor  # (N,), sums to 1
    log_count: torch.Tensor  # (N,), ln of the number of responses
    mean: torch.Tensor  # (1+m, N), over responses, of score and constraints
    top: np.ndarray  # (1+m,), mean_x (max_y - mean_y) of both
    width: np.ndarray  # (1+m,), mean_x (max_y - min_y) of both
    size: np.ndarray  # (1+m,), max_x |mean_y| + width of both
    buffer: torch.Tensor  # (1+m, n, K) float64, for n prompts at a time


@torch.inference_mode()
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
    weight, count, exists = weight / weight.sum(), torch.full((N,), K, **like), None
    if mask is not None:  # a missing response becomes a copy of the prompt's first one, and weighs nothing
        exists = torch.as_tensor(mask, device=score.device).bool()
        if exists.shape != (N, K) or not exists.any(dim=1).all():
            raise ValueError(f"mask has shape {tuple(exists.shape)}: it must be {(N, K)}, with a True in every row")
        count, first = exists.sum(dim=1, dtype=torch.float64), exists.int().argmax(dim=1, keepdim=True)  # (N,), (N, 1)
        score = torch.where(exists, score, score.gather(1, first))
        constraint = torch.where(exists, constraint, constraint.gather(2, first.expand(m, N, 1)))
    n = min(N, max(1, (2 ** 24 if score.is_cuda else 2 ** 17 * torch.get_num_threads()) // K))  # planes stay in cache
    ends = []
    for i in range(0, N, n):
        for x in (score[None, i:i + n].double(), constraint[:, i:i + n].double()):
            ends += (x if mask is None else x * exists[i:i + n]).sum(dim=2), x.amin(dim=2), x.amax(dim=2)
    ends = [torch.cat([torch.cat(ends[j::6], dim=1), torch.cat(ends[j + 3::6], dim=1)]) for j in range(3)]
    mean, low, high = ends[0] / count, ends[1], ends[2]  # (1+m, N) each
    if not mean.isfinite().all():
        j, row = divmod(int((~mean.isfinite()).flatten().int().argmax()), N)
        raise ValueError(f"{f'constraint {j - 1}' if j else 'score'}: NaN or inf at prompt {row}; mask or repair it")
    if mask is not None:
        score = score.double().masked_fill_(~exists, -1e300)  # finite: 0 * -1e300 is not NaN
    top, width = ((high - mean) @ weight).cpu(), ((high - low) @ weight).cpu()
    size = mean[:, weight > 0].abs().amax(dim=1).cpu()
    return Problem(score, constraint, weight, count.log(), mean, top.numpy(), width.numpy(), (size + width).numpy(),
                   torch.empty(1 + m, n, K, **like))


def vector(name, x, m):
    """One finite number, or m -> (m,) float64."""
    x = torch.as_tensor(x, dtype=torch.float64).flatten().cpu().numpy()
    if len(x) not in (1, m) or not np.isfinite(x).all():
        raise ValueError(f"{name} is {x.tolist()}: give one finite number, or one for each of {m} constraints")
    return x * np.ones(m)


@torch.inference_mode()
def evaluate(problem, lam, margin, beta, detail=False):
    """D(λ) − E_ref[r] (solve adds it back), ∇D, ∇²D, and the rows they are made of, one column a prompt."""
    score, constraint, weight, log_count, mean, *_, buffer = problem
    m, n, second, rows, ref = len(lam), buffer.shape[1], 0, [], (mean @ weight).cpu().numpy()  # ref: E_ref[r], E_ref[g]
    unit = beta * (ln2 := 0.6931471805599453)  # exp(x/β) = 2^(x/unit), and exp2 is twice as fast as exp
    for r, g, w, mean_g in zip(score.split(n), constraint.split(n, 1), weight.split(n), mean[1:].split(n, 1)):
        r, g, p, pg = r.double(), g.double(), buffer[0, :len(r)], buffer[1:, :len(r)]  # (n, K), (m, n, K), again
        torch.mul(r, 1 / unit, out=p)
        for slope, x in zip((lam / unit).tolist(), g):
            p.add_(x, alpha=slope)  # at the end (r + ⟨λ,g⟩)/unit
        top = p.amax(dim=1, keepdim=True)  # (n, 1)
        total = p.sub_(top).exp2_().sum(dim=1)  # (n,), p = π_λ(y|x)·total, whose largest is 1
        gain = torch.sub(g, mean_g[:, :, None], out=pg).mul_(p).sum(dim=2).div_(total)  # (m, n), E_π_λ[g|x] − mean_y g
        second = second + (w / total) @ torch.bmm(pg.transpose(0, 1), g.permute(1, 2, 0)).flatten(1)  # (m²,)
        rows.append([gain, total.log().add_(top[:, 0], alpha=ln2)[None]])  # ln Σ_y exp((r + ⟨λ,g⟩)/β)
        if detail:  # max_y π_λ, E_π_λ[r|x], Σ_y π_λ²
            rows[-1] += [total[None] ** -1, (torch.mul(p, r, out=pg[0]).sum(dim=1) / total)[None],
                         (p.square_().sum(dim=1) / total.square())[None]]
    rows = torch.cat([torch.cat(x) for x in rows], dim=1)  # (m+1, N): gain, ln Z; detail: max π_λ, E r, Σ π_λ²
    mean_row = (rows[:m + 1] @ weight).cpu().numpy()
    hessian = (second.view(m, m) - (rows[:m] * weight) @ (mean[1:] + rows[:m]).T) / beta  # ∇²D = mean_x Cov_π_λ(g)/β
    value = beta * (mean_row[m] - float(log_count @ weight)) - ref[0] - lam @ (margin + ref[1:])
    return value, mean_row[:m] - margin, hessian.cpu().numpy(), rows


def model_step(x, grad, hessian, damp):
    """x + e ≥ 0 that lowers ⟨grad,e⟩ + ⟨e,(hessian + damp)e⟩/2: go towards the minimum over the free entries, pin the
    first that meets its bound, and so on, down to the minimum on the face where this ends. For m = 1 the argmin."""
    h = hessian + np.diag(damp + 1e-13 * hessian.diagonal() + 1e-200)  # collinear constraints make it singular
    free, pinned, y = (x > 0) | (grad < 0), np.eye(len(x)), x
    while True:
        end = x + np.linalg.solve(np.where(free[:, None], h, pinned), np.where(free, -grad, -x))
        over = free & (end < 0)
        if not over.any():
            return np.where(free, end, 0.0)
        meet = np.divide(y, y - end, out=np.full_like(y, 2.0), where=over)  # where on the path each meets its bound
        y, free = y + meet.min() * (end - y), free & (meet > meet.min())


def newton(problem, lam, margin, beta, limit, tolerance):
    """Minimise D over λ ≥ 0 by regularised Newton: (λ, evaluate() there, evaluations, whether KKT holds)."""
    spread, level = problem.width[0], problem.size[1:] + abs(margin)  # level (m,): h_j is a difference of such numbers
    width = np.maximum(problem.width[1:] + abs(margin) + 1e-12 * problem.size[1:], 1e-100)  # (m,), natural unit of h_j
    low = problem.top[0] - spread - beta * float(problem.log_count.max())  # min r − E_ref[r] − β ln K
    state, count, radius = evaluate(problem, lam, margin, beta), 1, 8 * (spread + beta)
    while True:
        value, grad, hessian, _ = state
        grad = np.where(abs(grad) <= 1e-15 * level, 0.0, grad)  # rounding has no direction
        noise = 2e-15 * (problem.size[0] + 4 * beta + lam @ level)  # rounding of r + ⟨λ,h⟩, hence of D
        if value < low - noise:  # D(λ) − E_ref[r] ≥ R(λ) + low, hence R(λ) < 0
            raise Infeasible(margin, lam, problem.top[1:])
        wrong = abs(np.where(lam > 0, grad, np.minimum(grad, 0))) / width  # (m,), violation of KKT
        done = bool((wrong <= tolerance + min(noise / beta, 1e-8)).all())  # noise grows with λ
        if done or count == limit:
            return lam, state, count, done
        damp = np.linalg.norm(wrong) / radius + 1e-15 / beta  # keeps the step, in units of r, below 2·radius
        new = model_step(lam * width, grad / width, hessian / (width[:, None] * width), damp) / width
        e = new - lam
        promised, length = -(grad @ e + e @ hessian @ e / 2), np.linalg.norm(e * width)
        trial, count = evaluate(problem, new, margin, beta, detail=promised < 1e-8 * beta), count + 1
        drop = value - trial[0]
        if not drop >= 1e-3 * abs(promised) - noise:  # or NaN
            radius = length / 5
        else:
            lam, state, radius = new, trial, radius if drop < 0.7 * promised else max(radius, 8 * length)


def solve(score, constraint, margin, beta, *, mask=None, prompt_weight=None, start=None):
    """λ* and its predictions from score (N, K), constraint (N, K) or (m, N, K), margin (float or (m,)) and beta.

    mask (N, K): True where a response exists. prompt_weight (N,): relative weights of independent prompts, not counts.
    start (m,): a guess of λ*, e.g. at a near margin.
    Raises Infeasible with a certificate when no policy on these samples meets the margins, FloatingPointError without
    convergence, ValueError on bad input.
    """
    problem, beta = prepare(score, constraint, mask, prompt_weight), float(beta)
    m, K = len(problem.constraint), float(problem.log_count.exp() @ problem.weight)  # K: responses a prompt
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}: it must be a finite number above 0")
    margin = vector("margin", margin, m)
    lam = np.zeros(m) if start is None else np.maximum(vector("start", start, m), 0)
    over = 1.0 * (margin - problem.top[1:] > 1e-14 * problem.size[1:])
    if over.any():  # R of those axes is top - margin < 0
        raise Infeasible(margin, over, problem.top[1:])
    for stride in (64, 8):  # cold start: approach λ* on every 64th, then every 8th prompt
        weight = problem.weight[::stride]
        if start is None and len(weight) >= 64 and weight.sum() > 0:
            some = problem._replace(
                score=problem.score[::stride].contiguous(), constraint=problem.constraint[:, ::stride].contiguous(),
                weight=weight / weight.sum(), log_count=problem.log_count[::stride], mean=problem.mean[:, ::stride])
            try:
                lam = newton(some, lam, margin, beta, 40, 0.01)[0]
            except Infeasible:  # of those prompts: the full problem decides
                break
    lam, state, iterations, done = newton(problem, lam, margin, beta, 40, 3e-11)
    heat = 4 ** np.ceil(np.log2(max(1.0, problem.width[0] / beta)) / 2)  # least power of 4 above spread/β
    while not done and heat >= 1:  # D is nearly piecewise linear: follow λ* from a large β down to this one
        lam, state, count, done = newton(problem, lam, margin, beta * heat, 400, 3e-11 if heat == 1 else 1e-6)
        iterations, done, heat = iterations + count, done and heat == 1, heat / 4 if done else 0
    if not done:
        raise FloatingPointError(f"no convergence: margin {margin.tolist()}, beta {beta}: gradient {state[1].tolist()}"
                                 f" at lam {lam.tolist()} after {iterations} evaluations; use a larger beta")
    if len(state[3]) == m + 1:
        state, iterations = evaluate(problem, lam, margin, beta, detail=True), iterations + 1
    (value, grad, hessian, rows), w = state, problem.weight
    psi, ess = torch.cat([rows[m + 2:m + 3] - problem.mean[:1], rows[:m], problem.mean[1:]]), 1 / rows[m + 3]  # (N,)
    mean = psi @ w  # (1+2m,), the gains and E_ref[g]
    spread = w * (psi - mean[:, None])
    cov = (spread @ spread.T / (1 - w @ w)).cpu().numpy()  # (1+2m, 1+2m), of the averages; equal weights: 1 - 1/N
    mean, se, on, lam_se = mean.cpu().numpy(), np.sqrt(cov.diagonal()), lam > 0, np.zeros(m)
    inverse = torch.linalg.pinv(torch.from_numpy(hessian[on][:, on]), hermitian=True).numpy()
    lam_se[on] = np.sqrt((inverse @ cov[1:1 + m, 1:1 + m][on][:, on] @ inverse).diagonal())  # sandwich
    kl = (mean[0] + lam @ grad - value) / beta  # E_π_λ[ln π_λ/π_ref]
    if float(ess @ w) < 5 < round(K):
        warnings.warn(f"effective sample size {float(ess @ w):.1f} of {K:.0f} responses per prompt: gains come out too "
                      "small, lam* too large; sample more of them, raise beta or lower the margin", stacklevel=2)
    put = lambda x: torch.from_numpy(x).to(problem.score.device)
    return Dual(put(lam), put(lam_se), value + float(problem.mean[0] @ w), put(grad), put(hessian), iterations,
                float(mean[0]), float(se[0]), put(grad + margin), put(se[1:1 + m]), put(mean[1 + m:]),
                put(se[1 + m:]), put(problem.top[1:]), max(0.0, kl), float(ess @ w),
                float(ess[w > 0].kthvalue(1 + (int((w > 0).sum()) - 1) // 20)[0]), float(rows[m + 1] @ w))


def reachable(constraint, mask=None, prompt_weight=None):
    """The largest reachable margin of each constraint alone, (m,): mean_x max_y g_j − E_ref[g_j]."""
    g = torch.as_tensor(constraint)
    top = prepare(torch.zeros((), device=g.device).expand(g.shape[-2:]), g, mask, prompt_weight).top[1:]
    return torch.from_numpy(top).to(g.device)


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
    lam = vector("lam", lam, len(problem.constraint))
    if not (lam >= 0).all() or not 0 < beta < float("inf"):
        raise ValueError(f"lam is {lam.tolist()}, beta {beta}: they must be finite, lam >= 0 and beta > 0")
    return torch.from_numpy(evaluate(problem, lam, 0 * lam, float(beta))[1]).to(problem.score.device)


def jackknife(score, constraint, lam, beta, *, mask=None, prompt_weight=None):
    """Gains at λ (1+m,), score first, with less bias of finite K: K·θ − (K−1)·mean_k θ_without_k."""
    problem, total = prepare(score, constraint, mask, prompt_weight), 0
    slope, n = problem.weight.new_tensor(vector("lam", lam, len(problem.constraint))), problem.buffer.shape[1]
    for rows in (slice(i, i + n) for i in range(0, len(problem.score), n)):
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
    """(score, constraint, rest) of an npz; PeCAN's log-ratios times beta are in the units of r and g."""
    try:
        data = dict(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: not a readable npz file of numbers ({error})") from None
    rest = {name: data.get(name) for name in ("mask", "prompt_weight")}
    if {"score", "constraint"} <= data.keys():
        return data["score"], data["constraint"], rest
    if {"ref_logp", "logp_r", "logp_g"} <= data.keys():
        return beta * (data["logp_r"] - data["ref_logp"]), beta * (data["logp_g"] - data["ref_logp"]), rest
    raise ValueError(f"{path} holds {sorted(data)}: it needs score and constraint, or ref_logp, logp_r and logp_g")


def parse_margin(text, reach, separator=","):
    """"50%" or "0.3", one or one per constraint -> (m,) margins in g's units; reach (m,) is the largest reachable."""
    parts = text.split(separator) * (1 if separator in text else len(reach))
    try:
        b = [float(p[:-1]) / 100 * top if p.endswith("%") else float(p)
             for p, top in zip(parts, reach.tolist(), strict=True)]
    except ValueError:
        raise ValueError(f"margin {text!r}: expected a number in g's units, 0.3, or a share of the largest reachable "
                         f"one, 50%; a single one, or {len(reach)} separated by {separator!r}") from None
    return torch.tensor(b, dtype=torch.float64)


def report(args):
    """Everything the command line prints."""
    if not 0 < args.beta < float("inf"):
        raise ValueError(f"--beta is {args.beta}: it must be a finite number above 0")
    score, constraint, rest = load(args.scores, args.beta)
    margin, shares = parse_margin(args.margin, reachable(constraint, **rest)), (1.0, 0.75, 0.5, 0.25)
    with warnings.catch_warnings(record=True) as notes:
        curve = sweep(score, constraint, [share * margin for share in shares], args.beta, **rest)
    for note in notes[:1]:
        print(f"dual.py: warning: {note.message}", file=sys.stderr)
    d = curve[0]
    if args.json:
        fields = {name: x.tolist() if torch.is_tensor(x) else x for name, x in d._asdict().items()}
        return print(json.dumps({"margin": margin.tolist(), "beta": args.beta, **fields}).replace("NaN", "null"))
    print(f"{score.shape[0]} prompts x {score.shape[1]} responses, beta {args.beta:g}; +-: 95% interval over prompts")
    for j, b in enumerate(margin.tolist()):
        print(f"constraint {j}: margin {b:.4f} of at most {d.reachable[j]:.4f}   lam* {d.lam[j]:.4f} +- "
              f"{1.96 * d.lam_se[j]:.4f}   gain {d.constraint_gain[j]:.4f} +- {1.96 * d.constraint_gain_se[j]:.4f}")
    print(f"score gain {d.score_gain:.4f} +- {1.96 * d.score_gain_se:.4f}   KL {d.kl:.4f} nats   effective sample size "
          f"{d.ess:.1f}, 5th percentile {d.ess_p5:.1f}, top weight {d.top_weight:.2f}")
    fixed = " ".join(f"{x:.4f}" for x in jackknife(score, constraint, d.lam, args.beta, **rest).tolist())
    print(f"score gain, constraint gain at this lam* with less of the bias of finite K (jackknife): {fixed}")
    print("\nshare of the margin, margin, lam*, score gain, KL, effective sample size")
    for share, row in zip(shares, curve):
        print(f"{share:5.0%}  {' '.join(f'{b:8.4f}' for b in share * margin)}  "
              f"{' '.join(f'{x:8.4f}' for x in row.lam)}  {row.score_gain:8.4f}  {row.kl:7.4f}  {row.ess:7.1f}")


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
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"dual.py: error: {error}")


if __name__ == "__main__":
    main()
