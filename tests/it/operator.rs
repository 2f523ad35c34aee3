//! The operator at the command line: nothing is hidden from him, whether a relay runs or not, and nobody else gets in by
//! his door.

use serde_json::json;
use sledge::protocol::nip19::{self, Form};
use sledge::protocol::{Event, label};
use tokio::task::block_in_place;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::support::binary::{id_of, lines};
use crate::support::{Binary, Client, Keys, NOW, ids};

/// A letter, an event of the sync engine, and one that only its author may publish.
fn guarded() -> [Event; 3] {
    let (author, to) = (Keys::new(1), Keys::new(2).hex());
    [
        author.draft(4, NOW + 2).tag(["p", &to]).sign(),
        author.draft(30_001, NOW + 1).tag(["L", label::NAMESPACE]).tag(["d", "x"]).sign(),
        author.draft(1, NOW).tag(["-"]).sign(),
    ]
}

/// `query`, `count` and `import` reach everything through a running relay that shows strangers nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_hidden_from_the_operator() {
    let binary = Binary::new();
    binary.configure("[access]\nauth_required_to_read = true\nauth_required_to_write = true\npow_min = 20\n");
    let events = guarded();
    let serving = binary.serve();
    let found = |args: &[&str]| -> Vec<String> { binary.run(args).ok().lines().map(id_of).collect() };
    block_in_place(|| {
        binary.run_with(&["import", "--protected", "-"], lines(&events).as_bytes()).ok();
        assert_eq!(found(&["query", "{}"]), ids(&events));
        assert_eq!(binary.run(&["count", r#"{"kinds":[4]}"#]).ok().trim(), "1");
    });
    let mut stranger = Client::connect(serving.addr()).await;
    assert!(stranger.refused("q", &[json!({})]).await.starts_with("auth-required: "));
    drop(serving);
    assert_eq!(found(&["query", "{}"]), ids(&events), "the same without a relay");
}

/// A made-up pass opens nothing, and harms nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_made_up_pass_opens_nothing() {
    let binary = Binary::new();
    let serving = binary.serve();
    for shown in ["Bearer ", "Bearer 0000000000000000000000000000000000000000000000000000000000000000", "Basic b3A6"] {
        let mut request = format!("ws://{}/", serving.addr()).into_client_request().unwrap();
        request.headers_mut().insert("authorization", shown.parse().unwrap());
        let mut client = Client::connect_with(serving.addr(), request).await;
        assert!(client.refused("q", &[json!({"kinds": [4]})]).await.starts_with("auth-required: "), "{shown}");
    }
}

/// Protected events are left out by name, unless they are asked for: the way to move one's own relay.
#[tokio::test]
async fn protected_events_move_when_asked_to() {
    let (old, new) = (Binary::new(), Binary::new());
    let events = guarded();
    let ran = old.import(&events);
    assert!(ran.stderr.contains("--protected"), "{}", ran.stderr);
    assert_eq!(old.exported_ids().len(), 2);
    old.run_with(&["import", "--protected", "-"], lines(&events).as_bytes()).ok();
    let exported = old.export().join("\n");
    new.run_with(&["import", "--protected", "-"], exported.as_bytes()).ok();
    assert_eq!(new.exported_ids(), old.exported_ids());
    assert_eq!(new.exported_ids().len(), 3);
}

/// Keys in filters are read as npub, nprofile and hex, wherever a filter holds one.
#[test]
fn keys_are_read_in_every_spelling() {
    let binary = Binary::new();
    let (author, other) = (Keys::new(1), Keys::new(2));
    let note = author.draft(1, NOW).tag(["p", &other.hex()]).tag(["P", &other.hex()]).sign();
    binary.import([&note, &other.note(NOW, "")]);
    let npub = |keys: &Keys| nip19::encode(Form::Npub, &keys.pubkey().0);
    for filter in [
        json!({"authors": [npub(&author)]}),
        json!({"authors": [author.hex().to_uppercase()]}),
        json!({"#p": [npub(&other)]}),
        json!({"#P": [npub(&other)]}),
        json!({"#P": [other.hex()]}),
        json!({"ids": [nip19::encode(Form::Note, &note.id.0)]}),
    ] {
        let filter = filter.to_string();
        assert_eq!(id_of(binary.run(&["query", &filter]).ok().trim()), note.id.to_hex(), "{filter}");
        assert_eq!(binary.run(&["count", &filter]).ok().trim(), "1", "{filter}");
        assert_eq!(id_of(binary.run(&["export", "--filter", &filter]).ok().trim()), note.id.to_hex(), "{filter}");
    }
}
