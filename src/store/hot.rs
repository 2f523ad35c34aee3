//! Records that were an answer of late, in memory: what many ask for (the newest events, a popular author's, a known
//! id) takes no system call, no checksum and no decompression again.
//!
//! In: sound records, by where they lie. Out: the same bytes, shared with whoever still sends them. What is erased from the
//! log is forgotten in the same step, and a reader that began before cannot bring it back. Says nothing about whether a
//! record still counts: the index does.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Parts with a lock each, so that query threads seldom wait for one another.
const SHARDS: usize = 16;
/// A record that takes more than one part in so many of its shard is not kept: it would push out too many others. Lists
/// of contacts, which are long and much asked for, should fit.
const RECORDS_MIN: usize = 8;
/// Places in the order that may be left over in a part that keeps nothing.
const STALE_MAX: usize = 64;
/// What keeping a record takes beside its bytes, about.
const OVERHEAD_BYTES: usize = 128;

/// See the module.
#[derive(Debug, Default)]
pub struct Hot {
    shards: [Mutex<Shard>; SHARDS],
    shard_bytes_max: usize,
}

#[derive(Debug, Default)]
struct Shard {
    records: HashMap<u64, Kept>,
    /// Offsets in the order in which they are looked at when room is needed.
    order: VecDeque<u64>,
    bytes: usize,
    /// How often something was erased.
    erasures: u64,
}

#[derive(Debug)]
struct Kept {
    record: Bytes,
    /// Whether it was asked for since it was looked at last; then it stays for another round.
    asked_for: bool,
}

/// A record that is to be read from the log. What is read can be kept, unless something was erased meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Miss(u64);

impl Hot {
    /// Keeps up to `bytes_max` bytes; 0: nothing.
    pub fn new(bytes_max: usize) -> Self {
        Hot { shards: Default::default(), shard_bytes_max: bytes_max / SHARDS }
    }

    /// The record that begins at `offset`.
    ///
    /// # Errors
    /// [`Miss`] when it is not here.
    pub fn get(&self, offset: u64) -> Result<Bytes, Miss> {
        if self.shard_bytes_max == 0 {
            return Err(Miss(0));
        }
        let mut shard = self.shard(offset);
        match shard.records.get_mut(&offset) {
            Some(kept) => {
                kept.asked_for = true;
                Ok(kept.record.clone())
            }
            None => Err(Miss(shard.erasures)),
        }
    }

    /// Keeps the record at `offset`, which was read after it was missed here.
    pub fn keep(&self, offset: u64, miss: Miss, record: &Bytes) {
        if record.len() > self.shard_bytes_max / RECORDS_MIN {
            return;
        }
        let mut shard = self.shard(offset);
        if shard.erasures != miss.0 || shard.records.contains_key(&offset) {
            return;
        }
        shard.bytes += record.len() + OVERHEAD_BYTES;
        shard.records.insert(offset, Kept { record: record.clone(), asked_for: false });
        shard.order.push_back(offset);
        shard.make_room(self.shard_bytes_max);
    }

    /// The records at these offsets were overwritten.
    pub fn forget(&self, offsets: impl Iterator<Item = u64>) {
        for offset in offsets {
            let mut shard = self.shard(offset);
            shard.erasures += 1;
            shard.take_out(offset);
            shard.tidy();
        }
    }

    fn shard(&self, offset: u64) -> MutexGuard<'_, Shard> {
        // Records begin at multiples of 8.
        let shard = &self.shards[(offset / 8) as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shard {
    fn make_room(&mut self, bytes_max: usize) {
        while self.bytes > bytes_max
            && let Some(offset) = self.order.pop_front()
        {
            match self.records.get_mut(&offset) {
                Some(kept) if kept.asked_for => {
                    kept.asked_for = false;
                    self.order.push_back(offset);
                }
                _ => self.take_out(offset),
            }
        }
    }

    /// What was erased leaves its place in the order behind. Where room is never needed, nobody would come by there.
    fn tidy(&mut self) {
        if self.order.len() > 2 * self.records.len() + STALE_MAX {
            let records = &self.records;
            self.order.retain(|offset| records.contains_key(offset));
        }
    }

    fn take_out(&mut self, offset: u64) {
        if let Some(kept) = self.records.remove(&offset) {
            self.bytes -= kept.record.len() + OVERHEAD_BYTES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(byte: u8, len: usize) -> Bytes {
        vec![byte; len].into()
    }

    /// Offsets that all lie in one shard.
    fn offset(number: u64) -> u64 {
        number * 8 * SHARDS as u64
    }

    fn is_kept(hot: &Hot, number: u64) -> bool {
        hot.get(offset(number)).is_ok()
    }

    fn read(hot: &Hot, number: u64, record: &Bytes) {
        if let Err(miss) = hot.get(offset(number)) {
            hot.keep(offset(number), miss, record);
        }
    }

    /// What is asked for again outlives a long scan of what is not, and the bytes stay within bounds.
    #[test]
    fn what_is_asked_for_again_stays() {
        let hot = Hot::new(SHARDS * 10 * (1_000 + OVERHEAD_BYTES));
        let popular = record(1, 1_000);
        for number in 0..1_000 {
            read(&hot, 0, &popular);
            read(&hot, number + 1, &record(2, 1_000));
            assert!(hot.shard(0).bytes <= hot.shard_bytes_max);
        }
        assert!(is_kept(&hot, 0) && is_kept(&hot, 1_000) && !is_kept(&hot, 900));
        assert_eq!(hot.shard(0).records.len(), 10);
        assert_eq!(hot.get(offset(0)).ok(), Some(popular));
    }

    /// What is erased is gone, and a reader that had read it before cannot bring it back; one that reads after may keep.
    #[test]
    fn what_is_erased_is_forgotten() {
        let hot = Hot::new(1 << 20);
        read(&hot, 1, &record(1, 100));
        let before = hot.get(offset(2)).expect_err("not read yet");
        hot.forget([offset(1), offset(2)].into_iter());
        assert!(!is_kept(&hot, 1));
        hot.keep(offset(2), before, &record(2, 100));
        assert!(!is_kept(&hot, 2));
        read(&hot, 2, &record(3, 100));
        assert_eq!(hot.get(offset(2)).ok(), Some(record(3, 100)));
        assert_eq!(hot.shard(0).bytes, 100 + OVERHEAD_BYTES);
    }

    /// Records that are read and erased again and again leave nothing behind, though the cache is never full.
    #[test]
    fn what_is_erased_leaves_no_trace() {
        let hot = Hot::new(1 << 20);
        for number in 0..10_000 {
            read(&hot, number, &record(1, 100));
            hot.forget([offset(number)].into_iter());
        }
        let shard = hot.shard(offset(0));
        assert!(shard.bytes == 0 && shard.order.len() <= STALE_MAX, "{}", shard.order.len());
    }

    /// Very long records, and a cache of nothing.
    #[test]
    fn some_are_not_kept() {
        let hot = Hot::new(SHARDS * RECORDS_MIN * 1_000);
        read(&hot, 1, &record(1, 1_000));
        read(&hot, 2, &record(1, 1_001));
        assert!(is_kept(&hot, 1) && !is_kept(&hot, 2));
        let none = Hot::default();
        read(&none, 1, &record(1, 1));
        none.forget([offset(1)].into_iter());
        assert!(!is_kept(&none, 1));
    }
}
