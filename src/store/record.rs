//! One record of the event log: its bytes, and reading them without parsing JSON.
//!
//! Everything is little-endian. A record begins at a multiple of 8 and is padded with zeros to the next one.
//!
//! ```text
//! frame    0  mark       4  C5 'S' 'L' 'R'; not valid UTF-8, so no event's JSON contains it
//!          4  crc        4  CRC-32 of bytes 8 to the end of the payload
//!          8  length     4  bytes of the payload
//!         12  type       1  1 put, 2 remove, 3 erased, 4 gone,
//!                           5 packed, 6 dictionary
//!         13  followers  3  of a put: how many records behind it it brought about; without all of them it does not count
//! put     16  id        32
//!         48  pubkey    32
//!         80  created_at 8
//!         88  expiration 8  all ones: none
//!         96  kind       2
//!         98  flags      1  bit 0: the first `d` tag has no value
//!         99  tags_len   4  bytes of the tag section
//!        103  tags          for each indexed tag: letter (bit 7: value has escapes) 1,
//!                           gap from the last value's end (varint), value length (varint); both within the JSON
//!             json          the canonical JSON
//! packed  16  as put up to the tags, then, in place of the JSON, see `pack`:
//!             sig       64  the signature
//!             length     4  bytes of what is compressed
//!             zstd          tags and content as in the JSON, with the log's dictionary
//! remove  16  id        32  of the removed event
//!         48  by        32  id of the event that caused it; zeros if none did
//!         80  offset     8  where the removed record begins
//!         88  length     4  its whole length
//!         92  why        1  see `Removal`
//!         93  keys          the index keys to take out: length 1, bytes; the removed record may be erased by then
//! erased  16  id        32  of the event that was here: what it replaced must stay replaced
//!         48  zeros         the rest is gone for good
//! dictionary  16            what zstd needs to read packed records; the first two records of its log, alike
//! gone    16  address   16  hash of an address; a version of it was deleted by id, and older ones with it
//!         32  created_at 8  of that version
//!         40  id        32  of that version
//! ```

use std::borrow::Cow;

use crate::protocol::event::{Canonical, Fields, TagSpan, unescape};
use crate::protocol::slot;
use crate::protocol::supersede::{Address, Version};
use crate::protocol::{Event, EventId, Kind, PublicKey, TagLetter, Verified};

use super::Removal;
use super::index::{KEY_BYTES_MAX, Key};

/// Every record begins at a multiple of this.
pub const ALIGN: usize = 8;
/// Bytes before the payload.
pub const FRAME_LEN: usize = 16;
/// Longest payload; what is longer is refused on writing and counts as damage on reading.
pub const PAYLOAD_BYTES_MAX: usize = (16 << 20) - 2 * FRAME_LEN;
/// The first bytes of every record.
pub const MARK: [u8; 4] = [0xC5, b'S', b'L', b'R'];

const PUT: u8 = 1;
const REMOVE: u8 = 2;
const ERASED: u8 = 3;
const GONE: u8 = 4;
const GONE_LEN: usize = 56;
const PACKED: u8 = 5;
const DICTIONARY: u8 = 6;
const PUT_HEADER_LEN: usize = 87;
const REMOVE_HEADER_LEN: usize = 77;
const NO_EXPIRATION: u64 = u64::MAX;
const ESCAPED: u8 = 0x80;
const BARE_D: u8 = 1;

/// A record as it lies in a buffer.
#[derive(Debug)]
pub enum Record<'a> {
    /// An event.
    Put(StoredEvent<'a>),
    /// The end of an event.
    Remove(Removed<'a>),
    /// The id of an event whose bytes were overwritten.
    Erased(EventId),
    /// Versions of an address that must not come back.
    Gone(GoneVersion),
    /// An event with compressed JSON.
    Packed(PackedEvent<'a>),
    /// What is needed to read packed events.
    Dictionary(&'a [u8]),
}

/// An event whose JSON is compressed.
#[derive(Debug)]
pub struct PackedEvent<'a> {
    /// All but the JSON, which is empty here.
    pub header: StoredEvent<'a>,
    /// What stands in place of the JSON; see `pack`.
    pub body: &'a [u8],
}

/// A version of an address that was deleted by its id. It and whatever it replaces stay out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GoneVersion {
    /// Hash of the address; see `schema`.
    pub address: [u8; 16],
    /// The deleted version.
    pub version: Version,
}

/// A stored event: the fields that filters need, and its JSON.
#[derive(Debug)]
pub struct StoredEvent<'a> {
    /// The event id.
    pub id: EventId,
    /// The author.
    pub pubkey: PublicKey,
    /// Seconds since 1970 UTC.
    pub created_at: u64,
    /// The kind.
    pub kind: Kind,
    /// When it ceases to be (NIP-40).
    pub expiration: Option<u64>,
    /// How many records behind it are what it brought about: removals, mostly.
    pub followers: u32,
    bare_d: bool,
    tags: &'a [u8],
    /// The canonical JSON; owned where it was unpacked.
    pub json: Cow<'a, [u8]>,
}

