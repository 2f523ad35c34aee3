//! Chats: a head of last-writer-wins fields, and one event a message.
//!
//! In: verified events of kind 30001 and deletion requests. Out: heads and messages, the same on every device that has
//! the same events. A head's version that wins at the relays may lack what another device wrote at the same time; a
//! device that knows more says it again ([`Chats::heads_due`]).

pub mod message;
pub mod order;
#[cfg(test)]
mod tests;
mod view;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use message::{Message, MessageDraft};
pub use view::{ChatError, ChatView, HeadView, MessageView};

use super::cipher::{self, Cipher, SealError};
use super::clock::Hlc;
use super::draft::{Draft, Op};
use super::fields::{Field, Fields};
use super::shape::{CHAT, HEAD_PREFIX, Schema, Unsigned, tag};
use super::slots::{Deletions, Slots};
use crate::protocol::supersede::{Address, Version};
use crate::protocol::{Event, PublicKey};

/// The head's field with the title, a string.
pub const TITLE: &str = "title";
/// The head's field that says whether the chat is put away, a boolean.
pub const ARCHIVED: &str = "archived";
/// The head's field with the public keys of those who take part, a list of hex strings.
pub const SHARE: &str = "share";
/// The head's field that says whether messages may be offered as training data, a boolean. Each still needs consent.
pub const TRAINING_OPT_IN: &str = "trainingOptIn";

/// Which chat.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChatKey {
    /// Whose chat it is.
    pub owner: PublicKey,
    /// Its id among the owner's chats: any text.
    pub id: String,
}

impl ChatKey {
    /// The address of the chat's head.
    pub fn head_address(&self) -> Address {
        Address { kind: CHAT, pubkey: self.owner, d: format!("{HEAD_PREFIX}{}", self.id) }
    }

    fn of_head(address: &Address) -> Option<Self> {
        let id = address.d.strip_prefix(HEAD_PREFIX)?;
        Some(ChatKey { owner: address.pubkey, id: id.to_owned() })
    }
}

/// All chats of a person.
#[derive(Clone, Debug, Default)]
pub struct Chats {
    /// What the fields of each head amount to, over all versions seen.
    heads: BTreeMap<ChatKey, Fields>,
    /// The version of each head that the relays keep.
    newest: Slots<Fields>,
    messages: Slots<Message>,
    by_chat: BTreeMap<ChatKey, BTreeSet<Address>>,
    deletions: Deletions,
}

