"""Two hundred and fifty-six short English words, of which made-up secrets are put together. One byte draws one word."""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    acid acorn actor amber angel ankle apple apron arch arrow atlas aunt axle badge baker bamboo banjo barn basin basket
    beach beacon bean bear beetle bell bench berry bike bird blade blanket boat bone bonnet book boot bottle bowl branch
    brass bread brick bridge broom brush bucket bull button cabin cable cactus cake camel camp candle canoe canyon
    captain card carpet carrot castle cave cedar chain chair chalk cheese cherry chess chest chief chin church circle
    clay cliff clock cloud clover coach coal coast coat coffee coin comet copper coral corn cotton couch cousin crab
    cradle crane creek crow crown curtain dagger daisy dancer deer desert desk diamond dinner doctor dog dolphin donkey
    door dragon drum duck dust eagle ear earth egg elbow engine fabric falcon farmer feather fence field finger fire
    fish flag flame flute fog forest fork fossil fox frog fruit garden garlic gate ghost giant ginger glass globe glove
    goat gold goose grape grass gravel guitar hammer harbor harp hat hawk hazel helmet hill honey hook horn horse hotel
    house ice ink iron island ivory jacket jar jelly jewel judge jungle kettle key king kite kitten knee knife knot
    ladder lake lamp lantern leaf leather lemon lens lily lime lion lizard lobster lock lotus magnet maple marble market
    mask meadow melon metal mint mirror monkey moon moss mountain mouse museum nail needle nest nickel nose nurse oak
    oasis ocean olive onion orange orchid otter oven owl paint palace palm panda paper parrot peach pear pearl pebble
    pencil pepper piano pigeon pillow pine pirate
    """.split()
)
