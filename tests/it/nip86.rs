//! NIP-86, relay management, over NIP-98: each method through a real socket, and every token that must not hold.

use std::net::SocketAddr;

use data_encoding::BASE64;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sledge::config::Config;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::http::request;
use crate::support::client::soon;
use crate::support::relay::SERVICE_URL;
use crate::support::signer::Draft;
use crate::support::{Binary, Client, Keys, NOW, Relay, ids, json_of};

/// Whose key administers the relays of these tests.
pub fn admin() -> Keys {
    Keys::new(86)
}

pub async fn managed(change: impl FnOnce(&mut Config)) -> Relay {
    Relay::with(|config| {
        config.access.admins = vec![admin().hex()];
        change(config);
    })
    .await
}

fn draft(keys: &Keys, at: u64, url: &str, method: &str, body: &[u8]) -> Draft {
    let hash = faster_hex::hex_string(Sha256::digest(body).as_slice());
    keys.draft(27_235, at).tag(["u", url]).tag(["method", method]).tag(["payload", &hash])
}

fn header(draft: Draft) -> String {
    format!("Authorization: Nostr {}", BASE64.encode(json_of(&draft.sign()).as_bytes()))
}

/// Posts a body with these headers; status and answer.
async fn post(addr: SocketAddr, headers: &[&str], body: &[u8]) -> (u16, Value) {
    let mut stream = TcpStream::connect(addr).await.expect("the relay listens");
    let mut head = format!("POST / HTTP/1.1\r\nHost: relay.example.com\r\nContent-Length: {}\r\n", body.len());
    head += "Content-Type: application/nostr+json+rpc\r\nConnection: close\r\n";
    headers.iter().for_each(|header| head += &format!("{header}\r\n"));
    stream.write_all((head + "\r\n").as_bytes()).await.expect("the relay reads");
    // Too large a body is not read to its end.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = soon("the response", stream.read_to_end(&mut answer)).await;
    let answer = String::from_utf8(answer).expect("text");
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    let body = answer.split_once("\r\n\r\n").expect("a response has a head").1;
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

/// Calls a method as `keys`; tokens differ by a nonce, since one is good once.
async fn call_as(keys: &Keys, relay: &Relay, method: &str, params: Value) -> (u16, Value) {
    let body = json!({"method": method, "params": params}).to_string();
    let token = draft(keys, NOW, SERVICE_URL, "POST", body.as_bytes()).tag(["nonce", &nonce()]);
    post(relay.addr(), &[&header(token)], body.as_bytes()).await
}

fn nonce() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed).to_string()
}

/// Calls a method as the admin; its result.
pub async fn call(relay: &Relay, method: &str, params: Value) -> Value {
    let (status, answer) = call_as(&admin(), relay, method, params).await;
    assert_eq!((status, answer.get("error")), (200, None), "{method}: {answer}");
    answer["result"].clone()
}

async fn info(relay: &Relay) -> Value {
    let response = request(relay.addr(), "GET / HTTP/1.1", &["Accept: application/nostr+json"]).await;
    serde_json::from_str(&response.body).unwrap()
}

