"""
mocan.py: MoCAN, model-based one-shot constrained alignment (arXiv 2405.19544v3).

The problem, for a reward r, safety measures g_j and a reference policy π_ref:

    max_π  E[r(x,y)] − β·KL(π‖π_ref)    subject to    E_π[g_j] − E_ref[g_j] ≥ b_j,   j = 1…m

1. Sample K responses per prompt from π_ref and score them.              (sample_pool, score_pool)
2. Find λ* ≥ 0 by Newton on those scores: D is closed form and convex.   (solve_from)
3. One policy update: DPO with pairs labelled by s = r + ⟨λ*,g⟩.         (train_mocan)

A second shot does the same from the policy that the first one made: see `solve_from`.

Step 3 is all of the training, since π* ∝ π_ref·exp(s/β) is what DPO converges to when
P(y ≻ y') = σ(s(y) − s(y')): the constants E_ref[g_j] and b_j of the dual cancel in the difference.

    symbol   variable    shape        symbol          variable        shape
    r        score       (N, K)       ln π(y|x)       logp            (B, G); of a Sample (N, K)
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
import itertools
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence

import dual
from data import WORLD_SCORES, Pool, encode_prompts, group_batches, stream, take, take_text
from model import GPT, from_checkpoint, load, save, sequence_logprob


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
    return -p_chosen * F.logsigmoid(lead) - (1 - p_chosen) * F.logsigmoid(-lead)


def score_loss(chosen, rejected):
    """Bradley–Terry loss of a score model, −ln σ(chosen − rejected): (B,), (B,) scores -> (B,)."""
    return -F.logsigmoid(chosen - rejected)


def calibrate(chosen, rejected):
    """The inverse temperature τ that makes P(chosen ≻ rejected) = σ(τ·(chosen − rejected)) most
    likely: scores on preferences that did not train them, (P,), (P,) -> τ () from 0 to 100; for
    scores that are never wrong the best τ is infinite, and this is one of many that fit.

    One-parameter logistic regression by Newton's method, which does not overshoot from 0, since the
    curvature falls as τ grows. τ = 1: calibrated; τ > 1: the scores understate the preference;
    τ < 1: they overstate it, as those that were learned by heart do.
    """
    lead = (chosen - rejected).double()
    tau = lead.new_zeros(())
    for _ in range(50):
        p = torch.sigmoid(-tau * lead)  # probability of the choice that was not made
        slope = (p * lead).sum()
        curvature = (p * (1 - p) * lead * lead).sum().clamp_min(1e-12)
        tau = (tau + slope / curvature).clamp(0, 100)
    return tau


# ---- many processes: under torchrun each rank computes its share of what all of them then have
def rank():
    """Of this process, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(x):
    """A tensor's sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(x):
    """What every rank has in place of x, a list."""
    everyone = [x] * rank()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, x)
    return everyone


# ---- what the training loops share
class Checkpoint:
    """The state of the loop that is under way, in a file that is written anew every so many
    seconds, but for no more than 2 % of the time; with `resume` the loop of a killed run, if `run`
    is its name, finds its state there."""

    def __init__(self, path, seconds, run, resume):
        self.path = path
        self.seconds = seconds
        self.run = run
        self.saved = {}
        if resume and os.path.exists(path):
            self.saved = load(path, "remove it, which begins the last stage anew")
        self.due = time.monotonic() + seconds

    def restore(self, stage):
        """The state last kept in that stage of this run, or None."""
        if self.saved.get("loop") == [self.run, stage]:
            return self.saved["state"]

    def keep(self, stage, state):
        began = time.monotonic()
        if began >= self.due:
            save({"loop": [self.run, stage], "state": state()}, self.path)
            now = time.monotonic()
            self.due = now + max(self.seconds, 50 * (now - began))

    def remove(self):
        Path(self.path).unlink(missing_ok=True)


class Recipe(NamedTuple):
    """How a model is trained."""
    stage: str  # what progress and errors call it, and the checkpoint: unique in a run
    steps: int
    lr: float
    key: str  # of its random streams
    batch: int = 16  # pairs a micro-batch; policy updates: 2·batch responses, in groups of G
    accumulate: int = 1  # micro-batches a step
    checkpoint: Checkpoint | None = None
    warmup: int = 20  # steps
    clip: float = 1.0  # largest gradient norm


STATEFUL = ("model", "optimizer")  # what a training loop carries from step to step
PLAIN = ("losses", "norms", "best", "least", "worse")


class Descent:
    """AdamW with warm-up, accumulation, clipping, checkpoints, and a line of progress every ten
    seconds; losses are read from the device only then, at checkpoints and at the end."""

    def __init__(self, model, recipe):
        self.model = model
        self.recipe = recipe
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.losses = []  # of every micro-batch, on the device until `check` reads them
        self.norms = []  # of every step's gradient
        self.best = {}  # weights after the best epoch
        self.least = math.inf  # its calibration loss
        self.worse = 0  # epochs since then
        self.log = progress(recipe.stage, recipe.steps)
        state = recipe.checkpoint and recipe.checkpoint.restore(recipe.stage)
        if state:
            for part in STATEFUL:
                getattr(self, part).load_state_dict(state.pop(part))
            vars(self).update(state)
            print(f"  {recipe.stage}: goes on after {len(self.losses)} micro-batches")

    def state(self):
        """What a checkpoint keeps and __init__ restores."""
        self.check()
        state = {part: getattr(self, part).state_dict() for part in STATEFUL}
        return state | {part: getattr(self, part) for part in PLAIN}

    def over(self, pool, group, held_out=None):
        """Yield this rank's share of a batch of data.group_batches for each micro-batch; a rank
        for which no prompt is left gets the batch's first one, which does not count. After every
        epoch, if there are several, and at the end held_out() -> calibration loss is asked; the
        weights of the best epoch are kept, and training ends when two have brought nothing."""
        recipe = self.recipe
        me, ranks = rank()
        batches = group_batches(pool.lengths, 2 * recipe.batch, group, recipe.key)
        for _ in self.losses:  # those of the run that this one resumes
            next(batches)
        # steps of an epoch for groups of 2, which all that have held_out are
        epoch = max(1, len(pool.tokens) // (recipe.batch * recipe.accumulate))
        several = held_out and epoch < recipe.steps
        for step in range(len(self.losses) // recipe.accumulate + 1, recipe.steps + 1):
            if self.worse == 2:
                break
            for _ in range(recipe.accumulate):
                n, k = next(batches)
                self.counts = me < len(n)
                mine = slice(me, None, ranks) if self.counts else slice(1)
                yield n[mine], k[mine]
            if several and (step % epoch == 0 or step == recipe.steps):
                self.keep_best(step, held_out())
            if recipe.checkpoint:
                recipe.checkpoint.keep(recipe.stage, self.state)
        self.check()
        if self.best:
            self.model.load_state_dict(self.best)

    def keep_best(self, step, loss):
        self.worse += 1
        if loss < self.least:
            print(f"  {self.recipe.stage}: calibration loss {loss:.4f} after {step} steps")
            self.least = loss
            self.worse = 0
            self.best = {name: weight.to("cpu", copy=True)
                         for name, weight in self.model.state_dict().items()}

    def step(self, loss, count):
        """Backward of the mean loss, given its sum and how many it sums; after the last micro-batch
        of a step, clip and update. A gradient that is not finite leaves the weights as they are.
        Call it in a loop over `over`, which sets `counts`: whether this rank's share is its own."""
        recipe = self.recipe
        count = add_up(torch.tensor(float(self.counts * count)))
        loss = self.counts * loss / count
        (loss / recipe.accumulate).backward()
        self.losses.append(add_up(loss.detach()))
        if len(self.losses) % recipe.accumulate:
            return
        step = len(self.norms)
        self.optimizer.param_groups[0]["lr"] = recipe.lr * lr_at(step, recipe)
        if rank()[1] > 1:  # all gradients in one message
            gradients = [parameter.grad for parameter in self.model.parameters()]
            flat = add_up(parameters_to_vector(gradients))
            vector_to_parameters(flat, gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.norms.append(norm)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # 1: the fused kernel skips the step
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        latest = torch.stack(self.losses[-recipe.accumulate:]).mean()
        if self.log(step + 1, latest):
            self.check()

    def check(self):
        """Raises FloatingPointError on a gradient that was not finite."""
        self.losses = torch.tensor(self.losses).tolist()
        self.norms = torch.tensor(self.norms).tolist()
        for step, norm in enumerate(self.norms):
            if not math.isfinite(norm):
                loss = self.losses[step * self.recipe.accumulate]
                raise FloatingPointError(
                    f"{self.recipe.stage}: the gradient norm is {norm} and the loss {loss} after "
                    f"{step} steps; lower the learning rate or use --dtype float32")


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
            return False
        last = now
        number = "" if loss is None else f"  loss {loss:.4f}"
        rate = step / (now - began)
        print(f"  {stage} {step}/{steps}{number}  {rate:.1f}/s  {now - began:.0f} s elapsed, "
              f"{(steps - step) / rate:.0f} s left", flush=True)
        return True
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
    """Gains, score and KL are those over the policy π₁ whose responses the dual was solved on; the
    score is r − β·ln(π₁/π_ref), in the first shot r."""
    print(f"\ndual of {policy}: λ* = {numbers(found.lam)} ± {numbers(1.96 * found.lam_se)} at a "
          f"margin of {numbers(margin)}; predicted from the responses it was solved on: gains "
          f"{numbers(found.constraint_gain)}, score {found.score_gain:.3f}, KL {found.kl:.3f}; "
          f"effective sample size {found.ess:.1f} a prompt (5th percentile {found.ess_p5:.1f}); "
          f"{found.iterations} evaluations")


# ---- step 1: responses, their log-probabilities and scores
class Draw(NamedTuple):
    """How responses are sampled."""
    stage: str  # what progress calls it, and the checkpoint: unique in a run
    K: int  # responses to each prompt
    key: str  # of the random streams
    batch: int = 256  # responses sampled at once
    checkpoint: Checkpoint | None = None


def sample_pool(policy, tok, prompts, draw):
    """K responses y ~ π(·|x) to each of N prompts -> Pool, logp (N, K) in nats."""
    ids, cut = encode_prompts(tok, prompts)
    if cut:
        print(f"  {cut} of {len(ids)} prompts lost their beginning: over {tok.prompt_limit} tokens")

    def responses(some):
        uniforms = [torch.rand(tok.response_limit, generator=stream(draw.key, n, k))
                    for n in some for k in range(draw.K)]
        uniforms = torch.stack(uniforms).view(len(some), draw.K, -1)
        sampled = policy.generate([ids[n] for n in some], uniforms, eos=tok.end)
        return [x.cpu() for x in sampled]
    log = progress(draw.stage, len(ids))
    batches = draw.checkpoint and draw.checkpoint.restore(draw.stage) or []
    size = max(1, draw.batch // draw.K)  # prompts of a batch
    me, ranks = rank()
    for begin in range(len(batches) * size, len(ids), ranks * size):  # a batch for each rank
        some = range(len(ids))[begin + me * size:][:size]
        mine = [responses(some)] if some else []
        batches += itertools.chain(*gather(mine))
        log(min(begin + ranks * size, len(ids)))
        if draw.checkpoint:
            draw.checkpoint.keep(draw.stage, lambda: batches)
    rows = [row for sampled in batches for row in zip(*sampled)]
    tokens, response_mask, logp = zip(*rows)  # N·K of (T,), (T,), ()
    tokens = pad_sequence(tokens, batch_first=True).view(len(prompts), draw.K, -1)
    response_mask = pad_sequence(response_mask, batch_first=True).view(tokens.shape)
    pool = Pool(tokens.int(), response_mask)
    if policy.config.dtype == "float32":
        return pool, torch.stack(logp).view(len(prompts), draw.K)
    return pool, logprobs(policy, pool)  # by autocast, as in training


def sample_from(policy, reference, tok, prompts, draw, score_of):
    """K responses of a policy to each prompt -> Sample; score_of(pool, ref_logp): (1+m, N, K)."""
    pool, logp = sample_pool(policy, tok, prompts, draw)
    ref_logp = logprobs(reference, pool)
    return Sample(pool, logp, ref_logp, score_of(pool, ref_logp))


SCORED = 64  # responses at once, in whole prompts; what more need does not stay in a CPU's cache


@torch.no_grad()
def map_pool(function, model, pool):
    """function(model, tokens (B, T), response_mask (B, T), K) -> (B,) on every response -> (N, K).
    The fourth argument: so many rows in turn have one prompt.

    Float32, on the CPU: log-probabilities and the score models' scores.
    """
    N, K, _ = pool.tokens.shape
    out = torch.zeros(N, K)
    me, ranks = rank()
    order = pool.lengths.amax(1).argsort(stable=True)
    for n in order.split(max(1, SCORED // K))[me::ranks]:
        tokens, response_mask = take_text(pool, n, torch.arange(K), model.device)
        with model.autocast():
            out[n] = function(model, tokens, response_mask, K).view(-1, K).cpu()
    return add_up(out)


def logprobs(policy, pool):
    """ln π(y|x) of every response of the pool -> (N, K)."""
    return map_pool(sequence_logprob, policy, pool)


def score_pool(judges, names, prompts, pool, tok, device):
    """r, g_1 … g_m of every response -> (1+m, N, K): by the judges {preference: score model}, which
    are on the device one at a time, or by the built-in world's functions where there are none.
    names: "helpful", then the constraints; prompts: N strings.

    Offline samples and evaluation both pass here, so that the two cannot differ.
    """
    if judges:
        return torch.stack([map_pool(GPT.score, copy.deepcopy(judges[name]).to(device), pool)
                            for name in names])
    K = pool.tokens.size(1)
    texts = pool.texts(tok)
    scores = [WORLD_SCORES[name](prompts[i // K], text)
              for name in names for i, text in enumerate(texts)]
    return torch.tensor(scores).view(len(names), -1, K)


# ---- before MoCAN: the reference policy and the score models
def train_reference(model, pool, recipe, held_out=None):
    """Supervised fine-tuning on both responses of every pair: raise their tokens' mean
    log-probability. held_out() -> calibration loss, see Descent.over."""
    descent = Descent(model, recipe)
    for n, k in descent.over(pool, 2, held_out):
        tokens, response_mask = take_text(pool, n, k, model.device)
        with model.autocast():
            logp = sequence_logprob(model, tokens, response_mask, 2)  # (B·2,)
        descent.step(-logp.sum(), response_mask.sum())


def train_score(model, pool, recipe, held_out=None):
    """A reward or safety model from a pool (P, 2, T) of chosen and rejected responses; held_out()
    -> calibration loss."""
    descent = Descent(model, recipe)
    for n, k in descent.over(pool, 2, held_out):
        tokens, response_mask = take_text(pool, n, k.sort(1).values, model.device)
        with model.autocast():
            score = model.score(tokens, response_mask, 2).view(k.shape)  # (B, 2) chosen, rejected
        descent.step(score_loss(score[:, 0], score[:, 1]).sum(), len(n))


def learn_score(model, name, training, calibration, evaluation, recipe):
    """Train a score model on `data.Preferences` and multiply the inverse temperature τ in, so that
    r or g is in log-odds of the preference."""
    def score(preferences):
        return map_pool(GPT.score, model, preferences.pool)  # (P, 2)
    train_score(model, training.pool, recipe, lambda: calibrated_loss(*score(calibration).T))
    tau = temperature(name, score(calibration))
    with torch.no_grad():
        model.score_head.weight *= tau
    print(f"  {name}: multiplied by the inverse temperature τ = {tau:.3f}")
    say_agreement(f"{name}, evaluation", score(evaluation), evaluation)


def temperature(name, score):
    """`calibrate` on scores (P, 2) of chosen and rejected, or 1 where no τ fits: where they are
    always right, no better than a coin, or so small that it would be 100."""
    tau = calibrate(*score.T).item()
    if 0 < tau < 100 and score.diff().max() > 0:
        return tau
    warnings.warn(f"no temperature fits the {name} scores on {len(score)} calibration pairs; they "
                  "stay as they are; more pairs are needed")
    return 1.0


def calibrated_loss(chosen, rejected):
    """Bradley–Terry loss at the best temperature: what the scores know, whatever their scale."""
    tau = calibrate(chosen, rejected)
    return score_loss(tau * chosen, tau * rejected).mean().item()


def say_agreement(name, score, preferences):
    """How well scores (P, 2) of chosen and rejected predict a choice that did not train them: how
    often they agree with it, and the τ that is left. Intervals are those of
    conversations, not of pairs."""
    chosen, rejected = score.T
    right = (chosen > rejected).double()
    tau = calibrate(chosen, rejected)
    lead = (chosen - rejected).double()
    p = torch.sigmoid(-tau * lead)
    influence = p * lead / (p * (1 - p) * lead * lead).mean()
    print(f"  {name}: {right.mean():.1%} ± {preferences.half_width(right):.1%} of {len(right)} "
          f"pairs right; τ = {tau:.3f} ± {preferences.half_width(influence):.3f}; standard "
          f"deviation of the score {score.std():.2f}")


# ---- what came of it: gains and the table; nothing below is part of the method
def measure(policies, reference, judges, names, tok, prompts, draw, margin, beta):
    """K fresh responses of every policy to evaluation prompts -> {policy: row}, {policy: N·K
    texts}, the frontier. policies {name: checkpoint}, the reference's first; margin b (m,)."""
    rows = {}
    texts = {}
    for name, saved in policies.items():
        policy = from_checkpoint(saved, reference.device)
        sample = sample_from(  # the same key: the same noise for all
            policy, reference, tok, prompts, draw._replace(stage=f"evaluate {name}"),
            lambda pool, _: score_pool(judges, names, prompts, pool, tok, reference.device))
        if not rows:
            ref = sample
        texts[name] = sample.pool.texts(tok)
        even = torch.full_like(sample.logp, 1 / draw.K)
        rows[name] = {**compare(sample.scores, sample.logp - sample.ref_logp, even, ref.scores),
                      "margin": margin.tolist(), "lam": saved.get("lam", []),
                      "predicted": saved.get("predicted"), "seconds": saved.get("seconds", 0.0)}
    mixed = mixture(sample, ref, logprobs(policy, ref.pool))  # the last one's
    ref_mean = ref.scores[1:].double().mean(dim=(1, 2))  # (m,)
    try:
        lam = solve_from(mixed, ref_mean, margin, beta).lam
    except (dual.Infeasible, FloatingPointError) as error:
        print(f"  no optimum by these responses: {error}")
        return rows, texts, []
    rows["optimum"] = {**optimum(mixed, lam, beta, ref.scores), "margin": margin.tolist(),
                       "seconds": 0.0}
    # from 0 to 2λ*
    return rows, texts, [optimum(mixed, t / 15 * lam, beta, ref.scores) for t in range(31)]


def compare(scores, log_ratio, weight, ref_scores):
    """Responses with scores (1+m, N, K), ln π/π_ref (N, K) and weights (N, K), each row's sum 1,
    against the reference's scores on the same prompts -> gains, KL(π‖π_ref) and their 95 %
    intervals over prompts (taken as independent), as results.json has them."""
    gain = (weight * scores.double()).sum(2) - ref_scores.double().mean(2)  # (1+m, N)
    kl = (weight * log_ratio).sum(1)  # (N,)
    found = torch.cat([gain, kl[None]])  # (2+m, N)
    error = 1.96 * found.std(1) / math.sqrt(found.size(1))
    found = found.mean(1)
    reward_gain, *constraint_gain, kl = found.tolist()
    reward_ci, *constraint_ci, kl_ci = torch.stack([found - error, found + error], dim=1).tolist()
    return {"reward_gain": reward_gain, "reward_gain_ci": reward_ci,
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
    log_z = log_weight.logsumexp(1, keepdim=True) - math.log(log_weight.size(1))
    weight = log_weight.softmax(1)
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
