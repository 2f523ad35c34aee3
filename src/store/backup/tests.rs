#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::protocol::{Event, Verified};
use crate::store::compact::{Pace, compact};
use crate::store::embedded::EmbeddedStore;
use crate::store::testing::{assert_sound, close, contents, flip, holds, log_of, note, once_free, open, sign};
use crate::store::{Removal, Store};

fn run(store: &Path, dest: &Path) -> BackupReport {
    once_free(|| backup(store, dest, &|_, _| {})).unwrap()
}

fn check(dest: &Path) -> Result<BackupCheck, StoreError> {
    once_free(|| check_backup(dest, &|_, _| {}))
}

fn restored(dest: &Path, dir: &Path) -> EmbeddedStore {
    once_free(|| restore(dest, dir, false, &|_, _| {})).unwrap();
    open(dir)
}

/// All bytes of the copies in a backup.
fn copied(dest: &Path) -> Vec<u8> {
    copies_in(dest).unwrap().iter().flat_map(|(_, name)| std::fs::read(dest.join(name)).unwrap()).collect()
}

fn compact_now(store: &EmbeddedStore) {
    compact(store, &Pace::flat_out(&|_, _| {})).unwrap();
}

/// Adding what is new, again and again, comes to the same bytes as one copy, and those are the store's.
#[test]
fn adding_comes_to_the_same_as_copying_all() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest, whole] = ["store", "dest", "whole"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let mut notes = Vec::new();
    for round in 0..6 {
        notes.extend((0..5).map(|n| note(round * 10 + n, &format!("note {round} {n}"))));
        store.apply(&notes[notes.len() - 5..], 0).unwrap();
        store.remove(&[notes[round as usize * 3].id], Removal::Operator).unwrap();
        let report = run(&dir, &dest);
        assert_eq!(report.begun_anew.is_some(), round == 0, "{report:?}");
        assert_eq!(check(&dest).unwrap().problems, [] as [&str; 0]);
    }
    assert_eq!((run(&dir, &dest).bytes_copied, run(&dir, &dest).erased), (0, 0));
    let report = run(&dir, &whole);
    assert_eq!(report.bytes_copied, report.log_bytes - HEADER_LEN);
    let log = std::fs::read(log_of(&dir)).unwrap();
    assert!(copied(&dest) == log && copied(&whole) == log);
    let restored = restored(&dest, &folder.path().join("restored"));
    assert_sound(&restored);
    assert_eq!(contents(&restored), contents(&store));
}

/// What was deleted after the copy was made is gone from it with the next run, also when the store was compacted.
#[test]
fn what_is_erased_in_the_store_is_erased_in_the_backup() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let secrets = ["first secret", "second secret"].map(|content| note(10, content));
    store.apply(&secrets, 0).unwrap();
    store.apply(&[note(11, "no secret")], 0).unwrap();
    run(&dir, &dest);
    assert!(holds(&copied(&dest), "first secret"));
    store.apply(&[sign(1, 5, 12, &[&["e", &secrets[0].id.to_hex()]], "")], 0).unwrap();
    let report = run(&dir, &dest);
    assert_eq!((report.begun_anew, report.erased), (None, 1));
    let bytes = copied(&dest);
    assert!(!holds(&bytes, "first secret") && holds(&bytes, "second secret") && holds(&bytes, "no secret"));
    store.remove(&[secrets[1].id], Removal::Operator).unwrap();
    compact_now(&store);
    let report = run(&dir, &dest);
    assert!(report.begun_anew.unwrap().contains("compacted"));
    assert!(!holds(&copied(&dest), "second secret"));
    assert_eq!(copies_in(&dest).unwrap(), [(2, "events-000002.log".to_owned())]);
}

