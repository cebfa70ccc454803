"""Can the agent write what a reward model likes? Short reviews of films, meals, hotels and books, in minutes on a CPU.

A probabilistic context-free grammar writes the reviews, so there are always new ones, and their entropy is known: no
text has two derivations, so ``-log p(review)`` is the cost of the choices made while writing it. The gold score is a
sentiment that is composed by rule. It does not use the grammar, so any string has one. Good and bad mirror each other
in both, up to the choice of words: a neutral text scores 0, and the mean over the corpus is 0 within a few hundredths.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from lmgym.errors import InvalidArgumentError
from lmgym.tasks import Task, register_task
from lmgym.tasks.stored import ARTEFACTS

Split = Literal["train", "test"]

MAX_PROMPT_TOKENS = 8
MIN_PROMPT_TOKENS = 3
MAX_NEW_TOKENS = 24
PROMPTS_PER_SPLIT: dict[Split, int] = {"train": 1024, "test": 256}
PROMPT_SEED = 20_240_101

# --- what the words mean --------------------------------------------------------------------------------------------

# Valence of an opinion word: 1 is "good", 2 is as strong as one word gets. Each good word has a bad mirror.
_GOOD = {
    0.5: "decent solid", 0.7: "fine quiet crisp", 0.8: "nice pleasant wise like liked",
    1.0: "good clean fresh kind happy glad clever", 1.1: "tasty juicy spacious admire admired",
    1.2: "funny comfortable tender cosy vivid charming friendly enjoy enjoyed charmed charm worth helpful",
    1.3: "witty memorable impressive elegant attentive impressed impress treat recommend pleased please",
    1.5: "great lovely touching moving thrilling absorbing joy delighted delight gem gladly",
    1.7: "gripping delicious spotless loved love wonderful pleasure",
    2.0: "excellent superb brilliant perfect adored triumph masterpiece",
}  # fmt: skip
_BAD = {
    0.5: "plain average mediocre", 0.7: "wordy", 0.8: "weak silly cold mind miss",
    1.0: "bad noisy greasy careless sorry sad predictable clumsy", 1.1: "bland soggy cramped dislike disliked",
    1.2: "dull damp confusing shabby shallow bore bored unkind annoy annoyed regret regretted",
    1.3: "tedious forgettable poor lifeless rude letdown avoid disappointed disappoint annoying",
    1.5: "dirty stale burnt disappointing tiresome mess shame waste",
    1.7: "smelly hated hate awful terrible nightmare rotten",
    2.0: "horrible dreadful filthy abysmal loathed disaster fiasco",
}  # fmt: skip
_GAIN = {
    0.5: "slightly bit", 0.6: "somewhat", 0.8: "fairly rather", 1.2: "quite", 1.3: "really so real",
    1.5: "very truly", 1.7: "absolutely total utterly", 1.9: "extremely incredibly",
}  # fmt: skip
_NEGATORS = "not never hardly no"
_MARKS = {",": "break", "and": "break", ".": "stop", "but": "but", "although": "although"}  # what ends a clause
_REACH = 3  # words over which a negator or an intensifier looks for its opinion: "not a very good"
_NEGATION = -0.6  # "not good" is milder than "bad"
_AFTER_BUT = 2.0  # weight of a clause after "but"; 1 for most others
_CONCEDED = 0.5  # weight of a clause after "although"
_PRIOR = 1.0  # weight of the neutral clause that every text is averaged with: more evidence, bolder score
_BOUND = 3.0
_SCALE = 0.725  # corpus standard deviation of the averaged sentiment: what makes the gold score unit-free

# --- the grammar ----------------------------------------------------------------------------------------------------

# Alternatives are separated by "|", a leading number is a weight (1 if absent), upper-case symbols expand further.
# A rule G_X (good) also stands for its mirror B_X (bad), with G_ and B_ swapped throughout, unless B_X is written out.
# After LEAD a verdict is due ("the soup was | very good"), after SCENE a clause ("we saw it and | it was a treat").
_SHARED = {
    "REVIEW": "G_REVIEW | B_REVIEW",
    "G_REVIEW": "6 LEAD G_VERDICT G_REST | 5 SCENE G_CLAUSE G_REST | 1 although HEAD B_VERDICT , G_CLAUSE G_END",
    "G_REST": "4 G_END | 4 and G_CLAUSE . | and G_CLAUSE . G_CLOSE . | , G_CLAUSE and G_CLAUSE . | 3 but B_CLAUSE B_END"
    " | and NEUTRAL .",
    "G_END": "3 . | 2 . G_CLOSE .",
    "LEAD": "3 HEAD | 3 TONE , HEAD | 2 the ONE OF THING was | TONE , the ONE OF THING was",
    "SCENE": "2 EVENT and | 2 EVENT COMPANY and | 2 TONE , EVENT and | 3 WHEN EVENT and",
    "TONE": "frankly | honestly | overall | to be fair | in short | looking back | in the end",
    "WHEN": "last night | last week | on friday | on sunday | in june | one rainy evening | this morning",
    "EVENT": "WHO DID THING",
    "WHO": "2 i | 2 we | my sister and i | my brother and i",
    "COMPANY": "with my mother | with two friends | with the children | with a colleague | by chance | at last",
    "HEAD": "3 the ONE was | 2 the MANY were | THIS was",
    "G_VERDICT": "8 G_ADJ | 9 G_HOW G_ADJ | 3 not B_ADJ | not B_HOW B_ADJ | never B_ADJ | hardly B_ADJ"
    " | 2 G_ADJ and G_OTHER",
    "G_HOW": "4 very | 3 really | 2 so | extremely | incredibly | 3 truly | 2 quite | absolutely | fairly | somewhat",
    "B_HOW": "4 very | 3 really | 2 so | extremely | incredibly | 4 utterly | 2 rather | slightly | a bit",
    "G_OTHER": "fine | nice | pleasant | lovely | memorable",
    "B_OTHER": "plain | weak | dull | tiresome | forgettable",
    "G_ADJ": "good | great | fine | nice | decent | solid | lovely | impressive | wonderful | excellent | superb"
    " | brilliant | perfect | 6 G_OWN",
    "B_ADJ": "bad | awful | poor | weak | average | plain | dull | disappointing | terrible | dreadful | horrible"
    " | abysmal | mediocre | 6 B_OWN",
    "G_CLAUSE": "6 HEAD G_VERDICT | 2 it was a G_ADJ KIND | 2 it was G_NOUN | 2 the CREW were G_MANNER"
    " | 2 G_FELT G_VERB WHAT | ONES did not B_BASE WHAT | WHAT G_STIRRED us | WHAT did not B_STIR us",
    "G_MANNER": "3 G_TRAIT | 3 G_HOW G_TRAIT | not B_TRAIT",
    "G_TRAIT": "friendly | helpful | kind | charming | attentive",
    "B_TRAIT": "rude | careless | unkind | lifeless | annoying",
    "G_NOUN": "4 a G_THING | a real G_THING | a total G_THING | no B_THING",
    "G_THING": "joy | treat | delight | pleasure | gem | triumph | masterpiece",
    "B_THING": "bore | mess | shame | letdown | waste | nightmare | disaster | fiasco",
    "ONES": "i | we",
    "G_FELT": "3 ONES | ONES really | ONES truly",
    "B_FELT": "3 ONES | ONES really | ONES rather",
    "G_VERB": "2 liked | 2 enjoyed | 2 loved | adored | admired",
    "B_VERB": "2 disliked | 2 regretted | 2 hated | loathed",
    "G_BASE": "2 like | 2 enjoy | love | admire",
    "B_BASE": "dislike | regret | hate | mind",
    "WHAT": "2 the ONE | the MANY | THIS",
    "G_STIRRED": "delighted | charmed | impressed | pleased",
    "B_STIRRED": "bored | annoyed | disappointed",
    "G_STIR": "delight | charm | impress | please",
    "B_STIR": "bore | annoy | disappoint",
    "G_CLOSE": "2 i recommend it to WHOM | we left happy | i would gladly AGAIN | it was worth the money"
    " | do not miss it | we were not disappointed | i was so glad",
    "B_CLOSE": "2 i would not recommend it to WHOM | we left sad | i would never AGAIN | it was not worth the money"
    " | avoid it | we were not impressed | i was so sorry",
    "WHOM": "anyone | everyone | friends | families",
}  # fmt: skip
_DOMAINS = {
    "FILM": {
        "THING": "this movie | the new comedy | the old western | the thriller | the spy story | the french drama",
        "THIS": "the film | this film | the movie", "KIND": "film | movie | picture | evening", "OF": "of",
        "DID": "saw | watched | went to see | streamed",
        "ONE": "plot | acting | music | ending | dialogue | camera work", "MANY": "jokes | scenes | songs | effects",
        "CREW": "actors | extras", "AGAIN": "watch it again",
        "NEUTRAL": "it lasted two hours | the hall was half full | we sat in row four",
        "G_OWN": "gripping | funny | moving | clever | thrilling | touching",
        "B_OWN": "predictable | silly | confusing | noisy | tedious | shallow",
    },
    "MEAL": {
        "THING": "the corner cafe | the noodle bar | the new bistro | the fish place | the old tavern | this tearoom",
        "THIS": "the meal | this meal | the restaurant", "KIND": "meal | lunch | dinner | restaurant", "OF": "at",
        "DID": "tried | had lunch at | had dinner at | went to",
        "ONE": "soup | steak | salad | bread | dessert | wine", "MANY": "starters | noodles | sauces | desserts",
        "CREW": "waiters | cooks", "AGAIN": "eat here again",
        "NEUTRAL": "we sat near the window | the table was by the door | we paid in cash",
        "G_OWN": "delicious | tasty | fresh | tender | juicy | crisp",
        "B_OWN": "bland | cold | greasy | stale | burnt | soggy",
    },
    "HOTEL": {
        "THING": "this inn | the harbour hotel | the grand hotel | the small inn | the guest house | the beach resort",
        "THIS": "the hotel | this hotel | the stay", "KIND": "hotel | stay | place | break", "OF": "at",
        "DID": "booked | chose | picked | stayed at",
        "ONE": "room | bed | bathroom | lobby | pool | breakfast", "MANY": "towels | rooms | views | halls",
        "CREW": "porters | maids", "AGAIN": "stay here again",
        "NEUTRAL": "we arrived by train | the room faced the street | we had two keys",
        "G_OWN": "clean | comfortable | quiet | spotless | cosy | spacious",
        "B_OWN": "dirty | damp | cramped | shabby | smelly | filthy",
    },
    "BOOK": {
        "THING": "this novel | her memoir | his first novel | the crime novel | the ghost story | the sea story",
        "THIS": "the book | this book | the novel", "KIND": "book | novel | read | tale", "OF": "in",
        "DID": "read | finished | borrowed | bought",
        "ONE": "prose | opening | last chapter | style | title | middle part",
        "MANY": "poems | chapters | pages | footnotes",
        "CREW": "heroes | villains", "AGAIN": "read it again",
        "NEUTRAL": "it has nine chapters | i read it on the train | it came by post",
        "G_OWN": "witty | vivid | absorbing | elegant | wise | memorable",
        "B_OWN": "wordy | clumsy | lifeless | rotten | tiresome | forgettable",
    },
}  # fmt: skip

_Table = dict[str, tuple[list[float], list[list[str]], list[float]]]  # symbol: cumulative p, expansions, -log p in nats


def _mirror(text: str) -> str:
    """Swaps good and bad in a rule."""
    return text.replace("G_", "\0").replace("B_", "G_").replace("\0", "B_")


@functools.cache
def _tables() -> list[_Table]:
    """The compiled grammar of each domain."""
    mirrored = {_mirror(symbol): _mirror(text) for symbol, text in _SHARED.items() if symbol.startswith("G_")}
    return [_compile({**mirrored, **_SHARED, **own}) for own in _DOMAINS.values()]


def _compile(rules: dict[str, str]) -> _Table:
    table: _Table = {}
    for symbol, text in rules.items():
        expansions = [alternative.split() for alternative in text.split("|")]
        weights = [float(words.pop(0)) if words[0].isdigit() else 1.0 for words in expansions]
        total = sum(weights)
        cumulative = [weight / total for weight in itertools.accumulate(weights)]
        reversed_expansions = [words[::-1] for words in expansions]  # a stack takes them from the end
        table[symbol] = (cumulative[:-1], reversed_expansions, [-math.log(weight / total) for weight in weights])
    return table


def derive(rng: np.random.Generator) -> tuple[list[str], float]:
    """Writes one review and says how surprising it is.

    Returns:
        The words, and -log p(review) in nats: the grammar is unambiguous, so this is the cost of the choices made.
        Its mean over reviews is the entropy of the corpus, which no language model can beat.
    """
    tables = _tables()
    table = tables[rng.integers(len(tables))]
    nats = math.log(len(tables))
    stack = ["REVIEW"]
    words: list[str] = []
    while stack:
        symbol = stack.pop()
        rule = table.get(symbol)
        if rule is None:
            if words and words[-1] == "a" and symbol[0] in "aeiou":
                words[-1] = "an"
            words.append(symbol)
            continue
        cumulative, expansions, costs = rule
        choice = bisect(cumulative, rng.random()) if cumulative else 0
        stack += expansions[choice]
        nats += costs[choice]
    return words, nats


def sample_review(rng: np.random.Generator) -> str:
    """Writes one review: 5 to about 35 lower-case words and marks separated by single spaces, "." last."""
    return " ".join(derive(rng)[0])


def corpus(seed: int, size: int) -> list[str]:
    """Writes `size` independent reviews; equal seeds give equal reviews."""
    if size < 0:
        raise InvalidArgumentError(f"`size` must be an int >= 0, got {size!r}.")
    rng = np.random.default_rng(seed)
    return [sample_review(rng) for _ in range(size)]


@functools.cache
def words() -> list[str]:
    """All word types of the grammar, sorted: what the tokenizer is made of."""
    rules = [rule for table in _tables() for rule in table.values()]
    symbols = {symbol for _, expansions, _ in rules for expansion in expansions for symbol in expansion}
    return sorted(symbol for symbol in symbols | {"an"} if not symbol.isupper())


# --- prompts --------------------------------------------------------------------------------------------------------


def sample_cut(review: Sequence[str], rng: np.random.Generator) -> int | None:
    """Chooses where to cut a review so that a prompt is left, 3 to 8 words before any that bears on an opinion.

    Returns:
        The length of the prompt in words, or None when the opinion comes too early.
    """
    verdict = next((t for t, word in enumerate(review) if word in _lexicon()), len(review))
    longest = min(verdict, MAX_PROMPT_TOKENS)
    return int(rng.integers(MIN_PROMPT_TOKENS, longest + 1)) if longest >= MIN_PROMPT_TOKENS else None


def sample_prompt(rng: np.random.Generator) -> str:
    """Writes the opening of a fresh review, 3 to 8 words, which leaves its verdict open."""
    while True:
        review, _ = derive(rng)
        cut = sample_cut(review, rng)
        if cut is not None:
            return " ".join(review[:cut])


@functools.cache
def prompts(split: Split) -> tuple[str, ...]:
    """The prompts of a split: 1024 for "train", 256 for "test", all distinct, none in both, always the same."""
    if split not in get_args(Split):
        raise InvalidArgumentError(f"`split` must be one of {list(get_args(Split))}, got {split!r}.")
    rng = np.random.default_rng(PROMPT_SEED)
    total = sum(PROMPTS_PER_SPLIT.values())
    distinct = dict.fromkeys(sample_prompt(rng) for _ in range(8 * total))
    if len(distinct) < total:
        raise RuntimeError(f"the grammar gave {len(distinct)} distinct prompts, {total} are needed")
    chosen = [str(prompt) for prompt in rng.permutation(list(distinct)[:total])]
    train = PROMPTS_PER_SPLIT["train"]
    return tuple(chosen[:train] if split == "train" else chosen[train:])


# --- gold score -----------------------------------------------------------------------------------------------------

_Meaning = tuple[str, float]  # kind, and valence or factor


@functools.cache
def _lexicon() -> dict[str, _Meaning]:
    """What opinions, intensifiers and negators mean."""
    return {
        **{word: ("opinion", valence) for valence, text in _GOOD.items() for word in text.split()},
        **{word: ("opinion", -valence) for valence, text in _BAD.items() for word in text.split()},
        **{word: ("intensifier", gain) for gain, text in _GAIN.items() for word in text.split()},
        **dict.fromkeys(_NEGATORS.split(), ("negator", _NEGATION)),
    }


@functools.cache
def _meanings() -> dict[str, _Meaning]:
    """Every word that the gold score reacts to: the lexicon and the marks between clauses."""
    return {**_lexicon(), **{word: (kind, 0.0) for word, kind in _MARKS.items()}}


def _clauses(text: str) -> Iterator[tuple[float | None, str]]:
    """Yields the mean opinion of each clause, None if it has none, and the kind of mark that ends it."""
    meanings = _meanings()
    seen: set[tuple[str, bool]] = set()
    valence = 0.0
    opinions = 0
    gain = 1.0
    negated = False
    expires = -1
    for t, word in enumerate(text.split()):
        meaning = meanings.get(word)
        if meaning is None:
            continue
        kind, value = meaning
        if t > expires:
            gain = 1.0
            negated = False
        if kind == "intensifier":
            gain = value
            expires = t + _REACH
        elif kind == "negator":
            negated = not negated
            expires = t + _REACH
        elif kind == "opinion":
            if (word, negated) not in seen:
                seen.add((word, negated))
                valence += value * gain * (_NEGATION if negated else 1.0)
                opinions += 1
            expires = -1
        else:
            yield (valence / opinions if opinions else None), kind
            valence = 0.0
            opinions = 0
            expires = -1
    yield (valence / opinions if opinions else None), "stop"


def sentiment(text: str) -> float:
    """Reads the sentiment of any text; 0 is neutral, and words without a meaning count nothing.

    An opinion is worth its valence, times the intensifier and the negation found in the three words before it. A clause
    is worth the mean of its opinions. The text is worth the weighted mean of its clauses and one neutral clause: a
    clause after "but" weighs 2 when it answers an earlier one of its sentence, a clause conceded by "although" weighs
    0.5, others weigh 1. An opinion counts the first time only, so repeating it gains nothing.

    Returns:
        A number in (-3, 3), unit-free: mean 0 and standard deviation 1 over the reviews of the corpus.
    """
    total = 0.0
    weights = _PRIOR
    weight = 1.0
    answers = False
    for opinion, mark in _clauses(text):
        if opinion is not None:
            total += weight * opinion
            weights += weight
            answers = True
        if mark == "stop":
            weight = 1.0
            answers = False
        elif mark == "but":
            weight = _AFTER_BUT if answers else 1.0
        elif mark == "although":
            weight = _CONCEDED
        elif weight == _CONCEDED:
            weight = 1.0
    return _BOUND * math.tanh(total / (weights * _SCALE * _BOUND))


def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The gold score of reviews: the sentiment of each prompt followed by its completion.

    Args:
        prompts: B prompts.
        completions: B completions, each with its own leading space.
        columns: Ignored; there for the signature that reward functions share.

    Returns:
        B scores in (-3, 3), 0 for a text that says nothing.
    """
    return [sentiment(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]


def reviews() -> Task:
    """The built-in task."""
    artefacts = os.path.join(ARTEFACTS, "reviews")
    return Task(
        name="reviews",
        model=os.path.join(artefacts, "reference"),
        reward=os.path.join(artefacts, "reward"),
        gold=gold,
        prompts={"train": prompts("train"), "test": prompts("test")},
        kl_coef=0.2,
        max_new_tokens=MAX_NEW_TOKENS,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
    )


register_task("reviews", reviews)
