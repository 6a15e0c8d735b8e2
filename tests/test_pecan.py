import inspect
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import data
import dual
import mocan
import pecan
import train
from data import Pool, pad
from model import GPT, GPTConfig


def alone(function):
    """The function made from its own source, with nothing but torch in scope."""
    scope = {"torch": torch}
    exec(inspect.getsource(function), scope)
    return scope[function.__name__]


implicit_score, calibrate = alone(pecan.implicit_score), alone(pecan.calibrate)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- implicit scores

def test_implicit_score_by_hand():
    # β·((−3 + 2) + 0.5·(−1 + 2) + 2·(−2.5 + 2)) = 0.4·(−1 + 0.5 − 1)
    s = implicit_score(f64(-3.0), f64(-1.0, -2.5).view(2, 1), f64(-2.0), f64(0.5, 2.0), beta=0.4)
    assert s.tolist() == pytest.approx([-0.6], abs=1e-15)


def test_implicit_score_is_the_reward_alone_at_lambda_zero():
    logp_r, ref_logp, logp_g = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 3, 4)
    assert torch.allclose(implicit_score(logp_r, logp_g, ref_logp, f64(0, 0), 0.3), 0.3 * (logp_r - ref_logp))


def test_implicit_score_gradient():
    logp_r, ref_logp = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    logp_g, lam = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), f64(0.5, 1.5)
    assert torch.autograd.gradcheck(lambda a, b, c: implicit_score(a, b, c, lam, 0.7), (logp_r, logp_g, ref_logp))


# ---- the identity on an enumerated space: exactly optimal pre-aligned policies

def prealigned(s, beta):
    """ln π_ref, ln π_r and ln π_g, with π_r ∝ π_ref·exp(r/β) and π_g ∝ π_ref·exp(g/β) normalised over the space."""
    ref = s.ref.log()
    return ref, (ref + s.r / beta).log_softmax(dim=1), (ref + s.g / beta).log_softmax(dim=2)


@pytest.mark.parametrize("m, beta, margin", [
    (1, 1.0, (0.6,)), (1, 0.3, (1.0,)), (2, 0.5, (0.7, 0.4)), (2, 2.0, (0.4, 0.3)), (2, 0.5, (0.7, -3.0))])
