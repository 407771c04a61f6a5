//! Exit codes, documented where they are defined.

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Asked to end, and every running call was answered; or the command did its work.
    Done,
    /// Nothing was served: the model could not be loaded, or the socket not be bound; or the command failed.
    Failed,
    /// The flags or their combination were refused.
    Usage,
    /// The engine died.
    EngineDied,
    /// A step ran longer than `--step-timeout`.
    StepTimeout,
    /// Asked to end, and calls were still running after `--drain-timeout`, or a second signal came.
    CutShort,
    /// A rank above 0, whose rank 0 died.
    LeaderDied,
    /// The device, or one of its ranks, was lost.
    DeviceLost,
}

impl Exit {
    /// Every ending with what it means.
    pub(super) const ALL: [(Exit, &'static str); 8] = [
        (Exit::Done, "done; serve: asked to end, and every running call was answered"),
        (Exit::Failed, "failed; serve: the model was not loaded or the socket not bound"),
        (Exit::Usage, "the flags or their combination were refused"),
        (Exit::EngineDied, "the engine died"),
        (Exit::StepTimeout, "a step ran longer than --step-timeout"),
        (Exit::CutShort, "calls were still running after --drain-timeout, or at a second signal"),
        (Exit::LeaderDied, "a rank above 0 whose rank 0 died"),
        (Exit::DeviceLost, "the device, or one of its ranks, was lost"),
    ];

    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::EngineDied => 3,
            Exit::StepTimeout => 4,
            Exit::CutShort => 5,
            Exit::LeaderDied => 6,
            Exit::DeviceLost => 7,
        }
    }
}

/// The table, for a help page.
pub(super) fn exit_codes() -> String {
    let lines = Exit::ALL.map(|(exit, text)| format!("  {}  {text}", exit.code()));
    format!("Exit codes:\n{}", lines.join("\n"))
}
