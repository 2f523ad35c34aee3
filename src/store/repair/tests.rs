#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;
use crate::store::Removal;
use crate::store::compact::compact;
use crate::store::testing::{assert_sound, close, contents, flip, holds, log_of, note, once_free, open, sign};

const NOW: u64 = 100;

fn mend(dir: &Path) -> RepairReport {
    let wish = Wish { keep: false, now: NOW, progress: &|_, _, _| {} };
    let report = once_free(|| repair(dir, &Options::default(), &wish)).unwrap();
    assert_eq!(report.problems, [] as [&str; 0]);
    report
}

/// A store of notes, a profile with a former version, and an erased note; closed. What is visible, newest first.
fn sample(dir: &Path) -> Vec<Verified<Event>> {
    let store = open(dir);
    let deleted = note(5, "deleted");
    let visible: Vec<_> = [
        sign(2, 0, 20, &[], "profile"),
        sign(1, 1, 12, &[&["t", "a tag"], &["e", &deleted.id.to_hex()]], "third"),
        note(11, "second"),
        note(10, "first"),
    ]
    .into();
    let batch: Vec<_> =
        [&deleted, &visible[3], &sign(2, 0, 9, &[], "former profile"), &visible[2], &visible[1], &visible[0]]
            .map(Clone::clone)
            .into();
    store.apply(&batch, 0).unwrap();
    store.remove(&[deleted.id], Removal::Operator).unwrap();
    close(store);
    visible
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Where an event's record lies: offset, length.
fn record_of(log: &Log, id: &EventId) -> (u64, u64) {
    let mut reader = log.reader(HEADER_LEN);
    while let Some(step) = reader.next().unwrap() {
        if let Step::Record(offset, len, Record::Put(event)) = step
            && event.id == *id
        {
            return (offset, u64::from(len));
        }
    }
    panic!("event {id} is not in the log")
}

/// A flipped byte in any part of the log: reading goes on, verify names the event, repair keeps all others, and the
/// event itself where only what stands around its JSON was hit.
#[test]
fn a_flipped_byte_costs_at_most_its_event() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    let visible = sample(&good);
    let log = Log::open_read_only(&log_of(&good)).unwrap();
    let bytes = std::fs::read(log.path()).unwrap();
    /// Added to places that are counted from the beginning of the JSON.
    const IN_JSON: usize = 1_000_000;
    let places = [
        ("mark", 0, true),
        ("checksum", 5, true),
        ("length", 8, true),
        ("length, beyond all bounds", 11, true),
        ("type", 12, true),
        ("id in the header", 20, true),
        ("created_at in the header", 81, true),
        ("length of the tag section", 99, true),
        ("id in the JSON", IN_JSON + 20, true),
        ("author in the JSON", IN_JSON + 100, false),
        ("signature", IN_JSON + 300, false),
    ];
    for ((what, at, is_saved), hit) in places.into_iter().zip(visible[1..].iter().cycle()) {
        let (offset, len) = record_of(&log, &hit.id);
        let json = memchr::memmem::find(&bytes[offset as usize..][..len as usize], b"{\"id\"").unwrap();
        let at = offset as usize + if at < IN_JSON { at } else { json + at - IN_JSON };
        let dir = folder.path().join(what);
        copy_dir(&good, &dir);
        flip(&log_of(&dir), at);
        let store = open(&dir);
        assert_eq!(contents(&store).len(), 3, "{what}");
        let problems = verify(&store, &|_, _| {}).unwrap().problems.join("\n");
        assert!(problems.contains(&hit.id.to_hex()), "{what} of {}: {problems}", hit.id);
        drop(store);
        let report = mend(&dir);
        let lost: Vec<_> = report.lost.iter().flat_map(|stretch| stretch.events.clone()).collect();
        let id = vec![hit.id.to_hex()];
        assert_eq!((report.saved, lost), if is_saved { (id, vec![]) } else { (vec![], id) }, "{what}");
        let store = open(&dir);
        assert_sound(&store);
        let kept = visible.iter().filter(|event| is_saved || event.id != hit.id);
        assert_eq!(contents(&store), kept.map(|event| event.content.clone()).collect::<Vec<_>>(), "{what}");
    }
}

