//! Loading, encoding and detokenising, against what the `tokenizers` crate decodes and TGI's rule makes of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::pieces::REPLACEMENT;
use super::{Detokenizer, Tokenizer};
use crate::error::Error;

fn fixture(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fixtures/tokenizers").join(kind)
}

fn json_of(kind: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(kind).join("tokenizer.json")).unwrap()).unwrap()
}

/// A folder with these files.
fn folder(files: &[(&str, &Value)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

fn load(tokenizer: &Value, config: &Value) -> Result<Tokenizer, Error> {
    Tokenizer::load(folder(&[("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]).path())
}

/// The kinds of decoders: two with a table of pieces, one of them with and without stripping, and one without.
static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let mut unstripped = json_of("spm");
    unstripped["decoder"]["decoders"].as_array_mut().unwrap().pop();
    let mut metaspace = json_of("spm");
    metaspace["decoder"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let config = json!({});
    [json_of("byte-level"), json_of("spm"), unstripped, metaspace]
        .iter()
        .map(|tokenizer| load(tokenizer, &config).unwrap())
        .collect()
});

/// TGI's `Model.decode_token`, with the prompt's window as the protocol has it.
struct Reference {
    prefix: usize,
    read: usize,
}

impl Reference {
    fn new(tokenizer: &Tokenizer, prompt: &[u32]) -> Reference {
        let mut prefix = prompt.len().saturating_sub(5);
        // Not between the bytes of a character, where the crate's byte fallback would lose the whole run.
        let is_inside = |at: usize| {
            let token = prompt.get(at).and_then(|id| tokenizer.inner().id_to_token(*id)).unwrap_or_default();
            token.len() == 6 && ["<0x8", "<0x9", "<0xA", "<0xB"].iter().any(|start| token.starts_with(start))
        };
        let start = (prefix.saturating_sub(3)..=prefix).rev().find(|at| !is_inside(*at));
        prefix = start.unwrap_or(prefix);
        Reference { prefix, read: prompt.len() }
    }

    fn push(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let decode = |ids: &[u32]| tokenizer.inner().decode(ids, false).unwrap();
        let (known, text) = (decode(&ids[self.prefix..self.read]), decode(&ids[self.prefix..]));
        if text.chars().count() <= known.chars().count() || text.ends_with(REPLACEMENT) {
            return String::new();
        }
        (self.prefix, self.read) = (self.read, ids.len());
        text.chars().skip(known.chars().count()).collect()
    }
}

/// Ids with meaning and without: texts whose characters span tokens, cut anywhere, among arbitrary ids, some of them
/// of no token.
fn ids() -> impl Strategy<Value = Vec<Result<String, u32>>> {
    let text = "[a-c ▁�é你😀.\n]{0,6}";
    let piece = prop_oneof![text.prop_map(Ok), (0..400u32).prop_map(Err), (0..400u32).prop_map(Err)];
    prop::collection::vec(piece, 0..14)
}

fn spell(tokenizer: &Tokenizer, pieces: &[Result<String, u32>]) -> Vec<u32> {
    let ids = |piece: &Result<String, u32>| match piece {
        Ok(text) => tokenizer.encode(text, false, usize::MAX).unwrap(),
        Err(id) => vec![*id],
    };
    pieces.iter().flat_map(ids).collect()
}

proptest! {
    #[test]
    fn pieces_decode_as_the_crate_does(pieces in ids(), skip in any::<bool>()) {
        for tokenizer in TOKENIZERS.iter() {
            let ids = spell(tokenizer, &pieces);
            prop_assert_eq!(tokenizer.decode(&ids, skip), tokenizer.inner().decode(&ids, skip).unwrap());
        }
    }

    #[test]
    fn texts_come_by_the_rule_of_the_protocol(pieces in ids(), n_prompt in 0..12usize) {
        for tokenizer in TOKENIZERS.iter() {
            let ids = spell(tokenizer, &pieces);
            let n_prompt = n_prompt.min(ids.len());
            let mut detokenizer = Detokenizer::new(&ids[..n_prompt]);
            let mut reference = Reference::new(tokenizer, &ids[..n_prompt]);
            for end in n_prompt + 1..=ids.len() {
                let text = detokenizer.push(tokenizer, &ids[..end]);
                prop_assert_eq!(text, reference.push(tokenizer, &ids[..end]), "token {} of {:?}", end, ids);
            }
        }
    }

    #[test]
    fn nothing_of_a_text_is_lost(prompt in "[a-c é你😀]{1,6}", output in "[a-c é你😀\n]{0,8}", cut in 0..4usize) {
        for tokenizer in TOKENIZERS.iter().take(3) {
            let mut ids = tokenizer.encode(&prompt, true, usize::MAX).unwrap();
            let n_prompt = ids.len();
            ids.extend(tokenizer.encode(&output, false, usize::MAX).unwrap());
            // Without its last tokens the output may end within a character.
            ids.truncate(ids.len().saturating_sub(cut).max(n_prompt));
            let mut detokenizer = Detokenizer::new(&ids[..n_prompt]);
            let streamed: String =
                (n_prompt + 1..=ids.len()).map(|end| detokenizer.push(tokenizer, &ids[..end])).collect();
            let whole = detokenizer.whole(tokenizer, &ids, n_prompt);
            let rest = whole.strip_prefix(&streamed);
            let rest_is_incomplete = rest.is_some_and(|rest| ["", "\u{FFFD}"].contains(&rest));
            prop_assert!(rest_is_incomplete, "{:?} {:?}", streamed, whole);
            if !whole.contains(REPLACEMENT) {
                let before = tokenizer.decode(&ids[..n_prompt], true);
                prop_assert_eq!(before + &whole, tokenizer.decode(&ids, true));
            }
        }
    }
}

#[test]
fn the_whole_output_has_no_special_tokens_and_keeps_its_leading_space() {
    let tokenizer = Tokenizer::load(&fixture("spm")).unwrap();
    let mut ids = tokenizer.encode("a", true, 10).unwrap();
    let n_prompt = ids.len();
    ids.extend(tokenizer.encode("b c", false, 10).unwrap());
    ids.push(2);
    let detokenizer = Detokenizer::new(&ids[..n_prompt]);
    assert_eq!(detokenizer.whole(&tokenizer, &ids, n_prompt), " b c");
    assert_eq!(detokenizer.whole(&tokenizer, &ids[..n_prompt], n_prompt), "");
}

#[test]
fn a_character_that_never_ends_is_shown_at_the_end_only() {
    for (tokenizer, first, second) in [
        (Tokenizer::load(&fixture("byte-level")).unwrap(), "ä", "½"),
        (Tokenizer::load(&fixture("spm")).unwrap(), "<0xE4>", "<0xBD>"),
    ] {
        let id = |token: &str| tokenizer.inner().token_to_id(token).unwrap();
        let mut ids = tokenizer.encode("a", true, 10).unwrap();
        let n_prompt = ids.len();
        let mut detokenizer = Detokenizer::new(&ids);
        for token in [id(first), id(second)] {
            ids.push(token);
            assert_eq!(detokenizer.push(&tokenizer, &ids), "");
        }
        let whole = detokenizer.whole(&tokenizer, &ids, n_prompt);
        assert!(!whole.is_empty() && whole.chars().all(|c| c == REPLACEMENT), "{whole:?}");
    }
}

#[test]
fn truncation_takes_the_beginning_of_the_text_and_leaves_special_tokens() {
    let tokenizer =
        load(&json_of("spm"), &json!({"tokenizer_class": "LlamaTokenizer", "add_eos_token": true}));
    let tokenizer = tokenizer.unwrap();
    let whole = tokenizer.encode("The river runs", true, usize::MAX).unwrap();
    let text = &whole[1..whole.len() - 1];
    assert_eq!((whole[0], whole[whole.len() - 1]), (1, 2));
    assert_eq!(tokenizer.encode("The river runs", false, usize::MAX).unwrap(), text);
    let tail = |n: usize| &text[text.len() - n..];
    assert_eq!(tokenizer.encode("The river runs", false, 3).unwrap(), tail(3));
    assert_eq!(tokenizer.encode("The river runs", true, 5).unwrap(), [&[1], tail(3), &[2]].concat());
    for (truncate, ids) in [(2, &[1, 2][..]), (1, &[1]), (0, &[])] {
        assert_eq!(tokenizer.encode("The river runs", true, truncate).unwrap(), ids);
    }
    assert_eq!(tokenizer.encode("", true, 9).unwrap(), [1, 2]);
    assert!(tokenizer.encode("", false, 9).unwrap().is_empty());
}

#[test]
fn flags_go_before_the_post_processor() {
    let (spm, byte_level) = (json_of("spm"), json_of("byte-level"));
    let mut bare = spm.clone();
    bare["post_processor"] = Value::Null;
    let named = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}});
    let with = |flags: Value| {
        let mut config = named.clone();
        config.as_object_mut().unwrap().extend(flags.as_object().unwrap().clone());
        config
    };
    for (tokenizer, config, around) in [
        (&spm, json!({}), &[1][..]),
        (&bare, json!({}), &[]),
        (&spm, with(json!({"add_bos_token": false})), &[]),
        (&spm, with(json!({"add_bos_token": true, "add_eos_token": true})), &[1, 2]),
        (&spm, with(json!({"add_eos_token": true})), &[1, 2]),
        (&bare, with(json!({"add_bos_token": true})), &[1]),
        (&spm, with(json!({"add_bos_token": null})), &[1]),
        // Classes with flags of their own.
        (&bare, json!({"tokenizer_class": "LlamaTokenizerFast"}), &[1]),
        (&bare, json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}), &[]),
        (&spm, json!({"tokenizer_class": "LlamaTokenizer", "bos_token": null}), &[]),
        (&bare, json!({"tokenizer_class": "Qwen2Tokenizer"}), &[]),
        // A token that nothing names cannot be added.
        (&bare, json!({"add_bos_token": true}), &[]),
        (&bare, json!({"add_bos_token": true, "bos_token": "<none>"}), &[]),
        (&byte_level, json!({"add_bos_token": false}), &[]),
    ] {
        assert_eq!(load(tokenizer, &config).unwrap().encode("", true, 9).unwrap(), around, "{config}");
    }
}

