//! Streams between relays: made equal once, and kept equal while new events come; through real sockets.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use sledge::client::clock::World;
use sledge::client::dial::RelayUrl;
use sledge::client::keys::Keys as ClientKeys;
use sledge::client::link::{Link, LinkOptions};
use sledge::client::mirrors::{Mirror, Mirrors};
use sledge::client::stream::{Memory, Scope, Stream, StreamError};
use sledge::config::Direction;
use sledge::protocol::{Event, Filter, label};
use sledge::relay::ingest::Upstream;
use sledge::relay::side::{Moved, Side};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::support::client::soon;
use crate::support::{Binary, Client, Keys, NOW, Relay, json_of};

fn options() -> LinkOptions {
    LinkOptions { reconnect_first: std::time::Duration::from_millis(1), ..LinkOptions::default() }
}

pub fn mirror(addr: SocketAddr, direction: Direction, filters: &[Value]) -> Mirror {
    let filters = filters.iter().map(|filter| Filter::from_json(&filter.to_string()).unwrap()).collect();
    let scope = Scope { filters, direction, answer_timeout: std::time::Duration::from_secs(60) };
    Mirror { url: RelayUrl::parse(&format!("ws://{addr}/")).unwrap(), scope, private: false, keys: Arc::default() }
}

/// Makes `here` equal with `there`, once.
pub async fn level(here: &Relay, mirror: Mirror) -> Result<Moved, StreamError> {
    let link = Link::open(&mirror.url, &options(), mirror.keys, &World::system()).await?;
    let upstream = Upstream { url: mirror.url.to_string(), is_mirror: false };
    let side = Side::new(here.served(), mirror.private, upstream);
    let (told, moved) = watch::channel(Moved::default());
    let mut stream = Stream::new(link, side, mirror.scope, told, Memory::default());
    soon("both sides to be equal", stream.level()).await?;
    assert_eq!(*moved.borrow(), stream.moved());
    Ok(stream.moved())
}

async fn all(relay: &Relay) -> BTreeSet<String> {
    let mut client = relay.client().await;
    let mut ids = BTreeSet::new();
    let mut until = NOW + 900;
    loop {
        let page = client.query(json!({"until": until, "limit": 5_000})).await;
        ids.extend(page.ids());
        match page.events.last() {
            Some(last) if page.hints == ["more"] => until = last["created_at"].as_u64().unwrap() - 1,
            _ => return ids,
        }
    }
}

fn ids(events: &[Event]) -> BTreeSet<String> {
    events.iter().map(|event| event.id.to_hex()).collect()
}

async fn store(relay: &Relay, events: &[Event]) {
    relay.client().await.store_all(events).await;
}

/// Two relays with events of their own and in common, profiles of which each has another version, and deletions of which
/// the other has the target: afterwards both are the same, and a second run moves nothing.
#[tokio::test]
async fn two_relays_become_equal() {
    let (here, there) = (Relay::start().await, Relay::start().await);
    let mut random = StdRng::seed_from_u64(5);
    let notes: Vec<Event> = (0..600).map(|n| Keys::new(n % 5).note(NOW - n / 7, &n.to_string())).collect();
    let sides: Vec<u32> = notes.iter().map(|_| random.random_range(0..4)).collect();
    let on = |absent: u32| -> Vec<Event> {
        notes.iter().zip(&sides).filter(|(_, side)| **side != absent).map(|(note, _)| note.clone()).collect()
    };
    store(&here, &on(0)).await;
    store(&there, &on(1)).await;
    let alice = Keys::new(9);
    let profile = |at, name: &str| alice.draft(0, NOW + at).content(name).sign();
    let (old, new) = (profile(0, "old"), profile(1, "new"));
    store(&here, std::slice::from_ref(&new)).await;
    store(&there, std::slice::from_ref(&old)).await;
    let gone = alice.note(NOW, "deleted here, still there");
    let deletion = alice.deletion(NOW + 2, &[("e", &gone.id.to_hex())]);
    store(&there, std::slice::from_ref(&gone)).await;
    store(&here, std::slice::from_ref(&deletion)).await;

    let both = |there: &Relay| mirror(there.addr(), Direction::Both, &[json!({})]);
    let moved = level(&here, both(&there)).await.unwrap();
    let mut expected = ids(&notes);
    expected.extend([new.id.to_hex(), deletion.id.to_hex()]);
    assert_eq!(all(&here).await, expected);
    assert_eq!(all(&there).await, expected);
    assert!(moved.stored > 50 && moved.sent > 50, "{moved:?}");
    let again = level(&here, both(&there)).await.unwrap();
    assert_eq!((again.total(), again.rounds), (0, 2), "{again:?}: one round for the deletions, one for the rest");
}

