"""
model.py: a GPT, how it scores text, and how it samples its own.

The architecture is GPT-2's (pre-LN blocks, learned positions, tanh GELU, tied output layer) with
GPT-2's own module names, and without its dropout: `from_pretrained` loads its published weights,
`export` writes them. Three uses:

    policy, reference   sequence_logprob   ln π(y|x) = Σ_t ln π(y_t | x, y_<t): what DPO trains on
                        generate           y ~ π(·|x), and ln π(y|x) for free
    reward, safety      score              a scalar read off at the response's last token

Shapes, here and in every file: B batch, T tokens, C channels, H heads, V vocabulary, R response
tokens of a batch, M of its positions that are computed, A rows that are still being sampled, S
their tokens in the cache; N prompts, K responses to each, G of them in a group, P preference
pairs, m constraints. A batch of text is always the pair (tokens, response_mask), both (B, T):
prompt, response, then padding on the right; the mask stays on the CPU. Right padding needs no
attention mask, since a causal model never looks right; the response mask says which tokens the
policy is answerable for.

In this file: the model, scoring text, its memory and speed, sampling, files.
Read next: data.py, what the text is.
"""

import copy
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


# ---- the model
@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # tokens of the longest text
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    score_head: bool = False  # a reward or safety model: a scalar instead of logits
    dtype: str = "float32"  # of the blocks' arithmetic; weights and results stay float32
    checkpoint_activations: bool = False  # recompute each block in the backward pass


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, packing, cache, visible):
        """(B, T, C) -> (B, T, C), or with a Packing (M, C) -> (M, C). See GPT.forward; the cache
        (B, 2, H, S, C/H) is this block's."""
        qkv = self.c_attn(x)
        if packing:
            qkv = F.embedding(packing.where, qkv)  # (B, T, 3C); qkv[where], faster backward
        B, T, _ = qkv.shape
        qkv = qkv.view(B, T, 3, self.n_head, -1).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.unbind(1)  # (B, H, T, C/H)
        if cache is not None:
            cache[..., -T:, :] = qkv[:, 1:]
            k, v = cache.to(q.dtype).unbind(1)  # (B, H, S, C/H)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        if packing:
            y = F.embedding(packing.kept, y.flatten(0, 1))  # (M, C)
        return self.c_proj(y)


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

    def forward(self, x, packing, cache, visible):
        x = x + self.attn(self.ln_1(x), packing, cache, visible)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_head < 1 or config.n_embd % config.n_head:
            raise ValueError(
                f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output layer: tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.score_head:
            self.score_head = nn.Linear(config.n_embd, 1, bias=False)
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
        """GPT-2 of any size from a folder in the published layout, in float32. Raises ValueError
        where the folder holds something else."""
        return read_published(folder)

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, tokens, packing=None, position=None, cache=None, visible=None):
        """Hidden states (B, T, C), float32, of text (B, T) that is whole; raises ValueError where
        it is longer than block_size. Besides:

        packing: compute and return those of a Packing alone, (M, C); see `pack`.
        cache (B, n_layer, 2, H, S, C/H): keys and values of S tokens; those of `tokens`, the last
        T, are written there. Where text goes on, position (B, T) says at which place each of
        `tokens` stands, and visible (B, 1, T, S) which of the S it may look at.
        """
        T = tokens.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}: "
                             "truncate the text or build a larger model")
        if position is None:
            position = torch.arange(T, device=tokens.device)
        if packing:
            tokens = tokens.flatten()[packing.kept]  # (M,)
            position = packing.kept % T
        x = self.wte(tokens) + self.wpe(position)
        caches = [None] * len(self.h) if cache is None else cache.unbind(1)
        # Mixed precision for the blocks only: a log-ratio is a small difference of long sums, and
        # bfloat16 rounds logits from 8 to 16 to 1/16.
        dtype = getattr(torch, self.config.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            for block, past in zip(self.h, caches):
                if self.config.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(block, x, packing, past, visible, use_reentrant=False)
                else:
                    x = block(x, packing, past, visible)
        return self.ln_f(x)

    def hidden_at(self, tokens, response_mask, asked, group):
        """forward's hidden states (R, C) at the positions of `asked` (B, T) alone. Rows come in
        groups of `group` responses to one prompt, which is computed once."""
        packing = Packing(*[x.to(self.device) for x in pack(response_mask, asked, group)])
        hidden = self(tokens, packing)  # (M, C)
        return F.embedding(packing.where[asked], hidden)

    def score(self, tokens, response_mask, group=1):
        """(B, T), (B, T) -> (B,): the scalar at the last token of each response, which has one;
        float32. `group` as in sequence_logprob."""
        later = response_mask.flip(1).cumsum(1).flip(1)  # (B, T) response tokens from here on
        last = response_mask & (later == 1)
        hidden = self.hidden_at(tokens, response_mask, last, group)  # (B, C)
        return (hidden * self.score_head.weight).sum(1)

    def generate(self, prompts, uniforms, eos=None):
        """Sample K responses to each of N prompts, lists of token ids of any lengths. uniforms:
        (N, K, max_new_tokens) random numbers in [0, 1), all the chance there is.

        Returns tokens (N·K, T), response_mask (N·K, T), and logp (N·K,): each response's
        log-probability in nats under the policy that sampled it. A response ends with `eos`, which
        belongs to it, or is cut at max_new_tokens. Raises ValueError when a prompt leaves no room
        for that many tokens.
        """
        return sample_responses(self, prompts, uniforms, eos)


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
    logp = TokenLogprob.apply(hidden, model.wte.weight, tokens[row, column + 1])  # (R,)
    return logp.new_zeros(len(tokens)).index_add(0, row.to(logp.device), logp)


# ---- memory and speed of scoring: this section changes nothing of what is computed
class Packing(NamedTuple):
    """Which positions of a batch of text (B, T) are worth computing."""
    kept: torch.Tensor   # (M,) their indices in the flattened batch (B·T)
    where: torch.Tensor  # (B, T) which of the M holds a position's state; 0 where none is needed


def pack(response_mask, asked, group):
    """Packing of all that the states at `asked` (B, T) depend on, without padding, and with a
    prompt, what is before the response, once in `group` rows. The masks are on the CPU.

    Prompt p q, group 2, asked where a next token is predicted:
        p q c d      kept: p q c of the first row, d of neither, e f of the second row: 5 of 10
        p q e f g    where: 0 1 2 0 0 and 0 1 3 4 0
    """
    here = torch.arange(asked.numel()).view(asked.shape)  # (B, T)
    in_lead = here[::group].repeat_interleave(group, dim=0)  # the same, in the group's first row
    place = torch.where(response_mask.cumsum(1) > 0, here, in_lead)
    needed = asked.flip(1).cumsum(1).flip(1) > 0  # up to the last one asked
    # all others become position 0, which no needed one looks at there: they come later
    return Packing(*torch.unique(place * needed, return_inverse=True))


SPAN = 2048  # tokens of the vocabulary whose logits stay in a CPU's cache
TILE = 2 ** (24 if torch.cuda.is_available() else 21)  # logits of a tile; likewise


def logit_tiles(hidden, weight):
    """Yield slices of the rows of hidden (R, C) and of the vocabulary, and their logits."""
    size = TILE // SPAN
    for first in range(0, len(weight), SPAN):
        span = slice(first, first + SPAN)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            tile = hidden.new_empty(len(hidden[rows]), len(weight[span]))
            yield rows, span, torch.mm(hidden[rows], weight[span].T, out=tile)  # without autocast


class TokenLogprob(torch.autograd.Function):
    """ln p(target) (R,) under softmax(hidden·weightᵀ): hidden (R, C), weight (V, C), targets (R,);
    0 where a target is below 0. It has one derivative, and is exact under a caller's autocast.

    No more than two tiles of logits exist at a time; the backward pass computes them again, which
    is faster than fresh memory for all.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        log_z = hidden.new_full(targets.shape, float("-inf"))
        for rows, _, logits in logit_tiles(hidden, weight):
            log_z[rows] = log_z[rows].logaddexp(logits.logsumexp(1))
        ctx.save_for_backward(hidden, weight, targets, log_z)
        logp = (hidden * weight[targets.clamp(min=0)]).sum(1) - log_z
        return logp.where(targets >= 0, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # (R,); ∂ ln p(target)/∂ logits = onehot − p
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad = grad.where(targets >= 0, 0)
        targets = targets.clamp(min=0)
        scaled = grad[:, None] * hidden
        d_hidden = weight[targets]
        d_weight = torch.zeros_like(weight).index_add_(0, targets, scaled)
        for rows, span, logits in logit_tiles(hidden, weight):
            p = logits.sub_(log_z[rows, None]).exp_()
            d_hidden[rows].addmm_(p, weight[span], alpha=-1)
            d_weight[span].addmm_(p.T, scaled[rows], alpha=-1)
        return grad[:, None] * d_hidden, d_weight, None


# ---- sampling
ASK_EVERY = 4  # tokens


@torch.no_grad()
def sample_responses(model, prompts, uniforms, eos):
    """GPT.generate. A row is a response, and A of the N·K are still computed."""
    N, K, max_new_tokens = uniforms.shape
    if N != len(prompts):
        raise ValueError(f"uniforms {tuple(uniforms.shape)} for {len(prompts)} prompts; "
                         "(N, K, max_new_tokens) for N prompts is expected")
    tokens, position, visible, hidden, cache = prefill(model, prompts, K, max_new_tokens)
    longest = tokens.size(1) - max_new_tokens
    response_mask = torch.zeros_like(tokens, dtype=torch.bool)  # (N·K, T)
    logp = torch.zeros_like(hidden[:, 0])  # (N·K,)
    uniforms = uniforms.flatten(0, 1).to(model.device)  # (N·K, max_new_tokens)
    index = torch.arange(N * K, device=model.device)[:, None]  # (A, 1) which response a row is
    active = torch.ones_like(index, dtype=torch.bool)  # (A, 1) it has not ended yet
    weight = model.wte.weight
    buffer = weight.new_zeros(N * K, -(-len(weight) // DRAWN) * DRAWN)
    for step in range(max_new_tokens):
        if step > 0:
            seen = longest + step  # tokens in the cache, the newest one included
            hidden = model(new, position=position, cache=cache[..., :seen, :],
                           visible=visible[..., :seen])[:, 0]  # (A, C)
            position = position + 1
        new, new_logp = sample_token(hidden, weight, uniforms[index, step], buffer)  # (A, 1)
        tokens[index, position] = new * active
        response_mask[index, position] = active
        logp[index] += new_logp * active
        active = active & (new != eos)  # eos None: never ends
        if step % ASK_EVERY == 0:  # how many are left: the host waits for the device
            left = int(active.sum())
            if left == 0:
                break
            if left < 0.75 * len(active):  # ended responses leave the cache
                rows = index, position, visible, cache, new, active
                index, position, visible, cache, new, active = [x[active[:, 0]] for x in rows]
    used = int(response_mask.any(0).nonzero().max()) + 1
    return tokens[:, :used], response_mask[:, :used], logp


def prefill(model, prompts, K, max_new_tokens):
    """One pass over N prompts, lists of token ids, then a row for each of their K responses:

    tokens (N·K, T) with room for the response, position (N·K, 1) where it begins, visible (N·K, 1,
    1, T), hidden (N·K, C) at the prompt's last token, and the cache (N·K, n_layer, 2, H, T, C/H).
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
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    tokens = F.pad(tokens, (0, max_new_tokens))  # (N, T)
    visible = F.pad(torch.arange(longest) < lengths, (0, max_new_tokens), value=True)  # (N, T)
    N, T = tokens.shape
    shape = N, config.n_layer, 2, config.n_head, T, config.n_embd // config.n_head
    cache = torch.zeros(shape, dtype=getattr(torch, config.dtype), device=model.device)
    hidden = model(tokens[:, :longest].to(model.device), cache=cache[..., :longest, :])
    hidden = hidden[torch.arange(N), lengths[:, 0] - 1]  # (N, C)
    rows = tokens, lengths, visible[:, None, None], hidden, cache
    return [x.to(model.device).repeat_interleave(K, dim=0) for x in rows]


def sample_token(hidden, weight, u, buffer):
    """Inverse-CDF sampling from softmax(hidden·weightᵀ): hidden (A, C), weight (V, C), u (A, 1) ->
    token ids (A, 1) and their log-probabilities (A, 1), exact to float32's rounding.

    buffer (A or more, V rounded up to whole spans) is the memory to work in, zero behind V. u picks
    a span of the vocabulary by the spans' sums, and a token within the span: one cumulative sum
    over all of it would take longer than the rest.
    """
    A, V = len(hidden), len(weight)
    p = torch.mm(hidden, weight.T, out=buffer[:A, :V])
    p.sub_(p.amax(1, keepdim=True)).exp_()
    spans = buffer[:A].view(A, -1, DRAWN)
    span, rest, log_p = invert_cdf(spans.sum(2), u)
    i, _, log_p_in_span = invert_cdf(spans[torch.arange(A, device=u.device), span[:, 0]], rest)
    return span * DRAWN + i, log_p + log_p_in_span


DRAWN = 256  # tokens of a span, about as many as there are spans
LEAST = 1e-30  # u = 0 must not draw a token whose probability underflowed


def invert_cdf(p, u):
    """Where u (A, 1) from 0 to 1 falls in the CDF of p (A, n), unnormalised: the index (A, 1), how
    much of its p lies below u, from 0 to 1 (uniform again, for a next level), and ln of its share
    of the sum."""
    cdf = p.cumsum(1)
    total = cdf[:, -1:]
    goal = (u * total).clamp(min=LEAST)
    i = torch.searchsorted(cdf, goal)
    mass = p.gather(1, i)
    return i, (goal - cdf.gather(1, i)) / mass + 1, (mass / total).log()


# ---- files: what a run keeps
def to_checkpoint(model):
    """Configuration and weights, as `save` takes and `load` returns them; on a CPU the weights are
    the model's own, not a copy."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return {"config": asdict(model.config), "weights": weights}


def from_checkpoint(saved, device="cpu"):
    """The model, with a copy of the weights: training it leaves `saved`."""
    try:
        return assemble(saved["config"], saved["weights"]).to(device)
    except Exception as error:  # a damaged file raises half a dozen kinds
        raise ValueError(
            f"{saved.get('path', 'checkpoint')}: not a model that this program saved "
            f"({in_one_line(error)}); make it again with --from its stage") from None


def assemble(config, weights):
    """A model that owns its weights; sizes are checked before memory is asked for."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**config))
    model.load_state_dict(weights, assign=True)
    return copy.deepcopy(model)


def in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def load(path, remedy):
    """A dict of tensors and plain values, on the CPU, and its "path". Raises ValueError with the
    remedy where the file is missing, damaged or no such dict."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["path"] = path  # for errors
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: missing or damaged ({type(error).__name__}); {remedy}") from None
    return saved


def save(saved, path):
    replace_file(path, lambda file: torch.save(saved, file))


def replace_file(path, put):
    """put(file) writes a file that is there as a whole or not at all: until then the old one stays,
    also where the run is killed meanwhile or the disk is full. A link is followed; a pipe or a
    device is written as it is. Under torchrun its first process writes, and the others do not.
    Raises OSError where it cannot be written."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    whole = part = path
    if not os.path.exists(path) or os.path.isfile(path):
        whole = os.path.realpath(path)
        part = f"{whole}.tmp"
    try:
        with open(part, "wb") as file:
            put(file)
            file.flush()
            if part != whole:
                os.fsync(file.fileno())
                os.replace(part, whole)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as the latter
        if part != whole and os.path.exists(part):
            os.remove(part)
        raise OSError(
            f"{path}: cannot be written ({in_one_line(error)}); earlier files are kept; make room "
            "(or mend the path), then run it again, train.py with --resume") from None


# ---- files: GPT-2's published layout, a folder of config.json and weights
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}  # theirs: ours
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
         "n_inner": None, "tie_word_embeddings": True, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) there
