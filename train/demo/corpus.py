"""The demo corpus: a small, seeded, synthetic stand-in for real text, pairs and app data.

**Everything in it is made up.** A seeded generator fills our own templates from our own word lists
(`vocabulary.py`); nothing is copied from a data set. It shows the machinery in a few minutes without a
network: pseudo-labels, joint pre-finetuning, adapters for an app. It must never be used to judge the method:
a score on templates says little about real messages, and no result on it belongs in a table.

The two parts share no open-class name (people, places, products, …) and no template:

* pre-finetuning: raw messages, a tagged share of them, and pairs of related messages from three sources, with
  a message about something else but with the same names as hard negative;
* app data: a NER app with six entity types and a TC app with eight intents.

About a quarter of the app templates and of the app's words are kept out of the training split, so that
validation and test hold sentences and names an app has not seen. Weekdays, months, clock times, amounts and
numbers are closed classes, written by the same rules in both parts.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from train.demo import vocabulary

TEXTS = 4000
GOLD = 1000
PAIRS = 2000
APP_SPLITS = {"train": 400, "validation": 100, "test": 200}

# The kinds of slot that are entities, by type; every other kind (rooms, topics, gate numbers, …) is tagged O.
# The app's templates use only the first six types.
_KINDS = {
    "PERSON": "person friend sender surname",
    "PLACE": "place venue city hotel",
    "DATE": "date day past month",
    "TIME": "time",
    "PRODUCT": "product",
    "MONEY": "money price",
    "ORG": "shop org",
    "FOOD": "dish grocery",
    "MEDIA": "media",
    "CONTACT": "email phone",
    "LINK": "url",
}
ENTITY_TYPES: dict[str, str] = {kind: entity for entity, kinds in _KINDS.items() for kind in kinds.split()}

Words = dict[str, list[str]]
Draft = tuple[str, bool]  # a template, and whether it is typed carelessly


@dataclass(frozen=True)
class DemoCorpus:
    """The synthetic demo corpus; `demo_corpus` makes it, `write_demo` writes it.

    Attributes:
        texts: raw pre-finetuning messages, unique.
        gold: `{"tokens": [...], "ner_tags": [...]}` (IOB2) of the first `len(gold)` texts, in the same order:
            what a cluster's purity is measured against. Eleven entity types.
        pairs: for each source, `{"anchor": ..., "positive": ..., "negative": ...}`; no text occurs twice in a
            source.
        ner_app: for each split, tagged messages with six entity types.
        tc_app: for each split, `{"text": ..., "label": ...}` with eight intents, equally frequent.
    """

    texts: list[str]
    gold: list[dict]
    pairs: dict[str, list[dict]]
    ner_app: dict[str, list[dict]]
    tc_app: dict[str, list[dict]]


@dataclass(frozen=True)
class Message:
    """One message: its text, its words with punctuation apart, and an IOB2 tag for each of them."""

    text: str
    tokens: list[str]
    ner_tags: list[str]


@dataclass(frozen=True)
class _Scene:
    """One situation: ways to say it with the same slots, fitting replies, and subject lines."""

    notice: bool
    messages: list[str]
    replies: list[str]
    titles: list[str]


# --- from a template to a message ---

_SLOT = re.compile(r"\{(\w+)\}")
# Addresses, clock times, dates and numbers stay whole; an 's stands alone; other punctuation is split off.
_TOKEN = re.compile(
    r"https?://[\w./-]+\w|[\w.+-]+@[\w.-]+\w|:\)|\d[\d,.:/-]*\d[a-z]*|\d+[a-z]*|'s\b|\w+(?:[-'](?!s\b)\w+)*|\S",
    re.IGNORECASE,
)
_SHORT_FORMS = {"please": "pls", "you": "u", "your": "ur", "thanks": "thx", "about": "abt", "minutes": "min"}
_SHORTENED = re.compile(r"\b(" + "|".join(_SHORT_FORMS) + r")\b(?!')", re.IGNORECASE)


def render(template: str, slots: dict[str, str], rng: random.Random | None = None) -> Message:
    """Fills a template and tags the words that come from its entity slots.

    Each slot is split into words on its own, so a tag can neither leak into the sentence around it nor miss
    a word. With `rng` the message is written as people type: sometimes all lower case, without commas or the
    final full stop, or with short forms such as "pls".

    Args:
        template: text with slots in braces; a number after a slot's kind tells two of them apart.
        slots: a value for each slot name of the template; others are ignored.
        rng: the source of the typing variation; none without it.

    Returns:
        The message; its tags follow `ENTITY_TYPES`.

    Example:
        >>> message = render("Call {person} at {time}.", {"person": "Maya Costa", "time": "6pm"})
        >>> message.text
        'Call Maya Costa at 6pm.'
        >>> list(zip(message.tokens, message.ner_tags))[:3]
        [('Call', 'O'), ('Maya', 'B-PERSON'), ('Costa', 'I-PERSON')]
    """
    parts = _SLOT.split(template)  # literal, slot name, literal, slot name, …, literal
    strings = [slots[part] if index % 2 else part for index, part in enumerate(parts)]
    types = [ENTITY_TYPES.get(_kind(part), "") if index % 2 else "" for index, part in enumerate(parts)]
    first = next(index for index, string in enumerate(strings) if string)
    strings[first] = strings[first][0].upper() + strings[first][1:]
    if rng is not None:
        strings = _relax(strings, rng)
    tokens, tags = [], []
    for string, entity in zip(strings, types, strict=True):
        words = _TOKEN.findall(string)
        tokens += words
        tags += [f"{'I' if index else 'B'}-{entity}" if entity else "O" for index in range(len(words))]
    return Message("".join(strings).strip(), tokens, tags)


def _relax(strings: list[str], rng: random.Random) -> list[str]:
    """Types the message carelessly: literals alternate with slot values."""
    lower, no_stop, no_comma, short = (rng.random() < share for share in (0.35, 0.3, 0.25, 0.15))
    literals = strings[::2]
    if no_comma:
        literals = [literal.replace(", ", " ") for literal in literals]
    if short:
        literals = [_SHORTENED.sub(lambda match: _SHORT_FORMS[match[0].lower()], part) for part in literals]
    if no_stop:
        literals[-1] = literals[-1].rstrip(".!")
    strings = [literals[index // 2] if index % 2 == 0 else string for index, string in enumerate(strings)]
    return [string.lower() for string in strings] if lower else strings


def _kind(slot: str) -> str:
    return slot.rstrip("0123456789")


def _slot_names(*templates: str) -> list[str]:
    return sorted({name for template in templates for name in _SLOT.findall(template)})


# --- the values of the slots ---

_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_SHORT_DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December".split("|")
_HOURS = "twelve|one|two|three|four|five|six|seven|eight|nine|ten|eleven".split("|")


def _person(words: Words, rng: random.Random) -> str:
    first, last = rng.choice(words["first_name"]), rng.choice(words["last_name"])
    return first if rng.random() < 0.6 else f"{first} {last}"


def _place(words: Words, rng: random.Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(words["venue"])
    return f"{rng.choice(words['place_name'])} {rng.choice(words['place_head'])}"


def _product(words: Words, rng: random.Random) -> str:
    brand, item, model = (rng.choice(words[kind]) for kind in ("brand", "item", "model"))
    return rng.choice([item, item, item, f"{brand} {item}", f"{brand} {item}", f"{brand} {model}"])


def _calendar_date(rng: random.Random) -> str:
    month, number = rng.choice(_MONTHS), rng.randrange(1, 29)
    return rng.choice(
        [f"{month} {number}", f"{month} {number}", f"{month[:3]} {number}", f"{number} {month}"]
    )


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"the {number}{ending}"


def _date(words: Words, rng: random.Random) -> str:
    """A date that needs no preposition: "see you tomorrow", "see you Friday"."""
    weekday = rng.choice(_WEEKDAYS)
    forms = ["tomorrow", "tmrw", "today", weekday, weekday, f"next {weekday}", f"this {weekday}"]
    forms += [rng.choice(_SHORT_DAYS), _calendar_date(rng), _calendar_date(rng)]
    return rng.choice(["this weekend", "next week"]) if rng.random() < 0.04 else rng.choice(forms)


def _day(words: Words, rng: random.Random) -> str:
    """A date that goes with "on" and "by": "on Friday", "by the 14th"."""
    number = rng.randrange(1, 29)
    forms = [rng.choice(_WEEKDAYS), rng.choice(_WEEKDAYS), rng.choice(_SHORT_DAYS), _calendar_date(rng)]
    return rng.choice([*forms, _calendar_date(rng), _ordinal(number), f"{rng.randrange(1, 13)}/{number}"])


def _past(words: Words, rng: random.Random) -> str:
    return rng.choice(["yesterday", "last week", f"last {rng.choice(_WEEKDAYS)}", _calendar_date(rng)])


def _clock(minutes: int, rng: random.Random) -> str:
    """Writes a time of day, given in minutes after midnight, in one of the usual ways."""
    hour, minute = divmod(minutes, 60)
    half, number = ("pm" if hour >= 12 else "am"), (hour - 1) % 12 + 1
    digits = f"{number}:{minute:02d}" if minute else str(number)
    spoken = {
        0: "noon" if hour == 12 else f"{number} o'clock",
        15: f"quarter past {_HOURS[hour % 12]}",
        30: f"half past {_HOURS[hour % 12]}",
        45: f"quarter to {_HOURS[(hour + 1) % 12]}",
    }.get(minute, f"{digits}{half}")
    forms = [f"{digits}{half}", f"{digits}{half}", f"{digits} {half}", f"{digits} {half.upper()}"]
    return rng.choice([*forms, f"{hour}:{minute:02d}", spoken])


def _money(words: Words, rng: random.Random) -> str:
    amount = rng.randrange(12, 490)
    dollars = [f"${amount}", f"${amount}", f"${amount}.{rng.randrange(1, 100):02d}", f"${amount * 5:,}"]
    return rng.choice([*dollars, f"{amount} dollars", f"{amount} bucks", f"{amount} euros", f"{amount} EUR"])


def _price(words: Words, rng: random.Random) -> str:
    amount = rng.randrange(3, 25)
    return rng.choice([f"${amount}", f"${amount}.{rng.randrange(5, 100, 5):02d}", f"{amount} bucks"])


def _phone(words: Words, rng: random.Random) -> str:
    number = f"555-01{rng.randrange(100):02d}"
    return number if rng.random() < 0.3 else f"{rng.randrange(201, 990)}-{number}"


def _code(words: Words, rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTX") for _ in range(2))
    return f"{letters}{rng.randrange(100, 10000)}"


def _email(person: str, words: Words, rng: random.Random) -> str:
    number = rng.choice(["", "", "", "7", "21", "88", "_x"])
    return f"{person.lower().replace(' ', '.')}{number}@{rng.choice(words['mail'])}"


_RULES: dict[str, Callable[[Words, random.Random], str]] = {
    "person": _person,
    "friend": lambda words, rng: rng.choice(words["first_name"]),
    "sender": lambda words, rng: rng.choice(words["first_name"]),
    "surname": lambda words, rng: rng.choice(words["last_name"]),
    "place": _place,
    "product": _product,
    "date": _date,
    "day": _day,
    "past": _past,
    "month": lambda words, rng: rng.choice(_MONTHS),
    "money": _money,
    "price": _price,
    "phone": _phone,
    "code": _code,
    "url": lambda words, rng: f"https://{rng.choice(words['site'])}/{_code(words, rng).lower()}",
    "count": lambda words, rng: str(rng.randrange(2, 16)),
    "digits": lambda words, rng: f"{rng.randrange(10000):04d}",
    "degrees": lambda words, rng: str(rng.randrange(16, 25)),
    "gate": lambda words, rng: f"{rng.choice('ABCDE')}{rng.randrange(1, 60)}",
}


def _value(kind: str, words: Words, rng: random.Random) -> str:
    return _RULES[kind](words, rng) if kind in _RULES else rng.choice(words[kind])


def _draw_slots(names: Iterable[str], words: Words, rng: random.Random) -> dict[str, str]:
    """Draws a value for each slot name; no two begin with the same word, and a second time is later."""
    slots: dict[str, str] = {}
    minutes = rng.randrange(7 * 4, 19 * 4) * 15 + rng.choice((0, 0, 0, 0, 0, 0, 5, 10))
    for name in sorted(names):
        kind = _kind(name)
        if kind == "time":
            slots[name] = _clock(minutes, rng)
            minutes += rng.randrange(2, 13) * 15
        elif kind != "email":  # written from the person's name, below
            taken = {value.split()[0].lower() for value in slots.values()}
            while (value := _value(kind, words, rng)).split()[0].lower() in taken:
                pass
            slots[name] = value
    if "email" in names:
        slots["email"] = _email(slots.get("person") or _person(words, rng), words, rng)
    return slots


# --- pre-finetuning part ---

_KEEP_CAPITAL = re.compile(r"I\b|Dr\b|FYI\b")


def _lists(words: dict[str, str]) -> Words:
    return {kind: values.split("|") for kind, values in words.items()}


def _split_templates(block: str) -> list[str]:
    return [template.strip() for line in block.strip().splitlines() for template in line.split("|")]


@cache
def _scenes() -> list[_Scene]:
    scenes, notice = [], False
    for line in vocabulary.SCENES.strip().splitlines():
        mark, rest = line[0], _split_templates(line[2:])
        if mark == "@":
            notice = line.endswith(" notice")
        elif mark == "-":
            scenes.append(_Scene(notice, rest, [], []))
        else:
            {" ": scenes[-1].messages, ">": scenes[-1].replies, "=": scenes[-1].titles}[mark].extend(rest)
    return scenes


def _lead(opener: str, template: str) -> str:
    return opener + (template if _KEEP_CAPITAL.match(template) else template[0].lower() + template[1:])


def _dress(template: str, openers: str, closers: str, rng: random.Random) -> str:
    """Puts a greeting before and a word of thanks or an emoji after a template, sometimes."""
    if rng.random() < 0.3:
        template = _lead(rng.choice(openers.split("|")), template)
    if closers and template[-1] in ".?!" and rng.random() < 0.15:
        template = f"{template} {rng.choice(closers.split('|'))}"
    return template


def _key(text: str) -> str:
    """What two texts must differ in: their letters and digits, so that typing variation makes no new text."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _collect(make: Callable[[], list[Message]], count: int, taken: set[str]) -> list[list[Message]]:
    """Calls `make` until `count` results hold only texts that nothing else in `taken` has."""
    rows: list[list[Message]] = []
    for _ in range(200 * count):
        messages = make()
        keys = {_key(message.text) for message in messages}
        if len(keys) == len(messages) and not keys & taken:
            taken |= keys
            rows.append(messages)
            if len(rows) == count:
                return rows
    raise ValueError(f"The demo templates give {len(rows)} distinct rows here, not {count}: lower `scale`.")


