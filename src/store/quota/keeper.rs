//! Holds a store to its rules.
//!
//! In: the events of a store by time ([`Ground`]), portion by portion. Out: which of them go, and whether a new one would
//! stay. Age and quota both walk through stretches of time, each walked once: behind a walk lie only events that stay. So
//! what is removed must not come back: the age limits refuse it, and against the quota's evictions stands a *reach* for
//! each [`Class`], the latest `created_at` that was evicted, up to which events of that class are refused. The ground keeps
//! the reaches; they fall when the rules change or there is room.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::{Class, ROOM_PERCENT, Rules, SHRINK_TO_PERCENT};
use crate::protocol::{Event, Kind, PublicKey};
use crate::store::{Retained, RetentionStats, StoreError};

/// Seconds that the first stretch of an eviction covers; the next ones adapt to how many events there are.
const FIRST_STRETCH_SECS: u64 = 1 << 20;
/// Fewest events of a stretch in which kinds that the rules name are looked for. They may be rare, and a search in
/// smaller steps takes longer than evicting a few too many is worth.
const SEARCHED_ENTRIES_MIN: usize = 64;

/// What a store takes on its disk.
#[derive(Clone, Copy)]
pub(in crate::store) struct Used {
    /// Bytes that go and come with single events.
    pub(in crate::store) live_bytes: u64,
    /// Bytes beside them.
    pub(in crate::store) other_bytes: u64,
    /// Events that can be read.
    pub(in crate::store) events: u64,
}

/// What a portion of a walk came to.
pub(in crate::store) struct Evicted<P> {
    pub(in crate::store) removed: usize,
    /// The latest `created_at` of a removed event.
    pub(in crate::store) latest: u64,
    /// Where the stretch goes on; none at its end.
    pub(in crate::store) rest: Option<P>,
}

/// A store's events by time, as a [`Keeper`] walks them.
pub(in crate::store) trait Ground {
    /// A point within a stretch.
    type Place;

    /// What the store takes at present.
    fn used(&mut self) -> Used;

    /// How many events have `from <= created_at <= until`, counted up to `limit`.
    fn count(&mut self, from: u64, until: u64, limit: usize) -> Result<usize, StoreError>;

    /// Looks at up to `entries_max` events of a stretch, from a place or its beginning on, and takes out those whose kind
    /// `goes` and whose author is not to be `kept`.
    fn evict(
        &mut self,
        stretch: (u64, u64),
        place: Option<Self::Place>,
        entries_max: usize,
        goes: &dyn Fn(Kind) -> bool,
        kept: &dyn Fn(&PublicKey) -> bool,
    ) -> Result<Evicted<Self::Place>, StoreError>;

    /// Keeps the reaches.
    fn save(&mut self, reaches: &[u8]) -> Result<(), StoreError>;
}

/// Holds a store to its [`Rules`].
pub(in crate::store) struct Keeper<P> {
    rules: Rules,
    /// For each [`Class`]: its events up to this `created_at` were evicted; 0: none.
    reaches: [AtomicU64; Class::ALL.len()],
    used_up: AtomicBool,
    /// [`Used::other_bytes`] when they were last looked up, which may take a while.
    other_bytes: AtomicU64,
    evicted: AtomicU64,
    progress: Mutex<Progress<P>>,
}

/// How far the walks have come. Only the writer's caller uses it.
struct Progress<P> {
    walk: Option<Walk<P>>,
    /// For each of [`Rules::ages`], the time before which all is walked.
    aged: Vec<(u64, u64)>,
    eviction: Option<Eviction>,
}

/// Making room, from going over the quota to being well below it.
#[derive(Clone, Copy)]
struct Eviction {
    /// Whose turn it is.
    class: Class,
    /// What is older was looked at.
    from: u64,
    /// Seconds that the last stretch covered.
    stretch_secs: u64,
}

/// A stretch of time that is being walked, its first and last second.
struct Walk<P> {
    since: u64,
    until: u64,
    place: Option<P>,
    why: Why,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    /// Kinds with this age, the number of which is its place in `aged`.
    Age(u64, usize),
    Quota(Class),
}

#[derive(serde::Serialize, serde::Deserialize)]
struct SavedReach {
    /// The rules under which it came to be.
    rules: String,
    /// Of [`Class::Other`].
    evicted_up_to: u64,
    /// Of [`Class::Named`].
    named_evicted_up_to: u64,
}

impl<P> Keeper<P> {
    /// A keeper of a store whose reaches were saved as `saved`.
    pub(in crate::store) fn new(rules: Rules, saved: Option<&[u8]>, other_bytes: u64) -> Self {
        let aged = rules.ages().into_iter().map(|age| (age, 0)).collect();
        let keeper = Keeper {
            reaches: Default::default(),
            rules,
            used_up: AtomicBool::new(false),
            other_bytes: AtomicU64::new(other_bytes),
            evicted: AtomicU64::new(0),
            progress: Mutex::new(Progress { walk: None, aged, eviction: None }),
        };
        keeper.hear(saved);
        keeper
    }

