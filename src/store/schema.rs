//! Every key and value of the index, schema version 1.
//!
//! One ordered key space; the first byte is the tree. Integers are big-endian and `created_at` is inverted, so a
//! forward scan runs newest first with ties by id, the order that NIP-01 asks for. Keys end in the record's place in
//! the log, so no two events share one. Long terms are cut or hashed: a key narrows down, the record decides. Look-ups
//! by id take its second half, since ids with proof of work (NIP-13) begin alike.
//!
//! ```text
//! at        log offset / 8                                                          5 bytes
//! class     record length: at most 512 << class                                     1
//! suffix    !created_at 8 · id[0..4] · at 5                                         17
//!
//! BY_ID     01 · id[16..32]                                        → at 5 · class 1
//! TIME      02 · suffix                                            → class 1 · kind 2
//! AUTHOR    03 · pubkey[0..8] · suffix                             → class 1 · kind 2
//! AUTHOR_KIND 04 · pubkey[0..8] · kind 2 · suffix                  → class 1 · kind 2
//! KIND      05 · kind 2 · suffix                                   → class 1 · kind 2
//! TAG       06 · letter 1 · sha256(value)[0..8] · suffix           → class 1 · kind 2
//! ADDRESS   07 · sha256(kind 2 · pubkey 32 · d)[0..16]             → at 5 · class 1
//! DELETED_ID      08 · id[16..32] · requester[0..8] · at 5          →            (at: the request's record)
//! DELETED_ADDRESS 09 · address hash 16 · !created_at 8 · at 5      →            (of the request)
//! VANISHED  0a · pubkey[0..16] · !created_at 8 · at 5              →            (of the request)
//! EXPIRES   0b · expiration 8 · at 5                               → class 1
//! COUNTER   0c · name 1                                            → number 7
//! GONE_VERSION    0d · address hash 16 · !created_at 8 · id[0..6]  →            (of the deleted version)
//! ```

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use crate::protocol::event::Fields;
use crate::protocol::supersede::{Address, Target, Version, deletion_target};
use crate::protocol::{EventId, Kind, PublicKey, TagLetter};

use super::index::{Change, KEY_BYTES_MAX, Key, Value};
use super::plan::Stretch;
use super::record::{ALIGN, GoneVersion, StoredEvent};

/// Version of the layouts on this page. A different one on disk is rebuilt from the log.
pub const SCHEMA_VERSION: u32 = 1;

const BY_ID: u8 = 1;
const TIME: u8 = 2;
const AUTHOR: u8 = 3;
const AUTHOR_KIND: u8 = 4;
const KIND: u8 = 5;
const TAG: u8 = 6;
const ADDRESS: u8 = 7;
const DELETED_ID: u8 = 8;
const DELETED_ADDRESS: u8 = 9;
const VANISHED: u8 = 10;
const EXPIRES: u8 = 11;
const COUNTER: u8 = 12;
const GONE_VERSION: u8 = 13;

const SUFFIX_LEN: usize = 17;
const SMALLEST_CLASS_BYTES: usize = 512;

/// Where a record lies, as the index remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Byte in the log.
    pub offset: u64,
    /// Length class: reading this many bytes gets the whole record.
    pub class: u8,
}

impl Place {
    /// The place of a record of `len` bytes at `offset`.
    pub fn new(offset: u64, len: u32) -> Self {
        let class = (len as usize).div_ceil(SMALLEST_CLASS_BYTES).next_power_of_two().trailing_zeros();
        Place { offset, class: class as u8 }
    }

    /// How many bytes to read so as to get the whole record.
    pub fn read_len(self) -> usize {
        SMALLEST_CLASS_BYTES << self.class.min(15)
    }
}

/// A stretch of keys that share a prefix and run newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Prefix(Key);

/// A position in the newest-first order: `!created_at`, id prefix, place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Suffix([u8; SUFFIX_LEN]);

impl Suffix {
    /// The position of a stored event.
    pub fn of(event: &StoredEvent<'_>, offset: u64) -> Suffix {
        Suffix(suffix(event, offset))
    }

    /// When the event says it was made.
    pub fn created_at(&self) -> u64 {
        !u64::from_be_bytes(self.0[..8].try_into().expect("8 bytes"))
    }

    /// Where the record begins.
    pub fn offset(&self) -> u64 {
        offset_from(&self.0[12..])
    }