/// Each direction moves what it says, and only what the filters match; private events stay, unless both relays are the
/// operator's own.
#[tokio::test]
async fn directions_filters_and_private_events() {
    let (here, there) = (Relay::start().await, Relay::start().await);
    let alice = Keys::new(1);
    let letter = |n: u64| alice.draft(4, NOW + n).tag(["p", &Keys::new(2).hex()]).sign();
    let labelled = alice.draft(30_001, NOW).tag(["d", "oa:c:1"]).tag(["L", label::NAMESPACE]).sign();
    let (mine, theirs) = (alice.note(NOW, "here"), alice.note(NOW, "there"));
    store(&here, &[mine.clone(), letter(1), labelled.clone(), alice.draft(7, NOW).sign()]).await;
    store(&there, &[theirs.clone(), letter(2), alice.draft(7, NOW + 1).sign()]).await;
    let notes = [json!({"kinds": [1]}), json!({"kinds": [4, 30001]})];
    let moved = level(&here, mirror(there.addr(), Direction::Down, &notes)).await.unwrap();
    assert_eq!((moved.stored, moved.sent), (1, 0));
    let moved = level(&here, mirror(there.addr(), Direction::Up, &notes)).await.unwrap();
    assert_eq!((moved.stored, moved.sent), (0, 1));
    assert_eq!(all(&there).await.len(), 3, "two notes and a reaction are to be seen by anybody");

    // A proof is dated by the machine's clock, so the relay's must agree with it.
    there.set_now(World::system().now_ms() / 1_000);
    // The author's key shows the letter that is there; what is here goes there.
    let secret = format!("test key {}", 1);
    let keys = ClientKeys::from_secret_bytes(
        sha2::Digest::finalize(<sha2::Sha256 as sha2::Digest>::new_with_prefix(secret)).into(),
    );
    let private =
        Mirror { private: true, keys: Arc::new([keys.unwrap()]), ..mirror(there.addr(), Direction::Both, &notes) };
    let moved = level(&here, private).await.unwrap();
    assert_eq!((moved.stored, moved.sent, moved.unwanted), (1, 2, 0), "{moved:?}");
    there.set_now(NOW);
    let mut reader = there.client().await;
    reader.prove(&alice).await;
    assert_eq!(reader.query_ids(json!({"kinds": [4, 30001]})).await.len(), 3);
}

/// A relay that compares only a few events at once is asked about ever shorter times.
#[tokio::test]
async fn blocked_comparisons_are_split() {
    let (here, there) = (Relay::start().await, Relay::with(|config| config.sync.session_records_max = 40).await);
    let notes: Vec<Event> =
        (0..500).map(|n| Keys::new(1).draft(1 + (n % 2) as u16, NOW - n / 3).content(n.to_string()).sign()).collect();
    store(&there, &notes).await;
    store(&here, &notes[..100]).await;
    let several = [json!({"kinds": [1, 2]})];
    let moved = level(&here, mirror(there.addr(), Direction::Down, &several)).await.unwrap();
    assert_eq!(moved.stored, 400);
    assert_eq!(all(&here).await, ids(&notes));
}

/// A relay without NIP-77, or that has no place for another comparison, is read page by page; both directions.
#[tokio::test]
async fn without_reconciliation_pages_are_read() {
    let (here, there) = (
        Relay::start().await,
        Relay::with(|config| {
            config.sync.sessions_max = 0;
            (config.limits.limit_max, config.limits.limit_default) = (30, 30);
        })
        .await,
    );
    let notes: Vec<Event> = (0..400).map(|n| Keys::new(n % 3).note(NOW - n / 5, &n.to_string())).collect();
    store(&there, &notes[..300]).await;
    store(&here, &notes[200..]).await;
    let moved = level(&here, mirror(there.addr(), Direction::Both, &[json!({})])).await.unwrap();
    assert_eq!((moved.stored, moved.sent), (200, 100), "{moved:?}");
    assert_eq!(all(&here).await, ids(&notes));
    assert_eq!(all(&there).await, ids(&notes));
}

