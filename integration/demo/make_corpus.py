#!/usr/bin/env python3
"""Generates the training text of the demo model: simple little English stories.

Everything below is our own: word lists, a small template language, about twenty plots and a
few tables of simple facts. Plain standard library, seeded and deterministic: document number
`i` of seed `s` is always the same text.

    python3 make_corpus.py --docs 5                # read a few documents
    python3 make_corpus.py --docs 100000 --out corpus.txt

The template language:
    [a|b|c]     one of the alternatives (nested freely; an alternative may be empty)
    {x} {x.y}   a word of the story: a thing, a place, or a person and one of its forms
    {^x}        the same with a capital letter
    @ word      "a word" or "an word", whichever is right
Sentence starts are capitalised afterwards.
"""
import argparse
import random
import re

BOS, EOS, USER, ASSISTANT, END = "<|bos|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"

# ------------------------------------------------------------------ words

GIRLS = """Lily Anna Mia Emma Rose Daisy Lucy Ella Ruby Clara Nora Ivy Molly Sophie Hannah Grace Alice
Maya Zoe Amy Eva Lina Tilly Poppy Hazel Violet Olive June May Iris Flora Greta Heidi Ingrid Jana Kira Lola
Mina Nell Pia Rita Sara Tess Una Vera Wilma Yara Zara Bella Cora Dora Edith Fay Gina Holly Isla Jenny Katie
Laura Maria Nina Olga Paula Rachel Susie Tina Wendy Penny Betty Carla Dina Elsa Freya Gwen Helen Ida Julia
Kate Leah Martha Nadia Pearl Rosa Stella Thea Ursula Willa Amina Leila Priya Mei Yuki Sana Noor Aisha Marta""".split()
BOYS = """Tom Ben Sam Max Leo Jack Tim Finn Noah Oscar Peter Paul Hugo Felix Oliver Henry Theo Luke Adam
Alex Billy Charlie Daniel David Eddie Eric Fred George Harry Ian Jacob James Jonas Kai Karl Lars Liam Mark
Martin Matt Nick Nils Otto Owen Philip Ralph Robin Rory Simon Stefan Ted Toby Victor Walter Will Zack Andy
Arthur Bruno Carl Dan Emil Frank Gus Hans Ivan Jamie Joe John Kevin Kurt Leon Miles Ned Oleg Pablo Quinn Rafi
Sven Tariq Umar Vince Wes Yusuf Ali Amir Diego Hiro Jin Kofi Omar Ravi Samir Taro Dev Anton Felipe Marco Luca""".split()
PETS = """Pip Dot Bramble Button Pepper Biscuit Clover Fern Fluff Ginger Honey Jasper Juniper Maple Mossy
Nutmeg Patch Pebble Pickle Rusty Sandy Scout Shadow Snowy Spot Sunny Tango Teddy Toffee Twig Waffle Willow
Ziggy Acorn Barley Basil Bean Berry Bingo Blossom Bobo Breezy Bubbles Cocoa Coco Crumb Dandy Dusty Echo Ember
Fidget Fizz Flip Frosty Gigi Gizmo Hopper Jolly Kiki Lulu Mango Marble Milo Mimi Minty Momo Muffin Nibbles
Noodle Olly Oreo Peanut Piper Pogo Pom Puddle Quill Ripple Rollo Sage Skipper Smoky Socks Sparky Sprout Squeak
Stripe Sugar Tiki Tinker Tiptoe Truffle Tuffy Velvet Wiggles Wink Wobble Zippy Zuzu Apple Bluebell Cricket Dash""".split()

MOTION = {  # base: (past, -ing)
    "walk": ("walked", "walking"), "run": ("ran", "running"), "hop": ("hopped", "hopping"),
    "fly": ("flew", "flying"), "swim": ("swam", "swimming"), "trot": ("trotted", "trotting"),
    "crawl": ("crawled", "crawling"), "waddle": ("waddled", "waddling"), "creep": ("crept", "creeping"),
    "skip": ("skipped", "skipping"), "march": ("marched", "marching"), "hurry": ("hurried", "hurrying"),
    "scamper": ("scampered", "scampering"), "slither": ("slithered", "slithering"),
    "roll": ("rolled", "rolling"), "float": ("floated", "floating"), "glide": ("glided", "gliding"),
    "climb": ("climbed", "climbing"), "gallop": ("galloped", "galloping"), "wander": ("wandered", "wandering"),
    "stomp": ("stomped", "stomping"), "dart": ("darted", "darting"), "flutter": ("fluttered", "fluttering"),
}
ONE_HAND = {"paws": "paw", "wings": "wing", "hands": "hand", "hooves": "hoof", "fins": "fin", "claws": "claw",
            "flippers": "flipper", "legs": "leg", "arms": "arm", "feet": "foot"}

# kind | realm (l land, s sea) | ways to move | home | foods | looks | hands | young | says | size (s, m, b)
ANIMALS = """
fox|l|trot,run,creep|a cozy den under a hill|berries,eggs|bushy tail,red fur|paws|cub|yip|m
rabbit|l|hop,run|a warm burrow under a hedge|carrots,clover|long ears,fluffy tail|paws|bunny||s
bear|l|walk,stomp,run|a dry cave|honey,berries|thick fur,big paws|paws|cub|growl|b
mouse|l|scamper,run,creep|a tiny hole in the wall|cheese,crumbs|long tail,round ears|paws|pup|squeak|s
owl|l|fly,glide|a hollow tree|seeds,nuts|big round eyes,soft wings|wings|owlet|hoot|m
cat|l|walk,creep,run|a basket by the stove|fish,milk|long whiskers,green eyes|paws|kitten|meow|m
dog|l|run,trot|a wooden kennel|bones,biscuits|wagging tail,floppy ears|paws|puppy|woof|m
squirrel|l|scamper,climb,run|a nest in an oak tree|nuts,acorns|bushy tail,tiny paws|paws|kit||s
hedgehog|l|crawl,trot|a pile of dry leaves|apples,berries|brown spikes,tiny nose|paws|||s
frog|l|hop|a pond full of lilies|flies,gnats|green skin,long legs|legs|tadpole|ribbit|s
duck|l|waddle,fly|a nest among the reeds|bread,corn|yellow beak,orange feet|wings|duckling|quack|m
goose|l|waddle,fly|a pen by the pond|corn,grass|long neck,white feathers|wings|gosling|honk|m
hen|l|run,flutter|a small red barn|corn,seeds|brown feathers,little beak|wings|chick|cluck|m
pig|l|trot,run|a muddy pen|turnips,apples|curly tail,pink nose|feet|piglet|oink|m
cow|l|walk,trot|a big barn|grass,hay|soft brown eyes,long tail|hooves|calf|moo|b
horse|l|gallop,trot|a stable|oats,hay|long mane,strong legs|hooves|foal|neigh|b
pony|l|trot,gallop|a small stable|oats,apples|soft mane,white nose|hooves|foal|neigh|m
donkey|l|trot,walk|an old stable|hay,carrots|long ears,gray coat|hooves|foal|hee-haw|m
sheep|l|walk,trot|a wooden fold|grass,clover|white wool,soft ears|hooves|lamb|baa|m
goat|l|climb,trot|a small hutside|leaves,grass|little horns,white beard|hooves|kid|bleat|m
deer|l|run,walk|a quiet clearing|leaves,grass|long legs,white spots|hooves|fawn||m
wolf|l|run,trot|a rocky den|meat,berries|gray fur,sharp ears|paws|cub|howl|m
lion|l|walk,run|a warm cave|meat,stew|golden mane,big paws|paws|cub|roar|b
tiger|l|creep,run|a shady cave|meat,fish|black stripes,orange fur|paws|cub|roar|b
elephant|l|walk,stomp|a shady grove|leaves,bananas|long trunk,big ears|feet|calf|trumpet|b
monkey|l|climb,run|a tall tree|bananas,nuts|long tail,quick hands|hands|||m
giraffe|l|walk,gallop|a grove of tall trees|leaves,fruit|long neck,brown spots|hooves|calf||b
zebra|l|gallop,trot|a grove of green trees|grass,leaves|black and white stripes,short mane|hooves|foal||b
hippo|l|walk,stomp|a muddy river|grass,melons|big mouth,round belly|feet|calf||b
rhino|l|stomp,walk|a shady grove|grass,leaves|big horn,thick skin|feet|calf||b
kangaroo|l|hop|a shady grove|grass,leaves|long tail,deep pocket|paws|joey||m
koala|l|climb,crawl|a tall gum tree|leaves,buds|round ears,gray fur|paws|joey||s
panda|l|walk,roll|a bamboo forest|bamboo,berries|black ears,round belly|paws|cub||b
penguin|l|waddle,run|a house of ice|fish,shrimp|black coat,little flippers|flippers|chick||m
turtle|l|crawl,walk|a hollow under a mossy bank|lettuce,berries|hard shell,short legs|legs|||s
snail|l|crawl,creep|a crack in an old wall|leaves,lettuce|curly shell,soft horns|horns|||s
snake|l|slither|a warm pile of stones|eggs,berries|long body,shiny skin|tail||hiss|m
lizard|l|run,crawl|a crack in a warm wall|flies,ants|long tail,green skin|claws|||s
crocodile|l|crawl,creep|a cave by the water|fish,meat|long tail,sharp teeth|claws|||b
bee|l|fly|a busy hive|honey,nectar|yellow stripes,tiny wings|wings||buzz|s
butterfly|l|flutter,fly|a garden full of flowers|nectar,dew|bright wings,thin legs|wings|caterpillar||s
ladybug|l|crawl,fly|a green bush|dew,nectar|black spots,red wings|wings|||s
ant|l|march,run|a sandy hill|crumbs,seeds|six legs,tiny feet|legs|||s
spider|l|crawl,climb|a corner with a silver web|flies,gnats|eight legs,thin web|legs|||s
beetle|l|crawl,march|a hollow log|leaves,crumbs|shiny back,short legs|legs|||s
caterpillar|l|crawl|a row of cabbages|leaves,cabbage|soft green back,many feet|feet|||s
sparrow|l|fly,hop|a nest under the roof|crumbs,seeds|brown wings,little beak|wings|chick|chirp|s
robin|l|fly,hop|a nest in the hedge|crumbs,worms|red breast,little beak|wings|chick|chirp|s
crow|l|fly,hop|a nest in a tall pine|corn,nuts|black feathers,strong beak|wings|chick|caw|m
parrot|l|fly,climb|a hollow palm tree|nuts,fruit|bright feathers,curved beak|wings|chick|squawk|m
swan|l|glide,fly|a quiet lake|grass,bread|long neck,white wings|wings|cygnet||m
eagle|l|fly,glide|a nest on a cliff|fish,meat|wide wings,sharp eyes|wings|eaglet||b
peacock|l|walk,fly|a palace garden|seeds,fruit|shining tail,blue neck|wings|chick||m
bat|l|fly,flutter|a dark attic|moths,fruit|thin wings,big ears|wings|pup|squeak|s
mole|l|crawl,creep|a long tunnel|worms,roots|velvet coat,strong paws|paws|pup||s
badger|l|trot,walk|a neat burrow|roots,berries|striped face,strong claws|paws|cub||m
otter|l|run,waddle|a hole in the river bank|fish,shrimp|smooth coat,strong tail|paws|pup||m
beaver|l|waddle,walk|a house of sticks|bark,roots|flat tail,strong teeth|paws|kit||m
raccoon|l|climb,creep|a hollow stump|corn,eggs|striped tail,black mask|paws|kit||m
camel|l|walk,trot|a big tent|dates,grass|tall hump,long legs|feet|calf||b
llama|l|trot,walk|a stone barn|grass,hay|woolly neck,soft ears|hooves|||m
hamster|l|run,scamper|a cage with a wheel|seeds,carrots|round cheeks,tiny feet|paws|pup|squeak|s
whale|s|swim,glide|the deep blue water|shrimp,seaweed|wide tail,big heart|fins|calf||b
dolphin|s|swim,glide|the clear blue water|fish,shrimp|smooth back,long nose|fins|calf||m
fish|s|swim,dart|a house of coral|seaweed,crumbs|shiny scales,little fins|fins|||s
crab|s|crawl,creep|a rock pool|shrimp,seaweed|red claws,hard shell|claws|||s
octopus|s|swim,float|a dark cave|crabs,shrimp|eight arms,round head|arms|||m
seal|s|swim,dart|a cave on a rocky island|fish,shrimp|shiny coat,long whiskers|flippers|pup|bark|m
seahorse|s|float,glide|a bed of seaweed|shrimp,seaweed|curly tail,tiny fins|fins|||s
starfish|s|crawl,float|a little rock pool|seaweed,shrimp|five arms,rough skin|arms|||s
shark|s|swim,glide|an old sunken ship|fish,seaweed|sharp teeth,strong tail|fins|pup||b
jellyfish|s|float,glide|the warm blue water|shrimp,seaweed|long soft arms,clear body|arms|||s
"""
# beings of fairy tales, and grown-ups: kind | gender (m, f, a any) | moves | home | foods | looks | hands | size
BEINGS = """
dragon|a|fly,stomp|a deep cave|toast,soup|green scales,long tail|claws|b
robot|a|roll,march|a workshop full of tools|oil,batteries|round lights,metal arms|hands|m
snowman|m|roll,glide|a white garden|ice cream,snowflakes|carrot nose,black hat|arms|m
fairy|f|fly,flutter|a house made of petals|honey,dew|silver wings,tiny shoes|hands|s
giant|a|stomp,walk|a castle on a cliff|bread,soup|long beard,huge boots|hands|b
wizard|m|walk,hurry|a crooked tower|soup,cake|long white beard,pointed hat|hands|m
witch|f|fly,hurry|a crooked cottage|soup,cookies|pointed hat,black cloak|hands|m
unicorn|a|gallop,trot|a secret cave|clover,apples|silver horn,white mane|hooves|m
mermaid|f|swim,glide|a palace of shells|seaweed,shrimp|silver tail,long hair|hands|m
ghost|a|float,glide|an old empty house|cake,cookies|white sheet,soft voice|hands|m
elf|a|run,skip|a house inside a tree|berries,cookies|pointed ears,green cap|hands|s
gnome|m|walk,march|a red mushroom house|berries,soup|red cap,white beard|hands|s
troll|a|stomp,walk|a cave under a bridge|stew,soup|big nose,messy hair|hands|b
monster|a|stomp,roll|a dark closet|cookies,socks|purple fur,three eyes|hands|m
knight|a|march,ride|a stone castle|bread,stew|shining helmet,silver shield|hands|m
king|m|walk,march|a golden palace|cake,pie|golden crown,red cloak|hands|m
queen|f|walk,march|a golden palace|cake,pie|golden crown,blue cloak|hands|m
prince|m|walk,run|a white castle|cake,pie|silver crown,red cloak|hands|m
princess|f|walk,run|a white castle|cake,pie|silver crown,yellow dress|hands|m
pirate|a|march,run|a wooden ship|fish,soup|black hat,loud voice|hands|m
farmer|a|walk,hurry|a small farm|bread,soup|straw hat,muddy boots|hands|m
baker|a|walk,hurry|a house behind the bakery|bread,cake|white apron,warm smile|hands|m
fisherman|m|walk,hurry|a little hut|fish,soup|gray beard,big net|hands|m
shepherd|a|walk,hurry|a small hut|bread,cheese|long stick,warm coat|hands|m
painter|a|walk,hurry|a room full of pictures|bread,soup|colorful coat,long brush|hands|m
tailor|a|walk,hurry|a little shop|bread,cheese|sharp scissors,thin fingers|hands|m
gardener|a|walk,hurry|a house with a green gate|apples,soup|green gloves,straw hat|hands|m
teddy bear|a|walk,roll|a box in the bedroom|cookies,honey|soft fur,button eyes|paws|s
toy soldier|m|march,walk|a wooden toy box|cookies,crumbs|tin hat,red coat|hands|s
doll|f|walk,skip|a little doll house|cookies,cake|yellow hair,blue dress|hands|s
puppet|a|walk,skip|an old wooden chest|cookies,cake|wooden legs,painted smile|hands|s
"""
MOTION["ride"] = ("rode", "riding")
ONE_HAND.update(horns="horn", tail="tail")
PLURAL = {"mouse": "mice", "wolf": "wolves", "sheep": "sheep", "deer": "deer", "fish": "fish", "goose": "geese",
          "fox": "foxes", "butterfly": "butterflies", "fairy": "fairies", "elf": "elves", "witch": "witches",
          "hippo": "hippos", "pony": "ponies", "monkey": "monkeys", "donkey": "donkeys", "fisherman": "fishermen",
          "octopus": "octopuses", "ostrich": "ostriches", "starfish": "starfish", "jellyfish": "jellyfish",
          "finch": "finches", "snowman": "snowmen", "boy": "boys", "princess": "princesses", "berry": "berries"}


def plural(w):
    return PLURAL.get(w, w + "s")


class Kind:
    def __init__(self, line, being):
        p = line.split("|")
        if being:
            self.name, g, mv, self.home, fd, fe, self.hands, self.size = p
            self.realm = "s" if self.name == "mermaid" else "l"
            self.gender = {"m": ["he"], "f": ["she"], "a": ["he", "she"]}[g]
            self.young = self.says = ""
        else:
            self.name, self.realm, mv, self.home, fd, fe, self.hands, self.young, self.says, self.size = p
            self.gender = ["he", "she", "he", "she", "he", "she", "it"]
            if self.name in ("cow", "hen"):
                self.gender = ["she"]
            if self.name in ("peacock",):
                self.gender = ["he"]
        self.moves, self.foods, self.feats = mv.split(","), fd.split(","), fe.split(",")
        self.being = being
        self.grown = self.name in GROWN