/// Whatever byte of the log is flipped: a look through it goes on to the end, misses one record at most, and if that
/// held an event, names it.
#[test]
fn every_flipped_byte_is_stepped_over() {
    let folder = tempfile::tempdir().unwrap();
    let visible = sample(folder.path());
    let path = log_of(folder.path());
    let log = Log::open_read_only(&path).unwrap();
    let places: Vec<_> = visible.iter().map(|event| (record_of(&log, &event.id), event.id.to_hex())).collect();
    let bytes = std::fs::read(&path).unwrap();
    let records = Scan::of(&log, &|_, _| {}).unwrap().records;
    for at in HEADER_LEN as usize..bytes.len() {
        flip(&path, at);
        let scan = Scan::of(&Log::open_read_only(&path).unwrap(), &|_, _| {}).unwrap();
        let named: Vec<_> = scan.named(&BTreeMap::new()).into_iter().flat_map(|stretch| stretch.events).collect();
        assert_eq!(scan.records + scan.found.len() as u64, records, "byte {at}");
        let hit = places.iter().find(|((offset, len), _)| (*offset..offset + len).contains(&(at as u64)));
        if let Some((_, id)) = hit.filter(|_| !scan.found.is_empty()) {
            assert!(named.contains(id), "byte {at}: {named:?}");
        }
        std::fs::write(&path, &bytes).unwrap();
    }
}

/// Damage in records of events that are gone costs nothing, and what was erased stays erased.
#[test]
fn damage_in_what_is_gone_costs_nothing_visible() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let visible = sample(&dir);
    let bytes = std::fs::read(log_of(&dir)).unwrap();
    flip(&log_of(&dir), HEADER_LEN as usize + 40); // the erased record
    let profile = memchr::memmem::find(&bytes, b"former profile").unwrap();
    flip(&log_of(&dir), profile);
    let report = mend(&dir);
    assert_eq!((report.saved.len(), report.lost.len()), (0, 1), "{report:?}");
    let store = open(&dir);
    assert_eq!(contents(&store), visible.iter().map(|event| event.content.clone()).collect::<Vec<_>>());
    assert!(!holds(&std::fs::read(log_of(&dir)).unwrap(), "deleted"));
}

/// Pages of zeros: everything outside of them is kept.
#[test]
fn a_page_of_zeros_costs_only_what_was_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let store = open(&dir);
    let notes: Vec<_> = (0..60).map(|n| note(n, &format!("note {n} {}", "x".repeat(300)))).collect();
    store.apply(&notes, 0).unwrap();
    close(store);
    let path = log_of(&dir);
    let log = Log::open_read_only(&path).unwrap();
    let places: Vec<_> = notes.iter().map(|note| record_of(&log, &note.id)).collect();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8192..12288].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let report = mend(&dir);
    let hit = |(offset, len): &(u64, u64)| *offset < 12288 && offset + len > 8192;
    let gone: Vec<String> =
        std::iter::zip(&notes, &places).filter(|(_, place)| hit(place)).map(|(note, _)| note.id.to_hex()).collect();
    let told: Vec<String> = report.lost.iter().flat_map(|stretch| stretch.events.clone()).collect();
    assert_eq!((report.events as usize, told.len()), (notes.len() - gone.len(), gone.len()));
    // The bytes of most are gone altogether: the index tells the second half of their ids.
    assert!(gone.iter().all(|id| told.iter().any(|told| id.ends_with(told.trim_start_matches('?')))), "{told:?}");
    assert_sound(&open(&dir));
}

/// The files around the log: what follows from the rest is written again, and what does not is refused.
#[test]
fn lost_heads_are_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    let visible = sample(&good);
    let expected: Vec<_> = visible.iter().map(|event| event.content.clone()).collect();
    let check = |name: &str, damage: &dyn Fn(&Path)| {
        let dir = folder.path().join(name);
        copy_dir(&good, &dir);
        damage(&dir);
        let report = mend(&dir);
        assert_eq!(contents(&open(&dir)), expected, "{name}");
        report
    };
    let report = check("no CURRENT", &|dir| std::fs::remove_file(dir.join("CURRENT")).unwrap());
    assert_eq!(report.current_mended.as_deref(), Some("gen-000001"));
    check("CURRENT of zeros", &|dir| std::fs::write(dir.join("CURRENT"), [0; 11]).unwrap());
    check("CURRENT of no text", &|dir| std::fs::write(dir.join("CURRENT"), [0xff; 11]).unwrap());
    for at in [0, 7, 10, 11, 20] {
        let report = check(&format!("header byte {at}"), &|dir| flip(&log_of(dir), at));
        assert_eq!(report.header_mended, at < 12, "byte {at}");
    }
    let report = check("index.meta", &|dir| flip(&dir.join("gen-000001/index.meta"), 3));
    assert!(report.index_rebuilt.is_some());
    check("no index", &|dir| std::fs::remove_dir_all(dir.join("gen-000001/index")).unwrap());

    let dir = folder.path().join("refused");
    copy_dir(&good, &dir);
    flip(&log_of(&dir), 8);
    let wish = Wish { keep: false, now: NOW, progress: &|_, _, _| {} };
    let refused = || once_free(|| repair(&dir, &Options::default(), &wish)).unwrap_err().to_string();
    assert!(refused().contains("log format 17"));
    flip(&log_of(&dir), 8);
    std::fs::remove_file(dir.join("CURRENT")).unwrap();
    assert!(
        once_free(|| EmbeddedStore::open(&dir, &Options::default()))
            .err()
            .unwrap()
            .to_string()
            .contains("sledge repair")
    );
    copy_dir(&dir.join("gen-000001"), &dir.join("gen-000002"));
    assert!(refused().contains("several generations"));
    let text = dir.join("gen-000001/events.log");
    std::fs::remove_dir_all(dir.join("gen-000002")).unwrap();
    std::fs::write(&text, "no log at all, but a text of more than 32 bytes").unwrap();
    assert!(refused().contains("holds no record"));
    assert!(holds(&std::fs::read(&text).unwrap(), "a text of more"));
}

