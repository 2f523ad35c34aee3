//! Room on the disk before an engine writes: engines take a full disk badly (sled takes no more writes until it is
//! opened again), and a run can wait in memory.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Change, Index, IndexError, Key, Value};

/// What an entry adds to the index, generously.
const ENTRY_BYTES: u64 = 64;
/// What changing an entry may rewrite beside what is there: a leaf.
const LEAF_BYTES: u64 = 4 * 1024;
/// What is rewritten before an engine gives the old place free.
const REWRITTEN_BYTES_MAX: u64 = 80 << 20;
/// What is left to the event log and the small files beside it.
const RESERVE_BYTES: u64 = 8 << 20;

/// An engine that is only given a run when the disk has room for it.
pub struct WithRoom {
    engine: Arc<dyn Index>,
    dir: PathBuf,
    free_bytes: Box<dyn Fn(&Path) -> u64 + Send + Sync>,
}

impl WithRoom {
    /// An engine with files in `dir`.
    pub fn new(engine: Arc<dyn Index>, dir: &Path) -> WithRoom {
        WithRoom { engine, dir: dir.to_owned(), free_bytes: Box::new(free_bytes) }
    }

    fn check(&self, needed_bytes: u64) -> Result<(), IndexError> {
        let free_bytes = (self.free_bytes)(&self.dir);
        if free_bytes < needed_bytes { Err(IndexError::NoRoom { needed_bytes, free_bytes }) } else { Ok(()) }
    }
}

/// A disk that does not tell has room: a needless refusal would be for ever.
fn free_bytes(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
}

impl Index for WithRoom {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError> {
        self.engine.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        self.engine.scan(from, to, limit, out)
    }

    fn write_run(&self, run: &mut dyn Iterator<Item = Change>, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        let entries = run.size_hint().0 as u64;
        let rewritten = (entries * LEAF_BYTES).min(self.engine.bytes_on_disk()).min(REWRITTEN_BYTES_MAX);
        self.check(entries * ENTRY_BYTES + rewritten + RESERVE_BYTES)?;
        // Others fill the disk meanwhile.
        let short = Cell::new(false);
        let stop_or_short = || {
            short.set(self.check(RESERVE_BYTES / 2).is_err());
            short.get() || stop()
        };
        let written = self.engine.write_run(run, &stop_or_short)?;
        if !written && short.get() {
            self.check(RESERVE_BYTES)?;
        }
        Ok(written)
    }

    fn bytes_on_disk(&self) -> u64 {
        self.engine.bytes_on_disk()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use super::*;

    /// Takes entries one by one, polling `stop` before each.
    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Index for Counting {
        fn get(&self, _key: &[u8]) -> Result<Option<Value>, IndexError> {
            Ok(None)
        }

        fn scan(&self, _: &[u8], _: &[u8], _: usize, _: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
            Ok(())
        }

        fn write_run(
            &self,
            run: &mut dyn Iterator<Item = Change>,
            stop: &dyn Fn() -> bool,
        ) -> Result<bool, IndexError> {
            for _ in run {
                if stop() {
                    return Ok(false);
                }
                self.0.fetch_add(1, Ordering::Relaxed);
            }
            Ok(true)
        }

        fn bytes_on_disk(&self) -> u64 {
            0
        }
    }

    /// Nothing is begun without room, what is begun ends when the room goes, and a stop is no lack of room.
    #[test]
    fn a_run_needs_room() {
        let run = || (0..10_u8).map(|number| (Key::new(&[number]), None)).collect::<Vec<Change>>();
        let (engine, free) = (Arc::new(Counting::default()), Arc::new(AtomicU64::new(0)));
        let told = free.clone();
        // Each look takes a tenth of the reserve.
        let free_bytes = Box::new(move |_: &Path| told.fetch_sub(RESERVE_BYTES / 10, Ordering::Relaxed));
        let index = WithRoom { engine: engine.clone(), dir: PathBuf::new(), free_bytes };
        let written = |free_bytes, stop: bool| {
            free.store(free_bytes, Ordering::Relaxed);
            engine.0.store(0, Ordering::Relaxed);
            let result = index.write_run(&mut run().into_iter(), &|| stop);
            (result, engine.0.load(Ordering::Relaxed))
        };
        assert!(matches!(written(RESERVE_BYTES, false), (Err(IndexError::NoRoom { .. }), 0)));
        assert!(matches!(written(RESERVE_BYTES + 10 * ENTRY_BYTES, false), (Err(IndexError::NoRoom { .. }), 5)));
        assert!(matches!(written(3 * RESERVE_BYTES, true), (Ok(false), 0)));
        assert!(matches!(written(3 * RESERVE_BYTES, false), (Ok(true), 10)));
    }
}
