//! T34, the leak matrix: every private kind, by every question, on every way out, for every reader. Only the author and
//! the keys in `p` tags, authenticated, may learn that an event is there.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sledge::protocol::{Event, label};

use crate::support::client::request;
use crate::support::{Client, Keys, NOW, Relay, ids};

/// An event of the matrix.
struct Case {
    name: String,
    event: Event,
    /// Whether anybody may see it: the controls, which prove that the questions are good.
    public: bool,
    /// Whether it names the recipient.
    addressed: bool,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Anonymous,
    Stranger,
    Author,
    Recipient,
    /// A stranger's connection that has proven the recipient's key too.
    StrangerAndRecipient,
}

const READERS: [Reader; 5] =
    [Reader::Anonymous, Reader::Stranger, Reader::Author, Reader::Recipient, Reader::StrangerAndRecipient];

/// On which way what is stored comes out. A new one belongs here, with its arm in [`seen`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Req,
    Count,
    /// Reconciliation by somebody who has nothing (NIP-77).
    Neg,
}

const WAYS: [Way; 3] = [Way::Req, Way::Count, Way::Neg];

/// "I have no events from the beginning to the end of time": the relay answers with the ids of its own.
const NEG_NOTHING: &str = "6100000200";

const WRAPS: [u16; 3] = [1059, 1060, 21_059];

fn author() -> Keys {
    Keys::new(1)
}

fn recipient() -> Keys {
    Keys::new(2)
}

fn stranger() -> Keys {
    Keys::new(3)
}

fn cases() -> Vec<Case> {
    let to_recipient = |kind| author().draft(kind, NOW).tag(["p", &recipient().hex()]);
    let mut cases = Vec::new();
    for kind in [4, 13, 14, 15, 1059, 1060, 21_059] {
        for addressed in [true, false] {
            let draft = if addressed { to_recipient(kind) } else { author().draft(kind, NOW) };
            let name = format!("kind {kind}{}", if addressed { "" } else { " to nobody" });
            cases.push(Case { name, event: draft.sign(), public: false, addressed });
        }
    }
    for kind in [1, 10_001, 20_001, 30_001] {
        let labelled = to_recipient(kind).tag(["L", label::NAMESPACE]).tag(["d", "x"]).sign();
        cases.push(Case { name: format!("labelled {kind}"), event: labelled, public: false, addressed: true });
    }
    for kind in [1, 10_002, 20_002, 30_001] {
        let event = to_recipient(kind).tag(["L", "another namespace"]).tag(["d", "y"]).sign();
        cases.push(Case { name: format!("public {kind}"), event, public: true, addressed: true });
    }
    cases
}

/// The questions that find an event.
fn questions(event: &Event) -> Vec<Value> {
    let (id, kind) = (event.id.to_hex(), event.kind.0);
    let (by, to) = (author().hex(), recipient().hex());
    let is_addressed = event.tags.find("p").is_some();
    let mut questions = vec![
        json!({}),
        json!({"ids": [id]}),
        json!({"kinds": [kind]}),
        json!({"kinds": [kind, 7]}),
        json!({"authors": [by]}),
        json!({"authors": [by], "kinds": [kind]}),
        json!({"since": NOW, "until": NOW}),
    ];
    if is_addressed {
        questions.extend([
            json!({"#p": [to]}),
            json!({"#p": [to], "kinds": [kind]}),
            json!({"#p": [to], "authors": [by]}),
        ]);
    }
    if let Some(namespace) = event.tags.find("L").and_then(|tag| tag.value()) {
        questions.extend([json!({"#L": [namespace]}), json!({"#L": [namespace], "kinds": [kind]})]);
    }
    questions
}

impl Reader {
    async fn connect(self, relay: &Relay) -> Client {
        let mut client = relay.client().await;
        let keys = match self {
            Reader::Anonymous => vec![],
            Reader::Stranger => vec![stranger()],
            Reader::Author => vec![author()],
            Reader::Recipient => vec![recipient()],
            Reader::StrangerAndRecipient => vec![stranger(), recipient()],
        };
        for keys in keys {
            client.prove(&keys).await;
        }
        client
    }

