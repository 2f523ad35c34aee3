//! One conformance suite for every store: plain functions, run against each.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, Filter, Verified, Visibility};
use sledge::store::compact::{Pace, compact};
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::index::Engine;
use sledge::store::memory::MemoryStore;
use sledge::store::verify::verify;
use sledge::store::{Position, Progress, Query, Removal, Store, Wanted};
use tempfile::TempDir;

use crate::support::stores::{all, assert_rows, budget, count, newest, query, read, row_ids};
use crate::support::stores::{in_order, once_free, open_store, options};
use crate::support::{Keys, NOW, ids, verified};

type Make<'m> = &'m dyn Fn() -> Arc<dyn Store>;
type Check = fn(Make);

/// Every check, with its name for the message of a failure.
const CHECKS: [(&str, Check); 19] = [
    ("an empty store has nothing", an_empty_store_has_nothing),
    ("verdicts come in batch order", verdicts_come_in_batch_order),
    ("a batch sees its earlier writes", a_batch_sees_its_earlier_writes),
    ("vanishing within a batch", vanishing_within_a_batch),
    ("rows are newest first", rows_are_newest_first),
    ("every plan gives the same rows", every_plan_gives_the_same_rows),
    ("pages of any size add up", pages_of_any_size_add_up),
    ("limits and what is said about the rest", limits_and_what_is_said_about_the_rest),
    ("whole seconds", whole_seconds),
    ("the relay's limit ends all filters together", the_relays_limit_ends_all_filters_together),
    ("a position hides what came later", a_position_hides_what_came_later),
    ("a scan does not see what is removed meanwhile", a_scan_does_not_see_what_is_removed_meanwhile),
    ("expired events are hidden, then swept", expired_events_are_hidden_then_swept),
    ("what an operator removes may come back", what_an_operator_removes_may_come_back),
    ("a deletion leaves with its force", a_deletion_leaves_with_its_force),
    ("long values", long_values),
    ("counts are over the union", counts_are_over_the_union),
    ("readers beside the writer", readers_beside_the_writer),
    ("the last blob of a name is kept", the_last_blob_of_a_name_is_kept),
];

/// Runs every check on stores that `make` makes, a new and empty one each time.
pub fn run_all(make: &dyn Fn() -> Arc<dyn Store>) {
    for (name, check) in CHECKS {
        println!("{name}");
        check(make);
    }
}

#[test]
fn the_memory_store_conforms() {
    run_all(&|| Arc::new(MemoryStore::new()));
}

#[test]
fn the_embedded_store_conforms_on_sled() {
    the_embedded_store_conforms(Engine::Sled);
}

#[test]
fn the_embedded_store_conforms_on_fjall() {
    the_embedded_store_conforms(Engine::Fjall);
}

fn the_embedded_store_conforms(engine: Engine) {
    let options = Options { engine, ..options() };
    let home = TempDir::new().unwrap();
    let made = AtomicU32::new(0);
    run_all(&|| {
        let dir = home.path().join(made.fetch_add(1, Ordering::Relaxed).to_string());
        Arc::new(once_free(|| EmbeddedStore::open(&dir, &options)))
    });
}

fn everything() -> Vec<Wanted> {
    vec![all(Filter::default())]
}

fn apply<'e>(store: &dyn Store, events: impl IntoIterator<Item = &'e Event>) -> Vec<Verdict> {
    let batch: Vec<Verified<Event>> = events.into_iter().map(verified).collect();
    store.apply(&batch, NOW).unwrap().verdicts
}

/// Applies what must be stored.
#[track_caller]
fn store_all<'e>(store: &dyn Store, events: impl IntoIterator<Item = &'e Event>) {
    let verdicts = apply(store, events);
    assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Store), "{verdicts:?}");
}

#[track_caller]
fn assert_holds(store: &dyn Store, expected: &[&Event]) {
    let (rows, end) = read(store, query(&everything(), NOW), usize::MAX);
    let mut expected = expected.to_vec();
    expected.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
    assert_rows(&rows, &expected, "all that is stored");
    assert_eq!(end, Progress::Finished);
    assert_eq!(store.stats().events, expected.len() as u64);
    assert!(expected.iter().all(|event| store.contains(&event.id).unwrap()));
}

