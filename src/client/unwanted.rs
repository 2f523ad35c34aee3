//! What need not be moved between this device and a relay, since the one or the other does not want it: remembered from
//! link to link and over restarts, so that a difference that can never close does not come again at every catch-up.
//!
//! In: what relays answered to events, and what became here of events that they gave. Out: whether an event is offered or
//! fetched. A journal of its own beside the outbox's; losing it costs one more attempt for each event, so it is written
//! without waiting for the disk, and kept short by forgetting.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::journal::Journal;
use crate::protocol::EventId;
use crate::store::StoreError;
use crate::sync::outbox::{Consequence, RelayUrl, Settlement, answer};

/// Events remembered for one relay, some 60 bytes each in memory. One that has so many is forgotten and asked anew.
const UNWANTED_MAX: usize = 50_000;
/// After this time an event that a relay refused by its policy is offered again, seconds: a policy may change.
const REFUSED_SECS: u64 = 86_400;
/// Records of the journal beyond which it is written anew at the start.
const RECORDS_MAX: usize = 1_000;

/// Why an event need not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The relay has something newer, or knows that it was deleted: it knows better than this device.
    Overtaken,
    /// The relay's policy is against it, for now.
    Refused,
    /// The relay has it, and it was overtaken or deleted here, or is not what it claims to be.
    NotHere,
}

impl Why {
    /// What a relay's answer to an event says about offering it again; nothing when the relay has it, or may take it
    /// later.
    pub fn of(accepted: bool, text: &str) -> Option<Why> {
        match answer::judge(accepted, text) {
            Consequence::Settle(Settlement::Superseded | Settlement::Deleted) => Some(Why::Overtaken),
            Consequence::Bury => Some(Why::Refused),
            _ => None,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    relay: RelayUrl,
    why: Why,
    /// Seconds since 1970.
    at: u64,
    ids: Vec<EventId>,
}

/// What is remembered of all relays.
#[derive(Debug)]
pub struct Unwanted {
    relays: HashMap<RelayUrl, HashMap<EventId, (Why, u64)>>,
    journal: Journal,
}

impl Unwanted {
    /// Reads what former runs remembered.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open(path: &Path, now_secs: u64) -> Result<Unwanted, StoreError> {
        let opened = Journal::open::<Record>(path)?;
        let mut unwanted = Unwanted { relays: HashMap::new(), journal: opened.journal };
        opened.records.iter().for_each(|record| unwanted.apply(record));
        if opened.records.len() > RECORDS_MAX {
            unwanted.relays.values_mut().for_each(|ids| ids.retain(|_, (why, at)| is_in_force(*why, *at, now_secs)));
            unwanted.shorten()?;
        }
        Ok(unwanted)
    }

    /// Remembers that these need not be moved.
    ///
    /// # Errors
    /// When the disk refuses; it is remembered until the next start all the same.
    pub fn note(&mut self, relay: &RelayUrl, why: Why, ids: Vec<EventId>, now_secs: u64) -> Result<(), StoreError> {
        let new: Vec<EventId> = ids.into_iter().filter(|id| self.why(relay, id, now_secs) != Some(why)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let record = Record { relay: relay.clone(), why, at: now_secs, ids: new };
        self.apply(&record);
        self.journal.append(&[record], false)
    }

    /// Why this event need not be moved, if so.
    pub fn why(&self, relay: &RelayUrl, id: &EventId, now_secs: u64) -> Option<Why> {
        let (why, at) = *self.relays.get(relay)?.get(id)?;
        is_in_force(why, at, now_secs).then_some(why)
    }

    /// Whether anything is remembered of a relay.
    pub fn has(&self, relay: &RelayUrl) -> bool {
        self.relays.get(relay).is_some_and(|ids| !ids.is_empty())
    }

    /// A relay shows events that it was said not to want: what was remembered was wrong, or is so by now.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn forget(&mut self, relay: &RelayUrl, ids: &[EventId]) -> Result<(), StoreError> {
        let Some(known) = self.relays.get_mut(relay) else { return Ok(()) };
        let before = known.len();
        ids.iter().for_each(|id| _ = known.remove(id));
        if known.len() == before { Ok(()) } else { self.shorten() }
    }

    /// What was refused is offered again: a person asks for it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn forget_refusals(&mut self) -> Result<(), StoreError> {
        self.relays.values_mut().for_each(|ids| ids.retain(|_, (why, _)| *why != Why::Refused));
        self.shorten()
    }