/// What a remove record says.
#[derive(Debug)]
pub struct Removed<'a> {
    /// The removed event.
    pub id: EventId,
    /// The event that caused it and stands right before it in the log, if one did.
    pub by: Option<EventId>,
    /// Where the removed record begins.
    pub offset: u64,
    /// Its whole length, padding included.
    pub len: u32,
    /// Why.
    pub why: Removal,
    keys: &'a [u8],
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotARecord {
    /// More bytes are needed, this many in all.
    Short(usize),
    /// No mark, a wrong checksum, or a form that cannot be.
    Damaged,
}

/// Whole length of a record with this much payload.
pub fn record_len(payload_len: usize) -> usize {
    (FRAME_LEN + payload_len).next_multiple_of(ALIGN)
}

/// Appends an event's record.
pub fn push_put(out: &mut Vec<u8>, event: &Verified<Event>) {
    let canonical = event.canonical();
    let start = begin(out);
    out.extend_from_slice(&event.id.0);
    out.extend_from_slice(&event.pubkey.0);
    out.extend_from_slice(&event.created_at.to_le_bytes());
    out.extend_from_slice(&event.expiration().unwrap_or(NO_EXPIRATION).to_le_bytes());
    out.extend_from_slice(&event.kind.0.to_le_bytes());
    let bare_d = event.tags.find("d").is_some_and(|tag| tag.value().is_none());
    out.push(if bare_d { BARE_D } else { 0 });
    let tags_len_at = out.len();
    out.extend_from_slice(&[0; 4]);
    push_tag_spans(out, canonical);
    let tags_len = (out.len() - tags_len_at - 4) as u32;
    out[tags_len_at..tags_len_at + 4].copy_from_slice(&tags_len.to_le_bytes());
    out.extend_from_slice(&canonical.json);
    finish(out, start, PUT);
}

/// Notes in the put record at `start` how many records it brought about behind it; at most 2^24 - 1.
///
/// Replay takes a put together with its followers or not at all, so a write that was cut off between them leaves
/// neither two versions of one address nor a deletion request that deleted nothing.
pub fn set_followers(out: &mut [u8], start: usize, followers: u32) {
    out[start + 13..start + 16].copy_from_slice(&followers.to_le_bytes()[..3]);
    let end = start + FRAME_LEN + le_u32(&out[start..], 8) as usize;
    let crc = crc32fast::hash(&out[start + 8..end]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// Bytes that [`push_put`] would append at the most.
pub fn put_len_bound(event: &Verified<Event>) -> usize {
    let canonical = event.canonical();
    record_len(PUT_HEADER_LEN + 11 * canonical.tag_spans.len() + canonical.json.len())
}

/// Appends the record of a removal.
pub fn push_remove<'k>(out: &mut Vec<u8>, removed: &Removed<'_>, keys: impl Iterator<Item = &'k Key>) {
    let start = begin(out);
    out.extend_from_slice(&removed.id.0);
    out.extend_from_slice(&removed.by.map_or([0; 32], |id| id.0));
    out.extend_from_slice(&removed.offset.to_le_bytes());
    out.extend_from_slice(&removed.len.to_le_bytes());
    out.push(removal_code(removed.why));
    for key in keys {
        out.push(key.as_slice().len() as u8);
        out.extend_from_slice(key.as_slice());
    }
    finish(out, start, REMOVE);
}

/// Appends the record of a deleted version.
pub fn push_gone(out: &mut Vec<u8>, gone: &GoneVersion) {
    let start = begin(out);
    out.extend_from_slice(&gone.address);
    out.extend_from_slice(&gone.version.created_at.to_le_bytes());
    out.extend_from_slice(&gone.version.id.0);
    finish(out, start, GONE);
}

/// The bytes that stand in place of an erased event's record of this whole length.
pub fn erased(id: &EventId, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len);
    let start = begin(&mut out);
    out.extend_from_slice(&id.0);
    out.resize(len, 0);
    finish(&mut out, start, ERASED);
    out
}

