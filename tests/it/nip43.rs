//! NIP-43, members of the relay: invitations, requests to join and leave, and the list that the relay signs.

use serde_json::{Value, json};
use sledge::config::Writers;
use sledge::protocol::Event;

use crate::http::request;
use crate::nip86::{call, managed};
use crate::support::{Binary, Keys, NOW, Relay, ids};

async fn with_members(may_invite: bool) -> Relay {
    managed(|config| {
        config.members.enabled = true;
        config.members.may_invite = may_invite;
        config.access.write = Writers::Listed;
    })
    .await
}

async fn relay_key(relay: &Relay) -> String {
    let response = request(relay.addr(), "GET / HTTP/1.1", &["Accept: application/nostr+json"]).await;
    let info: Value = serde_json::from_str(&response.body).unwrap();
    info["self"].as_str().expect("NIP-11 tells the relay's own key").to_owned()
}

fn join(keys: &Keys, at: u64, claim: &str) -> Event {
    keys.draft(28_934, at).tag(["-"]).tag(["claim", claim]).sign()
}

/// The keys in `member` tags of the one list that is stored.
fn members_of(list: &Value) -> Vec<&str> {
    let tags = list["tags"].as_array().unwrap();
    tags.iter().filter(|tag| tag[0] == "member").map(|tag| tag[1].as_str().unwrap()).collect()
}

/// Somebody joins with an invitation and may publish, leaves and may not; both are told live, in events that the relay signs
/// and that hold the tag of NIP-70. The requests go to nobody.
#[tokio::test]
async fn joining_and_leaving() {
    let relay = with_members(false).await;
    let own = relay_key(&relay).await;
    // The writer has published the first list before it answers this.
    call(&relay, "removemember", json!([Keys::new(9).hex()])).await;
    let (mut client, mut reader) = (relay.client().await, relay.client().await);
    let list = json!({"kinds": [13_534], "authors": [own]});
    assert_eq!(members_of(&reader.req("list", std::slice::from_ref(&list)).await.events[0]), [""; 0]);
    reader.req("all", &[json!({"kinds": [8_000, 8_001, 28_934, 28_936]})]).await;
    let keys = Keys::new(1);
    client.prove(&keys).await;
    let note = keys.note(NOW, "hello");
    let (accepted, text) = client.publish(&note).await;
    assert!(!accepted && text.starts_with("restricted: "), "{text}");
    let (accepted, text) = client.publish(&join(&keys, NOW, "guess")).await;
    assert!(!accepted && text.starts_with("restricted: "), "{text}");

    let invite = call(&relay, "createinvite", json!([])).await;
    let code = invite["claim"].as_str().unwrap();
    let (accepted, text) = client.publish(&join(&keys, NOW - 1_000, code)).await;
    assert!(!accepted && text.starts_with("invalid: "), "{text}");
    let (accepted, text) = client.publish(&join(&keys, NOW, code)).await;
    assert!(accepted && text.starts_with("info: welcome"), "{text}");
    let (accepted, text) = client.publish(&join(&keys, NOW + 1, code)).await;
    assert!(accepted && text.starts_with("duplicate: "), "{text}");
    let live = reader.live("list").await;
    assert_eq!((members_of(&live), &live["tags"][0]), (vec![keys.hex().as_str()], &json!(["-"])));
    let added = reader.live("all").await;
    assert_eq!(
        (&added["kind"], &added["pubkey"], &added["tags"][1]),
        (&json!(8_000), &json!(own), &json!(["p", keys.hex()]))
    );
    client.store(&note).await;

    let (accepted, text) = client.publish(&keys.draft(28_936, NOW).sign()).await;
    assert!(!accepted && text.starts_with("invalid: "), "without the tag of NIP-70: {text}");
    let (accepted, text) = client.publish(&keys.draft(28_936, NOW).tag(["-"]).sign()).await;
    assert!(accepted && text.starts_with("info: "), "{text}");
    assert_eq!(reader.live("all").await["kind"], 8_001);
    assert_eq!(members_of(&reader.live("list").await), [""; 0]);
    assert!(!client.publish(&keys.note(NOW, "still here?")).await.0);
    assert_eq!(reader.query(list).await.events.len(), 1, "one list, the newest");
}

