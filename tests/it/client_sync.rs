//! The client against relays: what was written offline arrives everywhere, once, and what was answered is not lost.

use serde_json::json;
use sledge::client::clock::World;
use sledge::client::profile::Answer;
use sledge::client::status::LinkState;
use sledge::protocol::{Event, Filter, Kind, Tags};
use sledge::sync::chat::{ChatKey, ChatView};
use sledge::sync::clock::{Device as HlcDevice, Hlc, Written};
use sledge::sync::draft::{Draft, Op};
use sledge::sync::nip44::Nip44;
use sledge::sync::settings::Settings;

use super::support::device::{self, signed, today};
use super::support::{Device, Relay, json_of};

const LABEL: &[&str] = &["L", "com.openagents.sync"];
const CHAT: &[&str] = &["l", "chat.msg/1", "com.openagents.sync"];
const TRAINING: &[&str] = &["l", "training/1", "com.openagents.sync"];
const PROTECTED: &[&str] = &["-"];

async fn relay() -> Relay {
    relay_with(|_| {}).await
}

async fn relay_with(change: impl FnOnce(&mut sledge::config::Config)) -> Relay {
    let relay = Relay::with(|config| {
        config.service_url = String::new();
        change(config);
    })
    .await;
    relay.set_now(today());
    relay
}

fn url(relay: &Relay) -> String {
    format!("ws://{}", relay.addr())
}

/// A private message of a chat, which only its author may publish and read.
fn private(device: &Device, at: u64, d: &str, content: &str) -> sledge::protocol::Event {
    device.publish(30_001, at, &[LABEL, CHAT, PROTECTED, &["d", d]], content)
}

/// Two devices write offline, private things too, meet at a relay one after the other, and are equal; the relay has it
/// all. Another visit moves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn two_devices_meet_at_a_relay() {
    let relay = relay().await;
    let [a, b] = [1, 1].map(|user| Device::new(user, &[&url(&relay)]));
    let now = today();
    for number in 0..30 {
        private(&a, now - 1_000 + number, &format!("oa:m:c:a{number}"), "from a");
        private(&b, now - 5_000 + number, &format!("oa:m:c:b{number}"), "from b");
    }
    a.publish(1, now, &[], "in public");
    assert_eq!((a.waiting(), b.waiting()), (31, 30));
    a.sync().await;
    b.sync().await;
    a.sync().await;
    assert_eq!((a.waiting(), b.waiting()), (0, 0));
    assert_eq!(a.ids(), b.ids());
    assert_eq!(a.ids().len(), 61);
    let mut public = relay.client().await;
    assert_eq!(public.count(&[json!({})]).await, 1, "a stranger sees what is public");
    b.sync().await;
    let status = b.profile().status().borrow().clone();
    let at_relay = &status.relays[&device::relay_url(&url(&relay))];
    assert_eq!((at_relay.fetched, at_relay.uploaded, at_relay.trouble.as_str()), (0, 0, ""));
}

/// Old dates are no obstacle: what an offline device wrote a year ago arrives at one that has newer events.
#[tokio::test(flavor = "multi_thread")]
async fn old_events_arrive_too() {
    let relay = relay().await;
    let [a, b] = [1, 1].map(|user| Device::new(user, &[&url(&relay)]));
    private(&a, today(), "oa:m:c:new", "");
    a.sync().await;
    private(&b, today() - 365 * 86_400, "oa:m:c:old", "");
    b.sync().await;
    a.sync().await;
    assert_eq!(a.ids(), b.ids());
    assert_eq!(a.ids().len(), 2);
}

/// A deletion reaches a device that still has the event and is about to say so; the event does not come back anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn t12_what_was_deleted_does_not_come_back() {
    let relay = relay().await;
    let [a, b] = [1, 1].map(|user| Device::new(user, &[&url(&relay)]));
    let event = private(&a, today() - 10, "oa:m:c:1", "regrettable");
    a.sync().await;
    b.sync().await;
    assert_eq!(b.ids(), [event.id.to_hex()]);
    let address = format!("30001:{}:oa:m:c:1", event.pubkey);
    let request = a.publish(5, today() - 5, &[LABEL, CHAT, PROTECTED, &["a", &address]], "");
    a.sync().await;
    for device in [&b, &a, &b] {
        device.sync().await;
        assert_eq!(device.ids(), [request.id.to_hex()]);
    }
}

