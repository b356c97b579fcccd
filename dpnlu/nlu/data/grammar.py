"""The phrases of the synthetic corpus: requests to an assistant at home and at the bank.

Notation: `{a|b|}` is one of the alternatives, `<name>` a phrase of `PHRASES["name"]`, `[slot]` a
phrase of `PHRASES["slot"]` marked as that slot.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Carriers:
    """The ways to express an intent: those of most people, and those of few."""

    common: tuple[str, ...]
    rare: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """Requests without a clue as to which of the intents is meant: no model can always be right."""

    intents: tuple[str, ...]
    carriers: tuple[str, ...]


INTENTS = {
    "alarm_set": Carriers(
        common=(
            "{set|make|create} {an|another|a new} alarm for [time]{| [date]}",
            "{set|put} my alarm {to|for} [time]",
            "wake me {up|} {at|by|around} [time]{| [date]}",
            "i {need|have|want} to {get up|be up} {at|by|before} [time]{| [date]}",
            "alarm {at|for} [time]{| [date]}",
        ),
        rare=(
            "i will be in bed until [time] {and no longer|then ring}",
            "[date] my day starts at [time] so {ring|make noise} then",
            "do not let me sleep past [time]",
        ),
    ),
    "alarm_cancel": Carriers(
        common=(
            "{cancel|delete|remove} {the|my} alarm {for|at} [time]{| [date]}",
            "{turn|switch} off {the|my} [time] alarm{| [date]}",
            "{stop|drop|kill} the alarm {set for|that rings at} [time]",
            "i {don't|no longer} need {to get up|the alarm} at [time]{| [date]}",
            "no alarm [date] {after all|please|}",
        ),
        rare=(
            "let me sleep in [date]",
            "[date] i am off so no ringing at [time]",
            "forget about waking me at [time]",
        ),
    ),
    "reminder_set": Carriers(
        common=(
            "remind me to [task]{| [date]}{| at [time]}",
            "{set|create|add} a reminder to [task] {at [time]|[date]}",
            "{can|could} you remind me [date] {that i have|} to [task]",
            "i {must|have to|need to} [task] [date] so {remind me|make a note}",
            "make a note {[date]|} to [task]",
        ),
        rare=(
            "nag me until i [task]",
            "i always forget to [task] so tell me at [time]",
            "[task] is what i have to think of [date]",
        ),
    ),
    "light_set": Carriers(
        common=(
            "{turn|switch} {on|off} the {light|lights|lamp} in the [room]",
            "{turn|switch} the [room] {light|lights|lamp} {on|off}",
            "{dim|brighten} the {lights|lamp} in the [room]{| at [time]}",
            "make the [room] {brighter|darker|less bright}",
            "lights {on|off} in the [room]{| at [time]}",
            "it is too {dark|bright} in the [room]",
        ),
        rare=(
            "i can't see a thing in the [room]",
            "who left it glowing in the [room] at [time]",
            "give the [room] a cosy evening mood",
        ),
    ),
    "heating_set": Carriers(
        common=(
            "set the {heating|thermostat|temperature} {in the [room]|} to [degrees]",
            "{turn|switch} the {heating|heater} {on|off} in the [room]{| at [time]}",
            "{heat|warm|cool} the [room] {up|down|} to [degrees]{| by [time]}",
            "make {it|the [room]} {warmer|colder|[degrees]}{| by [time]}",
            "i want [degrees] in the [room]{| at [time]}",
            "it is too {cold|warm|hot} in the [room]",
        ),
        rare=(
            "my feet are ice in the [room]",
            "i am sweating {here|} in the [room] at [degrees]",
            "bring the [room] to [degrees] before i am home at [time]",
        ),
    ),
    "music_play": Carriers(
        common=(
            "play [track]{| by [artist]}{| in the [room]}",
            "{play|start|put on} {something|a song|some music} by [artist]{| in the [room]}",
            "{play|start} my [playlist] playlist",
            "i {want|would like} to {hear|listen to} [track]{| by [artist]}",
            "{can|could} you play [artist]{| at [time]}",
        ),
        rare=(
            "my ears long for [artist]",
            "surprise the [room] with [track]",
            "nothing beats [track] by [artist] so go ahead",
        ),
    ),
    "playlist_add": Carriers(
        common=(
            "add [track] {|by [artist] }to {my|the} [playlist] playlist",
            "put [track] {|by [artist] }{on|in} {my|the} [playlist] {playlist|list}",
            "{save|keep} {this song|[track]} {in|to} [playlist]",
            "{include|add} {something by |}[artist] {in|to} [playlist]",
            "my [playlist] playlist {needs|should have} [track]",
        ),
        rare=(
            "[playlist] is not complete without [artist]",
            "[track] belongs {in|on} [playlist]",
            "extend [playlist] by [track]",
        ),
    ),
    "weather_ask": Carriers(
        common=(
            "what {is the weather|will the weather be} like in [city]{| [date]}",
            "{will it|is it going to} {rain|snow|be sunny|be cold|be hot} in [city]{| [date]}",
            "how {warm|cold|hot|windy} {is it|does it get} in [city]{| [date]}",
            "{weather|forecast} {for|in} [city]{| [date]}",
            "do i need {an umbrella|a coat|boots} in [city]{| [date]}",
        ),
        rare=(
            "should i pack shorts for [city]",
            "is [city] under water again [date]",
            "what does the sky over [city] hold for us [date]",
        ),
    ),
    "table_book": Carriers(
        common=(
            "{book|reserve} a table {at [restaurant] |}for [party_size]{| [date]}{| at [time]}",
            "{make|get} {me|us} a reservation at [restaurant]{| for [party_size]}{| [date]}",
            "{we|i} want to eat at [restaurant] [date]{| at [time]}",
            "find {a table|dinner|lunch} for [party_size] in [city] [date]",
            "is there a table at [restaurant] {at [time]|[date]}",
        ),
        rare=(
            "[party_size] hungry people would like to be at [restaurant] at [time]",
            "{get|squeeze} us into [restaurant] [date]",
            "my parents are in [city] [date] so dinner for [party_size]",
        ),
    ),
    "money_transfer": Carriers(
        common=(
            "{transfer|send|pay} [amount] to [person]{| from my [account] account}",
            "{send|pay|give} [person] [amount]{| from [account]}{| [date]}",
            "move [amount] from {my |}[account] to {my |}[account]",
            "{i owe|i have to pay} [person] [amount] so {send|transfer} it {[date]|now}",
            "put [amount] {into|in} my [account] account",
        ),
        rare=(
            "settle my debt of [amount] with [person]",
            "[person] covered dinner so [amount] goes back",
            "top up [account] by [amount]",
        ),
    ),
    "balance_ask": Carriers(
        common=(
            "what is {the balance of|in} my [account] account",
            "how much {money |}{is|do i have} {left |}{in|on} {my |}[account]{| account}",
            "{show|tell} me {my|the} [account] {balance|account balance}",
            "do i have [amount] {left |}{in|on} my [account]{| account}",
            "{can|could} i {pay|afford} [amount] from my [account]{| account}",
        ),
        rare=(
            "am i broke or is there [amount] left",
            "did [person] send me [amount] [date]",
            "is [account] in the red",
        ),
    ),
    "message_send": Carriers(
        common=(
            "{tell|text} [person] {that |}[message]",
            "send {a message|a text} to [person] {saying |that |}[message]",
            "{write|message} [person] {that |}[message]",
            "let [person] know {that |}[message]",
            "send [person] {a message|a text}{| at [time]}",
        ),
        rare=(
            "[person] should hear that [message]",
            "pass on to [person] that [message]",
            "drop [person] a line",
        ),
    ),
}

AMBIGUITIES = (
    Ambiguity(
        ("alarm_set", "reminder_set"),
        ("[time]{| [date]} don't forget", "i have to [task] at [time]"),
    ),
    Ambiguity(
        ("alarm_cancel", "table_book"),
        ("forget {it|that} [date]", "not at [time] but at [time]"),
    ),
    Ambiguity(
        ("light_set", "heating_set"),
        ("turn it {up|down|off} in the [room]", "the [room] at [time]"),
    ),
    Ambiguity(
        ("music_play", "playlist_add"),
        ("put [track] on", "[track] by [artist]", "more of [artist]"),
    ),
    Ambiguity(
        ("weather_ask", "table_book"), ("what about [city] [date]", "we are in [city] [date]")
    ),
    Ambiguity(
        ("money_transfer", "message_send"),
        ("send it to [person] [date]", "send [person] the usual"),
    ),
    Ambiguity(
        ("balance_ask", "money_transfer"),
        ("[amount] {on|in} my [account]", "my [account] and [amount]"),
    ),
)

OPENINGS = (
    "hey",
    "okay",
    "hello",
    "please",
    "um",
    "so",
    "{can|could} you please",
    "i would like you to",
)
CLOSINGS = ("please", "thanks", "thank you", "right now", "if you can", "okay", "for me")

SLOTS = (
    "account",
    "amount",
    "artist",
    "city",
    "date",
    "degrees",
    "message",
    "party_size",
    "person",
    "playlist",
    "restaurant",
    "room",
    "task",
    "time",
    "track",
)

PHRASES = {
    "account": (
        "{savings|checking|current|joint|business|credit|student|holiday|pension|house}",
        "{blue|gold|old|new|second|family} {card|deposit}",
        "{<place>|<surname>} {savings|pension|student}",
    ),
    "amount": (
        "<from2to9> {hundred|thousand} {dollars|euros|pounds}",
        "{<from2to9>|}{<digit>}{0|5} {dollars|euros|pounds|bucks}",
        "{<from2to9>|}{<from2to9>}.{<digit>}{0|5|9} {dollars|euros|pounds}",
        "{twenty|thirty|forty|fifty} {one|two|three|five|seven|} {dollars|euros|pounds}",
        "{a hundred|half a thousand|a few} {dollars|euros|pounds}",
    ),
    "artist": (
        "<person>",
        "the {<adjective>|<color>} <noun>s",
        "{<noun>|<adjective>} and the <noun>s",
        "{dj|mc|lady|saint|king} <surname>",
    ),
    "city": (
        "<place>{ton|ville|burg|ford|bridge|field|haven|mouth}",
        "{new|old|port|fort|west|east|saint} <place>",
        "{london|paris|berlin|madrid|oslo|dublin|vienna|lisbon|boston|denver}",
    ),
    "color": ("{red|blue|green|black|white|golden|silver|grey|pink|violet}",),
    "adjective": (
        "{cold|warm|bright|dark|quiet|late|early|happy|lonely|broken|electric|hidden|lucky}",
        "{slow|wild|gentle|hungry|rainy|sunny|frozen|burning|silent|endless|crooked|sleepy}",
    ),
    "noun": (
        "{light|alarm|kitchen|morning|weather|river|table|garden|message|dollar|mirror|engine}",
        "{song|summer|winter|window|lamp|road|storm|letter|tiger|balance|heart|stone|shadow|dream}",
    ),
    "verb": ("{wake|call|remind|find|follow|forget|warm|leave|pay|send|hold|play|book|turn|show}",),
    "digit": ("{0|1|2|3|4|5|6|7|8|9}",),
    "from2to9": ("{2|3|4|5|6|7|8|9}",),
    "date": (
        "{today|tonight|tomorrow|this evening|this weekend}",
        "{on|next|this} <weekday>{| morning| afternoon| evening}",
        "{on |}<month> {<from2to9>|1<digit>|2<digit>}",
        "{on |}the {first|second|third|fourth|fifth|tenth|twelfth|twentieth} of <month>",
        "in {two|three|four|five|six} {days|weeks}",
    ),
    "weekday": ("{monday|tuesday|wednesday|thursday|friday|saturday|sunday}",),
    "month": (
        "{january|february|march|april|may|june|july}",
        "{august|september|october|november|december}",
    ),
    "degrees": (
        "{1<digit>|2<digit>} degrees{| celsius}",
        "{sixty|seventy} {one|two|three|four|five|six|eight|} degrees{| fahrenheit}",
        "{fifteen|eighteen|nineteen|twenty|twenty one|twenty two}{| degrees}",
    ),
    "given": (
        "{anna|ben|clara|david|emma|felix|grace|henry|iris|jack|kate|leo|maria|noah|olga|paul}",
        "{quinn|rosa|sam|tina|uma|victor|wendy|xavier|yara|zoe|amir|bianca|carlos|dara|elif|farid}",
        "{gita|hugo|ines|jonas|kofi|lena|mateo|nadia|oscar|priya|rafael|sofia|tariq|ursula|viola}",
    ),
    "surname": (
        "{b|br|c|d|f|g|gr|h|k|l|m|n|p|r|s|st|t|v|w}{a|e|i|o|u}{l|ll|n|r|rt|ss|ck|m|v|nd}"
        "{son|man|berg|ley|well|er|ski|ton|ov|es}",
    ),
    "place": (
        "{al|bel|cor|dun|el|fal|glen|har|is|kel|lin|mar|nor|os|pem|ros|sel|tor|wel|yar}"
        "{a|e|o|der|by|sen|ling|wick|mer|rin}",
    ),
    "message": (
        "i {am|will be} {late|early|home|there|hungry|ready} {<date>|at <time>|soon|}",
        "{the|my} {train|plane|bus|car|meeting|doctor} is {late|early|broken|waiting|here} <date>",
        "{dinner|lunch|the <adjective> <noun>} is {ready|cold|gone|yours|on the table}",
        "i {booked a table|paid the rent|transferred the money|turned off the heating} <date>",
        "{we|they|i} {need|forgot|found|love} {the|your|my} {<adjective>|<color>} <noun>",
    ),
    "party_size": (
        "{two|three|four|five|six|seven|eight|nine|ten|twelve}{| people| of us| guests}",
        "{<from2to9>|1<digit>}{| people| persons}",
        "{my family|me and <given>|<given> and me}",
    ),
    "person": (
        "<given>",
        "<given> <surname>",
        "{mister|doctor|aunt|uncle|my boss} {<given>|<surname>}",
    ),
    "playlist": (
        "{<adjective>|<color>} {<weekday>|<noun>}{| mix| hits}",
        "<given>'s {<noun>|<adjective>} {songs|mix|hits}",
        "{running|cooking|study|party|sleep|road trip|rainy day} {<noun>|music|songs}",
    ),
    "restaurant": (
        "the {<color>|<adjective>} {<noun>|tiger|spoon|lion|anchor|oven}",
        "{chez|casa|little|mama} {<given>|<place>}",
        "<surname>'s{| kitchen| grill| diner| garden}",
    ),
    "room": (
        "{kitchen|bathroom|bedroom|living room|hall|garage|attic|cellar|office|nursery|garden}",
        "{<given>'s|guest|upper|lower|small|back} {room|bedroom|bathroom|office}",
    ),
    "task": (
        "{call|text|pay|visit|thank} <person>",
        "{buy|get|order} {milk|bread|eggs|stamps|flowers|<from2to9> <noun>s|a <color> <noun>}",
        "{turn off|fix|clean|check} the {lights|heating|alarm|account|<color> <noun>}",
        "{book|cancel} {the table|the flight|dinner|the <adjective> <noun>} for <person>",
        "{water the plants|walk the dog|feed the cat|send the letter to <given>|do the taxes}",
    ),
    "time": (
        "{<from2to9>|1{0|1|2}}{| thirty| fifteen| forty five} {am|pm}",
        "{<from2to9>|1{0|1|2}}:{0|1|2|3|4|5}{0|5}{| am| pm}",
        "{half past|quarter to|quarter past} {one|two|three|four|five|six|seven|eight|nine|ten}",
        "{five|six|seven|eight|nine|ten|eleven} {o'clock|in the morning|in the evening|sharp}",
        "{noon|midnight}",
    ),
    "track": (
        "{the |}{<adjective>|<color>} <noun>",
        "<verb> {me|you|us} {in|by|to|under} the <noun>",
        "my <noun> is {<adjective>|<color>}",
        "{<noun>|<verb>} {of|and|without} {<noun>|<given>|<place>}",
        "{dancing|waiting|crying|waking up} {in <place>|with <given>|at <time>}",
    ),
}
