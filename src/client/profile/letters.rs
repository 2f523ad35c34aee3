//! What a person can do about the outbox: see what waits, try what was refused again, take it out, export it all.

use std::collections::BTreeSet;
use std::io::{self, Write};

use serde_json::{Value, json};

use super::Profile;
use crate::protocol::Filter;
use crate::store::StoreError;
use crate::sync::outbox::{Change, Content, Debt, Entry, RelayUrl, Seq};

/// Something that a relay refused for good.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeadLetter {
    /// Its number in the outbox.
    pub seq: u64,
    /// The relay.
    pub relay: String,
    /// What the relay said.
    pub reason: String,
    /// The event's id, once it is signed.
    pub id: Option<String>,
}

/// What an export wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Signed events, cached and owed.
    pub events: u64,
    /// Drafts, which are no events yet.
    pub drafts: u64,
}

impl Profile {
    /// What relays refused for good.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        let state = self.state();
        let rules = state.outbox.rules();
        let letter = |(seq, relay, reason): (Seq, &RelayUrl, &str)| DeadLetter {
            seq: seq.0,
            relay: relay.to_string(),
            reason: reason.to_owned(),
            id: rules.entry(seq).and_then(|entry| entry.id).map(|id| id.to_hex()),
        };
        rules.dead_letters().map(letter).collect()
    }

    /// Tries dead letters again: those of one number, or all, and then also whatever a relay refused that lacked it. How
    /// many letters there were.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn revive(&self, seq: Option<Seq>) -> Result<usize, StoreError> {
        let mut state = self.state();
        let letters = state.outbox.rules().dead_letters().filter(|(dead, _, _)| seq.is_none_or(|seq| seq == *dead));
        let letters: Vec<(Seq, RelayUrl)> = letters.map(|(seq, relay, _)| (seq, relay.clone())).collect();
        let rules = state.outbox.rules_mut();
        let changes: Vec<Change> = letters.iter().filter_map(|(seq, relay)| rules.revive(*seq, relay)).collect();
        let count = changes.len();
        state.outbox.record(changes, true)?;
        if seq.is_none() {
            state.unwanted.forget_refusals()?;
        }
        self.tell_owed(&state);
        Ok(count)
    }

    /// Takes an entry out of the outbox, as a person decides who has seen why it is refused. False if there is none.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn discard(&self, seq: Seq) -> Result<bool, StoreError> {
        let mut state = self.state();
        let change = state.outbox.rules_mut().withdraw(seq);
        let found = change.is_some();
        state.outbox.record(change.into_iter().collect(), true)?;
        self.refresh(&state);
        Ok(found)
    }

    /// Every entry of the outbox, oldest first: its number, the event or draft, and where it stands with each relay.
    pub fn outbox_entries(&self) -> Vec<Value> {
        let state = self.state();
        state.outbox.rules().entries().map(|(seq, entry)| shown(seq, entry)).collect()
    }

    /// Every relay that is owed something, whether it is named in the settings or not.
    pub fn owed_relays(&self) -> Vec<RelayUrl> {
        let state = self.state();
        let debts = state.outbox.rules().entries().flat_map(|(_, entry)| &entry.debts);
        let owed: BTreeSet<&RelayUrl> =
            debts.filter(|(_, debt)| **debt == Debt::Owed).map(|(relay, _)| relay).collect();
        owed.into_iter().cloned().collect()
    }

    /// Writes everything that is here, a JSON object a line: every event of the cache, which has every signed one of the
    /// outbox too, then each draft as `{"draft":…,"relays":[…]}`. What is exported stays owed as before.
    ///
    /// # Errors
    /// When the cache cannot be read, or the writer refuses.
    pub fn export(&self, out: &mut dyn Write) -> io::Result<Exported> {
        let mut exported = Exported::default();
        let mut written: io::Result<()> = Ok(());
        let read = self.cache.for_each(&[Filter::default()], 0, |row| {
            if written.is_ok() {
                written = out.write_all(&row.json).and_then(|()| out.write_all(b"\n"));
                exported.events += 1;
            }
        });
        written?;
        read.map_err(io::Error::other)?;
        let drafts: Vec<Value> = {
            let state = self.state();
            let entries = state.outbox.rules().entries();
            entries.filter(|(_, entry)| entry.id.is_none()).map(|(_, entry)| draft_line(entry)).collect()
        };
        for line in drafts {
            writeln!(out, "{line}")?;
            exported.drafts += 1;
        }
        out.flush()?;
        Ok(exported)
    }
}

fn content_of(entry: &Entry) -> Value {
    match &entry.content {
        Content::Event(json) => serde_json::from_str(json).unwrap_or_default(),
        Content::Draft(draft) => serde_json::to_value(draft).unwrap_or_default(),
    }
}

fn draft_line(entry: &Entry) -> Value {
    let relays: Vec<&str> = entry.debts.keys().map(RelayUrl::as_str).collect();
    json!({"draft": content_of(entry), "relays": relays})
}

fn shown(seq: Seq, entry: &Entry) -> Value {
    let kind = if entry.id.is_some() { "event" } else { "draft" };
    let stand = |debt: &Debt| match debt {
        Debt::Owed => json!("owed"),
        Debt::Paid(how) => serde_json::to_value(how).unwrap_or_default(),
        Debt::Dead(reason) => json!({"refused": reason}),
    };
    let relays: serde_json::Map<String, Value> =
        entry.debts.iter().map(|(relay, debt)| (relay.to_string(), stand(debt))).collect();
    json!({"seq": seq.0, kind: content_of(entry), "relays": relays})
}
