//! The pool against a plain model: a map from slot to who holds it and what is in it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Lease, Pool, RouterClaim, Tag};
use crate::error::Error;

const N_SLOTS: u32 = 48;
const N_OWN: u32 = 16;

fn pool() -> Pool {
    Pool::new(N_SLOTS, N_OWN).unwrap()
}

fn tags(pool: &Pool, tokens: &[u32]) -> Vec<Tag> {
    let chain = pool.chain();
    let mut before = Tag::NONE;
    tokens
        .iter()
        .map(|&token| {
            before = chain.next(before, token, 0);
            before
        })
        .collect()
}

fn write_all(pool: &Pool, lease: &Lease, tags: &[Tag]) {
    lease.slots().iter().zip(tags).for_each(|(&slot, &tag)| pool.written(slot, tag));
}

#[test]
fn own_slots_come_from_the_reserve_first_and_from_all_until_a_router_comes() {
    let pool = pool();
    // Of the reserve of 16, 8 are left to probes.
    let first = pool.lease_own(8).unwrap();
    assert!(first.slots().iter().all(|&slot| (N_SLOTS - N_OWN..N_SLOTS - 8).contains(&slot)));
    let second = pool.lease_own(4).unwrap();
    assert_eq!(second.slots(), [1, 2, 3, 4], "routers begin at the other end");
    drop(second);
    let tags = tags(&pool, &[1]);
    let router = pool.lease_router(&RouterClaim { slots: &[5, 6], tags: &tags, cache_len: 0 }).unwrap();
    assert_eq!(
        pool.lease_own(1).err(),
        Some(Error::Exhausted("the request needs 1 slots of the shard's own, 0 of 8 are free".into()))
    );
    drop((first, router));
    pool.check_integrity(0).unwrap();
    assert!(matches!(pool.lease_own(9), Err(Error::Exhausted(_))));
    let eight = pool.lease_own(8).unwrap();
    assert!(pool.lease_own(1).is_err());
    assert_eq!(pool.lease_probe(8).unwrap().slots().len(), 8, "a probe still finds room");
    drop(eight);
    pool.reset();
    assert_eq!(pool.lease_own(N_SLOTS as usize - 9).unwrap().slots().len(), 39);
}

#[test]
fn a_claim_holds_as_far_as_the_contents_are_of_its_tokens() {
    let pool = pool();
    let of_first = tags(&pool, &[7, 8, 9, 10]);
    let first =
        pool.lease_router(&RouterClaim { slots: &[1, 2, 3, 4], tags: &of_first, cache_len: 3 }).unwrap();
    assert_eq!(first.n_valid, 0, "nobody has written anything");
    write_all(&pool, &first.lease, &of_first);
    drop(first);
    let of_second = tags(&pool, &[7, 8, 11, 10]);
    let second =
        pool.lease_router(&RouterClaim { slots: &[1, 2, 3, 4], tags: &of_second, cache_len: 3 }).unwrap();
    assert_eq!((second.n_valid, second.n_replaced), (2, 0));
    drop(second);
    pool.reset();
    let third =
        pool.lease_router(&RouterClaim { slots: &[1, 2, 3, 4], tags: &of_first, cache_len: 3 }).unwrap();
    assert_eq!(third.n_valid, 0, "a reset forgets contents");
}

#[test]
fn equal_prefixes_share_and_other_claims_are_given_slots_elsewhere() {
    let pool = pool();
    let of_first = tags(&pool, &[7, 8, 9]);
    let first =
        pool.lease_router(&RouterClaim { slots: &[1, 2, 3, 4], tags: &of_first, cache_len: 0 }).unwrap();
    write_all(&pool, &first.lease, &of_first);
    let same =
        pool.lease_router(&RouterClaim { slots: &[1, 2, 5, 6], tags: &of_first, cache_len: 2 }).unwrap();
    assert_eq!((same.n_valid, same.n_replaced), (2, 0));
    let other_tokens = tags(&pool, &[7, 99, 9]);
    let claim = RouterClaim { slots: &[1, 2, 7, 8], tags: &other_tokens, cache_len: 2 };
    let other = pool.lease_router(&claim).unwrap();
    assert_eq!((other.n_valid, other.n_replaced), (1, 1));
    assert!(other.lease.slots()[1] >= N_SLOTS - N_OWN, "slot 2 is in use for token 8");
    let unclaimed = RouterClaim { slots: &[3, 9], tags: &other_tokens[..1], cache_len: 0 };
    assert!(matches!(pool.lease_router(&unclaimed), Err(Error::Exhausted(_))));
    let output_of_first = RouterClaim { slots: &[9, 4], tags: &other_tokens[..1], cache_len: 0 };
    assert!(matches!(pool.lease_router(&output_of_first), Err(Error::Exhausted(_))));
    assert_eq!(pool.n_distinct([&first.lease, &same.lease, &other.lease].into_iter()), 4 + 2 + 3);
    pool.check_integrity(12).unwrap();
}

