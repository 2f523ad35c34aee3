//! Stores against the plain rules: random histories and questions, for the embedded store with merges and reopenings
//! between.

use std::path::Path;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, Filter, Kind, TagLetter, filter::TagCondition};
use sledge::store::compact::{Pace, compact};
use sledge::store::embedded::EmbeddedStore;
use sledge::store::verify::verify;
use sledge::store::{Progress, Removal, Store, Wanted};
use tempfile::TempDir;

use crate::support::stores::{assert_rows, count, query, read};
use crate::support::stores::{open_store, remove_indexes};
use crate::support::{Keys, NOW, Reference, verified};

const AUTHORS: u64 = 3;
const KINDS: [u16; 6] = [1, 7, 0, 10_002, 30_023, 1_059];
const SECONDS: u64 = 5;

/// What an event will be, before it is signed. So few values that they collide all the time.
#[derive(Clone, Debug)]
struct Shape {
    author: u64,
    kind: u16,
    second: u64,
    d: Option<&'static str>,
    t: Vec<&'static str>,
    recipient: Option<u64>,
    expires_in: Option<u64>,
}

#[derive(Clone, Debug)]
struct Request {
    author: u64,
    second: u64,
    /// What is named, and whether by address where it has one.
    targets: Vec<(Index, bool)>,
}

/// What happens to the store. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<Index>),
    Remove(Vec<Index>),
    Sweep,
    Wait(u64),
    Merge,
    Reopen,
    /// Reopen without an index, so that it is built from the log.
    Rebuild,
    Compact,
}

#[derive(Clone, Debug)]
struct Story {
    shapes: Vec<Shape>,
    requests: Vec<Request>,
    vanish: Vec<(u64, u64)>,
    steps: Vec<(Step, Vec<Wanted>)>,
}

fn shape() -> impl Strategy<Value = Shape> {
    let author = 0..AUTHORS;
    let d = proptest::option::weighted(0.8, select(vec!["", "x", "y"]));
    let t = subsequence(vec!["a", "b", "ü\n"], 0..3);
    let recipient = proptest::option::weighted(0.3, 0..AUTHORS);
    let expires_in = proptest::option::weighted(0.15, 0..20u64);
    (author, select(KINDS.to_vec()), 0..SECONDS, d, t, recipient, expires_in).prop_map(
        |(author, kind, second, d, t, recipient, expires_in)| Shape {
            author,
            kind,
            second,
            d,
            t,
            recipient,
            expires_in,
        },
    )
}

fn request() -> impl Strategy<Value = Request> {
    (0..AUTHORS, 0..SECONDS, vec((any::<Index>(), any::<bool>()), 0..4)).prop_map(|(author, second, targets)| Request {
        author,
        second,
        targets,
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => vec(any::<Index>(), 1..12).prop_map(Step::Apply),
        1 => vec(any::<Index>(), 1..3).prop_map(Step::Remove),
        1 => Just(Step::Sweep),
        1 => (1..6u64).prop_map(Step::Wait),
        1 => Just(Step::Merge),
        1 => Just(Step::Reopen),
        1 => Just(Step::Rebuild),
        1 => Just(Step::Compact),
    ]
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let authors = proptest::option::weighted(0.4, subsequence((0..AUTHORS).collect::<Vec<_>>(), 0..=3));
    let kinds = proptest::option::weighted(0.4, subsequence([&KINDS[..], &[5, 62]].concat(), 0..5));
    let tags = proptest::option::weighted(
        0.3,
        (select(vec!['t', 'd', 'p']), subsequence(vec!["a", "b", "ü\n", "x", ""], 0..4)),
    );
    let bound = || proptest::option::weighted(0.2, NOW..NOW + SECONDS);
    let limit = prop_oneof![4 => 0..12usize, 1 => Just(usize::MAX)];
    (authors, kinds, tags, bound(), bound(), limit, any::<bool>()).prop_map(
        |(authors, kinds, tags, since, until, limit, whole_seconds)| {
            let authors = authors.map(|authors| sorted(authors.into_iter().map(|author| Keys::new(author).pubkey())));
            let kinds = kinds.map(|kinds| sorted(kinds.into_iter().map(Kind)));
            let tags = tags.map(|(letter, values)| condition(letter, values)).into_iter().collect();
            let filter = Filter { ids: None, authors, kinds, tags, since, until, limit: None };
            Wanted { filter, limit, whole_seconds }
        },
    )
}

fn condition(letter: char, values: Vec<&str>) -> TagCondition {
    let mut values: Vec<Box<str>> = values.into_iter().map(Box::from).collect();
    if letter == 'p' {
        values = values.iter().enumerate().map(|(n, _)| Keys::new(n as u64).hex().into()).collect();
    }
    TagCondition { letter: TagLetter::from_byte(letter as u8).expect("a letter"), values: sorted(values) }
}

fn sorted<T: Ord>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.into_iter().collect();
    items.sort();
    items
}