    /// Whether two positions differ only in where their records lie, so that only their full ids can order them.
    pub fn ties_with(&self, other: &Suffix) -> bool {
        self.0[..12] == other.0[..12]
    }
}

impl Prefix {
    /// Where the index keeps these events together.
    pub fn of(stretch: Stretch<'_>) -> Self {
        match stretch {
            Stretch::Time => Prefix::time(),
            Stretch::Author(author) => Prefix::author(author),
            Stretch::AuthorKind(author, kind) => Prefix::author_kind(author, kind),
            Stretch::Kind(kind) => Prefix::kind(kind),
            Stretch::Tag(letter, value) => Prefix::tag(letter, value),
        }
    }

    /// Every event.
    pub fn time() -> Self {
        Prefix(key(&[&[TIME]]))
    }

    /// An author's events.
    pub fn author(author: &PublicKey) -> Self {
        Prefix(key(&[&[AUTHOR], &author.0[..8]]))
    }

    /// An author's events of a kind.
    pub fn author_kind(author: &PublicKey, kind: Kind) -> Self {
        Prefix(key(&[&[AUTHOR_KIND], &author.0[..8], &kind.0.to_be_bytes()]))
    }

    /// The events of a kind.
    pub fn kind(kind: Kind) -> Self {
        Prefix(key(&[&[KIND], &kind.0.to_be_bytes()]))
    }

    /// The events with a tag value.
    pub fn tag(letter: TagLetter, value: &str) -> Self {
        Prefix(key(&[&[TAG, letter.as_byte()], &sha256(&[value.as_bytes()])[..8]]))
    }

    /// First key with `created_at <= until`.
    pub fn start(&self, until: u64) -> Key {
        key(&[&self.0, &(!until).to_be_bytes()])
    }

    /// First key behind those with `created_at >= since`.
    pub fn end(&self, since: u64) -> Key {
        match since.checked_sub(1) {
            Some(before) => key(&[&self.0, &(!before).to_be_bytes()]),
            None => key(&[&self.0, &[0xff; SUFFIX_LEN]]),
        }
    }

    /// The key at a position.
    pub fn key_of(&self, suffix: &Suffix) -> Key {
        key(&[&self.0, &suffix.0])
    }

    /// The part of a key behind this prefix.
    pub fn suffix_of(&self, key: &Key) -> Option<Suffix> {
        key.as_slice().strip_prefix(self.0.as_slice())?.try_into().ok().map(Suffix)
    }
}

/// Reads the value beside a [`Prefix`] key.
pub fn place_and_kind(suffix: &Suffix, value: &Value) -> Option<(Place, Kind)> {
    let &[class, high, low] = value.as_slice() else { return None };
    Some((Place { offset: suffix.offset(), class }, Kind(u16::from_be_bytes([high, low]))))
}

/// Key of an event by its id.
pub fn by_id(id: &EventId) -> Key {
    key(&[&[BY_ID], &id.0[16..]])
}

/// Key of the current version at an address.
pub fn by_address(address: &Address) -> Key {
    key(&[&[ADDRESS], &address_hash(address)])
}

/// Reads the value of [`by_id`] and [`by_address`].
pub fn place(value: &Value) -> Option<Place> {
    let (at, class) = value.as_slice().split_at_checked(5)?;
    let &[class] = class else { return None };
    Some(Place { offset: offset_from(at), class })
}

/// Keys of the requests by `requester` to delete `id`: from, to.
pub fn deleted_id_range(id: &EventId, requester: &PublicKey) -> (Key, Key) {
    range(&[&[DELETED_ID], &id.0[16..], &requester.0[..8]])
}

/// Keys of the requests to delete an address, the latest first: from, to.
pub fn deleted_address_range(address: &Address) -> (Key, Key) {
    range(&[&[DELETED_ADDRESS], &address_hash(address)])
}

/// Keys of the deleted versions of an address, the one that replaces the others first: from, to.
pub fn gone_version_range(address: &[u8; 16]) -> (Key, Key) {
    range(&[&[GONE_VERSION], address])
}

/// Key of a deleted version.
pub fn gone_version(gone: &GoneVersion) -> Key {
    let created_at = (!gone.version.created_at).to_be_bytes();
    key(&[&[GONE_VERSION], &gone.address, &created_at, &gone.version.id.0[..6]])
}