    /// Takes over the reaches that were saved last, perhaps by another process. Those of other rules do not count, and
    /// ones that cannot be read are none: at worst a few events come back and are evicted again.
    pub(in crate::store) fn hear(&self, saved: Option<&[u8]>) {
        let Some(saved) = saved else { return };
        let saved: SavedReach = match serde_json::from_slice(saved) {
            Ok(saved) => saved,
            Err(error) => {
                tracing::warn!(%error, "what the quota had evicted is not known any more");
                return;
            }
        };
        let of = |class| match class {
            _ if saved.rules != self.rules.text => 0,
            Class::Named => saved.named_evicted_up_to,
            Class::Other => saved.evicted_up_to,
        };
        for class in Class::ALL {
            self.reaches[class as usize].store(of(class), Ordering::Relaxed);
        }
    }

    /// Whether there is nothing to keep to.
    pub(in crate::store) fn is_idle(&self) -> bool {
        self.rules.limit_nothing()
    }

    /// Whether the quota allows this kind at present: while it is used up, only what makes room.
    pub(in crate::store) fn has_room_for(&self, kind: Kind) -> bool {
        matches!(kind, Kind::DELETION | Kind::VANISH) || !self.used_up.load(Ordering::Relaxed)
    }

    /// Whether a store with so many live bytes takes more than its quota.
    pub(in crate::store) fn is_over(&self, live_bytes: u64) -> bool {
        self.rules.quota_bytes > 0 && self.used_bytes(live_bytes) > self.rules.quota_bytes
    }

    /// Whether an event that comes now would stay.
    pub(in crate::store) fn keeps(&self, event: &Event, now: u64) -> bool {
        let age = self.rules.age_secs_max(event.kind);
        let is_aged = age > 0 && event.created_at < now.saturating_sub(age);
        let reach = self.rules.class(event.kind).map_or(0, |class| self.reach(class));
        let is_evicted = reach > 0 && event.created_at <= reach;
        !(is_aged || is_evicted) || self.rules.keep.contains(&event.pubkey)
    }

    fn reach(&self, class: Class) -> u64 {
        self.reaches[class as usize].load(Ordering::Relaxed)
    }

    pub(in crate::store) fn stats(&self, live_bytes: u64) -> Option<RetentionStats> {
        (!self.is_idle()).then(|| RetentionStats {
            quota_bytes: self.rules.quota_bytes,
            used_bytes: self.used_bytes(live_bytes),
            used_up: self.used_up.load(Ordering::Relaxed),
            evicted_events: self.evicted.load(Ordering::Relaxed),
            evicted_up_to: self.reach(Class::Other),
            named_evicted_up_to: self.reach(Class::Named),
        })
    }

    /// Removes up to `events_max` events that need not stay.
    pub(in crate::store) fn retain<G: Ground<Place = P>>(
        &self,
        ground: &mut G,
        now: u64,
        events_max: usize,
    ) -> Result<Retained, StoreError> {
        if self.is_idle() {
            return Ok(Retained::default());
        }
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let walk = match progress.walk.take().or_else(|| next_for_age(&progress, now)) {
            Some(walk) => Some(walk),
            None => self.next_for_quota(&mut progress, ground, events_max)?,
        };
        let Some(walk) = walk else { return Ok(Retained::default()) };
        let removed = self.step(&mut progress, walk, ground, events_max)?;
        self.evicted.fetch_add(removed as u64, Ordering::Relaxed);
        Ok(Retained { removed, more: true })
    }

    /// Walks on for at most `entries_max` entries.
    fn step<G: Ground<Place = P>>(
        &self,
        progress: &mut Progress<P>,
        mut walk: Walk<P>,
        ground: &mut G,
        entries_max: usize,
    ) -> Result<usize, StoreError> {
        let goes = |kind| match walk.why {
            Why::Age(age, _) => self.rules.age_secs_max(kind) == age,
            Why::Quota(class) => self.rules.class(kind) == Some(class),
        };
        let kept = |author: &PublicKey| self.rules.keep.contains(author);
        let evicted = ground.evict((walk.since, walk.until), walk.place.take(), entries_max, &goes, &kept)?;
        if let Why::Quota(class) = walk.why
            && evicted.latest > self.reach(class)
        {
            self.set_reach(ground, class, evicted.latest)?;
        }
        match evicted.rest {
            Some(place) => {
                walk.place = Some(place);
                progress.walk = Some(walk);
            }
            None => progress.ended(&walk),
        }
        Ok(evicted.removed)
    }