/// Packed records are copied, checked and erased like any.
#[test]
fn a_packed_store_is_backed_up() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let notes: Vec<_> = (0..1_100).map(|n| note(n, &format!("an entry about the weather of day {n}"))).collect();
    store.apply(&notes, 0).unwrap();
    compact_now(&store);
    store.remove(&[notes[7].id], Removal::Operator).unwrap();
    run(&dir, &dest);
    store.remove(&[notes[8].id, notes[9].id], Removal::Operator).unwrap();
    let report = run(&dir, &dest);
    assert_eq!((report.begun_anew, report.erased, report.damaged.len()), (None, 2, 0));
    assert_eq!(check(&dest).unwrap().problems, [] as [&str; 0]);
    assert!(copied(&dest) == std::fs::read(log_of(&dir)).unwrap());
    let restored = restored(&dest, &folder.path().join("new"));
    assert_sound(&restored);
    assert_eq!(contents(&restored), contents(&store));
}

/// A run that ended between putting the copy in force and erasing: restoring erases, and so does the next run.
#[test]
fn an_interrupted_erasure_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let secret = note(10, "a secret of some length");
    store.apply(&[secret.clone(), note(11, "other")], 0).unwrap();
    run(&dir, &dest);
    let before = copied(&dest);
    let reached = Manifest::read(&dest).unwrap().log_bytes;
    store.remove(&[secret.id], Removal::Operator).unwrap();
    run(&dir, &dest);
    let copy = dest.join("events-000001.log");
    let mut bytes = std::fs::read(&copy).unwrap();
    bytes[60..before.len()].copy_from_slice(&before[60..]); // its first bytes are erased, the rest is not
    std::fs::write(&copy, &bytes).unwrap();
    assert!(holds(&bytes, "a secret") && check(&dest).unwrap().problem_count > 0);
    let mut manifest = Manifest::read(&dest).unwrap();
    manifest.erased_up_to = reached;
    manifest.write(&dest).unwrap();
    assert_eq!(check(&dest).unwrap().problems, [] as [&str; 0]);
    let restored_dir = folder.path().join("restored");
    assert_eq!(contents(&restored(&dest, &restored_dir)), ["other"]);
    assert!(!holds(&std::fs::read(log_of(&restored_dir)).unwrap(), "a secret"));
    run(&dir, &dest);
    assert!(!holds(&copied(&dest), "a secret"));
}

/// Two histories of one log: the copy does not go on with the other one, even where the lengths agree.
#[test]
fn another_history_is_copied_anew() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, other_dir, dest] = ["store", "other", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    store.apply(&[note(1, "common")], 0).unwrap();
    run(&dir, &dest);
    let other = restored(&dest, &other_dir);
    store.apply(&[note(2, "mine"), note(3, "and more")], 0).unwrap();
    other.apply(&[note(2, "your"), note(3, "and more")], 0).unwrap();
    run(&dir, &dest);
    let report = run(&other_dir, &dest);
    assert!(report.begun_anew.unwrap().contains("does not go on"));
    assert!(holds(&copied(&dest), "your") && !holds(&copied(&dest), "mine"));
}

/// Whatever byte of a backup is changed, the check notices; likewise each page of zeros and each missing end.
#[test]
fn every_damaged_byte_and_page_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let gone = note(1, "deleted");
    store.apply(&[gone.clone(), note(2, "second"), sign(2, 0, 3, &[&["t", "x"]], "profile")], 0).unwrap();
    store.remove(&[gone.id], Removal::Operator).unwrap();
    run(&dir, &dest);
    assert_eq!(check(&dest).unwrap().problems, [] as [&str; 0]);
    let found = || check(&dest).map_or(true, |check| check.problem_count > 0);
    for name in ["MANIFEST", "events-000001.log"] {
        let path = dest.join(name);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            flip(&path, at);
            assert!(found(), "{name}: byte {at}");
            std::fs::write(&path, &good).unwrap();
        }
        for len in 0..good.len() {
            std::fs::write(&path, &good[..len]).unwrap();
            assert!(found(), "{name}: cut to {len} bytes");
        }
        std::fs::write(&path, &good).unwrap();
    }
    store.apply(&(10..90).map(|n| note(n, &"x".repeat(n as usize * 5))).collect::<Vec<_>>(), 0).unwrap();
    run(&dir, &dest);
    let path = dest.join("events-000001.log");
    let good = std::fs::read(&path).unwrap();
    for page in 0..good.len() / 4096 {
        let mut bytes = good.clone();
        bytes[page * 4096..][..4096].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        assert!(found(), "page {page}");
    }
}