def _compose(drafts: list[Draft], words: Words, rng: random.Random) -> list[Message]:
    """Renders templates that belong together with the same slot values."""
    slots = _draw_slots(_slot_names(*(template for template, _ in drafts)), words, rng)
    return [render(template, slots, rng if casual else None) for template, casual in drafts]


def _say(scene: _Scene, template: str, rng: random.Random) -> Draft:
    if scene.notice:
        return template, False
    return _dress(template, vocabulary.PRETRAIN_OPENERS, vocabulary.PRETRAIN_CLOSERS, rng), True


def _answer(scene: _Scene, reply: str, rng: random.Random) -> Draft:
    return (reply if scene.notice else _dress(reply, vocabulary.REPLY_OPENERS, "", rng)), True


def _pretraining_messages(count: int, rng: random.Random) -> list[Message]:
    words = _lists(vocabulary.PRETRAIN_WORDS)

    def make() -> list[Message]:
        scene = rng.choice(_scenes())
        if rng.random() < 0.35:
            return _compose([_answer(scene, rng.choice(scene.replies), rng)], words, rng)
        template, casual = _say(scene, rng.choice(scene.messages), rng)
        second = rng.choice(rng.choice(_scenes()).messages)
        apart = set(_slot_names(template)).isdisjoint(_slot_names(second))  # else one time would do for both
        if casual and apart and rng.random() < 0.25:
            template += " " + _lead(rng.choice(vocabulary.PRETRAIN_LINKS.split("|")), second)
        return _compose([(template, casual)], words, rng)

    return [message for (message,) in _collect(make, count, set())]