/// A second with more events than the relay gives for one filter cannot be read page by page: that is an error, and not
/// silently a part.
#[tokio::test]
async fn a_second_that_cannot_be_paged_is_told() {
    let (here, there) = (
        Relay::start().await,
        Relay::with(|config| {
            config.sync.sessions_max = 0;
            (config.limits.limit_max, config.limits.limit_default) = (600, 600);
        })
        .await,
    );
    let flood: Vec<Event> = (0..700).map(|n: u64| Keys::new(1).note(NOW, &n.to_string())).collect();
    store(&there, &flood).await;
    let ended = level(&here, mirror(there.addr(), Direction::Down, &[json!({})])).await;
    assert!(matches!(ended, Err(StreamError::Incomplete(_))), "{ended:?}");
}

/// What one side does not take is counted and not moved again and again.
#[tokio::test]
async fn what_is_not_taken_is_counted() {
    let here = Relay::with(|config| config.limits.content_chars_max = 10).await;
    let there = Relay::with(|config| config.access.pow_min = 30).await;
    let (long, short) = (Keys::new(1).note(NOW, "longer than ten characters"), Keys::new(1).note(NOW, "short"));
    store(&here, std::slice::from_ref(&short)).await;
    let mut direct = there.client().await;
    assert!(!direct.publish(&long).await.0, "work is asked for");
    let moved = level(&here, mirror(there.addr(), Direction::Both, &[json!({})])).await.unwrap();
    assert_eq!((moved.sent, moved.unwanted), (0, 1), "{moved:?}");
    let open = Relay::start().await;
    store(&open, std::slice::from_ref(&long)).await;
    let moved = level(&here, mirror(open.addr(), Direction::Down, &[json!({})])).await.unwrap();
    assert_eq!((moved.stored, moved.refused), (0, 1), "{moved:?}");
}

/// Two relays that mirror each other: an event published at either arrives at the other, once, and it ends there.
#[tokio::test]
async fn two_mirrors_of_each_other_make_no_loop() {
    let (a, b) = (Relay::start().await, Relay::start().await);
    let world = World::system();
    let streams = [(&a, &b), (&b, &a)].map(|(here, there)| {
        let mirror = mirror(there.addr(), Direction::Both, &[json!({})]);
        Mirrors::start(&here.served(), vec![mirror], options(), &world)
    });
    let (mut at_a, mut at_b) = (a.client().await, b.client().await);
    at_a.req("live", &[json!({})]).await;
    at_b.req("live", &[json!({})]).await;
    let events: Vec<Event> = (0..40).map(|n| Keys::new(1).note(NOW + n, &n.to_string())).collect();
    for pair in events.chunks(2) {
        at_a.send(format!("[\"EVENT\",{}]", json_of(&pair[0]))).await;
        at_b.send(format!("[\"EVENT\",{}]", json_of(&pair[1]))).await;
    }
    for client in [&mut at_a, &mut at_b] {
        let mut seen = BTreeSet::new();
        while seen.len() < events.len() {
            let event = client.live("live").await;
            assert!(seen.insert(event["id"].as_str().unwrap().to_owned()), "twice: {event}");
        }
        assert_eq!(seen, ids(&events));
    }
    for mirrors in streams {
        mirrors.stop().await;
    }
}

/// A relay of the test's own making.
async fn accept(listener: &TcpListener) -> WebSocketStream<TcpStream> {
    loop {
        let (socket, _) = soon("a connection", listener.accept()).await.unwrap();
        // The question about the relay's information is none of WebSocket and fails here; it has no answer.
        if let Ok(socket) = tokio_tungstenite::accept_async(socket).await {
            return socket;
        }
    }
}

