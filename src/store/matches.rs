//! The matches of one filter in the embedded store, newest first.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::protocol::slot::{self, Slot};
use crate::protocol::supersede::is_expired;
use crate::protocol::{EventId, Filter, PublicKey, Visibility};

use super::embedded::Files;
use super::estimate::{Estimate, estimate};
use super::merge::{Candidate, Merge};
use super::plan::{Plan, plan, rivals};
use super::record::{self, Record, StoredEvent};
use super::scan::{Match, Source, UnionScan};
use super::schema::{Place, Prefix};
use super::{Position, Query, StoreError, Wanted};

/// Authors whose former settings a query remembers.
const FORMER_AUTHORS_MAX: usize = 1_024;

/// A query of the embedded store.
pub(super) type EmbeddedScan = UnionScan<EmbeddedMatches>;

/// What the filters of a query share.
pub(super) struct Context {
    files: Arc<Files>,
    view: View,
    buffer: Vec<u8>,
}

/// What of the store a query may see.
struct View {
    now: u64,
    /// Only records before this offset.
    before: u64,
    /// Whether rows are wanted, or only their number.
    with_json: bool,
    visible: Visibility,
    /// The filter by which settings are asked for, where it is not that of the stream.
    asked_by: Option<Filter>,
    /// The former versions of settings of those authors whose settings were met.
    former: RefCell<HashMap<PublicKey, HashSet<EventId>>>,
}

/// Where the matches of one filter lie.
pub(super) enum EmbeddedMatches {
    Ranges(Merge),
    /// By id: to be looked up, then in order.
    LookUp(LookUp),
    Places(std::vec::IntoIter<Place>),
}

/// Ids that are being looked up.
#[derive(Default)]
pub(super) struct LookUp {
    ids: Vec<EventId>,
    /// Places in answer order, once there are no more ids. Places and not events: a thousand ids may be a thousand large
    /// events.
    found: Vec<((std::cmp::Reverse<u64>, EventId), Place)>,
}

/// Stretches that are opened, or ids that are looked up, in one step: each costs about as much as ten candidates, and the
/// clock is looked at once in so many steps.
const OPENED_A_STEP: usize = 4;

impl EmbeddedScan {
    /// Begins a query of these files.
    pub(super) fn of(files: Arc<Files>, query: Query) -> Self {
        let offset = |position: Position| position.0.saturating_add_signed(-files.base).max(files.exact_from);
        let before = query.before.map_or(u64::MAX, offset);
        let (asked_by, former) = (None, RefCell::default());
        let view = View { now: query.now, before, with_json: true, visible: query.visible, asked_by, former };
        let at = files.clone();
        let source = |wanted: &Wanted| EmbeddedMatches::of(wanted, &at);
        UnionScan::new(query.wanted, Context { files, view, buffer: Vec::new() }, source)
    }

    /// Has settings judged by what this filter asks for, whatever the streams' own filters add to find things.
    pub(super) fn asked_by(mut self, filter: Filter) -> Self {
        self.context().view.asked_by = Some(filter);
        self
    }
}

impl EmbeddedMatches {
    fn of(wanted: &Wanted, files: &Files) -> Self {
        let (since, until) = (wanted.filter.since.unwrap_or(0), wanted.filter.until.unwrap_or(u64::MAX));
        match plan(&wanted.filter) {
            Plan::Nothing => EmbeddedMatches::LookUp(LookUp::default()),
            Plan::Ids(ids) => EmbeddedMatches::LookUp(LookUp { ids: ids.to_vec(), found: Vec::new() }),
            Plan::Ranges(stretches) => {
                let cheapest = files.estimates(&wanted.filter, wanted.limit).into_iter().next();
                let stretches = cheapest.map_or(stretches, |cheapest| cheapest.stretches);
                let prefixes = stretches.into_iter().map(Prefix::of).collect();
                EmbeddedMatches::Ranges(Merge::new(prefixes, since, until, wanted.limit))
            }
        }
    }
}

impl Source for EmbeddedMatches {
    type Context = Context;