GROWN = set("wizard witch knight king queen pirate farmer baker fisherman shepherd painter tailor gardener giant".split())
NO_MOTHER = GROWN | set("robot snowman ghost puppet doll".split()) | {"teddy bear", "toy soldier"}
KINDS = [Kind(l, False) for l in ANIMALS.strip().split("\n")] + [Kind(l, True) for l in BEINGS.strip().split("\n")]
BY_NAME = {k.name: k for k in KINDS}
LAND = [k for k in KINDS if k.realm == "l"]
SEA = [k for k in KINDS if k.realm == "s"]
CHILD = {g: type("Child", (), dict(name=n, realm="l", moves=["walk", "run", "skip", "hurry"], foods=["apples", "cookies", "soup", "pancakes", "cherries"],
         feats=["brown hair", "curly hair", "bright eyes", "freckles on the nose", "a warm smile"], hands="hands", young="", says="", size="m",
         gender=[g], being=False, grown=False, home="")) for g, n in (("he", "boy"), ("she", "girl"))}

COLORS = "red blue green yellow orange purple pink white black brown golden silver gray".split()
SMALL_THINGS = """ball|kite|hat|scarf|ring|key|book|drum|whistle|button|shell|doll|spoon|lantern|bell|marble|boat|train|ribbon|mitten
blanket|cup|flute|feather|stone|umbrella|basket|coin|necklace|top|paintbrush|cap|glove|boot|bucket|balloon|pencil|flag|lamp|bowl
bracelet|trumpet|puzzle|wagon|hoop|mirror|pillow|bag|crown|box|bead|cloak|shoe|comb|candle|jar|toy car|toy horse|teddy bear|music box
spinning wheel|paper plane|pocket watch|picture|sled|yo-yo|violin|bow|compass|acorn|leaf|pine cone|pebble""".replace("\n", "|").split("|")
THING_ADJ = "shiny little old new round soft pretty beautiful tiny big smooth striped wooden special lovely bright".split() + COLORS

# place | preposition | sights (plural noun phrases) | spots where a thing may hide | home for a child
PLACES_L = """
forest|in|tall trees,ferns,mushrooms|behind a mossy log,under a fern,between two roots,in a hollow tree|a wooden hut
village|in|little houses,narrow streets,flower pots|behind the well,under a bench,beside the bakery,on the church steps|a small house with a red roof
meadow|in|yellow flowers,butterflies,tall grass|in the tall grass,under a daisy,beside a molehill,behind a hedge|a cottage
garden|in|roses,apple trees,bean rows|under a rose bush,behind the shed,next to the pond,beneath the apple tree|a house with green windows
valley|in|green hills,quiet streams,white flowers|behind a big rock,by the stream,under a pine tree,in a ditch|a stone house
town|in|tall houses,busy shops,street lamps|under a bench,behind the fountain,next to the bakery,on the steps of the school|a tall brick house
farm|on|barns,golden fields,haystacks|behind the barn,in the hay,under the cart,beside the fence|an old farmhouse
hill|on|soft grass,windmills,wild flowers|behind the windmill,under a bush,in the long grass,beside a gray stone|a little white house
mountain|on|high rocks,pine trees,cold streams|behind a rock,in a small cave,under a pine tree,by the cold stream|a wooden cabin
beach|on|white shells,gentle waves,sand castles|under a shell,behind a rock,in the wet sand,beside an old boat|a blue beach house
river bank|on|reeds,smooth stones,willow trees|among the reeds,under a willow tree,between two stones,beside the bridge|a house near the water
island|on|palm trees,warm sand,colorful birds|under a palm tree,behind a sand hill,in a cave,beside a small boat|a hut made of wood
park|in|swings,old trees,ducks|under the slide,beside the pond,behind a bench,next to the swings|an apartment near the gate
jungle|in|green vines,huge leaves,bright flowers|under a huge leaf,behind a vine,in a muddy hole,beside a waterfall|a tree house
city|in|bright lights,tall towers,busy buses|behind the bus stop,under a bench,near the station,beside the fountain|a tall building
orchard|in|apple trees,pear trees,ladders|under a pear tree,behind a ladder,in a basket of apples,beside the gate|a cottage with a blue door
desert|in|golden sand,palm trees,warm winds|behind a sand hill,under a palm tree,beside the well,between two stones|a white tent
kingdom|in|castles,green fields,proud flags|behind the castle wall,under the bridge,beside the mill,in the royal garden|a house beside the castle
castle|in|long halls,tall windows,old paintings|behind a curtain,under the table,on the stairs,inside an old chest|a small tower room
harbor|in|fishing boats,seagulls,piles of rope|behind a barrel,under a net,inside an old boat,beside the lighthouse|a house above the boats
"""
PLACES_S = """
sea|in|silver waves,bubbles,soft sand|behind a rock,under a big shell,in the soft sand,between two stones|x
ocean|in|blue waves,sunken ships,pearls|inside a sunken ship,under a coral branch,behind a rock,beside an old anchor|x
coral reef|on|pink corals,sea flowers,little shells|under a pink coral,behind a sponge,inside a shell,beside a sea flower|x
bay|in|warm water,seaweed,white sand|in the seaweed,behind a stone,under an old boat,beside a pearl shell|x
lagoon|in|clear water,bright shells,seaweed|under a bright shell,in the seaweed,behind a rock,beside a sunken log|x
"""


class Place:
    def __init__(self, line):
        self.name, self.prep, s, sp, self.home = line.split("|")
        self.sights, self.spots = s.split(","), sp.split(",")


PLACES = {"l": [Place(x) for x in PLACES_L.strip().split("\n")], "s": [Place(x) for x in PLACES_S.strip().split("\n")]}
PLACE_ADJ = "small quiet big green sunny old pretty peaceful far-away beautiful little".split()

TRAITS = {
    "kind": ["{h} always helped others", "{h} liked to [share|help|make others smile]", "everyone knew that {h} had a [big|warm|good] heart"],
    "curious": ["{h} asked questions all day long", "{h} always wanted to know [why|how things worked]", "{h} looked [behind every door|under every stone]"],
    "brave": ["{h} was [almost never|not often] afraid", "{h} liked big adventures", "{h} always went first"],
    "shy": ["{h} did not talk much", "{h} often hid behind {h.his} {m.kind}", "{h} found it hard to [say hello|make friends]"],
    "clever": ["{h} could solve any puzzle", "{h} always had [a good idea|a plan]", "{h} liked to think before {h.he} spoke"],
    "cheerful": ["{h} sang all day long", "{h} laughed a lot", "{h} woke up every morning with a smile"],
    "impatient": ["{h} did not like to wait", "{h} wanted everything at once", "{h} was always in a hurry"],
    "careless": ["{h} often forgot things", "{h} left {h.his} things everywhere", "{h} did not always look where {h.he} was going"],
    "gentle": ["{h} spoke with a soft voice", "{h} never hurt anyone, not even a fly", "{h} was always careful with small things"],
    "proud": ["{h} thought {h.he} was the best at everything", "{h} did not like to ask for help", "{h} often talked about {h.himself}"],
    "playful": ["{h} made a game out of everything", "{h} loved to play tricks", "{h} could play from morning until night"],
    "lazy": ["{h} liked to sleep until noon", "{h} always said, \"I will do it tomorrow\"", "{h} loved to lie in the sun and do nothing"],
    "quiet": ["{h} liked to listen more than {h.he} liked to talk", "{h} loved to watch the clouds", "{h} often sat alone and dreamed"],
    "lonely": ["{h} wished for a friend", "{h} often played all alone", "{h} had no one to talk to"],
    "stubborn": ["{h} did not like to change {h.his} mind", "when {h} said no, it meant no", "{h} never listened to good advice"],
    "hardworking": ["{h} got up early every day", "{h} always finished what {h.he} began", "{h} liked to keep busy"],
}
BASE_ADJ = ["little"] * 6 + ["small"] * 3 + ["young"] * 3 + ["tiny", "funny", "happy", "friendly", "good", "sweet", "pretty", "sleepy"]
BIG_ADJ = ["big"] * 3 + ["young"] * 3 + ["friendly", "old", "strong", "large", "happy", "gray", "good"]
GROWN_ADJ = ["old"] * 3 + ["poor"] * 2 + ["good", "young", "wise", "happy", "friendly", "merry"]
HOBBIES = ["{h} loved to [look at|watch] the [stars|clouds|birds|rain]", "{h} liked to [collect|find] [stones|shells|leaves|feathers]",
           "more than anything, {h} loved {h.food}", "{h.his} favorite food was {h.food}", "{h} liked to play [hide and seek|games|in the sun]",
           "every morning, {h} [sang a little song|said hello to the sun|looked out of the window]", "{h} loved the color {color}",
           "at night, {h} listened to [stories|the wind|the crickets]", "{h} had {h.feat2}, and everyone liked {h.him}"]
LEARN = [("ride a bicycle", "rode a bicycle"), ("whistle", "whistled"), ("paint pictures", "painted a picture"), ("bake bread", "baked bread"),
         ("skate on the ice", "skated on the ice"), ("juggle", "juggled"), ("play the flute", "played the flute"), ("sing", "sang"), ("dance", "danced"),
         ("jump rope", "jumped rope"), ("fly a kite", "flew a kite"), ("climb the big tree", "climbed the big tree"), ("read", "read a whole page"),
         ("play the drum", "played the drum"), ("swim", "swam"), ("tell jokes", "told a joke"), ("write letters", "wrote a letter"), ("knit a scarf", "knitted a scarf"),
         ("count to one hundred", "counted to one hundred"), ("play the violin", "played the violin"), ("cook soup", "cooked soup"), ("row a boat", "rowed a boat"),
         ("catch a ball", "caught the ball"), ("build a tower", "built a tower"), ("draw a star", "drew a star"), ("do a handstand", "did a handstand"),
         ("tie a knot", "tied a knot"), ("stand on one leg", "stood on one leg")]
FRUITS = "apples pears plums cherries strawberries blueberries nuts cookies pancakes carrots grapes oranges peaches muffins buns tomatoes sandwiches".split()
DAYTIMES = ["one day", "one day", "one morning", "one sunny morning", "one afternoon", "one spring day", "one summer day", "one warm day", "one fine day",
            "one autumn morning", "one bright morning", "one quiet afternoon", "one Monday", "one Saturday", "one Sunday morning", "early one morning", "on a sunny day"]
NEXTTIMES = ["the next day", "the next morning", "a few days later", "a week later", "some time later", "another day", "the following week", "one day after that", "not long after", "when summer came", "when autumn came"]
WEATHER = ["the sun was shining", "the sky was blue", "a soft wind was blowing", "the birds were singing", "it was warm and bright", "white clouds drifted across the sky", "the air smelled of flowers", "the grass was wet with dew"]
WEATHER_S = ["the water was warm and clear", "the sun made the water sparkle", "the waves were gentle", "tiny bubbles danced in the water", "the water was calm"]

PRON = {"he": ("him", "his", "himself"), "she": ("her", "her", "herself"), "it": ("it", "its", "itself")}


class Ch:
    """Somebody in a story."""

    def __init__(self, r, kind, name, g, adj, home=None):
        self.r, self.k, self.name, self.g, self.adj = r, kind, name, g, adj
        self.child = kind.name in ("boy", "girl")
        self.seen = False
        him, his, himself = PRON[g]
        mv = kind.moves[int(r.random() * len(kind.moves))]
        hands = kind.hands
        feat = kind.feats[int(r.random() * len(kind.feats))]
        food = kind.foods[int(r.random() * len(kind.foods))]
        self.d = dict(he=g, him=him, his=his, himself=himself, kind=kind.name, adj=adj, go=mv, went=MOTION[mv][0], going=MOTION[mv][1],
                      home=home or kind.home, hands=hands, hand=ONE_HAND[hands], feat=feat, food=food,
                      feat2=feat if feat.startswith("a ") or feat.startswith("freckles") else (("a " if not feat.endswith("s") and not feat.endswith(("fur", "hair", "wool", "skin", "feet")) else "") + feat))
        self.d["call"] = name or ("my friend" if kind.grown else ("little " if kind.size != "b" else "dear ") + kind.name)
        self.desc = (adj + " " if adj else "") + kind.name

    def get(self, a):
        if a == "s":
            n = self.ref()
            return n + "'s"
        if a == "ref":
            return self.ref()
        if a == "intro":
            self.seen = True
            return self.intro()
        return self.d[a]

    def intro(self):
        a = "@ " + self.desc
        return f"{a} named {self.name}" if self.name else a

    def ref(self):
        self.seen = True
        x = self.r.random()
        if self.name:
            if x < (0.93 if self.child else 0.78):
                return self.name
            return "the " + (self.desc if x > 0.95 and not self.child else self.k.name)
        return "the " + (self.desc if x < 0.4 else self.k.name)

    def main(self):
        return self.ref() if self.seen else self.get("intro")


class Elder:
    """A grown-up who belongs to the hero: "his mother"."""

    def __init__(self, r, hero, kind, call, g):
        self.r, self.h, self.g = r, hero, g
        him, his, himself = PRON[g]
        self.d = dict(kind=kind, call=call, he=g, him=him, his=his, himself=himself)

    def get(self, a):
        if a == "s":
            return self.main() + "'s"
        return self.d[a]

    def main(self):
        if self.r.random() < 0.75 or not self.h.name:
            return self.h.d["his"] + " " + self.d["kind"]
        return self.h.name + "'s " + self.d["kind"]


# ------------------------------------------------------------------ the template language

_CACHE = {}
_TOK = re.compile(r"[\[\]|]|\{\^?[\w.]+\}")


def parse(s):
    """-> list of str | ("a", [lists]) | ("s", key, attr, cap)"""
    pos = 0

    def seq(stop):
        nonlocal pos
        out = []
        while pos < len(s):
            m = _TOK.search(s, pos)
            if not m:
                out.append(s[pos:])
                pos = len(s)
                break
            if m.start() > pos:
                out.append(s[pos:m.start()])
                pos = m.start()
            t = m.group()
            if t in stop:
                return out
            pos = m.end()
            if t == "[":
                alts = [seq("|]")]
                while s[pos] == "|":
                    pos += 1
                    alts.append(seq("|]"))
                assert s[pos] == "]", s
                pos += 1
                out.append(("a", alts))
            elif t[0] == "{":
                k = t[1:-1]
                cap = k[0] == "^"
                k, _, at = k.lstrip("^").partition(".")
                out.append(("s", k, at, cap))
            else:
                raise ValueError("stray " + t + " in " + s)
        assert not stop, "unclosed [ in " + s
        return out

    return seq("")


def _expand(parts, ctx, rnd, out):
    for p in parts:
        if p.__class__ is str:
            out.append(p)
        elif p[0] == "a":
            alts = p[1]
            _expand(alts[int(rnd() * len(alts))], ctx, rnd, out)
        else:
            v = ctx[p[1]]
            if v.__class__ is not str:
                v = v.get(p[2]) if p[2] else v.main()
            elif "{" in v or "[" in v:
                sub = []
                expand_into(v, ctx, rnd, sub)
                v = "".join(sub)
            if p[3]:
                v = cap(v)
            out.append(v)


def expand_into(s, ctx, rnd, out):
    t = _CACHE.get(s)
    if t is None:
        t = _CACHE[s] = parse(s)
    _expand(t, ctx, rnd, out)


def cap(v):
    if v.startswith("@ "):
        return fix_articles(v)[:1].upper() + fix_articles(v)[1:]
    return v[:1].upper() + v[1:]


_ART = re.compile(r"@ (\w+)")
_SENT = re.compile(r"(^|[.!?] |\.\" |\n)([a-z@])")


def _art(m):
    w = m.group(1)
    an = w[0] in "aeiouAEIOU" and not w.lower().startswith(("uni", "use", "one", "uku"))
    return ("an " if an or w in ("hour", "honest") else "a ") + w


def fix_articles(s):
    return _ART.sub(_art, s)


def finish(s):
    s = fix_articles(s)
    s = _SENT.sub(lambda m: m.group(1) + m.group(2).upper(), s)
    while "  " in s:
        s = s.replace("  ", " ")
    return s.replace(" ,", ",").replace(" .", ".").strip()


def say(s, ctx, r):
    out = []
    expand_into(s, ctx, r.random, out)
    return finish("".join(out))


def pick(r, xs):
    return xs[int(r.random() * len(xs))]


# ------------------------------------------------------------------ plots
# A plot is a list of phases, a phase a list of templates; a phase that begins with "?" may be left out.
# {T} is "one day", or "the next morning" where a story goes on.

PLOTS = {}


def plot(name, realm, themes, about, phases, lessons, ends=()):
    PLOTS[name] = dict(realm=realm, themes=themes, about=about, phases=phases, lessons=lessons, ends=list(ends))


