//! Stores written by earlier versions open, with all they hold. One folder a log format and index schema that ever
//! landed: the log, and what it says of the index; the index itself is rebuilt where the schema is another one.
//!
//! `SLEDGE_WRITE_FIXTURE=1 cargo test --test it upgrade` writes the folder of the present schema, once, when it lands.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use sledge::protocol::Event;
use sledge::protocol::supersede::Verdict;
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::fault::REBUILD_POINTS;
use sledge::store::log::FORMAT_VERSION;
use sledge::store::schema::SCHEMA_VERSION;
use sledge::store::verify::verify;
use sledge::store::{Store, StoreError};

use crate::support::binary::Binary;
use crate::support::stores::{all, generations, open_store, query, read, row_ids};
use crate::support::{Keys, NOW, Reference, ids, verified};

const WRITE: &str = "SLEDGE_WRITE_FIXTURE";
const GENERATION: &str = "gen-000001";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures/stores")
}

fn present() -> String {
    format!("log-{FORMAT_VERSION}-schema-{SCHEMA_VERSION}")
}

/// What every fixture was made of: something of each kind of record and of each tree of the index.
fn history() -> Vec<Event> {
    let (alice, bob) = (Keys::new(1), Keys::new(2));
    let gone = alice.note(NOW, "deleted by its author");
    vec![
        alice.draft(0, NOW).content("former").sign(),
        alice.draft(0, NOW + 1).content("present").sign(),
        alice.draft(30_023, NOW).tag(["d", "a:b"]).tag(["t", "x"]).sign(),
        bob.draft(1, NOW + 2).tag(["expiration", "4000000000"]).tag(["p", &alice.hex()]).sign(),
        alice.deletion(NOW + 3, &[("e", &gone.id.to_hex()), ("a", &alice.address(30_024, "x"))]),
        bob.draft(1059, NOW + 4).tag(["p", &Keys::new(3).hex()]).sign(),
        Keys::new(3).draft(62, NOW + 5).tag(["relay", "ALL_RELAYS"]).sign(),
    ]
}

fn expected() -> Vec<String> {
    let mut reference = Reference::new();
    history().iter().for_each(|event| {
        reference.apply(event, NOW);
    });
    ids(reference.visible(NOW))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { fs::copy(&path, &target).map(drop).unwrap() }
    }
}

fn write_fixture() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(folder.path());
    let events: Vec<_> = history().iter().map(verified).collect();
    store.apply(&events, NOW).unwrap();
    store.merge_index().unwrap();
    drop(store);
    let fixture = fixtures().join(present());
    fs::create_dir_all(fixture.join(GENERATION)).unwrap();
    for name in ["CURRENT".into(), format!("{GENERATION}/events.log"), format!("{GENERATION}/index.meta")] {
        fs::copy(folder.path().join(&name), fixture.join(&name)).unwrap();
    }
}

/// Each opens in a copy, sound, with the events it was made of; what was deleted or has vanished stays away.
#[test]
fn stores_of_every_version_open() {
    if std::env::var_os(WRITE).is_some() {
        write_fixture();
    }
    let names: Vec<_> = fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().any(|name| *name == *present()), "there is no fixture of {}", present());
    for name in names {
        let folder = tempfile::tempdir().unwrap();
        copy(&fixtures().join(&name), folder.path());
        let store = open_store(folder.path());
        assert_eq!(verify(&store, &|_, _| {}).unwrap().problems, [] as [&str; 0], "{name:?}");
        let (rows, _) = read(&store, query(&[all(Default::default())], NOW), usize::MAX);
        assert_eq!(row_ids(&rows), expected(), "{name:?}");
        let gone = verified(&Keys::new(1).note(NOW, "deleted by its author"));
        let vanished = verified(&Keys::new(3).note(NOW, "too late"));
        assert_eq!(store.apply(&[gone, vanished], NOW).unwrap().verdicts, [Verdict::Deleted, Verdict::Vanished]);
    }
}

/// A log of a newer format is refused by its number and left alone.
#[test]
fn a_newer_log_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixtures().join(present()), folder.path());
    let log = folder.path().join(GENERATION).join("events.log");
    let mut bytes = fs::read(&log).unwrap();
    bytes[8..12].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
    fs::write(&log, &bytes).unwrap();
    let error = match EmbeddedStore::open(folder.path(), &Options::default()) {
        Err(error @ StoreError::Damaged(_)) => error.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("opened a log of a newer format"),
    };
    assert!(error.contains(&format!("log format {}", FORMAT_VERSION + 1)), "{error}");
    assert_eq!(fs::read(&log).unwrap(), bytes);
}

/// Makes the index look as if a version of sledge had written it whose schema came before the first.
fn make_index_old(data: &Path) {
    let meta = generations(data)[0].join("index.meta");
    let mut bytes = fs::read(&meta).unwrap();
    bytes.truncate(bytes.len() - 4);
    assert_eq!(u32::from(bytes[0]), SCHEMA_VERSION, "the version comes first");
    bytes[0] = 0;
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    fs::write(&meta, bytes).unwrap();
}

/// The events of a relay's life with replacements and deletions, and more of them than one run of the index holds.
fn busy_history() -> Vec<Event> {
    let authors = [1, 2, 3].map(Keys::new);
    let mut events = Vec::new();
    for n in 0..150 {
        let author = &authors[n % 3];
        let now = NOW + n as u64;
        events.push(author.draft(1, now).tag(["t", "x"]).content(n.to_string()).sign());
        match n % 5 {
            0 => events.push(author.draft(0, now).content(n.to_string()).sign()),
            1 => events.push(author.draft(30_023, now).tag(["d", "a"]).sign()),
            2 => events.push(author.deletion(now, &[("e", &events[events.len() / 2].id.to_hex())])),
            _ => {}
        }
    }
    events
}

/// A process that ends while it builds the index again, for a newer schema or another engine, leaves a store that the
/// next start brings to its end: at each step of the rebuilding, early and late.
#[test]
fn dying_in_the_middle_of_a_rebuild_is_no_loss() {
    let binary = Binary::new();
    let settings = |engine| format!("[storage]\nindex = \"{engine}\"\nindex_run_entries_max = 300\n");
    binary.configure(&settings("sled"));
    binary.import(&busy_history());
    let expected = binary.export();
    assert!(expected.len() > 100);
    let mut engines = ["fjall", "sled"].into_iter().cycle();
    let merging = ["meta.bloom_saved", "meta.written", "file.written", "file.renamed"];
    for point in REBUILD_POINTS.iter().copied().chain(merging) {
        for times in [1, 40, 180] {
            // In turn an index of an older schema, and one of the other engine.
            if times == 1 {
                make_index_old(binary.data());
            } else {
                binary.configure(&settings(engines.next().expect("it is endless")));
            }
            let fault = format!("{point}:{times}");
            let mut command = binary.command(&["count", "{}"]);
            command.env("SLEDGE_FAULT", &fault).stdout(Stdio::null()).stderr(Stdio::null());
            let ended = command.status().unwrap();
            if times > 1 && ended.success() {
                break; // passed less often
            }
            const ABORTED: i32 = 6;
            assert_eq!(ended.signal(), Some(ABORTED), "{fault} was not reached");
            assert_eq!(binary.export(), expected, "{fault}");
            let verified = binary.run(&["verify"]);
            assert_eq!(verified.code, Some(0), "{fault}: index and log differ: {verified:?}");
        }
    }
}
