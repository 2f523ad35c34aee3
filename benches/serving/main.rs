//! What one client's load costs another: the 99th percentile of a light client's answers and the relay's memory, alone,
//! beside heavy questions, and under each of the attacks that `tests/it/hostile_load.rs` tests.
//!
//! Limits: a light question waits at most 20 ms more beside heavy ones; under an attack from outside its p99 at most
//! doubles, where the machine has a core for each side. All clients but the heavy ones count as from outside, so the limits
//! by address are in force as they are by default.
//!
//! `cargo bench --bench serving`. `SERVING_EVENTS`: stored events (200,000). `SERVING_SECS`: of each round (4).
//! `SERVING_CORE`: the core that the relay is pinned to by `taskset`; run the bench itself on another.

#![allow(clippy::unwrap_used, missing_docs)]

mod attacks;
mod light;
mod served;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use light::Light;
use served::Served;

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect(name))
}

/// What happens beside the light client, until it is told to stop.
type Load = fn(&Served, Arc<AtomicBool>);

/// The rounds; the first is what the others are compared with.
const ROUNDS: [(&str, Load); 14] = [
    ("alone", |_, _| {}),
    ("500 authors, 5,000 events", attacks::many_authors),
    ("deep until, 5,000 events", attacks::deep_until),
    ("scans without a match", attacks::fruitless_scans),
    ("alone again", |_, _| {}),
    ("handshakes drop by drop", attacks::slow_handshakes),
    ("half-open sockets", attacks::half_open),
    ("subscribers who never read", attacks::never_reading),
    ("frames of 10 MB", attacks::large_frames),
    ("fragments of one byte", attacks::tiny_fragments),
    ("pings without end", attacks::pings),
    ("one id requested anew", attacks::replaced_requests),
    ("garbage", attacks::garbage),
    ("JSON nested 10,000 deep", attacks::nested),
];

fn main() {
    let served = Served::start(setting("SERVING_EVENTS", 200_000) as usize);
    let round_time = Duration::from_secs(setting("SERVING_SECS", 4));
    println!(
        "{:28} {:>7} {:>9} {:>9} {:>9} {:>9}",
        "beside the light client", "asked", "p50 ms", "p99 ms", "max ms", "RSS MiB"
    );
    for (number, (name, load)) in ROUNDS.into_iter().enumerate() {
        let stop = Arc::new(AtomicBool::new(false));
        let figures = std::thread::scope(|scope| {
            let loading = scope.spawn({
                let (served, stop) = (&served, stop.clone());
                move || load(served, stop)
            });
            let figures = Light::ask(&served, number, round_time);
            stop.store(true, Ordering::Relaxed);
            loading.join().unwrap();
            figures
        });
        println!(
            "{name:28} {:7} {:9.2} {:9.2} {:9.2} {:9.1}",
            figures.asked, figures.p50_ms, figures.p99_ms, figures.max_ms, figures.rss_mib
        );
    }
}
