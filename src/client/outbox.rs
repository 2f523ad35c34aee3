//! The durable outbox: what is owed to which relay survives a crash at any point.
//!
//! In: content to publish; what the rules ([`crate::sync::outbox`]) decide about it. Out: the same rules, with each
//! change on disk before anybody acts on it. The journal holds the content itself, so that "this event, owed to these
//! relays" is one durable write; the cache gets the event afterwards, again at every start if need be.
//! Never sends, and never drops an entry that was not settled or withdrawn by a person.

use std::path::Path;

use super::journal::Journal;
use crate::protocol::Event;
use crate::store::StoreError;
use crate::sync::outbox::{Change, Content, Entry, Outbox, RelayUrl, Seq};

/// A journal is made shorter when it has grown by so much beyond twice what it says.
const SHORTEN_BYTES_MIN: u64 = 256 * 1024;
/// So many changes are read at the start without a thought.
const CHANGES_MIN: usize = 100;
/// Bytes around the content of a change: field names, relays.
const CHANGE_BYTES: u64 = 200;

/// Why something was not taken into the outbox.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// What waits takes all the room that it may.
    #[error(
        "the outbox is full: {used_bytes} of {max_bytes} bytes wait to be sent; connect to a relay, discard dead letters, \
         or raise `outbox_mb_max`"
    )]
    Full {
        /// Bytes that wait.
        used_bytes: u64,
        /// Bytes that may wait.
        max_bytes: u64,
    },
    /// There is no relay that may have it.
    #[error("no relay may have this: {0}")]
    NoRelay(&'static str),
    /// The disk did not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The rules, and their journal.
#[derive(Debug)]
pub struct DurableOutbox {
    rules: Outbox,
    journal: Journal,
    /// Changes that the rules know and the disk does not, since it refused them.
    unwritten: Vec<Change>,
    /// Bytes of the journal when it was last as short as it can be.
    shortest_bytes: u64,
    bytes_max: u64,
    /// Bytes of the journal that could not be read.
    damaged_bytes: u64,
}

impl DurableOutbox {
    /// Opens the outbox whose journal is at `path`; at most `bytes_max` bytes may wait in it.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open(path: &Path, bytes_max: u64) -> Result<DurableOutbox, StoreError> {
        let opened = Journal::open::<Change>(path)?;
        let rules = Outbox::replay(&opened.records);
        let (journal, damaged_bytes) = (opened.journal, opened.damaged_bytes);
        let shortest_bytes = journal.bytes();
        let mut outbox =
            DurableOutbox { rules, journal, unwritten: Vec::new(), shortest_bytes, bytes_max, damaged_bytes };
        if opened.records.len() > 2 * outbox.rules.entries().count() + CHANGES_MIN {
            outbox.shorten()?;
        }
        Ok(outbox)
    }

    /// The rules, to be asked.
    pub fn rules(&self) -> &Outbox {
        &self.rules
    }

    /// The rules, for what changes nothing that must be durable: links, windows, pauses, dates.
    pub fn rules_mut(&mut self) -> &mut Outbox {
        &mut self.rules
    }

    /// Bytes of the journal that could not be read at the start; a copy lies beside it.
    pub fn damaged_bytes(&self) -> u64 {
        self.damaged_bytes
    }

    /// Bytes that the outbox takes on disk.
    pub fn bytes(&self) -> u64 {
        self.journal.bytes()
    }

    /// Takes things to be published, all or none. They are owed when this returns: the app's write is made.
    ///
    /// # Errors
    /// [`OutboxError::Full`]; [`OutboxError::Store`]. Nothing was taken then.
    pub fn queue(&mut self, things: Vec<(Content, Vec<RelayUrl>)>) -> Result<Vec<Seq>, OutboxError> {
        if things.iter().any(|(_, relays)| relays.is_empty()) {
            return Err(OutboxError::NoRelay("none is named in the settings"));
        }
        self.make_room(things.iter().map(|(content, _)| size_of(content) + CHANGE_BYTES).sum())?;
        self.write_unwritten()?;
        let (seqs, changes): (Vec<Seq>, Vec<Change>) =
            things.into_iter().map(|(content, relays)| self.rules.queue(content, relays)).unzip();
        if let Err(error) = self.journal.append(&changes, true) {
            seqs.iter().for_each(|seq| drop(self.rules.withdraw(*seq)));
            return Err(error.into());
        }
        Ok(seqs)
    }

    /// Makes changes of the rules durable. With `at_once`, before anybody acts on them; without, at the latest with the
    /// next ones that are urgent.
    ///
    /// # Errors
    /// When the disk refuses. The changes are kept and written with the next ones; what depends on their being durable
    /// must not be done.
    pub fn record(&mut self, changes: Vec<Change>, at_once: bool) -> Result<(), StoreError> {
        self.unwritten.extend(changes);
        if self.unwritten.is_empty() {
            return Ok(());
        }
        self.journal.append(&self.unwritten, at_once)?;
        self.unwritten.clear();
        self.shorten_if_grown();
        Ok(())
    }

    /// Events that are owed: the cache must have them.
    pub fn events(&self) -> impl Iterator<Item = Event> {
        self.rules.entries().filter_map(|(_, entry)| event_of(entry))
    }

    fn write_unwritten(&mut self) -> Result<(), StoreError> {
        self.record(Vec::new(), true)
    }

    fn make_room(&mut self, bytes: u64) -> Result<(), OutboxError> {
        // A full outbox must not be written anew for each write that it refuses.
        let worth_it = (self.bytes_max / 16).min(SHORTEN_BYTES_MIN);
        if self.journal.bytes() + bytes > self.bytes_max && self.journal.bytes() > self.shortest_bytes + worth_it {
            self.shorten()?;
        }
        let used_bytes = self.journal.bytes();
        if used_bytes + bytes > self.bytes_max {
            return Err(OutboxError::Full { used_bytes, max_bytes: self.bytes_max });
        }
        Ok(())
    }

    fn shorten_if_grown(&mut self) {
        let grown = self.journal.bytes() > 2 * self.shortest_bytes + SHORTEN_BYTES_MIN;
        let is_empty = self.rules.entries().next().is_none() && self.journal.bytes() > SHORTEN_BYTES_MIN;
        if (grown || is_empty)
            && let Err(error) = self.shorten()
        {
            // It goes on growing; the next change tries again.
            tracing::warn!("the outbox's journal stays long: {error}");
        }
    }

    /// Writes the journal anew, without what is settled.
    fn shorten(&mut self) -> Result<(), StoreError> {
        let snapshot = self.rules.snapshot();
        self.journal.replace(&snapshot)?;
        // The snapshot has them.
        self.unwritten.clear();
        self.shortest_bytes = self.journal.bytes();
        Ok(())
    }
}

