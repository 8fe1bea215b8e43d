"""Facts of many kinds and wordings, with questions about them: what a memory learns to recall from.

The kinds and wordings are others than those of ``needles.py``, which measures recall. ``planting.py`` hides them in
texts.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

MARK = "\x00"
"""Stands in a text before and after each value."""


def _listed(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(separator))


COLOURS = _listed(
    """red blue green yellow purple silver golden copper wooden striped rusty broken antique tiny heavy folding painted
    spare borrowed leather marble crooked narrow polished foreign velvet orange grey white black"""
)
NOUNS = _listed(
    """bicycle lantern violin clock camera kettle umbrella telescope wagon anchor compass ladder typewriter canoe drum
    vase mirror tractor suitcase globe piano rifle tent barometer statue sledge loom helmet microscope trumpet
    carpet boiler printer scooter generator turbine magnet tripod easel harp saddle crane projector freezer"""
)
LOCKED = _listed(
    """chest cabinet safe trunk cupboard vault locker drawer shed gate cellar archive strongbox showcase"""
)
LABELS = _listed(
    """falcon saturn orchid tundra walrus comet cobalt sparrow thistle glacier panther mosaic cactus beacon marlin
    quartz raven saffron tempest willow zephyr badger canyon dolphin ferret hazel iris jackal lotus meteor nimbus
    otter pepper quiver ridge sable topaz urchin viper wombat yarrow zinc bramble cipher drizzle echo flint gravel"""
)
FIRST = _listed(
    """Ada Bruno Clara Dmitri Elif Farid Greta Hugo Ines Jonas Karin Leon Mira Nadia Oskar Petra Quentin Rosa Stefan
    Tilda Ulrich Vera Walter Xenia Yusuf Zora Anselm Beatrix Cosmo Dagny Emeka Fumiko"""
)
LAST = _listed(
    """Lund Ferreira Novak Okafor Brandt Castell Dufour Eriksen Fontana Grimm Hallam Ivanov Jansen Kovacs Lindqvist
    Moreau Nakamura Ortiz Pavlov Quist Rahman Sorensen Tanaka Ullman Varga Weller Yilmaz Zeller Abara Birch"""
)
TOWNS = _listed(
    """Harwick Tarnow Ellsmere Brackford Solvang Marbeck Quillan Ostrava Penhallow Riga Dunmore Vasteras Lindau Cahors
    Trebon Aldgate Novigrad Ketton Zwolle Faro Bergen Udine Kalmar Segovia Thurso Odense Lugano Arbroath"""
)
STREETS = _listed(
    """Mill Station Church Bridge Tanner Orchard King Castle Meadow Foundry Abbey Canal Windmill Chapel Cooper Saddler
    Quarry Lime"""
)
SPOTS = _listed(
    """stone stairs, old boiler, third bookshelf, water tank, church organ, loose floorboard, coal heap, stage curtain,
    bread oven, broken clock, large mirror, wine rack, flour sacks, iron stove, village pump, chimney, fishing nets,
    apple crates, spiral staircase, tool chest, rain barrel, statue, bell tower, ticket counter, sewing table""",
    ",",
)
SYSTEMS = _listed(
    """staff portal, backup server, wireless network, mail account, payroll system, library terminal, test cluster,
    door panel, customer database, film archive, weather station, ferry booking site, museum alarm, student forum,
    build machine, laboratory computer, warehouse scanner, parking barrier, radio relay, photo album""",
    ",",
)
SECRETS = _listed(
    """confirmation number, door code, booking reference, launch code, access code, customer number, alarm code,
    voucher number, reservation number, lottery number, claim number, order number, secret code, flight number, gate
    code, delivery number, docket number, safe combination, verification code, activation number""",
    ",",
)
EVENTS = _listed(
    """opening of the bridge, great flood, fire, first market, founding of the school, last strike, railway accident,
    election, chess tournament, harvest festival, earthquake, trial, siege, peace treaty, launch of the ferry""",
    ",",
)
MONTHS = _listed("""January February March April May June July August September October November December""")
VERBS = _listed("""trade paint follow bury borrow polish carry question forget weigh repair measure trust chase sell""")


def number(rng: random.Random) -> str:
    """Three to ten digits."""
    digits = rng.randint(3, 10)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def hexadecimal(rng: random.Random) -> str:
    """A string of hexadecimal digits, some with dashes as in a uuid."""
    digits = f"{rng.getrandbits(128):032x}"
    if rng.random() < 0.3:
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return digits[: rng.randint(6, 20)]


def thing(rng: random.Random) -> str:
    return f"the {rng.choice(COLOURS)} {rng.choice(NOUNS)}"


def locked(rng: random.Random) -> str:
    return f"the {rng.choice(COLOURS)} {rng.choice(LOCKED)}"


def label(rng: random.Random) -> str:
    word = rng.choice(LABELS)
    return f"{rng.choice(COLOURS)} {word}" if rng.random() < 0.3 else word


def secret(rng: random.Random) -> str:
    name = rng.choice(SECRETS)
    return f"{name} for {rng.choice(TOWNS)}" if rng.random() < 0.5 else name


def person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def title(rng: random.Random) -> str:
    return f'"The {rng.choice(COLOURS).title()} {rng.choice(NOUNS + LABELS).title()}"'


def event(rng: random.Random) -> str:
    return f"the {rng.choice(EVENTS)} of {rng.choice(TOWNS)}"


def spot(rng: random.Random) -> str:
    return f"{rng.choice(('under', 'behind', 'above', 'beside', 'beneath'))} the {rng.choice(SPOTS)}"


def words(rng: random.Random) -> str:
    return rng.choice("-_ .").join(rng.sample(LABELS + NOUNS, rng.randint(2, 4)))


def telephone(rng: random.Random) -> str:
    form = rng.choice(("555-####", "+44 20 7### ####", "0## ### ## ##", "(0###) ######", "+1 ### 555 ####"))
    return re.sub("#", lambda _: str(rng.randrange(10)), form)


def year(rng: random.Random) -> str:
    return str(rng.randint(1200, 2030))


def date(rng: random.Random) -> str:
    day, month, y = rng.randint(1, 28), rng.randrange(12), year(rng)
    return rng.choice((f"{day} {MONTHS[month]} {y}", f"{MONTHS[month]} {day}, {y}", f"{y}-{month + 1:02}-{day:02}"))


def price(rng: random.Random) -> str:
    whole, cents = rng.randrange(2, 10 ** rng.randint(1, 5)), f"{rng.randrange(100):02}"
    return rng.choice((f"${whole:,}.{cents}", f"€{whole}.{cents}", f"{whole:,} pounds", f"{whole} euros", f"${whole}"))


def saying(rng: random.Random) -> str:
    one, other = rng.sample(NOUNS + LABELS, 2)
    first, second = rng.sample(VERBS, 2)
    forms = (
        f"Never {first} a {one} before you {second} the {other}",
        f"Anyone who can {first} the {one} may {second} any {other}",
        f"A {one} will not {first} itself, and no {other} can {second} it",
        f"First {first} the {one}, then {second} the {other}",
        f"I would rather {first} a {one} than {second} a {other}",
    )
    return rng.choice(forms)


def constant(rng: random.Random) -> str:
    parts = rng.sample([word.upper() for word in (*LABELS, *NOUNS, "max", "size", "port", "limit", "rate")], 2)
    return "_".join(parts)


def name_in_code(rng: random.Random) -> str:
    return constant(rng).lower()


@dataclass(frozen=True)
class Kind:
    """Facts of one kind in many wordings.

    The wordings hold ``{k}`` for the key, ``{a}`` and ``{b}`` for what is told about it, ``{v}`` for the value, and
    ``{K}`` for a key that begins with a capital letter.

    Attributes:
        key: makes a key, such as a thing or a person.
        value: makes a value.
        statements: how a fact is stated; those with the key before the value are also repeated as questions.
        sentences: sentences to complete.
        asks: questions, which get an answer in one of the ``FRAMES``.
        attributes: pairs for ``{a}`` and ``{b}``.
        quoted: share of the facts whose value is in quotation marks.
        code: wordings are lines of their own.
        seconds: how the second step of a chain is stated; ``{p}`` stands for a person, who links both.
    """

    key: Callable[[random.Random], str]
    value: Callable[[random.Random], str]
    statements: tuple[str, ...]
    sentences: tuple[str, ...]
    asks: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...] = (("", ""),)
    quoted: float = 0.0
    code: bool = False
    seconds: tuple[str, ...] = ()


def _alike(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "") for name in names)


FRAMES = (
    "\nQuestion: {q}\nAnswer: {v}\n",
    "\nQ: {q}\nA: {v}\n",
    "\nUser: {q}\nAssistant: {v}\n",
    "\n{q} Answer: {v}.\n",
    "\n- {q}\n- {v}.\n",
    "\nSomebody asked: {q} The reply was {v}.\n",
    "\nQuestion: {q}\nAnswer: It is {v}.\n",
)
REPEATS = (" Note: {v}.", " Once more: {v}.", " I repeat, {v}.", " Again: {v}.", " (That is {v}.)")

KINDS: dict[str, Kind] = {
    "number": Kind(
        thing,
        number,
        (
            "The {a} of {k} is {v}.",
            "{K} has the {a} {v}.",
            "Please write down that the {a} of {k} is {v}.",
            "Note on {k}: its {a} is {v}.",
            "According to the file, {k} carries the {a} {v}.",
            "They registered {k} under the {a} {v}.",
            "Do not lose this: {v} is the {a} of {k}.",
            "Someone had scratched the {a} {v} into {k}.",
        ),
        (
            "As stated above, the {a} of {k} is {v}.",
            "The {a} that belongs to {k} is {v}.",
            "We need the {a} of {k} again. It was {v}.",
            "Looking up {k}, we find the {a} {v}.",
            "The clerk asked about {k} and noted its {a}: {v}.",
            "Earlier we read which {a} {k} has, namely {v}.",
        ),
        ("What is the {a} of {k}?", "Which {a} does {k} have?", "Can you tell me the {a} of {k}?"),
        _alike(
            "serial number",
            "licence number",
            "inventory number",
            "batch number",
            "registration number",
            "catalogue number",
            "model number",
            "stock number",
            "insurance number",
        ),
        quoted=0.1,
    ),
    "label": Kind(
        label,
        number,
        (
            "The {a} for {k} is: {v}.",
            "Use {v} as the {a} for {k}.",
            "For {k}, the {a} is {v}.",
            "{K} was given the {a} {v}.",
            "Everyone working on {k} knows its {a}, {v}.",
            "The list of today gives {k} the {a} {v}.",
            "Anyone who asks about {k} gets the {a}: {v}.",
        ),
        (
            "The {a} that was given for {k} is: {v}.",
            "As the text said, the {a} for {k} is {v}.",
            "We were told the {a} of {k}. It is: {v}.",
            "So {k} goes with the {a} {v}.",
            "To continue with {k}, enter its {a}: {v}.",
        ),
        ("What is the {a} for {k}?", "Which {a} was given for {k}?", "Do you recall the {a} for {k}?"),
        _alike("code", "identifier", "index", "score", "reference", "frequency", "channel", "count", "signal"),
        quoted=0.1,
    ),
    "secret": Kind(
        secret,
        number,
        (
            "The {k} is {v}.",
            "Your {k} is {v}. Please keep it in mind.",
            "Keep the {k} safe: {v}.",
            "On the note stood the {k}, {v}.",
            "{v} is our {k} from now on.",
            "This is the {k} that you will need later: {v}.",
            "Learn the {k} by heart. It is {v}. Nothing else matters here.",
        ),
        (
            "As you may recall, the {k} is {v}.",
            "Now enter the {k}: {v}.",
            "The {k} that was given earlier is {v}.",
            "They asked us for the {k} and we said {v}.",
            "Our {k} was {v}.",
        ),
        ("What is the {k}?", "Which {k} were you given?", "Could you repeat the {k}?"),
    ),
    "address": Kind(
        person,
        lambda rng: str(rng.randint(2, 9999)),
        (
            "{k} lives at number {v}, {a}.",
            "The house of {k} on {a} has the number {v}.",
            "Letters to {k} go to {a} {v}.",
            "On {a}, {k} rents the house with the number {v}.",
            "{k} bought a flat on {a}, number {v}.",
            "If you visit {k}, ring at {a} {v}.",
        ),
        (
            "{k} lives on {a}, at number {v}.",
            "The street number of {k} is {v}.",
            "The postman has a parcel for {k} and carries it to house number {v}.",
            "The taxi took {k} home. It stopped at number {v}.",
            "The address of {k} is {a} {v}.",
        ),
        ("At which number on {a} does {k} live?", "What is the house number of {k}?", "What number has {k}'s house?"),
        _alike(*(f"{street} {kind}" for street in STREETS for kind in ("Street", "Road", "Lane"))),
    ),
    "telephone": Kind(
        person,
        telephone,
        (
            "You can reach {k} at {v}.",
            "The telephone number of {k} is {v}.",
            "{k} left a phone number: {v}.",
            "To speak with {k}, dial {v}.",
            "Please call {k} back under {v}.",
            "The card read: {k}, tel. {v}.",
            "Dial {v} if you want to talk to {k}.",
        ),
        (
            "She picked up the phone to call {k} and dialled {v}.",
            "The number under which {k} answers the phone is {v}.",
            "Phone {k} now: {v}.",
            "In the phone book, {k} is listed with {v}.",
            "As noted before, {k} can be called at {v}.",
        ),
        ("What is the telephone number of {k}?", "How can I reach {k} by phone?", "Which number do I dial for {k}?"),
    ),
    "password": Kind(
        lambda rng: f"the {rng.choice(SYSTEMS)} of {rng.choice(TOWNS)}",
        words,
        (
            "The password of {k} is {v}.",
            "To log in to {k}, type {v}.",
            "{K} now has a new password: {v}.",
            "The administrator changed the password for {k} to {v}.",
            "Anyone who uses {k} has to enter the phrase {v}.",
            "Enter {v} when {k} asks for a password.",
        ),
        (
            "She sat down in front of {k} and typed the password {v}.",
            "The password that opens {k} is {v}.",
            "Access to {k} is granted with {v}.",
            "{K} asked for the password, and he entered {v}.",
            "Login for {k}: {v}.",
        ),
        ("What is the password of {k}?", "How do I log in to {k}?", "Which phrase does {k} accept?"),
        quoted=0.5,
    ),
    "hexadecimal": Kind(
        thing,
        hexadecimal,
        (
            "The {a} of {k} is {v}.",
            "{K} is filed under the {a} {v}.",
            "We computed the {a} of {k}: {v}.",
            "The label on {k} shows the {a} {v}.",
            "In the log, {k} appears with {a} {v}.",
            "Record {v} holds the {a} of {k}.",
        ),
        (
            "The log was searched for {k}. Its {a} is {v}.",
            "To verify {k}, compare its {a} with {v}.",
            "{K} was found again by its {a}, {v}.",
            "The {a} recorded for {k} reads {v}.",
            "Checking {k}: {a} {v}.",
        ),
        ("What is the {a} of {k}?", "Under which {a} is {k} filed?", "Which {a} was recorded for {k}?"),
        _alike("checksum", "fingerprint", "tracking id", "request id", "hash", "device id", "uuid", "token"),
        quoted=0.3,
    ),
    "maker": Kind(
        thing,
        person,
        (
            "{K} was {a} by {v}.",
            "It was {v} who {a} {k}.",
            "The {b} of {k} is {v}.",
            "Hardly anybody knows that {k} was {a} by {v}.",
            "A small plate says that {k} was once {a} by {v}.",
            "The museum names the {b} of {k}: {v}.",
        ),
        (
            "The person who {a} {k} is {v}.",
            "As we know, {k} was {a} by {v}.",
            "The prize for {k} went to its {b}, {v}.",
            "We owe {k} to its {b}, {v}.",
            "The signature on {k} is that of its {b}, {v}.",
        ),
        ("Who {a} {k}?", "Who is the {b} of {k}?", "By whom was {k} {a}?"),
        (
            ("designed", "designer"),
            ("built", "builder"),
            ("painted", "painter"),
            ("donated", "donor"),
            ("restored", "restorer"),
            ("invented", "inventor"),
            ("owned", "owner"),
            ("sold", "seller"),
        ),
    ),
    "author": Kind(
        title,
        person,
        (
            "{k} was {a} by {v}.",
            "It was {v} who is said to be the {b} of {k}.",
            "The {b} of {k} is {v}.",
            "Critics praised {k}, {a} by {v}.",
            "The cover of {k} names the {b}: {v}.",
            "They have just reprinted {k}, a work {a} by {v}.",
        ),
        (
            "As we know, {k} was {a} by {v}.",
            "She had read {k} twice and wrote a letter to its {b}, {v}.",
            "On the shelf stood {k}, {a} by {v}.",
            "The catalogue lists {k} under the name of its {b}, {v}.",
            "No one could name the {b} of {k}, until someone remembered {v}.",
        ),
        ("Which {b} is named on {k}?", "Who is the {b} of {k}?", "By whom was {k} {a}?"),
        (
            ("written", "writer"),
            ("translated", "translator"),
            ("edited", "editor"),
            ("composed", "composer"),
            ("illustrated", "illustrator"),
            ("published", "publisher"),
        ),
    ),
    "place": Kind(
        thing,
        spot,
        (
            "{K} is hidden {v}.",
            "They keep {k} {v}.",
            "Last winter somebody put {k} {v}.",
            "You will find {k} {v}.",
            "If you look {v}, you will find {k}.",
            "For safety, {k} is stored {v}.",
        ),
        (
            "They looked for {k} everywhere, and at last found it {v}.",
            "The place where {k} was left is {v}.",
            "To get {k}, one has to search {v}.",
            "He went to fetch {k}, which was still {v}.",
            "As was said, {k} can be found {v}.",
        ),
        ("Where can I find {k}?", "Where was {k} hidden?", "Where do they keep {k}?"),
    ),
    "residence": Kind(
        person,
        lambda rng: rng.choice(TOWNS),
        (
            "{k} {a} in {v}.",
            "These days, {k} {a} in {v}.",
            "We heard that {k} {a} in {v}.",
            "In {v}, as everybody knows, {k} {a}.",
            "The newspaper wrote that {k} {a} in {v}.",
            "It is true that {k} {a} in {v}.",
        ),
        (
            "The town where {k} {a} is {v}.",
            "As mentioned before, {k} {a} in {v}.",
            "If you look for {k}, take the train to {v}.",
            "{k} sent us a postcard from {v}.",
            "We all know that {k} {a} in the town of {v}.",
        ),
        ("In which town can {k} be found?", "Which town does {k} call home?", "In what town could we visit {k}?"),
        _alike("lives", "works", "teaches", "runs a shop", "has settled", "owns a farm"),
    ),
    "date": Kind(
        event,
        date,
        (
            "The date of {k} was {v}.",
            "{K} took place on {v}.",
            "The chronicle dates {k} to {v}.",
            "On {v}, people saw {k}.",
            "Nobody who was there forgets {k} on {v}.",
            "{K} is remembered every year, since it happened on {v}.",
        ),
        (
            "The day of {k} was {v}.",
            "The witness was asked about {k} and gave the date {v}.",
            "A plaque reminds visitors of {k}, on {v}.",
            "As the chronicle says, {k} happened on {v}.",
            "In the calendar, {k} is entered on {v}.",
        ),
        ("When did {k} take place?", "What was the date of {k}?", "On which day was {k}?"),
    ),
    "year": Kind(
        event,
        year,
        (
            "{K} was in {v}.",
            "The year of {k} is {v}.",
            "In {v}, the town saw {k}.",
            "Historians place {k} in the year {v}.",
            "A stone tells of {k} in {v}.",
            "{K} dates from the year {v}.",
        ),
        (
            "In school they learned that {k} was in {v}.",
            "As was told, the year of {k} was {v}.",
            "The guide spoke of {k}, which was in {v}.",
            "{K} happened in the year {v}.",
            "Much had changed since {k} in {v}.",
        ),
        ("In which year was {k}?", "What was the year of {k}?", "When was {k}?"),
    ),
    "price": Kind(
        thing,
        price,
        (
            "{K} costs {v}.",
            "The price of {k} is {v}.",
            "Somebody paid {v} for {k}.",
            "At the auction, {k} was sold for {v}.",
            "The dealer asks {v} for {k}.",
            "The insurance values {k} at {v}.",
        ),
        (
            "The amount to pay for {k} is {v}.",
            "The receipt says that {k} cost {v}.",
            "If you want to buy {k}, bring {v}.",
            "As agreed, they paid for {k} the sum of {v}.",
            "Invoice for {k}: {v}.",
        ),
        ("How much does {k} cost?", "What is the price of {k}?", "What did they pay for {k}?"),
    ),
    "constant": Kind(
        constant,
        lambda rng: number(rng) if rng.random() < 0.8 else f"{rng.randrange(1000)}.{rng.randrange(1000):03}",
        (
            "{k} = {v}\n",
            "# set by the installer\n{k} = {v}\n",
            "{k}: Final = {v}\n",
            "class Settings:\n    {k} = {v}\n",
            "const {k} = {v};\n",
            "#define {k} {v}\n",
            "def defaults():\n    {k} = {v}\n    return {k}\n",
        ),
        (
            "assert {k} == {v}\n",
            "if {k} != {v}:\n    raise ValueError({k})\n",
            "print({k})  # prints {v}\n",
            "The constant {k} is set to {v}.\n",
            "# {k} is {v}\n",
            "check({k}, expected= {v})\n",
        ),
        ("What is {k} set to?", "Which constant is assigned to {k}?", "What does print({k}) show?"),
        code=True,
    ),
    "entry": Kind(
        name_in_code,
        lambda rng: rng.choice((hexadecimal, words, number))(rng),
        (
            'settings["{k}"] = {v}\n',
            'options = {"{k}": {v}}\n',
            "config.{k} = {v}\n",
            "def {k}():\n    return {v}\n",
            'parser.add_argument("--{k}", default={v})\n',
            'os.environ["{k}"] = {v}\n',
            "connect({k}={v})\n",
        ),
        (
            'assert settings["{k}"] == {v}\n',
            'print(options["{k}"])  # {v}\n',
            "The setting {k} has been given the string {v}.\n",
            "# {k} defaults to {v}\n",
            'assertEqual(get("{k}"), {v})\n',
            "In the code above, {k} is {v}.\n",
        ),
        ("What is {k} in the code?", "Which string does {k} hold?", "What is the default of {k}?"),
        quoted=1.0,
        code=True,
    ),
    "quotation": Kind(
        person,
        saying,
        (
            "{k} said: {v}.",
            "{k} used to say {v}.",
            "On the wall hangs a saying of {k}: {v}.",
            "The words {v} go back to {k}.",
            "In a letter, {k} wrote: {v}.",
            "{k} smiled and answered: {v}.",
        ),
        (
            "In the words of {k}: {v}.",
            "The speech ended with the saying of {k}: {v}.",
            "We recall what {k} said: {v}.",
            "The advice that {k} gave was {v}.",
            "They carved the words of {k} in stone: {v}.",
        ),
        ("What did {k} say?", "What are the words of {k}?", "Which saying goes back to {k}?"),
        quoted=1.0,
    ),
    "chain": Kind(
        locked,
        lambda rng: rng.choice(TOWNS),
        (
            "The key of {k} is with {p}.",
            "{p} keeps the key of {k}.",
            "The only key that fits {k} belongs to {p}.",
            "They handed the key of {k} to {p}.",
            "Since last year, {p} has had the key of {k}.",
        ),
        (
            "To open {k}, one has to fetch its key from {v}.",
            "So the key of {k} is kept in {v}.",
            "{K} is locked, and its key is far away, in {v}.",
            "The key of {k} can be picked up in the town of {v}.",
            "The holder of the key of {k} lives in {v}.",
        ),
        ("In which town is the key of {k}?", "To which town do I go for the key of {k}?", "Which town has {k}'s key?"),
        seconds=(
            "{p} lives in {v}.",
            "{p} has moved to {v}.",
            "The home of {p} is now {v}.",
            "You can visit {p} in {v}.",
            "{p} has a house in {v}.",
        ),
    ),
}

LISTS = (  # before the pairs, each pair, between two, behind them, and whether values are in quotation marks
    ("{\n", '  "{k}": "{v}"', ",\n", "\n}\n", True),
    ("{", '"{k}": "{v}"', ", ", "}\n", True),
    ("entries:\n", "  {k}: {v}", "\n", "\n", False),
    ("| name | entry |\n|---|---|\n", "| {k} | {v} |", "\n", "\n", False),
    ("name, entry\n", "{k}, {v}", "\n", "\n", False),
    ("name,entry\n", '{k},"{v}"', "\n", "\n", True),
    ("", "- {k}: {v}", "\n", "\n", False),
    ("[entries]\n", '{k} = "{v}"', "\n", "\n", True),
)
TITLES = ("", "", "Here is the register.\n", "Table 3: entries.\n", "The inventory is as follows:\n", "Overview\n")
LISTED = Kind(
    label,
    number,
    (),
    (
        "The register lists {k} with {v}.",
        "In the list, {k} stands next to {v}.",
        "Look up {k}: {v}.",
        "As listed, {k} belongs to {v}.",
        "The row of {k} shows {v}.",
        "entries[{k}] == {v}",
    ),
    ("What does the list say for {k}?", "Which entry belongs to {k}?", "What stands in the row of {k}?"),
)
NAMES = (*KINDS, "list")
"""All kinds of facts."""


@dataclass(frozen=True)
class Fact:
    """What is stated, and the questions about it.

    Attributes:
        statements: texts, all before the questions; the values are marked in the last one.
        questions: which value is asked for, and a text in which the answer is marked; none for a distractor.
    """

    statements: tuple[str, ...]
    questions: tuple[tuple[int, str], ...]


def invent(name: str, rng: random.Random, used: set[str]) -> list[Fact]:
    """Facts of one kind: one or a few that are asked for, at times others of the same wording that are not.

    Args:
        name: one of ``NAMES``.
        rng: source of randomness.
        used: keys that the text has already; new ones are added.
    """
    if name == "list":
        return [_list(rng, used)]
    kind = KINDS[name]
    others = rng.randint(1, 4) if rng.random() < 0.25 else 0
    wording, attribute = rng.choice(kind.statements), rng.choice(kind.attributes)
    quoted = rng.random() < kind.quoted
    asked = rng.randint(1, 1 + others // 2)
    facts = [_fact(kind, wording, attribute, quoted, rng, used, asked=i < asked) for i in range(1 + others)]
    rng.shuffle(facts)
    return facts


def _fact(
    kind: Kind,
    wording: str,
    attribute: tuple[str, str],
    quoted: bool,
    rng: random.Random,
    used: set[str],
    *,
    asked: bool,
) -> Fact:
    key, value = _unused(kind.key, rng, used), kind.value(rng)
    slots = {"k": key, "K": key[0].upper() + key[1:], "a": attribute[0], "b": attribute[1]}
    if kind.seconds:
        slots["p"] = _unused(person, rng, used)
        stated = [_fill(text, slots, value, quoted) for text in (wording, rng.choice(kind.seconds))]
    else:
        again = rng.choice(REPEATS) if not kind.code and rng.random() < 0.15 else ""
        stated = [_fill(wording + again, slots, value, quoted)]
    texts = [_question(kind, wording, rng) for _ in range(rng.randint(1, 3))] if asked else []
    questions = tuple((0, _apart(_fill(text, slots, value, quoted), rng, kind.code)) for text in texts)
    return Fact(tuple(_apart(text, rng, kind.code) for text in stated), questions)


def _question(kind: Kind, wording: str, rng: random.Random) -> str:
    """A sentence to complete, a question with its answer, or a statement again."""
    form = rng.random()
    if form < 0.4:
        return rng.choice(FRAMES).replace("{q}", rng.choice(kind.asks))
    if form < 0.55 and not kind.seconds:
        again = [text for text in kind.statements if _key_first(text)]
        return wording if _key_first(wording) and rng.random() < 0.5 else rng.choice(again)
    return rng.choice(kind.sentences)


def _key_first(text: str) -> bool:
    keys = [text.index(key) for key in ("{k}", "{K}") if key in text]
    return min(keys) < text.index("{v}")


def _list(rng: random.Random, used: set[str]) -> Fact:
    """A list of pairs, of which one or two are asked for."""
    begin, row, between, end, quoted = rng.choice(LISTS)
    make_key, make_value = rng.choice((label, name_in_code, person)), rng.choice((number, hexadecimal, words, price))
    keys = [_unused(make_key, rng, used) for _ in range(rng.randint(4, 12))]
    pairs = [(key, make_value(rng)) for key in keys]
    row = row.replace('"{v}"', "{v}")  # the quotation marks come with the value
    rows = [_fill(row, {"k": key}, value, quoted) for key, value in pairs]
    questions = []
    for which in rng.sample(range(len(pairs)), rng.randint(1, 2)):
        key, value = pairs[which]
        for _ in range(rng.randint(1, 2)):
            text = _question(replace(LISTED, statements=(row,)), row, rng)
            questions.append((which, _apart(_fill(text, {"k": key}, value, quoted), rng, lines=True)))
    return Fact((f"\n\n{rng.choice(TITLES)}{begin}{between.join(rows)}{end}\n",), tuple(questions))


def _unused(make: Callable[[random.Random], str], rng: random.Random, used: set[str]) -> str:
    key = make(rng)
    for _ in range(1000):
        if key.lower() not in used:
            break
        key = make(rng)
    else:  # almost all are used
        key = f"{key} {len(used)}"
    used.add(key.lower())
    return key


def _fill(text: str, slots: dict[str, str], value: str, quoted: bool) -> str:
    """The text with its slots filled and its first value marked, which includes the space before it."""
    first, last = (f'"{MARK}', f'{MARK}"') if quoted else (f"{MARK} ", MARK)
    text = re.sub(r"\{([kKabp])\}", lambda match: slots[match[1]], text)
    before, *after = text.split("{v}")
    if not after:
        return text
    if not quoted:
        before = before.removesuffix(" ")
    plain = f'"{value}"' if quoted else value
    return f"{before}{first}{value}{last}" + plain.join(after)


def _apart(text: str, rng: random.Random, lines: bool) -> str:
    """The text with white space around it, as a sentence among others or as lines of their own."""
    before = "\n" if lines or text.startswith("\n") else rng.choice((" ", " ", "\n", "\n\n"))
    after = "\n" if lines else rng.choice(("", "", "", "\n", "\n\n"))
    return before + text.lstrip("\n") + after
