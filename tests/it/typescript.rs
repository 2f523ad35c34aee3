//! An app in another language reads and writes the documented shapes: nostr-tools, in Node.
//!
//! Where Node, npm or the registry is not there the test says so and passes.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use sledge::protocol::{Event, Verified};
use sledge::sync::chat::ChatKey;
use sledge::sync::clock::{Clock, Device};
use sledge::sync::draft::{Draft, Op};
use sledge::sync::nip44::Nip44;
use sledge::sync::settings::Settings;
use sledge::sync::training::{Consent, Quality, Terms};
use sledge::sync::{Absorbed, Collections};

use crate::support::binary::finish;
use crate::support::{Keys, NOW, json_of};

const SECRET: [u8; 32] = [21; 32];
const NOW_MS: u64 = NOW * 1000;
/// The library as it was when the shapes were written down.
const PACKAGES: [&str; 2] = ["nostr-tools@2.25.2", "@noble/hashes@2"];

/// A device that signs at once.
struct Desk {
    keys: Keys,
    cipher: Nip44,
    clock: Clock,
    state: Collections,
    events: Vec<Event>,
}

impl Desk {
    fn new() -> Desk {
        let keys = Keys::of_secret(SECRET);
        let next = std::sync::atomic::AtomicU8::new(0);
        let chance = move || [next.fetch_add(1, std::sync::atomic::Ordering::Relaxed); 32];
        Desk {
            cipher: Nip44::new(&SECRET, chance).unwrap(),
            clock: Clock::new(Device(1)),
            state: Collections::new(keys.pubkey()),
            events: Vec::new(),
            keys,
        }
    }

    fn say(&mut self, op: Op) {
        let draft = Draft { written: self.clock.write(NOW_MS), op };
        let unsigned = self.state.build(&[&draft], self.clock.device(), &self.cipher).unwrap().unwrap();
        let event = unsigned.sign(self.keys.pubkey(), |id| self.keys.sign_id(id));
        assert_eq!(self.take(event.clone()), Absorbed::Taken);
        self.events.push(event);
    }

    fn take(&mut self, event: Event) -> Absorbed {
        self.state.absorb(&Verified::check(event).unwrap(), &self.cipher, &mut self.clock)
    }
}

/// A chat with two messages, settings in two versions, and a contribution.
fn written() -> (Desk, ChatKey) {
    let mut desk = Desk::new();
    let chat = ChatKey { owner: desk.keys.pubkey(), id: "c:1".to_owned() };
    desk.say(desk.state.chat_view([]).set_title(&chat.id, "A title"));
    for (id, text) in [("m1", "first ☃"), ("m2", "second")] {
        let op = desk.state.chat_view([]).send(&chat, id, "user", text, Value::Null).unwrap();
        desk.say(op);
    }
    for (name, value) in [("theme", json!("dark")), ("size", json!(12))] {
        desk.say(Settings::set(name, &value, false).unwrap()[0].clone());
    }
    let terms = Terms { quality: Quality::new(80), license: "CC0-1.0".to_owned(), curators: Vec::new() };
    let consent = Consent::to("given");
    let op = desk.state.training.contribute(&chat.owner, "given", terms, consent, []).unwrap();
    desk.say(op);
    (desk, chat)
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

/// nostr-tools reads what this crate writes, and this crate takes what nostr-tools writes: message, head, settings and
/// deletion, each by the page of shapes alone.
#[test]
fn nostr_tools_reads_and_writes_the_shapes() {
    let dir = tempfile::tempdir().unwrap();
    if let Err(why) = install(dir.path()) {
        eprintln!("skipped: the check with nostr-tools needs Node and npm: {why}");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/typescript/check.mjs");
    std::fs::copy(script, dir.path().join("check.mjs")).unwrap();
    let (mut desk, chat) = written();
    let events: Vec<Value> = desk.events.iter().map(|event| serde_json::from_str(&json_of(event)).unwrap()).collect();
    let input = json!({"secret": "15".repeat(32), "events": events}).to_string();
    let mut node = Command::new("node");
    node.arg("check.mjs").current_dir(dir.path());
    let child = node.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let answer: Value = serde_json::from_str(&finish(child, input.as_bytes(), &["check.mjs"]).ok()).unwrap();
    check_what_it_read(&answer["read"], &desk);
    for event in answer["wrote"].as_array().unwrap() {
        let event = Event::from_json(&event.to_string()).unwrap();
        assert_eq!(desk.take(event), Absorbed::Taken);
    }
    let view = desk.state.chat_view([]);
    let shown: Vec<(String, bool)> =
        view.messages(&chat).into_iter().map(|shown| (shown.message.content, shown.branch)).collect();
    assert_eq!(shown, [("second".to_owned(), false), ("from TypeScript".to_owned(), false)]);
    assert_eq!(view.head(&chat).title(), Some("TypeScript title"));
    let settings = desk.state.settings.fields();
    assert_eq!((settings.get("theme"), settings.get("from.typescript")), (Some(&json!("dark")), Some(&json!(true))));
    assert_eq!(desk.state.settings.heads().count(), 1);
    assert!(desk.state.due([]).is_empty(), "nothing is left to say");
}

fn check_what_it_read(read: &Value, desk: &Desk) {
    assert_eq!(read["valid"], true);
    let texts: Vec<&Value> = read["messages"].as_array().unwrap().iter().map(|message| &message["content"]).collect();
    assert_eq!(texts, ["first ☃", "second"]);
    assert_eq!(read["messages"][1]["parents"], json!(["m1"]));
    assert_eq!(read["messages"][0]["createdAt"], NOW_MS);
    assert_eq!(read["head"]["title"][0], "A title");
    assert_eq!(read["settings"], serde_json::to_value(desk.state.settings.fields()).unwrap());
    assert_eq!(read["heads"].as_array().map(Vec::len), Some(1));
    assert_eq!(read["training"], json!([{"text": "given", "hash": true, "quality": "80"}]));
}
