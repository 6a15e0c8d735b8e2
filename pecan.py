"""
pecan.py: PeCAN, preference-based one-shot constrained alignment (arXiv 2405.19544v3). No score model anywhere.

mocan.py needs r and g as numbers. PeCAN needs only preferences: which of two responses is more helpful, which is safer.

1. Pre-align one policy per preference by DPO from π_ref: π_r for helpfulness, π_g per constraint.         (prealign)
2. Score K responses of π_ref by log-ratios: DPO's optimum is π_r ∝ π_ref·exp(r/β), hence
       β·ln(π_r/π_ref) = r − β·ln Z_r(x),   β·ln(π_g/π_ref) = g − β·ln Z_g(x):
   the scores, up to a constant of the prompt, which no Bradley–Terry label and no π_λ can see.
3. The same dual with r → ln(π_r/π_ref), g → ln(π_g/π_ref), β → 1, b → b/β.                        (implicit_dual)
4. One policy update: DPO with pairs labelled by s = β·(ln(π_r/π_ref) + ⟨λ*, ln(π_g/π_ref)⟩).        (train_pecan)

Why step 3 needs no second solver. Divide MoCAN's D(λ) by β and write r/β, g/β as log-ratios:
    D(λ)/β = E_x ln E_ref exp( ln(π_r/π_ref) + ⟨λ, ln(π_g/π_ref) − E_ref[ln(π_g/π_ref)] − b/β⟩ ) + a constant,
which is D with β = 1 and margin b/β. The paper's d = KL(π_ref‖π_g) is −E_ref[ln(π_g/π_ref)], so the solver's own
E_ref[g] supplies it. Both have one minimiser; implicit_dual multiplies by β again, for gains in the units of r and g.

    symbol         variable   shape        symbol            variable     shape
    ln π_r(y|x)    logp_r     (N, K)       ln π_ref(y|x)     ref_logp     (N, K)
    ln π_g(y|x)    logp_g     (m, N, K)    τ, calibration    tau          (), one per preference

Different from the paper: its published labels lack the factor β, which makes them 1/β times too sharp. And implicit
scores are miscalibrated, since a pre-alignment stops before DPO's optimum; `calibrate` fits the factor τ that mends it
(--no-calibrate: 1).

Read next: train.py, the whole job.
"""

import torch

import dual
from mocan import (bradley_terry, check_finite, gather_pairs, logprobs, lr_at, mixed_precision, pair_batches,
                   preference_loss)
from model import sequence_logprob


# ---- the scores: tensors in, tensors out
def implicit_score(logp_r, logp_g, ref_logp, lam, beta):
    """s = β·(ln(π_r/π_ref) + ⟨λ, ln(π_g/π_ref)⟩): logp_r, ref_logp (…), logp_g (m, …), lam (m,) -> (…), in the units
    of the score that the preferences come from."""
    lam = lam.to(logp_g).view(-1, *[1] * ref_logp.dim())
    return beta * ((logp_r - ref_logp) + (lam * (logp_g - ref_logp)).sum(dim=0))


def calibrate(implicit_0, implicit_1, prefers, iterations=50):
    """The temperature τ that makes P(y_1 ≻ y_0) = σ(τ·(implicit_1 − implicit_0)) most likely on held-out preferences.

    implicit_0, implicit_1 (P,), prefers (P,) 0 or 1 -> τ (), at least 0. One-parameter logistic regression by Newton's
    method. τ = 1: calibrated; τ > 1: the pre-aligned policy understates its preference; τ < 1: it overstates it.
    """
    x = (implicit_1 - implicit_0).double() * (2 * prefers.double() - 1)  # the chosen one's lead
    tau = torch.zeros((), dtype=torch.float64)
    for _ in range(iterations):
        p = torch.sigmoid(-tau * x)  # probability of the choice that was not made
        tau = (tau + (p * x).sum() / (p * (1 - p) * x * x).sum().clamp_min(1e-12)).clamp(0, 100)
    return tau


