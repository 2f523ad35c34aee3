//! A set for reconciliation from sums kept beforehand ([`super::sums`]) and, beside it, what only some readers see or only
//! for a time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::protocol::filter::TagCondition;
use crate::protocol::item::{Item, Sum};
use crate::protocol::label::NAMESPACE;
use crate::protocol::slot;
use crate::protocol::supersede::is_expired;
use crate::protocol::tag::TagLetter;
use crate::protocol::visibility::PrivateKinds;
use crate::protocol::{Filter, Kind, PublicKey, Visibility};

use super::embedded::Files;

use super::index::Key;
use super::matches::EmbeddedScan;
use super::record::Record;
use super::schema;
use super::sums::Sums;
use super::{Progress, Query, Scan, StoreError, Summed, Wanted};

/// Leaves whose events are kept at hand: a range has two edges, and the next range begins at the second.
const LEAVES_AT_HAND: usize = 2;
/// More private kinds than this are not asked for one by one.
const PRIVATE_KINDS_MAX: usize = 64;
/// Events with an expiration that are looked at in one go.
const EXPIRING_A_READ: usize = 128;

/// See [`Summed`].
pub(super) struct EmbeddedSummed {
    files: Arc<Files>,
    sums: Arc<Sums>,
    query: Query,
    /// `from <= item < to`, by the filter's bounds in time.
    window: (Item, Item),
    stage: Stage,
    /// What is not in the sums and the reader sees, in order once it is complete.
    beside: Vec<Item>,
    at_hand: VecDeque<(u64, u64, Vec<Item>)>,
}

/// What is still to be gathered.
enum Stage {
    Private(Box<EmbeddedScan>),
    Expiring(Option<(Key, Key)>),
    Complete,
}

impl EmbeddedSummed {
    /// The set for a query that `sums` serve; none where too many questions would find what a reader may see.
    pub(super) fn new(files: Arc<Files>, sums: Arc<Sums>, query: Query) -> Option<EmbeddedSummed> {
        let filter = &query.wanted.first()?.filter;
        let wanted = |filter| Wanted { filter, limit: usize::MAX, whole_seconds: false };
        let private = if sums.are_own() { versions(filter) } else { private_filters(filter, &query.visible)? };
        let private = private.into_iter().map(wanted).collect();
        let scan = EmbeddedScan::of(files.clone(), Query { wanted: private, ..query.clone() }).asked_by(filter.clone());
        let end = filter.until.and_then(|until| until.checked_add(1)).map_or(Item::END, Item::at);
        let window = (Item::at(filter.since.unwrap_or(0)), end);
        let stage = Stage::Private(Box::new(scan));
        Some(EmbeddedSummed { files, sums, query, window, stage, beside: Vec::new(), at_hand: VecDeque::new() })
    }

    /// Gathers on; false when all is there.
    fn gather(&mut self, until: Instant) -> Result<bool, StoreError> {
        match &mut self.stage {
            Stage::Private(scan) => {
                if scan.items(until, &mut self.beside)? != Progress::Paused {
                    self.stage = Stage::Expiring(Some(schema::expiring_after(self.query.now)));
                }
            }
            Stage::Expiring(Some((from, to))) => {
                let mut entries = Vec::with_capacity(EXPIRING_A_READ);
                self.files.index.scan(from, to, EXPIRING_A_READ, &mut entries)?;
                let full = entries.len() == EXPIRING_A_READ;
                let next = entries.last().filter(|_| full).and_then(|(key, _)| key.successor());
                self.stage = Stage::Expiring(next.map(|next| (next, *to)));
                let places = entries.iter().filter_map(|(key, value)| schema::expired_place(key, value));
                let found = places.filter_map(|place| self.expiring(place)).collect::<Vec<_>>();
                self.beside.extend(found);
            }
            Stage::Expiring(None) => {
                self.beside.retain(|item| item.created_at < u64::MAX);
                self.beside.sort_unstable();
                self.beside.dedup();
                self.stage = Stage::Complete;
            }
            Stage::Complete => return Ok(false),
        }
        Ok(true)
    }

    fn expiring(&self, place: schema::Place) -> Option<Item> {
        let mut buffer = Vec::new();
        let Ok((Record::Put(event), _)) = self.files.log.read(place.offset, place.read_len(), &mut buffer) else {
            return None;
        };
        let filter = &self.query.wanted.first()?.filter;
        let is_former = || self.files.former_versions(&event.pubkey).contains(&event.id);
        let takes_part = !is_expired(event.expiration, self.query.now)
            && filter.matches(&event)
            && self.query.visible.answers(filter, &event, is_former);
        takes_part.then_some(Item { created_at: event.created_at, id: event.id })
    }

    /// The part of a range within the filter's bounds.
    fn clamp(&self, from: &Item, to: &Item) -> (Item, Item) {
        ((*from).max(self.window.0), (*to).min(self.window.1))
    }

