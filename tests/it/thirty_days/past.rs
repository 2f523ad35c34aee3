//! The events that all sides have from the time before: chats with their messages, settings, training data, notes.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sledge::protocol::{Event, Verified};
use sledge::sync::Collections;
use sledge::sync::chat::{ChatKey, MessageDraft};
use sledge::sync::clock::{Clock, Device};
use sledge::sync::draft::{Draft, Op, Plain, SettingsForm};
use sledge::sync::nip44::Nip44;
use sledge::sync::shape::tag;
use sledge::sync::training::{Terms, TrainingOp};

use super::facts::Fact;
use super::text;
use crate::simulation::chance::Chance;
use crate::support::Keys;

/// Messages of one chat; an app begins another one sooner or later.
const MESSAGES_A_CHAT: usize = 200;
/// Of so many events, one is a text given for training and one a public note.
const OTHER_EVERY: usize = 100;
const SETTINGS: usize = 20;
/// When the notes expire, counted from the last event.
const EXPIRING_AFTER_MS: u64 = 90 * 86_400_000;
/// Between two writes.
const PACE_MS: u64 = 60_000;

/// The id of a chat of the past, by its number.
fn chat_id(number: usize) -> String {
    format!("past-{number:04}")
}

/// Signs what is written, at its date.
struct Desk<'k> {
    keys: &'k Keys,
    cipher: Nip44,
    empty: Collections,
    clock: Clock,
    now_ms: u64,
    events: Vec<Event>,
    facts: Vec<Fact>,
}

impl Desk<'_> {
    fn say(&mut self, op: Op, fact: impl FnOnce(u64) -> Fact) {
        let draft = Draft { written: self.clock.write(self.now_ms), op };
        let built = self.empty.build(&[&draft], self.clock.device(), &self.cipher).expect("it fits");
        let unsigned = built.expect("there is something to say");
        self.events.push(unsigned.sign(self.keys.pubkey(), |id| self.keys.sign_id(id)));
        self.facts.push(fact(self.now_ms));
        self.now_ms += PACE_MS;
    }
}

/// So many events, the last of them before `until_ms`, and what they say.
pub fn past(secret: [u8; 32], count: usize, until_ms: u64, chance: &mut Chance) -> (Vec<Event>, Vec<Fact>) {
    let keys = Keys::of_secret(secret);
    let nonces = std::sync::atomic::AtomicU64::new(1);
    let nonce = move || {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&nonces.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_be_bytes());
        bytes
    };
    let mut desk = Desk {
        cipher: Nip44::new(&secret, nonce).expect("a valid key"),
        empty: Collections::new(keys.pubkey()),
        clock: Clock::new(Device(7)),
        now_ms: until_ms - PACE_MS * (count as u64 + 1),
        keys: &keys,
        events: Vec::new(),
        facts: Vec::new(),
    };
    let mut parents = Vec::new();
    for number in 0..count - 1 {
        let (chat, message) = (chat_id(number / MESSAGES_A_CHAT), format!("m{number}"));
        let text = text(chance, &format!("past {number}"));
        match number {
            _ if number.is_multiple_of(MESSAGES_A_CHAT) => {
                parents.clear();
                let fields = BTreeMap::from([("title".to_owned(), Value::from(text.as_str()))]);
                let head = Op::Head { chat: chat.clone(), fields, known: Default::default() };
                desk.say(head, |at_ms| Fact::title(&chat, at_ms, Some(&text)));
            }
            _ if number % OTHER_EVERY == 1 => {
                let terms = Terms { quality: None, license: "CC0-1.0".to_owned(), curators: Vec::new() };
                let op = Op::Training(TrainingOp::Contribute { content: text.clone(), terms });
                desk.say(op, |at_ms| Fact::training(&text, at_ms));
            }
            _ if number % OTHER_EVERY == 2 => {
                // Not yet, unless one believes a clock that is a year ahead.
                let expires = ((until_ms + EXPIRING_AFTER_MS) / 1000).to_string();
                let note = Plain { kind: 1, tags: vec![tag(["expiration", &expires])], content: text.clone() };
                desk.say(Op::Plain(note), |at_ms| Fact::note(&text, at_ms));
            }
            _ => {
                let owner = keys.pubkey();
                let draft = MessageDraft {
                    chat: ChatKey { owner, id: chat.clone() },
                    id: message.clone(),
                    role: "user".to_owned(),
                    content: text.clone(),
                    first: None,
                    parents: std::mem::replace(&mut parents, vec![message.clone()]),
                    meta: Value::Null,
                    readers: Vec::new(),
                    after: None,
                };
                desk.say(Op::Message(draft), |at_ms| Fact::message(&chat, &message, at_ms, Some(&text)));
            }
        }
    }
    // One event says all settings.
    let fields: BTreeMap<String, Value> = (0..SETTINGS).map(|n| (format!("s{n}"), json!("at first"))).collect();
    let at_ms = desk.now_ms;
    let facts: Vec<Fact> = fields.keys().map(|name| Fact::setting(name, at_ms, "at first")).collect();
    desk.say(Op::Settings { form: SettingsForm::Slot, fields }, |at_ms| Fact::setting("s0", at_ms, "at first"));
    desk.facts.extend(facts);
    (desk.events, desk.facts)
}

/// As a device takes them.
pub fn verified(events: Vec<Event>) -> Vec<Verified<Event>> {
    events.into_iter().map(|event| Verified::check(event).expect("a good signature")).collect()
}
