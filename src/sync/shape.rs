//! What the events of the sync engine have in common: label, kinds, addresses, and the way to a signed event.

use crate::protocol::event::Fields as _;
use crate::protocol::label::{self, NAMESPACE};
use crate::protocol::verify::event_id;
use crate::protocol::{Event, EventId, Kind, PublicKey, Signature, TagLetter, Tags};

/// Chats: heads and messages (NIP-51's bookmark sets, told apart by our label).
pub const CHAT: Kind = Kind(30_001);
/// Settings in the slot of a relay that knows it (NIP-51's pinned notes, told apart by our label).
pub const SETTINGS: Kind = Kind(10_001);
/// Settings for a relay without the slot: one document a device (NIP-78).
pub const SETTINGS_DOCUMENT: Kind = Kind(30_078);
/// A text given as training data (NIP-01).
pub const CONTRIBUTION: Kind = Kind(1);
/// A rating of a contribution, or its status (NIP-32).
pub const LABEL: Kind = Kind(1_985);
/// What the ratings of a contribution come to (NIP-85).
pub const AGGREGATE: Kind = Kind(30_383);

/// Before the chat's id in the `d` tag of its head.
pub const HEAD_PREFIX: &str = "oa:c:";
/// Before the chat's id in the `d` tag of a message; `:` and the message's id follow it.
pub const MESSAGE_PREFIX: &str = "oa:m:";
/// Before the device in the `d` tag of a settings document.
pub const DOCUMENT_PREFIX: &str = "oa:settings:";

/// What an event of ours is, as its `l` tag says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Schema {
    /// The head of a chat.
    ChatHead,
    /// One message of a chat.
    ChatMessage,
    /// Settings.
    Settings,
    /// Training data: contributions, ratings, statuses, aggregates.
    Training,
}

impl Schema {
    /// The value of the `l` tag, with the version that this crate writes and reads.
    pub fn label(self) -> &'static str {
        match self {
            Schema::ChatHead => "chat.head/1",
            Schema::ChatMessage => "chat.msg/1",
            Schema::Settings => "settings/1",
            Schema::Training => "training/1",
        }
    }

    /// What an event of ours is; `None` for others and for versions not known here.
    pub fn of(event: &Event) -> Option<Self> {
        if !label::is_labelled(event) {
            return None;
        }
        let ours = event.tags.iter().filter(|tag| tag.name() == "l" && tag.get(2) == Some(NAMESPACE));
        let mut schemas = ours.filter_map(|tag| Schema::from_label(tag.value()?));
        schemas.next()
    }

    fn from_label(label: &str) -> Option<Self> {
        let all = [Schema::ChatHead, Schema::ChatMessage, Schema::Settings, Schema::Training];
        all.into_iter().find(|schema| schema.label() == label)
    }

    /// The tags that every event of ours starts with: the label, and that only its author may publish it (NIP-70).
    pub fn tags(self) -> Vec<Vec<String>> {
        vec![tag(["L", NAMESPACE]), tag(["l", self.label(), NAMESPACE]), tag(["-"])]
    }
}

/// A tag from its items.
pub fn tag<const N: usize>(items: [&str; N]) -> Vec<String> {
    items.map(str::to_owned).to_vec()
}

/// An event without its author's key, id and signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsigned {
    /// The kind.
    pub kind: Kind,
    /// Seconds since 1970 UTC.
    pub created_at: u64,
    /// The tags.
    pub tags: Vec<Vec<String>>,
    /// The content, encrypted where it is to be.
    pub content: String,
}

impl Unsigned {
    /// The event by this author, with the signature that `sign` gives its id.
    pub fn sign(self, author: PublicKey, sign: impl FnOnce(&EventId) -> Signature) -> Event {
        let mut event = Event {
            id: EventId([0; 32]),
            pubkey: author,
            created_at: self.created_at,
            kind: self.kind,
            tags: Tags::from_lists(self.tags.into_iter().filter(|tag| !tag.is_empty())),
            content: self.content,
            sig: Signature([0; 64]),
        };
        event.id = event_id(&event);
        event.sig = sign(&event.id);
        event
    }
}

/// Whether an event is addressed to `key` by a `p` tag.
pub fn names(event: &Event, key: &PublicKey) -> bool {
    let hex = key.to_hex();
    event.has_tag(TagLetter::P, &mut |value| value == hex)
}
