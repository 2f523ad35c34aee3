//! [`MemoryStore`], the oracle: a vector and the reference meaning of filters and verdicts.
//!
//! Slow and plain on purpose: the store suite and the tests of the relay compare clever stores with it. Keeps nothing
//! on disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::{
    Applied, PageBudget, Position, Progress, Query, Removal, Row, Scan, Store, StoreError, StoreStats, Wanted, state,
};
use crate::protocol::slot::{self, Slot};
use crate::protocol::supersede::{self, Address, Known, Target, Verdict, Version};
use crate::protocol::{Event, EventId, Kind, PublicKey, Verified};

/// A store in memory; clones share their events.
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    /// What can be read, in the order of storing.
    events: Vec<(Position, Verified<Event>)>,
    stored_ever: u64,
    /// Versions that were deleted by id: what they replaced stays replaced.
    gone: Vec<(Address, Version)>,
    /// Blobs by name.
    states: BTreeMap<String, Bytes>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// A request is in force as long as it can be read.
    fn known(&self, event: &Event, now: u64) -> Known {
        let address = Address::of(event);
        let deleters: Vec<PublicKey> = supersede::deleters(event).collect();
        let requests = |kind| {
            let of_kind = self.events.iter().map(|(_, request)| request).filter(move |request| request.kind == kind);
            of_kind.filter(|request| deleters.contains(&request.pubkey))
        };
        let names =
            |request: &Event, wanted: &Target| supersede::deletion_targets(request).any(|target| target == *wanted);
        let by_id = Target::Event(event.id);
        let by_address = address.clone().map(Target::Address);
        Known {
            stored: self.contains(&event.id),
            current: address.as_ref().and_then(|address| self.current(address)),
            deleted_by_id: requests(Kind::DELETION).any(|request| names(request, &by_id)),
            address_deleted_until: by_address.and_then(|target| {
                requests(Kind::DELETION)
                    .filter(|request| names(request, &target))
                    .map(|request| request.created_at)
                    .max()
            }),
            deleted_version: address.as_ref().and_then(|address| self.newest_gone(address)),
            vanished_until: requests(Kind::VANISH).map(|request| request.created_at).max(),
            rank: slot::is_version(event).then(|| self.slot(&event.pubkey).with(slot::Version::of(event), now).0),
        }
    }

    fn contains(&self, id: &EventId) -> bool {
        self.events.iter().any(|(_, event)| event.id == *id)
    }

    fn current(&self, address: &Address) -> Option<Version> {
        let occupant = self.events.iter().find(|(_, event)| Address::of(event).as_ref() == Some(address));
        occupant.map(|(_, event)| Version::of(event))
    }

    fn newest_gone(&self, address: &Address) -> Option<Version> {
        let versions = self.gone.iter().filter(|(at, _)| at == address).map(|(_, version)| *version);
        versions.reduce(|a, b| if a.replaces(&b) { a } else { b })
    }

    /// Notes that a version is deleted, and drops the one it would have replaced.
    fn note_gone(&mut self, deleted: &Event) {
        let Some(address) = Address::of(deleted) else { return };
        let version = Version::of(deleted);
        self.events
            .retain(|(_, old)| Address::of(old).as_ref() != Some(&address) || !version.replaces(&Version::of(old)));
        self.gone.push((address, version));
    }

    fn slot(&self, author: &PublicKey) -> Slot {
        let versions = self.events.iter().map(|(_, event)| event);
        let versions = versions.filter(|event| slot::is_version(&***event) && event.pubkey == *author);
        Slot::new(versions.map(|event| slot::Version::of(event)).collect())
    }

    fn store(&mut self, event: &Verified<Event>, now: u64) {
        if slot::is_version(&**event) {
            let (_, gone) = self.slot(&event.pubkey).with(slot::Version::of(event), now);
            self.events.retain(|(_, old)| !gone.contains(&old.id));
        }
        if let Some(current) = Address::of(event).and_then(|address| self.current(&address)) {
            self.events.retain(|(_, old)| old.id != current.id);
        }
        if event.kind == Kind::DELETION {
            supersede::deletion_targets(event).for_each(|target| self.delete(event, target));
        }
        if event.kind == Kind::VANISH {
            self.events.retain(|(_, old)| {
                let covered = supersede::deleters(old).any(|key| key == event.pubkey);
                old.kind == Kind::VANISH || !covered || old.created_at > event.created_at
            });
        }
        self.events.push((Position(self.stored_ever), event.clone()));
        self.stored_ever += 1;
    }

    fn delete(&mut self, request: &Event, target: Target) {
        match target {
            Target::Event(id) => {
                let may = |old: &Verified<Event>| old.id == id && supersede::may_delete(&request.pubkey, &**old);
                if let Some((_, deleted)) = self.events.iter().find(|(_, old)| may(old)).cloned() {
                    self.note_gone(&deleted);
                }
                self.events.retain(|(_, old)| old.id != id || !supersede::may_delete(&request.pubkey, &**old));
            }
            Target::Address(address) => self
                .events
                .retain(|(_, old)| old.created_at > request.created_at || Address::of(old).as_ref() != Some(&address)),
        }
    }

    /// Rows that `wanted` matches and `query` lets through, newest first.
    fn matching(&self, query: &Query, wanted: &Wanted) -> Vec<Row> {
        let seen = |position: Position, event: &Event| {
            query.before.is_none_or(|before| position < before)
                && !supersede::is_expired(event.expiration(), query.now)
                && wanted.filter.matches(event)
                && query
                    .visible
                    .answers(&wanted.filter, event, || self.slot(&event.pubkey).former().contains(&event.id))
        };
        let matches = self.events.iter().filter(|(position, event)| seen(*position, event));
        sorted(matches.map(|(_, event)| row(event)).collect())
    }
}

