//! What relays answer, by fakes that say what no relay of ours can be brought to say: nothing is lost, nothing doubled,
//! and what is refused for good is seen.

use std::sync::Arc;

use serde_json::{Value, json};
use sledge::client::links::{Links, Visit};
use sledge::client::profile::Answer;
use sledge::protocol::Filter;
use sledge::sync::outbox::Seq;

use super::support::client::soon;
use super::support::device::{quick, relay_url, signed, today};
use super::support::{Device, Fake};

/// A device with some public notes in its outbox and links that are kept up.
fn writing(fake: &Fake, notes: u64) -> (Device, Links) {
    let device = Device::new(1, &[&fake.url()]);
    for number in 0..notes {
        device.publish(1, today() - 100 + number, &[], &format!("note {number}"));
    }
    let links = Links::start(Arc::clone(device.profile()), quick());
    (device, links)
}

/// The relay stored an event and died before its OK: the very same bytes are sent again, and `duplicate:` settles them.
#[tokio::test(flavor = "multi_thread")]
async fn t27_a_lost_ok_costs_a_duplicate() {
    let mut fake = Fake::start(Value::Null).await;
    let (device, links) = writing(&fake, 1);
    let mut peer = fake.accept().await;
    let first = peer.until_published().await;
    peer.cut();
    let mut peer = fake.accept().await;
    let second = peer.until_published().await;
    assert_eq!(first, second);
    peer.ok(&second, true, "duplicate: already have this event").await;
    peer.answer_until(device.until("the outbox to be empty", |status| status.waiting == 0 && status.dead == 0)).await;
    soon("the end", links.stop()).await;
}

/// Each answer has its consequence: what was overtaken is settled, what is refused for good stays visible with its
/// reason until it is tried again or discarded, what is refused for now is sent again.
#[tokio::test(flavor = "multi_thread")]
async fn t27_answers_settle_bury_or_come_again() {
    let mut fake = Fake::start(Value::Null).await;
    let (device, links) = writing(&fake, 6);
    let mut peer = fake.accept().await;
    let mut refused = Vec::new();
    for (accepted, text) in [
        (false, "replaced: have newer event"),
        (false, "deleted: user requested deletion"),
        (true, ""),
        (false, "blocked: you are not welcome"),
        (false, "invalid: too many tags"),
        (false, "rate-limited: slow down"),
    ] {
        let event = peer.until_published().await;
        peer.ok(&event, accepted, text).await;
        refused.push(event);
    }
    let again = peer.until_published().await;
    assert_eq!(again, refused[5], "the same bytes");
    peer.ok(&again, true, "").await;
    peer.answer_until(
        device.until("two dead letters and nothing else", |status| status.waiting == 0 && status.dead == 2),
    )
    .await;
    let letters = device.profile().dead_letters();
    let reasons: Vec<&str> = letters.iter().map(|letter| letter.reason.as_str()).collect();
    assert_eq!(reasons, ["blocked: you are not welcome", "invalid: too many tags"]);
    assert_eq!(letters[0].id.as_deref(), refused[3]["id"].as_str());
    assert!(device.profile().discard(Seq(letters[1].seq)).unwrap());
    assert_eq!(device.profile().revive(None).unwrap(), 1);
    let again = peer.until_published().await;
    assert_eq!(again, refused[3]);
    peer.ok(&again, true, "").await;
    peer.answer_until(device.until("an empty outbox", |status| status.waiting == 0 && status.dead == 0)).await;
    soon("the end", links.stop()).await;
}

/// Dead letters and debts are there after a restart, as they were.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_survive_a_restart() {
    let mut fake = Fake::start(Value::Null).await;
    let (mut device, links) = writing(&fake, 2);
    let mut peer = fake.accept().await;
    let event = peer.until_published().await;
    peer.ok(&event, false, "blocked: no").await;
    peer.answer_until(device.until("a dead letter", |status| status.dead == 1)).await;
    soon("the end", links.stop()).await;
    let before = (device.profile().dead_letters(), device.waiting(), device.ids());
    device.restart();
    assert_eq!((device.profile().dead_letters(), device.waiting(), device.ids()), before);
}

/// A relay that asks for a proof when an event comes gets it, and then the same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_auth_required_is_answered_with_the_same_bytes() {
    let mut fake = Fake::start(Value::Null).await;
    let (device, links) = writing(&fake, 1);
    let mut peer = fake.accept().await;
    let first = peer.until_published().await;
    peer.ok(&first, false, "auth-required: who are you?").await;
    peer.say(json!(["AUTH", "challenge"])).await;
    let proof = peer.until_verb("AUTH").await;
    peer.ok(&proof[1], true, "").await;
    let second = peer.until_published().await;
    assert_eq!(first, second);
    peer.ok(&second, true, "").await;
    peer.answer_until(device.until("an empty outbox", |status| status.waiting == 0)).await;
    soon("the end", links.stop()).await;
}

