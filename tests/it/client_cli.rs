//! Two laptops of one person, by the command line alone: write offline, reconnect, look.

use serde_json::{Value, json};

use super::client_crash::laptop;
use super::support::Binary;

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn flush(laptop: &Binary) {
    laptop.run(&["outbox", "flush"]).ok();
}

/// Chats and settings that were written offline on both laptops are the same on both after they have met a relay, in the
/// same order, the later of two settings counting.
#[test]
fn two_laptops_write_offline_and_end_equal() {
    let relay = Binary::new();
    let serving = relay.serve();
    let [a, b] = [(), ()].map(|()| laptop(&[format!("ws://{}", serving.addr())]));
    let chat = a.run(&["chat", "new", "Lisbon"]).ok().trim().to_owned();
    let first = a.run(&["chat", "send", "Lisbon", "Where shall we stay?"]).ok().trim().to_owned();
    assert!(b.run(&["chat", "list"]).ok().contains("Lisbon"));

    a.run(&["chat", "send", &chat, "By the river.", "--role", "assistant", "--offline"]).ok();
    b.run(&["chat", "send", "Lisbon", "-", "--offline"]);
    b.run_with(&["chat", "send", "Lisbon", "-", "--offline"], b"On the hill.\n").ok();
    a.run(&["settings", "set", "theme", "dark", "--offline"]).ok();
    a.run(&["settings", "set", "editor.tabs", r#"{"width":4}"#, "--offline"]).ok();
    a.run(&["settings", "set", "device.font", "12", "--offline"]).ok();
    b.run(&["settings", "set", "theme", "light", "--offline"]).ok();
    b.run(&["chat", "edit", "Lisbon", &first[..13], "Where shall we eat?", "--offline"]).ok();
    let waiting: Value = serde_json::from_str(&a.run(&["outbox", "status", "--json"]).ok()).unwrap();
    assert!(waiting["waiting"].as_u64().unwrap() >= 3 && waiting["drafts"] == waiting["waiting"], "{waiting}");
    assert!(waiting["cache"]["events"].is_u64() && waiting["cache"]["bytes"].is_u64(), "{waiting}");
    assert!(a.run(&["outbox", "list"]).ok().contains("not signed yet"));

    for laptop in [&a, &b, &a, &b, &a] {
        flush(laptop);
    }
    let show = |laptop: &Binary| json_lines(&laptop.run(&["chat", "show", &chat, "--offline", "--json"]).ok());
    let messages = show(&a);
    assert_eq!(messages, show(&b));
    let contents: Vec<&str> = messages.iter().map(|message| message["content"].as_str().unwrap()).collect();
    assert_eq!(contents[0], "Where shall we eat?");
    assert!(contents.contains(&"By the river.") && contents.contains(&"On the hill."), "{contents:?}");
    assert!(messages.iter().any(|message| message["branch"] == true), "both followed the first message");

    let settings = |laptop: &Binary| -> Value {
        serde_json::from_str(&laptop.run(&["settings", "list", "--offline", "--json"]).ok()).unwrap()
    };
    assert_eq!(settings(&a), json!({"theme": "light", "editor.tabs": {"width": 4}, "device.font": 12}));
    assert_eq!(settings(&b), json!({"theme": "light", "editor.tabs": {"width": 4}}));
    for laptop in [&a, &b] {
        assert_eq!(laptop.run(&["settings", "get", "theme", "--offline"]).ok(), "light\n");
        assert_eq!(laptop.run(&["settings", "conflicts", "--offline"]).ok(), "");
    }

    a.run(&["chat", "delete", "Lisbon", &first]).ok();
    assert_eq!(json_lines(&b.run(&["chat", "show", &chat, "--json"]).ok()).len(), messages.len() - 1);
    b.run(&["chat", "delete", &chat]).ok();
    assert_eq!(a.run(&["chat", "list"]).ok(), "");
}

/// Two laptops sign settings without knowing of each other, at two relays. When one meets both, it publishes the merge,
/// and everybody has it.
#[test]
fn settings_signed_apart_are_merged() {
    let [first, second] = [(), ()].map(|()| Binary::new());
    let [serving, other] = [&first, &second].map(Binary::serve);
    let urls = [&serving, &other].map(|relay| format!("ws://{}", relay.addr()));
    let [a, b] = [(), ()].map(|()| laptop(&urls));
    a.run(&["settings", "set", "theme", "dark", "--relay", &urls[0]]).ok();
    a.run(&["settings", "set", "size", "1", "--relay", &urls[0]]).ok();
    b.run(&["settings", "set", "theme", "light", "--relay", &urls[1]]).ok();
    for laptop in [&a, &b, &a] {
        flush(laptop);
    }
    for laptop in [&a, &b] {
        let all: Value = serde_json::from_str(&laptop.run(&["settings", "list", "--offline", "--json"]).ok()).unwrap();
        assert_eq!(all, json!({"theme": "light", "size": 1}));
        assert_eq!(laptop.run(&["settings", "conflicts", "--offline"]).ok(), "");
    }
}

/// Training data is given with consent only, to relays of its own only; the giver sees what became of it.
#[test]
fn training_data_is_given_with_consent() {
    let relay = Binary::new();
    let serving = relay.serve();
    let laptop = laptop(&[]);
    laptop.run(&["training", "contribute", "text", "--license", "CC0-1.0"]).fails(2);
    let nowhere = laptop.run(&["training", "contribute", "text", "--license", "CC0-1.0", "--consent"]).fails(2);
    assert!(nowhere.contains("training_relays"), "{nowhere}");
    laptop.configure(&format!("[client]\nkey = \"me.nsec\"\ntraining_relays = [\"ws://{}\"]\n", serving.addr()));
    laptop.run(&["training", "contribute", "text", "--license", "CC0-1.0", "--quality", "101", "--consent"]).fails(2);
    laptop.run(&["training", "contribute", "text", "--license", "CC0-1.0", "--quality", "80", "--consent"]).ok();
    let all = json_lines(&laptop.run(&["training", "status", "--json"]).ok());
    assert_eq!(all.len(), 1);
    assert_eq!(
        (&all[0]["status"], &all[0]["quality"], &all[0]["content"]),
        (&json!("pending"), &json!(80), &json!("text"))
    );
    let id = all[0]["id"].as_str().unwrap().to_owned();
    laptop.run(&["training", "rate", &id, "90"]).fails(2);
    laptop.run(&["training", "contribute", "text", "--license", "CC0-1.0", "--consent"]).fails(2);
    laptop.run(&["training", "withdraw", &id]).ok();
    assert_eq!(laptop.run(&["training", "status"]).ok(), "");
}

/// Everything can be taken away as lines of JSON, and what is wrong is told by exit code and reason.
#[test]
fn everything_can_be_exported_and_failures_are_told() {
    let relay = Binary::new();
    let serving = relay.serve();
    let url = format!("ws://{}", serving.addr());
    let laptop = laptop(&[url]);
    laptop.run(&["chat", "new", "Lisbon"]).ok();
    laptop.run(&["chat", "send", "Lisbon", "hello", "--offline"]).ok();
    let lines = json_lines(&laptop.run(&["outbox", "export", "-"]).ok());
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0]["sig"].is_string() && lines[1]["draft"].is_object());
    laptop.run(&["outbox", "export", "all.jsonl"]).ok();
    assert!(laptop.run(&["outbox", "export", "all.jsonl"]).fails(1).contains("all.jsonl"));

    assert!(laptop.run(&["chat", "show", "Porto"]).fails(2).contains("Porto"));
    laptop.run(&["settings", "get", "nothing"]).fails(1);
    laptop.run(&["outbox", "discard", "999"]).fails(2);
    laptop.run(&["chat", "send", "Lisbon", "x", "--relay", "http://no.example"]).fails(2);
    let dead_end = ["outbox", "flush", "--relay", "ws://127.0.0.1:1"];
    assert!(laptop.run(&dead_end).fails(1).contains("127.0.0.1:1"));
    laptop.configure("");
    assert!(laptop.run(&["chat", "list"]).fails(2).contains("sledge key generate"));
}
