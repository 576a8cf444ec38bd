"""The wordings of the built-in domain: how each kind of fact is taught and tested.

Knows: for every kind, training questions, and test questions that are worded otherwise (they keep the manual's own terms).
Does not know: which facts there are (`facts.py`), how many are tested or in which order (`build.py`).

`{s}` is what a fact is about.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How one kind of fact is asked for; without `test`, the kind is taught but not tested."""

    train: tuple[str, ...]
    test: tuple[str, ...] = ()


WORDINGS = {
    "part number": Wording(
        (
            "What is the part number of the {s}?",
            "Which number do I order for a new {s} on the Tidewren 7?",
            "Under what number is the {s} listed?",
            "Please give the catalogue entry that identifies a Tidewren {s}.",
        ),
        ("I need a replacement {s}; please give me its part number.", "If I order a {s}, under which part number is that?"),
    ),
    "material": Wording(
        (
            "What is the {s} made of?",
            "Which material is used for the {s} of the Tidewren 7?",
            "Name the material of the {s}.",
            "From what substance does Pellowmarsh build the {s}?",
        ),
        ("Out of which material did the makers build the {s}?", "If I cut the {s} open, what would I see it is made of?"),
    ),
    "location": Wording(
        (
            "Where is the {s} fitted?",
            "In which place on the Tidewren 7 do I find the {s}?",
            "What is the location of the {s}?",
            "I have to reach the {s}; whereabouts does it sit?",
        ),
        ("I have to reach the {s}; in which place is it fitted?", "Tell me the location at which a {s} can be found."),
    ),
    "service interval": Wording(
        (
            "How often must the {s} be serviced?",
            "What is the service interval of the {s}?",
            "When does the Tidewren 7 need its {s} serviced?",
            "At what rhythm should a mechanic look after the {s}?",
        ),
        (
            "How long is the interval between two services of the {s}?",
            "Please tell me how often somebody has to service the {s}.",
        ),
    ),
    "supplier": Wording(
        (
            "What is the supplier code of the {s}?",
            "Who supplies the {s} for the Tidewren 7?",
            "Which supplier do I call about the {s}?",
            "To which vendor would Pellowmarsh turn for a fresh {s}?",
        ),
        ("Please give me the code of whoever supplies the {s}.", "I want to order a {s}; under which supplier code?"),
    ),
    "work of a part": Wording(
        ("What does the {s} do?", "What is the {s} for?", "Which work does the {s} of the Tidewren 7 perform?"),
    ),
    "torque": Wording(
        (
            "What torque do the bolts of the {s} need?",
            "How tight must I bolt the {s}?",
            "To which torque are the {s} bolts of the Tidewren 7 set?",
            "At how many newton metres should the wrench click on a {s}?",
        ),
        ("With what torque should I tighten the bolts on the {s}?", "I am bolting on the {s}: tell me its torque."),
    ),
    "fault meaning": Wording(
        (
            "What does fault {s} mean?",
            "The Tidewren 7 shows fault {s}. What has happened?",
            "Which trouble is reported by fault {s}?",
            "Explain the message {s} on the lectern.",
        ),
        ("The panel shows fault {s}; please explain its meaning.", "Fault {s} has come up. Tell me what it means."),
    ),
    "fault cause": Wording(
        (
            "What is the usual cause of fault {s}?",
            "What should I suspect first when fault {s} appears?",
            "Why does the Tidewren 7 report fault {s}?",
            "Behind the message {s} there is most often what?",
        ),
        ("Fault {s} has appeared; name its most usual cause.", "What tends to be the cause behind a fault {s}?"),
    ),
    "fault remedy": Wording(
        (
            "How do I clear fault {s}?",
            "What is the remedy for fault {s}?",
            "What must be done about fault {s} on the Tidewren 7?",
            "Give the cure that ends an {s} alarm.",
        ),
        ("Fault {s} has appeared; tell me the remedy.", "We keep seeing fault {s}. How can it be cleared?"),
    ),
    "alarm grade": Wording(
        (
            "What is the alarm grade of fault {s}?",
            "How serious is fault {s}?",
            "Which grade does the Tidewren 7 give to fault {s}?",
            "Is fault {s} a ripple, swell, squall or tempest?",
        ),
        ("Fault {s} has appeared; give me its alarm grade.", "Of the four alarm grades, which belongs to fault {s}?"),
    ),
    "crate": Wording(
        (
            "How is {s} ordered?",
            "In what quantity do I order {s}?",
            "How large are the crates of {s} for the Tidewren 7?",
            "State the packing unit in which {s} arrives.",
        ),
        ("How many make a crate when we order {s}?", "I have to order more {s}: in what crates does it come?"),
    ),
    "keeping time": Wording(
        (
            "How long does {s} keep?",
            "What is the keeping time of {s}?",
            "After how long must the {s} of the Tidewren 7 be thrown away?",
            "State the shelf life of {s}.",
        ),
        ("For how long can I keep {s}?", "Please tell me the keeping time that applies to {s}."),
    ),
    "store": Wording(
        (
            "Where is the {s} stored?",
            "In which place do we keep the {s} for the Tidewren 7?",
            "What is the proper store for {s}?",
            "Someone asks me to fetch {s}; where should I look?",
        ),
        ("I need {s}; where do we store it?", "Tell me the place in which {s} has to be stored."),
    ),
    "factory value": Wording(
        (
            "What is the factory value of {s}?",
            "At which notch does the Tidewren 7 leave the works for {s}?",
            "To what value do I reset {s}?",
            "Pellowmarsh delivers the machine with {s} standing at what?",
        ),
        ("I have lost the factory value for {s}; what was it?", "Please reset {s}: to which factory value?"),
    ),
    "control": Wording(
        (
            "Where is {s} changed?",
            "Where do I set the {s} of the Tidewren 7?",
            "Which control changes the {s}?",
            "An operator wishes to adjust {s}; where is this done?",
        ),
        ("I want to change {s}; where can that be done?", "Tell me where somebody would go to change {s}."),
    ),
    "lamp meaning": Wording(
        (
            "What does a {s} mean?",
            "The Tidewren 7 shows a {s}. What is it telling me?",
            "What is meant by a {s}?",
            "Interpret this signal from the mast: {s}.",
        ),
        ("I see a {s} on the mast; tell me its meaning.", "If there is a {s}, what does that mean for us?"),
    ),
    "lamp action": Wording(
        (
            "What must I do at a {s}?",
            "Which action does a {s} call for?",
            "How should an operator of the Tidewren 7 answer a {s}?",
            "The mast is giving us this: {s}. Our response?",
        ),
        ("I see a {s} on the mast; tell me what I must do.", "There is a {s}: which action has to follow?"),
    ),
    "first step": Wording(
        (
            "What is the first step of the {s}?",
            "How does the {s} begin?",
            "What do I do first in the {s} on the Tidewren 7?",
            "Before anything else in a {s}, what takes place?",
        ),
        ("I am about to begin the {s}; tell me the first step.", "With which step does somebody begin a {s}?"),
    ),
    "last step": Wording(
        (
            "What is the last step of the {s}?",
            "How does the {s} end?",
            "What do I do last in the {s} on the Tidewren 7?",
            "A {s} counts as complete after which act?",
        ),
        ("I want to end the {s}; tell me the last step.", "With which step does somebody end a {s}?"),
    ),
    "tool": Wording(
        (
            "Which tool does the {s} need?",
            "What tool is used for the {s}?",
            "What do I take from the tool chest of the Tidewren 7 for the {s}?",
            "Someone doing a {s} holds what implement?",
        ),
        ("I am about to begin the {s}; tell me which tool I need.", "A {s} cannot be done without which tool?"),
    ),
    "time allowed": Wording(
        (
            "How much time is allowed for the {s}?",
            "How long may the {s} take?",
            "In what time should the {s} of the Tidewren 7 be done?",
            "Plan the duration of a {s}.",
        ),
        ("Tell me how many minutes are allowed for a {s}.", "How much time may somebody take over the {s}?"),
    ),
    "safe distance": Wording(
        (
            "What is the safe distance from the {s}?",
            "How far must I stand from the running {s}?",
            "Which distance do I keep from the {s} of the Tidewren 7?",
            "At least how much clearance does the moving {s} demand?",
        ),
        ("The {s} is running; tell me the distance that is safe.", "How much distance should people keep from a running {s}?"),
    ),
    "first serial": Wording(
        (
            "From which serial number does the {s} fit?",
            "Which machines of the Tidewren 7 accept the {s}?",
            "What is the earliest machine that takes the {s}?",
            "Can every owner add a {s}? Starting with what plate number?",
        ),
        ("Will a {s} fit my machine? Tell me the first serial number.", "A {s} fits machines beginning at which serial?"),
    ),
    "mount": Wording(
        (
            "Where is the {s} mounted?",
            "On which mount of the Tidewren 7 does the {s} go?",
            "What is the mounting place of the {s}?",
            "Show me the fixing point for a {s}.",
        ),
        ("I have bought a {s}; tell me where it must be mounted.", "A {s} has its mounting place where?"),
    ),
    "general": Wording(
        (
            "What is the {s} of the Tidewren 7?",
            "Which {s} does the Tidewren 7 manual give?",
            "Tell me the {s} for a Tidewren 7.",
            "What does Pellowmarsh Works state as the {s}?",
        ),
    ),
}
