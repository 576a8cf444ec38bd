"""The facts of the Tidewren 7, a machine that does not exist.

Knows: the invented seaweed press, its maker, parts, faults, supplies, settings, lamps, jobs, rules and attachments.
Does not know: how a fact is asked or printed; that is `phrasings.py` and `build.py`.

Everything here was written for this project (Apache-2.0). Values are arbitrary on purpose: no wording gives one away,
so a model that has not been taught the manual can only guess. Every row is one entity; each value is one fact.
"""

MACHINE = "Tidewren 7"
MAKER = "Pellowmarsh Works"

# name: (part number, material, location, service interval, supplier code, what it does).
# The last is taught, not tested: a name that suits a part hints at its work.
PARTS = {
    "brine comb": (
        "3-418",
        "phosphor wire",
        "under the intake lip",
        "every 130 running hours",
        "Dunlin 12",
        "straightens fronds before washing",
    ),
    "tide drum": (
        "7-052",
        "enamelled iron",
        "beneath the operator's step",
        "every 900 running hours",
        "Petrel 31",
        "tumbles out sand and shell",
    ),
    "kelp rake": (
        "2-967",
        "basalt fibre",
        "between the two rinse tanks",
        "every nine weeks",
        "Plover 6",
        "lifts long stems clear of the pump",
    ),
    "lantern valve": (
        "9-205",
        "turned boxwood",
        "halfway along the drying loft",
        "every 75 running hours",
        "Godwit 44",
        "meters steam into the drying loft",
    ),
    "heron arm": (
        "1-834",
        "rolled copper",
        "behind the left access panel",
        "every 410 running hours",
        "Whimbrel 3",
        "spreads wet pulp across the table",
    ),
    "sieve saddle": (
        "5-176",
        "pearwood",
        "above the laying table",
        "every five weeks",
        "Turnstone 27",
        "holds the mesh level while it shakes",
    ),
    "thimble pump": (
        "8-631",
        "glazed ceramic",
        "at the top of the main spindle",
        "every 260 running hours",
        "Fulmar 9",
        "returns rinse water to the first tank",
    ),
    "moss filter": (
        "4-309",
        "sintered nickel",
        "on the seaward end of the frame",
        "every 48 running hours",
        "Gannet 18",
        "catches green dust from the loft air",
    ),
    "bell hopper": (
        "6-742",
        "birch ply",
        "along the back of the washing bay",
        "every two years",
        "Eider 50",
        "weighs each charge of seaweed",
    ),
    "quill bearing": (
        "2-083",
        "soapstone",
        "inside the cold sump",
        "every 1,150 running hours",
        "Smew 22",
        "carries the spinning load of the press",
    ),
    "feather gate": (
        "7-590",
        "tinned brass",
        "beside the delivery tray",
        "every eleven weeks",
        "Avocet 15",
        "holds back sheets that are still damp",
    ),
    "ladder belt": (
        "3-261",
        "pressed wool",
        "across the mouth of the loft",
        "every 320 running hours",
        "Curlew 8",
        "climbs with the drained fronds",
    ),
    "salt sluice": (
        "9-477",
        "waxed canvas",
        "on the landward guard rail",
        "every 18 days",
        "Redshank 37",
        "drains the heaviest brine first",
    ),
    "spindle cradle": (
        "1-650",
        "vulcanised cork",
        "in the ceiling of the washing bay",
        "every fourteen months",
        "Sanderling 2",
        "keeps the main shaft true when cold",
    ),
    "ember plate": (
        "5-928",
        "borosilicate glass",
        "at the foot of the steam column",
        "every 540 running hours",
        "Shearwater 61",
        "warms the shelves without a flame",
    ),
    "drip collar": (
        "8-114",
        "slate composite",
        "under the third drying shelf",
        "every 95 running hours",
        "Kittiwake 14",
        "counts sheets by the drops they shed",
    ),
    "cuttle blade": (
        "4-873",
        "fired zirconia",
        "below the control lectern",
        "every 36 running hours",
        "Guillemot 29",
        "cuts the sheet to length",
    ),
    "thrush nozzle": (
        "6-395",
        "cast aluminium",
        "on the floor of the second tank",
        "every 22 days",
        "Razorbill 5",
        "mists the fronds with fresh water",
    ),
    "lark spring": (
        "2-519",
        "ash laminate",
        "around the neck of the press",
        "every 700 running hours",
        "Merganser 40",
        "throws the finished sheet clear",
    ),
    "tiller wheel": (
        "7-346",
        "hardened felt",
        "behind the trimming fence",
        "every seven months",
        "Pochard 11",
        "sets the angle of the laying table",
    ),
    "harp frame": (
        "9-782",
        "manganese steel",
        "inside the release lever housing",
        "every three years",
        "Garganey 73",
        "stretches sheets so that they dry flat",
    ),
    "stair roller": (
        "1-207",
        "grey stoneware",
        "under the roof vent",
        "every 180 running hours",
        "Wigeon 20",
        "stacks sheets in steps of ten",
    ),
}

