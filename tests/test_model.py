import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, sample_token, from_checkpoint, load, save, sequence_logprob, to_checkpoint

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


def uniforms(B, T, seed=1):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed))


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
            expected, expected_logp = naive_generate(model, prompt, chance[row], 5)
            lengths.append(len(expected) - len(prompt))
            assert tokens[row, :len(expected)].tolist() == expected
            assert mask[row].nonzero().flatten().tolist() == list(range(len(prompt), len(expected)))
            assert logp[row].item() == pytest.approx(expected_logp, abs=1e-4)
    assert min(lengths) < 5 and len(set(lengths)) > 2  # responses did end early, at different times


def test_responses_that_end_free_their_rows_of_the_cache(monkeypatch):
    model = small()
    sizes = []
    for name in ("prefill", "decode"):
        real = getattr(GPT, name)
        monkeypatch.setattr(GPT, name, lambda self, t, *a, real=real: sizes.append(len(t)) or real(self, t, *a))
    model.generate(PROMPTS, uniforms(len(PROMPTS), 12), eos=0)
    assert sizes[0] == len(PROMPTS) and sizes[-1] < 0.75 * len(PROMPTS)
    assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 12


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


def test_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for u, choice in ((0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.59, 2), (0.61, 3), (1.0, 3)):
        new, logp = sample_token(p.log()[None] + 5.0, torch.tensor([u]))
        assert new.tolist() == [choice] and logp.item() == pytest.approx(p[choice].log().item(), abs=1e-6)


def test_a_prefilled_cache_and_one_decoded_token_are_the_whole_sequence():
    model, tokens = small(), torch.randint(11, (3, 8))
    with torch.no_grad():
        expected = model(tokens)
        hidden, cache = model.prefill(tokens[:, :5], 8)
        assert torch.allclose(hidden, expected[:, :5], atol=1e-5, rtol=0)
        for t in (5, 6, 7):
            visible = torch.ones(3, t + 1, dtype=torch.bool)
            hidden = model.decode(tokens[:, t], cache, torch.full((3,), t), visible)
            assert torch.allclose(hidden, expected[:, t], atol=1e-4, rtol=0)


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
    model, shapes, logits = small(), [], GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, hidden: shapes.append(tuple(hidden.shape)) or logits(self, hidden))
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


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="n_embd=10 must be a multiple of n_head=3"):
        GPT(GPTConfig(n_embd=10, n_head=3))


def test_logits_stay_float32_under_autocast():
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.h[0].mlp(torch.randn(1, 3, 16))
        assert hidden.dtype == torch.bfloat16  # the trunk is in half precision
        assert model.logits(hidden).dtype == torch.float32
        logp = sequence_logprob(model, torch.randint(11, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    assert logp.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_own_autocast_is_the_arithmetic_of_its_blocks_alone(dtype):
    model, scorer = small(dtype=dtype), small(dtype=dtype, score_head=True)
    tokens, mask = torch.randint(11, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    with model.autocast():
        assert model.h[0].mlp(torch.randn(1, 3, 16)).dtype == getattr(torch, dtype)
        assert model.logits(model(tokens)).dtype == torch.float32
        assert sequence_logprob(model, tokens, mask).dtype == torch.float32
        assert scorer.score(tokens, mask).dtype == torch.float32
    assert model.h[0].mlp(torch.randn(1, 3, 16)).dtype == torch.float32
