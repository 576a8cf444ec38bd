"""The facts of the Tidewren 7, a machine that does not exist.

Knows: the invented seaweed press, its maker, parts, faults, supplies, settings, lamps, jobs, rules and attachments.
Does not know: how a fact is asked or printed; that is `phrasings.py` and `build.py`.

Everything here was written for this project (Apache-2.0). Values are arbitrary on purpose: no wording gives one away,
so a model that has not been taught the manual can only guess. Every row is one entity; each value is one fact.
As in real manuals there is some system to learn: the parts of one station share a material, a supplier and so on, and the
letter of a fault code says its cause.
"""

MACHINE = "Tidewren 7"
MAKER = "Pellowmarsh Works"

# station: (place, material, service interval, supplier code, bolt torque, safe distance); its parts share them
STATIONS = {
    "washing": (
        "along the washing bay", "enamelled iron", "every 130 running hours", "Petrel 31", "58 newton metres", "85 centimetres",
    ),
    "laying": (
        "above the laying table", "turned boxwood", "every nine weeks", "Whimbrel 3", "19 newton metres", "140 centimetres",
    ),
    "pressing": (
        "around the main spindle", "phosphor bronze", "every 410 running hours", "Gannet 18", "96 newton metres",
        "215 centimetres",
    ),
    "drying": (
        "under the drying shelves", "glazed ceramic", "every fourteen months", "Curlew 8", "34 newton metres", "60 centimetres",
    ),
    "delivery": (
        "beside the delivery tray", "vulcanised cork", "every 18 days", "Eider 50", "7 newton metres", "175 centimetres",
    ),
}  # fmt: skip

# name: (station, part number, what it does). The number is the part's own; what a part does is taught, not tested: a name
# that suits a part hints at its work.
PARTS = {
    "brine comb": ("washing", "3-418", "straightens fronds before washing"),
    "tide drum": ("washing", "3-052", "tumbles out sand and shell"),
    "kelp rake": ("washing", "3-967", "lifts long stems clear of the pump"),
    "heron arm": ("laying", "5-834", "spreads wet pulp across the table"),
    "sieve saddle": ("laying", "5-176", "holds the mesh level while it shakes"),
    "bell hopper": ("laying", "5-742", "weighs each charge of seaweed"),
    "spindle cradle": ("pressing", "8-650", "keeps the main shaft true when cold"),
    "cuttle blade": ("pressing", "8-873", "cuts the sheet to length"),
    "lantern valve": ("drying", "2-205", "meters steam into the drying loft"),
    "moss filter": ("drying", "2-309", "catches green dust from the loft air"),
    "ember plate": ("drying", "2-928", "warms the shelves without a flame"),
    "feather gate": ("delivery", "7-590", "holds back sheets that are still damp"),
    "ladder belt": ("delivery", "7-261", "climbs with the drained fronds"),
    "stair roller": ("delivery", "7-207", "stacks sheets in steps of ten"),
}

# letter of a fault code: (usual cause, remedy, alarm grade)
FAULT_LETTERS = {
    "K": ("salt creep in a ribbon plug", "rinse the plug with spirit", "tempest"),
    "R": ("a blocked roof vent", "sweep the vent from outside", "ripple"),
    "B": ("limescale on a heating coil", "soak the coil in vinegar overnight", "squall"),
    "M": ("dried pulp in a pivot", "steam the pivot for two minutes", "swell"),
    "S": ("a slack tension weight", "add one lead disc", "ripple"),
}

# code: meaning
FAULTS = {
    "K14": "sheet torn at the fence",
    "R62": "loft air too moist",
    "B09": "drum turning backwards",
    "M37": "hopper weight not settling",
    "S81": "steam column too cold",
    "K25": "first tank overfilled",
    "R40": "press closing off centre",
    "B93": "lectern panel not answering",
    "M56": "belt climbing too slowly",
    "S18": "mist uneven over the fronds",
    "K72": "shelf temperature drifting",
    "R03": "release lever stuck down",
    "B67": "sump running dry",
    "M29": "sheet count lost",
    "S84": "guard rail open in motion",
}