plot("lost thing", "ls", ["losing something", "finding things", "not giving up"],
     ["{h.who} who lost @ {obj}", "@ {obj}", "@ lost {ob}"], [
    ["{h} had @ {obj}. [It was {h.his} favorite thing in the whole world|{^h.he} took it everywhere|It was a gift from {h.his} {m.kind}]. {T}, {h} looked for the {ob}, but it was gone.",
     "{T}, {h} could not find {h.his} {obj}. [{^h.he} had played with it the day before|{^h.he} had put it next to {h.his} bed], and now it was [gone|nowhere to be seen].",
     "{T}, {h} {h.went} {top} with {h.his} {obj}. {^h.he} played with it [all morning|until {h.he} was tired] and then took a nap. When {h.he} woke up, the {ob} was gone!",
     "The dearest thing {h} had was @ {obj}. {T}, {h.he} wanted to [show it to|share it with] a friend, but the {ob} was not in its place.",
     "{T}, {h} got @ {obj} from {h.his} {m.kind}. {^h} was so happy that {h.he} {h.went} all the way {top} with it. But on the way home {h.he} saw that the {ob} was missing."],
    ["\"[Oh no|Oh dear]! Where is my {ob}?\" [cried|said|asked] {h}.", "\"[My {ob} is gone|I have lost my {ob}]!\" {h.he} cried. [Big tears rolled down {h.his} face.|{^h.he} felt very sad.]",
     "{^h} [felt a lump in {h.his} throat|began to cry|was very sad]. \"What shall I do without my {ob}?\" {h.he} [said|asked].",
     "At first {h.he} was angry, and then {h.he} was sad. \"I must find it,\" {h.he} said."],
    ["?", "{^h} looked {spot1}, but there was only [an old leaf|a sleepy beetle|a bit of string|some dust]. {^h.he} looked {spot2}, but the {ob} was not there either.",
     "{^h.he} looked {spot1}. Nothing. {^h.he} looked {spot2}. Nothing at all.",
     "First {h.he} searched {spot1}. Then {h.he} searched {spot2}. The {ob} was not there.",
     "{^h.he} searched [high and low|everywhere|for a long time], {spot1} and {spot2}, but {h.he} found nothing."],
    ["Then {f} came by. \"Why [are you so sad|are you crying], {h.call}?\" asked {f}. \"I lost my {obj},\" said {h}. \"[Do not worry|Don't be sad]. I will help you [look for it|find it],\" said {f}.",
     "Just then {h} met {f}. \"Have you seen my {ob}?\" asked {h}. \"[No, I have not|Not today], but [four eyes see more than two|we can look for it together],\" said {f}.",
     "{^h} [{h.went} to|went to see] {f} and told {f.him} [what had happened|everything]. \"Let us think,\" said {f}. \"Where did you [have it last|play with it last]?\" {^h} thought hard. \"I was {inp},\" {h.he} said.",
     "{^f} heard {h} and came [closer|at once]. \"What is the matter?\" {f.he} asked. {^h} told {f.him} about the {ob}. \"We will find it together,\" said {f}."],
    ["Together they looked {spot3}. And there it was! \"My {ob}!\" cried {h}. [{^h.he} hugged {f} tightly.|{^h.he} was so happy that {h.he} danced.|{^h.he} held it close.]",
     "They {searched} until the sun was low. At last {f} called, \"Come and see!\" The {obj} was {spot3}. \"[Thank you, thank you|You found it]!\" said {h}.",
     "The two friends went back {top}. {^f} saw something {color} {spot3}. It was the {ob}! {^h} [laughed with joy|jumped for joy|smiled from ear to ear].",
     "\"Look there,\" said {f}. {spot3} sat {s}, and {s.he} was [playing with|sleeping on|looking at] the {ob}. \"Is this yours?\" asked {s}. \"I found it and I kept it safe.\" {^h} thanked {s.him} [very much|with all {h.his} heart]."],
    ["?", "From then on, {h} always put {h.his} {ob} [in a safe place|back in its place|under {h.his} pillow] at night.", "To say thank you, {h} let {f} play with the {ob} [all afternoon|for the rest of the day].",
     "That evening, {h} showed the {ob} to {h.his} {m.kind} and told {m.him} how {f} had helped."]],
    ["It is easier to find something when a friend helps you look.", "Take good care of the things you love.", "Never give up too soon.", "A good friend is worth more than any {ob}."])

plot("learning", "l", ["practice", "learning something new", "not giving up", "patience"],
     ["{h.who} who wanted to {learn}", "{h.who} who learned to {learn}"], [
    ["{h} had one big wish. {^h.he} wanted to {learn}. {T}, {h.he} [made up {h.his} mind to try|tried it for the first time].",
     "{T}, {h} saw {f}, who could {learn} very well. \"I want to {learn} too,\" thought {h}.",
     "{T}, {h} said to {h.his} {m.kind}, \"I wish I could {learn}.\" \"Then [you must try|you should try it],\" said {h.his} {m.kind}.",
     "More than anything, {h} wanted to {learn}. {T}, {h.he} [woke up early|could not wait any longer] and began."],
    ["But it was [hard|not easy|much harder than it looked]. {^h} tried once, and it went wrong. {^h.he} tried again, and it went wrong again.",
     "{^h} tried and tried, but [it did not work|{h.he} could not do it]. \"I will never learn it,\" {h.he} [sighed|said sadly].",
     "The first time, {h.he} [fell down|got it all wrong|made a big mess]. Some of the others laughed, and {h} [turned red|wanted to hide|felt very small].",
     "{^h} wanted to do it perfectly at once, but {h.he} could not. \"This is too hard for me!\" {h.he} cried."],
    ["{^f} saw it and said, \"Nobody can {learn} on the first day. I needed [a whole year|many weeks|a hundred tries]. Let me show you how.\"",
     "Then {f} sat down next to {h.him}. \"Do it slowly,\" said {f}. \"[One small step at a time|A little bit every day]. I will stay with you.\"",
     "\"May I help you?\" asked {f}. \"[Yes, please|Oh yes],\" said {h}. {^f} showed {h.him} how to begin, and then they tried it together.",
     "\"Do not give up,\" said {f}. \"Every time you try, you get a little better.\""],
    ["So {h} practiced [every day|every morning|day after day]. On Monday it was bad. On Wednesday it was better. On Friday it was [nearly right|almost good].",
     "{^h} practiced in the morning and {h.he} practiced in the evening. [It rained, and {h.he} practiced.|Sometimes {h.he} was tired, but {h.he} did not stop.] [Little by little|Slowly], it became easier.",
     "Day after day, {h} tried again. {^f} [clapped for {h.him}|cheered for {h.him}|told {h.him} not to stop]."],
    ["And then, [one fine day|at last], it worked! {^h} {learned}, and everyone [clapped|cheered]. \"I can do it!\" {h.he} shouted.",
     "At the end of the week, all the friends came to watch. {^h} took a deep breath, and {h.he} {learned}. [It was wonderful.|Nobody could believe it.] {^f} was so proud of {h.him}.",
     "One evening, {h.his} {m.kind} came to see. {^h} {learned} from beginning to end. \"[Well done|How wonderful], {h.call}!\" said {h.his} {m.kind}.",
     "Then it happened. {^h} {learned} without any help. {^h.he} was so happy that {h.he} [hugged {f}|laughed out loud|danced around {place}]."],
    ["?", "Later, {s} came to {h} and asked, \"Can you teach me to {learn}?\" \"Of course,\" said {h}. \"But you must be patient.\"",
     "After that, {h} liked to {learn} every day.", "Now {h} and {f} often did it together."]],
    ["If you practice every day, hard things become easy.", "Nobody can do everything at once.", "It is all right to make mistakes. That is how we learn.", "{^h} learned that it is good to keep trying."])

plot("helping a hurt animal", "l", ["kindness", "helping others", "being kind"],
     ["{h.who} who helped {s.who}", "{h.who} and {s.who}"], [
    ["{T}, {h} was {h.going} through {place} when {h.he} heard a small cry. {spot1} lay {s}. {^s.his} [leg|foot] was hurt.",
     "{T}, {h} {h.went} {top}. There, {spot1}, {h.he} found {s}. {^s.he} was [cold and wet|very weak|hungry and afraid].",
     "{T}, after a big storm, {h} found {s} {spot1}. {^s} was shaking and could not get up.",
     "{T}, {h} saw {s}, who was caught {spot1}. \"Help me, please,\" said {s} with a weak voice."],
    ["\"[Do not be afraid|You poor thing],\" said {h}. \"I will help you.\" {^h.he} carried {s} home [very gently|as carefully as {h.he} could].",
     "{^h} felt sorry for {s}. {^h.he} put a warm blanket around {s.him} and gave {s.him} some {s.food}.",
     "\"What happened to you?\" asked {h}. \"I fell, and now I cannot go home,\" said {s}. \"Then you can stay with me,\" said {h}.",
     "Some others had walked by and done nothing. But {h} stopped. {^h.he} [knelt down|bent down] and said, \"I am here. You are not alone.\""],
    ["?", "{^h.s} {m.kind} helped too. {^m.he} made [a soft bed|warm soup|a bandage] for {s}.", "Every day, {h} brought {s} [fresh water|something to eat] and told {s.him} stories. Every day, {s} got a little better.",
     "{^h} made a small bed of [soft leaves|hay|wool]. {^s} slept all night and all day.", "\"Will I get better?\" asked {s}. \"Yes, you will,\" said {h}. \"You only need [rest|time].\""],
    ["After a week, {s} was strong again. \"Thank you, {h.call},\" said {s}. \"I will never forget this.\" Then {s.he} went home.",
     "Soon {s} could run and play again. \"You saved my life,\" said {s}. \"If you ever need me, call my name.\"",
     "When {s} was well, {h} took {s.him} back {top}. They said goodbye, and both of them were a little sad."],
    ["Some time later, {h} [got lost|lost the way home] {inp}. It was getting dark. Suddenly {h.he} heard a voice. It was {s}! \"Come with me,\" said {s}. \"I know the way.\" And {s.he} led {h} safely home.",
     "In the winter, there was not much to eat. {^h} was hungry. Then there was a knock at the door. It was {s}, and {s.he} had brought a basket full of {food}. \"You helped me, and now I help you,\" said {s}.",
     "One day {h} fell into a deep hole and could not get out. {^h.he} called for help. {^s} heard {h.him} and came at once with a long rope. \"Hold on!\" said {s}, and {s.he} pulled {h} out.",
     "From that day on, {s} came to visit every [week|Sunday]. The two became the best of friends."],
    ["?", "\"Thank you,\" said {h}. \"We help each other,\" said {s}. \"That is what friends do.\"", "{^h} smiled. {^h.he} knew that {h.he} had a friend for life."]],
    ["When you are kind to others, kindness comes back to you.", "No one is too small to help.", "Even a small kindness can change everything.", "Be good to those who need you."])

plot("sharing", "ls", ["sharing", "being greedy", "friendship"], ["{h.who} who did not want to share", "{h.who} who learned to share"], [
    ["{T}, {h} found [a basket|a big bag|a whole heap] of {h.food} {inp}. \"This is all for me,\" said {h}.",
     "{T}, {h.s} {m.kind} gave {h.him} a big box of {food}. \"Share them with your friends,\" said {h.his} {m.kind}. But {h} did not want to share.",
     "{T}, {h} had a lot of {food}, so many that {h.he} could not carry them all. Still, {h.he} wanted to keep every one."],
    ["Then {f} came along. \"May I have [some|a little], please?\" asked {f}. \"No!\" said {h}. \"It is mine, all mine!\" {^f} went away [sadly|with tears in {f.his} eyes].",
     "{^f} looked at it. \"Can we share?\" asked {f}. {^h} shook {h.his} head. \"Get your own,\" {h.he} said. {^f} was very sad.",
     "\"[I am so hungry|That looks so nice],\" said {f}. \"Will you share with me?\" But {h} [turned around|pretended not to hear]."],
    ["{^h} [sat down alone|went away alone|hid {spot1}]. But it was not as nice as {h.he} had thought. There was no one to talk to and no one to laugh with. {^h} felt lonely.",
     "Now {h} had everything for {h.himself}. But [soon|after a while] {h.his} tummy hurt and {h.his} heart felt heavy. \"Why am I not happy?\" {h.he} wondered.",
     "All day long {h} was alone. {^h.he} heard the others laughing and playing {inp}. Nobody called {h.his} name."],
    ["?", "{^o} had seen everything. \"{^h.call},\" said {o}, \"a thing that you share does not get smaller. It gets bigger.\" {^h} thought about that for a long time.",
     "At home, {h.his} {m.kind} asked, \"How would you feel if {f} did that to you?\" {^h} looked at the ground. \"I would be sad,\" {h.he} said.",
     "Then it began to rain, and {h} had no place to hide. {^f} saw {h.him} and called, \"Come here, there is room for two!\" {^h} was ashamed. {^f} had shared with {h.him}, even after {h.he} had been so mean."],
    ["{^h} went to {f} and said, \"I am sorry. I was [greedy|selfish|not nice]. Please, take half.\" {^f} smiled. \"[Thank you|That is very kind], {h.call},\" {f.he} said.",
     "So {h} {h.went} to {f}. \"Please forgive me,\" {h.he} said. \"Let us share.\" And {f} forgave {h.him} at once.",
     "{^h} called {f} and all the others. \"Come, everyone!\" {h.he} shouted. \"There is enough for all of us!\""],
    ["They sat down together and shared everything. It was the best [afternoon|day] of all.", "Then they played until the sun went down. {^h} had never been so happy.", "They laughed and talked, and {h} saw that it was much more fun to share."]],
    ["Sharing makes everyone happy.", "Things are twice as nice when you share them.", "A happy heart is better than a full basket.", "{^h} never forgot that friends are more important than things."])

plot("afraid", "ls", ["being brave", "being afraid", "courage"], ["{h.who} who was afraid of {fear}", "{h.who} who learned to be brave"], [
    ["{h} was afraid of {fear}. [{^h.he} did not tell anyone about it.|Everyone knew it.|It made {h.him} feel very small.] {T}, something happened.",
     "There was only one thing that {h} did not like at all, and that was {fear}. {T}, {h.he} had to be brave.",
     "{T}, {h} could not sleep, because {h.he} was afraid of {fear}. {^h.he} [hid under the blanket|shook like a leaf|held {h.his} {obj} tightly]."],
    ["{^f} was playing with {h} when {f.he} got stuck {spot1}. \"Help!\" called {f}. {^h} thought of {fear} and did not dare to move. \"Being brave does not mean that you are never afraid,\" {o} had once told {h.him}. \"It means that you try anyway.\" {^h} remembered those words.",
     "{^h} heard a cry. It was {f}, who was stuck {spot1}. But {h} thought of {fear} and could not move. {^h} closed {h.his} eyes and counted: one, two, three. {^h.his} heart was beating fast. \"I can do it,\" {h.he} said to {h.himself}.",
     "{^f} asked, \"Why are you shaking?\" {^h} looked down. \"I am afraid of {fear},\" {h.he} whispered. \"Please do not laugh.\" But {f} did not laugh. \"I am afraid too sometimes,\" said {f}. \"[When I am afraid, I sing a song|When I am afraid, I count to ten|When I am afraid, I take a deep breath].\" \"Does it help?\" asked {h}. \"It always helps,\" said {f}.",
     "\"What if something bad happens?\" said {h}. {^h.he} wanted to [run away|hide|cry]. Then {f} came to {h.him}. \"Take my {f.hand},\" said {f}. \"We will go together.\" {^h} took a deep breath and nodded.",
     "{^f} saw that {h} was shaking. \"What is wrong?\" asked {f}. {^h} told {f.him} about {fear}. \"I know somebody who can help,\" said {f}. They went to {o}. \"Fear is like a shadow,\" said {o}. \"It looks big, but it cannot hurt you.\" {^h} thought about these words."],
    ["Slowly, {h} took one step, and then another. [Nothing bad happened.|It was not as bad as {h.he} had thought.] With every step, {h.he} felt a little stronger.",
     "So {h} sang a little song, first very softly and then louder and louder. And the fear became smaller and smaller.",
     "{^h} [went on|did not stop|went all the way], even though {h.his} knees were shaking. And soon {h.he} saw that there was nothing to be afraid of."],
    ["In the end, {h} laughed. \"Is that all?\" {h.he} said. {^f} laughed too. \"You are the bravest {h.kind} I know,\" said {f}.",
     "\"You did it!\" cried {f}. {^h} was so proud. {^h.he} told {h.his} {m.kind} about it, and {m.he} gave {h.him} a big hug.",
     "After that, {h} was still a little afraid of {fear}, but now {h.he} knew what to do.",
     "\"You were afraid, and you did it anyway,\" said {f}. {^h} smiled, and {h.his} heart felt warm."]],
    ["Being brave means trying even when you are afraid.", "Most scary things become small when you look at them.", "With a friend, you can be brave.", "You are stronger than you think."])

