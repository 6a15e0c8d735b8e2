"""
model.py: a GPT, how it scores text, and how it samples its own.

The architecture is GPT-2's (pre-LN blocks, learned positions, tanh GELU, tied output layer), with
GPT-2's own module names (to load its published weights, transpose the projections). Three uses:

    policy, reference   sequence_logprob   ln π(y|x) = Σ_t ln π(y_t | x, y_<t): what DPO trains on
                        generate           y ~ π(·|x), and ln π(y|x) for free
    reward, safety      score              a scalar read off at the response's last token

Shapes, here and in every file: B batch, T tokens, C channels, H heads, V vocabulary, R response
tokens of a batch, A rows still in the sampling cache, S its positions in view; N prompts, K
responses to each, G of them in a group, P preference pairs, m constraints. A batch of text is
always the pair (tokens, response_mask), both (B, T): prompt, response, then padding on the right.
Right padding needs no attention mask, since a causal model never looks right; the response mask
says which tokens the policy is answerable for.

Read next: data.py (what the text is), then dual.py (the constraint's price), then mocan.py.
"""

import copy
import fcntl
import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    score_head: bool = False  # a reward or safety model: a scalar instead of logits
    dtype: str = "float32"  # of the blocks' arithmetic, under `autocast`


# ---- the blocks: `forward` takes whole sequences, `decode` one new token a row
class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def project(self, x):
        """(B, T, C) -> queries, keys, values, each (B, H, T, C/H)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind(dim=0)

    def merge(self, y):
        """(B, H, T, C/H) -> (B, T, C)."""
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        q, k, v = self.project(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(y), k, v

    def decode(self, x, keys, values, position, visible):
        """One new token a row: x (A, 1, C); keys, values (A, H, capacity, C/H), written at position
        (A,); visible (A, 1, 1, S)."""
        q, k, v = self.project(x)  # (A, H, 1, C/H)
        rows = torch.arange(len(x), device=x.device)
        keys[rows, :, position] = k[:, :, 0]
        values[rows, :, position] = v[:, :, 0]
        seen = visible.size(-1)
        keys = keys[:, :, :seen]
        values = values[:, :, :seen]
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=visible))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        """(B, T, C) -> (B, T, C), and the keys and values of every position."""
        y, keys, values = self.attn(self.ln_1(x))
        x = x + y
        return x + self.mlp(self.ln_2(x)), keys, values

    def decode(self, x, keys, values, position, visible):
        """(A, 1, C) -> (A, 1, C); writes the new token's key and value into the cache."""
        x = x + self.attn.decode(self.ln_1(x), keys, values, position, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(
                f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output layer: tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.score_head:
            self.score_head = nn.Linear(config.n_embd, 1, bias=False)
        for name, parameter in self.named_parameters():
            self._init(name, parameter)

    def _init(self, name, parameter):
        """GPT-2's: the two projections onto the residual stream shrink with depth."""
        std = 0.02
        if name.endswith("c_proj.weight"):
            std /= math.sqrt(2 * self.config.n_layer)
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=std)

    @property
    def device(self):
        return self.wte.weight.device

    def autocast(self):
        """Mixed precision for the blocks; logits, scores and losses stay float32."""
        dtype = getattr(torch, self.config.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def embed(self, tokens):
        """Whole sequences: (B, T) -> (B, T, C)."""
        T = tokens.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}: "
                             "truncate the text or build a larger model")
        return self.wte(tokens) + self.wpe.weight[:T]

    def forward(self, tokens):
        """Training and scoring: tokens (B, T) -> hidden states (B, T, C)."""
        x = self.embed(tokens)
        for block in self.h:
            x, _, _ = block(x)
        return self.ln_f(x)

    def logits(self, hidden):
        """hidden (..., C) -> next-token logits (..., V), in float32 also under autocast.

        A log-ratio is a small difference of long sums, and bfloat16 rounds every logit between 8
        and 16 to a multiple of 1/16.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight)

    def score(self, tokens, response_mask):
        """(B, T), (B, T) -> (B,): the scalar at each response's last token, float32."""
        B, T = tokens.shape
        last = (response_mask * torch.arange(T, device=tokens.device)).amax(dim=1)  # (B,)
        hidden = self(tokens)
        hidden = hidden[torch.arange(B), last]  # (B, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float())[:, 0]

    # ---- sampling
    def prefill(self, prompts, capacity):
        """One pass over prompts (B, T) -> hidden states (B, T, C) and the cache.

        The cache holds each block's keys and values, (B, H, capacity, C/H). A shorter prompt's
        padding lies where its response will be written, and each slot is overwritten before any
        query may see it.
        """
        x = self.embed(prompts)
        cache = []
        padding = (0, 0, 0, capacity - prompts.size(1))  # on the right of the positions
        for block in self.h:
            x, keys, values = block(x)
            cache.append((F.pad(keys, padding), F.pad(values, padding)))
        return self.ln_f(x), cache

    def decode(self, tokens, cache, position, visible):
        """One new token a row: tokens (A,) at position (A,) -> hidden states (A, C).

        visible (A, S): which of the cache's first S positions a row may look at.
        """
        x = (self.wte(tokens) + self.wpe(position))[:, None]  # (A, 1, C)
        for block, (keys, values) in zip(self.h, cache):
            x = block.decode(x, keys, values, position, visible[:, None, None])
        return self.ln_f(x)[:, 0]

    @torch.no_grad()
    def generate(self, prompts, uniforms, eos=None):
        """Sample one response per prompt. prompts: B lists of token ids, of any lengths; uniforms:
        (B, max_new_tokens) random numbers in [0, 1), all the chance there is.

        Returns tokens (B, T), response_mask (B, T), and logp (B,): each response's log-probability
        in nats under the policy that sampled it. A response ends with `eos`, which belongs to it,
        or is cut at max_new_tokens. Raises ValueError when a prompt leaves no room for that many
        tokens.
        """
        max_new_tokens = uniforms.size(1)
        self._check_room(prompts, max_new_tokens)
        device = self.device
        uniforms = uniforms.to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(lengths.max())
        end = longest + max_new_tokens
        tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        tokens = F.pad(tokens, (0, max_new_tokens)).to(device)  # (B, T)
        response_mask = torch.zeros_like(tokens, dtype=torch.bool)
        logp = torch.zeros(len(prompts), device=device)

        position = lengths  # (A,) where a row writes next
        index = torch.arange(len(prompts), device=device)  # (A,) which prompt a cached row serves
        active = torch.ones_like(index, dtype=torch.bool)  # (A,) its response has not ended yet
        hidden, cache = self.prefill(tokens[:, :longest], end)
        hidden = hidden[index, position - 1]  # (A, C)
        for seen in range(longest + 1, end + 1):  # cache positions of the longest prompt's row
            u = uniforms[index, seen - longest - 1]  # (A,)
            new, new_logp = sample_token(self.logits(hidden), u)  # (A,), (A,)
            tokens[index, position] = new * active
            response_mask[index, position] = active
            logp[index] += new_logp * active
            active = active & (new != eos)  # eos None: never ends
            if seen == end or not active.any():
                break
            if active.sum() < 0.75 * len(active):  # ended responses leave the cache
                index = index[active]
                position = position[active]
                new = new[active]
                cache = [(keys[active], values[active]) for keys, values in cache]
                active = torch.ones_like(index, dtype=torch.bool)
            visible = torch.arange(seen, device=device) <= position[:, None]  # (A, seen)
            hidden = self.decode(new, cache, position, visible)
            position = position + 1
        used = int(response_mask.any(dim=0).nonzero().max()) + 1
        return tokens[:, :used], response_mask[:, :used], logp

    def _check_room(self, prompts, max_new_tokens):
        shortest = min(map(len, prompts))
        longest = max(map(len, prompts))
        room = self.config.block_size - max_new_tokens
        if shortest == 0 or longest > room:
            raise ValueError(
                f"prompts of 1 to {room} tokens leave room for max_new_tokens={max_new_tokens} in "
                f"block_size={self.config.block_size}; the longest here has {longest}, the "
                f"shortest {shortest}")


