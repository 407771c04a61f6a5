//! `generate`: one prompt, streamed to the terminal, from a running shard or from one started for it.

use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cli::Exit;
use crate::client;
use crate::config::{ClientConfig, ShardConfig, SocketConfig, Target};
use crate::server::{self, RunningShard};

pub(super) async fn run(config: ClientConfig) -> Result<Exit> {
    match &config.target {
        Target::Url(url) => ask(url, &config).await?,
        Target::Private(shard, tmpdir) => {
            let folder = PrivateFolder::new(tmpdir)?;
            let shard = start(shard, &folder.0).await?;
            let asked = tokio::select! {
                asked = ask(shard.url(), &config) => asked,
                _ = tokio::signal::ctrl_c() => Ok(()),
            };
            shard.stop().await;
            asked?;
        }
    }
    Ok(Exit::Done)
}

async fn start(config: &ShardConfig, folder: &Path) -> Result<RunningShard> {
    let to_load = config.clone();
    let loaded = tokio::task::spawn_blocking(move || server::load(&to_load)).await??;
    Ok(RunningShard::start(config, &SocketConfig::private(folder), loaded).await?)
}

/// Streams the answer of the shard at `url`, and tells how it went.
async fn ask(url: &str, config: &ClientConfig) -> Result<()> {
    let mut out = io::stdout();
    write!(out, "{}", config.prompt)?;
    let summary = client::generate(url, &config.prompt, &config.parameters, &mut out).await?;
    if summary.ending != client::Ending::ReaderGone {
        writeln!(out)?;
    }
    for alternatives in &summary.alternatives {
        let shown: Vec<String> =
            alternatives.iter().map(|token| format!("{:?} {:.3}", token.text, token.logprob)).collect();
        eprintln!("{}", shown.join("  "));
    }
    eprintln!("{summary}");
    Ok(())
}

/// A folder that only this user can enter, gone when dropped.
struct PrivateFolder(PathBuf);

impl PrivateFolder {
    fn new(parent: &Path) -> Result<PrivateFolder> {
        let name = |attempt: u32| parent.join(format!("kvshard-{}-{attempt}", std::process::id()));
        for attempt in 0..100 {
            match DirBuilder::new().mode(0o700).create(name(attempt)) {
                Ok(()) => return Ok(PrivateFolder(name(attempt))),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context("no folder for the shard's socket can be made"),
            }
        }
        anyhow::bail!("no folder for the shard's socket can be made under {}", parent.display())
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        // Left-over files in a temporary folder harm nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
