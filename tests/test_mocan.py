import copy
import inspect
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import dual
import mocan
import train
from conftest import text_batch
from data import Pair, Pool, open_tokenizer
from model import GPT, GPTConfig, sequence_logprob, to_checkpoint

LN2 = math.log(2)


def alone(function):
    """The function made from its own source, with nothing but torch and F in scope."""
    scope = {"torch": torch, "F": F}
    exec(inspect.getsource(function), scope)
    return scope[function.__name__]


bradley_terry, preference_loss, score_loss = (
    alone(f) for f in (mocan.bradley_terry, mocan.preference_loss, mocan.score_loss))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the losses

def test_bradley_terry_by_hand():
    p = bradley_terry(f64(math.log(3), 1.0, 0.0), f64(0.0, 1.0, 2.0))
    assert p.tolist() == pytest.approx([0.75, 0.5, 1 / (1 + math.exp(2))], abs=1e-15)


def test_bradley_terry_is_a_probability_of_the_first():
    a, b = torch.randn(2, 100, dtype=torch.float64)
    assert torch.allclose(bradley_terry(a, b) + bradley_terry(b, a), torch.ones(100, dtype=torch.float64), atol=1e-15)
    assert ((bradley_terry(a, b) > 0.5) == (a > b)).all()


def test_bradley_terry_of_infinite_scores_is_certain():
    assert bradley_terry(f64(math.inf, 0.0), f64(0.0, math.inf)).tolist() == [1.0, 0.0]


def test_preference_loss_by_hand():
    # ρ_chosen = 0.5·(−4 − (−6)) = 1, ρ_rejected = 0.5·(−3 − (−2)) = −0.5; the lead is 1.5
    # 0.8·ln(1 + e^−1.5) + 0.2·ln(1 + e^1.5) = 0.8·0.2014133 + 0.2·1.7014133
    chosen, rejected, ref_chosen, ref_rejected = f64(-4), f64(-3), f64(-6), f64(-2)
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5, p_chosen=f64(0.8))
    assert loss.item() == pytest.approx(0.5014133, abs=1e-7)
    dpo = preference_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5)
    mirror = preference_loss(rejected, chosen, ref_rejected, ref_chosen, 0.5)
    assert [dpo.item(), mirror.item()] == pytest.approx([0.2014133, 1.7014133], abs=1e-7)


def test_preference_loss_is_ln_2_where_the_policy_is_the_reference():
    a, b = torch.randn(2, 5, dtype=torch.float64)
    for p in (0.0, 0.3, 1.0):
        loss = preference_loss(a, b, a, b, 0.7, torch.full((5,), p, dtype=torch.float64))
        assert loss.shape == (5,) and torch.allclose(loss, torch.full_like(loss, LN2), atol=1e-15)


def test_preference_loss_at_certain_labels_is_dpo_and_its_mirror():
    """The chosen response comes first: a swap, or a label of 0, is the loss of the opposite preference."""
    a, b, ref_a, ref_b = torch.randn(4, 7, dtype=torch.float64)
    zero, one = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    dpo = preference_loss(a, b, ref_a, ref_b, 0.3)
    swapped, labelled_0 = preference_loss(b, a, ref_b, ref_a, 0.3), preference_loss(a, b, ref_a, ref_b, 0.3, zero)
    assert torch.equal(dpo, preference_loss(a, b, ref_a, ref_b, 0.3, one))
    for i in range(7):  # DPO's loss from its definition: −ln σ(β ln π(y_w)/π_ref(y_w) − β ln π(y_l)/π_ref(y_l))
        lead = 0.3 * ((a[i] - ref_a[i]) - (b[i] - ref_b[i])).item()
        assert dpo[i].item() == pytest.approx(math.log1p(math.exp(-lead)), abs=1e-12)
        assert swapped[i].item() == pytest.approx(math.log1p(math.exp(lead)), abs=1e-12)
        assert labelled_0[i].item() == pytest.approx(math.log1p(math.exp(lead)), abs=1e-12)


def test_swapping_the_pair_and_its_label_changes_nothing():
    a, b, ref_a, ref_b = torch.randn(4, 7, dtype=torch.float64)
    p = torch.rand(7, dtype=torch.float64)
    assert torch.allclose(preference_loss(a, b, ref_a, ref_b, 2.0, p), preference_loss(b, a, ref_b, ref_a, 2.0, 1 - p))


def test_the_soft_label_is_the_expectation_over_the_sampled_one():
    a, b, ref_a, ref_b = torch.randn(4, 7, dtype=torch.float64)
    p = torch.rand(7, dtype=torch.float64)
    expected = (p * preference_loss(a, b, ref_a, ref_b, 0.5, torch.ones_like(p))
                + (1 - p) * preference_loss(a, b, ref_a, ref_b, 0.5, torch.zeros_like(p)))
    assert torch.allclose(preference_loss(a, b, ref_a, ref_b, 0.5, p), expected, atol=1e-14)


def test_preference_loss_gradient():
    a, b, ref_a, ref_b = torch.randn(4, 6, dtype=torch.float64)
    p = torch.rand(6, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: preference_loss(a, b, ref_a, ref_b, 0.7, p), (a, b))
    preference_loss(a, b, ref_a, ref_b, 0.7, p).sum().backward()
    lead = 0.7 * ((a - ref_a) - (b - ref_b))
    assert torch.allclose(a.grad, 0.7 * (torch.sigmoid(lead) - p), atol=1e-12)  # β·(σ(lead) − p)
    assert torch.allclose(b.grad, -a.grad, atol=1e-12)


def test_preference_loss_is_finite_far_from_the_reference():
    loss = preference_loss(f64(-1e4, 0), f64(0, -1e4), f64(0, 0), f64(0, 0), 1.0, f64(1, 1))
    assert loss.tolist() == pytest.approx([1e4, 0.0])


@pytest.mark.parametrize("chosen, rejected, p, loss", [
    (-1.0, -math.inf, 1.0, 0.0), (-math.inf, -1.0, 0.0, 0.0), (-1.0, -math.inf, 0.0, math.inf), (-math.inf, -1.0, 1.0, math.inf),
    (-1.0, -math.inf, 0.9, math.inf), (-math.inf, -1.0, 0.9, math.inf), (-1.0, -1.0, math.nan, math.nan),
    (math.nan, -1.0, 1.0, math.nan)])
@pytest.mark.parametrize("label", [float, torch.tensor, lambda p: f64(p, p)])
def test_preference_loss_has_its_limit_where_a_response_is_impossible(chosen, rejected, p, loss, label):
    a, b = f64(chosen, chosen).requires_grad_(), f64(rejected, rejected).requires_grad_()
    got = preference_loss(a, b, f64(-1, -1), f64(-1, -1), 0.5, label(p))
    assert got.tolist() == pytest.approx([loss, loss], nan_ok=True)
    got.sum().backward()
    assert math.isnan(loss) or loss == math.inf or a.grad.tolist() == b.grad.tolist() == [0.0, 0.0]


def test_score_loss_by_hand():
    assert score_loss(f64(1.0, 0.0), f64(-0.5, 0.0)).tolist() == pytest.approx([0.2014133, LN2], abs=1e-7)


def test_score_loss_gradient():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(score_loss, (chosen, rejected))


# ---- an enumerated space: the dual, the primal and the population minimiser agree

def optimum(s, lam, beta):
    """π_λ ∝ π_ref·exp((r + ⟨λ,g⟩)/β), (N, S)."""
    return (s.ref.log() + (s.r + torch.einsum("m,mns->ns", lam, s.g)) / beta).softmax(dim=1)


def gains(s, policy):
    """E_π[g] − E_ref[g] over the whole space, (m,)."""
    return ((policy - s.ref) * s.g).sum(dim=2).mean(dim=1)


def objective(s, policy, beta):
    return (policy * (s.r - beta * (policy / s.ref).log())).sum(dim=1).mean()


