import functools
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch

import data
import world
from conftest import text_batch
from data import Pair

ROW = {"prompt": "How?", "response_0": "Like this.", "response_1": "Like that.", "better_response_id": 1,
       "safer_response_id": 0}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How?\n\nAssistant: Like this.",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How?\n\nAssistant: Go away."}
TRICKY = ("plain words", "It's 3 o'clock, isn't it?", "tabs\tand\nnew\r\nlines  ", "naïve Ångström straße — “quotes”",
          "日本語のテキスト。한국어 русский العربية", "👩‍👩‍👧 🏳️‍🌈 emoji 🎉!!", "e\u0301 combining \u200d joiner\u00a0space",
          "<|end|> then <|endoftext|> and <|user|>", "x_1 += a[i]*2e-3;  # code", "", " ", "۱۲۳ arabic-indic digits")


def jsonl(tmp_path, *rows, name="pairs.jsonl"):
    path = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# ---- preference files

def test_pku_schema(tmp_path):
    row = {**ROW, "is_response_0_safe": True, "is_response_1_safe": False, "category": {"unknown": ["field"]}}
    assert data.load_preferences([jsonl(tmp_path, row)]) == [
        Pair("How?", ("Like this.", "Like that."), {"helpful": 1, "safe": 0})]


def test_blank_lines_are_skipped(tmp_path):
    assert len(data.load_preferences([jsonl(tmp_path, ROW, "", "  ", ROW)])) == 2


def test_gzip_is_read_like_plain_text(tmp_path):
    plain = jsonl(tmp_path, ROW, {**ROW, "prompt": "日本?"})
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((tmp_path / "pairs.jsonl").read_text(encoding="utf-8"))
    assert data.load_preferences([str(tmp_path / "pairs.jsonl.gz")]) == data.load_preferences([plain])


@pytest.mark.parametrize("absent, left", [("better_response_id", {"safe": 0}), ("safer_response_id", {"helpful": 1})])
def test_either_preference_may_be_absent_or_null(tmp_path, absent, left):
    pairs = data.load_preferences([jsonl(tmp_path, without(ROW, absent), {**ROW, absent: None})])
    assert [pair.prefers for pair in pairs] == [left, left]


def test_several_files_are_one_list_in_order(tmp_path):
    first = jsonl(tmp_path, without(ROW, "safer_response_id"), name="helpful.jsonl")
    second = jsonl(tmp_path, without(ROW, "better_response_id"), name="safe.jsonl")
    assert [pair.prefers for pair in data.load_preferences([first, second])] == [{"helpful": 1}, {"safe": 0}]


def test_hh_transcripts_under_the_name_that_the_user_gives(tmp_path):
    path = jsonl(tmp_path, HH)
    for name in ("helpful", "safe"):
        assert data.load_preferences([f"{name}={path}"]) == [
            Pair(("Hi", "Hello!", "How?"), ("Like this.", "Go away."), {name: 0})]
    short = {side: "\n\nHuman: " + text.rpartition("\n\nHuman: ")[2] for side, text in HH.items()}
    assert data.load_preferences([f"safe={jsonl(tmp_path, short)}"]) == [Pair("How?", ("Like this.", "Go away."), {"safe": 0})]


def messages(*words):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]


LONG = ("Hi", "Hello!", "How?"), ("Like this.", "Go away.")
SHORT = "Say hi", ("Hello!", "No.")
TRANSCRIPT = "Continue:\n\nHuman: a\n\nAssistant:"
LAYOUTS = {
    "strings": ({"prompt": "Say hi", "chosen": " Hello!", "rejected": "No.\n"}, SHORT),
    "messages": ({"chosen": messages("Say hi", "Hello!"), "rejected": messages("Say hi", "No.")}, SHORT),
    "prompt and replies as messages": (
        {"prompt": messages("Say hi"), "chosen": [{"role": "assistant", "content": "Hello!"}],
         "rejected": [{"role": "assistant", "content": "No."}]}, SHORT),
    "UltraFeedback": ({"prompt": "Say hi", "prompt_id": "9f", "messages": messages("Say hi", "Hello!"), "score_chosen": 8.0,
                       "chosen": messages("Say hi", "Hello!"), "rejected": messages("Say hi", "No.")}, SHORT),
    "several turns as messages": (
        {"chosen": messages("Hi", "Hello!", "How?", "Like this."), "rejected": messages("Hi", "Hello!", "How?", "Go away.")},
        LONG),
    "several turns in the prompt": ({"prompt": messages("Hi", "Hello!", "How?"), "chosen": "Like this.",
                                     "rejected": "Go away."}, LONG),
    "a transcript for a prompt": (
        {"prompt": HH["chosen"].rpartition("\n\nAssistant:")[0], "chosen": "Like this.", "rejected": "Go away."}, LONG),
    "a transcript up to the reply for a prompt": (
        {"prompt": HH["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:", "chosen": "Like this.",
         "rejected": "Go away."}, LONG),
    "the whole and its first turn": ({"prompt": "Hi", **HH}, LONG),
    "no leading blank line": ({side: text.removeprefix("\n\n") for side, text in HH.items()}, LONG),
    "CRLF": ({side: text.replace("\n", "\r\n") for side, text in HH.items()}, LONG),
    "a blank first": ({side: " " + text.lstrip() for side, text in HH.items()}, LONG),
    "a line feed first": ({side: text.removeprefix("\n") for side, text in HH.items()}, LONG),
    "CRLF up to the reply": ({"prompt": "Human: Say hi\r\n\r\nAssistant:", "chosen": "Hello!", "rejected": "No."}, SHORT),
    "nulls": ({**HH, "system": None, "prompt": None, "response_0": None, "better_response_id": None}, LONG),
    "UltraFeedback, of a prompt that looks like a transcript": (
        {"prompt": " " + TRANSCRIPT, "chosen": messages(TRANSCRIPT, "Hello!"), "rejected": messages(TRANSCRIPT, "No.")},
        (TRANSCRIPT, ("Hello!", "No."))),
    "the same of one speaker": (
        {"prompt": "Assistant: who?", "chosen": messages("Assistant: who?", "Hello!"), "rejected": messages("Assistant: who?", "No.")},
        ("Assistant: who?", ("Hello!", "No."))),
    "an empty system message": ({"system": "", "prompt": "Say hi", "chosen": "Hello!", "rejected": "No."}, SHORT),
    "one empty reply": ({"prompt": "Say hi", "chosen": "Hello!", "rejected": ""}, ("Say hi", ("Hello!", ""))),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_published_layout_is_the_same_pair(tmp_path, case):
    row, (prompt, responses) = LAYOUTS[case]
    assert data.load_preferences([f"safe={jsonl(tmp_path, row)}"]) == [Pair(prompt, responses, {"safe": 0})]


def test_nulls_beside_pku_fields_are_no_transcript(tmp_path):
    assert data.load_preferences([jsonl(tmp_path, {**ROW, "chosen": None, "rejected": None})]) == data.load_preferences(
        [jsonl(tmp_path, ROW)])


NOT_CERTAIN = {
    "a system message": ({"chosen": [{"role": "system", "content": "Be kind."}, *messages("Say hi", "Hello!")],
                          "rejected": messages("Say hi", "No.")}, "system"),
    "a system message beside the prompt": ({"system": "Be kind.", "prompt": "Say hi", "chosen": "Hello!", "rejected": "No."}, "system"),
    "the same by another name": ({"system_prompt": "Be kind.", "prompt": "Say hi", "chosen": "Hello!", "rejected": "No."}, "system"),
    "by a third name": ({"system_message": "Be kind.", "prompt": "Say hi", "chosen": "Hello!", "rejected": "No."}, "'system_message'"),
    "earlier turns": ({"history": [["Hi", "Hello!"]], "prompt": "Say hi", "chosen": "Hello!", "rejected": "No."}, "'history'"),
    "another project's layout": ({"input": messages("Say hi"), "preferred_output": messages("a"), "non_preferred_output": messages("b")},
                                 "fields: ['input', 'preferred_output', 'non_preferred_output']"),
    "another role": ({"prompt": "Say hi", "chosen": [{"role": "tool", "content": "3"}], "rejected": "No."}, "tool"),
    "no role": ({"prompt": "Say hi", "chosen": [{"from": "gpt", "value": "3"}], "rejected": "No."}, "role"),
    "no message": ({"prompt": [], "chosen": "Hello!", "rejected": "No."}, "prompt"),
    "content in parts": ({"prompt": "Say hi", "chosen": [{"role": "assistant", "content": [{"text": "Hello!"}]}],
                          "rejected": "No."}, "chosen"),
    "messages that are strings": ({"prompt": ["Say hi"], "chosen": "Hello!", "rejected": "No."}, "prompt"),
    "no prompt": ({"chosen": "Say hi Hello!", "rejected": "Say hi No."}, "prompt"),
    "no prompt, replies as messages": ({side: [{"role": "assistant", "content": side}] for side in HH}, "prompt"),
    "another prompt": ({"prompt": "Say it", **HH}, "does not begin with the prompt"),
    "another prompt in one": ({"prompt": "Hi", "chosen": HH["chosen"], "rejected": messages("Ho", "No.")},
                              "rejected does not begin with the prompt"),
}


@pytest.mark.parametrize("case", NOT_CERTAIN)
def test_a_row_that_may_mean_two_things_is_refused(tmp_path, case):
    row, reason = NOT_CERTAIN[case]
    path = jsonl(tmp_path, HH, row)
    with pytest.raises(ValueError) as error:
        data.load_preferences([f"safe={path}"])
    one_line(error, f"{path}:2: ", reason)


@pytest.mark.parametrize("prompt", ["", " \n", "\n\nHuman: Hi\n\nAssistant: \n\nHuman: Say hi\n\nAssistant:",
                                    [{"role": "user", "content": " "}]])
def test_a_row_in_which_nothing_is_said_before_the_reply_is_skipped(tmp_path, capsys, prompt):
    path = jsonl(tmp_path, ROW, {**ROW, "prompt": prompt})
    assert len(data.load_preferences([str(path)])) == 1
    assert f"{path}: 1 pairs; 1 rows skipped, {path}:2 the first: nothing is said" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [("Same.", "Same."), ("Same. ", "\nSame."), ("", ""), (" ", "\n")])
def test_pairs_of_one_response_twice_are_skipped_and_counted(tmp_path, capsys, pair):
    pku = {**ROW, "response_0": pair[0], "response_1": pair[1]}
    hh = {"prompt": "Say hi", "chosen": pair[0], "rejected": pair[1]}
    path = jsonl(tmp_path, ROW, pku, ROW, hh)
    assert len(data.load_preferences([f"safe={path}"])) == 2
    assert f"{path}: 2 pairs; 2 rows skipped, {path}:2 the first: the two responses are the same" in capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        data.load_preferences([f"safe={jsonl(tmp_path, pku, hh)}"])
    one_line(error, f"{path}: no usable pair; 2 rows skipped, {path}:1 the first: the two responses are the same")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs"])
@pytest.mark.parametrize("change", [lambda x: x, gzip.compress, lambda x: b"\xef\xbb\xbf" + x,
                                    lambda x: gzip.compress(b"\xef\xbb\xbf" + x), lambda x: x.replace(b"\n", b"\r\n")])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, name, change):
    (tmp_path / name).write_bytes(change(2 * (json.dumps(ROW) + "\n").encode()))
    assert len(data.load_preferences([str(tmp_path / name)])) == 2


