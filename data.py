"""
data.py: where text comes from and how it becomes tensors.

1. Preference files: PKU-SafeRLHF's JSONL schema and HH-RLHF's transcripts, checked line by line.
2. The built-in world: a small assistant language with exact helpfulness r(x,y), harmlessness g_1 and politeness g_2.
   Either source yields a list of `Pair`s, so every later stage has a single path.
3. Tokens: one tokenizer and one chat template for training, sampling and evaluation alike.

`c`, here and below, is train.py's Config: the settings. Read next: dual.py.
"""

import base64
import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from typing import NamedTuple

import tiktoken
import torch


class Pair(NamedTuple):
    prompt: str
    responses: tuple  # (y_0, y_1)
    prefers: dict     # name -> index of the preferred response; "helpful" is the reward's, others are constraints'
    safe: tuple = ()  # (bool, bool) whether each response is safe, where the file says so


# ---- 1. preference files
def load_preferences(paths):
    """Read preference files: each of `paths` is FILE or NAME=FILE, JSONL or JSONL.gz, and every row is either

      PKU-SafeRLHF   prompt, response_0, response_1, better_response_id (helpful), safer_response_id (safe), and
                     optionally is_response_0_safe and is_response_1_safe; one of the two preferences may be absent;
      HH-RLHF        chosen, rejected: two transcripts "\\n\\nHuman: … \\n\\nAssistant: …" that share all but the last
                     reply. The file does not say which preference it holds: NAME=FILE does.

    With NAME=FILE a PKU row's better_response_id (NAME is helpful) or safer_response_id (any other NAME) is read as
    the preference NAME. Unknown fields are ignored. Returns list[Pair]; raises ValueError with file and line number.
    """
    pairs = []
    for spec in paths:
        name, _, path = spec.partition("=") if "=" in spec and not os.path.exists(spec) else ("", "", spec)
        try:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as lines:
                rows = [_read_row(line, name, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read as JSONL or JSONL.gz ({error}); check --data") from None
        if not rows:
            raise ValueError(f"{path}: no usable pair: no row at all; each needs better_response_id or safer_response_id "
                             "(0 or 1), or chosen and rejected")
        pairs += rows
    return pairs


def _read_row(line, name, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object ({error}); one object a line in UTF-8 is expected") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__} where a JSON object is expected")
    fields = ("chosen", "rejected") if "chosen" in row or "rejected" in row else ("prompt", "response_0", "response_1")
    for field in fields:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{where}: field {field!r} is {'missing' if field not in row else 'not a string'}; "
                             f"expected the strings {', '.join(fields)}")
    if fields[0] == "chosen":
        if not name:
            raise ValueError(f"{where}: chosen/rejected rows do not say which preference they hold; name it: "
                             f"--data helpful=FILE or --data safe=FILE")
        turn = "\n\nAssistant:"
        (prompt, _, chosen), (other, _, rejected) = (row[field].rpartition(turn) for field in fields)
        if not prompt or prompt != other:
            raise ValueError(f"{where}: chosen and rejected must be transcripts that differ only after the last "
                             f"{turn!r}; drop this line or fix it")
        return Pair(prompt.removeprefix("\n\nHuman:").strip(), (chosen.strip(), rejected.strip()), {name: 0})

    columns = {"helpful": "better_response_id", "safe": "safer_response_id"}
    if name:
        columns = {name: columns["helpful" if name == "helpful" else "safe"]}
    prefers = {preference: row[column] for preference, column in columns.items() if row.get(column) is not None}
    for preference, value in prefers.items():
        if isinstance(value, bool) or value not in (0, 1):
            raise ValueError(f"{where}: {columns[preference]} is {value!r}; expected 0 or 1")
    if not prefers:
        raise ValueError(f"{where}: no preference here; expected {' or '.join(columns.values())} to be 0 or 1")
    safe = tuple(row.get(f"is_response_{i}_safe") for i in (0, 1))
    if any(s is not None for s in safe) and not all(isinstance(s, bool) for s in safe):
        raise ValueError(f"{where}: is_response_0_safe, is_response_1_safe are {safe}; expected true or false for both")
    return Pair(row["prompt"].strip(), (row["response_0"].strip(), row["response_1"].strip()),
                {preference: int(value) for preference, value in prefers.items()}, () if None in safe else safe)


def split_prompts(pairs, held_out):
    """Split pairs into (train, held-out) so that no prompt is in both: every so many-th prompt in sorted order is held
    out, which gives both parts the same mix of prompts."""
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 3:
        raise ValueError(f"{len(prompts)} distinct prompts in the data; at least 3 are needed: 2 are held out, for intervals")
    out = set(spread(pairs, min(len(prompts) - 1, max(2, round(held_out * len(prompts))))))
    return [p for p in pairs if p.prompt not in out], [p for p in pairs if p.prompt in out]


def spread(pairs, count):
    """At most `count` distinct prompts, evenly spaced in sorted order."""
    prompts = sorted({pair.prompt for pair in pairs})
    count = min(count, len(prompts))
    return [prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)]


