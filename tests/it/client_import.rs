//! Chats of an older app come over by the command line: once, whatever happens, and the same on every device.

use serde_json::{Value, json};
use sledge::protocol::nip19;
use sledge::sync::cipher::Cipher;
use sledge::sync::nip44::Nip44;

use super::client_crash::{NSEC, laptop};
use super::support::binary::lines;
use super::support::{Binary, Keys, NOW, Serving};

/// The key that all laptops have.
fn secret() -> [u8; 32] {
    nip19::parse_secret_key(NSEC).unwrap()
}

/// An old event with a whole chat, by the laptops' key.
fn old_chat(id: &str, created_at: u64, content: &str) -> sledge::protocol::Event {
    let event = Keys::of_secret(secret()).draft(30_001, created_at);
    event.tag(["d", id]).tag(["title", &format!("Title of {id}")]).content(content).sign()
}

fn sealed(text: &str) -> String {
    let cipher = Nip44::new(&secret(), || [7; 32]).unwrap();
    cipher.seal(&cipher.pubkey(), text).unwrap()
}

const LISBON: &str = r#"{"messages":[
    {"id":"1","role":"user","content":"Where shall we stay?","createdAt":"2023-05-01T10:00:00.000Z"},
    {"id":"2","role":"assistant","content":[{"type":"text","text":"By the river."}],"model":"m","createdAt":1682935300}]}"#;
const PORTO: &str = r#"[{"role":"user","content":"Hello"},{"role":"user","content":"Hello?"}]"#;

