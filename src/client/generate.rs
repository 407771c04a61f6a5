//! A router of one request: Prefill, then Decode until done, the text streamed as it comes.

use std::fmt;
use std::future;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::shard::Shard;
use crate::config::Parameters;
use crate::pb::v3;

/// Time for the shard to take back what an interrupted request holds; it does so by itself, only later.
pub(super) const CLEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It has as many tokens as were asked for.
    Length,
    /// The model ended it.
    EndOfText,
    /// A stop sequence came.
    StopSequence,
    /// Ctrl-C.
    Interrupted,
    /// Nobody reads the output any more.
    ReaderGone,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ending::Length => "length",
            Ending::EndOfText => "end of text",
            Ending::StopSequence => "stop sequence",
            Ending::Interrupted => "interrupted",
            Ending::ReaderGone => "reader gone",
        })
    }
}

/// A token that might have come.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// Its id.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Its text.
    pub text: String,
}

/// What came of a request. Displayed, it is one line for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The whole output, special tokens left out; where it was cut short, what was streamed.
    pub text: String,
    /// Tokens generated.
    pub n_tokens: u32,
    /// Why it ended.
    pub ending: Ending,
    /// The seed, where tokens were drawn.
    pub seed: Option<u64>,
    /// For each token the likeliest ones, likeliest first; empty unless asked for.
    pub alternatives: Vec<Vec<Alternative>>,
    /// From the call of Prefill to the first token.
    pub time_to_first_token: Option<Duration>,
    /// From the call of Prefill to the end.
    pub elapsed: Duration,
}

impl Summary {
    /// Tokens a second, once the first was there; `None` with fewer than two.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let decoding = self.elapsed.checked_sub(self.time_to_first_token?)?.as_secs_f64();
        let n_decoded = self.n_tokens.checked_sub(1).filter(|n| *n > 0)?;
        (decoding > 0.0).then(|| f64::from(n_decoded) / decoding)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} token{}", self.n_tokens, if self.n_tokens == 1 { "" } else { "s" })?;
        if let Some(rate) = self.tokens_per_second() {
            write!(f, ", {rate:.1} tokens/s")?;
        }
        if let Some(first) = self.time_to_first_token {
            write!(f, ", the first after {:.0} ms", first.as_secs_f64() * 1e3)?;
        }
        write!(f, "; ended by {}", self.ending)
    }
}

/// Asks the shard at `url` for one output and writes its text to `out` as it comes. Ends early at Ctrl-C and when
/// nobody reads `out` any more, which is no error; whatever ends it, the shard keeps nothing.
///
/// A live router beside it is not disturbed: ids are random, no slots are named, and neither Warmup nor a ClearCache
/// of everything is sent.
///
/// # Errors
/// The shard's, a lost connection, or a failed write to `out`.
pub async fn generate(
    url: &str,
    prompt: &str,
    parameters: &Parameters,
    out: &mut impl Write,
) -> Result<Summary> {
    let mut shard = Shard::connect(url).await?;
    shard.check_alone().await?;
    shard.info().await?;
    let request = request_of(prompt, parameters);
    let mut answer = Answer::new(request.id);
    let batch = v3::Batch {
        id: random_id(),
        requests: vec![request],
        size: 1,
        max_tokens: parameters.max_new_tokens,
        max_blocks: 0,
    };
    let batch_id = batch.id;
    let ended = tokio::select! {
        ended = answer.stream(&mut shard, batch, out) => ended,
        () = interrupted() => Ok(Ending::Interrupted),
    };
    if answer.is_held {
        // The call's failure is what the caller hears of; the shard drops forgotten batches by itself.
        let _ = tokio::time::timeout(CLEAR_TIMEOUT, shard.clear(batch_id)).await;
    }
    Ok(answer.summary(ended?))
}

/// What has come so far.
struct Answer {
    request_id: u64,
    began: Instant,
    first: Option<Instant>,
    /// Whether the shard may hold the batch.
    is_held: bool,
    /// Text written.
    streamed: String,
    n_tokens: u32,
    alternatives: Vec<Vec<Alternative>>,
    end: Option<v3::GeneratedText>,
}

impl Answer {
    fn new(request_id: u64) -> Answer {
        Answer {
            request_id,
            began: Instant::now(),
            first: None,
            is_held: false,
            streamed: String::new(),
            n_tokens: 0,
            alternatives: Vec::new(),
            end: None,
        }
    }

