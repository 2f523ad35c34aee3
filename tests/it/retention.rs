//! Retention: ages, the quota with its order of eviction, what stays, what may come back, and what is refused.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde_json::{Value, json};
use sledge::config::Config;
use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, Filter};
use sledge::relay::Clock;
use sledge::relay::ingest::{Ingest, Rejection, Sender};
use sledge::relay::policy::Policy;
use sledge::server::Server;
use sledge::store::compact::Pace;
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::quota::Rules;
use sledge::store::{Removal, RetentionStats, Store, StoreError};

use super::support::client::soon;
use super::support::stores::{all, once_free, options, query, read, remove_indexes};
use super::support::{Binary, Client, Keys, NOW, json_of, verified};

const DAY: u64 = 86_400;

fn rules(toml: &str) -> Rules {
    Rules::new(&Config::parse(&format!("[retention]\n{toml}"), None).unwrap().retention).unwrap()
}

/// Where a store is, as the tests here need it.
pub struct Place<'p> {
    /// Opens it with rules and a quota of so many bytes.
    pub open: &'p dyn Fn(&Rules, u64) -> Arc<dyn Store>,
    /// Has what can be made anew made anew at the next opening.
    pub rebuild: &'p dyn Fn(),
}

impl Place<'_> {
    fn open(&self, rules: &Rules, quota_bytes: u64) -> Arc<dyn Store> {
        (self.open)(rules, quota_bytes)
    }

    /// Stores events without any limit; what they take of a quota.
    fn fill(&self, events: &[&[Event]]) -> u64 {
        let free = self.open(&Rules::default(), 0);
        events.iter().for_each(|events| store_all(&*free, events));
        assert!(free.stats().retention.is_none());
        drop(free);
        stats(&*self.open(&Rules::default(), 1 << 40)).used_bytes
    }
}

/// What is to hold in a place.
type Test<'a> = dyn Fn(&Place<'_>) + 'a;