def implicit_dual(logp_r, logp_g, ref_logp, margin, beta):
    """λ* from log-probability tuples: logp_r, ref_logp (N, K), logp_g (m, N, K), margin (m,); gains in g's units. The same
    problem in nats, log-ratios alone with β → 1 and b → b/β, has D/β for D. Raises dual.Infeasible as dual.solve does."""
    return dual.solve(beta * (logp_r - ref_logp), beta * (logp_g - ref_logp), margin, beta)


# ---- the loop
def train_pecan(policy, pool, ref_logp, score, c, steps, lr, generators, log, stage="pecan"):
    """DPO on pairs of `pool` (N, K, T), labelled by Bradley–Terry on score (N, K); starts from a copy of π_ref.

    Step 1 calls it with the preference data: K = 2, and a score of +inf for the preferred response and 0 for the other,
    which makes the label exactly 1. Step 4 calls it with the reference's samples and implicit_score.
    """
    optimizer, autocast, scaler = mixed_precision(policy, lr, c.dtype)
    group = min(c.group, score.size(1))  # 2 for preference data, whatever --group says
    batches = pair_batches(pool.lengths(), max(1, 2 * c.batch // group), generators[0], group)
    i, j = torch.triu_indices(group, group, 1, device=c.device)  # (G(G-1)/2,) each
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * lr_at(step, steps, c.warmup)
        mean_loss = 0.0
        for _ in range(c.accumulate):
            n, k = next(batches)  # (B,) prompts, (B, G) some of the K responses to each
            some = score[n[:, None], k].to(c.device)  # (B, G)
            p_1 = bradley_terry(some[:, i], some[:, j])  # β is in the implicit score already
            if c.labels == "sampled":
                p_1 = torch.bernoulli(p_1.cpu(), generator=generators[1]).to(c.device)
            tokens, mask = gather_pairs(pool, n, k, c.device)  # (B·G, T)
            with autocast:
                logp = sequence_logprob(policy, tokens, mask).view(k.shape)  # (B, G)
            ref = ref_logp[n[:, None], k].to(c.device)
            loss = preference_loss(logp[:, i], logp[:, j], ref[:, i], ref[:, j], p_1, c.beta).mean()
            check_finite(value := loss.item(), stage, step)
            scaler.scale(loss / c.accumulate).backward()
            mean_loss += value / c.accumulate
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), c.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        log(step + 1, steps, loss=mean_loss)


# ---- before the dual
def prealign(policy, pairs, ref_logp, prefers, c, generators, log):
    """Step 1 for one preference: pairs (P, 2, T), their ref_logp (P, 2), prefers (P,) the preferred one's index; trains
    `policy`, a copy of π_ref. Its learning rate is low: hard labels are noise that a policy learns by heart, and
    `calibrate` mends a timid one."""
    score = torch.zeros(len(prefers), 2).scatter(1, prefers[:, None], float("inf"))
    train_pecan(policy, pairs, ref_logp, score, c, c.prealign_steps, c.prealign_lr, generators, log, "prealign")


def temperature(policy, name, pairs, ref_logp, prefers, c):
    """τ of a pre-aligned policy on held-out preferences; prints it and how well the implicit score predicts them."""
    implicit = c.beta * (logprobs(policy, pairs, c) - ref_logp)  # (P, 2)
    tau = calibrate(implicit[:, 0], implicit[:, 1], prefers).item()
    right = (implicit.argmax(dim=1) == prefers).float().mean().item()
    print(f"  {name}: the implicit score agrees with {right:.1%} of {len(prefers)} held-out preferences; temperature "
          f"{tau:.3f}{'' if c.calibrate else ' (not applied)'}")
    return tau


def say_miscalibration(names, scores, implicit):
    """PeCAN's weak spot, measured: implicit scores against the true or learned ones, both (1+m, N, K), per prompt centred."""
    for name, s, i in zip(("helpful", *names), scores.double(), implicit.double()):
        s, i = s - s.mean(dim=1, keepdim=True), i - i.mean(dim=1, keepdim=True)
        print(f"  {name}: implicit against explicit score: correlation "
              f"{((s * i).mean() / (s.pow(2).mean() * i.pow(2).mean()).sqrt()).item():.3f}, slope "
              f"{((s * i).mean() / s.pow(2).mean()).item():.3f}")
