//! How long to wait before the next attempt: full jitter, so that a thousand clients of a relay that comes back do not
//! come all at once. Pure: chance is an argument.

use std::time::Duration;

/// The waits between attempts. The longest possible one doubles with each failure.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    /// The first wait is at most `first`, any later one at most `max`.
    pub fn new(first: Duration, max: Duration) -> Backoff {
        Backoff { first, max, failures: 0 }
    }

    /// How long to wait after one more failure: anything up to the present bound, as `chance` has it.
    pub fn next(&mut self, chance: u64) -> Duration {
        let bound = self.bound();
        self.failures = self.failures.saturating_add(1);
        let bound_ms = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(chance % bound_ms.saturating_add(1).max(1))
    }

    /// The longest wait that [`Backoff::next`] may give.
    pub fn bound(&self) -> Duration {
        let factor = 1_u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        self.first.saturating_mul(factor).min(self.max)
    }

    /// All is well: the next failure is the first one.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bound doubles from the first to the largest, stays there, and starts over after success.
    #[test]
    fn waits_double_up_to_a_bound() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
        let mut bounds = Vec::new();
        for chance in 0..200 {
            bounds.push(backoff.bound().as_millis());
            let bound = backoff.bound();
            assert!(backoff.next(chance * 7_919) <= bound);
        }
        assert_eq!(bounds[..9], [500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
        assert_eq!(bounds[199], 60_000);
        backoff.reset();
        assert_eq!(backoff.bound().as_millis(), 500);
        assert_eq!(Backoff::new(Duration::ZERO, Duration::ZERO).next(9), Duration::ZERO);
    }

    /// Both ends of the range occur: the jitter is full.
    #[test]
    fn chance_decides_the_whole_wait() {
        let wait = |chance| Backoff::new(Duration::from_millis(500), Duration::from_secs(60)).next(chance);
        assert_eq!([wait(0), wait(500), wait(501)], [0, 500, 0].map(Duration::from_millis));
    }
}
