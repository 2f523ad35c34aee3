//! What time it is, as an argument: tests turn the hands themselves.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A source of the current time; clones tell the same.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// The machine's clock. A clock before 1970 reads as 0.
    pub fn system() -> Self {
        Clock(Arc::new(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())))
    }

    /// A clock that stands where `seconds` says until somebody changes it.
    pub fn manual(seconds: Arc<AtomicU64>) -> Self {
        Clock(Arc::new(move || seconds.load(Ordering::Relaxed)))
    }

    /// Seconds since 1970 UTC.
    pub fn now(&self) -> u64 {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({})", self.now())
    }
}