def _message_reply(scene: _Scene, rng: random.Random) -> list[Draft]:
    template = rng.choice(scene.messages)
    return [_say(scene, template, rng), _answer(scene, rng.choice(scene.replies), rng)]


def _paraphrase(scene: _Scene, rng: random.Random) -> list[Draft]:
    templates = list(scene.messages)
    rng.shuffle(templates)
    return [_say(scene, template, rng) for template in templates[:2]]


def _title_body(scene: _Scene, rng: random.Random) -> list[Draft]:
    title, template = rng.choice(scene.titles), rng.choice(scene.messages)
    return [(title, not scene.notice), _say(scene, template, rng)]


_SOURCES = {"message_reply": _message_reply, "paraphrase": _paraphrase, "title_body": _title_body}


def _rival(scene: _Scene, rng: random.Random) -> Draft:
    """Drafts a message of another scene that takes as many of the scene's details as any does."""
    details = set(_slot_names(*scene.messages))
    shared = {id(other): len(details & set(_slot_names(*other.messages))) for other in _scenes()}
    most = min(2, max(shared[id(other)] for other in _scenes() if other is not scene))
    other = rng.choice([other for other in _scenes() if other is not scene and shared[id(other)] >= most])
    return _say(other, rng.choice(other.messages), rng)