/// What an older app and its relay have left: a sealed chat and one in the clear, a former version of it, a list of
/// bookmarks, a note, somebody else's chat, and a line that is no event.
fn old_events() -> String {
    let foreign = Keys::new(9).draft(30_001, NOW).tag(["d", "lisbon"]).content(LISBON).sign();
    let events = [
        old_chat("porto", NOW - 1, r#"[{"role":"user","content":"Never said"}]"#),
        old_chat("lisbon", NOW, &sealed(LISBON)),
        old_chat("porto", NOW, PORTO),
        old_chat("bookmarks", NOW, &sealed(r#"[["e","00"]]"#)),
        Keys::of_secret(secret()).note(NOW, "a note"),
        foreign,
    ];
    lines(&events) + "no event\n"
}

fn import(laptop: &Binary, args: &[&str], stdin: &str) -> Value {
    let args = [&["chat", "import", "--json"], args].concat();
    serde_json::from_str(&laptop.run_with(&args, stdin.as_bytes()).ok()).unwrap()
}

/// `imported` and `known` of a tally.
fn counts(tally: &Value) -> (u64, u64) {
    (tally["imported"].as_u64().unwrap(), tally["known"].as_u64().unwrap())
}

/// Everything that a laptop shows of its chats.
fn shown(laptop: &Binary) -> Vec<Value> {
    let parse = |text: &str| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>();
    let mut all = parse(&laptop.run(&["chat", "list", "--json", "--offline"]).ok());
    for chat in all.clone() {
        let chat = chat["chat"].as_str().unwrap();
        all.extend(parse(&laptop.run(&["chat", "show", chat, "--json", "--offline"]).ok()));
    }
    all
}

fn contents(shown: &[Value]) -> Vec<&str> {
    shown.iter().filter_map(|line| line["content"].as_str()).collect()
}

/// The ids of what a relay has stored; it is stopped meanwhile.
fn stored_at(relay: &Binary, serving: &mut Serving) -> Vec<String> {
    let addr = serving.addr();
    serving.kill();
    let ids = relay.exported_ids();
    *serving = relay.serve_on(addr);
    ids
}

fn flush(laptop: &Binary) {
    laptop.run(&["outbox", "flush"]).ok();
}

/// Events are imported once: again, on a second device that meets the relay first, and on a third that does not. All end
/// equal, the relay has each message once, and a message that was deleted meanwhile stays deleted.
#[test]
fn old_events_are_imported_once_on_every_device() {
    let relay = Binary::new();
    let mut serving = relay.serve();
    let [a, b, c] = [(), (), ()].map(|()| laptop(&[format!("ws://{}", serving.addr())]));
    let file = a.file("old.jsonl", old_events());
    let first = import(&a, &[&file], "");
    let expected = json!({"chats": 2, "imported": 4, "known": 0, "too_long": [], "unreadable": 1, "other_keys": 1,
        "other_events": 2});
    assert_eq!(first, expected);
    let before = shown(&a);
    let said = ["Where shall we stay?", "By the river.", "Hello", "Hello?"];
    assert_eq!(contents(&before), said, "{before:?}");
    assert!(before.iter().all(|line| line["pending"] == false), "it went to the relay at once: {before:?}");
    assert_eq!((&before[0]["title"], &before[3]["meta"]), (&json!("Title of lisbon"), &json!({"model": "m"})));
    assert_eq!(before[2]["created_at_ms"], 1_682_935_200_000_u64);
    let stored = stored_at(&relay, &mut serving);
    assert_eq!(stored.len(), 6, "four messages, two heads");

    assert_eq!(counts(&import(&a, &["-"], &old_events())), (0, 4));
    assert_eq!(counts(&import(&c, &[&file, "--offline"], "")), (4, 0));
    assert_eq!(counts(&import(&c, &[&file, "--offline"], "")), (0, 4));
    assert_eq!(counts(&import(&b, &[&file], "")), (0, 4), "the relay had them");
    assert_eq!(stored_at(&relay, &mut serving), stored);
    let id = before[2]["message"].as_str().unwrap();
    a.run(&["chat", "delete", "lisbon", id]).ok();
    for laptop in [&c, &a, &b, &c] {
        flush(laptop);
    }
    let after = shown(&a);
    assert_eq!(contents(&after), said[1..]);
    for laptop in [&b, &c] {
        assert_eq!(shown(laptop), after);
        assert_eq!(counts(&import(laptop, &[&file], "")), (0, 4));
        assert_eq!(shown(laptop), after);
    }
    assert_eq!(stored_at(&relay, &mut serving).len(), stored.len(), "one message became its deletion");
}

/// Rows of the table, on two devices that have never met a relay: they end equal when they do.
#[test]
fn rows_are_imported_once_on_every_device() {
    let relay = Binary::new();
    let mut serving = relay.serve();
    let [a, b] = [(), ()].map(|()| laptop(&[format!("ws://{}", serving.addr())]));
    let messages =
        json!([{"id": "1", "role": "user", "content": "Hi"}, {"role": "user", "content": "x".repeat(70_000)}]);
    let rows = json!([{"id": "one", "messages": messages.to_string(), "title": "One"}, {"id": "two", "messages": 5},
        {"id": "three", "messages": PORTO}]);
    for laptop in [&a, &b] {
        let ran = laptop.run_with(&["chat", "import", "-", "--json", "--offline"], rows.to_string().as_bytes());
        assert!(ran.stderr.contains("row 2"), "{}", ran.stderr);
        let tally: Value = serde_json::from_str(&ran.ok()).unwrap();
        assert_eq!((counts(&tally), tally["unreadable"].as_u64()), ((3, 0), Some(1)));
        assert_eq!(tally["too_long"][0]["chat"], "one");
        let text = laptop.run_with(&["chat", "import", "-", "--offline"], rows.to_string().as_bytes()).ok();
        assert!(text.contains("known      3\n") && text.contains(" in chat one\n"), "{text}");
    }
    for laptop in [&a, &b, &a] {
        flush(laptop);
    }
    assert_eq!(contents(&shown(&a)), ["Hi", "Hello", "Hello?"]);
    assert_eq!(shown(&a), shown(&b));
    assert_eq!(stored_at(&relay, &mut serving).len(), 4, "three messages, one head");
}

/// An import that is killed in the middle goes on where it was: what was durable is known, nothing is there twice.
#[test]
fn an_import_that_was_killed_goes_on() {
    let laptop = laptop(&["ws://127.0.0.1:1".to_owned()]);
    let messages = |count: usize| {
        let message = |n| json!({"id": n, "role": "user", "content": format!("{n}")});
        Value::from((0..count).map(message).collect::<Vec<_>>()).to_string()
    };
    let rows = json!([{"id": "a", "messages": messages(300)}, {"id": "b", "messages": messages(300)}]).to_string();
    let file = laptop.file("rows.json", rows);
    let mut command = laptop.command(&["chat", "import", &file, "--offline"]);
    let killed = command.env("SLEDGE_FAULT", "outbox.half_written:2").output().unwrap();
    assert!(!killed.status.success());
    let there = contents(&shown(&laptop)).len() as u64;
    assert!((300..600).contains(&there), "the first portion and a part of the second: {there}");
    assert_eq!(counts(&import(&laptop, &[&file, "--offline"], "")), (600 - there, there));
    assert_eq!(counts(&import(&laptop, &[&file, "--offline"], "")), (0, 600));
    let expected: Vec<String> = (0..300).chain(0..300).map(|n| n.to_string()).collect();
    assert_eq!(contents(&shown(&laptop)), expected);
}

/// An outbox that has no more room says so; the chats before that are imported, and with more room the rest follows.
#[test]
fn a_full_outbox_is_told() {
    let laptop = laptop(&["ws://127.0.0.1:1".to_owned()]);
    let settings = "[client]\nkey = \"me.nsec\"\nrelays = [\"ws://127.0.0.1:1\"]\n";
    laptop.configure(&format!("{settings}outbox_mb_max = 1\n"));
    let messages = Value::from(vec![json!({"role": "user", "content": "x".repeat(2_000)}); 300]).to_string();
    let rows: Vec<Value> = (0..3).map(|n| json!({"id": n.to_string(), "messages": messages})).collect();
    let file = laptop.file("rows.json", Value::from(rows).to_string());
    let full = laptop.run(&["chat", "import", &file, "--json", "--offline"]);
    assert_eq!(counts(&serde_json::from_str(&full.stdout).unwrap()), (300, 0));
    assert!(full.fails(1).contains("outbox_mb_max"));
    laptop.configure(settings);
    assert_eq!(counts(&import(&laptop, &[&file, "--offline"], "")), (600, 300));
}

/// Old chats that the user's relays have need no file.
#[test]
fn old_chats_come_from_relays() {
    let relay = Binary::new();
    relay.run_with(&["import", "-"], old_events().as_bytes()).ok();
    let serving = relay.serve();
    let laptop = laptop(&[format!("ws://{}", serving.addr())]);
    assert_eq!(counts(&import(&laptop, &["--from-relays"], "")), (4, 0));
    assert_eq!(counts(&import(&laptop, &["--from-relays"], "")), (0, 4));
    assert_eq!(contents(&shown(&laptop)), ["Where shall we stay?", "By the river.", "Hello", "Hello?"]);
}

/// Wrong calls and files that hold nothing to be imported are told by exit code and reason, and import nothing.
#[test]
fn what_cannot_be_imported_is_told() {
    let laptop = laptop(&["ws://127.0.0.1:1".to_owned()]);
    laptop.run(&["chat", "import"]).fails(2);
    laptop.run(&["chat", "import", "-", "--from-relays"]).fails(2);
    assert!(laptop.run(&["chat", "import", "missing.jsonl", "--offline"]).fails(1).contains("missing.jsonl"));
    let mut forged = old_chat("forged", NOW, PORTO);
    forged.content = LISBON.to_owned();
    for (input, why) in [
        ("no event\n".to_owned(), "sqlite3 -json"),
        ("[{}".to_owned(), "sqlite3 -json"),
        (lines(&[Keys::new(9).draft(30_001, NOW).tag(["d", "x"]).content(PORTO).sign()]), "--key"),
    ] {
        let said = laptop.run_with(&["chat", "import", "-", "--offline"], input.as_bytes()).fails(1);
        assert!(said.contains(why), "{said}");
    }
    let tally = import(&laptop, &["-", "--offline"], &lines(&[forged]));
    assert_eq!((counts(&tally), tally["unreadable"].as_u64()), ((0, 0), Some(1)));
    assert_eq!(counts(&import(&laptop, &["-", "--offline"], "")), (0, 0));
    assert_eq!(laptop.run(&["chat", "list", "--offline"]).ok(), "");
}
