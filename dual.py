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
    π_λ(y|x)                      p                     (n, K), n prompts at a time
    mean_y f, for f = r and g_j   mean                  (1+m, N), the score's row first
    ψ_x = E_π_λ[g|x] − mean_y g   gain                  (m, N)

Convergence. In units of r, x = λ·unit, a step e ≥ −x is about the minimum of the quadratic model of
D plus damp·‖e‖²/2, with damp = v/radius and v the norm of the violation of KKT. Since −⟨∇D,e⟩ ≤
v·‖e‖, a lower model means ‖e‖ ≤ 2·radius. A step that lowers D by too little of what the model
promised is refused, and shrinks radius, which ends in short steps down the gradient. Near λ* v
vanishes, and convergence is quadratic where ∇²D is regular. What has not converged raises.

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

Read next: pecan.py, the same dual on the scores that pre-aligned policies imply.
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
    scores: list  # 1+m of (N, K): r, then each g_j
    margin: Array  # (m,) b
    beta: float
    log_count: float  # ln K
    mean: Tensor  # (1+m, N) mean_y of r, then of each g_j
    spread: float  # mean_x (max_y r − min_y r)
    reach: Array  # (m,) mean_x max_y g − E_ref[g]: the largest margin of each constraint alone
    unit: Array  # (m,) mean_x (max_y g − min_y g) + |b|: the natural unit of h; never 0


class Point(NamedTuple):
    """The dual at one λ."""
    lam: Array  # (m,) λ
    value: float  # D(λ) − E_ref[r]
    grad: Array  # (m,) ∇D(λ)
    hessian: Array  # (m, m) ∇²D(λ)
    gain: Tensor  # (m, N) E_π_λ[g_j|x] − mean_y g_j


