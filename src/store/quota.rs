//! Retention: which events are too old, and which make way when the store takes more than its quota.
//!
//! The stated order: what has expired (that is [`Store::sweep_expired`](super::Store::sweep_expired)); then what is older
//! than its kind's age; then, over the quota, the oldest of the kinds that the rules name, and when none of these is left
//! the oldest of all other kinds, until live events and index take less than [`SHRINK_TO_PERCENT`] of it. A compaction
//! frees the space. [`UNTOUCHED`] kinds, those whose rule protects them and the keys on the keep list stay.
//!
//! Both removals walk the index by time, each walk through a stretch of time and in portions. A stretch is walked once:
//! behind a walk lie only events that stay. So what is removed must not come back: the age limits refuse it, and against
//! the quota's evictions stands a *reach* for each [`Class`], the latest `created_at` that was evicted, up to which events
//! of that class are refused. They lie beside the log in `retention.json`, and fall when the rules change or there is room.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::config::{KindRange, Retention};
use crate::protocol::nip19::{self, KeyError};
use crate::protocol::{Event, Kind, PublicKey};

use super::batch::Batch;
use super::dir::write_atomically;
use super::embedded::{Files, WriterState};
use super::index::Key;
use super::schema::{Prefix, place_and_kind};
use super::{Retained, RetentionStats, StoreError};

/// Kinds that neither age nor quota removes: profiles, contacts, deletions, requests to vanish, relay lists. They are
/// small, and without them the rest loses its meaning or comes back.
pub const UNTOUCHED: [Kind; 5] = [Kind::METADATA, Kind::CONTACTS, Kind::DELETION, Kind::VANISH, Kind(10_002)];
/// Eviction goes on until this much of the quota is used, so that it is not due again at once.
pub const SHRINK_TO_PERCENT: u64 = 90;
/// Below this much of the quota, what was evicted may come back.
pub const ROOM_PERCENT: u64 = 75;

const DAY_SECS: u64 = 24 * 60 * 60;
const MIB: u64 = 1 << 20;
const REACH_FILE: &str = "retention.json";
/// Seconds that the first stretch of an eviction covers; the next ones adapt to how many events there are.
const FIRST_STRETCH_SECS: u64 = 1 << 20;
/// Fewest events of a stretch in which kinds that the rules name are looked for. They may be rare, and a search in
/// smaller steps takes longer than evicting a few too many is worth.
const SEARCHED_ENTRIES_MIN: usize = 64;

/// What is kept, and for how long. The default keeps everything.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    quota_bytes: u64,
    age_secs_max: u64,
    kinds: Vec<KindRule>,
    keep: HashSet<PublicKey>,
    /// The settings as text: other rules have another one.
    text: String,
}

#[derive(Clone, Debug)]
struct KindRule {
    kinds: Vec<KindRange>,
    age_secs_max: u64,
    evict: bool,
}

impl Rules {
    /// The rules that the settings state.
    ///
    /// # Errors
    /// The entry of `keep` that is no public key, and why.
    pub fn new(settings: &Retention) -> Result<Rules, (String, KeyError)> {
        let key = |text: &String| nip19::parse_pubkey(text).map(PublicKey).map_err(|error| (text.clone(), error));
        let kinds = settings.rules.iter().map(|rule| KindRule {
            kinds: rule.kinds.clone(),
            age_secs_max: rule.max_age_days.unwrap_or(settings.max_age_days).saturating_mul(DAY_SECS),
            evict: rule.evict,
        });
        Ok(Rules {
            quota_bytes: settings.max_disk_mb.saturating_mul(MIB),
            age_secs_max: settings.max_age_days.saturating_mul(DAY_SECS),
            kinds: kinds.collect(),
            keep: settings.keep.iter().map(key).collect::<Result<_, _>>()?,
            text: serde_json::to_string(settings).expect("numbers, texts and lists always encode"),
        })
    }

    /// The same rules with a quota in bytes.
    pub fn with_quota_bytes(mut self, quota_bytes: u64) -> Rules {
        self.quota_bytes = quota_bytes;
        self
    }

    fn limit_nothing(&self) -> bool {
        self.quota_bytes == 0 && self.ages().is_empty()
    }

    /// The age in seconds beyond which a kind is removed; 0: none.
    fn age_secs_max(&self, kind: Kind) -> u64 {
        match self.rule(kind) {
            _ if UNTOUCHED.contains(&kind) => 0,
            Some(rule) => rule.age_secs_max,
            None => self.age_secs_max,
        }
    }

