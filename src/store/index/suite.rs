//! One suite for every engine: plain functions, run on each.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::{Change, Engine, Index, IndexError, Key, Value};

pub(super) const CACHE_BYTES: u64 = 16 << 20;
/// Ample for a sound index of these sizes on a busy machine.
pub(super) const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// More than any engine writes without looking at its stop signal.
const LONG_RUN_ENTRIES: usize = 40_000;
/// Above every key of this suite.
const END: &[u8] = &[0xff; 31];

macro_rules! on_each_engine {
    ($($check:ident,)*) => {
        mod on_sled {
            $(#[test] fn $check() { super::$check(super::Engine::Sled) })*
        }
        mod on_fjall {
            $(#[test] fn $check() { super::$check(super::Engine::Fjall) })*
        }
    };
}

on_each_engine! {
    what_is_written_is_there_after_reopening,
    scan_stops_at_its_bound_and_limit,
    removing_a_stretch_under_readers,
    a_stopped_run_can_be_written_again,
    an_empty_run_is_written,
    damaged_files_never_give_a_wrong_answer,
}

fn open(engine: Engine, dir: &Path) -> Arc<dyn Index> {
    engine.open(dir, CACHE_BYTES, OPEN_TIMEOUT).unwrap()
}

pub(super) fn write(index: &dyn Index, run: impl IntoIterator<Item = Change>) {
    assert!(index.write_run(&mut run.into_iter(), &|| false).unwrap());
}

pub(super) fn scan(index: &dyn Index, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Key, Value)>, IndexError> {
    let mut out = vec![];
    index.scan(from, to, limit, &mut out)?;
    Ok(out)
}

pub(super) fn rng(seed: u8) -> TestRng {
    TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32])
}

/// Sorted changes with keys of 28 random bytes.
pub(super) fn random_run(rng: &mut TestRng, entries: usize) -> BTreeMap<Key, Option<Value>> {
    let key = |rng: &mut TestRng| {
        let mut bytes = [0; 28];
        rng.fill_bytes(&mut bytes);
        Key::new(&bytes)
    };
    (0..entries).map(|n| (key(rng), Some(Value::new(&(n as u32).to_be_bytes())))).collect()
}

/// Written, replaced and removed entries, read back before and after opening again.
fn what_is_written_is_there_after_reopening(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let mut oracle = BTreeMap::new();
    for seed in 0..3 {
        let index = open(engine, dir.path());
        let mut run = random_run(&mut rng(seed), 3_000);
        let replaced = oracle.keys().skip(1).step_by(3).map(|key| (*key, Some(Value::new(&[seed]))));
        let removed = oracle.keys().step_by(3).map(|key| (*key, None));
        run.extend(replaced.chain(removed).collect::<Vec<_>>());
        write(&*index, run.clone());
        oracle.extend(run);
        let gone = oracle.iter().find(|(_, value)| value.is_none()).map(|(key, _)| *key);
        oracle.retain(|_, value: &mut Option<Value>| value.is_some());

        let expected: Vec<_> = oracle.iter().map(|(key, value)| (*key, value.unwrap())).collect();
        assert_eq!(scan(&*index, &[], END, usize::MAX).unwrap(), expected);
        let (key, value) = expected[expected.len() / 2];
        assert_eq!(index.get(&key).unwrap(), Some(value));
        assert_eq!(index.get(b"nothing").unwrap(), None);
        assert!(gone.is_none_or(|key| index.get(&key).unwrap().is_none()));
        assert!(index.bytes_on_disk() > 0);
    }
}

/// The upper bound and the limit hold, in the middle of a leaf and beyond the last one.
fn scan_stops_at_its_bound_and_limit(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let index = open(engine, dir.path());
    write(&*index, (0..1_000u16).map(|n| (Key::new(&n.to_be_bytes()), Some(Value::new(&[])))));
    let numbers = |from: u16, to: u16, limit| {
        let entries = scan(&*index, &from.to_be_bytes(), &to.to_be_bytes(), limit).unwrap();
        entries.iter().map(|(key, _)| u16::from_be_bytes([key[0], key[1]])).collect::<Vec<_>>()
    };
    assert_eq!(numbers(500, 503, 10), [500, 501, 502]);
    assert_eq!(numbers(500, 700, 2), [500, 501]);
    assert_eq!(numbers(998, 2_000, 10), [998, 999]);
    assert_eq!(numbers(500, 500, 10), [0u16; 0]);
    assert_eq!(numbers(700, 500, 10), [0u16; 0]);
    assert_eq!(numbers(500, 700, 0), [0u16; 0]);
}

