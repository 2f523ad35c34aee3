//! What the app sees of its chats, drafts included, and the commands that it gives.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;

use serde_json::Value;

use super::message::{self, Message, MessageDraft};
use super::order::{order, tips};
use super::{ARCHIVED, ChatKey, Chats, SHARE, TITLE, TRAINING_OPT_IN, shared_with, with_drafts};
use crate::protocol::PublicKey;
use crate::protocol::supersede::Address;
use crate::sync::cipher::{PLAINTEXT_BYTES_MAX, READERS_MAX};
use crate::sync::draft::{Deletion, Draft, Op, address_text};
use crate::sync::fields::Fields;

/// Most addresses in one deletion request: relays bound the tags of an event.
const DELETED_AT_ONCE_MAX: usize = 200;
/// Bytes of a message's content that are left for the rest of what is sealed with it.
const BODY_BYTES_RESERVED: usize = 8_192;

/// Why a command makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// There is no such message, or it was deleted.
    #[error("there is no such message")]
    NoMessage,
    /// Only its author changes a message.
    #[error("the message is somebody else's")]
    NotYours,
    /// Ids of messages hold no colon: it ends the chat's id in the address.
    #[error("a message's id is 1 to 64 characters without a colon")]
    BadId,
    /// There is a message of this id already.
    #[error("there is a message of this id already")]
    IdTaken,
    /// One event cannot hold it.
    #[error("the text is longer than one event can hold")]
    TooLong,
}

/// A chat as the app lists it.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadView {
    /// Which chat.
    pub chat: ChatKey,
    /// Its fields, those on their way included.
    pub fields: Fields,
    /// Something of it was not sent yet.
    pub pending: bool,
}

impl HeadView {
    /// The title; none if nobody gave it one.
    pub fn title(&self) -> Option<&str> {
        self.fields.get(TITLE)?.as_str()
    }

    /// Whether it is put away.
    pub fn is_archived(&self) -> bool {
        self.fields.get(ARCHIVED).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Whether its messages may be offered as training data.
    pub fn has_training_opt_in(&self) -> bool {
        self.fields.get(TRAINING_OPT_IN).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Who takes part besides the owner.
    pub fn shared_with(&self) -> Vec<PublicKey> {
        shared_with(&self.fields)
    }
}

/// A message as the app shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct MessageView {
    /// The message.
    pub message: Message,
    /// It does not follow the one before it: see [`super::order::Placed`].
    pub branch: bool,
    /// It, or its last edit, was not signed yet.
    pub pending: bool,
}

/// The chats of `me`: the state of signed events, and the drafts on top of it in the order of writing.
#[derive(Clone, Debug)]
pub struct ChatView<'s> {
    chats: &'s Chats,
    me: PublicKey,
    drafts: Vec<&'s Draft>,
}

/// A message with what decides whether a deletion takes it.
struct Shown {
    message: Message,
    /// That of its version; for a draft, what it would be by its present date.
    created_at: u64,
    /// The part of it that no later date of a draft changes.
    not_before: u64,
    pending: bool,
}

impl<'s> ChatView<'s> {
    /// The view of `me`.
    pub fn new(chats: &'s Chats, me: PublicKey, drafts: impl IntoIterator<Item = &'s Draft>) -> Self {
        ChatView { chats, me, drafts: drafts.into_iter().collect() }
    }

    /// All chats, by key.
    pub fn list(&self) -> Vec<HeadView> {
        let written = self.drafts.iter().filter_map(|draft| match &draft.op {
            Op::Head { chat, .. } => Some(self.own(chat)),
            Op::Message(message) => Some(message.chat.clone()),
            _ => None,
        });
        let all: BTreeSet<ChatKey> = self.chats.keys().into_iter().cloned().chain(written).collect();
        let views = all.into_iter().map(|chat| self.head(&chat));
        views.filter(|view| !view.fields.is_empty() || !self.shown(&view.chat).is_empty()).collect()
    }

    /// A chat's head; empty if there is none.
    pub fn head(&self, chat: &ChatKey) -> HeadView {
        let of_chat = |draft: &&&Draft| matches!(&draft.op, Op::Head { chat: id, .. } if self.own(id) == *chat);
        let changes: Vec<&Draft> = self.drafts.iter().filter(of_chat).copied().collect();
        let mut fields = with_drafts(self.chats.head(chat).cloned().unwrap_or_default(), &changes);
        if let Some(until) = self.deleted_until(&chat.head_address()) {
            fields.drop_until(until);
        }
        HeadView { chat: chat.clone(), fields, pending: !changes.is_empty() }
    }