    /// When it is this kind's turn to make room; `None`: never.
    fn class(&self, kind: Kind) -> Option<Class> {
        match self.rule(kind) {
            _ if UNTOUCHED.contains(&kind) => None,
            Some(rule) => rule.evict.then_some(Class::Named),
            None => Some(Class::Other),
        }
    }

    fn first_class(&self) -> Class {
        if self.kinds.iter().any(|rule| rule.evict) { Class::Named } else { Class::Other }
    }

    fn rule(&self, kind: Kind) -> Option<&KindRule> {
        self.kinds.iter().find(|rule| rule.kinds.iter().any(|kinds| kinds.contains(kind.0)))
    }

    /// Every age that some kind has.
    fn ages(&self) -> Vec<u64> {
        let mut ages: Vec<u64> = self.kinds.iter().map(|rule| rule.age_secs_max).chain([self.age_secs_max]).collect();
        ages.sort_unstable();
        ages.dedup();
        ages.retain(|age| *age > 0);
        ages
    }
}

/// Kinds that make room at the same time, the oldest event first; the earlier class before the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Those that a rule names and does not protect.
    Named,
    /// Those that no rule names.
    Other,
}

impl Class {
    const ALL: [Class; 2] = [Class::Named, Class::Other];
}

/// Holds a store to its [`Rules`].
pub(super) struct Keeper {
    rules: Rules,
    /// Where the reaches are kept.
    path: PathBuf,
    /// For each [`Class`]: its events up to this `created_at` were evicted; 0: none.
    reaches: [AtomicU64; Class::ALL.len()],
    used_up: AtomicBool,
    /// Bytes of the index when they were last looked up, which takes reading its folder.
    index_bytes: AtomicU64,
    evicted: AtomicU64,
    progress: Mutex<Progress>,
}

/// How far the walks have come. Only the writer's caller uses it.
#[derive(Default)]
struct Progress {
    walk: Option<Walk>,
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

/// A stretch of time that is being walked.
struct Walk {
    /// The generation of files that the keys are of.
    log_id: [u8; 16],
    from: Key,
    to: Key,
    /// The stretch's last second.
    until: u64,
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

impl Keeper {
    pub(super) fn open(dir: &Path, rules: Rules, index_bytes: u64) -> Keeper {
        let path = dir.join(REACH_FILE);
        let aged = rules.ages().into_iter().map(|age| (age, 0)).collect();
        Keeper {
            reaches: saved_reaches(&path, &rules).map(AtomicU64::new),
            path,
            rules,
            used_up: AtomicBool::new(false),
            index_bytes: AtomicU64::new(index_bytes),
            evicted: AtomicU64::new(0),
            progress: Mutex::new(Progress { aged, ..Progress::default() }),
        }
    }

    /// Whether the quota allows this kind at present: while it is used up, only what makes room.
    pub(super) fn has_room_for(&self, kind: Kind) -> bool {
        matches!(kind, Kind::DELETION | Kind::VANISH) || !self.used_up.load(Ordering::Relaxed)
    }

    /// Whether a store with so much live log takes more than its quota.
    pub(super) fn is_over(&self, live_log_bytes: u64) -> bool {
        self.rules.quota_bytes > 0 && self.used_bytes(live_log_bytes) > self.rules.quota_bytes
    }

    /// Whether an event that comes now would stay.
    pub(super) fn keeps(&self, event: &Event, now: u64) -> bool {
        let age = self.rules.age_secs_max(event.kind);
        let is_aged = age > 0 && event.created_at < now.saturating_sub(age);
        let reach = self.rules.class(event.kind).map_or(0, |class| self.reach(class));
        let is_evicted = reach > 0 && event.created_at <= reach;
        !(is_aged || is_evicted) || self.rules.keep.contains(&event.pubkey)
    }

    fn reach(&self, class: Class) -> u64 {
        self.reaches[class as usize].load(Ordering::Relaxed)
    }

    pub(super) fn stats(&self, live_log_bytes: u64) -> Option<RetentionStats> {
        (!self.rules.limit_nothing()).then(|| RetentionStats {
            quota_bytes: self.rules.quota_bytes,
            used_bytes: self.used_bytes(live_log_bytes),
            used_up: self.used_up.load(Ordering::Relaxed),
            evicted_events: self.evicted.load(Ordering::Relaxed),
            evicted_up_to: self.reach(Class::Other),
            named_evicted_up_to: self.reach(Class::Named),
        })
    }

