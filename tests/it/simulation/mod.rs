//! The sync engine in a world that one seed owns: time, network and disks.
//!
//! Two to five devices with clocks up to a year off, one to three relays; links break, packets come twice or out of
//! order, answers are lost after the relay has stored, devices crash and one may die, a relay may forget. Then the weather
//! turns calm, everything runs to rest, and the laws are checked. The collections, the clock, the outbox rules and the
//! relays' verdicts are the real ones.
//!
//! `SLEDGE_SIM_SEEDS=10000 cargo test --test it simulation::laws_hold` is the long form;
//! `SLEDGE_SIM_SEED=N` replays one seed.

mod book;
mod broken;
pub mod chance;
mod device;
mod laws;
mod rules;
mod store;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use laws::run;
use rules::{Rule, Rules};

/// Seeds of the plain test.
const SEEDS: u64 = 200;
/// Within so many seeds a broken rule must be seen.
const CONTROL_SEEDS: u64 = 400;

fn number_from(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|number| number.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Runs every seed below `end` on all cores; the least that fails, with what it says.
fn first_failure(end: u64, rules: Rules) -> Option<(u64, laws::Broken, String)> {
    let (next, failed_at) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let work = || {
        let mut failures = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end.min(failed_at.load(Ordering::Relaxed)) {
                return failures;
            }
            if let Err((broken, world)) = run(seed, rules) {
                failed_at.fetch_min(seed, Ordering::Relaxed);
                failures.push((seed, broken, world));
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let failures: Vec<_> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("a run panicked; its message is above")).collect()
    });
    failures.into_iter().min_by_key(|(seed, ..)| *seed)
}

/// All laws, for every seed.
#[test]
fn laws_hold() {
    let failure = match number_from("SLEDGE_SIM_SEED") {
        Some(seed) => run(seed, Rules::default()).err().map(|(broken, world)| (seed, broken, world)),
        None => first_failure(number_from("SLEDGE_SIM_SEEDS").unwrap_or(SEEDS), Rules::default()),
    };
    if let Some((seed, laws::Broken(law, what), world)) = failure {
        panic!(
            "law {law} does not hold with seed {seed}: {what}\n{world}\n\
             replay: SLEDGE_SIM_SEED={seed} cargo test --test it simulation::laws_hold"
        );
    }
}

/// Each rule is needed: without it some seed breaks a law that rests on it.
#[test]
fn each_rule_has_its_negative_control() {
    let mut wrong = Vec::new();
    for (rule, laws) in [
        (Rule::OrderPlaysNoPart, &[1, 2, 3][..]),
        (Rule::RelaysKeepTheWinner, &[4, 8]),
        (Rule::DeletionsWinTies, &[5]),
        (Rule::HeadsSayEverything, &[6, 8, 10]),
        (Rule::ValidityFromTheEvent, &[7]),
        (Rule::SilenceWhenSaid, &[8]),
        (Rule::Floor, &[9]),
        (Rule::Restamp, &[8, 12]),
        (Rule::SetsAreCompared, &[4, 10, 11]),
        (Rule::AnswersSettle, &[6, 10, 11]),
        (Rule::FrozenOnce, &[13]),
    ] {
        let failure = first_failure(CONTROL_SEEDS, Rules::without(rule));
        // Seen with `--nocapture`.
        println!("{rule:?}: {:?}", failure.as_ref().map(|(seed, broken, _)| (seed, broken.0)));
        match failure {
            None => wrong.push(format!("without {rule:?} all laws hold for {CONTROL_SEEDS} seeds")),
            Some((seed, laws::Broken(law, what), _)) if !laws.contains(&law) => {
                wrong.push(format!("without {rule:?} seed {seed} breaks law {law}, not {laws:?}: {what}"));
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
