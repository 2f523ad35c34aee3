//! The command line through the binary: what it prints where, and how it ends.

use std::io::Write;
use std::process::{Command, Stdio};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sledge::protocol::Event;

use crate::support::binary::{Binary, id_of, lines};
use crate::support::stores::{generations, in_order};
use crate::support::{Client, Keys, NOW, ids, json_of};

/// Of three kinds that nothing replaces, two a second.
fn notes(count: u64) -> Vec<Event> {
    let kind = |n: u64| [1, 2, 7][n as usize % 3];
    (0..count).map(|n| Keys::new(n % 2).draft(kind(n), NOW + n / 2).content(n.to_string()).sign()).collect()
}

fn stored(events: &[Event]) -> Binary {
    let binary = Binary::new();
    binary.import(events);
    binary
}

fn line_ids(output: &str) -> Vec<String> {
    output.lines().map(id_of).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Wrong arguments end with 2 and say so on stderr; asking for help is no mistake.
#[test]
fn usage_errors_end_with_2() {
    let binary = Binary::new();
    for args in [
        &["no-such-command"] as &[&str],
        &["import"],
        &["query"],
        &["query", "{\"kinds\":[\"1\"]}"],
        &["query", "not json"],
        &["count", "{\"search\":\"x\"}"],
        &["export", "--filter", "[]"],
        &["export", "--since", "yesterday-ish"],
        &["delete"],
        &["serve", "--listen", "nowhere"],
        &["status", "--no-such-flag"],
    ] {
        let stderr = binary.run(args).fails(2);
        assert!(!stderr.trim().is_empty(), "{args:?}");
    }
    for args in [&["--help"] as &[&str], &["import", "--help"], &["--version"]] {
        assert!(binary.run(args).ok().contains("sledge"), "{args:?}");
    }
}

/// A mistake in the settings names file, line and key.
#[test]
fn a_mistake_in_the_settings_is_found_at_once() {
    let binary = Binary::new();
    for (toml, key) in
        [("\n[limits]\nno_such_key = 1\n", "no_such_key"), ("\n[limits]\nlimit_max = \"many\"\n", "limit_max")]
    {
        binary.configure(toml);
        let stderr = binary.run(&["status"]).fails(2);
        assert!(stderr.contains("sync.toml:3") && stderr.contains(key), "{stderr}");
    }
}

/// What does not exist, or is no store, ends with 1 and is named.
#[test]
fn failures_end_with_1_and_name_the_thing() {
    let binary = Binary::new();
    let stderr = binary.run(&["import", "no-such-file.jsonl"]).fails(1);
    assert!(stderr.contains("no-such-file.jsonl"), "{stderr}");
    let file = binary.file("a-file", "");
    let run = Command::new(env!("CARGO_BIN_EXE_sledge"))
        .args(["--store", &file, "import", "-"])
        .stdin(Stdio::null())
        .output();
    let run = run.unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&run.stderr).contains("a-file"));
}

/// Plain, compressed and compressed under a wrong name: what counts are the first bytes.
#[test]
fn import_knows_gzip_by_its_first_bytes() {
    let notes = notes(20);
    let text = lines(&notes);
    let packed = gzip(text.as_bytes());
    let two_members = [gzip(&text.as_bytes()[..1_000]), gzip(&text.as_bytes()[1_000..])].concat();
    let mut expected = ids(&notes);
    expected.sort();
    for (name, bytes) in [
        ("a.jsonl", text.as_bytes()),
        ("a.gz", &packed),
        ("b.jsonl", &packed),
        ("c.gz", &two_members),
        ("d.gz", text.as_bytes()),
    ] {
        let binary = Binary::new();
        let file = binary.file(name, bytes);
        binary.run(&["import", &file]).ok();
        assert_eq!(binary.exported_ids(), expected, "{name}");
    }
    let binary = Binary::new();
    binary.run_with(&["import", "-"], &packed).ok();
    assert_eq!(binary.exported_ids(), expected, "compressed standard input");
}

/// A compressed file that breaks off is an error, and what came before the break is kept.
#[test]
fn import_of_a_broken_gzip_says_so() {
    let notes = notes(2_000);
    let packed = gzip(lines(&notes).as_bytes());
    let binary = Binary::new();
    let file = binary.file("half.gz", &packed[..packed.len() / 2]);
    let stderr = binary.run(&["import", &file]).fails(1);
    assert!(stderr.contains("half.gz"), "{stderr}");
    let known = ids(&notes);
    assert!(binary.exported_ids().iter().all(|id| known.contains(id)));
    binary.run(&["verify"]).ok();
}

