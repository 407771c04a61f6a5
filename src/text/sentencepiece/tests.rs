use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;

fn fixture(kind: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fixtures/tokenizers");
    fs::read(folder.join(kind).join("tokenizer.model")).unwrap()
}

fn field(number: u8, value: &[u8]) -> Vec<u8> {
    assert!(value.len() < 0x4000, "two bytes of length");
    let length = [value.len() as u8 | 0x80, (value.len() >> 7) as u8];
    [&[number << 3 | 2], &length[..], value].concat()
}

fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    field(
        1,
        &[field(1, text.as_bytes()), [&[0x15][..], &score.to_le_bytes(), &[0x18, kind]].concat()].concat(),
    )
}

/// A model of these pieces behind the unknown one, with a trainer's specification.
fn model(pieces: &[Vec<u8>], trainer: &[u8]) -> Vec<u8> {
    [piece("<unk>", 0.0, 2), pieces.concat(), field(2, trainer)].concat()
}

const BPE: &[u8] = &[0x18, 2];

fn encode(file: &[u8], text: &str) -> Vec<u32> {
    let (normalizer, encoder) = Model::parse(file).unwrap().into_rules();
    encoder.encode(&normalizer.normalize(text, true))
}

#[test]
fn what_cannot_be_read_is_told() {
    let told = |file: Vec<u8>| Model::parse(&file).map(drop).unwrap_err();
    let normal = |text: &str| piece(text, 0.0, 1);
    for (file, words) in [
        (b"x".to_vec(), "it is no protobuf, or cut short"),
        (fixture("sp-bpe")[..500].to_vec(), "it is no protobuf, or cut short"),
        (Vec::new(), "it has 0 pieces for what is unknown"),
        (model(&[piece("?", 0.0, 2)], BPE), "it has 2 pieces for what is unknown"),
        (model(&[normal("a"), normal("a")], BPE), "piece 2 is \"a\" once more"),
        (model(&[normal("")], BPE), "piece 1 is empty"),
        (model(&[normal(&"a".repeat(512))], BPE), "piece 1 has 512 bytes; fewer than 512 are read"),
        (model(&[piece("a", f32::NAN, 1)], BPE), "the score of piece 1 is NaN"),
        (model(&[piece("a", 0.0, 5)], BPE), "piece 1 is UNUSED, which cannot be read"),
        (model(&[piece("a", 0.0, 7)], BPE), "piece 1 is of the unknown kind 7"),
        (model(&[field(1, &field(1, b"\xff"))], BPE), "piece 1 is no UTF-8"),
        (model(&[], &[0x18, 3]), "its model_type is WORD; UNIGRAM and BPE can be read"),
        (model(&[], &[0x18, 4]), "its model_type is CHAR"),
        (model(&[], &[0xC0, 1, 1]), "it has treat_whitespace_as_suffix, which cannot be read"),
        (model(&[piece("<0x00>", 0.0, 6)], &[0x98, 2, 1]), "it has byte_fallback, and no piece <0x01>"),
        (model(&[field(3, &[0x28, 0])], BPE), "its escape_whitespaces is false, which cannot be read"),
        (
            model(&[field(3, &field(2, b"abc"))], BPE),
            "its precompiled_charsmap cannot be read: it is cut short",
        ),
        (model(&[field(3, &field(2, b"\x05\0\0\0abcd"))], BPE), "it is cut short"),
        (model(&[field(3, &field(2, b"\x03\0\0\0abcd\0"))], BPE), "its trie is not made of words"),
        (model(&[field(3, &field(2, b"\x04\0\0\0abcd\xff\0"))], BPE), "its replacements are no UTF-8"),
        (model(&[field(3, &field(2, b"\x04\0\0\0abcd"))], BPE), "it holds no rules"),
        (
            model(
                &[field(3, &field(2, &[b"\x04\0\0\0abcd".to_vec(), vec![b'x'; 257], vec![0]].concat()))],
                BPE,
            ),
            "it makes very long texts of short ones",
        ),
        (model(&[field(5, &field(2, b"rules"))], BPE), "it has a denormalizer_spec with rules"),
    ] {
        let told = told(file);
        assert!(told.contains(words), "{told:?} for {words:?}");
    }
}

/// LLaMA's runs of spaces all have one score: of pairs that are alike the first in the text is merged.
#[test]
fn of_equal_scores_the_first_is_merged() {
    let lengths = [2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 1];
    let runs: Vec<Vec<u8>> = lengths.iter().map(|&n| piece(&"▁".repeat(n), -1e9, 1)).collect();
    let file = [model(&runs, BPE), field(3, &[0x18, 0, 0x20, 0])].concat();
    let found = |n| {
        let ids = encode(&file, &" ".repeat(n));
        ids.iter().map(|&id| lengths[id as usize - 1]).collect::<Vec<_>>()
    };
    // As sentencepiece 0.2.3 finds them with LLaMA's own file.
    for (n, runs) in
        [(5, vec![5]), (15, vec![14, 1]), (16, vec![16]), (18, vec![16, 2]), (31, vec![16, 14, 1])]
    {
        assert_eq!(found(n), runs, "{n}");
    }
}

#[test]
fn unknown_neighbours_are_one() {
    for algorithm in [1, 2] {
        let file = model(&[piece("▁", -1.0, 1), piece("a", -1.0, 1)], &[0x18, algorithm]);
        assert_eq!(encode(&file, "xyaza"), [1, 0, 2, 0, 2]);
        assert_eq!(encode(&file, ""), [0; 0]);
    }
}

/// Every byte of real files changed, and some of their lengths; what can be read encodes and does not panic.
#[test]
fn a_garbled_file_is_refused_or_encodes() {
    let mut n_read = 0;
    for kind in ["sp-bpe-rules", "sp-unigram", "chatglm2"] {
        let whole = fixture(kind);
        let mut file = whole.clone();
        // The pieces are all alike; what follows them is not.
        let step = |at: usize| if at + 300 < whole.len() { 29 } else { 1 };
        let mut at = 0;
        while at < whole.len() {
            for byte in [0, 0xFF, whole[at] ^ 1, whole[at] ^ 0x80] {
                file[at] = byte;
                if let Ok(model) = Model::parse(&file) {
                    n_read += 1;
                    let vocabulary = model.vocabulary().unwrap();
                    let n_pieces = model.n_pieces();
                    let (normalizer, encoder) = model.into_rules();
                    let ids = encoder
                        .encode(&normalizer.normalize(" the <eoh>  ﬁｘ  e\u{301}…\u{0} 你好 🎉 ", true));
                    assert!(ids.iter().all(|id| *id < n_pieces), "{ids:?}");
                    let _ = vocabulary.decode(&ids, false);
                }
            }
            file[at] = whole[at];
            let _ = Model::parse(&whole[..at]);
            at += step(at);
        }
    }
    assert!(n_read > 500, "{n_read}");
}

proptest! {
    /// What a garbled trie says is not believed.
    #[test]
    fn rules_of_any_trie_end(trie in prop::collection::vec(any::<u32>(), 1..40), text in "[a-eé 你]{0,40}") {
        let trie: Vec<u8> = trie.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        let charsmap = [&(trie.len() as u32).to_le_bytes()[..], &trie, "é\0bc\0 \0".as_bytes()].concat();
        let rules = Some(Rules::parse(&charsmap).unwrap());
        let normalizer = Normalizer { rules, removes_extra_spaces: true, ..Normalizer::default() };
        normalizer.normalize(&text, true);
    }
}
