"""
mocan.py: MoCAN, model-based one-shot constrained alignment (arXiv 2405.19544v3).

The problem, for a reward r, safety measures g_j and a reference policy π_ref:

    max_π  E[r(x,y)] − β·KL(π‖π_ref)    subject to    E_π[g_j] − E_ref[g_j] ≥ b_j,   j = 1…m

1. Sample K responses per prompt from π_ref and score them.              (sample_pool, score_pool)
2. Solve the dual for λ* ≥ 0 on those scores: closed form, convex.       (solve_from)
3. One policy update: DPO with pairs labelled by s = r + ⟨λ*,g⟩.         (train_mocan)

A second shot does the same from the policy that the first one made: see `solve_from`.

Step 3 is all of the training, since π* ∝ π_ref·exp(s/β) is what DPO converges to when
P(y ≻ y') = σ(s(y) − s(y')): the constants E_ref[g_j] and b_j of the dual cancel in the difference.

    symbol   variable    shape        symbol          variable        shape
    r        score       (N, K)       ln π(y|x)       logp            (B, G)
    g_j      constraint  (m, N, K)    ln π_ref(y|x)   ref_logp, ref   (N, K), (B, G)
    λ        lam         (m,)         P(y_i ≻ y_j)    p_i             (B, G(G-1)/2)

Left out: a value model, sampling inside the loop, a λ that moves in training, the reference's
forward pass in the loop. Different from the paper: labels are the exact P, not one Bernoulli draw
of it (the same minimiser, less noise), and pairs are those of the K samples, all G(G−1)/2 of a
fresh group of G, which cost nothing once each response's log-probability is there; the paper takes
the data set's own two responses.

Read next: pecan.py, the same without score models.
"""

import copy
import math
import time
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import dual
from data import WORLD_SCORES, Pool, encode_prompts, group_batches, stream, take, take_text
from model import GPT, Checkpoint, from_checkpoint, sequence_logprob


# ---- the losses: tensors in, tensors out
def bradley_terry(score_chosen, score_rejected):
    """P(chosen ≻ rejected) = σ(s_chosen − s_rejected), elementwise. Paper: pseudo-preference."""
    return torch.sigmoid(score_chosen - score_rejected)


def preference_loss(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, beta,
                    p_chosen=1.0):
    """DPO, with a soft label where p_chosen < 1: log-probabilities in nats, (B,) or (B, …) -> same.

    With ρ = β·ln π(y|x)/π_ref(y|x):  −p·ln σ(ρ_chosen − ρ_rejected) − (1−p)·ln σ(ρ_rejected −
    ρ_chosen), the expectation of DPO's loss over the paper's Bernoulli label, p = p_chosen.
    """
    lead = beta * ((logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected))
    label = torch.as_tensor(p_chosen, dtype=lead.dtype, device=lead.device).expand_as(lead)
    return F.binary_cross_entropy_with_logits(lead, label, reduction="none")


def score_loss(chosen, rejected, chosen_sign=None, rejected_sign=None):
    """Bradley–Terry loss of a score model: (B,), (B,) scores of chosen and rejected -> (B,).

    −ln σ(chosen − rejected); for a safety model also −ln σ(sign·score) of each response, which puts
    the zero between safe (+1) and unsafe (−1); sign 0 means not labelled. Source: Safe RLHF's cost
    model, with g = −cost.
    """
    loss = -F.logsigmoid(chosen - rejected)
    if chosen_sign is not None:
        loss = loss - chosen_sign.abs() * F.logsigmoid(chosen_sign * chosen)
        loss = loss - rejected_sign.abs() * F.logsigmoid(rejected_sign * rejected)
    return loss


def calibrate(chosen, rejected):
    """The inverse temperature τ that makes P(chosen ≻ rejected) = σ(τ·(chosen − rejected)) most
    likely: scores on preferences that did not train them, (P,), (P,) -> τ (), at least 0.

    One-parameter logistic regression by Newton's method, which does not overshoot from 0, since the
    curvature falls as τ grows; at most 100. τ = 1: calibrated; τ > 1: the scores understate the
    preference; τ < 1: they overstate it, as those that were learned by heart do.
    """
    lead = (chosen - rejected).double()
    tau = lead.new_zeros(())
    for _ in range(50):
        p = torch.sigmoid(-tau * lead)  # probability of the choice that was not made
        slope = (p * lead).sum()
        curvature = (p * (1 - p) * lead * lead).sum().clamp_min(1e-12)
        tau = (tau + slope / curvature).clamp(0, 100)
    return tau