/// Bad lines are named with their numbers and the run goes on; empty lines and CRLF are no mistakes.
#[test]
fn import_names_bad_lines_and_goes_on() {
    let notes = notes(4);
    let mut forged = Keys::new(1).note(NOW, "forged");
    forged.content.push('!');
    let input = format!(
        "{}\nnot json\n\n{}\r\n{}\n{{}}\n{}\n{}",
        json_of(&notes[0]),
        json_of(&notes[1]),
        json_of(&forged),
        json_of(&notes[2]),
        json_of(&notes[3])
    );
    let binary = Binary::new();
    let ran = binary.run_with(&["import", "-"], input.as_bytes());
    for number in ["2", "5", "6"] {
        let named =
            |line: &str| line.contains("line") && line.split(|c: char| !c.is_ascii_digit()).any(|word| word == number);
        assert!(ran.stderr.lines().any(named), "line {number} is not named:\n{}", ran.stderr);
    }
    for number in ["3", "4", "7", "8"] {
        let blamed = ran.stderr.lines().any(|line| line.contains(&format!("line {number}:")));
        assert!(!blamed, "line {number} is blamed:\n{}", ran.stderr);
    }
    let mut expected = ids(&notes);
    expected.sort();
    assert_eq!(binary.exported_ids(), expected);
}

/// Bytes that are no text are a bad line like any other.
#[test]
fn import_survives_bytes_that_are_no_text() {
    let notes = notes(2);
    let input = [json_of(&notes[0]).as_bytes(), b"\n\xff\xfe\x00\n", json_of(&notes[1]).as_bytes(), b"\n"].concat();
    let binary = Binary::new();
    let ran = binary.run_with(&["import", "-"], &input);
    assert!(ran.stderr.lines().any(|line| line.contains("line 2")), "{}", ran.stderr);
    assert_eq!(binary.exported_ids().len(), 2);
}

/// The second import of the same file adds nothing, and the store is the same byte for byte.
#[test]
fn import_is_idempotent() {
    let mut notes = notes(50);
    let keys = Keys::new(0);
    notes.extend([NOW, NOW + 1].map(|at| keys.draft(0, at).sign()));
    notes.push(keys.deletion(NOW, &[("e", &notes[0].id.to_hex())]));
    let binary = stored(&notes);
    let first = binary.export();
    assert_eq!(first.len(), 51);
    let log = generations(binary.data())[0].join("events.log");
    let bytes = std::fs::read(&log).unwrap();
    binary.import(&notes);
    assert_eq!(binary.export(), first);
    assert_eq!(std::fs::read(&log).unwrap(), bytes, "the second import wrote something");
}

/// Newest first, oldest first, and only what was asked for.
#[test]
fn export_selects_and_orders() {
    let notes = notes(30);
    let binary = stored(&notes);
    let newest = in_order(&notes);
    let export = |args: &[&str]| line_ids(&binary.run(&[&["export"], args].concat()).ok());
    let oldest: Vec<String> = newest.iter().rev().cloned().collect();
    assert_eq!(export(&[]), newest);
    let reversed = export(&["--reverse"]);
    let times = |ids: &[String]| {
        ids.iter().map(|id| notes.iter().find(|n| n.id.to_hex() == *id).unwrap().created_at).collect::<Vec<_>>()
    };
    assert_eq!(times(&reversed), times(&oldest));
    let (since, until) = ((NOW + 3).to_string(), (NOW + 7).to_string());
    let within = |event: &&Event| (NOW + 3..=NOW + 7).contains(&event.created_at);
    assert_eq!(export(&["--since", &since, "--until", &until]), in_order(notes.iter().filter(within)));
    let kind = |event: &&Event| event.kind.0 == 2;
    assert_eq!(export(&["--filter", "{\"kinds\":[2]}"]), in_order(notes.iter().filter(kind)));
    assert_eq!(export(&["--filter", "{\"kinds\":[2],\"limit\":3}"]), in_order(notes.iter().filter(kind))[..3]);
    assert_eq!(export(&["--filter", "{\"kinds\":[]}"]), ids([]));
}

