//! The client whose answers are timed: a small question every few milliseconds, as an app asks that opens a profile.

use std::time::{Duration, Instant};

use crate::served::{Served, ask};
use crate::support;

/// Time between two questions: within what an address may ask for by default.
const EVERY: Duration = Duration::from_millis(50);
/// Clients, of an address each, who take turns: the more answers are timed, the more a 99th percentile says.
const CLIENTS: usize = 10;

pub struct Light;

/// What was measured in a round.
pub struct Figures {
    pub asked: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    /// The most that the relay had.
    pub rss_mib: f64,
}

impl Light {
    /// Asks for as long as this. Each round has addresses of its own.
    pub fn ask(served: &Served, round: usize, time: Duration) -> Figures {
        let address = |client| format!("198.51.{round}.{client}");
        let mut clients: Vec<_> = (0..CLIENTS).map(|client| served.client(Some(&address(client))).unwrap()).collect();
        // The load has begun by then.
        std::thread::sleep(Duration::from_millis(300));
        let (started, mut millis, mut rss_mib) = (Instant::now(), Vec::new(), 0f64);
        for number in 0.. {
            let due = started + EVERY / CLIENTS as u32 * number;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if started.elapsed() >= time {
                break;
            }
            let author = support::pubkey(&support::author(number as usize % support::AUTHORS)).to_hex();
            let filter = format!("{{\"authors\":[\"{author}\"],\"limit\":20}}");
            let asked = Instant::now();
            ask(&mut clients[number as usize % CLIENTS], "light", &filter).expect("a light client is served");
            millis.push(asked.elapsed().as_secs_f64() * 1e3);
            rss_mib = rss_mib.max(served.rss_mib());
        }
        millis.sort_by(f64::total_cmp);
        let at = |share: f64| millis[((millis.len() - 1) as f64 * share) as usize];
        Figures { asked: millis.len(), p50_ms: at(0.5), p99_ms: at(0.99), max_ms: at(1.0), rss_mib }
    }
}
