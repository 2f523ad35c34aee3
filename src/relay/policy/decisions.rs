//! What was decided while the relay ran (NIP-86, NIP-43): plain data, kept as one JSON blob of the store.
//!
//! Changed on a copy by [`super::methods`] and [`super::members`], saved, and only then in force: a decision that could not
//! be saved was not made. Every list has a bound.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::config::IpRange;
use crate::protocol::{EventId, PublicKey};

/// Name of the blob.
pub const BLOB: &str = "policy";

/// Version of the blob's form. A newer one is refused, since what it says would be lost with the next decision.
const VERSION: u32 = 1;

/// Entries of one list.
pub const ENTRIES_MAX: usize = 100_000;

/// Everything that was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decisions {
    version: u32,
    /// Keys that may not publish, with the reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub banned_keys: BTreeMap<PublicKey, String>,
    /// Keys that may, with the reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub allowed_keys: BTreeMap<PublicKey, String>,
    /// Events that are kept out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub banned_events: BTreeMap<EventId, String>,
    /// Events that pass whoever wrote them, and need no moderation any more.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub allowed_events: BTreeMap<EventId, String>,
    /// Kinds that are accepted; with those of the settings. None in either: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub allowed_kinds: BTreeSet<u16>,
    /// Kinds that are refused.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub disallowed_kinds: BTreeSet<u16>,
    /// Addresses that are not served, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocked_ips: Vec<(IpRange, String)>,
    /// The relay's name instead of that of the settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Its icon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icon: Option<String>,
    /// Who may call which methods of NIP-86, beside the admins.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub grants: BTreeMap<PublicKey, BTreeSet<String>>,
    /// Members (NIP-43).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub members: BTreeMap<PublicKey, Member>,
    /// Roles that members may have, by id.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Role>,
    /// Invitations by their code.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub invites: BTreeMap<String, Invite>,
    /// Banned keys whose stored events are still being removed.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub erasing: BTreeSet<PublicKey>,
    /// `created_at` of the last event that the relay signed: the next one is newer, so that it replaces that.
    #[serde(default)]
    pub signed_at: u64,
}

/// Somebody who joined.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// When, in seconds since 1970.
    pub since: u64,
    /// Ids of roles.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub roles: BTreeSet<String>,
}

/// A role, for clients to show (NIP-43 kind 33534). It gives no rights here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// Its name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// What it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Hue, 0 to 360.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub color: Option<u16>,
    /// Where it stands in a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<i64>,
}

/// An invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// How many may still join with it.
    pub uses: u32,
    /// From when on nobody may, in seconds since 1970.
    pub expires: u64,
    /// The member who asked for it; `None`: an admin made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<PublicKey>,
}

impl Default for Decisions {
    fn default() -> Self {
        serde_json::from_slice(format!("{{\"version\":{VERSION}}}").as_bytes())
            .expect("every other field has a default")
    }
}

impl Decisions {
    /// Reads the blob.
    ///
    /// # Errors
    /// What is wrong with it, for the operator.
    pub fn from_blob(blob: &[u8]) -> Result<Decisions, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(blob).map_err(|error| error.to_string())?;
        if version > VERSION {
            return Err(format!("it has form {version}, and this sledge knows up to {VERSION}; use a newer sledge"));
        }
        serde_json::from_slice(blob).map_err(|error| error.to_string())
    }

    /// The blob.
    pub fn to_blob(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("made of texts and numbers")
    }

    /// Whether this address is not to be served.
    pub fn blocks(&self, ip: std::net::IpAddr) -> bool {
        self.blocked_ips.iter().any(|(range, _)| range.contains(ip))
    }

    /// A time for the next event that the relay signs: `now`, or just after the last one.
    pub fn sign_at(&mut self, now: u64) -> u64 {
        self.signed_at = now.max(self.signed_at + 1);
        self.signed_at
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// All of it comes back; nothing is written for what was not decided.
    #[test]
    fn decisions_survive_their_blob() {
        assert_eq!(Decisions::default().to_blob(), b"{\"version\":1,\"signed_at\":0}");
        let mut decisions = Decisions::default();
        let key = PublicKey([7; 32]);
        decisions.banned_keys.insert(key, "spam \"x\"".to_owned());
        decisions.banned_events.insert(EventId([9; 32]), String::new());
        decisions.disallowed_kinds.insert(7);
        decisions.blocked_ips.push(("10.0.0.0/8".parse().unwrap(), "bots".to_owned()));
        decisions.grants.entry(key).or_default().insert("banevent".to_owned());
        decisions.members.insert(key, Member { since: 5, roles: ["king".to_owned()].into() });
        decisions.roles.insert("king".to_owned(), Role { color: Some(37), ..Role::default() });
        decisions.invites.insert("code".to_owned(), Invite { uses: 2, expires: 9, by: Some(key) });
        decisions.name = Some(String::new());
        assert_eq!(Decisions::from_blob(&decisions.to_blob()), Ok(decisions));
    }

    /// A newer form, an unknown field and no JSON are refused: the next decision would overwrite them.
    #[test]
    fn what_is_not_understood_is_refused() {
        for blob in ["", "{}", "{\"version\":2}", "{\"version\":1,\"banned\":[]}", "{\"version\":1"] {
            assert!(Decisions::from_blob(blob.as_bytes()).is_err(), "{blob}");
        }
    }

    /// Two events of one second still replace one another in order.
    #[test]
    fn signed_events_have_ascending_times() {
        let mut decisions = Decisions::default();
        assert_eq!([5, 5, 4, 9].map(|now| decisions.sign_at(now)), [5, 6, 7, 9]);
    }
}
