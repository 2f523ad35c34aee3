//! An app in another language reads and writes the documented shapes through a relay: nostr-tools, in Node.
//!
//! Where Node, npm or the registry is not there the test says so and passes.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use sledge::client::Client;
use sledge::client::clock::World;
use sledge::client::keys::Keys;
use sledge::client::links::Visit;
use sledge::client::profile::ProfileOptions;
use sledge::sync::chat::ChatKey;
use sledge::sync::training::{Consent, Quality, Terms};

use crate::support::Relay;
use crate::support::binary::finish;
use crate::support::client::PATIENCE;
use crate::support::device::{quick, today};

const SECRET: [u8; 32] = [21; 32];
/// The library as it was when the shapes were written down, and a WebSocket for it: not every Node has one.
const PACKAGES: [&str; 3] = ["nostr-tools@2.25.2", "@noble/hashes@2", "ws@8"];

fn client(dir: &Path, relay: &str) -> Client {
    let relays = vec![relay.to_owned()];
    let options = ProfileOptions {
        dir: dir.to_owned(),
        relays: relays.clone(),
        training_relays: relays,
        outbox_bytes_max: 1 << 20,
        memory_bytes: 1 << 20,
    };
    let keys = Keys::from_secret_bytes(SECRET).unwrap();
    Client::open(&options, keys, quick(), World::system()).unwrap()
}

/// A chat with two messages, settings in two writes, and a contribution.
fn write(client: &Client) -> ChatKey {
    let chat = client.chats().create("A title").unwrap();
    for text in ["first ☃", "second"] {
        client.chats().send(&chat, "user", text, Value::Null).unwrap();
    }
    for (name, value) in [("theme", json!("dark")), ("size", json!(12))] {
        client.settings().set(name, value, false).unwrap();
    }
    let terms = Terms { quality: Quality::new(80), license: "CC0-1.0".to_owned(), curators: Vec::new() };
    client.training().contribute("given", terms, Consent::to("given")).unwrap();
    chat
}

async fn sync(client: &Client) {
    let visits = client.visit_relays(PATIENCE).await;
    assert!(visits.values().all(|visit| *visit == Visit::Settled), "{visits:?}");
}

fn texts(client: &Client, chat: &ChatKey) -> Vec<String> {
    client.chats().messages(chat).unwrap().into_iter().map(|shown| shown.message.content).collect()
}

/// Installs the packages; why not, if they cannot be had here.
fn install(dir: &Path) -> Result<(), String> {
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("{program}: {error}"))?;
        let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
        if output.status.success() { Ok(()) } else { Err(format!("{program} {}: {said}", args[0])) }
    };
    run("node", &["--version"])?;
    std::fs::write(dir.join("package.json"), "{\"private\":true,\"type\":\"module\"}").map_err(|e| e.to_string())?;
    let options =
        ["install", "--no-audit", "--no-fund", "--loglevel=error", "--fetch-retries=0", "--fetch-timeout=20000"];
    run("npm", &[&options[..], &PACKAGES[..]].concat())
}

/// The script reads what this client brought to a relay, and this client reads what the script published there: message,
/// head, settings and deletion, each by the page of shapes alone.
#[tokio::test(flavor = "multi_thread")]
async fn nostr_tools_reads_and_writes_the_shapes() {
    let dir = tempfile::tempdir().unwrap();
    if let Err(why) = install(dir.path()) {
        eprintln!("skipped: the check with nostr-tools needs Node and npm: {why}");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/typescript/check.mjs");
    std::fs::copy(script, dir.path().join("check.mjs")).unwrap();
    let relay = Relay::with(|config| config.service_url = String::new()).await;
    relay.set_now(today());
    let url = format!("ws://{}", relay.addr());
    let client = client(&dir.path().join("profile"), &url);
    let chat = write(&client);
    sync(&client).await;
    let read = run_script(dir.path(), &url);
    check_what_it_read(&read, &client, &chat);
    sync(&client).await;
    assert_eq!(texts(&client, &chat), ["second", "from TypeScript"]);
    let shown = client.chats().messages(&chat).unwrap();
    assert!(shown.iter().all(|shown| !shown.branch), "each follows the one before");
    assert_eq!(client.chats().list().unwrap()[0].title(), Some("TypeScript title"));
    let settings = client.settings().all().unwrap();
    assert_eq!(json!(settings), json!({"theme": "dark", "size": 12, "from.typescript": true}));
    let left = |all: &sledge::sync::Collections, drafts: &[&sledge::sync::draft::Draft]| {
        (all.settings.heads().count(), all.due(drafts.iter().copied()).len(), drafts.len())
    };
    assert_eq!(client.profile().see(left).unwrap(), (1, 0, 0), "one head, and nothing is left to say");
}

fn run_script(dir: &Path, url: &str) -> Value {
    let input = json!({"secret": "15".repeat(32), "relay": url}).to_string();
    let mut node = Command::new("node");
    node.arg("check.mjs").current_dir(dir);
    let child = node.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    serde_json::from_str(&finish(child, input.as_bytes(), &["check.mjs"]).ok()).unwrap()
}

fn check_what_it_read(read: &Value, client: &Client, chat: &ChatKey) {
    assert_eq!(read["valid"], true);
    let contents: Vec<&Value> =
        read["messages"].as_array().unwrap().iter().map(|message| &message["content"]).collect();
    assert_eq!(contents, ["first ☃", "second"]);
    let shown = client.chats().messages(chat).unwrap();
    assert_eq!(read["messages"][1]["parents"], json!([shown[0].message.id]));
    assert_eq!(read["messages"][0]["createdAt"], shown[0].message.created_at_ms);
    assert_eq!(read["head"]["title"][0], "A title");
    let fields = client.profile().see(|all, _| serde_json::to_value(all.settings.fields()).unwrap()).unwrap();
    assert_eq!(read["settings"], fields);
    assert_eq!(read["heads"].as_array().map(Vec::len), Some(1));
    assert_eq!(read["training"], json!([{"text": "given", "hash": true, "quality": "80"}]));
}
