"""The words that are printed on pages, all in lower case."""

MONTHS = tuple("jan feb mar apr may jun jul aug sep oct nov dec".split())
NAMES = tuple("adam anna ben clara david emma frank grace henry iris jack laura".split())
CITIES = tuple("berlin cairo dublin lima london madrid oslo paris prague rome tokyo vienna".split())
ANIMALS = tuple("bear bird cat dog duck fish fox goat horse mouse owl rabbit".split())
FOOD = tuple(
    "apple banana beans bread butter cake carrot cheese cherry coffee corn egg flour grape honey"
    " juice lemon milk onion pasta peach pear pepper plum potato rice salt soup sugar tea".split()
)
THINGS = tuple(
    "bag ball basket bed bell bench boat book bottle bowl box bridge brush bucket button camera"
    " candle card chair clock cloud coat cup desk door drum engine field flag flower forest garden"
    " gate glass glove hammer hat hill house island jacket key kitchen knife ladder lake lamp leaf"
    " letter map market mirror moon mountain needle ocean paint paper pencil phone piano pillow"
    " plate pocket radio ring river road rope sand scarf school ship shirt shoe shop silver snow"
    " spoon station stone street table ticket tower train tree truck wall watch wheel wind window"
    " winter wood wool".split()
)
LABELS = ("name", "city", "animal", "food", "room", "age")  # of a form's fields
TOTAL = "total"
LEXICON = (*NAMES, *CITIES, *ANIMALS, *FOOD, *THINGS)
SHORT = tuple(word for word in LEXICON if len(word) <= 5)
PRINTED = (*LEXICON, *MONTHS, *LABELS, TOTAL)  # all that can stand on a page, numbers apart