fn row(event: &Verified<Event>) -> Row {
    Row { id: event.id, created_at: event.created_at, json: event.canonical().json.clone() }
}

fn sorted(mut rows: Vec<Row>) -> Vec<Row> {
    rows.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
    rows.dedup_by_key(|row| row.id);
    rows
}

/// How many of a filter's matches are returned.
fn cut(wanted: &Wanted, matches: &[Row]) -> usize {
    let mut len = wanted.limit.min(matches.len());
    if wanted.whole_seconds && len > 0 {
        let last_second = matches[len - 1].created_at;
        let tied = matches[len..].iter().take_while(|row| row.created_at == last_second);
        len += tied.count();
    }
    len
}

impl Store for MemoryStore {
    fn apply(&self, batch: &[Verified<Event>], now: u64) -> Result<Applied, StoreError> {
        let mut kept = self.kept();
        let verdicts = batch.iter().map(|event| {
            let known = kept.known(event, now);
            let verdict = supersede::judge(event, &known, now);
            match verdict {
                Verdict::Store | Verdict::StoreFormer => kept.store(event, now),
                Verdict::Deleted if known.deleted_by_id => kept.note_gone(event),
                _ => {}
            }
            verdict
        });
        Ok(Applied {
            verdicts: verdicts.collect(),
            end: Position(kept.stored_ever),
            over_quota: false,
            others: Vec::new(),
        })
    }

    fn remove(&self, ids: &[EventId], _why: Removal) -> Result<u64, StoreError> {
        let mut kept = self.kept();
        let before = kept.events.len();
        kept.events.retain(|(_, event)| !ids.contains(&event.id));
        Ok((before - kept.events.len()) as u64)
    }

    fn sweep_expired(&self, now: u64, events_max: usize) -> Result<usize, StoreError> {
        let mut kept = self.kept();
        let before = kept.events.len();
        let mut left = events_max;
        kept.events.retain(|(_, event)| {
            let gone = left > 0 && supersede::is_expired(event.expiration(), now);
            left -= usize::from(gone);
            !gone
        });
        Ok(before - kept.events.len())
    }

    fn contains(&self, id: &EventId) -> Result<bool, StoreError> {
        Ok(self.kept().contains(id))
    }

    fn scan(&self, query: Query) -> Result<Box<dyn Scan>, StoreError> {
        let kept = self.kept();
        let mut rows = Vec::new();
        let (mut all, mut floor) = (Vec::new(), 0);
        for wanted in &query.wanted {
            let matches = kept.matching(&query, wanted);
            let len = cut(wanted, &matches);
            if wanted.whole_seconds && len > 0 && len < matches.len() {
                floor = floor.max(matches[len - 1].created_at);
            }
            rows.extend_from_slice(&matches[..len]);
            all.extend(matches);
        }
        rows.retain(|row| row.created_at >= floor);
        let rows = sorted(rows);
        let all = sorted(all);
        let newest_left_out = all.iter().find(|row| !rows.iter().any(|kept| kept.id == row.id));
        let end = match (newest_left_out, rows.last()) {
            (None, _) => Progress::Finished,
            (Some(left_out), Some(last)) if left_out.created_at < last.created_at => Progress::MoreOlder,
            (Some(_), _) => Progress::LimitReached,
        };
        Ok(Box::new(MemoryScan { store: self.clone(), rows, next: 0, end, all }))
    }

    fn load_state(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        state::check_name(name)?;
        Ok(self.kept().states.get(name).cloned())
    }

    fn save_state(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        state::check_name(name)?;
        self.kept().states.insert(name.to_owned(), Bytes::copy_from_slice(bytes));
        Ok(())
    }

    fn stats(&self) -> StoreStats {
        StoreStats { events: self.kept().events.len() as u64, ..StoreStats::default() }
    }

    fn close(&self, _deadline: Instant) -> Result<(), StoreError> {
        Ok(())
    }
}

struct MemoryScan {
    store: MemoryStore,
    rows: Vec<Row>,
    next: usize,
    end: Progress,
    all: Vec<Row>,
}

impl Scan for MemoryScan {
    fn page(&mut self, budget: PageBudget, rows: &mut Vec<Row>) -> Result<Progress, StoreError> {
        let mut bytes = 0;
        while let Some(row) = self.rows.get(self.next) {
            bytes += row.json.len();
            if bytes > budget.bytes_max && bytes > row.json.len() {
                return Ok(Progress::Paused);
            }
            self.next += 1;
            if self.store.kept().contains(&row.id) {
                rows.push(row.clone());
            }
            if Instant::now() >= budget.until && self.next < self.rows.len() {
                return Ok(Progress::Paused);
            }
        }
        Ok(self.end)
    }

    fn count(&mut self, _until: Instant) -> Result<(u64, Progress), StoreError> {
        let kept = self.store.kept();
        let count = self.all.drain(..).filter(|row| kept.contains(&row.id)).count();
        Ok((count as u64, Progress::Finished))
    }
}
