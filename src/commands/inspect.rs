//! `inspect`: what a model is and what it would take, without its weights.

mod table;

use std::io::{self, Write};

use anyhow::Result;

use crate::cli::Exit;
use crate::config::ShardConfig;
use crate::server::{self, LoadPlan};

pub(super) async fn run(config: ShardConfig) -> Result<Exit> {
    let to_plan = config.clone();
    let plan = tokio::task::spawn_blocking(move || server::plan(&to_plan)).await??;
    match write_plan(&mut io::stdout().lock(), &config, &plan) {
        // Whoever reads it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Done),
        written => Ok(written.map(|()| Exit::Done)?),
    }
}

fn write_plan(out: &mut impl Write, config: &ShardConfig, plan: &LoadPlan) -> io::Result<()> {
    let (spec, memory) = (&plan.model.spec, &plan.memory);
    let own_slots = config.own_slots_of(plan.n_slots);
    writeln!(out, "family            {}", spec.family)?;
    writeln!(out, "parameters        {}", memory.n_parameters)?;
    let active = table::active_parameters(spec);
    if active < memory.n_parameters {
        writeln!(out, "  of a token      {active}")?;
    }
    let kv_numbers = spec.kv_elements_per_token();
    writeln!(out, "KV of a token     {kv_numbers} numbers, {} bytes in 16 bit", 2 * kv_numbers)?;
    for (title, text) in table::rows(spec) {
        writeln!(out, "{title:<18}{text}")?;
    }
    for note in &plan.model.notes {
        writeln!(out, "note: {note}")?;
    }
    writeln!(out)?;
    writeln!(out, "ranks             {}", config.world_size)?;
    writeln!(out, "memory of a rank")?;
    writeln!(out, "  weights         {}", mebibytes(memory.rank_weight_bytes))?;
    writeln!(out, "  KV slots        {}", mebibytes(memory.rank_kv_bytes))?;
    writeln!(out, "  intermediates   {}", mebibytes(memory.activation_bytes))?;
    writeln!(out, "  logits          {}", mebibytes(memory.logit_bytes))?;
    writeln!(out, "  lanes           {}", mebibytes(memory.lane_bytes))?;
    if memory.headroom_bytes > 0 {
        writeln!(out, "  left free       {}", mebibytes(memory.headroom_bytes))?;
    }
    writeln!(out, "  in all          {}", mebibytes(memory.rank_total_bytes))?;
    writeln!(out)?;
    writeln!(out, "KV pool           {} slots of {} bytes", plan.n_slots, memory.kv_bytes_per_slot)?;
    writeln!(out, "  for the router  {}", plan.n_slots.saturating_sub(own_slots))?;
    writeln!(out, "  for ourselves   {own_slots}")?;
    writeln!(out, "lanes             {}", config.max_lanes)?;
    writeln!(out, "tokens a step     {}", config.max_step_tokens)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:>10.1} MiB", bytes as f64 / f64::from(1 << 20))
}
