//! What a fault costs: a failed step its own batches and nothing else; a hang, a panic or a lost device the process,
//! which says so first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use kvshard::backend::cpu::Cpu;
use kvshard::error::Error;
use kvshard::model::checkpoint::Checkpoint;
use kvshard::model::executor::Executor;
use kvshard::model::families;
use kvshard::model::ranks::Ranks;
use kvshard::model::weights::Weights;
use kvshard::model::{Device, Options, Parts, PoolSize};
use kvshard::pb::v3;
use kvshard::server::Fault;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::backend::Faulty;
use crate::support::executor::around;
use crate::support::fixture;
use crate::support::shard::{Collected, TestShard, channel, decode, on_slots, prefill, request, run_to_end};

const LONG: &str = "the quick brown fox jumps over the lazy dog and then some more words follow in a row";

/// What `grpc.health.v1` says, which must be the same of every service.
async fn standard_health(shard: &TestShard) -> ServingStatus {
    let mut client = HealthClient::new(channel(shard.shard.url()).await);
    let mut statuses = Vec::new();
    for service in ["", "generate.v3.TextGenerationService", "generate.v2.TextGenerationService"] {
        let asked = client.check(HealthCheckRequest { service: service.into() }).await.unwrap();
        statuses.push(asked.into_inner().status());
    }
    assert!(statuses.windows(2).all(|pair| pair[0] == pair[1]), "{statuses:?}");
    statuses[0]
}

