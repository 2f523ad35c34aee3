//! kill -9 at random moments: what was acknowledged is there, byte for byte, and the store is sound.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sledge::protocol::Event;
use sledge::protocol::supersede::Verdict;
use sledge::store::{Progress, Store};
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use crate::fanout::{sample, seeded};
use crate::support::binary::{Binary, Serving, id_of, lines};
use crate::support::stores::{all, generations, open_store, query, read, remove_indexes, row_ids};
use crate::support::{Client, Keys, NOW, ids, json_of, verified};

/// Asserts that the store is sound; what it holds, by id.
fn sound_content(binary: &Binary) -> BTreeMap<String, String> {
    let verified = binary.run(&["verify"]);
    assert_eq!(verified.code, Some(0), "verify: {}\n{}", verified.stdout, verified.stderr);
    binary.export().into_iter().map(|line| (id_of(&line), line)).collect()
}

/// An import is killed wherever it happens to be; what it left is sound and from the input, and the same import run
/// again completes it.
#[test]
fn kill_9_during_import_loses_nothing_that_a_second_run_does_not_bring() {
    let mut chance = seeded(9);
    let binary = Binary::new();
    let events: Vec<Event> = (0..3_000).map(|n| Keys::new(n % 5).note(NOW + n % 50, &n.to_string())).collect();
    let expected: BTreeMap<String, String> = events.iter().map(|event| (event.id.to_hex(), json_of(event))).collect();
    let input = lines(&events);
    for _ in 0..4 {
        let mut command = binary.command(&["import", "-"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let cut = sample(&mut chance, 1..input.len());
        // The pipe holds little: once this is written, the import is about this far, in the middle of a line.
        child.stdin.take().unwrap().write_all(&input.as_bytes()[..cut]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        for (id, line) in sound_content(&binary) {
            assert_eq!(expected.get(&id), Some(&line), "something that was never imported");
        }
    }
    binary.run_with(&["import", "-"], input.as_bytes()).ok();
    assert_eq!(sound_content(&binary), expected);
}

/// What one publisher was told, up to the kill.
#[derive(Default)]
struct Told {
    /// Sent, answered or not.
    sent: Vec<Event>,
    /// Answered `OK true`.
    acknowledged: Vec<Event>,
}

/// What a publisher sends as its `n`-th event.
type Plan = fn(&Keys, u64) -> Event;

/// Notes that nothing replaces or deletes.
fn notes(keys: &Keys, n: u64) -> Event {
    keys.note(NOW + n, &"words ".repeat(1 + n as usize % 100))
}

/// Ever newer versions of one list.
fn versions(keys: &Keys, n: u64) -> Event {
    keys.draft(10_002, NOW + n).sign()
}

/// A note, then its deletion, then the next.
fn regrets(keys: &Keys, n: u64) -> Event {
    let note = keys.note(NOW + n / 2, "regretted");
    if n.is_multiple_of(2) { note } else { keys.deletion(NOW + n, &[("e", &note.id.to_hex())]) }
}

/// Publishes by `plan` until the connection ends. Several events are always on their way.
async fn publish_until_killed(
    mut client: Client,
    keys: Keys,
    plan: Plan,
    from: u64,
    answered: Arc<Progressing>,
) -> Told {
    const WINDOW: u64 = 16;
    let mut told = Told::default();
    let mut next = from;
    loop {
        while (next - from) < told.acknowledged.len() as u64 + WINDOW {
            let event = plan(&keys, next);
            let message = Message::text(format!("[\"EVENT\",{}]", json_of(&event)));
            told.sent.push(event);
            next += 1;
            if client.try_send(message).await.is_err() {
                return told;
            }
        }
        let Some(frame) = client.next_frame().await else { return told };
        let answer: serde_json::Value = serde_json::from_str(frame.to_text().unwrap()).unwrap();
        assert_eq!((&answer[0], &answer[2]), (&"OK".into(), &true.into()), "{answer}");
        let event = told.sent.iter().find(|event| answer[1] == event.id.to_hex()).expect("an OK is for what was sent");
        told.acknowledged.push(event.clone());
        answered.one_more();
    }
}

/// Counts answers and wakes whoever waits for a number of them.
struct Progressing {
    count: AtomicUsize,
    goal: usize,
    reached: Notify,
}

impl Progressing {
    fn one_more(&self) {
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 == self.goal {
            self.reached.notify_one();
        }
    }
}

/// Publishers at work when the relay is killed: everything acknowledged is there afterwards, replaced and deleted
/// events are not, and nothing else is there either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_during_serve_loses_nothing_acknowledged() {
    let plans: [Plan; 4] = [notes, notes, versions, regrets];
    let mut chance = seeded(10);
    let binary = Binary::new();
    let mut told: Vec<Told> = plans.iter().map(|_| Told::default()).collect();
    for _ in 0..4 {
        let mut serving = binary.serve();
        let goal = sample(&mut chance, 20..400usize);
        let answered = Arc::new(Progressing { count: AtomicUsize::new(0), goal, reached: Notify::new() });
        let mut publishers = JoinSet::new();
        for (at, plan) in plans.into_iter().enumerate() {
            let client = Client::connect(serving.addr()).await;
            let from = told[at].sent.len() as u64;
            let answered = Arc::clone(&answered);
            publishers.spawn(async move {
                (at, publish_until_killed(client, Keys::new(at as u64), plan, from, answered).await)
            });
        }
        crate::support::client::soon("the answers", answered.reached.notified()).await;
        serving.kill();
        while let Some(done) = publishers.join_next().await {
            let (at, round) = done.unwrap();
            told[at].sent.extend(round.sent);
            told[at].acknowledged.extend(round.acknowledged);
        }
        check_after_kill(&binary, &told);
    }
}

fn check_after_kill(binary: &Binary, told: &[Told]) {
    let content = sound_content(binary);
    let holds = |event: &Event| content.get(&event.id.to_hex()).is_some_and(|line| *line == json_of(event));
    for told in &told[..2] {
        let lost: Vec<String> = ids(told.acknowledged.iter().filter(|event| !holds(event)));
        assert!(lost.is_empty(), "{} of {} acknowledged notes are lost", lost.len(), told.acknowledged.len());
    }
    let stored_versions: Vec<&Event> = told[2].sent.iter().filter(|event| holds(event)).collect();
    let newest_acknowledged = told[2].acknowledged.iter().map(|event| event.created_at).max();
    assert!(stored_versions.len() <= 1, "one version at a time");
    let newest_stored = stored_versions.first().map(|event| event.created_at);
    assert!(newest_stored >= newest_acknowledged, "{newest_stored:?} after {newest_acknowledged:?} was acknowledged");
    let deletions = told[3].acknowledged.iter().filter(|event| event.kind.0 == 5);
    for deletion in deletions {
        assert!(holds(deletion), "an acknowledged deletion is lost");
        let target = deletion.tags.values("e").next().expect("it names its note");
        assert!(!content.contains_key(target), "a deleted note is back");
    }
    let sent: BTreeSet<String> = told.iter().flat_map(|told| ids(&told.sent)).collect();
    assert!(content.keys().all(|id| sent.contains(id)), "something is there that nobody sent");
}

/// SIGTERM and SIGINT: what was accepted is answered and kept, the exit code is 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_stop_gracefully() {
    for (round, signal) in ["TERM", "INT"].into_iter().enumerate() {
        let binary = Binary::new();
        let serving = binary.serve();
        let client = Client::connect(serving.addr()).await;
        let answered = Arc::new(Progressing { count: AtomicUsize::new(0), goal: 100, reached: Notify::new() });
        let publisher =
            tokio::spawn(publish_until_killed(client, Keys::new(round as u64), notes, 0, Arc::clone(&answered)));
        crate::support::client::soon("the answers", answered.reached.notified()).await;
        serving.signal(signal);
        let told = publisher.await.unwrap();
        let (status, log) = tokio::task::spawn_blocking(|| Serving::wait_for_end(serving)).await.unwrap();
        assert_eq!(status.code(), Some(0), "SIG{signal}: {log}");
        let content = sound_content(&binary);
        assert!(told.acknowledged.iter().all(|event| content.contains_key(&event.id.to_hex())), "SIG{signal}");
    }
}

/// A log cut at any byte, as a power cut leaves it, is a database that holds a beginning of the batches.
#[test]
fn any_prefix_of_the_log_is_a_database() {
    let home = TempDir::new().unwrap();
    let whole = home.path().join("whole");
    let store = open_store(&whole);
    let events: Vec<Event> = (0..60).map(|n| Keys::new(n % 3).note(NOW + n, &"x".repeat(n as usize * 3))).collect();
    let log = generations(&whole)[0].join("events.log");
    let mut ends = vec![(std::fs::metadata(&log).unwrap().len(), 0)];
    for (batch, chunk) in events.chunks(4).enumerate() {
        let chunk: Vec<_> = chunk.iter().map(verified).collect();
        assert!(store.apply(&chunk, NOW).unwrap().verdicts.iter().all(|verdict| *verdict == Verdict::Store));
        ends.push((std::fs::metadata(&log).unwrap().len(), (batch + 1) * 4));
    }
    drop(store);
    let mut chance = seeded(11);
    for round in 0..25 {
        let cut = sample(&mut chance, ends[0].0..ends.last().unwrap().0);
        let at_least = ends.iter().rev().find(|(end, _)| *end <= cut).unwrap().1;
        let dir = home.path().join(round.to_string());
        copy_dir(&whole, &dir);
        if round % 2 == 0 {
            remove_indexes(&dir);
        }
        let log = generations(&dir)[0].join("events.log");
        OpenOptions::new().write(true).open(log).unwrap().set_len(cut).unwrap();
        let store = open_store(&dir);
        let (rows, end) = read(&store, query(&[all(Default::default())], NOW), usize::MAX);
        assert_eq!(end, Progress::Finished);
        assert!(rows.len() >= at_least, "cut at {cut}: {} of {at_least} durable events", rows.len());
        let mut expected = ids(&events[..rows.len()]);
        expected.reverse();
        assert_eq!(row_ids(&rows), expected, "cut at {cut}");
        let rest: Vec<_> = events.iter().map(verified).collect();
        let verdicts = store.apply(&rest, NOW).unwrap().verdicts;
        assert!(
            verdicts[rows.len()..].iter().all(|verdict| *verdict == Verdict::Store),
            "the rest can be stored again"
        );
    }
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