/// A request to join that somebody else sends, and one where there are no members.
#[tokio::test]
async fn requests_of_others() {
    let relay = with_members(false).await;
    let code = call(&relay, "createinvite", json!([])).await["claim"].as_str().unwrap().to_owned();
    let mut client = relay.client().await;
    let request = join(&Keys::new(1), NOW, &code);
    let (accepted, text) = client.publish(&request).await;
    assert!(!accepted && text.starts_with("auth-required: "), "{text}");
    client.prove(&Keys::new(2)).await;
    let (accepted, text) = client.publish(&request).await;
    assert!(!accepted && text.starts_with("restricted: "), "{text}");
    let closed = Relay::start().await;
    let mut client = closed.client().await;
    client.prove(&Keys::new(1)).await;
    let (accepted, text) = client.publish(&request).await;
    assert!(!accepted && text.starts_with("restricted: "), "{text}");
}

/// Who asks for an invitation gets one if he may: signed by the relay, before EOSE, good for one, and never stored.
#[tokio::test]
async fn invitations_are_made_when_asked_for() {
    let relay = with_members(true).await;
    let own = relay_key(&relay).await;
    let asked = json!({"kinds": [28_935]});
    let (mut member, mut guest) = (relay.client().await, relay.client().await);
    let text = member.refused("invite", std::slice::from_ref(&asked)).await;
    assert!(text.starts_with("auth-required: "), "{text}");
    let keys = Keys::new(1);
    member.prove(&keys).await;
    let text = member.refused("invite", std::slice::from_ref(&asked)).await;
    assert!(text.starts_with("restricted: "), "{text}");
    call(&relay, "addmember", json!([keys.hex()])).await;
    let stored = member.query(asked.clone()).await;
    let [invite] = &stored.events[..] else { panic!("{stored:?}") };
    assert_eq!((&invite["kind"], &invite["pubkey"]), (&json!(28_935), &json!(own)));
    let claim = invite["tags"].as_array().unwrap().iter().find(|tag| tag[0] == "claim").unwrap();
    assert_eq!(member.query(json!({"kinds": [28_935], "authors": [keys.hex()]})).await.events.len(), 0);
    let friend = Keys::new(2);
    guest.prove(&friend).await;
    assert!(guest.publish(&join(&friend, NOW, claim[1].as_str().unwrap())).await.0);
    guest.store(&friend.note(NOW, "in")).await;
    assert_eq!(guest.count(&[asked]).await, 0);
}

/// Members, invitations and the relay's key are there after a restart; the key is its user's alone. Whoever is banned is no
/// member any more.
#[tokio::test]
async fn members_outlive_a_restart() {
    let relay = with_members(false).await;
    let own = relay_key(&relay).await;
    let keys = Keys::new(1);
    call(&relay, "addmember", json!([keys.hex()])).await;
    call(&relay, "createrole", json!(["28b7", "king"])).await;
    call(&relay, "assignrole", json!([keys.hex(), "28b7"])).await;
    let relay = relay.restart().await;
    assert_eq!(relay_key(&relay).await, own);
    let mut client = relay.client().await;
    client.store(&keys.note(NOW, "")).await;
    let list = client.query(json!({"kinds": [13_534]})).await.events.remove(0);
    assert!(list["tags"].as_array().unwrap().contains(&json!(["member", keys.hex(), "28b7"])), "{list}");
    assert_eq!(client.query(json!({"kinds": [33_534]})).await.events.len(), 1);
    call(&relay, "deleterole", json!(["28b7"])).await;
    assert_eq!(client.query(json!({"kinds": [33_534]})).await.events.len(), 0);
    call(&relay, "banpubkey", json!([keys.hex()])).await;
    assert_eq!(call(&relay, "listmembers", json!([])).await, json!([]));
    assert_eq!(client.query_ids(json!({"kinds": [1]})).await, ids([]));
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(relay.dir().join("state/relay-key")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}

/// The key may be the operator's own, in a file; the binary says what is wrong with a wrong one.
#[test]
fn the_relays_key_may_be_in_a_file() {
    let binary = Binary::new();
    binary.import([]);
    let file = binary.file("relay.nsec", "no key");
    let configure = || binary.configure(&format!("[members]\nenabled = true\nkey_file = \"{file}\"\n"));
    configure();
    let error = binary.run(&["admin", "invite"]).fails(1);
    assert!(error.contains("relay.nsec"), "{error}");
    binary.run(&["key", "generate", "--out", binary.file("other", "").replace("other", "new.nsec").as_str()]).ok();
    std::fs::rename(file.replace("relay.nsec", "new.nsec"), &file).unwrap();
    let invited = binary.run(&["admin", "invite", "3", "--json"]).ok();
    let invited: Value = serde_json::from_str(&invited).unwrap();
    assert_eq!(invited["uses"], 3);
    assert!(!binary.data().join("state/relay-key").exists());
}