/// Appends a stored event's record with `body` in place of its JSON.
pub fn push_packed(out: &mut Vec<u8>, event: &StoredEvent<'_>, body: &[u8]) {
    push_stored(out, event, body, PACKED);
}

/// Appends a stored event's record with its JSON.
pub fn push_plain(out: &mut Vec<u8>, event: &StoredEvent<'_>) {
    push_stored(out, event, &event.json, PUT);
}

/// A stored event's record with its JSON, and without padding.
pub fn plain(event: &StoredEvent<'_>) -> Vec<u8> {
    let mut record = Vec::with_capacity(FRAME_LEN + PUT_HEADER_LEN + event.tags.len() + event.json.len() + ALIGN);
    push_plain(&mut record, event);
    record.truncate(checked_len(&record));
    record
}

fn push_stored(out: &mut Vec<u8>, event: &StoredEvent<'_>, body: &[u8], kind: u8) {
    let start = begin(out);
    out.extend_from_slice(&event.id.0);
    out.extend_from_slice(&event.pubkey.0);
    out.extend_from_slice(&event.created_at.to_le_bytes());
    out.extend_from_slice(&event.expiration.unwrap_or(NO_EXPIRATION).to_le_bytes());
    out.extend_from_slice(&event.kind.0.to_le_bytes());
    out.push(if event.bare_d { BARE_D } else { 0 });
    out.extend_from_slice(&(event.tags.len() as u32).to_le_bytes());
    out.extend_from_slice(event.tags);
    out.extend_from_slice(body);
    finish(out, start, kind);
}

/// Appends the dictionary's record.
pub fn push_dictionary(out: &mut Vec<u8>, dictionary: &[u8]) {
    let start = begin(out);
    out.extend_from_slice(dictionary);
    finish(out, start, DICTIONARY);
}

/// Reads the record at the start of `bytes`; also gives its whole length.
///
/// # Errors
/// [`NotARecord`].
pub fn decode(bytes: &[u8]) -> Result<(Record<'_>, usize), NotARecord> {
    let len = check(bytes)?;
    Ok((parse(bytes).ok_or(NotARecord::Damaged)?, len))
}

/// Whether a sound record begins at the start of `bytes`; gives its whole length.
///
/// # Errors
/// [`NotARecord`].
pub fn check(bytes: &[u8]) -> Result<usize, NotARecord> {
    let frame = bytes.get(..FRAME_LEN).ok_or(NotARecord::Short(FRAME_LEN))?;
    let payload_len = le_u32(frame, 8) as usize;
    if frame[..4] != MARK || payload_len > PAYLOAD_BYTES_MAX {
        return Err(NotARecord::Damaged);
    }
    let end = FRAME_LEN + payload_len;
    let checked = bytes.get(8..end).ok_or(NotARecord::Short(end))?;
    if crc32fast::hash(checked) != le_u32(frame, 4) {
        return Err(NotARecord::Damaged);
    }
    Ok(record_len(payload_len))
}

/// Reads a record that [`check`] found sound; `None` when it is of a type or form that this version does not know.
pub fn parse(bytes: &[u8]) -> Option<Record<'_>> {
    let frame = bytes.get(..FRAME_LEN)?;
    let payload = bytes.get(FRAME_LEN..FRAME_LEN + le_u32(frame, 8) as usize)?;
    match frame[12] {
        PUT => {
            let (event, json) = decode_put(payload)?;
            let followers = u32::from_le_bytes([frame[13], frame[14], frame[15], 0]);
            Some(Record::Put(StoredEvent { json: Cow::Borrowed(json), followers, ..event }))
        }
        PACKED => decode_put(payload).map(|(header, body)| Record::Packed(PackedEvent { header, body })),
        REMOVE => decode_remove(payload).map(Record::Remove),
        GONE => decode_gone(payload).map(Record::Gone),
        ERASED => payload.first_chunk().map(|id| Record::Erased(EventId(*id))),
        DICTIONARY => Some(Record::Dictionary(payload)),
        _ => None,
    }
}

/// Length of a sound record without its padding, which no checksum covers.
pub fn checked_len(record: &[u8]) -> usize {
    FRAME_LEN + le_u32(record, 8) as usize
}

