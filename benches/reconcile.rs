//! Two relays made equal over a socket, as `sledge sync` and a mirror do it: in sync; where each side lacks a stretch, as
//! after weeks apart; and where what is lacking is scattered over all of it.
//!
//! `SLEDGE_BENCH_EVENTS=1000000 cargo bench --bench reconcile` takes as many events in sync.
//!
//! Measured on two busy cores, sums made anew: a million in sync 2.2 s, two rounds and 2,070 bytes; 3k and 10k apart 1.7 s and
//! six rounds; 20k scattered 7.2 s, thirteen rounds and 2.9 MB of comparing, the rest being the events.
//!
//! Limits, asserted: in sync, two rounds and 4 kB in all, whatever the number of events. Else, besides the events
//! themselves and their answers, 200 bytes for each that one side lacks, and no more rounds than below.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};
use sledge::client::clock::World;
use sledge::client::dial::RelayUrl;
use sledge::client::link::{Link, LinkOptions};
use sledge::client::stream::{Memory, Scope, Stream};
use sledge::config::{Config, Direction};
use sledge::protocol::{Event, Filter, Verified};
use sledge::relay::Clock;
use sledge::relay::ingest::Upstream;
use sledge::relay::side::{Moved, Side};
use sledge::server::Server;
use sledge::store::Store;
use sledge::store::embedded::{EmbeddedStore, Options};
use tokio::sync::watch;

const EVENTS_VARIABLE: &str = "SLEDGE_BENCH_EVENTS";
const EVENTS: usize = 100_000;
const NOW: u64 = support::START + 100_000_000;
const RUNS: usize = 3;
/// Bytes around an event: `["EVENT",…]`, its answer, its id in the question, the frames.
const AROUND_AN_EVENT: u64 = 250;

/// Which of the two sides has an event.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Here,
    There,
    Both,
}

struct Case {
    name: &'static str,
    rounds_max: u64,
    /// Bytes of comparing for each event that one side lacks, and for none.
    bytes_max: (u64, u64),
    events: Vec<(At, Verified<Event>)>,
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let asked = std::env::var(EVENTS_VARIABLE).ok().map(|count| count.parse().unwrap());
    let all = support::wordy_events(asked.unwrap_or(EVENTS).max(EVENTS));
    let few = &all[..EVENTS];
    let mut random = StdRng::seed_from_u64(20);
    let with = |events: &[Verified<Event>], at: &mut dyn FnMut(usize) -> At| {
        events.iter().enumerate().map(|(n, event)| (at(n), event.clone())).collect::<Vec<_>>()
    };
    let scattered = &mut |_: usize| match random.random_range(0..10) {
        0 => At::Here,
        1 => At::There,
        _ => At::Both,
    };
    let stretches = &mut |n: usize| match n {
        87_000..97_000 => At::Here,
        97_000.. => At::There,
        _ => At::Both,
    };
    let cases = [
        Case { name: "in sync", rounds_max: 2, bytes_max: (0, 4_096), events: with(&all, &mut |_| At::Both) },
        Case { name: "3k and 10k apart", rounds_max: 12, bytes_max: (200, 8_192), events: with(few, stretches) },
        Case { name: "20k scattered", rounds_max: 40, bytes_max: (400, 8_192), events: with(few, scattered) },
    ];
    for case in &cases {
        runtime.block_on(measure(case));
    }
}

async fn measure(case: &Case) {
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(run(case).await);
    }
    runs.sort_unstable_by_key(|(time, ..)| *time);
    let (time, cpu_secs, moved) = runs[RUNS / 2];
    let differing = || case.events.iter().filter(|(at, _)| *at != At::Both);
    let around: u64 = differing().map(|(_, event)| event.canonical().json.len() as u64 + AROUND_AN_EVENT).sum();
    let (count, bytes) = (differing().count() as u64, moved.bytes_up + moved.bytes_down);
    println!(
        "{} ({} events): {:.2} s, {cpu_secs:.2} s of processor time for both; {} rounds, {} B up, {} B down, {} B of them compare",
        case.name,
        case.events.len(),
        time.as_secs_f64(),
        moved.rounds,
        moved.bytes_up,
        moved.bytes_down,
        bytes.saturating_sub(around),
    );
    assert_eq!(moved.stored + moved.sent, count, "everything is moved");
    assert!(moved.rounds <= case.rounds_max, "{} rounds", moved.rounds);
    assert!(bytes <= around + count * case.bytes_max.0 + case.bytes_max.1, "{bytes} bytes");
}

async fn run(case: &Case) -> (Duration, f64, Moved) {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [here, there] = [At::Here, At::There].map(|side| {
        let folder = &folders[usize::from(side == At::There)];
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let events: Vec<_> = case.events.iter().filter(|(at, _)| *at == side || *at == At::Both).collect();
        for batch in events.chunks(1_000) {
            let batch: Vec<_> = batch.iter().map(|(_, event)| event.clone()).collect();
            store.apply(&batch, NOW).unwrap();
        }
        store.merge_index().unwrap();
        store
    });
    let (here, there) = (serve(here).await, serve(there).await);
    let (cpu, started) = (cpu_secs(), Instant::now());
    let url = RelayUrl::parse(&format!("ws://{}/", there.addr())).unwrap();
    let link = Link::open(&url, &LinkOptions::default(), Arc::default(), &World::system()).await.unwrap();
    let scope =
        Scope { filters: vec![Filter::default()], direction: Direction::Both, answer_timeout: Duration::from_secs(60) };
    let (told, _moved) = watch::channel(Moved::default());
    let side = Side::new(here.relay().clone(), false, Upstream { url: url.to_string(), is_mirror: false });
    let mut stream = Stream::new(link, side, scope, told, Memory::default());
    stream.level().await.unwrap();
    let (time, cpu, moved) = (started.elapsed(), cpu_secs() - cpu, stream.moved());
    drop(stream);
    here.stop().await.unwrap();
    there.stop().await.unwrap();
    (time, cpu, moved)
}

async fn serve(store: EmbeddedStore) -> Server {
    let mut config = Config { listen: ([127, 0, 0, 1], 0).into(), ..Config::default() };
    config.rate.exempt_ips = vec!["127.0.0.1".parse().unwrap()];
    Server::start(Arc::new(config), Arc::new(store), Clock::manual(Arc::new(AtomicU64::new(NOW)))).await.unwrap()
}

/// Processor time of this process, where the system tells it.
fn cpu_secs() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| after_name.get(at).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
