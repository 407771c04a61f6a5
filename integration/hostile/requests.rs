//! Sampling, grammars, stopping and prompts of all kinds.

use kvshard::pb::v3;
use kvshard::pb::v3::input_chunk::Chunk;
use tonic::Code;

use super::PROMPT;
use super::calls::Case;

pub(super) fn cases() -> Vec<Case> {
    [sampling(), extreme_sampling(), grammars(), stopping(), prompts(), adapters()]
        .into_iter()
        .flatten()
        .collect()
}

type Parameters = v3::NextTokenChooserParameters;
type Set = fn(&mut Parameters, f32);

fn parameters(request: &mut v3::Request) -> &mut Parameters {
    request.parameters.as_mut().unwrap()
}

/// Parameters of which no distribution comes.
fn sampling() -> Vec<Case> {
    let names: [(&str, Set, &[f32]); 5] = [
        ("temperature", |p, value| p.temperature = value, &[0.0, -1.0]),
        ("repetition_penalty", |p, value| p.repetition_penalty = value, &[0.0, -1.0, 1e30, 1e-30]),
        ("frequency_penalty", |p, value| p.frequency_penalty = value, &[1e30, -1e30]),
        ("top_p", |p, value| p.top_p = value, &[0.0, -1.0, 1.01]),
        ("typical_p", |p, value| p.typical_p = value, &[0.0, -1.0, 1.01]),
    ];
    let mut cases = Vec::new();
    for (name, set, values) in names {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].iter().chain(values) {
            let what = format!("{name} is {value}");
            let words = [what.as_str()];
            cases.push(Case::invalid(what.as_str(), |request| set(parameters(request), *value), &words));
        }
    }
    cases
}

/// Parameters at the ends of their ranges.
fn extreme_sampling() -> Vec<Case> {
    vec![
        Case::known("no parameters at all", |request| request.parameters = None),
        Case::known("top_k 1", |request| parameters(request).top_k = 1),
        Case::known("the smallest temperature", |request| {
            parameters(request).temperature = f32::from_bits(1)
        }),
        Case::known("the smallest top_p", |request| parameters(request).top_p = f32::from_bits(1)),
        Case::served("the smallest typical_p", |request| parameters(request).typical_p = f32::from_bits(1)),
        Case::served("the largest temperature", |request| parameters(request).temperature = f32::MAX),
        Case::served("top_k beyond the vocabulary", |request| parameters(request).top_k = u32::MAX),
        Case::served("the largest penalties", |request| {
            parameters(request).repetition_penalty = 10_000.0;
            parameters(request).frequency_penalty = -10_000.0;
        }),
        Case::served("the largest seed", |request| {
            parameters(request).seed = u64::MAX;
            parameters(request).do_sample = true;
        }),
        Case::served("a watermark", |request| parameters(request).watermark = true),
        Case::known("top_n beyond the vocabulary", |request| request.top_n_tokens = u32::MAX),
        Case::known("log-probabilities that are not enabled", |request| request.prefill_logprobs = true),
    ]
}

fn grammars() -> Vec<Case> {
    let with = |text: &'static str, kind: i32| {
        move |request: &mut v3::Request| {
            parameters(request).grammar = text.into();
            parameters(request).grammar_type = kind;
        }
    };
    vec![
        Case::refused("a regex", with("[a-z]+", 2), Code::Unimplemented, &["regex"]),
        Case::refused(
            "a regex that explodes",
            with("((a*)*)*b{1000}{1000}", 2),
            Code::Unimplemented,
            &["regex"],
        ),
        Case::refused("a schema", with("{}", 1), Code::Unimplemented, &["JSON"]),
        Case::invalid("a grammar of no type", with("x", 99), &["99"]),
        Case::invalid("a grammar of a negative type", with("x", i32::MIN), &["-2147483648"]),
        Case::known("a type without a grammar", with("", 99)),
        Case::known("a grammar without a type", with("[a-z]+", 0)),
    ]
}

fn stopping() -> Vec<Case> {
    let with = |stops: Vec<String>| {
        move |request: &mut v3::Request| {
            request.stopping_parameters.as_mut().unwrap().stop_sequences = stops;
        }
    };
    let never = |len: usize| "\u{1}".repeat(len);
    vec![
        Case::invalid("an empty stop sequence", with(vec![String::new()]), &["empty"]),
        Case::invalid("an empty one among others", with(vec![never(3), String::new()]), &["empty"]),
        Case::invalid("a stop sequence too long", with(vec![never(5000)]), &["5000", "4096"]),
        Case::invalid("a megabyte to stop at", with(vec![never(1 << 20)]), &["1048576", "4096"]),
        Case::invalid("too many stop sequences", with(vec![never(1); 65]), &["65", "64"]),
        Case::known("the longest stop sequence", with(vec![never(4096)])),
        Case::known("the most stop sequences", with(vec![never(9); 64])),
        Case::known("the same ones, the longest", with(vec![never(4096); 64])),
    ]
}

fn prompts() -> Vec<Case> {
    let chunks = |chunks: Vec<Option<Chunk>>| {
        let chunks = chunks.into_iter().map(|chunk| v3::InputChunk { chunk }).collect();
        Some(v3::Input { chunks })
    };
    let text = |text: &str| Some(Chunk::Text(text.into()));
    let image = |n_bytes: usize| {
        Some(Chunk::Image(v3::Image { data: vec![0xff; n_bytes], mimetype: "text/html\0\n".into() }))
    };
    let bare = |prompt: &'static str| {
        move |request: &mut v3::Request| {
            request.add_special_tokens = false;
            request.inputs = prompt.into();
            request.input_chunks = chunks(vec![text(prompt)]);
        }
    };
    let of = |input: Option<v3::Input>| move |request: &mut v3::Request| request.input_chunks = input;
    let (before, after) = PROMPT.split_at(9);
    vec![
        Case::invalid("an empty prompt", bare(""), &["empty"]),
        Case::invalid(
            "an image alone",
            |request| {
                request.add_special_tokens = false;
                request.input_chunks = chunks(vec![image(100)]);
            },
            &["empty"],
        ),
        Case::served("only what the tokenizer adds", of(chunks(vec![text("")]))),
        Case::served("a chunk of neither text nor image", of(chunks(vec![None, None]))),
        Case::served("special tokens as text", bare("</s></s><s><unk><eoh>")),
        Case::served("characters of all sizes", bare("\0\u{1}\u{7f}é世🦀\u{10ffff}\u{202e}\r\n")),
        Case::known("no chunks", of(None)),
        Case::known("an empty list of chunks", of(chunks(vec![]))),
        Case::known(
            "text in pieces, images between",
            of(chunks(vec![image(0), text(before), image(1 << 20), text(""), None, text(after)])),
        ),
    ]
}

/// Routers put the client's name for the model here.
fn adapters() -> Vec<Case> {
    let names = ["", "gpt-4", "../../../etc/passwd", "\0\u{1b}[31m"].map(str::to_owned);
    let names = names.into_iter().chain(["x".repeat(1 << 20)]);
    names
        .enumerate()
        .map(|(index, name)| {
            Case::known(format!("adapter {index}"), |request| request.adapter_id = Some(name))
        })
        .collect()
}