/// A relay without NIP-77 is read page by page: all of it arrives, also what shares the second at the edge of a page, and
/// what it lacks is uploaded. False events and events that nobody asked for are not let in.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_without_reconciliation_is_read_in_pages() {
    let mut fake = Fake::start(Value::Null).await;
    let device = Device::new(1, &[&fake.url()]);
    let mut own = Vec::new();
    for number in 0..7 {
        own.push(signed(1, 1, today() - 50 - number / 3, &[], &number.to_string()));
    }
    let lacking = device.profile().take(vec![(*signed(1, 1, today(), &[], "only here")).clone()]).unwrap();
    assert_eq!(lacking, 1);
    let mut false_one = (*signed(1, 1, today(), &[], "false")).clone();
    false_one.content = "changed".to_owned();
    let foreign = signed(2, 1, today(), &[], "foreign");
    let links = Links::start(Arc::clone(device.profile()), quick());
    let mut peer = fake.accept().await;
    let uploaded = loop {
        let message = peer.hear().await.unwrap();
        match message[0].as_str() {
            Some("REQ") => {
                let until = message[2]["until"].as_u64().unwrap_or(u64::MAX);
                // Three a page, newest first, the scope of all own events only.
                let is_all =
                    message[2].get("#L").is_none() && message[2].get("kinds").is_none() && message[1] == "page";
                let page: Vec<_> = own.iter().filter(|event| is_all && event.created_at <= until).take(3).collect();
                for event in page {
                    let json: Value = serde_json::from_slice(&event.canonical().json).unwrap();
                    peer.say(json!(["EVENT", message[1], json])).await;
                }
                for event in [&false_one, &foreign] {
                    let json: Value = serde_json::from_slice(&event.canonical().json).unwrap();
                    peer.say(json!(["EVENT", message[1], json])).await;
                }
                peer.say(json!(["EOSE", message[1]])).await;
            }
            Some("EVENT") => break message[1].clone(),
            _ => {}
        }
    };
    assert_eq!(uploaded["content"], "only here");
    assert_eq!(device.ids().len(), own.len() + 1);
    soon("the end", links.stop()).await;
}

/// A second with more events than a relay gives for one filter hides some of them, and nothing else: what is older is
/// read, and what is owed goes out.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_that_cannot_be_paged_stands_in_nobodys_way() {
    const LIMIT: usize = 3;
    let mut fake = Fake::start(json!({"limitation": {"max_limit": LIMIT}})).await;
    let crowded = today() - 50;
    let mut theirs: Vec<_> = (0..5).map(|number| signed(1, 1, crowded, &[], &number.to_string())).collect();
    theirs.push(signed(1, 1, crowded - 1, &[], "older"));
    let (device, links) = writing(&fake, 1);
    let mut peer = fake.accept().await;
    let (mut owed, mut ended) = (None, false);
    while owed.is_none() || !ended {
        let message = peer.hear().await.unwrap();
        match message[0].as_str() {
            Some("REQ") => {
                let (since, until) = (message[2]["since"].as_u64(), message[2]["until"].as_u64());
                let is_in = |at: u64| since.is_none_or(|since| since <= at) && until.is_none_or(|until| at <= until);
                let is_all = message[2].get("#L").is_none() && message[2].get("kinds").is_none();
                let page = theirs.iter().filter(|event| is_all && message[1] == "page" && is_in(event.created_at));
                for event in page.take(LIMIT) {
                    let json: Value = serde_json::from_slice(&event.canonical().json).unwrap();
                    peer.say(json!(["EVENT", message[1], json])).await;
                }
                peer.say(json!(["EOSE", message[1]])).await;
                ended |= is_all && until.is_some_and(|until| until < crowded - 1);
            }
            Some("EVENT") => owed = Some(message[1].clone()),
            _ => {}
        }
    }
    peer.ok(&owed.unwrap(), true, "").await;
    peer.answer_until(device.until("an empty outbox", |status| status.waiting == 0)).await;
    assert_eq!(device.ids().len(), LIMIT + 2, "a page of the crowded second, the older one, the own one");
    soon("the end", links.stop()).await;
}

