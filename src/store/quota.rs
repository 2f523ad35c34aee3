//! Retention: which events are too old, and which make way when the store takes more than its quota.
//!
//! The stated order: what has expired (that is [`Store::sweep_expired`](super::Store::sweep_expired)); then what is older
//! than its kind's age; then, over the quota, the oldest of the kinds that the rules name, and when none of these is left
//! the oldest of all other kinds, until live events and index take less than [`SHRINK_TO_PERCENT`] of it. A compaction
//! frees the space. [`UNTOUCHED`] kinds, those whose rule protects them and the keys on the keep list stay.
//!
//! Here are the rules; `keeper` carries them out, the same for every store.

mod files;
mod keeper;

use std::collections::HashSet;

use crate::config::{KindRange, Retention};
use crate::protocol::nip19::{self, KeyError};
use crate::protocol::{Kind, PublicKey};

pub(super) use files::{FilesGround, FilesPlace, saved_reaches};
pub(super) use keeper::Keeper;
#[cfg(feature = "postgres")]
pub(super) use keeper::{Evicted, Ground, Used};

/// Kinds that neither age nor quota removes: profiles, contacts, deletions, requests to vanish, relay lists. They are
/// small, and without them the rest loses its meaning or comes back.
pub const UNTOUCHED: [Kind; 5] = [Kind::METADATA, Kind::CONTACTS, Kind::DELETION, Kind::VANISH, Kind(10_002)];
/// Eviction goes on until this much of the quota is used, so that it is not due again at once.
pub const SHRINK_TO_PERCENT: u64 = 90;
/// Below this much of the quota, what was evicted may come back.
pub const ROOM_PERCENT: u64 = 75;

const DAY_SECS: u64 = 24 * 60 * 60;
const MIB: u64 = 1 << 20;

/// What is kept, and for how long. The default keeps everything.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    quota_bytes: u64,
    age_secs_max: u64,
    kinds: Vec<KindRule>,
    keep: HashSet<PublicKey>,
    /// The settings as text: other rules have another one.
    text: String,
}

#[derive(Clone, Debug)]
struct KindRule {
    kinds: Vec<KindRange>,
    age_secs_max: u64,
    evict: bool,
}

impl Rules {
    /// The rules that the settings state.
    ///
    /// # Errors
    /// The entry of `keep` that is no public key, and why.
    pub fn new(settings: &Retention) -> Result<Rules, (String, KeyError)> {
        let key = |text: &String| nip19::parse_pubkey(text).map(PublicKey).map_err(|error| (text.clone(), error));
        let kinds = settings.rules.iter().map(|rule| KindRule {
            kinds: rule.kinds.clone(),
            age_secs_max: rule.max_age_days.unwrap_or(settings.max_age_days).saturating_mul(DAY_SECS),
            evict: rule.evict,
        });
        Ok(Rules {
            quota_bytes: settings.max_disk_mb.saturating_mul(MIB),
            age_secs_max: settings.max_age_days.saturating_mul(DAY_SECS),
            kinds: kinds.collect(),
            keep: settings.keep.iter().map(key).collect::<Result<_, _>>()?,
            text: serde_json::to_string(settings).expect("numbers, texts and lists always encode"),
        })
    }

    /// The same rules with a quota in bytes.
    pub fn with_quota_bytes(mut self, quota_bytes: u64) -> Rules {
        self.quota_bytes = quota_bytes;
        self
    }

    fn limit_nothing(&self) -> bool {
        self.quota_bytes == 0 && self.ages().is_empty()
    }

    /// The age in seconds beyond which a kind is removed; 0: none.
    fn age_secs_max(&self, kind: Kind) -> u64 {
        match self.rule(kind) {
            _ if UNTOUCHED.contains(&kind) => 0,
            Some(rule) => rule.age_secs_max,
            None => self.age_secs_max,
        }
    }

    /// When it is this kind's turn to make room; `None`: never.
    fn class(&self, kind: Kind) -> Option<Class> {
        match self.rule(kind) {
            _ if UNTOUCHED.contains(&kind) => None,
            Some(rule) => rule.evict.then_some(Class::Named),
            None => Some(Class::Other),
        }
    }

    fn first_class(&self) -> Class {
        if self.kinds.iter().any(|rule| rule.evict) { Class::Named } else { Class::Other }
    }

    fn rule(&self, kind: Kind) -> Option<&KindRule> {
        self.kinds.iter().find(|rule| rule.kinds.iter().any(|kinds| kinds.contains(kind.0)))
    }

    /// Every age that some kind has.
    fn ages(&self) -> Vec<u64> {
        let mut ages: Vec<u64> = self.kinds.iter().map(|rule| rule.age_secs_max).chain([self.age_secs_max]).collect();
        ages.sort_unstable();
        ages.dedup();
        ages.retain(|age| *age > 0);
        ages
    }
}

/// Kinds that make room at the same time, the oldest event first; the earlier class before the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Those that a rule names and does not protect.
    Named,
    /// Those that no rule names.
    Other,
}

impl Class {
    const ALL: [Class; 2] = [Class::Named, Class::Other];
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;

    fn rules(toml: &str) -> Rules {
        Rules::new(&Config::parse(&format!("[retention]\n{toml}"), None).unwrap().retention).unwrap()
    }

    /// The first rule that names a kind holds; the untouched kinds stay whatever the rules say.
    #[test]
    fn the_first_rule_holds_and_some_kinds_always_stay() {
        let rules = rules(
            "max_age_days = 10\nrules = [{ kinds = [7, \"1000-1999\"], max_age_days = 1 }, \
             { kinds = [\"0-9999\"], evict = false }, { kinds = [30023], max_age_days = 0 }]",
        );
        let of = |kind| (rules.age_secs_max(Kind(kind)) / DAY_SECS, rules.class(Kind(kind)));
        let (named, other) = (Some(Class::Named), Some(Class::Other));
        assert_eq!(of(7), (1, named));
        assert_eq!([of(1000), of(1999)], [(1, named); 2]);
        assert_eq!([of(1), of(999), of(2000)], [(10, None); 3]);
        assert_eq!(of(30_023), (0, named));
        assert_eq!(of(20_000), (10, other));
        assert_eq!([0, 3, 5, 62, 10_002].map(of), [(0, None); 5]);
        assert_eq!(rules.ages(), [DAY_SECS, 10 * DAY_SECS]);
        assert!(Rules::default().limit_nothing() && !rules.limit_nothing());
    }

    /// A key that is none is named.
    #[test]
    fn a_wrong_key_on_the_keep_list_is_named() {
        let settings = Retention { keep: vec!["npub1xyz".to_owned()], ..Retention::default() };
        assert_eq!(Rules::new(&settings).unwrap_err().0, "npub1xyz");
    }
}
