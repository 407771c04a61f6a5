//! A shard in this process, behind real sockets, started by the flags that an operator would type.

use clap::Parser as _;
use kvshard::cli::{Cli, Command};
use kvshard::config;
use kvshard::engine::EngineStats;
use kvshard::pb::v3::text_generation_service_client::TextGenerationServiceClient;
use kvshard::pb::{v2, v3};
use kvshard::server::{RunningShard, load};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

pub type Client = TextGenerationServiceClient<Channel>;
pub type ClientV2 = v2::text_generation_service_client::TextGenerationServiceClient<Channel>;

/// A running shard and a connection to it.
pub struct TestShard {
    pub shard: RunningShard,
    pub client: Client,
    /// Holds the socket.
    _folder: TempDir,
}

impl TestShard {
    /// Serves a fixture with a pool of 2,048 slots, half of it the router's, unless `flags` say otherwise.
    pub async fn start(fixture: &str, flags: &[&str]) -> TestShard {
        Self::start_folder(&super::fixture(fixture), flags).await
    }

    pub async fn start_folder(model: &std::path::Path, flags: &[&str]) -> TestShard {
        let folder = tempfile::tempdir().unwrap();
        let uds = folder.path().join("s");
        let mut args = vec!["kvshard", "serve", model.to_str().unwrap(), "--uds-path", uds.to_str().unwrap()];
        if !flags.contains(&"--pool-tokens") {
            args.extend(["--pool-tokens", "2048", "--own-slots", "1024"]);
        }
        args.extend(flags);
        let Command::Serve(args) = Cli::try_parse_from(args).unwrap().command else { unreachable!() };
        let (config, _) = config::serve(*args).unwrap_or_else(|refusal| panic!("{refusal}"));
        let shard_config = config.shard.clone();
        let loaded = tokio::task::spawn_blocking(move || load(&shard_config)).await.unwrap().unwrap();
        let shard = RunningShard::start(&config.shard, &config.socket, loaded).await.unwrap();
        let client = connect(shard.url()).await;
        TestShard { shard, client, _folder: folder }
    }

    pub async fn client_v2(&self) -> ClientV2 {
        ClientV2::new(channel(self.shard.url()).await)
    }

    /// Another connection.
    pub async fn connect(&self) -> Client {
        connect(self.shard.url()).await
    }

    pub async fn stats(&self) -> EngineStats {
        self.shard.engine().check_integrity().await.unwrap()
    }

    /// The end of every test: the books balance, and once everything is cleared nothing is held.
    pub async fn finish(mut self) {
        self.stats().await;
        self.client.clear_cache(v3::ClearCacheRequest { id: None }).await.unwrap();
        let stats = self.stats().await;
        assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0), "{stats:?}");
        assert!(self.shard.stop().await, "the shard did not drain");
    }
}

pub async fn connect(url: &str) -> Client {
    Client::new(channel(url).await).max_encoding_message_size(usize::MAX)
}

pub async fn channel(url: &str) -> Channel {
    let endpoint = Endpoint::try_from(url.replacen("unix://", "unix:", 1)).unwrap();
    endpoint.connect().await.unwrap()
}

/// A request as a router sends it, greedy, of its own slots if `slots` is empty.
pub fn request(id: u64, text: &str, max_new_tokens: u32) -> v3::Request {
    v3::Request {
        id,
        inputs: text.into(),
        truncate: 1024,
        parameters: Some(greedy()),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens,
            stop_sequences: vec![],
            ignore_eos_token: true,
        }),
        input_chunks: Some(v3::Input {
            chunks: vec![v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Text(text.into())) }],
        }),
        add_special_tokens: true,
        ..Default::default()
    }
}

pub fn greedy() -> v3::NextTokenChooserParameters {
    v3::NextTokenChooserParameters {
        temperature: 1.0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..Default::default()
    }
}

/// Puts a request on slots from `first` on.
pub fn on_slots(mut request: v3::Request, slots: impl IntoIterator<Item = u32>) -> v3::Request {
    request.slots = slots.into_iter().collect();
    request.blocks = request.slots.clone();
    request
}

pub fn prefill(batch: u64, requests: Vec<v3::Request>, merge: Option<u64>) -> v3::PrefillRequest {
    v3::PrefillRequest {
        batch: Some(v3::Batch { id: batch, size: requests.len() as u32, requests, ..Default::default() }),
        cached_batch: merge.map(handle),
    }
}

pub fn decode(batches: &[u64]) -> v3::DecodeRequest {
    v3::DecodeRequest { batches: batches.iter().copied().map(handle).collect() }
}

pub fn handle(id: u64) -> v3::CachedBatch {
    v3::CachedBatch { id, ..Default::default() }
}

pub fn filter(batch_id: u64, request_ids: &[u64]) -> v3::FilterBatchRequest {
    v3::FilterBatchRequest { batch_id, request_ids: request_ids.to_vec() }
}

/// What a request got, collected over a run.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Collected {
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub text: String,
    pub end: Option<v3::GeneratedText>,
}

impl Collected {
    /// Adds the news of request `id`, checking what a router relies on.
    pub fn add(&mut self, id: u64, generations: &[v3::Generation]) {
        for generation in generations.iter().filter(|generation| generation.request_id == id) {
            assert!(self.end.is_none(), "news of request {id} after its end");
            let tokens = generation.tokens.as_ref().expect("tokens are present");
            let n = tokens.ids.len();
            assert!(n >= 1 && [tokens.logprobs.len(), tokens.texts.len(), tokens.is_special.len()] == [n; 3]);
            self.ids.extend(&tokens.ids);
            self.logprobs.extend(&tokens.logprobs);
            self.text.extend(tokens.texts.iter().map(String::as_str));
            self.end = generation.generated_text.clone();
            if let Some(end) = &self.end {
                assert_eq!(end.generated_tokens as usize, self.ids.len());
            }
        }
    }
}

/// Runs a batch from Prefill to its end; what each request got.
pub async fn run_to_end(client: &mut Client, batch: u64, requests: Vec<v3::Request>) -> Vec<Collected> {
    let ids: Vec<u64> = requests.iter().map(|request| request.id).collect();
    let mut collected = vec![Collected::default(); ids.len()];
    let answer = client.prefill(prefill(batch, requests, None)).await.unwrap().into_inner();
    let (mut generations, mut cached) = (answer.generations, answer.batch);
    loop {
        ids.iter().zip(&mut collected).for_each(|(&id, collected)| collected.add(id, &generations));
        let Some(batch) = cached else { return collected };
        assert_eq!(batch.size as usize, batch.request_ids.len());
        let answer = client.decode(decode(&[batch.id])).await.unwrap().into_inner();
        (generations, cached) = (answer.generations, answer.batch);
    }
}
