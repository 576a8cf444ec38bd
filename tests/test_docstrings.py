"""What is written below attributes is found, in the class itself or the one before."""

from selectune.docstrings import of_attributes


class Base:
    size: int = 1
    """How large,
    in metres."""
    silent: int = 2
    colour: str = "red"
    """Of the lamp."""


class Narrower(Base):
    size: int = 3
    colour: str = "blue"
    """Of the
    door."""
    plain = 4
    """No annotation."""


def test_words_are_those_of_the_nearest_class_that_has_some():
    assert of_attributes(Base) == {"size": "How large,\nin metres.", "colour": "Of the lamp."}
    assert of_attributes(Narrower) == {"size": "How large,\nin metres.", "colour": "Of the\ndoor."}


def test_a_class_without_a_source_says_nothing():
    made = type("Made", (), {"__annotations__": {"size": int}})
    assert of_attributes(made) == {}