fn notes(count: u64, per_second: u64) -> Vec<Event> {
    (0..count)
        .map(|n| Keys::new(n % 3).draft(1, NOW - n / per_second).tag(["t", "x"]).content(n.to_string()).sign())
        .collect()
}

fn an_empty_store_has_nothing(make: Make) {
    let store = make();
    assert_holds(&*store, &[]);
    assert_eq!(apply(&*store, []), []);
    assert!(!store.contains(&Keys::new(1).note(NOW, "").id).unwrap());
    assert_eq!(store.sweep_expired(NOW, 10).unwrap(), 0);
    assert_eq!(store.remove(&[Keys::new(1).note(NOW, "").id], Removal::Operator).unwrap(), 0);
    assert_eq!(count(&*store, query(&everything(), NOW)), 0);
    assert_eq!(read(&*store, query(&[], NOW), 1).1, Progress::Finished);
}

fn verdicts_come_in_batch_order(make: Make) {
    let store = make();
    let keys = Keys::new(1);
    let note = keys.note(NOW, "");
    let expired = keys.draft(1, NOW).tag(["expiration".to_owned(), NOW.to_string()]).sign();
    let [old, new] = [NOW - 1, NOW].map(|at| keys.draft(0, at).sign());
    let verdicts = apply(&*store, [&note, &expired, &new, &old, &note]);
    assert_eq!(verdicts, [Verdict::Store, Verdict::Expired, Verdict::Store, Verdict::Superseded, Verdict::Duplicate]);
    assert_eq!(apply(&*store, [&old, &note]), [Verdict::Superseded, Verdict::Duplicate]);
    assert_holds(&*store, &[&note, &new]);
}

fn a_batch_sees_its_earlier_writes(make: Make) {
    let store = make();
    let keys = Keys::new(1);
    let versions: Vec<Event> = (0..5).map(|n| keys.draft(30_023, NOW + n).tag(["d", "x"]).sign()).collect();
    let (note, late) = (keys.note(NOW, "deleted"), keys.note(NOW, "deleted before it came"));
    let request = keys.deletion(NOW, &[("e", &note.id.to_hex()), ("e", &late.id.to_hex())]);
    let mut batch: Vec<&Event> = versions.iter().chain([&note, &request, &late, &note]).collect();
    batch.push(&versions[2]);
    let mut expected = vec![Verdict::Store; 7];
    expected.extend([Verdict::Deleted, Verdict::Deleted, Verdict::Superseded]);
    assert_eq!(apply(&*store, batch), expected);
    assert_holds(&*store, &[&versions[4], &request]);
    let address = keys.deletion(NOW + 4, &[("a", &keys.address(30_023, "x"))]);
    let next = keys.draft(30_023, NOW + 5).tag(["d", "x"]).sign();
    assert_eq!(apply(&*store, [&address, &versions[4], &next]), [Verdict::Store, Verdict::Deleted, Verdict::Store]);
    assert_holds(&*store, &[&next, &request, &address]);
}

fn vanishing_within_a_batch(make: Make) {
    let store = make();
    let (keys, sender) = (Keys::new(1), Keys::new(2));
    let stored = keys.note(NOW - 1, "before the batch");
    store_all(&*store, [&stored]);
    let note = keys.note(NOW, "in the batch");
    let wrap = sender.draft(1_059, NOW).tag(["p", &keys.hex()]).sign();
    let deletion = keys.deletion(NOW, &[("e", &sender.note(NOW, "").id.to_hex())]);
    let foreign = sender.draft(1, NOW).tag(["p", &keys.hex()]).sign();
    let vanish = keys.draft(62, NOW).tag(["relay", "ALL_RELAYS"]).sign();
    let newer = keys.note(NOW + 1, "newer");
    let verdicts = apply(&*store, [&note, &wrap, &deletion, &foreign, &vanish, &note, &wrap, &stored, &newer]);
    use Verdict::{Store, Vanished};
    assert_eq!(verdicts, [Store, Store, Store, Store, Store, Vanished, Vanished, Vanished, Store]);
    assert_holds(&*store, &[&foreign, &vanish, &newer]);
    let [older, later] = [NOW - 5, NOW + 5].map(|at| keys.draft(62, at).tag(["relay", "ALL_RELAYS"]).sign());
    store_all(&*store, [&older, &later]);
    assert_holds(&*store, &[&foreign, &vanish, &older, &later]);
    assert_eq!(apply(&*store, [&newer]), [Verdict::Vanished]);
}

