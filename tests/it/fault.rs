//! The process ends at every named fault point in turn; what was acknowledged is there, what was removed is not.
//!
//! The test starts itself again as a child that runs [`child`] with `SLEDGE_FAULT` set, and looks at what that leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use sledge::protocol::Event;
use sledge::store::compact::{Pace, compact};
use sledge::store::embedded::EmbeddedStore;
use sledge::store::fault::POINTS;
use sledge::store::verify::verify;
use sledge::store::{Store, Wanted};

use crate::support::stores::{all, holds, open_store, query, read};
use crate::support::{Keys, NOW, Reference, json_of, verified};

/// Where the child keeps its store; without it the child is just an empty test.
const DIR: &str = "SLEDGE_FAULT_DIR";
/// Where the store itself is, if not in there.
const STORE: &str = "SLEDGE_FAULT_STORE";
const ABORTED: i32 = 6;

/// Batches in which everything is replaced, deleted and vanishes sooner or later. Contents are unique and start with
/// `content of`, so that the raw files can be searched for them.
fn history() -> Vec<Vec<Event>> {
    let [alice, bob, carol] = [1, 2, 3].map(Keys::new);
    let content = |what: &str, n: u64| format!("content of {what} {n}");
    let mut batches = Vec::new();
    for n in 0..14 {
        let now = NOW + n;
        let note = alice.draft(1, now).tag(["t", "x"]).content(content("note", n)).sign();
        let profile = bob.draft(0, now).content(content("profile", n)).sign();
        let article = bob.draft(30_023, now).tag(["d", "a:b"]).content(content("article", n)).sign();
        let wrap = Keys::new(100 + n).draft(1059, now).tag(["p", &carol.hex()]).content(content("wrap", n)).sign();
        let short =
            bob.draft(1, now).tag(["expiration", &(NOW + 100 + n % 3).to_string()]).content(content("short", n)).sign();
        let mine = carol.note(now, &content("mine", n));
        let mut batch = vec![note.clone(), profile.clone(), article, wrap, short, mine];
        match n % 5 {
            1 => batch.push(alice.deletion(now, &[("e", &note.id.to_hex())])),
            2 => batch.push(bob.deletion(now, &[("a", &bob.address(30_023, "a:b")), ("e", &profile.id.to_hex())])),
            4 => batch.push(carol.draft(62, now).tag(["relay", "ALL_RELAYS"]).sign()),
            _ => {}
        }
        batches.push(batch);
    }
    batches
}

/// Applies the batches from `first` on, with all that a store does beside: merges, compactions, sweeps. Notes each
/// batch in `acks` once it is acknowledged.
fn run(store: &EmbeddedStore, first: usize, acks: &mut impl Write) {
    for (n, batch) in history().iter().enumerate().skip(first) {
        let batch: Vec<_> = batch.iter().map(verified).collect();
        store.apply(&batch, NOW).unwrap();
        writeln!(acks, "{n}").unwrap();
        match n {
            3 | 10 => store.merge_index().unwrap(),
            6 | 11 => drop(compact(store, &Pace::flat_out(&|_, _| {})).unwrap()),
            12 => drop(store.sweep_expired(NOW + 101, 100).unwrap()),
            _ => {}
        }
    }
}

/// Not a test of its own: the process that the tests below let die.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let mut acks = OpenOptions::new().create(true).append(true).open(dir.join("acks")).unwrap();
    let store = std::env::var_os(STORE).map_or_else(|| dir.join("store"), PathBuf::from);
    let store = open_store(&store);
    run(&store, acknowledged(dir), &mut acks);
    store.close(std::time::Instant::now() + std::time::Duration::from_secs(60)).unwrap();
}

fn spawn_child(dir: &Path, fault: Option<&str>) -> ExitStatus {
    spawn_child_with_store(dir, &dir.join("store"), fault)
}

