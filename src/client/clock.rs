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

    /// Another clock, in milliseconds since 1970 UTC; the machine's randomness.
    pub fn with_clock(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> World {
        World { now_ms: Arc::new(now_ms), ..World::system() }
    }

    /// A clock that stands where `now_ms` says until somebody changes it; the machine's randomness.
    pub fn manual(now_ms: Arc<AtomicU64>) -> World {
        World::with_clock(move || now_ms.load(Ordering::Relaxed))
    }

    /// Milliseconds since 1970 UTC, by this machine's clock, right or wrong.
    pub fn now_ms(&self) -> u64 {
        (self.now_ms)()
    }

    /// Any number, each as likely as the others.
    pub fn chance(&self) -> u64 {
        (self.chance)()
    }

    /// Random bytes, for keys and nonces.
    pub fn random_32(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for part in bytes.chunks_exact_mut(8) {
            part.copy_from_slice(&self.chance().to_be_bytes());
        }
        bytes
    }

    /// A new random UUID (version 4) as text.
    pub fn uuid(&self) -> String {
        let number = (u128::from(self.chance()) << 64) | u128::from(self.chance());
        let versioned = number & !(0xf000 << 64) & !(0xc000 << 48) | (0x4000 << 64) | (0x8000 << 48);
        let hex = format!("{versioned:032x}");
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World({} ms)", self.now_ms())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Version and variant stand where RFC 9562 puts them; two differ.
    #[test]
    fn uuids_have_their_form() {
        let world = World::system();
        let (one, other) = (world.uuid(), world.uuid());
        let parts: Vec<&str> = one.split('-').collect();
        assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12]);
        assert!(parts[2].starts_with('4') && parts[3].starts_with(['8', '9', 'a', 'b']), "{one}");
        assert_ne!(one, other);
    }
}
