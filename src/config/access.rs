//! `[access]`: who may read and write.

use serde::{Deserialize, Serialize};

use super::check::Range;
use super::{Config, ConfigError, IpRange, KindRange};

/// Rules, and kinds or ranges in one of them: every event that comes in is held against each.
const RULES_MAX: usize = 64;

/// Leading zero bits that a proof of work may need: at 40 a desktop computer works for a day.
const POW_BITS_MAX: u8 = 64;

/// `[access]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Kinds that only their authors and the keys in their `p` tags may read, after authentication (NIP-42).
    pub private_kinds: Vec<KindRange>,
    /// Whether a client must authenticate before it may read anything.
    pub auth_required_to_read: bool,
    /// Whether a client must authenticate before it may publish anything.
    pub auth_required_to_write: bool,
    /// Leading zero bits that the id of a published event must have (NIP-13); 0 = none.
    pub pow_min: u8,
    /// Other numbers of bits for some kinds; the first rule that names a kind holds.
    pub pow_rules: Vec<PowRule>,
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

/// One of `access.pow_rules`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowRule {
    /// The kinds it is for.
    pub kinds: Vec<KindRange>,
    /// Leading zero bits that their ids must have.
    pub bits: u8,
}

impl Access {
    /// Leading zero bits that an event of this kind needs.
    pub fn pow_bits(&self, kind: u16) -> u8 {
        let rule = self.pow_rules.iter().find(|rule| rule.kinds.iter().any(|kinds| kinds.contains(kind)));
        rule.map_or(self.pow_min, |rule| rule.bits)
    }
}

/// Each number with its range.
pub(super) fn ranges(config: &Config) -> Vec<Range> {
    let access = &config.access;
    let unlimited = 0..=1_000_000_000;
    vec![
        ("access.pow_min", access.pow_min.into(), 0..=POW_BITS_MAX.into()),
        ("access.key_events_per_day_max", access.key_events_per_day_max, unlimited.clone()),
        ("access.key_mb_per_day_max", access.key_mb_per_day_max, unlimited.clone()),
        ("access.ip_events_per_day_max", access.ip_events_per_day_max, unlimited.clone()),
        ("access.ip_mb_per_day_max", access.ip_mb_per_day_max, unlimited),
    ]
}

/// Checks what has no range of its own.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let access = &config.access;
    if access.private_kinds.len() > RULES_MAX {
        return Err(config.refuse("access.private_kinds", format!("at most {RULES_MAX} kinds or ranges of kinds")));
    }
    if access.pow_rules.len() > RULES_MAX {
        return Err(config.refuse("access.pow_rules", format!("at most {RULES_MAX} rules")));
    }
    for (number, rule) in (1..).zip(&access.pow_rules) {
        let problem = if rule.kinds.is_empty() || rule.kinds.len() > RULES_MAX {
            format!("rule {number} must name from 1 to {RULES_MAX} kinds or ranges of kinds")
        } else if rule.bits > POW_BITS_MAX {
            format!("bits of rule {number} must be from 0 to {POW_BITS_MAX}")
        } else {
            continue;
        };
        return Err(config.refuse("access.pow_rules", problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    /// The first rule that names a kind holds, also with a lower number; others take the general one.
    #[test]
    fn the_first_rule_holds() {
        let text =
            "[access]\npow_min = 8\npow_rules = [{ kinds = [1059, \"4-5\"], bits = 0 }, { kinds = [4], bits = 20 }]";
        let access = Config::parse(text, None).unwrap().access;
        assert_eq!([1, 4, 5, 1059].map(|kind| access.pow_bits(kind)), [8, 0, 0, 0]);
        assert_eq!(Config::default().access.pow_bits(1), 0);
    }

    /// Wrong values are named with their place.
    #[test]
    fn wrong_rules_are_named() {
        for (text, expected) in [
            ("[access]\npow_min = 65\n", "my.toml:2: access.pow_min: must be from 0 to 64, not 65"),
            (
                "[[access.pow_rules]]\nkinds = []\nbits = 3\n",
                "my.toml:1: access.pow_rules: rule 1 must name from 1 to 64 kinds or ranges of kinds",
            ),
            (
                "[access]\npow_rules = [{ kinds = [1], bits = 99 }]\n",
                "my.toml:2: access.pow_rules: bits of rule 1 must be from 0 to 64",
            ),
        ] {
            assert_eq!(Config::parse(text, Some(Path::new("my.toml"))).unwrap_err().to_string(), expected);
        }
    }
}
