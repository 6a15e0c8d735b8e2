"""lambda*, and what it buys: the dual problem of constrained alignment, solved before any training.

One-Shot Safety Alignment via Optimal Dualization (arXiv 2405.19544v3) wants
    max_pi E[r] - beta KL(pi || pi_ref)   such that   E_pi[g_j] - E_ref[g_j] >= b_j,   j = 1..m.
With h_j = g_j - E_ref[g_j] - b_j its dual is a convex function of m numbers, on K scored reference responses a prompt:
    D(lam)    = beta mean_x ln mean_y exp((r + <lam, h>) / beta),  lam >= 0
    grad D    = E_pi[h],   pi_lam(y|x) proportional to pi_ref(y|x) exp((r + <lam, h>) / beta)
    hessian D = mean_x Cov_pi_lam(.|x)(g) / beta
PeCAN is the same function with r = ln pi_r/pi_ref, g = ln pi_g/pi_ref, beta = 1 and margin b/beta.

    symbol       variable      shape         symbol                  variable               shape
    r(x, y)      score         (N, K)        pi_lam(y|x)             p                      (n, K), n at a time
    g_j(x, y)    constraint    (m, N, K)     E_pi[g|x] - mean_y g    gain                   (m, N)
    b_j, lam_j   margin, lam   (m,)          D, grad D, hessian D    value, grad, hessian   (), (m,), (m, m)

Convergence: a step minimises the quadratic model over lam >= 0 in a trust region; one that lowers D by too little of
what the model promised is refused and shrinks the region, so for convex smooth D only KKT points are limits; level sets
are bounded if the margins can be met with room to spare; near lam* the region is idle and Newton's steps quadratic.
Infeasible margins let D fall for ever. Its recession function R(d) = mean_x max_y <d, h> is then negative for some
d >= 0, the rays that Newton tries are tested, and as D(td) <= t R(d) + mean_x max_y r, such a d is raised: a proof.

Error bars are clustered by prompt: psi_x = E_pi[g|x] - mean_y g(x, y) contains the estimate of E_ref[g]. Those of the
gains, sd(psi_x) / sqrt(N), answer "what will the policy trained with this lam get on new prompts?"; that of lam* is the
sandwich H^-1 Var(psi)/N H^-1 over the active constraints (delta method). What they leave out is finite K: the sample is
never better than its best response, so gains come out too small and lam* too large, by about 3 % at an effective sample
size of 40, 6 % at 20, 18 % at 9; below 5 solve() warns. At beta = 0.1, score spread 3, K = 128, the paper's setting, it
is near 1: best-of-K, not pi_lam. `jackknife` removes 3/4 of the bias above 20, half at 5 to 9, little near 1.

Differs from the paper and its published code: Newton for m >= 1 where they run projected gradient descent for m = 1;
log-mean-exp per prompt everywhere (the code pools prompts in two places); failure raises, with a proof, where they
return None. Read mocan.py next, where lam* labels the pairs.
"""
import argparse
import json
import sys

import numpy as np
import torch
# From here down to the end of solve() the text also runs alone, pasted below `import torch`.
import warnings
from typing import NamedTuple

MASKED = -1e300  # score of a response that does not exist: finite, so that its weight is 0 and 0 * MASKED is not NaN


class Infeasible(ValueError):
    """No policy on these samples meets the margins. `direction` d >= 0 is the proof: mean_x max_y <d, h> < 0."""

    def __init__(self, message, direction, reachable):
        super().__init__(message)
        self.direction, self.reachable = direction, reachable  # (m,), (m,)


class Dual(NamedTuple):
    """lam*, how sure it is, and what the policy trained with it will get."""
    lam: torch.Tensor  # (m,) lam* >= 0
    lam_se: torch.Tensor  # (m,) its standard error, 0 where the constraint is inactive
    value: float  # D(lam*)
    grad: torch.Tensor  # (m,) E_pi[h]: 0 where lam* > 0, else >= 0
    hessian: torch.Tensor  # (m, m)
    iterations: int  # evaluations of (D, grad, hessian) on all prompts
    score_gain: float  # E_pi[r] - E_ref[r]
    score_gain_se: float
    constraint_gain: torch.Tensor  # (m,) E_pi[g] - E_ref[g]
    constraint_gain_se: torch.Tensor  # (m,)
    ref: torch.Tensor  # (m,) E_ref[g]
    ref_se: torch.Tensor  # (m,)
    reachable: torch.Tensor  # (m,) largest margin of each constraint alone
    kl: float  # KL(pi || pi_ref), mean over prompts
    ess: float  # effective sample size 1 / sum_y p(y)^2, mean over prompts
    ess_p5: float  # its 5th percentile
    top_weight: float  # weight of the single best response, mean over prompts


