"""Make small vocabularies as files of SentencePiece and tiktoken, and the reference results of these libraries.

Writes fixtures/tokenizers/<kind>/{tokenizer.model or qwen.tiktoken, tokenizer_config.json} and
fixtures/tokenizers/<kind>.json for each of KINDS, trained on the text of make_tokenizers.py.

A text's ids are those of the library, part by part: special tokens that are written in a text, which the libraries
know nothing of, are cut out first, as the classes of `transformers` do.
"""

import base64
import json
import re
import tempfile
import unicodedata
from pathlib import Path

import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from common import FIXTURES, write_json
from make_tokenizers import CORPUS, STRINGS

MORE = [
    "sop eop sopsop the soprano",
    "你好，世界！天气很好。世界很大，你好吗？",
    "def f(x):\n    if x:\n        return 2 * x\n    return None",
] * 3

NASTY = STRINGS + [
    *(" " * n for n in (2, 3, 4, 5, 8, 17)),
    *("a" + " " * n + "b" for n in (2, 3, 4, 5, 7, 9)),
    "\t\ttabs\tbetween\t",
    "cr\rlf\r\nboth\n\r",
    "def f(x):\n    if x:\n        return 2 * x\n\n\n",
    "Ｆｕｌｌ　ｗｉｄｔｈ　１２３！",
    "ﬃ ﬄ ① ² ㎏ ™ … ‥",
    "İstanbul ıI ß ẞ ſ K Å",
    "e\u0301e\u0301 \u0301alone o\u0308\u0304 n\u0303o",
    "한글 \u1112\u1161\u11ab \u1100\u1161",
    "क्षत्रिय हिन्दी ไทย ພາສາ",
    "right\u200fto\u200eleft \u202eevil\u202c",
    "\ufeffbom \u2028line \u2029paragraph \u0085next",
    "\u3000ideographic\u3000\u2003em\u2009thin\u00a0nbsp",
    "replacement \ufffd \uffff private \ue000 \U0010ffff last",
    "❤️ ❤ \u2764\ufe0f\u200d\U0001f525 \U0001f9d1\u200d\U0001f680",
    "٣٤٥ ४५६ ᠑᠒ 一二三 Ⅷ ½",
    "".join(chr(c) for c in range(1, 32)) + "\x7f\x80\x9f",
    "nul\x00in\x00side",
    "<0x41><0xE4><0x0A> <0x00>",
    "▁ ▁▁ a▁b",
    "<s><s> <s>a</s></s>",
    " <s> a </s> b",
    "<unk>a<unk> <pad>",
    "<eoh><eoh>x<eoh> y <eoh>",
    "<|sys|>be kind<|sys|> please",
    "[gMASK]sop[MASK]<sop>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>a<|extra_0|> b <|extra_204|><|extra_205|>",
    "<|im_end|>\u0338 composes",
    "The river <|sys|>  runs",
    "ABC abc aBc ÀÉ àé",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababab bababababab",
    "the the the the the the the the",
    "日本語のテキストとﾊﾝｶｸｶﾅ",
    "x" * 300,
    "🎉" * 9,
]

# Left and right sides of rules, in hexadecimal code points: a small relative of NFKC with spaces and deletions.
RULES = {
    "\u3000": " ",
    "\u00a0": " ",
    "\t": " ",
    "\n": " ",
    "\u200b": "",
    "\u200d": "",
    "ﬁ": "fi",
    "ﬃ": "ffi",
    "…": "...",
    "①": "1",
    "\u00bd": "1\u20442",
    "e\u0301": "\u00e9",
    "o\u0308\u0304": "\u022b",
    "o\u0308": "\u00f6",
    "\u1112\u1161\u11ab": "한",
    "™": " TM ",
    "\u212a": "K",
    **{chr(c): chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},
}

USER_DEFINED = ["<eoh>", "①", "    "]

# Per kind: how it is trained, and its tokenizer_config.json.
KINDS = {
    "sp-bpe": (
        {"model_type": "bpe", "byte_fallback": True, "control_symbols": ["<|sys|>"]},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True},
    ),
    "sp-bpe-defined": (
        {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": USER_DEFINED},
        {"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "bos_token": {"content": "<s>"}},
    ),
    "sp-bpe-bare": (
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": USER_DEFINED},
        {"tokenizer_class": "InternLMTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "sp-bpe-rules": (
        {"model_type": "bpe", "remove_extra_whitespaces": True, "rules": True, "user_defined_symbols": USER_DEFINED[:2]},
        None,
    ),
    "sp-unigram": (
        {"model_type": "unigram", "byte_fallback": True, "control_symbols": ["<|sys|>"]},
        {"add_bos_token": True, "add_eos_token": True},
    ),
    "sp-unigram-rules": (
        {"model_type": "unigram", "remove_extra_whitespaces": True, "rules": True, "user_defined_symbols": ["<eoh>"]},
        {"add_bos_token": False},
    ),
    "chatglm2": (
        {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": True},
        {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False},
    ),
}


def train(folder, flags):
    """Train a model file of the size that the text gives."""
    flags = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **flags}
    with tempfile.TemporaryDirectory() as scratch:
        if flags.pop("rules", False):
            points = lambda text: " ".join(f"{ord(c):X}" for c in text)
            rules = Path(scratch) / "rules.tsv"
            rules.write_text("".join(f"{points(left)}\t{points(right)}\n" for left, right in RULES.items()))
            flags["normalization_rule_tsv"] = str(rules)
            flags.pop("normalization_rule_name")
        size = 620 if flags.get("byte_fallback") else 300
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS + MORE),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
            **flags,
        )
    (folder / "tokenizer.vocab").unlink()
    proto = model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    proto.trainer_spec.ClearField("model_prefix")
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))


