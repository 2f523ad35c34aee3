//! `[plugin]`: a program that judges events before they are stored.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Config;
use super::check::Range;

/// `[plugin]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plugin {
    /// Shell command that starts it; empty: none.
    pub command: String,
    /// What becomes of an event for which it has no answer.
    pub on_failure: OnFailure,
    /// From handing an event over to its answer, milliseconds.
    pub timeout_ms: u64,
    /// Events that it may have before it has answered the first.
    pub in_flight_max: usize,
    /// Events that wait for it, those in flight included.
    pub queue_events_max: usize,
    /// Whether `sledge import` asks it too.
    pub import: bool,
}

/// What becomes of an event for which the plugin has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// It is refused, and may be sent again.
    Reject,
    /// It is taken as if there were no plugin.
    Accept,
}

impl Plugin {
    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        !self.command.trim().is_empty()
    }

    /// From handing an event over to its answer.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// Each number with its range.
pub(super) fn ranges(config: &Config) -> Vec<Range> {
    let plugin = &config.plugin;
    vec![
        ("plugin.timeout_ms", plugin.timeout_ms, 10..=600_000),
        ("plugin.in_flight_max", plugin.in_flight_max as u64, 1..=65_536),
        ("plugin.queue_events_max", plugin.queue_events_max as u64, 1..=1_000_000),
    ]
}