/// A token must be there, whole, fresh, for this URL, method and body, signed, and new; else 401 and nothing is done. A
/// good one of somebody else gets 403.
#[tokio::test]
async fn t35_only_good_tokens_of_admins_are_acted_upon() {
    let relay = managed(|_| {}).await;
    let body = json!({"method": "disallowkind", "params": [7]}).to_string();
    let body = body.as_bytes();
    let admin = admin();
    let good = |at, url: &str, method: &str, of: &[u8]| header(draft(&admin, at, url, method, of));
    let mut forged = draft(&admin, NOW, SERVICE_URL, "POST", body).sign();
    forged.sig.0[7] ^= 1;
    for (what, headers) in [
        ("no token", String::new()),
        ("another scheme", "Authorization: Bearer x".to_owned()),
        ("no Base64", "Authorization: Nostr ???".to_owned()),
        ("no event", format!("Authorization: Nostr {}", BASE64.encode(b"{}"))),
        ("stale", good(NOW - 61, SERVICE_URL, "POST", body)),
        ("ahead", good(NOW + 61, SERVICE_URL, "POST", body)),
        ("another relay", good(NOW, "wss://other.example.com/", "POST", body)),
        ("another path", good(NOW, "https://relay.example.com/admin", "POST", body)),
        ("another method", good(NOW, SERVICE_URL, "GET", body)),
        ("another body", good(NOW, SERVICE_URL, "POST", b"{}")),
        ("no payload", header(admin.draft(27_235, NOW).tag(["u", SERVICE_URL]).tag(["method", "POST"]))),
        ("another kind", header(admin.draft(1, NOW).tag(["u", SERVICE_URL]))),
        ("forged", format!("Authorization: Nostr {}", BASE64.encode(json_of(&forged).as_bytes()))),
    ] {
        let headers: Vec<&str> = Some(headers.as_str()).into_iter().filter(|header| !header.is_empty()).collect();
        let (status, answer) = post(relay.addr(), &headers, body).await;
        assert_eq!(status, 401, "{what}: {answer}");
        assert!(answer["error"].is_string() && answer.get("result").is_none(), "{what}: {answer}");
    }
    let stranger = header(draft(&Keys::new(1), NOW, SERVICE_URL, "POST", body));
    assert_eq!(post(relay.addr(), &[&stranger], body).await.0, 403);
    assert_eq!(call(&relay, "listdisallowedkinds", json!([])).await, json!([]), "nothing was done");

    let token = good(NOW, "https://Relay.Example.com:443", "POST", body);
    assert_eq!(post(relay.addr(), &[&token], body).await, (200, json!({"result": true})));
    assert_eq!(post(relay.addr(), &[&token], body).await.0, 401, "a token is good once");
    relay.set_now(NOW + 60);
    assert_eq!(post(relay.addr(), &[&token], body).await.0, 401, "as long as it lives");
    let mut client = relay.client().await;
    let (accepted, text) = client.publish(&draft(&admin, NOW, SERVICE_URL, "POST", body).sign()).await;
    assert!(!accepted && text.starts_with("invalid: "), "a token is broadcast to nobody: {text}");
}