#[test]
fn special_tokens_are_those_that_any_file_names() {
    let tokenizer = load(&json_of("spm"), &json!({"eos_token": "<eoh>"})).unwrap();
    assert_eq!(tokenizer.eos(), Some(383));
    let special = |tokenizer: &Tokenizer| (0..400).filter(|id| tokenizer.is_special(*id)).collect::<Vec<_>>();
    assert_eq!(special(&tokenizer), [0, 1, 2]);
    let described = json!({"added_tokens_decoder": {"383": {"content": "<eoh>", "special": true}}});
    let tokenizer = load(&json_of("spm"), &described).unwrap();
    assert_eq!((special(&tokenizer), tokenizer.eos()), (vec![0, 1, 2, 383], None));
    assert_eq!(tokenizer.decode(&[383], true), "");
    // The letter is no added token yet; a token that nobody knows stays unknown.
    let listed = json!({"additional_special_tokens": ["▁a", {"content": "<new>"}]});
    let tokenizer = load(&json_of("spm"), &listed).unwrap();
    let a = tokenizer.inner().token_to_id("▁a").unwrap();
    assert_eq!((special(&tokenizer), tokenizer.n_ids()), (vec![0, 1, 2, a], 384));

    let map = json!({"eos_token": "</s>", "bos_token": {"content": "<s>"}});
    let folder = folder(&[("tokenizer.json", &json_of("spm")), ("special_tokens_map.json", &map)]);
    assert_eq!(Tokenizer::load(folder.path()).unwrap().eos(), Some(2));
}

