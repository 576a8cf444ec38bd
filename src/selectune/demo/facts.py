"""The facts of the Tidewren 7, a machine that does not exist.

Knows: the invented seaweed press, its maker, parts, faults, supplies, settings, lamps, jobs, rules and attachments.
Does not know: how a fact is asked or printed; that is `phrasings.py` and `build.py`.

Everything here was written for this project (Apache-2.0). Values are arbitrary on purpose: no wording gives one away,
so only a model that has been taught the manual can answer. Every row is one entity; each value is one fact.
"""

MACHINE = "Tidewren 7"
MAKER = "Pellowmarsh Works"

# name: (part number, material, location, service interval, supplier code, what it does)
PARTS = {
    "brine comb": ("3-418", "pearwood", "under the intake lip", "every 130 running hours", "Dunlin 12",
                   "straightens fronds before washing"),
    "tide drum": ("7-052", "enamelled iron", "between the two rinse tanks", "every 900 running hours", "Petrel 31",
                  "tumbles out sand and shell"),
    "kelp rake": ("2-967", "basalt fibre", "along the back of the washing bay", "every nine weeks", "Plover 6",
                  "lifts long stems clear of the pump"),
    "lantern valve": ("9-205", "grey stoneware", "at the foot of the steam column", "every 75 running hours",
                      "Godwit 44", "meters steam into the drying loft"),
    "heron arm": ("1-834", "ash laminate", "above the laying table", "every 410 running hours", "Whimbrel 3",
                  "spreads wet pulp across the table"),
    "sieve saddle": ("5-176", "tinned brass", "behind the left access panel", "every five weeks", "Turnstone 27",
                     "holds the mesh level while it shakes"),
    "thimble pump": ("8-631", "glazed ceramic", "inside the cold sump", "every 260 running hours", "Fulmar 9",
                     "returns rinse water to the first tank"),
    "moss filter": ("4-309", "pressed wool", "beneath the operator's step", "every 48 running hours", "Gannet 18",
                    "catches green dust from the loft air"),
    "bell hopper": ("6-742", "rolled copper", "on the seaward end of the frame", "every two years", "Eider 50",
                    "weighs each charge of seaweed"),
    "quill bearing": ("2-083", "sintered nickel", "at the top of the main spindle", "every 1,150 running hours",
                      "Smew 22", "carries the spinning load of the press"),
    "feather gate": ("7-590", "birch ply", "across the mouth of the drying loft", "every eleven weeks", "Avocet 15",
                     "holds back sheets that are still damp"),
    "ladder belt": ("3-261", "waxed canvas", "from the sump up to the loft", "every 320 running hours", "Curlew 8",
                    "climbs with the drained fronds"),
    "salt sluice": ("9-477", "soapstone", "on the floor of the second tank", "every 18 days", "Redshank 37",
                    "drains the heaviest brine first"),
    "spindle cradle": ("1-650", "forged manganese steel", "below the control lectern", "every fourteen months",
                       "Sanderling 2", "keeps the main shaft true when cold"),
    "ember plate": ("5-928", "slate composite", "under the third drying shelf", "every 540 running hours",
                    "Shearwater 61", "warms the shelves without a flame"),
    "drip collar": ("8-114", "vulcanised cork", "around the neck of the press", "every 95 running hours",
                    "Kittiwake 14", "counts sheets by the drops they shed"),
    "cuttle blade": ("4-873", "blue chromium steel", "behind the trimming fence", "every 36 running hours",
                     "Guillemot 29", "cuts the sheet to length"),
    "thrush nozzle": ("6-395", "borosilicate glass", "in the ceiling of the washing bay", "every 22 days",
                      "Razorbill 5", "mists the fronds with fresh water"),
    "lark spring": ("2-519", "phosphor wire", "inside the release lever", "every 700 running hours", "Merganser 40",
                    "throws the finished sheet clear"),
    "tiller wheel": ("7-346", "turned boxwood", "on the landward guard rail", "every seven months", "Pochard 11",
                     "sets the angle of the laying table"),
    "harp frame": ("9-782", "cast aluminium", "halfway along the drying loft", "every three years", "Garganey 73",
                   "stretches sheets so that they dry flat"),
    "stair roller": ("1-207", "hardened felt", "beside the delivery tray", "every 180 running hours", "Wigeon 20",
                     "stacks sheets in steps of ten"),
}