fn rows_are_newest_first(make: Make) {
    let store = make();
    let notes = notes(50, 7);
    for chunk in notes.chunks(9) {
        store_all(&*store, chunk);
    }
    let (rows, _) = read(&*store, query(&everything(), NOW), usize::MAX);
    assert_eq!(row_ids(&rows), in_order(&notes));
}

/// Filters that a clever store answers from different indexes, all meaning the same set.
fn every_plan_gives_the_same_rows(make: Make) {
    let store = make();
    let notes = notes(60, 4);
    store_all(&*store, &notes);
    let authors = (0..3).map(|n| format!("\"{}\"", Keys::new(n).hex())).collect::<Vec<_>>().join(",");
    let hex = ids(&notes).iter().map(|id| format!("\"{id}\"")).collect::<Vec<_>>().join(",");
    let expected = in_order(&notes);
    for filter in [
        "{}".to_owned(),
        "{\"kinds\":[1,2]}".to_owned(),
        format!("{{\"authors\":[{authors}]}}"),
        format!("{{\"authors\":[{authors}],\"kinds\":[1,7]}}"),
        "{\"#t\":[\"x\"]}".to_owned(),
        "{\"#t\":[\"x\",\"y\"],\"kinds\":[1]}".to_owned(),
        format!("{{\"ids\":[{hex}]}}"),
        format!("{{\"ids\":[{hex}],\"authors\":[{authors}],\"#t\":[\"x\"],\"kinds\":[1]}}"),
        format!("{{\"since\":{},\"until\":{NOW}}}", NOW - 100),
    ] {
        for limit in [0, 1, 5, 59, 60, 61] {
            let wanted = [newest(&filter, limit)];
            let (rows, end) = read(&*store, query(&wanted, NOW), usize::MAX);
            assert_eq!(row_ids(&rows), expected[..limit.min(60)], "{filter:.80} limit {limit}");
            assert_eq!(end == Progress::Finished, limit >= 60, "{filter:.80} limit {limit}: {end:?}");
        }
        assert_eq!(count(&*store, query(&[newest(&filter, 1)], NOW)), 60, "{filter:.80}");
    }
    for nothing in
        ["{\"kinds\":[]}", "{\"ids\":[]}", "{\"#t\":[\"y\"]}", "{\"since\":2,\"until\":1}", "{\"#T\":[\"x\"]}"]
    {
        let (rows, end) = read(&*store, query(&[newest(nothing, 5)], NOW), 1);
        assert_eq!((rows.len(), end), (0, Progress::Finished), "{nothing}");
    }
}

fn pages_of_any_size_add_up(make: Make) {
    let store = make();
    let notes = notes(40, 3);
    store_all(&*store, &notes);
    let expected = in_order(&notes);
    for bytes in [0, 1, 400, 1_000, 5_000, usize::MAX] {
        let wanted = [newest("{\"kinds\":[1]}", 25), newest("{\"#t\":[\"x\"]}", 30)];
        let (rows, _) = read(&*store, query(&wanted, NOW), bytes);
        assert_eq!(row_ids(&rows), expected[..30], "pages of {bytes} bytes");
    }
    let mut scan = store.scan(query(&everything(), NOW)).unwrap();
    let mut rows = Vec::new();
    assert_eq!(scan.page(budget(1), &mut rows).unwrap(), Progress::Paused);
    assert_eq!(rows.len(), 1, "one row may exceed the budget, a second one may not");
}

