"""
pecan.py: PeCAN, preference-based one-shot constrained alignment (arXiv 2405.19544v3). No score
model labels a pair.

mocan.py needs r and g as numbers. PeCAN needs only preferences: which of two responses is more
helpful, which is safer.

1. Pre-align one policy per preference by DPO from π_ref: π_r for helpfulness, π_g per
   constraint.                                                                        (prealign)
2. Score K responses of π_ref by log-ratios: DPO's optimum is π_r ∝ π_ref·exp(r/β), hence
       β·ln(π_r/π_ref) = r − β·ln Z_r(x),   β·ln(π_g/π_ref) = g − β·ln Z_g(x):
   the scores, up to a constant of the prompt, which no label and no π_λ can see. A pre-alignment
   stops before that optimum; a factor τ on its log-ratios mends it. (mocan.calibrate)
   They hold what the policies learned by heart. On real data judges that learned from other
   conversations say how much of it they confirm; no label is theirs.          (mocan.confirm)
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

Read next: model.py, the policy itself.
"""

import torch
from torch.nn.utils import clip_grad_norm_

from data import take, take_text
from mocan import (Progress, adamw, add_up_gradients, bradley_terry, calibrated_loss,
                   map_pool, preference_loss, say_agreement, temperature)
from model import from_checkpoint, sequence_logprob


# ---- the scores: tensors in, tensors out
def implicit_score(logp_r, logp_g, ref_logp, lam, beta):
    """s = β·(ln(π_r/π_ref) + ⟨λ, ln(π_g/π_ref)⟩): logp_r, ref_logp (…), logp_g (m, …), lam (m,)
    -> (…), in the units of the score that the preferences come from."""
    reward = logp_r - ref_logp  # (…)
    safety = logp_g - ref_logp  # (m, …)
    # written as a sum, since autocast would round a product of tensors to 16 bits
    return beta * (reward + sum(l * x for l, x in zip(lam, safety, strict=True)))


def implicit_scores(prealigned, pool, ref_logp, beta, device):
    """β·τ·ln(π/π_ref) of every pre-aligned policy, {name: checkpoint with tau}, on a pool (N, K, T)
    -> (1+m, N, K), the scores of a mocan.Sample: mocan.solve_from finds λ* from it."""
    scores = []
    for saved in prealigned.values():
        logp = map_pool(from_checkpoint(saved, device), pool)
        scores.append(saved["tau"] * (logp - ref_logp))
    return beta * torch.stack(scores)


# ---- the policy update
def train_pecan(policy, sample, lam, beta, group, recipe):
    """DPO on pairs of the sample, labelled by the implicit score -> the loss of every step.

    The loop of mocan.train_mocan; the mocan.Sample's scores are `implicit_scores`.
    """
    pool = sample.pool
    ref_logp = sample.ref_logp
    # back to log-probabilities, for the label as the paper writes it: ln π_r, ln π_g_1 …
    aligned = ref_logp + sample.scores / beta  # (1+m, N, K)
    s = implicit_score(aligned[0], aligned[1:], ref_logp, lam, beta)  # (N, K)
    group = min(group, s.size(1))
    # every pair of a group once, i < j
    i, j = torch.triu_indices(group, group, 1, device=policy.device)
    optimizer = adamw(policy)
    progress = Progress(recipe, model=policy, optimizer=optimizer)
    for lr, batches, _ in progress.schedule(pool, group):
        optimizer.param_groups[0]["lr"] = lr
        for n, k, whole in batches:  # (B,) prompts, (B, G) some of the K responses to each
            tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·G, T)
            logp = sequence_logprob(policy, tokens, response_mask, group).view(k.shape)  # (B, G)
            ref = take(ref_logp, n, k, policy.device)  # (B, G)
            s_k = take(s, n, k, policy.device)  # (B, G)
            p_i = bradley_terry(s_k[:, i], s_k[:, j])  # s is in the units of r: no β here
            loss = preference_loss(
                logp[:, i], logp[:, j],
                ref[:, i], ref[:, j],
                beta, p_i).sum() / (len(whole) * len(i))  # the mean over all ranks' pairs
            (loss / recipe.accumulate).backward()
            progress.add(loss)
        add_up_gradients(policy)  # of all ranks
        norm = clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step(norm)
    return progress.losses()


# ---- before the dual
def prealign(policy, pool, calibration, beta, recipe):
    """Plain DPO on one preference, pools (P, 2, T) of chosen and rejected, for as many epochs as
    help on the calibration pool; policy: starts as the reference -> the loss of every step, and τ,
    which puts the implicit score β·ln(π/π_ref) in log-odds of the preference.

    Give it a low learning rate: hard labels are noise that a policy learns by heart, and τ mends a
    timid one.
    """
    ref_logp = map_pool(policy, pool)  # (P, 2)
    calibration_ref = map_pool(policy, calibration)
    optimizer = adamw(policy)
    progress = Progress(recipe, model=policy, optimizer=optimizer)
    for lr, batches, ends_epoch in progress.schedule(pool, 2):
        optimizer.param_groups[0]["lr"] = lr
        for n, k, whole in batches:  # (B,) pairs
            k = k.sort(1).values  # (B, 2) chosen, rejected
            tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·2, T)
            logp = sequence_logprob(policy, tokens, response_mask, 2).view(k.shape)  # (B, 2)
            ref = take(ref_logp, n, k, policy.device)  # (B, 2)
            loss = preference_loss(*logp.T, *ref.T, beta).sum() / len(whole)  # of (B,)
            (loss / recipe.accumulate).backward()
            progress.add(loss)
        add_up_gradients(policy)
        norm = clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ends_epoch:
            implicit = beta * (map_pool(policy, calibration) - calibration_ref)  # (P, 2)
            progress.consider(calibrated_loss(*implicit.T))
        progress.step(norm)
    losses = progress.losses()
    policy.load_state_dict(progress.best["weights"])
    implicit = beta * (map_pool(policy, calibration) - calibration_ref)
    say_agreement(f"{recipe.stage}, calibration", implicit)
    return losses, temperature(recipe.stage, implicit)
