//! Events as they are found in the wild, or a fixture of our own making where no such file is named: they come in as
//! the rules say, go out as they were, and nothing forged gets in.
//!
//! `SLEDGE_TEST_EVENTS` names a file of events, one a line, `.gz` or plain. If a `found-invalid-events.jsonl` lies
//! beside it, its events are tried too: `wire_b64` is base64 of what stood where an event should be.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flate2::read::MultiGzDecoder;
use serde_json::Value;
use sledge::protocol::Event;
use sledge::protocol::supersede::Verdict;

use crate::support::binary::{Binary, id_of};
use crate::support::client::request;
use crate::support::{Keys, NOW, Reference, Relay, json_of};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fixtures/events.jsonl");

fn events_file() -> PathBuf {
    std::env::var_os("SLEDGE_TEST_EVENTS").map_or_else(|| FIXTURE.into(), PathBuf::from)
}

fn read_events(file: &Path) -> Vec<Event> {
    let mut bytes = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut text = Vec::new();
        MultiGzDecoder::new(&bytes[..]).read_to_end(&mut text).unwrap();
        bytes = text;
    }
    let text = String::from_utf8(bytes).unwrap();
    text.lines().map(|line| Event::from_json(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// What an import of `events` leaves, by the rules written down plainly: id to canonical JSON.
fn expected_after_import(events: &[Event], now: u64) -> BTreeMap<String, String> {
    let mut rules = Reference::new();
    for event in events.iter().filter(|event| is_welcome(event)) {
        rules.apply(event, now);
    }
    rules.visible(now).into_iter().map(|event| (event.id.to_hex(), json_of(event))).collect()
}

/// What a relay without authentication keeps at all: no ephemeral and no AUTH events, nothing protected, and no
/// request to vanish from elsewhere.
fn is_welcome(event: &Event) -> bool {
    let vanishes_here = event.tags.values("relay").any(|url| url == "ALL_RELAYS");
    !event.kind.is_ephemeral()
        && event.kind.0 != 22_242
        && !is_protected(event)
        && (event.kind.0 != 62 || vanishes_here)
}

/// NIP-70: a `-` tag, of its own or in the event that a repost embeds.
fn is_protected(event: &Event) -> bool {
    let embedded = matches!(event.kind.0, 6 | 16).then(|| Event::from_json(&event.content).ok()).flatten();
    let has_mark = |event: &Event| event.tags.iter().any(|tag| tag.name() == "-");
    has_mark(event) || embedded.is_some_and(|embedded| has_mark(&embedded))
}

fn by_id(lines: Vec<String>) -> BTreeMap<String, String> {
    let count = lines.len();
    let by_id: BTreeMap<String, String> = lines.into_iter().map(|line| (id_of(&line), line)).collect();
    assert_eq!(by_id.len(), count, "an event was exported twice");
    by_id
}

/// Compares and shows what differs, not what does not.
#[track_caller]
fn assert_same(found: &BTreeMap<String, String>, expected: &BTreeMap<String, String>, what: &str) {
    let missing: Vec<_> = expected.iter().filter(|(id, _)| !found.contains_key(*id)).collect();
    let surplus: Vec<_> = found.iter().filter(|(id, _)| !expected.contains_key(*id)).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}\nsurplus: {surplus:#?}\n{what}");
    let changed: Vec<_> = found.iter().filter(|(id, json)| expected[*id] != **json).collect();
    assert!(changed.is_empty(), "changed: {changed:#?}\n{what}");
}

/// Exactly what the rules leave comes in, goes out event by event as it was, and a second import adds nothing.
#[test]
fn real_events_come_in_and_go_out() {
    let file = events_file();
    let events = read_events(&file);
    let binary = Binary::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let expected = expected_after_import(&events, now);
    let path = file.to_str().unwrap();
    let ran = binary.run(&["import", path]);
    assert_eq!(ran.code, Some(0), "{}\n{}", ran.stdout, ran.stderr);
    let exported = by_id(binary.export());
    assert_same(&exported, &expected, &ran.stderr);
    binary.run(&["import", path]).ok();
    assert_same(&by_id(binary.export()), &expected, "after a second import");
    binary.run(&["verify"]).ok();
    binary.run(&["compact"]).ok();
    assert_same(&by_id(binary.export()), &expected, "after compaction");
    let copy = Binary::new();
    copy.run_with(&["import", "-"], (binary.export().join("\n") + "\n").as_bytes()).ok();
    assert_same(&by_id(copy.export()), &expected, "in a copy");
}

/// Over the socket: each gets the answer that the rules give it.
#[tokio::test]
async fn real_events_over_the_socket() {
    let relay = Relay::with(|config| {
        config.limits.created_at_ahead_secs_max = u64::from(u32::MAX);
        config.limits.limit_max = 100_000;
        config.access.private_kinds.clear();
    })
    .await;
    let mut client = relay.client().await;
    let mut rules = Reference::new();
    // One event in the wild is dated in milliseconds.
    let events = read_events(&events_file()).into_iter().filter(|event| event.created_at < u64::from(u32::MAX));
    for event in events {
        let (accepted, text) = client.publish(&event).await;
        if is_welcome(&event) {
            let verdict = rules.apply(&event, NOW);
            assert_eq!((accepted, text), (verdict.is_accepted(), verdict.to_string()), "{}", json_of(&event));
        } else {
            let live_only = event.kind.is_ephemeral() && event.kind.0 != 22_242 && !is_protected(&event);
            let expired = text == Verdict::Expired.to_string();
            assert_eq!(accepted, live_only && !expired, "{text}: {}", json_of(&event));
        }
    }
    client.send(request("REQ", "all", &[serde_json::json!({"limit": 100_000})])).await;
    let stored = client.until_eose("all").await;
    assert_eq!(stored.ids(), crate::support::ids(rules.visible(NOW)));
}

/// None of the events that do not hold is accepted, each refusal says so, and the relay goes on.
#[tokio::test]
async fn found_invalid_events_are_refused() {
    let invalid = events_file().with_file_name("found-invalid-events.jsonl");
    let made_up: Vec<Vec<u8>> = forgeries().into_iter().map(String::into_bytes).collect();
    let found = match fs::read_to_string(&invalid) {
        Ok(text) => text.lines().map(wire_bytes).collect(),
        Err(_) => Vec::new(),
    };
    // A date in the future would be refused before id and signature are looked at.
    let relay = Relay::with(|config| config.limits.created_at_ahead_secs_max = u64::from(u32::MAX)).await;
    let mut client = relay.client().await;
    for bytes in made_up.iter().chain(&found) {
        let text = String::from_utf8(bytes.clone()).expect("a text frame holds text");
        client.send(format!("[\"EVENT\",{text}]")).await;
        let answer = client.next().await;
        let id = serde_json::from_str::<Value>(&text).ok().and_then(|event| event["id"].as_str().map(str::to_owned));
        let reason = answer.as_array().and_then(|parts| parts.last()).and_then(Value::as_str).unwrap_or_default();
        // What its author marked as protected, requests of members among it, is refused for that before anything is computed.
        let unwelcome = ["auth-required: ", "restricted: "].iter().any(|prefix| reason.starts_with(prefix));
        let is_protected = text.contains("[\"-\"]") && unwelcome;
        assert!(reason.starts_with("invalid: ") || is_protected, "{text:.300}\nwas answered {answer}");
        match id {
            Some(id) => assert_eq!((&answer[0], &answer[1], &answer[2]), (&"OK".into(), &id.into(), &false.into())),
            None => assert_eq!(answer[0], "NOTICE", "{text:.300}"),
        }
    }
    assert_eq!(client.count(&[serde_json::json!({})]).await, 0);
}

/// One event with each of its parts changed after signing.
fn forgeries() -> Vec<String> {
    let event = Keys::new(1).draft(1, NOW).tag(["t", "x"]).content("true").sign();
    let json = json_of(&event);
    let changes =
        [("true", "false"), ("\"kind\":1", "\"kind\":2"), ("[\"t\",\"x\"]", "[\"t\",\"y\"]"), ("\"x\"", "\"x\",\"\"")];
    let mut forged: Vec<String> = changes.iter().map(|(from, to)| json.replacen(from, to, 1)).collect();
    forged.push(json.replacen(&event.sig.to_hex()[..8], "00000000", 1));
    assert!(forged.iter().all(|forged| *forged != json));
    forged
}

fn wire_bytes(line: &str) -> Vec<u8> {
    let line: Value = serde_json::from_str(line).unwrap();
    decode_base64(line["wire_b64"].as_str().unwrap())
}

/// Standard base64 with padding; test data is well formed.
fn decode_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for byte in text.bytes().take_while(|byte| *byte != b'=') {
        bits = bits << 6 | ALPHABET.iter().position(|letter| *letter == byte).expect("a base64 digit") as u32;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

#[test]
fn base64_is_read() {
    for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9vYmE=", "fooba"), ("Pz8/Pj4+", "???>>>")] {
        assert_eq!(decode_base64(text), bytes.as_bytes());
    }
}

/// The fixture: events of every kind and with odd content, some of which others replace, delete or make vanish.
fn fixture() -> Vec<Event> {
    let [alice, bob, carol] = [1, 2, 3].map(|n| Keys::new(1_000 + n));
    let mut events: Vec<Event> = Vec::new();
    let odd = [
        "",
        " ",
        "plain",
        "\u{0}\u{1}\u{1f}",
        "\u{7f}\u{80}",
        "\"\\/\u{8}\u{c}\n\r\t",
        "\u{2028}\u{2029}",
        "\u{ffff}\u{feff}",
        "👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "مرحبا שלום",
        "e\u{301} é",
        "{\"id\":\"x\",\"sig\":[]}",
        "]}],[",
        "\\u0041",
        "nostr:npub1",
        "<script>",
        "%00",
    ];
    for (n, text) in odd.iter().enumerate() {
        events.push(alice.draft(1, NOW + n as u64 / 3).tag(["t", text]).tag(["r", "", text]).content(*text).sign());
    }
    events.push(bob.note(0, "the beginning"));
    events.push(bob.note(NOW, &"long ".repeat(2_000)));
    events
        .push((0..300u32).fold(bob.draft(3, NOW), |draft, n| draft.tag(["p".to_owned(), format!("{n:064x}")])).sign());
    for (kind, at) in
        [(0, 5), (0, 3), (0, 5), (3, 9), (10_002, 1), (10_002, 2), (41, 1), (41, 2), (65_535, 1), (40_000, 1)]
    {
        events.push(bob.draft(kind, NOW + at).content(events.len().to_string()).sign());
    }
    for (d, at) in
        [(Some("x"), 1), (Some("x"), 4), (Some("x"), 2), (Some(""), 1), (None, 2), (Some("a:b"), 1), (Some("ü"), 1)]
    {
        let draft = carol.draft(30_023, NOW + at).tag(["title", "t"]);
        events.push(if let Some(d) = d { draft.tag(["d", d]) } else { draft }.sign());
    }
    let long = "d".repeat(400);
    events.extend(["1", "2"].map(|last| carol.draft(30_024, NOW).tag(["d".to_owned(), long.clone() + last]).sign()));
    let own = events[2].id.to_hex();
    events.push(alice.deletion(NOW + 9, &[("e", &own), ("e", &events[18].id.to_hex())]));
    events.push(carol.deletion(NOW + 1, &[("a", &carol.address(30_023, "a:b")), ("a", &carol.address(30_023, "x"))]));
    events.push(bob.deletion(NOW + 9, &[("a", &carol.address(30_023, "ü")), ("e", ""), ("a", "x")]));
    events.push(events[2].clone());
    for at in ["1", "99999999999", "soon"] {
        events.push(carol.draft(1, NOW).tag(["expiration", at]).content(at).sign());
    }
    events.extend([20_000, 22_242, 29_999].map(|kind| carol.draft(kind, NOW).sign()));
    events.push(carol.draft(1, NOW).tag(["-"]).content("for my own relay only").sign());
    let protected = json_of(events.last().expect("just pushed"));
    events.push(bob.draft(6, NOW).content(protected).sign());
    events.push(bob.draft(6, NOW).content(json_of(&events[0])).sign());
    events.push(bob.draft(1_059, NOW).tag(["p".to_owned(), carol.hex()]).content("sealed").sign());
    let dave = Keys::new(1_004);
    events.extend([1, 7].map(|kind| dave.draft(kind, NOW).content("will vanish").sign()));
    events.push(dave.draft(62, NOW).tag(["relay", "ALL_RELAYS"]).sign());
    events.push(dave.note(NOW - 1, "too late"));
    events.push(dave.note(NOW + 1, "a new life"));
    events
}

/// The fixture in the repository is what [`fixture`] makes. To write it anew, delete it and run this test.
#[test]
fn the_fixture_is_up_to_date() {
    let expected: String = fixture().iter().map(|event| json_of(event) + "\n").collect();
    if !Path::new(FIXTURE).exists() {
        fs::create_dir_all(Path::new(FIXTURE).parent().unwrap()).unwrap();
        fs::write(FIXTURE, &expected).unwrap();
    }
    assert!(
        fs::read_to_string(FIXTURE).unwrap() == expected,
        "the fixture is out of date: delete it and run this again"
    );
}