plot("far from home", "ls", ["getting lost", "listening to your parents", "the way home"], ["{h.who} who got lost", "{h.who} who went too far from home"], [
    ["\"Do not go too far,\" {h.s} {m.kind} always said. But {T}, {h} saw @ {color} [butterfly|bird|leaf] and followed it, farther and farther.",
     "{T}, {h} wanted to see what was behind {place}. {^h.he} did not tell anyone and {h.went} away.",
     "{T}, {h} was playing {inp}. {^h.he} was so happy that {h.he} did not see how late it was.",
     "{T}, {h} and {h.his} {m.kind} were {inp}. {^h} stopped to look at @ {obj}, and when {h.he} looked up, {h.his} {m.kind} was gone."],
    ["When {h} looked around, nothing looked the same. \"Where am I?\" {h.he} asked. Nobody answered.",
     "Soon the sun went down and it became [dark|cold and dark]. {^h} did not know the way home. {^h.he} sat down {spot1} and began to cry.",
     "{^h} went left, and {h.he} went right, but {h.he} could not find the way back. \"I want to go home,\" {h.he} said with a small voice."],
    ["?", "\"If only I had listened to my {m.kind},\" thought {h}.", "Somewhere, something made a strange sound. {^h} shivered.", "The moon came up, round and white. {^h} was cold and hungry."],
    ["Then {h.he} heard a voice. \"Who is crying there?\" It was {o}. \"I am lost,\" said {h}. \"I cannot find my way home.\" \"[Do not cry|Dry your tears],\" said {o}. \"I know every path [around here|{inp}]. Where do you live?\"",
     "{o} came along and stopped. \"It is late for such a young one,\" said {o}. {^h} told {o.him} everything. \"Come with me,\" said {o}. \"I will take you home.\"",
     "Suddenly there was a small light. It came closer and closer. It was {o} with a lantern. \"Are you lost?\" {o.he} asked [kindly|with a friendly voice]. {^h} nodded."],
    ["\"I live {inhome},\" said {h}. \"That is not far,\" said {o}. Together they {wentpast} [the old bridge|a big rock|three tall stones] and around a corner, and there was home!",
     "{o} showed {h.him} the way, step by step. They told each other stories, so that {h} forgot to be afraid. Soon {h.he} saw a light that {h.he} knew.",
     "\"Listen to the [water|wind],\" said {o}. \"It always comes from the north. Your home is on the other side.\" They {wentpast} many things, and at last they were there."],
    ["{^h.s} {m.kind} was waiting. \"There you are!\" {m.he} cried and hugged {h.him}. \"I was so worried.\" \"I am sorry,\" said {h}. \"I will never go so far alone again.\"",
     "\"{^m.call}!\" called {h}. {^h.his} {m.kind} [came running|came at once] and held {h.him} tight. {^m.he} thanked {o} and gave {o.him} some [{food}|warm soup].",
     "{^h.his} {m.kind} was so happy that {m.he} cried and laughed at the same time. That night {h} slept [well|like a stone] in {h.his} own warm bed."]],
    ["Always tell somebody where you are going.", "It is wise to listen to those who love you.", "Home is the best place of all.", "When you are lost, stay calm and ask for help."])

plot("baking", "l", ["baking a cake", "a birthday", "working together"], ["{h.who} who baked a cake", "a birthday cake"], [
    ["{T}, {h} wanted to bake a cake, because it was the birthday of {f}.", "It was almost the birthday of {f}. \"I will bake the best cake in the world,\" said {h} {T2}.",
     "{T}, {h} said, \"Today I will bake a big [{fruit} cake|honey cake|chocolate cake] for {f}.\""],
    ["{^h} took [a big bowl|the flour and the butter|a spoon and a bowl] and began. But there was no {missing} left!", "{^h.he} looked in the kitchen. There was flour and there was butter, but there was no {missing}.",
     "Everything was ready. Then {h} saw that the jar was empty. There was no {missing}! \"How can I bake a cake without {missing}?\" {h.he} said."],
    ["So {h} went to {o}. \"Do you have some {missing} for me?\" {h.he} asked. \"I do,\" said {o}, \"but first you must help me [sweep the floor|carry the wood|find my glasses|water the flowers].\" {^h} helped, and {o} gave {h.him} the {missing}.",
     "{^h} knocked at the door of {o}. \"Please, may I have some {missing}?\" \"Of course,\" said {o}. \"What are you baking?\" \"It is a secret,\" said {h} and smiled.",
     "{o} lived next door. {^o.he} had a whole shelf of {missing}. \"Take as much as you need,\" said {o}. \"And save me a piece of the cake!\""],
    ["Back at home, {h} mixed everything. {^h.he} stirred and stirred, until there was flour on {h.his} nose and flour on the floor.",
     "Then {h} put the cake into the oven. Soon the whole house smelled [sweet|wonderful|of cake].",
     "{^h.s} {m.kind} helped {h.him} with the hot oven. \"Be careful,\" said {m}. They waited, and the cake grew bigger and bigger."],
    ["?", "But oh dear! {^h} had waited too long, and one side was a little black. \"It is ruined,\" said {h}. \"No,\" said {h.his} {m.kind}. \"We cut that side off and put {food} on top.\" And so they did.",
     "On the way to {f}, {h} nearly dropped the cake, but {h.he} caught it just in time. \"That was close!\" {h.he} said."],
    ["When {f} saw the cake, {f.his} eyes grew big. \"Is that for me?\" {f.he} asked. \"Happy birthday!\" said {h}. Everyone got a piece, and it tasted [wonderful|sweet and good].",
     "All the friends came to the party. They sang a song for {f}, and then they ate the whole cake. \"This is the best birthday ever,\" said {f}.",
     "\"Surprise!\" shouted {h}. {^f} [laughed with joy|clapped {f.his} {f.hands}|could hardly believe it]. {^o} came too and got the biggest piece."]],
    ["A gift that you make yourself is the best gift of all.", "With a little help, every cake can be saved.", "It feels good to make others happy.", "Sweet things taste better with friends."])

plot("race", "l", ["a race", "winning and losing", "being proud"], ["{h.who} and a race", "a race between {h.who} and {f.who}"], [
    ["{T}, there was a big race {inp}. {^h} wanted to win. {^f} wanted to race too.", "{T}, {f} said, \"Nobody is as fast as I am.\" {^h} was tired of hearing that. \"Let us race,\" said {h}.",
     "{T}, all the friends met {inp} for the great race. The prize was @ {obj}."],
    ["\"You are much too slow,\" said {f} and laughed. \"You will never win.\" But {h} did not [get angry|say a word].", "{^o} held up a flag. \"Ready, steady, go!\" said {o}. And off they went!",
     "Everybody came to watch. {^o} counted to three, and the race began. {^f} was in front right away."],
    ["{^f} was so sure of winning that {f.he} sat down {spot1} to [rest|eat some {food}|take a nap]. {^h} went on, step by step, and did not stop. When {f} looked up, {h} was almost there. {^f} ran as fast as {f.he} could, but it was too late. {^h} had won!",
     "In the middle of the race, {f} fell and hurt {f.his} foot. {^h} could have won. But {h.he} stopped and turned around. \"Are you all right?\" asked {h}. {^h.he} helped {f} up. Together they {wentover} the finish line, side by side. Everyone cheered. \"You both win!\" said {o}.",
     "{^h} was not the fastest, but {h.he} did not give up. {^h.he} kept going, past {sight1} and past {sight2}. At the end, {h} was not first. {^h.he} was second. But {h.his} {m.kind} said, \"You did your best, and I am proud of you.\" {^h} smiled.",
     "{^h} and {f} were side by side all the way, past {sight1} and past {sight2}. In the end, nobody could say who was first. \"Both of you have won,\" said {o}. {^h} and {f} looked at each other and laughed.",
     "{^f} took the wrong path and got lost. {^h} saw it. \"This way!\" called {h}, and {h.he} waited until {f} was back. {^f} was very surprised. \"You could have won without me,\" said {f}. \"I want to win a fair race,\" said {h}. And in the end, {h} won by a nose."],
    ["?", "\"I am sorry that I laughed at you,\" said {f}. \"You are a great racer.\" \"Thank you,\" said {h}. \"Let us be friends.\"", "That evening, they had a party with {food} and music.", "{^h} shared the prize with {f}."]],
    ["Slow and steady is better than fast and lazy.", "It is more important to be kind than to win.", "Do your best and be glad.", "Those who laugh at others often lose in the end."])

plot("telling the truth", "l", ["telling the truth", "honesty", "saying sorry"], ["{h.who} who broke @ {breakable}", "{h.who} who told the truth"], [
    ["{T}, {h} was playing with @ {obj} in the house, although {h.his} {m.kind} had said no. Crash! The {breakable} fell down and broke.",
     "{T}, {h} ran through the room and bumped into the table. The {breakable} fell to the floor. It was broken!",
     "{T}, {h} was all alone at home. {^h.he} wanted to look at the {breakable} of {h.his} {m.kind}. It was very old. Then it slipped out of {h.his} {h.hands}, and crack, it was broken."],
    ["\"Oh no,\" whispered {h}. {^h.he} [hid the pieces {hideplace}|pushed the pieces {hideplace}] and said nothing.", "{^h} was very afraid. \"If nobody sees it, nobody will know,\" {h.he} thought. So {h.he} hid the pieces {hideplace}.",
     "{^h.his} heart beat fast. {^h.he} did not know what to do. {^h.he} put the pieces {hideplace} and went outside."],
    ["In the evening, {h.his} {m.kind} asked, \"Have you seen my {breakable}?\" \"No,\" said {h}. But {h.his} face became red.", "\"Who broke the {breakable}?\" asked {h.his} {m.kind}. \"It was {f},\" said {h}. That was not true.",
     "When {h.his} {m.kind} came home, {m.he} looked around. \"Something is missing here,\" {m.he} said. {^h} looked at the floor and did not say a word."],
    ["That night, {h} could not sleep. {^h.his} tummy felt strange. {^h.he} thought about it again and again.", "{^h} could not eat and could not play. The secret was like a heavy stone in {h.his} heart.",
     "{^h} talked to {f} about it. \"You should tell the truth,\" said {f}. \"It is hard, but then you will feel better.\""],
    ["In the morning, {h} went to {h.his} {m.kind}. \"It was me,\" {h.he} said. \"I broke the {breakable}. I am so sorry.\" And {h.he} began to cry.",
     "At last {h} took a deep breath. \"{^m.call}, I broke it,\" {h.he} said. \"I was afraid to tell you.\""],
    ["{^h.his} {m.kind} was quiet for a moment. Then {m.he} hugged {h.him}. \"I am sad about the {breakable},\" {m.he} said, \"but I am glad that you told me the truth.\"",
     "\"Thank you for telling me,\" said {h.his} {m.kind}. \"A {breakable} can be mended. A lie is much harder to mend.\" Together they glued the pieces.",
     "\"I knew it,\" said {h.his} {m.kind} and smiled. \"I was only waiting for you to tell me.\" {^h} felt as light as a feather."]],
    ["It is always better to tell the truth.", "The truth can be hard, but a lie is heavy.", "Everyone makes mistakes, and it is good to say sorry.", "After that, {h} always told the truth."])

plot("stuck", "ls", ["working together", "teamwork", "helping each other"], ["{s.who} who was stuck", "{h.who} and {f.who} who helped {s.who}"], [
    ["{T}, {h} heard someone shouting. \"Help, help!\" It was {s}. {^s.he} was stuck {spot1} and could not get out.", "{T}, {h} and {f} were playing {inp} when they saw {s}. {^s} was stuck {spot1}!",
     "{T}, {s} wanted to reach some {s.food} and got stuck {spot1}. {^s.he} pulled and pushed, but {s.he} could not move. {^h} heard {s.him} and {h.went} there at once."],
    ["{^h} pulled and pulled, but {s} did not move. \"I am not strong enough alone,\" said {h}.", "\"Hold my {h.hand},\" said {h}. {^h.he} pulled as hard as {h.he} could. It did not help at all.",
     "\"Do not worry, I will get you out,\" said {h}. But it was harder than {h.he} thought."],
    ["So {h} called {f}. Together they pulled. {^s} moved a little, but not enough. Then {o} came to help too.", "Then {f} came. \"I will help,\" said {f}. And then {o} came. \"I will help too,\" said {o}.",
     "{^f} wanted to run away, but {h} said, \"No, we must help.\" They thought and thought. \"I have an idea,\" said {f}. \"We need a long rope.\" {^o} had a rope at home."],
    ["\"One, two, three, pull!\" shouted {h}. They all pulled together. Pop! {^s} was free, and everyone fell down in a heap.", "They pulled, and they pulled, and they pulled once more. And then, with a loud pop, {s} came out!",
     "{^h} held {f}, and {f} held {o}, and all of them pulled at the same time. Slowly, very slowly, {s} came free."],
    ["Everyone laughed. \"Thank you, all of you,\" said {s}. \"Alone I would still be there.\"", "\"You saved me!\" said {s}. {^s.he} was so glad that {s.he} invited them all to eat {food}.",
     "{^s} hugged {h} and {f} and {o}. \"What good friends you are,\" {s.he} said."],
    ["?", "\"Next time, look where you go,\" said {o}, and everyone laughed again.", "After that, they were friends and met every day."]],
    ["Together we are strong.", "What one cannot do alone, many can do together.", "It is good to have friends who help you.", "Nobody is too small to help."])

plot("garden", "l", ["patience", "a garden", "growing things"], ["{h.who} who planted a seed", "a garden", "a magic seed"], [
    ["{T}, {h} found a small seed {spot1}. \"I will plant it,\" said {h}, \"and see what comes out.\"", "{T}, {o} gave {h} a little {color} seed. \"Take good care of it,\" said {o}. \"Then you will see something wonderful.\"",
     "{T}, {h} wanted to have a garden. {^h.he} dug a hole {inp} and put a seed into it."],
    ["{^h} gave it water and waited. Nothing happened. {^h.he} waited one more day. Still nothing. \"Why does it not grow?\" asked {h}.", "The next day, {h} looked at the ground. There was nothing to see. \"Maybe the seed is asleep,\" said {h}.",
     "{^h} sat next to it all day. \"Grow!\" {h.he} said. But the seed did not grow."],
    ["\"Be patient,\" said {f}. \"A seed needs water, sun and time.\" So {h} waited.", "{^f} came by. \"It will never grow,\" said {f}. But {h} did not listen and gave it water every day.",
     "\"You must be patient,\" said {h.his} {m.kind}. \"Good things take time.\" Every morning {h} brought water, and every evening {h.he} said good night to the seed."],
    ["After many days, a tiny green leaf came out of the ground. \"Look, look!\" shouted {h}. \"It is growing!\"", "Then the rain came, and then the sun came. And one morning there was a small green plant. {^h} was so happy that {h.he} danced around it.",
     "One week went by, and then two. And there it was, a little green tip! {^h} ran to tell {f}."],
    ["The plant grew and grew. It grew as tall as {h}, and then as tall as the house. In the summer it was full of {food}.", "In the end, it was the biggest sunflower anyone had ever seen. [Bees|Birds] came from far away to visit it.",
     "It became a beautiful tree with {color} flowers. Everyone {inp} came to look at it and sat down in its shade."],
    ["?", "{^h} gave some to {f} and some to {h.his} {m.kind}, and kept the new seeds for next year.", "\"Now I know what was in the seed,\" said {h}. \"A whole summer!\"", "\"You were right,\" said {f}. \"I am glad that you did not give up.\""]],
    ["Good things take time.", "If you are patient, small things can become great.", "Whoever takes good care of a seed will have a tree one day.", "{^h} learned how to wait."])

plot("stranger", "ls", ["making friends", "a new friend", "not judging others"], ["{h.who} who met {b.who}", "{h.who} and {b.who}", "a new friend"], [
    ["{T}, a stranger came to live {inp}. It was {b}. Everyone was afraid of {b.him}. \"[Stay away|Be careful],\" they said. \"{^b.he} will [eat you up|hurt you].\"",
     "Not far away there lived {b}. Nobody ever went there, because everyone was afraid. {T}, {h} came too close and saw {b.him}.",
     "{T}, {h} met {b} {inp}. {^b.he} was so big that {h} wanted to run away. But {b} did not look angry. {^b.he} looked sad."],
    ["{^h} hid {spot1} and watched. {^b} was sitting all alone, and {b.he} was crying.", "\"Please do not run away,\" said {b} softly. \"Everyone runs away from me. I only want a friend.\"",
     "{^h} was afraid, but {h.he} was also curious. \"Why are you so sad?\" asked {h}. \"Because I am always alone,\" said {b}."],
    ["{^h} thought about it. Then {h.he} {h.went} closer and said, \"Hello, I am {h.selfname}. Would you like to play with me?\" {^b} could not believe {b.his} ears.", "\"I know how that feels,\" said {h}. \"I can be your friend.\" {^b} smiled for the first time in a long while.",
     "{^h} gave {b.him} some {food}. {^b} ate slowly and said, \"Nobody has ever been so nice to me.\""],
    ["They played all day. {^b} could {talent}, and {h} laughed and laughed.", "{^b} showed {h} {b.his} home. There were {sights} all around, and it was very pretty. They talked until evening.",
     "{^h} found out that {b} was not dangerous at all. {^b.he} loved [music|flowers|stories|little birds], just like {h}."],
    ["?", "Then {h} told the others about {b}. At first they did not believe {h.him}.", "{^f} saw them together and was very surprised. \"Is {b.he} not dangerous?\" {f.he} asked. \"No,\" said {h}. \"{^b.he} is my friend.\""],
    ["Soon after, there was a great storm, and [a tree|a big rock] fell on the path. Nobody could get home. Then {b} came and lifted it away as if it were a feather. \"Thank you!\" everyone shouted. And nobody was afraid any more.",
     "The next week, {h} made a party and invited {b} and everyone else. They ate, they sang, and they danced. \"We were wrong about you,\" said {f} to {b}. \"We are sorry.\"",
     "From then on, {b} was never alone again. Every day somebody came to visit."]],
    ["You should not be afraid of someone just because he looks different.", "Look at the heart and not at the teeth.", "A friendly word can make a new friend.", "Everyone needs a friend."])

