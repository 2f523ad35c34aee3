//! T41 and beyond: whatever one connection does, it gets its answer or its end, and the others do not notice.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::support::client::{has_standard_prefix, soon};
use crate::support::{Client, Keys, NOW, Relay, json_of};

/// A connection with a live subscription, and the proof that it still works.
struct Bystander {
    reader: Client,
    writer: Client,
    notes: u64,
}

impl Bystander {
    async fn on(relay: &Relay) -> Bystander {
        let mut reader = relay.client().await;
        reader.req("live", &[json!({"limit": 0})]).await;
        Bystander { reader, writer: relay.client().await, notes: 0 }
    }

    /// Publishes on one connection and reads it live on the other.
    async fn is_well(&mut self) {
        self.notes += 1;
        let note = Keys::new(99).note(NOW, &self.notes.to_string());
        self.writer.store(&note).await;
        assert_eq!(self.reader.live("live").await["id"], json!(note.id.to_hex()));
    }
}

/// Messages that mean nothing get the answer that their sender waits for, and the connection lives on.
#[tokio::test]
async fn t41_malformed_messages_are_answered() {
    let relay = Relay::start().await;
    let mut bystander = Bystander::on(&relay).await;
    let mut client = relay.client().await;
    let deep = "[".repeat(100_000);
    for (text, verb) in [
        ("", "NOTICE"),
        (" ", "NOTICE"),
        ("hello", "NOTICE"),
        ("{}", "NOTICE"),
        ("[]", "NOTICE"),
        ("null", "NOTICE"),
        ("1", "NOTICE"),
        ("[1]", "NOTICE"),
        ("[\"EVENT\"]", "NOTICE"),
        ("[\"EVENT\",1]", "NOTICE"),
        ("[\"EVENT\",{}]", "NOTICE"),
        ("[\"EVENT\",{\"id\":5}]", "NOTICE"),
        ("[\"EVENT\",{\"id\":\"zz\"}]", "OK"),
        ("[\"event\",{}]", "NOTICE"),
        ("[\"REQ\"]", "NOTICE"),
        ("[\"REQ\",{}]", "NOTICE"),
        ("[\"REQ\",\"a\"]", "CLOSED"),
        ("[\"REQ\",\"a\",1]", "CLOSED"),
        ("[\"COUNT\",\"a\"]", "CLOSED"),
        ("[\"CLOSE\"]", "NOTICE"),
        ("[\"CLOSE\",1]", "NOTICE"),
        ("[\"OK\",\"x\",true,\"\"]", "NOTICE"),
        ("[\"NEG\u{0}\",\"x\"]", "NOTICE"),
        ("[\"REQ\",\"a\",{}]]", "NOTICE"),
        ("[\"REQ\",\"a\",{}", "NOTICE"),
        ("\u{feff}[\"REQ\",\"a\",{}]", "NOTICE"),
        (deep.as_str(), "NOTICE"),
    ] {
        client.send(text).await;
        let answer = client.next().await;
        assert_eq!(answer[0], verb, "{text:.80}: {answer}");
        let reason = answer.as_array().and_then(|parts| parts.last()).and_then(Value::as_str).unwrap_or_default();
        assert!(has_standard_prefix(reason), "{text:.80}: {answer}");
        if verb == "OK" {
            assert_eq!(answer[2], false);
        }
        client.assert_alive().await;
    }
    bystander.is_well().await;
}

/// Binary frames are no messages of Nostr: a NOTICE or the end of that connection.
#[tokio::test]
async fn t41_binary_frames_hurt_nobody() {
    let relay = Relay::start().await;
    let mut bystander = Bystander::on(&relay).await;
    let mut client = relay.client().await;
    client.send_message(Message::binary(vec![0xff; 1_000])).await;
    if let Some(frame) = client.next_frame().await {
        let answer: Value = serde_json::from_str(frame.to_text().unwrap()).unwrap();
        assert_eq!(answer[0], "NOTICE", "{answer}");
        client.assert_alive().await;
    }
    bystander.is_well().await;
}