/// A sound store is left alone; a survey changes nothing; a kept log is the damaged one.
#[test]
fn nothing_is_done_without_need() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let visible = sample(&dir);
    let log = std::fs::read(log_of(&dir)).unwrap();
    let report = mend(&dir);
    assert!(report.rewritten.is_none() && report.index_rebuilt.is_none() && report.lost.is_empty(), "{report:?}");
    assert_eq!(std::fs::read(log_of(&dir)).unwrap(), log);
    let at = memchr::memmem::find(&log, b"second").unwrap();
    flip(&log_of(&dir), at);
    let damaged = std::fs::read(log_of(&dir)).unwrap();
    let survey = once_free(|| survey(&dir, &|_, _| {})).unwrap();
    assert_eq!(survey.damaged.len(), 1);
    assert_eq!((&survey.damaged[0].events[..], survey.whole.len()), (&[visible[2].id.to_hex()][..], 0));
    assert_eq!(std::fs::read(log_of(&dir)).unwrap(), damaged);
    let wish = Wish { keep: true, now: NOW, progress: &|_, _, _| {} };
    let report = once_free(|| repair(&dir, &Options::default(), &wish)).unwrap();
    assert_eq!(std::fs::read(report.kept.unwrap()).unwrap(), damaged);
    assert_ne!(std::fs::read(log_of(&dir)).unwrap(), damaged);
    assert_sound(&open(&dir));
}

/// A removal that was lost leaves two versions at one address: verify says so, repair keeps the newer.
#[test]
fn a_lost_removal_is_made_up_for() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let store = open(&dir);
    store.apply(&[sign(2, 0, 1, &[], "former"), sign(2, 0, 2, &[], "present")], 0).unwrap();
    store.apply(&[note(3, "later")], 0).unwrap();
    drop(store);
    let log = Log::open(&log_of(&dir)).unwrap();
    let mut reader = log.reader(HEADER_LEN);
    let mut removal = None;
    while let Some(step) = reader.next().unwrap() {
        if let Step::Record(offset, _, Record::Remove(_)) = step {
            removal = Some(offset);
        }
    }
    flip(&log_of(&dir), removal.unwrap() as usize + 20);
    let store = open(&dir);
    assert!(!verify(&store, &|_, _| {}).unwrap().problems.is_empty());
    drop(store);
    assert_eq!(mend(&dir).replaced_again, 1);
    assert_eq!(contents(&open(&dir)), ["later", "present"]);
}

/// A packed log: either dictionary may be lost, a packed event is saved where its body is whole, and named where not.
#[test]
fn packed_events_are_saved_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = folder.path().join("good");
    let store = open(&good);
    let notes: Vec<_> = (0..1_100).map(|n| note(n, &format!("an entry about the weather of day {n}"))).collect();
    store.apply(&notes, 0).unwrap();
    compact(&store, &Pace::flat_out(&|_, _| {})).unwrap();
    close(store);
    let log = Log::open_read_only(&log_of(&good)).unwrap();
    let dictionary = record_len(log.dictionary().unwrap().len());
    let (offset, len) = record_of(&log, &notes[500].id);
    let (offset, len) = (offset as usize, len as usize);
    for (what, at, saved, lost) in [
        ("first dictionary", HEADER_LEN as usize + 100, 0, 0),
        ("second dictionary", HEADER_LEN as usize + dictionary + 100, 0, 0),
        ("checksum", offset + 5, 1, 0),
        ("id", offset + 20, 1, 0),
        ("signature", offset + 110, 0, 1),
        ("body", offset + len - 12, 0, 1),
    ] {
        let dir = folder.path().join(what);
        copy_dir(&good, &dir);
        flip(&log_of(&dir), at);
        let report = mend(&dir);
        assert_eq!((report.saved.len(), report.lost.len()), (saved, lost), "{what}: {report:?}");
        assert!(report.lost.iter().all(|stretch| stretch.events == [notes[500].id.to_hex()]), "{what}");
        assert_eq!(report.events, 1_100 - lost as u64, "{what}");
        assert!(report.rewritten.is_some(), "{what}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
