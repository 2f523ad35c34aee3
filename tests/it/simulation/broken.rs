//! What a writer does that does not keep a rule: for the negative controls.

use serde_json::{Map, Value, json};
use sledge::protocol::{Event, Verified};
use sledge::sync::Collections;
use sledge::sync::cipher::Cipher;
use sledge::sync::draft::{Draft, Op};
use sledge::sync::nip44::Nip44;
use sledge::sync::shape::{SETTINGS, Schema, Unsigned, tag};

/// Settings that name the heads and say only what was just written.
pub fn amnesia(mut unsigned: Unsigned, drafts: &[&Draft], cipher: &Nip44) -> Unsigned {
    match &drafts[0].op {
        // A merge is left as it is: what nobody knows any more it cannot bring back.
        Op::Settings { fields, .. } if !fields.is_empty() => {}
        _ => return unsigned,
    }
    let plain = cipher.open(&cipher.pubkey(), &unsigned.content).expect("just sealed");
    let mut body: Value = serde_json::from_str(&plain).expect("just written");
    let fields = body["f"].as_object_mut().expect("fields");
    let written = |name: &str| {
        drafts.iter().any(|draft| matches!(&draft.op, Op::Settings { fields, .. } if fields.contains_key(name)))
    };
    fields.retain(|name, _| written(name));
    unsigned.content = cipher.seal(&cipher.pubkey(), &body.to_string()).expect("short");
    unsigned
}

/// Settings that say nothing new.
pub fn say_again(state: &Collections, drafts: &[&Draft], cipher: &Nip44) -> Option<Unsigned> {
    let Op::Settings { fields, .. } = &drafts[0].op else { return None };
    if !fields.is_empty() {
        return None;
    }
    let fields = serde_json::to_value(state.settings.fields()).expect("fields");
    let body = json!({"v": 1, "dev": "x", "f": fields}).to_string();
    let mut tags = vec![tag(["d", "settings"])];
    tags.extend(state.settings.heads().map(|id| tag(["prev", &id.to_hex()])));
    tags.extend(Schema::Settings.tags());
    let created_at = state.settings.fields().latest().second();
    Some(Unsigned { kind: SETTINGS, created_at, tags, content: cipher.seal(&cipher.pubkey(), &body).ok()? })
}

/// A state that takes whatever comes last.
#[derive(Clone, Default)]
pub struct LastArrival(Map<String, Value>);

impl LastArrival {
    pub fn absorb(&mut self, event: &Verified<Event>, cipher: &Nip44) {
        let Some(d) = event.tags.find("d").and_then(|tag| tag.value()) else { return };
        let Some(plain) = cipher.open(&event.pubkey, &event.content) else { return };
        self.0.insert(d.to_owned(), Value::from(plain));
    }

    pub fn merge(&mut self, other: LastArrival) {
        self.0.extend(other.0);
    }

    pub fn digest(&self) -> String {
        Value::from(self.0.clone()).to_string()
    }
}
