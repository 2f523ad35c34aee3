//! A budget that refills: so much a second, and so much ahead.
//!
//! Kept as one moment, the one at which all that was spent will have been paid back, so a bucket is eight bytes, needs no
//! clock of its own and follows new settings at once. The crate `governor` does the same with a clock, a map and a
//! scheduler of its own; this relay has its accounts already and spends amounts that are only known afterwards.

/// How fast a [`Bucket`] refills and how much it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Units a second; 0 = no limit.
    pub per_sec: u64,
    /// Units that a full bucket holds.
    pub burst: u64,
}

impl Allowance {
    fn nanos(self, units: u64) -> u64 {
        let nanos = u128::from(units) * 1_000_000_000 / u128::from(self.per_sec.max(1));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

/// What one client has spent of one thing. New ones are full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Nanoseconds, on the caller's clock, at which everything spent is refilled.
    refilled_at: u64,
}

impl Bucket {
    /// Takes `units` if they are there. A full bucket gives any amount, so that nothing is refused for ever.
    pub fn spend(&mut self, units: u64, allowance: Allowance, now_nanos: u64) -> bool {
        let owed = self.refilled_at.saturating_sub(now_nanos);
        let fits = owed.saturating_add(allowance.nanos(units)) <= allowance.nanos(allowance.burst);
        let granted = allowance.per_sec == 0 || owed == 0 || fits;
        if granted {
            self.owe(units, allowance, now_nanos);
        }
        granted
    }

    /// Takes `units` whether they are there or not.
    pub fn owe(&mut self, units: u64, allowance: Allowance, now_nanos: u64) {
        if allowance.per_sec > 0 {
            self.refilled_at = self.refilled_at.max(now_nanos).saturating_add(allowance.nanos(units));
        }
    }

    /// Whether more was taken than a full bucket holds.
    pub fn is_overdrawn(&self, allowance: Allowance, now_nanos: u64) -> bool {
        allowance.per_sec > 0 && self.refilled_at.saturating_sub(now_nanos) > allowance.nanos(allowance.burst)
    }

    /// Whether it is as good as a new one.
    pub fn is_full(&self, now_nanos: u64) -> bool {
        self.refilled_at <= now_nanos
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// The burst at once, then as many as refill, never more than the burst after a long rest.
    #[test]
    fn a_burst_then_a_rate() {
        let allowance = Allowance { per_sec: 10, burst: 3 };
        let mut bucket = Bucket::default();
        let mut granted = |now| (0..9).filter(|_| bucket.spend(1, allowance, now)).count();
        assert_eq!(granted(SECOND), 3);
        assert_eq!(granted(SECOND + SECOND / 10), 1);
        assert_eq!(granted(2 * SECOND), 3);
        assert_eq!(granted(900 * SECOND), 3, "a rest fills it once");
    }

    /// One amount above the burst passes a full bucket and is paid back afterwards; 0 a second is no limit.
    #[test]
    fn large_amounts_and_no_limit() {
        let allowance = Allowance { per_sec: 10, burst: 5 };
        let mut bucket = Bucket::default();
        assert!(bucket.spend(50, allowance, 0));
        assert!(!bucket.spend(1, allowance, 4 * SECOND) && bucket.is_overdrawn(allowance, 4 * SECOND));
        assert!(!bucket.is_overdrawn(allowance, 5 * SECOND) && bucket.is_full(5 * SECOND));
        let free = Allowance { per_sec: 0, burst: 0 };
        assert!((0..99).all(|_| bucket.spend(u64::MAX, free, 0)));
        assert!(!bucket.is_overdrawn(free, 0));
    }

    proptest! {
        /// In any stretch of time no more is granted than the burst and what refills, give or take one unit; and
        /// extreme numbers do not overflow.
        #[test]
        fn never_more_than_the_rate(
            per_sec in 1u64..1_000, burst in 1u64..100, steps in prop::collection::vec(0u64..SECOND, 1..200),
        ) {
            let allowance = Allowance { per_sec, burst };
            let (mut bucket, mut now, mut granted) = (Bucket::default(), 0, 0u64);
            for step in steps {
                now += step;
                granted += u64::from(bucket.spend(1, allowance, now));
                let refilled = u128::from(now) * u128::from(per_sec) / u128::from(SECOND);
                prop_assert!(u128::from(granted) <= refilled + u128::from(burst) + 1);
            }
            bucket.owe(u64::MAX, allowance, u64::MAX);
            prop_assert!(!bucket.spend(1, allowance, 0));
        }
    }
}
