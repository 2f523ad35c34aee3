//! Sums of ids over stretches of time, kept up to date with every write: what reconciliation (NIP-77) compares without
//! reading the events.
//!
//! A [`Sums`] belongs to one filter that one stretch of the index serves: everything, an author, a kind, a tag. Its time is
//! cut into *leaves* of some hundred events, each with the number of its events and the sum of their ids. A range is
//! summed from whole leaves and the events of the two at its edges. Sums form a group, so a removal takes its event out
//! of one leaf, and nothing else changes.
//!
//! **Made when first asked for**, in portions, newest first; a leaf that many new events fell into is cut up in the same
//! way. Between portions events come and go: what the portion has passed is counted by the write, what lies ahead will be
//! met there. A portion and the moment at which a write becomes visible exclude each other ([`Registry`]).
//!
//! **Holds only what everybody sees for ever**: no private event, which some readers see and others do not, and none that
//! expires, which ends without a write. Those that a reader sees are gathered for each reader beside it. But for an author
//! who asks for the own events, which is what the devices of a person do, there are sums of their own with private events
//! in them. Versions of settings are never in a sum: another version makes them former ones.
//!
//! Memory: 64 bytes for every 256 events or more. A second is never cut, so a flood in one makes a large leaf.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::protocol::item::{Item, Sum};
use crate::protocol::slot;
use crate::protocol::{Filter, Visibility};

use super::embedded::Files;
use super::plan::{Plan, plan};
use super::record::{Record, StoredEvent};
use super::schema::{self, Place, Prefix, Suffix};
use super::{Query, StoreError};

/// Events of a leaf, or a little more.
const LEAF_EVENTS: u64 = if cfg!(test) { 8 } else { 256 };
/// A leaf with more is cut up, unless that was tried when it had half as many.
const LEAF_EVENTS_MAX: u64 = 4 * LEAF_EVENTS;
/// Index entries looked at in one portion; writes wait for it.
const PORTION_ENTRIES: usize = if cfg!(test) { 5 } else { 128 };
/// A range that touches fewer leaves is cut event by event.
const CUT_LEAVES_MIN: usize = 6;
/// Filters with sums at a time; each write looks whether it belongs to one.
const FILTERS_MAX: usize = 32;

/// The sums of one generation of files.
#[derive(Default)]
pub(super) struct Registry(Mutex<Vec<Arc<Sums>>>);

/// Sums over what one filter matches.
pub(super) struct Sums {
    /// Without bounds in time.
    filter: Filter,
    prefix: Prefix,
    /// What everybody sees, or what an author sees of the own events.
    visible: Visibility,
    leaves: Mutex<Leaves>,
}

/// The newest first; never empty, the last one begins at 0.
struct Leaves {
    leaves: Vec<Leaf>,
    work: Option<Work>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Leaf {
    /// First second; it ends where the one before it begins.
    from: u64,
    /// `None` until all of its events were met.
    sum: Option<Sum>,
    /// How many events it had when it was last tried to be cut.
    settled: u64,
}

/// The cutting up of one leaf, on its way from its end to its beginning.
struct Work {
    leaf: usize,
    /// Behind the last second that is not in a leaf of its own yet.
    to: u64,
    /// What was met last.
    cursor: Option<Suffix>,
    /// Over what was met since the last cut.
    met: Sum,
    last_second: Option<u64>,
}

/// One event that came or went with a write.
#[derive(Clone, Copy, Debug)]
struct Delta {
    item: Item,
    suffix: Suffix,
    added: bool,
}

/// What a write changes in the sums.
pub(super) struct Deltas {
    /// The sums as they were when the write began, each with what falls into it.
    known: Vec<(Arc<Sums>, Vec<Delta>)>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Sums>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sums that serve a query, if they are there; with `make`, also if they must be made first.
    pub(super) fn find(&self, query: &Query, make: bool) -> Option<Arc<Sums>> {
        let [wanted] = query.wanted.as_slice() else { return None };
        let filter = Filter { since: None, until: None, limit: None, ..wanted.filter.clone() };
        if wanted.limit != usize::MAX || query.before.is_some() {
            return None;
        }
        let visible = if is_own(&filter, &query.visible) { query.visible.clone() } else { query.visible.public() };
        let mut all = self.lock();
        if let Some(at) = all.iter().position(|sums| sums.filter == filter && sums.visible == visible) {
            // The one that was asked for last stays longest.
            let found = all.remove(at);
            all.push(found.clone());
            return Some(found);
        }
        let Plan::Ranges(stretches) = plan(&filter) else { return None };
        let [stretch] = stretches[..] else { return None };
        let prefix = Prefix::of(stretch);
        if !make {
            return None;
        }
        if all.len() >= FILTERS_MAX {
            all.remove(0);
        }
        all.push(Arc::new(Sums::new(filter, prefix, visible)));
        all.last().cloned()
    }

