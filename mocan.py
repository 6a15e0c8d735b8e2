"""
mocan.py: MoCAN, model-based one-shot constrained alignment (arXiv 2405.19544v3).

The problem, for a reward r, safety measures g_j and a reference policy π_ref:

    max_π  E[r(x,y)] − β·KL(π‖π_ref)    subject to    E_π[g_j] − E_ref[g_j] ≥ b_j,   j = 1…m

1. Sample K responses per prompt from π_ref.                             (sample_pool)
2. Score them: r(x,y), g_1(x,y) … g_m(x,y).                              (score_pool)
   Scores of learned judges become what other judges confirm of them.    (confirm)
3. Find λ* ≥ 0 by Newton: the dual is convex, and closed form on them.   (solve_from)
4. One policy update: DPO with pairs labelled by s = r + ⟨λ*,g⟩.         (train_mocan)

A second shot does the same from the policy that the first one made: see `solve_from`.

Step 4 is all of the training, since π* ∝ π_ref·exp(s/β) is what DPO converges to when
P(y ≻ y') = σ(s(y) − s(y')): the constants E_ref[g_j] and b_j of the dual cancel in the difference.

    symbol        variable  shape           symbol         variable       shape
    r, g_1 … g_m  scores    (1+m, N, K)     ln π(y|x)      logp           (B, G); a Sample's (N, K)
    s             s, s_k    (N, K), (B, G)  ln π_ref(y|x)  ref_logp, ref  (N, K), (B, G)
    λ             lam       (m,)            P(y_i ≻ y_j)   p_i            (B, G(G-1)/2)

N prompts, K responses to each, G of them in a group, B prompts of a batch, W of it on all ranks
together, T tokens; m constraints.

What constrained alignment often has, and this has not: a value model, sampling inside the loop, a λ
that moves in training, the reference's forward pass in the loop. Different from the paper: labels
are the exact P, not one Bernoulli draw of it (the same minimiser, less noise), and pairs are those
of the K samples, all G(G−1)/2 of a fresh group of G, which cost nothing once each response's
log-probability is there; the paper takes the data set's own two responses.

Read next: dual.py, how λ* is found; then pecan.py, the same without score models.
"""

import copy
import json
import math
import os
import time
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import dual
from data import (Pool, conversation, encode_prompts, group_batches, load, pad, pair_pool,
                  published_files, read_tokenizer, save, take, take_text, text_pool, uniforms,
                  world_scores)
from model import GPT, from_checkpoint, sequence_logprob


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
    p = p_chosen + torch.zeros_like(lead)
    chosen = torch.where(p == 0, 0.0, -p * F.logsigmoid(lead))  # 0·∞ is 0 here
    return chosen + torch.where(p == 1, 0.0, (p - 1) * F.logsigmoid(-lead))


# ---- 1. sample
class Sample(NamedTuple):
    """K responses of a policy π₁ to each of N prompts; in the first shot π₁ is π_ref."""
    pool: Pool        # (N, K, T)
    logp: Tensor      # (N, K) ln π₁(y|x)
    ref_logp: Tensor  # (N, K) ln π_ref(y|x)
    scores: Tensor    # (1+m, N, K) r, g_1 … g_m
    second: Tensor = None  # (1+m, N, K) by judges that label nothing, or the same

    @property
    def mean_g(self):
        """E_π₁[g], (m,)."""
        return self.scores[1:].double().mean(dim=(1, 2))