/// The version in a key of [`gone_version_range`]. Its id is cut to 6 bytes, so among versions of the same second it
/// covers any whose id begins alike.
pub fn gone_version_of(key: &Key) -> Option<Version> {
    let mut id = [0; 32];
    id[..6].copy_from_slice(key.as_slice().get(25..31)?);
    Some(Version { created_at: request_created_at(key)?, id: EventId(id) })
}

/// Keys of a key's requests to vanish, the latest first: from, to.
pub fn vanished_range(pubkey: &PublicKey) -> (Key, Key) {
    range(&[&[VANISHED], &pubkey.0[..16]])
}

/// Keys of all requests to vanish: from, to.
pub fn vanished_all() -> (Key, Key) {
    range(&[&[VANISHED]])
}

/// The `created_at` in a key of [`deleted_address_range`] or [`vanished_range`].
pub fn request_created_at(key: &Key) -> Option<u64> {
    let inverted = key.as_slice().get(17..25)?;
    Some(!u64::from_be_bytes(inverted.try_into().ok()?))
}

/// Keys of the events that expire up to `now`, the earliest first: from, to.
pub fn expired_range(now: u64) -> (Key, Key) {
    (key(&[&[EXPIRES]]), key(&[&[EXPIRES], &now.saturating_add(1).to_be_bytes()]))
}

/// Keys of the events that expire later than `now`, the earliest first: from, to.
pub fn expiring_after(now: u64) -> (Key, Key) {
    let (_, to) = range(&[&[EXPIRES]]);
    (expired_range(now).1, to)
}

/// Reads a key and value of [`expired_range`] and [`expiring_after`].
pub fn expired_place(key: &Key, value: &Value) -> Option<Place> {
    let &[class] = value.as_slice() else { return None };
    Some(Place { offset: offset_from(key.as_slice().get(9..14)?), class })
}

/// All keys of the tree by id: from, to.
pub fn all_ids() -> (Key, Key) {
    range(&[&[BY_ID]])
}

/// All keys of requests to delete an id: from, to.
pub fn all_deleted_ids() -> (Key, Key) {
    range(&[&[DELETED_ID]])
}

/// The second half of the id in a key of [`all_ids`] or [`all_deleted_ids`].
pub fn id_half(key: &Key) -> Option<[u8; 16]> {
    key.as_slice().get(1..17)?.try_into().ok()
}

/// All keys: from, to.
pub fn everything() -> (Key, Key) {
    range(&[])
}

/// Whether a key is that of a counter.
pub fn is_counter(key: &Key) -> bool {
    key.first() == Some(&COUNTER)
}

/// What is counted along with the index, in the same run as the entries it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Events that can be read.
    Events = 1,
    /// Bytes of the log that compaction would free.
    DeadBytes = 2,
    /// The log offset up to which the other two have counted. Behind a crash it may lie before or after the offset
    /// that the index is known to reach, and replay must not count twice.
    CountedUpTo = 3,
}

/// All counters, as they stand at `log_end`.
pub fn counters(events: u64, dead_bytes: u64, log_end: u64) -> [Change; 3] {
    let all = [(Counter::Events, events), (Counter::DeadBytes, dead_bytes), (Counter::CountedUpTo, log_end)];
    all.map(|(which, number)| (counter(which), Some(counter_value(number))))
}

/// Key of a counter.
pub fn counter(which: Counter) -> Key {
    key(&[&[COUNTER, which as u8]])
}

fn counter_value(number: u64) -> Value {
    Value::new(&number.to_be_bytes()[1..])
}