MASKS = (".attn.bias", ".attn.masked_bias")  # left out
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"U8": torch.uint8, "BOOL": torch.bool}  # these two of the masks


def read_published(folder):
    """GPT.from_pretrained."""
    try:
        with open(f"{folder}/config.json", encoding="utf-8") as file:
            theirs = json.load(file)
        for what, value in FIXED.items():
            if theirs.get(what, value) != value:
                raise ValueError(f"{what} is {theirs[what]}, not {value}")
        weights = {}
        for path in weight_files(folder):
            for name, tensor in read_tensors(path).items():
                if name.endswith(MASKS):
                    continue
                dtype = getattr(tensor, "dtype", type(tensor).__name__)
                if dtype not in FLOATS.values() or not tensor.isfinite().all():
                    raise ValueError(f"{name} is of {dtype}, or not finite: finite numbers of "
                                     "float32, float16 or bfloat16 are expected")
                if name.endswith(TRANSPOSED):
                    tensor = tensor.t().contiguous()
                weights[name.removeprefix("transformer.")] = tensor.float()
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(weights.setdefault("wte.weight", head), head):
            raise ValueError("lm_head.weight is not the embedding, wte.weight, to which it is tied")
        return assemble({ours: theirs[name] for name, ours in SIZES.items()}, weights)
    except Exception as error:  # a damaged file raises a dozen kinds
        raise ValueError(
            f"{folder}: not a GPT-2 as published ({in_one_line(error)}); expected config.json with "
            "model.safetensors or pytorch_model.bin, or with the shards that its index names"
        ) from None