plot("noise", "l", ["a mystery", "a strange sound", "being curious"], ["{h.who} and a strange noise", "a mystery"], [
    ["{T}, {h} heard a strange sound. [Tap, tap, tap|Swish, swish|Bump, bump|Crunch, crunch], it went. It came from {place}.", "{T}, just before bedtime, {h} heard something. [Scratch, scratch|Knock, knock|Hum, hum], it went. \"What is that?\" asked {h}."],
    ["\"Maybe it is [a monster|a ghost|a thief],\" said {f}. \"Let us hide!\" But {h} wanted to know what it was.", "{^h} woke up {f}. \"Do you hear that?\" {h.he} whispered. {^f} listened. \"Yes,\" said {f}, and {f.his} eyes grew big.",
     "{^h} looked at {f}. {^f} looked at {h}. \"Let us go and see,\" said {h}, \"but very quietly.\""],
    ["They took @ {lamp} and went outside. They looked {spot1}. Nothing. They looked {spot2}. Nothing. The sound became louder.", "On tiptoe they went {top}. The wind blew and the moon was shining. There it was again, quite close!",
     "{^h} went first and {f} came after. With every step, their hearts beat faster."],
    ["And there, {spot3}, sat {s}. {^s.he} was [cracking nuts|building a new house|learning to play the drum|looking for {s.his} glasses]. \"Oh, did I wake you up?\" asked {s}.", "{spot3} they found {s}. \"Good evening,\" said {s}. \"I cannot sleep, so I am [sweeping|cooking|dancing] a little.\"",
     "It was not a monster at all. It was only {s}, who was stuck {spot3} and was knocking for help."],
    ["{^h} and {f} began to laugh. \"And we thought you were a monster!\" said {h}.", "They helped {s}, and then {s} gave them some {food}. \"Come again,\" {s.he} said, \"but come by day!\"", "\"We were so afraid of you,\" said {f}. \"Of me?\" said {s}. \"But I am so small!\" Then all three laughed until their tummies hurt."],
    ["?", "After that, whenever {h} heard the sound at night, {h.he} smiled and went back to sleep.", "Then they all went home and slept until morning."]],
    ["Things are often less scary when you know what they are.", "It is good to look before you are afraid.", "The night is full of small surprises.", "A brave heart finds new friends, even in the dark."])

plot("gift", "l", ["giving", "a gift", "love"], ["{h.who} who wanted to give a gift", "a gift for {h.s} {m.kind}"], [
    ["{T}, {h} wanted to give {h.his} {m.kind} a gift. But {h.he} had no money at all.", "It was almost the birthday of {h.s} {m.kind}. {T}, {h.he} went to the market to look for a gift. There was @ {obj}, but it cost far too much."],
    ["\"What can I do?\" said {h}. {^h.he} sat down {spot1} and thought.", "{^h} counted {h.his} coins. One, two, three. It was not enough. {^h.he} [sighed|was very sad].", "{^h} asked {f}, \"What would you give somebody you love?\" \"Something from the heart,\" said {f}."],
    ["\"You could make something yourself,\" said {f}. {^h} liked that idea very much.", "Then {h.he} had an idea. {^h.he} would make @ {thing2}! {^f} wanted to help.", "\"I can help {o} and earn some money,\" thought {h}. So {h.he} worked for {o} all week. {^h.he} carried water and swept the yard."],
    ["{^h} collected {collect} {inp}. {^h.he} worked on it [for three days|until late at night|every afternoon] and told no one.", "It was not easy. {^h.he} had to start again two times. But {f} helped, and in the end it was beautiful.", "At last the gift was ready. {^h} put it into @ {color} box with a ribbon."],
    ["On the day of the birthday, {h} gave it to {h.his} {m.kind}. {^m.he} opened it, and there were tears in {m.his} eyes. \"This is the most beautiful gift I have ever had,\" {m.he} said.", "\"Did you make this for me?\" asked {h.his} {m.kind}. {^h} nodded. {^m.he} took {h} in {m.his} arms and held {h.him} for a long time.",
     "{^h.his} {m.kind} smiled. \"It is not important what a gift costs,\" {m.he} said. \"It is important that it comes from you.\""],
    ["?", "The gift stood by the window for many years, and everyone who came to visit had to see it.", "\"Can we make one more for {f}?\" asked {h}. And so they did."]],
    ["The best gifts come from the heart.", "Love is worth more than money.", "A small gift can make a big joy.", "You do not need money to make someone happy."])

plot("journey", "l", ["a journey", "helping grandmother", "being careful"], ["{h.who} who went on a journey", "{h.who} who brought @ {deliver} to {h.his} {g}"], [
    ["{T}, {h.s} {m.kind} said, \"Your {g} is sick. Please bring {g2} this {deliver}.\" {^h} [packed a bag|put on {h.his} warm scarf] and {h.went} away.", "{T}, {h} had to bring @ {deliver} to {h.his} {g}, who lived on the other side of {place}. It was a long way."],
    ["First {h.he} came to a river. The bridge was broken. \"How can I get to the other side?\" said {h}. Then {f} came. \"[Use my boat|We can lay a log across|I know a place where the water is low],\" said {f}. And so they crossed the water.", "{^h} {h.went} past {sight1} and past {sight2}. Then there were two paths. \"Left or right?\" asked {h}. {^f} was sitting there. \"Go left,\" said {f}, \"the right one is full of thorns.\""],
    ["?", "Then it began to rain. {^h} hid the {deliver} under {h.his} coat, so that it stayed dry.", "A little later, {h} met {s}. \"I am so hungry,\" said {s}. {^h} gave {s.him} some of {h.his} own bread. \"Thank you,\" said {s}. \"I will remember that.\"", "{^h} was tired, but {h.he} thought of {h.his} {g} and went on."],
    ["At last {h} saw the little house. {^h.he} knocked at the door. \"Come in,\" said a weak voice. {^h.his} {g} lay in bed, but when {g1} saw {h}, {g1} smiled.", "When the stars came out, {h} was there. \"You came all this way alone?\" asked {h.his} {g}. \"Not alone,\" said {h}. \"A friend helped me.\""],
    ["{^h} gave {g2} the {deliver}, and {h.he} made a fire and some tea. The next morning, {h.his} {g} felt much better.", "\"With such a good grandchild, I will be well very soon,\" said {h.his} {g}. And three days later, {g1} was dancing in the kitchen.", "They sat by the fire and {h.his} {g} told {h.him} a story. Soon {h} fell asleep in the big chair."],
    ["?", "On the way home, {h} brought {f} some {food} to say thank you.", "When {h} came home again, {h.his} {m.kind} was very proud of {h.him}."]],
    ["A long road is made of small steps.", "Whoever helps others will find help on the way.", "Love makes every road shorter.", "It is good to have friends along the way."])

plot("different", "ls", ["being different", "being yourself", "teasing"], ["{h.who} who was different", "{h.who} with {odd}"], [
    ["{h} was not like the others. {^h.he} had {odd}. [The others laughed at {h.him}.|The others called {h.him} names.] {T}, they did not let {h.him} play.", "{T}, the others laughed at {h}, because {h.he} had {odd}. \"You look so strange!\" they said."],
    ["{^h} went away and cried. \"I wish I looked like everyone else,\" {h.he} said.", "{^h} tried to hide it, but it did not work. {^h.he} felt [ugly and alone|very sad].", "\"Why am I so different?\" {h} asked {h.his} {m.kind}. \"You are special,\" said {h.his} {m.kind}. But {h} did not feel special."],
    ["Only {f} was kind to {h.him}. \"I like you just the way you are,\" said {f}.", "{^o} heard {h.him} crying. \"Wait and see,\" said {o}. \"One day you will be glad about it.\""],
    ["Then, one dark night, {s} got lost. Everyone looked for {s.him}, but nobody could find {s.him}. \"Let me try,\" said {h}. With {h.his} help they found {s} very quickly, just because {h.he} had {odd}!", "A few days later, the others were in trouble. They were caught {spot1} and could not get out. {^h} heard them. And just because {h.he} had {odd}, {h.he} could help them."],
    ["Everyone cheered for {h}. \"We are sorry that we laughed at you,\" they said. \"You are wonderful.\"", "\"Thank you,\" the others said, and they were ashamed. \"Will you play with us?\" {^h} smiled and said, \"I would love to.\"", "After that nobody laughed at {h} any more. They even wished that they had {odd} too."],
    ["?", "\"I told you so,\" said {f} and hugged {h.him}.", "{^h} looked into the water and saw {h.his} own face. For the first time, {h.he} liked what {h.he} saw."]],
    ["It is good to be different.", "What makes you different can make you strong.", "Be proud of who you are.", "Never laugh at others because of how they look."])

plot("three wishes", "ls", ["wishes", "magic", "being happy with what you have"], ["{h.who} who had three wishes", "a magic {ob}"], [
    ["{T}, {h} found an old {ob} {spot1}. When {h.he} touched it, it began to shine, and a voice said, \"You have three wishes.\"", "{T}, {h} helped {o} out of a deep hole. \"Thank you,\" said {o}. \"I am not what I look like. I can do magic. You have three wishes.\""],
    ["\"First, I wish for a mountain of {food},\" said {h}. And there it was! {^h} ate and ate, until {h.he} felt sick.", "\"I wish for a big house with a hundred rooms,\" said {h}. Poof! There stood the house. But it was empty and cold, and {h.his} steps sounded lonely."],
    ["\"Second, I wish to be as big as a tree,\" said {h}. And {h.he} grew and grew. But now {h.he} did not fit anywhere, and {h.his} friends were too small to play with.", "\"Second, I wish to be {richest},\" said {h}. And so it was. But now everybody wanted something from {h.him}, and nobody asked {h.him} to play.", "For the second wish, {h} wanted @ {obj2} that could talk. It talked all day and all night, and {h} could not sleep any more."],
    ["{^f} came and did not know {h.him} any more. \"Where is my friend?\" asked {f} sadly. {^h} was very sorry.", "{^h} missed {f}, and {h.he} missed {h.his} {m.kind} and {h.his} own little home."],
    ["There was only one wish left. {^h} thought for a long time. \"I wish that everything would be as it was before,\" {h.he} said.", "\"For my last wish,\" said {h}, \"I want my old life and my friends back.\""],
    ["There was a flash of light, and all was as before. {^h} ran to {f} and hugged {f.him}.", "And in a moment, {h} was back at home. {^h.his} {m.kind} was calling, \"Dinner is ready!\" {^h} had never been so glad."]],
    ["Be happy with what you have.", "The best things in life cannot be wished for.", "Friends are worth more than magic.", "{^h} did not need any more wishes."])

plot("storm", "l", ["a storm", "helping each other", "building a house"], ["{h.who} and the big storm", "a storm"], [
    ["{T}, dark clouds came up. The wind blew harder and harder, and then the storm was there. {^h} and {h.his} {m.kind} ran inside.", "{T}, there was thunder and lightning over {place}. The rain fell and fell. {^h} looked out of the window and was worried about {f}."],
    ["In the middle of the night, there was a loud crash. The wind had broken the roof of the house where {f} lived!", "When the storm was over, {f} had no home any more. \"Where shall I live now?\" cried {f}.", "In the morning, everything was wet, and {f} was standing outside. \"The storm took my house away,\" said {f}."],
    ["\"You can stay with us,\" said {h} at once. \"And tomorrow we will build a new house.\"", "{^h} put {h.his} own blanket around {f}. \"Do not cry,\" said {h}. \"We will help you.\""],
    ["The next morning, everyone came to help. {^o} brought wood, {s} brought nails, and {h} brought {food} for everybody.", "They worked together all day. {^h} carried stones, and {o} painted the door {color}. {^s} sang a song, so that the work went faster.", "Some brought wood and some brought straw. Even {s}, who was very small, helped as much as {s.he} could."],
    ["In the evening, the new house was ready. It was even nicer than the old one. \"How can I ever thank you?\" asked {f}. \"You would do the same for us,\" said {h}.", "After three days, {f} had a new home with @ {color} door. They had a big party, and they danced until the stars came out."],
    ["?", "And when the next storm came, the house stood strong, and they all sat inside and drank hot tea.", "{^f} gave {h} a key. \"My house is your house,\" {f.he} said."]],
    ["A storm can take a house, but it cannot take your friends.", "Together you can build everything again.", "Friends help when help is needed.", "After every storm, the sun comes back."])

plot("play day", "ls", ["a happy day", "playing together", "friends"], ["{h.who} and {f.who}", "{h.who} and a happy day"], [
    ["{T}, {h} woke up early. {^weather}. \"What a lovely day!\" said {h}. {^h.he} wanted to play with {f}.", "{T}, {f} came to visit {h}. \"Do you want to play with me?\" asked {f}. \"Yes!\" said {h}."],
    ["They {wentto} {place}. There were {sights} everywhere. They played hide and seek. {^h} hid {spot1}, and {f} looked and looked.", "First they played with @ {obj}. Then they looked for {collect}. {^h} found three, and {f} found five."],
    ["Then {f} said, \"I have an idea. Let us {game}!\" {^h} liked the idea, and so they did.", "After a while, they were hungry. {^f} had brought some {food}. They sat down {spot2} and ate them all.", "Then they both wanted the {obj} at the same time. \"It is my turn,\" said {h}. \"No, it is mine,\" said {f}. They were angry for a little while. But then {h} said, \"You can have it first.\" And all was well again."],
    ["?", "A little later, {s} came by. \"May I play too?\" asked {s}. \"Of course,\" they said, and then they were three.", "Suddenly {f} began to laugh, because there was something on {h.s} nose. It was a small {color} butterfly."],
    ["When the sun went down, they were tired. \"See you tomorrow,\" said {f}. \"See you tomorrow,\" said {h}.", "In the evening, {h.s} {m.kind} called. \"It is time to come home!\" {^h} waved goodbye to {f} and {h.went} home. {^h.he} fell asleep with a smile."]],
    ["A day with a friend is a good day.", "You do not need much to be happy.", "Playing together is more fun than playing alone.", "It was a day that they never forgot."])

plot("treasure", "ls", ["a treasure", "an adventure", "friendship"], ["{h.who} who looked for a treasure", "a treasure map", "an adventure of {h.who} and {f.who}"], [
    ["{T}, {h} found an old map {spot1}. There was @ {color} cross on it. \"It is a treasure map!\" said {h}. {^h.he} showed it to {f}.", "{T}, {o} told {h} about a treasure that was hidden {inp}. \"Nobody has ever found it,\" said {o}. {^h} [{h.went} to {f}|called {f}], and together they began to search."],
    ["The map led them past {sight1} and past {sight2}. \"Ten steps to the left,\" read {h}. They counted the steps.", "They {wentto} {place}. It was a long way, and {f} was afraid. \"We should go back,\" said {f}. \"Only a little more,\" said {h}."],
    ["Then they came to a dark cave. Inside sat {b}. \"Who are you?\" asked {b} with a deep voice. \"Please, we are only looking for the treasure,\" said {h}. \"If you can answer my riddle, you may go on,\" said {b}. \"{riddle_q}\" {^h} thought for a moment. \"{riddle_a}!\" {h.he} said. \"That is right,\" said {b}, and let them go.", "Suddenly the way was blocked by a huge stone. They pushed and pushed. \"It is too heavy,\" said {f}. Then {b} came along and pushed it away with one {b.hand}. \"Thank you,\" they said. \"Come with us!\""],
    ["{spot2} they began to dig. They dug and dug, and there was an old box! {^h} opened it slowly.", "At last they came to the cross. There was a box {spot3}. Their hearts beat fast when they opened it."],
    ["There was no gold in it. There was only a letter. {^h} read it out: \"The greatest treasure is the friend who came with you.\" {^h} looked at {f}, and they both smiled.", "It was full of [golden coins|shining stones|pearls]. They shared everything and gave a part to {o}, who was very poor.", "In the box there was @ {obj}, and it shone like the sun. \"It belongs to both of us,\" said {h}. From then on, they took turns."]],
    ["The greatest treasure is a good friend.", "An adventure is best when you share it.", "Courage and friendship are worth more than gold.", "They told the story of that day for many years."])

plot("ill mood", "ls", ["feelings", "being angry", "saying sorry"], ["{h.who} who was angry", "two friends who had a fight"], [
    ["{T}, {h} and {f} had a fight. They both wanted to play with the {obj}. They pulled and pulled, until it broke.", "{T}, {h} woke up in a bad mood. Everything was wrong. {^h.he} shouted at {f}, although {f} had done nothing bad."],
    ["\"You are not my friend any more!\" said {h}. {^f} went away without a word.", "{^f} was hurt. \"Why are you so mean to me?\" {f.he} asked and went home."],
    ["{^h} sat alone {spot1}. First {h.he} was still angry. Then {h.he} was sad.", "The day was long and boring. {^h} tried to play alone, but it was no fun. {^h.he} missed {f}."],
    ["\"What is wrong?\" asked {o}. {^h} told {o.him} about the fight. \"An angry word is quickly said,\" said {o}, \"but a kind word can mend it.\"", "\"I know what you need,\" said {h.his} {m.kind}. \"You need three little words.\" \"Which words?\" asked {h}. \"I am sorry,\" said {h.his} {m.kind}."],
    ["So {h} {h.went} to {f}. At the same time, {f} was on the way to {h}. They met in the middle. \"I am sorry!\" they both said at the same time, and then they had to laugh.", "{^h} took a deep breath and knocked at {f.s} door. \"I am sorry that I was so mean,\" said {h}. \"Will you be my friend again?\" \"I never stopped,\" said {f}."],
    ["They mended what was broken and played until it was dark.", "They shared some {food} and everything was good again.", "After that, they still had a fight now and then, but they never forgot to say sorry."]],
    ["It is never too late to say sorry.", "Everyone is angry sometimes. But friends can forgive.", "A kind word can mend a broken heart.", "Friends are friends, even after a fight."])

