//! Tokenizers against reference results: the ids of texts, the texts of ids, and the texts as they stream.

use std::fs;
use std::path::{Path, PathBuf};

use kvshard::text::{Detokenizer, Tokenizer};
use serde_json::Value;

const KINDS: [&str; 2] = ["byte-level", "spm"];

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
        let tokenizer = Tokenizer::load(&folder).unwrap();
        for prompt in golden["prompts"].as_array().unwrap() {
            // Other prompts are of random ids, and may end within a character.
            let Some(prompt_text) = prompt["text"].as_str() else { continue };
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
