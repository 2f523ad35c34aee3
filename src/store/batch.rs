//! One batch of writes: judged event by event, each seeing the earlier ones, then made durable at once.

use std::collections::BTreeMap;

use crate::protocol::slot::{self, Slot};
use crate::protocol::supersede::{
    self, Address, Known, Target, Verdict, Version, deleters, deletion_targets, judge, may_delete,
};
use crate::protocol::{Event, EventId, Kind, PublicKey, Verified};

use super::embedded::{Files, WriterState};
use super::fault;
use super::index::{Change, Key, Value};
use super::log::Erasure;
use super::merge::{Candidate, Merge};
use super::record::{self, GoneVersion, PAYLOAD_BYTES_MAX, Record, Removed, StoredEvent};
use super::schema::{self, Place, Prefix};
use super::sums::Deltas;
use super::{Removal, StoreError};

/// Events that a request to vanish takes out in one write, which holds about 1 kB for each.
const VANISH_EVENTS_MAX: usize = 1_000;

/// Writes that are judged and encoded but not yet in the log.
pub(super) struct Batch<'s> {
    files: &'s Files,
    state: &'s mut WriterState,
    /// Where `records` will begin in the log.
    base: u64,
    records: Vec<u8>,
    /// Removals and the like in `records`.
    followers: u32,
    changes: BTreeMap<Key, Option<Value>>,
    /// Records to overwrite once the batch is durable.
    erase: Vec<Erasure>,
    /// Keys that vanish with this batch, and up to when.
    vanished: Vec<(PublicKey, u64)>,
    /// Keys of which this batch takes out a request to vanish.
    unvanished: Vec<PublicKey>,
    /// What changes in the sums for reconciliation.
    deltas: Deltas,
    events: u64,
    dead_bytes: u64,
}

impl<'s> Batch<'s> {
    pub(super) fn new(files: &'s Files, state: &'s mut WriterState) -> Self {
        let (events, dead_bytes) = (state.events, state.dead_bytes);
        Batch {
            base: files.log.end(),
            files,
            state,
            records: Vec::new(),
            followers: 0,
            changes: BTreeMap::new(),
            erase: Vec::new(),
            vanished: Vec::new(),
            unvanished: Vec::new(),
            deltas: files.sums.begin(),
            events,
            dead_bytes,
        }
    }

    /// Judges an event and, if it is to be stored, takes it up with all it causes.
    pub(super) fn add(&mut self, event: &Verified<Event>, now: u64) -> Result<Verdict, StoreError> {
        let (verdict, known) = self.verdict(event, now)?;
        match verdict {
            Verdict::Store | Verdict::StoreFormer => self.put(event, now)?,
            Verdict::Deleted if known.deleted_by_id => self.note_gone(event, known.current)?,
            _ => {}
        }
        Ok(verdict)
    }

    fn verdict(&self, event: &Event, now: u64) -> Result<(Verdict, Known), StoreError> {
        let known = self.known(event, now)?;
        Ok((judge(event, &known, now), known))
    }

    /// Takes an event out; false when it is not there.
    pub(super) fn remove(&mut self, id: &EventId, why: Removal) -> Result<bool, StoreError> {
        match self.place_of(id)? {
            Some(place) => self.take_out(place, None, why),
            None => Ok(false),
        }
    }

    /// Takes out an event that need not be kept, unless its author's are. A damaged record is passed over: only `repair`
    /// can say what it was.
    pub(super) fn evict(&mut self, place: Place, keeps: impl Fn(&PublicKey) -> bool) -> Result<bool, StoreError> {
        let bytes = self.record_bytes(place)?;
        match self.decoded(&bytes) {
            Ok((Record::Put(event), _)) if !keeps(&event.pubkey) => {}
            Ok(_) | Err(StoreError::Damaged(_)) => return Ok(false),
            Err(error) => return Err(error),
        }
        self.take_out(place, None, Removal::Evicted)
    }

