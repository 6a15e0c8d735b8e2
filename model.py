"""
model.py: a GPT, how it scores text, and how it samples its own.

The architecture is GPT-2's (pre-LN blocks, learned positions, tanh GELU) with GPT-2's own module
names, and without its dropout; or that of the Llama family (`llama`, `qwen2`, `qwen3`): RMSNorm,
rotary positions, a gated MLP, fewer heads of keys and values than of queries, and no biases but
qwen2's. `from_pretrained` loads published weights, `export` writes them. Three uses:

    policy, reference   sequence_logprob   ln π(y|x) = Σ_t ln π(y_t | x, y_<t): what DPO trains on
                        generate           y ~ π(·|x), and ln π(y|x) for free
    reward, safety      score              a scalar read off at the response's last token

Shapes, here: B rows of a batch (elsewhere its prompts, with G responses each), T tokens, C
channels, H heads of D channels, H' of them of keys and values, V vocabulary, R response tokens of a
batch, M of its positions that are computed, A rows that are still being sampled, S their tokens in
the cache; N prompts, K responses to each. An adapter's A (R, in) and B (out, R) are of its rank R.

A batch of text is always the pair (tokens, response_mask), both (B, T): prompt, response, then
padding on the right; the mask of what is scored stays on the CPU. Right padding needs no attention
mask, since a causal model never looks right; the response mask says which tokens the policy is
answerable for.

In this file: the model, adapters, scoring text, its memory and speed, sampling, files.
Read next: data.py, what the text is.
"""

import functools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import in_one_line, load, replace_file


# ---- the model
@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # tokens of the longest text
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    score_head: bool = False  # a reward or safety model: a scalar instead of logits
    dtype: str = "float32"  # of the blocks' arithmetic; trained weights and results are float32
    checkpoint_activations: bool = False  # recompute each block in the backward pass
    family: str = "gpt2"  # or llama, qwen2, qwen3
    n_kv_head: int = 0  # heads of keys and values, each for several of queries; 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_inner: int = None  # width of the MLP; None, as in config.json: 4 n_embd
    norm_eps: float = 1e-5
    tied: bool = True  # the embedding is the output layer
    lora: int = 0  # rank of adapters, see `add_adapters`
    rope: dict = None  # of the Llama family: rope_theta and what else config.json calls so


def norm(config, size):
    kind = nn.LayerNorm if config.family == "gpt2" else nn.RMSNorm
    return kind(size, config.norm_eps)


