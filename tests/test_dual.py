"""dual.py against independent truth: autograd, grids, hand-computed numbers, closed forms, Monte-Carlo coverage."""
import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dual

pytestmark = pytest.mark.filterwarnings("ignore:effective sample size")
RANDOM_PROBLEMS = int(os.environ.get("DUAL_PROBLEMS", 400))  # the full check: DUAL_PROBLEMS=10000


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dual_value(r, g, lam, b, beta):
    """D(lam) written as its definition, differentiable."""
    h = g - g.mean(dim=(1, 2))[:, None, None] - b[:, None, None]
    z = (r + torch.einsum("m,mnk->nk", lam, h)) / beta
    return beta * (z.logsumexp(dim=1) - math.log(r.shape[1])).mean()


def recession(g, d, b):
    """R(d) = mean_x max_y <d, h>, written as its definition."""
    h = g - g.mean(dim=(1, 2))[:, None, None] - b[:, None, None]
    return float(torch.einsum("m,mnk->nk", d, h).amax(dim=1).mean())


def random_problem(seed):
    """Sizes, scales over 7 decades, beta over 5, degenerate g, margins from below 0 to out of reach."""
    G = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return float(torch.rand((), generator=G)) * (high - low) + low

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=G))

    m, N, K = integer(1, 4), integer(1, 40), integer(1, 24)
    N = integer(64, 700) if uniform(0, 1) < 0.1 else N
    scale, scales = 10 ** uniform(-3, 4), torch.tensor([10 ** uniform(-3, 4) for _ in range(m)], dtype=torch.float64)
    beta = 10 ** uniform(-2, 2) if uniform(0, 1) < 0.7 else scale * 10 ** uniform(-3, 1)
    r = torch.randn(N, K, generator=G, dtype=torch.float64)
    g = torch.randn(m, N, K, generator=G, dtype=torch.float64) - uniform(-1, 1) * r
    kind = integer(0, 9)
    if kind == 0 and m > 1:
        g[1] = g[0] * (1 if uniform(0, 1) < 0.5 else -1)  # duplicated or opposite
    if kind == 1:
        g[0] = uniform(-1, 1)  # constant
    if kind == 2:
        r, g = r.round(), g.round()  # ties
    if kind == 3:
        g = g.exp()  # heavy tail
    r, g = (r + uniform(-3, 3)) * scale, g * scales[:, None, None]
    reach = dual.reachable(g)
    share = torch.tensor([uniform(-0.5, 1.1) if uniform(0, 1) < 0.9 else 1 - 10 ** uniform(-9, -3) for _ in range(m)],
                         dtype=torch.float64)
    b = reach * share / (m ** 0.5 if uniform(0, 1) < 0.5 else 1.0)
    if kind == 1:
        b[0] = uniform(-1, 1) * scales[0] if uniform(0, 1) < 0.5 else 0.0
    if kind == 4:
        b[0] = reach[0]
    return r, g, b, beta


def outcome(seed):
    """Solve one random problem and verify what it claims from the definitions. Returns 'kkt' or 'certificate'."""
    r, g, b, beta = random_problem(seed)
    try:
        d = dual.solve(r, g, b, beta)
    except dual.Infeasible as proof:
        assert (proof.direction >= 0).all()
        assert recession(g, proof.direction, b) < 0, f"{seed}: no proof"
        return "certificate"
    lam = d.lam.clone().requires_grad_()
    grad, = torch.autograd.grad(dual_value(r, g, lam, b, beta), lam)
    size = (g - g.mean(dim=2, keepdim=True)).abs().amax(dim=(1, 2))
    # double precision resolves r + <lam, h> to eps * size, and its ratio to beta is how well pi, hence grad, is known
    level = float(r.abs().max() + d.lam @ (g.abs().amax(dim=(1, 2)) + b.abs()))
    allowed = (1e-9 + 1e-14 * level / beta) * size + 1e-14 * (g.abs().amax(dim=(1, 2)) + b.abs())
    wrong = torch.where(d.lam > 0, grad, grad.clamp_max(0)).abs()
    assert (d.lam >= 0).all() and (wrong <= allowed).all(), f"seed {seed}: lam {d.lam}, grad {grad}, allowed {allowed}"
    return "kkt"


def test_random_problems_all_end_in_kkt_or_certificate():
    ends = [outcome(seed) for seed in range(RANDOM_PROBLEMS)]
    assert min(ends.count("kkt"), ends.count("certificate")) > 0.15 * RANDOM_PROBLEMS


@pytest.mark.parametrize("m", [1, 2, 4])
def test_value_gradient_hessian_against_autograd(m):
    r, g, b, beta = rand(0, 7, 9), rand(1, m, 7, 9) + 3, torch.linspace(0.1, 0.4, m, dtype=torch.float64), 0.7
    d = dual.solve(r, g, b, beta)
    f = lambda lam: dual_value(r, g, lam, b, beta)
    torch.testing.assert_close(torch.tensor(d.value, dtype=torch.float64), f(d.lam), atol=1e-12, rtol=0)
    torch.testing.assert_close(d.grad, torch.autograd.functional.jacobian(f, d.lam), atol=1e-12, rtol=0)
    torch.testing.assert_close(d.hessian, torch.autograd.functional.hessian(f, d.lam), atol=1e-11, rtol=0)


