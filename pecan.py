"""
pecan.py: PeCAN, preference-based one-shot constrained alignment (arXiv 2405.19544v3). No score
model anywhere.

mocan.py needs r and g as numbers. PeCAN needs only preferences: which of two responses is more
helpful, which is safer.

1. Pre-align one policy per preference by DPO from π_ref: π_r for helpfulness, π_g per
   constraint.                                                                        (prealign)
2. Score K responses of π_ref by log-ratios: DPO's optimum is π_r ∝ π_ref·exp(r/β), hence
       β·ln(π_r/π_ref) = r − β·ln Z_r(x),   β·ln(π_g/π_ref) = g − β·ln Z_g(x):
   the scores, up to a constant of the prompt, which no label and no π_λ can see.     (calibrate)
3. The same dual with r → ln(π_r/π_ref), g → ln(π_g/π_ref), β → 1, b → b/β.     (implicit_dual)
4. One policy update: DPO with pairs labelled by s = β·(ln(π_r/π_ref) + ⟨λ*, ln(π_g/π_ref)⟩).
                                                                                      (train_pecan)

Why step 3 needs no second solver. Divide MoCAN's D(λ) by β and write r/β, g/β as log-ratios:
    D(λ)/β = E_x ln E_ref exp( ln(π_r/π_ref) + ⟨λ, ln(π_g/π_ref) − E_ref[ln(π_g/π_ref)] − b/β⟩ )
plus a constant, which is D with β = 1 and margin b/β. The paper's d = KL(π_ref‖π_g) is
−E_ref[ln(π_g/π_ref)], so the solver's own E_ref[g] supplies it. Both have one minimiser;
implicit_dual multiplies by β again, for gains in the units of r and g.

    symbol         variable   shape        symbol            variable     shape
    ln π_r(y|x)    logp_r     (N, K)       ln π_ref(y|x)     ref_logp     (N, K)
    ln π_g(y|x)    logp_g     (m, N, K)    τ, calibration    tau          (), one per preference

Different from the paper: its published labels lack the factor β, which makes them 1/β times too
sharp. And implicit scores are miscalibrated, since a pre-alignment stops before DPO's optimum;
`calibrate` fits the factor τ that mends it: ln π_ref + τ·ln(π_r/π_ref) then stands for ln π_r.

Read next: train.py, the whole job.
"""

import torch

import dual
from mocan import (Descent, bradley_terry, group_batches, logprobs, preference_loss, take,
                   take_text)
from model import sequence_logprob


# ---- the scores: tensors in, tensors out
def implicit_score(logp_r, logp_g, ref_logp, lam, beta):
    """s = β·(ln(π_r/π_ref) + ⟨λ, ln(π_g/π_ref)⟩): logp_r, ref_logp (…), logp_g (m, …), lam (m,)
    -> (…), in the units of the score that the preferences come from."""
    reward = logp_r - ref_logp  # (…)
    safety = logp_g - ref_logp  # (m, …)
    lam = lam.to(safety).view(-1, *[1] * reward.dim())  # (m, 1, …)
    return beta * (reward + (lam * safety).sum(dim=0))


def calibrate(implicit_chosen, implicit_rejected, iterations=50):
    """The temperature τ that makes P(chosen ≻ rejected) = σ(τ·(implicit_chosen −
    implicit_rejected)) most likely on held-out preferences: (P,), (P,) -> τ (), at least 0.

    One-parameter logistic regression by Newton's method. τ = 1: calibrated; τ > 1: the pre-aligned
    policy understates its preference; τ < 1: it overstates it.
    """
    lead = implicit_chosen - implicit_rejected
    lead = lead.double()
    tau = torch.zeros((), dtype=torch.float64)
    for _ in range(iterations):
        p = torch.sigmoid(-tau * lead)  # probability of the choice that was not made
        slope = (p * lead).sum()
        curvature = (p * (1 - p) * lead * lead).sum().clamp_min(1e-12)
        tau = (tau + slope / curvature).clamp(0, 100)
    return tau