def rotation(rope, size, position):
    """Rotary positions: cos and sin (…, 1, T, D/2) of position (…, T) times D/2 frequencies, with
    Llama 3.1's change of those that turn less than a few times in its first context."""
    exponent = torch.arange(0, size, 2, device=position.device) / size
    frequency = 1 / rope["rope_theta"] ** exponent  # (D/2,)
    if rope.get("rope_type") == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    angle = position[..., None, :, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Each pair (x_i, x_{i+D/2}) of x (B, H, T, D) by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H = config.n_embd, config.n_head
        assert H > 0, f"n_head is {H}"  # weights fit a negative one too
        shared = config.n_kv_head or H
        self.heads = [H, shared, shared]  # of queries, keys, values
        self.head_dim = D = config.head_dim or C // H
        self.family = family = config.family
        if family == "gpt2":
            self.c_attn = nn.Linear(C, 3 * H * D)
        else:
            bias = family == "qwen2"
            self.q_proj = nn.Linear(C, H * D, bias)
            self.k_proj = nn.Linear(C, shared * D, bias)
            self.v_proj = nn.Linear(C, shared * D, bias)
        self.c_proj = nn.Linear(H * D, C, bias=family == "gpt2")
        if family == "qwen3":
            self.q_norm = norm(config, D)
            self.k_norm = norm(config, D)

    def forward(self, x, turn, packing, cache, visible):
        """(B, T, C) -> (B, T, C), or with a packing (M, C) -> (M, C). See GPT.forward; turn:
        `rotation` or nothing; the cache (B, 2, H', S, D) is this block's."""
        if self.family == "gpt2":
            qkv = self.c_attn(x)
        else:
            qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if packing:
            kept, where = packing
            qkv = F.embedding(where, qkv)  # (B, T, ·); qkv[where], faster backward
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D), twice (B, H', T, D)
        if self.family == "qwen3":
            q = self.q_norm(q)
            k = self.k_norm(k)
        if turn:
            q = rotate(q, *turn)
            k = rotate(k, *turn)
        if cache is not None:
            cache[..., -k.size(2):, :] = torch.stack([k, v], dim=1)
            k, v = cache.to(v.dtype).unbind(1)  # (B, H', S, D)
        shape = q.shape
        if visible is not None:  # one token: queries of the same keys are like places (B, H', ·, D)
            q = q.reshape(*k.shape[:2], -1, self.head_dim)
        y = F.scaled_dot_product_attention(
            q, k, v, visible, is_causal=visible is None, enable_gqa=len(k[0]) < len(q[0]))
        y = y.reshape(shape).transpose(1, 2).flatten(2)  # (B, T, H·D)
        if packing:
            y = F.embedding(kept, y.flatten(0, 1))  # (M, H·D)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        inner = config.n_inner or 4 * C
        self.gated = config.family != "gpt2"
        if self.gated:
            self.gate_proj = nn.Linear(C, inner, bias=False)
            self.up_proj = nn.Linear(C, inner, bias=False)
            self.down_proj = nn.Linear(inner, C, bias=False)
        else:
            self.c_fc = nn.Linear(C, inner)
            self.c_proj = nn.Linear(inner, C)

    def forward(self, x):
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, *given):
        x = x + self.attn(self.ln_1(x), *given)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        if not config.rope:
            self.wpe = nn.Embedding(config.block_size, C)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config, C)
        if not config.tied:
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.score_head:
            self.score_head = nn.Linear(C, 1, bias=False)
        for name, parameter in self.named_parameters():  # GPT-2's initialisation
            std = 0.02
            if name.endswith("c_proj.weight"):  # onto the residual stream: n_layer of each
                std /= math.sqrt(2 * config.n_layer)
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    @staticmethod
    def from_pretrained(folder):
        """A model of these families from a folder in the published layout, in float32. Raises
        ValueError where the folder holds something else."""
        return read_published(folder)

    @property
    def device(self):
        return self.wte.weight.device

    @property
    def output_weight(self):
        """(V, C)."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def mixed_precision(self):
        """Of the blocks only: a log-ratio is a small difference of long sums, and bfloat16 rounds
        logits from 8 to 16 to 1/16. The outermost one rounds each weight once."""
        dtype = self.config.dtype
        return torch.autocast(
            self.device.type, getattr(torch, dtype), enabled=dtype != "float32")

    def forward(self, tokens, packing=None, position=None, cache=None, visible=None):
        """Hidden states (B, T, C), float32, of text (B, T) that is whole; raises ValueError where
        it is longer than block_size. Besides:

        packing: compute and return those of the kept positions alone, (M, C); see `pack`.
        cache (B, n_layer, 2, H', S, D): keys and values of S tokens; those of `tokens`, the last
        T, are written there. Where text goes on, by one token, position (B, 1) says at which place
        it stands, and visible (B, 1, 1, S) which of the S it may look at.
        """
        config = self.config
        T = tokens.size(1)
        if T > config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={config.block_size}: "
                             "truncate the text or build a larger model")
        if position is None:
            position = torch.arange(T, device=tokens.device)
        turn = rotation(config.rope, self.h[0].attn.head_dim, position) if config.rope else None
        if packing:
            kept, _ = packing
            tokens = tokens.flatten()[kept]  # (M,)
            position = kept % T
        x = self.wte(tokens)
        if not turn:
            x = x + self.wpe(position)
        with self.mixed_precision():
            for layer, block in enumerate(self.h):
                past = None if cache is None else cache[:, layer]
                if config.checkpoint_activations:
                    block = functools.partial(
                        torch.utils.checkpoint.checkpoint, block, use_reentrant=False)
                x = block(x, turn, packing, past, visible)
        return self.ln_f(x)

    def hidden_at(self, tokens, response_mask, asked, group, cache=None):
        """forward's hidden states (R, C) at the positions of `asked` (B, T) alone. Rows come in
        groups of `group` responses to one prompt, which is computed once. cache: see forward."""
        kept, where = [x.to(self.device) for x in pack(response_mask, asked, group)]
        hidden = self(tokens, (kept, where), cache=cache)  # (M, C)
        return F.embedding(where[asked], hidden)

    def score(self, tokens, response_mask, group=1):
        """(B, T), (B, T) -> (B,): the scalar at the last token of each response, which has one;
        float32. `group` as in sequence_logprob."""
        last = response_mask & ~F.pad(response_mask[:, 1:], (0, 1))
        return self.score_head(self.hidden_at(tokens, response_mask, last, group))[:, 0]

    @torch.no_grad()
    def generate(self, prompts, uniforms, eos=None):
        """Sample K responses to each of N prompts, lists of token ids of any lengths. uniforms:
        (N, K, max_new_tokens) random numbers in [0, 1), all the chance there is.

        Returns tokens (N·K, T), response_mask (N·K, T), and logp (N·K,): each response's
        log-probability in nats under the policy that sampled it. A response ends with `eos`, an id
        or several, which belongs to it, or is cut at max_new_tokens; T is the longest prompt's
        length plus that. Raises ValueError when a prompt leaves no room for that many tokens.

        A row is a response, and A of the N·K are still computed.
        """
        N, K, max_new_tokens = uniforms.shape
        tokens, position, visible, hidden, cache = prefill(self, prompts, K, max_new_tokens)
        longest = tokens.size(1) - max_new_tokens
        response_mask = torch.zeros_like(tokens, dtype=torch.bool)  # (N·K, T)
        logp = hidden.new_zeros(N * K)
        uniforms = uniforms.flatten(0, 1).to(self.device)  # (N·K, max_new_tokens)
        index = torch.arange(N * K, device=self.device)[:, None]  # (A, 1) which response a row is
        active = torch.ones_like(index, dtype=torch.bool)  # (A, 1) it has not ended yet
        ends = tokens.new_tensor([] if eos is None else eos)
        with self.mixed_precision():
            for step in range(max_new_tokens):
                if step > 0:
                    seen = longest + step  # tokens in the cache, the newest one included
                    hidden = self(new, position=position, cache=cache[..., :seen, :],
                                   visible=visible[..., :seen])[:, 0]  # (A, C)
                    position += 1
                new, new_logp = sample_token(
                    hidden, self.output_weight, uniforms[index, step])  # (A, 1)
                tokens[index, position] = new * active
                response_mask[index, position] = active
                logp[index] += new_logp * active
                active &= ~torch.isin(new, ends)
                if step % 4 == 0:  # seldom: the host waits to know how many are left
                    left = int(active.sum())
                    if left == 0:
                        break
                    if left < 0.75 * len(active):  # ended responses leave the cache
                        index, position, visible, cache, new, active = [
                            x[active[:, 0]] for x in (
                                index, position, visible, cache, new, active)]
        return tokens, response_mask, logp


# ---- adapters: LoRA (arXiv 2106.09685)
def add_adapters(model):
    """Every linear layer of the blocks becomes W·x + B·A·x, A (R, in), B (out, R), R = config.lora.
    B = 0 at first, A ~ N(0, 1), by which a step of AdamW on B moves the policy about as far as one
    on W would, at R = 8, where the same learning rates serve. All else but a score head is frozen:
    a buffer, which no optimizer sees and `state_dict` leaves out; reference.pt has it."""
    rank = model.config.lora
    for place, module in model.named_modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if place != "score_head":
                delattr(module, name)
                module.register_buffer(name, weight.data, persistent=False)
    for linear in model.h.modules():
        if isinstance(linear, nn.Linear):
            linear.lora_A = nn.Parameter(torch.randn(rank, linear.in_features))
            linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
            linear.register_forward_hook(
                lambda linear, given, y: y + given[0] @ linear.lora_A.T @ linear.lora_B.T)


@torch.no_grad()
def merge(model, dtype=torch.float32):
    """Adds B·A to W, in float32 and then of that dtype, and sets B to 0. Returns all weights but
    the adapters, {name: tensor}; of a model without adapters all that it has."""
    for linear in model.h.modules():
        if hasattr(linear, "lora_A"):
            linear.weight = (linear.weight + linear.lora_B @ linear.lora_A).to(dtype)
            linear.lora_B.zero_()
    weights = model.state_dict() | dict(model.named_buffers())
    return {name: weight for name, weight in weights.items() if "lora" not in name}


# ---- scoring text
def sequence_logprob(model, tokens, response_mask, group=1):
    """ln π(y|x) of each response: (B, T), (B, T) -> (B,), in nats, float32. Each `group` rows
    in turn must have the very same prompt, which is not checked.

    Σ over response tokens only: no other position than those that predict one reaches the output
    layer.
    """
    asked = F.pad(response_mask[:, 1:], (0, 1))  # position t predicts t+1
    hidden = model.hidden_at(tokens, response_mask, asked, group)  # (R, C)
    row, column = asked.nonzero(as_tuple=True)  # (R,)
    logp = token_logprob(hidden, model.output_weight, tokens[row, column + 1])  # (R,)
    return logp.new_zeros(len(tokens)).index_add(0, row.to(logp.device), logp)


# ---- memory and speed of scoring: this section changes nothing of what is computed
def pack(response_mask, asked, group):
    """Which positions of a batch of text (B, T) are worth computing: all that the states at `asked`
    (B, T) depend on, without padding, and with a prompt, what is before the response, once in
    `group` rows. The masks are on the CPU. Returns

    kept (M,): their indices in the flattened batch (B·T)
    where (B, T): which of the M holds a position's state; 0 where none is needed

    Prompt p q, group 2, asked where a next token is predicted, so not at d and g:
        tokens  p q c d     kept  p q c      where  0 1 2 0 0
                p q e f g         e f: 5            0 1 3 4 0
    """
    here = torch.arange(asked.numel()).view_as(asked)  # (B, T)
    in_lead = here[::group].repeat_interleave(group, dim=0)  # the same, in the group's first row
    place = torch.where(response_mask.cumsum(1) > 0, here, in_lead)
    needed = asked.flip(1).cumsum(1).flip(1) > 0  # up to the last one asked
    # the others, behind the last one asked, become position 0: a causal model never looks there
    return torch.unique(place * needed, return_inverse=True)


LOGITS = 2 ** (26 if torch.cuda.is_available() else 22)  # of a slice; a CPU's stay in its cache


def token_logprob(hidden, weight, targets):
    """ln p(target) (R,) under softmax(hidden·weightᵀ), in float32 also under a caller's autocast:
    hidden (R, C), weight (V, C), targets (R,).

    A slice of the vocabulary at a time, which the backward pass computes again, instead of keeping
    (R, V) logits; of 64·n columns but for the last, which a GPU multiplies fastest.
    """
    hidden = hidden.to(torch.promote_types(weight.dtype, torch.float32))  # 16 bits lose half a nat

    def log_sum(hidden, part):
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden @ part.to(hidden).T).logsumexp(1)

    log_sums = [torch.utils.checkpoint.checkpoint(log_sum, hidden, part, use_reentrant=False)
                for part in weight.split(64 * (1 + LOGITS // (1 + 64 * len(hidden))))]
    logit = (hidden * F.embedding(targets, weight)).sum(1)  # (R,) of the targets
    return logit - torch.stack(log_sums).logsumexp(0)


# ---- sampling
def prefill(model, prompts, K, max_new_tokens):
    """One pass over N prompts, lists of token ids, then a row for each of their K responses:

    tokens (N·K, T) with room for the response, position (N·K, 1) where it begins, visible (N·K, 1,
    1, T), hidden (N·K, C) at the prompt's last token, and the cache (N·K, n_layer, 2, H', T, D).
    The responses' tokens begin behind the longest prompt in the cache, and a shorter one's padding
    is not visible to them.
    """
    config = model.config
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])  # (N, 1)
    longest = int(lengths.max())
    room = config.block_size - max_new_tokens
    if lengths.min() == 0 or longest > room:
        raise ValueError(
            f"prompts of 1 to {room} tokens leave room for max_new_tokens={max_new_tokens} in "
            f"block_size={config.block_size}; the longest here has {longest}, the shortest "
            f"{lengths.min()}")
    T = longest + max_new_tokens
    tokens = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts])  # (N, T)
    slot = torch.arange(T)
    visible = (slot < lengths) | (slot >= longest)  # (N, T) its prompt and its response
    attn = model.h[0].attn
    shape = len(prompts), config.n_layer, 2, attn.heads[1], T, attn.head_dim
    cache = torch.zeros(shape, dtype=getattr(torch, config.dtype), device=model.device)
    last = slot[:longest] == lengths - 1  # (N, ·) of the prompt
    hidden = model.hidden_at(
        tokens[:, :longest].to(model.device), last, last, 1, cache[..., :longest, :])  # (N, C)
    rows = tokens, lengths, visible[:, None, None], hidden, cache
    return [x.to(model.device).repeat_interleave(K, dim=0) for x in rows]


def sample_token(hidden, weight, u):
    """Inverse-CDF sampling from softmax(hidden·weightᵀ): hidden (A, C), weight (V, C), u (A, 1) ->
    token ids (A, 1) and their log-probabilities (A, 1)."""
    with torch.autocast(hidden.device.type, enabled=False):
        # (A, V), in parts that fit a CPU's cache; a GPU's are larger, so few
        logits = torch.cat([hidden @ part.T for part in weight.split(LOGITS // 2048)], dim=1)
    p = logits.softmax(1)
    cdf = p.cumsum(1)
    goal = (u * cdf[:, -1:]).clamp(min=1e-30)  # u = 0 draws no token of a p that underflowed
    token = torch.searchsorted(cdf, goal)  # the first whose cdf reaches it
    return token, p.gather(1, token).log()


# ---- files: what a run keeps
def to_checkpoint(model):
    """Configuration and weights, as `save` takes and `load` returns them; on a CPU the weights are
    the model's own, not a copy."""
    return {"config": asdict(model.config),
            "weights": {name: tensor.cpu() for name, tensor in model.state_dict().items()}}


