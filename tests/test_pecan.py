import inspect
import itertools
import json
import math
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import data
import dual
import mocan
import pecan
import train
from conftest import text_batch
from data import Pool
from model import GPT, GPTConfig, to_checkpoint


def alone(function):
    """The function made from its own source, with nothing but torch and F in scope."""
    scope = {"torch": torch, "F": F}
    exec(inspect.getsource(function), scope)
    return scope[function.__name__]


def implicit_dual(logp_r, logp_g, ref_logp, margin, beta):
    """The dual of the first shot, as train.py asks it of the implicit scores."""
    scores = beta * (torch.cat([logp_r[None], logp_g]) - ref_logp)
    sample = mocan.Sample(None, ref_logp, ref_logp, scores)
    return mocan.solve_from(sample, scores[1:].mean(dim=(1, 2)), margin, beta)


implicit_score, calibrate = alone(pecan.implicit_score), alone(mocan.calibrate)


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
    ours = implicit_dual(s.spread(pi_r), s.spread(pi_g), s.spread(ref), margin, beta)
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
    found = implicit_dual(s.spread(pi_r), s.spread(pi_g), s.spread(ref), f64(0.3, 0.3), 0.5)
    kl = torch.stack([kl_divergence(Categorical(probs=s.ref), Categorical(logits=x)).mean() for x in pi_g])
    assert torch.allclose(found.ref, -0.5 * kl, atol=1e-10, rtol=0) and (kl > 0.1).all()


def test_an_unreachable_margin_raises(space):
    s = space(1)
    ref, pi_r, pi_g = (s.spread(x) for x in prealigned(s, 0.5))
    reach = 0.5 * dual.reachable(pi_g - ref)
    assert implicit_dual(pi_r, pi_g, ref, 0.95 * reach, 0.5).lam > 0
    with pytest.raises(dual.Infeasible) as error:
        implicit_dual(pi_r, pi_g, ref, 1.05 * reach, 0.5)
    assert torch.allclose(error.value.reachable, reach)  # in g's units, as the margin is


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_the_problem_in_nats_has_the_same_price(space, beta):
    s = space(2)
    ref, pi_r, pi_g = (s.spread(x) for x in prealigned(s, beta))
    ours, nats = (implicit_dual(pi_r, pi_g, ref, f64(0.3, 0.2), beta),
                  dual.solve(pi_r - ref, pi_g - ref, f64(0.3, 0.2) / beta, 1.0))  # β → 1, b → b/β
    assert ours.lam.max() > 0.01 and torch.allclose(ours.lam, nats.lam, atol=1e-9, rtol=0)
    assert torch.allclose(ours.constraint_gain, beta * nats.constraint_gain, atol=1e-10, rtol=0)
    assert ours.value == pytest.approx(beta * nats.value, abs=1e-10) and ours.kl == pytest.approx(nats.kl, abs=1e-9)


# ---- calibration

def chosen_first(a, b, truth):
    """Preferences between a and b, drawn from σ(truth·(a − b)) -> the chosen ones', the rejected ones' scores."""
    first = torch.bernoulli(torch.sigmoid(truth * (a - b))) == 1
    return torch.where(first, a, b), torch.where(first, b, a)


@pytest.mark.parametrize("truth, scale", [(0.7, 2.0), (1.0, 1.0), (3.0, 0.5), (0.02, 30.0)])
def test_calibrate_recovers_a_known_temperature(truth, scale):
    a, b = scale * torch.randn(2, 20000)
    assert calibrate(*chosen_first(a, b, truth)).item() == pytest.approx(truth, rel=0.06)


@pytest.mark.parametrize("heavy", [False, True])
def test_calibrate_equals_a_grid_of_the_likelihood(heavy):
    a, b = torch.randn(2, 60, dtype=torch.float64)
    if heavy:  # a few enormous leads
        a = a * torch.exp(1.5 * torch.randn(60, dtype=torch.float64))
    chosen, rejected = chosen_first(a, b, 0.8)
    grid = torch.linspace(0, 8, 80001, dtype=torch.float64)
    likelihood = -torch.log1p(torch.exp(-grid[:, None] * (chosen - rejected))).sum(dim=1)
    best = grid[likelihood.argmax()].item()
    assert 0.1 < best < 7.9
    assert calibrate(chosen, rejected).item() == pytest.approx(best, abs=1e-4)


