//! What damaged bytes of the event log still tell: which events were there, and whether one can be read whole.
//!
//! An id stands in a record twice, in its header and in its JSON, and half of it in the index. The JSON proves itself by
//! hash and signature, so an event whose JSON is intact is whole, whatever became of the header.

use std::collections::{BTreeMap, BTreeSet};

use memchr::memmem;
use serde::{Deserialize, Serialize};

use crate::protocol::verify::event_id;
use crate::protocol::{Event, EventId, Verified};

use super::StoreError;
use super::embedded::Files;
use super::log::Log;
use super::open::for_each_key;
use super::record::{self, ALIGN, MARK, PAYLOAD_BYTES_MAX, Record};
use super::schema;

/// How every event's JSON begins. Nothing else in a record looks so: within strings, quotes are escaped.
const JSON_BEGIN: &[u8] = b"{\"id\":\"";
/// Where the id stands in an event's JSON.
const ID_IN_JSON: std::ops::Range<usize> = JSON_BEGIN.len()..JSON_BEGIN.len() + 64;
/// Damaged bytes are looked at in windows of twice this many, which overlap by as many: each record is in one of them.
const STRIDE_BYTES: usize = PAYLOAD_BYTES_MAX;

/// A stretch of the log that holds no sound record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stretch {
    /// Where it begins.
    pub offset: u64,
    /// Bytes in it.
    pub len: u64,
    /// Ids of the events that were there, as far as can be told: 64 hex digits, `?` for those that nothing tells.
    pub events: Vec<String>,
}

impl std::fmt::Display for Stretch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "event log: {} bytes at byte {} are damaged", self.len, self.offset)?;
        match self.events.as_slice() {
            [] => write!(f, ": what was there cannot be told"),
            [id] => write!(f, ": event {id} was there"),
            ids => write!(f, ": {} events were there: {}", ids.len(), ids.join(", ")),
        }
    }
}

/// What was found in damaged bytes.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) ids: BTreeSet<EventId>,
    /// Events that are whole, by id.
    pub(super) whole: BTreeMap<EventId, Verified<Event>>,
}

impl Found {
    fn take(&mut self, event: Verified<Event>, in_headers: &mut BTreeSet<EventId>) {
        // An id that differs in a few digits is this one, damaged.
        in_headers.retain(|id| !is_nearly(id, &event.id));
        self.ids.insert(event.id);
        self.whole.insert(event.id, event);
    }
}

/// Looks through a stretch of a log.
pub(super) fn look_through(log: &Log, offset: u64, len: u64) -> Result<Found, StoreError> {
    let mut found = Found::default();
    let mut window = Vec::new();
    let mut done = 0;
    while done < len {
        let want = (len - done).min(2 * STRIDE_BYTES as u64) as usize;
        log.read_bytes(offset + done, want, &mut window)?;
        look_at(log, &window, &mut found);
        done += if want < 2 * STRIDE_BYTES { want as u64 } else { STRIDE_BYTES as u64 };
    }
    Ok(found)
}

fn look_at(log: &Log, bytes: &[u8], found: &mut Found) {
    let mut in_headers = BTreeSet::new();
    let marks = memmem::find_iter(bytes, &MARK).filter(|at| at.is_multiple_of(ALIGN));
    for at in std::iter::once(0).chain(marks) {
        in_headers.extend(record::id_in_damage(&bytes[at..]));
        // Where the checksum alone is wrong, a packed event may still be whole.
        if let Some(packed @ Record::Packed(_)) = record::parse(&bytes[at..])
            && let Ok(Record::Put(event)) = log.unpacked(packed, 0)
            && let Some(event) = whole_event(&event.json)
        {
            found.take(event, &mut in_headers);
        }
    }
    let mut rest = memmem::find_iter(bytes, JSON_BEGIN).peekable();
    while let Some(at) = rest.next() {
        let json = &bytes[at..rest.peek().copied().unwrap_or(bytes.len())];
        let written = json.get(ID_IN_JSON).and_then(|hex| EventId::from_hex(std::str::from_utf8(hex).ok()?));
        if let Some(event) = whole_event(json) {
            found.take(event, &mut in_headers);
        } else {
            found.ids.extend(written);
        }
    }
    found.ids.append(&mut in_headers);
}

/// The event whose JSON stands at the beginning of `bytes`, if its signature holds. Its id follows from the rest.
fn whole_event(bytes: &[u8]) -> Option<Verified<Event>> {
    let mut json = bytes.to_vec();
    json.get_mut(ID_IN_JSON)?.fill(b'0');
    let mut event = Event::deserialize(&mut serde_json::Deserializer::from_slice(&json)).ok()?;
    event.id = event_id(&event);
    Verified::check(event).ok()
}

fn is_nearly(one: &EventId, other: &EventId) -> bool {
    one.0.iter().zip(&other.0).filter(|(a, b)| a != b).count() < one.0.len() / 2
}

/// Names the events of each stretch, by its bytes and by what the index says lies there.
pub(super) fn name_events(files: &Files, stretches: &[(u64, u64)]) -> Result<Vec<Stretch>, StoreError> {
    let mut named = Vec::with_capacity(stretches.len());
    let mut indexed = indexed_in(files, stretches)?;
    for &(offset, len) in stretches {
        let found = look_through(&files.log, offset, len)?;
        named.push(named_stretch(offset, len, &found, indexed.remove(&offset).unwrap_or_default()));
    }
    Ok(named)
}

/// A stretch with its events' ids; `halves` are the second halves of ids that the index has for it.
pub(super) fn named_stretch(offset: u64, len: u64, found: &Found, halves: Vec<[u8; 16]>) -> Stretch {
    let mut events: Vec<String> = found.ids.iter().map(EventId::to_hex).collect();
    let unknown = halves.into_iter().map(|half| format!("{:?<32}{}", "", faster_hex::hex_string(&half)));
    let unknown: Vec<String> =
        unknown.filter(|half| !events.iter().any(|known| known.ends_with(&half[32..]))).collect();
    events.extend(unknown);
    Stretch { offset, len, events }
}

/// The second halves of the ids that the index has in each stretch, by where the stretch begins.
pub(super) fn indexed_in(files: &Files, stretches: &[(u64, u64)]) -> Result<BTreeMap<u64, Vec<[u8; 16]>>, StoreError> {
    let mut by_stretch: BTreeMap<u64, Vec<[u8; 16]>> = BTreeMap::new();
    if stretches.is_empty() {
        return Ok(by_stretch);
    }
    let mut keys = Vec::new();
    let (from, to) = schema::all_ids();
    for_each_key(&files.index, from, to, |key| keys.push(*key))?;
    for key in keys {
        let place = files.index.get(&key)?.as_ref().and_then(schema::place);
        let stretch = place.and_then(|place| holding(stretches, place.offset));
        if let (Some(stretch), Some(half)) = (stretch, schema::id_half(&key)) {
            by_stretch.entry(stretch).or_default().push(half);
        }
    }
    Ok(by_stretch)
}

/// Where the stretch begins that holds a byte; stretches are in the order of the log.
fn holding(stretches: &[(u64, u64)], at: u64) -> Option<u64> {
    let before = stretches.partition_point(|(offset, _)| *offset <= at);
    let (offset, len) = *stretches.get(before.checked_sub(1)?)?;
    (at - offset < len).then_some(offset)
}
