//! The page of shapes says what the crate writes: same kinds, tags and content keys, example by example.

use serde_json::{Value, json};
use sledge::protocol::{Event, EventId, PublicKey};
use sledge::sync::Collections;
use sledge::sync::chat::ChatKey;
use sledge::sync::cipher::open;
use sledge::sync::clock::{Clock, Device, Hlc};
use sledge::sync::draft::{Draft, Op, SettingsForm};
use sledge::sync::nip44::Nip44;
use sledge::sync::shape::{Schema, Unsigned};
use sledge::sync::training::{Quality, Status, Terms, TrainingOp};

use crate::support::{Keys, NOW, verified};

const PAGE: &str = include_str!("../../src/sync/shapes.md");
const SECRET: [u8; 32] = [33; 32];

/// The examples of whole events, in the order of the page.
fn examples() -> Vec<Value> {
    let blocks = PAGE.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.filter_map(|block| serde_json::from_str::<Value>(block).ok()).filter(|event| event.is_object()).collect()
}

/// Tag names, and the values that do not depend on who writes what.
fn outline(tags: &Value) -> Vec<String> {
    let fixed = |tag: &Value| match tag[0].as_str().unwrap() {
        name @ ("L" | "l" | "-" | "t" | "k") => format!("{name} {} {}", tag[1], tag[2]),
        name => name.to_owned(),
    };
    tags.as_array().unwrap().iter().map(fixed).collect()
}

fn keys(value: &Value) -> Vec<&String> {
    value.as_object().map(|object| object.keys().collect()).unwrap_or_default()
}

struct Writer {
    keys: Keys,
    cipher: Nip44,
    clock: Clock,
    state: Collections,
}

impl Writer {
    fn new() -> Writer {
        let keys = Keys::of_secret(SECRET);
        let cipher = Nip44::new(&SECRET, || [9; 32]).unwrap();
        Writer { cipher, clock: Clock::new(Device(255)), state: Collections::new(keys.pubkey()), keys }
    }

    fn draft(&mut self, op: Op) -> Draft {
        Draft { written: self.clock.write(NOW * 1000), op }
    }

    fn event(&self, drafts: &[&Draft]) -> Event {
        let unsigned: Unsigned = self.state.build(drafts, self.clock.device(), &self.cipher).unwrap().unwrap();
        unsigned.sign(self.keys.pubkey(), |id| self.keys.sign_id(id))
    }

    fn say(&mut self, op: Op) -> Event {
        let draft = self.draft(op);
        let event = self.event(&[&draft]);
        self.state.absorb(&verified(&event), &self.cipher, &mut self.clock);
        event
    }
}

/// What the crate writes for each example, in the order of the page.
fn written(writer: &mut Writer) -> Vec<Event> {
    let me = writer.keys.pubkey();
    let chat = ChatKey { owner: me, id: "c".to_owned() };
    let view = |writer: &Writer, op: &dyn Fn(&sledge::sync::chat::ChatView) -> Op| op(&writer.state.chat_view([]));
    let mut fields = Vec::new();
    for (name, value) in
        [("title", json!("x")), ("archived", json!(false)), ("share", json!([])), ("trainingOptIn", json!(false))]
    {
        let op = view(writer, &|view| view.set_field("c", name, value.clone()));
        fields.push(writer.draft(op));
    }
    let head = writer.event(&fields.iter().collect::<Vec<_>>());
    let first = view(writer, &|view| view.send(&chat, "m1", "user", "x", json!({"model": "x"})).unwrap());
    let message = writer.say(first);
    let deletion = view(writer, &|view| view.delete(&chat, "m1").unwrap());
    let deletion = writer.say(deletion);
    let set = |form, value: Value| Op::Settings { form, fields: [("theme".to_owned(), value)].into() };
    writer.say(set(SettingsForm::Slot, json!("light")));
    let slot = writer.say(set(SettingsForm::Slot, json!("dark")));
    let document = writer.say(set(SettingsForm::Document, json!("dim")));
    let (target, author) = (EventId([1; 32]), PublicKey([2; 32]));
    let quality = Quality::new(85).unwrap();
    let terms = Terms { quality: Some(quality), license: "CC-BY-4.0".to_owned(), curators: vec![me] };
    let mut all = vec![head, message, deletion, slot, document];
    for op in [
        TrainingOp::Contribute { content: "The text.".to_owned(), terms },
        TrainingOp::Rate { target, author, quality, after: None },
        TrainingOp::Mark { target, author, status: Status::Approved },
        TrainingOp::Aggregate { target, author, rank: quality, ratings: 3, after: None },
    ] {
        all.push(writer.say(Op::Training(op)));
    }
    all
}

/// Kinds, tags in their order, and the keys of what is encrypted.
#[test]
fn the_page_shows_what_is_written() {
    let mut writer = Writer::new();
    let (examples, written) = (examples(), written(&mut writer));
    assert_eq!(examples.len(), written.len());
    for (example, event) in examples.iter().zip(&written) {
        let tags: Vec<Vec<&str>> = event.tags.iter().map(|tag| tag.items().collect()).collect();
        assert_eq!(example["kind"], event.kind.0);
        assert_eq!(outline(&example["tags"]), outline(&json!(tags)), "kind {}", event.kind);
        if example["content"].is_object() {
            let plain = open(&writer.cipher, &event.pubkey, &event.tags, &event.content).unwrap();
            let body: Value = serde_json::from_str(&plain).unwrap();
            assert_eq!(keys(&example["content"]), keys(&body), "kind {}", event.kind);
        } else {
            assert!(!event.content.starts_with("Ag"), "kind {} is in the clear", event.kind);
        }
        assert!(Schema::of(event).is_some() && event.is_protected(), "kind {}", event.kind);
    }
}

/// The stamps of the page are stamps, at the time of its events.
#[test]
fn the_stamps_of_the_page_are_stamps() {
    let stamps: Vec<Hlc> = PAGE
        .split('"')
        .filter(|text| text.starts_with("018bcfe56800-"))
        .map(|text| text.parse().expect("a stamp"))
        .collect();
    assert!(stamps.len() > 6, "the search finds them");
    assert!(stamps.iter().all(|stamp| stamp.is_valid_in(1_700_000_000)));
}
