//! `[client]`: the user's own side: where the profile lies, which relays it is kept equal with, and how links behave.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError};

/// Relays that can be named: each is a link of its own.
const RELAYS_MAX: usize = 32;

/// `[client]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// The profile's directory; see [`Client::dir`].
    pub dir: String,
    /// File with the user's secret key.
    pub key: String,
    /// Relays that keep the user's events.
    pub relays: Vec<String>,
    /// Relays that may have training data.
    pub training_relays: Vec<String>,
    /// Public keys, npub or hex, whose word on the status of training data counts.
    pub training_operators: Vec<String>,
    /// MiB that may wait in the outbox.
    pub outbox_mb_max: u64,
    /// MiB of the local copy from which on `sledge outbox status` warns.
    pub cache_mb_warn: u64,
    /// MiB of memory that the cache's buffers aim at.
    pub memory_mb: usize,
    /// How long a command works with relays, seconds.
    pub visit_timeout_secs: u64,
    /// From the first packet to the end of the handshake, milliseconds.
    pub connect_timeout_ms: u64,
    /// Silence of a relay before it is pinged, seconds.
    pub idle_ping_secs: u64,
    /// Silence of a relay before the link is given up, seconds.
    pub idle_timeout_secs: u64,
    /// How long a relay may owe an answer, seconds.
    pub answer_timeout_secs: u64,
    /// Longest first wait before a new attempt to connect, milliseconds.
    pub reconnect_first_ms: u64,
    /// Longest wait before any attempt to connect, milliseconds.
    pub reconnect_max_ms: u64,
    /// Bytes of one message of a relay.
    pub message_bytes_max: usize,
    /// Messages that wait, in each direction of a link.
    pub queue_messages_max: usize,
}

impl Client {
    /// The profile's directory.
    pub fn dir(&self) -> &Path {
        Path::new(&self.dir)
    }

    /// How long a command works with relays.
    pub fn visit_timeout(&self) -> Duration {
        Duration::from_secs(self.visit_timeout_secs)
    }
}

/// Checks what has no range of its own.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let client = &config.client;
    if client.dir.is_empty() {
        return Err(config.refuse("client.dir", "must name a directory"));
    }
    for (key, urls) in [("client.relays", &client.relays), ("client.training_relays", &client.training_relays)] {
        if urls.len() > RELAYS_MAX {
            return Err(config.refuse(key, format!("at most {RELAYS_MAX} relays")));
        }
        if let Some(url) = urls.iter().find(|url| !is_relay_url(url)) {
            return Err(config.refuse(key, format!("`{url}` must start with wss:// or ws:// and name a host")));
        }
    }
    if client.idle_ping_secs >= client.idle_timeout_secs {
        return Err(config.refuse("client.idle_ping_secs", "must be below client.idle_timeout_secs"));
    }
    if client.reconnect_first_ms > client.reconnect_max_ms {
        return Err(config.refuse("client.reconnect_first_ms", "must not be above client.reconnect_max_ms"));
    }
    Ok(())
}

fn is_relay_url(url: &str) -> bool {
    let host = url.strip_prefix("wss://").or(url.strip_prefix("ws://"));
    host.is_some_and(|host| !host.is_empty() && !host.starts_with('/'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// What cannot work is refused by its name, with the reason.
    #[test]
    fn wrong_values_are_named() {
        for (text, expected) in [
            ("dir = \"\"", "client.dir: must name a directory"),
            ("relays = [\"relay.example.com\"]", "client.relays: `relay.example.com` must start with wss://"),
            ("training_relays = [\"wss://\"]", "client.training_relays: `wss://` must start"),
            ("idle_ping_secs = 90", "client.idle_ping_secs: must be below"),
            ("reconnect_first_ms = 60001", "client.reconnect_first_ms: must not be above"),
        ] {
            let error = Config::parse(&format!("[client]\n{text}\n"), None).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