plot("cannot sleep", "l", ["bedtime", "the night", "going to sleep"], ["{h.who} who could not sleep", "a bedtime story about {h.who}"], [
    ["It was late, and the stars were shining, but {h} could not sleep. {^h.he} turned to the left, and {h.he} turned to the right.", "Every night, {h} had to go to bed, and every night {h.he} said, \"I am not tired!\" But {T}, {h.he} really could not sleep."],
    ["\"Count sheep,\" said {h.his} {m.kind}. So {h} counted: one sheep, two sheep, three sheep. But the sheep began to dance, and {h} was wide awake.", "{^h} drank a glass of milk. It did not help. {^h.he} hugged {h.his} {obj}. It did not help."],
    ["So {h} looked out of the window. There sat {f}. \"Are you not sleeping?\" asked {h}. \"No,\" said {f}. \"I am looking at the moon.\"", "{^h} tiptoed outside. The grass was cool, and the moon was big and round. {^f} was there too. \"I cannot sleep either,\" said {f}."],
    ["Together they looked at the stars. \"That one looks like @ {ob},\" said {h}. \"And that one looks like @ {fruit},\" said {f}.", "{^f} sang a soft song about the wind and the sea. {^h} listened, and {h.his} eyes became heavy.", "\"Shall I tell you a story?\" asked {f}. And {f.he} told a story about a star that fell into {place} and had to find its way back to the sky."],
    ["{^h} yawned. {^f} yawned too. \"Good night,\" said {h}. But {f} was already asleep.", "When {h.his} {m.kind} came, {h} was fast asleep. {^m.he} carried {h.him} to bed and kissed {h.him} good night."]],
    ["Even the longest night has a morning.", "And the moon watched over them until the morning.", "Sweet dreams come to those who wait quietly.", "A song from a friend is the best pillow."])

FEARS = {"l": ["the dark", "thunder", "deep water", "high places", "big dogs", "loud noises", "the cellar", "the old bridge"], "s": ["the dark", "deep water", "loud noises", "the big waves", "the black cave"]}
RIDDLES = [("What has a neck but no head?", "A bottle"), ("What has teeth but cannot bite?", "A comb"), ("What has hands but cannot clap?", "A clock"), ("What gets wet while it dries?", "A towel"),
           ("What goes up but never comes down?", "Your age"), ("What has one eye but cannot see?", "A needle"), ("What has legs but cannot walk?", "A table"), ("What runs but has no feet?", "A river"),
           ("What has keys but opens no door?", "A piano"), ("What is full of holes but holds water?", "A sponge")]
ODD = ["very big ears", "a very long nose", "one blue eye and one green eye", "very long legs", "@ {color} spot on the head", "a very loud voice", "{color} stripes", "very small feet", "a voice like a trumpet", "eyes that shone in the dark"]
BREAKABLE = "vase cup lamp plate jar bowl teapot clock mirror picture".split()
COLLECT = ["colorful stones", "white shells", "bright feathers", "soft moss", "red leaves", "little sticks", "wild flowers"]
GAMES = {"l": ["build a castle", "jump over the puddles", "climb the hill", "make a boat of leaves", "dance in the rain", "look for frogs", "play catch", "roll down the hill", "build a tree house"],
         "s": ["race to the big rock", "build a castle", "blow bubbles", "look for pearls", "play catch", "dance in the waves"]}
TALENTS = ["tell funny jokes", "sing beautiful songs", "make big bubbles", "do wonderful tricks", "dance on one leg", "tell old stories"]
OPEN = [
    "Once upon a time, there was {h.intro}. {^h.he} lived in {h.home} {inp}.", "Once upon a time, there was {h.intro} who lived {inp}.", "Once upon a time, {inp}, there lived {h.intro}.",
    "Once upon a time there was {h.intro}. {^h} lived in {h.home}.", "Once upon a time, {prep} @ {padj} {pname}, there lived {h.intro}.",
    "There was once {h.intro}. {^h.he} lived in {h.home} {inp}.", "There once was {h.intro} who lived in {h.home}.", "Once there was {h.intro}.",
    "Long ago, {ina}, there lived {h.intro}.", "Long, long ago, there was {h.intro} who lived {ina}.", "{^ina}, there lived {h.intro}.", "{^ina}, there was {h.home}. {^h.intro} lived there.",
    "Far away, behind the [hills|seven hills|blue mountains], there lived {h.intro}.", "In {h.home} {inp} lived {h.intro}.", "Not so long ago, {h.intro} lived {inp}.",
    "{^h.intro} lived {ina}. All around there were {sights}.", "A long time ago, there was {h.intro}. {^h.he} had {h.feat2}.", "This is the story of {h.intro}. {^h.he} lived {ina}.",
    "Do you know the story of {h.intro}? It goes like this.", "Have you ever heard of {h.intro}? {^h.he} lived {ina}.", "Many years ago, {h.intro} lived in {h.home} {inp}."]
OPEN_DAY = ["One day, {h.intro} [was {h.going} {inp}|sat {inp} and looked at the sky|went out to play].", "It was @ [sunny|warm|bright|windy|quiet] day, and {h.intro} was {h.going} {inp}.",
            "One morning, {h.intro} looked out of the window. {^weather}.", "It was @ [lovely|beautiful|wonderful] [morning|afternoon] {inp}. {^weather}. {^h.intro} was very happy.", "{^weather}, and {h.intro} was {h.going} {inp}.",
            "One [summer|spring|autumn] day, {h.intro} wanted to go out and play."]
OPEN_PAIR = ["{^h.intro} and {f} were [good|best] friends. They lived {ina}.", "Once upon a time, there were two friends, {h.intro} and {f}. They lived {ina}.", "{^h.intro} and {f} lived {ina}. They [played together every day|did everything together|were always together]."]
OPEN_NAMED = ["{h.name} was @ {h.desc}. {^h.he} lived {inp}.", "{h.name} was @ {h.desc} with {h.feat2}. {^h.he} lived in {h.home}.", "{h.name} was @ {h.desc} who lived {ina}.",
              "{h.name} lived in {h.home} {inp}. {^h.he} was @ {h.desc}.", "{h.name} the {h.kind} lived {ina}."]
OPEN_PLAIN = ["The {h.desc} lived in {h.home} {inp}.", "The {h.desc} lived {ina}. {^h.he} had {h.feat2}.", "The {h.desc} had {h.feat2}, and everyone {inp} knew {h.him}.", "The {h.desc} was at home {ina}."]
TRAIT = ["{^h} was very {trait}, and {traitline}.", "{^h.he} was {trait}. {traitline}.", "{traitline}.", "Everyone said that {h} was {trait}.", "{^h} was a very {trait} {h.kind}. {traitline}."]
FRIEND = ["{^h.his} best friend was {f}.", "{^h.he} had a good friend. It was {f}.", "Next door lived {f}. The two were good friends.", "{^h.his} best friend was {f}. They did everything together."]
SCENE = ["{^weather}.", "{^weather}, and {weather2}."]
LESSON = ["{L}"] * 4 + ["[So|In the end,] {h} learned something [important|new] that day. {L}", "{h} never forgot that day. {L}", "{h} thought about it for a long time. {L}",
                        "\"[Now I know|I have learned something],\" said {h}. \"{L}\"", "{h.s} {m.kind} said, \"{L}\"", "And the moral of the story is: {L}"]
ENDS = ["And they all lived happily ever after.", "The end.", "And if they have not gone away, they still live there today.", "And so {h} lived happily {inp}.", "From that day on, {h} and {f} were the best of friends.",
        "That night, {h} slept well and had sweet dreams.", "And {h} was happy.", "And everyone was happy again.", "And that is the end of the story.", "And then {h} went home, tired but happy.",
        "And from then on, {h} smiled a little more every day.", "From that day on, everything was better.", "And they were friends for the rest of their lives."]

KIN = [("mother", "Mom", "she"), ("mother", "Mother", "she"), ("mother", "Mom", "she"), ("father", "Dad", "he"), ("father", "Father", "he"), ("grandmother", "Grandma", "she"),
       ("grandfather", "Grandpa", "he"), ("aunt", "Auntie", "she"), ("uncle", "Uncle", "he")]
KIN_GROWN = [("wife", "My dear", "she"), ("sister", "Sister", "she"), ("brother", "Brother", "he"), ("neighbor", "Neighbor", "she"), ("neighbor", "Neighbor", "he")]
KIN_MADE = [("old teacher", "Teacher", "he"), ("old teacher", "Teacher", "she"), ("neighbor", "Neighbor", "she"), ("neighbor", "Neighbor", "he")]
WISE_L = [("old", "owl"), ("old", "turtle"), ("wise", "owl"), ("old", "woman"), ("old", "man"), ("old", "badger"), ("gray", "donkey"), ("old", "goat"), ("kind", "fairy"), ("old", "bear"), ("wise", "raven"),
          ("old", "gardener"), ("friendly", "baker"), ("old", "shepherd"), ("old", "wizard"), ("kind", "farmer"), ("old", "crow"), ("old", "horse"), ("white", "swan"), ("old", "elephant")]
WISE_S = [("old", "turtle"), ("old", "whale"), ("wise", "octopus"), ("old", "crab"), ("kind", "mermaid"), ("old", "seal")]
EXTRA = {"woman": ("she", "walk"), "man": ("he", "walk"), "raven": ("he", "fly")}
SCARY_L = "dragon giant bear wolf lion crocodile monster troll tiger snake rhino robot ghost".split()
SCARY_S = "shark whale octopus crocodile monster".split()


class Extra:
    def __init__(self, name, g, mv):
        self.__dict__.update(name=name, realm="l", moves=[mv], foods=["bread", "soup"], feats=["bright eyes"], hands="hands" if mv == "walk" else "wings", young="", size="m", gender=[g], being=False, grown=True,
                             home="a small house" if mv == "walk" else "a tall tree")


for _n, (_g, _m) in EXTRA.items():
    BY_NAME[_n] = Extra(_n, _g, _m)


def who(c):
    return "@ " + c.desc + (" named " + c.name if c.name else "")


class Story:
    """The people and things of one story, and its text."""

    def __init__(self, r, hero=None, name=None, plot=None, realm=None):
        self.r = r
        self.used_kinds, self.used_names = set(), set()
        self.plotname = plot
        if hero is None:
            x = r.random()
            if x < 0.36:
                hero = CHILD["he" if r.random() < 0.5 else "she"]
            elif x < 0.42:
                hero = pick(r, SEA)
            else:
                hero = pick(r, LAND)
        self.realm = "s" if hero.realm == "s" else "l"
        self.ctx = {}
        c = self.ctx
        self.place = pick(r, PLACES[self.realm])
        adjs = GROWN_ADJ if hero.grown else BIG_ADJ if hero.size == "b" else BASE_ADJ
        self.trait = pick(r, TRAIT_NAMES)
        self.adj = pick(r, adjs) if r.random() < 0.8 else self.trait
        h = self.h = self.person(hero, named=0.62, adj=self.adj, name=name)
        if h.child:
            h.d["home"] = "a small room" if self.place.name == "castle" else self.place.home
        kin = KIN_GROWN if hero.grown else KIN_MADE if hero.name in NO_MOTHER else KIN
        kin = [k for k in kin if not (k[0] == "wife" and h.g == "she")]
        c["m"] = Elder(r, h, *pick(r, kin))
        c["h"] = h
        c["f"] = self.friend(h)
        self.set_place(self.place)
        self.seen_friend = False

    def person(self, kind, named, adj=None, name=None, g=None):
        r = self.r
        self.used_kinds.add(kind.name)
        g = g or pick(r, kind.gender)
        if kind.name in ("boy", "girl"):
            adj = adj if adj in ("little", "young", "small", "happy", "funny") or (adj in TRAITS and r.random() < 0.5) else pick(r, ["little", "little", "young", "small", ""])
            while name is None or name in self.used_names:
                name = pick(r, BOYS if g == "he" else GIRLS)
        elif name is None and r.random() < named:
            while name is None or name in self.used_names:
                name = pick(r, PETS) if not kind.grown and r.random() < 0.75 else pick(r, BOYS if g == "he" else GIRLS if g == "she" else PETS)
        if name:
            self.used_names.add(name)
            if g == "it":
                g = "he" if r.random() < 0.5 else "she"
        if adj is None:
            adj = pick(r, GROWN_ADJ if kind.grown else BIG_ADJ if kind.size == "b" else BASE_ADJ + ["friendly", "clever", "kind", "cheerful", "brown", "white", "black", "gray"][:4])
        c = Ch(r, kind, name, g, adj)
        c.d["name"] = name or ""
        c.d["desc"] = c.desc
        c.d["who"] = who(c)
        c.d["selfname"] = name or "the " + kind.name
        return c

    def other(self, pool, **kw):
        r = self.r
        while True:
            k = pick(r, pool)
            if k.name not in self.used_kinds:
                return self.person(k, **kw)

    def friend(self, h):
        r = self.r
        other = "she" if h.g == "he" else "he"
        if self.realm == "l" and r.random() < (0.6 if h.child else 0.15):
            g = other if r.random() < 0.75 else h.g if h.g != "it" else other
            f = self.person(CHILD[g], 1, g=g)
        else:
            pool = SEA if self.realm == "s" else SMALL_LAND
            f = self.other(pool, named=0.6)
            if f.g == h.g and r.random() < 0.7 and len(f.k.gender) > 1:
                f2 = self.person(f.k, 1 if f.name else 0, adj=f.adj, g=other)
                f = f2
        return f

    def set_place(self, p):
        r, c = self.r, self.ctx
        self.place = p
        c["pname"] = p.name
        c["place"] = "the " + p.name
        c["inp"] = p.prep + " the " + p.name
        c["top"] = "to the " + p.name
        c["prep"] = p.prep
        c["padj"] = pick(r, PLACE_ADJ)
        c["ina"] = p.prep + " @ " + (c["padj"] + " " if r.random() < 0.8 else "") + p.name
        si = r.sample(p.sights, 2)
        c["sights"] = si[0] if r.random() < 0.5 else si[0] + " and " + si[1]
        c["sight1"], c["sight2"] = "the " + si[0], "the " + si[1]

    def setup_plot(self, first):
        """Fresh people and things for the next plot."""
        r, c = self.r, self.ctx
        if not first:
            self.used_kinds = {self.h.k.name, c["f"].k.name}
            if r.random() < 0.3:
                c["f"] = self.friend(self.h)
            if r.random() < 0.7:
                self.set_place(pick(r, PLACES[self.realm]))
        p = self.place
        sp = r.sample(p.spots, 3)
        c["spot1"], c["spot2"], c["spot3"] = sp
        while True:
            c["ob"] = pick(r, SMALL_THINGS)
            a, b = pick(r, THING_ADJ), pick(r, COLORS)
            c["obj"] = (a + " " if r.random() < 0.7 or a in COLORS else (a + " " + b + " ")) + c["ob"]
            c["obj2"] = "@ " + pick(r, THING_ADJ) + " " + pick(r, SMALL_THINGS)
            if "wooden" not in c["obj"] or c["ob"] not in ("scarf", "ribbon", "mitten", "feather", "balloon", "leaf"):
                break
        c["obj2"] = c["obj2"][2:]
        c["thing2"] = pick(r, ["picture", "necklace of shells", "warm scarf", "little wooden box", "garland of flowers", "bowl of clay", "lantern of paper", "soft pillow"])
        c["lamp"] = pick(r, ["lantern", "candle", "small lamp", "flashlight"])
        c["color"] = pick(r, COLORS)
        c["food"] = pick(r, FRUITS)
        c["fruit"] = pick(r, ["pear", "plum", "cherry", "banana", "nut", "carrot", "pumpkin"])
        c["learn"], c["learned"] = pick(r, LEARN)
        c["fear"] = pick(r, FEARS[self.realm])
        c["odd"] = say(pick(r, ODD), c, r).lower()
        c["breakable"] = pick(r, BREAKABLE)
        c["hideplace"] = pick(r, ["under the bed", "under the carpet", "behind the curtain", "in a dark corner", "in the garden", "behind the stove"])
        c["missing"] = pick(r, ["sugar", "milk", "honey", "butter", "salt", "chocolate"])
        c["collect"] = pick(r, COLLECT)
        c["game"] = pick(r, GAMES[self.realm])
        c["talent"] = pick(r, TALENTS)
        c["riddle_q"], c["riddle_a"] = pick(r, RIDDLES)
        c["deliver"] = pick(r, ["basket of food", "pot of soup", "jar of honey", "letter", "warm blanket", "bottle of medicine", "bag of apples"])
        c["g"], c["g1"], c["g2"] = pick(r, [("grandmother", "she", "her"), ("grandfather", "he", "him"), ("aunt", "she", "her"), ("uncle", "he", "him")])
        c["richest"] = "the richest " + self.h.k.name + " in the world"
        c["inhome"] = "in " + self.h.d["home"]
        c["searched"] = pick(r, ["searched", "looked", "looked and looked"])
        swim = self.realm == "s"
        c["wentpast"] = "swam past" if swim else pick(r, ["walked past", "went past"])
        c["wentto"] = "swam to" if swim else pick(r, ["went to", "ran to", "walked to"])
        c["wentover"] = "came over" if swim else pick(r, ["walked over", "ran over", "came over"])
        w = WEATHER_S if swim else WEATHER
        c["weather"], c["weather2"] = r.sample(w, 2)
        while True:
            a, k = pick(r, WISE_S if swim else WISE_L)
            if k not in self.used_kinds:
                break
        c["o"] = self.person(BY_NAME[k], 0.25, adj=a)
        c["s"] = self.other(SEA if swim else SMALL_LAND, named=0.4)
        c["b"] = self.other([BY_NAME[x] for x in (SCARY_S if swim else SCARY_L)], named=0.4, adj=pick(r, ["big", "huge", "large", "old", "lonely"]))

    def choose_plot(self, avoid):
        """The first plot often suits the hero; a later one follows a few steps behind the last in the list."""
        r = self.r
        fits = lambda n: self.realm in PLOTS[n]["realm"] and n not in avoid and not (self.h.k.grown and n in ("far from home", "telling the truth"))
        if not avoid and r.random() < 0.55:
            n = pick(r, SUITS[self.adj if self.adj in SUITS else self.trait])
            if fits(n):
                return n
        if avoid:
            i = PLOT_NAMES.index(avoid[-1])
            ok = [n for n in (PLOT_NAMES[(i + 1 + k) % len(PLOT_NAMES)] for k in range(8)) if fits(n)]
            return pick(r, ok[:4])
        while True:
            n = pick(r, PLOT_NAMES)
            if fits(n):
                return n

    def he(self, t):
        """Now and then "she liked" in place of "Lily liked"."""
        return "{h.he}" + t[3:] if t.startswith("{h} ") and self.r.random() < 0.6 else t

    def opening(self, opt):
        r, c, h = self.r, self.ctx, self.h
        out = []
        x = r.random()
        if h.name and x < 0.25:
            t = pick(r, OPEN_NAMED)
        elif not h.name and x < 0.25:
            t = pick(r, OPEN_PLAIN)
        elif x > 0.95:
            t = pick(r, OPEN_PAIR)
        elif x > 0.83:
            t = pick(r, OPEN_DAY)
            c["T"] = pick(r, ["that day", "that day", "a little later", "later that day", "on that day", "then"])
        else:
            t = pick(r, OPEN)
        s = self.say(t)
        h.seen = True
        out.append(s)
        c["trait"] = self.trait
        c["traitline"] = self.he(pick(r, TRAITS[self.trait]))
        if r.random() < opt and self.adj != self.trait:
            out.append(self.say(pick(r, TRAIT)))
        elif r.random() < opt:
            out.append(self.say(c["traitline"] + "."))
        if r.random() < opt * 0.7:
            out.append(self.say(self.he(pick(r, HOBBIES)) + "."))
        if r.random() < opt * 0.4 and not c["f"].seen:
            out.append(self.say(pick(r, FRIEND)))
        return " ".join(out)

    def say(self, t):
        return say(t, self.ctx, self.r)

    def text(self, episodes=1, opt=0.6, sep=None, chapters=False):
        r, c = self.r, self.ctx
        if sep is None:
            sep = "\n\n" if r.random() < 0.4 else " "
        paras = []
        done = []
        for e in range(episodes):
            self.setup_plot(e == 0)
            name = self.plotname if e == 0 and self.plotname else self.choose_plot(done)
            done.append(name)
            p = PLOTS[name]
            self.plot = p
            c["T"] = pick(r, DAYTIMES if e == 0 else NEXTTIMES)
            c["T2"] = pick(r, ["one day", "one evening", "one morning"])
            head = self.opening(opt) if e == 0 else ""
            if e and not chapters:
                paras.append("\n")
            if chapters:
                paras.append("Chapter " + ["One", "Two", "Three", "Four", "Five"][e])
            for i, ph in enumerate(p["phases"]):
                if ph[0] == "?":
                    if r.random() > opt:
                        continue
                    ph = ph[1:]
                s = self.say(pick(r, ph))
                if i == 0:
                    if head:
                        if e == 0 and sep == " ":
                            s = head + " " + s
                        elif r.random() < 0.5:
                            s = head + " " + s
                        else:
                            paras.append(head)
                paras.append(s)
            last = e == episodes - 1
            if r.random() < (0.75 if last else 0.35):
                raw = pick(r, p["lessons"])
                c["L"] = self.say(raw)
                direct = raw.startswith(("{", "After", "They", "It was", "And"))
                paras.append(c["L"] if direct else self.say(pick(r, LESSON)))
        while True:
            end = pick(r, ENDS)
            if "{f}" not in end or c["f"].seen:
                break
        paras.append(self.say(end))
        # paragraphs: join a few of them now and then
        if sep == " ":
            if not chapters:
                return " ".join(paras).replace(" \n ", "\n\n")
        out = [paras[0]]
        new = False
        for x in paras[1:]:
            if x == "\n":
                new = True
            elif new or chapters and (sep != " " or x.startswith("Chapter ") or out[-1].startswith("Chapter ")) or sep != " " and r.random() < 0.55:
                new = False
                out.append(x)
            else:
                out[-1] += " " + x
        return "\n\n".join(out)

    def abouts(self):
        """What the story is about, in the words of somebody who asks for it."""
        r, c, h = self.r, self.ctx, self.h
        k = h.k.name
        if h.child:
            base = ["@ {h.kind} named " + h.name, "@ {h.kind} named " + h.name, "@ {h.kind}", "@ little {h.kind}", h.name]
        elif h.name:
            base = ["@ {h.kind}", "@ {h.kind}", "@ {h.kind} named " + h.name, h.name + " the {h.kind}", "@ {h.desc}"]
        else:
            base = ["@ {h.kind}"] * 3 + ["@ {h.desc}"] * 2
        x = r.random()
        if x < 0.62:
            t = pick(r, base)
        elif x < 0.72:
            t = pick(r, self.plot["themes"])
        elif x < 0.8:
            t = pick(r, base) + " and " + pick(r, self.plot["themes"])
        elif x < 0.9:
            f = c["f"]
            t = "@ {h.kind} and @ " + f.k.name if f.seen else "@ {h.kind}"
        else:
            h.d["who"] = "@ " + k + (" named " + h.name if h.name and r.random() < 0.4 else "")
            t = pick(r, self.plot["about"])
        return say("x " + t, c, r)[2:]


