"""The templates of the word problems: those of training, and others of evaluation, which share nothing with them.

A template is a text with holes, the numbers that may be drawn, the steps of the solution and words to choose from;
word_problems.py fills it. It knows nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A problem with holes: people, words that are chosen, and numbers that are drawn until every step comes out."""

    text: str
    """Holes in braces. {name}, {other}: two people; {he}, {his}: of the first, {He}, {His}: the same at a beginning."""
    numbers: dict[str, range]
    steps: tuple[str, ...]
    """Assignments, each to be a whole number above 0; the last is the answer."""
    words: dict[str, str]
    """Hole -> what may stand there, separated by commas."""


def template(text: str, numbers: dict[str, range], *steps: str, **words: str) -> Template:
    return Template(" ".join(text.split()), numbers, steps, words)


TRAINING = {
    "packs": template(
        """{name} buys {packs} packs of {thing}. Each pack has {each} {thing} in it. {He} gives {gone} of them to
        {his} cousin {other}. How many {thing} does {name} have left?""",
        {"packs": range(3, 12), "each": range(4, 25), "gone": range(5, 40)},
        "all = packs * each", "left = all - gone",
        thing="pencils, stickers, marbles, batteries, beads, trading cards, balloons",
    ),
    "change": template(
        """At the {shop}, {name} pays for {a} {first} at ${p} each and {b} {second} at ${q} each with a ${note} bill.
        How much change does {he} get?""",
        {"a": range(2, 7), "p": range(2, 9), "b": range(2, 6), "q": range(1, 6), "note": range(50, 101, 50)},
        "one = a * p", "two = b * q", "cost = one + two", "change = note - cost",
        shop="market, corner shop, bakery, school fair", first="loaves, jars, boxes, baskets",
        second="drinks, bags, cakes, bunches of flowers",
    ),
    "saving": template(
        """{name} wants a {thing} that costs ${price}. {He} already has ${has} and saves ${weekly} every week. After
        how many weeks can {he} buy it?""",
        {"price": range(60, 300, 10), "has": range(5, 60), "weekly": range(4, 16)},
        "missing = price - has", "weeks = missing / weekly",
        thing="guitar, tent, camera, skateboard, telescope, keyboard, winter coat",
    ),
    "reading": template(
        """A {book} has {pages} pages. {name} reads {first} pages on Monday and twice as many on Tuesday. How many
        pages remain for the rest of the week?""",
        {"pages": range(120, 400, 5), "first": range(12, 45)},
        "tuesday = 2 * first", "read = first + tuesday", "left = pages - read",
        book="novel, history book, travel guide, book of myths",
    ),
    "wages": template(
        """{name} earns ${rate} an hour at a {place}. Last week {he} worked {hours} hours on each of {days} days and
        got ${tips} in tips. How much money did {he} make in total?""",
        {"rate": range(11, 25), "hours": range(3, 9), "days": range(2, 6), "tips": range(10, 90, 5)},
        "time = hours * days", "pay = rate * time", "total = pay + tips",
        place="cafe, garage, library, garden centre, cinema",
    ),
    "rows": template(
        """A {place} has {rows} rows of {seats} seats. For the evening show {share} percent of the seats are sold. How
        many seats stay empty?""",
        {"rows": range(8, 31), "seats": range(10, 31), "share": range(20, 96, 5)},
        "all = rows * seats", "sold = all * share / 100", "empty = all - sold",
        place="theatre, concert hall, lecture room, small cinema",
    ),
    "half": template(
        """{name} picked {picked} {fruit}. {He} gave half of them to {other} and then used {used} for {dish}. How many
        {fruit} are still in {his} basket?""",
        {"picked": range(30, 120, 2), "used": range(6, 15)},
        "given = picked / 2", "kept = picked - given", "left = kept - used",
        fruit="apples, plums, lemons, pears, peaches, apricots", dish="jam, a cake, a salad, juice",
    ),
    "trips": template(
        """A {vehicle} carries {load} {people} on a trip. It drives {morning} times in the morning and {afternoon}
        times in the afternoon, always full. How many {people} does it carry in {days} days?""",
        {"load": range(8, 55), "morning": range(2, 7), "afternoon": range(2, 7), "days": range(2, 8)},
        "trips = morning + afternoon", "daily = trips * load", "total = daily * days",
        vehicle="ferry, shuttle bus, cable car, tourist train", people="passengers, visitors, people",
    ),
    "distance": template(
        """{name} cycles at {speed} km per hour for {hours} hours, rests, and then walks another {walk} km to the
        {goal}. The way back by train is {shorter} km shorter. How long is the way back in km?""",
        {"speed": range(12, 26), "hours": range(2, 5), "walk": range(2, 9), "shorter": range(3, 15)},
        "ridden = speed * hours", "there = ridden + walk", "back = there - shorter",
        goal="lake, castle, campsite, beach, village of a friend",
    ),
    "ages": template(
        """{name} is {age} years old. {His} {relative} is {times} times as old. How old will the {relative} be when
        {name} is {later}?""",
        {"age": range(5, 14), "times": range(3, 6), "later": range(15, 31)},
        "older = age * times", "years = later - age", "then = older + years",
        relative="aunt, teacher, uncle, neighbour",
    ),
    "recipe": template(
        """A recipe for {people} people needs {grams} grams of {stuff}. {name} cooks for {guests} people and has {has}
        grams at home. How many more grams of {stuff} does {he} need?""",
        {"people": range(2, 7), "grams": range(120, 601, 20), "guests": range(8, 25), "has": range(100, 801, 50)},
        "each = grams / people", "needed = each * guests", "missing = needed - has",
        stuff="rice, flour, pasta, lentils, potatoes",
    ),
    "tank": template(
        """A {tank} holds {litres} litres. A tap fills it with {flow} litres a minute, but {leak} litres a minute leak
        out. How many minutes does it take to fill the empty {tank}?""",
        {"litres": range(120, 901, 20), "flow": range(9, 30), "leak": range(2, 8)},
        "gain = flow - leak", "minutes = litres / gain",
        tank="water tank, fish pond, paddling pool, rain barrel",
    ),
    "teams": template(
        """There are {girls} girls and {boys} boys at the {event}. The coach makes teams of {size} and every team gets
        {balls} {thing}. How many {thing} are needed?""",
        {"girls": range(12, 50), "boys": range(12, 50), "size": range(3, 10), "balls": range(2, 7)},
        "children = girls + boys", "teams = children / size", "needed = teams * balls",
        event="sports day, summer camp, training session", thing="balls, ropes, cones, flags",
    ),
    "discount": template(
        """A {thing} costs ${price}. In the sale it is {off} percent cheaper, and {name} also has a voucher for
        ${voucher}. What does {he} pay?""",
        {"price": range(40, 241, 10), "off": range(10, 51, 5), "voucher": range(2, 16)},
        "saved = price * off / 100", "sale = price - saved", "paid = sale - voucher",
        thing="jacket, desk lamp, suitcase, pair of boots, chair, blender",
    ),
    "eggs": template(
        """{name} keeps {hens} hens, and each lays {eggs} eggs a week. {He} eats {eaten} eggs a week and sells the
        rest in boxes of {box}. How many boxes does {he} sell each week?""",
        {"hens": range(6, 30), "eggs": range(4, 8), "eaten": range(4, 20), "box": range(6, 13, 2)},
        "laid = hens * eggs", "rest = laid - eaten", "boxes = rest / box",
    ),
    "garden": template(
        """A rectangular {field} is {long} metres long and {wide} metres wide. {name} puts a fence all the way around
        it that costs ${price} a metre. {He} has paid ${paid} already. How much is still to be paid?""",
        {"long": range(12, 60), "wide": range(8, 40), "price": range(3, 15), "paid": range(50, 401, 50)},
        "half = long + wide", "around = 2 * half", "cost = around * price", "due = cost - paid",
        field="garden, meadow, playground, paddock",
    ),
    "bus": template(
        """A bus leaves with {start} people. At the first stop {off} get off and {on} get on. At the second stop half
        of the people leave. How many people are on the bus now?""",
        {"start": range(20, 60), "off": range(3, 18), "on": range(2, 22)},
        "stayed = start - off", "first = stayed + on", "second = first / 2",
    ),
    "minutes": template(
        """{name} practises the {instrument} for {minutes} minutes on each of {days} days a week. How many hours does
        {he} practise in {weeks} weeks?""",
        {"minutes": range(15, 76, 5), "days": range(3, 7), "weeks": range(3, 13)},
        "week = minutes * days", "all = week * weeks", "hours = all / 60",
        instrument="piano, violin, trumpet, drums, flute, cello",
    ),
    "shelves": template(
        """A librarian has {books} books. {damaged} are damaged and taken away. The others are spread evenly over
        {shelves} shelves, and then {new} new books are put on each shelf. How many books are on each shelf?""",
        {"books": range(150, 600), "damaged": range(6, 50), "shelves": range(6, 20), "new": range(2, 9)},
        "good = books - damaged", "old = good / shelves", "now = old + new",
    ),
    "share": template(
        """{name} and {count} friends rent a {thing} for {days} days. It costs ${daily} a day and a ${fee} fee for
        cleaning. If all of them share the costs equally, what does each one pay?""",
        {"count": range(2, 8), "days": range(2, 9), "daily": range(24, 121, 2), "fee": range(20, 81, 5)},
        "rent = days * daily", "cost = rent + fee", "people = count + 1", "each = cost / people",
        thing="boat, van, cabin, holiday flat",
    ),
    "steps": template(
        """On Friday {name} walked {friday} steps. On Saturday it was {more} more, and on Sunday half as many as on
        Saturday. How many steps did {name} walk on the three days together?""",
        {"friday": range(3000, 9001, 100), "more": range(400, 3001, 200)},
        "saturday = friday + more", "sunday = saturday / 2", "both = friday + saturday", "total = both + sunday",
    ),
    "bakery": template(
        """A baker makes {trays} trays of {cakes}, {each} on a tray. In the morning {sold} are sold, and a third of
        the rest is given to a school. How many {cakes} does the school get?""",
        {"trays": range(5, 16), "each": range(12, 31), "sold": range(20, 200)},
        "made = trays * each", "rest = made - sold", "given = rest / 3",
        cakes="muffins, rolls, pretzels, scones, croissants",
    ),
    "plants": template(
        """{name} plants {rows} rows with {each} {plants} in each row. After a storm {lost} of the plants are broken.
        From every plant that is left {he} harvests {crop}. How many does {he} harvest?""",
        {"rows": range(4, 15), "each": range(5, 16), "lost": range(4, 30), "crop": range(3, 13)},
        "planted = rows * each", "left = planted - lost", "harvest = left * crop",
        plants="tomato plants, pepper plants, courgette plants",
    ),
    "tickets": template(
        """A {place} sells tickets at ${adult} for adults and ${child} for children. On one day {adults} adults and
        {children} children came, and ${costs} went to wages. How much was left that day?""",
        {"adult": range(8, 20), "child": range(3, 8), "adults": range(30, 120), "children": range(20, 150),
         "costs": range(200, 601, 50)},
        "a = adult * adults", "c = child * children", "income = a + c", "left = income - costs",
        place="zoo, swimming pool, museum, climbing hall",
    ),
    "printer": template(
        """One printer makes {slow} pages a minute, another makes {fast}. Both print together until {pages} pages are
        done. How many pages did the faster one print?""",
        {"slow": range(6, 20), "fast": range(20, 41), "pages": range(200, 1001, 10)},
        "both = slow + fast", "minutes = pages / both", "faster = fast * minutes",
    ),
    "collection": template(
        """{name} has {mine} {things}. {other} has {more} more than {name}. Together they want to collect {goal}. How
        many {things} are still missing?""",
        {"mine": range(20, 90), "more": range(5, 40), "goal": range(200, 401, 20)},
        "theirs = mine + more", "both = mine + theirs", "missing = goal - both",
        things="stamps, coins, shells, postcards, badges",
    ),
    "medicine": template(
        """A patient takes {dose} tablets {times} times a day. A box holds {box} tablets, and the treatment lasts
        {days} days. How many boxes are needed?""",
        {"dose": range(2, 5), "times": range(2, 5), "box": range(12, 41, 4), "days": range(8, 41)},
        "daily = dose * times", "all = daily * days", "boxes = all / box",
    ),
    "fuel": template(
        """A car needs {use} litres of fuel for 100 km. {name} drives {km} km, and a litre costs ${price}. {He} and
        {other} split the cost of the fuel in two equal parts. What does each of them pay?""",
        {"use": range(4, 11), "km": range(200, 1201, 100), "price": range(2, 5)},
        "hundreds = km / 100", "litres = hundreds * use", "cost = litres * price", "each = cost / 2",
    ),
    "wall": template(
        """A wall of {name}'s kitchen is {wide} tiles wide and {high} tiles high. A window takes the place of {window}
        tiles. Tiles come in boxes of {box}. How many boxes does {he} need?""",
        {"wide": range(12, 31), "high": range(8, 21), "window": range(9, 37), "box": range(8, 21)},
        "all = wide * high", "tiles = all - window", "boxes = tiles / box",
    ),
    "points": template(
        """In a game {name} scores {first} points in the first round, {times} times as many in the second, and loses
        {lost} in the third. {other} has {points} points in total. By how many points does {name} lead?""",
        {"first": range(15, 60), "times": range(2, 5), "lost": range(5, 40), "points": range(20, 120)},
        "second = first * times", "two = first + second", "total = two - lost", "lead = total - points",
    ),
}  # fmt: skip