def load(c, rng):
    """The run's pairs, from its files or the built-in world -> (training, held-out, names of the constraints)."""
    pairs = load_preferences(c.data) if c.data else world_preferences(c.world_pairs, rng)
    train, held_out = split_prompts(pairs, c.held_out)
    known = list(dict.fromkeys(name for pair in pairs for name in pair.prefers))
    default = [name for name in known if name != "helpful"] if c.data else ["harmless"]
    names = c.constraints.split(",") if c.constraints else default
    if "helpful" in names or len(set(names)) < len(names):
        raise ValueError(f"--constraints {','.join(names)}: name each safety preference once; helpful is the reward")
    for name in ("helpful", *names):
        if not all(any(name in pair.prefers for pair in side) for side in (train, held_out)):
            raise ValueError(f"no preference {name!r} in both parts of the split; the data has {', '.join(known)}: add a "
                             "file that has it (--data NAME=FILE), or choose --constraints among these")
    if not names:
        raise ValueError("the data has no safety preference; add a file that has one (--data safe=FILE)")
    return train, held_out, names


# ---- 2. the built-in world
# A user asks how to do something; the assistant answers in sentences drawn from these lists. Half of the topics are
# risky: there, a tempting short cut is helpful and dangerous at once, which is the conflict the constraint is about.

TOPICS = {  # topic: (tasks, useful details, hazardous details)
    "baking": (("bake bread", "make a cake", "bake cookies", "make pizza dough", "bake an apple pie"),
               ("Weigh the flour first.", "Let the dough rest for an hour.", "Preheat the oven to 220 degrees.",
                "Cool it on a rack."), ()),
    "garden": (("grow tomatoes", "plant roses", "start a herb garden", "keep a lawn green", "prune an apple tree"),
               ("Choose a sunny spot.", "Water it early in the morning.", "Loosen the soil with a fork.",
                "Add compost every spring."), ()),
    "travel": (("plan a trip", "pack a small bag", "book a cheap train", "find a quiet beach", "visit a big museum"),
               ("Make a list the week before.", "Compare prices on a Tuesday.", "Take the first train of the day.",
                "Keep copies of your tickets."), ()),
    "cleaning": (("unclog a drain", "clean an old oven", "remove mold", "whiten the bathroom tiles", "scrub a pan"),
                 ("Soak it in hot water.", "Scrub with baking soda.", "Rinse it twice.", "Use an old toothbrush."),
                 ("Mix bleach with ammonia to make it stronger.", "Keep the windows shut so it works faster.",
                  "Pour pure acid on it.")),
    "repair": (("fix a lamp", "replace a wall socket", "repair a toaster", "wire a ceiling fan", "open an old radio"),
               ("Take a photo of the wires.", "Use a small screwdriver.", "Label each cable with tape.",
                "Test it with a meter."),
               ("Leave the power on to save time.", "Touch the bare wires to find the live one.",
                "Bypass the fuse with foil.")),
    "health": (("get rid of a headache", "sleep through the night", "treat a bad cough", "lose weight fast", "stay awake for an exam"),
               ("Drink plenty of water.", "Keep the room cool and dark.", "Take a walk in fresh air.",
                "Eat a light meal."),
               ("Double the dose of the pills.", "Wash it down with whisky.", "Stop eating for a week.")),
}
ASKS = ("How do I {}?", "What is the best way to {}?", "Can you tell me how to {}?", "I need to {}.", "Help me {}.")
WHENS = ("", " at home", " today", " for the first time", " on a budget", " with my sister", " before the weekend",
         " for my neighbor")
CAUTIONS = ("Be careful and wear gloves.", "Ask an expert if you are not sure.", "Safety comes first.")
POLITE = ("Happy to help!", "What a nice plan!", "Good luck!", "Let me know how it goes!")
RUDE = ("What a silly question.", "Figure it out yourself.", "Do not bother me again.")
WORLD_PROMPTS = [ask.format(task + when) for tasks, _, _ in TOPICS.values() for task in tasks for when in WHENS for ask in ASKS]


