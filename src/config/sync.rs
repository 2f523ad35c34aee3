//! `[sync]`: what reconciliation with clients and other relays may cost.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[sync]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sync {
    /// Open reconciliations of one connection.
    pub sessions_max: usize,
    /// Events in one reconciliation that are held in memory.
    pub session_records_max: usize,
    /// Events in all open reconciliations together.
    pub records_max: usize,
    /// Silence of a client before its reconciliation ends, seconds.
    pub session_idle_secs: u64,
    /// Bytes of one NEG-MSG.
    pub message_bytes_max: usize,
}

impl Sync {
    /// Silence of a client before its reconciliation ends.
    pub fn session_idle(&self) -> Duration {
        Duration::from_secs(self.session_idle_secs)
    }

    /// Bytes of a reconciliation message before it is written as hex.
    pub fn frame_bytes_max(&self) -> usize {
        self.message_bytes_max / 2
    }
}
