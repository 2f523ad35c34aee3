//! `[access]`, `[members]` and `[trust]`: who may write, and who decides about that.

use serde::{Deserialize, Serialize};

use super::check::Range;
use super::{Config, IpRange, KindRange};

const DAY_SECS: u64 = 24 * 60 * 60;

/// `[access]`: who may write, beside what was decided while the relay ran (NIP-86).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Public keys that administer the relay beside `info.pubkey`.
    pub admins: Vec<String>,
    /// Who may publish.
    pub write: Writers,
    /// Public keys that may publish where only listed ones may, without a quota anywhere.
    pub allow_keys: Vec<String>,
    /// Public keys whose events are refused.
    pub deny_keys: Vec<String>,
    /// The only kinds that are accepted; empty: all.
    pub allow_kinds: Vec<KindRange>,
    /// Kinds that are refused.
    pub deny_kinds: Vec<KindRange>,
    /// The only addresses that may publish; empty: all.
    pub allow_ips: Vec<IpRange>,
    /// Addresses that are not served.
    pub deny_ips: Vec<IpRange>,
    /// Kinds that anybody may send to listed keys where only those may publish.
    pub inbox_kinds: Vec<KindRange>,
    /// Events a key may publish a day (UTC); 0 = no limit.
    pub key_events_per_day_max: u64,
    /// MiB of events a key may publish a day; 0 = no limit.
    pub key_mb_per_day_max: u64,
    /// Events an address may publish a day; 0 = no limit.
    pub ip_events_per_day_max: u64,
    /// MiB of events an address may publish a day; 0 = no limit.
    pub ip_mb_per_day_max: u64,
}

/// Who may publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Writers {
    /// Everybody who is not denied.
    Anyone,
    /// Admins, allowed keys, members and those whom `[trust]` reaches.
    Listed,
}

/// `[members]`: invitations and a public list of members (NIP-43).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Members {
    /// Whether people can join.
    pub enabled: bool,
    /// File with the relay's own secret key; empty: one is made and kept with the data.
    pub key_file: String,
    /// Whether members get an invitation when they ask for one.
    pub may_invite: bool,
    /// Days for which an invitation holds that names no time.
    pub invite_days: u64,
}

/// `[trust]`: a web of trust from the contact lists (kind 3) that the relay stores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// Public keys whose contacts may publish; empty: no web of trust.
    pub roots: Vec<String>,
    /// 1: whom the roots follow. 2: and whom those follow.
    pub depth: u64,
    /// Keys that are remembered.
    pub keys_max: u64,
    /// Seconds between two readings of the contact lists.
    pub refresh_secs: u64,
}

/// Each number with its range.
pub(super) fn ranges(config: &Config) -> Vec<Range> {
    let (access, members, trust) = (&config.access, &config.members, &config.trust);
    let unlimited = 0..=1_000_000_000;
    vec![
        ("access.key_events_per_day_max", access.key_events_per_day_max, unlimited.clone()),
        ("access.key_mb_per_day_max", access.key_mb_per_day_max, unlimited.clone()),
        ("access.ip_events_per_day_max", access.ip_events_per_day_max, unlimited.clone()),
        ("access.ip_mb_per_day_max", access.ip_mb_per_day_max, unlimited),
        ("members.invite_days", members.invite_days, 1..=3_650),
        ("trust.depth", trust.depth, 1..=2),
        ("trust.keys_max", trust.keys_max, 1..=10_000_000),
        ("trust.refresh_secs", trust.refresh_secs, 1..=DAY_SECS),
    ]
}
