//! Commands to a running relay through its control socket: `compact` and `status`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::support::{Binary, Client, Keys, NOW, ids};

/// `sledge compact` frees a serving relay's log without anybody noticing, and `sledge status` tells its figures.
#[tokio::test]
async fn a_serving_relay_is_compacted_and_describes_itself() {
    let binary = Binary::new();
    binary.configure("[storage]\ncompact_share = 1.0\n");
    let author = Keys::new(1);
    let notes: Vec<_> = (0..40).map(|n| author.note(NOW + n, &"x".repeat(2_000))).collect();
    binary.import(&notes);
    let serving = binary.serve();
    let mut client = Client::connect(serving.addr()).await;
    let targets: Vec<String> = ids(&notes[..30]);
    let targets: Vec<(&str, &str)> = targets.iter().map(|id| ("e", id.as_str())).collect();
    let deletion = author.deletion(NOW + 100, &targets);
    client.store(&deletion).await;
    client.req("live", &[json!({"kinds": [1], "limit": 0})]).await;

    let (binary, before, said, after) = tokio::task::spawn_blocking(move || {
        let status = |binary: &Binary| serde_json::from_str::<Value>(&binary.run(&["status", "--json"]).ok()).unwrap();
        let before = status(&binary);
        let said = binary.run(&["compact"]).ok();
        let after = status(&binary);
        (binary, before, said, after)
    })
    .await
    .unwrap();
    assert_eq!([&before["events"], &before["connections"], &before["subscriptions"]], [11, 1, 1]);
    assert!(before["uptime_secs"].is_u64() && before["relay"].as_str().unwrap().starts_with("ws://"), "{before}");
    assert!(before["dead_bytes"].as_u64().unwrap() > 60_000, "{before}");
    assert!(said.starts_with("11 events kept; the event log went from "), "{said}");
    assert_eq!([&after["events"], &after["dead_bytes"]], [11, 0]);
    assert!(after["log_bytes"].as_u64() < before["log_bytes"].as_u64());

    let late = author.note(NOW + 101, "after the switch");
    client.store(&late).await;
    assert_eq!(client.live("live").await["id"], late.id.to_hex());
    assert_eq!(client.count(&[json!({})]).await, 12);
    assert_eq!(client.query_ids(json!({"kinds": [1], "until": NOW + 39, "limit": 1})).await, ids(&notes[39..]));
    serving.signal("TERM");
    let (status, log) = tokio::task::spawn_blocking(|| serving.wait_for_end()).await.unwrap();
    assert!(status.success(), "{log}");
    assert!(!binary.data().join("control.sock").exists());
    assert_eq!(binary.exported_ids().len(), 12);
}

/// A relay that was killed leaves its socket behind: commands work on the store itself, and the next relay replaces it.
#[test]
fn a_socket_left_behind_is_in_nobodys_way() {
    let binary = Binary::new();
    let note = Keys::new(1).note(NOW, "kept");
    binary.import([&note]);
    let mut serving = binary.serve();
    serving.kill();
    assert!(binary.data().join("control.sock").exists());
    assert!(binary.run(&["compact"]).ok().starts_with("1 event kept"));
    let _serving = binary.serve();
    let mut socket = UnixStream::connect(binary.data().join("control.sock")).unwrap();
    socket.write_all(b"{\"command\":\"status\"}\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["status"]["events"], 1);
}
