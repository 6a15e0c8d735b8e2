"""
dual.py: λ*, and what it buys: the dual of constrained alignment, solved before any training
(arXiv 2405.19544v3) from K scored responses of the reference policy to each of N prompts.

The problem is  max_π E_π[r] − β·KL(π‖π_ref)  subject to  E_π[g_j] − E_ref[g_j] ≥ b_j,  j = 1…m.
With h_j = g_j − E_ref[g_j] − b_j, its dual is a convex function of m numbers:

    D(λ)   = β·mean_x ln mean_y exp((r + ⟨λ,h⟩)/β),  λ ≥ 0        (dual function)
    ∇D(λ)  = E_π_λ[h],  π_λ(y|x) ∝ π_ref(y|x)·exp((r + ⟨λ,h⟩)/β)
    ∇²D(λ) = mean_x Cov_π_λ(·|x)(g)/β

PeCAN minimises the same function with r → ln π_r/π_ref, g → ln π_g/π_ref, β → 1, b → b/β; or, in
the units of r and g, with r → β·ln π_r/π_ref, g → β·ln π_g/π_ref.

    symbol                        variable              shape
    r(x,y), g_j(x,y)              score, constraint     (N, K), (m, N, K)
    b_j, λ_j                      margin, lam           (m,), (m,)
    D, ∇D, ∇²D                    value, grad, hessian  (), (m,), (m, m)
    π_λ(y|x)                      p / total             (n, K), n prompts at a time
    mean_y f, for f = r and g_j   mean                  (1+m, N), the score's row first
    E_π_λ[f|x] − mean_y f         policy.gain           (1+m, N), the score's row first

Convergence. In units of r, x = λ·unit, a step e ≥ −x lowers the quadratic model of D plus
damp·‖e‖²/2, with damp = v/radius and v the norm of the violation of KKT. Since −⟨∇D,e⟩ ≤ v·‖e‖, a
lower model means ‖e‖ ≤ 2·radius. A step that lowers D by too little of what the model promised is
refused, and shrinks radius. So for convex smooth D only KKT points are limits; near λ* v vanishes,
and convergence is quadratic where ∇²D is regular.

Infeasible margins let D fall for ever. With the recession function R(d) = mean_x max_y ⟨d,h⟩,
D(λ) ≥ R(λ) + mean_x min_y r − β ln K. A λ where D is below the last two terms has R(λ) < 0: the
proof that no policy on these samples meets the margins.

Error bars are clustered by prompt: ψ_x = E_π_λ[g|x] − mean_y g contains the estimate of E_ref[g].
Those of the gains, sd(ψ_x)/√N, answer "what will the policy trained with this λ get on new
prompts?"; that of λ* is sd(H⁻¹ψ_x)/√N, H = ∇²D over the active constraints (delta method). They
leave out that K is finite: a sample is never better than its best response, so λ* comes out too
large and gains too small, a constraint's by 3 % at an effective sample size of 40, 6 % at 20, 17 %
at 9; below 5 solve() warns. In the paper's setting (β = 0.1, score spread 3, K = 128) it is near 1:
that is best-of-K, not π_λ. Where more responses can be sampled, mocan.solve_from's second dual
removes the bias.

Differs from the paper and its published code: Newton for m ≥ 1 where they run projected gradient
descent for m = 1; log-mean-exp per prompt everywhere (the code pools prompts in two
places); exceptions where they return None.

Read next: mocan.py, where λ* labels the pairs.
"""
import argparse
import json
import os
import sys

import torch

# ---- here the part to paste begins: from here to its end, copied below `import torch`, it runs
# alone in another project
import warnings
from typing import NamedTuple

import numpy as np  # for what has m entries: a fifth of torch's overhead

Array = np.ndarray
Tensor = torch.Tensor

# ---- 1. the method


