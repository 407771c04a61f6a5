//! Ops recorded into a CUDA graph.

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::device::{Device, failed};
use crate::error::{Error, Result};

/// A graph, ready to be launched.
pub struct Graph(CudaGraph);

/// Records what `record` queues.
pub fn capture(device: &Device, record: impl FnOnce() -> Result<()>) -> Result<Graph> {
    let stream = device.cuda_stream();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(failed("beginning to record a graph"))?;
    let recorded = record();
    // Also after an error: the stream would stay in capture.
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
    let ended = stream.end_capture(flags).map_err(failed("recording a graph"));
    recorded?;
    let graph = ended?.ok_or_else(|| Error::DeviceLost("an empty graph was recorded".into()))?;
    graph.upload().map_err(failed("uploading a graph"))?;
    Ok(Graph(graph))
}

impl Graph {
    /// Queues the recorded ops.
    pub fn launch(&self) -> Result<()> {
        self.0.launch().map_err(failed("launching a graph"))
    }
}
