//! The write buffer against a map, and against readers that must never see a gap.
#![allow(clippy::unwrap_used)]
use super::super::Engine;
use super::*;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// An engine in memory that can be told to fail.
#[derive(Default)]
struct MapEngine {
    entries: RwLock<BTreeMap<Key, Value>>,
    failing: AtomicBool,
    panicking: AtomicBool,
}

impl Index for MapEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError> {
        Ok(self.entries.read().unwrap().get(&Key::new(key)).copied())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        let entries = self.entries.read().unwrap();
        out.extend(entries.range(Key::new(from)..Key::new(to)).take(limit).map(|(key, value)| (*key, *value)));
        Ok(())
    }

    /// One entry at a time, as a real engine: readers may come between.
    fn write_run(&self, run: &mut dyn Iterator<Item = Change>, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        for (number, (key, value)) in run.enumerate() {
            assert!(!self.panicking.load(Ordering::Relaxed), "told to panic");
            if number > 0 && self.failing.load(Ordering::Relaxed) {
                return Err(IndexError::Damaged("told to fail".into()));
            }
            if stop() {
                return Ok(false);
            }
            let mut entries = self.entries.write().unwrap();
            match value {
                Some(value) => entries.insert(key, value),
                None => entries.remove(&key),
            };
        }
        Ok(true)
    }

    fn bytes_on_disk(&self) -> u64 {
        0
    }
}

fn buffered(engine: &Arc<MapEngine>, run_entries_max: usize) -> BufferedIndex {
    let engine: Arc<dyn Index> = engine.clone();
    BufferedIndex::new(engine, run_entries_max, Box::new(|_| Ok(()))).unwrap()
}

fn put(key: u16, value: u8) -> Change {
    (Key::new(&key.to_be_bytes()), Some(Value::new(&[value])))
}

fn removed(key: u16) -> Change {
    (Key::new(&key.to_be_bytes()), None)
}

fn scan(index: &BufferedIndex, from: u16, to: u16, limit: usize) -> Vec<(Key, Value)> {
    let mut out = vec![];
    index.scan(&from.to_be_bytes(), &to.to_be_bytes(), limit, &mut out).unwrap();
    out
}

fn numbers(entries: &[(Key, Value)]) -> Vec<u16> {
    entries.iter().map(|(key, _)| u16::from_be_bytes([key[0], key[1]])).collect()
}

const NEVER: &dyn Fn() -> bool = &|| false;

#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<(u16, Option<u8>)>),
    /// Lets the entries be frozen, merged in part, and found again.
    MergeUntil(usize),
    Scan(u16, u16, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..60u16;
    prop_oneof![
        3 => prop::collection::vec((key.clone(), prop::option::of(any::<u8>())), 0..12).prop_map(Step::Apply),
        1 => (0..40usize).prop_map(Step::MergeUntil),
        3 => (key.clone(), key, 0..20usize).prop_map(|(from, to, limit)| Step::Scan(from, to, limit)),
    ]
}

proptest! {
    /// Random batches, merges (also cut off in the middle) and scans answer like one ordered map.
    #[test]
    fn answers_like_one_map(steps in prop::collection::vec(step(), 1..60), run_entries_max in 1..30usize) {
        let index = buffered(&Arc::default(), run_entries_max);
        let mut oracle = BTreeMap::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Apply(batch) => {
                    let changes: Vec<_> = batch.iter().map(|(key, value)| match value {
                        Some(value) => put(*key, *value),
                        None => removed(*key),
                    }).collect();
                    index.apply(&changes, number as u64).unwrap();
                    oracle.extend(changes);
                }
                Step::MergeUntil(entries) => {
                    let left = AtomicU64::new(entries as u64);
                    let stop = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err();
                    index.merge_now(&stop).unwrap();
                }
                Step::Scan(from, to, limit) => {
                    let live = oracle.iter().filter_map(|(key, value)| value.map(|value| (*key, value)));
                    let within = live.filter(|(key, _)| (from..to).contains(&u16::from_be_bytes([key[0], key[1]])));
                    prop_assert_eq!(scan(&index, from, to, limit), within.take(limit).collect::<Vec<_>>());
                }
            }
        }
        for (key, value) in oracle {
            prop_assert_eq!(index.get(&key).unwrap(), value);
        }
    }
}