/// A relay that lost its data gets it back from whoever has it, although nothing is owed to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_forgetful_relay_is_reminded() {
    let relay = relay().await;
    let addr = relay.addr();
    let relay_url = url(&relay);
    let [a, b] = [1, 1].map(|user| Device::new(user, &[&relay_url]));
    for number in 0..5 {
        private(&a, today() - number, &number.to_string(), "");
    }
    a.sync().await;
    relay.stop().await;
    let forgetful = relay_with(|config| config.listen = addr).await;
    a.sync().await;
    b.sync().await;
    assert_eq!(b.ids(), a.ids());
    assert_eq!(b.ids().len(), 5);
    drop(forgetful);
}

/// Training data goes to its allow-list only, chats to the home relays only, whatever is uploaded or owed.
#[tokio::test(flavor = "multi_thread")]
async fn labelled_events_stay_on_their_relays() {
    let (home, training) = (relay().await, relay().await);
    let on = |home: &[&str], training: &[&str]| {
        let training = training.iter().map(|url| (*url).to_owned()).collect();
        Device::with(1, home, |options| options.training_relays = training)
    };
    let (home_url, training_url) = (url(&home), url(&training));
    let device = on(&[&home_url], &[&training_url]);
    let chat = private(&device, today(), "oa:m:c:1", "mine");
    let given = device.publish(1, today(), &[LABEL, TRAINING, &["t", "training"]], "for all");
    device.sync().await;
    assert_eq!(device.waiting(), 0);
    for (only, expected) in [(on(&[&home_url], &[]), &chat), (on(&[], &[&training_url]), &given)] {
        only.sync().await;
        assert_eq!(only.ids(), [expected.id.to_hex()]);
    }
    let error = on(&[&home_url], &[]).profile().publish(signed(1, 1, today(), &[LABEL, TRAINING], "")).unwrap_err();
    assert!(error.to_string().contains("training_relays"), "{error}");
}

/// Two home relays end equal, through a device that meets both.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_carries_from_relay_to_relay() {
    let (first, second) = (relay().await, relay().await);
    let writer = Device::new(1, &[&url(&first)]);
    for number in 0..10 {
        private(&writer, today() - number, &number.to_string(), "");
    }
    writer.sync().await;
    let carrier = Device::new(1, &[&url(&first), &url(&second)]);
    carrier.sync().await;
    let reader = Device::new(1, &[&url(&second)]);
    reader.sync().await;
    assert_eq!(reader.ids(), writer.ids());
}

/// A relay that takes nothing from strangers gets the proof, and then the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_wants_proof_gets_it() {
    let relay = relay_with(|config| {
        config.access.auth_required_to_read = true;
        config.access.auth_required_to_write = true;
    })
    .await;
    let [a, b] = [1, 1].map(|user| Device::new(user, &[&url(&relay)]));
    private(&a, today(), "oa:m:c:1", "");
    a.sync().await;
    b.sync().await;
    assert_eq!((a.waiting(), a.ids()), (0, b.ids()));
}

/// Devices of somebody else see nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn t34_another_user_gets_nothing() {
    let relay = relay().await;
    let [owner, stranger] = [1, 2].map(|user| Device::new(user, &[&url(&relay)]));
    private(&owner, today(), "oa:m:c:1", "");
    owner.sync().await;
    stranger.sync().await;
    assert!(stranger.ids().is_empty());
}

/// With links that stay up, a write on one device appears on the other by itself, and a relay that restarts changes
/// nothing about that.
#[tokio::test(flavor = "multi_thread")]
async fn live_links_carry_writes_at_once() {
    use sledge::client::links::Links;
    let relay = relay().await;
    let addr = relay.addr();
    let [a, b] = [1, 1].map(|user| Device::new(user, &[&format!("ws://{addr}")]));
    let links = [&a, &b].map(|device| Links::start(device.profile().clone(), device::quick()));
    let mut news = b.profile().news();
    let first = private(&a, today(), "oa:m:c:1", "");
    let came = super::support::client::soon("the event", news.recv()).await.unwrap();
    assert_eq!(json_of(&came), json_of(&first));
    let stopped = relay.stop().await;
    let second = private(&a, today(), "oa:m:c:2", "");
    let relay = stopped.start_on(addr).await;
    relay.set_now(today());
    let came = super::support::client::soon("the event", news.recv()).await.unwrap();
    assert_eq!(json_of(&came), json_of(&second));
    a.until("the outbox to be empty", |status| status.waiting == 0).await;
    for links in links {
        super::support::client::soon("the links to end", links.stop()).await;
    }
}

