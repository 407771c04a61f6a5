//! What becomes of the variables of TGI's launcher.

/// What becomes of a variable that TGI's launcher sets for a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variable {
    /// The flag that it stands for.
    Flag(&'static str),
    /// It changes nothing here, for this reason.
    Ignored(&'static str),
}

/// Every variable that TGI's launcher documents or sets for a shard.
pub const ENVIRONMENT: &[(&str, Variable)] = &[
    ("RANK", Variable::Flag("rank")),
    ("WORLD_SIZE", Variable::Flag("world-size")),
    ("MASTER_ADDR", Variable::Ignored("the ranks are threads of one process")),
    ("MASTER_PORT", Variable::Ignored("the ranks are threads of one process")),
    ("ATTENTION", Variable::Ignored("the pool always has one token a block")),
    ("PREFIX_CACHING", Variable::Flag("prefix-caching")),
    ("PREFILL_CHUNKING", Variable::Flag("prefill-chunking")),
    ("CUDA_MEMORY_FRACTION", Variable::Flag("cuda-memory-fraction")),
    ("TGI_WIGGLE_ROOM", Variable::Ignored("memory is planned, not guessed")),
    ("CUDA_GRAPHS", Variable::Flag("cuda-graphs")),
    ("REQUEST_LOGPROBS", Variable::Flag("enable-prefill-logprobs")),
    ("LORA_ADAPTERS", Variable::Flag("lora-adapters")),
    ("WATERMARK_GAMMA", Variable::Flag("watermark-gamma")),
    ("WATERMARK_DELTA", Variable::Flag("watermark-delta")),
    ("ROPE_SCALING", Variable::Flag("rope-scaling")),
    ("ROPE_FACTOR", Variable::Flag("rope-factor")),
    ("MAX_TOTAL_TOKENS", Variable::Ignored("the router's Warmup carries it")),
    ("MAX_BATCH_SIZE", Variable::Ignored("the router keeps to it")),
    ("HF_TOKEN", Variable::Flag("hf-token")),
    ("HF_API_TOKEN", Variable::Flag("hf-api-token")),
    ("HF_HOME", Variable::Flag("hf-home")),
    ("HUGGINGFACE_HUB_CACHE", Variable::Flag("huggingface-hub-cache")),
    ("HF_HUB_OFFLINE", Variable::Flag("hf-hub-offline")),
    ("WEIGHTS_CACHE_OVERRIDE", Variable::Flag("weights-cache-override")),
    ("HF_HUB_ENABLE_HF_TRANSFER", Variable::Ignored("files come over plain HTTPS")),
    ("SAFETENSORS_FAST_GPU", Variable::Ignored("weights are memory-mapped")),
    ("TORCH_NCCL_AVOID_RECORD_STREAMS", Variable::Ignored("there is no torch")),
    ("USE_FLASH_ATTENTION", Variable::Ignored("there is one attention")),
    ("DISABLE_CUSTOM_KERNELS", Variable::Ignored("there are no others")),
    ("EXLLAMA_VERSION", Variable::Ignored("there is no exllama")),
    ("DISABLE_EXLLAMA", Variable::Ignored("there is no exllama")),
    ("DEBUG", Variable::Ignored("there is no process group to fake")),
    ("LOG_LEVEL", Variable::Ignored("the level comes by --logger-level")),
];
