//! What time it is and what chance has it, as arguments: a test turns the hands and loads the dice.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A source of the current time and of random numbers; clones tell the same time.
#[derive(Clone)]
pub struct World {
    now_ms: Arc<dyn Fn() -> u64 + Send + Sync>,
    chance: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl World {
    /// The machine's clock and its randomness. A clock before 1970 reads as 0.
    pub fn system() -> World {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        World { now_ms: Arc::new(now), chance: Arc::new(secp256k1::rand::random) }
    }

    /// A clock that stands where `now_ms` says until somebody changes it; the machine's randomness.
    pub fn manual(now_ms: Arc<AtomicU64>) -> World {
        World { now_ms: Arc::new(move || now_ms.load(Ordering::Relaxed)), ..World::system() }
    }

    /// Milliseconds since 1970 UTC, by this machine's clock, right or wrong.
    pub fn now_ms(&self) -> u64 {
        (self.now_ms)()
    }

    /// Any number, each as likely as the others.
    pub fn chance(&self) -> u64 {
        (self.chance)()
    }

    /// Sixteen random bytes.
    pub fn random_16(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.chance().to_be_bytes());
        bytes[8..].copy_from_slice(&self.chance().to_be_bytes());
        bytes
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World({} ms)", self.now_ms())
    }
}