/// Waits until `grpc.health.v1` says so; the tests' only limit is the patience of whoever runs them.
async fn until_standard_health(shard: &TestShard, status: ServingStatus) {
    // Services change one after the other.
    let mut client = HealthClient::new(channel(shard.shard.url()).await);
    for service in ["", "generate.v3.TextGenerationService", "generate.v2.TextGenerationService"] {
        let asked = || HealthCheckRequest { service: service.into() };
        while client.check(asked()).await.unwrap().into_inner().status() != status {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn a_hanging_step_is_red_until_it_ends() {
    let (release, released) = mpsc::channel::<()>();
    let faulty = move |executor| {
        around(executor, move |step| {
            if step == 2 {
                released.recv().unwrap();
            }
            Ok(())
        })
    };
    let mut shard = TestShard::start_around(&fixture("llama"), &["--step-timeout", "0.05"], faulty).await;
    shard.client.prefill(prefill(1, vec![request(1, LONG, 3)], None)).await.unwrap();
    shard.client.health(v3::HealthRequest {}).await.unwrap();
    let mut other = shard.connect().await;
    let hanging = tokio::spawn(async move { other.decode(decode(&[1])).await });
    let status = loop {
        match shard.client.health(v3::HealthRequest {}).await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("a step has been running for"), "{status}");
    until_standard_health(&shard, ServingStatus::NotServing).await;
    assert!(!hanging.is_finished());
    release.send(()).unwrap();
    assert_eq!(hanging.await.unwrap().unwrap().into_inner().generations.len(), 1);
    shard.client.health(v3::HealthRequest {}).await.unwrap();
    until_standard_health(&shard, ServingStatus::Serving).await;
    shard.finish().await;
}

#[tokio::test]
async fn a_panicking_engine_is_told_and_given_up() {
    let faulty = |executor| {
        around(executor, |step| {
            assert_ne!(step, 2, "on purpose");
            Ok(())
        })
    };
    let mut shard = TestShard::start_around(&fixture("llama"), &[], faulty).await;
    shard.client.prefill(prefill(1, vec![request(1, LONG, 5)], None)).await.unwrap();
    // Queued behind the step that panics: told the same.
    let (mut second, mut third) = (shard.connect().await, shard.connect().await);
    let (first, second, third) = tokio::join!(
        shard.client.decode(decode(&[1])),
        second.decode(decode(&[1])),
        third.clear_cache(v3::ClearCacheRequest { id: Some(1) }),
    );
    let outcomes = [first.map(drop), second.map(drop), third.map(drop)];
    let failures: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    assert!(!failures.is_empty());
    for status in &failures {
        // Cleared before the step, there is nothing to panic over.
        let cleared = status.code() == Code::NotFound;
        assert!(cleared || status.message().starts_with("the engine panicked"), "{status}");
    }
    if failures.iter().any(|status| status.code() == Code::NotFound) {
        shard.client.prefill(prefill(1, vec![request(1, LONG, 5)], None)).await.unwrap_err();
    }
    let status = shard.client.health(v3::HealthRequest {}).await.unwrap_err();
    assert!(status.code() == Code::Internal && status.message().contains("on purpose"), "{status}");
    let Fault::EngineDied(cause) = shard.shard.fault().await else { panic!("another fault") };
    assert!(cause.contains("on purpose"), "{cause}");
    assert_eq!(standard_health(&shard).await, ServingStatus::NotServing);
    assert!(shard.shard.stop().await, "a dead engine keeps nobody");
}

/// How a rank fails.
#[derive(Debug, Clone, Copy)]
enum Failure {
    Panics,
    Errs,
}

/// A world over a fixture, of which one rank fails in the middle of its second step.
fn failing_world(info: &dyn Executor, n_ranks: usize, rank: usize, failure: Failure) -> Ranks {
    let folder = fixture("llama");
    let model = families::resolve(&families::read_config(&folder).unwrap()).unwrap();
    let weights = Weights::open(&Checkpoint::open(&folder).unwrap(), &model.spec, &model.names).unwrap();
    let n_layers = model.spec.layers() as u64;
    let backends = Cpu::world(n_ranks).into_iter().enumerate().map(|(number, inner)| {
        let n_attended = AtomicU64::new(0);
        let before_attend = move || {
            let is_due = n_attended.fetch_add(1, Ordering::Relaxed) == n_layers + n_layers / 2;
            match failure {
                _ if number != rank || !is_due => Ok(()),
                Failure::Panics => panic!("on purpose"),
                Failure::Errs => Err(Error::Exhausted("out of paper".into())),
            }
        };
        Faulty { inner, before_attend: Box::new(before_attend) }
    });
    let info = info.info();
    let options = Options {
        n_ranks,
        device: Device::Cpu,
        pool: PoolSize::Slots(info.n_slots as usize),
        graphs: false,
        fault: None,
        n_lanes: info.n_lanes as usize,
        max_step_tokens: info.max_step_tokens as usize,
    };
    let parts: Box<Parts> = Box::new(move |role, shard| weights.part(role, shard));
    Ranks::start(backends.collect(), model.spec, parts, options, &|_, _| ()).unwrap()
}

#[tokio::test]
async fn a_rank_that_fails_takes_the_world_along_and_says_which() {
    for (n_ranks, rank) in [(1, 0), (2, 0), (2, 1), (4, 2)] {
        for failure in [Failure::Panics, Failure::Errs] {
            let expected = match failure {
                Failure::Panics => format!("rank {rank} panicked in step 2: on purpose"),
                Failure::Errs => format!("rank {rank} failed in step 2: out of paper"),
            };
            let faulty = move |executor: Box<dyn Executor>| -> Box<dyn Executor> {
                Box::new(failing_world(&*executor, n_ranks, rank, failure))
            };
            let mut shard = TestShard::start_around(&fixture("llama"), &[], faulty).await;
            let mut call = prefill(1, vec![request(1, LONG, 5)], None);
            shard.client.prefill(call.clone()).await.unwrap();
            let status = shard.client.decode(decode(&[1])).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Internal, expected.as_str()));
            call.batch.as_mut().unwrap().id = 2;
            let status = shard.client.prefill(call).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Internal, expected.as_str()));
            let status = shard.client.health(v3::HealthRequest {}).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Internal, expected.as_str()));
            assert_eq!(shard.shard.fault().await, Fault::DeviceLost(expected));
            assert_eq!(standard_health(&shard).await, ServingStatus::NotServing);
            let stats = shard.stats().await;
            assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0), "{stats:?}");
            assert!(shard.shard.stop().await);
        }
    }
}

