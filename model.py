"""
model.py: a GPT, how it samples, and how it scores its own text.

The architecture is GPT-2's (pre-LN blocks, learned positions, tanh GELU, tied output layer), with GPT-2's own module
names (its published projections are stored transposed). Three uses:

    policy, reference   generate           y ~ π(·|x), and ln π(y|x) for free
                        sequence_logprob   ln π(y|x) = Σ_t ln π(y_t | x, y_<t), differentiable: what DPO trains on
    reward, safety      score              a scalar read off at the response's last token

Shapes, here and in every file: B batch, T tokens, C channels, H heads, V vocabulary, R response tokens of a batch.
A batch of text is always the pair (tokens, response_mask), both (B, T): prompt, response, then padding on the right.
Right padding needs no attention mask, since a causal model never looks right; the response mask does the rest.

Read next: data.py (what the text is), then dual.py (the constraint's price), then mocan.py (the losses and loops).
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    score_head: bool = False  # a reward or safety model: a scalar instead of logits


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, position=None, mask=None):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, C/H)
                   for z in self.c_attn(x).split(C, dim=2))
        if mask is None:  # whole sequences: training, scoring, and a prompt's first pass
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if cache is not None:
                cache[0][:, :, :T], cache[1][:, :, :T] = k, v
        else:  # one new token a row, each row at its own position
            rows = torch.arange(B, device=x.device)
            cache[0][rows, :, position], cache[1][rows, :, position] = k[:, :, 0], v[:, :, 0]
            seen = mask.size(-1)
            y = F.scaled_dot_product_attention(q, cache[0][:, :, :seen], cache[1][:, :, :seen], attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


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

    def forward(self, x, cache=None, position=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, position, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output layer: the weights are tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.score_head:
            self.score_head = nn.Linear(config.n_embd, 1, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # GPT-2's init: the two projections onto the residual stream shrink with depth
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, tokens, cache=None, position=None, mask=None):
        """tokens (B, T) -> hidden states (B, T, C), ready for the output layer or the score head."""
        if position is None:
            if tokens.size(1) > self.config.block_size:
                raise ValueError(f"{tokens.size(1)} tokens do not fit block_size={self.config.block_size}: "
                                 "truncate the text or build a larger model")
            x = self.wte(tokens) + self.wpe.weight[:tokens.size(1)]  # (B, T, C)
        else:
            x = self.wte(tokens) + self.wpe(position)[:, None]  # (B, 1, C)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], position, mask)
        return self.ln_f(x)

    def logits(self, hidden):
        """hidden (..., C) -> next-token logits (..., V), in float32 also under autocast: a response's log-ratio is
        a small difference of long sums, and bfloat16 rounds every logit between 8 and 16 to a multiple of 1/16."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight.float())

    def score(self, tokens, response_mask):
        """(B, T), (B, T) -> (B,) the scalar at each response's last token, float32."""
        T = tokens.size(1)
        last = (response_mask * torch.arange(T, device=tokens.device)).amax(dim=1)  # (B,)
        hidden = self(tokens)[torch.arange(len(tokens), device=tokens.device), last]  # (B, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float())[:, 0]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, eos=None, generator=None):
        """Sample one response per prompt. `tokens`: a list of B prompts, each a list of token ids, of any lengths.

        Returns tokens (B, T), response_mask (B, T), and logp (B,): each response's log-probability in nats under the
        policy that sampled it (so at this temperature). A response ends with `eos`, which belongs to it, or is cut
        at max_new_tokens. Raises ValueError when a prompt leaves no room for that many tokens.
        """
        device, longest = self.wte.weight.device, max(len(p) for p in tokens)
        if min(len(p) for p in tokens) == 0 or longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"prompts of 1 to {self.config.block_size - max_new_tokens} tokens leave room for "
                             f"max_new_tokens={max_new_tokens} in block_size={self.config.block_size}; the longest "
                             f"here has {longest}, the shortest {min(len(p) for p in tokens)}")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be > 0")
        B, T = len(tokens), longest + max_new_tokens
        lengths = torch.tensor([len(p) for p in tokens], device=device)  # (B,)
        out = torch.zeros(B, T, dtype=torch.long, device=device)
        for b, prompt in enumerate(tokens):
            out[b, :len(prompt)] = torch.tensor(prompt, device=device)
        mask, logp = torch.zeros(B, T, dtype=torch.bool, device=device), torch.zeros(B, device=device)

        # The first pass fills the cache with every prompt; a shorter prompt's padding lands where its response will
        # be written, and each slot is overwritten before any query may see it.
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.wte.weight.dtype
        shape = (B, self.config.n_head, T, self.config.n_embd // self.config.n_head)
        cache = [(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
                 for _ in self.h]
        hidden = self(out[:, :longest], cache)[torch.arange(B, device=device), lengths - 1]  # (B, C)
        row, position = torch.arange(B, device=device), lengths  # which prompt each cached row serves; where it writes
        active = torch.ones(B, dtype=torch.bool, device=device)  # its response has not ended yet
        for step in range(max_new_tokens):
            logprobs = F.log_softmax(self.logits(hidden) / temperature, dim=-1)  # (A, V), A cached rows
            cdf = logprobs.exp().cumsum(dim=-1)
            u = torch.rand(len(cdf), 1, generator=generator, device=device) * cdf[:, -1:]
            nxt = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.size(1) - 1)  # (A, 1) inverse-CDF sampling
            out[row, position], mask[row, position] = nxt[:, 0] * active, active
            logp[row] += logprobs.gather(1, nxt)[:, 0] * active
            if eos is not None:
                active = active & (nxt[:, 0] != eos)
            if step + 1 == max_new_tokens or not active.any():
                break
            if active.sum() < 0.75 * len(active):  # compact: ended responses stop costing time
                row, position, nxt = row[active], position[active], nxt[active]
                cache, active = [(k[active], v[active]) for k, v in cache], active[active]
            seen = longest + step + 1
            visible = torch.arange(seen, device=device) <= position[:, None]  # (A, seen)
            hidden = self(nxt, cache, position, visible[:, None, None])[:, 0]
            position = position + 1
        used = int(mask.any(dim=0).nonzero().max()) + 1
        return out[:, :used], mask[:, :used], logp


def sequence_logprob(model, tokens, response_mask):
    """ln π(y|x) of each response: (B, T), (B, T) -> (B,), in nats, float32.

    Σ over response tokens only. Prompt and padding positions never reach the output layer, so the largest tensor here
    is (R, V), with R the batch's response tokens.
    """
    hidden = model(tokens[:, :-1])  # (B, T-1, C): position t predicts token t+1
    mask = response_mask[:, 1:]
    logp = -F.cross_entropy(model.logits(hidden[mask]), tokens[:, 1:][mask], reduction="none")  # (R,)
    return torch.zeros(mask.shape, device=logp.device).masked_scatter(mask, logp).sum(dim=1)


def to_checkpoint(model):
    """Configuration and weights: what torch.save takes, and torch.load gives back with weights_only=True."""
    return {"config": asdict(model.config), "weights": {k: x.cpu() for k, x in model.state_dict().items()}}


def from_checkpoint(saved, device="cpu"):
    model = GPT(GPTConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["weights"])
    return model