class Problem(NamedTuple):
    """Checked input, and its statistics over the responses y of a prompt x (by prepare)."""
    score: Tensor  # (N, K) r
    constraint: Tensor  # (m, N, K) g
    margin: Array  # (m,) b
    beta: float
    log_count: float  # ln K
    mean: Tensor  # (1+m, N) mean_y of r, then of each g_j
    reach: Array  # (m,) mean_x max_y g − E_ref[g]: the largest margin of each constraint alone
    lowest: float  # mean_x min_y r − E_ref[r]
    score_range: float  # mean_x (max_y r − min_y r)
    score_size: float  # max_x |mean_y r| + score_range: what the rounding of r is relative to
    unit: Array  # (m,) the range of g + |b|: the natural unit of h; never 0
    size: Array  # (m,) max_x |mean_y g| + the range of g + |b|: as score_size, for h


class Policy(NamedTuple):
    """What one pass over the responses collects about π_λ."""
    log_sum: Tensor  # (N,) ln Σ_y exp((r + ⟨λ,g⟩)/β)
    gain: Tensor  # (1+m, N) E_π_λ[r|x] − mean_y r (if asked for), then E_π_λ[g_j|x] − mean_y g_j
    second: Tensor  # (m, m) mean_x E_π_λ[(g − mean_y g)·gᵀ|x]
    squares: Tensor  # (N,) Σ_y π_λ(y|x)² (if asked for)


class Point(NamedTuple):
    """The dual at one λ."""
    lam: Array  # (m,) λ
    value: float  # D(λ) − E_ref[r]
    grad: Array  # (m,) ∇D(λ)
    hessian: Array  # (m, m) ∇²D(λ)


def mean_x(rows):
    """Mean over prompts (k,) of rows (k, N)."""
    return rows.mean(1).cpu().numpy()


@torch.inference_mode()
def evaluate(problem, lam):
    """The three equations at λ (m,).

    −⟨λ, E_ref[g] + b⟩, the part of ⟨λ,h⟩ that all responses share, is taken out of the exponent.
    """
    policy = expectations(problem, lam)
    ref = mean_x(problem.mean)  # (1+m,) E_ref[r], then E_ref[g]
    gain = policy.gain[1:]  # (m, N)
    average = mean_x(torch.cat([gain, policy.log_sum[None]]))  # (m+1,)
    log_mean = average[-1] - problem.log_count  # mean_x ln mean_y exp(…)
    # Cov(g) = E[(g−μ)gᵀ] − E[g−μ]·E[g]ᵀ with μ = mean_y g: policy.second less this
    product = gain @ (problem.mean[1:] + gain).T / gain.size(1)  # (m, m)

    value = problem.beta * log_mean - ref[0] - lam @ (problem.margin + ref[1:])  # D(λ) − E_ref[r]
    grad = average[:-1] - problem.margin  # ∇D(λ) = E_π_λ[h]
    hessian = (policy.second - product) / problem.beta  # ∇²D(λ) = mean_x Cov/β
    return Point(lam, value, grad, hessian.cpu().numpy())


def newton_step(point, grad, unit, damp):
    """The next λ ≥ 0: a walk over active sets on ⟨grad,e⟩ + ⟨e,(∇²D + damp)e⟩/2, the model of D.

    In units of r, x = λ·unit. An entry is free if it is > 0, or 0 with D falling as it grows; the
    others are pinned at 0. `end` is the minimum over the free entries. If it is ≥ 0, that is the
    answer; else walk from `path` towards it until the first entries meet 0, pin those, and repeat.
    Every leg lowers the model; for one constraint the answer is its minimum on λ ≥ 0.
    """
    x = point.lam * unit
    slope = grad / unit
    curvature = point.hessian / (unit[:, None] * unit)
    curvature = curvature + np.diag(damp + SINGULAR * curvature.diagonal())
    free = (x > 0) | (slope < 0)
    path = x
    while True:
        matrix = np.where(free[:, None], curvature, np.eye(len(x)))  # pinned entries end at 0
        end = x + np.linalg.solve(matrix, np.where(free, -slope, -x))
        crossing = free & (end < 0)
        if not crossing.any():
            return np.where(free, end, 0.0) / unit
        share = np.full_like(x, np.inf)  # of the way to `end`, at which an entry meets 0
        share[crossing] = path[crossing] / (path - end)[crossing]
        first = share.min()
        path = path + first * (end - path)
        free = free & (share > first)


