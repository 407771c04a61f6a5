//! `inspect`: what a model is and what it would take, without its weights.

use std::io::{self, Write};

use anyhow::Result;

use crate::cli::Exit;
use crate::config::ShardConfig;
use crate::server::{self, LoadPlan};

pub(super) async fn run(config: ShardConfig) -> Result<Exit> {
    let to_plan = config.clone();
    let plan = tokio::task::spawn_blocking(move || server::plan(&to_plan)).await??;
    write_plan(&mut io::stdout().lock(), &config, &plan)?;
    Ok(Exit::Done)
}

fn write_plan(out: &mut impl Write, config: &ShardConfig, plan: &LoadPlan) -> io::Result<()> {
    let spec = &plan.spec;
    let own_slots = config.own_slots_of(plan.n_slots);
    let kv_bytes = u64::from(plan.n_slots).saturating_mul(plan.kv_bytes_per_slot);
    writeln!(out, "family            {}", spec.family)?;
    writeln!(out, "layers            {}", spec.masks.len())?;
    writeln!(out, "hidden            {}", spec.hidden)?;
    writeln!(out, "vocabulary        {}", spec.vocab)?;
    writeln!(out, "positions         {}", spec.max_positions)?;
    writeln!(out, "ranks             {}", config.world_size)?;
    writeln!(out, "weights           {}", mebibytes(plan.weight_bytes))?;
    writeln!(out, "KV a slot         {} bytes", plan.kv_bytes_per_slot)?;
    writeln!(out, "KV pool           {} slots, {}", plan.n_slots, mebibytes(kv_bytes))?;
    writeln!(out, "  for the router  {} slots", plan.n_slots.saturating_sub(own_slots))?;
    writeln!(out, "  for ourselves   {own_slots} slots")?;
    writeln!(out, "lanes             {}", config.max_lanes)?;
    writeln!(out, "tokens a step     {}", config.max_step_tokens)?;
    writeln!(out, "\n{spec:#?}")
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
