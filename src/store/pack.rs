//! Compression of cold records: each by itself, so that one can be read or erased alone.
//!
//! What the header already says (id, key, time, kind) is left out of the JSON, the signature is kept as bytes, and the
//! rest (tags and content) is compressed by zstd with a dictionary trained on the store's own events. Reading puts the
//! very same JSON together again; what could not be put together again is never packed.

use std::io::{Cursor, Write};
use std::sync::{Mutex, PoisonError};

use zstd::bulk::{Compressor, Decompressor};

use super::StoreError;
use super::record::{PAYLOAD_BYTES_MAX, PackedEvent, StoredEvent};
use crate::protocol::Signature;
use crate::protocol::bytes::push_hex;

/// zstd's fast mode: level 3 would save another tenth of the log and double the time to read a record.
const LEVEL: i32 = -1;
/// Bytes of a trained dictionary. Every reading thread holds one.
const DICTIONARY_BYTES: usize = 64 * 1024;
/// Bytes of samples for the training; more make no better dictionary.
pub const SAMPLE_BYTES_MAX: usize = 100 * DICTIONARY_BYTES;
/// With fewer samples there is nothing to learn, and little to save.
pub const SAMPLES_MIN: usize = 1_000;

const ID_KEY: &[u8] = b"{\"id\":\"";
const PUBKEY_KEY: &[u8] = b"\",\"pubkey\":\"";
const ID_HEX_LEN: usize = 64;
const SIG_KEY: &[u8] = b",\"sig\":\"";
const SIG_HEX_LEN: usize = 128;
const END: &[u8] = b"\"}";
const TAIL_LEN: usize = SIG_KEY.len() + SIG_HEX_LEN + END.len();

/// Compresses records with one dictionary.
pub struct Packer(Compressor<'static>);

/// Reads what was compressed with one dictionary, on any number of threads.
pub struct Unpacker {
    dictionary: Vec<u8>,
    idle: Mutex<Vec<Decompressor<'static>>>,
}

/// Tags and content of an event as they stand between the other fields, and its signature.
struct Parts<'e> {
    middle: &'e [u8],
    sig: Signature,
}

/// Learns a dictionary from the middles of events; see [`middle`].
pub fn train(middles: &[Vec<u8>]) -> Option<Vec<u8>> {
    if middles.len() < SAMPLES_MIN {
        return None;
    }
    zstd::dict::from_samples(middles, DICTIONARY_BYTES).ok()
}

/// The part of an event that is compressed, as a sample to learn from.
pub fn middle<'e>(event: &'e StoredEvent<'_>) -> Option<&'e [u8]> {
    Parts::of(event).map(|parts| parts.middle)
}

impl Packer {
    /// A packer for records of the log that has this dictionary.
    ///
    /// # Errors
    /// When zstd does not take the dictionary.
    pub fn new(dictionary: &[u8]) -> Result<Self, StoreError> {
        let mut compressor = Compressor::with_dictionary(LEVEL, dictionary).map_err(bad_dictionary)?;
        // The record has a checksum, and the log one dictionary.
        compressor.include_checksum(false).map_err(bad_dictionary)?;
        compressor.include_dictid(false).map_err(bad_dictionary)?;
        Ok(Packer(compressor))
    }

    /// What stands in place of the event's JSON; `None` when that would be no smaller, or not the same when read.
    pub fn pack(&mut self, event: &StoredEvent<'_>) -> Option<Vec<u8>> {
        let parts = Parts::of(event)?;
        let compressed = self.0.compress(parts.middle).ok()?;
        let mut body = Vec::with_capacity(68 + compressed.len());
        body.extend_from_slice(&parts.sig.0);
        body.extend_from_slice(&(parts.middle.len() as u32).to_le_bytes());
        body.extend_from_slice(&compressed);
        (body.len() < event.json.len()).then_some(body)
    }
}

impl Unpacker {
    /// An unpacker for the log that has this dictionary.
    ///
    /// # Errors
    /// When zstd does not take the dictionary.
    pub fn new(dictionary: Vec<u8>) -> Result<Self, StoreError> {
        let first = Decompressor::with_dictionary(&dictionary).map_err(bad_dictionary)?;
        Ok(Unpacker { dictionary, idle: Mutex::new(vec![first]) })
    }

    /// The dictionary.
    pub fn dictionary(&self) -> &[u8] {
        &self.dictionary
    }

    /// The event's JSON; `None` when the bytes are not what [`Packer::pack`] made.
    pub fn json(&self, event: &PackedEvent<'_>) -> Option<Vec<u8>> {
        let (sig, rest) = event.body.split_first_chunk::<64>()?;
        let (len, compressed) = rest.split_first_chunk::<4>()?;
        let len = u32::from_le_bytes(*len) as usize;
        if len > PAYLOAD_BYTES_MAX {
            return None;
        }
        // Decompressed where it stays, in a buffer of its exact size: to pass it on takes no copy.
        let head_len = head_len(&event.header);
        let mut json = Vec::with_capacity(head_len + len + TAIL_LEN);
        push_head(&mut json, &event.header);
        let mut rest = Cursor::new(json);
        rest.set_position(head_len as u64);
        let mut decompressor = self.take()?;
        let written = decompressor.decompress_to_buffer(compressed, &mut rest).ok()?;
        self.idle().push(decompressor);
        let mut json = rest.into_inner();
        if written != len || json.len() != head_len + len {
            return None;
        }
        json.extend_from_slice(SIG_KEY);
        push_hex(&mut json, sig);
        json.extend_from_slice(END);
        Some(json)
    }