/// Two devices sign settings without knowing of each other. Whoever sees both heads sees the conflict, and publishes the
/// merge at its next visit; then everybody falls silent, with one head.
#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_of_settings_is_seen_and_merged() {
    let (first, second) = (relay().await, relay().await);
    let [a, b] = [&first, &second].map(|relay| Device::new(1, &[&url(relay)]));
    let heads = |device: &Device| device.profile().see(|all, _| all.settings.heads().count()).unwrap();
    // Each knows something that the other does not: no head says it all.
    set(&a, "theme", "dark");
    set(&a, "size", "large");
    a.sync().await;
    set(&b, "theme", "light");
    b.sync().await;
    let both = Device::new(1, &[&url(&first), &url(&second)]);
    for device in [&a, &b] {
        both.profile().take(device.profile().cache().query(&[Filter::default()], today()).unwrap()).unwrap();
    }
    let conflicts = both.profile().see(|all, _| all.settings.conflicts()).unwrap();
    assert_eq!(conflicts.len(), 1);
    assert_eq!((conflicts[0].winner.0.clone(), conflicts[0].others[0].0.clone()), (json!("light"), json!("dark")));
    for device in [&both, &a, &b, &both] {
        device.sync().await;
    }
    for device in [&a, &b, &both] {
        assert_eq!((heads(device), device.waiting()), (1, 0));
        assert_eq!(theme(device), Some(json!("light")));
    }
    let before = both.ids();
    for device in [&a, &b, &both] {
        device.sync().await;
    }
    assert_eq!(both.ids(), before, "at rest nobody publishes");
}

/// A device whose clock is a year ahead writes before one whose clock is right does: when both have met a relay, the later
/// write counts, as in real time.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_clock_wins_nothing() {
    const YEAR_MS: u64 = 365 * 86_400_000;
    let relay = relay().await;
    let mut wrong = Device::new(1, &[&url(&relay)]);
    let system = World::system();
    wrong.restart_in(World::with_clock(move || system.now_ms() + YEAR_MS));
    let right = Device::new(1, &[&url(&relay)]);
    set(&wrong, "theme", "first");
    set(&right, "theme", "second");
    for device in [&right, &wrong, &right] {
        device.sync().await;
    }
    assert_eq!((theme(&wrong), theme(&right)), (Some(json!("second")), Some(json!("second"))));
}

fn set(device: &Device, name: &str, value: &str) {
    let ops = Settings::set(name, &json!(value), false).unwrap();
    device.profile().write(ops.into()).unwrap();
}

fn theme(device: &Device) -> Option<serde_json::Value> {
    device.profile().see(|all, _| all.settings.fields().get("theme").cloned()).unwrap()
}

/// An app's view: what one device writes in a chat, the other is told of and sees, while both are online; a status says
/// when all has arrived.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_sees_what_another_device_writes() {
    use sledge::client::Client;
    use sledge::client::keys::Keys;
    use sledge::client::profile::ProfileOptions;

    use super::support::client::{PATIENCE, soon};

    let relay = relay().await;
    let dirs = [(), ()].map(|()| tempfile::tempdir().unwrap());
    let open = |dir: &tempfile::TempDir| {
        let options = ProfileOptions {
            dir: dir.path().to_owned(),
            relays: vec![url(&relay)],
            training_relays: Vec::new(),
            outbox_bytes_max: 1 << 20,
            memory_bytes: 1 << 20,
        };
        let keys = Keys::from_secret_bytes([1; 32]).unwrap();
        Client::open(&options, keys, device::quick(), World::system()).unwrap()
    };
    let (mut writer, mut reader) = (open(&dirs[0]), open(&dirs[1]));
    let messages = Filter::from_json(r#"{"kinds":[30001]}"#).unwrap();
    let (stored, mut news) = reader.subscribe(vec![messages]).unwrap();
    assert!(stored.is_empty());
    reader.go_online();
    writer.go_online();
    let chat = writer.chats().create("Lisbon").unwrap();
    let message = writer.chats().send(&chat, "user", "Where shall we stay?", json!({"model": "x"})).unwrap();
    for _ in 0..2 {
        soon("the head and the message", news.next()).await.unwrap();
    }
    let seen = reader.chats().messages(&chat).unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].message.id.as_str(), seen[0].message.meta["model"].as_str()), (message.as_str(), Some("x")));
    assert_eq!(reader.chats().list().unwrap()[0].title(), Some("Lisbon"));
    let mut status = writer.status();
    soon("an empty outbox", status.wait_for(|status| status.waiting == 0)).await.unwrap();
    for client in [writer, reader] {
        soon("the end", client.close(PATIENCE)).await.unwrap();
    }
}

