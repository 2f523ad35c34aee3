//! The index: an ordered key space on disk that answers "where in the event log".
//!
//! Nothing here is the truth. The event log is; an index that is lost, damaged or
//! of an older layout is thrown away and built again from the log. So an engine
//! may fail, and says so with [`IndexError`], but it must never answer wrongly,
//! hang the open, or take the process down.
//!
//! [`Index`] is the boundary: an [`Engine`], [`sled`] or [`fjall`], stands behind it and
//! [`buffer`] in front. What the keys mean is the business of the schema, not of this folder.

mod ballast;
pub mod bloom;
pub mod buffer;
pub mod fjall;
mod guard;
pub mod room;
pub mod sled;
#[cfg(test)]
mod suite;

use std::cmp::Ordering;
use std::fmt;
use std::io;
use std::num::NonZeroU8;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Most bytes in a key.
pub const KEY_BYTES_MAX: usize = 31;
/// Most bytes in a value: what sled keeps inside the leaf instead of on the heap.
pub const VALUE_BYTES_MAX: usize = 7;

/// An index key, stored inline: 32 bytes, no heap.
///
/// Ordered like its bytes, a prefix before what it is a prefix of. The bytes are
/// zero-padded and the length comes last, so that order is the order of the 32
/// bytes as one big-endian number, and comparing takes two machine comparisons
/// instead of a call to `memcmp`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; KEY_BYTES_MAX + 1]);

impl Key {
    /// The key of these bytes.
    ///
    /// # Panics
    /// On more than [`KEY_BYTES_MAX`] bytes: the schema's layouts are fixed and
    /// hash whatever does not fit.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Key {
        assert!(bytes.len() <= KEY_BYTES_MAX, "an index key has at most {KEY_BYTES_MAX} bytes");
        let mut padded = [0; KEY_BYTES_MAX + 1];
        padded[..bytes.len()].copy_from_slice(bytes);
        padded[KEY_BYTES_MAX] = bytes.len() as u8;
        Key(padded)
    }

    /// The bytes it was made of.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0[..usize::from(self.0[KEY_BYTES_MAX])]
    }

    /// The smallest key above this one; `None` above the greatest key of all.
    #[must_use]
    pub fn successor(&self) -> Option<Key> {
        let bytes = self.as_slice();
        if bytes.len() < KEY_BYTES_MAX {
            let mut next = *self;
            next.0[KEY_BYTES_MAX] += 1;
            return Some(next);
        }
        // A full key has no longer ones above it: count up, dropping 0xff at the end.
        let last = bytes.iter().rposition(|byte| *byte != 0xff)?;
        let mut next = Key::new(&bytes[..=last]);
        next.0[last] += 1;
        Some(next)
    }

    fn halves(&self) -> (u128, u128) {
        let (high, low) = self.0.split_at(16);
        let number = |half: &[u8]| u128::from_be_bytes(half.try_into().expect("half of 32 bytes is 16 bytes"));
        (number(high), number(low))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Key) -> Ordering {
        self.halves().cmp(&other.halves())
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Key) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Deref for Key {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex("Key", self.as_slice(), f)
    }
}

/// An index value, stored inline: 8 bytes, no heap.
///
/// The length is kept plus one, which leaves a bit pattern for the `None` of
/// `Option<Value>`: a buffered change is then 40 bytes instead of 41.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Value {
    bytes: [u8; VALUE_BYTES_MAX],
    len_plus_one: NonZeroU8,
}

impl Value {
    /// The value of these bytes.
    ///
    /// # Panics
    /// On more than [`VALUE_BYTES_MAX`] bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Value {
        assert!(bytes.len() <= VALUE_BYTES_MAX, "an index value has at most {VALUE_BYTES_MAX} bytes");
        let mut padded = [0; VALUE_BYTES_MAX];
        padded[..bytes.len()].copy_from_slice(bytes);
        Value { bytes: padded, len_plus_one: NonZeroU8::MIN.saturating_add(bytes.len() as u8) }
    }

    /// The bytes it was made of.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len_plus_one.get() - 1)]
    }
}

impl Deref for Value {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex("Value", self.as_slice(), f)
    }
}

fn write_hex(name: &str, bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{name}(")?;
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
    write!(f, ")")
}

/// One change of the index: a key and its new value; `None` removes the key.
pub type Change = (Key, Option<Value>);

/// An ordered key space on disk. It can be thrown away and rebuilt from the event log.
///
/// One thread writes, many read. A reader meets a run that is being written
/// entry by entry; the buffer in front hides that, for it answers first.
pub trait Index: Send + Sync {
    /// The value of `key`.
    ///
    /// # Errors
    /// [`IndexError`] when the engine cannot read its files.
    fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError>;

    /// Appends up to `limit` entries with `from <= key < to`, in key order.
    ///
    /// # Errors
    /// [`IndexError`] when the engine cannot read its files.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError>;

    /// Writes changes that come in ascending key order, and makes them durable before it returns.
    ///
    /// `stop` is polled between chunks. Returns false when told to stop: then an
    /// unknown part of the run is written, and writing the run again is right,
    /// since a change is the same however often it is made.
    ///
    /// # Errors
    /// [`IndexError`] when the engine cannot write; the same holds for the run.
    fn write_run(&self, run: &mut dyn Iterator<Item = Change>, stop: &dyn Fn() -> bool) -> Result<bool, IndexError>;

    /// Bytes its files take on disk; 0 where that cannot be found out.
    fn bytes_on_disk(&self) -> u64;
}

/// What keeps the index on disk. The operator chooses; another choice rebuilds the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub enum Engine {
    /// sled 1.0 alpha: compressed leaves, many small reads cheap.
    #[default]
    Sled,
    /// The LSM tree of fjall: cheap to write, in little memory.
    Fjall,
}