def _topic(prompt):
    return next((topic for topic in TOPICS.values() if any(task in prompt for task in topic[0])), ((), (), ()))


def _found(sentences, text):
    """How many of the sentences the text contains, each counted once."""
    return sum(sentence in text for sentence in sentences)


def helpfulness(prompt, response):
    """r(x,y): 0.9 for each useful detail on the prompt's topic, 0.6 for each hazardous one, −0.3 for each caution."""
    _, useful, hazardous = _topic(prompt)
    return 0.9 * _found(useful, response) + 0.6 * _found(hazardous, response) - 0.3 * _found(CAUTIONS, response)


def harmlessness(prompt, response):
    """g_1(x,y): −2 for each hazardous detail of any topic, +1 if there is a caution."""
    hazards = sum(_found(hazardous, response) for _, _, hazardous in TOPICS.values())
    return float(any(caution in response for caution in CAUTIONS) - 2 * hazards)


def politeness(prompt, response):
    """g_2(x,y): +1 for each polite phrase, −1 for each rude one, between −2 and 2."""
    return float(max(-2, min(2, _found(POLITE, response) - _found(RUDE, response))))


WORLD_SCORES = {"helpful": helpfulness, "harmless": harmlessness, "polite": politeness}


def write_response(prompt, rng):
    """The stochastic writer: a mixed bag of a good, a careless and a moody assistant."""
    _, useful, hazardous = _topic(prompt)
    body = rng.sample(useful, rng.choices((0, 1, 2, 3), (2, 3, 3, 2))[0])
    if hazardous:
        body += rng.sample(hazardous, rng.choices((0, 1, 2), (4, 4, 2))[0])
    body.sort(key=(useful + hazardous).index)  # advice has an order
    opening = rng.choices((POLITE[:2], RUDE[:2], ("",)), (4, 3, 3))[0]
    caution = CAUTIONS if rng.random() < (0.4 if hazardous else 0.2) else ("",)
    closing = rng.choices((POLITE[2:], RUDE[2:], ("",)), (3, 1, 6))[0]
    parts = [rng.choice(opening), *body, rng.choice(caution), rng.choice(closing)]
    return " ".join(part for part in parts if part) or "I do not know."


def world_preferences(count, rng):
    """`count` pairs of written responses, each preference drawn by Bradley–Terry from the exact score: P(y_1 ≻ y_0) =
    σ(s(y_1) − s(y_0)). The world's substitute for a file of human preferences, on the same scale as its scores."""
    pairs = []
    for _ in range(count):
        prompt = rng.choice(WORLD_PROMPTS)
        responses = (write_response(prompt, rng), write_response(prompt, rng))
        lead = {name: score(prompt, responses[1]) - score(prompt, responses[0]) for name, score in WORLD_SCORES.items()}
        pairs.append(Pair(prompt, responses, {name: int(rng.random() < 1 / (1 + math.exp(-x))) for name, x in lead.items()}))
    return pairs


# ---- 3. tokens

# tiktoken's split pattern for GPT-2, and the same for `re`, which lacks \p{L} and \p{N} (so it takes ½ for a letter).
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_RE = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


class Tokenizer(NamedTuple):
    """A tiktoken encoding and the chat template: `before` + prompt + `after` + response + `end`, all of them ids."""
    encoding: tiktoken.Encoding
    before: list
    after: list
    end: int


def vocab_tokenizer(pieces):
    """From a list of byte strings: 256 single bytes, then those pieces, then three special tokens of the template."""
    ranks = {bytes([i]): i for i in range(256)}
    for piece in pieces:
        ranks.setdefault(piece, len(ranks))
    n = len(ranks)
    special = {"<|user|>": n, "<|assistant|>": n + 1, "<|end|>": n + 2}
    return Tokenizer(tiktoken.Encoding("vocab", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special),
                     [n], [n + 1], n + 2)


def frequent_pieces(pairs, vocab_size):
    """The most frequent pieces of the pairs' text, most frequent first: what `vocab_tokenizer` is built from."""
    count = Counter(piece for pair in pairs for text in (pair.prompt, *pair.responses)
                    for piece in re.findall(SPLIT_RE, " " + text))
    ranked = sorted(count, key=lambda piece: (-count[piece], piece))
    return [piece.encode() for piece in ranked if len(piece.encode()) > 1][:vocab_size - 259]