def test_by_hand():
    """One prompt, responses (r, g) = (0, 0), (0, 1), beta 1: gain sigmoid(lam) - 1/2 = 1/4 at lam = ln 3."""
    d = dual.solve([[0.0, 0.0]], [[0.0, 1.0]], 0.25, 1.0)
    assert d.lam.item() == pytest.approx(math.log(3), abs=1e-10)
    assert d.value == pytest.approx(math.log(2) - 0.75 * math.log(3), abs=1e-10)  # ln((1 + 3) / 2) - ln(3) * 3/4
    assert d.hessian.item() == pytest.approx(3 / 16, abs=1e-10)
    assert d.kl == pytest.approx(0.75 * math.log(0.75) + 0.25 * math.log(0.25) + math.log(2), abs=1e-10)
    assert d.ess == pytest.approx(1.6, abs=1e-10)
    assert d.reachable.item() == 0.5 and d.ref.item() == 0.5 and d.score_gain == pytest.approx(0, abs=1e-12)


def test_predictions_are_the_policys():
    r, g, beta = rand(0, 30, 12), rand(1, 2, 30, 12), 0.5
    d = dual.solve(r, g, [0.3, 0.6], beta)
    p = ((r + torch.einsum("m,mnk->nk", d.lam, g)) / beta).softmax(dim=1)
    assert d.score_gain == pytest.approx(float((p * r).sum(dim=1).mean() - r.mean()), abs=1e-12)
    gain = (p * g).sum(dim=2).mean(dim=1) - g.mean(dim=(1, 2))
    torch.testing.assert_close(d.constraint_gain, gain, atol=1e-12, rtol=0)
    assert d.kl == pytest.approx(float((p * (12 * p).log()).sum(dim=1).mean()), abs=1e-12)
    assert d.ess == pytest.approx(float((1 / (p ** 2).sum(dim=1)).mean()), abs=1e-10)
    assert d.ess_p5 == pytest.approx(float((1 / (p ** 2).sum(dim=1)).quantile(0.05, interpolation="lower")), abs=1e-10)


def test_lam_against_a_grid():
    r, g = rand(0, 40, 10), rand(1, 2, 40, 10)
    g[0] -= 0.5 * r
    b = torch.tensor([0.4, 0.2], dtype=torch.float64)
    lam, step = torch.tensor([2.0, 2.0], dtype=torch.float64), 0.5
    for _ in range(16):  # zoom in on the smallest of 9 x 9 points
        axis = torch.arange(-4, 5, dtype=torch.float64) * step
        points = (lam + torch.cartesian_prod(axis, axis)).clamp_min(0)
        lam = points[torch.stack([dual_value(r, g, x, b, 0.5) for x in points]).argmin()]
        step /= 2 if step > 1e-4 else 1.5
    torch.testing.assert_close(dual.solve(r, g, b, 0.5).lam, lam, atol=1e-4, rtol=0)


def test_strong_duality_with_the_primal():
    """The primal value at pi_lam* equals D(lam*), and no feasible policy that we draw does better."""
    r, g = rand(0, 6, 5), rand(1, 1, 6, 5)
    d = dual.solve(r, g, 0.5, 0.3)
    primal = d.score_gain + float(r.mean()) - 0.3 * d.kl
    assert primal == pytest.approx(d.value, abs=1e-9)
    for seed in range(50):  # tilt at random, repair the margin, compare
        p = ((r + rand(seed + 2, 1) * g[0] + 0.2 * rand(seed + 60, 6, 5)) / 0.3).softmax(dim=1)
        best = torch.nn.functional.one_hot(g[0].argmax(dim=1), 5).double()
        short = 0.5 - float(((p * g[0]).sum(dim=1) - g[0].mean(dim=1)).mean())
        gap = float(((best - p) * g[0]).sum(dim=1).mean())
        p = p + max(0.0, short / gap) * (best - p)
        assert float((p * r).sum(dim=1).mean() - 0.3 * torch.xlogy(p, 5 * p).sum(dim=1).mean()) <= primal + 1e-9


def bounded_newton(r, g, b, beta):
    """Independent truth for several constraints: the best of all active sets, each by autograd Newton with halving."""
    m, best = len(g), None
    for code in range(2 ** m):
        on = [j for j in range(m) if code >> j & 1]
        index = (torch.tensor(on, dtype=torch.long),)
        f = lambda x: dual_value(r, g, torch.zeros(m, dtype=r.dtype).index_put(index, x), b, beta)
        x = torch.zeros(len(on), dtype=torch.float64)
        for _ in range(60 if on else 0):
            grad, hess = torch.autograd.functional.jacobian(f, x), torch.autograd.functional.hessian(f, x)
            step, t = torch.linalg.solve(hess, grad), 1.0
            while f(x - t * step) > f(x) and t > 1e-9:
                t /= 2
            x = x - t * step
            if grad.abs().max() < 1e-12:
                break
        if (x >= 0).all():
            lam = torch.zeros(m, dtype=torch.float64).index_put(index, x)
            if best is None or f(x) < best[0]:
                best = (f(x), lam)
    return best[1]


def test_several_constraints_against_all_active_sets():
    inactive = 0
    for seed in range(6):
        m = 2 + 2 * (seed % 2)
        r, g = rand(seed, 15, 8), rand(100 + seed, m, 15, 8)
        b = 0.25 * dual.reachable(g) * rand(200 + seed, m).clamp(-1, 1)
        d = dual.solve(r, g, b, 0.8)
        inactive += int((d.lam == 0).sum())
        torch.testing.assert_close(d.lam, bounded_newton(r, g, b, 0.8), atol=1e-7, rtol=0)
    assert inactive > 0  # exactly 0, not small


