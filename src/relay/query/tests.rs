//! One query thread, a store in memory, and connections that read as they like.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::Config;
use crate::protocol::testing::{Author, NOW};
use crate::protocol::{Event, EventId, Verified};
use crate::relay::outbox::tests::next;
use crate::store::memory::MemoryStore;
use crate::store::{Applied, Removal, StoreStats};

fn everything() -> Visibility {
    Visibility::everything()
}

fn limits() -> Limits {
    let mut limits = Config::default().limits;
    (limits.limit_default, limits.limit_max) = (4, 6);
    limits
}

fn filters(json: &[&str]) -> Vec<Filter> {
    json.iter().map(|json| Filter::from_json(json).unwrap()).collect()
}

fn page(outbox: &Outbox) -> Page {
    match next(outbox) {
        Outgoing::Page(page) => *page,
        other => panic!("unexpected {other:?}"),
    }
}

/// The first turn is short, the others are as long as the settings say.
#[test]
fn the_first_turn_is_short() {
    let outbox = Outbox::new(1, 1 << 20);
    let mut job = Job::rows(&outbox, 1, filters(&["{}"]), &limits(), Position(u64::MAX), everything(), NOW);
    let slice = Duration::from_millis(10);
    assert_eq!(job.turn_of(slice), FIRST_TURN_MAX);
    assert_eq!(job.turn_of(Duration::from_millis(1)), Duration::from_millis(1));
    job.work(&*store([NOW], ""), slice).unwrap();
    assert_eq!(job.turn_of(slice), slice);
}

/// A store with notes at these times.
fn store(times: impl IntoIterator<Item = u64>, content: &str) -> Arc<MemoryStore> {
    let store = MemoryStore::new();
    let note = |(number, time)| Author::new(1).note(time, &format!("{number}{content}"));
    store.apply(&times.into_iter().enumerate().map(note).collect::<Vec<_>>(), NOW).unwrap();
    Arc::new(store)
}