def sample_token(logits, u):
    """Inverse-CDF sampling: logits (A, V), u (A,) -> token ids (A,), their log-probabilities."""
    logprobs = F.log_softmax(logits, dim=-1)  # (A, V)
    cdf = logprobs.exp().cumsum(dim=-1)
    u = u[:, None] * cdf[:, -1:]  # (A, 1)
    new = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.size(1) - 1)  # (A, 1)
    return new[:, 0], logprobs.gather(1, new)[:, 0]


# ---- scoring text
def sequence_logprob(model, tokens, response_mask):
    """ln π(y|x) of each response: (B, T), (B, T) -> (B,), in nats, float32.

    Σ over response tokens only. Prompt and padding positions never reach the output layer, so the
    largest tensor here is (R, V), with R the batch's response tokens.
    """
    mask = response_mask[:, 1:]  # (B, T-1): position t predicts token t+1
    hidden = model(tokens[:, :-1])[mask]  # (R, C)
    logp = -F.cross_entropy(model.logits(hidden), tokens[:, 1:][mask], reduction="none")  # (R,)
    return torch.zeros(mask.shape, device=logp.device).masked_scatter(mask, logp).sum(dim=1)


# ---- what is kept on disk
def to_checkpoint(model):
    """Configuration and weights, as `save` takes and `load` returns them; on a CPU the weights are
    the model's own, not a copy."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return {"config": asdict(model.config), "weights": weights}


def from_checkpoint(saved, device="cpu"):
    try:
        with torch.device("meta"):  # sizes are checked before memory is asked for
            model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(saved["weights"], assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{saved.get('path', 'checkpoint')}: not a model that this program saved "
                         f"({reason}); make it again with --from its stage") from None
    return copy.deepcopy(model).to(device)  # its own weights: training them leaves `saved`


def save(saved, path):
    replace_file(path, lambda file: torch.save(saved, file))


def replace_file(path, put):
    """put(file) writes a file that is there as a whole or not at all: until then the old one stays,
    also where the run is killed meanwhile or the disk is full."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as the latter
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        reason = str(error).split("\n")[0]
        raise OSError(f"{path}: cannot be written ({reason}); earlier files are kept; make room "
                      "(or mend the path), then go on with --resume") from None


