"""
pecan.py: PeCAN, preference-based one-shot constrained alignment (arXiv 2405.19544v3). No score
model anywhere.

mocan.py needs r and g as numbers. PeCAN needs only preferences: which of two responses is more
helpful, which is safer.

1. Pre-align one policy per preference by DPO from π_ref: π_r for helpfulness, π_g per
   constraint.                                                                        (prealign)
2. Score K responses of π_ref by log-ratios: DPO's optimum is π_r ∝ π_ref·exp(r/β), hence
       β·ln(π_r/π_ref) = r − β·ln Z_r(x),   β·ln(π_g/π_ref) = g − β·ln Z_g(x):
   the scores, up to a constant of the prompt, which no label and no π_λ can see. A pre-alignment
   stops before that optimum; a factor τ on its log-ratios mends it.       (calibrate)
3. The same dual, with r → β·ln(π_r/π_ref), g → β·ln(π_g/π_ref): mocan.solve_from on these scores.
4. One policy update: DPO with pairs labelled by s = β·(ln(π_r/π_ref) + ⟨λ*, ln(π_g/π_ref)⟩).
                                                                                   (train_pecan)

The paper writes step 3 in nats: r → ln(π_r/π_ref), g → ln(π_g/π_ref), β → 1, b → b/β. That is D/β,
with the same minimiser; times β, the gains are in the units of r and g. The paper's d =
KL(π_ref‖π_g) is −E_ref[ln(π_g/π_ref)], so the solver's own E_ref[g] supplies it.

    symbol                     variable   shape        symbol           variable    shape
    ln π_r(y|x), calibrated    logp_r     (N, K)       ln π_ref(y|x)    ref_logp    (N, K)
    ln π_g(y|x), calibrated    logp_g     (m, N, K)    τ                tau         one a preference

Different from the paper's published code: its labels lack the factor β, which makes them 1/β times
too sharp, and its implicit scores are not calibrated.

Read next: train.py, the whole job.
"""

import torch

from data import take, take_text
from mocan import (Descent, bradley_terry, calibrated_loss, logprobs, preference_loss,
                   say_agreement, temperature)
from model import from_checkpoint, sequence_logprob


# ---- the scores: tensors in, tensors out
def implicit_score(logp_r, logp_g, ref_logp, lam, beta):
    """s = β·(ln(π_r/π_ref) + ⟨λ, ln(π_g/π_ref)⟩): logp_r, ref_logp (…), logp_g (m, …), lam (m,)
    -> (…), in the units of the score that the preferences come from."""
    reward = logp_r - ref_logp  # (…)
    safety = logp_g - ref_logp  # (m, …)
    lam = lam.to(safety).view(-1, *[1] * reward.dim())  # (m, 1, …)
    return beta * (reward + (lam * safety).sum(0))


def implicit_scores(prealigned, pool, ref_logp, beta, device):
    """β·τ·ln(π/π_ref) of every pre-aligned policy, {name: checkpoint with tau}, on a pool (N, K, T)
    -> (1+m, N, K)."""
    scores = []
    for saved in prealigned.values():
        logp = logprobs(from_checkpoint(saved, device), pool)
        scores.append(saved["tau"] * (logp - ref_logp))
    return beta * torch.stack(scores)


# ---- the policy update
def train_pecan(policy, sample, lam, beta, group, recipe):
    """DPO on pairs of the sample, labelled by the implicit score -> the loss of every micro-batch.

    The loop of mocan.train_mocan; the mocan.Sample's scores are `implicit_scores`.
    """
    pool, _, ref_logp, scores = sample
    aligned = ref_logp + scores / beta  # (1+m, N, K) calibrated ln π_r, ln π_g_1 …
    s = implicit_score(aligned[0], aligned[1:], ref_logp, lam, beta)  # (N, K)
    group = min(group, s.size(1))
    # every pair of a group once; (j, i) or (i, j) is all one, the loss is symmetric
    j, i = torch.triu_indices(group, group, 1, device=policy.device)
    descent = Descent(policy, recipe)
    for n, k in descent.over(pool, group):  # (B,) prompts, (B, G) some of the K responses to each
        tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·G, T)
        with policy.autocast():
            logp = sequence_logprob(policy, tokens, response_mask, group).view(k.shape)  # (B, G)
        ref = take(ref_logp, n, k, policy.device)  # (B, G)
        s_k = take(s, n, k, policy.device)  # (B, G)
        p_i = bradley_terry(s_k[:, i], s_k[:, j])  # s is in the units of r: no β here
        loss = preference_loss(
            logp[:, i], logp[:, j],
            ref[:, i], ref[:, j],
            beta, p_i)  # (B, G(G-1)/2)
        descent.step(loss.sum(), loss.numel())
    return descent.losses


# ---- before the dual
def prealign(policy, pool, ref_logp, beta, recipe, held_out=None):
    """Plain DPO on one preference: a pool (P, 2, T) of chosen and rejected responses, their
    ref_logp (P, 2); held_out() -> calibration loss, see mocan.Descent.over.

    Give it a low learning rate: hard labels are noise that a policy learns by heart, and τ mends a
    timid one.
    """
    descent = Descent(policy, recipe)
    for n, k in descent.over(pool, 2, held_out):
        k = k.sort(1).values  # (B, 2) chosen, rejected
        tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·2, T)
        with policy.autocast():
            logp = sequence_logprob(policy, tokens, response_mask, 2).view(k.shape)  # (B, 2)
        ref = take(ref_logp, n, k, policy.device)  # (B, 2)
        loss = preference_loss(
            logp[:, 0], logp[:, 1],
            ref[:, 0], ref[:, 1],
            beta)  # (B,)
        descent.step(loss.sum(), len(loss))


def prealign_and_calibrate(policy, name, training, ref_training, calibration, ref_calibration,
                           beta, recipe):
    """Pre-align a policy on one preference, for as many epochs as help on the calibration pairs,
    and fit τ on these -> τ. `data.Preferences` and their ln π_ref (P, 2)."""
    def implicit():
        return beta * (logprobs(policy, calibration.pool) - ref_calibration)  # (P, 2)
    prealign(policy, training.pool, ref_training, beta, recipe,
             lambda: calibrated_loss(*implicit().T))
    score = implicit()
    say_agreement(f"{name}, calibration", score, calibration)
    return temperature(name, score)
