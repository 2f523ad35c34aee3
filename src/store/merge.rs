//! Many stretches of the index to one stream, newest first, each place once.
//!
//! Pure but for the source that it is given on each call: between calls it holds no lock and no iterator, only how
//! far it has come, so a query can rest for hours.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::vec;

use crate::protocol::Kind;

use super::index::{IndexError, Key, Value};
use super::schema::{Place, Prefix, Suffix, place_and_kind};

/// Entries that each of many stretches is asked for at first; each further helping is four times as large.
const FIRST_HELPING: usize = 16;
/// Entries for which there is room before any was found.
const FIRST_ROOM: usize = 128;
/// Entries that a stretch is asked for at most.
const LARGEST_HELPING: usize = 1024;

/// What a merge reads from: appends up to `limit` entries with `from <= key < to`, in key order.
pub trait Source {
    /// See [`Source`].
    ///
    /// # Errors
    /// When the index cannot be read.
    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError>;
}

/// One entry of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its position in the order.
    pub suffix: Suffix,
    /// Where its record lies.
    pub place: Place,
    /// The event's kind.
    pub kind: Kind,
}

/// The merged stream.
#[derive(Debug)]
pub struct Merge {
    cursors: Vec<Cursor>,
    /// The next entry of each cursor that has one.
    heads: BinaryHeap<Reverse<(Suffix, usize)>>,
    /// Cursors before this were opened.
    opened: usize,
    last: Option<Suffix>,
}

#[derive(Debug)]
struct Cursor {
    prefix: Prefix,
    /// Where the next helping begins; `None` when the stretch is used up.
    from: Option<Key>,
    to: Key,
    helping: usize,
    entries: vec::IntoIter<(Suffix, Value)>,
    head: Option<Value>,
}

impl Merge {
    /// Merges the entries of `prefixes` with `since <= created_at <= until`, of which about the first `wanted` are of
    /// interest: asking twice costs more than a few entries too many.
    pub fn new(prefixes: Vec<Prefix>, since: u64, until: u64, wanted: usize) -> Self {
        let share = wanted.saturating_add(1).div_ceil(prefixes.len().max(1));
        let helping = share.clamp(FIRST_HELPING, LARGEST_HELPING);
        let cursors = prefixes.into_iter().map(|prefix| Cursor {
            from: Some(prefix.start(until)),
            to: prefix.end(since),
            prefix,
            helping,
            entries: Vec::new().into_iter(),
            head: None,
        });
        Merge { cursors: cursors.collect(), heads: BinaryHeap::new(), opened: 0, last: None }
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// When the source cannot be read; the stream can be continued.
    pub fn next(&mut self, source: &impl Source) -> Result<Option<Candidate>, IndexError> {
        while self.peek(source)?.is_some() {
            let Some(Reverse((suffix, index))) = self.heads.pop() else { break };
            let value = self.cursors[index].head.take();
            if let Err(error) = self.advance(index, source) {
                self.cursors[index].head = value;
                self.heads.push(Reverse((suffix, index)));
                return Err(error);
            }
            if self.last.replace(suffix) == Some(suffix) {
                continue; // the same event in another stretch
            }
            if let Some((place, kind)) = value.and_then(|value| place_and_kind(&suffix, &value)) {
                return Ok(Some(Candidate { suffix, place, kind }));
            }
        }
        Ok(None)
    }

    /// Opens up to `stretches` more stretches; whether all are open. What is not opened by this, [`Merge::next`] opens in
    /// one go: thousands of stretches take longer than a turn may.
    ///
    /// # Errors
    /// As [`Merge::next`].
    pub fn open(&mut self, stretches: usize, source: &impl Source) -> Result<bool, IndexError> {
        for _ in 0..stretches.min(self.cursors.len() - self.opened) {
            self.advance(self.opened, source)?;
            self.opened += 1;
        }
        Ok(self.opened == self.cursors.len())
    }

    /// The position of the next entry, without taking it. It may be one that [`Merge::next`] passes over as a repeat.
    ///
    /// # Errors
    /// As [`Merge::next`].
    pub fn peek(&mut self, source: &impl Source) -> Result<Option<Suffix>, IndexError> {
        while self.opened < self.cursors.len() {
            self.advance(self.opened, source)?;
            self.opened += 1;
        }
        Ok(self.heads.peek().map(|Reverse((suffix, _))| *suffix))
    }

    fn advance(&mut self, index: usize, source: &impl Source) -> Result<(), IndexError> {
        let cursor = &mut self.cursors[index];
        if let Some((suffix, value)) = cursor.next(source)? {
            cursor.head = Some(value);
            self.heads.push(Reverse((suffix, index)));
        }
        Ok(())
    }
}

impl Cursor {
    fn next(&mut self, source: &impl Source) -> Result<Option<(Suffix, Value)>, IndexError> {
        if let Some(entry) = self.entries.next() {
            return Ok(Some(entry));
        }
        let Some(from) = self.from else { return Ok(None) };
        let mut found = Vec::with_capacity(self.helping.min(FIRST_ROOM));
        source.scan(&from, &self.to, self.helping, &mut found)?;
        let full = found.len() >= self.helping;
        self.from = found.last().filter(|_| full).and_then(|(key, _)| key.successor());
        self.helping = (self.helping * 4).min(LARGEST_HELPING);
        let prefix = self.prefix;
        let entries: Vec<_> = found.iter().filter_map(|(key, value)| Some((prefix.suffix_of(key)?, *value))).collect();
        self.entries = entries.into_iter();
        Ok(self.entries.next())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// An empty index that counts how often it is asked.
    struct Counting(Cell<usize>);

    impl Source for Counting {
        fn scan(&self, _: &[u8], _: &[u8], _: usize, _: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
            self.0.set(self.0.get() + 1);
            Ok(())
        }
    }

    /// A thousand stretches are opened in portions, each once, so that a query with many of them can rest in between.
    #[test]
    fn stretches_are_opened_in_portions() {
        let (source, prefixes) = (Counting(Cell::new(0)), (0..1_000).map(|kind| Prefix::kind(Kind(kind))));
        let mut merge = Merge::new(prefixes.collect(), 0, u64::MAX, 500);
        for opened in 1..=250 {
            assert_eq!(merge.open(4, &source).expect("it can be read"), opened == 250);
            assert_eq!(source.0.get(), opened * 4);
        }
        assert!(merge.open(4, &source).expect("it can be read"));
        assert_eq!(merge.next(&source).expect("it can be read"), None);
        assert_eq!(source.0.get(), 1_000);
    }
}
