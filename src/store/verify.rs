//! Checking a whole store: every record, every event's id and signature, and that the index says what the log says.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::{Event, Verified};

use super::StoreError;
use super::damage::name_events;
use super::embedded::{EmbeddedStore, Files};
use super::index::{Key, Value};
use super::log::{HEADER_LEN, Step};
use super::open::for_each_key;
use super::record::{ALIGN, Record, StoredEvent};
use super::schema::{self, Place};

/// Problems that are described one by one; further ones are only counted.
const PROBLEMS_MAX: usize = 1000;
/// Bytes of log between two reports of progress.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct VerifyReport {
    /// Events that were checked.
    pub events: u64,
    /// Index entries that were checked.
    pub entries: u64,
    /// What is wrong, a line each; at most a thousand are described.
    pub problems: Vec<String>,
    /// How many problems there are in all.
    pub problem_count: u64,
}

impl VerifyReport {
    fn problem(&mut self, text: String) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(text);
        }
    }
}

/// Checks everything and changes nothing. Writers wait meanwhile.
///
/// `progress` is told bytes done and bytes in all.
///
/// # Errors
/// When the log cannot be read at all; damage is not an error but in the report.
pub fn verify(store: &EmbeddedStore, progress: &dyn Fn(u64, u64)) -> Result<VerifyReport, StoreError> {
    let (state, files) = store.writer_and_files();
    let files = &*files;
    let mut report = VerifyReport::default();
    let removed = removed_in(files)?;
    let mut expected_entries = 0;
    let mut gone = BTreeSet::new();
    let mut reader = files.log.reader(HEADER_LEN);
    let mut told = 0;
    let mut damaged = Vec::new();
    while let Some(step) = reader.next()? {
        match step {
            Step::Record(offset, len, Record::Put(event)) => {
                let place = Place::new(offset, len);
                expected_entries += check_event(files, &event, place, removed.contains(offset), &mut report)?;
            }
            Step::Record(_, _, Record::Gone(version)) => drop(gone.insert(schema::gone_version(&version))),
            Step::Record(..) => {}
            Step::Damaged { offset, len } | Step::TornTail { offset, len } => {
                damaged.push((offset, len));
            }
        }
        if reader.offset() >= told + PROGRESS_BYTES {
            told = reader.offset();
            progress(told, files.log.end());
        }
    }
    name_events(files, &damaged)?.iter().for_each(|stretch| report.problem(stretch.to_string()));
    check_index(files, expected_entries + gone.len() as u64, &mut report)?;
    if report.events != state.events {
        report.problem(format!("index: it counts {} events, and {} are there", state.events, report.events));
    }
    Ok(report)
}

/// Places in the log, a bit for each at which a record can begin.
#[derive(Default)]
struct Places(Vec<u64>);

impl Places {
    fn insert(&mut self, offset: u64) {
        let at = (offset / ALIGN as u64) as usize;
        if at / 64 >= self.0.len() {
            self.0.resize(at / 64 + 1, 0);
        }
        self.0[at / 64] |= 1 << (at % 64);
    }

    fn contains(&self, offset: u64) -> bool {
        let at = (offset / ALIGN as u64) as usize;
        self.0.get(at / 64).is_some_and(|bits| bits & 1 << (at % 64) != 0)
    }
}

/// What the log says is removed. As in a replay, a removal counts only behind the event that caused it, or with that
/// event in the index, where damage stands between the two.
fn removed_in(files: &Files) -> Result<Places, StoreError> {
    let mut removed = Places::default();
    let (mut cause, mut is_indexed) = (None, false);
    let mut reader = files.log.reader(HEADER_LEN);
    while let Some(step) = reader.next()? {
        match step {
            Step::Record(_, _, Record::Put(event)) => (cause, is_indexed) = (Some(event.id), true),
            Step::Record(_, _, Record::Erased(id)) => (cause, is_indexed) = (Some(id), false),
            Step::Record(_, _, Record::Remove(it)) if it.by.is_none() || it.by == cause => {
                if it.len > 0 && it.offset < files.log.end() {
                    removed.insert(it.offset);
                }
            }
            Step::Damaged { .. } if !is_indexed => cause = None,
            Step::Record(..) | Step::Damaged { .. } | Step::TornTail { .. } => {}
        }
    }
    Ok(removed)
}

/// Checks one record and what the index has for it. Returns how many entries belong to it.
fn check_event(
    files: &Files,
    event: &StoredEvent<'_>,
    place: Place,
    is_removed: bool,
    report: &mut VerifyReport,
) -> Result<u64, StoreError> {
    let stored_at = files.index.get(&schema::by_id(&event.id))?.as_ref().and_then(schema::place);
    match (stored_at == Some(place), is_removed) {
        (true, false) => {}
        (false, true) => return Ok(0), // perhaps stored again later
        (true, true) => report.problem(format!("index: event {} was removed and is still there", event.id)),
        (false, false) => {
            report.problem(format!("index: event {} at byte {} is missing", event.id, place.offset));
            return Ok(0);
        }
    }
    report.events += 1;
    check_json(event, place, report);
    if !files.bloom.contains(&event.id.0) {
        report.problem(format!("filter on ids: event {} is missing", event.id));
    }
    let entries: BTreeMap<Key, Option<Value>> = schema::entries(event, place).into_iter().collect();
    for (key, value) in &entries {
        if files.index.get(key)? != *value {
            report.problem(format!("index: an entry of event {} is missing or wrong ({key:?})", event.id));
        }
    }
    Ok(entries.len() as u64)
}

fn check_json(event: &StoredEvent<'_>, place: Place, report: &mut VerifyReport) {
    let at = format!("event {} at byte {}", event.id, place.offset);
    let parsed = std::str::from_utf8(&event.json).ok().and_then(|json| Event::from_json(json).ok());
    let Some(parsed) = parsed else {
        return report.problem(format!("{at}: its JSON is no event"));
    };
    let same = parsed.id == event.id
        && parsed.pubkey == event.pubkey
        && parsed.created_at == event.created_at
        && parsed.kind == event.kind
        && parsed.expiration() == event.expiration;
    if !same {
        report.problem(format!("{at}: its header and its JSON differ"));
    }
    if let Err(error) = Verified::check(parsed) {
        report.problem(format!("{at}: {error}"));
    }
}

/// Counts the index's entries: none missing was found above, so a surplus points at nothing that is stored.
fn check_index(files: &Files, expected: u64, report: &mut VerifyReport) -> Result<(), StoreError> {
    let (from, to) = schema::everything();
    for_each_key(&files.index, from, to, |key| report.entries += u64::from(!schema::is_counter(key)))?;
    if report.entries != expected {
        let found = report.entries;
        report.problem(format!("index: it has {found} entries, and the stored events have {expected}"));
    }
    Ok(())
}