def _pair(source: str, words: Words, rng: random.Random) -> list[Message]:
    """Makes anchor, positive and hard negative.

    The negative is about something else, but has the anchor's names and times. Half of the paraphrases say
    the same about other names and times, all but one. So what the texts are about tells them apart, and
    sharing a name does not.
    """
    scene = rng.choice(_scenes())
    drafts = [*_SOURCES[source](scene, rng), _rival(scene, rng)]
    details = _draw_slots(_slot_names(*(template for template, _ in drafts)), words, rng)
    values = [details, details, details]
    if source == "paraphrase" and "email" not in details and rng.random() < 0.5:  # emails spell a name
        names = _slot_names(*(template for template, _ in drafts[:2]))
        kept = rng.choice(_slot_names(*scene.messages))
        values[1] = {**_draw_slots(names, words, rng), kept: details[kept]}
    return [
        render(template, slots, rng if casual else None)
        for (template, casual), slots in zip(drafts, values, strict=True)
    ]


def _pairs(source: str, count: int, rng: random.Random) -> list[dict]:
    words = _lists(vocabulary.PRETRAIN_WORDS)
    rows = _collect(lambda: _pair(source, words, rng), count, set())
    columns = ("anchor", "positive", "negative")
    return [dict(zip(columns, (message.text for message in row), strict=True)) for row in rows]


