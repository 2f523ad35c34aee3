//! The whole way through real sockets, over the store in memory. What needs no socket is tested beside its code.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::Server;
use crate::config::Config;
use crate::protocol::testing::{Author, NOW};
use crate::protocol::{Event, message};
use crate::relay::Clock;
use crate::store::memory::MemoryStore;

async fn server(change: impl FnOnce(&mut Config)) -> Server {
    let mut config = Config::default();
    config.listen.set_port(0);
    change(&mut config);
    let clock = Clock::manual(Arc::new(AtomicU64::new(NOW)));
    Server::start(Arc::new(config), Arc::new(MemoryStore::new()), clock).await.unwrap()
}

struct Client(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Client {
    async fn connect(server: &Server) -> Client {
        let mut client = Client(connect_async(format!("ws://{}/", server.addr())).await.unwrap().0);
        client.expect("[\"AUTH\",\"").await;
        client
    }

    async fn send(&mut self, text: impl Into<String>) {
        self.0.send(Message::text(text.into())).await.unwrap();
    }

    /// The next text; other frames of interest by name.
    async fn next(&mut self) -> String {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => return text.to_string(),
                Some(Ok(Message::Close(Some(frame)))) => return format!("close {}", u16::from(frame.code)),
                Some(Ok(Message::Pong(payload))) => return format!("pong {}", payload.len()),
                Some(Ok(_)) => {}
                other => return format!("end {}", other.is_none()),
            }
        }
    }

    #[track_caller]
    fn expect<'a>(&'a mut self, start: &'a str) -> impl Future<Output = ()> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let text = self.next().await;
            assert!(text.starts_with(start), "{caller}: got {text}, expected {start}");
        }
    }

    async fn publish(&mut self, event: &Event) {
        self.send(publish(event)).await;
        self.expect(&message::ok(&event.id, true, "")).await;
    }
}

fn json(event: &Event) -> String {
    String::from_utf8(event.canonical().json.to_vec()).unwrap()
}

fn publish(event: &Event) -> String {
    message::publish(&json(event))
}

fn note(number: u64) -> Event {
    Author::new(1).event(1, NOW - number, &[] as &[Vec<&str>], "hello")
}

