//! `inspect`: what a model is and what it would take, without its weights.

mod table;

use std::io::{self, Write};

use anyhow::Result;

use crate::cli::Exit;
use crate::config::ShardConfig;
use crate::model::families::Resolved;
use crate::server::{self, LoadPlan};

pub(super) async fn run(config: ShardConfig) -> Result<Exit> {
    tokio::task::spawn_blocking(move || {
        let described = server::describe(&config)?;
        readable(write_model(&mut io::stdout().lock(), &described.1))?;
        // What does not fit, or has no weights yet, has been described all the same.
        let plan = server::plan(&config, described)?;
        readable(write_plan(&mut io::stdout().lock(), &config, &plan))?;
        Ok(Exit::Done)
    })
    .await?
}

/// Whoever has closed the output has seen enough.
fn readable(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

fn write_model(out: &mut impl Write, model: &Resolved) -> io::Result<()> {
    let spec = &model.spec;
    let (parameters, active) = (spec.n_parameters(), table::active_parameters(spec));
    writeln!(out, "family            {}", spec.family)?;
    writeln!(out, "parameters        {parameters}")?;
    if active < parameters {
        writeln!(out, "  of a token      {active}")?;
    }
    let kv_numbers = spec.kv_elements_per_token();
    writeln!(out, "KV of a token     {kv_numbers} numbers, {} bytes in 16 bit", 2 * kv_numbers)?;
    for (title, text) in table::rows(spec) {
        writeln!(out, "{title:<18}{text}")?;
    }
    for note in &model.notes {
        writeln!(out, "note: {note}")?;
    }
    Ok(())
}

fn write_plan(out: &mut impl Write, config: &ShardConfig, plan: &LoadPlan) -> io::Result<()> {
    let memory = &plan.memory;
    let own_slots = config.own_slots_of(plan.n_slots);
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