    /// The next stretch to make room in; `None` when there is room, or nothing left to look at.
    fn next_for_quota<G: Ground<Place = P>>(
        &self,
        progress: &mut Progress<P>,
        ground: &mut G,
        entries_max: usize,
    ) -> Result<Option<Walk<P>>, StoreError> {
        let quota = self.rules.quota_bytes;
        let Used { live_bytes, other_bytes, events } = ground.used();
        self.other_bytes.store(other_bytes, Ordering::Relaxed);
        let used = live_bytes + other_bytes;
        if quota > 0 && used <= percent(quota, ROOM_PERCENT) {
            for class in Class::ALL.into_iter().filter(|class| self.reach(*class) > 0) {
                self.set_reach(ground, class, 0)?;
            }
        }
        let goal = if progress.eviction.is_some() { percent(quota, SHRINK_TO_PERCENT) } else { quota };
        if quota == 0 || used <= goal {
            progress.eviction = None;
            self.set_used_up(false);
            return Ok(None);
        }
        // No more than it takes, as far as the average tells: a stretch is evicted whole.
        let event_bytes = used / events.max(1) + 1;
        let excess_bytes = used - percent(quota, SHRINK_TO_PERCENT);
        let entries_needed = usize::try_from(excess_bytes / event_bytes + 1).unwrap_or(entries_max);
        let mut eviction = progress.eviction.unwrap_or_else(|| self.eviction_of(self.rules.first_class()));
        loop {
            let class = eviction.class;
            let entries = if class == Class::Named { entries_needed.max(SEARCHED_ENTRIES_MIN) } else { entries_needed };
            if let Some((eviction, until)) = next_stretch(ground, eviction, entries.min(entries_max))? {
                progress.eviction = Some(eviction);
                return Ok(Some(Walk { since: eviction.from, until, place: None, why: Why::Quota(class) }));
            }
            if class == Class::Other {
                progress.eviction = None;
                self.set_used_up(used > quota);
                return Ok(None);
            }
            eviction = self.eviction_of(Class::Other);
        }
    }

    /// The eviction of a class from where it has come to before.
    fn eviction_of(&self, class: Class) -> Eviction {
        Eviction { class, from: self.reach(class), stretch_secs: FIRST_STRETCH_SECS }
    }

    fn used_bytes(&self, live_bytes: u64) -> u64 {
        live_bytes + self.other_bytes.load(Ordering::Relaxed)
    }

    fn set_used_up(&self, used_up: bool) {
        match (self.used_up.swap(used_up, Ordering::Relaxed), used_up) {
            (false, true) => tracing::error!(
                quota_bytes = self.rules.quota_bytes,
                "the disk quota is used up and nothing may be evicted: writes are refused"
            ),
            (true, false) => tracing::info!("there is room within the disk quota again"),
            _ => {}
        }
    }

    fn set_reach<G: Ground>(&self, ground: &mut G, class: Class, reach: u64) -> Result<(), StoreError> {
        let of = |other| if other == class { reach } else { self.reach(other) };
        let saved = SavedReach {
            rules: self.rules.text.clone(),
            evicted_up_to: of(Class::Other),
            named_evicted_up_to: of(Class::Named),
        };
        ground.save(&serde_json::to_vec(&saved).expect("a text and numbers always encode"))?;
        self.reaches[class as usize].store(reach, Ordering::Relaxed);
        Ok(())
    }
}

impl<P> Progress<P> {
    fn ended(&mut self, walk: &Walk<P>) {
        let behind = walk.until.saturating_add(1);
        match walk.why {
            Why::Age(_, place) => self.aged[place].1 = behind,
            Why::Quota(_) => {
                if let Some(eviction) = &mut self.eviction {
                    eviction.from = behind;
                }
            }
        }
    }
}

/// The next stretch that an age limit has passed.
fn next_for_age<P>(progress: &Progress<P>, now: u64) -> Option<Walk<P>> {
    let due = progress.aged.iter().enumerate().find(|(_, (age, walked))| *walked < now.saturating_sub(*age));
    due.map(|(place, (age, walked))| Walk {
        since: *walked,
        until: now - age - 1,
        place: None,
        why: Why::Age(*age, place),
    })
}

/// The oldest stretch of time from `eviction.from` on with at least one event and, if its second allows, at most
/// `entries_max`: its last second, and the eviction with it noted. `None` when there are no events from there on.
fn next_stretch(
    ground: &mut impl Ground,
    mut eviction: Eviction,
    entries_max: usize,
) -> Result<Option<(Eviction, u64)>, StoreError> {
    if ground.count(eviction.from, u64::MAX, 1)? == 0 {
        return Ok(None);
    }
    loop {
        let until = eviction.from.saturating_add(eviction.stretch_secs);
        match ground.count(eviction.from, until, entries_max + 1)? {
            // There are events behind it, so this does not run past the end of time.
            0 => {
                eviction.from = until + 1;
                eviction.stretch_secs = (eviction.stretch_secs + 1).saturating_mul(2);
            }
            many if many > entries_max && eviction.stretch_secs > 0 => eviction.stretch_secs /= 2,
            _ => return Ok(Some((eviction, until))),
        }
    }
}

fn percent(bytes: u64, percent: u64) -> u64 {
    bytes / 100 * percent
}
