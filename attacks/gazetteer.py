"""Public words that secrets are made of: names, streets, months and the like.

Each word is one piece of the usual English sub-word tokenizers, so that secrets can be searched in
pretrained encoders too, and has an entry of its own in the hashed vocabulary. Nothing here was read
from training data.
"""

DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
HOUSE_NUMBERS = tuple(str(number) for number in range(1, 100))
DAYS = tuple(str(day) for day in range(1, 32))
YEARS = tuple(str(year) for year in range(1930, 2010))

# Frequent in the United States.
FIRST_NAMES = tuple(
    """
    james mary robert patricia john jennifer michael linda david elizabeth william barbara richard
    susan joseph jessica thomas sarah charles karen daniel lisa matthew nancy anthony betty mark
    margaret donald sandra steven ashley paul kimberly andrew emily joshua donna kenneth michelle
    kevin carol brian amanda george melissa edward deborah ronald stephanie timothy rebecca jason
    sharon jeffrey laura ryan cynthia jacob kathleen gary amy nicholas angela eric shirley
    jonathan anna stephen brenda larry pamela justin emma scott nicole brandon helen benjamin
    samantha samuel katherine gregory christine frank debra alexander rachel raymond carolyn
    patrick janet
    """.split()
)

# Likewise.
SURNAMES = tuple(
    """
    smith johnson williams brown jones garcia miller davis rodriguez martinez hernandez lopez
    gonzalez wilson anderson thomas taylor moore jackson martin lee perez thompson white harris
    sanchez clark ramirez lewis robinson walker young allen king wright scott torres nguyen hill
    flores green adams nelson baker hall rivera campbell mitchell carter roberts gomez phillips
    evans turner diaz parker cruz edwards collins reyes stewart morris morales murphy cook rogers
    gutierrez ortiz morgan cooper peterson bailey reed kelly howard ramos kim cox ward richardson
    watson brooks chavez wood bennett gray mendoza ruiz hughes price alvarez castillo sanders
    patel myers long ross foster
    """.split()
)

# What streets are called after.
STREETS = tuple(
    """
    oak maple cedar pine elm washington lake hill park river spring church main high mill bridge
    garden forest valley meadow sunset highland lincoln jackson franklin madison jefferson adams
    station market king queen victoria castle cherry walnut willow rose orchard chapel
    """.split()
)

# What follows the name of a street.
STREET_KINDS = tuple(
    """
    street road avenue lane drive court
    """.split()
)

# Of the kind that people call their favourite.
COLOURS = tuple(
    """
    red blue green yellow orange purple pink brown black white grey gold silver
    """.split()
)

# Of the year.
MONTHS = tuple(
    """
    january february march april may june july august september october november december
    """.split()
)

# Where mail goes to.
MAIL_PROVIDERS = ("google", "yahoo", "outlook", "apple", "proton")
