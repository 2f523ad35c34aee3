//! What a filter costs: its plan, and a run of it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Limits;
use crate::protocol::{Filter, Visibility};
use crate::store::explain::Explanation;
use crate::store::{PageBudget, Progress, Query, Store, StoreError, Wanted};

/// Bytes of events read in one go.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// The plan of a filter, and what came of running it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// How it is looked up.
    pub plan: Explanation,
    /// Events it gave.
    pub rows: u64,
    /// Bytes of their JSON.
    pub bytes: u64,
    /// Microseconds it ran.
    pub micros: u64,
    /// Whether it ran to its end; else the time for a query was over.
    pub complete: bool,
}

/// Runs `filter` as a REQ of somebody who may see everything, within the limits of a query. `now` is in seconds since 1970.
///
/// # Errors
/// When the store cannot be read.
pub fn measure(store: &dyn Store, filter: &Filter, limits: &Limits, now: u64) -> Result<Measured, StoreError> {
    let plan = store.explain(filter);
    let asked = filter.limit.map_or(limits.limit_default, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let wanted = Wanted { filter: filter.clone(), limit: asked.min(limits.limit_max), whole_seconds: false };
    let started = Instant::now();
    let until = started + limits.query_time_max();
    let query = Query { wanted: vec![wanted], now, before: None, visible: Visibility::everything() };
    let mut scan = store.scan(query)?;
    let (mut rows, mut bytes) = (0, 0);
    let complete = loop {
        let mut page = Vec::new();
        let progress = scan.page(PageBudget { bytes_max: PAGE_BYTES_MAX, until }, &mut page)?;
        rows += page.len() as u64;
        bytes += page.iter().map(|row| row.json.len() as u64).sum::<u64>();
        match progress {
            Progress::Paused if Instant::now() < until => {}
            progress => break progress != Progress::Paused,
        }
    };
    let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(Measured { plan, rows, bytes, micros, complete })
}

impl Measured {
    /// How long it ran.
    pub fn time(&self) -> Duration {
        Duration::from_micros(self.micros)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;
    use crate::protocol::testing::{Author, NOW};
    use crate::store::memory::MemoryStore;

    /// Rows and bytes are those of the answer, within the limits of a REQ.
    #[test]
    fn a_filter_is_run_within_the_limits() {
        let store = MemoryStore::new();
        let notes: Vec<_> = (0..20).map(|n| Author::new(1).note(NOW + n, "")).collect();
        store.apply(&notes, NOW).unwrap();
        let mut limits = Config::default().limits;
        (limits.limit_default, limits.limit_max) = (5, 10);
        let rows = |text: &str| {
            let measured = measure(&store, &Filter::from_json(text).unwrap(), &limits, NOW).unwrap();
            assert!(measured.complete && measured.bytes > measured.rows * 300);
            measured.rows
        };
        assert_eq!([rows("{}"), rows("{\"limit\":3}"), rows("{\"limit\":99}")], [5, 3, 10]);
    }
}
