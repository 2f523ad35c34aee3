//! Which index answers a filter with the least reading, where the filter alone does not tell: by a sample of each.
//!
//! In: the indexes that a filter can be looked up in, and the index on disk. Out: one of them. Any of them holds every
//! match, so a poor guess costs time and never an answer.
//!
//! **Statistic.** A few stretches of each index are asked for their newest entries. How far back those reach tells how many
//! entries the index has a second, and so how many lie in the time in which `limit` matches can be expected at the
//! earliest: no index that holds all matches can have fewer entries than there are matches, so the one with the fewest
//! entries a second says how far back the answer reaches at least. Opening a stretch has its own price. Nothing is kept
//! up to date for this, and it is right for what is stored now, not on average.

use super::index::IndexError;
use super::merge::Source;
use super::plan::Stretch;
use super::schema::Prefix;

/// Stretches of an index that are looked at.
const SAMPLED_STRETCHES: usize = 3;
/// Entries of a stretch that are looked at.
const SAMPLED_ENTRIES: usize = 16;

/// Opening a stretch, in hundredths of a microsecond, as sled takes for a cursor.
const OPEN_COST: f64 = 700.0;
/// Reading an entry and its record, in the same unit.
const READ_COST: f64 = 300.0;

/// An index that a filter can be looked up in, with what a look-up is expected to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate<'f> {
    /// Its stretches.
    pub stretches: Vec<Stretch<'f>>,
    /// Microseconds, roughly; only their relation means something.
    pub micros: f64,
}

/// What a sample of one index shows.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// Entries seen, in all stretches that were looked at.
    entries: f64,
    /// The oldest second they reach back to, of the stretches that have more.
    oldest: Option<u64>,
    newest: u64,
    /// How many stretches there are for each one that was looked at.
    scale: f64,
}

/// Estimates each of `indexes` for the newest `limit` matches between `since` and `until`; the cheapest first. Where two
/// cost about the same the earlier one stays in front.
///
/// # Errors
/// When the index cannot be read.
pub fn estimate<'f>(
    indexes: Vec<Vec<Stretch<'f>>>,
    (since, until): (u64, u64),
    limit: usize,
    source: &impl Source,
) -> Result<Vec<Estimate<'f>>, IndexError> {
    let samples = indexes.iter().map(|stretches| sample(stretches, since, until, source));
    let samples: Vec<Sample> = samples.collect::<Result<_, _>>()?;
    // Seen from the newest entry of all: one index may have been silent for years, and that is what tells it apart.
    let newest = samples.iter().map(|sample| sample.newest).max().unwrap_or(0);
    let rates: Vec<f64> = samples.iter().map(|sample| sample.per_sec(since, newest)).collect();
    let slowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let whole = (newest.saturating_sub(since) + 1) as f64;
    let secs = if slowest > 0.0 { (limit as f64 / slowest).clamp(1.0, whole) } else { whole };
    let mut estimates: Vec<Estimate> = indexes
        .into_iter()
        .zip(&rates)
        .map(|(stretches, rate)| {
            let micros = (stretches.len() as f64 * OPEN_COST + rate * secs * READ_COST) / 100.0;
            Estimate { stretches, micros }
        })
        .collect();
    estimates.sort_by(|one, other| one.micros.total_cmp(&other.micros));
    Ok(estimates)
}

