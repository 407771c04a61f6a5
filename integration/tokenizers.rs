//! Tokenizers against reference results: the ids of texts, the texts of ids, and the texts as they stream.

use std::fs;
use std::path::{Path, PathBuf};

use kvshard::text::{Detokenizer, Tokenizer};
use serde_json::Value;

/// Kinds of `tokenizer.json`.
const KINDS: [&str; 2] = ["byte-level", "spm"];

/// Folders with a vocabulary's own file only.
const VOCABULARIES: [&str; 8] = [
    "sp-bpe",
    "sp-bpe-defined",
    "sp-bpe-bare",
    "sp-bpe-rules",
    "sp-unigram",
    "sp-unigram-rules",
    "chatglm2",
    "qwen",
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fixtures")
}

fn golden(kind: &str) -> (Tokenizer, Value) {
    let folder = fixtures().join("tokenizers");
    let golden = fs::read(folder.join(format!("{kind}.json"))).unwrap();
    (Tokenizer::load(&folder.join(kind)).unwrap(), serde_json::from_slice(&golden).unwrap())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn cases<'a>(golden: &'a Value, key: &str) -> &'a Vec<Value> {
    let cases = golden[key].as_array().unwrap();
    assert!(cases.len() > 3, "{key} has {} cases", cases.len());
    cases
}

#[test]
fn texts_have_the_ids_of_the_reference() {
    for kind in KINDS {
        let (tokenizer, golden) = golden(kind);
        for case in cases(&golden, "cases") {
            let encode =
                |special, truncate| tokenizer.encode(text(&case["text"]), special, truncate).unwrap();
            let (whole, bare) = (ids(&case["ids"]), ids(&case["ids_no_special"]));
            assert_eq!(encode(true, usize::MAX), whole, "{kind} {case}");
            assert_eq!(encode(false, usize::MAX), bare, "{kind} {case}");
            let n_added = whole.len() - bare.len();
            for truncate in 1..=whole.len() {
                let room = truncate.saturating_sub(n_added).min(bare.len());
                let expected = [&whole[..n_added.min(truncate)], &bare[bare.len() - room..]].concat();
                assert_eq!(encode(true, truncate), expected, "{kind} {truncate} {case}");
                assert_eq!(encode(false, truncate), bare[bare.len().saturating_sub(truncate)..]);
            }
        }
    }
}

#[test]
fn ids_have_the_texts_of_the_reference() {
    for kind in KINDS {
        let (tokenizer, golden) = golden(kind);
        for case in cases(&golden, "cases").iter().chain(cases(&golden, "decode")) {
            let ids = ids(&case["ids"]);
            assert_eq!(tokenizer.decode(&ids, false), text(&case["decoded"]), "{kind} {case}");
            assert_eq!(tokenizer.decode(&ids, true), text(&case["decoded_skip_special"]), "{kind} {case}");
        }
        for case in cases(&golden, "cases") {
            let each: Vec<String> =
                ids(&case["ids"]).iter().map(|&id| tokenizer.decode(&[id], false)).collect();
            let expected: Vec<&str> = case["decoded_each"].as_array().unwrap().iter().map(text).collect();
            assert_eq!(each, expected, "{kind} {case}");
        }
    }
}

#[test]
fn a_streamed_text_is_the_decoded_text() {
    for kind in KINDS {
        let (tokenizer, golden) = golden(kind);
        for case in cases(&golden, "cases") {
            let ids = ids(&case["ids"]);
            let mut detokenizer = Detokenizer::new(&ids[..1]);
            let mut streamed = tokenizer.decode(&ids[..1], false);
            for end in 2..=ids.len() {
                streamed += &detokenizer.push(&tokenizer, &ids[..end]);
            }
            assert_eq!(streamed, text(&case["decoded"]), "{kind} {case}");
            let whole = detokenizer.whole(&tokenizer, &ids, 1);
            assert_eq!(whole, text(&case["decoded_skip_special"]), "{kind} {case}");
        }
    }
}

#[test]
fn texts_have_the_ids_of_sentencepiece_and_tiktoken() {
    for kind in VOCABULARIES {
        let (tokenizer, golden) = golden(kind);
        assert_eq!(u64::from(tokenizer.n_ids()), golden["vocab_size"].as_u64().unwrap(), "{kind}");
        for case in cases(&golden, "cases") {
            let encode = |special| tokenizer.encode(text(&case["text"]), special, usize::MAX).unwrap();
            assert_eq!(encode(true), ids(&case["ids"]), "{kind} {case}");
            assert_eq!(encode(false), ids(&case["ids_no_special"]), "{kind} {case}");
        }
    }
}

