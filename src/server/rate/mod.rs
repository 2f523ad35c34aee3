//! What each client may ask for a second, and who is shut out for garbage.
//!
//! A client is an address, so that opening more connections buys nothing; see [`subscriber`]. Its [`Account`] outlives
//! its connections, or reconnecting would be a way around. Accounts that are as good as new are forgotten, and there are
//! never more than [`ACCOUNTS_MAX`].

pub mod bucket;
pub mod meter;

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Rate;
use crate::config::subscriber_line as subscriber;
use bucket::{Allowance, Bucket};
pub use meter::Meter;

/// Addresses with an account. At about 200 bytes each this is the memory that a flood from everywhere can take.
pub const ACCOUNTS_MAX: usize = 50_000;

/// New accounts between two looks for those that may be forgotten. A look goes through all of them.
const NEW_BETWEEN_SWEEPS: usize = 1_000;

/// The accounts of all clients.
#[derive(Debug)]
pub struct Clients {
    started: Instant,
    /// The key of the numbers that stand for addresses in the log.
    tags: RandomState,
    accounts: Mutex<Accounts>,
}

#[derive(Debug, Default)]
struct Accounts {
    of: HashMap<IpAddr, Arc<Account>>,
    new_since_sweep: usize,
}

/// What one address has spent.
#[derive(Debug, Default)]
pub struct Account {
    /// Names the address in the log: the same number for the same address while this process lives, and no way back.
    tag: u32,
    spent: Mutex<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    events: Bucket,
    bytes: Bucket,
    requests: Bucket,
    query_micros: Bucket,
    garbage: Bucket,
    /// Nanoseconds on the clock of [`Clients`] until which the address is shut out.
    banned_until: u64,
}

/// What was too much. `Display` is the text for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Excess {
    /// Events.
    #[error("rate-limited: at most {0} events a second from your address")]
    Events(u64),
    /// Bytes.
    #[error("rate-limited: at most {0} bytes a second from your address")]
    Bytes(u64),
    /// Questions.
    #[error("rate-limited: at most {0} REQ and COUNT a second from your address")]
    Requests(u64),
    /// Time of the query threads.
    #[error("rate-limited: the queries from your address took too long together; ask again in a moment")]
    QueryTime,
}

impl Clients {
    /// No accounts yet. `now` is the beginning of their time.
    pub fn new(now: Instant) -> Self {
        Clients { started: now, tags: RandomState::new(), accounts: Mutex::default() }
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_nanos()).unwrap_or(u64::MAX)
    }

    /// The account of the client at `ip`.
    pub fn account(&self, ip: IpAddr, now: Instant) -> Arc<Account> {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = accounts.of.get(&subscriber(ip)) {
            return account.clone();
        }
        accounts.new_since_sweep += 1;
        if accounts.new_since_sweep >= NEW_BETWEEN_SWEEPS {
            accounts.sweep(self.nanos(now));
        }
        let tag = self.tags.hash_one(subscriber(ip)) as u32;
        let account = Arc::new(Account { tag, spent: Mutex::default() });
        // A flood from more addresses than that is met by the limit on connections; theirs begin anew each time.
        if accounts.of.len() < ACCOUNTS_MAX {
            accounts.of.insert(subscriber(ip), account.clone());
        }
        account
    }

    /// Whether the client at `ip` is shut out. Does not make an account.
    pub fn is_banned(&self, ip: IpAddr, now: Instant) -> bool {
        let accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.of.get(&subscriber(ip)).is_some_and(|account| account.lock().banned_until > self.nanos(now))
    }

    /// How many addresses are shut out.
    pub fn banned(&self, now: Instant) -> usize {
        let accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.nanos(now);
        accounts.of.values().filter(|account| account.lock().banned_until > now).count()
    }
}

impl Accounts {
    /// Forgets accounts that are as good as new and belong to no connection.
    fn sweep(&mut self, now: u64) {
        self.new_since_sweep = 0;
        self.of.retain(|_, account| Arc::strong_count(account) > 1 || !account.lock().is_as_new(now));
    }
}

impl Spent {
    fn is_as_new(&self, now: u64) -> bool {
        let buckets = [self.events, self.bytes, self.requests, self.query_micros, self.garbage];
        buckets.iter().all(|bucket| bucket.is_full(now)) && self.banned_until <= now
    }

    fn spend_event(&mut self, rate: &Rate, now: u64) -> Result<(), Excess> {
        let allowance = Allowance { per_sec: rate.events_per_sec, burst: rate.events_burst };
        if self.events.spend(1, allowance, now) { Ok(()) } else { Err(Excess::Events(rate.events_per_sec)) }
    }

    fn spend_bytes(&mut self, bytes: usize, rate: &Rate, now: u64) -> Result<(), Excess> {
        let allowance = Allowance { per_sec: rate.bytes_per_sec, burst: rate.bytes_burst };
        if self.bytes.spend(bytes as u64, allowance, now) { Ok(()) } else { Err(Excess::Bytes(rate.bytes_per_sec)) }
    }

    fn spend_request(&mut self, rate: &Rate, now: u64) -> Result<(), Excess> {
        if self.query_micros.is_overdrawn(query_allowance(rate), now) {
            return Err(Excess::QueryTime);
        }
        let allowance = Allowance { per_sec: rate.reqs_per_sec, burst: rate.reqs_burst };
        if self.requests.spend(1, allowance, now) { Ok(()) } else { Err(Excess::Requests(rate.reqs_per_sec)) }
    }