async fn hear(socket: &mut WebSocketStream<TcpStream>) -> Value {
    loop {
        match soon("a message", socket.next()).await.unwrap().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

async fn say(socket: &mut WebSocketStream<TcpStream>, message: Value) {
    socket.send(Message::text(message.to_string())).await.unwrap();
}

/// Answers as a relay that has nothing, knows no NIP-77 and takes everything.
async fn answer_as_empty(socket: &mut WebSocketStream<TcpStream>, message: &Value) {
    match message[0].as_str() {
        Some("REQ") => say(socket, json!(["EOSE", message[1], ["finish"]])).await,
        Some("EVENT") => say(socket, json!(["OK", message[1]["id"], true, ""])).await,
        _ => {}
    }
}

/// What came from a relay never goes back to it, what is new here goes there at once, and a link that breaks is opened
/// again.
#[tokio::test]
async fn nothing_goes_back_to_where_it_came_from() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = Relay::start().await;
    let mirror = mirror(listener.local_addr().unwrap(), Direction::Both, &[json!({"kinds": [1]})]);
    // The question about the relay's information may find nobody who accepts it.
    let options = LinkOptions { connect_timeout: std::time::Duration::from_secs(1), ..options() };
    let mirrors = Mirrors::start(&here.served(), vec![mirror], options, &World::system());
    let mut publisher = here.client().await;
    for round in 0..3 {
        let mut socket = accept(&listener).await;
        // What is new there is asked for first; what is stored here by now is offered, and taken.
        let first = hear(&mut socket).await;
        assert_eq!((&first[0], &first[1]), (&json!("REQ"), &json!("live")));
        answer_as_empty(&mut socket, &first).await;
        let came = Keys::new(1).note(NOW + 2 * round, "came from there");
        let own = Keys::new(2).note(NOW + 2 * round + 1, "published here");
        say(&mut socket, json!(["EVENT", "live", serde_json::from_str::<Value>(&json_of(&came)).unwrap()])).await;
        let mut reader = here.client().await;
        reader.subscribe("r", &[json!({"ids": [came.id.to_hex()]})]).await;
        let arrived = reader.wait_for(|message| message[0] == "EVENT");
        tokio::pin!(arrived);
        loop {
            tokio::select! {
                _ = &mut arrived => break,
                message = hear(&mut socket) => answer_as_empty(&mut socket, &message).await,
            }
        }
        publisher.store(&own).await;
        loop {
            let message = hear(&mut socket).await;
            answer_as_empty(&mut socket, &message).await;
            assert_ne!(message[1]["id"], came.id.to_hex(), "it went back");
            if message[1]["id"] == own.id.to_hex() {
                break;
            }
        }
    }
    mirrors.stop().await;
}

/// A relay that says nothing, or goes away in the middle, ends the stream with an error and never hangs it.
#[tokio::test]
async fn silence_and_breaks_end_a_stream() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = Relay::start().await;
    let addr = listener.local_addr().unwrap();
    let mut silent = mirror(addr, Direction::Down, &[json!({})]);
    silent.scope.answer_timeout = std::time::Duration::from_millis(50);
    let (ended, _socket) = tokio::join!(level(&here, silent), accept(&listener));
    assert!(matches!(ended, Err(StreamError::Link(_))), "{ended:?}");
    let (ended, ()) = tokio::join!(level(&here, mirror(addr, Direction::Down, &[json!({})])), async {
        let mut socket = accept(&listener).await;
        hear(&mut socket).await;
    });
    assert!(matches!(ended, Err(StreamError::Link(_))), "{ended:?}");
}

