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

Convergence. With u_j the natural unit of h_j, λ_j moves by e_j/u_j, e in units of r, to the minimum
of D's quadratic model plus damp·‖e‖²/2, cut off at λ = 0. damp = v/radius, v the norm of the
violation of KKT: without the cut, a step that lowers the model has ‖e‖ ≤ 2·radius. One that lowers
D by too little of its slope is refused, and shrinks radius, which ends in short steps down the
projected gradient; any other doubles it. Near λ* v vanishes, and convergence is quadratic where ∇²D
is regular. What has not converged raises.

Infeasible margins let D fall for ever. With the recession function R(d) = mean_x max_y ⟨d,h⟩,
D(λ) ≥ R(λ) + mean_x min_y r − β ln K. A λ where D is below the last two terms, or E_ref[r] −
mean_x (max_y r − min_y r) − β ln K, which is less, has R(λ) < 0: the proof that no policy on these
samples meets the margins.

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
import re
import sys

import torch

from data import replace_file

# ---- here the part to paste begins: from here to its end, copied below `import torch`, it runs
# alone in another project
import math
import warnings
from typing import NamedTuple

import numpy as np  # for what has m entries: a fifth of torch's overhead
from torch import Tensor

Array = np.ndarray

# ---- 1. the method


class Problem(NamedTuple):
    """Checked input, and its statistics over the responses y of a prompt x (by prepare)."""
    parts: list  # of (1+m, n, K): r, then each g_j, less their means; n prompts at a time
    mean: Tensor  # (1+m, N) mean_y of each: what all responses share moves no π_λ
    margin: Array  # (m,) b
    beta: float
    spread: float  # mean_x (max_y r − min_y r)
    unit: Array  # (m,) mean_x (max_y g − min_y g) + |b|: the natural unit of h; never 0
    reach: Array  # (m,) mean_x max_y g − E_ref[g]: the largest margin of each constraint alone


class Point(NamedTuple):
    """The dual at one λ."""
    lam: Array  # (m,) λ
    value: float  # D(λ) − E_ref[r]
    grad: Array  # (m,) ∇D(λ)
    hessian: Array  # (m, m) ∇²D(λ)
    gains: Tensor  # (1+m, N) E_π_λ[f|x] − mean_y f, for f = r and g_j: from its second row on ψ
    norms: Tensor  # (N,) the root of Σ_y π_λ(y|x)²


def evaluate(problem, lam):
    """The three equations at λ (m,), in one pass over the responses. As the scores are centred,
    E_ref[r] = 0 and h = g − b here."""
    beta = problem.beta
    log_sums, gains, norms = [], [], []
    second = 0
    slopes = problem.mean.new_tensor([1, *lam]) / beta  # (1+m,)
    for part in problem.parts:
        z = torch.tensordot(slopes, part, 1)  # (n, K) (r + ⟨λ,g⟩)/β
        top = z.amax(1, keepdim=True)  # (n, 1)
        p = z.sub_(top).exp_()  # in place: fresh memory takes longer than a softmax
        total = p.sum(1, keepdim=True)  # (n, 1)
        p.mul_(1 / total)  # π_λ(y|x)
        weighted = part * p  # (1+m, n, K)
        log_sums.append(top + total.log())  # (n, 1) ln Σ_y exp((r + ⟨λ,g⟩)/β)
        gains.append(weighted.sum(2))  # (1+m, n)
        norms.append(p.norm(dim=1))  # (n,)
        second += weighted[1:].flatten(1) @ part[1:].flatten(1).T  # Σ_x E_π_λ[g·gᵀ]
    gains = torch.cat(gains, dim=1)
    gain = gains[1:]  # (m, N)
    hessian = (second - gain @ gain.T) / gain.size(1) / beta  # ∇²D(λ) = mean_x Cov/β
    log_mean = torch.cat(log_sums).mean().item() - math.log(p.size(1))
    value = beta * log_mean - lam @ problem.margin  # D(λ) − E_ref[r]
    grad = gain.mean(1).cpu().numpy() - problem.margin  # ∇D(λ) = E_π_λ[h]
    return Point(lam, value, grad, hessian.cpu().numpy(), gains, torch.cat(norms))


