"""Which language a text is in: by its script, and within the Latin and Cyrillic scripts by its function words.

Small on purpose: it is to notice that a model has left the language it was meant to stay in, no more.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CJK": "zh",
    "ARABIC": "ar",
    "HEBREW": "he",
    "GREEK": "el",
    "DEVANAGARI": "hi",
    "THAI": "th",
}
FUNCTION_WORDS = {
    "en": "the of and to in is that it for was with are this be on as you not have from at by or which can will",
    "de": "der die und das ist nicht ein eine zu den mit von auf für im dem sich auch es werden wird oder sie bei",
    "fr": "le la les et est des un une que dans pour qui pas sur avec il elle ce sont aux plus ou nous vous du",
    "es": "el los las que en un una por con para es no se del al lo como más su pero son está y también",
    "it": "il che di un una per non è con del della si sono gli nel come anche più alla dei le ma questo",
    "pt": "que os um uma para com não por mais as dos como mas ao ele das à seu sua ou é são também em",
    "nl": "de het een en van is dat niet op te zijn met voor die er aan ook om maar bij dit wordt naar",
    "pl": "nie się na jest że do to jak ale po co tak za od dla przez był jego oraz są być które",
    "sv": "och att det som en på är av för med till den har inte om ett men var jag så kan från",
    "tr": "ve bir bu için ile da de çok daha gibi olan olarak sonra kadar ama ne en var değil ise",
    "ru": "и в не на что с он как это по но из у за от так же для бы вы мы был или при его",
    "uk": "і в не на що з та до як це він але від за для у його про був які й ми ви або є",
}
LANGUAGES = tuple(sorted({*SCRIPTS.values(), *FUNCTION_WORDS}))
MIN_WORDS = 8
MIN_HITS = 2
"""Function words that a text must show before it counts as any language's."""
_WORDS = {code: frozenset(words.split()) for code, words in FUNCTION_WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")


def language(text: str) -> str | None:
    """ISO code of the language that most of `text` is in; None where it is too short or too mixed to tell."""
    letters = [character for character in text[:20_000] if character.isalpha()]
    scripts = Counter(SCRIPTS.get(unicodedata.name(letter, "?").split()[0].split("-")[0]) for letter in letters)
    if scripts["ja"] > 0.05 * len(letters):  # Japanese writes most of its nouns in Chinese characters
        return "ja"
    for code, count in scripts.items():
        if code is not None and count > 0.5 * len(letters):
            return code
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) < MIN_WORDS:
        return None
    hits = Counter({code: sum(word in known for word in words) for code, known in _WORDS.items()})
    (best, most), (_, second) = hits.most_common(2)
    return best if most >= MIN_HITS and most > second else None
