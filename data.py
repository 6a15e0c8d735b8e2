"""
data.py: where text comes from, and how it becomes tensors.

1. Pairs, and pools: K responses to each of N prompts as padded tensors; preference pairs have
   K = 2.
2. Batches: groups of a prompt's responses; a random stream for each purpose.
3. Tokens: one tokenizer and one chat template for training, sampling and evaluation alike, made
   from the training text or read from a published model's folder.
4. Preference files: PKU-SafeRLHF's JSONL schema, and chosen/rejected rows, checked line by line.
5. The split: training, calibration and evaluation share no conversation.
6. The built-in world: a small assistant language with exact helpfulness r(x,y), harmlessness
   g_1(x,y) and politeness g_2(x,y). It yields the same `Pair`s as a file does.
7. Files of a run: written as a whole or not at all, read without running what they hold.

Shapes: N prompts, K responses to each, T tokens; P preference pairs; B prompts of a batch, G
responses of a group.

Read next: train.py, the whole job.
"""

import csv
import gzip
import itertools
import json
import os
import random
import re
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence


# ---- 1. pairs and pools
class Pair(NamedTuple):
    prompt: str       # or, of several turns, a tuple (user, assistant, …, user)
    responses: tuple  # (y_0, y_1)
    prefers: dict     # name -> index of the preferred response; "helpful" is the reward's


class Pool(NamedTuple):
    """K responses to each of N prompts, as tokens, on the CPU."""
    tokens: torch.Tensor         # (N, K, T) int32
    response_mask: torch.Tensor  # (N, K, T)

    @property
    def lengths(self):
        """(N, K): the tokens of each row up to the response's end."""
        return self.response_mask.int().argmax(2) + self.response_mask.sum(2)

    def texts(self, tok):
        """N·K response texts, without the end token, those of a prompt one after the other."""
        ended = torch.isin(self.tokens, torch.tensor(tok.ends))
        said = self.response_mask & ~ended & (self.tokens < tok.known)  # (N, K, T)
        rows = self.tokens[said].split(said.sum(2).flatten().tolist())
        return [tok.encoding.decode(row.tolist()).strip() for row in rows]


def pad(rows, K):
    """N·K rows (T,), each of its own T -> (N, K, T), padded with zeros on the right."""
    return pad_sequence(rows, batch_first=True).unflatten(0, (-1, K))


def pair_pool(tok, pairs, what):
    """Preference pairs -> Pool (N, 2, T); of a prompt alone both responses are empty."""
    responses = [y for pair in pairs for y in pair.responses]
    return text_pool(tok, [pair.prompt for pair in pairs], responses, what)