EVALUATION = {
    "candles": template(
        """A candle burns down {mm} mm every hour. {name} lights a new candle of {long} mm at dinner and lets it burn
        for {hours} hours on {evenings} evenings. How many mm of the candle remain?""",
        {"mm": range(4, 13), "long": range(180, 361, 10), "hours": range(2, 5), "evenings": range(2, 8)},
        "time = hours * evenings", "burnt = mm * time", "rest = long - burnt",
    ),
    "farm": template(
        """On a farm there are {cows} cows, {goats} goats fewer than twice that number, and {geese} geese. How many
        legs do all these animals have together?""",
        {"cows": range(12, 40), "goats": range(3, 12), "geese": range(5, 40)},
        "double = 2 * cows", "herd = double - goats", "big = cows + herd", "legs = 4 * big", "thin = 2 * geese",
        "total = legs + thin",
    ),
    "parcels": template(
        """A courier delivers {parcels} parcels a day from Monday to Thursday and {friday} on Friday. For each parcel
        {name}'s company pays the courier ${pay}. What does the courier earn that week?""",
        {"parcels": range(20, 70), "friday": range(15, 90), "pay": range(2, 6)},
        "four = 4 * parcels", "week = four + friday", "earned = week * pay",
    ),
    "ribbon": template(
        """{name} cuts {pieces} pieces of {cm} cm from a ribbon that is {long} cm long, and divides what is over into
        {bows} bows of the same length. How many cm of ribbon are in one bow?""",
        {"pieces": range(3, 12), "cm": range(8, 40), "long": range(300, 601, 10), "bows": range(3, 9)},
        "cut = pieces * cm", "over = long - cut", "bow = over / bows",
    ),
    "phone": template(
        """{name}'s phone plan costs ${base} a month and ${gb} for each gigabyte above {free}. In May {he} used {used}
        gigabytes, in June none above the limit. What did {he} pay for both months?""",
        {"base": range(10, 36), "gb": range(2, 6), "free": range(5, 21, 5), "used": range(7, 40)},
        "above = used - free", "extra = above * gb", "bases = 2 * base", "paid = bases + extra",
    ),
    "lift": template(
        """A lift may carry {limit} kg. {count} workers who weigh {kg} kg each are in it. How many crates of {crate}
        kg can they take along to use the limit exactly?""",
        {"limit": range(600, 1201, 50), "count": range(3, 7), "kg": range(62, 91), "crate": range(12, 36)},
        "workers = count * kg", "room = limit - workers", "crates = room / crate",
    ),
    "votes": template(
        """In a vote of the {group}, {all} people took part. {percent} percent were for the new {plan}, {none} did not
        answer, and the others were against it. How many were against it?""",
        {"all": range(80, 401, 20), "percent": range(35, 76, 5), "none": range(4, 20)},
        "yes = all * percent / 100", "others = all - yes", "no = others - none",
        group="village, school, sports club", plan="bridge, playground, timetable, logo",
    ),
    "paint": template(
        """One tin of paint is enough for {area} square metres. {name} paints {rooms} rooms with {walls} square metres
        of wall each, and every wall is painted twice. How many tins are used up?""",
        {"area": range(12, 31), "rooms": range(2, 7), "walls": range(24, 61, 2)},
        "once = rooms * walls", "twice = 2 * once", "tins = twice / area",
    ),
    "train": template(
        """A train is {late} minutes late when it leaves {city}. On each of the next {stops} sections it wins back
        {won} minutes, but a red signal costs {lost} minutes. How late is it in the end?""",
        {"late": range(20, 60), "stops": range(3, 8), "won": range(2, 6), "lost": range(3, 13)},
        "back = stops * won", "after = late - back", "end = after + lost",
        city="Lyon, Osaka, Porto, Leeds, Gdansk, Denver",
    ),
    "honey": template(
        """A beekeeper fills {jars} jars with {grams} grams of honey each. A quarter of the jars goes to the
        neighbours. The rest is sold at ${price} a jar. How much money does the honey bring in?""",
        {"jars": range(24, 121, 4), "grams": range(250, 501, 125), "price": range(4, 12)},
        "gifts = jars / 4", "sold = jars - gifts", "money = sold * price",
    ),
    "film": template(
        """{name} takes {photos} photos on a trip of {days} days, {blurred} of which are blurred and deleted. {He}
        puts the good ones into albums with {pages} pages of {each} photos. How many albums are filled?""",
        {"photos": range(150, 500), "days": range(3, 12), "blurred": range(10, 60), "pages": range(8, 21, 2),
         "each": range(2, 7)},
        "good = photos - blurred", "album = pages * each", "albums = good / album",
    ),
    "swim": template(
        """A pool is {metres} metres long. {name} swims {lengths} lengths before breakfast and {more} lengths more
        than that after work. How many metres does {he} swim in {days} such days?""",
        {"metres": range(20, 51, 5), "lengths": range(8, 25), "more": range(2, 13), "days": range(2, 7)},
        "later = lengths + more", "daily = lengths + later", "far = daily * metres", "total = far * days",
    ),
}  # fmt: skip

TEMPLATES = {"train": TRAINING, "evaluate": EVALUATION}