    /// Removes up to `events_max` events that need not stay.
    pub(super) fn retain(
        &self,
        files: &Files,
        state: &mut WriterState,
        now: u64,
        events_max: usize,
    ) -> Result<Retained, StoreError> {
        if self.rules.limit_nothing() {
            return Ok(Retained::default());
        }
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let unfinished = progress.walk.take().filter(|walk| walk.log_id == files.log.id());
        let walk = match unfinished {
            Some(walk) => Some(walk),
            None => match next_for_age(&progress, files, now) {
                Some(walk) => Some(walk),
                None => self.next_for_quota(&mut progress, files, state, events_max)?,
            },
        };
        let Some(walk) = walk else { return Ok(Retained::default()) };
        let removed = self.step(&mut progress, walk, files, state, events_max)?;
        self.evicted.fetch_add(removed as u64, Ordering::Relaxed);
        Ok(Retained { removed, more: true })
    }

    /// Walks on for at most `entries_max` entries.
    fn step(
        &self,
        progress: &mut Progress,
        mut walk: Walk,
        files: &Files,
        state: &mut WriterState,
        entries_max: usize,
    ) -> Result<usize, StoreError> {
        let mut entries = Vec::new();
        files.index.scan(&walk.from, &walk.to, entries_max, &mut entries)?;
        let mut writes = Batch::new(files, state);
        let (mut removed, mut latest) = (0, 0);
        for (key, value) in &entries {
            let Some(suffix) = Prefix::time().suffix_of(key) else { continue };
            let Some((place, kind)) = place_and_kind(&suffix, value) else { continue };
            let goes = match walk.why {
                Why::Age(age, _) => self.rules.age_secs_max(kind) == age,
                Why::Quota(class) => self.rules.class(kind) == Some(class),
            };
            if goes && writes.evict(place, |author| self.rules.keep.contains(author))? {
                removed += 1;
                latest = latest.max(suffix.created_at());
            }
        }
        writes.commit()?;
        if let Why::Quota(class) = walk.why
            && latest > self.reach(class)
        {
            self.set_reach(class, latest)?;
        }
        let rest = entries.last().filter(|_| entries.len() >= entries_max).and_then(|(key, _)| key.successor());
        match rest {
            Some(from) => {
                walk.from = from;
                progress.walk = Some(walk);
            }
            None => progress.ended(&walk),
        }
        Ok(removed)
    }