/// A removed key hides the engine's entry and does not use up the limit.
#[test]
fn removals_hide_and_do_not_count() {
    let index = buffered(&Arc::default(), 1_000_000);
    let all: Vec<_> = (0..5_000).map(|key| put(key, 1)).collect();
    index.apply(&all, 1).unwrap();
    assert!(index.merge_now(NEVER).unwrap());
    // More removals in a row than a page of the scan holds.
    let gone: Vec<_> = (1..4_000).map(removed).collect();
    index.apply(&gone, 2).unwrap();
    assert_eq!(numbers(&scan(&index, 0, 5_000, 3)), [0, 4_000, 4_001]);
    assert_eq!(index.get(&7u16.to_be_bytes()).unwrap(), None);
    assert!(index.merge_now(NEVER).unwrap());
    assert_eq!(index.buffered_entries(), 0);
    assert_eq!(scan(&index, 0, 5_000, usize::MAX).len(), 1_001);
}

/// Within a batch the last change of a key is the one that counts.
#[test]
fn the_last_change_of_a_batch_wins() {
    let index = buffered(&Arc::default(), 10);
    index.apply(&[put(1, 1), removed(1), put(1, 2), put(2, 1), removed(2)], 1).unwrap();
    assert_eq!(scan(&index, 0, 9, 9), [(Key::new(&[0, 1]), Value::new(&[2]))]);
}

/// While a writer writes and runs are merged below, no applied key is ever missing, in no
/// scan and no look-up, and no batch is ever seen in part.
#[test]
fn readers_never_see_a_gap() {
    const BATCHES: u16 = 2_000;
    let index = buffered(&Arc::default(), 64);
    let applied = AtomicU64::new(0);
    let reader = || {
        let mut seen = 0;
        while seen < BATCHES {
            let least = applied.load(Ordering::Acquire) as u16;
            let entries = scan(&index, 0, u16::MAX, usize::MAX);
            assert!(numbers(&entries).iter().copied().eq(0..entries.len() as u16));
            assert!(entries.len() >= usize::from(least) * 3 && entries.len().is_multiple_of(3));
            if least > 0 {
                let key = (least * 3 - 1).to_be_bytes();
                assert!(index.get(&key).unwrap().is_some());
            }
            seen = least;
        }
    };
    thread::scope(|scope| {
        scope.spawn(reader);
        scope.spawn(reader);
        for batch in 0..BATCHES {
            let changes = [put(batch * 3, 1), put(batch * 3 + 1, 1), put(batch * 3 + 2, 1)];
            index.apply(&changes, u64::from(batch)).unwrap();
            applied.store(u64::from(batch) + 1, Ordering::Release);
        }
    });
}

/// `on_merged` names the end of the last batch of each merged run, after the engine has it.
#[test]
fn merged_offsets_are_reported_after_the_fact() {
    let engine = Arc::new(MapEngine::default());
    let reports = Arc::new(Mutex::new(vec![]));
    let on_merged = {
        let (engine, reports) = (engine.clone(), reports.clone());
        Box::new(move |log_end| {
            reports.lock().unwrap().push((log_end, engine.entries.read().unwrap().len()));
            Ok(())
        })
    };
    let index = BufferedIndex::new(engine, 100, on_merged).unwrap();
    index.apply(&[put(1, 1)], 10).unwrap();
    index.apply(&[put(2, 1)], 20).unwrap();
    assert!(index.merge_now(NEVER).unwrap());
    index.apply(&[put(3, 1)], 30).unwrap();
    assert!(index.merge_now(&|| true).is_ok_and(|merged| !merged));
    assert!(index.merge_now(NEVER).unwrap());
    assert_eq!(*reports.lock().unwrap(), [(20, 2), (30, 3)]);
}