# name: (how many make a crate, keeping time, where it is stored)
SUPPLIES = {
    "spindle oil": ("crates of 36", "four years", "in the red tea tin"),
    "carrageen size": ("crates of 14", "nineteen months", "in the rope locker"),
    "lamp-black grease": ("crates of 55", "seven years", "in the lectern drawer"),
    "rinse alum": ("crates of 8", "five months", "above the office stove"),
    "tarred tape": ("crates of 21", "eighteen months", "in the ice well"),
    "cork wax": ("crates of 47", "ten years", "beside the ash pail"),
}

# name: (factory value, where it is changed). Every setting is counted in notches, from 1 to 99.
SETTINGS = {
    "drum speed": ("notch 23", "on dial C"),
    "loft heat": ("notch 58", "on page 4 of the blue menu"),
    "press hold": ("notch 47", "on the lower brass slider"),
    "shaker rate": ("notch 34", "on dial C"),
    "tank level": ("notch 71", "on the knotted cord"),
    "steam pressure": ("notch 16", "on page 4 of the blue menu"),
    "belt tension": ("notch 93", "on dial C"),
    "table angle": ("notch 5", "on the knotted cord"),
    "pulp thickness": ("notch 82", "on the lower brass slider"),
    "stack height": ("notch 77", "on the lower brass slider"),
}

# signal: (meaning, what the operator does)
LAMPS = {
    "steady amber lamp": ("the loft is warming up", "wait for the chime"),
    "double green flash": ("a charge has been weighed", "open the intake by hand"),
    "slow blue pulse": ("the tanks are swapping water", "keep the hopper shut"),
    "steady white lamp": ("the night flush is running", "leave the lectern unlocked"),
    "triple red flash": ("the guard circuit was bridged", "pull the yellow cord"),
    "amber and blue lamp": ("fresh water is low", "open the cistern tap one turn"),
    "flickering green lamp": ("the sheet counter is full", "carry the stack to the cellar"),
    "steady red lamp": ("the press is under load", "stand behind the painted line"),
}

# name: (first step, steps between, last step, tool, time allowed). Steps between are printed, never asked.
JOBS = {
    "morning start": (
        "ring the deck bell once",
        ("fill both tanks", "raise steam"),
        "hang the key on hook nine",
        "crescent spanner",
        "25 minutes",
    ),
    "night flush": (
        "remove the recipe card",
        ("open both drains", "rinse the tanks"),
        "chalk a cross on the door",
        "forked hazel stick",
        "50 minutes",
    ),
    "blade change": (
        "lower the oak bar",
        ("free both clamps", "slide the blade out", "seat the new one"),
        "initial a sheet of newsprint",
        "canvas hose",
        "12 minutes",
    ),
    "drum descaling": (
        "plug the chute with rag",
        ("fill the drum with weak acid", "turn it by hand", "rinse twice"),
        "read the tide gauge",
        "sailmaker's palm",
        "110 minutes",
    ),
    "press alignment": (
        "lay four coins on the bed",
        ("close the press gently", "compare the marks"),
        "lock the blue cupboard",
        "long brass key",
        "40 minutes",
    ),
    "filter wash": (
        "close the weather shutters",
        ("beat the filter", "soak it in cold water", "squeeze it flat"),
        "tie a knot in the log cord",
        "pine wedge",
        "18 minutes",
    ),
}

# attachment: (first serial number it fits, where it mounts)
ATTACHMENTS = {
    "cockle hood": ("serial 2260", "in the fourth shelf slot"),
    "ribbon cutter": ("serial 1745", "against the west wall bracket"),
    "smoke drawer": ("serial 3108", "on the upper dovetail"),
    "nori stamp": ("serial 2931", "over the drum outlet"),
    "rain cistern": ("serial 0872", "on the mezzanine plate"),
    "twin lectern": ("serial 4015", "in the corner deck socket"),
}

# Taught, not tested: each is alone of its kind, so there is nothing to choose from. what: value
GENERAL = {
    "maker": "Pellowmarsh Works",
    "home town": "Skerrow Haven",
    "main purpose": "pressing seaweed into paper-thin sheets",
    "designer": "Ottoline Varr",
    "frame colour": "heather grey",
    "empty weight": "1,870 kilograms",
    "daily output": "2,400 sheets",
    "minimum operator age": "nineteen years",
    "required glove type": "chain-mail cuff gloves",
    "cooling time before entry": "33 minutes",
}