def test_several_constraints_against_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    inactive = 0
    for seed in range(100):
        m = 2 if seed % 2 else 4
        r, g = rand(seed, 20, 10), rand(1000 + seed, m, 20, 10)
        b, beta = 0.25 * dual.reachable(g) * rand(2000 + seed, m).clamp(-1, 1), 0.5 + 0.01 * seed
        d = dual.solve(r, g, b, beta)
        h, rn = (g - g.mean(dim=(1, 2))[:, None, None] - b[:, None, None]).numpy(), r.numpy()

        def value_and_gradient(lam):
            z = (rn + np.tensordot(lam, h, axes=1)) / beta
            top = z.max(axis=1, keepdims=True)
            e = np.exp(z - top)
            s = e.sum(axis=1)
            return beta * (np.log(s / 10) + top[:, 0]).mean(), ((e / s[:, None]) * h).sum(axis=2).mean(axis=1)

        def hessian(lam):
            p = ((r + torch.einsum("m,mnk->nk", torch.as_tensor(lam), g)) / beta).softmax(dim=1)
            mean = (p * g).sum(dim=2)
            return ((torch.einsum("nk,ink,jnk->ij", p, g, g) - mean @ mean.T) / len(r) / beta).numpy()

        x = optimize.minimize(value_and_gradient, np.ones(m), jac=True, method="SLSQP", bounds=[(0, None)] * m,
                              options={"ftol": 1e-15, "maxiter": 500}).x
        x = optimize.minimize(value_and_gradient, x, jac=True, method="L-BFGS-B", bounds=[(0, None)] * m,
                              options={"ftol": 0, "gtol": 1e-11, "maxiter": 2000}).x  # polish what SLSQP found
        on = x > 1e-8
        for _ in range(2):
            x[on] -= np.linalg.solve(hessian(x)[np.ix_(on, on)], value_and_gradient(x)[1][on])
        inactive += int((~on).sum())
        np.testing.assert_allclose(d.lam.numpy(), np.where(on, x, 0), atol=1e-7)
    assert inactive > 20


def test_inactive_constraint_is_exactly_zero():
    r, g = rand(0, 50, 20), rand(1, 50, 20)
    d = dual.solve(r, g, -5.0, 0.5)
    assert d.lam.item() == 0 and d.grad.item() > 0 and d.lam_se.item() == 0