@pytest.mark.parametrize("indent", [None, 1])
def test_one_array_over_the_file_is_refused_by_name(tmp_path, indent):
    (tmp_path / "pairs.json").write_text(json.dumps([ROW, ROW], indent=indent))
    with pytest.raises(ValueError) as error:
        data.load_preferences([str(tmp_path / "pairs.json")])
    one_line(error, f"{tmp_path}/pairs.json:1: ", "one object a line, not an array over the file")


NOT_ONE_CONVERSATION = {
    "prompts diverge": {**HH, "rejected": HH["rejected"].replace("Hi", "Ho")},
    "one reply earlier": {**HH, "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!"},
    "Human speaks twice": {side: "\n\nHuman: Ah" + text for side, text in HH.items()},
    "Assistant speaks twice": {side: text.replace("\n\nHuman: How", "\n\nAssistant: How") for side, text in HH.items()},
    "Assistant begins": {side: "\n\nAssistant: Yes?" + text for side, text in HH.items()},
    "something comes first": {side: "You are kind." + text for side, text in HH.items()},
    "Human has the last word": {**HH, "rejected": HH["rejected"] + "\n\nHuman: Thanks"},
    "Human has the last word in both": {side: text + "\n\nHuman: Thanks" for side, text in HH.items()},
    "a reply that goes on for the user": {**ROW, "response_0": "With glue.\n\nHuman: And then?"},
    "no one begins": {side: text.removeprefix("\n\nHuman:") for side, text in HH.items()},
}


@pytest.mark.parametrize("case", NOT_ONE_CONVERSATION)
def test_transcripts_that_are_not_one_conversation_are_skipped_and_counted(tmp_path, capsys, case):
    path = jsonl(tmp_path, HH, NOT_ONE_CONVERSATION[case], HH)
    assert len(data.load_preferences([f"safe={path}"])) == 2
    said = capsys.readouterr().out
    assert f"{path}: 2 pairs; 1 rows skipped, {path}:2 the first" in said and said.count("\n") == 1
    with pytest.raises(ValueError) as error:
        data.load_preferences([f"safe={jsonl(tmp_path, '', *2 * [NOT_ONE_CONVERSATION[case]])}"])
    one_line(error, f"{path}: no usable pair; 2 rows skipped, {path}:2 the first: not one conversation")


ALONE = {
    "text": ({"prompt": "How?", "source": "here"}, "How?"),
    "null responses": ({"prompt": " How? ", "chosen": None, "response_0": None, "better_response_id": None}, "How?"),
    "transcript": ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: How?\n\nAssistant:"}, ("Hi", "Yes?", "How?")),
    "messages": ({"prompt": [{"role": "user", "content": "How?"}]}, "How?")}


@pytest.mark.parametrize("case", ALONE)
def test_a_prompt_alone_is_a_pair_that_prefers_nothing(tmp_path, case):
    row, prompt = ALONE[case]
    path = jsonl(tmp_path, row)
    assert data.load_preferences([path], judged=True) == [data.Pair(prompt, ("", ""), {})]
    with pytest.raises(ValueError) as error:
        data.load_preferences([path])
    one_line(error, f"{path}:1: field '{'chosen' if 'chosen' in row and row['chosen'] else 'response_0'}' is missing")


@pytest.mark.parametrize("row, said", [
    ({"prompt": "How?", "better_response_id": 0}, "'response_0' is missing or wrong"), ({"text": "How?"}, "'response_0' is missing"),
    ({"prompt": "How?", "response_0": "So"}, "'response_1' is missing or wrong"), ({"prompt": "How?", "chosen": "So"}, "'rejected' is missing")])
def test_half_a_pair_is_no_prompt_alone(tmp_path, row, said):
    with pytest.raises(ValueError) as error:
        data.load_preferences([jsonl(tmp_path, row)], judged=True)
    one_line(error, said)


