"""A hub whose name nobody knows is not asked."""

import socket

import datasets
import pytest
from huggingface_hub import constants

from selectune import hub


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    hub.hub_is_there.cache_clear()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    yield
    hub.hub_is_there.cache_clear()


def unknown(*_):
    raise socket.gaierror("Name or service not known")


def test_an_unknown_name_is_told_to_the_libraries_once(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert not hub.hub_is_there()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_a_known_name_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names: asked.append(names))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8443/v2")
    assert hub.hub_is_there() and asked == [("hub.example", 8443)]
    assert not constants.HF_HUB_OFFLINE


def test_a_proxy_resolves_names_itself(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.hub_is_there()
    hub.hub_is_there.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_is_there()