/// What is no call is answered as what it is; a body has a bound; a page of any origin may call.
#[tokio::test]
async fn strange_calls_are_answered() {
    let relay = managed(|_| {}).await;
    for (body, status) in [("nonsense", 400), ("{}", 400), (r#"{"method":"explode"}"#, 200), (r#"{"method":1}"#, 400)] {
        let token = header(draft(&admin(), NOW, SERVICE_URL, "POST", body.as_bytes()));
        let answer = post(relay.addr(), &[&token], body.as_bytes()).await;
        assert!(answer.0 == status && answer.1["error"].is_string(), "{body}: {answer:?}");
    }
    let large = vec![b' '; 65 * 1024];
    let token = header(draft(&admin(), NOW, SERVICE_URL, "POST", &large));
    assert_eq!(post(relay.addr(), &[&token], &large).await.0, 413);
    let other = request(relay.addr(), "POST / HTTP/1.1", &["Content-Type: text/plain", "Content-Length: 0"]).await;
    assert_eq!(other.status, 405);
    let preflight = request(relay.addr(), "OPTIONS / HTTP/1.1", &["Origin: https://admin.example.com"]).await;
    let allowed = |name: &str| preflight.header(name).unwrap().to_ascii_lowercase();
    assert!(allowed("access-control-allow-methods").contains("post"));
    assert!(allowed("access-control-allow-headers").contains("authorization"));
    relay.client().await.assert_alive().await;
}

/// `supportedmethods` says what may be called, and each of these works or names what it lacks; without admins nothing of it
/// is announced.
#[tokio::test]
async fn supported_methods_are_true() {
    let relay = managed(|config| config.members.enabled = true).await;
    let methods = call(&relay, "supportedmethods", json!([])).await;
    let methods: Vec<&str> = methods.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for name in [
        "banpubkey",
        "unbanpubkey",
        "listbannedpubkeys",
        "allowpubkey",
        "unallowpubkey",
        "listallowedpubkeys",
        "createrole",
        "editrole",
        "deleterole",
        "assignrole",
        "unassignrole",
        "listeventsneedingmoderation",
        "allowevent",
        "banevent",
        "listbannedevents",
        "changerelayname",
        "changerelaydescription",
        "changerelayicon",
        "allowkind",
        "disallowkind",
        "listallowedkinds",
        "blockip",
        "unblockip",
        "listblockedips",
    ] {
        assert!(methods.contains(&name), "{name} is missing");
    }
    for name in &methods {
        let (status, answer) = call_as(&admin(), &relay, name, json!([])).await;
        let known = answer["error"].as_str().is_none_or(|error| !error.contains("does not know"));
        assert!(status == 200 && known, "{name}: {answer}");
        assert!(answer.get("result").is_some() || answer["error"].is_string(), "{name}: {answer}");
    }
    let nips = |info: &Value| info["supported_nips"].as_array().unwrap().clone();
    let announced = nips(&info(&relay).await);
    assert!([43, 56, 86, 98].iter().all(|nip| announced.contains(&json!(nip))), "{announced:?}");
    let plain = nips(&info(&Relay::start().await).await);
    assert!([43, 86, 98].iter().all(|nip| !plain.contains(&json!(nip))), "{plain:?}");
}

/// A banned key's events are gone, stay out by every door, and come back in when the ban is lifted.
#[tokio::test]
async fn banpubkey_removes_and_keeps_out() {
    let relay = managed(|_| {}).await;
    let (mut client, mut reader) = (relay.client().await, relay.client().await);
    let (spammer, other) = (Keys::new(1), Keys::new(2));
    let notes: Vec<_> = (0..30).map(|n| spammer.note(NOW - n, "buy")).collect();
    client.store_all(&notes).await;
    let kept = other.note(NOW, "hello");
    client.store(&kept).await;
    reader.req("live", &[json!({"limit": 0})]).await;
    assert_eq!(call(&relay, "banpubkey", json!([spammer.hex(), "spam"])).await, true);
    assert_eq!(client.query_ids(json!({})).await, ids([&kept]));
    for event in [&notes[0], &spammer.note(NOW, "more"), &spammer.draft(20_001, NOW).sign()] {
        let (accepted, text) = client.publish(event).await;
        assert!(!accepted && text.starts_with("blocked: "), "{text}");
    }
    let last = other.note(NOW, "last");
    client.store(&last).await;
    assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids([]));
    let listed = json!([{"pubkey": spammer.hex(), "reason": "spam"}]);
    assert_eq!(call(&relay, "listbannedpubkeys", json!([])).await, listed);

    let relay = relay.restart().await;
    let mut client = relay.client().await;
    assert!(!client.publish(&notes[0]).await.0, "after a restart");
    assert_eq!(call(&relay, "unbanpubkey", json!([spammer.hex()])).await, true);
    assert_eq!(call(&relay, "listbannedpubkeys", json!([])).await, json!([]));
    client.store(&notes[0]).await;
    let stopped = relay.stop().await;
    let binary = Binary::on(stopped.dir());
    binary.run(&["admin", "banpubkey", &spammer.hex()]).ok();
    binary.import([&notes[1], &other.note(NOW - 1, "")]);
    assert_eq!(binary.exported_ids().len(), 3, "import keeps it out too");
}

/// Where only listed keys may publish, one is let in, and out again; allowing lifts a ban.
#[tokio::test]
async fn allowpubkey_lets_in() {
    let relay = managed(|config| config.access.write = sledge::config::Writers::Listed).await;
    let mut client = relay.client().await;
    let author = Keys::new(1);
    let (accepted, text) = client.publish(&author.note(NOW, "")).await;
    assert!(!accepted && text.starts_with("auth-required: "), "{text}");
    call(&relay, "banpubkey", json!([author.hex()])).await;
    call(&relay, "allowpubkey", json!([author.hex(), "a friend"])).await;
    assert_eq!(call(&relay, "listbannedpubkeys", json!([])).await, json!([]));
    let listed = json!([{"pubkey": author.hex(), "reason": "a friend"}]);
    assert_eq!(call(&relay, "listallowedpubkeys", json!([])).await, listed);
    client.store(&author.note(NOW, "")).await;
    call(&relay, "unallowpubkey", json!([author.hex()])).await;
    assert!(!client.publish(&author.note(NOW, "more")).await.0);
    assert_eq!(info(&relay).await["limitation"]["restricted_writes"], true);
}