    /// Takes out whatever lies at a place; false when it is gone already.
    pub(super) fn take_out(&mut self, place: Place, by: Option<EventId>, why: Removal) -> Result<bool, StoreError> {
        let Some(bytes) = self.event_bytes(place)? else { return Ok(false) };
        let (Record::Put(event), len) = self.decoded(&bytes)? else { return Ok(false) };
        let keys: Vec<Key> =
            schema::entries(&event, Place::new(place.offset, len)).into_iter().map(|(key, _)| key).collect();
        self.deltas.note(&event, place.offset, false);
        let before = self.records.len();
        let removed = Removed::new(&event, by, place.offset, len, why);
        record::push_remove(&mut self.records, &removed, keys.iter());
        self.followers += 1;
        for key in keys {
            if self.points_elsewhere(&key, place.offset)? {
                continue;
            }
            self.changes.insert(key, None);
        }
        if why.erases() {
            self.erase.push(Erasure { id: event.id, offset: place.offset, len });
        }
        if event.kind == Kind::VANISH {
            self.unvanished.push(event.pubkey);
        }
        self.events = self.events.saturating_sub(1);
        self.dead_bytes += u64::from(len) + (self.records.len() - before) as u64;
        Ok(true)
    }

    /// Makes the batch durable, then visible.
    pub(super) fn commit(mut self) -> Result<(), StoreError> {
        if self.records.is_empty() {
            return Ok(());
        }
        self.files.index.wait_for_room()?;
        self.files.log.append(&self.records)?;
        let end = self.files.log.end();
        self.changes.extend(schema::counters(self.events, self.dead_bytes, end));
        let changes: Vec<Change> = self.changes.into_iter().collect();
        // As one step for the sums: they read an event before it is erased, or not at all.
        self.files.sums.commit(self.deltas, || {
            // Before the index takes it up: a run that holds the removal is replayed no more, and would leave the bytes.
            if !self.erase.is_empty() {
                self.files.log.erase(&self.erase)?;
            }
            Ok(self.files.index.apply(&changes, end)?)
        })?;
        fault::point("index.applied");
        self.state.events = self.events;
        self.state.dead_bytes = self.dead_bytes;
        for (pubkey, until) in self.vanished {
            self.state.vanish(&pubkey, until);
        }
        for pubkey in self.unvanished {
            self.state.look_up_vanished(&self.files.index, &pubkey)?;
        }
        Ok(())
    }

    /// What bears on an incoming event. The filter on ids spares the look-ups for ids never heard of.
    fn known(&self, event: &Event, now: u64) -> Result<Known, StoreError> {
        let heard_of = self.files.bloom.contains(&event.id.0);
        if heard_of && self.get(&schema::by_id(&event.id))?.is_some() {
            return Ok(Known { stored: true, ..Known::default() });
        }
        let mut known = Known {
            deleted_by_id: heard_of && self.is_deleted(event)?,
            vanished_until: deleters(event).filter_map(|key| self.vanished_until(&key)).max(),
            ..Known::default()
        };
        if let Some(address) = Address::of(event) {
            let first = |(from, to): (Key, Key)| self.first_in(&from, &to);
            known.current = self.current(&address)?.map(|(version, _)| version);
            let request = first(schema::deleted_address_range(&address))?;
            known.address_deleted_until = request.as_ref().and_then(schema::request_created_at);
            let gone = first(schema::gone_version_range(&schema::address_hash(&address)))?;
            known.deleted_version = gone.as_ref().and_then(schema::gone_version_of);
        }
        if slot::is_version(event) {
            let slot = Slot::new(self.versions(&event.pubkey)?.into_iter().map(|(version, _)| version).collect());
            known.rank = Some(slot.with(slot::Version::of(event), now).0);
        }
        Ok(known)
    }