fn story() -> impl Strategy<Value = Story> {
    let steps = vec((step(), vec(wanted(), 1..4)), 1..25);
    let vanish = vec((0..AUTHORS, 0..SECONDS), 0..4);
    (vec(shape(), 1..60), vec(request(), 0..12), vanish, steps).prop_map(|(shapes, requests, vanish, steps)| Story {
        shapes,
        requests,
        vanish,
        steps,
    })
}

impl Shape {
    fn sign(&self, nonce: usize) -> Event {
        let mut draft = Keys::new(self.author).draft(self.kind, NOW + self.second).content(nonce.to_string());
        if let Some(d) = self.d {
            draft = draft.tag(["d", d]);
        }
        draft = self.t.iter().fold(draft, |draft, t| draft.tag(["t", t]));
        if let Some(recipient) = self.recipient {
            draft = draft.tag(["p".to_owned(), Keys::new(recipient).hex()]);
        }
        if let Some(seconds) = self.expires_in {
            draft = draft.tag(["expiration".to_owned(), (NOW + seconds).to_string()]);
        }
        draft.sign()
    }
}

impl Story {
    /// All events, signed: shapes, then deletion requests, which may name any of those before them, then requests to
    /// vanish.
    fn events(&self) -> Vec<Event> {
        let mut events: Vec<Event> = self.shapes.iter().enumerate().map(|(nonce, shape)| shape.sign(nonce)).collect();
        for request in &self.requests {
            let draft = Keys::new(request.author).draft(5, NOW + request.second);
            let draft = request.targets.iter().fold(draft, |draft, (index, by_address)| {
                let target = index.get(&events);
                let d = target.tags.values("d").next().unwrap_or_default();
                let d = if target.kind.is_addressable() { d } else { "" };
                let address = format!("{}:{}:{d}", target.kind, target.pubkey);
                if *by_address {
                    draft.tag(["a".to_owned(), address])
                } else {
                    draft.tag(["e".to_owned(), target.id.to_hex()])
                }
            });
            events.push(draft.sign());
        }
        for (author, second) in &self.vanish {
            events.push(Keys::new(*author).draft(62, NOW + second).tag(["relay", "ALL_RELAYS"]).sign());
        }
        events
    }
}

/// A runner whose chance is the same in every run.
fn runner(cases: u32, seed: u8) -> TestRunner {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]))
}

/// The embedded store, perhaps another one, and the rules, side by side.
struct Both {
    dir: TempDir,
    store: Option<Arc<EmbeddedStore>>,
    other: Option<Arc<dyn Store>>,
    rules: Reference,
    now: u64,
}

/// Makes another store to hold against the rules, empty; `None`: the embedded one is enough.
pub type MakeOther<'m> = &'m dyn Fn() -> Option<Arc<dyn Store>>;

impl Both {
    fn new(other: Option<Arc<dyn Store>>) -> Both {
        let dir = TempDir::new().unwrap();
        let store = Some(Arc::new(open_store(dir.path())));
        Both { dir, store, other, rules: Reference::new(), now: NOW }
    }

    fn store(&self) -> &EmbeddedStore {
        self.store.as_ref().expect("open between the steps")
    }

    /// All stores.
    fn stores(&self) -> impl Iterator<Item = &dyn Store> {
        [self.store() as &dyn Store].into_iter().chain(self.other.as_deref())
    }

    fn apply(&self, batch: &[&Event]) -> Vec<Vec<Verdict>> {
        let batch: Vec<_> = batch.iter().map(|event| verified(event)).collect();
        self.stores().map(|store| store.apply(&batch, self.now).unwrap().verdicts).collect()
    }

    fn take(&mut self, step: &Step, events: &[Event]) {
        match step {
            Step::Apply(indexes) => {
                let batch: Vec<&Event> = indexes.iter().map(|index| index.get(events)).collect();
                let expected: Vec<_> = batch.iter().map(|event| self.rules.apply(event, self.now)).collect();
                self.apply(&batch).into_iter().for_each(|verdicts| assert_eq!(verdicts, expected));
            }
            Step::Remove(indexes) => {
                let ids: Vec<_> = indexes.iter().map(|index| index.get(events).id).collect();
                let expected = self.rules.remove(&ids);
                self.stores().for_each(|store| assert_eq!(store.remove(&ids, Removal::Operator).unwrap(), expected));
            }
            Step::Sweep => {
                let expected = self.rules.sweep(self.now);
                self.stores().for_each(|store| assert_eq!(store.sweep_expired(self.now, 1_000).unwrap(), expected));
            }
            Step::Wait(seconds) => self.now += seconds,
            Step::Merge => self.store().merge_index().unwrap(),
            Step::Reopen => self.reopen_after(|_| {}),
            Step::Rebuild => self.reopen_after(remove_indexes),
            Step::Compact => drop(compact(self.store(), &Pace::flat_out(&|_, _| {})).unwrap()),
        }
    }