#[test]
fn ids_have_the_texts_of_sentencepiece_and_tiktoken() {
    for kind in VOCABULARIES {
        let (tokenizer, golden) = golden(kind);
        let special: Vec<u64> =
            golden["special"].as_object().unwrap().values().filter_map(Value::as_u64).collect();
        for id in 0..tokenizer.n_ids() + 2 {
            assert_eq!(tokenizer.is_special(id), special.contains(&u64::from(id)), "{kind} {id}");
        }
        let cut = golden["decode"].as_array().unwrap();
        for case in cases(&golden, "cases").iter().chain(cut) {
            let Some(expected) = case["decoded_skip_special"].as_str() else { continue };
            let decoded = tokenizer.decode(&ids(&case["ids"]), true);
            assert_eq!(without_extra(kind, &decoded), without_extra(kind, expected), "{kind} {case}");
        }
    }
}

/// A text without its leading spaces, where SentencePiece removes extra ones: all of them go there, of which the
/// parts of a streamed text know nothing.
fn without_extra<'a>(kind: &str, text: &'a str) -> &'a str {
    let removes = ["sp-bpe-rules", "sp-unigram-rules", "chatglm2"].contains(&kind);
    if removes { text.trim_start_matches(' ') } else { text }
}

/// A text comes out as it went in, unless its vocabulary changes or forgets something of it.
#[test]
fn a_text_comes_back() {
    for kind in VOCABULARIES
        .into_iter()
        .filter(|kind| !["sp-bpe-rules", "sp-unigram-rules", "chatglm2"].contains(kind))
    {
        let (tokenizer, golden) = golden(kind);
        let mut n_whole = 0;
        for case in cases(&golden, "cases") {
            let ids = ids(&case["ids_no_special"]);
            if ids.iter().any(|id| tokenizer.is_special(*id)) {
                continue;
            }
            // What stands for a space is one.
            let came_back = tokenizer.decode(&ids, true) == text(&case["text"]).replace('▁', " ");
            // Qwen composes combining marks.
            assert!(came_back || kind == "qwen", "{kind} {case}");
            n_whole += usize::from(came_back);
        }
        assert!(n_whole > 60, "{kind}: {n_whole}");
    }
}

#[test]
fn a_streamed_text_of_any_vocabulary_is_the_decoded_text() {
    for kind in VOCABULARIES {
        let (tokenizer, golden) = golden(kind);
        let n_before = golden["n_before"].as_u64().unwrap() as usize;
        for case in cases(&golden, "cases") {
            let ids = ids(&case["ids"]);
            // Of a prompt that ends within a character nobody sees the rest of it.
            let ends_open = |n_prompt: usize| tokenizer.decode(&ids[..n_prompt], true).ends_with('\u{FFFD}');
            let middle = (n_before.midpoint(ids.len())..ids.len()).find(|n_prompt| !ends_open(*n_prompt));
            for n_prompt in [Some(n_before), middle].into_iter().flatten() {
                let mut detokenizer = Detokenizer::new(&ids[..n_prompt]);
                let streamed: String =
                    (n_prompt + 1..=ids.len()).map(|end| detokenizer.push(&tokenizer, &ids[..end])).collect();
                let whole = detokenizer.whole(&tokenizer, &ids, n_prompt);
                if let Some(expected) = case["decoded_skip_special"].as_str().filter(|_| n_prompt == n_before)
                {
                    assert_eq!(without_extra(kind, &whole), without_extra(kind, expected), "{kind} {case}");
                }
                let decode = |ids: &[u32]| tokenizer.decode(ids, false);
                assert_eq!(decode(&ids[..n_prompt]) + &streamed, decode(&ids), "{kind} {n_prompt} {case}");
            }
        }
    }
}

