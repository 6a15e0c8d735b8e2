"""
mocan.py: MoCAN, model-based one-shot constrained alignment (arXiv 2405.19544v3).

The problem, for a reward r, safety measures g_j and a reference policy π_ref:

    max_π  E[r(x,y)] − β·KL(π‖π_ref)    subject to    E_π[g_j] − E_ref[g_j] ≥ b_j,   j = 1…m

1. Sample K responses per prompt from π_ref and score them.                              (sample_pool)
2. Solve the dual for λ* ≥ 0 on those scores: closed form, convex, no policy involved.   (dual.solve)
3. One policy update: DPO with pairs labelled by s = r + ⟨λ*,g⟩.                         (train_mocan)

Step 3 is all of the training, since π* ∝ π_ref·exp(s/β) is what DPO converges to when P(y_1 ≻ y_0) = σ(s_1 − s_0):
the constants E_ref[g_j] and b_j of the dual cancel in the difference.

    symbol    variable         shape            symbol           variable        shape
    r         score            (N, K)           ln π(y|x)        logp            (B, G)
    g_j       constraint       (m, N, K)        ln π_ref(y|x)    ref_logp, ref   (N, K), (B, G)
    λ         lam              (m,)             P(y_1 ≻ y_0)     p_1             (B, G(G-1)/2)

Left out: a value model, online sampling, a λ that moves in training, the reference's forward pass in the loop.
Different from the paper: labels are the exact p_1, not a Bernoulli draw of it (same minimiser, less noise; --labels
sampled draws). Pairs come from the K samples, fresh every step, all G(G−1)/2 of a group of G: they cost nothing once each
response's log-probability is there (--group 2: one pair; --pairs data: the data's own two responses, as in the paper).

Read next: pecan.py, the same without score models.
"""

import math

import torch
import torch.nn.functional as F

from data import WORLD_SCORES, Pool, decode, encode_prompts, preference_tensors
from model import sequence_logprob


# ---- the losses: tensors in, tensors out
def bradley_terry(score_0, score_1):
    """P(y_1 ≻ y_0) = σ(s(y_1) − s(y_0)), elementwise. Paper: MoCAN, pseudo-preference."""
    return torch.sigmoid(score_1 - score_0)


def preference_loss(logp_0, logp_1, ref_logp_0, ref_logp_1, p_1, beta):
    """DPO with a soft label; all of one shape (B,) or (B, …), log-probabilities in nats, p_1 in [0, 1], beta > 0 -> that shape.
    With ρ_i = β·ln π(y_i|x)/π_ref(y_i|x):  −p_1·ln σ(ρ_1 − ρ_0) − (1 − p_1)·ln σ(ρ_0 − ρ_1). It is the expectation of
    DPO's loss over the paper's Bernoulli label, and DPO's loss at p_1 = 1 (y_1 chosen: the second argument, not the first).
    """
    logit = beta * ((logp_1 - ref_logp_1) - (logp_0 - ref_logp_0))
    return F.binary_cross_entropy_with_logits(logit, p_1.to(logit), reduction="none")


def score_loss(chosen, rejected, chosen_sign=None, rejected_sign=None):
    """Bradley–Terry loss of a score model: (B,), (B,) scores of the preferred and the other response -> (B,).

    −ln σ(chosen − rejected); for a safety model also −ln σ(sign·score) of each response, which puts the zero between
    safe (+1) and unsafe (−1); sign 0 means not labelled. Source: Safe RLHF's cost model, with g = −cost.
    """
    loss = -F.logsigmoid(chosen - rejected)
    if chosen_sign is not None:
        for score, sign in ((chosen, chosen_sign), (rejected, rejected_sign)):
            loss = loss - sign.abs() * F.logsigmoid(sign * score)
    return loss


# ---- step 1: responses of π_ref
def sample_pool(policy, tok, prompts, K, c, generator, log):
    """Step 1: K responses y ~ π(·|x) to each of N prompts (str) -> Pool, logp (N, K) in nats."""
    limit = c.block_size - c.max_new_tokens
    ids, cut = encode_prompts(tok, prompts, limit)
    if cut:
        print(f"  {cut} of {len(prompts)} prompts lost their beginning (longer than {limit} tokens)")
    repeated = [prompt for prompt in ids for _ in range(K)]
    tokens, masks, logps = [], [], []
    for at in range(0, len(repeated), c.sample_batch):
        batch = policy.generate(repeated[at:at + c.sample_batch], c.max_new_tokens, eos=tok.end, generator=generator)
        for store, x in zip((tokens, masks, logps), batch):
            store.append(x.cpu())
        log(min(at + c.sample_batch, len(repeated)), len(repeated))
    T = max(x.size(1) for x in tokens)
    tokens, masks = (torch.cat([F.pad(x, (0, T - x.size(1))) for x in xs]).view(len(prompts), K, T)
                     for xs in (tokens, masks))
    pool, logp = Pool(tokens, masks), torch.cat(logps).view(len(prompts), K)
    return pool, logp if c.dtype == "float32" else logprobs(policy, pool, c)  # in the arithmetic of every other ratio