fn event_of(entry: &Entry) -> Option<Event> {
    match &entry.content {
        Content::Event(json) => Event::from_json(json).ok(),
        Content::Draft(_) => None,
    }
}

fn size_of(content: &Content) -> u64 {
    serde_json::to_vec(content).map_or(u64::MAX / 2, |json| json.len() as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::{NOW, sign};
    use crate::sync::outbox::Step;

    fn content(number: u64) -> Content {
        let event = sign(1, 1, NOW + number, &[], &"x".repeat(100));
        Content::Event(String::from_utf8(event.canonical().json.to_vec()).unwrap())
    }

    fn relays() -> Vec<RelayUrl> {
        vec![RelayUrl::new("ws://a"), RelayUrl::new("ws://b")]
    }

    fn open(dir: &Path, bytes_max: u64) -> DurableOutbox {
        DurableOutbox::open(&dir.join("outbox.journal"), bytes_max).unwrap()
    }

    fn owed(outbox: &DurableOutbox) -> Vec<u64> {
        outbox.rules().entries().map(|(seq, _)| seq.0).collect()
    }

    /// Debts survive a restart, each relay's by itself; what every relay settled is gone, and numbers are not used again.
    #[test]
    fn debts_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut outbox = open(dir.path(), 1 << 20);
        outbox.queue(vec![(content(1), relays()), (content(2), relays())]).unwrap();
        for (relay, count) in relays().iter().zip([2, 1]) {
            outbox.rules_mut().link_up(relay);
            for _ in 0..count {
                let Step::Send { event, .. } = outbox.rules_mut().next(relay, 0) else { panic!("something is owed") };
                let id = Event::from_json(&event).unwrap().id;
                let changes = outbox.rules_mut().answer(relay, &id, true, "", 0, 0);
                outbox.record(changes, false).unwrap();
            }
        }
        drop(outbox);
        let mut outbox = open(dir.path(), 1 << 20);
        assert_eq!(owed(&outbox), [1]);
        assert_eq!(outbox.rules().link_status(&relays()[0]).owed, 0);
        assert_eq!(outbox.rules().link_status(&relays()[1]).owed, 1);
        assert_eq!(outbox.queue(vec![(content(3), relays())]).unwrap(), [Seq(2)]);
        assert_eq!(outbox.events().count(), 2);
    }

    /// A full outbox says so and takes nothing; room that was settled is used again.
    #[test]
    fn a_full_outbox_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let mut outbox = open(dir.path(), 4_000);
        let mut taken = 0;
        let error = loop {
            match outbox.queue(vec![(content(taken), relays())]) {
                Ok(_) => taken += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, OutboxError::Full { max_bytes: 4_000, .. }), "{error}");
        assert!(taken > 3 && owed(&outbox).len() as u64 == taken);
        assert!(error.to_string().contains("outbox_mb_max"));
        for (seq, _) in outbox.rules().entries().map(|(seq, entry)| (seq, entry.id)).collect::<Vec<_>>() {
            let change = outbox.rules_mut().withdraw(seq).unwrap();
            outbox.record(vec![change], true).unwrap();
        }
        outbox.queue(vec![(content(99), relays())]).unwrap();
        let nobody = outbox.queue(vec![(content(100), Vec::new())]);
        assert!(matches!(nobody, Err(OutboxError::NoRelay(_))));
    }

    /// The journal does not grow with what passes through, only with what waits.
    #[test]
    fn the_journal_stays_short() {
        let dir = tempfile::tempdir().unwrap();
        let mut outbox = open(dir.path(), 1 << 20);
        outbox.queue(vec![(content(0), relays())]).unwrap();
        for number in 1..600 {
            let seqs = outbox.queue(vec![(content(number), relays())]).unwrap();
            let change = outbox.rules_mut().withdraw(seqs[0]).unwrap();
            outbox.record(vec![change], false).unwrap();
            assert!(outbox.bytes() < SHORTEN_BYTES_MIN + 10_000);
        }
        assert_eq!(owed(&open(dir.path(), 1 << 20)), [0]);
    }
}