def test_nothing_is_said_where_nothing_is_wrong():
    """Whether no constraint, one or both are active."""
    r, g = rand(0, 50, 20), rand(1, 2, 50, 20)
    for margin, active in (([-5.0, -5.0], 0), ([-5.0, 0.1], 1), ([0.1, 0.1], 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            d = dual.solve(r, g, margin, 5.0)
        assert (d.lam > 0).sum() == (d.lam_se > 0).sum() == active


def test_reachable_is_its_definition_for_one_constraint_and_several():
    g = rand(0, 3, 5, 7)
    expected = [sum(max(row) - sum(map(sum, plane)) / 35 for row in plane) / 5 for plane in g.tolist()]
    assert dual.reachable(g).tolist() == pytest.approx(expected, abs=1e-12)
    for one in (g[1], g[1][None]):
        assert dual.reachable(one).flatten().tolist() == pytest.approx(expected[1:2], abs=1e-12)
    assert dual.reachable((100 * g).int()).tolist() == pytest.approx(dual.reachable((100 * g).int().double()).tolist())


def test_constant_g():
    r, g = rand(0, 5, 4), torch.full((5, 4), 0.3, dtype=torch.float64)
    assert dual.solve(r, g, 0.0, 1.0).lam.item() == 0 and dual.solve(r, g, -1.0, 1.0).lam.item() == 0
    with pytest.raises(dual.Infeasible):
        dual.solve(r, g, 0.1, 1.0)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_collinear_constraints(factor):
    r, g = rand(0, 60, 16), rand(1, 60, 16)
    one = dual.solve(r, g, 0.5, 0.5)
    two = dual.solve(r, torch.stack([g, factor * g]), [0.5, 0.5 * factor], 0.5)  # only a sum is determined
    assert float(two.lam[0] + factor * two.lam[1]) == pytest.approx(one.lam.item(), abs=1e-8)
    tighter = dual.solve(r, torch.stack([g, factor * g]), [0.5, 0.6 * factor], 0.5)
    assert tighter.lam[0] == 0 and tighter.grad[0] == pytest.approx(0.1, abs=1e-9)


def test_one_response_per_prompt():
    assert dual.solve(rand(0, 4, 1), rand(1, 4, 1), 0.0, 1.0).lam.item() == 0
    with pytest.raises(dual.Infeasible):
        dual.solve(rand(0, 4, 1), rand(1, 4, 1), 0.1, 1.0)


def test_huge_scores_and_small_beta():
    r, g = 1e4 * rand(0, 30, 12), 1e4 * rand(1, 2, 30, 12)
    b = 0.5 * dual.reachable(g) * torch.tensor([1.0, 0.5], dtype=torch.float64)
    d = dual.solve(r, g, b, 1e-2)
    assert (torch.where(d.lam > 0, d.grad, d.grad.clamp_max(0)).abs() <= 1e-9 * 1e4).all() and (d.lam > 0).any()


@pytest.mark.parametrize("share", [1 - 1e-6, 1 - 1e-9])
def test_margin_close_to_the_largest_reachable(share):
    r, g = rand(0, 40, 16), rand(1, 40, 16)
    b = share * dual.reachable(g)
    d = dual.solve(r, g, b, 0.5)
    assert d.grad.abs().item() < 1e-9 and d.lam.item() > 10
    with pytest.raises(dual.Infeasible):
        dual.solve(r, g, (2 - share) * dual.reachable(g), 0.5)


def test_certificate_when_only_together_out_of_reach():
    r, g = rand(0, 40, 16), rand(1, 40, 16)
    g = torch.stack([g, -g])
    b = 0.6 * dual.reachable(g)  # each alone is easy
    with pytest.raises(dual.Infeasible, match="largest reachable, of each constraint alone, is .* lower the margin") as caught:
        dual.solve(r, g, b, 0.5)
    assert recession(g, caught.value.direction, b) < 0 and (caught.value.direction >= 0).all()
    torch.testing.assert_close(caught.value.reachable, dual.reachable(g))
    assert "\n" not in str(caught.value) and "lower the margin" in str(caught.value)


def test_input_kinds():
    r, g = rand(0, 300, 40).float(), rand(1, 300, 40).float()
    d = dual.solve(r.double(), g.double(), 0.4, 0.5)
    for x, y in ((r, g), (r.numpy(), g.numpy()), (r.double().numpy(), g), (r.T.contiguous().T, g)):
        e = dual.solve(x, y, 0.4, 0.5)
        assert e.lam.dtype == torch.float64 and e.lam.item() == pytest.approx(d.lam.item(), abs=1e-10)
    half = dual.solve(r.bfloat16(), g.bfloat16(), np.array([0.4]), 0.5)
    exact = dual.solve(r.bfloat16().double(), g.bfloat16().double(), 0.4, 0.5)
    assert half.lam.item() == pytest.approx(exact.lam.item(), abs=1e-10)
    if torch.cuda.is_available():
        e = dual.solve(r.cuda(), g.cuda(), 0.4, 0.5)
        assert e.lam.is_cuda and e.lam.item() == pytest.approx(d.lam.item(), abs=1e-9)


def test_it_takes_at_most_8_evaluations():
    for seed, (beta, share) in enumerate([(0.1, 0.1), (0.1, 0.5), (0.1, 0.9), (1.0, 0.3), (1.0, 0.8)]):
        r = 3 * rand(seed, 1000, 64)
        for m in (1, 2, 4):
            g = rand(50 + seed, m, 1000, 64) - 0.1 * r
            d = dual.solve(r, g, share / m ** 0.5 * dual.reachable(g), beta)
            assert d.iterations <= 8 and torch.where(d.lam > 0, d.grad, d.grad.clamp_max(0)).abs().max() < 1e-9


def test_coverage_of_the_error_bars():
    """Truth from 200,000 prompts of the same world; 95 % intervals of 600 samples must cover 92 to 97.5 %."""
    def world(N, seed):
        gen = torch.Generator().manual_seed(seed)
        u = torch.randn(N, 2, generator=gen, dtype=torch.float64)
        kind = torch.rand(N, 1, generator=gen, dtype=torch.float64)
        e = torch.randn(2, N, 12, generator=gen, dtype=torch.float64)
        r = e[0] * (0.5 + kind) + u[:, :1]
        return r, e[1] - 0.5 * e[0] * kind + u[:, 1:]

    R, G = world(200_000, 0)
    beta, b = 1.0, 0.4
    lam = dual.solve(R, G, b, beta).lam.item()

    def truth(x):  # gains of the policy trained with lam = x, and E_ref[g]
        p = ((R[:50_000] + x * G[:50_000]) / beta).softmax(dim=1)
        return [float(((p - 1 / 12) * x[:50_000]).sum(dim=1).mean()) for x in (R, G)]

    grid = np.linspace(max(0.0, lam - 0.8), lam + 0.8, 33)
    table = np.array([truth(x) for x in grid])  # smooth in lam: interpolate
    hits = {"lam": 0, "score": 0, "constraint": 0, "ref": 0}
    for seed in range(1, 601):
        d = dual.solve(*world(150, seed), b, beta)
        x = d.lam.item()
        hits["lam"] += abs(x - lam) <= 1.96 * d.lam_se.item()
        hits["score"] += abs(d.score_gain - np.interp(x, grid, table[:, 0])) <= 1.96 * d.score_gain_se
        error = abs(d.constraint_gain.item() - np.interp(x, grid, table[:, 1]))
        hits["constraint"] += error <= 1.96 * d.constraint_gain_se.item()
        hits["ref"] += abs(d.ref.item() - float(G.mean())) <= 1.96 * d.ref_se.item()
    assert all(0.92 <= count / 600 <= 0.975 for count in hits.values()), hits


def test_the_papers_setting_has_an_effective_sample_size_near_one():
    r, g = 3 * rand(0, 1000, 128), 3 * rand(1, 1000, 128)
    with pytest.warns(UserWarning, match="effective sample size 1.. of 128 .* raise beta"):
        d = dual.solve(r, g, 0.3 * dual.reachable(g), 0.1)
    assert d.ess < 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dual.solve(r, g, 0.05 * dual.reachable(g), 30.0)


@pytest.mark.parametrize("beta, gap", [(1.0, 1e-5), (0.1, 1e-6), (0.01, 1e-5)])
def test_margins_a_little_out_of_reach_together_are_never_called_solved(beta, gap):
    g = rand(1, 40, 16)
    with pytest.raises(dual.Infeasible) as caught:
        dual.solve(rand(0, 40, 16), torch.stack([g, -g]), [0.3, -0.3 + gap], beta)
    b = torch.tensor([0.3, -0.3 + gap], dtype=torch.float64)
    assert recession(torch.stack([g, -g]), caught.value.direction, b) < 0


def test_the_array_with_a_nan_is_named():
    g = rand(1, 2, 4, 5)
    g[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match="constraint 1: NaN or inf at prompt 3"):
        dual.solve(rand(0, 4, 5), g, 0.1, 1.0)


BAD = [
    (dict(beta=0.0), "beta is 0.0"), (dict(beta=math.nan), "beta is nan"), (dict(margin=math.inf), "margin is"),
    (dict(margin=[0.1, 0.2]), "margin is"), (dict(score=torch.zeros(3)), "score has shape"),
    (dict(constraint=torch.zeros(3, 5)), "constraint"), (dict(score=torch.full((4, 5), math.nan)), "score: NaN or inf"),
    (dict(constraint=torch.full((4, 5), math.inf)), "constraint 0: NaN or inf"),
    (dict(score=torch.zeros(0, 5)), "score has shape"),
    (dict(score=torch.zeros(0, 5), constraint=torch.zeros(0, 5)), "score has shape"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_one_line(change, message):
    good = dict(score=rand(0, 4, 5), constraint=rand(1, 4, 5), margin=0.1, beta=1.0)
    with pytest.raises(ValueError, match=message) as caught:
        dual.solve(**(good | change))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_memory_is_the_scores_in_float64_and_little_more():
    """Twice the float32 input. The peak is VmHWM's, which begins anew with a process, as ru_maxrss does not; large blocks go
    back to the system at once, else the heap's holes, which come and go, add up to 1.5 times the input."""
    script = ("import re, torch, dual\n"
              "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
              "r, g = torch.randn(50000, 200), torch.randn(50000, 200)\n"
              "dual.solve(r[:500], g[:500], 0.4, 1.0)\n"
              "before = peak()\n"
              "dual.solve(r, g, 0.4, 1.0)\n"
              "print((peak() - before) / (2 * 4e7))")
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
                         env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert 1.5 < float(out.stdout) < 2.3, out.stdout


def solver_source():
    """solve() and everything it needs from dual.py, as one would paste it: from the one marker to the other."""
    text = Path(dual.__file__).read_text()
    return text[text.index("# ---- here the part to paste begins"):text.index("# ---- here the part to paste ends")]


def test_solve_runs_pasted_alone():
    scope = {}
    exec("import torch\n" + solver_source(), scope)
    r, g = rand(0, 30, 8), rand(1, 2, 30, 8)
    assert torch.equal(scope["solve"](r, g, 0.2, 1.0).lam, dual.solve(r, g, 0.2, 1.0).lam)
    with pytest.raises(scope["Infeasible"]):
        scope["solve"](r, g, 9.0, 1.0)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs main() with these arguments: exit code, stdout, stderr."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["dual.py", *map(str, args)])
        try:
            code = dual.main() or 0
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        if isinstance(code, str):  # what the interpreter does with sys.exit("text")
            code, out = 1, out._replace(err=out.err + code + "\n")
        return code, out.out, out.err
    return call


def test_command_line(tmp_path, cli):
    r, g = rand(0, 80, 20).numpy(), rand(1, 80, 20).numpy()
    np.savez(tmp_path / "s.npz", score=r, constraint=g)
    out = json.loads(cli(tmp_path / "s.npz", "--margin", 0.5, "--beta", 1, "--json")[1])
    d = dual.solve(r, g, 0.5, 1.0)
    assert out["lam"] == pytest.approx(d.lam.tolist()) and out["kl"] == pytest.approx(d.kl) and out["margin"] == [0.5]
    text = cli(tmp_path / "s.npz", "--margin", "50%", "--beta", 1)[1]
    for word in ("lam*", "score gain", "KL", "effective sample size", "at most"):
        assert word in text
    ref = rand(2, 80, 20).numpy()
    np.savez(tmp_path / "p.npz", ref_logp=ref, logp_r=ref + r, logp_g=ref + g)  # PeCAN
    out = json.loads(cli(tmp_path / "p.npz", "--margin", 0.05, "--beta", 0.1, "--json")[1])
    assert out["lam"] == pytest.approx(d.lam.tolist()) and out["constraint_gain"] == pytest.approx([0.05])
    assert out["score_gain"] == pytest.approx(0.1 * d.score_gain)
    assert out["reachable"] == pytest.approx([0.1 * d.reachable.item()])


def test_one_prompt_has_no_error_bars(tmp_path, cli):
    np.savez(tmp_path / "s.npz", score=[[0.0, 0.0]], constraint=[[0.0, 1.0]])
    out = json.loads(cli(tmp_path / "s.npz", "--margin", 0.25, "--beta", 1, "--json")[1])
    assert out["lam"] == pytest.approx([math.log(3)]) and out["lam_se"] == [None] and out["score_gain_se"] is None
    assert "+- unknown" in cli(tmp_path / "s.npz", "--margin", 0.25, "--beta", 1)[1]


def written(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("source", ["scores", "log-probabilities"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_write_adds_s_to_what_was_read(tmp_path, cli, m, source, dtype):
    N, K, beta = 30, 9, 0.7
    r, g, ref = (rand(seed, *shape).numpy().astype(dtype) for seed, shape in ((0, (N, K)), (1, (m, N, K)), (2, (N, K))))
    g = g if m > 1 else g[0]  # one constraint may also be (N, K)
    given = (dict(score=r, constraint=g) if source == "scores" else
             dict(ref_logp=ref, logp_r=ref + r, logp_g=ref + g))
    given |= {"other": np.arange(3)}
    np.savez(tmp_path / "in.npz", **given)
    code, said, _ = cli(tmp_path / "in.npz", "--margin", "20%", "--beta", beta, "--write", tmp_path / "out.npz", "--json")
    lam = json.loads(said)["lam"]
    assert code == 0 and len(lam) == m and max(lam) > 0.05
    out = written(tmp_path / "out.npz")
    assert set(out) == {"s", *given} and all((out[name] == x).all() for name, x in given.items())
    scale = 1 if source == "scores" else beta
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    planes = g if m > 1 else [g]
    for n in range(N):
        for k in range(K):
            s = scale * float(r[n, k]) + sum(lam[j] * scale * float(planes[j][n, k]) for j in range(m))
            assert out["s"][n, k] == pytest.approx(s, abs=tolerance)


def test_write_onto_its_own_input(tmp_path, cli):
    r, g = 1e6 * rand(0, 20, 6).numpy(), rand(1, 20, 6).numpy()
    np.savez(tmp_path / "in.npz", score=r, constraint=g)
    assert cli(tmp_path / "in.npz", "--margin", -1, "--beta", 1, "--write", tmp_path / "out")[0] == 0
    out = written(tmp_path / "out")  # the name as it was given
    assert set(out) == {"score", "constraint", "s"} and np.allclose(out["s"], r, rtol=1e-9)
    assert cli(tmp_path / "out", "--margin", -1, "--beta", 1, "--write", tmp_path / "out")[0] == 0  # onto itself
    assert set(written(tmp_path / "out")) == {"score", "constraint", "s"}


def test_log_probabilities_of_another_shape_are_one_line(tmp_path, cli):
    ref, logp_r, logp_g = (rand(i, 6, 6).numpy() for i in range(3))
    np.savez(tmp_path / "in.npz", ref_logp=ref[0], logp_r=logp_r, logp_g=logp_g)  # would broadcast
    code, out, err = cli(tmp_path / "in.npz", "--margin", "10%", "--beta", 1)
    assert code == 1 and out == "" and err.count("\n") == 1 and "in.npz: ref_logp is" in err and "(6,)" in err
    np.savez(tmp_path / "in.npz", ref_logp=ref, logp_r=logp_r, logp_g=logp_g)
    for beta in ("nan", "inf", "0"):  # not what follows from it
        code, _, err = cli(tmp_path / "in.npz", "--margin", "10%", "--beta", beta)
        assert code == 1 and err.startswith(f"dual.py: error: beta is {float(beta)}: ")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int8, np.int32, np.float16, np.float32])
def test_every_real_kind_of_number_is_read(tmp_path, cli, dtype):
    r, g = np.arange(12).reshape(3, 4) % 5, np.arange(12)[::-1].reshape(3, 4) % 7
    found = []
    for kind in (np.float64, dtype):
        for names in (("score", "constraint"), ("logp_r", "logp_g")):
            np.savez(tmp_path / "in.npz", ref_logp=np.full((3, 4), 3, kind), **dict(zip(names, (r.astype(kind), g.astype(kind)))))
            code, out, _ = cli(tmp_path / "in.npz", "--margin", "30%", "--beta", 1, "--json")
            assert code == 0
            found += json.loads(out)["lam"]
    assert found[0] > 0.05 and found == pytest.approx(found[:1] * 4, rel=1e-2 if dtype == np.float16 else 1e-6)


def test_write_to_a_path_that_cannot_be_is_one_line(tmp_path, cli):
    np.savez(tmp_path / "in.npz", score=rand(0, 3, 4).numpy(), constraint=rand(1, 3, 4).numpy())
    code, out, err = cli(tmp_path / "in.npz", "--margin", "60%", "--beta", 1, "--write", tmp_path / "no" / "out.npz")
    assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("dual.py: error: ")


def test_command_line_errors_in_one_line(tmp_path, cli):
    np.savez(tmp_path / "s.npz", score=np.zeros((3, 4)), constraint=rand(1, 3, 4).numpy())
    np.savez(tmp_path / "empty.npz", other=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", score=np.array([{}]), constraint=np.zeros((3, 4)))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:300])
    (tmp_path / "void.npz").write_bytes(b"")
    np.save(tmp_path / "array.npz.npy", np.zeros((3, 4)))
    for name, shape in (("none", (0, 4)), ("void", (3, 0)), ("flat", (4,)), ("point", ()), ("four", (1, 1, 3, 4))):
        np.savez(tmp_path / f"{name}.npz", score=np.zeros((3, 4)), constraint=np.zeros(shape))
    np.savez(tmp_path / "empty_rows.npz", score=np.zeros((3, 0)), constraint=np.zeros((3, 0)))
    np.savez(tmp_path / "words.npz", score=np.zeros((3, 4)), constraint=np.full((3, 4), "a"))
    np.savez(tmp_path / "shapes.npz", ref_logp=np.zeros((3, 4)), logp_r=np.zeros((3, 5)), logp_g=np.zeros((3, 4)))
    np.savez(tmp_path / "nan.npz", score=np.zeros((3, 4)), constraint=np.full((3, 4), np.nan))
    for name in ("none", "void", "flat", "point", "four", "empty_rows", "words", "shapes", "nan"):
        for margin in (0.1, "50%"):
            code, out, err = cli(tmp_path / f"{name}.npz", "--margin", margin, "--beta", 1)
            assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("dual.py: error: "), (name, err)
    for args in (("s.npz", "--margin", 99, "--beta", 1), ("s.npz", "--margin", "x", "--beta", 1),
                 ("s.npz", "--margin", "1,2", "--beta", 1), ("s.npz", "--margin", 0.1, "--beta", 0),
                 ("empty.npz", "--margin", 1, "--beta", 1), ("none.npz", "--margin", 1, "--beta", 1),
                 ("pickle.npz", "--margin", 1, "--beta", 1), ("text.npz", "--margin", 1, "--beta", 1),
                 ("cut.npz", "--margin", 1, "--beta", 1), ("void.npz", "--margin", 1, "--beta", 1),
                 ("array.npz.npy", "--margin", 1, "--beta", 1), ("s.npz", "--margin", 0.1, "--beta", 1e-309)):
        code, out, err = cli(tmp_path / args[0], *args[1:])
        assert code in (1, 2) and out == "" and err.count("\n") == 1 and err.startswith("dual.py: error: "), (args, err)
    assert cli(tmp_path / "s.npz", "--marg", 1, "--beta", 1)[0] == 2  # no abbreviations
    run = subprocess.run([sys.executable, "dual.py", str(tmp_path / "s.npz"), "--margin", "99", "--beta", "1"],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("dual.py: error: margin [99.0]")
    assert run.stderr.count("\n") == 1 and run.stdout == ""


def test_what_write_wrote_is_read_back_right_at_any_beta(tmp_path, cli):
    """PeCAN's log-probabilities stay what they are: no score in units of the old β is left beside them."""
    ref = rand(2, 60, 9).numpy()
    np.savez(tmp_path / "a.npz", ref_logp=ref, logp_r=ref + rand(0, 60, 9).numpy(), logp_g=ref + rand(1, 60, 9).numpy())
    for beta in (0.1, 1.0):
        assert cli(tmp_path / "a.npz", "--margin", "0.1", "--beta", beta, "--write", tmp_path / "b.npz")[0] == 0
        for other in (0.1, 1.0, 3.0):
            asked = ("--margin", "20%", "--beta", other, "--json")
            assert json.loads(cli(tmp_path / "b.npz", *asked)[1]) == json.loads(cli(tmp_path / "a.npz", *asked)[1])
    assert set(written(tmp_path / "b.npz")) == {"ref_logp", "logp_r", "logp_g", "s"}


@pytest.mark.parametrize("flat", ["score", "constraint 0", "constraint 1", "all"])
def test_what_no_policy_changes_is_said(tmp_path, cli, flat):
    r, g = rand(0, 20, 1 if flat == "all" else 6), rand(1, 2, 20, 1 if flat == "all" else 6)
    if flat == "score":
        r = r[:, :1].expand(20, 6)
    elif flat != "all":
        g[int(flat[-1])] = 0.1
    np.savez(tmp_path / "a.npz", score=r.numpy(), constraint=g.numpy())
    code, _, err = cli(tmp_path / "a.npz", "--margin", 0, "--beta", 1)
    named = {"score", "constraint 0", "constraint 1"} if flat == "all" else {flat}
    assert code == 0 and err.count("no policy changes it") == len(named) and all(f"{name} is the same" in err for name in named)


def test_margins_that_are_only_together_out_of_reach_are_called_so(tmp_path, cli):
    g = rand(1, 40, 8).numpy()
    np.savez(tmp_path / "a.npz", score=rand(0, 40, 8).numpy(), constraint=np.stack([g, -g]))
    for margin, together in (("20%", True), ("0.1,0.2", True), ("99,0.1", False)):
        code, _, err = cli(tmp_path / "a.npz", "--margin", margin, "--beta", 1)
        assert code == 1 and ("together" in err) is together and "out of reach" in err


@pytest.mark.parametrize("margin", ["-5%", "-0.1", "-.1", "-1e-3"])
def test_a_margin_below_zero_is_a_value(tmp_path, cli, margin):
    np.savez(tmp_path / "a.npz", score=rand(0, 40, 8).numpy(), constraint=rand(1, 2, 40, 8).numpy())
    assert cli(tmp_path / "a.npz", "--margin", margin, "--beta", 1)[0] == 0
    assert cli(tmp_path / "a.npz", "--margin", f"{margin},0.1", "--beta", 1)[0] == 0
    for other in ("-5x", "-inf%,x", "-,5"):
        assert "expected a number in g's units" in cli(tmp_path / "a.npz", "--margin", other, "--beta", 1)[2]
    assert "give one finite number" in cli(tmp_path / "a.npz", "--margin", "-inf", "--beta", 1)[2]
    assert "expected one argument" in cli(tmp_path / "a.npz", "--margin", "--beta", 1)[2]


def test_small_scales_are_not_printed_as_nothing(tmp_path, cli):
    np.savez(tmp_path / "a.npz", score=1e-20 * rand(0, 40, 8).numpy(), constraint=1e-20 * rand(1, 40, 8).numpy())
    out = cli(tmp_path / "a.npz", "--margin", "50%", "--beta", 1e-20)[1]
    assert out.count("e-20") + out.count("e-21") >= 6


def test_narrow_and_wide_floats_are_read_alike(tmp_path, cli):
    logps = {name: -40 * rand(i, 40, 8).abs().half().numpy() for i, name in enumerate(("ref_logp", "logp_r", "logp_g"))}
    said = []
    for dtype in (np.float16, np.float32, np.float64, np.longdouble):
        np.savez(tmp_path / "a.npz", **{name: x.astype(dtype) for name, x in logps.items()})
        said.append(json.loads(cli(tmp_path / "a.npz", "--margin", "10%", "--beta", 1e-4, "--json")[1])["lam"])
    assert said == 4 * said[:1]


def test_json_stays_json_where_there_is_no_place_for_warnings(tmp_path):
    np.savez(tmp_path / "a.npz", score=40 * rand(0, 40, 8).numpy(), constraint=rand(1, 40, 8).numpy())
    line = f"{sys.executable} dual.py {tmp_path}/a.npz --margin 50% --beta 1 --json"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert "warning: effective sample size" in done.stderr
    assert subprocess.run(["bash", "-c", line + " 2>&-"], cwd=ROOT, capture_output=True, text=True).stdout == done.stdout


def test_json_is_json_for_one_prompt_and_for_constants(tmp_path, cli):
    def never(word):
        raise AssertionError(word)
    for r, g in ((rand(0, 1, 5), rand(1, 1, 5)), (torch.zeros(4, 5), torch.zeros(4, 5)), (rand(0, 3, 1), rand(1, 3, 1))):
        np.savez(tmp_path / "a.npz", score=r.numpy(), constraint=g.numpy())
        assert json.loads(cli(tmp_path / "a.npz", "--margin", 0, "--beta", 1, "--json")[1], parse_constant=never)


ARRAYS = {
    "inf": (dict(constraint=np.array([[1.0, np.inf]] * 3)), "constraint"), "-inf": (dict(score=np.full((3, 2), -np.inf)), "score"),
    "N = 0": (dict(score=np.zeros((0, 2)), constraint=np.zeros((0, 2))), "score"),
    "K = 0": (dict(score=np.zeros((3, 0)), constraint=np.zeros((3, 0))), "score"),
    "m = 0": (dict(constraint=np.zeros((0, 3, 2))), "constraint"), "complex": (dict(constraint=np.zeros((3, 2), complex)), "constraint"),
    "text": (dict(score=np.full((3, 2), "a")), "score"), "bool": (dict(score=np.zeros((3, 2), bool)), "score"),
    "dates": (dict(score=np.zeros((3, 2), "M8[s]")), "score"), "another K": (dict(constraint=np.zeros((3, 4))), "constraint"),
    "another N": (dict(constraint=np.zeros((1, 2))), "constraint"), "flat": (dict(score=np.zeros(2), constraint=np.zeros(2)), "score"),
    "a matrix too many": (dict(constraint=np.zeros((1, 1, 3, 2))), "constraint"),
    "three scores": (dict(score=np.zeros((3, 3, 2))), "score"),
}


@pytest.mark.parametrize("margin", ["0.1", "50%"])
@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_cannot_be_is_named_with_its_shape(tmp_path, cli, case, margin):
    change, name = ARRAYS[case]
    arrays = {**dict(score=np.zeros((3, 2)), constraint=np.zeros((3, 2))), **change}
    for names in ({}, {"score": "logp_r", "constraint": "logp_g"}):  # PeCAN's too
        given = {names.get(what, what): x for what, x in arrays.items()}
        if names:
            given["ref_logp"] = np.zeros((3, 2))
        np.savez(tmp_path / "a.npz", **given)
        code, out, err = cli(tmp_path / "a.npz", "--margin", margin, "--beta", 1)
        assert code == 1 and out == "" and err.count("\n") == 1 and "nan" not in err, err
        shape = re.escape(str(given[names.get(name, name)].shape))
        assert re.search(rf"a\.npz: {names.get(name, name)} is .*{shape}|score has shape {shape}", err), err


@pytest.mark.parametrize("name", ["file", "allow_pickle"])
def test_an_array_that_numpy_cannot_write_is_named(tmp_path, cli, name):
    np.savez(tmp_path / "a.npz", score=rand(0, 4, 3).numpy(), constraint=rand(1, 4, 3).numpy())
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr(f"{name}.npy", file.read("score.npy"))
    code, out, err = cli(tmp_path / "a.npz", "--margin", 0, "--beta", 1, "--write", tmp_path / "b.npz")
    assert code == 1 and out == "" and err.count("\n") == 1 and f"{name}, of (4, 3)" in err
    assert not (tmp_path / "b.npz").exists()


def test_write_follows_links_and_keeps_pipes_and_devices(tmp_path, cli):
    np.savez(tmp_path / "a.npz", score=rand(0, 4, 3).numpy(), constraint=rand(1, 4, 3).numpy())
    asked = (tmp_path / "a.npz", "--margin", 0, "--beta", 1, "--write")
    (tmp_path / "b.npz").write_bytes(b"old")
    (tmp_path / "link").symlink_to("b.npz")
    (tmp_path / "dangling").symlink_to("c.npz")
    for link, target in (("link", "b.npz"), ("dangling", "c.npz")):
        assert cli(*asked, tmp_path / link)[0] == 0
        assert (tmp_path / link).is_symlink() and "s" in written(tmp_path / target)
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        assert cli(*asked, tmp_path / "pipe")[0] == 0
        (tmp_path / "d.npz").write_bytes(reader.stdout.read())
    assert "s" in written(tmp_path / "d.npz") and (tmp_path / "pipe").is_fifo()
    run = subprocess.run([sys.executable, "dual.py", *map(str, asked), "/dev/stdout", "--json"], cwd=ROOT, capture_output=True)
    assert run.returncode == 0 and run.stdout.startswith(b"PK") and os.path.islink("/dev/stdout")
    assert cli(*asked, "/dev/full")[0] == 1 and cli(*asked, tmp_path)[0] == 1 and not list(tmp_path.glob("*.tmp"))


def test_the_file_is_narrow_and_documented():
    text = Path(dual.__file__).read_text()
    tree = ast.parse(solver_source())
    assert max(map(len, text.splitlines())) <= 100
    assert tree and inspect.getdoc(dual.solve)
