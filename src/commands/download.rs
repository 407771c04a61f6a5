//! `download-weights`: a model's files, in a form that every program reads.

use std::path::Path;

use crate::cli::Exit;
use crate::config::DownloadConfig;
use crate::model::checkpoint::{self, Checkpoint};
use crate::server;
use crate::telemetry::Progress;

/// Fetches what is missing of a model, then converts its weights if they are no safetensors.
///
/// # Errors
/// For a model that cannot be had, or whose weights cannot be read.
pub async fn run(config: DownloadConfig) -> anyhow::Result<Exit> {
    tokio::task::spawn_blocking(move || download(&config)).await?
}

fn download(config: &DownloadConfig) -> anyhow::Result<Exit> {
    let located = server::locate(&config.source)?;
    tracing::info!("the model's files are in {}", located.folder.display());
    if config.converts {
        convert(&located.weights)?;
    }
    Ok(Exit::Done)
}

/// Weights that can be read and not be written anew, in a read-only folder say, are served as they are.
fn convert(folder: &Path) -> anyhow::Result<()> {
    let progress = Progress::new("converting to safetensors");
    let converted = checkpoint::convert(folder, &mut |done, total| progress.report(done, total));
    progress.finish();
    match converted {
        Ok(files) if files.is_empty() => {}
        Ok(files) => tracing::info!("pytorch_model*.bin converted to {}", files.join(", ")),
        Err(error) => {
            Checkpoint::open(folder)?;
            tracing::warn!("{error}; pytorch_model*.bin stay as they are");
        }
    }
    Ok(())
}
