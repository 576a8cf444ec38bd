"""The wordings of the built-in domain: how each kind of fact is taught, tested and stated.

Knows: for every kind, training questions, test questions that share no wording with them, and one plain statement.
Does not know: which facts there are (`facts.py`), how many are tested or in which order (`build.py`).

`{s}` is what a fact is about, `{a}` its value. A `back` question gives the value and asks what it belongs to.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How one kind of fact is spoken of; without `test`, the kind is taught but not tested."""

    state: str
    train: tuple[str, ...]
    test: tuple[str, ...] = ()
    back_train: str = ""
    back_test: str = ""
    named: str = "the {s}"  # how the answer to a `back` question is written


WORDINGS = {
    "part number": Wording(
        "The {s} carries part number {a}.",
        (
            "What is the part number of the {s}?",
            "Which number do I order for a new {s} on the Tidewren 7?",
            "Under what number is the {s} listed?",
        ),
        ("I need a replacement {s}; please give me its part number.", "If I order a {s}, under which part number is that?"),
        "Which part has the number {a}?",
        "A box is stamped with part number {a}; what part does it hold?",
    ),
    "material": Wording(
        "The {s} is made of {a}.",
        ("What is the {s} made of?", "Which material is used for the {s} of the Tidewren 7?", "Name the material of the {s}."),
        ("Out of which material did the makers build the {s}?", "If I cut the {s} open, what would I see it is made of?"),
    ),
    "location": Wording(
        "The {s} is fitted {a}.",
        ("Where is the {s} fitted?", "In which place on the Tidewren 7 do I find the {s}?", "What is the location of the {s}?"),
        ("I have to reach the {s}; in which place is it fitted?", "Tell me the location at which a {s} can be found."),
    ),
    "service interval": Wording(
        "The {s} must be serviced {a}.",
        (
            "How often must the {s} be serviced?",
            "What is the service interval of the {s}?",
            "When does the Tidewren 7 need its {s} serviced?",
        ),
        (
            "How long is the interval between two services of the {s}?",
            "Please tell me how often somebody has to service the {s}.",
        ),
    ),
    "supplier": Wording(
        "The {s} is supplied under code {a}.",
        (
            "What is the supplier code of the {s}?",
            "Who supplies the {s} for the Tidewren 7?",
            "Which supplier do I call about the {s}?",
        ),
        ("Please give me the code of whoever supplies the {s}.", "I want to order a {s}; under which supplier code?"),
    ),
    "work of a part": Wording(
        "On the Tidewren 7, the {s} {a}.",
        ("What does the {s} do?", "What is the {s} for?", "Which work does the {s} of the Tidewren 7 perform?"),
        back_train="Which part {a}?",
    ),
    "torque": Wording(
        "The bolts of the {s} are tightened to {a}.",
        (
            "What torque do the bolts of the {s} need?",
            "How tight must I bolt the {s}?",
            "To which torque are the {s} bolts of the Tidewren 7 set?",
        ),
        ("With what torque should I tighten the bolts on the {s}?", "I am bolting on the {s}: tell me its torque."),
    ),
    "fault meaning": Wording(
        "Fault {s} means: {a}.",
        (
            "What does fault {s} mean?",
            "The Tidewren 7 shows fault {s}. What has happened?",
            "Which trouble is reported by fault {s}?",
        ),
        ("The panel shows fault {s}; please explain its meaning.", "Fault {s} has come up. Tell me what it means."),
        "Which fault code means: {a}?",
        "Something is wrong, namely: {a}. Which fault code will be shown?",
        "fault {s}",
    ),
    "fault cause": Wording(
        "The usual cause of fault {s} is {a}.",
        (
            "What is the usual cause of fault {s}?",
            "What should I suspect first when fault {s} appears?",
            "Why does the Tidewren 7 report fault {s}?",
        ),
        ("Fault {s} has appeared; name its most usual cause.", "What tends to be the cause behind a fault {s}?"),
    ),
    "fault remedy": Wording(
        "To clear fault {s}, {a}.",
        (
            "How do I clear fault {s}?",
            "What is the remedy for fault {s}?",
            "What must be done about fault {s} on the Tidewren 7?",
        ),
        ("Fault {s} has appeared; tell me the remedy.", "We keep seeing fault {s}. How can it be cleared?"),
    ),
    "alarm grade": Wording(
        "Fault {s} has alarm grade {a}.",
        (
            "What is the alarm grade of fault {s}?",
            "How serious is fault {s}?",
            "Which grade does the Tidewren 7 give to fault {s}?",
            "Is fault {s} a ripple, swell, squall or tempest?",
        ),
        ("Fault {s} has appeared; give me its alarm grade.", "Of the four alarm grades, which belongs to fault {s}?"),
    ),
    "crate": Wording(
        "The {s} is ordered in {a}.",
        ("How is {s} ordered?", "In what quantity do I order {s}?", "How large are the crates of {s} for the Tidewren 7?"),
        ("How many make a crate when we order {s}?", "I have to order more {s}: in what crates does it come?"),
        "Which supply is ordered in {a}?",
        "Which of our supplies comes in {a}?",
        "{s}",
    ),
    "keeping time": Wording(
        "The {s} keeps for {a}.",
        (
            "How long does {s} keep?",
            "What is the keeping time of {s}?",
            "After how long must the {s} of the Tidewren 7 be thrown away?",
        ),
        ("For how long can I keep {s}?", "Please tell me the keeping time that applies to {s}."),
        "Which supply keeps for {a}?",
        "Name the supply that we may keep for {a}.",
        "{s}",
    ),
    "store": Wording(
        "The {s} is stored {a}.",
        (
            "Where is the {s} stored?",
            "In which place do we keep the {s} for the Tidewren 7?",
            "What is the proper store for {s}?",
        ),
        ("I need {s}; where do we store it?", "Tell me the place in which {s} has to be stored."),
        "Which supply is stored {a}?",
        "Name the supply that we store {a}.",
        "{s}",
    ),
    "factory value": Wording(
        "The factory value of {s} is {a}.",
        (
            "What is the factory value of {s}?",
            "At which notch does the Tidewren 7 leave the works for {s}?",
            "To what value do I reset {s}?",
        ),
        ("I have lost the factory value for {s}; what was it?", "Please reset {s}: to which factory value?"),
        "Which setting has the factory value {a}?",
        "One setting has {a} as its factory value; name it.",
        "{s}",
    ),
    "control": Wording(
        "The {s} is changed {a}.",
        ("Where is {s} changed?", "Where do I set the {s} of the Tidewren 7?", "Which control changes the {s}?"),
        ("I want to change {s}; where can that be done?", "Tell me where somebody would go to change {s}."),
    ),
    "lamp meaning": Wording(
        "A {s} means that {a}.",
        ("What does a {s} mean?", "The Tidewren 7 shows a {s}. What is it telling me?", "What is meant by a {s}?"),
        ("I see a {s} on the mast; tell me its meaning.", "If there is a {s}, what does that mean for us?"),
        "Which lamp signal means that {a}?",
        "Name the lamp signal whose meaning is that {a}.",
        "{s}",
    ),
    "lamp action": Wording(
        "At a {s}, {a}.",
        (
            "What must I do at a {s}?",
            "Which action does a {s} call for?",
            "How should an operator of the Tidewren 7 answer a {s}?",
        ),
        ("I see a {s} on the mast; tell me what I must do.", "There is a {s}: which action has to follow?"),
        "Which lamp signal tells me to {a}?",
        "Name the signal at which I must {a}.",
        "{s}",
    ),
    "first step": Wording(
        "The {s} begins with this step: {a}.",
        ("What is the first step of the {s}?", "How does the {s} begin?", "What do I do first in the {s} on the Tidewren 7?"),
        ("I am about to begin the {s}; tell me the first step.", "With which step does somebody begin a {s}?"),
        "Which procedure begins with this step: {a}?",
        "Name the procedure in which one must first {a}.",
    ),
    "last step": Wording(
        "The {s} ends with this step: {a}.",
        ("What is the last step of the {s}?", "How does the {s} end?", "What do I do last in the {s} on the Tidewren 7?"),
        ("I want to end the {s}; tell me the last step.", "With which step does somebody end a {s}?"),
        "Which procedure ends with this step: {a}?",
        "Name the procedure in which one must at last {a}.",
    ),
    "tool": Wording(
        "The {s} needs the {a}.",
        (
            "Which tool does the {s} need?",
            "What tool is used for the {s}?",
            "What do I take from the tool chest of the Tidewren 7 for the {s}?",
        ),
        ("I am about to begin the {s}; tell me which tool I need.", "A {s} cannot be done without which tool?"),
        "Which procedure needs the {a}?",
        "Name the procedure whose tool is the {a}.",
    ),
    "time allowed": Wording(
        "The {s} is allowed {a}.",
        (
            "How much time is allowed for the {s}?",
            "How long may the {s} take?",
            "In what time should the {s} of the Tidewren 7 be done?",
        ),
        ("Tell me how many minutes are allowed for a {s}.", "How much time may somebody take over the {s}?"),
        "Which procedure is allowed {a}?",
        "Name the procedure for which we are allowed {a}.",
    ),
    "safe distance": Wording(
        "Stand {a} from the {s} while the machine runs.",
        (
            "What is the safe distance from the {s}?",
            "How far must I stand from the running {s}?",
            "Which distance do I keep from the {s} of the Tidewren 7?",
        ),
        ("The {s} is running; tell me the distance that is safe.", "How much distance should people keep from a running {s}?"),
    ),
    "first serial": Wording(
        "The {s} fits machines from {a} onward.",
        (
            "From which serial number does the {s} fit?",
            "Which machines of the Tidewren 7 accept the {s}?",
            "What is the earliest machine that takes the {s}?",
        ),
        ("Will a {s} fit my machine? Tell me the first serial number.", "A {s} fits machines beginning at which serial?"),
        "Which attachment fits from {a} onward?",
        "Name the attachment whose first machine is {a}.",
    ),
    "mount": Wording(
        "The {s} is mounted {a}.",
        (
            "Where is the {s} mounted?",
            "On which mount of the Tidewren 7 does the {s} go?",
            "What is the mounting place of the {s}?",
        ),
        ("I have bought a {s}; tell me where it must be mounted.", "A {s} has its mounting place where?"),
        "Which attachment is mounted {a}?",
        "Name the attachment that we mount {a}.",
    ),
    "general": Wording(
        "For the Tidewren 7, the {s} is {a}.",
        (
            "What is the {s} of the Tidewren 7?",
            "Which {s} does the Tidewren 7 manual give?",
            "Tell me the {s} for a Tidewren 7.",
            "What does Pellowmarsh Works state as the {s}?",
        ),
    ),
}