class Problem(NamedTuple):
    """Checked input; some of its prompts are a Problem again."""
    score: torch.Tensor  # (N, K)
    constraint: torch.Tensor  # (m, N, K)
    mask: torch.Tensor | None  # (N, K)
    weight: torch.Tensor  # (N,), sums to 1
    log_count: torch.Tensor  # (N,), ln of the number of responses
    mean: torch.Tensor  # (1+m, N), over responses, of score and constraints
    top: torch.Tensor  # (1+m,), mean_x max_y of both, centred
    width: torch.Tensor  # (1+m,), mean_x (max_y - min_y) of both
    buffer: torch.Tensor  # (2m+1, n, K) float64, used again by every chunk


def prepare(score, constraint, mask, prompt_weight):
    """Check the input and take its means and ends over responses; ValueError in one line."""
    score = torch.as_tensor(score).detach()
    constraint = torch.as_tensor(constraint).detach().to(score.device)
    constraint = constraint if constraint.ndim == 3 else constraint[None]  # (m, N, K)
    if score.ndim != 2 or constraint.ndim != 3 or constraint.shape[1:] != score.shape or constraint.numel() == 0:
        raise ValueError(f"score has shape {tuple(score.shape)} and constraint {tuple(constraint.shape)}: they must "
                         "be (N, K) and (N, K) or (m, N, K) with N, K, m >= 1")
    (m, N, K), like = constraint.shape, {"dtype": torch.float64, "device": score.device}
    count = torch.full((N,), K, **like)
    if mask is not None:
        mask = torch.as_tensor(mask, device=score.device).bool()
        if mask.shape != (N, K) or not mask.any(dim=1).all():
            raise ValueError(f"mask has shape {tuple(mask.shape)}: it must be {(N, K)}, with a True in every row")
        count = mask.sum(dim=1, dtype=torch.float64)
    weight = torch.ones(N, **like) if prompt_weight is None else torch.as_tensor(prompt_weight, **like)
    if weight.shape != (N,) or not (weight >= 0).all() or not 0 < float(weight.sum()) < float("inf"):
        raise ValueError(f"prompt_weight {tuple(weight.shape)}, sum {weight.sum():.3g}: give {N} numbers >= 0, sum > 0")
    weight, zero = weight / weight.sum(), torch.zeros(1 + m, N, **like)
    share = 2 ** (17 if score.device.type == "cpu" else 24)  # 1 MB a plane stays in cache
    buffer, ends = torch.empty(1 + m + max(m, 3), min(N, max(1, share // K)), K, **like), []
    problem = Problem(score, constraint, mask, weight, count.log(), zero, zero, zero, buffer)
    for rows, _, _, _ in chunks(problem):
        x = buffer[:1 + m, :rows.stop - rows.start]  # (1+m, n, K)
        for fill, reduce in ((0.0, torch.sum), (float("inf"), torch.amin), (-float("inf"), torch.amax)):
            x = x if mask is None else x.masked_fill_(~mask[rows], fill)
            ends.append(reduce(x, dim=2))  # (1+m, n)
    mean, low, high = torch.cat(ends[0::3], dim=1) / count, torch.cat(ends[1::3], dim=1), torch.cat(ends[2::3], dim=1)
    if not mean.isfinite().all():
        j, row = divmod(int((~mean.isfinite()).flatten().int().argmax()), N)
        raise ValueError(f"{'constraint' if j else 'score'} has a NaN or inf at prompt {row}: mask or repair it")
    return problem._replace(mean=mean, top=((high - mean) @ weight).cpu(), width=((high - low) @ weight).cpu())


def chunks(problem):
    """Yield (rows, r, g, spare) of a few prompts at a time, float64, centred; the next chunk overwrites the buffer."""
    m, size = len(problem.constraint), problem.buffer.shape[1]
    for i in range(0, len(problem.score), size):
        rows = slice(i, min(i + size, len(problem.score)))
        r, g, spare = problem.buffer[:, :rows.stop - i].split([1, m, max(m, 3)])  # planes of (n, K)
        r = torch.sub(problem.score[rows], problem.mean[0, rows, None], out=r[0])  # (n, K)
        torch.sub(problem.constraint[:, rows], problem.mean[1:, rows, None], out=g)
        if problem.mask is not None:
            r.masked_fill_(~problem.mask[rows], MASKED)
            g.masked_fill_(~problem.mask[rows], 0.0)
        yield rows, r, g, spare


def support(problem, directions):
    """mean_x max_y <d, g - mean_y g> for each row d of directions (k, m): R(d), the recession function, + <d, b>."""
    total = 0
    for rows, _, g, spare in chunks(problem):
        v = spare[:len(directions)]  # (k, n, K)
        torch.mm(directions.to(g.device), g.flatten(1), out=v.flatten(1))
        v = v if problem.mask is None else v.masked_fill_(~problem.mask[rows], -float("inf"))
        total = total + v.amax(dim=2) @ problem.weight[rows]  # (k,)
    return total.cpu()


def evaluate(problem, lam, margin, beta, detail=False):
    """D(lam) - E_ref[r] (solve adds it back), its gradient, its Hessian, and per prompt the rows they are made of."""
    slope, second, parts = lam.to(problem.score.device), 0, []
    for rows, r, g, spare in chunks(problem):
        pg = spare[:len(g)]
        flat = torch.addmv(r.view(-1), g.flatten(1).T, slope, beta=1 / beta, alpha=1 / beta, out=r.view(-1))
        z = flat.view_as(r)  # (n, K), (r + <lam, g>) / beta
        peak = z.amax(dim=1)  # (n,)
        p = torch.softmax(z, dim=1, out=z)  # pi_lam(y|x)
        best = p.amax(dim=1)  # exp(peak) / sum_y exp(z), so that ln sum_y exp(z) = peak - ln best
        gain = torch.mul(p, g, out=pg).sum(dim=2)  # (m, n), E_pi[g|x] - mean_y g
        second = second + pg.mul_(problem.weight[rows, None]).flatten(1) @ g.flatten(1).T  # (m, m)
        part = [*gain, peak - best.log(), best]
        if detail:  # E_pi[r|x] - mean_y r, and sum_y p^2
            torch.sub(problem.score[rows], problem.mean[0, rows, None], out=spare[0])
            if problem.mask is not None:
                spare[0].masked_fill_(~problem.mask[rows], 0.0)
            part += [spare[0].mul_(p).sum(dim=1), torch.mul(p, p, out=spare[1]).sum(dim=1)]
        parts.append(torch.stack(part))
    rows = torch.cat(parts, dim=1)  # (m+2 or m+4, N)
    gain = rows[:len(lam)]
    value = beta * torch.dot(rows[len(lam)] - problem.log_count, problem.weight)  # D(lam), but for E_ref[r]
    hessian = (second - (gain * problem.weight) @ gain.T) / beta  # mean_x Cov_pi(g) / beta
    return float(value) - float(lam @ margin), (gain @ problem.weight).cpu() - margin, hessian.cpu(), rows


def model_step(x, grad, hessian, damp):
    """argmin_e <grad, e> + <e, (hessian + damp) e> / 2 over x + e >= 0, entries going to the bound one by one."""
    if len(x) == 1:
        return torch.maximum(-grad / (hessian[0] + damp + 1e-200), -x)
    h = hessian + torch.diag(damp + 1e-13 * hessian.diagonal() + 1e-200)  # collinear constraints make it singular
    free, e = (x > 0) | (grad < 0), torch.zeros_like(x)
    while bool(free.any()):
        root = h.diagonal()[free].sqrt()
        e[free] = torch.linalg.solve(h[free][:, free] / (root[:, None] * root),
                                     (-grad - h[:, ~free] @ e[~free])[free] / root) / root
        over = free & (x + e < 0)
        if not bool(over.any()):
            break
        e, free = torch.where(over, -x, e), free & ~over
    return e


def newton(problem, lam, margin, beta, limit, tolerance=1e-11):
    """Minimise D over lam >= 0 by trust-region Newton: (lam, evaluate() there, evaluations, whether KKT holds)."""
    spread, size = float(problem.width[0]), problem.mean[1:].abs().amax(dim=1).cpu()
    width = (problem.width[1:] + margin.abs() + 1e-12 * size).clamp_min(1e-100)  # (m,), natural unit of h_j
    level = width + size  # (m,), size of the numbers that h_j is a difference of
    state, count, radius = evaluate(problem, lam, margin, beta), 1, float("inf")
    while True:
        value, grad, hessian, _ = state
        noise = 2e-15 * (spread + 4 * beta + float(lam @ level))  # rounding of r + <lam, h>, hence of D
        wrong = torch.where(lam > 0, grad, grad.clamp_max(0)).abs() / width  # (m,), violation of KKT
        done = bool((wrong <= tolerance + noise / beta + 1e-15 * level / width).all())
        if done or count >= limit:
            return lam, state, count, done
        radius = min(radius, 8 * max(float((lam * width).max()), spread + beta))
        push = float(wrong.norm()) / radius
        damp, length = 1e-8 * push + 1e-15 / beta, float("inf")  # 1e-15 / beta: rounding of the Hessian
        while length > 1.01 * radius:
            d = model_step(lam * width, grad / width, hessian / (width[:, None] * width), damp) / width
            damp, length = max(3 * damp, 0.1 * push), float((d * width).norm())
        q, t = -float(grad @ d), 1.0
        if q > 0.02 * beta:  # far from lam*: look at how D behaves at the far ends of this line, and of the one from 0
            ways = torch.stack([d, -d, lam])
            up, down, ray = (support(problem, ways) - ways @ margin).tolist()
            tiny = (1e-14 * ways.abs() @ level).tolist()
            for way, end, eps in ((d, up, tiny[0]), (lam, ray, tiny[2])):
                if end < -eps and bool((way >= 0).all()):  # the recession function R(way) < 0: a certificate
                    raise Infeasible(f"margin {margin.tolist()} is out of reach on these samples: the largest reachable"
                                     f"{' alone' * (len(lam) > 1)} is {problem.top[1:].tolist()}; lower the margin "
                                     "or sample more responses per prompt", way / way.sum(), problem.top[1:])
            if q < down and damp <= 0.2 * push + 1e-14 / beta:  # a logistic slope from -down to up: where is it 0?
                up = max(up, 2 * tiny[0])
                odds = torch.tensor([down / up, (up + q) / (down - q)], dtype=torch.float64).log().sum()
                t = min(8.0, max(1.0, float(odds) / (q / (down - q) + q / (up + q))))
        new = (lam + t * d).clamp_min(0)
        trial, count = evaluate(problem, new, margin, beta, detail=q < 1e-8 * beta), count + 1
        drop, e = value - trial[0], new - lam
        model = -float(grad @ e) - float(e @ hessian @ e) / 2
        if drop >= 1e-3 * abs(model) - noise:
            lam, state, radius = new, trial, radius if drop < 0.5 * model else max(radius, 4 * t * length)
        else:
            radius = 0.3 * length


def solve(score, constraint, margin, beta, *, mask=None, prompt_weight=None, start=None):
    """lam* and its predictions from score (N, K), constraint (N, K) or (m, N, K), margin (float or (m,)) and beta.

    mask (N, K): True where a response exists. prompt_weight (N,). start (m,): a guess of lam*, e.g. at a near margin.
    Raises Infeasible with a certificate when no policy on these samples meets the margins.
    """
    problem, beta = prepare(score, constraint, mask, prompt_weight), float(beta)
    (m, N, K), margin = problem.constraint.shape, torch.as_tensor(margin, dtype=torch.float64).flatten().cpu()
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}: it must be a finite number above 0")
    if len(margin) not in (1, m) or not margin.isfinite().all():
        raise ValueError(f"margin is {margin.tolist()}: give one finite number, or one for each of {m} constraints")
    margin, lam = margin.expand(m), torch.zeros(m, dtype=torch.float64)
    if start is not None:
        lam = torch.as_tensor(start, dtype=torch.float64).cpu().expand(m).clamp_min(0)
    for stride in (64, 8):  # cold start: approach lam* on every 64th, then every 8th prompt
        some = problem.weight[::stride]
        if start is None and len(some) >= 64 and some.sum() > 0:
            part = Problem(problem.score[::stride], problem.constraint[:, ::stride],
                           None if mask is None else problem.mask[::stride], some / some.sum(),
                           problem.log_count[::stride], problem.mean[:, ::stride], *problem[6:])
            try:
                lam = newton(part, lam, margin, beta, 12, 0.01)[0]
            except Infeasible:  # of those prompts only: the full problem decides
                break
    lam, state, iterations, done = newton(problem, lam, margin, beta, 25)
    heat = 1.0
    while not done and heat * beta < problem.width[0]:
        heat *= 4
    while not done:  # D is nearly piecewise linear: follow lam* from a large beta down to this one
        lam, state, count, done = newton(problem, lam, margin, beta * heat, 400, 1e-11 if heat == 1 else 0.01)
        iterations, done, heat = iterations + count, done and heat == 1, heat / 4
        if heat < 1 and not done:
            raise RuntimeError(f"no convergence at margin {margin.tolist()}, beta {beta}: gradient {state[1].tolist()} "
                               f"at lam {lam.tolist()} after {iterations} evaluations; use a larger beta")
    if len(state[3]) == m + 2:
        state, iterations = evaluate(problem, lam, margin, beta, detail=True), iterations + 1
    (value, grad, hessian, rows), w = state, problem.weight
    gain, (lse, best, r_gain, square) = rows[:m], rows[m:]  # (m, N), (N,) each
    kl = (r_gain + lam.to(gain.device) @ gain) / beta - lse + problem.log_count  # (N,), E_pi[ln pi_lam / pi_ref]
    psi = torch.cat([r_gain[None], gain, problem.mean[1:]])  # (1+2m, N), what the gains and E_ref[g] average
    mean = psi @ w
    spread = w * (psi - mean[:, None])
    cov = (spread @ spread.T * (N / (N - 1) if N > 1 else float("nan"))).cpu()  # (1+2m, 1+2m), of the averages
    se, on, lam_se = cov.diagonal().sqrt(), lam > 0, torch.zeros_like(lam)
    inverse = torch.linalg.pinv(hessian[on][:, on], hermitian=True)
    lam_se[on] = (inverse @ cov[1:1 + m, 1:1 + m][on][:, on] @ inverse).diagonal().sqrt()  # sandwich
    ess, put = 1 / square, problem.score.device
    if float(ess @ w) < 5 < K:
        warnings.warn(f"effective sample size {float(ess @ w):.1f} of {K} responses per prompt: gains come out too "
                      "small, lam* too large; sample more of them, raise beta or lower the margin", stacklevel=2)
    return Dual(lam.to(put), lam_se.to(put), value + float(problem.mean[0] @ w), grad.to(put), hessian.to(put),
                iterations, float(mean[0]), float(se[0]), (grad + margin).to(put), se[1:1 + m].to(put), mean[1 + m:],
                se[1 + m:].to(put), problem.top[1:].to(put), max(0.0, float(kl @ w)), float(ess @ w),
                float(ess.quantile(0.05)), float(best @ w))


def reachable(constraint, mask=None, prompt_weight=None):
    """The largest reachable margin of each constraint alone, (m,): mean_x max_y g_j - E_ref[g_j]."""
    g = torch.as_tensor(constraint)
    return prepare(g if g.ndim == 2 else g[0], g, mask, prompt_weight).top[1:].to(g.device)


def sweep(score, constraint, margins, beta, *, mask=None, prompt_weight=None):
    """A trade-off curve: the Dual of each margin, each started from the one before."""
    duals = []
    for margin in margins:
        duals.append(solve(score, constraint, margin, beta, mask=mask, prompt_weight=prompt_weight,
                           start=duals[-1].lam if duals else None))
    return duals


def margin_of(score, constraint, lam, beta, *, mask=None, prompt_weight=None):
    """The inverse question: the margins (m,) that lam belongs to, E_pi_lam[g] - E_ref[g], in one evaluation."""
    problem = prepare(score, constraint, mask, prompt_weight)
    lam = torch.as_tensor(lam, dtype=torch.float64).flatten().cpu().expand(len(problem.constraint))
    if not (lam >= 0).all() or not lam.isfinite().all() or not 0 < beta < float("inf"):
        raise ValueError(f"lam is {lam.tolist()}, beta {beta}: they must be finite, lam >= 0 and beta > 0")
    return evaluate(problem, lam, torch.zeros_like(lam), float(beta))[1].to(problem.score.device)


def jackknife(score, constraint, lam, beta, *, mask=None, prompt_weight=None):
    """Gains at lam (1+m,), score first, with less bias of finite K: K theta - (K-1) mean_k theta_without_k."""
    problem, total = prepare(score, constraint, mask, prompt_weight), 0
    slope = torch.as_tensor(lam, dtype=torch.float64, device=problem.score.device).flatten()
    for rows, r, g, _ in chunks(problem):
        p, exists = torch.softmax((r + torch.tensordot(slope, g, dims=1)) / beta, dim=1), r > MASKED
        x = torch.cat([torch.where(exists, r, 0.0)[None], g])  # (1+m, n, K)
        theta, count = (p * x).sum(dim=2, keepdim=True), problem.log_count[rows].exp()  # (1+m, n, 1), (n,)
        rest = torch.where(exists, (theta - p * x) / (1 - p).clamp_min(1e-12), 0.0).sum(dim=2) / count  # (1+m, n)
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