def test_prompts_alone_need_a_judge_for_every_name(tmp_path):
    path = jsonl(tmp_path, *[{"prompt": f"How {i}?"} for i in range(20)])
    split, names = data.load_pairs([path], 0, 0.2, 0.1, "", ["helpful=a", "safe=-b", "safe=c"])
    assert names == ["helpful", "safe"] and sum(map(len, split)) == 20
    both = jsonl(tmp_path, *[{**ROW, "prompt": f"Why {i}?"} for i in range(20)], name="both.jsonl")
    polite = jsonl(tmp_path, *[{**ROW, "prompt": f"Who {i}?"} for i in range(20)], name="polite.jsonl")
    files = [both, f"polite={polite}", path]
    _, names = data.load_pairs(files, 0, 0.2, 0.1, "", ["polite=a", "kind=b"])
    assert names == ["helpful", "safe", "polite", "kind"]  # in the order of the data, as without judges
    for judges, constraints in (([], ""), (["helpful=a"], ""), (["helpful=a", "safe=b"], "polite"), (["safe=b"], "")):
        with pytest.raises(ValueError, match="'response_0' is missing|no safety preference|no preference '(polite|helpful)'"):
            data.load_pairs([path], 0, 0.2, 0.1, constraints, judges)


@pytest.mark.parametrize("name, prefers", [("helpful", 1), ("polite", 0)])
def test_a_named_pku_file_holds_one_preference(tmp_path, name, prefers):
    assert data.load_preferences([f"{name}={jsonl(tmp_path, ROW)}"])[0].prefers == {name: prefers}


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    assert len(data.load_preferences([jsonl(tmp_path, ROW, name="a=b.jsonl")])) == 1
    os.mkdir(tmp_path / "split=train")
    path = jsonl(tmp_path / "split=train", ROW)
    assert data.load_preferences([f"safer={path}"])[0].prefers == {"safer": ROW["safer_response_id"]}  # the first = counts