@torch.no_grad()
def map_pool(function, pool, c):
    """function(tokens (B, T), response_mask (B, T)) -> (B,) on every response of the pool -> (N, K) float32, on the CPU.
    Once each: log-probabilities of text that a policy did not sample itself just now, and the score models' scores."""
    lengths, device = pool.lengths().flatten(), torch.device(c.device)
    tokens, mask = pool.tokens.flatten(0, 1), pool.response_mask.flatten(0, 1)
    out = torch.empty(len(lengths))
    for rows in lengths.argsort(stable=True).split(c.sample_batch):
        used = int(lengths[rows].max())
        with torch.autocast(device.type, dtype=getattr(torch, c.dtype), enabled=c.dtype != "float32"):
            out[rows] = function(tokens[rows, :used].to(device), mask[rows, :used].to(device)).float().cpu()
    return out.view(pool.tokens.shape[:2])


def logprobs(policy, pool, c):
    """ln π(y|x) of every response of the pool -> (N, K)."""
    return map_pool(lambda tokens, mask: sequence_logprob(policy, tokens, mask), pool, c)


# ---- what every training loop shares
def lr_at(step, steps, warmup):
    """The learning rate's factor: linear warm-up to 1, then cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def mixed_precision(model, lr, dtype):
    """AdamW, the autocast context and the loss scaler, which does nothing except for float16."""
    device = next(model.parameters()).device.type
    dtype = getattr(torch, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    return optimizer, autocast, torch.amp.GradScaler(device, enabled=dtype == torch.float16)


def pair_batches(lengths, size, generator, group=2):
    """Yield batches forever: prompts n (B,) and for each a group k (B, G) of different ones of its K responses, to be
    compared pair by pair; lengths (N, K), B = size.
    An epoch visits every prompt once, with a fresh group. It is shuffled, then sorted by length within pools of 8
    batches, so that little of a batch is padding.
    """
    while True:
        k = torch.rand(lengths.shape, generator=generator).argsort(dim=1)[:, :group]  # (N, G)
        longest = lengths.gather(1, k).amax(dim=1)
        order = torch.randperm(len(lengths), generator=generator)
        batches = [n for pool in order.split(8 * size) for n in pool[longest[pool].argsort()].split(size)]
        for i in torch.randperm(len(batches), generator=generator):
            yield batches[i], k[batches[i]]


def gather_pairs(pool, n, k, device):
    """The responses k (B, G) to prompts n (B,) -> tokens (B·G, T), response_mask (B·G, T), cut to the longest."""
    rows = n[:, None], k
    tokens, mask = pool.tokens[rows].flatten(0, 1), pool.response_mask[rows].flatten(0, 1)
    used = int(mask.any(dim=0).nonzero().max()) + 1
    return tokens[:, :used].to(device), mask[:, :used].to(device)


def check_finite(loss, stage, step):
    if not math.isfinite(loss):
        raise FloatingPointError(f"{stage}: the loss is {loss} at step {step}; earlier artifacts are kept; lower the learning "
                                 "rate, raise --warmup, or use --dtype float32")


# ---- before MoCAN: the reference policy and the score models
def train_reference(model, pool, c, generator, log):
    """Supervised fine-tuning: maximise the mean log-probability of the response tokens of `pool`."""
    optimizer, autocast, scaler = mixed_precision(model, c.sft_lr, c.dtype)
    batches = pair_batches(pool.lengths(), c.batch, generator)
    for step in range(c.sft_steps):
        optimizer.param_groups[0]["lr"] = c.sft_lr * lr_at(step, c.sft_steps, c.warmup)
        tokens, mask = gather_pairs(pool, *next(batches), c.device)
        with autocast:
            loss = -sequence_logprob(model, tokens, mask).sum() / mask.sum()
        check_finite(loss.item(), "reference", step)
        update(model, optimizer, scaler, loss, c.clip)
        log(step + 1, c.sft_steps, loss=loss.item())


def train_score(model, pool, prefers, safe, c, generator, log):
    """A reward or safety model: pool of pairs (N, 2, T), prefers (N,) the preferred one's index, safe (N, 2) its sign
    of safety, +1, −1 or 0 where it is not labelled."""
    optimizer, autocast, scaler = mixed_precision(model, c.score_lr, c.dtype)
    batches = pair_batches(pool.lengths(), c.batch, generator)
    for step in range(c.score_steps):
        optimizer.param_groups[0]["lr"] = c.score_lr * lr_at(step, c.score_steps, c.warmup)
        n, _ = next(batches)
        k = torch.stack([prefers[n], 1 - prefers[n]], dim=1)  # (B, 2) chosen, rejected
        tokens, mask = gather_pairs(pool, n, k, c.device)
        with autocast:
            chosen, rejected = model.score(tokens, mask).view(-1, 2).unbind(dim=1)  # (B,), (B,)
        sign = safe[n[:, None], k].to(c.device)
        loss = score_loss(chosen, rejected, sign[:, 0], sign[:, 1]).mean()
        check_finite(loss.item(), "scores", step)
        update(model, optimizer, scaler, loss, c.clip)
        log(step + 1, c.score_steps, loss=loss.item())


def update(model, optimizer, scaler, loss, clip):
    """One optimizer step of the two plain loops above."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def learn_score(model, tok, train, held_out, name, c, generator, log):
    """Train a score model of preference `name`, and print how well it predicts that preference."""
    train_score(model, *preference_tensors(tok, train, name, c), c, generator, log)
    for what, pairs in (("training", train), ("held-out", held_out)):
        pool, prefers, _ = preference_tensors(tok, pairs, name, c)
        score = map_pool(model.score, pool, c)
        right = (score.argmax(dim=1) == prefers).float().mean().item()
        print(f"  {name}: accuracy {right:.1%} ± {1.96 * math.sqrt(right * (1 - right) / len(prefers)):.1%} on "
              f"{len(prefers)} {what} pairs; standard deviation of the score {score.std():.2f}")


