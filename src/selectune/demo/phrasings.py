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
        (
            "Please give the catalogue entry that identifies a Tidewren {s}.",
            "I need a replacement {s}; how is it numbered?",
        ),
        "Which part has the number {a}?",
        "A box is stamped {a}. What component is inside?",
    ),
    "material": Wording(
        "The {s} is made of {a}.",
        (
            "What is the {s} made of?",
            "Which material is used for the {s} of the Tidewren 7?",
            "Name the material of the {s}.",
        ),
        ("From what substance does Pellowmarsh build the {s}?", "The body of a {s} consists of what?"),
    ),
    "location": Wording(
        "The {s} is fitted {a}.",
        (
            "Where is the {s} fitted?",
            "In which place on the Tidewren 7 do I find the {s}?",
            "What is the location of the {s}?",
        ),
        ("I have to reach the {s}; whereabouts does it sit?", "Describe the spot where a {s} belongs."),
    ),
    "service interval": Wording(
        "The {s} must be serviced {a}.",
        (
            "How often must the {s} be serviced?",
            "What is the service interval of the {s}?",
            "When does the Tidewren 7 need its {s} serviced?",
        ),
        ("At what rhythm should a mechanic look after the {s}?", "How frequently is maintenance on the {s} due?"),
    ),
    "supplier": Wording(
        "The {s} is supplied under code {a}.",
        (
            "What is the supplier code of the {s}?",
            "Who supplies the {s} for the Tidewren 7?",
            "Which supplier do I call about the {s}?",
        ),
        ("To which vendor would Pellowmarsh turn for a fresh {s}?", "Out of whose stock comes the {s}?"),
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
        (
            "At how many newton metres should the wrench click on a {s}?",
            "Fixing the {s} calls for what tightening force?",
        ),
    ),
    "fault meaning": Wording(
        "Fault {s} means: {a}.",
        (
            "What does fault {s} mean?",
            "The Tidewren 7 shows fault {s}. What has happened?",
            "Which trouble is reported by fault {s}?",
        ),
        ("Explain the message {s} on the lectern.", "An operator reads {s} on the panel; what is wrong?"),
        "Which fault code means: {a}?",
        "What message appears for “{a}”?",
        "fault {s}",
    ),
    "fault cause": Wording(
        "The usual cause of fault {s} is {a}.",
        (
            "What is the usual cause of fault {s}?",
            "What should I suspect first when fault {s} appears?",
            "Why does the Tidewren 7 report fault {s}?",
        ),
        ("Behind the message {s} there is most often what?", "Say what tends to bring about an {s} alarm."),
    ),
    "fault remedy": Wording(
        "To clear fault {s}, {a}.",
        (
            "How do I clear fault {s}?",
            "What is the remedy for fault {s}?",
            "What must be done about fault {s} on the Tidewren 7?",
        ),
        ("Give the cure that ends an {s} alarm.", "The panel keeps saying {s}; how does one put it right?"),
    ),
    "alarm grade": Wording(
        "Fault {s} has alarm grade {a}.",
        (
            "What is the alarm grade of fault {s}?",
            "How serious is fault {s}?",
            "Which grade does the Tidewren 7 give to fault {s}?",
            "Is fault {s} a ripple, swell, squall or tempest?",
        ),
        ("Rank the severity of message {s}.", "On the weather scale, how grave is an {s} alarm?"),
    ),
    "crate": Wording(
        "The {s} is ordered in {a}.",
        (
            "How is {s} ordered?",
            "In what quantity do I order {s}?",
            "How large are the crates of {s} for the Tidewren 7?",
        ),
        ("State the packing unit in which {s} arrives.", "Buying {s} means taking what amount at once?"),
        "Which supply is ordered in {a}?",
        "What consumable arrives in {a}?",
        "{s}",
    ),
    "keeping time": Wording(
        "The {s} keeps for {a}.",
        (
            "How long does {s} keep?",
            "What is the keeping time of {s}?",
            "After how long must the {s} of the Tidewren 7 be thrown away?",
        ),
        ("State the shelf life of {s}.", "Unopened {s} stays good for what period?"),
        "Which supply keeps for {a}?",
        "What consumable stays good for {a}?",
        "{s}",
    ),
    "store": Wording(
        "The {s} is stored {a}.",
        (
            "Where is the {s} stored?",
            "In which place do we keep the {s} for the Tidewren 7?",
            "What is the proper store for {s}?",
        ),
        ("Someone asks me to fetch {s}; where should I look?", "Tell me the spot that holds our {s}."),
        "Which supply is stored {a}?",
        "Searching {a}, what consumable turns up?",
        "{s}",
    ),
    "factory value": Wording(
        "The factory value of {s} is {a}.",
        (
            "What is the factory value of {s}?",
            "At which notch does the Tidewren 7 leave the works for {s}?",
            "To what value do I reset {s}?",
        ),
        ("Pellowmarsh delivers the machine with {s} standing at what?", "Give the default position of {s}."),
        "Which setting has the factory value {a}?",
        "What adjustment stands at {a} by default?",
        "{s}",
    ),
    "control": Wording(
        "The {s} is changed {a}.",
        ("Where is {s} changed?", "Where do I set the {s} of the Tidewren 7?", "Which control changes the {s}?"),
        ("An operator wishes to adjust {s}; where is this done?", "Point me to the place that governs {s}."),
    ),
    "lamp meaning": Wording(
        "A {s} means that {a}.",
        ("What does a {s} mean?", "The Tidewren 7 shows a {s}. What is it telling me?", "What is meant by a {s}?"),
        ("Interpret this signal from the mast: {s}.", "Somebody on deck sees a {s}; what is going on?"),
        "Which lamp signal means that {a}?",
        "How does the mast show that {a}?",
        "{s}",
    ),
    "lamp action": Wording(
        "At a {s}, {a}.",
        (
            "What must I do at a {s}?",
            "Which action does a {s} call for?",
            "How should an operator of the Tidewren 7 answer a {s}?",
        ),
        ("The mast is giving us this: {s}. Our response?", "Name the right reaction upon seeing a {s}."),
        "Which lamp signal tells me to {a}?",
        "What sign on the mast asks one to {a}?",
        "{s}",
    ),
    "first step": Wording(
        "The {s} begins with this step: {a}.",
        (
            "What is the first step of the {s}?",
            "How does the {s} begin?",
            "What do I do first in the {s} on the Tidewren 7?",
        ),
        ("Before anything else in a {s}, what takes place?", "Name the opening move for the {s}."),
        "Which procedure begins with this step: {a}?",
        "To {a} opens what routine?",
        "the {s}",
    ),
    "last step": Wording(
        "The {s} ends with this step: {a}.",
        (
            "What is the last step of the {s}?",
            "How does the {s} end?",
            "What do I do last in the {s} on the Tidewren 7?",
        ),
        ("A {s} counts as complete after which act?", "Name the closing move for the {s}."),
        "Which procedure ends with this step: {a}?",
        "To {a} closes what routine?",
        "the {s}",
    ),
    "tool": Wording(
        "The {s} needs the {a}.",
        (
            "Which tool does the {s} need?",
            "What tool is used for the {s}?",
            "What do I take from the tool chest of the Tidewren 7 for the {s}?",
        ),
        ("Someone doing a {s} holds what implement?", "Equip me for the {s}: what goes in my hand?"),
        "Which procedure needs the {a}?",
        "For what routine would one fetch the {a}?",
        "the {s}",
    ),
    "time allowed": Wording(
        "The {s} is allowed {a}.",
        (
            "How much time is allowed for the {s}?",
            "How long may the {s} take?",
            "In what time should the {s} of the Tidewren 7 be done?",
        ),
        ("Plan the duration of a {s}.", "From start to finish a {s} lasts how many minutes?"),
        "Which procedure is allowed {a}?",
        "What routine is planned to last {a}?",
        "the {s}",
    ),
    "safe distance": Wording(
        "Stand {a} from the {s} while the machine runs.",
        (
            "What is the safe distance from the {s}?",
            "How far must I stand from the running {s}?",
            "Which distance do I keep from the {s} of the Tidewren 7?",
        ),
        ("At least how much clearance does the moving {s} demand?", "How near may people come to a {s} in motion?"),
    ),
    "first serial": Wording(
        "The {s} fits machines from {a} onward.",
        (
            "From which serial number does the {s} fit?",
            "Which machines of the Tidewren 7 accept the {s}?",
            "What is the earliest machine that takes the {s}?",
        ),
        (
            "Can every owner add a {s}? Starting with what plate number?",
            "State the oldest production unit compatible with a {s}.",
        ),
        "Which attachment fits from {a} onward?",
        "What accessory became possible with {a}?",
    ),
    "mount": Wording(
        "The {s} is mounted {a}.",
        (
            "Where is the {s} mounted?",
            "On which mount of the Tidewren 7 does the {s} go?",
            "What is the mounting place of the {s}?",
        ),
        ("Show me the fixing point for a {s}.", "We bought a {s}; at what position is it attached?"),
        "Which attachment is mounted {a}?",
        "What accessory gets attached {a}?",
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