# ---- what the training loops share
STATEFUL = ("model", "optimizer", "scaler")  # what a training loop carries from step to step
PLAIN = ("losses", "best", "least", "worse", "skipped")


class Recipe(NamedTuple):
    """How a model is trained."""
    stage: str  # what progress and errors call it, and the checkpoint: unique in a run
    steps: int
    lr: float
    key: str  # of its random streams
    batch: int = 16  # pairs a micro-batch; policy updates: 2·batch responses, in groups of G
    accumulate: int = 1  # micro-batches a step
    warmup: int = 20
    clip: float = 1.0  # largest gradient norm
    checkpoint: Checkpoint | None = None


class Descent:
    """AdamW with warm-up, accumulation, loss scaling for float16, clipping, checkpoints, and a line
    of progress every ten seconds."""

    def __init__(self, model, recipe):
        self.model = model
        self.recipe = recipe
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.scaler = torch.amp.GradScaler(
            model.device.type, enabled=model.config.dtype == "float16")
        self.losses = []  # of every micro-batch
        self.best = {}  # weights after the best epoch
        self.least = math.inf  # its calibration loss
        self.worse = 0  # epochs since then
        self.skipped = 0  # steps in a row, in float16
        self.log = progress(recipe.stage, recipe.steps)
        state = recipe.checkpoint and recipe.checkpoint.restore(recipe.stage)
        if state:
            for part in STATEFUL:
                getattr(self, part).load_state_dict(state.pop(part))
            vars(self).update(state)
            print(f"  {recipe.stage}: goes on after {len(self.losses)} micro-batches")

    def state(self):
        """What a checkpoint keeps and __init__ restores."""
        state = {part: getattr(self, part).state_dict() for part in STATEFUL}
        return state | {part: getattr(self, part) for part in PLAIN}

    def over(self, batches, examples=0, held_out=None):
        """Yield a batch for each micro-batch. After every epoch of so many examples, if there are
        several, and at the end held_out() -> calibration loss is asked; the weights of the best
        epoch are kept, and training ends when two epochs have brought nothing."""
        recipe = self.recipe
        for _ in self.losses:  # those of the run that this one resumes
            next(batches)
        epoch = max(1, examples // (recipe.batch * recipe.accumulate))
        several = held_out and epoch < recipe.steps
        for step in range(len(self.losses) // recipe.accumulate + 1, recipe.steps + 1):
            if self.worse == 2:
                break
            for _ in range(recipe.accumulate):
                yield next(batches)
            if several and (step % epoch == 0 or step == recipe.steps):
                self.compare(step, held_out())
            if recipe.checkpoint:
                recipe.checkpoint.keep(recipe.stage, self.state)
        if self.best:
            self.model.load_state_dict(self.best)

    def compare(self, step, loss):
        self.worse += 1
        if loss < self.least:
            print(f"  {self.recipe.stage}: calibration loss {loss:.4f} after {step} steps")
            self.least = loss
            self.worse = 0
            self.best = copy.deepcopy(self.model.state_dict())

    def step(self, loss):
        """Backward; after the last micro-batch of a step, clip and update. Raises
        FloatingPointError on a non-finite loss or gradient (float16: on 20 in a row), before the
        weights are touched."""
        recipe = self.recipe
        step = len(self.losses) // recipe.accumulate
        self.losses.append(loss.item())
        self.check("loss", self.losses[-1], step)
        self.scaler.scale(loss / recipe.accumulate).backward()
        if len(self.losses) % recipe.accumulate:
            return
        self.optimizer.param_groups[0]["lr"] = recipe.lr * lr_at(step, recipe)
        self.scaler.unscale_(self.optimizer)  # so that clipping sees true gradients
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip).item()
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not self.scaler.is_enabled() or self.skipped > 20:
            self.check("gradient norm", norm, step)
        self.scaler.step(self.optimizer)  # float16 may overflow: the scaler skips the step
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.log(step + 1, sum(self.losses[-recipe.accumulate:]) / recipe.accumulate)

    def check(self, what, value, step):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.recipe.stage}: the {what} is {value} at step {step}; earlier artifacts are "
                "kept; lower the learning rate, raise --warmup, or use --dtype float32")


