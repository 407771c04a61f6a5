"""Make the two shared tokenizers and the reference results of the `tokenizers` library for them.

* byte-level: byte-level BPE with a regular-expression split and a BOS post-processor, as Llama 3 ships.
* spm: BPE over SentencePiece-like pieces with byte fallback, as Llama 2 ships as tokenizer.json.

Writes fixtures/tokenizers/{byte-level,spm}/{tokenizer,tokenizer_config}.json and
fixtures/tokenizers/{byte-level,spm}.json. Run it before make_fixtures.py.
"""

import json

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common import FIXTURES, write_json

CORPUS = """
The river runs past the mill, and the mill grinds the corn that the village eats in the winter.
A small lamp on the table is enough to read by; nobody needs the whole house to be bright.
When the rain stops the children run out again, and their shoes are never dry before the evening.
She counted the apples, wrote the number into her book, and counted them once more to be sure.
Bread needs flour, water, salt and time. Of these four, time is the one that is most often missing.
There is a path behind the station which leads to the lake in twenty minutes, or in ten if you run.
He said that he would return on Monday; it is Thursday now, and the door is still locked.
An engine that is serviced every year will outlive the man who services it, and perhaps his son.
The answer to the first question is written on the other side of the paper, the second is not.
fn main() { let total = 0; for item in items { total += item.price * item.count; } return total; }
if the value is greater than the limit then print the value else print the limit
0 1 2 3 4 5 6 7 8 9 10 12 15 20 25 30 50 100 250 1000 2024 3.14 -7
Zoë drank a café crème in Köln; the señor and his niño ate a gâteau.
Quick foxes jump: "Why?" - 'Because!' (maybe) [x] <y> #1 @home 50% a/b a_b c*d e=f.
BIG LETTERS HELP UNDER JOYFUL VISITORS QUIZ WAX.
你好世界
""".strip().split("\n")

# What a byte-level tokenizer of the Llama 3 kind splits on.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

STRINGS = [
    "",
    "a",
    " ",
    "Hello world",
    "The river runs past the mill.",
    " leading space",
    "trailing space ",
    "  two leading, two trailing  ",
    "many      spaces",
    "line one\nline two",
    "\n",
    "\n\n  \n\ttab\r\n",
    "café Zoë Köln",
    "cafe\u0301 (combining acute)",
    "a\u0300\u0323 stacked marks",
    "你好世界",
    "こんにちは 한국어 العربية עברית",
    "emoji 😀 🎉",
    "👩‍👩‍👧‍👦 family 🇩🇪 flag 👍🏽 skin",
    "zero\u200bwidth and nbsp\u00a0here",
    "I'm you're he'll WE'VE don't",
    "1 12 123 1234 1234567890",
    "fn main() { let x = 1; }",
    "a_b/c\\d \"quoted\" 'single' `tick`",
    "<s>",
    "text </s> more <s> text",
    "<unk>",
    "<eoh> user-defined <eoh>",
    "<|begin_of_text|>hi<|end_of_text|>",
    "hi<|eot_id|> there",
    "<|tool|>call<|tool|>",
    "<|not_special|>",
    "<0x41>",
    "▁lower one eighth block",
    "\u0000\u0001\u007f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 math",
    "ﬁ ligature, ½ fraction, Å ångström",
    "The the THE tHe",
]

# Id sequences to decode that no text encodes to: cut multi-byte characters and the like.
EXTRA_DECODE = {
    "byte-level": [[], [0xE4], [0xA1, 0x94], [30, 31, 32, 250, 251, 252], list(range(0, 256, 17))],
    "spm": [[], [3 + 0xE4], [3 + 0xE4, 3 + 0xBD, 3 + 0xA0], [3 + 0xE4, 3 + 0xBD], [0], [1, 2], [3 + 0x41, 3 + 0xF0, 3 + 0x9F, 270], [265]],
}


def byte_level():
    """Byte-level BPE of 312 tokens: 256 bytes, 51 merges, five added tokens at the end."""
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=307, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|pad|>")]
    )
    tok.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    bos = "<|begin_of_text|>"
    tok.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tok.token_to_id(bos))]
            ),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    config = {
        "bos_token": bos,
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return tok, config


def spm():
    """SentencePiece-like BPE of 384 tokens: 3 controls, 256 bytes, merged pieces, characters, one user-defined."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    size = 384 - 3 - 256 - 1 - 2
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=[], show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    merged = [a + b for a, b in merges]
    chars = [t for t, _ in sorted(learned["vocab"].items(), key=lambda kv: kv[1]) if len(t) == 1]
    # Runs of spaces, which no corpus line holds.
    runs = [("▁", "▁"), ("▁▁", "▁▁")]
    pieces = ["<unk>", "<s>", "</s>"]
    pieces += [f"<0x{b:02X}>" for b in range(256)]
    pieces += merged + [a + b for a, b in runs] + chars
    assert len(set(pieces)) == len(pieces)
    tok = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=merges + runs, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tok.add_tokens([AddedToken("<eoh>", special=False, normalized=False)])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 512,
        "tokenizer_class": "LlamaTokenizer",
    }
    return tok, config


def golden(name, tok):
    """Ids and decoded texts of every test string."""
    cases = []
    for text in STRINGS:
        ids = tok.encode(text, add_special_tokens=True).ids
        plain = tok.encode(text, add_special_tokens=False).ids
        cases.append(
            {
                "text": text,
                "ids": ids,
                "ids_no_special": plain,
                "decoded": tok.decode(ids, skip_special_tokens=False),
                "decoded_skip_special": tok.decode(ids, skip_special_tokens=True),
                "decoded_each": [tok.decode([i], skip_special_tokens=False) for i in ids],
            }
        )
    decode = []
    for ids in EXTRA_DECODE[name]:
        decode.append(
            {
                "ids": ids,
                "decoded": tok.decode(ids, skip_special_tokens=False),
                "decoded_skip_special": tok.decode(ids, skip_special_tokens=True),
            }
        )
    added = tok.get_added_tokens_decoder()
    return {
        "tokenizer": f"{name}/tokenizer.json",
        "reference": f"tokenizers {tokenizers.__version__}",
        "vocab_size": tok.get_vocab_size(with_added_tokens=True),
        "special": {t.content: i for i, t in sorted(added.items()) if t.special},
        "added_not_special": {t.content: i for i, t in sorted(added.items()) if not t.special},
        "cases": cases,
        "decode": decode,
    }


def main():
    for name, build in (("byte-level", byte_level), ("spm", spm)):
        tok, config = build()
        folder = FIXTURES / "tokenizers" / name
        folder.mkdir(parents=True, exist_ok=True)
        tok.save(str(folder / "tokenizer.json"), pretty=False)
        write_json(folder / "tokenizer_config.json", config)
        reloaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
        result = golden(name, reloaded)
        write_json(FIXTURES / "tokenizers" / f"{name}.json", result)
        print(f"{name}: {result['vocab_size']} tokens, {len(result['cases'])} strings")


if __name__ == "__main__":
    main()
