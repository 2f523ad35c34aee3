//! What an app can see of its client: how much waits, how the links are, what was refused.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::sync::outbox::RelayUrl;

/// How a client is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Things that some relay is owed.
    pub waiting: usize,
    /// Those of them that are not signed yet.
    pub drafts: usize,
    /// Things that some relay refused for good; see the list of dead letters.
    pub dead: usize,
    /// When the oldest unsigned one was written, milliseconds since 1970 by this device's clock.
    pub oldest_draft_ms: Option<u64>,
    /// Bytes that the outbox takes on disk.
    pub outbox_bytes: u64,
    /// Bytes of the outbox's journal that could not be read; a copy lies beside it.
    pub damaged_bytes: u64,
    /// Settings that two devices wrote without knowing of each other, and that were merged or wait to be.
    pub conflicts: usize,
    /// Each relay.
    #[serde(serialize_with = "by_url")]
    pub relays: BTreeMap<RelayUrl, RelayStatus>,
}

fn by_url<S: serde::Serializer>(relays: &BTreeMap<RelayUrl, RelayStatus>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(relays.iter().map(|(url, status)| (url.as_str(), status)))
}

/// How one relay is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RelayStatus {
    /// What the link does.
    pub link: LinkState,
    /// Things that it is owed.
    pub owed: usize,
    /// Those of them that are on their way.
    pub in_flight: usize,
    /// Events that it gave since the link came up.
    pub fetched: usize,
    /// Events that it lacked and took since the link came up.
    pub uploaded: usize,
    /// How wrong this device's clock is by it: milliseconds to be added.
    pub clock_offset_ms: Option<i64>,
    /// It keeps settings in slots of their own.
    pub slots: bool,
    /// What went wrong last; empty when nothing did.
    pub trouble: String,
}

/// What a link does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// There is none.
    #[default]
    Down,
    /// Finding out what differs.
    CatchingUp,
    /// Nothing differs; what is new comes and goes at once.
    Live,
}
