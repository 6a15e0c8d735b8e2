import copy
import inspect
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import text_batch
from data import load, save
from model import (GPT, LOGITS, SIZES, Block, GPTConfig, add_adapters, export, from_checkpoint, merge, pack, prefill,
                   sample_token, sequence_logprob, to_checkpoint, token_logprob)

PROMPTS = [[1 + (7 * i + 3 * t * t) % 10 for t in range(1 + i % 5)] for i in range(32)]  # 32 rows, lengths 1 to 5


def small(seed=0, sharp=12.0, **changes):
    """A random model whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=11, block_size=24, n_layer=2, n_head=2, n_embd=16), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(sharp)
    return model.eval()


def uniforms(N, T, seed=1, K=1):
    return torch.rand(N, K, T, generator=torch.Generator().manual_seed(seed))


def naive_generate(model, prompt, chance, eos):
    """One prompt, no cache, no batch, no padding: the whole sequence is run again for every token."""
    tokens, logp = list(prompt), 0.0
    for u in chance.tolist():
        logits = F.linear(model(torch.tensor([tokens]))[0, -1], model.wte.weight)
        p, cumulative, choice = logits.softmax(dim=0), 0.0, 0
        for choice in range(len(p)):
            cumulative += p[choice].item()
            if u < cumulative:
                break
        tokens.append(choice)
        logp += math.log(p[choice].item())
        if choice == eos:
            break
    return tokens, logp


def test_cached_batched_sampling_equals_uncached_one_by_one():
    model, chance = small(sharp=12.0), uniforms(len(PROMPTS), 10, seed=3)
    tokens, mask, logp = model.generate(PROMPTS, chance, eos=5)
    lengths = []
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            expected, expected_logp = naive_generate(model, prompt, chance[row, 0], 5)
            lengths.append(len(expected) - len(prompt))
            assert tokens[row, :len(expected)].tolist() == expected
            assert mask[row].nonzero().flatten().tolist() == list(range(len(prompt), len(expected)))
            assert logp[row].item() == pytest.approx(expected_logp, abs=1e-4)
    assert min(lengths) < 5 and len(set(lengths)) > 2  # responses did end early, at different times


def test_responses_that_end_free_their_rows_of_the_cache(monkeypatch):
    model = small()
    sizes, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, t, *how, **more: sizes.append(len(t)) or forward(self, t, *how, **more))
    model.generate(PROMPTS, uniforms(len(PROMPTS), 12), eos=0)
    assert sizes[0] == len(PROMPTS) and sizes[-1] < 0.75 * len(PROMPTS)
    assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 12
    drops = [step for step in range(1, len(sizes)) if sizes[step] < sizes[step - 1]]
    assert drops and all((b - a) % 4 == 0 for a, b in zip(drops, drops[1:]))  # it seldom waits for the device


def test_sampling_computes_no_padding_of_prompts():
    model, rows = small(), []
    model.h[0].mlp.register_forward_hook(lambda block, given, y: rows.append(y.shape[:-1].numel()))
    model.generate(PROMPTS, uniforms(len(PROMPTS), 3))
    assert len(set(map(len, PROMPTS))) > 1
    assert rows == [sum(map(len, PROMPTS)), len(PROMPTS), len(PROMPTS)]


@pytest.mark.parametrize("eos", [None, 0])
def test_sampled_logp_is_the_sequence_logprob(eos):
    model = small()
    tokens, mask, logp = model.generate(PROMPTS, uniforms(len(PROMPTS), 12), eos=eos)
    with torch.no_grad():
        assert torch.allclose(logp, sequence_logprob(model, tokens, mask), atol=1e-4, rtol=0)


def test_response_ends_with_eos_or_at_the_limit():
    tokens, mask, _ = small().generate(PROMPTS, uniforms(len(PROMPTS), 6), eos=0)
    for row, prompt in enumerate(PROMPTS):
        response = tokens[row][mask[row]].tolist()
        assert tokens[row, :len(prompt)].tolist() == prompt
        assert 0 not in response[:-1] and (response[-1] == 0 or len(response) == 6)


def test_the_uniforms_fix_the_sample_and_no_generator_is_touched():
    model = small()
    state = torch.get_rng_state()
    first, second, other = (model.generate(PROMPTS, uniforms(len(PROMPTS), 8, seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_response_depends_on_its_own_uniforms_alone():
    """Whatever else is in the batch, and in which order."""
    model, chance = small(), uniforms(len(PROMPTS), 8)
    tokens, mask, logp = model.generate(PROMPTS, chance, eos=0)
    for order in ([2, 0], [*reversed(range(len(PROMPTS)))]):
        some, some_mask, some_logp = model.generate([PROMPTS[i] for i in order], chance[order], eos=0)
        for row, i in enumerate(order):
            assert some[row][some_mask[row]].tolist() == tokens[i][mask[i]].tolist()
            assert some_logp[row].item() == pytest.approx(logp[i].item(), abs=1e-4)


def test_sampling_frequencies_are_the_softmax_of_the_logits():
    model, count = small(vocab_size=5, sharp=6.0), 20000
    tokens, mask, _ = model.generate([[1, 2]] * count, uniforms(count, 1))
    p = F.linear(model(torch.tensor([[1, 2]]))[0, -1], model.wte.weight).softmax(dim=0)
    seen = tokens[mask].bincount(minlength=5)
    chi_square = ((seen - count * p) ** 2 / (count * p)).sum().item()
    assert p.min() > 0.001 and p.max() - p.min() > 0.1  # a test of something: not uniform, nothing absent
    assert chi_square < 18.5  # the 99.9 % point of 4 degrees of freedom


def test_k_samples_of_a_prompt_are_those_of_k_calls():
    model, K = small(), 3
    chance = uniforms(len(PROMPTS), 9, K=K)
    tokens, mask, logp = model.generate(PROMPTS, chance, eos=0)
    assert tokens.shape[0] == mask.shape[0] == len(logp) == K * len(PROMPTS)
    for k in range(K):
        one, one_mask, one_logp = model.generate(PROMPTS, chance[:, k:k + 1], eos=0)
        for n, prompt in enumerate(PROMPTS):
            row = n * K + k
            assert tokens[row, :len(prompt)].tolist() == prompt
            assert tokens[row][mask[row]].tolist() == one[n][one_mask[n]].tolist()
            assert logp[row].item() == pytest.approx(one_logp[n].item(), abs=1e-4)
    assert not torch.equal(tokens[0::K], tokens[1::K])


def draw(logits, u):
    """sample_token on these logits (V,), which one channel hands through as they are, for each u."""
    u = torch.as_tensor(u, dtype=torch.float32)[:, None]
    new, logp = sample_token(torch.ones(len(u), 1), logits[:, None].float(), u)
    assert new.shape == logp.shape == u.shape and new.dtype == torch.long
    return new[:, 0], logp[:, 0]


def check_draw(logits, u):
    """Against the inverse CDF in float64: u lies within the drawn token's interval, to float32's rounding of a CDF."""
    new, logp = draw(logits, u)
    exact = logits.double().log_softmax(dim=0)
    cdf = exact.exp().cumsum(dim=0)
    u = torch.as_tensor(u, dtype=torch.float64)
    # of a CDF, of logits this large, and of a sum of this many
    rounding = 2 ** -24 * (8 + 4 * logits.abs().max().item() + len(logits) ** 0.5)
    assert (u <= cdf[new] + rounding).all() and (u >= cdf[new] - exact[new].exp() - rounding).all()
    assert (exact[new].exp() > 0).all()
    assert torch.allclose(logp.double(), exact[new], atol=rounding, rtol=2 ** -22)  # and of a logarithm this large
    return new


LAST = 1 - 2 ** -24  # the largest float32 below one


@pytest.mark.parametrize("size", [1, 5, 23, 257, 50257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_sample_token_is_the_inverse_cdf(size, scale):
    chance = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(size, generator=chance)
    u = torch.rand(200, generator=chance)
    u[:2] = torch.tensor([0.0, LAST])
    new = check_draw(logits, u)
    assert new[1] == size - 1 or scale > 0
    expected = torch.searchsorted(logits.double().softmax(dim=0).cumsum(dim=0), u.double(), right=True)
    assert (new == expected.clamp(max=size - 1)).float().mean() > 0.98  # but for what falls on an edge


@pytest.mark.parametrize("top", [1e4, -1e4])
def test_sample_token_at_extreme_logits(top):
    for logits in (torch.full((11,), top), torch.tensor([-1e4] * 3 + [1e4] * 2 + [-1e4] * 6),
                   torch.tensor([top, -top] * 5 + [top]), top + torch.linspace(0, 1, 11)):
        new = check_draw(logits, [0.0, 0.25, 0.5, 0.75, LAST])
        assert logits[new].isfinite().all()


@pytest.mark.parametrize("nothing", [-1e4, -200.0])
def test_a_token_without_probability_is_never_drawn(nothing):
    for alive in ([0], [11], [3, 4], [5, 10], [2, 6, 9]):
        logits = torch.full((12,), nothing)
        logits[alive] = torch.linspace(-1, 1, len(alive))
        new, logp = draw(logits, [0.0, 2 ** -24, 0.3, 0.7, LAST])
        assert set(new.tolist()) <= set(alive) and logp.isfinite().all()
        assert new[0] == alive[0] and new[-1] == alive[-1]


def test_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for u, choice in ((0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.59, 2), (0.61, 3), (1.0, 3)):
        new, logp = draw(p.log() + 5.0, [u])
        assert new.tolist() == [choice]
        assert logp.item() == pytest.approx(p[choice].log().item(), abs=2e-6)


def test_a_prefilled_cache_and_one_decoded_token_are_the_whole_sequence():
    """Two prompts of lengths 5 and 3, and two responses to each."""
    model, text = small(), torch.randint(11, (4, 8))
    text[1, :5], text[3, :3] = text[0, :5], text[2, :3]
    prompts = [text[0, :5].tolist(), text[2, :3].tolist()]
    with torch.no_grad():
        expected, row = model(text), torch.arange(4)[:, None]
        tokens, position, visible, hidden, cache = prefill(model, prompts, 2, 3)
        assert tokens.shape == (4, 8) and position.tolist() == [[5], [5], [3], [3]]
        assert all(torch.equal(tokens[i, :n], text[i, :n]) for i, n in enumerate(position))
        assert torch.allclose(hidden[:, None], expected[row, position - 1], atol=1e-5, rtol=0)
        for seen in range(6, 9):
            hidden = model(text[row, position], position=position, cache=cache[..., :seen, :], visible=visible[..., :seen])
            assert torch.allclose(hidden, expected[row, position], atol=1e-4, rtol=0)
            position = position + 1


def test_a_cache_may_take_several_tokens_at_once():
    model, text, T = small(), torch.randint(11, (3, 9)), 9
    with torch.no_grad():
        expected = model(text)
        cache = torch.zeros(3, 2, 2, 2, T, 8)
        model(text[:, :4], cache=cache[..., :4, :])
        visible = torch.ones(T, T, dtype=torch.bool).tril()[None, None, 4:]
        hidden = model(text[:, 4:], position=torch.arange(4, T), cache=cache, visible=visible)
        assert torch.allclose(hidden, expected[:, 4:], atol=1e-5, rtol=0)


def scored(hidden, weight, targets, upstream):
    """ln p by token_logprob, and its gradients."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = token_logprob(hidden, weight, targets)
    (logp * upstream).sum().backward()
    return logp.detach(), hidden.grad, weight.grad