impl Chats {
    /// Takes a head; its latest stamp. A version that is deleted or older still counts for the clock.
    ///
    /// # Errors
    /// What is wrong with the event, judged from the event alone.
    pub fn take_head(&mut self, event: &Event, cipher: &dyn Cipher) -> Result<Hlc, &'static str> {
        let address = Address::of(event).filter(|address| address.kind == CHAT).ok_or("a head is of kind 30001")?;
        let chat = ChatKey::of_head(&address).ok_or("the d tag of a head starts with oa:c:")?;
        let plain =
            cipher::open(cipher, &event.pubkey, &event.tags, &event.content).ok_or("not sealed for this key")?;
        let fields = read_fields(&plain)?;
        if !fields.are_valid_in(event.created_at) {
            return Err("a stamp lies after the event's created_at");
        }
        let latest = fields.latest();
        self.newest.put(address.clone(), Version::of(event), fields.clone(), &self.deletions);
        self.heads.entry(chat.clone()).or_default().merge(&fields);
        self.forget_deleted_fields(&chat, &address);
        Ok(latest)
    }

    /// Takes a message; its stamp.
    ///
    /// # Errors
    /// What is wrong with the event, judged from the event alone.
    pub fn take_message(&mut self, event: &Event, cipher: &dyn Cipher) -> Result<Hlc, &'static str> {
        let (address, message) = message::read(event, cipher)?;
        let (stamp, chat) = (message.stamp, message.chat.clone());
        if self.messages.put(address.clone(), Version::of(event), message, &self.deletions) {
            self.by_chat.entry(chat).or_default().insert(address);
        }
        Ok(stamp)
    }

    /// Takes a deletion request. Whether it says anything new.
    pub fn take_deletion(&mut self, request: &Event) -> bool {
        let news = self.deletions.take(request);
        if news.is_empty() {
            return false;
        }
        let gone = self.messages.obey(&self.deletions, &news);
        self.forget_messages(&gone);
        self.newest.obey(&self.deletions, &news);
        if news.vanished {
            self.forget_all_deleted_fields();
        }
        for address in news.addresses.iter().filter(|address| address.kind == CHAT) {
            if let Some(chat) = ChatKey::of_head(address) {
                self.forget_deleted_fields(&chat, address);
            }
        }
        true
    }

    /// Everything, after a merge.
    fn obey_all(&mut self) {
        let gone = self.messages.obey_all(&self.deletions);
        self.forget_messages(&gone);
        self.newest.obey_all(&self.deletions);
        self.forget_all_deleted_fields();
        self.by_chat.retain(|_, addresses| {
            addresses.retain(|address| self.messages.get(address).is_some());
            !addresses.is_empty()
        });
    }

    fn forget_messages(&mut self, gone: &[(Address, Message)]) {
        for (address, message) in gone {
            let Some(addresses) = self.by_chat.get_mut(&message.chat) else { continue };
            addresses.remove(address);
            if addresses.is_empty() {
                self.by_chat.remove(&message.chat);
            }
        }
    }

    fn forget_all_deleted_fields(&mut self) {
        let chats: Vec<ChatKey> = self.heads.keys().cloned().collect();
        chats.iter().for_each(|chat| self.forget_deleted_fields(chat, &chat.head_address()));
    }

    /// A deleted head takes with it every field written until then, also those that a later version still carries:
    /// its writer did not know of the deletion.
    fn forget_deleted_fields(&mut self, chat: &ChatKey, address: &Address) {
        let Some(fields) = self.heads.get_mut(chat) else { return };
        if let Some(until) = self.deletions.until(address) {
            fields.drop_until(until);
        }
        if fields.is_empty() {
            self.heads.remove(chat);
        }
    }

    /// Takes everything of another state, made from other events.
    pub fn merge(&mut self, other: Chats) {
        self.deletions.merge(other.deletions);
        self.newest.merge(other.newest, &self.deletions);
        self.messages.merge(other.messages, &self.deletions);
        for (chat, fields) in other.heads {
            self.heads.entry(chat).or_default().merge(&fields);
        }
        for (chat, addresses) in other.by_chat {
            self.by_chat.entry(chat).or_default().extend(addresses);
        }
        self.obey_all();
    }

    /// What a head amounts to; none if there is no such chat or it was deleted.
    pub fn head(&self, chat: &ChatKey) -> Option<&Fields> {
        self.heads.get(chat)
    }

    /// The messages of a chat in no particular order, whoever wrote them.
    pub fn messages_of(&self, chat: &ChatKey) -> impl Iterator<Item = &Message> {
        let addresses = self.by_chat.get(chat).into_iter().flatten();
        // An address may have moved to another chat of the same id, by another owner.
        addresses.filter_map(|address| self.messages.get(address)).filter(move |message| message.chat == *chat)
    }

    /// The version of a message that the relays keep.
    pub fn message_version(&self, address: &Address) -> Option<Version> {
        self.messages.version(address)
    }

    /// Whether there is, or was before it was deleted, anything at an own address.
    pub fn knows(&self, address: &Address) -> bool {
        let held = self.messages.version(address).or_else(|| self.newest.version(address));
        held.is_some() || self.deletions.until(address).is_some()
    }

    /// The version of a head that the relays keep.
    pub fn head_version(&self, chat: &ChatKey) -> Option<Version> {
        self.newest.version(&chat.head_address())
    }

    /// All chats there is anything of: a head, or messages whose head has not come yet.
    pub fn keys(&self) -> BTreeSet<&ChatKey> {
        self.heads.keys().chain(self.by_chat.keys()).collect()
    }

    /// Own heads of which the winning version says less than is known, and what it leaves out: to be said again. What
    /// waiting drafts say again already is left out too.
    pub fn heads_due(&self, me: &PublicKey, drafts: &[&Draft]) -> Vec<(String, Fields)> {
        let own = self.heads.iter().filter(|(chat, _)| chat.owner == *me);
        let due = own.filter(|(chat, fields)| !self.says_all(chat, fields)).filter_map(|(chat, fields)| {
            let said = self.said(chat).unwrap_or_default();
            let waits = |name: &str, field: &Field| {
                drafts.iter().any(|draft| match &draft.op {
                    Op::Head { chat: id, known, .. } => *id == chat.id && known.field(name) == Some(field),
                    _ => false,
                })
            };
            let left_out = fields.iter().filter(|(name, field)| said.field(name) != Some(field) && !waits(name, field));
            let left_out: Fields = left_out.map(|(name, field)| (name.to_owned(), field.clone())).collect();
            (!left_out.is_empty()).then(|| (chat.id.clone(), left_out))
        });
        due.collect()
    }

    fn says_all(&self, chat: &ChatKey, fields: &Fields) -> bool {
        self.said(chat).is_some_and(|said| said == *fields)
    }

    /// What the version of a head says that relays keep, without what was deleted.
    fn said(&self, chat: &ChatKey) -> Option<Fields> {
        let address = chat.head_address();
        let mut said = self.newest.get(&address).cloned()?;
        if let Some(until) = self.deletions.until(&address) {
            said.drop_until(until);
        }
        Some(said)
    }

    /// The head that says what is known and what these drafts add; nothing if the winning version says it already.
    ///
    /// # Errors
    /// See [`SealError`].
    pub fn build_head(
        &self,
        chat: &ChatKey,
        drafts: &[&Draft],
        cipher: &dyn Cipher,
    ) -> Result<Option<Unsigned>, SealError> {
        let mut fields = with_drafts(self.head(chat).cloned().unwrap_or_default(), drafts);
        if let Some(until) = self.deletions.until(&chat.head_address()) {
            fields.drop_until(until);
        }
        if fields.is_empty() || self.says_all(chat, &fields) {
            return Ok(None);
        }
        let beyond = self.head_version(chat).map_or(0, |version| version.created_at.saturating_add(1));
        let plain = write_fields(&fields);
        let sealed = cipher::seal_for(cipher, &shared_with(&fields), &plain)?;
        let mut tags = vec![tag(["d", &chat.head_address().d])];
        tags.extend(Schema::ChatHead.tags());
        tags.extend(sealed.tags);
        let created_at = fields.latest().second().max(beyond);
        Ok(Some(Unsigned { kind: CHAT, created_at, tags, content: sealed.content }))
    }
}