    /// Whether this question brings him the event. The author of a wrap is a throw-away key: whoever asks for the wraps to
    /// another key is told that they are not his (`restricted:`), even where he has proven that key.
    fn gets(self, case: &Case, question: &Value, way: Option<Way>) -> bool {
        let is_anothers_mail = self == Reader::Author && asks_for_wraps_to_somebody(question);
        // Settings are for those who ask for them by our label or by id (see the tests of slots).
        let is_settings = case.event.kind.0 == 10_001 && !case.public;
        let asks_for_settings = way == Some(Way::Count) || question["ids"].is_array() || question["#L"].is_array();
        self.may_see(case) && !is_anothers_mail && (!is_settings || asks_for_settings)
    }

    fn may_see(self, case: &Case) -> bool {
        case.public
            || match self {
                Reader::Anonymous | Reader::Stranger => false,
                Reader::Author => true,
                Reader::Recipient | Reader::StrangerAndRecipient => case.addressed,
            }
    }
}

/// Whether a question is for the wraps to somebody and names nobody else.
fn asks_for_wraps_to_somebody(question: &Value) -> bool {
    let kinds = question["kinds"]
        .as_array()
        .is_some_and(|kinds| kinds.iter().all(|kind| WRAPS.iter().any(|wrap| kind == wrap)));
    kinds && question["#p"].is_array() && !question["authors"].is_array()
}

/// Whether a question brings the event to light on a way that reads what is stored. A refusal brings nothing to light.
async fn seen(client: &mut Client, way: Way, question: &Value, event: &Event) -> bool {
    let id = event.id.to_hex();
    match way {
        Way::Req => {
            client.subscribe("q", std::slice::from_ref(question)).await;
            let mut found = false;
            loop {
                let message = client.wait_for(|message| message[1] == "q").await;
                match message[0].as_str() {
                    Some("EVENT") => found |= message[2]["id"] == json!(id),
                    Some("EOSE") => break client.close("q").await,
                    _ => break assert_refused(&message),
                }
            }
            found
        }
        // A number tells nothing about one event: the question is narrowed to it.
        Way::Count => {
            let mut question = question.clone();
            question["ids"] = json!([id]);
            client.send(request("COUNT", "c", &[question])).await;
            let message = client.wait_for(|message| message[1] == "c").await;
            if message[0] != "COUNT" {
                assert_refused(&message);
                return false;
            }
            message[2]["count"] != 0
        }
        Way::Neg => {
            client.send(json!(["NEG-OPEN", "n", question, NEG_NOTHING]).to_string()).await;
            let message = client.wait_for(|message| message[1] == "n").await;
            client.send(json!(["NEG-CLOSE", "n"]).to_string()).await;
            if message[0] != "NEG-MSG" {
                assert_refused(&message);
                return false;
            }
            message[2].as_str().expect("hex").contains(&id)
        }
    }
}

fn assert_refused(message: &Value) {
    let text = message[2].as_str().unwrap_or_default();
    let is_refusal = text.starts_with("auth-required: ") || text.starts_with("restricted: ");
    assert!((message[0] == "CLOSED" || message[0] == "NEG-ERR") && is_refusal, "{message}");
}

/// What is stored: kinds × questions × {REQ, COUNT, NEG-OPEN} × readers.
#[tokio::test]
async fn t34_stored_events() {
    let relay = Relay::start().await;
    let cases = cases();
    let mut publisher = relay.client().await;
    publisher.store_all(cases.iter().map(|case| &case.event)).await;
    let stored: Vec<&Case> = cases.iter().filter(|case| !case.event.kind.is_ephemeral()).collect();
    let mut holes = Vec::new();
    for reader in READERS {
        let mut client = reader.connect(&relay).await;
        for case in &stored {
            for question in questions(&case.event) {
                for way in WAYS {
                    if seen(&mut client, way, &question, &case.event).await != reader.gets(case, &question, Some(way)) {
                        holes.push(format!("{}: {way:?} {question} by {reader:?}", case.name));
                    }
                }
            }
        }
    }
    assert!(holes.is_empty(), "{} wrong:\n{}", holes.len(), holes.join("\n"));
}