/// What `tokenizer_config.json` says, changed; the prompt "a" has these ids.
#[test]
fn flags_say_what_goes_around_a_text() {
    let with = |kind: &str, config: &str| {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tokenizer.model", "qwen.tiktoken"] {
            let from = fixtures().join("tokenizers").join(kind).join(name);
            if from.exists() {
                fs::copy(from, folder.path().join(name)).unwrap();
            }
        }
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        Tokenizer::load(folder.path()).unwrap()
    };
    let around = |kind: &str, config: &str| {
        let tokenizer = with(kind, config);
        let bare = tokenizer.encode("a", false, 99).unwrap();
        let all = tokenizer.encode("a", true, 99).unwrap();
        let at = all.windows(bare.len()).position(|ids| ids == bare).unwrap();
        (all[..at].to_vec(), all[at + bare.len()..].to_vec())
    };
    for (kind, config, before, after) in [
        ("sp-bpe", "{}", &[1][..], &[][..]),
        ("sp-bpe", r#"{"add_bos_token": false}"#, &[], &[]),
        ("sp-bpe", r#"{"add_bos_token": true, "add_eos_token": true}"#, &[1], &[2]),
        ("sp-bpe", r#"{"add_eos_token": true, "eos_token": "<|sys|>"}"#, &[1], &[3]),
        ("sp-bpe", r#"{"bos_token": null}"#, &[], &[]),
        ("sp-bpe", r#"{"bos_token": {"content": "<|sys|>"}, "tokenizer_class": "Other"}"#, &[3], &[]),
        ("sp-unigram", r#"{"tokenizer_class": "LlamaTokenizerFast"}"#, &[1], &[]),
        ("chatglm2", r#"{"tokenizer_class": "ChatGLMTokenizer"}"#, &[621, 623], &[]),
        ("chatglm2", r#"{"tokenizer_class": "ChatGLMTokenizer", "add_eos_token": true}"#, &[621, 623], &[]),
        ("chatglm2", "{}", &[1], &[]),
        ("qwen", "{}", &[], &[]),
        ("qwen", r#"{"add_bos_token": true, "bos_token": "<|im_start|>"}"#, &[760], &[]),
    ] {
        assert_eq!(around(kind, config), (before.to_vec(), after.to_vec()), "{kind} {config}");
    }
    assert_eq!(with("qwen", "{}").eos(), Some(759));
    assert_eq!(with("qwen", r#"{"eos_token": "<|im_end|>"}"#).eos(), Some(761));
    assert_eq!(with("sp-bpe", "{}").eos(), Some(2));

    // A class that is told to be less like it was: only the beginning of a text gets a space.
    let ids = |config| with("sp-bpe", config).encode("the</s>the", false, 99).unwrap();
    let (anew, once) = (
        ids(r#"{"tokenizer_class": "LlamaTokenizer"}"#),
        ids(r#"{"tokenizer_class": "LlamaTokenizer", "legacy": false}"#),
    );
    assert_eq!(anew[0], anew[2]);
    assert!(once.len() > 3 && once[..2] == anew[..2], "{once:?}");

    // Tokens that only the configuration has, behind the pieces and without a gap.
    let config = r#"{"added_tokens_decoder": {"620": {"content": "<|new|>", "special": true},
        "621": {"content": "<|newer|>"}, "623": {"content": "<|gap|>"}}}"#;
    let tokenizer = with("sp-bpe", config);
    assert_eq!((tokenizer.n_ids(), tokenizer.is_special(620), tokenizer.is_special(621)), (622, true, false));
    assert_eq!(tokenizer.encode("<|newer|><|new|>", false, 9).unwrap(), [621, 620]);
}

#[test]
fn special_tokens_are_those_of_the_reference() {
    for kind in KINDS {
        let (tokenizer, golden) = golden(kind);
        assert_eq!(u64::from(tokenizer.n_ids()), golden["vocab_size"].as_u64().unwrap());
        let named: Vec<u64> =
            golden["special"].as_object().unwrap().values().filter_map(Value::as_u64).collect();
        for id in 0..tokenizer.n_ids() + 2 {
            assert_eq!(tokenizer.is_special(id), named.contains(&u64::from(id)), "{kind} {id}");
        }
        let config =
            fs::read(fixtures().join("tokenizers").join(kind).join("tokenizer_config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        let eos = golden["special"][text(&config["eos_token"])].as_u64();
        assert_eq!(tokenizer.eos().map(u64::from), eos, "{kind}");
    }
}

#[test]
fn checkpoints_have_the_prompts_and_answers_of_the_reference() {
    let mut n_texts = 0;
    for entry in fs::read_dir(fixtures()).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(golden) = fs::read(folder.join("golden.json")) else { continue };
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        // Other prompts are of random ids, and may end within a character; some folders have no others.
        let texts = golden["prompts"].as_array().unwrap().iter().filter(|prompt| prompt["text"].is_string());
        for prompt in texts {
            let tokenizer = Tokenizer::load(&folder).unwrap();
            let prompt_text = text(&prompt["text"]);
            let mut all = ids(&prompt["ids"]);
            let n_prompt = all.len();
            assert_eq!(tokenizer.encode(prompt_text, true, usize::MAX).unwrap(), all, "{folder:?}");
            all.extend(ids(&prompt["greedy"]["ids"]));
            let whole = Detokenizer::new(&all[..n_prompt]).whole(&tokenizer, &all, n_prompt);
            // Of an answer that ends within a character the reference loses a whole run of bytes.
            match prompt["greedy"]["text"].as_str() {
                Some(answer) if !answer.ends_with('\u{FFFD}') => assert_eq!(whole, answer, "{folder:?}"),
                _ => assert!(!whole.is_empty(), "{folder:?}"),
            }
            n_texts += 1;
        }
    }
    assert!(n_texts > 10, "{n_texts} texts");
}
