//! The matches of one filter in the embedded store, newest first.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::protocol::event::Fields;
use crate::protocol::slot::{self, Slot};
use crate::protocol::supersede::is_expired;
use crate::protocol::{EventId, Filter, PublicKey, Visibility};

use super::embedded::Files;
use super::merge::{Candidate, Merge};
use super::plan::{Plan, plan};
use super::record::{Record, StoredEvent};
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
    Ids(Vec<EventId>),
    Places(std::vec::IntoIter<Place>),
}

impl EmbeddedScan {
    /// Begins a query of these files.
    pub(super) fn of(files: Arc<Files>, query: Query) -> Self {
        let offset = |position: Position| position.0.saturating_add_signed(-files.base).max(files.exact_from);
        let before = query.before.map_or(u64::MAX, offset);
        let (asked_by, former) = (None, RefCell::default());
        let view = View { now: query.now, before, with_json: true, visible: query.visible, asked_by, former };
        UnionScan::new(query.wanted, Context { files, view, buffer: Vec::new() }, EmbeddedMatches::of)
    }

    /// Has settings judged by what this filter asks for, whatever the streams' own filters add to find things.
    pub(super) fn asked_by(mut self, filter: Filter) -> Self {
        self.context().view.asked_by = Some(filter);
        self
    }
}

impl EmbeddedMatches {
    fn of(wanted: &Wanted) -> Self {
        let (since, until) = (wanted.filter.since.unwrap_or(0), wanted.filter.until.unwrap_or(u64::MAX));
        match plan(&wanted.filter) {
            Plan::Nothing => EmbeddedMatches::Ids(Vec::new()),
            Plan::Ids(ids) => EmbeddedMatches::Ids(ids.to_vec()),
            Plan::Ranges(stretches) => {
                let prefixes = stretches.into_iter().map(Prefix::of).collect();
                EmbeddedMatches::Ranges(Merge::new(prefixes, since, until))
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
        if let EmbeddedMatches::Ids(ids) = self {
            let places = places_in_order(std::mem::take(ids), files, buffer)?;
            *self = EmbeddedMatches::Places(places.into_iter());
        }
        match self {
            EmbeddedMatches::Places(places) => {
                let Some(place) = places.next() else { return Ok(false) };
                ready.extend(files.read_match(place, filter, view, buffer));
            }
            EmbeddedMatches::Ranges(merge) => {
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
            EmbeddedMatches::Ids(_) => {}
        }
        Ok(true)
    }

    fn count_only(context: &mut Context) {
        context.view.with_json = false;
    }
}

/// Looks ids up and puts the places of those that are there in answer order; whether they match is found out when they are
/// read. Holds places, not events: a thousand ids may be a thousand large events.
fn places_in_order(ids: Vec<EventId>, files: &Files, buffer: &mut Vec<u8>) -> Result<Vec<Place>, StoreError> {
    let mut found = Vec::new();
    for id in ids {
        let Some(place) = files.place_of(&id)? else { continue };
        let created_at = match files.log.read_packed(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => event.created_at,
            Ok((Record::Packed(packed), _)) => packed.header.created_at,
            Ok(_) => continue, // erased since it was looked up
            Err(error) => {
                tell_unreadable(&error);
                continue;
            }
        };
        found.push(((std::cmp::Reverse(created_at), id), place));
    }
    found.sort_unstable_by_key(|(order, _)| *order);
    Ok(found.into_iter().map(|(_, place)| place).collect())
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
    /// The versions of an author's settings that another one names. None where the index cannot be read, which the query
    /// finds out by itself.
    pub(super) fn former_versions(&self, author: &PublicKey) -> HashSet<EventId> {
        let mut merge = Merge::new(vec![Prefix::author_kind(author, slot::KIND)], 0, u64::MAX);
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

    /// Reads a record and gives it back if it is a visible event that matches. What cannot be read is logged.
    fn read_match(&self, place: Place, filter: &Filter, view: &View, buffer: &mut Vec<u8>) -> Option<Match> {
        if place.offset >= view.before {
            return None;
        }
        let event = match self.log.read(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => event,
            Ok(_) => return None, // erased or taken out after the index was read
            Err(error) => {
                tell_unreadable(&error);
                return None;
            }
        };
        if is_expired(event.expiration, view.now) || !filter.matches(&event) {
            return None;
        }
        let asked_by = view.asked_by.as_ref().unwrap_or(filter);
        if !view.visible.answers(asked_by, &event, || view.is_former(self, &event)) {
            return None;
        }
        let (created_at, id) = (event.created_at(), event.id);
        let json = match event.json {
            _ if !view.with_json => Bytes::new(),
            Cow::Borrowed(json) => Bytes::copy_from_slice(json),
            Cow::Owned(json) => Bytes::from(json),
        };
        Some(Match { created_at, id, json })
    }
}