/// The event's id in bytes that may be its damaged record, as far as they still look like one.
pub fn id_in_damage(bytes: &[u8]) -> Option<EventId> {
    let looks_right = matches!(bytes.get(12), Some(&(PUT | PACKED)));
    let id = bytes.get(FRAME_LEN..)?.first_chunk()?;
    (looks_right && *id != [0; 32]).then_some(EventId(*id))
}

fn begin(out: &mut Vec<u8>) -> usize {
    let start = out.len();
    debug_assert!(start.is_multiple_of(ALIGN), "records are aligned");
    out.extend_from_slice(&MARK);
    out.extend_from_slice(&[0; FRAME_LEN - MARK.len()]);
    start
}

fn finish(out: &mut Vec<u8>, start: usize, kind: u8) {
    let payload_len = out.len() - start - FRAME_LEN;
    out[start + 8..start + 12].copy_from_slice(&(payload_len as u32).to_le_bytes());
    out[start + 12] = kind;
    let crc = crc32fast::hash(&out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    out.resize(start + record_len(payload_len), 0);
}

/// The header, with no JSON, and what follows it.
fn decode_put(payload: &[u8]) -> Option<(StoredEvent<'_>, &[u8])> {
    let header = payload.get(..PUT_HEADER_LEN)?;
    let expiration = le_u64(header, 72);
    let (tags, body) = payload[PUT_HEADER_LEN..].split_at_checked(le_u32(header, 83) as usize)?;
    let event = StoredEvent {
        id: EventId(array(header, 0)),
        pubkey: PublicKey(array(header, 32)),
        created_at: le_u64(header, 64),
        expiration: (expiration != NO_EXPIRATION).then_some(expiration),
        followers: 0,
        kind: Kind(u16::from_le_bytes(array(header, 80))),
        bare_d: header[82] & BARE_D != 0,
        tags,
        json: Cow::Borrowed(&[]),
    };
    Some((event, body))
}

fn decode_gone(payload: &[u8]) -> Option<GoneVersion> {
    let payload: &[u8; GONE_LEN] = payload.try_into().ok()?;
    let version = Version { created_at: le_u64(payload, 16), id: EventId(array(payload, 24)) };
    Some(GoneVersion { address: array(payload, 0), version })
}

fn decode_remove(payload: &[u8]) -> Option<Removed<'_>> {
    let header = payload.get(..REMOVE_HEADER_LEN)?;
    let by = EventId(array(header, 32));
    Some(Removed {
        id: EventId(array(header, 0)),
        by: (by.0 != [0; 32]).then_some(by),
        offset: le_u64(header, 64),
        len: le_u32(header, 72),
        why: removal_from_code(header[76])?,
        keys: &payload[REMOVE_HEADER_LEN..],
    })
}

impl StoredEvent<'_> {
    /// The slot that the event occupies, as [`Address::of`] has it.
    pub fn address(&self) -> Option<Address> {
        if slot::is_version(self) {
            return None;
        }
        let d = if self.kind.is_addressable() && !self.bare_d {
            let first = self.indexed_tags().find(|(letter, _)| letter.as_byte() == b'd');
            first.map(|(_, value)| value.into_owned()).unwrap_or_default()
        } else if self.kind.is_addressable() || self.kind.is_replaceable() {
            String::new()
        } else {
            return None;
        };
        Some(Address { kind: self.kind, pubkey: self.pubkey, d })
    }

    /// The version of settings that the event is, if it is one. Reads the JSON: `prev` tags are not indexed.
    pub fn settings_version(&self) -> Option<slot::Version> {
        if !slot::is_version(self) {
            return None;
        }
        let event = std::str::from_utf8(&self.json).ok().and_then(|json| Event::from_json(json).ok())?;
        Some(slot::Version::of(&event))
    }

    /// The same event with other JSON.
    pub fn with_json(&self, json: Vec<u8>) -> Self {
        StoredEvent { json: Cow::Owned(json), ..*self }
    }

    /// The same event without what it brought about, as compaction keeps it.
    pub fn alone(&self) -> Self {
        StoredEvent { followers: 0, ..self.with_json(self.json.to_vec()) }
    }

    /// The event's place among the versions of its address.
    pub fn version(&self) -> Version {
        Version { created_at: self.created_at, id: self.id }
    }

    /// Indexed tags in order: letter, value.
    pub fn indexed_tags(&self) -> impl Iterator<Item = (TagLetter, Cow<'_, str>)> {
        self.tag_spans().filter_map(|span| Some((span.letter, self.tag_value(span)?)))
    }

    fn tag_value(&self, span: TagSpan) -> Option<Cow<'_, str>> {
        let raw = self.json.get(span.start as usize..)?.get(..span.len as usize)?;
        unescape(raw, span.escaped)
    }

    fn tag_spans(&self) -> impl Iterator<Item = TagSpan> {
        let mut rest = self.tags;
        let mut end = 0;
        std::iter::from_fn(move || {
            let (&letter, after) = rest.split_first()?;
            rest = after;
            let start = end + take_varint(&mut rest)?;
            let len = take_varint(&mut rest)?;
            end = start + len;
            let escaped = letter & ESCAPED != 0;
            Some(TagSpan { letter: TagLetter::from_byte(letter & !ESCAPED)?, start, len, escaped })
        })
    }
}