def by_hand(hidden, weight, targets, upstream):
    """The same from the definition, in float64: ∂ ln p(target)/∂ logits = onehot − p."""
    hidden, weight, upstream = hidden.double(), weight.double(), upstream.double()
    p = (hidden @ weight.T).softmax(dim=1)
    row = torch.arange(len(targets))
    d_logits = (F.one_hot(targets, len(weight)) - p) * upstream[:, None]
    return p[row, targets].log(), d_logits @ weight, d_logits.T @ hidden


@pytest.mark.parametrize("vocabulary", [7, 64, 128, 201])
@pytest.mark.parametrize("logits", [1, 2 * 8 * 64, 10 ** 6])  # in slices of 64, of 128, or as a whole
def test_token_logprob_and_its_gradients_are_those_of_the_definition(logits, vocabulary, monkeypatch):
    monkeypatch.setattr("model.LOGITS", logits)
    hidden, weight = torch.randn(8, 4, dtype=torch.float64), torch.randn(vocabulary, 4, dtype=torch.float64)
    targets, upstream = torch.randint(vocabulary, (8,)), torch.randn(8, dtype=torch.float64)
    for got, right in zip(scored(hidden, weight, targets, upstream), by_hand(hidden, weight, targets, upstream)):
        assert torch.allclose(got, right, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda h, w: token_logprob(h, w, targets),
                                    (hidden.requires_grad_(), weight.requires_grad_()))


def test_token_logprob_in_float32_at_large_logits(monkeypatch):
    hidden, weight = 30 * torch.randn(40, 4), 30 * torch.randn(300, 4)  # logits to some thousands
    targets, upstream = torch.randint(300, (40,)), torch.randn(40)
    monkeypatch.setattr("model.LOGITS", 40 * 64)
    got = scored(hidden, weight, targets, upstream)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = -F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    top = (hidden @ weight.T).abs().max().item()
    for a, b in zip(got, (logp, *torch.autograd.grad(logp, (hidden, weight), upstream.double()))):
        assert a.isfinite().all()
        assert torch.allclose(a.double(), b, atol=1e-6 * top, rtol=1e-5)


def pasted():
    space = {}
    exec(f"import torch\nimport torch.nn.functional as F\nLOGITS = {LOGITS}\n" + inspect.getsource(token_logprob), space)
    return space["token_logprob"]


def test_token_logprob_runs_pasted_alone():
    hidden, weight, targets = torch.randn(9, 4), torch.randn(55, 4), torch.randint(55, (9,))
    logp = pasted()(hidden.requires_grad_(), weight.requires_grad_(), targets)
    logp.sum().backward()
    expected = (hidden @ weight.T).log_softmax(dim=1)[torch.arange(9), targets]  # the plain version
    assert torch.allclose(logp, expected, atol=1e-5, rtol=0)
    for leaf, gradient in zip((hidden, weight), torch.autograd.grad(expected.sum(), (hidden, weight))):
        assert torch.allclose(leaf.grad, gradient, atol=1e-5, rtol=0)


def test_a_pasted_log_probability_is_right_under_the_callers_autocast():
    hidden, weight = torch.randn(9, 64), torch.randn(300, 64)
    targets = torch.randint(300, (9,))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        logp = pasted()(*leaves, targets)
    logp.sum().backward()
    right = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = (right[0] @ right[1].T).log_softmax(dim=1)[torch.arange(9), targets]
    expected.sum().backward()
    assert logp.dtype == torch.float32 and torch.allclose(logp.double(), expected, atol=1e-4, rtol=0)
    for a, b in zip(leaves, right):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
                                    (torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_a_pasted_log_probability_takes_what_others_have(dtypes):
    """Under autocast hidden states come in 16 bits; so do whole models."""
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip((torch.randn(9, 64), torch.randn(300, 64)), dtypes)]
    targets = torch.randint(300, (9,))
    right = [x.detach().double().requires_grad_() for x in leaves]
    expected = (right[0] @ right[1].T).log_softmax(dim=1)[torch.arange(9), targets]
    expected.sum().backward()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logp = pasted()(*leaves, targets)
        assert logp.dtype in (torch.float32, torch.float64) and torch.allclose(logp.double(), expected, atol=1e-4, rtol=0)
        for a, b in zip(torch.autograd.grad(logp.sum(), leaves), right):
            assert torch.allclose(a.double(), b.grad, atol=0.02 * b.grad.abs().max(), rtol=0.01)


