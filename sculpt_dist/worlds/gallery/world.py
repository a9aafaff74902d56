"""The gallery: 212 objects in 18 superclasses, each drawn by six design teams; a team's hand is a style.

The pictures are emoji. Here every name is one word, so that it is one token; `EMOJI` tells which emoji is meant where
the word is not its name.
"""

from __future__ import annotations

from sculpt_dist.worlds.base import ClassifierPlan, World

_OBJECTS = """
mammal: dog cat horse cow pig rabbit bear panda lion tiger monkey elephant fox mouse koala camel
bird: chicken rooster penguin eagle duck owl turkey dove chick hatchling
sealife: fish angelfish pufferfish shark octopus dolphin whale crab shrimp squid shell
reptile: crocodile turtle snake lizard frog dragon
insect: butterfly caterpillar bee ladybug ant spider scorpion snail
fruit: grapes watermelon tangerine lemon banana pineapple apple peach cherries strawberry kiwi pear tomato
vegetable: avocado eggplant potato carrot corn chili cucumber mushroom chestnut peanuts yam salad
dish: croissant baguette pancakes cheese burger fries pizza hotdog taco burrito egg popcorn sushi spaghetti drumstick
sweet: gelato donut cookie cake shortcake chocolate candy lollipop custard honey sorbet dango
drink: coffee wine cocktail punch beer milk sake whiskey champagne bottle
vehicle: car taxi bus ambulance firetruck van truck tractor bicycle motorcycle scooter moped locomotive racecar
craft: airplane helicopter rocket sailboat speedboat ship ferry canoe satellite jet liner
building: house office hospital hotel school factory castle church mosque stadium tent pagoda temple
plant: fir tree palm cactus sunflower rose tulip hibiscus sakura clover maple seedling bouquet
ball: soccer basketball baseball volleyball football rugby tennis billiard bowling balloon globe
instrument: guitar violin saxophone trumpet drum piano microphone bell horn
garment: shirt jeans dress kimono bikini tie crown tophat mortarboard heel sneaker glasses purse backpack
tool: hammer pick wrench scissors key umbrella telescope microscope bulb candle flashlight camera alarm pencil
"""
_EMOJI = """
alarm=alarm-clock angelfish=tropical-fish apple=red-apple baguette=baguette-bread bee=honeybee beer=beer-mug
billiard=pool-8-ball bottle=baby-bottle bulb=light-bulb burger=hamburger cake=birthday-cake camel=two-hump-camel
car=automobile caterpillar=bug champagne=bottle-with-popping-cork cheese=cheese-wedge
chick=front-facing-baby-chick chili=hot-pepper chocolate=chocolate-bar clover=four-leaf-clover
cocktail=cocktail-glass coffee=hot-beverage corn=ear-of-corn donut=doughnut drumstick=poultry-leg
fir=evergreen-tree firetruck=fire-engine football=american-football fries=french-fries gelato=ice-cream
globe=globe-showing-americas hatchling=hatching-chick heel=high-heeled-shoe honey=honey-pot horn=postal-horn
hotdog=hot-dog jet=small-airplane kiwi=kiwi-fruit ladybug=lady-beetle liner=passenger-ship maple=maple-leaf
milk=glass-of-milk moped=motor-scooter mortarboard=graduation-cap office=office-building pagoda=japanese-castle
palm=palm-tree piano=musical-keyboard pufferfish=blowfish punch=tropical-drink racecar=racing-car
rugby=rugby-football sakura=cherry-blossom salad=green-salad scooter=kick-scooter shell=spiral-shell
shirt=t-shirt sneaker=running-shoe soccer=soccer-ball sorbet=soft-ice-cream temple=classical-building
tie=necktie tophat=top-hat tree=deciduous-tree truck=delivery-truck van=minibus whale=spouting-whale
whiskey=tumbler-glass wine=wine-glass yam=roasted-sweet-potato
"""
EMOJI: dict[str, str] = dict(pair.split("=") for pair in _EMOJI.split())

WORLD = World(
    superclasses={
        superclass: tuple(members.split())
        for superclass, _, members in (line.partition(": ") for line in _OBJECTS.strip().splitlines())
    },
    styles=("noto", "blob", "twemoji", "fluent", "flat", "emojione"),
    image_size=64,
    nouns=("picture", "drawing"),
    classifiers={
        "classifier": ClassifierPlan(
            channels=(32, 64, 128, 192, 256), strides=(2, 1, 2, 2, 2), steps=1200, batch=64, rate=2e-3
        ),
        # Another net and another seed, for reports alone: nothing is to be tuned, calibrated or chosen by it.
        "witness": ClassifierPlan(
            channels=(48, 96, 192, 256), strides=(2, 2, 2, 2), layers="separable", steps=1200, batch=64, rate=2e-3
        ),
    },
    per_pair=8,
    size="large",
    needs_sets=True,
)