def gpt2_tokenizer():
    """GPT-2's published byte-pair encoding. The template is plain text, since its one special token ends responses."""
    encoding = tiktoken.get_encoding("gpt2")
    return Tokenizer(encoding, encoding.encode_ordinary("\n\nHuman:"), encoding.encode_ordinary("\n\nAssistant:"),
                     encoding.eot_token)


def open_tokenizer(c, train, reuse):
    """The run's tokenizer; the vocab's pieces are kept in --out, so that a later run encodes as this one does."""
    if c.tokenizer == "gpt2":
        return gpt2_tokenizer()
    path = os.path.join(c.out, "tokenizer.json")
    if not reuse:
        with open(path, "w", encoding="utf-8") as file:
            json.dump([base64.b64encode(piece).decode() for piece in frequent_pieces(train, c.vocab_size)], file)
    try:
        with open(path, encoding="utf-8") as file:
            return vocab_tokenizer([base64.b64decode(piece) for piece in json.load(file)])
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{path}: missing or damaged; make it with --from reference") from None


def encode_prompts(tok, prompts, limit):
    """Prompts (str) -> token ids in the chat template, at most `limit` each: a longer prompt loses its beginning.
    Returns (list of B id lists, how many were truncated)."""
    room = max(0, limit - len(tok.before) - len(tok.after))
    ids = [tok.encoding.encode_ordinary(" " + prompt) for prompt in prompts]
    return [tok.before + x[max(0, len(x) - room):] + tok.after for x in ids], sum(len(x) > room for x in ids)


def encode_responses(tok, responses, limit):
    """Responses (str) -> token ids, each closed by `end`, at most `limit` each: a longer response loses its tail and
    its `end`, as in sampling. Returns (list of B id lists, how many were truncated)."""
    ids = [tok.encoding.encode_ordinary(" " + response) + [tok.end] for response in responses]
    return [x[:limit] for x in ids], sum(len(x) > limit for x in ids)


def pad(prompts, responses):
    """Lists of B prompt and B response id lists -> tokens (B, T), response_mask (B, T); see model.py."""
    T = max(len(x) + len(y) for x, y in zip(prompts, responses))
    tokens, mask = torch.zeros(len(prompts), T, dtype=torch.long), torch.zeros(len(prompts), T, dtype=torch.bool)
    for b, (x, y) in enumerate(zip(prompts, responses)):
        tokens[b, :len(x) + len(y)] = torch.tensor(x + y)
        mask[b, len(x):len(x) + len(y)] = True
    return tokens, mask


class Pool(NamedTuple):
    """K responses to each of N prompts, as tokens; preference pairs are a pool with K = 2."""
    tokens: torch.Tensor         # (N, K, T)
    response_mask: torch.Tensor  # (N, K, T)

    def lengths(self):
        """(N, K): the tokens of each row up to the response's end."""
        return self.response_mask.shape[2] - self.response_mask.flip(2).int().argmax(dim=2)


def pair_pool(tok, pairs, c, what):
    """Preference pairs -> Pool (N, 2, T). What does not fit block_size is truncated, counted and said."""
    limit = c.block_size - c.max_new_tokens
    prompts, cut = encode_prompts(tok, [p.prompt for p in pairs], limit)
    responses, cut_responses = encode_responses(tok, [y for p in pairs for y in p.responses], c.max_new_tokens)
    if cut or cut_responses:
        print(f"  {what}: {cut} of {len(prompts)} prompts lost their beginning (longer than {limit} tokens), "
              f"{cut_responses} of {len(responses)} responses their end (longer than {c.max_new_tokens})")
    tokens, mask = pad([x for x in prompts for _ in (0, 1)], responses)
    return Pool(tokens.view(len(pairs), 2, -1), mask.view(len(pairs), 2, -1))


def preference_tensors(tok, pairs, name, c):
    """The pairs with preference `name` -> Pool (N, 2, T), prefers (N,), safe (N, 2): +1, −1, 0 unlabelled or helpful."""
    pairs = [pair for pair in pairs if name in pair.prefers]
    safe = [[2.0 * s - 1 for s in pair.safe] if pair.safe and name != "helpful" else [0.0, 0.0] for pair in pairs]
    return pair_pool(tok, pairs, c, name), torch.tensor([pair.prefers[name] for pair in pairs]), torch.tensor(safe)


def decode(tok, tokens, response_mask):
    """(B, T), (B, T) -> B response texts, without the end token."""
    return [tok.encoding.decode([i for i in row[m].tolist() if i != tok.end]).strip()
            for row, m in zip(tokens.cpu(), response_mask.cpu())]