/// A shard whose steps of these numbers fail, after they have run.
async fn failing_at(steps: &'static [u64], flags: &[&str]) -> TestShard {
    let faulty = |executor| {
        around(executor, |step| match steps.contains(&step) {
            true => Err(Error::Device(format!("step {step} failed on purpose"))),
            false => Ok(()),
        })
    };
    TestShard::start_around(&fixture("llama"), flags, faulty).await
}

/// A request's tokens on a shard without faults.
async fn alone(text: &str, n: u32) -> Collected {
    let mut shard = TestShard::start("llama", &[]).await;
    let collected = run_to_end(&mut shard.client, 0, vec![request(0, text, n)]).await.remove(0);
    shard.finish().await;
    collected
}

#[tokio::test]
async fn a_failed_step_costs_its_own_batch_and_no_other() {
    let (long, short) = (alone(LONG, 6).await, alone("hello there", 6).await);
    // The first decode of the first batch fails: run when it is asked for, or ahead of the second batch's prompt.
    first_decode_fails(&long, &short, failing_at(&[3], &["--run-ahead", "off"]).await, "step 3").await;
    first_decode_fails(&long, &short, failing_at(&[2], &["--run-ahead", "on"]).await, "step 2").await;
}

async fn first_decode_fails(long: &Collected, short: &Collected, mut shard: TestShard, step: &str) {
    let (mut first, mut second) = (Collected::default(), Collected::default());
    let on = |id, text, slots: std::ops::Range<u32>| on_slots(request(id, text, 6), slots);
    let call = prefill(1, vec![on(1, LONG, 1..200)], None);
    first.add(1, &shard.client.prefill(call).await.unwrap().into_inner().generations);
    let call = prefill(2, vec![on(2, "hello there", 300..400)], None);
    let answer = shard.client.prefill(call).await.unwrap().into_inner();
    second.add(2, &answer.generations);
    let held = answer.batch.unwrap().max_tokens;
    let status = shard.client.decode(decode(&[1])).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert_eq!(status.message(), format!("{step} failed on purpose"));
    let stats = shard.stats().await;
    assert_eq!((stats.n_batches, stats.n_leased, stats.n_lanes_taken), (1, held, 1), "{stats:?}");
    assert_eq!(shard.client.decode(decode(&[1])).await.unwrap_err().code(), Code::NotFound);
    shard.client.health(v3::HealthRequest {}).await.unwrap();
    assert_eq!(standard_health(&shard).await, ServingStatus::Serving);
    // As a router would: the prompt again, all of it claimed to be cached, on the slots it had.
    let mut again = on(3, LONG, 1..200);
    again.cache_len = 150;
    let mut answer = shard.client.prefill(prefill(3, vec![again], Some(2))).await.unwrap().into_inner();
    let mut third = Collected::default();
    loop {
        second.add(2, &answer.generations);
        third.add(3, &answer.generations);
        let Some(batch) = answer.batch else { break };
        let next = shard.client.decode(decode(&[batch.id])).await.unwrap().into_inner();
        (answer.generations, answer.batch) = (next.generations, next.batch);
    }
    assert_eq!((&second, &third), (short, long));
    assert!(long.ids.starts_with(&first.ids));
    shard.finish().await;
}