    /// Reads the next candidate, with those whose order only the full ids decide.
    fn read_ahead(
        &mut self,
        filter: &Filter,
        context: &mut Context,
        ready: &mut VecDeque<Match>,
    ) -> Result<bool, StoreError> {
        let Context { files, view, buffer } = context;
        match self {
            EmbeddedMatches::LookUp(look_up) => {
                if let Some(places) = look_up.step(files, buffer)? {
                    *self = EmbeddedMatches::Places(places.into_iter());
                }
            }
            EmbeddedMatches::Places(places) => {
                let Some(place) = places.next() else { return Ok(false) };
                ready.extend(files.read_match(place, filter, view, buffer));
            }
            EmbeddedMatches::Ranges(merge) => {
                if !merge.open(OPENED_A_STEP, &files.index)? {
                    return Ok(true);
                }
                let Some(first) = merge.next(&files.index)? else { return Ok(false) };
                let read = |candidate: Candidate, buffer: &mut Vec<u8>| {
                    let kind_fits = filter.kinds.as_ref().is_none_or(|kinds| kinds.contains(&candidate.kind));
                    kind_fits.then(|| files.read_match(candidate.place, filter, view, buffer)).flatten()
                };
                ready.extend(read(first, buffer));
                while merge.peek(&files.index)?.is_some_and(|next| next.ties_with(&first.suffix)) {
                    let Some(tied) = merge.next(&files.index)? else { break };
                    ready.extend(read(tied, buffer));
                }
                ready.make_contiguous().sort_by_key(Match::order);
            }
        }
        Ok(true)
    }

    fn count_only(context: &mut Context) {
        context.view.with_json = false;
    }
}

impl LookUp {
    /// Looks some of the ids up; the places of all that are there once there are no more. Whether they match is found out
    /// when they are read.
    fn step(&mut self, files: &Files, buffer: &mut Vec<u8>) -> Result<Option<Vec<Place>>, StoreError> {
        for _ in 0..OPENED_A_STEP {
            let Some(id) = self.ids.pop() else {
                self.found.sort_unstable_by_key(|(order, _)| *order);
                return Ok(Some(std::mem::take(&mut self.found).into_iter().map(|(_, place)| place).collect()));
            };
            let Some(place) = files.place_of(&id)? else { continue };
            if let Some(created_at) = files.created_at(place, buffer) {
                self.found.push(((std::cmp::Reverse(created_at), id), place));
            }
        }
        Ok(None)
    }
}

fn tell_unreadable(error: &StoreError) {
    tracing::error!("an event cannot be read and is left out of an answer: {error}; run `sledge verify`");
}

impl View {
    /// Whether a version of settings is named by another one. Each author's are looked up once a query.
    fn is_former(&self, files: &Files, event: &StoredEvent<'_>) -> bool {
        let mut former = self.former.borrow_mut();
        if former.len() >= FORMER_AUTHORS_MAX {
            former.clear();
        }
        former.entry(event.pubkey).or_insert_with(|| files.former_versions(&event.pubkey)).contains(&event.id)
    }
}