    fn owe_query_time(&mut self, spent: Duration, rate: &Rate, now: u64) {
        let micros = u64::try_from(spent.as_micros()).unwrap_or(u64::MAX);
        self.query_micros.owe(micros, query_allowance(rate), now);
    }

    /// Adds points; whether they are too many, which shuts the address out.
    fn owe_garbage(&mut self, points: u64, rate: &Rate, now: u64) -> bool {
        let allowance = Allowance { per_sec: rate.garbage_per_sec, burst: rate.garbage_burst };
        self.garbage.owe(points, allowance, now);
        let banned = self.garbage.is_overdrawn(allowance, now);
        if banned {
            let ban_nanos = u64::try_from(rate.ban().as_nanos()).unwrap_or(u64::MAX);
            self.banned_until = self.banned_until.max(now.saturating_add(ban_nanos));
            // Back with a clean sheet: the ban was the price.
            self.garbage = Bucket::default();
        }
        banned
    }
}

impl Account {
    /// Adds points for garbage; whether that shuts the address out.
    fn owe_garbage(&self, points: u64, rate: &Rate, now: u64) -> bool {
        let banned = self.lock().owe_garbage(points, rate, now);
        if banned {
            tracing::info!(client = format_args!("{:08x}", self.tag), secs = rate.ban_secs, "shut out for garbage");
        }
        banned
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Spent> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn query_allowance(rate: &Rate) -> Allowance {
    Allowance { per_sec: rate.query_ms_per_sec * 1_000, burst: rate.query_ms_burst * 1_000 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// One account for IPv4 in both spellings and for all of a /64, another for others; kept while it says something.
    #[test]
    fn an_address_has_one_account() {
        let start = Instant::now();
        let (clients, rate) = (Clients::new(start), Config::default().rate);
        let same = |a: &str, b: &str| Arc::ptr_eq(&clients.account(ip(a), start), &clients.account(ip(b), start));
        let held = [clients.account(ip("192.0.2.1"), start), clients.account(ip("2001:db8::1"), start)];
        assert!(same("192.0.2.1", "::ffff:192.0.2.1") && same("2001:db8::1", "2001:db8::ffff:9"));
        assert!(!same("192.0.2.1", "192.0.2.2") && !same("2001:db8::1", "2001:db8:0:1::1"));
        held[0].lock().spend_event(&rate, 0).unwrap();
        drop(held);
        let mut accounts = clients.accounts.lock().unwrap();
        accounts.sweep(1);
        assert_eq!(accounts.of.len(), 1, "the one that has spent something");
        accounts.sweep(60_000_000_000);
        assert!(accounts.of.is_empty(), "all is forgiven");
    }

    /// Addresses beyond the bound get an account that nobody remembers; nothing grows.
    #[test]
    fn accounts_are_bounded() {
        let start = Instant::now();
        let (clients, rate) = (Clients::new(start), Config::default().rate);
        for n in 0..u32::try_from(ACCOUNTS_MAX).unwrap() + 500 {
            let account = clients.account(IpAddr::from(n.to_be_bytes()), start);
            account.lock().spend_event(&rate, 0).unwrap();
        }
        assert_eq!(clients.accounts.lock().unwrap().of.len(), ACCOUNTS_MAX);
        let later = start + Duration::from_secs(60);
        for n in 0..NEW_BETWEEN_SWEEPS as u16 {
            clients.account(ip(&format!("2001:db8:{n:x}::1")), later);
        }
        assert!(clients.accounts.lock().unwrap().of.len() <= NEW_BETWEEN_SWEEPS, "the forgiven ones made room");
    }

    /// Garbage shuts an address out for the time of the ban; slow garbage never does, and neither does a rate of 0.
    #[test]
    fn garbage_is_forgiven_slowly_and_punished_in_a_rush() {
        let start = Instant::now();
        let (clients, mut rate) = (Clients::new(start), Config::default().rate);
        (rate.garbage_per_sec, rate.garbage_burst, rate.ban_secs) = (1, 10, 60);
        let account = clients.account(ip("192.0.2.1"), start);
        let second = 1_000_000_000;
        assert!((0..1_000).all(|n| !account.lock().owe_garbage(1, &rate, n * second)));
        let now = 1_000 * second;
        assert!((0..10).any(|_| account.lock().owe_garbage(5, &rate, now)));
        let at = |secs| start + Duration::from_secs(secs);
        assert!(clients.is_banned(ip("::ffff:192.0.2.1"), at(1_059)) && clients.banned(at(1_059)) == 1);
        assert!(!clients.is_banned(ip("192.0.2.1"), at(1_061)) && !clients.is_banned(ip("192.0.2.2"), at(1_059)));
        rate.garbage_per_sec = 0;
        assert!((0..1_000).all(|_| !account.lock().owe_garbage(100, &rate, now)));
    }

    /// Time of query threads is known afterwards: what was overdrawn keeps the next question out until it is refilled.
    #[test]
    fn query_time_is_paid_back() {
        let mut rate = Config::default().rate;
        (rate.query_ms_per_sec, rate.query_ms_burst) = (100, 1_000);
        let mut spent = Spent::default();
        spent.spend_request(&rate, 0).unwrap();
        spent.owe_query_time(Duration::from_millis(1_500), &rate, 0);
        assert_eq!(spent.spend_request(&rate, 4_000_000_000), Err(Excess::QueryTime));
        assert_eq!(spent.spend_request(&rate, 5_000_000_000), Ok(()));
    }
}