def sample_pool(policy, tok, prompts, K, recipe):
    """K responses y ~ π(·|x) to each of N prompts -> Pool (N, K, T), ln π(y|x) (N, K) in nats."""
    ids = encode_prompts(tok, prompts)
    batches = torch.arange(len(ids)).split(max(1, recipe.batch // K))  # of prompts
    progress = Progress(recipe._replace(steps=len(batches)))
    me, ranks = rank()
    for first in range(len(progress.done), len(batches), ranks):
        sampled = []
        if first + me < len(batches):  # one for each rank, while some are left
            n = batches[first + me]
            sampled = [x.cpu() for x in policy.generate(
                [ids[i] for i in n], uniforms(recipe.key, n.tolist(), K, tok.response_limit),
                eos=tok.ends)]
        for batch in filter(len, gather(sampled)):
            progress.report(batch)
    tokens, response_mask, logp = [
        [row for batch in part for row in batch] for part in zip(*progress.done)]
    pool = Pool(pad(tokens, K).int(), pad(response_mask, K))
    if policy.config.dtype == "float32":
        return pool, torch.stack(logp).view(-1, K)
    return pool, map_pool(policy, pool)  # rounded as in training, not as in sampling


# ---- 2. score
def score_pool(judges, names, prompts, pool, tok, device):
    """r, g_1 … g_m of every response -> (1+m, N, K): by the judges {preference: checkpoint of a
    score model, or folder of a published one with its own tokenizer "tok" and a sign}, or by the
    built-in world's functions where there are none. names: "helpful", then the constraints;
    prompts: N of them.

    Offline samples and evaluation both pass here, so that the two cannot differ.
    """
    if not judges:
        return world_scores(names, prompts, pool.texts(tok))
    scores = []
    for name in names:
        judge = judges[name]
        if "folder" in judge:
            model = GPT.from_pretrained(judge["folder"]).to(device)
            theirs = text_pool(judge["tok"], prompts, pool.texts(tok), judge["folder"])
            scores.append(judge["sign"] * map_pool(model, theirs))
        else:
            scores.append(map_pool(from_checkpoint(judge, device), pool))
    return torch.stack(scores)


# ---- 3. the dual, relative to any policy
def solve_from(sample, ref_mean, margin, beta):
    """dual.Dual of the problem, written relative to π₁; margin (m,), a tensor; ref_mean (m,) is
    E_ref[g].

    For any π₁:  E_π[r] − β·KL(π‖π_ref) = E_π[r − β·ln(π₁/π_ref)] − β·KL(π‖π₁), so it is the same
    dual with r → r − β·ln(π₁/π_ref) and b → b less what π₁ has gained; in the first shot both
    differences are 0. Where π₁ is near π_λ*, its weights are nearly flat and few responses serve:
    λ* loses the bias of a finite K, which one shot has at a small β. The Dual's kl, ref and gains
    are then those over π₁, its score_gain that of the tilted r; `gains` has r's own.
    """
    score = sample.scores[0] - beta * (sample.logp - sample.ref_logp)  # (N, K)
    gained = sample.mean_g - ref_mean  # (m,)
    return dual.solve(score, sample.scores[1:], margin - gained, beta)


def total_score(scores, lam):
    """s = r + ⟨λ,g⟩ (N, K), of scores (1+m, N, K): π_λ ∝ π_ref·exp(s/β)."""
    return scores[0] + torch.einsum("m,mnk->nk", lam.to(scores), scores[1:])


# ---- 4. the policy update
def train_mocan(policy, sample, lam, beta, group, recipe):
    """DPO on pairs of the sample, labelled by s = r + ⟨λ*,g⟩ -> the loss of every step.

    policy: starts as the one that was sampled, the reference or what the shot before made of it;
    lam (m,); group: G responses to a prompt, compared in all their pairs.
    """
    pool = sample.pool
    s = total_score(sample.scores, lam)  # (N, K) r + ⟨λ*,g⟩
    group = min(group, s.size(1))
    # every pair of a group once, i < j
    i, j = torch.triu_indices(group, group, 1, device=policy.device)
    optimizer = adamw(policy)
    progress = Progress(recipe, model=policy, optimizer=optimizer)
    for lr, batches, _ in progress.schedule(pool, group):
        optimizer.param_groups[0]["lr"] = lr
        # (B,) prompts of this rank, (B, G) some of the K responses, (W,) prompts of all ranks
        for n, k, whole in batches:
            tokens, response_mask = take_text(pool, n, k, policy.device)  # (B·G, T)
            logp = sequence_logprob(policy, tokens, response_mask, group).view(k.shape)  # (B, G)
            ref = take(sample.ref_logp, n, k, policy.device)  # (B, G)
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


# ---- what every loop uses
class Recipe(NamedTuple):
    """How a model is trained or, without steps and lr, sampled."""
    stage: str  # what progress, errors and the checkpoint call it: unique in a run
    steps: int = 0
    lr: float = 0.0
    key: str = ""  # of its random streams
    batch: int = 16  # pairs a micro-batch: 2·batch responses, in groups of G; sampling: responses
    accumulate: int = 1  # micro-batches a step
    run: object = None  # the settings out, run, resume, checkpoint_every; None: no checkpoints
    warmup: int = 20  # steps


def adamw(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def lr_at(step, recipe):
    """The learning rate: linear warm-up, then cosine to 0."""
    warm = min(1.0, (step + 1) / (recipe.warmup + 1))
    done = max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * warm * (0.5 + 0.5 * math.cos(math.pi * done))


class Progress:
    """What a loop has done and has left to do. Every so many seconds, more seldom where that takes
    over 2 % of the time, it says so and writes a checkpoint, from which a run that is resumed goes
    on."""

    def __init__(self, recipe, **parts):  # the model and the optimizer of a training
        self.recipe = recipe
        self.parts = parts
        self.done = []  # the loss of each step, or the samples of each batch
        self.best = {"loss": math.inf, "worse": 0}  # see `consider`
        self.loss = 0.0  # of the step's micro-batches so far
        self.began = self.due = time.monotonic()
        run = recipe.run
        if run and run.resume and os.path.exists(f"{run.out}/checkpoint.pt"):
            saved = load(f"{run.out}/checkpoint.pt", "remove it, which begins the last stage anew")
            if saved["loop"] == [run.run, recipe.stage]:
                self.done = saved["done"]
                self.best = saved["best"]
                for name, part in parts.items():
                    part.load_state_dict(saved[name])
                print(f"  {recipe.stage}: goes on after {len(self.done)} of {recipe.steps}")
        self.before = len(self.done)  # steps or batches of a run that was killed

    def schedule(self, pool, group):
        """Yield (lr, batches, ends_epoch) for the steps that are left; it ends early when two
        epochs have brought `consider` no better loss. batches: (n, k, whole) of each micro-batch,
        this rank's prompts n (B,), groups k (B, G) of their responses, and the prompts of all ranks
        (W,); where those are too few, a rank has none. ends_epoch: whether as many pairs have been
        seen as the pool has (group 2), to within a step, or it is the last one."""
        recipe = self.recipe
        me, ranks = rank()
        batches = group_batches(pool.lengths, 2 * recipe.batch, group, recipe.key)
        epoch = max(1, len(pool.tokens) // (recipe.batch * recipe.accumulate))  # steps
        for step in range(recipe.steps):
            found = [next(batches) for _ in range(recipe.accumulate)]  # also for steps already done
            if self.best["worse"] == 2:
                return
            if step >= len(self.done):  # none that a killed run has done
                mine = [(n[me::ranks], k[me::ranks], n) for n, k in found if len(n) > me]
                ends_epoch = (step + 1) % epoch == 0 or step + 1 == recipe.steps
                yield lr_at(step, recipe), mine, ends_epoch

    def add(self, loss):
        """A micro-batch's; it stays on the device until it is read."""
        self.loss += loss.detach() / self.recipe.accumulate

    def step(self, norm):
        """The loss of a step is over all ranks, and not finite where the gradient's norm is not."""
        self.report(add_up(self.loss + 0 * norm))
        self.loss = 0.0

    def report(self, result):
        """After every step or batch: the loss, or the samples."""
        self.done.append(result)
        step = len(self.done)
        recipe = self.recipe
        now = time.monotonic()
        if step < recipe.steps and now < self.due:
            return
        loss = f"  loss {self.losses()[-1]:.4f}" if self.parts else ""
        seconds = now - self.began + 1e-9
        rate = (step - self.before) / seconds
        print(f"  {recipe.stage} {step}/{recipe.steps}{loss}  {rate:.1f}/s  "
              f"{seconds:.0f} s elapsed, {(recipe.steps - step) / rate:.0f} s left", flush=True)
        self.due = now + 10
        run = recipe.run
        if run:
            save({"loop": [run.run, recipe.stage], "done": self.done, "best": self.best,
                  **{name: part.state_dict() for name, part in self.parts.items()}},
                 f"{run.out}/checkpoint.pt")
            saved = time.monotonic()
            self.due = saved + max(run.checkpoint_every, 50 * (saved - now))

    def losses(self):
        """Of every step of a training; FloatingPointError where one is not finite."""
        self.done = torch.tensor(self.done).tolist()
        for step, loss in enumerate(self.done):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{self.recipe.stage}: the loss or its gradient is {loss} after {step} steps; "
                    "lower the learning rate or use --dtype float32")
        return self.done

    def consider(self, loss):
        """Early stopping: keeps the weights with the least calibration loss; see `schedule`."""
        weights = copy.deepcopy(self.parts["model"].state_dict())
        self.best.setdefault("weights", weights)  # though no loss is ever finite
        self.best["worse"] += 1
        if loss < self.best["loss"]:
            print(f"  calibration loss {loss:.4f}")
            self.best |= {"loss": loss, "worse": 0, "weights": weights}


SCORED = 64  # responses at once, in whole prompts: more would not fit a CPU's cache


@torch.no_grad()
def map_pool(model, pool):
    """What a model says of every response of a pool -> (N, K), float32, on the CPU: a policy
    ln π(y|x), a score model its score."""
    N, K, _ = pool.tokens.shape
    found = torch.zeros(N, K)
    me, ranks = rank()
    order = pool.lengths.amax(1).argsort(stable=True)
    due = time.monotonic() + 10
    size = max(1, SCORED // K)
    for done, n in enumerate(order.split(size)[me::ranks]):
        if time.monotonic() > due:
            print(f"  scored {done * size * ranks} of {N} prompts", flush=True)
            due += 10
        tokens, response_mask = take_text(pool, n, torch.arange(K), model.device)  # (B·K, T) all
        if model.config.score_head:
            x = model.score(tokens, response_mask, K)  # (B·K,)
        else:
            x = sequence_logprob(model, tokens, response_mask, K)
        found[n] = x.view(-1, K).cpu()
    return add_up(found)


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


def add_up_gradients(model):
    """The sum over the ranks: each has divided its losses by what all of them have."""
    for parameter in model.parameters():
        if parameter.grad is None:  # this rank had no share
            parameter.grad = torch.zeros_like(parameter)
        add_up(parameter.grad)


# ---- before MoCAN: the reference policy and the score models
def train_reference(model, pool, calibration, recipe):
    """Supervised fine-tuning on both responses of every pair: raise their tokens' mean
    log-probability, for as many epochs as those of the calibration pool's responses rise too. Pools
    (P, 2, T) -> the loss of every step, a token's (the calibration loss is a response's)."""
    optimizer = adamw(model)
    progress = Progress(recipe, model=model, optimizer=optimizer)
    for lr, batches, ends_epoch in progress.schedule(pool, 2):
        optimizer.param_groups[0]["lr"] = lr
        for n, k, whole in batches:  # (B,) pairs, (B, 2) both responses
            tokens, response_mask = take_text(pool, n, k, model.device)  # (B·2, T)
            logp = sequence_logprob(model, tokens, response_mask, 2)  # (B·2,)
            loss = -logp.sum() / pool.response_mask[whole].sum()
            (loss / recipe.accumulate).backward()
            progress.add(loss)
        add_up_gradients(model)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ends_epoch:
            progress.consider(-map_pool(model, calibration).mean().item())
        progress.step(norm)
    model.load_state_dict(progress.best["weights"])
    return progress.losses()


def preferences(pairs, name, pool):
    """Those of `pair_pool` that hold this preference -> Pool (P, 2, T) chosen, rejected."""
    held = [(n, pair.prefers[name]) for n, pair in enumerate(pairs) if name in pair.prefers]
    if not held:
        raise ValueError(f"no pair of {name} is left for one of its judges; more conversations are "
                         "needed")
    n, chosen = torch.tensor(held).T  # (P,), and (P,) 0 or 1
    k = torch.stack([chosen, 1 - chosen], dim=1)  # (P, 2)
    return Pool(*[x[n[:, None], k] for x in pool])


def half(pairs, which):
    """All pairs; those outside this half of the conversations, 0 or 1, lose their preferences."""
    kept = {*sorted({conversation(pair.prompt) for pair in pairs})[which::2]}
    return [pair if conversation(pair.prompt) in kept else pair._replace(prefers={})
            for pair in pairs]


def score_loss(chosen, rejected):
    """Bradley–Terry loss of a score model, −ln σ(chosen − rejected): (B,), (B,) scores -> (B,)."""
    return -F.logsigmoid(chosen - rejected)


def train_score(model, pool, calibration, recipe):
    """A reward or safety model from a pool (P, 2, T) of chosen and rejected responses, for as many
    epochs as help on the calibration pool -> the loss of every step."""
    optimizer = adamw(model)
    progress = Progress(recipe, model=model, optimizer=optimizer)
    for lr, batches, ends_epoch in progress.schedule(pool, 2):
        optimizer.param_groups[0]["lr"] = lr
        for n, k, whole in batches:  # (B,) pairs
            k = k.sort(1).values  # (B, 2) chosen, rejected
            tokens, response_mask = take_text(pool, n, k, model.device)  # (B·2, T)
            score = model.score(tokens, response_mask, 2).view(k.shape)  # (B, 2)
            loss = score_loss(*score.T).sum() / len(whole)
            (loss / recipe.accumulate).backward()
            progress.add(loss)
        add_up_gradients(model)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ends_epoch:
            progress.consider(calibrated_loss(*map_pool(model, calibration).T))
        progress.step(norm)
    model.load_state_dict(progress.best["weights"])
    return progress.losses()


def learn_score(model, name, training, calibration, evaluation, recipe, runs):
    """Train a score model on pools (P, 2, T) of chosen and rejected: the weights of several runs
    from one start, in different orders, are averaged (WARM, arXiv 2401.12187), and the inverse
    temperature τ is multiplied in, so that r or g is in log-odds of the preference."""
    start = copy.deepcopy(model.state_dict())
    mean = {}
    for run in range(runs):
        again = " again" * run
        model.load_state_dict(start)
        train_score(model, training, calibration, recipe._replace(
            stage=recipe.stage + again, key=recipe.key + again))
        for what, weight in model.state_dict().items():
            mean[what] = mean.get(what, 0) + weight / runs
    model.load_state_dict(mean)
    tau = temperature(name, map_pool(model, calibration))
    model.score_head.weight.data *= tau
    print(f"  {name}: multiplied by the inverse temperature τ = {tau:.3f}")
    say_agreement(f"{name}, evaluation", map_pool(model, evaluation))


def ready_judges(specs, names, pairs, device):
    """Two {preference: what score_pool takes} of published score models, each of specs NAME=FOLDER,
    or NAME=-FOLDER of a cost: a name's first, and its second. Their scores stay in their own units;
    what the calibration pairs say of them is printed."""
    first, second = {}, {}
    for spec in specs:
        name, _, folder = spec.partition("=")
        sign = -1 if folder.startswith("-") else 1
        folder = folder.removeprefix("-")
        judges = second if name in first else first
        if name not in names or not folder or name in second:
            raise ValueError(f"--judge {spec}: expected NAME=FOLDER, or NAME=-FOLDER of a cost, "
                             f"one or two for each NAME of {', '.join(names)}")
        model = GPT.from_pretrained(folder).to(device)
        if not model.config.score_head:
            raise ValueError(f"--judge {spec}: no ...ForSequenceClassification of one label")
        files = published_files(folder)
        limit = model.config.block_size // 2
        tok = read_tokenizer(folder, files, "auto", "", limit, limit)
        if tok.known > model.config.vocab_size:
            raise ValueError(f"{folder} has {model.config.vocab_size} tokens, its tokenizer more")
        padding = json.loads(files["config.json"]).get("pad_token_id")
        close = [tok.end, *tok.next]
        while close and close[-1] == padding:
            close.pop()  # the score stands at the last token that is none
        tok = tok._replace(close=close)
        pool = pair_pool(tok, pairs, f"{name} judge")
        if any(name in pair.prefers for pair in pairs):
            say_agreement(f"{name} judge, calibration",
                          sign * map_pool(model, preferences(pairs, name, pool)))
        changed = max(file.stat().st_mtime for file in os.scandir(folder))
        judges[name] = {"run": f"{spec} {changed}", "folder": folder, "sign": sign, "tok": tok,
                        "pairs": sign * map_pool(model, pool)}
    if second and second.keys() != first.keys():
        raise ValueError("--judge: a second one for each NAME that has a first, or for none")
    return [first, second]


# ---- confirmation: scores in units that another judge confirms
def within(x):
    """Scores (1+m, N, K) less their means over a prompt's responses -> (1+m, N·K)."""
    return (x - x.mean(2, keepdim=True)).flatten(1).double()


def regression(first, second):
    """Cov(B, A)·Cov(A)⁻¹ within prompts (1+m, 1+m), of scores A, B (1+m, N, K): times A it is the
    best linear guess of B."""
    a, b = within(first), within(second)
    return b @ a.T @ torch.linalg.pinv(a @ a.T, hermitian=True)


def slopes(said, pairs):
    """kept (1+m,) and M (1+m, 1+m) of `confirm`, from both judges' scores (2, 1+m, N, K) of
    responses and (2, 1+m, P, 2) of calibration pairs."""
    a, b = map(within, pairs)  # (1+m, 2P)
    square = (a * a).sum(1)  # (1+m,)
    kept = torch.where(square > 1e-9, (a * b).sum(1) / square, 1)  # 1 where no pair says
    return kept, regression(*said) / kept[:, None]


def confirm(said, judges, names):
    """What of the first scores A, of judges or of PeCAN's policies, is confirmed by those of other
    judges, B, who learned the same preferences from other conversations.

    A judge's errors look like preferences to whoever maximises its scores; A and B differ in them.
    1. The best linear guess of B, on the responses and within prompts, is Cov(B,A)·Cov(A)⁻¹·A.
    2. B is itself too flat a guess of the truth T: on the calibration pairs, where A is calibrated,
       E[T_j|A_j] = A_j, B_j rises by `kept` where T_j rises by 1.
    3. So with U = 1/kept, diagonal, M·A is the guess of T, M = U·Cov(B,A)·Cov(A)⁻¹, and U·B what
       the second say in the same units.
    What both judges have from the same kind of text stays. Where two of them do not agree at all,
    M = U = 1, with a warning; where the data has prompts alone, U = 1.

    said: A, B (1+m, N, K) of some responses; judges: [{preference: with "pairs", its scores (P, 2)
    of calibration pairs}]. Without a second judge [1]: nothing confirms what the first say.
    -> "units" M, U (1+m, 1+m); "draws" of M (100, 1+m, 1+m), of other prompts and pairs, and their
    standard deviation, "error"; "agree" (1+m,), the correlation of A and B within prompts.
    """
    if len(said) == 1:
        if judges[0]:
            print("  nothing confirms these scores: no second judges")
        return unconfirmed(said, names)
    said = torch.stack(said)  # (2, 1+m, N, K)
    pairs = torch.stack([
        torch.stack([some[name]["pairs"] for name in names]) for some in judges])  # (2, 1+m, P, 2)
    kept, M = slopes(said, pairs)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(100):  # the bootstrap over prompts and pairs
        drawn = [x[:, :, torch.randint(x.size(2), x.shape[2:3], generator=generator)]
                 for x in (said, pairs)]
        draws.append(slopes(*drawn)[1])
    draws = torch.stack(draws)
    error = draws.std(0)
    agree = F.cosine_similarity(*map(within, said))
    for j, name in enumerate(names):
        print(f"  {name}: {M[j, j]:.3f} ± {1.96 * error[j, j]:.3f} of what its judge says is "
              f"confirmed by a second one; within prompts they correlate at {agree[j]:.2f}")
    if not torch.cat([agree, kept]).min() > 0:
        warnings.warn("two judges do not agree: all scores stay as they are, unconfirmed, and what "
                      "they promise need not come; more pairs or more --score_steps are needed")
        return unconfirmed(said, names)
    if M.det() < 2 * draws.det().std():  # M may be singular: some mix of the scores is noise
        warnings.warn("what the judges say is confirmed within its error only")
    return {"units": [M.float(), (1 / kept).diag().float()], "draws": draws.float(),
            "error": error, "agree": agree}


def unconfirmed(judges, names):
    """As `confirm`, which leaves the scores as they are."""
    one = torch.eye(len(names))
    return {"units": [one] * len(judges), "draws": torch.stack([one, one])}


def in_units(units, said):
    """Scores (1+m, N, K) of each judge in the units of `confirm`."""
    return [torch.einsum("ij,jnk->ink", unit, x) for unit, x in zip(units, said)]


def gains(sample, scores, lam, beta):
    """What π_λ gains over π₁ by scores (1+m, N, K), the sample's own or its second ones, and the
    standard errors over prompts: (1+m,), (1+m,)."""
    s = total_score(sample.scores, lam)
    weight = (s / beta - sample.logp + sample.ref_logp).softmax(1)  # (N, K) of π_λ
    return dual.clustered((weight * scores).sum(2) - scores.mean(2))


def error_of_units(confirmed, gain):
    """The standard error (1+m,) that M's own adds to gains (1+m,) by scores M·A."""
    raw = torch.linalg.pinv(confirmed["units"][0]) @ gain  # by A
    return (confirmed["draws"] @ raw).std(0)


# ---- calibration: scores in log-odds of the preference
def calibrate(chosen, rejected):
    """The inverse temperature τ that makes P(chosen ≻ rejected) = σ(τ·(chosen − rejected)) most
    likely: scores on preferences that did not train them, (P,), (P,) -> τ () from 0 to 100; for
    scores that are never wrong the best τ is infinite, and this is one of many that fit.

    One-parameter logistic regression by Newton's method, which does not overshoot from 0, since the
    curvature falls as τ grows. τ = 1: calibrated; τ > 1: the scores understate the preference;
    τ < 1: they overstate it, as those that were learned by heart do.
    """
    lead = chosen.double() - rejected.double()
    tau = 0.0
    for _ in range(50):
        p = torch.sigmoid(-tau * lead)  # probability of the choice that was not made
        slope = p @ lead
        curvature = (p * (1 - p) * lead * lead).sum().clamp_min(1e-12)
        tau = (tau + slope / curvature).clamp(0, 100)
    return tau


def calibrated_loss(chosen, rejected):
    """Bradley–Terry loss at the best temperature: what the scores know, whatever their scale."""
    return -F.logsigmoid(calibrate(chosen, rejected) * (chosen - rejected)).mean().item()


def temperature(name, score):
    """`calibrate` on scores (P, 2) of chosen and rejected, or 1 where no τ fits: where they are
    always right, no better than a coin, or so small that it would be 100."""
    tau = calibrate(*score.T).item()
    if 0 < tau < 100 and score.diff().max() > 0:  # wrong at least once
        return tau
    warnings.warn(f"no temperature fits the {name} scores on {len(score)} calibration pairs; they "
                  "stay as they are; more pairs are needed")
    return 1.0


def say_agreement(name, score):
    """How well scores (P, 2) of chosen and rejected predict a choice that did not train them: how
    often they agree with it, and the τ that is left."""
    chosen, rejected = score.T
    right = (chosen > rejected) + 0.5 * (chosen == rejected)  # (P,) half of a tie
    print(f"  {name}: {right.mean():.1%} of {len(right)} pairs right; τ = "
          f"{calibrate(chosen, rejected):.3f}; standard deviation of the score {score.std():.2f}")


# ---- what came of it
def compare(scores, log_ratio, weight, ref_scores):
    """Responses with scores (1+m, N, K), ln π/π_ref (N, K) and weights (N, K), each row's sum 1, or
    one number for all, against the reference's scores on the same prompts -> gains, KL(π‖π_ref) and
    their 95 % intervals over prompts (taken as independent), as results.json has them."""
    gain = (weight * scores.double()).sum(2) - ref_scores.double().mean(2)  # (1+m, N)
    kl = (weight * log_ratio).sum(1)  # (N,)
    mean, error = dual.clustered(torch.cat([gain, kl[None]]))  # (2+m,), (2+m,)
    reward_gain, *constraint_gain, kl = mean.tolist()
    reward_ci, *constraint_ci, kl_ci = torch.stack(
        [mean - 1.96 * error, mean + 1.96 * error], dim=1).tolist()  # (2+m, 2)
    return {"reward_gain": reward_gain, "reward_gain_ci": reward_ci,
            "constraint_gain": constraint_gain, "constraint_gain_ci": constraint_ci,
            "kl": kl, "kl_ci": kl_ci}


def optima(sample, ref, logp, margin, beta):
    """Rows of π_λ ∝ π_ref·exp((r + ⟨λ,g⟩)/β) itself, which nobody trained, for 31 λ from 0 to 2λ*,
    the 16th the optimum; none where b is out of reach.

    From a policy's Sample and the reference's as one of 2K responses of the even mixture of both:
    near the policy, and nowhere far below π_ref. logp (N, K): the policy's ln π of ref's.
    """
    parts = zip(sample[1:], ref._replace(logp=logp)[1:])  # all but the pools
    both = Sample(None, *[torch.cat(part, dim=-1) for part in parts])  # (…, N, 2K)
    mixed = torch.logaddexp(both.logp, both.ref_logp) - math.log(2)  # (N, 2K)
    try:
        lam = solve_from(both._replace(logp=mixed), ref.mean_g, margin, beta).lam
    except (dual.Infeasible, FloatingPointError) as error:
        print(f"  no optimum by these responses: {error}")
        return []
    rows = []
    for t in range(31):
        at = t / 15 * lam
        tilt = total_score(both.scores.double(), at) / beta
        log_weight = tilt - (mixed - both.ref_logp)  # (N, 2K) ln π_λ/π_mixed + ln Z
        log_z = log_weight.logsumexp(1, keepdim=True) - math.log(log_weight.size(1))
        how = tilt - log_z, log_weight.softmax(1)
        rows.append({"lam": at.tolist(), **compare(both.scores, *how, ref.scores),
                     "second": compare(both.second, *how, ref.second)})
    return rows