def from_checkpoint(saved, device="cpu"):
    """The model, with a copy of the weights: training it leaves `saved`. With adapters all models
    on a device share one copy of the frozen weights, which the reference.pt beside the file has."""
    try:
        with torch.device("meta"):  # sizes are checked before memory is asked for
            model = GPT(GPTConfig(**saved["config"]))
            if model.config.lora:
                path = Path(saved["path"]).with_name("reference.pt")
                frozen = frozen_weights(path, path.stat().st_mtime, device)
                model.load_state_dict(frozen, assign=True, strict=False)  # lacks a score head
                add_adapters(model)
        model.load_state_dict(saved["weights"], assign=True)
    except Exception as error:  # a damaged file raises half a dozen kinds
        raise ValueError(
            f"{saved.get('path', 'checkpoint')}: not a model that this program saved "
            f"({in_one_line(error)}); make it again with --from its stage, and leave adapters "
            "beside their reference.pt") from None
    for parameter in model.parameters():
        parameter.data = parameter.to(device, copy=True)
    return model


@functools.lru_cache(1)
def frozen_weights(path, written, device):
    """Those that reference.pt, as it was written then, holds for adapters."""
    frozen = load(path, "make it with --from reference")["frozen"]
    return {name: weight.to(device) for name, weight in frozen.items()}