fn limits_and_what_is_said_about_the_rest(make: Make) {
    let store = make();
    // Three in the newest second, two in the next, one in the oldest.
    let notes = [NOW, NOW, NOW, NOW - 1, NOW - 1, NOW - 2];
    let notes: Vec<Event> = notes.iter().enumerate().map(|(n, at)| Keys::new(1).note(*at, &n.to_string())).collect();
    store_all(&*store, &notes);
    for limit in 1..=7 {
        let (rows, end) = read(&*store, query(&[newest("{}", limit)], NOW), usize::MAX);
        assert_eq!(row_ids(&rows), in_order(&notes)[..limit.min(6)]);
        match limit {
            3 | 5 => assert!(matches!(end, Progress::MoreOlder | Progress::LimitReached), "{limit}: {end:?}"),
            6.. => assert_eq!(end, Progress::Finished, "{limit}"),
            _ => assert_eq!(end, Progress::LimitReached, "{limit}"),
        }
    }
}

fn whole_seconds(make: Make) {
    let store = make();
    let notes = notes(40, 5);
    store_all(&*store, &notes);
    let crowd: Vec<Event> = (0..30).map(|n| Keys::new(7).note(NOW - 100, &n.to_string())).collect();
    store_all(&*store, &crowd);
    let expected: Vec<String> = in_order(notes.iter().chain(&crowd));
    let page = |limit, until: u64| {
        let filter = Filter { until: Some(until), ..Filter::default() };
        let wanted = [Wanted { filter, limit, whole_seconds: true }];
        let (rows, end) = read(&*store, query(&wanted, NOW), usize::MAX);
        (row_ids(&rows), end)
    };
    for (limit, len) in [(1, 5), (4, 5), (5, 5), (6, 10), (7, 10), (40, 40)] {
        let (rows, end) = page(limit, NOW);
        assert_eq!(rows, expected[..len], "limit {limit}");
        assert_eq!(end, Progress::MoreOlder, "limit {limit}");
    }
    let (rows, end) = page(10, NOW - 100);
    assert_eq!((rows.as_slice(), end), (&expected[40..], Progress::Finished), "however many there are");
}

/// Where the relay's own limit ends one filter, the others end there too: paging on by `until` misses nothing.
fn the_relays_limit_ends_all_filters_together(make: Make) {
    let store = make();
    let (often, seldom) = (Keys::new(1), Keys::new(2));
    let frequent: Vec<Event> = (0..100).map(|n| often.note(NOW - n, "")).collect();
    let rare: Vec<Event> = (0..10).map(|n| seldom.note(NOW - n * 10, "")).collect();
    store_all(&*store, frequent.iter().chain(&rare));
    let expected = in_order(frequent.iter().chain(&rare));
    let (mut seen, mut until) = (BTreeSet::new(), NOW);
    loop {
        let by = |keys: &Keys| Filter { authors: Some(vec![keys.pubkey()]), until: Some(until), ..Filter::default() };
        let wanted = [&often, &seldom].map(|keys| Wanted { filter: by(keys), limit: 7, whole_seconds: true });
        let (rows, end) = read(&*store, query(&wanted, NOW), usize::MAX);
        seen.extend(row_ids(&rows));
        if end == Progress::Finished {
            break;
        }
        assert_eq!(end, Progress::MoreOlder);
        until = rows.last().unwrap().created_at - 1;
    }
    assert_eq!(seen, expected.into_iter().collect::<BTreeSet<_>>());
}

fn a_position_hides_what_came_later(make: Make) {
    let store = make();
    let notes = notes(30, 4);
    let mut ends: Vec<(Position, usize)> = Vec::new();
    for (at, chunk) in notes.chunks(10).enumerate() {
        let batch: Vec<_> = chunk.iter().map(verified).collect();
        ends.push((store.apply(&batch, NOW).unwrap().end, 10 * (at + 1)));
    }
    assert!(ends.is_sorted_by(|a, b| a.0 < b.0), "{ends:?}");
    for (end, known) in ends {
        let query = Query { wanted: everything(), now: NOW, before: Some(end), visible: Visibility::everything() };
        assert_eq!(row_ids(&read(&*store, query.clone(), 1).0), in_order(&notes[..known]));
        let limited = Query { wanted: vec![newest("{\"#t\":[\"x\"]}", 3)], ..query };
        assert_eq!(row_ids(&read(&*store, limited, 1).0), in_order(&notes[..known])[..3]);
    }
}