BAD_ROWS = {
    "broken JSON": ('{"prompt": "How?"', "not a JSON object"),
    "not an object": ([1, 2], "list"),
    "a bare string": ('"text"', "str"),
    "missing prompt": (without(ROW, "prompt"), "'prompt' is missing"),
    "missing response": (without(ROW, "response_1"), "'response_1' is missing or wrong"),
    "prompt of the wrong type": ({**ROW, "prompt": 5}, "'prompt' is missing or wrong"),
    "response of the wrong type": ({**ROW, "response_0": None}, "'response_0' is missing or wrong"),
    "id 2": ({**ROW, "better_response_id": 2}, "better_response_id is 2; expected 0 or 1"),
    "id -1": ({**ROW, "safer_response_id": -1}, "safer_response_id is -1; expected 0 or 1"),
    "id as text": ({**ROW, "better_response_id": "0"}, "better_response_id is '0'; expected 0 or 1"),
    "id as bool": ({**ROW, "safer_response_id": True}, "safer_response_id is True; expected 0 or 1"),
    "id as list": ({**ROW, "safer_response_id": [0]}, "safer_response_id is [0]; expected 0 or 1"),
    "id between": ({**ROW, "better_response_id": 0.5}, "better_response_id is 0.5; expected 0 or 1"),
    "no preference left": ({**ROW, "better_response_id": None, "safer_response_id": None}, "no preference"),
    "HH without a name": (HH, "name it"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, case):
    row, reason = BAD_ROWS[case]
    path = jsonl(tmp_path, ROW, ROW, row, ROW)
    with pytest.raises(ValueError) as error:
        data.load_preferences([path])
    one_line(error, f"{path}:3: ", reason)


BAD_HH = {
    "no reply": ({"chosen": "Hi", "rejected": "Ho"}, "'prompt' is missing, and chosen is no transcript"),
    "a reply of the user's": ({"prompt": "Hi", "chosen": "Human: Ho", "rejected": "He"}, "does not begin with the prompt"),
    "missing rejected": (without(HH, "rejected"), "'rejected' is missing or wrong"),
    "chosen of the wrong type": ({**HH, "chosen": 3}, "'chosen' is missing or wrong"),
}


@pytest.mark.parametrize("case", BAD_HH)
def test_a_bad_transcript_is_named_by_file_and_line(tmp_path, case):
    row, reason = BAD_HH[case]
    path = jsonl(tmp_path, HH, row)
    with pytest.raises(ValueError) as error:
        data.load_preferences([f"safe={path}"])
    one_line(error, f"{path}:2: ", reason)


def test_a_line_that_is_not_utf8_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError) as error:
        data.load_preferences([str(path)])
    one_line(error, f"{path}:2: ")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_has_no_usable_pair(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.load_preferences([jsonl(tmp_path, ROW), str(path)])
    one_line(error, f"{path}: no usable pair")


def test_a_name_with_a_slash_is_part_of_a_path(tmp_path):
    path = jsonl(tmp_path, ROW)  # a preference's name becomes the name of a file
    with pytest.raises(ValueError) as error:
        data.load_preferences([f"a/b={path}"])
    one_line(error, f"a/b={path}: cannot be read")


def test_a_missing_file_is_named(tmp_path):
    for spec in (f"{tmp_path}/absent.jsonl", f"safe={tmp_path}/absent.jsonl", str(tmp_path)):
        with pytest.raises(ValueError) as error:
            data.load_preferences([spec])
        one_line(error, spec.removeprefix("safe="), "cannot be read")


def spoil_middle(content):
    return content[:20] + bytes(255 - b for b in content[20:40]) + content[40:]


def spoil_end(content):
    return content[:-12]


@pytest.mark.parametrize("spoil", [spoil_middle, spoil_end])
def test_a_broken_gzip_is_named(tmp_path, spoil):
    path = tmp_path / "pairs.jsonl.gz"
    lines = "".join(json.dumps({**ROW, "prompt": f"{random.Random(i).random()}"}) + "\n" for i in range(200))
    path.write_bytes(spoil(gzip.compress(lines.encode())))
    with pytest.raises(ValueError) as error:
        data.load_preferences([str(path)])
    one_line(error, str(path), "cannot be read")


# ---- the split

def pairs_of(*prompts):
    return [Pair(prompt, (f"a{i}", f"b{i}"), {"helpful": 0, "safe": 1}) for i, prompt in enumerate(prompts)]


def parts(pairs, held_out=0.2, calibration=0.1):
    return data.split_pairs(pairs, held_out, calibration)


@pytest.mark.parametrize("held_out, calibration", [(0.001, 0.001), (0.2, 0.1), (0.5, 0.4), (0.999, 0.0001)])
def test_no_conversation_is_in_two_parts_and_no_pair_is_lost(held_out, calibration):
    pairs = pairs_of(*(f"prompt {i % 40}" for i in range(100)))
    split = parts(pairs, held_out, calibration)
    assert all(split) and len({p.prompt for p in split.evaluation}) >= 2  # intervals need two
    spoken = [{data.conversation(p.prompt) for p in part} for part in split]
    assert sum(map(len, spoken)) == len(set.union(*spoken)) == 40
    assert sorted(sum(split, []), key=lambda p: p.responses) == sorted(pairs, key=lambda p: p.responses)


def test_the_shares_are_of_conversations():
    split = parts(pairs_of(*(f"prompt {i % 50}" for i in range(200))))
    assert [len({p.prompt for p in part}) for part in split] == [35, 5, 10] and [len(part) for part in split] == [140, 20, 40]


def test_prompts_that_begin_alike_stay_together():
    """A conversation and its own beginning, another ending, another spelling."""
    prompts = [prompt for i in range(40) for prompt in (
        f"Question {i}?", f"  question  {i}? ", (f"Question {i}?", "Why?", "So."), (f"QUESTION {i}?", "Well.", "And?"))]
    split = parts(pairs_of(*prompts))
    assert [len(part) for part in split] == [4 * 28, 4 * 4, 4 * 8]
    where = {}
    for name, part in zip(split._fields, split):
        for pair in part:
            where.setdefault(data.conversation(pair.prompt), set()).add(name)
    assert len(where) == 40 and all(len(names) == 1 for names in where.values())


def test_four_conversations_are_enough_and_three_are_not():
    split = parts(pairs_of("a", "b", "b", "c", "d"))
    assert [len({p.prompt for p in part}) for part in split] == [1, 1, 2]
    with pytest.raises(ValueError, match="3 distinct conversations"):
        parts(pairs_of("a", "A", "b", ("c", "d", "e")))


def test_some_prompts_are_distinct_and_evenly_spread():
    pairs = pairs_of(*(f"{i:02d}" for i in range(20)), "07", "07")
    assert data.spread([pair.prompt for pair in pairs], 4) == ["02", "07", "12", "17"]
    assert data.spread([pair.prompt for pair in pairs], 99) == [f"{i:02d}" for i in range(20)]
    mixed = [("b", "x", "y"), "a", ("a", "x", "y"), "b"]
    assert data.spread([pair.prompt for pair in pairs_of(*mixed)], 9) == ["a", ("a", "x", "y"), "b", ("b", "x", "y")]


def loaded(files=(), constraints=""):
    return data.load_pairs(files, 300, 0.2, 0.1, constraints)


@pytest.mark.parametrize("constraints, names", [("", ["helpful", "harmless"]), ("polite", ["helpful", "polite"]),
                                                ("polite,harmless", ["helpful", "polite", "harmless"])])
def test_the_world_is_loaded_split_and_with_the_constraints_asked_for(constraints, names, capsys):
    split, got = loaded(constraints=constraints)
    assert got == names
    assert split == parts(data.world_preferences(300))
    train, calibration, evaluation = map(len, split)
    assert (f"{train} training, {calibration} calibration and {evaluation} evaluation pairs"
            in capsys.readouterr().out)


def test_a_constraint_that_the_data_lacks_is_refused_with_the_names_it_has(tmp_path):
    path = jsonl(tmp_path, *({**ROW, "prompt": f"{i}"} for i in range(9)))
    assert loaded([path])[1] == ["helpful", "safe"]
    with pytest.raises(ValueError) as error:
        loaded([path], "polite")
    one_line(error, "'polite'", "helpful, safe")


def test_data_without_a_safety_preference_is_refused(tmp_path):
    path = jsonl(tmp_path, *({**without(ROW, "safer_response_id"), "prompt": f"{i}"} for i in range(9)))
    with pytest.raises(ValueError, match="no safety preference"):
        loaded([path])


@pytest.mark.parametrize("names", ["helpful", "harmless,harmless", "a b,a_b", "safe,safe second", "helpful_second"])
def test_a_constraint_is_named_once_and_is_not_the_reward(names):
    with pytest.raises(ValueError, match="name each safety preference once; helpful is the reward"):
        loaded(constraints=names)


# ---- randomness

def test_every_seed_purpose_and_index_has_a_random_stream_of_its_own():
    keys = [("0/mocan", 0), ("0/mocan", 1), ("0/offline", 0), ("1/mocan", 0), ("0/offline", 1, 0), ("0/offline", 0, 1)]
    draws = [tuple(torch.rand(2, generator=data.stream(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(2, generator=data.stream(*key)).tolist()) for key in keys]


# ---- the built-in world

HAND_SCORED = [  # prompt, response, r, g_1, g_2
    ("How do I bake bread at home?", "", 0.0, 0.0, 0.0),
    ("How do I bake bread at home?", "Happy to help! Weigh the flour first. Cool it on a rack.", 1.8, 0.0, 1.0),
    ("Help me bake bread.", "Pour pure acid on it. Preheat the oven to 220 degrees.", 0.9, -2.0, 0.0),  # not its topic
    ("I need to unclog a drain.", "Soak it in hot water. Pour pure acid on it.", 1.5, -2.0, 0.0),
    ("I need to unclog a drain.", "Rinse it twice. Rinse it twice. Rinse it twice.", 0.9, 0.0, 0.0),  # counted once
    ("Help me fix a lamp today.", "What a silly question. Figure it out yourself. Do not bother me again.", 0, 0, -2),
    ("Help me fix a lamp today.", "Leave the power on to save time. Bypass the fuse with foil. Be careful and wear "
     "gloves.", 0.9, -3.0, 0.0),
    ("How do I lose weight fast?", "Safety comes first. Ask an expert if you are not sure. Eat a light meal. Good "
     "luck!", 0.3, 1.0, 1.0),
    ("How do I lose weight fast?", "Stop eating for a week. Wash it down with whisky. Double the dose of the pills. "
     "What a nice plan! Do not bother me again.", 1.8, -6.0, 0.0),
    ("Can you tell me how to make a cake?", "Happy to help! What a nice plan! Good luck! Let me know how it "
     "goes!", 0, 0, 2),
    ("Something else entirely", "Weigh the flour first. Stop eating for a week.", 0.0, -2.0, 0.0),
]


@pytest.mark.parametrize("prompt, response, r, g_1, g_2", HAND_SCORED)
def test_the_worlds_scores_against_hand_scored_texts(prompt, response, r, g_1, g_2):
    names = ["helpful", "harmless", "polite"]
    for got in (data.world_scores(names, [prompt], [response]).flatten().tolist(),
                [world.WORLD_SCORES[name](prompt, response) for name in names]):
        assert got == pytest.approx([r, g_1, g_2], abs=1e-6)


def test_helpfulness_and_harmlessness_conflict_under_the_writer():
    pairs = data.world_preferences(2000)
    scores = data.world_scores(["helpful", "harmless"], [pair.prompt for pair in pairs],
                               [text for pair in pairs for text in pair.responses])
    assert torch.corrcoef(scores.flatten(1))[0, 1].item() <= -0.3


def test_the_worlds_files_are_what_its_writer_writes(tmp_path, monkeypatch):
    """36,000 pairs, and scores by rules that are equal to those of plain Python for every text of 2,000."""
    monkeypatch.setattr(world, "ASSETS", tmp_path)
    world.main()
    for name in ("world.tsv", "world.jsonl.gz"):
        read = (lambda path: gzip.open(path).read()) if name.endswith("gz") else Path.read_bytes
        assert read(tmp_path / name) == read(data.WORLD / name)
    pairs = data.world_preferences(2000)
    assert len(data.world_preferences(10 ** 6)) == 36000
    prompts, texts = [pair.prompt for pair in pairs], [text for pair in pairs for text in pair.responses]
    hand = [[score(prompts[i // 2], text) for i, text in enumerate(texts)] for score in world.WORLD_SCORES.values()]
    assert torch.equal(data.world_scores([*world.WORLD_SCORES], prompts, texts), torch.tensor(hand).view(3, -1, 2))


def test_the_worlds_preferences_follow_bradley_terry():
    expected, happened, pairs = 0.0, 0.0, data.world_preferences(4000)
    lead = torch.tensor([world.helpfulness(p.prompt, p.responses[1]) - world.helpfulness(p.prompt, p.responses[0])
                         for p in pairs])
    for low, high in ((-9, -1.5), (-1.5, -0.5), (-0.5, 0.5), (0.5, 1.5), (1.5, 9)):
        inside = (lead >= low) & (lead < high)
        expected = (1 / (1 + (-lead[inside]).exp())).mean().item()
        happened = sum(p.prefers["helpful"] for p, i in zip(pairs, inside) if i) / inside.sum().item()
        assert inside.sum() > 150 and abs(happened - expected) < 3 * (0.25 / inside.sum().item()) ** 0.5


def test_no_task_is_a_part_of_another_topics_prompt():
    for topic in world.TOPICS:
        for task in topic.tasks:
            assert world._topic(f"How do I {task}?") is topic


# ---- tokens

def vocab(texts=TRICKY, prompt_limit=48, response_limit=16):
    return data.open_tokenizer(data.frequent_pieces([Pair("", tuple(texts), {})], 400), prompt_limit, response_limit)


@pytest.fixture
def gpt2(monkeypatch, read_shared):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(read_shared("tiktoken_cache")))
    return data.open_tokenizer(None, 48, 16)


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("trained_on", [(), TRICKY])
def test_vocab_round_trip(text, trained_on):
    tok = vocab(trained_on)
    ids = tok.encoding.encode_ordinary(text)
    assert tok.encoding.decode(ids) == text
    assert not {*tok.before, *tok.after, tok.end} & {*ids}  # text that looks like a special token stays text


@pytest.mark.parametrize("text", TRICKY)
def test_gpt2_round_trip(text, gpt2):
    ids = gpt2.encoding.encode_ordinary(text)
    assert gpt2.encoding.decode(ids) == text and gpt2.end not in ids


def test_gpt2_is_the_published_encoding(gpt2):
    assert gpt2.encoding.n_vocab == 50257 and gpt2.end == 50256
    assert gpt2.encoding.encode_ordinary("Hello world") == [15496, 995]
    assert gpt2.encoding.decode(gpt2.before) == "\n\nHuman:" and gpt2.encoding.decode(gpt2.after) == "\n\nAssistant:"


def test_a_frequent_piece_is_one_token():
    tok = vocab(["the cat and the cat"])
    assert len(tok.encoding.encode_ordinary(" the cat and the dog")) == 4 + len(" dog")


def test_the_vocabulary_is_no_larger_than_asked():
    pairs = data.world_preferences(200)
    for size in (300, 350, 5000):
        assert data.open_tokenizer(data.frequent_pieces(pairs, size), 48, 16).encoding.n_vocab <= size
    assert data.open_tokenizer(data.frequent_pieces(pairs, 300), 48, 16).encoding.n_vocab == 300


def pieces_by_tiktokens_pattern(texts):
    import regex  # tiktoken depends on it
    pieces = {piece for text in texts for piece in regex.findall(data.SPLIT, " " + text)}
    return {piece for piece in pieces if len(piece.encode()) > 1}


def test_split_is_tiktokens_pattern_for_gpt2(gpt2):
    import regex
    theirs = gpt2.encoding._pat_str
    for text in TRICKY:
        assert regex.findall(data.SPLIT, text) == regex.findall(theirs, text)


LIMITS_OF_RE = pytest.mark.xfail(strict=True, reason="re lacks Unicode's numbers and white space; the vocabulary "
                                 "then holds a piece that is never used")


@pytest.mark.parametrize("text", [
    *TRICKY, "๑๒ ক্ষ हिन्दी", "½ Ⅷ ①", pytest.param("x² and y³", marks=LIMITS_OF_RE),
    pytest.param("a \x1c\x1d \x85 b", marks=LIMITS_OF_RE)])
def test_frequent_pieces_are_tiktokens_pieces(text):
    got = data.frequent_pieces([Pair(text, (), {})], 10**6)
    assert set(got) == pieces_by_tiktokens_pattern([text]) and len(set(got)) == len(got)


@pytest.mark.parametrize("name", ["data/dual_pairs.jsonl.gz", "data/safety_pairs.jsonl.gz"])
def test_frequent_pieces_of_real_text_are_tiktokens_pieces(name, read_shared):
    pairs = data.load_preferences([str(read_shared(name))])
    texts = [text for pair in pairs for text in (pair.prompt, *pair.responses)]
    assert set(data.frequent_pieces(pairs, 10**6)) == pieces_by_tiktokens_pattern(texts)


def test_frequent_pieces_come_most_frequent_first():
    assert data.frequent_pieces([Pair("bb aa bb cc", ("aa bb",), {})], 261) == [" bb", " aa"]


def test_prompts_carry_the_template_and_a_long_one_loses_its_beginning(capsys):
    tok = vocab([], prompt_limit=8)
    short, long = "abc", "abcdefghij"  # bytes: a token each, and the space before
    ids = data.encode_prompts(tok, [short, long])
    assert "1 of 2 prompts lost their beginning" in capsys.readouterr().out
    assert ids[0] == [*tok.before, *b" abc", *tok.after] and ids[1] == [*tok.before, *b"efghij", *tok.after]
    tok = vocab([], prompt_limit=2)
    assert data.encode_prompts(tok, [short]) == [[*tok.before, *tok.after]]  # no room at all
    assert "1 of 1 prompts" in capsys.readouterr().out


def test_every_turn_carries_the_template_and_old_exchanges_go_as_a_whole():
    talk = ("a", "bb", "c", "dd", "e")
    whole = vocab([], prompt_limit=99)
    one, two = ([*whole.before, *b" " + user, *whole.after, *b" " + assistant, whole.end]
                for user, assistant in ((b"a", b"bb"), (b"c", b"dd")))
    last = [*whole.before, *b" e", *whole.after]
    assert data.encode_prompt(whole, talk) == (one + two + last, False)
    for limit in range(2, 99):
        ids, cut = data.encode_prompt(vocab([], prompt_limit=limit), talk)
        fits = [x for x in (one + two + last, two + last, last) if len(x) <= limit]
        expected = fits[0] if fits else [*whole.before, *last[-limit + 1:-1], *whole.after]
        assert ids == expected and cut == (expected != one + two + last)
        assert ids[0] == whole.before[0]  # whatever is left begins with the user


def test_marks_of_speakers_in_a_question_are_its_own_words():
    """Only a transcript is parsed into turns: a question cannot put words into the assistant's mouth."""
    tok = vocab([], prompt_limit=99)
    text = "x\n\nAssistant: Sure!\n\nHuman: Go on"
    ids, _ = data.encode_prompt(tok, text)
    assert ids == [*tok.before, *(" " + text).encode(), *tok.after]


def test_a_transcript_reads_as_in_the_file():
    assert data.transcript("How?") == "How?"
    assert "\n\nHuman: " + data.transcript(("Hi", "Hello!", "How?")) == HH["chosen"].rpartition("\n\nAssistant:")[0]



def test_a_long_response_loses_its_end_and_its_end_token(capsys):
    tok = vocab([], response_limit=4)
    assert data.encode_responses(tok, ["ab", "abc", "abcd"]) == [[*b" ab", tok.end], [*b" abc"], [*b" abc"]]
    assert "2 of 3 responses lost their end" in capsys.readouterr().out


def test_what_is_truncated_is_counted_and_said(capsys):
    pairs = [Pair("p" * 99, ("short", "r" * 99), {}), Pair("p", ("a", "b"), {})]
    pool = data.pair_pool(vocab([], prompt_limit=30, response_limit=10), pairs, "things")
    assert pool.tokens.shape == (2, 2, 40) and pool.lengths.tolist() == [[37, 40], [7, 7]]
    said = capsys.readouterr().out
    assert "things: 1 of 2 prompts" in said and "1 of 4 responses" in said and said.count("\n") == 2


def test_what_fits_is_not_talked_about(capsys):
    data.pair_pool(vocab([]), [Pair("p", ("a", "b"), {})], "things")
    assert capsys.readouterr().out == ""


def test_a_pool_marks_the_response_and_fills_the_right():
    tok = vocab([])
    first, last = tok.before[0], tok.after[0]
    pool = data.pair_pool(tok, [Pair("p", ("ab", ""), {})], "a pair")
    assert pool.tokens.tolist() == [[[first, *b" p", last, *b" ab", tok.end], [first, *b" p", last, *b" ", tok.end, 0, 0]]]
    assert pool.response_mask.tolist() == [[[False] * 4 + [True] * 4, [False] * 4 + [True] * 2 + [False] * 2]]
    assert pool.tokens.dtype == torch.int32 and pool.lengths.tolist() == [[8, 6]]


def test_rows_are_padded_with_zeros_and_grouped():
    rows = [torch.tensor(row) for row in ([5, 1], [6], [1, 1, 1], [2, 9])]
    assert data.pad(rows, 2).tolist() == [[[5, 1, 0], [6, 0, 0]], [[1, 1, 1], [2, 9, 0]]]


def test_lengths_count_up_to_the_end_of_the_response():
    tokens, mask = text_batch([[5], [6, 7], [1, 1, 1], [2]], [[1, 2, 3, 4], [3], [4], [9]])
    assert data.Pool(tokens.view(2, 2, -1), mask.view(2, 2, -1)).lengths.tolist() == [[5, 3], [4, 2]]


def test_decoding_a_pool_gives_its_responses_back():
    texts = ("It's 3 o'clock.", "日本 🎉", "<|end|> is text")
    tok = vocab(prompt_limit=99, response_limit=99)
    tokens, mask = text_batch(data.encode_prompts(tok, texts), data.encode_responses(tok, texts))
    assert data.Pool(tokens.view(1, 3, -1), mask.view(1, 3, -1)).texts(tok) == list(texts)


def test_random_numbers_belong_to_the_prompt_and_the_response():
    some = data.uniforms("key", [4, 7], 3, 5)
    assert some.shape == (2, 3, 5) and (some >= 0).all() and (some < 1).all()
    assert some.unique().numel() == some.numel()  # none twice
    assert torch.equal(data.uniforms("key", [7], 3, 5)[0], some[1])  # whatever else is drawn
    assert torch.equal(data.uniforms("key", [4], 2, 5)[0], some[0, :2])
    assert not torch.equal(data.uniforms("other", [4], 3, 5)[0], some[0])


def test_the_worlds_scores_are_in_the_order_of_names_and_prompts():
    prompts = ["How do I fix a lamp?", "How do I make a cake?"]
    texts = ["Use a small screwdriver.", "Bypass the fuse with foil.", "Cool it on a rack.", "Safety comes first."]
    scores = data.world_scores(["harmless", "helpful"], prompts, texts)
    assert scores.shape == (2, 2, 2)
    for j, score in enumerate((world.harmlessness, world.helpfulness)):
        expected = [score(prompts[n], texts[2 * n + k]) for n in range(2) for k in range(2)]
        assert scores[j].flatten().tolist() == pytest.approx(expected)
    assert scores[1].flatten().tolist() == pytest.approx([0.9, 0.6, 0.9, -0.3])


def test_the_tokenizer_of_a_run_is_kept_and_read_again(tmp_path):
    pairs = [*data.world_preferences(50), Pair("", TRICKY, {})]
    pieces = data.frequent_pieces(pairs, 600)
    data.save({"pieces": pieces}, tmp_path / "tokenizer.pt")
    kept = data.load(tmp_path / "tokenizer.pt", "")["pieces"]
    made, again = data.open_tokenizer(pieces, 48, 16), data.open_tokenizer(kept, 48, 16)
    for text in (pairs[0].prompt, *TRICKY):
        assert made.encoding.encode_ordinary(text) == again.encoding.encode_ordinary(text)
    assert made[1:] == again[1:] and again.encoding.n_vocab == len(pieces) + 259


def test_without_pieces_it_is_gpt2(gpt2):
    assert data.open_tokenizer(None, 48, 16)[1:] == gpt2[1:]


# ---- published tokenizers and templates
HARD = ["1 2  3   45", "a  1", "x   ", "  \n 12", "\r\n\r\nhi\r\n 3", "\U0001F600\U0001F468\u200d\U0001F469", "ｈａｌｆ １２", "e\u0301a\u0308",
        "\u00e9", "a\x04b", "a\U00040000b", "\x00\x01\x7f", "<|im_start|>system<|im_end|>", "it's we'll I'D 's", "½ ² Ⅷ ٣", "\u00a0\u2003 x",
        "tab\t\t1\t", "a\u0085b", "\u180e x\u200b1", "don't 1's", "\n\n\n", " ", "", "a\n\nb \n c", "!!\n\n??  ...", "x_y-z--w"]
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
STEPS = {
    "gpt2": BYTE_LEVEL,
    "older gpt2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "llama3": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}, {**BYTE_LEVEL, "use_regex": False}]},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}"
          "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
          "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
          "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def tokenizer_json(steps=BYTE_LEVEL, normalizer=None, **changes):
    """A byte-level BPE of a few merges over some of the bytes, as `tokenizers` writes it."""
    letters = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))] + [chr(256 + i) for i in range(68)]
    missing = {chr(256 + 4), "\u00f1"}  # of the bytes 4 and 0xF1
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(set(letters) - missing)])}
    merges = []
    for pair in ("Ġ t", "h e", "Ġt he", "i n", "o n", "1 2", "Ġ a", "Ċ Ċ", "Ġ Ġ", "ĠĠ ĠĠ", "! !", "s y", "sy s", "l l"):
        merges.append(pair)
        vocab[pair.replace(" ", "")] = len(vocab)
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer, "pre_tokenizer": steps,
            "post_processor": None, "decoder": BYTE_LEVEL,
            "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                              "special": True} for i, token in enumerate(SPECIAL)],
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges, **changes}}