/// Two devices change different fields of one head without knowing of each other. A third one sees both versions, of
/// which its cache keeps one, and stops before it has told anybody: what only the replaced version said is not lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_replaced_head_said_survives_a_crash() {
    let relay = relay().await;
    let nowhere = ["ws://127.0.0.1:9"];
    let writers = [Device::new(1, &nowhere), Device::new(1, &nowhere)];
    let versions: Vec<Event> = [("title", "Lisbon", 100), ("color", "blue", 50)]
        .into_iter()
        .zip(&writers)
        .map(|((field, value, ago), device)| head_of(device, field, value, today() - ago))
        .collect();
    let mut third = Device::new(1, &[&url(&relay)]);
    third.profile().take(versions[..1].to_vec()).unwrap();
    third.profile().take(versions[1..].to_vec()).unwrap();
    assert_eq!(third.ids(), [versions[1].id.to_hex()], "the cache keeps one version");
    third.restart();
    third.sync().await;
    let reader = Device::new(1, &[&url(&relay)]);
    reader.sync().await;
    let head = reader.profile().see(|all, _| all.chat_view([]).list().remove(0)).unwrap();
    assert_eq!((head.fields.get("title"), head.fields.get("color")), (Some(&json!("Lisbon")), Some(&json!("blue"))));
    assert_eq!(reader.ids().len(), 1);
}

/// A version of the head of chat `c` that says one field, as a device that knows nothing else signs it.
fn head_of(device: &Device, field: &str, value: &str, at: u64) -> Event {
    let profile = device.profile();
    let op = profile.see(|all, _| all.chat_view([]).set_field("c", field, json!(value))).unwrap();
    let stamp = Hlc::at(at * 1_000, HlcDevice(at));
    let draft = Draft { written: Written { local_ms: at * 1_000, floor: stamp, stamp, is_final: true }, op };
    let keys = profile.keys();
    let cipher = Nip44::new(&keys.secret_bytes(), || [3; 32]).unwrap();
    let unsigned = profile.see(|all, _| all.build(&[&draft], HlcDevice(at), &cipher).unwrap().unwrap()).unwrap();
    let tags = Tags::from_lists(unsigned.tags.iter().map(|tag| tag.iter().map(String::as_str)));
    (*keys.sign(unsigned.kind, unsigned.created_at, tags, unsigned.content)).clone()
}

/// A relay that tells no time takes the first of many messages; one that tells it follows, and this device's clock was
/// ahead. What was written last, a deletion of the first message, is not dated before it.
#[test]
fn what_is_signed_first_is_dated_first() {
    use sledge::client::profile::Arrival;
    const AHEAD_MS: i64 = 600_000;
    let urls = ["ws://no-date.example", "ws://dated.example"];
    let device = Device::new(1, &urls);
    let profile = device.profile();
    let write = |make: &dyn Fn(&ChatView<'_>) -> Op| {
        let op = profile.see(|all, drafts| make(&all.chat_view(drafts.iter().copied()))).unwrap();
        profile.write(vec![op]).unwrap();
    };
    let chat = ChatKey { owner: profile.keys().pubkey(), id: "c".to_owned() };
    for number in 0..80 {
        write(&|view| view.send(&chat, &format!("m{number}"), "user", "hello", json!(null)).unwrap());
    }
    write(&|view| view.delete(&chat, "m0").unwrap());
    let arrival = |clock_offset_ms| Arrival { proven: true, clock_offset_ms, slots: true };
    let sent = |url: &str, offset| {
        let relay = device::relay_url(url);
        profile.link_up(&relay, arrival(offset)).unwrap();
        let mut events: Vec<Event> = Vec::new();
        loop {
            let steps = profile.steps(&relay, 60_000).unwrap();
            if steps.events.is_empty() {
                return events;
            }
            events.extend(steps.events.iter().map(|json| Event::from_json(json).unwrap()));
            let answers = events.iter().map(|event| Answer { id: event.id, accepted: true, text: String::new() });
            if offset.is_some() {
                profile.answered(&relay, &answers.collect::<Vec<_>>()).unwrap();
            }
        }
    };
    let first = sent(urls[0], None);
    assert_eq!(first.len(), 64, "a window");
    let all = sent(urls[1], Some(-AHEAD_MS));
    let (message, deletion) = (&all[0], all.last().unwrap());
    assert_eq!((message, deletion.kind), (&first[0], Kind::DELETION));
    assert!(deletion.created_at >= message.created_at, "{} before {}", deletion.created_at, message.created_at);
}