/// Reported events wait for a decision: a ban removes one and keeps it out, allowing leaves it.
#[tokio::test]
async fn reports_are_moderated() {
    let relay = managed(|_| {}).await;
    let mut client = relay.client().await;
    let (author, reporter) = (Keys::new(1), Keys::new(2));
    let (bad, fine) = (author.note(NOW, "bad"), author.note(NOW - 1, "fine"));
    client.store_all([&bad, &fine]).await;
    for (at, event, what) in [(NOW, &bad, "spam"), (NOW - 1, &fine, "nudity")] {
        let report = reporter.draft(1984, at).tag(["e", &event.id.to_hex(), what]).tag(["p", &author.hex()]);
        client.store(&report.sign()).await;
    }
    let queue = call(&relay, "listeventsneedingmoderation", json!([])).await;
    let entry = |event: &sledge::protocol::Event, reason: &str| json!({"id": event.id.to_hex(), "reason": reason});
    assert_eq!(queue, json!([entry(&bad, "spam (reported by 1)"), entry(&fine, "nudity (reported by 1)")]));
    call(&relay, "banevent", json!([bad.id.to_hex(), "spam"])).await;
    call(&relay, "allowevent", json!([fine.id.to_hex(), "art"])).await;
    assert_eq!(call(&relay, "listeventsneedingmoderation", json!([])).await, json!([]));
    assert_eq!(call(&relay, "listbannedevents", json!([])).await, json!([entry(&bad, "spam")]));
    assert_eq!(call(&relay, "listallowedevents", json!([])).await, json!([entry(&fine, "art")]));
    assert_eq!(client.query_ids(json!({"kinds": [1]})).await, ids([&fine]));
    let (accepted, text) = client.publish(&bad).await;
    assert!(!accepted && text.starts_with("blocked: "), "{text}");
    call(&relay, "unbanevent", json!([bad.id.to_hex()])).await;
    call(&relay, "unallowevent", json!([fine.id.to_hex()])).await;
    client.store(&bad).await;
    assert_eq!(call(&relay, "listeventsneedingmoderation", json!([])).await.as_array().unwrap().len(), 2);
}

/// Kinds are refused and accepted at once, for connections that are open too.
#[tokio::test]
async fn kinds_are_disallowed_and_allowed() {
    let relay = managed(|_| {}).await;
    let mut client = relay.client().await;
    let reaction = |content: &str| Keys::new(1).draft(7, NOW).content(content).sign();
    client.store(&reaction("+")).await;
    call(&relay, "disallowkind", json!([7])).await;
    assert_eq!(call(&relay, "listdisallowedkinds", json!([])).await, json!([7]));
    let (accepted, text) = client.publish(&reaction("-")).await;
    assert!(!accepted && text.starts_with("blocked: events of kind 7"), "{text}");
    call(&relay, "allowkind", json!([7])).await;
    client.store(&reaction("-")).await;
    call(&relay, "allowkind", json!([1])).await;
    assert_eq!(call(&relay, "listallowedkinds", json!([])).await, json!([1]));
    assert!(!client.publish(&reaction("?")).await.0);
    client.store(&Keys::new(1).note(NOW, "")).await;
}

/// Name, description and icon are told at once, and after a restart.
#[tokio::test]
async fn the_relays_texts_change_at_once() {
    let mut relay = managed(|_| {}).await;
    for (method, text) in [
        ("changerelayname", "Tea"),
        ("changerelaydescription", "with milk"),
        ("changerelayicon", "https://example.com/tea.png"),
    ] {
        call(&relay, method, json!([text])).await;
    }
    for _ in 0..2 {
        let info = info(&relay).await;
        let told = ["name", "description", "icon"].map(|key| info[key].clone());
        assert_eq!(told, [json!("Tea"), json!("with milk"), json!("https://example.com/tea.png")]);
        relay = relay.restart().await;
    }
}