    /// The kept versions of an author's settings, and where they lie.
    fn versions(&self, author: &PublicKey) -> Result<Vec<(slot::Version, Place)>, StoreError> {
        let prefix = Prefix::author_kind(author, slot::KIND);
        let (from, to) = (prefix.start(u64::MAX), prefix.end(0));
        let mut entries = Vec::new();
        self.files.index.scan(&from, &to, usize::MAX, &mut entries)?;
        let mut entries: BTreeMap<Key, Option<Value>> =
            entries.into_iter().map(|(key, value)| (key, Some(value))).collect();
        entries.extend(self.changes.range(from..to).map(|(key, value)| (*key, *value)));
        let mut versions = Vec::new();
        for (key, value) in entries {
            let place =
                prefix.suffix_of(&key).zip(value).and_then(|(suffix, value)| schema::place_and_kind(&suffix, &value));
            let Some((place, _)) = place else { continue };
            let Some(bytes) = self.event_bytes(place)? else { continue };
            if let (Record::Put(event), _) = self.decoded(&bytes)?
                && event.pubkey == *author
                && let Some(version) = event.settings_version()
            {
                versions.push((version, place));
            }
        }
        Ok(versions)
    }

    /// The versions of settings that are too many with this one.
    fn surplus_versions(&self, event: &Event, now: u64) -> Result<Vec<Place>, StoreError> {
        if !slot::is_version(event) {
            return Ok(Vec::new());
        }
        let (versions, places): (Vec<slot::Version>, Vec<Place>) = self.versions(&event.pubkey)?.into_iter().unzip();
        let ids: Vec<EventId> = versions.iter().map(|version| version.id).collect();
        let (_, gone) = Slot::new(versions).with(slot::Version::of(event), now);
        Ok(ids.iter().zip(places).filter(|(id, _)| gone.contains(id)).map(|(_, place)| place).collect())
    }

    /// Notes that a version of an address is deleted, and takes out what it would have replaced had it come earlier.
    fn note_gone(&mut self, deleted: &Event, current: Option<Version>) -> Result<(), StoreError> {
        let Some(address) = Address::of(deleted) else { return Ok(()) };
        let version = Version::of(deleted);
        self.push_gone(&address, version)?;
        if current.is_some_and(|current| version.replaces(&current))
            && let Some((_, place)) = self.current(&address)?
        {
            self.take_out(place, None, Removal::Replaced)?;
        }
        Ok(())
    }

    fn push_gone(&mut self, address: &Address, version: Version) -> Result<(), StoreError> {
        let gone = GoneVersion { address: schema::address_hash(address), version };
        let key = schema::gone_version(&gone);
        if self.get(&key)?.is_none() {
            record::push_gone(&mut self.records, &gone);
            self.followers += 1;
            self.changes.insert(key, Some(Value::new(&[])));
        }
        Ok(())
    }