    fn apply(&mut self, record: &Record) {
        let known = self.relays.entry(record.relay.clone()).or_default();
        if known.len() + record.ids.len() > UNWANTED_MAX {
            known.clear();
        }
        let room = record.ids.iter().take(UNWANTED_MAX);
        known.extend(room.map(|id| (*id, (record.why, record.at))));
    }

    fn shorten(&mut self) -> Result<(), StoreError> {
        let mut records: Vec<Record> = Vec::new();
        for (relay, known) in &self.relays {
            let mut groups: HashMap<(&'static str, u64), (Why, Vec<EventId>)> = HashMap::new();
            for (id, (why, at)) in known {
                groups.entry((name(*why), *at)).or_insert((*why, Vec::new())).1.push(*id);
            }
            let record = |((_, at), (why, ids))| Record { relay: relay.clone(), why, at, ids };
            records.extend(groups.into_iter().map(record));
        }
        self.journal.replace(&records)
    }
}

fn name(why: Why) -> &'static str {
    match why {
        Why::Overtaken => "overtaken",
        Why::Refused => "refused",
        Why::NotHere => "not-here",
    }
}

fn is_in_force(why: Why, at: u64, now_secs: u64) -> bool {
    why != Why::Refused || now_secs.saturating_sub(at) < REFUSED_SECS
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn ids(range: std::ops::Range<u32>) -> Vec<EventId> {
        let id = |number: u32| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            EventId(bytes)
        };
        range.map(id).collect()
    }

    fn open(dir: &tempfile::TempDir) -> Unwanted {
        Unwanted::open(&dir.path().join("unwanted.journal"), NOW).unwrap()
    }

    /// Each relay's words are its own and survive a restart; what a policy refused is offered again after a day, or when
    /// a person asks for it.
    #[test]
    fn it_is_remembered_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["ws://a", "ws://b"].map(RelayUrl::new);
        let [overtaken, refused, not_here] = [ids(0..2), ids(2..3), ids(3..4)];
        let mut unwanted = open(&dir);
        for (why, ids) in [(Why::Overtaken, &overtaken), (Why::Refused, &refused), (Why::NotHere, &not_here)] {
            unwanted.note(&a, why, ids.clone(), NOW).unwrap();
        }
        for _ in 0..2 {
            drop(unwanted);
            unwanted = open(&dir);
            assert_eq!(unwanted.why(&a, &overtaken[1], NOW + 10 * REFUSED_SECS), Some(Why::Overtaken));
            assert_eq!(unwanted.why(&a, &refused[0], NOW + REFUSED_SECS - 1), Some(Why::Refused));
            assert_eq!(unwanted.why(&a, &refused[0], NOW + REFUSED_SECS), None);
            assert_eq!(unwanted.why(&a, &not_here[0], NOW), Some(Why::NotHere));
            assert!(!unwanted.has(&b));
            unwanted.shorten().unwrap();
        }
        unwanted.forget(&a, &overtaken[..1]).unwrap();
        unwanted.forget_refusals().unwrap();
        drop(unwanted);
        let unwanted = open(&dir);
        let left = |id: &EventId| unwanted.why(&a, id, NOW);
        assert_eq!([left(&overtaken[0]), left(&overtaken[1]), left(&refused[0])], [None, Some(Why::Overtaken), None]);
    }

    /// A relay that refuses without end takes no more room than the bound, and the journal is written anew.
    #[test]
    fn it_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let relay = RelayUrl::new("ws://a");
        let mut unwanted = open(&dir);
        for part in 0..1_200 {
            unwanted.note(&relay, Why::Refused, ids(part * 50..(part + 1) * 50), NOW).unwrap();
            assert!(unwanted.relays[&relay].len() <= UNWANTED_MAX);
        }
        let before = unwanted.journal.bytes();
        drop(unwanted);
        assert!(open(&dir).journal.bytes() < before / 2);
    }
}
