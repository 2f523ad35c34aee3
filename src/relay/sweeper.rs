//! Expired events (NIP-40) are hidden on time by every query; the sweeper has them removed, round by round, and then what
//! the rules of retention do not keep.
//!
//! It has no thread of its own: the writer asks it what is due, since only the writer writes.

use std::time::{Duration, Instant};

use crate::store::{Retained, Store};

/// Events removed in one go; publishers wait behind it.
const SWEEP_EVENTS_MAX: usize = 1_000;

/// When to sweep next.
#[derive(Debug)]
pub struct Sweeper {
    every: Duration,
    next: Instant,
}

impl Sweeper {
    /// Sweeps at once, then `every` so often.
    pub fn new(every: Duration) -> Self {
        Sweeper { every, next: Instant::now() }
    }

    /// Time until the next sweep; zero when it is due.
    pub fn due_in(&self, instant: Instant) -> Duration {
        self.next.saturating_duration_since(instant)
    }

    /// Makes the next sweep due now.
    pub fn sweep_soon(&mut self, instant: Instant) {
        self.next = instant;
    }

    /// Removes events that have expired by `now` (seconds since 1970), and when there are none left, those that are not
    /// to be kept. Where there are more than one sweep takes, the next one is due at once, with waiting events between
    /// them.
    pub fn sweep(&mut self, store: &dyn Store, now: u64, instant: Instant) {
        let more = Self::sweep_expired(store, now) || Self::retain(store, now);
        self.next = if more { instant } else { instant + self.every };
    }

    /// Returns whether there may be more.
    fn sweep_expired(store: &dyn Store, now: u64) -> bool {
        let removed = match store.sweep_expired(now, SWEEP_EVENTS_MAX) {
            Ok(removed) => removed,
            Err(error) => {
                tracing::warn!(%error, "expired events could not be removed; they stay hidden");
                0
            }
        };
        if removed > 0 {
            tracing::debug!(removed, "expired events removed");
        }
        removed >= SWEEP_EVENTS_MAX
    }

    /// Returns whether there may be more.
    fn retain(store: &dyn Store, now: u64) -> bool {
        match store.retain(now, SWEEP_EVENTS_MAX) {
            Ok(Retained { removed, more }) => {
                if removed > 0 {
                    tracing::debug!(removed, "old events removed");
                }
                more
            }
            Err(error) => {
                tracing::warn!(%error, "old events could not be removed");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::Verified;
    use crate::protocol::testing::{Author, NOW};
    use crate::store::memory::MemoryStore;

    /// A full sweep is followed by another at once, a partial one by a pause.
    #[test]
    fn rounds_follow_each_other_until_nothing_is_left() {
        let store = MemoryStore::new();
        let tags = [vec!["expiration".to_owned(), (NOW + 1).to_string()]];
        let event = |number| Verified::check(Author::new(1).event(1, NOW, &tags, &format!("{number}"))).unwrap();
        let events: Vec<_> = (0..SWEEP_EVENTS_MAX + 1).map(event).collect();
        store.apply(&events, NOW).unwrap();
        let start = Instant::now();
        let mut sweeper = Sweeper::new(Duration::from_secs(60));
        sweeper.sweep(&store, NOW, start);
        assert_eq!((store.stats().events, sweeper.due_in(start).as_secs()), (SWEEP_EVENTS_MAX as u64 + 1, 60));
        sweeper.sweep(&store, NOW + 1, start);
        assert_eq!((store.stats().events, sweeper.due_in(start).as_secs()), (1, 0));
        sweeper.sweep(&store, NOW + 1, start);
        assert_eq!((store.stats().events, sweeper.due_in(start).as_secs()), (0, 60));
    }
}