/// What export writes is what import reads: the copy exports the same bytes.
#[test]
fn export_into_import_is_a_copy() {
    let keys = Keys::new(1);
    let mut events = notes(20);
    events.push(keys.draft(30_023, NOW).tag(["d", "ü\u{2028}"]).content("\u{0}\"\\\n").sign());
    let original = stored(&events);
    let copy = Binary::new();
    let exported = original.run(&["export", "--reverse"]).ok();
    copy.run_with(&["import", "-"], exported.as_bytes()).ok();
    assert_eq!(copy.export(), original.export());
    assert_eq!(copy.run(&["export", "--reverse"]).ok(), exported);
}

/// A reader that has seen enough is no failure of the export.
#[test]
fn export_into_a_closed_pipe_is_no_failure() {
    let binary = stored(&notes(2_000));
    let mut command = binary.command(&["export"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
}

/// `query` prints what a REQ gives, `count` how many there are.
#[test]
fn query_and_count() {
    let notes = notes(30);
    let binary = stored(&notes);
    let newest = in_order(&notes);
    let query = |filters: &[&str]| line_ids(&binary.run(&[&["query"], filters].concat()).ok());
    assert_eq!(query(&["{\"limit\":5}"]), newest[..5]);
    assert_eq!(query(&["{\"limit\":5}", "{\"limit\":2}"]), newest[..5]);
    assert_eq!(query(&[&json!({"ids": [newest[7]]}).to_string()]), newest[7..8]);
    assert_eq!(query(&["{\"kinds\":[9]}"]), ids([]));
    let count = |filters: &[&str]| binary.run(&[&["count"], filters].concat()).ok().trim().to_owned();
    assert_eq!(count(&["{}"]), "30");
    assert_eq!(count(&["{\"kinds\":[1]}", "{\"kinds\":[1,2]}"]), "20");
    assert_eq!(count(&["{\"limit\":1}"]), "30");
}

/// A dry run says how many and deletes none; the real one deletes those and no others.
#[test]
fn delete_and_its_dry_run() {
    let notes = notes(30);
    let binary = stored(&notes);
    let said = binary.run(&["delete", "{\"kinds\":[2]}", "--dry-run"]).ok();
    assert!(said.contains("10"), "{said}");
    assert_eq!(binary.exported_ids().len(), 30);
    let said = binary.run(&["delete", "{\"kinds\":[2]}"]).ok();
    assert!(said.contains("10"), "{said}");
    let mut expected = ids(notes.iter().filter(|note| note.kind.0 != 2));
    expected.sort();
    assert_eq!(binary.exported_ids(), expected);
    binary.run(&["verify"]).ok();
    binary.import(&notes);
    assert_eq!(binary.exported_ids().len(), 30, "what the operator deleted may come back");
}

/// `status --json` is one object that scripts can read; its number of events is right at every stage.
#[test]
fn status_tells_the_number_of_events() {
    let notes = notes(30);
    let binary = stored(&notes);
    let status = || serde_json::from_str::<Value>(&binary.run(&["status", "--json"]).ok()).unwrap();
    assert_eq!(status()["events"], 30);
    binary.run(&["delete", "{\"kinds\":[2]}"]).ok();
    let before = status();
    assert_eq!(before["events"], 20);
    assert!(before["dead_bytes"].as_u64().unwrap() > 0, "{before}");
    binary.run(&["compact"]).ok();
    let after = status();
    assert_eq!(after["events"], 20);
    assert_eq!(after["dead_bytes"], 0);
    assert!(after["log_bytes"].as_u64() < before["log_bytes"].as_u64());
    assert!(binary.run(&["status"]).ok().contains("20"));
}

/// `verify` finds a single changed byte in an event, and the rest of the store can still be read.
#[test]
fn verify_finds_a_changed_byte() {
    let notes: Vec<Event> = (0..20).map(|n| Keys::new(1).note(NOW + n, &format!("words of note {n:02}."))).collect();
    let binary = stored(&notes);
    binary.run(&["verify"]).ok();
    let log = generations(binary.data())[0].join("events.log");
    let mut bytes = std::fs::read(&log).unwrap();
    let at = memchr::memmem::find(&bytes, b"words of note 07.").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&log, &bytes).unwrap();
    let ran = binary.run(&["verify"]);
    assert_eq!(ran.code, Some(1), "{}\n{}", ran.stdout, ran.stderr);
    let mut expected = ids(notes.iter().filter(|note| note.created_at != NOW + 7));
    expected.sort();
    assert_eq!(binary.exported_ids(), expected);
}

/// Commands that only look do not make a store where there is none, or say clearly that there is none.
#[test]
fn looking_makes_nothing_up() {
    let binary = Binary::new();
    for args in [&["export"] as &[&str], &["query", "{}"]] {
        let ran = binary.run(args);
        assert!(ran.code == Some(0) || ran.code == Some(1), "{ran:?}");
        assert_eq!(ran.stdout, "", "{args:?}");
    }
}

/// While `serve` has the directory, an import reaches the running relay or says what to do; nothing is lost or torn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn import_beside_a_running_relay() {
    let binary = Binary::new();
    let before = Keys::new(1).note(NOW, "published");
    let notes = notes(20);
    let serving = binary.serve();
    let mut client = Client::connect(serving.addr()).await;
    client.store(&before).await;
    let ran = tokio::task::block_in_place(|| binary.run_with(&["import", "-"], lines(&notes).as_bytes()));
    match ran.code {
        Some(0) => {
            let mut found = client.query_ids(json!({"limit": 100})).await;
            let mut expected = ids(notes.iter().chain([&before]));
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "the running relay has what was imported");
        }
        Some(1) => {
            assert!(ran.stderr.contains("in use") && ran.stderr.contains(&serving.addr().to_string()), "{}", ran.stderr)
        }
        _ => panic!("{ran:?}"),
    }
    client.store(&Keys::new(1).note(NOW, "and it goes on")).await;
}