/// Runs the history on a store of its own, notes in `dir` what was acknowledged, and dies at the fault point.
pub fn spawn_child_with_store(dir: &Path, store: &Path, fault: Option<&str>) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "fault::child", "--test-threads", "1"]).env(DIR, dir).env(STORE, store);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(fault) = fault {
        command.env("SLEDGE_FAULT", fault);
    }
    command.status().unwrap()
}

/// How many batches the child was told are durable.
pub fn acknowledged(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("acks")).map_or(0, |acks| acks.lines().count())
}

fn content(store: &EmbeddedStore) -> BTreeMap<String, String> {
    let everything: Wanted = all(Default::default());
    let (rows, _) = read(store, query(&[everything], 0), usize::MAX);
    rows.iter().map(|row| (row.id.to_hex(), String::from_utf8(row.json.to_vec()).unwrap())).collect()
}

fn reference(batches: &[Vec<Event>]) -> Reference {
    let mut reference = Reference::new();
    batches.iter().flatten().for_each(|event| {
        reference.apply(event, NOW);
    });
    reference
}

fn visible(reference: &Reference) -> BTreeMap<String, String> {
    reference.visible(0).into_iter().map(|event| (event.id.to_hex(), json_of(event))).collect()
}

/// What a crash after `acked` batches may leave: all of them, and of the next one any whole events with what they do.
#[track_caller]
pub fn assert_left_in_order(store: &Path, acked: usize, fault: &str) {
    let store = open_store(store);
    let problems = verify(&store, &|_, _| {}).unwrap().problems;
    assert_eq!(problems, [] as [&str; 0], "{fault}");
    let found = content(&store);
    let batches = history();
    let before = visible(&reference(&batches[..acked]));
    let after = visible(&reference(&batches[..(acked + 1).min(batches.len())]));
    let next: BTreeSet<String> = batches.get(acked).into_iter().flatten().map(|event| event.id.to_hex()).collect();
    let swept = acked > 12;
    for (id, json) in &before {
        let may_be_gone = !after.contains_key(id) || (swept && json.contains("expiration"));
        assert!(found.get(id) == Some(json) || (may_be_gone && !found.contains_key(id)), "{fault}: lost {json}");
    }
    for (id, json) in &found {
        assert!(before.contains_key(id) || next.contains(id), "{fault}: came back: {json}");
    }
}

/// Every point, the first time it is reached and later: nothing acknowledged is lost, nothing removed comes back, and
/// going on from there ends where an undisturbed run ends, with the removed contents gone from the files.
#[test]
fn dying_at_any_fault_point_loses_nothing() {
    let expected = {
        let dir = tempfile::tempdir().unwrap();
        assert!(spawn_child(dir.path(), None).success());
        content(&open_store(&dir.path().join("store")))
    };
    let erased: Vec<String> = erased_contents(&expected);
    assert!(erased.len() >= 20, "the history should erase something");
    for point in POINTS {
        for times in [1, 2, 6, 11] {
            let fault = format!("{point}:{times}");
            let dir = tempfile::tempdir().unwrap();
            let ended = spawn_child(dir.path(), Some(&fault));
            assert!(
                ended.signal() == Some(ABORTED) || (times > 1 && ended.success()),
                "{fault} was not reached: {ended}"
            );
            if ended.success() {
                break;
            }
            assert_left_in_order(&dir.path().join("store"), acknowledged(dir.path()), &fault);
            assert!(spawn_child(dir.path(), None).success(), "{fault}: going on failed");
            assert_eq!(content(&open_store(&dir.path().join("store"))), expected, "{fault}");
            for secret in &erased {
                assert!(!holds(&dir.path().join("store"), secret), "{fault}: {secret} is still on the disk");
            }
        }
    }
}

/// The contents that a deletion request or a request to vanish removed: those of removed events that were not just
/// replaced or expired.
fn erased_contents(left: &BTreeMap<String, String>) -> Vec<String> {
    let gone = history().into_iter().flatten().filter(|event| !left.contains_key(&event.id.to_hex()));
    let by_request = gone.filter(|event| ["mine", "wrap"].iter().any(|what| event.content.contains(what)));
    by_request.map(|event| format!("\"{}\"", event.content)).collect()
}
