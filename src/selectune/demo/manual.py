"""The built-in domain as a readable manual.

Knows: the chapters, and how an entity's facts become a short paragraph.
Does not know: questions; a reader of documents is meant to make its own.
"""

from selectune.demo import facts


def manual() -> str:
    """Return the manual as Markdown."""
    return "\n\n".join([*_opening(), *_safety(), *_parts(), *_settings(), *_lamps(), *_jobs(), *_faults(), *_rest()]) + "\n"


def _opening() -> list[str]:
    g = facts.GENERAL
    return [
        f"# {facts.MACHINE}: service manual",
        f"*{facts.MAKER}, {g['home town']}. The machine, its maker and everything below are invented.*",
        "## 1. The machine",
        f"The {facts.MACHINE} is a harbour machine for {g['main purpose']}. It was designed by {g['designer']} and "
        f"is made by {g['maker']} at {g['home town']}. Seaweed goes in at the seaward end, is washed and tumbled, laid "
        "out as pulp, pressed, dried in the loft and delivered in stacks on the landward side.",
        f"The frame is painted {g['frame colour']}. Empty, the machine weighs {g['empty weight']}; in a day it gives "
        f"{g['daily output']}. The operator stands at the lectern, "
        "in sight of the lamp mast.",
    ]


def _safety() -> list[str]:
    g = facts.GENERAL
    return [
        "## 2. Safety",
        f"An operator is no younger than {g['minimum operator age']} and wears {g['required glove type']}. "
        f"Before anyone enters the loft, let it cool for {g['cooling time before entry']}.",
        "While the machine runs, keep the distance that is given with each part.",
    ]


def _parts() -> list[str]:
    lines = ["## 3. Parts", "Each part is ordered by its number from the supplier whose code is given."]
    for name, (station, number, work) in facts.PARTS.items():
        place, material, interval, supplier, torque, distance = facts.STATIONS[station]
        lines += [
            f"### {name.capitalize()} ({number}, {station} station)",
            f"The {name} {work}. It is made of {material} and fitted {place}. Service it {interval}. Tighten its bolts to "
            f"{torque}. Stand {distance} away while it runs. Order part {number} from {supplier}.",
        ]
    return lines


def _settings() -> list[str]:
    rows = [f"| {name} | {value} | {place} |" for name, (value, place) in facts.SETTINGS.items()]
    return [
        "## 4. Settings",
        "Every setting is counted in notches, from 1 to 99. After a service, return each one to its factory value.",
        "\n".join(["| setting | factory value | changed |", "|---|---|---|", *rows]),
    ]


def _lamps() -> list[str]:
    return [
        "## 5. The lamp mast",
        "\n".join(
            f"- **{signal.capitalize()}**: {meaning}. What to do: {action}." for signal, (meaning, action) in facts.LAMPS.items()
        ),
    ]


def _jobs() -> list[str]:
    lines = ["## 6. Procedures"]
    for name, (first, between, last, tool, time) in facts.JOBS.items():
        steps = [f"{number}. {step.capitalize()}." for number, step in enumerate((first, *between, last), start=1)]
        lines += [f"### {name.capitalize()}", f"Tool: the {tool}. Time allowed: {time}.", "\n".join(steps)]
    return lines


def _faults() -> list[str]:
    lines = [
        "## 7. Fault codes",
        "An alarm has one of four grades, named after the weather at sea. In order of weight: ripple, swell, squall, tempest.",
    ]
    for code, meaning in facts.FAULTS.items():
        cause, remedy, grade = facts.FAULT_LETTERS[code[0]]
        lines += [f"### {code}: {meaning} ({grade})", f"The usual cause is {cause}. To clear the fault, {remedy}."]
    return lines


def _rest() -> list[str]:
    supplies = [
        f"- **{name.capitalize()}** is ordered in {crate}, keeps for {time}, and is stored {place}."
        for name, (crate, time, place) in facts.SUPPLIES.items()
    ]
    attachments = [
        f"- The **{name}** fits machines from {serial} onward and is mounted {place}."
        for name, (serial, place) in facts.ATTACHMENTS.items()
    ]
    return ["## 8. Supplies", "\n".join(supplies), "## 9. Attachments", "\n".join(attachments)]