def lr_at(step, recipe):
    """The learning rate's factor: linear warm-up to 1 (if steps > warmup), then cosine to 0."""
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 + 0.5 * math.cos(math.pi * done)


def progress(stage, steps):
    """log(step, loss): a line every ten seconds, and one after the last of `steps`. Rates count
    what a resumed run found done."""
    began = time.perf_counter()
    last = began

    def log(step, loss=None):
        nonlocal last
        now = time.perf_counter()
        if step < steps and now < last + 10:
            return
        last = now
        number = "" if loss is None else f"  loss {loss:.4f}"
        rate = step / (now - began)
        print(f"  {stage} {step}/{steps}{number}  {rate:.1f}/s  {now - began:.0f} s elapsed, "
              f"{(steps - step) / rate:.0f} s left", flush=True)
    return log


# ---- step 3: the policy update
class Sample(NamedTuple):
    """K responses of a policy π₁ to each of N prompts; in the first shot π₁ is π_ref."""
    pool: Pool              # (N, K, T)
    logp: torch.Tensor      # (N, K) ln π₁(y|x)
    ref_logp: torch.Tensor  # (N, K) ln π_ref(y|x)
    scores: torch.Tensor    # (1+m, N, K) r, g_1 … g_m


def train_mocan(policy, sample, lam, beta, group, recipe):
    """DPO on pairs of the sample, labelled by s = r + ⟨λ*,g⟩ -> the loss of every micro-batch.

    policy: starts as the one that was sampled, the reference or what the shot before made of it;
    lam (m,); group: G responses to a prompt, compared in all their pairs.
    """
    pool, _, ref_logp, scores = sample
    s = scores[0] + torch.einsum("m,mnk->nk", lam.to(scores), scores[1:])  # (N, K)
    group = min(group, s.size(1))
    # every pair of a group once; (j, i) or (i, j) is all one, the loss is symmetric
    j, i = torch.triu_indices(group, group, 1, device=policy.device)
    batches = group_batches(pool.lengths, 2 * recipe.batch, group, recipe.key)
    descent = Descent(policy, recipe)
    for n, k in descent.over(batches):  # (B,) prompts, (B, G) some of the K responses to each
        tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·G, T)
        with policy.autocast():
            logp = sequence_logprob(policy, tokens, response_mask).view(k.shape)  # (B, G)
        ref = take(ref_logp, n, k, policy.device)  # (B, G)
        s_k = take(s, n, k, policy.device)  # (B, G)
        p_i = bradley_terry(s_k[:, i], s_k[:, j])  # s is in the units of r: no β here
        loss = preference_loss(
            logp[:, i], logp[:, j],
            ref[:, i], ref[:, j],
            beta, p_i)  # (B, G(G-1)/2)
        descent.step(loss.mean())
    return descent.losses


# ---- step 2: the dual, asked from any policy
def solve_from(sample, ref_mean, margin, beta):
    """dual.Dual of the problem, asked from π₁; margin (m,); ref_mean (m,) is E_ref[g].

    For any π₁:  E_π[r] − β·KL(π‖π_ref) = E_π[r − β·ln(π₁/π_ref)] − β·KL(π‖π₁), so it is the same
    dual with r → r − β·ln(π₁/π_ref) and b → b less what π₁ has gained; in the first shot both
    differences are 0. Where π₁ is near π_λ*, its weights are nearly flat and few responses serve:
    λ* loses the bias of a finite K, which one shot has at a small β.
    """
    score = sample.scores[0] - beta * (sample.logp - sample.ref_logp)  # (N, K)
    constraint = sample.scores[1:]  # (m, N, K)
    gained = constraint.double().mean(dim=(1, 2)) - ref_mean  # (m,)
    margin = torch.as_tensor(margin, dtype=torch.float64)
    return dual.solve(score, constraint, margin - gained, beta)


