//! The bytes of a reconciliation message: bounds, modes, fingerprints and lists of ids (NIP-77, appendix).

use super::VERSION;
use crate::protocol::EventId;
use crate::protocol::item::{Item, push_varint};

/// Why bytes are no message. `Display` is for the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// There is not even a version.
    #[error("the message is empty")]
    Empty,
    /// A first byte that is no version of the protocol, or none that both sides know.
    #[error("version {0:#04x} of the protocol is not known")]
    Version(u8),
    /// It ends in the middle of something.
    #[error("the message ends too early")]
    Short,
    /// A number above 2^64.
    #[error("a number is too large")]
    Number,
    /// A mode that does not exist.
    #[error("mode {0} of a range is not known")]
    Mode(u64),
    /// An id prefix of more than 32 bytes.
    #[error("an id prefix has {0} bytes")]
    Prefix(u64),
    /// Ranges run backwards.
    #[error("the ranges are not in order")]
    Order,
}

/// What a range says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Skip = 0,
    Fingerprint = 1,
    Ids = 2,
}

/// The end of a range: a time, and as much of an id as tells its first event from the last one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    at: Item,
    prefix_len: usize,
}

impl Bound {
    /// Before everything.
    pub const START: Bound = Bound { at: Item::FIRST, prefix_len: 0 };
    /// Behind everything.
    pub const END: Bound = Bound { at: Item::END, prefix_len: 0 };

    /// At the beginning of a second.
    pub fn at(created_at: u64) -> Bound {
        Bound { at: Item::at(created_at), prefix_len: 0 }
    }

    /// Exactly before an event.
    pub fn of(item: &Item) -> Bound {
        Bound { at: *item, prefix_len: 32 }
    }

    /// The shortest bound between two events that follow each other.
    pub fn between(before: &Item, item: &Item) -> Bound {
        if before.created_at != item.created_at {
            return Bound::at(item.created_at);
        }
        let shared = before.id.0.iter().zip(&item.id.0).take_while(|(a, b)| a == b).count();
        let prefix_len = (shared + 1).min(32);
        let mut id = [0; 32];
        id[..prefix_len].copy_from_slice(&item.id.0[..prefix_len]);
        Bound { at: Item { created_at: item.created_at, id: EventId(id) }, prefix_len }
    }

    /// The first place behind the range.
    pub fn item(&self) -> Item {
        self.at
    }
}

/// A message being read.
#[derive(Debug)]
pub(super) struct Reader {
    bytes: Vec<u8>,
    at: usize,
    last_created_at: u64,
}

impl Reader {
    pub(super) fn new(bytes: Vec<u8>, at: usize) -> Reader {
        Reader { bytes, at, last_created_at: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    fn take(&mut self, len: usize) -> Result<&[u8], Malformed> {
        let end = self.at.checked_add(len).ok_or(Malformed::Short)?;
        let taken = self.bytes.get(self.at..end).ok_or(Malformed::Short)?;
        self.at = end;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut number = 0_u64;
        loop {
            let byte = self.take(1)?[0];
            if number > u64::MAX >> 7 {
                return Err(Malformed::Number);
            }
            number = number << 7 | u64::from(byte & 0x7f);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
    }

    pub(super) fn bound(&mut self) -> Result<Bound, Malformed> {
        let created_at = match self.varint()? {
            0 => u64::MAX,
            offset => self.last_created_at.saturating_add(offset - 1),
        };
        self.last_created_at = created_at;
        let prefix_len = self.varint()?;
        let len = usize::try_from(prefix_len).ok().filter(|len| *len <= 32).ok_or(Malformed::Prefix(prefix_len))?;
        let mut id = [0; 32];
        id[..len].copy_from_slice(self.take(len)?);
        Ok(Bound { at: Item { created_at, id: EventId(id) }, prefix_len: len })
    }

    pub(super) fn mode(&mut self) -> Result<Mode, Malformed> {
        match self.varint()? {
            0 => Ok(Mode::Skip),
            1 => Ok(Mode::Fingerprint),
            2 => Ok(Mode::Ids),
            other => Err(Malformed::Mode(other)),
        }
    }

    pub(super) fn fingerprint(&mut self) -> Result<[u8; 16], Malformed> {
        Ok(self.take(16)?.try_into().expect("16 bytes were taken"))
    }

    /// Ids, all of which are there: the count is the other side's word.
    pub(super) fn ids(&mut self) -> Result<impl Iterator<Item = EventId> + '_, Malformed> {
        let count = usize::try_from(self.varint()?).map_err(|_| Malformed::Short)?;
        let bytes = self.take(count.checked_mul(32).ok_or(Malformed::Short)?)?;
        Ok(bytes.chunks_exact(32).map(|id| EventId(id.try_into().expect("32 bytes"))))
    }
}

/// A message being written.
#[derive(Debug)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    last_created_at: u64,
}

impl Writer {
    pub(super) fn new() -> Writer {
        Writer { bytes: vec![VERSION], last_created_at: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Takes back what was written last. Only the range that ends at infinity may follow: times are told as
    /// differences, and infinity is not.
    pub(super) fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn begin(&mut self, bound: &Bound, mode: Mode) {
        let Item { created_at, id } = bound.at;
        let offset = match created_at {
            u64::MAX => 0,
            _ => created_at.saturating_sub(self.last_created_at) + 1,
        };
        self.last_created_at = created_at;
        push_varint(&mut self.bytes, offset);
        push_varint(&mut self.bytes, bound.prefix_len as u64);
        self.bytes.extend_from_slice(&id.0[..bound.prefix_len]);
        push_varint(&mut self.bytes, mode as u64);
    }

    pub(super) fn skip(&mut self, to: &Bound) {
        self.begin(to, Mode::Skip);
    }

    pub(super) fn fingerprint(&mut self, to: &Bound, fingerprint: [u8; 16]) {
        self.begin(to, Mode::Fingerprint);
        self.bytes.extend_from_slice(&fingerprint);
    }

    pub(super) fn ids<'i>(&mut self, to: &Bound, ids: impl ExactSizeIterator<Item = &'i EventId>) {
        self.begin(to, Mode::Ids);
        push_varint(&mut self.bytes, ids.len() as u64);
        ids.for_each(|id| self.bytes.extend_from_slice(&id.0));
    }
}