/// A damaged backup names the event, and is restored only on demand; then what is sound is there.
#[test]
fn a_damaged_backup_is_refused_unless_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest, new] = ["store", "dest", "new"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let notes = [note(1, "one"), note(2, "two"), note(3, "three")];
    store.apply(&notes, 0).unwrap();
    run(&dir, &dest);
    let path = dest.join("events-000001.log");
    let good = std::fs::read(&path).unwrap();
    flip(&path, memchr::memmem::find(&good, b"two").unwrap());
    let error = once_free(|| restore(&dest, &new, false, &|_, _| {})).unwrap_err().to_string();
    assert!(error.contains(&notes[1].id.to_hex()) && error.contains("nothing was restored"), "{error}");
    assert_eq!(std::fs::read_dir(&new).unwrap().count(), 0);
    once_free(|| restore(&dest, &new, true, &|_, _| {})).unwrap();
    assert_eq!(contents(&open(&new)), ["three", "one"]);
    let error = once_free(|| restore(&dest, &new, true, &|_, _| {})).unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
    std::fs::write(&path, &good[..good.len() - 100]).unwrap();
    let newer = folder.path().join("newer");
    let error = once_free(|| restore(&dest, &newer, false, &|_, _| {})).unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
}

/// Damage in the store is copied as it is and told; it is no fault of the backup. Sound records of the copy stay.
#[test]
fn damage_in_the_store_is_copied_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest, later] = ["store", "dest", "later"].map(|name| folder.path().join(name));
    let store = open(&dir);
    let notes = [note(1, "one"), note(2, "two"), note(3, "three")];
    store.apply(&notes, 0).unwrap();
    run(&dir, &later);
    let log = log_of(&dir);
    flip(&log, memchr::memmem::find(&std::fs::read(&log).unwrap(), b"two").unwrap());
    let report = run(&dir, &dest);
    assert_eq!(report.damaged.len(), 1);
    let checked = check(&dest).unwrap();
    assert_eq!((checked.problem_count, checked.damaged_in_store.len()), (0, 1));
    assert_eq!(checked.damaged_in_store[0].events, [notes[1].id.to_hex()]);
    assert_eq!(run(&dir, &dest).begun_anew, None);
    let report = run(&dir, &later);
    assert_eq!((report.begun_anew, report.damaged), (None, Vec::new()));
    assert_eq!(contents(&restored(&later, &folder.path().join("new"))), ["three", "two", "one"]);
}

/// One run at a time; a store is no place for a backup; where there is no store nothing is made.
#[test]
fn what_cannot_be_done_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let refused = |from: &Path, to: &Path| backup(from, to, &|_, _| {}).unwrap_err().to_string();
    assert!(refused(&dir, &dest).contains("there is no store"));
    assert!(!dest.exists());
    let store = open(&dir);
    run(&dir, &dest);
    let _held = lock_to_write(&dest).unwrap();
    assert!(refused(&dir, &dest).contains("is under way"));
    assert!(check_backup(&dest, &|_, _| {}).unwrap_err().to_string().contains("is under way"));
    assert!(refused(&dir, &dir).contains("is a store"));
    close(store);
}

/// xorshift64
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What the writer of the next test was told is durable.
#[derive(Default)]
struct Acknowledged {
    notes: BTreeMap<String, Verified<Event>>,
    /// What may be gone already: its deletion was begun.
    doomed: BTreeSet<String>,
    removed: BTreeSet<String>,
}