#[test]
fn a_byte_level_text_gets_a_leading_space_only_where_the_configuration_says_so() {
    let mut tokenizer = json_of("byte-level");
    tokenizer["pre_tokenizer"] =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let encode = |config: Value| load(&tokenizer, &config).unwrap().encode("a", false, 9).unwrap();
    let spaced = encode(json!({"add_prefix_space": true}));
    assert_ne!(encode(json!({})), spaced);
    let unsaid = folder(&[("tokenizer.json", &tokenizer)]);
    assert_eq!(Tokenizer::load(unsaid.path()).unwrap().encode("a", false, 9).unwrap(), spaced);
}

#[test]
fn punctuation_is_drawn_to_its_word_where_that_does_no_harm() {
    let vocab = json!({"[UNK]": 0, "no": 1, ".": 2, "'": 3, "s": 4, "n't": 5, "##pe": 6});
    let word_piece = json!({
        "version": "1.0", "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    });
    let cleans = json!({"clean_up_tokenization_spaces": true});
    let tokenizer = load(&word_piece, &cleans).unwrap();
    let ids = [1, 6, 2, 1, 5, 1, 3, 4, 1];
    assert_eq!(tokenizer.decode(&ids, false), "nope . no n't no ' s no");
    let mut detokenizer = Detokenizer::new(&ids[..2]);
    let streamed: String = (3..=ids.len()).map(|end| detokenizer.push(&tokenizer, &ids[..end])).collect();
    assert_eq!(streamed, ". non't no ' s no", "the space before the quote was out already");
    assert_eq!(detokenizer.whole(&tokenizer, &ids, 2), ". non't no's no");

    let spaced = load(&json_of("byte-level"), &cleans).unwrap();
    let ids = spaced.encode("git add .", false, 99).unwrap();
    assert_eq!(Detokenizer::new(&[]).whole(&spaced, &ids, 0), "git add .");
}

#[test]
fn a_broken_folder_is_told_in_a_sentence() {
    let spm = json_of("spm");
    let tokenizer = |pointer: &str, value: Value| {
        let mut broken = spm.clone();
        *broken.pointer_mut(pointer).unwrap() = value;
        broken
    };
    let twice = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}});
    for broken in [
        json!([]),
        json!({}),
        json!({"version": "1.0"}),
        tokenizer("/version", json!("2.0")),
        tokenizer("/model/vocab", json!({})),
        tokenizer("/model/vocab", json!({"a": -1})),
        tokenizer("/model/vocab", json!({"a": 4_294_967_295_u32})),
        tokenizer("/model/merges", json!([["nothing", "known"]])),
        // Two tokens longer than any: the crate indexes beyond its buffer.
        json!({"version": "1.0", "added_tokens": [], "model":
            {"type": "BPE", "vocab": {"ab": 0, "cd": 1}, "merges": [["ab", "cd"]]}}),
        tokenizer("/decoder", json!(3)),
        tokenizer("/post_processor", twice),
    ] {
        assert!(matches!(load(&broken, &json!({})), Err(Error::Checkpoint(_))), "{broken}");
    }
    for config in [
        json!([]),
        json!({"add_bos_token": 1}),
        json!({"bos_token": 3}),
        json!({"clean_up_tokenization_spaces": "no"}),
        json!({"added_tokens_decoder": {"x": {"content": "a"}}}),
        json!({"added_tokens_decoder": {"3": {}}}),
        json!({"additional_special_tokens": [[]]}),
    ] {
        let Err(Error::Checkpoint(told)) = load(&spm, &config) else { panic!("{config}") };
        assert!(told.starts_with("tokenizer_config.json"), "{told}");
    }
    let other = TempDir::new().unwrap();
    let refusal = || match Tokenizer::load(other.path()) {
        Err(Error::Checkpoint(told)) => told,
        _ => panic!("loaded, or not the checkpoint's fault"),
    };
    assert_eq!(refusal(), "the model has none of tokenizer.json, tokenizer.model, qwen.tiktoken");
    for (name, content) in
        [("qwen.tiktoken", "x"), ("tokenizer.model", "x"), ("tokenizer.json", "{\"version\": \"1.0\", \"mod")]
    {
        fs::write(other.path().join(name), content).unwrap();
        assert!(refusal().starts_with(&format!("{name} cannot be used: ")), "{}", refusal());
    }
}

#[test]
fn a_text_beyond_all_bounds_is_refused() {
    let tokenizer = Tokenizer::load(&fixture("byte-level")).unwrap();
    let told = tokenizer.encode(&"a ".repeat((4 << 20) + 1), true, 10).unwrap_err();
    assert!(matches!(&told, Error::Invalid(text) if text.contains("8388610 bytes")), "{told}");
}