fn a_scan_does_not_see_what_is_removed_meanwhile(make: Make) {
    let store = make();
    let notes = notes(20, 2);
    store_all(&*store, &notes);
    let newest_first = in_order(&notes);
    let mut scan = store.scan(query(&everything(), NOW)).unwrap();
    let mut rows = Vec::new();
    assert_eq!(scan.page(budget(1), &mut rows).unwrap(), Progress::Paused);
    let gone: Vec<_> =
        notes.iter().filter(|note| newest_first[10..15].contains(&note.id.to_hex())).map(|n| n.id).collect();
    assert_eq!(store.remove(&gone, Removal::Operator).unwrap(), 5);
    while scan.page(budget(1), &mut rows).unwrap() == Progress::Paused {}
    assert_eq!(row_ids(&rows), [&newest_first[..10], &newest_first[15..]].concat());
}

fn expired_events_are_hidden_then_swept(make: Make) {
    let store = make();
    let keys = Keys::new(1);
    let stays = keys.note(NOW - 50, "stays");
    let expiring: Vec<Event> =
        (1..=10).map(|n| keys.draft(1, NOW - n).tag(["expiration".to_owned(), (NOW + n).to_string()]).sign()).collect();
    store_all(&*store, expiring.iter().chain([&stays]));
    let seen = |now, limit| row_ids(&read(&*store, query(&[newest("{}", limit)], now), usize::MAX).0);
    assert_eq!(seen(NOW, 20).len(), 11);
    assert_eq!(seen(NOW + 4, 20), in_order(expiring[4..].iter().chain([&stays])));
    assert_eq!(seen(NOW + 9, 2), in_order([&expiring[9], &stays]), "hidden rows use up no limit");
    assert_eq!(count(&*store, query(&everything(), NOW + 10)), 1);
    assert_eq!(store.sweep_expired(NOW, 100).unwrap(), 0);
    assert_eq!(store.sweep_expired(NOW + 6, 4).unwrap(), 4);
    assert_eq!(store.sweep_expired(NOW + 6, 100).unwrap(), 2);
    assert_eq!(seen(NOW, 20), in_order(expiring[6..].iter().chain([&stays])), "swept events are gone at any time");
    assert_eq!(store.stats().events, 5);
    assert!(!store.contains(&expiring[0].id).unwrap() && store.contains(&expiring[6].id).unwrap());
}

fn what_an_operator_removes_may_come_back(make: Make) {
    let store = make();
    let notes = notes(5, 1);
    store_all(&*store, &notes);
    let unknown = Keys::new(9).note(NOW, "").id;
    assert_eq!(store.remove(&[notes[1].id, unknown, notes[3].id, notes[1].id], Removal::Operator).unwrap(), 2);
    assert_holds(&*store, &[&notes[0], &notes[2], &notes[4]]);
    store_all(&*store, [&notes[1]]);
    assert_holds(&*store, &[&notes[0], &notes[1], &notes[2], &notes[4]]);
}

/// A deletion request that is taken out is no longer in force, so what a store refuses never depends on something
/// that cannot be read any more.
fn a_deletion_leaves_with_its_force(make: Make) {
    let store = make();
    let keys = Keys::new(1);
    let note = keys.note(NOW, "");
    let request = keys.deletion(NOW, &[("e", &note.id.to_hex())]);
    assert_eq!(apply(&*store, [&request, &note]), [Verdict::Store, Verdict::Deleted]);
    assert_eq!(store.remove(&[request.id], Removal::Operator).unwrap(), 1);
    store_all(&*store, [&note]);
    let (early, late) =
        (keys.deletion(NOW, &[("e", &note.id.to_hex())]), keys.draft(62, NOW + 5).tag(["relay", "ALL_RELAYS"]).sign());
    let future = keys.note(NOW + 9, "named by a deletion that vanished");
    let named = keys.deletion(NOW + 1, &[("e", &future.id.to_hex())]);
    assert_eq!(apply(&*store, [&named, &future]), [Verdict::Store, Verdict::Deleted]);
    assert_eq!(apply(&*store, [&early, &late, &future]), [Verdict::Store; 3]);
    assert_holds(&*store, &[&late, &future]);
}