def say_dual(policy, margin, found):
    """Gains and KL are those over the policy whose responses the dual was solved on."""
    print(f"\ndual of {policy}: λ* = {numbers(found.lam)} ± {numbers(1.96 * found.lam_se)} at a "
          f"margin of {numbers(margin)}; predicted from the responses it was solved on: gains "
          f"{numbers(found.constraint_gain)}, reward {found.score_gain:.3f}, KL {found.kl:.3f}; "
          f"effective sample size {found.ess:.1f} a prompt (5th percentile {found.ess_p5:.1f}); "
          f"{found.iterations} evaluations")


# ---- step 1: responses, their log-probabilities and scores
class Draw(NamedTuple):
    """How responses are sampled."""
    stage: str  # what progress calls it, and the checkpoint: unique in a run
    K: int  # responses to each prompt
    key: str  # of the random streams
    batch: int = 256  # responses sampled or scored at once
    checkpoint: Checkpoint | None = None


def sample_pool(policy, tok, prompts, draw):
    """K responses y ~ π(·|x) to each of N prompts -> Pool, logp (N, K) in nats."""
    ids, cut = encode_prompts(tok, prompts)
    if cut:
        print(f"  {cut} of {len(prompts)} prompts lost their beginning (longer than "
              f"{tok.prompt_limit} tokens)")
    wanted = [(n, k) for n in range(len(ids)) for k in range(draw.K)]
    log = progress(draw.stage, len(wanted))
    batches = draw.checkpoint and draw.checkpoint.restore(draw.stage) or []
    for start in range(len(batches) * draw.batch, len(wanted), draw.batch):
        some = wanted[start:start + draw.batch]
        uniforms = [torch.rand(tok.response_limit, generator=stream(draw.key, n, k))
                    for n, k in some]
        sampled = policy.generate([ids[n] for n, _ in some], torch.stack(uniforms), eos=tok.end)
        batches.append([x.cpu() for x in sampled])
        log(start + len(some))
        if draw.checkpoint:
            draw.checkpoint.keep(draw.stage, lambda: batches)
    rows = [row for sampled in batches for row in zip(*sampled)]
    tokens, response_mask, logp = zip(*rows)  # N·K of (T,), (T,), ()
    tokens = pad_sequence(tokens, batch_first=True).view(len(prompts), draw.K, -1)
    response_mask = pad_sequence(response_mask, batch_first=True).view(tokens.shape)
    pool = Pool(tokens, response_mask)
    if policy.config.dtype == "float32":
        return pool, torch.stack(logp).view(len(prompts), draw.K)
    return pool, logprobs(policy, pool, draw.batch)  # by autocast, as in training


def sample_from(policy, reference, tok, prompts, draw, score_of):
    """K responses of a policy to each prompt -> Sample; score_of(pool, ref_logp): (1+m, N, K)."""
    pool, logp = sample_pool(policy, tok, prompts, draw)
    ref_logp = logprobs(reference, pool, draw.batch)
    return Sample(pool, logp, ref_logp, score_of(pool, ref_logp))


@torch.no_grad()
def map_pool(function, model, pool, batch):
    """function(model, tokens (B, T), response_mask (B, T)) -> (B,) on every response -> (N, K).

    Float32, on the CPU: log-probabilities and the score models' scores.
    """
    lengths = pool.lengths.flatten()
    tokens = pool.tokens.flatten(0, 1)
    response_mask = pool.response_mask.flatten(0, 1)
    out = torch.empty(len(lengths))
    for rows in lengths.argsort(stable=True).split(batch):
        used = int(lengths[rows].max())
        some = tokens[rows, :used].to(model.device)
        mask = response_mask[rows, :used].to(model.device)
        with model.autocast():
            out[rows] = function(model, some, mask).float().cpu()
    return out.view(pool.tokens.shape[:2])


def logprobs(policy, pool, batch=256):
    """ln π(y|x) of every response of the pool -> (N, K)."""
    return map_pool(sequence_logprob, policy, pool, batch)