def test_a_pasted_log_probability_has_a_right_second_derivative():
    hidden, weight, targets = torch.randn(3, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64), torch.tensor([1, 2, 3])
    assert torch.autograd.gradgradcheck(lambda h, w: pasted()(h, w, targets), (hidden.requires_grad_(), weight.requires_grad_()))


def test_targets_that_are_no_tokens_are_refused():
    """-100, say, which elsewhere means that a target does not count."""
    with pytest.raises(IndexError):
        pasted()(torch.randn(2, 4), torch.randn(7, 4), torch.tensor([3, -100]))


def test_no_response_tokens_are_no_problem(monkeypatch):
    monkeypatch.setattr("model.LOGITS", 1)
    model = small()
    logp = sequence_logprob(model, torch.randint(11, (2, 5)), torch.zeros(2, 5, dtype=torch.bool))
    logp.sum().backward()
    assert logp.tolist() == [0.0, 0.0] and model.wte.weight.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""
    size = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


def test_the_logits_of_a_whole_batch_never_exist(monkeypatch):
    model = small(vocab_size=1000, sharp=3.0)
    tokens, mask = torch.randint(1000, (4, 17)), torch.ones(4, 17, dtype=torch.bool)
    sizes, gradients = [], []
    for logits in (10 ** 6, 10 ** 4):
        monkeypatch.setattr("model.LOGITS", logits)
        model.zero_grad()
        with Largest() as forward:
            loss = sequence_logprob(model, tokens, mask).sum()
        with Largest() as backward:
            loss.backward()
        sizes.append((forward.size, backward.size))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert sizes[0] == (64 * 1000, 64 * 1000)  # this test sees them where they do exist
    assert max(sizes[1]) == 1000 * 16  # the output weights; a slice is smaller
    assert torch.allclose(*gradients, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_activations_change_neither_loss_nor_gradients(dtype, monkeypatch):
    results, calls, forward = [], [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a, **how: calls.append(1) or forward(self, *a, **how))
    tokens, mask = torch.randint(11, (3, 12)), torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 4:10] = True
    for checkpointed in (False, True):
        model = small(sharp=3.0, dtype=dtype, checkpoint_activations=checkpointed)
        calls.clear()
        loss = sequence_logprob(model, tokens, mask).sum()
        loss.backward()
        assert len(calls) == (4 if checkpointed else 2)  # it did compute the two blocks again
        results.append((loss.detach(), *[p.grad for p in model.parameters()]))
        calls.clear()
        with torch.no_grad():
            model(tokens)
        assert len(calls) == 2
        assert torch.equal(model.generate(PROMPTS, uniforms(len(PROMPTS), 4))[0],
                           small(sharp=3.0, dtype=dtype).generate(PROMPTS, uniforms(len(PROMPTS), 4))[0])
    assert results[0][1].norm() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def grouped(group=3):
    """Groups of three rows that share a prompt of 1 to 4 tokens; junk after each response, which may have a hole."""
    tokens, mask = torch.randint(11, (12, 13)), torch.zeros(12, 13, dtype=torch.bool)
    for row in range(12):
        start = 1 + row // 3
        tokens[row, :start] = tokens[row // 3 * 3, :start]
        mask[row, start:start + 2 + 3 * row % 7] = True
    mask[0] = False  # the first of its group has no response at all
    mask[4, 4] = False  # a position in the middle of a response that does not count
    return tokens, mask


@pytest.mark.parametrize("dtype, checkpointed", [("float32", False), ("float32", True), ("bfloat16", False)])
def test_a_prompt_that_rows_share_is_computed_once_and_nothing_else_changes(dtype, checkpointed):
    """Log-probabilities and all gradients against the whole batch, row by row and position by position, by PyTorch's own
    cross entropy."""
    tokens, mask = grouped()
    upstream = torch.randn(12)
    model = small(sharp=2.0, dtype=dtype, checkpoint_activations=checkpointed)
    logp = sequence_logprob(model, tokens, mask, 3)
    (logp * upstream).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    plain = small(sharp=2.0, dtype=dtype)
    logits = F.linear(plain(tokens), plain.wte.weight)[:, :-1]
    every = -F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    expected = (every * mask[:, 1:]).sum(dim=1)
    (expected * upstream).sum().backward()
    right = torch.cat([p.grad.flatten() for p in plain.parameters()])
    close = 1e-5 if dtype == "float32" else 0.05
    assert expected.abs().max() > 5 and right.norm() > 1
    assert torch.allclose(logp, expected, atol=close * 10, rtol=close)
    assert (gradients - right).norm() < close * right.norm()


def test_what_is_computed_is_each_prompt_once_and_what_a_response_token_follows():
    tokens, mask = grouped()
    asked = F.pad(mask[:, 1:], (0, 1))
    first, where = pack(mask, asked, 3)
    places = set()
    for row in range(12):
        positions = asked[row].nonzero().flatten().tolist()
        for t in range(positions[-1] + 1 if positions else 0):
            lead = row // 3 * 3 if not mask[row, :t + 1].any() else row
            places.add((lead, t))
            assert divmod(first[where[row, t]].item(), 13) == (lead, t)
    assert {divmod(place, 13) for place in first.tolist()} - {(0, 0)} == places - {(0, 0)}
    assert len(first) < 0.5 * tokens.numel()


def test_a_shared_prompt_does_not_change_a_score():
    tokens, mask = grouped()
    mask[0, 1] = mask[4, 4] = True  # a score is read at a response's last token
    model = small(score_head=True)
    with torch.no_grad():
        last = (mask * torch.arange(13)).amax(dim=1)
        expected = model(tokens)[torch.arange(12), last] @ model.score_head.weight[0]
        assert torch.allclose(model.score(tokens, mask, 3), expected, atol=1e-5, rtol=0)
        assert torch.allclose(model.score(tokens, mask), expected, atol=1e-5, rtol=0)


def test_sequence_logprob_equals_a_naive_loop():
    model = small()
    tokens = torch.randint(11, (6, 12))
    mask = torch.zeros(6, 12, dtype=torch.bool)
    for row, (start, end) in enumerate([(1, 12), (3, 4), (5, 9), (1, 2), (11, 12), (2, 11)]):
        mask[row, start:end] = True
    with torch.no_grad():
        got = sequence_logprob(model, tokens, mask)
        for row in range(6):
            expected = 0.0
            for t in mask[row].nonzero().flatten().tolist():
                logits = F.linear(model(tokens[row:row + 1, :t])[0, -1], model.wte.weight)
                expected += logits.log_softmax(dim=0)[tokens[row, t]].item()
            assert got[row].item() == pytest.approx(expected, abs=1e-4)


def test_sequence_logprobs_of_all_responses_sum_to_one():
    model = small(vocab_size=4)
    responses = [(0,)] + [(a, b) for a in range(1, 4) for b in range(4)]  # ended by 0, or cut at two tokens
    tokens = torch.tensor([[2, 3, *y] + [0] * (2 - len(y)) for y in responses])
    mask = torch.tensor([[False, False] + [True] * len(y) + [False] * (2 - len(y)) for y in responses])
    assert sequence_logprob(model, tokens, mask).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_padding_never_changes_a_log_probability():
    model = small()
    tokens, mask, _ = model.generate(PROMPTS, uniforms(len(PROMPTS), 8, 2), eos=0)
    junk = torch.randint(11, (len(PROMPTS), 7))
    padded = torch.cat([tokens, junk], dim=1), torch.cat([mask, torch.zeros_like(junk, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        together, wider = sequence_logprob(model, tokens, mask), sequence_logprob(model, *padded)
        alone = [sequence_logprob(model, tokens[i:i + 1, :n], mask[i:i + 1, :n]).item()
                 for i, n in enumerate((1 + row.nonzero().max()).item() for row in mask)]
    assert torch.allclose(together, wider, atol=1e-5, rtol=0)
    assert torch.allclose(together, torch.tensor(alone), atol=1e-5, rtol=0)


def test_only_response_positions_reach_the_output_layer(monkeypatch):
    model, shapes = small(), []
    monkeypatch.setattr("model.token_logprob", lambda hidden, *a: shapes.append(tuple(hidden.shape)) or token_logprob(hidden, *a))
    tokens, mask = torch.randint(11, (4, 20)), torch.zeros(4, 20, dtype=torch.bool)
    mask[0, 15:18] = mask[2, 19:] = True
    logp = sequence_logprob(model, tokens, mask)
    assert shapes == [(4, 16)]  # three and one response tokens, 16 channels
    assert logp[1].item() == logp[3].item() == 0.0  # an empty response is certain


def test_sequence_logprob_is_differentiable_and_its_gradient_ignores_padding():
    model = small(sharp=3.0)
    tokens, mask = torch.randint(11, (2, 8)), torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:6] = True
    gradients = []
    for width in (6, 8):
        model.zero_grad()
        sequence_logprob(model, tokens[:, :width], mask[:, :width]).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0.1
    assert torch.allclose(*gradients, atol=1e-4, rtol=0)


def test_forward_equals_a_naive_gpt2_in_float64():
    model = small(sharp=4.0).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and gains away from 0 and 1
    w, tokens, (H, C) = dict(model.named_parameters()), torch.randint(11, (1, 7))[0], (2, 16)

    def norm(x, name):
        centred = x - x.mean()
        return centred / ((centred ** 2).mean() + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    x = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(tokens)]
    for i in range(2):
        qkv = [linear(norm(v, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").view(3, H, C // H) for v in x]
        for t in range(len(x)):
            heads = []
            for head in range(H):
                q, past = qkv[t][0, head], range(t + 1)
                weight = torch.stack([q @ qkv[s][1, head] / math.sqrt(C // H) for s in past]).softmax(dim=0)
                heads.append(sum(weight[s] * qkv[s][2, head] for s in past))
            x[t] = x[t] + linear(torch.cat(heads), f"h.{i}.attn.c_proj")
        x = [v + linear(gelu(linear(norm(v, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj") for v in x]
    expected = torch.stack([norm(v, "ln_f") for v in x])
    assert torch.allclose(model(tokens[None])[0], expected, atol=1e-10, rtol=0)


def test_the_default_configuration_has_as_many_parameters_as_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808  # GPT-2 small, its output layer tied


def test_the_scale_of_the_initial_weights_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=64))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].attn.c_attn.bias.abs().max() == 0 and (model.ln_f.weight == 1).all()


def test_score_reads_the_responses_last_token():
    model = small(score_head=True)
    tokens, mask = torch.randint(11, (3, 10)), torch.zeros(3, 10, dtype=torch.bool)
    ends = [9, 4, 6]
    for row, end in enumerate(ends):
        mask[row, 2:end + 1] = True
    with torch.no_grad():
        score = model.score(tokens, mask)
        for row, end in enumerate(ends):
            expected = model(tokens[row:row + 1, :end + 1])[0, -1] @ model.score_head.weight[0]
            assert score[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_padding_never_changes_a_score():
    model = small(score_head=True)
    tokens, mask = torch.randint(11, (3, 10)), torch.zeros(3, 10, dtype=torch.bool)
    mask[:, 3:7] = True
    changed = tokens.clone()
    changed[:, 7:] = torch.randint(11, (3, 3))
    with torch.no_grad():
        score = model.score(tokens, mask)
        assert torch.allclose(score, model.score(tokens[:, :7], mask[:, :7]), atol=1e-5, rtol=0)
        assert torch.allclose(score, model.score(changed, mask), atol=1e-5, rtol=0)
        assert not torch.allclose(score, model.score(tokens.flip(0), mask), atol=1e-2)


def test_checkpoint_round_trip_holds_only_weights(tmp_path):
    model = small(score_head=True)
    save(to_checkpoint(model), str(tmp_path / "model.pt"))
    copy = from_checkpoint(load(str(tmp_path / "model.pt"), "make it again"))
    assert copy.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]  # nothing half-written is left


def test_a_missing_or_damaged_checkpoint_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "model.pt"
    for spoil in (lambda: None, lambda: path.write_bytes(b""), lambda: path.write_bytes(b"no checkpoint"),
                  lambda: (save(to_checkpoint(small()), str(path)), path.write_bytes(path.read_bytes()[:500])),
                  lambda: torch.save(small(), path)):  # a pickle of code is not read
        spoil()
        with pytest.raises(ValueError) as error:
            load(str(path), "make it again")
        message = str(error.value)
        assert message.startswith(f"{path}: missing or damaged") and message.endswith("; make it again")
        assert "\n" not in message


@pytest.mark.parametrize("prompts, named", [([[1] * 20], "20"), ([[1], []], "shortest 0")])
def test_generate_refuses_in_one_line_that_names_the_value(prompts, named):
    with pytest.raises(ValueError) as error:
        small().generate(prompts, uniforms(len(prompts), 5))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_the_longest_prompt_that_fits_is_accepted():
    tokens, mask, _ = small().generate([[1] * 19, [2]], uniforms(2, 5))
    assert tokens.shape == (2, 24) and mask.sum(dim=1).tolist() == [5, 5]


def test_models_of_one_checkpoint_share_no_weights():
    saved = to_checkpoint(small())
    first, second = from_checkpoint(saved), from_checkpoint(saved)
    with torch.no_grad():
        first.wte.weight += 1
    assert not torch.equal(first.wte.weight, second.wte.weight)
    assert torch.equal(second.wte.weight, saved["weights"]["wte.weight"])


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit block_size=24"):
        small()(torch.zeros(1, 25, dtype=torch.long))


def exact_logprob(model, hidden, tokens):
    """The sum over all tokens but the first, in float64, from the hidden states as they are."""
    logp = (hidden[:, :-1].double() @ model.wte.weight.double().T).log_softmax(dim=2)
    return logp.gather(2, tokens[:, 1:, None]).sum(dim=(1, 2))


def test_logits_stay_float32_under_autocast():
    model = small()
    tokens, mask = torch.randint(11, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.h[0].mlp(torch.randn(1, 3, 16)).dtype == torch.bfloat16  # the trunk is in half precision
        logp, hidden = sequence_logprob(model, tokens, mask), model(tokens)
    assert logp.dtype == torch.float32
    assert torch.allclose(logp.double(), exact_logprob(model, hidden, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_precision_is_the_arithmetic_of_the_blocks_alone(dtype):
    model, scorer = small(dtype=dtype), small(dtype=dtype, score_head=True)
    tokens, mask = torch.randint(11, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    inside, across = [], []
    for block in model.h:
        block.mlp.register_forward_hook(lambda mlp, given, out: inside.append(out.dtype))
        block.register_forward_hook(lambda block, given, out: across.append(out.dtype))
    with torch.no_grad():
        logp, hidden = sequence_logprob(model, tokens, mask), model(tokens)
        assert logp.dtype == hidden.dtype == torch.float32
        assert torch.allclose(logp.double(), exact_logprob(model, hidden, tokens), atol=1e-4, rtol=0)
        assert scorer.score(tokens, mask).dtype == torch.float32
        assert set(inside) == {getattr(torch, dtype)} and set(across) == {torch.float32}
        assert model.h[0].mlp(torch.randn(1, 3, 16)).dtype == torch.float32  # and it ends with the forward pass


def test_sampling_in_bfloat16_rounds_each_weight_once():
    """Not for every token: that is more memory traffic, and more launches of a GPU, than the products themselves."""
    class Roundings(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
                self.count[args[0].data_ptr()] += 1
            return func(*args, **(kwargs or {}))

    model = small(dtype="bfloat16")
    prompts, uniforms = [[1, 2], [3]], torch.rand(2, 2, 6)
    with Roundings() as roundings:
        model.generate(prompts, uniforms)
    weights = {p.data_ptr() for name, p in model.h.named_parameters() if "ln" not in name}
    assert {roundings.count[w] for w in weights} == {2}  # one pass over the prompts, and one for all tokens


def test_generate_in_bfloat16_samples_from_float32_logits():
    """Its first token's log-probability is that of the hidden state which bfloat16 blocks gave."""
    model, chance = small(dtype="bfloat16"), uniforms(len(PROMPTS), 1)
    tokens, mask, logp = model.generate(PROMPTS, chance)
    assert logp.dtype == torch.float32
    with torch.no_grad():
        _, _, _, hidden, cache = prefill(model, PROMPTS, 1, 1)
    assert hidden.dtype == torch.float32 and cache.dtype == torch.bfloat16
    exact = (hidden.double() @ model.wte.weight.double().T).log_softmax(dim=1)
    assert torch.allclose(logp.double(), exact.gather(1, tokens[mask][:, None])[:, 0], atol=1e-4, rtol=0)


# ---- adapters
FAMILIES = {
    "gpt2": {},
    "llama": dict(family="llama", rope={"rope_theta": 1e4}, n_kv_head=1, tied=False),
    "qwen2": dict(family="qwen2", rope={"rope_theta": 1e4}),
    "qwen3": dict(family="qwen3", rope={"rope_theta": 1e4}, head_dim=4)}


def adapted(family, moved=0.3, **changes):
    """A model with adapters that have moved, and the plain one of the same frozen weights."""
    plain = small(sharp=3.0, **FAMILIES[family], **changes)
    model = copy.deepcopy(plain)
    model.config = replace(model.config, lora=3)
    add_adapters(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p += moved * torch.randn_like(p) / 4
    return model, plain


def whole_batch():
    return text_batch([[1, 2, 3]] * 2 + [[4, 5]] * 2, [[6, 7, 0], [8, 0], [9, 3, 4, 0], [2, 0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_the_model_that_they_adapt_bit_for_bit(family):
    model, plain = adapted(family, moved=0.0)
    batch = whole_batch()
    assert torch.equal(sequence_logprob(model, *batch, 2), sequence_logprob(plain, *batch, 2))
    names = [name for name, _ in model.named_parameters()]
    assert names == list(model.state_dict()) and all("lora_" in name for name in names)
    linear = [name for name, x in plain.h.named_modules() if isinstance(x, torch.nn.Linear)]
    assert len(names) == 2 * len(linear) > 0
    assert sum(p.numel() for p in model.parameters()) == sum(
        3 * (x.in_features + x.out_features) for x in plain.h.modules() if isinstance(x, torch.nn.Linear))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters_are_those_through_merged_weights(family):
    """By autograd through W + B·A in the place of W, in float64."""
    model, plain = adapted(family)
    model, plain = model.double(), plain.double()
    batch = whole_batch()
    adapters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    merged_weights = dict(plain.state_dict())
    for name, a in adapters.items():
        if name.endswith("lora_A"):
            layer = name.removesuffix("lora_A")
            merged_weights[layer + "weight"] = plain.get_parameter(layer + "weight") + adapters[layer + "lora_B"] @ a

    class Run(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain

        def forward(self, *given):
            return sequence_logprob(self.plain, *given)
    call = {"plain." + name: x for name, x in merged_weights.items()}
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    expected = torch.func.functional_call(Run(), call, (*batch, 2))
    (upstream * expected).sum().backward()
    found = sequence_logprob(model, *batch, 2)
    (upstream * found).sum().backward()
    assert (found - expected).abs().max() < 1e-9
    assert (found - sequence_logprob(plain, *batch, 2)).abs().max() > 1e-3  # they do change it
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, adapters[name].grad, atol=1e-6, rtol=1e-6)
    assert all(x.grad is None for x in model.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_say_what_they_said(family):
    model, plain = adapted(family)
    batch = whole_batch()
    before = sequence_logprob(model, *batch, 2)
    weights = merge(model)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    assert (sequence_logprob(plain, *batch, 2) - before).abs().max() < 1e-4
    assert (sequence_logprob(model, *batch, 2) - before).abs().max() < 1e-4  # whose adapters are 0 now
    assert merge(plain).keys() == plain.state_dict().keys()  # without adapters: what there is


def test_models_with_adapters_share_the_frozen_weights_of_reference_pt_and_nothing_else(tmp_path):
    model, _ = adapted("llama", moved=0.0)
    frozen = {name: x.bfloat16() if x.dim() == 2 and name[0] == "h" else x for name, x in merge(model).items()}
    save({**to_checkpoint(model), "frozen": frozen}, tmp_path / "reference.pt")
    saved = load(tmp_path / "reference.pt", "")
    assert (tmp_path / "reference.pt").stat().st_size < 60_000
    saved.pop("frozen")
    one, other = from_checkpoint(saved), from_checkpoint(saved)
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(one.buffers(), other.buffers(), strict=True))
    assert not any(x.data_ptr() == y.data_ptr() for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert one.h[0].mlp.up_proj.weight.dtype == torch.bfloat16 and one.wte.weight.dtype == torch.float32
    assert {x.dtype for x in one.parameters()} == {torch.float32}
    one.config = other.config = replace(one.config, dtype="bfloat16")
    batch = whole_batch()
    reference = sequence_logprob(other, *batch, 2)
    optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
    for _ in range(3):
        sequence_logprob(one, *batch, 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (sequence_logprob(one, *batch, 2) - reference).abs().max() > 1e-2
    assert torch.equal(sequence_logprob(other, *batch, 2), reference)  # π_ref is where it was, bit for bit
    judge = from_checkpoint({**saved, "config": {**saved["config"], "score_head": True, "dtype": "bfloat16"},
                             "weights": {**saved["weights"], "score_head.weight": torch.ones(1, 16)}})
    assert "score_head.weight" in dict(judge.named_parameters()) and len(judge.score(*batch)) == 4
    save({**to_checkpoint(one), "frozen": {name: 2 * x for name, x in frozen.items()}}, tmp_path / "reference.pt")
    assert not torch.equal(from_checkpoint(saved).wte.weight, other.wte.weight)  # the file as it is now
    with pytest.raises(ValueError, match="not a model that this program saved"):
        from_checkpoint({**saved, "path": tmp_path / "elsewhere" / "mocan.pt"})


# ---- GPT-2's published layout
def random_model(dtypes={}, **changes):
    """Random in every parameter, biases and gains too; `dtypes` rounds those whose name ends so."""
    model = small(sharp=6.0, **changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p)
            for end, dtype in dtypes.items():
                if name.endswith(end):
                    p.copy_(p.to(dtype).float())
    return model


ROUNDED = {"c_fc.weight": torch.float16, "c_proj.weight": torch.bfloat16, "wte.weight": torch.float16,
           "ln_1.bias": torch.bfloat16}
THEIR_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
               torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8", torch.complex64: "C64"}


def published(model, prefix="", dtypes={}):
    """{name: tensor} as GPT-2's files have them: projections (in, out), causal masks, the tied output layer."""
    tensors = {}
    for name, p in model.state_dict().items():
        for end, dtype in dtypes.items():
            if name.endswith(end):
                p = p.to(dtype)
        if p.dim() == 2 and not name.startswith(("wte", "wpe")):
            p = p.T
        tensors[prefix + name] = p.contiguous()
    T = model.config.block_size
    for i in range(model.config.n_layer):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].clone()
    return tensors


def parts(tensors):
    """A safetensors file's header, as an object, and its content."""
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": THEIR_DTYPE[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
    return header, content


def put(path, header, content, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little", signed=True) + header + content)


def put_config(folder, model, **changes):
    c = model.config
    config = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
              "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size, "n_layer": c.n_layer,
              "n_head": c.n_head, "n_embd": c.n_embd, "resid_pdrop": 0.1, "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def same_model(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert x.dtype == torch.float32 and x.is_contiguous() and torch.equal(x, y)
    tokens, mask = torch.randint(a.config.vocab_size, (4, 12)), torch.ones(4, 12, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(sequence_logprob(a, tokens, mask), sequence_logprob(b, tokens, mask))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtypes", [{}, ROUNDED])
@pytest.mark.parametrize("files", [["model.safetensors"], ["model-00001-of-00002.safetensors",
                                                           "model-00002-of-00002.safetensors"], ["pytorch_model.bin"]])
def test_a_folder_as_published_loads_and_is_the_model_whose_weights_it_holds(tmp_path, prefix, dtypes, files):
    model = random_model(dtypes)
    tensors = published(model, prefix, dtypes)
    put_config(tmp_path, model)
    if len(files) > 1:
        named = {name: files[i % len(files)] for i, name in enumerate(tensors)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    for i, file in enumerate(files):
        some = dict(list(tensors.items())[i::len(files)])
        if file.endswith(".bin"):
            torch.save(some, tmp_path / file)
        else:
            put(tmp_path / file, *parts(some))
    loaded = GPT.from_pretrained(str(tmp_path))
    same_model(loaded, model)
    assert loaded.config == model.config
    before = [(tmp_path / file).read_bytes() for file in files]
    with torch.no_grad():
        loaded.wte.weight += 1  # its own memory, not the file's
    assert before == [(tmp_path / file).read_bytes() for file in files]


@pytest.mark.parametrize("padding", range(8))
def test_the_header_may_have_any_length(tmp_path, padding):
    model = random_model()
    header, content = parts(published(model))
    put_config(tmp_path, model)
    put(tmp_path / "model.safetensors", json.dumps(header).encode() + b" " * padding, content)
    same_model(GPT.from_pretrained(str(tmp_path)), model)


@pytest.mark.parametrize("name", ["with space", "[1]", "a*b", "ümlaut", "what?"])
def test_a_folder_may_have_any_name(tmp_path, name):
    model = random_model()
    folder = tmp_path / name
    folder.mkdir()
    put_config(folder, model)
    put(folder / "model.safetensors", *parts(published(model)))
    same_model(GPT.from_pretrained(str(folder)), model)


def test_export_and_from_pretrained_are_the_identity(tmp_path):
    model = random_model(n_layer=3, n_head=4)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    export(model, str(tmp_path / "new" / "folder"))
    same_model(GPT.from_pretrained(str(tmp_path / "new" / "folder")), model)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())  # and leave the model alone
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("there", ["pytorch_model.bin", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                                   "pytorch_model.bin.index.json", "generation_config.json", "tokenizer.json", "notes.txt"])
def test_a_folder_that_holds_what_would_be_read_with_an_export_is_refused(tmp_path, there):
    old, new = random_model(), random_model(seed=1)
    export(old, str(tmp_path))
    export(new, str(tmp_path))  # onto its own
    same_model(GPT.from_pretrained(str(tmp_path)), new)
    (tmp_path / there).write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=re.escape(there)) as error:
        export(old, str(tmp_path))
    assert "\n" not in str(error.value) and before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_gpt2_of_other_settings_is_exported_with_them(tmp_path):
    model = random_model(tied=False, norm_eps=1e-3, n_inner=40)
    export(model, str(tmp_path))
    loaded = GPT.from_pretrained(str(tmp_path))
    same_model(loaded, model)
    assert loaded.config == model.config


def test_an_export_that_was_killed_can_be_repeated(tmp_path):
    (tmp_path / "model.safetensors.tmp").write_bytes(b"half")
    export(random_model(), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_exported_llama_has_no_dropout_either(tmp_path):
    export(small_llama(), str(tmp_path), {"config.json": json.dumps({"model_type": "llama", "attention_dropout": 0.1})})
    assert json.loads((tmp_path / "config.json").read_text())["attention_dropout"] == 0


def test_an_exported_configuration_has_its_ids_and_no_dropout(tmp_path):
    export(random_model(), str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == config["vocab_size"] - 1
    assert {name: x for name, x in config.items() if "pdrop" in name} == dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)


FILES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("there", [some for n in (1, 2, 3, 4) for some in itertools.combinations(range(4), n)])
def test_of_several_weights_in_a_folder_those_are_read_that_transformers_reads(tmp_path, there):
    """Each kind of file holds another model; besides, some that no one reads."""
    models = [random_model(seed=seed) for seed in range(4)]
    put_config(tmp_path, models[0])
    put(tmp_path / "model.fp16.safetensors", *parts(published(random_model(seed=9))))
    put(tmp_path / "model-00003-of-00003.safetensors", *parts(published(random_model(seed=9))))
    for i in there:
        tensors = published(models[i])
        if "index" not in FILES[i]:
            shards = {FILES[i]: tensors}
        else:
            ending = "bin" if "bin" in FILES[i] else "safetensors"
            shards = {f"{FILES[i].split('.')[0]}-0000{n}-of-00002.{ending}": dict(list(tensors.items())[n - 1::2]) for n in (1, 2)}
            named = {name: shard for shard, some in shards.items() for name in some}
            (tmp_path / FILES[i]).write_text(json.dumps({"weight_map": named}))
        for name, some in shards.items():
            if name.endswith(".bin"):
                torch.save(some, tmp_path / name)
            else:
                put(tmp_path / name, *parts(some))
    same_model(GPT.from_pretrained(str(tmp_path)), models[there[0]])


def test_the_output_layer_alone_is_the_embedding(tmp_path):
    model = random_model()
    tensors = published(model)
    tensors["lm_head.weight"] = tensors.pop("wte.weight")
    put_config(tmp_path, model)
    put(tmp_path / "model.safetensors", *parts(tensors))
    same_model(GPT.from_pretrained(str(tmp_path)), model)


def untied(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1


def spoiled(name, value):
    def spoil(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = value
    return spoil


def retyped(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def nested(tensors):
    inner = dict(tensors)
    tensors.clear()
    tensors["model"] = inner


LIES = {
    "an output layer of its own": (untied, "lm_head.weight is not the embedding"),
    "NaN": (spoiled("h.1.mlp.c_fc.weight", math.nan), "h.1.mlp.c_fc.weight .*finite"),
    "infinity": (spoiled("wpe.weight", -math.inf), "wpe.weight .*finite"),
    "NaN in the output layer": (spoiled("lm_head.weight", math.nan), "lm_head.weight .*finite"),
    "float64": (retyped("ln_f.bias", torch.float64), "ln_f.bias is .*expected"),
    "integers": (retyped("ln_f.bias", torch.int64), "ln_f.bias is .*expected"),
    "bytes": (retyped("ln_f.bias", torch.uint8), "ln_f.bias is .*expected"),
    "bool": (retyped("ln_f.bias", torch.bool), "ln_f.bias is .*expected"),
    "complex": (retyped("ln_f.bias", torch.complex64), "ln_f.bias is .*expected"),
    "one of it twice": (lambda tensors: tensors.update({"transformer.wte.weight": tensors["wte.weight"] + 1}), "wte.weight is .*there twice"),
    "a dictionary in it": (nested, "model is of .*dict.*expected"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("case", LIES)
def test_weights_that_lie_are_refused_by_name(tmp_path, file, case):
    spoil, said = LIES[case]
    model = random_model()
    tensors = published(model)
    put_config(tmp_path, model)
    spoil(tensors)
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    elif case == "a dictionary in it":
        pytest.skip("a safetensors file cannot hold one")
    else:
        put(tmp_path / file, *parts(tensors))
    with pytest.raises(ValueError, match=said) as error:
        GPT.from_pretrained(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: not a model as published (") and "\n" not in str(error.value)


def test_tensors_that_share_their_bytes_are_refused_by_name(tmp_path):
    model = random_model()
    header, content = parts(published(model))
    header["h.1.ln_1.weight"]["data_offsets"] = header["h.0.ln_1.weight"]["data_offsets"]
    put_config(tmp_path, model)
    put(tmp_path / "model.safetensors", header, content)
    with pytest.raises(ValueError, match="h.[01].ln_1.weight is .*expected"):
        GPT.from_pretrained(str(tmp_path))


class NotWeights:
    def __reduce__(self):
        return print, ("code of a pickle ran",)


FILE = "model.safetensors"
NESTED = b"[" * 200000 + b"]" * 200000


def entry(**changes):
    """Change what the header says of one tensor; `move` gets the offsets and the content's length."""
    def spoil(folder, header, content):
        one = dict(header["h.0.ln_1.weight"])
        if "move" in changes:
            one["data_offsets"] = changes["move"](*one["data_offsets"], len(content))
        one |= {key: value for key, value in changes.items() if key != "move"}
        put(folder / FILE, {**header, "h.0.ln_1.weight": one}, content)
    return spoil


def config(**changes):
    return lambda folder, header, content: put_config(folder, small(), **changes)


def length(n):
    return lambda folder, header, content: put(folder / FILE, header, content, n)


def head(raw):
    return lambda folder, header, content: put(folder / FILE, raw, content)


def cut(n):
    return lambda folder, header, content: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:n])


def text(raw):
    return lambda folder, header, content: (folder / "config.json").write_bytes(raw)


def pickled(thing):
    def spoil(folder, header, content):
        (folder / FILE).unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(thing) if isinstance(thing, bytes) else torch.save(thing, path)
    return spoil


def last_reversed(header):
    """Which asks for all bytes that are left, by a count of -1."""
    name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    begin, end = header[name]["data_offsets"]
    return {**header, name: {**header[name], "data_offsets": [begin, begin - 1]}}


HOSTILE = {
    "header length huge": length(2 ** 62), "header length largest": length(2 ** 63 - 1),
    "header length -1": length(-1), "header length smallest": length(-2 ** 63), "header length 0": length(0),
    "header length past the end": length(10 ** 6), "header length cut short": length(100),
    "empty": cut(0), "3 bytes": cut(3), "8 bytes": cut(8), "in the header": cut(200), "in the content": cut(-1),
    "not JSON": head(b"certainly not JSON"), "not UTF-8": head(b'{"\xff": 1}'), "a list": head(b"[1, 2]"),
    "a number": head(b"1"), "entries are numbers": head(b'{"wte.weight": 1}'), "empty header": head(b"{}"),
    "no offsets": head(b'{"wte.weight": {"dtype": "F32", "shape": [1]}}'), "deeply nested": head(NESTED),
    "offsets past the end": entry(move=lambda a, b, n: [n, n + b - a]),
    "offsets across the end": entry(move=lambda a, b, n: [n - 4, n - 4 + b - a]),
    "offsets reversed": entry(move=lambda a, b, n: [b, a]),
    "offsets negative": entry(move=lambda a, b, n: [a - b - 8, -8]),
    "offsets from before the content": entry(move=lambda a, b, n: [a - n, b - n]),
    "offsets beyond 64 bits": entry(move=lambda a, b, n: [10 ** 30, 10 ** 30 + b - a]),
    "offsets are text": entry(data_offsets=["0", "64"]), "offsets are none": entry(data_offsets=None),
    "three offsets": entry(data_offsets=[0, 64, 128]), "offsets are fractions": entry(data_offsets=[0.0, 64.0]),
    "shape larger": entry(shape=[17]), "shape smaller": entry(shape=[15]), "shape of other rank": entry(shape=[4, 4]),
    "shape beyond 64 bits": entry(shape=[10 ** 30]), "shape is text": entry(shape="16"), "no shape": entry(shape=None),
    "shape negative": entry(shape=[-16]), "unknown dtype": entry(dtype="F64"), "bytes for numbers": entry(dtype="I8"), "dtype is a list": entry(dtype=["F32"]),
    "tensor missing": lambda folder, header, content: put(
        folder / FILE, {name: x for name, x in header.items() if name != "h.1.ln_2.bias"}, content),
    "tensor too many": lambda folder, header, content: put(
        folder / FILE, {**header, "h.2.ln_2.bias": header["h.1.ln_2.bias"]}, content),
    "shard missing": lambda folder, header, content: put(
        folder / FILE, *parts(dict(list(published(small()).items())[::2]))),
    "a folder for a file": lambda folder, header, content: ((folder / FILE).unlink(), (folder / FILE).mkdir()),
    "no weights": lambda folder, header, content: (folder / FILE).unlink(),
    "no config": lambda folder, header, content: (folder / "config.json").unlink(),
    "other activation": config(activation_function="relu"), "other model": config(model_type="gpt_neo"),
    "other width": config(n_inner=100),
    "scores unscaled": config(scale_attn_weights=False), "cross-attention": config(add_cross_attention=True),
    "scores scaled by depth": config(scale_attn_by_inverse_layer_idx=True),
    "quantised": config(quantization_config={"bits": 4}), "other vocabulary": config(vocab_size=12),
    "other depth": config(n_layer=1), "other positions": config(n_positions=25), "no heads": config(n_head=0),
    "three heads": config(n_head=3), "negative heads": config(n_head=-2), "heads are text": config(n_head="2"),
    "heads are none": config(n_head=None),
    "positions are text": config(n_positions="24"), "epsilon is text": config(layer_norm_epsilon="1e-5"),
    "epsilon negative": config(layer_norm_epsilon=-10), "looks ahead": config(is_causal=False),
    "the last offsets reversed": lambda folder, header, content: put(folder / FILE, last_reversed(header), content),
    "layers are a fraction": config(n_layer=2.0), "negative width": config(n_embd=-16),
    "vocabulary beyond 64 bits": config(vocab_size=10 ** 30), "vocabulary huge": config(vocab_size=10 ** 15),
    "config not JSON": text(b"certainly not JSON"), "config empty": text(b""), "config not UTF-8": text(b"\xff\xfe"),
    "config a list": text(b"[]"), "config empty object": text(b"{}"), "config deeply nested": text(NESTED),
    "pickle of code": pickled(NotWeights()), "pickle of a module": pickled(small()), "pickle empty": pickled(b""),
    "pickle of junk": pickled(b"junk" * 100), "pickle of a list": pickled([torch.zeros(2)]),
    "pickle of a number": pickled(3), "pickle of numbers": pickled({"wte.weight": 1}),
    "pickle with other names": pickled({1: torch.zeros(2)}),
    "pickle truncated": lambda folder, header, content: (
        pickled(published(small()))(folder, header, content),
        (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-1000])),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_published_gpt2_is_refused_in_one_line(tmp_path, spoil, capfd):
    model = small()
    header, content = parts(published(model))
    put_config(tmp_path, model)
    put(tmp_path / FILE, header, content)
    same_model(GPT.from_pretrained(str(tmp_path)), model)
    spoil(tmp_path, header, content)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: not a model as published (") and "\n" not in message
    assert "code of a pickle ran" not in capfd.readouterr().out


def test_a_pointer_of_git_lfs_says_how_to_get_the_file(tmp_path):
    put_config(tmp_path, small())
    (tmp_path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n")
    with pytest.raises(ValueError, match="only a pointer to the file .git lfs pull."):
        GPT.from_pretrained(str(tmp_path))


def test_a_missing_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a model as published") as error:
        GPT.from_pretrained(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


# ---- and Transformers' reading of it
THEIR_SIZES = [dict(vocab_size=101, n_positions=32, n_layer=2, n_head=2, n_embd=32),
               dict(vocab_size=503, n_positions=64, n_layer=4, n_head=5, n_embd=80)]


def log_probabilities(logits):
    """Of every token, at every position: a stricter comparison than those of one text."""
    return logits.double().log_softmax(dim=-1)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
@pytest.mark.parametrize("sizes", THEIR_SIZES)
def test_what_transformers_saves_is_the_same_model_here(tmp_path, sizes, shards):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.2)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.05 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path, **shards)
    files = list(tmp_path.glob("model*.safetensors"))
    assert len(files) == 1 if not shards or sizes is THEIR_SIZES[0] else len(files) > 1
    ours = GPT.from_pretrained(str(tmp_path))
    tokens = torch.randint(sizes["vocab_size"], (3, sizes["n_positions"]))
    with torch.no_grad():
        expected = log_probabilities(theirs(tokens).logits)
        got = log_probabilities(F.linear(ours(tokens), ours.wte.weight))
        assert expected.std() > 0.5 and torch.allclose(got, expected, atol=1e-3, rtol=0)
        text = expected[:, :-1].gather(2, tokens[:, 1:, None]).sum(dim=(1, 2))
        logp = sequence_logprob(ours, tokens, torch.ones_like(tokens, dtype=torch.bool))
        assert torch.allclose(logp.double(), text, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sizes", THEIR_SIZES)
def test_what_is_exported_is_the_same_model_in_transformers(tmp_path, sizes):
    transformers = pytest.importorskip("transformers")
    ours = random_model(**{**{name: size for name, size in sizes.items() if name != "n_positions"},
                           "block_size": sizes["n_positions"]})
    export(ours, str(tmp_path))
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.randint(sizes["vocab_size"], (3, sizes["n_positions"]))
    with torch.no_grad():
        expected = log_probabilities(theirs.eval()(tokens).logits)
        got = log_probabilities(F.linear(ours(tokens), ours.wte.weight))
    assert expected.std() > 0.5 and torch.allclose(got, expected, atol=1e-3, rtol=0)


# ---- the Llama family
BASE = dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
              rope_theta=500000.0)
KINDS = {
    "llama": ("Llama", {}), "llama tied": ("Llama", dict(tie_word_embeddings=True)), "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama, wide heads": ("Llama", dict(head_dim=16)), "one head of keys": ("Llama", dict(num_key_value_heads=1)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)), "qwen2 untied": ("Qwen2", {}), "qwen3": ("Qwen3", dict(head_dim=16)),
}


def theirs_and_ours(folder, name, extra, head="ForCausalLM"):
    """A random model of Transformers', and what we read of its folder."""
    transformers = pytest.importorskip("transformers")
    sizes = BASE | extra
    if name == "GPT2":
        sizes = dict(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0) | extra
    torch.manual_seed(0)
    theirs = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(str(folder))


def text_of(T=70, start=10):
    tokens = torch.randint(1, 120, (4, T), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(4, T, dtype=torch.bool)
    mask[:, start:] = True
    return tokens, mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_is_transformers_model_in_scoring_sampling_and_export(tmp_path, kind):
    theirs, ours = theirs_and_ours(tmp_path, *KINDS[kind])
    tokens, mask = text_of()
    with torch.no_grad():
        logits = theirs(tokens).logits.log_softmax(dim=2)
        expected = logits[:, 9:-1].gather(2, tokens[:, 10:, None]).sum(dim=(1, 2))
        assert torch.allclose(sequence_logprob(ours, tokens, mask), expected, atol=1e-3, rtol=0)
        prompts = [tokens[0, :7].tolist(), tokens[1, :3].tolist(), tokens[2, :5].tolist()]
        drawn, response, logp = ours.generate(prompts, uniforms(3, 20, K=2), eos=[3, 4])
        logits = theirs(drawn).logits.log_softmax(dim=2)
        each = logits[:, :-1].gather(2, drawn[:, 1:, None])[..., 0] * response[:, 1:]
        assert torch.allclose(logp, each.sum(dim=1), atol=1e-3, rtol=0)
        ends = torch.isin(drawn, torch.tensor([3, 4])) & response
        assert ends.sum(dim=1).max() <= 1 and ends.any()  # either of them ends a response
    (tmp_path / "out").mkdir()
    export(ours, str(tmp_path / "out"), {"config.json": (tmp_path / "config.json").read_text()})
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(x, y) for x, y in zip(again.state_dict().values(), theirs.state_dict().values()))
    same_model(GPT.from_pretrained(str(tmp_path / "out")), ours)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen2"])
def test_a_published_classifier_gives_transformers_scores(tmp_path, name):
    theirs, ours = theirs_and_ours(tmp_path, name, dict(num_labels=1, pad_token_id=0), "ForSequenceClassification")
    tokens, mask = text_of()
    mask[2:, 60:] = False
    tokens[2:, 60:] = 0
    with torch.no_grad():
        expected = theirs(tokens).logits[:, 0]
        assert expected.std() > 0.01 and torch.allclose(ours.score(tokens, mask), expected, atol=1e-4, rtol=0)


def test_a_classifier_of_two_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size mismatch for score_head"):
        theirs_and_ours(tmp_path, "Llama", dict(num_labels=2), "ForSequenceClassification")


def small_llama(**changes):
    return small(**{**dict(family="llama", n_kv_head=1, n_inner=24, tied=False, sharp=3.0, rope={"rope_theta": 1e4}), **changes})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_shared_prompt_changes_nothing_in_a_llama(family):
    model = small_llama(family=family)
    tokens, mask = torch.randint(11, (6, 14)), torch.zeros(6, 14, dtype=torch.bool)
    tokens[:3, :5], tokens[3:, :2] = tokens[0, :5], tokens[3, :2]
    mask[:3, 5:12] = mask[3:, 2:9] = True
    results = []
    for group in (1, 3):
        model.zero_grad()
        loss = sequence_logprob(model, tokens, mask, group).sum()
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in model.parameters()]])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*results))


def test_the_golden_llama():
    """A tiny model of fixed weights; its log-probabilities were computed by Transformers 5.24 on the same weights."""
    theirs, values = golden()
    tokens, mask = torch.arange(24).view(2, 12) % 11, torch.ones(2, 12, dtype=torch.bool)
    assert torch.allclose(sequence_logprob(theirs, tokens, mask), torch.tensor(values), atol=1e-4, rtol=0)


def golden():
    model = small_llama(n_head=4, n_kv_head=2)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((torch.arange(p.numel()).view(p.shape) * (i + 1)).sin() * (1.0 if p.dim() == 1 else 0.3))
    return model, GOLDEN


GOLDEN = [-35.38618436496685, -35.79690920088278]


REFUSED = {
    "experts": dict(model_type="mixtral"), "sliding": dict(use_sliding_window=True), "quantised": dict(quantization_config={"bits": 4}),
    "tied by a word": dict(tie_word_embeddings="false"),
    "activation": dict(hidden_act="gelu"), "rope": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "older rope": dict(rope_scaling={"type": "linear", "factor": 4.0}), "new rope": dict(rope_parameters={"rope_type": "dynamic"}),
    "looks ahead": dict(is_causal=False), "biases": dict(attention_bias=True), "biases of the MLP": dict(mlp_bias=True),
}


WITHOUT_SENSE = {
    "no turns": dict(rope_theta=0), "layers that no memory holds": dict(num_hidden_layers=10**9),
    "negative epsilon": dict(rms_norm_eps=-9), "epsilon is text": dict(rms_norm_eps="1e-5"),
    "positions are text": dict(max_position_embeddings="64"), "positions are none": dict(max_position_embeddings=0),
    "rope lacks its factor": dict(rope_scaling={"rope_type": "llama3"})}


@pytest.mark.parametrize("case", WITHOUT_SENSE)
def test_settings_without_sense_are_refused_though_the_weights_fit(tmp_path, case):
    model = small_llama(n_head=2)
    config = json.dumps({**{theirs: getattr(model.config, ours) for theirs, ours in SIZES.items()}, **model.config.rope})
    export(model, str(tmp_path), {"config.json": config})
    same_model(GPT.from_pretrained(str(tmp_path)), model)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | WITHOUT_SENSE[case]))
    with pytest.raises(ValueError, match="not a model as published") as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_refused_by_name_before_memory_is_asked_for(tmp_path, case):
    config = dict(model_type="qwen2", rope_theta=1e4, rms_norm_eps=1e-6, **BASE) | REFUSED[case] | {"vocab_size": 10 ** 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = next(iter(REFUSED[case])).replace("rope_scaling", "rope_type").replace("rope_parameters", "rope_type")
    with pytest.raises(ValueError, match=f"{name} is .*covered") as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)