    async fn stream(&mut self, shard: &mut Shard, batch: v3::Batch, out: &mut impl Write) -> Result<Ending> {
        self.began = Instant::now();
        self.is_held = true;
        let mut step = shard.prefill(batch, None).await?;
        loop {
            let mut text = String::new();
            for generation in step.generations {
                text += &self.take(generation)?;
            }
            let ending = self.end.as_ref().map(ending_of).transpose()?;
            if let Some(end) = &self.end {
                self.is_held = step.batch.is_some();
                text += unstreamed(&end.text, &self.streamed, &text);
            }
            match write_all(out, &text) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Ending::ReaderGone),
                written => written?,
            }
            self.streamed += &text;
            if let Some(ending) = ending {
                return Ok(ending);
            }
            let Some(batch) = step.batch else { bail!("the shard dropped the request before its end") };
            step = shard.decode(vec![batch]).await?;
        }
    }

    /// Takes a request's news; the text to show.
    fn take(&mut self, generation: v3::Generation) -> Result<String> {
        if generation.request_id != self.request_id {
            bail!("the shard answered for request {}, which nobody sent", generation.request_id);
        }
        let tokens = generation.tokens.unwrap_or_default();
        if !tokens.ids.is_empty() {
            self.first.get_or_insert_with(Instant::now);
        }
        self.n_tokens = self.n_tokens.saturating_add(u32::try_from(tokens.ids.len())?);
        self.alternatives.extend(generation.top_tokens.into_iter().map(alternatives_of));
        self.end = generation.generated_text;
        let special = tokens.is_special.into_iter().chain(std::iter::repeat(false));
        Ok(tokens
            .texts
            .into_iter()
            .zip(special)
            .filter(|(_, special)| !special)
            .map(|(text, _)| text)
            .collect())
    }

    fn summary(self, ending: Ending) -> Summary {
        let (text, seed) = self.end.map_or((self.streamed, None), |end| (end.text, end.seed));
        Summary {
            text,
            n_tokens: self.n_tokens,
            ending,
            seed,
            alternatives: self.alternatives,
            time_to_first_token: self.first.map(|first| first - self.began),
            elapsed: self.began.elapsed(),
        }
    }
}

/// What the whole text has beyond what was streamed and what is about to be: an incomplete last character.
fn unstreamed<'a>(whole: &'a str, streamed: &str, text: &str) -> &'a str {
    whole.strip_prefix(streamed).and_then(|rest| rest.strip_prefix(text)).unwrap_or_default()
}

fn write_all(out: &mut impl Write, text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn alternatives_of(tokens: v3::Tokens) -> Vec<Alternative> {
    let entries = tokens.ids.into_iter().zip(tokens.logprobs).zip(tokens.texts);
    entries.map(|((id, logprob), text)| Alternative { id, logprob, text }).collect()
}

fn ending_of(end: &v3::GeneratedText) -> Result<Ending> {
    match v3::FinishReason::try_from(end.finish_reason) {
        Ok(v3::FinishReason::Length) => Ok(Ending::Length),
        Ok(v3::FinishReason::EosToken) => Ok(Ending::EndOfText),
        Ok(v3::FinishReason::StopSequence) => Ok(Ending::StopSequence),
        Err(_) => bail!("the shard ended the request for reason {}, which is none", end.finish_reason),
    }
}

/// The request, on slots of the shard's choice.
pub(super) fn request_of(prompt: &str, parameters: &Parameters) -> v3::Request {
    let chunk = v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Text(prompt.to_owned())) };
    v3::Request {
        id: random_id(),
        inputs: prompt.to_owned(),
        input_chunks: Some(v3::Input { chunks: vec![chunk] }),
        // What is too long is refused by the shard, with its limit, and not cut in silence. The largest number that
        // no implementation takes for a negative one.
        truncate: i32::MAX as u32,
        add_special_tokens: true,
        parameters: Some(v3::NextTokenChooserParameters {
            temperature: parameters.temperature,
            top_k: parameters.top_k,
            top_p: parameters.top_p,
            typical_p: parameters.typical_p,
            do_sample: parameters.do_sample,
            seed: parameters.seed,
            repetition_penalty: parameters.repetition_penalty,
            frequency_penalty: parameters.frequency_penalty,
            watermark: parameters.watermark,
            ..Default::default()
        }),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens: parameters.max_new_tokens,
            stop_sequences: parameters.stop.clone(),
            ignore_eos_token: false,
        }),
        top_n_tokens: parameters.top_n,
        ..Default::default()
    }
}

/// A number that no router beside us has: those count from 0, and probe with the largest.
pub(super) fn random_id() -> u64 {
    RandomState::new().hash_one(std::process::id()).clamp(1 << 32, u64::MAX - 1)
}

/// Ends at Ctrl-C.
pub(super) async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        // The signal cannot be caught, so it ends the process.
        future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests;
