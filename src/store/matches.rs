//! The matches of one filter in the embedded store, newest first.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::protocol::event::Fields;
use crate::protocol::supersede::is_expired;
use crate::protocol::{EventId, Filter, Visibility};

use super::embedded::Files;
use super::merge::{Candidate, Merge};
use super::plan::{Plan, plan};
use super::record::Record;
use super::scan::{Match, Source, UnionScan};
use super::schema::{Place, Prefix};
use super::{Position, Query, StoreError, Wanted};

/// A query of the embedded store.
pub(super) type EmbeddedScan = UnionScan<EmbeddedMatches>;

/// What the filters of a query share.
pub(super) struct Context {
    files: Arc<Files>,
    view: View,
    buffer: Vec<u8>,
}

/// What of the store a query may see.
#[derive(Clone)]
struct View {
    now: u64,
    /// Only records before this offset.
    before: u64,
    /// Whether rows are wanted, or only their number.
    with_json: bool,
    visible: Visibility,
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
        let view = View { now: query.now, before, with_json: true, visible: query.visible };
        UnionScan::new(query.wanted, Context { files, view, buffer: Vec::new() }, EmbeddedMatches::of)
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
            let places = places_in_order(std::mem::take(ids), filter, files, view, buffer)?;
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

/// Looks ids up and puts the places of those that match in answer order. Holds places, not events: a thousand ids may
/// be a thousand large events.
fn places_in_order(
    ids: Vec<EventId>,
    filter: &Filter,
    files: &Files,
    view: &View,
    buffer: &mut Vec<u8>,
) -> Result<Vec<Place>, StoreError> {
    let view = &View { with_json: false, ..view.clone() };
    let mut found = Vec::new();
    for id in ids {
        let Some(place) = files.place_of(&id)? else { continue };
        if let Some(matched) = files.read_match(place, filter, view, buffer) {
            found.push((matched.order(), place));
        }
    }
    found.sort_unstable_by_key(|(order, _)| *order);
    Ok(found.into_iter().map(|(_, place)| place).collect())
}

impl Files {
    /// Reads a record and gives it back if it is a visible event that matches. What cannot be read is logged.
    fn read_match(&self, place: Place, filter: &Filter, view: &View, buffer: &mut Vec<u8>) -> Option<Match> {
        if place.offset >= view.before {
            return None;
        }
        let event = match self.log.read(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => event,
            Ok(_) => return None, // erased or taken out after the index was read
            Err(error) => {
                tracing::error!("an event cannot be read and is left out of an answer: {error}; run `sledge verify`");
                return None;
            }
        };
        if is_expired(event.expiration, view.now) || !filter.matches(&event) || !view.visible.allows(&event) {
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