def minimise(problem, start, tolerance, limit):
    """Newton's method from λ = start: the Point where it ends, the evaluations it took (at most
    `limit`), and whether it converged. Raises Infeasible with a proof."""
    radius = AMPLE * (problem.score_range + problem.beta)  # of a step, in units of r
    point = evaluate(problem, start)
    evaluations = 1
    while True:
        grad, violation, noise = optimality(problem, point)
        # rounding r + ⟨λ,h⟩ by `noise` changes π_λ by a share noise/β, and ∇D by that much of h
        allowed = tolerance + min(noise / problem.beta, MOST_NOISE)
        converged = (violation <= allowed).all()
        if converged or evaluations == limit:
            return point, evaluations, converged

        # the step, which `damp` keeps within 2·radius
        damp = np.linalg.norm(violation) / radius + ROUNDING / problem.beta
        lam = newton_step(point, grad, problem.unit, damp)
        step = lam - point.lam
        length = np.linalg.norm(step * problem.unit)
        promised = -(grad @ step + step @ point.hessian @ step / 2)
        trial = evaluate(problem, lam)
        evaluations += 1

        # whether to take it
        drop = point.value - trial.value
        if drop >= ACCEPT * abs(promised) - noise:  # False for NaN
            point = trial
            if drop >= GOOD * promised:
                radius = max(radius, AMPLE * length)
        else:
            radius = length / SHRINK


def solve(score, constraint, margin, beta):
    """λ* and its predictions, a Dual, from score (N, K), constraint (N, K) or (m, N, K), margin b
    (a number or (m,)) and beta.

    Raises Infeasible with a certificate when no policy on these samples meets the margins,
    FloatingPointError without convergence, ValueError on bad input.
    """
    problem = prepare(score, constraint, margin, beta)
    refuse_out_of_reach(problem)
    start = np.zeros(len(problem.margin))
    point, evaluations, converged = minimise(problem, start, TOLERANCE, LIMIT)
    if not converged:
        point, evaluations = continuation(problem, point.lam, evaluations)
    return predict(problem, point, evaluations)


# ---- 2. predictions

FEW = 5  # effective sample size that makes solve() warn


class Dual(NamedTuple):
    """λ*, how sure it is, and what the policy trained with it will get."""
    lam: Tensor  # (m,) λ* ≥ 0
    lam_se: Tensor  # (m,) its standard error, 0 where λ* is 0; if collinear, of the shortest λ*
    value: float  # D(λ*)
    grad: Tensor  # (m,) E_π_λ[h]: 0 where λ* > 0, else ≥ 0
    hessian: Tensor  # (m, m) ∇²D(λ*)
    iterations: int  # evaluations of (D, grad, hessian); predictions take one more pass
    score_gain: float  # E_π_λ[r] − E_ref[r]
    score_gain_se: float
    constraint_gain: Tensor  # (m,) E_π_λ[g] − E_ref[g]
    constraint_gain_se: Tensor  # (m,)
    ref: Tensor  # (m,) E_ref[g]
    ref_se: Tensor  # (m,)
    reachable: Tensor  # (m,) largest margin of each constraint alone
    kl: float  # KL(π_λ‖π_ref), mean over prompts
    ess: float  # effective sample size 1/Σ_y π_λ(y)², mean over prompts
    ess_p5: float  # its 5th percentile over prompts