def test_pecan_equals_mocan_where_prealignment_is_exact(space, m, beta, margin):
    s, margin = space(m), f64(*margin)
    ref, pi_r, pi_g = prealigned(s, beta)
    theirs = dual.solve(s.spread(s.r), s.spread(s.g), margin, beta)
    ours = pecan.implicit_dual(s.spread(pi_r), s.spread(pi_g), s.spread(ref), margin, beta)
    assert theirs.lam[0] > 0.1
    assert torch.allclose(ours.lam, theirs.lam, atol=1e-9, rtol=0)
    assert ours.score_gain == pytest.approx(theirs.score_gain, abs=1e-9)
    assert torch.allclose(ours.constraint_gain, theirs.constraint_gain, atol=1e-9, rtol=0)
    assert ours.kl == pytest.approx(theirs.kl, abs=1e-9)

    score = s.r + torch.einsum("m,mns->ns", theirs.lam, s.g)
    implicit = implicit_score(pi_r, pi_g, ref, ours.lam, beta)
    difference = implicit[:, :, None] - implicit[:, None, :] - (score[:, :, None] - score[:, None, :])
    assert difference.abs().max() < 1e-8
    labels = mocan.bradley_terry(implicit[:, :, None], implicit[:, None, :])
    assert torch.allclose(labels, mocan.bradley_terry(score[:, :, None], score[:, None, :]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_without_beta_labels_and_prices_would_be_others(space, beta):
    s, margin = space(1), f64(0.5)
    ref, pi_r, pi_g = prealigned(s, beta)
    lam = dual.solve(s.spread(s.r), s.spread(s.g), margin, beta).lam
    score = s.r + lam * s.g[0]
    truth = mocan.bradley_terry(score[:, :1], score)
    sharp = implicit_score(pi_r, pi_g, ref, lam, 1.0)  # the published labels: β left out
    assert (mocan.bradley_terry(sharp[:, :1], sharp) - truth).abs().max() > 0.1
    wrong = dual.solve(s.spread(pi_r - ref), s.spread(pi_g - ref), margin, 1.0).lam  # b where b/β belongs
    assert (wrong - lam).abs() > 0.1


def test_the_references_mean_log_ratio_is_minus_a_kl_divergence(space):
    s = space(2)
    ref, pi_r, pi_g = prealigned(s, 0.5)
    found = pecan.implicit_dual(s.spread(pi_r), s.spread(pi_g), s.spread(ref), f64(0.3, 0.3), 0.5)
    kl = torch.stack([kl_divergence(Categorical(probs=s.ref), Categorical(logits=x)).mean() for x in pi_g])
    assert torch.allclose(found.ref, -0.5 * kl, atol=1e-10, rtol=0) and (kl > 0.1).all()


def test_an_unreachable_margin_raises(space):
    s = space(1)
    ref, pi_r, pi_g = (s.spread(x) for x in prealigned(s, 0.5))
    reach = 0.5 * dual.reachable(pi_g - ref)
    assert pecan.implicit_dual(pi_r, pi_g, ref, 0.95 * reach, 0.5).lam > 0
    with pytest.raises(dual.Infeasible) as error:
        pecan.implicit_dual(pi_r, pi_g, ref, 1.05 * reach, 0.5)
    assert torch.allclose(error.value.reachable, reach)  # in g's units, as the margin is


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_the_problem_in_nats_has_the_same_price(space, beta):
    s = space(2)
    ref, pi_r, pi_g = (s.spread(x) for x in prealigned(s, beta))
    ours, nats = (pecan.implicit_dual(pi_r, pi_g, ref, f64(0.3, 0.2), beta),
                  dual.solve(pi_r - ref, pi_g - ref, f64(0.3, 0.2) / beta, 1.0))  # β → 1, b → b/β
    assert ours.lam.max() > 0.01 and torch.allclose(ours.lam, nats.lam, atol=1e-9, rtol=0)
    assert torch.allclose(ours.constraint_gain, beta * nats.constraint_gain, atol=1e-10, rtol=0)
    assert ours.value == pytest.approx(beta * nats.value, abs=1e-10) and ours.kl == pytest.approx(nats.kl, abs=1e-9)


# ---- calibration

@pytest.mark.parametrize("truth, scale", [(0.7, 2.0), (1.0, 1.0), (3.0, 0.5), (0.02, 30.0)])
def test_calibrate_recovers_a_known_temperature(truth, scale):
    a, b = scale * torch.randn(2, 20000)
    prefers = torch.bernoulli(torch.sigmoid(truth * (b - a)))
    assert calibrate(a, b, prefers).item() == pytest.approx(truth, rel=0.06)


@pytest.mark.parametrize("heavy", [False, True])
def test_calibrate_equals_a_grid_of_the_likelihood(heavy):
    a, b = torch.randn(2, 60, dtype=torch.float64)
    if heavy:  # a few enormous leads
        a = a * torch.exp(1.5 * torch.randn(60, dtype=torch.float64))
    prefers = torch.bernoulli(torch.sigmoid(0.8 * (b - a)))
    grid = torch.linspace(0, 8, 80001, dtype=torch.float64)
    lead = torch.where(prefers == 1, b - a, a - b)
    likelihood = -torch.log1p(torch.exp(-grid[:, None] * lead)).sum(dim=1)
    best = grid[likelihood.argmax()].item()
    assert 0.1 < best < 7.9
    assert calibrate(a, b, prefers).item() == pytest.approx(best, abs=1e-4)


def test_calibrate_of_scores_that_say_the_opposite_is_zero():
    a, b = torch.randn(2, 500)
    assert calibrate(a, b, (b < a).long()).item() == 0.0


def test_calibrate_of_scores_that_are_never_wrong_is_large_and_finite():
    a, b = torch.randn(2, 500)
    tau = calibrate(a, b, (b > a).long()).item()
    assert 10 < tau <= 100


# ---- the loops

def tiny(seed=1):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=6, block_size=12, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10.0)
    return model


def settings(**changes):
    return SimpleNamespace(**{**dict(
        device="cpu", dtype="float32", sample_batch=64, batch=8, accumulate=1, steps=5, warmup=1, lr=1e-3, clip=1.0,
        labels="exact", beta=0.5, group=2, prealign_steps=4, prealign_lr=1e-3, calibrate=True), **changes})


def silent(step, steps, **numbers):
    pass


def streams(seed=0):
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 100)


def some_pool(N=8, K=4):
    prompts = [torch.randint(6, (1 + n % 3,)).tolist() for n in range(N) for _ in range(K)]
    tokens, mask = pad(prompts, [torch.randint(6, (1 + i % 4,)).tolist() for i in range(N * K)])
    return Pool(tokens.view(N, K, -1), mask.view(N, K, -1))