impl Fields for StoredEvent<'_> {
    fn id(&self) -> &EventId {
        &self.id
    }

    fn pubkey(&self) -> &PublicKey {
        &self.pubkey
    }

    fn created_at(&self) -> u64 {
        self.created_at
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn has_tag(&self, letter: TagLetter, wanted: &mut dyn FnMut(&str) -> bool) -> bool {
        // Every event that is read is asked for its labels, and some have thousands of other tags: where the letter's byte
        // is nowhere in the section, no tag has it, and where it is, only the values in question are looked at.
        if memchr::memchr2(letter.as_byte(), letter.as_byte() | ESCAPED, self.tags).is_none() {
            return false;
        }
        let spans = self.tag_spans().filter(|span| span.letter == letter);
        spans.filter_map(|span| self.tag_value(span)).any(|value| wanted(&value))
    }
}

impl<'a> Removed<'a> {
    /// A removal about to be written; its keys go to [`push_remove`].
    pub fn new(event: &StoredEvent<'_>, by: Option<EventId>, offset: u64, len: u32, why: Removal) -> Self {
        Removed { id: event.id, by, offset, len, why, keys: &[] }
    }

    /// The same removal where there is nothing to remove.
    pub fn of_nothing(&self) -> Self {
        Removed { offset: 0, len: 0, ..*self }
    }

    /// The index keys to take out.
    pub fn keys(&self) -> impl Iterator<Item = Key> + 'a {
        let mut rest = self.keys;
        std::iter::from_fn(move || {
            let (&len, after) = rest.split_first()?;
            let (key, after) = after.split_at_checked(usize::from(len))?;
            rest = after;
            (key.len() <= KEY_BYTES_MAX).then(|| Key::new(key))
        })
    }
}

impl Removal {
    /// Whether the event's bytes are overwritten in place.
    pub fn erases(self) -> bool {
        matches!(self, Removal::Deleted | Removal::Vanished | Removal::Operator)
    }
}

fn removal_code(why: Removal) -> u8 {
    match why {
        Removal::Replaced => 1,
        Removal::Deleted => 2,
        Removal::Expired => 3,
        Removal::Vanished => 4,
        Removal::Operator => 5,
        Removal::Evicted => 6,
    }
}

fn removal_from_code(code: u8) -> Option<Removal> {
    let all =
        [Removal::Replaced, Removal::Deleted, Removal::Expired, Removal::Vanished, Removal::Operator, Removal::Evicted];
    all.into_iter().find(|why| removal_code(*why) == code)
}

fn push_tag_spans(out: &mut Vec<u8>, canonical: &Canonical) {
    let mut end = 0;
    for span in &canonical.tag_spans {
        out.push(span.letter.as_byte() | if span.escaped { ESCAPED } else { 0 });
        push_varint(out, span.start - end);
        push_varint(out, span.len);
        end = span.start + span.len;
    }
}

/// LEB128, as protobuf has it.
fn push_varint(out: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_varint(rest: &mut &[u8]) -> Option<u32> {
    let mut number = 0;
    for shift in (0..32).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        number |= u32::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    /// A stored event without tags or content, for tests that need any.
    pub(crate) fn stored_event() -> StoredEvent<'static> {
        StoredEvent {
            id: EventId([1; 32]),
            pubkey: PublicKey([2; 32]),
            created_at: 3,
            kind: Kind(4),
            expiration: None,
            followers: 0,
            bare_d: false,
            tags: &[],
            json: Cow::Borrowed(b"{}"),
        }
    }
}