fn sample(stretches: &[Stretch<'_>], since: u64, until: u64, source: &impl Source) -> Result<Sample, IndexError> {
    let looked_at = stretches.len().min(SAMPLED_STRETCHES);
    let mut sample = Sample { scale: stretches.len() as f64 / looked_at.max(1) as f64, ..Sample::default() };
    let mut found = Vec::with_capacity(SAMPLED_ENTRIES);
    for nth in 0..looked_at {
        let prefix = Prefix::of(stretches[nth * stretches.len() / looked_at]);
        found.clear();
        source.scan(&prefix.start(until), &prefix.end(since), SAMPLED_ENTRIES, &mut found)?;
        let seconds = found.iter().filter_map(|(key, _)| Some(prefix.suffix_of(key)?.created_at()));
        let (mut newest, mut oldest) = (0, u64::MAX);
        seconds.for_each(|second| (newest, oldest) = (newest.max(second), oldest.min(second)));
        sample.entries += found.len() as f64;
        sample.newest = sample.newest.max(newest);
        if found.len() >= SAMPLED_ENTRIES {
            sample.oldest = Some(sample.oldest.map_or(oldest, |before| before.max(oldest)));
        }
    }
    Ok(sample)
}

impl Sample {
    /// Entries a second of the whole index, seen from `newest`. Where all that there is was seen, that many over all time.
    fn per_sec(&self, since: u64, newest: u64) -> f64 {
        let from = self.oldest.unwrap_or(since).min(newest);
        self.entries * self.scale / (newest - from + 1) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;

    use super::*;
    use crate::protocol::{Kind, PublicKey, TagLetter};
    use crate::store::index::{Key, Value};

    /// An index in memory that counts how often it is asked.
    #[derive(Default)]
    struct Counting {
        entries: BTreeMap<Vec<u8>, (Key, Value)>,
        scans: Cell<usize>,
        read: Cell<usize>,
    }

    impl Source for Counting {
        fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
            let found = self.entries.range(from.to_vec()..to.to_vec()).take(limit);
            let before = out.len();
            out.extend(found.map(|(_, entry)| *entry));
            self.scans.set(self.scans.get() + 1);
            self.read.set(self.read.get() + out.len() - before);
            Ok(())
        }
    }

    fn author(number: usize) -> PublicKey {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&(number as u64).to_be_bytes());
        PublicKey(key)
    }

    /// One event a second, from second 1 on: what kind, whose, and with which topic, if any.
    fn index(events: impl IntoIterator<Item = (u16, usize, Option<&'static str>)>) -> Counting {
        let mut counting = Counting::default();
        for (second, (kind, by, topic)) in (1u64..).zip(events) {
            let mut stretches = vec![Prefix::time(), Prefix::kind(Kind(kind)), Prefix::author(&author(by))];
            stretches.push(Prefix::author_kind(&author(by), Kind(kind)));
            stretches.extend(topic.map(|topic| Prefix::tag(letter(), topic)));
            let place = [&[0; 4][..], &second.to_be_bytes()[3..]].concat();
            let value = Value::new(&[&[0][..], &kind.to_be_bytes()].concat());
            for prefix in stretches {
                let key = [prefix.start(second).as_slice(), &place].concat();
                counting.entries.insert(key.clone(), (Key::new(&key), value));
            }
        }
        counting
    }

    fn letter() -> TagLetter {
        TagLetter::from_byte(b't').expect("a letter")
    }

    #[track_caller]
    fn check(index: &Counting, indexes: Vec<Vec<Stretch<'_>>>, limit: usize, expected: &str) {
        let known = indexes.len();
        let estimates = estimate(indexes, (0, u64::MAX), limit, index).expect("memory can be read");
        assert_eq!(estimates[0].stretches[0].index(), expected, "{estimates:#?}");
        assert!(index.scans.get() <= known * SAMPLED_STRETCHES);
        assert!(index.read.get() <= known * SAMPLED_STRETCHES * SAMPLED_ENTRIES);
    }

    /// Five hundred authors of whom most of the notes come: the newest twenty are found by reading the notes, not by
    /// opening five hundred stretches; where the same authors hardly ever write, it is the other way round.
    #[test]
    fn many_authors_are_opened_only_where_they_are_rare() {
        let authors: Vec<PublicKey> = (0..500).map(author).collect();
        let by_author = || authors.iter().map(|key| Stretch::AuthorKind(key, Kind(1))).collect::<Vec<_>>();
        let by_kind = || vec![Stretch::Kind(Kind(1))];
        let busy = index((0..20_000).map(|n| (1, (n * 7_919) % 600, None)));
        check(&busy, vec![by_author(), by_kind()], 20, "kind");
        let quiet = index((0..20_000).map(|n| (1, if n % 400 == 0 { n / 400 } else { 1_000 + n % 5_000 }, None)));
        check(&quiet, vec![by_author(), by_kind()], 500, "author and kind");
    }

    /// A topic that everybody writes about, and a rare kind; a rare topic, and the kind that everybody writes.
    #[test]
    fn the_rarer_of_tag_and_kind_is_chosen() {
        let by_tag = |topic| vec![Stretch::Tag(letter(), topic)];
        let by_kind = |kind| vec![Stretch::Kind(Kind(kind))];
        let kind_of = |n: usize| if n.is_multiple_of(500) { 30_023 } else { 1 };
        let popular = index((0..20_000).map(|n| (kind_of(n), n % 900, Some("bitcoin"))));
        check(&popular, vec![by_tag("bitcoin"), by_kind(30_023)], 20, "kind");
        let topic_of = |n: usize| n.is_multiple_of(700).then_some("sledge");
        let rare = index((0..20_000).map(|n| (1, n % 900, topic_of(n))));
        check(&rare, vec![by_tag("sledge"), by_kind(1)], 20, "tag");
    }

    /// What was busy once and is silent now counts by its silence; nothing at all is the cheapest.
    #[test]
    fn silence_counts() {
        let topic_of = |n: usize| if n < 500 { Some("old") } else { None };
        let events = index((0..20_000).map(|n| (1, n % 5, topic_of(n))));
        let key = author(3);
        check(&events, vec![vec![Stretch::Author(&key)], vec![Stretch::Tag(letter(), "old")]], 20, "tag");
        check(&events, vec![vec![Stretch::Author(&key)], vec![Stretch::Tag(letter(), "none")]], 20, "tag");
        check(&index([]), vec![vec![Stretch::Author(&key)]], 20, "author");
    }
}