/// The answer to a REQ: the times of its rows and the hint.
fn ask(store: Arc<dyn Store>, json: &[&str]) -> (Vec<u64>, EoseHint) {
    let queries = Queries::start(store, &limits(), 1).unwrap();
    let outbox = Outbox::new(1, 1 << 20);
    queries.begin(Job::rows(&outbox, 1, filters(json), &limits(), Position(u64::MAX), everything(), NOW));
    let mut times = Vec::new();
    loop {
        let page = page(&outbox);
        times.extend(page.rows.iter().map(|row| row.created_at));
        match page.end {
            PageEnd::More(job) => queries.resume(job),
            PageEnd::Eose(hint) => return (times, hint),
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// The limit is the client's within the relay's; where the relay cuts, it cuts between seconds and says so
/// (T18, T19, T21).
#[test]
fn t18_t19_t21_limits_and_hints() {
    let store = store([9, 8, 7, 6, 6, 6, 5, 4], "");
    assert_eq!(ask(store.clone(), &["{}"]), (vec![9, 8, 7, 6, 6, 6], EoseHint::More), "default 4, whole second");
    assert_eq!(ask(store.clone(), &[r#"{"limit":4}"#]), (vec![9, 8, 7, 6], EoseHint::Unknown), "the client's 4");
    assert_eq!(ask(store.clone(), &[r#"{"limit":2}"#]), (vec![9, 8], EoseHint::More));
    assert_eq!(ask(store.clone(), &[r#"{"limit":99}"#]), (vec![9, 8, 7, 6, 6, 6], EoseHint::More), "cut to 6");
    assert_eq!(ask(store.clone(), &[r#"{"since":5,"until":8}"#]).0, [8, 7, 6, 6, 6]);
    assert_eq!(ask(store.clone(), &[r#"{"limit":1}"#, r#"{"until":5}"#]), (vec![9, 5, 4], EoseHint::Unknown));
    assert_eq!(ask(store.clone(), &[r#"{"since":8}"#]), (vec![9, 8], EoseHint::Finish));
}

/// Nothing asked is answered at once: `finish` only where nothing could match (T16, T19, T22).
#[test]
fn t16_t19_t22_nothing_asked() {
    let store = store([9, 8], "");
    assert_eq!(ask(store.clone(), &[r#"{"kinds":[]}"#, r#"{"since":2,"until":1}"#]), (vec![], EoseHint::Finish));
    assert_eq!(ask(store.clone(), &[r#"{"limit":0}"#]), (vec![], EoseHint::Unknown));
    assert_eq!(ask(store.clone(), &[r#"{"limit":0}"#, r#"{"since":9}"#]), (vec![9], EoseHint::Unknown));
    assert_eq!(ask(store, &[r#"{"limit":0,"ids":[]}"#, r#"{"since":9}"#]), (vec![9], EoseHint::Finish));
}

/// A long answer comes in pages of bounded size, in order, and only as fast as they are handed back.
#[test]
fn a_long_answer_comes_in_pages() {
    let store = store(0..6, &"x".repeat(30_000));
    let queries = Queries::start(store, &limits(), 2).unwrap();
    let outbox = Outbox::new(1, 1 << 20);
    queries.begin(Job::rows(
        &outbox,
        1,
        filters(&[r#"{"limit":6}"#]),
        &limits(),
        Position(u64::MAX),
        everything(),
        NOW,
    ));
    let mut sizes = Vec::new();
    loop {
        let page = page(&outbox);
        sizes.push(page.rows.len());
        match page.end {
            PageEnd::More(job) => queries.resume(job),
            end => {
                assert!(matches!(end, PageEnd::Eose(EoseHint::Finish)), "{end:?}");
                break;
            }
        }
    }
    assert_eq!((sizes.iter().sum::<usize>(), sizes.iter().max()), (6, Some(&2)));
}

/// Overlapping filters count once, limits play no part (T39).
#[test]
fn t39_count() {
    let queries = Queries::start(store(0..9, ""), &limits(), 1).unwrap();
    let outbox = Outbox::new(1, 1 << 20);
    queries.begin(Job::count(&outbox, 1, filters(&["{}", r#"{"kinds":[1],"limit":1}"#]), everything(), NOW));
    assert!(matches!(page(&outbox).end, PageEnd::Count { count: 9, approximate: false, hll: None }));
    queries.begin(Job::count(&outbox, 2, filters(&[r#"{"kinds":[]}"#]), everything(), NOW));
    assert!(matches!(page(&outbox).end, PageEnd::Count { count: 0, approximate: false, hll: None }));
}

/// A store whose scans never come to an end, or fail outright.
struct Stuck {
    panics: bool,
}

impl Scan for Stuck {
    fn page(&mut self, _budget: PageBudget, _rows: &mut Vec<Row>) -> Result<Progress, StoreError> {
        assert!(!self.panics, "as told");
        Ok(Progress::Paused)
    }

    fn count(&mut self, _until: Instant) -> Result<(u64, Progress), StoreError> {
        Ok((1, Progress::Paused))
    }
}

impl Store for Stuck {
    fn apply(&self, _batch: &[Verified<Event>], _now: u64) -> Result<Applied, StoreError> {
        Err(StoreError::DiskFull)
    }

    fn remove(&self, _ids: &[EventId], _why: Removal) -> Result<u64, StoreError> {
        Err(StoreError::DiskFull)
    }

    fn sweep_expired(&self, _now: u64, _events_max: usize) -> Result<usize, StoreError> {
        Err(StoreError::DiskFull)
    }

    fn contains(&self, _id: &EventId) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn scan(&self, _query: Query) -> Result<Box<dyn Scan>, StoreError> {
        Ok(Box::new(Stuck { panics: self.panics }))
    }

    fn load_state(&self, _name: &str) -> Result<Option<bytes::Bytes>, StoreError> {
        Ok(None)
    }

    fn save_state(&self, _name: &str, _bytes: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::DiskFull)
    }

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }

    fn close(&self, _deadline: Instant) -> Result<(), StoreError> {
        Ok(())
    }
}

/// A query that takes too long is closed, a count becomes a lower bound; a panic ends one query, not the thread.
#[test]
fn a_query_that_takes_too_long_is_closed() {
    let mut limits = limits();
    limits.query_time_ms_max = 1;
    for panics in [false, true] {
        let queries = Queries::start(Arc::new(Stuck { panics }), &limits, 1).unwrap();
        let outbox = Outbox::new(1, 1 << 20);
        queries.begin(Job::rows(&outbox, 1, filters(&["{}"]), &limits, Position(0), everything(), NOW));
        let expected = if panics { READ_ERROR } else { "error: the query took too long; narrow it" };
        assert!(matches!(page(&outbox).end, PageEnd::Failed(text) if text == expected));
        queries.begin(Job::count(&outbox, 2, filters(&["{}"]), everything(), NOW));
        assert!(matches!(page(&outbox).end, PageEnd::Count { count: 1.., approximate: true, .. }));
    }
}