/// Removing a stretch of entries empties whole leaves and tables, which are then merged away; readers
/// on both sides of the stretch miss nothing meanwhile.
fn removing_a_stretch_under_readers(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let index = open(engine, dir.path());
    let change = |n: u16, value| (Key::new(&n.to_be_bytes()), value);
    let value = Some(Value::new(&[1]));
    write(&*index, (0..6_000).map(|n| change(n, value)));
    let numbers = |index: &dyn Index| {
        let entries = scan(index, &[], END, usize::MAX).unwrap();
        let number = |(key, _): &(Key, Value)| u16::from_be_bytes([key[0], key[1]]);
        entries.iter().map(number).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let removing = scope.spawn(|| write(&*index, (1_000..5_000).map(|n| change(n, None))));
        while !removing.is_finished() {
            let seen = numbers(&*index);
            assert!(seen.iter().copied().filter(|n| !(1_000..5_000).contains(n)).eq((0..1_000).chain(5_000..6_000)));
        }
    });
    drop(index);
    assert!(numbers(&*open(engine, dir.path())).into_iter().eq((0..1_000).chain(5_000..6_000)));
}

/// A stopped run says so; written again it is complete.
fn a_stopped_run_can_be_written_again(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let index = open(engine, dir.path());
    let run = random_run(&mut rng(3), LONG_RUN_ENTRIES);
    assert!(!index.write_run(&mut run.clone().into_iter(), &|| true).unwrap());
    write(&*index, run.clone());
    assert_eq!(scan(&*index, &[], END, usize::MAX).unwrap().len(), run.len());
}

/// A run of nothing changes nothing, also as the very first one.
fn an_empty_run_is_written(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    write(&*open(engine, dir.path()), []);
    let index = open(engine, dir.path());
    write(&*index, random_run(&mut rng(1), 10));
    write(&*index, []);
    assert_eq!(scan(&*index, &[], END, usize::MAX).unwrap().len(), 10);
}

/// Every file of the database that has content, in a fixed order.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if fs::metadata(&path).unwrap().len() > 0 {
            found.push(path);
        }
    }
    found.sort();
    found
}

pub(super) fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&file, target).unwrap();
    }
}

fn damage(bytes: &mut Vec<u8>, kind: u64, rng: &mut TestRng) {
    let at = (rng.next_u64() % bytes.len() as u64) as usize;
    match kind {
        0 => bytes[at] ^= 1 << (rng.next_u32() % 8),
        1 => bytes.truncate(at),
        _ => {
            let end = (at + 4_096).min(bytes.len());
            bytes[at..end].fill(0);
        }
    }
}

/// Each file in turn with a flipped bit, cut short, and with a zeroed page. The index must
/// refuse to open, fail on reading, or answer exactly what was written: never an incomplete
/// answer, a panic, or a wait beyond the time limit.
fn damaged_files_never_give_a_wrong_answer(engine: Engine) {
    let sound = tempfile::tempdir().unwrap();
    let run = random_run(&mut rng(4), 2_000);
    let index = open(engine, sound.path());
    write(&*index, run.clone());
    // Copied while open, as a crash would leave it: sled's metadata log is not compacted yet.
    let crashed = tempfile::tempdir().unwrap();
    copy(sound.path(), crashed.path());
    drop(index);

    let expected: Vec<_> = run.iter().map(|(key, value)| (*key, value.unwrap())).collect();
    let mut rng = rng(5);
    // A hang costs this much, and a sound index that is slow for once is only one case less.
    let timeout = Duration::from_secs(2);
    let rounds = if engine == Engine::Sled { 1 } else { 40 };
    let read_all = |dir: &Path, timeout| scan(&*engine.open(dir, CACHE_BYTES, timeout)?, &[], END, usize::MAX);
    for origin in [sound.path(), crashed.path()] {
        let dir = tempfile::tempdir().unwrap();
        copy(origin, dir.path());
        assert_eq!(read_all(dir.path(), OPEN_TIMEOUT).unwrap(), expected, "the copy itself is sound");
        let cases =
            files(origin).into_iter().flat_map(|file| (0..3 * rounds).map(move |kind| (file.clone(), kind % 3)));
        for (file, kind) in cases {
            let dir = tempfile::tempdir().unwrap();
            copy(origin, dir.path());
            let mut bytes = fs::read(&file).unwrap();
            damage(&mut bytes, kind, &mut rng);
            fs::write(dir.path().join(file.strip_prefix(origin).unwrap()), bytes).unwrap();
            if let Ok(entries) = read_all(dir.path(), timeout) {
                assert_eq!(entries, expected, "{} damaged by {kind}", file.display());
            }
        }
    }
}
