"""Writes the probe's questions: ``python -m selectune.evaluation.probe.build`` (``--check`` compares only).

Knows: facts, passages and sentence patterns, all written for this project. Does not know: how questions are scored.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

Question = tuple[str, list[str]]  # context, choices with the right one first

CAPITALS = "France Paris|Italy Rome|Spain Madrid|Germany Berlin|Japan Tokyo|China Beijing|Russia Moscow|Egypt Cairo|Greece Athens|" \
    "Portugal Lisbon|Austria Vienna|Poland Warsaw|Norway Oslo|Sweden Stockholm|Ireland Dublin|Cuba Havana"  # fmt: skip
OPPOSITES = "hot cold|big small|fast slow|light dark|young old|rich poor|early late|full empty|hard soft|wet dry|high low|" \
    "strong weak|near far|happy sad|open closed|loud quiet"  # fmt: skip
YOUNG = "cat kitten|dog puppy|cow calf|sheep lamb|horse foal|hen chick|duck duckling|lion cub|goat kid|frog tadpole"
PLACES = "A doctor works in a hospital|A teacher works in a school|A chef works in a kitchen|A farmer works in a field|" \
    "A judge works in a court|A pilot works in a plane|A sailor works on a ship|A librarian works in a library|" \
    "A miner works in a mine|A gardener works in a garden"  # fmt: skip
COLOURS = "Grass is green|Snow is white|Blood is red|Coal is black|A ripe banana is yellow|The clear sky is blue"
KNOWLEDGE: list[tuple[str, str]] = [
    ("Water freezes when it gets very", "cold.|hot.|loud.|tall."),
    ("The Earth goes around the", "Sun.|Moon.|North Star.|planet Mars."),
    ("Plants make their food with the help of", "sunlight.|moonlight.|thunder.|stones."),
    ("Bees make", "honey.|milk.|wool.|cheese."),
    ("We hear with our", "ears.|knees.|elbows.|teeth."),
    ("A week has seven", "days.|months.|years.|hours."),
    ("There are twelve months in a", "year.|week.|day.|minute."),
    ("The season after winter is", "spring.|autumn.|summer.|monsoon."),
    ("A triangle has three", "sides.|wheels.|circles.|colours."),
    ("The heart pumps", "blood.|air.|food.|water."),
    ("Fish breathe under water with their", "gills.|feathers.|paws.|leaves."),
    ("Birds are covered with", "feathers.|scales.|bark.|wool."),
    ("Ice is frozen", "water.|milk.|sand.|oil."),
    ("The largest ocean on Earth is the", "Pacific.|Atlantic.|Arctic.|Baltic."),
    ("A compass needle points to the", "north.|ceiling.|river.|market."),
    ("To see very small things, scientists use a", "microscope.|telescope.|thermometer.|compass."),
    ("To look at distant stars, people use a", "telescope.|microscope.|stethoscope.|hammer."),
    ("Temperature is measured with a", "thermometer.|ruler.|clock.|scale."),
    ("Romeo and Juliet was written by William", "Shakespeare.|Newton.|Mozart.|Columbus."),
    ("The theory of relativity is due to Albert", "Einstein.|Darwin.|Picasso.|Beethoven."),
    ("The chemical symbol for water is", "H2O.|CO2.|NaCl.|Fe."),
    ("Humans breathe in the gas called", "oxygen.|helium.|neon.|methane."),
    ("The Great Wall is in", "China.|Brazil.|Kenya.|Norway."),
    ("The pyramids of Giza stand in", "Egypt.|Canada.|Finland.|Peru."),
    ("The Eiffel Tower stands in", "Paris.|London.|Rome.|Vienna."),
    ("Kangaroos live in", "Australia.|Germany.|Iceland.|Canada."),
    ("Penguins live where it is", "cold.|dusty.|green.|volcanic."),
    ("A spider has eight", "legs.|wings.|tails.|ears."),
    ("Bread is baked in an", "oven.|attic.|envelope.|umbrella."),
    ("When it rains, people open an", "umbrella.|oven.|orange.|album."),
    ("A violin is a musical", "instrument.|vehicle.|vegetable.|building."),
    ("Soccer is played with a", "ball.|net of fish.|candle.|spoon."),
    ("Books are borrowed from a", "library.|bakery.|pharmacy.|stable."),
    ("Medicine is sold in a", "pharmacy.|stable.|garage.|bakery."),
    ("The opposite of day is", "night.|noon.|week.|lamp."),
    ("Lemons taste", "sour.|salty.|silent.|square."),
    ("Sugar tastes", "sweet.|bitter.|loud.|round."),
    ("Diamonds are very", "hard.|soft.|noisy.|sleepy."),
    ("Iron is a kind of", "metal.|fruit.|fabric.|animal."),
    ("Cotton is used to make", "clothes.|bricks.|glass.|engines."),
    ("Wine is made from", "grapes.|potatoes.|rice straw.|pine cones."),
    ("Paper is made from", "wood.|iron.|wool.|sand."),
]
PASSAGES: list[tuple[str, list[tuple[str, str]]]] = [
    (
        "Mira left the harbour at dawn in a small red boat. By noon the wind had dropped, so she rowed to the island, where her "
        "brother was waiting with fresh bread.",
        [
            ("What colour was the boat?", "Red|Green|White|Blue"),
            ("Who was waiting on the island?", "Her brother|Her teacher|A sailor|Her mother"),
            ("When did Mira leave?", "At dawn|At noon|At midnight|In the evening"),
        ],
    ),
    (
        "The old clock in the village hall stopped on a Tuesday. Mr. Okoro, the baker, repaired it with a spring from a broken "
        "toaster, and it has been five minutes fast ever since.",
        [
            ("What is Mr. Okoro's trade?", "He is a baker|He is a farmer|He is a pilot|He is a tailor"),
            ("On what day did the clock stop?", "Tuesday|Sunday|Friday|Monday"),
            ("Where did the spring come from?", "A toaster|A car|A bed|A piano"),
        ],
    ),
    (
        "Lena wanted to grow tomatoes, but her balcony faces north and gets little sun. Her neighbour suggested lettuce instead, "
        "and in June she picked the first leaves.",
        [
            ("What did Lena want to grow?", "Tomatoes|Roses|Beans|Melons"),
            ("What did the neighbour suggest?", "Lettuce|Carrots|Onions|Apples"),
            ("In which month did she pick the first leaves?", "June|March|October|January"),
        ],
    ),
    (
        "The museum is closed on Mondays. On other days it opens at ten and closes at six, except on Thursdays, when it stays open "
        "until nine. Children enter free.",
        [
            ("On which day is the museum closed?", "Monday|Thursday|Sunday|Friday"),
            ("When does it open?", "At ten|At six|At nine|At noon"),
            ("Who enters free?", "Children|Teachers|Soldiers|Nobody"),
        ],
    ),
    (
        "Two brothers bought a donkey. The elder fed it in the morning and the younger in the evening. When the elder travelled to "
        "the city for a month, the donkey grew thin.",
        [
            ("What did the brothers buy?", "A donkey|A house|A cart|A goat"),
            ("Who fed it in the evening?", "The younger|The elder|A servant|Nobody"),
            ("Where did the elder travel?", "To the city|To the sea|To a farm|To a mountain"),
        ],
    ),
    (
        "Storms had blocked the mountain road for three days. The doctor came by helicopter, set the shepherd's broken leg, and stayed "
        "for soup before flying back.",
        [
            ("How did the doctor come?", "By helicopter|By train|On foot|By boat"),
            ("What was broken?", "A leg|An arm|A window|A bridge"),
            ("For how long was the road blocked?", "Three days|Two weeks|One hour|A year"),
        ],
    ),
    (
        "Aunt Rosa keeps her recipes in a blue tin. The oldest, for plum cake, was written by her grandmother in pencil, and half "
        "the words have faded.",
        [
            ("What colour is the tin?", "Blue|Red|Silver|Green"),
            ("Which cake is the oldest recipe for?", "Plum cake|Lemon cake|Carrot cake|Honey cake"),
            ("With what was it written?", "A pencil|Ink|A typewriter|Chalk"),
        ],
    ),
    (
        "Jon plays the trumpet, and his sister Eva plays the drums. They practise in the garage because their father works at night "
        "and sleeps until two.",
        [
            ("What does Eva play?", "The drums|The trumpet|The piano|The flute"),
            ("Where do they practise?", "In the garage|In the kitchen|At school|In the attic"),
            ("When does their father work?", "At night|In the morning|At noon|On Sundays"),
        ],
    ),
]
STORIES = [("apples", "Tom"), ("coins", "Ana"), ("stamps", "Ben"), ("books", "Sara"), ("pencils", "Leo"), ("shells", "Nina"),
           ("marbles", "Omar"), ("cards", "Ida"), ("eggs", "Paul"), ("tickets", "Maya")]  # fmt: skip
SENTENCES = [
    "The children are playing in the garden with their dog", "She has never been to the sea before this summer",
    "He put the letters on the table and left the room", "My grandfather tells the same story every winter",
    "They will visit the museum as soon as it opens", "The train to the city leaves at seven in the morning",
    "We could not hear the music because of the storm", "An old bridge crosses the river near our house",
    "The teacher asked the students to close their books", "I would rather stay at home than go out tonight",
    "Most of the houses in the village are made of stone", "The baker sells fresh bread from Monday to Saturday",
    "If it rains tomorrow we will stay in the library", "Her brother works as a nurse in a small hospital",
    "The cat slept on the warm stones beside the door", "Nobody knew where the key to the cellar had gone",
    "The two friends walked slowly along the empty beach", "After dinner he washed the plates and dried the glasses",
    "There is enough soup in the pot for all of us", "The manager thanked everyone for their hard work",
    "Please turn off the lights before you leave the office", "A loud noise woke the baby in the middle of the night",
    "The farmer drove his tractor across the muddy field", "Some people like tea while others prefer strong coffee",
]  # fmt: skip
AGREEMENT = [
    ("The dogs in the yard", "are barking.|is barking."), ("The girl with the red shoes", "was late.|were late."),
    ("Yesterday my parents", "went to the market.|go to the market."), ("Tomorrow we", "will see the doctor.|saw the doctor."),
    ("She is taller", "than her sister.|then her sister."), ("There were", "many cars on the road.|much cars on the road."),
    ("He does not", "like spinach.|likes spinach."), ("Each of the boys", "has a bicycle.|have a bicycle."),
    ("I have lived here", "for ten years.|since ten years."), ("This is the", "best film of the year.|most good film of the year."),
    ("The book that I bought", "is very long.|are very long."), ("They enjoy", "swimming in the lake.|to swimming in the lake."),
    ("If I were you, I", "would wait.|will waited."), ("Neither answer", "is right.|am right."),
    ("She asked me", "where I lived.|where did I lived."), ("An hour", "has passed.|have passed."),
    ("He gave the book", "to me.|at I."), ("We arrived", "at the station.|on the station at."),
    ("Children must not", "play with matches.|plays with matches."), ("The milk", "has gone sour.|have went sour."),
    ("How much", "does it cost?|do it costs?"), ("My brother and I", "are twins.|am twins."),
    ("The news", "is good today.|are good today."), ("Birds", "fly south in autumn.|flies south in autumn."),
]  # fmt: skip


def questions() -> list[dict[str, object]]:
    """Return every question, with the choices in their final order."""
    generator = random.Random(20)
    areas = {
        "common_knowledge": _knowledge(generator),
        "arithmetic": _arithmetic(generator),
        "reading": _reading(),
        "word_order": _word_order(generator),
    }
    rows = []
    for area, items in areas.items():
        for number, (context, choices) in enumerate(items, 1):
            order = list(range(len(choices)))
            generator.shuffle(order)
            rows.append({
                "id": f"{area}-{number:03d}", "area": area, "context": context,
                "choices": [choices[i] for i in order], "answer": order.index(0),
            })  # fmt: skip
    return rows


def _knowledge(generator: random.Random) -> list[Question]:
    found: list[Question] = [(context, choices.split("|")) for context, choices in KNOWLEDGE]
    for table, pattern in (
        (CAPITALS, "The capital of {} is"),
        (OPPOSITES, "The opposite of {} is"),
        (YOUNG, "A young {} is called a"),
    ):
        pairs = [entry.rsplit(" ", 1) for entry in table.split("|")]
        for left, right in pairs:
            others = generator.sample([other for _, other in pairs if other != right], 3)
            found.append((pattern.format(left), [f"{word}." for word in (right, *others)]))
    for table in (PLACES, COLOURS):
        pairs = [entry.rsplit(" ", 1) for entry in table.split("|")]
        for left, right in pairs:
            others = generator.sample([other for _, other in pairs if other != right], 3)
            found.append((left, [f"{word}." for word in (right, *others)]))
    return found


def _arithmetic(generator: random.Random) -> list[Question]:
    found: list[Question] = []
    for index in range(110):
        left, right = generator.randint(2, 9), generator.randint(1, 9)
        thing, name = STORIES[index % len(STORIES)]
        kind = index // len(STORIES) % 6
        if kind == 0:
            context, answer = f"{left} + {right} =", left + right
        elif kind == 1:
            context, answer = f"{name} has {left} {thing} and gets {right} more. Now {name} has", left + right
        elif kind == 2:
            context, answer = f"{left + right} - {left} =", right
        elif kind == 3:
            context, answer = f"{name} has {left + right} {thing} and gives away {left}. Now {name} has", right
        elif kind == 4:
            step, start = generator.randint(1, 5), generator.randint(1, 9)
            context, answer = f"{start}, {start + step}, {start + 2 * step}, {start + 3 * step},", start + 4 * step
        else:
            context, answer = f"{left} times {right} is", left * right
        wrong = [value for value in range(max(0, answer - 4), answer + 5) if value != answer]
        ending = f" {thing}." if kind in (1, 3) else ""
        found.append((context, [f"{value}{ending}" for value in (answer, *generator.sample(wrong, 3))]))
    return list({context: (context, choices) for context, choices in found}.values())


def _reading() -> list[Question]:
    found: list[Question] = []
    for passage, asked in PASSAGES:
        for question, choices in asked:
            for lead in ("Question: {}\nAnswer:", "Read the text again. {}\nThe answer is:", "Q: {}\nA:"):
                found.append((f"{passage}\n\n{lead.format(question)}", choices.split("|")))
    return found


def _word_order(generator: random.Random) -> list[Question]:
    found: list[Question] = [(context, choices.split("|")) for context, choices in AGREEMENT]
    for sentence in SENTENCES:
        words = sentence.split()
        for start in (3, 4, 5):
            rest = words[start:]
            wrong: list[str] = []
            while len(wrong) < 2:
                mixed = generator.sample(rest, len(rest))
                if mixed != rest and " ".join(mixed) not in wrong:
                    wrong.append(" ".join(mixed))
            found.append((" ".join(words[:start]), [f"{' '.join(rest)}.", *(f"{text}." for text in wrong)]))
    return found


def main() -> int:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions())
    file = Path(__file__).with_name("questions.jsonl")
    if "--check" in sys.argv:
        return int(file.read_text(encoding="utf-8") != text)
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