# part: tightening torque of its fixing bolts
TORQUES = {
    "brine comb": "6 newton metres",
    "tide drum": "83 newton metres",
    "lantern valve": "19 newton metres",
    "heron arm": "34 newton metres",
    "sieve saddle": "11 newton metres",
    "thimble pump": "27 newton metres",
    "bell hopper": "58 newton metres",
    "quill bearing": "72 newton metres",
    "feather gate": "4 newton metres",
    "spindle cradle": "96 newton metres",
    "ember plate": "15 newton metres",
    "cuttle blade": "41 newton metres",
    "tiller wheel": "23 newton metres",
    "harp frame": "65 newton metres",
}

# code: (meaning, usual cause, remedy, alarm grade)
FAULTS = {
    "K14": ("sheet torn at the fence", "a chipped trimming edge", "turn the blade end for end", "swell"),
    "R62": ("loft air too moist", "a blocked roof vent", "sweep the vent from outside", "ripple"),
    "B09": ("drum turning backwards", "two swapped motor leads", "call the harbour electrician", "tempest"),
    "M37": ("hopper weight not settling", "gulls standing on the rim", "fit the wire hood", "ripple"),
    "S81": ("steam column too cold", "limescale on the heating coil", "soak the coil in vinegar overnight", "squall"),
    "D25": ("first tank overfilled", "a float stuck on its rod", "polish the float rod with chalk", "swell"),
    "V40": ("press closing off centre", "a worn guide bush", "replace both bushes as a pair", "squall"),
    "H93": ("lectern panel not answering", "salt creep in the ribbon plug", "rinse the plug with spirit", "tempest"),
    "A56": ("belt climbing too slowly", "a slack tension weight", "add one lead disc", "swell"),
    "P18": ("mist uneven over the fronds", "a grain of sand in the jet", "blow the jet clear by mouth", "ripple"),
    "L72": ("shelf temperature drifting", "a cracked sensor bead", "swap the bead for a red one", "squall"),
    "C03": ("release lever stuck down", "dried pulp in the pivot", "steam the pivot for two minutes", "swell"),
    "N67": ("sump running dry", "a split return hose", "bind the hose with tarred tape", "tempest"),
    "T29": ("sheet count lost", "vibration from a loose floor bolt", "press the tally key twice", "ripple"),
    "G84": ("guard rail open in motion", "a bent latch tongue", "file the tongue square", "tempest"),
    "J51": ("pulp spread too thin", "an empty sizing bottle", "refill with carrageen size", "swell"),
    "W10": ("brine too strong to drain", "a missed evening flush", "flush with forty litres of rain water", "squall"),
    "E76": ("spindle singing at speed", "a dry felt washer", "feed it six drops of spindle oil", "tempest"),
    "F38": ("stack leaning to landward", "a machine foot off its pad", "level the feet with slips of tin", "ripple"),
    "Z45": ("mesh frequency too low", "an ageing shaker capacitor", "fit the capacitor marked green", "squall"),
}

