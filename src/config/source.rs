//! Where a model's files are found.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Refusal;
use crate::cli::HubArgs;

/// Where a model's weights are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightFiles {
    /// With its other files.
    Beside,
    /// In a folder of their own, which the operator named.
    In(PathBuf),
    /// Nowhere: random ones are made.
    NotNeeded,
}

/// Where a model's files are found.
#[derive(Clone, PartialEq, Eq)]
pub struct ModelSource {
    /// A local directory or a hub id.
    pub name: String,
    /// Branch, tag or commit on the hub.
    pub revision: Option<String>,
    /// The hub's access token.
    pub token: Option<String>,
    /// The folder of downloaded files, where the operator chose one.
    pub cache: Option<PathBuf>,
    /// A mirror of the hub.
    pub endpoint: Option<String>,
    /// Where its weights are.
    pub weights: WeightFiles,
    /// Whether the network must not be asked.
    pub offline: bool,
}

impl fmt::Debug for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSource")
            .field("name", &self.name)
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("weights", &self.weights)
            .field("offline", &self.offline)
            .finish()
    }
}

impl ModelSource {
    pub(super) fn new(name: Option<String>, hub: HubArgs) -> Result<ModelSource, Refusal> {
        let given = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        let name = match given(name) {
            Some(name) => name,
            None => demo_model()?.to_string_lossy().into_owned(),
        };
        let cache = hub.huggingface_hub_cache.or_else(|| hub.hf_home.map(|home| home.join("hub")));
        Ok(ModelSource {
            name,
            revision: given(hub.revision),
            token: given(hub.hf_token).or(given(hub.hf_api_token)),
            cache,
            endpoint: given(hub.hf_endpoint),
            weights: hub.weights_cache_override.map_or(WeightFiles::Beside, WeightFiles::In),
            offline: hub.hf_hub_offline,
        })
    }
}

/// The demo model: in the repository that this program was built from, else beside the program.
fn demo_model() -> Result<PathBuf, Refusal> {
    let in_repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/demo");
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("demo")));
    let found = [Some(in_repository), beside].into_iter().flatten().find(|path| path.is_dir());
    found.ok_or_else(|| Refusal("name a model: the demo model is not here".to_owned()))
}
