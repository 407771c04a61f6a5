//! Protobuf messages as text, one a line, as the recorded transcript has them: `name: value`, `name { … }`, and
//! three shorthands of the recorder's: `name[8]=5-10,14,19` for numbers, `<2300 chars: head...tail>` within quotes,
//! and lists of which the first six numbers and the last two are shown.

use kvshard::pb::v3;

/// A message.
#[derive(Debug, Default)]
pub struct Node<'a>(Vec<(&'a str, Value<'a>)>);

#[derive(Debug)]
enum Value<'a> {
    Word(&'a str),
    Text(String),
    Numbers(Vec<u32>),
    Message(Node<'a>),
}

impl<'a> Node<'a> {
    /// Reads a whole line's message.
    pub fn parse(text: &'a str) -> Node<'a> {
        let mut rest = text;
        let node = Node::fields(&mut rest);
        assert!(rest.is_empty(), "{rest:?} is left of {text:?}");
        node
    }

    /// Reads fields up to a closing brace, which it takes, or to the end.
    fn fields(rest: &mut &'a str) -> Node<'a> {
        let mut fields = Vec::new();
        loop {
            *rest = rest.trim_start();
            if rest.is_empty() || take(rest, "}") {
                return Node(fields);
            }
            let name = word(rest, |c| c.is_alphanumeric() || c == '_');
            *rest = rest.trim_start();
            let value = if take(rest, "{") {
                Value::Message(Node::fields(rest))
            } else if take(rest, ":") {
                *rest = rest.trim_start();
                if take(rest, "\"") { Value::Text(quoted(rest)) } else { Value::Word(bare(rest)) }
            } else {
                assert!(take(rest, "["), "no value at {rest:?}");
                let n: usize = word(rest, |c| c.is_ascii_digit()).parse().unwrap();
                assert!(take(rest, "]="));
                let numbers = runs(bare(rest));
                assert_eq!(numbers.len(), n);
                Value::Numbers(numbers)
            };
            fields.push((name, value));
        }
    }

    fn values(&self, name: &str) -> impl Iterator<Item = &Value<'a>> {
        self.0.iter().filter(move |(field, _)| *field == name).map(|(_, value)| value)
    }

    fn word(&self, name: &str) -> Option<&'a str> {
        self.values(name).find_map(|value| if let Value::Word(word) = value { Some(*word) } else { None })
    }

    /// A number; absent ones are 0, as on the wire.
    pub fn number<T: std::str::FromStr<Err: std::fmt::Debug> + Default>(&self, name: &str) -> T {
        self.optional(name).unwrap_or_default()
    }

    pub fn optional<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, name: &str) -> Option<T> {
        self.word(name).map(|word| word.parse().unwrap())
    }

    fn text(&self, name: &str) -> String {
        let texts =
            self.values(name).find_map(|value| if let Value::Text(text) = value { Some(text) } else { None });
        texts.cloned().unwrap_or_default()
    }

    fn children(&self, name: &str) -> impl Iterator<Item = &Node<'a>> {
        self.values(name).filter_map(|value| if let Value::Message(node) = value { Some(node) } else { None })
    }

    fn child(&self, name: &str) -> Option<&Node<'a>> {
        self.children(name).next()
    }

    /// A repeated number.
    pub fn numbers<T: std::str::FromStr<Err: std::fmt::Debug> + From<u32>>(&self, name: &str) -> Vec<T> {
        let each = |value: &Value<'a>| match value {
            Value::Word(word) => vec![word.parse().unwrap()],
            Value::Numbers(numbers) => numbers.iter().copied().map(T::from).collect(),
            _ => panic!("{name} is no number"),
        };
        self.values(name).flat_map(each).collect()
    }

    pub fn cached_batch(&self) -> v3::CachedBatch {
        v3::CachedBatch {
            id: self.number("id"),
            request_ids: self.numbers("request_ids"),
            size: self.number("size"),
            max_tokens: self.number("max_tokens"),
            current_tokens: self.number("current_tokens"),
        }
    }

    /// Handles of Decode.
    pub fn batches(&self) -> Vec<v3::CachedBatch> {
        self.children("batches").map(Node::cached_batch).collect()
    }

    /// A PrefillRequest; lists that are not shown whole have `n_slots` numbers.
    pub fn prefill(&self, n_slots: Option<usize>) -> v3::PrefillRequest {
        v3::PrefillRequest {
            batch: self.child("batch").map(|batch| batch.batch(n_slots)),
            cached_batch: self.child("cached_batch").map(Node::cached_batch),
        }
    }

    pub fn warmup(&self) -> v3::WarmupRequest {
        v3::WarmupRequest {
            batch: self.child("batch").map(|batch| batch.batch(None)),
            max_input_tokens: self.optional("max_input_tokens"),
            max_prefill_tokens: self.number("max_prefill_tokens"),
            max_total_tokens: self.optional("max_total_tokens"),
        }
    }

    fn batch(&self, n_slots: Option<usize>) -> v3::Batch {
        v3::Batch {
            id: self.number("id"),
            requests: self.children("requests").map(|request| request.request(n_slots)).collect(),
            size: self.number("size"),
            max_tokens: self.number("max_tokens"),
            max_blocks: self.number("max_blocks"),
        }
    }

    fn request(&self, n_slots: Option<usize>) -> v3::Request {
        let whole = |numbers: Vec<u32>| match n_slots {
            Some(n) => filled(&numbers, n),
            None => numbers,
        };
        v3::Request {
            id: self.number("id"),
            inputs: self.text("inputs"),
            truncate: self.number("truncate"),
            parameters: self.child("parameters").map(Node::parameters),
            stopping_parameters: self.child("stopping_parameters").map(|stopping| {
                v3::StoppingCriteriaParameters {
                    max_new_tokens: stopping.number("max_new_tokens"),
                    stop_sequences: Vec::from_iter(
                        Some(stopping.text("stop_sequences")).filter(|stop| !stop.is_empty()),
                    ),
                    ignore_eos_token: stopping.number("ignore_eos_token"),
                }
            }),
            prefill_logprobs: self.number("prefill_logprobs"),
            top_n_tokens: self.number("top_n_tokens"),
            input_chunks: self.child("input_chunks").map(Node::input),
            blocks: whole(self.numbers("blocks")),
            slots: whole(self.numbers("slots")),
            adapter_id: None,
            cache_len: self.number("cache_len"),
            add_special_tokens: self.number("add_special_tokens"),
            chunk_len: self.optional("chunk_len"),
        }
    }

    fn parameters(&self) -> v3::NextTokenChooserParameters {
        let grammar_type =
            self.word("grammar_type").map(|name| v3::GrammarType::from_str_name(name).unwrap());
        v3::NextTokenChooserParameters {
            temperature: self.number("temperature"),
            top_k: self.number("top_k"),
            top_p: self.number("top_p"),
            typical_p: self.number("typical_p"),
            do_sample: self.number("do_sample"),
            seed: self.number("seed"),
            repetition_penalty: self.number("repetition_penalty"),
            watermark: self.number("watermark"),
            frequency_penalty: self.number("frequency_penalty"),
            grammar: self.text("grammar"),
            grammar_type: grammar_type.unwrap_or_default().into(),
        }
    }

    fn input(&self) -> v3::Input {
        let chunk = |node: &Node<'a>| {
            use v3::input_chunk::Chunk;
            let image = |image: &Node<'a>| v3::Image {
                data: image.text("data").into_bytes(),
                mimetype: image.text("mimetype"),
            };
            let image = node.child("image").map(|node| Chunk::Image(image(node)));
            v3::InputChunk { chunk: image.or_else(|| Some(Chunk::Text(node.text("text")))) }
        };
        v3::Input { chunks: self.children("chunks").map(chunk).collect() }
    }
}