class Pieces:
    """A model file, read as the classes of `transformers` and of the models' authors read it."""

    def __init__(self, folder, config):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.reference = f"sentencepiece {sentencepiece.__version__}"
        n = self.sp.vocab_size()
        self.special = {self.sp.id_to_piece(i): i for i in range(n) if self.sp.is_control(i) or self.sp.is_unknown(i)}
        self.found = dict(self.special)
        self.n_ids = n
        config = config or {}
        bos, eos = [self.sp.bos_id()], [self.sp.eos_id()]
        self.before = bos if config.get("add_bos_token", True) else []
        self.after = eos if config.get("add_eos_token", False) else []
        if config.get("tokenizer_class") == "ChatGLMTokenizer":
            self.found, self.before, self.n_ids = {}, [n + 1, n + 3], n + 5
            self.special |= {f"appended {i}": n + i for i in range(5)}

    def encode(self, text):
        if not self.found:
            return self.sp.encode(text)
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self.found)) + ")", text):
            ids += [self.found[part]] if part in self.found else self.sp.encode(part)
        return ids

    def decode(self, ids):
        return self.sp.decode([i for i in ids if i not in self.special.values()])

    def byte(self, value):
        return self.sp.piece_to_id(f"<0x{value:02X}>")


def train_ranks(folder):
    """Write 256 bytes and the merges that `tokenizers` learns, as ranks."""
    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(Ranks.SPLIT), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=[], special_tokens=[], show_progress=False)
    learner.train_from_iterator(CORPUS + MORE, trainer)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in printable + others]
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        token = bytes(byte_of[c] for c in left + right)
        if token not in tokens:
            tokens.append(token)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_text("".join(lines))


class Ranks:
    """A rank file, read as Qwen v1's class reads it."""

    SPLIT = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    before, after = [], []

    def __init__(self, folder):
        lines = (folder / "qwen.tiktoken").read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
        self.special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.tiktoken = tiktoken.Encoding("Qwen", pat_str=self.SPLIT, mergeable_ranks=ranks, special_tokens=self.special)
        self.reference = f"tiktoken {tiktoken.__version__}"
        self.n_ids = self.tiktoken.n_vocab

    def encode(self, text):
        text = unicodedata.normalize("NFC", text)
        return self.tiktoken.encode(text, allowed_special="all", disallowed_special=())

    def decode(self, ids):
        return self.tiktoken.decode([i for i in ids if i not in self.special.values()], errors="replace")

    def byte(self, value):
        return self.tiktoken.encode_single_token(bytes([value]))


def golden(reference, strings):
    """Ids and decoded texts of every string, and texts of ids that end within characters."""
    cases = []
    for text in strings:
        plain = reference.encode(text)
        ids = reference.before + plain + reference.after
        # What is unknown leaves a hole that the libraries fill, each in its own way.
        decoded = None if reference.special.get("<unk>") in plain else reference.decode(plain)
        cases.append({"text": text, "ids": ids, "ids_no_special": plain, "decoded_skip_special": decoded})
    cut = [[0xE4], [0xE4, 0xBD], [0xF0, 0x9F], [0xE4, 0xBD, 0xA0, 0x41], [0x80], [0xFF]]
    cut = [[reference.byte(b) for b in bytes_] for bytes_ in cut]
    if reference.byte(0xE4) == 0:
        cut = []
    return {
        "reference": reference.reference,
        "vocab_size": reference.n_ids,
        "special": reference.special,
        "n_before": len(reference.before),
        "cases": cases,
        "decode": [{"ids": ids, "decoded_skip_special": reference.decode(ids)} for ids in cut],
    }


def main():
    for name, (flags, config) in KINDS.items():
        folder = FIXTURES / "tokenizers" / name
        folder.mkdir(parents=True, exist_ok=True)
        train(folder, flags)
        if config is not None:
            write_json(folder / "tokenizer_config.json", config)
        result = golden(Pieces(folder, config), NASTY)
        write_json(FIXTURES / "tokenizers" / f"{name}.json", result)
        print(f"{name}: {result['vocab_size']} tokens, {len(result['cases'])} strings")
    folder = FIXTURES / "tokenizers" / "qwen"
    folder.mkdir(parents=True, exist_ok=True)
    train_ranks(folder)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    result = golden(Ranks(folder), NASTY)
    write_json(FIXTURES / "tokenizers" / "qwen.json", result)
    print(f"qwen: {result['vocab_size']} tokens, {len(result['cases'])} strings")


if __name__ == "__main__":
    main()