/// A fetch may take as long as it likes: a message goes out meanwhile. A chat's head does not before all is read, since
/// it may take the place of a version that nobody here knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_fetch_holds_up_only_what_merges() {
    use sledge::sync::chat::ChatKey;
    let mut fake = Fake::start(Value::Null).await;
    let device = Device::new(1, &[&fake.url()]);
    let links = Links::start(Arc::clone(device.profile()), quick());
    let mut peer = fake.accept().await;
    // The first page is not given yet.
    let live = peer.hear_verb("REQ").await;
    peer.say(json!(["EOSE", live[1]])).await;
    let page = peer.hear_verb("REQ").await;
    assert_eq!(page[1], "page");
    let profile = device.profile();
    let chat = ChatKey { owner: profile.keys().pubkey(), id: "c".to_owned() };
    let (head, message) = profile
        .see(|all, _| {
            let view = all.chat_view([]);
            (view.set_title("c", "a title"), view.send(&chat, "m", "user", "hello", Value::Null).unwrap())
        })
        .unwrap();
    profile.write_all(vec![vec![head], vec![message]]).unwrap();
    let first = peer.hear_verb("EVENT").await[1].clone();
    assert!(d_of(&first).starts_with("oa:m:c:"), "{first}");
    peer.ok(&first, true, "").await;
    let owed = |waiting| move |status: &sledge::client::status::Status| status.waiting == waiting;
    device.until("the message to be settled", owed(1)).await;
    peer.say(json!(["EOSE", page[1]])).await;
    let second = peer.until_published().await;
    assert_eq!(d_of(&second), "oa:c:c");
    peer.ok(&second, true, "").await;
    peer.answer_until(device.until("the head to be settled", owed(0))).await;
    soon("the end", links.stop()).await;
}

fn d_of(event: &Value) -> String {
    let tags = event["tags"].as_array().unwrap();
    tags.iter().find(|tag| tag[0] == "d").and_then(|tag| tag[1].as_str()).unwrap().to_owned()
}

/// What a relay lacks and knows to be overtaken or deleted, or refuses by its policy, is offered once and not at every
/// catch-up, also after a restart; a person may have what was refused offered again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_does_not_want_is_offered_once() {
    let mut fake = Fake::start(Value::Null).await;
    let mut device = Device::new(1, &[&fake.url()]);
    let texts = ["replaced: have newer event", "deleted: user requested deletion", "blocked: no notes here"];
    let notes = (0..3).map(|number| (*signed(1, 1, today() - 9 + number, &[], "mine")).clone()).collect();
    device.profile().take(notes).unwrap();
    for (round, offered) in [&texts[..], &[], &texts[2..]].into_iter().enumerate() {
        visit_answering(&device, &mut fake, offered).await;
        device.restart();
        if round == 1 {
            device.profile().revive(None).unwrap();
        }
    }
}

/// Visits a relay that has nothing and gives these answers to what is published; anything beyond is not answered, so the
/// visit would not be settled.
async fn visit_answering(device: &Device, fake: &mut Fake, texts: &[&str]) {
    let visit = device.visit();
    tokio::pin!(visit);
    let mut peer = tokio::select! {
        peer = fake.accept() => peer,
        _ = &mut visit => panic!("the visit ends without a connection"),
    };
    for text in texts {
        let event = tokio::select! {
            event = peer.until_published() => event,
            _ = &mut visit => panic!("nothing is offered that could be answered with `{text}`"),
        };
        peer.ok(&event, false, text).await;
    }
    assert_eq!(peer.answer_until(visit).await, [Visit::Settled], "{texts:?}");
}

/// What a relay gives and was overtaken here is not fetched at every catch-up; and what it was said not to want is left
/// out of the comparison until it shows it.
#[test]
fn what_is_not_wanted_is_not_compared_again() {
    let device = Device::new(1, &["ws://a.example"]);
    let (profile, relay) = (device.profile(), relay_url("ws://a.example"));
    let [old, new] = [1, 2].map(|at| (*signed(1, 30_001, today() - 10 + at, &[&["d", "x"]], "")).clone());
    profile.take(vec![new.clone()]).unwrap();
    profile.take_from(&relay, vec![old.clone()]).unwrap();
    let ids = || vec![old.id, new.id];
    assert_eq!(profile.wanted_from(&relay, ids()).unwrap(), [new.id]);
    let items = || profile.items_for(&relay, &Filter::default()).unwrap().len();
    assert_eq!(items(), 1);
    let refused = Answer { id: new.id, accepted: false, text: "blocked: no".to_owned() };
    profile.uploaded(&relay, &[refused]).unwrap();
    assert_eq!(items(), 0);
    assert!(profile.wanted_from(&relay, ids()).unwrap().is_empty());
    assert_eq!(items(), 1, "the relay has it after all");
}
