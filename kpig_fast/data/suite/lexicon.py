"""The closed word lists of the bundled suite: every context is drawn from them, so every answer can be computed."""

CLASSES = {
    "animal": "horse tiger rabbit eagle shark goat spider camel mouse whale sheep frog owl fox bear duck wolf lion",
    "food": "bread cheese soup rice apple cake honey pasta lemon carrot butter onion grape peach salad bean pie plum",
    "tool": "hammer saw drill shovel wrench rope ladder needle brush axe rake broom chisel hook lever spade pump wheel",
    "garment": "hat coat shirt scarf glove sock boot skirt belt dress jacket tie sweater cap robe vest apron sandal",
    "colour": "red blue green yellow black white pink brown purple grey violet scarlet beige ivory amber teal",
}
WORDS = {kind: tuple(words.split()) for kind, words in CLASSES.items()}
KIND_OF = {word: kind for kind, words in WORDS.items() for word in words}

_OTHERS = {
    # No two names share their first letter, so that alphabetical order is decided by it.
    "name": "Anna Boris Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Quinn Rosa "
    "Simon Tina Uma Victor Wendy Yara",
    "city": "Paris Oslo Rome Cairo Lima Delhi Tokyo Berlin Madrid Athens Dublin Quito Seoul Vienna Prague",
    "praise": "lovely great wonderful excellent pleasant perfect superb delightful",
    "blame": "awful terrible horrible poor nasty dreadful boring disgusting",
}
NAMES, CITIES, PRAISE, BLAME = (tuple(words.split()) for words in _OTHERS.values())

# Two digits each, so that their order as numbers is their order as text.
NUMBERS = tuple(str(number) for number in range(10, 40))
DIGITS = tuple("0123")
NUMBER_WORDS = ("zero", "one", "two", "three")