    /// A chat's messages in their order. Only those count whose authors take part in the chat.
    pub fn messages(&self, chat: &ChatKey) -> Vec<MessageView> {
        let shown = self.shown(chat);
        let placed = order(shown.values().map(|shown| &shown.message));
        let view = |message: &Message, branch| {
            let address = message::address(message.author, &chat.id, &message.id);
            MessageView { message: message.clone(), branch, pending: shown[&address].pending }
        };
        placed.into_iter().map(|placed| view(placed.message, placed.branch)).collect()
    }

    fn shown(&self, chat: &ChatKey) -> BTreeMap<Address, Shown> {
        let taking_part = self.head(chat).shared_with();
        let mut shown = BTreeMap::new();
        for message in self.chats.messages_of(chat) {
            if message.author != chat.owner && !taking_part.contains(&message.author) {
                continue;
            }
            let address = message::address(message.author, &chat.id, &message.id);
            let created_at = self.chats.message_version(&address).map_or(0, |version| version.created_at);
            let shown_as = Shown { message: message.clone(), created_at, not_before: created_at, pending: false };
            shown.insert(address, shown_as);
        }
        for group in self.message_drafts(chat).values() {
            let Some((message, created_at)) = message::told(self.me, group) else { continue };
            let address = message::address(self.me, &chat.id, &message.id);
            // A version that the relays prefer to this draft has come in the meantime.
            let overtaken = shown.get(&address).is_some_and(|shown: &Shown| shown.created_at > created_at);
            if !overtaken {
                let not_before = group.iter().map(|(_, draft)| draft.not_before()).max().unwrap_or(0);
                shown.insert(address, Shown { message, created_at, not_before, pending: true });
            }
        }
        shown.retain(|address, shown| self.deleted_until(address).is_none_or(|until| shown.created_at > until));
        shown
    }

    fn message_drafts(&self, chat: &ChatKey) -> BTreeMap<&str, Vec<(&'s Draft, &'s MessageDraft)>> {
        let mut groups: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for draft in &self.drafts {
            if let Op::Message(message) = &draft.op
                && message.chat == *chat
            {
                groups.entry(&message.id).or_default().push((*draft, message));
            }
        }
        groups
    }

    /// Until when deletions that are not sent yet reach.
    fn deleted_until(&self, address: &Address) -> Option<u64> {
        let deletions = self.drafts.iter().filter_map(|draft| match &draft.op {
            Op::Delete(deletion) => Some((draft, deletion)),
            _ => None,
        });
        let text = address_text(address);
        let of_this = deletions.filter(|(_, deletion)| address.pubkey == self.me && deletion.addresses.contains(&text));
        of_this.map(|(draft, deletion)| deletion.created_at(draft.written.stamp)).max()
    }

    fn own(&self, id: &str) -> ChatKey {
        ChatKey { owner: self.me, id: id.to_owned() }
    }
}