/// Reads the value of a counter.
pub fn counter_number(value: &Value) -> Option<u64> {
    let bytes: [u8; 7] = value.as_slice().try_into().ok()?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The index entries of a stored event: all that point at it, and nothing else.
pub fn entries(event: &StoredEvent<'_>, at: Place) -> Vec<Change> {
    let suffix = suffix(event, at.offset);
    let [high, low] = event.kind.0.to_be_bytes();
    let row = Value::new(&[at.class, high, low]);
    let mut all = Vec::with_capacity(16);
    all.push((by_id(&event.id), Some(place_value(at))));
    let mut add = |prefix: Prefix| all.push((key(&[&prefix.0, &suffix]), Some(row)));
    add(Prefix::time());
    add(Prefix::author(&event.pubkey));
    add(Prefix::author_kind(&event.pubkey, event.kind));
    add(Prefix::kind(event.kind));
    let tags: BTreeSet<Prefix> = event.indexed_tags().map(|(letter, value)| Prefix::tag(letter, &value)).collect();
    tags.into_iter().for_each(&mut add);
    if let Some(address) = event.address() {
        all.push((by_address(&address), Some(place_value(at))));
    }
    if let Some(expiration) = event.expiration {
        let expires = key(&[&[EXPIRES], &expiration.to_be_bytes(), &offset_bytes(at.offset)]);
        all.push((expires, Some(Value::new(&[at.class]))));
    }
    all.extend(tombstones(event, at).into_iter().map(|tombstone| (tombstone, Some(Value::new(&[])))));
    all
}

/// What a deletion request or a request to vanish leaves behind for events that come later.
fn tombstones(request: &StoredEvent<'_>, at: Place) -> Vec<Key> {
    match request.kind {
        Kind::DELETION => {
            let tags = request.indexed_tags();
            let targets = tags.filter_map(|(letter, value)| deletion_target(&request.pubkey, letter, &value));
            let keys: BTreeSet<Key> = targets.map(|target| tombstone(request, at, &target)).collect();
            keys.into_iter().collect()
        }
        Kind::VANISH => {
            let until = (!request.created_at).to_be_bytes();
            vec![key(&[&[VANISHED], &request.pubkey.0[..16], &until, &offset_bytes(at.offset)])]
        }
        _ => Vec::new(),
    }
}

fn tombstone(request: &StoredEvent<'_>, at: Place, target: &Target) -> Key {
    let at = offset_bytes(at.offset);
    match target {
        Target::Event(id) => key(&[&[DELETED_ID], &id.0[16..], &request.pubkey.0[..8], &at]),
        Target::Address(address) => {
            let until = (!request.created_at).to_be_bytes();
            key(&[&[DELETED_ADDRESS], &address_hash(address), &until, &at])
        }
    }
}

fn suffix(event: &StoredEvent<'_>, offset: u64) -> [u8; SUFFIX_LEN] {
    let mut suffix = [0; SUFFIX_LEN];
    suffix[..8].copy_from_slice(&(!event.created_at).to_be_bytes());
    suffix[8..12].copy_from_slice(&event.id().0[..4]);
    suffix[12..].copy_from_slice(&offset_bytes(offset));
    suffix
}

fn place_value(at: Place) -> Value {
    let [a, b, c, d, e] = offset_bytes(at.offset);
    Value::new(&[a, b, c, d, e, at.class])
}

fn offset_bytes(offset: u64) -> [u8; 5] {
    let bytes = (offset / ALIGN as u64).to_be_bytes();
    bytes[3..].try_into().expect("5 bytes")
}

fn offset_from(at: &[u8]) -> u64 {
    at.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)) * ALIGN as u64
}

/// An address as the index names it.
pub fn address_hash(address: &Address) -> [u8; 16] {
    let hash = sha256(&[&address.kind.0.to_be_bytes(), &address.pubkey.0, address.d.as_bytes()]);
    hash[..16].try_into().expect("16 bytes")
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

fn key(parts: &[&[u8]]) -> Key {
    let mut bytes = [0; KEY_BYTES_MAX];
    let mut len = 0;
    for part in parts {
        bytes[len..len + part.len()].copy_from_slice(part);
        len += part.len();
    }
    Key::new(&bytes[..len])
}

fn range(prefix: &[&[u8]]) -> (Key, Key) {
    let from = key(prefix);
    let mut to = from.as_slice().to_vec();
    to.resize(KEY_BYTES_MAX, 0xff);
    (from, Key::new(&to))
}

/// Whether a key's value says where the one event lies that it stands for: by id, by address.
pub fn holds_a_place(key: &Key) -> bool {
    matches!(key.first(), Some(&BY_ID | &ADDRESS))
}

/// The ids that a deletion request names: the filter on ids has to know them.
pub fn named_ids(event: &StoredEvent<'_>) -> impl Iterator<Item = EventId> {
    let tags = event.indexed_tags().filter(|_| event.kind == Kind::DELETION);
    tags.filter_map(|(letter, value)| match deletion_target(&event.pubkey, letter, &value)? {
        Target::Event(id) => Some(id),
        Target::Address(_) => None,
    })
}
