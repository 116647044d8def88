"""Words, units and sentence templates from which `lmi_multi.demo.spoken` builds sentences."""

from __future__ import annotations


def listed(text: str, separator: str = " ") -> list[str]:
    """Split one text, which is easier to read and to edit than a long list of strings."""
    return text.split(separator)


ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = listed("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
SCALES = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"))
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
MONTHS = listed(
    "january february march april may june july august september october november december"
)
WEEKDAYS = listed("monday tuesday wednesday thursday friday saturday sunday")
PARTS = {
    "in the morning": range(1, 12),
    "in the afternoon": range(12, 18),
    "in the evening": range(17, 23),
    "at night": (20, 21, 22, 23, 0, 1, 2),
    "am": range(12),
    "pm": range(12, 24),
}
"""Each part of the day spans under twelve hours, so it settles the hour that was meant."""
CURRENCIES = (  # one, many, symbol, one hundredth, many hundredths
    ("dollar", "dollars", "$", "cent", "cents"),
    ("dollar", "dollars", "$", "cent", "cents"),
    ("pound", "pounds", "£", "penny", "pence"),
    ("euro", "euros", "€", "cent", "cents"),
    ("yen", "yen", "¥", "", ""),
    ("buck", "bucks", "$", "", ""),
    ("quid", "quid", "£", "", ""),
)
FRACTIONS = {
    "half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip
QUARTERS = {"and a quarter": "25", "and a half": "5", "and three quarters": "75"}
UNITS = {  # per group: one, many, symbol with the space that stands before it
    "length": (
        ("kilometre", "kilometres", " km"), ("kilometer", "kilometers", " km"),
        ("metre", "metres", " m"), ("meter", "meters", " m"), ("mile", "miles", " mi"),
        ("centimetre", "centimetres", " cm"), ("centimeter", "centimeters", " cm"),
        ("millimetre", "millimetres", " mm"), ("millimeter", "millimeters", " mm"),
        ("inch", "inches", " in"), ("foot", "feet", " ft"),
    ),
    "amount": (
        ("kilogram", "kilograms", " kg"), ("kilo", "kilos", " kg"), ("gram", "grams", " g"),
        ("milligram", "milligrams", " mg"), ("tonne", "tonnes", " t"),
        ("litre", "litres", " L"), ("liter", "liters", " L"),
        ("millilitre", "millilitres", " mL"), ("milliliter", "milliliters", " mL"),
    ),
    "temperature": (
        ("degree celsius", "degrees celsius", " °C"), ("degree", "degrees", "°"),
        ("degree fahrenheit", "degrees fahrenheit", " °F"),
    ),
    "speed": (
        ("kilometre per hour", "kilometres per hour", " km/h"),
        ("kilometer an hour", "kilometers an hour", " km/h"),
        ("mile per hour", "miles per hour", " mph"), ("mile an hour", "miles an hour", " mph"),
        ("metre per second", "metres per second", " m/s"),
    ),
    "area": (
        ("square metre", "square metres", " m²"), ("square meter", "square meters", " m²"),
        ("square kilometre", "square kilometres", " km²"), ("hectare", "hectares", " ha"),
    ),
    "duration": (
        ("hour", "hours", " h"), ("minute", "minutes", " min"), ("second", "seconds", " s"),
        ("millisecond", "milliseconds", " ms"),
    ),
    "data": (
        ("kilobyte", "kilobytes", " kB"), ("megabyte", "megabytes", " MB"),
        ("gigabyte", "gigabytes", " GB"), ("terabyte", "terabytes", " TB"),
    ),
    "power": (
        ("watt", "watts", " W"), ("kilowatt", "kilowatts", " kW"), ("volt", "volts", " V"),
        ("kilowatt hour", "kilowatt hours", " kWh"),
    ),
}  # fmt: skip
COMPOUNDS = {  # two units said together, and how many of the small one make the large one
    "height": ((("foot", "feet", " ft"), ("inch", "inches", " in"), 12),),
    "span": (
        (("hour", "hours", " h"), ("minute", "minutes", " min"), 60),
        (("minute", "minutes", " min"), ("second", "seconds", " s"), 60),
    ),
}
NAMES = listed(
    "anna ben carla david emma farid grace hugo ingrid jonas kate liam maria nils olga pedro "
    "quentin rosa sofia tom uma victor wendy xavier yara zoe"
)
THINGS = listed(
    "rice flour apples sand paper coffee tea cheese bread soap cement honey milk water paint "
    "wine juice butter sugar oranges onions potatoes nails wool fish salt olives pasta"
)
PLURALS = listed(
    "books houses trees tickets cars chairs bottles songs pages horses islands letters boxes "
    "eggs cats dogs tables plates apples stations parcels lamps stars photos bridges seats"
)
PLACES = listed(
    "london,berlin,tokyo,oslo,the office,the station,the harbour,the old bridge,the library,"
    "the airport,my house,the museum,paris,the village,the stadium,lima,nairobi",
    ",",
)
ORDERED = listed("floor chapter place lap birthday attempt page row century edition house")
WORDS = listed(
    "able about above across after again against ago agree air alarm almost along already also "
    "always amber among animal another answer anyone apart appear around arrive artist asked "
    "attention autumn away back bag balance barely basket beach bear beautiful because become "
    "before behind believe below beside better beyond bird blanket blue board boat body bone "
    "book borrow bottom brave bread break bright bring broken brother brown build business "
    "busy butter button buy cabin calm camera candle careful carry castle cat cause ceiling "
    "certain change cheap check cherry child choose circle city clean clear clever climb cloud "
    "coast cold colour come common company cook corner correct could country cousin cover "
    "crowd curious dance danger dark daughter day deep deliver desk different dinner dirty "
    "doctor does dog done door doubt down dream dress drive dry during each early earth easy "
    "eat edge either empty engine enough entire even ever every everyone exact exit expect "
    "explain eye face fair fall family famous far farm fast father feather feel fence fetch "
    "few field fill final find fine fire flat flower follow food forest forget fork found free "
    "fresh friend from front fruit full funny garden gate gave gentle give glad glass goes "
    "gold gone good great green ground group grow guess guitar hair hand happen happy hard "
    "hat have hear heart heavy height hello help here hidden high hill hold hole honest hope "
    "horse hospital hot how hungry hurry ice idea if into island jacket join journey jump just "
    "keep kettle key kind king kitchen knife know ladder lake language large late laugh leaf "
    "learn leave left lemon lend less lesson letter light like line listen little live loan "
    "local long look lose lost loud love low lucky lunch machine make many map market matter "
    "maybe meal mean meet melon melt mention middle might milk mind mirror miss money moon "
    "more mother mountain mouse move much music must name narrow near neighbour never "
    "new news next nice nobody noise none north nose not nothing now ocean often oil old only "
    "open orange other our out outside over own paint pair paper parent park party pass patient "
    "pencil phone piano picture piece place plain plant play please pocket poor possible post "
    "potato press pretty price print promise pull purple push put question quick quiet rain "
    "rather reach read ready real red remember rest return rice ride right river road rock roof "
    "room round rule run safe sail same sand save say school sea seat see seem sell send shadow "
    "shall sharp shelf ship shirt shoe shop short should show shut side silver simple since "
    "sing sister size sleep slow small smile snow soft some someone song soon sorry soup south "
    "speak spoon spring stand start station stay steep still stone stop storm story "
    "strange street strong student such sugar summer sun sure surprise sweet table take talk "
    "tall taste teacher tell tender than that their them then there these they thin thing think "
    "this those though through ticket tired today together tomorrow tonight too top tower town "
    "train travel tree true try turn umbrella uncle under until up upon use usual valley very "
    "village visit voice wait walk wall want warm was wash watch wave way wear weather week "
    "weight welcome well west wet what wheel when where which while white who whole why wide "
    "wild will wind window winter wise wish with without woman wonder wood word work world "
    "worry would write wrong yellow yes yesterday yet you young your"
)
SHORT_WORDS = listed(
    "i you he she it we they my our his her is are was were be has had do did on for by with from "
    "not or so if but as no this that who how what all more than then there here very just"
)
CONNECTORS = listed("and in to of for by on from with is")
TEMPLATES = """
meet me on {date} {at}|meet {name} on {day} {at}|meet me {at} on {date}|{name} arrives on {date}
the train to {place} leaves {at}|we have to be at {place} by {time}|the shop opens {at}
the shop is open from {time} to {time}|call {name} before {time}|wake me up {at} please
the concert is on {day} {at}|{name} was born on {date}|he was born in {year}
she moved to {place} in {month}|the bridge was built in {year}|since {year} nobody has lived here
the house dates from the {decade}|they met in the {decade}|the lease ends on {date}
the contract runs from {date} to {date}|see you {at}|are you free on {day}
remind me on {day} to call {name}|book a table on {day} {at}|the deadline is {date}
my flight to {place} leaves on {day} {at}|the meeting with {name} starts {at}
{name} paid {money}|i paid {money} for {amount} of {thing}|it costs {money}
the ticket to {place} costs {money}|you owe {name} {money}|can you lend me {money}
the price fell from {money} to {money}|{name} sold {count} {plural} for {money}
we need {amount} of {thing}|add {amount} of {thing} and stir|please buy {amount} of {thing}
a bag of {thing} weighs {amount}|{place} is {length} away|we walked {length} in {duration}
the river is {length} wide and {length} deep|{name} is {height} tall|turn left after {length}
it is {temperature} in {place}|set the oven to {temperature}|heat it to {temperature} for {duration}
the limit is {speed}|the wind reached {speed} near {place}|slow down to {speed}
the flat has {area}|the forest covers {area}|wait for {duration}|the film lasts {span}
the file has {data}|it needs {power}|copy {data} in {duration}|boil the {thing} for {span}
there are {count} {plural} in {place}|{count} {plural} and {count} {plural}
the city has {count} people|i counted {count} {plural}|the answer is {number}|write down {number}
add {number} please|{percent} of the {plural} are new|the price went up by {percent}
only {percent} voted|{fraction} of the {plural} are gone|we ate {fraction} of it
my score is {percent}|{name} lives on the {ordinal} floor|this is the {ordinal} {ordered}
she came in {ordinal}|the {ordinal} {ordered} is for {name}|{money} is too much
read the {ordinal} {ordered} {at}|the code is {code}|call {code} and ask for {name}
room {code} is on the {ordinal} floor|take bus {code} to {place}|flight {code} to {place}
between {range} {plural} came|dear {name}, it costs {money}|hello {name}, we leave {at}
in {year} it had {count} {plural}|on {day} it was {temperature} in {place}
send {data} to room {code} before {time}|tickets cost {money} and sales begin {at} on {date}
the recipe needs {amount} of {thing}, {count} {plural} and {amount} of {thing}
we need {count} {plural}, {amount} of {thing} and {duration} of rest
the invoice of {date} is {money}|drive at {speed} for {duration}|bake it at {temperature} for {span}
{name} ran {length} in {duration} and won {money}|{name} spent {money} on {day} and {money} on {day}
flight {code} lands {at}, not {at}|{fraction} of {number} is {number}
{name} and {name} met in {year} and married in {year}|from {year} to {year} it grew by {percent}
we sold {count} {plural} in {year}, and {count} in {year}|{percent} in {year}, {percent} in {year}
it was {temperature} on {day} and {temperature} on {day}|{name} is {height} tall and weighs {amount}
the {ordinal} train leaves {at} and the {ordinal} {at}|my phone number is {code}
the {ordinal} edition from {year} sold for {money}|on {date} the price was {money}, not {money}
{name} has {count} {plural} and {count} {plural}|{count} {plural} cost {money} in {place}
at {speed} it takes {duration}|read pages {range} before {time} please
"""

RESERVED = frozenset(
    word
    for text in (
        *ONES, *TENS, *MONTHS, *WEEKDAYS, *PARTS, *FRACTIONS, *QUARTERS, *ORDINALS.values(),
        *(part for row in CURRENCIES for part in row[:2] + row[3:]),
        *(part for rows in UNITS.values() for row in rows for part in row[:2]),
        *(name for _, name in SCALES),
        "hundred point minus negative percent per cent oh past to at and o'clock noon midnight",
    )
    for word in text.split()
)  # fmt: skip
"""Words that belong to spoken numbers, which carrier words must not be."""