def test_calibrate_of_scores_that_say_the_opposite_is_zero():
    a, b = torch.randn(2, 500)
    assert calibrate(torch.minimum(a, b), torch.maximum(a, b)).item() == 0.0


def test_calibrate_of_scores_that_are_never_wrong_is_large_and_finite():
    a, b = torch.randn(2, 500)
    tau = calibrate(torch.maximum(a, b), torch.minimum(a, b)).item()
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


def recipe(stage="pecan", **changes):
    return mocan.Recipe(**{**dict(stage=stage, steps=5, lr=1e-3, key="0", batch=8, warmup=1), **changes})


def some_pool(N=8, K=4):
    prompts = [prompt for n in range(N) for prompt in [torch.randint(6, (1 + n % 3,)).tolist()] * K]
    tokens, mask = text_batch(prompts, [torch.randint(6, (1 + i % 4,)).tolist() for i in range(N * K)])
    return Pool(tokens.view(N, K, -1), mask.view(N, K, -1))


def reordered(x, prefers):
    """x (P, 2, …) with the preferred entry of each row first."""
    return x[torch.arange(len(prefers))[:, None], torch.stack([prefers, 1 - prefers], dim=1)]


def preferences(pool, prefers):
    return Pool(reordered(pool.tokens, prefers), reordered(pool.response_mask, prefers))


@pytest.mark.parametrize("group, changes", [(2, {}), (3, {"accumulate": 2, "batch": 4}), (99, {})])
def test_the_policy_update_is_mocans_on_the_same_scores(group, changes):
    """MoCAN's r is here β·ln π_r/π_ref and its g is β·ln π_g/π_ref."""
    pool, lam, beta, ours, theirs = some_pool(), torch.tensor([1.5]), 0.5, tiny(), tiny()  # ½ and 1.5·½ are exact
    ref_logp, logp_r, logp_g = (mocan.map_pool(tiny(seed), pool) for seed in (1, 2, 3))
    r, g = beta * (logp_r - ref_logp), beta * (logp_g - ref_logp)
    plan = recipe(**changes)
    sample = mocan.Sample(pool, None, ref_logp, torch.stack([r, g]))
    losses = pecan.train_pecan(ours, sample, lam, beta, group, plan)
    expected = mocan.train_mocan(theirs, sample, lam, beta, group, plan)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert len(losses) == 5
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert not torch.equal(ours.wte.weight, tiny().wte.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_prealignment_is_dpo_with_the_preferred_response_first(monkeypatch, accumulate):
    prefers, calls = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]), []
    pool = preferences(some_pool(K=2), prefers)
    ref_logp = mocan.map_pool(tiny(), pool)
    real = pecan.preference_loss
    monkeypatch.setattr(pecan, "preference_loss", lambda *args: calls.append(args) or real(*args))
    plan = recipe(steps=4, batch=4, accumulate=accumulate)
    pecan.prealign(tiny(), pool, pool, 0.5, plan)
    batches = mocan.group_batches(pool.lengths, 8, 2, "0")
    assert len(calls) == 4 * accumulate
    for call in calls:
        n, _ = next(batches)
        chosen, rejected = ref_logp[n].T
        assert call[2].flatten().tolist() == chosen.tolist() and call[3].flatten().tolist() == rejected.tolist()
        assert call[4:] == (0.5,)  # β, and no label: plain DPO
        if call is calls[0]:  # the policy is still the reference
            assert torch.allclose(call[0].flatten(), chosen, atol=1e-4)
            assert torch.allclose(call[1].flatten(), rejected, atol=1e-4)
    assert real(*calls[0]).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-5)


