//! `sledge backup` through the binary: dying half-way, running out of disk, beside a serving relay.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use sledge::protocol::Event;
use sledge::store::backup::{check_backup, restore};
use sledge::store::compact::{Pace, compact};
use sledge::store::embedded::EmbeddedStore;
use sledge::store::fault::BACKUP_POINTS;
use sledge::store::verify::verify;
use sledge::store::{Removal, Store};

use crate::support::binary::Binary;
use crate::support::stores::{all, holds, once_free, open_store, query, read};
use crate::support::{Client, Keys, NOW, verified};

const ABORTED: i32 = 6;
/// Points that a backup shares with the store.
const SHARED_POINTS: [&str; 5] = ["file.written", "file.renamed", "erase.begin", "erase.half_written", "erase.written"];

fn note(n: u64) -> Event {
    Keys::new(1).note(NOW + n, &format!("content of note {n}"))
}

fn store(store: &EmbeddedStore, notes: impl Iterator<Item = u64>) {
    let events: Vec<_> = notes.map(|n| verified(&note(n))).collect();
    store.apply(&events, NOW).unwrap();
}

fn contents(dir: &Path) -> Vec<String> {
    let store = open_store(dir);
    assert_eq!(verify(&store, &|_, _| {}).unwrap().problems, [] as [&str; 0]);
    let (rows, _) = read(&store, query(&[all(Default::default())], 0), usize::MAX);
    rows.iter().map(|row| Event::from_json(std::str::from_utf8(&row.json).unwrap()).unwrap().content).collect()
}

/// What a restored backup holds.
fn restored(dest: &Path) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("new");
    once_free(|| restore(dest, &new, false, &|_, _| {}));
    contents(&new)
}

fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A store with a backup, written on since: two notes are removed, others are new; compacted or not.
fn written_on(compacted: bool) -> Binary {
    let binary = Binary::new();
    let dest = binary.data().with_file_name("backup");
    let opened = open_store(binary.data());
    store(&opened, 0..10);
    binary.run(&["backup", dest.to_str().unwrap()]).ok();
    assert_eq!(opened.remove(&[note(3).id, note(7).id], Removal::Operator).unwrap(), 2);
    store(&opened, 10..15);
    if compacted {
        compact(&opened, &Pace::flat_out(&|_, _| {})).unwrap();
    }
    opened.close(std::time::Instant::now() + std::time::Duration::from_secs(60)).unwrap();
    binary
}

/// Wherever a backup run dies, what it leaves can be restored to the notes of before or those of now, and the next run
/// ends as if nothing had been. What was removed is gone then.
#[test]
fn dying_at_any_point_leaves_a_good_backup() {
    for compacted in [false, true] {
        let binary = written_on(compacted);
        let before: Vec<String> = (0..10).rev().map(|n| note(n).content).collect();
        let now = contents(binary.data());
        for point in BACKUP_POINTS.iter().chain(&SHARED_POINTS) {
            for times in 1..=2 {
                let fault = format!("{point}:{times}");
                let folder = tempfile::tempdir().unwrap();
                let dest = folder.path().join("dest");
                copy_files(&binary.data().with_file_name("backup"), &dest);
                let mut command = binary.command(&["backup", dest.to_str().unwrap()]);
                let ended = command.env("SLEDGE_FAULT", &fault).stderr(Stdio::null()).stdout(Stdio::null()).status();
                let died = ended.unwrap().signal() == Some(ABORTED);
                let left = restored(&dest);
                let some_of_before = left.iter().all(|content| before.contains(content))
                    && now.iter().filter(|content| before.contains(content)).all(|content| left.contains(content));
                assert!(left == now || (died && some_of_before), "{fault}: {left:?}");
                binary.run(&["backup", dest.to_str().unwrap()]).ok();
                assert_eq!(check_backup(&dest, &|_, _| {}).unwrap().problems, [] as [&str; 0], "{fault}");
                assert_eq!(restored(&dest), now, "{fault}");
                for gone in [3, 7] {
                    assert!(!holds(&dest, &format!("\"{}\"", note(gone).content)), "{fault}: {gone} is still there");
                }
                let is_reached = died || times > 1;
                let is_of_the_other =
                    if compacted { point.starts_with("erase.") } else { point.ends_with("old_removed") };
                assert!(is_reached || is_of_the_other, "{fault} was not reached");
                if !died {
                    break;
                }
            }
        }
    }
}

/// A first run that dies leaves nothing that would be taken for a backup, and does not stand in the way of the next.
#[test]
fn a_first_backup_that_dies_can_be_run_again() {
    let binary = written_on(false);
    for point in ["backup.stride", "backup.copied", "file.written"] {
        let folder = tempfile::tempdir().unwrap();
        let dest = folder.path().join("dest");
        let mut command = binary.command(&["backup", dest.to_str().unwrap()]);
        assert_eq!(command.env("SLEDGE_FAULT", point).status().unwrap().signal(), Some(ABORTED), "{point}");
        assert!(check_backup(&dest, &|_, _| {}).unwrap_err().to_string().contains("no backup in"), "{point}");
        binary.run(&["backup", dest.to_str().unwrap()]).ok();
        assert_eq!(restored(&dest), contents(binary.data()));
    }
}

/// Where the disk of the backup is full, that is said, the last backup stays good, and room is given back. A limit on
/// the size of files stands in for the disk.
#[test]
fn a_full_disk_leaves_the_last_backup() {
    let binary = Binary::new();
    let dest = binary.data().with_file_name("backup");
    let opened = open_store(binary.data());
    store(&opened, 0..10);
    binary.run(&["backup", dest.to_str().unwrap()]).ok();
    let before = restored(&dest);
    store(&opened, 10..3_000);
    for compacted in [false, true] {
        if compacted {
            compact(&opened, &Pace::flat_out(&|_, _| {})).unwrap();
        }
        let command = binary.command(&["backup", dest.to_str().unwrap()]);
        let mut limited = Command::new("sh");
        limited.args(["-c", "trap '' XFSZ; ulimit -f 200; exec \"$0\" \"$@\""]).arg(command.get_program());
        let ran = limited.args(command.get_args()).current_dir(binary.data().parent().unwrap()).output().unwrap();
        let said = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(ran.status.code(), Some(1), "{said}");
        assert!(said.contains("is full") && said.contains("backup"), "{said}");
        assert_eq!(check_backup(&dest, &|_, _| {}).unwrap().problems, [] as [&str; 0]);
        assert_eq!(restored(&dest), before);
        let copies: u64 = std::fs::read_dir(&dest).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(copies < 100_000, "{copies} bytes are left behind");
    }
    binary.run(&["backup", dest.to_str().unwrap()]).ok();
    assert_eq!(restored(&dest).len(), 3_000);
}

/// Beside a serving relay: what got its OK is in the backup.
#[tokio::test]
async fn a_serving_relay_is_backed_up() {
    let binary = Binary::new();
    let dest = binary.data().with_file_name("backup");
    let serving = binary.serve();
    let mut client = Client::connect(serving.addr()).await;
    for n in 0..3 {
        client.store_all(&[note(2 * n), note(2 * n + 1)]).await;
        binary.run(&["backup", dest.to_str().unwrap()]).ok();
        assert_eq!(restored(&dest).len() as u64, 2 * n + 2);
    }
    assert!(binary.run(&["backup", "--verify", dest.to_str().unwrap()]).ok().contains("6 records"));
}