def predict(problem, point, evaluations):
    """The Dual at the minimum; warns where K is too small for it."""
    policy = expectations(problem, point.lam, detail=True)
    gain, gain_se = clustered(policy.gain)  # (1+m,) of r, then of each g_j
    ref, ref_se = clustered(problem.mean)  # (1+m,) likewise
    # D = E_π_λ[r] + ⟨λ,∇D⟩ − β·KL(π_λ‖π_ref), here both sides without E_ref[r]
    kl = (float(gain[0]) + point.lam @ point.grad - point.value) / problem.beta
    ess = 1 / policy.squares  # (N,)
    mean_ess = float(ess.mean())
    K = problem.score.shape[1]
    if mean_ess < FEW < K:  # which no error bar shows
        warnings.warn(
            f"effective sample size {mean_ess:.1f} of {K} responses per prompt: gains come out too "
            "small, lam* too large, beyond their error bars; sample more of them, raise beta or "
            "lower the margin", stacklevel=3)
    tensor = ess.new_tensor  # on the device of the scores
    return Dual(
        lam=tensor(point.lam),
        lam_se=price_error(point, policy.gain[1:]),
        value=float(point.value + ref[0]),
        grad=tensor(point.grad),
        hessian=tensor(point.hessian),
        iterations=evaluations,
        score_gain=float(gain[0]),
        score_gain_se=float(gain_se[0]),
        constraint_gain=tensor(point.grad + problem.margin),
        constraint_gain_se=gain_se[1:],
        ref=ref[1:],
        ref_se=ref_se[1:],
        reachable=tensor(problem.reach),
        kl=float(max(0.0, kl)),
        ess=mean_ess,
        ess_p5=float(ess.quantile(0.05, interpolation="lower")))


def clustered(psi):
    """Mean over prompts of each row of ψ (k, N), and its standard error: (k,), (k,)."""
    mean = psi.mean(1)
    variance = (psi - mean[:, None]).square().mean(1) / (psi.size(1) - 1)  # NaN for one prompt
    return mean, variance.sqrt()


def price_error(point, gain):
    """Standard error (m,) of λ*: that of H⁻¹ψ over the active constraints, 0 for the others; gain
    (m, N) is ψ."""
    active = gain.new_tensor(point.lam) > 0
    hessian = gain.new_tensor(point.hessian)[active][:, active]
    inverse = torch.linalg.pinv(hessian, hermitian=True)
    se = gain.new_zeros(len(gain))
    _, active_se = clustered(inverse @ gain[active])
    se[active] = active_se
    return se


# ---- 3. checking the input

class Infeasible(ValueError):
    """No policy on these samples meets the margins: `direction` d ≥ 0 (m,) is the proof,
    mean_x max_y ⟨d,h⟩ < 0. `reachable` (m,): the largest margin of each constraint alone."""

    def __init__(self, problem, direction):
        super().__init__(
            f"margin {problem.margin.tolist()} is out of reach on these samples: the largest "
            f"reachable, of each constraint alone, is {problem.reach.tolist()}; lower the margin "
            "or sample more responses per prompt")
        self.direction = torch.from_numpy(direction / direction.sum())
        self.reachable = torch.from_numpy(problem.reach)


@torch.inference_mode()
def prepare(score, constraint, margin, beta):
    """The Problem of this input; ValueError in one line where it is not one."""
    score = torch.as_tensor(score).detach().contiguous()
    constraint = torch.as_tensor(constraint).detach().to(score.device).contiguous()
    constraint = constraint if constraint.ndim == 3 else constraint[None]  # (m, N, K)
    if constraint.ndim != 3 or constraint.shape[1:] != score.shape or constraint.numel() == 0:
        raise ValueError(
            f"score has shape {tuple(score.shape)} and constraint {tuple(constraint.shape)}: they "
            "must be (N, K) and (N, K) or (m, N, K) with N, K, m >= 1")
    statistics = [over_responses(x) for x in (score, *constraint)]
    mean, low, high = torch.stack(statistics, dim=1)  # (1+m, N), the score's row first
    check_finite(mean)
    beta = float(beta)
    if not 0 < beta < np.inf:
        raise ValueError(f"beta is {beta}: it must be a finite number above 0")
    margin = one_each(margin, len(constraint))

    best_gain = mean_x(high - mean)  # (1+m,) like the next two
    width = mean_x(high - low)
    size = mean.abs().amax(1).cpu().numpy() + width
    return Problem(
        score=score,
        constraint=constraint,
        margin=margin,
        beta=beta,
        log_count=float(np.log(score.shape[1])),
        mean=mean,
        reach=best_gain[1:],
        lowest=best_gain[0] - width[0],
        score_range=width[0],
        score_size=size[0],
        unit=width[1:] + abs(margin) + 1000 * ROUNDING * size[1:] + TINY,
        size=size[1:] + abs(margin))