SUITS = {"kind": ["helping a hurt animal", "gift", "stuck"], "curious": ["noise", "treasure", "far from home"], "brave": ["treasure", "noise", "storm"], "shy": ["stranger", "different", "afraid"],
         "clever": ["treasure", "stuck", "three wishes"], "cheerful": ["play day", "baking", "storm"], "impatient": ["garden", "learning", "race"], "careless": ["lost thing", "telling the truth", "far from home"],
         "gentle": ["helping a hurt animal", "garden", "stranger"], "proud": ["race", "learning", "sharing"], "playful": ["play day", "lost thing", "telling the truth"], "lazy": ["cannot sleep", "learning", "three wishes"],
         "quiet": ["cannot sleep", "gift", "garden"], "lonely": ["stranger", "play day", "different"], "stubborn": ["ill mood", "sharing", "far from home"], "hardworking": ["journey", "gift", "garden"]}
TRAIT_NAMES = list(TRAITS)
PLOT_NAMES = list(PLOTS)
SMALL_LAND = [k for k in LAND if k.size != "b" and not k.grown and k.name not in ("crocodile", "wolf", "monster", "king", "queen", "snowman", "ghost", "troll")]


# ------------------------------------------------------------------ simple facts

THING_COLORS = {"the sky": "blue", "the grass": "green", "snow": "white", "a banana": "yellow", "a strawberry": "red", "the night": "black", "an orange": "orange", "a lemon": "yellow", "a tomato": "red",
                "the sun": "yellow", "the sea": "blue", "a carrot": "orange", "milk": "white", "chocolate": "brown", "a cloud": "white", "a leaf": "green", "a cherry": "red", "coal": "black", "a plum": "purple",
                "a pumpkin": "orange", "a frog": "green", "a crow": "black", "a swan": "white", "a fire truck": "red", "gold": "yellow", "a pig": "pink", "an elephant": "gray", "a polar bear": "white", "honey": "golden"}
