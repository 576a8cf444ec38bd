"""Which language is a text in? By its script, and for Latin letters by its small words.

Knows: the languages of scripts that one language has (or that a few letters tell apart), and the commonest small words of some twenty languages in
Latin letters. Does not know: a language it has no words of; such a text is undetermined, and so is one without words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

UNDETERMINED = "und"
LOOKED_AT = 2000
"""Characters of a text."""
LEAST = 0.12
"""Share of a text's words that must speak for a language in Latin letters; two different ones at least."""

_SCRIPTS = {
    "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "HANGUL": "ko", "GREEK": "el", "HEBREW": "he", "THAI": "th", "LAO": "lo", "DEVANAGARI": "hi",
    "BENGALI": "bn", "TAMIL": "ta", "TELUGU": "te", "GUJARATI": "gu", "GURMUKHI": "pa", "KANNADA": "kn", "MALAYALAM": "ml", "SINHALA": "si",
    "KHMER": "km", "MYANMAR": "my", "GEORGIAN": "ka", "ARMENIAN": "hy", "ETHIOPIC": "am", "CYRILLIC": "ru", "ARABIC": "ar",
}  # fmt: skip
_LETTERS = (("CYRILLIC", "ђћљњџ", "sr"), ("CYRILLIC", "іїєґ", "uk"), ("CYRILLIC", "әғқңөұү", "kk"), ("ARABIC", "ٹڈڑے", "ur"),
            ("ARABIC", "پچژگ", "fa"))  # fmt: skip
_WORDS = {
    "en": "the of and to is in that it was for on are with as this be at by from have not what which you how",
    "de": "der die das und ist von den mit zu nicht ein eine im für auf dem des sich als auch wie was wird sind",
    "fr": "le la les de des et est un une dans que qui pour pas sur du au ce par avec sont plus comment quelle",
    "es": "el la los las de que y en un una es por con para del se no su como más al qué cuál son",
    "it": "il lo la gli di che e è un una per in non con del della sono come più si dei quale cosa nel",
    "pt": "o a os as de que e em um uma é por com para do da não se mais como dos ao são qual",
    "nl": "de het een van en is dat op te in niet voor met zijn aan er hoe wat worden ook als deze naar",
    "sv": "och att det är som en på av för med inte den till ett om har de hur vad kan från jag",
    "da": "og at det er som en på af for med ikke den til et om har de hvordan hvad kan fra jeg blev",
    "no": "og at det er som en på av for med ikke den til et om har de hvordan hva kan fra jeg ble",
    "pl": "i w na nie z jest się do że o jak to co po od za przez oraz jego są który dla",
    "cs": "a v na je se že z do s to jak co po od za pro není které jsou která ve jeho",
    "ro": "și în de la cu pe nu este un o care din pentru mai ce sunt al ale cum prin fi sau",
    "hu": "a az és hogy nem is egy van meg de mi ez volt ha csak mint még el vagy milyen hogyan",
    "fi": "ja on ei että se oli hän mutta joka kuin ovat tai niin mitä miten myös jos kun mikä ole",
    "tr": "ve bir bu da de için ile ne çok daha olarak gibi var mı nasıl olan en kadar değil nedir",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga adalah ke saya apa bagaimana karena oleh",
    "vi": "và của là có không được một các cho trong với này những đã người để khi như thế nào",
    "sw": "na ya wa kwa ni la katika za kuwa hii hiyo si au kama cha vya je nini yake huu",
    "ca": "el la els les de que i en un una és per amb no del es com més són quina aquest",
}
_OF_WORD: dict[str, list[str]] = {}
for _language, _small in _WORDS.items():
    for _word in _small.split():
        _OF_WORD.setdefault(_word, []).append(_language)


def language(text: str) -> str:
    """Return a text's language (ISO 639-1), or :data:`UNDETERMINED`."""
    text = text[:LOOKED_AT].lower()
    scripts = Counter(filter(None, map(_script, text)))
    if not scripts:
        return UNDETERMINED
    script, _ = scripts.most_common(1)[0]
    if script == "LATIN":
        return _in_latin_letters(text)
    if script == "CJK" and scripts["HIRAGANA"] + scripts["KATAKANA"] > 0:
        return "ja"
    for written, letters, told in _LETTERS:
        if script == written and any(letter in text for letter in letters):
            return told
    return _SCRIPTS.get(script, UNDETERMINED)


def _in_latin_letters(text: str) -> str:
    """Return the language whose small words are most of a text's, two at least; a word of several languages counts for each in part."""
    words = re.findall(r"[^\W\d_]+", text)
    votes: dict[str, float] = {}
    for word in words:
        for one in _OF_WORD.get(word, ()):
            votes[one] = votes.get(one, 0.0) + 1 / len(_OF_WORD[word])
    if not votes:
        return UNDETERMINED
    best = max(sorted(votes), key=lambda one: votes[one])
    spoken = {word for word in words if best in _OF_WORD.get(word, ())}
    return best if len(spoken) > 1 and votes[best] >= LEAST * len(words) else UNDETERMINED


@cache
def _script(letter: str) -> str:
    """Return the first word of a letter's name in Unicode, which is its script; empty for what is no letter."""
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""