    /// Closes, lets `work` have the directory, and opens again.
    fn reopen_after(&mut self, work: impl FnOnce(&Path)) {
        self.store = None;
        work(self.dir.path());
        self.store = Some(Arc::new(open_store(self.dir.path())));
    }

    /// Every record, event and index entry is as it should be.
    fn assert_sound(&self) {
        let report = verify(self.store(), &|_, _| {}).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.events, self.store().stats().events);
    }

    /// Asks all, in pages of different sizes, and compares rows, order, ends and counts.
    fn compare(&self, wanted: &[Wanted]) {
        self.stores().for_each(|store| self.compare_one(store, wanted));
    }

    fn compare_one(&self, store: &dyn Store, wanted: &[Wanted]) {
        let expected = self.rules.query(wanted, self.now);
        let matching = self.rules.matching(wanted, self.now);
        for page_bytes in [1, 1_500, usize::MAX] {
            let (rows, end) = read(store, query(wanted, self.now), page_bytes);
            assert_rows(&rows, &expected, &format!("pages of {page_bytes} bytes"));
            let left_out =
                matching.iter().filter(|event| !expected.contains(event)).map(|event| event.created_at).max();
            let last = expected.last().map(|event| event.created_at);
            match end {
                Progress::Paused => unreachable!("reading goes on to the end"),
                Progress::Finished => assert_eq!(left_out, None, "not finished"),
                Progress::MoreOlder => assert!(left_out.is_some() && left_out < last, "{left_out:?} {last:?}"),
                Progress::LimitReached => {}
            }
        }
        assert_eq!(count(store, query(wanted, self.now)), matching.len() as u64, "count");
    }

    fn compare_all(&self) {
        let everything = Wanted { filter: Filter::default(), limit: usize::MAX, whole_seconds: false };
        self.compare(&[everything]);
    }
}

/// Whatever happens to it, the store holds and answers what the rules say.
#[test]
fn the_store_is_its_rules() {
    stores_are_their_rules(&|| None, 60);
}

/// The same with another store beside the embedded one, in so many random histories.
pub fn stores_are_their_rules(other: MakeOther<'_>, cases: u32) {
    let check = |story: Story| {
        let events = story.events();
        let mut both = Both::new(other());
        for (step, wanted) in &story.steps {
            both.take(step, &events);
            both.compare(wanted);
            both.compare_all();
        }
        both.assert_sound();
        Ok(())
    };
    runner(cases, 1).run(&story(), check).unwrap_or_else(|error| panic!("{error}"));
}

/// The order of arrival does not matter: replaceable and addressable events, deletion by address and by id, vanishing.
#[test]
fn the_order_of_arrival_does_not_matter() {
    order_of_arrival_does_not_matter(&|| None, 40);
}

/// The same with another store beside the embedded one.
pub fn order_of_arrival_does_not_matter(other: MakeOther<'_>, cases: u32) {
    let strategy = (story(), vec(any::<u64>(), 100));
    let check = |(mut story, salts): (Story, Vec<u64>)| {
        story.shapes.iter_mut().for_each(|shape| shape.expires_in = None);
        let shapes = story.shapes.clone();
        for request in &mut story.requests {
            // An id is deleted after its event was made: else a request to vanish may take the deletion and leave the
            // event.
            request.targets.retain(|(index, by_address)| *by_address || index.get(&shapes).second <= request.second);
        }
        let events = story.events_of_shapes_only();
        let mut shuffled: Vec<(u64, &Event)> =
            events.iter().enumerate().map(|(n, e)| (salts[n % 100].rotate_left(n as u32), e)).collect();
        shuffled.sort_by_key(|(salt, _)| *salt);
        let (mut forwards, mut mixed) = (Both::new(other()), Both::new(other()));
        for (both, order) in [
            (&mut forwards, events.iter().collect::<Vec<_>>()),
            (&mut mixed, shuffled.into_iter().map(|(_, e)| e).collect()),
        ] {
            for chunk in order.chunks(5) {
                both.apply(chunk);
                chunk.iter().for_each(|event| _ = both.rules.apply(event, NOW));
            }
            both.compare_all();
        }
        let ids = |both: &Both| crate::support::ids(both.rules.visible(NOW));
        assert_eq!(ids(&forwards), ids(&mixed));
        Ok(())
    };
    runner(cases, 2).run(&strategy, check).unwrap_or_else(|error| panic!("{error}"));
}

impl Story {
    /// As [`Story::events`], but deletion requests name shapes only, never each other.
    fn events_of_shapes_only(&self) -> Vec<Event> {
        let shapes = Story { requests: Vec::new(), vanish: Vec::new(), ..self.clone() }.events();
        let mut events = shapes.clone();
        for request in &self.requests {
            let only = Story {
                shapes: self.shapes.clone(),
                requests: vec![request.clone()],
                vanish: Vec::new(),
                steps: Vec::new(),
            };
            events.extend(only.events().into_iter().skip(shapes.len()));
        }
        events.extend(Story { shapes: Vec::new(), requests: Vec::new(), ..self.clone() }.events());
        events
    }
}