/// A merge that fails or panics loses nothing, is told of, and succeeds when tried again.
#[test]
fn a_failed_merge_keeps_everything() {
    let engine = Arc::new(MapEngine::default());
    let index = buffered(&engine, 1_000);
    index.apply(&[put(1, 1), put(2, 1), put(3, 1)], 1).unwrap();
    for switch in [&engine.failing, &engine.panicking] {
        switch.store(true, Ordering::Relaxed);
        assert!(index.merge_now(NEVER).is_err());
        assert!(index.health().is_some());
        assert_eq!(numbers(&scan(&index, 0, 9, 9)), [1, 2, 3]);
        switch.store(false, Ordering::Relaxed);
    }
    assert!(index.merge_now(NEVER).unwrap());
    assert_eq!(index.health(), None);
    assert_eq!(index.buffered_entries(), 0);
    assert_eq!(numbers(&scan(&index, 0, 9, 9)), [1, 2, 3]);
}

/// Memory is bounded while merges fail: the writer is told, but what it applies is not refused.
#[test]
fn a_full_buffer_with_a_failing_engine_says_so() {
    let engine = Arc::new(MapEngine::default());
    engine.panicking.store(true, Ordering::Relaxed);
    let index = buffered(&engine, 10);
    let batch = |from: u16| (from..from + 10).map(|key| put(key, 1)).collect::<Vec<_>>();
    index.apply(&batch(0), 1).unwrap();
    assert!(index.merge_now(NEVER).is_err());
    index.apply(&batch(10), 2).unwrap();
    index.apply(&batch(20), 3).unwrap();
    assert!(matches!(index.wait_for_room(), Err(IndexError::Full(_))));
    index.check_bound().unwrap();
    index.apply(&batch(30), 4).unwrap();
    assert_eq!(scan(&index, 0, 99, 99).len(), 40);
    index.apply(&batch(40), 5).unwrap();
    assert!(matches!(index.check_bound(), Err(IndexError::Full(_))), "a replay has a bound too");
}

/// When it cannot be put on record how far the index reaches, the run stays in memory, and is merged again once it can.
#[test]
fn a_failed_record_keeps_the_run() {
    let fails = Arc::new(AtomicBool::new(true));
    let on_merged = {
        let fails = Arc::clone(&fails);
        move |_| if fails.load(Ordering::SeqCst) { Err(io::Error::other("told to fail")) } else { Ok(()) }
    };
    let index = BufferedIndex::new(Arc::new(MapEngine::default()), 10, Box::new(on_merged)).unwrap();
    index.apply(&[put(1, 1)], 1).unwrap();
    assert!(index.merge_now(NEVER).is_err());
    assert!(index.health().is_some() && index.buffered_entries() == 1);
    assert_eq!(numbers(&scan(&index, 0, 9, 9)), [1]);
    fails.store(false, Ordering::SeqCst);
    assert!(index.merge_now(NEVER).unwrap());
    assert!(index.health().is_none() && index.buffered_entries() == 0);
    assert_eq!(numbers(&scan(&index, 0, 9, 9)), [1]);
}

/// Closing merges what is buffered, or leaves it when the time is over; then nothing is taken.
#[test]
fn close_merges_within_its_deadline() {
    let far = Instant::now() + Duration::from_secs(3_600);
    for (deadline, merged) in [(far, true), (Instant::now(), false)] {
        let engine = Arc::new(MapEngine::default());
        let index = buffered(&engine, 100);
        index.apply(&[put(1, 1)], 1).unwrap();
        assert_eq!(index.close(deadline).unwrap(), merged);
        assert_eq!(engine.entries.read().unwrap().len(), usize::from(merged));
        assert!(matches!(index.apply(&[put(2, 1)], 2), Err(IndexError::Closed)));
    }
}

/// With a real engine below: what was merged is there after opening again.
#[test]
fn the_engine_has_everything_after_a_merge() {
    for engine in [Engine::Sled, Engine::Fjall] {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let engine = engine.open(dir.path(), 0, Duration::from_secs(60)).unwrap();
            BufferedIndex::new(engine, 500, Box::new(|_| Ok(()))).unwrap()
        };
        let index = open();
        for batch in 0..100 {
            let changes: Vec<_> = (0..20).map(|n| put(n * 100 + batch, 1)).collect();
            index.apply(&changes, u64::from(batch)).unwrap();
        }
        assert!(index.close(Instant::now() + Duration::from_secs(3_600)).unwrap());
        drop(index);
        let index = open();
        assert!(numbers(&scan(&index, 0, 9_999, usize::MAX)).into_iter().eq(0..2_000), "{engine}");
    }
}