def lbfgs(loss, x, steps=300):
    optimizer = torch.optim.LBFGS([x], max_iter=steps, max_eval=4 * steps, history_size=50, tolerance_grad=1e-12,
                                  tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value
    optimizer.step(closure)


def solve_primal(s, margin, beta):
    """max_π E[r] − β·KL subject to the margins: the method of multipliers, its inner problems by Newton's method on the
    probabilities themselves. It knows neither the closed form nor the dual function."""
    N, S = s.ref.shape
    sums = torch.eye(N, dtype=torch.float64).repeat_interleave(S, dim=1)  # (N, N·S): sums @ policy = 1
    policy, price, weight = s.ref.flatten(), torch.zeros(len(margin), dtype=torch.float64), 20.0
    for _ in range(15):
        def augmented(flat):
            push = (price + weight * (margin - gains(s, flat.view(N, S)))).clamp_min(0)
            return -objective(s, flat.view(N, S), beta) + (push ** 2).sum() / (2 * weight)
        step = torch.ones(1)
        while step.abs().max() > 1e-12:
            hessian, zeros = torch.func.hessian(augmented)(policy), torch.zeros(N, N, dtype=torch.float64)
            system = torch.cat([torch.cat([hessian, sums.T], dim=1), torch.cat([sums, zeros], dim=1)])
            step = torch.linalg.solve(system, torch.cat([-torch.func.grad(augmented)(policy), zeros[0]]))[:N * S]
            while (policy + step).min() <= 0 or augmented(policy + step) > augmented(policy) + 1e-13:
                step = step / 2
            policy = policy + step
        price = (price + weight * (margin - gains(s, policy.view(N, S)))).clamp_min(0)
    return policy.view(N, S), price


@pytest.mark.parametrize("beta, share", [(1.0, 0.5), (0.4, 0.3), (2.0, 0.7)])
def test_one_price_equals_the_minimum_of_the_dual_on_a_grid(space, beta, share):
    s = space(1)
    margin = share * dual.reachable(s.spread(s.g))
    found = dual.solve(s.spread(s.r), s.spread(s.g), margin, beta)
    h = s.g[0] - (s.ref * s.g[0]).sum(dim=1).mean() - margin

    def D(lam):  # (L,) -> (L,), from the definition: a log-mean-exp per prompt
        return (beta * (s.ref * ((s.r + lam[:, None, None] * h) / beta).exp()).sum(dim=2).log()).mean(dim=1)
    coarse = torch.linspace(0, 20, 20001, dtype=torch.float64)
    best = coarse[D(coarse).argmin()]
    fine = best + torch.linspace(-2e-3, 2e-3, 4001, dtype=torch.float64)
    assert 0.01 < best < 19
    assert found.lam.item() == pytest.approx(fine[D(fine).argmin()].item(), abs=2e-6)
    assert found.value == pytest.approx(D(fine).min().item(), abs=1e-10)


@pytest.mark.parametrize("beta, margin", [(1.0, (0.6, 0.5)), (0.5, (0.8, 0.3)), (1.0, (0.6, -5.0))])
def test_the_dual_equals_the_primal_solved_without_it(space, beta, margin):
    s, margin = space(2), f64(*margin)
    found = dual.solve(s.spread(s.r), s.spread(s.g), margin, beta)
    policy, price = solve_primal(s, margin, beta)
    assert torch.allclose(found.lam, price, atol=1e-6, rtol=0)
    assert torch.allclose(optimum(s, found.lam, beta), policy, atol=1e-6, rtol=0)
    assert found.value == pytest.approx(objective(s, policy, beta).item(), abs=1e-8)  # strong duality
    assert found.score_gain == pytest.approx(((policy - s.ref) * s.r).sum(dim=1).mean().item(), abs=1e-6)
    assert torch.allclose(found.constraint_gain, gains(s, policy), atol=1e-6, rtol=0)
    assert found.kl == pytest.approx((policy * (policy / s.ref).log()).sum(dim=1).mean().item(), abs=1e-6)


@pytest.mark.parametrize("margin, active", [((0.6, 0.5), [True, True]), ((0.6, -5.0), [True, False]),
                                            ((-5.0, -5.0), [False, False])])
def test_the_closed_form_satisfies_the_kkt_conditions(space, margin, active):
    s, margin, beta = space(2), f64(*margin), 0.8
    lam = dual.solve(s.spread(s.r), s.spread(s.g), margin, beta).lam
    policy = optimum(s, lam, beta).requires_grad_()
    (objective(s, policy, beta) + lam @ (gains(s, policy) - margin)).backward()
    along = policy.grad - policy.grad.mean(dim=1, keepdim=True)  # along the simplex; every π(y|x) > 0
    slack = gains(s, policy.detach()) - margin
    assert along.abs().max() < 1e-12  # stationary
    assert (slack > -1e-9).all() and (lam >= 0).all()  # feasible
    assert (lam > 0).tolist() == active and (lam * slack).abs().max() < 1e-9  # complementary


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_population_minimiser_of_the_loss_is_the_closed_form(space, beta):
    s = space(2)
    lam = dual.solve(s.spread(s.r), s.spread(s.g), f64(0.5, 0.4), beta).lam
    score = s.r + torch.einsum("m,mns->ns", lam, s.g)
    p = bradley_terry(score[:, :, None], score[:, None, :])  # (N, S, S), the first one by the second
    weight, ref = s.ref[:, :, None] * s.ref[:, None, :], s.ref.log()
    logits = torch.zeros_like(ref, requires_grad=True)

    def loss():
        logp = logits.log_softmax(dim=1)
        pairs = preference_loss(logp[:, :, None], logp[:, None, :], ref[:, :, None], ref[:, None, :], beta, p)
        return 1e3 * (weight * pairs).sum()
    lbfgs(loss, logits, steps=2000)
    policy = logits.detach().softmax(dim=1)
    assert torch.allclose(policy, optimum(s, lam, beta), atol=1e-6, rtol=0)
    assert (policy - optimum(s, -lam, beta)).abs().max() > 0.05  # the wrong sign is a different policy
    assert (policy - optimum(s, lam, 2 * beta)).abs().max() > 0.02


# ---- the loops' parts

def test_every_epoch_visits_each_prompt_once():
    lengths = torch.randint(5, 30, (37, 4))
    batches = mocan.group_batches(lengths, 10, 2, "0")
    orders = []
    for _ in range(3):
        n = torch.cat([next(batches)[0] for _ in range(8)])  # 37 prompts are 8 batches of at most 5
        assert sorted(n.tolist()) == list(range(37))
        orders.append(n.tolist())
    assert orders[0] != orders[1]


def test_a_pair_is_two_different_responses_and_every_ordered_pair_occurs_equally_often():
    batches, count = mocan.group_batches(torch.full((6, 4), 9), 12, 2, "0"), torch.zeros(4, 4)
    for _ in range(1000):
        for k_0, k_1 in next(batches)[1]:
            count[k_0, k_1] += 1
    off = count[~torch.eye(4, dtype=torch.bool)]
    assert count.diagonal().sum() == 0 and (off - 500).abs().max() < 5 * 500 ** 0.5


def test_a_group_is_different_responses_and_a_fresh_one_each_epoch():
    batches = mocan.group_batches(torch.full((6, 5), 9), 18, 3, "0")
    groups = [{n: k for n, k in zip(batch[0].tolist(), batch[1].tolist())} for batch in itertools.islice(batches, 20)]
    assert all(len(set(k)) == 3 for batch in groups for k in batch.values())
    assert len({tuple(batch[0]) for batch in groups}) > 10  # prompt 0's


def test_a_group_larger_than_the_pool_is_the_pool():
    _, k = next(mocan.group_batches(torch.full((6, 2), 9), 12, 2, "0"))
    assert k.sort(dim=1).values.tolist() == [[0, 1]] * 6
    assert run_mocan(steps=1, group=99).losses[0] == pytest.approx(LN2, abs=1e-5)


@pytest.mark.parametrize("responses, group, prompts", [(12, 2, 6), (12, 3, 4), (12, 5, 2), (4, 5, 1)])
def test_a_batch_is_about_as_many_responses_as_asked_and_never_none(responses, group, prompts):
    n, k = next(mocan.group_batches(torch.full((24, 6), 9), responses, group, "0"))
    assert n.shape == (prompts,) and k.shape == (prompts, group)


def test_a_batch_holds_pairs_of_similar_length():
    lengths = torch.arange(1, 321)[torch.randperm(320)][:, None].expand(320, 2)
    batches = mocan.group_batches(lengths, 20, 2, "0")
    padding = sum((lengths[n, 0].max() * len(n) - lengths[n, 0].sum()).item() for n, _ in itertools.islice(batches, 32))
    assert padding < 0.15 * lengths[:, 0].sum()  # random batches of 10 would need about 80 %


def test_learning_rate_by_hand():
    recipe = mocan.Recipe("a stage", 10, 1e-3, "0", warmup=4)
    rates = [mocan.lr_at(step, recipe) for step in (0, 3, 4, 7, 10)]
    assert rates == pytest.approx([0.2e-3, 0.8e-3, 1e-3, 0.5e-3, 0.0], abs=1e-15)
    assert mocan.lr_at(0, recipe._replace(warmup=0)) == 1e-3
    assert math.isfinite(mocan.lr_at(3, recipe._replace(steps=3, warmup=3)))  # a run as long as its warm-up


def tiny(seed=1, sharp=10.0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=6, block_size=12, n_layer=1, n_head=2, n_embd=16), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(sharp)
    return model


def recipe(stage="mocan", **changes):
    return mocan.Recipe(**{**dict(stage=stage, steps=3, lr=1e-3, key="0", batch=8, warmup=0), **changes})


DIGITS = SimpleNamespace(encoding=SimpleNamespace(encode_ordinary=lambda text: [int(x) for x in text.strip()]),
                         start=[], before=[], after=[], next=[], close=None, end=0, ends=[0], known=10**6, lead=" ", normal="",  # a tokenizer: "34" is the prompt [3, 4]
                         prompt_limit=10, response_limit=2)


def some_pool(N=8, K=4, vocab=6):
    """Random prompts of 1 to 3 tokens and responses of 1 to 4."""
    prompts = [prompt for n in range(N) for prompt in [torch.randint(vocab, (1 + n % 3,)).tolist()] * K]
    responses = [torch.randint(vocab, (1 + i % 4,)).tolist() for i in range(N * K)]
    tokens, mask = text_batch(prompts, responses)
    return Pool(tokens.view(N, K, -1), mask.view(N, K, -1))


def test_scoring_that_takes_long_says_how_far_it_is(monkeypatch, capsys):
    model, pool = tiny(), data.Pool(torch.ones(5, 2, 5, dtype=torch.int32), torch.ones(5, 2, 5).cumsum(2) > 2)
    mocan.map_pool(model, pool)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(mocan, "SCORED", 4)
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(mocan.time, "monotonic", lambda: next(clock))
    mocan.map_pool(model, pool)
    assert capsys.readouterr().out == "  scored 2 of 5 prompts\n  scored 4 of 5 prompts\n"


def test_map_pool_equals_direct_calls_in_any_batch_size(monkeypatch):
    model, pool = tiny(), some_pool()
    expected = torch.stack([sequence_logprob(model, t, m) for t, m in zip(*pool)])
    judge = tiny(score_head=True)
    scored = torch.stack([judge.score(t, m) for t, m in zip(*pool)])
    for size in (1, 5, 8, 64):
        monkeypatch.setattr(mocan, "SCORED", size)
        for what, right in ((model, expected), (judge, scored)):  # a policy's log-probabilities, a score model's scores
            got = mocan.map_pool(what, pool)
            assert got.shape == (8, 4) and torch.allclose(got, right, atol=1e-5, rtol=0) and not got.requires_grad


def test_sample_pool_keeps_responses_with_their_prompts():
    model = tiny()
    pool, logp = mocan.sample_pool(model, DIGITS, ["123", "4", "51"], 5, mocan.Recipe("offline", key="0", batch=4))
    assert pool.tokens.shape[:2] == logp.shape == (3, 5)
    for n, prompt in enumerate([[1, 2, 3], [4], [5, 1]]):
        assert (pool.tokens[n, :, :len(prompt)] == torch.tensor(prompt)).all()
        assert not pool.response_mask[n, :, :len(prompt)].any() and pool.response_mask[n, :, len(prompt)].all()
    assert torch.allclose(logp, mocan.map_pool(model, pool), atol=1e-4, rtol=0)


def test_score_pool_scores_each_response_as_an_answer_to_its_own_prompt():
    prompts = ["Help me bake bread.", "I need to unclog a drain."]
    answers = ["Weigh the flour first. Good luck!", "Pour pure acid on it.", "Rinse it twice."]
    tok = open_tokenizer([], 60, 60)
    ids = [[*answer.encode(), tok.end] for answer in answers]
    tokens, mask = text_batch([list(prompt.encode()) for prompt in prompts for _ in ids], ids * 2)
    pool, names = Pool(tokens.view(2, 3, -1), mask.view(2, 3, -1)), ["helpful", "polite", "harmless"]
    scores = mocan.score_pool({}, names, prompts, pool, tok, "cpu")
    hand = [[[0.9, 0.0, 0.0], [0.0, 0.6, 0.9]], [[1, 0, 0], [1, 0, 0]], [[0, -2, 0], [0, -2, 0]]]
    assert torch.allclose(scores, torch.tensor(hand))

    pool, judges = some_pool(), {name: tiny(seed, score_head=True) for seed, name in enumerate(reversed(names))}
    saved = {name: to_checkpoint(judge) for name, judge in judges.items()}
    scores = mocan.score_pool(saved, names, None, pool, None, "cpu")
    for name, got in zip(names, scores, strict=True):
        expected = torch.stack([judges[name].score(t, m) for t, m in zip(*pool)])
        assert torch.allclose(got, expected, atol=1e-5, rtol=0) and not got.requires_grad


def test_take_text_cuts_to_the_longest_response():
    pool = some_pool()
    n, k = torch.tensor([0, 3]), torch.tensor([[0, 2], [1, 0]])
    cpu = torch.device("cpu")
    tokens, mask = mocan.take_text(pool, n, k, cpu)
    used = tokens.shape[1]
    assert used == max(pool.lengths[i, j].item() for i, j in ((0, 0), (0, 2), (3, 1), (3, 0))) < pool.tokens.shape[2]
    for row, (i, j) in enumerate(((0, 0), (0, 2), (3, 1), (3, 0))):
        assert torch.equal(tokens[row], pool.tokens[i, j, :used])
        assert torch.equal(mask[row], pool.response_mask[i, j, :used])
    assert torch.equal(mocan.take(pool.tokens, n, k, cpu).flatten(0, 1)[:, :used], tokens)
    assert mocan.take(pool.lengths, n, k, cpu).tolist() == [[pool.lengths[i, j] for j in some]
                                                              for i, some in zip(n.tolist(), k.tolist())]


def run_mocan(monkeypatch=None, seen=None, policy=None, lam=(0.7, 0.2), beta=1.0, group=2, **changes):
    """train_mocan on a random pool with fixed random scores; `seen` collects the arguments of every loss."""
    torch.manual_seed(3)
    pool, score, constraint = some_pool(), torch.randn(8, 4), torch.randn(2, 8, 4)
    policy = policy or tiny()
    ref_logp = mocan.map_pool(tiny(), pool)
    if seen is not None:
        real = mocan.preference_loss
        monkeypatch.setattr(mocan, "preference_loss", lambda *args: seen.append([a for a in args]) or real(*args))
    sample = mocan.Sample(pool, None, ref_logp, torch.cat([score[None], constraint]))
    losses = mocan.train_mocan(policy, sample, f64(*lam), beta, group, recipe(**changes))
    return SimpleNamespace(policy=policy, pool=pool, score=score, constraint=constraint, ref_logp=ref_logp,
                           losses=losses)


def pairs_seen(run, group):
    """(n, y_j, y_i) of every pair of the first step, which run_mocan's own generator led to."""
    n, k = next(mocan.group_batches(run.pool.lengths, 16, group, "0"))
    return [(prompt, *pair) for prompt, some in zip(n.tolist(), k.tolist()) for pair in itertools.combinations(some, 2)]


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize("lam", [(0.7, 0.2), (0.0, 0.0), (0.0, 3.0)])
def test_the_first_labels_are_bradley_terry_on_r_plus_lambda_g(monkeypatch, lam, group):
    seen = []
    run = run_mocan(monkeypatch, seen, lam=lam, steps=1, beta=0.3, group=group)
    s = run.score + lam[0] * run.constraint[0] + lam[1] * run.constraint[1]
    logp_i, logp_j, ref_i, ref_j, p_i = (seen[0][place].flatten() for place in (0, 1, 2, 3, 5))
    pairs = pairs_seen(run, group)
    assert len(p_i) == len(pairs) and seen[0][4] == 0.3
    for at, (n, y_i, y_j) in enumerate(pairs):
        assert p_i[at].item() == pytest.approx(1 / (1 + math.exp(s[n, y_j] - s[n, y_i])), abs=1e-6)
        assert [ref_i[at], ref_j[at]] == [run.ref_logp[n, y_i], run.ref_logp[n, y_j]]
    assert torch.allclose(logp_i, ref_i, atol=1e-4) and torch.allclose(logp_j, ref_j, atol=1e-4)  # not trained yet


def test_the_first_loss_is_ln_2():
    run = run_mocan()
    assert run.losses[0] == pytest.approx(LN2, abs=1e-5) and len(run.losses) == 3


def by_plain_descent(monkeypatch, limit=None):
    """Instead of AdamW; limit: of the gradient's norm, instead of the loops' own."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **_: torch.optim.SGD(parameters, lr=0.0, fused=True))
    if limit:
        clip = mocan.clip_grad_norm_
        monkeypatch.setattr(mocan, "clip_grad_norm_", lambda parameters, _: clip(parameters, limit))


def test_accumulated_micro_batches_are_one_batch(monkeypatch):
    """By plain gradient descent: Adam's first step is the gradient's sign, which is noise where the gradient is 0."""
    by_plain_descent(monkeypatch, limit=1e6)
    whole, parts = run_mocan(steps=1, batch=8), run_mocan(steps=1, batch=4, accumulate=2)
    assert len(parts.losses) == 1 and whole.losses == pytest.approx(parts.losses, abs=1e-6)
    moved = [(a - b).abs().max().item() for a, b in zip(whole.policy.parameters(), tiny().parameters())]
    for a, b in zip(whole.policy.parameters(), parts.policy.parameters()):
        assert torch.allclose(a, b, atol=1e-3 * max(moved), rtol=0)
    assert max(moved) > 1e-5


def after_every_step(monkeypatch, do):
    real = mocan.Progress.step
    monkeypatch.setattr(mocan.Progress, "step", lambda self, norm: (do(self, norm), real(self, norm)))


@pytest.mark.parametrize("steep, length", [(1e3, 1.0), (1e-3, None)])
def test_every_step_is_clipped_and_has_its_learning_rate(monkeypatch, steep, length):
    """By plain descent: a gradient longer than 1 moves the weights by the learning rate, a shorter one by less."""
    by_plain_descent(monkeypatch)
    real, states, norms = mocan.preference_loss, [], []
    monkeypatch.setattr(mocan, "preference_loss", lambda *args: steep * real(*args))

    def note(progress, norm):
        states.append(torch.cat([x.detach().flatten().double() for x in progress.parts["model"].parameters()]))
        norms.append(norm.item())
    after_every_step(monkeypatch, note)
    start = torch.cat([x.detach().flatten().double() for x in tiny().parameters()])
    run_mocan(steps=4, lr=0.1, warmup=2, accumulate=2)
    rates = [0.1 * x for x in (1 / 3, 2 / 3, 1, 0.5)]  # 1/(2+1), 2/(2+1), then ½ + ½·cos 0 and ½ + ½·cos(π/2)
    moved = [(b - a).norm().item() for a, b in itertools.pairwise([start, *states])]
    assert moved == pytest.approx([rate * (length or norm) for rate, norm in zip(rates, norms)], rel=1e-2)
    assert all((norm > 1) == (steep > 1) for norm in norms)


@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_non_finite_loss_stops_and_names_stage_and_step(monkeypatch, bad_step):
    calls, real = [], mocan.preference_loss

    def spoiled(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == bad_step + 1 else 1.0)
    monkeypatch.setattr(mocan, "preference_loss", spoiled)
    with pytest.raises(FloatingPointError) as error:
        run_mocan()
    assert "mocan" in str(error.value) and f"after {bad_step} steps" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_stops_before_anything_of_it_is_kept(monkeypatch, tmp_path, value):
    """The loss of step 1 is finite, its gradient is not; a checkpoint is asked for after every step."""
    saved = []
    monkeypatch.setattr(mocan, "save", lambda state, path: saved.append(len(state["done"])))
    run = SimpleNamespace(out=tmp_path, run="a run", resume=False, checkpoint_every=0.0)

    def spoil(progress, norm):
        assert all(isinstance(loss, float) for loss in progress.done)  # of steps whose checkpoint was written
        progress.due = 0.0
        if len(progress.done) == 1:
            norm.fill_(value)
    after_every_step(monkeypatch, spoil)
    with pytest.raises(FloatingPointError, match="^mocan: the loss or its gradient is nan after 1 steps; lower"):
        run_mocan(run=run, steps=4)
    assert saved == [1]


def test_losses_stay_on_the_device_until_they_are_said(monkeypatch):
    kinds = []
    after_every_step(monkeypatch, lambda progress, norm: kinds.append([type(loss) for loss in progress.done]))
    losses = run_mocan(steps=4).losses
    assert kinds[-1] == [float, torch.Tensor, torch.Tensor] and all(isinstance(loss, float) for loss in losses)


def test_a_gradient_that_is_not_finite_at_the_last_step_is_named(monkeypatch):
    after_every_step(monkeypatch, lambda progress, norm: norm.fill_(math.inf) if len(progress.done) == 2 else None)
    with pytest.raises(FloatingPointError, match="after 2 steps"):
        run_mocan(steps=3)


def test_infinite_weights_stop_every_loop():
    model, score_model, pool = tiny(), tiny(score_head=True), some_pool(K=2)
    for broken in (model, score_model):
        broken.wte.weight.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="^reference: .* after 0 steps"):
        mocan.train_reference(model, pool, pool, recipe("reference"))
    with pytest.raises(FloatingPointError, match="^scores: .* after 0 steps"):
        mocan.train_score(score_model, pool, pool, recipe("scores"))


def test_train_reference_learns_the_distribution_of_its_data():
    """Responses 1, 2 and 3 to the prompt 4, in the proportion 5 : 2 : 1, all ended by 0."""
    tokens, mask = text_batch([[4]] * 8, [[1, 0]] * 5 + [[2, 0]] * 2 + [[3, 0]])
    pool, model = Pool(tokens.view(4, 2, -1), mask.view(4, 2, -1)), tiny(sharp=1.0)
    mocan.train_reference(model, pool, pool, recipe("reference", steps=200, lr=1e-2))
    with torch.no_grad():
        p = sequence_logprob(model, *text_batch([[4]] * 3, [[1, 0], [2, 0], [3, 0]])).exp()
    assert p.tolist() == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=0.02)


def test_preferences_take_the_pairs_that_carry_the_preference_with_the_chosen_response_first():
    pairs = [Pair("a", ("x", "y"), {"safe": 1}), Pair("b", ("x", "y"), {"helpful": 0}),
             Pair("c", ("x", "y"), {"safe": 0, "helpful": 1})]
    tok = open_tokenizer([], 48, 16)
    everything = data.pair_pool(tok, pairs, "all")
    pool = mocan.preferences(pairs, "safe", everything)
    assert pool.texts(tok) == ["y", "x", "x", "y"]
    assert pool.tokens[:, 0, 2].tolist() == [*b"ac"]  # the prompts, after the template's token and the space
    assert mocan.preferences(pairs, "helpful", everything).texts(tok) == ["x", "y", "y", "x"]


def test_the_halves_are_of_different_conversations_and_keep_their_places():
    pairs = [pair._replace(prompt=(pair.prompt, "Go on.", "Why?")) if i % 3 else pair
             for i, pair in enumerate(data.world_preferences(400))]
    one, other = (mocan.half(pairs, which) for which in (0, 1))
    talks = [{data.conversation(pair.prompt) for pair in some if pair.prefers} for some in (one, other)]
    assert not talks[0] & talks[1] and talks[0] | talks[1] == {data.conversation(pair.prompt) for pair in pairs}
    assert abs(len(talks[0]) - len(talks[1])) <= 1
    for a, b, pair in zip(one, other, pairs):
        assert sorted([a.prefers, b.prefers], key=len) == [{}, pair.prefers] and a[:2] == b[:2] == pair[:2]


def test_a_score_model_recovers_the_scores_that_the_preferences_come_from():
    """One-token responses worth 0, 1 and 2: Bradley–Terry preferences for them determine the differences."""
    worth, N = torch.tensor([0.0, 1.0, 2.0]), 3000
    y = torch.stack([torch.randint(3, (N,)), torch.randint(3, (N,))], dim=1)
    prefers = (torch.rand(N) < torch.sigmoid(worth[y[:, 1]] - worth[y[:, 0]])).long()
    y = torch.stack([y.gather(1, prefers[:, None])[:, 0], y.gather(1, 1 - prefers[:, None])[:, 0]], dim=1)  # chosen, rejected
    tokens, mask = text_batch([[5]] * 2 * N, [[i + 1] for i in y.flatten().tolist()])
    model = tiny(sharp=1.0, score_head=True)
    pool = Pool(tokens.view(N, 2, -1), mask.view(N, 2, -1))
    mocan.train_score(model, pool, pool, recipe("scores", batch=250, steps=150, lr=1e-2))
    with torch.no_grad():
        score = model.score(*text_batch([[5]] * 3, [[1], [2], [3]]))
    assert (score - score[0]).tolist() == pytest.approx([0.0, 1.0, 2.0], abs=0.25)


@pytest.mark.parametrize("group", [2, 8])
def test_train_mocan_approaches_the_exact_optimum_of_an_enumerable_case(group):
    """4 prompts, and all 31 responses of at most two tokens: π_ref, π_λ* and the trained policy are known exactly."""
    reference, policy, (m, beta) = tiny(sharp=3.0, n_embd=64), tiny(sharp=3.0, n_embd=64), (2, 0.7)
    K = 2048  # so that hardly a response is never seen: nothing holds the policy on those
    prompts = [[1], [2], [3, 4], [5, 1]]
    responses = [[0]] + [[a, b] for a in range(1, 6) for b in range(6)]
    tokens, mask = text_batch([x for x in prompts for _ in responses], responses * len(prompts))
    space = Pool(tokens.view(4, 31, -1), mask.view(4, 31, -1))
    ref = mocan.map_pool(reference, space)
    assert ref.exp().sum(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-5)
    r, g = 0.7 * torch.randn(4, 31), 0.7 * torch.randn(m, 4, 31)

    pool, ref_logp = mocan.sample_pool(reference, DIGITS, ["1", "2", "34", "51"], K, mocan.Recipe("offline", key="7", batch=2048))
    which = torch.tensor([[responses.index(y[on].tolist()) for y, on in zip(*row)] for row in zip(*pool)])  # (4, K)
    score, constraint = r.gather(1, which), g.gather(2, which.expand(m, -1, -1))
    found = dual.solve(score, constraint, 0.35 * dual.reachable(constraint).min(), beta)
    assert (found.lam > 0.05).all()
    repeat = 32 // group  # a prompt is visited so often in an epoch that a batch is full
    many = Pool(*(x.repeat(repeat, 1, 1) for x in pool))
    scores = torch.cat([score[None], constraint]).repeat(1, repeat, 1)
    mocan.train_mocan(policy, mocan.Sample(many, None, ref_logp.repeat(repeat, 1), scores), found.lam, beta, group,
                      recipe(steps=1200 // group + 150, batch=64, lr=3e-3, warmup=10))  # a group of 2 has one pair in 28

    def exact(lam):
        return (ref + (r + torch.einsum("m,mnk->nk", lam.float(), g)) / beta).log_softmax(dim=1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(dim=1).mean().item()
    trained, best = mocan.map_pool(policy, space), exact(found.lam)
    assert kl(ref, best) > 0.4  # far to go
    assert kl(trained, best) < 0.01
    assert kl(trained, exact(-found.lam)) > 0.2 and kl(trained, exact(0 * found.lam)) > 0.05
    realised = ((trained.exp() - ref.exp()) * g).sum(dim=2).mean(dim=1)
    assert realised.tolist() == pytest.approx(found.constraint_gain.tolist(), abs=0.05)


# ---- the dual from any policy

@pytest.mark.parametrize("m, beta, share", [(1, 1.0, 0.5), (1, 0.25, 0.6), (2, 0.5, 0.3), (2, 2.0, 0.4)])
@pytest.mark.parametrize("seed", [5, 6])
def test_the_dual_from_any_policy_is_the_first_problems(space, m, beta, share, seed):
    """An exact sample of a random π₁ of full support gives the same λ* and the same π* as one of π_ref."""
    s, other = space(m), space(m, seed)  # π₁ is another space's reference
    margin = share * dual.reachable(s.spread(s.g)) / m
    first = dual.solve(s.spread(s.r), s.spread(s.g), margin, beta)
    ref_mean = (s.ref * s.g).sum(dim=2).mean(dim=1)
    log_ratio = other.ref.log() - s.ref.log()
    sample = mocan.Sample(None, other.spread(other.ref.log()), other.spread(s.ref.log()),
                          other.spread(torch.cat([s.r[None], s.g])))
    again = mocan.solve_from(sample, ref_mean, margin, beta)
    assert first.lam.max() > 0.05 and log_ratio.abs().max() > 0.5
    assert torch.allclose(again.lam, first.lam, atol=1e-9, rtol=0)
    gained = ((other.ref - s.ref) * s.g).sum(dim=2).mean(dim=1)
    assert torch.allclose(again.constraint_gain + gained, first.constraint_gain, atol=1e-9, rtol=0)
    score = s.r - beta * log_ratio + torch.einsum("m,mns->ns", again.lam, s.g)
    policy = (other.ref.log() + score / beta).softmax(dim=1)  # π₁·exp((r − β ln π₁/π_ref + ⟨λ,g⟩)/β)
    assert torch.allclose(policy, optimum(s, first.lam, beta), atol=1e-9, rtol=0)


def test_in_the_first_shot_it_is_the_dual_itself(space):
    s = space(2)
    scores = torch.cat([s.spread(s.r)[None], s.spread(s.g)])
    ref = s.spread(s.ref.log())
    found = mocan.solve_from(mocan.Sample(None, ref, ref, scores), scores[1:].mean(dim=(1, 2)), f64(0.3, 0.2), 0.5)
    assert torch.equal(found.lam, dual.solve(scores[0], scores[1:], f64(0.3, 0.2), 0.5).lam)


# ---- what came of it

def compare(scores, ref_scores):
    even = torch.full(scores.shape[1:], 1 / scores.size(2), dtype=torch.float64)
    return mocan.compare(scores, torch.zeros(scores.shape[1:]), even, ref_scores)


def test_an_interval_by_hand():
    # mean 2.5, standard deviation √(5/3) = 1.2909944, half-width 1.96·1.2909944/2 = 1.2651746
    row = compare(f64(1, 2, 3, 4).view(1, 4, 1), torch.zeros(1, 4, 1))
    assert [row["reward_gain"], *row["reward_gain_ci"]] == pytest.approx([2.5, 1.2348254, 3.7651746], abs=1e-6)


def test_compare_by_hand():
    scores = f64(1, 3, 0, 0, 2, 4, 5, 5).view(2, 2, 2)  # r and g of two responses to each of two prompts
    ref_scores = f64(1, 2, 0, 5, 1, 1, 2, 2).view(2, 2, 2)
    row = compare(scores, ref_scores)
    # r: gains 2 − 1.5 on prompt 0 and 0 − 2.5 on prompt 1; g: 3 − 1 and 5 − 2
    assert row["reward_gain"] == pytest.approx((0.5 - 2.5) / 2) and row["constraint_gain"] == pytest.approx([2.5])
    low, high = row["reward_gain_ci"]
    assert high - low == pytest.approx(2 * 1.96 * (3 / 2 ** 0.5) / 2 ** 0.5)  # paired by prompt
    (low, high), = row["constraint_gain_ci"]
    assert [low, high] == pytest.approx([2.5 - 1.96 * 0.5, 2.5 + 1.96 * 0.5])  # sd of 2 and 3: 1/√2


def test_a_policy_compared_with_itself_gains_nothing():
    scores = torch.randn(3, 5, 4, dtype=torch.float64)
    row = compare(scores, scores)
    assert [row["reward_gain"], *row["constraint_gain"]] == [0.0] * 3
    assert [row["reward_gain_ci"], *row["constraint_gain_ci"]] == [[0.0, 0.0]] * 3


def sampled(prompt_limit):
    """Three responses of a policy to each of two prompts of 5 and 11 bytes, template and space included."""
    tok, prompts = open_tokenizer([], prompt_limit, 4), ["ab", "abcdefgh"]
    model = tiny(vocab_size=tok.encoding.n_vocab, sharp=2.0, block_size=prompt_limit + 4)
    return model, tok, prompts, *mocan.sample_pool(model, tok, prompts, 3, mocan.Recipe("evaluate", key="0", batch=64))


def test_the_reference_measured_against_itself(capsys):
    model, tok, prompts, pool, logp = sampled(60)
    scores = mocan.score_pool({}, ["helpful", "harmless", "polite"], prompts, pool, tok, "cpu")
    row = compare(scores, scores)
    assert scores.shape == (3, 2, 3) and len(pool.texts(tok)) == 6
    assert row["reward_gain"] == 0 and row["constraint_gain"] == [0, 0] and len(row["constraint_gain_ci"]) == 2
    assert abs((logp - mocan.map_pool(model, pool)).mean()) < 1e-4  # KL
    assert "lost" not in capsys.readouterr().out


def test_truncated_prompts_of_a_sample_are_counted_and_said(capsys):
    sampled(8)
    assert "1 of 2 prompts" in capsys.readouterr().out


def row(gain, low, high, reward=1.0, reward_ci=(0.9, 1.1), lam=(1.25,)):
    return {"reward_gain": reward, "reward_gain_ci": [*reward_ci], "constraint_gain": [gain], "margin": [0.3],
            "constraint_gain_ci": [[low, high]], "kl": 0.5, "kl_ci": [0.4, 0.6], "lam": [*lam], "seconds": 7.4}


def test_the_table_says_what_holds_as_far_as_the_sample_can_tell(capsys):
    rows = {"reference": row(0.0, 0.0, 0.0, lam=()), "above": row(0.31, 0.2, 0.4),
            "near": row(0.28, 0.2, 0.33), "below": row(0.2, 0.1, 0.25), "optimum": row(0.3, 0.25, 0.35)}
    train.print_table(["safe"], rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    header, lines = lines[0], {line.split()[0]: line for line in lines[1:]}
    assert len(lines) == 5
    assert " yes " in lines["above"] and " within error " in lines["near"] and " no " in lines["below"]
    assert " yes " in lines["optimum"] and " no " in lines["reference"]
    shown = ("+1.000 [+0.900, +1.100]", "+0.310 [+0.200, +0.400]", "0.300", "0.500 ± 0.100", "1.250", "7")
    assert all(x in lines["above"] for x in shown)
    for title, value in (("reward gain", "+1.000 [+0.900, +1.100]"), ("safe gain", "+0.310 [+0.200, +0.400]"),
                         ("  b", "  0.300"), ("holds", "yes"), ("KL", "0.500 ± 0.100"), ("seconds", "7")):
        edge = header.index(title) + len(title)  # columns stand under each other
        assert lines["above"][:edge].endswith(value)
        assert all(line[edge:edge + 1] in (" ", "") for line in lines.values())
    assert lines["above"].index("1.250") == header.index("λ*")


@pytest.mark.parametrize("m", [1, 2])
def test_the_optimum_row_is_the_closed_form_whatever_policy_the_responses_are_from(space, m):
    """On an enumerated space, from the mixture of the reference and any policy; per prompt, with the interval by hand."""
    s, other, beta, margin = space(m), space(m, seed=3), 0.8, f64(0.5, 0.3)[:m]
    scores = torch.cat([s.r[None], s.g])
    ref = mocan.Sample(None, s.spread(s.ref.log()), s.spread(s.ref.log()), s.spread(scores), s.spread(scores))
    near = mocan.Sample(None, other.spread(other.ref.log()), other.spread(s.ref.log()), other.spread(scores), other.spread(scores))
    rows = mocan.optima(near, ref, s.spread(other.ref.log()), margin, beta)
    assert len(rows) == 31
    got, lam = rows[15], f64(*rows[15]["lam"])
    assert torch.allclose(lam, dual.solve(s.spread(s.r), s.spread(s.g), margin, beta).lam, atol=1e-8, rtol=0)
    policy = optimum(s, lam, beta)
    reward = ((policy - s.ref) * s.r).sum(dim=1)
    kl = (policy * (policy / s.ref).log()).sum(dim=1)
    assert got["constraint_gain"] == pytest.approx(margin.tolist(), abs=1e-8)
    for name, each in (("reward_gain", reward), ("kl", kl)):
        half = 1.96 * each.std() / len(each) ** 0.5
        assert got[name] == pytest.approx(each.mean().item(), abs=1e-8)
        assert got[name + "_ci"] == pytest.approx([(each.mean() - half).item(), (each.mean() + half).item()], abs=1e-8)
    for at, row in enumerate(rows):  # the picture's curve, from λ = 0 to 2λ*
        there = at / 15 * lam
        assert row["lam"] == pytest.approx(there.tolist())
        assert row["constraint_gain"] == pytest.approx(gains(s, optimum(s, there, beta)).tolist(), abs=1e-8)


def test_where_the_margin_is_out_of_reach_there_is_no_optimum(space, capsys):
    s = space(1)
    ref = mocan.Sample(None, s.spread(s.ref.log()), s.spread(s.ref.log()), *2 * [s.spread(torch.cat([s.r[None], s.g]))])
    assert mocan.optima(ref, ref, ref.logp, f64(99.0), 1.0) == []
    assert "no optimum by these responses: margin [99" in capsys.readouterr().out


def test_kl_is_a_mean_over_prompts_with_its_interval():
    scores = torch.zeros(2, 2, 2, dtype=torch.float64)
    row = mocan.compare(scores, f64(1, 2, 3, 5).view(2, 2), torch.full((2, 2), 0.5), scores)
    half = 1.96 * 2.5 / 2 ** 0.5 / 2 ** 0.5  # per prompt 1.5 and 4
    assert row["kl"] == pytest.approx(2.75) and row["kl_ci"] == pytest.approx([2.75 - half, 2.75 + half])


def test_weights_of_responses_count(capsys):
    scores, ref = f64(1, 3, 0, 4).view(1, 2, 2), torch.zeros(1, 2, 2)
    row = mocan.compare(scores, f64(1, 2, 3, 5).view(2, 2), f64(1, 0, 0.25, 0.75).view(2, 2), ref)
    assert row["reward_gain"] == pytest.approx((1 + 3) / 2) and row["kl"] == pytest.approx((1 + 0.75 + 3.75) / 2)


def test_evaluation_compares_every_policy_with_the_reference_on_its_own_responses(monkeypatch, tmp_path):
    reference, other, beta, names = tiny(1, sharp=6.0), tiny(2, sharp=6.0), 0.6, ["helpful", "harmless"]
    judges = {name: tiny(seed, score_head=True) for seed, name in enumerate(names, start=5)}
    tok = SimpleNamespace(**{**vars(DIGITS), "encoding": SimpleNamespace(
        encode_ordinary=DIGITS.encoding.encode_ordinary, decode=lambda ids: "".join(map(str, ids)))})
    prompts, plan, margin = ["1", "23", "4", "51"], mocan.Recipe("evaluate", key="0/evaluate", batch=100), f64(0.001)
    saved = {"reference": {**to_checkpoint(reference), "seconds": 2.0},
             "other": {**to_checkpoint(other), "lam": [0.4], "seconds": 3.0}}
    c = SimpleNamespace(device="cpu", seed=0, algo="mocan", beta=beta, eval_prompts=4, eval_responses=64, batch=16, accumulate=1, sample_batch=100,
                        out=str(tmp_path), run="a run", resume=False, checkpoint_every=60.0)
    split = SimpleNamespace(evaluation=[Pair(prompt, ("", ""), {}) for prompt in prompts])
    results = []
    monkeypatch.setattr(train, "write_results", lambda *args: results.append(args))
    monkeypatch.setattr(train, "print_table", lambda *args: results.append(args))
    train.evaluate(c, saved["reference"], {"other": saved["other"]},
                   [{name: to_checkpoint(judge) for name, judge in judges.items()}], {"mocan": {"units": [torch.eye(2)]}}, names, margin, split, tok)
    (_, rows, frontier, confirmed, asked, texts), table = results
    assert torch.equal(confirmed["units"][0], torch.eye(2))
    prompts = data.spread([pair.prompt for pair in split.evaluation], 4)
    assert asked == prompts and table == (["harmless"], rows)
    assert list(rows) == ["reference", "other", "optimum"] and list(texts) == ["reference", "other"]
    assert rows["reference"]["seconds"] == 2.0

    found = {}
    for name, policy in (("reference", reference), ("other", other)):
        pool, logp = mocan.sample_pool(policy, tok, prompts, 64, plan)
        scores = torch.stack([torch.stack([judges[x].score(t, m) for t, m in zip(*pool)]) for x in names]).detach().double()
        ref_logp = torch.stack([sequence_logprob(reference, t, m) for t, m in zip(*pool)]).detach()
        found[name] = scores, (logp - ref_logp).mean().item(), pool, logp, ref_logp
        assert texts[name][0] == pool.texts(tok)
        assert torch.allclose(torch.tensor(texts[name][1]).T.view(2, 4, 64).double(), scores, atol=1e-5)
    base, _, ref_pool, _, ref_logp = found["reference"]
    for name, (scores, kl, *_) in found.items():
        expected = (scores.mean(dim=(1, 2)) - base.mean(dim=(1, 2))).tolist()
        assert [rows[name]["reward_gain"], *rows[name]["constraint_gain"]] == pytest.approx(expected, abs=1e-5)
        assert rows[name]["kl"] == pytest.approx(kl, abs=1e-5) and rows[name]["margin"] == [0.001]
    assert rows["other"]["lam"] == [0.4] and rows["other"]["seconds"] == 3.0 and rows["other"]["kl"] > 0.1

    # the frontier: self-normalised importance sampling from both policies' responses, as weights by hand
    scores, _, _, logp, own_ref = found["other"]
    of_ref = torch.stack([sequence_logprob(other, t, m) for t, m in zip(*ref_pool)]).detach()
    lp, lr = torch.cat([logp, of_ref], dim=1).double(), torch.cat([own_ref, ref_logp], dim=1).double()
    both = torch.cat([scores, base], dim=2)
    assert len(frontier) == 31 and frontier[0]["lam"] == [0.0]
    assert frontier[15]["lam"] == pytest.approx(rows["optimum"]["lam"])
    for at in frontier[::6]:
        weight = lr.exp() / (0.5 * lp.exp() + 0.5 * lr.exp()) * ((both[0] + at["lam"][0] * both[1]) / beta).exp()
        weight = weight / weight.sum(dim=1, keepdim=True)
        expected = (weight * both).sum(dim=2).mean(dim=1) - base.mean(dim=(1, 2))
        assert [at["reward_gain"], *at["constraint_gain"]] == pytest.approx(expected.tolist(), abs=1e-4)


# ---- what a second judge confirms

def within(x):
    return (x - x.mean(2, keepdim=True)).flatten(1).double()


def test_the_regression_is_least_squares_within_prompts():
    first, second = torch.randn(3, 50, 6) + 5 * torch.randn(3, 50, 1), torch.randn(3, 50, 6)
    second = second + 0.5 * first.flip(0)
    expected = torch.linalg.lstsq(within(first).T, within(second).T).solution.T
    assert torch.allclose(mocan.regression(first, second), expected, atol=1e-10)


def test_exact_scores_pass_untouched(capsys):
    scores = torch.randn(3, 20, 4)
    units = mocan.confirm([scores], [{}], ["helpful", "harmless", "polite"])["units"]
    assert torch.equal(mocan.in_units(units, [scores])[0], scores) and capsys.readouterr().out == ""


def labelled(scores, truth):
    """A judge's scores (1+m, P, 2) times the temperatures of preferences drawn from the truth."""
    taus = []
    for score, exact in zip(scores, truth):
        chosen = (torch.rand(len(exact)) < torch.sigmoid(exact[:, 1] - exact[:, 0])).long()[:, None]
        taus.append(mocan.calibrate(score.gather(1, chosen)[:, 0], score.gather(1, 1 - chosen)[:, 0]))
    return torch.stack(taus).float()[:, None, None]


def noisy_judges(truth, pairs, noise, generator):
    """Two judges of responses (1+m, N, K) and of calibration pairs (1+m, P, 2): exact scores and errors, half as large
    on the pairs, which are the text that they learned from, calibrated there; helpful and harmless err alike."""
    said, on_pairs = [], []
    for _ in range(2):
        found = []
        for exact, size in ((truth, noise), (pairs, noise / 2)):
            common = torch.randn(exact.shape[1:], generator=generator)
            own = torch.randn(exact.shape, generator=generator)
            found.append(exact + size * (0.6 * common + 0.8 * own))
        tau = labelled(found[1], pairs)
        said.append(tau * found[0])
        on_pairs.append(tau * found[1])
    return said, on_pairs


def judged(on_pairs, names):
    return [dict(zip(names, ({"pairs": x} for x in scores))) for scores in on_pairs]


@pytest.mark.parametrize("names", [["helpful", "harmless"], ["helpful", "harmless", "polite"]])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_what_a_second_judge_confirms_is_nearer_to_the_truth(names, noise, capsys):
    """In the built-in world, where the truth is known: the dual on scores of noisy judges, as they are and regressed."""
    world, generator = data.world_preferences(12000), torch.Generator().manual_seed(1)
    by_prompt = {}
    for pair in world:
        by_prompt.setdefault(pair.prompt, []).extend(pair.responses)
    prompts, K = [prompt for prompt, texts in by_prompt.items() if len(texts) >= 16], 16
    texts = [text for prompt in prompts for text in by_prompt[prompt][:K]]
    truth = data.world_scores(names, prompts, texts)
    pairs = data.world_scores(names, [pair.prompt for pair in world[:3000]], [y for pair in world[:3000] for y in pair.responses])
    said, on_pairs = noisy_judges(truth, pairs, noise, generator)
    confirmed = mocan.confirm(said, judged(on_pairs, names), names)
    units = confirmed["units"]
    scores, second = mocan.in_units(units, said)
    logp = torch.zeros(truth.shape[1:])
    margin = 0.25 * dual.reachable(truth[1:])
    off = {}
    for way, some in (("as they are", said[0]), ("regressed", scores)):
        sample = mocan.Sample(None, logp, logp, some, second)
        found = mocan.solve_from(sample, some[1:].double().mean(dim=(1, 2)), margin, 1.0)
        true, _ = mocan.gains(sample, truth, found.lam, 1.0)
        predicted = torch.tensor([found.score_gain, *found.constraint_gain])
        off[way] = (predicted - true).norm().item()
        weight = (some[0] + torch.einsum("m,mnk->nk", found.lam.float(), some[1:])).softmax(1)
        each = (weight * (second - truth)).sum(2) - (second - truth).mean(2)  # (1+m, N) what the second judge gets wrong
        gain, error = mocan.gains(sample, second, found.lam, 1.0)
        assert torch.allclose(gain, true + each.mean(1), atol=1e-4)
    interval = 1.96 * ((weight * second).sum(2) - second.mean(2)).std(1) / len(prompts) ** 0.5
    assert torch.allclose(1.96 * error, interval, rtol=1e-3)
    # M's error is what the gains of π_λ vary by, were M another one of its draws
    gain, error = mocan.gains(sample, scores, found.lam, 1.0)
    assert gain.tolist() == pytest.approx([found.score_gain, *found.constraint_gain.tolist()], abs=1e-4)
    assert error.tolist() == pytest.approx([found.score_gain_se, *found.constraint_gain_se.tolist()], rel=1e-3)
    others = torch.stack([(weight * torch.einsum("ij,jnk->ink", M, said[0])).sum(2).mean(1) - (M @ said[0].mean(dim=(1, 2)))
                          for M in confirmed["draws"]])  # (D, 1+m)
    assert mocan.error_of_units(confirmed, gain).tolist() == pytest.approx(others.std(0).tolist(), rel=1e-3)
    assert off["regressed"] < 0.25 * off["as they are"]  # measured 0.07 to 0.18
    # the second judge overstates nothing; it understates where errors are large, since log-odds of a preference are
    # flatter than the scores behind them by what a judge leaves open: by 1, 15 and 39 % of b for noise 0.5, 1, 2
    assert (each.mean(1) < interval).all()
    assert (each.mean(1) > -interval - 0.2 * noise * margin.mean()).all()


@pytest.mark.parametrize("sign, where", [(-1.0, "responses"), (0.0, "responses"), (-1.0, "pairs"), (0.0, "pairs")])
def test_judges_that_do_not_agree_leave_the_scores_as_they_are(sign, where):
    scores, pairs = torch.randn(2, 60, 8), torch.randn(2, 60, 2)
    other = torch.tensor([1.0, sign]).view(2, 1, 1)
    second, on_pairs = (scores * other, pairs) if where == "responses" else (scores, pairs * other)
    with pytest.warns(UserWarning, match="two judges do not agree: all scores stay as they are"):
        units = mocan.confirm([scores, second], judged([pairs, on_pairs], ["helpful", "safe"]), ["helpful", "safe"])["units"]
    assert len(units) == 2 and all(torch.equal(unit, torch.eye(2)) for unit in units)


def test_pairs_that_say_nothing_but_rounding_leave_the_units():
    """Prompts alone: both responses of a pair are empty, and may differ in the last bit."""
    scores, pairs = torch.randn(2, 60, 8), torch.ones(2, 60, 2)
    second = pairs.clone()
    pairs[:, 7, 1] += 5e-7
    second[:, 7, 0] += 1e-6
    found = mocan.confirm([scores, scores.clone()], judged([pairs, second], ["helpful", "safe"]), ["helpful", "safe"])
    assert all(torch.allclose(unit, torch.eye(2), atol=1e-6) for unit in found["units"])


def test_what_is_hardly_confirmed_is_warned_of():
    torch.manual_seed(2)  # where both slopes are positive
    scores, pairs = torch.randn(2, 60, 8), torch.randn(2, 60, 2)
    with pytest.warns(UserWarning, match="within its error only"):
        mocan.confirm([scores, torch.randn(2, 60, 8) + 0.03 * scores], judged([pairs, pairs], ["helpful", "safe"]),
                      ["helpful", "safe"])


def test_the_errors_of_what_is_confirmed_are_those_of_repetition(capsys):
    """The bootstrap's half-width against the spread of M over fresh data of the same kind."""
    found, errors = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        truth, pairs = torch.randn(2, 200, 8), torch.randn(2, 150, 2)
        said = [truth + torch.randn(2, 200, 8) for _ in range(2)]
        on_pairs = [pairs + torch.randn(2, 150, 2) for _ in range(2)]
        M, _ = mocan.confirm(said, judged(on_pairs, ["helpful", "safe"]), ["helpful", "safe"])["units"]
        found.append(M[0, 0].item())
        errors.append(float(capsys.readouterr().out.split("±")[1].split()[0]))
    assert torch.tensor(errors).mean() / 1.96 == pytest.approx(torch.tensor(found).std().item(), rel=0.25)


# ---- how long to train, and in which units

def supervised(monkeypatch, held_out, **changes):
    """train_reference where held_out(model) says the calibration loss; the model."""
    real, model = mocan.map_pool, tiny()
    monkeypatch.setattr(mocan, "map_pool", lambda model, pool: -f64(held_out(model)) if pool == "held out" else real(model, pool))
    examples = changes.pop("examples", 24)
    mocan.train_reference(model, some_pool(N=examples, K=2), "held out", recipe("reference", **changes))
    return model


def test_the_best_epoch_is_kept_and_two_worse_ones_end_a_training(monkeypatch):
    losses, seen, steps = iter([3.0, 2.0, 2.5, 2.1, 1.0]), [], []
    after_every_step(monkeypatch, lambda progress, norm: steps.append(norm))

    def held_out(model):
        seen.append(model.wte.weight.detach().clone())
        return next(losses)
    model = supervised(monkeypatch, held_out, steps=50, batch=4, accumulate=2)  # 3 steps of 2·4 examples are an epoch
    assert len(steps) == 3 * 4 and len(seen) == 4
    assert torch.equal(model.wte.weight, seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("examples, steps, asked", [(24, 6, 1), (24, 7, 2), (24, 12, 2), (24, 14, 3), (3, 2, 2)])
def test_calibration_is_asked_after_every_epoch_and_at_the_end(monkeypatch, examples, steps, asked):
    calls, done = [], []
    after_every_step(monkeypatch, lambda progress, norm: done.append(norm))
    supervised(monkeypatch, lambda model: calls.append(len(done)) or -len(calls), examples=examples, steps=steps, batch=4)
    assert len(done) == steps and len(calls) == asked and calls[-1] == steps - 1
    epoch = max(1, examples // 4)
    assert [at + 1 for at in calls] == sorted({*range(epoch, steps + 1, epoch), steps})


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches(monkeypatch):
    added = []
    real = mocan.Progress.add
    monkeypatch.setattr(mocan.Progress, "add", lambda self, loss: (added.append(loss.item()), real(self, loss)))
    losses = run_mocan(steps=3, batch=4, accumulate=2).losses
    assert losses == pytest.approx([sum(added[i:i + 2]) / 2 for i in (0, 2, 4)], abs=1e-6) and len(added) == 6


def test_the_calibrated_loss_is_the_least_over_temperatures():
    chosen, rejected = torch.randn(400, dtype=torch.float64) + 0.3, torch.randn(400, dtype=torch.float64)
    grid = min(mocan.score_loss(t * chosen, t * rejected).mean().item() for t in torch.linspace(0, 3, 3001).tolist())
    for scale in (0.1, 1, 7):
        assert mocan.calibrated_loss(scale * chosen, scale * rejected) == pytest.approx(grid, abs=1e-6)


def learned(monkeypatch, seen):
    """learn_score on three groups of pairs, each of its own number of responses; says on which groups it did what."""
    def group(P):
        tokens, mask = text_batch([[1 + n % 5] for n in range(P) for _ in range(2)], [[1 + i % 5, i % 3] for i in range(2 * P)])
        order = torch.tensor([[n % 2, 1 - n % 2] for n in range(P)])
        rows = torch.arange(P)[:, None]
        return Pool(tokens.view(P, 2, -1)[rows, order], mask.view(P, 2, -1)[rows, order])
    for name in ("calibrate", "calibrated_loss"):
        real = getattr(mocan, name)
        monkeypatch.setattr(mocan, name, lambda a, b, name=name, real=real: seen.append((name, len(a))) or real(a, b))
    model = tiny(score_head=True)
    torch.nn.init.normal_(model.score_head.weight)
    mocan.learn_score(model, "safe", group(40), group(15), group(22), recipe(steps=12, batch=8), 2)
    return model, group(15)


def test_temperature_and_stopping_are_the_calibration_pairs_and_what_is_said_the_evaluation_pairs(monkeypatch, capsys):
    seen = []
    model, calibration = learned(monkeypatch, seen)
    fitted = [x for x in seen if x[0] == "calibrate"]
    assert {n for name, n in seen if name == "calibrated_loss"} == {15}
    assert fitted[-1] == ("calibrate", 22) and all(n == 15 for _, n in fitted[:-1])  # the last one is only printed
    assert "safe, evaluation: " in capsys.readouterr().out


def test_a_judge_is_in_the_units_of_its_preference_on_the_calibration_pairs(monkeypatch):
    model, calibration = learned(monkeypatch, [])
    score = mocan.map_pool(model, calibration)
    assert mocan.calibrate(*score.T).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_judge_is_the_average_of_its_runs_from_one_start(monkeypatch, runs):
    model, seen, ends = tiny(score_head=True), [], []
    start = copy.deepcopy(model.state_dict())

    def train_score(learner, training, calibration, recipe):
        assert all(torch.equal(x, start[what]) for what, x in learner.state_dict().items())
        seen.append((recipe.stage, recipe.key))
        with torch.no_grad():
            for p in learner.parameters():
                p += torch.randn_like(p)
        ends.append(copy.deepcopy(learner.state_dict()))
    monkeypatch.setattr(mocan, "train_score", train_score)
    monkeypatch.setattr(mocan, "temperature", lambda *_: 1.0)
    pool = some_pool(K=2)
    mocan.learn_score(model, "safe", pool, pool, pool, recipe("score safe"), runs)
    assert len({*seen}) == runs and seen[0] == ("score safe", "0")  # orders of their own; the first as if it were alone
    for what, x in model.state_dict().items():
        assert torch.allclose(x, torch.stack([end[what] for end in ends]).mean(0), atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 100.0])
def test_a_judge_that_no_temperature_fits_keeps_its_own_and_says_so(monkeypatch, tau):
    monkeypatch.setattr(mocan, "say_agreement", lambda *_: None)
    monkeypatch.setattr(mocan, "calibrate", lambda chosen, rejected: torch.tensor(tau))
    with pytest.warns(UserWarning, match="no temperature fits the safe scores on 15 calibration pairs"):
        model, _ = learned(monkeypatch, [])
    assert model.score_head.weight.abs().sum() > 0.1


@pytest.mark.parametrize("lead", [0.05, 1.0, 30.0])
def test_scores_that_are_never_wrong_have_no_temperature(lead):
    score = lead * torch.stack([torch.arange(1.0, 9.0), torch.zeros(8)], dim=1)  # chosen, rejected
    with pytest.warns(UserWarning, match="no temperature fits the safe scores on 8 calibration pairs"):
        assert mocan.temperature("safe", score) == 1.0
    score[3] = score[3].flip(0)  # once wrong: there is a best one
    tau = mocan.temperature("safe", score)
    chosen, rejected = score.double().T
    p = torch.sigmoid(-tau * (chosen - rejected))
    assert 0 < tau < 100 and abs((p * (chosen - rejected)).sum()) < 1e-6 * lead  # the likelihood's slope is 0


def test_what_is_said_of_a_score_by_hand(capsys):
    """τ is within its error, by Fisher's information, of the truth."""
    P = 3000
    score = torch.randn(P, 2, dtype=torch.float64)
    prefers = torch.bernoulli(torch.sigmoid(0.7 * (score[:, 1] - score[:, 0]))).long()
    by_choice = torch.stack([score.gather(1, prefers[:, None])[:, 0], score.gather(1, 1 - prefers[:, None])[:, 0]], dim=1)
    mocan.say_agreement("safe", by_choice)
    right, tau = map(float, re.search(r"safe: ([\d.]+)% of 3000 pairs right; τ = ([\d.]+);", capsys.readouterr().out).groups())
    share = (score.argmax(dim=1) == prefers).double().mean().item()
    assert right == pytest.approx(100 * share, abs=0.06)
    lead = score.gather(1, prefers[:, None])[:, 0] - score.gather(1, 1 - prefers[:, None])[:, 0]
    p = torch.sigmoid(-tau * lead)
    assert tau == pytest.approx(0.7, abs=4 / (p * (1 - p) * lead ** 2).sum().item() ** 0.5)
    mocan.say_agreement("safe", torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
    assert "safe: 75.0% of 2 pairs" in capsys.readouterr().out  # a tie is half right




@pytest.mark.parametrize("losses", [[math.nan, math.nan], [math.inf, 2.0, 3.0], [math.nan, 2.0, 1.0, 5.0]])
def test_a_calibration_loss_that_is_not_finite_leaves_weights_to_end_with(losses):
    model = tiny()
    progress = mocan.Progress(recipe(steps=9), model=model, optimizer=mocan.adamw(model))
    for i, loss in enumerate(losses):
        model.wte.weight.data.fill_(float(i))
        progress.consider(loss)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert progress.best["weights"]["wte.weight"][0, 0] == (losses.index(min(finite)) if finite else 0)


# ---- what a benchmark gives another trainer
def test_pairs_for_another_trainer_are_drawn_by_bradley_terry():
    from bench import drawn_pairs
    vocab, N, K = 1000, 40, 6
    tokens = torch.arange(N * K * 3).view(N, K, 3) + 1  # every token is one response's
    tokens[:, :, 0] = torch.arange(N)[:, None] + vocab
    pool = Pool(tokens.int(), torch.tensor([False, True, True]).expand(N, K, 3))
    s = torch.randn(N, K)
    rows = drawn_pairs(pool, s, 100 * N * K // 2, seed=0)
    place = {int(tokens[n, k, 1]): (n, k) for n in range(N) for k in range(K)}
    won = torch.zeros(N, K, K)
    for row in rows:
        (n, i), (other, j) = place[row["chosen_ids"][0]], place[row["rejected_ids"][0]]
        assert n == other and row["prompt_ids"] == [vocab + n] and i != j
        won[n, i, j] += 1
    assert (won.sum((1, 2)) == 100 * K // 2).all() and (won.sum(2) + won.sum(1) == 100).all()  # once an epoch
    n, i, j = (won + won.transpose(1, 2)).triu(1).nonzero(as_tuple=True)
    p, met = torch.sigmoid(s[n, i] - s[n, j]), won[n, i, j] + won[n, j, i]
    z = (won[n, i, j] - met * p) / (met * p * (1 - p)).sqrt()  # 600 of them, of variance 1
    assert len(z) == N * K * (K - 1) // 2 and abs(z.mean()) < 0.13 and 0.8 < z.std() < 1.2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16])
def test_calibrate_takes_ratings_of_any_type(dtype):
    chosen, rejected = torch.tensor([3, 1, 2, 5]), torch.tensor([1, 2, 0, 1])
    assert mocan.calibrate(chosen.to(dtype), rejected.to(dtype)).item() == mocan.calibrate(chosen.double(), rejected.double()).item()