/// Two relays on one directory: the second one says who has it.
#[test]
fn one_process_owns_the_directory() {
    let binary = Binary::new();
    let serving = binary.serve();
    let ran = binary.run(&["serve", "--listen", "127.0.0.1:0"]);
    let stderr = ran.fails(1);
    assert!(stderr.contains("in use"), "{stderr}");
    let stderr = binary.run(&["verify"]).fails(1);
    assert!(stderr.contains("in use"), "{stderr}");
    drop(serving);
    binary.run(&["verify"]).ok();
}

/// A generated key can be shown in all its spellings, whichever of them is given; a key file is private and is never
/// overwritten.
#[test]
fn keys_are_made_and_shown() {
    let binary = Binary::new();
    let made: Value = serde_json::from_str(&binary.run(&["key", "generate", "--json"]).ok()).unwrap();
    let spelled = |name: &str| made[name].as_str().unwrap().to_owned();
    assert!(spelled("npub").starts_with("npub1") && spelled("nsec").starts_with("nsec1"), "{made}");
    for (key, args) in [(spelled("nsec"), &[] as &[&str]), (spelled("secret_hex"), &["--secret"])] {
        let shown = binary.run_with(&[&["key", "show", "--json"], args].concat(), key.as_bytes()).ok();
        assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), made);
    }
    for key in [spelled("npub"), spelled("public_hex")] {
        let shown: Value = serde_json::from_str(&binary.run(&["key", "show", &key, "--json"]).ok()).unwrap();
        assert_eq!(shown, json!({"npub": made["npub"], "public_hex": made["public_hex"]}));
    }
    binary.run(&["key", "show", "npub1broken"]).fails(2);
    let printed = binary.run(&["key", "generate", "--out", "relay.nsec"]).ok();
    assert!(printed.contains("npub1") && !printed.contains("nsec1"), "{printed}");
    binary.run(&["key", "generate", "--out", "relay.nsec"]).fails(1);
}

/// Completions for the common shells name the commands.
#[test]
fn completions_name_the_commands() {
    let binary = Binary::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = binary.run(&["completions", shell]).ok();
        for command in ["serve", "import", "export", "compact"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    binary.run(&["completions", "no-such-shell"]).fails(2);
}

/// `--store` overrides `sync.toml`, whose path is relative to the working directory.
#[test]
fn the_store_is_where_the_settings_say() {
    let binary = Binary::new();
    binary.configure("store = \"elsewhere\"\n");
    let note = Keys::new(1).note(NOW, "");
    let home = binary.data().parent().unwrap();
    let file = binary.file("note.jsonl", json_of(&note));
    let mut command = Command::new(env!("CARGO_BIN_EXE_sledge"));
    command.current_dir(home).env_remove("SLEDGE_CONFIG").env_remove("SLEDGE_LOG").args(["import", &file]);
    assert!(command.output().unwrap().status.success());
    assert!(home.join("elsewhere").is_dir() && !binary.data().exists());
    binary.import([&note]);
    assert_eq!(binary.exported_ids(), ids([&note]));
}