/// The rules hold on whatever store, each test in a place of its own.
pub fn run_all(anywhere: &dyn Fn(&Test<'_>)) {
    anywhere(&events_beyond_their_age_go);
    anywhere(&the_quota_evicts_the_oldest_first);
    anywhere(&named_kinds_make_room_before_all_others);
    anywhere(&a_quota_without_anything_to_evict_refuses_writes);
}

/// On the embedded store.
#[test]
fn a_directory_keeps_to_its_rules() {
    run_all(&|test| {
        let dir = tempfile::tempdir().unwrap();
        let rebuild = || remove_indexes(dir.path());
        test(&Place { open: &|rules, quota_bytes| Arc::new(open(dir.path(), rules, quota_bytes)), rebuild: &rebuild });
    });
}

/// Opens a store that keeps to rules and has a quota of so many bytes.
fn open(dir: &Path, rules: &Rules, quota_bytes: u64) -> EmbeddedStore {
    // Runs that are never merged, so that the index takes next to nothing and the quota is the log's.
    let retention = rules.clone().with_quota_bytes(quota_bytes);
    let options = Options { run_entries_max: 1_000_000, retention, ..options() };
    once_free(|| EmbeddedStore::open(dir, &options))
}

fn store_all(store: &dyn Store, events: &[Event]) {
    let batch: Vec<_> = events.iter().map(verified).collect();
    assert!(store.apply(&batch, NOW).unwrap().verdicts.iter().all(|verdict| *verdict == Verdict::Store));
}

/// Removes, a few at a time, until there is nothing to do; how many.
fn retain(store: &dyn Store, now: u64) -> usize {
    let mut removed = 0;
    for _ in 0..10_000 {
        let portion = store.retain(now, 7).unwrap();
        assert!(portion.removed <= 7);
        removed += portion.removed;
        if !portion.more {
            return removed;
        }
    }
    panic!("retention comes to no end");
}

/// `created_at` of everything stored, newest first.
fn dates(store: &dyn Store) -> Vec<u64> {
    let (rows, _) = read(store, query(&[all(Filter::default())], NOW), 1 << 20);
    rows.iter().map(|row| row.created_at).collect()
}

fn stats(store: &dyn Store) -> RetentionStats {
    store.stats().retention.unwrap()
}

fn refused(store: &Arc<dyn Store>, event: &Event) -> bool {
    let policy = Policy::open(Arc::new(Config::default()), store.clone()).unwrap();
    let ingest = Ingest::new(Arc::new(Config::default()), store.clone(), Arc::new(policy));
    let verdicts = [Sender::client([192, 0, 2, 1].into(), Arc::default()), Sender::import()]
        .map(|sender| ingest.check(event.clone(), &sender, NOW).map(drop));
    assert_eq!(verdicts[0], verdicts[1], "every door alike");
    verdicts[0] == Err(Rejection::NotKept)
}

/// Each kind has its own age; kinds 0, 3, 5, 62, 10002 and keys on the keep list stay; what is too old is refused at
/// every door, and stays away after a restart and a rebuild.
fn events_beyond_their_age_go(place: &Place<'_>) {
    let (author, kept) = (Keys::new(1), Keys::new(2));
    let rules = rules(&format!(
        "max_age_days = 10\nkeep = [\"{}\"]\nrules = [{{ kinds = [7], max_age_days = 1 }}, {{ kinds = [30023], max_age_days = 0 }}]",
        kept.hex()
    ));
    let old = NOW - 11 * DAY;
    let event = |kind, at| author.draft(kind, at).tag(["d", "x"]).sign();
    let stay = [event(0, old), event(3, old), event(10_002, old), event(30_023, old), kept.note(old, "kept")];
    let stay: Vec<_> =
        stay.into_iter().chain([author.deletion(old, &[]), event(7, NOW - DAY), event(1, NOW - 10 * DAY)]).collect();
    let go: Vec<_> = [event(1, old), event(7, NOW - DAY - 1), event(1, NOW - 10 * DAY - 1), event(1984, 1)].into();
    let store = place.open(&rules, 0);
    store_all(&*store, &stay);
    store_all(&*store, &go);
    assert_eq!(retain(&*store, NOW), go.len());
    assert_eq!(stats(&*store).evicted_events, go.len() as u64);
    let mut expected: Vec<u64> = stay.iter().map(|event| event.created_at).collect();
    expected.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!(dates(&*store), expected);
    drop(store);

    (place.rebuild)();
    let store = place.open(&rules, 0);
    assert_eq!(dates(&*store), expected, "the log says so too");
    assert!(go.iter().all(|event| refused(&store, event)));
    assert!(!refused(&store, &kept.note(old, "another")) && !refused(&store, &event(30_023, 5)));
    assert!(!refused(&store, &author.note(NOW - 10 * DAY, "just in time")));
    assert_eq!(retain(&*store, NOW), 0);
    // A day later the next ones are due.
    assert_eq!(retain(&*store, NOW + DAY), 2);
}

/// Over the quota the oldest evictable events go, whatever their number in one second, down to 90 %; the rest stays.
fn the_quota_evicts_the_oldest_first(place: &Place<'_>) {
    let (author, kept) = (Keys::new(1), Keys::new(2));
    let rules = rules(&format!("keep = [\"{}\"]\nrules = [{{ kinds = [30023], evict = false }}]", kept.hex()));
    let long = "x".repeat(1_000);
    let notes = |ats: std::ops::Range<u64>| ats.map(|at| author.note(at, &long)).collect::<Vec<_>>();
    let protected: Vec<_> = (0..20)
        .flat_map(|n| [kept.note(n, &long), author.draft(30_023, n).tag(["d", &n.to_string()]).content(&long).sign()])
        .chain([author.draft(0, 5).content(&long).sign()])
        .collect();
    let one_second: Vec<_> = (0..30).map(|n| author.note(100, &format!("{n}{long}"))).collect();
    // A long silence in between, and dates far ahead.
    let later = [notes(1_000..1_050), notes(NOW..NOW + 50), notes(1 << 40..(1 << 40) + 5)].concat();
    let bytes = place.fill(&[&protected, &one_second, &later]);
    let total = protected.len() + one_second.len() + later.len();
    let quota = bytes * 70 / 100;
    let store = place.open(&rules, quota);
    let removed = retain(&*store, NOW);
    let left = dates(&*store);
    assert_eq!(left.len(), total - removed);
    let used = stats(&*store).used_bytes;
    assert!(used <= quota * 90 / 100 && used > quota * 84 / 100, "{used} of {quota}");
    assert_eq!(left.iter().filter(|at| **at < 20).count(), protected.len(), "what is protected stays");
    let mut evictable: Vec<u64> = one_second.iter().chain(&later).map(|event| event.created_at).collect();
    evictable.sort_unstable();
    let mut left_evictable: Vec<u64> = left.into_iter().filter(|at| *at >= 20).collect();
    left_evictable.sort_unstable();
    assert_eq!(left_evictable, evictable[removed..], "the oldest went");

    let reach = evictable[removed - 1];
    assert_eq!(stats(&*store).evicted_up_to, reach);
    let old = author.note(reach, "as old as what was evicted");
    assert!(refused(&store, &old) && refused(&store, &one_second[0]) && !refused(&store, &author.note(reach + 1, "")));
    assert!(!refused(&store, &kept.note(3, "new")) && !refused(&store, &author.draft(30_023, 3).sign()));
    drop(store);
    let store = place.open(&rules, quota);
    assert!(refused(&store, &old), "a restart changes nothing");
    drop(store);
    let store = place.open(&self::rules("rules = [{ kinds = [7], evict = false }]"), quota);
    assert!(!refused(&store, &old), "other rules do");
}

/// Kinds that the rules name make room first, the oldest of them first, however old the others are; with none of them
/// left it is the turn of the others. Each is refused as far back as its own were evicted.
fn named_kinds_make_room_before_all_others(place: &Place<'_>) {
    let author = Keys::new(1);
    let rules = rules("rules = [{ kinds = [7] }, { kinds = [\"1000-1999\"] }, { kinds = [30023], evict = false }]");
    let long = "x".repeat(1_000);
    let event = |kind: u16, at: u64| author.draft(kind, at).tag(["d", &at.to_string()]).content(&long).sign();
    let notes: Vec<_> = (0..50).map(|n| event(1, 100 + n)).collect();
    let articles: Vec<_> = (0..10).map(|n| event(30_023, 10 + n)).collect();
    let named: Vec<_> = (0..50).map(|n| event(if n % 3 == 0 { 1_984 } else { 7 }, 1_000 + n)).collect();
    let bytes = place.fill(&[&notes, &articles, &named]);
    let kept = |store: &dyn Store, range: std::ops::Range<u64>| {
        dates(store).into_iter().rev().filter(|at| range.contains(at)).collect::<Vec<_>>()
    };

    let store = place.open(&rules, bytes * 85 / 100);
    let removed = retain(&*store, NOW);
    assert!((24..40).contains(&removed), "{removed}");
    assert_eq!(
        kept(&*store, 1_000..2_000),
        (1_000 + removed as u64..1_050).collect::<Vec<_>>(),
        "the oldest named went"
    );
    assert_eq!(kept(&*store, 0..1_000).len(), 60, "no other went");
    let reach = 1_000 + removed as u64 - 1;
    assert_eq!((stats(&*store).named_evicted_up_to, stats(&*store).evicted_up_to), (reach, 0));
    assert!(
        refused(&store, &event(7, reach)) && refused(&store, &event(1_000, 5)) && !refused(&store, &event(7, 3_000))
    );
    assert!(!refused(&store, &event(1, 5)) && !refused(&store, &event(30_023, 5)));
    drop(store);

    let store = place.open(&rules, bytes / 2);
    assert!(refused(&store, &event(7, reach)), "a restart changes nothing");
    retain(&*store, NOW);
    assert_eq!(kept(&*store, 1_000..2_000), [0; 0], "no named kind is left");
    let notes = kept(&*store, 100..1_000);
    assert_eq!(notes, (150 - notes.len() as u64..150).collect::<Vec<_>>(), "then the oldest of the others");
    assert!(!notes.is_empty() && notes.len() < 50);
    assert_eq!(kept(&*store, 0..100).len(), 10, "what a rule protects stays");
    assert!(refused(&store, &event(1, 150 - notes.len() as u64 - 1)) && !refused(&store, &event(1, 200)));
}

/// Compaction gives the space of what was evicted back to the disk; with a quarter of the quota free, old events may
/// come again.
#[test]
fn compaction_frees_the_space_and_room_lifts_the_bar() {
    let dir = tempfile::tempdir().unwrap();
    let author = Keys::new(1);
    let notes: Vec<_> = (0..100).map(|n| author.note(1_000 + n, &format!("{n}{}", "x".repeat(1_000)))).collect();
    let store: Arc<dyn Store> = Arc::new(open(dir.path(), &Rules::default(), 100_000));
    store_all(&*store, &notes);
    assert!(store.apply(&[], NOW).unwrap().over_quota);
    let removed = retain(&*store, NOW);
    assert!(!store.apply(&[], NOW).unwrap().over_quota);
    assert!(removed > 10 && refused(&store, &notes[0]));
    assert!(store.stats().log_bytes > 100_000);
    store.compact(&Pace::flat_out(&|_, _| {})).unwrap();
    assert!(store.stats().log_bytes + store.stats().index_bytes < 100_000);
    let ids: Vec<_> = notes[removed..].iter().map(|note| note.id).collect();
    store.remove(&ids[..ids.len() / 2], Removal::Operator).unwrap();
    assert_eq!(retain(&*store, NOW), 0);
    assert_eq!(stats(&*store).evicted_up_to, 0);
    assert!(!refused(&store, &notes[0]));
}

/// When nothing may be evicted, writes are refused and reading goes on; with room, writing goes on by itself.
fn a_quota_without_anything_to_evict_refuses_writes(place: &Place<'_>) {
    let author = Keys::new(1);
    let rules = rules("rules = [{ kinds = [1], evict = false }]");
    let notes: Vec<_> = (0..100).map(|n| author.note(1_000 + n, &"x".repeat(1_000))).collect();
    let quota = place.fill(&[&notes]) * 80 / 100;
    let store = place.open(&rules, quota);
    assert_eq!(retain(&*store, NOW), 0);
    assert!(stats(&*store).used_up);
    let late = [verified(&author.note(NOW, "late"))];
    assert!(matches!(store.apply(&late, NOW), Err(StoreError::QuotaUsedUp)));
    assert_eq!(dates(&*store).len(), 100);
    store.remove(&[notes[0].id, notes[1].id, notes[2].id], Removal::Operator).unwrap();
    store.remove(&notes[3..40].iter().map(|note| note.id).collect::<Vec<_>>(), Removal::Operator).unwrap();
    retain(&*store, NOW);
    assert_eq!(store.apply(&late, NOW).unwrap().verdicts, [Verdict::Store]);
}

/// Through the relay: publishing past the quota evicts by itself, everybody is answered, old ones are refused, and the
/// order holds; when nothing is left to evict, publishers are told and readers are served.
#[tokio::test]
async fn a_relay_keeps_to_its_quota() {
    let dir = tempfile::tempdir().unwrap();
    let author = Keys::new(1);
    let store = Arc::new(open(dir.path(), &rules("rules = [{ kinds = [30023], evict = false }]"), 60_000));
    let mut config = Config::default();
    config.listen.set_port(0);
    config.storage.batch_events_max = 4;
    let served: Arc<dyn Store> = store.clone();
    let clock = Clock::manual(Arc::new(AtomicU64::new(NOW)));
    let server = soon("the relay", Server::start(Arc::new(config), served, clock)).await.unwrap();
    let mut client = Client::connect(server.addr()).await;
    for n in 0..100 {
        client.store(&author.note(NOW + n, &"x".repeat(1_000))).await;
    }
    // The writer sweeps between batches; what it has not done yet, is done here.
    let first = author.note(NOW, "too old");
    let evicted = async {
        while stats(&*store).evicted_up_to < NOW {
            client.assert_alive().await;
        }
    };
    soon("an eviction", evicted).await;
    assert_eq!(client.publish(&first).await, (false, "blocked: older than this relay keeps".to_owned()));
    assert!(client.count(&[json!({})]).await < 60);
    let newest = client.query(json!({"limit": 1})).await.events;
    assert_eq!(newest[0]["created_at"], NOW + 99);

    let mut last = (true, String::new());
    for n in 0..1_000 {
        let article = author.draft(30_023, NOW).tag(["d", &n.to_string()]).content("x".repeat(1_000)).sign();
        last = client.publish(&article).await;
        if !last.0 {
            break;
        }
    }
    assert_eq!(last, (false, "error: the relay's disk quota is used up".to_owned()));
    let articles = client.query_ids(json!({"kinds": [30023]})).await;
    assert!(articles.len() > 30, "reading goes on");
    // What makes room is taken: authors can delete even now.
    let targets: Vec<(&str, &str)> = articles[..30].iter().map(|id| ("e", id.as_str())).collect();
    client.store(&author.deletion(NOW + 500, &targets)).await;
    assert_eq!(client.count(&[json!({"kinds": [30023]})]).await as usize, articles.len() - 30);
    soon("the end", server.stop()).await.unwrap();
}

/// On the command line: import makes room as it goes, and status tells the figures.
#[test]
fn an_import_past_the_quota_keeps_the_newest() {
    let binary = Binary::new();
    binary.configure("[retention]\nmax_disk_mb = 1\n[storage]\nwriter_queue_events_max = 100\n");
    let author = Keys::new(1);
    let lines: String = (0..600).map(|n| json_of(&author.note(NOW + n, &"x".repeat(3_000))) + "\n").collect();
    let ran = binary.run_with(&["import", "-"], lines.as_bytes());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let status: Value = serde_json::from_str(&binary.run(&["status", "--json"]).ok()).unwrap();
    let kept = status["events"].as_u64().unwrap();
    assert!((200..340).contains(&kept), "{status}");
    let used = status["retention"]["used_bytes"].as_u64().unwrap();
    assert!(used < 1 << 20 && status["retention"]["quota_bytes"] == 1 << 20, "{status}");
    assert!(status["retention"]["evicted_up_to"].as_u64().unwrap() >= NOW, "{status}");
    let again = binary.run_with(&["import", "-"], lines.as_bytes());
    assert!(again.stderr.contains("already stored") && again.stderr.contains("refused"), "{}", again.stderr);
    assert!(binary.run(&["status"]).ok().contains("quota"));
}