def text_pool(tok, prompts, responses, what):
    """N prompts and N·K responses -> Pool (N, K, T). What does not fit is truncated, counted and
    said."""
    K = len(responses) // len(prompts)
    prompts = encode_prompts(tok, prompts, what)
    texts, masks = [], []
    for i, y in enumerate(encode_responses(tok, responses, what)):
        x = prompts[i // K]
        texts.append(torch.tensor(x + y, dtype=torch.int32))
        masks.append(torch.arange(len(x + y)) >= len(x))
    return Pool(pad(texts, K), pad(masks, K))


# ---- 2. batches
def stream(*key):
    """A random stream of its own for each (seed, purpose, index): nothing depends on what was drawn
    before for something else, so a run can go on from anywhere."""
    seed = random.Random("/".join(map(str, key))).getrandbits(62)
    return torch.Generator().manual_seed(seed)


def uniforms(key, indices, K, T):
    """Numbers in [0, 1), (n, K, T), for the prompts of these n indices; those of a prompt's k-th
    response depend on the key, the index, k and T alone, not on what else is sampled with them."""
    return torch.stack([torch.rand(K, T, generator=stream(key, n)) for n in indices])


def group_batches(lengths, responses, group, key):
    """Yield batches forever: prompts n (B,), and for each a group k (B, G) of its K responses.

    lengths (N, K); G = group, B·G is about `responses`; a prompt's k are different; key: of the
    random stream. An epoch visits every prompt once, with a fresh group. It is shuffled, then
    sorted by length within stretches of 32 batches, so that little of a batch is padding.
    """
    size = max(1, responses // group)
    for epoch in itertools.count():
        generator = stream(key, epoch)
        k = torch.rand(lengths.shape, generator=generator).argsort(1)[:, :group]  # (N, G)
        longest = lengths.gather(1, k).amax(1)  # (N,)
        batches = []
        for stretch in torch.randperm(len(lengths), generator=generator).split(32 * size):
            batches += stretch[longest[stretch].argsort()].split(size)
        for i in torch.randperm(len(batches), generator=generator):
            n = batches[i]
            yield n, k[n]


def take(x, n, k, device):
    """Entries k (B, G) of prompts n (B,): x (N, K, …) -> (B, G, …), without waiting for the
    device."""
    x = x[n[:, None], k]
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def take_text(pool, n, k, device):
    """Responses k (B, G) to prompts n (B,) -> tokens, response_mask (B·G, T), T of the longest.
    The mask stays on the CPU, so that no one waits for the device to know how many it picks."""
    response_mask = pool.response_mask[n[:, None], k].flatten(0, 1)
    used = response_mask.any(0).nonzero().max() + 1
    tokens = take(pool.tokens[..., :used], n, k, device)  # (B, G, T)
    return tokens.flatten(0, 1), response_mask[:, :used]


# ---- 3. the tokenizer and the chat template
class Tokenizer(NamedTuple):
    """An encoding, the chat template, and how many tokens a prompt and a response may have.

    The template is `start`, then of every exchange `before` + prompt + `after` + response + `end` +
    `next`, all of them ids.
    """
    encoding: tiktoken.Encoding
    before: list
    after: list
    end: int
    ends: list  # any of these ends a response in sampling
    known: int  # ids from here on are no tokens of this encoding's
    prompt_limit: int
    response_limit: int
    start: list = []  # of every text: a system message, or one token
    next: list = []
    close: list = None  # behind a response in training and scoring; None: its end
    lead: str = " "  # in front of every text
    normal: str = ""  # Unicode's normal form; none: text as it is


# tiktoken's split pattern for GPT-2; the same where every digit stands alone; and the first for
# `re`, which lacks \p{L} and \p{N} (so it takes ½ for a letter).
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_DIGITS = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
SPLIT_RE = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
# Before a prompt and after it, of a base model, which has no tokens of a template: a transcript.
PLAIN = ("\n\nHuman:", "\n\nAssistant:")


def open_tokenizer(pieces, prompt_limit, response_limit):
    """256 single bytes, then those pieces of text, then the template's three special tokens; or,
    where pieces is None, GPT-2's byte-pair encoding, which tiktoken downloads once, in plain text.

    tiktoken looks a whole piece up before it merges anything: a frequent piece is one token, any
    other is merged from its bytes as far as these pieces allow.
    """
    if pieces is None:
        encoding = tiktoken.get_encoding("gpt2")
        before, after = map(encoding.encode_ordinary, PLAIN)
    else:
        ranks = {bytes([i]): i for i in range(256)}
        for piece in pieces:
            ranks.setdefault(piece.encode(), len(ranks))
        user = len(ranks)
        special = {"<|user|>": user, "<|assistant|>": user + 1, "<|end|>": user + 2}
        encoding = tiktoken.Encoding(
            "vocab", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
        before, after = [user], [user + 1]
    end = encoding.n_vocab - 1
    return Tokenizer(encoding, before, after, end, [end], end + 1, prompt_limit, response_limit)


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt")
RECOGNISED = {  # by what a chat template has, and what it must not have
    # none, or that of `with_template`
    "plain": r"\Z|\{\{ .*?\\n\\nHuman:' \+ ' ' \+ m\.content \+ '\\n\\nAssistant:'",
    "chatml": r"""(?sx)
        (?!.*(bos_token|eos_token|begin_of_text|im_sep|<think>|strftime|date_string))
        # a turn's end and its speaker are each followed by a new line, and by nothing else
        (?!.*<\|im_end\|>(?!['" +~]*(\n|\\n)))
        (?=.*<\|im_start\|>assistant(\n|\\n)['"{])
        .*(<\|im_start\|>user | role['"\])]*(\s*[+~]\s*['"] | \s*\}\}))(\n|\\n)""",
    "llama3": r"""(?sx)
        (?!.*(Cutting[ ]Knowledge|strftime|date_string))
        (?=.*(bos_token|begin_of_text))
        .*<\|start_header"""}
OWN_SYSTEM = r"""(?sx)
    (?:system(?:<\|end_header_id\|>)?(?:\n|\\n)+ | set[ ]\w*system\w*[ ]=[ ]['"])
    # as it stands in a string of the template, or is set there, and no expression in it
    ((?:(?!\{\{|\}\}|\{%|['"][ ]*[+~]).)+?)
    (?:<\|(?:im_end|eot_id)\|> | ['"][ ]-?%)"""
SPARE = itertools.count(256)
LETTERS = [  # by which tokenizer.json spells a byte: its own, if that can be seen
    chr(byte if byte > 32 and chr(byte).isprintable() else next(SPARE)) for byte in range(256)]
FIRST = r"'single': \[\{'SpecialToken': \{'id': '(.+?)'"  # with which every text begins
TEMPLATES = {  # the text before all, a system message, then Tokenizer's before, after, end, next
    "chatml": ("", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n",
               "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "llama3": ("<|begin_of_text|>",
               "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
               "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "")}


def published_files(folder):
    """{name: text} of what a published folder says of its tokenizer, and its config.json; of no
    folder, "", nothing."""
    files = {}
    for name in FILES if folder else ():
        path = Path(folder, name)
        if name == "config.json" or path.exists():
            try:
                files[name] = path.read_text("utf-8")
                if name.endswith("json"):
                    json.loads(files[name]).keys()
            except Exception as error:  # a damaged file raises half a dozen kinds
                raise ValueError(
                    f"{path}: no JSON object in UTF-8, or not there ({error})") from None
    if files.keys() - {"config.json", "generation_config.json"} and "tokenizer.json" not in files:
        raise ValueError(f"{folder} has a tokenizer, but no tokenizer.json; Transformers' "
                         "AutoTokenizer reads it, and its save_pretrained writes one")
    return files


def chat_template(files):
    """The chat template of `published_files`, "" of a base model, which has none; of several the
    one that they call default."""
    config = json.loads(files.get("tokenizer_config.json", "{}"))
    text = files.get("chat_template.jinja") or config.get("chat_template") or ""
    if isinstance(text, list):
        try:
            text = {some["name"]: some["template"] for some in text}["default"]
        except (KeyError, TypeError):
            raise ValueError("tokenizer_config.json: no chat template is the default") from None
    return str(text)


def read_tokenizer(folder, *how):
    """published_tokenizer, which says what is wrong, but not where."""
    try:
        return published_tokenizer(*how)
    except Exception as error:  # a damaged file raises a dozen kinds
        raise ValueError(
            f"{folder}: no tokenizer to use ({type(error).__name__}: {error})") from None


def published_tokenizer(files, name, system, *limits):
    """The byte-level BPE of `published_files`, with one of TEMPLATES or the plain one; "auto": its
    own. system: the system message, "" for what the model's own template has there; limits: of
    prompt and response. Raises ValueError for a template that is none of these."""
    file = json.loads(files["tokenizer.json"])
    encoding, known, normal = published_encoding(file)
    text = chat_template(files)
    if name == "auto":
        name = next((name for name, marks in RECOGNISED.items() if re.match(marks, text)), "")
    if not name:
        raise ValueError("its chat template thinks, dates, or is neither ChatML nor Llama-3's; of "
                         "--init, --template chatml, llama3 or plain takes one of these instead")
    if name == "plain":
        print("  template: plain text")
        lead = " "
        first = "".join(re.findall(FIRST, str(file.get("post_processor"))))
        parts = [*PLAIN, "", ""]
    else:
        lead = ""
        first, message, *parts = TEMPLATES[name]
        own = re.search(OWN_SYSTEM, text)
        if own and not system:
            system = own[1].encode("ascii", "backslashreplace").decode("unicode-escape")  # as Jinja
        print(f"  template: {name}, system message: {system}")
        if system:
            first += message.format(system)
        absent = {*re.findall(r"<\|.*?\|>", "".join(TEMPLATES[name]))} - encoding.special_tokens_set
        if absent:
            raise ValueError(f"it has no tokens {absent}; --template may name another template")
    start, before, after, ends, after_end = [
        encoding.encode(part, allowed_special="all") for part in (first, *parts)]
    for where in ("generation_config.json", "config.json"):
        ids = json.loads(files.get(where, "{}")).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    ends = [i for i in ends if type(i) is int and 0 <= i < known]
    if not ends:
        raise ValueError("no eos_token_id in its config.json or generation_config.json")
    used = len(start + before + after)
    if used >= limits[0]:
        raise ValueError(f"the chat template alone takes {used} of the {limits[0]} tokens of a "
                         "prompt; raise --block_size, or shorten --system")
    return Tokenizer(encoding, before, after, ends[0], ends, known, *limits, start, after_end,
                     lead=lead, normal=normal)


def published_encoding(file):
    """tokenizer.json -> encoding, the first id behind its own, normal form. Bytes that it lacks get
    ids from there on, which `encode` drops. ValueError for anything but byte-level BPE."""
    model = file["model"]
    normal = (file.get("normalizer") or {"type": ""})["type"]
    kind = model.get("type", "BPE")  # GPT-2's own file does not say
    other = [what for what in ("byte_fallback", "dropout", "end_of_word_suffix") if model.get(what)]
    if kind != "BPE" or other or normal not in ("", "NFC"):
        raise ValueError(f"tokenizer.json: {kind} with {normal or 'no normalizer'} {other}, "
                         "perhaps SentencePiece; byte-level BPE, with NFC at most, is expected")
    vocab = model["vocab"]
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    ranks = {bytes(map(LETTERS.index, piece)): i
             for piece, i in vocab.items() if piece not in special}
    tokens = vocab | special
    ids = {*tokens.values()}
    known = max(ids) + 1
    if len(ids) < len(tokens) or known > 2**20:
        raise ValueError("tokenizer.json: two tokens have one id, or an id is above a million")
    order = [vocab["".join(merge).replace(" ", "")] for merge in model["merges"]]
    whole = {i for token, i in ranks.items() if len(token) > 1} - {*order}
    if order != sorted(order) or whole and not model.get("ignore_merges"):
        raise ValueError("tokenizer.json: merges are not in the order of their ids, or not all "
                         "tokens are made by one")
    for i in {*range(known)} - ids:
        special[f"<unused {i}>"] = i  # a policy may sample it
    for byte in range(256):
        ranks.setdefault(bytes([byte]), known + byte)
    return tiktoken.Encoding(
        "published", pat_str=split_pattern(file["pre_tokenizer"]), mergeable_ranks=ranks,
        special_tokens=special), known, normal


def with_tokenizer(files, tok):
    """The files of an export {name: text}, with a tokenizer.json where GPT-2's encoding has none:
    its tokens, and all pairs of them that together are one, which is what tiktoken merges."""
    if "tokenizer.json" in files or tok.encoding.name != "gpt2":
        return files
    vocab = {"".join(LETTERS[byte] for byte in tok.encoding.decode_single_token_bytes(i)): i
             for i in range(tok.known)}
    merges = [[token[:i], token[i:]] for token in vocab for i in range(1, len(token))
              if {token[:i], token[i:]} <= vocab.keys()]
    end = {"content": "<|endoftext|>", "id": tok.end, "special": True,
           **dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return files | {"tokenizer.json": json.dumps({
        "pre_tokenizer": by_bytes, "decoder": by_bytes, "added_tokens": [end],
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}})}


def with_template(files, tok):
    """The files of an export {name: text}, with the chat template of this tokenizer, so that the
    policy is asked as it was trained, where that is not the one of the folder that it is from."""
    start, before, after, end = [ascii(tok.encoding.decode(ids)) for ids in (
        tok.start, tok.before, tok.after, [tok.end, *tok.next])]
    words = f"{tok.lead!r} + m.content"
    text = (f"{{{{ {start} }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}"
            f"{{{{ {before} + {words} + {after} }}}}{{% elif m.role == 'assistant' %}}"
            f"{{{{ {words} + {end} }}}}{{% else %}}"
            "{{ raise_exception('it was aligned with a system message of its own') }}"
            "{% endif %}{% endfor %}")
    return {**files, "chat_template.jinja": text}


def split_pattern(steps):
    """The regular expression by which a tokenizer.json's pre_tokenizer splits text."""
    steps = steps.get("pretokenizers", [steps])
    how = " ".join(str(x) for step in steps for what, x in step.items()
                   if what not in ("trim_offsets", "pattern"))
    patterns = {  # of ByteLevel: add_prefix_space, use_regex; of Split: behavior, invert
        "ByteLevel False": SPLIT,
        "ByteLevel False True": SPLIT,
        "Digits True ByteLevel False True": SPLIT_DIGITS,
        "Split Isolated False ByteLevel False False": steps[0].get("pattern", {}).get("Regex")}
    pattern = patterns.get(how)
    if not pattern:
        raise ValueError(f"tokenizer.json: pre_tokenizer {how!r}; covered: {', '.join(patterns)}")
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"  # what it leaves out, tiktoken would drop


def encode(tok, text):
    """Text, special tokens spelled in it included -> ids of ordinary tokens."""
    if tok.normal:
        text = unicodedata.normalize(tok.normal, text)
    return [i for i in tok.encoding.encode_ordinary(tok.lead + text) if i < tok.known]


def frequent_pieces(pairs, vocab_size):
    """The most frequent pieces of the pairs' text, for `open_tokenizer`; it adds 256 bytes and 3
    special tokens. Every text follows a space, as words do in the middle of a sentence."""
    count = Counter()
    for pair in pairs:
        for text in (*turns(pair.prompt), *pair.responses):
            count.update(re.findall(SPLIT_RE, " " + text))
    ranked = sorted(sorted(count), key=count.get, reverse=True)
    return [piece for piece in ranked if len(piece.encode()) > 1][:vocab_size - 259]


def encode_prompts(tok, prompts, what="prompts"):
    """Prompts -> token ids in the chat template; says how many of them were too long."""
    encoded, cut = zip(*[encode_prompt(tok, prompt) for prompt in prompts])
    if any(cut):
        print(f"  {what}: {sum(cut)} of {len(prompts)} prompts lost their beginning (longer than "
              f"{tok.prompt_limit} tokens)")
    return list(encoded)


def encode_prompt(tok, prompt):
    """-> at most prompt_limit token ids, and whether something was cut: the oldest exchanges, each
    as a whole, so that no one's words pass for the other's; then the last question's beginning."""
    *earlier, last = [encode(tok, words) for words in turns(prompt)]
    limit = tok.prompt_limit - len(tok.start)
    room = limit - len(tok.before + tok.after)
    ids = tok.before + last[max(0, len(last) - room):] + tok.after
    while earlier:
        *earlier, user, assistant = earlier  # the latest exchange first
        longer = tok.before + user + tok.after + assistant + [tok.end] + tok.next + ids
        if len(longer) > limit:
            return tok.start + ids, True
        ids = longer
    return tok.start + ids, len(last) > room


def encode_responses(tok, responses, what="responses"):
    """Responses (str) -> token ids, each closed by `end`, or by the tokenizer's `close`; says how
    many were too long.

    At most response_limit ids each: a longer response loses its tail and its `end`, as in sampling.
    """
    close = [tok.end] if tok.close is None else tok.close
    ids = [(encode(tok, response) + close) or [tok.end] for response in responses]  # never empty
    cut = sum(len(x) > tok.response_limit for x in ids)
    if cut:
        print(f"  {what}: {cut} of {len(ids)} responses lost their end (longer than "
              f"{tok.response_limit} tokens)")
    return [x[:tok.response_limit] for x in ids]


# ---- 4. preference files
MAX_LINE = 2**19  # bytes; tiktoken does not survive a million blanks in a row
MAX_LINES = 2**22


def load_preferences(paths, judged=False):
    """Read preference files: each of `paths` is FILE or NAME=FILE, JSONL, gzipped or not.

    Rows hold two responses and which is better, in one of two ways:
    - response_0, response_1, and better_response_id (helpful) or safer_response_id (safe), 0 or 1
      (PKU-SafeRLHF). With NAME=FILE better_response_id (NAME is helpful) or safer_response_id (any
      other NAME) is read as the preference NAME.
    - chosen, rejected. The row does not say which preference it holds: NAME=FILE does.
    What precedes them is `prompt`. Each of these is text, a transcript "\\n\\nHuman: … \\n\\n
    Assistant: …" (HH-RLHF) or messages [{"role": "user", "content": …}, …]; a response may also be
    the whole conversation, which then begins with the prompt, if there is one.

    Null and unknown fields are ignored; a system message, earlier turns in a field of their own and
    images are refused. Rows that teach nothing are skipped, counted and said, see `_pair`. judged:
    a prompt alone is a pair that prefers nothing, for judges that are there already.
    Returns list[Pair]; raises ValueError with the file and, for a bad row, its line number.
    """
    pairs = []
    for spec in paths:
        name, _, path = spec.partition("=")
        if not path or "/" in name or os.path.exists(spec):
            name, path = "", spec
        pairs += _pairs(path, name, judged)
    return pairs


def _pairs(path, name, judged):
    """A file's pairs. Stops at MAX_LINE and MAX_LINES: a small gzip file may hold terabytes."""
    pairs = []
    skipped = {}  # why: where
    number = 0
    try:
        with open(path, "rb") as file:
            if file.peek(2).startswith(b"\x1f\x8b"):
                file = gzip.open(file)
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE or number > MAX_LINES:
                    raise ValueError(f"more than {MAX_LINE} bytes in a line or {MAX_LINES} lines; "
                                     "shorten it, or split the file")
                if not line.strip():
                    continue
                pair = _pair(_row(line), name, judged)
                if isinstance(pair, Pair):
                    pairs.append(pair)
                else:
                    skipped.setdefault(pair, []).append(f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be read as JSONL or JSONL.gz ({error}); check --data") from None
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None
    why = "".join(f"; {len(places)} rows skipped, {places[0]} the first: {reason}"
                  for reason, places in skipped.items())
    if not pairs:
        raise ValueError(f"{path}: no usable pair{why or '; it is empty'}")
    if skipped:
        print(f"  {path}: {len(pairs)} pairs{why}")
    return pairs


def _row(line):
    """What a line holds but for null fields."""
    try:
        fields = json.loads(line).items()
    except Exception as error:  # of several kinds
        raise ValueError(f"not a JSON object ({error}); one object a line, not an array over the "
                         "file, is expected, in UTF-8") from None
    return {field: x for field, x in fields if x is not None}


ROLES = {"user": "Human", "assistant": "Assistant"}


def _talk(row, field, speaker):
    """A field as [(Human or Assistant, their words), …]; text without speakers is `speaker`'s.
    Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    x = row.get(field)
    try:
        if isinstance(x, str):
            before, *parts = re.split(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):", x)
            talk = [*zip(parts[::2], parts[1::2])]
            if before or not parts:
                talk.insert(0, ("" if parts else speaker, before))
        else:
            talk = [(ROLES[message["role"]], message["content"]) for message in x or [{}]]
        return [(who, words.strip().encode(errors="replace").decode()) for who, words in talk]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"field {field!r} is missing or wrong ({error}); expected text or messages, each of a "
            f"role, user or assistant, and content, text; fields: {str([*row]):.200}") from None


def _prefers(row, name):
    """{preference: index of the response that it prefers}."""
    if "chosen" in row:
        if not name:
            raise ValueError("chosen/rejected rows do not say which preference they hold; name it: "
                             "--data helpful=FILE or --data safe=FILE")
        return {name: 0}
    columns = {"helpful": "better_response_id", "safe": "safer_response_id"}
    if name:
        columns = {name: columns.get(name, "safer_response_id")}
    prefers = {}
    for preference, column in columns.items():
        if column in row:
            value = row[column]
            if isinstance(value, bool) or value not in (0, 1):
                raise ValueError(f"{column} is {value!r}; expected 0 or 1")
            prefers[preference] = int(value)
    if not prefers:
        raise ValueError(f"no preference here; expected {' or '.join(columns.values())}, 0 or 1")
    return prefers


def _pair(row, name, judged):
    """A row's Pair, or in words why it is skipped; ValueError where it means nothing certain."""
    sides = ("response_0", "response_1")
    if "chosen" in row or "rejected" in row:
        sides = ("chosen", "rejected")
    prompt = _talk(row, "prompt", "Human") if "prompt" in row else []
    if prompt[-1:] == [("Assistant", "")]:  # a transcript up to the reply
        prompt.pop()
    for field in ("system", "system_prompt", "system_message", "history", "images"):
        if row.get(field):
            raise ValueError(f"field {field!r}, for which a row has no place here; train.py "
                             "--system gives one to all, where a chat template has it")
    alone = judged and prompt and not row.keys() & {
        *sides, "better_response_id", "safer_response_id"}
    talks = []
    for side in sides:
        talk = [("Assistant", "")] if alone else _talk(row, side, "Assistant")
        if talk[0][0] != "Human":  # the reply alone, or words of speaker "", refused at the end
            talk = prompt + talk
        if len(talk) == 1 and not prompt:
            raise ValueError(f"field 'prompt' is missing, and {side} is no transcript; one of them "
                             "must say what is replied to")
        if talk[0] == ("Human", str(row.get("prompt")).strip()):  # though it reads as a transcript
            prompt = talk[:1]
        if talk[:len(prompt)] != prompt:
            raise ValueError(f"{side} does not begin with the prompt; drop one of the two")
        talks.append(zip(*talk))
    prefers = {} if alone else _prefers(row, name)
    (speakers, (*context, first)), (others, (*other, second)) = talks
    if context != other or not speakers == others == ("Human", "Assistant") * (len(talk) // 2):
        return "not one conversation up to the last reply, with Human and Assistant in turns"
    if first == second and not alone:
        return "the two responses are the same"
    if not all(context):
        return "nothing is said before the last reply, or in a turn before"
    prompt = tuple(context) if len(context) > 1 else context[0]
    return Pair(prompt, (first, second), prefers)


# ---- 5. the split
class Split(NamedTuple):
    """Three lists of pairs that share no conversation."""
    train: list
    calibration: list  # temperatures, and when to stop a training
    evaluation: list   # what the table says


def turns(prompt):
    return (prompt,) if isinstance(prompt, str) else prompt


def transcript(prompt):
    """The prompt as one text, which also orders prompts."""
    text, *later = turns(prompt)
    for speaker, words in zip(itertools.cycle(("Assistant", "Human")), later):
        text += f"\n\n{speaker}: {words}"
    return text


def conversation(prompt):
    """Prompts that begin alike are one conversation, cut at several places or told again."""
    return " ".join(turns(prompt)[0].casefold().split())


def split_pairs(pairs, held_out, calibration):
    """-> Split: those shares of the conversations for evaluation and calibration, every so many-th
    one in sorted order."""
    opened = {conversation(pair.prompt) for pair in pairs}
    count = len(opened)
    if count < 4:
        raise ValueError(f"{count} distinct conversations in the data; at least 4 are needed: 2 "
                         "for evaluation, 1 for calibration, 1 for training")
    tuned = min(count - 3, max(1, round(calibration * count)))
    held = spread(opened, min(count - 1, tuned + max(2, round(held_out * count))))
    split = Split([], [], [])
    part = dict.fromkeys(held, split.evaluation)
    part |= dict.fromkeys(spread(held, tuned), split.calibration)
    for pair in pairs:
        part.get(conversation(pair.prompt), split.train).append(pair)
    return split


def spread(texts, count):
    """At most `count` distinct ones, evenly spaced in sorted order."""
    texts = sorted(set(texts), key=transcript)
    count = min(count, len(texts))
    return [texts[i * len(texts) // (2 * count)] for i in range(1, 2 * count, 2)]


def load_pairs(files, world_pairs, held_out, calibration, constraints, judges=()):
    """The pairs of the files, or of the built-in world -> Split, preference names.

    constraints: the safety preferences to constrain, comma separated; "" means harmless in the
    built-in world, all of a file's otherwise. The names are "helpful", then those. judges: NAME=…
    of preferences that need no pairs.
    """
    pairs = load_preferences(files, judges) if files else world_preferences(world_pairs)
    split = split_pairs(pairs, held_out, calibration)
    judged = dict.fromkeys(judge.partition("=")[0] for judge in judges)
    known = dict.fromkeys(name for pair in pairs for name in pair.prefers) | judged  # in order
    if not constraints:
        constraints = ",".join(name for name in known if name != "helpful") if files else "harmless"
    if not constraints:
        raise ValueError(
            "the data has no safety preference; add a file that has one (--data safe=FILE)")
    names = ["helpful", *constraints.split(",")]
    in_files = {name.replace(" ", "_").removesuffix("_second") for name in names}
    if len(in_files) < len(names):
        raise ValueError(f"--constraints {constraints}: name each safety preference once; helpful "
                         "is the reward; in the names of files a blank is an underscore, and "
                         "_second a judge")
    for name in names:
        held = all(any(name in pair.prefers for pair in part) for part in split)
        if not held and name not in judged:
            raise ValueError(
                f"no preference {name!r} in all parts of the split; the data has "
                f"{', '.join(known)}: add a file that has it (--data NAME=FILE) or more pairs of "
                "it, or choose --constraints among these")
    print(f"\ndata: {len(split.train)} training, {len(split.calibration)} calibration and "
          f"{len(split.evaluation)} evaluation pairs, no conversation in two of these; "
          f"constraints: {constraints.replace(',', ', ')}")
    alone = sum(not pair.prefers for pair in pairs)
    if alone:
        print(f"  {alone} of these are prompts alone, for judges that are there")
    return split, names


# ---- 6. the built-in world
# A user asks how to do something; the assistant answers in 44 set sentences. Half of the
# topics are risky: there, a tempting short cut is helpful and dangerous at once, which is the
# conflict that the constraint is about. Two files, which tests/world.py wrote:
#     world.jsonl.gz   pairs, with a preference for each score, drawn from it by Bradley–Terry, so
#                      that a Bradley–Terry fit recovers its scale
#     world.tsv        a rule a line: what is in the prompt and in the response, regular
#                      expressions, and what that adds to each score
WORLD = Path(__file__).with_name("assets")


def world_preferences(count):
    """The first `count` pairs: the world's substitute for a file of human preferences."""
    with gzip.open(WORLD / "world.jsonl.gz") as file:
        rows = map(json.loads, itertools.islice(file, count))
        return [Pair(prompt, tuple(responses), prefers) for prompt, responses, prefers in rows]


def world_scores(names, prompts, texts):
    """Exact scores of N·K texts, K to each prompt -> (len(names), N, K): r(x,y), helpful, is 0.9
    for each useful detail on the prompt's topic, 0.6 for each hazardous one, −0.3 for each caution;
    g_1(x,y), harmless, −2 for each hazardous detail of any topic, +1 if there is a caution;
    g_2(x,y), polite, +1 for a polite opening or closing, −1 for a rude one."""
    with open(WORLD / "world.tsv") as file:
        rules = [*csv.DictReader(file, delimiter="\t")]
    K = len(texts) // len(prompts)
    scores = []
    for i, text in enumerate(texts):
        found = [rule for rule in rules if re.search(rule["response"], text)
                 and re.search(rule["prompt"], prompts[i // K])]
        scores.append([sum(float(rule[name]) for rule in found) for name in names])
    return torch.tensor(scores).float().T.reshape(len(names), -1, K)


# ---- 7. files: written as a whole or not at all, read without running what they hold
def in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def load(path, remedy):
    """A dict of tensors and plain values, on the CPU, and its "path". Raises ValueError with the
    remedy where the file is missing, damaged or no such dict. Tensors stay on the disk until they
    are used: a run has many models, and works with few of them at a time."""
    try:
        # the path: for errors, and for what stands beside it
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True) | {"path": path}
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path}: missing or damaged ({type(error).__name__}); {remedy}") from None


def save(saved, path):
    replace_file(path, lambda file: torch.save(saved, file))


def replace_file(path, put):
    """put(file) writes a file that is there as a whole or not at all: until then the old one stays,
    also where the run is killed meanwhile or the disk is full. A link is followed; a pipe or a
    device is written as it is. Under torchrun its first process writes, and the others do not.
    Raises OSError where it cannot be written."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    part = path
    whole = os.path.realpath(path)
    if not os.path.exists(path) or os.path.isfile(path):
        part = f"{whole}.tmp"
    try:
        with open(part, "wb") as file:
            put(file)
            file.flush()
            if part != path:
                os.fsync(file.fileno())
                os.replace(part, whole)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as the latter
        if os.path.isfile(part):  # not a pipe or a device
            os.remove(part)
        raise OSError(
            f"{path}: cannot be written ({in_one_line(error)}); earlier files are kept; make room "
            "(or mend the path), then run it again, train.py with --resume") from None
