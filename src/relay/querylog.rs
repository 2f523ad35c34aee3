//! What queries cost, and which were slow: with their filter and plan, so that an operator can see who asks for what and
//! why it takes long. Filters name keys and tags, which are public; whoever asked is not named.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::counters::Counter;
use super::lock;
use crate::protocol::Filter;
use crate::store::Store;

/// Slow queries that are remembered.
const REMEMBERED: usize = 20;

/// Characters of a query's filters that are kept: a filter of a thousand authors says no more by its last hundred.
const FILTER_CHARS_MAX: usize = 400;

/// A query that took long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowQuery {
    /// Seconds since 1970 when it was asked.
    pub asked_at: u64,
    /// Milliseconds of running.
    pub millis: u64,
    /// Events it gave, or counted.
    pub rows: u64,
    /// Its filters as JSON, cut where they are long.
    pub filters: String,
    /// How they were looked up.
    pub plan: String,
}

/// Figures about queries since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueryFigures {
    /// REQ and COUNT that came to an end.
    pub finished: u64,
    /// Events they gave.
    pub rows: u64,
    /// Microseconds that query threads have worked.
    pub micros: u64,
    /// Queries that were closed for taking too long.
    pub closed: u64,
    /// Queries that wait for a thread now.
    pub waiting: u64,
    /// The last slow ones, newest first.
    pub slow: Vec<SlowQuery>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct QueryLog {
    finished: Counter,
    rows: Counter,
    micros: Counter,
    closed: Counter,
    /// Microseconds from which a query is slow; 0: none is.
    slow_micros: AtomicU64,
    slow: Mutex<VecDeque<SlowQuery>>,
}

/// A query that has come to its end.
pub struct Finished<'a> {
    /// What was asked.
    pub filters: &'a [Filter],
    /// When, in seconds since 1970.
    pub asked_at: u64,
    /// For how long it ran, waiting not counted.
    pub worked: Duration,
    /// Events it gave, or counted.
    pub rows: u64,
    /// Whether it was closed for taking too long.
    pub closed: bool,
}

impl QueryLog {
    /// From now on queries that run for longer are logged.
    pub fn log_from(&self, slow: Option<Duration>) {
        let micros = slow.map_or(0, |slow| u64::try_from(slow.as_micros()).unwrap_or(u64::MAX));
        self.slow_micros.store(micros, Ordering::Relaxed);
    }

    /// Notes a query that has ended.
    pub fn note(&self, query: &Finished, store: &dyn Store) {
        let micros = u64::try_from(query.worked.as_micros()).unwrap_or(u64::MAX);
        self.finished.add(1);
        self.closed.add(usize::from(query.closed));
        self.rows.add(usize::try_from(query.rows).unwrap_or(usize::MAX));
        self.micros.add(usize::try_from(micros).unwrap_or(usize::MAX));
        let slow = self.slow_micros.load(Ordering::Relaxed);
        if slow == 0 || micros < slow {
            return;
        }
        let slow = SlowQuery {
            asked_at: query.asked_at,
            millis: micros / 1_000,
            rows: query.rows,
            filters: filters_text(query.filters),
            plan: query.filters.iter().map(|filter| store.explain(filter).to_string()).collect::<Vec<_>>().join("; "),
        };
        tracing::info!(
            millis = slow.millis,
            rows = slow.rows,
            closed = query.closed,
            filters = slow.filters,
            plan = slow.plan,
            "slow query"
        );
        let mut remembered = lock(&self.slow);
        remembered.truncate(REMEMBERED - 1);
        remembered.push_front(slow);
    }

    /// The figures; `waiting` queries wait for a thread.
    pub fn figures(&self, waiting: usize) -> QueryFigures {
        QueryFigures {
            finished: self.finished.get(),
            rows: self.rows.get(),
            micros: self.micros.get(),
            closed: self.closed.get(),
            waiting: waiting as u64,
            slow: lock(&self.slow).iter().cloned().collect(),
        }
    }
}

/// Filters as JSON, cut between characters where that is long.
fn filters_text(filters: &[Filter]) -> String {
    let mut text = String::new();
    for filter in filters {
        if !text.is_empty() {
            text.push(',');
        }
        text += &filter.to_json();
        if let Some((at, _)) = text.char_indices().nth(FILTER_CHARS_MAX) {
            text.truncate(at);
            text.push('…');
            break;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    /// Only what took long is remembered, newest first and in bounded number and length.
    #[test]
    fn slow_queries_are_remembered() {
        let (log, store) = (QueryLog::default(), MemoryStore::new());
        let filters = [Filter::from_json("{\"#t\":[\"ä\"]}").expect("good"), many_tags()];
        let note = |millis, asked_at| {
            let worked = Duration::from_millis(millis);
            log.note(&Finished { filters: &filters, asked_at, worked, rows: 2, closed: millis > 900 }, &store);
        };
        note(5_000, 1);
        log.log_from(Some(Duration::from_millis(100)));
        note(99, 2);
        (0..50).for_each(|n| note(100 + n, 100 + n));
        let figures = log.figures(3);
        assert_eq!((figures.finished, figures.rows, figures.closed, figures.waiting), (52, 104, 1, 3));
        assert_eq!(figures.slow.len(), REMEMBERED);
        assert_eq!((figures.slow[0].asked_at, figures.slow[0].millis), (149, 149));
        assert!(figures.slow[0].filters.starts_with("{\"#t\":[\"ä\"]},{\"#t\":["));
        assert_eq!(figures.slow[0].filters.chars().count(), FILTER_CHARS_MAX + 1);
        log.log_from(None);
        note(5_000, 999);
        assert_eq!(log.figures(0).slow[0].asked_at, 149);
    }

    fn many_tags() -> Filter {
        let values: Vec<String> = (0..500).map(|n| format!("\"{n}\"")).collect();
        Filter::from_json(&format!("{{\"#t\":[{}]}}", values.join(","))).expect("good")
    }
}
