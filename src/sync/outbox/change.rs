//! What must survive a crash: the changes of the outbox, as the driver keeps them in an append-only log.
//!
//! Applying the changes of the log in order, some of them twice, gives the outbox back: [`super::Outbox::apply`].

use serde::{Deserialize, Serialize};

use super::answer::Settlement;
use crate::sync::clock::Hlc;
use crate::sync::draft::Draft;

/// The place of an entry in the order of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

/// A relay by its URL in normal form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RelayUrl(String);

impl RelayUrl {
    /// Brings a URL into the form that is compared.
    pub fn new(url: &str) -> Self {
        RelayUrl(crate::protocol::supersede::normal_url(url))
    }

    /// The URL.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an entry is to say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Not signed yet; its date may still change.
    Draft(Box<Draft>),
    /// Signed: these bytes and no others go out. The event's canonical JSON.
    Event(String),
}

/// One durable change. The driver writes it before it acts on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum Change {
    /// The last change of a log that was made shorter: numbers below are used up.
    Numbered {
        /// The least number not given yet.
        next: Seq,
    },
    /// Something is owed to relays. The app's write counts as made when this is durable.
    Queued {
        /// A new number, higher than all before.
        seq: Seq,
        /// What is owed.
        content: Content,
        /// To whom.
        relays: Vec<RelayUrl>,
    },
    /// Drafts were dated for good. Losing this dates them anew, at about the same time.
    Dated {
        /// The entries and their stamps.
        dates: Vec<(Seq, Hlc)>,
    },
    /// A draft was signed, together with later drafts that the event says as well. Nothing is sent before this is
    /// durable: a relay must never see two events for one draft.
    Frozen {
        /// The entry.
        seq: Seq,
        /// Entries that are told by the same event; they end here and their debts pass to `seq`.
        covers: Vec<Seq>,
        /// The event's canonical JSON.
        event: String,
    },
    /// A debt is paid. Losing this costs one `duplicate:`.
    Settled {
        /// The entry.
        seq: Seq,
        /// The relay.
        relay: RelayUrl,
        /// In what way.
        how: Settlement,
    },
    /// A relay refused for good.
    Buried {
        /// The entry.
        seq: Seq,
        /// The relay.
        relay: RelayUrl,
        /// What it said.
        reason: String,
    },
    /// A person asked for a dead letter to be tried again.
    Revived {
        /// The entry.
        seq: Seq,
        /// The relay.
        relay: RelayUrl,
    },
    /// The entry is not wanted any more: a merge that became needless, or a dead letter that a person discards.
    Withdrawn {
        /// The entry.
        seq: Seq,
    },
}