fn long_values(make: Make) {
    let store = make();
    let keys = Keys::new(1);
    let long = "x".repeat(100_000);
    let pair = ["a", "b"].map(|last| {
        keys.draft(30_000, NOW)
            .tag(["d".to_owned(), "d".repeat(300) + last])
            .tag(["r".to_owned(), format!("{long}{last}")])
            .sign()
    });
    store_all(&*store, &pair);
    assert_holds(&*store, &[&pair[0], &pair[1]]);
    for (event, last) in pair.iter().zip(["a", "b"]) {
        let wanted = [newest(&format!("{{\"#r\":[\"{long}{last}\"]}}"), 5)];
        assert_eq!(row_ids(&read(&*store, query(&wanted, NOW), 1).0), ids([event]));
    }
    let near = [newest(&format!("{{\"#r\":[\"{long}\",\"{long}c\"]}}"), 5)];
    assert_eq!(count(&*store, query(&near, NOW)), 0);
}

fn counts_are_over_the_union(make: Make) {
    let store = make();
    let notes = notes(30, 3);
    store_all(&*store, &notes);
    let author = format!("{{\"authors\":[\"{}\"]}}", Keys::new(0).hex());
    for (wanted, expected) in [
        (vec![newest("{}", 1), newest("{\"kinds\":[1]}", 1)], 30),
        (vec![newest(&author, 100)], 10),
        (vec![newest(&author, 100), newest("{\"#t\":[\"x\"]}", 100)], 30),
        (vec![newest("{\"kinds\":[2]}", 100), newest(&author, 0)], 10),
        (vec![], 0),
    ] {
        assert_eq!(count(&*store, query(&wanted, NOW)), expected, "{wanted:?}");
    }
}

/// While one thread writes, readers see a beginning of the history, in order and without repeats, never less than was
/// stored when they began.
fn readers_beside_the_writer(make: Make) {
    write_beside_readers(&*make(), &|| {});
}

/// The same while the store is compacted again and again.
#[test]
fn readers_and_the_writer_go_on_beside_compaction() {
    let home = TempDir::new().unwrap();
    let store = open_store(home.path());
    let compact_once = || _ = compact(&store, &Pace::flat_out(&|_, _| {})).unwrap();
    write_beside_readers(&store, &compact_once);
    assert_eq!(verify(&store, &|_, _| {}).unwrap().problems, Vec::<String>::new());
}

/// Runs `meanwhile` over and over beside one writer and two readers, which check what they see.
fn write_beside_readers(store: &dyn Store, meanwhile: &(dyn Fn() + Sync)) {
    const EVENTS: u64 = 400;
    let written = AtomicU64::new(0);
    let check = || {
        let known = written.load(Ordering::Acquire);
        let (rows, end) = read(store, query(&everything(), NOW), 2_000);
        assert_eq!(end, Progress::Finished);
        assert!(rows.len() as u64 >= known, "{} rows after {known} were stored", rows.len());
        assert!(rows.is_sorted_by(|a, b| (b.created_at, a.id) < (a.created_at, b.id)), "order, no repeats");
        known < EVENTS
    };
    thread::scope(|scope| {
        scope.spawn(|| while check() {});
        scope.spawn(|| while check() {});
        scope.spawn(|| {
            while written.load(Ordering::Acquire) < EVENTS {
                meanwhile()
            }
        });
        for batch in notes(EVENTS, 7).chunks(10) {
            store_all(store, batch);
            written.fetch_add(batch.len() as u64, Ordering::Release);
        }
    });
}

/// Blobs are apart from events and from each other, and only plain names name one.
fn the_last_blob_of_a_name_is_kept(make: Make) {
    let store = make();
    let load = |name| store.load_state(name).unwrap().map(|blob| blob.to_vec());
    assert_eq!(load("policy"), None);
    let large = vec![7; 3 << 20];
    for blob in [b"first".as_slice(), &large, b""] {
        store.save_state("policy", blob).unwrap();
        assert_eq!(load("policy").as_deref(), Some(blob));
    }
    store.save_state("relay-key", b"\0\xff").unwrap();
    assert_eq!((load("policy").as_deref(), load("relay-key").as_deref()), (Some(&b""[..]), Some(&b"\0\xff"[..])));
    assert!(store.save_state("../LOCK", b"").is_err() && store.load_state("../LOCK").is_err());
    assert_eq!(store.stats().events, 0);
}
