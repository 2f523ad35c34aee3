//! How much one key and one address may publish a day.
//!
//! Counts accepted events only, so that nobody uses up another one's quota with forged events. Days are those of UTC; a
//! restart begins anew. Bounded: where too many keys or addresses are at work, those who have used little are
//! forgotten first.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Mutex;

use crate::config::{Access, subscriber_line};
use crate::protocol::PublicKey;
use crate::relay::lock;

/// Keys, and addresses, whose use is known at a time. Each takes about 100 bytes.
const KNOWN_MAX: usize = 100_000;

const DAY_SECS: u64 = 24 * 60 * 60;
const MIB: u64 = 1024 * 1024;

/// What may be used a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    /// 0 = no limit.
    events: u64,
    /// 0 = no limit.
    bytes: u64,
}

/// What was used today.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    events: u64,
    bytes: u64,
}

/// Which quota is used up. `Display` is a part of the `OK` text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsedUp {
    /// That of the author.
    #[error("this key has published as much as one may a day")]
    Key,
    /// That of the address.
    #[error("your address has published as much as one may a day")]
    Ip,
}

/// The quotas of the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    key: Limit,
    ip: Limit,
}

/// What was used of the quotas.
#[derive(Default)]
pub struct Quotas {
    today: Mutex<Today>,
}

#[derive(Default)]
struct Today {
    day: u64,
    keys: HashMap<PublicKey, Used>,
    ips: HashMap<IpAddr, Used>,
}

impl Limits {
    /// The quotas of the settings.
    pub fn new(access: &Access) -> Self {
        let limit = |events, mib: u64| Limit { events, bytes: mib.saturating_mul(MIB) };
        Limits {
            key: limit(access.key_events_per_day_max, access.key_mb_per_day_max),
            ip: limit(access.ip_events_per_day_max, access.ip_mb_per_day_max),
        }
    }

    /// Whether there are any: without, nothing is counted.
    fn any(&self) -> bool {
        self.key.is_set() || self.ip.is_set()
    }
}

impl Quotas {
    /// Whether one more event may come. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// [`UsedUp`].
    pub fn check(&self, limits: &Limits, key: &PublicKey, ip: Option<IpAddr>, now: u64) -> Result<(), UsedUp> {
        if !limits.any() {
            return Ok(());
        }
        let today = self.today(now);
        if limits.key.is_set() && today.keys.get(key).is_some_and(|used| limits.key.is_reached(used)) {
            return Err(UsedUp::Key);
        }
        let line = ip.and_then(counted_line).filter(|_| limits.ip.is_set());
        if line.is_some_and(|line| today.ips.get(&line).is_some_and(|used| limits.ip.is_reached(used))) {
            return Err(UsedUp::Ip);
        }
        Ok(())
    }

    /// Counts an event that was accepted.
    pub fn count(&self, limits: &Limits, key: &PublicKey, ip: Option<IpAddr>, bytes: usize, now: u64) {
        if !limits.any() {
            return;
        }
        let mut today = self.today(now);
        if limits.key.is_set() {
            add(&mut today.keys, *key, bytes);
        }
        if let Some(line) = ip.and_then(counted_line).filter(|_| limits.ip.is_set()) {
            add(&mut today.ips, line, bytes);
        }
    }

    fn today(&self, now: u64) -> std::sync::MutexGuard<'_, Today> {
        let mut today = lock(&self.today);
        let day = now / DAY_SECS;
        if today.day != day {
            *today = Today { day, ..Today::default() };
        }
        today
    }
}

impl Limit {
    fn is_set(self) -> bool {
        self.events > 0 || self.bytes > 0
    }

    fn is_reached(self, used: &Used) -> bool {
        (self.events > 0 && used.events >= self.events) || (self.bytes > 0 && used.bytes >= self.bytes)
    }
}

/// The line whose use is counted; loopback has no quota.
fn counted_line(ip: IpAddr) -> Option<IpAddr> {
    let line = subscriber_line(ip);
    (!line.is_loopback()).then_some(line)
}