# --- app part ---


def _train_share(values: list[str]) -> list[str]:
    """Leaves out every fourth template or word, which an app then meets only in validation and test."""
    return [value for index, value in enumerate(values) if index % 4 != 3]


def _app_messages(
    block: str, openers: str, split: str, count: int, taken: set[str], rng: random.Random
) -> list[Message]:
    words, templates = _lists(vocabulary.APP_WORDS), _split_templates(block)
    if split == "train":
        words, templates = (
            {kind: _train_share(values) for kind, values in words.items()},
            _train_share(templates),
        )

    def make() -> list[Message]:
        return _compose(
            [(_dress(rng.choice(templates), openers, vocabulary.APP_CLOSERS, rng), True)], words, rng
        )

    return [message for (message,) in _collect(make, count, taken)]


def _ner_app(split: str, count: int, taken: set[str], rng: random.Random) -> list[dict]:
    messages = _app_messages(vocabulary.NER_APP_TEMPLATES, vocabulary.APP_OPENERS, split, count, taken, rng)
    return [{"tokens": message.tokens, "ner_tags": message.ner_tags} for message in messages]


def _tc_app(split: str, count: int, taken: set[str], rng: random.Random) -> list[dict]:
    rows = []
    for number, (label, block) in enumerate(vocabulary.TC_APP_TEMPLATES.items()):
        share = len(range(number, count, len(vocabulary.TC_APP_TEMPLATES)))  # the shares add up to count
        messages = _app_messages(block, vocabulary.TC_OPENERS, split, share, taken, rng)
        rows += [{"text": message.text, "label": label} for message in messages]
    rng.shuffle(rows)
    return rows