def weight_files(folder):
    """The first that is there, as Transformers chooses; of an index the shards that it names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.exists(f"{folder}/{name}"):
            return [f"{folder}/{name}"]
        if os.path.exists(f"{folder}/{name}.index.json"):
            with open(f"{folder}/{name}.index.json", encoding="utf-8") as file:
                shards = json.load(file)["weight_map"].values()
            return [f"{folder}/{shard}" for shard in set(shards)]
    raise ValueError("no weights")


def read_tensors(path):
    """{name: tensor} of a file. safetensors: the header's length in 8 bytes, the header as JSON,
    then raw bytes, of one tensor after the other."""
    if path.endswith(".bin"):
        return torch.load(path, map_location="cpu", weights_only=True)
    raw = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)  # mapped, not read
    start = 8 + raw[:8].view(torch.int64).item()
    header = json.loads(raw[8:start].numpy().tobytes())
    body = raw[start:]
    header.pop("__metadata__", None)
    tensors = {}
    last = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES or begin != last:
            raise ValueError(f"{name} is {entry}: expected one of {', '.join(DTYPES)}, from {last}")
        last = end
        content = body[begin:end].clone()  # aligned; the next line checks its size
        tensors[name] = content.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def export(model, folder, files={}):
    """Write a policy so that `from_pretrained`, ours and Transformers', loads it, and files {name:
    text} with it, such as `data.tokenizer_files`."""
    open_export(folder)
    end = model.config.vocab_size - 1
    config = {theirs: getattr(model.config, ours) for theirs, ours in SIZES.items()}
    config |= FIXED | {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end,
                       "eos_token_id": end, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    weights = to_checkpoint(model)["weights"]
    for name in weights:
        if name.endswith(TRANSPOSED):
            weights[name] = weights[name].t()
    for name, text in {**files, "config.json": json.dumps(config)}.items():
        replace_file(f"{folder}/{name}", lambda file: file.write(text.encode()))
    save(weights, f"{folder}/pytorch_model.bin")


def open_export(folder):
    """Make a folder for `export`; OSError where it cannot be, ValueError where nothing can be
    written, or where it holds something else, which would be read with it."""
    os.makedirs(folder, exist_ok=True)
    others = set(os.listdir(folder)) - {
        "config.json", "pytorch_model.bin", "vocab.json", "merges.txt"}
    if others or not os.access(folder, os.W_OK):
        raise ValueError(
            f"{folder}: read-only, or holds {sorted(others)}; empty it, or export elsewhere")