/// Whatever a failed Prefill was to store is not believed to be there.
#[tokio::test]
async fn a_failed_prefill_leaves_no_claim_behind() {
    let expected = alone(LONG, 4).await;
    // The second pass of a prompt fails: its first part is stored, its second in doubt.
    let mut shard = failing_at(&[2], &["--max-lanes", "16", "--max-step-tokens", "64"]).await;
    let long = || on_slots(request(1, &LONG.repeat(2), 4), 1..400);
    let status = shard.client.prefill(prefill(1, vec![long()], None)).await.unwrap_err();
    assert_eq!(status.message(), "step 2 failed on purpose");
    let stats = shard.stats().await;
    assert_eq!((stats.n_batches, stats.n_leased, stats.n_lanes_taken), (0, 0, 0), "{stats:?}");
    let doubled = run_to_end(&mut shard.client, 5, vec![request(5, &LONG.repeat(2), 4)]).await;
    for cache_len in [1000, 80, 3] {
        let mut claimed = long();
        claimed.cache_len = cache_len;
        assert_eq!(run_to_end(&mut shard.client, 2, vec![claimed]).await, doubled, "cache_len {cache_len}");
    }
    assert_eq!(run_to_end(&mut shard.client, 3, vec![request(3, LONG, 4)]).await[0], expected);
    shard.finish().await;
}

/// A failed step has overwritten what its slots held before: nor is that believed to be there.
#[tokio::test]
async fn a_failed_step_spoils_what_it_wrote_over() {
    let expected = alone(LONG, 4).await;
    // Four steps of one prompt, then the first of another on the same slots.
    let mut shard = failing_at(&[5], &[]).await;
    let on = |text| on_slots(request(1, text, 4), 1..100);
    assert_eq!(run_to_end(&mut shard.client, 1, vec![on(LONG)]).await[0], expected);
    let other = on("nothing of what was said before, in so many words");
    shard.client.prefill(prefill(2, vec![other], None)).await.unwrap_err();
    let mut claimed = on(LONG);
    claimed.cache_len = 1000;
    assert_eq!(run_to_end(&mut shard.client, 3, vec![claimed]).await[0], expected);
    shard.finish().await;
}

#[tokio::test]
async fn a_failed_step_of_two_batches_drops_both_and_a_third_goes_on() {
    let expected = alone(LONG, 5).await;
    let mut shard = failing_at(&[4], &[]).await;
    let mut third = Collected::default();
    for id in [1, 2, 3] {
        let answer = shard.client.prefill(prefill(id, vec![request(id, LONG, 5)], None)).await.unwrap();
        third.add(3, &answer.into_inner().generations);
    }
    shard.client.decode(decode(&[1, 2])).await.unwrap_err();
    assert_eq!(shard.stats().await.n_batches, 1);
    while third.end.is_none() {
        let answer = shard.client.decode(decode(&[3])).await.unwrap().into_inner();
        third.add(3, &answer.generations);
    }
    assert_eq!(third, expected);
    shard.finish().await;
}

/// However often steps fail, nothing is lost along with them.
#[tokio::test]
async fn failures_in_a_row_leak_nothing() {
    let n_failed = Arc::new(AtomicU64::new(0));
    let counted = n_failed.clone();
    let faulty = |executor| {
        around(executor, move |step| match step % 3 {
            0 => {
                counted.fetch_add(1, Ordering::Relaxed);
                Err(Error::Device("every third step fails".into()))
            }
            _ => Ok(()),
        })
    };
    let flags = ["--max-lanes", "4", "--pool-tokens", "600", "--own-slots", "300"];
    let mut shard = TestShard::start_around(&fixture("llama"), &flags, faulty).await;
    let mut n_served = 0;
    for id in 0..60 {
        let requests = (0..3).map(|index| request(10 * id + index, LONG, 2)).collect();
        match shard.client.prefill(prefill(id, requests, None)).await {
            Ok(_) => {
                let decoded = shard.client.decode(decode(&[id])).await;
                n_served += u64::from(decoded.is_ok());
            }
            Err(status) => assert_eq!(status.message(), "every third step fails"),
        }
    }
    assert!(n_served > 10 && n_failed.load(Ordering::Relaxed) > 10);
    assert_eq!(shard.stats().await.n_leased, 0);
    shard.finish().await;
}
