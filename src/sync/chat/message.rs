//! One message as an event: its content, its address, reading it and building it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ChatKey;
use crate::protocol::supersede::Address;
use crate::protocol::{Event, PublicKey};
use crate::sync::cipher::{self, Cipher, READERS_MAX, SealError};
use crate::sync::clock::Hlc;
use crate::sync::draft::{Draft, address_text};
use crate::sync::shape::{CHAT, HEAD_PREFIX, MESSAGE_PREFIX, Schema, Unsigned, tag};

/// Most messages that one message answers.
pub const PARENTS_MAX: usize = 64;

/// A message as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The chat it belongs to.
    pub chat: ChatKey,
    /// Its author.
    pub author: PublicKey,
    /// Its id within the chat: a UUID.
    pub id: String,
    /// Who speaks, as the model's API calls it: `user`, `assistant`, `system`, `tool`.
    pub role: String,
    /// The text.
    pub content: String,
    /// When it was first written: milliseconds since 1970.
    pub created_at_ms: u64,
    /// Its place among messages that do not answer each other. An edit leaves it.
    pub stamp: Hlc,
    /// The messages that it follows.
    pub parents: Vec<String>,
    /// Whatever the app keeps with it; null for nothing.
    pub meta: Value,
    /// Who can read it besides its author.
    pub readers: Vec<PublicKey>,
}

/// The encrypted content.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    v: u32,
    role: String,
    content: String,
    created_at: u64,
    hlc: Hlc,
    #[serde(default)]
    parents: Vec<String>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    meta: Value,
}

/// A message on its way, or the new text of one. Says everything, so that an edit needs nothing but itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MessageDraft {
    /// The chat.
    pub chat: ChatKey,
    /// The message's id.
    pub id: String,
    /// Who speaks.
    pub role: String,
    /// The text.
    pub content: String,
    /// For an edit: when the message was first written, and its place. Otherwise the draft's own date.
    pub first: Option<(u64, Hlc)>,
    /// The messages that it follows.
    pub parents: Vec<String>,
    /// Whatever the app keeps with it.
    #[serde(default)]
    pub meta: Value,
    /// Who can read it besides the author.
    pub readers: Vec<PublicKey>,
    /// For an edit: the `created_at` of the version that its writer saw. It must win over that one.
    pub after: Option<u64>,
}

impl MessageDraft {
    /// The message that this draft makes.
    pub fn message(&self, author: PublicKey, stamp: Hlc) -> Message {
        let (created_at_ms, stamp) = self.first.unwrap_or((stamp.wall_ms, stamp));
        Message {
            chat: self.chat.clone(),
            author,
            id: self.id.clone(),
            role: self.role.clone(),
            content: self.content.clone(),
            created_at_ms,
            stamp,
            parents: self.parents.clone(),
            meta: self.meta.clone(),
            readers: self.readers.clone(),
        }
    }

    /// What its event's `created_at` is not below, whatever its date: it must win over the version that its writer saw.
    pub fn not_before(&self) -> u64 {
        self.after.map_or(0, |seen| seen.saturating_add(1))
    }
}

/// The address of a message.
pub fn address(author: PublicKey, chat: &str, id: &str) -> Address {
    Address { kind: CHAT, pubkey: author, d: format!("{MESSAGE_PREFIX}{chat}:{id}") }
}

/// What a group of drafts of one message comes to, and its event's `created_at`: the last one counts. A message and its
/// edits that were all written before the first is sent are one; the message keeps its first date.
pub fn told(author: PublicKey, drafts: &[(&Draft, &MessageDraft)]) -> Option<(Message, u64)> {
    let (last_draft, last) = drafts.last()?;
    let stamp = last_draft.written.stamp;
    let mut message = last.message(author, stamp);
    if let Some((draft, _)) = drafts.iter().find(|(_, message)| message.first.is_none()) {
        // What the edit took over from its draft may have been dated by a wrong clock.
        message.stamp = draft.written.stamp;
        message.created_at_ms = message.stamp.wall_ms;
    }
    let not_before = drafts.iter().map(|(_, message)| message.not_before()).max().unwrap_or(0);
    let created_at = stamp.second().max(not_before).max(message.stamp.second());
    Some((message, created_at))
}

/// The event that tells a group of drafts of one message.
///
/// # Errors
/// See [`SealError`].
pub fn build(cipher: &dyn Cipher, drafts: &[(&Draft, &MessageDraft)]) -> Result<Option<Unsigned>, SealError> {
    let author = cipher.pubkey();
    let (Some((message, created_at)), Some((_, last))) = (told(author, drafts), drafts.last()) else {
        return Ok(None);
    };
    let body = Body {
        v: 1,
        role: message.role,
        content: message.content,
        created_at: message.created_at_ms,
        hlc: message.stamp,
        parents: message.parents,
        meta: message.meta,
    };
    let plain = serde_json::to_string(&body).expect("strings and numbers can be written");
    let sealed = cipher::seal_for(cipher, &last.readers, &plain)?;
    let mut tags = vec![
        tag(["d", &address(author, &message.chat.id, &message.id).d]),
        tag(["a", &address_text(&message.chat.head_address())]),
    ];
    tags.extend(Schema::ChatMessage.tags());
    tags.extend(sealed.tags);
    Ok(Some(Unsigned { kind: CHAT, created_at, tags, content: sealed.content }))
}

/// Reads a message; why not, if it is not one.
///
/// # Errors
/// What is wrong with the event: judged from the event alone, so that all devices agree.
pub fn read(event: &Event, cipher: &dyn Cipher) -> Result<(Address, Message), &'static str> {
    let address = Address::of(event).filter(|address| address.kind == CHAT).ok_or("a message is of kind 30001")?;
    let rest = address.d.strip_prefix(MESSAGE_PREFIX).ok_or("the d tag of a message starts with oa:m:")?;
    let (chat_id, id) = rest.rsplit_once(':').ok_or("the d tag of a message ends with its id")?;
    let heads = event.tags.values("a").filter_map(Address::parse);
    let head = heads.filter(|head| head.kind == CHAT).find(|head| head.d.strip_prefix(HEAD_PREFIX) == Some(chat_id));
    let head = head.ok_or("a message names the head of its chat in an a tag")?;
    let plain = cipher::open(cipher, &event.pubkey, &event.tags, &event.content).ok_or("not sealed for this key")?;
    let body: Body = serde_json::from_str(&plain).map_err(|_| "the content is not that of a message")?;
    if body.v != 1 {
        return Err("a version of messages that is not known here");
    }
    if !body.hlc.is_valid_in(event.created_at) {
        return Err("the stamp lies after the event's created_at");
    }
    if body.parents.len() > PARENTS_MAX {
        return Err("too many parents");
    }
    let message = Message {
        chat: ChatKey { owner: head.pubkey, id: chat_id.to_owned() },
        author: event.pubkey,
        id: id.to_owned(),
        role: body.role,
        content: body.content,
        created_at_ms: body.created_at,
        stamp: body.hlc,
        parents: body.parents,
        meta: body.meta,
        readers: event.tags.values("p").filter_map(PublicKey::from_hex).take(READERS_MAX).collect(),
    };
    Ok((address, message))
}