/// `sledge sync` with a store of its own, with the relay that has the store, and against nobody; a second run moves
/// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_makes_a_store_equal() {
    let there = Relay::start().await;
    let notes: Vec<Event> = (0..300).map(|n| Keys::new(1).note(NOW - n, "")).collect();
    store(&there, &notes[..200]).await;
    let url = format!("ws://{}", there.addr());
    let binary = Binary::new();
    binary.import(&notes[100..]);
    let run = |args: Vec<String>| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        binary.run(&args)
    };
    let sync = |more: &[&str]| {
        let mut args = vec!["sync".to_owned(), url.clone()];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    };
    let moved: Value = serde_json::from_str(&run(sync(&["--direction", "both", "--json"])).ok()).unwrap();
    assert_eq!(moved["stored"], 100);
    // What was sent and what came went over the wire as JSON, and the comparison with it.
    let least: usize = notes[..100].iter().map(|note| json_of(note).len()).sum();
    assert!(moved["bytes_down"].as_u64().unwrap() > least as u64, "{moved}");
    assert!(moved["bytes_up"].as_u64().unwrap() > 0 && moved["rounds"].as_u64().unwrap() >= 3, "{moved}");
    assert_eq!(all(&there).await, ids(&notes));
    let said = run(sync(&["--direction", "both"])).ok();
    assert!(said.starts_with("fetched 0 · sent 0 · rounds 2 · "), "{said}");

    let more = Keys::new(2).note(NOW, "new there");
    store(&there, std::slice::from_ref(&more)).await;
    let serving = binary.serve();
    let said = run(sync(&["--filter", r#"{"kinds":[1]}"#])).ok();
    assert!(said.starts_with("fetched 1 · sent 0 · rounds "), "{said}");
    drop(serving);

    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let said = run(vec!["sync".to_owned(), format!("ws://{nobody}")]).fails(1);
    assert!(said.contains("cannot be reached"), "{said}");
    run(vec!["sync".to_owned(), "http://x".to_owned()]).fails(2);
    run(sync(&["--filter", "{\"limit\":1}"])).fails(2);
}

/// A mirror in `sync.toml` is kept while the relay serves; what cannot be read there stops the start.
#[tokio::test(flavor = "multi_thread")]
async fn the_settings_name_mirrors() {
    let there = Relay::start().await;
    let binary = Binary::new();
    let settings = |filter: &str| {
        format!("[[mirror]]\nurl = \"ws://{}\"\ndirection = \"down\"\nfilters = ['{filter}']\n", there.addr())
    };
    binary.configure(&settings("{\"kinds\":1}"));
    assert!(binary.run(&["serve"]).fails(2).contains("mirror"));
    binary.configure(&settings(r#"{"kinds":[1]}"#));
    let serving = binary.serve();
    let mut reader = Client::connect(serving.addr()).await;
    reader.subscribe("r", &[json!({})]).await;
    let note = Keys::new(1).note(NOW, "published there");
    store(&there, &[Keys::new(1).draft(7, NOW).sign(), note.clone()]).await;
    let came = reader.wait_for(|message| message[0] == "EVENT").await;
    assert_eq!(came[2]["id"], note.id.to_hex());
}

/// Mirrors follow the settings: a new one begins, one that is gone ends, and settings that cannot be used change nothing.
#[tokio::test(flavor = "multi_thread")]
async fn mirrors_follow_a_reload() {
    let (first, second) = (Relay::start().await, Relay::start().await);
    let binary = Binary::new();
    let settings = |there: &Relay| format!("[[mirror]]\nurl = \"ws://{}\"\n", there.addr());
    binary.configure(&settings(&first));
    let serving = binary.serve();
    let mut reader = Client::connect(serving.addr()).await;
    reader.req("r", &[json!({})]).await;
    let note = |n: u64| Keys::new(1).note(NOW + n, "published there");
    store(&first, &[note(1)]).await;
    assert_eq!(reader.live("r").await["id"], note(1).id.to_hex());

    binary.configure("[[mirror]]\nurl = \"ws://localhost:1\"\nfilters = ['{\"kinds\":1}']\n");
    serving.signal("HUP");
    serving.wait_for_line("the old ones stay in force");
    store(&first, &[note(2)]).await;
    assert_eq!(reader.live("r").await["id"], note(2).id.to_hex());

    binary.configure(&settings(&second));
    serving.signal("HUP");
    let line = serving.wait_for_line("settings read again");
    assert!(line.contains("mirror"), "{line}");
    store(&second, &[note(3)]).await;
    assert_eq!(reader.live("r").await["id"], note(3).id.to_hex());
    // The relay that is no longer named is left alone: it has lost its only listener.
    store(&first, &[note(4)]).await;
    store(&second, &[note(5)]).await;
    assert_eq!(reader.live("r").await["id"], note(5).id.to_hex());
}

/// A stream outlives the other relay's restart: what was published there meanwhile comes, without anybody's doing.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_outlives_a_restart_of_the_other_relay() {
    let there = Binary::new();
    let mut serving = there.serve();
    let addr = serving.addr();
    let here = Relay::start().await;
    let mut reader = here.client().await;
    reader.req("r", &[json!({})]).await;
    let mirrors =
        Mirrors::start(&here.served(), vec![mirror(addr, Direction::Down, &[json!({})])], options(), &World::system());
    let note = |n: u64| Keys::new(1).note(NOW + n, "published there");
    Client::connect(addr).await.store(&note(1)).await;
    assert_eq!(reader.live("r").await["id"], note(1).id.to_hex());
    serving.kill();
    let serving = there.serve_on(addr);
    Client::connect(serving.addr()).await.store(&note(2)).await;
    assert_eq!(reader.live("r").await["id"], note(2).id.to_hex());
    mirrors.stop().await;
}
