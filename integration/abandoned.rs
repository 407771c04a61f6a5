//! Batches on own slots whose caller is gone: dropped after a time, or sooner where slots or lanes run short, and told.

use std::thread::sleep;
use std::time::Duration;

use kvshard::backend::step::SamplingParams;
use kvshard::engine::{Arrival, EngineHandle, EngineStats, Placement, PrefillCall, Prepared, StepAnswer};
use kvshard::error::{Error, Result};
use kvshard::ids::{BatchId, Protocol, RequestId};
use kvshard::sampling::RawStopping;

use crate::support::engine::Patience;
use crate::support::{EngineOptions, fixture, start_patient_engine};

const OPTIONS: EngineOptions = EngineOptions {
    n_ranks: 1,
    n_slots: 300,
    own_slots: 50,
    n_lanes: 8,
    max_prefill_tokens: 64,
    max_step_tokens: 64,
    run_ahead: true,
};
/// Never, in a test.
const NEVER: Duration = Duration::from_secs(1 << 20);
/// A time that has passed when a sleep of the same length is over.
const SHORT: Duration = Duration::from_millis(20);

struct Caller {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
}

impl Caller {
    fn new(abandoned_after: Duration, reclaimable_after: Duration) -> Caller {
        let patience = Patience { abandoned_after, reclaimable_after };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Caller { engine: start_patient_engine(&fixture("llama"), OPTIONS, patience), runtime }
    }

    /// A request of `n_slots` slots, as a batch of its own.
    fn prefill(&self, number: u64, n_slots: u32, placement: Placement) -> Result<StepAnswer> {
        let stopping = RawStopping { max_new_tokens: n_slots - 9, stop_sequences: vec![], ignore_eos: true };
        let prepared = Prepared {
            prompt: (10..20).collect(),
            sampling: SamplingParams::GREEDY,
            stopping: stopping.validate(&[].into()).unwrap(),
            prompt_logprobs: false,
            placement,
            chunk_len: None,
        };
        let arrivals = vec![Arrival { id: RequestId(number), prepared: Ok(prepared) }];
        let call = PrefillCall { batch: v3(number), arrivals, merge: None };
        self.runtime.block_on(self.engine.prefill(call))
    }

    fn own(&self, number: u64, n_slots: u32) -> Result<StepAnswer> {
        self.prefill(number, n_slots, Placement::Own)
    }

    fn decode(&self, number: u64) -> Result<StepAnswer> {
        self.runtime.block_on(self.engine.decode(vec![v3(number)]))
    }

    fn stats(&self) -> EngineStats {
        self.runtime.block_on(self.engine.check_integrity()).unwrap()
    }
}

fn v3(number: u64) -> BatchId {
    BatchId { protocol: Protocol::V3, number }
}

fn is_gone(answer: Result<StepAnswer>) -> bool {
    matches!(answer, Err(Error::UnknownBatch(_)))
}

#[test]
fn what_nobody_asks_for_is_dropped_after_the_time_and_told() {
    let caller = Caller::new(SHORT, NEVER);
    caller.own(1, 20).unwrap();
    sleep(SHORT);
    // Any call notices; the next answer tells.
    assert_eq!(caller.stats().n_batches, 0);
    assert_eq!(caller.stats().n_leased, 0);
    assert!(is_gone(caller.decode(1)));
    let told = caller.own(2, 20).unwrap().notices;
    assert_eq!(
        told,
        ["batch 1 with 1 requests was dropped: it is on own slots, and nobody asked for it in 20ms"]
    );
}

#[test]
fn what_somebody_asks_for_in_time_stays() {
    let caller = Caller::new(NEVER, Duration::ZERO);
    caller.own(1, 20).unwrap();
    caller.own(2, 20).unwrap();
    sleep(SHORT);
    assert_eq!(caller.decode(1).unwrap().notices, [""; 0]);
    assert_eq!(caller.stats().n_batches, 2);
}

/// A router frees its slots itself, by FilterBatch and ClearCache: its batches have all the time they want while there
/// are lanes.
#[test]
fn a_routers_batch_is_not_abandoned() {
    let caller = Caller::new(Duration::ZERO, Duration::ZERO);
    let placement = Placement::Router { slots: (1..40).collect(), cache_len: 0 };
    caller.prefill(1, 30, placement).unwrap();
    // Dropped at the next call, both of them: the reserve has no room for two.
    caller.own(2, 30).unwrap();
    caller.own(3, 30).unwrap();
    sleep(SHORT);
    assert!(is_gone(caller.decode(3)));
    assert_eq!(caller.decode(1).unwrap().generations.len(), 1);
}

#[test]
fn when_own_slots_run_short_the_batch_asked_for_longest_ago_goes() {
    let caller = Caller::new(NEVER, Duration::ZERO);
    // All but 16 slots for probes and slot 0 are there to be had while no router is attached.
    for number in [1, 2, 3] {
        caller.own(number, 90).unwrap();
    }
    caller.decode(1).unwrap();
    let told = caller.own(4, 60).unwrap().notices;
    let gone = "batch 2 with 1 requests was dropped: slots ran short, and nobody asked for it in 0ns";
    assert_eq!(told, [gone]);
    assert!(is_gone(caller.decode(2)));
    // The one after it in age, and then all of them for one that needs all.
    assert_eq!(caller.own(5, 90).unwrap().notices.len(), 1);
    assert!(is_gone(caller.decode(3)));
    assert_eq!(caller.own(6, 240).unwrap().notices.len(), 3);
    assert_eq!(caller.stats().n_batches, 1);
}

#[test]
fn when_lanes_run_short_the_batch_asked_for_longest_ago_goes() {
    let caller = Caller::new(NEVER, Duration::ZERO);
    // One of the eight lanes is a probe's.
    for number in 1..=7 {
        caller.own(number, 14).unwrap();
    }
    caller.decode(1).unwrap();
    let answer = caller.own(8, 14).unwrap();
    let gone = "batch 2 with 1 requests was dropped: lanes ran short, and nobody asked for it in 0ns";
    assert_eq!((answer.notices.as_slice(), answer.generations.len()), ([gone.to_owned()].as_slice(), 1));
    assert!(is_gone(caller.decode(2)));
}

/// A router that died holds lanes until nobody has asked for its batches in the longer of the two times.
#[test]
fn a_routers_batch_goes_for_a_lane_when_its_time_is_over() {
    for (abandoned_after, goes) in [(Duration::ZERO, true), (NEVER, false)] {
        let caller = Caller::new(abandoned_after, Duration::ZERO);
        for number in 1..=8 {
            let first = 1 + 20 * number as u32;
            let placement = Placement::Router { slots: (first..first + 20).collect(), cache_len: 0 };
            let answer = caller.prefill(number, 14, placement).unwrap();
            assert_eq!(answer.generations.len(), usize::from(number < 8 || goes), "batch {number}");
        }
        assert_eq!(is_gone(caller.decode(1)), goes);
    }
}

#[test]
fn a_batch_in_use_is_not_sacrificed() {
    let caller = Caller::new(NEVER, NEVER);
    caller.own(1, 200).unwrap();
    let refused = caller.own(2, 200);
    assert!(matches!(refused, Err(Error::Exhausted(_))), "{refused:?}");
    assert_eq!(caller.decode(1).unwrap().generations.len(), 1);
}