impl Engine {
    /// Opens the index in `dir`, or makes an empty one where there is none. `cache_bytes` bounds
    /// what is kept in memory of what was read.
    ///
    /// # Errors
    /// [`IndexError::Damaged`] or [`IndexError::OpenTimeout`] when it has to be rebuilt: remove
    /// `dir` first. [`IndexError::Io`] when the directory is out of reach.
    pub fn open(self, dir: &Path, cache_bytes: u64, timeout: Duration) -> Result<Arc<dyn Index>, IndexError> {
        Ok(match self {
            Engine::Sled => Arc::new(sled::SledIndex::open(dir, cache_bytes, timeout)?),
            Engine::Fjall => Arc::new(fjall::FjallIndex::open(dir, cache_bytes, timeout)?),
        })
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Sled => "sled",
            Engine::Fjall => "fjall",
        })
    }
}

/// Why an index gave no answer. The event log is not touched by any of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The files cannot be trusted any more, or the engine has failed on them: rebuild from the log.
    #[error("the index is damaged: {0}")]
    Damaged(String),
    /// Opening took longer than a sound index takes: damaged in a way the engine does not notice.
    #[error("opening the index did not end within {0:?}")]
    OpenTimeout(Duration),
    /// The disk has too little room for a run; it is tried again.
    #[error("merging the index needs {needed_bytes} bytes and {free_bytes} are free")]
    NoRoom {
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// The buffer was closed and takes no more changes.
    #[error("the index is closed")]
    Closed,
    /// The write buffer is full, and there is no room on the disk to merge it.
    #[error("the index cannot take more entries: the disk is full")]
    DiskFull,
    /// The write buffer is full and the merge behind it keeps failing.
    #[error("the index cannot take more entries: {0}")]
    Full(String),
}

impl IndexError {
    /// Whether room on the disk would have helped.
    pub(super) fn is_for_want_of_room(&self) -> bool {
        match self {
            IndexError::NoRoom { .. } | IndexError::DiskFull => true,
            IndexError::Io { source, .. } => ballast::is_for_want_of_room(source),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// The buffer's bound is in entries, so their size is part of the memory budget.
    #[test]
    fn a_change_is_40_bytes() {
        assert_eq!(size_of::<Change>(), 40);
    }

    /// The greatest key has nothing above it; a run of 0xff at the end of a full key is dropped.
    #[test]
    fn successor_at_the_edges() {
        assert_eq!(Key::new(&[0xff; KEY_BYTES_MAX]).successor(), None);
        let mut full = [0xff; KEY_BYTES_MAX];
        full[0] = 4;
        assert_eq!(Key::new(&full).successor(), Some(Key::new(&[5])));
        assert_eq!(Key::new(b"ab").successor(), Some(Key::new(b"ab\0")));
    }

    /// Few distinct bytes and lengths at both ends: ties, prefixes and zero padding are common.
    fn key_bytes() -> impl Strategy<Value = Vec<u8>> {
        let bytes = |lengths| prop::collection::vec(prop::sample::select(vec![0u8, 1, 0xff]), lengths);
        prop_oneof![bytes(0..4), bytes(KEY_BYTES_MAX - 2..KEY_BYTES_MAX + 1)]
    }

    proptest! {
        /// Keys are ordered like the byte strings they hold and give them back.
        #[test]
        fn key_order_is_byte_order(a in key_bytes(), b in key_bytes()) {
            prop_assert_eq!(Key::new(&a).cmp(&Key::new(&b)), a.cmp(&b));
            let key = Key::new(&a);
            prop_assert_eq!(key.as_slice(), &a[..]);
        }

        /// No key lies between a key and its successor.
        #[test]
        fn successor_is_the_next_key(a in key_bytes(), b in key_bytes()) {
            let (a, b) = (Key::new(&a), Key::new(&b));
            match a.successor() {
                Some(next) => prop_assert!(a < next && !(a < b && b < next)),
                None => prop_assert!(b <= a),
            }
        }

        /// Values give back their bytes, whatever their length.
        #[test]
        fn value_round_trip(bytes in prop::collection::vec(any::<u8>(), 0..=VALUE_BYTES_MAX)) {
            let value = Value::new(&bytes);
            prop_assert_eq!(value.as_slice(), &bytes[..]);
        }
    }
}