    /// What a write that begins now will have to change.
    pub(super) fn begin(&self) -> Deltas {
        Deltas { known: self.lock().iter().map(|sums| (sums.clone(), Vec::new())).collect() }
    }

    /// Makes a write visible and changes the sums, as one step for whoever meets events in portions.
    pub(super) fn commit(
        &self,
        deltas: Deltas,
        make_visible: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let all = self.lock();
        make_visible()?;
        for sums in all.iter() {
            match deltas.known.iter().find(|(known, _)| Arc::ptr_eq(known, sums)) {
                Some((_, deltas)) => sums.apply(deltas),
                // Made while the write was under way: some of what it changes may have been met already.
                None => sums.begin_again(),
            }
        }
        Ok(())
    }
}

/// Whether an author asks for the own events and has proven no other key, which might see more of them.
fn is_own(filter: &Filter, visible: &Visibility) -> bool {
    let reader = visible.reader().map(|(_, keys)| keys).filter(|keys| keys.len() == 1);
    reader.is_some_and(|keys| filter.authors.as_deref() == Some(keys))
}

impl Deltas {
    /// Notes an event that came or went.
    pub(super) fn note(&mut self, event: &StoredEvent<'_>, offset: u64, added: bool) {
        for (sums, deltas) in &mut self.known {
            if let Some(item) = sums.member(event) {
                deltas.push(Delta { item, suffix: Suffix::of(event, offset), added });
            }
        }
    }
}

impl Sums {
    fn new(filter: Filter, prefix: Prefix, visible: Visibility) -> Sums {
        Sums { filter, prefix, visible, leaves: Mutex::new(Leaves::unknown()) }
    }

    /// Whether they are an author's own events, private ones too.
    pub(super) fn are_own(&self) -> bool {
        is_own(&self.filter, &self.visible)
    }

    fn leaves(&self) -> MutexGuard<'_, Leaves> {
        self.leaves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of an event is summed up, if it is one of these.
    fn member(&self, event: &StoredEvent<'_>) -> Option<Item> {
        let belongs = event.expiration.is_none()
            && event.created_at < u64::MAX
            && self.filter.matches(event)
            && self.visible.allows(event)
            && (self.visible.reader().is_none() || !slot::is_version(event));
        belongs.then_some(Item { created_at: event.created_at, id: event.id })
    }

    fn apply(&self, deltas: &[Delta]) {
        let mut leaves = self.leaves();
        deltas.iter().for_each(|delta| leaves.apply(delta));
    }

    fn begin_again(&self) {
        *self.leaves() = Leaves::unknown();
    }