def over_responses(x):
    """Mean, least and largest over the responses of x (N, K): (3, N) float64."""
    mean = x.mean(1, dtype=torch.float64)
    return torch.stack([mean, x.amin(1).double(), x.amax(1).double()])


def check_finite(mean):
    """Raises ValueError naming the array and the prompt; mean (1+m, N)."""
    bad = (~mean.isfinite()).nonzero()  # (.., 2)
    if len(bad):
        row, prompt = bad[0].tolist()
        name = f"constraint {row - 1}" if row else "score"
        raise ValueError(f"{name}: NaN or inf at prompt {prompt}; drop or repair it")


def one_each(margin, m):
    """One finite number, or m -> (m,) float64."""
    margin = torch.as_tensor(margin, dtype=torch.float64).flatten().cpu().numpy()
    if len(margin) not in (1, m) or not np.isfinite(margin).all():
        raise ValueError(
            f"margin is {margin.tolist()}: give one finite number, or one per constraint ({m})")
    return margin * np.ones(m)


def refuse_out_of_reach(problem):
    """Infeasible if one margin alone is out of reach: its axis has R = reach − b < 0."""
    over = problem.margin - problem.reach > 10 * ROUNDING * problem.size
    if over.any():
        raise Infeasible(problem, 1.0 * over)


# ---- 4. robustness: what double precision resolves, and what to do where that is not enough

ROUNDING = 1e-15  # relative, of a sum of a few numbers
TINY = 1e-100  # keeps a division by 0 away
SINGULAR = 1e-13  # relative damping: collinear constraints make ∇²D singular
# largest violation of KKT, in units of h_j
TOLERANCE = 3e-11  # at the end
MOST_NOISE = 1e-8  # in addition, where rounding of D explains it
FOLLOWING = 1e-6  # on the way from a large β down to the asked one
# most evaluations
LIMIT = 40
FOLLOWING_LIMIT = 400  # for each β on the way
# steps
AMPLE = 8  # first radius / (spread of the scores + β); next radius / length of a good step
SHRINK = 5  # length of a refused step / next radius
ACCEPT = 1e-3  # least share of the promised drop of D
GOOD = 0.7  # share of it that makes a step a good one


def optimality(problem, point):
    """∇D (m,), 0 where it is only rounding; its violation of KKT (m,) in units of h_j; the
    rounding of D. Raises Infeasible where D is so low that it proves R(λ) < 0."""
    noise = 2 * ROUNDING * (problem.score_size + 4 * problem.beta + point.lam @ problem.size)
    # D(λ) ≥ R(λ) + floor, so that D below the floor proves R(λ) < 0
    floor = problem.lowest - problem.beta * problem.log_count
    if point.value < floor - noise:
        raise Infeasible(problem, point.lam)
    rounding = abs(point.grad) <= ROUNDING * problem.size  # its sign means nothing
    grad = np.where(rounding, 0.0, point.grad)
    wrong = np.where(point.lam > 0, grad, np.minimum(grad, 0))  # KKT: all 0
    return grad, abs(wrong) / problem.unit, noise


def continuation(problem, lam, evaluations):
    """For small β, D is nearly piecewise linear: find λ* for a β as large as the spread of the
    scores, and follow it down to the asked one. Raises FloatingPointError where that fails too."""
    beta = problem.beta
    while beta < problem.score_range:
        beta *= 4
    while beta >= problem.beta:
        tolerance = TOLERANCE if beta == problem.beta else FOLLOWING
        warmer = problem._replace(beta=beta)
        point, more, converged = minimise(warmer, lam, tolerance, FOLLOWING_LIMIT)
        evaluations += more
        lam = point.lam
        if not converged:
            raise FloatingPointError(
                f"no convergence: margin {problem.margin.tolist()}, beta {problem.beta}: gradient "
                f"{point.grad.tolist()} at lam {lam.tolist()} after {evaluations} evaluations; "
                "use a larger beta")
        beta /= 4
    return point, evaluations