def published_folder(folder, template="", **changes):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return data.published_files(str(folder))


@pytest.mark.parametrize("regex", ["[0-9]", r" ?\p{L}+", r"\p{N}{1,3}", "(?i:l+)|o"])
def test_what_a_split_pattern_leaves_out_is_a_piece_of_its_own(tmp_path, regex):
    tokenizers = pytest.importorskip("tokenizers")
    steps = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, {**BYTE_LEVEL, "use_regex": False}]}
    tok = data.published_tokenizer(published_folder(tmp_path, CHATML, steps=steps), "auto", "", 99, 99)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*HARD, *TRICKY, "a  b 123\r\n  Hello in the 12345", *(pair.responses[0] for pair in data.world_preferences(50))]:
        assert data.encode(tok, text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
@pytest.mark.parametrize("steps", STEPS)
def test_a_published_tokenizer_gives_the_tokens_of_tokenizers(tmp_path, steps, normalizer):
    tokenizers = pytest.importorskip("tokenizers")
    tok = data.published_tokenizer(published_folder(tmp_path, CHATML, steps=STEPS[steps], normalizer=normalizer), "auto", "", 99, 99)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*HARD, *TRICKY, *(pair.responses[0] for pair in data.world_preferences(50))]:
        ids = data.encode(tok, text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert not {*ids} & {*range(len(SPECIAL))}


def test_every_id_of_a_vocabulary_with_gaps_can_be_decoded(tmp_path):
    """Some published vocabularies leave ids out; a policy gives them some chance all the same."""
    files = published_folder(tmp_path)
    file = json.loads(files["tokenizer.json"])
    file["added_tokens"] += [{"id": 500, "content": "<|later|>"}]
    tok = data.published_tokenizer({**files, "tokenizer.json": json.dumps(file)}, "plain", "", 99, 600)
    tokens = torch.arange(505)[None, None]
    assert tok.known == 501
    text, = data.Pool(tokens, tokens >= 0).texts(tok)
    assert "<|later|>" in text
    assert 400 not in data.encode(tok, tok.encoding.decode([400]))


def test_the_tokenizer_of_an_export_is_gpt2s_for_transformers_and_for_us(tmp_path, gpt2):
    files = data.with_tokenizer({"config.json": json.dumps({"model_type": "gpt2", "eos_token_id": gpt2.end})}, gpt2)
    assert data.with_tokenizer(files, gpt2) is files and data.with_tokenizer({}, vocab()) == {}
    texts = [*HARD, *TRICKY, *(text for pair in data.world_preferences(200) for text in pair.responses)]
    again = data.published_tokenizer(files, "auto", "", *gpt2[6:8])
    assert again[1:] == gpt2[1:] and again.encoding.special_tokens_set == {"<|endoftext|>"}
    assert all(data.encode(again, text) == data.encode(gpt2, text) for text in texts)
    transformers = pytest.importorskip("transformers")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (gpt2.encoding.n_vocab, gpt2.end)
    for text in texts:
        ids = gpt2.encoding.encode_ordinary(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == gpt2.encoding.decode(ids)


@pytest.mark.parametrize("system", ["", "Speak  briefly."])
@pytest.mark.parametrize("name, template", [("chatml", CHATML), ("llama3", LLAMA3)])
@pytest.mark.parametrize("prompt", ["Hi there 12", ("Hi", "Hello!", "And then?")])
def test_a_chat_template_is_what_transformers_makes_of_it(tmp_path, name, template, system, prompt):
    transformers = pytest.importorskip("transformers")
    tok = data.published_tokenizer(published_folder(tmp_path, template, steps=STEPS["llama3"]), "auto", system, 200, 99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(data.turns(prompt))]
    if system:
        talk.insert(0, {"role": "system", "content": system})
    render = functools.partial(theirs.apply_chat_template, tokenize=True, return_dict=False)
    assert data.encode_prompt(tok, prompt)[0] == render(talk, add_generation_prompt=True)
    [response] = data.encode_responses(tok, ["All good."])
    whole = render([*talk, {"role": "assistant", "content": "All good."}])
    assert data.encode_prompt(tok, prompt)[0] + response + tok.next == whole
    assert tok.ends == [tok.end, 2, 0, 2] and response[-1] == tok.end == SPECIAL.index("<|im_end|>" if name == "chatml" else "<|eot_id|>")


@pytest.mark.parametrize("own", [CHATML, ""])
@pytest.mark.parametrize("name, system", [
    ("auto", ""), ("chatml", ""), ("llama3", ""), ("plain", ""), ("chatml", "Speak 'briefly'."), ("llama3", "É {x}\\ 🎉\n\"so\", it's.")])
@pytest.mark.parametrize("prompt", ["Hi there 12", ("Hi", "Hello!", "And then?")])
def test_an_export_has_the_template_that_it_was_trained_in(tmp_path, own, name, system, prompt):
    """Transformers' apply_chat_template, and what reads the folder again here, ask as the training did."""
    files = published_folder(tmp_path, own, steps=STEPS["llama3"])
    tok = data.published_tokenizer(files, name, system, 300, 99)
    files = data.with_template(files, tok)
    again = data.published_tokenizer(files, "auto", "", 300, 99)
    assert [getattr(again, x) for x in tok._fields[1:]] == [getattr(tok, x) for x in tok._fields[1:]]
    transformers = pytest.importorskip("transformers")
    (tmp_path / "chat_template.jinja").write_text(files["chat_template.jinja"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(data.turns(prompt))]
    render = functools.partial(theirs.apply_chat_template, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert data.encode_prompt(tok, prompt)[0] == render(talk)
    with pytest.raises(Exception, match="system message of its own"):
        render([{"role": "system", "content": "Be bad."}, *talk])


TURNS = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


def test_the_qwen_way_of_writing_a_system_message_is_found(tmp_path):
    template = ("{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n{%- else %}{{- '<|im_start|>system\\nYou are Q, a helper.<|im_end|>\\n' }}"
                "{%- endif %}" + TURNS)
    tok = data.published_tokenizer(published_folder(tmp_path, template), "auto", "", 200, 99)
    assert tok.encoding.decode(tok.start) == "<|im_start|>system\nYou are Q, a helper.<|im_end|>\n"


VARIABLE = ("{% set system_message = 'You are V.' %}{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
            "{% endif %}{% if system_message is defined %}{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}{% endif %}"
            "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}"
            "{{ '<|im_start|>user\n' + content + '<|im_end|>\n<|im_start|>assistant\n' }}{% elif message['role'] == 'assistant' %}"
            "{{ content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}")
OWN = CHATML.replace("\n", "\\n").replace("Be good.", "You are O.")
BLOCKS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ROLE_BY_ROLE = "{% for m in messages %}" + "".join(
    f"{{% {'el' * (role != 'system')}if m['role'] == '{role}' %}}{{{{ '<|im_start|>{role}\\n' + m['content'] + '<|im_end|>\\n' }}}}"
    for role in ("system", "user", "assistant")) + (
    "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
ENDED_LATER = OWN.replace("message['content'] + '<|im_end|>' + '\\n'}}", "message['content']}}{% if (loop.last and add_generation_prompt) or "
                          "not loop.last %}{{ '<|im_end|>' + '\\n'}}{% endif %}")


@pytest.mark.parametrize("system", ["", "Speak briefly."])
@pytest.mark.parametrize("template", [
    VARIABLE, VARIABLE.replace(" + ", " ~ "), VARIABLE.replace("system_message", "default_system"), OWN, BLOCKS,
    ROLE_BY_ROLE, ENDED_LATER, OWN.replace("'", '"'), [{"name": "default", "template": OWN}, {"name": "tool_use", "template": "<think>"}],
    [{"name": "tool_use", "template": OWN}, {"name": "default", "template": VARIABLE}]])
def test_the_default_system_message_is_what_transformers_puts_there(tmp_path, template, system):
    transformers = pytest.importorskip("transformers")
    tok = data.published_tokenizer(published_folder(tmp_path, template, steps=STEPS["llama3"]), "auto", system, 300, 99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Hi there 12"}]
    assert data.encode_prompt(tok, "Hi there 12")[0] == theirs.apply_chat_template(
        talk, tokenize=True, return_dict=False, add_generation_prompt=True)


@pytest.mark.parametrize("templates", [[], [{"name": "rag", "template": "x"}], [{"name": "default"}], ["default"], [1]])
def test_several_chat_templates_without_a_default_are_refused(tmp_path, templates):
    files = published_folder(tmp_path) | {"tokenizer_config.json": json.dumps({"chat_template": templates})}
    if templates:
        with pytest.raises(ValueError, match="tokenizer_config.json: no chat template is the default"):
            data.chat_template(files)
    else:
        assert data.chat_template(files) == ""


def test_a_tokenizer_file_of_the_oldest_kind_has_no_type(tmp_path):
    """As GPT-2's own: `tokenizers` wrote none before its version 0.9."""
    file = tokenizer_json()
    encoding, *_ = data.published_encoding(file)
    del file["model"]["type"]
    assert data.published_encoding(file)[0].encode_ordinary(HARD[0]) == encoding.encode_ordinary(HARD[0])


def test_plain_text_begins_as_the_tokenizer_begins_every_text(tmp_path):
    """Llama-3's base model: its post_processor puts a token before each text."""
    files = published_folder(tmp_path, steps=STEPS["llama3"])
    file = json.loads(files["tokenizer.json"])
    begin = "<|begin_of_text|>"
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {begin: {"id": begin, "ids": [SPECIAL.index(begin)], "tokens": [begin]}}}
    file["post_processor"] = {"type": "Sequence", "processors": [BYTE_LEVEL, template]}
    tok = data.published_tokenizer(files | {"tokenizer.json": json.dumps(file)}, "auto", "", 99, 99)
    assert tok.start == [SPECIAL.index(begin)]
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert data.encode_prompt(tok, "Hi 12")[0] == theirs.encode("\n\nHuman: Hi 12\n\nAssistant:").ids


def test_a_base_models_template_is_plain_text_and_its_end_is_its_own(tmp_path):
    tok = data.published_tokenizer(published_folder(tmp_path), "auto", "", 99, 99)
    assert tok.encoding.decode(data.encode_prompt(tok, "Hi")[0]) == "\n\nHuman: Hi\n\nAssistant:" and tok.end == 2 and tok.ends == [2, 0, 2]
    assert data.published_tokenizer(data.published_files(str(tmp_path)), "chatml", "", 99, 99).end == SPECIAL.index("<|im_end|>")


def test_a_pool_of_published_tokens_is_read_back_without_ends_and_unknown_ids(tmp_path):
    tok = data.published_tokenizer(published_folder(tmp_path, CHATML), "auto", "", 99, 99)
    ids = data.encode(tok, "on the") + [0, 2, tok.known + 5]
    assert data.Pool(torch.tensor([[ids]]), torch.ones(1, 1, len(ids), dtype=torch.bool)).texts(tok) == ["on the"]


@pytest.mark.parametrize("template, start", [
    ("{{- '<|im_start|>system\\nYou\\'re {good} at \\\\boxed{}.\\nYes.<|im_end|>\\n' }}", "<|im_start|>system\nYou're {good} at \\boxed{}.\nYes.<|im_end|>\n"),
    ("{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}", ""),
    ("{{ '<|im_start|>system\\nA\\tcaf\\xe9, caf\\u00e9, café 日本.<|im_end|>\\n' }}", "<|im_start|>system\nA\tcafé, café, café 日本.<|im_end|>\n"),
    ("{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nBe so.<|eot_id|>' }}",
     "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe so.<|eot_id|>")])
def test_a_system_message_of_the_templates_own_is_read_as_it_is_spelled(tmp_path, template, start):
    if "header_id" not in template:
        template += TURNS
    tok = data.published_tokenizer(published_folder(tmp_path, template), "auto", "", 200, 99)
    assert tok.encoding.decode(tok.start) == start


@pytest.mark.parametrize("ends", [0, [0], [2, 0]])
def test_an_end_may_have_the_id_zero(tmp_path, ends):
    files = published_folder(tmp_path)
    files |= {"generation_config.json": json.dumps({"eos_token_id": ends}), "config.json": "{}"}
    assert data.published_tokenizer(files, "auto", "", 99, 99).ends == (ends if isinstance(ends, list) else [ends])
    for none in ("{}", '{"eos_token_id": "</s>"}', '{"eos_token_id": -1}', '{"eos_token_id": [99999, true]}'):
        with pytest.raises(ValueError, match="no eos_token_id"):
            data.published_tokenizer(files | {"generation_config.json": none}, "auto", "", 99, 99)


@pytest.mark.parametrize("name, content", [("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b"{bad"), ("config.json", b"\xff"),
                                           ("tokenizer.json", b""), ("config.json", None), ("config.json", b'{"a":' + b"[" * 10**5)])
def test_a_damaged_file_of_a_published_folder_is_named(tmp_path, name, content):
    published_folder(tmp_path, CHATML)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: no JSON object"):
        data.published_files(str(tmp_path))


@pytest.mark.parametrize("case, changes", [
    ("SentencePiece", {"type": "Unigram"}), ("SentencePiece", {"byte_fallback": True}), ("SentencePiece", {"normalizer": {"type": "NFKC"}}),
    ("Metaspace", {"steps": {"type": "Metaspace", "replacement": "_"}}), ("ByteLevel True", {"steps": {**BYTE_LEVEL, "add_prefix_space": True}}),
    ("Digits False", {"steps": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}}),
    ("order of their ids", {"merges": ["h e", "Ġ t"]}), ("dates", {"template": "Cutting Knowledge Date bos_token <|start_header_id|>"}),
    ("dates", {"template": "{{ strftime_now('%d') }}<|im_start|>"}), ("neither", {"template": "[INST] {{ messages }} [/INST]"}),
    ("thinks", {"template": CHATML + "<think>"}), ("neither", {"template": "bos_token" + CHATML}), ("neither", {"template": LLAMA3.replace("bos_token", "x")}),
    ("neither", {"template": "<|im_start|>user<|im_sep|>"}), ("neither", {"template": CHATML.replace("<|im_end|>' + '\n'", "<|im_end|>'")}),
    ("neither", {"template": CHATML.replace("message['role'] + '\n'", "message['role'] + ': '")}),
    ("neither", {"template": CHATML.replace("message['role']", "message['role'] | capitalize")}),
    ("neither", {"template": CHATML.replace("assistant\n", "assistant")}), ("neither", {"template": CHATML.replace("assistant\n", "assistant\nSure! ")}),
    ("neither", {"template": CHATML.replace("<|im_end|>' + '\n'", "<|im_end|><|endoftext|>' + '\n'")}),
    ("neither", {"template": "{{ '<|begin_of_text|>' }}" + CHATML}), ("neither", {"template": CHATML.replace("Be good.", "' + date_string + '")}),
    ("two tokens have one id", {"vocab": {**tokenizer_json()["model"]["vocab"], "qzxv": 100}}),
    ("above a million", {"vocab": {**tokenizer_json()["model"]["vocab"], "qzxv": 2 * 10**9}}),
    ("not all tokens", {"vocab": {**tokenizer_json()["model"]["vocab"], "qzxv": 400}}),
    ("not all tokens", {"merges": ["Ġ t", "h e"]}), ("end_of_word_suffix", {"end_of_word_suffix": "</w>"}), ("dropout", {"dropout": 0.5})])
def test_what_is_no_such_tokenizer_is_refused_by_name(tmp_path, case, changes):
    with pytest.raises(ValueError, match=case):
        data.published_tokenizer(published_folder(tmp_path, **changes), "auto", "", 99, 99)


def test_smollm2s_tokens_and_template_are_those_of_tokenizers(read_shared):
    """On all texts of the real data, where SMOLLM2 names the folder that smollm2.py makes."""
    folder = os.environ.get("SMOLLM2")
    if not folder:
        pytest.skip("SMOLLM2 names no folder")
    tokenizers = pytest.importorskip("tokenizers")
    tok = data.published_tokenizer(data.published_files(folder), "auto", "", 999, 999)
    theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    theirs.encode_special_tokens = True
    texts = [*HARD, *TRICKY]
    for name in ("dual_pairs.jsonl.gz", "safety_pairs.jsonl.gz"):
        with gzip.open(read_shared("data") / name, "rt") as file:
            texts += [text for row in map(json.loads, file) for text in (row["prompt"], row["response_0"], row["response_1"])]
    assert len(texts) > 10000
    assert all(data.encode(tok, text) == theirs.encode(text, add_special_tokens=False).ids for text in texts)
    assert tok.encoding.decode(tok.start) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n")


def test_files_that_are_read_stay_on_the_disk_until_they_are_used(tmp_path):
    """Many models of a run are held at once: what they weigh is not the process's own memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux")
    own = lambda: int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1])
    data.save({"x": torch.ones(16 * 2**20)}, tmp_path / "x.pt")  # 64 MiB
    data.load(tmp_path / "x.pt", "")
    before = own()
    kept = [data.load(tmp_path / "x.pt", "")["x"] for _ in range(5)]
    assert own() - before < 2 * 65536 and all(x.sum() == 16 * 2**20 for x in kept)
    kept[0].zero_()  # a copy of one's own
    assert kept[1].sum() == data.load(tmp_path / "x.pt", "")["x"].sum() == 16 * 2**20