    /// Meets the next portion of events; false when there is nothing to do.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(super) fn work(&self, files: &Files) -> Result<bool, StoreError> {
        // No write becomes visible meanwhile.
        let _writes = files.sums.lock();
        let mut leaves = self.leaves();
        let Some((from, to)) = leaves.next_stretch(&self.prefix) else { return Ok(false) };
        let mut entries = Vec::with_capacity(PORTION_ENTRIES);
        files.index.scan(&from, &to, PORTION_ENTRIES, &mut entries)?;
        let mut buffer = Vec::new();
        for (key, value) in &entries {
            let Some(suffix) = self.prefix.suffix_of(key) else { continue };
            let place = schema::place_and_kind(&suffix, value).map(|(place, _)| place);
            let item = place.and_then(|place| self.read(files, place, &mut buffer));
            leaves.meet(suffix, item);
        }
        if entries.len() < PORTION_ENTRIES {
            leaves.finish();
        }
        Ok(true)
    }

    /// Every event of `from <= created_at < to`, in order.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(super) fn events(&self, files: &Files, from: u64, to: u64) -> Result<Vec<Item>, StoreError> {
        let mut items = Vec::new();
        let end = self.prefix.end(from);
        let mut next = to.checked_sub(1).map(|until| self.prefix.start(until));
        let (mut entries, mut buffer) = (Vec::new(), Vec::new());
        while let Some(start) = next {
            entries.clear();
            files.index.scan(&start, &end, PORTION_ENTRIES, &mut entries)?;
            for (key, value) in &entries {
                let suffix = self.prefix.suffix_of(key);
                let place = suffix.and_then(|suffix| schema::place_and_kind(&suffix, value)).map(|(place, _)| place);
                items.extend(place.and_then(|place| self.read(files, place, &mut buffer)));
            }
            let full = entries.len() == PORTION_ENTRIES;
            next = entries.last().filter(|_| full).and_then(|(key, _)| key.successor());
        }
        items.sort_unstable();
        items.dedup();
        Ok(items)
    }

    fn read(&self, files: &Files, place: Place, buffer: &mut Vec<u8>) -> Option<Item> {
        match files.log.read(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => self.member(&event),
            Ok(_) => None,
            Err(error) => {
                tracing::error!("an event cannot be read and takes no part in a sum: {error}; run `sledge verify`");
                None
            }
        }
    }

    /// The sum of all whole leaves within a range, and the seconds of the others that it touches: `from..to` of each.
    pub(super) fn whole_leaves(&self, from: &Item, to: &Item) -> (Sum, Vec<(u64, u64)>) {
        let leaves = self.leaves();
        let (mut sum, mut edges, mut end) = (Sum::default(), Vec::new(), u64::MAX);
        let first = leaves.leaves.partition_point(|leaf| Item::at(leaf.from) >= *to);
        if let Some(before) = first.checked_sub(1) {
            end = leaves.leaves[before].from;
        }
        for leaf in &leaves.leaves[first..] {
            match leaf.sum {
                Some(whole) if *from <= Item::at(leaf.from) && Item::at(end) <= *to => sum.plus(&whole),
                _ => edges.push((leaf.from, end)),
            }
            end = leaf.from;
            if Item::at(leaf.from) <= *from {
                break;
            }
        }
        (sum, edges)
    }

    /// The leaves that a range touches, ascending: `from..to` of each in seconds.
    pub(super) fn stretches(&self, from: &Item, to: &Item) -> Vec<(u64, u64)> {
        let leaves = self.leaves();
        let first = leaves.leaves.partition_point(|leaf| Item::at(leaf.from) >= *to);
        let mut stretches = Vec::new();
        for (at, leaf) in leaves.leaves.iter().enumerate().skip(first) {
            stretches.push((leaf.from, leaves.end_of(at)));
            if Item::at(leaf.from) <= *from {
                break;
            }
        }
        stretches.reverse();
        stretches
    }

    /// Up to `parts - 1` seconds strictly within a range at which leaves begin, cutting it into parts of about the same
    /// number of events; ascending. None where the range touches too few leaves for that.
    pub(super) fn cuts(&self, from: &Item, to: &Item, parts: usize) -> Vec<u64> {
        let leaves = self.leaves();
        let within = |leaf: &&Leaf| *from < Item::at(leaf.from) && Item::at(leaf.from) < *to;
        let inside: Vec<&Leaf> = leaves.leaves.iter().filter(within).collect();
        if inside.len() < CUT_LEAVES_MIN {
            return Vec::new();
        }
        let count = |leaf: &Leaf| leaf.sum.map_or(0, |sum| sum.count);
        let each = (inside.iter().map(|leaf| count(leaf)).sum::<u64>() / parts as u64).max(1);
        let (mut cuts, mut met) = (Vec::with_capacity(parts), 0);
        for leaf in inside {
            met += count(leaf);
            if met >= each && cuts.len() + 1 < parts {
                cuts.push(leaf.from);
                met = 0;
            }
        }
        cuts.reverse();
        cuts
    }
}