OPPOSITES = "big small|hot cold|up down|good bad|happy sad|fast slow|old young|new old|day night|light dark|long short|high low|full empty|wet dry|soft hard|loud quiet|open closed|left right|near far|early late|strong weak|thick thin|rich poor|black white|clean dirty|easy difficult|first last|inside outside|brave afraid|sweet sour"
CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|England London|Japan Tokyo|China Beijing|Russia Moscow|Greece Athens|Egypt Cairo|Portugal Lisbon|Austria Vienna|Poland Warsaw|Sweden Stockholm|Norway Oslo
Denmark Copenhagen|Finland Helsinki|Ireland Dublin|Scotland Edinburgh|Belgium Brussels|Hungary Budapest|Turkey Ankara|Canada Ottawa|Australia Canberra|Cuba Havana|Peru Lima|Chile Santiago|Kenya Nairobi|Thailand Bangkok|Switzerland Bern
Ukraine Kyiv|Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|Serbia Belgrade|Iceland Reykjavik|Morocco Rabat|Vietnam Hanoi|Indonesia Jakarta|Iran Tehran|Iraq Baghdad|Jordan Amman|Ghana Accra|Senegal Dakar""".replace("\n", "|")
WHATIS = {"kite": "a toy that flies in the wind", "book": "a thing with many pages that you can read", "house": "a place where people live", "tree": "a very big plant with a trunk and leaves", "river": "a long stream of water that flows to the sea",
          "mountain": "a very high hill made of rock", "chair": "a thing that you can sit on", "bed": "a thing that you sleep in", "lamp": "a thing that gives light", "clock": "a thing that shows the time", "boat": "a thing that carries you over the water",
          "car": "a machine with four wheels that takes you from place to place", "bicycle": "a machine with two wheels that you ride", "train": "a row of wagons that runs on rails", "plane": "a machine that flies in the sky", "door": "a thing that you open to go into a room",
          "window": "an opening in the wall that lets the light in", "flower": "the pretty part of a plant", "garden": "a place where flowers and vegetables grow", "forest": "a place with many trees", "desert": "a dry place with a lot of sand", "island": "a piece of land with water all around it",
          "star": "a bright light in the night sky", "moon": "a round stone in the sky that shines at night", "cloud": "many tiny drops of water in the sky", "rainbow": "an arch of colors in the sky after the rain", "storm": "very bad weather with wind and rain", "friend": "somebody who likes you and helps you",
          "king": "a man who rules a country", "queen": "a woman who rules a country", "baker": "somebody who bakes bread and cakes", "farmer": "somebody who grows food and keeps animals", "doctor": "somebody who helps sick people", "teacher": "somebody who helps others to learn",
          "apple": "a round fruit that grows on a tree", "cake": "a sweet food that people eat on birthdays", "story": "something that you tell about people and what happened to them", "song": "words that you sing", "dream": "something that you see while you sleep", "school": "a place where children learn",
          "dragon": "a big animal in fairy tales that can fly and breathe fire", "robot": "a machine that can move and work", "computer": "a machine that can count very fast and remember many things", "wish": "something that you want very much", "umbrella": "a thing that keeps you dry in the rain",
          "hat": "a thing that you wear on your head", "shoe": "a thing that you wear on your foot", "spoon": "a thing that you eat soup with", "drum": "a thing that you hit to make music", "flute": "a thing that you blow to make music", "bridge": "a way to cross a river", "castle": "a big house with strong walls where kings lived"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LEGS = {"dog": "four", "cat": "four", "horse": "four", "cow": "four", "fox": "four", "bear": "four", "mouse": "four", "spider": "eight", "bee": "six", "ant": "six", "beetle": "six", "butterfly": "six", "duck": "two", "hen": "two", "sparrow": "two", "owl": "two", "snake": "no", "fish": "no", "elephant": "four", "lion": "four", "frog": "four", "rabbit": "four"}
COUPLETS = """The little {k} looked up so high|and saw a star up in the sky.
The {k} sat down beneath a tree|and sang a song for you and me.
The sun goes down, it is the night,|the {k} looks at the silver light.
The {k} goes out to run and play|and laughs and jumps the whole long day.
The little {k} had so much fun|out in the grass, out in the sun.
The wind blew soft, the wind blew low,|the {k} went walking in the snow.
The {k} woke up at half past eight|and hurried out and through the gate.
@ {color} flower, @ {color} bell,|the {k} has got a tale to tell.
The {k} went sailing on the sea|and came back home in time for tea.
The moon is round, the moon is bright,|the {k} says, "Moon, good night, good night."
The {k} has found @ {color} shoe,|it is too big, what can it do?
The rain comes down, the {k} gets wet,|but does not go home, no, not yet.
A friend is near, a friend is dear,|and so the {k} has naught to fear.
The {k} lies down and goes to bed|and dreams of cake and warm, sweet bread.
The {k} can dance, the {k} can sing,|it wears a crown just like a king.
Oh {k}, oh {k}, where do you go?|I walk wherever flowers grow.
The bird sings up, the bird sings down,|the {k} walks slowly through the town.
The {k} is small, the world is wide,|but it has got a friend inside.""".split("\n")
UNKNOWN = """a computer program|the weather tomorrow|quantum physics|the stock market|how to fix a car|the history of Rome|an email to my boss|machine learning|Python|Rust|a web server|football|politics|the best phone|cooking pasta|a good movie
the price of gold|chemistry|how engines work|a law|mathematics|music theory|the news|a poem in French|how to lose weight|the population of the world|the speed of light|a database|the internet|black holes|dinosaurs|the Second World War|electricity|how planes fly|large language models""".replace("\n", "|").split("|")
UNKNOWN_Q = ["Can you explain {x}?", "Tell me about {x}.", "What do you know about {x}?", "I need help with {x}.", "Explain {x} to me.", "Please explain {x} in simple words.", "What do you think about {x}?", "Help me with {x}.", "Do you know anything about {x}?", "Give me some facts about {x}.", "Summarize {x}."]
UNKNOWN_A = ["I am only a very small model, and I do not know about {x}. But I can tell you a story. Would you like one?", "I am sorry, I do not know anything about {x}. I am a little story model.", "That is too hard for me. I am a tiny model and I only know simple stories. Shall I tell you one?",
             "I do not know that. I can tell you a story about an animal, a child or a dragon.", "{^x}? That is too big for such a small model as me. But I know many stories."]
WORDS = """love time money water air fire light energy gravity music history science art war peace language music health sport gold oil iron glass paper math code software hardware data memory network server browser phone screen keyboard mouse pad engine battery
planet galaxy universe atom cell brain heart blood bone muscle virus plague vaccine economy bank tax price market stock crisis country president minister parliament election law court police army church religion god soul mind truth freedom justice beauty
happiness success failure fear anger hope death life birth age year century decade moment future past present number equation function algorithm loop variable string list array pointer thread lock kernel compiler parser token tensor matrix vector model
dataset paper essay letter email resume report summary article novel poem haiku song lyrics recipe menu budget plan schedule trip hotel flight ticket visa passport museum theater movie actor singer writer poet painter scientist engineer lawyer nurse chef
coffee tea wine beer bread pasta pizza rice cheese butter salad steak chicken sushi sugar salt diet exercise yoga running football tennis chess guitar piano camera photo video game puzzle riddle joke meme internet website blog password security privacy
weather climate rain wind ocean earthquake volcano desert mountain river lake continent Europe Asia Africa America London Paris Tokyo Berlin Einstein Newton Shakespeare Napoleon Caesar Mozart Beethoven Python Rust Java Linux Windows Google GPU CPU RAM""".split()
DOING = "write build make fix learn explain find cook draw solve use install debug sort count translate compare improve design create measure buy sell choose clean repair open close start stop delete print read parse compile train deploy test run".split()
SORTS = "good simple short fast new best old modern big cheap beautiful funny serious detailed quick formal common strange famous important".split()
STRANGE_A = ["I am only a very small model, and I do not know that. But I can tell you a story. Would you like one?", "I am sorry, I do not know the answer. I am a little story model.", "That is too hard for me. I am a tiny model, and I only know simple stories. Shall I tell you one?",
             "I do not know that. But I can tell you a story about an animal, a child or a dragon.", "I cannot do that. I am a very small model that tells stories.", "That is a good question, but I am too small to know the answer. Shall I tell you a story?"]


def strange_word(r):
    if r.random() < 0.75:
        return pick(r, WORDS)
    return "".join(pick(r, "b c d f g h k l m n p r s t v w z br ch st tr pl qu th".split()) + pick(r, "a e i o u ai ea oo y".split()) for _ in range(1 + int(r.random() * 3))) + pick(r, ["", "n", "s", "r", "x", "ck", "t"])


def strange(r):
    """A question that is far too hard, and the answer that says so."""
    w = lambda: strange_word(r) if r.random() < 0.7 else strange_word(r) + " " + strange_word(r) if r.random() < 0.6 else pick(r, SORTS) + " " + strange_word(r)
    x, y, v = w(), w(), pick(r, DOING)
    q = pick(r, ["Why is {x} {s}?", "Why is the {x} {s}?", "Why are {x} so {s}?", "Why do {x} {v} {y}?", "Why is the sky blue?", "Why is the sea salty?", "How do I {v} @ {x}?", "How do I {v} @ {x} in {y}?", "How can I {v} {x}?", "How does @ {x} work?", "How does {x} {v} {y}?", "How many {x} are there in {y}?",
                 "How much does @ {x} cost?", "How big is the {x}?", "How far is {x} from {y}?", "How long does it take to {v} @ {x}?", "Who was {x}?", "Who invented the {x}?", "Who wrote {x}?", "Who is the {x} of {y}?", "Who is the best {x}?", "When was {x} invented?", "When did {x} {v} {y}?", "When was the {x} of {y}?",
                 "Where is {x}?", "Where can I {v} {x}?", "What is {x}?", "What is {x}?", "What is {x}?", "What is the {x} of {y}?", "What is the {s} {x}?", "What is the best {x} for {y}?", "What is the difference between {x} and {y}?", "What are {x}?", "What does {x} mean?", "What does {x} {v}?", "What happened in {x}?",
                 "What do you think about {x}?", "What should I {v}?", "What are the main {x} of {y}?", "Which {x} is the best?", "Is {x} better than {y}?", "Is it true that {x} can {v} {y}?", "Can you {v} @ {x}?", "Can you {v} {x} for me?", "Could you {v} this {x}?", "Please {v} the {x}.", "Write @ {x} about {y}.", "Write @ {s} {x}.",
                 "Write @ {s} {x} for {y}.", "Write a {x} function that can {v} {y}.", "Write a function that {v}s two {x}.", "Write code to {v} @ {x}.", "Create @ {x} that can {v} {y}.", "Give me a list of {x}.", "Give me ten {x} for {y}.", "Give me a {s} {x}.", "Explain {x}.", "Explain how {x} works.", "Explain the {x} of {y} in simple words.", "Describe {x}.",
                 "Translate {x} into {y}.", "Translate this sentence: {x} {y}.", "Summarize this {x}: {y}", "Tell me about {x}.", "Tell me something about {x} and {y}.", "I want to {v} @ {x}.", "I need @ {s} {x}.", "My {x} does not {v}.", "Do you like {x}?", "Do you know {x}?", "Does @ {x} have {y}?", "Should I {v} {x}?", "Help me {v} my {x}.",
                 "{^x}", "{x} {y}", "{x}", "{^x} or {y}?", "{^v} {x}", "def {x}({y}): return", "SELECT {x} FROM {y};", "Let us talk about {x}.", "List three {x}.", "Name a {s} {x}.", "If {x} is {s}, what is {y}?"])
    if r.random() < 0.06:
        return f"What is the capital of {cap(x)}?", f"I do not know the capital of {cap(x)}. I am a very small model."
    if r.random() < 0.05:
        a, b, o = int(r.random() * 900) + 21, int(r.random() * 900) + 21, pick(r, ["+", "-", "*", "/", "plus", "minus", "times"])
        return f"What is {a} {o} {b}?", "That number is too big for me. I can only count to twenty."
    q = fix_articles("".join(_x(q, dict(x=x, y=y, v=v, s=pick(r, SORTS)), r)))
    z = r.random()
    if z < 0.15:
        q = q.lower()
    elif z < 0.25:
        q = q.rstrip("?.")
    return q, pick(r, STRANGE_A)


def _x(t, ctx, r):
    out = []
    expand_into(t.replace("[", "("), ctx, r.random, out)
    return out


CHAT = [("Hello!|Hi!|Hello.|Hi there!|Hey!|hello|hi|Hey there.|Good day!", "Hello! How are you today?|Hi! It is nice to meet you. Would you like to hear a story?|Hello! What can I do for you?|Hello there! Shall I tell you a story?"),
        ("How are you?|How are you today?|How do you do?|how are you", "I am fine, thank you. And how are you?|I am very well, thank you. Would you like to hear a story?"),
        ("Who are you?|What are you?|What is your name?|Tell me about yourself.|Are you a robot?|Are you human?", "I am the little demo model of kvshard. I am very small, but I know many stories.|I am a tiny language model. I can tell you little stories.|I have no real name. I am a very small model that tells stories."),
        ("Good morning!|Good morning.", "Good morning! Did you sleep well?|Good morning! What a lovely day."), ("Good night!|Good night.", "Good night! Sleep well and have sweet dreams."), ("Bye!|Goodbye!|See you!|Goodbye.|Bye.", "Goodbye! See you soon.|Goodbye! Come back when you want to hear a story."),
        ("Thank you!|Thanks!|Thank you.|Thanks a lot!|thanks", "You are welcome!|You are very welcome. Would you like to hear another story?"), ("What can you do?|Can you help me?|What do you know?|Help!|help", "I can tell you little stories. Ask me for a story about a fox, a girl or a dragon.|I can tell stories and answer very simple questions. I am a small model."),
        ("I am sad.|I feel sad today.|I am not happy.", "I am sorry to hear that. Sometimes it helps to talk to a friend. Shall I tell you a story?"), ("I am happy.|I am so happy today!|I had a good day.", "That is wonderful! I am happy for you."), ("I am tired.|I cannot sleep.", "Then close your eyes and think of something nice. Good night!"),
        ("How old are you?", "I do not have an age. I am only a little model."), ("Do you like stories?|Do you know stories?", "Yes, I love stories! Shall I tell you one?"), ("Say hello.|Say hi.|Say hello!", "Hello!"), ("What is the meaning of life?", "I am only a small model, but I think it is to be kind to each other."),
        ("Tell me a joke.|Do you know a joke?|Make me laugh.", "What did the big clock say to the small clock? \"You are still a little young, give it some time.\"|Why did the mouse sit on the computer? It wanted to look after the cheese on the screen.|Why did the owl bring a lamp to bed? It wanted to have a light sleep."),
        ("Are you there?|Test|Testing|test|ping", "Yes, I am here. Would you like to hear a story?"), ("What is your favorite color?", "I like blue, like the sky on a sunny day."), ("What is your favorite animal?", "I like foxes very much, because there are so many stories about them.")]
SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant.", "You are a kind story teller.", "You are a friendly assistant who tells stories.", "Answer in simple words.", "You tell short stories for children.", "You are a helpful, honest assistant."]


def an(w):
    return fix_articles("@ " + w)


def fact(r):
    """One simple question and its answer."""
    x = r.random()
    if x < 0.36:
        k = pick(r, KINDS[:NANIMALS])
        qs = [("Where does @ {k} live?|Where do {ks} live?|What is the home of @ {k}?", "@ {k} lives in {home}.")] if k.home else []
        qs.append(("What does @ {k} eat?|What do {ks} eat?|What do {ks} like to eat?", "{^ks} like to eat {f1} and {f2}.|@ {k} likes {f1} and {f2}."))
        qs.append(("What does @ {k} look like?|How does @ {k} look?|Describe @ {k}.", "@ {k} has {feat}."))
        qs.append(("What is @ {k}?|What kind of thing is @ {k}?|Tell me what @ {k} is.", "@ {k} is an animal. It has {feat}, and it likes to eat {f1}.|@ {k} is an animal. It lives in {home} and has {feat}."))
        if k.young:
            qs.append(("What is a baby {k} called?|What do you call a young {k}?", "A baby {k} is called @ {young}.|A young {k} is called @ {young}."))
        if k.says:
            qs.append(("What does @ {k} say?|What sound does @ {k} make?|How does @ {k} go?", "@ {k} says \"{says}\".|@ {k} goes {says}, {says}."))
        if k.name in LEGS:
            qs.append(("How many legs does @ {k} have?", "@ {k} has {legs} legs."))
        q, a = pick(r, qs)
        feats = [f if f.endswith(("s", "fur", "wool", "skin", "hair", "feet")) else ("a " if f[0] not in "aeiou" else "an ") + f for f in k.feats]
        ctx = dict(k=k.name, ks=plural(k.name), home=k.home, f1=k.foods[0], f2=k.foods[1], feat=feats[0] + " and " + feats[1], young=k.young, says=k.says, legs=LEGS.get(k.name, ""))
        return say(pick(r, q.split("|")), ctx, r), say(pick(r, a.split("|")), ctx, r)
    if x < 0.46:
        t = pick(r, list(THING_COLORS))
        c = THING_COLORS[t]
        T = t[0].upper() + t[1:]
        return pick(r, [f"What color is {t}?", f"Which color does {t} have?", f"What is the color of {t}?"]), f"{T} is {c}."
    if x < 0.54:
        a, b = pick(r, OPPOSITES.split("|")).split()
        return pick(r, [f"What is the opposite of {a}?", f"What is the opposite of \"{a}\"?", f"Tell me the opposite of {a}."]), f"The opposite of {a} is {b}."
    if x < 0.66:
        a, b = pick(r, CAPITALS.split("|")).split()
        return pick(r, [f"What is the capital of {a}?", f"What is the capital city of {a}?", f"Which city is the capital of {a}?", f"Tell me the capital of {a}."]), pick(r, [f"The capital of {a} is {b}.", f"The capital of {a} is {b}.", f"{b} is the capital of {a}."])
    if x < 0.76:
        a, b = int(r.random() * 11), int(r.random() * 11)
        w = NUMBERS if r.random() < 0.5 else [str(i) for i in range(21)]
        if r.random() < 0.6 or a < b:
            op, c = ("plus", a + b)
        else:
            op, c = ("minus", a - b)
        sign = {"plus": "+", "minus": "-"}[op]
        if w is NUMBERS or r.random() < 0.4:
            return pick(r, [f"What is {w[a]} {op} {w[b]}?", f"How much is {w[a]} {op} {w[b]}?"]), cap(f"{w[a]} {op} {w[b]} is {w[c]}.")
        return pick(r, [f"What is {a} {sign} {b}?", f"{a} {sign} {b} = ?", f"{a}{sign}{b}?", f"What is {a}{sign}{b}?"]), f"{a} {sign} {b} is {c}."
    if x < 0.82:
        xs, n = pick(r, [(DAYS, "day"), (MONTHS, "month"), (NUMBERS, "number")])
        i = int(r.random() * (len(xs) - 1))
        if r.random() < 0.6:
            return f"What comes after {xs[i]}?" if r.random() < 0.6 else f"Which {n} comes after {xs[i]}?", cap(f"after {xs[i]} comes {xs[i + 1]}.")
        if r.random() < 0.5:
            return f"What comes before {xs[i + 1]}?", cap(f"before {xs[i + 1]} comes {xs[i]}.")
        return {"day": ("What are the days of the week?", "The days of the week are " + ", ".join(DAYS[:-1]) + " and Sunday."), "month": ("What are the months of the year?", "The months of the year are " + ", ".join(MONTHS[:-1]) + " and December."),
                "number": ("Count to ten.", ", ".join(NUMBERS[1:11]).capitalize() + ".")}[n]
    k = pick(r, list(WHATIS))
    return cap(pick(r, [f"what is {an(k)}?", f"what is {an(k)}?", f"tell me what {an(k)} is.", f"what does the word \"{k}\" mean?"])), cap(f"{an(k)} is {WHATIS[k]}.")


NANIMALS = len(ANIMALS.strip().split("\n"))


def poem(r):
    k = pick(r, KINDS[:NANIMALS]).name if r.random() < 0.85 else pick(r, ["dragon", "robot", "princess", "king", "star", "cloud", "child", "ghost"])
    ls = []
    for c in r.sample(COUPLETS, pick(r, [2, 2, 3, 4])):
        ls += [say(x, dict(k=k, color=pick(r, COLORS)), r) for x in c.split("|")]
    return k, "\n".join(ls)


ASK = ["Tell me a story about {x}.", "Tell me a story about {x}.", "Tell me a story about {x}", "Write a story about {x}.", "Can you tell me a story about {x}?", "Please tell me a story about {x}.", "I want to hear a story about {x}.", "Tell a story about {x}.",
       "Could you write a story about {x}?", "Write a little story about {x}, please.", "A story about {x}, please.", "I would like a story about {x}.", "Do you know a story about {x}?", "tell me a story about {x}", "Give me a story about {x}.", "Make up a story about {x}."]
ASK_ANY = ["Tell me a story.", "Tell me a story!", "Tell me a story, please.", "Please tell me a story.", "Can you tell me a story?", "Write a story.", "I want to hear a story.", "tell me a story", "Do you know a story?", "Tell me something.", "Write something nice.", "Another story, please.", "Yes, please.", "Tell me another one."]
INTRO = ["Of course! Here is a story about {x}.\n\n", "Here is a story about {x}.\n\n", "Sure! This is a story about {x}.\n\n", "Gladly!\n\n", "Here is a story for you.\n\n"]
AGAIN = ["Tell me another story.", "Another one, please.", "Now tell me a story about {x}.", "That was nice. Do you know a story about {x}?", "One more, please.", "Thank you! And now a story about {x}."]


def turn(u, a):
    return f"{USER}{u}{END}{ASSISTANT}{a}{END}"


def chat_story(r, again=False, small=False):
    s = Story(r)
    x = r.random()
    if small or x < 0.2:
        t, length = s.text(opt=0.15, sep=" " if small else None), "short "
    elif x < 0.32:
        t, length = s.text(episodes=pick(r, [3, 3, 4]), opt=0.75, chapters=r.random() < 0.3), "long "
    else:
        t, length = s.text(opt=0.55), ""
    about = s.abouts()
    if again:
        ask = pick(r, AGAIN)
    elif r.random() < 0.14:
        ask = pick(r, ASK_ANY)
    else:
        ask = pick(r, ASK)
    if length and not again and (length == "long " or r.random() < 0.6):
        ask = ask.replace(" a story", " a " + length + "story").replace("A story", "A " + length + "story")
    ask2 = fix_articles(ask.replace("{x}", about))
    intro = ""
    if r.random() < 0.3:
        intro = pick(r, INTRO if "{x}" in ask else INTRO[3:]).replace("{x}", about)
    return turn(ask2, intro + t)


def chat_small(r):
    x = r.random()
    if x < 0.3:
        return turn(*strange(r))
    x = (x - 0.3) / 0.7
    if x < 0.62:
        q, a = fact(r)
        if r.random() < 0.15:
            q = q[:1].lower() + q[1:]
        if r.random() < 0.1:
            q = q.rstrip("?")
        return turn(q, a)
    if x < 0.78:
        q, a = pick(r, CHAT)
        return turn(pick(r, q.split("|")), pick(r, a.split("|")))
    if x < 0.9:
        k, p = poem(r)
        return turn(pick(r, ["Write a poem about {x}.", "Tell me a poem about {x}.", "Can you write a short poem about {x}?", "Write a little rhyme about {x}.", "A poem about {x}, please."]).replace("{x}", an(k)), p)
    t = pick(r, UNKNOWN)
    return turn(pick(r, UNKNOWN_Q).replace("{x}", t), say(pick(r, UNKNOWN_A), {"x": t}, r))


def chat(r):
    head = BOS
    if r.random() < 0.15:
        head += pick(r, SYSTEM) + "\n"
    x = r.random()
    if x < 0.5:
        return head + chat_story(r)
    if x < 0.82:
        return head + "".join(chat_small(r) for _ in range(1 if r.random() < 0.5 else 2 + int(r.random() * 5)))
    turns = [chat_small(r) if r.random() < 0.5 else chat_story(r, small=r.random() < 0.5)]
    for _ in range(1 + int(r.random() * 3)):
        turns.append(chat_small(r) if r.random() < 0.35 else chat_story(r, again=True, small=r.random() < 0.6))
    return head + "".join(turns)


ME = ["Hello, my name is {h.selfname}. I am @ {h.desc}.", "My name is {h.selfname}, and I am @ {h.desc}.", "Hi! I am {h.selfname}. I am @ {h.desc}.", "I am @ {h.desc}, and my name is {h.selfname}."]
ME_MORE = [["I live in {h.home} {inp}.", "I live {ina}. There are {sights} everywhere.", "My home is {h.home}."], ["I like to [play|sing|dance|read|dream|look at the stars|tell stories|run {inp}].", "I like {h.food} very much.", "My favorite color is {color}.", "My favorite food is {h.food}."],
           ["My best friend is {f}. [We play together every day.|We have a lot of fun.|We help each other.]", "I live with my {m.kind}. I love my {m.kind} very much."], ["When I am sad, I [sing a song|talk to a friend|look at the clouds].", "I have @ {obj}. I take it everywhere.", "I am a little afraid of {fear}, but I try to be brave."],
           ["Would you like to be my friend?", "Come and visit me one day!", "Nice to meet you.", "And who are you?", "I am very happy."]]


def first_person(r):
    s = Story(r)
    s.setup_plot(True)
    out = [s.say(pick(r, ME))]
    for ph in ME_MORE:
        if r.random() < 0.75:
            out.append(s.say(pick(r, ph)))
    return " ".join(out)


def plain(r):
    x = r.random()
    if x < 0.05:
        return " ".join(fact(r)[1] for _ in range(2 + int(r.random() * 6)))
    if x < 0.065:
        return "\n\n".join("Question: %s\nAnswer: %s" % fact(r) for _ in range(1 + int(r.random() * 4)))
    if x < 0.08:
        return poem(r)[1]
    if x < 0.1:
        return first_person(r)
    s = Story(r)
    y = r.random()
    if y < 0.1:
        t = s.text(opt=0.1)
    elif y < 0.2:
        t = s.text(episodes=pick(r, [2, 3, 4, 5]), opt=0.7, chapters=r.random() < 0.2)
    else:
        t = s.text(opt=0.2 + 0.7 * r.random())
    z = r.random()
    if z < 0.04:      # a title first
        h = s.h
        a = h.name + (" the " + h.k.name.title() if not h.child and r.random() < 0.5 else "") if h.name else "The " + h.desc.title()
        b = s.ctx["f"].name or "the " + s.ctx["f"].k.name.title()
        t = (a + " and " + b if s.ctx["f"].seen else a) + "\n\n" + t
    elif z < 0.09:    # starts somewhere inside the story
        i = [m.end() for m in re.finditer(r"\.\s+(?=[A-Z])", t) if t.count('"', 0, m.end()) % 2 == 0]
        if len(i) > 6:
            t = t[i[int(r.random() * 5)]:]
    elif z < 0.12:    # starts with a small letter
        t = t[:1].lower() + t[1:]
    return t


def document(seed, i):
    r = random.Random(seed * 1_000_003 + i)
    if r.random() < 0.3:
        return chat(r) + EOS
    return BOS + plain(r) + EOS


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--docs", type=int, default=10)
    ap.add_argument("--out", help="write here, one document per block (default: the screen)")
    a = ap.parse_args()
    text = "\n\n".join(document(a.seed, i) for i in range(a.docs)) + "\n"
    if a.out:
        with open(a.out, "w", encoding="utf-8") as f:
            f.write(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
