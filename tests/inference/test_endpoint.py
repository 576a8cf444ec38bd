"""An endpoint that fails in every way that endpoints do: one line each, nothing is lost, and nothing is asked twice."""

import time

import pytest

from selectune.data import Message
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.inference import endpoint as module
from selectune.inference.endpoint import Budget, EndpointResponder
from selectune.inference.remembering import Question, Rehearsal, about_tokens
from selectune.inference.responder import Asking, responder
from tests.endpoint import Endpoint, echoed


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)
    for name in ("OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)


def asked(*texts):
    return [[Message("user", text)] for text in texts]


TEXTS = [f"What is {i}?" for i in range(12)]


def one_line(error):
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    return str(error.value)


def test_answers_come_to_their_questions_a_few_at_once():
    def slowly(body):
        time.sleep(0.05)
        return echoed(body)

    with Endpoint(slowly) as there:
        made = EndpointResponder(there.url, "large", together=3, quiet=True)
        found = made.answers([*asked(*TEXTS), *asked(TEXTS[0])], max_new_tokens=7)
    assert found == [[f"said: {text}"] for text in [*TEXTS, TEXTS[0]]]
    assert len(there.asked) == 12 and 1 < there.most_at_once <= 3
    assert all(body["model"] == "large" and body["max_tokens"] == 7 and body["temperature"] == 0 for body in there.asked)
    assert (made.budget.read, made.budget.written) == (120, 60)


def test_samples_are_drawn_apart():
    with Endpoint(lambda body: str(body["seed"])) as there:
        found = EndpointResponder(there.url, "large", quiet=True).answers(asked("Hi"), samples=3, temperature=1.0, seed=2)
    assert found == [["2000", "2001", "2002"]]


def test_what_passes_is_tried_again():
    failures = [
        (429, "slow down", {"Retry-After": "0.01"}),
        (500, "oh", {}),
        (200, "{not json", {}),
        (200, '{"choices": []}', {}),
    ]

    def sometimes(body):
        return failures.pop() if failures else echoed(body)

    with Endpoint(sometimes) as there:
        assert EndpointResponder(there.url, "large", quiet=True).answers(asked("Hi")) == [["said: Hi"]]
    assert len(there.asked) == 5


def test_what_the_endpoint_asks_for_is_waited(monkeypatch):
    slept = []
    failures = [(429, "slow down", {"Retry-After": "7"}), (429, "slow down", {"Retry-After": "1e6"}), (503, "", {})]
    with Endpoint(lambda body: failures.pop(0) if failures else "yes") as there:
        made = EndpointResponder(there.url, "large", quiet=True)
        monkeypatch.setattr(made._stopped, "wait", slept.append)
        made.answers(asked("Hi"))
    assert slept[:2] == [7.0, module.LONGEST_PAUSE] and 0 < slept[2] <= 0.04


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ((500, "oh", {}), "status 500"),
        ((429, "slow down", {}), "status 429"),
        ((200, "{not json", {}), "does not reply as chat completions do"),
        ((200, '{"choices": [{"message": {"content": 7}}]}', {}), "does not reply as chat completions do"),
        ((400, '{"error": {"message": "no\\nsuch model"}}', {}), "no such model"),
        ((307, "", {"Location": "http://elsewhere.example/"}), "sends elsewhere"),
        ((404, "<html>lost</html>", {}), "status 404"),
    ],
)
def test_what_stays_wrong_is_one_line_and_nothing_is_lost(tmp_path, bad, told):
    with Endpoint() as there:
        there.reply = lambda body: echoed(body) if len(there.asked) <= 5 else bad
        made = EndpointResponder(there.url, "large", together=2, kept=tmp_path / "a.sqlite", quiet=True)
        with pytest.raises(UserError, match=told) as error:
            made.answers(asked(*TEXTS))
        one_line(error)
        before = [body["messages"][0]["content"] for body in there.asked[:5]]
        there.asked.clear()
        there.reply = echoed
        again = EndpointResponder(there.url, "large", kept=tmp_path / "a.sqlite", quiet=True).answers(asked(*TEXTS))
    assert again == [[f"said: {text}"] for text in TEXTS]
    assert sorted(body["messages"][0]["content"] for body in there.asked) == sorted(set(TEXTS) - set(before))