def minimise(problem, lam, limit):
    """Newton's method from λ: the Point where it ends, and after how many evaluations.

    Raises Infeasible with a proof, FloatingPointError where a β on the way does not converge.
    """
    beta, unit = problem.beta, problem.unit
    radius = AMPLE * (problem.spread + beta)  # of a step, in units of r
    point = evaluate(problem, lam)
    # D(λ) − E_ref[r] ≥ R(λ) + least
    least = -problem.spread - beta * math.log(problem.parts[0].size(2))
    for evaluations in range(1, limit + 1):
        # rounding r + ⟨λ,h⟩ by `noise` moves π_λ by a share noise/β, and ∇D by that much of h
        noise = ROUNDING * (problem.spread + beta + point.lam @ unit)
        if point.value < least - noise:
            raise Infeasible(problem, point.lam)
        free = (point.lam > 0) | (point.grad < 0)  # may move; the others are best at 0
        wrong = free * point.grad / unit  # KKT: all 0
        if abs(wrong).max() <= TOLERANCE + min(noise / beta, MOST_NOISE):
            return point, evaluations
        damp = np.linalg.norm(wrong) / radius + ROUNDING / beta  # which keeps the step near radius
        # the minimum over e of ⟨∇D,e⟩ + ⟨e,(∇²D + damp)e⟩/2, the model of D, cut off at λ = 0
        matrix = point.hessian * np.outer(free, free) + np.diag(damp * unit ** 2)
        newton = np.linalg.solve(matrix, free * point.grad)
        trial = evaluate(problem, np.maximum(point.lam - newton, 0))
        step = trial.lam - point.lam
        slope = -point.grad @ step  # the model promises about half of it
        drop = point.value - trial.value
        if drop >= ACCEPT * abs(slope) - noise:  # False for NaN
            point = trial
            radius *= GROW
        else:
            radius = min(radius, np.linalg.norm(step * unit)) / SHRINK
    if limit == LIMIT and beta < problem.spread:  # a first try at this β
        # for small β, D is nearly piecewise linear: follow λ* down from a larger one
        easier, more = minimise(problem._replace(beta=4 * beta), lam, LIMIT)
        point, last = minimise(problem, easier.lam, 10 * LIMIT)
        return point, evaluations + more + last
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
        raise Infeasible(problem, over)
    point, evaluations = minimise(problem, np.zeros(len(over)), LIMIT)
    return predict(problem, point, evaluations)


ROUNDING = 1e-15  # relative, of a sum of a few numbers
TINY = 1e-100  # keeps a division by 0 away
TOLERANCE = 3e-11  # largest violation of KKT, in units of h
MOST_NOISE = 1e-8  # in addition, where rounding explains it
LIMIT = 40  # most evaluations; ten times as many for each β on the way
AMPLE = 8  # first radius / (spread of the scores + β)
GROW = 2  # of radius, after a step that is taken
SHRINK = 5  # length of a refused step / the largest next radius
ACCEPT = 1e-3  # least drop of D / slope
CHUNK = 2 ** 17  # responses at a time, about: more would not fit a CPU's cache

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