    /// The next stretch to make room in; `None` when there is room, or nothing left to look at.
    fn next_for_quota(
        &self,
        progress: &mut Progress,
        files: &Files,
        state: &WriterState,
        entries_max: usize,
    ) -> Result<Option<Walk>, StoreError> {
        let quota = self.rules.quota_bytes;
        self.index_bytes.store(files.index.bytes_on_disk(), Ordering::Relaxed);
        let used = self.used_bytes(files.log.end().saturating_sub(state.dead_bytes));
        if quota > 0 && used <= percent(quota, ROOM_PERCENT) {
            for class in Class::ALL.into_iter().filter(|class| self.reach(*class) > 0) {
                self.set_reach(class, 0)?;
            }
        }
        let goal = if progress.eviction.is_some() { percent(quota, SHRINK_TO_PERCENT) } else { quota };
        if quota == 0 || used <= goal {
            progress.eviction = None;
            self.set_used_up(false);
            return Ok(None);
        }
        // No more than it takes, as far as the average tells: a stretch is evicted whole.
        let event_bytes = used / state.events.max(1) + 1;
        let excess_bytes = used - percent(quota, SHRINK_TO_PERCENT);
        let entries_needed = usize::try_from(excess_bytes / event_bytes + 1).unwrap_or(entries_max);
        let mut eviction = progress.eviction.unwrap_or_else(|| self.eviction_of(self.rules.first_class()));
        loop {
            let class = eviction.class;
            let entries = if class == Class::Named { entries_needed.max(SEARCHED_ENTRIES_MIN) } else { entries_needed };
            if let Some((eviction, until)) = next_stretch(files, eviction, entries.min(entries_max))? {
                progress.eviction = Some(eviction);
                return Ok(Some(walk(files, eviction.from, until, Why::Quota(class))));
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

    fn used_bytes(&self, live_log_bytes: u64) -> u64 {
        live_log_bytes + self.index_bytes.load(Ordering::Relaxed)
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

    fn set_reach(&self, class: Class, reach: u64) -> Result<(), StoreError> {
        let of = |other| if other == class { reach } else { self.reach(other) };
        let saved = SavedReach {
            rules: self.rules.text.clone(),
            evicted_up_to: of(Class::Other),
            named_evicted_up_to: of(Class::Named),
        };
        let text = serde_json::to_vec(&saved).expect("a text and numbers always encode");
        write_atomically(&self.path, &text)?;
        self.reaches[class as usize].store(reach, Ordering::Relaxed);
        Ok(())
    }
}

impl Progress {
    fn ended(&mut self, walk: &Walk) {
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
fn next_for_age(progress: &Progress, files: &Files, now: u64) -> Option<Walk> {
    let due = progress.aged.iter().enumerate().find(|(_, (age, walked))| *walked < now.saturating_sub(*age));
    due.map(|(place, (age, walked))| walk(files, *walked, now - age - 1, Why::Age(*age, place)))
}

/// The oldest stretch of time from `eviction.from` on with at least one event and, if its second allows, at most
/// `entries_max`: its last second, and the eviction with it noted. `None` when there are no events from there on.
fn next_stretch(
    files: &Files,
    mut eviction: Eviction,
    entries_max: usize,
) -> Result<Option<(Eviction, u64)>, StoreError> {
    let mut found = Vec::new();
    let mut count = |from: u64, until: u64, limit: usize| -> Result<usize, StoreError> {
        found.clear();
        files.index.scan(&Prefix::time().start(until), &Prefix::time().end(from), limit, &mut found)?;
        Ok(found.len())
    };
    if count(eviction.from, u64::MAX, 1)? == 0 {
        return Ok(None);
    }
    loop {
        let until = eviction.from.saturating_add(eviction.stretch_secs);
        match count(eviction.from, until, entries_max + 1)? {
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

fn walk(files: &Files, since: u64, until: u64, why: Why) -> Walk {
    let time = Prefix::time();
    Walk { log_id: files.log.id(), from: time.start(until), to: time.end(since), until, why }
}

fn percent(bytes: u64, percent: u64) -> u64 {
    bytes / 100 * percent
}

/// The reach of each class that was saved under the same rules. One that cannot be read is none: at worst a few events
/// come back and are evicted again.
fn saved_reaches(path: &Path, rules: &Rules) -> [u64; Class::ALL.len()] {
    let Ok(bytes) = std::fs::read(path) else { return [0; 2] };
    match serde_json::from_slice::<SavedReach>(&bytes) {
        Ok(saved) if saved.rules == rules.text => Class::ALL.map(|class| match class {
            Class::Named => saved.named_evicted_up_to,
            Class::Other => saved.evicted_up_to,
        }),
        Ok(_) => [0; 2],
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "what the quota had evicted is not known any more");
            [0; 2]
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;

    fn rules(toml: &str) -> Rules {
        Rules::new(&Config::parse(&format!("[retention]\n{toml}"), None).unwrap().retention).unwrap()
    }

    /// The first rule that names a kind holds; the untouched kinds stay whatever the rules say.
    #[test]
    fn the_first_rule_holds_and_some_kinds_always_stay() {
        let rules = rules(
            "max_age_days = 10\nrules = [{ kinds = [7, \"1000-1999\"], max_age_days = 1 }, \
             { kinds = [\"0-9999\"], evict = false }, { kinds = [30023], max_age_days = 0 }]",
        );
        let of = |kind| (rules.age_secs_max(Kind(kind)) / DAY_SECS, rules.class(Kind(kind)));
        let (named, other) = (Some(Class::Named), Some(Class::Other));
        assert_eq!(of(7), (1, named));
        assert_eq!([of(1000), of(1999)], [(1, named); 2]);
        assert_eq!([of(1), of(999), of(2000)], [(10, None); 3]);
        assert_eq!(of(30_023), (0, named));
        assert_eq!(of(20_000), (10, other));
        assert_eq!([0, 3, 5, 62, 10_002].map(of), [(0, None); 5]);
        assert_eq!(rules.ages(), [DAY_SECS, 10 * DAY_SECS]);
        assert!(Rules::default().limit_nothing() && !rules.limit_nothing());
    }

    /// A key that is none is named.
    #[test]
    fn a_wrong_key_on_the_keep_list_is_named() {
        let settings = Retention { keep: vec!["npub1xyz".to_owned()], ..Retention::default() };
        assert_eq!(Rules::new(&settings).unwrap_err().0, "npub1xyz");
    }
}
