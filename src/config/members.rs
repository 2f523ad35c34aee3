//! `[members]` and `[trust]`: whom the relay lists without the operator naming each.

use serde::{Deserialize, Serialize};

use super::Config;
use super::check::Range;

const DAY_SECS: u64 = 24 * 60 * 60;

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
    let (members, trust) = (&config.members, &config.trust);
    vec![
        ("members.invite_days", members.invite_days, 1..=3_650),
        ("trust.depth", trust.depth, 1..=2),
        ("trust.keys_max", trust.keys_max, 1..=10_000_000),
        ("trust.refresh_secs", trust.refresh_secs, 1..=DAY_SECS),
    ]
}