@torch.no_grad()
def prepare(score, constraint, margin, beta):
    """The Problem of this input; ValueError in one line where it is not one."""
    beta = float(beta)
    if not TINY < beta < math.inf:
        raise ValueError(f"beta is {beta}: it must be a finite number above {TINY}")
    score = torch.as_tensor(score)
    constraint = torch.as_tensor(constraint, device=score.device)
    if constraint.ndim == 2:
        constraint = constraint[None]  # (m, N, K)
    if constraint.ndim != 3 or constraint.shape[1:] != score.shape or constraint.numel() == 0:
        raise ValueError(
            f"score has shape {tuple(score.shape)} and constraint {tuple(constraint.shape)}: they "
            "must be (N, K) and (N, K) or (m, N, K) with N, K, m >= 1")
    scores = score.new_empty(1 + len(constraint), *score.shape, dtype=torch.float64)
    scores[0] = score
    scores[1:] = constraint  # (1+m, N, K), the only copy
    low = scores.amin(2)  # (1+m, N)
    high = scores.amax(2)
    mean = scores.mean(2).clamp(low, high)  # exact where all are equal
    for row, prompt in (~mean.isfinite()).nonzero().tolist():
        raise ValueError(f"{name_of(row)}: NaN or inf at prompt {prompt}; drop or repair it")
    margin = one_each(margin, len(constraint))
    spread, *width = (high - low).mean(1).tolist()
    reach = (high - mean)[1:].mean(1).cpu().numpy()
    parts = scores.sub_(mean[..., None]).split(1 + CHUNK // scores.size(2), dim=1)
    return Problem(parts, mean, margin, beta, spread, width + abs(margin) + TINY, reach)


def name_of(row):
    return f"constraint {row - 1}" if row else "score"


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
    gain, gain_se = clustered(point.gains)  # (1+m,)
    ref, ref_se = clustered(problem.mean)  # (1+m,) likewise
    ess = point.norms ** -2  # (N,)
    few, K = ess.mean().item(), problem.parts[0].size(2)
    if few < FEW < K:  # which no error bar shows
        warnings.warn(
            f"effective sample size {few:.1f} of {K} responses per prompt: gains come out too "
            "small, lam* too large, beyond their error bars; sample more of them, raise beta or "
            "lower the margin", stacklevel=3)

    for row, most in enumerate([problem.spread, *problem.reach]):
        if most == 0:
            warnings.warn(f"{name_of(row)} is the same for all responses to a prompt: no policy "
                          "changes it", stacklevel=3)

    tensor = problem.mean.new_tensor  # on the device of the scores
    lam = tensor(point.lam)
    active = point.lam > 0
    inverse = np.linalg.pinv(point.hessian * np.outer(active, active), hermitian=True)
    _, lam_se = clustered(tensor(inverse) @ point.gains[1:])  # of H⁻¹ψ
    score_gain = gain[0].item()
    # D = E_π_λ[r] + ⟨λ,∇D⟩ − β·KL(π_λ‖π_ref), here both sides without E_ref[r]
    kl = (score_gain + point.lam @ point.grad - point.value) / problem.beta
    return Dual(
        lam=lam,
        lam_se=lam_se.where(lam > 0, 0),  # not the NaN of one prompt
        value=float(point.value) + ref[0].item(),
        grad=tensor(point.grad),
        hessian=tensor(point.hessian),
        iterations=evaluations,
        score_gain=score_gain,
        score_gain_se=gain_se[0].item(),
        constraint_gain=gain[1:],
        constraint_gain_se=gain_se[1:],
        ref=ref[1:],
        ref_se=ref_se[1:],
        reachable=tensor(problem.reach),
        kl=max(0.0, float(kl)),
        ess=few,
        ess_p5=ess.quantile(0.05, interpolation="lower").item())


def clustered(psi):
    """Mean over prompts of each row of ψ (k, N), and its standard error: (k,), (k,)."""
    error = psi.std(1, correction=0) / math.sqrt(psi.size(1) - 1)  # NaN for one prompt
    return psi.mean(1), error


# ---- here the part to paste ends

# ---- 4. what else one asks of the dual, and the command line


def reachable(constraint):
    """(m,): the largest margin of each constraint (m, N, K) alone, mean_x max_y g − E_ref[g]."""
    problem = prepare(torch.zeros(constraint.shape[-2:]), constraint, 0.0, 1.0)
    return torch.from_numpy(problem.reach)


NEGATIVE = re.compile("-[^-h]")  # for argparse: -5% and -0.1,0.5 are values too, not flags


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


def read_npz(path, beta):
    """The arrays of an npz by name, and what they say: score (N, K) and constraint (m, N, K), by
    these names or, from PeCAN's log-probabilities, log-ratios times β, in the units of r and g."""
    try:
        data = dict(np.load(path))  # which runs no code: numpy allows pickles only where asked
    except Exception as error:  # numpy raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: not a readable npz file of numbers ({error})") from None
    for names in ["score", "constraint"], ["ref_logp", "logp_r", "logp_g"]:
        if data.keys() >= set(names):
            break
    else:
        raise ValueError(f"{path} holds {sorted(data)}: it needs score and constraint, or {names}")
    shape = data[names[0]].shape
    for name in names:
        x = data[name]
        numbers = x.size and x.dtype.kind in "fiu" and np.isfinite(x).all()
        if not numbers or x.ndim not in (2, 3) or x.shape[-2:] != shape:
            raise ValueError(
                f"{path}: {name} is of {x.dtype} and {x.shape}, {names[0]} of {shape}; expected "
                "finite real numbers (N, K), of the constraints also (m, N, K), m, N, K >= 1")
    *ref, score, constraint = [np.float64(data[name]) for name in names]
    if ref:
        score = beta * (score - ref[0])
        constraint = beta * (constraint - ref[0])
    return data, score, constraint.reshape(-1, *shape)


def report(args):
    """Everything the command line prints."""
    beta = args.beta
    data, score, constraint = read_npz(args.scores, beta)
    problem = prepare(score, constraint, 0.0, beta)  # what is wrong with these is said first
    margin = parse_margin(args.margin, problem.reach)
    d = solve(score, constraint, margin, beta)
    if args.write:
        for name in data.keys() & {"file", "allow_pickle"}:
            raise ValueError(f"{args.scores}: numpy cannot write an array that is named {name}, of "
                             f"{data[name].shape}; rename it")
        data["s"] = score + np.tensordot(d.lam, constraint, 1)  # (N, K) r + ⟨λ*,g⟩
        replace_file(args.write, lambda file: np.savez(file, **data))
    if args.json:
        text = json.dumps({"margin": margin, "beta": beta, **d._asdict()},
                          default=torch.Tensor.tolist)
        print(re.sub("NaN|-?Infinity", "null", text))
        return
    text = (f"{len(score)} prompts x {score.shape[1]} responses, beta {beta:g}; "
            "+-: 95% interval over prompts\n")
    for j, b in enumerate(margin):
        text += (f"constraint {j}: margin {b:.4g} of at most {d.reachable[j]:.4g}   "
                 f"lam* {d.lam[j]:.4g} +- {1.96 * d.lam_se[j]:.4g}   "
                 f"gain {d.constraint_gain[j]:.4g} +- {1.96 * d.constraint_gain_se[j]:.4g}\n")
    text += (f"score gain {d.score_gain:.4g} +- {1.96 * d.score_gain_se:.4g}   "
             f"KL {d.kl:.4g} nats   effective sample size {d.ess:.1f}, "
             f"5th percentile {d.ess_p5:.1f}")
    print(text.replace("nan", "unknown"))  # for one prompt


def main():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="lambda* and what it buys, before any training")
    parser._negative_number_matcher = NEGATIVE
    parser.add_argument(
        "scores", help="npz: score (N, K) and constraint (N, K) or (m, N, K), or PeCAN's ref_logp, "
        "logp_r (N, K) and logp_g (N, K) or (m, N, K)")
    parser.add_argument(
        "--margin", required=True, help="least gain in g: 0.5, or 50%% of the largest reachable "
        "one; one for all constraints, or comma separated")
    parser.add_argument("--beta", type=float, required=True, help="strength of the KL term")
    parser.add_argument(
        "--write", help="npz to write, for a policy that is trained elsewhere: what it read, and s "
        "= r + lam* g (N, K); P(y_1 over y_0) is the sigmoid of s_1 - s_0")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    warnings.showwarning = lambda message, *_, **__: sys.stderr and print(
        f"dual.py: warning: {message}", file=sys.stderr)
    try:
        report(parser.parse_args())
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        sys.exit(f"dual.py: error: {error}")


if __name__ == "__main__":
    main()
