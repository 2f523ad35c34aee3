//! `[rate]`: what one client may ask for a second.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::IpRange;

/// What one client may ask for a second. A client is an address: all of IPv4, the first 64 bits of IPv6.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// EVENTs a second; 0 = no limit.
    pub events_per_sec: u64,
    /// EVENTs that may come at once.
    pub events_burst: u64,
    /// Bytes of messages a second; 0 = no limit.
    pub bytes_per_sec: u64,
    /// Bytes of messages that may come at once.
    pub bytes_burst: u64,
    /// REQs and COUNTs a second; 0 = no limit.
    pub reqs_per_sec: u64,
    /// REQs and COUNTs that may come at once.
    pub reqs_burst: u64,
    /// Milliseconds of a query thread a second; 0 = no limit.
    pub query_ms_per_sec: u64,
    /// Milliseconds of a query thread that may be used at once.
    pub query_ms_burst: u64,
    /// Points for garbage that are forgiven a second; 0 = nobody is shut out.
    pub garbage_per_sec: u64,
    /// Points for garbage at which an address is shut out.
    pub garbage_burst: u64,
    /// For how long, seconds.
    pub ban_secs: u64,
    /// Addresses to which nothing of this applies.
    pub exempt_ips: Vec<IpRange>,
    /// Public keys, npub or hex: connections that have proven one are exempt. The command line turns them into hex.
    pub exempt_keys: Vec<String>,
}

impl Rate {
    /// Is this address free of all limits by address?
    pub fn exempts(&self, ip: IpAddr) -> bool {
        self.exempt_ips.iter().any(|range| range.contains(ip))
    }

    /// For how long an address is shut out.
    pub fn ban(&self) -> Duration {
        Duration::from_secs(self.ban_secs)
    }
}