#[test]
fn a_slot_that_the_router_cannot_mean_is_its_mistake() {
    let pool = pool();
    let one = tags(&pool, &[1]);
    for slots in [[0, 1], [1, N_SLOTS - N_OWN], [1, u32::MAX], [3, 3]] {
        let claim = RouterClaim { slots: &slots, tags: &one, cache_len: 0 };
        assert!(matches!(pool.lease_router(&claim), Err(Error::Invalid(_))), "{slots:?}");
    }
    let own = pool.lease_own(39).unwrap();
    let taken = own.slots().iter().copied().find(|&slot| slot < N_SLOTS - N_OWN).unwrap();
    let claim = RouterClaim { slots: &[taken], tags: &one, cache_len: 0 };
    assert!(matches!(pool.lease_router(&claim), Err(Error::Exhausted(_))));
    drop(own);
    assert!(pool.lease_router(&claim).is_ok());
    pool.check_integrity(0).unwrap();
}

#[test]
fn salts_and_order_make_different_tags() {
    let pool = pool();
    let chain = pool.chain();
    let one = chain.next(Tag::NONE, 1, 0);
    assert_ne!(one, chain.next(Tag::NONE, 1, 5));
    assert_ne!(chain.next(one, 2, 0), chain.next(Tag::NONE, 2, 0));
    assert_eq!(chain.next(one, 2, 0), pool.chain().next(one, 2, 0));
}

#[derive(Debug, Clone)]
enum Action {
    Own(usize),
    Router { slots: Vec<u32>, tokens: Vec<u32>, cache_len: u32 },
    Drop(usize),
    Reset,
}

fn action() -> impl Strategy<Value = Action> {
    let router = (prop::collection::vec(0..N_SLOTS, 1..8), prop::collection::vec(0..3u32, 1..6), 0..6u32)
        .prop_map(|(slots, tokens, cache_len)| Action::Router { slots, tokens, cache_len });
    prop_oneof![
        2 => (1..9usize).prop_map(Action::Own),
        5 => router,
        4 => (0..8usize).prop_map(Action::Drop),
        1 => Just(Action::Reset),
    ]
}

proptest! {
    /// Whatever is leased and dropped: nobody's slot is given to another purpose, and the books balance.
    #[test]
    fn no_slot_serves_two_purposes(actions in prop::collection::vec(action(), 1..60)) {
        let pool = pool();
        let mut live: Vec<(Lease, Vec<Tag>)> = Vec::new();
        for action in actions {
            match action {
                Action::Own(n) => {
                    if let Ok(lease) = pool.lease_own(n) {
                        prop_assert_eq!(lease.slots().len(), n);
                        live.push((lease, vec![Tag::NONE; n]));
                    }
                }
                Action::Router { slots, tokens, cache_len } => {
                    let n = tokens.len().min(slots.len());
                    let of = tags(&pool, &tokens[..n]);
                    let claim = RouterClaim { slots: &slots, tags: &of, cache_len };
                    if let Ok(leased) = pool.lease_router(&claim) {
                        prop_assert!(leased.n_valid as usize <= n);
                        let mut expected = of.clone();
                        expected.resize(slots.len(), Tag::NONE);
                        write_all(&pool, &leased.lease, &of);
                        live.push((leased.lease, expected));
                    }
                }
                Action::Drop(index) if !live.is_empty() => {
                    live.swap_remove(index % live.len());
                }
                Action::Drop(_) => {}
                Action::Reset => pool.reset(),
            }
            let mut purpose: BTreeMap<u32, Tag> = BTreeMap::new();
            for (lease, expected) in &live {
                for (&slot, &tag) in lease.slots().iter().zip(expected) {
                    prop_assert!(slot > 0 && slot < N_SLOTS);
                    if let Some(other) = purpose.insert(slot, tag) {
                        prop_assert!(tag != Tag::NONE && other == tag, "slot {} serves two purposes", slot);
                    }
                }
            }
            let n_holdings = live.iter().map(|(lease, _)| lease.slots().len()).sum();
            pool.check_integrity(n_holdings).map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(pool.n_leased() as usize, purpose.len());
            prop_assert_eq!(pool.n_distinct(live.iter().map(|(lease, _)| lease)) as usize, purpose.len());
        }
    }
}