impl Leaves {
    fn unknown() -> Leaves {
        Leaves { leaves: vec![Leaf::default()], work: None }
    }

    fn end_of(&self, leaf: usize) -> u64 {
        leaf.checked_sub(1).map_or(u64::MAX, |before| self.leaves[before].from)
    }

    /// Where the next portion begins and ends in the index; begins to cut up a leaf where one needs it.
    fn next_stretch(&mut self, prefix: &Prefix) -> Option<(super::index::Key, super::index::Key)> {
        if self.work.is_none() {
            let needs_cutting = |leaf: &Leaf| match leaf.sum {
                None => true,
                Some(sum) => sum.count > LEAF_EVENTS_MAX.max(2 * leaf.settled),
            };
            let leaf = self.leaves.iter().position(needs_cutting)?;
            let to = self.end_of(leaf);
            self.work = Some(Work { leaf, to, cursor: None, met: Sum::default(), last_second: None });
        }
        let work = self.work.as_ref()?;
        let begins = match &work.cursor {
            Some(cursor) => prefix.key_of(cursor).successor(),
            None => Some(prefix.start(work.to.saturating_sub(1))),
        };
        Some((begins?, prefix.end(self.leaves[work.leaf].from)))
    }

    /// The next index entry, with its event if that is one of these.
    fn meet(&mut self, suffix: Suffix, item: Option<Item>) {
        let Some(work) = &mut self.work else { return };
        let second = suffix.created_at();
        if let Some(last) = work.last_second.filter(|last| second < *last && work.met.count >= LEAF_EVENTS) {
            let cut = std::mem::take(&mut work.met);
            let rest = &mut self.leaves[work.leaf];
            if let Some(sum) = &mut rest.sum {
                sum.minus(&cut);
            }
            work.to = last;
            self.leaves.insert(work.leaf, Leaf { from: last, sum: Some(cut), settled: cut.count });
            work.leaf += 1;
        }
        if let Some(item) = item {
            work.met.add(&item.id);
        }
        (work.cursor, work.last_second) = (Some(suffix), Some(second));
    }

    /// The leaf that was being cut up has nothing more before it.
    fn finish(&mut self) {
        if let Some(work) = self.work.take() {
            let leaf = &mut self.leaves[work.leaf];
            debug_assert!(leaf.sum.is_none_or(|sum| sum == work.met));
            (leaf.sum, leaf.settled) = (Some(work.met), work.met.count);
        }
    }

    fn apply(&mut self, delta: &Delta) {
        let change = |sum: &mut Sum| if delta.added { sum.add(&delta.item.id) } else { sum.take(&delta.item.id) };
        let at = self.leaves.partition_point(|leaf| leaf.from > delta.item.created_at);
        if let Some(sum) = self.leaves.get_mut(at).and_then(|leaf| leaf.sum.as_mut()) {
            change(sum);
        }
        if let Some(work) = self.work.as_mut().filter(|work| work.leaf == at)
            && work.cursor.is_some_and(|cursor| delta.suffix <= cursor)
        {
            change(&mut work.met);
        }
    }
}