# ---- files: the published layout, a folder of config.json and weights
GPT2_SIZES = {  # config.json's names: ours
    "model_type": "family", "vocab_size": "vocab_size", "tie_word_embeddings": "tied",
    "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
    "n_inner": "n_inner", "layer_norm_epsilon": "norm_eps"}
SIZES = GPT2_SIZES | {  # and the Llama family's
    "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "head_dim": "head_dim",
    "hidden_size": "n_embd", "intermediate_size": "n_inner", "rms_norm_eps": "norm_eps"}
COVERED = {  # where config.json has these, nothing else
    "activation_function": ["gelu_new"], "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
    "hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
    "use_sliding_window": [False], "quantization_config": [None], "is_causal": [True],
    "model_type": ["gpt2", "llama", "qwen2", "qwen3"], "rope_type": ["default", "llama3"],
    "tie_word_embeddings": [True, False]}
NAMES = {  # theirs: ours
    "embed_tokens": "wte", "layers": "h", "input_layernorm": "ln_1", "self_attn": "attn",
    "o_proj": "c_proj", "post_attention_layernorm": "ln_2", "norm": "ln_f", "score": "score_head"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in GPT-2's
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"U8": torch.uint8, "BOOL": torch.bool}  # these two of GPT-2's masks


def read_config(theirs):
    """config.json -> GPTConfig; ValueError where it asks for what is not here."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    theirs["rope_type"] = rope.setdefault("rope_type", rope.get("type", "default"))
    for what, covered in COVERED.items():
        found = theirs.get(what, covered[0])
        if found not in covered:
            raise ValueError(f"{what} is {found}; covered: {covered}")
    sizes = {ours: theirs[name] for name, ours in SIZES.items() if theirs.get(name) is not None}
    if theirs["model_type"] != "gpt2":
        if rope.setdefault("rope_theta", theirs.get("rope_theta", 1e4)) <= 0:
            raise ValueError("rope_theta is not above 0")
        sizes = {"tied": False, "norm_eps": 1e-6, "n_head": 32, "rope": rope, **sizes}
    if "ForSequenceClassification" in str(theirs.get("architectures")):
        sizes |= {"score_head": True, "tied": True}  # it has no other output layer
    if sizes.get("n_layer", 1) > 1000:
        raise ValueError("more than 1000 layers")
    return GPTConfig(**sizes)


def renamed(name, names):
    return ".".join(names.get(part, part) for part in name.split("."))


def read_published(folder):
    """GPT.from_pretrained."""
    try:
        config = read_config(json.loads(Path(f"{folder}/config.json").read_bytes()))
        with torch.device("meta"):
            model = GPT(config)
        weights = {}
        for file in weight_files(folder):
            for name, tensor in read_tensors(f"{folder}/{file}"):
                if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
                    continue  # no weights
                dtype = getattr(tensor, "dtype", type(tensor))
                ours = renamed(name.removeprefix("transformer.").removeprefix("model."), NAMES)
                if dtype not in FLOATS.values() or not tensor.isfinite().all() or ours in weights:
                    raise ValueError(f"{name} is of {dtype}, not finite, or there twice: finite "
                                     "numbers of float32, float16 or bfloat16 are expected, once")
                if name.endswith(TRANSPOSED):
                    tensor = tensor.t().contiguous()
                weights[ours] = tensor.float()
        if config.tied and "lm_head.weight" in weights:
            head = weights.pop("lm_head.weight")
            if not torch.equal(weights.setdefault("wte.weight", head), head):
                raise ValueError("lm_head.weight is not the embedding, to which it is tied")
        model.load_state_dict(weights, assign=True)
        # one forward pass, for settings that fit the weights and make no sense all the same
        if not model(torch.zeros(1, 2).long()).isfinite().all():
            raise ValueError("with these settings its hidden states are not finite")
        return model
    except Exception as error:  # a damaged file raises a dozen kinds
        raise ValueError(
            f"{folder}: not a model as published ({in_one_line(error)}); expected config.json with "
            "model.safetensors or pytorch_model.bin, or with the shards that its index names"
        ) from None


def weight_files(folder):
    """The first that is there, as Transformers chooses; of an index the shards that it names."""
    for name in ("model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = Path(f"{folder}/{name}")
        if path.exists():
            if name.endswith("json"):
                return {*json.loads(path.read_bytes())["weight_map"].values()}
            return [name]
    raise ValueError("no weights")


def read_tensors(path):
    """Each name and tensor of a file. safetensors: the header's length in 8 bytes, the header as
    JSON, then raw bytes, of one tensor after the other."""
    if path.endswith(".bin"):
        yield from torch.load(path, map_location="cpu", weights_only=True).items()
        return
    last = 0
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            raise ValueError(f"{path} is cut off, or only a pointer to the file (git lfs pull)")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES or not last == begin <= end:
                raise ValueError(
                    f"{name} is {entry}: expected one of {', '.join(DTYPES)}, from {last}")
            last = end
            content = torch.from_numpy(np.fromfile(file, np.uint8, end - begin))
            yield name, content.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def export(model, folder, files={}, **changes):
    """Write a model so that `from_pretrained`, ours and Transformers', loads it, in float32, and
    files {name: text} with it, such as its tokenizer's. Of a GPT-2 config.json follows from the
    model; of others a policy's must be among the files; changes: of a score model's entries.
    Adapters are merged, also in the model."""
    open_export(folder, files)
    c = model.config
    config = json.loads(files.get("config.json", "{}"))
    config |= {"dtype": "float32", "torch_dtype": "float32", "attention_dropout": 0}
    prefix, names = "model.", {ours: theirs for theirs, ours in NAMES.items()}
    if not c.rope:
        prefix, names = "transformer.", {"score_head": "score"}
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "bos_token_id": c.vocab_size - 1, "eos_token_id": c.vocab_size - 1,
            **{theirs: getattr(c, ours) for theirs, ours in GPT2_SIZES.items()},
        } | config | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}  # no dropout
    if c.score_head:
        kind = f"{c.family.title().replace('Gpt', 'GPT')}ForSequenceClassification"
        config |= {"architectures": [kind], "num_labels": 1, **changes}
    for name, text in {**files, "config.json": json.dumps(config)}.items():
        replace_file(f"{folder}/{name}", lambda file: file.write(text.encode()))
    tensors = {}
    for name, tensor in merge(model).items():
        theirs = ("" if "head" in name else prefix) + renamed(name, names)
        if theirs.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[theirs] = tensor.float().contiguous()
    replace_file(f"{folder}/model.safetensors", lambda file: write_tensors(tensors, file))


def write_tensors(tensors, file):
    """safetensors; see `read_tensors`."""
    header = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.cpu().numpy())


def open_export(folder, others=()):
    """Make a folder for `export`; OSError where it cannot be, ValueError where nothing can be
    written, or where it holds something else, which would be read with it. others: files that
    `export` writes besides."""
    os.makedirs(folder, exist_ok=True)
    foreign = {name.removesuffix(".tmp") for name in os.listdir(folder)}  # of a killed run
    foreign -= {"config.json", "model.safetensors", *others}
    if foreign or not os.access(folder, os.W_OK):
        raise ValueError(
            f"{folder}: read-only, or holds {sorted(foreign)}; empty it, or export elsewhere")