def test_what_is_on_its_way_comes_in_when_another_question_fails(tmp_path):
    def mixed(body):
        bad = body["messages"][0]["content"] == TEXTS[3]
        time.sleep(0.05 if bad else 0.3)
        return (400, "no", {}) if bad else echoed(body)

    with Endpoint(mixed) as there:
        with pytest.raises(UserError, match="status 400"):
            EndpointResponder(there.url, "large", kept=tmp_path / "a.sqlite", quiet=True).answers(asked(*TEXTS))
        came = len(there.asked) - 1
        there.reply = echoed
        there.asked.clear()
        EndpointResponder(there.url, "large", kept=tmp_path / "a.sqlite", quiet=True).answers(asked(*TEXTS))
    assert came >= 3 and len(there.asked) == 12 - came


def test_a_kill_loses_only_what_was_on_its_way(tmp_path, monkeypatch):
    with Endpoint() as there:
        made = EndpointResponder(there.url, "large", together=1, kept=tmp_path / "a.sqlite", quiet=True)
        plain = module.wait
        turns = []

        def killed(*given, **more):
            turns.append(1)
            if len(turns) == 7:
                raise KeyboardInterrupt
            return plain(*given, **more)

        monkeypatch.setattr(module, "wait", killed)
        with pytest.raises(KeyboardInterrupt):
            made.answers(asked(*TEXTS))
        monkeypatch.setattr(module, "wait", plain)
        there.asked.clear()
        EndpointResponder(there.url, "large", kept=tmp_path / "a.sqlite", quiet=True).answers(asked(*TEXTS))
    assert len(there.asked) == 6


def test_an_interruption_is_not_kept_waiting(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 60)
    failing = {"What is 3?", "What is 7?"}
    with Endpoint(lambda body: (503, "", {}) if body["messages"][0]["content"] in failing else echoed(body)) as there:
        coming = EndpointResponder(there.url, "large", together=3).ask(
            [Question(tuple(prompt), 0, 0.0, 8, 0) for prompt in asked(*TEXTS)]
        )
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            for number, _ in enumerate(coming):
                if number == 8:
                    coming.throw(KeyboardInterrupt())
    assert time.monotonic() - begin < 10


def test_half_a_character_is_kept_as_none(tmp_path):
    with Endpoint(lambda body: "a\ud83d") as there:
        assert EndpointResponder(there.url, "large", kept=tmp_path / "a.sqlite", quiet=True).answers(asked("Hi")) == [["a?"]]


def test_nobody_there_is_one_line():
    with Endpoint() as there:
        url = there.url
    with pytest.raises(UserError, match="cannot be reached") as error:
        EndpointResponder(url, "large", quiet=True).answers(asked("Hi"))
    one_line(error)


def test_a_key_goes_to_its_own_endpoint_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-openai")
    monkeypatch.setenv("MY_KEY", "wrong")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password from-netrc\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Endpoint() as there:
        EndpointResponder(there.url, "large", quiet=True).answers(asked("Hi"))
        assert "Authorization" not in there.headers[-1]
        abroad = EndpointResponder(there.url, "large", quiet=True)
        abroad._here = False
        abroad.answers(asked("Ho"))
        assert "Authorization" not in there.headers[-1]  # not what a .netrc says, either
        there.key = "secret"
        with pytest.raises(UserError, match="the key of MY_KEY") as error:
            EndpointResponder(there.url, "large", "MY_KEY", quiet=True).answers(asked("Hi"))
        assert "Bearer wrong" not in one_line(error) and len(there.asked) == 3
        monkeypatch.setenv("MY_KEY", "secret")
        assert EndpointResponder(there.url, "large", "MY_KEY", quiet=True).answers(asked("Hi")) == [["said: Hi"]]
    assert EndpointResponder("https://api.openai.com/v1", "large", quiet=True)._key == "secret-of-openai"
    for url, name, told in (
        ("https://api.openai.com/v1", "NO_SUCH_KEY", "NO_SUCH_KEY is not set"),
        ("http://elsewhere.example/v1", "MY_KEY", "unencrypted"),
        ("https://me:secret@elsewhere.example/v1", None, "password"),
        ("elsewhere.example/v1", None, "address"),
        ("ftp://elsewhere.example/v1", None, "address"),
    ):
        with pytest.raises(UserError, match=told) as error:
            EndpointResponder(url, "large", name)
        assert "secret" not in one_line(error)