/// Publish, query, subscribe, count, close: the basic flows, on two connections.
#[tokio::test]
async fn the_basic_flows() {
    let server = server(|_| {}).await;
    let (mut alice, mut bob) = (Client::connect(&server).await, Client::connect(&server).await);
    bob.send(r#"["REQ","live",{"kinds":[1]}]"#).await;
    bob.expect(r#"["EOSE","live",["finish"]]"#).await;
    alice.publish(&note(1)).await;
    bob.expect(&format!(r#"["EVENT","live",{}]"#, json(&note(1)))).await;
    alice.publish(&note(2)).await;
    bob.expect(&format!(r#"["EVENT","live",{}]"#, json(&note(2)))).await;
    alice.send(publish(&note(1))).await;
    alice.expect(&message::ok(&note(1).id, true, "duplicate: already have this event")).await;
    bob.send(r#"["CLOSE","live"]"#).await;
    bob.send(r#"["COUNT","c",{"kinds":[1]},{}]"#).await;
    bob.expect(r#"["COUNT","c",{"count":2}]"#).await;
    alice.publish(&note(3)).await;
    bob.send(r#"["REQ","old",{"limit":2}]"#).await;
    bob.expect(&format!(r#"["EVENT","old",{}]"#, json(&note(1)))).await;
    bob.expect(&format!(r#"["EVENT","old",{}]"#, json(&note(2)))).await;
    bob.expect(r#"["EOSE","old",["more"]]"#).await;
    server.stop().await.unwrap();
}

/// Sent in one go, a REQ sees the EVENTs before it as stored (T25).
#[tokio::test]
async fn t25_event_then_req_on_one_socket() {
    let server = server(|_| {}).await;
    let mut client = Client::connect(&server).await;
    for round in 0..20 {
        client.0.feed(Message::text(publish(&note(round)))).await.unwrap();
        let request = format!(r#"["REQ","r",{{"ids":["{}"]}}]"#, note(round).id);
        client.0.feed(Message::text(request)).await.unwrap();
        client.0.flush().await.unwrap();
        client.expect(&message::ok(&note(round).id, true, "")).await;
        client.expect(r#"["EVENT","r","#).await;
        client.expect(r#"["EOSE","r",["finish"]]"#).await;
    }
    server.stop().await.unwrap();
}

/// Bad messages, binary and broken frames, pings, fragments and a huge frame: each gets its answer or ends its own
/// connection, and another one does not notice (T41).
#[tokio::test]
async fn t41_bad_frames_end_one_connection_at_most() {
    let server = server(|_| {}).await;
    let (mut good, mut bad) = (Client::connect(&server).await, Client::connect(&server).await);
    bad.send("garbage").await;
    bad.expect(r#"["NOTICE","invalid: "#).await;
    bad.0.send(Message::binary(vec![1, 2, 3])).await.unwrap();
    bad.expect(r#"["NOTICE","invalid: "#).await;
    bad.0.send(Message::Ping(vec![7; 100].into())).await.unwrap();
    bad.expect("pong 100").await;
    let parts = [("[\"REQ\",", OpCode::Data(Data::Text), false), ("\"f\",{}]", OpCode::Data(Data::Continue), true)];
    for (part, opcode, last) in parts {
        bad.0.send(Message::Frame(Frame::message(part.as_bytes().to_vec(), opcode, last))).await.unwrap();
    }
    bad.expect(r#"["EOSE","f",["finish"]]"#).await;
    bad.send("[".repeat(10_000_000)).await;
    bad.expect("close 1009").await;
    let mut broken = Client::connect(&server).await;
    broken.0.send(Message::Frame(Frame::message(vec![0xff], OpCode::Data(Data::Text), true))).await.unwrap();
    broken.expect("close 1007").await;
    good.publish(&note(1)).await;
    server.stop().await.unwrap();
}

/// What was accepted is answered before the connections are closed as going away.
#[tokio::test]
async fn stopping_answers_what_was_accepted() {
    let server = server(|_| {}).await;
    let mut client = Client::connect(&server).await;
    client.send(r#"["REQ","all",{}]"#).await;
    client.expect(r#"["EOSE","all""#).await;
    client.publish(&note(0)).await;
    client.expect(r#"["EVENT","all""#).await;
    let stopping = tokio::spawn(server.stop());
    client.expect(&format!("close {}", u16::from(CloseCode::Away))).await;
    drop(client);
    stopping.await.unwrap().unwrap();
}

/// A reader that takes nothing is closed once its bound is reached; the publisher and another reader go on.
#[tokio::test]
async fn a_reader_that_takes_nothing_is_closed() {
    let server = server(|config| config.limits.live_queue_bytes_max = 1_100_000).await;
    let mut sleeper = Client::connect(&server).await;
    sleeper.send(r#"["REQ","all",{}]"#).await;
    sleeper.expect(r#"["EOSE","all""#).await;
    let (mut publisher, mut reader) = (Client::connect(&server).await, Client::connect(&server).await);
    reader.send(r#"["REQ","all",{}]"#).await;
    reader.expect(r#"["EOSE","all""#).await;
    let text = "x".repeat(200_000);
    for number in 0..60 {
        publisher.publish(&Author::new(1).event(1, NOW - number, &[] as &[Vec<&str>], &text)).await;
        reader.expect(r#"["EVENT","all""#).await;
    }
    let mut received = 0;
    while sleeper.next().await.starts_with(r#"["EVENT""#) {
        received += 1;
    }
    assert!(received < 60, "the sleeper was cut off");
    server.stop().await.unwrap();
}

/// Subscribers that come while events are published at full speed get each event once, stored or live (T26).
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn t26_no_gap_and_no_repeat_under_load() {
    const EVENTS: u64 = 300;
    let server = server(|config| config.storage.batch_events_max = 7).await;
    let mut publisher = Client::connect(&server).await;
    let mut readers = tokio::task::JoinSet::new();
    for number in 0..EVENTS {
        publisher.0.feed(Message::text(publish(&note(number)))).await.unwrap();
        if number % 10 == 0 {
            publisher.0.flush().await.unwrap();
            let mut reader = Client::connect(&server).await;
            readers.spawn(async move {
                reader.send(r#"["REQ","r",{"kinds":[1],"limit":500},{"limit":500}]"#).await;
                let mut seen = std::collections::HashSet::new();
                loop {
                    let text = reader.next().await;
                    if text.starts_with("[\"COUNT\"") {
                        return assert_eq!(seen.len(), EVENTS as usize);
                    }
                    assert!(text.starts_with("[\"EOSE\"") || seen.insert(text), "an event came twice");
                    if seen.len() == EVENTS as usize {
                        // A repeat that is still to come comes before the answer to this.
                        reader.send("[\"COUNT\",\"c\",{}]").await;
                    }
                }
            });
        }
    }
    publisher.0.flush().await.unwrap();
    while let Some(read) = readers.join_next().await {
        read.unwrap();
    }
    server.stop().await.unwrap();
}

/// A client that never finishes its request, and one that never answers a ping, are closed.
#[tokio::test]
async fn silent_clients_are_closed() {
    let server = server(|config| {
        config.limits.handshake_timeout_ms = 50;
        config.limits.idle_ping_secs = 0;
        config.limits.idle_timeout_secs = 1;
    })
    .await;
    let mut half = TcpStream::connect(server.addr()).await.unwrap();
    half.write_all(b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
    assert_eq!(half.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    let mut mute = TcpStream::connect(server.addr()).await.unwrap();
    let upgrade = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    mute.write_all(upgrade.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    mute.read_to_end(&mut all).await.unwrap();
    let frames = all.split_off(all.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4);
    let frames = &frames[2 + usize::from(frames[1])..]; // behind the challenge
    assert_eq!(frames[..2], [0x89, 0], "one ping");
    assert_eq!((frames[2], &frames[4..6]), (0x88, &1008u16.to_be_bytes()[..]), "then the end");
    server.stop().await.unwrap();
}

async fn http(server: &Server, head: &str) -> String {
    let mut socket = TcpStream::connect(server.addr()).await.unwrap();
    socket.write_all(format!("{head}\r\nHost: relay.test\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[track_caller]
fn contains(answer: &str, expected: &[&str]) {
    let lower = answer.to_lowercase();
    expected.iter().for_each(|part| assert!(lower.contains(&part.to_lowercase()), "no {part} in {answer}"));
}

/// One address: NIP-11 with CORS, the page, the health check, and an error for everything else.
#[tokio::test]
async fn http_answers() {
    let server = server(|config| config.info.name = "Hut".to_owned()).await;
    let document = http(&server, "GET / HTTP/1.1\r\nAccept: text/html;q=0.1, Application/Nostr+JSON;q=1").await;
    let cors =
        ["access-control-allow-origin: *", "access-control-allow-headers: *", "access-control-allow-methods: GET"];
    contains(&document, &cors);
    contains(&document, &["HTTP/1.1 200", "content-type: application/nostr+json", "\"name\":\"Hut\"", "date: "]);
    contains(&http(&server, "OPTIONS / HTTP/1.1").await, &cors);
    let page = http(&server, "GET /?x=1 HTTP/1.1\r\nAccept: text/html").await;
    contains(&page, &["HTTP/1.1 200", "text/html", "<h1>Hut</h1>", "ws://relay.test", "vary: accept"]);
    contains(&http(&server, "HEAD / HTTP/1.1").await, &["HTTP/1.1 200", "content-length: "]);
    contains(&http(&server, "GET /healthz HTTP/1.1").await, &["HTTP/1.1 200", "ok"]);
    contains(&http(&server, "GET /other HTTP/1.1").await, &["HTTP/1.1 404"]);
    contains(&http(&server, "POST / HTTP/1.1\r\nContent-Length: 0").await, &["HTTP/1.1 405", "allow: GET"]);
    server.stop().await.unwrap();
}

/// Upgrades that are not what RFC 6455 asks for are refused by HTTP.
#[tokio::test]
async fn malformed_upgrades_are_refused() {
    let server = server(|_| {}).await;
    let upgrade = "GET / HTTP/1.1\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-";
    contains(&http(&server, &format!("{upgrade}Version: 8")).await, &["HTTP/1.1 426", "sec-websocket-version: 13"]);
    contains(&http(&server, &format!("{upgrade}Version: 13")).await, &["HTTP/1.1 400"]);
    contains(&http(&server, &format!("{upgrade}Version: 13\r\nSec-WebSocket-Key: x")).await, &["HTTP/1.1 400"]);
    contains(&http(&server, "GET / HTTP/1.1\r\nUpgrade: websocket").await, &["HTTP/1.1 400"]);
    server.stop().await.unwrap();
}

/// A forwarded address counts only where a trusted proxy states it; its places are given back.
#[tokio::test]
async fn places_are_per_forwarded_address() {
    let server = server(|config| config.limits.connections_per_ip_max = 1).await;
    let upgrade = |ip: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Forwarded-For: 198.51.100.9, {ip}, 127.0.0.1\r\n\r\n"
        )
    };
    let status = async |ip: &str| {
        let mut socket = TcpStream::connect(server.addr()).await.unwrap();
        socket.write_all(upgrade(ip).as_bytes()).await.unwrap();
        let mut status = [0; 12];
        socket.read_exact(&mut status).await.unwrap();
        (String::from_utf8(status.to_vec()).unwrap(), socket)
    };
    let (first, _open) = status("192.0.2.1").await;
    assert_eq!(first, "HTTP/1.1 101");
    assert_eq!(status("192.0.2.1").await.0, "HTTP/1.1 429");
    assert_eq!(status("192.0.2.2").await.0, "HTTP/1.1 101");
    server.stop().await.unwrap();
}