    fn take(&self) -> Option<Decompressor<'static>> {
        let idle = self.idle().pop();
        idle.or_else(|| Decompressor::with_dictionary(&self.dictionary).ok())
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Decompressor<'static>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").field("dictionary_bytes", &self.dictionary.len()).finish_non_exhaustive()
    }
}

impl<'e> Parts<'e> {
    /// Takes the canonical JSON apart, and makes sure that it can be put together again.
    fn of(event: &'e StoredEvent<'_>) -> Option<Self> {
        let mut head = Vec::with_capacity(256);
        push_head(&mut head, event);
        let rest = event.json.strip_prefix(&head[..])?;
        let (middle, tail) = rest.split_at_checked(rest.len().checked_sub(TAIL_LEN)?)?;
        let hex = tail.strip_prefix(SIG_KEY)?.strip_suffix(END)?;
        let sig = Signature::from_hex(std::str::from_utf8(hex).ok()?)?;
        Some(Parts { middle, sig })
    }
}

/// The canonical JSON up to the tags; see [`crate::protocol::Event::canonical`].
fn push_head(json: &mut Vec<u8>, event: &StoredEvent<'_>) {
    json.extend_from_slice(ID_KEY);
    push_hex(json, &event.id.0);
    json.extend_from_slice(PUBKEY_KEY);
    push_hex(json, &event.pubkey.0);
    let written = write!(json, "\",\"created_at\":{},\"kind\":{},\"tags\":", event.created_at, event.kind);
    written.expect("a vector takes every write");
}

/// How long [`push_head`] makes it.
fn head_len(event: &StoredEvent<'_>) -> usize {
    let digits = |number: u64| number.checked_ilog10().map_or(1, |log| log as usize + 1);
    let keys = ID_KEY.len() + PUBKEY_KEY.len() + b"\",\"created_at\":,\"kind\":,\"tags\":".len();
    keys + 2 * ID_HEX_LEN + digits(event.created_at) + digits(event.kind.0.into())
}

fn bad_dictionary(error: std::io::Error) -> StoreError {
    StoreError::Damaged(format!("the log's compression dictionary cannot be used: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::sign;
    use crate::store::record::{self, Record};

    /// The record of a signed event with this content.
    fn put(n: u64, content: &str) -> Vec<u8> {
        let tags: &[&[&str]] = &[&["t", "nostr"], &["d"], &["r", "a\"\u{1}\n"]];
        let event = sign(7, 1, n, tags, content);
        let mut bytes = Vec::new();
        record::push_put(&mut bytes, &event);
        bytes
    }

    fn stored(bytes: &[u8]) -> StoredEvent<'_> {
        match record::decode(bytes).unwrap().0 {
            Record::Put(event) => event,
            other => panic!("unexpected {other:?}"),
        }
    }

    fn dictionary() -> Vec<u8> {
        let records = (0..2_000).map(|n| put(n, &format!("some words that come again and again, number {n}")));
        let middles: Vec<Vec<u8>> = records.map(|bytes| middle(&stored(&bytes)).unwrap().to_vec()).collect();
        assert_eq!(train(&middles[..10]), None, "too few to learn from");
        train(&middles).unwrap()
    }

    /// What comes out is what went in, to the byte, tags included; and it is smaller.
    #[test]
    fn packed_events_read_back_to_the_byte() {
        let dictionary = dictionary();
        let (mut packer, unpacker) = (Packer::new(&dictionary).unwrap(), Unpacker::new(dictionary).unwrap());
        for (n, content) in [
            (0, "some words that come again"),
            (10, ""),
            (1 << 53, "ünï\u{1}\"code\\ 🛷"),
            (99, &"long ".repeat(50_000)),
        ] {
            let plain = put(n, content);
            let event = stored(&plain);
            let mut bytes = Vec::new();
            record::push_packed(&mut bytes, &event, &packer.pack(&event).unwrap());
            assert!(bytes.len() < plain.len());
            let Record::Packed(packed) = record::decode(&bytes).unwrap().0 else { panic!("not packed") };
            let json = unpacker.json(&packed).unwrap();
            assert_eq!((&json[..], json.capacity()), (event.json.as_ref(), json.len()), "in a buffer of its size");
            let unpacked = packed.header.with_json(unpacker.json(&packed).unwrap());
            let mut again = Vec::new();
            record::push_plain(&mut again, &unpacked);
            assert_eq!(again, plain);
        }
    }

    /// JSON that is not canonical is not packed, and packed bytes that are cut or strange are not read.
    #[test]
    fn what_cannot_be_put_together_again_stays_as_it_is() {
        let dictionary = dictionary();
        let (mut packer, unpacker) = (Packer::new(&dictionary).unwrap(), Unpacker::new(dictionary).unwrap());
        let plain = put(1, "x");
        let text = String::from_utf8(stored(&plain).json.to_vec()).unwrap();
        let spaced = text.replacen("kind", " kind", 1).into_bytes();
        assert_eq!(packer.pack(&stored(&plain).with_json(spaced)), None);
        let body = packer.pack(&stored(&plain)).unwrap();
        for len in 0..body.len() {
            assert_eq!(unpacker.json(&PackedEvent { header: stored(&plain), body: &body[..len] }), None, "{len}");
        }
    }
}