def load(path, remedy, made_from={}):
    """A dict of tensors and plain values, on the CPU. ValueError with the remedy where it is none,
    or where its own "made_from" {setting or input: value} contradicts this one."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: missing or damaged ({type(error).__name__}); {remedy}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: holds a {type(saved).__name__}, not a dict; {remedy}")
    for what, value in saved.get("made_from", {}).items():
        if made_from.get(what, value) != value:
            raise ValueError(f"{path}: made with {what} {value}, not {made_from[what]}; {remedy}")
    saved["path"] = str(path)  # for errors
    return saved


def lock(folder):
    """A file that one process at a time can hold, until it ends; ValueError for a second one."""
    file = open(f"{folder}/lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{folder}: another run is under way there; wait for it, or choose "
                         "another --out") from None
    return file


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
        if os.path.exists(self.path):
            os.remove(self.path)


def fingerprint(x):
    """A text that tells values apart: models, tensors, tuples and dicts of them, tokenizers, plain
    values and lists of them; functions count for nothing."""
    digest = hashlib.sha256()
    todo = [x]
    while todo:
        x = todo.pop()
        if isinstance(x, nn.Module):
            x = x.state_dict()
        if isinstance(x, tiktoken.Encoding):
            x = x.token_byte_values()
        if isinstance(x, torch.Tensor):
            digest.update(x.cpu().contiguous().numpy().tobytes())
        elif isinstance(x, dict):
            todo += [*x.keys(), *x.values()]
        elif isinstance(x, tuple):
            todo += x
        elif not callable(x):
            digest.update(repr(x).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