fn add<K: Hash + Eq>(all: &mut HashMap<K, Used>, who: K, bytes: usize) {
    if all.len() >= KNOWN_MAX && !all.contains_key(&who) {
        forget_small(all);
    }
    let used = all.entry(who).or_default();
    used.events += 1;
    used.bytes += bytes as u64;
}

/// Forgets those who have used less than the average, which is at least one.
fn forget_small<K: Hash + Eq>(all: &mut HashMap<K, Used>) {
    let count = all.len() as u64;
    let sum = |part: fn(&Used) -> u64, all: &HashMap<K, Used>| all.values().map(part).sum::<u64>();
    let (events, bytes) = (sum(|used| used.events, all), sum(|used| used.bytes, all));
    all.retain(|_, used| used.events * count > events || used.bytes * count > bytes);
    if all.len() as u64 == count {
        all.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;

    const NOW: u64 = 1_700_000_000;

    struct Bench(Quotas, Limits);

    impl Bench {
        fn check(&self, key: &PublicKey, ip: Option<IpAddr>, now: u64) -> Result<(), UsedUp> {
            self.0.check(&self.1, key, ip, now)
        }

        fn count(&self, key: &PublicKey, ip: Option<IpAddr>, bytes: usize, now: u64) {
            self.0.count(&self.1, key, ip, bytes, now);
        }
    }

    fn quotas(change: impl FnOnce(&mut Access)) -> Bench {
        let mut access = Config::default().access;
        change(&mut access);
        Bench(Quotas::default(), Limits::new(&access))
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    /// Events and bytes end each at their limit, for this key and this address alone, and begin anew the next day.
    #[test]
    fn quotas_end_at_their_limits_and_begin_anew() {
        let quotas = quotas(|access| {
            access.key_events_per_day_max = 2;
            access.key_mb_per_day_max = 1;
            access.ip_events_per_day_max = 3;
        });
        let (a, b) = (PublicKey([1; 32]), PublicKey([2; 32]));
        let home = ip("2001:db8::1");
        for _ in 0..2 {
            assert_eq!(quotas.check(&a, home, NOW), Ok(()));
            quotas.count(&a, home, 10, NOW);
        }
        assert_eq!(quotas.check(&a, ip("192.0.2.1"), NOW), Err(UsedUp::Key));
        assert_eq!(quotas.check(&b, home, NOW), Ok(()));
        quotas.count(&b, home, 1 << 20, NOW);
        assert_eq!(quotas.check(&b, None, NOW), Err(UsedUp::Key), "bytes");
        assert_eq!(quotas.check(&PublicKey([3; 32]), ip("2001:db8::2"), NOW), Err(UsedUp::Ip), "the same line");
        assert_eq!(quotas.check(&PublicKey([3; 32]), ip("::1"), NOW), Ok(()));
        assert_eq!(quotas.check(&a, home, NOW + DAY_SECS), Ok(()));
    }

    /// Without limits nothing is kept.
    #[test]
    fn without_limits_nothing_is_counted() {
        let quotas = quotas(|_| {});
        quotas.count(&PublicKey([1; 32]), ip("192.0.2.1"), 10, NOW);
        assert!(lock(&quotas.0.today).keys.is_empty() && lock(&quotas.0.today).ips.is_empty());
    }

    /// However many keys come, those who publish most are remembered and the others are bounded.
    #[test]
    fn memory_is_bounded_and_the_busiest_are_remembered() {
        let quotas = quotas(|access| access.key_events_per_day_max = 5);
        let key = |number: u32| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            PublicKey(bytes)
        };
        (0..5).for_each(|_| quotas.count(&key(0), None, 1, NOW));
        (1..=2 * KNOWN_MAX as u32).for_each(|number| quotas.count(&key(number), None, 1, NOW));
        assert!(lock(&quotas.0.today).keys.len() <= KNOWN_MAX);
        assert_eq!(quotas.check(&key(0), None, NOW), Err(UsedUp::Key));
    }
}
