//! The book of a run: what the app wrote, having seen what; which event told it; what every device made of each event.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use sledge::protocol::supersede::Address;
use sledge::protocol::{EventId, Verified};
use sledge::sync::Absorbed;
use sledge::sync::chat::{ChatKey, message};
use sledge::sync::clock::Hlc;
use sledge::sync::draft::{Draft, Op};
use sledge::sync::outbox::Seq;
use sledge::sync::settings::Settings;
use sledge::sync::training::{Consent, Terms};

use super::chance::Chance;
use super::device::{SimDevice, person};

const CHATS: [&str; 2] = ["c1", "c:2"];
const SETTINGS: [&str; 3] = ["theme", "model.name", "size"];
const HEAD_FIELDS: [&str; 2] = ["title", "archived"];

/// What a write is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    Setting(&'static str),
    Head(&'static str, &'static str),
    Message(&'static str, String),
    Contribution(String),
}

/// What a write does to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    Set,
    Remove,
}

/// One write of the app.
#[derive(Clone, Debug)]
pub struct Write {
    pub device: usize,
    pub true_ms: u64,
    pub target: Target,
    pub does: Does,
    /// The write whose value the app showed when this one was made.
    pub seen: Option<usize>,
    /// Its final date, and the event that told it.
    pub told: Option<(Hlc, EventId)>,
}

/// Everything that a run is judged by.
#[derive(Default)]
pub struct Book {
    pub writes: Vec<Write>,
    /// Every event that was ever signed, in that order.
    pub events: Vec<sledge::protocol::Verified<sledge::protocol::Event>>,
    /// What devices made of each event: one thing, if validity is a function of the event alone.
    pub judgements: BTreeMap<EventId, Vec<Absorbed>>,
    /// Events by the entry that they told.
    pub told: BTreeMap<(usize, Seq), BTreeSet<EventId>>,
    /// Relays that an event was sent to, as an answer to a debt.
    pub sent: BTreeMap<EventId, BTreeSet<usize>>,
}

/// The value that a write sets: its own number.
pub fn value(write: usize) -> String {
    format!("w{write}")
}

/// The write that a value is of.
pub fn write_of(value: &str) -> Option<usize> {
    value.strip_prefix('w')?.parse().ok()
}

pub fn chat_key(chat: &str) -> ChatKey {
    ChatKey { owner: person().pubkey(), id: chat.to_owned() }
}

impl Target {
    /// The address of its message.
    pub fn address(&self) -> Option<Address> {
        match self {
            Target::Message(chat, id) => Some(message::address(person().pubkey(), chat, id)),
            Target::Head(chat, _) => Some(chat_key(chat).head_address()),
            _ => None,
        }
    }
}

impl Book {
    /// The app on a device writes something.
    pub fn write(&mut self, device: &mut SimDevice, number: usize, true_ms: u64, chance: &mut Chance) {
        let memory = device.memory.as_ref().expect("it runs");
        let drafts: Vec<Draft> = memory.outbox.drafts().map(|(_, draft)| draft.clone()).collect();
        let next = self.writes.len();
        let Some((target, does, seen, ops)) = choose(&memory.state, &drafts, next, chance) else { return };
        self.writes.push(Write { device: number, true_ms, target, does, seen, told: None });
        device.write(ops, true_ms, Some(next));
    }

    pub fn signed(
        &mut self,
        event: &Verified<sledge::protocol::Event>,
        _device: usize,
        entries: impl Iterator<Item = (Option<usize>, Hlc)>,
    ) {
        self.events.push(event.clone());
        for (write, stamp) in entries {
            if let Some(write) = write {
                self.writes[write].told = Some((stamp, event.id));
            }
        }
    }

    pub fn sent(&mut self, event: &Verified<sledge::protocol::Event>, device: usize, relay: usize, entry: Option<Seq>) {
        self.sent.entry(event.id).or_default().insert(relay);
        if let Some(seq) = entry {
            self.told.entry((device, seq)).or_default().insert(event.id);
        }
    }

    pub fn judged(&mut self, event: &Verified<sledge::protocol::Event>, absorbed: Absorbed) {
        let judgements = self.judgements.entry(event.id).or_default();
        if !judgements.contains(&absorbed) {
            judgements.push(absorbed);
        }
    }
}

type Choice = (Target, Does, Option<usize>, Vec<Op>);

/// Something to write, and what of its target is seen.
fn choose(state: &sledge::sync::Collections, drafts: &[Draft], next: usize, chance: &mut Chance) -> Option<Choice> {
    let view = state.chat_view(drafts);
    let chat = CHATS[chance.below(CHATS.len())];
    let key = chat_key(chat);
    let mine = || view.messages(&key);
    match chance.below(20) {
        0..5 => {
            let name = SETTINGS[chance.below(SETTINGS.len())];
            let (does, new) =
                if chance.percent(15) { (Does::Remove, Value::Null) } else { (Does::Set, value(next).into()) };
            let seen = state.settings.view(drafts).get(name).and_then(Value::as_str).and_then(write_of);
            Some((Target::Setting(name), does, seen, Settings::set(name, &new, false).ok()?.to_vec()))
        }
        5..8 => {
            let field = HEAD_FIELDS[chance.below(HEAD_FIELDS.len())];
            let seen = view.head(&key).fields.get(field).and_then(Value::as_str).and_then(write_of);
            let op = view.set_field(chat, field, value(next).into());
            Some((Target::Head(chat, field), Does::Set, seen, vec![op]))
        }
        8..14 => {
            let id = format!("m{next}");
            let op = view.send(&key, &id, "user", &value(next), Value::Null).ok()?;
            Some((Target::Message(chat, id), Does::Set, None, vec![op]))
        }
        14..17 => {
            let message = chance.pick(&mine())?.message.clone();
            let op = view.edit(&key, &message.id, &value(next)).ok()?;
            Some((Target::Message(chat, message.id), Does::Set, write_of(&message.content), vec![op]))
        }
        17..19 => {
            let message = chance.pick(&mine())?.message.clone();
            let op = view.delete(&key, &message.id).ok()?;
            Some((Target::Message(chat, message.id), Does::Remove, write_of(&message.content), vec![op]))
        }
        _ => {
            let terms = Terms { quality: None, license: "CC0-1.0".to_owned(), curators: Vec::new() };
            let text = value(next);
            let op = state.training.contribute(&state.me(), &text, terms, Consent::to(&text), drafts).ok()?;
            Some((Target::Contribution(text), Does::Set, None, vec![op]))
        }
    }
}