impl Files {
    /// What the indexes cost that a filter can be looked up in, the cheapest first; empty where the rules of the plan do
    /// without, or the index cannot be read, which the query finds out by itself.
    pub(super) fn estimates<'f>(&self, filter: &'f Filter, limit: usize) -> Vec<Estimate<'f>> {
        let Some(indexes) = rivals(filter) else { return Vec::new() };
        let bounds = (filter.since.unwrap_or(0), filter.until.unwrap_or(u64::MAX));
        estimate(indexes, bounds, limit, &self.index).unwrap_or_default()
    }

    /// The versions of an author's settings that another one names. None where the index cannot be read, which the query
    /// finds out by itself.
    pub(super) fn former_versions(&self, author: &PublicKey) -> HashSet<EventId> {
        let mut merge = Merge::new(vec![Prefix::author_kind(author, slot::KIND)], 0, u64::MAX, 0);
        let (mut versions, mut buffer) = (Vec::new(), Vec::new());
        while let Ok(Some(candidate)) = merge.next(&self.index) {
            let place = candidate.place;
            if let Ok((Record::Put(event), _)) = self.log.read(place.offset, place.read_len(), &mut buffer)
                && event.pubkey == *author
            {
                versions.extend(event.settings_version());
            }
        }
        Slot::new(versions).former()
    }

    /// When the event at this place was made. None where it was erased since it was looked up, or cannot be read.
    fn created_at(&self, place: Place, buffer: &mut Vec<u8>) -> Option<u64> {
        if let Ok(record) = self.log.hot().get(place.offset) {
            return Some(event_in(&record)?.created_at);
        }
        match self.log.read_packed(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => Some(event.created_at),
            Ok((Record::Packed(packed), _)) => Some(packed.header.created_at),
            Ok(_) => None,
            Err(error) => {
                tell_unreadable(&error);
                None
            }
        }
    }

    /// Reads a record and gives it back if it is a visible event that matches. What cannot be read is logged.
    fn read_match(&self, place: Place, filter: &Filter, view: &View, buffer: &mut Vec<u8>) -> Option<Match> {
        if place.offset >= view.before {
            return None;
        }
        let miss = match self.log.hot().get(place.offset) {
            Ok(record) => {
                let event = event_in(&record)?;
                let (created_at, id) = self.answers(&event, filter, view)?;
                let json = if view.with_json { record.slice_ref(&event.json) } else { Bytes::new() };
                return Some(Match { created_at, id, json });
            }
            Err(miss) => miss,
        };
        let event = match self.log.read(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => event,
            Ok(_) => return None, // erased or taken out after the index was read
            Err(error) => {
                tell_unreadable(&error);
                return None;
            }
        };
        let (created_at, id) = self.answers(&event, filter, view)?;
        if !view.with_json {
            return Some(Match { created_at, id, json: Bytes::new() });
        }
        let json_len = event.json.len();
        let record = match event.json {
            Cow::Borrowed(_) => Bytes::copy_from_slice(&buffer[..record::checked_len(buffer)]),
            Cow::Owned(_) => record::plain(&event).into(),
        };
        self.log.hot().keep(place.offset, miss, &record);
        Some(Match { created_at, id, json: record.slice(record.len() - json_len..) })
    }

    /// When and under which id the event was made, if it is an answer: it matches, and may be seen.
    fn answers(&self, event: &StoredEvent<'_>, filter: &Filter, view: &View) -> Option<(u64, EventId)> {
        if is_expired(event.expiration, view.now) || !filter.matches(event) {
            return None;
        }
        let asked_by = view.asked_by.as_ref().unwrap_or(filter);
        let answers = view.visible.answers(asked_by, event, || view.is_former(self, event));
        answers.then_some((event.created_at, event.id))
    }
}

/// The event in a record that was kept in memory.
fn event_in(record: &[u8]) -> Option<StoredEvent<'_>> {
    match record::parse(record)? {
        Record::Put(event) => Some(event),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Instant;

    use super::*;
    use crate::store::testing::{note, open};
    use crate::store::{PageBudget, Progress, Store};

    /// Thousands of ids are looked up in portions: a turn that is over before it begins does a bounded part, and in the end
    /// nothing is missing or out of order.
    #[test]
    fn looking_up_many_ids_can_rest() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let notes: Vec<_> = (0..40).map(|n| note(1_000 + n, "")).collect();
        store.apply(&notes, 2_000).unwrap();
        let unknown = (0..2_000u16).map(|n| EventId(std::array::from_fn(|at| (n >> (at % 2 * 8)) as u8)));
        let mut ids: Vec<EventId> = unknown.chain(notes.iter().map(|note| note.id)).collect();
        ids.sort_unstable();
        let filter = Filter { ids: Some(ids), ..Filter::default() };
        let wanted = vec![Wanted { filter, limit: 100, whole_seconds: false }];
        let query = Query { wanted, now: 2_000, before: None, visible: Visibility::everything() };
        let mut scan = store.scan(query).unwrap();
        let (mut rows, mut turns) = (Vec::new(), 1);
        while scan.page(PageBudget { bytes_max: usize::MAX, until: Instant::now() }, &mut rows).unwrap()
            == Progress::Paused
        {
            turns += 1;
        }
        assert!(turns >= 2_000 / (32 * OPENED_A_STEP), "{turns} turns");
        let times: Vec<u64> = rows.iter().map(|row| row.created_at).collect();
        assert_eq!(times, (1_000..1_040).rev().collect::<Vec<_>>());
    }
}