/// Writes, deletes, replaces and compacts until told to stop.
fn write_on(store: &EmbeddedStore, acknowledged: &Mutex<Acknowledged>, stop: &AtomicBool) {
    let mut random = Random(0x5EED);
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut notes = Vec::new();
        for _ in 0..1 + random.below(12) {
            n += 1;
            notes.push(note(n, &format!("content {n} {}", "x".repeat(random.below(600) as usize))));
        }
        let mut batch = notes.clone();
        batch.push(sign(2, 0, n, &[], &format!("profile {n}")));
        store.apply(&batch, 0).unwrap();
        let mut known = acknowledged.lock().unwrap();
        known.notes.extend(notes.into_iter().map(|note| (note.content.clone(), note)));
        let victim = known.notes.values().nth(random.below(known.notes.len() as u64) as usize).cloned().unwrap();
        let removes = random.below(2) == 0;
        if removes {
            known.doomed.insert(victim.content.clone());
        }
        drop(known);
        if removes {
            let request = sign(1, 5, n, &[&["e", &victim.id.to_hex()]], "");
            store.apply(&[request], 0).unwrap();
            let mut known = acknowledged.lock().unwrap();
            known.notes.remove(&victim.content);
            known.removed.insert(victim.content.clone());
        }
        if random.below(40) == 0 {
            compact_now(store);
        }
    }
}

/// Backups while another thread writes, deletes and compacts without pause. Each one restores to a sound store with
/// all that was acknowledged before it began, and nothing that was removed before.
#[test]
fn a_backup_of_a_busy_store_is_sound_and_complete() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    store.apply(&[note(0, "content 0")], 0).unwrap();
    let (acknowledged, stop) = (Mutex::new(Acknowledged::default()), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| write_on(&store, &acknowledged, &stop));
        let stop_at_end = StopAtEnd(&stop);
        for round in 0..10 {
            let known = acknowledged.lock().unwrap();
            let (there, gone) = (known.notes.clone(), known.removed.clone());
            drop(known);
            run(&dir, &dest);
            let doomed = acknowledged.lock().unwrap().doomed.clone();
            assert_eq!(check(&dest).unwrap().problems, [] as [&str; 0], "round {round}");
            let bytes = copied(&dest);
            assert!(!gone.iter().any(|content| holds(&bytes, &format!("\"{content}\""))), "round {round}");
            let new = folder.path().join(format!("restored {round}"));
            let restored = restored(&dest, &new);
            assert_sound(&restored);
            let left: BTreeSet<String> = contents(&restored).into_iter().collect();
            for content in there.keys().filter(|content| !doomed.contains(*content)) {
                assert!(left.contains(content), "round {round}: {content:.20} is missing");
            }
            drop(restored);
            std::fs::remove_dir_all(&new).unwrap();
        }
        drop(stop_at_end);
    });
}

/// Lets the writer stop also when the test fails.
struct StopAtEnd<'s>(&'s AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What was decided goes along, as it was when the backup was made, and is not left behind by a restore that fails.
#[test]
fn blobs_are_backed_up_and_restored() {
    let folder = tempfile::tempdir().unwrap();
    let [dir, dest] = ["store", "dest"].map(|name| folder.path().join(name));
    let store = open(&dir);
    store.apply(&[note(10, "a note")], 0).unwrap();
    run(&dir, &dest);
    store.save_state("policy", b"decided").unwrap();
    run(&dir, &dest);
    store.save_state("policy", b"decided later").unwrap();
    let restored = restored(&dest, &folder.path().join("restored"));
    assert_eq!(restored.load_state("policy").unwrap().as_deref(), Some(&b"decided"[..]));
    let copy = dest.join(&Manifest::read(&dest).unwrap().log);
    flip(&copy, std::fs::metadata(&copy).unwrap().len() as usize - 40);
    let failed = folder.path().join("failed");
    let outcome = once_free(|| restore(&dest, &failed, false, &|_, _| {}));
    assert!(matches!(outcome, Err(StoreError::Damaged(_))), "{outcome:?}");
    assert_eq!(std::fs::read_dir(&failed).unwrap().count(), 0);
}