/// Bytes that are no UTF-8 in a text frame end that connection (RFC 6455), and no other.
#[tokio::test]
async fn t41_text_that_is_no_text_ends_its_connection() {
    let relay = Relay::start().await;
    let mut bystander = Bystander::on(&relay).await;
    let mut client = relay.client().await;
    let frame = Frame::message(vec![b'[', 0xff, 0xfe], OpCode::Data(Data::Text), true);
    client.send_message(Message::Frame(frame)).await;
    client.assert_closed().await;
    bystander.is_well().await;
}

/// One message in many fragments, with pings in between, is one message; pings are answered.
#[tokio::test]
async fn t41_fragments_and_pings() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let note = Keys::new(1).note(NOW, "in pieces");
    let text = format!("[\"EVENT\",{}]", json_of(&note)).into_bytes();
    let pieces: Vec<&[u8]> = text.chunks(7).collect();
    for (at, piece) in pieces.iter().enumerate() {
        let kind = if at == 0 { Data::Text } else { Data::Continue };
        let frame = Frame::message(piece.to_vec(), OpCode::Data(kind), at + 1 == pieces.len());
        client.send_message(Message::Frame(frame)).await;
        if at == 1 {
            client.send_message(Message::Ping("still there?".into())).await;
        }
    }
    let mut pong = false;
    loop {
        match client.next_raw().await.unwrap().unwrap() {
            Message::Pong(payload) => pong = payload == "still there?",
            Message::Text(answer) => {
                let answer: Value = serde_json::from_str(&answer).unwrap();
                assert_eq!(answer, json!(["OK", note.id.to_hex(), true, ""]));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(pong, "the ping between the fragments was answered");
}

/// A frame or a message beyond the limit ends its connection; the largest that fits is taken.
#[tokio::test]
async fn t41_frames_beyond_the_limit_end_their_connection() {
    let relay = Relay::with(|config| config.limits.frame_bytes_max = 65_536).await;
    let mut bystander = Bystander::on(&relay).await;
    let req = "[\"REQ\",\"s\",{\"ids\":[]}]";
    let spaces = |bytes: usize| req.to_owned() + &" ".repeat(bytes - req.len());
    let mut client = relay.client().await;
    client.send(spaces(65_536)).await;
    assert_eq!(client.until_eose("s").await.ids(), Vec::<String>::new());
    // The relay may close while this is still being written.
    let _ = client.try_send(Message::text(spaces(65_537))).await;
    client.assert_closed().await;
    bystander.is_well().await;

    let mut client = relay.client().await;
    let _ = client.try_send(Message::text("x".repeat(10_000_000))).await;
    client.assert_closed().await;
    bystander.is_well().await;

    let mut client = relay.client().await;
    for at in 0..20 {
        let kind = if at == 0 { Data::Text } else { Data::Continue };
        let frame = Frame::message(vec![b' '; 10_000], OpCode::Data(kind), at == 19);
        if client.try_send(Message::Frame(frame)).await.is_err() {
            break;
        }
    }
    client.assert_closed().await;
    bystander.is_well().await;
}

/// Bytes that are no HTTP, half a handshake, a handshake that is never finished, a frame header of 2^63 bytes.
#[tokio::test]
async fn t41_garbage_at_every_stage() {
    let relay = Relay::start().await;
    let mut bystander = Bystander::on(&relay).await;
    let mut unfinished = TcpStream::connect(relay.addr()).await.unwrap();
    unfinished.write_all(b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
    for garbage in
        [&[0u8; 4_096][..], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n"]
    {
        let mut stream = TcpStream::connect(relay.addr()).await.unwrap();
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    }
    let mut client = relay.client().await;
    let header = [0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4];
    client.stream().write_all(&header).await.unwrap();
    client.assert_closed().await;
    let mut client = relay.client().await;
    client.stream().write_all(&[0xff; 64]).await.unwrap();
    client.assert_closed().await;
    drop(unfinished);
    bystander.is_well().await;
}

/// More filters, list items and subscriptions than the limits say are refused; as many as they say are not.
#[tokio::test]
async fn limits_of_a_req_hold_at_their_edges() {
    let relay = Relay::with(|config| {
        config.limits.filters_max = 3;
        config.limits.filter_values_max = 10;
        config.limits.subscription_values_max = 15;
    })
    .await;
    let mut client = relay.client().await;
    client.req("s", &vec![json!({"kinds": [1]}); 3]).await;
    client.refused("t", &vec![json!({"kinds": [1]}); 4]).await;
    let values = |count: usize| json!({"#t": (0..count).map(|n| n.to_string()).collect::<Vec<_>>()});
    client.req("s", &[values(10)]).await;
    client.refused("t", &[values(11)]).await;
    client.refused("t", &[values(6), json!({"kinds": [1, 2, 3, 4, 5]})]).await;
    client.req("t", &[values(5)]).await;
    client.refused("u", &[json!({"kinds": [1]})]).await;
    client.close("t").await;
    client.req("u", &[json!({"kinds": [1]})]).await;
    client.count(&[values(10)]).await;
}

/// A reader that does not read is cut off; publishers and other readers go on and miss nothing.
#[tokio::test]
async fn a_slow_reader_holds_up_nobody_else() {
    let relay = Relay::with(|config| {
        config.limits.frame_bytes_max = 65_536;
        config.limits.live_queue_bytes_max = 262_144;
    })
    .await;
    let mut slow = relay.client().await;
    slow.req("live", &[json!({"limit": 0})]).await;
    let mut reader = relay.client().await;
    reader.req("live", &[json!({"limit": 0})]).await;
    let mut publisher = relay.client().await;
    // More than the queue and both socket buffers can hold.
    let text = "x".repeat(50_000);
    for n in 0..400 {
        let note = Keys::new(1).note(NOW + n, &text);
        publisher.store(&note).await;
        assert_eq!(reader.live("live").await["id"], json!(note.id.to_hex()));
    }
    let mut seen = 0;
    while slow.next_frame().await.is_some() {
        seen += 1;
    }
    assert!(seen < 400, "a connection that reads nothing was kept to the end");
}

/// A client that asks for much and reads nothing costs its own connection only.
#[tokio::test]
async fn a_reader_of_stored_events_that_never_reads() {
    let relay = Relay::start().await;
    let mut publisher = relay.client().await;
    let text = "x".repeat(100_000);
    let notes: Vec<_> = (0..100).map(|n| Keys::new(1).note(NOW + n, &text)).collect();
    publisher.store_all(&notes).await;
    let mut sleepers = Vec::new();
    for _ in 0..8 {
        let mut sleeper = relay.client().await;
        for id in 0..8 {
            sleeper.subscribe(&id.to_string(), &[json!({})]).await;
        }
        sleepers.push(sleeper);
    }
    assert_eq!(relay.client().await.query(json!({})).await.events.len(), 100);
    Bystander::on(&relay).await.is_well().await;
}

/// Connections that come and go in every state leave nothing behind.
#[tokio::test]
async fn connections_that_vanish_leave_no_trace() {
    let relay = Relay::start().await;
    let note = Keys::new(1).note(NOW, "");
    for round in 0..20 {
        let client = async |n: u32| {
            let mut client = relay.client().await;
            match n % 4 {
                0 => drop(client.req("s", &[json!({})]).await),
                1 => client.subscribe("s", &[json!({})]).await,
                2 => client.send(format!("[\"EVENT\",{}]", json_of(&note))).await,
                _ => drop(client.try_send(Message::Close(None)).await),
            }
        };
        join_all((0..4).map(|n| client(n + round))).await;
    }
    let mut client = relay.client().await;
    client.publish(&note).await;
    assert_eq!(client.count(&[json!({})]).await, 1);
    Bystander::on(&relay).await.is_well().await;
}

/// More connections than `connections_max` are turned away, and a place that is left can be taken.
#[tokio::test]
async fn connections_beyond_the_limit_are_turned_away() {
    let relay = Relay::with(|config| config.limits.connections_max = 2).await;
    let (mut one, mut two) = (relay.client().await, relay.client().await);
    one.assert_alive().await;
    two.assert_alive().await;
    let mut stream = TcpStream::connect(relay.addr()).await.unwrap();
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n").await;
    let mut answer = vec![0; 12];
    let read = soon("the refusal", stream.read_exact(&mut answer)).await;
    assert!(read.is_err() || !answer.ends_with(b"101"), "{}", String::from_utf8_lossy(&answer));
    one.assert_alive().await;
    two.assert_alive().await;
}