/// What is delivered live: kinds × questions × readers.
#[tokio::test]
async fn t34_live_events() {
    let relay = Relay::with(|config| config.limits.subscriptions_max = 1_000).await;
    let cases = cases();
    let mut clients = Vec::new();
    for reader in READERS {
        let mut client = reader.connect(&relay).await;
        for (number, case) in cases.iter().enumerate() {
            for (at, question) in questions(&case.event).into_iter().enumerate() {
                let id = format!("{number}/{at}");
                client.subscribe(&id, &[question]).await;
                // Refused or open: either way it is settled before anything is published.
                let message = client.wait_for(|message| message[1] == json!(id)).await;
                if message[0] != "EOSE" {
                    assert_refused(&message);
                }
            }
        }
        clients.push((reader, client));
    }
    let mut publisher = relay.client().await;
    publisher.store_all(cases.iter().map(|case| &case.event)).await;
    // Once this later one is answered, those before it are on their way to everybody.
    publisher.store(&Keys::new(9).draft(20_003, NOW).sign()).await;
    let mut holes = Vec::new();
    for (reader, mut client) in clients {
        let arrived: BTreeSet<(String, String)> =
            client.drain().await.iter().map(|message| (text(&message[1]), text(&message[2]["id"]))).collect();
        for (number, case) in cases.iter().enumerate() {
            for (at, question) in questions(&case.event).into_iter().enumerate() {
                let came = arrived.contains(&(format!("{number}/{at}"), case.event.id.to_hex()));
                if came != reader.gets(case, &question, None) {
                    holes.push(format!("{}: live {question} by {reader:?}", case.name));
                }
            }
        }
        // No subscription may have got another private event by the way either.
        for case in cases.iter().filter(|case| !reader.may_see(case)) {
            let id = case.event.id.to_hex();
            assert!(!arrived.iter().any(|(_, arrived)| *arrived == id), "{} by {reader:?}", case.name);
        }
    }
    assert!(holes.is_empty(), "{} wrong:\n{}", holes.len(), holes.join("\n"));
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Hidden events use up no limit and leave no trace in the hint about the rest (T20).
#[tokio::test]
async fn t20_t34_hidden_events_use_up_no_limit() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes = [author().note(NOW, "old"), author().note(NOW - 1, "older")];
    client.store_all(&notes).await;
    let letters: Vec<Event> =
        (1..30).map(|n| author().draft(4, NOW + n).tag(["p", &recipient().hex()]).sign()).collect();
    client.store_all(&letters).await;
    assert_eq!(client.query_ids(json!({"limit": 1})).await, ids([&notes[0]]));
    assert_eq!(client.query(json!({"limit": 2})).await.hints, ["finish"]);
    assert_eq!(client.count(&[json!({})]).await, 2);
    client.prove(&recipient()).await;
    assert_eq!(client.count(&[json!({})]).await, 31);
}

/// An empty list of private kinds gives them to anybody; labelled events stay private.
#[tokio::test]
async fn the_list_of_private_kinds_decides() {
    let relay = Relay::with(|config| config.access.private_kinds = vec!["7-8".parse().unwrap()]).await;
    let mut client = relay.client().await;
    let letter = author().draft(4, NOW).sign();
    let labelled = author().draft(30_001, NOW).tag(["L", label::NAMESPACE]).sign();
    let reaction = author().draft(7, NOW).sign();
    client.store_all([&letter, &labelled, &reaction]).await;
    assert_eq!(client.query_ids(json!({})).await, ids([&letter]));
}
