//! `[operation]`: what whoever looks after the relay gets to see.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What whoever looks after the relay gets to see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operation {
    /// Address and port of the metrics; empty = none.
    pub metrics_listen: String,
    /// Running time from which a query is logged, milliseconds; 0 = never.
    pub slow_query_ms: u64,
}

impl Operation {
    /// Where the metrics are served; `None` where they are not.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn metrics_addr(&self) -> Result<Option<SocketAddr>, std::net::AddrParseError> {
        if self.metrics_listen.is_empty() { Ok(None) } else { self.metrics_listen.parse().map(Some) }
    }

    /// Running time from which a query is logged; `None`: never.
    pub fn slow_query(&self) -> Option<Duration> {
        (self.slow_query_ms > 0).then(|| Duration::from_millis(self.slow_query_ms))
    }
}