# --- the corpus ---


def demo_corpus(seed: int = 0, scale: float = 1.0) -> DemoCorpus:
    """Makes the synthetic demo corpus; the same arguments give the same corpus on every machine.

    Args:
        seed: the seed of every draw.
        scale: multiplies every size; at 1.0 there are 4,000 texts, 1,000 of them tagged, 3 x 2,000 pairs and
            400 / 100 / 200 rows in each app. An app split keeps at least one row an intent.

    Raises:
        ValueError: if `scale` is not positive, or asks for more distinct rows than the templates can give.
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}.")

    def size(count: int, least: int = 1) -> int:
        return max(least, round(count * scale))

    def stream(part: str) -> random.Random:
        return random.Random(f"mtpf-demo/{seed}/{part}")  # a string is hashed by sha512, not by hash()

    messages = _pretraining_messages(size(TEXTS), stream("texts"))
    gold = [{"tokens": message.tokens, "ner_tags": message.ner_tags} for message in messages[: size(GOLD)]]
    taken: set[str] = set()
    ner_app, tc_app = {}, {}
    for split, rows in APP_SPLITS.items():
        count = size(rows, len(vocabulary.TC_APP_TEMPLATES))
        ner_app[split] = _ner_app(split, count, taken, stream(f"ner_app/{split}"))
        tc_app[split] = _tc_app(split, count, taken, stream(f"tc_app/{split}"))
    return DemoCorpus(
        texts=[message.text for message in messages],
        gold=gold,
        pairs={source: _pairs(source, size(PAIRS), stream(source)) for source in _SOURCES},
        ner_app=ner_app,
        tc_app=tc_app,
    )


def write_demo(folder: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Writes the demo corpus as UTF-8 JSON lines, each file complete or absent.

    The files are `text.jsonl`, `gold.jsonl`, `pairs/<source>.jsonl`, `ner_app/<split>.jsonl` and
    `tc_app/<split>.jsonl`; the rows are those of `DemoCorpus`, a text being `{"text": ...}`.

    Args:
        folder: where to write; made if missing, files of an earlier run are replaced.
        seed: see `demo_corpus`.
        scale: see `demo_corpus`.
    """
    corpus = demo_corpus(seed, scale)
    files = {"text": [{"text": text} for text in corpus.texts], "gold": corpus.gold}
    for part in ("pairs", "ner_app", "tc_app"):
        files |= {f"{part}/{name}": rows for name, rows in getattr(corpus, part).items()}
    for name, rows in files.items():
        path = Path(folder) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        unfinished.write_text("".join(lines), encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