/// A blocked address is closed at once, whatever it was doing, and not served again until it is unblocked. Behind a trusted
/// proxy the client is meant, not the proxy.
#[tokio::test]
async fn blocked_addresses_are_closed() {
    let relay = managed(|_| {}).await;
    let from = |ip: &'static str| Client::try_connect_from(relay.addr(), ip);
    let (mut blocked, mut other) = (from("203.0.113.9").await.unwrap(), from("198.51.100.1").await.unwrap());
    blocked.req("live", &[json!({})]).await;
    call(&relay, "blockip", json!(["203.0.113.0/24", "bots"])).await;
    blocked.assert_closed().await;
    assert!(from("203.0.113.77").await.is_err());
    other.assert_alive().await;
    let listed = json!([{"ip": "203.0.113.0/24", "reason": "bots"}]);
    assert_eq!(call(&relay, "listblockedips", json!([])).await, listed);
    let document = ["Accept: application/nostr+json", "X-Forwarded-For: 203.0.113.9"];
    assert_eq!(request(relay.addr(), "GET / HTTP/1.1", &document).await.status, 403);
    call(&relay, "unblockip", json!(["203.0.113.0/24"])).await;
    assert!(from("203.0.113.9").await.is_ok());
}

/// Single methods are granted to others, who may call those and no more.
#[tokio::test]
async fn methods_are_assigned() {
    let relay = managed(|_| {}).await;
    let helper = Keys::new(3);
    let id = "1".repeat(64);
    assert_eq!(call_as(&helper, &relay, "banevent", json!([id])).await.0, 403);
    assert_eq!(call(&relay, "assignmethod", json!([helper.hex(), "banevent"])).await, json!([true, ""]));
    assert_eq!(call_as(&helper, &relay, "banevent", json!([id])).await, (200, json!({"result": true})));
    let (_, supported) = call_as(&helper, &relay, "supportedmethods", json!([])).await;
    assert_eq!(supported["result"], json!(["supportedmethods", "banevent"]));
    assert!(call_as(&helper, &relay, "blockip", json!(["10.0.0.1"])).await.1["error"].is_string());
    let listed = json!([{"pubkey": helper.hex(), "methods": ["banevent"]}]);
    assert_eq!(call(&relay, "listmethodassignees", json!([])).await, listed);
    call(&relay, "unassignmethod", json!([helper.hex(), "banevent"])).await;
    assert_eq!(call_as(&helper, &relay, "banevent", json!([id])).await.0, 403);
}

/// The command line reaches the running relay, takes an npub, and decides at once.
#[tokio::test]
async fn the_command_line_manages_a_running_relay() {
    let binary = Binary::new();
    binary.configure(&format!("service_url = \"{SERVICE_URL}\"\n"));
    let author = Keys::new(1);
    binary.import([&author.note(NOW, "spam")]);
    let serving = binary.serve();
    let mut client = Client::connect(serving.addr()).await;
    assert_eq!(client.count(&[json!({})]).await, 1);
    let npub = sledge::protocol::nip19::encode(sledge::protocol::nip19::Form::Npub, &author.pubkey().0);
    let listed = tokio::task::spawn_blocking(move || {
        assert_eq!(binary.run(&["admin", "banpubkey", &npub, "spam"]).ok(), "done\n");
        let listed = binary.run(&["admin", "listbannedpubkeys", "--json"]).ok();
        assert!(binary.run(&["admin", "explode"]).fails(1).contains("does not know the method"));
        listed
    });
    let listed: Value = serde_json::from_str(&listed.await.unwrap()).unwrap();
    assert_eq!(listed, json!([{"pubkey": author.hex(), "reason": "spam"}]));
    assert_eq!(client.count(&[json!({})]).await, 0);
    assert!(!client.publish(&author.note(NOW, "more")).await.0);
}
