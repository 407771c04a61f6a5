//! Proofs on a GPU: the goldens, what is identical to the bit, what lies within the dtype's noise, and a soak.
//!
//! Built with the feature `cuda`; without a GPU every test fails and says so. `integration/gpu.sh` runs them beside the
//! tests of the ops, a sanitizer and the benches.

mod card;
mod company;
mod draws;
mod golden;
mod identical;
mod noise;
mod rescore;
mod shards;
mod soak;
#[allow(dead_code, unused_imports, reason = "the other target uses the rest")]
#[path = "../support/mod.rs"]
mod support;
mod visitor;
mod wide;