def test_a_budget_is_not_exceeded_and_what_came_is_kept(tmp_path):
    most = about_tokens(asked(TEXTS[0])[0]) + 30
    by_tokens, by_cost = Budget(most_tokens=3 * 15 + most), Budget(most_cost=(3 * 20 + most) * 1e-6, prices=(1.0, 2.0))
    for budget, reach in ((by_tokens, 4), (by_cost, 2)):  # what was set aside for an answer and not used is given back
        with Endpoint() as there:
            kept = tmp_path / f"{budget.most_cost}.sqlite"
            made = EndpointResponder(there.url, "large", None, budget, together=4, kept=kept, quiet=True)
            with pytest.raises(UserError, match="budget") as error:
                made.answers(asked(*TEXTS), max_new_tokens=30)
            got = len(there.asked)
            assert got == reach and f"{got} of 12" in one_line(error)
            assert budget.read + budget.written <= (budget.most_tokens or 1e9)
            assert budget.cost(budget.read, budget.written) <= (budget.most_cost or 1e9)
            again = EndpointResponder(there.url, "large", kept=kept, quiet=True)
            assert len(again.answers(asked(*TEXTS), max_new_tokens=30)) == len(there.asked) == 12


def test_an_endpoint_may_name_the_limit_otherwise():
    def newer(body):
        return (400, "use max_completion_tokens", {}) if "max_tokens" in body else echoed(body)

    with Endpoint(newer) as there:
        found = EndpointResponder(there.url, "large", together=3, quiet=True).answers(asked(*TEXTS), max_new_tokens=9)
    assert found == [[f"said: {text}"] for text in TEXTS] and there.asked[-1]["max_completion_tokens"] == 9


def test_a_rehearsal_counts_and_asks_nothing(tmp_path):
    with Endpoint() as there:
        kept = tmp_path / "a.sqlite"
        EndpointResponder(there.url, "large", kept=kept, quiet=True).answers(asked(*TEXTS[:5]), max_new_tokens=20)
        rehearsal = Rehearsal()
        made = EndpointResponder(there.url, "large", "NO_SUCH_KEY", kept=kept, rehearsal=rehearsal)
        found = made.answers(asked(*TEXTS, *TEXTS), max_new_tokens=20)
        made.answers(asked(*TEXTS), max_new_tokens=20)
    assert found[:6] == [[f"said: {text}"] for text in TEXTS[:5]] + [[""]] and len(there.asked) == 5
    assert (rehearsal.calls, rehearsal.written) == (7, 140)
    assert rehearsal.read == sum(about_tokens(one) for one in asked(*TEXTS[5:]))


def test_a_methods_settings_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))
    pool = Pool([], lambda: None, lambda words: None, quiet=True)
    with Endpoint() as there:
        made = responder(Asking(by_endpoint=there.url, by_model="large", most_tokens=1000), pool)
        assert made.answers(asked("Hi")) == [["said: Hi"]] and made.budget.most_tokens == 1000
        assert responder(Asking(by_endpoint=there.url + "/", by_model="large"), pool).answers(asked("Hi")) == [["said: Hi"]]
        assert len(there.asked) == 1  # without a folder answers are kept in the user's cache: they may have cost something
    for wrong, told in (({"by_endpoint": there.url}, "name of a model"),
                        ({"by_endpoint": there.url, "by_model": "x", "most_cost": 1}, "prices")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            responder(Asking(**wrong), pool)


def test_a_place_where_nothing_can_be_kept_is_one_line(tmp_path):
    (tmp_path / "a.sqlite").write_text("this is no database " * 100)
    with Endpoint() as there, pytest.raises(UserError, match="cannot be kept") as error:
        EndpointResponder(there.url, "large", kept=tmp_path / "a.sqlite", quiet=True).answers(asked("Hi"))
    one_line(error)
    assert not there.asked
