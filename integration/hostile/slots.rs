//! Slots, and what a router claims of them.

use kvshard::pb::v3;
use tonic::Code;

use super::calls::Case;
use super::{N_NEW, RUNNING_SLOTS, prompt_len};
use crate::support::shard::on_slots;

/// The first slot of those that nobody holds.
const FIRST: u32 = 500;

pub(super) fn cases() -> Vec<Case> {
    [numbers(), claims()].into_iter().flatten().collect()
}

/// As many slots as the known request needs.
fn needed() -> u32 {
    prompt_len() + N_NEW - 1
}

/// Puts a request on free slots, of which `change` spoils some.
fn spoilt(change: impl FnOnce(&mut Vec<u32>)) -> impl FnOnce(&mut v3::Request) {
    let mut slots: Vec<u32> = (FIRST..FIRST + needed()).collect();
    change(&mut slots);
    move |request| *request = on_slots(std::mem::take(request), slots)
}

fn numbers() -> Vec<Case> {
    let n = needed();
    let (enough, too_few) = (n.to_string(), (n - 1).to_string());
    vec![
        Case::known("free slots", spoilt(|_| ())),
        Case::known("more slots than needed", spoilt(|slots| slots.extend(800..900))),
        Case::known("slots in reverse", spoilt(|slots| slots.reverse())),
        Case::invalid("the largest slot", spoilt(|slots| slots[3] = u32::MAX), &["slot 4294967295", "1023"]),
        Case::invalid("a slot at the capacity", spoilt(|slots| slots[3] = 1024), &["slot 1024", "1023"]),
        Case::invalid("a slot of the shard's own", spoilt(|slots| slots[3] = 2000), &["slot 2000", "1023"]),
        Case::invalid("slot 0", spoilt(|slots| slots[3] = 0), &["slot 0"]),
        Case::invalid("a slot twice", spoilt(|slots| slots[3] = FIRST), &["slot 500", "twice"]),
        Case::invalid("one slot everywhere", spoilt(|slots| slots.fill(9)), &["slot 9", "twice"]),
        Case::invalid("too few slots", spoilt(|slots| slots.truncate(slots.len() - 1)), &[&too_few, &enough]),
        Case::invalid("a single slot", spoilt(|slots| slots.truncate(1)), &["1 slots", &enough]),
        Case::refused(
            "a slot of the running batch",
            spoilt(|slots| slots[3] = 5),
            Code::ResourceExhausted,
            &["slot 5", "position 3"],
        ),
        Case::invalid(
            "blocks without slots",
            |request| request.blocks = vec![1, 2],
            &["2 blocks", "0 slots"],
        ),
        Case::invalid(
            "slots without blocks",
            |request| request.slots = (500..600).collect(),
            &["0 blocks", "100 slots"],
        ),
        Case::known("blocks of any number", |request| {
            spoilt(|_| ())(request);
            request.blocks = vec![u32::MAX; 3];
        }),
    ]
}

fn claims() -> Vec<Case> {
    let n = prompt_len();
    let with = |cache_len: u32, chunk_len: Option<u32>| {
        move |request: &mut v3::Request| {
            spoilt(|_| ())(request);
            (request.cache_len, request.chunk_len) = (cache_len, chunk_len);
        }
    };
    let mut cases = Vec::new();
    for cache_len in [1, n - 1, n, u32::MAX] {
        for chunk_len in [None, Some(0), Some(1), Some(n), Some(u32::MAX)] {
            let name = format!("cache_len {cache_len} with chunk_len {chunk_len:?}");
            cases.push(Case::known(name, with(cache_len, chunk_len)));
        }
    }
    cases.push(Case::known("claims without slots", |request| {
        (request.cache_len, request.chunk_len) = (u32::MAX, Some(u32::MAX));
    }));
    cases.push(Case::known("a chunk of one without slots", |request| request.chunk_len = Some(1)));
    // The running batch holds what is claimed, for tokens of its own.
    cases.push(Case::known("a claim of the running batch's slots", |request| {
        spoilt(|slots| slots.splice(..n as usize - 1, RUNNING_SLOTS.take(n as usize - 1)).for_each(drop))(
            request,
        );
        request.cache_len = n - 1;
    }));
    cases
}
