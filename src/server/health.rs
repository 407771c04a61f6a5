//! Health, read from the engine's pulse: no answer waits for a step.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::SERVICES;
use crate::engine::{Condition, Pulse};
use crate::error::{Error, Result};
use crate::model::executor::Progress;

/// Why the engine must be given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A step ran for too long.
    StepTimeout(String),
    /// The engine's thread is dead.
    EngineDied(String),
    /// The device, or one of its ranks, is gone.
    DeviceLost(String),
}

/// How often the pulse is felt, at least.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long red is shown before the process ends, so that whoever asks sees why.
const GRACE: Duration = Duration::from_secs(5);

/// The answer to `Health`.
///
/// # Errors
/// [`Error::Device`] when a step runs longer than `step_timeout`, and what killed the engine when it is dead.
pub(super) fn check(pulse: &Pulse, step_timeout: Duration) -> Result<()> {
    match pulse.condition() {
        Condition::Dead(reason) => Err(reason),
        Condition::Stepping(time) if time > step_timeout => Err(Error::Device(too_long(time, step_timeout))),
        Condition::Stepping(_) | Condition::Idle => Ok(()),
    }
}

fn too_long(time: Duration, limit: Duration) -> String {
    format!(
        "a step has been running for {:.1} s, the limit is {:.1} s",
        time.as_secs_f64(),
        limit.as_secs_f64()
    )
}

/// Feels the pulse until the engine must be given up, and keeps `grpc.health.v1` up to date.
pub(super) async fn watch(
    pulse: Arc<Pulse>,
    progress: Progress,
    step_timeout: Duration,
    reporter: HealthReporter,
) -> Fault {
    let look_every = LOOK_EVERY.min(step_timeout / 4).max(Duration::from_millis(1));
    let mut healthy = true;
    loop {
        tokio::time::sleep(look_every).await;
        let checked = check(&pulse, step_timeout);
        if checked.is_ok() != healthy {
            healthy = checked.is_ok();
            report(&reporter, healthy).await;
            match &checked {
                Ok(()) => tracing::warn!("the step has ended after all"),
                Err(error) => tracing::error!("unhealthy: {error}"),
            }
        }
        match pulse.condition() {
            Condition::Dead(Error::DeviceLost(reason)) => return Fault::DeviceLost(reason),
            Condition::Dead(reason) => return Fault::EngineDied(reason.to_string()),
            Condition::Stepping(time) if time > step_timeout.saturating_add(GRACE) => {
                return Fault::StepTimeout(format!("{progress}: {}", too_long(time, step_timeout)));
            }
            Condition::Stepping(_) | Condition::Idle => {}
        }
    }
}

/// Tells `grpc.health.v1` how all services are.
pub(super) async fn report(reporter: &HealthReporter, healthy: bool) {
    let status = if healthy { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_is_red_when_a_step_hangs_or_the_engine_is_dead() {
        let pulse = Pulse::default();
        assert!(check(&pulse, Duration::ZERO).is_ok());
        pulse.begin_step();
        std::thread::sleep(Duration::from_millis(2));
        assert!(matches!(check(&pulse, Duration::ZERO), Err(Error::Device(_))));
        assert!(check(&pulse, Duration::from_secs(3600)).is_ok());
        pulse.end_step();
        assert!(check(&pulse, Duration::ZERO).is_ok());
        pulse.die(Error::Bug("it panicked".to_owned()));
        let error = check(&pulse, Duration::from_secs(3600)).expect_err("dead");
        assert!(error.to_string().contains("it panicked"));
    }

    #[tokio::test]
    async fn a_dead_engine_is_given_up() {
        let why = || "it panicked".to_owned();
        for (death, fault) in [
            (Error::Bug(why()), Fault::EngineDied(why())),
            (Error::DeviceLost(why()), Fault::DeviceLost(why())),
        ] {
            let pulse = Arc::new(Pulse::default());
            pulse.die(death);
            let (progress, limit) = (Progress::new(1), Duration::from_secs(3600));
            assert_eq!(watch(pulse, progress, limit, HealthReporter::new()).await, fault);
        }
    }
}