def score_pool(judges, names, prompts, pool, tok, c):
    """r, g_1 … g_m of every response -> (1+m, N, K): by the score models, or by the world's functions if there are none.
    prompts: N strings. Offline samples, data pairs and evaluation all pass here, so no version can differ."""
    if judges:
        return torch.stack([map_pool(judges[name].score, pool, c) for name in ("helpful", *names)])
    texts, K = decode(tok, pool.tokens.flatten(0, 1), pool.response_mask.flatten(0, 1)), pool.tokens.shape[1]
    return torch.tensor([[WORLD_SCORES[name](prompts[i // K], text) for i, text in enumerate(texts)]
                         for name in ("helpful", *names)]).view(1 + len(names), -1, K)


# ---- step 3: the policy update
def train_mocan(policy, pool, ref_logp, score, constraint, lam, c, generators, log):
    """Step 3: DPO on pairs of `pool` (N, K, T), labelled by s = r + ⟨λ*,g⟩.
    policy: starts as a copy of the reference; ref_logp, score (N, K); constraint (m, N, K); lam (m,). `generators`
    are two, for the choice of pairs and for sampled labels. Raises FloatingPointError on a non-finite loss.
    """
    s = score + torch.einsum("m,mnk->nk", lam.to(score), constraint)  # (N, K)
    optimizer, autocast, scaler = mixed_precision(policy, c.lr, c.dtype)
    group = min(c.group, s.size(1))  # G responses to a prompt, compared in all their pairs, i against j
    batches = pair_batches(pool.lengths(), max(1, 2 * c.batch // group), generators[0], group)
    i, j = torch.triu_indices(group, group, 1, device=c.device)  # (G(G-1)/2,) each
    for step in range(c.steps):
        optimizer.param_groups[0]["lr"] = c.lr * lr_at(step, c.steps, c.warmup)
        mean_loss = 0.0
        for _ in range(c.accumulate):
            n, k = next(batches)  # (B,) prompts, (B, G) some of the K responses to each
            some = s[n[:, None], k].to(c.device)  # (B, G)
            p_1 = bradley_terry(some[:, i], some[:, j])  # pseudo-preference; β does not enter here, it does in the loss
            if c.labels == "sampled":  # afresh at each visit; the paper draws once
                p_1 = torch.bernoulli(p_1.cpu(), generator=generators[1]).to(c.device)
            tokens, mask = gather_pairs(pool, n, k, c.device)  # (B·G, T)
            with autocast:
                logp = sequence_logprob(policy, tokens, mask).view(k.shape)  # (B, G)
            ref = ref_logp[n[:, None], k].to(c.device)
            loss = preference_loss(logp[:, i], logp[:, j], ref[:, i], ref[:, j], p_1, c.beta).mean()
            check_finite(value := loss.item(), "mocan", step)
            scaler.scale(loss / c.accumulate).backward()
            mean_loss += value / c.accumulate
        scaler.unscale_(optimizer)  # so that clipping sees true gradients
        torch.nn.utils.clip_grad_norm_(policy.parameters(), c.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        log(step + 1, c.steps, loss=mean_loss)


# ---- what came of it
def mean_interval(x):
    """x (N,), one value a prompt -> [mean, low, high], the 95 % interval of the mean over prompts."""
    half = 1.96 * x.std().item() / math.sqrt(len(x))
    return [x.mean().item(), x.mean().item() - half, x.mean().item() + half]


def compare(scores, ref_scores):
    """A policy's scores against the reference's on the same prompts, both (1+m, N, K) -> gains and win rates, lists over
    r, g_1 … g_m of [mean, low, high]. A win rate counts every pair of a prompt's K × K; a tie is half a win."""
    gains = (scores.mean(dim=2) - ref_scores.mean(dim=2)).unbind(dim=0)  # (N,) each: paired by prompt
    lead = scores[:, :, :, None] - ref_scores[:, :, None, :]  # (1+m, N, K, K)
    wins = ((lead > 0).double() + 0.5 * (lead == 0)).mean(dim=(2, 3)).unbind(dim=0)
    return [mean_interval(x) for x in gains], [mean_interval(x) for x in wins]


def measure(policy, reference, ref_scores, judges, names, prompts, tok, c, generator, log):
    """Fresh responses of a policy to held-out prompts -> scores (1+m, N, K), measurements (as results.json has them), texts.
    ref_scores: the reference's own on the same prompts, or None for the reference itself. KL is E_π[ln π − ln π_ref].
    """
    pool, logp = sample_pool(policy, tok, prompts, c.eval_responses, c, generator, log)
    ref_logp = logprobs(reference, pool, c)
    scores = score_pool(judges, names, prompts, pool, tok, c).double()
    (r, *g), (r_win, *g_win) = compare(scores, scores if ref_scores is None else ref_scores)
    return scores, {
        "reward": scores[0].mean().item(), "constraint": scores[1:].mean(dim=(1, 2)).tolist(),
        "reward_gain": r[0], "reward_gain_ci": r[1:], "kl": (logp - ref_logp).mean().item(),
        "constraint_gain": [x[0] for x in g], "constraint_gain_ci": [x[1:] for x in g],
        "reward_win_rate": r_win[0], "reward_win_rate_ci": r_win[1:],
        "constraint_win_rate": [x[0] for x in g_win], "constraint_win_rate_ci": [x[1:] for x in g_win],
    }, decode(tok, pool.tokens.flatten(0, 1), pool.response_mask.flatten(0, 1))


def dual_numbers(names, margin, found):
    """Print λ* and what it predicts -> the same as a dict."""
    for j, name in enumerate(names):
        print(f"  λ*_{name} = {found.lam[j]:.4f} ± {1.96 * found.lam_se[j]:.4f} at a margin of {margin[j]:.3f}; predicted gain "
              f"{found.constraint_gain[j]:.3f}")
    print(f"  predicted reward gain {found.score_gain:.3f}, KL {found.kl:.3f}, effective sample size {found.ess:.1f} a "
          f"prompt (5th percentile {found.ess_p5:.1f}); {found.iterations} evaluations")
    return {"margin": margin.tolist(), "lam": found.lam.tolist(), "reward_gain": found.score_gain, "kl": found.kl,
            "constraint_gain": found.constraint_gain.tolist(), "ess": found.ess, "iterations": found.iterations}


def print_table(names, rows):
    """rows {policy: measurements}; a row of the closed-form optimum has no intervals, since it is the dual's prediction."""
    def cell(x, ci):
        return f"{x:+.3f}" + (f" [{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else "")

    def rate(x, ci):
        return f"{x:.1%} ± {(ci[1] - ci[0]) / 2:.1%}"

    def holds(gain, ci, b):  # as far as the sample can tell
        return "yes" if gain >= b - 1e-6 else "within error" if ci and ci[1] >= b else "no"

    table = [["", "reward gain", *(x for n in names for x in (f"{n} gain", "b", "holds")), "KL", "win r",
              *(f"win {n}" for n in names), "λ*", "steps", "seconds"]]
    for policy, row in rows.items():
        gains = zip(row["constraint_gain"], row.get("constraint_gain_ci") or [None] * len(names),
                    row.get("margin") or [None] * len(names))
        wins = [""] * (1 + len(names)) if "reward_win_rate" not in row else [rate(
            row["reward_win_rate"], row["reward_win_rate_ci"]), *map(rate, row["constraint_win_rate"], row["constraint_win_rate_ci"])]
        table.append([policy, cell(row["reward_gain"], row.get("reward_gain_ci")),
                      *(x for g, ci, b in gains for x in ((cell(g, ci), "", "") if b is None else
                                                           (cell(g, ci), f"{b:.3f}", holds(g, ci, b)))),
                      f"{row['kl']:.3f}", *wins,
                      ", ".join(f"{x:.3f}" for x in row.get("lam", [])), str(row.get("steps", "")),
                      f"{row['seconds']:.0f}" if "seconds" in row else ""])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    print("\n" + "\n".join("  ".join([x[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(x[1:], widths[1:]))]) for x in table))


COLORS = ("#3b82f6", "#e8590c", "#2b9e4f", "#b04ad8", "#c9a000", "#d6336c", "#0ea5a5", "#8d6e63")


def svg(path, title, x_title, y_title, curves, points):
    """Write a chart. curves: {label: [(x, y), …]}; points: {label: (x, y, (x_low, x_high), (y_low, y_high))}. Text and axes
    are a mid gray and the series strong hues, so that it reads on light and on dark pages."""
    W, H, left, right, top, bottom = 640, 440, 70, 20, 100, 55
    every = [xy for curve in curves.values() for xy in curve] + [xy for p in points.values() for xy in zip(p[2], p[3])]
    (x0, x1), (y0, y1) = ((min(v) - 0.05 * (max(v) - min(v) or 1), max(v) + 0.05 * (max(v) - min(v) or 1)) for v in zip(*every))
    X = lambda x: round(left + (x - x0) / (x1 - x0) * (W - left - right), 1)
    Y = lambda y: round(H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom), 1)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="13" '
           f'fill="#888"><text x="{left}" y="24" font-size="16">{title}</text>',
           f'<text x="{(left + W - right) / 2}" y="{H - 12}" text-anchor="middle">{x_title}</text>',
           f'<text transform="translate(18 {(top + H - bottom) / 2}) rotate(-90)" text-anchor="middle">{y_title}</text>']
    for low, high, horizontal in ((x0, x1, True), (y0, y1, False)):
        step = next(s * 10.0 ** e for e in range(-6, 7) for s in (1, 2, 5) if (high - low) / (s * 10.0 ** e) <= 8)
        for i in range(math.ceil(low / step), math.floor(high / step) + 1):
            line = f"M{X(i * step)} {top}V{H - bottom}" if horizontal else f"M{left} {Y(i * step)}H{W - right}"
            place = f'x="{X(i * step)}" y="{H - bottom + 18}" text-anchor="middle"' if horizontal else \
                f'x="{left - 8}" y="{Y(i * step) + 4}" text-anchor="end"'
            out.append(f'<path d="{line}" stroke="#888" stroke-opacity=".25"/><text {place}>{i * step:g}</text>')
    for i, (label, series) in enumerate([*curves.items(), *points.items()]):
        color, x, y = COLORS[i % len(COLORS)], left + 185 * (i % 3), 46 + 18 * (i // 3)
        if label in curves:
            line = " L".join(f"{X(a)} {Y(b)}" for a, b in series)
            mark = f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="2"/>'
        else:
            a, b, (a0, a1), (b0, b1) = series
            mark = f'<path d="M{X(a0)} {Y(b)}H{X(a1)}M{X(a)} {Y(b0)}V{Y(b1)}" stroke="{color}"/>' \
                   f'<circle cx="{X(a)}" cy="{Y(b)}" r="4" fill="{color}"/>'
        out.append(f'{mark}<rect x="{x}" y="{y - 7}" width="12" height="5" fill="{color}"/>'
                   f'<text x="{x + 18}" y="{y}">{label}</text>')
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([*out, "</svg>\n"]))