    /// The summed events of one leaf.
    fn leaf(&mut self, from: u64, to: u64) -> Result<&[Item], StoreError> {
        let known = self.at_hand.iter().position(|(a, b, _)| (*a, *b) == (from, to));
        let at = match known {
            Some(at) => at,
            None => {
                let items = self.sums.events(&self.files, from, to)?;
                if self.at_hand.len() >= LEAVES_AT_HAND {
                    self.at_hand.pop_front();
                }
                self.at_hand.push_back((from, to, items));
                self.at_hand.len() - 1
            }
        };
        Ok(&self.at_hand[at].2)
    }
}

impl Summed for EmbeddedSummed {
    fn prepare(&mut self, until: Instant) -> Result<Progress, StoreError> {
        // What was read for the last message may have changed since.
        self.at_hand.clear();
        while self.sums.work(&self.files)? || self.gather(until)? {
            if Instant::now() >= until {
                return Ok(Progress::Paused);
            }
        }
        Ok(Progress::Finished)
    }

    fn held(&self) -> usize {
        self.beside.len()
    }

    fn sum(&mut self, from: &Item, to: &Item) -> Result<Sum, StoreError> {
        let (from, to) = self.clamp(from, to);
        if from >= to {
            return Ok(Sum::default());
        }
        let (mut sum, edges) = self.sums.whole_leaves(&from, &to);
        for (start, end) in edges {
            sum.plus(&within(self.leaf(start, end)?, &from, &to).iter().collect());
        }
        sum.plus(&within(&self.beside, &from, &to).iter().collect());
        Ok(sum)
    }

    fn items(&mut self, from: &Item, to: &Item, max: usize, out: &mut Vec<Item>) -> Result<(), StoreError> {
        let (from, to) = self.clamp(from, to);
        if from >= to {
            return Ok(());
        }
        let mut items = within(&self.beside, &from, &to).iter().copied().take(max).collect::<Vec<_>>();
        let mut left = max;
        for (start, end) in self.sums.stretches(&from, &to) {
            if left == 0 {
                break;
            }
            let leaf = within(self.leaf(start, end)?, &from, &to);
            let taken = leaf.len().min(left);
            items.extend_from_slice(&leaf[..taken]);
            left -= taken;
        }
        items.sort_unstable();
        items.dedup();
        items.truncate(max);
        out.append(&mut items);
        Ok(())
    }

    fn cuts(&mut self, from: &Item, to: &Item, parts: usize) -> Result<Vec<u64>, StoreError> {
        let (from, to) = self.clamp(from, to);
        Ok(if from < to { self.sums.cuts(&from, &to, parts) } else { Vec::new() })
    }
}

/// The part of an ordered list that lies in a range.
fn within<'i>(items: &'i [Item], from: &Item, to: &Item) -> &'i [Item] {
    let start = items.partition_point(|item| item < from);
    let end = items.partition_point(|item| item < to);
    items.get(start..end).unwrap_or_default()
}

/// What finds the versions of settings that a filter asks for: the only private events that an author's own sums leave out.
fn versions(filter: &Filter) -> Vec<Filter> {
    let asked = slot::is_asked_for(filter) && filter.kinds.as_ref().is_none_or(|kinds| kinds.contains(&slot::KIND));
    let of_kind = Filter { kinds: Some(vec![slot::KIND]), ..filter.clone() };
    asked.then_some(of_kind).into_iter().collect()
}

/// Questions that together find every private event a reader may see, and nothing that anybody may.
fn private_filters(filter: &Filter, visible: &Visibility) -> Option<Vec<Filter>> {
    let Some((private, keys)) = visible.reader() else { return Some(Vec::new()) };
    if keys.is_empty() {
        return Some(Vec::new());
    }
    let private = private_kinds(private)?;
    let of_kinds = |filter: &Filter| {
        let is_wanted = |kind: &Kind| filter.kinds.as_ref().is_none_or(|kinds| kinds.contains(kind));
        let kinds = private.iter().copied().filter(is_wanted).collect();
        Filter { kinds: Some(kinds), ..filter.clone() }
    };
    let involved = keys.iter().flat_map(|key| involving(filter, key));
    let all = involved.flat_map(|filter| [of_kinds(&filter), with_tag(&filter, TagLetter::LABEL_NAMESPACE, NAMESPACE)]);
    Some(all.filter(|filter| !filter.matches_nothing()).collect())
}

/// A filter's events by a key, and those to it.
fn involving(filter: &Filter, key: &PublicKey) -> [Filter; 2] {
    let is_wanted = filter.authors.as_ref().is_none_or(|authors| authors.contains(key));
    let authors = if is_wanted { vec![*key] } else { Vec::new() };
    [Filter { authors: Some(authors), ..filter.clone() }, with_tag(filter, TagLetter::P, &key.to_hex())]
}

fn with_tag(filter: &Filter, letter: TagLetter, value: &str) -> Filter {
    let mut filter = filter.clone();
    filter.tags.push(TagCondition { letter, values: vec![value.into()] });
    filter
}

fn private_kinds(private: &PrivateKinds) -> Option<Vec<Kind>> {
    let kinds: Vec<Kind> = private.iter().take(PRIVATE_KINDS_MAX + 1).collect();
    (kinds.len() <= PRIVATE_KINDS_MAX).then_some(kinds)
}