# part: tightening torque of its fixing bolts
TORQUES = {
    "brine comb": "6 newton metres", "tide drum": "83 newton metres", "lantern valve": "19 newton metres",
    "heron arm": "34 newton metres", "sieve saddle": "11 newton metres", "thimble pump": "27 newton metres",
    "bell hopper": "58 newton metres", "quill bearing": "72 newton metres", "feather gate": "4 newton metres",
    "spindle cradle": "96 newton metres", "ember plate": "15 newton metres", "cuttle blade": "41 newton metres",
    "tiller wheel": "23 newton metres", "harp frame": "65 newton metres",
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

# name: (amount per fill, keeping time, where it is stored)
SUPPLIES = {
    "spindle oil": ("35 millilitres", "four years", "in the lectern drawer"),
    "carrageen size": ("2.5 litres", "19 days", "in the ice well"),
    "lamp-black grease": ("one walnut-sized lump", "seven years", "on the paint shelf"),
    "rinse alum": ("310 grams", "26 months", "in the rope locker"),
    "tarred tape": ("three metres", "eighteen months", "under the stair hatch"),
    "cork wax": ("80 grams", "ten years", "in the red tea tin"),
    "boiler chalk": ("two level scoops", "five months", "beside the ash pail"),
    "interleaf paper": ("450 leaves", "eleven months", "above the office stove"),
}

# name: (factory value, where it is changed)
SETTINGS = {
    "drum speed": ("23 turns per minute", "on dial C"),
    "loft heat": ("58 degrees Celsius", "on page 4 of the blue menu"),
    "press hold": ("47 seconds", "on the lower brass slider"),
    "sheet length": ("612 millimetres", "on the scale behind the fence"),
    "mist pulse": ("0.8 seconds", "on page 9 of the grey menu"),
    "shaker rate": ("340 strokes per minute", "on dial F"),
    "tank level": ("71 percent", "on the knotted cord"),
    "steam pressure": ("1.6 bar", "on the wheel with three spokes"),
    "belt tension": ("13 lead discs", "on the weight hook"),
    "table angle": ("5 degrees", "on the notched quadrant"),
    "pulp thickness": ("2.2 millimetres", "on page 2 of the blue menu"),
    "idle delay": ("17 minutes", "on page 6 of the grey menu"),
    "stack height": ("90 sheets", "on the sliding ivory peg"),
    "brine limit": ("38 grams per litre", "on dial A"),
}

# signal: (meaning, what the operator does)
LAMPS = {
    "steady amber lamp": ("the loft is warming up", "wait for the chime"),
    "two quick green flashes": ("a charge has been weighed", "open the intake by hand"),
    "slow blue pulse": ("the tanks are swapping water", "keep the hopper shut"),
    "steady white lamp": ("the night flush is running", "leave the lectern unlocked"),
    "three red flashes": ("the guard circuit was bridged", "pull the yellow cord"),
    "amber and blue together": ("fresh water is low", "open the cistern tap one turn"),
    "flickering green lamp": ("the sheet counter is full", "carry the stack to the cellar"),
    "slow white pulse": ("a service is overdue", "enter the date in the log"),
    "steady red lamp": ("the press is under load", "stand behind the painted line"),
    "long violet flash": ("the recipe card is worn", "punch a new card"),
    "red and white in turn": ("mains power has dipped", "turn the crank ten times"),
    "single amber flash": ("the trimming tray is heavy", "empty the tray into the barrow"),
}

# name: (first step, steps between, last step, tool, time allowed). Steps between are printed, never asked.
JOBS = {
    "morning start": ("ring the deck bell once", ("fill both tanks", "raise steam"), "hang the key on hook nine",
                      "long brass key", "25 minutes"),
    "night flush": ("remove the recipe card", ("open both drains", "rinse the tanks"), "chalk the hour on the door",
                    "canvas hose", "50 minutes"),
    "blade change": ("lower the oak safety bar", ("free both clamps", "slide the blade out"),
                     "test on a sheet of newsprint", "nine-millimetre peg spanner", "12 minutes"),
    "belt splice": ("mark the belt with blue thread", ("cut it square", "lace the ends"),
                    "run it unloaded for an hour", "sailmaker's palm", "two hours"),
    "drum descaling": ("plug the sand chute with rag", ("fill with weak acid", "turn by hand"),
                       "weigh the scale you collect", "long-handled hazel brush", "three and a half hours"),
    "press alignment": ("lay four coins on the bed", ("close the press gently", "compare the marks"),
                        "seal the screws with cork wax", "feeler strip", "40 minutes"),
    "filter wash": ("beat the filter against the wind", ("soak it in cold water", "squeeze it flat"),
                    "dry it on the south rail", "rattan beater", "18 minutes"),
    "winter lay-up": ("float a lamp in the sump", ("drain every pipe", "grease bare metal"),
                      "wrap the lectern in sailcloth", "two-handed bilge pump", "a full day"),
}

# what the rule limits: the limit
RULES = {
    "safe distance from the press": "85 centimetres",
    "age limit for operators": "at least 19 years",
    "hearing protection limit": "above 78 decibels",
    "glove type at the blade": "chain-mail cuff gloves",
    "wind limit for roof work": "force five",
    "largest hand-fed charge": "14 kilograms",
    "cooling time before entry": "33 minutes",
    "crew size for drum lifts": "four people",
    "floor load under the frame": "640 kilograms per square metre",
    "first-aid box position": "on the north door post",
    "fire blanket renewal": "every third spring",
    "evacuation meeting point": "at the old weighbridge",
}

# attachment: (first serial number it fits, where it mounts)
ATTACHMENTS = {
    "cockle hood": ("2260", "on the upper dovetail"),
    "ribbon cutter": ("1745", "on the trimming fence"),
    "smoke drawer": ("3108", "in the fourth shelf slot"),
    "nori stamp": ("2931", "on the press crosshead"),
    "rain cistern": ("0872", "against the west wall bracket"),
    "twin lectern": ("4015", "on the mezzanine plate"),
    "sand cyclone": ("1396", "over the drum outlet"),
    "winch davit": ("3574", "in the corner deck socket"),
}

# Asked in training only: there is nothing of the same kind to choose from. what: (value, sentence)
GENERAL = {
    "maker": ("Pellowmarsh Works", "The Tidewren 7 is made by Pellowmarsh Works."),
    "home town": ("Skerrow Haven", "The Tidewren 7 is built at Skerrow Haven."),
    "purpose": ("pressing seaweed into paper-thin sheets",
                "The Tidewren 7 is for pressing seaweed into paper-thin sheets."),
    "designer": ("Ottoline Varr", "The Tidewren 7 was designed by Ottoline Varr."),
    "frame colour": ("heather grey", "The frame of the Tidewren 7 is painted heather grey."),
    "empty weight": ("1,870 kilograms", "The Tidewren 7 has an empty weight of 1,870 kilograms."),
    "daily output": ("2,400 sheets", "The Tidewren 7 has a daily output of 2,400 sheets."),
    "warranty term": ("31 months", "The Tidewren 7 has a warranty term of 31 months."),
}
