//! Reading stores to the end, page by page.

use std::time::{Duration, Instant};

use sledge::protocol::{Event, Filter};
use sledge::store::{PageBudget, Progress, Query, Row, Store, Wanted};

/// All that a filter matches, without a limit.
pub fn all(filter: Filter) -> Wanted {
    Wanted { filter, limit: usize::MAX, whole_seconds: false }
}

/// The newest matches of a filter given as JSON.
pub fn newest(filter: &str, limit: usize) -> Wanted {
    Wanted { filter: Filter::from_json(filter).expect(filter), limit, whole_seconds: false }
}

/// A query without a position.
pub fn query(wanted: &[Wanted], now: u64) -> Query {
    Query { wanted: wanted.to_vec(), now, before: None }
}

/// Every row of a query and how it ended, read in pages of `page_bytes`.
pub fn read(store: &dyn Store, query: Query, page_bytes: usize) -> (Vec<Row>, Progress) {
    let mut scan = store.scan(query).expect("a readable store");
    let mut rows = Vec::new();
    loop {
        match scan.page(budget(page_bytes), &mut rows).expect("a readable store") {
            Progress::Paused => {}
            end => return (rows, end),
        }
    }
}

/// How many events a query counts.
pub fn count(store: &dyn Store, query: Query) -> u64 {
    let mut scan = store.scan(query).expect("a readable store");
    let mut counted = 0;
    loop {
        let (more, progress) = scan.count(far_away()).expect("a readable store");
        counted += more;
        if progress != Progress::Paused {
            return counted;
        }
    }
}

/// A page budget that only bytes limit.
pub fn budget(bytes_max: usize) -> PageBudget {
    PageBudget { bytes_max, until: far_away() }
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3_600)
}

/// The ids of rows, in hex.
pub fn row_ids(rows: &[Row]) -> Vec<String> {
    rows.iter().map(|row| row.id.to_hex()).collect()
}

/// Asserts that rows are exactly these events, in this order, byte for byte.
#[track_caller]
pub fn assert_rows(rows: &[Row], expected: &[&Event], what: &str) {
    assert_eq!(row_ids(rows), super::ids(expected.iter().copied()), "{what}");
    for (row, event) in rows.iter().zip(expected) {
        assert_eq!(row.created_at, event.created_at, "{what}");
        assert_eq!(row.json, event.canonical().json, "{what}");
    }
}