/// Commands. Each gives what is to be dated and put into the outbox.
impl ChatView<'_> {
    /// A new chat, or another title for an old one.
    pub fn set_title(&self, chat: &str, title: &str) -> Op {
        self.set_field(chat, TITLE, Value::from(title))
    }

    /// Puts a chat away, or back.
    pub fn set_archived(&self, chat: &str, archived: bool) -> Op {
        self.set_field(chat, ARCHIVED, Value::from(archived))
    }

    /// Who takes part besides the owner. Messages written from now on are sealed for them too.
    pub fn share(&self, chat: &str, with: &[PublicKey]) -> Op {
        self.set_field(chat, SHARE, with.iter().map(PublicKey::to_hex).collect())
    }

    /// Whether messages of the chat may be offered as training data.
    pub fn set_training_opt_in(&self, chat: &str, opt_in: bool) -> Op {
        self.set_field(chat, TRAINING_OPT_IN, Value::from(opt_in))
    }

    /// Any field of an own chat's head; null removes it.
    pub fn set_field(&self, chat: &str, name: &str, value: Value) -> Op {
        Op::Head { chat: chat.to_owned(), fields: BTreeMap::from([(name.to_owned(), value)]), known: Fields::default() }
    }

    /// A new message at the end of a chat: it follows every message that nothing follows yet. `id` is a new UUID.
    ///
    /// # Errors
    /// [`ChatError::BadId`], [`ChatError::IdTaken`] or [`ChatError::TooLong`].
    pub fn send(&self, chat: &ChatKey, id: &str, role: &str, content: &str, meta: Value) -> Result<Op, ChatError> {
        if id.is_empty() || id.len() > 64 || id.contains(':') {
            return Err(ChatError::BadId);
        }
        check_length(content, &meta)?;
        let shown = self.shown(chat);
        if shown.values().any(|shown| shown.message.id == id) {
            return Err(ChatError::IdTaken);
        }
        Ok(Op::Message(MessageDraft {
            chat: chat.clone(),
            id: id.to_owned(),
            role: role.to_owned(),
            content: content.to_owned(),
            first: None,
            parents: tips(shown.values().map(|shown| &shown.message)),
            meta,
            readers: self.readers(chat),
            after: None,
        }))
    }

    /// Another text for an own message.
    ///
    /// # Errors
    /// [`ChatError`].
    pub fn edit(&self, chat: &ChatKey, id: &str, content: &str) -> Result<Op, ChatError> {
        let (address, message) = self.own_message(chat, id)?;
        check_length(content, &message.meta)?;
        Ok(Op::Message(MessageDraft {
            chat: chat.clone(),
            id: id.to_owned(),
            role: message.role,
            content: content.to_owned(),
            first: Some((message.created_at_ms, message.stamp)),
            parents: message.parents,
            meta: message.meta,
            readers: self.readers(chat),
            after: self.chats.message_version(&address).map(|version| version.created_at),
        }))
    }

    /// Deletes an own message.
    ///
    /// # Errors
    /// [`ChatError::NoMessage`] or [`ChatError::NotYours`].
    pub fn delete(&self, chat: &ChatKey, id: &str) -> Result<Op, ChatError> {
        let (address, message) = self.own_message(chat, id)?;
        let not_before = self.shown(chat).get(&address).map_or(0, |shown| shown.not_before);
        Ok(Op::Delete(Deletion {
            training: false,
            addresses: vec![address_text(&address)],
            ids: Vec::new(),
            not_before,
            readers: self.told(message.readers.into_iter().chain(self.readers(chat))),
        }))
    }

    /// Deletes an own chat: its head and the own messages in it. One request a few hundred messages.
    pub fn delete_chat(&self, chat: &str) -> Vec<Op> {
        let key = self.own(chat);
        let shown = self.shown(&key);
        let own = shown.iter().filter(|(address, _)| address.pubkey == self.me);
        let head = self.chats.head_version(&key).map_or(0, |version| version.created_at);
        let head = head.max(self.chats.head(&key).map_or(0, |fields| fields.latest().second()));
        let of_head = (address_text(&key.head_address()), head, self.readers(&key));
        let of_message = |(address, shown): (&Address, &Shown)| {
            (address_text(address), shown.not_before, shown.message.readers.clone())
        };
        let all: Vec<(String, u64, Vec<PublicKey>)> = iter::once(of_head).chain(own.map(of_message)).collect();
        let request = |part: &[(String, u64, Vec<PublicKey>)]| {
            Op::Delete(Deletion {
                training: false,
                addresses: part.iter().map(|(address, ..)| address.clone()).collect(),
                ids: Vec::new(),
                not_before: part.iter().map(|(_, not_before, _)| *not_before).max().unwrap_or(0),
                readers: self.told(part.iter().flat_map(|(_, _, readers)| readers).copied()),
            })
        };
        all.chunks(DELETED_AT_ONCE_MAX).map(request).collect()
    }

    fn own_message(&self, chat: &ChatKey, id: &str) -> Result<(Address, Message), ChatError> {
        let mut shown = self.shown(chat);
        let address = message::address(self.me, &chat.id, id);
        match shown.remove(&address) {
            Some(shown) => Ok((address, shown.message)),
            None if shown.values().any(|shown| shown.message.id == id) => Err(ChatError::NotYours),
            None => Err(ChatError::NoMessage),
        }
    }

    /// Whom a deletion request names: each once, and no more than a message has readers.
    fn told(&self, readers: impl Iterator<Item = PublicKey>) -> Vec<PublicKey> {
        let others: BTreeSet<PublicKey> = readers.filter(|reader| *reader != self.me).collect();
        others.into_iter().take(READERS_MAX).collect()
    }

    fn readers(&self, chat: &ChatKey) -> Vec<PublicKey> {
        let taking_part = self.head(chat).shared_with();
        let all = iter::once(chat.owner).chain(taking_part);
        all.filter(|reader| *reader != self.me).collect()
    }
}

fn check_length(content: &str, meta: &Value) -> Result<(), ChatError> {
    // As JSON strings, since that is how they are sealed.
    let written = Value::from(content).to_string().len() + meta.to_string().len();
    if written > PLAINTEXT_BYTES_MAX - BODY_BYTES_RESERVED { Err(ChatError::TooLong) } else { Ok(()) }
}