/// A message of a shared chat is deleted: whoever could read it is told by the relay and shows it no longer, also
/// somebody who was taken out of the chat in the meantime.
#[tokio::test(flavor = "multi_thread")]
async fn t34_readers_of_a_message_learn_of_its_deletion() {
    let relay = relay().await;
    let [owner, friend, former] = [1, 2, 3].map(|user| Device::new(user, &[&url(&relay)]));
    let key = |device: &Device| device.profile().keys().pubkey();
    let chat = ChatKey { owner: key(&owner), id: "c".to_owned() };
    let write = |make: &dyn Fn(&ChatView<'_>) -> Op| {
        let op = owner.profile().see(|all, drafts| make(&all.chat_view(drafts.iter().copied()))).unwrap();
        owner.profile().write(vec![op]).unwrap();
    };
    let shown = |device: &Device| {
        device.profile().see(|all, drafts| all.chat_view(drafts.iter().copied()).messages(&chat).len()).unwrap()
    };
    write(&|view| view.share("c", &[key(&friend), key(&former)]));
    write(&|view| view.send(&chat, "m", "user", "regrettable", json!(null)).unwrap());
    write(&|view| view.send(&chat, "n", "user", "harmless", json!(null)).unwrap());
    owner.sync().await;
    for device in [&friend, &former] {
        device.sync().await;
        assert_eq!(shown(device), 2);
    }
    write(&|view| view.share("c", &[key(&friend)]));
    owner.sync().await;
    write(&|view| view.delete(&chat, "m").unwrap());
    owner.sync().await;
    friend.sync().await;
    assert_eq!(shown(&friend), 1);
    former.sync().await;
    let deletions = |device: &Device| device.profile().cache().query(&[deletions()], today()).unwrap().len();
    assert_eq!([deletions(&friend), deletions(&former)], [1, 1]);
    let mut stranger = relay.client().await;
    assert!(stranger.query(json!({"kinds": [5]})).await.events.is_empty(), "nobody else is shown what was deleted");
    write(&|view| view.delete_chat("c").remove(0));
    owner.sync().await;
    friend.sync().await;
    assert_eq!(shown(&friend), 0);
    assert!(friend.profile().see(|all, _| all.chat_view([]).list().is_empty()).unwrap());
}

fn deletions() -> Filter {
    Filter { kinds: Some(vec![Kind::DELETION]), ..Filter::default() }
}

/// A device with links to two relays carries what another device writes to the one to the other, while both stay up, and
/// carries nothing of anybody else's.
#[tokio::test(flavor = "multi_thread")]
async fn live_links_carry_from_relay_to_relay() {
    use sledge::client::links::Links;
    let (first, second) = (relay().await, relay().await);
    let [first_url, second_url] = [url(&first), url(&second)];
    let carrier = Device::new(1, &[&first_url, &second_url]);
    let reader = Device::new(1, &[&second_url]);
    let links = [&carrier, &reader].map(|device| Links::start(device.profile().clone(), device::quick()));
    for (device, urls) in [(&carrier, &[&first_url, &second_url][..]), (&reader, &[&second_url][..])] {
        let is_live = |status: &sledge::client::status::Status, url: &&String| {
            status.relays.get(&device::relay_url(url)).is_some_and(|relay| relay.link == LinkState::Live)
        };
        device.until("live links", |status| urls.iter().all(|url| is_live(status, url))).await;
    }
    let mut news = reader.profile().news();
    let writer = Device::new(1, &[&first_url]);
    let foreign = Device::new(2, &[&first_url]);
    let me = reader.profile().keys().pubkey().to_hex();
    let to_me = foreign.publish(1, today(), &[LABEL, CHAT, &["p", &me]], "for the reader of the first relay");
    foreign.sync().await;
    let written = private(&writer, today(), "oa:m:c:1", "");
    writer.sync().await;
    let came = super::support::client::soon("the event", news.recv()).await.unwrap();
    assert_eq!(json_of(&came), json_of(&written));
    carrier.until("both events", |status| status.relays.values().any(|relay| relay.fetched == 2)).await;
    assert!(carrier.ids().contains(&to_me.id.to_hex()));
    assert_eq!(reader.ids(), [written.id.to_hex()], "what others wrote is not carried");
    for links in links {
        super::support::client::soon("the links to end", links.stop()).await;
    }
}