def score_pool(judges, names, prompts, pool, tok, batch=256):
    """r, g_1 … g_m of every response -> (1+m, N, K): by the judges {preference: score model}, or by
    the built-in world's functions where there are none. names: "helpful", then the constraints;
    prompts: N strings.

    Offline samples and evaluation both pass here, so that the two cannot differ.
    """
    if judges:
        return torch.stack(
            [map_pool(GPT.score, judges[name], pool, batch) for name in names])
    K = pool.tokens.size(1)
    texts = pool.texts(tok)
    scores = [WORLD_SCORES[name](prompts[i // K], text)
              for name in names for i, text in enumerate(texts)]
    return torch.tensor(scores).view(len(names), -1, K)


# ---- before MoCAN: the reference policy and the score models
def train_reference(model, pool, recipe, held_out=None):
    """Supervised fine-tuning: raise the mean log-probability of the pool's response tokens.
    held_out() -> calibration loss, see Descent.over."""
    batches = group_batches(pool.lengths, 2 * recipe.batch, 2, recipe.key)
    descent = Descent(model, recipe)
    for n, k in descent.over(batches, len(pool.tokens), held_out):
        tokens, response_mask = take_text(pool, n, k, model.device)
        with model.autocast():
            logp = sequence_logprob(model, tokens, response_mask)  # (B·2,)
        descent.step(-logp.sum() / response_mask.sum())


def train_score(model, preferences, recipe, held_out=None):
    """A reward or safety model from `data.Preferences`; held_out() -> calibration loss."""
    pool, prefers, signs, *_ = preferences
    batches = group_batches(pool.lengths, 2 * recipe.batch, 2, recipe.key)
    descent = Descent(model, recipe)
    for n, _ in descent.over(batches, len(prefers), held_out):
        chosen = prefers[n]  # (B,)
        k = torch.stack([chosen, 1 - chosen], dim=1)  # (B, 2) chosen, rejected
        tokens, response_mask = take_text(pool, n, k, model.device)
        with model.autocast():
            score = model.score(tokens, response_mask).view(k.shape)  # (B, 2)
        sign = take(signs, n, k, model.device)  # (B, 2)
        loss = score_loss(score[:, 0], score[:, 1], sign[:, 0], sign[:, 1])
        descent.step(loss.mean())


def learn_score(model, name, training, calibration, evaluation, recipe, batch):
    """Train a score model on `data.Preferences` and divide its temperature out, so that r or g is
    in log-odds of the preference."""
    def score(preferences):
        return map_pool(GPT.score, model, preferences.pool, batch)  # (P, 2)
    train_score(model, training, recipe,
                lambda: calibrated_loss(*calibration.by_choice(score(calibration))))
    tau = calibrate(*calibration.by_choice(score(calibration)))
    if not 0 < tau < 100:
        warnings.warn(f"no temperature fits the {name} scores on {len(calibration.rows)} "
                      "calibration pairs; it stays as it is; more pairs are needed")
        tau = 1.0
    with torch.no_grad():
        model.score_head.weight *= tau
    print(f"  {name}: temperature divided out, τ = {tau:.3f}")
    say_agreement(f"{name}, evaluation", score(evaluation), evaluation)


def calibrated_loss(chosen, rejected):
    """Bradley–Terry loss at the best temperature: what the scores know, whatever their scale."""
    tau = calibrate(chosen, rejected)
    return score_loss(tau * chosen, tau * rejected).mean().item()


def say_agreement(name, score, preferences):
    """How well scores (P, 2) predict a choice that did not train them: how often they agree with
    it, and the temperature that is left. Intervals are those of conversations, not of pairs."""
    chosen, rejected = preferences.by_choice(score)
    right = (chosen > rejected).double()
    tau = calibrate(chosen, rejected)
    lead = (chosen - rejected).double()
    p = torch.sigmoid(-tau * lead)
    influence = p * lead / (p * (1 - p) * lead * lead).mean()
    print(f"  {name}: {right.mean():.1%} ± {preferences.half_width(right):.1%} of {len(right)} "
          f"pairs right; τ = {tau:.3f} ± {preferences.half_width(influence):.3f}; standard "
          f"deviation of the score {score.std():.2f}")


# ---- what came of it: gains, the table and the picture; nothing below is part of the method
def measure(policies, reference, judges, names, tok, prompts, draw, margins, beta):
    """K fresh responses of every policy to evaluation prompts -> {policy: row}, {policy: N·K
    texts}, the frontier. policies {name: checkpoint}, the reference's first; margins {name: b
    (m,)}: each also gets a row "optimum …"."""
    rows = {}
    texts = {}
    optima = {}
    curve = []
    for name, saved in policies.items():
        policy = from_checkpoint(saved, reference.device)
        sample = sample_from(  # the same key: the same noise for all
            policy, reference, tok, prompts, draw._replace(stage=f"evaluate {name}"),
            lambda pool, _: score_pool(judges, names, prompts, pool, tok, draw.batch))
        if not rows:
            ref = sample
        texts[name] = sample.pool.texts(tok)
        even = torch.full_like(sample.logp, 1 / draw.K)
        first = name.split(" shot ")[0]
        margin = margins.get(first, next(iter(margins.values())))
        rows[name] = {**compare(sample.scores, sample.logp - sample.ref_logp, even, ref.scores),
                      "margin": margin.tolist(), "lam": saved.get("lam", []),
                      "predicted": saved.get("predicted"), "seconds": saved.get("seconds", 0.0)}
        if first not in margins or first == "pecan" and "mocan" in margins:
            continue
        mixed = mixture(sample, ref, logprobs(policy, ref.pool, draw.batch))
        ref_mean = ref.scores[1:].double().mean(dim=(1, 2))  # (m,)
        try:
            lam = solve_from(mixed, ref_mean, margin, beta).lam
        except (dual.Infeasible, FloatingPointError) as error:
            print(f"  no optimum by the responses of {name}: {error}")
            continue
        label = f"optimum{first[5:]}"  # "mocan 25%" -> "optimum 25%", by its last shot
        optima[label] = {**optimum(mixed, lam, beta, ref.scores), "margin": margin.tolist(),
                         "seconds": 0.0}
        if label == "optimum" and len(lam) == 1:
            path = [optimum(mixed, t / 15 * lam, beta, ref.scores) for t in range(31)]
            curve = [(point["constraint_gain"][0], point["reward_gain"]) for point in path]
    return rows | optima, texts, curve


def compare(scores, log_ratio, weight, ref_scores):
    """Responses with scores (1+m, N, K), ln π/π_ref (N, K) and weights (N, K), each row's sum 1,
    against the reference's scores on the same prompts -> means, gains, KL(π‖π_ref) and their 95 %
    intervals over prompts (taken as independent), as results.json has them."""
    mean = (weight * scores.double()).sum(dim=2)  # (1+m, N)
    gain = mean - ref_scores.double().mean(dim=2)  # (1+m, N): paired by prompt
    kl = (weight * log_ratio).sum(dim=1)  # (N,)
    found = torch.cat([gain, kl[None]])  # (2+m, N)
    error = 1.96 * found.std(dim=1) / math.sqrt(found.size(1))
    found = found.mean(dim=1)
    reward_gain, *constraint_gain, kl = found.tolist()
    reward_ci, *constraint_ci, kl_ci = torch.stack([found - error, found + error], dim=1).tolist()
    return {"reward": mean[0].mean().item(), "constraint": mean[1:].mean(dim=1).tolist(),
            "reward_gain": reward_gain, "reward_gain_ci": reward_ci,
            "constraint_gain": constraint_gain, "constraint_gain_ci": constraint_ci,
            "kl": kl, "kl_ci": kl_ci}


def mixture(sample, ref, logp):
    """A policy's Sample and the reference's as one of 2K responses, whose π₁ is the even mixture of
    both: near the policy, and nowhere far below π_ref. logp (N, K): the policy's ln π of ref's."""
    logp = torch.cat([sample.logp, logp], dim=1)  # (N, 2K)
    ref_logp = torch.cat([sample.ref_logp, ref.ref_logp], dim=1)  # (N, 2K)
    scores = torch.cat([sample.scores, ref.scores], dim=2)  # (1+m, N, 2K)
    return Sample(None, torch.logaddexp(logp, ref_logp) - math.log(2), ref_logp, scores)


def optimum(sample, lam, beta, ref_scores):
    """π_λ ∝ π_ref·exp((r + ⟨λ,g⟩)/β) itself, which nobody trained, as a row."""
    tilt = (sample.scores[0] + torch.einsum("m,mnk->nk", lam, sample.scores[1:].double())) / beta
    log_weight = tilt - (sample.logp - sample.ref_logp)  # (N, K) ln π_λ/π₁ + ln Z
    log_z = log_weight.logsumexp(dim=1, keepdim=True) - math.log(log_weight.size(1))
    weight = log_weight.softmax(dim=1)
    return {**compare(sample.scores, tilt - log_z, weight, ref_scores), "lam": lam.tolist()}


def print_table(names, rows):
    """names: of the constraints; rows {policy: what `compare` says of it, margin, lam, …}."""
    gains = [f"  {name + ' gain':>23}  {'b':>6}  {'holds':>12}" for name in names]
    print(f"\n{'':22}  {'reward gain':>23}{''.join(gains)}  {'KL':>13}  seconds  λ*")
    for policy, row in rows.items():
        line = f"{policy:22}  {cell(row['reward_gain'], row['reward_gain_ci'])}"
        for gain, ci, b in zip(row["constraint_gain"], row["constraint_gain_ci"], row["margin"]):
            line += f"  {cell(gain, ci)}  {b:6.3f}  {holds(gain, ci, b):>12}"
        error = row["kl_ci"][1] - row["kl"]
        print(f"{line}  {row['kl']:.3f} ± {error:.3f}  {row['seconds']:7.0f}  "
              f"{numbers(row['lam'])}")


def numbers(values):
    return ", ".join(f"{x:.3f}" for x in values)


def cell(x, ci):
    return f"{x:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]"


def holds(gain, ci, b):
    """By the measured gain; a shortfall within its interval is "within error"."""
    if gain >= b - 1e-6:
        return "yes"
    return "within error" if ci[1] >= b else "no"


def svg(x_title, curve, rows):
    """A chart of the curve [(safety gain, reward gain), …], of the optima on it and of the policies
    with their intervals.
    Text and axes are a mid gray and the marks strong hues: it reads on light and dark pages."""
    xs = [x for x, _ in curve]
    ys = [y for _, y in curve]
    for row in rows.values():
        xs += row["constraint_gain_ci"][0]
        ys += row["reward_gain_ci"]
    x_low = min(xs)
    y_low = min(ys)
    width = max(xs) - x_low or 1.0
    height = max(ys) - y_low or 1.0

    def at(x, y):
        return f"{80 + 500 * (x - x_low) / width:.1f} {380 - 330 * (y - y_low) / height:.1f}"
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 440" font-size="13" '
           'font-family="sans-serif" fill="#888" stroke-linecap="round">'
           '<text x="80" y="24" font-size="16">Reward against safety: policies, and the optimum '
           f'(blue)</text><text x="330" y="428" text-anchor="middle">{x_title}</text>'
           '<text transform="translate(22 215) rotate(-90)" text-anchor="middle">reward gain over '
           'the reference</text>']
    for tick in range(6):
        x = x_low + tick / 5 * width
        y = y_low + tick / 5 * height
        grid = f"M{at(x, y_low)}v-330M{at(x_low, y)}h500"
        out.append(f'<path d="{grid}" stroke="#888" stroke-opacity=".25"/>'
                   f'<text transform="translate({at(x, y_low)})" dx="-14" dy="20">{x:.2f}</text>'
                   f'<text transform="translate({at(x_low, y)})" dx="-38" dy="4">{y:.2f}</text>')
    if curve:
        line = "L".join(at(x, y) for x, y in curve)
        out.append(f'<path d="M{line}" fill="none" stroke="#3b82f6" stroke-width="2"/>')
    for i, (name, row) in enumerate(rows.items()):
        color = "#3b82f6" if name.startswith("optimum") else "#e8590c"
        x = row["constraint_gain"][0]
        y = row["reward_gain"]
        left, right = row["constraint_gain_ci"][0]
        low, high = row["reward_gain_ci"]
        cross = f"M{at(left, y)}L{at(right, y)}M{at(x, low)}L{at(x, high)}"
        out.append(f'<path d="{cross}" stroke="{color}"/>'
                   f'<path d="M{at(x, y)}h0" stroke="{color}" stroke-width="8"/>'
                   f'<text transform="translate({at(x, y)})" dy="{17 if i % 2 else -8}" '
                   f'dx="{8 if x - x_low < 0.75 * width else -8}" '
                   f'text-anchor="{"start" if x - x_low < 0.75 * width else "end"}">'
                   f'{"" if name.startswith("optimum") else name}</text>')
    return "\n".join([*out, "</svg>\n"])
