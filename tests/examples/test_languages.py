"""Languages told, shared and added one by one."""

import numpy as np
import pytest

from selectune.data import Message, Record
from selectune.errors import UserError
from selectune.evaluation.exposure import best_number, by_exposure, exposure, rises
from selectune.examples import Pool
from selectune.examples.factors.language import UNDETERMINED, language
from selectune.examples.languages import Languages, interleaved
from tests.examples.test_signals import pool

TEXTS = {
    "en": "What is the capital of the country that is north of the sea?",
    "de": "Wie heißt die Hauptstadt des Landes und was ist nicht auf der Karte?",
    "fr": "Quelle est la capitale du pays qui est dans le nord et comment y aller ?",
    "es": "¿Cuál es la capital del país que está en el norte y por qué no se ve?",
    "it": "Qual è la capitale del paese che si trova nel nord e come sono gli abitanti?",
    "pt": "Qual é a capital do país que fica ao norte e como são os habitantes?",
    "nl": "Wat is de hoofdstad van het land en hoe komt men er met een schip naar toe?",
    "sv": "Vad är huvudstaden i landet som ligger på ön och hur kan jag inte se den?",
    "pl": "Jak się nazywa stolica kraju, który jest na północy, i co to jest?",
    "fi": "Mikä on maan pääkaupunki ja miten se on kuin muut, mutta ei ole?",
    "tr": "Bu ülkenin başkenti nedir ve nasıl bir yer olarak bilinir, çok daha büyük mı?",
    "vi": "Thủ đô của đất nước này là gì và những người ở đó có được như thế nào?",
    "id": "Apa ibu kota negara yang ada di utara dan bagaimana dengan orang itu?",
    "ru": "Как называется столица этой страны?", "uk": "Як називається столиця цієї країни?", "el": "Ποια είναι η πρωτεύουσα;",
    "ar": "ما هي عاصمة هذا البلد؟", "fa": "پایتخت این کشور چیست؟", "he": "מהי בירת המדינה?",
    "hi": "इस देश की राजधानी क्या है?", "ja": "この国の首都はどこですか。",
    "zh": "这个国家的首都是哪里？", "ko": "이 나라의 수도는 어디입니까?", "th": "เมืองหลวงของประเทศนี้คืออะไร",
}  # fmt: skip


@pytest.mark.parametrize("told", TEXTS)
def test_languages_are_told(told):
    assert language(TEXTS[told]) == told


@pytest.mark.parametrize("text", ["", "42 + 17 = 59", "🙂👩‍👧", "SELECT id FROM t", "kwijibo zorp flumph", "x = y"])
def test_what_no_language_speaks_for_is_undetermined(text):
    assert language(text) == UNDETERMINED


def records(**counts):
    made = []
    for told, count in counts.items():
        made += [Record("chat", (Message("user", TEXTS[told]), Message("assistant", f"{told} {n}")), source=f"{told}.jsonl")
                 for n in range(count)]  # fmt: skip
    return made


POOL = records(en=40, de=20, fr=10, ja=4)


def counted(choice, some=POOL):
    found = {}
    for place in choice.places.tolist():
        found[some[place].source[:2]] = found.get(some[place].source[:2], 0) + 1
    return found


def choose(folder, some=POOL, seed=0, **values):
    return Languages(**values).select(pool(folder, some, seed=seed))


def test_shares_are_equal_or_the_pools_or_between(llama_folder):
    assert counted(choose(llama_folder, count=24)) == {"en": 7, "de": 7, "fr": 6, "ja": 4}  # what ja has not goes to the others
    assert counted(choose(llama_folder, count=37, exponent=1.0)) == {"en": 20, "de": 10, "fr": 5, "ja": 2}
    assert counted(choose(llama_folder, count=15, exponent=0.5, number=2)) == {"en": 9, "de": 6}


def test_one_more_language_keeps_those_before(llama_folder):
    order = ["en", "de", "fr", "ja"]
    for number in range(1, 5):
        assert set(counted(choose(llama_folder, count=4, number=number))) == set(order[:number])
    assert set(counted(choose(llama_folder, count=4, number=2, first=("ja", "fr")))) == {"ja", "fr"}
    assert counted(choose(llama_folder, count=30, number=1, first=("fr",))) == {
        "fr": 10,
        "en": 20,
    }  # the budget needs more than there is
    assert set(counted(choose(llama_folder, count=4, number=1, among="source", first=("de.jsonl",)))) == {"de"}
    with pytest.raises(UserError, match="no language 'es'"):
        choose(llama_folder, count=4, first=("es",))


def test_undetermined_records_join_last(llama_folder):
    plain = [Record("chat", (Message("user", f"{n} + {n}"), Message("assistant", str(2 * n)))) for n in range(60)]
    chosen = choose(llama_folder, [*POOL, *plain], count=8, number=4)
    assert all(place < len(POOL) for place in chosen.places)


def test_another_seed_draws_other_records(llama_folder):
    assert choose(llama_folder, count=8).places.tolist() != choose(llama_folder, count=8, seed=1).places.tolist()


def test_every_beginning_is_shared_as_the_whole():
    places = interleaved([np.arange(12), np.arange(100, 104)], [9, 3], np.ones(104, dtype=np.int64))
    assert sorted(places) == [*range(12), *range(100, 104)] and sorted(places[12:]) == [9, 10, 11, 103]
    for end in range(1, 13):
        assert abs(sum(place >= 100 for place in places[:end]) - end / 4) <= 1


def test_shares_are_of_what_the_budget_is_counted_in():
    made = Pool(records(en=100, de=100, fr=100), lambda: None, lambda words: None, quiet=True)
    made.tokens = np.repeat([10, 25, 100], 100)
    method = Languages(first=("en", "de"), number=2, by="tokens", count=1000)
    choice = method.select(made)
    assert counted(choice, made.records) == {"en": 50, "de": 20} and made.notes == ["shares in tokens: en 500, de 500"]
    half = choice.places[: len(choice.places) // 2]
    assert abs(made.tokens[half[half < 100]].sum() - made.tokens[half[half >= 100]].sum()) <= 25
    more = method.model_copy(update={"count": 4000}).select(made)  # nothing of the kept ones is left: the next language
    assert counted(more, made.records) == {"en": 100, "de": 100, "fr": 5}


def test_scores_by_exposure():
    near = {"en": {"de": 1.0, "fr": 2.0, "ja": 9.0}, "de": {"en": 1.0, "fr": 3.0, "ja": 9.0},
            "fr": {"en": 2.0, "de": 3.0, "ja": 8.0}, "ja": {"en": 9.0, "de": 9.0, "fr": 8.0}}  # fmt: skip
    classes = exposure({"en"}, near)
    assert classes == {"en": "trained", "de": "similar", "fr": "similar", "ja": "distant"}
    assert exposure({"en", "fr"}, near) == {"en": "trained", "fr": "trained", "de": "similar", "ja": "distant"}
    assert set(exposure(set(near), near).values()) == {"trained"} and set(exposure(set(), near).values()) == {"distant"}
    scores = {"en": 0.9, "de": 0.6, "fr": 0.4, "ja": 0.1}
    assert by_exposure(scores, classes) == pytest.approx({"trained": 0.9, "similar": 0.5, "distant": 0.1})
    assert best_number([0.1, 0.4, 0.4, 0.3]) == 2
    assert rises([0.1, 0.2, 0.2]) and not rises([0.1, 0.2, 0.15]) and rises([0.1, 0.2, 0.15], 0.06)