    fn is_deleted(&self, event: &Event) -> Result<bool, StoreError> {
        for requester in deleters(event) {
            let (from, to) = schema::deleted_id_range(&event.id, &requester);
            if self.first_in(&from, &to)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn vanished_until(&self, pubkey: &PublicKey) -> Option<u64> {
        let here = self.vanished.iter().filter(|(vanished, _)| vanished == pubkey).map(|(_, until)| *until);
        here.chain(self.state.vanished_until(pubkey)).max()
    }

    /// The version that occupies an address, and where it lies.
    fn current(&self, address: &Address) -> Result<Option<(Version, Place)>, StoreError> {
        let Some(place) = self.get(&schema::by_address(address))?.as_ref().and_then(schema::place) else {
            return Ok(None);
        };
        let Some(bytes) = self.event_bytes(place)? else { return Ok(None) };
        match self.decoded(&bytes)? {
            (Record::Put(event), _) if event.address().as_ref() == Some(address) => Ok(Some((event.version(), place))),
            _ => Ok(None),
        }
    }

    fn put(&mut self, event: &Verified<Event>, now: u64) -> Result<(), StoreError> {
        if record::put_len_bound(event) > PAYLOAD_BYTES_MAX {
            return Err(StoreError::Damaged(format!("event {} is too large for the log", event.id)));
        }
        let replaced = match Address::of(event) {
            Some(address) => self.current(&address)?.map(|(_, place)| place).into_iter().collect(),
            None => self.surplus_versions(event, now)?,
        };
        let offset = self.base + self.records.len() as u64;
        let (start, followers) = (self.records.len(), self.followers);
        record::push_put(&mut self.records, event);
        let place = Place::new(offset, (self.records.len() - start) as u32);
        let (Record::Put(stored), _) = self.decoded(&self.records[start..])? else {
            return Err(StoreError::Damaged(format!("event {} was not encoded as one", event.id)));
        };
        self.deltas.note(&stored, offset, true);
        self.changes.extend(schema::entries(&stored, place));
        self.files.bloom.insert(&event.id.0);
        self.events += 1;
        for replaced in replaced {
            self.take_out(replaced, Some(event.id), Removal::Replaced)?;
        }
        match event.kind {
            Kind::DELETION => self.delete_targets(event)?,
            Kind::VANISH => self.vanish(event)?,
            _ => {}
        }
        record::set_followers(&mut self.records, start, self.followers - followers);
        Ok(())
    }

    /// Takes out what a deletion request names and its author may delete (NIP-09).
    fn delete_targets(&mut self, request: &Event) -> Result<(), StoreError> {
        for target in deletion_targets(request) {
            let place = match &target {
                Target::Event(id) => {
                    self.files.bloom.insert(&id.0);
                    self.place_of(id)?
                }
                Target::Address(address) => {
                    let current = self.current(address)?;
                    current.filter(|(version, _)| version.created_at <= request.created_at).map(|(_, place)| place)
                }
            };
            let Some(place) = place else { continue };
            let Some(bytes) = self.event_bytes(place)? else { continue };
            if let (Record::Put(event), _) = self.decoded(&bytes)?
                && may_delete(&request.pubkey, &event)
            {
                self.take_out(place, Some(request.id), Removal::Deleted)?;
                if let (Target::Event(_), Some(address)) = (&target, event.address()) {
                    self.push_gone(&address, event.version())?;
                }
            }
        }
        Ok(())
    }

    /// Takes out everything that goes with a request to vanish (NIP-62). Sees what the index holds; the caller commits
    /// earlier writes first.
    fn vanish(&mut self, request: &Event) -> Result<(), StoreError> {
        self.vanished.push((request.pubkey, request.created_at));
        self.take_along(&mut Vanishing::of(request), Some(request.id), usize::MAX).map(drop)
    }

    /// Takes out up to `events_max` events that vanish; returns how many, which is fewer only at the end.
    fn take_along(
        &mut self,
        vanishing: &mut Vanishing<'_>,
        by: Option<EventId>,
        events_max: usize,
    ) -> Result<usize, StoreError> {
        let mut taken = 0;
        while taken < events_max
            && let Some(candidate) = vanishing.next(self.files)?
        {
            let Some(bytes) = self.event_bytes(candidate.place)? else { continue };
            let (Record::Put(event), _) = self.decoded(&bytes)? else { continue };
            let is_gone = self.changes.get(&schema::by_id(&event.id)) == Some(&None);
            if !is_gone && vanishes_with(&event, vanishing.request) {
                taken += usize::from(self.take_out(candidate.place, by, Removal::Vanished)?);
            }
        }
        Ok(taken)
    }

    fn place_of(&self, id: &EventId) -> Result<Option<Place>, StoreError> {
        Ok(self.get(&schema::by_id(id))?.as_ref().and_then(schema::place))
    }

    /// Whether a key that only one event can hold belongs to another one by now.
    fn points_elsewhere(&self, key: &Key, offset: u64) -> Result<bool, StoreError> {
        if !schema::holds_a_place(key) {
            return Ok(false);
        }
        Ok(self.get(key)?.as_ref().and_then(schema::place).is_some_and(|place| place.offset != offset))
    }

    fn get(&self, key: &Key) -> Result<Option<Value>, StoreError> {
        match self.changes.get(key) {
            Some(value) => Ok(*value),
            None => Ok(self.files.index.get(key)?),
        }
    }

    /// The first key of a range that exists, those of this batch included. Tombstones are only taken out together
    /// with their request, one by one, so the first few tell.
    fn first_in(&self, from: &Key, to: &Key) -> Result<Option<Key>, StoreError> {
        let mut found = Vec::new();
        let here = self.changes.range(*from..*to).filter(|(_, value)| value.is_some()).map(|(key, _)| *key).next();
        let gone = self.changes.range(*from..*to).filter(|(_, value)| value.is_none()).count();
        self.files.index.scan(from, to, gone + 1, &mut found)?;
        let there = found.into_iter().map(|(key, _)| key).find(|key| !self.changes.contains_key(key));
        Ok(here.into_iter().chain(there).min())
    }

    /// The record of the event at a place; `None` when it is gone, or damaged: then it is as good as gone, and one
    /// person's broken record must not stand in the way of everybody's writes.
    fn event_bytes(&self, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.record_bytes(place).and_then(|bytes| {
            let is_event = matches!(self.decoded(&bytes)?, (Record::Put(_), _));
            Ok(is_event.then_some(bytes))
        });
        match read {
            Err(StoreError::Damaged(why)) => {
                tracing::error!("passed over an event that cannot be read: {why}; run `sledge verify`");
                Ok(None)
            }
            read => read,
        }
    }

    /// The record at a place, which may be one of this very batch.
    fn record_bytes(&self, place: Place) -> Result<Vec<u8>, StoreError> {
        if let Some(at) = place.offset.checked_sub(self.base) {
            let rest = self.records.get(at as usize..).unwrap_or_default();
            return Ok(rest[..rest.len().min(place.read_len())].to_vec());
        }
        let mut bytes = Vec::new();
        self.files.log.read(place.offset, place.read_len(), &mut bytes)?;
        Ok(bytes)
    }

    fn decoded<'b>(&self, bytes: &'b [u8]) -> Result<(Record<'b>, u32), StoreError> {
        let damaged = |_| StoreError::Damaged("a record to be changed is damaged".to_owned());
        let (record, len) = record::decode(bytes).map_err(damaged)?;
        Ok((self.files.log.unpacked(record, self.base)?, len as u32))
    }
}

/// Takes out, in writes of bounded size, what goes with a request to vanish, if that is to be stored at all, until so
/// little is left that it goes in one write with the request. A request is only stored at the end of its work: one that
/// was broken off was not acknowledged and is sent again, and must not be taken for done then.
pub(super) fn vanish_in_portions(
    files: &Files,
    state: &mut WriterState,
    request: &Verified<Event>,
    now: u64,
) -> Result<(), StoreError> {
    if Batch::new(files, state).verdict(request, now)?.0 != Verdict::Store {
        return Ok(());
    }
    let mut vanishing = Vanishing::of(request);
    loop {
        let mut writes = Batch::new(files, state);
        if writes.take_along(&mut vanishing, None, VANISH_EVENTS_MAX)? < VANISH_EVENTS_MAX {
            return Ok(());
        }
        writes.commit()?;
        fault::point("vanish.portion");
    }
}

/// The events of an author up to a request to vanish, then those sent to them, as far as they were looked at.
struct Vanishing<'r> {
    request: &'r Event,
    own: Merge,
    inbox: Merge,
}

impl<'r> Vanishing<'r> {
    fn of(request: &'r Event) -> Self {
        let inbox = Prefix::tag(crate::protocol::TagLetter::P, &request.pubkey.to_hex());
        let [own, inbox] = [Prefix::author(&request.pubkey), inbox]
            .map(|prefix| Merge::new(vec![prefix], 0, request.created_at, usize::MAX));
        Vanishing { request, own, inbox }
    }

    fn next(&mut self, files: &Files) -> Result<Option<Candidate>, StoreError> {
        if let Some(own) = self.own.next(&files.index)? {
            return Ok(Some(own));
        }
        while let Some(sent) = self.inbox.next(&files.index)? {
            if sent.kind == Kind::GIFT_WRAP {
                return Ok(Some(sent));
            }
        }
        Ok(None)
    }
}

/// Whether a stored event goes with its author's request to vanish: all of the author's own that are not newer, and
/// gift wraps to the author. Requests to vanish stay, whichever comes first: they are what keeps the others away.
fn vanishes_with(event: &StoredEvent<'_>, request: &Event) -> bool {
    event.created_at <= request.created_at
        && event.kind != Kind::VANISH
        && (event.pubkey == request.pubkey || supersede::may_delete(&request.pubkey, event))
}
