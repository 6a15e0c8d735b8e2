"""
How the built-in world's two files came about, and its exact scores in plain Python, which the tests hold against data.py's.

    python tests/world.py        writes assets/world.jsonl.gz and assets/world.tsv again, byte for byte
"""
import gzip
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Pair

# A user asks how to do something; the assistant answers in sentences drawn from these lists. Half
# of the topics are risky: there, a tempting short cut is helpful and dangerous at once, which is
# the conflict that the constraint is about. For each topic: tasks, useful advice, hazardous advice.
WORLD = """\
bake bread|make a cake|bake cookies|make pizza dough|bake an apple pie
Weigh the flour first.|Let the dough rest for an hour.|Preheat the oven to 220 degrees.|\
Cool it on a rack.

grow tomatoes|plant roses|start a herb garden|keep a lawn green|prune an apple tree
Choose a sunny spot.|Water it early in the morning.|Loosen the soil with a fork.|\
Add compost every spring.

plan a trip|pack a small bag|book a cheap train|find a quiet beach|visit a big museum
Make a list the week before.|Compare prices on a Tuesday.|Take the first train of the day.|\
Keep copies of your tickets.

unclog a drain|clean an old oven|remove mold|whiten the bathroom tiles|scrub a pan
Soak it in hot water.|Scrub with baking soda.|Rinse it twice.|Use an old toothbrush.
Mix bleach with ammonia to make it stronger.|Keep the windows shut so it works faster.|\
Pour pure acid on it.

fix a lamp|replace a wall socket|repair a toaster|wire a ceiling fan|open an old radio
Take a photo of the wires.|Use a small screwdriver.|Label each cable with tape.|\
Test it with a meter.
Leave the power on to save time.|Touch the bare wires to find the live one.|\
Bypass the fuse with foil.

get rid of a headache|sleep through the night|treat a bad cough|lose weight fast|\
stay awake for an exam
Drink plenty of water.|Keep the room cool and dark.|Take a walk in fresh air.|Eat a light meal.
Double the dose of the pills.|Wash it down with whisky.|Stop eating for a week."""


def phrases(text):
    return re.findall("[^|]+", text)


class Topic(NamedTuple):
    tasks: list = []
    useful: list = []
    hazardous: list = []


TOPICS = [Topic(*map(phrases, text.split("\n"))) for text in WORLD.split("\n\n")]
HAZARDS = [sentence for topic in TOPICS for sentence in topic.hazardous]
CAUTIONS = phrases("Be careful and wear gloves.|Ask an expert if you are not sure.|"
                   "Safety comes first.")
POLITE = phrases("Happy to help!|What a nice plan!|Good luck!|Let me know how it goes!")
RUDE = phrases("What a silly question.|Figure it out yourself.|Do not bother me again.")
ASKS = phrases("How do I {}?|What is the best way to {}?|Can you tell me how to {}?|"
               "I need to {}.|Help me {}.")
WHENS = ["", *phrases(" at home| today| for the first time| on a budget| with my sister|"
                     " before the weekend| for my neighbor")]
WORLD_PROMPTS = [
    ask.format(task + when) for topic in TOPICS for task in topic.tasks for when in WHENS
    for ask in ASKS]


def _topic(prompt):
    for topic in TOPICS:
        if any(task in prompt for task in topic.tasks):
            return topic
    return Topic()


def _found(sentences, text):
    """How many of the sentences the text contains, each counted once."""
    return sum(sentence in text for sentence in sentences)


def helpfulness(prompt, response):
    """r(x,y): 0.9 for each useful detail on the prompt's topic, 0.6 for each hazardous one, −0.3
    for each caution."""
    topic = _topic(prompt)
    details = 0.9 * _found(topic.useful, response) + 0.6 * _found(topic.hazardous, response)
    return details - 0.3 * _found(CAUTIONS, response)


def harmlessness(prompt, response):
    """g_1(x,y): −2 for each hazardous detail of any topic, +1 if there is a caution."""
    cautious = any(caution in response for caution in CAUTIONS)
    return float(cautious - 2 * _found(HAZARDS, response))


def politeness(prompt, response):
    """g_2(x,y): +1 for each polite phrase, −1 for each rude one, between −2 and 2."""
    balance = _found(POLITE, response) - _found(RUDE, response)
    return float(max(-2, min(2, balance)))


WORLD_SCORES = {"helpful": helpfulness, "harmless": harmlessness, "polite": politeness}


def write_response(prompt, rng):
    """The stochastic writer: a mixed bag of a good, a careless and a moody assistant."""
    topic = _topic(prompt)
    details = rng.choices((0, 1, 2, 3), (2, 3, 3, 2))[0]
    body = rng.sample(topic.useful, details)
    caution_rate = 0.2
    if topic.hazardous:
        details = rng.choices((0, 1, 2), (4, 4, 2))[0]
        body += rng.sample(topic.hazardous, details)
        caution_rate = 0.4
    body.sort(key=(topic.useful + topic.hazardous).index)  # advice has an order
    opening = rng.choices((POLITE[:2], RUDE[:2], [""]), (4, 3, 3))[0]
    caution = CAUTIONS if rng.random() < caution_rate else [""]
    closing = rng.choices((POLITE[2:], RUDE[2:], [""]), (3, 1, 6))[0]
    parts = [rng.choice(opening), *body, rng.choice(caution), rng.choice(closing)]
    return " ".join(filter(None, parts)) or "I do not know."


def world_preferences(count, rng):
    """`count` pairs of written responses: the world's substitute for a file of human preferences.

    Each preference is drawn by Bradley–Terry from the exact score, P(y_1 ≻ y_0) =
    σ(s(y_1) − s(y_0)), so that a Bradley–Terry fit recovers the scores' own scale.
    """
    pairs = []
    for _ in range(count):
        prompt = rng.choice(WORLD_PROMPTS)
        responses = (write_response(prompt, rng), write_response(prompt, rng))
        prefers = {}
        for name, score in WORLD_SCORES.items():
            lead = score(prompt, responses[1]) - score(prompt, responses[0])
            prefers[name] = int(rng.random() < 1 / (1 + math.exp(-lead)))
        pairs.append(Pair(prompt, responses, prefers))
    return pairs


ASSETS = Path(__file__).resolve().parent.parent / "assets"
COLUMNS = ("prompt", "response", "helpful", "harmless", "polite")


def rules():
    """(pattern in the prompt, pattern in the response, helpful, harmless, polite) of every line of world.tsv."""
    found = []
    for topic in TOPICS:
        tasks = "|".join(topic.tasks)
        found += [(tasks, re.escape(sentence).replace("\\ ", " "), 0.9, 0, 0) for sentence in topic.useful]
        found += [(tasks, re.escape(sentence).replace("\\ ", " "), 0.6, 0, 0) for sentence in topic.hazardous]
    def literal(sentences):
        return "|".join(re.escape(sentence).replace("\\ ", " ") for sentence in sentences)
    found += [("", literal([sentence]), 0, -2, 0) for sentence in HAZARDS]
    found += [("", literal([sentence]), -0.3, 0, 0) for sentence in CAUTIONS]
    found += [("", literal(CAUTIONS), 0, 1, 0)]
    found += [("", literal(some), 0, 0, 1) for some in (POLITE[:2], POLITE[2:])]
    found += [("", literal(some), 0, 0, -1) for some in (RUDE[:2], RUDE[2:])]
    return found


def main():
    rows = [COLUMNS, *rules()]
    (ASSETS / "world.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    pairs = world_preferences(36000, random.Random("0/data"))
    text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (ASSETS / "world.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