def test_prealignment_makes_the_preferred_response_more_likely():
    pool, prefers, policy, reference = some_pool(K=2), torch.tensor([0, 1] * 4), tiny(), tiny()
    first = preferences(pool, prefers)
    pecan.prealign(policy, first, first, 0.5, recipe(steps=30, lr=3e-3))
    lead = (mocan.map_pool(policy, pool) - mocan.map_pool(reference, pool)).diff(dim=1)[:, 0]
    assert (lead.sign() == 2 * prefers - 1).float().mean() >= 0.75


def test_temperature_is_fitted_on_beta_times_the_log_ratio(capsys, monkeypatch):
    """Of the pre-aligned policy to what it was before, on the calibration pairs; here training is a jump to other weights."""
    other, reference, pool = tiny(2), tiny(1), some_pool(N=60, K=2)
    implicit = 0.5 * (mocan.map_pool(other, pool) - mocan.map_pool(reference, pool))
    prefers = torch.bernoulli(torch.sigmoid(0.3 * (implicit[:, 1] - implicit[:, 0]))).long()
    always_right = (implicit[:, 1] > implicit[:, 0]).long()
    expected = calibrate(*reordered(implicit, prefers).T).item()
    right = (reordered(implicit, prefers).diff() < 0).float().mean()
    assert 0.05 < expected < 2 and 0.5 < right < 1
    real = mocan.Progress.consider

    def jump(self, loss):
        self.parts["model"].load_state_dict(other.state_dict())
        real(self, loss)
    monkeypatch.setattr(mocan.Progress, "consider", jump)
    for batch in (7, 256):
        monkeypatch.setattr(mocan, "SCORED", batch)
        held_out = preferences(pool, prefers)
        _, tau = pecan.prealign(tiny(1), held_out, held_out, 0.5, recipe("dpo-safe", steps=1))
        assert tau == pytest.approx(expected, abs=1e-6)
    said = capsys.readouterr().out
    assert f"dpo-safe, calibration: {right:.1%} of 60 pairs right; τ = {expected:.3f}; " in said
    with pytest.warns(UserWarning, match="no temperature fits the dpo-safe scores on 60 calibration pairs"):
        held_out = preferences(pool, always_right)
        assert pecan.prealign(tiny(1), held_out, held_out, 0.5, recipe("dpo-safe", steps=1))[1] == 1.0