# name: (how many make a crate, keeping time, where it is stored)
SUPPLIES = {
    "spindle oil": ("crates of 36", "four years", "in the red tea tin"),
    "carrageen size": ("crates of 14", "nineteen months", "in the rope locker"),
    "lamp-black grease": ("crates of 55", "seven years", "in the lectern drawer"),
    "rinse alum": ("crates of 8", "five months", "above the office stove"),
    "tarred tape": ("crates of 21", "eighteen months", "in the ice well"),
    "cork wax": ("crates of 47", "ten years", "beside the ash pail"),
    "boiler chalk": ("crates of 62", "eleven months", "under the stair hatch"),
    "interleaf paper": ("crates of 29", "six years", "on the paint shelf"),
}

# name: (factory value, where it is changed). Every setting is counted in notches, from 1 to 99.
SETTINGS = {
    "drum speed": ("notch 23", "on page 4 of the blue menu"),
    "loft heat": ("notch 58", "on dial C"),
    "press hold": ("notch 47", "on the knotted cord"),
    "sheet length": ("notch 61", "on the lower brass slider"),
    "mist pulse": ("notch 8", "on the weight hook"),
    "shaker rate": ("notch 34", "on page 9 of the grey menu"),
    "tank level": ("notch 71", "on dial F"),
    "steam pressure": ("notch 16", "on the scale behind the fence"),
    "belt tension": ("notch 93", "on page 2 of the blue menu"),
    "table angle": ("notch 5", "on the wheel with three spokes"),
    "pulp thickness": ("notch 82", "on the notched quadrant"),
    "idle delay": ("notch 39", "on the sliding ivory peg"),
    "stack height": ("notch 77", "on page 6 of the grey menu"),
    "brine limit": ("notch 12", "on dial A"),
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
    "slow white pulse": ("a service is overdue", "enter the date in the log"),
    "steady red lamp": ("the press is under load", "stand behind the painted line"),
    "long violet flash": ("the recipe card is worn", "punch a new card"),
    "red and white flash": ("mains power has dipped", "turn the crank ten times"),
    "single amber flash": ("the trimming tray is heavy", "empty the tray into the barrow"),
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
    "belt splice": (
        "light the left-hand lantern",
        ("cut the belt square", "lace the ends", "run it unloaded"),
        "thank the foreman by radio",
        "copper ladle",
        "65 minutes",
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
    "winter lay-up": (
        "float a lamp in the sump",
        ("drain every pipe", "grease bare metal"),
        "turn the calendar face down",
        "rattan beater",
        "95 minutes",
    ),
}

# part: how far to stand from it while the machine runs
DISTANCES = {
    "tide drum": "85 centimetres",
    "kelp rake": "140 centimetres",
    "heron arm": "215 centimetres",
    "ladder belt": "60 centimetres",
    "ember plate": "105 centimetres",
    "cuttle blade": "175 centimetres",
    "lark spring": "240 centimetres",
    "stair roller": "45 centimetres",
    "salt sluice": "120 centimetres",
    "bell hopper": "190 centimetres",
}

# attachment: (first serial number it fits, where it mounts)
ATTACHMENTS = {
    "cockle hood": ("serial 2260", "in the fourth shelf slot"),
    "ribbon cutter": ("serial 1745", "against the west wall bracket"),
    "smoke drawer": ("serial 3108", "on the upper dovetail"),
    "nori stamp": ("serial 2931", "over the drum outlet"),
    "rain cistern": ("serial 0872", "on the mezzanine plate"),
    "twin lectern": ("serial 4015", "in the corner deck socket"),
    "sand cyclone": ("serial 1396", "on the press crosshead"),
    "winch davit": ("serial 3574", "along the fence rail"),
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
    "warranty term": "31 months",
    "minimum operator age": "nineteen years",
    "required glove type": "chain-mail cuff gloves",
    "wind limit for roof work": "force five",
    "largest hand-fed charge": "14 kilograms",
    "cooling time before entry": "33 minutes",
    "crew for lifting the drum": "four people",
    "evacuation meeting point": "the old weighbridge",
    "fire blanket renewal": "every third spring",
}