# ---- 5. speed: prompts in chunks that stay in cache, arithmetic in place

LN_2 = 0.6931471805599453
CHUNK = 2 ** 17  # responses per thread whose numbers stay in its cache


def expectations(problem, lam, detail=False):
    """The Policy at λ, in one pass over the responses: nearly all of the running time is here."""
    scale = problem.beta * LN_2  # exp(x/β) = 2^(x/scale), and exp2 is twice as fast as exp
    m = len(lam)
    N, K = problem.score.shape
    n = max(1, CHUNK * torch.get_num_threads() // K)  # prompts at a time
    gain = torch.empty_like(problem.mean)
    second = 0
    log_sum, squares = gain.new_empty(2, N)
    for begin in range(0, N, n):
        some = slice(begin, begin + n)
        r = problem.score[some].double()  # (n, K)
        g = problem.constraint[:, some].double()  # (m, n, K)
        z = r * (1 / scale)
        for slope, plane in zip((lam / scale).tolist(), g):
            z.add_(plane, alpha=slope)
        highest = z.amax(1, keepdim=True)  # (n, 1) of z = (r + ⟨λ,g⟩)/scale
        p = z.sub_(highest).exp2_()  # (n, K) π_λ·total, whose largest is 1; takes z's memory
        total = p.sum(1)  # (n,)
        pg = (g - problem.mean[1:, some, None]).mul_(p)  # (m, n, K)
        outer = torch.bmm(pg.transpose(0, 1), g.permute(1, 2, 0))  # (n, m, m)
        gain[1:, some] = pg.sum(2) / total
        log_sum[some] = torch.add(total.log(), highest[:, 0], alpha=LN_2)
        second += (1 / total) @ outer.flatten(1)
        if detail:
            gain[0, some] = (p * r).sum(1) / total - problem.mean[0, some]
            squares[some] = p.square_().sum(1) / total.square()
        del z, p, pg  # the next chunk computes in their memory, which is in the cache
    return Policy(log_sum, gain, second.view(m, m) / N, squares)


# ---- here the part to paste ends

# ---- 6. what else one asks of the dual, and the command line


def reachable(constraint):
    """The largest margin (m,) of each constraint (N, K) or (m, N, K) alone: mean_x max_y g_j −
    E_ref[g_j]."""
    g = torch.as_tensor(constraint).double()
    reach = (g.amax(-1) - g.mean(-1)).mean(-1)
    return reach.view(-1)


def read_npz(path, beta):
    """The arrays of an npz by name, score (N, K) and constraint (N, K) or (m, N, K) among them:
    from PeCAN's log-probabilities, log-ratios times β, which are in the units of r and g."""
    try:
        data = dict(np.load(path, allow_pickle=False))
    except Exception as error:  # numpy raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: not a readable npz file of numbers ({error})") from None
    if {"score", "constraint"} <= data.keys():
        return data
    if not {"ref_logp", "logp_r", "logp_g"} <= data.keys():
        raise ValueError(f"{path} holds {sorted(data)}: it needs score and constraint, "
                         "or ref_logp, logp_r and logp_g")
    if data["ref_logp"].shape != data["logp_r"].shape:
        raise ValueError(f"{path}: ref_logp {data['ref_logp'].shape} and logp_r "
                         f"{data['logp_r'].shape} must both be (N, K)")
    data["score"] = beta * (data["logp_r"] - data["ref_logp"])
    data["constraint"] = beta * (data["logp_g"] - data["ref_logp"])
    return data


def label(data, lam):
    """{"s": r + ⟨λ*,g⟩ (N, K)} of the arrays of an npz, and, where its `pairs` (P, 3) give a prompt
    and two of its responses y_0 and y_1 by index, {"p": P(y_1 ≻ y_0) = σ(s_1 − s_0) (P,)}."""
    constraint = data["constraint"].reshape(len(lam), *data["score"].shape)  # (m, N, K)
    s = data["score"] + np.einsum("m,mnk->nk", lam, constraint)
    if "pairs" not in data:
        return {"s": s}
    try:
        n, first, second = data["pairs"].T
        if data["pairs"].min() < 0:
            raise IndexError("one is below 0")
        lead = s[n, second] - s[n, first]
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"pairs must be whole numbers (P, 3): a prompt and two of its responses ({error})"
        ) from None
    return {"s": s, "p": 0.5 + 0.5 * np.tanh(lead / 2)}  # σ, without its overflow