def centred(problem):
    """r (n, K) and g (m, n, K) less their means over y, n prompts at a time, in the same memory.

    What the responses of a prompt share moves no π_λ. So from here on E_ref[r] = 0 and h = g − b.
    """
    N, K = problem.scores[0].shape
    n = max(1, CHUNK * torch.get_num_threads() // K)
    memory = problem.mean.new_empty(len(problem.scores), min(n, N), K)
    for begin in range(0, N, n):
        some = slice(begin, begin + n)
        scores = memory[:, :N - begin]
        for score, mean, out in zip(problem.scores, problem.mean, scores):
            torch.sub(score[some], mean[some, None], out=out)
        yield scores[0], scores[1:]


def tilt(r, g, lam, beta):
    """π_λ(y|x) ∝ exp((r + ⟨λ,g⟩)/β) (n, K), in r's memory, and ln of its normaliser (n,)."""
    scale = beta * LN_2  # exp(x/β) = 2^(x/scale), and exp2 is twice as fast as exp
    z = r.div_(scale)
    for slope, plane in zip((lam / scale).tolist(), g):
        z.add_(plane, alpha=slope)  # (r + ⟨λ,g⟩)/scale
    top = z.amax(1, keepdim=True)  # (n, 1)
    p = z.sub_(top).exp2_()
    total = p.sum(1, keepdim=True)  # (n, 1)
    return p.div_(total), top[:, 0] * LN_2 + total[:, 0].log()


def evaluate(problem, lam):
    """The three equations at λ (m,), in one pass over the responses."""
    log_sums, gains = [], []
    second = 0
    for r, g in centred(problem):
        p, log_sum = tilt(r, g, lam, problem.beta)
        weighted = g * p  # (m, n, K)
        log_sums.append(log_sum)
        gains.append(weighted.sum(2))  # (m, n)
        second += weighted.flatten(1) @ g.flatten(1).T  # Σ_x E_π_λ[g·gᵀ]
    gain = torch.cat(gains, dim=1)
    covariance = (second - gain @ gain.T) / gain.size(1)  # (m, m)

    log_mean = torch.cat(log_sums).mean().item() - problem.log_count
    value = problem.beta * log_mean - lam @ problem.margin  # D(λ) − E_ref[r]
    grad = gain.mean(1).cpu().numpy() - problem.margin  # ∇D(λ) = E_π_λ[h]
    hessian = covariance.cpu().numpy() / problem.beta  # ∇²D(λ) = mean_x Cov/β
    return Point(lam, value, grad, hessian, gain)


def newton_step(point, damp):
    """The next λ ≥ 0: about the minimum of ⟨∇D,e⟩ + ⟨e,(∇²D + damp)e⟩/2, the model of D.

    An entry is free if it is > 0, or 0 with D falling as it grows; the others are pinned at 0.
    Where the minimum over the free entries is below 0, pin those entries too, and repeat.
    """
    matrix = point.hessian + np.diag(damp + SINGULAR * point.hessian.diagonal())
    free = (point.lam > 0) | (point.grad < 0)
    while True:
        rows = np.where(free[:, None], matrix, np.eye(len(free)))  # pinned entries end at 0
        lam = point.lam + np.linalg.solve(rows, np.where(free, -point.grad, -point.lam))
        if (lam[free] >= 0).all():
            return np.where(free, lam, 0.0)
        free = free & (lam >= 0)


def minimise(problem, start, limit):
    """Newton's method from λ = start: the Point where it ends and the evaluations it took.

    Raises Infeasible with a proof, FloatingPointError after `limit` evaluations.
    """
    beta, unit = problem.beta, problem.unit
    radius = AMPLE * (problem.spread + beta)  # of a step, in units of r
    floor = -problem.spread - beta * problem.log_count  # D(λ) ≥ R(λ) + floor
    point = evaluate(problem, start)
    for evaluations in range(1, limit + 1):
        # rounding r + ⟨λ,h⟩ by `noise` moves π_λ by a share noise/β, and ∇D by that much of h
        noise = ROUNDING * (problem.spread + beta + point.lam @ unit)
        if point.value < floor - noise:
            raise Infeasible(problem, point.lam)
        wrong = np.where(point.lam > 0, point.grad, np.minimum(point.grad, 0)) / unit  # KKT: all 0
        if abs(wrong).max() <= TOLERANCE + min(noise / beta, MOST_NOISE):
            return point, evaluations

        # the step, which `damp` keeps within 2·radius
        damp = np.linalg.norm(wrong) / radius + ROUNDING / beta
        lam = newton_step(point, damp * unit ** 2)
        step = lam - point.lam
        length = np.linalg.norm(step * unit)
        promised = -(point.grad @ step + step @ point.hessian @ step / 2)

        # whether to take it
        trial = evaluate(problem, lam)
        drop = point.value - trial.value
        if drop >= ACCEPT * abs(promised) - noise:  # False for NaN
            point = trial
            if drop >= GOOD * promised:
                radius = max(radius, AMPLE * length)
        else:
            radius = min(radius, length) / SHRINK
    raise FloatingPointError(
        f"no convergence: margin {problem.margin.tolist()}, beta {beta}: gradient "
        f"{point.grad.tolist()} at lam {point.lam.tolist()} after {limit} evaluations; "
        "use a larger beta")


def solve(score, constraint, margin, beta):
    """λ* and its predictions, a Dual, from score (N, K), constraint (N, K) or (m, N, K), margin b
    (a number or (m,)) and beta.

    Raises Infeasible with a certificate when no policy on these samples meets the margins,
    FloatingPointError without convergence, ValueError on bad input.
    """
    problem = prepare(score, constraint, margin, beta)
    over = problem.margin - problem.reach > 10 * ROUNDING * problem.unit
    if over.any():  # out of reach alone
        raise Infeasible(problem, 1.0 * over)
    start = np.zeros(len(problem.margin))
    try:
        point, evaluations = minimise(problem, start, LIMIT)
    except FloatingPointError:
        point, evaluations = continuation(problem, start)
    return predict(problem, point, evaluations)


def continuation(problem, lam):
    """For small β, D is nearly piecewise linear: find λ* for a β as large as the spread of the
    scores, and follow it down to the asked one."""
    evaluations = LIMIT  # those in vain
    betas = [problem.beta]
    while betas[-1] < problem.spread:
        betas.append(4 * betas[-1])
    for beta in reversed(betas):
        point, more = minimise(problem._replace(beta=beta), lam, FOLLOWING_LIMIT)
        lam = point.lam
        evaluations += more
    return point, evaluations


ROUNDING = 1e-15  # relative, of a sum of a few numbers
SINGULAR = 1e-13  # relative damping: collinear constraints make ∇²D singular
TINY = 1e-100  # keeps a division by 0 away
TOLERANCE = 3e-11  # largest violation of KKT, in units of h
MOST_NOISE = 1e-8  # in addition, where rounding explains it
LIMIT = 40  # most evaluations
FOLLOWING_LIMIT = 400  # for each β on the way
AMPLE = 8  # first radius / (spread of the scores + β); next radius / length of a good step
SHRINK = 5  # length of a refused step / next radius
ACCEPT = 1e-3  # least share of the promised drop of D
GOOD = 0.7  # share of it that makes a step a good one
LN_2 = 0.6931471805599453
CHUNK = 2 ** 17  # responses per thread whose numbers stay in its cache

# ---- 2. the input


class Infeasible(ValueError):
    """No policy on these samples meets the margins: `direction` d ≥ 0 (m,) is the proof,
    mean_x max_y ⟨d,h⟩ < 0. `reachable` (m,): the largest margin of each constraint alone."""

    def __init__(self, problem, direction):
        together = "" if (problem.margin > problem.reach).any() else "together "
        super().__init__(
            f"margin {problem.margin.tolist()} is {together}out of reach on these samples: the "
            f"largest reachable, of each constraint alone, is {problem.reach.tolist()}; lower the "
            "margin or sample more responses per prompt")
        self.direction = torch.from_numpy(direction / direction.sum())
        self.reachable = torch.from_numpy(problem.reach)


def prepare(score, constraint, margin, beta):
    """The Problem of this input; ValueError in one line where it is not one."""
    score = torch.as_tensor(score).detach()
    constraint = torch.as_tensor(constraint).detach().to(score.device)
    constraint = constraint if constraint.ndim == 3 else constraint[None]  # (m, N, K)
    if constraint.ndim != 3 or constraint.shape[1:] != score.shape or constraint.numel() == 0:
        raise ValueError(
            f"score has shape {tuple(score.shape)} and constraint {tuple(constraint.shape)}: they "
            "must be (N, K) and (N, K) or (m, N, K) with N, K, m >= 1")
    scores = [score, *constraint]
    low = torch.stack([x.amin(1) for x in scores])  # (1+m, N) like the next two
    high = torch.stack([x.amax(1) for x in scores])
    mean = torch.stack([x.mean(1, dtype=torch.float64) for x in scores])
    mean = mean.clamp(low, high)  # so that a constant is centred on exactly 0
    bad = (~mean.isfinite()).nonzero()  # (.., 2)
    if len(bad):
        row, prompt = bad[0].tolist()
        name = f"constraint {row - 1}" if row else "score"
        raise ValueError(f"{name}: NaN or inf at prompt {prompt}; drop or repair it")
    beta = float(beta)
    if not TINY < beta < np.inf:
        raise ValueError(f"beta is {beta}: it must be a finite number above {TINY}")
    margin = one_each(margin, len(constraint))

    width = (high.double() - low).mean(1).cpu().numpy()  # (1+m,)
    reach = (high - mean)[1:].mean(1).cpu().numpy()
    return Problem(
        scores=scores,
        margin=margin,
        beta=beta,
        log_count=np.log(score.size(1)),
        mean=mean,
        spread=width[0],
        reach=reach,
        unit=width[1:] + abs(margin) + TINY)


def one_each(margin, m):
    """One finite number, or m -> (m,) float64."""
    margin = torch.as_tensor(margin, dtype=torch.float64).flatten().cpu().numpy()
    if len(margin) not in (1, m) or not np.isfinite(margin).all():
        raise ValueError(
            f"margin is {margin.tolist()}: give one finite number, or one per constraint ({m})")
    return margin * np.ones(m)


# ---- 3. predictions

FEW = 5  # effective sample size that makes solve() warn


class Dual(NamedTuple):
    """λ*, how sure it is, and what the policy trained with it will get."""
    lam: Tensor  # (m,) λ* ≥ 0
    lam_se: Tensor  # (m,) its standard error, 0 where λ* is 0; if collinear, of the shortest λ*
    value: float  # D(λ*)
    grad: Tensor  # (m,) E_π_λ[h]: 0 where λ* > 0, else ≥ 0
    hessian: Tensor  # (m, m) ∇²D(λ*)
    iterations: int  # evaluations of (D, grad, hessian)
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
    score_gains, squares = [], []
    for r, g in centred(problem):
        score = r.clone()
        p, _ = tilt(r, g, point.lam, problem.beta)
        score_gains.append(score.mul_(p).sum(1))  # (n,) E_π_λ[r|x] − mean_y r
        squares.append(p.square_().sum(1))  # (n,)
    gain, gain_se = clustered(torch.cat([torch.cat(score_gains)[None], point.gain]))  # (1+m,)
    ref, ref_se = clustered(problem.mean)  # (1+m,) likewise
    score_gain = gain[0].item()
    ess_x = 1 / torch.cat(squares)  # (N,)
    # D = E_π_λ[r] + ⟨λ,∇D⟩ − β·KL(π_λ‖π_ref), here both sides without E_ref[r]
    kl = (score_gain + point.lam @ point.grad - point.value) / problem.beta
    ess = ess_x.mean().item()
    K = problem.scores[0].size(1)
    if ess < FEW < K:  # which no error bar shows
        warnings.warn(
            f"effective sample size {ess:.1f} of {K} responses per prompt: gains come out too "
            "small, lam* too large, beyond their error bars; sample more of them, raise beta or "
            "lower the margin", stacklevel=3)

    tensor = problem.mean.new_tensor  # on the device of the scores
    lam = tensor(point.lam)
    active = point.lam > 0
    inverse = np.linalg.pinv(point.hessian * np.outer(active, active), hermitian=True)
    _, lam_se = clustered(tensor(inverse) @ point.gain)  # of H⁻¹ψ
    return Dual(
        lam=lam,
        lam_se=lam_se.where(lam > 0, 0),  # not the NaN of one prompt
        value=float(point.value) + ref[0].item(),
        grad=tensor(point.grad),
        hessian=tensor(point.hessian),
        iterations=evaluations,
        score_gain=score_gain,
        score_gain_se=gain_se[0].item(),
        constraint_gain=tensor(point.grad + problem.margin),
        constraint_gain_se=gain_se[1:],
        ref=ref[1:],
        ref_se=ref_se[1:],
        reachable=tensor(problem.reach),
        kl=max(0.0, float(kl)),
        ess=ess,
        ess_p5=ess_x.quantile(0.05, interpolation="lower").item())


def clustered(psi):
    """Mean over prompts of each row of ψ (k, N), and its standard error: (k,), (k,)."""
    variance, mean = torch.var_mean(psi, dim=1, correction=0)
    return mean, (variance / (psi.size(1) - 1)).sqrt()  # NaN for one prompt


# ---- here the part to paste ends

# ---- 4. what else one asks of the dual, and the command line


def reachable(constraint):
    """The largest margin (m,) of each constraint (N, K) or (m, N, K) alone: mean_x max_y g_j −
    E_ref[g_j]."""
    g = torch.as_tensor(constraint)
    reach = (g.amax(-1) - g.mean(-1, dtype=torch.float64)).mean(-1)
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