/// Fields with what drafts of heads or settings write, each at its own stamp.
pub(super) fn with_drafts(mut fields: Fields, drafts: &[&Draft]) -> Fields {
    for draft in drafts {
        let (Op::Head { fields: changes, .. } | Op::Settings { fields: changes, .. }) = &draft.op else { continue };
        if let Op::Head { known, .. } = &draft.op {
            fields.merge(known);
        }
        for (name, value) in changes {
            fields.set(name, Field(value.clone(), draft.written.stamp));
        }
    }
    fields
}

/// The public keys that a head is shared with.
pub fn shared_with(head: &Fields) -> Vec<PublicKey> {
    let keys = head.get(SHARE).and_then(Value::as_array).into_iter().flatten();
    keys.filter_map(|key| PublicKey::from_hex(key.as_str()?)).collect()
}

/// `{"v":1,"title":[value,stamp],…}`. What is no field is passed over: a later version may add other things.
fn read_fields(plain: &str) -> Result<Fields, &'static str> {
    let mut body: Map<String, Value> = serde_json::from_str(plain).map_err(|_| "the content is not that of a head")?;
    if body.remove("v") != Some(Value::from(1)) {
        return Err("a version of heads that is not known here");
    }
    Ok(body.into_iter().filter_map(|(name, value)| Some((name, serde_json::from_value(value).ok()?))).collect())
}

fn write_fields(fields: &Fields) -> String {
    let Ok(Value::Object(fields)) = serde_json::to_value(fields) else {
        unreachable!("fields are a map with string keys")
    };
    let mut body = Map::new();
    body.insert("v".to_owned(), Value::from(1));
    body.extend(fields);
    Value::Object(body).to_string()
}