def parse_margin(text, reach):
    """"50%" or "0.3", one or one per constraint -> (m,) margins in g's units; reach (m,) is the
    largest reachable. Raises ValueError for other text."""
    parts = text.split(",") if "," in text else [text] * len(reach)
    try:
        margin = [float(part[:-1]) / 100 * top if part.endswith("%") else float(part)
                  for part, top in zip(parts, reach.tolist(), strict=True)]
    except ValueError:
        raise ValueError(
            f"margin {text!r}: expected a number in g's units, 0.3, or a share of the largest "
            f"reachable one, 50%; a single one, or {len(reach)}, comma separated") from None
    return torch.from_numpy(one_each(margin, len(margin)))


def report(args):
    """Everything the command line prints."""
    beta = args.beta
    data = read_npz(args.scores, beta)
    margin = parse_margin(args.margin, reachable(data["constraint"]))
    d = solve(data["score"], data["constraint"], margin, beta)
    if args.write:
        labels = label(data, d.lam.numpy())
        with open(f"{args.write}.part", "wb") as file:
            np.savez(file, **(data | labels))
        os.replace(f"{args.write}.part", args.write)
    if args.json:
        print(json.dumps({"margin": margin, "beta": beta, **d._asdict()},
                         default=torch.Tensor.tolist).replace("NaN", "null"))
        return
    N, K = data["score"].shape
    print(f"{N} prompts x {K} responses, beta {beta:g}; +-: 95% interval over prompts")
    for j, b in enumerate(margin.tolist()):
        print(f"constraint {j}: margin {b:.4f} of at most {d.reachable[j]:.4f}   "
              f"lam* {d.lam[j]:.4f} +- {1.96 * d.lam_se[j]:.4f}   "
              f"gain {d.constraint_gain[j]:.4f} +- {1.96 * d.constraint_gain_se[j]:.4f}")
    print(f"score gain {d.score_gain:.4f} +- {1.96 * d.score_gain_se:.4f}   KL {d.kl:.4f} nats   "
          f"effective sample size {d.ess:.1f}, 5th percentile {d.ess_p5:.1f}")


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="lambda* and what it buys, before any training")
    parser.add_argument(
        "scores", help="npz: score (N, K) and constraint (N, K) or (m, N, K), or PeCAN's ref_logp, "
        "logp_r, logp_g (N, K); optional pairs (P, 3)")
    parser.add_argument(
        "--margin", required=True, help="least gain in g: 0.5, or 50%% of the largest reachable "
        "one; one for all constraints, or comma separated")
    parser.add_argument("--beta", type=float, required=True, help="strength of the KL term")
    parser.add_argument(
        "--write", help="npz to write, for a policy that is trained elsewhere: s = r + lam* g "
        "(N, K) and, for pairs of (prompt, y_0, y_1), p = P(y_1 over y_0) (P,)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    warnings.showwarning = lambda message, *_, **__: print(
        f"dual.py: warning: {message}", file=sys.stderr)
    try:
        report(parser.parse_args())
    except (ValueError, TypeError, IndexError, RuntimeError, FloatingPointError,
            OSError) as error:
        sys.exit(f"dual.py: error: {error}")


if __name__ == "__main__":
    main()