fn take(rest: &mut &str, prefix: &str) -> bool {
    rest.strip_prefix(prefix).map(|after| *rest = after).is_some()
}

fn word<'a>(rest: &mut &'a str, belongs: impl Fn(char) -> bool) -> &'a str {
    let end = rest.find(|c| !belongs(c)).unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    assert!(!word.is_empty(), "no word at {rest:?}");
    *rest = after;
    word
}

fn bare<'a>(rest: &mut &'a str) -> &'a str {
    word(rest, |c| !c.is_whitespace())
}

/// A string up to its closing quote, unescaped, and made as long as it was.
fn quoted(rest: &mut &str) -> String {
    let mut text = String::new();
    let mut chars = rest.char_indices();
    loop {
        let (index, c) = chars.next().expect("a closing quote");
        match c {
            '"' => {
                *rest = &rest[index + 1..];
                return lengthened(text);
            }
            '\\' => text.push(match chars.next().expect("an escaped character").1 {
                'n' => '\n',
                c @ ('"' | '\\' | '\'') => c,
                c => panic!("\\{c} is not expected"),
            }),
            c => text.push(c),
        }
    }
}

/// `<N chars: head...tail>` as a text of N characters: the head goes on by its period until the tail. `<N bytes>` as
/// so many.
fn lengthened(text: String) -> String {
    let Some((n, rest)) = text.strip_prefix('<').and_then(|text| text.split_once(' ')) else { return text };
    let Ok(n) = n.parse::<usize>() else { return text };
    if rest == "bytes>" {
        return "x".repeat(n);
    }
    let rest = rest.strip_prefix("chars: ").and_then(|rest| rest.strip_suffix('>')).unwrap();
    let (head, tail) = rest.split_once("...").unwrap();
    let (head, tail): (Vec<char>, Vec<char>) = (head.chars().collect(), tail.chars().collect());
    let repeats = |period: &usize| (*period..head.len()).all(|index| head[index] == head[index - period]);
    let period = (1..head.len()).find(repeats).unwrap_or(head.len());
    let body = head.iter().take(period).cycle().take(n - tail.len());
    body.chain(&tail).collect()
}

/// `5-10,14,19`.
fn runs(text: &str) -> Vec<u32> {
    let run = |run: &str| {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        first.parse::<u32>().unwrap()..=last.parse().unwrap()
    };
    text.split(',').flat_map(run).collect()
}

/// `n` numbers of which the first six and the last two are listed: between them the next free ones.
fn filled(listed: &[u32], n: usize) -> Vec<u32> {
    let (first, last) = listed.split_at(6);
    let between = (first[5] + 1..).filter(|slot| !listed.contains(slot)).take(n - listed.len());
    first.iter().copied().chain(between).chain(last.iter().copied()).collect()
}