def test_prealignment_stops_by_the_calibration_pairs_best_temperature(monkeypatch):
    """What is considered after an epoch is the calibrated loss of β ln π/π_ref on the calibration pairs."""
    reference, policy = tiny(1), tiny(1)
    training, held_out = (preferences(some_pool(N=N, K=2), torch.tensor([0, 1] * (N // 2))) for N in (8, 20))
    considered, real = [], mocan.Progress.consider

    def consider(self, loss):
        implicit = 0.5 * (mocan.map_pool(policy, held_out) - mocan.map_pool(reference, held_out))
        considered.append((loss, mocan.calibrated_loss(*implicit.T)))
        real(self, loss)
    monkeypatch.setattr(mocan.Progress, "consider", consider)
    pecan.prealign(policy, training, held_out, 0.5, recipe(steps=3, batch=4, lr=1e-2))
    assert len(considered) == 2  # an epoch is two steps; and at the end
    for loss, expected in considered:
        assert loss == pytest.approx(expected, abs=1e-6)
    best = min(considered)[0]
    implicit = 0.5 * (mocan.map_pool(policy, held_out) - mocan.map_pool(reference, held_out))
    assert mocan.calibrated_loss(*implicit.T) == pytest.approx(best, abs=1e-5)  # whose weights it ends with


def test_implicit_scores_are_beta_tau_log_ratios_in_the_order_of_the_policies(monkeypatch):
    pool, reference, beta = some_pool(), tiny(1), 0.5
    saved = {name: {**to_checkpoint(tiny(seed)), "tau": tau}
             for name, seed, tau in (("helpful", 2, 1.7), ("harmless", 3, 0.4), ("polite", 4, 0.0))}
    ref_logp = mocan.map_pool(reference, pool)
    for batch in (5, 256):
        monkeypatch.setattr(mocan, "SCORED", batch)
        scores = pecan.implicit_scores(saved, pool, ref_logp, beta, torch.device("cpu"))
        assert scores.shape == (3, 8, 4) and not scores.requires_grad
        for got, (seed, tau) in zip(scores, ((2, 1.7), (3, 0.4), (4, 0.0))):
            for n, k in itertools.product(range(8), range(4)):  # one response at a time, in double precision
                y = [pool.tokens[n, k].long(), pool.response_mask[n, k]]
                both = []
                for model in (tiny(seed).double(), tiny(1).double()):
                    logp = F.linear(model(y[0][None]), model.wte.weight).log_softmax(dim=2)[0]
                    both.append(sum(logp[t - 1, y[0][t]].item() for t in range(1, len(y[0])) if y[1][t]))
                assert got[n, k].item() == pytest.approx(beta * tau * (both[0] - both[1]), abs=1e-4)


def test_a_non_finite_loss_stops_and_names_the_stage():
    policy, pool = tiny(), some_pool(K=2)
    policy.wte.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="^dpo-safe: .* after 0 steps"):
        held_out = preferences(pool, torch.zeros(8, dtype=torch.long))
        pecan.prealign(policy, held_out, held_out, 0.5, recipe("dpo-safe"))
    with pytest.raises(FloatingPointError, match="^pecan: .* after 0 steps"):
        pecan.train_pecan(policy, mocan.Sample(pool, None, torch.zeros(8, 2), torch.randn(2, 8, 2)), torch.ones(1), 0.5,
                          2, recipe())


# ---- no score model on PeCAN's path

@pytest.mark.parametrize("source", ["world", "file"])
def test_pecan_never_looks_at_a_score(monkeypatch, tmp_path, source):
    """Preferences in, policy out: until its policies are evaluated, every way to a score raises. The score models of a
    file, which only the table needs, are left out."""
    def forbidden(*args):
        raise AssertionError("a score on PeCAN's path")

    def stop(*args):
        assert (tmp_path / "pecan.pt").exists()
        sys.exit("evaluation")
    rows = data.world_preferences(150)
    monkeypatch.setattr(data, "world_preferences", lambda count: rows)
    for name in ("world_scores", "score_pool", "learn_score", "train_score", "score_loss"):
        monkeypatch.setattr(mocan, name, forbidden)
    monkeypatch.setattr(GPT, "score", forbidden)
    flags = []
    if source == "file":
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({
            "prompt": pair.prompt, "response_0": pair.responses[0], "response_1": pair.responses[1],
            "better_response_id": pair.prefers["helpful"], "safer_response_id": pair.prefers["harmless"]}) + "\n"
            for pair in rows))
        flags = ["--data", str(tmp_path / "pairs.jsonl"), "--accumulate", "1"]
        monkeypatch.setattr(train, "train_judges", lambda *_: [])
    monkeypatch.setattr(train, "evaluate", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", "--algo", "pecan", "--out", str(tmp_path), *flags, *(
        "--n_layer 1 --n_embd 16 --n_head 2 --max_new_tokens 16 --block_size 48 --vocab_size 400 --sft_steps 20 "
        "--prompts 8 --responses 8 --steps 2 --prealign_steps 3").split()])
    with pytest.raises(SystemExit, match="evaluation"):
        train.main()


def test_an_implicit_score_is_right_under_the_callers_autocast():
    logp_r, logp_g, ref = -100 * torch.rand(5, 8), -100 * torch.rand(2, 5, 8), -100 * torch.rand(5, 8)
    lam = torch.tensor([0.7, 1.3], dtype=torch.float64)
    right = pecan.implicit_score(logp_r.double(), logp_g.double(), ref.double(), lam, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(pecan.implicit_score(logp_r, logp_g, ref, lam, 0.1).double(), right, atol=1e-4, rtol=0)
    with pytest.raises(ValueError):  # a multiplier for each constraint
        pecan.implicit_score(logp_r, logp_g, ref, lam[:1], 0.1)
