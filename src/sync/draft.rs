//! A write that is not an event yet: dated for now, neither encrypted nor signed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chat::message::MessageDraft;
use super::clock::{Hlc, Written};
use super::fields::Fields;
use super::shape::{Schema, Unsigned, tag};
use super::training::TrainingOp;
use crate::protocol::supersede::Address;
use crate::protocol::{EventId, Kind, PublicKey};

/// A dated command, as it waits in the outbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    /// When it was written.
    pub written: Written,
    /// What is to be said.
    pub op: Op,
}

/// What is to be said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Any event that is none of ours.
    Plain(Plain),
    /// Fields of an own chat's head.
    Head {
        /// The chat.
        chat: String,
        /// New values; null removes.
        fields: BTreeMap<String, Value>,
        /// What is to be said again: fields that the winning version leaves out, as they were dated. They stand here so
        /// that a crash does not lose what only a replaced version had said.
        #[serde(default, skip_serializing_if = "Fields::is_empty")]
        known: Fields,
    },
    /// A message, or the new text of one.
    Message(MessageDraft),
    /// A deletion request.
    Delete(Deletion),
    /// Settings. Without any: say again what they amount to.
    Settings {
        /// In which form; one relay takes only one of them.
        form: SettingsForm,
        /// New values; null removes.
        fields: BTreeMap<String, Value>,
    },
    /// Something about training data.
    Training(TrainingOp),
}

/// Which relays an event of ours may go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Wherever the user publishes.
    Public,
    /// Relays that the user trusts with private, labelled events.
    Private,
    /// Relays on the allow-list for training data, and no others.
    Training,
}

/// How settings travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SettingsForm {
    /// Kind 10001 in the slot of a relay that says `"sync":{"slots":1}` in its NIP-11 document. Elsewhere it would take
    /// the place of the user's pinned notes.
    Slot,
    /// Kind 30078, one document a device, for all other relays.
    Document,
}

/// An event of any kind, in the clear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plain {
    /// Its kind.
    pub kind: u16,
    /// Its tags.
    pub tags: Vec<Vec<String>>,
    /// Its content.
    pub content: String,
}

/// A deletion request (NIP-09) for own events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// Whether chats or training data are deleted; decides where the request goes.
    pub training: bool,
    /// `kind:pubkey:d` of addressable events.
    pub addresses: Vec<String>,
    /// Ids of regular events.
    pub ids: Vec<EventId>,
    /// The `created_at` of the newest version that the writer had seen: the request is not dated before it.
    pub not_before: u64,
    /// Who could read what is deleted, besides the author: named in `p` tags, since only those may read the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub readers: Vec<PublicKey>,
}

impl Deletion {
    /// The `created_at` of the request, dated `stamp`: a deletion wins over what is as old as itself.
    pub fn created_at(&self, stamp: Hlc) -> u64 {
        stamp.second().max(self.not_before)
    }

    /// The request.
    pub fn build(&self, stamp: Hlc) -> Unsigned {
        let schema = if self.training { Schema::Training } else { Schema::ChatMessage };
        let mut tags: Vec<Vec<String>> = self.addresses.iter().map(|address| tag(["a", address])).collect();
        tags.extend(self.ids.iter().map(|id| tag(["e", &id.to_hex()])));
        tags.extend(self.readers.iter().map(|reader| tag(["p", &reader.to_hex()])));
        // Without our label the request would show everybody the ids of private chats.
        tags.extend(schema.tags());
        Unsigned { kind: Kind::DELETION, created_at: self.created_at(stamp), tags, content: String::new() }
    }
}

impl Op {
    /// Drafts of the same key are told by one event that says them all.
    pub fn merge_key(&self) -> Option<String> {
        match self {
            Op::Head { chat, .. } => Some(format!("head {chat}")),
            Op::Message(message) => Some(format!("message {} {} {}", message.chat.owner, message.chat.id, message.id)),
            Op::Settings { form: SettingsForm::Slot, .. } => Some("settings slot".to_owned()),
            Op::Settings { form: SettingsForm::Document, .. } => Some("settings document".to_owned()),
            Op::Plain(_) | Op::Delete(_) | Op::Training(_) => None,
        }
    }

    /// Which relays it may go to.
    pub fn audience(&self) -> Audience {
        match self {
            Op::Plain(_) => Audience::Public,
            Op::Delete(Deletion { training: true, .. }) | Op::Training(_) => Audience::Training,
            Op::Head { .. } | Op::Message(_) | Op::Delete(_) | Op::Settings { .. } => Audience::Private,
        }
    }
}

impl Draft {
    /// See [`Op::merge_key`].
    pub fn merge_key(&self) -> Option<String> {
        self.op.merge_key()
    }
}

/// How an `a` tag names an address.
pub fn address_text(address: &Address) -> String {
    format!("{}:{}:{}", address.kind, address.pubkey, address.d)
}