def spy_on_losses(monkeypatch):
    calls, real = [], pecan.preference_loss
    monkeypatch.setattr(pecan, "preference_loss", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize("changes", [{}, {"labels": "sampled"}, {"accumulate": 2, "batch": 4, "group": 3}])
def test_the_policy_update_is_mocans_bit_for_bit_on_the_same_scores(changes):
    pool, r, g, lam = some_pool(), torch.randn(8, 4), torch.randn(1, 8, 4), torch.tensor([1.5])
    ref_logp, c, ours, theirs = mocan.logprobs(tiny(), pool, settings()), settings(**changes), tiny(), tiny()
    pecan.train_pecan(ours, pool, ref_logp, r + 1.5 * g[0], c, c.steps, c.lr, streams(), silent)
    mocan.train_mocan(theirs, pool, ref_logp, r, g, lam, c, streams(), silent)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert not torch.equal(ours.wte.weight, tiny().wte.weight)


@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_prealignment_labels_are_exactly_the_preference(monkeypatch, labels):
    pool, prefers, calls = some_pool(K=2), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]), spy_on_losses(monkeypatch)
    c = settings(labels=labels)
    pecan.prealign(tiny(), pool, mocan.logprobs(tiny(), pool, c), prefers, c, streams(), silent)
    batches = mocan.pair_batches(pool.lengths(), 8, streams()[0])
    assert len(calls) == 4
    for call in calls:
        n, k = next(batches)
        assert call[4].flatten().tolist() == (k[:, 1] == prefers[n]).float().tolist()
        assert call[5] == 0.5


def test_prealignment_makes_the_preferred_response_more_likely():
    pool, prefers, policy, reference = some_pool(K=2), torch.tensor([0, 1] * 4), tiny(), tiny()
    c = settings(group=8, prealign_steps=30, prealign_lr=3e-3)
    pecan.prealign(policy, pool, mocan.logprobs(reference, pool, c), prefers, c, streams(), silent)
    lead = (mocan.logprobs(policy, pool, c) - mocan.logprobs(reference, pool, c)).diff(dim=1)[:, 0]
    assert (lead.sign() == 2 * prefers - 1).float().mean() >= 0.75


def test_temperature_is_fitted_on_beta_times_the_log_ratio(capsys):
    policy, reference, pool = tiny(2), tiny(1), some_pool(N=60, K=2)
    prefers, c = torch.randint(2, (60,)), settings()
    implicit = 0.5 * (mocan.logprobs(policy, pool, c) - mocan.logprobs(reference, pool, c))
    tau = pecan.temperature(policy, "safe", pool, mocan.logprobs(reference, pool, c), prefers, c)
    assert tau == pytest.approx(calibrate(implicit[:, 0], implicit[:, 1], prefers).item(), abs=1e-6)
    assert "safe" in capsys.readouterr().out


def test_miscalibration_is_measured_within_prompts(capsys):
    score = torch.randn(2, 5, 6)
    pecan.say_miscalibration(["safe"], score, 0.4 * score + torch.randn(2, 5, 1))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("correlation 1.000, slope 0.400" in line for line in lines)


def test_a_non_finite_loss_stops_and_names_the_stage():
    policy, pool, c = tiny(), some_pool(K=2), settings()
    policy.wte.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="^prealign: .* step 0"):
        pecan.prealign(policy, pool, torch.zeros(8, 2), torch.zeros(8, dtype=torch.long), c, streams(), silent)
    with pytest.raises(FloatingPointError, match="^pecan: .* step 0"):
        pecan.train_pecan(policy, pool, torch.zeros(8, 2), torch.randn(8, 2), c, 3, c.lr, streams(), silent)


# ---- no score model on PeCAN's path

def test_pecan_never_looks_at_a_score(monkeypatch, tmp_path):
    """Preferences in, policy out: until its policies are evaluated, every way to a score raises."""
    def forbidden(*args):
        raise AssertionError("a score on PeCAN's path")
    rows = data.world_preferences(150, random.Random(0))
    monkeypatch.setattr(data, "world_preferences", lambda count, rng: rows)  # drawn before, from the exact scores
    for name in ("score_pool", "learn_score", "train_score", "score_loss"):
        monkeypatch.setattr(mocan, name, forbidden)
    monkeypatch.setattr(GPT, "score", forbidden)
    reached = []
    monkeypatch.setattr(mocan, "measure", lambda *args: reached.append(1) or sys.exit("evaluation"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--algo", "pecan", "--out", str(tmp_path), *(
        "--n_layer 1 --n_embd 16 --n_head 2 --max_new_tokens 16 --block_size 48 --vocab_size 400 --sft_steps 20 "
        "--prompts 8 --responses 8 --steps 2 --prealign_steps 3").split()])
    with pytest.raises(SystemExit, match="evaluation"):
        train.main()
    assert reached and (tmp_path / "pecan.pt").exists()