# ---- the dual
def implicit_dual(logp_r, logp_g, ref_logp, margin, beta):
    """λ* from log-probabilities: logp_r, ref_logp (N, K), logp_g (m, N, K), margin (m,); gains in
    g's units. The same problem in nats, log-ratios alone with β → 1 and b → b/β, has D/β for D.
    Raises dual.Infeasible as dual.solve does."""
    reward = beta * (logp_r - ref_logp)
    safety = beta * (logp_g - ref_logp)
    return dual.solve(reward, safety, margin, beta)


# ---- the policy update
def train_pecan(policy, pool, ref_logp, logp_r, logp_g, lam, beta, group, recipe, generator):
    """DPO on pairs of pool (N, K, T), labelled by the implicit score -> the loss of every
    micro-batch.

    policy: starts as a copy of π_ref; logp_r, ref_logp (N, K); logp_g (m, N, K); lam (m,); group: G
    responses to a prompt, compared in all their pairs.
    """
    s = implicit_score(logp_r, logp_g, ref_logp, lam, beta)  # (N, K)
    group = min(group, s.size(1))
    j, i = torch.triu_indices(group, group, 1, device=policy.device)  # all pairs of a group
    batches = group_batches(pool.lengths, 2 * recipe.batch, group, generator)
    descent = Descent(policy, recipe)
    for _ in descent.micro_batches():
        n, k = next(batches)  # (B,) prompts, (B, G) some of the K responses to each
        tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·G, T)
        with policy.autocast():
            logp = sequence_logprob(policy, tokens, response_mask).view(k.shape)  # (B, G)
        ref = take(ref_logp, n, k, policy.device)  # (B, G)
        label = take(s, n, k, policy.device)  # (B, G)
        p_i = bradley_terry(label[:, i], label[:, j])  # β is in the implicit score already
        loss = preference_loss(
            logp[:, i], logp[:, j],
            ref[:, i], ref[:, j],
            beta, p_i)  # (B, G(G-1)/2)
        descent.step(loss.mean())
    return descent.losses


# ---- before the dual
def prealign(policy, preferences, ref_logp, beta, recipe, generator):
    """Plain DPO on one preference: `data.Preferences` of P pairs, their ref_logp (P, 2).

    Its learning rate is low: hard labels are noise that a policy learns by heart, and `calibrate`
    mends a timid one.
    """
    pool, prefers, *_ = preferences
    batches = group_batches(pool.lengths, 2 * recipe.batch, 2, generator)
    descent = Descent(policy, recipe)
    for _ in descent.micro_batches():
        n, _ = next(batches)
        chosen = prefers[n]  # (B,)
        k = torch.stack([chosen, 1 - chosen], dim=1)  # (B, 2) chosen, rejected
        tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·2, T)
        with policy.autocast():
            logp = sequence_logprob(policy, tokens, response_mask).view(k.shape)  # (B, 2)
        ref = take(ref_logp, n, k, policy.device)  # (B, 2)
        loss = preference_loss(
            logp[:, 0], logp[:, 1],
            ref[:, 0], ref[:, 1],
            beta)
        descent.step(loss.mean())
    return descent.losses


def temperature(policy, name, preferences, ref_logp, beta, batch=256):
    """τ of a pre-aligned policy on held-out preferences, whose ln π_ref is ref_logp (P, 2); printed
    beside how well the implicit score predicts them."""
    pool, prefers, *_ = preferences
    logp = logprobs(policy, pool, batch)
    implicit = beta * (logp - ref_logp)  # (P, 2)
    chosen = implicit.gather(1, prefers[:, None])
    rejected = implicit.gather(1, 1 - prefers[:, None])
    tau = calibrate(chosen, rejected).item()
    agrees = implicit.argmax(dim=1) == prefers
    right = agrees.float().mean().item()
    print(f"  {name}: the implicit score agrees with {right:.1%} of {len(prefers)} held-out "
          f"preferences; temperature {tau:.3f}")
    return tau
